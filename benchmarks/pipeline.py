"""How many rows a second `mpo judge` and `mpo pair` take on one core, and how time and memory grow with the rows.

`python benchmarks/pipeline.py --quick` takes a few minutes; `--help` lists the rest. The rows are made up: 32
responses to a question, about 1 KB each as JSON, with answers of five kinds (numbers, choices, yes or no, formulas,
words); some are cut off or have no final answer. Each measurement is a process of its own, which reads its input from
disk and writes its output there; imports are not timed, but count as memory.

The peer is scoring and pairing as the pipeline released with MMPR does it, written for this benchmark: all rows in a
list, the answer behind a marker or else the whole text, compared by substrings and `float`; all pairs of a question
whose rejected answer does not hold the chosen one, of which `random.sample` takes 15. It checks no row, counts no
drop, resumes nothing and judges some answers wrongly: the ratio says what all that costs. Ratios are medians over
rounds, in which both take turns, with their quartiles; above 1 the peer is slower.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from harness import parser, ratio_of, show
from rich.table import Table

from data_builders.judge import JudgeConfig
from data_builders.judge import run as judge
from data_builders.pair import PairConfig
from data_builders.pair import run as pair
from data_builders.records import Row

SIZES, ROUNDS, QUICK_ROUNDS = (10_000, 100_000, 1_000_000), 9, 5  # the ratios are measured at the first size
RESPONSES, MAX_PAIRS = 32, 15
MEMORY_TARGET = 2**30  # bytes, for the pairs of a million responses
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`
_PHRASES = (
    "we see that the chart shows a bar",
    "of height about x and so it follows",
    "that the angle at the corner is equal to",
    "the sum of the two other angles",
    "from the picture on the left",
    "which has more red cats than blue dogs",
    "as is written near the table",
)


def rows(num: int, seed: int = 0) -> Iterator[Row]:
    """Verdict rows, `RESPONSES` for each question; the same for the same seed.

    Args:
        num: How many.
        seed: Of the texts.
    """
    generator = random.Random(seed)
    sentences = [" ".join(generator.choices(_PHRASES, k=2)).capitalize() + f" ({place})." for place in range(2000)]
    for index in range(num):
        number, sample = divmod(index, RESPONSES)
        if not sample:
            question, answer, others = _question(number, generator)
            skill = generator.random()
        outcome = generator.random()
        is_right = outcome < skill
        ending = "Final answer: " + (answer if is_right else generator.choice(others))
        is_cut, is_unreadable = outcome > 0.96, 0.92 < outcome <= 0.96
        text = " ".join(generator.choices(sentences, k=generator.randint(4, 14)))
        yield {
            "id": f"question-{number:07d}",
            "images": [f"images/{number % 1000:03d}/{number:07d}.png"],
            "question": question,
            "answer": answer,
            "source": f"source-{number % 5}",
            "prompt": f"{question}\nThink step by step, then end with one line `Final answer: ` and the answer.",
            "response": text if is_cut or is_unreadable else f"{text}\n{ending}",
            "finish_reason": "length" if is_cut else "stop",
            "sampler": {"model": "some-vlm-8b", "prompt": "final_answer@1", "temperature": 1.0, "index": sample},
            "verdict": "no_answer" if is_cut or is_unreadable else "correct" if is_right else "wrong",
            "prediction": None if is_cut or is_unreadable else ending.removeprefix("Final answer: "),
            "rule": "made up",
        }


def _question(number: int, generator: random.Random) -> tuple[str, str, list[str]]:
    """A question, its answer, and wrong ones."""
    value = generator.randint(3, 2000)
    match number % 5:
        case 0:
            return f"How high is bar {number}?", f"{value:,}", [f"{value + 1:,}", str(value * 2), "about 7"]
        case 1:
            options = "\n".join(f"{letter}. {value + place} apples" for place, letter in enumerate("ABCD"))
            return f"How many apples are in row {number}?\n{options}", "B", ["A", "(C)", "D. the last one"]
        case 2:
            return f"Is the cat left of dog {number}?", "yes", ["no", "No, it is not"]
        case 3:
            right, wrong = rf"\frac{{{value}}}{{7}}", [rf"\frac{{{value}}}{{9}}", rf"\sqrt{{{value}}}", "x + 1"]
            return f"What is the area of triangle {number}?", right, wrong
        case _:
            return f"What is on table {number}?", "red bicycle", ["blue bicycle", "a bicycle", "nothing"]


def score_as_released(source: Path, output: Path) -> None:
    """The peer's `judge`: a list of all rows, and the answers compared as text."""
    with source.open(encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    for row in found:
        row["prediction"] = _extract(row["response"])
        row["verdict"] = "correct" if _matches(row["prediction"], row["answer"]) else "wrong"
    _write(output, found)


def _extract(response: str) -> str:
    for marker in ("Final answer:", "Answer:", r"\boxed{"):
        if marker in response:
            return response.split(marker)[-1].strip().rstrip("}.")
    return response


def _matches(prediction: str, answer: str) -> bool:
    prediction, answer = prediction.strip().lower(), answer.strip().lower()
    if prediction == answer:
        return True
    if len(answer) == 1:
        return prediction[:1] == answer or f"({answer})" in prediction
    try:
        return abs(float(prediction.replace(",", "")) - float(answer.replace(",", ""))) < 1e-6
    except ValueError:
        return answer in prediction


def pair_as_released(source: Path, output: Path) -> None:
    """The peer's `pair`: a list of all rows, and all pairs of a question before some are drawn."""
    groups: dict[str, list[Row]] = {}
    with source.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            groups.setdefault(str((row["images"], row["question"], row["answer"])), []).append(row)
    generator, pairs = random.Random(0), []
    for group in groups.values():
        good = [row for row in group if row["verdict"] == "correct"]
        bad = [row for row in group if row["verdict"] != "correct"]
        found = [(a, b) for a, b in product(good, bad) if (a["prediction"] or "") not in (b["prediction"] or "")]
        pairs += generator.sample(found, min(MAX_PAIRS, len(found)))
    keys = {"image": "images", "question": "prompt", "answer_gt": "answer"}
    shared = [{new: a[old] for new, old in keys.items()} for a, _ in pairs]
    texts = ({"chosen": a["response"], "rejected": b["response"]} for a, b in pairs)
    _write(output, [row | text for row, text in zip(shared, texts, strict=True)])


def _write(folder: Path, found: Sequence[Row]) -> None:
    folder.mkdir()
    with (folder / "all.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


TASKS: dict[str, Callable[[Path, Path], object]] = {
    "judge": lambda source, output: judge(JudgeConfig(responses=str(source), output=str(output))),
    "judge, peer": score_as_released,
    "pair": lambda source, output: pair(PairConfig(verdicts=str(source), output=str(output))),
    "pair, peer": pair_as_released,
}


def run(sizes: Sequence[int], *, rounds: int) -> dict[str, Any]:
    """Measures everything.

    Args:
        sizes: Numbers of rows, from small to large; the ratios are of the first.
        rounds: Turns of each task there.

    Returns:
        `machine`; `growth`, by size and task (see `measure`); `ratios` of the peer to ours. Plain values.
    """
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "verdicts.jsonl"
        _write_rows(source, sizes[0])
        found = take_turns(source, rounds)
        growth = [{"rows": sizes[0], "bytes": source.stat().st_size, "tasks": _medians(found)}]
        for size in sizes[1:]:
            _write_rows(source, size)
            tasks = {task: measure(task, source) for task in TASKS}
            growth.append({"rows": size, "bytes": source.stat().st_size, "tasks": tasks})
    ratios = [
        ratio_of(f"{verb}, peer / ours", _quotients(found[f"{verb}, peer"], found[verb])) for verb in ("judge", "pair")
    ]
    return {"machine": machine, "rounds": rounds, "growth": growth, "ratios": ratios}


def take_turns(source: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Measurements of each task in each round; every round begins with another task."""
    found: dict[str, list[dict[str, float]]] = {task: [] for task in TASKS}
    order = list(TASKS)
    for number in range(rounds):
        first = number % len(order)
        for task in order[first:] + order[:first]:
            found[task].append(measure(task, source))
    return found


def measure(task: str, source: Path) -> dict[str, float]:
    """Runs a task in a process of its own.

    Args:
        task: Of `TASKS`.
        source: Its rows; what it makes is written beside them and removed.

    Returns:
        `seconds` without imports and `peak_bytes` of the whole process.
    """
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, __file__, "--task", task, str(source), str(Path(folder) / "out")]
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _run_task(task: str, source: Path, output: Path) -> None:
    """What the process of `measure` does."""
    start = time.perf_counter()
    TASKS[task](source, output)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def _write_rows(path: Path, num: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(num))


def _medians(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    names = ("seconds", "peak_bytes")
    return {task: {name: statistics.median(t[name] for t in turns) for name in names} for task, turns in found.items()}


def _quotients(above: Sequence[dict[str, float]], below: Sequence[dict[str, float]]) -> list[float]:
    return [a["seconds"] / b["seconds"] for a, b in zip(above, below, strict=True)]


def tables(results: dict[str, Any]) -> list[Table]:
    """How time and memory grow, and how the peer compares.

    Args:
        results: What `run` returned.
    """
    growth = Table("rows", "MB", "task", "seconds", "rows/s", "peak MB", "under 1 GiB", title="One process")
    for step in results["growth"]:
        name = [f"{step['rows']:,}", f"{step['bytes'] / 1e6:,.0f}"]
        for task, found in step["tasks"].items():
            speed, fits = step["rows"] / found["seconds"], found["peak_bytes"] < MEMORY_TARGET
            cells = [f"{found['seconds']:,.2f}", f"{speed:,.0f}", f"{found['peak_bytes'] / 1e6:,.0f}"]
            growth.add_row(*name, task, *cells, "[green]yes[/]" if fits else "[red]no[/]")
            name = ["", ""]
        growth.add_section()
    title = f"{results['growth'][0]['rows']:,} rows, {results['rounds']} rounds"
    ratios = Table("ratio of times", "measured", "quartiles", title=title)
    for ratio in results["ratios"]:
        ratios.add_row(ratio["what"], f"{ratio['median']:.2f}", f"{ratio['low']:.2f} to {ratio['high']:.2f}")
    return [growth, ratios]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes the figures where asked."""
    quick = f"fewer rounds, and up to {SIZES[1]:,} rows only"
    arguments_of = parser(__doc__, quick, ROUNDS, QUICK_ROUNDS)
    arguments_of.add_argument("--task", nargs=3, metavar=("TASK", "ROWS", "OUTPUT"), help=argparse.SUPPRESS)
    options = arguments_of.parse_args(arguments)
    if options.task:
        task, source, output = options.task
        _run_task(task, Path(source), Path(output))
        return
    sizes = SIZES[:2] if options.quick else SIZES
    results = run(sizes, rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS))
    show(results, tables(results), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
