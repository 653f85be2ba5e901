"""What a micro-batch of pairs is scored by: its log-probabilities, and which of its pairs count.

A batch is either plain (of TRL's collators: one padded row per response) or a forest (of `mpo.forest_collators`:
shared prefixes once). Both have a `completion_mask` with one row per response, and leave here in the same shapes.

Shapes: B pairs, 2B rows with the chosen responses first; T tokens. Log-probabilities are in nats.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpo.forest import NO_LABEL
from mpo.forest_inputs import forest_inputs

REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # of a data set or batch: one number per pair
NUM_PAIRS = "num_pairs"  # in a batch: how many of its pairs count, the first ones

_OF_A_FOREST = ("places", "lengths", "positions", "last", "shift_labels", "tree", "root_ids", "root_mask")
_NOT_FOR_THE_MODEL = {
    *("completion_mask", NUM_PAIRS, "root_mm_token_type_ids"),
    *REF_COLUMNS,
    *_OF_A_FOREST,
}


class TokenScores(NamedTuple):
    """What a model's fused head says of the next token at each place of a response; 0 elsewhere.

    Attributes:
        logps: Its log-probability, (2B, T).
        entropy: Entropy of the prediction, (2B, T); like the next two None for a reference.
        mean_logits: Mean of the logits, (2B, T).
        is_top1: Whether it was the likeliest, (2B, T).
        aux_loss: Load-balancing loss of a mixture of experts, if asked for.
    """

    logps: Tensor
    entropy: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None
    aux_loss: Tensor | None


class Scores(NamedTuple):
    """What the loss and the metrics need of a micro-batch.

    Attributes:
        logps: Summed log-probabilities of the policy in float32, (2B,).
        ref_logps: The same of the reference, (2B,).
        mask: 1 where a token is part of a response, (2B, T).
        tokens: The policy's, token by token.
    """

    logps: Tensor
    ref_logps: Tensor
    mask: Tensor
    tokens: TokenScores


def is_forest(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is a forest."""
    return "last" in batch


def score_tokens(model: nn.Module, base: nn.Module, batch: Mapping[str, Any], **extra: Any) -> TokenScores:
    """One forward of a model with TRL's fused head.

    Args:
        model: As it is called: perhaps wrapped by DDP, DeepSpeed or PEFT.
        base: The model itself.
        batch: Plain or a forest.
        **extra: More arguments of the forward.
    """
    inputs, mask = model_inputs(batch), batch["completion_mask"][:, 1:]
    if is_forest(batch):
        scored = batch["shift_labels"] != NO_LABEL  # (R, L)
        inputs |= forest_inputs(base, batch)
        with _only_at(scored, base.base_model):
            outputs = model(**inputs, **extra, shift_labels=batch["shift_labels"][scored][None], fused_lm_head=True)
        places = (scored.flatten().cumsum(0) - 1)[batch["places"]]  # (2B, T), among those that are scored
    else:
        outputs = model(**inputs, **extra, labels=_labels_of(batch), fused_lm_head=True)

    def of_responses(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if is_forest(batch):
            return values.flatten()[places] * mask
        return values[:, -mask.size(1) :]  # prompt-learning adapters put virtual tokens in front

    names = ("log_probs", "entropy", "mean_logits", "is_top1")
    return TokenScores(*(of_responses(getattr(outputs, name)) for name in names), outputs.aux_loss)


@contextmanager
def _only_at(scored: Tensor, backbone: nn.Module) -> Iterator[None]:
    """Hands the head the hidden states that are scored: without Triton, TRL's head scores prompts too."""

    def select(module: nn.Module, arguments: Any, outputs: Any) -> None:
        outputs.last_hidden_state = outputs.last_hidden_state[scored][None]

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def sequence_logps(token_logps: Tensor, mask: Tensor, ld_alpha: float | None = None) -> Tensor:
    """Log-probabilities of whole responses, summed in float32 whatever the model's dtype.

    Args:
        token_logps: Of every next token, (2B, T).
        mask: 1 where the token is part of a response, (2B, T).
        ld_alpha: LD-DPO (https://arxiv.org/abs/2409.06411): the weight of the tokens by which a response is longer
            than the other one of its pair; None weighs all alike.

    Returns:
        One sum per response, (2B,).
    """
    masked = token_logps.float().masked_fill(mask == 0, 0.0)
    if ld_alpha is None:
        return masked.sum(dim=1)
    lengths = mask.sum(dim=1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)  # (2B,)
    in_tail = mask.cumsum(dim=1) > shared[:, None]
    return torch.where(in_tail, ld_alpha * masked, masked).sum(dim=1)


def num_pairs(batch: Mapping[str, Any]) -> int:
    """B: all pairs of a batch."""
    return batch["completion_mask"].size(0) // 2


def num_counted(batch: Mapping[str, Any]) -> int:
    """How many pairs of a batch count, the first ones; others only keep all ranks at the same work."""
    return batch.get(NUM_PAIRS, num_pairs(batch))


def size_of(batch: Mapping[str, Any]) -> Tensor:
    """Pairs that count, and tokens of their chosen responses, (2,)."""
    counted, mask = num_counted(batch), batch["completion_mask"]
    return torch.stack([torch.tensor(counted, device=mask.device), mask[:counted, 1:].sum()])


def lengths_of(batch: Mapping[str, Any]) -> Tensor:
    """Tokens of each sequence, prompt and response, (2B,)."""
    return batch["lengths"] if is_forest(batch) else batch["attention_mask"].sum(dim=1)


def tokens_of(batch: Mapping[str, Any], row: int) -> list[int]:
    """The tokens of one sequence of a batch, prompt and response."""
    if not is_forest(batch):
        return batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
    places = batch["places"][row][batch["completion_mask"][row, 1:].bool()]
    tree_row, place = divmod(int(places[0]), batch["last"].size(1))
    keys = torch.arange(batch["last"].size(1), device=places.device)
    path = batch["input_ids"][tree_row][(keys <= place) & (place <= batch["last"][tree_row])]
    return [*path.tolist(), *batch["shift_labels"].flatten()[places].tolist()]


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's forward takes of a batch as it is."""
    return {**{name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}, "use_cache": False}


def _labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The tokens of responses, -100 elsewhere, (2B, T)."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
