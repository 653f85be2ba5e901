r"""Is the final answer of a response right?

    response --extract_answer--> prediction --verify_answer--> correct | wrong
                              \-> None: no_answer

Pure functions of their arguments, safe in threads and worker processes; no text makes them raise or takes longer than
about a second. A doubtful case counts against the response: a missed right answer costs one sample, a wrong one taken
for right becomes the preferred side of a pair.

Kinds of answer: `choice` (a letter or its option's text), `yes_no`, `number` (exact), `relaxed` (ChartQA: within 5%,
years exact), `math` (math-verify), `text` (as VQA evaluation normalises it), `anls` (DocVQA: 0.5 similar).
Lists: of numbers and of texts in the order given, spaces around commas aside; of option letters in any order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from data_builders.records import InputError, Row
from data_builders.rules.choice import Options, is_choice, is_yes_no, lettered, options_in, same_choice, same_yes_no
from data_builders.rules.extract import MAX_ANSWER_CHARS, extract_answer
from data_builders.rules.math import has_words, looks_like_formula, same_formula
from data_builders.rules.numbers import is_number, same_numbers
from data_builders.rules.text import clean, edit_similarity, same_text, unwrap

Kind = Literal["auto", "choice", "yes_no", "number", "relaxed", "math", "text", "anls"]
KINDS = get_args(Kind)

# ChartQA, https://arxiv.org/abs/2203.10244, section 5.1; ST-VQA, https://arxiv.org/abs/1905.13648, section 4.
RELAXED_TOLERANCE = Fraction(1, 20)
ANLS_THRESHOLD = 0.5
# One edit turns a shorter word into another one ("one" and "none" are 0.75 similar).
MIN_ANLS_CHARS = 4


@dataclass(frozen=True)
class Judgement:
    """What was found out about one response.

    Attributes:
        verdict: `no_answer` when the response has no clear final answer.
        prediction: The final answer as the response has it, None without.
        rule: The kind of comparison that decided; `extract` when there was nothing to compare, `empty_answer` when
            there was nothing to compare with.
    """

    verdict: Literal["correct", "wrong", "no_answer"]
    prediction: str | None
    rule: str


def judge_response(
    response: str,
    answer: str | Sequence[str],
    *,
    kind: str = "auto",
    style: str = "auto",
    question: str | None = None,
    options: Mapping[str, str] | Sequence[str] | None = None,
) -> Judgement:
    r"""Extracts the final answer of a response and compares it with the known one.

    Args:
        response: All that the model wrote.
        answer: The known answer, or several of which any counts.
        kind: How to compare; `auto` decides from the answer and the options.
        style: Where the final answer stands; see `extract_answer`.
        question: When given, its options ("A. cat B. dog", "(A) cat") make an option's text count as its letter.
        options: The same, by letter or in the order of the letters; they replace those of the question.

    Raises:
        InputError: There is no such kind or style.

    >>> judge_response("It barks.\nFinal answer: dog", "B", question="What is it? A. cat B. dog")
    Judgement(verdict='correct', prediction='dog', rule='choice')
    >>> judge_response("I cannot see the image well enough to tell what animal this is.", "B").verdict
    'no_answer'
    """
    prediction = extract_answer(response, style=style)
    return judge_prediction(prediction, answer, kind=kind, question=question, options=options)


def judge_prediction(
    prediction: str | None,
    answer: str | Sequence[str],
    *,
    kind: str = "auto",
    question: str | None = None,
    options: Mapping[str, str] | Sequence[str] | None = None,
) -> Judgement:
    """Compares a final answer that was already extracted, None when there is none; otherwise as `judge_response`."""
    letters = lettered(options) or (options_in(question) if question else {})
    answers = [answer] if isinstance(answer, str) else list(answer)
    rules = [resolve_kind(one, kind=kind, options=letters) for one in answers]
    if prediction is None:
        return Judgement("no_answer", None, "extract")
    known = [(one, rule) for one, rule in zip(answers, rules, strict=True) if one.strip()]
    if not known:
        return Judgement("wrong", prediction, "empty_answer")
    for one, rule in known:
        if _is_same(prediction, one, rule, letters):
            return Judgement("correct", prediction, rule)
    return Judgement("wrong", prediction, known[0][1])


def accepted_answers(row: Row) -> list[str]:
    """The answers to the question of a row of which any counts: `answer`, then those of `answers`; [] if unknown.

    >>> accepted_answers({"answer": "sofa", "answers": ["couch", "sofa"]}), accepted_answers({"answer": None})
    (['sofa', 'couch'], [])
    """
    answers = [row.get("answer"), *(row.get("answers") or ())]
    return list(dict.fromkeys(answer for answer in answers if answer is not None))


def judge_row(row: Row, *, kind: str = "auto", style: str = "auto") -> Judgement:
    """Judges a response row, as `judge_response` does, with the `answers`, `answer_kind` and `options` of its own.

    Args:
        row: With `response`, `question` and a known answer.
        kind: How to compare where the row does not say.
        style: Where the final answer stands.

    Raises:
        InputError: There is no such kind or style.
    """
    return judge_response(
        row["response"],
        accepted_answers(row),
        kind=row.get("answer_kind") or kind,
        style=style,
        question=row["question"],
        options=row.get("options"),
    )


def verify_answer(
    prediction: str | None,
    answer: str,
    *,
    kind: str = "auto",
    options: Mapping[str, str] | Sequence[str] | None = None,
) -> bool:
    r"""Whether a final answer is the known one.

    Args:
        prediction: A final answer, as `extract_answer` returns it.
        answer: The known answer.
        kind: How to compare: `auto` (decided from the answer and the options), `choice`, `yes_no`, `number`,
            `relaxed`, `math`, `text` or `anls`; see the top of this module.
        options: Text of each option by its letter, or in the order of the letters, for `choice`.

    Returns:
        False too when either is empty or, unless both are identical, longer than 500 characters.

    Raises:
        InputError: There is no such kind.

    >>> verify_answer("1,200 kg", "1200"), verify_answer(r"\frac{2}{4}", "0.5"), verify_answer("none", "no")
    (True, True, False)
    >>> verify_answer("xyz", "42", kind="anls"), verify_answer("2013", "2012", kind="relaxed")
    (False, False)
    """
    letters = lettered(options)
    return _is_same(prediction or "", answer, resolve_kind(answer, kind=kind, options=letters), letters)


def _is_same(prediction: str, answer: str, rule: str, options: Options) -> bool:
    prediction, answer = prediction.strip(), answer.strip()
    if not prediction or not answer or prediction == answer:
        return bool(answer) and prediction == answer
    if max(len(prediction), len(answer)) > MAX_ANSWER_CHARS:
        return False
    left, right = _bare(prediction), _bare(answer)
    if not left or not right or max(len(left), len(right)) > MAX_ANSWER_CHARS:
        return False
    return same_choice(left, right, options) if rule == "choice" else _COMPARE[rule](left, right)


def resolve_kind(answer: str, *, kind: str = "auto", options: Options | None = None) -> str:
    """How an answer is compared: the kind given or, for `auto`, the one that its form and the options tell.

    Args:
        answer: The known answer.
        kind: One of `KINDS`.
        options: The options of the question by letter.

    Raises:
        InputError: There is no such kind.

    >>> [resolve_kind(answer) for answer in ("(B)", "no", "1,200 kg", "x+1", "a dog")]
    ['choice', 'yes_no', 'number', 'math', 'text']
    """
    if kind not in KINDS:
        raise InputError(f"there is no kind of answer {kind!r}: choose one of {', '.join(KINDS)}.")
    if kind != "auto":
        return kind
    text = _bare(answer[: MAX_ANSWER_CHARS + 1])
    if len(text) > MAX_ANSWER_CHARS:
        return "text"
    if is_choice(text, options or {}):
        return "choice"
    if is_yes_no(text):
        return "yes_no"
    if is_number(text):
        return "number"
    return "math" if looks_like_formula(text) else "text"


def rules_for(
    answer: str, *, question: str | None = None, options: Mapping[str, str] | Sequence[str] | None = None
) -> list[str]:
    """All kinds of comparison that make sense for an answer, for a look at how much hangs on the choice between them.

    >>> rules_for("(B)"), rules_for("1,200 kg"), rules_for("a dog")
    (['choice', 'text'], ['number', 'relaxed', 'math', 'text'], ['text', 'anls'])
    """
    text = _bare(answer[: MAX_ANSWER_CHARS + 1])
    rules = ["choice"] if is_choice(text, lettered(options) or (options_in(question) if question else {})) else []
    rules += ["yes_no"] if is_yes_no(text) else []
    rules += ["number", "relaxed"] if is_number(text) else []
    rules += ["math"] if is_number(text) or looks_like_formula(text) else []
    return [*rules, "text"] if rules else ["text", "anls"]


_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:(?:correct|final|best|right)\s+)?(?:answer|option|choice)\s*(?:is\b:?|:)\s*"
    r"|(?:最终|正确)?(?:答案|选项)(?:是|为|:)\s*",
    re.IGNORECASE,
)


def _bare(text: str) -> str:
    text = clean(text)
    lead_in = _LEAD_IN.match(text)
    return unwrap(text[lead_in.end() :]) or text if lead_in else text


def _same_number(prediction: str, answer: str) -> bool:
    same = same_numbers(prediction, answer)
    if same is None and is_number(answer):
        return looks_like_formula(prediction) and same_formula(prediction, answer)
    return same_text(prediction, answer) if same is None else same


def _same_relaxed(prediction: str, answer: str) -> bool:
    same = same_numbers(prediction, answer, tolerance=RELAXED_TOLERANCE)
    return not is_number(answer) and same_text(prediction, answer) if same is None else same


def _same_math(prediction: str, answer: str) -> bool:
    return same_formula(prediction, answer) or (has_words(answer) and same_text(prediction, answer))


def _same_anls(prediction: str, answer: str) -> bool:
    left, right = prediction.casefold(), answer.casefold()
    same = same_numbers(prediction, answer)
    if same is not None or is_number(answer) or min(len(left), len(right)) < MIN_ANLS_CHARS:
        return bool(same) or same_text(prediction, answer)
    return edit_similarity(left, right) >= ANLS_THRESHOLD


_COMPARE = {
    "yes_no": same_yes_no, "number": _same_number, "relaxed": _same_relaxed,
    "math": _same_math, "text": same_text, "anls": _same_anls,
}  # fmt: skip
