"""Vision-language models: their parts, and which of them are trained. The only place that knows model families.

Loading goes through the Auto classes (`data_builders.hf_sampler`), which know every family that transformers does.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from trl import DPOConfig
from trl.trainer.utils import get_config_model_id

from data_builders.hf_sampler import load_model
from data_builders.records import InputError

PARTS = ("vision", "projector", "llm")

# How transformers names the parts of InternVL, LLaVA, LLaVA-OneVision, Gemma3 (multi_modal_projector), Idefics3,
# SmolVLM (connector) and Qwen-VL, whose projector sits inside the tower (visual.merger). LLaVA-OneVision also has a
# learned embedding that ends each row of patches (image_newline).
_PROJECTOR = re.compile(
    r"(^|\.)((multi_modal_projector|connector|visual\.(merger|deepstack_merger_list))\.|image_newline$)"
)
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")


def part_of(parameter: str) -> str:
    """The part of a vision-language model that a parameter belongs to, by its name.

    >>> part_of("model.visual.merger.mlp.0.weight"), part_of("model.vision_tower.embeddings.weight")
    ('projector', 'vision')
    >>> part_of("lm_head.weight")
    'llm'
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


def load_for_training(name: str, **settings: Any) -> nn.Module:
    """A model, or a model with the adapter that a folder holds, which training goes on with.

    Args:
        name: A Hub id or folder of a model, or a folder of a PEFT adapter.
        **settings: Of `data_builders.hf_sampler.load_model`.

    Raises:
        InputError: It cannot be loaded.
    """
    if not (Path(name) / "adapter_config.json").is_file():
        return load_model(name, **settings)
    from peft import PeftConfig, PeftModel

    base = load_model(PeftConfig.from_pretrained(name).base_model_name_or_path, **settings)
    return PeftModel.from_pretrained(base, name, is_trainable=True)


def name_of(model: Any) -> str:
    """The Hub id or folder that a model is given by, or was loaded from."""
    return model if isinstance(model, str) else get_config_model_id(model.config)


def processor_of(model: Any, args: DPOConfig) -> ProcessorMixin:
    """The processor that lies beside a model, loaded as TRL does."""
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(name_of(model), revision=revision, trust_remote_code=args.trust_remote_code)


def base_of(model: nn.Module) -> nn.Module:
    """The model itself, below an adapter if it has one."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


class LoadsItsCheckpoints:
    """For a trainer of transformers: takes weights from a checkpoint the way `from_pretrained` does.

    Transformers saves LLaVA and other families under older parameter names and translates them in `from_pretrained`,
    but not where its Trainer resumes: there nothing matches, nothing is loaded, and training starts over.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if isinstance(target, PreTrainedModel) and not self.is_fsdp_enabled:
            saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype, use_safetensors=True)
            target.load_state_dict(saved.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
