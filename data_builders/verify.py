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
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from data_builders.records import InputError
from data_builders.verify_math import (
    NUMBER_WORDS,
    has_words,
    is_number,
    looks_like_formula,
    same_formula,
    same_numbers,
)

KINDS = ("auto", "choice", "yes_no", "number", "relaxed", "math", "text", "anls")
STYLES = ("auto", "final_answer", "boxed", "think", "direct")

# No final answer is longer; beyond it only identical texts are equal.
MAX_ANSWER_CHARS = 500
MAX_DIRECT_CHARS = 100
# Without a marker and without being asked for a direct answer, a longer line is a sentence rather than an answer.
MAX_UNMARKED_CHARS = 40
MAX_QUESTION_CHARS = 20_000
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
    response: str, answer: str, *, kind: str = "auto", style: str = "auto", question: str | None = None
) -> Judgement:
    r"""Extracts the final answer of a response and compares it with the known one.

    Args:
        response: All that the model wrote.
        answer: The known answer.
        kind: How to compare; `auto` decides from the answer and the options.
        style: Where the final answer stands; see `extract_answer`.
        question: When given, its options ("A. cat B. dog", "(A) cat") make an option's text count as its letter.

    Raises:
        InputError: There is no such kind or style.

    >>> judge_response("It barks.\nFinal answer: dog", "B", question="What is it? A. cat B. dog")
    Judgement(verdict='correct', prediction='dog', rule='choice')
    >>> judge_response("I cannot see the image well enough to tell what animal this is.", "B").verdict
    'no_answer'
    """
    options = _read_options(question) if question else {}
    rule = _resolve_kind(kind, answer, options)
    prediction = extract_answer(response, style=style)
    if prediction is None:
        return Judgement("no_answer", None, "extract")
    if not answer.strip():
        return Judgement("wrong", prediction, "empty_answer")
    is_correct = verify_answer(prediction, answer, kind=rule, options=options)
    return Judgement("correct" if is_correct else "wrong", prediction, rule)


def extract_answer(response: str, *, style: str = "auto") -> str | None:
    r"""The final answer that a response states, without what only dresses it.

    Args:
        response: All that the model wrote.
        style: `boxed`: the last \boxed{...}. `final_answer`: what follows the last "Final answer:" or "Answer:"
            (最终答案：, 答案：) on its line, or on the next one. `direct`: the whole response when it is one line of
            at most 100 characters. `think`: what follows `</think>`, by its box or marker, or all of it when it is one
            short line. `auto`: after any thinking the first of box, "Final answer:" and "the answer is ..."; without
            them the whole response when it is one line of at most 40 characters and no sentence.

    Returns:
        None when there is no clear final answer, which includes a box or a thought that was cut off.

    Raises:
        InputError: There is no such style.

    >>> extract_answer(r"So 3 + 4 = \boxed{7}."), extract_answer("**Final answer:** (B)"), extract_answer("12 cm")
    ('7', '(B)', '12 cm')
    """
    if style not in STYLES:
        raise InputError(f"there is no answer style {style!r}: choose one of {', '.join(STYLES)}.")
    if style == "boxed":
        return _boxed(response)
    if style == "final_answer":
        return _marked(response, _FINAL_ANSWER)
    if style == "direct":
        return _direct(response, MAX_DIRECT_CHARS)
    _, closed, after = response.rpartition("</think>")
    if "<think>" in after or (style == "think" and not closed):
        return None
    if _BOX.search(after):
        return _boxed(after)
    for marker in (_FINAL_ANSWER, _ANSWER_IS):
        if marker.search(after):
            return _marked(after, marker)
    return _direct(after, MAX_DIRECT_CHARS) if style == "think" else _unmarked(after)


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(rf"{_BOX.pattern}|\\.|[{{}}]", re.DOTALL)
_FINAL_ANSWER = re.compile(
    r"(?:\banswer(?:\s+is)?|答案)(?:是|为)?[ \t*_]{0,5}[:\uff1a]"
    r"|^[ \t#*_]{0,9}(?:final answer|最终答案)[ \t*_]{0,5}$",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWER_IS = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice|letter)) is\b[ \t]?:?|答案(?:是|为)|(?:故|应|所以)选|选择",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])(?<!\b(?:Mr|Ms|Dr|St|Mt))(?<!\bMrs)[.!?]\s+(?=[A-Z])|。")
_LABEL_OR_YES = re.compile(r"\(?[A-J][.):]\s|(?:yes|no)\b\s?[,.]", re.IGNORECASE)


