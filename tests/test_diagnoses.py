"""What goes wrong in training is told in words: each check on literal tensors, then a trainer that is broken."""

import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import QUIET_TRAINING
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, Built, build, byte_tokenizer, llava, preference_rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TrainerCallback
from typer.testing import CliRunner

from data_builders.records import InputError
from data_builders.shards import read_rows, write_rows
from mpo import MPOConfig, MPOTrainer
from mpo.cli import app
from mpo.collators import PreferenceCollator
from mpo.diagnoses import (
    Blame,
    TrainingError,
    ZeroRewards,
    check_finite,
    check_gradients,
    check_responses,
    check_saved,
    check_terms,
    find_blame,
    row_text,
)
from mpo.forest_collators import ForestCollator
from mpo.losses import MPOLoss, mpo_loss
from mpo.scores import tokens_of

TOKENIZER = byte_tokenizer(image_token="<image>")
WEIGHTS = "model.safetensors"
NAN, INF = float("nan"), float("inf")
VISION_LORA = LoraConfig(r=2, target_modules=r".*vision_tower.*\.[qv]_proj")
SETTINGS: dict[str, Any] = {
    **QUIET_TRAINING,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "train_sampling_strategy": "sequential",
}


def batch_of(*rows: tuple[str, str]) -> dict[str, Tensor]:
    """Rows of prompt and response, chosen ones first, padded on the left with a token that says nothing."""
    ids = [[TOKENIZER(text)["input_ids"] for text in row] for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in ids)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, response in ids:
        padding = width - len(prompt) - len(response)
        columns["input_ids"].append([7] * padding + prompt + response)
        columns["attention_mask"].append([0] * padding + [1] * (width - padding))
        columns["completion_mask"].append([0] * (width - len(response)) + [1] * len(response))
    return {name: torch.tensor(values) for name, values in columns.items()}


PAIRS = batch_of(("One?", "yes"), ("Two?", "2"), ("One?", "no"), ("Two?", "nothing"))


def test_a_row_is_named_by_how_its_prompt_and_response_begin() -> None:
    prompt = "<|im_start|>user\n<image><image> <image>\n\nHow many?<|im_end|>\n"
    batch = batch_of((prompt, "Two.<|im_end|>"), ("A longer prompt, so that the first row is padded. " * 3, "One."))
    assert row_text(batch, 0, TOKENIZER) == r"'user\nHow many?' -> 'Two.'"


def test_a_long_row_is_cut_and_a_repeated_tag_stands_once() -> None:
    batch = batch_of(("<tile> <tile>\n<tile>" + "a" * 50, "b" * 50))
    assert row_text(batch, 0, TOKENIZER, width=20) == f"'<tile>..{'a' * 12}...' -> '{'b' * 10}...'"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Built:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


@pytest.mark.parametrize("collator", [PreferenceCollator, ForestCollator])
def test_a_question_is_found_behind_the_pictures_of_its_row(family: Built, collator: type) -> None:
    processor, model = family
    batch = collator(processor=processor, image_token_id=model.config.image_token_id)(preference_rows(2))
    assert len(processor.tokenizer.decode(tokens_of(batch, 3))) > 120  # three pictures
    assert row_text(batch, 3, processor.tokenizer) == r"'user\nQuestion 1: how many?\nassistant' -> 'None!!'"


