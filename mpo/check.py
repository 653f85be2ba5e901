"""`mpo check`: what a run will take and what is wrong with it, before a GPU is touched and without weights.

Takes the settings of `mpo train` from the same file. Exit code 1 says that something would stop or spoil the run.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub import constants
from trl import ModelConfig

from data_builders.records import InputError, Row, Summary
from data_builders.shards import write_text
from mpo.config import MPOConfig
from mpo.models import PARTS
from mpo.planning.footprint import estimate_flops
from mpo.planning.placement import PEAK_TFLOPS
from mpo.planning.plan import AS_THEY_COME, BY_QUESTION, Plan, Target, make_plan, read_run
from mpo.training import StageConfig

GIB = 2**30
_SHARES = (50, 90, 99, 100)  # percentiles


@dataclass
class CheckConfig:
    """Settings of `mpo check` besides those of `mpo train`."""

    gpus: int = field(default=1, metadata={"help": "GPUs that the run is meant for, over all machines."})
    gpu_memory: float = field(default=80.0, metadata={"help": "GiB of each."})
    gpu: str = field(default="h100", metadata={"help": f"For the hours: {', '.join(PEAK_TFLOPS)}."})
    mfu: float = field(
        default=0.35,
        metadata={"help": "Share of the GPUs' peak that training reaches, for the hours: 0.2 to 0.5 is usual."},
    )
    rows: int = field(default=2000, metadata={"help": "Rows whose tokens are counted; all are read and looked at."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "A config.json, or a folder with one, in place of the model's own: for a model not here."},
    )
    json: bool | str = field(
        default=False, metadata={"help": "Print JSON in place of tables; or the file to write it to, beside them."}
    )


CONFIGS = (CheckConfig, StageConfig, ModelConfig, MPOConfig)


def run(check: Row, stage: Row, model: Row, trainer: Row) -> Summary:
    """Looks at everything.

    Args:
        check: Settings of `CheckConfig`, as read: none of these is built by the command line, because TRL's would ask
            this machine for what the training machine has.
        stage: Of `StageConfig`.
        model: Of `trl.ModelConfig`.
        trainer: Of `MPOConfig`.

    Returns:
        The plan in tables, and what is wrong, the worst first.

    Raises:
        InputError: The model is not known, or settings contradict each other.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns on a laptop, in the middle of JSON
    config = CheckConfig(**check)
    target = _target(config)
    settings = read_run(StageConfig(**stage), ModelConfig(**model), trainer)
    with _offline():
        plan = make_plan(settings, target, limit=config.rows, architecture=config.model_config)
    summary = _summary(plan, target, settings.model_config.model_name_or_path, group=settings.args.group_by_question)
    if config.json:
        text = json.dumps(as_json(plan, target), indent=1)
        if config.json is True:
            summary.text = text
        else:
            write_text(Path(config.json), f"{text}\n")
    return summary


