"""The ways to many GPUs, on two CPU processes: ZeRO and FSDP2 give what one process gives, also after a kill.

The stages are the shipped ones, of `configs/`. Nothing here needs a GPU: the ranks talk through gloo.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import QUIET_TRAINING, ROOT, task_pairs
from datasets import Dataset
from rank_runs import run
from safetensors.torch import load_file
from test_ranks import ONE_BY_ONE, SETTINGS, on_two_ranks, plan
from transformers import AutoProcessor

from data_builders.shards import read_rows, write_rows
from mpo import MPOConfig, MPOTrainer
from mpo.cli import run_verb
from mpo.data import preference_dataset
from mpo.models import load_for_training

STAGES = ("zero1", "zero2", "zero3")
SAME = 1e-5  # nats, of losses; two orders above what is seen
ADAM = {"optim": "adamw_torch", "weight_decay": 0.1, "part_learning_rates": {"vision": 5e-4}}
LORA = {"lora": True, "part_learning_rates": {"vision": 5e-4}}


def zero(name: str) -> dict[str, str]:
    return {"deepspeed": str(ROOT / "configs" / "deepspeed" / f"{name}.json")}


@pytest.fixture(scope="module")
def dataset(task: Path) -> Dataset:
    """Sixteen pairs of which every fourth has no picture."""
    write_rows(task / "distributed_pairs.jsonl", task_pairs(task, 16))
    return preference_dataset([task / "distributed_pairs.jsonl"], task)


@pytest.fixture(scope="module")
def thirteen(dataset: Dataset) -> Dataset:
    """So many that the last step of an epoch is uneven."""
    return dataset.select(range(13))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def found(
    task: Path, dataset: Dataset, thirteen: Dataset, two: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The same runs in this process and, started once, on two ranks."""
    one = tmp_path_factory.mktemp("one")
    fourteen = dataset.select([3, 7, 11, 15, 0, 1, 2, 4, 3, 7, 11, 15, 5, 6])  # steps of four: texts, pictures, texts
    in_order = {**ADAM, "train_sampling_strategy": "sequential", "num_train_epochs": 1}
    by_twos = {**in_order, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    single = {
        "zero": run(plan(task, one, "zero", thirteen, **ADAM)),
        "lora": run(plan(task, one, "lora", thirteen, **LORA)),
        "texts": run(plan(task, one, "texts", fourteen, **in_order, per_device_train_batch_size=4)),
    }
    adam, lora = {**ADAM, **ONE_BY_ONE}, {**LORA, **ONE_BY_ONE}
    ahead = {"precompute_ref_log_probs": True, "ref_logps_dir": str(two / "ref")}
    kept = {"evaluate": True, "per_device_eval_batch_size": 4}
    plans = [
        *(plan(task, two, stage, thirteen, **adam, **zero(stage), **kept) for stage in STAGES),
        plan(task, two, "zero3_lora", thirteen, **lora, **zero("zero3"), **kept),
        plan(task, two, "zero3_offload", thirteen, **adam, **zero("zero3_offload")),
        plan(task, two, "zero3_ahead", thirteen, **adam, **zero("zero3"), **ahead),
        plan(task, two, "zero2_texts", fourteen, **by_twos, **zero("zero2")),
        plan(task, two, "ddp_texts", fourteen, **by_twos),
    ]
    for entry in plans[:4]:
        entry["save"] = str(two / "saved" / entry["name"])
    return single, on_two_ranks(two, plans)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Of nested settings, by their whole name."""
    if not isinstance(value, dict):
        return {path: value}
    return {
        name: leaf for key, part in value.items() for name, leaf in leaves(part, f"{path}.{key}".strip(".")).items()
    }


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_every_automatic_setting_of_deepspeed_is_explained_and_no_optimizer_is_its_own(path: Path) -> None:
    settings, explained = leaves(json.loads(path.read_text())), (ROOT / "configs" / "README.md").read_text()
    assert [name for name, value in settings.items() if value == "auto" and f"`{name}`" not in explained] == []
    assert not {name.partition(".")[0] for name in settings} & {"optimizer", "scheduler"}
    gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    assert settings.get(gathers, False) == (settings["zero_optimization.stage"] == 3)


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("zero1", "zero"),
        ("zero2", "zero"),
        ("zero3", "zero"),
        ("zero3_offload", "zero"),
        ("zero3_ahead", "zero"),
        ("zero3_lora", "lora"),
        ("zero2_texts", "texts"),
        ("ddp_texts", "texts"),
    ],
)
def test_losses_and_reward_shift_are_those_of_one_process(found: Any, name: str, same_as: str) -> None:
    single, ranks = found[0][same_as], found[1][name]
    assert len(set(single["losses"])) == 4
    assert ranks[0]["losses"] == pytest.approx(single["losses"], abs=SAME)
    for metric in ("reward_shift", "learning_rate/vision", "learning_rate/llm"):
        expected = [entry[metric] for entry in single["logs"]]
        assert [entry[metric] for entry in ranks[0]["logs"]] == pytest.approx(expected, abs=SAME), metric
    for rank in ranks:
        assert rank["shift"] == pytest.approx(single["shift"], abs=SAME)


@pytest.mark.parametrize(
    ("name", "share"),
    [("zero1", 1.0), ("zero2", 1.0), ("zero3", 0.5), ("zero3_ahead", None), ("zero3_lora", None)],
)
def test_the_reference_is_whole_or_sharded_or_none_at_all(found: Any, name: str, share: float | None) -> None:
    for rank in found[1][name]:
        assert rank["share_of_reference"] == (share and pytest.approx(share, abs=0.01))  # shards are rounded up


@pytest.mark.parametrize("name", [*STAGES, "zero3_lora"])
def test_what_ranks_save_gives_the_same_log_probs_when_it_is_loaded_alone(
    found: Any, thirteen: Dataset, task: Path, two: Path, tmp_path: Path, name: str
) -> None:
    def evaluated(folder: Path) -> dict[str, float]:
        trainer = MPOTrainer(
            model=load_for_training(str(folder), dtype="float32"),
            args=MPOConfig(str(tmp_path), **SETTINGS, per_device_eval_batch_size=8),
            train_dataset=thirteen,
            processing_class=AutoProcessor.from_pretrained(task / "model"),
        )
        return trainer.evaluate(thirteen)

    expected, loaded, before = found[1][name][0]["metrics"], evaluated(two / "saved" / name), evaluated(task / "model")
    for metric in ("eval_logps/chosen", "eval_logps/rejected"):
        assert loaded[metric] == pytest.approx(expected[metric], abs=1e-3)  # of about -100
        assert abs(loaded[metric] - before[metric]) > 0.5


def config_of(task: Path, folder: Path, **settings: Any) -> Path:
    """A run of nine steps, two to an epoch: it is stopped, and ends, in the middle of one."""
    chosen = {
        **SETTINGS,
        **ADAM,
        **ONE_BY_ONE,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 3,
        "model_name_or_path": str(task / "model"),
        "data": str(task / "thirteen_pairs.jsonl"),
        "image_root": str(task),
        "output_dir": str(folder / "out"),
        "use_cpu": torch.accelerator.is_available(),  # without a GPU it is found out
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.yaml").write_text(yaml.safe_dump(chosen))
    return folder / "train.yaml"


def logged(folder: Path, name: str = "loss") -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.fixture(scope="module")
def alone(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    write_rows(task / "thirteen_pairs.jsonl", task_pairs(task, 13))
    folder = tmp_path_factory.mktemp("alone")
    eight = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    run_verb("train", ["--config", str(config_of(task, folder, **eight))])
    return folder / "out"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launchers() -> dict[str, list[str]]:
    """How two ranks are started; each command goes on with a verb."""
    port = str(free_port())
    multi = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", port]
    settled = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    commands = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mpo"],
        "accelerate": ["accelerate.commands.launch", *multi, *settled, "-m", "mpo"],
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port, "--module", "mpo"],
    }
    return {name: [sys.executable, "-m", *command] for name, command in commands.items()}


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(command: list[str], cwd: Path) -> str:
    """What it printed."""
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def launch_and_kill(command: list[str], cwd: Path, when: Path) -> None:
    """Kills launcher and ranks, SIGKILL, as soon as a file is there."""
    with open(cwd / "log.txt", "w") as log, subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, stderr=log) as process:
        deadline = time.monotonic() + 300
        while not when.is_file():
            assert process.poll() is None, (cwd / "log.txt").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        launcher = psutil.Process(process.pid)
        for member in (launcher, *launcher.children(recursive=True)):
            member.kill()


@pytest.mark.parametrize(("stage", "launcher"), list(zip(STAGES, launchers(), strict=True)))
def test_a_run_that_was_killed_and_started_again_has_the_losses_of_one_process(
    task: Path, alone: Path, tmp_path: Path, stage: str, launcher: str
) -> None:
    arguments = ["train", "--config", str(config_of(task, tmp_path, **zero(stage)))]
    out = tmp_path / "out"
    launch_and_kill([*launchers()[launcher], *arguments], tmp_path, out / "checkpoint-3" / "trainer_state.json")
    assert not (out / "config.json").exists()
    assert launch([*launchers()[launcher], *arguments], tmp_path).count("Mixed Preference Optimization") == 1
    check_same(out, alone)


def check_same(out: Path, alone: Path) -> None:
    """Both folders hold the same nine steps and the same model."""
    for name in ("loss", "reward_shift"):
        assert len(logged(alone, name)) == 9
        assert logged(out, name) == pytest.approx(logged(alone, name), abs=SAME), name
    weights, expected = (load_file(path / "model.safetensors") for path in (out, alone))
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0, msg=name)


def run_verbs(folder: Path, launcher: list[str], verbs: list[list[str]]) -> None:
    """Runs several verbs on two ranks that are started once."""
    (folder / "verbs.json").write_text(json.dumps(verbs))
    script = [str(ROOT / "tests" / "rank_verbs.py"), str(folder / "verbs.json")]
    launch([sys.executable, "-m", *launcher, *script], folder)


def words(settings: dict[str, Any]) -> list[str]:
    """As they stand on the command line."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def verbs_done(task: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs under ZeRO-3, of which the training was started again when it was done."""
    folder = tmp_path_factory.mktemp("verbs")
    train = ["train", "--config", str(config_of(task, folder, **zero("zero3")))]
    pairs = {"data": task / "thirteen_pairs.jsonl", "image_root": task, "model_name_or_path": task / "model"}
    pairs |= {"ref_logps_dir": folder / "reference", "output_dir": folder / "unused", **zero("zero3")}
    sft = {**QUIET_TRAINING, **ADAM, "data": str(task / "sft.jsonl"), "image_root": str(task), "max_steps": 2}
    sft |= {"model_name_or_path": str(task / "model"), "output_dir": "sft", "per_device_train_batch_size": 2}
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    alone_sft = {"output_dir": folder / "sft_alone", "per_device_train_batch_size": 4}
    run_verb("sft", ["--config", str(folder / "sft.yaml"), *words(alone_sft)])
    stages = {"stages": json.dumps([{"name": "first"}, {"name": "second", "packing": True}])}
    chain_alone = {**alone_sft, "output_dir": folder / "chain_alone", **stages}
    run_verb("sft", ["--config", str(folder / "sft.yaml"), *words(chain_alone)])
    asked = {"models": task / "model", "questions": task / "questions.jsonl", "image_root": task, "shard_size": 2}
    asked |= {"max_new_tokens": 4, "device": "cpu"}
    run_verb("eval", words({**asked, "output": folder / "eval_alone"}))
    verbs = [
        ["eval", *words({**asked, "output": folder / "eval"})],
        train,
        train,
        ["sft", "--config", "sft.yaml", *words(zero("zero3"))],
        ["sft", "--config", "sft.yaml", *words({**zero("zero3"), **stages, "output_dir": "chain"})],
        ["reference", *words(pairs)],
    ]
    run_verbs(folder, ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], verbs)
    return folder


