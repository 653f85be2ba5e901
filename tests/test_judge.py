"""`mpo judge`: which responses get a verdict, which cannot, and what a verdict row holds."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_builders.engine import drop_reasons
from data_builders.judge import JudgeConfig, judge_rows, run
from data_builders.records import InputError, Row, Verdict
from data_builders.shards import read_rows, read_stage, write_rows


def response(name: str, text: str | None, answer: str | None = "3", **more: object) -> Row:
    row = {"id": name, "images": [], "question": "How many?", "answer": answer, "prompt": "How many? Think."}
    return {**row, "response": text, "finish_reason": "stop", "sampler": {"model": "m", "index": 0}, **more}


RIGHT = response("right", "There are three. Final answer: 3", source="count")
WRONG = response("wrong", "There are four. Final answer: 4", source="count")
UNREADABLE = response("unreadable", "I see some animals on a meadow, and many more behind the trees.")
FAILED = response("failed", None, error="server gone", finish_reason="error")
PARTIAL = response("partial", "Final answer: 3", error="the response contains an image token", finish_reason="error")
OPEN = response("open", "Final answer: 3", answer=None)


@pytest.fixture
def config(tmp_path: Path) -> JudgeConfig:
    """Two shards with a response of every kind."""
    write_rows(tmp_path / "responses" / "00000.jsonl", [RIGHT, WRONG, OPEN])
    write_rows(tmp_path / "responses" / "00001.jsonl", [UNREADABLE, FAILED, OPEN])
    return JudgeConfig(responses=str(tmp_path / "responses"), output=str(tmp_path / "verdicts"), shard_size=3)


def test_a_verdict_is_the_response_with_what_was_found_out() -> None:
    verdicts, unknown = judge_rows([RIGHT, WRONG], kind="number")
    assert verdicts == [
        {**RIGHT, "verdict": "correct", "prediction": "3", "rule": "number"},
        {**WRONG, "verdict": "wrong", "prediction": "4", "rule": "number"},
    ]
    assert unknown == []


def test_a_response_without_a_final_answer_has_no_answer() -> None:
    ((verdict,), _) = judge_rows([UNREADABLE])
    assert (verdict["verdict"], verdict["prediction"]) == ("no_answer", None)


@pytest.mark.parametrize("row", [FAILED, PARTIAL, response("null", None)])
def test_a_failed_response_has_no_answer_and_the_rule_says_that_it_failed(row: Row) -> None:
    assert judge_rows([row]) == ([{**row, "verdict": "no_answer", "prediction": None, "rule": "failed"}], [])


def test_a_response_to_a_question_without_answer_is_left_out_with_the_reason() -> None:
    without = {name: value for name, value in OPEN.items() if name != "answer"}
    assert judge_rows([OPEN, without]) == ([], [{"id": "open", "reason": "answer unknown"}] * 2)


def test_kind_and_style_are_passed_on() -> None:
    row = response("cm", r"It is \boxed{3.1}. Final answer: 7")
    assert judge_rows([row], kind="number", style="boxed")[0][0]["verdict"] == "wrong"
    assert judge_rows([row], kind="relaxed", style="boxed")[0][0]["verdict"] == "correct"
    assert judge_rows([row], kind="relaxed", style="final_answer")[0][0]["prediction"] == "7"


def test_the_options_of_the_question_are_seen() -> None:
    row = response("cat", "Final answer: dog", "B", question="What is it?\nA. cat\nB. dog")
    assert judge_rows([row])[0][0]["verdict"] == "correct"


def test_the_verb_keeps_the_shards_and_counts_verdicts_and_what_was_left_out(config: JudgeConfig) -> None:
    summary = run(config)
    output = Path(config.output)
    ids = {path.name: [row["id"] for row in read_rows(path, Verdict)] for path in sorted(output.glob("*.jsonl"))}
    assert ids == {"00000.jsonl": ["right", "wrong"], "00001.jsonl": ["unreadable", "failed"]}
    assert drop_reasons(output) == {"answer unknown": 2}
    assert summary.columns == ["source", "correct", "wrong", "no answer", "share correct"]
    assert summary.rows == [["(no source)", "0", "0", "2", "0.0%"], ["count", "1", "1", "0", "50.0%"]]
    assert summary.notes == [
        f"Left out: 2 answer unknown; listed in {output / 'dropped'}.",
        f"{output / 'audit.json'} says where rules disagree.",
    ]
    assert summary.next_command == f"mpo pair --verdicts {config.output} --output pairs"


def test_a_shard_that_is_gone_is_judged_again(config: JudgeConfig) -> None:
    run(config)
    shard = Path(config.output) / "00001.jsonl"
    before = shard.read_bytes()
    shard.unlink()
    run(config)
    assert shard.read_bytes() == before


def test_responses_in_one_file_of_any_name_are_judged(config: JudgeConfig, tmp_path: Path) -> None:
    write_rows(tmp_path / "all.json", [RIGHT])
    run(replace(config, responses=str(tmp_path / "all.json")))
    assert [row["verdict"] for row in read_stage(Path(config.output))] == ["correct"]


def test_missing_responses_are_refused_and_the_folder_stays_free(config: JudgeConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        run(replace(config, responses=str(tmp_path / "nowhere")))
    run(config)


def test_a_row_that_is_no_response_is_refused_with_its_line(config: JudgeConfig) -> None:
    write_rows(Path(config.responses) / "00001.jsonl", [RIGHT, {"id": "q", "question": "?", "response": "3"}])
    with pytest.raises(InputError, match=r"00001\.jsonl, line 2: `prompt` is missing\. A response row has the fields"):
        run(config)


def test_the_folder_of_the_responses_is_not_taken_for_output(tmp_path: Path) -> None:
    write_rows(tmp_path / "responses.jsonl", [RIGHT])
    with pytest.raises(InputError, match="Give an output folder of its own"):
        run(JudgeConfig(responses=str(tmp_path / "responses.jsonl"), output=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "then"),
    [({"kind": "text"}, "kind: then 'auto'"), ({"style": "boxed"}, "style: then 'auto'")]
    + [({"compat": "internvl"}, "compat: then None"), ({"shard_size": 2}, "shard_size: then 3")],
)
def test_another_rule_wants_another_folder(config: JudgeConfig, change: dict[str, str], then: str) -> None:
    run(config)
    with pytest.raises(InputError, match=rf"other settings \({then}"):
        run(replace(config, **change))


def test_a_question_says_how_it_wants_to_be_judged() -> None:
    rows = [
        response("sofa", "Final answer: settee", "couch", answers=["sofa", "settee"]),
        response("several", "Final answer: 7", None, answers=["6", "7"]),
        response("near", "Final answer: 102", "100", answer_kind="relaxed"),
        response("listed", "Final answer: dog", "B", options=["cat", "dog"]),
        response("named", "Final answer: B", "dog", options={"a": "cat", "b": "dog"}),
        response("other", "Final answer: B", "dog", options={"A": "dog", "B": "cat"}, question="A. cat B. dog"),
    ]
    verdicts, unknown = judge_rows(rows)
    assert [(row["id"], row["verdict"], row["rule"]) for row in verdicts] == [
        ("sofa", "correct", "text"),
        ("several", "correct", "number"),
        ("near", "correct", "relaxed"),
        ("listed", "correct", "choice"),
        ("named", "correct", "choice"),
        ("other", "wrong", "choice"),
    ]
    assert unknown == []
    assert judge_rows([response("none", "3", None, answers=[])])[1] == [{"id": "none", "reason": "answer unknown"}]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answer_kind", "numbers", r"`answer_kind` is 'numbers': input should be 'auto', 'choice'"),
        ("answers", "3", r"`answers` is '3': input should be a valid list"),
        ("answers", [3], r"`answers\.0` is 3: input should be a valid string"),
        ("options", "A. cat", r"`options.* is 'A\. cat': input should be a valid dict"),
    ],
)
def test_a_broken_wish_is_refused_with_its_line_before_the_work(
    config: JudgeConfig, field: str, value: object, message: str
) -> None:
    write_rows(Path(config.responses) / "00001.jsonl", [RIGHT, {**WRONG, field: value}])
    with pytest.raises(InputError, match=rf"00001\.jsonl, line 2: {message}.*A response row has the fields"):
        run(config)
    assert not Path(config.output).exists()


def test_the_released_scorers_can_be_asked_instead(config: JudgeConfig) -> None:
    write_rows(
        Path(config.responses) / "00001.jsonl",
        [response("doc", "a\nb\nFinal answer: xyz", "42", source="docvqa"), FAILED],
    )
    run(replace(config, compat="internvl"))
    verdicts = {row["id"]: (row["verdict"], row["rule"]) for row in read_stage(Path(config.output), Verdict)}
    assert verdicts["doc"] == ("correct", "internvl:anls")
    assert verdicts["right"] == ("no_answer", "internvl:format")  # for want of a second line break
    assert verdicts["failed"] == ("no_answer", "failed")


def test_the_number_of_workers_changes_no_byte(config: JudgeConfig, tmp_path: Path) -> None:
    run(config)
    run(replace(config, output=str(tmp_path / "two"), workers=2))
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.json*")}
        for folder in (Path(config.output), tmp_path / "two")
    ]
    assert files[0] == files[1]
    assert Path("audit.json") in files[0]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="`audit_rows` must be at least 0, got -1"):
        JudgeConfig(responses="r", output="v", audit_rows=-1)
