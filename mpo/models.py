"""Vision-language models: their parts, and which of them are trained. The only place that knows model families.

Loading goes through the Auto classes (`data_builders.samplers`), which know every family that transformers does.
"""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from data_builders.records import InputError

PARTS = ("vision", "projector", "llm")

# How transformers names the parts of InternVL, LLaVA, LLaVA-OneVision, Gemma3 (multi_modal_projector), Idefics3,
# SmolVLM (connector) and Qwen-VL, whose projector sits inside the tower (visual.merger).
_PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|connector|visual\.(merger|deepstack_merger_list))\.")
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")


def part_of(parameter: str) -> str:
    """The part of a vision-language model that a parameter belongs to, by its name.

    >>> part_of("model.visual.merger.mlp.0.weight"), part_of("model.vision_tower.embeddings.weight"),
    part_of("lm_head.weight") ('projector', 'vision', 'llm')
    """
    if _PROJECTOR.search(parameter):
        return "projector"
    return "vision" if _VISION.search(parameter) else "llm"


def train_parts(model: nn.Module, parts: Iterable[str]) -> dict[str, int]:
    """Makes these parts trainable and freezes the others.

    Args:
        model: Changed in place.
        parts: Any of `PARTS`.

    Returns:
        How many parameters are trained, by part.

    Raises:
        InputError: A part does not exist, or none is left to train.
    """
    wanted = set(parts)
    if unknown := sorted(wanted - set(PARTS)):
        raise InputError(f"`train` names {unknown}: the parts of a model are {', '.join(PARTS)}.")
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in wanted)
        trained[part] += parameter.numel() * (part in wanted)
    if missing := sorted(part for part in wanted if not trained[part]):
        raise InputError(f"{type(model).__name__} has no parameters in {missing}: leave them out of `train`.")
    if not wanted:
        raise InputError(f"`train` is empty: name at least one of {', '.join(PARTS)}.")
    return dict(trained)
