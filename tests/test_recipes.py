"""The recipes: real settings, those that were published; and a tiny model of each family takes steps with them."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_models
import torch
import yaml
from torch import nn

from data_builders.records import InputError
from data_builders.shards import write_rows
from mpo import MPOTrainer
from mpo.cli import VERBS, run_verb
from mpo.data import preference_dataset
from mpo.liger import plan_patches
from mpo.models import part_of
from mpo.settings import read_settings, read_values
from mpo.train import CONFIGS
from mpo.training import prepare

ROOT = Path(__file__).parent.parent


class Recipe(NamedTuple):
    """What a recipe must say, by hand; `parameters` agrees with the count that the Hub shows for the model."""

    family: str
    parameters: int
    gpus: int = 8
    gpu_memory: int = 80
    pairs: int = 256
    learning_rate: float = 2e-7
    warmup_steps: float = 0.03
    max_length: int = 8192
    stage: int | None = 1
    drop_path: float | None = None
    prompt: str = "boxed"
    lora: bool = False


RECIPES = {
    "internvl2_8b": Recipe(
        "internvl",
        8_075_365_376,
        learning_rate=5e-6,
        warmup_steps=0.05,
        max_length=6144,
        drop_path=0.1,
        prompt="final_answer",
    ),
    "internvl2_5_8b": Recipe("internvl", 8_075_365_376, learning_rate=1e-6, max_length=8192, drop_path=0.1),
    "internvl3_8b": Recipe("internvl", 7_944_373_760, max_length=12288, stage=3, drop_path=0.1),
    "internvl3_5_8b": Recipe("internvl", 8_528_318_464, max_length=16384, stage=3, drop_path=0.1, prompt="think"),
    "qwen2_5_vl_7b": Recipe("qwen2_5_vl", 8_292_166_656),
    "qwen2_5_vl_7b_lora": Recipe(
        "qwen2_5_vl", 8_292_166_656, gpus=1, gpu_memory=48, pairs=64, learning_rate=1e-5, stage=None, lora=True
    ),
    "qwen3_vl_8b": Recipe("qwen3_vl", 8_767_123_696),
    "llava_onevision_7b": Recipe(
        "llava_onevision", 8_030_348_832, learning_rate=1e-6, max_length=10240, prompt="final_answer"
    ),
    "smolvlm2_2b_lora": Recipe(
        "smolvlm",
        2_246_784_880,
        gpus=1,
        gpu_memory=24,
        pairs=64,
        learning_rate=1e-5,
        max_length=4096,
        stage=None,
        prompt="final_answer",
        lora=True,
    ),
}
NO_RECIPES = {"accelerate", "architectures", "deepspeed", "quickstart", "mm1", "mm1_5", "mammoth_vl"}
FILES = sorted(path for name in RECIPES for path in (ROOT / "configs" / name).glob("*.yaml"))
LIGER = {"internvl", "llama", "qwen2", "qwen3", "smolvlm"}  # families that Liger has a working function for
ON_A_CPU = {"use_cpu": True, "deepspeed": None, "dataloader_num_workers": 0}
SHORT = {"gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
SHORT |= {"disable_tqdm": True}

each_recipe = pytest.mark.parametrize("name", RECIPES)
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")


def given(name: str, verb: str = "train") -> dict[str, Any]:
    """The settings in a recipe's file, as they stand there; YAML 1.1 takes `5.0e-6` for a number too."""
    return yaml.safe_load((ROOT / "configs" / name / f"{verb}.yaml").read_text(encoding="utf-8"))


def comments(path: Path) -> str:
    """The header of a file, with a command that goes over several lines on one."""
    header = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8")).group()
    return re.sub(r"\s*\\\n#\s*", " ", header)


def commands(path: Path) -> list[list[str]]:
    """What follows `mpo` in each command of a header."""
    lines = [line.removeprefix("#").strip() for line in comments(path).splitlines()]
    words = [shlex.split(line) for line in lines if re.match(r"(mpo|torchrun) [a-z-]", line)]
    return [command[command.index("mpo") + 1 :] for command in words]


