r"""Where a response states its final answer: in a box, after a marker, after its thinking, or the response itself.

Pure functions of the text, in time that grows with its length and not faster.
"""

import re
from typing import Literal, get_args

from data_builders.records import InputError
from data_builders.rules.text import unwrap

Style = Literal["auto", "final_answer", "boxed", "think", "direct"]
STYLES = get_args(Style)

# No final answer is longer.
MAX_ANSWER_CHARS = 500
MAX_DIRECT_CHARS = 100
# Without a marker and without being asked for a direct answer, a longer line is a sentence rather than an answer.
MAX_UNMARKED_CHARS = 40


def extract_answer(response: str, *, style: str = "auto") -> str | None:
    r"""The final answer that a response states, without what only dresses it.

    Args:
        response: All that the model wrote.
        style: `boxed`: the last \boxed{...}. `final_answer`: what follows the last "Final answer:" or "Answer:"
            (最终答案：, 答案：) on its line, or on the next one. `direct`: the whole response when it is one line of
            at most 100 characters. `think`: what follows `</think>`, by its box or marker, or all of it when it is one
            short line. `auto`: after any thinking the first of box, "Final answer:" and "the answer is ..."; without
            them the whole response when it is one line of at most 40 characters and no sentence.
            Both know `<answer>...</answer>` too.

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
        return _after(response, _last_end(response, _FINAL_ANSWER))
    if style == "direct":
        return _direct(response, MAX_DIRECT_CHARS)
    _, closed, after = response.rpartition("</think>")
    if "<think>" in after or (style == "think" and not closed):
        return None
    if _BOX.search(after):
        return _boxed(after)
    if "</answer>" in after:
        return _tagged(after)
    for marker in (_FINAL_ANSWER, _ANSWER_IS):
        if end := _last_end(after, marker):
            return _after(after, end)
    return _direct(after, MAX_DIRECT_CHARS) if style == "think" else _unmarked(after)


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(rf"{_BOX.pattern}|\\.|[{{}}]", re.DOTALL)
_FINAL_ANSWER = re.compile(
    r"(?:(?<!\bno )(?<!not )(?<!n't )\banswer(?:\s+is)?|答案)(?:是|为)?[ \t*_]{0,5}[:\uff1a]"
    r"|^[ \t#*_]{0,9}(?:final answer|最终答案)[ \t*_]{0,5}$",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWER_IS = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice|letter)) is\b[ \t]?:?|答案(?:是|为)|(?:故|应|所以)选|选择"
    r"|选(?=[A-J](?![A-Za-z]))",
    re.IGNORECASE,
)
_MARKER_WORDS = ("answer", "答案", "option", "choice", "letter", "选")
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


def _tagged(text: str) -> str | None:
    """What stands before the last `</answer>`, after its `<answer>`."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end)
    return None if start < 0 else _answer(text[start + len("<answer>") : end])


def _last_end(text: str, marker: re.Pattern[str]) -> int | None:
    """Where the last marker ends, None without any; a plain search, which is much faster, comes first."""
    lowered = text.lower()
    if not any(word in lowered for word in _MARKER_WORDS):
        return None
    return max((found.end() for found in marker.finditer(text)), default=None)


def _after(text: str, end: int | None) -> str | None:
    """What follows a marker: the rest of its line, or the next line that holds more than signs."""
    if end is None:
        return None
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