def test_a_sharded_run_that_is_done_takes_no_step_when_it_is_started_again(verbs_done: Path, alone: Path) -> None:
    assert json.loads((verbs_done / "out" / "trainer_state.json").read_text())["global_step"] == 9
    check_same(verbs_done / "out", alone)


def test_fine_tuning_under_zero_has_the_losses_of_one_process(verbs_done: Path) -> None:
    assert len(logged(verbs_done / "sft")) == 2
    assert logged(verbs_done / "sft") == pytest.approx(logged(verbs_done / "sft_alone"), abs=SAME)
    assert logged(verbs_done / "sft", "learning_rate/vision") == [5e-4, 5e-4]


def test_stages_under_zero_have_the_losses_of_one_process(verbs_done: Path) -> None:
    for name in ("first", "second"):
        found, expected = logged(verbs_done / "chain" / name), logged(verbs_done / "chain_alone" / name)
        assert len(found) == 2
        assert found == pytest.approx(expected, abs=SAME)
    record = json.loads((verbs_done / "chain" / "progress.json").read_text())
    assert list(record) == ["first", "second"]


def test_a_sharded_model_fills_the_cache_of_reference_log_probs(verbs_done: Path) -> None:
    (entry,) = (path.parent for path in (verbs_done / "reference").glob("*/settings.json"))
    rows = [row for path in sorted(entry.glob("*.jsonl")) for row in read_rows(path)]
    assert sorted(row["row"] for row in rows) == list(range(13))


