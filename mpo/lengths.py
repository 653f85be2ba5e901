"""How many tokens each row takes.

No picture is decoded: what a processor writes in place of one follows from its size, which stands in the head of its
file. So the processor is run on blank pictures, once for each kind of size, and the texts are tokenized with that in
place. The counts are those of TRL's collator, to the token.

Lengths are in tokens; N rows.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from datasets import Image as ImageFeature
from jinja2 import TemplateError
from PIL import Image
from tqdm import tqdm
from transformers import ProcessorMixin
from transformers.image_utils import get_image_size, load_image
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages

from data_builders.records import InputError, Row

Size = tuple[int, int]  # width and height in pixels, the right way up

_TEXTS = ("prompt", "chosen", "rejected")
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 say that the picture lies on its side
_ROWS_AT_A_TIME = 512
_PROBES = ((300, 300), (300, 1500), (1500, 300), (1500, 1500))


class Lengths(NamedTuple):
    """Tokens of N rows, one integer array (N,) each.

    Attributes:
        image: What the processor writes into the prompt for the row's pictures, its own markers and line breaks
            included (`<img>`, `<row_1_col_1>`); what the chat template puts around them counts as prompt.
        prompt: Everything else in front of the responses.
        chosen: The chosen response with the end of its turn.
        rejected: The rejected response with the end of its turn.
    """

    image: np.ndarray
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @classmethod
    def join(cls, parts: Iterable["Lengths"]) -> "Lengths":
        """The rows of several counts, one after the other."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    @property
    def before_response(self) -> np.ndarray:
        """Tokens in front of either response, (N,)."""
        return self.image + self.prompt

    @property
    def total(self) -> np.ndarray:
        """Tokens of the longer of a row's two sequences, (N,): the `max_length` that holds the row whole."""
        return self.before_response + np.maximum(self.chosen, self.rejected)


def measure_rows(
    dataset: Dataset, processor: ProcessorMixin, *, first_row: int = 0, disable_progress: bool = False
) -> Lengths:
    """Counts the tokens of rows that TRL's collator for vision preferences will make sequences of.

    Args:
        dataset: Columns `prompt`, `chosen` and `rejected`, conversational or not, and `images` or `image`. A stream
            cannot be counted before training: see `mpo.overlong.check_batch`.
        processor: Of the model that is to be trained.
        first_row: The number of the first row in messages, where this is a part of a data set.
        disable_progress: Shows no progress bar, as on all processes but the main one.

    Raises:
        InputError: A column is missing, a picture cannot be opened or is refused by the processor, or a prompt has
            more or fewer placeholders than pictures.
    """
    pictures, parts = _Pictures(processor), [np.empty((0, 4), dtype=np.int64)]
    with tqdm(total=len(dataset), desc="Counting tokens", unit=" rows", delay=5, disable=disable_progress) as bar:
        for number, rows in enumerate(_batches(dataset)):
            parts.append(np.array(_count_batch(rows, pictures, first_row=first_row + number * _ROWS_AT_A_TIME)))
            bar.update(len(rows))
    return Lengths(*np.concatenate(parts).T)


