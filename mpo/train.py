"""`mpo train`: Mixed Preference Optimization on pairs.

Settings are those of this file, of `trl.ModelConfig` (model, LoRA) and of `mpo.MPOConfig`, flat in one YAML file.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from trl import ModelConfig, get_peft_config

from data_builders.records import InputError, Summary
from data_builders.samplers import load_model, load_processor
from mpo.config import MPOConfig
from mpo.data import preference_dataset
from mpo.models import PARTS, train_parts
from mpo.trainer import MPOTrainer
from mpo.training import claim_output, require_output_dir, train_and_save


@dataclass
class TrainConfig:
    """What `mpo train` needs besides the trainer's settings."""

    data: list[str] = field(metadata={"help": "Pair files or folders, read one after the other."})
    image_root: str = field(default=".", metadata={"help": "Folder that image paths are relative to."})
    train: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts that are trained: vision, projector, llm (paper: all). LoRA chooses its own."},
    )


CONFIGS = (TrainConfig, ModelConfig, MPOConfig)


def run(config: TrainConfig, model_config: ModelConfig, args: MPOConfig) -> Summary:
    """Trains and saves the model.

    Raises:
        InputError: Model, data or images are not what they should be, or the output folder holds another run.
    """
    require_output_dir(args)
    if model_config.model_name_or_path is None:
        raise InputError("`model_name_or_path` is missing: the model to start from, which is also the reference.")
    processor = load_processor(model_config.model_name_or_path, trust_remote_code=args.trust_remote_code)
    dataset = preference_dataset(config.data, config.image_root)
    claim_output(args, {**asdict(config), **asdict(model_config)}, [Path(source) for source in config.data])
    model = load_model(
        model_config.model_name_or_path,
        trust_remote_code=args.trust_remote_code,
        dtype=model_config.dtype or "float32",
        attn_implementation=model_config.attn_implementation,
        revision=model_config.model_revision,
    )
    if not model_config.use_peft:
        train_parts(model, config.train)
    trainer = MPOTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_config),
    )
    metrics = train_and_save(trainer)
    return _summary(args, len(dataset), metrics)


def _summary(args: MPOConfig, num_pairs: int, metrics: dict[str, float]) -> Summary:
    names = {
        "loss/preference": "preference loss",
        "loss/quality": "quality loss",
        "loss/generation": "generation loss",
        "rewards/margins": "reward margin",
        "rewards/accuracies": "pairs ranked right",
        "reward_shift": "reward shift",
    }
    rows = [["pairs", f"{num_pairs:,}"], ["optimizer steps", f"{metrics.get('step', 0):,}"]]
    rows += [[label, f"{float(metrics[name]):.4f}"] for name, label in names.items() if name in metrics]
    return Summary(
        "Mixed Preference Optimization",
        ["", "last logged"],
        rows,
        notes=[f"The model is in {args.output_dir}."],
        next_command=f"mpo eval --model {args.output_dir} --questions YOUR_TEST_QUESTIONS.jsonl --output evaluation",
    )
