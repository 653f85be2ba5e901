"""Paired differences between methods on the test scans, their intervals, and verdicts by a fixed rule.

The rule stands in study.yaml and was fixed before the test scans were read. Every seed gives one paired difference:
the two methods start from the same SFT model and answer the same questions. The interval that decides is Student's
over seeds; one over questions, with these very models, is given beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_builders.records import Row
from examples.study.measures import unpack
from examples.study.plan import Records, Study, tests
from mpo.quickstart import mean_interval

MARGIN = 1.0  # points that "no worse" allows
_LEVEL = 0.05
_NORMAL = 1.959964  # its 97.5% quantile


@dataclass(frozen=True)
class Finding:
    """What the test scans say of a claim; differences in points.

    Attributes:
        claim: Its entry in the YAML.
        by_seed: One paired difference per seed.
        mean: Their mean.
        low: Lower end of its 95% interval over seeds; nan for fewer than two.
        high: Upper end.
        over_questions: Half the width of the 95% interval over questions.
        p: Of the difference being what the verdict excludes (0, or -`MARGIN`), two-sided.
        replication: Their mean, low and high over the seeds that were begun last; empty for fewer than two.
        verdict: supported, contradicted or undecided; not run without two seeds.
        holm: Whether the verdict stays when all claims are tested together (Holm at 5%).
    """

    claim: Row
    by_seed: list[float]
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    over_questions: float = math.nan
    p: float = math.nan
    replication: dict[str, float] = field(default_factory=dict)
    verdict: str = "not run"
    holm: bool = False


def values(record: Row, measure: str) -> np.ndarray:
    """A measure for each question, in points: 0 or 100, or -100 to 100 for `gap`.

    Args:
        record: A line of the results.
        measure: cot, direct, gap (cot - direct) or faithful (no hallucinated digit).
    """
    if measure == "gap":
        return values(record, "cot") - values(record, "direct")
    name = "hallucinated" if measure == "faithful" else measure
    bits = unpack(record[f"{name}_bits"], record["num"])
    return 100.0 * (~bits if measure == "faithful" else bits)


def findings(study: Study, records: Records) -> list[Finding]:
    """Every claim with its verdict, in the order of the YAML."""
    found = [_find(study, claim, records) for claim in study.claims]
    firm = holm([finding.p for finding in found])
    return [
        Finding(**{**vars(finding), "holm": stays and finding.verdict in ("supported", "contradicted")})
        for finding, stays in zip(found, firm, strict=True)
    ]


def _find(study: Study, claim: Row, records: Records) -> Finding:
    better, worse = (tests(study, records, claim["task"], claim[side]) for side in ("better", "worse"))
    seeds = sorted(better.keys() & worse.keys())
    gains = [values(better[seed], claim["measure"]) - values(worse[seed], claim["measure"]) for seed in seeds]
    means = [float(gain.mean()) for gain in gains]
    found = interval(means)
    if not found:
        return Finding(claim, means)
    error = math.sqrt(sum(float(gain.var(ddof=1)) / len(gain) for gain in gains)) / len(gains)
    threshold = -MARGIN if claim["is"] == "not_less" else 0.0
    verdict = decide(found["low"], found["high"], threshold)
    p = p_value(means, 0.0 if verdict == "contradicted" else threshold)
    again = [mean for seed, mean in zip(seeds, means, strict=True) if seed in study.replication_seeds]
    over_questions = _NORMAL * error
    return Finding(
        claim, means, **found, over_questions=over_questions, p=p, replication=interval(again), verdict=verdict
    )


def interval(differences: Sequence[float]) -> dict[str, float]:
    """Mean and 95% interval over seeds; empty for fewer than two."""
    return mean_interval(differences) if len(differences) > 1 else {}


def decide(low: float, high: float, threshold: float) -> str:
    """The rule: an interval above the threshold supports a claim, one below 0 contradicts it.

    >>> decide(0.2, 1.5, 0.0), decide(-0.5, 1.5, 0.0), decide(-0.5, 1.5, -1.0), decide(-0.9, -0.1, -1.0)
    ('supported', 'undecided', 'supported', 'contradicted')
    """
    if high < 0:
        return "contradicted"
    return "supported" if low > threshold else "undecided"


def p_value(differences: Sequence[float], threshold: float) -> float:
    """Two-sided p of Student's t-test that the mean is the threshold."""
    from scipy.stats import ttest_1samp

    if max(differences) == min(differences):
        return 1.0 if differences[0] == threshold else 0.0
    return float(ttest_1samp(differences, threshold).pvalue)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which hypotheses fall at 5% when all are tested together; nan is no test.

    >>> holm([0.04, 0.001, 0.03, math.nan])
    [False, True, False, False]
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    falls = [False] * len(p_values)
    for rank, (p, place) in enumerate(order):
        if p > _LEVEL / (len(order) - rank):
            break
        falls[place] = True
    return falls
