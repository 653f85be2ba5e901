"""`mpo sft` and its trainer: what is learned and weighed, packed rows against padded ones, stages, rates and tiles."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from conftest import QUIET_TRAINING
from datasets import Dataset, Features, Image, Json, List
from tiny_models import FAMILIES, build, picture
from tiny_runs import save_models
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mpo.config import SFTConfig
from mpo.sft_trainer import SFTTrainer

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
