"""`mpo dropout-ntp`: pairs for questions without a known answer.

Dropout Next-Token Prediction: keep the first half of a response that was made with the image and let the same model go
on without the image. What it then invents makes the rejected response; the whole original is the chosen one.
Source: section 3.2 of https://arxiv.org/abs/2411.10442.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_builders.backends import SamplerConfig, check_sampler, open_sampler
from data_builders.engine import EngineConfig, chunks_of_rows, count_by_source, drop_note, run_step
from data_builders.images import check_images
from data_builders.records import InputError, Response, Row, Summary
from data_builders.samplers import Completion, Request, Sampler, SamplingSettings, word_ends
from data_builders.shards import claim_folder
from data_builders.text_measures import similarity


@dataclass(kw_only=True)
class DropoutNTPConfig(EngineConfig, SamplerConfig):
    """Settings of `mpo dropout-ntp`; the model is the one that made the responses."""

    responses: str = field(metadata={"help": "Responses: a JSONL file or a folder of shards."})
    ratio: float = field(default=0.5, metadata={"help": "Share of the response's tokens that is kept (paper: 0.5)."})
    with_image: bool = field(default=False, metadata={"help": "Go on with the image instead, as a control."})
    answered_too: bool = field(
        default=False, metadata={"help": "Also take responses to questions with a known answer."}
    )
    max_similarity: float = field(
        default=0.9,
        metadata={
            "help": "Continuations that share more of their word trigrams with the original's second half are left "
            "out; 1 keeps all but identical ones."
        },
    )
    shard_size: int = field(default=1024, metadata={"help": "Responses per shard: what a killed run repeats at most."})


CONFIGS = (DropoutNTPConfig,)


def run(config: DropoutNTPConfig) -> Summary:
    """Makes the pairs.

    Raises:
        InputError: The responses or the model are not what they should be, or the folder holds other work.
    """
    if not 0.0 <= config.ratio < 1.0:
        raise InputError(f"`ratio` must be at least 0 and below 1, got {config.ratio}: it is the share that is kept.")
    if not 0.0 <= config.max_similarity <= 1.0:
        raise InputError(f"`max_similarity` must be between 0 and 1, got {config.max_similarity}.")
    source = Path(config.responses)
    chunks = chunks_of_rows(source, Response, config.shard_size)
    if config.with_image:
        check_images((row for chunk in chunks for row in chunk.rows()), Path(config.image_root))
    check_sampler(config)
    own = {"ratio": config.ratio, "with_image": config.with_image, "answered_too": config.answered_too}
    own |= {"max_similarity": config.max_similarity}
    settings = config.provenance() | own | {"shard_size": config.shard_size}
    claim_folder(Path(config.output), settings, [source, *config.model_paths()])
    run_step(partial(_Continuing, config), chunks, config, title="dropout-ntp")
    return _summary(config)


class _Continuing:
    """The step: response rows to pair rows."""

    def __init__(self, config: DropoutNTPConfig) -> None:
        self.config, self.sampler = config, open_sampler(config)

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        return continue_rows(rows, self.sampler, self.config.drawing(), self.config)


def cut_response(response: str, *, ratio: float = 0.5, ends: Sequence[int] | None = None) -> str:
    """The beginning of a response: its first tokens.

    Args:
        response: The whole text.
        ratio: Share of the tokens that is kept, rounded down.
        ends: Where each token ends, in characters, as the model's tokenizer sees it. None takes words, single Chinese
            and Japanese characters, and punctuation marks for tokens.

    >>> cut_response("one two three four")
    'one two'
    >>> cut_response("图中有三只猫")
    '图中有'
    """
    if ends is None:
        ends = word_ends(response)
    kept = int(len(ends) * ratio)
    return response[: ends[kept - 1]] if kept else ""


def continue_rows(
    rows: Sequence[Row], sampler: Sampler, settings: SamplingSettings, config: DropoutNTPConfig
) -> tuple[list[Row], list[Row]]:
    """Pair rows for response rows, and the reason for each response that gives none."""
    pairs, dropped, usable, prefixes = [], [], [], []
    for row in rows:
        prefix = _prefix(row, sampler, config)
        if reason := _reason_before(row, prefix, config):
            dropped.append({"id": row["id"], "reason": reason})
        else:
            usable.append(row)
            prefixes.append(prefix)
    requests = [
        Request(row["prompt"], tuple(row.get("images", [])) if config.with_image else (), prefix)
        for row, prefix in zip(usable, prefixes, strict=True)
    ]
    for row, prefix, (rejected,) in zip(usable, prefixes, sampler.sample(requests, 1, settings), strict=True):
        if reason := _reason_after(row["response"], prefix, rejected, config.max_similarity):
            dropped.append({"id": row["id"], "reason": reason})
        else:
            pairs.append(_pair(row, rejected, prefix, settings, config))
    return pairs, dropped


def _prefix(row: Row, sampler: Sampler, config: DropoutNTPConfig) -> str:
    response = row.get("response") or ""
    return cut_response(response, ratio=config.ratio, ends=sampler.token_ends(response))


def _reason_before(row: Row, prefix: str, config: DropoutNTPConfig) -> str | None:
    if row.get("answer") is not None and not config.answered_too:
        return "answer known"
    if row.get("error") or not (row.get("response") or "").strip():
        return "failed"
    if row.get("finish_reason") == "length":
        return "cut off"
    return "too short" if config.ratio and not prefix.strip() else None


def _reason_after(response: str, prefix: str, rejected: Completion, max_similarity: float) -> str | None:
    if rejected.error:
        return "continuation failed"
    if rejected.text.strip() == prefix.strip():
        return "continuation empty"
    if rejected.text.strip() == response.strip():
        return "continuation identical"
    likeness = similarity(response[len(prefix) :], rejected.text[len(prefix) :])
    return "continuation too similar" if likeness > max_similarity else None


def _pair(row: Row, rejected: Completion, prefix: str, settings: SamplingSettings, config: DropoutNTPConfig) -> Row:
    index = row["sampler"].get("index", 0)
    return {
        "id": f"{row['id']}#ntp{index}",
        "question_id": row["id"],
        "images": row.get("images", []),
        "question": row["question"],
        "prompt": row["prompt"],
        "chosen": row["response"],
        "rejected": rejected.text,
        "kind": "dropout_ntp",
        "source": row.get("source", ""),
        "answer": row.get("answer"),
        "chosen_meta": {"sampler": row["sampler"], "finish_reason": row.get("finish_reason", "stop")},
        "rejected_meta": {
            "sampler": {"model": config.model, **settings.provenance()},
            "finish_reason": rejected.finish_reason,
            "ratio": config.ratio,
            "with_image": config.with_image,
            "prefix_characters": len(prefix),
        },
    }


def _summary(config: DropoutNTPConfig) -> Summary:
    counts = count_by_source(Path(config.output), "kind")
    return Summary(
        "DropoutNTP pairs",
        ["source", "pairs"],
        [[source, f"{total.total():,}"] for source, total in counts],
        notes=drop_note(Path(config.output)),
        next_command=f"mpo train --data {config.output} --model_name_or_path {config.model} --output_dir mpo-model",
    )
