"""The released scorers, faults and all: what they take for right and ours do not, and the other way round."""

import time

import pytest

from data_builders.rules.internvl import judge_like_internvl, judge_row_like_internvl, scorers_of, skips_pair
from data_builders.verify import judge_response


def final(answer: str) -> str:
    return f"I look at it.\nThen I think.\nFinal answer: {answer}"


# (prediction, answer, source, verdict, rule)
SCORES = [
    # ANLS is upside down: a distance where a similarity should be
    ("xyz", "42", "docvqa_train", "correct", "internvl:anls"),
    ("Coca-Cola Compony", "Coca-Cola Company", "docvqa_train", "wrong", "internvl:anls"),
    ("Coca-Cola Company", "coca-cola company", "docvqa_train", "correct", "internvl:exact"),
    ("Pepsi", "42", "infographics", "correct", "internvl:anls"),
    # ChartQA: 5%; years are what has four characters and begins with "20"
    ("105", "100", "chartqa_train", "correct", "internvl:relaxed"),
    ("106", "100", "chartqa_train", "wrong", "internvl:relaxed"),
    ("2013", "2012", "chartqa_train", "wrong", "internvl:relaxed"),
    ("1995", "1990", "chartqa_train", "correct", "internvl:relaxed"),
    ("50%", "51", "chartqa_train", "correct", "internvl:relaxed"),
    ("0.5", "50%", "chartqa_train", "wrong", "internvl:relaxed"),
    ("1,234", "1234", "chartqa_train", "wrong", "internvl:relaxed"),
    ("0.0", "0", "chartqa_train", "wrong", "internvl:relaxed"),
    # elsewhere VQA's normalisation, option letters and 0.1%
    ("none", "0", "vqav2", "correct", "internvl:vqa"),
    ("the dog", "Dog", "vqav2", "correct", "internvl:vqa"),
    ("-5", "5", "vqav2", "correct", "internvl:vqa"),
    ("dont know", "don't know", "vqav2", "correct", "internvl:vqa"),
    ("1,000", "1000", "vqav2", "correct", "internvl:vqa"),
    ("dogs", "dog", "vqav2", "wrong", "internvl:vqa"),
    ("B. dog", "B", "scienceqa", "correct", "internvl:choice"),
    ("(B) dog", "B", "scienceqa", "correct", "internvl:choice"),
    ("B", "B. dog", "scienceqa", "wrong", "internvl:vqa"),
    ("B)", "B", "scienceqa", "correct", "internvl:vqa"),
    ("3.1416", "3.1415", "geoqa", "correct", "internvl:math"),
    ("5 cm", "5", "geoqa", "correct", "internvl:math"),
    (r"\angle 30°", "30", "geoqa", "correct", "internvl:math"),
    ("5 m", "5", "geoqa", "wrong", "internvl:vqa"),
    ("1/2", "0.5", "geoqa", "wrong", "internvl:vqa"),
    ("1/2", "0.5", "mavis_function", "correct", "internvl:latex"),
    ("105", "100", "geometry3k", "correct", "internvl:relaxed"),
]


@pytest.mark.parametrize(("prediction", "answer", "source", "verdict", "rule"), SCORES)
def test_the_released_scorers_judge_so(prediction: str, answer: str, source: str, verdict: str, rule: str) -> None:
    judgement = judge_like_internvl(final(prediction), answer, source=source)
    assert (judgement.verdict, judgement.prediction, judgement.rule) == (verdict, prediction, rule)


@pytest.mark.parametrize(
    ("response", "prediction"),
    [
        ("a\nb\nFinal answer: 5", "5"),
        ("a\nb\nFinal Answer: 5", "5"),
        ("a\nb\n答案: 5", "5"),
        ("a\nb\nFinal answer: 4\nFinal answer: 5", "5"),
        ("a\nb\nFinal answer:\n5\n", "5"),
        # and these are unreadable
        ("Final answer: 5", None),
        ("a\nFinal answer: 5", None),
        ("\n\n\nFinal answer: 5", None),
        ("a\nb\nFinal answer: 5\nbecause of this", None),
        (3 * "a\nFinal answer: 5\n", None),
        ("a\nb\nAnswer: 5", None),
        ("a\nb\n答案：5", None),
    ],
)
def test_with_the_first_prompts_the_answer_follows_its_marker(response: str, prediction: str | None) -> None:
    judgement = judge_like_internvl(response, "5", prompt="final_answer@0123abcd")
    assert judgement.prediction == prediction
    assert (judgement.rule == "internvl:format") == (prediction is None) == (judgement.verdict == "no_answer")


def test_with_the_later_prompts_a_response_without_a_box_is_its_own_answer() -> None:
    response = "There are three apples and a dog"
    for prompt in ("boxed@0123abcd", "boxed_zh@0123abcd", "think@0123abcd"):
        assert judge_like_internvl(response, "4", prompt=prompt).prediction == response
        assert judge_like_internvl(rf"So \boxed{{{response}", "4", prompt=prompt).prediction.startswith("So")
        assert judge_like_internvl(r"\boxed{1}, \boxed{\frac{1}{2}}", "4", prompt=prompt).prediction == r"\frac{1}{2}"
    assert judge_like_internvl(response, response.upper(), prompt="boxed").verdict == "correct"
    assert judge_response(f"{response}, as far as I can see.", "3").verdict == "no_answer"


def test_the_name_of_the_data_set_chooses_the_scorers_and_its_case_counts() -> None:
    assert scorers_of("chartqa_train_18k") == ("relaxed",)
    assert scorers_of("infographics_vqa") == scorers_of("docvqa") == ("anls",)
    assert scorers_of("CLEVR_math_en") == scorers_of("unigeos") == ("relaxed", "vqa", "choice")
    assert scorers_of("ChartQA") == scorers_of("") == ("vqa", "choice", "math")


def test_pairs_are_skipped_when_the_right_answer_is_found_inside_the_wrong_one() -> None:
    assert skips_pair("no", "none")
    assert skips_pair("one", "none")
    assert skips_pair("A", "a banana")
    assert not skips_pair("B", "C")


def test_of_several_answers_any_counts() -> None:
    row = {"response": final("couch"), "answer": "sofa", "answers": ["settee", "couch"], "source": "vqav2"}
    assert judge_row_like_internvl(row).verdict == "correct"
    assert judge_row_like_internvl({**row, "answers": None}).verdict == "wrong"


def test_nothing_is_evaluated_and_hostile_texts_cost_little() -> None:
    start = time.monotonic()
    for text in (
        "__import__('os')",
        "9**9**9**9",
        "[1]*9**9",
        "7" * 1_000_000,
        "{" * 100_000,
        "nan",
        "inf",
        "-" * 9_000,
    ):
        for source in ("docvqa", "chartqa", "mavis", ""):
            for prompt in ("boxed", ""):
                for answer in ("4", "nan", "0", text[::-1] + "4"):
                    assert judge_like_internvl(text, answer, source=source, prompt=prompt).verdict != "error"
                    judge_like_internvl(final(text), answer, source=source)
    assert time.monotonic() - start < 20
