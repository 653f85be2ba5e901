"""Vision-language models: their parts, and which of them are trained. The only place that knows model families.

Loading goes through the Auto classes (`data_builders.hf_sampler`), which know every family that transformers does.
"""

import re
from collections import Counter
from collections.abc import Iterable
from math import isqrt
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from trl import DPOConfig
from trl.trainer.utils import get_config_model_id

from data_builders.hf_sampler import load_model
from data_builders.records import InputError
from data_builders.tiling.plans import Tiling, tile_grids

PARTS = ("vision", "projector", "llm")

# How transformers names the parts of InternVL, LLaVA, LLaVA-OneVision, Gemma3 (multi_modal_projector), Idefics3,
# SmolVLM (connector) and Qwen-VL, whose projector sits inside the tower (visual.merger). LLaVA-OneVision also has a
# learned embedding that ends each row of patches (image_newline).
_PROJECTOR = re.compile(
    r"(^|\.)((multi_modal_projector|connector|visual\.(merger|deepstack_merger_list))\.|image_newline$)"
)
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")

# Layers of a tower, and in them what is added to a picture's hidden states. Qwen-VL's blocks are not among them: its
# tower takes all pictures as one long sequence.
_VISION_LAYER = re.compile(r"(^|\.)(vision_tower|vision_model)\.(.+\.)?layers?\.\d+$")
_BRANCHES = ({"attention", "mlp"}, {"self_attn", "mlp"})


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


def check_parts(setting: str, names: Iterable[str]) -> None:
    """Looks whether parts exist.

    Raises:
        InputError: One does not; names the setting.
    """
    if unknown := sorted(set(names) - set(PARTS)):
        raise InputError(f"`{setting}` names {unknown}: the parts of a model are {', '.join(PARTS)}.")


