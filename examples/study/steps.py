"""Does one job with the verbs of `mpo`, in this process, and says what came of it: a line of the results.

Folders of a study: `bases/<base>/seed-<n>/` with data, models, pairs and reference log-probabilities, and
`runs/<task>/<method>/<rate>/seed-<n>/` with a trained model. What is finished is not done again.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from data_builders.records import Row
from data_builders.shards import read_rows, read_stage, write_rows
from examples.study.measures import measure_answers
from examples.study.plan import COMPLETE, SFT, Job, Study, base_folder, run_folder
from examples.study.tasks import write_base
from mpo.cli import run_verb
from mpo.stages import Stage, run_stages

_LOGGED = ("step", "loss", "rewards/margins", "rewards/chosen", "rewards/accuracies", "reward_shift", "num_tokens")
_PACKAGES = ("torch", "transformers", "trl")


def run_job(study: Study, job: Job, output: Path, command: str) -> Row:
    """Does a job.

    Args:
        study: What it belongs to.
        job: With its learning rate, if it has one.
        output: Folder of the whole study.
        command: How the study was started, for the record.

    Returns:
        One line of the results.
    """
    start = time.perf_counter()
    work = {"base": _base, "train": _train, "test": _test}[job.kind]
    found = work(study, job, output)
    seconds = round(time.perf_counter() - start, 1)
    return {**asdict(job), **_rounded(found), "seconds": seconds, **_origin(), "command": command}


def _rounded(found: Row) -> Row:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


@cache
def _origin() -> Row:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"versions": {name: version(name) for name in _PACKAGES}, "commit": git.stdout.strip()}


def _values(*settings: Row) -> dict[str, str]:
    """Settings as a verb's command line has them; later ones win."""
    merged = {name: value for part in settings for name, value in part.items()}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in merged.items()}


def _stage(name: str, verb: str, *settings: Row) -> Stage:
    return Stage(name, verb, _values(*settings))


def _argv(*settings: Row) -> list[str]:
    return Stage("", settings=_values(*settings)).argv


def _common(folder: Path, seed: int) -> Row:
    return {"image_root": str(folder / "data"), "seed": seed}


def _base(study: Study, job: Job, output: Path) -> Row:
    """Task, SFT, responses, verdicts, pairs, DropoutNTP pairs, and a look at the SFT model."""
    folder, settings, verbs = base_folder(output, job.task, job.seed), study.bases[job.task], study.verbs
    common, model = _common(folder, job.seed), str(folder / "sft")
    at = {name: str(folder / name) for name in ("responses", "open_responses", "verdicts", "pairs")}
    sft = {"model_name_or_path": str(folder / "base"), "data": str(folder / "data" / "sft.jsonl"), "output_dir": model}
    sft["max_steps"] = settings["sft_steps"]
    asked = {"questions": str(folder / "data" / "questions.jsonl"), "output": at["responses"]}
    opened = {"questions": str(folder / "data" / "open.jsonl"), "output": at["open_responses"], "num_responses": 1}
    limit = {"max_per_source": settings["pairs_per_source"], "seed": job.seed, "output": at["pairs"]}
    stages = [
        Stage("task", prepare=lambda: write_base(folder, settings, study.sizes, job.seed)),
        _stage("sft", "sft", verbs["trainer"], verbs["sft"], common, sft),
        _stage("sample", "sample", verbs["sample"], {"model": model}, common, asked),
        _stage("sample open", "sample", verbs["sample"], {"model": model}, common, opened),
        _stage("judge", "judge", verbs["judge"], {"responses": at["responses"], "output": at["verdicts"]}),
        _stage("pair", "pair", verbs["pair"], {"verdicts": at["verdicts"]}, limit),
        *_dropout_stages(study, job.task, folder, common),
    ]
    done = run_stages(stages, folder, run_verb)
    answers = _answers(study, model, folder, "development", folder / "development", job.seed)
    sets = [folder / "pairs", *sorted(folder.glob("ntp-*.jsonl"))]
    pairs = {path.stem: sum(1 for _ in read_stage(path)) for path in sets}
    (folder / COMPLETE).touch()
    return {**measure_answers(answers), "pairs": pairs, "stages": {k: round(v["seconds"], 1) for k, v in done.items()}}


def _dropout_stages(study: Study, base: str, folder: Path, common: Row) -> Iterable[Stage]:
    """Each set of pairs that a method of this base adds is made whole, then cut to the same number."""
    num, model = study.bases[base]["ntp_pairs"], str(folder / "sft")
    tasks = [task for task in study.tasks.values() if task["base"] == base]
    methods = [study.methods[method] for task in tasks for method in task["methods"]]
    for kept, own in {_ntp_file(folder, method): method["ntp"] for method in methods if "ntp" in method}.items():
        made = folder / "made" / kept.stem
        paths = {"model": model, "responses": str(folder / "open_responses"), "output": str(made)}
        yield _stage(kept.stem, "dropout-ntp", study.verbs["dropout-ntp"], common, own, paths)
        yield Stage(f"cut {kept.stem}", prepare=lambda m=made, k=kept: write_rows(k, islice(read_stage(m), num)))


def _ntp_file(folder: Path, method: Row) -> Path:
    """Where the pairs lie that a method adds."""
    suffix = "-with-image" if method["ntp"].get("with_image") else ""
    return folder / f"ntp-{method['ntp']['ratio']}{suffix}.jsonl"


