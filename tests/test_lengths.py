"""Token counts equal those of TRL's collators, and `max_length` never leaves half a picture or an empty response."""

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny_models import FAMILIES, picture, preference_rows
from tokenizers import models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from data_builders.records import InputError
from mpo import lengths as module
from mpo.lengths import Lengths, measure_rows, measure_tokenized, picture_size

TURN = List({"role": Value("string"), "content": Value("string")})
SIDES = (20, 33, 56, 90, 150, 331)


def row(sizes: list[tuple[int, int]], question: str = "How many?", chosen: str = "Two.") -> dict[str, Any]:
    return {
        "images": [picture(index, size) for index, size in enumerate(sizes)],
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": "Three."}],
    }


def conversations(rows: list[dict[str, Any]]) -> Dataset:
    features = Features(images=List(ImageFeature()), prompt=TURN, chosen=TURN, rejected=TURN)
    return Dataset.from_list(rows, features=features)


def collated(processor: ProcessorMixin, example: dict[str, Any]) -> list[int]:
    """What TRL's own collator makes of one row: tokens in front of the responses, chosen, rejected."""
    batch = DataCollatorForVisionPreference(processor)([copy.deepcopy(example)])
    chosen, rejected = batch["completion_mask"].sum(dim=1).tolist()
    before = batch["attention_mask"].sum(dim=1) - batch["completion_mask"].sum(dim=1)
    assert before[0] == before[1]
    return [int(before[0]), chosen, rejected]


def counted(found: Lengths) -> list[list[int]]:
    return np.stack([found.before_response, found.chosen, found.rejected], axis=1).tolist()


def image_tokens(name: str, rows: list[dict[str, Any]]) -> list[int]:
    processor, _ = FAMILIES[name]()
    return measure_rows(conversations(rows), processor).image.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_those_of_trls_collator(name: str) -> None:
    processor, _ = FAMILIES[name]()
    rows = preference_rows(4) + [row([(width, height)]) for width in SIDES for height in SIDES]
    rows += [row([(20, 331), (56, 56)], "\n\nWhich?"), row([(90, 33)] * 2 + [(33, 90)] * 2)]
    found = measure_rows(conversations(rows), processor)
    assert counted(found) == [collated(processor, example) for example in rows]
    assert (found.image[2], found.image[0] > 0, found.prompt.min() > 0) == (0, True, True)


def test_image_tokens_are_what_the_processor_writes_in_place_of_pictures() -> None:
    wide, square = (90, 40), (40, 40)
    # <img>, one token for each of two tiles and the thumbnail, </img>; the square one is cut into four
    assert image_tokens("internvl", [row([wide]), row([square]), row([wide, square])]) == [5, 7, 12]
    # 28 pixels of a side are one token, four at most
    assert image_tokens("qwen2_vl", [row([wide]), row([square]), row([wide, square])]) == [3, 1, 4]
    # tiles only where a picture is alone, else 2 x 2 patches and the end of the line
    assert image_tokens("llava_onevision", [row([wide]), row([square]), row([wide, square])]) == [14, 24, 10]
    # rows of tiles, each with two marks and a line break, then a line break and the whole between three marks
    assert image_tokens("idefics3", [row([wide]), row([square])]) == [21, 34]
    # 4 soft tokens between two marks, and two line breaks on either side
    assert image_tokens("gemma3", [row([wide]), row([wide, square])]) == [10, 20]


