"""Parquet with the images inside, as the Hub shows it and `datasets` decodes it: TRL's columns, one row of parts each.

The bytes of an image are those of its file. Reading gives each picture the name of its content, so that two rows with
the same picture share it; what it was called before stays beside it.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_builders.formats.protocol import (
    AS_READ,
    CARRIED,
    Context,
    Found,
    Kind,
    RefusedError,
    kind_of,
    placed,
)
from data_builders.formats.trl import Trl, as_messages, given_fields, in_parts
from data_builders.images import DECODING_ERRORS, image_path
from data_builders.records import InputError, Row

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = "images"  # the folder for images that a file holds
_MESSAGES = {
    "pairs": ("prompt", "chosen", "rejected"),
    "conversations": ("prompt", "completion"),
    "questions": (),
}
_STRINGS = {
    "pairs": ("id", "kind", "source", "question", "answer", CARRIED),
    "conversations": ("id", "source", CARRIED),
    "questions": ("id", "question", "answer", "source", CARRIED),
}
_ROWS_OF_A_GROUP = 100  # small groups: the Hub's viewer reads one to show a page
_BYTES_OF_A_GROUP = 2**26
_BYTES_OF_A_FILE = 2**29
_ROWS_AT_A_TIME = 32


class Parquet(Trl):
    """Pairs, conversations and questions with their images in them."""

    name: ClassVar[str] = "parquet"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"pairs", "conversations", "questions"})
    columns: ClassVar[frozenset[str]] = frozenset(
        {"images", "image", "prompt", "chosen", "rejected", "completion", "question", "answer"}
    )
    holds: ClassVar[frozenset[str]] = columns | {"id", "kind", "source"}

    def inputs(self, source: Path) -> list[Path]:
        """The Parquet files."""
        return _paths(source)

    def read(self, source: Path, image_root: Path) -> Iterator[Found]:
        """The rows of a Parquet file, or of all under a folder; a row's images come with it."""
        for path in _paths(source):
            from_us = CARRIED in _column_names(path)
            for index, fields in enumerate(_rows(path)):
                where = f"{path}, row {index + 1}"
                images = _structs(fields)
                pictures = {_content_name(image["bytes"]): image["bytes"] for image in images if image["bytes"]}
                names = [_content_name(image["bytes"]) if image["bytes"] else None for image in images]
                hints = {"names": [image["path"] for image in images]} if images and not from_us else {}
                rest = {name: value for name, value in fields.items() if name not in ("image", "images")}
                self._leave_out({name for name, value in rest.items() if not _is_json(value)}, rest, path)
                context = Context(image_root, {"id": f"{path.stem}/{index}"}, hints)
                yield Found(where, {"images": names, **rest}, context, pictures)

    def _leave_out(self, names: set[str], fields: Row, path: Path) -> None:
        """Takes columns out that JSON has no type for, such as times, and notes each of them once."""
        for name in sorted(names):
            del fields[name]
            note = f"The column {name!r} of {path} is left away: JSON has no type for what it holds."
            if note not in self.notes:
                self.notes.append(note)

    def to_row(self, fields: Row, context: Context) -> tuple[Row, Row]:
        """A pair, a conversation or a question.

        Raises:
            RefusedError: A response is missing or empty, an image is not in the file, or places do not match images.
        """
        if None in fields["images"]:
            raise RefusedError("an image whose bytes are not in the file")
        hints = {"names": context.hints["names"]} if "names" in context.hints else {}
        if not any(fields.get(name) is not None for name in ("chosen", "rejected", "completion")):
            row = {**placed(fields, {"images"}, context), "images": fields["images"]}
            return row, hints
        row, _ = super().to_row(fields, context)
        row |= {name: fields[name] for name in ("question", "answer") if name in fields}
        return row, hints

    def from_row(self, row: Row, context: Context) -> Row:
        """A row of the file, with the names of its images in place of their bytes."""
        kind = kind_of(row)
        texts = as_messages({name: row[name] for name in _MESSAGES[kind] if row.get(name) is not None})
        _check_messages(texts)
        strings = {name: row[name] for name in _STRINGS[kind] if isinstance(row.get(name), str) and name != CARRIED}
        return {"images": row.get("images", []), **in_parts(texts, len(row.get("images", []))), **strings}

    @contextmanager
    def writer(self, folder: Path, image_root: Path, shard_size: int) -> Iterator["_TableWriter"]:
        """Opens a folder with Parquet files under `data/`, as the Hub lays them out."""
        del shard_size
        writer = _TableWriter(folder / "data", image_root)
        try:
            yield writer
        except BaseException:
            writer.close(whole=False)
            raise
        writer.flush()
        writer.close(whole=True)


