"""Pairs of one question side by side, so that a forest computes their prompt, pictures and responses once."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from datasets import Dataset
from torch.utils.data import Sampler

_ROWS_AT_A_TIME = 1000


def question_keys(dataset: Dataset) -> list[bytes]:
    """One key per row, equal for rows with the same prompt and pictures, by path or bytes; nothing is decoded."""
    names = [name for name in ("prompt_ids", "prompt", "image", "images") if name in dataset.column_names]
    names = [name for name in names if name != "prompt" or "prompt_ids" not in names]
    keys = []
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=_ROWS_AT_A_TIME):
        for row in table.to_pylist():
            keys.append(hashlib.blake2b(json.dumps(row, default=_short).encode(), digest_size=16).digest())
    return keys


def pack_groups(keys: Sequence[Hashable], order: Sequence[int], batch_size: int) -> list[int]:
    """Orders rows so that batches of consecutive rows hold whole groups, as far as they fit.

    Args:
        keys: Group of each row.
        order: All rows; groups and their rows come in this order where nothing else decides.
        batch_size: Rows in a batch.

    Returns:
        All rows, each once. A group is cut where it is larger than a batch, and where only cut groups can fill one.

    >>> pack_groups("aabbbc", range(6), 3)
    [2, 3, 4, 0, 1, 5]
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row in order:
        groups[keys[row]].append(row)
    starts = [(rows, start) for rows in groups.values() for start in range(0, len(rows), batch_size)]
    pieces = [rows[start : start + batch_size] for rows, start in starts]
    by_size: dict[int, list[list[int]]] = defaultdict(list)
    for piece in reversed(pieces):
        by_size[len(piece)].append(piece)
    full, rest = [], []
    while by_size:
        batch: list[int] = []
        while fitting := [size for size in by_size if size <= batch_size - len(batch)]:
            size = max(fitting)
            batch += by_size[size].pop()
            if not by_size[size]:
                del by_size[size]
        (full if len(batch) == batch_size else rest).append(batch)
    return [row for batch in [*full, *rest] for row in batch]


class GroupedSampler(Sampler):
    """Gives out rows of one question side by side, in another order every epoch.

    Args:
        keys: Of `question_keys`.
        batch_size: Rows in a micro-batch of one rank.
        seed: The same seed and epoch give the same order on every rank and after a stop.
        epoch: Says which epoch it is whenever a pass begins.
    """

    def __init__(self, keys: Sequence[Hashable], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.keys, self.batch_size, self.seed, self.epoch = keys, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(len(self.keys), generator=generator).tolist()
        rows = pack_groups(self.keys, order, self.batch_size)
        num_full = len(rows) // self.batch_size
        batches = torch.randperm(num_full, generator=generator).tolist()  # packing put those of large groups first
        for batch in batches:
            yield from rows[batch * self.batch_size : (batch + 1) * self.batch_size]
        yield from rows[num_full * self.batch_size :]


def _short(value: object) -> str:
    """Encoded pictures count by their digest."""
    assert isinstance(value, bytes)
    return hashlib.blake2b(value, digest_size=16).hexdigest()
