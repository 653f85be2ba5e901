"""`mpo pair`: neither the order of the input nor its files, workers or kills change a byte of the pairs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_builders import partition
from data_builders.pair import PairConfig, run
from data_builders.records import InputError, Pair, Row
from data_builders.shards import read_rows, read_stage, write_rows

ROOT = Path(__file__).parent.parent


def verdict(text: str, value: str, question: str, source: str = "count") -> Row:
    row = {"id": question, "images": ["a.png"], "question": question, "answer": "3", "source": source}
    row |= {"prompt": f"{question} Think.", "response": text, "finish_reason": "stop", "sampler": {"model": "m"}}
    return {**row, "verdict": value, "prediction": text, "rule": "number"}


def many(question: str, count: int = 6, source: str = "count") -> list[Row]:
    """`count` right and as many wrong responses to a question."""
    good = [verdict(f"good {number}", "correct", question, source) for number in range(count)]
    return good + [verdict(f"bad {number}", "wrong", question, source) for number in range(count)]


def content(folder: str | Path) -> dict[str, bytes]:
    """All files that a run left but `settings.json`, hidden ones too."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != "settings.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def pairs_of(folder: str | Path) -> list[Row]:
    return list(read_stage(Path(folder)))


@pytest.fixture
def config(tmp_path: Path) -> PairConfig:
    """Two shards with four questions, one of which is spread over both and one of which makes no pair."""
    write_rows(tmp_path / "verdicts" / "00000.jsonl", [*many("p"), *many("q"), *many("r", 2)[:1]])
    rows = [*many("r", 2)[1:], verdict("3", "correct", "easy"), verdict("3", "correct", "bare", "")]
    write_rows(tmp_path / "verdicts" / "00001.jsonl", [*rows, verdict("hm", "no_answer", "bare", "")])
    return PairConfig(verdicts=str(tmp_path / "verdicts"), output=str(tmp_path / "pairs"))


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairConfig:
    """Thirty questions of three sources, 270 responses in one file, which make five buckets."""
    monkeypatch.setattr(partition, "BUCKET_BYTES", 2**14)
    rows = [row for n in range(30) for row in many(f"q{n}", 2 + n % 6, source=f"s{n % 3}")]
    write_rows(tmp_path / "verdicts.jsonl", rows)
    return PairConfig(verdicts=str(tmp_path / "verdicts.jsonl"), output=str(tmp_path / "pairs"))


def test_the_verb_writes_pairs_and_counts_questions_and_pairs_by_source(config: PairConfig) -> None:
    summary = run(config)
    rows = list(read_rows(Path(config.output) / "00000.jsonl", Pair))
    assert Counter(row["question_id"] for row in rows) == {"p": 15, "q": 15, "r": 4, "bare": 1}
    assert summary.columns == [
        *("source", "questions", "with pairs", "pairs", "correctness", "format", "pairs per question")
    ]
    assert summary.rows == [
        ["(no source)", "1", "1", "1", "0", "1", "1.0"],
        ["count", "4", "3", "34", "34", "0", "8.5"],
    ]
    dropped = Path(config.output) / "dropped"
    assert summary.notes == [f"Left out: 1 questions with only correct responses; listed in {dropped}."]
    assert list(read_stage(dropped)) == [
        {"id": "easy", "source": "count", "reason": "questions with only correct responses", "count": 1}
    ]
    assert f"mpo train --data {config.output} " in summary.next_command


def test_nothing_but_shards_and_what_was_left_out_stays(large: PairConfig) -> None:
    run(large)
    assert sorted(content(large.output)) == [f"0000{number}.jsonl" for number in range(5)]
    assert sum(path.is_dir() for path in Path(large.output).iterdir()) == 0


@pytest.mark.parametrize("max_per_source", [None, 20])
def test_order_and_files_of_the_input_change_nothing(
    large: PairConfig, tmp_path: Path, max_per_source: int | None
) -> None:
    large = replace(large, max_per_source=max_per_source)
    run(large)
    rows = list(read_stage(Path(large.verdicts)))
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        folder = tmp_path / f"in{seed}"
        for number, start in enumerate(range(0, len(rows), 50 + 20 * seed)):
            write_rows(folder / f"{number:05d}.jsonl", shuffled[start : start + 50 + 20 * seed])
        output = str(tmp_path / f"out{seed}")
        run(replace(large, verdicts=str(folder), output=output))
        assert content(output) == content(large.output)


@pytest.mark.parametrize("max_per_source", [None, 20])
def test_the_number_of_workers_changes_nothing(large: PairConfig, tmp_path: Path, max_per_source: int | None) -> None:
    large = replace(large, max_per_source=max_per_source)
    run(large)
    run(replace(large, workers=2, output=str(tmp_path / "two")))
    assert content(tmp_path / "two") == content(large.output)


