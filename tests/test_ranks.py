"""Two ranks give what one gives: losses, reward shift, metrics, reference columns, and after a stop."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET_TRAINING, task_pairs
from datasets import Dataset
from rank_runs import run, scripted_rewards
from transformers import AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from data_builders.shards import write_rows
from mpo.data import preference_dataset

SETTINGS: dict[str, Any] = {
    **QUIET_TRAINING,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "dataloader_pin_memory": False,
}
HALF = {"per_device_train_batch_size": 4}
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}  # some without a picture
TOKEN = {"sft_reduction": "token"}
ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}


@pytest.fixture(scope="module")
def dataset(task: Path) -> Dataset:
    """Thirteen pairs of which every fourth has no picture: the last step of an epoch is uneven."""
    write_rows(task / "rank_pairs.jsonl", task_pairs(task, 13))
    return preference_dataset([task / "rank_pairs.jsonl"], task)


def plan(task: Path, folder: Path, name: str, dataset: Dataset, **settings: Any) -> dict[str, Any]:
    path = folder / f"data-{len(dataset)}"  # no two data sets of this file are of one length
    if not path.exists():
        dataset.save_to_disk(path)
    extra = {key: settings.pop(key) for key in ("resume", "lora", "evaluate", "scripted") if key in settings}
    settings = {**SETTINGS, "output_dir": str(folder / name), **settings}
    return {"name": name, "dataset": str(path), "model": str(task / "model"), "settings": settings, **extra}


def on_two_ranks(folder: Path, plans: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What each rank found, by the name of the run."""
    (folder / "plan.json").write_text(json.dumps(plans))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [*command, str(root / "tests" / "rank_runs.py"), str(folder / "plan.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        plan["name"]: [json.loads((folder / f"{plan['name']}.{rank}.json").read_text()) for rank in (0, 1)]
        for plan in plans
    }


@pytest.fixture(scope="module")
def found(
    task: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The same runs in this process and on two ranks."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    ten = dataset.select([0, 1, 2, 3, 4, 5, 6, 8, 9, 10])  # one without a picture, so every step has some
    texts_last = dataset.select([0, 1, 2, 4, 5, 6, 3, 7])  # no rank has a picture in the last micro-batch of a step
    reference = {"precompute_ref_log_probs": True, "max_steps": 1}
    in_order = {"train_sampling_strategy": "sequential", "scripted": True}
    single = {
        "texts_last": run(plan(task, one, "texts_last", texts_last)),
        "scripted": run(plan(task, one, "scripted", dataset, **in_order)),
        "scripted_decay": run(plan(task, one, "scripted_decay", dataset, **in_order, reward_shift_decay=0.75)),
        "sequence": run(plan(task, one, "sequence", dataset, evaluate=True, per_device_eval_batch_size=8)),
        "token": run(plan(task, one, "token", dataset, **TOKEN)),
        "ten": run(plan(task, one, "ten", ten)),
        "reference": run(plan(task, one, "reference", dataset, ref_logps_dir=str(one / "ref"), **reference)),
    }
    plans = [
        plan(task, two, "texts_last", texts_last, **ONE_BY_ONE, train_sampling_strategy="sequential"),
        plan(task, two, "scripted", dataset, **HALF, **in_order),
        plan(task, two, "scripted_decay", dataset, **HALF, **in_order, reward_shift_decay=0.75),
        plan(task, two, "sequence", dataset, **HALF, evaluate=True, per_device_eval_batch_size=4),
        plan(task, two, "accumulated", dataset, **ONE_BY_ONE),
        plan(task, two, "token", dataset, **HALF, **TOKEN),
        plan(task, two, "token_accumulated", dataset, **ONE_BY_ONE, **TOKEN),
        plan(task, two, "ten", ten, **HALF),
        plan(task, two, "reference", dataset, **ONE_BY_ONE, ref_logps_dir=str(two / "ref"), **reference),
    ]
    return single, on_two_ranks(two, plans)


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("sequence", "sequence"),
        ("accumulated", "sequence"),
        ("token", "token"),
        ("token_accumulated", "token"),
        ("ten", "ten"),  # the second rank has nothing of its own in the last step of an epoch
        ("texts_last", "texts_last"),
        ("reference", "reference"),
    ],
)
def test_losses_and_reward_shift_do_not_depend_on_ranks(found: Any, name: str, same_as: str) -> None:
    single, ranks = found[0][same_as], found[1][name]
    assert len(single["losses"]) == len(ranks[0]["losses"]) > 0
    assert ranks[0]["losses"] == pytest.approx(single["losses"], abs=2e-5)
    for rank in ranks:
        assert rank["shift"] == pytest.approx(single["shift"], abs=1e-6)