def test_fully_sharded_runs_have_the_losses_of_one_process_also_after_a_stop(
    task: Path, alone: Path, tmp_path: Path
) -> None:
    """FSDP2 as `configs/accelerate/fsdp2.yaml` sets it up, policy and reference sharded."""
    configs = [config_of(task, tmp_path / name, use_cpu=False) for name in ("whole", "stopped")]
    whole, stopped = (["train", "--config", str(path)] for path in configs)
    stopped += ["--resume_from_checkpoint", str(tmp_path / "whole" / "out" / "checkpoint-3")]
    config = str(ROOT / "configs" / "accelerate" / "fsdp2.yaml")
    port = ["--num_processes", "2", "--main_process_port", str(free_port())]
    accelerate = ["accelerate.commands.launch", "--config_file", config, *port]
    run_verbs(tmp_path, accelerate, [whole, stopped, whole])
    for name in ("whole", "stopped"):
        check_same(tmp_path / name / "out", alone)


def test_ranks_share_an_evaluation_and_find_what_one_process_does(verbs_done: Path) -> None:
    for name in ("answers.jsonl", "evaluation.json"):
        assert (verbs_done / "eval" / name).read_text() == (verbs_done / "eval_alone" / name).read_text()
    (parts, _) = sorted((verbs_done / "eval" / "parts").iterdir())
    assert len(list(parts.glob("*.jsonl"))) == 6
