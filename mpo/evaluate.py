"""`mpo eval`: accuracy of one model, or of several on the same questions, with and without reasoning.

Decoding is greedy. Intervals are 95% bootstrap intervals over questions; models are compared question by question
(paired).
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np

from data_builders.engine import EngineConfig, chunks_of_rows, run_step
from data_builders.hf_sampler import HFSampler, load_processor
from data_builders.images import check_images
from data_builders.judge import judge_rows
from data_builders.prompts import prompt_style
from data_builders.records import InputError, Question, Row, Summary
from data_builders.sample import sample_responses
from data_builders.samplers import SamplingSettings
from data_builders.shards import claim_folder, read_rows, read_stage, write_rows, write_text

ALL = "all"
_RESAMPLES = 2000


@dataclass
class EvalConfig:
    """Settings of `mpo eval`."""

    models: list[str] = field(
        metadata={
            "help": "Model folders or Hub names, as `path` or `Name=path`; the first is what others are compared to."
        }
    )
    questions: str = field(metadata={"help": "Questions with answers: a JSONL file or a folder of shards."})
    output: str = field(metadata={"help": "Folder for answers.jsonl and evaluation.json."})
    image_root: str = field(default=".", metadata={"help": "Folder that image paths are relative to."})
    prompts: list[str] = field(
        default_factory=lambda: ["final_answer", "direct"],
        metadata={"help": "Prompt styles: `final_answer` reasons first, `direct` does not."},
    )
    max_new_tokens: int = field(default=1024, metadata={"help": "Longer answers are cut off."})
    batch_size: int = field(default=64, metadata={"help": "Answers generated at a time."})
    shard_size: int = field(default=512, metadata={"help": "Questions per unit of work: what a killed run repeats."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})
    device: str | None = field(default=None, metadata={"help": "Where models run; null takes a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": "Weights in this type; auto takes the model's own."})


CONFIGS = (EvalConfig,)


def run(config: EvalConfig) -> Summary:
    """Answers, judges and compares.

    Raises:
        InputError: Questions, images or a model are not what they should be, or the folder holds other work.
    """
    models = _named_models(config.models)
    questions, output = Path(config.questions), Path(config.output)
    rows = list(read_stage(questions, Question))
    _check_answers(rows)
    check_images(rows, Path(config.image_root))
    for model in models.values():
        load_processor(model)  # before any work, so that a broken model is found first
    versions = [f"{style.name}@{style.version}" for style in map(prompt_style, config.prompts)]
    settings = {"models": models, "prompts": versions, "max_new_tokens": config.max_new_tokens}
    claim_folder(output, {**settings, "shard_size": config.shard_size}, [questions, *map(Path, models.values())])
    answers = [row for name, model in models.items() for row in _answer(name, model, config)]
    write_rows(output / "answers.jsonl", answers)
    evaluation = compare(answers, list(models), config.prompts, seed=config.seed)
    write_text(output / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")
    return _summary(evaluation, config)


def _named_models(entries: list[str]) -> dict[str, str]:
    named = [entry.split("=", 1) if "=" in entry else [Path(entry).name, entry] for entry in entries]
    if len({name for name, _ in named}) < len(named):
        raise InputError(f"two models have the same name in {entries}: write them as `Name=path`.")
    return dict(named)


def _check_answers(rows: list[Row]) -> None:
    seen = set()
    for row in rows:
        if row.get("answer") is None:
            raise InputError(f"question {row['id']!r} has no answer: accuracy can only be measured where it is known.")
        if row["id"] in seen:
            raise InputError(
                f"two questions have the id {row['id']!r}: models are compared by id, so each needs its own."
            )
        seen.add(row["id"])


def _answer(name: str, model: str, config: EvalConfig) -> list[Row]:
    """Judged answers of one model in all prompt styles; parts that are there already are not made again."""

    @cache
    def sampler() -> HFSampler:
        """Loaded when the first part is missing, and once for all styles."""
        root = Path(config.image_root)
        return HFSampler(
            model, image_root=root, batch_size=config.batch_size, device=config.device, dtype=config.dtype
        )

    def answer(rows: list[Row], style: str) -> tuple[list[Row], list[Row]]:
        greedy = SamplingSettings(temperature=0.0, max_new_tokens=config.max_new_tokens)
        judged, unknown = judge_rows(sample_responses(rows, sampler(), prompt_style(style), 1, greedy))
        return [{"model": name, "style": style, **row} for row in judged], unknown

    answers = []
    for style in config.prompts:
        folder = Path(config.output) / "parts" / f"{name}-{style}"
        chunks = chunks_of_rows(Path(config.questions), Question, config.shard_size)
        step = partial(answer, style=style)
        run_step(lambda step=step: step, chunks, EngineConfig(output=str(folder)), title=f"{name}, {style}")
        answers += [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]
    return answers


def compare(answers: list[Row], models: list[str], styles: list[str], *, seed: int = 0) -> Row:
    """Accuracy of every model by source of question, and the paired differences to the first model.

    Args:
        answers: Verdict rows with `model` and `style`; every model answered the same questions.
        models: Their names, the baseline first.
        styles: The prompt styles.
        seed: Of the bootstrap.

    Returns:
        What `evaluation.json` holds; accuracies, differences and limits are fractions.
    """
    correct: dict[tuple[str, str, str], dict[str, bool]] = defaultdict(
        dict
    )  # (model, style, source) -> question -> right?
    for row in answers:
        for source in {ALL, row.get("source") or "(no source)"}:
            correct[row["model"], row["style"], source][row["id"]] = row["verdict"] == "correct"
    sources = sorted({source for _, _, source in correct} - {ALL})
    accuracy, differences = [], []
    for style in styles:
        for source in [ALL, *sources]:
            baseline = correct[models[0], style, source]
            for model in models:
                own = correct[model, style, source]
                here = {"model": model, "style": style, "source": source, "num": len(own)}
                values = np.array([own[question] for question in baseline], dtype=float)
                accuracy.append({**here, "accuracy": values.mean(), **bootstrap(values, seed)})
                if model != models[0]:
                    gain = values - np.array(list(baseline.values()), dtype=float)
                    compared = {**here, "baseline": models[0], "difference": gain.mean()}
                    differences.append({**compared, **bootstrap(gain, seed)})
    return {
        "models": models,
        "styles": styles,
        "num_questions": len(correct[models[0], styles[0], ALL]),
        "accuracy": accuracy,
        "differences": differences,
    }


def bootstrap(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """The 95% interval of a mean, by resampling.

    Args:
        values: One number per question, (N,).
        seed: Of the resampling.

    Returns:
        Its limits `low` and `high`.
    """
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    resampled = rng.multinomial(len(values), counts / len(values), size=_RESAMPLES)  # (R, distinct values)
    low, high = np.quantile(resampled @ distinct / len(values), [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def _summary(evaluation: Row, config: EvalConfig) -> Summary:
    accuracy = {(row["model"], row["style"], row["source"]): row for row in evaluation["accuracy"]}
    gains = {(row["model"], row["style"], row["source"]): row for row in evaluation["differences"]}
    sources = list(dict.fromkeys(row["source"] for row in evaluation["accuracy"]))
    rows = []
    for style in evaluation["styles"]:
        for source in sources:
            cells = [_range(accuracy[model, style, source], "accuracy") for model in evaluation["models"]]
            cells += [_range(gains[model, style, source], "difference") for model in evaluation["models"][1:]]
            rows.append([style, source, *cells])
    others = [f"{model} - {evaluation['models'][0]}" for model in evaluation["models"][1:]]
    return Summary(
        f"Accuracy on {evaluation['num_questions']:,} questions, in %, with 95% intervals",
        ["prompt", "source", *evaluation["models"], *others],
        rows,
        next_command=f"mpo report --evaluation {config.output} --output report.html",
    )


def _range(row: Row, key: str) -> str:
    sign = "+" if key == "difference" else ""
    return f"{100 * row[key]:{sign}.1f} ({100 * row['low']:{sign}.1f} to {100 * row['high']:{sign}.1f})"
