"""Adapters of PEFT under MPOTrainer as under TRL's, and runs that were stopped: the numbers of one that was not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_runs import Tiny, logged, make_trainer, save_models, train, train_as_trl
from torch import Tensor
from trl import DPOTrainer

from mpo import MPOTrainer

ADAPTED = {"vision": r".*language_model.*\.[qv]_proj", "text": ["q_proj", "v_proj"]}
STOPPED: dict[str, tuple[str, dict[str, Any], int]] = {  # model, settings, rewards in the first three steps
    "pictures": ("vision", {}, 24),
    "LoRA": ("text", {"peft_config": LoraConfig(r=2, target_modules=ADAPTED["text"])}, 24),
    "LoRA on pictures": ("vision", {"peft_config": LoraConfig(r=2, target_modules=ADAPTED["vision"])}, 24),
    "DoRA": ("text", {"peft_config": LoraConfig(r=2, target_modules=ADAPTED["text"], use_dora=True)}, 24),
    "an adapter trained further": ("text", {}, 24),
    "an uneven last step": ("text", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 22),
    "a stream": ("text", {"per_device_train_batch_size": 1}, 6),
    "a stream of pictures": ("vision", {"per_device_train_batch_size": 1}, 6),
    "a reference computed ahead": ("vision", {"precompute_ref_log_probs": True}, 24),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def adapter(tiny: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the text model as an earlier run could have left it: far from doing nothing."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=ADAPTED["text"], init_lora_weights=False)
    get_peft_model(tiny["text"].load(), lora).save_pretrained(folder)
    return folder


def adapted(tiny: Tiny, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(tiny.load(), adapter, is_trainable=True)


def adapter_weights(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Of the adapter of this name, under the names that they have in the one called default."""
    found = {key: weight.detach().clone() for key, weight in model.named_parameters() if f".{name}." in key}
    return {key.replace(f".{name}.", ".default."): weight for key, weight in found.items()}


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**{name: value for name, value in batch.items() if name != "completion_mask"}).logits


def check_saved(trainer: MPOTrainer, tiny: Tiny, folder: Path) -> None:
    """The adapter that a trainer saves, put onto the untouched model, gives what the trained one does."""
    trainer.save_model(str(folder))
    batch = trainer.data_collator(list(trainer.train_dataset))
    loaded = PeftModel.from_pretrained(tiny.load(), folder)
    torch.testing.assert_close(logits(loaded, batch), logits(trainer.model, batch), atol=1e-5, rtol=0)
    untouched = logits(tiny.load(), batch)
    assert (logits(loaded, batch)[:, -untouched.size(1) :] - untouched).abs().max() > 1e-4  # behind learned prompts


@pytest.mark.parametrize("kind", ["vision", "text"])
@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_variants_of_lora_take_the_model_below_as_reference(
    tiny: dict[str, Tiny], tmp_path: Path, kind: str, variant: str
) -> None:
    lora = LoraConfig(r=2, target_modules=ADAPTED[kind], **{variant: True})
    trainer = train_as_trl(tiny[kind], tmp_path, peft_config=lora)
    assert trainer.ref_model is None
    first, second = logged(trainer, "rewards/chosen")
    assert first == pytest.approx(0.0, abs=1e-6)
    assert abs(second) > 1e-4
    batch = trainer.data_collator(list(trainer.train_dataset))
    below = make_trainer(MPOTrainer, tiny[kind], tmp_path / "below")
    expected = torch.cat(below.compute_ref_log_probs(below.ref_model, batch))
    torch.testing.assert_close(torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)), expected)
    check_saved(trainer, tiny[kind], tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())[variant]


