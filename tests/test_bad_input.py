"""Bad input, as a user gives it on the command line: one message, exit code 2, nothing half-written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_builders.shards import read_rows, write_rows
from mpo.cli import app

Case = Callable[[Path, Path], list[str]]


def sample(task: Path, folder: Path, **changes: str) -> list[str]:
    settings = {"model": task / "model", "questions": task / "questions.jsonl", "image_root": task}
    settings |= {"output": folder / "output", **changes}
    return ["sample", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def missing_image(task: Path, folder: Path) -> list[str]:
    rows = list(read_rows(task / "questions.jsonl"))
    rows[3]["images"] = ["images/lost.png"]
    write_rows(folder / "questions.jsonl", rows)
    return sample(task, folder, questions=str(folder / "questions.jsonl"))


def broken_image(task: Path, folder: Path) -> list[str]:
    row = next(read_rows(task / "questions.jsonl"))
    (folder / "images").mkdir()
    (folder / row["images"][0]).write_bytes((task / row["images"][0]).read_bytes()[:60])
    write_rows(folder / "questions.jsonl", [row])
    return sample(task, folder, questions=str(folder / "questions.jsonl"), image_root=str(folder))


def image_outside_the_root(task: Path, folder: Path) -> list[str]:
    row = next(read_rows(task / "questions.jsonl"))
    write_rows(folder / "questions.jsonl", [{**row, "images": ["../secret.png"]}])
    return sample(task, folder, questions=str(folder / "questions.jsonl"))


def broken_line(task: Path, folder: Path) -> list[str]:
    lines = (task / "questions.jsonl").read_text().splitlines()
    (folder / "questions.jsonl").write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]))
    return sample(task, folder, questions=str(folder / "questions.jsonl"))


def unknown_key(task: Path, folder: Path) -> list[str]:
    (folder / "sample.yaml").write_text("num_respones: 4\n")
    return [*sample(task, folder), "--config", str(folder / "sample.yaml")]


def missing_key(task: Path, folder: Path) -> list[str]:
    return ["sample", "--output", str(folder / "output")]


def model_without_processor(task: Path, folder: Path) -> list[str]:
    shutil.copytree(task / "model", folder / "model")
    (folder / "model" / "processor_config.json").unlink()
    return sample(task, folder, model=str(folder / "model"))


def missing_model(task: Path, folder: Path) -> list[str]:
    return sample(task, folder, model=str(folder / "no-such-model"))


def empty_stage(task: Path, folder: Path) -> list[str]:
    (folder / "responses").mkdir()
    return ["judge", "--responses", str(folder / "responses"), "--output", str(folder / "output")]


def empty_pairs(task: Path, folder: Path) -> list[str]:
    (folder / "pairs").mkdir()
    words = ["--data", str(folder / "pairs"), "--image_root", str(task), "--output_dir", str(folder / "output")]
    return ["train", "--model_name_or_path", str(task / "model"), *words]


def pairs_with_a_broken_line(task: Path, folder: Path) -> list[str]:
    (folder / "pairs.jsonl").write_text('{"id": "1", "prompt": "p", "chosen": "c"}\n')
    words = ["--data", str(folder / "pairs.jsonl"), "--output_dir", str(folder / "output")]
    return ["train", "--model_name_or_path", str(task / "model"), *words]


def sft_without_an_image(task: Path, folder: Path) -> list[str]:
    row = {**next(read_rows(task / "sft.jsonl")), "images": ["lost.png"]}
    write_rows(folder / "sft.jsonl", [row])
    words = ["--data", str(folder / "sft.jsonl"), "--output_dir", str(folder / "output"), "--bf16", "false"]
    return ["sft", "--model_name_or_path", str(task / "model"), *words]


def evaluation_of_a_model_without_processor(task: Path, folder: Path) -> list[str]:
    command = model_without_processor(task, folder)
    words = ["--questions", str(task / "questions.jsonl"), "--image_root", str(task)]
    return ["eval", "--models", command[2], *words, "--output", str(folder / "output")]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (missing_image, ["known-00003", "lost.png", "does not exist"]),
        (broken_image, ["known-00000", "cannot be decoded"]),
        (image_outside_the_root, ["../secret.png", "outside the image root"]),
        (broken_line, ["questions.jsonl, line 5", "not a JSON object"]),
        (unknown_key, ["num_respones", "did you mean `num_responses`", "--help"]),
        (missing_key, ["`model`", "`questions`"]),
        (model_without_processor, ["processor_config.json", "save_pretrained"]),
        (missing_model, ["no model folder", "no-such-model"]),
        (empty_stage, ["responses", "holds no JSONL shard"]),
        (empty_pairs, ["pairs", "holds no JSONL shard"]),
        (pairs_with_a_broken_line, ["pairs.jsonl, line 1", "`rejected` is missing"]),
        (sft_without_an_image, ["sft-00000", "lost.png"]),
        (evaluation_of_a_model_without_processor, ["processor_config.json"]),
    ],
)
def test_bad_input_is_told_in_one_message(task: Path, tmp_path: Path, case: Case, words: list[str]) -> None:
    result = CliRunner().invoke(app, case(task, tmp_path))
    assert result.exit_code == 2, result.output
    message = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert all(word in message for word in words), message
    assert "Traceback" not in result.stderr
    written = [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert not written
