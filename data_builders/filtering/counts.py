"""How many rows a filter was given and kept, by category; a row without a category goes by its source.

`filter.json` stands beside the shards:

    {"version": 1, "judge": {"model", "prompt", "min_p_yes"} or null,
     "categories": [{"category", "before", "after", "removed", "removed_share"}], "total": {the same, of all},
     "reasons": [{"category", "reason", "rows"}]}
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from data_builders.engine import DROPPED
from data_builders.records import Row
from data_builders.shards import read_rows, shard_paths

COUNTS_FILE = "filter.json"
VERSION = 1


def removal_table(before: Mapping[str, int], after: Mapping[str, int]) -> list[Row]:
    """What a filter removed of each category, in the order of `before`.

    Args:
        before: Rows of each category.
        after: Those that are left; a category that is not there has none.

    >>> removal_table({"Math": 590_894}, {"Math": 518_393})[0]["removed_share"]
    0.12269713349602467
    """
    return [_removal(category, num, after.get(category, 0)) for category, num in before.items()]


def total_removal(before: Mapping[str, int], after: Mapping[str, int]) -> Row:
    """The same of all categories together."""
    return _removal("all", sum(before.values()), sum(after.values()))


def _removal(category: str, before: int, after: int) -> Row:
    removed = before - after
    share = removed / before if before else 0.0
    return {"category": category, "before": before, "after": after, "removed": removed, "removed_share": share}


def table_cells(removal: Row) -> list[str]:
    """A line of the table for the terminal: category, before, after, share removed."""
    return [
        removal["category"], f"{removal['before']:,}", f"{removal['after']:,}", f"{removal['removed_share']:.1%}"
    ]  # fmt: skip


def count_rows(output: Path, judge: Row | None) -> Row:
    """What `filter.json` holds, from the shards as they stand on disk.

    Args:
        output: The folder that a filter has filled.
        judge: Who judged, if a model did.
    """
    after = Counter(category_of(row) for path in shard_paths(output) for row in read_rows(path))
    reasons: Counter[tuple[str, str]] = Counter()
    for path in sorted((output / DROPPED).glob("*.jsonl")):
        reasons.update((category_of(dropped["row"]), dropped["reason"]) for dropped in read_rows(path))
    before = after.copy()
    for (category, _), num in reasons.items():
        before[category] += num
    before = dict(sorted(before.items()))
    return {
        "version": VERSION,
        "judge": judge,
        "categories": removal_table(before, after),
        "total": total_removal(before, after),
        "reasons": [
            {"category": category, "reason": reason, "rows": num}
            for (category, reason), num in sorted(reasons.items())
        ],
    }


def category_of(row: Row) -> str:
    """What a row is counted under."""
    return row.get("category") or row.get("source") or "(no category)"
