"""What a training run will take, from its settings, its data and the configuration of its model; no weights are read.

`make_plan` puts together what the modules beside it find out: the model's parts (`blueprint`), its data (`survey`),
how numbers are kept (`placement`), memory and operations (`footprint`), what is wrong (`problems`).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import ProcessorMixin
from trl import ModelConfig

from data_builders.hf_sampler import load_processor
from data_builders.records import InputError, Row
from mpo.config import MPOConfig
from mpo.forest_inputs import why_not
from mpo.models import base_of, is_adapter
from mpo.overlong import FitReport
from mpo.planning.blueprint import Blueprint, draw, find_architecture
from mpo.planning.footprint import Batch, Memory, Setup, Work, estimate_flops, estimate_memory
from mpo.planning.picture_tokens import picture_counter, tile_of
from mpo.planning.placement import PEAK_TFLOPS, Precision, make_fit, place
from mpo.planning.problems import (
    Problem,
    data_problems,
    length_problems,
    memory_problems,
    setting_problems,
    sharing_problems,
    step_problems,
    tiling_problems,
    version_problems,
)
from mpo.planning.survey import Collected, Measured, Sharing, collect, largest_plain, measure, share
from mpo.planning.versions import Installed, check_versions
from mpo.tiled_data import read_tiling
from mpo.tiling import load_tiling
from mpo.training import StageConfig, check_adapters, choose_parts

AS_THEY_COME, BY_QUESTION = "rows at random", "group_by_question"
_ASSUMED_RESPONSE = 1024  # tokens, where there are no data; MMPR's responses have 300 to 350 on average
_ASSUMED_TILES = 13  # InternVL's most: 12 and the thumbnail
_ASSUMED_LENGTH = 8192  # where `max_length` is not set either
_ANY_MACHINE = {  # in place of what a config would ask this machine for
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "tf32": None,
    "deepspeed": None,
    "use_liger": False,
    "activation_offloading": False,
}
_QUANTIZED = {"load_in_4bit": 0.5 + 4 / 64, "load_in_8bit": 1.0}  # 4 bits, and a float32 scale for 64 weights


@dataclass(frozen=True)
class Target:
    """The machine that a run is meant for.

    Attributes:
        gpus: In all.
        gpu_bytes: Memory of one.
        gpu: One of `mpo.planning.placement.PEAK_TFLOPS`.
        mfu: Share of a GPU's peak that training reaches.
    """

    gpus: int
    gpu_bytes: float
    gpu: str
    mfu: float


@dataclass(frozen=True)
class Run:
    """The settings of a run.

    Attributes:
        stage: Data and trained parts.
        model_config: Model and LoRA.
        values: Of `MPOConfig`, as read: what is built below was not asked for bf16, DeepSpeed and the like.
        args: The same built, as for a machine without a GPU.
    """

    stage: StageConfig
    model_config: ModelConfig
    values: Row
    args: MPOConfig

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, and the model without them is the reference."""
        return self.model_config.use_peft or is_adapter(self.model_config.model_name_or_path)

    @property
    def on_gpus(self) -> bool:
        """Whether it is meant for GPUs."""
        return not self.values.get("use_cpu", False)


@dataclass(frozen=True)
class Epoch:
    """What all rows take.

    Attributes:
        rows: Pairs of one epoch.
        batch: Pairs of an optimizer step, over all GPUs.
        steps: Of the run.
        work: Of one epoch, for the policy.
        flops: Of the run, by part.
        hours: Of the run.
    """

    rows: int
    batch: int
    steps: int
    work: Work
    flops: dict[str, float]
    hours: float


