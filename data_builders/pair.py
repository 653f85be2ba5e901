"""`mpo pair`: pairs right responses with wrong or unreadable ones of the same question, as MMPR does.

Source: section 3.1 of https://arxiv.org/abs/2411.10442.
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from data_builders.engine import chunks_of_shards, count_by_source, drop_note, run_step
from data_builders.records import InputError, Row, Summary, Verdict
from data_builders.shards import claim_folder, read_rows, shard_paths

_META = ("sampler", "finish_reason", "verdict", "prediction", "rule")


@dataclass(kw_only=True)
class PairConfig(EngineConfig):
    """Settings of `mpo pair`."""

    verdicts: str = field(
        metadata={"help": "Verdicts: a JSONL file or a folder of shards; a question stays in one shard."}
    )
    max_pairs: int = field(default=15, metadata={"help": "Pairs per question, at most (MMPR: 15)."})
    seed: int = field(default=0, metadata={"help": "Which pairs are taken where there are more."})


CONFIGS = (PairConfig,)


def run(config: PairConfig) -> Summary:
    """Makes the pairs of all questions.

    Raises:
        InputError: The verdicts are missing or broken, or the folder holds other work.
    """
    if config.max_pairs < 1:
        raise InputError(f"`max_pairs` must be at least 1, got {config.max_pairs}.")
    source, output = Path(config.verdicts), Path(config.output)
    _check_shards(source)
    claim_folder(output, {"max_pairs": config.max_pairs, "seed": config.seed}, [source])
    run_step(
        lambda rows: pair_rows(rows, max_pairs=config.max_pairs, seed=config.seed),
        chunks_of_shards(source, Verdict),
        output,
        title="pairing",
    )
    return _summary(config)


def question_key(row: Row) -> tuple[str, ...]:
    """What makes two rows responses to the same question: images, question and answer."""
    return (*row.get("images", []), row["question"], str(row.get("answer")))


def pair_rows(rows: Sequence[Row], *, max_pairs: int = 15, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """The pairs of all questions in these verdict rows, and the reason for each question that gives none."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[question_key(row)].append(row)
    pairs, dropped = [], []
    for group in groups.values():
        made = make_pairs(group, max_pairs=max_pairs, seed=seed)
        pairs += made
        if not made:
            dropped.append({"id": group[0]["id"], "reason": _reason(group)})
    return pairs, dropped


def _reason(group: Sequence[Row]) -> str:
    right = [row["verdict"] == "correct" for row in group if _counts(row)]
    if not any(right):
        return "questions without a correct response"
    return "questions with only correct responses" if all(right) else "questions without two verdicts on one prompt"


def make_pairs(judged: Sequence[Row], *, max_pairs: int = 15, seed: int = 0) -> list[Row]:
    """Pairs from the judged responses of ONE question: every correct response with every other one to the same prompt.

    Args:
        judged: Verdict rows. Responses with the same text count once; failed ones (`error`) and empty ones count
            not at all.
        max_pairs: How many pairs are kept at most, chosen at random.
        seed: Together with the question alone it decides which, so order of input and number of workers change
            nothing.

    Returns:
        Pair rows. None if all responses are correct, or none is.

    >>> question = {"id": "q", "question": "2 + 2?", "answer": "4", "prompt": "2 + 2?"}
    >>> right, wrong = {"response": "4", "verdict": "correct"}, {"response": "5", "verdict": "wrong"}
    >>> [(pair["chosen"], pair["rejected"]) for pair in make_pairs([{**question, **right}, {**question, **wrong}])]
    [('4', '5')]
    """
    usable = sorted(filter(_counts, judged), key=lambda row: json.dumps(row, sort_keys=True))
    distinct = {(row["prompt"], row["response"]): row for row in reversed(usable)}
    rows = [distinct[key] for key in sorted(distinct)]
    chosen = [row for row in rows if row["verdict"] == "correct"]
    rejected = [row for row in rows if row["verdict"] != "correct"]
    combinations = [(a, b) for a, b in product(chosen, rejected) if a["prompt"] == b["prompt"]]
    if len(combinations) > max_pairs:
        digest = hashlib.sha256(repr((seed, question_key(judged[0]))).encode()).digest()
        combinations = random.Random(digest).sample(combinations, max_pairs)
    return [_pair(better, worse, number) for number, (better, worse) in enumerate(combinations)]


def _counts(row: Row) -> bool:
    return bool((row.get("response") or "").strip()) and not row.get("error")


def _pair(chosen: Row, rejected: Row, number: int) -> Row:
    return {
        "id": f"{chosen['id']}#{number}",
        "question_id": chosen["id"],
        "images": chosen.get("images", []),
        "question": chosen["question"],
        "prompt": chosen["prompt"],
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "kind": "correctness" if rejected["verdict"] == "wrong" else "format",
        "source": chosen.get("source", ""),
        "answer": chosen.get("answer"),
        "chosen_meta": {name: chosen[name] for name in _META if name in chosen},
        "rejected_meta": {name: rejected[name] for name in _META if name in rejected},
    }


def _check_shards(source: Path) -> None:
    """Sees to it that no question spans two shards, where its pairs would be missed and its cap exceeded."""
    home: dict[bytes, str] = {}
    for path in shard_paths(source):
        for row in read_rows(path, Verdict):
            key = hashlib.sha256(repr(question_key(row)).encode()).digest()[:16]
            if home.setdefault(key, path.name) != path.name:
                raise InputError(
                    f"the responses to {row['id']!r} are spread over {home[key]} and {path.name}: all responses to "
                    "one question must stand in one shard. Join the files and give the joined one."
                )


def _summary(config: PairConfig) -> Summary:
    rows = [
        [source, f"{total.total():,}", f"{total['correctness']:,}", f"{total['format']:,}"]
        for source, total in count_by_source(Path(config.output), "kind")
    ]
    return Summary(
        "Pairs",
        ["source", "pairs", "correctness", "format"],
        rows,
        notes=drop_note(Path(config.output)),
        next_command=f"mpo train --data {config.output} --model_name_or_path MODEL --output_dir mpo-model",
    )
