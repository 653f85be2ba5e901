"""A forest through real models equals their separate rows: nine families, backends, windows, several trees a row."""

import re
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import FAMILIES, picture, preference_rows
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference
from trl.trainer.utils import add_fused_lm_head

from mpo.forest_collators import ForestCollator, TextForestCollator
from mpo.forest_inputs import FLEX_BLOCK, why_not
from mpo.scores import score_tokens

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ROWS = [
    {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7, 8, 9], "rejected_ids": [5, 6, 10]},
    {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7, 8, 9], "rejected_ids": [11, 12, 13, 14, 15, 16]},
    {"prompt_ids": [1, 2, 30], "chosen_ids": [31], "rejected_ids": [5, 6, 7]},
    {"prompt_ids": [40, 41], "chosen_ids": [42, 43], "rejected_ids": [42, 44]},
]


def row(question: str, chosen: str, rejected: str, *pictures: Any) -> dict[str, Any]:
    texts = {"chosen": chosen, "rejected": rejected}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
    return {"images": list(pictures), "prompt": [{"role": "user", "content": question}], **turns}


def rows() -> list[dict[str, Any]]:
    """Every case: one, several and no pictures, a shared picture, shared halves, responses that are there twice."""
    one, other = picture(5), picture(6, (60, 44))
    return [
        *preference_rows(4),
        row("What is it?", "It is a red square.", "It is a circle.", one),  # half of it shared, as in DropoutNTP
        row("What is it?", "It is a red square.", "Nothing.", one),  # the chosen one again
        row("Which colour?", "Red.", "Blue.", one),
        row("What is it?", "It is a red square.", "Nothing.", other),  # the same tokens, another picture
        row("Compare.", "The first is larger.", "The first one.", one, other),
    ]


def scored(model: Any, batch: dict[str, Tensor], width: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of the responses' tokens, (2B, width), and gradients of a weighted sum of them."""
    model.zero_grad()
    logps = score_tokens(model, model, batch).logps
    kept = batch["completion_mask"][:, 1:].bool()
    found = torch.zeros(len(kept), width)
    for index, (values, mask) in enumerate(zip(logps, kept, strict=True)):
        found[index, : mask.sum()] = values[mask]
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    (found * weights).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model: Any, plain: Any, forest: Any) -> None:
    width = forest["completion_mask"].size(1) - 1
    expected, expected_gradients = scored(model, plain, width)
    found, gradients = scored(model, forest, width)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * max(1.0, scale), rtol=0, msg=name)


def prepared(model: Any, attention: str) -> Any:
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights are so small that nothing would show
            parameter.add_(0.05 * torch.randn_like(parameter))
    add_fused_lm_head(model)
    return model.train()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_gives_a_forest_what_it_gives_separate_rows(name: str, attention: str) -> None:
    processor, model = FAMILIES[name]()
    model = prepared(model, attention)
    collate = ForestCollator(processor, image_token_id=model.config.image_token_id)
    plain = DataCollatorForVisionPreference(processor)(rows())
    for max_tokens in (None, 4096):  # some trees to a row, and all of them in one
        collate.max_forest_tokens = max_tokens
        forest = collate(rows())
        assert forest["input_ids"].numel() < 0.8 * plain["input_ids"].numel()
        check_equal(model, plain, forest)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}))
@torch.no_grad()
def test_flex_attention_gives_a_forest_the_same_where_a_family_has_it(name: str) -> None:
    """Forward only: on a CPU it has no gradients."""
    processor, model = FAMILIES[name]()
    model = prepared(model, "sdpa")
    collate = ForestCollator(processor, image_token_id=model.config.image_token_id, multiple_of=FLEX_BLOCK)
    forest = collate(rows())
    assert forest["input_ids"].size(1) % FLEX_BLOCK == 0
    expected = score_tokens(model, model, forest).logps
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # torch 2.13 compiles wrong C++ of masks that read tensors
        found = score_tokens(model, model, forest).logps
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        hf.LlamaConfig(**TEXT),
        hf.Qwen3Config(**TEXT, head_dim=8),
        hf.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=3, max_window_layers=1),
        hf.MistralConfig(**TEXT, sliding_window=3),
        hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=3),
    ],
    ids=lambda config: config.model_type,
)
def test_texts_and_windows_shorter_than_the_row(config: Any, attention: str) -> None:
    torch.manual_seed(0)
    model = prepared(hf.AutoModelForCausalLM.from_config(config), attention)
    assert why_not(model) is None
    plain = DataCollatorForPreference(0)([dict(row) for row in ROWS])
    for max_tokens in (None, 64):
        check_equal(model, plain, TextForestCollator(0, max_forest_tokens=max_tokens)(ROWS))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4), "carry a state"),
        (
            hf.Qwen3NextConfig(**{**TEXT, "num_hidden_layers": 2}, head_dim=8, num_experts=2, num_experts_per_tok=1),
            "linear_attention|carry a state",
        ),
        (hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2), "takes no positions"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_attention_that_takes_no_tree_is_told_from_the_model(config: Any, reason: str) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    assert re.search(reason, why_not(model))


def test_a_family_that_was_not_shown_to_be_exact_is_not_trusted() -> None:
    config = hf.PaliGemmaConfig(
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        projection_dim=16,
    )
    with torch.device("meta"):
        model = hf.PaliGemmaForConditionalGeneration(config)
    assert "not among the families" in why_not(model)


def test_an_attention_backend_without_masks_is_not_used() -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**TEXT))
    model.config._attn_implementation = "flash_attention_2"
    assert "'flash_attention_2' takes no mask for trees" in why_not(model)
