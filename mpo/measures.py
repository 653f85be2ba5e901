"""What answers say of a model: accuracy, pass@k, majority vote, and how two models differ. Pure functions of rows.

Every measure is one number per question in 0..1 and its mean over questions, with a 95% bootstrap interval; models are
compared question by question.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from data_builders.records import Row
from data_builders.verify import verify_answer

ALL = "all"
_RESAMPLES = 2000

Answers = dict[tuple[str, str, str], dict[str, list[Row]]]  # (model, style, source) -> question -> its answers


def compare(answers: Iterable[Row], models: list[str], styles: list[str], *, seed: int = 0) -> Row:
    """Accuracy of every model by source of question, and the paired differences to the first model.

    Args:
        answers: Verdict rows with `model` and `style`; every model answered the same questions, each equally often.
        models: Their names, the baseline first.
        styles: The prompt styles.
        seed: Of the bootstrap.

    Returns:
        What `evaluation.json` holds; all numbers are fractions. `samples` has pass@k and the majority vote where
        questions were answered several times, each with its difference to the first model.
    """
    found = _by_question(answers)
    sources = [ALL, *sorted({source for _, _, source in found} - {ALL})]
    first = found[models[0], styles[0], ALL]
    num_samples = max(map(len, first.values()))
    accuracy, differences, samples = [], [], []
    for model, style, source in ((m, s, source) for s in styles for source in sources for m in models):
        own, baseline = found[model, style, source], found[models[0], style, source]
        here = {"model": model, "style": style, "source": source, "num": len(own)}
        mean, gain = measure(_accuracy, own, baseline, seed)
        accuracy.append({**here, "accuracy": mean.pop("value"), **mean})
        if model != models[0]:
            differences.append({**here, "baseline": models[0], "difference": gain.pop("value"), **gain})
        for name, function in _measures_of(num_samples).items():
            mean, gain = measure(function, own, baseline, seed)
            compared = {"baseline": models[0], "difference": gain} if model != models[0] else {}
            samples.append({**here, "measure": name, **mean, **compared})
    return {
        "models": models,
        "styles": styles,
        "num_questions": len(first),
        "num_samples": num_samples,
        "accuracy": accuracy,
        "differences": differences,
        "samples": samples,
    }


def _by_question(answers: Iterable[Row]) -> Answers:
    found: Answers = defaultdict(lambda: defaultdict(list))
    for row in answers:
        for source in {ALL, row.get("source") or "(no source)"}:
            found[row["model"], row["style"], source][row["id"]].append(row)
    return found


def measure(
    function: Callable[[Sequence[Row]], float], own: dict[str, list[Row]], baseline: dict[str, list[Row]], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of a measure over questions, and its paired difference to a baseline, with 95% intervals.

    Args:
        function: The answers to one question to a number in 0..1.
        own: Answers of a model by question.
        baseline: Answers of another one to the same questions.
        seed: Of the bootstrap.

    Returns:
        `value`, `low` and `high` of both.
    """
    values = np.array([function(own[question]) for question in baseline])  # (N,)
    gains = values - np.array([function(rows) for rows in baseline.values()])
    return tuple({"value": float(numbers.mean()), **bootstrap(numbers, seed)} for numbers in (values, gains))


def bootstrap(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """The 95% interval of a mean, by resampling.

    Args:
        values: One number per question, (N,).
        seed: Of the resampling.

    Returns:
        Its limits `low` and `high`.
    """
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    resampled = rng.multinomial(len(values), counts / len(values), size=_RESAMPLES)  # (R, distinct values)
    low, high = np.quantile(resampled @ distinct / len(values), [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def _measures_of(num_samples: int) -> dict[str, Callable[[Sequence[Row]], float]]:
    """What several answers to each question can be asked: pass@k for powers of two, and the majority vote."""
    if num_samples == 1:
        return {}
    powers = [2**power for power in range(1, num_samples.bit_length()) if 2**power < num_samples]
    passes = {f"pass@{k}": partial(_pass_at, k) for k in [*powers, num_samples]}
    return {**passes, f"majority@{num_samples}": majority}


def _accuracy(answers: Sequence[Row]) -> float:
    return sum(row["verdict"] == "correct" for row in answers) / len(answers)


def _pass_at(k: int, answers: Sequence[Row]) -> float:
    return pass_at(k, len(answers), sum(row["verdict"] == "correct" for row in answers))


def pass_at(k: int, num: int, num_correct: int) -> float:
    """How likely one of k answers is right, from `num` answers of which `num_correct` are: without bias.

    Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374, section 2.1.

    >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(4, 4, 1)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(num - num_correct, k) / math.comb(num, k)


def majority(answers: Sequence[Row]) -> float:
    """Whether the final answer that most responses give is right; of several such ones, the share that is.

    Answers that compare equal as verdicts do (0.5 and 1/2) vote together; responses without a final answer do not
    vote.

    Source: self-consistency, Wang et al. 2022, https://arxiv.org/abs/2203.11171.
    """
    parties: list[list[Row]] = []
    for row in answers:
        if row.get("prediction") is None:
            continue
        party = next((party for party in parties if _same(party[0], row)), None)
        if party is None:
            parties.append(party := [])
        party.append(row)
    most = max(map(len, parties), default=0)
    winners = [party[0]["verdict"] == "correct" for party in parties if len(party) == most]
    return sum(winners) / len(winners) if winners else 0.0


def _same(one: Row, other: Row) -> bool:
    if one["verdict"] != other["verdict"]:
        return False
    return one["verdict"] == "correct" or verify_answer(other["prediction"], one["prediction"])
