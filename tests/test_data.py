"""Data of every source becomes the columns that TRL takes, and pictures are decoded as everywhere else."""

import io
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUIET_TRAINING
from datasets import Dataset, DatasetDict, Json, List, Value
from datasets import Image as ImageFeature
from datasets.table import MemoryMappedTable
from PIL import Image
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from data_builders.hf_sampler import load_model
from data_builders.images import load_image
from data_builders.records import InputError, Row
from data_builders.shards import write_rows
from mpo import MPOConfig, MPOTrainer
from mpo.data import preference_dataset, sft_dataset
from mpo.sources import local_path, open_source

PAIR = {"id": "q#0", "images": ["red.png"], "prompt": "What?", "chosen": "Red.", "rejected": "Blue.", "kind": "format"}
SFT = {
    "id": "s",
    "images": ["red.png"],
    "prompt": [{"role": "user", "content": "What?"}],
    "completion": [{"role": "assistant", "content": "Red."}],
}
USER, CHOSEN, REJECTED = (
    {"role": role, "content": content}
    for role, content in (("user", "What?"), ("assistant", "Red."), ("assistant", "Blue."))
)
TALK = {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}
IMPLICIT = {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}
STRINGS = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
PLACE = {"type": "image"}
MESSAGES = List({"role": Value("string"), "content": Value("string")})
OF_PARTS = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})


def text(words: str) -> Row:
    return {"type": "text", "text": words}


def in_parts(message: Row, *places: Row) -> Row:
    return {**message, "content": [*places, text(message["content"])]}


TALK_IN_PARTS = {
    "prompt": [in_parts(USER, PLACE)],
    "chosen": [in_parts(CHOSEN)],
    "rejected": [in_parts(REJECTED)],
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of Parquet files goes to a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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


def test_pictures_of_a_conversation_stand_where_its_prompt_has_places(root: Path) -> None:
    parts = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " red?"}]
    prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]
    dataset = dataset_of([SFT, {**SFT, "prompt": prompt}], root, sft_dataset)
    assert dataset[1]["prompt"][1] == {"role": "user", "content": parts}
    assert dataset[1]["prompt"][0] == {"role": "system", "content": [{"type": "text", "text": "Be short."}]}
    assert dataset[0]["prompt"] == SFT["prompt"]
    message = r"SFT row 1 \(s-1\): the prompt has 1 places for images .*, and the row has 0"
    with pytest.raises(InputError, match=message):
        dataset_of([{**SFT, "id": "s-1", "prompt": prompt, "images": []}], root, sft_dataset)


def test_conversations_of_both_shapes_share_a_data_set(root: Path) -> None:
    shown = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Now?"}]}
    turns = [*SFT["prompt"], *SFT["completion"], shown, {"role": "assistant", "content": "Grey."}]
    several = {"id": "s-2", "images": ["grey.png"], "messages": turns}
    dataset = dataset_of([SFT, several], root, sft_dataset)
    assert dataset.column_names == ["images", "prompt", "completion", "messages"]
    assert dataset[0]["messages"] is None
    assert dataset[0]["completion"] == SFT["completion"]
    assert dataset[1]["prompt"] is None
    assert dataset[1]["messages"][0] == {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    assert dataset[1]["messages"][2] == shown
    assert dataset_of([several], root, sft_dataset).column_names == ["images", "messages"]
    with pytest.raises(InputError, match=r"SFT row 1 \(s-2\): the prompt has 1 places for images .* the row has 2"):
        dataset_of([{**several, "images": ["grey.png", "red.png"]}], root, sft_dataset)
    with pytest.raises(InputError, match=r"SFT row 1 \(s-2\): `messages` must be a list of messages"):
        dataset_of([{**several, "messages": ["What?"]}], root, sft_dataset)


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


@pytest.mark.parametrize("missing", ["id", "prompt", "chosen", "rejected"])
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


# --- sources ---


def read(source: str | Path, root: Path) -> list[Row]:
    """The rows of a source, pictures as (mode, size)."""
    rows = list(preference_dataset([source], root))
    return [{**row, "images": [(p.mode, p.size) for p in row["images"]]} if "images" in row else row for row in rows]


def png(color: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2), color).save(buffer, "PNG")
    return buffer.getvalue()


