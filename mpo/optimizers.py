"""What a trainer's optimizer does differently here: learning rates by part, and the same step under every launcher."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from data_builders.records import InputError, Row
from mpo.models import PARTS, check_parts, part_of


def check_rates(rates: Mapping[str, float], trained: Iterable[str]) -> None:
    """Looks whether learning rates by part can be meant.

    Args:
        rates: A learning rate for each of some parts.
        trained: The parts of which something is trained.

    Raises:
        InputError: A part does not exist or is not trained, or a rate is none.
    """
    check_parts("part_learning_rates", rates)
    if frozen := sorted(set(rates) - set(trained)):
        raise InputError(
            f"`part_learning_rates` names {frozen}, of which nothing is trained: remove them there, or have them "
            "trained (`train`; with LoRA `lora_parts` or `lora_modules_to_save`)."
        )
    for part, rate in rates.items():
        if rate <= 0:
            raise InputError(f"`part_learning_rates` gives {part} {rate}: to freeze a part, leave it out of `train`.")


def part_groups(
    model: nn.Module, rates: Mapping[str, float], *, learning_rate: float, weight_decay: float, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer: for each part, weights with weight decay and those without.

    Args:
        model: As it is trained: parts frozen, adapters in place.
        rates: The learning rate of some parts.
        learning_rate: Of the others; their groups come first.
        weight_decay: Of the decayed weights; others have none.
        decayed: Names of the weights with weight decay.

    Returns:
        Groups that are not empty, each with its `part`.

    Raises:
        InputError: As `check_rates`.
    """
    decayed = set(decayed)
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault((part_of(name), name in decayed), []).append(parameter)
    check_rates(rates, {part for part, _ in found})
    keys = [(part, has_decay) for part in sorted(PARTS, key=lambda part: part in rates) for has_decay in (True, False)]
    return [
        {
            "params": found[part, has_decay],
            "lr": rates.get(part, learning_rate),
            "weight_decay": weight_decay if has_decay else 0.0,
            "part": part,
        }
        for part, has_decay in keys
        if (part, has_decay) in found
    ]


class LearnsByPart:
    """For a trainer of transformers: `part_learning_rates`, logged as `learning_rate/PART`.

    And a step that no picture takes part in is the same everywhere: the vision tower then has a gradient of zero, as
    DeepSpeed gives it, rather than none, by which AdamW would leave it out. So losses do not depend on the launcher.
    """

    _rates_now: Mapping[str, float] = {}

    def get_optimizer_cls_and_kwargs(self, args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """Transformers' seam for an optimizer that has groups of its own."""
        kind, settings = super().get_optimizer_cls_and_kwargs(args, model)
        if model is None or not args.part_learning_rates:
            return kind, settings
        if {"params", "model", "optimizer_dict"} & settings.keys():
            raise InputError(
                f"`optim={args.optim!s}` groups parameters in its own way and cannot have `part_learning_rates`: "
                "remove them, or take an optimizer like 'adamw_torch'."
            )
        decayed = self.get_decay_parameter_names(model)
        decay = {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
        return kind, {**settings, "params": part_groups(model, args.part_learning_rates, **decay, decayed=decayed)}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers', which takes an optimizer as it is when it is given one."""
        optimizer = super().create_optimizer(model)
        groups = getattr(optimizer, "param_groups", [{}])  # DeepSpeed's has none yet
        if self.args.part_learning_rates and not all("part" in group for group in groups):
            raise InputError(
                "`part_learning_rates` is set, and so is an optimizer with learning rates of its own, as an argument "
                "of the trainer or in DeepSpeed's config: remove one of them."
            )
        return optimizer

    def _get_learning_rate(self) -> float:
        """Transformers' seam between a step and the next learning rate: those of the parts are noted too."""
        groups = self.optimizer.param_groups if self.args.part_learning_rates else []
        self._rates_now = {f"learning_rate/{group['part']}": group["lr"] for group in groups}
        return super()._get_learning_rate()

    def log(self, logs: Row, start_time: float | None = None) -> None:
        """As transformers', with the learning rate of each part beside the first one's."""
        if "learning_rate" in logs:
            logs.update(self._rates_now)
        super().log(logs, start_time)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Transformers' seam between the backward pass and the step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self._is_vision_dataset and not self.is_deepspeed_enabled:
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return norm
