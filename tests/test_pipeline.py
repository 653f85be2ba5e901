"""benchmarks/pipeline.py runs, its rows are what they should be, and its figures are never asserted."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from data_builders.records import Verdict, check_row

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def pipeline() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield import_module("pipeline")
        del sys.modules["pipeline"], sys.modules["harness"]


def test_the_rows_are_verdicts_of_every_kind_and_of_realistic_length(pipeline: ModuleType) -> None:
    rows = list(pipeline.rows(3200))
    assert [check_row(row, Verdict, "made up") for row in rows[::320]] == rows[::320]
    assert rows == list(pipeline.rows(3200)) != list(pipeline.rows(3200, seed=1))
    counts = Counter(row["verdict"] for row in rows)
    assert all(counts[verdict] > 100 for verdict in ("correct", "wrong", "no_answer"))
    assert 800 < sum(len(json.dumps(row)) for row in rows) / len(rows) < 1600
    assert [row["id"] for row in rows[31:33]] == ["question-0000000", "question-0000001"]


def test_what_is_measured_is_what_both_make(pipeline: ModuleType, tmp_path: Path) -> None:
    pipeline._write_rows(tmp_path / "in.jsonl", 320)
    lines = {}
    for number, (name, task) in enumerate(pipeline.TASKS.items()):
        task(tmp_path / "in.jsonl", tmp_path / str(number))
        lines[name] = sum(path.read_text().count("\n") for path in (tmp_path / str(number)).glob("*.jsonl"))
    assert lines["judge"] == lines["judge, peer"] == 320
    assert 0 < lines["pair, peer"] <= lines["pair"] <= 150


def test_every_task_is_measured_at_every_size(pipeline: ModuleType) -> None:
    results = pipeline.run([64, 128], rounds=1)
    assert json.loads(json.dumps(results)) == results
    assert [step["rows"] for step in results["growth"]] == [64, 128]
    for step in results["growth"]:
        assert list(step["tasks"]) == ["judge", "judge, peer", "pair", "pair, peer"]
        assert all(found["seconds"] > 0 for found in step["tasks"].values())
        assert all(found["peak_bytes"] > 10_000_000 for found in step["tasks"].values())
    console = Console(width=150)
    with console.capture() as captured:
        console.print(*pipeline.tables(results))
    assert "under 1 GiB" in captured.get()
    assert "judge, peer / ours" in captured.get()


def test_a_ratio_above_one_says_that_the_peer_is_slower(pipeline: ModuleType) -> None:
    peer, ours = ([{"seconds": value} for value in values] for values in ([4.0, 6.0, 8.0], [2.0, 2.0, 2.0]))
    ratio = pipeline.ratio_of("pair", pipeline._quotients(peer, ours))
    assert (ratio["low"], ratio["median"], ratio["high"]) == (2.5, 3.0, 3.5)


def test_every_round_begins_with_another_task(pipeline: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(pipeline, "measure", lambda task, source: order.append(task) or {})
    pipeline.take_turns(Path("in.jsonl"), 5)
    assert all(first != second for first, second in pairwise(order[::4]))
    assert [sorted(order[start : start + 4]) for start in range(0, 20, 4)] == 5 * [sorted(pipeline.TASKS)]
