"""A model from its configuration alone: built on the meta device, where it has shapes and no numbers.

Where the configuration is looked for, in this order: the file or folder that `model_config` names, the model's own
folder (or that of an adapter's base), the Hub's cache, the copies that ship with mpo (`configs/architectures`).
Nothing is downloaded.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from data_builders.records import InputError
from mpo.models import PARTS, base_of, part_of
from mpo.planning.footprint import Flow, Sizes, Stack
from mpo.planning.picture_tokens import patch_size, patches_per_token, shipped_architectures

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Blueprint:
    """A model without weights.

    Attributes:
        model: On the meta device, with its parts frozen and its adapters in place.
        source: Where its configuration was found.
        total: Parameters by part.
        trained: Those that are trained, by part.
        sizes: What `mpo.planning.footprint` needs.
    """

    model: nn.Module
    source: str
    total: dict[str, int]
    trained: dict[str, int]
    sizes: Sizes


def find_architecture(
    name: str, *, model_config: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, str]:
    """The configuration of a model whose weights may not be here.

    Args:
        name: A folder of a model or of an adapter, or a Hub id.
        model_config: A `config.json`, or a folder with one, to take instead.
        revision: Of the Hub.
        trust_remote_code: As in transformers.

    Returns:
        The configuration, and where it was found.

    Raises:
        InputError: There is none, or it is of no family that transformers knows.
    """
    if model_config is not None:
        path = Path(model_config)
        return _load(path.parent if path.suffix == ".json" else path, trust_remote_code), model_config
    folder = Path(name)
    if (folder / _ADAPTER).is_file():
        base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        return find_architecture(base, revision=revision, trust_remote_code=trust_remote_code)
    if folder.is_dir():
        return _load(folder, trust_remote_code), str(folder)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, **options), "the Hub's cache"
    except (OSError, ValueError) as error:
        shipped = shipped_architectures() / name
        if (shipped / "config.json").is_file():
            return _load(shipped, trust_remote_code), "a copy that ships with mpo; the model itself is not here"
        raise InputError(
            f"there is no model folder {name}, and neither the Hub's cache nor mpo has a configuration of that name. "
            "If it is a folder, the step that writes it has not run. Of a model on the Hub, `hf download "
            f"{name} config.json` gets it; `--model_config` takes it from elsewhere."
        ) from error


def _load(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json: name the folder of a model, or the file itself.")
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'config.json'} is not the configuration of a model ({error!s:.300}).") from error


def draw(
    architecture: PreTrainedConfig,
    source: str,
    *,
    prepare: Callable[[nn.Module], nn.Module],
    attn_implementation: str | None = None,
) -> Blueprint:
    """Builds the model without weights and counts it.

    Args:
        architecture: Of a vision-language model.
        source: Where it was found.
        prepare: Freezes parts or adds adapters, as training does; its result is what counts.
        attn_implementation: As in `trl.ModelConfig`; one that is not installed here is left out.

    Raises:
        InputError: The architecture takes no images and text, or `prepare` says so.
    """
    chosen = {"attn_implementation": attn_implementation} if attn_implementation in ("eager", "sdpa") else {}
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(architecture, **chosen)
    except ValueError as error:
        raise InputError(
            f"{architecture.model_type} is not a family of vision-language models that transformers builds "
            f"({error!s:.200}). Repositories with code of their own need their `-hf` twin, such as "
            "OpenGVLab/InternVL3-8B-hf."
        ) from error
    model = prepare(model)
    total = _by_part(model.named_parameters())
    trained = _by_part((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return Blueprint(model, source, total, trained, _sizes(model, total, trained))


def _by_part(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    counts = Counter(dict.fromkeys(PARTS, 0))
    for name, parameter in parameters:
        counts[part_of(name)] += parameter.numel()
    return dict(counts)


def _sizes(model: nn.Module, total: dict[str, int], trained: dict[str, int]) -> Sizes:
    base = base_of(model)
    config, text = base.config, base.config.get_text_config()
    head = base.get_output_embeddings().weight
    embeddings = {id(weight): weight.numel() for weight in (head, base.get_input_embeddings().weight)}
    below = {"vision": trained["vision"], "llm": sum(trained.values())}  # what gradients pass the part for
    vision = getattr(config, "vision_config", None) if total["vision"] else None
    return Sizes(
        text=_stack(model, text, "llm", total["llm"] - sum(embeddings.values())),
        vision=_stack(model, vision, "vision", total["vision"]) if vision is not None else None,
        vocabulary=head.size(0),
        total=sum(total.values()),
        trained=sum(trained.values()),
        projector=total["projector"],
        merge=patches_per_token(base) if vision is not None else 1.0,
        patch=3 * patch_size(vision) ** 2 if vision is not None else 0,
        quantized=_num_linear(base, head),
        head_trained=head.requires_grad,
        text_flow=_flow(model, "llm", below["llm"], text.num_hidden_layers),
        vision_flow=_flow(model, "vision", below["vision"], _layers(vision)) if vision is not None else Flow(False),
    )


def _stack(model: nn.Module, config: PreTrainedConfig, part: str, weights: int) -> Stack:
    """The layers of a part: sizes from its configuration, where that is ambiguous from its modules."""
    modules = {name: module for name, module in model.named_modules() if part_of(f"{name}.weight") == part}
    width = _first(config, "embed_dim", "hidden_size") if part == "vision" else config.hidden_size
    layers, heads = _layers(config), _first(config, "num_heads", "num_attention_heads")
    inner = _first(config, "intermediate_size") or round(width * config.mlp_ratio)
    norms = [m for m in modules.values() if "Norm" in type(m).__name__ and m.weight is not None]
    gated = any(name.endswith("gate_proj") for name in modules)
    activation = _first(config, "hidden_activation", "hidden_act")
    return Stack(
        layers=layers,
        width=width,
        inner=inner,
        queries=_out(modules, "q_proj") or width,
        keys=_out(modules, "k_proj") or width,
        heads=heads,
        weights=weights,
        wide=4 if gated else 3 if activation == "quick_gelu" else 2,
        rms=any("RMSNorm" in type(norm).__name__ for norm in norms),
        norms=max(2, sum(norm.weight.numel() == width for norm in norms) // layers),
        scaled=any(name.endswith(".lambda_1") for name, _ in model.named_parameters() if part_of(name) == part),
        normed_heads=any(name.endswith("q_norm") and not isinstance(m, nn.Identity) for name, m in modules.items()),
    )


def _layers(config: PreTrainedConfig) -> int:
    return _first(config, "depth", "num_hidden_layers")


def _first(config: PreTrainedConfig, *names: str) -> Any:
    """The first of several names of one thing that a configuration has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _out(modules: dict[str, nn.Module], leaf: str) -> int | None:
    """Width of what the first linear layer of this name gives."""
    return next((m.out_features for name, m in modules.items() if name.endswith(f".{leaf}")), None)


def _num_linear(base: nn.Module, head: nn.Parameter) -> int:
    """Weights that bitsandbytes quantizes: those of all linear layers but the head."""
    layers = (m for name, m in base.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name)
    return sum(layer.weight.numel() for layer in layers if layer.weight is not head)


def _flow(model: nn.Module, part: str, below: int, layers: int) -> Flow:
    own = [name for name, p in model.named_parameters() if p.requires_grad and part_of(name) == part]
    adapters = [
        module.out_features
        for name, module in model.named_modules()
        if name.endswith("lora_A.default") and part_of(f"{name}.weight") == part
    ]
    whole = any("lora_" not in name for name in own)
    return Flow(passes=below > 0, trained=whole, ranks=sum(adapters) // layers)
