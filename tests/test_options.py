"""Every option of `trl.DPOConfig` and every way of using `trl.DPOTrainer`: it works as in TRL, or is refused."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from tiny_runs import ROW_BY_ROW, Tiny, check_metrics, logged, make_trainer, save_models, train, train_as_trl
from transformers import (
    AutoProcessor,
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from data_builders.records import InputError
from data_builders.shards import read_rows
from mpo import MPOConfig, MPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")  # TRL's, on purpose

SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
ACTING: list[tuple[str, dict[str, Any]]] = [
    ("text", {"beta": 0.5}),
    ("text", {"loss_type": "sigmoid", "loss_weights": [1.0]}),
    ("text", {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.5, 2.0]}),
    ("text", {"ld_alpha": 0.5}),
    ("vision", {"ld_alpha": 0.5}),
    ("text", {"ld_alpha": 0.5, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}),
    ("text", {"max_length": 49}),
    ("text", {"max_length": 30, "truncation_mode": "keep_end"}),
    ("vision", {"max_length": 60}),
    ("moe", {"router_aux_loss_coef": 0.5}),
    ("moe", {"router_aux_loss_coef": 0.0}),
    ("text", SYNCED),
    ("vision", SYNCED),
    ("text", {"bf16": True, **ROW_BY_ROW}),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def theirs(tiny: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> dict[str, DPOTrainer]:
    """TRL's trainer after two steps, for each model."""
    return {kind: train(DPOTrainer, tiny[kind], tmp_path_factory.mktemp(f"trl_{kind}")) for kind in tiny}


