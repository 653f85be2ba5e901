"""What training data are like before a run: broken rows counted instead of stopping, lengths, and what sharing saves.

All rows are read; tokens are counted on a sample of whole questions, with the model's processor or, where there is
none, estimated from texts and the sizes of pictures. No picture is decoded.

Shapes: N rows of the sample.
"""

import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Json, List, Value
from transformers import ProcessorMixin

from data_builders.records import InputError, Row
from mpo import forest
from mpo.data import preference_dataset
from mpo.groups import pack_groups, question_keys
from mpo.lengths import Lengths, measure_rows, picture_size, rendered
from mpo.pictures import IMAGES, ImagePaths
from mpo.planning.footprint import Batch, Work
from mpo.planning.picture_tokens import PictureCounter
from mpo.planning.problems import Faults
from mpo.preferences import COLUMNS, preference
from mpo.shared_prefixes import undecoded
from mpo.sources import local_path, open_source

_IMAGE = -1  # stands for every token of a picture where only lengths matter
# Pieces of about the length of a token: digits one by one as Qwen's and InternVL's tokenizers take them, at most six
# letters of a word with the space before it, and every other character.
_PIECE = re.compile(r"\d| ?[^\W\d_\u3040-\u9fff\uac00-\ud7a3]{1,6}|\s+|.", re.DOTALL)
_TURN_PIECES = 8  # that a chat template puts around a message


@dataclass(frozen=True)
class Collected:
    """Rows of all sources.

    Attributes:
        num_rows: Those that can be trained on.
        faults: Those that cannot, and sources that cannot be read.
        sample: Some of the good ones, (N,), with the columns that training gets.
    """

    num_rows: int
    faults: Faults
    sample: Dataset


@dataclass(frozen=True)
class Measured:
    """The sample as a model will see it.

    Attributes:
        lengths: Tokens, (N,) each.
        patches: Tokens of the tower for each row's pictures, (N,).
        patches_visible: Sum over them of those that each one sees, (N,).
        pairs: Chosen and rejected sequence of each row, as `mpo.forest` takes them.
        keys: The question of each row.
        estimated: Counts are estimates, without the processor.
    """

    lengths: Lengths
    patches: np.ndarray
    patches_visible: np.ndarray
    pairs: list[tuple[forest.Sequence, forest.Sequence]]
    keys: list[bytes]
    estimated: bool


@dataclass(frozen=True)
class Sharing:
    """One way to cut the sample into micro-batches.

    Attributes:
        plain: What it takes row by row.
        shared: What it takes with every prefix and picture computed once.
        largest: The micro-batch that takes the most tokens, sharing.
    """

    plain: Work
    shared: Work
    largest: Batch


def collect(sources: Iterable[str], image_root: str, *, limit: int) -> Collected:
    """Reads all rows of all sources, and keeps some of them.

    Args:
        sources: As in `mpo.data.preference_dataset`.
        image_root: The folder that image paths are relative to.
        limit: Rows that are kept, at most, but for the last question.
    """
    faults, sample, images = Faults(), _Sample(limit), ImagePaths(Path(image_root))
    num_rows = 0
    for source in sources:
        try:
            for row in _rows(source, images, image_root, faults):
                num_rows += 1
                sample.add(row)
        except InputError as error:
            here = local_path(source) is not None
            faults.add(
                "source", str(error) if here else f"{source} is neither a file or folder nor in the Hub's cache"
            )
    kept = [row for row in sample.rows() if _opens(row, faults)]
    return Collected(num_rows, faults, _dataset(kept))


def _rows(source: str, images: ImagePaths, image_root: str, faults: Faults) -> Iterator[Row]:
    """The good rows of a source; what is wrong with the others is counted."""
    opened = open_source(source)
    is_table = isinstance(opened, Dataset)
    found = _table_rows(source, image_root) if is_table else _json_rows(opened, images, faults)
    for where, row in found:
        if row["chosen"] == row["rejected"]:
            faults.add("equal", where)
        else:
            yield row


def _json_rows(rows: Iterable[tuple[str, Row]], images: ImagePaths, faults: Faults) -> Iterator[tuple[str, Row]]:
    for where, row in rows:
        try:
            names = _names(row, where)
            columns = preference(row, len(names), where)
        except InputError as error:
            faults.add("row", str(error))
            continue
        try:
            yield where, {"images": [images.file(name, where) for name in names], **columns}
        except InputError as error:
            faults.add("image", str(error))


