"""The parts of vision-language models: which parameter belongs to which, by the names that transformers gives."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from accelerate import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn

from data_builders.records import InputError
from mpo.models import PARTS, load_for_training, lora_targets, part_of, residual_branches, train_parts

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


QKV = {"q_proj", "k_proj", "v_proj"}
DECODER = {*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"}
TOWER = {*QKV, "out_proj", "fc1", "fc2"}
LINEAR: dict[str, dict[str, set[str]]] = {  # what the linear layers of each part are called
    "Llava": {"vision": TOWER, "projector": {"linear_1", "linear_2"}},
    "LlavaOnevision": {"vision": TOWER, "projector": {"linear_1", "linear_2"}},
    "InternVL": {"vision": {*QKV, "projection_layer", "fc1", "fc2"}, "projector": {"linear_1", "linear_2"}},
    "Gemma3": {"vision": TOWER, "projector": set()},  # it multiplies by a matrix of its own
    "Qwen2VL": {"vision": {"qkv", "proj", "fc1", "fc2"}, "projector": {"0", "2"}},
    "Qwen2_5_VL": {"vision": {"qkv", "proj", "gate_proj", "up_proj", "down_proj"}, "projector": {"0", "2"}},
    "Qwen3VL": {"vision": {"qkv", "proj", "linear_fc1", "linear_fc2"}, "projector": {"linear_fc1", "linear_fc2"}},
    "Idefics3": {"vision": TOWER, "projector": {"proj"}},
    "SmolVLM": {"vision": TOWER, "projector": {"proj"}},
}
LAYERS_OF_TINY_TOWERS = {family: 0 if family.startswith("Qwen") else 1 for family in FAMILIES}


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


def targeted(model: nn.Module, pattern: str) -> set[str]:
    """As PEFT matches it."""
    return {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_onto_all_linear_layers_of_a_part_and_onto_no_others(family: str) -> None:
    model, expected = build(family), {**LINEAR[family], "llm": DECODER}
    for part in [part for part in PARTS if expected[part]]:
        names = targeted(model, lora_targets(model, [part]))
        assert {name.rpartition(".")[2] for name in names} == expected[part]
        assert all(
            isinstance(model.get_submodule(name), nn.Linear) and part_of(f"{name}.weight") == part for name in names
        )
        adapted = get_peft_model(build(family), LoraConfig(r=2, target_modules=lora_targets(model, [part])))
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert {part_of(name) for name in trained} == {part}
        assert len(trained) == 2 * len(names)


def test_the_pattern_of_adapters_is_short_and_holds_for_any_number_of_layers() -> None:
    model = build("Idefics3")
    assert lora_targets(model, ["projector"]) == r"model\.connector\.modality_projection\.(proj)"
    assert lora_targets(model, ["llm"]) == (
        r"model\.text_model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)|"
        r"model\.text_model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"
    )
    assert "lm_head" not in lora_targets(model, PARTS)


def test_what_is_trained_whole_gets_no_adapter() -> None:
    model = build("InternVL")
    names = targeted(model, lora_targets(model, ["llm", "vision"], saved=["down_proj", "attention"]))
    assert {name.rpartition(".")[2] for name in names} == {*QKV, "o_proj", "gate_proj", "up_proj", "fc1", "fc2"}
    assert not any(".attention." in name for name in names)
    with pytest.raises(InputError, match=r"`lora_parts` names \['projector'\].*leave them out"):
        lora_targets(model, ["llm", "projector"], saved=["multi_modal_projector"])


def test_adapters_for_parts_that_do_not_exist_or_have_no_linear_layer_are_refused() -> None:
    with pytest.raises(InputError, match=r"`lora_parts` names \['head'\]: the parts of a model are vision"):
        lora_targets(build("Llava"), ["head"])
    with pytest.raises(InputError, match=r"\['projector'\], but Gemma3ForConditionalGeneration has no linear layer"):
        lora_targets(build("Gemma3"), ["llm", "projector"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_has_two_branches_in_each_layer_where_pictures_stand_side_by_side(family: str) -> None:
    branches = residual_branches(build(family))
    assert [len(layer) for layer in branches] == [2] * LAYERS_OF_TINY_TOWERS[family]
    assert all(type(mlp).__name__.endswith("MLP") for _, mlp in branches)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_can_be_wrapped_layer_by_layer(family: str, tmp_path: Path) -> None:
    tiny_models.build(family, tmp_path)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(load_for_training(str(tmp_path)))
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert any(layer.__name__.endswith("DecoderLayer") for layer in wrapped)
