r"""One spelling for short answers, and whether two texts are the same. Part of `data_builders.verify`.

`unwrap` takes off what only dresses an answer, `clean` also unifies characters, `same_text` compares as VQA evaluation
does, `edit_similarity` is what ANLS is made of. Pure functions; the work grows with the length of the text, except for
the similarity, which is for texts of a few hundred characters.
"""

import re
import unicodedata
from functools import lru_cache

from data_builders.rules.numbers import NUMBER_WORDS

_DRESS = re.compile(r"[$\\*_`\"'“<]")
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$+([^$]+)\$+", r"\\\((.*)\\\)", r"\\\[(.*)\\\]",
        r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\{([^{}]*)\}", r"[*_`]+([^*_`]+)[*_`]+", r'"([^"]*)"',
        r"'([^']*)'", r"“([^”]*)”", r"<answer>(.*)</answer>", r"\*\*([^*]*)", r"([^*]*)\*\*",
    )
]  # fmt: skip
_AFTER = " \t\r\n.,;:、。\uff0c\uff1a\uff1b"
_BEFORE = " \t\r\n:\uff1a"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_LOOKALIKES = str.maketrans({"−": "-", "–": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "⁄": "/"})
_WRITTEN = ((r"\$", "$"), (r"\%", "%"), ("{,}", ","), (r"\,", " "), (r"\!", ""), ("~", " "))
_CJK = "\u3400-\u9fff"


def unwrap(text: str) -> str:
    r"""A text without what only dresses it: spaces, a full stop, Markdown, quotes, `$..$`, `\text{..}`, `\boxed{..}`.

    >>> unwrap("**$5$**."), unwrap("$5"), unwrap("...")
    ('5', '$5', '')
    """
    text = text.strip()
    for _ in range(6):
        bare = text.rstrip(_AFTER).lstrip(_BEFORE)
        match = None
        if _DRESS.search(bare):
            match = next((found for wrapper in _WRAPPERS if (found := wrapper.fullmatch(bare))), None)
        bare = match[1].strip() if match else bare
        if bare == text:
            break
        text = bare
    return text


@lru_cache(4096)  # responses to one question repeat the same few answers
def clean(text: str) -> str:
    r"""A short answer in one spelling: half-width characters, ASCII digits and signs, nothing around it.

    Superscripts become powers and "½" becomes "1/2", which plain NFKC glues to the digits before them.

    >>> clean("２．５ m²"), clean("3½"), clean(r"**\$5**"), clean("√2")
    ('2.5 m^2', '3 1/2', '$5', '\\sqrt{2}')
    """
    if text.isascii() and text.isalnum():
        return text
    if not text.isascii():
        text = _plain_characters(text)
    text = unwrap(text)
    if "*" in text:
        text = re.sub(r"(?<!\w)\*\*([^*]+)\*\*", r"\1", text)
    for written, meant in _WRITTEN:
        text = text.replace(written, meant)
    if "\\" in text:
        text = re.sub(r"(?<!\\)\\(?:[ ;:]|quad(?![a-zA-Z]))", " ", text)
        text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
        text = re.sub(r"(?<=[a-zA-Z]) +(?=\^)", "", text)
    return unwrap(" ".join(text.split()))


def _plain_characters(text: str) -> str:
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda run: _power(run[0].translate(_SUPERSCRIPTS)), text)
    text = unicodedata.normalize("NFKC", "".join(map(_character, text))).translate(_LOOKALIKES)
    return re.sub(r"√\s*(?:\(([^()]*)\)|(\d+|[a-z]))", lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)


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


def same_text(prediction: str, answer: str) -> bool:
    """Whether two cleaned texts say the same, as VQA evaluation normalises them; without any word, as they stand.

    >>> same_text("The U.S.A.", "usa"), same_text("two dogs", "2 dogs"), same_text("none", "no")
    (True, True, False)
    """
    left, right = normalize_text(prediction), normalize_text(answer)
    if not left or not right:
        return prediction.casefold() == answer.casefold()
    return left == right


@lru_cache(4096)
def normalize_text(text: str) -> str:
    """As VQA evaluation does, but signs that make a difference stay: those of numbers, C++, <, =, %."""
    text = re.sub(r"['`’]|(?<=\d),(?=\d{3}(?!\d))", "", text.casefold()).replace("&", " and ")
    if "." in text:
        text = re.sub(r"(?<!\w)[^\W\d_](?:\.[^\W\d_])+(?!\w)", lambda initials: initials[0].replace(".", ""), text)
    text = re.sub(r'[;/\[\]"{}()\\_@?!*,:《》「」『』]|(?<!\d)\.|\.(?!\d)|(?<=\w)-|-(?!\w)', " ", text)
    text = re.sub(rf"(?<=\d)(?=[^\W\d_]|%)|(?<=[{_CJK}])\s+(?=[{_CJK}])", lambda gap: "" if gap[0] else " ", text)
    text = re.sub(r"(?<!\S)(?:an?|the)\s+(?=\S)", "", " ".join(text.split()))
    return " ".join(NUMBER_WORDS.get(word, word) for word in text.split())


def edit_similarity(left: str, right: str) -> float:
    """1 - Levenshtein distance / length of the longer text.

    >>> edit_similarity("kitten", "mitten"), edit_similarity("xyz", "42")
    (0.8333333333333334, 0.0)
    """
    return 1 - edit_distance(left, right) / max(len(left), len(right), 1)


def edit_distance(left: str, right: str) -> int:
    """Levenshtein's: how many characters to insert, delete or replace; takes a step for each pair of characters."""
    previous = list(range(len(right) + 1))
    for row, one in enumerate(left, 1):
        current = [row]
        for column, other in enumerate(right):
            replaced = previous[column] + (one != other)
            current.append(min(replaced, previous[column + 1] + 1, current[column] + 1))
        previous = current
    return previous[-1]
