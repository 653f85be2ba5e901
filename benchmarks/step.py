"""How long a training step takes: `MPOTrainer` against `trl.DPOTrainer` with MPO's three losses.

`python benchmarks/step.py --quick` takes a few minutes on two cores; `--help` lists the rest. In one run, on the same
rows, models and settings, the methods take turns, so that what else a machine does meets all of them:

- `trl`: `trl.DPOTrainer`, pair by pair where there are pictures: 15 pairs are 15 micro-batches of one step.
- `plain`: `MPOTrainer` with `share_prefixes=False`, in the same micro-batches; not for the 15 pairs, which take long.
- `shared`: `MPOTrainer` as it is, in the same micro-batches.
- `grouped`: the same with all pairs of a question in one micro-batch (`group_by_question`).
- `cached`: the last one above, with reference log-probabilities from `precompute_ref_log_probs`.
- `flex`: the last one above with its reference, on FlexAttention (CUDA only).
- `floor`: the tokens of the last one above forward and backward, and forward once more for the reference, with TRL's
  fused head on those that predict a response, and nothing else: causal rows, no mask, no loss, no metrics.

A step is what transformers' loop does between taking batches and the optimizer: `get_batch_samples`, `training_step`
for each micro-batch with the reference's forward in it, and `on_step_end`. Clipping and the optimizer are left out, as
they are the same for all, and so is collation, which workers hide; it is timed on its own. fp32 on a CPU, bf16 on
CUDA. Ratios are medians over rounds, of the times of one round, with their quartiles. On a CPU with glibc, freed
memory is kept, as CUDA's allocator does (`keep_freed_memory`).

Peak memory is what lies in tensors: weights of policy and reference, and the most that two micro-batches of a step
have on top, which is `torch.cuda.max_memory_allocated` on CUDA and torch's profiler on a CPU, where the memory of the
whole process is mostly libraries.
"""

import gc
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr otherwise

import torch
import transformers
import trl
from harness import Task, begin, parser, ratio_of, show, take_turns
from models import HEAD_TILE, LARGE, TOY, Method, Sizes, Workload, workloads
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

FLOOR_TARGET, MEMORY_TARGET = 1.15, 0.85  # at most: step / floor, and memory of a pair / TRL's
ROUNDS, QUICK_ROUNDS = 9, 5


