"""Which responses to a question make pairs: correct ones with wrong or unreadable ones, as MMPR does, and filters.

Pure functions of verdict rows and options. What a question gives depends on its own responses and the seed alone, so
the order of the rows, and what other questions stand beside it, change nothing.

Source: section 3.1 of https://arxiv.org/abs/2411.10442; the share of correct responses is MMPR-Tiny's filter.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, product
from typing import Any, Literal

from data_builders.records import InputError, Row
from data_builders.text_measures import Profile, repetition

Kind = Literal["correctness", "format"]

KINDS: Mapping[str, Kind] = {"wrong": "correctness", "no_answer": "format"}  # by the verdict on the rejected one
_SHARED = {"id", "images", "question", "prompt", "response", "source", "answer"}  # the rest is provenance


@dataclass(kw_only=True)
class PairOptions:
    """Which responses are paired; every filter is off unless asked for."""

    max_pairs: int = field(default=15, metadata={"help": "Pairs per question, at most (MMPR: 15)."})
    seed: int = field(default=0, metadata={"help": "Which pairs are taken where there are more."})
    kinds: list[Kind] = field(
        default_factory=lambda: ["correctness", "format"],
        metadata={"help": "correctness: the rejected response is wrong; format: it has no readable answer."},
    )
    min_correct: float = field(
        default=0.0,
        metadata={"help": "Leave out questions with a smaller share of correct responses (MMPR-Tiny: 0.2)."},
    )
    max_correct: float = field(
        default=1.0,
        metadata={"help": "Leave out questions with a larger share of correct responses (MMPR-Tiny: 0.8)."},
    )
    max_length_ratio: float | None = field(
        default=None,
        metadata={"help": "Pair only responses of which the longer has at most this many times the characters: 1.5."},
    )
    max_similarity: float | None = field(
        default=None, metadata={"help": "Leave out pairs whose two texts share more of their word trigrams: 0.95."}
    )
    dedupe_similarity: float | None = field(
        default=None,
        metadata={
            "help": "Count responses to a question once that fall on the same side and share at least this much of "
            "their word trigrams: 0.9."
        },
    )
    max_repetition: float | None = field(
        default=None,
        metadata={
            "help": "Responses that say more than this share of their 10-grams twice are not chosen: 0.3. They may "
            "still be rejected: not to loop is worth learning."
        },
    )

    def __post_init__(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            InputError: A value is out of its range.
        """
        if self.max_pairs < 1:
            raise InputError(f"`max_pairs` must be at least 1, got {self.max_pairs}.")
        if not self.kinds or set(self.kinds) - set(KINDS.values()):
            raise InputError(f"`kinds` names some of correctness and format, got {self.kinds}.")
        if not 0.0 <= self.min_correct <= self.max_correct <= 1.0:
            raise InputError(
                "`min_correct` and `max_correct` are shares of correct responses, the first not above the second: "
                f"0 to 1, got {self.min_correct} and {self.max_correct}."
            )
        if self.max_length_ratio is not None and self.max_length_ratio < 1.0:
            raise InputError(
                f"`max_length_ratio` must be at least 1, got {self.max_length_ratio}: it is the longer length over "
                "the shorter."
            )
        for name in ("max_similarity", "dedupe_similarity", "max_repetition"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise InputError(f"`{name}` must be between 0 and 1, got {value}: it is a share.")


def priority(pair: Row, seed: int) -> int:
    """A number of 64 bits that decides whether a pair stays where its source is capped: the smallest do."""
    parts = [seed, pair["images"], pair["question"], pair["answer"], pair["prompt"], pair["chosen"], pair["rejected"]]
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest())


def question_key(row: Row) -> bytes:
    """What makes two rows responses to the same question: a digest of images, question and answer."""
    parts = [row.get("images", []), row["question"], row.get("answer")]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def pair_rows(
    rows: Iterable[Row], options: PairOptions | None = None, is_kept: Callable[[Row], bool] | None = None
) -> tuple[list[Row], list[Row]]:
    """The pairs of all questions in these verdict rows, and what was left out.

    Args:
        rows: Verdict rows, all of each question, in any order.
        options: Which responses are paired.
        is_kept: A last word on each pair; None keeps all.

    Returns:
        Pair rows, question by question. And for each question a row with `reason` and `count` for everything that was
        left out; the first word of a reason says whether it was questions, responses or pairs.
    """
    options = options or PairOptions()
    groups: dict[bytes, list[Row]] = defaultdict(list)
    for row in rows:
        groups[question_key(row)].append(row)
    pairs, dropped = [], []
    for key in sorted(groups):
        made, left_out = _pair_question(groups[key], options)
        if is_kept and made:
            made = _keep(made, is_kept, left_out)
        pairs += made
        first = min(groups[key], key=lambda row: (row["id"], row.get("source", "")))
        origin = {"id": first["id"], "source": first.get("source", "")}
        dropped += [{**origin, "reason": reason, "count": left_out[reason]} for reason in sorted(+left_out)]
    return pairs, dropped


