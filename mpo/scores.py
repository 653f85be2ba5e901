"""What a micro-batch of pairs is scored by: its log-probabilities, and which of its pairs count.

Shapes: B pairs, 2B rows with the chosen responses first; T tokens. Log-probabilities are in nats.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # of a data set or batch: one number per pair
NUM_PAIRS = "num_pairs"  # in a batch: how many of its pairs count, the first ones
_NOT_FOR_THE_MODEL = {"completion_mask", NUM_PAIRS, *REF_COLUMNS}


class Scores(NamedTuple):
    """What the loss and the metrics need of a micro-batch.

    Attributes:
        logps: Summed log-probabilities of the policy in float32, (2B,).
        ref_logps: The same of the reference, (2B,).
        token_logps: Log-probability of every next token, 0 outside responses, (2B, T - 1).
        mask: 1 where the next token is part of a response, (2B, T - 1).
        outputs: Everything else the fused head returned.
    """

    logps: Tensor
    ref_logps: Tensor
    token_logps: Tensor
    mask: Tensor
    outputs: Any


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


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's forward takes of a batch."""
    return {**{name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}, "use_cache": False}


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The tokens of responses, -100 elsewhere, (2B, T)."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
