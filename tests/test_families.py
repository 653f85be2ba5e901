"""MPOTrainer with nine vision-language families, on batches that mix rows of one, several and no pictures."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import QUIET_TRAINING
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from tiny_models import FAMILIES, SIZES, build, picture, preference_rows
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from mpo import MPOConfig, MPOTrainer
from mpo.models import PARTS, part_of

SETTINGS: dict[str, Any] = {
    **QUIET_TRAINING,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",  # so that each batch of four has every kind of row
}
SAVING = {**SETTINGS, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
LLM_ONLY = r".*\.(language_model|text_model)\..*\.[qv]_proj"


class Family(NamedTuple):
    """One family after four steps on four pairs each.

    Attributes:
        model: The folder of its untrained model.
        output: The folder with `checkpoint-2` and `checkpoint-4`.
        trained: The trainer of these four steps.
    """

    model: Path
    output: Path
    trained: MPOTrainer


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """Eight pairs: one picture, three of different sizes, none, two, and once more."""
    turn = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": turn, "chosen": turn, "rejected": turn})
    dataset = Dataset.from_list(preference_rows(8), features=features)
    assert [len(row["images"]) for row in dataset] == [1, 3, 0, 2, 1, 3, 0, 2]
    return dataset


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder / "model")
    trainer = make_trainer(folder / "model", pairs, MPOConfig(str(folder / "output"), **SAVING))
    trainer.train()
    return Family(folder / "model", folder / "output", trainer)


def make_trainer(model: Path, pairs: Dataset, args: DPOConfig, **settings: Any) -> DPOTrainer:
    trainer_class = MPOTrainer if isinstance(args, MPOConfig) else DPOTrainer
    return trainer_class(
        model=AutoModelForImageTextToText.from_pretrained(model),
        args=args,
        train_dataset=pairs,
        processing_class=AutoProcessor.from_pretrained(model),
        **settings,
    )


def train(model: Path, pairs: Dataset, args: DPOConfig, **settings: Any) -> DPOTrainer:
    trainer = make_trainer(model, pairs, args, **settings)
    trainer.train()
    return trainer


def logged(trainer: DPOTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_first_step_finds_the_policy_where_the_reference_is(family: Family) -> None:
    first = family.trained.state.log_history[0]
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0.0, abs=1e-5)
    assert first["loss"] - first["loss/generation"] == pytest.approx(0.831777, abs=1e-4)


def test_every_part_is_trained_and_the_loss_falls(family: Family) -> None:
    losses = logged(family.trained)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[2] < losses[0]  # the same pairs, an epoch later
    assert losses[3] < losses[1]
    before = dict(AutoModelForImageTextToText.from_pretrained(family.model).named_parameters())
    after = family.trained.model.named_parameters()
    assert {part_of(name) for name, weight in after if not torch.equal(weight, before[name])} == set(PARTS)


@torch.no_grad()
def token_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of every token that is not padding, in one line."""
    logits = model(**{name: value for name, value in batch.items() if name != "completion_mask"}).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return logps[batch["attention_mask"][:, 1:].bool()]


def test_a_saved_model_scores_as_the_trained_one(family: Family, tmp_path: Path) -> None:
    family.trained.save_model(str(tmp_path))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    batch = DataCollatorForVisionPreference(family.trained.processing_class)(preference_rows(4))
    expected = token_logps(family.trained.model.eval(), batch)
    torch.testing.assert_close(token_logps(model, batch), expected, atol=1e-5, rtol=0)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(family.trained.processing_class)


def test_losses_equal_trls_without_the_shift_and_with_token_reduction(
    family: Family, pairs: Dataset, tmp_path: Path
) -> None:
    mixed = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    theirs = train(family.model, pairs, DPOConfig(str(tmp_path), **SETTINGS, **mixed))
    args = MPOConfig(str(tmp_path), **SETTINGS, **mixed, reward_shift_decay=1.0, sft_reduction="token")
    ours = train(family.model, pairs, args)
    assert logged(ours) == pytest.approx(logged(theirs), abs=1e-5)
    assert logged(ours, "rewards/margins") == pytest.approx(logged(theirs, "rewards/margins"), abs=1e-5)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4)])
def test_losses_do_not_depend_on_how_a_step_is_cut(
    family: Family, pairs: Dataset, tmp_path: Path, size: int, accumulation: int
) -> None:
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trainer = train(family.model, pairs, MPOConfig(str(tmp_path), **{**SETTINGS, **cut}))
    assert logged(trainer) == pytest.approx(logged(family.trained)[:2], abs=2e-5)


def test_lora_needs_no_second_model(family: Family, pairs: Dataset, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=LLM_ONLY)
    trainer = train(family.model, pairs, MPOConfig(str(tmp_path), **SETTINGS), peft_config=lora)
    assert trainer.ref_model is None
    first, second = logged(trainer, "rewards/chosen")
    assert first == pytest.approx(0.0, abs=1e-5)
    assert abs(second) > 1e-5


def test_a_resumed_run_gives_the_same_losses(family: Family, pairs: Dataset, tmp_path: Path) -> None:
    trainer = make_trainer(family.model, pairs, MPOConfig(str(tmp_path), **SAVING))
    trainer.train(resume_from_checkpoint=str(family.output / "checkpoint-2"))
    assert logged(trainer) == pytest.approx(logged(family.trained), abs=1e-6)


def picture_embeddings(trainer: MPOTrainer, images: list[Any]) -> Tensor:
    """What the language model gets in the places of a row's pictures, (tokens, hidden size)."""
    seen: list[Tensor] = []
    row = {**preference_rows(1)[0], "images": images}
    batch = DataCollatorForVisionPreference(trainer.processing_class)([row])
    model = trainer.model.eval()

    def keep(module: torch.nn.Module, args: Any, arguments: dict[str, Any]) -> None:
        seen.append(arguments["inputs_embeds"][batch["input_ids"] == model.config.image_token_id])

    with model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True):
        token_logps(model, batch)
    return seen[0].chunk(2)[0]


def num_shared(one: Tensor, other: Tensor) -> int:
    """How many embeddings agree before the first that does not."""
    agree = [torch.allclose(*pair, atol=1e-5) for pair in zip(one, other, strict=False)]
    return [*agree, False].index(False)


def test_pictures_of_different_sizes_stand_in_their_order(family: Family) -> None:
    first, second, third = (picture(seed, size) for seed, size in enumerate(SIZES))
    both = picture_embeddings(family.trained, [first, second])
    head = num_shared(both, picture_embeddings(family.trained, [first, third]))
    tail = num_shared(both.flip(0), picture_embeddings(family.trained, [third, second]).flip(0))
    assert 0 < head < len(both)
    assert 0 < tail < len(both)
    assert head + tail >= len(both)  # LLaVA-OneVision ends every picture with the same embedding