@pytest.fixture
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, log_to_driver=False, configure_logging=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_ray_cluster_changes_nothing(large: PairConfig, tmp_path: Path) -> None:
    large = replace(large, max_per_source={"s0": 20})
    run(large)
    run(replace(large, workers=2, ray="auto", output=str(tmp_path / "ray")))
    assert content(tmp_path / "ray") == content(large.output)


def test_the_number_of_buckets_changes_nothing_but_the_cut(large: PairConfig, tmp_path: Path) -> None:
    run(large)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "BUCKET_BYTES", 2**20)
        run(replace(large, output=str(tmp_path / "one")))
    assert pairs_of(tmp_path / "one") == pairs_of(large.output)
    assert len(content(tmp_path / "one")) == 1


def test_the_hash_seed_of_the_process_changes_nothing(config: PairConfig, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        arguments = {"verdicts": config.verdicts, "output": str(tmp_path / seed), "dedupe_similarity": 0.9}
        code = f"from data_builders.pair import *; run(PairConfig(**{arguments}))"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert len(content(tmp_path / "1")) == 2


def test_questions_sampled_twice_and_joined_pair_across_the_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "first.jsonl", [verdict("3", "correct", "p"), verdict("3", "correct", "q")])
    write_rows(tmp_path / "in" / "second.jsonl", [verdict("4", "wrong", "q"), verdict("5", "wrong", "p")])
    run(PairConfig(verdicts=str(tmp_path / "in"), output=str(tmp_path / "out")))
    made = [(pair["question_id"], pair["chosen"], pair["rejected"]) for pair in pairs_of(tmp_path / "out")]
    assert sorted(made) == [("p", "3", "5"), ("q", "3", "4")]


@pytest.mark.parametrize("limits", [20, {"s0": 20, "s1": 20, "s2": 20}])
def test_no_source_gives_more_pairs_than_its_limit(large: PairConfig, limits: int | dict[str, int]) -> None:
    summary = run(replace(large, max_per_source=limits))
    pairs = pairs_of(large.output)
    assert Counter(pair["source"] for pair in pairs) == {"s0": 20, "s1": 20, "s2": 20}
    assert [row[0:4:3] for row in summary.rows] == [["s0", "20"], ["s1", "20"], ["s2", "20"]]
    assert [row[1] for row in summary.rows] == ["10", "10", "10"]
    assert "pairs over the limit of their source" in summary.notes[0]


def test_the_pairs_under_a_limit_are_some_of_those_without_it_and_the_same_under_a_smaller_one(
    large: PairConfig, tmp_path: Path
) -> None:
    kept = []
    for number, limit in enumerate((10, 30, None)):
        output = str(tmp_path / str(number))
        run(replace(large, max_per_source=limit, output=output))
        kept.append({json.dumps(pair) for pair in pairs_of(output)})
    assert kept[0] < kept[1] < kept[2]


def test_only_the_sources_that_are_named_are_limited_and_an_unknown_one_is_said(large: PairConfig) -> None:
    summary = run(replace(large, max_per_source={"s1": 7, "s9": 7, "s2": 1000}))
    assert Counter(pair["source"] for pair in pairs_of(large.output)) == {"s0": 95, "s1": 7, "s2": 150}
    assert summary.notes[1] == "`max_per_source` names 's9', and there is no such source."


