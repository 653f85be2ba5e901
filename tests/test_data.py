"""Rows on disk become the columns that TRL takes, and pictures are decoded as everywhere else."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image

from data_builders.images import load_image
from data_builders.records import InputError, Row
from data_builders.shards import write_rows
from mpo.data import preference_dataset, sft_dataset

PAIR = {"id": "q#0", "images": ["red.png"], "prompt": "What?", "chosen": "Red.", "rejected": "Blue.", "kind": "format"}
SFT = {
    "id": "s",
    "images": ["red.png"],
    "prompt": [{"role": "user", "content": "What?"}],
    "completion": [{"role": "assistant", "content": "Red."}],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pictures of every kind: RGB, grey, with transparency, with a palette, and a photo that lies on its side."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (4, 2), (255, 0, 0)).save(folder / "red.png")
    Image.new("L", (4, 2), 100).save(folder / "grey.png")
    Image.new("RGBA", (4, 2), (10, 20, 30, 40)).save(folder / "transparent.png")
    Image.new("P", (4, 2), 1).save(folder / "palette.png")
    photo = Image.linear_gradient("L").resize((8, 4))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(folder / "photo.jpg", exif=exif)
    return folder


def dataset_of(rows: list[Row], root: Path, build: Any = preference_dataset) -> Dataset:
    write_rows(root.parent / "rows.jsonl", rows)
    return build([root.parent / "rows.jsonl"], root)


def test_pairs_are_conversations_with_pictures(root: Path) -> None:
    dataset = dataset_of([PAIR], root)
    (row,) = dataset
    assert dataset.column_names == ["images", "prompt", "chosen", "rejected"]
    assert {name: row[name] for name in ("prompt", "chosen", "rejected")} == {
        "prompt": [{"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "Red."}],
        "rejected": [{"role": "assistant", "content": "Blue."}],
    }
    assert [(picture.mode, picture.size) for picture in row["images"]] == [("RGB", (4, 2))]


def test_pictures_stay_paths_until_they_are_needed(root: Path) -> None:
    dataset = dataset_of([PAIR], root)
    raw = dataset.cast_column("images", List(ImageFeature(decode=False)))[0]["images"]
    assert raw == [{"bytes": None, "path": str(root / "red.png")}]


@pytest.mark.parametrize("name", ["red.png", "grey.png", "transparent.png", "palette.png", "photo.jpg"])
def test_training_sees_a_picture_as_sampling_does(root: Path, name: str) -> None:
    (picture,) = dataset_of([{**PAIR, "images": [name]}], root)[0]["images"]
    sampled = load_image(root, name)
    assert (picture.mode, picture.size, picture.tobytes()) == ("RGB", sampled.size, sampled.tobytes())


def test_rows_with_several_one_and_no_picture_share_a_data_set(root: Path) -> None:
    rows = [
        {**PAIR, "images": ["red.png", "grey.png"]},
        {**PAIR, "images": []},
        {name: value for name, value in PAIR.items() if name != "images"},
        PAIR,
    ]
    dataset = dataset_of(rows, root)
    assert [len(row["images"]) for row in dataset] == [2, 0, 0, 1]
    assert dataset[0]["images"][1].getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize(("build", "row"), [(preference_dataset, PAIR), (sft_dataset, SFT)])
def test_text_alone_is_no_vision_data_set(root: Path, build: Any, row: Row) -> None:
    dataset = dataset_of([{**row, "images": []}] * 2, root, build)
    assert dataset.column_names == [name for name in ("prompt", "chosen", "rejected", "completion") if name in row]
    assert len(dataset) == 2


def test_columns_of_the_users_own_do_not_reach_the_trainer(root: Path) -> None:
    dataset = dataset_of([{**PAIR, "level": 3, "chosen_meta": {"a": 1}}, {**PAIR, "chosen_meta": {"b": "x"}}], root)
    assert dataset.column_names == ["images", "prompt", "chosen", "rejected"]


def test_sources_are_read_one_after_the_other(root: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "a" / "00000.jsonl", [{**PAIR, "chosen": "first"}])
    write_rows(tmp_path / "a" / "00001.jsonl", [{**PAIR, "chosen": "second"}])
    write_rows(tmp_path / "b.jsonl", [{**PAIR, "chosen": "third"}])
    dataset = preference_dataset([str(tmp_path / "b.jsonl"), tmp_path / "a"], str(root))
    assert [row["chosen"][0]["content"] for row in dataset] == ["third", "first", "second"]


def test_conversations_are_prompt_and_completion(root: Path) -> None:
    system = {"role": "system", "content": "Be short."}
    dataset = dataset_of([SFT, {**SFT, "prompt": [system, *SFT["prompt"]], "images": None}], root, sft_dataset)
    assert dataset.column_names == ["images", "prompt", "completion"]
    assert [len(row["images"]) for row in dataset] == [1, 0]
    assert dataset[1]["prompt"] == [system, {"role": "user", "content": "What?"}]
    assert dataset[0]["completion"] == [{"role": "assistant", "content": "Red."}]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "What?",
        ["What?"],
        {"role": "user", "content": "What?"},
        [{"role": "user"}],
        [{"content": "What?"}],
        [{"from": "human", "value": "What?"}],
        [{"role": "user", "content": [{"type": "text", "text": "What?"}]}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "What?"}, "more"],
    ],
)
@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_a_malformed_conversation_is_named_with_what_it_should_be(root: Path, key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        dataset_of([SFT, {**SFT, "id": "s-2", key: value}], root, sft_dataset)
    assert str(error.value) == (
        f'SFT row 2 (s-2): `{key}` must be a list of messages such as [{{"role": "user", "content": "..."}}], '
        f"got {value!r:.80}."
    )


def test_a_conversation_without_completion_or_id_is_named_by_its_number(root: Path) -> None:
    with pytest.raises(InputError, match=r"SFT row 1 \(without id\): `completion` must be a list .* got None"):
        dataset_of([{"prompt": SFT["prompt"]}], root, sft_dataset)


@pytest.mark.parametrize("value", ["red.png", [5], {"path": "red.png"}])
def test_images_that_are_no_list_of_paths_are_named(root: Path, value: Any) -> None:
    with pytest.raises(InputError, match=r"SFT row 1 \(s\): `images` must be a list of paths such as \[\"a\.png\"\]"):
        dataset_of([{**SFT, "images": value}], root, sft_dataset)
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: `images"):
        dataset_of([{**PAIR, "images": value}], root)


@pytest.mark.parametrize(("build", "row"), [(preference_dataset, PAIR), (sft_dataset, SFT)])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", r"image 'none\.png' does not exist under the image root .* Is `image_root` right"),
        ("../rows.jsonl", r"image '\.\./rows\.jsonl' is outside the image root"),
        ("broken.png", r"broken\.png cannot be decoded"),
    ],
)
def test_an_image_that_cannot_be_used_is_named_with_its_row(
    root: Path, build: Any, row: Row, name: str, message: str
) -> None:
    (root / "broken.png").write_bytes((root / "red.png").read_bytes()[:40])
    with pytest.raises(InputError, match=f"^row '{row['id']}': image .*{message[6:]}"):
        dataset_of([{**row, "images": ["red.png", name]}], root, build)


@pytest.mark.parametrize("missing", ["prompt", "chosen", "rejected", "kind"])
def test_a_row_that_is_no_pair_is_named_with_file_and_line(root: Path, missing: str) -> None:
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 2: `{missing}` is missing\. A pair row has the fields"):
        dataset_of([PAIR, {name: value for name, value in PAIR.items() if name != missing}], root)


@pytest.mark.parametrize("build", [preference_dataset, sft_dataset])
def test_no_rows_are_refused(root: Path, build: Any) -> None:
    with pytest.raises(InputError, match="holds no row"):
        dataset_of([], root, build)


def test_a_line_that_is_no_object_is_refused(root: Path) -> None:
    (root.parent / "rows.jsonl").write_text(json.dumps([SFT]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="expected a JSON object"):
        sft_dataset([root.parent / "rows.jsonl"], root)