def test_line_breaks_that_melt_into_their_neighbours_are_counted_as_the_collator_counts_them() -> None:
    processor, _ = FAMILIES["gemma3"]()
    tokenizer = processor.tokenizer.backend_tokenizer
    vocab = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer.model = models.BPE(vocab={**vocab, "ĊĊ": 500, "ĊĊĊĊ": 501}, merges=[("Ċ", "Ċ"), ("ĊĊ", "ĊĊ")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rows = [row([(28, 28)] * number, question) for number in (1, 2, 3) for question in ("How?", "\nHow?", "\n\nHow?")]
    found = measure_rows(conversations(rows), processor)
    assert counted(found) == [collated(processor, example) for example in rows]
    # alone 8 each, and where two meet, "\n\n" and "\n\n" are one token: 16 - 1
    assert found.image[:4].tolist() == [8, 8, 8, 16]
    assert found.before_response[3] - found.before_response[0] == 7


def test_pictures_that_the_processors_own_formula_does_not_cover_are_counted_right() -> None:
    cropping, _ = FAMILIES["gemma3"]()
    cropping.images_kwargs = {
        **cropping.images_kwargs, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20
    }  # fmt: skip
    uncropped, _ = FAMILIES["llava"]()
    uncropped.image_processor.do_center_crop = False
    rows = [row([size]) for size in ((56, 56), (90, 40), (40, 150), (331, 33))]
    for processor in (cropping, uncropped):
        found = measure_rows(conversations(rows), processor)
        assert len(set(found.image.tolist())) > 1
        assert counted(found) == [collated(processor, example) for example in rows]


@pytest.mark.parametrize(
    ("name", "num_runs"),
    [
        ("internvl", 2),  # for two tiles and for four
        ("llava", 5),  # for the four that show that no size makes a difference, and one
        ("smolvlm", 8),  # for each size, as it cannot be asked
    ],
)
def test_the_processor_runs_once_for_each_kind_of_size(
    name: str, num_runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, _ = FAMILIES[name]()
    processor.image_processor.max_patches = 12
    runs, process = [], module._Pictures._process
    monkeypatch.setattr(module._Pictures, "_process", lambda *args, **kw: runs.append(args) or process(*args, **kw))
    rows = [row([(50, 23 + index)]) for index in range(4)] + [row([(50 + index, 50 + index)]) for index in range(4)]
    measure_rows(conversations(rows * 3), processor)
    assert len(runs) == num_runs


class Opaque:
    """A processor of an older kind: nothing but its output tells what it writes."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.apply_chat_template = processor.apply_chat_template

    def __call__(self, **inputs: Any) -> Any:
        return self.processor(**inputs)


def test_a_processor_that_does_not_say_what_it_writes_is_run_on_every_row() -> None:
    processor, _ = FAMILIES["idefics3"]()
    rows = conversations([row([(90, 40)]), row([]), row([(90, 40), (40, 40)])])
    assert counted(measure_rows(rows, Opaque(processor))) == counted(measure_rows(rows, processor))


def test_plain_texts_and_a_single_picture_are_taken_as_trl_takes_them() -> None:
    processor, _ = FAMILIES["llava"]()
    tokenizer, begin = processor.tokenizer, processor.tokenizer.eos_token  # as a BOS token; TRL asks for none
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.eos_token_id)]
    )
    rows = [
        {"image": picture(0), "prompt": "<image>\nWhat?", "chosen": "A cat", "rejected": "A d"},
        {"image": picture(1), "prompt": "Look: <image> Why", "chosen": "B", "rejected": "No"},
    ]
    features = Features(image=ImageFeature(), **dict.fromkeys(("prompt", "chosen", "rejected"), Value("string")))
    found = measure_rows(Dataset.from_list(rows, features=features), processor)
    # one token per byte: "\nWhat?" and "Look: " + " Why"
    assert [column.tolist() for column in found] == [[4, 4], [6, 10], [5, 1], [3, 2]]
    assert counted(found) == [collated(processor, example) for example in rows]


def test_rows_without_a_column_of_pictures_and_rows_made_by_a_transform_are_counted() -> None:
    processor, _ = FAMILIES["qwen2_vl"]()
    rows = preference_rows(4)
    plain = conversations(rows)
    expected = counted(measure_rows(plain, processor))
    numbers = Dataset.from_dict({"number": range(4)})
    numbers.set_transform(lambda batch: {name: [rows[n][name] for n in batch["number"]] for name in rows[0]})
    assert counted(measure_rows(numbers, processor)) == expected
    without = measure_rows(plain.select([2]).remove_columns("images"), processor)
    assert counted(without) == expected[2:3]


def test_no_picture_is_decoded(tmp_path: Path) -> None:
    processor, _ = FAMILIES["internvl"]()
    content = io.BytesIO()
    picture(0, (90, 40)).save(content, "PNG")
    (tmp_path / "cut.png").write_bytes(content.getvalue()[:200])
    rows = Dataset.from_list(
        [{**row([]), "images": [str(tmp_path / "cut.png")]}],
        features=conversations([row([])]).features,
    )
    assert measure_rows(rows, processor).image.tolist() == [5]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_on_its_side_is_measured_the_right_way_up(kind: str) -> None:
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    Image.new("RGB", (60, 40)).save(content, kind, exif=exif)
    stored = {"bytes": content.getvalue(), "path": None}
    assert picture_size(stored) == (40, 60) == ImageFeature().decode_example(stored).size


def test_a_picture_is_measured_whatever_holds_it(tmp_path: Path) -> None:
    picture(0, (60, 40)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    held = [picture(0, (60, 40)), np.zeros((40, 60, 3), np.uint8), path, {"bytes": None, "path": path}]
    assert [picture_size(value) for value in held] == [(60, 40)] * 4


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"images": ["gone.png"]}, r"row 1: image gone\.png cannot be opened \(.*No such file"),
        (
            {"images": [None], "prompt": [{"role": "user", "content": "<image> Who?"}]},
            "row 1: '<image>' stands 1 times",
        ),
        (
            {"chosen": [{"role": "assistant", "content": "An <image>."}]},
            "row 1: '<image>' stands 1 times .* 0 pictures",
        ),
        ({"prompt": [{"role": "bot", "content": "Hi"}]}, "row 1: Invalid role"),
    ],
)
def test_a_row_that_training_would_stumble_over_is_named(example: dict[str, Any], message: str) -> None:
    processor, _ = FAMILIES["llava"]()
    rows = Dataset.from_list([row([]), {**row([]), **example}], features=conversations([row([])]).features)
    with pytest.raises(InputError, match=message):
        measure_rows(rows, processor)


def test_a_picture_that_the_processor_refuses_is_named_with_its_row() -> None:
    processor, _ = FAMILIES["qwen2_vl"]()
    rows = conversations([row([(40, 40)]), row([(2010, 10)])])
    with pytest.raises(InputError, match="row 1: the processor refuses pictures of 2010 x 10 pixels .*aspect ratio"):
        measure_rows(rows, processor)


def test_a_missing_column_is_named() -> None:
    processor, _ = FAMILIES["llava"]()
    with pytest.raises(InputError, match="no column 'rejected': preference rows have prompt, chosen, rejected"):
        measure_rows(conversations([row([])]).remove_columns("rejected"), processor)


def test_tokenized_rows_are_measured_by_their_lists() -> None:
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": []},
        {"prompt_ids": [1], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    ]
    found = measure_tokenized(Dataset.from_list(rows).select([1, 0]))
    assert [column.tolist() for column in found] == [[0, 0], [1, 3], [2, 1], [3, 0]]
    assert (found.before_response.tolist(), found.total.tolist()) == ([1, 3], [4, 4])


def test_long_data_is_read_in_parts_and_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 3)
    processor, _ = FAMILIES["llava"]()
    rows = [row([(28, 28)] * (index % 2), "?" * index) for index in range(8)]
    found = measure_rows(conversations(rows), processor)
    assert found.image.tolist() == [0, 4, 0, 4, 0, 4, 0, 4]
    assert np.diff(found.prompt[::2]).tolist() == [2, 2, 2]
    broken = rows[:7] + [{**rows[7], "images": [{"bytes": b"no picture", "path": None}]}]
    with pytest.raises(InputError, match="row 7: image None cannot be opened"):
        measure_rows(conversations(broken), processor)
