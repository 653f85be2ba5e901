"""What a processor makes of one text with its pictures, and how what it gave for several is joined to a batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Image as ImageFeature
from PIL.Image import Image
from torch import Tensor
from transformers import ProcessorMixin

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_FOR_TEXT = {"input_ids", "attention_mask", *TOKEN_TYPES}


@dataclass(frozen=True)
class Processed:
    """A text with its pictures, as tokens.

    Attributes:
        ids: The tokens.
        types: Of `TOKEN_TYPES`, those that the family has: one number per token.
        pieces: What the processor wrote in place of each picture, if it says so.
    """

    ids: list[int]
    types: dict[str, list[int]]
    pieces: list[str] | None = None


def process(processor: ProcessorMixin, text: str, images: list[Image]) -> tuple[Processed, dict[str, Tensor]]:
    """The tokens of a text, nothing added, and what the model is given of its pictures."""
    writes = getattr(type(processor), "replace_image_token", ProcessorMixin.replace_image_token)
    says = bool(images) and writes is not ProcessorMixin.replace_image_token
    options = {"return_text_replacement_offsets": True} if says else {}
    found = processor(
        images=[images] if images else None, text=[text], add_special_tokens=False, return_tensors="pt", **options
    )
    pieces = [piece["replacement"] for piece in found.pop("text_replacement_offsets")[0]] if says else None
    types = {name: found[name][0].tolist() for name in TOKEN_TYPES if name in found}
    given = {name: value for name, value in found.items() if name not in _FOR_TEXT}
    return Processed(found["input_ids"][0].tolist(), types, pieces), given


def joined(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the model is given of several texts' pictures, in order; unequal sides are filled up with zeros."""
    parts = list(parts)
    return {name: _filled_up([part[name] for part in parts]) for name in parts[0]}


def _filled_up(tensors: list[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = [(0, size - own) for size, own in zip(shape, tensor.shape[1:], strict=True)]
        filled.append(torch.nn.functional.pad(tensor, [side for pair in reversed(missing) for side in pair]))
    return torch.cat(filled)


def stored(picture: dict[str, Any] | str) -> dict[str, Any]:
    """A picture as `datasets` stores it, from its path or as it is."""
    return {"path": picture, "bytes": None} if isinstance(picture, str) else picture


def decoded(picture: Any, decoder: ImageFeature) -> Any:
    """The picture itself, of a path, of what `datasets` stores, or as it is."""
    return decoder.decode_example(stored(picture)) if isinstance(picture, (dict, str)) else picture
