"""Running a step over chunks: what is made, what is not made again, and that a kill at any moment changes nothing."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_builders.engine import Chunk, chunks_of_rows, chunks_of_shards, drop_note, drop_reasons, run_step
from data_builders.records import InputError, Question, Row
from data_builders.shards import read_rows, read_stage, write_rows

ROOT = Path(__file__).parent.parent
Step = Callable[[list[Row]], tuple[list[Row], list[Row]]]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Seven questions, which are four chunks of at most two."""
    write_rows(tmp_path / "q.jsonl", [{"id": f"q-{number}", "question": f"{number}?"} for number in range(7)])
    return tmp_path / "q.jsonl"


def answer(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Answers every question but the third and the fifth."""
    dropped = {"q-2": "too hard", "q-4": "too easy"}
    return (
        [{**row, "answer": row["question"][:-1]} for row in rows if row["id"] not in dropped],
        [{"id": row["id"], "reason": dropped[row["id"]]} for row in rows if row["id"] in dropped],
    )


def run(step: Step, questions: Path, output: Path) -> None:
    run_step(step, chunks_of_rows(questions, Question, 2), output, title="answering")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jsonl")}


def test_a_file_is_cut_into_chunks_in_its_order(questions: Path) -> None:
    chunks = chunks_of_rows(questions, Question, 3)
    assert [(chunk.name, chunk.size) for chunk in chunks] == [
        ("00000.jsonl", 3),
        ("00001.jsonl", 3),
        ("00002.jsonl", 1),
    ]
    assert [[row["id"] for row in chunk.rows()] for chunk in chunks] == [
        ["q-0", "q-1", "q-2"],
        ["q-3", "q-4", "q-5"],
        ["q-6"],
    ]


def test_chunks_run_across_the_shards_of_a_folder(tmp_path: Path) -> None:
    for number in range(3):
        write_rows(tmp_path / f"{number}.jsonl", [{"id": f"{number}{letter}", "question": "?"} for letter in "ab"])
    chunks = chunks_of_rows(tmp_path, Question, 4)
    assert [[row["id"] for row in chunk.rows()] for chunk in chunks] == [["0a", "0b", "1a", "1b"], ["2a", "2b"]]


def test_a_broken_row_is_found_before_the_first_chunk_is_worked_on(questions: Path) -> None:
    with questions.open("a", encoding="utf-8") as file:
        file.write('{"id": "q-7"}\n')
    with pytest.raises(InputError, match="line 8: `question` is missing"):
        chunks_of_rows(questions, Question, 2)


def test_missing_input_is_found_before_the_first_chunk_is_worked_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        chunks_of_rows(tmp_path / "missing", Question, 2)
    with pytest.raises(InputError, match="does not exist"):
        chunks_of_shards(tmp_path / "missing", Question)


@pytest.mark.parametrize("size", [0, -1])
def test_a_shard_size_below_one_is_refused(questions: Path, size: int) -> None:
    with pytest.raises(InputError, match=f"`shard_size` must be at least 1, got {size}"):
        chunks_of_rows(questions, Question, size)


def test_shards_keep_their_names_and_are_read_when_their_turn_comes(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [{"id": "b", "question": "?"}])
    write_rows(tmp_path / "a.jsonl", [{"id": "a", "question": "?"}])
    chunks = chunks_of_shards(tmp_path, Question)
    write_rows(tmp_path / "a.jsonl", [{"id": "late", "question": "?"}])
    assert [(chunk.name, chunk.rows()[0]["id"]) for chunk in chunks] == [("a.jsonl", "late"), ("b.jsonl", "b")]


def test_a_file_with_another_ending_becomes_a_shard_that_the_next_step_finds(tmp_path: Path, questions: Path) -> None:
    source = questions.rename(tmp_path / "questions.json")
    run_step(answer, chunks_of_shards(source, Question), tmp_path / "out", title="answering")
    assert len(list(read_stage(tmp_path / "out"))) == 5


def test_every_chunk_becomes_a_shard_and_what_was_left_out_is_listed(questions: Path, tmp_path: Path) -> None:
    run(answer, questions, tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == [
        *(f"0000{number}.jsonl" for number in range(4)),
        "dropped/00001.jsonl",
        "dropped/00002.jsonl",
    ]
    assert [row["id"] for row in read_stage(tmp_path / "out")] == ["q-0", "q-1", "q-3", "q-5", "q-6"]


def test_a_chunk_of_which_nothing_is_left_is_an_empty_shard_and_is_not_made_again(
    questions: Path, tmp_path: Path
) -> None:
    calls = []

    def drop_all(rows: list[Row]) -> tuple[list[Row], list[Row]]:
        calls.append(len(rows))
        return [], [{"id": row["id"], "reason": "no"} for row in rows]

    run(drop_all, questions, tmp_path / "out")
    run(drop_all, questions, tmp_path / "out")
    assert calls == [2, 2, 2, 1]
    assert (tmp_path / "out" / "00000.jsonl").read_bytes() == b""


def test_what_was_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    assert drop_note(tmp_path) == []
    reasons = ["failed"] + ["cut off"] * 1200
    write_rows(tmp_path / "dropped" / "00000.jsonl", [{"id": str(i), "reason": r} for i, r in enumerate(reasons)])
    write_rows(tmp_path / "dropped" / "00001.jsonl", [{"id": "z", "reason": "failed"}])
    assert drop_reasons(tmp_path) == {"cut off": 1200, "failed": 2}
    assert drop_note(tmp_path) == [f"Left out: 1,200 cut off, 2 failed; listed in {tmp_path / 'dropped'}."]


def test_shards_that_exist_are_not_made_again(questions: Path, tmp_path: Path) -> None:
    output, asked = tmp_path / "out", []
    write_rows(output / "00001.jsonl", [{"id": "made before"}])

    def step(rows: list[Row]) -> tuple[list[Row], list[Row]]:
        asked.extend(row["id"] for row in rows)
        return rows, []

    run(step, questions, output)
    assert asked == ["q-0", "q-1", "q-4", "q-5", "q-6"]
    assert list(read_rows(output / "00001.jsonl")) == [{"id": "made before"}]
    run(step, questions, output)
    assert len(asked) == 5


def test_rows_of_shards_that_exist_are_not_even_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [])

    def rows() -> list[Row]:
        raise AssertionError("read again")

    run_step(answer, [Chunk("a.jsonl", rows, 1)], tmp_path, title="answering")
    assert list(read_rows(tmp_path / "a.jsonl")) == []


@pytest.mark.parametrize("stopping", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_stopped_in_the_middle_goes_on_where_it_was(
    questions: Path, tmp_path: Path, stopping: type[BaseException]
) -> None:
    run(answer, questions, tmp_path / "whole")
    calls = 0

    def stop_at_the_third(rows: list[Row]) -> tuple[list[Row], list[Row]]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise stopping
        return answer(rows)

    with pytest.raises(stopping):
        run(stop_at_the_third, questions, tmp_path / "stopped")
    assert sorted(content(tmp_path / "stopped")) == ["00000.jsonl", "00001.jsonl", "dropped/00001.jsonl"]
    run(stop_at_the_third, questions, tmp_path / "stopped")
    assert calls == 5
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["00002.jsonl", "dropped"])
def test_a_run_that_is_stopped_while_it_writes_goes_on_where_it_was(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(answer, questions, tmp_path / "whole")

    def write_or_stop(path: Path, rows: list[Row]) -> None:
        if name in (path.name, path.parent.name):
            raise KeyboardInterrupt
        write_rows(path, rows)

    monkeypatch.setattr("data_builders.engine.write_rows", write_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run(answer, questions, tmp_path / "stopped")
    assert content(tmp_path / "stopped") != content(tmp_path / "whole")
    monkeypatch.undo()
    run(answer, questions, tmp_path / "stopped")
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


SLOW_RUN = """
import sys, time
from pathlib import Path
from data_builders.engine import chunks_of_rows, run_step
from data_builders.records import Question

def step(rows):
    time.sleep(float(sys.argv[3]))
    return rows, [{"id": row["id"], "reason": "seen"} for row in rows]

run_step(step, chunks_of_rows(Path(sys.argv[1]), Question, 1), Path(sys.argv[2]), title="working")
"""


def test_a_process_that_is_killed_at_work_leaves_whole_shards_and_its_successor_ends_with_the_same_files(
    questions: Path, tmp_path: Path
) -> None:
    def start(output: str, seconds: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SLOW_RUN, str(questions), str(tmp_path / output), str(seconds)]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)

    assert start("whole", 0).wait() == 0
    victim = start("killed", 0.1)
    while not (tmp_path / "killed" / "00002.jsonl").exists():
        assert victim.poll() is None
        time.sleep(0.01)
    victim.kill()
    assert victim.wait() == -9
    whole, left = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert 3 <= len([name for name in left if "/" not in name]) < 7
    assert left.items() <= whole.items()
    assert start("killed", 0).wait() == 0
    assert content(tmp_path / "killed") == whole