def _answers(study: Study, model: str, folder: Path, split: str, into: Path, seed: int) -> list[Row]:
    """Greedy answers to the questions of a split; their pictures lie in the base's folder."""
    asked = {"models": json.dumps([f"model={model}"]), "questions": str(folder / "data" / f"{split}.jsonl")}
    run_verb("eval", _argv(study.verbs["eval"], _common(folder, seed), asked, {"output": str(into)}))
    rows = list(read_rows(into / "answers.jsonl"))
    shutil.rmtree(into)  # what is needed of it goes into the results
    return rows


def _train(study: Study, job: Job, output: Path) -> Row:
    folder, run = base_folder(output, study.tasks[job.task]["base"], job.seed), run_folder(output, job)
    start, model = time.perf_counter(), run / "model"
    _make_model(study, job, output)
    trained = time.perf_counter()
    found = {**_history(model), "train_seconds": round(trained - start, 1)}
    if job.seed in study.tuning_seeds:
        answers = _answers(study, str(model), folder, "development", run / "development", job.seed)
        found |= measure_answers(answers)
    if (run / "first").exists():  # the first of two rounds
        before = _history(run / "first")
        found |= {name: found[name] + before[name] for name in ("steps", "tokens")}
    return found


def _make_model(study: Study, job: Job, output: Path) -> None:
    task, method = study.tasks[job.task], study.methods[job.method]
    folder, run = base_folder(output, task["base"], job.seed), run_folder(output, job)
    shutil.rmtree(run, ignore_errors=True)  # one that was killed starts again: it takes seconds
    model = run / "model"
    settings = {"train": task["train"], "learning_rate": job.rate, **_common(folder, job.seed)}
    if method.get("verb") == "sft":
        _further_sft(study, folder, model, settings)
    elif method.get("rounds") == 2:
        _two_rounds(study, folder, run, settings, task["base"])
    else:
        _preferences(
            study, folder, folder / "sft", model, settings, _pairs_of(folder, method), method.get("train", {})
        )


def _pairs_of(folder: Path, method: Row) -> list[Path]:
    return [folder / "pairs", *([_ntp_file(folder, method)] if "ntp" in method else [])]


def _num_steps(study: Study, pairs: Path) -> int:
    """Optimizer steps that `mpo train` takes on pairs."""
    train = study.verbs["train"]
    batches = -(-sum(1 for _ in read_stage(pairs)) // train["per_device_train_batch_size"])
    return batches * train["num_train_epochs"]


def _further_sft(study: Study, folder: Path, model: Path, settings: Row) -> None:
    """SFT goes on with as many steps of as many rows as MPO takes pairs."""
    batch = {name: study.verbs["train"][name] for name in ("per_device_train_batch_size", "logging_steps")}
    own = {"model_name_or_path": str(folder / "sft"), "data": str(folder / "data" / "sft.jsonl")}
    own |= {"max_steps": _num_steps(study, folder / "pairs"), "warmup_steps": 0.03, "output_dir": str(model)}
    run_verb("sft", _argv(study.verbs["trainer"], batch, settings, own))


def _preferences(
    study: Study, folder: Path, start: Path, model: Path, settings: Row, pairs: list[Path], own: Row
) -> None:
    """`mpo train`; the reference, unless it moves, is looked up: all rates and most methods share it."""
    kept = {} if own.get("sync_ref_model") else {"precompute_ref_log_probs": True}
    kept |= {"ref_logps_dir": str(folder / "reference")} if kept else {}
    paths = {"model_name_or_path": str(start), "data": [str(path) for path in pairs], "output_dir": str(model)}
    run_verb("train", _argv(study.verbs["trainer"], study.verbs["train"], kept, settings, paths, own))


def _two_rounds(study: Study, folder: Path, run: Path, settings: Row, base: str) -> None:
    """Half of the steps on the shared pairs, then as many pairs from the model that came out, on other questions."""
    verbs, half, first = study.verbs, _num_steps(study, folder / "pairs") // 2, run / "first"
    common = _common(folder, settings["seed"])
    _preferences(study, folder, folder / "sft", first, settings, [folder / "pairs"], {"max_steps": half})
    asked = {"model": str(first), "questions": str(folder / "data" / "second.jsonl"), "output": str(run / "responses")}
    run_verb("sample", _argv(verbs["sample"], common, asked))
    run_verb("judge", _argv(verbs["judge"], {"responses": asked["output"], "output": str(run / "verdicts")}))
    limit = {"max_per_source": study.bases[base]["pairs_per_source"] // 2, "seed": settings["seed"]}
    run_verb("pair", _argv(verbs["pair"], limit, {"verdicts": str(run / "verdicts"), "output": str(run / "pairs")}))
    _preferences(study, run, first, run / "model", settings, [run / "pairs"], {})


def _history(model: Path) -> Row:
    """Steps, tokens and the learning curve of a run."""
    log = json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    entries = [entry for entry in log if "loss" in entry]
    curve = {name: [round(float(entry[name]), 4) for entry in entries] for name in _LOGGED if name in entries[-1]}
    return {"steps": entries[-1]["step"], "tokens": int(float(entries[-1].get("num_tokens", 0))), "curve": curve}


def _test(study: Study, job: Job, output: Path) -> Row:
    """The one look at the test scans; the learning rate is the chosen one."""
    folder = base_folder(output, study.tasks[job.task]["base"], job.seed)
    model = folder / "sft" if job.method == SFT else run_folder(output, job) / "model"
    if not (model / "trainer_state.json").exists():  # it has a line from elsewhere
        _make_model(study, job, output)
    into = output / "tests" / job.task / job.method / f"seed-{job.seed}"
    shutil.rmtree(into, ignore_errors=True)
    return measure_answers(_answers(study, str(model), folder, "test", into, job.seed))
