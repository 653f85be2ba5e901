"""From questions to pairs and a page, with several workers and by a script of `examples/`: the same pairs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from data_builders.shards import read_stage, write_rows
from mpo.cli import run_verb

DRAWING = {"prompt": "direct", "max_new_tokens": 6, "temperature": 1.0}


@pytest.fixture(scope="module")
def questions(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's questions; every third one without its answer."""
    rows = list(read_stage(finished / "data" / "questions.jsonl"))
    path = tmp_path_factory.mktemp("chain") / "questions.jsonl"
    write_rows(path, [{**row, "answer": None if i % 3 == 0 else row.get("answer")} for i, row in enumerate(rows)])
    return path


def verb(name: str, **settings: object) -> None:
    run_verb(name, [word for key, value in settings.items() for word in (f"--{key}", str(value))])


def chain(finished: Path, questions: Path, output: Path, **engine: object) -> dict[str, bytes]:
    """Runs every step; gives the files of the pairs."""
    model = {"model": finished / "sft", "image_root": finished / "data", "device": "cpu"}
    verb(
        "sample", questions=questions, output=output / "r", num_responses=8, shard_size=5, **model, **DRAWING, **engine
    )
    verb("judge", responses=output / "r", output=output / "v", shard_size=50, **engine)
    verb("pair", verdicts=output / "v", output=output / "p", **engine)
    drawing = {"max_new_tokens": 4, "ratio": 0.0, "shard_size": 30}
    verb("dropout-ntp", responses=output / "r", output=output / "n", **model, **drawing, **engine)
    pairs = f"[{output / 'p'}, {output / 'n'}]"
    verb("report", verdicts=output / "v", pairs=pairs, image_root=finished / "data", output=output)
    assert "<html" in (output / "report.html").read_text()
    return {f"{name}/{path.name}": path.read_bytes() for name in "rvpn" for path in (output / name).glob("*.jsonl")}


@pytest.fixture(scope="module")
def alone(finished: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return chain(finished, questions, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("engine", [{"workers": 2}, {"workers": 2, "ray": "local"}], ids=["processes", "ray"])
def test_the_number_of_workers_changes_no_byte(
    finished: Path, questions: Path, alone: dict[str, bytes], tmp_path: Path, engine: dict[str, object]
) -> None:
    assert any(content for name, content in alone.items() if name.startswith("p/"))
    assert any(content for name, content in alone.items() if name.startswith("n/"))
    assert chain(finished, questions, tmp_path, **engine) == alone


def test_the_script_leads_from_questions_to_pairs_and_a_page_and_goes_on_where_it_was(
    finished: Path, questions: Path, tmp_path: Path
) -> None:
    names = {"MODEL": finished / "sft", "QUESTIONS": questions, "IMAGE_ROOT": finished / "data", "OUT": tmp_path}
    sizes = {"PROMPT": "direct", "RESPONSES": 8, "TOKENS": 8, "WORKERS": 1}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, **{name: str(value) for name, value in (names | sizes).items()}}
    command = ["bash", str(ROOT / "examples" / "build_mmpr.sh")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    assert {path.parent.name for path in made} >= {"responses", "verdicts", "pairs", "dropout_ntp"}
    assert (tmp_path / "report.html").is_file()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")} == made
