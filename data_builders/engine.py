"""Runs a step over the chunks of its input, one output shard per chunk; a shard that exists is not made again.

In this process, in several, or on a Ray cluster: the same files either way. A killed run leaves whole shards only, so
the same command goes on after the last one and ends with the same files.
"""

import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_builders.records import InputError, Record, Row
from data_builders.shards import Place, full_disk_explained, read_placed_rows, read_rows, shard_paths, write_rows

DROPPED = "dropped"  # folder of the rows that a step left out, each with its reason

# The rows of a chunk to the rows of a shard, and to a row with `id` and `reason` for everything that was left out;
# depends on nothing but its argument.
Step = Callable[[list[Row]], tuple[list[Row], list[Row]]]


@dataclass(kw_only=True)
class EngineConfig:
    """Where the shards of a step go and where they are made; none of it changes what is in them."""

    output: str = field(metadata={"help": "Folder for the shards."})
    workers: int = field(default=1, metadata={"help": "Processes that work side by side, each with its own model."})
    ray: str | None = field(
        default=None,
        metadata={
            "help": "Run the workers on a Ray cluster: its address, `auto` for the one that this machine belongs to, "
            "`local` for one on this machine alone. All machines must see the same folders."
        },
    )
    gpus_per_worker: float = field(default=0.0, metadata={"help": "Ray: GPUs of each worker."})

    def __post_init__(self) -> None:
        """Refuses what nothing can run on.

        Raises:
            InputError: `workers` is not positive.
        """
        if self.workers < 1:
            raise InputError(f"`workers` must be at least 1, got {self.workers}.")


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one file."""

    path: Path
    start: Place
    size: int

    def rows(self) -> list[Row]:
        """The rows, read now."""
        return [row for _, row in islice(read_placed_rows(self.path, start=self.start), self.size)]


@dataclass(frozen=True)
class Chunk:
    """One unit of resumable work: the name of the shard that it becomes, and where its rows lie."""

    name: str
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """How many rows there are."""
        return sum(span.size for span in self.spans)

    def rows(self) -> list[Row]:
        """The rows, read now."""
        return [row for span in self.spans for row in span.rows()]


def chunks_of_rows(source: Path, model: type[Record], size: int) -> list[Chunk]:
    """Cuts a file or folder into chunks of `size` rows, also across the shards of a folder; keeps no row in memory.

    Raises:
        InputError: A row is broken or there is none, found here and so before the work; or `size` is not positive.
    """
    if size < 1:
        raise InputError(f"`shard_size` must be at least 1, got {size}: it is the number of rows that make a shard.")
    parts: list[list[Span]] = [[]]
    room = size
    for path in shard_paths(source):
        start, count = None, 0
        for place, _ in read_placed_rows(path, model):
            start, count, room = start or place, count + 1, room - 1
            if not room:
                parts[-1].append(Span(path.absolute(), start, count))
                parts.append([])
                start, count, room = None, 0, size
        if start:
            parts[-1].append(Span(path.absolute(), start, count))
    if not parts[0]:
        raise InputError(f"{source} holds no row: the step that writes it produced nothing.")
    parts = [part for part in parts if part]
    return [Chunk(shard_name(number, len(parts)), tuple(part)) for number, part in enumerate(parts)]


def shard_name(number: int, of: int) -> str:
    """What a shard is called: the names of all sort as their numbers do.

    >>> shard_name(7, 12), shard_name(7, 1_000_000)
    ('00007.jsonl', '000007.jsonl')
    """
    return f"{number:0{max(5, len(str(of - 1)))}d}.jsonl"


def run_step(make_step: Callable[[], Step], chunks: Iterable[Chunk], config: EngineConfig, *, title: str) -> None:
    """Makes every output shard that is not there yet.

    Args:
        make_step: Makes the step, in the process that runs it and once there is work; with several workers it must
            be picklable, as `functools.partial` of a class and its settings is.
        chunks: The work.
        config: Where to; what was left out stands in the folder `dropped` there.
        title: What the progress bar says.

    Raises:
        InputError: As the step; or a worker died, or the disk is full. The same command goes on from there.
    """
    work, output = list(chunks), Path(config.output)
    missing = [chunk for chunk in work if not (output / chunk.name).exists()]
    num_rows = sum(chunk.size for chunk in work)
    with tqdm(total=num_rows, initial=num_rows - sum(c.size for c in missing), desc=title, unit="row") as bar:
        for size in _made(make_step, missing, output, config) if missing else ():
            bar.update(size)
    _sweep(output, {chunk.name for chunk in work})


def _sweep(output: Path, names: set[str]) -> None:
    """Removes what a killed run left half written, in one look at each folder: there may be thousands of shards."""
    for folder in (output, output / DROPPED):
        for path in folder.glob(".*.tmp"):
            if path.name[1:].rsplit(".", 2)[0] in names:  # `.NAME.PROCESS.tmp`
                path.unlink(missing_ok=True)


def _made(make_step: Callable[[], Step], chunks: list[Chunk], output: Path, config: EngineConfig) -> Iterator[int]:
    """Makes the shards, and gives the size of each chunk when it is done."""
    if config.ray:
        from data_builders.on_ray import make_on_ray

        settings = {"address": config.ray, "workers": config.workers, "gpus_per_worker": config.gpus_per_worker}
        return make_on_ray(make_shard, make_step, chunks, output, **settings)
    if config.workers > 1:
        return _in_processes(make_step, chunks, output, config.workers)
    step = make_step()
    return (make_shard(step, chunk, output) for chunk in chunks)


def make_shard(step: Step, chunk: Chunk, output: Path) -> int:
    """Runs a step over a chunk and writes what came of it; gives the size of the chunk.

    Raises:
        InputError: As the step; or the disk is full.
    """
    with full_disk_explained(output / chunk.name, "Make room; the same command then goes on where this one stopped."):
        rows, dropped = step(chunk.rows())
        if dropped:
            write_rows(output / DROPPED / chunk.name, dropped)
        write_rows(output / chunk.name, rows)
    return chunk.size


_OWN: dict[str, Any] = {}  # of a worker process: how to make its step, and the step once it has been made


def _start_worker(make_step: Callable[[], Step]) -> None:
    _OWN["make_step"] = make_step


def _work(chunk: Chunk, output: Path) -> int:
    if "step" not in _OWN:
        _OWN["step"] = _OWN["make_step"]()
    return make_shard(_OWN["step"], chunk, output)


def _in_processes(make_step: Callable[[], Step], chunks: Sequence[Chunk], output: Path, workers: int) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads and CUDA's state
    with ProcessPoolExecutor(min(workers, len(chunks)), context, _start_worker, (make_step,)) as pool:
        futures = [pool.submit(_work, chunk, output) for chunk in chunks]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process died, most likely killed because memory ran out: take fewer `workers`. The same "
                "command goes on where this one stopped."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def count_by_source(output: Path, field: str) -> list[tuple[str, Counter[str]]]:
    """How often each value of a field occurs in the rows of a step, by source of question and in its order."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for path in shard_paths(output):
        for row in read_rows(path):
            counts[row.get("source", "")][row[field]] += 1
    return [(source or "(no source)", counts[source]) for source in sorted(counts)]


def drop_reasons(output: Path, shards: Iterable[str] | None = None) -> Counter[str]:
    """How many rows a step left out, by reason; a row with a `count` stands for so many.

    Args:
        output: The folder of the step.
        shards: Names of the shards that count; None: all.
    """
    reasons: Counter[str] = Counter()
    folder = output / DROPPED
    paths = sorted(folder.glob("*.jsonl")) if shards is None else [folder / name for name in shards]
    for path in paths:
        for row in read_rows(path) if path.exists() else ():
            reasons[row["reason"]] += row.get("count", 1)
    return reasons


def drop_note(output: Path) -> list[str]:
    """The same as a sentence for the summary; empty when nothing was left out."""
    reasons = drop_reasons(output)
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return [f"Left out: {counts}; listed in {output / DROPPED}."] if reasons else []