def make_pairs(judged: Sequence[Row], *, max_pairs: int = 15, seed: int = 0, **options: Any) -> list[Row]:
    """Pairs from the judged responses of ONE question: every correct response with every other one to the same prompt.

    Args:
        judged: Verdict rows. Responses with the same text count once; failed ones (`error`) and empty ones count
            not at all, and correct ones that were cut off (`finish_reason` is `length`) are not chosen.
        max_pairs: How many pairs are kept at most, chosen at random.
        seed: Together with the question alone it decides which, so order of input and number of workers change
            nothing.
        **options: Any other field of `PairOptions`: filters, which are off.

    Returns:
        Pair rows. None if all responses are correct, or none is.

    >>> question = {"id": "q", "question": "2 + 2?", "answer": "4", "prompt": "2 + 2?"}
    >>> right, wrong = {"response": "4", "verdict": "correct"}, {"response": "5", "verdict": "wrong"}
    >>> [(pair["chosen"], pair["rejected"]) for pair in make_pairs([{**question, **right}, {**question, **wrong}])]
    [('4', '5')]
    """
    return _pair_question(judged, PairOptions(max_pairs=max_pairs, seed=seed, **options))[0]


def _pair_question(judged: Sequence[Row], options: PairOptions) -> tuple[list[Row], Counter[str]]:
    """The pairs of one question, and how many responses and pairs were left out, by reason."""
    left_out: Counter[str] = Counter()
    readable = [row for row in judged if _has_text(row, left_out)]
    if reason := _outside_window([row["verdict"] == "correct" for row in readable], options):
        left_out[reason] += 1
        return [], left_out
    profile = cache(Profile)
    rows = _distinct(readable, left_out)
    chosen = _unlike([row for row in rows if _may_be_chosen(row, options, left_out)], options, profile, left_out)
    rejected = _unlike([row for row in rows if _may_be_rejected(row, options, left_out)], options, profile, left_out)
    combinations = [(good, bad) for good, bad in product(chosen, rejected) if good["prompt"] == bad["prompt"]]
    pairs = _draw(combinations, options, profile, left_out)
    if not pairs:
        left_out[_why_none(chosen, rejected, combinations)] += 1
    return [_pair(good, bad, number) for number, (good, bad) in enumerate(pairs)], left_out


def _has_text(row: Row, left_out: Counter[str]) -> bool:
    if row.get("error") or row.get("response") is None:
        left_out["responses that failed"] += 1
        return False
    if not row["response"].strip():
        left_out["responses without text"] += 1
        return False
    return True


def _outside_window(correct: Sequence[bool], options: PairOptions) -> str | None:
    """Why a question cannot give pairs or is not asked to, given which of its responses are correct."""
    if not any(correct):
        return "questions without a correct response"
    if all(correct):
        return "questions with only correct responses"
    share = sum(correct) / len(correct)
    if share < options.min_correct:
        return "questions with too few correct responses"
    return "questions with too many correct responses" if share > options.max_correct else None


