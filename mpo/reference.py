"""`mpo reference`: the reference log-probabilities of a data set, computed ahead of training, here or elsewhere.

Takes the settings of `mpo train`, which finds what this left in `ref_logps_dir` and needs no reference model then.
"""

from trl import ModelConfig

from data_builders.records import Summary
from mpo.config import MPOConfig
from mpo.data import preference_dataset
from mpo.scores import REF_COLUMNS
from mpo.trainer import MPOTrainer
from mpo.training import StageConfig, prepare

CONFIGS = (StageConfig, ModelConfig, MPOConfig)


def run(config: StageConfig, model_config: ModelConfig, args: MPOConfig) -> Summary:
    """Computes what is missing; a second run finds it.

    Raises:
        InputError: Model, data or images are not what they should be.
    """
    args.precompute_ref_log_probs = True
    trainer = MPOTrainer(args=args, **prepare(config, model_config, args, preference_dataset))
    rows = []
    for name, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if dataset is not None:
            means = [sum(dataset[column]) / len(dataset) for column in REF_COLUMNS]
            rows.append([name, f"{len(dataset):,}", *(f"{mean:.3f}" for mean in means)])
    return Summary(
        "Reference log-probabilities",
        ["data", "pairs", "mean of chosen", "mean of rejected"],
        rows,
        notes=[f"They are in {trainer.reference_root()}, for every run with this model, data and processor."],
        next_command="mpo train --precompute_ref_log_probs true, with the same settings",
    )
