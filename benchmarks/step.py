"""How long a training step takes: `MPOTrainer` against `trl.DPOTrainer` with MPO's three losses.

`python benchmarks/step.py --quick` takes a few minutes on two cores; `--help` lists the rest. In one run, on the same
rows, models and settings, the methods take turns, so that what else a machine does meets all of them:

- `trl`: `trl.DPOTrainer`, one pair in a micro-batch where there are pictures.
- `plain`: `MPOTrainer` with `share_prefixes=False`, row by row as TRL does.
- `shared`: `MPOTrainer` as it is.
- `grouped`: with all pairs of a question in one micro-batch (`group_by_question`).
- `cached`: as the one above it, with reference log-probabilities from `precompute_ref_log_probs`.
- `flex`: as `shared` on FlexAttention (CUDA).
- `floor`: the shared tokens forward and backward, and forward once more for the reference, with TRL's fused head and
  nothing else: causal rows of as many tokens, no mask, no loss, no metrics.

A step is what transformers' loop does between taking batches and the optimizer: `get_batch_samples`, `training_step`
for each micro-batch with the reference's forward in it, and `on_step_end`. Clipping and the optimizer are left out, as
they are the same for all, and so is collation, which workers hide; it is timed alone. fp32 on a CPU, bf16 on CUDA.
Ratios are medians over rounds, of the times of one round, with their quartiles.

Peak memory is what lies in tensors: weights of policy and reference, and the most that a step has on top, which is
`torch.cuda.max_memory_allocated` on CUDA and torch's profiler on a CPU, where the process as a whole says little.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr otherwise

import datasets
import torch
import transformers
import trl
from accelerate.utils import send_to_device
from models import LARGE, TOY, Sizes, Workload, build, preference_rows, workloads
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from trl import DPOConfig, DPOTrainer

from mpo import MPOConfig, MPOTrainer
from mpo.scores import REF_COLUMNS

FLOOR_TARGET, MEMORY_TARGET = 1.15, 0.85  # at most: step / floor, and memory of a pair / TRL's
LOSS = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
SETTINGS = {
    **LOSS,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": None,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"share_prefixes": False},
    "shared": {},
    "grouped": {"group_by_question": True},
    "cached": {"precompute_ref_log_probs": True},
    "flex": {},
}


class Method:
    """A trainer with its batches of one optimizer step.

    Args:
        name: `trl`, or one of `OPTIONS`.
        workload: What to train on.
        sizes: Of the model.
        pairs: In a micro-batch.
        folder: For what a trainer wants to write.
    """

    def __init__(self, name: str, workload: Workload, sizes: Sizes, pairs: int, folder: Path) -> None:
        self.name = name
        rows = preference_rows(workload, sizes)
        attention = "flex_attention" if name == "flex" else "sdpa"
        kind = {"pictures": bool(workload.pictures), "attention": attention}
        model, processor = build(sizes, seed=0, **kind)
        reference, _ = build(sizes, seed=1, **kind)  # another one, or rewards would be 0
        settings = {
            **SETTINGS,
            **OPTIONS.get(name, {}),
            "use_cpu": not torch.cuda.is_available(),
            "bf16": torch.cuda.is_available(),
            "per_device_train_batch_size": pairs,
            "gradient_accumulation_steps": len(rows) // pairs,
        }
        if name == "cached":
            for column in REF_COLUMNS:
                rows = rows.add_column(column, [-9.0 * workload.response] * len(rows))
        trainer_class, config = (DPOTrainer, DPOConfig) if name == "trl" else (MPOTrainer, MPOConfig)
        self.trainer = trainer_class(
            model=model,
            ref_model=None if name == "cached" else reference,
            args=config(str(folder), **settings),
            train_dataset=rows,
            processing_class=processor,
        )
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1)
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self._starts, self._pairs = range(0, len(rows), pairs), pairs
        self.batches = send_to_device(self.collate(), self.trainer.args.device)

    def collate(self) -> list[dict[str, Tensor]]:
        """The micro-batches, from rows as the data set holds them."""
        rows, collator = self.trainer.train_dataset, self.trainer.data_collator
        return [collator([rows[row] for row in range(start, start + self._pairs)]) for start in self._starts]

    def step(self, num_batches: int | None = None) -> None:
        """One step without its optimizer.

        Args:
            num_batches: Micro-batches of it; None: all.
        """
        trainer, device = self.trainer, self.trainer.args.device
        chosen = self.batches[:num_batches]
        batches, num_items = trainer.get_batch_samples(iter(chosen), len(chosen), device)
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            trainer.training_step(self.model, batch, num_items)
        trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
        self.model.zero_grad()

    def reference_pass(self) -> None:
        """The reference's forward over all micro-batches."""
        for batch in self.batches:
            self.trainer.compute_ref_log_probs(self.trainer.ref_model, batch)

    def floor(self) -> Callable[[], None]:
        """What computes this method's tokens and nothing else, as often as a step does."""
        passes = [self._bare(batch) for batch in self.batches]
        model, reference = self.model, self.trainer.ref_model

        def compute() -> None:
            for inputs in passes:
                with torch.no_grad():
                    reference(**inputs)
                model(**inputs).log_probs.sum().backward()
            model.zero_grad()

        return compute

    def _bare(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Causal rows of a forest's tokens without its padding, as many as it has."""
        ids, labels = batch["input_ids"], batch["shift_labels"]
        real = ids != self.trainer._tokenizer.pad_token_id
        num_tokens = int(real.sum())
        length = -(-num_tokens // len(ids))
        tokens, scored = ids.new_full((len(ids) * length,), 3), labels.new_full((len(ids) * length,), -100)
        tokens[:num_tokens], scored[:num_tokens] = ids[real], labels[real]
        inputs = {"input_ids": tokens.view(-1, length), "shift_labels": scored.view(-1, length)}
        inputs |= {"pixel_values": batch["pixel_values"]} if "pixel_values" in batch else {}
        return {**inputs, "use_cache": False, "fused_lm_head": True}

    def num_tokens(self) -> int:
        """Tokens that the language model computes in a step, padding included."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def num_unique(self) -> int:
        """The same without padding."""
        pad = self.trainer._tokenizer.pad_token_id
        return sum(int((batch["input_ids"] != pad).sum()) for batch in self.batches)

    def peak_memory(self) -> int:
        """Bytes in tensors: weights of both models, and the most that two micro-batches of a step have on top."""
        models = [self.model, self.trainer.ref_model]
        weights = [p for model in models if model is not None for p in model.parameters()]
        return sum(p.numel() * p.element_size() for p in weights) + _peak_of(lambda: self.step(2))


def _peak_of(compute: Callable[[], None]) -> int:
    """Bytes of tensors that live at the same time, at most, of those that a computation makes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak


def measure(workload: Workload, sizes: Sizes, *, rounds: int, warm_up: bool = True) -> dict[str, Any]:
    """Times all methods on one workload, turn by turn.

    Args:
        workload: Of `models.workloads`.
        sizes: Of the model.
        rounds: Turns of each method; long workloads take a third of them.
        warm_up: Whether each takes one step that does not count first.

    Returns:
        `methods`: per method medians of seconds and what else is counted; `ratios`: median, quartiles, target.
    """
    with tempfile.TemporaryDirectory() as folder:
        methods = _methods(workload, sizes, Path(folder))
        best = methods.get("grouped", methods["shared"])
        tasks = {name: method.step for name, method in methods.items()} | {"floor": best.floor()}
        references = {f"{name}_reference": methods[name].reference_pass for name in ("trl", best.name)}
        peaks = {name: method.peak_memory() for name, method in methods.items()}  # which warms up, too
        if warm_up:
            best.floor()()
        rounds = max(2, rounds // 3) if workload.num_pairs > 8 else rounds
        times = _take_turns(tasks | references, rounds)
        collation = _take_turns({name: method.collate for name, method in methods.items()}, 2)
    found = {}
    for name in tasks:
        method = methods.get(name, best)
        seconds = statistics.median(times[name])
        found[name] = {
            "seconds": seconds,
            "pairs_per_second": workload.num_pairs / seconds,
            "collation_seconds": min(collation[name]) if name in collation else None,
            "peak_bytes": peaks.get(name),
            "tokens": method.num_unique() if name == "floor" else method.num_tokens(),
            "micro_batches": len(method.batches),
        }
    return {
        "workload": workload.name,
        "shape": f"{workload.prompt} + {workload.response}",
        "pairs": workload.num_pairs,
        "rounds": rounds,
        "methods": found,
        "ratios": _ratios(workload, best.name, times, peaks),
    }


def _methods(workload: Workload, sizes: Sizes, folder: Path) -> dict[str, Method]:
    """Micro-batches of one pair, of a question's where they are grouped, or of all where there are no pictures."""
    pairs = dict.fromkeys(("trl", "plain", "shared"), 1 if workload.pictures else workload.num_pairs)
    if workload.pairs > 1:
        pairs["grouped"] = workload.num_pairs
    pairs["cached"] = list(pairs.values())[-1]
    if torch.cuda.is_available() and workload.pictures:
        pairs["flex"] = list(pairs.values())[-1]
    return {name: Method(name, workload, sizes, size, folder) for name, size in pairs.items()}


def _take_turns(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each task in each round; every round begins with another task."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    for number in range(rounds):
        first = number % len(order)
        for name in order[first:] + order[:first]:
            _synchronize()
            start = time.perf_counter()
            tasks[name]()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ratios(workload: Workload, best: str, times: dict[str, list[float]], peaks: dict[str, int]) -> list[dict]:
    """Everything that has a target, and what may be asked besides."""

    def ratio(what: str, above: str, below: str, **target: float) -> dict[str, Any]:
        values = [a / b for a, b in zip(times[above], times[below], strict=True)]
        return _ratio(what, values, **target)

    found = [
        ratio(f"trl / {best}", "trl", best, at_least=workload.target),
        ratio(f"{best} / floor", best, "floor", at_most=FLOOR_TARGET),
        _ratio(
            f"peak memory: {best} / trl",
            [peaks[best] / peaks["trl"]],
            **({"at_most": MEMORY_TARGET} if workload.name == "pair" else {}),
        ),
        ratio("trl / plain", "trl", "plain"),
    ]
    found += [ratio("trl / shared, pair by pair", "trl", "shared")] if best == "grouped" else []
    found += [
        ratio(f"{best} / cached reference", best, "cached"),
        ratio(f"reference pass: trl / {best}", "trl_reference", f"{best}_reference"),
    ]
    found += [ratio("SDPA / FlexAttention", best, "flex")] if "flex" in times else []
    return found


def _ratio(
    what: str, values: Sequence[float], at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [median] * 3
    met = None
    if at_least is not None or at_most is not None:
        met = (at_least is None or median >= at_least) and (at_most is None or median <= at_most)
    return {"what": what, "median": median, "low": low, "high": high} | {
        "at_least": at_least,
        "at_most": at_most,
        "met": met,
    }


def measure_heads(sizes: Sizes, num_tokens: int, *, rounds: int) -> dict[str, Any]:
    """TRL's fused head against Liger's: log-probabilities and entropy of as many tokens, forward and backward."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    options = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(num_tokens, sizes.width, requires_grad=True, **options)
    weight = torch.randn(sizes.vocabulary, sizes.width, **options).mul_(0.02).requires_grad_()
    labels = torch.randint(sizes.vocabulary, (num_tokens,), device="cuda")

    def trls() -> None:
        logps, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32_768, None, 1.0, ("entropy",))
        logps.sum().backward()

    def ligers() -> None:
        nll, _ = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, return_entropy=True)
        nll.sum().backward()

    trls(), ligers()
    times = _take_turns({"trl": trls, "liger": ligers}, rounds)
    values = [a / b for a, b in zip(times["trl"], times["liger"], strict=True)]
    return {name: statistics.median(seconds) for name, seconds in times.items()} | {
        "ratio": _ratio(f"{num_tokens:,} tokens: TRL's head / Liger's", values)
    }


def tables(results: dict[str, Any]) -> list[Table]:
    """What was measured, and what came of the targets."""
    measured = Table("workload", "method", "ms", "pairs/s", "collation ms", "peak MB", "tokens", title="One step")
    targets = Table("workload", "ratio", "measured", "quartiles", "target", "met", title="Ratios")
    for result in results["workloads"]:
        name = f"{result['workload']} ({result['shape']})"
        for method, found in result["methods"].items():
            measured.add_row(name, method, *_cells(found))
            name = ""
        measured.add_section()
        _add_ratios(targets, f"{result['workload']} ({result['shape']})", result["ratios"])
    if results["heads"]:
        _add_ratios(targets, "head", [results["heads"]["ratio"]])
    else:
        targets.add_row("head", "TRL's / Liger's", "not run: no GPU", "", "", "")
        targets.add_row("attention", "SDPA / FlexAttention", "not run: no GPU", "", "", "")
    return [measured, targets]


def _cells(found: dict[str, Any]) -> list[str]:
    collation, peak = found["collation_seconds"], found["peak_bytes"]
    return [
        f"{1000 * found['seconds']:,.0f}",
        f"{found['pairs_per_second']:.2f}",
        "" if collation is None else f"{1000 * collation:,.1f}",
        "" if peak is None else f"{peak / 1e6:,.0f}",
        f"{found['tokens']:,}",
    ]


def _add_ratios(table: Table, name: str, ratios: list[dict[str, Any]]) -> None:
    for ratio in ratios:
        least, most = ratio["at_least"], ratio["at_most"]
        target = f">= {least:g}" if least is not None else f"<= {most:g}" if most is not None else ""
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[ratio["met"]]
        spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        table.add_row(name, ratio["what"], f"{ratio['median']:.2f}", spread, target, met)
        name = ""
    table.add_section()


def run(all_workloads: Sequence[Workload], sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Measures everything.

    Args:
        all_workloads: Of `models.workloads`.
        sizes: Of the model.
        rounds: Turns of each method.

    Returns:
        `machine`, `workloads` and `heads`, as plain values.
    """
    has_gpu = torch.cuda.is_available()
    machine = {
        "processor": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if has_gpu else "float32",
        **{module.__name__: module.__version__ for module in (torch, transformers, trl)},
        "model": sizes._asdict(),
    }
    found = [measure(workload, sizes, rounds=rounds) for workload in all_workloads]
    heads = measure_heads(sizes, 2 * all_workloads[0].response, rounds=rounds) if has_gpu else None
    return {"machine": machine, "workloads": found, "heads": heads}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under five minutes on two cores")
    parser.add_argument("--rounds", type=int, help="turns of each method (default 9; with --quick 5)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: what torch uses)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    if torch.cuda.is_available():
        shapes = [*workloads(1500, 350, 5), workloads(3328, 400, 12)[0]]
        sizes = LARGE
    else:
        shapes, sizes = workloads(512, 128, 1), TOY
    results = run(shapes, sizes, rounds=options.rounds or (5 if options.quick else 9))
    console = Console()
    console.print(results["machine"])
    console.print(*tables(results), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
