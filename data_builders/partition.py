"""More rows than memory holds, in whatever order they come: gathered by key, and ranked.

`partition` copies the rows of a stage into buckets, all rows with the same key into the same one, so that each bucket
can be worked on alone. `cutoffs` finds the n-th smallest of any number of numbers. Neither keeps more than a few dozen
megabytes, and what they find does not depend on the order of the rows or on the files that these lie in.
"""

import codecs
import json
import os
import shutil
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_builders.records import InputError, Record, Row
from data_builders.shards import Place, full_disk_explained, read_placed_rows, shard_paths

BUCKET_BYTES = 32 * 2**20  # of rows as JSON; as Python objects, with what is made of them, about ten times as much
MAX_BUCKETS = 4096  # 128 GiB of rows: about 100 million responses; above that the buckets grow
BUFFER_BYTES = 32 * 2**20  # of all buckets together, before they are written out

_SIZES = "sizes.json"  # how many rows each bucket holds
_BIN_BITS = 12
_NEEDS = (
    "It holds a copy of the input while the work lasts, so it needs as much room. Make room and give the same command "
    "again."
)


@dataclass(frozen=True)
class Bucket:
    """All rows whose keys fall into one range."""

    path: Path
    size: int


def num_buckets(source: Path) -> int:
    """How many buckets the rows of a file or folder make: by their bytes alone, however they are cut into files.

    Raises:
        InputError: There is nothing to read, or no row in it.
    """
    total = sum(len(line) for path in shard_paths(source) for _, line in _lines(path))
    if not total:
        raise InputError(f"{source} holds no row: the step that writes it produced nothing.")
    return min(-(-total // BUCKET_BYTES), MAX_BUCKETS)


def partition(
    source: Path, folder: Path, num: int, *, model: type[Record], key: Callable[[Row], bytes], title: str
) -> list[Bucket]:
    """Copies rows into buckets by key, each line as it stands; a folder that exists is whole and is not made again.

    Args:
        source: A file of rows or a folder of shards.
        folder: Becomes the folder of the buckets; made under another name and renamed once it is whole.
        num: How many buckets, of `num_buckets`.
        model: The row type that each line must have.
        key: At least 8 bytes, evenly spread: a digest. Every key of a bucket is smaller than those of the next.
        title: What the progress bar says.

    Returns:
        The buckets in order of their keys; the rows inside stand in the order of the source.

    Raises:
        InputError: A row is broken, with file and line; or the disk is full.
    """
    if not folder.exists():
        temporary = _temporary(folder)
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        try:
            with full_disk_explained(folder, _NEEDS):
                temporary.mkdir(parents=True)
                _fill(source, temporary, num, model, key, title)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    sizes = json.loads((folder / _SIZES).read_text(encoding="utf-8"))
    return [Bucket(_bucket_path(folder, number), size) for number, size in enumerate(sizes)]


def discard(folder: Path) -> None:
    """Removes a folder of buckets; one that is half removed is never taken for a whole one."""
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    if folder.exists():
        folder.rename(temporary)
        shutil.rmtree(temporary)


def cutoffs(numbers: Callable[[], Iterable[tuple[str, int]]], limit: Callable[[str], int]) -> dict[str, int]:
    """The n-th smallest number of each group, in two readings and the memory of a few thousand counters per group.

    Args:
        numbers: Reads groups and numbers of 64 bits, evenly spread: digests. Called twice.
        limit: n of a group, at least 1.

    Returns:
        By group; groups of n numbers or fewer are left out, as nothing of them lies above.

    >>> numbers = [("a", 5 << 60), ("a", 3 << 60), ("b", 1 << 60), ("a", 9 << 60)]
    >>> {group: number >> 60 for group, number in cutoffs(lambda: numbers, lambda group: 2).items()}
    {'a': 5}
    """
    shift = 64 - _BIN_BITS
    counts: defaultdict[str, array[int]] = defaultdict(lambda: array("Q", bytes(8 << _BIN_BITS)))
    for group, number in numbers():
        counts[group][number >> shift] += 1
    edges = {group: _edge(bins, limit(group)) for group, bins in counts.items() if sum(bins) > limit(group)}
    inside: dict[str, list[int]] = {group: [] for group in edges}
    for group, number in numbers():
        if group in edges and number >> shift == edges[group][0]:
            inside[group].append(number)
    return {group: sorted(inside[group])[rank] for group, (_, rank) in edges.items()}


def _edge(bins: "array[int]", limit: int) -> tuple[int, int]:
    """The bin that holds the number of rank `limit`, and the place of that number in it, from 0 on."""
    place = limit - 1
    for number, count in enumerate(bins):
        if place < count:
            return number, place
        place -= count
    raise AssertionError("fewer numbers than the limit")


def _lines(path: Path) -> Iterator[tuple[Place, bytes]]:
    """The lines of a file that hold something, without the white space around them."""
    byte = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if text := line.removeprefix(codecs.BOM_UTF8).strip():
                yield Place(number, byte), text
            byte += len(line)


def _fill(source: Path, folder: Path, num: int, model: type[Record], key: Callable[[Row], bytes], title: str) -> None:
    paths, writer = shard_paths(source), _Writer(folder, num)
    with tqdm(total=sum(path.stat().st_size for path in paths), desc=title, unit="B", unit_scale=True) as bar:
        for path in paths:
            done = 0
            for place, line in _lines(path):
                row = _checked(line, model, path, place)
                writer.add(int.from_bytes(key(row)[:8]) * num >> 64, line)
                if place.byte - done >= 2**20:
                    bar.update(place.byte - done)
                    done = place.byte
            bar.update(path.stat().st_size - done)
    writer.close()


def _checked(line: bytes, model: type[Record], path: Path, place: Place) -> Row:
    """The row of a line; `check_row`, which is ten times as slow, finds the words where it does not fit."""
    try:
        row = json.loads(line.decode())
    except ValueError:
        row = None
    if not model.__pydantic_validator__.isinstance_python(row):
        _, row = next(read_placed_rows(path, model, place))
    return row


class _Writer:
    """Appends lines to many files without holding them open, of which systems allow few."""

    def __init__(self, folder: Path, num: int) -> None:
        self.folder, self.waiting = folder, 0
        self.buffers, self.sizes = [bytearray() for _ in range(num)], [0] * num

    def add(self, bucket: int, line: bytes) -> None:
        """Appends a line to a bucket."""
        self.buffers[bucket] += line + b"\n"
        self.sizes[bucket] += 1
        self.waiting += len(line)
        if self.waiting >= BUFFER_BYTES:
            self._write_out()

    def close(self) -> None:
        """Sees all of it onto the disk."""
        self._write_out()
        for number in range(len(self.sizes)):
            with _bucket_path(self.folder, number).open("ab") as file:
                os.fsync(file.fileno())
        (self.folder / _SIZES).write_text(json.dumps(self.sizes), encoding="utf-8")

    def _write_out(self) -> None:
        for number, buffer in enumerate(self.buffers):
            if buffer:
                with _bucket_path(self.folder, number).open("ab") as file:
                    file.write(buffer)
                buffer.clear()
        self.waiting = 0


def _bucket_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.jsonl"


def _temporary(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.tmp")