def run(shapes: Sequence[Workload], sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Measures everything.

    Args:
        shapes: Of `models.workloads`.
        sizes: Of the model.
        rounds: Turns of each method.

    Returns:
        `machine`, `workloads` (see `measure`) and `heads` (see `measure_heads`; None without a GPU), as plain values.
    """
    has_gpu = torch.cuda.is_available()
    machine = {
        "processor": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if has_gpu else "float32",
        **{module.__name__: module.__version__ for module in (torch, transformers, trl)},
        "model": sizes._asdict(),
    }
    found = [measure(workload, sizes, rounds=rounds) for workload in shapes]
    heads = measure_heads(sizes, 2 * shapes[0].response, rounds=rounds) if has_gpu else None
    return {"machine": machine, "workloads": found, "heads": heads}


def measure(workload: Workload, sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Times all methods on one workload, turn by turn.

    Args:
        workload: Of `models.workloads`.
        sizes: Of the model.
        rounds: Turns of each method; where a step has many micro-batches a third of them, though not under 3.

    Returns:
        Its `workload`, `shape`, `pairs` and `rounds`; by method, `methods` with medians; and `ratios`.
    """
    rounds = min(rounds, max(3, rounds // 3)) if workload.pairs > 1 else rounds
    with tempfile.TemporaryDirectory() as folder:
        methods = _methods(workload, sizes, Path(folder))
        best = "grouped" if "grouped" in methods else "shared"
        tasks: dict[str, Task] = {name: method.step for name, method in methods.items()}
        tasks["floor"] = methods[best].floor()
        references = {f"{name}'s reference": methods[name].reference_pass for name in ("trl", best)}
        peaks = {name: _memory_of(method) for name, method in methods.items()}  # warms them up, too
        tasks["floor"]()
        times = take_turns(tasks | references, rounds)
        collation = take_turns({name: method.collate for name, method in methods.items()}, 2)
    return {
        "workload": workload.name,
        "shape": f"{workload.prompt:,} + {workload.response:,}",
        "pairs": workload.num_pairs,
        "rounds": rounds,
        "methods": {
            name: {
                "seconds": statistics.median(times[name]),
                "pairs_per_second": workload.num_pairs / statistics.median(times[name]),
                "collation_seconds": min(collation[name]) if name in methods else None,
                "peak_bytes": peaks.get(name),
                "tokens": methods[name].num_tokens() if name in methods else methods[best].num_unique(),
                "micro_batches": len(methods.get(name, methods[best]).batches),
            }
            for name in tasks
        },
        "ratios": _ratios(workload, best, times, peaks),
    }


def _methods(workload: Workload, sizes: Sizes, folder: Path) -> dict[str, Method]:
    names = ("trl", "shared") if workload.pairs > 1 else ("trl", "plain", "shared")
    pairs = dict.fromkeys(names, 1 if workload.pictures else workload.num_pairs)
    if workload.pairs > 1:
        pairs["grouped"] = workload.num_pairs
    last = [*pairs.values()][-1]
    pairs["cached"] = last
    if torch.cuda.is_available() and workload.pictures:
        pairs["flex"] = last
    return {name: Method(name, workload, sizes, size, folder) for name, size in pairs.items()}


def _memory_of(method: Method) -> int:
    """Bytes of both models, and the most that two micro-batches of a step have on top."""
    return method.weight_bytes() + peak_of(lambda: method.step(2))


def peak_of(compute: Task) -> int:
    """Bytes of the tensors that a computation makes, as many as live at the same time at most."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak


def _ratios(workload: Workload, best: str, times: dict[str, list[float]], peaks: dict[str, int]) -> list[dict]:
    """What has a target, and what one may want to know besides."""

    def of_times(what: str, above: str, below: str, **target: float) -> dict[str, Any]:
        return ratio_of(what, [a / b for a, b in zip(times[above], times[below], strict=True)], **target)

    memory_target = {"at_most": MEMORY_TARGET} if workload.name == "pair" else {}
    found = [
        of_times(f"trl / {best}", "trl", best, at_least=workload.target),
        of_times(f"{best} / floor", best, "floor", at_most=FLOOR_TARGET),
        ratio_of(f"peak memory, {best} / trl", [peaks[best] / peaks["trl"]], **memory_target),
        of_times(f"{best} / cached", best, "cached"),
        of_times(f"reference pass, trl / {best}", "trl's reference", f"{best}'s reference"),
    ]
    other = "shared" if best == "grouped" else "plain"
    found.insert(3, of_times(f"trl / {other}", "trl", other))
    if "flex" in times:
        found.append(of_times("SDPA / FlexAttention", best, "flex"))
    return found


def measure_heads(sizes: Sizes, num_tokens: int, *, rounds: int) -> dict[str, Any]:
    """TRL's fused head against Liger's on a GPU: log-probabilities and entropies of tokens, forward and backward.

    Args:
        sizes: Of the model whose head it is.
        num_tokens: That are scored.
        rounds: Turns of each.

    Returns:
        Median seconds of `trl` and `liger`, and their `ratio`.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    options = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(num_tokens, sizes.width, requires_grad=True, **options)
    weight = torch.randn(sizes.vocabulary, sizes.width, **options).mul_(sizes.width**-0.5).requires_grad_()
    labels = torch.randint(sizes.vocabulary, (num_tokens,), device="cuda")

    def score_with_trls() -> None:
        arguments = (hidden, weight, None, labels, 1.0, HEAD_TILE, None, 1.0, ("entropy",))
        ChunkedLogProbFunction.apply(*arguments)[0].sum().backward()

    def score_with_ligers() -> None:
        nll, _ = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, return_entropy=True)
        nll.sum().backward()

    tasks = {"trl": score_with_trls, "liger": score_with_ligers}
    take_turns(tasks, 2)  # compiles the kernels
    times = take_turns(tasks, rounds)
    values = [a / b for a, b in zip(times["trl"], times["liger"], strict=True)]
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {**medians, "ratio": ratio_of(f"TRL's / Liger's, {num_tokens:,} tokens", values)}


def tables(results: dict[str, Any]) -> list[Table]:
    """What came of the targets, and the times that the ratios are of.

    Args:
        results: What `run` returned.
    """
    targets = Table("workload", "ratio", "measured", "quartiles", "target", "met", title="Ratios")
    measured = Table("workload", "method", "micro-batches", "ms", "pairs/s", title="One step")
    for column in ("collation ms", "peak MB", "tokens"):
        measured.add_column(column)
    for result in results["workloads"]:
        name = f"{result['workload']}, {result['shape']}"
        _add_ratios(targets, name, result["ratios"])
        for method, found in result["methods"].items():
            measured.add_row(name, method, *_cells(found))
            name = ""
        measured.add_section()
    if results["heads"]:
        _add_ratios(targets, "head", [results["heads"]["ratio"]])
    else:
        targets.add_row("head", "TRL's / Liger's", "not run: no GPU")
        targets.add_row("attention", "SDPA / FlexAttention", "not run: no GPU")
    return [measured, targets]


def _cells(found: dict[str, Any]) -> list[str]:
    collation, peak = found["collation_seconds"], found["peak_bytes"]
    return [
        str(found["micro_batches"]),
        f"{1000 * found['seconds']:,.0f}",
        f"{found['pairs_per_second']:.2f}",
        "" if collation is None else f"{1000 * collation:,.1f}",
        "" if peak is None else f"{peak / 1e6:,.0f}",
        f"{found['tokens']:,}",
    ]


def _add_ratios(table: Table, name: str, ratios: Sequence[dict[str, Any]]) -> None:
    for ratio in ratios:
        least, most = ratio["at_least"], ratio["at_most"]
        target = f">= {least:g}" if least is not None else f"<= {most:g}" if most is not None else ""
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[ratio["met"]]
        spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        table.add_row(name, ratio["what"], f"{ratio['median']:.2f}", spread, target, met)
        name = ""
    table.add_section()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes the figures where asked."""
    quick = "fewer rounds: under five minutes on two cores"
    options = begin(parser(__doc__, quick, ROUNDS, QUICK_ROUNDS), arguments)
    if torch.cuda.is_available():
        shapes, sizes = [*workloads(1500, 350, 5), workloads(3328, 400, 12)[0]], LARGE
    else:
        shapes, sizes = workloads(512, 128, 1), TOY
    results = run(shapes, sizes, rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS))
    show(results, tables(results), options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
