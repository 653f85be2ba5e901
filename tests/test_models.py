"""The parts of vision-language models: which parameter belongs to which, by the names that transformers gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from data_builders.records import InputError
from mpo.models import part_of, train_parts

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
TEXT = {**SMALL, "num_key_value_heads": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA, QWEN = {"model_type": "llama", **TEXT}, {"model_type": "qwen2", **TEXT}
SQUARE = {**SMALL, "image_size": 32, "patch_size": 16}
CLIP, SIGLIP = {"model_type": "clip_vision_model", **SQUARE}, {"model_type": "siglip_vision_model", **SQUARE}
QWEN_TOWER = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}

LLAVA_PARTS = {
    "vision": {"vision_tower"},
    "projector": {"multi_modal_projector"},
    "llm": {"language_model", "lm_head"},
}
QWEN_PARTS = {"vision": {"visual"}, "projector": {"visual.merger"}, "llm": {"language_model", "lm_head"}}
IDEFICS_PARTS = {"vision": {"vision_model"}, "projector": {"connector"}, "llm": {"text_model", "lm_head"}}
TIED = {"llm": {"language_model"}}  # the output layer is the embedding, and no parameter of its own

FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, set[str]]]] = {
    "Llava": (lambda: hf.LlavaConfig(vision_config=CLIP, text_config=LLAMA), LLAVA_PARTS),
    "LlavaOnevision": (
        lambda: hf.LlavaOnevisionConfig(vision_config=SIGLIP, text_config=QWEN),
        {**LLAVA_PARTS, "projector": {"multi_modal_projector", "image_newline"}},
    ),
    "InternVL": (
        lambda: hf.InternVLConfig(
            vision_config={**SMALL, "image_size": [32, 32], "patch_size": [16, 16]}, text_config=QWEN
        ),
        LLAVA_PARTS | TIED,
    ),
    "Gemma3": (
        lambda: hf.Gemma3Config(vision_config=SIGLIP, text_config={**TEXT, **HEADS}, mm_tokens_per_image=4),
        LLAVA_PARTS | TIED,
    ),
    "Qwen2VL": (
        lambda: hf.Qwen2VLConfig(
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}, text_config=TEXT
        ),
        QWEN_PARTS,
    ),
    "Qwen2_5_VL": (lambda: hf.Qwen2_5_VLConfig(vision_config=QWEN_TOWER, text_config=TEXT), QWEN_PARTS),
    "Qwen3VL": (
        lambda: hf.Qwen3VLConfig(
            vision_config={**QWEN_TOWER, "deepstack_visual_indexes": [0]}, text_config={**TEXT, **HEADS}
        ),
        {**QWEN_PARTS, "projector": {"visual.merger", "visual.deepstack_merger_list"}},
    ),
    "Idefics3": (lambda: hf.Idefics3Config(vision_config=SQUARE, text_config=LLAMA), IDEFICS_PARTS),
    "SmolVLM": (lambda: hf.SmolVLMConfig(vision_config=SQUARE, text_config=LLAMA), IDEFICS_PARTS),
}


def build(family: str) -> nn.Module:
    """A model of that family, whose parameters have names and shapes and no memory."""
    with torch.device("meta"):
        return getattr(hf, f"{family}ForConditionalGeneration")(FAMILIES[family][0]())


def home(parameter: str) -> str:
    """The module that a parameter stands in, the one inside the tower where there is such a one."""
    first, second = (*parameter.removeprefix("model.").split("."), "")[:2]
    return f"{first}.{second}" if "merger" in second else first


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_belongs_to_the_part_that_its_module_is(family: str) -> None:
    found: dict[str, set[str]] = {}
    for name, _ in build(family).named_parameters():
        found.setdefault(part_of(name), set()).add(home(name))
    assert found == FAMILIES[family][1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", [["vision"], ["projector"], ["llm"], ["vision", "projector"]])
def test_the_parts_that_are_named_are_trained_and_the_others_frozen(family: str, parts: list[str]) -> None:
    model = build(family)
    counts = train_parts(model, parts)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part_of(name) in parts), name
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(counts.values()) == trained > 0
    assert {part for part, count in counts.items() if count} == set(parts)


def tiny() -> nn.Module:
    """A tower of 8 parameters, a projector of 3 and a language model of 10."""
    model = nn.Module()
    model.vision_tower = nn.Linear(2, 4, bias=False)
    model.multi_modal_projector = nn.Linear(3, 1, bias=False)
    model.language_model = nn.Linear(2, 5, bias=False)
    return model


def test_trained_parameters_are_counted_by_part() -> None:
    assert train_parts(tiny(), ["vision", "projector", "llm"]) == {"vision": 8, "projector": 3, "llm": 10}
    assert train_parts(tiny(), ["projector"]) == {"vision": 0, "projector": 3, "llm": 0}


def test_what_was_frozen_is_trained_again_when_it_is_named() -> None:
    model = tiny()
    train_parts(model, ["vision"])
    train_parts(model, ["llm"])
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True]


def test_adapted_and_wrapped_models_keep_their_parts() -> None:
    names = {
        "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight": "vision",
        "base_model.model.model.multi_modal_projector.linear_1.weight": "projector",
        "module.model.language_model.layers.0.mlp.up_proj.weight": "llm",
        "vision_tower.vision_model.embeddings.patch_embedding.weight": "vision",
        "model.layers.0.visual_expert.weight": "llm",
        "language_model.model.reconnector.weight": "llm",
    }
    assert {name: part_of(name) for name in names} == names


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["vision", "tower"], r"`train` names \['tower'\]: the parts of a model are vision, projector, llm"),
        ([], "`train` is empty: name at least one of vision, projector, llm"),
    ],
)
def test_parts_that_do_not_exist_and_none_at_all_are_refused(parts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_parts(tiny(), parts)


def test_a_part_that_the_model_lacks_is_refused() -> None:
    model = nn.Module()
    model.language_model = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"Module has no parameters in \['projector', 'vision'\]: leave them out of"):
        train_parts(model, ["vision", "projector", "llm"])
