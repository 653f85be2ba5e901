"""Which responses are paired, how many and why not, and that nothing but the question and the seed decides which."""

import random
from collections import Counter

import pytest

from data_builders.pairing import PairOptions, make_pairs, pair_rows, priority
from data_builders.records import InputError, Row


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
    good = verdict("3", "correct", sampler={"model": "m", "index": 0})
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


def test_the_order_of_rows_changes_nothing() -> None:
    rows = [*many("p"), *many("q"), *many("r"), *right("3", question="easy"), *right("3", question="trivial")]
    expected = pair_rows(rows)
    for seed in range(3):
        assert pair_rows(random.Random(seed).sample(rows, len(rows))) == expected
    assert (len(expected[0]), len(expected[1])) == (45, 2)


def test_the_questions_beside_it_change_nothing_for_a_question() -> None:
    alone = pair_rows(many("p"))[0]
    assert [pair for pair in pair_rows([*many("q"), *many("p")])[0] if pair["question_id"] == "p"] == alone


def reasons(rows: list[Row], **options: object) -> dict[str, int]:
    """What is left out of these rows of one question."""
    return {row["reason"]: row["count"] for row in pair_rows(rows, PairOptions(**options))[1]}


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
    assert sorted((row["id"], row["source"], row["reason"], row["count"]) for row in dropped) == [
        ("all failed", "count", "questions without a correct response", 1),
        ("all failed", "count", "responses that failed", 1),
        ("all right", "count", "questions with only correct responses", 1),
        ("all wrong", "count", "questions without a correct response", 1),
        ("one right", "count", "questions with only correct responses", 1),
        ("one right", "count", "responses that failed", 1),
    ]


def test_responses_that_are_left_out_are_counted_by_reason() -> None:
    failed = [verdict(None, "no_answer", error="gone"), verdict("half", "wrong", error="gone")]
    rows = [*right("3", "3", "3"), *wrong("4", "4", ""), verdict(" \n", "no_answer"), *failed]
    assert reasons(rows) == {
        "responses that failed": 2,
        "responses without text": 2,
        "responses with the text of another one": 3,
    }


def test_a_text_that_was_judged_in_two_ways_is_trusted_in_neither() -> None:
    rows = [*right("3", "three"), *wrong("3", "4")]
    assert sides(make_pairs(rows)) == [("three", "4")]
    assert reasons(rows) == {"responses whose text was judged in two ways": 2}


def test_a_correct_response_that_was_cut_off_is_not_chosen() -> None:
    rows = [*right("3"), *right("three and", finish_reason="length"), *wrong("4")]
    assert sides(make_pairs(rows)) == [("3", "4")]
    assert reasons(rows) == {"responses that are correct but cut off": 1}
    assert reasons(rows[1:]) == {
        "responses that are correct but cut off": 1,
        "questions whose correct responses were all left out": 1,
    }


def test_a_wrong_or_unreadable_response_that_was_cut_off_may_be_rejected() -> None:
    cut = [verdict("4 and", "wrong", finish_reason="length"), verdict("so", "no_answer", finish_reason="length")]
    pairs = make_pairs([*right("3"), *cut])
    assert [(pair["rejected"], pair["kind"]) for pair in pairs] == [("4 and", "correctness"), ("so", "format")]


def test_of_equal_texts_the_one_that_ended_by_itself_stands_for_both() -> None:
    rows = [*right("3", finish_reason="length", sampler={"index": 0}), *right("3", sampler={"index": 1}), *wrong("4")]
    (pair,) = make_pairs(rows)
    assert pair["chosen_meta"]["sampler"] == {"index": 1}


def test_kinds_says_which_responses_are_rejected() -> None:
    rows = [*right("3"), *wrong("4"), verdict("hm", "no_answer")]
    assert sides(make_pairs(rows, kinds=["correctness"])) == [("3", "4")]
    assert sides(make_pairs(rows, kinds=["format"])) == [("3", "hm")]
    assert reasons(rows, kinds=["format"]) == {"responses for correctness pairs, which `kinds` leaves out": 1}
    assert reasons(rows[:2], kinds=["format"]) == {
        "responses for correctness pairs, which `kinds` leaves out": 1,
        "questions whose other responses were all left out": 1,
    }


@pytest.mark.parametrize(
    ("num_right", "reason"),
    [
        (1, "questions with too few correct responses"),
        (2, None),
        (8, None),
        (9, "questions with too many correct responses"),
    ],
)
def test_the_window_of_difficulty_takes_in_its_bounds(num_right: int, reason: str | None) -> None:
    rows = right(*(f"3 {n}" for n in range(num_right))) + wrong(*(f"4 {n}" for n in range(10 - num_right)))
    rows.append(verdict(None, "no_answer", error="gone"))  # says nothing about the question
    pairs, dropped = pair_rows(rows, PairOptions(min_correct=0.2, max_correct=0.8))
    assert bool(pairs) == (reason is None)
    assert {row["reason"] for row in dropped} == {"responses that failed", reason} - {None}


def test_equal_texts_count_each_for_the_difficulty_of_a_question() -> None:
    rows = [*right(*19 * ["3"]), *wrong("4")]  # 95 % correct, though of two texts one is
    assert len(make_pairs(rows)) == 1
    assert make_pairs(rows, max_correct=0.8) == []