@dataclass(frozen=True)
class Data:
    """What is known of the rows.

    Attributes:
        collected: All of them, and a sample.
        measured: The sample's tokens; None where there is no row.
        fit: What `max_length` does to it.
        sharing: `AS_THEY_COME` and `BY_QUESTION`.
    """

    collected: Collected
    measured: Measured | None = None
    fit: FitReport | None = None
    sharing: dict[str, Sharing] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a run.

    Attributes:
        blueprint: The model.
        shares: Whether prefixes are shared.
        setup: How numbers are kept.
        batch: The largest micro-batch.
        assumed: What that was taken to be where there are no data; None: it was found in them.
        memory: Of one GPU.
        data: The rows.
        epoch: The run; None without rows.
        versions: Of packages.
        problems: Those that stop or spoil the run first.
    """

    blueprint: Blueprint
    shares: bool
    setup: Setup
    batch: Batch
    assumed: str | None
    memory: Memory
    data: Data
    epoch: Epoch | None
    versions: list[Installed]
    problems: list[Problem]


def read_run(stage: StageConfig, model_config: ModelConfig, values: Row) -> Run:
    """The settings of a run, checked as far as no GPU is needed for it.

    Raises:
        InputError: One is missing or contradicts another.
    """
    try:
        args = MPOConfig(**{**values, **_ANY_MACHINE})
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
    if model_config.model_name_or_path is None:
        raise InputError("`model_name_or_path` is missing: the model to start from.")
    if not args.output_dir or args.output_dir == "trainer_output":  # transformers' silent default
        raise InputError("`output_dir` is missing: name the folder for checkpoints and the trained model.")
    check_adapters(stage, replace(model_config, load_in_4bit=False, load_in_8bit=False))  # these two need a GPU
    return Run(stage, model_config, values, args)


def make_plan(run: Run, target: Target, *, limit: int, architecture: str | None = None) -> Plan:
    """Everything that can be known before a run.

    Args:
        run: Its settings.
        target: The machine that it is meant for.
        limit: Rows whose tokens are counted.
        architecture: A `config.json` to take in place of the model's own, or its folder.

    Raises:
        InputError: The model is not known, cannot be trained like this, or a file that settings name is broken.
    """
    deepspeed = _read_deepspeed(run.values.get("deepspeed"))
    blueprint = _draw(run, architecture)
    base = base_of(blueprint.model)
    setup = _place(run, blueprint, deepspeed, target.gpus)
    reason = why_not(base)
    shares = run.args.share_prefixes and reason is None
    data, problems = _look_at_data(run, blueprint, limit, architecture)
    batches, assumed = _batches(run, blueprint, data.measured, setup, shares)
    batch = batches(run.args.per_device_train_batch_size)
    memory = estimate_memory(blueprint.sizes, batch, setup)
    versions = check_versions()
    needed = [name for name, key in (("deepspeed", "deepspeed"), ("liger-kernel", "use_liger")) if run.values.get(key)]
    epoch = _epoch(run, blueprint, data, target, shares) if data.measured is not None else None
    problems += _does_it_fit(run, blueprint, setup, batches, target)
    problems += setting_problems(run.model_config, setup, has_adapters=run.has_adapters)
    problems += version_problems(versions, needed=needed)
    settings = run.stage.tiling
    problems += tiling_problems(
        read_tiling(settings) if settings else load_tiling(run.model_config.model_name_or_path)
    )
    problems += sharing_problems(run.args, reason)
    problems += step_problems(epoch.rows, epoch.batch) if epoch else []
    problems.sort(key=lambda problem: problem.severity == "warning")
    return Plan(blueprint, shares, setup, batch, assumed, memory, data, epoch, versions, problems)


def _read_deepspeed(given: Any) -> Row | None:
    if given is None or isinstance(given, dict):
        return given
    try:
        content = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"`deepspeed: {given}` cannot be read ({error!s:.200}). It names a JSON file, from the folder that the "
            "run is started in; configs/deepspeed has one for each stage of ZeRO."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{given} must hold a JSON object, and holds {content!r:.80}.")
    return content


def _draw(run: Run, architecture: str | None) -> Blueprint:
    name, revision = run.model_config.model_name_or_path, run.model_config.model_revision
    trusted = {"trust_remote_code": run.args.trust_remote_code}
    config, source = find_architecture(name, model_config=architecture, revision=revision, **trusted)

    def prepare(model: nn.Module) -> nn.Module:
        if is_adapter(name):
            lora = PeftConfig.from_pretrained(name)
            lora.inference_mode = False
        else:
            lora = choose_parts(model, run.stage, run.model_config, run.args.part_learning_rates or {})
        try:
            with torch.device("meta"):
                return model if lora is None else get_peft_model(model, lora)
        except ValueError as error:
            raise InputError(f"PEFT cannot put adapters into this model: {error!s:.300}") from error

    return draw(config, source, prepare=prepare, attn_implementation=run.model_config.attn_implementation)


def _place(run: Run, blueprint: Blueprint, deepspeed: Row | None, gpus: int) -> Setup:
    asked, model_config = run.values.get("bf16"), run.model_config
    own = str(base_of(blueprint.model).config.dtype or "float32").removeprefix("torch.")
    precision = Precision(
        half=bool(run.values.get("fp16") or (run.on_gpus if asked is None else asked)),  # TRL's default on a GPU
        dtype=own if model_config.dtype == "auto" else model_config.dtype or "float32",
        accelerator=run.on_gpus,
        adapters=run.has_adapters,
        quantized_bytes=next((size for name, size in _QUANTIZED.items() if getattr(model_config, name)), 0),
    )
    return place(
        precision,
        deepspeed,
        gpus=gpus,
        width=blueprint.sizes.text.width,
        optimizer=str(getattr(run.args.optim, "value", run.args.optim)),
        checkpointing=run.args.gradient_checkpointing,
        reference=not (run.has_adapters or run.args.precompute_ref_log_probs),
        attention=model_config.attn_implementation or "sdpa",
    )


def _look_at_data(run: Run, blueprint: Blueprint, limit: int, architecture: str | None) -> tuple[Data, list[Problem]]:
    stage, args = run.stage, run.args
    collected = collect(stage.data, stage.image_root, limit=limit)
    problems = data_problems(collected.faults)
    problems += data_problems(collect(stage.eval_data, stage.image_root, limit=1).faults)
    if not len(collected.sample):
        return Data(collected), problems
    name, base = run.model_config.model_name_or_path, base_of(blueprint.model)
    processor, reason = _processor(name, trust_remote_code=args.trust_remote_code)
    if reason is not None and Path(name).is_dir():
        fix = "Install what it asks for, or copy the processor's files from the model that this one was trained from."
        problems.append(Problem("error", f"the processor of {name} cannot be loaded: {reason:.300}", fix))
    tile = tile_of(base)
    measured = measure(
        collected.sample,
        processor,
        picture_counter(base, [place for place in (architecture, name) if place]),
        merge=blueprint.sizes.merge,
        tile_patches=tile.patches if tile else None,
        max_length=args.max_length,
    )
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    fit, found = length_problems(collected.sample, measured.lengths, args, longest=longest)
    options = {"batch_size": args.per_device_train_batch_size, "max_tokens": args.max_forest_tokens}
    part = len(collected.sample) / collected.num_rows
    sharing = {
        AS_THEY_COME: share(measured, grouped=False, part=part, **options),
        BY_QUESTION: share(measured, grouped=True, **options),
    }
    return Data(collected, measured, fit, sharing), problems + found


def _processor(name: str, *, trust_remote_code: bool) -> tuple[ProcessorMixin | None, str | None]:
    """The model's processor, or why there is none here."""
    try:
        return load_processor(name, trust_remote_code=trust_remote_code), None
    except (InputError, ImportError) as error:  # an ImportError where torchvision is missing
        return None, " ".join(str(error).split())