def embedded(rows: list[Row], features: Row | None = None) -> Dataset:
    """A data set as the Hub has it: messages of parts, pictures as encoded bytes."""
    features = features or {"images": List(ImageFeature()), **dict.fromkeys(TALK, OF_PARTS)}
    return Dataset.from_list(rows, features=datasets.Features(features))


def hub_rows(count: int = 2) -> list[Row]:
    return [{"images": [{"bytes": png(), "path": "a.png"}], **TALK_IN_PARTS} for _ in range(count)]


def as_jsonl(folder: Path, rows: list[Row]) -> Path:
    write_rows(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


def as_array(folder: Path, rows: list[Row]) -> Path:
    (folder / "rows.json").write_text("\n " + json.dumps(rows, indent=1), encoding="utf-8-sig")
    return folder / "rows.json"


def as_lines_called_json(folder: Path, rows: list[Row]) -> Path:
    return as_jsonl(folder, rows).rename(folder / "lines.json")


def as_parquet(folder: Path, rows: list[Row]) -> Path:
    Dataset.from_list(rows).to_parquet(folder / "rows [1].parquet")  # not a pattern
    return folder / "rows [1].parquet"


def as_shards(folder: Path, rows: list[Row]) -> Path:
    for number, row in enumerate(rows):
        write_rows(folder / "shards" / f"{number:05d}.jsonl", [row])
    return folder / "shards"


def as_parquet_folder(folder: Path, rows: list[Row]) -> Path:
    (folder / "many").mkdir()
    for number, row in enumerate(rows):
        Dataset.from_list([row]).to_parquet(folder / "many" / f"{number:05d}.parquet")
    return folder / "many"


def as_saved(folder: Path, rows: list[Row]) -> Path:
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_splits(folder: Path, rows: list[Row]) -> Path:
    splits = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}
    DatasetDict(splits).save_to_disk(folder / "splits")
    return folder / "splits"


def as_hub_copy(folder: Path, rows: list[Row]) -> Path:
    (folder / "copy" / "data").mkdir(parents=True)
    (folder / "copy" / "README.md").write_text("---\nlicense: mit\n---\n# Pairs\n")
    Dataset.from_list(rows).to_parquet(folder / "copy" / "data" / "train-00000-of-00001.parquet")
    Dataset.from_list(rows[:1]).to_parquet(folder / "copy" / "data" / "test-00000-of-00001.parquet")
    return folder / "copy"


WRITERS = [as_jsonl, as_array, as_lines_called_json, as_parquet, as_shards, as_parquet_folder, as_saved]
WRITERS += [as_saved_splits, as_hub_copy]
Writer = Callable[[Path, list[Row]], Path]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("row", "pictures"),
    [
        (PAIR, 1),
        (TALK, 0),
        (IMPLICIT, 0),
        ({**TALK, "images": ["red.png", "grey.png"], "score": 0.5, "kind": "chat"}, 2),
        ({**IMPLICIT, "image": "red.png", "prompt": "What?"}, 1),
    ],
    ids=["pair", "explicit", "implicit", "images", "image and a prompt that only repeats"],
)
def test_every_source_and_shape_gives_the_same_conversations(
    root: Path, tmp_path: Path, write: Writer, row: Row, pictures: int
) -> None:
    second = json.loads(json.dumps(row).replace("Red.", "Crimson."))
    expected = [TALK, json.loads(json.dumps(TALK).replace("Red.", "Crimson."))]
    if pictures:
        expected = [{"images": [("RGB", (4, 2))] * pictures, **row} for row in expected]
    assert read(write(tmp_path, [row, second]), root) == expected


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_saved])
@pytest.mark.parametrize(
    "row", [STRINGS, {**STRINGS, "kind": None}, {"chosen": "The sky is blue.", "rejected": "The sky is green."}]
)
def test_strings_without_kind_stay_strings(root: Path, tmp_path: Path, write: Writer, row: Row) -> None:
    assert read(write(tmp_path, [row] * 2), root) == [STRINGS] * 2


