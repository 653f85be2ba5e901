"""How a run's settings keep its numbers: precision, DeepSpeed's stages, and what would make a run fit that does not.

Pure functions of settings; a DeepSpeed config is given as its content.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mpo.planning.footprint import Batch, Flow, Memory, Setup, Sizes, estimate_memory

PEAK_TFLOPS = {  # of dense matrix products in bf16 (V100: fp16); nominal, so hours are rough
    "a10": 125,
    "a100": 312,
    "a6000": 155,
    "b200": 2250,
    "h20": 148,
    "h100": 989,
    "h200": 989,
    "l4": 121,
    "l40s": 362,
    "mi300x": 1307,
    "rtx3090": 71,
    "rtx4090": 165,
    "rtx5090": 210,
    "v100": 125,
}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adamw_apex_fused": 2, "lion_32bit": 1, "sgd": 0, "adafactor": 0}
_DEEPSPEED_DEFAULTS = {"reduce_bucket_size": 5e8, "allgather_bucket_size": 5e8, "stage3_max_live_parameters": 1e9}
_LORA_SHARE = 0.01  # of all weights that adapters of rank 16 or so have


@dataclass(frozen=True)
class Precision:
    """What a run asks for.

    Attributes:
        half: bf16 or fp16, by autocast or by DeepSpeed.
        dtype: Of the model as it is loaded.
        accelerator: Whether it runs on GPUs.
        adapters: Only adapters are trained.
        quantized_bytes: Of one weight, for `load_in_4bit` and `load_in_8bit`; else 0.
    """

    half: bool
    dtype: str
    accelerator: bool = True
    adapters: bool = False
    quantized_bytes: float = 0


def place(
    precision: Precision,
    deepspeed: dict[str, Any] | None,
    *,
    gpus: int,
    width: int,
    optimizer: str,
    checkpointing: bool,
    reference: bool,
    attention: str,
) -> Setup:
    """How a run keeps its numbers.

    Without DeepSpeed weights stay as they are loaded, and autocast computes in bf16 beside them; adapters are in
    float32, or bf16 beside quantized weights. DeepSpeed turns everything into bf16 and keeps float32 copies of what
    is trained.

    Args:
        precision: What is asked for.
        deepspeed: The content of its config; None: plain data parallelism.
        gpus: In all.
        width: Of the language model, which `auto` takes bucket sizes from.
        optimizer: `optim` of the trainer.
        checkpointing: `gradient_checkpointing`.
        reference: Whether a second model is kept.
        attention: `attn_implementation`.
    """
    loaded = _BYTES.get(precision.dtype, 4)
    trained = loaded
    if precision.adapters:
        trained = 2 if precision.quantized_bytes else 4
    common = {
        "gpus": gpus,
        "quantized_bytes": precision.quantized_bytes,
        "checkpointing": checkpointing,
        "reference": reference,
        "attention": attention,
        "accelerator": precision.accelerator,
    }
    if deepspeed is None:
        compute = 2 if precision.half else loaded
        state = _state_bytes(optimizer, trained)
        return Setup(
            weight_bytes=loaded,
            trained_bytes=trained,
            stream_bytes=loaded,
            compute_bytes=min(compute, loaded),
            state_bytes=state,
            **common,
        )
    numbers = 2 if precision.half else 4
    return Setup(
        weight_bytes=numbers,
        trained_bytes=numbers,
        stream_bytes=numbers,
        compute_bytes=numbers,
        state_bytes=_state_bytes(optimizer, 4),
        master=True,
        **_zero(deepspeed.get("zero_optimization") or {}, width),
        **common,
    )


def _state_bytes(optimizer: str, number: float) -> float:
    """Of one weight: AdamW has two numbers of the weight's own type, unless its name says 8 bit."""
    return 2 if "8bit" in optimizer else _STATES.get(optimizer, 2) * number


def _zero(options: dict[str, Any], width: int) -> dict[str, Any]:
    """What a `zero_optimization` block means; `auto` is transformers', which goes by the width of the model."""

    def number(name: str) -> int:
        value = options.get(name, _DEEPSPEED_DEFAULTS[name])
        return width**2 if value == "auto" else int(value)

    stage = int(options.get("stage", 0))
    reduce = number("reduce_bucket_size") * (2 if options.get("overlap_comm", stage == 3) else 1)
    return {
        "stage": stage,
        "buckets": reduce + (number("allgather_bucket_size") if stage in (1, 2) else 0),
        "gathered": number("stage3_max_live_parameters") if stage == 3 else 0,
        "offload_optimizer": _offloads(options, "offload_optimizer"),
        "offload_weights": _offloads(options, "offload_param"),
    }


def _offloads(options: dict[str, Any], name: str) -> bool:
    return (options.get(name) or {}).get("device", "none") != "none"


