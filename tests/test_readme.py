"""What the README shows, run on a small model."""

import doctest
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from data_builders.shards import read_stage, write_rows
from mpo.cli import run_verb

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("mpo ")
]
TRAINING = ["--max_steps", "1", "--use_cpu", "true", "--gradient_checkpointing", "false", "--report_to", "none"]
SHORTER = {  # what makes a command of the README end in seconds with a model that has learned for seconds
    "sample": ["--prompt", "direct", "--max_new_tokens", "4"],
    "dropout-ntp": ["--ratio", "0", "--max_new_tokens", "4"],
    "train": TRAINING,
    "sft": [*TRAINING, "--bf16", "false"],
    "filter": ["--min_side", "32"],
    "reference": ["--use_cpu", "true", "--report_to", "none"],
    "eval": ["--max_new_tokens", "4"],
}


@pytest.fixture
def workplace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what the README's commands name: a model after SFT, questions, tests and images."""
    shutil.copytree(finished / "sft", tmp_path / "my-sft-model")
    shutil.copytree(finished / "data" / "images", tmp_path / "images" / "images")
    shutil.copy(finished / "data" / "questions.jsonl", tmp_path)
    shutil.copy(finished / "data" / "test.jsonl", tmp_path)
    shutil.copy(finished / "data" / "sft.jsonl", tmp_path / "conversations.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_lead_from_questions_to_a_report(workplace: Path) -> None:
    verbs = [command[0] for command in COMMANDS]
    chain = ["sample", "judge", "pair", "dropout-ntp", "train", "eval", "report"]
    assert verbs == [*chain, "rewrite", "filter", "sft", "mix", *["convert"] * 5, "reference"]
    for verb, *settings in COMMANDS:
        run_verb(verb, [*settings, *SHORTER.get(verb, [])])
    assert (workplace / "my-mpo-model").is_dir()
    assert (workplace / "my-mpo-model" / "config.json").is_file()
    assert (workplace / "report.html").stat().st_size > 10_000
    assert list((workplace / "reference").glob("*/00000.jsonl"))


def test_the_script_trains(workplace: Path, finished: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in list(read_stage(finished / "pairs"))[:4]
    ]
    write_rows(workplace / "preferences.jsonl", rows)
    script = next(code for code in PYTHON if "MPOTrainer(" in code)
    namespace: dict = {}
    exec(compile(script, "README.md", "exec"), namespace)
    assert namespace["trainer"].state.global_step > 0


def test_the_training_loop_of_ones_own_steps() -> None:
    code = next(code for code in PYTHON if "terms.loss.backward()" in code)
    rewards = torch.tensor([0.5, 0.1], requires_grad=True)
    namespace = {
        "chosen_token_logps": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], requires_grad=True),
        "chosen_mask": torch.tensor([[1, 1], [1, 0]]),
        "chosen_rewards": rewards,
        "rejected_rewards": torch.tensor([0.2, 0.0]),
    }
    exec(compile(code, "README.md", "exec"), namespace)
    assert rewards.grad is not None
    assert namespace["shift"].mean == pytest.approx(0.2)


def test_the_sessions_show_what_python_answers() -> None:
    for code in PYTHON:
        test = doctest.DocTestParser().get_doctest(code, {}, "README.md", "README.md", 0)
        assert doctest.DocTestRunner().run(test).failed == 0