@pytest.mark.parametrize("write", [as_saved_splits, as_hub_copy])
def test_a_split_is_named_behind_a_colon(root: Path, tmp_path: Path, write: Writer) -> None:
    folder = write(tmp_path, [TALK] * 3)
    assert (len(read(folder, root)), len(read(f"{folder}:test", root))) == (3, 1)
    with pytest.raises(InputError, match=r"(?s)validation.*(test|splits)"):
        read(f"{folder}:validation", root)


def test_a_colon_in_a_files_name_is_no_split(root: Path, tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, [TALK]).rename(tmp_path / "a:train.jsonl")
    assert read(path, root) == [TALK]
    assert local_path(path) == path
    with pytest.raises(InputError, match="a file has no splits"):
        open_source(f"{path}:test")


def test_shards_named_after_splits_are_not_all_trained_on(root: Path, tmp_path: Path) -> None:
    for name, number in (("train", 2), ("test", 1)):
        write_rows(tmp_path / "copy" / f"{name}.jsonl", [TALK] * number)
    assert len(read(tmp_path / "copy", root)) == 2


def test_a_file_that_changes_is_read_again(root: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        as_parquet(tmp_path, [TALK] * number)
        assert len(read(tmp_path / "rows [1].parquet", root)) == number


def test_a_hub_data_set_is_loaded_by_name_config_and_split(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*arguments: Any, **settings: Any) -> Dataset:
        calls.append((arguments, settings))
        return Dataset.from_list([TALK])

    monkeypatch.setattr("mpo.sources.load_dataset", load)
    names = ["trl-lib/rlaif-v", "org/name/config", "org/name:test", "org/name.v2/config:train[10%:20%]"]
    assert [read(name, root) for name in names] == [[TALK]] * 4
    assert calls == [
        (("trl-lib/rlaif-v", None), {"split": "train"}),
        (("org/name", "config"), {"split": "train"}),
        (("org/name", None), {"split": "test"}),
        (("org/name.v2", "config"), {"split": "train[10%:20%]"}),
    ]
    assert [local_path(name) for name in names] == [None] * 4


def test_a_hub_data_set_that_cannot_be_had_is_told_with_what_was_tried(root: Path) -> None:
    with pytest.raises(InputError) as error:
        read("org/nothing/config:test", root)
    assert str(error.value).startswith(
        "org/nothing/config is no file or folder here, and as a Hub data set, load_dataset('org/nothing', 'config', "
        "split='test'), cannot be read: ConnectionError: Couldn't reach 'org/nothing' on the Hub"
    )


def test_a_name_inside_a_folder_that_exists_is_not_looked_for_on_the_hub(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^runs/first/pairs does not exist\. Taken are"):
        read("runs/first/pairs", root)


def test_code_that_comes_with_a_data_set_is_not_run(root: Path, tmp_path: Path) -> None:
    folder = as_hub_copy(tmp_path, [TALK])
    (folder / "copy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="scripts are no longer supported"):
        read(folder, root)
    assert not (tmp_path / "ran").exists()


def nothing_there(folder: Path) -> Path:
    return folder / "rows.jsonl"


def table_of_another_kind(folder: Path) -> Path:
    (folder / "rows.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    return folder / "rows.csv"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def folder_of_two_minds(folder: Path) -> Path:
    as_parquet_folder(folder, [TALK])
    write_rows(folder / "many" / "00000.jsonl", [TALK])
    return folder / "many"


def empty_table(folder: Path) -> Path:
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in STRINGS}), folder / "rows.parquet")
    return folder / "rows.parquet"


def empty_array(folder: Path) -> Path:
    (folder / "rows.json").write_text("[]")
    return folder / "rows.json"


def cut_array(folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps([TALK, TALK])[:-20])
    return folder / "rows.json"


def array_of_strings(folder: Path) -> Path:
    (folder / "rows.json").write_text('[{"chosen": "ab", "rejected": "ac"}, "more"]')
    return folder / "rows.json"


def copy_with_a_cut_file(folder: Path) -> Path:
    path = as_hub_copy(folder, [TALK] * 50)
    (cut,) = path.glob("data/train*")
    cut.write_bytes(cut.read_bytes()[:60])
    return path


def copy_with_a_cut_line(folder: Path) -> Path:
    path = as_hub_copy(folder, [TALK])
    for file in path.glob("data/*"):
        file.unlink()
    (path / "data" / "train.jsonl").write_text(json.dumps(TALK)[:-9])
    return path


def cut_parquet(folder: Path) -> Path:
    path = as_parquet(folder, [TALK] * 50)
    path.write_bytes(path.read_bytes()[:-30])
    return path


def other_columns(folder: Path) -> Path:
    return as_parquet(folder, [{"question": "What?", "chosen": "a"}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing_there, r"rows\.jsonl does not exist\. Taken are a JSONL file .* a Parquet file .* Hub id"),
        (table_of_another_kind, r"rows\.csv is of a type that is not read \(\.csv\)\. Taken are"),
        (empty_folder, r"empty holds no JSONL shard, no Parquet file and no saved data set.* Taken are"),
        (folder_of_two_minds, r"many holds JSONL shards and Parquet files: name those"),
        (empty_table, r"rows\.parquet holds no row"),
        (empty_array, r"rows\.json holds no row: the array is empty"),
        (cut_array, r"rows\.json is not one whole JSON array .* cut off\?"),
        (array_of_strings, r"rows\.json, row 2: expected a JSON object, got 'more'"),
        (cut_parquet, r"rows \[1\]\.parquet cannot be read: "),
        (copy_with_a_cut_line, r"copy, split train, cannot be read: \w+: JSON parse error"),
        (copy_with_a_cut_file, r"copy, split train, cannot be read: .*[Mm]agic bytes"),
        (other_columns, r"has no column `rejected`, but question, chosen\. .* rename the columns"),
    ],
)
def test_a_source_that_cannot_be_read_says_why_and_what_is_taken(
    root: Path, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(make(tmp_path), root)


def test_no_source_at_all_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match="name at least one source"):
        preference_dataset([], root)


