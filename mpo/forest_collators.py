"""Micro-batches of ordinary preference rows as forests: every shared prefix once, every picture once.

The batches hold what `mpo.forest_inputs` makes a model's inputs of, and what the trainer reads log-probabilities from:
`places` and `completion_mask`, one row per response, the chosen ones first.

Shapes: B pairs, R rows, L tokens in the longest row, T tokens in the longest response, M trees, F tokens in the
longest start of a tree (through its last picture).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Image as ImageFeature
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from mpo import forest
from mpo.lengths import rendered
from mpo.overlong import check_batch
from mpo.processed import Processed, decoded, joined, process, stored
from mpo.scores import REF_COLUMNS


@dataclass
class TextForestCollator:
    """Rows that TRL has tokenized (`prompt_ids`, `chosen_ids`, `rejected_ids`) as a forest.

    Attributes:
        pad_token_id: Fills rows up.
        max_length: Where sequences are cut; None: nowhere.
        truncation_mode: Which end of a sequence stays, as in TRL.
        max_forest_tokens: How long a row of trees may be; None: as long as the largest tree.
        multiple_of: Rows are filled up to a multiple of it.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    max_forest_tokens: int | None = None
    multiple_of: int = 1

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates B rows."""
        whole = [
            forest.Sequence((), row["prompt_ids"], row[name])
            for name in ("chosen_ids", "rejected_ids")
            for row in examples
        ]
        _check_cut(whole, self.max_length if self.truncation_mode == "keep_start" else None, None)
        sequences = [forest.Sequence((), *self._cut(sequence.prompt, sequence.response)) for sequence in whole]
        size = {"max_tokens": self.max_forest_tokens, "multiple_of": self.multiple_of}
        laid_out = forest.build_forest(sequences, pad_id=self.pad_token_id, **size)
        return forest_batch(laid_out, sequences) | _references(examples)

    def _cut(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        if self.max_length is not None and self.truncation_mode == "keep_start":
            response = response[: self.max_length - len(prompt)]
        elif self.max_length is not None:
            left_out = max(0, len(prompt) + len(response) - self.max_length)
            prompt, response = prompt[left_out:], response[max(0, left_out - len(prompt)) :]
        return (prompt, response) if prompt else (response[:1], response[1:])  # nothing scores a row's first token


@dataclass
class ForestCollator:
    """Rows as `trl`'s vision collator takes them, as a forest; they may have the columns of `REF_COLUMNS`.

    Pictures are told apart by what they show and not by where they lie, and rows may hold them as `datasets` stores
    them (`{"bytes", "path"}`), so that a picture of many rows is decoded and processed once.

    Attributes:
        processor: Of the model.
        max_length: Where sequences are cut; None: nowhere. A cut through pictures or a whole response is an error.
        max_forest_tokens: How long a row of trees may be; None: as long as the largest tree.
        multiple_of: Rows are filled up to a multiple of it.
        image_token_id: Of the token that stands for a piece of a picture (`model.config.image_token_id`).
        stand_in: A picture of the data set: a batch without any gets a tree with it that counts nowhere, which ranks
            that share one sharded model need to run the same modules. None: no tree is added.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    max_forest_tokens: int | None = None
    multiple_of: int = 1
    image_token_id: int | None = None
    stand_in: Image | None = None
    decoder: ImageFeature = field(default_factory=lambda: ImageFeature(mode="RGB"))

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates B rows."""
        pictures = _Pictures(self.decoder)
        keys = [pictures.keys_of(row) for row in examples]
        if self.stand_in is not None and not any(keys):
            return self._with_stand_in(examples)
        texts = [rendered(row, len(key), self.processor) for row, key in zip(examples, keys, strict=True)]
        prompts, given = self._prompts([text["prompt"] for text in texts], keys, pictures)
        responses = self._responses([text[name] for name in ("chosen", "rejected") for text in texts])
        sequences = [
            forest.Sequence(key, prompt.ids, response, self._num_fixed(prompt.ids) if key else 0)
            for key, prompt, response in zip(keys * 2, prompts * 2, responses, strict=True)
        ]
        names = [repr(text["prompt"][:80]) for text in texts]
        _check_cut(sequences, self.max_length, self.image_token_id, names)
        if self.max_length is not None:
            sequences = [s._replace(response=s.response[: self.max_length - len(s.prompt)]) for s in sequences]
        size = {"max_tokens": self.max_forest_tokens, "multiple_of": self.multiple_of}
        laid_out = forest.build_forest(sequences, pad_id=self.processor.tokenizer.pad_token_id, **size)
        batch = forest_batch(laid_out, sequences) | _references(examples)
        batch |= token_types(laid_out, sequences, prompts * 2)
        if any(keys):
            batch |= joined([given[sequences[root].images] for root in laid_out.roots if sequences[root].images])
            batch |= tree_starts(laid_out, sequences, prompts * 2)
        return batch

    def _with_stand_in(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        row = {name: [{"role": role, "content": "."}] for name, role in _ROLES.items()}
        column = {"image": self.stand_in} if "image" in examples[0] else {"images": [self.stand_in]}
        batch = self([*examples, {**row, **column, **dict.fromkeys(REF_COLUMNS, 0.0)}])
        size = len(examples)
        for name in ("completion_mask", "places", "lengths"):
            batch[name] = torch.cat([batch[name][:size], batch[name][size + 1 : -1]])
        return batch | _references(examples)

    def _prompts(
        self, texts: Sequence[str], keys: Sequence[tuple[str, ...]], pictures: "_Pictures"
    ) -> tuple[list[Processed], dict[tuple[str, ...], dict[str, Tensor]]]:
        """Each distinct prompt once, and what the processor gives the model of each distinct set of pictures."""
        known: dict[Any, Processed] = {}
        first: dict[tuple[str, ...], Processed] = {}
        given: dict[tuple[str, ...], dict[str, Tensor]] = {}
        for text, key in zip(texts, keys, strict=True):
            if (text, key) in known:
                continue
            known[text, key] = self._reworded(text, first[key]) if key in first else None
            if known[text, key] is None:
                images = [pictures.picture(name) for name in key]
                known[text, key], given[key] = process(self.processor, text, images)
                first[key] = known[text, key]
        return [known[text, key] for text, key in zip(texts, keys, strict=True)], given

    def _reworded(self, text: str, like: Processed) -> Processed | None:
        """Another prompt with the same pictures, without processing them again; None where that cannot be done."""
        if like.pieces is None:
            return None
        start, *others = text.split(self.processor.image_token)
        if len(others) != len(like.pieces):
            return None
        whole = start + "".join(piece + other for piece, other in zip(like.pieces, others, strict=True))
        ids = self.processor.tokenizer(whole, add_special_tokens=False)["input_ids"]
        types = {}
        for name, values in like.types.items():
            of_token = {token: value for token, value in zip(like.ids, values, strict=True) if value}
            types[name] = [of_token.get(token, 0) for token in ids]
        return Processed(ids, types, like.pieces)

    def _responses(self, texts: Sequence[str]) -> list[list[int]]:
        distinct = list(dict.fromkeys(texts))
        ids = self.processor.tokenizer(distinct, add_special_tokens=False)["input_ids"]
        known = dict(zip(distinct, ids, strict=True))
        return [known[text] for text in texts]

    def _num_fixed(self, ids: list[int]) -> int:
        """Tokens through the last one of a picture, or of anything: without its id nothing may be told apart."""
        if self.image_token_id is None:
            return len(ids) - 1
        return int(np.flatnonzero(np.asarray(ids) == self.image_token_id)[-1]) + 1


_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


class _Pictures:
    """The pictures of a batch, by what they show."""

    def __init__(self, decoder: ImageFeature) -> None:
        self._decoder = decoder
        self._by_key: dict[str, Image] = {}
        self._by_place: dict[Any, str] = {}

    def keys_of(self, row: dict[str, Any]) -> tuple[str, ...]:
        """What the pictures of a row show, in their order."""
        found = row.get("images") if row.get("image") is None else [row["image"]]
        return tuple(self._key(picture) for picture in found or [])

    def picture(self, key: str) -> Image:
        """The picture itself."""
        return self._by_key[key]

    def _key(self, picture: Any) -> str:
        place = _place(picture) if isinstance(picture, (dict, str)) else id(picture)
        if place not in self._by_place:
            image = decoded(picture, self._decoder)
            content = f"{image.mode} {image.size}".encode() + image.tobytes()
            key = hashlib.blake2b(content, digest_size=16).hexdigest()
            self._by_place[place] = key
            self._by_key.setdefault(key, image)
        return self._by_place[place]


def _place(picture: Any) -> Any:
    found = stored(picture)
    return found["path"] if found.get("bytes") is None else hashlib.blake2b(found["bytes"]).digest()


def _check_cut(
    sequences: Sequence[forest.Sequence],
    max_length: int | None,
    image_token_id: int | None,
    names: Sequence[str] | None = None,
) -> None:
    """Refuses what a cut would leave no whole picture or no response of."""
    if all(sequence.response for sequence in sequences) and (
        max_length is None or all(len(sequence.prompt) < max_length for sequence in sequences)
    ):
        return
    ids = [torch.tensor([*sequence.prompt, *sequence.response]) for sequence in sequences]
    masks = [torch.tensor([0] * len(s.prompt) + [1] * len(s.response)) for s in sequences]
    check_batch(
        pad_sequence(ids, batch_first=True),
        pad_sequence(masks, batch_first=True),
        max_length=max_length,
        image_token_id=image_token_id,
        names=names,
    )


def forest_batch(laid_out: forest.Forest, sequences: Sequence[forest.Sequence]) -> dict[str, Tensor]:
    """What every forest has; `completion_mask` first and with a column in front, as in a batch of plain rows."""
    return {
        "completion_mask": torch.nn.functional.pad(laid_out.mask.long(), (1, 0)),  # (2B, 1 + T)
        "places": laid_out.places,  # (2B, T)
        "lengths": torch.tensor([len(s.prompt) + len(s.response) for s in sequences]),  # (2B,)
        "input_ids": laid_out.input_ids,  # (R, L), as all that follow
        "positions": laid_out.positions,
        "last": laid_out.last,
        "shift_labels": laid_out.shift_labels,
        "tree": laid_out.tree,
    }


def _references(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    given = [name for name in REF_COLUMNS if name in examples[0]]
    return {name: torch.tensor([row[name] for row in examples], dtype=torch.float32) for name in given}


def token_types(
    laid_out: forest.Forest, sequences: Sequence[forest.Sequence], prompts: Sequence[Processed]
) -> dict[str, Tensor]:
    """Token types, (R, L): those of prompts, and 0 in responses and padding."""
    batch = {}
    for name in {name: None for prompt in prompts for name in prompt.types}:
        rows = [
            torch.tensor(prompt.types.get(name, [0] * len(prompt.ids)) + [0] * len(sequence.response))
            for prompt, sequence in zip(prompts, sequences, strict=True)
        ]
        table = pad_sequence(rows, batch_first=True)  # (2B, prompt + response)
        batch[name] = table[laid_out.source[..., 0], laid_out.source[..., 1]] * laid_out.is_token
    return batch


def tree_starts(
    laid_out: forest.Forest, sequences: Sequence[forest.Sequence], prompts: Sequence[Processed]
) -> dict[str, Tensor]:
    """The start of each tree through its last picture, (M, F), for families whose positions depend on pictures."""
    if not any("mm_token_type_ids" in prompt.types for prompt in prompts):
        return {}
    starts = [(prompts[root], sequences[root].num_fixed) for root in laid_out.roots]
    columns = {
        "root_ids": [prompt.ids[:fixed] for prompt, fixed in starts],
        "root_mask": [[1] * fixed for _, fixed in starts],
        "root_mm_token_type_ids": [
            prompt.types["mm_token_type_ids"][:fixed] if fixed else [] for prompt, fixed in starts
        ],
    }
    return {
        name: pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
        for name, rows in columns.items()
    }
