"""`mpo judge`: compares the final answer of every response with the true one."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from data_builders.engine import EngineConfig, chunks_of_rows, count_by_source, drop_note, run_step
from data_builders.records import Response, Row, Summary
from data_builders.shards import claim_folder
from data_builders.verify import judge_response

VERDICTS = ("correct", "wrong", "no_answer")


@dataclass(kw_only=True)
class JudgeConfig(EngineConfig):
    """Settings of `mpo judge`."""

    responses: str = field(metadata={"help": "Responses: a JSONL file or a folder of shards."})
    kind: Literal["auto", "choice", "yes_no", "number", "relaxed", "math", "text", "anls"] = field(
        default="auto", metadata={"help": "How answers are compared; auto chooses by the answer."}
    )
    style: Literal["auto", "final_answer", "boxed", "think", "direct"] = field(
        default="auto", metadata={"help": "Where the final answer stands; auto looks in all these places."}
    )
    shard_size: int = field(default=8192, metadata={"help": "Responses per shard: what a killed run repeats at most."})


CONFIGS = (JudgeConfig,)


def run(config: JudgeConfig) -> Summary:
    """Judges all responses to questions whose answer is known.

    Raises:
        InputError: The responses are missing or broken, or the folder holds other work.
    """
    source = Path(config.responses)
    chunks = chunks_of_rows(source, Response, config.shard_size)
    settings = {"kind": config.kind, "style": config.style, "shard_size": config.shard_size}
    claim_folder(Path(config.output), settings, [source])
    run_step(partial(_Judging, config), chunks, config, title="judging")
    return _summary(config)


class _Judging:
    """The step: response rows to verdict rows."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        return judge_rows(rows, kind=self.config.kind, style=self.config.style)


def judge_rows(rows: list[Row], *, kind: str = "auto", style: str = "auto") -> tuple[list[Row], list[Row]]:
    """Verdict rows for the responses to questions with a known answer, and the reason for each of the others."""
    unknown = [{"id": row["id"], "reason": "answer unknown"} for row in rows if row.get("answer") is None]
    return [{**row, **_verdict(row, kind, style)} for row in rows if row.get("answer") is not None], unknown


def _verdict(row: Row, kind: str, style: str) -> Row:
    if row.get("error") or row.get("response") is None:
        return {"verdict": "no_answer", "prediction": None, "rule": "failed"}
    judgement = judge_response(row["response"], row["answer"], kind=kind, style=style, question=row["question"])
    return {"verdict": judgement.verdict, "prediction": judgement.prediction, "rule": judgement.rule}


def _summary(config: JudgeConfig) -> Summary:
    rows = [
        [source, *(f"{total[v]:,}" for v in VERDICTS), f"{total['correct'] / total.total():.1%}"]
        for source, total in count_by_source(Path(config.output), "verdict")
    ]
    return Summary(
        "Verdicts",
        ["source", "correct", "wrong", "no answer", "share correct"],
        rows,
        notes=drop_note(Path(config.output)),
        next_command=f"mpo pair --verdicts {config.output} --output pairs",
    )
