"""`SFTTrainer`: what is learned, packed rows against padded ones and TRL's, and weights over a whole step."""

from pathlib import Path
from typing import Any

import pytest
import trl
from conftest import QUIET_TRAINING
from datasets import Dataset, Features, Image, Json, List
from tiny_models import FAMILIES, build, picture
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mpo.config import SFTConfig
from mpo.sft_trainer import SFTTrainer

SETTINGS: dict[str, Any] = {
    **QUIET_TRAINING,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "optim": "sgd",
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
}
FEATURES = Features({"images": List(Image()), "prompt": List(Json()), "completion": List(Json())})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def answered_rows() -> list[dict[str, Any]]:
    """Rows with one picture, two, none and one again, and answers of 1, 5, 12 and 7 letters."""
    answers = ("a", "bbbbb", "c" * 12, "d" * 7)
    sizes = (((40, 56),), ((64, 32), (28, 28)), (), ((28, 28),))
    return [
        {
            "images": [picture(10 * row + place, size) for place, size in enumerate(sizes[row])],
            "prompt": [user(f"Question {row}?")],
            "completion": [assistant(answer)],
        }
        for row, answer in enumerate(answers)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family, saved."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        build(name, root / name)
    return {name: root / name for name in FAMILIES}


def trained(folder: Path, dataset: Dataset, output: Path, kind: type = SFTTrainer, **settings: Any) -> Any:
    config = SFTConfig if kind is SFTTrainer else trl.SFTConfig
    args = config(str(output), **{**SETTINGS, **settings})
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    trainer = kind(model, args, train_dataset=dataset, processing_class=processor)
    trainer.train()
    return trainer


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def difference(left: PreTrainedModel, right: PreTrainedModel) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_give_the_loss_and_the_step_of_trls_padded_ones(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = Dataset.from_list(answered_rows(), features=FEATURES)
    theirs = trained(folders[name], rows, tmp_path / "trl", trl.SFTTrainer)
    packed = trained(folders[name], rows, tmp_path / "packed", packing=True)
    assert packed.notes == []
    assert losses_of(packed) == pytest.approx(losses_of(theirs), abs=2e-5)
    assert difference(packed.model, theirs.model) < 2e-6
