"""`mpo quickstart`: the whole method on real handwritten digits, on a laptop, in a few minutes.

It writes a task (`mpo.digits`) as ordinary files and then runs the verbs in order, each from its file in
`configs/quickstart/`, as a user would run them on files of their own. Stages that are done are skipped, so a run that
was stopped goes on. With `--seeds 5` it repeats everything with other seeds, adds the control (the same number of
further SFT steps) and gives the mean gain with its interval.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_builders.records import InputError, Row, Summary
from data_builders.shards import read_rows, read_stage, write_rows, write_text
from mpo.stages import LOG, RunVerb, Stage, run_stages

NUM_GALLERY = 12
_FOLDERS = ("data", "base", "sft", "responses", "verdicts", "pairs", "dropout_ntp", "mpo", "further_sft")
_FOLDERS += ("evaluation", "gallery")
_SIZES = ("sft_rows", "questions", "open_questions", "test_questions")
_SEED_STRIDE = 100  # every file of the task has a seed of its own


@dataclass
class QuickstartConfig:
    """Settings of `mpo quickstart`."""

    output: str = field(default="runs/quickstart", metadata={"help": "Folder for everything the run writes."})
    seed: int = field(default=0, metadata={"help": "Of the SFT scans, the model, sampling and training."})
    seeds: int = field(default=1, metadata={"help": "Repeats the run with this many seeds and reports the mean gain."})
    jobs: int = field(default=0, metadata={"help": "Seeds that run at the same time; 0 takes one per CPU core."})
    further_sft: bool = field(
        default=False, metadata={"help": "Also train the SFT model on for as many steps as MPO does, as a control."}
    )
    split: str = field(
        default="test", metadata={"help": "Scans to evaluate on: test, or development when choosing settings."}
    )
    sft_rows: int = field(default=6000, metadata={"help": "Conversations with rationales, over 60 scans."})
    questions: int = field(default=4800, metadata={"help": "Questions with answers, over 1,000 other scans."})
    open_questions: int = field(default=40, metadata={"help": "Questions without answers, for DropoutNTP."})
    test_questions: int = field(default=2000, metadata={"help": "Questions to evaluate on."})
    configs: str = field(
        default="", metadata={"help": "Folder with a YAML file per verb; empty: those that come along."}
    )


CONFIGS = (QuickstartConfig,)


def run(config: QuickstartConfig, *, run_verb: RunVerb) -> Summary:
    """Runs what is not done yet.

    Args:
        config: The settings.
        run_verb: Runs another verb in this process, as the command line would.

    Raises:
        InputError: A setting is wrong, or the output folder was made with other settings.
    """
    if config.split not in ("test", "development"):
        raise InputError(f"`split` must be test or development, got {config.split!r}.")
    return _run_seeds(config) if config.seeds > 1 else _run_once(config, run_verb)


def _run_once(config: QuickstartConfig, run_verb: RunVerb) -> Summary:
    folder = Path(config.output)
    return _summary(config, folder, run_stages(_stages(config, folder), folder, run_verb))


def _stages(config: QuickstartConfig, folder: Path) -> list[Stage]:
    """The method, step by step: which verb reads what and writes where."""
    at = {path.name: str(path) for path in (folder / name for name in _FOLDERS)}
    common = {"image_root": at["data"], "seed": str(config.seed)}
    sizes = {name: str(getattr(config, name)) for name in ("seed", *_SIZES)}
    sft = {"data": f"{at['data']}/sft.jsonl", **common}
    pairs = json.dumps([at["pairs"], at["dropout_ntp"]])
    models, configs = {"SFT": at["sft"]}, _configs(config)

    def stage(name: str, verb: str, settings: dict[str, str], file: str = "", **others: Any) -> Stage:
        return Stage(name, verb, settings, config=configs / f"{file or verb.replace('-', '_')}.yaml", **others)

    stages = [
        Stage("task", settings=sizes, prepare=lambda: write_task(folder, config)),
        stage("sft", "sft", {"model_name_or_path": at["base"], **sft, "output_dir": at["sft"]}),
        stage(
            "sample",
            "sample",
            {"model": at["sft"], "questions": f"{at['data']}/questions.jsonl", **common, "output": at["responses"]},
        ),
        stage("judge", "judge", {"responses": at["responses"], "output": at["verdicts"]}),
        stage("pair", "pair", {"verdicts": at["verdicts"], "seed": str(config.seed), "output": at["pairs"]}),
        stage(
            "dropout_ntp",
            "dropout-ntp",
            {"model": at["sft"], "responses": at["responses"], **common, "output": at["dropout_ntp"]},
        ),
        stage("train", "train", {"model_name_or_path": at["sft"], "data": pairs, **common, "output_dir": at["mpo"]}),
    ]
    if config.further_sft:
        models["further SFT"] = at["further_sft"]
        more = {"model_name_or_path": at["sft"], **sft, "output_dir": at["further_sft"]}
        stages.append(stage("further_sft", "sft", more, file="control/sft"))
    models["MPO"] = at["mpo"]
    evaluation = {"questions": f"{at['data']}/{config.split}.jsonl", "output": at["evaluation"]}
    gallery = {"questions": str(folder / "gallery.jsonl"), "output": at["gallery"], "prompts": "[final_answer]"}
    report = {"evaluation": at["evaluation"], "training": at["mpo"], "verdicts": at["verdicts"], "pairs": pairs}
    report |= {"gallery_answers": at["gallery"], "output": str(folder / "report.html"), "image_root": at["data"]}
    named = {"models": json.dumps([f"{name}={path}" for name, path in models.items()]), **common}
    return [
        *stages,
        stage("eval", "eval", {**named, **evaluation}),
        stage("gallery", "eval", {**named, **gallery}, prepare=lambda: write_gallery(folder)),
        stage("report", "report", report),
    ]


def _configs(config: QuickstartConfig) -> Path:
    """The settings files: the user's, those of a checkout, or those of an installed wheel."""
    if config.configs:
        return Path(config.configs)
    package = Path(__file__).parent
    beside = package.parent / "configs" / "quickstart"
    return Path(os.path.relpath(beside)) if beside.is_dir() else package / "configs" / "quickstart"


