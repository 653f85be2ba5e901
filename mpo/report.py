"""`mpo report`: what a run did, as one HTML file that needs nothing else.

The page answers in this order: did the model get better, by how much, how certainly; how training went; what the data
are; what they look like. It holds its pictures and charts, runs no script and loads nothing: a strict content security
policy says so to the browser, and everything that models or data wrote is escaped. Same input, same bytes. Rows are
read once and counted, not kept.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field

from data_builders.audit import AUDIT_FILE
from data_builders.records import InputError, Record, Row, Summary, check_row
from data_builders.shards import read_stage, write_text
from data_builders.shown import visible
from mpo.pages import charts, drawing
from mpo.pages.audit import Audit, audit_section
from mpo.pages.data import PairCounts, count_verdicts, left_out, read_pairs
from mpo.pages.gallery import Answers, GalleryPicker, card

TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class ReportConfig:
    """Settings of `mpo report`. Every input may be left out, and its section with it; one at least is needed."""

    output: str = field(
        default="report.html",
        metadata={"help": "folder that report.html is written to, or a path that ends in .html"},
    )
    title: str = field(default="Mixed Preference Optimization", metadata={"help": "headline of the page"})
    image_root: str = field(default=".", metadata={"help": "folder that the images of the pairs are relative to"})
    evaluation: str | None = field(default=None, metadata={"help": "folder written by `mpo eval`"})
    training: str | None = field(default=None, metadata={"help": "folder written by `mpo train`"})
    verdicts: str | None = field(
        default=None, metadata={"help": "folder of verdict shards; its audit.json is shown where there is one"}
    )
    pairs: list[str] = field(default_factory=list, metadata={"help": "folders of pair shards"})
    gallery_answers: str | None = field(
        default=None,
        metadata={"help": "folder written by `mpo eval` on questions of the pairs: what each model answers to them"},
    )
    gallery: int = field(default=12, metadata={"help": "how many pairs are shown"})


CONFIGS = (ReportConfig,)


class Score(Record):
    """One accuracy in `evaluation.json`; fractions in 0..1, `low` and `high` bound the 95% interval."""

    model: str
    style: str
    source: str
    num: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)


class Gain(Record):
    """One paired difference in `evaluation.json`: `model` minus `baseline`, in -1..1."""

    model: str
    baseline: str
    style: str
    source: str
    num: int = Field(ge=0)
    difference: float = Field(ge=-1, le=1)
    low: float = Field(ge=-1, le=1)
    high: float = Field(ge=-1, le=1)


class Evaluation(Record):
    """What the report reads of `evaluation.json`."""

    models: list[str] = Field(min_length=1)
    styles: list[str] = Field(min_length=1)
    num_questions: int = Field(ge=0)
    accuracy: list[Score] = Field(min_length=1)
    differences: list[Gain] = []


class Answer(Record):
    """What the report reads of a row of `answers.jsonl`."""

    id: str
    model: str
    style: str
    verdict: str
    response: str | None = None
    prediction: str | None = None


class TrainerState(Record):
    """What the report reads of `trainer_state.json`."""

    log_history: list[dict[str, Any]]


def run(config: ReportConfig) -> Summary:
    """Writes the report.

    Args:
        config: What to report on and where to.

    Returns:
        One line per section.

    Raises:
        InputError: Nothing to report on, or an input is missing, empty or broken.
    """
    _check(config)
    evaluation = _read_evaluation(Path(config.evaluation)) if config.evaluation else None
    page = {
        "title": config.title,
        "headline": _headline(evaluation) if evaluation else None,
        "evaluation": _evaluation_section(evaluation) if evaluation else None,
        "training": _training_section(Path(config.training)) if config.training else None,
        "verdicts": _verdict_section(Path(config.verdicts)) if config.verdicts else None,
        "pairs": _pair_section(config) if config.pairs else None,
    }
    path = Path(config.output)
    path = path if path.suffix == ".html" else path / "report.html"
    write_text(path, _render(page))
    rows = [[name, page[name]["summary"]] for name in ("evaluation", "training", "verdicts", "pairs") if page[name]]
    return Summary(
        "Report", ["section", "shows"], rows, notes=[f"{path}: open it in any browser; it needs no network."]
    )


def _check(config: ReportConfig) -> None:
    if not (config.evaluation or config.training or config.verdicts or config.pairs):
        raise InputError(
            "there is nothing to report on: give at least one of `evaluation`, `training`, `verdicts` and `pairs`."
        )
    if config.gallery_answers and not config.pairs:
        raise InputError("`gallery_answers` is shown beside the pairs: give `pairs` too, or leave it out.")
    if config.gallery < 0:
        raise InputError(f"`gallery` is {config.gallery}: it is a number of pairs; 0 shows none.")


def _render(page: Row) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(percent=charts.percent, points=charts.points, count=lambda number: f"{number:,}")
    return environment.get_template("report.html.jinja").render(page)


def _finalize(value: object) -> object:
    """What data say is shown whole: no character of it hides, reorders what follows or breaks the file."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _read_json(path: Path, model: type[Record], step: str) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; `{step}` writes it when it is done. Is this its folder?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}): was the file cut off? Run `{step}` again.") from error
    return check_row(content, model, str(path))


def _read_evaluation(folder: Path) -> Row:
    """`evaluation.json`, plus `style`: the first style that has numbers, which is the one that is drawn."""
    path = folder / "evaluation.json"
    evaluation = {"differences": [], **_read_json(path, Evaluation, "mpo eval")}
    measured = {row["style"] for row in evaluation["accuracy"]}
    for style in evaluation["styles"]:
        if style in measured:
            return {**evaluation, "style": style}
    raise InputError(f"{path}: no accuracy is given for any of the styles {', '.join(evaluation['styles'])}.")


