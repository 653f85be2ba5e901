"""`mpo convert`: what each format means, that nothing is lost on the way, and what a check finds."""

import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_builders.convert import FORMATS, ConvertConfig, run
from data_builders.formats import parquet as parquet_format
from data_builders.formats.arrays import read_array
from data_builders.formats.exact import differences, read_row, restored, write_row
from data_builders.formats.names import name_in_root
from data_builders.formats.protocol import Context, Found, RefusedError
from data_builders.records import InputError, Row, Summary
from data_builders.shards import read_rows, read_stage, write_rows
from mpo.data import preference_dataset, sft_dataset
from mpo.settings import read_settings

PAIR = {
    "id": "q1#0",
    "question_id": "q1",
    "images": ["a.png"],
    "question": "How many cats?",
    "prompt": "How many cats?\nEnd with `Final answer: ...`.",
    "chosen": "Three. Final answer: 3",
    "rejected": "Four. Final answer: 4",
    "kind": "correctness",
    "source": "cats",
    "answer": "3",
    "chosen_meta": {"sampler": {"model": "m", "seed": 0, "temperature": 1.0}, "verdict": "correct", "rule": "number"},
    "rejected_meta": {"sampler": {"model": "m", "seed": 0, "temperature": 1.0}, "verdict": "wrong", "rule": "number"},
}
OF_PAIRS = ["jsonl", "mmpr", "trl", "ms_swift", "llamafactory"]

# What users have: one small file per format, written by hand.
GOLDEN: dict[str, list[Row]] = {
    "mmpr": [
        {"image": "a.png", "question": "<image>\nHow many cats?", "chosen": "3", "rejected": "4", "answer_gt": "3"},
        {"image": ["a.png", "b.png"], "question": "<image>\n<image>\nSame?", "chosen": "No.", "rejected": "Yes."},
        {"image": ["a.png"], "question": "How many cats?", "chosen": "3", "rejected": "4"},
        {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"image": "", "question": "2 + 3?", "chosen": "5", "rejected": "6", "chosen_meta": {"score": 1}},
        {"image": None, "question": "2 + 4?", "chosen": "6", "rejected": "7", "id": 17, "answer_gt": 6},
        {"image": "a.png", "question": "<image>How many?\n", "chosen": "3", "rejected": "4"},
        {"question": "2 + 5?", "chosen": "7", "rejected": "8", "source": "elsewhere", "kind": "format"},
        {"image": "a.png", "question": "How many?\n<image>", "chosen": "3", "rejected": "4"},
        {"image": ["a.png", "b.png"], "question": "Is <image> like <image>?", "chosen": "no", "rejected": "yes"},
    ],
    "internvl_sft": [
        {
            "id": 0,
            "image": "a.png",
            "width": 8,
            "conversations": [
                {"from": "human", "value": "<image>\nHow many cats?"},
                {"from": "gpt", "value": "Three."},
                {"from": "human", "value": "And dogs?"},
                {"from": "gpt", "value": "None."},
            ],
        },
        {
            "id": "text",
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "2 + 2?"},
                {"from": "gpt", "value": "4"},
            ],
        },
        {
            "id": 2,
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": "Is <image> like <image>?"},
                {"from": "gpt", "value": "No."},
            ],
        },
    ],
    "internvl_prompt": [
        {"image": "a.png", "question": "How many cats?", "answer": "3"},
        {"image": "a.png", "question": "<image>\nHow many cats?", "answer": None},
        {"image": ["a.png", "b.png"], "question": "Is <image> like <image>?", "answer": "no"},
        {"image": "a.png", "question": "Describe it.", "chosen": "Three cats.", "rejected": None},
        {"question": "2 + 2?", "answer": 4},
    ],
    "trl": [
        {
            "images": ["a.png"],
            "prompt": [{"role": "user", "content": "How many cats?"}],
            "chosen": [{"role": "assistant", "content": "3"}],
            "rejected": [{"role": "assistant", "content": "4"}],
        },
        {
            "images": ["a.png", "b.png"],
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Is "},
                        {"type": "image"},
                        {"type": "text", "text": " like "},
                        {"type": "image"},
                        {"type": "text", "text": "?"},
                    ],
                }
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
        },
        {
            "image": "a.png",
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "3"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
            "score": 0.5,
        },
        {
            "chosen": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
            "rejected": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}],
        },
    ],
    "ms_swift": [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "<image>How many cats?"},
                {"role": "assistant", "content": "3"},
            ],
            "rejected_response": "4",
            "images": ["a.png"],
        },
        {
            "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
            "rejected_response": "5",
        },
        {
            "messages": [
                {"role": "user", "content": "<image>\nHow many cats?"},
                {"role": "assistant", "content": "3"},
                {"role": "user", "content": "And in <image>?"},
                {"role": "assistant", "content": "1"},
            ],
            "rejected_response": "2",
            "images": ["a.png", "b.png"],
        },
    ],
    "llamafactory": [
        {
            "conversations": [{"from": "human", "value": "<image>How many cats?"}],
            "chosen": {"from": "gpt", "value": "3"},
            "rejected": {"from": "gpt", "value": "4"},
            "images": ["a.png"],
        },
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
            "system": "Be short.",
        },
    ],
    "mammoth_vl": [
        {
            "id": 7,
            "source": "sharegpt4v",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nHow many cats?"},
                {"from": "gpt", "value": "Three."},
            ],
        },
        {
            "id": "x",
            "source": "text",
            "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
        },
        {
            "id": "y",
            "source": "many",
            "image": ["a.png", "b.png"],
            "video": "",
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nSame?"},
                {"from": "gpt", "value": "No."},
            ],
        },
    ],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with two pictures in `images`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name, colour in (("a", (200, 30, 30)), ("b", (30, 200, 30))):
        Image.new("RGB", (8, 6), colour).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def convert(source: str, target: str, start: str, output: str, **settings: Any) -> Summary:
    settings.setdefault("image_root", "images")
    return run(ConvertConfig(from_=source, to=target, input=start, output=output, **settings))


def check(source: str, start: str, **settings: Any) -> Summary:
    settings.setdefault("image_root", "images")
    return run(ConvertConfig(from_=source, input=start, check=True, **settings))


def found(summary: Summary) -> dict[str, str]:
    return {row[0]: row[1] for row in summary.rows}


