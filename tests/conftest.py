"""What several test files need: a small task on disk and an untrained vision-language model that fits it."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test looks anything up

import pytest

from data_builders.shards import read_rows
from mpo import digits


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sft.jsonl` (48 rows), `questions.jsonl` (12 with answers), `open.jsonl` (4 without) and `model/`."""
    folder = tmp_path_factory.mktemp("task")
    parts = digits.split_scans(seed=0)
    digits.write_sft_rows(folder / "sft.jsonl", parts["sft"], 48, seed=1)
    digits.write_questions(folder / "questions.jsonl", parts["preference"], 12, prefix="known", seed=2)
    digits.write_questions(folder / "open.jsonl", parts["preference"], 4, prefix="open", seed=3, with_answers=False)
    rows = list(read_rows(folder / "sft.jsonl"))
    tokenizer = digits.train_tokenizer(m["content"] for row in rows for m in row["prompt"] + row["completion"])
    processor, model = digits.build_model(tokenizer, seed=0)
    processor.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    return folder