def write_task(folder: Path, config: QuickstartConfig) -> None:
    """Writes pictures, questions, SFT rows and the untrained model.

    Args:
        folder: Gets `data/` (JSONL files, and `images/`) and `base/` (the model).
        config: Sizes, and the seed of everything that is drawn.
    """
    from mpo import digits

    for name in ("data", "base"):  # a stage that was killed starts again
        shutil.rmtree(folder / name, ignore_errors=True)
    seed, base = config.seed, config.seed * _SEED_STRIDE
    data, parts = folder / "data", digits.split_scans(config.seed)
    digits.write_sft_rows(data / "sft.jsonl", parts["sft"], config.sft_rows, seed=base + 1)
    known, unknown = data / "known.jsonl", data / "open.jsonl"
    digits.write_questions(known, parts["preference"], config.questions, prefix="known", seed=base + 2)
    digits.write_questions(
        unknown, parts["preference"], config.open_questions, prefix="open", seed=base + 3, with_answers=False
    )
    write_rows(data / "questions.jsonl", [*read_rows(known), *read_rows(unknown)])
    known.unlink()
    unknown.unlink()
    for number, split in enumerate(("development", "test"), 4):
        path = data / f"{split}.jsonl"
        digits.write_questions(path, parts[split], config.test_questions, prefix=split, seed=base + number)
    texts = digits.conversation_texts(read_rows(data / "sft.jsonl"))
    digits.write_model(folder / "base", texts, parts["sft"], seed=seed, vision_seed=base + 6)


def write_gallery(folder: Path) -> None:
    """Writes the questions of a few pairs, for the report to show what each model answers to them."""
    questions = {row["id"]: row for row in read_rows(folder / "data" / "questions.jsonl")}
    ids = dict.fromkeys(row["question_id"] for row in read_stage(folder / "pairs"))
    write_rows(folder / "gallery.jsonl", [questions[id] for id in islice(ids, NUM_GALLERY)])


