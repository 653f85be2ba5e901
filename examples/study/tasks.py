"""The files that a seed starts from: scans, questions, SFT rows and an untrained model, by `mpo.digits`.

`ascending` is the task in which hallucination can be counted: SFT pictures mostly show d, d + 1, d + 2, d + 3 (and 0
after 9), so the language model learns to expect the next digit; in all other pictures neighbours say nothing.
"""

from pathlib import Path

import numpy as np

from data_builders.records import Row
from data_builders.shards import read_rows
from mpo import digits

_SEED_STRIDE = 100  # every file has a seed of its own, as in the quickstart


def ascending(share: float) -> digits.Compose:
    """Pictures in which a digit follows from the one before it with this probability, and is any other times."""

    def compose(scans: digits.Scans, count: int, rng: np.random.Generator) -> np.ndarray:
        wanted = rng.integers(0, 10, (count, 4))
        follows = rng.random((count, 4)) < share
        for place in range(1, 4):
            following = (wanted[:, place - 1] + 1) % 10
            wanted[:, place] = np.where(follows[:, place], following, wanted[:, place])
        by_digit = [np.flatnonzero(scans.labels == digit) for digit in range(10)]
        return np.array([[rng.choice(by_digit[digit]) for digit in row] for row in wanted])  # (count, 4)

    return compose


def write_base(folder: Path, settings: Row, sizes: dict[str, int], seed: int) -> None:
    """Writes `data/` (JSONL files and `images/`) and `base/` (the untrained model).

    Args:
        folder: Of the base and seed.
        settings: Its entry in the YAML.
        sizes: Questions on development and test scans.
        seed: Of the SFT scans, the pictures and the model.
    """
    data, parts, base = folder / "data", digits.split_scans(seed), seed * _SEED_STRIDE
    compose = ascending(settings["share"]) if settings["compose"] == "ascending" else digits.any_scans
    digits.write_sft_rows(data / "sft.jsonl", parts["sft"], settings["sft_rows"], seed=base + 1, compose=compose)
    files = {  # name: scans, questions
        "questions": ("preference", settings["questions"]),
        "second": ("preference", settings["questions"] // 2),  # of the second round
        "development": ("development", sizes["development"]),
        "test": ("test", sizes["test"]),
    }
    for number, (name, (part, count)) in enumerate(files.items(), 11):
        digits.write_questions(data / f"{name}.jsonl", parts[part], count, prefix=name, seed=base + number)
    digits.write_questions(
        data / "open.jsonl",
        parts["preference"],
        settings["open_questions"],
        prefix="open",
        seed=base + 20,
        with_answers=False,
    )
    texts = digits.conversation_texts(read_rows(data / "sft.jsonl"))
    digits.write_model(folder / "base", texts, parts["sft"], seed=seed, vision_seed=base + 6)
