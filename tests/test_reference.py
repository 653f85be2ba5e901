"""Reference log-probabilities: computed once, kept by content, found again, and equal to those computed on the way."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET_TRAINING, task_pairs
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoProcessor

from data_builders.hf_sampler import load_model
from data_builders.shards import read_rows, write_rows
from mpo import MPOConfig, MPOTrainer, reference_cache
from mpo.cli import run_verb
from mpo.collators import PreferenceCollator
from mpo.data import preference_dataset
from mpo.reference_cache import ReferenceCache, data_digest, model_digest, processor_digest
from mpo.scores import REF_COLUMNS, num_pairs

SETTINGS: dict[str, Any] = {
    **QUIET_TRAINING,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "precompute_ref_log_probs": True,
}


@pytest.fixture
def folder(task: Path, tmp_path: Path) -> Path:
    """The task's model and pictures, and ten pairs of which every fourth has no picture, free to be changed."""
    shutil.copytree(task / "images", tmp_path / "images")
    write_rows(tmp_path / "pairs.jsonl", task_pairs(task, 10))
    return tmp_path


def build(task: Path, folder: Path, dataset: Dataset | None = None, **settings: Any) -> MPOTrainer:
    model = settings.pop("model", None) or load_model(task / "model", dtype="float32")
    parts = {name: settings.pop(name) for name in ("ref_model", "eval_dataset", "peft_config") if name in settings}
    args = MPOConfig(str(folder / "out"), **{**SETTINGS, "ref_logps_dir": str(folder / "reference"), **settings})
    dataset = preference_dataset([folder / "pairs.jsonl"], folder) if dataset is None else dataset
    processor = AutoProcessor.from_pretrained(task / "model")
    processing = processor if "images" in dataset.column_names else processor.tokenizer
    return MPOTrainer(model=model, args=args, train_dataset=dataset, processing_class=processing, **parts)