def put(name: str, rows: list[Row], **entry: Any) -> str:
    """Writes the files of a format by hand and says what to give as `input`."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if name == "mammoth_vl":
        Path("in.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return "in.json"
    Path("in.jsonl").write_text(lines, encoding="utf-8")
    if name != "mmpr":
        return "in.jsonl"
    entry = {"root": "images", "annotation": "in.jsonl", "data_augment": False, "repeat_time": 1, **entry}
    Path("meta.json").write_text(json.dumps({"cats_pairs_vqa_correctness_rules": entry}), encoding="utf-8")
    return "meta.json"


def written(name: str, output: str) -> list[Row]:
    """The rows of an output folder, read without our readers."""
    if name == "mammoth_vl":
        return json.loads(Path(output, "data.json").read_text(encoding="utf-8"))
    if name == "parquet":
        from pyarrow import parquet

        return [
            row for path in sorted(Path(output).rglob("*.parquet")) for row in parquet.read_table(path).to_pylist()
        ]
    paths = sorted(Path(output).glob("*.jsonl"))
    if name == "mmpr":
        meta = json.loads(Path(output, "meta.json").read_text(encoding="utf-8"))
        paths = [Path(entry["annotation"]) for entry in meta.values()]
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def texts_of(rows: list[Row]) -> list[str]:
    """Rows to the last byte: the order of their fields too."""
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def files_of(output: str) -> dict[str, bytes]:
    paths = sorted(path for path in Path(output).rglob("*") if path.is_file())
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


# What a row means


def test_a_pair_of_mmpr_becomes_a_pair_whose_text_has_no_tag(folder: Path) -> None:
    convert("mmpr", "jsonl", put("mmpr", GOLDEN["mmpr"]), "ours")
    first, two, untagged, text, *_, inside = read_stage(Path("ours"))
    known = {name: first[name] for name in ("images", "prompt", "chosen", "rejected", "kind", "source", "answer")}
    assert known == {
        "images": ["a.png"],
        "prompt": "How many cats?",
        "chosen": "3",
        "rejected": "4",
        "kind": "correctness",
        "source": "cats_pairs_vqa_correctness_rules",
        "answer": "3",
    }
    assert first["id"] == "cats_pairs_vqa_correctness_rules/0"
    assert (two["images"], two["prompt"]) == (["a.png", "b.png"], "Same?")
    assert (untagged["images"], untagged["prompt"]) == (["a.png"], "How many cats?")
    assert (text["images"], text["prompt"]) == ([], "2 + 2?")
    assert inside["prompt"][0]["content"] == [
        {"type": "text", "text": "Is "},
        {"type": "image"},
        {"type": "text", "text": " like "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    assert (inside["kind"], inside["chosen"]) == ("correctness", [{"role": "assistant", "content": "no"}])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ai2d_pairs_vqa_correctness_rules", "correctness"),
        ("ai2d_pairs_vqa_direct_rules", "correctness"),
        ("ai2d_pairs_vqa_format_rules", "format"),
        ("ai2d_prefix_pair_sr0.5_wo_image", "dropout_ntp"),
        ("ai2d_prefix_pair_sr0.0_with_image", "dropout_ntp"),
        ("ai2d", None),
    ],
)
def test_the_name_of_a_set_says_the_kind_of_its_pairs(folder: Path, name: str, kind: str | None) -> None:
    put("mmpr", GOLDEN["mmpr"][:1])
    Path(f"{name}.jsonl").write_bytes(Path("in.jsonl").read_bytes())
    convert("mmpr", "jsonl", f"{name}.jsonl", "ours")
    (row,) = read_stage(Path("ours"))
    assert (row["source"], row.get("kind")) == (name, kind)
    assert isinstance(row["chosen"], list if kind is None else str)


def test_a_kind_can_be_given_for_files_that_say_none(folder: Path) -> None:
    convert("ms_swift", "jsonl", put("ms_swift", GOLDEN["ms_swift"][1:2]), "ours", kind="format")
    (row,) = read_stage(Path("ours"))
    assert (row["prompt"], row["chosen"], row["rejected"], row["kind"]) == ("2 + 2?", "4", "5", "format")


def test_the_last_answer_of_a_conversation_is_what_is_learnt(folder: Path) -> None:
    summary = convert("internvl_sft", "jsonl", put("internvl_sft", GOLDEN["internvl_sft"]), "ours")
    first = next(read_stage(Path("ours")))
    assert (first["id"], first["images"], first["width"]) == ("0", ["a.png"], 8)
    assert first["prompt"] == [
        {"role": "user", "content": "How many cats?"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "And dogs?"},
    ]
    assert first["completion"] == [{"role": "assistant", "content": "None."}]
    assert any("1 conversations have several answers" in note for note in summary.notes)


def test_prompt_files_become_questions_and_responses_for_the_next_steps(folder: Path) -> None:
    convert("internvl_prompt", "jsonl", put("internvl_prompt", GOLDEN["internvl_prompt"]), "ours")
    first, tagged, inside, response, number = read_stage(Path("ours"))
    assert (first["id"], first["question"], first["answer"]) == ("in/0", "How many cats?", "3")
    assert (tagged["question"], tagged["answer"]) == ("How many cats?", None)
    assert inside["question"] == "Is  like ?"
    assert (response["prompt"], response["response"], response["finish_reason"]) == (
        "Describe it.",
        "Three cats.",
        "stop",
    )
    assert number["answer"] is None


def test_pairs_are_written_in_the_words_of_each_format(folder: Path) -> None:
    write_rows(Path("pairs/0.jsonl"), [PAIR])
    for name in ("mmpr", "trl", "ms_swift", "llamafactory"):
        convert("jsonl", name, "pairs", name)
    text, chosen, rejected = PAIR["prompt"], PAIR["chosen"], PAIR["rejected"]
    (mmpr,), (trl,), (swift,), (llama,) = (written(n, n) for n in ("mmpr", "trl", "ms_swift", "llamafactory"))
    assert (mmpr["image"], mmpr["question"], mmpr["answer_gt"]) == ("a.png", f"<image>\n{text}", "3")
    assert (mmpr["chosen"], mmpr["rejected"], mmpr["chosen_meta"]) == (chosen, rejected, PAIR["chosen_meta"])
    assert trl["prompt"] == [{"role": "user", "content": text}]
    assert trl["chosen"] == [{"role": "assistant", "content": chosen}]
    assert trl["images"] == ["a.png"]
    assert swift["messages"] == [
        {"role": "user", "content": f"<image>{text}"},
        {"role": "assistant", "content": chosen},
    ]
    assert (swift["rejected_response"], swift["images"]) == (rejected, ["a.png"])
    assert llama["conversations"] == [{"from": "human", "value": f"<image>{text}"}]
    assert llama["rejected"] == {"from": "gpt", "value": rejected}


def test_mmpr_gets_one_file_for_each_source_and_kind_and_a_meta_file(folder: Path) -> None:
    made = {"ratio": 0.0, "with_image": True}
    others = [
        {**PAIR, "kind": "format"},
        {**PAIR, "kind": "dropout_ntp", "rejected_meta": made},
        {**PAIR, "source": "../do gs"},
        PAIR,
    ]
    write_rows(Path("pairs/0.jsonl"), [PAIR, *others])
    convert("jsonl", "mmpr", "pairs", "mmpr")
    meta = json.loads(Path("mmpr/meta.json").read_text())
    assert {name: (entry["annotation"], entry["length"]) for name, entry in meta.items()} == {
        "cats_pairs_vqa_correctness_rules": ("mmpr/cats_pairs_vqa_correctness_rules.jsonl", 2),
        "cats_pairs_vqa_format_rules": ("mmpr/cats_pairs_vqa_format_rules.jsonl", 1),
        "cats_prefix_pair_sr0.0_with_image": ("mmpr/cats_prefix_pair_sr0.0_with_image.jsonl", 1),
        "../do gs_pairs_vqa_correctness_rules": ("mmpr/_do_gs_pairs_vqa_correctness_rules.jsonl", 1),
    }
    assert meta["cats_pairs_vqa_format_rules"] | {"annotation": ""} == {
        "root": "images",
        "annotation": "",
        "data_augment": False,
        "repeat_time": 1,
        "length": 1,
    }


def test_llamafactory_gets_its_entry_in_dataset_info(folder: Path) -> None:
    write_rows(Path("pairs/0.jsonl"), [PAIR])
    summary = convert("jsonl", "llamafactory", "pairs", "mine")
    entry = json.loads(Path("mine/dataset_info.json").read_text())["mine"]
    assert (entry["file_name"], entry["formatting"], entry["ranking"]) == ("data.jsonl", "sharegpt", True)
    assert entry["columns"] == {
        "messages": "conversations",
        "chosen": "chosen",
        "rejected": "rejected",
        "images": "images",
    }
    assert "LLaMA-Factory: dataset_dir: mine, dataset: mine, media_dir: the image root." in summary.notes


def test_llamafactory_rows_under_other_names_are_read_as_dataset_info_says(folder: Path) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>How many?"}],
            "good": {"role": "assistant", "content": "3"},
            "bad": {"role": "assistant", "content": "4"},
            "pictures": ["a.png"],
        }
    ]
    columns = {"messages": "messages", "chosen": "good", "rejected": "bad", "images": "pictures"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "in.jsonl", "formatting": "sharegpt", "ranking": True, "columns": columns, "tags": tags}
    put("llamafactory", rows)
    Path("dataset_info.json").write_text(json.dumps({"mine": entry, "other": {"file_name": "no.json"}}))
    convert("llamafactory", "jsonl", "dataset_info.json", "ours", kind="correctness")
    (row,) = read_stage(Path("ours"))
    assert (row["images"], row["prompt"], row["chosen"], row["rejected"]) == (["a.png"], "How many?", "3", "4")


def test_a_dataset_info_without_preference_data_says_what_it_has(folder: Path) -> None:
    Path("dataset_info.json").write_text(json.dumps({"alpaca": {"file_name": "a.json"}}))
    with pytest.raises(InputError, match="names no preference data in ShareGPT format.*It has alpaca"):
        convert("llamafactory", "jsonl", "dataset_info.json", "ours")


# Nothing is lost


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_comes_back_from_our_rows_as_it_was(folder: Path, name: str) -> None:
    convert(name, "jsonl", put(name, GOLDEN[name]), "ours")
    convert("jsonl", name, "ours", "back")
    assert texts_of(written(name, "back")) == texts_of(GOLDEN[name])
    assert not Path("back/dropped").exists() or not list(Path("back/dropped").iterdir())


@pytest.mark.parametrize("name", ["mmpr", "trl", "ms_swift", "llamafactory"])
@pytest.mark.parametrize("between", ["mmpr", "trl", "ms_swift", "llamafactory"])
def test_a_file_comes_back_also_through_another_format(folder: Path, name: str, between: str) -> None:
    convert(name, between, put(name, GOLDEN[name]), "there")
    convert(between, name, "there", "back")
    dropped = Path("there/dropped/00000.jsonl")
    unsaid = [int(left["id"].split()[-1]) - 1 for left in read_rows(dropped)] if dropped.exists() else []
    expected = [row for number, row in enumerate(GOLDEN[name]) if number not in unsaid]
    assert len(unsaid) <= (2 if between == "mmpr" else 0)
    assert sorted(texts_of(written(name, "back"))) == sorted(texts_of(expected))


def random_text(dice: random.Random) -> str:
    pieces = [
        "猫が三匹",
        "cat",
        " ",
        "\n",
        "🐈‍⬛",
        "\u2028",
        '"',
        "\\",
        "é",
        "<img>",
        "\t",
        "3.5%",
        "{}",
        "𝕏",
        "\r\n",
        "\x00",
    ]
    return "".join(dice.choice(pieces) for _ in range(dice.randint(1, 12)))


def random_pair(dice: random.Random, number: int) -> Row:
    row: Row = {"id": f"q#{number}", "images": dice.choice([[], ["a.png"], ["a.png", "b.png"], ["b.png", "b.png"]])}
    names = [*PAIR] if dice.random() < 0.7 else dice.sample([*PAIR], len(PAIR))
    for name in names:
        if name in ("prompt", "chosen", "rejected", "source", "question", "question_id"):
            row[name] = random_text(dice)
    row |= {"kind": dice.choice(["correctness", "format", "dropout_ntp"])}
    if dice.random() < 0.5:
        row["answer"] = dice.choice([None, random_text(dice)])
    for name in ("chosen_meta", "rejected_meta"):
        if dice.random() < 0.7:
            row[name] = {"prediction": dice.choice([None, "3"]), "n": dice.choice([1, 1.0, True]), "list": [[], {}]}
    extra = {
        "score": 0.5,
        "image": "x",
        "messages": [1],
        "system": "no",
        "order": None,
        "mpo": "mine",
        "video": {"a": 1},
    }
    extra |= {"conversations": 3, "answer_gt": "7", random_text(dice): random_text(dice)}
    for name in dice.sample([*extra], dice.randint(0, 4)):
        row[name] = extra[name]
    if dice.random() < 0.2:
        del row["source"]
    if dice.random() < 0.2:
        del row["kind"]
        row["chosen"] = [{"role": "assistant", "content": row["chosen"]}]
        row["rejected"] = [{"role": "assistant", "content": row["rejected"]}]
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return row


@pytest.mark.parametrize("name", ["mmpr", "trl", "ms_swift", "llamafactory", "parquet"])
def test_our_pairs_come_back_to_the_last_byte(folder: Path, name: str) -> None:
    dice = random.Random(0)
    target, there = FORMATS[name](), Context(Path("images"))
    for number in range(400):
        row = random_pair(dice, number)
        fields = write_row(row, target, there)
        fields = json.loads(json.dumps(fields))
        made_up = {"id": "made up", "source": "made up"}
        back = read_row(Found("", fields, Context(Path("images"), made_up)), target)
        assert json.dumps(back) == json.dumps(row)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_files_of_our_pairs_come_back_to_the_last_byte(folder: Path, name: str) -> None:
    dice = random.Random(1)
    rows = [random_pair(dice, number) | {"source": "s", "kind": "format"} for number in range(60)]
    write_rows(Path("pairs/00000.jsonl"), [PAIR | {"source": "s", "kind": "format"}, *rows])
    convert("jsonl", name, "pairs", "there")
    convert(name, "jsonl", "there", "back")
    assert Path("back/00000.jsonl").read_bytes() == Path("pairs/00000.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["internvl_sft", "mammoth_vl", "trl"])
def test_our_conversations_come_back_to_the_last_byte(folder: Path, name: str) -> None:
    rows = [
        {
            "id": "1",
            "images": ["a.png"],
            "prompt": [{"role": "user", "content": " What?\n"}],
            "completion": [{"role": "assistant", "content": "图中有三只猫"}],
            "source": "s",
        },
        {
            "images": [],
            "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}],
            "completion": [{"role": "assistant", "content": "4"}],
            "weight": 0.5,
        },
        {
            "prompt": [{"role": "user", "content": "2 + 2?"}],
            "completion": [{"role": "assistant", "content": "4"}],
            "images": [],
        },
    ]
    write_rows(Path("sft/00000.jsonl"), rows)
    convert("jsonl", name, "sft", "there")
    convert(name, "jsonl", "there", "back")
    assert sorted(texts_of([*read_stage(Path("back"))])) == sorted(texts_of(rows))


def test_our_questions_and_responses_come_back_to_the_last_byte(folder: Path) -> None:
    question = {"id": "q", "images": ["a.png"], "question": "How many?\n(A) 1", "answer": "3", "source": "s"}
    sampler = {"model": "m", "prompt": "boxed@1", "index": 3}
    response = {**question, "prompt": "How many? Think.", "response": "3", "finish_reason": "stop", "sampler": sampler}
    write_rows(Path("questions/00000.jsonl"), [question, {**question, "answer": None, "hint": [1]}, response])
    convert("jsonl", "internvl_prompt", "questions", "there")
    assert written("internvl_prompt", "there")[0] == {
        "image": "a.png",
        "question": "How many?\n(A) 1",
        "answer": "3",
        "id": "q",
        "source": "s",
    }
    convert("internvl_prompt", "jsonl", "there", "back")
    assert Path("back/00000.jsonl").read_bytes() == Path("questions/00000.jsonl").read_bytes()


def test_a_field_that_was_edited_on_the_way_keeps_its_edit(folder: Path) -> None:
    convert("mmpr", "jsonl", put("mmpr", GOLDEN["mmpr"]), "ours")
    rows = [*read_stage(Path("ours"))]
    rows[4] |= {"images": ["b.png"], "chosen": "five"}
    write_rows(Path("edited/00000.jsonl"), rows)
    convert("jsonl", "mmpr", "edited", "back")
    back = next(row for row in written("mmpr", "back") if row["chosen"] == "five")
    assert (back["image"], back["question"], back["rejected"]) == ("b.png", "<image>\n2 + 3?", "6")


def test_differences_make_one_row_out_of_another() -> None:
    plain, wanted = {"a": 1, "b": [1.0], "c": "x"}, {"c": "x", "b": [1], "d": None}
    assert restored(plain, differences(plain, wanted)) == wanted
    assert [*restored(plain, differences(plain, wanted))] == ["c", "b", "d"]
    assert differences(plain, dict(plain)) == {}
    assert restored({**plain, "b": "new"}, differences(plain, wanted)) == {"b": "new", "c": "x", "d": None}


def test_what_a_format_has_no_field_for_is_listed_with_its_number_of_rows(folder: Path) -> None:
    write_rows(Path("pairs/0.jsonl"), [PAIR, {**PAIR, "id": "q1#1", "answer": None}])
    kept = convert("jsonl", "ms_swift", "pairs", "kept")
    assert [row for row in kept.rows if row[0].startswith("`")] == [
        ["`answer`", "1", "column answer"],
        ["`chosen_meta`", "2", "column mpo"],
        ["`id`", "2", "column id"],
        ["`kind`", "2", "column kind"],
        ["`question`", "2", "column question"],
        ["`question_id`", "2", "column question_id"],
        ["`rejected_meta`", "2", "column mpo"],
        ["`source`", "2", "column source"],
    ]
    gone = convert("jsonl", "mmpr", "pairs", "gone", extras=False)
    assert [row for row in gone.rows if row[0].startswith("`")] == [
        ["`id`", "2", "left away"],
        ["`kind`", "2", "left away"],
        ["`question`", "2", "left away"],
        ["`question_id`", "2", "left away"],
    ]
    assert [[*row] for row in written("mmpr", "gone")] == [
        ["image", "question", "chosen", "rejected", "answer_gt", "chosen_meta", "rejected_meta"],
        ["image", "question", "chosen", "rejected", "chosen_meta", "rejected_meta"],
    ]


# meta.json


@pytest.mark.parametrize(
    ("weight", "numbers"),
    [
        (1, "0 1 2 3 4 5 6 7 8 9"),
        (0.3, "3 6 9"),
        (0.5, "1 3 5 7 9"),
        (2, "0 0 1 1 2 2 3 3 4 4 5 5 6 6 7 7 8 8 9 9"),
        (2.5, "0 0 1 1 1 2 2 3 3 3 4 4 5 5 5 6 6 7 7 7 8 8 9 9 9"),
    ],
)
def test_repeat_time_keeps_a_part_or_repeats(folder: Path, weight: float, numbers: str) -> None:
    rows = [{"question": f"{number}?", "chosen": "a", "rejected": "b"} for number in range(10)]
    convert("mmpr", "jsonl", put("mmpr", rows, repeat_time=weight, root=None), "ours")
    ours = [*read_stage(Path("ours"))]
    assert " ".join(row["prompt"][:-1] for row in ours) == numbers
    assert len({row["id"] for row in ours}) == len(ours)


def test_roots_are_folders_under_the_image_root_and_come_back(folder: Path) -> None:
    put("mmpr", [{"image": "a.png", "question": "<image>\nHow many?", "chosen": "3", "rejected": "4"}])
    Path("other.jsonl").write_bytes(Path("in.jsonl").read_bytes().replace(b"a.png", b"images/b.png"))
    meta = {
        "one": {"root": "images/", "annotation": "in.jsonl", "max_dynamic_patch": 6, "length": 7},
        "two": {"root": None, "annotation": "other.jsonl"},
    }
    Path("meta.json").write_text(json.dumps(meta))
    summary = convert("mmpr", "jsonl", "meta.json", "ours", image_root=".")
    ours = [*read_stage(Path("ours"))]
    assert [row["images"] for row in ours] == [["images/a.png"], ["images/b.png"]]
    assert ours[0]["as_read"].keys() == {"format", "root", "unset"}
    assert "Rows cannot hold what the sets of meta.json say besides: max_dynamic_patch." in summary.notes
    assert "one: `length` says 7 rows, and in.jsonl has 1." in summary.notes
    convert("jsonl", "mmpr", "ours", "back", image_root=".")
    back = json.loads(Path("back/meta.json").read_text())
    assert {name: entry["root"] for name, entry in back.items()} == {"one": "images", "two": "."}
    assert [row["image"] for row in written("mmpr", "back")] == ["a.png", "images/b.png"]


def test_paths_of_a_meta_file_may_be_relative_to_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("mmpr", GOLDEN["mmpr"][:1])
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    convert("mmpr", "jsonl", "../meta.json", "ours", image_root="../images")
    assert next(read_stage(Path("ours")))["images"] == ["a.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "a": {"annotation": "in.jsonl"},\n}', "meta.json, line 3: broken JSON.*a comma too many"),
        ('{\n "a": {"annotation": "in.jsonl",\n  },\n "b": 1}', "meta.json, line 3: broken JSON.*a comma too many"),
        ('{\n "a": {"annotation"', "meta.json, line 2: broken JSON.*cut off"),
        ('{"a": 1}', "the set 'a' must be an object with an `annotation`"),
        ('{"a": {"annotation": "no.jsonl"}}', "the annotation no.jsonl of 'a' does not exist"),
        ('{"a": {"annotation": "in.jsonl", "repeat_time": "2"}}', "`repeat_time` of 'a' must be a number"),
        ('{"a": {"annotation": "in.jsonl", "repeat_time": -1}}', "`repeat_time` of 'a' must be a number"),
        ('{"a": {"annotation": "in.jsonl", "root": 3}}', "`root` of 'a' must be a folder or null"),
        ('{"a": {"annotation": "in.jsonl"}, "a": {"annotation": "in.jsonl"}}', "'a' is given twice"),
    ],
)
def test_a_broken_meta_file_is_named_with_its_line(folder: Path, text: str, message: str) -> None:
    put("mmpr", GOLDEN["mmpr"])
    Path("meta.json").write_text(text)
    with pytest.raises(InputError, match=f"(?s){message}"):
        convert("mmpr", "jsonl", "meta.json", "ours")


def test_a_broken_line_of_an_annotation_is_named(folder: Path) -> None:
    put("mmpr", GOLDEN["mmpr"])
    with Path("in.jsonl").open("a") as file:
        file.write('{"question": "How many?",}\n')
    with pytest.raises(InputError, match="in.jsonl, line 11: not a JSON object"):
        convert("mmpr", "jsonl", "meta.json", "ours")
    assert [*Path("ours").glob("*.jsonl")] == []


# Arrays of any size


@pytest.mark.parametrize("piece", [1, 2, 7, 40, 2**20])
def test_an_array_is_read_object_by_object(folder: Path, piece: int) -> None:
    rows = [{"a": [1, 2.5, None, True], "b": 'x]},{é\\"🐈'}, {}, {"c": {"d": "\n"}}]
    Path("a.json").write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    assert [row for _, row in read_array(Path("a.json"), piece=piece)] == rows
    assert [line for line, _ in read_array(Path("a.json"), piece=piece)] == [2, 11, 12]
    Path("a.json").write_text(" [ ] ")
    assert [*read_array(Path("a.json"), piece=piece)] == []


@pytest.mark.parametrize("piece", [1, 7, 2**20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a": 2},\n]', "line 4: broken JSON: expected an object, got ']'; a comma too many"),
        ('[\n{"a": 1,}\n' + " " * 50 + "]", "line 2: broken JSON.*a comma too many"),
        ('[\n{"a": 1}\n{"a": 2}\n]', "line 3: broken JSON: expected , or ]"),
        ('[\n{"a": 1},\n{"a": "x', "line 3: broken JSON.*cut off"),
        ('[\n{"a": 1},\n{"a": 1}\n', "line 4: broken JSON: the array has no end"),
        ('[\n{"a": 1}\n]\n{"b"', "line 4: broken JSON: there is text after the end"),
        ('[\n{"a": 1},\n3]', "line 3: broken JSON: expected an object, got '3"),
        ('[\n{"a": nul}' + " " * 50 + "]", "line 2: broken JSON: Expecting value"),
    ],
)
def test_a_broken_array_is_named_with_its_line(folder: Path, text: str, message: str, piece: int) -> None:
    Path("a.json").write_text(text)
    with pytest.raises(InputError, match=f"(?s)a.json, {message}"):
        list(read_array(Path("a.json"), piece=piece))


def many_conversations(path: Path, number: int) -> None:
    """A JSON array as MAmmoTH-VL's, about a kilobyte per row."""
    answer = "It is a long answer. " * 40
    with path.open("w") as file:
        for index in range(number):
            turns = [{"from": "human", "value": f"Question {index}?"}, {"from": "gpt", "value": answer}]
            row = {"id": index, "source": "s", "conversations": turns}
            file.write(("[" if index == 0 else ",\n") + json.dumps(row))
        file.write("]")


