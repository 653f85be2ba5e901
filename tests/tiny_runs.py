"""TRL's trainer and MPO's on the same tiny models and pairs, in the one setting in which both must agree."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import QUIET_TRAINING
from datasets import Dataset, Features, Image, List, Value
from tiny_models import CHAT_TEMPLATE, build, byte_tokenizer, preference_rows, text_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)
from trl import DPOConfig, DPOTrainer

from mpo import MPOConfig, MPOTrainer

SETTINGS: dict[str, Any] = {
    **QUIET_TRAINING,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "loss_type": ["sigmoid", "bco_pair", "sft"],
    "loss_weights": [0.8, 0.2, 1.0],
    "optim": "sgd",  # weights then differ by gradients, not by their signs
    "learning_rate": 1e-2,
}
LIKE_TRL = {"reward_shift_decay": 1.0, "sft_reduction": "token"}
ROW_BY_ROW = {"share_prefixes": False}  # for what only differs by rounding in bf16, or by random numbers
_COST = ("runtime", "per_second", "total_flos")  # ends of the names of what depends on machine and shortcuts
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


class Tiny(NamedTuple):
    """A saved model with its processor, and eight pairs for it."""

    folder: Path
    pairs: Dataset

    def load(self) -> PreTrainedModel:
        kind = AutoModelForImageTextToText if "images" in self.pairs.column_names else AutoModelForCausalLM
        return kind.from_pretrained(self.folder)


def save_models(folder: Path) -> dict[str, Tiny]:
    """LLaVA ("vision"), Qwen2 ("text") and Qwen3's mixture of experts ("moe"), in miniature."""
    turn = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": turn, "chosen": turn, "rejected": turn})
    pairs = Dataset.from_list(preference_rows(8), features=features)
    build("llava", folder / "vision")
    _save_text_model(folder / "text", Qwen2Config)
    _save_text_model(folder / "moe", Qwen3MoeConfig, **_EXPERTS)
    texts = pairs.remove_columns("images")
    return {name: Tiny(folder / name, pairs if name == "vision" else texts) for name in ("vision", "text", "moe")}


def _save_text_model(folder: Path, config_class: type[PretrainedConfig], **more: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_class(**text_config(tokenizer, **more))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_trainer(
    trainer_class: type[DPOTrainer], tiny: Tiny, folder: Path, settings: dict[str, Any] | None = None, **arguments: Any
) -> DPOTrainer:
    """A trainer of either class; `settings` are of its config (TRL's has no `ROW_BY_ROW`), `arguments` its own."""
    settings = {**SETTINGS, **(settings or {})}
    if trainer_class is MPOTrainer:
        args = MPOConfig(str(folder / "out"), **{**LIKE_TRL, "ref_logps_dir": str(folder / "reference"), **settings})
    else:
        args = DPOConfig(str(folder / "out"), **{name: settings[name] for name in settings.keys() - ROW_BY_ROW})
    defaults = {"train_dataset": tiny.pairs, "processing_class": AutoProcessor.from_pretrained(tiny.folder)}
    model = arguments.pop("model", None) or tiny.load()
    return trainer_class(model=model, args=args, **{**defaults, **arguments})


def train(trainer_class: type[DPOTrainer], tiny: Tiny, folder: Path, *args: Any, **arguments: Any) -> DPOTrainer:
    trainer = make_trainer(trainer_class, tiny, folder, *args, **arguments)
    trainer.train()
    return trainer


def train_as_trl(tiny: Tiny, folder: Path, *args: Any, **arguments: Any) -> MPOTrainer:
    """Trains both, and checks that MPO's logs whatever TRL's does; arguments must be fit to be used twice."""
    theirs = train(DPOTrainer, tiny, folder / "trl", *args, **arguments)
    ours = train(MPOTrainer, tiny, folder / "mpo", *args, **arguments)
    for found, expected in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        check_metrics(found, expected)
    return ours


def check_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    """What TRL reports, MPO reports under the same name, and the same number."""
    assert not expected.keys() - found.keys()
    for name in expected:
        if not name.endswith(_COST):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def logged(trainer: DPOTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