def _distinct(rows: Sequence[Row], left_out: Counter[str]) -> list[Row]:
    """One row for each text, in order of the texts; none for texts that were judged in two ways."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["prompt"], row["response"]].append(row)
    distinct = []
    for text in sorted(groups):
        same = groups[text]
        if len({row["verdict"] for row in same}) > 1:
            left_out["responses whose text was judged in two ways"] += len(same)
            continue
        left_out["responses with the text of another one"] += len(same) - 1
        distinct.append(same[0] if len(same) == 1 else min(same, key=_finished_first))
    return distinct


def _finished_first(row: Row) -> tuple[bool, str]:
    return row.get("finish_reason") == "length", json.dumps(row, sort_keys=True)


def _may_be_chosen(row: Row, options: PairOptions, left_out: Counter[str]) -> bool:
    if row["verdict"] != "correct":
        return False
    if row.get("finish_reason") == "length":
        left_out["responses that are correct but cut off"] += 1
        return False
    if options.max_repetition is not None and repetition(row["response"]) > options.max_repetition:
        left_out["responses that are correct but repeat themselves"] += 1
        return False
    return True


def _may_be_rejected(row: Row, options: PairOptions, left_out: Counter[str]) -> bool:
    if row["verdict"] == "correct":
        return False
    if row["verdict"] == "no_answer" and row.get("rule") == "model":  # it may be right: the judge did not say
        left_out["responses without a verdict of the judge"] += 1
        return False
    if KINDS[row["verdict"]] not in options.kinds:
        left_out[f"responses for {KINDS[row['verdict']]} pairs, which `kinds` leaves out"] += 1
        return False
    return True


def _unlike(
    rows: Sequence[Row], options: PairOptions, profile: Callable[[str], Profile], left_out: Counter[str]
) -> Sequence[Row]:
    """The responses of one side, of those that are nearly the same only the first."""
    if options.dedupe_similarity is None:
        return rows
    kept: list[Row] = []
    for row in rows:
        others = (profile(other["response"]) for other in kept if other["prompt"] == row["prompt"])
        if any(profile(row["response"]).similarity(other) >= options.dedupe_similarity for other in others):
            left_out["responses nearly the same as another one"] += 1
        else:
            kept.append(row)
    return kept


def _draw(
    combinations: Sequence[tuple[Row, Row]],
    options: PairOptions,
    profile: Callable[[str], Profile],
    left_out: Counter[str],
) -> list[tuple[Row, Row]]:
    """At most `max_pairs` of the combinations that pass the filters: all in their order, or some drawn at random."""
    fitting = combinations
    if options.max_length_ratio is not None:
        fitting = [(good, bad) for good, bad in combinations if _length_ratio(good, bad) <= options.max_length_ratio]
        left_out["pairs of too different lengths"] += len(combinations) - len(fitting)

    def differ(pair: tuple[Row, Row]) -> bool:
        good, bad = (profile(row["response"]) for row in pair)
        alike = good.similarity(bad) > options.max_similarity
        left_out["pairs of nearly the same texts"] += alike
        return not alike

    candidates: Iterable[tuple[Row, Row]] = fitting
    if len(fitting) > options.max_pairs:
        candidates = _shuffled(fitting, f"{options.seed} {question_key(fitting[0][0]).hex()}")
    if options.max_similarity is not None:
        candidates = filter(differ, candidates)
    return list(islice(candidates, options.max_pairs))


def _length_ratio(one: Row, other: Row) -> float:
    short, long = sorted((len(one["response"]), len(other["response"])))
    return long / short


def _shuffled(items: Sequence[Any], seed: str) -> Iterator[Any]:
    """All items in random order, at the cost of those that are taken."""
    generator, pool = random.Random(seed), list(items)
    while pool:
        place = generator.randrange(len(pool))
        pool[place], pool[-1] = pool[-1], pool[place]
        yield pool.pop()


def _why_none(chosen: Sequence[Row], rejected: Sequence[Row], combinations: Sequence[tuple[Row, Row]]) -> str:
    if not chosen:
        return "questions whose correct responses were all left out"
    if not rejected:
        return "questions whose other responses were all left out"
    return (
        "questions whose pairs were all left out" if combinations else "questions without two verdicts on one prompt"
    )


def _keep(pairs: Sequence[Row], is_kept: Callable[[Row], bool], left_out: Counter[str]) -> list[Row]:
    kept = [pair for pair in pairs if is_kept(pair)]
    left_out["pairs over the limit of their source"] += len(pairs) - len(kept)
    left_out["questions whose pairs were all left out"] += not kept
    return kept


def _pair(chosen: Row, rejected: Row, number: int) -> Row:
    return {
        "id": f"{chosen['id']}#{number}",
        "question_id": chosen["id"],
        "images": chosen.get("images", []),
        "question": chosen["question"],
        "prompt": chosen["prompt"],
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "kind": KINDS[rejected["verdict"]],
        "source": chosen.get("source", ""),
        "answer": chosen.get("answer"),
        "chosen_meta": {name: value for name, value in chosen.items() if name not in _SHARED},
        "rejected_meta": {name: value for name, value in rejected.items() if name not in _SHARED},
    }
