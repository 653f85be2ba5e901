"""What a format is: how its rows are found, what they mean in our terms, and how they are written.

A row of a format is a dict too; here it is called `fields`, and a row is always one of ours:

* pairs, as `mpo pair` writes them, or with lists of messages in place of strings (TRL's conversational format);
* conversations: `images`, `prompt` and `completion`, as `mpo sft` reads them;
* questions, as `mpo sample` reads them, and responses to them, as it writes them.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol, get_args

from data_builders.records import Pair, Row

Kind = Literal["pairs", "conversations", "questions", "responses"]
PAIR_KINDS: tuple[str, ...] = get_args(Pair.model_fields["kind"].annotation)
AS_READ = "as_read"  # of our rows: what the format they came from said in another way than we would
CARRIED = "mpo"  # of foreign rows: what the format has no place for, as JSON in one string that any reader can skip
_OF_PAIRS = [
    "id",
    "question_id",
    "images",
    "question",
    "prompt",
    "chosen",
    "rejected",
    "kind",
    "source",
    "answer",
    "chosen_meta",
    "rejected_meta",
]
_OF_OTHERS = [
    "id",
    "images",
    "question",
    "answer",
    "source",
    "prompt",
    "completion",
    "response",
    "finish_reason",
    "sampler",
]


class RefusedError(ValueError):
    """A row that has no counterpart: it is left out and listed.

    Args:
        reason: The same words for all rows of the kind, to be counted by.
        detail: What it is in this row.
    """

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, f"{detail!s:.200}"


@dataclass(frozen=True)
class Context:
    """What is known of a row but does not stand in it.

    Attributes:
        image_root: The folder that our image names are relative to.
        defaults: `id`, `source` and `kind`, as the file's name and the row's place in it give them.
        hints: How the format said something that we say in one way only; each format has its own.
    """

    image_root: Path
    defaults: Row = field(default_factory=dict)
    hints: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """One row of a file.

    Attributes:
        where: File and line, for messages.
        fields: The row as it stands there.
        context: What else is known of it.
        pictures: Images that the file itself holds: the name that the row has them by, and their encoded bytes.
    """

    where: str
    fields: Row
    context: Context
    pictures: dict[str, bytes] = field(default_factory=dict)


class Writer(Protocol):
    """Takes rows one by one; what it writes appears whole when its context ends."""

    def add(self, fields: Row, row: Row) -> None:
        """Takes a row as the format has it, and as we have it."""


class Format(Protocol):
    """One format; an instance reads or writes one data set.

    Attributes:
        name: What it is called on the command line.
        kinds: The kinds of rows that it can hold.
        columns: The fields that it defines.
        holds: Which fields of ours these stand for.
        made_up: Fields of ours that reading makes up from a file's name and a row's place where a row has none.
        notes: What was noticed while reading or writing, for the summary.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]]
    columns: ClassVar[frozenset[str]]
    holds: ClassVar[frozenset[str]]
    made_up: ClassVar[frozenset[str]]
    notes: list[str]

    def inputs(self, source: Path) -> list[Path]:
        """The files that a data set consists of."""

    def read(self, source: Path, image_root: Path) -> Iterator[Found]:
        """The rows of a data set, read as they are asked for."""

    def to_row(self, fields: Row, context: Context) -> tuple[Row, Row]:
        """What a row of the format means, and the hints that `from_row` needs to say it in the same way again."""

    def from_row(self, row: Row, context: Context) -> Row:
        """Our row as the format says it."""

    def writer(self, folder: Path, image_root: Path, shard_size: int) -> AbstractContextManager[Writer]:
        """Opens the files of a data set in a folder."""


def kind_of(row: Row) -> Kind:
    """What kind of row of ours this is.

    Raises:
        RefusedError: It is none.

    >>> kind_of({"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "kind": "correctness"})
    'pairs'
    """
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return "pairs"
    if row.get("completion") is not None:
        return "conversations"
    if row.get("question") is None:
        raise RefusedError("neither a pair, a conversation, a question nor a response", ", ".join(row))
    return "responses" if "response" in row else "questions"


def in_order(row: Row) -> Row:
    """The same row with its known fields first, in the order in which the steps of the pipeline write them."""
    known = _OF_PAIRS if "chosen" in row else _OF_OTHERS
    return {**{name: row[name] for name in known if name in row}, **row}


def cannot_hold(kind: "Format | type[Format]", row: Row) -> list[str]:
    """The fields of one of our rows that a format has no field of its own for; empty ones do not count."""
    return [name for name, value in row.items() if name not in kind.holds and value not in (None, "", [], {})]


def further(fields: Row, known: Iterable[str], *, nested: bool = True) -> Row:
    """What a row has besides the known fields.

    Args:
        fields: A row of any kind.
        known: The fields that are left out.
        nested: Take values of any type; otherwise texts and nulls, which is all that readers built on Arrow can be
            trusted with in a column of mixed rows.
    """
    known = {*known, AS_READ, CARRIED}
    rest = {name: value for name, value in fields.items() if name not in known}
    return rest if nested else {name: value for name, value in rest.items() if value is None or isinstance(value, str)}


def placed(fields: Row, known: Iterable[str], context: Context) -> Row:
    """What our row takes over as it is: the fields besides the known ones, and those that only its place gives."""
    row = {**context.defaults, **further(fields, known)}
    for name in ("id", "source"):
        if isinstance(row.get(name), int):
            row[name] = str(row[name])
        elif name in row and not (isinstance(row[name], str) and row[name]):
            row[name] = context.defaults.get(name) or str(row[name])
    return row