def _boxed(text: str) -> str | None:
    """The content of the last box, the innermost of nested ones; None when it never ends."""
    open_groups: list[int] = []
    last = (-1, -1)
    for token in _BRACE.finditer(text):
        if token[0] == "{":
            open_groups.append(-1)
        elif len(token[0]) > 2:
            open_groups.append(token.end())
        elif token[0] == "}" and open_groups:
            last = max(last, (open_groups.pop(), token.start()))
    if last[0] < 0 or max(open_groups, default=-1) > last[0]:
        return None
    return _answer(text[slice(*last)])


def _marked(text: str, marker: re.Pattern[str]) -> str | None:
    """What follows the last marker: the rest of its line, or the next line that holds more than signs."""
    end = max((found.end() for found in marker.finditer(text)), default=len(text))
    for line in text[end : end + 4 * MAX_ANSWER_CHARS].splitlines():
        if line.strip(" \t*_#`$\\[](){}-.:"):
            return _answer(_SENTENCE_END.split(line, maxsplit=1)[0])
    return None


def _direct(text: str, max_chars: int) -> str | None:
    line = text.strip()
    return _answer(line) if len(line) <= max_chars and "\n" not in line else None


def _unmarked(text: str) -> str | None:
    """A response that is an answer and nothing else: "12 cm", "(B) a dog", "Yes, there is one."; no other sentence."""
    line = text.strip()
    if _LABEL_OR_YES.match(line):
        return _direct(line, MAX_DIRECT_CHARS)
    is_sentence = len(line.split()) > 3 and line[-1] in ".!?:"
    return None if is_sentence or _SENTENCE_END.search(line[:-1]) else _direct(line, MAX_UNMARKED_CHARS)


def _answer(text: str) -> str | None:
    return unwrap(text) or None if len(text) <= MAX_ANSWER_CHARS else None


def verify_answer(
    prediction: str | None, answer: str, *, kind: str = "auto", options: Mapping[str, str] | None = None
) -> bool:
    r"""Whether a final answer is the known one.

    Args:
        prediction: A final answer, as `extract_answer` returns it.
        answer: The known answer.
        kind: How to compare: `auto` (decided from the answer and the options), `choice`, `yes_no`, `number`,
            `relaxed`, `math`, `text` or `anls`; see the top of this module.
        options: Text of each option by its letter, for `choice`.

    Returns:
        False too when either is empty or, unless both are identical, longer than 500 characters.

    Raises:
        InputError: There is no such kind.

    >>> verify_answer("1,200 kg", "1200"), verify_answer(r"\frac{2}{4}", "0.5"), verify_answer("none", "no")
    (True, True, False)
    >>> verify_answer("xyz", "42", kind="anls"), verify_answer("2013", "2012", kind="relaxed")
    (False, False)
    """
    rule = _resolve_kind(kind, answer, options or {})
    prediction, answer = (prediction or "").strip(), answer.strip()
    if not prediction or not answer or prediction == answer:
        return bool(answer) and prediction == answer
    if max(len(prediction), len(answer)) > MAX_ANSWER_CHARS:
        return False
    left, right = _bare(prediction), _bare(answer)
    if not left or not right or max(len(left), len(right)) > MAX_ANSWER_CHARS:
        return False
    return _same_choice(left, right, options or {}) if rule == "choice" else _COMPARE[rule](left, right)


def _resolve_kind(kind: str, answer: str, options: Mapping[str, str]) -> str:
    if kind not in KINDS:
        raise InputError(f"there is no kind of answer {kind!r}: choose one of {', '.join(KINDS)}.")
    if kind != "auto":
        return kind
    text = _bare(answer[: MAX_ANSWER_CHARS + 1])
    if len(text) > MAX_ANSWER_CHARS:
        return "text"
    if (options and _read_choice(text, options)[0]) or _CHOICE_ANSWER.match(text):
        return "choice"
    if text.casefold() in _YES | _NO:
        return "yes_no"
    if is_number(text):
        return "number"
    return "math" if looks_like_formula(text) else "text"


_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:(?:correct|final|best|right)\s+)?(?:answer|option|choice)\s*(?:is\b:?|:)\s*"
    r"|(?:最终|正确)?(?:答案|选项)(?:是|为|:)\s*",
    re.IGNORECASE,
)


def _bare(text: str) -> str:
    text = clean(text)
    lead_in = _LEAD_IN.match(text)
    return unwrap(text[lead_in.end() :]) or text if lead_in else text


_CHOICE_ANSWER = re.compile(r"[(\[]?[A-J][)\]]?$|\([A-Ja-j]\)|[A-J][.):]\s|[A-J](?:\s*(?:,|&|\band\b)\s*[A-J])+$")
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?")
_LABELLED = re.compile(
    r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])\s?[.):、]|(?:option|choice|选项?)\s*\(?([A-Z])(?![a-z])\)?[.:,]?|([A-Z])\s?选项"
    r"|([A-Z]),?\s+(?=because\b|since\b))\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)


