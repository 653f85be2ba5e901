"""Runs a step over the chunks of its input, one output shard per chunk; a shard that exists is not made again.

A killed run leaves whole shards only, so the same command goes on after the last one and ends with the same files.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_builders.records import InputError, Record, Row
from data_builders.shards import read_rows, read_stage, shard_paths, write_rows

DROPPED = "dropped"  # folder of the rows that a step left out, each with its reason


@dataclass(frozen=True)
class Chunk:
    """One unit of resumable work: the name of the shard that it becomes, its rows, and how many there are."""

    name: str
    rows: Callable[[], list[Row]]
    size: int


def chunks_of_rows(source: Path, model: type[Record], size: int) -> list[Chunk]:
    """Cuts a file or folder into chunks of `size` rows.

    Raises:
        InputError: A row is broken or there is none, found here and so before the work; or `size` is not positive.
    """
    if size < 1:
        raise InputError(f"`shard_size` must be at least 1, got {size}: it is the number of rows that make a shard.")
    rows = list(read_stage(source, model))
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [Chunk(f"{number:05d}.jsonl", lambda part=part: part, len(part)) for number, part in enumerate(parts)]


def chunks_of_shards(source: Path, model: type[Record]) -> list[Chunk]:
    """The shards of a folder, or a file alone, one chunk each, read when their turn comes.

    Raises:
        InputError: There is nothing to read.
    """
    return [
        Chunk(f"{path.stem}.jsonl", lambda path=path: list(read_rows(path, model)), 1) for path in shard_paths(source)
    ]


def run_step(
    step: Callable[[list[Row]], tuple[list[Row], list[Row]]], chunks: Iterable[Chunk], output: Path, *, title: str
) -> None:
    """Makes every output shard that is not there yet.

    Args:
        step: The rows of a chunk to the rows of a shard, and to a row with `id` and `reason` for everything that was
            left out; depends on nothing but its argument.
        chunks: The work.
        output: The folder of the shards; what was left out stands in its folder `dropped`.
        title: What the progress bar says.
    """
    work = list(chunks)
    unit = "row" if any(chunk.size > 1 for chunk in work) else "shard"
    with tqdm(total=sum(chunk.size for chunk in work), desc=title, unit=unit) as bar:
        for chunk in work:
            path = output / chunk.name
            if not path.exists():
                rows, dropped = step(chunk.rows())
                if dropped:
                    write_rows(output / DROPPED / chunk.name, dropped)
                write_rows(path, rows)
            bar.update(chunk.size)


def count_by_source(output: Path, field: str) -> list[tuple[str, Counter[str]]]:
    """How often each value of a field occurs in the rows of a step, by source of question and in its order."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for path in shard_paths(output):
        for row in read_rows(path):
            counts[row.get("source", "")][row[field]] += 1
    return [(source or "(no source)", counts[source]) for source in sorted(counts)]


def drop_reasons(output: Path) -> Counter[str]:
    """How many rows a step left out, by reason."""
    return Counter(row["reason"] for path in sorted((output / DROPPED).glob("*.jsonl")) for row in read_rows(path))


def drop_note(output: Path) -> list[str]:
    """The same as a sentence for the summary; empty when nothing was left out."""
    reasons = drop_reasons(output)
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return [f"Left out: {counts}; listed in {output / DROPPED}."] if reasons else []