def test_responses_with_a_token_to_learn_from_pass() -> None:
    check_responses(PAIRS, 2, TOKENIZER, None)
    check_responses(batch_of(("One?", "yes"), ("Two?", ""), ("One?", "no"), ("Two?", "no")), 1, TOKENIZER, None)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [("One?", "yes"), ("Two?", "2"), ("One?", "no"), ("Two?", "")],
            r"1 of 4 .* the rejected one of 'Two\?' \(4 tokens\)",
        ),
        (
            [("One?", ""), ("Two?", ""), ("One?", "no"), ("Two?", "")],
            r"3 of 4 .* the chosen one of 'One\?' \(4 tokens\)",
        ),
        ([("", "y"), ("", "n")], r"2 of 2 responses .* chosen one of '' -> 'y' \(1 tokens\)"),  # nothing predicts it
    ],
)
def test_the_first_empty_response_is_named(rows: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        check_responses(batch_of(*rows), len(rows) // 2, TOKENIZER, None)


@pytest.mark.parametrize(
    ("max_length", "advice"),
    [(None, "take the row out"), (4, "`max_length=4` cuts it off.* raise it"), (5, "take the row out")],
)
def test_max_length_is_blamed_only_for_rows_that_fill_it(max_length: int | None, advice: str) -> None:
    with pytest.raises(TrainingError, match=advice):
        check_responses(batch_of(("One?", ""), ("One?", "")), 1, TOKENIZER, max_length)


def terms_of(logps: Tensor, ref_logps: Tensor) -> MPOLoss:
    rewards = 0.1 * (logps.requires_grad_() - ref_logps)
    return mpo_loss(*rewards.chunk(2), generation=-logps[:2].mean())


@pytest.mark.parametrize(
    ("logps", "ref_logps", "step", "words"),
    [
        ([NAN] * 4, [-1.0] * 4, 0, "as the policy's log-probabilities are not, for 4 of 4 .* before training"),
        ([NAN] * 4, [NAN] * 4, 0, "as the policy's and the reference's log-probabilities are not, .* before training"),
        ([-1.0, -INF, -1.0, -1.0], [-1.0] * 4, 0, "for 1 of 4 responses: 'Two?' -> '2'. Most likely .* degenerate"),
        ([NAN] * 4, [-1.0] * 4, 7, "after 7 optimizer steps .* the last updates .* lower `learning_rate`"),
        ([-1.0] * 4, [NAN] * 4, 7, "as the reference's log-probabilities are not, .* the reference model is broken"),
        ([-1.0] * 4, [-1.0, -1.0, NAN, -1.0], 3, "the reference's .* for 1 of 4 responses: 'One?' -> 'no'. Most"),
        ([-1.0, -1.0, -1.0, -INF], [-1.0] * 4, 2, "after 2 .* a reward is not finite, .* 'Two?' -> 'nothing'. Most"),
    ],
)
def test_a_loss_that_is_no_number_is_traced_to_models_and_rows(
    logps: list[float], ref_logps: list[float], step: int, words: str
) -> None:
    policy, reference = torch.tensor(logps), torch.tensor(ref_logps)
    with pytest.raises(TrainingError, match=words.replace("?", r"\?")):
        check_terms(terms_of(policy, reference), policy, reference, PAIRS, TOKENIZER, step=step)


def test_the_terms_that_are_no_number_are_named() -> None:
    logps = torch.full((4,), -1.0, requires_grad=True)
    terms = MPOLoss(logps.sum() * INF, logps.sum(), None, logps.sum() * INF)
    with pytest.raises(TrainingError, match=r"\(loss -inf, generation -inf\), though all log-prob.* lower `beta`"):
        check_terms(terms, logps, torch.zeros(4), PAIRS, TOKENIZER, step=1)


def test_a_loss_without_anything_to_train_is_told_but_not_in_evaluation() -> None:
    logps = torch.full((4,), -1.0)
    terms = MPOLoss(logps.sum(), logps.sum(), None, None)
    with pytest.raises(TrainingError, match=r"nothing that is trained .* 'One\?' -> 'yes'\. Most likely .* is frozen"):
        check_terms(terms, logps, logps, PAIRS, TOKENIZER, step=0)
    with torch.no_grad():
        check_terms(terms, logps, logps, PAIRS, TOKENIZER, step=0)


class Reads(TorchDispatchMode):
    """Counts how often a number is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def test_a_sound_micro_batch_waits_for_two_numbers_of_the_device() -> None:
    logps = torch.tensor([-3.0, -4.0, -5.0, -6.0])
    terms = terms_of(logps, torch.zeros(4))
    with Reads() as reads:
        check_responses(PAIRS, 2, TOKENIZER, 100)
        assert reads.num == 1
        check_terms(terms, logps, torch.zeros(4), PAIRS, TOKENIZER, step=0)
        assert reads.num == 2


class Scales(nn.Module):
    """Two numbers; the root of the first has no finite slope at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.root, self.line = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(3.0))

    def terms(self) -> MPOLoss:
        broken, sound = self.root.sqrt() + self.line, 2 * self.line
        return MPOLoss(broken + sound, sound, None, broken)


def test_a_broken_gradient_is_traced_to_its_term_and_parameter() -> None:
    model = Scales()
    assert find_blame(model, model.terms()) == {"generation": ["root"]}
    model.root.data.fill_(1.0)
    assert find_blame(model, model.terms()) == {}


def test_what_clipping_spoiled_is_not_blamed() -> None:
    model = Scales()
    model.terms().loss.backward()
    norm = nn.utils.clip_grad_norm_([model.root, model.line], 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.tensor(NAN)  # as clipping by a norm of NaN leaves all of them
    words = (
        r"after 0 .* norm of the gradients is inf.*: 1 parameters .* \(root\), from the generation loss of "
        r"micro-batch 2 of 2, which begins with 'One\?' -> 'yes'\. Most likely .* degenerate"
    )
    with pytest.raises(TrainingError, match=words):
        check_gradients(model, norm.item(), [PAIRS, PAIRS], TOKENIZER, lambda: {1: find_blame(model, model.terms())})


def test_a_broken_gradient_that_no_micro_batch_gives_again_is_named_as_it_is() -> None:
    model = Scales()
    model.terms().loss.backward()
    with pytest.raises(TrainingError, match=r"1 parameters .* \(root\), from no single term and micro-batch of this"):
        check_gradients(model, INF, [PAIRS], TOKENIZER)


@pytest.mark.parametrize(
    ("blame", "step", "advice"),
    [
        ({0: {"quality": ["root"]}, 1: {"quality": ["root"]}}, 5, "after 5 .* the last updates broke the model"),
        ({0: {"quality": ["root"]}}, 5, "after 5 .* degenerate"),  # the other micro-batch is sound
        ({}, 5, "after 5 .* the last updates broke the model"),
        ({0: {"quality": ["root"]}, 1: {"quality": ["root"]}}, 0, "degenerate"),
    ],
)
def test_the_last_updates_are_blamed_where_all_micro_batches_break(blame: Blame, step: int, advice: str) -> None:
    with pytest.raises(TrainingError, match=advice):
        check_gradients(Scales(), NAN, [PAIRS, PAIRS], TOKENIZER, lambda: blame, step=step)


def test_a_sound_gradient_is_not_looked_into() -> None:
    def blame() -> Blame:
        raise AssertionError

    check_gradients(Scales(), 123.0, [PAIRS], TOKENIZER, blame)


@pytest.mark.parametrize(
    ("rates", "rewards", "stops_at"),
    [
        ([1.0] * 6, [0.0] * 6, 4),  # three steps were taken before it
        ([1.0] * 6, [0.0, 1e-7, 0.0, 0.0, 0.0, 0.0], None),
        ([1.0] * 6, [0.0, 0.0, 0.0, -1e-7, 0.0, 0.0], None),
        ([0.0, 0.01, 0.02, 0.03, 0.04, 0.05], [0.0] * 6, None),  # a long warm-up, lost in rounding
        ([0.0, 0.5, 1.0, 1.0, 1.0, 1.0], [0.0] * 6, 5),
        ([0.0] * 6, [0.0] * 6, None),  # a rehearsal with a learning rate of 0
    ],
)
def test_rewards_may_be_0_until_weights_must_have_moved(
    rates: list[float], rewards: list[float], stops_at: int | None
) -> None:
    watch, learned = ZeroRewards(), [0.0, *accumulate(rates)]
    for step, reward in enumerate(rewards, 1):
        if step == stops_at:
            with pytest.raises(TrainingError, match="all rewards have been exactly 0 in every step"):
                watch.take_step([0.0, reward], learned=learned[step - 1])
            return
        watch.take_step([0.0, reward], learned=learned[step - 1])
    assert stops_at is None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_trained_weights_must_be_finite(value: float) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    check_finite(model)
    model[1].weight.data[0, 2] = value
    with pytest.raises(TrainingError, match=r"1 parameters are not finite \(1\.weight\), so nothing was saved"):
        check_finite(model)


def test_frozen_weights_of_any_type_are_left_alone() -> None:
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn), requires_grad=False)  # has no isfinite
    model.unused = nn.Parameter(torch.tensor(NAN), requires_grad=False)
    check_finite(model)


