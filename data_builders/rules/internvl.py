r"""Verdicts as the scorers released with InternVL's MMPR pipeline would give them, to compare ours with. Not for use.

What is reproduced, faults and all:

* Where the answer stands: with the prompt styles `boxed` and `think`, in the last `\boxed{...}`, and the whole
  response is the answer when there is none or it never ends. With any other style, after the last "Final answer:"
  (else "Final Answer:", else "答案:"); the response is unreadable when it has the marker more than twice, fewer than
  two line breaks, nothing before the marker, or an answer of several lines.
* Which scorers judge depends on the name of the data set alone (`scorers_of`), and the best of them counts.
* `anls` is inverted: the distance, not the similarity, must be above 0.9, so what has nothing in common is right.
* `vqa` takes "none" for 0 and minus signs for spaces; `relaxed` knows years by "20" and four characters; `math` allows
  0.1% and strips "cm", "%" and degrees from anywhere.
* `skips_pair`: pairs are left out when the chosen answer occurs inside the rejected one ("no" in "none").

What is not: `eval()`, which they call on the names of images (so an image called "1/2" becomes 0.5) and never on
answers; the option that rewrites answers and then scores the old ones; contractions other than those with "not" and
"have"; and `latex`, where our bounded comparison of formulas stands for their unbounded one. Texts with more than a
million pairs of characters are taken to be unlike each other without being compared.

Source of the behaviour: https://github.com/OpenGVLab/InternVL, internvl_chat/tools/reasoning_data_pipeline.
"""

import re

from data_builders.records import Row
from data_builders.rules.math import same_formula
from data_builders.rules.numbers import NUMBER_WORDS
from data_builders.rules.text import clean, edit_distance
from data_builders.verify import Judgement, accepted_answers

THRESHOLD = 0.9
MAX_COMPARED_PAIRS = 1_000_000
MAX_FLOAT_CHARS = 400

_GENERAL = ("vqa", "choice", "math")
# Parts of data set names, as they are written there, and the scorers of those sets.
_SCORERS = (
    (("chartqa",), ("relaxed",)),
    (("docvqa", "infographics"), ("anls",)),
    (("SROIE", "CLEVR_math", "geos", "geometry"), ("relaxed", "vqa", "choice")),
    (("mavis",), ("vqa", "choice", "math", "latex")),
)


def judge_like_internvl(response: str, answer: str, *, source: str = "", prompt: str = "") -> Judgement:
    r"""The released verdict on one response.

    Args:
        response: All that the model wrote.
        answer: The known answer.
        source: Name of the data set.
        prompt: The prompt style that the response was asked for in, with or without its version.

    Returns:
        With a rule of the form `internvl:<scorer>`: the one that took the answer for right or, when none did, the
        first of the set's; `internvl:format` for an unreadable response.

    >>> judge_like_internvl("It says\n42.\nFinal answer: xyz", "42", source="docvqa_train")
    Judgement(verdict='correct', prediction='xyz', rule='internvl:anls')
    """
    is_boxed = prompt.startswith(("boxed", "think"))
    prediction = _boxed_or_all(response) if is_boxed else _after_marker(response)
    if prediction is None:
        return Judgement("no_answer", None, "internvl:format")
    scorers = scorers_of(source)
    if prediction.lower() == answer.lower():
        return Judgement("correct", prediction, "internvl:exact")
    right = next((scorer for scorer in scorers if _SCORE[scorer](prediction, answer)), None)
    return Judgement("correct" if right else "wrong", prediction, f"internvl:{right or scorers[0]}")


def judge_row_like_internvl(row: Row) -> Judgement:
    """The same for a response row with a known answer; of several answers (theirs have one) any counts."""
    sampler = row.get("sampler") or {}
    origin = {"source": row.get("source", ""), "prompt": sampler.get("prompt", "")}
    judgements = [judge_like_internvl(row["response"], answer, **origin) for answer in accepted_answers(row)]
    return next((judgement for judgement in judgements if judgement.verdict == "correct"), judgements[0])


def scorers_of(source: str) -> tuple[str, ...]:
    """Which scorers judge the answers of a data set.

    >>> scorers_of("chartqa_train"), scorers_of("ChartQA")
    (('relaxed',), ('vqa', 'choice', 'math'))
    """
    return next((scorers for parts, scorers in _SCORERS if any(part in source for part in parts)), _GENERAL)


