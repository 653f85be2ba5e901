"""InternVL's `meta.json`: sets of annotations, each with its own image folder and weight.

    {name: {"root": folder or null, "annotation": file, "data_augment": false, "repeat_time": 1, "length": rows}}

Paths in it are relative to the working directory, as InternVL has them, or else to the folder of the file. A weight
(`repeat_time`) below 1 keeps a part of the rows, evenly spread; above 1 it repeats them, 2.5 by turns twice and three
times. It is what the rows say afterwards, so a set that is written has the weight 1.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

from data_builders.formats.arrays import read_json
from data_builders.formats.files import WholeFile, first_mark, json_paths, placed_fields
from data_builders.formats.names import base_in_root
from data_builders.formats.protocol import Context, Found
from data_builders.records import InputError, Row
from data_builders.shards import write_text

META = "meta.json"
_KNOWN = {"root", "annotation", "repeat_time", "length"}


@dataclass(frozen=True)
class AnnotatedSet:
    """One entry of a `meta.json`, or a file of annotations that stands alone.

    Attributes:
        name: Of the set.
        annotation: JSON lines or one array.
        base: Its image folder relative to the image root.
        weight: How often a row counts.
        length: How many rows there are said to be; None if nothing is said.
        further: The names of its other fields, which rows cannot hold.
    """

    name: str
    annotation: Path
    base: str = ""
    weight: Fraction = Fraction(1)
    length: int | None = None
    further: tuple[str, ...] = ()


def annotated_sets(source: Path, image_root: Path) -> list[AnnotatedSet]:
    """The sets of a `meta.json`, of a folder with one, or of a file or folder of annotations.

    Raises:
        InputError: There is nothing of the kind, or an entry is broken.
    """
    meta = source / META if (source / META).is_file() else source
    if meta.is_file() and meta.suffix == ".json" and first_mark(meta) == "{":
        return [_entry(name, value, meta, image_root) for name, value in read_json(meta).items()]
    return [AnnotatedSet(path.stem, path) for path in json_paths(source)]


def set_inputs(source: Path) -> list[Path]:
    """The files that the rows come from."""
    sets = annotated_sets(source, Path())
    return [source, *(one.annotation for one in sets if one.annotation != source)]


def read_sets(source: Path, image_root: Path, notes: list[str]) -> Iterator[Found]:
    """The rows of all sets, as often as their weights say.

    Args:
        source: As for `annotated_sets`.
        image_root: The folder that our image names are relative to.
        notes: Gets a line about everything that was read and is not in the rows.
    """
    sets = annotated_sets(source, image_root)
    if further := sorted({name for one in sets for name in one.further}):
        notes.append(f"Rows cannot hold what the sets of {source} say besides: {', '.join(further)}.")
    for one in sets:
        hints = {"root": one.base} if one.base else {}
        index = -1
        for index, (line, fields) in enumerate(placed_fields(one.annotation)):
            for copy in range(copies(index, one.weight)):
                name = f"{one.name}/{index}" + (f"~{copy}" if copy else "")
                context = Context(image_root, {"id": name, "source": one.name}, hints)
                yield Found(f"{one.annotation}, line {line}", fields, context)
        if one.length not in (None, index + 1):
            notes.append(f"{one.name}: `length` says {one.length:,} rows, and {one.annotation} has {index + 1:,}.")


def copies(index: int, weight: Fraction) -> int:
    """How often the row with this number, from 0 on, counts.

    >>> [copies(index, Fraction("2.5")) for index in range(4)], [copies(index, Fraction("0.3")) for index in range(10)]
    ([2, 3, 2, 3], [0, 0, 0, 1, 0, 0, 1, 0, 0, 1])
    """
    return int((index + 1) * weight) - int(index * weight)


class SetWriter:
    """Writes one annotation file for each set.

    Args:
        folder: Where.
        image_root: The folder that our image names are relative to.
    """

    def __init__(self, folder: Path, image_root: Path) -> None:
        self.folder, self.image_root = folder, image_root
        self._files: dict[tuple[str, str], WholeFile] = {}
        self._taken: set[str] = set()

    def add_to(self, name: str, base: str, fields: Row) -> None:
        """Takes a row of the set with this name and this image folder under the root."""
        if (name, base) not in self._files:
            self._files[name, base] = WholeFile(self.folder / f"{self._free(name)}.jsonl")
        self._files[name, base].add(fields)

    def finish(self, *, meta: bool) -> None:
        """Gives all files their names, and adds a `meta.json` if it is wanted."""
        entries = {}
        for (name, base), file in self._files.items():
            file.finish()
            title = name if name not in entries else file.path.stem
            root = self.image_root / base
            entries[title] = {"root": str(root), "annotation": str(file.path), "data_augment": False}
            entries[title] |= {"repeat_time": 1, "length": file.num_rows}
        if meta:
            write_text(self.folder / META, json.dumps(entries, ensure_ascii=False, indent=2) + "\n")

    def discard(self) -> None:
        """Removes what has been written."""
        for file in self._files.values():
            file.discard()

    def _free(self, name: str) -> str:
        """A file's name for a set, unlike all others, also where capitals do not count."""
        stem = re.sub(r"[^\w.+-]+", "_", name).strip(".")[:100] or "data"
        number, free = 1, stem
        while free.casefold() in self._taken or free == "settings":
            number += 1
            free = f"{stem}-{number}"
        self._taken.add(free.casefold())
        return free