# --- shapes ---


def test_parts_reach_the_trainer_as_they_were_written(root: Path) -> None:
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"n": 1}}}]}
    spoken = {**CHOSEN, "name": "Ada"}
    rows = [
        {**TALK_IN_PARTS, "images": ["red.png"]},
        {**TALK, "chosen": [called]},
        {**TALK, "rejected": [spoken]},
    ]
    dataset = dataset_of(rows, root)
    assert [{name: row[name] for name in TALK} for row in dataset] == [
        {name: row[name] for name in TALK} for row in rows
    ]


def test_strings_beside_places_for_images_become_parts(root: Path) -> None:
    prompt = [in_parts(USER, PLACE), CHOSEN, {"role": "user", "content": "And now?"}]
    (row,) = dataset_of([{**TALK, "images": ["red.png"], "prompt": prompt}], root)
    assert row["prompt"] == [in_parts(USER, PLACE), in_parts(CHOSEN), in_parts(prompt[2])]


def test_sources_of_different_shapes_share_a_schema_in_the_order_of_rows(root: Path, tmp_path: Path) -> None:
    swapped = List({"content": Value("string"), "role": Value("string")})
    embedded([TALK] * 2, dict.fromkeys(TALK, swapped)).to_parquet(tmp_path / "swapped.parquet")
    embedded(hub_rows()).to_parquet(tmp_path / "hub.parquet")
    sources = [as_jsonl(tmp_path, [PAIR, TALK]), tmp_path / "swapped.parquet", tmp_path / "hub.parquet"]
    dataset = preference_dataset(sources, root)
    assert [len(row["images"]) for row in dataset] == [1, 0, 0, 0, 1, 1]
    assert [row["prompt"] for row in dataset] == [[USER]] * 4 + [[in_parts(USER, PLACE)]] * 2
    assert dataset.features["prompt"] == List(Json())
    assert dataset.features["images"] == List(ImageFeature(mode="RGB"))
    again = preference_dataset(sources, root)
    assert again.to_list() == dataset.to_list()
    assert again._fingerprint == dataset._fingerprint  # TRL keys reference log-probs by it


def test_messages_whose_fields_stand_in_another_order_are_the_same_messages(root: Path, tmp_path: Path) -> None:
    swapped = List({"content": Value("string"), "role": Value("string")})
    embedded([TALK], dict.fromkeys(TALK, swapped)).to_parquet(tmp_path / "swapped.parquet")
    dataset = preference_dataset([tmp_path / "swapped.parquet", as_jsonl(tmp_path, [TALK])], root)
    assert list(dataset) == [TALK, TALK]
    assert [list(row["prompt"][0]) for row in dataset] == [["role", "content"]] * 2


