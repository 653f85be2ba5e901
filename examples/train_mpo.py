"""Mixed Preference Optimization in a TRL script.

    python examples/train_mpo.py MODEL PAIRS IMAGE_ROOT OUTPUT

PAIRS is anything that `mpo train` takes: pairs of `mpo pair`, or TRL's preference format as JSONL, Parquet, a folder
or a Hub id. Any dataset that `trl.DPOTrainer` takes will do as well.
"""

import sys

from mpo import MPOConfig, MPOTrainer
from mpo.data import preference_dataset


def main(model: str, pairs: str, image_root: str, output: str) -> None:
    """Trains a model on pairs and saves it."""
    args = MPOConfig(
        output,
        learning_rate=1e-6,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        logging_steps=1,
        report_to="none",
    )
    trainer = MPOTrainer(model=model, args=args, train_dataset=preference_dataset([pairs], image_root))
    trainer.train()
    trainer.save_model()
    print(f"reward shift after training: {trainer.reward_shift.mean:+.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
