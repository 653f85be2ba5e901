"""MPOTrainer against TRL's own trainer, against itself cut in other ways, and against a run that was never stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET_TRAINING, task_pairs
from datasets import Dataset
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer

from data_builders.hf_sampler import load_model
from data_builders.records import InputError
from data_builders.shards import read_rows, write_rows
from mpo import MPOConfig, MPOTrainer
from mpo.data import preference_dataset
from mpo.scores import sequence_logps
from mpo.train import run as train
from mpo.training import StageConfig, last_checkpoint

SETTINGS: dict[str, Any] = {
    **QUIET_TRAINING,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
}


@pytest.fixture(scope="module")
def pairs(task: Path) -> Path:
    """Sixteen pairs of which every fourth has no picture."""
    path = task / "pairs.jsonl"
    write_rows(path, task_pairs(task, 16))
    return path


def text_only(dataset: Dataset) -> Dataset:
    return dataset.remove_columns("images") if "images" in dataset.column_names else dataset


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run(trainer_class: type, args: Any, task: Path, dataset: Dataset, **kwargs: Any) -> Any:
    processor = AutoProcessor.from_pretrained(task / "model")
    processing = processor if "images" in dataset.column_names else processor.tokenizer
    model = load_model(task / "model", dtype="float32")
    trainer = trainer_class(model=model, args=args, train_dataset=dataset, processing_class=processing, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("vision", [True, False])
def test_it_equals_trl_without_the_shift_and_with_token_reduction(
    task: Path, pairs: Path, tmp_path: Path, vision: bool
) -> None:
    dataset = preference_dataset([pairs], task)
    dataset = dataset if vision else text_only(dataset)
    mixed = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    mixed |= {**SETTINGS, "optim": "sgd", "learning_rate": 0.1}  # weights then differ by gradients, not by their signs
    theirs = run(DPOTrainer, DPOConfig(str(tmp_path / "trl"), **mixed), task, dataset)
    args = MPOConfig(str(tmp_path / "mpo"), **mixed, reward_shift_decay=1.0, sft_reduction="token")
    ours = run(MPOTrainer, args, task, dataset)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    for name in ("rewards/margins", "rewards/chosen", "logps/rejected", "logits/chosen", "entropy", "num_tokens"):
        expected = [entry[name] for entry in theirs.state.log_history if name in entry]
        found = [entry[name] for entry in ours.state.log_history if name in entry]
        assert found == pytest.approx(expected, abs=1e-4), name
    expected_weights = dict(theirs.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        torch.testing.assert_close(weight, expected_weights[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_first_loss_is_the_one_of_a_policy_equal_to_its_reference(task: Path, pairs: Path, tmp_path: Path) -> None:
    args = MPOConfig(str(tmp_path), **{**SETTINGS, "max_steps": 1})
    log = run(MPOTrainer, args, task, preference_dataset([pairs], task)).state.log_history[0]
    assert log["loss"] - log["loss/generation"] == pytest.approx(0.831777, abs=1e-5)
    assert log["loss/preference"] == pytest.approx(0.693147, abs=1e-5)
    assert log["reward_shift"] == 0.0


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_losses_do_not_depend_on_how_a_step_is_cut(task: Path, pairs: Path, tmp_path: Path, reduction: str) -> None:
    dataset = preference_dataset([pairs], task)
    histories = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        args = MPOConfig(str(tmp_path / f"{size}"), **{**SETTINGS, **cut}, sft_reduction=reduction)
        trainer = run(MPOTrainer, args, task, dataset)
        histories.append((losses(trainer), trainer.reward_shift.mean))
    for found, shift in histories[1:]:
        assert found == pytest.approx(histories[0][0], abs=2e-5)
        assert shift == pytest.approx(histories[0][1], abs=1e-6)


def test_an_uneven_last_step_weighs_every_pair_alike(task: Path, pairs: Path, tmp_path: Path) -> None:
    dataset = preference_dataset([pairs], task).select(range(7))
    found = []
    for size, accumulation in ((7, 1), (3, 3)):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer = run(MPOTrainer, MPOConfig(str(tmp_path / f"{size}"), **{**SETTINGS, **cut}), task, dataset)
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], abs=2e-5)


def test_the_shift_is_the_mean_of_the_rewards_of_earlier_steps(task: Path, pairs: Path, tmp_path: Path) -> None:
    trainer = run(MPOTrainer, MPOConfig(str(tmp_path), **SETTINGS), task, preference_dataset([pairs], task))
    log = [entry for entry in trainer.state.log_history if "reward_shift" in entry]
    means = [(entry["rewards/chosen"] + entry["rewards/rejected"]) / 2 for entry in log]
    shifts = [entry["reward_shift"] for entry in log]
    assert shifts == pytest.approx([0.0, means[0], (means[0] + means[1]) / 2], abs=1e-6)
    assert trainer.reward_shift.mean == pytest.approx(sum(means) / 3, abs=1e-6)


def test_evaluation_leaves_the_shift_alone(task: Path, pairs: Path, tmp_path: Path) -> None:
    dataset = preference_dataset([pairs], task)
    trainer = run(MPOTrainer, MPOConfig(str(tmp_path), **SETTINGS), task, dataset, eval_dataset=dataset.select([0, 1]))
    before = trainer.reward_shift.state_dict()
    metrics = trainer.evaluate()
    assert trainer.reward_shift.state_dict() == before
    assert metrics["eval_reward_shift"] == before["mean"]
    assert {"eval_loss", "eval_loss/quality", "eval_rewards/margins"} <= metrics.keys()


def test_a_resumed_run_gives_the_same_numbers(task: Path, pairs: Path, tmp_path: Path) -> None:
    dataset = preference_dataset([pairs], task)
    saving = {**SETTINGS, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = run(MPOTrainer, MPOConfig(str(tmp_path / "run"), **saving), task, dataset)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "reward_shift.json").read_text())
    assert state["count"] == 2 * 8 * 2  # two steps of eight pairs
    args = MPOConfig(str(tmp_path / "again"), **saving)
    model = load_model(task / "model", dtype="float32")
    processor = AutoProcessor.from_pretrained(task / "model")
    resumed = MPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed)[2:] == pytest.approx(losses(whole)[2:], abs=1e-6)
    assert resumed.reward_shift.mean == pytest.approx(whole.reward_shift.mean, abs=1e-7)


def test_a_checkpoint_without_reward_shift_is_refused(task: Path, pairs: Path, tmp_path: Path) -> None:
    dataset = preference_dataset([pairs], task)
    saving = {**SETTINGS, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = run(MPOTrainer, MPOConfig(str(tmp_path), **saving), task, dataset)
    (tmp_path / "checkpoint-1" / "reward_shift.json").unlink()
    with pytest.raises(ValueError, match="was not saved by MPOTrainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    for step, text in ((2, "{}"), (4, '{"log_hist'), (10, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"loss_type": ["sigmoid", "hinge"]}, "use `trl.DPOTrainer`"),
        ({"loss_type": ["sft", "sft"]}, "names a term twice"),
        ({"loss_weights": [1.0]}, "same length"),
        ({"label_smoothing": 0.1}, "Leave it at 0.0"),
        ({"f_divergence_type": "js_divergence"}, "Leave it at 'reverse_kl'"),
        ({"use_weighting": True}, "one loss per pair"),
        ({"padding_free": True}, "TRL 1.16 ignores it"),
    ],
)
def test_what_the_loss_cannot_honour_is_refused(tmp_path: Path, settings: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        MPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_trls_own_config_is_refused_by_name(task: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be an `MPOConfig`"):
        MPOTrainer(model=str(task / "model"), args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_terms_can_be_left_out_and_the_defaults_are_the_papers(tmp_path: Path) -> None:
    cpu = {"use_cpu": True, "bf16": False}
    assert MPOConfig(str(tmp_path), **cpu).term_weights == (0.8, 0.2, 1.0)
    assert MPOConfig(str(tmp_path), **cpu, loss_type="sigmoid", loss_weights=[1.0]).term_weights == (1.0, 0.0, 0.0)
    assert MPOConfig(str(tmp_path), **cpu, loss_type=["sft", "sigmoid"]).term_weights == (0.8, 0.0, 1.0)


def test_log_probs_of_responses_are_summed_in_single_precision() -> None:
    logps = torch.full((2, 4096), -0.1, dtype=torch.bfloat16)
    mask = torch.ones(2, 4096)
    exact = 4096 * logps[0, 0].double().item()
    assert sequence_logps(logps, mask).tolist() == pytest.approx([exact, exact], rel=1e-6)
    assert sequence_logps(logps, mask).dtype == torch.float32


def test_ld_alpha_weighs_what_a_response_is_longer_by() -> None:
    logps = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])  # the shared length is one token
    assert sequence_logps(logps, mask, 0.5).tolist() == [-1.0 + 0.5 * -6.0, -8.0]


def test_lora_takes_the_model_without_its_adapter_as_reference(task: Path, pairs: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    args = MPOConfig(str(tmp_path), **SETTINGS)
    trainer = run(MPOTrainer, args, task, preference_dataset([pairs], task), peft_config=lora)
    assert trainer.ref_model is None
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert last["rewards/chosen"] != 0.0


def test_the_verb_trains_saves_whole_and_goes_on(task: Path, pairs: Path, tmp_path: Path) -> None:
    from trl import ModelConfig

    output = tmp_path / "out"
    config = StageConfig(data=[str(pairs)], image_root=str(task), train=["vision", "projector"])
    model = ModelConfig(model_name_or_path=str(task / "model"))
    saving = {**SETTINGS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    train(config, model, MPOConfig(str(output), **saving))
    unused = "post_layernorm"  # of the tower: the features are taken before it
    before, after = (dict(load_model(path).named_parameters()) for path in (task / "model", output))
    for name, weight in before.items():
        frozen = "language_model" in name or "lm_head" in name or unused in name
        assert torch.equal(weight, after[name]) == frozen, name
    assert not (output / ".saving").exists()
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 3
    assert train(config, model, MPOConfig(str(output), **saving)).rows[1] == ["optimizer steps", "3"]
    with pytest.raises(InputError, match="other settings"):
        train(config, model, MPOConfig(str(output), **{**saving, "learning_rate": 5e-4}))


@pytest.mark.parametrize("way", ["plain", "accumulated", "checkpointing", "lora", "grouped", "text", "ahead"])
def test_forest_gives_the_losses_of_separate_rows_for_twenty_steps(
    task: Path, pairs: Path, tmp_path: Path, way: str
) -> None:
    from peft import LoraConfig

    rows = list(read_rows(pairs))[:6]
    twice = [{**row, "id": f"{row['id']}.{n}", "rejected": f"{n} {row['rejected']}"} for n in "123" for row in rows]
    write_rows(tmp_path / "pairs.jsonl", twice)
    dataset = preference_dataset([tmp_path / "pairs.jsonl"], task)
    dataset = text_only(dataset) if way == "text" else dataset
    settings = {
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "checkpointing": {"gradient_checkpointing": True},
        "grouped": {"group_by_question": True},
        "ahead": {"precompute_ref_log_probs": True, "ref_logps_dir": str(tmp_path / "reference")},
    }.get(way, {})
    lora = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])} if way == "lora" else {}
    found, logs = [], []
    for share in (True, False):
        args = MPOConfig(str(tmp_path), **{**SETTINGS, "max_steps": 20, **settings}, share_prefixes=share)
        trainer = run(MPOTrainer, args, task, dataset, **lora)
        assert trainer.shares_prefixes == share
        found.append(losses(trainer))
        logs.append(trainer.state.log_history[-2])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    for name in ("rewards/margins", "logps/chosen", "entropy", "mean_token_accuracy", "num_tokens", "reward_shift"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-3), name


def test_forest_batches_of_one_question_share_it_and_go_on_after_a_stop(
    task: Path, pairs: Path, tmp_path: Path
) -> None:
    rows = [
        {**row, "id": f"{n} {row['id']}", "rejected": str(n)} for n in range(4) for row in list(read_rows(pairs))[:8]
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    dataset = preference_dataset([tmp_path / "pairs.jsonl"], task)
    saving = {**SETTINGS, "max_steps": 12, "save_strategy": "steps", "save_steps": 10, "group_by_question": True}
    whole = run(MPOTrainer, MPOConfig(str(tmp_path / "run"), **saving), task, dataset)
    sizes = [len({tuple(row["prompt"][0]["content"]) for row in batch}) for batch in batches_of(whole)]
    assert sizes == [1] * 8
    args = MPOConfig(str(tmp_path / "again"), **saving)
    model, processor = load_model(task / "model", dtype="float32"), AutoProcessor.from_pretrained(task / "model")
    resumed = MPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))  # in the second epoch
    assert losses(resumed)[10:] == pytest.approx(losses(whole)[10:], abs=1e-6)


def batches_of(trainer: MPOTrainer) -> list[list[dict[str, Any]]]:
    """The rows of each micro-batch of an epoch."""
    trainer.data_collator = list
    return [list(batch) for batch in trainer.get_train_dataloader()]


def test_forest_that_a_model_cannot_take_is_said_once_and_rows_are_computed_one_by_one(
    task: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo.forest_inputs._SHOWN_EXACT", set())
    trainer = run(MPOTrainer, MPOConfig(str(tmp_path), **SETTINGS), task, preference_dataset([pairs], task))
    assert not trainer.shares_prefixes
    (note,) = trainer.notes
    assert note.startswith("Prefixes are not shared: llava is not among the families")
