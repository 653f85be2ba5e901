"""Which pairs the report shows, and how: pictures inside the page, and what differs between chosen and rejected.

Everything a model wrote leaves this module escaped.
"""

import base64
import difflib
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from data_builders.images import load_image
from data_builders.records import Row

MAX_SIDE = 512  # pixels; larger pictures are scaled down before they go into the page
SMALL_SIDE = 128  # pixels; smaller pictures are shown enlarged, each pixel sharp
PREFIX_ENDS = 240  # characters kept at either end of a long shared beginning
MIN_RATIO = 0.2  # share of common words below which marks would cover everything
MAX_REST = 1600  # characters shown after it

Group = tuple[str, str]  # kind and source of a pair
Answers = Mapping[str, Mapping[str, Row]]  # question id -> model -> row of answers.jsonl

# A Chinese, Japanese or Korean character is a word of its own.
_WORDS = re.compile(r"[\u2e80-\uffdc]\s*|[^\s\u2e80-\uffdc]+\s*")


def question_of(pair: Row) -> str:
    """The id of the question that a pair is about.

    >>> question_of({"id": "q-0012#3"}), question_of({"id": "q-0012#3", "question_id": "q-12"})
    ('q-0012', 'q-12')
    """
    return str(pair.get("question_id") or pair["id"].rpartition("#")[0] or pair["id"])


class GalleryPicker:
    """Picks pairs evenly over kinds and sources from a stream of any length, the same ones in any order of rows."""

    def __init__(self, num: int, answered: Iterable[str] = ()) -> None:
        """Starts with nothing seen.

        Args:
            num: How many pairs are wanted.
            answered: Ids of the questions that the evaluation answered; their pairs come first.
        """
        self.num = num
        self.answered = frozenset(answered)
        self._candidates: dict[Group, dict[str, Row]] = defaultdict(dict)

    def add(self, pair: Row) -> None:
        """Takes note of a pair; keeps one per question and only as many questions as could be picked."""
        group = self._candidates[pair["kind"], pair.get("source", "")]
        question = question_of(pair)
        group[question] = min(group.get(question, pair), pair, key=self._order)
        if len(group) > 2 * self.num:
            for worse in sorted(group, key=lambda name: self._order(group[name]))[self.num :]:
                del group[worse]

    def picks(self) -> list[Row]:
        """The pairs: one of each kind and source in turn, each question once."""
        queues = [
            sorted(group.values(), key=self._order, reverse=True)
            for _, group in sorted(self._candidates.items(), key=_by_turn(self._candidates))
        ]
        picked: dict[str, Row] = {}
        while any(queues) and len(picked) < self.num:
            for queue in queues:
                while queue and question_of(queue[-1]) in picked:
                    queue.pop()
                if queue and len(picked) < self.num:
                    best = queue.pop()
                    picked[question_of(best)] = best
        return list(picked.values())

    def _order(self, pair: Row) -> tuple[bool, str]:
        """Answered questions first, then by a hash, so that the picks are spread over the whole stage."""
        digest = hashlib.sha256(pair["id"].encode(errors="replace")).hexdigest()
        return question_of(pair) not in self.answered, digest


def _by_turn(groups: Iterable[Group]) -> Callable[[tuple[Group, Any]], tuple[int, str]]:
    """The first source of every kind, then the second of every kind, and so on."""
    sources: dict[str, list[str]] = defaultdict(list)
    for kind, source in sorted(groups):
        sources[kind].append(source)
    return lambda item: (sources[item[0][0]].index(item[0][1]), item[0][0])


def card(pair: Row, answers: Answers, models: Sequence[str], image_root: Path) -> Row:
    """What one card of the gallery shows.

    Args:
        pair: A row of the pairs.
        answers: What the models answered in the evaluation.
        models: In the order in which they are shown.
        image_root: The folder that image paths are relative to.

    Raises:
        InputError: An image is missing, broken or outside the root.
    """
    chosen, rejected = highlight(pair["chosen"], pair["rejected"])
    given = answers.get(question_of(pair), {})
    return {
        "kind": pair["kind"],
        "source": pair.get("source", ""),
        "id": pair["id"],
        "question": shorten(str(pair.get("question") or pair["prompt"]), 600),
        "answer": pair.get("answer"),
        "images": [picture(image_root, name) for name in pair.get("images", [])],
        "chosen": chosen,
        "rejected": rejected,
        "answers": [
            {**given[model], "response": shorten(given[model].get("response") or "", 320)}
            for model in models
            if model in given
        ],
    }


def picture(image_root: Path, name: str) -> Row:
    """A picture as a PNG data URI of at most 512 pixels a side.

    Raises:
        InputError: As `data_builders.images.load_image`.
    """
    image = load_image(image_root, name)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")
    return {"uri": uri, "width": image.width, "height": image.height, "small": max(image.size) <= SMALL_SIDE}


def shorten(text: str, limit: int) -> str:
    """The beginning of a text that may be long, saying how much is left out.

    >>> shorten("abcdef", 4)
    'abcd … (2 more characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def highlight(chosen: str, rejected: str) -> tuple[Markup, Markup]:
    """Two responses with what only one of them says in `<mark>` and their shared beginning in a quiet `<span>`.

    Everything is escaped. Two responses that have next to nothing in common are left unmarked: all of them differs.

    >>> highlight("It is <7>, yes.", "It is <9>, yes.")[0]
    Markup('<span class="shared">It is </span><mark>&lt;7&gt;,</mark> yes.')
    """
    ours, theirs = _WORDS.findall(chosen.strip()), _WORDS.findall(rejected.strip())
    num_shared = _num_shared(ours, theirs)
    start = _prefix("".join(ours[:num_shared]))
    ours, our_rest = _cut(ours[num_shared:])
    theirs, their_rest = _cut(theirs[num_shared:])
    matcher = difflib.SequenceMatcher(None, _stripped(ours), _stripped(theirs), autojunk=False)
    marked = num_shared > 0 or matcher.ratio() > MIN_RATIO
    chosen_html, rejected_html = start, start
    for change, i, j, k, end in matcher.get_opcodes():
        chosen_html += _piece(ours[i:j], marked=marked and change != "equal")
        rejected_html += _piece(theirs[k:end], marked=marked and change != "equal")
    return chosen_html + our_rest, rejected_html + their_rest


def _stripped(words: list[str]) -> list[str]:
    return [word.strip() for word in words]


def _num_shared(ours: list[str], theirs: list[str]) -> int:
    for number, (one, other) in enumerate(zip(_stripped(ours), _stripped(theirs), strict=False)):
        if one != other:
            return number
    return min(len(ours), len(theirs))


def _prefix(text: str) -> Markup:
    if len(text) > 2 * PREFIX_ENDS:
        text = f"{text[:PREFIX_ENDS]} … {text[-PREFIX_ENDS:]}"
    return Markup('<span class="shared">{}</span>').format(text) if text else Markup("")


def _cut(words: list[str]) -> tuple[list[str], Markup]:
    """The words that fit, and a note on the rest."""
    text = "".join(words)
    if len(text) <= MAX_REST:
        return words, Markup("")
    note = Markup('<span class="shared"> … ({:,} more characters)</span>').format(len(text) - MAX_REST)
    return _WORDS.findall(text[:MAX_REST]), note


def _piece(words: list[str], *, marked: bool) -> Markup:
    text = "".join(words)
    if not marked or not text:
        return escape(text)
    bare = text.rstrip()
    return Markup("<mark>{}</mark>{}").format(bare, text[len(bare) :])