def zeros_like(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(weight) for name, weight in weights.items()}


def test_a_saved_family_raises_no_alarm_and_its_zeros_do(family: Built, tmp_path: Path) -> None:
    _, model = family
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, model)
    model.save_pretrained(tmp_path, state_dict=zeros_like(model.state_dict()))
    first = min(name for name, weight in load_file(tmp_path / WEIGHTS).items() if weight.dim() > 1)
    with pytest.raises(TrainingError, match=rf"were saved as zeros.*\({re.escape(first)}, "):
        check_saved(tmp_path, model)


def test_one_empty_weight_in_one_of_several_files_is_found(tmp_path: Path) -> None:
    _, model = llava()
    weights = dict(model.state_dict())
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight") and "language" in name)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    check_saved(tmp_path, model)
    model.save_pretrained(tmp_path, state_dict={**weights, name: torch.zeros_like(weights[name])})
    saved_as = r"language_model\.model\.layers\.1\.mlp\.up_proj\.weight"  # LLaVA's older names
    with pytest.raises(TrainingError, match=rf"1 weights in .* zeros, .* \({saved_as}\)\. .*stage3_gather_16bit"):
        check_saved(tmp_path, model)
    model.save_pretrained(tmp_path, state_dict={**weights, name: torch.empty(0)})
    with pytest.raises(TrainingError, match=rf"1 weights in .* nothing, .* \({saved_as}\)"):
        check_saved(tmp_path, model)