def size_of_parameter(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds over all ranks; ZeRO-3 leaves a rank an empty one."""
    return getattr(parameter, "ds_numel", parameter.numel())


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
    check_parts("train", wanted)
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in wanted)
        trained[part] += size_of_parameter(parameter) * (part in wanted)
    if missing := sorted(part for part in wanted if not trained[part]):
        raise InputError(f"{type(model).__name__} has no parameters in {missing}: leave them out of `train`.")
    if not wanted:
        raise InputError(f"`train` is empty: name at least one of {', '.join(PARTS)}.")
    return dict(trained)


def lora_targets(model: PreTrainedModel, parts: Iterable[str], *, saved: Iterable[str] = ()) -> str:
    """All linear layers of some parts, as the regular expression that PEFT takes as `target_modules`.

    The output layer is left out, as PEFT's "all-linear" does.

    Args:
        model: What the adapters are put into.
        parts: Any of `PARTS`.
        saved: PEFT's `modules_to_save`: these are trained whole, so what is in them gets no adapter.

    Raises:
        InputError: A part does not exist, or has no linear layer for an adapter.
    """
    check_parts("lora_parts", parts)
    is_saved = re.compile(rf"(^|\.)({'|'.join(map(re.escape, saved)) or '(?!)'})(\.|$)")
    leaves: dict[str, dict[str, dict[str, None]]] = {part: {} for part in parts}  # by part and by what holds them
    for name, module in model.named_modules():
        part = part_of(f"{name}.weight")
        is_output = module is model.get_output_embeddings()
        if part in leaves and _takes_lora(module) and not is_output and not is_saved.search(name):
            parent, _, leaf = name.rpartition(".")
            parent = re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(f"{parent}."))  # any layer
            leaves[part].setdefault(parent, {})[leaf] = None
    if empty := [part for part, found in leaves.items() if not found]:
        raise InputError(
            f"`lora_parts` names {empty}, but {type(model).__name__} has no linear layer there for an adapter: leave "
            "them out. `lora_modules_to_save` trains modules whole, of whatever kind; what is in them gets no adapter."
        )
    return "|".join(f"{parent}({'|'.join(names)})" for found in leaves.values() for parent, names in found.items())


def _takes_lora(module: nn.Module) -> bool:
    """Whether it is a linear layer that is called: the one in torch's multi-head attention only lends its weight."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def residual_branches(model: nn.Module) -> list[list[nn.Module]]:
    """What each layer of the vision tower adds to its input, first layer first.

    Returns:
        For each layer its attention and its MLP, which take (pictures, tokens, hidden); no layer where the tower has
        no such shape.
    """
    layers = [module for name, module in model.named_modules() if _VISION_LAYER.search(name)]
    children = [dict(layer.named_children()) for layer in layers]
    return [
        [child for name, child in named.items() if name in branches]
        for named in children
        for branches in _BRANCHES
        if branches <= named.keys()
    ]


def tiles_pictures(processor: ProcessorMixin) -> bool:
    """Whether a family's own processor cuts pictures into tiles, as InternVL's, LLaVA-OneVision's and Idefics3's do.

    Qwen-VL's takes pictures at their own size, and Gemma3's cuts out parts of them, which is another thing.
    """
    names = ("crop_to_patches", "image_grid_pinpoints", "do_image_splitting")
    return any(getattr(processor.image_processor, name, None) is not None for name in names)


def set_own_tiling(
    processor: ProcessorMixin, config: PreTrainedConfig, tiling: Tiling, *, has_adapter: bool = False
) -> str:
    """Has a processor that cuts pictures into tiles itself do so within the bounds of a tiling.

    Args:
        processor: Changed in place; saved with the model, it cuts pictures alike ever after.
        config: Of the model, changed in place where the family keeps the grids there too.
        tiling: Its `n_min` and `n_max`; the rule is the family's.
        has_adapter: Whether only an adapter is saved, without the config.

    Returns:
        What was set, in a sentence.

    Raises:
        InputError: The tiling asks for what only our own cutting can do.
    """
    images, family = processor.image_processor, config.model_type
    if tiling.indicator != "none" or tiling.side is not None or tiling.tokens_per_view is not None:
        raise InputError(
            f"{family}'s own processor cuts pictures, into tiles of its own size and with its own marks: of `tiling` "
            "it takes `n_min` and `n_max` alone. Leave `indicator`, `side` and `tokens_per_view` out."
        )
    if getattr(images, "crop_to_patches", None) is not None:
        if tiling.rule != "internvl":
            raise InputError(f"{family}'s own processor cuts pictures by InternVL's rule: set `rule: internvl`.")
        images.crop_to_patches, images.min_patches, images.max_patches = True, tiling.n_min, tiling.n_max
        return f"{family}'s own processor cuts pictures into {tiling.n_min} to {tiling.n_max} tiles."
    if getattr(images, "image_grid_pinpoints", None) is not None:
        if has_adapter:
            raise InputError(
                f"{family} keeps the grids of tiles in its config, which an adapter's folder does not hold, so that "
                "the adapter would later meet other tiles: leave `tiling` out, or train without adapters first."
            )
        shown = images.size if getattr(images.size, "height", None) else images.crop_size
        grids = [
            [rows * shown.height, columns * shown.width] for rows, columns in tile_grids(tiling.n_min, tiling.n_max)
        ]
        images.image_grid_pinpoints = config.image_grid_pinpoints = grids
        bounds = f"{tiling.n_min} to {tiling.n_max} tiles"
        return f"{family}'s own processor chooses among the {len(grids)} grids of {bounds}, by its own rule."
    if tiling.n_min > 1:
        raise InputError(f"{family}'s own processor has no fewest number of tiles: set `n_min: 1`.")
    across = isqrt(tiling.n_max)
    images.do_image_splitting = tiling.n_max > 1
    images.size = {"longest_edge": across * images.max_image_size["longest_edge"]}
    return f"{family}'s own processor cuts pictures into at most {across} x {across} tiles, by its own rule."


def is_adapter(name: str | None) -> bool:
    """Whether it is a folder of a PEFT adapter."""
    return name is not None and (Path(name) / "adapter_config.json").is_file()


def load_for_training(name: str, **settings: Any) -> nn.Module:
    """A model, or a model with the adapter that a folder holds, which training goes on with.

    Args:
        name: A Hub id or folder of a model, or a folder of a PEFT adapter.
        **settings: Of `data_builders.hf_sampler.load_model`.

    Raises:
        InputError: It cannot be loaded.
    """
    if not is_adapter(name):
        return _name_what_stays_whole(load_model(name, **settings))
    from peft import PeftConfig, PeftModel

    base = load_model(PeftConfig.from_pretrained(name).base_model_name_or_path, **settings)
    return PeftModel.from_pretrained(_name_what_stays_whole(base), name, is_trainable=True)


def _name_what_stays_whole(model: PreTrainedModel) -> PreTrainedModel:
    """Takes names of layers that a model has not out of those that it does not split: FSDP looks for each.

    LLaVA, LLaVA-OneVision and Gemma3 name parts of their tower's text half, which they leave out.
    """
    model._no_split_modules = {type(module).__name__ for module in model.modules()} & set(model._no_split_modules)
    return model


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
    """For a trainer of transformers: takes and leaves weights of a checkpoint under the names of `from_pretrained`.

    Transformers saves LLaVA and other families under older parameter names and translates them in `from_pretrained`,
    but not where its Trainer resumes: there nothing matches, nothing is loaded, and training starts over. And after
    loading for ZeRO-3 it takes every translation that it knows for one to undo when it saves, so that the names are
    ones that no other program knows.
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Transformers' seam for what is written."""
        base = base_of(self.model)
        if translations := getattr(base, "_weight_conversions", None):
            base._weight_conversions = [translation for translation in translations if translation.was_used()]
        if state_dict is not None:  # gathered from ranks: what is tied would be in it twice
            tied = getattr(base, "all_tied_weights_keys", {})
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