def _batches(
    run: Run, blueprint: Blueprint, measured: Measured | None, setup: Setup, shares: bool
) -> tuple[Callable[[int], Batch], str | None]:
    """The largest micro-batch for a number of pairs, and what it was taken to be where there are no data."""
    args = run.args
    if measured is None:
        return _assumed(args, blueprint, shares)

    def of_forests(size: int) -> Batch:
        options = {"grouped": args.group_by_question, "max_tokens": args.max_forest_tokens}
        return share(measured, batch_size=size, **options).largest

    def of_rows(size: int) -> Batch:
        found = largest_plain(measured, size)
        # without Triton, TRL's head scores prompts too
        return found if setup.accelerator else replace(found, scored=found.rows * (found.length - 1))

    return (of_forests if shares else of_rows), None


def _assumed(args: MPOConfig, blueprint: Blueprint, shares: bool) -> tuple[Callable[[int], Batch], str]:
    """Pairs as long as `max_length` allows, with as many tiles as InternVL takes."""
    base = base_of(blueprint.model)
    length = args.max_length or min(base.config.get_text_config().max_position_embeddings, _ASSUMED_LENGTH)
    response, tile = min(_ASSUMED_RESPONSE, length // 4), tile_of(base)
    image = min(_ASSUMED_TILES * tile.tokens if tile else length, length // 2)
    patches = round(image * blueprint.sizes.merge)
    text = (
        f"there are no data to measure, so each pair is taken to have {length:,} tokens, {image:,} of them of "
        f"pictures, and two responses of {response:,}"
    )
    if shares:
        return lambda size: Batch(size, length + response, 2 * size * response, size * patches), text
    return lambda size: Batch(2 * size, length, 2 * size * response, 2 * size * patches), text


def _does_it_fit(
    run: Run, blueprint: Blueprint, setup: Setup, batches: Callable[[int], Batch], target: Target
) -> list[Problem]:
    size, limit = run.args.per_device_train_batch_size, target.gpu_bytes
    memory = estimate_memory(blueprint.sizes, batches(size), setup)
    if not setup.accelerator or memory.total <= limit:
        return []
    accumulation = run.args.gradient_accumulation_steps
    changes, together = make_fit(
        blueprint.sizes, batches, setup, batch_size=size, accumulation=accumulation, limit=limit
    )
    return memory_problems(memory, changes, together=together, limit=limit)


def _epoch(run: Run, blueprint: Blueprint, data: Data, target: Target, shares: bool) -> Epoch:
    args, rows = run.args, data.collected.num_rows
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * target.gpus
    per_epoch = math.ceil(rows / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    sharing = data.sharing[BY_QUESTION if args.group_by_question else AS_THEY_COME]
    work = (sharing.shared if shares else sharing.plain).times(rows / len(data.measured.pairs))
    flops = estimate_flops(blueprint.sizes, work, checkpointing=args.gradient_checkpointing)
    epochs = dict.fromkeys(flops, steps / per_epoch) | ({"reference": 1.0} if args.precompute_ref_log_probs else {})
    flops = {part: number * epochs[part] for part, number in flops.items()}
    seconds = sum(flops.values()) / (target.gpus * target.mfu * PEAK_TFLOPS[target.gpu] * 1e12)
    return Epoch(rows, batch, steps, work, flops, seconds / 3600)
