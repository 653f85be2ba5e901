"""The reward shift delta of the quality loss: the mean of the rewards of all earlier optimizer steps.

This is the only state that MPO adds to DPO. It is constant within an optimizer step, so the loss does not depend on
how a step is cut into micro-batches, and it is part of a checkpoint, so a resumed run goes on with the same delta.
Source: the paper's "moving average of previous rewards"; BCO, https://arxiv.org/abs/2404.04656.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RewardShift:
    """A running mean of rewards, in double precision.

    Args:
        decay: None for the cumulative mean over all rewards seen, each counting once. Otherwise the weight that the
            old mean keeps in a step: mean <- decay * mean + (1 - decay) * step's mean, starting from 0, which is what
            rewards are before the first step. 1 keeps delta at 0: TRL's `bco_pair`.

    >>> shift = RewardShift()
    >>> shift.update([1.0, 3.0])
    2.0
    >>> shift.update([5.0])
    3.0
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0.0 <= decay <= 1.0:
            raise ValueError(f"`reward_shift_decay` must be None (cumulative mean) or in [0, 1], got {decay}.")
        self.decay = decay
        self.mean = 0.0
        self.count = 0

    def update(self, rewards: Tensor | Sequence[float]) -> float:
        """Takes in the rewards of one optimizer step, chosen and rejected, of all micro-batches and ranks.

        Args:
            rewards: Any number of rewards of any shape. None at all changes nothing.

        Returns:
            The new mean.

        Raises:
            ValueError: A reward is not finite.
        """
        values = torch.as_tensor(rewards).detach().double().flatten()
        if values.numel() == 0:
            return self.mean
        step_mean = values.mean().item()
        if not torch.isfinite(values).all():
            raise ValueError(
                f"the rewards of this step are not finite (mean {step_mean}): the model's log-probabilities "
                f"overflowed. "
                "Lower the learning rate, or train in bf16 or fp32 instead of fp16."
            )
        self.count += values.numel()
        weight = values.numel() / self.count if self.decay is None else 1.0 - self.decay
        self.mean += weight * (step_mean - self.mean)
        return self.mean

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep: plain numbers, fit for JSON."""
        return {"decay": self.decay, "mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: The state was made with another decay, so its mean means something else.
        """
        if state["decay"] != self.decay:
            raise ValueError(
                f"the checkpoint's reward shift was averaged with `reward_shift_decay={state['decay']}`, this run "
                f"asks for "
                f"{self.decay}: resume with the same setting, or start a new run."
            )
        self.mean, self.count = float(state["mean"]), int(state["count"])
