"""What goes wrong in training, told in words: what happened, why most likely, and what to do.

Each check looks at what one step or one save left behind and raises `TrainingError`; none of them changes anything.
Shapes: B pairs, chosen responses first, so 2B rows; T tokens.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data_builders.records import InputError
from mpo.losses import MPOLoss
from mpo.scores import tokens_of

_REPEATED = re.compile(r"(<[^<>\s]{1,40}>)(?:\s*\1)+")
_ZERO_STEPS = 3  # optimizer steps with rewards of exactly 0, after weights should have moved, before training stops
_SAMPLE = 65_536  # numbers of a saved matrix that are looked at before all of it is


class TrainingError(InputError):
    """Training cannot go on, or its result must not be kept."""


def row_text(inputs: Mapping[str, Tensor], row: int, tokenizer: Any, *, width: int = 160) -> str:
    """The beginning of a row as a reader would search for it in the data: image tokens once, then the text."""
    text = _REPEATED.sub(r"\1..", tokenizer.decode(tokens_of(inputs, row)))
    return repr(text if len(text) <= width else text[:width] + "...")


def check_responses(inputs: Mapping[str, Tensor], num_pairs: int, tokenizer: Any, max_length: int | None) -> None:
    """Every response must have a token left to learn from.

    Args:
        inputs: The batch.
        num_pairs: How many of its pairs count, the first ones.
        tokenizer: To name rows.
        max_length: Where rows were cut, for the advice.

    Raises:
        TrainingError: Names the first response without any.
    """
    size = inputs["completion_mask"].size(0) // 2
    is_empty = (inputs["completion_mask"][:, 1:].sum(dim=1) == 0).view(2, size)[:, :num_pairs]
    if not is_empty.any():
        return
    kind, pair = is_empty.nonzero()[0].tolist()
    why = (
        "the data hold an empty response, or the chat template leaves none of it"
        if max_length is None
        else f"`max_length={max_length}` cuts it off, since images and prompt alone fill it"
    )
    raise TrainingError(
        f"{is_empty.sum()} of {is_empty.numel()} responses of this batch have no token to learn from; the first is "
        f"the {('chosen', 'rejected')[kind]} one of {row_text(inputs, kind * size + pair, tokenizer)}. Most likely "
        f"{why}. Raise `max_length`, lower the number of image tiles, or take the row out (`overlong: drop` does for "
        "rows that are too long)."
    )


def check_terms(
    terms: MPOLoss, logps: Tensor, ref_logps: Tensor, inputs: Mapping[str, Tensor], tokenizer: Any, *, step: int
) -> None:
    """The loss must be a number.

    Args:
        terms: The loss and its terms.
        logps: Summed log-probabilities of the policy, (2B,).
        ref_logps: The same of the reference, (2B,).
        inputs: The batch, to name rows.
        tokenizer: To name rows.
        step: Optimizer steps taken so far.

    Raises:
        TrainingError: Names the terms that are not finite, whose log-probabilities are to blame, and the rows.
    """
    broken = [f"{name} {v.item()}" for name, v in terms._asdict().items() if v is not None and not v.isfinite()]
    if not broken:
        return
    by_policy, by_reference = ~logps.isfinite(), ~ref_logps.isfinite()
    rows = (by_policy | by_reference).nonzero().flatten().tolist()
    if by_policy.any():
        whose = "the policy's"
        why = (
            "the model was not sound to begin with: broken weights, or activations that overflow in fp16 (use bf16)"
            if step == 0
            else "the last updates broke the model: lower `learning_rate` (the paper's is 5e-6, ten times that "
            "collapses), lengthen the warm-up, or go back to the last checkpoint"
        )
    elif by_reference.any():
        whose, why = (
            "the reference's",
            "the reference model is broken, or its dtype (fp16) overflows: use bf16 or fp32",
        )
    else:
        whose, why = "no response's", "the sums overflow: lower `beta` or `learning_rate`"
    named = "; ".join(row_text(inputs, row, tokenizer) for row in rows[:3])
    raise TrainingError(
        f"after {step} optimizer steps the loss is not finite ({', '.join(broken)}): {whose} log-probabilities are "
        f"not, for {len(rows)} of {logps.numel()} responses{': ' + named if named else ''}. Most likely {why}."
    )


def check_gradients(
    model: nn.Module,
    norm: float,
    batches: Iterable[Mapping[str, Tensor]],
    tokenizer: Any,
    blame: Callable[[], list[str]] = list,
) -> None:
    """The gradient of a step must be a number, or the step would write it into every weight.

    Args:
        model: After the backward pass.
        norm: Norm of all its gradients.
        batches: The micro-batches of this step, to name rows.
        tokenizer: To name rows.
        blame: Finds out which terms of which micro-batches are the cause; called only if there is something to find.

    Raises:
        TrainingError: Names the parameters and the rows.
    """
    if math.isfinite(norm):
        return
    broken = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    rows = "; ".join(f"{number}: {row_text(batch, 0, tokenizer, width=80)}" for number, batch in enumerate(batches, 1))
    raise TrainingError(
        f"the loss is finite but the norm of its gradients is {norm}, so this step is not taken: {len(broken)} "
        f"parameters have gradients that are not finite ({', '.join(broken[:3]) or 'not named: they are sharded'}), "
        f"from {', '.join(blame()) or 'a term that cannot be told'}. Its micro-batches begin with {rows}. Most "
        "likely activations overflow on the way back (train in bf16 instead of fp16), or a picture or text of these "
        "rows is degenerate (one pixel, one token repeated)."
    )


class ZeroRewards:
    """Watches for a run that trains nothing: a policy that moved has rewards other than exactly 0."""

    def __init__(self) -> None:
        self.num_zero = 0
        self.over = False

    def take_step(self, rewards: Tensor | list[float], *, learned: float) -> None:
        """Looks at the rewards of one optimizer step.

        Args:
            rewards: Of all its pairs.
            learned: Sum of the learning rates of all steps before it; 0 while weights cannot have moved.

        Raises:
            TrainingError: Rewards stayed at exactly 0 although weights should have moved.
        """
        if self.over or not learned:
            return
        values = torch.as_tensor(rewards)
        self.over = bool(values.any())
        self.num_zero += not self.over
        if self.num_zero < _ZERO_STEPS:
            return
        raise TrainingError(
            f"all rewards were exactly 0 in {_ZERO_STEPS} optimizer steps after weights should have moved: the policy "
            "is still its reference. Most likely nothing that matters is trained (all parameters frozen, or LoRA "
            "modules that the model does not use), `learning_rate` is too small for weights in bf16 (load them in "
            "float32), or policy and reference share their weights (pass no `ref_model`)."
        )


def check_finite(model: nn.Module) -> None:
    """No weight may be NaN or infinite when it is saved; looks at this rank's part of each.

    Raises:
        TrainingError: Names the parameters.
    """
    broken = [name for name, p in model.named_parameters() if not _local(p).isfinite().all()]
    if broken:
        raise TrainingError(
            f"{len(broken)} parameters are not finite ({', '.join(broken[:3])}), so nothing was saved over the last "
            "whole checkpoint. Most likely a step with a gradient that was not finite was taken: go back to that "
            "checkpoint, with a lower `learning_rate` or in bf16."
        )


def check_saved(folder: Path, model: nn.Module) -> None:
    """What was written must be the weights, not empty or zero ones as a sharded model leaves when it is not gathered.

    Args:
        folder: With safetensors files; without any there is nothing to check.
        model: What was saved. Matrices that are zero in it may be zero in the file.

    Raises:
        TrainingError: Names the tensors.
    """
    empty, zero = [], []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                shape = file.get_slice(name).get_shape()
                if 0 in shape:
                    empty.append(name)
                elif len(shape) > 1 and _is_zero(file, name):
                    zero.append(name)
    num_zero_in_memory = sum(p.dim() > 1 and not _local(p).any() for p in model.parameters()) if zero else 0
    broken = empty + (zero if len(zero) > num_zero_in_memory else [])
    if broken:
        raise TrainingError(
            f"{len(broken)} weights in {folder} were saved as {'nothing' if empty else 'zeros'} "
            f"({', '.join(broken[:3])}). Most likely a model sharded by DeepSpeed ZeRO-3 or FSDP was not gathered: "
            "set `stage3_gather_16bit_weights_on_model_save: true` in the DeepSpeed config (FSDP: "
            "`fsdp_state_dict_type: FULL_STATE_DICT`). The weights themselves are in the checkpoint folder."
        )


def _is_zero(file: Any, name: str) -> bool:
    part = file.get_slice(name)
    shape = part.get_shape()
    if part[: max(1, _SAMPLE * shape[0] // max(1, torch.Size(shape).numel()))].any():
        return False
    return not file.get_tensor(name).any()


def _local(parameter: Tensor) -> Tensor:
    """What of a parameter lies on this rank: DeepSpeed's part, a DTensor's, or all of it."""
    sharded = getattr(parameter, "ds_tensor", parameter).detach()
    return sharded.to_local() if hasattr(sharded, "to_local") else sharded
