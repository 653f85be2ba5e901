"""Memory between runs of one process."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer


def release(trainer: Trainer) -> None:
    """Gives back what a trainer that is done holds in memory: weights, gradients, and states of the optimizer.

    Python frees most of it only when it looks for circles, and DeepSpeed's engines stay for the life of the process,
    so that of several runs in one process the last would find no room.
    """
    engine = getattr(trainer, "deepspeed", None)
    holders = [trainer.model, trainer.optimizer, *([engine, engine.optimizer] if engine is not None else [])]
    for tensor in _tensors_of(holders, set()):
        tensor.data = tensor.new_empty(0)
    trainer.accelerator.free_memory()


def _tensors_of(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors that something holds, through containers, modules, optimizers and DeepSpeed's own objects."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        inside: Iterable[Any] = [value.grad, *vars(value).values()] if isinstance(value, nn.Parameter) else ()
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, list | tuple | set | deque):
        inside = value
    elif isinstance(value, nn.Module | torch.optim.Optimizer) or type(value).__module__.startswith("deepspeed."):
        inside = vars(value).values()
    else:
        return
    for each in list(inside):
        yield from _tensors_of(each, seen)
