"""SDPA for a forest's mask without the half of it that nothing sees: queries look no further than their own end.

PyTorch's SDPA computes every key that it is handed, masked or not, so a mask costs twice what causal attention does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "forest_sdpa"
_BLOCK = 256  # queries


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """What transformers' `sdpa` gives, for a mask that is nowhere above the diagonal; shapes are its."""
    length = query.size(2)
    if attention_mask is None or key.size(2) != length or length <= _BLOCK:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    groups = query.size(1) // key.size(1)
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    blocks = [
        scaled_dot_product_attention(
            query[:, :, start : start + _BLOCK],
            key[:, :, : start + _BLOCK],
            value[:, :, : start + _BLOCK],
            attn_mask=attention_mask[:, :, start : start + _BLOCK, : start + _BLOCK],
            dropout_p=settings.get("dropout", 0.0),
            scale=settings.get("scaling"),
        )
        for start in range(0, length, _BLOCK)
    ]
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


def use_forest_attention(model: PreTrainedModel) -> None:
    """Puts this attention in the place of SDPA in a model's language part, where no token sees a later one.

    Only on a CPU, where it was measured; on CUDA, FlexAttention leaves the same half out.

    Args:
        model: Without wrappers of DDP, DeepSpeed or PEFT.
    """
    text = model.config.get_text_config()
    sees_ahead = model.config.model_type == "gemma3"  # within a picture
    if text._attn_implementation == "sdpa" and model.device.type == "cpu" and not sees_ahead:
        model.set_attn_implementation(NAME if text is model.config else {"text_config": NAME})


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
