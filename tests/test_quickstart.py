"""The quickstart in the small: the whole chain, skipped when done, gone on with when killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from conftest import quickstart_arguments as arguments

from data_builders.records import InputError
from data_builders.shards import read_rows
from mpo import digits
from mpo.cli import run_verb
from mpo.quickstart import mean_interval


def rows_of(folder: Path) -> dict[str, str]:
    """Everything the data steps wrote, without the folder's own name, which provenance holds."""
    stages = ("responses", "verdicts", "pairs", "dropout_ntp", "evaluation/parts/MPO-direct")
    files = [path for stage in stages for path in sorted((folder / stage).glob("*.jsonl"))]
    return {str(path.relative_to(folder)): path.read_text().replace(str(folder), "") for path in files}


def test_it_goes_from_questions_to_a_report(finished: Path) -> None:
    stages = ["task", "sft", "sample", "judge", "pair", "dropout_ntp", "train", "eval", "gallery", "report"]
    assert list(json.loads((finished / "progress.json").read_text())) == stages
    evaluation = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    assert evaluation["models"] == ["SFT", "MPO"]
    assert evaluation["num_questions"] == 12
    pairs = [row for path in (finished / "pairs").glob("*.jsonl") for row in read_rows(path)]
    assert pairs
    assert all(row["chosen_meta"]["verdict"] == "correct" != row["rejected_meta"]["verdict"] for row in pairs)
    page = (finished / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "12 questions" in page


def test_what_is_done_is_not_done_again(finished: Path, configs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    start = time.perf_counter()
    summary = run_verb("quickstart", arguments(finished, configs))
    assert time.perf_counter() - start < 5
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before
    assert [row[0] for row in summary.rows][:3] == ["task", "sft", "sample"]
    assert any("held-out scans: SFT" in note for note in summary.notes)


def test_other_settings_for_the_same_folder_are_refused(finished: Path, configs: Path) -> None:
    with pytest.raises(InputError, match="stage 'task' .* was run with other settings"):
        run_verb("quickstart", [*arguments(finished, configs), "--seed", "1"])


def test_a_folder_of_the_users_own_is_left_alone(configs: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds data and no progress.json"):
        run_verb("quickstart", arguments(tmp_path, configs))
    assert (tmp_path / "data" / "thesis.txt").read_text() == "years of work"


def test_a_split_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="test or development"):
        run_verb("quickstart", ["--output", str(tmp_path), "--split", "train"])


def test_killed_in_any_stage_it_ends_with_the_same_files(finished: Path, configs: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "mpo", "quickstart", *arguments(output, configs)]
    landmarks = ["data/questions.jsonl", "sft/checkpoint-20", "responses/00002.jsonl", "mpo/checkpoint-1"]
    for landmark in landmarks:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        while not (output / landmark).exists():
            assert process.poll() is None, f"ended before {landmark}"
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run_verb("quickstart", arguments(output, configs))
    assert rows_of(output) == rows_of(finished)
    assert not list(output.rglob("*.tmp"))


def test_several_seeds_give_the_mean_gain(configs: Path, tmp_path: Path) -> None:
    output = tmp_path / "seeds"
    summary = run_verb("quickstart", [*arguments(output, configs), "--seeds", "2", "--split", "development"])
    assert [row[0] for row in summary.rows] == ["seed-0", "seed-1"]
    result = json.loads((output / "seeds.json").read_text())
    assert set(result["mean_gain"]) == {"SFT", "further SFT"}
    gains = [accuracy["MPO"] - accuracy["SFT"] for accuracy in result["accuracy"]]
    assert result["mean_gain"]["SFT"]["mean"] == pytest.approx(sum(gains) / 2)


def test_a_seed_that_fails_says_where_to_look(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("no_such_key: 1\n")
    with pytest.raises(InputError, match="no_such_key"):
        run_verb("quickstart", [*arguments(tmp_path / "out", tmp_path), "--seeds", "2"])


def test_the_interval_of_a_mean_is_students() -> None:
    found = mean_interval([5.7, 5.3, 1.7, 4.0, 4.3])
    assert found["mean"] == pytest.approx(4.2)
    assert found["high"] - found["mean"] == pytest.approx(
        2.776445 * 1.562050 / 5**0.5, abs=1e-4
    )  # t(0.975, 4), deviation


def test_no_scan_is_in_two_parts_and_held_out_scans_never_change() -> None:
    parts = {seed: digits.split_scans(seed) for seed in (0, 1)}
    sizes = {name: len(scans.labels) for name, scans in parts[0].items()}
    assert sizes == {"sft": 60, "preference": 1000, "development": 237, "test": 500}
    assert parts[0]["test"].pixels.tolist() == parts[1]["test"].pixels.tolist()
    assert parts[0]["sft"].pixels.tolist() != parts[1]["sft"].pixels.tolist()
    assert [parts[0]["sft"].labels.tolist().count(digit) for digit in range(10)] == [6] * 10


@pytest.mark.parametrize(
    ("kind", "question", "rationale", "answer"),
    [
        ("largest", "What is the largest digit?", "fourth is 1, largest 8. Final answer: 8", "8"),
        ("count", "How many digits are larger than 4?", "fourth is 1, count 2. Final answer: 2", "2"),
        ("sum", "What is the sum of the digits?", "fourth is 1, sum 17. Final answer: 17", "17"),
    ],
)
def test_rationales_carry_the_running_result(kind: str, question: str, rationale: str, answer: str) -> None:
    asked = digits.ask(kind, [3, 5, 8, 1], 4)
    assert asked[0] == question
    assert asked[1].endswith(rationale)
    assert asked[2] == answer


def test_pictures_hold_their_scans_in_reading_order() -> None:
    import numpy as np

    pixels = np.zeros((1, 4, 8, 8), np.float32)
    pixels[0, 1] = 1.0  # only the top-right digit is bright
    picture = digits.draw_pictures(pixels, np.random.default_rng(0))[0].astype(float)
    quarters = [picture[:16, :16], picture[:16, 16:], picture[16:, :16], picture[16:, 16:]]
    means = [quarter.mean() for quarter in quarters]
    assert means.index(max(means)) == 1
    assert sorted(means)[-2] < 30 < 80 < max(means)