def test_matrices_that_are_zero_in_memory_may_be_zero_in_the_file(tmp_path: Path) -> None:
    _, model = llava()
    gate = next(p for name, p in model.named_parameters() if name.endswith("mlp.gate_proj.weight"))
    gate.data.zero_()
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, model)
    nn.init.normal_(gate)
    with pytest.raises(TrainingError, match="1 weights"):
        check_saved(tmp_path, model)


def test_a_matrix_of_which_only_the_last_number_is_not_zero_is_not_zero(tmp_path: Path) -> None:
    model = nn.Embedding(3000, 64)
    model.weight.data.zero_()
    model.weight.data[-1, -1] = 1.0
    save_file(model.state_dict(), tmp_path / WEIGHTS)
    check_saved(tmp_path, model)
    save_file(zeros_like(model.state_dict()), tmp_path / WEIGHTS)
    with pytest.raises(TrainingError, match=r"1 weights in .* as zeros, .* \(weight\)"):
        check_saved(tmp_path, model)


def test_a_table_of_zeros_that_is_no_parameter_may_be_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.zeros(2, 2))
    save_file(model.state_dict(), tmp_path / WEIGHTS)
    check_saved(tmp_path, model)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_one_in_memory_are_one_in_the_file(tmp_path: Path, tied: bool) -> None:
    _, model = llava()
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path)
    assert (len(load_file(tmp_path / WEIGHTS)) == len(model.state_dict())) == (not tied)
    check_saved(tmp_path, model)