class OfSets:
    """What rows that refer to images by `image` and lie in sets have in common."""

    name: ClassVar[str]
    made_up: ClassVar[frozenset[str]] = frozenset({"id", "source"})

    def __init__(self) -> None:
        self.notes: list[str] = []

    def inputs(self, source: Path) -> list[Path]:
        """The meta file, if there is one, and the annotations."""
        return set_inputs(source)

    def read(self, source: Path, image_root: Path) -> Iterator[Found]:
        """The rows of all sets."""
        return read_sets(source, image_root, self.notes)


@contextmanager
def set_writer(folder: Path, image_root: Path, *, meta: bool) -> Iterator[SetWriter]:
    """Opens the annotation files of a data set, which are finished when the context ends."""
    for leftover in folder.glob(".*.jsonl.*.tmp"):
        leftover.unlink(missing_ok=True)
    writer = SetWriter(folder, image_root)
    try:
        yield writer
    except BaseException:
        writer.discard()
        raise
    writer.finish(meta=meta)


def _entry(name: str, value: object, meta: Path, image_root: Path) -> AnnotatedSet:
    if not isinstance(value, dict) or not isinstance(value.get("annotation"), str):
        raise InputError(
            f"{meta}: the set {name!r} must be an object with an `annotation`, a file of rows, got {value!r:.80}."
        )
    root, weight, length = value.get("root"), value.get("repeat_time", 1), value.get("length")
    if root is not None and not isinstance(root, str):
        raise InputError(f"{meta}: `root` of {name!r} must be a folder or null, got {root!r:.80}.")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
        raise InputError(
            f"{meta}: `repeat_time` of {name!r} must be a number: 0.3 keeps three rows of ten, 2 takes each twice; "
            f"got {weight!r:.80}."
        )
    annotation = _found(Path(value["annotation"]), meta.parent)
    if not annotation.is_file():
        raise InputError(
            f"{meta}: the annotation {annotation} of {name!r} does not exist, neither from the working directory nor "
            "from the folder of the meta file. Start from the folder that its paths are relative to."
        )
    base = base_in_root(_found(Path(root), meta.parent), image_root) if root else ""
    further = tuple(key for key in value if key not in _KNOWN)
    stated = length if isinstance(length, int) else None
    return AnnotatedSet(name, annotation, base, Fraction(str(weight)), stated, further)


def _found(path: Path, folder: Path) -> Path:
    """The path from the working directory, or from the folder if it exists there alone."""
    return folder / path if not path.exists() and (folder / path).exists() else path
