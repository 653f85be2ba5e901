"""Forests of ordinary preference rows: the tokens of TRL's batches, every picture opened and processed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tiny_models import FAMILIES, picture, preference_rows
from transformers import ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from data_builders.records import InputError
from mpo.forest_collators import ForestCollator, TextForestCollator
from mpo.scores import lengths_of, num_pairs, size_of, tokens_of
from mpo.shared_prefixes import undecoded


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[ProcessorMixin, ForestCollator]:
    processor, model = FAMILIES[request.param]()
    return processor, ForestCollator(processor, image_token_id=model.config.image_token_id)


@pytest.fixture(scope="module")
def llava() -> ForestCollator:
    processor, model = FAMILIES["llava"]()
    return ForestCollator(processor, image_token_id=model.config.image_token_id)


def row(question: str, chosen: str, rejected: str, *pictures: Any) -> dict[str, Any]:
    return {
        "images": list(pictures),
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def test_sequences_and_types_are_those_of_trls_collator(family: tuple[ProcessorMixin, ForestCollator]) -> None:
    processor, collate = family
    one, other = picture(3), picture(4, (60, 44))
    rows = [
        *preference_rows(4),
        row("What is it?", "A square.", "A circle.", one),
        row("\nWhich colour?", "Red.", "Red, or blue.", one),  # the same picture behind another question
        row("What is it?", "A square.", "Nothing.", other),
        row("What is it?", "A square.", "A square, and a circle.", one, other),
    ]
    plain = DataCollatorForVisionPreference(processor)([dict(row) for row in rows])
    batch = collate(rows)
    assert num_pairs(batch) == 8
    for index in range(16):
        assert tokens_of(batch, index) == tokens_of(plain, index)
    assert lengths_of(batch).tolist() == lengths_of(plain).tolist()
    assert size_of(batch).tolist() == size_of(plain).tolist()
    for name in ("token_type_ids", "mm_token_type_ids"):
        assert (name in batch) == (name in plain)
        if name in batch:
            of_pictures = batch[name] == 1
            assert torch.equal(of_pictures, batch["input_ids"] == collate.image_token_id)


def test_prompt_and_pictures_stand_once_however_many_pairs_share_them(llava: ForestCollator) -> None:
    shown = picture(0)
    pairs = [row("What?", f"It is {a}.", f"No, {b}.", shown) for a in "12" for b in "345"]
    batch = llava(pairs)
    assert batch["pixel_values"].shape[0] == 1
    assert (batch["input_ids"] == llava.image_token_id).sum() == 4
    assert batch["input_ids"].shape[0] == 1
    assert torch.equal(batch["places"][0], batch["places"][1])  # the same chosen response
    assert batch["places"].shape[0] == 12


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_each_picture_is_decoded_and_processed_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, model = FAMILIES[name]()
    for seed, file in ((0, "a.png"), (0, "copy of a.png"), (1, "b.png")):
        picture(seed).save(tmp_path / file)
    files = ["a.png", "a.png", "copy of a.png", "b.png", "a.png"]
    stored = [{"path": str(tmp_path / file), "bytes": None} for file in files]
    rows = [row(f"Question {index % 2}?", "Yes.", f"No {index}.", image) for index, image in enumerate(stored)]
    opened, processed = [], []
    decode, process = Image.decode_example, type(processor.image_processor).preprocess

    def counted_decode(self: Image, value: Any, *args: Any) -> Any:
        opened.append(Path(value["path"]).name)
        return decode(self, value, *args)

    def counted_process(self: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        processed.append(len(images))
        return process(self, images, *args, **kwargs)

    monkeypatch.setattr(Image, "decode_example", counted_decode)
    monkeypatch.setattr(type(processor.image_processor), "preprocess", counted_process)
    batch = ForestCollator(processor, image_token_id=model.config.image_token_id)(rows)
    assert sorted(opened) == ["a.png", "b.png", "copy of a.png"]
    assert processed == [1, 1]  # what lies in two files is one picture
    plain = DataCollatorForVisionPreference(processor)(
        [{**row, "images": [PILImage.open(image["path"]) for image in row["images"]]} for row in rows]
    )
    for index in range(10):
        assert tokens_of(batch, index) == tokens_of(plain, index)


def test_pictures_stay_closed_in_the_data_set_until_they_are_collated(llava: ForestCollator, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    turn = List({"role": Value("string"), "content": Value("string")})
    features = Features(images=List(Image(mode="RGB")), prompt=turn, chosen=turn, rejected=turn)
    rows = [row("What?", "Yes.", "No.", str(tmp_path / "a.png")), row("What?", "Yes.", "No.")]
    dataset = Dataset.from_list(rows, features=features).select([1, 0])
    closed = undecoded(dataset)
    assert closed[1]["images"] == [{"path": str(tmp_path / "a.png"), "bytes": None}]
    assert closed[0]["images"] == []
    found, expected = llava([closed[0], closed[1]]), llava([dataset[0], dataset[1]])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["input_ids"], expected["input_ids"])


def test_the_order_of_pictures_is_the_order_of_their_trees(llava: ForestCollator) -> None:
    small, large = row("Hi", "a", "b", picture(1)), row("Hello, what is in this picture?", "It is a", "b", picture(2))
    batch = llava([small, large])
    one, other = (llava([row])["pixel_values"][0] for row in (small, large))
    for index, expected in ((0, one), (1, other)):
        tree_row, slot = divmod(int(batch["places"][index][0]), batch["last"].size(1))
        assert torch.equal(batch["pixel_values"][batch["tree"][tree_row, slot]], expected)


def test_a_batch_without_pictures_gets_a_tree_that_counts_nowhere(llava: ForestCollator) -> None:
    texts = [row("What?", "Yes.", "No."), row("Why?", "So.", "No, because.")]
    alone = llava(texts)
    collate = ForestCollator(llava.processor, image_token_id=llava.image_token_id, stand_in=picture(0))
    batch = collate([{**text, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for text in texts])
    assert "pixel_values" not in alone
    assert batch["pixel_values"].shape[0] == 1
    assert batch["completion_mask"].shape[0] == batch["places"].shape[0] == 4
    assert batch["ref_chosen_logps"].tolist() == [-1.0, -1.0]
    for index in range(4):
        assert tokens_of(batch, index) == tokens_of(alone, index)


def test_a_cut_through_a_response_shortens_it_and_one_through_pictures_is_an_error(llava: ForestCollator) -> None:
    rows = [row("What?", "It is a long answer.", "No.", picture(0))]
    whole = llava(rows)
    prompt = int(whole["lengths"][0] - whole["completion_mask"][0].sum())
    cut = ForestCollator(llava.processor, max_length=prompt + 2, image_token_id=llava.image_token_id)
    assert tokens_of(cut(rows), 0) == tokens_of(whole, 0)[: prompt + 2]
    cut.max_length = prompt
    with pytest.raises(InputError, match=rf"Set `max_length` to at least {prompt + 1}"):
        cut(rows)


@pytest.mark.parametrize(
    ("mode", "max_length"), [("keep_start", None), ("keep_start", 6), ("keep_end", 6), ("keep_end", 3)]
)
def test_texts_are_those_of_trls_collator(mode: str, max_length: int | None) -> None:
    rows = [
        {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7, 8], "rejected_ids": [5, 9]},
        {"prompt_ids": [1, 2], "chosen_ids": [5], "rejected_ids": [6, 7, 8, 9, 10]},
    ]
    plain = DataCollatorForPreference(0, max_length, mode)([dict(row) for row in rows])
    batch = TextForestCollator(0, max_length, mode)(rows)
    for index in range(4):
        assert tokens_of(batch, index) == tokens_of(plain, index)
    assert size_of(batch).tolist() == size_of(plain).tolist()


def test_a_text_that_is_cut_to_nothing_is_an_error() -> None:
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]}]
    with pytest.raises(InputError, match="leave nothing of a response"):
        TextForestCollator(0, max_length=3)(rows)
