"""What a model's forward takes of a forest: masks for its attention backend, and positions.

A batch of `mpo.forest` stands in one integer per token, `last`; here it becomes what each backend and family wants.
The vision-language families named below were shown to give the same log-probabilities and gradients on a forest as on
separate sequences (`tests/test_forest.py`); others, and attention that takes no tree, keep to the plain path.

Shapes: R rows, L tokens in the longest row, M trees.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mpo import forest_attention
from mpo.forest import visible

# Their texts are one causal sequence whose pictures stand in for tokens, and nothing else looks at places in the row.
_SHOWN_EXACT = {
    *("internvl", "llava", "llava_onevision", "idefics3", "smolvlm", "gemma3"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
}
_LAYERS = {"full_attention", "sliding_attention"}
_BACKENDS = {"sdpa", "eager", "flex_attention"}
_TAKES_BOOLS = {"sdpa", forest_attention.NAME}
FLEX_BLOCK = 128  # tokens that FlexAttention takes or leaves together


def why_not(model: PreTrainedModel) -> str | None:
    """Why a model cannot take a forest; None if it can."""
    config, text = model.config, model.config.get_text_config()
    if text is not config and config.model_type not in _SHOWN_EXACT:
        return f"{config.model_type} is not among the families that were shown to give the same numbers"
    if getattr(model, "_is_stateful", False):
        return f"{text.model_type} has layers that carry a state from token to token"
    if others := sorted(set(getattr(text, "layer_types", None) or []) - _LAYERS):
        return f"{text.model_type} has layers of {', '.join(others)}"
    if getattr(text, "use_bidirectional_attention", False):
        return f"{text.model_type} lets tokens see later ones"
    if text._attn_implementation not in _BACKENDS | _TAKES_BOOLS:
        return (
            f"`attn_implementation` {text._attn_implementation!r} takes no mask for trees; use one of "
            f"{', '.join(sorted(_BACKENDS))}"
        )
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{text.model_type} takes no positions"
    return None


def forest_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Masks and positions for one forward of a model over a forest.

    Args:
        model: Without wrappers of DDP, DeepSpeed or PEFT.
        batch: Of a forest collator: `input_ids`, `positions`, `last`, (R, L) each; for Qwen-VL and Gemma3 what
            `root_*` and `token_type_ids` say of pictures.

    Returns:
        `attention_mask` and `position_ids`.
    """
    return {"attention_mask": _masks(model, batch), "position_ids": _positions(model, batch)}


def _masks(model: PreTrainedModel, batch: Mapping[str, Any]) -> Any:
    text = model.config.get_text_config()
    blocks = _picture_blocks(batch) if model.config.model_type == "gemma3" else None
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    masks = {
        kind: _mask(text._attn_implementation, batch, model.dtype, blocks, window if "sliding" in kind else None)
        for kind in sorted(kinds)
    }
    return masks if getattr(text, "layer_types", None) and len(masks) > 1 else next(iter(masks.values()))


def _mask(
    backend: str, batch: Mapping[str, Any], dtype: torch.dtype, blocks: Tensor | None, window: int | None
) -> Any:
    """One mask as the backend takes it: bool for SDPA, added numbers for eager, blocks for FlexAttention."""
    last, positions = batch["last"], batch["positions"]
    if backend == "flex_attention":
        return _block_mask(last, positions, blocks, window)
    seen = visible(last)
    if blocks is not None:
        seen = seen | ((blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] >= 0))
    if window is not None:
        seen = seen & (positions[:, None] > positions[:, :, None] - window)
    seen = seen[:, None]  # one for all heads
    if backend in _TAKES_BOOLS:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _block_mask(last: Tensor, positions: Tensor, blocks: Tensor | None, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query <= last[row, key])
        if blocks is not None:
            seen = seen | ((blocks[row, query] == blocks[row, key]) & (blocks[row, query] >= 0))
        if window is not None:
            seen = seen & (positions[row, key] > positions[row, query] - window)
        return seen

    num_rows, length = last.shape
    return create_block_mask(rule, num_rows, None, length, length, device=last.device, BLOCK_SIZE=FLEX_BLOCK)


def _picture_blocks(batch: Mapping[str, Any]) -> Tensor:
    """Which picture each token is a part of, -1 for text, (R, L): Gemma3's pictures see themselves whole.

    Pictures stand between markers, so runs of image tokens are pictures, and no run spans two trees.
    """
    inside = batch["token_type_ids"] == 1
    starts = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, starts.long().cumsum(dim=1), -1)


def _positions(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    """One number per token, (R, L), or three for Qwen-VL, (3, R, L).

    Behind a tree's pictures all three count on from the highest so far; in front of and inside them the model says.
    """
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None:
        return batch["positions"]
    depth, tree = batch["positions"], batch["tree"]  # (R, L) each
    if "image_grid_thw" not in batch:
        return depth.expand(3, -1, -1)
    inside = batch["root_mask"].bool()  # (M, F): tokens through the last picture, none in trees without pictures
    fixed, pictured = inside.sum(dim=1), inside.any(dim=1)  # (M,) each
    found, _ = rope_index(
        input_ids=batch["root_ids"][pictured],
        mm_token_type_ids=batch["root_mm_token_type_ids"][pictured],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["root_mask"][pictured],
    )
    roots = found.new_full((3, *inside.shape), -1)
    roots[:, pictured] = found.masked_fill(~inside[pictured], -1)
    following = roots.amax(dim=(0, 2)) + 1  # (M,)
    at_root = roots[:, tree, depth.clamp(max=inside.size(1) - 1)]  # (3, R, L)
    return torch.where(depth < fixed[tree], at_root, following[tree] + depth - fixed[tree])