def test_a_limit_depends_on_the_seed(large: PairConfig, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(replace(large, max_per_source=5, max_pairs=100, seed=seed, output=str(tmp_path / str(seed))))
    assert pairs_of(tmp_path / "0") != pairs_of(tmp_path / "1")


KILLED = """
import os, signal, sys
from pathlib import Path
from data_builders import partition
from data_builders.pair import PairConfig, run

verdicts, folder = sys.argv[1:]
partition.BUCKET_BYTES, partition.BUFFER_BYTES = 2**15, 2**14
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def pair(output, last=None):
    '''Runs in a process of its own, which is killed just before it touches the output for the `last` time.'''
    if (child := os.fork()) == 0:
        count = 0
        def hook(event, arguments):
            nonlocal count
            if event in EVENTS and output in str(arguments[0]):
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        run(PairConfig(verdicts=verdicts, output=output, max_per_source={"s0": 20}))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(output):
    files = (path for path in Path(output).rglob("*") if path.is_file() and "settings.json" not in path.name)
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


assert pair(f"{folder}/whole") == 0
moments = 0
while True:
    output = f"{folder}/{moments}"
    if (code := pair(output, moments + 1)) == 0:
        break
    assert code == -signal.SIGKILL, code
    assert pair(output, moments // 2 + 1) in (0, -signal.SIGKILL)
    assert pair(output) == 0
    assert content(output) == content(f"{folder}/whole"), moments
    moments += 1
print(moments)
"""


def test_a_run_that_is_killed_anywhere_and_started_again_ends_with_the_same_files(
    large: PairConfig, tmp_path: Path
) -> None:
    """At every moment at which it opens, renames or removes a file; and then again at another one."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, large.verdicts, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40
    names = [f"0000{number}.jsonl" for number in range(3)]
    assert sorted(content(tmp_path / "whole")) == [*names, *(f"dropped/{name}" for name in names)]


def test_workers_that_are_killed_in_the_middle_leave_work_that_goes_on(large: PairConfig, tmp_path: Path) -> None:
    run(large)
    output = tmp_path / "again"
    arguments = {"verdicts": large.verdicts, "output": str(output), "workers": 2}
    code = f"""
import time
from data_builders import pair, partition
partition.BUCKET_BYTES = 2**14
pair.run(pair.PairConfig(**{arguments}))
"""
    script = tmp_path / "killed.py"
    script.write_text(f"if __name__ == '__main__':\n{''.join(f'    {line}' for line in code.splitlines(True))}")
    process = subprocess.Popen(
        [sys.executable, str(script)], start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while not (output / "00000.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(replace(large, output=str(output), workers=2))
    assert content(output) == content(large.output)


def test_a_shard_that_is_gone_is_made_again_and_the_others_are_not(large: PairConfig) -> None:
    run(large)
    before = content(large.output)
    other = Path(large.output) / "00002.jsonl"
    changed = other.stat().st_mtime_ns
    (Path(large.output) / "00001.jsonl").unlink()
    run(large)
    assert content(large.output) == before
    assert other.stat().st_mtime_ns == changed


def test_a_run_that_is_done_is_summed_up_again_without_work(
    large: PairConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(large)
    monkeypatch.setattr(partition, "_fill", None)
    assert run(large) == first


@pytest.mark.parametrize(
    "change",
    [
        {"max_pairs": 4},
        {"seed": 1},
        {"kinds": ["format"]},
        {"max_length_ratio": 2.0},
        {"max_repetition": 0.5},
        {"max_per_source": 3},
    ],
)
def test_another_setting_wants_another_folder(config: PairConfig, change: dict[str, object]) -> None:
    run(config)
    with pytest.raises(InputError, match=f"other settings \\({next(iter(change))}: then"):
        run(replace(config, **change))


def test_workers_and_the_order_of_kinds_are_no_other_settings(config: PairConfig) -> None:
    first = run(config)
    assert run(replace(config, workers=2, kinds=["format", "correctness"])) == first


@pytest.mark.parametrize("limit", [0, -1, {"count": 0}])
def test_a_limit_below_one_is_refused(config: PairConfig, limit: int | dict[str, int]) -> None:
    with pytest.raises(InputError, match="`max_per_source` must be at least 1, got (0|-1)"):
        replace(config, max_per_source=limit)
    with pytest.raises(InputError, match="`workers` must be at least 1"):
        replace(config, workers=0)
    with pytest.raises(InputError, match="`max_pairs` must be at least 1"):
        replace(config, max_pairs=0)


def test_rows_that_are_no_verdicts_are_refused_with_file_and_line_and_leave_nothing(config: PairConfig) -> None:
    path = Path(config.verdicts) / "00001.jsonl"
    before = path.read_bytes()
    write_rows(path, [{name: value for name, value in many("s")[0].items() if name != "verdict"}])
    with pytest.raises(InputError, match=r"00001\.jsonl, line 1: `verdict` is missing"):
        run(config)
    assert not Path(config.output).exists()
    path.write_bytes(before)
    assert len(run(config).rows) == 2


def test_a_broken_row_does_not_take_what_else_is_in_the_folder(config: PairConfig) -> None:
    Path(config.output).mkdir()
    (Path(config.output) / "notes.txt").write_text("mine")
    (Path(config.verdicts) / "00002.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="line 1: `id` is missing"):
        run(config)
    assert content(config.output) == {"notes.txt": b"mine"}


def test_no_pair_at_all_is_said_and_not_hidden(config: PairConfig, tmp_path: Path) -> None:
    write_rows(tmp_path / "easy.jsonl", [verdict("3", "correct", "p"), verdict("three", "correct", "p")])
    summary = run(replace(config, verdicts=str(tmp_path / "easy.jsonl")))
    assert summary.rows == [["count", "1", "0", "0", "0", "0", "0.0"]]
    assert "1 questions with only correct responses" in summary.notes[0]
