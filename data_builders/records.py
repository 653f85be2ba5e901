"""The rows that pass between steps, as they stand on disk: one JSON object per line.

    Question -> Response -> Verdict -> Pair        Conversation (what SFT learns from)

Each row keeps every key of the row it came from, so a pair can be traced back to the question, the sampler and the
rule that made it. Models are for checking and for reading about the fields; between steps a row is a plain dict.
Images are paths relative to an image root, never absolute, never outside it (`data_builders.images`).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Row = dict[str, Any]


class InputError(ValueError):
    """Something the user gave is wrong: the command line answers with this message alone and exit code 2."""


class Record(BaseModel):
    """What all rows share: unknown keys are kept, so a user's own columns survive every step."""

    model_config = ConfigDict(extra="allow")


class Question(Record):
    """One question about zero or more images."""

    id: str = Field(min_length=1)
    images: list[str] = []
    question: str = Field(min_length=1)
    answer: str | None = None
    source: str = ""


class Response(Question):
    """One sampled response to a question; `error` says why there is none."""

    response: str | None = None
    finish_reason: Literal["stop", "length", "error"] = "stop"
    prompt: str
    sampler: dict[str, Any]
    error: str | None = None


class Verdict(Response):
    """A response that was compared with the answer."""

    verdict: Literal["correct", "wrong", "no_answer"]
    prediction: str | None = None
    rule: str


class Message(Record):
    """What one side of a conversation says; typed parts hold texts and places for pictures."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]]


class Conversation(Record):
    """One conversation to learn from, in one of TRL's shapes: `prompt` and `completion`, or `messages` alone.

    `category` is what it is about (`Chart`, `Math`, ...), `rewritten` whether a model wrote it anew.
    """

    id: str = Field(min_length=1)
    images: list[str] = []
    prompt: list[Message] | None = None
    completion: list[Message] | None = None
    messages: list[Message] | None = None
    source: str = ""
    category: str = ""
    rewritten: bool | None = None

    @model_validator(mode="after")
    def _has_one_shape(self) -> "Conversation":
        if not self.messages and not (self.prompt and self.completion):
            raise ValueError("a conversation has `prompt` and `completion`, or `messages`: lists of messages")
        return self


class Pair(Record):
    """Two responses to one prompt, the better one first."""

    id: str = Field(min_length=1)
    images: list[str] = []
    prompt: str
    chosen: str = Field(min_length=1)
    rejected: str = Field(min_length=1)
    kind: Literal["correctness", "format", "dropout_ntp"]
    source: str = ""
    answer: str | None = None
    chosen_meta: dict[str, Any] = {}
    rejected_meta: dict[str, Any] = {}


@dataclass
class Summary:
    """What a verb has to say when it is done: a table for the terminal and the command that comes next."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    next_command: str | None = None
    also: list["Summary"] = field(default_factory=list)  # more tables, below this one
    text: str | None = None  # printed in place of all tables
    exit_code: int = 0  # of the command line; not 0 when what was looked for is not as it should be


def check_row(row: object, model: type[Record], where: str) -> Row:
    """The row itself, when it has the fields of `model`.

    Args:
        row: What a line of a file held.
        model: One of the rows of this module.
        where: File and line, for the message.

    Raises:
        InputError: A field is missing or of the wrong type.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object with the fields of a {model.__name__}, got {row!r:.80}.")
    try:
        return {**model.model_validate(row).model_dump(exclude_unset=True)}
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{where}: {f'`{name}` ' if name else ''}{_reason(first)}. A {model.__name__.lower()} row has the fields "
            f"{', '.join(model.model_fields)}; see the README for the file formats."
        ) from error


def _reason(error: Any) -> str:
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "value_error":
        return f"{error['ctx']['error']}"
    return f"is {error['input']!r:.80}: {error['msg'][:1].lower()}{error['msg'][1:]}"
