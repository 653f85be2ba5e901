"""`mpo pair`: which responses are paired, how many, and that nothing but the question and the seed decides which."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_builders.engine import drop_reasons
from data_builders.pair import PairConfig, make_pairs, pair_rows, run
from data_builders.records import InputError, Pair, Row
from data_builders.shards import read_rows, read_stage, write_rows

ROOT = Path(__file__).parent.parent


def verdict(text: str | None, value: str, question: str = "How many?", **more: object) -> Row:
    row = {"id": question, "images": ["a.png"], "question": question, "answer": "3", "source": "count"}
    row |= {"prompt": f"{question} Think.", "response": text, "finish_reason": "stop", "sampler": {"model": "m"}}
    return {**row, "verdict": value, "prediction": text, "rule": "number", **more}


def right(*texts: str, **more: object) -> list[Row]:
    return [verdict(text, "correct", **more) for text in texts]


def wrong(*texts: str, **more: object) -> list[Row]:
    return [verdict(text, "wrong", **more) for text in texts]


def sides(pairs: list[Row]) -> list[tuple[str, str]]:
    return [(pair["chosen"], pair["rejected"]) for pair in pairs]


def many(question: str, count: int = 6) -> list[Row]:
    """`count` right and as many wrong responses to a question."""
    good = right(*(f"good {number}" for number in range(count)), question=question)
    return good + wrong(*(f"bad {number}" for number in range(count)), question=question)


def test_every_correct_response_is_paired_with_every_other_one() -> None:
    pairs = make_pairs([*right("3", "three"), *wrong("4"), verdict("hm", "no_answer")])
    assert sides(pairs) == [("3", "4"), ("3", "hm"), ("three", "4"), ("three", "hm")]
    assert [pair["kind"] for pair in pairs] == ["correctness", "format"] * 2


def test_a_pair_says_where_it_comes_from() -> None:
    good = verdict("3", "correct", sampler={"model": "m", "index": 0}, level="easy")
    bad = verdict("4 or", "wrong", sampler={"model": "m", "index": 5}, finish_reason="length", prediction="4")
    assert make_pairs([good, bad]) == [
        {
            "id": "How many?#0",
            "question_id": "How many?",
            "images": ["a.png"],
            "question": "How many?",
            "prompt": "How many? Think.",
            "chosen": "3",
            "rejected": "4 or",
            "kind": "correctness",
            "source": "count",
            "answer": "3",
            "chosen_meta": {
                "sampler": {"model": "m", "index": 0},
                "finish_reason": "stop",
                "verdict": "correct",
                "prediction": "3",
                "rule": "number",
            },
            "rejected_meta": {
                "sampler": {"model": "m", "index": 5},
                "finish_reason": "length",
                "verdict": "wrong",
                "prediction": "4",
                "rule": "number",
            },
        }
    ]


def test_responses_with_the_same_text_count_once() -> None:
    assert sides(make_pairs([*right("3", "3", "3"), *wrong("4", "4", "5")])) == [("3", "4"), ("3", "5")]


@pytest.mark.parametrize("value", ["wrong", "no_answer"])
def test_failed_and_empty_responses_are_no_part_of_any_pair(value: str) -> None:
    failed = [verdict(None, "no_answer", error="gone"), verdict("half", value, error="gone")]
    failed += [verdict("", value), verdict(" \n", value)]
    assert make_pairs([*right("3"), *failed]) == []
    assert sides(make_pairs([*right("3"), *failed, *wrong("4")])) == [("3", "4")]


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (4, 4), (35, 35), (36, 36), (100, 36)])
def test_at_most_so_many_pairs_are_kept_and_none_twice(count: int, expected: int) -> None:
    pairs = make_pairs(many("q"), max_pairs=count)
    assert len(set(sides(pairs))) == len(pairs) == expected
    assert [pair["id"] for pair in pairs] == [f"q#{number}" for number in range(expected)]
    assert (sides(pairs) == sorted(sides(pairs))) == (expected in (1, 36))  # in order where none is left out


def test_the_default_is_the_fifteen_pairs_of_mmpr() -> None:
    assert len(make_pairs(many("q"))) == 15


def test_pairs_over_the_limit_are_chosen_evenly() -> None:
    drawn = Counter(side for seed in range(600) for side in sides(make_pairs(many("q", 3), max_pairs=3, seed=seed)))
    assert len(drawn) == 9
    assert all(150 < count < 250 for count in drawn.values())  # 600 * 3 / 9 = 200


def test_seed_and_question_decide_which_pairs_are_kept() -> None:
    chosen = sides(make_pairs(many("q"), seed=0))
    assert sides(make_pairs(many("q"), seed=0)) == chosen
    assert sides(make_pairs(many("q"), seed=1)) != chosen
    assert sides(make_pairs(many("p"), seed=0)) != chosen
    other_image = [{**row, "images": ["b.png"]} for row in many("q")]
    assert sides(make_pairs(other_image, seed=0)) != chosen


def test_the_order_of_responses_changes_nothing_not_even_which_of_two_equal_ones_is_named() -> None:
    rows = [{**row, "sampler": {"index": number}} for number, row in enumerate([*many("q"), *many("q")])]
    expected = make_pairs(rows)
    for seed in range(5):
        assert make_pairs(random.Random(seed).sample(rows, len(rows))) == expected


def test_the_order_of_questions_changes_nothing_but_the_order_of_pairs() -> None:
    rows = [*many("p"), *many("q"), *many("r")]
    expected = {pair["id"]: pair for pair in pair_rows(rows)[0]}
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert {pair["id"]: pair for pair in pair_rows(shuffled)[0]} == expected
    assert len(expected) == 45


def test_questions_without_a_pair_are_listed_with_the_reason() -> None:
    rows = [
        *right("3", "three", question="all right"),
        *wrong("4", "5", question="all wrong"),
        verdict(None, "no_answer", question="all failed", error="gone"),
        *right("3", question="one right"),
        verdict(None, "no_answer", question="one right", error="gone"),
        *many("fine", 1),
    ]
    pairs, dropped = pair_rows(rows)
    assert [pair["question_id"] for pair in pairs] == ["fine"]
    assert {row["id"]: row["reason"] for row in dropped} == {
        "all right": "questions with only correct responses",
        "all wrong": "questions without a correct response",
        "all failed": "questions without a correct response",
        "one right": "questions with only correct responses",
    }


def test_nothing_judged_is_nothing_paired() -> None:
    assert make_pairs([]) == []
    assert pair_rows([]) == ([], [])


@pytest.mark.parametrize(
    ("answer", "good", "bad"),
    [
        ("no", "no", "none"),
        ("one", "one", "none of them"),
        ("A", "A", "a cat, BANANA, A."),
        ("3", "Final answer: 3", "Final answer: 33"),
        ("cat", "cat", "a cat and a dog"),
    ],
)
def test_an_answer_that_is_part_of_the_other_response_still_makes_a_pair(answer: str, good: str, bad: str) -> None:
    """The pipeline released with MMPR drops these."""
    rows = [{**row, "answer": answer} for row in (*right(good), *wrong(bad))]
    assert sides(make_pairs(rows)) == [(good, bad)]


def test_images_question_and_answer_make_a_question() -> None:
    rows = [*right("3"), *wrong("4")]
    for change in ({"images": ["b.png"]}, {"images": []}, {"question": "How many cats?"}, {"answer": "4"}):
        assert pair_rows([rows[0], {**rows[1], **change}])[0] == []
    assert len(pair_rows([rows[0], {**rows[1], "id": "other"}])[0]) == 1


def test_responses_to_differently_worded_prompts_are_never_paired() -> None:
    short = {"prompt": "How many? Be short."}
    assert make_pairs([*right("3"), *wrong("4", **short)]) == []
    rows = [*right("3"), *wrong("4"), *right("3", **short), *wrong("5", **short)]
    made = [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in make_pairs(rows)]
    assert sorted(made) == [("How many? Be short.", "3", "5"), ("How many? Think.", "3", "4")]
    _, dropped = pair_rows([*right("3"), *wrong("4", **short)])
    assert [row["reason"] for row in dropped] == ["questions without two verdicts on one prompt"]


@pytest.fixture
def config(tmp_path: Path) -> PairConfig:
    """Two shards with four questions, one of which makes no pair."""
    write_rows(tmp_path / "verdicts" / "00000.jsonl", [*many("p"), *many("q")])
    rows = [*many("r", 2), *right("3", question="easy"), *right("3", question="bare", source="")]
    rows += [verdict("hm", "no_answer", question="bare", source="")]
    write_rows(tmp_path / "verdicts" / "00001.jsonl", rows)
    return PairConfig(verdicts=str(tmp_path / "verdicts"), output=str(tmp_path / "pairs"))


def test_the_verb_writes_pairs_by_shard_and_counts_them(config: PairConfig) -> None:
    summary = run(config)
    output = Path(config.output)
    assert [len(list(read_rows(path, Pair))) for path in sorted(output.glob("*.jsonl"))] == [30, 5]
    assert drop_reasons(output) == {"questions with only correct responses": 1}
    assert summary.columns == ["source", "pairs", "correctness", "format"]
    assert summary.rows == [["(no source)", "1", "0", "1"], ["count", "34", "34", "0"]]
    assert summary.notes == [f"Left out: 1 questions with only correct responses; listed in {output / 'dropped'}."]
    assert f"mpo train --data {config.output} " in summary.next_command


def test_the_layout_of_shards_changes_nothing(config: PairConfig, tmp_path: Path) -> None:
    run(config)
    rows = list(read_stage(Path(config.verdicts)))
    write_rows(tmp_path / "joined.jsonl", rows[::-1])
    run(replace(config, verdicts=str(tmp_path / "joined.jsonl"), output=str(tmp_path / "again")))
    apart, joined = (
        sorted(json.dumps(row) for row in read_stage(Path(folder))) for folder in (config.output, tmp_path / "again")
    )
    assert apart == joined


def test_a_question_that_is_spread_over_two_shards_is_refused(config: PairConfig) -> None:
    write_rows(Path(config.verdicts) / "00002.jsonl", right("three", question="p"))
    message = (
        r"the responses to 'p' are spread over 00000\.jsonl and 00002\.jsonl: .* Join the files and give the joine"
    )
    with pytest.raises(InputError, match=message):
        run(config)
    assert not Path(config.output).exists()


def test_the_hash_seed_of_the_process_changes_nothing(config: PairConfig, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        code = f"from data_builders.pair import *; run(PairConfig({config.verdicts!r}, {str(tmp_path / seed)!r}))"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    first, second = (
        [(path.name, path.read_bytes()) for path in sorted((tmp_path / seed).rglob("*.jsonl"))] for seed in ("1", "2")
    )
    assert first == second
    assert len(first) == 3


def test_a_shard_that_is_gone_is_made_again(config: PairConfig) -> None:
    run(config)
    shard = Path(config.output) / "00000.jsonl"
    before = shard.read_bytes()
    shard.unlink()
    run(config)
    assert shard.read_bytes() == before


@pytest.mark.parametrize("change", [{"max_pairs": 4}, {"seed": 1}])
def test_another_setting_wants_another_folder(config: PairConfig, change: dict[str, int]) -> None:
    run(config)
    with pytest.raises(InputError, match=f"other settings \\({next(iter(change))}: then"):
        run(replace(config, **change))


@pytest.mark.parametrize("count", [0, -1])
def test_a_limit_below_one_is_refused(config: PairConfig, count: int) -> None:
    with pytest.raises(InputError, match=f"`max_pairs` must be at least 1, got {count}"):
        run(replace(config, max_pairs=count))
    assert not Path(config.output).exists()


def test_rows_that_are_no_verdicts_are_refused_with_file_and_line(config: PairConfig) -> None:
    path = Path(config.verdicts) / "00001.jsonl"
    write_rows(path, [{name: value for name, value in many("s")[0].items() if name != "verdict"}])
    with pytest.raises(InputError, match=r"00001\.jsonl, line 1: `verdict` is missing"):
        run(config)
    assert not Path(config.output).exists()


def test_no_pair_at_all_is_said_and_not_hidden(config: PairConfig, tmp_path: Path) -> None:
    write_rows(tmp_path / "easy.jsonl", right("3", "three"))
    summary = run(replace(config, verdicts=str(tmp_path / "easy.jsonl")))
    assert summary.rows == []
    assert "1 questions with only correct responses" in summary.notes[0]
