"""Our own rows: JSON lines of any kind, in a folder of shards."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from data_builders.formats.files import json_paths, placed_fields
from data_builders.formats.names import check_names
from data_builders.formats.protocol import Context, Found, Kind
from data_builders.records import Row
from data_builders.shards import remove_leftovers, write_rows


class OurRows:
    """The rows of the pipeline, as they are."""

    name: ClassVar[str] = "jsonl"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"pairs", "conversations", "questions", "responses"})
    columns: ClassVar[frozenset[str]] = frozenset()
    holds: ClassVar[frozenset[str]] = frozenset()
    made_up: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self.notes: list[str] = []

    def inputs(self, source: Path) -> list[Path]:
        """The file or folder."""
        return [source]

    def read(self, source: Path, image_root: Path) -> Iterator[Found]:
        """The rows of a JSONL file, a JSON array, or a folder of them."""
        for path in json_paths(source):
            for line, fields in placed_fields(path):
                yield Found(f"{path}, line {line}", fields, Context(image_root))

    def to_row(self, fields: Row, context: Context) -> tuple[Row, Row]:
        """The row itself.

        Raises:
            RefusedError: An image of it lies outside the root.
        """
        check_names(fields, context.image_root)
        return fields, {}

    def from_row(self, row: Row, context: Context) -> Row:
        """The row itself."""
        del context
        return row

    @contextmanager
    def writer(self, folder: Path, image_root: Path, shard_size: int) -> Iterator["_ShardWriter"]:
        """Opens a folder of shards; those that are there already are not written again."""
        del image_root
        writer = _ShardWriter(folder, shard_size)
        yield writer
        writer.finish()


class _ShardWriter:
    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder, self.shard_size = folder, shard_size
        self.rows: list[Row] = []
        self.number = 0

    def add(self, fields: Row, row: Row) -> None:
        del fields
        self.rows.append(row)
        if len(self.rows) == self.shard_size:
            self.finish()

    def finish(self) -> None:
        """Writes what there is as one shard."""
        path = self.folder / f"{self.number:05d}.jsonl"
        remove_leftovers(path)
        if self.rows and not path.exists():
            write_rows(path, self.rows)
        self.number += 1
        self.rows = []
