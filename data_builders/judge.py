"""`mpo judge`: compares the final answer of every response with the true one, by rules or by asking a model.

A question may say how it wants to be judged: `answers` are further accepted answers, `answer_kind` is how they are
compared, `options` are the options of a multiple-choice question.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from data_builders import records
from data_builders.audit import AUDIT_FILE, audit_verdicts
from data_builders.backends import SamplerConfig, open_sampler
from data_builders.engine import EngineConfig, chunks_of_rows, drop_note, run_step
from data_builders.images import check_images
from data_builders.model_judge import judge_by_model, needs_model, prompts_for
from data_builders.records import InputError, Row, Summary
from data_builders.rules.extract import Style
from data_builders.rules.internvl import judge_row_like_internvl
from data_builders.shards import claim_folder, write_text
from data_builders.verify import Judgement, Kind, accepted_answers, judge_row

VERDICTS = ("correct", "wrong", "no_answer")

Compat = Literal["internvl"]


class Response(records.Response):
    """A response row, with what its question may say about judging."""

    answers: list[str] | None = None
    answer_kind: Kind | None = None
    options: dict[str, str] | list[str] | None = None


@dataclass(kw_only=True)
class JudgeConfig(EngineConfig, SamplerConfig):
    """Settings of `mpo judge`; those of the model count only where `judge` asks one."""

    responses: str = field(metadata={"help": "Responses: a JSONL file or a folder of shards."})
    kind: Kind = field(
        default="auto",
        metadata={"help": "How answers are compared where a row has no `answer_kind`; auto chooses by the answer."},
    )
    style: Style = field(
        default="auto", metadata={"help": "Where the final answer stands; auto looks in all these places."}
    )
    judge: Literal["rules", "model", "rules_then_model"] = field(
        default="rules",
        metadata={
            "help": "Who decides: rules; a model, for every response; or rules first and a model where they find two "
            "different wordings (kinds text and anls)."
        },
    )
    compat: Compat | None = field(
        default=None, metadata={"help": "internvl: the verdicts of the scorers released with MMPR, to compare with."}
    )
    judge_prompt: str = field(
        default="judge",
        metadata={"help": "What the model is asked: judge (in the question's language), judge_zh, or a .jinja file."},
    )
    judge_with_image: bool = field(default=False, metadata={"help": "Show the model the images too."})
    audit_rows: int = field(
        default=1000,
        metadata={"help": "Rows of each source that are also judged by the other rules, for audit.json; 0: no audit."},
    )
    shard_size: int = field(default=8192, metadata={"help": "Responses per shard: what a killed run repeats at most."})
    model: str | None = field(
        default=None,
        metadata={"help": "The judge: model folder or Hub name; with `server`, the name that it is served under."},
    )
    temperature: float = field(default=0.0, metadata={"help": "Of the judge; 0 is greedy."})
    max_new_tokens: int = field(default=16, metadata={"help": "Of the judge; more if it thinks before it answers."})

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other.

        Raises:
            InputError: A model is to judge and there is none, or it is to imitate the released scorers.
        """
        super().__post_init__()
        if self.judge != "rules" and not self.model:
            raise InputError(f"`judge: {self.judge}` needs a `model`: a folder, a Hub name or a name on a `server`.")
        if self.judge != "rules" and self.compat:
            raise InputError(f"`compat: {self.compat}` is about rules: take `judge: rules` with it.")
        if self.audit_rows < 0:
            raise InputError(f"`audit_rows` must be at least 0, got {self.audit_rows}.")


CONFIGS = (JudgeConfig,)


