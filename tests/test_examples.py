"""The scripts of `examples/`, run on an untrained model."""

import re
import runpy
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoProcessor

from data_builders.hf_sampler import load_model
from data_builders.shards import read_rows, read_stage, write_rows
from mpo import MPOConfig, MPOTrainer
from mpo.data import preference_dataset
from mpo.tiling import Tiling, load_tiling

EXAMPLES = ROOT / "examples"
STEP = r"loss (\S+)  generation (\S+)  reward shift (\S+)"
LAST_LINES = {"own_training_loop.py": STEP, "train_mpo.py": r"reward shift after training: [+-]0\.\d{4}"}


@pytest.fixture(scope="module")
def pairs(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs, the first without a picture: two optimizer steps of the scripts' own size."""
    rows = []
    for index, row in enumerate(list(read_rows(task / "sft.jsonl"))[:20]):
        chosen = row["completion"][0]["content"]
        texts = {"prompt": row["prompt"][0]["content"], "chosen": chosen, "rejected": chosen[:4] + " 7."}
        images = [f"images/sft-{index:05d}.png"] if index else []
        rows.append({"id": str(index), "images": images, **texts, "kind": "correctness", "source": "sum"})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_rows(path, rows)
    return path


def changes(before: Path, after: Path) -> list[float]:
    """How far the weights of two saved models lie apart, each parameter's largest difference."""
    old, new = (dict(load_model(path, dtype="float32").named_parameters()) for path in (before, after))
    assert old.keys() == new.keys()
    return [(new[name] - old[name]).abs().max().item() for name in old]


@pytest.mark.parametrize("name", sorted(LAST_LINES))
def test_a_script_trains_and_saves_a_model_that_loads(
    name: str,
    task: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", [name, *map(str, (task / "model", pairs, task, tmp_path / "out"))])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.fullmatch(LAST_LINES[name], capsys.readouterr().out.splitlines()[-1])
    moved = changes(task / "model", tmp_path / "out")
    assert 0 < max(moved) < 1e-5  # two steps of 1e-6
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.pad_token_id is not None


def test_the_sft_stage_goes_from_raw_rows_to_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(EXAMPLES / "sft_stages.py"))
    monkeypatch.setitem(script["STEPS"], "single_image", 2)
    for name in ("align", "one_vision", "vision"):
        monkeypatch.setitem(script["STEPS"], name, 1)
    script["main"](str(tmp_path))
    shown = capfd.readouterr().out
    for reason in ("final answer changed", "reply: response not closed", "the judge said No", "group C"):
        assert reason in shown
    assert [path.name for path in sorted((tmp_path / "sft").glob("*/config.json"))] == ["config.json"] * 3
    assert load_tiling(tmp_path / "sft" / "one_vision") == Tiling("mm1_5", 4, 4, "index", 32)
    mixed = Counter(row["rewritten"] for row in read_stage(tmp_path / "mixed"))
    assert mixed == {True: 299, False: 128}  # 70 : 30
    script["main"](str(tmp_path))  # nothing is done again
    assert "Supervised fine-tuning in 3 stages" in capfd.readouterr().out


def test_every_script_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*LAST_LINES, "sft_stages.py"}


def test_a_loop_of_ones_own_computes_what_the_trainer_does(
    task: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    script = import_module("own_training_loop")
    monkeypatch.setattr(script, "DEVICE", "cpu")
    arguments = [str(path) for path in (task / "model", pairs, task, tmp_path / "loop")]
    script.main(*arguments, learning_rate=1e-3, step_size=20, epochs=3)
    shown = [[float(number) for number in line] for line in re.findall(STEP, capsys.readouterr().out)]
    args = MPOConfig(
        str(tmp_path / "trainer"),
        num_train_epochs=3,
        per_device_train_batch_size=20,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    model = load_model(task / "model", dtype="float32")
    trainer = MPOTrainer(model, args=args, train_dataset=preference_dataset([pairs], task))
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "loss/generation", "reward_shift")
    expected = [[entry[name] for name in names] for entry in log]
    assert shown[0][0] - shown[0][1] == pytest.approx(0.831777, abs=2e-6)
    assert [shift != 0.0 for _, _, shift in shown] == [False, False, True]  # at the first step all rewards are 0
    torch.testing.assert_close(torch.tensor(shown), torch.tensor(expected), rtol=0, atol=1e-4)
