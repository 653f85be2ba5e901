"""What several test files need: a small task with an untrained model, and a quickstart of a few seconds."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test looks anything up
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: models this small are slower on several threads

import pytest
import yaml

from data_builders.shards import read_rows, write_text
from mpo import digits
from mpo.cli import run_verb

ROOT = Path(__file__).parent.parent
QUIET_TRAINING = {  # of a trainer on a CPU: short, alike everywhere, and nothing written but what a test asks for
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "max_length": None,
}
SIZES = {"sft_rows": 64, "questions": 24, "open_questions": 3, "test_questions": 12}
SMALL = {  # answers of one token, which a model can get right by luck after seconds
    "sft": {"max_steps": 100, "save_steps": 20, "learning_rate": 2e-3, "disable_tqdm": True},
    "control/sft": {"max_steps": 1, "save_steps": 1, "disable_tqdm": True},
    "train": {"max_steps": 3, "save_steps": 1, "logging_steps": 1, "disable_tqdm": True},
    "sample": {"prompt": "direct", "max_new_tokens": 6, "num_responses": 8, "shard_size": 4},
    "dropout_ntp": {"ratio": 0.0, "max_new_tokens": 4},
    "eval": {"max_new_tokens": 8, "shard_size": 5, "prompts": ["final_answer", "direct"]},
}


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sft.jsonl` (48 rows), `questions.jsonl` (12), `open.jsonl` (4, no answers) and `model/`."""
    folder = tmp_path_factory.mktemp("task")
    parts = digits.split_scans(seed=0)
    digits.write_sft_rows(folder / "sft.jsonl", parts["sft"], 48, seed=1)
    digits.write_questions(folder / "questions.jsonl", parts["preference"], 12, prefix="known", seed=2)
    digits.write_questions(folder / "open.jsonl", parts["preference"], 4, prefix="open", seed=3, with_answers=False)
    texts = digits.conversation_texts(read_rows(folder / "sft.jsonl"))
    tokenizer = digits.train_tokenizer(texts)
    processor, model = digits.build_model(tokenizer, seed=0)
    processor.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    return folder


def task_pairs(task: Path, num_pairs: int) -> list[dict[str, Any]]:
    """Pairs of the task's rows, of which every fourth has no picture; rejected responses are of several lengths."""
    pairs = []
    for index, row in enumerate(list(read_rows(task / "sft.jsonl"))[:num_pairs]):
        chosen = row["completion"][0]["content"]
        pair = {"id": str(index), "images": [] if index % 4 == 3 else [f"images/sft-{index:05d}.png"]}
        pair |= {"prompt": row["prompt"][0]["content"], "chosen": chosen, "kind": "correctness", "source": "sum"}
        pairs.append({**pair, "rejected": chosen[: len(chosen) // 2] + " 7." * (1 + index % 3)})
    return pairs


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped settings, cut down to seconds."""
    folder = tmp_path_factory.mktemp("configs")
    shipped = ROOT / "configs" / "quickstart"
    for path in shipped.rglob("*.yaml"):
        name = path.relative_to(shipped).with_suffix("")
        settings = {**yaml.safe_load(path.read_text()), **SMALL.get(str(name), {})}
        write_text(folder / f"{name}.yaml", yaml.safe_dump(settings))
    return folder


def quickstart_arguments(output: Path, configs: Path) -> list[str]:
    words = {"output": output, "configs": configs, **SIZES}
    return [word for key, value in words.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, configs: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    run_verb("quickstart", quickstart_arguments(output, configs))
    return output