@pytest.mark.parametrize(("first", "second"), [(STRINGS, PAIR), (TALK, STRINGS), (PAIR, STRINGS)])
@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_strings_are_not_mixed_with_conversations(
    root: Path, tmp_path: Path, first: Row, second: Row, write: Writer
) -> None:
    (tmp_path / "a").mkdir()
    sources = [write(tmp_path / "a", [{**first, "images": []}]), as_jsonl(tmp_path, [{**second, "images": []}])]
    with pytest.raises(InputError, match=r"has strings and no `kind`.*without a chat template.*is a conversation"):
        preference_dataset(sources, root)


def test_columns_that_fit_stay_mapped_to_their_file(root: Path, tmp_path: Path) -> None:
    embedded(hub_rows()).to_parquet(tmp_path / "rows.parquet")
    dataset = preference_dataset([tmp_path / "rows.parquet"], root)
    assert dataset.column_names == ["images", "prompt", "chosen", "rejected"]
    assert dataset.features["prompt"] == OF_PARTS
    blocks = [block for row in dataset.data.blocks for block in row]
    assert {type(block) for block in blocks} == {MemoryMappedTable}
    assert len(dataset.cache_files) > 0


def test_nothing_is_written_beside_a_saved_data_set(root: Path, tmp_path: Path) -> None:
    embedded([TALK], dict.fromkeys(TALK, MESSAGES)).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    preference_dataset([tmp_path / "saved"], root).map(lambda row: {"tokens": [1]})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_row_without_prompt_in_a_column_that_fits_gets_its_own(root: Path, tmp_path: Path) -> None:
    embedded([TALK, IMPLICIT], dict.fromkeys(TALK, MESSAGES)).to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", root) == [TALK, TALK]


