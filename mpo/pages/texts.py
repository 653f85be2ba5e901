"""How the report shows what models wrote: bounded, escaped, nothing of it unseen, and how two responses differ."""

import difflib
import json
import re
from collections import Counter

from markupsafe import Markup, escape

from data_builders.shown import shorten, visible

MAX_TEXT = 100_000  # characters of a response that are looked at
MAX_REST = 1600  # characters of a response that are shown, a shared beginning aside
PREFIX_ENDS = 240  # characters kept at either end of a long shared beginning
MIN_RATIO = 0.2  # share of common words below which marks would cover everything
# Pairs of equal words, one of each text: difflib's time grows with them, to half a minute for 1,600 equal characters.
MAX_MATCHES = 20_000

# A Chinese, Japanese or Korean character is a word of its own.
_WORDS = re.compile(r"[\u2e80-\uffdc]\s*|[^\s\u2e80-\uffdc]+\s*|\s+")


def as_text(value: object, limit: int) -> str:
    """A value of a JSON object in so many characters; a text stands for itself.

    >>> as_text("a", 9), as_text(None, 9), as_text([1, 2, 3, 4], 6)
    ('a', 'null', '[1, 2, … (6 more characters)')
    """
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), limit)


def count_words(text: str) -> int:
    """How many words a text has; a Chinese, Japanese or Korean character is one.

    >>> count_words("two words"), count_words("图中有 two 猫")
    (2, 5)
    """
    return len(text.split()) if text.isascii() else sum(1 for found in _WORDS.finditer(text) if found[0].strip())


def highlight(chosen: str, rejected: str, *, kept: int = 0) -> tuple[Markup, Markup]:
    """Two responses with what only one of them says in `<mark>` and their shared beginning in a quiet `<span>`.

    Everything is escaped. Two responses that have next to nothing in common are left unmarked: all of them differs.

    Args:
        chosen: The better response.
        rejected: The other one.
        kept: Characters of the chosen response that the rejected one was made to begin with; a line shows where they
            end, and what comes after is compared. 0 takes all that both begin with for shared.

    >>> highlight("It is <7>, yes.", "It is <9>, yes.")[0]
    Markup('<span class="shared">It is </span><mark>&lt;7&gt;,</mark> yes.')
    """
    if kept and chosen[:kept] == rejected[:kept]:
        start, marked = _beginning(chosen[:kept], "kept"), True
        ours, theirs = chosen[kept:].rstrip(), rejected[kept:].rstrip()
    else:
        ours, theirs = chosen.strip(), rejected.strip()
        end, their_end = _shared_ends(ours, theirs)
        start, marked = _beginning(ours[:end], "shared"), end > 0
        ours, theirs = ours[end:], theirs[their_end:]
    shown, others = _comparable(_WORDS.findall(ours[:MAX_REST]), _WORDS.findall(theirs[:MAX_REST]))
    matcher = difflib.SequenceMatcher(None, _bare(shown), _bare(others), autojunk=False)
    marked = marked or matcher.ratio() > MIN_RATIO
    chosen_html, rejected_html = start, start
    for change, i, j, k, end in matcher.get_opcodes():
        chosen_html += _piece(shown[i:j], marked=marked and change != "equal")
        rejected_html += _piece(others[k:end], marked=marked and change != "equal")
    return chosen_html + _rest(ours, shown), rejected_html + _rest(theirs, others)


def _bare(words: list[str]) -> list[str]:
    return [word.strip() for word in words]


def _shared_ends(ours: str, theirs: str) -> tuple[int, int]:
    """Where the words end that both texts begin with, in each of them."""
    end, their_end = 0, 0
    words = zip(_WORDS.finditer(ours, 0, MAX_TEXT), _WORDS.finditer(theirs, 0, MAX_TEXT), strict=False)
    for one, other in words:
        if one[0].strip() != other[0].strip():
            break
        end, their_end = one.end(), other.end()
    return end, their_end


def _beginning(text: str, name: str) -> Markup:
    if len(text) > 2 * PREFIX_ENDS:
        text = f"{text[:PREFIX_ENDS]} … {text[-PREFIX_ENDS:]}"
    return Markup('<span class="{}">{}</span>').format(name, visible(text)) if text else Markup("")


def _comparable(ours: list[str], theirs: list[str]) -> tuple[list[str], list[str]]:
    """As many of the first words as can be compared in no time."""
    size = max(len(ours), len(theirs))
    while _num_matches(ours[:size], theirs[:size]) > MAX_MATCHES:
        size //= 2
    return ours[:size], theirs[:size]


def _num_matches(ours: list[str], theirs: list[str]) -> int:
    counts, others = Counter(_bare(ours)), Counter(_bare(theirs))
    return sum(num * others[word] for word, num in counts.items())


def _piece(words: list[str], *, marked: bool) -> Markup:
    text = visible("".join(words))
    bare = text.strip()
    if not marked or not bare:
        return escape(text)
    before, after = text.split(bare, 1)
    return Markup("{}<mark>{}</mark>{}").format(before, bare, after)


def _rest(text: str, shown: list[str]) -> Markup:
    """A note on what is not shown."""
    num = len(text) - sum(map(len, shown))
    return Markup('<span class="shared"> … ({:,} more characters)</span>').format(num) if num else Markup("")
