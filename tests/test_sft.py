"""`mpo sft` and its trainer: what is learned and weighed, packed rows against padded ones, stages, rates and tiles."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from conftest import QUIET_TRAINING, task_pairs
from datasets import Dataset, Features, Image, Json, List
from faulty_server import FaultyServer
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import FAMILIES, build, picture
from tiny_runs import save_models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaNextConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from data_builders.hf_sampler import HFSampler
from data_builders.images import load_image
from data_builders.records import InputError, Row, Summary
from data_builders.samplers import Request, SamplingSettings
from data_builders.server_sampler import ServerSampler
from data_builders.shards import read_rows, write_rows
from mpo.cli import run_verb
from mpo.config import SFTConfig
from mpo.data import sft_dataset
from mpo.learning_rates import mm1_rates, rates_of
from mpo.memory import release
from mpo.models import set_own_tiling, tiles_pictures
from mpo.settings import read_values
from mpo.sft import CONFIGS, plan_stages
from mpo.sft_trainer import SFTTrainer
from mpo.tiled_data import read_tiling
from mpo.tiled_data import tiled as with_tiles
from mpo.tiling import Tiling, load_tiling

SETTINGS: dict[str, Any] = {
    **QUIET_TRAINING,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "optim": "sgd",  # weights then differ by gradients, not by their signs
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
}
MESSAGES = List(Json())
ANSWERED = Features({"images": List(Image()), "prompt": MESSAGES, "completion": MESSAGES})
ROOT = Path(__file__).parent.parent


def user(text: str, num_pictures: int | None = None) -> dict[str, Any]:
    """A user's message; with a number, in parts that end with so many places."""
    if num_pictures is None:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [{"type": "text", "text": text}, *[{"type": "image"}] * num_pictures]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def answered(answers: tuple[str, ...] = ("a", "bbbbb", "c" * 12, "d" * 7)) -> Dataset:
    """Rows with one picture, two of different sizes, none and one, and so on; each with a short question."""
    sizes = (((40, 56),), ((64, 32), (28, 28)), (), ((28, 28),))
    rows = [
        {
            "images": [picture(10 * row + place, size) for place, size in enumerate(sizes[row % 4])],
            "prompt": [user(f"Question {row}?")],
            "completion": [assistant(answer)],
        }
        for row, answer in enumerate(answers)
    ]
    return Dataset.from_list(rows, features=ANSWERED)