def skips_pair(chosen_prediction: str, rejected_prediction: str) -> bool:
    """Whether the released pipeline leaves a pair out because of its two final answers.

    >>> skips_pair("no", "none"), skips_pair("A", "banana"), skips_pair("none", "no")
    (True, True, False)
    """
    return chosen_prediction.lower() in rejected_prediction.lower()


def _after_marker(response: str) -> str | None:
    marker = next((m for m in ("Final answer:", "Final Answer:") if m in response), "答案:")
    rationale, found, answer = response.rpartition(marker)
    readable = found and response.count(marker) <= 2 and response.count("\n") >= 2 and rationale.strip()
    return answer.strip() if readable and "\n" not in answer.strip() else None


def _boxed_or_all(response: str) -> str:
    start = response.rfind(r"\boxed{")
    depth = 0
    for brace in re.finditer("[{}]", response[start:] if start >= 0 else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return response[start + len(r"\boxed{") : start + brace.start()]
    return response


def _same_vqa(prediction: str, answer: str) -> bool:
    left, right = _vqa_words(prediction), _vqa_words(answer)
    return bool(left) and left == right


_VQA_NUMBERS = {"none": "0"} | {word: value for word, value in NUMBER_WORDS.items() if int(value) <= 10}
_VQA_SIGNS = ';/[]"{}()=+\\_-><@`!'
_NEGATED = (
    "ai", "are", "ca", "could", "did", "do", "does", "had", "has", "have", "is", "might", "must", "need", "ought",
    "sha", "should", "was", "were", "wo", "would",
)  # fmt: skip
_WITH_HAVE = ("could", "i", "might", "must", "not", "should", "they", "we", "who", "would", "you")
_CONTRACTIONS = {f"{verb}nt" for verb in _NEGATED} | {f"{word}ve" for word in _WITH_HAVE}


def _vqa_words(text: str) -> list[str]:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = whole = text.replace("\n", " ").replace("\t", " ").strip()
    for sign in _VQA_SIGNS:
        text = text.replace(sign, "" if f"{sign} " in whole or f" {sign}" in whole else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [_VQA_NUMBERS.get(word, word) for word in text.split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return [bare if (bare := word.replace("'", "")) in _CONTRACTIONS else word for word in words]


def _same_relaxed(prediction: str, answer: str) -> bool:
    if len(answer) == 4 and answer.startswith("20"):
        return prediction.lower() == answer.lower()
    return _is_near(prediction, answer, _percent(prediction), _percent(answer), 0.05)


def _percent(text: str) -> float | None:
    return _float(text.rstrip("%") if text.endswith("%") else text)


def _same_math(prediction: str, answer: str) -> bool:
    left, right = (_float(re.sub(r"degrees?|\\angle|°|%|cm", "", text)) for text in (prediction, answer))
    return _is_near(prediction, answer, left, right, 1e-3)


def _float(text: str) -> float | None:
    try:
        return float(text) if len(text) <= MAX_FLOAT_CHARS else None
    except ValueError:
        return None


def _is_near(prediction: str, answer: str, left: float | None, right: float | None, tolerance: float) -> bool:
    """Relative to the answer; an answer of zero is compared as text, which is theirs too."""
    if left is None or not right:
        return prediction.lower() == answer.lower()
    return abs(left - right) / abs(right) <= tolerance


def _same_choice(prediction: str, answer: str) -> bool:
    prediction, answer = prediction.strip(), answer.strip()
    if prediction.lower() == answer.lower():
        return True
    if prediction[1:2] == ".":
        prediction = prediction[0]
    elif prediction[:1] == "(" and prediction[2:3] == ")":
        prediction = prediction[1]
    return prediction.lower() == answer.lower()


def _is_far(prediction: str, answer: str) -> bool:
    """Their ANLS: a distance in place of a similarity."""
    left, right = (" ".join(text.lower().split()) for text in (prediction, answer))
    length = max(len(prediction), len(answer))
    if not length or abs(len(left) - len(right)) / length > THRESHOLD or len(left) * len(right) > MAX_COMPARED_PAIRS:
        return bool(length)
    return edit_distance(left, right) / length > THRESHOLD


def _same_latex(prediction: str, answer: str) -> bool:
    if not any("\\" in text or re.fullmatch(r"\s*\d+\s*/\s*\d+\s*", text) for text in (prediction, answer)):
        return False
    return max(len(prediction), len(answer)) <= 500 and same_formula(clean(prediction), clean(answer))


_SCORE = {
    "vqa": _same_vqa, "relaxed": _same_relaxed, "anls": _is_far, "choice": _same_choice, "math": _same_math,
    "latex": _same_latex,
}  # fmt: skip
