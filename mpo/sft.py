"""`mpo sft`: supervised fine-tuning of a vision-language model on conversations with TRL's SFTTrainer.

Settings are those of `mpo.training`, of `trl.ModelConfig` (model, LoRA) and of `mpo.config.SFTConfig`, which has all
fields of TRL's; flat in one YAML file.
"""

from trl import ModelConfig, SFTTrainer

from data_builders.records import Summary
from mpo.config import SFTConfig
from mpo.data import sft_dataset
from mpo.models import LoadsItsCheckpoints
from mpo.optimizers import LearnsByPart
from mpo.training import StageConfig, claim_output, prepare, train_and_save

CONFIGS = (StageConfig, ModelConfig, SFTConfig)


class _Trainer(LoadsItsCheckpoints, LearnsByPart, SFTTrainer):
    pass


def run(config: StageConfig, model_config: ModelConfig, args: SFTConfig) -> Summary:
    """Trains and saves the model.

    Raises:
        InputError: Model, data or images are not what they should be, or the output folder holds another run.
    """
    parts = prepare(config, model_config, args, sft_dataset)
    claim_output(config, model_config, args)
    trainer = _Trainer(args=args, **parts)
    metrics = train_and_save(trainer)
    rows = [
        ["rows", f"{len(parts['train_dataset']):,}"],
        ["optimizer steps", f"{metrics.get('step', 0):,}"],
        ["loss", f"{float(metrics.get('loss', float('nan'))):.4f}"],
    ]
    return Summary(
        "Supervised fine-tuning",
        ["", "last logged"],
        rows,
        notes=[f"The model is in {args.output_dir}."],
        next_command=f"mpo sample --model {args.output_dir} --questions YOUR_QUESTIONS.jsonl --output responses",
    )
