"""What the study runs, in which order, and which learning rate a method ends up with. Pure functions of the YAML.

Every method of a task tries the same learning rates with the tuning seeds, on development scans; the rate with the
best mean accuracy is then taken for all seeds. Runs come in an order in which stopping leaves whole comparisons.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from data_builders.records import InputError, Row

SFT = "sft"  # the model that every method starts from, as a method
COMPLETE = "complete"  # marks the folder of a base that is whole


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        kind: `base` makes what all methods of a seed share, `train` trains and looks at development scans, `test`
            looks at test scans.
        task: Name of the task; of a base for `base`.
        seed: Of everything that is drawn.
        method: What is trained; `SFT` is the model before.
        rate: Learning rate; None is the chosen one.
    """

    kind: Literal["base", "train", "test"]
    task: str
    seed: int
    method: str = ""
    rate: float | None = None


Records = dict[Job, Row]  # lines of the results


@dataclass(frozen=True)
class Study:
    """The YAML file.

    Attributes:
        seeds: All of them.
        tuning_seeds: Those that learning rates are chosen with.
        replication_seeds: Those that were begun when everything else was settled.
        bases: What is shared by the methods of a seed.
        tasks: Base, parts that are trained, learning rates and methods of each task.
        methods: What each method changes.
        verbs: Settings of the verbs that hold for all.
        claims: What is tested, in the order of the report.
        sizes: Numbers of questions to look at.
    """

    seeds: list[int]
    tuning_seeds: list[int]
    replication_seeds: list[int]
    bases: dict[str, Row]
    tasks: dict[str, Row]
    methods: dict[str, Row]
    verbs: dict[str, Row]
    claims: list[Row]
    sizes: dict[str, int]

    def tuned(self, task: str) -> list[str]:
        """Methods of a task with a learning rate of their own, the most important first."""
        return [name for name in self.tasks[task]["methods"] if "rate_of" not in self.methods[name]]

    def name(self, method: str) -> str:
        """How tables call a method."""
        return "SFT" if method == SFT else self.methods[method]["name"]


def read_study(path: Path) -> Study:
    """The study that a YAML file describes.

    With `like` it is another file's, changed: mappings are merged, null takes an entry out, and claims about what is
    no longer run go too.

    Raises:
        InputError: A task or claim names what is not there.
    """
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    like = values.pop("like", None)
    if like:
        values = _merged(yaml.safe_load((path.parent / like).read_text(encoding="utf-8")), values)
    sizes = {name: values.pop(f"{name}_questions") for name in ("development", "test")}
    study = Study(**values, sizes=sizes)
    for task, settings in study.tasks.items():
        unknown = [name for name in settings["methods"] if name not in study.methods]
        if unknown or settings["base"] not in study.bases:
            raise InputError(f"{path}: task {task!r} names {unknown or settings['base']!r}, which is not described.")
    claims = [claim for claim in study.claims if not _missing(study, claim)]
    if len(claims) < len(study.claims) and not like:
        raise InputError(f"{path}: a claim compares what its task does not run.")
    return replace(study, claims=claims)


