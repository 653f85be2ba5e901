"""Packed rows against padded ones: the time of an SFT step of `mpo.SFTTrainer` and of `trl.SFTTrainer`.

    python benchmarks/packing.py [--quick] [--json FILE]

The same untrained LLaVA, the same rows of varying lengths, in one process and turn by turn: TRL's trainer pads each
micro-batch, ours lays its rows one after the other (`packing=True`). A step is the collation of a micro-batch, forward
and backward. The ratio is TRL's time over ours; "padding" is the share of TRL's tokens that are none.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
import trl
from accelerate.utils import send_to_device
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from harness import begin, parser, ratio_of, show, take_turns
from models import LARGE, PATCH, PICTURE, TOY, Sizes, build
from PIL import Image
from rich.table import Table

from mpo import SFTConfig, SFTTrainer

ROUNDS, QUICK_ROUNDS = 9, 3
SETTINGS: dict[str, Any] = {"gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
SETTINGS |= {"disable_tqdm": True, "max_length": None}


class Workload(NamedTuple):
    """A micro-batch; lengths are numbers of tokens.

    Attributes:
        name: What its rows are like.
        pictures: Of each row.
        rows: How many.
        median: Of the answers, whose lengths are log-normal.
        spread: Standard deviation of the logarithm of their lengths.
    """

    name: str
    pictures: int
    rows: int
    median: int
    spread: float


def workloads(rows: int, median: int) -> list[Workload]:
    """Answers of one length, of lengths as instruction data has them, and texts alone."""
    return [
        Workload("pictures, equal lengths", 1, rows, median, 0.0),
        Workload("pictures, varied lengths", 1, rows, median, 1.0),
        Workload("texts, varied lengths", 0, 2 * rows, median, 1.0),
    ]


def conversation_rows(workload: Workload, sizes: Sizes) -> Dataset:
    """Prompts with pictures and answers, as texts of words that are a token each."""
    generator = np.random.default_rng(0)
    side = sizes.side * PATCH
    lengths = np.exp(generator.normal(np.log(workload.median), workload.spread, workload.rows)).astype(int).clip(1)

    def words(count: int) -> str:
        return " ".join(f"w{word}" for word in generator.integers(0, sizes.vocabulary - 3, count))

    rows = [
        {
            "images": [
                Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
                for _ in range(workload.pictures)
            ],
            "prompt": f"{PICTURE} " * workload.pictures + words(8),
            "completion": " " + words(length),
        }
        for length in lengths
    ]
    texts = dict.fromkeys(("prompt", "completion"), Value("string"))
    if not workload.pictures:
        return Dataset.from_list([{name: row[name] for name in texts} for row in rows], features=Features(texts))
    return Dataset.from_list(rows, features=Features({"images": List(ImageFeature(mode="RGB")), **texts}))


def make_trainer(kind: str, rows: Dataset, sizes: Sizes, folder: Path) -> Any:
    """TRL's trainer, which pads, or ours, which packs."""
    has_gpu = torch.cuda.is_available()
    model, processor = build(sizes, pictures="images" in rows.column_names, seed=0)
    trainer_class, config_class = (trl.SFTTrainer, trl.SFTConfig) if kind == "padded" else (SFTTrainer, SFTConfig)
    packing = {} if kind == "padded" else {"packing": True}
    args = config_class(
        str(folder), use_cpu=not has_gpu, bf16=has_gpu, per_device_train_batch_size=len(rows), **SETTINGS, **packing
    )
    return trainer_class(model, args, train_dataset=rows, processing_class=processor)


def measure(workload: Workload, sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Times both on one workload, turn by turn.

    Args:
        workload: The micro-batch.
        sizes: Of the model.
        rounds: Turns of each.

    Returns:
        Its `workload`, `rows` and `rounds`; by method, median `seconds`, `tokens` and the `loss`; the share of
        `padding`; and the `ratio`.
    """
    rows = conversation_rows(workload, sizes)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: make_trainer(kind, rows, sizes, Path(folder) / kind) for kind in ("padded", "packed")}
    found: dict[str, Any] = {"tokens": {}, "loss": {}}

    def step(kind: str) -> None:
        trainer = trainers[kind]
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])
        batch = send_to_device(batch, trainer.args.device)
        found["tokens"][kind] = batch["input_ids"].numel()
        loss = trainer.compute_loss(trainer.model, batch)
        found["loss"][kind] = loss.item()
        loss.backward()
        trainer.model.zero_grad()

    tasks = {kind: (lambda kind=kind: step(kind)) for kind in trainers}
    for task in tasks.values():  # warms up
        task()
    times = take_turns(tasks, rounds)
    quotients = [a / b for a, b in zip(times["padded"], times["packed"], strict=True)]
    return {
        "workload": workload.name,
        "rows": len(rows),
        "rounds": rounds,
        "seconds": {kind: statistics.median(seconds) for kind, seconds in times.items()},
        **found,
        "padding": 1 - found["tokens"]["packed"] / found["tokens"]["padded"],
        "ratio": ratio_of("padded / packed", quotients),
    }


def run(shapes: Sequence[Workload], sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Measures all workloads.

    Args:
        shapes: Of `workloads`.
        sizes: Of the model.
        rounds: Turns of each method.
    """
    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "model": sizes._asdict(),
    }
    return {"machine": machine, "workloads": [measure(shape, sizes, rounds=rounds) for shape in shapes]}


def table(results: dict[str, Any]) -> Table:
    """Times, and how many times as fast packing is."""
    found = Table("micro-batch", "rows", "padded, s", "packed, s", "padding", "padded / packed", "quartiles")
    for result in results["workloads"]:
        seconds, ratio = result["seconds"], result["ratio"]
        found.add_row(
            result["workload"],
            f"{result['rows']}",
            *(f"{seconds[kind]:.2f}" for kind in ("padded", "packed")),
            f"{result['padding']:.0%}",
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}",
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes the figures where asked."""
    options = begin(parser(__doc__, "fewer rounds: about a minute on two cores", ROUNDS, QUICK_ROUNDS), arguments)
    transformers.utils.logging.disable_progress_bar()
    rows, sizes = (16, LARGE) if torch.cuda.is_available() else (8, TOY)
    results = run(workloads(rows, 96), sizes, rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS))
    show(results, [table(results)], options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
