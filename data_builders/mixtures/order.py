"""The order of a mixture, fixed once: which row of which source stands at each position.

Every use of a row has a number of 64 bits that depends on nothing but the seed, the name of its source, the pass and
the row; the mixture is the uses in order of their numbers. So the order is that of a random shuffle, the same on every
machine, and a mixture to which each source gives more rows keeps those of the smaller one in their order.

Takes about 60 bytes of memory for each row of the mixture: 12 million rows take 0.7 GB.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Order:
    """The rows of a mixture by position.

    Attributes:
        names: The sources, by name.
        sources: Which of them a position is from, (T,).
        rows: Which row of it, from 0 on, (T,).
    """

    names: list[str]
    sources: NDArray[np.int32]
    rows: NDArray[np.int64]

    def between(self, start: int, end: int) -> Iterator[tuple[str, int]]:
        """Source and row of the positions from `start` up to, but without, `end`."""
        sources, rows = self.sources[start:end].tolist(), self.rows[start:end].tolist()
        return ((self.names[source], row) for source, row in zip(sources, rows, strict=True))


def mixture_order(counts: Mapping[str, int], sizes: Mapping[str, int], *, seed: int) -> Order:
    """Shuffles so many rows of each source together.

    Args:
        counts: Rows that each source gives. Above its size all rows come in whole passes, and a choice of them once
            more; below it a choice of them comes once.
        sizes: Rows that each source has.
        seed: Another one gives another choice and another order.

    >>> order = mixture_order({"a": 4, "b": 1}, {"a": 3, "b": 9}, seed=0)
    >>> list(order.between(0, 5))
    [('b', 0), ('a', 1), ('a', 2), ('a', 0), ('a', 1)]
    """
    names = sorted(counts)
    uses = [list(_uses(name, counts[name], sizes[name], seed)) for name in names]
    rows = np.concatenate([np.empty(0, np.int64), *(rows for parts in uses for rows, _ in parts)])
    numbers = np.concatenate([np.empty(0, np.uint64), *(numbers for parts in uses for _, numbers in parts)])
    sources = np.repeat(np.arange(len(names), dtype=np.int32), [counts[name] for name in names])
    order = np.argsort(numbers, kind="stable")
    return Order(names, sources[order], rows[order])


def _uses(name: str, count: int, size: int, seed: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """The rows of each pass over a source, with the numbers that place them."""
    whole, rest = divmod(count, size) if count else (0, 0)
    for number in range(whole):
        yield np.arange(size), _numbers(size, seed, name, number)
    if rest:
        chosen = np.argsort(_numbers(size, seed, name, "choice"), kind="stable")[:rest]
        yield chosen, _numbers(size, seed, name, whole)[chosen]


def _numbers(size: int, *key: str | int) -> NDArray[np.uint64]:
    """A number per row, no two alike, (size,): SplitMix64 (Steele et al. 2014), started at the digest of a key."""
    start = int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8])
    mixed = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
