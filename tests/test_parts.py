"""Settings by part: learning rates, drop path, adapters and quantization; in the trainer and on the command line."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import QUIET_TRAINING, task_pairs
from peft import LoraConfig
from safetensors.torch import load_file
from test_models import build
from tiny_models import FAMILIES
from tiny_models import build as save_family
from tiny_runs import Tiny, logged, make_trainer, save_models
from torch import Tensor, nn
from trl import ModelConfig

from data_builders.records import InputError
from data_builders.shards import write_rows
from mpo import MPOTrainer, training
from mpo.cli import VERBS, run_verb
from mpo.drop_path import set_drop_path, without_chance
from mpo.models import lora_targets, part_of, residual_branches
from mpo.optimizers import part_groups
from mpo.settings import describe_settings

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    return save_models(tmp_path_factory.mktemp("models"))


def test_groups_are_by_part_and_by_weight_decay_the_common_rate_first() -> None:
    model = nn.ModuleDict({"vision_tower": nn.Linear(2, 4), "language_model": nn.Linear(2, 5)})
    rates = {"vision": 2e-6}
    decay = {"learning_rate": 1e-5, "weight_decay": 0.05, "decayed": ["vision_tower.weight", "language_model.weight"]}
    found = part_groups(model, rates, **decay)
    told = [(g["part"], g["lr"], g["weight_decay"], [p.numel() for p in g["params"]]) for g in found]
    assert told == [
        ("llm", 1e-5, 0.05, [10]),
        ("llm", 1e-5, 0.0, [5]),
        ("vision", 2e-6, 0.05, [8]),
        ("vision", 2e-6, 0.0, [4]),
    ]


def test_weight_decay_is_on_the_same_weights_as_without_rates_by_part(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    def decays(**settings: Any) -> dict[str, float]:
        trainer = make_trainer(MPOTrainer, tiny["vision"], tmp_path, {**ADAMW, **settings})
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        groups = trainer.create_optimizer().param_groups
        return {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}

    plain = decays()
    assert set(plain.values()) == {0.0, 0.1}
    assert decays(part_learning_rates={"vision": 1e-4}) == plain


def test_each_part_learns_at_its_rate_and_all_follow_one_schedule(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    settings = {**ADAMW, "weight_decay": 0.0, "max_steps": 3, "lr_scheduler_type": "linear"}
    settings["part_learning_rates"] = {"vision": 1e-4, "projector": 1e-5}
    trainer = make_trainer(MPOTrainer, tiny["vision"], tmp_path, settings)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    largest = dict.fromkeys(("vision", "projector", "llm"), 0.0)
    for name, parameter in trainer.model.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        largest[part_of(name)] = max(largest[part_of(name)], moved)
    # Adam's steps are as large as the rate, whatever the gradient: 1 + 2/3 + 1/3 of it
    assert largest == pytest.approx({"vision": 2e-4, "projector": 2e-5, "llm": 2e-3}, rel=0.2)
    shares = pytest.approx([1, 2 / 3, 1 / 3])
    assert [rate / 1e-3 for rate in logged(trainer, "learning_rate")] == shares
    assert [rate / 1e-4 for rate in logged(trainer, "learning_rate/vision")] == shares
    assert [rate / 1e-5 for rate in logged(trainer, "learning_rate/projector")] == shares
    assert logged(trainer, "learning_rate/llm") == logged(trainer, "learning_rate")


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"tower": 1e-6}, r"`part_learning_rates` names \['tower'\]: the parts of a model are vision, projector, llm"),
        ({"vision": 0.0}, "gives vision 0.0: to freeze a part, leave it out of `train`"),
    ],
)
def test_rates_that_cannot_be_meant_are_refused(
    tiny: dict[str, Tiny], tmp_path: Path, rates: dict[str, float], message: str
) -> None:
    trainer = make_trainer(MPOTrainer, tiny["vision"], tmp_path, {"part_learning_rates": rates})
    with pytest.raises(InputError, match=message):
        trainer.train()


def test_rates_are_refused_beside_an_optimizer_that_has_its_own(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    model = tiny["vision"].load()
    own = {"model": model, "optimizers": (torch.optim.SGD(model.parameters(), 1e-3), None)}
    settings = {"part_learning_rates": {"vision": 1e-4}}
    with pytest.raises(InputError, match="`part_learning_rates` is set, and so is an optimizer with learning rates"):
        make_trainer(MPOTrainer, tiny["vision"], tmp_path, settings, **own).train()


def test_a_step_without_pictures_moves_the_tower_by_momentum_and_decay(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    """As under DeepSpeed, which knows no missing gradient."""
    rows = tiny["vision"].pairs.select([0, 2, 2])  # the second and third pair have no picture
    one = {"per_device_train_batch_size": 1, "max_steps": 2, **ADAMW}
    trainer = make_trainer(MPOTrainer, tiny["vision"], tmp_path, one, train_dataset=rows)
    trainer.train()
    weight = trainer.model.get_parameter("model.vision_tower.encoder.layers.0.mlp.fc1.weight")
    assert trainer.optimizer.state[weight]["step"].item() == 2


def internvl() -> nn.Module:
    torch.manual_seed(0)
    _, model = FAMILIES["internvl"]()
    for layer in model.model.vision_tower.encoder.layer:
        nn.init.ones_(layer.lambda_1)  # as they are set, next to nothing would come of a branch
        nn.init.ones_(layer.lambda_2)
    return model


def features(model: nn.Module, num_pictures: int = 3) -> Tensor:
    """What the tower makes of some noise, (pictures, tokens, hidden)."""
    pictures = torch.randn(num_pictures, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    return model.model.vision_tower(pictures).last_hidden_state


def test_rates_of_drop_path_grow_linearly_from_the_first_layer_to_the_last() -> None:
    assert set_drop_path(build("InternVL"), 0.4) == [0.4]
    assert set_drop_path(internvl(), 0.1) == pytest.approx([0.0, 0.1])
    assert set_drop_path(FAMILIES["llava"]()[1], 0.1) == pytest.approx([0.0, 0.1])


@pytest.mark.parametrize("place", [0, 1], ids=["attention", "mlp"])
def test_a_picture_keeps_a_branch_whole_or_loses_it_and_the_mean_stays(place: int) -> None:
    model = internvl()
    set_drop_path(model, 0.25)
    branch = residual_branches(model)[-1][place]
    hidden = torch.randn(8000, 2, 32)
    with torch.no_grad():
        results = branch.train()(hidden), branch.eval()(hidden)
    dropped, whole = (result[0] if isinstance(result, tuple) else result for result in results)
    is_gone = (dropped == 0).all(dim=2).all(dim=1)
    assert is_gone.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(dropped[~is_gone], whole[~is_gone] / 0.75)
    torch.testing.assert_close(dropped.mean(dim=0), whole.mean(dim=0), atol=0.01, rtol=0)


def test_drop_path_is_for_training_alone() -> None:
    plain, model = internvl(), internvl()
    set_drop_path(model, 0.5)
    with torch.no_grad():
        assert torch.equal(features(model.eval()), features(plain.eval()))
        assert (features(model.train()) - features(plain)).abs().amax(dim=(1, 2)).max() > 0.01
        with without_chance(model):
            assert torch.equal(features(model), features(plain))
    assert all(module.training for module in model.modules())


def test_what_was_not_in_training_mode_is_not_put_into_it() -> None:
    model = internvl().train()
    model.model.vision_tower.eval()
    with without_chance(model):
        assert not any(module.training for module in model.modules())
    assert model.model.language_model.training
    assert not any(module.training for module in model.model.vision_tower.modules())


def test_activations_that_are_computed_again_drop_the_same_paths() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = internvl().train()
        set_drop_path(model, 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        features(model).square().sum().backward()
        gradients.append(residual_branches(model)[0][1].fc1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_policy_that_is_its_own_reference_drops_no_path_as_such(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    save_family("internvl", tmp_path / "model")
    own = Tiny(tmp_path / "model", tiny["vision"].pairs)
    below = make_trainer(MPOTrainer, own, tmp_path / "below")
    model = own.load()
    set_drop_path(model, 0.9)
    lora = LoraConfig(r=2, target_modules=lora_targets(model, ["vision", "llm"]))
    trainer = make_trainer(MPOTrainer, own, tmp_path / "own", model=model, peft_config=lora)
    assert trainer.ref_model is None
    batch = trainer.data_collator(list(trainer.train_dataset))
    expected = torch.cat(below.compute_ref_log_probs(below.ref_model, batch))
    trainer.model.train()
    torch.testing.assert_close(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)), expected)
    assert trainer.model.training


@pytest.fixture(scope="module")
def settings(task: Path) -> dict[str, Any]:
    """Of `mpo train` for one step."""
    write_rows(task / "four_pairs.jsonl", task_pairs(task, 4))
    data = {"data": str(task / "four_pairs.jsonl"), "image_root": str(task), "model_name_or_path": str(task / "model")}
    return {**QUIET_TRAINING, **data, "per_device_train_batch_size": 4, "max_steps": 1}


def train(settings: dict[str, Any], folder: Path, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "train.yaml").write_text(yaml.safe_dump({"output_dir": str(folder / "out"), **settings, **more}))
    run_verb("train", ["--config", str(folder / "train.yaml")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"part_learning_rates": {"tower": 1e-6}},
            r"`part_learning_rates` names \['tower'\]: the parts of a model are",
        ),
        (
            {"train": ["llm"], "part_learning_rates": {"vision": 1e-6}},
            r"`part_learning_rates` names \['vision'\], of which nothing is trained",
        ),
        (
            {"use_peft": True, "part_learning_rates": {"vision": 1e-6}},
            r"names \['vision'\], of which nothing is trained.*with LoRA `lora_parts` or `lora_modules_to_save`",
        ),
        ({"drop_path": 1.5}, r"`drop_path=1.5` is no rate above 0 and below 1"),
        ({"drop_path": 0.1, "train": ["llm"]}, "`drop_path` is for training the vision tower, which is frozen here"),
        ({"drop_path": 0.1, "use_peft": True}, "`drop_path` is for training the vision tower, which is frozen here"),
        ({"lora_parts": ["llm"]}, "`lora_parts` says where adapters go, and there are none: add `use_peft: true`"),
        (
            {"use_peft": True, "lora_parts": ["llm"], "lora_target_modules": ["q_proj"]},
            "both `lora_parts` and `lora_target_modules` say where adapters go",
        ),
        ({"use_peft": True, "lora_parts": ["head"]}, r"`lora_parts` names \['head'\]"),
        ({"use_peft": True, "train": ["llm"]}, "name the parts that get adapters in `lora_parts`"),
        ({"load_in_4bit": True}, r"`load_in_4bit` stores weights that cannot be trained: add `use_peft: true`"),
        ({"deepspeed": "zero3.json"}, "`deepspeed` is set, but nothing started this process as a rank: .*torchrun"),
    ],
)
def test_settings_of_parts_that_do_not_fit_are_refused_with_advice(
    settings: dict[str, Any], tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(settings, tmp_path, **more)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_drop_path_is_refused_where_pictures_are_one_sequence(family: str) -> None:
    with pytest.raises(InputError, match="`drop_path` cannot be used with Qwen.*Remove it; InternVL, LLaVA"):
        set_drop_path(FAMILIES[family]()[1], 0.1)


@pytest.mark.parametrize(
    ("has_gpu", "found", "message"),
    [
        (False, object(), "`load_in_8bit` needs a GPU, and this machine has none"),
        (True, None, "`load_in_8bit` needs bitsandbytes, which is not installed: `pip install bitsandbytes`"),
    ],
)
def test_quantization_says_what_the_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, found: object, message: str
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setattr(training, "find_spec", lambda name: found)
    with pytest.raises(InputError, match=message):
        training.check_adapters(training.StageConfig(data=[]), ModelConfig(use_peft=True, load_in_8bit=True))


def test_adapters_by_part_train_beside_modules_that_are_trained_whole(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    chosen = {
        "use_peft": True,
        "lora_r": 2,
        "lora_parts": ["vision"],
        "lora_modules_to_save": ["multi_modal_projector"],
    }
    chosen |= {"part_learning_rates": {"projector": 1e-5}, "drop_path": 0.1, "optim": "adamw_torch"}
    train(settings, tmp_path, **chosen)
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["target_modules"].startswith(r"model\.vision_tower\.encoder\.layers\.\d+\.")
    assert adapter["modules_to_save"] == ["multi_modal_projector"]
    names = {part_of(name) for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    assert names == {"vision", "projector"}
    entry, _ = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert (entry["learning_rate/vision"], entry["learning_rate/projector"]) == (1e-3, 1e-5)


def test_adapters_go_onto_the_language_model_unless_told_otherwise(settings: dict[str, Any], tmp_path: Path) -> None:
    train(settings, tmp_path, use_peft=True, lora_r=2)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert {part_of(name) for name in names} == {"llm"}


def test_a_folder_belongs_to_the_parts_that_it_was_made_with(settings: dict[str, Any], tmp_path: Path) -> None:
    chosen = {"part_learning_rates": {"vision": 1e-4}, "drop_path": 0.1, "optim": "adamw_torch"}
    train(settings, tmp_path, **chosen)
    train(settings, tmp_path, **chosen)  # finds it done
    for name, other in {"part_learning_rates": {"vision": 1e-3}, "drop_path": 0.2}.items():
        with pytest.raises(InputError, match=rf"was filled with other settings \({name}: then"):
            train(settings, tmp_path, **{**chosen, name: other})


@pytest.mark.parametrize("verb", ["train", "sft", "reference"])
def test_the_settings_of_parts_are_explained(verb: str) -> None:
    own, parents = describe_settings(import_module(VERBS[verb].module).CONFIGS)
    told = {setting.name: (setting.type, setting.default) for setting in own}
    assert told["part_learning_rates"] == ("dict[str, float] | None", "null")
    assert told["lora_parts"] == ("list[str] | None", "null")
    assert told["drop_path"] == ("float", "0.0")
    assert parents == ["trl.ModelConfig", "trl.SFTConfig" if verb == "sft" else "trl.DPOConfig"]
