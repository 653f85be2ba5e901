"""Drop path (stochastic depth): in training, what a layer of the vision tower adds to a picture is left out at random.

InternVL's recipes train with it, and transformers' vision towers have no such setting. A picture, or a tile of one,
loses a layer's attention or MLP as a whole; what stays is scaled up, so that the expectation does not change.

Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", https://arxiv.org/abs/1603.09382.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from data_builders.records import InputError
from mpo.models import residual_branches


def set_drop_path(model: nn.Module, rate: float) -> list[float]:
    """Lets a model drop paths of its vision tower while it is in training mode.

    Args:
        model: Changed in place; neither its weights nor its names.
        rate: How often the last layer's branches are left out; earlier layers grow linearly up to it, from 0.

    Returns:
        The rate of each layer.

    Raises:
        InputError: The rate is none, or the model's tower has no pictures side by side.
    """
    if not 0.0 < rate < 1.0:
        raise InputError(f"`drop_path={rate}` is no rate above 0 and below 1 (InternVL: 0.1, from 26B on 0.4).")
    layers = residual_branches(model)
    if not layers:
        raise InputError(
            f"`drop_path` cannot be used with {type(model).__name__}: its vision tower has no layers that take "
            "pictures side by side (Qwen-VL's takes them as one sequence), so that one could be left out. Remove it; "
            "InternVL, LLaVA, LLaVA-OneVision, Idefics3, SmolVLM and Gemma3 have such layers."
        )
    rates = torch.linspace(0, rate, len(layers)).tolist() if len(layers) > 1 else [rate]
    for layer_rate, branches in zip(rates, layers, strict=True):
        for branch in branches if layer_rate else []:
            branch.register_forward_hook(_Drop(layer_rate))
    return rates


class _Drop:
    """The hook on one branch."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """Leaves the branch out for some pictures: (pictures, tokens, hidden), perhaps first of a tuple."""
        if not module.training:
            return None
        branch, *others = output if isinstance(output, tuple) else (output,)
        keep = 1.0 - self.rate
        branch = branch * branch.new_empty(branch.size(0), 1, 1).bernoulli_(keep).div_(keep)
        return (branch, *others) if isinstance(output, tuple) else branch


@contextmanager
def without_chance(model: nn.Module) -> Iterator[None]:
    """A model that is being trained, for a while without anything random: where it serves as its own reference."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