@contextmanager
def _offline() -> Iterator[None]:
    """Keeps from the Hub whoever would look there: a check downloads nothing, and waits for no network."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _target(config: CheckConfig) -> Target:
    if config.gpu not in PEAK_TFLOPS:
        raise InputError(f"`gpu: {config.gpu}` is not known: choose one of {', '.join(PEAK_TFLOPS)}.")
    for name in ("gpus", "gpu_memory", "mfu", "rows"):
        if getattr(config, name) <= 0:
            raise InputError(f"`{name}` is {getattr(config, name)}: it must be more than 0.")
    if config.mfu > 1:
        raise InputError(f"`mfu` is {config.mfu}: it is a share of the peak, such as 0.35.")
    return Target(config.gpus, config.gpu_memory * GIB, config.gpu, config.mfu)


def as_json(plan: Plan, target: Target) -> Row:
    """The plan for scripts: bytes, tokens, operations and hours as plain numbers."""
    measured, epoch = plan.data.measured, plan.epoch
    return {
        "ok": not _errors(plan),
        "problems": [asdict(problem) for problem in plan.problems],
        "parameters": {
            "source": plan.blueprint.source,
            "total": plan.blueprint.sizes.total,
            "trained": plan.blueprint.sizes.trained,
            "by_part": {
                part: {"total": plan.blueprint.total[part], "trained": plan.blueprint.trained[part]} for part in PARTS
            },
        },
        "memory": {**asdict(plan.memory), "total": plan.memory.total, "limit": round(target.gpu_bytes)},
        "largest_micro_batch": {**asdict(plan.batch), "assumed": plan.assumed},
        "setup": asdict(plan.setup),
        "rows": {
            "good": plan.data.collected.num_rows,
            "sampled": len(plan.data.collected.sample),
            "faults": dict(plan.data.collected.faults.counts),
            "cut": plan.data.fit.num_cut if plan.data.fit else None,
            "dropped": len(plan.data.fit.dropped) if plan.data.fit else None,
        },
        "tokens": _percentiles(plan) | {"estimated": measured.estimated} if measured else None,
        "sharing": {name: _gain(plan, name) for name in plan.data.sharing},
        "run": asdict(epoch) if epoch else None,
        "versions": [asdict(package) for package in plan.versions],
    }


def _errors(plan: Plan) -> int:
    return sum(problem.severity == "error" for problem in plan.problems)


def _percentiles(plan: Plan) -> dict[str, list[int]]:
    """Tokens of rows at `_SHARES`."""
    lengths = plan.data.measured.lengths
    columns = {**lengths._asdict(), "whole": lengths.total}
    return {
        name: [int(value) for value in np.percentile(column, _SHARES, method="higher")]
        for name, column in columns.items()
    }


def _gain(plan: Plan, name: str) -> dict[str, float]:
    """What sharing saves in micro-batches of one kind: how many times fewer tokens and operations."""
    sharing, sizes = plan.data.sharing[name], plan.blueprint.sizes
    plain, shared = (
        sum(estimate_flops(sizes, work, checkpointing=plan.setup.checkpointing).values())
        for work in (sharing.plain, sharing.shared)
    )
    return {
        "tokens": sharing.plain.tokens,
        "unique_tokens": sharing.shared.tokens,
        "fewer_tokens": sharing.plain.tokens / sharing.shared.tokens,
        "fewer_operations": plain / shared,
    }


def _summary(plan: Plan, target: Target, name: str, *, group: bool) -> Summary:
    tables = [_memory_table(plan, target)]
    if plan.data.measured is not None:
        tables += [_token_table(plan), _sharing_table(plan, group=group), _run_table(plan, target)]
    if plan.problems:
        tables.append(_problem_table(plan))
    sizes = plan.blueprint.sizes
    rows = [
        [part, f"{plan.blueprint.total[part]:,}", f"{plan.blueprint.trained[part]:,}"]
        for part in PARTS
        if plan.blueprint.total[part]
    ]
    number = _errors(plan)
    tables[-1].notes.append(
        f"{number} problem{'s' if number > 1 else ''} would stop or spoil the run." if number else "Ready to run."
    )
    return Summary(
        f"Parameters of {name}",
        ["part", "total", "trained"],
        [*rows, ["all", f"{sizes.total:,}", f"{sizes.trained:,}"]],
        notes=[f"Architecture: {plan.blueprint.source}."],
        also=tables,
        exit_code=1 if number else 0,
    )


def _memory_table(plan: Plan, target: Target) -> Summary:
    setup, batch, memory = plan.setup, plan.batch, plan.memory
    numbers = {4: "float32", 2: "bf16"}
    weights = numbers.get(setup.weight_bytes, "")
    meaning: dict[str, str] = {
        "weights": f"{'4 or 8 bit' if setup.quantized_bytes else weights}{_sharded(setup.stage == 3, setup.gpus)}",
        "gradients": f"{numbers.get(setup.trained_bytes, '')}{_sharded(setup.stage >= 2, setup.gpus)}",
        "optimizer": f"{'with float32 weights' if setup.master else 'moments'}{_sharded(setup.stage > 0, setup.gpus)}",
        "reference": _reference(plan),
        "activations": f"{batch.rows} x {batch.length:,} tokens, {batch.patches:,} patches, "
        f"{'with' if setup.checkpointing else 'without'} gradient checkpointing",
        "working": "the head, or the layer that is computed just now",
        "buffers": "that GPUs exchange",
        "overhead": "driver, libraries, 5% for fragmentation" if setup.accelerator else "not counted on a CPU",
    }
    rows = [[part, _gib(getattr(memory, part)), text] for part, text in meaning.items()]
    limit = f"of {_gib(target.gpu_bytes)}, with {target.gpus} GPUs" if setup.accelerator else "on a CPU"
    notes = [f"Assumed: {plan.assumed}."] if plan.assumed else []
    if memory.cpu:
        notes.append(f"In the host's memory: {_gib(memory.cpu)} GiB for each GPU.")
    return Summary("Memory of one GPU", ["", "GiB", ""], [*rows, ["all", _gib(memory.total), limit]], notes=notes)


def _sharded(shards: bool, gpus: int) -> str:
    return f", over {gpus} GPUs" if shards and gpus > 1 else ""


def _reference(plan: Plan) -> str:
    if plan.setup.reference:
        return f"a second model{_sharded(plan.setup.stage == 3, plan.setup.gpus)}"
    return "none: precomputed, or the model without its adapters"


def _gib(number: float) -> str:
    return f"{number / GIB:.2f}"


def _token_table(plan: Plan) -> Summary:
    rows = [[name, *(f"{value:,}" for value in values)] for name, values in _percentiles(plan).items()]
    collected, fit, notes = plan.data.collected, plan.data.fit, []
    if plan.data.measured.estimated:
        notes.append("Estimated from texts and sizes of pictures: the model's processor is not here.")
    if fit is not None and fit.max_length is not None:
        notes.append(f"max_length={fit.max_length}: {fit.num_cut:,} rows cut, {len(fit.dropped):,} cannot be used.")
    counted = f"{len(collected.sample):,} of {collected.num_rows:,}"
    return Summary(f"Tokens of a row, {counted} rows counted", ["", "50%", "90%", "99%", "most"], rows, notes=notes)


def _sharing_table(plan: Plan, *, group: bool) -> Summary:
    used = BY_QUESTION if group else AS_THEY_COME
    rows = []
    for name in plan.data.sharing:
        gain = _gain(plan, name)
        numbers = [f"{gain[key]:,}" for key in ("tokens", "unique_tokens")]
        ratios = [f"{gain[key]:.2f} x" for key in ("fewer_tokens", "fewer_operations")]
        rows.append([f"{name} (as configured)" if name == used else name, *numbers, *ratios])
    notes = [] if plan.shares else ["Not used: `share_prefixes` is off, or the model cannot take it."]
    columns = ["micro-batches", "tokens", "unique", "fewer tokens", "fewer operations"]
    return Summary("What sharing prefixes saves, in the rows counted", columns, rows, notes=notes)


def _run_table(plan: Plan, target: Target) -> Summary:
    epoch, flops = plan.epoch, plan.epoch.flops
    total = sum(flops.values())
    rows = [
        ["pairs", f"{epoch.rows:,}"],
        ["pairs of a step", f"{epoch.batch:,}"],
        ["steps", f"{epoch.steps:,}"],
        ["tokens of an epoch", f"{epoch.work.tokens:,}"],
        ["picture patches of an epoch", f"{epoch.work.patches:,}"],
        ["operations", " + ".join(f"{part} {number / total:.0%}" for part, number in flops.items())],
        ["", f"{total:.3g}"],
        [f"hours on {target.gpus} {target.gpu} at {target.mfu:.0%}", f"{epoch.hours:,.2f}"],
    ]
    return Summary("The run", ["", ""], rows)


def _problem_table(plan: Plan) -> Summary:
    rows = [[problem.severity, problem.what, problem.fix] for problem in plan.problems]
    return Summary("Problems", ["", "what", "what to do"], rows)