def test_an_adapter_may_have_zeros_where_lora_starts_with_them_and_nowhere_else(tmp_path: Path) -> None:
    model = get_peft_model(llava()[1], LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(not weight.any() for weight in saved.values()) == len(saved) / 2  # all B
    check_saved(tmp_path, model)
    model.save_pretrained(tmp_path, state_dict=zeros_like(model.state_dict()))
    with pytest.raises(TrainingError, match=r"were saved as zeros.*lora_A"):
        check_saved(tmp_path, model)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained LLaVA."""
    folder = tmp_path_factory.mktemp("llava")
    build("llava", folder)
    return folder


def dataset_of(num_pairs: int = 8, *, pictures: bool = True) -> Dataset:
    dataset = Dataset.from_list([{**row, "images": row["images"][:1]} for row in preference_rows(num_pairs)])
    return dataset if pictures else dataset.remove_columns("images")


def stream_of(dataset: Dataset) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(dataset), features=dataset.features)


def trainer_of(start: Path, output: Path, dataset: Any = None, **settings: Any) -> MPOTrainer:
    """A trainer of the model in `start`; what is no setting of `MPOConfig` goes to the trainer itself."""
    dataset = dataset_of() if dataset is None else dataset
    processor = AutoProcessor.from_pretrained(start)
    own = ("model", "ref_model", "peft_config", "data_collator", "callbacks")
    arguments = {name: settings.pop(name) for name in own if name in settings}
    arguments.setdefault("model", AutoModelForImageTextToText.from_pretrained(start))
    return MPOTrainer(
        args=MPOConfig(str(output), **{**SETTINGS, **settings}),
        train_dataset=dataset,
        processing_class=processor if "images" in dataset.column_names else processor.tokenizer,
        **arguments,
    )


def broken_model(start: Path) -> PreTrainedModel:
    model = AutoModelForImageTextToText.from_pretrained(start)
    model.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = NAN
    return model


def rewards_of(trainer: MPOTrainer) -> list[float]:
    return [entry["rewards/chosen"] for entry in trainer.state.log_history if "rewards/chosen" in entry]


@pytest.mark.parametrize(
    ("share_prefixes", "words"),
    [
        (True, r"pair 0 .* `max_length=20` would leave nothing of a response.* Set `max_length` to at least 41"),
        (False, r"4 of 4 .* chosen one of 'user\\nQuestion 0: ho' \(20 tokens\)\. .* `max_length=20` cuts it off"),
    ],
)
def test_a_stream_of_texts_that_max_length_leaves_no_response_of_is_told(
    start: Path, tmp_path: Path, share_prefixes: bool, words: str
) -> None:
    stream = stream_of(dataset_of(pictures=False))
    with pytest.raises(InputError, match=words):
        trainer_of(start, tmp_path, stream, max_length=20, share_prefixes=share_prefixes).train()


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_a_stream_with_pictures_that_max_length_leaves_no_response_of_is_told(
    start: Path, tmp_path: Path, share_prefixes: bool
) -> None:
    with pytest.raises(InputError, match=r"`max_length=20` would cut its pictures.* Set `max_length` to at least 46"):
        trainer_of(start, tmp_path, stream_of(dataset_of()), max_length=20, share_prefixes=share_prefixes).train()


@pytest.mark.parametrize(
    ("share_prefixes", "words"),
    [
        (True, "an empty response, from which nothing can be learned: take it out"),
        (False, r"2 of 4 .* rejected one of 'Sum\?' .* the data hold an empty response, .* take the row out"),
    ],
)
def test_an_empty_response_in_the_data_is_told(start: Path, tmp_path: Path, share_prefixes: bool, words: str) -> None:
    rows = [{"images": row["images"], "prompt": "<image>Sum?", "chosen": "3", "rejected": ""} for row in dataset_of(2)]
    with pytest.raises(InputError, match=words):
        trainer_of(start, tmp_path, Dataset.from_list(rows), share_prefixes=share_prefixes).train()


def test_a_collator_that_leaves_a_response_out_is_told(start: Path, tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> Any:
        batch = PreferenceCollator(processor=AutoProcessor.from_pretrained(start))(rows)
        batch["completion_mask"][1] = 0
        return batch

    trainer = trainer_of(start, tmp_path, data_collator=collate)
    with pytest.raises(TrainingError, match=r"1 of 4 .* chosen one of .*Question 1: how .* mend the data collator"):
        trainer.train()


def test_a_model_that_is_broken_to_begin_with_is_told_at_step_0(start: Path, tmp_path: Path) -> None:
    words = (
        r"after 0 optimizer steps the loss is not finite \(loss nan, preference nan, quality nan, generation nan\), "
        r"as the policy's log-probabilities are not, for 4 of 4 responses: 'user\\nQuestion 0: .* -> 'There are 1\.'; "
        ".*the weights were broken before training"
    )
    trainer = trainer_of(start, tmp_path, model=broken_model(start), logging_nan_inf_filter=True)  # hides it in logs
    with pytest.raises(TrainingError, match=words):
        trainer.train()


def test_a_broken_model_is_told_in_evaluation_too(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, model=broken_model(start))
    with pytest.raises(TrainingError, match="the policy's log-probabilities"):
        trainer.evaluate(dataset_of(2))


def test_a_reference_that_is_broken_alone_is_told(start: Path, tmp_path: Path) -> None:
    words = r"\(loss nan, preference nan, quality nan\), as the reference's .* the reference model is broken"
    with pytest.raises(TrainingError, match=words):
        trainer_of(start, tmp_path, ref_model=broken_model(start)).train()


@pytest.mark.parametrize(
    ("learning_rate", "what"),
    [
        (1e8, r"the loss is not finite \(loss nan, preference nan, .* of 4 responses: '.*Question 3: how many"),
        (1e4, r"the norm of the gradients is nan, .* preference, quality, generation loss .*Question 2: how many"),
    ],
)
def test_a_learning_rate_that_breaks_the_model_is_told_with_steps_terms_and_rows(
    start: Path, tmp_path: Path, learning_rate: float, what: str
) -> None:
    trainer = trainer_of(start, tmp_path, learning_rate=learning_rate)
    with pytest.raises(TrainingError, match=rf"after 1 optimizer steps {what}.*the last updates broke the model"):
        trainer.train()


class Spoil(torch.autograd.Function):
    """Hands hidden states of some rows on as they are, and infinity back where a gradient comes."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        context.save_for_backward(rows)
        return hidden.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = context.saved_tensors
        return gradient.masked_fill(rows[:, None, None] & (gradient != 0), INF), None


def spoil(model: PreTrainedModel, text: str) -> PreTrainedModel:
    """Breaks the backward pass through the last layer, for rows with this text."""
    found: dict[str, Tensor] = {}
    ids = torch.tensor(TOKENIZER(text)["input_ids"])

    def look(module: nn.Module, args: Any, inputs: dict[str, Tensor]) -> None:
        windows = inputs["input_ids"].unfold(1, len(ids), 1)
        found["rows"] = (windows == ids).all(dim=-1).any(dim=1)

    def hand_on(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return Spoil.apply(output, found["rows"])

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.model.language_model.layers[-1].register_forward_hook(hand_on)
    return model


@pytest.mark.parametrize(
    ("text", "terms", "broken", "settings"),
    [  # where prefixes are shared, a rejected response is not in a row of its own
        ("There are 2.", "preference, quality, generation", 44, {}),
        ("None!!!", "preference, quality", 19, {"share_prefixes": False, "gradient_checkpointing": True}),
        ("Question 2", "preference, quality, generation", 19, {"max_grad_norm": 0.0, "bf16": True}),
        ("Question 3", "preference, quality, generation", 6, {"peft_config": LoraConfig(target_modules=["q_proj"])}),
    ],
)
def test_a_step_whose_gradients_are_no_numbers_is_not_taken(
    start: Path, tmp_path: Path, text: str, terms: str, broken: int, settings: dict[str, Any]
) -> None:
    """Broken is what comes before the end of the last layer: 19 weights, for pictures 25 of the vision part.

    LoRA has two on each of the three layers that the loss depends on: LLaVA leaves the last one of the tower out.
    """
    model = spoil(AutoModelForImageTextToText.from_pretrained(start), text)
    trainer = trainer_of(start, tmp_path, model=model, gradient_accumulation_steps=2, **settings)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "after 0 optimizer steps the norm of the gradients is nan, though the loss is a number" in message
    assert f": {broken} parameters have gradients that are not finite (" in message
    assert f"from the {terms} loss of micro-batch 2 of 2, which begins with 'user\\nQuestion 2: how many?" in message
    assert message.count("Question") == 1  # the other micro-batch is not to blame
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_a_single_broken_gradient_names_its_parameter_and_every_micro_batch(start: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(start)
    model.model.language_model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * INF)
    words = r"1 parameters .* \(model\.language_model\.layers\.0\.mlp\.up_proj\.weight\), from .* 1 of 2, .* 2 of 2, "
    with pytest.raises(TrainingError, match=words):
        trainer_of(start, tmp_path, model=model, gradient_accumulation_steps=2).train()


def shares_its_weights(start: Path) -> dict[str, Any]:
    model, ref_model = (AutoModelForImageTextToText.from_pretrained(start) for _ in range(2))
    ref_model.load_state_dict(model.state_dict(), assign=True)
    return {"model": model, "ref_model": ref_model}


def learns_too_little_for_bf16(start: Path) -> dict[str, Any]:
    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.bfloat16)
    return {"model": model, "learning_rate": 1e-9}


def trains_what_is_not_used(start: Path) -> dict[str, Any]:
    model = AutoModelForImageTextToText.from_pretrained(start)
    model.requires_grad_(False)
    model.get_submodule("model.vision_tower.post_layernorm").requires_grad_(True)  # LLaVA takes features before it
    return {"model": model, "gradient_checkpointing": True}


def puts_lora_where_no_row_comes(start: Path) -> dict[str, Any]:
    return {"dataset": dataset_of(pictures=False), "peft_config": VISION_LORA, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "case",
    [shares_its_weights, learns_too_little_for_bf16, trains_what_is_not_used, puts_lora_where_no_row_comes],
)
def test_a_run_that_trains_nothing_is_stopped_at_its_fourth_step(
    start: Path, tmp_path: Path, case: Callable[[Path], dict[str, Any]]
) -> None:
    trainer = trainer_of(start, tmp_path, **case(start), max_steps=8)
    words = r"exactly 0 .* moved by 3\.0 steps of the full .* nothing that matters is trained .* bf16 .* `ref_model`"
    with pytest.raises(TrainingError, match=words):
        trainer.train()
    assert trainer.state.global_step == 4


def test_text_without_anything_to_train_is_told_at_once(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, dataset_of(pictures=False), peft_config=VISION_LORA)
    with pytest.raises(TrainingError, match=r"nothing that is trained .*Question 0.* rows have no picture"):
        trainer.train()


def test_a_long_warm_up_from_0_is_no_alarm(start: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.bfloat16)
    slow = {"max_steps": 6, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10_000_000}
    trainer = trainer_of(start, tmp_path, model=model, **slow)
    trainer.train()
    assert rewards_of(trainer) == [0.0] * 6


def test_a_reference_that_follows_the_policy_is_no_alarm(start: Path, tmp_path: Path) -> None:
    follows = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = trainer_of(start, tmp_path, **follows, max_steps=6)
    trainer.train()
    assert rewards_of(trainer) == pytest.approx([0.0] * 6, abs=1e-5)


def test_steps_that_a_loss_scaler_leaves_out_are_no_alarm(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda self, closure=None: None)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: True))
    trainer = trainer_of(start, tmp_path, max_steps=6)
    trainer.train()
    assert rewards_of(trainer) == [0.0] * 6


