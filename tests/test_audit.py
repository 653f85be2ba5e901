"""The audit: counts of all verdicts, where the other rules disagree, and rows to read, chosen by hash."""

import json
from pathlib import Path

import pytest

from data_builders.audit import AUDIT_FILE, audit_verdicts, other_judgements
from data_builders.judge import JudgeConfig, judge_rows, run
from data_builders.records import Row
from data_builders.shards import write_rows


def response(name: str, final: str, answer: str = "100", index: int = 0, **more: object) -> Row:
    row = {
        "id": name,
        "images": ["a.png"],
        "question": "How many?",
        "answer": answer,
        "prompt": "?",
        "source": "count",
    }
    text = f"I look.\nI count.\nFinal answer: {final}"
    return {**row, "response": text, "finish_reason": "stop", "sampler": {"model": "m", "index": index}, **more}


ROWS = [
    response("same", "100"),
    response("near", "102"),
    response("unit", "100 kg"),
    response("far", "7"),
    response("open", "New York", "New York City", source="places"),
    response("failed", "", response=None, error="server gone", finish_reason="error"),
]


def audited(folder: Path, rows: list[Row], shard_size: int = 2, rows_per_source: int = 1000, seed: int = 0) -> Row:
    verdicts, _ = judge_rows(rows)
    for start in range(0, len(verdicts), shard_size):
        write_rows(folder / f"{start:05d}.jsonl", verdicts[start : start + shard_size])
    return audit_verdicts(folder, rows_per_source=rows_per_source, seed=seed)


def test_all_verdicts_are_counted_by_source_and_rule(tmp_path: Path) -> None:
    assert audited(tmp_path, ROWS, rows_per_source=0) == {
        "version": 1,
        "seed": 0,
        "rows_per_source": 0,
        "verdicts": [
            {"source": "count", "rule": "failed", "correct": 0, "wrong": 0, "no_answer": 1},
            {"source": "count", "rule": "number", "correct": 2, "wrong": 2, "no_answer": 0},
            {"source": "places", "rule": "text", "correct": 0, "wrong": 1, "no_answer": 0},
        ],
        "disagreements": [],
        "sample": [],
    }


def test_the_other_rules_are_asked_and_where_they_differ_is_counted_and_shown(tmp_path: Path) -> None:
    found = {
        (entry["source"], entry["rule"], entry["other"]): (
            entry["compared"],
            entry["differ"],
            {example["id"] for example in entry["examples"]},
        )
        for entry in audited(tmp_path, ROWS)["disagreements"]
    }
    assert found == {
        ("count", "number", "internvl"): (4, 1, {"unit"}),
        ("count", "number", "math"): (4, 0, set()),
        ("count", "number", "relaxed"): (4, 1, {"near"}),
        ("count", "number", "text"): (4, 1, {"unit"}),
        ("places", "text", "anls"): (1, 1, {"open"}),
        ("places", "text", "internvl"): (1, 0, set()),
    }


def test_an_example_has_all_that_is_needed_to_decide_who_is_right(tmp_path: Path) -> None:
    (entry,) = (e for e in audited(tmp_path, ROWS)["disagreements"] if e["other"] == "relaxed")
    assert entry["examples"] == [
        {
            "id": "near",
            "index": 0,
            "source": "count",
            "images": ["a.png"],
            "question": "How many?",
            "answers": ["100"],
            "response": "I look.\nI count.\nFinal answer: 102",
            "prediction": "102",
            "verdict": "wrong",
            "rule": "number",
            "other_verdict": "correct",
            "other_prediction": "102",
        }
    ]


def test_a_models_verdict_is_compared_with_all_rules_and_its_reply_is_shown(tmp_path: Path) -> None:
    row = judge_rows([ROWS[4]])[0][0] | {"verdict": "correct", "rule": "model", "judge": {"reply": "Yes"}}
    assert {rule: judgement.verdict for rule, judgement in other_judgements(row)} == {
        "text": "wrong",
        "anls": "correct",
        "internvl": "wrong",
    }
    write_rows(tmp_path / "0.jsonl", [row])
    assert audit_verdicts(tmp_path, rows_per_source=1)["sample"][0]["judge"] == {"reply": "Yes"}


def test_the_released_scorers_verdicts_are_compared_with_ours() -> None:
    row = response("doc", "xyz", "42", source="docvqa")
    (verdict,), _ = judge_rows([row], compat="internvl")
    ((rule, judgement),) = other_judgements(verdict)
    assert (verdict["verdict"], verdict["rule"], rule, judgement.verdict) == (
        "correct",
        "internvl:anls",
        "number",
        "wrong",
    )


MANY = [response(f"q{i}", str(95 + i % 10), index=i % 4, source=f"s{i % 2}") for i in range(200)]


def test_neither_order_nor_shards_change_which_rows_are_looked_at(tmp_path: Path) -> None:
    one = audited(tmp_path / "one", MANY, shard_size=200, rows_per_source=20)
    other = audited(tmp_path / "other", MANY[::-1], shard_size=7, rows_per_source=20)
    assert one == other
    assert [entry["compared"] for entry in one["disagreements"]] == [20] * len(one["disagreements"])
    assert len(one["sample"]) == 24
    assert len({(row["id"], row["index"]) for row in one["sample"]}) == 24
    assert one != audited(tmp_path / "again", MANY, rows_per_source=20, seed=1)


def test_at_most_five_examples_are_kept(tmp_path: Path) -> None:
    entries = audited(tmp_path, MANY)["disagreements"]
    assert {entry["differ"] > 5 for entry in entries if entry["other"] == "relaxed"} == {True}
    assert {len(entry["examples"]) for entry in entries if entry["other"] == "relaxed"} == {5}


def test_rows_that_are_all_the_same_are_no_trouble(tmp_path: Path) -> None:
    audit = audited(tmp_path, [ROWS[0]] * 50, shard_size=50, rows_per_source=10)
    assert audit["verdicts"][0]["correct"] == 50


@pytest.mark.parametrize(("name", "length"), [("response", 2003), ("prediction", 2003), ("question", 2003)])
def test_long_texts_are_cut(tmp_path: Path, name: str, length: int) -> None:
    row = response("long", "102", question="How many? " * 500) | {"response": "x" * 9000}
    (verdict,), _ = judge_rows([row | {"sampler": {"prompt": "boxed@0"}}], compat="internvl")
    write_rows(tmp_path / "0.jsonl", [verdict])
    assert len(audit_verdicts(tmp_path, rows_per_source=5)["sample"][0][name]) == length


def test_the_verb_writes_it_beside_the_shards_unless_told_not_to(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", ROWS)
    run(JudgeConfig(responses=str(tmp_path / "r.jsonl"), output=str(tmp_path / "v")))
    audit = json.loads((tmp_path / "v" / AUDIT_FILE).read_text(encoding="utf-8"))
    assert audit == audit_verdicts(tmp_path / "v", rows_per_source=1000)
    summary = run(JudgeConfig(responses=str(tmp_path / "r.jsonl"), output=str(tmp_path / "w"), audit_rows=0))
    assert not (tmp_path / "w" / AUDIT_FILE).exists()
    assert summary.notes == []