class _TableWriter:
    """Writes rows of one kind as Parquet files, each under its name when it is whole."""

    def __init__(self, folder: Path, image_root: Path) -> None:
        self.folder, self.image_root = folder, image_root
        self.kind: Kind | None = None
        self.rows: list[Row] = []
        self.size = self.file_size = self.number = 0
        self.file: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()

    def add(self, fields: Row, row: Row) -> None:
        kind = kind_of(row)
        self.kind = self.kind or kind
        if kind != self.kind:
            raise InputError(
                f"a Parquet file has one set of columns, and {row.get('id')!r} is one of {kind} after others of "
                f"{self.kind}. Convert them apart."
            )
        images = [(image_path(self.image_root, name).read_bytes(), name) for name in fields["images"]]
        images = [(data, name) for (data, _), name in zip(images, _former_names(row), strict=True)]
        self.rows.append({**fields, "images": [{"bytes": data, "path": name} for data, name in images]})
        self.size += sum(len(data) for data, _ in images)
        if len(self.rows) == _ROWS_OF_A_GROUP or self.size >= _BYTES_OF_A_GROUP:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are held as one group."""
        import pyarrow as pa
        from pyarrow import parquet

        if not self.rows:
            return
        schema = _schema(self.kind)
        if self.file is None:
            self.file = parquet.ParquetWriter(self._temporary(), schema)
        whole = [{name: _valid(row.get(name)) for name in schema.names} for row in self.rows]
        self.file.write_table(pa.Table.from_pylist(whole, schema=schema))
        self.file_size += self.size
        self.rows, self.size = [], 0
        if self.file_size >= _BYTES_OF_A_FILE:
            self.close(whole=True)

    def close(self, *, whole: bool) -> None:
        """Ends the file that is open, if one is, and gives it its name if it is whole."""
        if self.file is None:
            return
        self.file.close()
        if whole:
            self._temporary().replace(self._path())
        else:
            self._temporary().unlink()
        self.file, self.file_size, self.number = None, 0, self.number + 1

    def _path(self) -> Path:
        return self.folder / f"train-{self.number:05d}.parquet"

    def _temporary(self) -> Path:
        return self.folder / f".{self._path().name}.{os.getpid()}.tmp"


def picture_problem(data: bytes) -> str | None:
    """Why encoded bytes are no picture; None if they are one."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data)) as image:
            image.convert("RGB")
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        return str(error)
    return None


def _schema(kind: Kind) -> "pa.Schema":
    """The columns of a kind of rows, with what `datasets` needs to know that the images are images."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    messages = List({"role": text, "content": List({"type": text, "text": text})})
    columns = dict.fromkeys(_MESSAGES[kind], messages) | dict.fromkeys(_STRINGS[kind], text)
    return Features({"images": List(Image()), **columns}).arrow_schema


def _former_names(row: Row) -> list[str | None]:
    """What the images of a row were called in the file that they came from, or else what they are called now."""
    names, memory = row.get("images", []), row.get(AS_READ) or {}
    former = memory.get("names", []) if memory.get("format") == Parquet.name else []
    return former if len(former) == len(names) else names


def _valid(value: Any) -> Any:
    """The same without half surrogate pairs in its texts, which Arrow refuses: U+FFFD stands for them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_valid(item) for item in value]
    return {name: _valid(item) for name, item in value.items()} if isinstance(value, dict) else value


def _check_messages(texts: Row) -> None:
    for message in (message for messages in texts.values() for message in messages):
        content = message.get("content")
        parts = [] if isinstance(content, str) else content
        if message.keys() != {"role", "content"} or not isinstance(parts, list):
            raise RefusedError("a message that is more than a role and a content", message)
        if any(not isinstance(part, dict) or part.keys() - {"type", "text"} for part in parts):
            raise RefusedError("a message that is more than text and images", message)


def _paths(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    paths = sorted(path for path in source.rglob("*.parquet") if not path.name.startswith("."))
    if not paths:
        raise InputError(f"{source} is no Parquet file, nor a folder with one.")
    return paths


def _column_names(path: Path) -> list[str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a whole Parquet file ({error!s:.200}).") from error


def _rows(path: Path) -> Iterator[Row]:
    """The rows of a file without the nulls that Arrow fills them up with."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_AT_A_TIME):
            for row in batch.to_pylist():
                yield {name: _without_nulls(value) for name, value in row.items() if value is not None}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _without_nulls(value: Any) -> Any:
    is_messages = isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]
    return [given_fields(message) for message in value] if is_messages else value


def _structs(fields: Row) -> list[Row]:
    """The images of a row as `datasets` stores them: bytes, and a name or null."""
    value = fields["image"] if fields.get("images") is None and "image" in fields else fields.get("images", [])
    structs = []
    for image in value if isinstance(value, list) else [value]:
        if isinstance(image, dict):
            structs.append({"bytes": image.get("bytes"), "path": image.get("path")})
        else:
            structs.append({"bytes": image if isinstance(image, bytes) else None, "path": None})
    return structs


def _content_name(data: bytes) -> str:
    """A name for an image that its content alone decides."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data)) as image:
            ending = {"JPEG": "jpg"}.get(image.format or "", (image.format or "bin").lower())
    except (*DECODING_ERRORS, Image.DecompressionBombError):
        ending = "bin"
    return f"{PICTURES}/{hashlib.sha256(data).hexdigest()[:32]}.{ending}"