def test_more_rows_than_are_read_at_a_time_keep_their_pictures(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo.data._ROWS_AT_A_TIME", 3)
    monkeypatch.setattr("mpo.pictures._ROWS_AT_A_TIME", 2)
    names = [["red.png"], None, ["red.png", "photo.jpg"], [], ["photo.jpg"], ["red.png"], ["grey.png"]]
    rows = [{**TALK, "images": images, "chosen": [{**CHOSEN, "content": f"{n}"}]} for n, images in enumerate(names)]
    expected = [(f"{n}", len(images or [])) for n, images in enumerate(names)]
    for source in (as_jsonl(tmp_path, rows), as_parquet(tmp_path, rows), as_parquet(tmp_path, [*rows, IMPLICIT])):
        found = [(row["chosen"][0]["content"], row["images"]) for row in preference_dataset([source], root)][:7]
        assert [(content, len(images)) for content, images in found] == expected
        assert [images[0].size for _, images in found if images] == [(4, 2), (4, 2), (4, 8), (4, 2), (4, 2)]


# --- pictures ---


@pytest.mark.parametrize("name", ["red.png", "grey.png", "transparent.png", "palette.png", "photo.jpg"])
def test_embedded_pictures_are_seen_as_files_are(root: Path, tmp_path: Path, name: str) -> None:
    image = {"bytes": (root / name).read_bytes(), "path": "/anywhere/else.png"}  # a path beside bytes is but a name
    embedded([{**hub_rows()[0], "images": [image]}]).to_parquet(tmp_path / "rows.parquet")
    (picture,) = preference_dataset([tmp_path / "rows.parquet"], root)[0]["images"]
    expected = load_image(root, name)
    assert (picture.mode, picture.size, picture.tobytes()) == ("RGB", expected.size, expected.tobytes())


def test_a_null_in_a_column_of_pictures_is_no_picture(root: Path, tmp_path: Path) -> None:
    embedded([*hub_rows(1), {**TALK, **TALK_IN_PARTS, "images": None, "prompt": [in_parts(USER)]}]).to_parquet(
        tmp_path / "rows.parquet"
    )
    assert [len(row["images"]) for row in read(tmp_path / "rows.parquet", root)] == [1, 0]


STORED = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize(
    ("name", "values", "kind", "expected"),
    [
        ("images", [["red.png"], None, []], pa.list_(pa.string()), [1, 0, 0]),
        ("images", [["red.png", "grey.png"], [], []], pa.large_list(pa.large_string()), [2, 0, 0]),
        ("images", [[png()], None, []], pa.list_(pa.binary()), [1, 0, 0]),
        ("images", [[{"bytes": png(), "path": None}, {"path": "red.png"}], [], None], pa.list_(STORED), [2, 0, 0]),
        ("images", [None, None, None], pa.null(), [0, 0, 0]),
        ("images", [[], None, []], pa.list_(pa.null()), [0, 0, 0]),
        ("image", ["red.png", None, "grey.png"], pa.string(), [1, 0, 1]),
        ("image", [{"bytes": png(), "path": "x"}, None, {"path": "red.png"}], STORED, [1, 0, 1]),
        ("image", [png(), None, None], pa.large_binary(), [1, 0, 0]),
    ],
)
def test_images_of_a_table_may_be_paths_bytes_or_both(
    root: Path, tmp_path: Path, name: str, values: list[Any], kind: pa.DataType, expected: list[int]
) -> None:
    table = Dataset.from_list([TALK] * 3).data.table.append_column(name, pa.array(values, type=kind))
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet", root)
    assert [row.get("images", []) for row in rows] == [[("RGB", (4, 2))] * count for count in expected]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"images": [["none.png"]]}, r"row 1'?: image 'none\.png' does not exist under the image root"),
        ({"images": [["../rows.parquet"]]}, r"row 1'?: image '\.\./rows\.parquet' is outside the image root"),
        ({"image": ["/etc/hostname"]}, r"row 1'?: image '/etc/hostname' is outside the image root"),
        ({"images": [["https://example.org/a.png"]]}, r"image 'https://example\.org/a\.png' does not exist under"),
        ({"images": [[{"bytes": None, "path": "../a.png"}]]}, r"is outside the image root"),
        ({"images": [[{"bytes": png()[:40], "path": None}]]}, r"row 1: an embedded image cannot be decoded \("),
        ({"images": [[{"bytes": b"", "path": "red.png"}]]}, r"row 1: an embedded image cannot be decoded \("),
        ({"images": [[None, "red.png"]]}, r"row 1: one of its images is null"),
        ({"image": [{"bytes": None, "path": None}], "x": [1]}, r"row 1: one of its images is null"),
        ({"images": ["red.png"]}, r"the column `images` must hold lists, got string\. One each is `image`"),
        ({"images": [[1]]}, r"the column `images` holds int64\. It must hold paths"),
        ({"image": ["red.png"], "images": [["red.png"]]}, r"a column `image` and a column `images`\. Keep `images`"),
    ],
)
def test_an_image_of_a_table_that_cannot_be_used_is_named_with_its_row(
    root: Path, tmp_path: Path, column: Row, message: str
) -> None:
    table = pa.table({**Dataset.from_list([TALK]).to_dict(), **column})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=rf"rows\.parquet.*{message}"):
        read(tmp_path / "rows.parquet", root)