def run(config: JudgeConfig) -> Summary:
    """Judges all responses to questions whose answer is known.

    Raises:
        InputError: The responses are missing or broken, the folder holds other work, or there is no such model.
    """
    source, output = Path(config.responses), Path(config.output)
    chunks = chunks_of_rows(source, Response, config.shard_size)
    if config.judge != "rules" and config.judge_with_image:
        check_images((row for chunk in chunks for row in chunk.rows()), Path(config.image_root))
    claim_folder(output, _settings(config), [source, *(config.model_paths() if config.model else [])])
    run_step(partial(_Judging, config), chunks, config, title="judging")
    audit = audit_verdicts(output, rows_per_source=config.audit_rows)
    if config.audit_rows:
        write_text(output / AUDIT_FILE, json.dumps(audit, ensure_ascii=False, indent=1) + "\n")
    return _summary(config, audit["verdicts"])


def _settings(config: JudgeConfig) -> Row:
    settings = {"kind": config.kind, "style": config.style, "judge": config.judge, "compat": config.compat}
    if config.judge != "rules":
        asked = [prompt.id for prompt in prompts_for(config.judge_prompt)]
        settings |= {"prompt": asked, "with_image": config.judge_with_image, **config.provenance()}
    return {**settings, "shard_size": config.shard_size}


class _Judging:
    """The step: response rows to verdict rows."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        if config.judge != "rules":
            self.sampler, self.prompts = open_sampler(config), prompts_for(config.judge_prompt)

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        config = self.config
        verdicts, unknown = judge_rows(rows, kind=config.kind, style=config.style, compat=config.compat)
        if config.judge == "rules":
            return verdicts, unknown
        open_only = config.judge == "rules_then_model"
        asked = [index for index, row in enumerate(verdicts) if needs_model(row, open_only=open_only)]
        decided = judge_by_model(
            [verdicts[index] for index in asked],
            self.sampler,
            config.drawing(),
            prompts=self.prompts,
            with_image=config.judge_with_image,
        )
        for index, row in zip(asked, decided, strict=True):
            verdicts[index] = row
        return verdicts, unknown


def judge_rows(
    rows: list[Row], *, kind: Kind = "auto", style: Style = "auto", compat: Compat | None = None
) -> tuple[list[Row], list[Row]]:
    """Verdict rows for the responses to questions with a known answer, and the reason for each of the others.

    Args:
        rows: Response rows; `answers`, `answer_kind` and `options` of a row are heeded.
        kind: How answers are compared where a row does not say.
        style: Where the final answer stands.
        compat: `internvl` judges as the released scorers do, whatever the other settings say.
    """
    verdicts, unknown = [], []
    for row in rows:
        if accepted_answers(row):
            verdicts.append({**row, **_verdict(row, kind, style, compat)})
        else:
            unknown.append({"id": row["id"], "reason": "answer unknown"})
    return verdicts, unknown


def _verdict(row: Row, kind: Kind, style: Style, compat: Compat | None) -> Row:
    if row.get("error") or row.get("response") is None:
        judgement = Judgement("no_answer", None, "failed")
    else:
        judgement = judge_row_like_internvl(row) if compat else judge_row(row, kind=kind, style=style)
    return {"verdict": judgement.verdict, "prediction": judgement.prediction, "rule": judgement.rule}


def _summary(config: JudgeConfig, counts: list[Row]) -> Summary:
    output = Path(config.output)
    totals: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for count in counts:
        totals[count["source"]].update({verdict: count[verdict] for verdict in VERDICTS})
    rows = [
        [source or "(no source)", *(f"{total[v]:,}" for v in VERDICTS), f"{total['correct'] / total.total():.1%}"]
        for source, total in totals.items()
    ]
    num_unread = sum(count["no_answer"] for count in counts if count["rule"] == "model")
    notes = drop_note(output)
    notes += (
        [f"The judge gave no verdict on {num_unread:,} responses, which count as no answer."] if num_unread else []
    )
    notes += [f"{output / AUDIT_FILE} says where rules disagree."] if config.audit_rows else []
    return Summary(
        "Verdicts",
        ["source", "correct", "wrong", "no answer", "share correct"],
        rows,
        notes=notes,
        next_command=f"mpo pair --verdicts {config.output} --output pairs",
    )
