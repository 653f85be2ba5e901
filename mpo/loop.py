"""`mpo loop`: rounds of sample, judge, pair and train, each from the model of the round before.

The reference of a round is the model that it starts from. Every round is evaluated on the same questions. What is done
is not done again, so a loop that was stopped goes on in the middle of a round.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_builders.records import InputError, Row, Summary
from data_builders.shards import read_rows, read_stage, write_text
from mpo.measures import ALL, compare
from mpo.stages import RunVerb, Stage, run_stages

START = "start"


@dataclass(kw_only=True)
class LoopConfig:
    """Settings of `mpo loop`; those of each step stand in files of their own."""

    model: str = field(metadata={"help": "Model folder or Hub name that the first round starts from."})
    questions: str = field(metadata={"help": "Questions: a JSONL file or a folder of shards."})
    output: str = field(metadata={"help": "Folder for everything the loop writes: round-1/, round-2/, ..."})
    configs: str = field(
        metadata={
            "help": "Folder of settings: train.yaml, and if need be sample.yaml, judge.yaml, pair.yaml, eval.yaml and "
            "dropout_ntp.yaml, which adds its pairs. Models, data and folders are the loop's."
        }
    )
    rounds: int = field(default=2, metadata={"help": "How many."})
    image_root: str = field(default=".", metadata={"help": "Folder that image paths are relative to."})
    eval_questions: str | None = field(
        default=None, metadata={"help": "Questions with answers that every round is measured on; null measures none."}
    )
    seed: int = field(default=0, metadata={"help": "Of sampling and training; each round takes the next one."})


CONFIGS = (LoopConfig,)


def run(config: LoopConfig, *, run_verb: RunVerb) -> Summary:
    """Runs what is not done yet.

    Args:
        config: The settings.
        run_verb: Runs another verb in this process, as the command line would.

    Raises:
        InputError: A setting is wrong, or the output folder was made with other settings.
    """
    if config.rounds < 1:
        raise InputError(f"`rounds` must be at least 1, got {config.rounds}.")
    if not (Path(config.configs) / "train.yaml").is_file():
        raise InputError(f"`configs` {config.configs} holds no train.yaml: it says how each round is trained.")
    run_stages(_stages(config), Path(config.output), run_verb)
    return _summary(config)


def _stages(config: LoopConfig) -> Iterator[Stage]:
    """All rounds, step by step; the names of done ones stay when `rounds` grows."""
    model = config.model
    if config.eval_questions:
        yield _stage(config, f"{START}/eval", "eval", {"models": json.dumps([f"{START}={model}"])})
    for number in range(1, config.rounds + 1):
        yield from _round(config, number, model)
        model = str(Path(config.output) / f"round-{number}" / "model")
    if config.eval_questions:
        names = [START, *(f"round-{number}" for number in range(1, config.rounds + 1))]
        yield Stage(f"compare {config.rounds} rounds", prepare=partial(_compare, config, names))


def _round(config: LoopConfig, number: int, model: str) -> Iterator[Stage]:
    name = f"round-{number}"
    at = {path.name: str(path) for path in (Path(config.output) / name / folder for folder in _FOLDERS)}
    stage, seed = partial(_stage, config), {"seed": str(config.seed + number)}
    asking = {"model": model, "image_root": config.image_root, **seed}
    data = [at["pairs"]]
    yield stage(f"{name}/sample", "sample", {**asking, "questions": config.questions, "output": at["responses"]})
    yield stage(f"{name}/judge", "judge", {"responses": at["responses"], "output": at["verdicts"]})
    yield stage(f"{name}/pair", "pair", {"verdicts": at["verdicts"], **seed, "output": at["pairs"]})
    if (Path(config.configs) / "dropout_ntp.yaml").is_file():
        data.append(at["dropout_ntp"])
        continuing = {**asking, "responses": at["responses"], "output": at["dropout_ntp"]}
        yield stage(f"{name}/dropout_ntp", "dropout-ntp", continuing)
    training = {"model_name_or_path": model, "data": json.dumps(data), "image_root": config.image_root, **seed}
    yield stage(f"{name}/train", "train", {**training, "output_dir": at["model"]})
    if config.eval_questions:
        yield stage(f"{name}/eval", "eval", {"models": json.dumps([f"{name}={at['model']}"])})


_FOLDERS = ("responses", "verdicts", "pairs", "dropout_ntp", "model")


def _stage(config: LoopConfig, name: str, verb: str, settings: dict[str, str]) -> Stage:
    if verb == "eval":
        output = str(Path(config.output) / name.split("/")[0] / "evaluation")
        settings |= {"questions": str(config.eval_questions), "image_root": config.image_root, "output": output}
    file = Path(config.configs) / f"{verb.replace('-', '_')}.yaml"
    return Stage(name, verb, settings, config=file if file.is_file() else None)


def _compare(config: LoopConfig, names: list[str]) -> None:
    """Writes the evaluation of all rounds together, each compared with the model that the loop started from."""
    folders = [Path(config.output) / name / "evaluation" for name in names]
    answers = [row for folder in folders for row in read_rows(folder / "answers.jsonl")]
    styles = list(dict.fromkeys(row["style"] for row in answers))
    evaluation = compare(answers, names, styles, seed=config.seed)
    write_text(Path(config.output) / "evaluation" / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")


def _summary(config: LoopConfig) -> Summary:
    output = Path(config.output)
    columns, rows = ["round", "pairs"], [[START, ""]]
    rows += [[f"{n}", f"{_num_pairs(output / f'round-{n}'):,}"] for n in range(1, config.rounds + 1)]
    last = output / f"round-{config.rounds}" / "model"
    command = f"mpo export --model {last} --output exported"
    if config.eval_questions:
        evaluation = json.loads((output / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
        for style in evaluation["styles"]:
            columns += [style, f"{style}, gain"]
            for row, cells in zip(rows, _cells(evaluation, style), strict=True):
                row += cells
    return Summary(f"{config.rounds} rounds; accuracy in %", columns, rows, next_command=command)


def _cells(evaluation: Row, style: str) -> Iterator[list[str]]:
    """Accuracy of each round and its gain over the start, with the 95% interval."""
    gains = {
        row["model"]: f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        for row in evaluation["differences"]
        if (row["style"], row["source"]) == (style, ALL)
    }
    for row in evaluation["accuracy"]:
        if (row["style"], row["source"]) == (style, ALL):
            yield [f"{100 * row['accuracy']:.1f}", gains.get(row["model"], "")]


def _num_pairs(folder: Path) -> int:
    found = [path for path in (folder / "pairs", folder / "dropout_ntp") if path.is_dir()]
    return sum(1 for path in found for _ in read_stage(path))
