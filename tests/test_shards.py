"""JSONL files and folders of shards: what comes back, what is refused and how, and that nothing is half written."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_builders.records import InputError, Question, Row
from data_builders.shards import claim_folder, read_rows, read_stage, shard_paths, write_rows, write_text

GOOD = '{"id": "q-1", "question": "How many?"}\n'


def refusal(path: Path, model: type | None = Question) -> str:
    with pytest.raises(InputError) as error:
        list(read_rows(path, model))
    return str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "图中有三只猫 · 고양이 · قطة · 🐈‍⬛",
        'quotes " and \\ and \t and \n and \r\n',
        "line and paragraph separators: \u2028 \u2029 \x85 \x0b \x0c \x1c",
        "\x00\x7f\ufeff\uffff",
    ],
)
def test_any_text_comes_back_as_it_was(tmp_path: Path, text: str) -> None:
    rows = [{"id": "q", "question": text, text: [text]}, {"id": "r", "question": "next"}]
    write_rows(tmp_path / "a.jsonl", rows)
    assert list(read_rows(tmp_path / "a.jsonl", Question)) == rows
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 2


def test_rows_are_written_so_that_a_person_can_read_them(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"question": "图中有几只猫"}])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"question": "图中有几只猫"}\n'


def test_half_a_surrogate_pair_is_replaced_and_loses_no_shard(tmp_path: Path) -> None:
    response = json.loads(r'"cut \ud83d"')
    write_rows(tmp_path / "a.jsonl", [{"id": "q", "question": response, "extra": {"\udc00": "\ud83d\ude00"}}])
    (row,) = read_rows(tmp_path / "a.jsonl", Question)
    assert row["question"] == "cut \ufffd"
    assert list(row["extra"]) == ["\ufffd"]


def test_a_surrogate_pair_that_json_spells_out_is_the_character_it_stands_for(tmp_path: Path) -> None:
    write_text(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude00"}' + "\n")
    rows = list(read_rows(tmp_path / "a.jsonl"))
    write_rows(tmp_path / "b.jsonl", rows)
    assert (tmp_path / "b.jsonl").read_text(encoding="utf-8") == '{"text": "😀"}\n'


def test_a_line_that_is_cut_off_is_named_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + GOOD + '{"id": "q-3", "ques', encoding="utf-8")
    message = refusal(path)
    assert message.startswith(f"{path}, line 3: not a JSON object (")
    assert '\'{"id": "q-3", "ques\'' in message
    assert "Each line must be one whole JSON object; was the file cut off" in message


def test_a_json_array_over_many_lines_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[\n {"id": "q-1",\n  "question": "?"}\n]\n', encoding="utf-8")
    message = refusal(path)
    assert "line 1: not a JSON object" in message
    assert "is it one big JSON array?" in message


def test_a_field_that_is_missing_or_of_the_wrong_type_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + '{"id": "q-2"}\n', encoding="utf-8")
    assert f"{path}, line 2: `question` is missing" in refusal(path)
    path.write_text(GOOD + '\n{"id": 3, "question": "?"}\n', encoding="utf-8")
    assert f"{path}, line 3: `id` is 3: input should be a valid string" in refusal(path)
    path.write_text("5\n", encoding="utf-8")
    assert f"{path}, line 1: expected a JSON object with the fields of a Question, got 5." in refusal(path)


@pytest.mark.parametrize("text", ["5", "null", '"text"', '[{"id": "q-1"}]'])
def test_a_line_of_json_that_is_no_object_is_refused_whatever_the_rows_are(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{GOOD}{text}\n", encoding="utf-8")
    assert f"line 2: expected a JSON object, got {json.loads(text)!r}. " in refusal(tmp_path / "a.jsonl", None)


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{GOOD}  \t\n\r\n{GOOD}\n\n", encoding="utf-8")
    assert len(list(read_rows(path, Question))) == 2
    path.write_text("\n\n{broken\n", encoding="utf-8")
    assert "line 3" in refusal(path)


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD + GOOD).replace("\n", "\r\n").encode())
    assert list(read_rows(path, Question)) == [{"id": "q-1", "question": "How many?"}] * 2


def test_a_last_line_without_a_line_end_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD.strip(), encoding="utf-8")
    assert len(list(read_rows(tmp_path / "a.jsonl"))) == 1


def test_what_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"question": "où"}\n'.encode("latin-1"))
    assert refusal(path).startswith(f"{path}, line 1: not UTF-8 text (")
    assert refusal(path).endswith("is it a JSONL file?")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.jsonl") == f"{tmp_path / 'a.jsonl'} does not exist."


def test_the_shards_of_a_folder_are_its_jsonl_files_in_order_of_name(tmp_path: Path) -> None:
    shards = [f"{number:05d}.jsonl" for number in range(12)]
    for name in (*reversed(shards), ".00003.jsonl", "settings.json", "notes.txt", "00012.jsonl.tmp"):
        (tmp_path / name).write_text(GOOD, encoding="utf-8")
    (tmp_path / "dropped").mkdir()
    write_rows(tmp_path / "dropped" / "00002.jsonl", [{"id": "q", "reason": "failed"}])
    assert [path.name for path in shard_paths(tmp_path)] == shards
    assert shard_paths(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_a_folder_without_shards_a_missing_one_and_one_without_rows_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; expected a JSONL file or a folder of JSONL shards"):
        list(read_stage(tmp_path / "missing"))
    with pytest.raises(InputError, match="holds no JSONL shard: the step that fills this folder has not run, or fail"):
        list(read_stage(tmp_path))
    write_rows(tmp_path / "00000.jsonl", [])
    with pytest.raises(InputError, match="holds no row: the step that writes it produced nothing"):
        list(read_stage(tmp_path))
    with pytest.raises(InputError, match="00000.jsonl holds no row"):
        list(read_stage(tmp_path / "00000.jsonl"))


def test_a_stage_is_the_rows_of_all_its_shards(tmp_path: Path) -> None:
    write_rows(tmp_path / "00001.jsonl", [{"id": "c"}])
    write_rows(tmp_path / "00000.jsonl", [{"id": "a"}, {"id": "b"}])
    write_rows(tmp_path / "00002.jsonl", [])
    assert [row["id"] for row in read_stage(tmp_path)] == ["a", "b", "c"]


def failing_rows() -> Iterator[Row]:
    yield {"id": "a"}
    raise RuntimeError("the model is gone")


@pytest.mark.parametrize("before", [None, "the rows of yesterday\n"])
def test_a_failure_while_rows_are_made_leaves_the_folder_as_it_was(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "a.jsonl"
    if before:
        path.write_text(before, encoding="utf-8")
    with pytest.raises(RuntimeError, match="the model is gone"):
        write_rows(path, failing_rows())
    assert [(file.name, file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()] == (
        [("a.jsonl", before)] if before else []
    )


@pytest.mark.parametrize("before", [None, "the rows of yesterday\n"])
@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_while_a_file_is_written_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, failing: str
) -> None:
    path = tmp_path / "a.jsonl"
    if before:
        path.write_text(before, encoding="utf-8")

    def fail(*_: object) -> None:
        assert len(list(tmp_path.glob(".a.jsonl.*.tmp"))) == 1
        raise OSError("no space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="no space left"):
        write_rows(path, [{"id": "a"}])
    assert [(file.name, file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()] == (
        [("a.jsonl", before)] if before else []
    )


def test_a_value_that_json_cannot_hold_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_rows(tmp_path / "deep" / "a.jsonl", [{"id": "a"}, {"id": {1, 2}}])
    assert list(tmp_path.rglob("*.*")) == []


def test_writing_makes_the_folders_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.jsonl"
    write_rows(path, [{"id": "a"}])
    write_rows(path, [{"id": "b"}])
    assert path.read_text(encoding="utf-8") == '{"id": "b"}\n'
    assert [file.name for file in path.parent.iterdir()] == ["a.jsonl"]


def test_a_folder_takes_the_settings_that_filled_it_again(tmp_path: Path) -> None:
    settings = {"model": "m", "temperature": 0.7, "prompts": ("a", "b"), "nested": {"seed": None}, "名": "\ud800"}
    claim_folder(tmp_path / "out", settings)
    before = (tmp_path / "out" / "settings.json").read_bytes()
    write_rows(tmp_path / "out" / "00000.jsonl", [])
    claim_folder(tmp_path / "out", settings)
    assert (tmp_path / "out" / "settings.json").read_bytes() == before


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"model": "m", "seed": 1}, r"was filled with other settings \(seed: then 0, now 1\)"),
        ({"model": "n", "seed": 0}, r"\(model: then 'm', now 'n'\)"),
        ({"model": "m"}, r"\(seed: then 0, now None\)"),
        ({"model": "m", "seed": 0, "ratio": 0.5}, r"\(ratio: then None, now 0.5\)"),
    ],
)
def test_a_folder_refuses_other_settings_and_names_the_one_that_changed(
    tmp_path: Path, now: Row, message: str
) -> None:
    claim_folder(tmp_path, {"model": "m", "seed": 0})
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(InputError, match=message + r".* Give another output folder, or delete this one"):
        claim_folder(tmp_path, now)
    assert (tmp_path / "settings.json").read_bytes() == before


def test_a_folder_refuses_input_whose_content_changed(tmp_path: Path) -> None:
    questions, output = tmp_path / "questions.jsonl", tmp_path / "out"
    questions.write_text(GOOD, encoding="utf-8")
    claim_folder(output, {"seed": 0}, [questions])
    questions.touch()
    claim_folder(output, {"seed": 0}, [questions])
    questions.write_text(GOOD.replace("How", "Who"), encoding="utf-8")
    with pytest.raises(InputError, match=r"other settings \(inputs: then \{.*questions\.jsonl"):
        claim_folder(output, {"seed": 0}, [questions])


@pytest.mark.parametrize("change", ["changed", "added", "removed", "renamed"])
def test_a_folder_refuses_an_input_folder_with_another_content(tmp_path: Path, change: str) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    write_rows(source / "00000.jsonl", [{"id": "a"}])
    write_rows(source / "00001.jsonl", [{"id": "b"}])
    claim_folder(output, {}, [source])
    if change == "changed":
        write_rows(source / "00001.jsonl", [{"id": "c"}])
    elif change == "added":
        write_rows(source / "00002.jsonl", [])
    elif change == "removed":
        (source / "00001.jsonl").unlink()
    else:
        (source / "00001.jsonl").rename(source / "00002.jsonl")
    with pytest.raises(InputError, match="inputs: then"):
        claim_folder(output, {}, [source])


def test_a_folder_of_other_data_is_not_taken_for_output(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(GOOD, encoding="utf-8")
    with pytest.raises(
        InputError, match=r"holds questions\.jsonl but no settings\.json.* Give an output folder of its"
    ):
        claim_folder(tmp_path, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]


def test_a_file_is_not_taken_for_an_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("notes", encoding="utf-8")
    with pytest.raises(InputError, match="out is a file: give a folder"):
        claim_folder(tmp_path / "out", {})
