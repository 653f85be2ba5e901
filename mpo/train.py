"""`mpo train`: Mixed Preference Optimization on pairs.

Settings are those of this file, of `trl.ModelConfig` (model, LoRA) and of `mpo.MPOConfig`, flat in one YAML file.
"""

from trl import ModelConfig

from data_builders.records import Summary
from mpo.config import MPOConfig
from mpo.data import preference_dataset
from mpo.memory import release
from mpo.tiled_data import data_tiling
from mpo.trainer import MPOTrainer
from mpo.training import StageConfig, claim_output, prepare, train_and_save

CONFIGS = (StageConfig, ModelConfig, MPOConfig)


def run(config: StageConfig, model_config: ModelConfig, args: MPOConfig) -> Summary:
    """Trains and saves the model.

    Raises:
        InputError: Model, data or images are not what they should be, or the output folder holds another run.
    """
    parts = prepare(config, model_config, args, preference_dataset)
    claim_output(config, model_config, args)
    trainer = MPOTrainer(args=args, **parts)
    tiling = data_tiling(config.tiling, model_config.model_name_or_path, parts["processing_class"])
    metrics = train_and_save(trainer, tiling)
    release(trainer)
    return _summary(args, len(trainer.train_dataset), metrics, trainer.notes)


def _summary(args: MPOConfig, num_pairs: int, metrics: dict[str, float], notes: list[str]) -> Summary:
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
        notes=[*notes, f"The model is in {args.output_dir}."],
        next_command=f"mpo eval --model {args.output_dir} --questions YOUR_TEST_QUESTIONS.jsonl --output evaluation",
    )
