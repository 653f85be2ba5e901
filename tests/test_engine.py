"""Running a step over chunks: what is made, what is not made again, and that a kill at any moment changes nothing."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import engine_steps
import pytest
from engine_steps import Answering, answer

from data_builders.engine import Chunk, EngineConfig, Span, Step, chunks_of_rows, drop_note, drop_reasons, run_step
from data_builders.records import InputError, Question, Row
from data_builders.shards import Place, read_rows, read_stage, write_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Seven questions, which are four chunks of at most two."""
    write_rows(tmp_path / "q.jsonl", [{"id": f"q-{number}", "question": f"{number}?"} for number in range(7)])
    return tmp_path / "q.jsonl"


def run(step: Step, questions: Path, output: Path) -> None:
    chunks = chunks_of_rows(questions, Question, 2)
    run_step(lambda: step, chunks, EngineConfig(output=str(output)), title="answering")


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


@pytest.mark.parametrize("size", [0, -1])
def test_a_shard_size_below_one_is_refused(questions: Path, size: int) -> None:
    with pytest.raises(InputError, match=f"`shard_size` must be at least 1, got {size}"):
        chunks_of_rows(questions, Question, size)


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

    def make() -> Step:
        raise AssertionError("made again")

    chunk = Chunk("a.jsonl", (Span(tmp_path / "gone.jsonl", Place(), 1),))
    run_step(make, [chunk], EngineConfig(output=str(tmp_path)), title="answering")
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
import sys
from pathlib import Path
from data_builders.engine import EngineConfig, chunks_of_rows, run_step
from data_builders.records import Question
from engine_steps import Answering

if __name__ == "__main__":
    config = EngineConfig(output=sys.argv[2], workers=int(sys.argv[3]))
    chunks = chunks_of_rows(Path(sys.argv[1]), Question, 1)
    run_step(Answering(seconds=float(sys.argv[4])), chunks, config, title="working")
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_is_killed_at_work_leaves_whole_shards_and_its_successor_ends_with_the_same_files(
    questions: Path, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "slow_run.py").write_text(SLOW_RUN)

    def start(output: str, seconds: float) -> subprocess.Popen[bytes]:
        arguments = [str(questions), str(tmp_path / output), str(workers), str(seconds)]
        return subprocess.Popen(
            [sys.executable, str(tmp_path / "slow_run.py"), *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    assert start("whole", 0).wait() == 0
    victim = start("killed", 0.2)
    while not (tmp_path / "killed" / "00002.jsonl").exists():
        assert victim.poll() is None
        time.sleep(0.01)
    os.killpg(victim.pid, signal.SIGKILL)
    assert victim.wait() == -9
    whole, left = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert 3 <= len([name for name in left if "/" not in name]) < 7
    assert left.items() <= whole.items()
    half = tmp_path / "killed" / ".00006.jsonl.12345.tmp"
    half.write_text('{"id": "q-6", "quest')
    assert start("killed", 0).wait() == 0
    assert content(tmp_path / "killed") == whole
    assert not half.exists()


def test_several_processes_write_the_same_files_as_one(questions: Path, tmp_path: Path) -> None:
    run(answer, questions, tmp_path / "one")
    config = EngineConfig(output=str(tmp_path / "two"), workers=2)
    run_step(Answering(), chunks_of_rows(questions, Question, 2), config, title="answering")
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_a_worker_that_is_lost_is_told_from_a_fault_and_the_same_command_goes_on(
    questions: Path, tmp_path: Path
) -> None:
    run(answer, questions, tmp_path / "whole")
    config = EngineConfig(output=str(tmp_path / "out"), workers=2)
    step = Answering(die_at="q-5", marker=str(tmp_path / "died"))
    chunks = chunks_of_rows(questions, Question, 2)
    with pytest.raises(InputError, match="a worker process died.*The same command goes on"):
        run_step(step, chunks, config, title="answering")
    assert content(tmp_path / "out").items() < content(tmp_path / "whole").items()
    run_step(step, chunks, config, title="answering")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_step_complains_of_reaches_the_user(questions: Path, tmp_path: Path, workers: int) -> None:
    config = EngineConfig(output=str(tmp_path / "out"), workers=workers)
    with pytest.raises(InputError, match="question 'q-6' cannot be answered"):
        run_step(Answering(refuse="q-6"), chunks_of_rows(questions, Question, 2), config, title="answering")


def test_a_full_disk_is_said_and_the_same_command_goes_on(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    write_rows(questions, [{"id": f"q-{number}", "question": "?" * 10**6 * number} for number in range(1, 5)])
    run(answer, questions, tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 10**6, limits[1]))  # writing beyond it fails as on a full disk
    try:
        with pytest.raises(InputError, match="00001.jsonl could not be written: .* Make room"):
            run(answer, questions, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(content(tmp_path / "out")) == ["00000.jsonl", "dropped/00000.jsonl", "dropped/00001.jsonl"]
    run(answer, questions, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_said(questions: Path, tmp_path: Path, address: str) -> None:
    config = EngineConfig(output=str(tmp_path / "ray"), ray=address)
    with pytest.raises(InputError, match=f"no Ray cluster at '{address}'"):
        run_step(Answering(), chunks_of_rows(questions, Question, 2), config, title="answering")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, whose workers get the steps of these tests by value."""
    import ray

    ray.init(num_cpus=2, log_to_driver=False, configure_logging=False, include_dashboard=False)
    ray.cloudpickle.register_pickle_by_value(engine_steps)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_ray_writes_the_same_files_as_one_process(questions: Path, tmp_path: Path) -> None:
    run(answer, questions, tmp_path / "one")
    config = EngineConfig(output=str(tmp_path / "ray"), workers=2, ray="auto")
    run_step(Answering(), chunks_of_rows(questions, Question, 2), config, title="answering")
    assert content(tmp_path / "ray") == content(tmp_path / "one")


@pytest.mark.usefixtures("cluster")
def test_ray_repeats_what_a_lost_worker_was_at(questions: Path, tmp_path: Path) -> None:
    run(answer, questions, tmp_path / "one")
    config = EngineConfig(output=str(tmp_path / "ray"), workers=2, ray="auto")
    step = Answering(die_at="q-3", marker=str(tmp_path / "died"))
    run_step(step, chunks_of_rows(questions, Question, 2), config, title="answering")
    assert (tmp_path / "died").exists()
    assert content(tmp_path / "ray") == content(tmp_path / "one")


@pytest.mark.usefixtures("cluster")
def test_what_a_step_complains_of_reaches_the_user_from_ray(questions: Path, tmp_path: Path) -> None:
    config = EngineConfig(output=str(tmp_path / "ray"), ray="auto")
    with pytest.raises(InputError, match="question 'q-6' cannot be answered"):
        run_step(Answering(refuse="q-6"), chunks_of_rows(questions, Question, 2), config, title="answering")


def test_without_ray_its_install_line_is_said(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = EngineConfig(output=str(tmp_path / "ray"), ray="local")
    with pytest.raises(InputError, match="pip install 'mpo\\[ray\\]'"):
        run_step(Answering(), chunks_of_rows(questions, Question, 2), config, title="answering")


@pytest.mark.parametrize("workers", [0, -2])
def test_fewer_than_one_worker_is_refused(workers: int) -> None:
    with pytest.raises(InputError, match="`workers` must be at least 1"):
        EngineConfig(output="out", workers=workers)