def _summary(config: QuickstartConfig, folder: Path, done: Row) -> Summary:
    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    total = sum(stage["seconds"] for stage in done.values())
    rows = [[name, f"{stage['seconds']:.0f} s", f"{stage['seconds'] / total:.0%}"] for name, stage in done.items()]
    report = folder / "report.html"
    notes = [*_headline(evaluation), f"Report: {report.resolve()}"]
    return Summary(
        f"Quickstart: where {total / 60:.1f} minutes went",
        ["stage", "time", "share"],
        rows,
        notes=notes,
        next_command=f"mpo quickstart --seeds 5 --output {folder}-seeds",
    )


def _headline(evaluation: Row) -> list[str]:
    style = evaluation["styles"][0]

    def whole(key: str) -> list[Row]:
        return [row for row in evaluation[key] if row["source"] == "all" and row["style"] == style]

    accuracies = ", ".join(f"{row['model']} {row['accuracy']:.1%}" for row in whole("accuracy"))
    gains = [
        f"{row['model']} - {row['baseline']}: "
        + _points({"mean": 100 * row["difference"], "low": 100 * row["low"], "high": 100 * row["high"]})
        for row in whole("differences")
    ]
    return [f"Accuracy on {evaluation['num_questions']:,} questions over held-out scans: {accuracies}", *gains]


def _run_seeds(config: QuickstartConfig) -> Summary:
    """Runs every seed in a process of its own, some at a time, and takes the mean."""
    folder = Path(config.output)
    jobs = min(config.seeds, config.jobs or os.cpu_count() or 1)
    seeds = range(config.seed, config.seed + config.seeds)
    with tqdm(total=config.seeds, desc="seeds", unit="seed") as bar, ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda seed: _run_seed(config, folder / f"seed-{seed}", seed, jobs), seeds):
            bar.update()
    return _seeds_summary(folder, [folder / f"seed-{seed}" for seed in seeds])


def _run_seed(config: QuickstartConfig, folder: Path, seed: int, jobs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    own = {**asdict(config), "seed": seed, "seeds": 1, "output": str(folder), "further_sft": True}
    settings = [
        word for name, value in own.items() if value != "" for word in (f"--{name}", json.dumps(value).strip('"'))
    ]
    command = [sys.executable, "-m", "mpo", "quickstart", *settings]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    log = folder / LOG
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False, env={**os.environ, "OMP_NUM_THREADS": threads}
        ).returncode
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise InputError(
            f"seed {seed} failed with exit code {code} ({' '.join(last)}); the whole story is in {log}. Its command: "
            f"{shlex.join(command)}"
        )


def _seeds_summary(folder: Path, runs: list[Path]) -> Summary:
    """Accuracy per seed, and the mean gains with 95% intervals over seeds (Student's t)."""
    found = []
    for path in runs:
        evaluation = json.loads((path / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
        whole = [row for row in evaluation["accuracy"] if row["source"] == "all" and row["style"] == "final_answer"]
        found.append({row["model"]: 100 * row["accuracy"] for row in whole})
    gains = {name: [accuracy["MPO"] - accuracy[name] for accuracy in found] for name in ("SFT", "further SFT")}
    rows = [
        [
            path.name,
            *(f"{accuracy[name]:.1f}" for name in ("SFT", "further SFT", "MPO")),
            *(f"{gains[name][i]:+.1f}" for name in gains),
        ]
        for i, (path, accuracy) in enumerate(zip(runs, found, strict=True))
    ]
    means = {name: mean_interval(values) for name, values in gains.items()}
    result = {"accuracy": found, "mean_gain": means, "num_seeds": len(runs)}
    write_text(folder / "seeds.json", json.dumps(result, indent=1) + "\n")
    return Summary(
        f"MPO over {len(runs)} seeds: accuracy in %, reasoning first, on held-out scans",
        ["run", "SFT", "further SFT", "MPO", "MPO - SFT", "MPO - further SFT"],
        rows,
        notes=[
            f"Mean gain of MPO over {name}: {_points(mean)}, intervals over seeds." for name, mean in means.items()
        ],
    )


def _points(mean: Row) -> str:
    low, high = mean["low"], mean["high"]
    return f"{mean['mean']:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95% interval of independent values, by Student's t distribution.

    >>> {name: round(value, 3) for name, value in mean_interval([1.0, 2.0, 3.0]).items()}
    {'mean': 2.0, 'low': -0.484, 'high': 4.484}
    """
    from scipy.stats import t

    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    reach = float(t.ppf(0.975, len(values) - 1)) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach}