def test_bf16_and_going_on_from_a_checkpoint_are_no_alarm(start: Path, tmp_path: Path) -> None:
    settings = {"bf16": True, "max_steps": 6, "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 2}
    trainer_of(start, tmp_path, **settings).train()
    again = trainer_of(start, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rewards_of(again)[0] == 0.0
    assert all(rewards_of(again)[2:])


@pytest.mark.parametrize(
    ("replace", "words"), [(torch.zeros_like, "as zeros"), (lambda weight: torch.empty(0), "as nothing")]
)
def test_weights_that_were_not_gathered_are_told_when_saved(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Tensor], Tensor], words: str
) -> None:
    trainer = trainer_of(start, tmp_path)
    trainer.save_model(str(tmp_path / "whole"))
    weights = {name: replace(weight) for name, weight in trainer.model.state_dict().items()}
    monkeypatch.setattr(trainer.model, "state_dict", lambda *args, **kwargs: weights)
    with pytest.raises(TrainingError, match=rf"were saved {words}, .*\(language_model\.lm_head\.weight, .*_16bit_"):
        trainer.save_model(str(tmp_path / "broken"))


def test_an_adapter_is_saved_before_its_first_step(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_broken_weights_are_never_written_over_whole_ones(start: Path, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path)
    trainer.save_model()
    whole = (tmp_path / WEIGHTS).read_bytes()
    trainer.model.lm_head.weight.data[0, 0] = INF
    with pytest.raises(TrainingError, match=r"\(lm_head\.weight\), so nothing was saved"):
        trainer.save_model()
    assert (tmp_path / WEIGHTS).read_bytes() == whole


class Breaks(TrainerCallback):
    """Breaks a weight behind the trainer's back, at the end of the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].lm_head.weight.data[0, 0] = NAN


def test_a_run_leaves_its_last_whole_checkpoint(start: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 4}
    with pytest.raises(TrainingError, match=r"\(lm_head\.weight\).* go back to that checkpoint"):
        trainer_of(start, tmp_path, callbacks=[Breaks()], **saving).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "checkpoint-1" / WEIGHTS).values())


def test_the_command_line_answers_in_one_message(task: Path, tmp_path: Path) -> None:
    pair = {"chosen": "The answer is 3.", "rejected": "I do not know.", "kind": "correctness", "source": "sum"}
    rows = [
        {"id": str(index), "images": row["images"], "prompt": row["question"], **pair}
        for index, row in enumerate(read_rows(task / "questions.jsonl"))
    ]
    write_rows(tmp_path / "pairs.jsonl", rows[:4])
    settings = {**SETTINGS, "learning_rate": 1e8, "output_dir": tmp_path / "output", "image_root": task}
    settings |= {"data": tmp_path / "pairs.jsonl", "model_name_or_path": task / "model"}
    words = [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]
    result = CliRunner().invoke(app, ["train", *words])
    assert result.exit_code == 2, result.output
    message = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "after 1 optimizer steps the loss is not finite" in message
    assert message.endswith("and go on from a checkpoint before them.")
    assert "Traceback" not in result.stderr