def test_memory_does_not_grow_with_the_file(folder: Path) -> None:
    peaks = []
    for number in (4_000, 40_000):
        many_conversations(Path(f"{number}.json"), number)
        tracemalloc.start()
        assert sum(1 for _ in read_array(Path(f"{number}.json"), piece=2**16)) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert Path("40000.json").stat().st_size > 35_000_000
    assert max(peaks) < 1_500_000
    assert peaks[1] < 1.2 * peaks[0]


def test_a_conversion_holds_one_shard_and_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_builders.convert.claim_folder", lambda *_: None)  # it reads small files as a whole
    peaks = []
    for number in (3_000, 6_000):
        many_conversations(Path(f"{number}.json"), number)
        tracemalloc.start()
        convert("mammoth_vl", "jsonl", f"{number}.json", f"ours{number}", shard_size=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len([*Path("ours6000").glob("*.jsonl")]) == 60
    assert peaks[1] < 1.2 * peaks[0]


# Parquet


def test_datasets_and_the_trainer_decode_the_images_of_a_parquet_file(folder: Path) -> None:
    from datasets import load_dataset

    write_rows(Path("pairs/0.jsonl"), [PAIR, {**PAIR, "images": ["b.png", "a.png"]}, {**PAIR, "images": []}])
    convert("jsonl", "parquet", "pairs", "hub")
    for table in (
        load_dataset("parquet", data_files="hub/data/*.parquet", split="train", cache_dir="cache"),
        load_dataset("hub", split="train", cache_dir="cache"),
    ):
        assert [len(row["images"]) for row in table] == [1, 2, 0]
        assert table[1]["images"][0].getpixel((0, 0)) == (30, 200, 30)
        assert [part["type"] for part in table[1]["prompt"][0]["content"]] == ["image", "image", "text"]
    stored = written("parquet", "hub")[0]["images"][0]
    assert stored == {"bytes": Path("images/a.png").read_bytes(), "path": "a.png"}
    read = preference_dataset(["hub/data"], ".")
    assert read[0]["images"][0].size == (8, 6)
    assert read[1]["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": PAIR["chosen"]}]}]


