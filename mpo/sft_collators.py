"""Micro-batches of conversations, padded row by row, or packed: one after the other in as few rows as hold them.

A packed batch is a forest whose trees have one branch each (`mpo.forest`), so that no row sees another one and every
family that takes forests takes it, pictures and all. Both kinds hold the same tokens: a row is tokenized in pieces
(`mpo.segments`), which say what is learned.

Shapes: N rows, L tokens in the longest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from datasets import Image as ImageFeature
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from data_builders.records import InputError, Row
from mpo import forest
from mpo.forest_collators import forest_batch, token_types, tree_starts
from mpo.processed import Processed, decoded, joined, process
from mpo.segments import Segmenter


@dataclass(frozen=True)
class _Learned:
    """A row as tokens, with what is learned of it and what the model is given of its pictures."""

    tokens: Processed
    learned: list[bool]
    given: list[dict[str, Tensor]]

    def cut(self, length: int) -> "_Learned":
        types = {name: values[:length] for name, values in self.tokens.types.items()}
        return _Learned(Processed(self.tokens.ids[:length], types), self.learned[:length], self.given)


@dataclass
class ConversationCollator:
    """Rows of TRL's SFT formats as a batch with `completion_mask`, 1 where a token is learned, (N, L).

    Attributes:
        segmenter: Says what is learned.
        packed: Whether rows are packed.
        max_length: Where rows are cut; None: nowhere. A cut through pictures, or of all that is learned, is an error.
        max_forest_tokens: Packed: tokens of a row of the batch, at most. None: one row holds all.
        multiple_of: Rows are filled up to a multiple of it.
        image_token_id: Of the token that stands for a piece of a picture; it is never learned.
        stand_in: A picture: a batch without any gets a row with it that counts nowhere, which ranks that share one
            sharded model need to run the same modules. None: no row is added.
    """

    segmenter: Segmenter
    packed: bool = False
    max_length: int | None = None
    max_forest_tokens: int | None = None
    multiple_of: int = 1
    image_token_id: int | None = None
    stand_in: Image | None = None
    decoder: ImageFeature = field(default_factory=lambda: ImageFeature(mode="RGB"))

    def __call__(self, examples: Sequence[Row]) -> dict[str, Tensor]:
        """Collates N rows."""
        rows = [self._fitted(self._tokenized(row), row) for row in examples]
        if self.stand_in is not None and not any(row.given for row in rows):
            rows.append(self._standing_in())
        return self._pack(rows) if self.packed else self._pad(rows)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        processor = self.segmenter.processor
        return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor

    def _tokenized(self, row: Row) -> _Learned:
        if row.get("input_ids") is not None:
            return _Learned(Processed(list(row["input_ids"]), {}), self._marked(row), [])
        found = row.get("images") if row.get("image") is None else [row["image"]]
        pictures = [decoded(picture, self.decoder) for picture in found or []]
        remaining = iter(pictures)
        pieces, given = [], []
        for segment in self.segmenter(row, len(pictures)):
            shown = list(islice(remaining, segment.num_pictures))
            if shown:
                tokens, of_pictures = process(self.segmenter.processor, segment.text, shown)
                given.append(of_pictures)
            else:
                tokens = Processed(self._tokenizer(segment.text, add_special_tokens=False)["input_ids"], {})
            pieces.append((tokens, segment.is_learned))
        return _Learned(_chained([tokens for tokens, _ in pieces]), self._learned(pieces), given)

    def _marked(self, row: Row) -> list[bool]:
        """What is learned of a row that is tokenized already, as TRL takes its columns."""
        if row.get("labels") is not None:
            return [label != forest.NO_LABEL for label in row["labels"]]
        names = ("completion_mask", "assistant_masks") if self.segmenter.completion_only else ("assistant_masks",)
        masks = [row[name] for name in names if row.get(name) is not None]
        return [all(bits) for bits in zip(*masks, strict=True)] if masks else [True] * len(row["input_ids"])

    def _learned(self, pieces: Sequence[tuple[Processed, bool]]) -> list[bool]:
        return [is_learned and id != self.image_token_id for tokens, is_learned in pieces for id in tokens.ids]

    def _fitted(self, row: _Learned, given: Row) -> _Learned:
        if not any(row.learned[1:]):
            raise InputError(f"{_label(given)} has nothing to learn: its answer is empty. Take it out of the data.")
        if self.max_length is None or len(row.learned) <= self.max_length:
            return row
        ids, first = row.tokens.ids, row.learned.index(True, 1)
        cuts_picture = self.image_token_id in ids[self.max_length :]
        if cuts_picture or first >= self.max_length:
            what = "cut its pictures" if cuts_picture else "leave nothing of its answer"
            image = ids.count(self.image_token_id)
            raise InputError(
                f"{_label(given)} has {len(ids):,} tokens, {image:,} of them of pictures, and `max_length="
                f"{self.max_length}` would {what}. Set `max_length` to at least "
                f"{max(first + 1, _end_of(ids, self.image_token_id)):,} ({len(ids):,} cuts nothing), or make pictures "
                "smaller or their tiles fewer."
            )
        return row.cut(self.max_length)

    def _standing_in(self) -> _Learned:
        row = self._tokenized({"images": [self.stand_in], "messages": [{"role": "user", "content": "."}, _SILENCE]})
        return _Learned(row.tokens, [False] * len(row.learned), row.given)

    def _pad(self, rows: Sequence[_Learned]) -> dict[str, Tensor]:
        length = max(len(row.learned) for row in rows)
        length = -(-length // self.multiple_of) * self.multiple_of

        def padded(values: Sequence[Sequence[Any]], fill: int = 0) -> Tensor:
            return torch.tensor([[*value, *[fill] * (length - len(value))] for value in values], dtype=torch.long)

        batch = {
            "completion_mask": padded([row.learned for row in rows]),
            "input_ids": padded([row.tokens.ids for row in rows], self._tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row.learned) for row in rows]),
        }
        for name in {name: None for row in rows for name in row.tokens.types}:
            batch[name] = padded([row.tokens.types.get(name, []) for row in rows])
        given = [of_pictures for row in rows for of_pictures in row.given]
        return batch | (joined(given) if given else {})

    def _pack(self, rows: Sequence[_Learned]) -> dict[str, Tensor]:
        starts = [row.learned.index(True, 1) if any(row.learned[1:]) else len(row.learned) - 1 for row in rows]
        sequences = [
            forest.Sequence(number, row.tokens.ids[:start], row.tokens.ids[start:], self._num_fixed(row))
            for number, (row, start) in enumerate(zip(rows, starts, strict=True))
        ]
        one_row = sum(len(row.learned) for row in rows)
        size = {"max_tokens": self.max_forest_tokens or one_row, "multiple_of": self.multiple_of}
        laid_out = forest.build_forest(sequences, pad_id=self._tokenizer.pad_token_id, **size)
        learned = [torch.tensor(row.learned[start:]) for row, start in zip(rows, starts, strict=True)]
        learned = pad_sequence(learned, batch_first=True)  # (N, T)
        laid_out.shift_labels.view(-1)[laid_out.places[laid_out.mask & ~learned]] = forest.NO_LABEL
        laid_out = laid_out._replace(mask=laid_out.mask & learned)
        whole, bare = [row.tokens for row in rows], [sequence._replace(response=[]) for sequence in sequences]
        batch = forest_batch(laid_out, sequences) | token_types(laid_out, bare, whole)
        if any(row.given for row in rows):
            batch |= joined([of_pictures for root in laid_out.roots for of_pictures in rows[root].given])
            batch |= tree_starts(laid_out, sequences, whole)
        return batch

    def _num_fixed(self, row: _Learned) -> int:
        """Tokens through the last one of a picture."""
        return _end_of(row.tokens.ids, self.image_token_id) if row.given else 0


_SILENCE = {"role": "assistant", "content": "."}


def _chained(pieces: Sequence[Processed]) -> Processed:
    names = {name: None for piece in pieces for name in piece.types}
    types = {
        name: [value for piece in pieces for value in piece.types.get(name, [0] * len(piece.ids))] for name in names
    }
    return Processed([id for piece in pieces for id in piece.ids], types)


def _end_of(ids: Sequence[int], token: int | None) -> int:
    """Behind the last place of a token; 0 without any."""
    return max((place + 1 for place, id in enumerate(ids) if id == token), default=0)


def _label(row: Row) -> str:
    """What a complaint calls a row: its id, or how it begins."""
    if row.get("id") is not None:
        return f"row {row['id']!r}"
    said = next((row[name] for name in ("messages", "prompt", "text") if row.get(name)), "?")
    return f"the row {said!s:.120}"
