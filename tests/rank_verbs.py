"""Several verbs for one start of the ranks: `torchrun --nproc_per_node 2 tests/rank_verbs.py PLAN.json`.

PLAN.json is a list of verbs, each with what follows it on the command line. Where accelerate starts this with a config
of FSDP, it is told that CPUs and gloo are the GPUs that it shards over: it would silently not shard otherwise.
"""

import json
import os
import sys
from pathlib import Path

import tiny_models  # noqa: F401 - registers processors that need no torchvision
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer

from mpo.cli import run_verb
from mpo.config import TrainerConfig


def take_cpus_for_gpus() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    TrainerConfig.__post_init__ = lambda self: super(TrainerConfig, self).__post_init__()  # leaves `use_cpu` alone
    prepare = Trainer._prepare_for_training

    def checked(trainer: Trainer, *arguments: object) -> object:
        prepared = prepare(trainer, *arguments)
        for model in (trainer.model, trainer.ref_model):
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return prepared

    Trainer._prepare_for_training = checked


def main(path: Path) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_cpus_for_gpus()
    for verb, *argv in json.loads(path.read_text()):
        run_verb(verb, argv)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
