"""Runs a step over the chunks of its input, one output shard per chunk; a shard that exists is not made again.

A killed run leaves whole shards only, so the same command goes on after the last one and ends with the same files.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data_builders.records import Record, Row
from data_builders.shards import read_rows, read_stage, shard_paths, write_rows

DROPPED = "dropped"  # folder of the rows that a step left out, each with its reason


@dataclass(frozen=True)
class Chunk:
    """One unit of resumable work: the name of the shard that it becomes, its rows, and how many there are."""

    name: str
    rows: Callable[[], list[Row]]
    size: int


def chunks_of_rows(source: Path, model: type[Record], size: int) -> Iterator[Chunk]:
    """Cuts a file or folder into chunks of `size` rows.

    Every row is checked before the first chunk is handed out, so that a broken line is found before the work.
    """
    total = sum(1 for _ in read_stage(source, model))
    rows = read_stage(source, model)
    for number in range(-(-total // size)):
        part = list(islice(rows, size))
        yield Chunk(f"{number:05d}.jsonl", lambda part=part: part, len(part))


def chunks_of_shards(source: Path, model: type[Record]) -> Iterator[Chunk]:
    """The shards of a folder, one chunk each, read when their turn comes."""
    for path in shard_paths(source):
        yield Chunk(path.name, lambda path=path: list(read_rows(path, model)), 1)


def run_step(
    step: Callable[[list[Row]], tuple[list[Row], list[Row]]], chunks: Iterator[Chunk], output: Path, *, title: str
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


def drop_reasons(output: Path) -> Counter[str]:
    """How many rows a step left out, by reason."""
    return Counter(row["reason"] for path in sorted((output / DROPPED).glob("*.jsonl")) for row in read_rows(path))


def drop_note(output: Path) -> list[str]:
    """The same as a sentence for the summary; empty when nothing was left out."""
    reasons = drop_reasons(output)
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return [f"Left out: {counts}; listed in {output / DROPPED}."] if reasons else []
