"""What `mpo report` counts in verdicts and pairs: one pass over rows of any number, of which next to none are kept."""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_builders.engine import drop_reasons
from data_builders.records import InputError, Pair, Row, Verdict
from data_builders.shards import read_rows, read_stage, shard_paths
from mpo.pages import charts
from mpo.pages.drawing import BLUE, CSS_NAMES, GREEN, ORANGE
from mpo.pages.gallery import question_of
from mpo.pages.histograms import Series, histogram, spread
from mpo.pages.texts import count_words

MAX_RULES = 20  # lines of a table; what is rarer is counted together
SIDES = {"chosen": BLUE, "rejected": ORANGE}
_UNITS = {"words": count_words, "characters": len}


@dataclass
class VerdictCounts:
    """Verdicts by source of the question and by the rule that decided."""

    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    rules: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, source: str, verdict: object, rule: object) -> None:
        """Counts a verdict in; what is none of the three, as for a pair that was never judged, is passed over."""
        if verdict in charts.VERDICT_COLORS:
            self.sources[source][str(verdict)] += 1
            self.rules[str(rule)][str(verdict)] += 1

    def section(self) -> Row:
        """What the template shows of them."""
        total = sum(self.sources.values(), Counter())
        return {
            "chart": charts.verdict_chart(self.sources),
            "num": total.total(),
            "shares": [
                (CSS_NAMES[color], verdict, total[verdict], total[verdict] / total.total())
                for verdict, color in charts.VERDICT_COLORS.items()
            ],
            "rules": _largest(self.rules),
            "summary": f"{total.total():,} judged responses from {len(self.sources):,} sources",
        }


def _largest(rules: dict[str, Counter[str]]) -> list[tuple[str, Counter[str]]]:
    ordered = sorted(rules.items(), key=lambda item: (-item[1].total(), item[0]))
    rest = [counts for _, counts in ordered[MAX_RULES:]]
    more = [(f"{len(rest):,} more", sum(rest, Counter()))] if rest else []
    return ordered[:MAX_RULES] + more


def count_verdicts(folder: Path) -> VerdictCounts:
    """Counts the rows of a folder of verdict shards.

    Raises:
        InputError: The shards are missing or broken.
    """
    counts = VerdictCounts()
    for row in read_stage(folder, Verdict):
        counts.add(row.get("source", ""), row["verdict"], row["rule"])
    return counts


@dataclass
class KindCounts:
    """What is counted over the pairs of one kind.

    Attributes:
        lengths: (side, unit) -> how often each length occurs.
        questions: 64 bits of a hash of each pair's question: eight bytes for a pair, where names would take hundreds.
        num_longer: Pairs whose chosen response has more characters than the rejected one.
    """

    lengths: dict[tuple[str, str], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    questions: array = field(default_factory=lambda: array("Q"))
    num_longer: int = 0

    def add(self, pair: Row) -> None:
        """Counts a pair in."""
        digest = hashlib.sha256(question_of(pair).encode(errors="replace")).digest()
        self.questions.append(int.from_bytes(digest[:8]))
        self.num_longer += len(pair["chosen"]) > len(pair["rejected"])
        for side in SIDES:
            for unit, measure in _UNITS.items():
                self.lengths[side, unit][measure(pair[side])] += 1

    def row(self, kind: str) -> Row:
        """The line of the table, and the histograms of lengths: means over pairs, and pairs per question."""
        num, per_question = len(self.questions), pairs_per_question([self.questions])
        means = {
            f"{side}_{unit}": sum(length * times for length, times in counts.items()) / num
            for (side, unit), counts in self.lengths.items()
        }
        return {
            "kind": kind, "num": num, "num_questions": per_question.total(), "most_pairs": max(per_question),
            "mean_pairs": num / per_question.total(), "longer": self.num_longer / num, "charts": self._charts(kind),
            **means,
        }  # fmt: skip

    def _charts(self, kind: str) -> list[Row]:
        return [
            {
                "unit": unit,
                "chart": histogram(
                    f"{kind}-{unit}",
                    [Series(side, self.lengths[side, unit], color) for side, color in SIDES.items()],
                    unit,
                ),
                "spreads": [(CSS_NAMES[SIDES[side]], side, spread(self.lengths[side, unit])) for side in SIDES],
            }
            for unit in _UNITS
        ]


def pairs_per_question(questions: list[array]) -> Counter[int]:
    """How many questions have one pair, two pairs and so on.

    >>> pairs_per_question([array("Q", [7, 7, 8]), array("Q", [8, 9])])
    Counter({2: 2, 1: 1})
    """
    together = np.concatenate([np.frombuffer(part, dtype=np.uint64) for part in questions])
    _, times = np.unique(together, return_counts=True)
    return Counter(times.tolist())


@dataclass
class PairCounts:
    """What is counted over all pairs."""

    kinds: dict[str, KindCounts] = field(default_factory=lambda: defaultdict(KindCounts))
    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    verdicts: VerdictCounts = field(default_factory=VerdictCounts)

    def add(self, pair: Row) -> None:
        """Counts a pair in."""
        source = pair.get("source", "")
        self.kinds[pair["kind"]].add(pair)
        self.sources[source][pair["kind"]] += 1
        for side in SIDES:
            meta = pair.get(f"{side}_meta") or {}
            self.verdicts.add(source, meta.get("verdict"), meta.get("rule"))

    def section(self) -> Row:
        """What the template shows of them."""
        per_question = pairs_per_question([counts.questions for counts in self.kinds.values()])
        num = sum(len(counts.questions) for counts in self.kinds.values())
        series = [Series("questions", per_question, GREEN)]
        kinds = [kind for kind in charts.KIND_COLORS if kind in self.kinds]
        return {
            "num": num,
            "num_questions": per_question.total(),
            "num_sources": len(self.sources),
            "longer": sum(counts.num_longer for counts in self.kinds.values()) / num,
            "rows": [self.kinds[kind].row(kind) for kind in kinds],
            "sources": charts.kind_chart(self.sources),
            "colors": [(CSS_NAMES[charts.KIND_COLORS[kind]], kind) for kind in kinds],
            "per_question": histogram("per-question", series, "pairs of a question", wide=True),
            "per_question_spread": spread(per_question),
            "verdicts": self.verdicts.section() if self.verdicts.sources else None,
        }


def read_pairs(folders: list[str]) -> Iterator[Row]:
    """The pairs of all folders, one after the other; of some a step may have left nothing.

    Raises:
        InputError: A folder is missing or broken, or none of them holds a pair.
    """
    empty = True
    for path in (path for folder in folders for path in shard_paths(Path(folder))):
        for row in read_rows(path, Pair):
            empty = False
            yield row
    if empty:
        raise InputError(f"{', '.join(folders)} holds no row: the step that writes it produced nothing.")


def left_out(folders: list[str]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Of each folder why the step that filled it left rows out, and how many, the commonest reason first."""
    reasons = [(Path(folder).name, drop_reasons(Path(folder)).most_common()) for folder in folders]
    return [(name, counts) for name, counts in reasons if counts]
