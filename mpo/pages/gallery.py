"""Which pairs the report shows, and what of each: its pictures, both texts, where they came from."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_builders.images import load_image
from data_builders.records import Row
from data_builders.shown import picture_uri, shorten
from mpo.pages.texts import as_text, highlight

MAX_SIDE = 512  # pixels; larger pictures are scaled down before they go into the page
SMALL_SIDE = 128  # pixels; smaller pictures are shown enlarged, each pixel sharp
MAX_PICTURES = 6  # of one pair
MAX_FIELDS = 40  # lines of provenance

Group = tuple[str, str]  # kind and source of a pair
Candidate = tuple[tuple[bool, str], Row]  # how early a pair is taken, and the pair
Answers = Mapping[str, Mapping[str, Row]]  # question id -> model -> row of answers.jsonl

# What is read first of where a response came from; what else a row has follows by name.
_PROVENANCE = (
    "model", "prompt", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "index", "finish_reason",
    "verdict", "prediction", "rule", "ratio", "with_image",
)  # fmt: skip


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
        self._candidates: dict[Group, dict[str, Candidate]] = defaultdict(dict)

    def add(self, pair: Row) -> None:
        """Takes note of a pair; keeps one per question, and only as many questions and sources as could be picked."""
        group = self._candidates[pair["kind"], pair.get("source", "")]
        question = question_of(pair)
        candidate = (self._order(question, pair["id"]), pair)
        group[question] = min(group.get(question, candidate), candidate, key=_rank)
        if len(group) > 2 * self.num:
            for worse in sorted(group, key=lambda name: _rank(group[name]))[self.num :]:
                del group[worse]
        if len(self._candidates) > 8 * self.num:
            self._candidates = defaultdict(dict, self._first_sources())

    def picks(self) -> list[Row]:
        """The pairs: one of each kind and source in turn, each question once."""
        candidates = self._first_sources()
        queues = [
            sorted(group.values(), key=_rank, reverse=True)
            for _, group in sorted(candidates.items(), key=_by_turn(candidates))
        ]
        picked: dict[str, Row] = {}
        while any(queues) and len(picked) < self.num:
            for queue in queues:
                while queue and question_of(queue[-1][1]) in picked:
                    queue.pop()
                if queue and len(picked) < self.num:
                    _, best = queue.pop()
                    picked[question_of(best)] = best
        return list(picked.values())

    def _first_sources(self) -> dict[Group, dict[str, Candidate]]:
        """Of each kind the first sources by name: a data set may have more of them than pairs are wanted."""
        sources = _sources_by_kind(self._candidates)
        return {(kind, name): self._candidates[kind, name] for kind in sources for name in sources[kind][: self.num]}

    def _order(self, question: str, name: str) -> tuple[bool, str]:
        """Answered questions first, then by a hash, so that the picks are spread over the whole stage."""
        return question not in self.answered, hashlib.sha256(name.encode(errors="replace")).hexdigest()


def _rank(candidate: Candidate) -> tuple[bool, str]:
    return candidate[0]


def _sources_by_kind(groups: Iterable[Group]) -> dict[str, list[str]]:
    sources: dict[str, list[str]] = defaultdict(list)
    for kind, source in sorted(groups):
        sources[kind].append(source)
    return sources


def _by_turn(groups: Iterable[Group]) -> Callable[[tuple[Group, Any]], tuple[int, str]]:
    """The first source of every kind, then the second of every kind, and so on."""
    sources = _sources_by_kind(groups)
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
    chosen, rejected = highlight(pair["chosen"], pair["rejected"], kept=_kept(pair))
    question = str(pair.get("question") or pair["prompt"])
    given = answers.get(question_of(pair), {})
    names = pair.get("images", [])
    return {
        "kind": pair["kind"],
        "source": pair.get("source", ""),
        "id": pair["id"],
        "question": shorten(question, 600),
        "asked": None if pair["prompt"] == question else shorten(pair["prompt"], 1200),
        "answer": None if pair.get("answer") is None else shorten(pair["answer"], 300),
        "images": [picture(image_root, name) for name in names[:MAX_PICTURES]],
        "num_hidden_images": len(names[MAX_PICTURES:]),
        "files": shorten(", ".join(names), 300),
        "chosen": chosen,
        "rejected": rejected,
        "kept": _kept(pair),
        "provenance": provenance(pair),
        "answers": [
            {**given[model], "response": shorten(given[model].get("response") or "", 320)}
            for model in models
            if model in given
        ],
    }


def _kept(pair: Row) -> int:
    """Characters of the chosen response that a DropoutNTP continuation began with; 0 where the row does not say."""
    kept = (pair.get("rejected_meta") or {}).get("prefix_characters")
    return kept if isinstance(kept, int) and 0 < kept <= len(pair["chosen"]) else 0


def provenance(pair: Row) -> list[tuple[str, str, str]]:
    """Where both responses came from and why they were judged so: name, of the chosen one, of the rejected one.

    >>> provenance({"chosen_meta": {"rule": "number", "sampler": {"seed": 0}}, "rejected_meta": {"rule": "failed"}})
    [('seed', '0', '–'), ('rule', 'number', 'failed')]
    """
    chosen, rejected = _flat(pair.get("chosen_meta") or {}), _flat(pair.get("rejected_meta") or {})
    order = {name: place for place, name in enumerate(_PROVENANCE)}
    names = sorted({*chosen, *rejected}, key=lambda name: (order.get(name, len(order)), name))[:MAX_FIELDS]
    values = [[as_text(side.get(name, "–"), 300) for side in (chosen, rejected)] for name in names]
    return [(shorten(name.replace("_", " "), 60), *both) for name, both in zip(names, values, strict=True)]


def _flat(meta: Row) -> Row:
    """The sampler's fields by their own names, those of any other part of the row behind the part's name."""
    flat: Row = {}
    for name, value in meta.items():
        if isinstance(value, dict):
            flat |= {inner if name == "sampler" else f"{name}: {inner}": value[inner] for inner in value}
        else:
            flat[name] = value
    return flat


def picture(image_root: Path, name: str) -> Row:
    """A picture as a PNG data URI of at most 512 pixels a side.

    Raises:
        InputError: As `data_builders.images.load_image`.
    """
    image = load_image(image_root, name)
    uri = picture_uri(image, side=MAX_SIDE)
    return {"uri": uri, "width": image.width, "height": image.height, "small": max(image.size) <= SMALL_SIDE}