def test_an_adapter_that_is_trained_further_is_its_own_reference(
    tiny: dict[str, Tiny], adapter: Path, tmp_path: Path
) -> None:
    start = adapter_weights(adapted(tiny["text"], adapter), "default")
    theirs, ours = (
        train(cls, tiny["text"], tmp_path / cls.__name__, model=adapted(tiny["text"], adapter))
        for cls in (DPOTrainer, MPOTrainer)
    )
    assert logged(ours) == pytest.approx(logged(theirs), abs=1e-5)
    assert ours.ref_model is None
    first, second = logged(ours, "rewards/chosen")
    assert first == pytest.approx(0.0, abs=1e-6)
    assert abs(second) > 1e-4
    batch = ours.data_collator(list(ours.train_dataset))
    below = make_trainer(MPOTrainer, tiny["text"], tmp_path / "below")
    of_base = torch.cat(below.compute_ref_log_probs(below.ref_model, batch))
    assert (torch.cat(ours.compute_ref_log_probs(ours.model, batch)) - of_base).abs().min() > 1e-3
    reference, trained = (adapter_weights(ours.model, name) for name in ("ref", "default"))
    assert start.keys() == reference.keys() == trained.keys()
    for name, weight in start.items():
        assert torch.equal(reference[name], weight)
        assert not torch.equal(trained[name], weight)
    assert not any(weight.requires_grad for name, weight in ours.model.named_parameters() if ".ref." in name)
    check_saved(ours, tiny["text"], tmp_path / "saved")


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts_train_as_in_trl(tiny: dict[str, Tiny], tmp_path: Path, kind: type[PeftConfig]) -> None:
    settings = {"learning_rate": 30.0, "max_steps": 3}
    prompts = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = train_as_trl(tiny["text"], tmp_path, settings, peft_config=prompts)
    first, *_, last = logged(trainer, "rewards/chosen")
    assert abs(first) > 1e-3  # untrained, they are not nothing
    assert last != pytest.approx(first, abs=1e-4)
    check_saved(trainer, tiny["text"], tmp_path / "saved")


def test_adapters_that_would_do_nothing_or_hide_another_are_refused(
    tiny: dict[str, Tiny], adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="Remove `'lm_head'` from your `target_modules`"):
        make_trainer(MPOTrainer, tiny["text"], tmp_path, peft_config=LoraConfig(target_modules=["lm_head"]))
    lora = LoraConfig(target_modules=ADAPTED["text"])
    with pytest.raises(ValueError, match="merge and unload the existing adapter"):
        make_trainer(MPOTrainer, tiny["text"], tmp_path, model=adapted(tiny["text"], adapter), peft_config=lora)


@pytest.mark.parametrize("case", STOPPED)
def test_a_run_that_was_stopped_gives_the_same_numbers(
    tiny: dict[str, Tiny], adapter: Path, tmp_path: Path, case: str
) -> None:
    kind, settings, num_rewards = STOPPED[case]
    arguments = {"peft_config": settings["peft_config"]} if "peft_config" in settings else {}
    settings = {name: value for name, value in settings.items() if name not in arguments}
    settings |= {"optim": "adamw_torch", "reward_shift_decay": None, "sft_reduction": "sequence", "max_steps": 5}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    if case.startswith("a stream"):  # within its first pass: transformers does not know where a second one begins
        arguments["train_dataset"] = tiny[kind].pairs.to_iterable_dataset()
    elif case == "an uneven last step":  # an epoch's steps are of four pairs and of three
        settings["train_sampling_strategy"] = "random"
        arguments["train_dataset"] = tiny[kind].pairs.select(range(7))

    def fresh(name: str) -> MPOTrainer:
        model = {"model": adapted(tiny[kind], adapter)} if case == "an adapter trained further" else {}
        return make_trainer(MPOTrainer, tiny[kind], tmp_path / name, settings, **arguments, **model)

    whole, resumed = fresh("whole"), fresh("resumed")
    whole.train()
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-3"
    assert json.loads((checkpoint / "reward_shift.json").read_text())["count"] == num_rewards
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name in ("loss", "rewards/margins", "reward_shift"):
        assert logged(resumed, name)[3:] == pytest.approx(logged(whole, name)[3:], abs=1e-6), name
    assert logged(whole, "reward_shift")[4] != 0.0
    assert resumed.reward_shift.state_dict() == pytest.approx(whole.reward_shift.state_dict(), abs=1e-7)
