"""Liger's kernels in place of a model's layers: on a GPU, training takes less memory and time, for the same numbers.

Only layers are replaced (rotary positions, norms, gated MLPs), never the loss: TRL's fused head already computes it
without all logits, and Liger's fused cross-entropy would take that head's place. With liger-kernel 0.8.5 and
transformers 5.23:

    internvl smolvlm gemma3         Liger's own function: the text backbone, and the norms of the tower
    llava                           Liger's own function: the text backbone (a CLIP tower stays as it is)
    llava_onevision idefics3        Liger has none: the function of the text backbone
    qwen2_vl qwen2_5_vl qwen3_vl    Liger's own fails: norms and MLPs of the text backbone, as in Qwen2 and Qwen3
"""

import sys
from collections.abc import Callable, Container
from importlib.metadata import version
from typing import NamedTuple

from transformers import PreTrainedModel

from data_builders.records import InputError

# Text backbones with the layers of another one, whose function does for them; it cannot reach their rotary positions.
_SAME_LAYERS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


class Patch(NamedTuple):
    """One way to bring Liger's kernels into a model.

    Attributes:
        function: The model type whose function of Liger's is called.
        text_only: Whether that gets the text backbone in place of the whole model.
        rope: Whether it replaces rotary positions.
    """

    function: str
    text_only: bool = False
    rope: bool = True


def plan_patches(model_type: str, text_type: str, known: Container[str]) -> list[Patch]:
    """What to try for a model, the best first.

    Args:
        model_type: Of the model's config.
        text_type: Of the config of its text backbone; `model_type` for a model without pictures.
        known: The model types that Liger has a function for.

    >>> plan_patches("idefics3", "llama", {"llama", "llava"})
    [Patch(function='llama', text_only=True, rope=True)]
    """
    patches = [Patch(model_type)] if model_type in known else []
    if text_type in _SAME_LAYERS:
        patches.append(Patch(_SAME_LAYERS[text_type], text_only=True, rope=False))
    elif text_type in known and text_type != model_type:
        patches.append(Patch(text_type, text_only=True))
    return patches


def apply_liger_kernels(model: PreTrainedModel) -> str:
    """Replaces the layers of a loaded model by Liger's, where Liger knows its family.

    A reference model has to be given to this too, or it rounds differently from the policy. Rotary positions are
    replaced for every model of the family in this process.

    Args:
        model: Changed in place; before adapters are put into it. It may still be on the CPU.

    Returns:
        One line that says what was replaced, and why not more.

    Raises:
        InputError: Liger is not installed, or there is no GPU.
    """
    functions = _liger_functions()
    config = model.config
    done, failures = None, []
    for patch in plan_patches(config.model_type, config.get_text_config().model_type, functions):
        try:
            _apply(functions[patch.function], patch, model)
        except (ImportError, AttributeError, TypeError) as error:  # written for another version of transformers
            failures.append(f"its function for {patch.function} fails: {str(error).partition(' (')[0]}")
        else:
            done = patch
            break
    return _report(model, done, failures)


def kernels_of(model: PreTrainedModel) -> list[str]:
    """Which of Liger's kernels the layers of a model use, by name."""
    used = set()
    for layer in model.modules():
        rope = getattr(sys.modules.get(type(layer).__module__), "apply_rotary_pos_emb", None)
        used |= {getattr(function, "__module__", "") for function in (layer.forward, rope)}
    return sorted(name.rpartition(".")[2] for name in used if name.startswith("liger_kernel."))


def _liger_functions() -> dict[str, Callable[..., None]]:
    """Liger's functions by model type."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
        from liger_kernel.utils import infer_device
    except ImportError as error:
        raise InputError(
            f"`use_liger` needs Liger, which cannot be imported ({error}): pip install liger-kernel"
        ) from error
    if infer_device() == "cpu":
        raise InputError(
            "`use_liger` needs a GPU, and torch finds none: Liger's kernels are written in Triton, which does not run "
            "on a CPU. Leave it out here: the numbers are the same without it."
        )
    return MODEL_TYPE_TO_APPLY_LIGER_FN


def _apply(function: Callable[..., None], patch: Patch, model: PreTrainedModel) -> None:
    settings = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    if not patch.rope:
        settings["rope"] = False
    function(model=model.get_decoder() if patch.text_only else model, **settings)


def _report(model: PreTrainedModel, done: Patch | None, failures: list[str]) -> str:
    line = f"Liger kernels: {', '.join(kernels_of(model)) or 'none'} on {type(model).__name__}"
    if done and not done.text_only:
        return line
    versions = f"liger-kernel {version('liger-kernel')} with transformers {version('transformers')}"
    why = "; ".join(failures) or f"no function for {model.config.model_type}"
    return f"{line} ({'text backbone only; ' if done else ''}{versions}: {why})"