def test_pairs_come_back_from_parquet_with_images_named_by_their_content(folder: Path) -> None:
    dice = random.Random(2)
    rows = [PAIR, *(random_pair(dice, number) for number in range(60))]
    write_rows(Path("pairs/00000.jsonl"), rows)
    convert("jsonl", "parquet", "pairs", "hub")
    summary = convert("parquet", "jsonl", "hub", "back")
    back = [*read_stage(Path("back"))]
    assert len([*Path("back/images").iterdir()]) == 2
    assert texts_of([{**row, "images": []} for row in back]) == texts_of([{**row, "images": []} for row in rows])
    for row, mine in zip(rows, back, strict=True):
        for old, new in zip(row["images"], mine["images"], strict=True):
            assert Path("back", new).read_bytes() == Path("images", old).read_bytes()
    assert summary.next_command.endswith("--image_root back")
    convert("jsonl", "parquet", "back", "again", image_root="back")
    convert("parquet", "jsonl", "again", "twice")
    assert files_of("twice")["00000.jsonl"] == files_of("back")["00000.jsonl"]


def test_a_parquet_file_of_others_comes_back_as_it_was(folder: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    text = Value("string")
    messages = List({"role": text, "content": List({"type": text, "text": text})})
    names = ("prompt", "chosen", "rejected")
    features = Features({"images": List(Picture()), **dict.fromkeys(names, messages), "source": text})
    image = {"bytes": Path("images/a.png").read_bytes(), "path": "cat.png"}
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": answer}]}] for answer in "34"]
    row = {"images": [image], "prompt": prompt, "chosen": answers[0], "rejected": answers[1], "source": "x"}
    dated = Dataset.from_list([row], features=features).add_column("when", [datetime(2026, 1, 1)])
    dated.to_parquet("in.parquet")
    summary = convert("parquet", "jsonl", "in.parquet", "ours")
    assert "The column 'when' of in.parquet is left away: JSON has no type for what it holds." in summary.notes
    (ours,) = read_stage(Path("ours"))
    assert ours["prompt"] == [{"role": "user", "content": "How many?"}]
    convert("jsonl", "parquet", "ours", "back", image_root="ours")
    (back,) = written("parquet", "back")
    assert back["images"] == row["images"]
    assert back["source"] == "x"
    assert [part["type"] for part in back["prompt"][0]["content"]] == ["image", "text"]


@pytest.mark.parametrize("kind", ["conversations", "questions"])
def test_conversations_and_questions_go_through_parquet_too(folder: Path, kind: str) -> None:
    question = {"id": "q", "images": ["a.png"], "question": "How many?", "answer": "3", "source": "s", "level": 2}
    conversation = {
        "id": "c",
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": "How many?"}],
        "completion": [{"role": "assistant", "content": "3"}],
    }
    row = question if kind == "questions" else conversation
    write_rows(Path("in/00000.jsonl"), [row])
    convert("jsonl", "parquet", "in", "hub")
    convert("parquet", "jsonl", "hub", "back")
    (back,) = read_stage(Path("back"))
    assert texts_of([{**back, "images": []}]) == texts_of([{**row, "images": []}])


def test_large_parquet_data_is_cut_into_groups_and_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    monkeypatch.setattr(parquet_format, "_ROWS_OF_A_GROUP", 4)
    monkeypatch.setattr(parquet_format, "_BYTES_OF_A_FILE", 8 * Path("images/a.png").stat().st_size)
    write_rows(Path("pairs/0.jsonl"), [{**PAIR, "id": str(number)} for number in range(10)])
    convert("jsonl", "parquet", "pairs", "hub")
    paths = sorted(Path("hub/data").iterdir())
    assert [path.name for path in paths] == ["train-00000.parquet", "train-00001.parquet"]
    assert [parquet.ParquetFile(path).metadata.num_row_groups for path in paths] == [2, 1]
    assert [row["id"] for row in written("parquet", "hub")] == [str(number) for number in range(10)]


def test_a_parquet_file_holds_one_kind_of_rows(folder: Path) -> None:
    write_rows(Path("in/0.jsonl"), [PAIR, {"id": "q", "question": "How many?"}])
    with pytest.raises(InputError, match="'q' is one of questions after others of pairs. Convert them apart"):
        convert("jsonl", "parquet", "in", "hub")
    assert [*Path("hub").rglob("*.parquet")] == [*Path("hub").rglob("*.tmp")] == []


def test_what_is_no_parquet_file_is_named(folder: Path) -> None:
    Path("x.parquet").write_text("no")
    with pytest.raises(InputError, match="x.parquet is not a whole Parquet file"):
        convert("parquet", "jsonl", "x.parquet", "ours")
    with pytest.raises(InputError, match="images is no Parquet file"):
        convert("parquet", "jsonl", "images", "ours2")


# What the trainer makes of it


@pytest.mark.parametrize("name", ["trl", "jsonl"])
def test_the_trainer_reads_what_is_written_with_pictures_in_their_places(folder: Path, name: str) -> None:
    convert("mmpr", name, put("mmpr", GOLDEN["mmpr"]), "data")
    read = preference_dataset(["data"], "images")
    assert [len(row["images"]) for row in read] == [1, 2, 1, 0, 0, 0, 1, 0, 1, 2]
    assert read[0]["prompt"] == [{"role": "user", "content": "How many cats?"}]
    assert read[9]["prompt"][0]["content"][1] == {"type": "image"}
    assert read[9]["chosen"] == [{"role": "assistant", "content": "no"}]


def test_sft_reads_conversations_that_are_converted(folder: Path) -> None:
    convert("internvl_sft", "jsonl", put("internvl_sft", GOLDEN["internvl_sft"]), "data")
    read = sft_dataset(["data"], "images")
    assert [len(row["images"]) for row in read] == [1, 0, 2]
    assert [message["role"] for message in read[0]["prompt"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in read[2]["prompt"][0]["content"]] == ["text", "image", "text", "image", "text"]


# What is refused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "../x.png"}, "an image outside the image root"),
        ({"image": "/etc/x.png"}, "an image outside the image root"),
        ({"image": ["a.png", "b/../../x.png"]}, "an image outside the image root"),
        ({"image": "https://example.org/a.png"}, "an image that is an address, not a path"),
        ({"image": 3}, "an image that is no path"),
        ({"question": "<image>\n<image>\nHow many?"}, "placeholders that do not match the images"),
        ({"image": None}, "placeholders that do not match the images"),
        ({"chosen": "an <image>"}, "a text that holds <image> where no picture is meant"),
        ({"rejected": None}, "an empty `rejected`"),
        ({"chosen": ""}, "an empty `chosen`"),
        ({"chosen": ["3"]}, "a text that is no text"),
        ({"question": None}, "no `question`"),
    ],
)
def test_a_row_that_means_nothing_is_left_out_and_listed(folder: Path, row: Row, reason: str) -> None:
    good = GOLDEN["mmpr"][0]
    summary = convert("mmpr", "jsonl", put("mmpr", [good, {**good, **row}, good]), "ours")
    assert [left["reason"] for left in read_rows(Path("ours/dropped/00000.jsonl"))] == [reason]
    assert next(read_rows(Path("ours/dropped/00000.jsonl")))["id"] == "in.jsonl, line 2"
    assert found(summary) == {"pairs": "2", f"left out: {reason}": "1"}
    assert check("mmpr", "meta.json").exit_code == 1