def losses(trainer: MPOTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def refuse_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute_ref_log_probs(*arguments: Any) -> None:
        raise AssertionError("the reference was asked again")

    monkeypatch.setattr(MPOTrainer, "compute_ref_log_probs", compute_ref_log_probs)


@pytest.mark.parametrize("vision", [True, False])
def test_computed_ahead_gives_the_same_losses_and_is_found_by_the_next_run(
    task: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, vision: bool
) -> None:
    dataset = preference_dataset([folder / "pairs.jsonl"], folder)
    dataset = dataset if vision else dataset.remove_columns("images")
    expected = losses(build(task, folder, dataset, precompute_ref_log_probs=False))
    trainer = build(task, folder, dataset)
    assert trainer.ref_model is None
    assert losses(trainer) == pytest.approx(expected, abs=1e-6)
    refuse_to_compute(monkeypatch)
    assert losses(build(task, folder, dataset)) == pytest.approx(expected, abs=1e-6)


def test_the_numbers_are_the_references_own(task: Path, folder: Path) -> None:
    trainer = build(task, folder)
    dataset = preference_dataset([folder / "pairs.jsonl"], folder)
    model = load_model(task / "model", dtype="float32")
    batch = PreferenceCollator(trainer.processing_class)([dataset[row] for row in range(10)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        logps = model(**inputs).logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0].masked_fill(labels[:, 1:] == -100, 0)
    chosen, rejected = picked.sum(dim=1).chunk(2)
    assert trainer.train_dataset["ref_chosen_logps"] == pytest.approx(chosen.tolist(), abs=1e-4)
    assert trainer.train_dataset["ref_rejected_logps"] == pytest.approx(rejected.tolist(), abs=1e-4)


def test_a_pass_that_was_killed_goes_on_after_its_last_whole_shard(
    task: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_cache, "_ROWS_PER_SHARD", 4)
    whole = build(task, folder, ref_logps_dir=str(folder / "whole")).train_dataset["ref_chosen_logps"]
    compute, asked = MPOTrainer.compute_ref_log_probs, []

    def killed(trainer: MPOTrainer, model: Any, inputs: Any) -> Any:
        asked.append(num_pairs(inputs))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return compute(trainer, model, inputs)

    monkeypatch.setattr(MPOTrainer, "compute_ref_log_probs", killed)
    with pytest.raises(KeyboardInterrupt):
        build(task, folder, precompute_ref_batch_size=2)
    assert len(list((folder / "reference").glob("*/0*.jsonl"))) == 1  # rows 4 and 5 were computed, and are lost
    trainer = build(task, folder, precompute_ref_batch_size=2)
    assert asked == [2, 2, 2, 2, 2, 2, 2]
    assert trainer.train_dataset["ref_chosen_logps"] == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("changed", ["reference model", "data set", "picture", "processor", "max length"])
def test_whatever_the_numbers_depend_on_is_noticed(
    task: Path, folder: Path, caplog: pytest.LogCaptureFixture, changed: str
) -> None:
    build(task, folder)
    settings: dict[str, Any] = {}
    if changed == "reference model":
        settings["model"] = load_model(task / "model", dtype="float32")
        with torch.no_grad():
            settings["model"].lm_head.weight[5, 3] += 1e-3
    elif changed == "data set":
        rows = list(read_rows(folder / "pairs.jsonl"))
        write_rows(folder / "pairs.jsonl", [*rows[:-1], {**rows[-1], "rejected": "9"}])
    elif changed == "picture":
        path = folder / "images" / "sft-00000.png"
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    elif changed == "max length":
        settings["max_length"] = 500
    else:
        model = shutil.copytree(task / "model", folder / "model")
        template = (model / "chat_template.jinja").read_text()
        (model / "chat_template.jinja").write_text("!" + template)
        task, settings["model"] = folder, load_model(task / "model", dtype="float32")
    caplog.clear()
    build(task, folder, **settings)
    assert len(list((folder / "reference").iterdir())) == 2
    name = "data set" if changed == "picture" else changed
    assert [record for record in caplog.messages if f"computed anew: {folder / 'reference'}" in record]
    assert [record for record in caplog.messages if record.endswith(f"has another {name}.")]


def test_only_content_counts_so_an_entry_can_be_carried_to_another_machine(
    task: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build(task, folder).train_dataset["ref_chosen_logps"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("images", "reference"):
        shutil.copytree(folder / name, elsewhere / name)
    shutil.copytree(task / "model", elsewhere / "model")
    shutil.copy(folder / "pairs.jsonl", elsewhere)
    refuse_to_compute(monkeypatch)
    assert build(elsewhere, elsewhere).train_dataset["ref_chosen_logps"] == expected


def test_an_entry_that_was_tampered_with_is_refused_or_completed(task: Path, folder: Path) -> None:
    expected = list(build(task, folder).train_dataset["ref_chosen_logps"])
    (shard,) = (folder / "reference").glob("*/00000.jsonl")
    first, *others = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(others))
    assert build(task, folder).train_dataset["ref_chosen_logps"] == pytest.approx(expected, abs=1e-4)
    shard.write_text("".join([*others, first.replace('"row": 0', '"row": 10')]))
    with pytest.raises(ValueError, match="holds 11 rows of reference log-probabilities for 10 rows of data"):
        build(task, folder)


def test_a_reference_model_of_its_own_is_used_and_let_go(task: Path, folder: Path) -> None:
    reference = load_model(task / "model", dtype="float32")
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.5)
    own = build(task, folder, ref_model=reference)
    assert own.ref_model is None
    expected = build(task, folder, model=reference)
    assert own.train_dataset["ref_chosen_logps"] == expected.train_dataset["ref_chosen_logps"]
    assert len(list((folder / "reference").iterdir())) == 1


def test_an_adapters_reference_is_the_model_below_it(task: Path, folder: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    plain = build(task, folder).train_dataset["ref_chosen_logps"]
    trainer = build(task, folder, peft_config=lora)
    assert trainer.train_dataset["ref_chosen_logps"] == pytest.approx(plain, abs=1e-6)
    first = build(task, folder, peft_config=lora, seed=1)  # another adapter, the same model below it
    assert model_digest(first.model) == model_digest(trainer.model)


def test_an_adapter_that_is_trained_further_is_its_own_reference(task: Path, folder: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def adapted() -> PeftModel:
        torch.manual_seed(3)
        return get_peft_model(load_model(task / "model", dtype="float32"), lora)

    plain = build(task, folder).train_dataset["ref_chosen_logps"]
    ahead = build(task, folder, model=adapted())
    assert ahead.train_dataset["ref_chosen_logps"] != pytest.approx(plain, abs=1e-3)
    on_the_way = build(task, folder, model=adapted(), precompute_ref_log_probs=False)
    assert losses(ahead) == pytest.approx(losses(on_the_way), abs=1e-5)
    assert ahead.state.log_history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_new_data_can_be_evaluated_while_the_reference_can_still_be_asked(task: Path, folder: Path) -> None:
    dataset = preference_dataset([folder / "pairs.jsonl"], folder)
    unseen, later = dataset.select(range(6, 10)), dataset.select(range(3))
    trainer = build(task, folder, dataset.select(range(6)))
    assert trainer.evaluate(unseen)["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    trainer.train()
    assert trainer.evaluate(unseen)["eval_rewards/margins"] != 0.0
    assert "eval_a_loss" in trainer.evaluate({"a": unseen})
    with pytest.raises(ValueError, match="cannot be computed any more"):
        trainer.evaluate(later)
    lora = build(task, folder, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    lora.train()
    assert {"eval_loss", "eval_rewards/margins"} <= lora.evaluate(later).keys()


def test_data_for_evaluation_gets_its_columns_too(task: Path, folder: Path) -> None:
    dataset = preference_dataset([folder / "pairs.jsonl"], folder)
    parts = {"easy": dataset.select([0, 1]), "hard": dataset.select([2, 3, 4])}
    trainer = build(task, folder, eval_dataset=parts, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert trainer.eval_dataset["hard"].num_rows == 3
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_easy_loss", "eval_hard_loss", "eval_rewards/margins"} <= logged


def test_a_stream_cannot_be_computed_ahead(task: Path, folder: Path) -> None:
    stream = preference_dataset([folder / "pairs.jsonl"], folder).to_iterable_dataset()
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        build(task, folder, stream)


def test_digests_tell_contents_apart_and_nothing_else(task: Path, folder: Path) -> None:
    dataset = preference_dataset([folder / "pairs.jsonl"], folder)
    assert data_digest(dataset) == data_digest(dataset.select(range(10)))
    assert data_digest(dataset.select([1, 0])) != data_digest(dataset.select([0, 1]))
    assert data_digest(dataset.add_column("note", ["x"] * 10)) == data_digest(dataset)
    model = load_model(task / "model", dtype="float32")
    assert model_digest(model) == model_digest(load_model(task / "model", dtype="float32"))
    assert model_digest(model) != model_digest(load_model(task / "model", dtype="bfloat16"))
    model.config.text_config.rms_norm_eps *= 10
    assert model_digest(model) != model_digest(load_model(task / "model", dtype="float32"))
    processor = AutoProcessor.from_pretrained(task / "model")
    assert processor_digest(processor) == processor_digest(AutoProcessor.from_pretrained(task / "model"))
    assert processor_digest(processor) != processor_digest(processor.tokenizer)


def test_shards_are_written_as_rows_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "_ROWS_PER_SHARD", 2)
    cache = ReferenceCache(tmp_path, {"data_set": "a"}, 4)
    assert cache.missing() == [0, 1, 2, 3]
    cache.add([3, 1], [-1.0, -2.0], [-4.0, -5.0])
    cache.add([0], [-3.0], [-6.0])  # not on disk when the run is killed here
    assert cache.missing() == [0, 2]
    again = ReferenceCache(tmp_path, {"data_set": "a"}, 4)
    again.add([2], [-3.5], [-6.5])
    again.add([0], [-3.0], [-6.0])
    assert again.columns() == {
        "ref_chosen_logps": [-3.0, -2.0, -3.5, -1.0],
        "ref_rejected_logps": [-6.0, -5.0, -6.5, -4.0],
    }
    settings = json.loads((again.folder / "settings.json").read_text())
    assert settings == {"data_set": "a", "rows": 4, "inputs": {}}


def test_all_pairs_of_a_question_are_asked_together(task: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(read_rows(folder / "pairs.jsonl"))[:4]
    mixed = [{**row, "id": f"{row['id']}.{n}", "rejected": f"{n}"} for n in (1, 2, 3) for row in rows]
    write_rows(folder / "pairs.jsonl", mixed)
    plain = build(task, folder, share_prefixes=False, ref_logps_dir=str(folder / "plain"))
    compute, asked = MPOTrainer.compute_ref_log_probs, []

    def counted(trainer: MPOTrainer, model: Any, inputs: Any) -> Any:
        asked.append((num_pairs(inputs), int((inputs["shift_labels"] != -100).sum())))
        return compute(trainer, model, inputs)

    monkeypatch.setattr(MPOTrainer, "compute_ref_log_probs", counted)
    trainer = build(task, folder, precompute_ref_batch_size=2)
    assert [pairs for pairs, _ in asked] == [3, 3, 3, 3]
    once = []
    for question in range(4):  # every token of a response counts once for what stands before it
        batch = plain.data_collator([plain.train_dataset[row] for row in range(question, 12, 4)])
        rows_and_masks = zip(batch["input_ids"].tolist(), batch["completion_mask"].tolist(), strict=True)
        once.append(len({tuple(ids[: i + 1]) for ids, mask in rows_and_masks for i, m in enumerate(mask) if m}))
    assert [labels for _, labels in asked] == once
    for name in REF_COLUMNS:
        assert trainer.train_dataset[name] == pytest.approx(list(plain.train_dataset[name]), abs=1e-4)


def test_the_verb_computes_what_training_then_finds(
    task: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**SETTINGS, "ref_logps_dir": folder / "reference", "output_dir": folder / "out"}
    settings |= {"model_name_or_path": task / "model", "data": folder / "pairs.jsonl", "image_root": folder}
    words = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    caplog.set_level(logging.WARNING)
    summary = run_verb("reference", words)
    assert summary.rows[0][:2] == ["train", "10"]
    assert str(folder / "reference") in summary.notes[0]
    assert not any((folder / "out").iterdir())
    refuse_to_compute(monkeypatch)
    assert run_verb("train", words).rows[1] == ["optimizer steps", "3"]


def test_without_a_folder_entries_lie_beside_cached_data_sets(task: Path, folder: Path) -> None:
    trainer = build(task, folder, precompute_ref_log_probs=False, ref_logps_dir=None)
    assert trainer.reference_root().name == "mpo_ref_logps"
