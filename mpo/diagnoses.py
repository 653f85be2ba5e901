"""What goes wrong in training, told in words: what happened, why most likely, and what to do.

Each check looks at what one step or one save left behind and raises `TrainingError`. On a device, a sound micro-batch
waits for two numbers (`check_responses`, `check_terms`) and a sound step for one more (the norm of its gradients).
Shapes: B pairs, chosen responses first, so 2B rows; T tokens.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data_builders.records import InputError
from mpo.losses import MPOLoss
from mpo.scores import lengths_of, tokens_of

Blame = dict[int, dict[str, list[str]]]  # micro-batch of a step, from 0 -> term of its loss -> names of parameters

_REPEATED = re.compile(r"(<[^<>\s]{1,40}>)(?:\s*\1)+")
_BLANK_LINES = re.compile(r"\s*\n\s*")
_FULL_STEPS = 2  # of the full learning rate; after more of them, rewards of exactly 0 are no accident
_BROKEN_BY_STEPS = (
    "the last updates broke the model: lower `learning_rate` (the paper's is 5e-6, ten times that collapses) or "
    "lengthen the warm-up, and go on from a checkpoint before them"
)
_BROKEN_BY_ROWS = (
    "activations overflow in fp16 (train in bf16), or a picture or text of these rows is degenerate (one pixel, one "
    "token repeated): look at them, and take them out"
)
_SAMPLE = 65_536  # numbers of a saved matrix that are looked at before all of it is


class TrainingError(InputError):
    """Training cannot go on, or its result must not be kept."""


def row_text(inputs: Mapping[str, Tensor], row: int, tokenizer: Any, *, width: int = 160) -> str:
    """How prompt and response of a row begin, as a reader would search for them in the data: without special tokens.

    Args:
        inputs: The batch.
        row: Of its 2B.
        tokenizer: To decode it.
        width: Characters of the prompt that are shown; half as many of the response.
    """
    ids, num_response = tokens_of(inputs, row), int(inputs["completion_mask"][row].sum())
    start = len(ids) - num_response
    text = _shortened(tokenizer, ids[:start], width)
    return f"{text} -> {_shortened(tokenizer, ids[start:], width // 2)}" if num_response else text


def _shortened(tokenizer: Any, ids: list[int], width: int) -> str:
    text = _REPEATED.sub(r"\1..", tokenizer.decode(ids, skip_special_tokens=True))
    text = _BLANK_LINES.sub("\n", text).strip()
    return repr(text if len(text) <= width else text[:width] + "...")


def check_responses(inputs: Mapping[str, Tensor], num_pairs: int, tokenizer: Any, max_length: int | None) -> None:
    """Every response must have a token left to learn from.

    Args:
        inputs: The batch.
        num_pairs: How many of its pairs count, the first ones.
        tokenizer: To name rows.
        max_length: Where rows were cut; None: nowhere.

    Raises:
        TrainingError: Names the first response without any.
    """
    size = inputs["completion_mask"].size(0) // 2
    is_empty = (inputs["completion_mask"][:, 1:].sum(dim=1) == 0).view(2, size)[:, :num_pairs]
    if not is_empty.any():
        return
    kind, pair = is_empty.nonzero()[0].tolist()
    row = kind * size + pair
    num_tokens = int(lengths_of(inputs)[row])
    if max_length is not None and num_tokens >= max_length:
        advice = (
            f"`max_length={max_length}` cuts it off, since images and prompt alone fill it: raise it, use fewer image "
            "tiles, or leave such rows out (`overlong: drop`, where the data are no stream)"
        )
    else:
        advice = (
            "the data hold an empty response, or the chat template leaves none of it: take the row out, or mend the "
            "data collator if you passed your own"
        )
    raise TrainingError(
        f"{int(is_empty.sum())} of {is_empty.numel()} responses of this batch have no token to learn from; the first "
        f"is the {('chosen', 'rejected')[kind]} one of {row_text(inputs, row, tokenizer)} ({num_tokens} tokens). Most "
        f"likely {advice}."
    )


def check_terms(
    terms: MPOLoss, logps: Tensor, ref_logps: Tensor, inputs: Mapping[str, Tensor], tokenizer: Any, *, step: int
) -> None:
    """The loss and all rewards must be numbers, and the loss must depend on what is trained.

    Args:
        terms: The loss and its terms.
        logps: Summed log-probabilities of the policy, (2B,).
        ref_logps: The same of the reference, (2B,).
        inputs: The batch, to name rows.
        tokenizer: To name rows.
        step: Optimizer steps taken so far.

    Raises:
        TrainingError: Names the terms that are not finite, whose log-probabilities are to blame, and the rows; or a
            row of a batch that nothing is learned from.
    """
    if torch.is_grad_enabled() and not terms.loss.requires_grad:
        raise TrainingError(
            "nothing that is trained has a part in the loss of this batch, which begins with "
            f"{row_text(inputs, 0, tokenizer)}. Most likely all that these rows use is frozen, as where only the "
            "vision part (or LoRA on it) is trained and rows have no picture: train the language model too, or take "
            "such rows out."
        )
    if terms.loss.isfinite() & (logps + ref_logps).isfinite().all():  # one number to wait for
        return
    broken = [f"{name} {v.item()}" for name, v in terms._asdict().items() if v is not None and not v.isfinite()]
    by_policy, by_reference = ~logps.isfinite(), ~ref_logps.isfinite()
    rows = (by_policy | by_reference).nonzero().flatten().tolist()
    whose = [name for name, by in (("the policy's", by_policy), ("the reference's", by_reference)) if by.any()]
    what = f"the loss is not finite ({', '.join(broken)})" if broken else "a reward is not finite"
    named = "; ".join(row_text(inputs, row, tokenizer) for row in rows[:3])
    cause = f"as {' and '.join(whose)} log-probabilities are not, for {len(rows)} of {len(logps)} responses: {named}"
    raise TrainingError(
        f"after {step} optimizer steps {what}, {cause if rows else 'though all log-probabilities are'}. Most likely "
        f"{_why_broken(whose, step, len(rows) < len(logps))}."
    )


def _why_broken(whose: list[str], step: int, is_partly: bool) -> str:
    if not whose:
        return "the sums overflow: lower `beta` or `learning_rate`"
    if "the policy's" not in whose:
        return (
            "the reference model is broken, or overflows in fp16: load it again in bf16 or float32 (with "
            "`precompute_ref_log_probs`, compute its numbers anew)"
        )
    if step:
        return _BROKEN_BY_STEPS
    if is_partly:
        return _BROKEN_BY_ROWS
    return "the weights were broken before training: let the model answer a question, and download it again"


def find_blame(model: nn.Module, terms: MPOLoss) -> dict[str, list[str]]:
    """Which terms of a micro-batch have gradients that are not finite, and in which parameters.

    Args:
        model: Its gradients are lost.
        terms: Of one micro-batch, fresh from the forward pass.
    """
    found = {}
    for name, term in terms._asdict().items():
        if name != "loss" and term is not None:
            model.zero_grad()
            term.backward(retain_graph=True)
            if broken := _broken_gradients(model):
                found[name] = broken
    return found


def check_gradients(
    model: nn.Module,
    norm: float,
    batches: Sequence[Mapping[str, Tensor]],
    tokenizer: Any,
    blame: Callable[[], Blame] = dict,
    *,
    step: int = 0,
) -> None:
    """The gradient of a step must be a number, or the step would write it into every weight.

    Args:
        model: After the backward pass.
        norm: Norm of all its gradients.
        batches: The micro-batches of this step, to name rows.
        tokenizer: To name rows.
        blame: Finds out which terms of which micro-batches are the cause; called only if there is something to find.
        step: Optimizer steps taken so far.

    Raises:
        TrainingError: Names the parameters, the terms and the rows.
    """
    if math.isfinite(norm):
        return
    broken, found = _broken_gradients(model), blame()
    # clipping by a norm that is NaN has made all gradients NaN: only those found again tell which were so before
    again = {name: None for terms in found.values() for names in terms.values() for name in names}
    names = list(again) or broken
    causes = [
        f"the {', '.join(terms)} loss of micro-batch {number + 1} of {len(batches)}, which begins with "
        f"{row_text(batches[number], 0, tokenizer, width=80)}"
        for number, terms in found.items()
    ]
    raise TrainingError(
        f"after {step} optimizer steps the norm of the gradients is {norm}, though the loss is a number: {len(names)} "
        f"parameters have gradients that are not finite ({', '.join(names[:3]) or 'sharded'}), from "
        f"{'; '.join(causes[:3]) or 'no single term and micro-batch of this rank'}. Most likely "
        f"{_BROKEN_BY_STEPS if step and len(found) in (0, len(batches)) else _BROKEN_BY_ROWS}."
    )


def _broken_gradients(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]


class ZeroRewards:
    """Watches for a run that trains nothing: a policy that moved has rewards other than exactly 0."""

    def __init__(self) -> None:
        self.over = False

    def take_step(self, rewards: Tensor | Sequence[float], *, learned: float) -> None:
        """Looks at the rewards of one optimizer step.

        Args:
            rewards: Of all its pairs.
            learned: By how much weights should have moved before it, in steps of the full learning rate. The small
                steps of a warm-up may be lost in rounding, and count as little.

        Raises:
            TrainingError: Rewards stayed at exactly 0 although weights should have moved.
        """
        self.over = self.over or bool(torch.as_tensor(rewards).any())
        if self.over or learned <= _FULL_STEPS:
            return
        raise TrainingError(
            "all rewards have been exactly 0 in every step, although weights should have moved by "
            f"{learned:.1f} steps of the full learning rate: the policy is still its reference. Most likely nothing "
            "that matters is trained (parameters frozen, or LoRA on modules that these rows do not use: train "
            "others), `learning_rate` is too small for weights in bf16 (load them in float32), or policy and "
            "reference share their weights (pass no `ref_model`)."
        )


def check_finite(model: nn.Module) -> None:
    """No trained weight may be NaN or infinite when it is saved; looks at this rank's part of each.

    Raises:
        TrainingError: Names the parameters.
    """
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    broken = [name for name, p in trained if not _local(p).isfinite().all()]
    if broken:
        raise TrainingError(
            f"{len(broken)} parameters are not finite ({', '.join(broken[:3])}), so nothing was saved over the last "
            "whole checkpoint. Most likely the last updates broke the model, or a step with a gradient that was not "
            "finite was taken: go back to that checkpoint, with a lower `learning_rate` or in bf16."
        )


def check_saved(folder: Path, model: nn.Module) -> None:
    """What was written must be the weights, not empty or zero ones as a sharded model leaves when it is not gathered.

    Args:
        folder: With safetensors files; without any there is nothing to check.
        model: What was saved. As many matrices as are zero in it may be zero in the files, whatever their names there.

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
    if not empty and len(zero) <= (_num_zero(model) if zero else 0):
        return
    broken = empty or zero
    raise TrainingError(
        f"{len(broken)} weights in {folder} were saved as {'nothing' if empty else 'zeros'}, and are not so in memory "
        f"({', '.join(broken[:3])}). Most likely a model sharded by DeepSpeed ZeRO-3 or FSDP was not gathered: set "
        "`stage3_gather_16bit_weights_on_model_save: true` in the DeepSpeed config (FSDP: `fsdp_state_dict_type: "
        "FULL_STATE_DICT`). An earlier DeepSpeed checkpoint is made whole by the `zero_to_fp32.py` in it."
    )


def _num_zero(model: nn.Module) -> int:
    return sum(t.dim() > 1 and not _local(t).any() for t in chain(model.parameters(), model.buffers()))


def _is_zero(file: Any, name: str) -> bool:
    part = file.get_slice(name)
    shape = torch.Size(part.get_shape())
    if part[: max(1, _SAMPLE * shape[0] // shape.numel())].any():
        return False
    return not file.get_tensor(name).any()


def _local(tensor: Tensor) -> Tensor:
    """What of a parameter lies on this rank: DeepSpeed's part, a DTensor's, or all of it."""
    sharded = getattr(tensor, "ds_tensor", tensor).detach()
    return sharded.to_local() if hasattr(sharded, "to_local") else sharded