def talks() -> Dataset:
    """Conversations of two turns, with a picture in each, with one in the second, and with none."""
    rows = [
        {
            "images": [picture(1), picture(2, (64, 32))],
            "messages": [user("One ", 1), assistant("It is."), user("Two ", 1), assistant("They are.")],
        },
        {
            "images": [picture(3, (28, 28))],
            "messages": [user("Hi", 0), assistant("Hello."), user("See ", 1), assistant("Yes.")],
        },
        {"images": [], "messages": [{"role": "system", "content": "Be short."}, user("Well?"), assistant("Well.")]},
    ]
    return Dataset.from_list(rows, features=Features({"images": List(Image()), "messages": MESSAGES}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family, saved; and `text`, a language model."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        build(name, root / name)
    return {name: root / name for name in FAMILIES} | {"text": save_models(root / "others")["text"].folder}


def make(folder: Path, dataset: Dataset, output: Path, kind: type = SFTTrainer, **settings: Any) -> Any:
    args = (SFTConfig if kind is SFTTrainer else trl.SFTConfig)(str(output), **{**SETTINGS, **settings})
    is_text = folder.name == "text"
    model = (AutoModelForCausalLM if is_text else AutoModelForImageTextToText).from_pretrained(folder)
    processor = (AutoTokenizer if is_text else AutoProcessor).from_pretrained(folder)
    return kind(model, args, train_dataset=dataset, processing_class=processor)


def trained(*arguments: Any, **settings: Any) -> Any:
    trainer = make(*arguments, **settings)
    trainer.train()
    return trainer


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def distance(left: Any, right: Any) -> float:
    """The largest difference between the weights of two models."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def check_same_step(found: Any, expected: Any, start: Path) -> None:
    """The same losses and the same weights, which have moved."""
    assert losses_of(found) == pytest.approx(losses_of(expected), abs=2e-5)
    assert distance(found.model, expected.model) < 3e-6
    assert distance(expected.model, type(expected.model).from_pretrained(start)) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_give_the_loss_and_the_step_of_trls_padded_ones(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    theirs = trained(folders[name], answered(), tmp_path / "trl", trl.SFTTrainer)
    packed = trained(folders[name], answered(), tmp_path / "packed", packing=True)
    assert packed.notes == []
    check_same_step(packed, theirs, folders[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_conversations_give_the_step_of_padded_ones(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    padded = trained(folders[name], talks(), tmp_path / "padded", per_device_train_batch_size=3)
    packed = trained(folders[name], talks(), tmp_path / "packed", per_device_train_batch_size=3, packing=True)
    check_same_step(packed, padded, folders[name])


def test_packed_texts_give_the_step_of_trls_padded_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": [user(f"{row}?")], "completion": [assistant("x" * (3 + 5 * row))]} for row in range(4)]
    theirs = trained(folders["text"], Dataset.from_list(rows), tmp_path / "trl", trl.SFTTrainer)
    packed = trained(folders["text"], Dataset.from_list(rows), tmp_path / "packed", packing=True)
    check_same_step(packed, theirs, folders["text"])
    plain = Dataset.from_list([{"text": "one two three"}, {"text": "four"}])
    theirs = trained(folders["text"], plain, tmp_path / "trl", trl.SFTTrainer, per_device_train_batch_size=2)
    packed = trained(folders["text"], plain, tmp_path / "packed", packing=True, per_device_train_batch_size=2)
    check_same_step(packed, theirs, folders["text"])


def test_a_packed_batch_has_no_padding_and_its_rows_are_bounded(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [answered()[index] for index in range(4)]
    padded = make(folders["llava"], answered(), tmp_path, loss_reduction="sample").data_collator(rows)
    lengths = padded["attention_mask"].sum(dim=1).tolist()
    packed = make(folders["llava"], answered(), tmp_path, packing=True).data_collator(rows)
    assert packed["input_ids"].shape == (1, sum(lengths))
    assert packed["lengths"].tolist() == lengths
    assert packed["completion_mask"].sum(dim=1).tolist() == padded["completion_mask"].sum(dim=1).tolist()
    bounded = make(folders["llava"], answered(), tmp_path, packing=True, max_forest_tokens=2 * max(lengths))
    assert bounded.data_collator(rows)["input_ids"].shape[1] <= 2 * max(lengths)
    assert bounded.data_collator(rows)["input_ids"].shape[0] == 2
    one = trained(folders["llava"], answered(), tmp_path / "one", packing=True)
    two = trained(folders["llava"], answered(), tmp_path / "two", packing=True, max_forest_tokens=2 * max(lengths))
    check_same_step(two, one, folders["llava"])


def test_rows_that_are_tokenized_already_keep_their_masks(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]},
        {"input_ids": [5, 6, 7, 8]},
    ]
    collator = make(folders["text"], Dataset.from_list(rows[2:]), tmp_path, packing=True).data_collator
    learned = [collator([row])["completion_mask"].sum().item() for row in rows]
    assert learned == [1, 1, 3]  # of a row that is learned whole all but the first, which nothing predicts


def test_tools_may_be_json_as_trl_takes_them(folders: dict[str, Path], tmp_path: Path) -> None:
    segmenter = make(
        folders["text"], Dataset.from_list([{"text": "a"}]), tmp_path, packing=True
    ).data_collator.segmenter
    segmenter.processor.chat_template = "{{ tools[0].name }}:" + segmenter.processor.chat_template
    row = {"messages": [user("a"), assistant("b")], "tools": '[{"name": "look"}]'}
    assert segmenter(row)[0].text.startswith("look:")


def learned_texts(trainer: Any, row: dict[str, Any]) -> list[str]:
    """The runs of tokens that are learned, as text."""
    batch = trainer.data_collator([row])
    ids, learned = batch["input_ids"][0].tolist(), batch["completion_mask"][0].tolist()
    runs, before = [], 0
    for id, is_learned in zip(ids, learned, strict=True):
        if is_learned and not before:
            runs.append([])
        if is_learned:
            runs[-1].append(id)
        before = is_learned
    return [trainer._tokenizer.decode(run) for run in runs]


def test_only_what_the_assistant_says_is_learned_with_the_end_of_its_turn(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    trainer = make(folders["internvl"], talks(), tmp_path)
    assert "endgeneration" not in trainer.processing_class.chat_template  # TRL would refuse it
    assert learned_texts(trainer, talks()[0]) == ["It is.<|im_end|>\n", "They are.<|im_end|>\n"]
    assert learned_texts(trainer, talks()[1]) == ["Hello.<|im_end|>\n", "Yes.<|im_end|>\n"]
    assert learned_texts(trainer, talks()[2]) == ["Well.<|im_end|>\n"]
    whole = make(folders["llava"], talks(), tmp_path, assistant_only_loss=False)
    (text,) = learned_texts(whole, talks()[2])
    assert text.startswith("<|im_start|>system\nBe short.")


def test_earlier_answers_of_a_prompt_are_learned_if_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    row = {"images": [], "prompt": [user("A?"), assistant("B."), user("C?")], "completion": [assistant("D.")]}
    rows = Dataset.from_list([row], features=ANSWERED)
    last = make(folders["llava"], rows, tmp_path, packing=False, loss_reduction="sample")
    assert learned_texts(last, rows[0]) == ["D.<|im_end|>\n"]
    every = make(folders["llava"], rows, tmp_path, assistant_only_loss=True)
    assert learned_texts(every, rows[0]) == ["B.<|im_end|>\n", "D.<|im_end|>\n"]


def test_rows_of_both_shapes_are_read_in_one_batch(folders: dict[str, Path], tmp_path: Path) -> None:
    columns = {"images": List(Image()), "prompt": MESSAGES, "completion": MESSAGES, "messages": MESSAGES}
    rows = [{**answered()[0], "messages": None}, {**talks()[1], "prompt": None, "completion": None}]
    both = Dataset.from_list(rows, features=Features(columns))
    trainer = trained(folders["llava"], both, tmp_path, per_device_train_batch_size=2)
    assert losses_of(trainer)[0] > 1
    assert learned_texts(trainer, both[0]) == ["a<|im_end|>\n"]


def test_everything_is_trls_where_nothing_else_is_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = trained(folders["llava"], answered(), tmp_path / "ours", max_steps=2)
    theirs = trained(folders["llava"], answered(), tmp_path / "trl", trl.SFTTrainer, max_steps=2)
    assert losses_of(ours) == losses_of(theirs)
    assert distance(ours.model, theirs.model) == 0
    assert type(ours.data_collator) is type(theirs.data_collator)


def test_a_model_that_takes_no_forest_pads_and_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    theirs = trained(folders["qwen2_vl"], answered(), tmp_path / "trl", trl.SFTTrainer)
    args = SFTConfig(str(tmp_path / "ours"), **SETTINGS, packing=True)
    model = AutoModelForImageTextToText.from_pretrained(folders["qwen2_vl"])
    model.config.model_type = "other"
    processor = AutoProcessor.from_pretrained(folders["qwen2_vl"])
    trainer = SFTTrainer(model, args, train_dataset=answered(), processing_class=processor)
    (note,) = trainer.notes
    assert note.startswith("Rows are not packed: other is not among the families")
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses_of(theirs), abs=2e-5)


ANSWERS = tuple("x" * length for length in (1, 4, 9, 16, 2, 7, 30, 3))


def nll_by_row(folder: Path, dataset: Dataset, tmp_path: Path) -> list[tuple[float, int]]:
    """For each row -log p of its answer and the number of its tokens, by TRL's collator and a bare forward."""
    trainer = make(folder, dataset, tmp_path, trl.SFTTrainer)
    found = []
    for row in dataset:
        batch = trainer.data_collator([row])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = trainer.model(**batch).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")
        found.append((nll.item(), int((labels != -100).sum())))
    return found


@pytest.mark.parametrize(("reduction", "power"), [("token", 0.0), ("sample", -1.0), ("square", -0.5)])
@pytest.mark.parametrize("packing", [False, True])
def test_weights_are_those_of_the_formula(
    reduction: str, power: float, packing: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = answered(ANSWERS)
    by_row = nll_by_row(folders["llava"], rows, tmp_path)
    expected = sum(nll * x**power for nll, x in by_row) / sum(x * x**power for _, x in by_row)
    settings = {"loss_reduction": reduction, "packing": packing, "per_device_train_batch_size": 8}
    assert losses_of(trained(folders["llava"], rows, tmp_path, **settings)) == pytest.approx([expected], abs=2e-5)


def on_two_ranks(folder: Path, dataset: Dataset, tmp_path: Path, **settings: Any) -> tuple[list[float], Any]:
    """Losses and the trained model of two ranks."""
    dataset.save_to_disk(tmp_path / "data")
    plan = {"model": str(folder), "dataset": str(tmp_path / "data"), "result": str(tmp_path / "losses.json")}
    plan["settings"] = {**SETTINGS, **settings, "output_dir": str(tmp_path / "ranks"), "dataloader_pin_memory": False}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "sft_ranks.py"), str(tmp_path / "plan.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ranks")
    return json.loads((tmp_path / "losses.json").read_text()), model


@pytest.mark.parametrize("packing", [False, True])
def test_square_weights_are_the_same_for_1_x_8_2_x_4_and_two_ranks(
    packing: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    rows, settings = answered(ANSWERS), {"loss_reduction": "square", "packing": packing}
    whole = trained(folders["llava"], rows, tmp_path / "8", **settings, per_device_train_batch_size=8)
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    check_same_step(trained(folders["llava"], rows, tmp_path / "4", **settings, **steps), whole, folders["llava"])
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    check_same_step(trained(folders["llava"], rows, tmp_path / "1", **settings, **single), whole, folders["llava"])
    losses, model = on_two_ranks(folders["llava"], rows, tmp_path, **settings, per_device_train_batch_size=4)
    assert losses == pytest.approx(losses_of(whole), abs=2e-5)
    assert distance(model, whole.model) < 3e-6


def test_zero_3_takes_the_same_step_where_micro_batches_have_no_picture(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {"loss_reduction": "square", "packing": True}
    whole = trained(folders["llava"], answered(ANSWERS), tmp_path / "8", **settings, per_device_train_batch_size=8)
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    single["deepspeed"] = {**dict.fromkeys(sizes, "auto"), "zero_optimization": zero}
    losses, model = on_two_ranks(folders["llava"], answered(ANSWERS), tmp_path, **settings, **single)
    assert losses == pytest.approx(losses_of(whole), abs=2e-5)
    assert distance(model, whole.model) < 3e-6


def test_a_trainer_that_is_done_gives_its_memory_back(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = trained(folders["llava"], answered(), tmp_path, optim="adamw_torch")
    held = [*trainer.model.parameters(), *trainer.model.buffers()]
    held += [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert sum(tensor.numel() for tensor in held) > 100_000
    release(trainer)
    assert sum(tensor.numel() for tensor in held) == 0


def test_adapters_learn_the_same_from_packed_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for packing in (True, False):
        args = SFTConfig(str(tmp_path), **SETTINGS, packing=packing, loss_reduction="sample")
        torch.manual_seed(0)  # adapters are drawn
        trainer = SFTTrainer(
            AutoModelForImageTextToText.from_pretrained(folders["qwen2_5_vl"]),
            args,
            train_dataset=answered(),
            processing_class=AutoProcessor.from_pretrained(folders["qwen2_5_vl"]),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )
        assert trainer.notes == []
        trainer.train()
        found.append(trainer)
    assert losses_of(found[0]) == pytest.approx(losses_of(found[1]), abs=2e-5)
    assert distance(found[0].model, found[1].model) < 3e-6


def refused(folder: Path, dataset: Dataset, output: Path, message: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        trained(folder, dataset, output, **settings)


def test_what_cannot_be_packed_or_weighed_is_refused_with_a_reason(folders: dict[str, Path], tmp_path: Path) -> None:
    llava = folders["llava"]
    refused(llava, answered(), tmp_path, "cannot be used with `loss_type='dft'`", packing=True, loss_type="dft")
    refused(
        llava,
        answered(),
        tmp_path,
        "`packing_strategy='wrapped'` splits rows",
        packing=True,
        packing_strategy="wrapped",
    )
    refused(llava, answered(), tmp_path, "must be token, sample or square, got 'mean'", loss_reduction="mean")
    refused(llava, talks(), tmp_path, "cannot be used with `label_smoothing_factor`", label_smoothing_factor=0.1)
    silent = Dataset.from_list([{"images": [], "messages": [user("Hi")]}], features=talks().features)
    refused(llava, silent, tmp_path, "has no assistant's turn", per_device_train_batch_size=1)
    with pytest.raises(TypeError, match="`args` must be `mpo.SFTConfig`, got SFTConfig"):
        SFTTrainer(llava, trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=answered())


def test_a_row_that_max_length_would_spoil_is_named_with_what_helps(folders: dict[str, Path], tmp_path: Path) -> None:
    rows, llava = answered(), folders["llava"]
    batch = make(llava, rows, tmp_path, packing=True).data_collator([rows[1]])
    total, answer = int(batch["lengths"][0]), int(batch["completion_mask"].sum())
    refused(llava, rows, tmp_path, "would cut its pictures. Set `max_length` to at least", packing=True, max_length=8)
    message = f"has {total} tokens, .* leave nothing of its answer. Set `max_length` to at least {total - answer + 1} "
    refused(llava, rows.select([1]), tmp_path, message, packing=True, max_length=total - answer)
    kept = make(llava, rows, tmp_path, packing=True, max_length=total - answer + 2).data_collator([rows[1]])
    assert kept["completion_mask"].sum() == 2


def test_a_template_that_says_earlier_turns_in_another_way_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    trainer = make(folders["llava"], talks(), tmp_path)
    trainer.processing_class.chat_template = (
        "{% for message in messages %}{{ message.role if loop.last else '?' }}"
        "{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match="writes a conversation's earlier turns in another way"):
        trainer.data_collator([{"images": [], "messages": [user("a"), assistant("b"), user("c"), assistant("d")]}])


def test_ranks_that_share_a_model_all_see_a_picture_that_counts_nowhere(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = answered()
    for packing in (True, False):
        settings = {"packing": packing, "loss_reduction": "sample"}
        collator = make(folders["qwen2_vl"], rows, tmp_path, **settings).data_collator
        plain = collator([rows[2]])
        collator.stand_in = picture(5)
        batch = collator([rows[2]])
        assert "pixel_values" in batch
        assert "pixel_values" not in plain
        assert batch["completion_mask"].sum(dim=1).tolist() == [*plain["completion_mask"].sum(dim=1).tolist(), 0]
        assert collator([rows[0]])["completion_mask"].shape[0] == 1


@pytest.mark.parametrize(
    ("size", "rate"), [(1.2e9, "8.58e-05"), (3e9, "5.83e-05"), (7e9, "4.08e-05"), (30e9, "2.21e-05")]
)
def test_mm1s_rule_gives_the_published_rates(size: float, rate: str) -> None:
    rates = mm1_rates(size)
    assert f"{rates.learning_rate:.2e}" == rate
    assert rates.weight_decay == pytest.approx(0.1 * rates.learning_rate)


def test_mm1s_rule_counts_the_language_model_without_its_embeddings(folders: dict[str, Path]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folders["llava"])
    # two layers of width 32: q and o 32 x 32, k and v 16 x 32, three of 64 x 32, two norms; and the last norm
    assert rates_of({"rule": "mm1"}, model) == mm1_rates(2 * (2 * 1024 + 2 * 512 + 3 * 2048 + 64) + 32)
    assert rates_of({"rule": "mm1", "parameters": 7e9}, model) == mm1_rates(7e9)
    for wrong in ({"rule": "mm2"}, {"rule": "mm1", "size": 7}, {"rule": "mm1", "parameters": "7B"}, {}):
        with pytest.raises(InputError, match="`lr`"):
            rates_of(wrong, model)


def sft(task: Path, output: Path, **settings: Any) -> Summary:
    quiet = {name: value for name, value in QUIET_TRAINING.items() if name != "save_strategy"}
    given = {**quiet, "model_name_or_path": str(task / "model"), "image_root": str(task), "output_dir": str(output)}
    given |= {"data": str(task / "sft.jsonl"), "max_steps": 2, "per_device_train_batch_size": 4, **settings}
    words = [(f"--{name}", value if isinstance(value, str) else json.dumps(value)) for name, value in given.items()]
    return run_verb("sft", [word for pair in words for word in pair])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], part: str = "") -> bool:
    return all(torch.equal(left[name], right[name]) for name in left if part in name)


STAGES = [
    {"name": "align", "train": ["projector"], "lr": {"rule": "mm1"}, "max_steps": 3},
    {
        "name": "single_image",
        "train": ["vision", "projector", "llm"],
        "part_learning_rates": {"vision": 1e-4},
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "packing": True,
        "loss_reduction": "square",
    },
]


@pytest.fixture(scope="module")
def chain(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages that nothing has stopped."""
    output = tmp_path_factory.mktemp("chain") / "whole"
    summary = sft(task, output, stages=STAGES)
    assert [row[0] for row in summary.rows] == ["align", "single_image"]
    assert summary.next_command.startswith(f"mpo sample --model {output}/single_image")
    return output


def test_each_stage_starts_from_the_last_and_trains_its_own_parts(task: Path, chain: Path) -> None:
    start, align, single = weights(task / "model"), weights(chain / "align"), weights(chain / "single_image")
    assert same(start, align, "vision_tower")
    assert same(start, align, "language_model")
    assert not same(start, align, "projector")
    assert not same(align, single, "vision_tower")
    settings = json.loads((chain / "single_image" / "settings.json").read_text())
    assert settings["model_name_or_path"] == str(chain / "align")
    first = json.loads((chain / "align" / "settings.json").read_text())
    model = AutoModelForImageTextToText.from_pretrained(task / "model")
    assert first["learning_rate"] == pytest.approx(rates_of({"rule": "mm1"}, model).learning_rate)
    assert first["weight_decay"] == 0.0  # which is set, in QUIET_TRAINING
    assert settings["learning_rate"] == QUIET_TRAINING["learning_rate"]


@pytest.mark.parametrize("stopped_at", [2, 6])
def test_a_chain_that_is_stopped_in_any_stage_ends_with_the_same_models(
    stopped_at: int, task: Path, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    train_step = SFTTrainer.training_step

    def stopping(self: Any, *arguments: Any, **more: Any) -> Any:
        steps.append(self.args.output_dir)
        if len(steps) == stopped_at:
            raise KeyboardInterrupt
        return train_step(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            sft(task, tmp_path / "stopped", stages=STAGES)
    before = len(list((tmp_path / "stopped").glob("*/model.safetensors")))
    assert before == (0 if stopped_at == 2 else 1)
    sft(task, tmp_path / "stopped", stages=STAGES)
    for name in ("align", "single_image"):
        assert same(weights(chain / name), weights(tmp_path / "stopped" / name))


def test_a_chain_that_is_done_is_left_alone_and_other_settings_are_refused(task: Path, chain: Path) -> None:
    before = (chain / "align" / "model.safetensors").stat().st_mtime_ns
    sft(task, chain, stages=STAGES)
    assert (chain / "align" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="stage 'align' .* was run with other settings"):
        sft(task, chain, stages=[{**STAGES[0], "max_steps": 9}, STAGES[1]])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"max_steps": 1}], "stage 1 of `stages` has the name None"),
        ([{"name": "../up"}], r"has the name '\.\./up'"),
        ([{"name": "a"}, {"name": "a"}], "has 'a' twice"),
        ([{"name": "a", "output_dir": "x"}], "stage 'a' sets `stages` or `output_dir`"),
        ([{"name": "a", "learning_rat": 1}], "unknown setting `learning_rat`"),
        ([{"name": "a", "learning_rate": 1e-3, "lr": {"rule": "mm1"}}], "both `lr` and `learning_rate`"),
    ],
)
def test_stages_that_cannot_be_run_are_refused_with_a_reason(
    stages: list[Row], message: str, task: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        sft(task, tmp_path / "out", stages=stages)


def stages_of(recipe: str) -> dict[str, Row]:
    """What each stage of a recipe sets, checked as the command line checks it."""
    argv = ["--config", str(ROOT / "configs" / recipe / "sft.yaml")]
    given = {name: value for part in read_values("sft", CONFIGS, argv) for name, value in part.items()}
    planned = {stage.name: read_values("sft", CONFIGS, stage.argv) for stage in plan_stages(given)}
    return {name: {key: value for part in values for key, value in part.items()} for name, values in planned.items()}


def test_mammoth_vls_stages_are_the_papers() -> None:
    stages = stages_of("mammoth_vl")
    assert list(stages) == ["align", "single_image", "one_vision"]
    sizes = [8 * s["per_device_train_batch_size"] * s["gradient_accumulation_steps"] for s in stages.values()]
    assert sizes == [512, 256, 256]
    assert [s["train"] for s in stages.values()] == [["projector"], *[["vision", "projector", "llm"]] * 2]
    assert [s["learning_rate"] for s in stages.values()] == [1e-3, 1e-5, 1e-5]
    assert [s.get("part_learning_rates") for s in stages.values()] == [None, {"vision": 2e-6}, {"vision": 2e-6}]
    assert [s["max_length"] for s in stages.values()] == [8192, 8192, 16384]
    assert {(s["num_train_epochs"], s["warmup_steps"], s["weight_decay"]) for s in stages.values()} == {(1, 0.03, 0)}


def test_the_stages_of_mm1_and_mm1_5_take_its_rule_and_its_tiles() -> None:
    assert list(stages_of("mm1")) == ["pretrain", "sft"]
    assert stages_of("mm1")["pretrain"]["lr"] == {"rule": "mm1"}
    stages = stages_of("mm1_5")
    assert list(stages) == ["pretrain", "continual", "sft"]
    assert stages["pretrain"]["lr"] == {"rule": "mm1"}
    assert "tiling" not in stages["pretrain"]
    for name in ("continual", "sft"):
        tiling = read_tiling(stages[name]["tiling"])
        assert (tiling.rule, tiling.n_min, tiling.n_max) == ("mm1_5", 4, 9)


TILING = {"rule": "mm1_5", "n_min": 2, "n_max": 4, "indicator": "index", "side": 32}


def test_tiles_are_cut_for_training_and_for_sampling_alike_and_are_kept_with_the_model(
    task: Path, tmp_path: Path
) -> None:
    sft(task, tmp_path / "tiled", tiling=TILING, save_strategy="steps", save_steps=1)
    for folder in ("tiled", "tiled/checkpoint-1"):
        assert load_tiling(tmp_path / folder) == Tiling(**TILING)
    row = next(read_rows(task / "sft.jsonl"))
    whole = HFSampler(str(task / "model"), image_root=task, batch_size=2)
    tiled = HFSampler(str(tmp_path / "tiled"), image_root=task, batch_size=2)
    request = Request(row["prompt"][0]["content"], tuple(row["images"]))
    (plan,) = Tiling(**TILING).plans([load_image(task, row["images"][0]).size])
    assert whole._encode([request])["pixel_values"].shape[0] == 1
    assert tiled._encode([request])["pixel_values"].shape[0] == plan.num_views > 2
    assert "(1,1,1)" in tiled.tokenizer.decode(tiled._encode([request])["input_ids"][0])
    assert tiled.sample([request], 1, SamplingSettings(temperature=0, max_new_tokens=2))[0][0].error is None
    collated = sft_dataset([task / "sft.jsonl"], task)
    assert len(with_tiles(collated, Tiling(**TILING))[0]["images"]) == plan.num_views


def test_the_next_run_and_pairs_take_the_tiles_that_a_model_was_trained_on(task: Path, tmp_path: Path) -> None:
    sft(task, tmp_path / "tiled", tiling=TILING)
    sft(task, tmp_path / "next", model_name_or_path=str(tmp_path / "tiled"), packing=True)
    assert load_tiling(tmp_path / "next") == Tiling(**TILING)
    write_rows(tmp_path / "pairs.jsonl", task_pairs(task, 4))
    given = {"model_name_or_path": tmp_path / "next", "data": tmp_path / "pairs.jsonl", "image_root": task}
    given |= {"output_dir": tmp_path / "mpo", "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": "true"}
    given |= {"precompute_ref_log_probs": "true", "ref_logps_dir": tmp_path / "reference", "report_to": "none"}
    run_verb("train", [word for name, value in given.items() for word in (f"--{name}", str(value))])
    assert load_tiling(tmp_path / "mpo") == Tiling(**TILING)
    (first, *_) = json.loads((tmp_path / "mpo" / "trainer_state.json").read_text())["log_history"]
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference saw the same tiles
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    others = {**TILING, "n_max": 2}
    given |= {"output_dir": tmp_path / "others", "tiling": json.dumps(others)}
    run_verb("train", [word for name, value in given.items() for word in (f"--{name}", str(value))])
    (first, *_) = json.loads((tmp_path / "others" / "trainer_state.json").read_text())["log_history"]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert len(list((tmp_path / "reference").glob("*"))) == 2


def test_a_server_is_sent_the_tiles_that_a_model_was_trained_on(task: Path, tmp_path: Path) -> None:
    sft(task, tmp_path / "tiled", tiling=TILING, max_steps=1)
    row = next(read_rows(task / "sft.jsonl"))
    request = Request(row["prompt"][0]["content"], tuple(row["images"]))
    with FaultyServer() as server:
        sampler = ServerSampler("tiny", [server.address], image_root=task, tokenizer=str(tmp_path / "tiled"))
        sampler.sample([request], 1, SamplingSettings(max_new_tokens=2))
        whole = ServerSampler("tiny", [server.address], image_root=task)
        whole.sample([request], 1, SamplingSettings(max_new_tokens=2))
    tiled, untiled = (call["messages"][0]["content"] for call in server.calls[-2:])
    (plan,) = Tiling(**TILING).plans([load_image(task, row["images"][0]).size])
    assert [part["type"] for part in tiled].count("image_url") == plan.num_views > 2
    assert [part.get("text") for part in tiled][0] == "(1,1,1)"
    assert [part["type"] for part in untiled] == ["image_url", "text"]


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "idefics3", "smolvlm"])
def test_a_processor_that_cuts_by_itself_is_given_the_numbers(name: str, folders: dict[str, Path]) -> None:
    processor = AutoProcessor.from_pretrained(folders[name])
    model = AutoModelForImageTextToText.from_pretrained(folders[name])
    wide, text = picture(0, (112, 28)), processor.apply_chat_template([user("", 1)])
    assert tiles_pictures(processor)

    def num_tokens(n_max: int) -> int:
        note = set_own_tiling(processor, model.config, Tiling("internvl", n_min=1, n_max=n_max))
        assert note.startswith(f"{name}'s own processor")
        inputs = processor(images=[[wide]], text=[text], return_tensors="pt")
        model(**inputs)
        return inputs["input_ids"].shape[1]

    assert num_tokens(1) < num_tokens(4)
    with pytest.raises(InputError, match="own processor cuts pictures, into tiles of its own size"):
        set_own_tiling(processor, model.config, Tiling("internvl", n_min=1, n_max=4, indicator="index"))


def test_grids_in_a_config_that_an_adapter_does_not_hold_are_refused(folders: dict[str, Path]) -> None:
    processor = AutoProcessor.from_pretrained(folders["llava_onevision"])
    config = AutoModelForImageTextToText.from_pretrained(folders["llava_onevision"]).config
    with pytest.raises(InputError, match="keeps the grids of tiles in its config"):
        set_own_tiling(processor, config, Tiling("internvl", n_min=1, n_max=4), has_adapter=True)


def test_grids_of_a_processor_that_scales_by_the_shorter_side_have_its_crops_sides() -> None:
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    config = LlavaNextConfig()
    set_own_tiling(SimpleNamespace(image_processor=images), config, Tiling("internvl", n_min=1, n_max=2))
    assert config.image_grid_pinpoints == images.image_grid_pinpoints == [[336, 336], [336, 672], [672, 336]]


def test_numbers_of_tiles_are_saved_with_a_processor_that_cuts_by_itself(
    task: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    tiling = {"rule": "internvl", "n_min": 2, "n_max": 3}
    sft(task, tmp_path / "out", model_name_or_path=str(folders["internvl"]), tiling=tiling, max_steps=1)
    images = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    assert (images.crop_to_patches, images.min_patches, images.max_patches) == (True, 2, 3)
    assert load_tiling(tmp_path / "out") is None  # or they would be cut twice


def test_settings_of_tiles_are_checked(task: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    for wrong, message in (
        ({"rule": "mm1_5", "n_min": 4}, "`n_max`"),
        ({**TILING, "n_min": 5}, "the fewest tiles of a picture are 5"),
        ({**TILING, "tiles": 5}, "`tiles`"),
    ):
        with pytest.raises(InputError, match=message):
            sft(task, tmp_path / "out", tiling=wrong)
    internvl, model = AutoProcessor.from_pretrained(folders["internvl"]), folders["internvl"]
    config = AutoModelForImageTextToText.from_pretrained(model).config
    with pytest.raises(InputError, match="by InternVL's rule: set `rule: internvl`"):
        set_own_tiling(internvl, config, Tiling("mm1_5", n_min=1, n_max=4))
    assert not tiles_pictures(AutoProcessor.from_pretrained(folders["qwen2_vl"]))
    assert not tiles_pictures(AutoProcessor.from_pretrained(folders["gemma3"]))
