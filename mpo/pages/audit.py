"""How far the verdicts can be trusted: what the report shows of the `audit.json` beside their shards."""

from collections import defaultdict
from typing import Any

from pydantic import Field

from data_builders.records import Record, Row
from data_builders.shown import shorten
from mpo.pages.texts import as_text

MAX_LINES = 200  # of the table and of the list of disagreements; what is rarer stands in audit.json
MAX_SOURCES = 50  # whose random samples are shown


class Count(Record):
    """How often each verdict was given for one source by one rule."""

    source: str
    rule: str
    correct: int = Field(ge=0)
    wrong: int = Field(ge=0)
    no_answer: int = Field(ge=0)


class Judged(Record):
    """One judged response."""

    id: str
    index: int = 0
    source: str = ""
    images: list[str] = []
    question: str
    answers: list[str] = []
    response: str
    prediction: str | None = None
    verdict: str
    rule: str
    judge: dict[str, Any] = {}


class Disputed(Judged):
    """One that another rule judges otherwise."""

    other_verdict: str
    other_prediction: str | None = None


class Disagreement(Record):
    """How often the rule that decided and another one come to different verdicts."""

    source: str
    rule: str
    other: str
    compared: int = Field(ge=1)
    differ: int = Field(ge=0)
    examples: list[Disputed] = []


class Audit(Record):
    """What the report reads of `audit.json`."""

    verdicts: list[Count]
    disagreements: list[Disagreement] = []
    sample: list[Judged] = []


def audit_section(audit: Row) -> Row:
    """What the template shows of a checked `audit.json`; the largest numbers of disputed responses come first."""
    disagreements = audit.get("disagreements", [])
    disputed = [entry for entry in disagreements if entry["differ"]]
    disputed.sort(key=lambda entry: (-entry["differ"], entry["source"], entry["rule"], entry["other"]))
    num_compared = sum(entry["compared"] for entry in disagreements)
    sample: defaultdict[str, list[Row]] = defaultdict(list)
    for row in audit.get("sample", []):
        sample[row.get("source", "")].append(judged(row))
    return {
        "counts": [count for count in audit["verdicts"] if _total(count)][:MAX_LINES],
        "num_compared": num_compared,
        "num_differ": sum(entry["differ"] for entry in disputed),
        "num_agreeing": len(disagreements) - len(disputed),
        "disputed": [
            {**entry, "examples": [judged(row) for row in entry.get("examples", [])]} for entry in disputed[:MAX_LINES]
        ],
        "num_hidden": max(0, len(disputed) - MAX_LINES),
        "sample": sorted(sample.items())[:MAX_SOURCES],
    }


def _total(count: Row) -> int:
    return count["correct"] + count["wrong"] + count["no_answer"]


def judged(row: Row) -> Row:
    """What is shown of one response; it is read from its end, where the answer stands.

    >>> row = {"id": "q", "question": "?", "response": "8", "verdict": "wrong", "rule": "number"}
    >>> judged({**row, "answers": ["9", "IX"]})["answers"]
    '9 | IX'
    """
    return {
        **{name: row.get(name) for name in ("index", "verdict", "other_verdict")},
        **{name: shorten(row[name], 200) for name in ("id", "rule")},
        "question": shorten(row["question"], 600),
        "answers": shorten(" | ".join(row.get("answers", [])), 300),
        "response": shorten(row["response"], 3000),
        "prediction": _cut(row.get("prediction")),
        "other_prediction": _cut(row.get("other_prediction")),
        "files": shorten(", ".join(row.get("images", [])), 300),
        "judge": [(name, as_text(value, 300)) for name, value in row.get("judge", {}).items()],
    }


def _cut(text: str | None) -> str | None:
    return None if text is None else shorten(text, 300)