def _merged(values: Any, changes: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(changes, dict):
        return changes
    merged = {**values, **{name: _merged(values.get(name), change) for name, change in changes.items()}}
    return {name: value for name, value in merged.items() if name not in changes or value is not None}


def _missing(study: Study, claim: Row) -> bool:
    if claim["task"] not in study.tasks:
        return True
    return not {claim["better"], claim["worse"]} <= {SFT, *study.tasks[claim["task"]]["methods"]}


def plan(study: Study) -> list[Job]:
    """All jobs before the test scans are read: method by method, so that stopping leaves whole comparisons."""
    others = [seed for seed in study.seeds if seed not in study.tuning_seeds]
    jobs: list[Job] = []
    for task, settings in study.tasks.items():
        for method in settings["methods"]:
            tuned = "rate_of" not in study.methods[method]
            jobs += [Job("base", settings["base"], seed) for seed in study.tuning_seeds]
            rates = settings["learning_rates"] if tuned else []
            jobs += [Job("train", task, seed, method, rate) for rate in rates for seed in study.tuning_seeds]
            jobs += [Job("base", settings["base"], seed) for seed in others]
            jobs += [Job("train", task, seed, method) for seed in (others if tuned else study.seeds)]
    return list(dict.fromkeys(jobs))  # bases stand where they are needed first


def final_jobs(study: Study, records: Records) -> list[Job]:
    """A look at the test scans, seed by seed, for every method that was trained with all seeds at its chosen rate."""
    ready = []
    for task, settings in study.tasks.items():
        for method in (SFT, *settings["methods"]):
            rate = chosen_rate(study, records, task, method)
            needed = [Job("train", task, seed, method, rate) for seed in study.seeds]
            if method == SFT:
                needed = [Job("base", settings["base"], seed) for seed in study.seeds]
            if all(job in records for job in needed):
                ready.append((task, method))
    return [Job("test", task, seed, method) for seed in study.seeds for task, method in ready]


def lost_bases(study: Study, jobs: Iterable[Job], records: Records, output: Path) -> list[Job]:
    """Bases that have a line, from elsewhere, and no whole folder here, as far as open jobs start from them."""
    opened = [job for job in jobs if job.kind != "base" and with_rate(study, job, records) not in records]
    bases = dict.fromkeys(Job("base", study.tasks[job.task]["base"], job.seed) for job in opened)
    return [
        job for job in bases if job in records and not (base_folder(output, job.task, job.seed) / COMPLETE).exists()
    ]


def base_folder(output: Path, base: str, seed: int) -> Path:
    """Where a base lies."""
    return output / "bases" / base / f"seed-{seed}"


def run_folder(output: Path, job: Job) -> Path:
    """Where a job with a learning rate leaves its model."""
    return output / "runs" / job.task / job.method / f"{job.rate:g}" / f"seed-{job.seed}"


def with_rate(study: Study, job: Job, records: Records) -> Job | None:
    """The job with its rate; None while the rate is not chosen yet."""
    if job.kind == "base" or job.rate is not None:
        return job
    rate = chosen_rate(study, records, job.task, job.method)
    return None if rate is None else replace(job, rate=rate)


def by_job(rows: Iterable[Row]) -> Records:
    """Lines of the results by the job that they came of."""
    return {Job(**{part.name: row[part.name] for part in fields(Job)}): row for row in rows}


def chosen_rate(study: Study, records: Records, task: str, method: str) -> float | None:
    """The rate with the best mean development accuracy, CoT and Direct alike; None while runs are missing.

    Of equal ones the first is taken. A method with `rate_of` takes a multiple of another one's rate. SFT, which is
    trained no further, has rate 0.
    """
    if method == SFT:
        return 0.0
    settings = study.methods[method]
    if "rate_of" in settings:
        rate = chosen_rate(study, records, task, settings["rate_of"])
        return None if rate is None else rate * settings.get("times", 1.0)
    means = rate_means(study, records, task, method)
    complete = len(means) == len(study.tasks[task]["learning_rates"])
    return max(means, key=lambda rate: means[rate]) if complete else None


def rate_means(study: Study, records: Records, task: str, method: str) -> dict[float, float]:
    """Mean development accuracy of the two prompt styles over the tuning seeds, by learning rate, in %."""
    means = {}
    for rate in study.tasks[task]["learning_rates"]:
        rows = [records.get(Job("train", task, seed, method, rate)) for seed in study.tuning_seeds]
        if None not in rows:
            means[rate] = sum(row["cot"] + row["direct"] for row in rows) / (2 * len(rows))
    return means


def runs(study: Study, records: Records, task: str, method: str) -> list[Row]:
    """The training runs of a method at its chosen rate, by seed."""
    rate = chosen_rate(study, records, task, method)
    jobs = [Job("train", task, seed, method, rate) for seed in study.seeds]
    return [records[job] for job in jobs if job in records]


def tests(study: Study, records: Records, task: str, method: str) -> dict[int, Row]:
    """What the test scans said of a method, by seed."""
    rate = chosen_rate(study, records, task, method)
    jobs = [Job("test", task, seed, method, rate) for seed in study.seeds]
    return {job.seed: records[job] for job in jobs if job in records}
