"""`mpo check`: the plan before a run, from configs and data, and the problems it finds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig

from data_builders.records import InputError, Summary
from data_builders.shards import write_rows
from mpo import cli
from mpo.cli import run_verb
from mpo.forest_collators import ForestCollator
from mpo.lengths import measure_rows
from mpo.planning.blueprint import draw, find_architecture
from mpo.planning.footprint import Batch, Setup, Sizes, Stack, Work, estimate_memory
from mpo.planning.picture_tokens import picture_counter, tile_of
from mpo.planning.placement import Precision, make_fit, place
from mpo.planning.problems import setting_problems, tiling_problems, version_problems
from mpo.planning.survey import collect, measure, share
from mpo.planning.versions import Installed, check_versions
from mpo.tiling import Tiling

ROOT = Path(__file__).parent.parent
RECIPE = "configs/internvl3_8b/train.yaml"
PARAMETERS = 7_944_373_760  # of InternVL3-8B as transformers builds it from the copy of its architecture
MISSING = "missing.png"


def write_pairs(folder: Path, num: int = 8, **changes: Any) -> Path:
    """Pairs of which two each have the same question and picture; `changes` go to all."""
    rows = []
    for index in range(num):
        name = f"{index // 2}.png"
        tiny_models.picture(index // 2, (40, 56)).save(folder / name)
        texts = {"prompt": f"Question {index // 2}: how many?", "chosen": f"There are {index}.", "rejected": "None."}
        rows.append({"id": f"row-{index}", "images": [name], "kind": "correctness", **texts, **changes})
    write_rows(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny InternVL, `model/`."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.build("internvl", folder / "model")
    return folder / "model"


@pytest.fixture
def check(tiny: Path, tmp_path: Path) -> Callable[..., Summary]:
    """Runs `mpo check` on a file of settings, those given over usual ones."""

    def run(**settings: Any) -> Summary:
        usual = {"model_name_or_path": str(tiny), "data": [str(tmp_path / "pairs.jsonl")], "bf16": True}
        usual |= {"image_root": str(tmp_path), "output_dir": str(tmp_path / "out")}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump({**usual, **settings}))
        return run_verb("check", ["--config", str(tmp_path / "train.yaml"), "--json", "true"])

    return run


def found(summary: Summary) -> dict[str, Any]:
    return json.loads(summary.text)


def problems(summary: Summary, severity: str = "error") -> list[str]:
    return [f"{p['what']} -> {p['fix']}" for p in found(summary)["problems"] if p["severity"] == severity]


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where recipes are run from."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "150")


@pytest.mark.usefixtures("at_root")
def test_the_plan_of_a_recipe_is_printed_without_weights_or_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.app(["check", "--config", RECIPE, "--gpus", "8", "--gpu-memory", "80"], prog_name="mpo")
    assert stop.value.code == 1  # the data are not there
    printed = capsys.readouterr().out
    for text in ("Memory of one GPU", "over 8 GPUs", f"{PARAMETERS:,}", "runs/internvl3_8b/pairs is neither a file"):
        assert text in printed
    assert "a GPU would need" not in printed


def test_json_is_all_that_is_printed_and_the_network_is_left_alone() -> None:
    command = [sys.executable, "-m", "mpo", "check", "--config", RECIPE, "--gpus", "8", "--json"]
    network = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}  # where nobody answers
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **network})
    plan = json.loads(done.stdout)
    assert plan["parameters"]["total"] == plan["parameters"]["trained"] == PARAMETERS
    assert plan["memory"]["total"] < plan["memory"]["limit"] == 80 * 2**30
    assert (done.returncode, plan["ok"]) == (1, False)
    assert "127.0.0.1" not in done.stderr


@pytest.mark.usefixtures("at_root")
def test_a_run_that_cannot_fit_is_told_what_to_change() -> None:
    argv = ["--config", RECIPE, "--gpus", "8", "--deepspeed", "null", "--dtype", "float32", "--json", "true"]
    (text,) = (text for text in problems(run_verb("check", argv)) if "GiB and has 80" in text)
    assert "Any of these is enough: " in text
    assert "`deepspeed: configs/deepspeed/zero3.json`" in text
    assert "`use_peft: true (LoRA)`" in text


@pytest.mark.usefixtures("at_root")
def test_a_run_that_fits_nowhere_is_told_so() -> None:
    argv = ["--config", RECIPE, "--gpus", "1", "--gpu_memory", "2", "--json", "true"]
    assert any("Take larger GPUs" in text for text in problems(run_verb("check", argv)))


def test_a_good_run_is_ready(check: Callable[..., Summary], tiny: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    summary = check()
    plan = found(summary)
    assert (summary.exit_code, plan["ok"], problems(summary)) == (0, True, [])
    assert plan["rows"] == {"good": 8, "sampled": 8, "faults": {}, "cut": 0, "dropped": 0}
    assert plan["run"]["steps"] == 1
    assert plan["run"]["hours"] > 0
    assert plan["tokens"]["estimated"] is False
    tables = [summary.title, *(table.title for table in summary.also)]
    assert [title.split(",")[0] for title in tables] == [
        f"Parameters of {tiny}",
        "Memory of one GPU",
        "Tokens of a row",
        "What sharing prefixes saves",
        "The run",
    ]
    assert summary.also[-1].notes == ["Ready to run."]


def test_steps_count_gpus_micro_batches_and_epochs(check: Callable[..., Summary], tmp_path: Path) -> None:
    write_pairs(tmp_path)
    run = found(check(gpus=2, per_device_train_batch_size=1, gradient_accumulation_steps=2, num_train_epochs=3))["run"]
    assert (run["rows"], run["batch"], run["steps"]) == (8, 4, 6)


def test_bad_rows_are_counted_by_kind_and_said_with_their_line(check: Callable[..., Summary], tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 4)
    good = [json.loads(line) for line in path.read_text().splitlines()]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = [
        {**good[0], "images": [MISSING]},
        {**good[0], "images": ["../secret.png"]},
        {**good[0], "images": ["broken.png"]},
        {**good[0], "chosen": ""},
        {**good[0], "rejected": good[0]["chosen"]},
    ]
    write_rows(path, [*good, *bad])
    summary = check()
    assert summary.exit_code == 1
    assert found(summary)["rows"]["faults"] == {"image": 3, "row": 1, "equal": 1}
    rows, images, equal = problems(summary)
    assert "line 8" in rows
    assert MISSING in images
    assert "is outside the image root" in images
    assert "line 9 -> Take them out" in equal
    assert found(summary)["rows"]["good"] == 5  # a file is opened only if its row is among those counted


def test_what_max_length_would_cut_is_an_error_with_the_length_to_set(
    check: Callable[..., Summary], tmp_path: Path
) -> None:
    write_pairs(tmp_path)
    tokens = found(check())["tokens"]
    before = tokens["image"][-1] + tokens["prompt"][-1]
    (text,) = problems(check(max_length=before - 5))
    assert f"`max_length: {tokens['whole'][-1]}`" in text
    summary = check(max_length=tokens["whole"][-1] - 1)
    assert summary.exit_code == 0
    assert "lose the end of a response" in problems(summary, "warning")[0]


def test_rows_that_max_length_takes_whole_responses_of_are_counted(
    check: Callable[..., Summary], tmp_path: Path
) -> None:
    path = write_pairs(tmp_path, 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [*rows, {**rows[0], "prompt": "Q" * 200}])
    lengths = found(check())["tokens"]
    before, whole = lengths["prompt"][-1] + lengths["image"][-1], lengths["whole"][-1]
    expected = f"Set `max_length` to at least {before + 1}; {whole} cuts nothing."
    (text,) = problems(check(max_length=150))
    assert text.startswith("1 of 5 rows would lose pictures or a whole response to `max_length`=150.")
    assert text.endswith(f"{expected} Or `overlong: drop` leaves them out.")
    dropping = check(max_length=150, overlong="drop")
    assert (dropping.exit_code, found(dropping)["rows"]["dropped"]) == (0, 1)
    assert problems(dropping, "warning")[0].endswith(expected)


def test_pairs_of_one_question_make_grouping_worth_it(check: Callable[..., Summary], tmp_path: Path) -> None:
    write_pairs(tmp_path)
    sharing = found(check(per_device_train_batch_size=2))["sharing"]
    assert sharing["group_by_question"]["unique_tokens"] < sharing["rows at random"]["unique_tokens"]
    assert sharing["rows at random"]["fewer_tokens"] > 1.5  # a pair's own prompt


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deepspeed": "no/such.json"}, "`deepspeed: no/such.json` cannot be read"),
        ({"train": ["vision", "head"]}, "the parts of a model are vision, projector, llm"),
        ({"label_smoothing": 0.1}, "`label_smoothing=0.1` cannot be used here"),
        ({"gpu": "abacus"}, "choose one of a10, a100"),
        ({"gpus": 0}, "it must be more than 0"),
        ({"model_name_or_path": "nobody/nothing"}, "hf download nobody/nothing config.json"),
        ({"lora_parts": ["llm"]}, "add `use_peft: true`"),
    ],
)
def test_settings_that_mean_nothing_are_bad_input(
    check: Callable[..., Summary], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    write_pairs(tmp_path, 2)
    with pytest.raises(InputError, match=message):
        check(**settings)


def test_a_gpu_config_is_checked_on_a_machine_without_one(check: Callable[..., Summary], tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    quantized = {"use_peft": True, "load_in_4bit": True, "tf32": True}
    plan = found(check(**quantized, deepspeed=str(ROOT / "configs/deepspeed/zero2.json")))
    assert plan["setup"]["quantized_bytes"] == 0.5625
    assert not plan["setup"]["reference"]


def test_an_adapter_that_is_trained_on_is_counted_as_one(
    check: Callable[..., Summary], tiny: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path, 2)
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    AutoProcessor.from_pretrained(tiny).save_pretrained(tmp_path / "adapter")
    plan = found(check(model_name_or_path=str(tmp_path / "adapter")))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert plan["parameters"]["trained"] == trained
    assert plan["memory"]["reference"] == 0


def test_a_plan_can_also_be_written_beside_the_tables(check: Callable[..., Summary], tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    check()
    path = tmp_path / "plan.json"
    summary = run_verb("check", ["--config", str(tmp_path / "train.yaml"), "--json", str(path)])
    assert summary.text is None
    assert json.loads(path.read_text())["ok"] is True


def test_a_sample_keeps_whole_questions_and_does_not_depend_on_order(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 40)
    sample = collect([str(path)], str(tmp_path), limit=10).sample
    questions = [row["prompt"][0]["content"] for row in sample]
    assert len(sample) == 10
    assert {questions.count(question) for question in questions} == {2}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, rows[::-1])
    again = [row["prompt"][0]["content"] for row in collect([str(path)], str(tmp_path), limit=10).sample]
    assert sorted(again) == sorted(questions)


def test_tables_are_surveyed_as_json_lines_are(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 4)
    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    table = [
        {"images": row["images"], **{name: [{"role": role, "content": row[name]}] for name, role in turns.items()}}
        for row in rows
    ]
    Dataset.from_list(table).to_parquet(str(tmp_path / "pairs.parquet"))
    of_lines, of_table = (
        collect([str(tmp_path / name)], str(tmp_path), limit=9) for name in ("pairs.jsonl", "pairs.parquet")
    )
    assert of_table.num_rows == of_lines.num_rows == 4
    assert list(of_table.sample) == list(of_lines.sample)


@pytest.mark.parametrize("family", ["internvl", "llava", "qwen2_5_vl", "idefics3"])
def test_sharing_is_what_the_collator_makes_of_the_same_rows(family: str, tmp_path: Path) -> None:
    tiny_models.build(family, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    path = write_pairs(tmp_path, 4)
    sample = collect([str(path)], str(tmp_path), limit=9).sample
    measured = measure(sample, processor, lambda size: 0, merge=1.0, tile_patches=None, max_length=None)
    found = share(measured, batch_size=4, grouped=True)
    image_token = tiny_models.FAMILIES[family]()[1].config.image_token_id
    batch = ForestCollator(processor, image_token_id=image_token)([sample[row] for row in range(4)])
    assert found.plain.tokens == int(batch["lengths"].sum())
    padding = batch["input_ids"] == processor.tokenizer.pad_token_id
    assert found.shared.tokens == int((~padding).sum())
    assert found.shared.visible == int((batch["positions"] + 1)[~padding].sum())
    assert found.shared.scored == int((batch["shift_labels"] != -100).sum())


def test_rows_at_random_share_as_little_in_a_sample_as_in_all_rows(tmp_path: Path) -> None:
    tiny_models.build("llava", tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    sample = collect([str(write_pairs(tmp_path, 12))], str(tmp_path), limit=12).sample
    measured = measure(sample, processor, lambda size: 0, merge=1.0, tile_patches=None, max_length=None)
    whole = share(measured, batch_size=12, grouped=False)
    one_of_twelve = share(measured, batch_size=12, grouped=False, part=1 / 12)
    alone = share(measured, batch_size=1, grouped=False)
    assert whole.shared.tokens < alone.shared.tokens == one_of_twelve.shared.tokens
    assert whole.largest == one_of_twelve.largest


def test_the_largest_micro_batch_is_of_different_questions_where_rows_come_at_random(tmp_path: Path) -> None:
    tiny_models.build("llava", tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    path = write_pairs(tmp_path, 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [*({**row, "prompt": row["prompt"] + " Long!"} for row in rows[:2]), *rows[2:]])
    sample = collect([str(path)], str(tmp_path), limit=4).sample
    measured = measure(sample, processor, lambda size: 0, merge=1.0, tile_patches=None, max_length=None)
    assert share(measured, batch_size=2, grouped=False).largest.rows == 2  # one tree each


@pytest.mark.parametrize(
    ("size", "tiles"),
    [((448, 448), 1), ((896, 448), 3), ((1200, 800), 7), ((4000, 3000), 13), ((300, 3000), 11)],
)
def test_pictures_are_counted_by_internvls_tiling_where_no_processor_is(size: tuple[int, int], tiles: int) -> None:
    architecture = find_architecture("OpenGVLab/InternVL3-8B-hf")
    model = draw(*architecture, prepare=lambda model: model).model
    count = picture_counter(model, ["OpenGVLab/InternVL3-8B-hf"])
    assert (tile_of(model).patches, tile_of(model).tokens) == (1025, 256)
    assert count(size) == 256 * tiles


def test_an_estimate_is_near_the_processors_count(tmp_path: Path) -> None:
    tiny_models.build("internvl", tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    sample = collect([str(write_pairs(tmp_path, 4))], str(tmp_path), limit=9).sample
    model = tiny_models.internvl()[1]
    count = picture_counter(model, [str(tmp_path / "model")])
    found = measure(sample, None, count, merge=5.0, tile_patches=5, max_length=None)
    assert found.estimated
    markers = 2  # <img> and </img>
    assert (found.lengths.image + markers).tolist() == measure_rows(sample, processor).image.tolist()


LAYER = Stack(layers=4, width=64, inner=256, queries=64, keys=64, heads=4, weights=10**6)
SIZES = Sizes(LAYER, None, vocabulary=100, total=10**6, trained=10**6, head_trained=False)
HALF = Precision(half=True, dtype="float32")
USUAL = {"gpus": 8, "width": 64, "optimizer": "adamw_torch", "reference": True, "attention": "sdpa"}


def test_autocast_computes_in_bf16_beside_float32_weights() -> None:
    setup = place(HALF, None, checkpointing=True, **USUAL)
    assert (setup.weight_bytes, setup.stream_bytes, setup.compute_bytes) == (4, 4, 2)
    assert (setup.master, setup.state_bytes) == (False, 8)


@pytest.mark.parametrize(("name", "stage", "offloads"), [("zero1", 1, 0), ("zero3", 3, 0), ("zero3_offload", 3, 1)])
def test_deepspeeds_configs_are_read(name: str, stage: int, offloads: int) -> None:
    config = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())
    setup = place(HALF, config, checkpointing=True, **USUAL)
    assert (setup.stage, setup.offload_optimizer, setup.offload_weights) == (stage, offloads, offloads)
    assert (setup.weight_bytes, setup.master) == (2, True)
    assert setup.gathered == (10**9 if stage == 3 else 0)


def test_adapters_are_kept_in_float32_but_beside_quantized_weights() -> None:
    adapters = replace(HALF, dtype="bfloat16", adapters=True)
    assert place(adapters, None, checkpointing=True, **USUAL).trained_bytes == 4
    quantized = replace(adapters, quantized_bytes=0.5625)
    assert place(quantized, None, checkpointing=True, **USUAL).trained_bytes == 2


def batches(size: int) -> Batch:
    return Batch(size, 1000, 10)


def test_one_change_is_enough_where_one_is() -> None:
    setup = Setup(checkpointing=False, reference=False, accelerator=False)
    need = estimate_memory(SIZES, batches(8), setup).total
    changes, together = make_fit(SIZES, batches, setup, batch_size=8, accumulation=2, limit=0.9 * need)
    assert not together
    assert "per_device_train_batch_size: 1 with gradient_accumulation_steps: 16" in [c.text for c in changes]
    assert all(change.memory.total <= 0.9 * need for change in changes)


def test_several_changes_are_named_where_one_is_not_enough() -> None:
    setup = Setup(gpus=8, checkpointing=False)
    need = estimate_memory(SIZES, batches(64), setup).total
    limit = estimate_memory(SIZES, batches(1), replace(setup, checkpointing=True, reference=False)).total
    changes, together = make_fit(SIZES, batches, setup, batch_size=64, accumulation=1, limit=limit)
    assert together
    assert changes[0].text == "bf16: true"
    assert changes[-1].memory.total <= limit < need


@pytest.mark.parametrize(
    ("settings", "setup", "adapters", "message"),
    [
        ({"dtype": "bfloat16"}, {"trained_bytes": 2}, False, "swallow the updates"),
        ({"load_in_4bit": True}, {"quantized_bytes": 0.5}, False, "cannot be trained"),
        ({"load_in_4bit": True}, {"quantized_bytes": 0.5, "stage": 3}, True, "ZeRO-3 cannot shard"),
    ],
)
def test_settings_that_would_spoil_a_run_are_errors(
    settings: dict[str, Any], setup: dict[str, Any], adapters: bool, message: str
) -> None:
    texts = [p.what for p in setting_problems(ModelConfig(**settings), Setup(**setup), has_adapters=adapters)]
    assert any(message in text for text in texts)


def test_versions_outside_of_their_range_are_errors_and_optional_packages_may_be_missing() -> None:
    numpy, nothing = check_versions(["numpy", "no-such-package"], ["numpy<1", "no-such-package>=2"])
    assert (numpy.fits, nothing.fits, nothing.version) == (False, False, None)
    absent = Installed("deepspeed", None, ">=0.18", fits=False)
    assert [p.what for p in version_problems([numpy], needed=[])] == [
        f"numpy {np.__version__} is installed, and mpo needs <1."
    ]
    assert version_problems([absent], needed=[]) == []
    assert "deepspeed is missing" in version_problems([absent], needed=["deepspeed"])[0].what


def test_work_adds_up() -> None:
    assert Work(1, 2, 3) + Work(10, 20, 30, 40).times(2) == Work(21, 42, 63, 80, 0)


def test_tiles_that_are_not_counted_are_said() -> None:
    (problem,) = tiling_problems(Tiling("mm1_5", n_min=4, n_max=9))
    assert problem.severity == "warning"
    assert "cuts each picture into 4 to 9 tiles" in problem.what
    assert "up to 10 times" in problem.fix
    assert tiling_problems(None) == []