def test_an_absolute_path_under_the_root_becomes_relative_and_comes_back(folder: Path) -> None:
    row = {**GOLDEN["mmpr"][0], "image": str(folder / "images" / "a.png")}
    convert("mmpr", "jsonl", put("mmpr", [row]), "ours")
    assert next(read_stage(Path("ours")))["images"] == ["a.png"]
    convert("jsonl", "mmpr", "ours", "back")
    assert written("mmpr", "back") == [row]


def test_a_video_is_left_out(folder: Path) -> None:
    row = GOLDEN["mammoth_vl"][1] | {"video": "a.mp4"}
    summary = convert("mammoth_vl", "jsonl", put("mammoth_vl", [row, GOLDEN["mammoth_vl"][0]]), "ours")
    assert found(summary) == {"conversations": "1", "left out: a video": "1"}


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("ms_swift", {"messages": []}, "no `messages`"),
        (
            "ms_swift",
            {"messages": [{"role": "user", "content": "?"}]},
            "messages that do not end with the chosen answer",
        ),
        ("ms_swift", {"rejected_response": None}, "an empty `rejected`"),
        ("llamafactory", {"chosen": "3"}, "a turn that is not `from` human, gpt or system with a text as its `value`"),
        ("llamafactory", {"rejected": {"from": "human", "value": "4"}}, "a response that is not the assistant's"),
        ("llamafactory", {"conversations": []}, "images without a user's turn"),
        ("trl", {"rejected": None}, "no `rejected`"),
        ("trl", {"chosen": []}, "an empty `chosen`"),
        (
            "trl",
            {"prompt": [{"role": "user", "content": [{"type": "image"}] * 2}]},
            "placeholders that do not match the images",
        ),
        ("trl", {"chosen": "3", "rejected": "4"}, "strings in place of messages in a row with images"),
        ("internvl_sft", {"conversations": None}, "no `conversations`"),
        ("internvl_prompt", {"question": 3}, "no `question`"),
    ],
)
def test_every_reader_says_what_it_cannot_read(folder: Path, name: str, row: Row, reason: str) -> None:
    summary = convert(name, "jsonl", put(name, [{**GOLDEN[name][0], **row}, GOLDEN[name][0]]), "ours")
    assert f"left out: {reason}" in found(summary)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "What is <image>?"}, "a text that holds <image> where no picture is meant"),
        (
            {"prompt": [{"role": "user", "content": "?", "name": "Ada"}]},
            "a message that is more than a role and a text",
        ),
        ({"images": ["../a.png"]}, "an image outside the image root"),
        ({"images": "a.png"}, "`images` that is no list"),
        ({"chosen": [{"role": "assistant", "content": "3"}] * 2}, "an answer of several messages"),
    ],
)
def test_what_cannot_be_said_in_a_format_is_left_out_and_listed(folder: Path, row: Row, reason: str) -> None:
    talk = {"chosen": [{"role": "assistant", "content": "3"}], "rejected": [{"role": "assistant", "content": "4"}]}
    pair = {**PAIR, **(talk if isinstance(row.get("prompt"), list) or "chosen" in row else {}), **row}
    write_rows(Path("pairs/0.jsonl"), [PAIR, pair])
    summary = convert("jsonl", "ms_swift", "pairs", "there")
    assert f"left out: {reason}" in found(summary)
    assert len(written("ms_swift", "there")) == 1