def check_command(name: str) -> list[str]:
    return next(words for words in commands(ROOT / "configs" / name / "train.yaml") if words[0] == "check")[1:]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny model of a family, sixteen pairs and their pictures; made once."""
    root = tmp_path_factory.mktemp("tiny")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            tiny_models.build(family, folder)
            rows = tiny_models.preference_rows(16)
            for number, row in enumerate(rows):
                row["images"] = [save(picture, folder, number, place) for place, picture in enumerate(row["images"])]
            write_rows(folder / "train.jsonl", rows)
            write_rows(folder / "sft.jsonl", [{**row, "completion": row["chosen"]} for row in rows])
        return folder

    return make


def save(picture: Any, folder: Path, number: int, place: int) -> str:
    path = f"{number}-{place}.png"
    picture.save(folder / path)
    return path


def arguments(name: str, verb: str, folder: Path, output: Path, **settings: Any) -> list[str]:
    """What follows a verb: a recipe on a tiny model, in one process on a CPU."""
    own = {"model_name_or_path": folder, "data": [str(folder / f"{verb}.jsonl")], "image_root": folder}
    own |= {"output_dir": output / "out"} | ({"ref_logps_dir": output, "use_liger": False} if verb == "train" else {})
    words = ["--config", str(ROOT / "configs" / name / f"{verb}.yaml")]
    for key, value in {**own, **ON_A_CPU, **SHORT, **settings}.items():
        words += [f"--{key}", str(value) if isinstance(value, str | Path) else json.dumps(value)]
    return words


def trainer_of(name: str, folder: Path, output: Path) -> MPOTrainer:
    config, model_config, args = read_settings("train", CONFIGS, arguments(name, "train", folder, output))
    return MPOTrainer(args=args, **prepare(config, model_config, args, preference_dataset))


def trained_parts(model: nn.Module) -> set[str]:
    return {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def num_drops(model: nn.Module) -> int:
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(type(hook).__module__ == "mpo.drop_path" for hook in hooks)


def test_every_folder_of_settings_is_a_recipe_that_is_tested() -> None:
    folders = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    assert folders - NO_RECIPES == set(RECIPES)


@each_file
def test_every_number_stands_beside_its_source(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") and line:
            (value,) = yaml.safe_load(line).values()
            values = value.values() if isinstance(value, dict) else [value]
            if any(isinstance(number, int | float) and not isinstance(number, bool) for number in values):
                assert re.search(r" # \S", line), f"{path.parent.name}/{path.name}: where is this from? {line}"


@each_file
def test_the_commands_of_a_header_are_real_and_the_files_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands(path)
    assert found[0][0] == path.stem.replace("_", "-")
    for verb, *argv in found:
        read_values(verb, import_module(VERBS[verb].module).CONFIGS, argv)
    named = re.findall(r"configs/[\w./-]*\w", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_recipe
def test_a_recipe_has_the_published_settings(name: str) -> None:
    expected, found = RECIPES[name], given(name)
    micro_batch, accumulation = found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
    assert micro_batch * accumulation * expected.gpus == expected.pairs
    assert float(found["learning_rate"]) == expected.learning_rate
    assert found["warmup_steps"] == expected.warmup_steps
    assert found["max_length"] == expected.max_length
    assert found.get("drop_path") == expected.drop_path
    stage = f"configs/deepspeed/zero{expected.stage}.json" if expected.stage else None
    assert found.get("deepspeed") == stage
    if stage:
        assert json.loads((ROOT / stage).read_text())["zero_optimization"]["stage"] == expected.stage
    assert (found["dtype"], found["bf16"], found["gradient_checkpointing"]) == ("bfloat16", True, True)
    assert (found["attn_implementation"], found["group_by_question"]) == ("sdpa", False)
    assert found["precompute_ref_log_probs"] is not expected.lora  # adapters that are off are a reference already


@each_recipe
def test_the_command_of_a_recipe_starts_as_many_processes_as_its_batch_is_cut_for(name: str) -> None:
    header = comments(ROOT / "configs" / name / "train.yaml")
    expected = RECIPES[name]
    assert f"torchrun --nproc_per_node {expected.gpus} -m mpo train --config configs/{name}/train.yaml" in header
    argv = check_command(name)
    assert argv[argv.index("--gpus") + 1] == str(expected.gpus)
    assert argv[argv.index("--gpu-memory") + 1] == str(expected.gpu_memory)
    assert f"of {expected.gpu_memory} GB" in header


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"qwen2_5_vl_7b_lora"}))
def test_each_step_takes_what_the_one_before_it_writes(name: str) -> None:
    sample, judge, dropout, evaluation = (given(name, verb) for verb in ("sample", "judge", "dropout_ntp", "eval"))
    train = given(name)
    assert sample["output"] == judge["responses"] == dropout["responses"] == f"runs/{name}/responses"
    assert judge["output"] == f"runs/{name}/verdicts"
    assert train["data"] == [f"runs/{name}/pairs", dropout["output"]]
    pair = ["pair", "--verdicts", judge["output"], "--output", f"runs/{name}/pairs"]
    assert pair in commands(ROOT / "configs" / name / "train.yaml")
    model = train["model_name_or_path"]
    assert sample["model"] == dropout["model"] == model == given(name, "sft")["model_name_or_path"]
    assert evaluation["models"] == [f"Start={model}", f"MPO={train['output_dir']}"]
    assert sample["prompt"] == judge["style"] == evaluation["prompts"][0] == RECIPES[name].prompt


@each_recipe
def test_the_header_says_what_check_predicts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    said = re.findall(r"predicts (\d+) GiB", comments(ROOT / "configs" / name / "train.yaml"))
    argv = [*check_command(name), "--json", "true"]
    plan = json.loads(run_verb("check", argv).text)
    memory = plan["memory"]
    assert memory["total"] / 2**30 == pytest.approx(int(said[0]), abs=1.0)
    assert memory["total"] < 0.9 * memory["limit"]
    adapters = plan["parameters"]["trained"] if RECIPES[name].lora else 0
    assert plan["parameters"]["total"] - adapters == RECIPES[name].parameters
    if "load_in_4bit" in comments(ROOT / "configs" / name / "train.yaml"):
        plan = json.loads(run_verb("check", [*argv, "--load_in_4bit", "true"]).text)
        assert plan["memory"]["total"] / 2**30 == pytest.approx(int(said[1]), abs=1.0)


@each_recipe
def test_a_tiny_model_takes_two_steps_of_mpo_with_the_settings_of_a_recipe(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe, settings = RECIPES[name], given(name)
    trainer = trainer_of(name, tiny(recipe.family), tmp_path)
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in losses] == [True, True]
    # policy and reference are the same at first, but for bf16's rounding and paths that were dropped
    assert losses[0]["loss"] - losses[0]["loss/generation"] == pytest.approx(0.831777, abs=0.05)
    assert trained_parts(trainer.model) == {"projector", "llm"} | (set() if recipe.lora else {"vision"})
    assert (num_drops(trainer.model) > 0) == (recipe.drop_path is not None)
    assert trainer.ref_model is None
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    frozen = [p.dtype for key, p in trainer.model.named_parameters() if not p.requires_grad or not recipe.lora]
    assert set(frozen) == {torch.bfloat16}
    text_type = trainer.model.config.get_text_config().model_type
    assert settings["use_liger"] == bool(plan_patches(trainer.model.config.model_type, text_type, LIGER))


def test_tiny_models_take_two_steps_on_two_ranks_under_the_deepspeed_files_of_their_recipes(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    names = [name for name, recipe in RECIPES.items() if recipe.stage is not None]
    verbs = []
    for name in names:
        settings = {"deepspeed": str(ROOT / given(name)["deepspeed"])}
        verbs.append(["train", *arguments(name, "train", tiny(RECIPES[name].family), tmp_path / name, **settings)])
    (tmp_path / "verbs.json").write_text(json.dumps(verbs))
    ranks = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *ranks, str(ROOT / "tests" / "rank_verbs.py"), str(tmp_path / "verbs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, timeout=600, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        history = json.loads((tmp_path / name / "out" / "trainer_state.json").read_text())["log_history"]
        losses = [entry for entry in history if "loss" in entry]
        assert [math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in losses] == [True, True], name
        assert losses[0]["loss"] - losses[0]["loss/generation"] == pytest.approx(0.831777, abs=0.05)
        assert (tmp_path / name / "out" / "config.json").is_file()


@each_recipe
def test_a_tiny_model_takes_two_steps_of_sft_with_the_settings_of_a_recipe(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run_verb("sft", arguments(name, "sft", tiny(RECIPES[name].family), tmp_path))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in steps] == [True, True]


def test_the_tower_of_llava_onevision_learns_at_a_fifth_of_the_rate(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    trainer = trainer_of("llava_onevision_7b", tiny("llava_onevision"), tmp_path)
    trainer.create_optimizer()
    rates = {group["part"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"projector": 1e-6, "llm": 1e-6, "vision": 2e-7}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is what is missing")
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.lora])
def test_quantized_weights_are_refused_without_a_gpu(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    argv = arguments(name, "train", tiny(RECIPES[name].family), tmp_path, load_in_4bit=True)
    with pytest.raises(InputError, match="`load_in_4bit` needs a GPU, and this machine has none: remove it"):
        run_verb("train", argv)
