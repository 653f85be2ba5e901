"""The plan of a mixture: line by line, from which source and row each line of a shard comes; and the copying of rows.

It is written once, beside the shards, and says the same whoever writes the shards and when. A line is
`{"source", "row", "file", "line", "byte"}`: the row and the file of the source count from 0, and the line and the byte
are where in that file the row starts. Of the sources only these places are in memory, 16 bytes for each row.
"""

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_builders.engine import Chunk, Span, shard_name
from data_builders.mixtures.counts import mixture_counts
from data_builders.mixtures.order import mixture_order
from data_builders.mixtures.spec import Mixture, Source, cell_members
from data_builders.records import InputError, Row
from data_builders.shards import Place, full_disk_explained, read_placed_rows, shard_paths, write_rows, write_text

PLAN = "plan"  # folder in the output; for each shard it has one of the same name

_COUNTS = "counts.json"  # in the plan, and the last of it to be written: rows that each source has and gives


def mixed_sources(mixture: Mixture) -> list[str]:
    """The sources that have a share."""
    return sorted(name for names in cell_members(mixture).values() for name in names)


def source_files(mixture: Mixture) -> dict[str, list[Path]]:
    """Every file of each source that has a share.

    Raises:
        InputError: There is nothing to read.
    """
    files = {}
    for name in mixed_sources(mixture):
        try:
            paths = mixture.sources[name].paths
            files[name] = [shard.absolute() for path in paths for shard in shard_paths(Path(path))]
        except InputError as error:
            raise InputError(
                f"source {name!r}: {error} Other formats become shards with `mpo convert`; of a Hub data set rows can "
                "be drawn with `streaming`."
            ) from error
    return files


@dataclass(frozen=True)
class Places:
    """Where the rows of a source lie.

    Attributes:
        first: The number of the first row of each file.
        lines: Line of each row in its file, from 1 on.
        bytes: Byte at which that line starts.
    """

    first: list[int] = field(default_factory=list)
    lines: "array[int]" = field(default_factory=lambda: array("Q"))
    bytes: "array[int]" = field(default_factory=lambda: array("Q"))

    def of(self, row: int) -> Row:
        """The place of a row as the plan notes it; files count from 0."""
        return {"file": bisect_right(self.first, row) - 1, "line": self.lines[row], "byte": self.bytes[row]}


def find_rows(files: Mapping[str, list[Path]]) -> dict[str, Places]:
    """Looks through the sources.

    Raises:
        InputError: A line is no JSON object.
    """
    found = {name: Places() for name in files}
    with tqdm(desc="looking through sources", unit="row") as bar:
        for name, places in found.items():
            for path in files[name]:
                places.first.append(len(places.lines))
                for place, _ in read_placed_rows(path):
                    places.lines.append(place.line)
                    places.bytes.append(place.byte)
                bar.update(len(places.lines) - places.first[-1])
    return found


@dataclass(frozen=True)
class Plan:
    """What a plan is written from.

    Attributes:
        places: Where the rows of each source lie, for those that have a share.
        counts: Rows that each source gives.
        seed: Of the choice and the order.
    """

    places: Mapping[str, Places]
    counts: Mapping[str, int]
    seed: int

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each source; 0 for those that are not read."""
        return {name: len(self.places[name].lines) if name in self.places else 0 for name in self.counts}

    def write(self, output: Path, shard_size: int) -> None:
        """Writes the plan of all shards.

        Raises:
            InputError: The disk is full.
        """
        with full_disk_explained(output / PLAN, "Make room and give the same command again."):
            self._write(output / PLAN, shard_size)

    def _write(self, folder: Path, shard_size: int) -> None:
        order, start = mixture_order(self.counts, self.sizes, seed=self.seed), 0
        for chunk in planned_chunks(folder, sum(self.counts.values()), shard_size):
            rows = order.between(start, start + chunk.size)
            places = ({"source": name, "row": row, **self.places[name].of(row)} for name, row in rows)
            write_rows(folder / chunk.name, places)
            start += chunk.size
        counts = {name: {"has": self.sizes[name], "gives": count} for name, count in self.counts.items()}
        write_text(folder / _COUNTS, json.dumps(counts, ensure_ascii=False, indent=1) + "\n")
        for leftover in folder.glob(".*.tmp"):  # of a run that was killed here
            leftover.unlink(missing_ok=True)


def make_plan(mixture: Mixture, *, seed: int) -> Plan:
    """Looks through the sources and works out what each of them gives.

    Raises:
        InputError: A source is missing, broken or too small.
    """
    places = find_rows(source_files(mixture))
    sizes = dict.fromkeys(mixture.sources, 0) | {name: len(found.lines) for name, found in places.items()}
    return Plan(places, mixture_counts(mixture, sizes), seed)


def planned_counts(output: Path) -> dict[str, Row] | None:
    """How many rows each source `has` and `gives`, by a plan that is there; None where none is whole."""
    path = output / PLAN / _COUNTS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def planned_chunks(folder: Path, total: int, shard_size: int) -> Iterator[Chunk]:
    """The lines of a plan that make one shard each.

    Args:
        folder: That of the plan.
        total: Rows of the mixture.
        shard_size: Rows of a shard.
    """
    num = -(-total // shard_size)
    for number in range(num):
        path = folder.absolute() / shard_name(number, num)
        yield Chunk(path.name, (Span(path, Place(), min(shard_size, total - number * shard_size)),))


class Copying:
    """The step: lines of the plan to the rows that they stand for."""

    def __init__(self, files: Mapping[str, list[Path]], sources: Mapping[str, Source]) -> None:
        self.files, self.sources = files, sources

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """The rows in the order of the plan, read in the order of the disk."""
        copied: list[Row] = [{}] * len(rows)
        for number in sorted(range(len(rows)), key=lambda n: (rows[n]["source"], rows[n]["file"], rows[n]["byte"])):
            copied[number] = self._copy(rows[number])
        return copied, []

    def _copy(self, planned: Row) -> Row:
        path, place = self.files[planned["source"]][planned["file"]], Place(planned["line"], planned["byte"])
        _, row = next(read_placed_rows(path, start=place))
        return in_mixture(row, self.sources[planned["source"]], f"{path}, line {place.line}")


def in_mixture(row: Row, source: Source, where: str) -> Row:
    """A row of a source as the mixture has it: its columns, its images under the common root.

    Args:
        row: As it stands in the source.
        source: Says what is changed.
        where: File and line, for the message.

    Raises:
        InputError: A column is missing.
    """
    if source.columns is not None:
        if missing := [name for name in source.columns if name not in row]:
            raise InputError(f"{where}: there is no column {missing[0]!r} of `columns`, but {', '.join(row)}.")
        row = {name: row[name] for name in source.columns}
    if not source.image_folder:
        return row
    return {name: source.under_root(value) if name in {"image", "images"} else value for name, value in row.items()}