def test_an_embedded_picture_of_sixteen_bits_is_refused_as_a_file_is(root: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (4, 2), 40000).save(buffer, "PNG")
    rows = [*hub_rows(1), {**hub_rows()[0], "images": [{"bytes": buffer.getvalue(), "path": None}]}]
    embedded(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet, row 2: an embedded image has more than 8 bits"):
        read(tmp_path / "rows.parquet", root)


# --- broken rows ---


def changed(row: Row, **changes: Any) -> Row:
    return {name: value for name, value in {**row, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(TALK, chosen=None), "`chosen` is missing. A preference row has"),
        (changed(STRINGS, rejected=None), "`rejected` is missing. A preference row has"),
        (changed(STRINGS, chosen=""), "`chosen` is empty. Leave such rows out"),
        (changed(TALK, rejected=[]), "`rejected` is empty. Leave such rows out"),
        (changed(TALK, chosen=[{**CHOSEN, "content": ""}]), "`chosen` is empty. Leave such rows out"),
        (changed(TALK, chosen=[{**CHOSEN, "content": [text("")]}]), "`chosen` is empty. Leave such rows out"),
        (changed(TALK, chosen=5), "`chosen` must be a string, or a list of messages such as"),
        (changed(TALK, chosen="Red."), "`chosen` and `rejected` must both be strings or both be lists"),
        (changed(TALK, prompt={"role": "user"}), "`prompt` must be a list of messages such as"),
        (changed(STRINGS, prompt=[USER]), "the text of `prompt` must be a string, got [{'role'"),
        (changed(TALK, prompt=[{"content": "What?"}]), "a message of `prompt` must have a role (system, user, assist"),
        (changed(TALK, prompt=[{"from": "human", "value": "What?"}]), "a message of `prompt` must have a role"),
        (changed(TALK, chosen=["Red."]), "a message of `chosen` must have a role"),
        (changed(TALK, chosen=[{"role": "assistant"}]), "the text of `chosen` must be a string, got None"),
        (changed(TALK, prompt=[{**USER, "content": 7}]), "the text of `prompt` must be a string, got 7"),
        (changed(TALK, prompt=[{**USER, "content": ["What?"]}]), "a part of a message of `prompt` must be"),
        (changed(TALK, prompt=[{**USER, "content": [{"type": "text"}]}]), "the text of `prompt` must be a string"),
        (
            changed(TALK, prompt=[{**USER, "content": [{"type": "image", "image": "red.png"}]}]),
            "got {'type': 'image', 'image': 'red.png'}. The pictures themselves stand in the row's `images`",
        ),
        (changed(TALK, chosen=[USER, CHOSEN]), "`chosen` must begin with the assistant's message"),
        (changed(TALK, prompt=[]), "`prompt` must end with the message that is answered, got []"),
        (changed(TALK, prompt=[{**USER, "role": "system"}]), "The system's message alone asks nothing"),
        (changed(TALK, prompt=None), "`chosen` and `rejected` do not begin with the same one"),
        (changed(TALK, prompt="What?"), "there is no `prompt` in the format of the responses"),
        ({"chosen": "R", "rejected": "R"}, "`chosen` and `rejected` do not begin with the same one"),
        ({"chosen": "Red.", "rejected": "Blue."}, "`chosen` and `rejected` do not begin with the same one"),
        (changed(STRINGS, images=["red.png"]), "a row with images has strings in place of messages"),
        (changed(PAIR, kind=None), "(rows of `mpo pair` have a `kind`, and are turned into messages)"),
        (changed(PAIR, kind="correctnes"), "`kind` is 'correctnes': input should be"),
        (changed(TALK_IN_PARTS), "the prompt has 1 places for images"),
        (changed(TALK_IN_PARTS, images=["red.png"] * 2), "the prompt has 1 places for images"),
        (changed(TALK, images=["red.png"], prompt=[in_parts(USER)]), "the prompt has 0 places for images"),
        (
            changed(TALK, images=["red.png"], prompt=[{**USER, "role": "system"}, in_parts(USER)]),
            "the prompt has 0 places for images",
        ),
        (
            changed(TALK, images=["red.png"] * 2, prompt=[in_parts(USER, PLACE), CHOSEN, USER]),
            "the prompt has 1 places for images",
        ),
        (changed(TALK, chosen=[in_parts(CHOSEN, PLACE)]), "`chosen` holds an image. Only a prompt can"),
        (changed(TALK, tools=[{"name": "f"}]), "TRL would render `tools` into the prompt"),
        (changed(TALK, images=["red.png"], image="red.png"), "has both `image` and `images`"),
        (changed(TALK, image=["red.png"]), "or `image` one path, got [['red.png']]"),
    ],
)
def test_a_broken_row_is_named_with_its_line_and_what_to_do(
    root: Path, tmp_path: Path, row: Row, message: str
) -> None:
    good = STRINGS if isinstance(row.get("chosen"), str) and "kind" not in row else TALK
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    with pytest.raises(InputError) as error:
        read(tmp_path / "rows.jsonl", root)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 3: ")
    assert message in str(error.value)