def _same_choice(prediction: str, answer: str, options: Mapping[str, str]) -> bool:
    letters, text = _read_choice(prediction, options)
    right_letters, right_text = _read_choice(answer, options)
    if letters and right_letters:
        # Without options "J. Smith" and "J. Brown" have the same letter too.
        is_same_text = bool(options) or not text or not right_text or _same_text(text, right_text)
        return letters == right_letters and is_same_text
    return bool(text and right_text) and _same_text(text, right_text)


def _read_choice(text: str, options: Mapping[str, str]) -> tuple[frozenset[str], str]:
    """The letters that a text stands for and the option's text in it; no letter when it contradicts itself."""
    single = _LETTER.fullmatch(text)
    if single and (not options or single[1].upper() in options):
        return frozenset(single[1].upper()), ""
    several = re.fullmatch(r"[A-J](?:\s*(?:,|&|\band\b)\s*[A-J])+", text)
    if several:
        return frozenset(re.findall(r"[A-J]", re.sub(r"and", "", text))), ""
    named = _named_options(text, options)
    if named:
        return named, text
    labelled = _LABELLED.match(text)
    if not labelled:
        letters = set(re.findall(r"\(([A-J])\)", text))
        return frozenset(letters if len(letters) == 1 else ()), text
    *labels, content = labelled.groups()
    letter = frozenset(next(label for label in labels if label).upper())
    named = _named_options(content, options)
    return (frozenset() if named and named != letter else letter), content


def _named_options(text: str, options: Mapping[str, str]) -> frozenset[str]:
    """The letter of the one option that has this text, also with its letter before it ("B dog")."""
    texts = {letter: clean(option[:MAX_ANSWER_CHARS])[:MAX_ANSWER_CHARS] for letter, option in options.items()}
    for is_same in (str.__eq__, _same_value):
        named = {letter for letter, option in texts.items() if is_same(text, option)}
        named |= {letter for letter, option in texts.items() if is_same(text, f"{letter} {option}")}
        if named:
            return frozenset(named if len(named) == 1 else ())
    return frozenset()


def _same_value(left: str, right: str) -> bool:
    return bool(left) and (same_numbers(left, right) or _same_text(left, right))


_OPTION = re.compile(r"(?:^|(?<=[\s:,;]))\(?([A-J])\s?[.):、]\s*", re.MULTILINE)


def _read_options(question: str) -> dict[str, str]:
    """The options in a question, {} without; of several rows of letters from A on, the longest and then the last."""
    question = unicodedata.normalize("NFKC", question[-MAX_QUESTION_CHARS:])
    runs: list[list[re.Match[str]]] = [[]]
    for label in _OPTION.finditer(question):
        if label[1] == "A":
            runs.append([label])
        elif label[1] == chr(ord("A") + len(runs[-1])) and runs[-1]:
            runs[-1].append(label)
    run = max(reversed(runs), key=len)
    ends = [label.start() for label in run[1:]] + [len(question)]
    texts = [question[label.end() : end].strip().split("\n")[0] for label, end in zip(run, ends, strict=False)]
    return {label[1]: text.strip(" ,;") for label, text in zip(run, texts, strict=False)} if len(run) > 1 else {}


_YES = {"yes", "true", "correct", "right", "是", "是的", "对", "正确"}
_NO = {"no", "false", "incorrect", "否", "不是", "不", "不对", "错", "错误"}
_POLARITY = re.compile(
    rf"({'|'.join(sorted(_YES | _NO, key=len, reverse=True))})"
    r"(?:\s*[,.;:!。]|\s+(?:it|there|he|she|they|the|this|that)\b|$)"
)


def _same_yes_no(prediction: str, answer: str) -> bool:
    left, right = (_POLARITY.match(text.casefold()) for text in (prediction, answer))
    if not right:
        return _same_text(prediction, answer)
    return bool(left) and (left[1] in _YES) == (right[1] in _YES)


def _same_number(prediction: str, answer: str) -> bool:
    same = same_numbers(prediction, answer)
    if same is None and is_number(answer):
        return looks_like_formula(prediction) and same_formula(prediction, answer)
    return _same_text(prediction, answer) if same is None else same


def _same_relaxed(prediction: str, answer: str) -> bool:
    same = same_numbers(prediction, answer, tolerance=RELAXED_TOLERANCE)
    return not is_number(answer) and _same_text(prediction, answer) if same is None else same