@dataclass(frozen=True)
class Change:
    """Something that takes less memory.

    Attributes:
        text: The setting, as one would write it.
        memory: With it, and in a list with all before it.
    """

    text: str
    memory: Memory


@dataclass(frozen=True)
class _Run:
    sizes: Sizes
    batches: Callable[[int], Batch]
    setup: Setup
    batch_size: int
    accumulation: int

    def memory(self) -> Memory:
        return estimate_memory(self.sizes, self.batches(self.batch_size), self.setup)


def make_fit(
    sizes: Sizes,
    batches: Callable[[int], Batch],
    setup: Setup,
    *,
    batch_size: int,
    accumulation: int,
    limit: float,
) -> tuple[list[Change], bool]:
    """What to change so that a run fits: any one of several settings or, where none is enough, several together.

    Args:
        sizes: Of the model.
        batches: The largest micro-batch for a number of pairs.
        setup: As configured.
        batch_size: Pairs in a micro-batch.
        accumulation: Micro-batches of one GPU in a step.
        limit: Bytes of a GPU.

    Returns:
        The changes, and whether they have to be made together.
    """
    run = _Run(sizes, batches, setup, batch_size, accumulation)
    single = [Change(text, changed.memory()) for text, changed in _changes(run)]
    if enough := [change for change in single if change.memory.total <= limit]:
        return enough, False
    together, best = [], run.memory().total
    for text, change in _steps():
        changed = change(run)
        if changed is not None and (memory := changed.memory()).total < best:
            run, best = changed, memory.total
            together.append(Change(_worded(text, run), memory))
        if best <= limit:
            break
    return together, True


def _changes(run: _Run) -> Iterator[tuple[str, _Run]]:
    for text, change in _steps():
        changed = change(run)
        if changed is not None:
            yield _worded(text, changed), changed


def _worded(text: str, run: _Run) -> str:
    return text.format(accumulation=run.accumulation)


def _steps() -> list[tuple[str, Callable[[_Run], _Run | None]]]:
    """Settings that take less memory, those first that cost least; each gives None where it is set already."""
    zero = "deepspeed: configs/deepspeed/{}.json"
    return [
        ("bf16: true", _in_half),
        ("gradient_checkpointing: true", lambda run: _with(run, "checkpointing", True)),
        ("per_device_train_batch_size: 1 with gradient_accumulation_steps: {accumulation}", _one_pair),
        ("precompute_ref_log_probs: true", lambda run: _with(run, "reference", False)),
        (zero.format("zero1"), lambda run: _sharded(run, 1)),
        (zero.format("zero2"), lambda run: _sharded(run, 2)),
        (zero.format("zero3"), lambda run: _sharded(run, 3)),
        (zero.format("zero3_offload"), lambda run: _sharded(run, 3, offload=True)),
        ("use_peft: true (LoRA)", _with_adapters),
    ]


def _with(run: _Run, name: str, value: bool) -> _Run | None:
    return None if getattr(run.setup, name) == value else replace(run, setup=replace(run.setup, **{name: value}))


def _in_half(run: _Run) -> _Run | None:
    if run.setup.compute_bytes == 2 or not run.setup.accelerator:
        return None
    return replace(run, setup=replace(run.setup, compute_bytes=2))


def _one_pair(run: _Run) -> _Run | None:
    if run.batch_size == 1:
        return None
    return replace(run, batch_size=1, accumulation=run.accumulation * run.batch_size)


def _sharded(run: _Run, stage: int, *, offload: bool = False) -> _Run | None:
    old = run.setup
    if stage < old.stage or (stage == old.stage and old.offload_optimizer >= offload) or old.quantized_bytes:
        return None
    if old.gpus == 1 and not offload:
        return None
    numbers = old.compute_bytes
    shipped = {"stage": stage, "reduce_bucket_size": "auto", "overlap_comm": True}
    moved = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}} if offload else {}
    new = replace(
        old,
        weight_bytes=numbers,
        trained_bytes=numbers,
        stream_bytes=numbers,
        state_bytes=8,
        master=True,
        **_zero({**shipped, **moved}, run.sizes.text.width),
    )
    return replace(run, setup=new)


def _with_adapters(run: _Run) -> _Run | None:
    """LoRA on the language model, with adapters of a usual size."""
    if not run.sizes.text_flow.trained:
        return None
    trained = round(_LORA_SHARE * run.sizes.total)
    sizes = replace(
        run.sizes,
        total=run.sizes.total + trained,
        trained=trained,
        head_trained=False,
        text_flow=Flow(passes=True, trained=False, ranks=7 * 16),
        vision_flow=Flow(passes=False, trained=False),
    )
    trained_bytes = run.setup.weight_bytes if run.setup.master else 4
    return replace(run, sizes=sizes, setup=replace(run.setup, reference=False, trained_bytes=trained_bytes))