def measure_tokenized(dataset: Dataset) -> Lengths:
    """Counts the tokens of text rows that TRL has tokenized: columns `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    names = [f"{name}_ids" for name in _TEXTS]
    tables = dataset.select_columns(names).with_format("arrow").iter(batch_size=10_000)
    parts = [[pc.list_value_length(table[name]).to_numpy() for name in names] for table in tables]
    prompt, chosen, rejected = (np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True))
    return Lengths(np.zeros_like(prompt), prompt, chosen, rejected)


def label_of(row: int, identity: Row) -> str:
    """How a complaint names a row: by its number, and its `id` where there is one."""
    return f"{row} (id {identity['id']!r})" if identity.get("id") is not None else f"{row}"


def picture_size(picture: Any) -> Size:
    """Width and height of a picture as a processor gets it, read from the head of its file.

    Args:
        picture: What a row may hold: a Pillow image, an array, a path or URL, or what `datasets` stores:
            `{"bytes": ..., "path": ...}`.

    Raises:
        InputError: It cannot be opened.
    """
    if isinstance(picture, Image.Image):
        return picture.size
    if not isinstance(picture, (str, dict)):
        height, width = get_image_size(np.asarray(picture))
        return width, height
    path, content = (picture, None) if isinstance(picture, str) else (picture["path"], picture["bytes"])
    try:
        if content is None and not Path(path).is_file():
            return (load_image(path) if isinstance(picture, str) else ImageFeature().decode_example(picture)).size
        with Image.open(path if content is None else BytesIO(content)) as image:
            # PNG's own method would decode the picture, to look for EXIF data behind it
            orientation = Image.Image.getexif(image).get(_ORIENTATION)
            on_its_side = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # TIFF's size is the turned one
            return image.size[::-1] if on_its_side else image.size
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image {path!s:.200} cannot be opened ({error!s:.200}).") from error


def _batches(dataset: Dataset) -> Iterator[list[Row]]:
    """All rows, some hundred at a time: their texts, `id`, and under `pictures` a list of what nothing has decoded."""
    made_by_user = dataset.format["type"] == "custom"  # a transform, which decides about the columns
    texts = dataset if made_by_user else dataset.with_format(None)
    present = list(dataset[:1]) if made_by_user else dataset.column_names
    if missing := [name for name in _TEXTS if name not in present]:
        raise InputError(f"the data has no column {missing[0]!r}: preference rows have {', '.join(_TEXTS)}.")
    column = next((name for name in ("image", "images") if name in present), None)  # TRL's order
    names = [name for name in (*_TEXTS, "id", "chat_template_kwargs") if name in present]
    files = texts if made_by_user or not column else dataset.select_columns([column]).with_format("arrow")
    texts = texts if made_by_user else texts.select_columns(names)
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        columns = texts[part]
        found = (columns if files is texts else files[part])[column] if column else [None] * len(columns["prompt"])
        found = found.to_pylist() if hasattr(found, "to_pylist") else found
        rows = zip(*(columns[name] for name in names), found, strict=True)
        yield [dict(zip([*names, "pictures"], values, strict=True)) for values in rows]


def _count_batch(rows: Sequence[Row], pictures: "_Pictures", *, first_row: int) -> list[tuple[int, int, int, int]]:
    """The four lengths of each row; `first_row` is the number of the first."""
    texts, extra = [], []
    for number, row in enumerate(rows, first_row):
        try:
            found = row["pictures"] if isinstance(row["pictures"], list) else [row["pictures"]]
            sizes = [picture_size(picture) for picture in found if picture is not None]
            example = rendered(row, len(sizes), pictures.processor)
            prompt, num_hidden, num_image = pictures.expand(example["prompt"], sizes)
            texts += [prompt, *(pictures.expand(example[name], [])[0] for name in ("chosen", "rejected"))]
        except (ValueError, TemplateError) as error:
            raise InputError(f"row {label_of(number, row)}: {error}") from error
        extra.append((num_hidden, num_image))
    counts = iter(_count_tokens(pictures.processor, texts))
    return [
        (num_image, prompt + num_hidden - num_image, chosen, rejected)
        for (num_hidden, num_image), prompt, chosen, rejected in zip(extra, counts, counts, counts, strict=True)
    ]


def rendered(row: Row, num_pictures: int, processor: ProcessorMixin) -> Row:
    """Prompt and responses as the texts that TRL's collator makes of them."""
    texts = {name: row[name] for name in _TEXTS}
    if not is_conversational(texts):
        return texts
    messages = {name: prepare_multimodal_messages(value) for name, value in texts.items() if name != "prompt"}
    messages["prompt"] = prepare_multimodal_messages(texts["prompt"], images=[None] * num_pictures)
    return apply_chat_template({**messages, "chat_template_kwargs": row.get("chat_template_kwargs") or {}}, processor)