def test_kinds_that_do_not_fit_are_refused_with_what_would(folder: Path) -> None:
    with pytest.raises(
        InputError, match="mmpr holds pairs, and internvl_sft can only hold conversations. Formats for"
    ):
        convert("mmpr", "internvl_sft", put("mmpr", GOLDEN["mmpr"]), "there")
    write_rows(Path("in/0.jsonl"), [{"id": "q", "question": "How many?"}])
    message = "line 1 holds questions, and trl .*Formats for questions: jsonl, internvl_prompt, parquet."
    with pytest.raises(InputError, match=message):
        convert("jsonl", "trl", "in", "there")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs `to`, the format to write, and `output`"),
        ({"to": "trl"}, "needs `to`, the format to write, and `output`"),
        ({"check": True, "shard_size": 0}, "`shard_size` must be at least 1, got 0"),
        ({"check": True, "max_similarity": 0.0}, "`max_similarity` must be above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConvertConfig(input="x", from_="jsonl", **settings)


@pytest.mark.parametrize("name", FORMATS)
def test_an_input_that_is_not_there_is_named(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="nowhere"):
        convert(name, "jsonl", "nowhere", "ours")


def test_the_settings_are_called_from_and_to() -> None:
    argv = ["--input", "a", "--from", "mmpr", "--to", "jsonl", "--output", "b"]
    (config,) = read_settings("convert", (ConvertConfig,), argv)
    assert (config.from_, config.to) == ("mmpr", "jsonl")
    with pytest.raises(InputError, match="also needs `from`"):
        read_settings("convert", (ConvertConfig,), ["--input", "a"])
    with pytest.raises(InputError, match="`from` is 'coco' on the command line, but it takes jsonl | mmpr"):
        read_settings("convert", (ConvertConfig,), ["--input", "a", "--from", "coco"])


def test_names_of_images_stay_in_the_root(folder: Path) -> None:
    assert name_in_root("x/../a.png", Path("images")) == "x/../a.png"
    for name in ("..", "a/../../b", "file:///a.png", "data:image/png;base64,AAAA", ""):
        with pytest.raises(RefusedError):
            name_in_root(name, Path("images"))


# Whole or not at all


@pytest.mark.parametrize("name", [*OF_PAIRS, "parquet"])
def test_the_same_input_gives_the_same_bytes(folder: Path, name: str) -> None:
    dice = random.Random(3)
    write_rows(Path("pairs/0.jsonl"), [random_pair(dice, number) for number in range(30)])
    convert("jsonl", name, "pairs", "out/x", shard_size=7)
    once = files_of("out/x")
    convert("jsonl", name, "pairs", "out/x", shard_size=7)
    assert files_of("out/x") == once
    Path("out").rename("first")
    convert("jsonl", name, "pairs", "out/x", shard_size=7)
    assert files_of("out/x") == once


@pytest.mark.parametrize("name", ["jsonl", "mmpr", "llamafactory", "parquet"])
def test_a_conversion_that_is_killed_is_finished_by_the_same_command(folder: Path, name: str) -> None:
    write_rows(Path("pairs/0.jsonl"), [{**PAIR, "id": str(number), "source": str(number % 3)} for number in range(60)])
    convert("jsonl", name, "pairs", "whole/x", shard_size=7)
    code = (
        "import os, sys\n"
        "from data_builders import convert\n"
        "from data_builders.formats import files\n"
        "files._HELD = 10\n"
        "rows = convert._row\n"
        "left = [40]\n"
        "def dying(found, source):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), 9)\n"
        "    return rows(found, source)\n"
        "convert._row = dying\n"
        "config = dict(from_='jsonl', to=sys.argv[1], input='pairs', output='killed/x', image_root='images')\n"
        "convert.run(convert.ConvertConfig(**config, shard_size=7))\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code, name], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == -9
    assert not Path("killed/x/meta.json").exists()
    convert("jsonl", name, "pairs", "killed/x", shard_size=7)
    killed = {path: data.replace(b"killed/x", b"whole/x") for path, data in files_of("killed/x").items()}
    assert killed == files_of("whole/x")


def test_an_output_of_other_settings_is_not_mixed(folder: Path) -> None:
    write_rows(Path("pairs/0.jsonl"), [PAIR])
    convert("jsonl", "trl", "pairs", "there")
    with pytest.raises(InputError, match="there was filled with other settings .to: then 'trl', now 'mmpr'"):
        convert("jsonl", "mmpr", "pairs", "there")


def test_half_a_character_is_escaped_and_comes_back(folder: Path) -> None:
    Path("in.jsonl").write_text('{"question": "2?", "chosen": "cut \\ud83d", "rejected": "b", "source": "s"}\n')
    convert("mmpr", "trl", "in.jsonl", "there")
    assert written("trl", "there")[0]["chosen"][0]["content"] == "cut \ud83d"


# --check


def test_a_check_of_clean_data_finds_nothing(folder: Path) -> None:
    summary = check("mmpr", put("mmpr", GOLDEN["mmpr"][:2]), output="report")
    assert summary.exit_code == 0
    assert found(summary) == {"pairs": "2", "images": "2"}
    assert summary.notes[-1] == "No faults were found."
    assert "`prompt`: characters 5 / 5 / 14 / 14 / 14, words 1 / 1 / 3 / 3 / 3 (least, median, 90%, 99%, most)." in (
        summary.notes
    )
    assert json.loads(Path("report/check.json").read_text())["rows"] == {"pairs": 2}
    assert [path.name for path in Path("report").iterdir()] == ["check.json"]


def test_a_check_finds_every_fault(folder: Path) -> None:
    Path("images/broken.png").write_bytes(b"no picture")
    (folder / "outside.png").write_bytes(Path("images/a.png").read_bytes())
    os.symlink(folder / "outside.png", "images/link.png")
    long = "The cat sits on the mat and looks at the red ball that lies under the old chair by the door of the house."
    rows = [
        PAIR,
        {**PAIR, "id": "again"},
        {**PAIR, "images": ["gone.png"]},
        {**PAIR, "images": ["broken.png"]},
        {**PAIR, "images": ["../outside.png"]},
        {**PAIR, "images": ["link.png"]},
        {**PAIR, "chosen": "Same.", "rejected": "Same. "},
        {**PAIR, "prompt": " ", "images": ["b.png"]},
        {**PAIR, "prompt": "What is <image>?"},
        {**PAIR, "chosen": long, "rejected": "No."},
        {**PAIR, "chosen": long + " Yes!", "rejected": "No."},
        {**PAIR, "chosen": long, "rejected": long + " Yes!", "images": []},
        {"id": "none"},
    ]
    write_rows(Path("pairs/0.jsonl"), rows)
    summary = check("jsonl", "pairs", output="report")
    assert summary.exit_code == 1
    assert found(summary) == {
        "pairs": "11",
        "images": "5",
        "fault: an image outside the image root": "2",
        "fault: a missing image": "1",
        "fault: a broken image": "1",
        "fault: chosen and rejected are the same": "1",
        "fault: an empty `prompt`": "1",
        "fault: placeholders that do not match the images": "1",
        "fault: neither a pair, a conversation, a question nor a response": "1",
        "remark: duplicate rows": "1",
        "remark: near-duplicate rows of one question": "1",
        "remark: chosen and rejected are nearly the same": "1",
    }
    report = json.loads(Path("report/check.json").read_text())
    assert report["remarks"]["duplicate rows"]["examples"] == ["rows 1 and 2"]
    assert report["remarks"]["near-duplicate rows of one question"]["examples"] == ["rows 9 and 10"]
    assert report["faults"]["a missing image"]["examples"] == ["pairs/0.jsonl, line 3: gone.png"]


def test_near_duplicates_are_looked_for_within_a_question(folder: Path) -> None:
    dice = random.Random(4)
    vocabulary = [f"word{number}" for number in range(500)]
    rows = []
    for question in range(20):
        for _ in range(15):
            chosen = " ".join(dice.choices(vocabulary, k=60))
            rows.append({**PAIR, "prompt": f"question {question}", "chosen": chosen, "rejected": chosen[::-1]})
    twin = {**rows[40], "chosen": rows[40]["chosen"] + " indeed"}
    write_rows(Path("pairs/0.jsonl"), [*rows, twin, {**twin, "prompt": "another question"}])
    summary = check("jsonl", "pairs")
    assert found(summary)["remark: near-duplicate rows of one question"] == "1"
    assert ["remark: near-duplicate rows of one question", "1", "rows 41 and 301"] in summary.rows
    assert summary.exit_code == 0


def test_a_check_keeps_hashes_and_no_rows(folder: Path) -> None:
    def rows(number: int) -> Iterator[Row]:
        for index in range(number):
            yield {**PAIR, "id": str(index), "images": [], "prompt": f"{index}?", "chosen": f"{index} " + "x y " * 200}

    peaks = []
    for number in (200, 700):
        write_rows(Path(f"pairs{number}/0.jsonl"), rows(number))
        tracemalloc.start()
        check("jsonl", f"pairs{number}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 500 * 600


def test_embedded_images_are_checked_where_they_are(folder: Path) -> None:
    write_rows(Path("pairs/0.jsonl"), [PAIR])
    convert("jsonl", "parquet", "pairs", "hub")
    assert check("parquet", "hub").exit_code == 0
    Path("images/a.png").write_bytes(b"no picture")
    convert("jsonl", "parquet", "pairs", "worse")
    assert found(check("parquet", "worse"))["fault: a broken image"] == "1"
    assert not Path("images", "images").exists()


@pytest.mark.parametrize("name", GOLDEN)
def test_every_format_can_be_checked(folder: Path, name: str) -> None:
    start = put(name, GOLDEN[name])
    summary = check(name, start)
    assert summary.exit_code == 0
    assert sum(
        int(count) for what, count, _ in summary.rows if what in ("pairs", "conversations", "questions", "responses")
    ) == (len(GOLDEN[name]))


def test_the_command_ends_with_1_where_there_are_faults(folder: Path) -> None:
    write_rows(Path("pairs/0.jsonl"), [{**PAIR, "images": ["gone.png"]}])
    argv = ["convert", "--check", "--input", "pairs", "--from", "jsonl", "--image_root", "images"]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "mpo", *argv], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "fault: a missing image" in done.stdout
    assert "There are faults." in done.stdout


def test_pictures_of_any_type_are_named_by_what_they_are(folder: Path) -> None:
    stream = BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "JPEG")
    name = parquet_format._content_name(stream.getvalue())
    assert (name.startswith("images/"), name.endswith(".jpg"), len(name)) == (True, True, 43)
    assert parquet_format._content_name(b"no picture").endswith(".bin")
