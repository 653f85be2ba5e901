"""Memory and operations: hand-computed, and against the tensors that are alive while tiny models really train."""

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr otherwise

import pytest
import tiny_models
import torch
from conftest import QUIET_TRAINING
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PrinterCallback
from trl import ModelConfig

from data_builders.shards import write_rows
from mpo import MPOConfig, MPOTrainer
from mpo.data import preference_dataset
from mpo.models import lora_targets, part_of, train_parts
from mpo.planning.blueprint import draw
from mpo.planning.footprint import Batch, Flow, Setup, Sizes, Stack, Work, estimate_flops, estimate_memory
from mpo.planning.plan import Target, make_plan, read_run
from mpo.training import StageConfig

LAYER = Stack(layers=1, width=10, inner=40, queries=10, keys=10, heads=1, weights=1600)
TEXT = Sizes(LAYER, None, vocabulary=100, total=2600, trained=2600)
GB = 1e9


@pytest.mark.parametrize(("stage", "expected"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_zero_paper(stage: int, expected: float) -> None:
    # its figure 1: 7.5 billion weights on 64 GPUs, 2 + 2 + 12 bytes each
    sizes = replace(TEXT, total=7_500_000_000, trained=7_500_000_000)
    half = {"weight_bytes": 2, "trained_bytes": 2, "stream_bytes": 2, "compute_bytes": 2, "master": True}
    memory = estimate_memory(sizes, Batch(0, 0, 0), Setup(gpus=64, stage=stage, reference=False, **half))
    assert (memory.weights + memory.gradients + memory.optimizer) / GB == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("stage", "expected"), [(0, 10_400), (2, 10_400), (3, 2_600)])
def test_a_second_model_is_sharded_by_stage_3_alone(stage: int, expected: int) -> None:
    memory = estimate_memory(TEXT, Batch(0, 0, 0), Setup(gpus=4, stage=stage, reference=True))
    assert memory.reference == expected


def test_offloading_moves_states_to_the_host() -> None:
    setup = Setup(gpus=2, stage=3, master=True, offload_optimizer=True, offload_weights=True, reference=False)
    memory = estimate_memory(TEXT, Batch(0, 0, 0), setup)
    assert (memory.weights, memory.optimizer) == (0, 0)
    assert memory.cpu == 2600 * (4 + 12) / 2


def test_a_layer_keeps_what_can_be_counted_by_hand() -> None:
    batch, setup = Batch(1, 7, 0), Setup(checkpointing=False, attention="flash", accelerator=False)
    one = estimate_memory(TEXT, batch, setup).activations
    two = estimate_memory(replace(TEXT, text=replace(LAYER, layers=2)), batch, setup).activations
    # numbers of one token: two norms with input, normed and output; queries, keys, values, result; 4 of width 40
    assert two - one == 7 * 4 * (2 * 3 * 10 + 4 * 10 + 4 * 40)


def test_with_checkpointing_a_layer_keeps_its_input_alone() -> None:
    batch, setup = Batch(1, 7, 0), Setup(checkpointing=True, accelerator=False)
    one = estimate_memory(TEXT, batch, setup).activations
    two = estimate_memory(replace(TEXT, text=replace(LAYER, layers=2)), batch, setup).activations
    assert two - one == 7 * 4 * 10


def test_sdpa_keeps_a_mask_of_numbers_for_every_layer() -> None:
    batch, setup = Batch(2, 7, 0), Setup(checkpointing=False, attention="sdpa")
    masked, bare = (estimate_memory(TEXT, batch, replace(setup, attention=name)) for name in ("sdpa", "flash"))
    assert masked.activations - bare.activations == 2 * 7 * 7 * 4


def test_a_part_that_no_gradient_passes_keeps_nothing() -> None:
    vision = replace(TEXT, vision=LAYER, vision_flow=Flow(passes=False, trained=False), patch=0)
    setup = Setup(checkpointing=False)
    longer = [estimate_memory(vision, Batch(1, 7, 0, patches), setup).activations for patches in (20, 40)]
    projector = 20 * 4 * (2 * 10 + 3 * 10)
    assert longer[1] - longer[0] == projector


def test_training_takes_six_operations_per_weight_and_token_and_the_reference_two() -> None:
    work = Work(tokens=1000, visible=0, scored=0)
    flops = estimate_flops(TEXT, work, checkpointing=False)
    assert (flops["text"], flops["reference"]) == (6 * 1600 * 1000, 2 * 1600 * 1000)
    assert estimate_flops(TEXT, work, checkpointing=True)["recomputed"] == 2 * 1600 * 1000


def test_attention_takes_four_operations_per_visible_token_and_query_width() -> None:
    flops = estimate_flops(TEXT, Work(tokens=0, visible=55, scored=0), checkpointing=False)
    assert flops["reference"] == 4 * 10 * 55


def test_frozen_weights_spare_a_third_of_the_operations() -> None:
    lora = replace(TEXT, text_flow=Flow(passes=True, trained=False, ranks=8), head_trained=False)
    assert estimate_flops(lora, Work(1000, 0, 0), checkpointing=False)["text"] == 4 * 1600 * 1000


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_blueprint_counts_what_the_model_has(family: str, tmp_path: Path) -> None:
    _, model = tiny_models.FAMILIES[family]()
    model.config.save_pretrained(tmp_path)
    frozen = ("projector", "llm")
    blueprint = draw(AutoConfig.from_pretrained(tmp_path), "here", prepare=lambda model: _trained(model, frozen))
    train_parts(model, frozen)
    for part, number in blueprint.total.items():
        assert number == sum(p.numel() for name, p in model.named_parameters() if part_of(name) == part), part
    assert blueprint.sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {p.device.type for p in blueprint.model.parameters()} == {"meta"}
    assert not blueprint.sizes.vision_flow.passes


def _trained(model: torch.nn.Module, parts: tuple[str, ...]) -> torch.nn.Module:
    train_parts(model, parts)
    return model


def test_a_blueprint_counts_adapters() -> None:
    _, model = tiny_models.internvl()

    def adapted(model: torch.nn.Module) -> torch.nn.Module:
        return get_peft_model(model, LoraConfig(r=8, target_modules=lora_targets(model, ["llm"])))

    blueprint = draw(model.config, "here", prepare=adapted)
    real = adapted(model)
    assert blueprint.sizes.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert blueprint.trained["vision"] == 0
    assert blueprint.sizes.text_flow == Flow(passes=True, trained=False, ranks=7 * 8)


# Wide enough, and rows long enough, for activations to weigh more than weights.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 16}
TOWER = {"hidden_size": 128, "intermediate_size": 256, "depth": 4, "out_hidden_size": 128}
SIDE = 112  # pixels: 64 patches
MEASURED = [
    (family, lora, checkpointing)
    for family in ("llava", "internvl", "qwen2_5_vl")
    for lora in (False, True)
    for checkpointing in (False, True)
]


def wide_model(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves a model of four layers of width 128 whose tower takes 64 patches of a picture."""
    for name, value in WIDE.items():
        monkeypatch.setitem(tiny_models.LAYERS, name, value)
    square = {"height": SIDE, "width": SIDE}
    if family == "qwen2_5_vl":
        more = {"window_size": 56, "fullatt_block_indexes": [1, 3]}
        processor, model = tiny_models.qwen_vl("Qwen2_5_VL", [1, 1, 2], patch_size=14, **TOWER, **more)
        processor.image_processor.size = {"shortest_edge": 28**2, "longest_edge": SIDE**2}
    else:
        processor, model = tiny_models.FAMILIES[family]()
        processor.image_processor.size = square
        if family == "internvl":
            processor.image_seq_length = 16
            model.config.vision_config.image_size = [SIDE, SIDE]
        else:
            processor.image_processor.crop_size = square
            model.config.vision_config.image_size = SIDE
        model = type(model)(model.config)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def write_pairs(folder: Path, num: int) -> None:
    """Pairs with one picture, a question of 250 bytes and answers of 40."""
    rows = []
    for index in range(num):
        tiny_models.picture(index, (SIDE, SIDE)).save(folder / f"{index}.png")
        texts = {"prompt": f"{index:03d}" + "q" * 247, "chosen": "a" * 40, "rejected": "b" * 40}
        rows.append({"id": str(index), "images": [f"{index}.png"], "kind": "correctness", **texts})
    write_rows(folder / "pairs.jsonl", rows)


def peak_of(compute: Callable[[], object]) -> int:
    """Bytes of the tensors that a computation makes, as many as live at the same time at most."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    found = []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            found.append((event.start_ns(), event.nbytes()))
    live = peak = 0
    for _, change in sorted(found, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("family", "lora", "checkpointing"), MEASURED)
def test_memory_is_what_tiny_models_take(
    family: str, lora: bool, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide_model(family, tmp_path / "model", monkeypatch)
    write_pairs(tmp_path, 4)
    settings: dict[str, Any] = {
        **QUIET_TRAINING,
        "gradient_checkpointing": checkpointing,
        "logging_steps": 9,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
    }
    adapters = {"use_peft": True, "lora_r": 8, "lora_dropout": 0.0} if lora else {}
    model_config = ModelConfig(model_name_or_path=str(tmp_path / "model"), **adapters)
    stage = StageConfig(data=[str(tmp_path / "pairs.jsonl")], image_root=str(tmp_path))
    plan = make_plan(read_run(stage, model_config, settings), Target(1, 2**30, "h100", 0.35), limit=100)

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    trainer = MPOTrainer(
        model=model,
        args=MPOConfig(**settings),
        train_dataset=preference_dataset(stage.data, tmp_path),
        processing_class=AutoProcessor.from_pretrained(tmp_path / "model"),
        peft_config=LoraConfig(r=8, target_modules=lora_targets(model, ["llm"])) if lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    resident = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    measured = resident + peak_of(trainer.train)
    assert plan.memory.activations > 0.3 * plan.memory.weights or checkpointing
    assert plan.memory.total == pytest.approx(measured, rel=0.2)
    assert plan.memory.total - plan.memory.states == pytest.approx(measured - plan.memory.states, rel=0.2)
