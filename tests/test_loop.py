"""`mpo loop`: each round starts from the last one's model, and a stopped loop goes on in the middle of a round."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from data_builders.records import InputError
from data_builders.shards import read_stage, write_rows, write_text
from mpo.cli import run_verb

SETTINGS: dict[str, dict[str, Any]] = {
    "sample": {"prompt": "direct", "max_new_tokens": 6, "num_responses": 8, "shard_size": 6, "device": "cpu"},
    "pair": {"max_pairs": 4},
    "dropout_ntp": {"ratio": 0.0, "max_new_tokens": 4, "device": "cpu"},
    "eval": {"prompts": ["direct"], "max_new_tokens": 6, "device": "cpu"},
}


@pytest.fixture(scope="module")
def settings(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    for name, values in SETTINGS.items():
        write_text(folder / f"{name}.yaml", yaml.safe_dump(values))
    training = yaml.safe_load((configs / "train.yaml").read_text())
    write_text(folder / "train.yaml", yaml.safe_dump({**training, "max_steps": 2, "save_steps": 1}))
    return folder


@pytest.fixture(scope="module")
def questions(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_rows(path, list(read_stage(finished / "data" / "questions.jsonl"))[:27])
    return path


def arguments(finished: Path, questions: Path, settings: Path, output: Path, rounds: int = 2) -> list[str]:
    words = {"model": finished / "sft", "questions": questions, "image_root": finished / "data", "rounds": rounds}
    words |= {"configs": settings, "eval_questions": finished / "data" / "test.jsonl", "output": output}
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def looped(finished: Path, questions: Path, settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("loop") / "whole"
    summary = run_verb("loop", arguments(finished, questions, settings, output))
    assert summary.columns == ["round", "pairs", "direct", "direct, gain"]
    assert [row[0] for row in summary.rows] == ["start", "1", "2"]
    assert [row[-1] == "" for row in summary.rows] == [True, False, False]
    return output


def content(folder: Path) -> dict[str, bytes]:
    """What the rounds made, but for models, whose files hold paths and times."""
    names = ("*.jsonl", "evaluation/evaluation.json")
    found = [path for name in names for path in folder.rglob(name) if not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_each_round_samples_from_and_starts_at_the_model_of_the_round_before(finished: Path, looped: Path) -> None:
    for number, start in ((1, finished / "sft"), (2, looped / "round-1" / "model")):
        folder = looped / f"round-{number}"
        rows = list(read_stage(folder / "responses"))
        assert {row["sampler"]["model"] for row in rows} == {str(start)}
        assert {row["sampler"]["seed"] for row in rows} == {number}
        assert json.loads((folder / "model" / "settings.json").read_text())["model_name_or_path"] == str(start)
        first = json.loads((folder / "model" / "trainer_state.json").read_text())["log_history"][0]
        assert first["rewards/margins"] == 0.0  # the reference is the model that the round starts from
        assert list(read_stage(folder / "pairs"))


def test_every_round_is_measured_against_the_start_on_the_same_questions(looped: Path) -> None:
    evaluation = json.loads((looped / "evaluation" / "evaluation.json").read_text())
    assert evaluation["models"] == ["start", "round-1", "round-2"]
    assert {row["baseline"] for row in evaluation["differences"]} == {"start"}
    assert {row["num"] for row in evaluation["accuracy"] if row["source"] == "all"} == {12}


def test_a_loop_that_is_killed_in_the_middle_of_a_round_ends_with_the_same_files(
    finished: Path, questions: Path, settings: Path, looped: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    argv = arguments(finished, questions, settings, output)
    command = [sys.executable, "-m", "mpo", "loop", *argv]
    for landmark in ("round-1/responses/00001.jsonl", "round-2/pairs"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        while not (output / landmark).exists():
            assert process.poll() is None, f"ended before {landmark}"
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run_verb("loop", argv)
    expected = content(looped)
    found = content(output)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].replace(str(output).encode(), str(looped).encode()) == expected[name], name


def test_more_rounds_go_on_from_the_last_one(finished: Path, questions: Path, settings: Path, looped: Path) -> None:
    before = content(looped)
    summary = run_verb("loop", arguments(finished, questions, settings, looped, rounds=3))
    assert len(summary.rows) == 4
    after = content(looped)
    assert (before.items() - after.items()) == {("evaluation/evaluation.json", before["evaluation/evaluation.json"])}


def test_settings_that_cannot_work_are_refused_first(
    finished: Path, questions: Path, settings: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="`rounds` must be at least 1"):
        run_verb("loop", arguments(finished, questions, settings, tmp_path / "out", rounds=0))
    with pytest.raises(InputError, match=r"holds no train\.yaml"):
        run_verb("loop", arguments(finished, questions, tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