@pytest.mark.parametrize("decay", [None, 0.75])
def test_the_shift_of_a_scripted_stream_of_rewards_has_its_closed_form(
    task: Path, dataset: Dataset, found: Any, decay: float | None
) -> None:
    collate = DataCollatorForVisionPreference(AutoProcessor.from_pretrained(task / "model"))
    steps = [scripted_rewards(collate([dataset[row] for row in rows])) for rows in (range(8), range(8, 13)) * 2]
    if decay is None:
        expected = [0.0] + [torch.cat(steps[:number]).mean().item() for number in (1, 2, 3, 4)]
    else:
        weights = [(1 - decay) * decay**age for age in range(4)]  # of the last step, the one before, ...
        means = [step.mean().item() for step in steps]
        expected = [sum(w * m for w, m in zip(weights, reversed(means[:number]), strict=False)) for number in range(5)]
    name = "scripted" if decay is None else "scripted_decay"
    for result in (found[0][name], *found[1][name]):
        logged = [entry["reward_shift"] for entry in result["logs"]]
        assert [*logged, result["shift"]["mean"]] == pytest.approx(expected, abs=1e-6)


def test_pairs_that_only_even_out_the_ranks_count_nowhere(found: Any) -> None:
    single, ranks = found
    assert single["sequence"]["shift"]["count"] == 2 * 2 * 13  # epochs, responses, pairs
    for name in ("rewards/chosen", "logps/rejected", "loss/quality", "entropy", "num_tokens"):
        expected = [entry[name] for entry in single["sequence"]["logs"]]
        assert [entry[name] for entry in ranks["sequence"][0]["logs"]] == pytest.approx(expected, abs=1e-4), name


def test_evaluation_does_not_depend_on_ranks(found: Any) -> None:
    single, ranks = found[0]["sequence"]["metrics"], found[1]["sequence"][0]["metrics"]
    assert ranks["eval_loss"] == pytest.approx(single["eval_loss"], abs=2e-5)
    assert ranks["eval_reward_shift"] == pytest.approx(single["eval_reward_shift"], abs=1e-6)


def test_every_rank_has_the_reference_of_the_whole_data_set(found: Any) -> None:
    expected = found[0]["reference"]["ref_chosen_logps"]
    assert len(expected) == 13
    for rank in found[1]["reference"]:
        assert rank["ref_chosen_logps"] == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def sharded(
    task: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """One run in this process; under ZeRO-3 on two ranks the same one, and its second half again after a stop."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("sharded")
    deepspeed = {"deepspeed": str(two / "zero_3.json"), **ONE_BY_ONE}
    (two / "zero_3.json").write_text(json.dumps(ZERO_3))
    saving = {"save_strategy": "steps", "save_steps": 2}
    reference = {"precompute_ref_log_probs": True, "max_steps": 1, "ref_logps_dir": str(two / "ref")}
    checkpoint = str(two / "whole" / "checkpoint-2")
    plans = [
        plan(task, two, "whole", dataset, **deepspeed, **saving),
        plan(task, two, "resumed", dataset, **deepspeed, resume=checkpoint),
        plan(task, two, "reference", dataset, **deepspeed, **reference),
    ]
    reference["ref_logps_dir"] = str(one / "ref")
    single = {
        "whole": run(plan(task, one, "whole", dataset)),
        "reference": run(plan(task, one, "reference", dataset, **reference)),
    }
    return single, on_two_ranks(two, plans)


def test_losses_and_reward_shift_are_the_same_when_the_model_is_sharded(sharded: Any) -> None:
    single, ranks = sharded[0]["whole"], sharded[1]["whole"]
    assert ranks[0]["losses"] == pytest.approx(single["losses"], abs=1e-4)
    assert ranks[1]["shift"] == pytest.approx(single["shift"], abs=1e-5)


def test_a_sharded_run_that_was_stopped_gives_the_same_losses(sharded: Any) -> None:
    whole, resumed = sharded[1]["whole"][0], sharded[1]["resumed"][0]
    assert resumed["losses"][2:] == pytest.approx(whole["losses"][2:], abs=1e-6)
    assert resumed["shift"] == pytest.approx(whole["shift"], abs=1e-7)


def test_a_sharded_reference_is_computed_whole(sharded: Any) -> None:
    expected = sharded[0]["reference"]["ref_chosen_logps"]
    assert sharded[1]["reference"][1]["ref_chosen_logps"] == pytest.approx(expected, abs=1e-4)


def launched(folder: Path, *command: str) -> str:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("launcher", "num_steps"),
    [
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2),
        (["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"], 4),
    ],
    ids=["torchrun", "accelerate"],
)
def test_the_verb_trains_under_a_launcher_and_speaks_once(
    task: Path, dataset: Dataset, tmp_path: Path, launcher: list[str], num_steps: int
) -> None:
    settings = {**SETTINGS, **HALF, "output_dir": "out", "model_name_or_path": task / "model", "image_root": task}
    settings |= {"data": task / "rank_pairs.jsonl", "num_train_epochs": 1, "train": ["vision", "projector"]}
    config = tmp_path / "train.yaml"
    config.write_text("".join(f"{name}: {json.dumps(value, default=str)}\n" for name, value in settings.items()))
    printed = launched(tmp_path, *launcher, "-m", "mpo", "train", "--config", str(config))
    assert printed.count("Mixed Preference Optimization") == 1
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == num_steps
    assert (tmp_path / "out" / "model.safetensors").is_file()