def test_half_a_character_is_named_and_not_left_to_the_tokenizer(root: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(changed(STRINGS, chosen=" \ud83d")))
    with pytest.raises(InputError, match=r"line 1: `chosen` holds half a character \(surrogates not allowed\)"):
        read(tmp_path / "rows.jsonl", root)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(STRINGS, chosen=""), "row 2: `chosen` is empty"),
        ({**TALK, "rejected": [{"role": None, "content": "x"}]}, "row 2: a message of `rejected` must have a role"),
        ({**TALK, "rejected": None}, "row 2: `rejected` is missing"),
        ({**PAIR, "kind": "best"}, "row 2: `kind` is 'best'"),
        ({**TALK, "tools": '[{"name": "f"}]'}, "row 2: TRL would render `tools` into the prompt"),
    ],
)
def test_a_broken_row_of_a_table_is_named_with_its_number(root: Path, tmp_path: Path, row: Row, message: str) -> None:
    good = next(
        g
        for g in (PAIR, STRINGS, {**TALK, "tools": None}, TALK)
        if g.keys() == row.keys() and type(g["chosen"]) is type(row["chosen"])
    )
    with pytest.raises(InputError, match=rf"parquet, {message}"):
        read(as_parquet(tmp_path, [good, row]), root)


# --- training ---

SETTINGS: dict[str, Any] = {
    **QUIET_TRAINING,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
}


def digits_of(task: Path) -> Row:
    """A picture of the task's, as large as its model wants it."""
    return {"bytes": (task / "images" / "sft-00000.png").read_bytes(), "path": None}


def loss_of(trainer: Any) -> float:
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_pictures_embedded_in_parquet_train_as_files_do(task: Path, tmp_path: Path) -> None:
    embedded([{**TALK_IN_PARTS, "images": [digits_of(task)]}] * 2).to_parquet(tmp_path / "rows.parquet")
    pair = {**PAIR, "images": ["images/sft-00000.png"]}
    write_rows(tmp_path / "rows.jsonl", [pair] * 2)
    processor = AutoProcessor.from_pretrained(task / "model")
    batches, losses = [], []
    for name in ("rows.parquet", "rows.jsonl"):
        dataset = preference_dataset([tmp_path / name], task)
        batches.append(DataCollatorForVisionPreference(processor)(list(dataset)))
        trainer = MPOTrainer(
            model=load_model(task / "model", dtype="float32"),
            args=MPOConfig(str(tmp_path / "out"), **SETTINGS),
            train_dataset=dataset,
            processing_class=processor,
        )
        losses.append(loss_of(trainer))
    assert batches[0].keys() == batches[1].keys() >= {"input_ids", "pixel_values", "completion_mask"}
    assert all(batches[0][name].tolist() == batches[1][name].tolist() for name in batches[0])
    assert losses[0] == losses[1] > 0.83


@pytest.mark.parametrize(
    "row", [TALK, IMPLICIT, STRINGS, {"chosen": "The sky is blue.", "rejected": "The sky is red."}]
)
def test_text_trains_on_the_tokens_that_trl_gives_the_same_rows(task: Path, tmp_path: Path, row: Row) -> None:
    tokenizer = AutoProcessor.from_pretrained(task / "model").tokenizer
    model = load_model(task / "model", dtype="float32")
    kwargs = {"model": model, "ref_model": deepcopy(model), "processing_class": tokenizer}
    raw, ours = Dataset.from_list([row] * 2), preference_dataset([as_jsonl(tmp_path, [row] * 2)], tmp_path)
    theirs = DPOTrainer(args=DPOConfig(str(tmp_path / "trl"), **SETTINGS), train_dataset=raw, **kwargs)
    mine = MPOTrainer(args=MPOConfig(str(tmp_path / "mpo"), **SETTINGS), train_dataset=ours, **kwargs)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(mine.train_dataset[name]) == list(theirs.train_dataset[name])
    assert loss_of(mine) > 0.83


def test_messages_of_every_kind_survive_trls_tokenization(task: Path, tmp_path: Path) -> None:
    rows = [TALK, {**TALK, "prompt": [in_parts(USER)], "chosen": [{**CHOSEN, "name": "Ada"}]}]
    dataset = preference_dataset([as_jsonl(tmp_path, rows)], tmp_path)
    trainer = MPOTrainer(
        model=load_model(task / "model", dtype="float32"),
        args=MPOConfig(str(tmp_path / "out"), **SETTINGS),
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(task / "model"),
    )
    first, second = trainer.train_dataset["prompt_ids"], trainer.train_dataset["chosen_ids"]
    assert (first[0], second[0]) == (first[1], second[1])
    assert loss_of(trainer) > 0.83