def _headline(evaluation: Row) -> Row:
    """The numbers on top: the last model against the first, all questions, in the main style."""
    models, style = evaluation["models"], evaluation["style"]
    overall = {row["model"]: row for row in evaluation["accuracy"] if (row["source"], row["style"]) == ("all", style)}
    gain = next(
        (
            row
            for row in evaluation["differences"]
            if (row["model"], row["baseline"], row["source"], row["style"]) == (models[-1], models[0], "all", style)
        ),
        None,
    )
    last, first = overall.get(models[-1]), overall.get(models[0])
    return {"style": style, "last": last, "first": first, "gain": gain if last and first else None}


def _evaluation_section(evaluation: Row) -> Row:
    scores = {(row["style"], row["source"], row["model"]): row for row in evaluation["accuracy"]}
    gains = {(row["style"], row["source"], row["model"], row["baseline"]): row for row in evaluation["differences"]}
    contrasts = list(dict.fromkeys((row["model"], row["baseline"]) for row in evaluation["differences"]))
    tables = []
    for style in evaluation["styles"]:
        rows = [row for row in evaluation["accuracy"] if row["style"] == style]
        lines = [
            {
                "source": source,
                "num": max(row["num"] for row in rows if row["source"] == source),
                "scores": [scores.get((style, source, model)) for model in evaluation["models"]],
                "gains": [gains.get((style, source, *contrast)) for contrast in contrasts],
            }
            for source in charts.kinds_of(rows)
        ]
        tables.append({"style": style, "lines": lines})
    return {
        "chart": charts.accuracy_chart(evaluation, evaluation["style"]),
        "style": evaluation["style"],
        "models": evaluation["models"],
        "contrasts": contrasts,
        "tables": tables,
        "summary": f"{', '.join(evaluation['models'])} on {evaluation['num_questions']:,} questions",
    }


def _training_section(folder: Path) -> Row:
    history = _read_json(folder / "trainer_state.json", TrainerState, "mpo train")["log_history"]

    def line(label: str, key: str, color: str, *, dashed: bool = False) -> charts.Line:
        return charts.Line(label, _series(history, key), color, dashed=dashed)

    loss = [
        line("total", "loss", drawing.INK),
        line("preference", "loss/preference", drawing.BLUE),
        line("quality", "loss/quality", drawing.ORANGE),
        line("generation", "loss/generation", drawing.GREEN),
    ]
    rewards = [
        line("margin", "rewards/margins", drawing.PURPLE),
        line("chosen", "rewards/chosen", drawing.BLUE),
        line("rejected", "rewards/rejected", drawing.ORANGE),
        line("shift δ", "reward_shift", drawing.INK, dashed=True),
    ]
    accuracies = [line("accuracy", "rewards/accuracies", drawing.GREEN)]
    num_steps = max((row["step"] for row in history if isinstance(row.get("step"), int)), default=0)
    return {
        "num_steps": num_steps,
        "facts": _training_facts(history),
        "loss": _curves("loss", loss, "The loss and its terms over training steps."),
        "rewards": _curves("rewards", rewards, "Rewards of chosen and rejected responses over training steps."),
        "accuracies": _curves("accuracies", accuracies, "Share of pairs whose chosen response has the higher reward."),
        "summary": f"{num_steps:,} steps",
    }


def _curves(name: str, lines: Sequence[charts.Line], description: str) -> Markup | None:
    return charts.line_chart(name, lines, description) if any(line.points for line in lines) else None


def _series(history: Iterable[Row], key: str) -> list[tuple[int, float]]:
    """(step, value) of one metric; a NaN or an entry that lacks the metric is no point."""
    found = [(row.get("step"), row.get(key)) for row in history]
    return [
        (step, value)
        for step, value in found
        if isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value)
    ]


def _training_facts(history: Sequence[Row]) -> list[tuple[str, str]]:
    """Name and first -> last logged value of what tells a healthy run."""
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("Loss", "loss", charts.number),
        ("Chosen above rejected", "rewards/accuracies", charts.percent),
        ("Reward margin", "rewards/margins", charts.number),
        ("Reward shift δ", "reward_shift", charts.number),
        ("Tokens per second", "tokens_per_second", lambda value: f"{value:,.0f}"),
    ]
    series = [(name, _series(history, key), write) for name, key, write in shown]
    return [(name, f"{write(values[0][1])} → {write(values[-1][1])}") for name, values, write in series if values]


def _verdict_section(folder: Path) -> Row:
    path = folder / AUDIT_FILE
    audit = audit_section(_read_json(path, Audit, "mpo judge")) if path.is_file() else None
    return {**count_verdicts(folder).section(), "audit": audit}


def _pair_section(config: ReportConfig) -> Row:
    models, answers = _read_answers(Path(config.gallery_answers)) if config.gallery_answers else ([], {})
    picker, counts = GalleryPicker(config.gallery, answers), PairCounts()
    for pair in read_pairs(config.pairs):
        counts.add(pair)
        picker.add(pair)
    section = counts.section()
    cards = [card(pair, answers, models, Path(config.image_root)) for pair in picker.picks()]
    summary = f"{section['num']:,} pairs of {section['num_questions']:,} questions, {len(cards)} pairs shown"
    return {**section, "left_out": left_out(config.pairs), "cards": cards, "summary": summary}


def _read_answers(folder: Path) -> tuple[list[str], Answers]:
    """The models, and what each of them answered in the main style: question id -> model -> row."""
    evaluation = _read_evaluation(folder)
    answers: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in read_stage(folder / "answers.jsonl", Answer):
        if row["style"] == evaluation["style"]:
            answers[row["id"]][row["model"]] = {"prediction": None, **row}
    return evaluation["models"], dict(answers)