def _names(row: Row, where: str) -> list[str]:
    names = (row.get("images") or []) if row.get("image") is None else [row["image"]]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: `images` must be a list of paths, or `image` one path, got {names!r:.80}.")
    return names


def _table_rows(source: str, image_root: str) -> Iterator[tuple[str, Row]]:
    rows = undecoded(preference_dataset([source], image_root))
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", {"images": [], **row}


def _opens(row: Row, faults: Faults) -> bool:
    """Whether the heads of a row's pictures can be read."""
    try:
        for picture in row["images"]:
            picture_size(picture)
    except InputError as error:
        faults.add("image", str(error))
        return False
    return True


class _Sample:
    """Rows of whole questions, chosen by their digests: the same for the same rows, in whatever order.

    Args:
        limit: Rows to keep.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._num = limit, 0
        self._by_key: dict[int, list[Row]] = {}
        self._largest: list[int] = []  # a heap of negated digests
        self._bound: int | None = None  # digests from here on were given up

    def add(self, row: Row) -> None:
        """Takes a row, perhaps in the place of others."""
        key = _digest([row["prompt"], [_place(picture) for picture in row["images"]]])
        if self._bound is not None and key >= self._bound:
            return
        if key not in self._by_key:
            self._by_key[key] = []
            heapq.heappush(self._largest, -key)
        self._by_key[key].append(row)
        self._num += 1
        while self._num > self.limit and len(self._by_key) > 1:
            self._bound = -heapq.heappop(self._largest)
            self._num -= len(self._by_key.pop(self._bound))

    def rows(self) -> list[Row]:
        """What was kept, question by question."""
        return list(chain.from_iterable(self._by_key.values()))


def _digest(value: Any) -> int:
    content = json.dumps(value, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _place(picture: Any) -> str:
    """What tells pictures apart: a path, or a digest of the bytes."""
    if isinstance(picture, str):
        return picture
    return picture["path"] if picture["bytes"] is None else hashlib.blake2b(picture["bytes"]).hexdigest()


def _dataset(rows: list[Row]) -> Dataset:
    text = Value("string") if rows and isinstance(rows[0]["chosen"], str) else List(Json())
    features = Features({"images": IMAGES, **dict.fromkeys(COLUMNS, text)})
    return undecoded(Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features))


def measure(
    sample: Dataset,
    processor: ProcessorMixin | None,
    count: PictureCounter,
    *,
    merge: float,
    tile_patches: int | None,
    max_length: int | None,
) -> Measured:
    """Counts the tokens of a sample.

    Args:
        sample: Of `collect`.
        processor: The model's; None: counts are estimated.
        count: Takes the processor's place for pictures.
        merge: Tokens of the tower that become one of the language model.
        tile_patches: Tokens of the tower that see each other; None: those of a whole picture.
        max_length: Where sequences are cut.

    Raises:
        InputError: The processor refuses a row.
    """
    rows = list(sample)
    if processor is None:
        texts, lengths = _estimated(rows, count)
    else:
        lengths = measure_rows(sample if any(sample["images"]) else sample.remove_columns("images"), processor)
        texts = _tokenized(rows, processor)
    patches = np.round(lengths.image * merge).astype(np.int64)
    pictures = np.array([max(1, len(row["images"])) for row in rows], dtype=np.int64)
    span = np.full(len(rows), tile_patches) if tile_patches else patches // pictures
    pairs = [
        _pair(row, text, num_image, max_length)
        for row, text, num_image in zip(rows, texts, lengths.image.tolist(), strict=True)
    ]
    return Measured(lengths, patches, patches * span, pairs, question_keys(sample), processor is None)


def _pair(row: Row, texts: Row, num_image: int, max_length: int | None) -> tuple[forest.Sequence, forest.Sequence]:
    """Both sequences, with a picture's tokens in front of the prompt's."""
    pictures = tuple(_place(picture) for picture in row["images"])
    prompt = [_IMAGE] * num_image + texts["prompt"]
    room = None if max_length is None else max(1, max_length - len(prompt))
    chosen, rejected = (
        forest.Sequence(pictures, prompt, texts[name][:room], num_image) for name in ("chosen", "rejected")
    )
    return chosen, rejected


def _tokenized(rows: Sequence[Row], processor: ProcessorMixin) -> list[dict[str, list[int]]]:
    found = []
    for row in rows:
        texts = rendered(row, len(row["images"]), processor)
        if token := getattr(processor, "image_token", None):
            texts = {**texts, "prompt": texts["prompt"].replace(token, "")}
        found.append(
            {name: processor.tokenizer(texts[name], add_special_tokens=False)["input_ids"] for name in COLUMNS}
        )
    return found


def _estimated(rows: Sequence[Row], count: PictureCounter) -> tuple[list[dict[str, list[int]]], Lengths]:
    known: dict[str, int] = {}
    texts = [{name: _pieces(row[name], known) for name in COLUMNS} for row in rows]
    image = [sum(count(picture_size(picture)) for picture in row["images"]) for row in rows]
    columns = [image, *([len(text[name]) for text in texts] for name in COLUMNS)]
    return texts, Lengths(*(np.array(column, dtype=np.int64) for column in columns))


def _pieces(text: str | list[Row], known: dict[str, int]) -> list[int]:
    """A text, or messages, in pieces of about a token."""
    if isinstance(text, str):
        return [known.setdefault(piece, len(known)) for piece in _PIECE.findall(text)]
    found = []
    for message in text:
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        found += [known.setdefault(message["role"], len(known))] * _TURN_PIECES
        found += [piece for part in parts for piece in _pieces(part, known)]
    return found


def share(
    measured: Measured, *, batch_size: int, grouped: bool, part: float = 1.0, max_tokens: int | None = None
) -> Sharing:
    """What one pass over the sample takes, row by row and with prefixes shared.

    Args:
        measured: The sample.
        batch_size: Pairs in a micro-batch.
        grouped: Pairs of one question stand side by side, else rows come at random.
        part: Share of all rows that the sample is. At random, rows of one question meet in a micro-batch of all rows
            as often as they do in one so much smaller of the sample.
        max_tokens: `max_forest_tokens`.
    """
    order = np.random.default_rng(0).permutation(len(measured.pairs)).tolist()
    size = batch_size if grouped else max(1, round(part * batch_size))
    if grouped:
        order = pack_groups(measured.keys, order, size)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    found = [_forest_work(measured, batch, max_tokens) for batch in batches]
    worst = _forest_work(measured, _longest_of_each_question(measured)[:batch_size], max_tokens)[1]
    largest = max([worst, *(batch for _, batch in found if grouped)], key=lambda batch: batch.tokens)
    none = Work(0, 0, 0)
    plain = sum((_plain_work(measured, row) for row in order), none)
    return Sharing(plain, sum((work for work, _ in found), none), largest)


def _longest_of_each_question(measured: Measured) -> list[int]:
    """All rows, the longest first, but the first of each question before the others: together they share least."""
    sizes = [len(chosen.prompt + chosen.response) + len(rejected.response) for chosen, rejected in measured.pairs]
    rows = sorted(range(len(sizes)), key=lambda row: -sizes[row])
    first = set({measured.keys[row]: row for row in reversed(rows)}.values())
    return sorted(rows, key=lambda row: row not in first)


def largest_plain(measured: Measured, batch_size: int) -> Batch:
    """The micro-batch of padded rows that takes the most tokens."""
    totals = [max(len(s.prompt) + len(s.response) for s in pair) for pair in measured.pairs]
    rows = np.argsort(-np.array(totals), kind="stable")[:batch_size].tolist()
    scored = sum(len(sequence.response) for row in rows for sequence in measured.pairs[row])
    patches = 2 * int(measured.patches[rows].sum())  # TRL's collator gives every picture twice
    return Batch(2 * len(rows), max(totals), scored, patches)


def _plain_work(measured: Measured, row: int) -> Work:
    chosen, rejected = measured.pairs[row]
    lengths = [len(sequence.prompt) + len(sequence.response) for sequence in (chosen, rejected)]
    visible = sum(length * (length + 1) // 2 for length in lengths)
    scored = len(chosen.response) + len(rejected.response)
    return Work(sum(lengths), visible, scored, 2 * int(measured.patches[row]), 2 * int(measured.patches_visible[row]))


def _forest_work(measured: Measured, rows: Sequence[int], max_tokens: int | None) -> tuple[Work, Batch]:
    sequences = [measured.pairs[row][side] for side in (0, 1) for row in rows]
    laid_out = forest.build_forest(sequences, pad_id=0, max_tokens=max_tokens)
    roots = [rows[root % len(rows)] for root in laid_out.roots]
    patches = int(measured.patches[roots].sum())
    work = Work(
        int(laid_out.is_token.sum()),
        int((laid_out.positions + 1)[laid_out.is_token].sum()),
        int((laid_out.shift_labels != forest.NO_LABEL).sum()),
        patches,
        int(measured.patches_visible[roots].sum()),
    )
    return work, Batch(*laid_out.input_ids.shape, work.scored, patches)
