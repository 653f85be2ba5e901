"""The data sets of a rewriting: what each is about, what becomes of it, and its rows cut into chunks.

    A   kept as it is        B   rewritten        C   dropped        none yet   to be decided, on its sheet

The group belongs to a data set as a whole; its category picks the prompt and the grammar.
Source: Guo et al. 2024, "MAmmoTH-VL", https://arxiv.org/abs/2412.05237: ten categories, 153 data sets.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_builders.engine import Chunk, Span, chunks_of_rows, shard_name
from data_builders.records import Conversation, InputError, Row
from data_builders.rewriting.grammars import Grammar
from data_builders.sources import DataSet, read_spec

Category = Literal[
    "General", "OCR", "Chart", "Caption", "Domain-specific", "Code&Math", "Language", "Detection", "Multi-Image",
    "Video",
]  # fmt: skip
GROUPS = {"A": "keep", "B": "rewrite", "C": "drop"}

GRAMMARS: dict[str, Grammar] = {
    "General": "general",
    "OCR": "ocr",
    "Chart": "chart",
    "Caption": "caption",
    "Domain-specific": "general",
    "Code&Math": "math",
    "Language": "general",
    "Detection": "general",
    "Multi-Image": "general",
    "Video": "general",
}

_NAME = re.compile(r"\w[\w.+-]{0,99}")  # it names files


class RewriteSource(DataSet):
    """A data set that is kept, rewritten or dropped.

    Attributes:
        category: What it is about.
        group: What becomes of it; None while nobody has looked at its sheet.
        grammar: What a rewritten row is read by; None takes the category's.
        prompt: A `.jinja` file of the user's own; None takes the grammar's prompt.
    """

    category: Category
    group: Literal["A", "B", "C"] | None = None
    grammar: Grammar | None = None
    prompt: str | None = None

    @property
    def reads(self) -> Grammar:
        """The grammar of its rewritten rows."""
        return self.grammar or GRAMMARS[self.category]


def read_sources(values: Mapping[str, Any]) -> dict[str, RewriteSource]:
    """The sources that the settings describe, by name.

    Raises:
        InputError: There is none; or one has a bad name, no path, or a field that is unknown or of the wrong kind.
    """
    if not values:
        raise InputError("`sources` is empty: name the data sets that are to be kept, rewritten or dropped.")
    sources = {}
    for name, fields in values.items():
        if not _NAME.fullmatch(str(name)):
            raise InputError(
                f"the source {name!r:.120} needs another name: letters, digits, `_`, `-`, `+` and `.`, at most 100 "
                "and a letter or digit first, as files are named after it."
            )
        if not isinstance(fields, Mapping):
            raise InputError(f"source {name!r} is {fields!r:.80}: give it `{{path, category, group}}`.")
        sources[str(name)] = read_spec(RewriteSource, fields, f"source {name!r}", "a source")
        if not sources[str(name)].paths:
            raise InputError(f"source {name!r} has no `path`: name a JSONL file or a folder of shards.")
    return sources


@dataclass(frozen=True)
class SourceSpan(Span):
    """Consecutive rows of one file of a source."""

    source: str

    def rows(self) -> list[Row]:
        """Each row under `row`, with the name of its source beside it."""
        return [{"source": self.source, "row": row} for row in super().rows()]


def chunks_of_source(name: str, source: RewriteSource, size: int) -> list[Chunk]:
    """The rows of a source as chunks, which are named after it.

    Raises:
        InputError: There is no row, or one is broken; or the size is not positive.
    """
    try:
        parts = [chunk.spans for path in source.paths for chunk in chunks_of_rows(Path(path), Conversation, size)]
    except InputError as error:
        raise InputError(f"source {name!r}: {error} Other formats become rows with `mpo convert`.") from error
    return [
        Chunk(
            f"{name}-{shard_name(number, len(parts))}",
            tuple(SourceSpan(span.path, span.start, span.size, name) for span in spans),
        )
        for number, spans in enumerate(parts)
    ]