@pytest.fixture(scope="module")
def ours(tiny: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> dict[str, MPOTrainer]:
    """MPO's trainer after the same two steps, for each model; saved after each step."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    return {kind: train(MPOTrainer, tiny[kind], tmp_path_factory.mktemp(f"mpo_{kind}"), saving) for kind in tiny}


def config(folder: Path, **settings: Any) -> MPOConfig:
    return MPOConfig(str(folder), use_cpu=True, bf16=False, **settings)


def with_long_prompts(pairs: Dataset, *rows: int) -> Dataset:
    """The same pairs with an id, and with 40 more tokens in front of the responses of these rows."""

    def lengthen(row: dict[str, Any], index: int) -> dict[str, Any]:
        (turn,) = row["prompt"]
        return {"prompt": [{**turn, "content": turn["content"] + "?" * (40 * (index in rows))}], "id": f"q{index}"}

    return pairs.map(lengthen, with_indices=True)


@pytest.mark.parametrize(("kind", "settings"), ACTING)
def test_an_option_that_acts_gives_trls_numbers(
    tiny: dict[str, Tiny], ours: dict[str, MPOTrainer], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    trainer = train_as_trl(tiny[kind], tmp_path, settings)
    assert logged(trainer) != pytest.approx(logged(ours[kind]), abs=2e-5)


@pytest.mark.parametrize("kind", ["vision", "text", "moe"])
def test_every_metric_of_trl_is_logged_under_its_name(
    theirs: dict[str, DPOTrainer], ours: dict[str, MPOTrainer], kind: str
) -> None:
    for found, expected in zip(ours[kind].state.log_history, theirs[kind].state.log_history, strict=True):
        check_metrics(found, expected)
    assert {"rewards/margins", "logps/chosen", "entropy", "num_tokens"} <= ours[kind].state.log_history[0].keys()
    assert ("aux_loss" in ours[kind].state.log_history[0]) == (kind == "moe")


def test_router_logits_that_only_a_models_config_asks_for_change_nothing(
    tiny: dict[str, Tiny], tmp_path: Path
) -> None:
    found = []
    for trainer_class, is_asked in ((DPOTrainer, True), (MPOTrainer, True), (MPOTrainer, False)):
        model = tiny["moe"].load()
        model.config.output_router_logits = is_asked
        trainer = train(trainer_class, tiny["moe"], tmp_path, {"router_aux_loss_coef": 0.0}, model=model)
        found.append(logged(trainer))
    assert found[1:] == [pytest.approx(found[0], abs=1e-5)] * 2


@pytest.mark.parametrize("kind", ["vision", "text"])
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 1},
        {"remove_unused_columns": False},
        {"label_names": ["labels"]},
    ],
)
def test_an_option_that_is_about_cost_changes_no_loss(
    tiny: dict[str, Tiny], ours: dict[str, MPOTrainer], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    pairs = tiny[kind].pairs.add_column("id", ["a"] * 8)
    trainer = train(MPOTrainer, tiny[kind], tmp_path, settings, train_dataset=pairs)
    assert logged(trainer) == pytest.approx(logged(ours[kind]), abs=1e-6)
    assert trainer.model.is_gradient_checkpointing == ("gradient_checkpointing" in settings)


def test_every_field_of_trls_config_was_thought_of() -> None:
    acting = {name for _, settings in ACTING for name in settings}
    acting |= {"dataset_num_proc", "disable_dropout", "model_init_kwargs", "pad_to_multiple_of", "pad_token"}
    refused = {"activation_offloading", "discopop_tau", "f_alpha_divergence_coef", "f_divergence_type"}
    refused |= {"label_smoothing", "padding_free", "use_weighting"}
    added = {field.name for field in fields(DPOConfig)} - {field.name for field in fields(TrainingArguments)}
    assert added - acting - refused == {"trust_remote_code"}  # TRL hands it to transformers, as MPO does


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"discopop_tau": 0.1}, "belongs to the loss 'discopop'"),
        ({"f_alpha_divergence_coef": 0.2}, "belongs to the divergence"),
        ({"ref_model_mixup_alpha": 0.9}, "without `sync_ref_model=True`"),
        ({"ref_model_sync_steps": 4}, "without `sync_ref_model=True`"),
        ({"ld_alpha": 1.5}, r"not in \[0, 1\]"),
        ({"truncation_mode": "keep_middle"}, r"choose one of \['keep_start', 'keep_end'\]"),
        ({"overlong": "cut"}, r"choose one of \['error', 'drop'\]"),
        ({"sft_reduction": "mean"}, r"choose one of \['sequence', 'token'\]"),
        ({"max_forest_tokens": 512, "share_prefixes": False}, "rows hold no trees"),
        ({"group_by_question": True, "train_sampling_strategy": "sequential"}, "an order of its own"),
        ({"use_liger": True}, "needs a GPU"),
        ({"use_liger_kernel": True}, "`use_liger` changes both models"),
        ({"liger_kernel_config": {"rope": False}}, "all kernels"),
        ({"activation_offloading": True}, "where they are already"),
        ({"accelerator_config": {"dispatch_batches": True}}, "two per pair"),
    ],
)
def test_what_would_be_ignored_is_refused_with_a_reason(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "arguments", "reason"),
    [
        ("text", {"router_aux_loss_coef": 0.1}, {}, "not a Mixture-of-Experts model"),
        ("text", {**SYNCED, "precompute_ref_log_probs": True}, {}, "assumes a fixed reference model"),
        ("text", SYNCED, {"peft_config": LoraConfig(target_modules=["q_proj"])}, "while using a PEFT model"),
        ("text", {}, {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "already instantiated"),
        ("text", {}, {"train_dataset": [{"prompt": "a"}]}, "must be a `Dataset` or `IterableDataset`, got `list`"),
        ("text", {}, {"train_dataset": None}, "`train_dataset` is required"),
        ("text", {"pad_token": "<none>"}, {}, "`pad_token`"),
        ("vision", {"pad_token": "<none>"}, {}, "`pad_token`"),
        ("vision", {"max_length": 60, "truncation_mode": "keep_end"}, {}, "would cut pictures"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    tiny: dict[str, Tiny], tmp_path: Path, kind: str, settings: dict[str, Any], arguments: Any, reason: str
) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=reason):
        make_trainer(MPOTrainer, tiny[kind], tmp_path, settings, **arguments)


def test_one_model_cannot_be_policy_and_reference(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    model = tiny["text"].load()
    with pytest.raises(ValueError, match="cannot be the same object"):
        make_trainer(MPOTrainer, tiny["text"], tmp_path, model=model, ref_model=model)


def test_pictures_need_a_processor(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(tiny["text"].folder)
    with pytest.raises(ValueError, match="takes only text: pass the processor"):
        make_trainer(MPOTrainer, tiny["vision"], tmp_path, {"max_length": 60}, processing_class=tokenizer)


def test_arguments_may_be_given_by_position_as_to_trl(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    model, pairs, seen = tiny["text"].load(), tiny["text"].pairs, TrainerCallback()
    tokenizer, collator = AutoProcessor.from_pretrained(tiny["text"].folder), DataCollatorForPreference(0)
    optimizer, lora = torch.optim.SGD(model.parameters()), LoraConfig(target_modules=["q_proj"])
    optimizers, data = (optimizer, None), (collator, pairs, pairs, tokenizer)
    args = config(tmp_path, report_to="none")
    trainer = MPOTrainer(model, None, args, *data, len, [seen], optimizers, None, lora)
    names = [list(inspect.signature(trainer_class).parameters)[:7] for trainer_class in (DPOTrainer, MPOTrainer)]
    assert names[0] == names[1]
    assert (trainer.compute_metrics, trainer.optimizer, trainer.data_collator) == (len, optimizer, collator)
    assert seen in trainer.callback_handler.callbacks
    assert "default" in trainer.model.peft_config


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_a_model_may_be_named_and_is_loaded_as_asked(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    settings = {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}, **ROW_BY_ROW}
    ours = train_as_trl(tiny[kind], tmp_path, settings, model=str(tiny[kind].folder), processing_class=None)
    for model in (ours.model, ours.ref_model):
        assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    batch = next(iter(ours.get_train_dataloader()))
    chosen, _ = ours.compute_ref_log_probs(ours.ref_model, batch)
    assert chosen.dtype == torch.float32
    assert not torch.equal(chosen, chosen.bfloat16().float())  # between 64 and 128 nats bf16 has steps of 0.5
    monkeypatch.chdir(tmp_path)
    unnamed = MPOTrainer(str(tiny[kind].folder), train_dataset=tiny[kind].pairs)
    assert unnamed.args.output_dir == f"{kind}-MPO"


def test_padding_is_as_asked(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    start = "<|im_start|>"
    padded = {"pad_to_multiple_of": 64, "pad_token": start}
    text = train_as_trl(tiny["text"], tmp_path / "text", padded)
    batch = text.data_collator(list(text.train_dataset))
    assert batch["input_ids"].shape == (16, 64)
    vision = make_trainer(MPOTrainer, tiny["vision"], tmp_path / "vision", {"pad_token": start, **ROW_BY_ROW})
    padding = vision.data_collator(list(vision.train_dataset))
    tokenizers = (text.processing_class, vision.processing_class.tokenizer)
    for trainer, found, tokenizer in zip((text, vision), (batch, padding), tokenizers, strict=True):
        expected = tokenizer.convert_tokens_to_ids(start)
        assert set(found["input_ids"][found["attention_mask"] == 0].tolist()) == {expected}
        assert trainer.model.config.get_text_config().pad_token_id == expected
    with pytest.raises(NotImplementedError, match="not yet implemented for vision-language"):
        train(MPOTrainer, tiny["vision"], tmp_path, {"pad_to_multiple_of": 64})


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_is_off_unless_it_is_wanted(tiny: dict[str, Tiny], tmp_path: Path, disable: bool) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    trainer = train_as_trl(tiny["text"], tmp_path, {"disable_dropout": disable, **ROW_BY_ROW}, peft_config=lora)
    rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == ({0.0} if disable else {0.5})


def test_text_is_tokenized_by_as_many_processes_as_asked(
    tiny: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, do = [], Dataset.map

    def spy(dataset: Dataset, *args: Any, num_proc: int | None = None, **settings: Any) -> Dataset:
        asked.append(num_proc)
        return do(dataset, *args, **settings)

    monkeypatch.setattr(Dataset, "map", spy)
    make_trainer(MPOTrainer, tiny["text"], tmp_path, {"dataset_num_proc": 2})
    assert asked == [2]
    vision = make_trainer(MPOTrainer, tiny["vision"], tmp_path, {"dataset_num_proc": 2})
    assert "`dataset_num_proc` does nothing for pictures" in vision.notes[0]


def test_a_synced_reference_moves_by_the_share_that_is_asked_for(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    settings = {**SYNCED, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = train(MPOTrainer, tiny["text"], tmp_path, {**settings, **saving})
    before, policy = (dict(model.named_parameters()) for model in (tiny["text"].load(), trainer.model))
    for name, weight in trainer.ref_model.named_parameters():
        torch.testing.assert_close(weight, 0.25 * policy[name] + 0.75 * before[name])
    with pytest.raises(ValueError, match="cannot be resumed: the reference model has moved"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_own_callbacks_optimizer_scheduler_and_collator_are_used(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    class Collator(DataCollatorForPreference):
        num_batches = 0

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            self.num_batches += 1
            return super().torch_call(examples)

    class Steps(TrainerCallback):
        seen: list[int] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(state.global_step)

    model, collator = tiny["text"].load(), Collator(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    own = {"optimizers": (optimizer, scheduler), "callbacks": [Steps], "data_collator": collator}
    trainer = train(MPOTrainer, tiny["text"], tmp_path, model=model, **own)
    assert logged(trainer, "learning_rate") == [1e-2, 5e-3]
    assert (Steps.seen, collator.num_batches) == ([1, 2], 2)


def test_trls_collator_of_pictures_will_do_but_for_what_it_leaves_out(
    tiny: dict[str, Tiny], ours: dict[str, MPOTrainer], tmp_path: Path
) -> None:
    collator = DataCollatorForVisionPreference(AutoProcessor.from_pretrained(tiny["vision"].folder))
    trainer = train(MPOTrainer, tiny["vision"], tmp_path, data_collator=collator)
    assert logged(trainer) == pytest.approx(logged(ours["vision"]), abs=1e-6)
    ahead = {"precompute_ref_log_probs": True}
    with pytest.raises(ValueError, match=r"no 'ref_chosen_logps'.*`data_collator` leaves it out"):
        train(MPOTrainer, tiny["vision"], tmp_path, ahead, data_collator=collator)
    with pytest.raises(ValueError, match="`predict` does not"):
        make_trainer(MPOTrainer, tiny["vision"], tmp_path, ahead).predict(tiny["vision"].pairs)


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_evaluation_during_training_is_trls(tiny: dict[str, Tiny], tmp_path: Path, kind: str) -> None:
    pairs = tiny[kind].pairs
    parts = DatasetDict(easy=pairs.select(range(5)), hard=pairs.select(range(5, 8)))
    asked = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    trainer = train_as_trl(tiny[kind], tmp_path, asked, eval_dataset=parts)
    assert len(logged(trainer, "eval_easy_loss")) == len(logged(trainer, "eval_hard_loss")) == 3


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_a_stream_gives_the_numbers_of_its_rows(
    tiny: dict[str, Tiny], ours: dict[str, MPOTrainer], tmp_path: Path, kind: str
) -> None:
    pairs, asked = tiny[kind].pairs, {"eval_strategy": "steps", "eval_steps": 1}
    expected = train(MPOTrainer, tiny[kind], tmp_path, asked, eval_dataset=pairs)
    for data in (pairs, pairs.to_iterable_dataset()):
        stream = {"train_dataset": data, "eval_dataset": pairs.to_iterable_dataset()}
        trainer = train(MPOTrainer, tiny[kind], tmp_path, asked, **stream)
        assert logged(trainer) == pytest.approx(logged(ours[kind]), abs=1e-6)
        for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
            assert logged(trainer, name) == pytest.approx(logged(expected, name), abs=1e-6)


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_new_data_can_be_evaluated_and_predicted(
    theirs: dict[str, DPOTrainer], ours: dict[str, MPOTrainer], tiny: dict[str, Tiny], kind: str
) -> None:
    new = tiny[kind].pairs.select([6, 2, 3])
    expected, found = (trainers[kind].evaluate(new, metric_key_prefix="test") for trainers in (theirs, ours))
    check_metrics(found, expected)
    assert found["eval_rewards/chosen"] != 0.0
    named = ours[kind].evaluate({"a": new, "b": new.to_iterable_dataset()})
    assert [named["eval_a_loss"], named["eval_b_loss"]] == pytest.approx([found["test_loss"]] * 2, abs=1e-6)
    data = new if kind == "vision" else ours[kind].train_dataset
    expected, found = (trainers[kind].predict(data) for trainers in (theirs, ours))
    assert (found.predictions.shape, found.label_ids.shape) == (expected.predictions.shape, expected.label_ids.shape)
    check_metrics(found.metrics, expected.metrics)


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_metrics_of_ones_own_get_predictions_and_labels(tiny: dict[str, Tiny], tmp_path: Path, kind: str) -> None:
    def describe(result: EvalPrediction) -> dict[str, float]:
        return {"mean_logit": result.predictions.mean(), "rows": len(result.label_ids)}

    own = {"eval_dataset": tiny[kind].pairs, "compute_metrics": describe}
    expected, found = (
        make_trainer(cls, tiny[kind], tmp_path / cls.__name__, **own).evaluate() for cls in (DPOTrainer, MPOTrainer)
    )
    check_metrics(found, expected)
    assert found["eval_rows"] == 16  # two responses a pair
    assert found["eval_mean_logit"] != 0.0
    loss_only = make_trainer(MPOTrainer, tiny[kind], tmp_path, {"prediction_loss_only": True}, **own).evaluate()
    assert "eval_rows" not in loss_only
    assert loss_only["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)
    late = make_trainer(MPOTrainer, tiny[kind], tmp_path, eval_dataset=tiny[kind].pairs)
    late.compute_metrics = describe
    with pytest.raises(ValueError, match="pass `compute_metrics` when the trainer is made"):
        late.evaluate()


@pytest.mark.parametrize(("kind", "tokens"), [("vision", "4 image and 81 text"), ("text", "0 image and 80 text")])
def test_rows_that_max_length_cuts_off_are_an_error_or_listed(
    tiny: dict[str, Tiny], tmp_path: Path, kind: str, tokens: str
) -> None:
    pairs = with_long_prompts(tiny[kind].pairs, 4)
    message = rf"train data: row 4 \(id 'q4'\) has {tokens} tokens .* 1 of 8 rows\. Set `max_length` to at least (\d+)"
    with pytest.raises(InputError, match=message) as caught:
        make_trainer(MPOTrainer, tiny[kind], tmp_path, {"max_length": 70}, train_dataset=pairs)
    enough = int(re.search(message, str(caught.value))[1])
    assert (
        len(make_trainer(MPOTrainer, tiny[kind], tmp_path, {"max_length": enough}, train_dataset=pairs).train_dataset)
        == 8
    )
    parts = {"a": pairs.select([4, 5]), "b": pairs.select([2, 3])}
    settings = {"max_length": 70, "overlong": "drop"}
    trainer = train(MPOTrainer, tiny[kind], tmp_path, settings, train_dataset=pairs, eval_dataset=parts)
    assert trainer.train_dataset["id"][:] == ["q0", "q1", "q2", "q3", "q5", "q6", "q7"]
    assert (len(trainer.eval_dataset["a"]), len(trainer.eval_dataset["b"])) == (1, 2)
    listed = {path.name: [row["id"] for row in read_rows(path)] for path in (tmp_path / "out").glob("dropped_*")}
    assert listed == {"dropped_train.jsonl": ["q4"], "dropped_a.jsonl": ["q4"]}
    assert trainer.notes[0].startswith("train data: 1 of 8 rows dropped")
    assert "dropped_train.jsonl" in trainer.notes[1]


@pytest.mark.parametrize(
    ("kind", "message"), [("vision", "4 image and 81 text tokens"), ("text", "0 image and 80 text tokens")]
)
def test_a_stream_is_looked_at_batch_by_batch(tiny: dict[str, Tiny], tmp_path: Path, kind: str, message: str) -> None:
    stream = with_long_prompts(tiny[kind].pairs, 4).to_iterable_dataset()
    trainer = make_trainer(MPOTrainer, tiny[kind], tmp_path, {"max_length": 70}, train_dataset=stream)
    with pytest.raises(InputError, match=message):
        trainer.train()
    settings = {"max_length": 70, "overlong": "drop"}
    with pytest.raises(ValueError, match="needs a data set that can be counted"):
        make_trainer(MPOTrainer, tiny[kind], tmp_path, settings, train_dataset=stream)


def test_a_loss_can_be_asked_for_outside_of_training(
    tiny: dict[str, Tiny], theirs: dict[str, DPOTrainer], ours: dict[str, MPOTrainer], tmp_path: Path
) -> None:
    new = [make_trainer(cls, tiny["text"], tmp_path / cls.__name__) for cls in (DPOTrainer, MPOTrainer)]
    for pair in (new, [theirs["text"], ours["text"]]):
        batch = pair[0].data_collator(list(pair[0].train_dataset)[:3])
        expected, found = (trainer.compute_loss(trainer.model.train(), dict(batch)) for trainer in pair)
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert new[1].reward_shift.count == 0


def test_a_step_that_ran_out_of_memory_leaves_no_rewards_behind(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    settings = {"auto_find_batch_size": True, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = make_trainer(MPOTrainer, tiny["text"], tmp_path, settings)
    compute, sizes = trainer._compute_loss, []

    def run_out_once(model: PreTrainedModel, inputs: dict[str, Any], return_outputs: bool) -> Any:
        sizes.append(len(inputs["completion_mask"]) // 2)
        if len(sizes) == 2:
            raise RuntimeError("CUDA out of memory.")
        return compute(model, inputs, return_outputs)

    trainer._compute_loss = run_out_once
    trainer.train()
    assert sizes[:2] == [4, 4]
    assert trainer.reward_shift.count == 2 * sum(sizes[2:])  # two rewards a pair


def test_a_checkpoint_without_optimizer_is_refused_by_name(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    trainer = train(MPOTrainer, tiny["text"], tmp_path, saving)
    with pytest.raises(ValueError, match="save_only_model=True"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_the_model_card_names_method_paper_and_tags(ours: dict[str, MPOTrainer]) -> None:
    output = Path(ours["vision"].args.output_dir)
    written = (output / "README.md").read_text()  # with the checkpoints
    ours["vision"].create_model_card(model_name="mine", tags="other")
    for card, tags in ((written, ["mpo", "trl"]), ((output / "README.md").read_text(), ["mpo", "other", "trl"])):
        header = card.split("---")[1]
        assert set(tags) <= set(re.findall(r"- (\w+)", header))
        assert "trained with MPO, a method introduced in [Enhancing the Reasoning Ability of Multimodal" in card
        assert "https://huggingface.co/papers/2411.10442" in card
    assert json.loads((output / "checkpoint-2" / "config.json").read_text())["model_type"] == "llava"
    assert {"mpo", "trl"} <= set(ours["vision"].model.model_tags)
