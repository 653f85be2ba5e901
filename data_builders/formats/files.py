"""JSON files of other formats: their rows one by one, and files that appear when they are whole."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from data_builders.formats.arrays import read_array
from data_builders.formats.protocol import Context, Found
from data_builders.records import InputError, Row
from data_builders.shards import read_placed_rows, remove_leftovers

DATA = "data.jsonl"  # a name that no reader takes for that of a split
_ABOUT = {"settings.json", "check.json", "dataset_info.json", "meta.json"}  # lie beside rows and hold none
_ENDINGS = (".jsonl", ".ndjson", ".json")
_HELD = 2**18  # characters kept in memory of each file that is being written


def json_paths(source: Path) -> list[Path]:
    """The file itself, or the JSON files of a folder in order of name.

    Raises:
        InputError: There is none.
    """
    if source.is_file():
        return [source]
    if not source.exists():
        raise InputError(f"{source} does not exist; expected a JSON or JSONL file, or a folder of them.")
    paths = sorted(path for path in source.iterdir() if path.suffix in _ENDINGS and path.is_file())
    paths = [path for path in paths if path.name not in _ABOUT and not path.name.startswith(".")]
    if not paths:
        raise InputError(f"{source} holds no JSON or JSONL file. Is it the right folder?")
    return paths


def placed_fields(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a JSON array or of JSON lines, each with its line.

    Raises:
        InputError: The file is missing, or broken (says in which line).
    """
    if first_mark(path) == "[":
        return read_array(path)
    return ((place.line, row) for place, row in read_placed_rows(path))


def first_mark(path: Path) -> str:
    """The first character of a file that is no blank; empty if there is none in its first thousand.

    Raises:
        InputError: The file is missing.
    """
    try:
        with path.open("rb") as file:
            return file.read(1000).decode("utf-8-sig", errors="replace").lstrip()[:1]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error


def json_line(value: object) -> str:
    """JSON on one line, as a person can read it; half a surrogate pair, which UTF-8 cannot hold, stays an escape."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


class WholeFile:
    """A text file that appears under its name when it is whole; no handle is kept open, so there may be thousands.

    Args:
        path: Where; what an earlier run left half written there is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_rows = path, 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._held: list[str] = []
        self._size = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def add(self, fields: Row) -> None:
        """Writes a row as one line."""
        self.write(json_line(fields) + "\n")

    def write(self, text: str) -> None:
        """Writes a part of the file that counts as one row."""
        self.num_rows += 1
        self._held.append(text)
        self._size += len(text)
        if self._size > _HELD:
            self._flush()

    def finish(self, end: str = "") -> None:
        """Writes the end and gives the file its name."""
        self._held.append(end)
        self._flush()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary.replace(self.path)

    def discard(self) -> None:
        """Removes what has been written."""
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        with self._temporary.open("ab") as file:
            file.write("".join(self._held).encode())
        self._held, self._size = [], 0


class NumberedFiles:
    """JSON files whose rows have no names of their own: how such formats are read and written."""

    made_up: ClassVar[frozenset[str]] = frozenset({"id"})

    def __init__(self) -> None:
        self.notes: list[str] = []

    def inputs(self, source: Path) -> list[Path]:
        """The file or folder."""
        return [source]

    def read(self, source: Path, image_root: Path) -> Iterator[Found]:
        """The rows of a file, or of the files of a folder."""
        for path in json_paths(source):
            yield from numbered(path, image_root)

    @contextmanager
    def writer(self, folder: Path, image_root: Path, shard_size: int) -> Iterator["LinesWriter"]:
        """Opens a folder with one file of JSON lines."""
        del image_root, shard_size
        with WholeFile(folder / DATA) as file:
            yield LinesWriter(file)


class LinesWriter:
    """Writes each row as one line of a file.

    Args:
        file: The file.
    """

    def __init__(self, file: WholeFile) -> None:
        self.file = file

    def add(self, fields: Row, row: Row) -> None:
        """Writes a row as the format has it."""
        del row
        self.file.add(fields)


def numbered(path: Path, image_root: Path) -> Iterator[Found]:
    """The rows of a file, each with an `id` made of the file's name and the row's number, from 0 on."""
    for index, (line, fields) in enumerate(placed_fields(path)):
        yield Found(f"{path}, line {line}", fields, Context(image_root, {"id": f"{path.stem}/{index}"}))
