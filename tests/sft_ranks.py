"""What a test of `SFTTrainer` on two ranks runs: `torchrun --nproc_per_node 2 tests/sft_ranks.py PLAN.json`.

PLAN.json holds `model`, `dataset` (a folder of `Dataset.save_to_disk`), `settings` of `SFTConfig`, and `result`, the
file that the first rank writes its losses to; the model is saved in `output_dir`.
"""

import json
import sys
from pathlib import Path

import tiny_models  # noqa: F401, for families whose processors need torchvision
import torch
from datasets import load_from_disk
from transformers import AutoProcessor

from data_builders.hf_sampler import load_model
from mpo.config import SFTConfig
from mpo.sft_trainer import SFTTrainer


def main(path: Path) -> None:
    plan = json.loads(path.read_text())
    args = SFTConfig(**plan["settings"])
    trainer = SFTTrainer(
        load_model(plan["model"], dtype="float32"),
        args,
        train_dataset=load_from_disk(plan["dataset"]),
        processing_class=AutoProcessor.from_pretrained(plan["model"]),
    )
    trainer.train()
    trainer.save_model(args.output_dir)
    if args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(plan["result"]).write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
