"""`mpo eval`: accuracy of one model, or of several on the same questions, with and without reasoning.

Decoding is greedy unless several answers are asked for, which also gives pass@k and the majority vote. Intervals are
95% bootstrap intervals over questions; models are compared question by question (paired).

Where a launcher started several ranks they share the parts out, each on its own GPU, and the first one counts.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path

from data_builders.backends import SamplerConfig, check_sampler, open_sampler
from data_builders.engine import EngineConfig, chunks_of_rows, run_step
from data_builders.images import check_images
from data_builders.judge import judge_rows
from data_builders.prompts import prompt_style
from data_builders.records import InputError, Question, Row, Summary
from data_builders.sample import sample_responses
from data_builders.samplers import Sampler
from data_builders.shards import SETTINGS_FILE, claim_folder, read_rows, read_stage, write_rows, write_text
from mpo.measures import compare

_PUBLIC = [
    "Public benchmarks, on what `mpo export` writes: VLMEvalKit (add the folder to vlmeval/config.py, then "
    "`python run.py --model NAME --data MathVista_MINI`) or lmms-eval (`lmms_eval --model TYPE --model_args "
    "pretrained=FOLDER --tasks mathvista_testmini`).",
]


@dataclass(kw_only=True)
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
    num_samples: int = field(
        default=1, metadata={"help": "Answers to each question; more than 1 adds pass@k and the majority vote."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Null is greedy for one answer, and 1.0 for several."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 keeps every token."})
    server: list[str] = field(
        default_factory=list,
        metadata={"help": "OpenAI-compatible servers that have all models under these names; none: in this process."},
    )
    max_new_tokens: int = field(default=1024, metadata={"help": "Longer answers are cut off."})
    batch_size: int = field(default=64, metadata={"help": "Answers generated at a time."})
    shard_size: int = field(default=512, metadata={"help": "Questions per unit of work: what a killed run repeats."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap, and of the answers that are drawn."})
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
    samplers = {name: _sampler_config(model, config) for name, model in models.items()}
    for sampler in samplers.values():
        check_sampler(sampler)  # before any work, so that a broken model is found first
    versions = [version for name in config.prompts for version in prompt_style(name).ids]
    settings = {"models": {name: sampler.provenance() for name, sampler in samplers.items()}, "prompts": versions}
    settings |= {"num_samples": config.num_samples, "shard_size": config.shard_size}
    folders = [path for sampler in samplers.values() for path in sampler.model_paths()]
    rank, _ = _ranks()
    if rank:
        _wait_for([output / SETTINGS_FILE])  # the first one claims
    claim_folder(output, settings, [questions, *folders])
    answers = [row for name, sampler in samplers.items() for row in _answer(name, sampler, config)]
    if rank:
        return Summary("", [], [])  # which only the first one prints
    write_rows(output / "answers.jsonl", answers)
    evaluation = compare(answers, list(models), config.prompts, seed=config.seed)
    write_text(output / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")
    return _summary(evaluation, config)


def _ranks() -> tuple[int, int]:
    """Which rank this is, and of how many."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _wait_for(paths: Iterable[Path]) -> None:
    """Until other ranks have written all of them; when one of them fails, its launcher ends this one too."""
    for path in paths:
        while not path.exists():
            time.sleep(0.2)


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


def _sampler_config(model: str, config: EvalConfig) -> SamplerConfig:
    temperature = float(config.num_samples > 1) if config.temperature is None else config.temperature
    return SamplerConfig(
        model=model,
        server=config.server,
        image_root=config.image_root,
        temperature=temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed if temperature else 0,
        batch_size=config.batch_size,
        device=config.device or _own_device(),
        dtype=config.dtype,
    )


def _own_device() -> str | None:
    """A GPU for each rank of a machine."""
    import torch

    several = _ranks()[1] > 1 and torch.cuda.is_available()
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if several else None


def _answer(name: str, model: SamplerConfig, config: EvalConfig) -> list[Row]:
    """Judged answers of one model in all prompt styles; parts that are there already are not made again."""

    @cache
    def sampler() -> Sampler:
        """Loaded when the first part is missing, and once for all styles."""
        return open_sampler(model)

    def answer(rows: list[Row], style: str) -> tuple[list[Row], list[Row]]:
        responses = sample_responses(rows, sampler(), prompt_style(style), config.num_samples, model.drawing())
        judged, unknown = judge_rows(responses)
        return [{"model": name, "style": style, **row} for row in judged], unknown

    answers, (rank, ranks) = [], _ranks()
    for style in config.prompts:
        folder = Path(config.output) / "parts" / f"{name}-{style}"
        chunks = chunks_of_rows(Path(config.questions), Question, config.shard_size)
        step = partial(answer, style=style)
        mine, engine = chunks[rank::ranks], EngineConfig(output=str(folder))
        run_step(lambda step=step: step, mine, engine, title=f"{name}, {style}")
        if rank:
            continue
        _wait_for(folder / chunk.name for chunk in chunks)
        answers += [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]
    return answers


def _summary(evaluation: Row, config: EvalConfig) -> Summary:
    models, styles = evaluation["models"], evaluation["styles"]
    sources = list(dict.fromkeys(row["source"] for row in evaluation["accuracy"]))
    cells: dict[tuple[str, ...], Row] = {}
    for row in evaluation["accuracy"]:
        cells["accuracy", row["model"], row["style"], row["source"]] = {**row, "value": row["accuracy"]}
    for row in evaluation["differences"]:
        key = ("accuracy", row["model"], row["style"], row["source"])
        cells[key]["difference"] = {**row, "value": row["difference"]}
    for row in evaluation["samples"]:
        cells[row["measure"], row["model"], row["style"], row["source"]] = row
    rows = []
    for measure in dict.fromkeys(key[0] for key in cells):
        for style, source in product(styles, sources):
            found = [cells[measure, model, style, source] for model in models]
            gains = [_range(row["difference"], "+") for row in found[1:]]
            rows.append([measure, style, source, *map(_range, found), *gains])
    others = [f"{model} - {models[0]}" for model in models[1:]]
    answers = f", {evaluation['num_samples']} answers each" if evaluation["num_samples"] > 1 else ""
    return Summary(
        f"{evaluation['num_questions']:,} questions{answers}; in %, with 95% intervals",
        ["measure", "prompt", "source", *models, *others],
        rows,
        notes=_PUBLIC,
        next_command=f"mpo report --evaluation {config.output} --output report.html",
    )


def _range(row: Row, sign: str = "") -> str:
    return f"{100 * row['value']:{sign}.1f} ({100 * row['low']:{sign}.1f} to {100 * row['high']:{sign}.1f})"