def _count_tokens(processor: ProcessorMixin, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, nothing added; what is there several times, as the prompt of many pairs, is read once."""
    distinct = list(dict.fromkeys(texts))
    ids = processor.tokenizer(distinct, add_special_tokens=False, return_attention_mask=False, verbose=False)
    counts = {text: len(row) for text, row in zip(distinct, ids["input_ids"], strict=True)}
    return [counts[text] for text in texts]


class _Expansion(NamedTuple):
    text: str  # what stands for one picture, each run of one token cut to a single one
    num_hidden: int  # tokens that this left out
    num_tokens: int  # of the whole


class _Pictures:
    """What a processor writes into a prompt in place of pictures, told from their sizes and remembered."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.token = getattr(processor, "image_token", None)
        self._repeated = {self.token, getattr(processor.tokenizer, "image_token", None)} - {None}
        self._known: dict[Any, _Expansion] = {}
        writes = getattr(type(processor), "replace_image_token", ProcessorMixin.replace_image_token)
        self._says_what_it_writes = writes is not ProcessorMixin.replace_image_token
        self._trusts_told = True
        if self._says_what_it_writes and len({self._told(size) for size in _PROBES}) == 1:
            # one count for all sizes may only not know of crops, as with Gemma3's pan and scan
            self._trusts_told = len({self._write(size, 1) for size in _PROBES}) == 1

    def expand(self, text: str, sizes: Sequence[Size]) -> tuple[str, int, int]:
        """A shorter text that lacks some tokens of the real one, how many, and how many stand for pictures.

        Raises:
            InputError: The processor refuses the pictures, or there are more or fewer placeholders.
        """
        if not self._says_what_it_writes:
            ids = self._process(text, sizes)["input_ids"][0] if sizes else ()
            num_hidden = len(ids) - _count_tokens(self.processor, [text])[0] if sizes else 0
            return text, num_hidden, num_hidden + len(sizes)
        first, *others = text.split(self.token)
        if len(others) != len(sizes):
            raise InputError(
                f"{self.token!r} stands {len(others)} times in a text with {len(sizes)} pictures. Where the content "
                "of a message is a string, TRL puts it in front itself: take it out of the text."
            )
        pieces = [self._expansion(size, len(sizes)) for size in sizes]
        text = first + "".join(piece.text + other for piece, other in zip(pieces, others, strict=True))
        return text, sum(piece.num_hidden for piece in pieces), sum(piece.num_tokens for piece in pieces)

    def _expansion(self, size: Size, num_pictures: int) -> _Expansion:
        """Of one of several pictures in a row: LLaVA-OneVision does not tile where there are several."""
        if (size, num_pictures) not in self._known:
            kind = (self._told(size) if self._trusts_told else size, num_pictures)
            if kind not in self._known:
                self._known[kind] = self._write(size, num_pictures)
            self._known[size, num_pictures] = self._known[kind]
        return self._known[size, num_pictures]

    def _told(self, size: Size) -> Any:
        """What the processor itself tells of a size without a picture, the size where it tells nothing.

        The count is not always the true one (several pictures, line breaks), but the same for sizes that are alike.
        """
        width, height = size
        try:
            told = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        except (AttributeError, TypeError, ValueError):  # not every family has it, or has all that it asks for
            return size
        return "told", told.num_image_tokens[0], told.num_image_patches[0]

    def _write(self, size: Size, num_pictures: int) -> _Expansion:
        prompt = self.token * num_pictures
        out = self._process(prompt, [size] * num_pictures, return_text_replacement_offsets=True)
        text, num_hidden = out["text_replacement_offsets"][0][0]["replacement"], 0
        for token in self._repeated:
            others_and_runs = re.split(f"((?:{re.escape(token)})+)", text)
            text = token.join(others_and_runs[::2])
            num_hidden += sum(len(run) // len(token) - 1 for run in others_and_runs[1::2])
        return _Expansion(text, num_hidden, num_hidden + _count_tokens(self.processor, [text])[0])

    def _process(self, prompt: str, sizes: Sequence[Size], **options: Any) -> Any:
        blanks = [Image.new("RGB", size) for size in sizes]
        try:
            return self.processor(images=[blanks], text=[prompt], add_special_tokens=False, **options)
        except ValueError as error:
            listed = ", ".join(f"{width} x {height}" for width, height in sizes)
            raise InputError(f"the processor refuses pictures of {listed} pixels ({error!s:.200}).") from error