def test_pairs_of_too_different_lengths_are_not_made() -> None:
    rows = [*right("3333", "333333"), *wrong("44", "444", "4444444")]
    assert sides(make_pairs(rows, max_length_ratio=1.5)) == [("3333", "444"), ("333333", "4444444")]
    assert reasons(rows, max_length_ratio=1.5) == {"pairs of too different lengths": 4}
    assert reasons(rows, max_length_ratio=1.1) == {
        "pairs of too different lengths": 6,
        "questions whose pairs were all left out": 1,
    }


def test_pairs_of_nearly_the_same_texts_are_not_made() -> None:
    rows = [*right("there are three cats so 3"), *wrong("there are three cats so 4", "I see four of them so 4")]
    assert sides(make_pairs(rows, max_similarity=0.7)) == [(rows[0]["response"], rows[2]["response"])]
    assert reasons(rows, max_similarity=0.7) == {"pairs of nearly the same texts": 1}
    assert len(make_pairs(rows, max_similarity=0.75)) == 2  # three of four trigrams: not more than that
    assert reasons(rows[:2], max_similarity=0.0)["questions whose pairs were all left out"] == 1


def test_a_filter_that_lets_all_pass_changes_nothing() -> None:
    rows = many("q")
    options = {"max_similarity": 1.0, "max_length_ratio": 9.0, "max_repetition": 1.0, "min_correct": 0.1}
    assert make_pairs(rows, **options) == make_pairs(rows)
    assert pair_rows(rows, PairOptions(**options))[1] == []


def test_pairs_that_a_filter_refuses_make_room_for_others() -> None:
    alike = right(*(f"a b c d e f {n}" for n in range(4))) + wrong(*(f"a b c d e f {n}" for n in range(4, 8)))
    rows = alike + wrong("something else altogether")
    assert len(make_pairs(rows, max_pairs=4, max_similarity=0.5)) == 4


def test_responses_that_are_nearly_the_same_count_once_on_each_side() -> None:
    rows = [
        *right("a b c d e f 1", "a b c d e f 2", "quite another way"),
        *wrong("a b c d e f 3", "a b c d e f 4"),
    ]
    assert sides(make_pairs(rows, dedupe_similarity=0.8)) == [
        ("a b c d e f 1", "a b c d e f 3"),
        ("quite another way", "a b c d e f 3"),
    ]
    assert reasons(rows, dedupe_similarity=0.8) == {"responses nearly the same as another one": 2}
    assert len(make_pairs(rows, dedupe_similarity=0.81)) == 6  # four of five trigrams
    other_prompt = [{**row, "prompt": row["response"]} for row in rows]
    assert reasons(other_prompt, dedupe_similarity=0.8) == {"questions without two verdicts on one prompt": 1}


def test_a_response_that_repeats_itself_is_not_chosen_but_may_be_rejected() -> None:
    loop = 20 * "and so on and so forth it goes on and on. "
    rows = [*right("3", f"{loop} 3"), *wrong(f"{loop} 4")]
    assert sides(make_pairs(rows, max_repetition=0.3)) == [("3", f"{loop} 4")]
    assert reasons(rows, max_repetition=0.3) == {"responses that are correct but repeat themselves": 1}
    assert len(make_pairs(rows)) == 2


def test_columns_that_are_not_the_questions_stand_with_the_response_they_came_with() -> None:
    rows = [*right("3", judge={"model": "j"}, level="easy"), *wrong("4", judge={"model": "k"})]
    (pair,) = make_pairs(rows)
    assert (pair["chosen_meta"]["judge"], pair["chosen_meta"]["level"]) == ({"model": "j"}, "easy")
    assert pair["rejected_meta"]["judge"] == {"model": "k"}


def test_a_last_word_on_pairs_is_counted() -> None:
    pairs, dropped = pair_rows(many("q", 2), is_kept=lambda pair: pair["chosen"] == "good 1")
    assert sides(pairs) == [("good 1", "bad 0"), ("good 1", "bad 1")]
    assert [(row["reason"], row["count"]) for row in dropped] == [("pairs over the limit of their source", 2)]
    _, dropped = pair_rows(many("q", 2), is_kept=lambda pair: False)
    assert [(row["reason"], row["count"]) for row in dropped] == [
        ("pairs over the limit of their source", 4),
        ("questions whose pairs were all left out", 1),
    ]


def test_the_priority_of_a_pair_is_its_own() -> None:
    pairs = make_pairs(many("q"), max_pairs=36)
    assert len({priority(pair, 0) for pair in pairs}) == 36
    assert priority({**pairs[0], "id": "x#9", "chosen_meta": {}}, 0) == priority(pairs[0], 0) != priority(pairs[0], 1)
    assert 0 <= min(priority(pair, 0) for pair in pairs) <= max(priority(pair, 0) for pair in pairs) < 2**64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pairs": 0}, "`max_pairs` must be at least 1, got 0"),
        ({"kinds": []}, "`kinds` names some of correctness and format"),
        ({"kinds": ["dropout_ntp"]}, "`kinds` names some of correctness and format"),
        ({"min_correct": 0.8, "max_correct": 0.2}, "`min_correct` and `max_correct` are shares .* got 0.8 and 0.2"),
        ({"max_correct": 80}, "`min_correct` and `max_correct` are shares"),
        ({"max_length_ratio": 0.5}, "`max_length_ratio` must be at least 1, got 0.5"),
        ({"max_similarity": 1.5}, "`max_similarity` must be between 0 and 1, got 1.5"),
        ({"dedupe_similarity": -1}, "`dedupe_similarity` must be between 0 and 1, got -1"),
        ({"max_repetition": float("nan")}, "`max_repetition` must be between 0 and 1, got nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PairOptions(**options)


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
