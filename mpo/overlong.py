"""Rows that would lose their pictures or a whole response to `max_length`: an error, or left out, never trained on.

N rows; B pairs in a batch, T tokens in its longest sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from datasets import Dataset
from torch import Tensor

from data_builders.records import InputError, Row
from mpo.lengths import Lengths, label_of


@dataclass(frozen=True)
class FitReport:
    """What `max_length` did to a data set.

    Attributes:
        name: The data set, for messages.
        max_length: The limit; None for none.
        num_rows: How many rows there were.
        dropped: Those left out, ready for a JSONL file: `row`, `id` if there is one, the four lengths, `reason`.
        num_cut: Rows that stay and lose the end of a response, or the start of the prompt with `keep_end`.
    """

    name: str
    max_length: int | None
    num_rows: int
    dropped: list[Row]
    num_cut: int

    def __str__(self) -> str:
        return (
            f"{self.name} data: {len(self.dropped):,} of {self.num_rows:,} rows dropped, which would have lost "
            f"pictures or a whole response; {self.num_cut:,} cut at max_length={self.max_length}"
        )


def fit_to_length(
    dataset: Dataset,
    lengths: Lengths,
    *,
    max_length: int | None,
    overlong: Literal["error", "drop"] = "error",
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start",
    name: str = "train",
) -> tuple[Dataset, FitReport]:
    """Keeps out of training what `max_length` would cut down to half a picture or to no response.

    A picture stands in front of the responses, so a row that loses part of one also loses both responses whole. Rows
    that only lose the end of a response stay, as in TRL, and are counted.

    Args:
        dataset: N rows.
        lengths: Their lengths.
        max_length: Where sequences are cut; None: nowhere.
        overlong: "error" refuses a data set with such rows, "drop" leaves them out.
        truncation_mode: Which end of a sequence stays. "keep_end" never takes a whole response, and TRL refuses it
            for pictures.
        name: The data set, for messages.

    Returns:
        The rows to train on, and what was done.

    Raises:
        InputError: There are such rows and `overlong` is "error", or there are no others.
    """
    assert len(dataset) == len(lengths.image)
    empty = (lengths.chosen == 0) | (lengths.rejected == 0)
    unfit, num_cut = empty, 0
    if max_length is not None:
        unfit = empty | (lengths.before_response >= max_length) if truncation_mode == "keep_start" else empty
        num_cut = int((~unfit & (lengths.total > max_length)).sum())
    if unfit.any() and (overlong == "error" or unfit.all()):
        row = int(unfit.argmax())
        found = _complaint(lengths, row, max_length, f"{unfit.sum():,} of {unfit.size:,} rows")
        drop = "" if unfit.all() else " Or set `overlong: drop` to train on the other rows."
        raise InputError(f"{name} data: row {label_of(row, _identity(dataset, row))} has {found}{drop}")
    dropped = []
    for row in np.flatnonzero(unfit).tolist():
        counts = {part: int(column[row]) for part, column in lengths._asdict().items()}
        reason = "a response is empty" if empty[row] else "pictures would be cut or nothing of a response left"
        dropped.append({"row": row, **_identity(dataset, row), **counts, "reason": reason})
    kept = dataset.select(np.flatnonzero(~unfit)) if dropped else dataset
    return kept, FitReport(name, max_length, unfit.size, dropped, num_cut)


def _complaint(lengths: Lengths, row: int, max_length: int | None, share: str) -> str:
    """What is wrong with a row and what helps; `share` says how many rows are like it."""
    image, prompt, chosen, rejected = (int(column[row]) for column in lengths)
    if not (chosen and rejected):
        return "an empty response, from which nothing can be learned: take it out of the data."
    cut = "cut its pictures or " if image else ""
    smaller = " Smaller pictures or fewer tiles, by the processor's settings, also help." if image else ""
    return (
        f"{image:,} image and {prompt:,} text tokens in front of its responses, so `max_length={max_length}` would "
        f"{cut}leave nothing of a response; so it is with {share}. Set `max_length` to at least "
        f"{lengths.before_response.max() + 1}; {lengths.total.max()} cuts nothing at all.{smaller}"
    )


def check_batch(
    input_ids: Tensor,
    completion_mask: Tensor,
    *,
    max_length: int | None,
    image_token_id: int | None,
    names: Sequence[str] | None = None,
) -> None:
    """Refuses a batch of which `max_length` would cut a picture or a whole response: all that a stream allows.

    Args:
        input_ids: As collated and not yet cut, padded on the right, chosen sequences first, (2B, T).
        completion_mask: 1 where a token belongs to a response, (2B, T).
        max_length: How much of each sequence's start will stay; None: all of it.
        image_token_id: Of the token that stands for a piece of a picture (`model.config.image_token_id`).
        names: What a reader would know each pair by.

    Raises:
        InputError: Names the first such pair, its tokens, and the `max_length` that the batch needs.
    """
    num_pairs = len(input_ids) // 2
    lost = ~completion_mask[:, :max_length].bool().any(dim=1)
    if not lost.any():
        return
    lost = lost.reshape(2, num_pairs).any(dim=0)
    pair, share = int(lost.int().argmax()), f"{int(lost.sum())} of {num_pairs} pairs"
    before_response = completion_mask.int().argmax(dim=1).reshape(2, num_pairs).amax(dim=0)  # 0 if there is none
    image = (input_ids[:num_pairs] == (-1 if image_token_id is None else image_token_id)).sum(dim=1)
    columns = (image, before_response - image, *completion_mask.sum(dim=1).reshape(2, num_pairs))
    found = _complaint(Lengths(*(column.cpu().numpy() for column in columns)), pair, max_length, share)
    name = f" ({names[pair]})" if names else ""
    raise InputError(f"pair {pair} of this batch{name} has {found}")


def _identity(dataset: Dataset, row: int) -> Row:
    """What the data set calls a row, if it has a column `id`."""
    return dataset.select_columns(["id"])[row] if "id" in dataset.column_names else {}