def _same_math(prediction: str, answer: str) -> bool:
    return same_formula(prediction, answer) or (has_words(answer) and _same_text(prediction, answer))


def _same_text(prediction: str, answer: str) -> bool:
    left, right = _normalize_text(prediction), _normalize_text(answer)
    if not left or not right:
        return prediction.casefold() == answer.casefold()
    return left == right


def _normalize_text(text: str) -> str:
    """As VQA evaluation does, but signs that make a difference stay: those of numbers, C++, <, =, %."""
    text = re.sub(r"['`’]|(?<=\d),(?=\d{3}(?!\d))", "", text.casefold())
    text = re.sub(r'[;/\[\]"{}()\\_@?!*,:]|(?<!\d)\.|\.(?!\d)|(?<=\w)-|-(?!\w)', " ", text)
    text = re.sub(r"(?<!\S)(?:an?|the)\s+(?=\S)", "", " ".join(text.split()))
    return " ".join(NUMBER_WORDS.get(word, word) for word in text.split())


def _same_anls(prediction: str, answer: str) -> bool:
    left, right = prediction.casefold(), answer.casefold()
    same = same_numbers(prediction, answer)
    if same is not None or is_number(answer) or min(len(left), len(right)) < MIN_ANLS_CHARS:
        return bool(same) or _same_text(prediction, answer)
    return _similarity(left, right) >= ANLS_THRESHOLD


def _similarity(left: str, right: str) -> float:
    """1 - Levenshtein distance / length of the longer text."""
    previous = list(range(len(right) + 1))
    for row, one in enumerate(left, 1):
        current = [row]
        for column, other in enumerate(right):
            substituted = previous[column] + (one != other)
            current.append(min(substituted, previous[column + 1] + 1, current[column] + 1))
        previous = current
    return 1 - previous[-1] / max(len(left), len(right))


_COMPARE = {
    "yes_no": _same_yes_no, "number": _same_number, "relaxed": _same_relaxed,
    "math": _same_math, "text": _same_text, "anls": _same_anls,
}  # fmt: skip


_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$+([^$]+)\$+", r"\\\((.*)\\\)", r"\\\[(.*)\\\]", r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\{([^{}]*)\}",
        r"[*_`]+([^*_`]+)[*_`]+", r'"([^"]*)"', r"'([^']*)'", r"“([^”]*)”", r"<answer>(.*)</answer>", r"\*\*([^*]*)",
        r"([^*]*)\*\*",
    )
]  # fmt: skip
_AFTER = " \t\r\n.,;:、。\uff0c\uff1a\uff1b"
_BEFORE = " \t\r\n:\uff1a"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_LOOKALIKES = str.maketrans({"−": "-", "–": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "⁄": "/"})


def unwrap(text: str) -> str:
    r"""A text without what only dresses it: spaces, a full stop, Markdown, quotes, `$..$`, `\text{..}`, `\boxed{..}`.

    >>> unwrap("**$5$**."), unwrap("$5"), unwrap("...")
    ('5', '$5', '')
    """
    text = text.strip()
    for _ in range(6):
        bare = text.rstrip(_AFTER).lstrip(_BEFORE)
        match = next((found for wrapper in _WRAPPERS if (found := wrapper.fullmatch(bare))), None)
        bare = match[1].strip() if match else bare
        if bare == text:
            break
        text = bare
    return text


def clean(text: str) -> str:
    r"""A short answer in one spelling: half-width characters, ASCII digits and signs, nothing around it.

    Superscripts become powers and "½" becomes "1/2", which plain NFKC glues to the digits before them.

    >>> clean("２．５ m²"), clean("3½"), clean(r"**\$5**"), clean("√2")
    ('2.5 m^2', '3 1/2', '$5', '\\sqrt{2}')
    """
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda run: _power(run[0].translate(_SUPERSCRIPTS)), text)
    text = unicodedata.normalize("NFKC", "".join(map(_character, text))).translate(_LOOKALIKES)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|(\d+|[a-z]))", lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    text = re.sub(r"(?<!\w)\*\*([^*]+)\*\*", r"\1", unwrap(text))
    for written, meant in ((r"\$", "$"), (r"\%", "%"), ("{,}", ","), (r"\,", " "), (r"\!", ""), ("~", " ")):
        text = text.replace(written, meant)
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    return unwrap(" ".join(text.split()))


def _power(digits: str) -> str:
    return f"^{digits}" if len(digits) == 1 else f"^{{{digits}}}"


def _character(character: str) -> str:
    if character.isascii():
        return character
    if unicodedata.category(character) == "Cf":
        return ""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return f" {character}" if unicodedata.decomposition(character).startswith("<fraction>") else character
