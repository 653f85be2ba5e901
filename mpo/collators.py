"""Batches of preference rows with pictures: TRL's collator, with what several ranks and a cached reference need."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from PIL.Image import Image
from transformers import TrainingArguments
from trl import DPOConfig
from trl.data_utils import is_conversational
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from mpo.lengths import rendered
from mpo.overlong import check_batch
from mpo.scores import NUM_PAIRS, REF_COLUMNS

_PER_TOKEN = {"input_ids", "attention_mask", "completion_mask", "token_type_ids", "mm_token_type_ids"}


@dataclass
class PreferenceCollator(DataCollatorForVisionPreference):
    """`trl`'s vision collator for rows that may have the columns of `REF_COLUMNS`, one number each.

    The batch then holds them as float32 tensors, (B,). Rows are cut at `max_length` only where that leaves pictures
    whole and something of each response.

    Attributes:
        image_token_id: Of the token that stands for a piece of a picture, for the complaint about a cut.
        stand_in: A picture of the data set. A batch without any then gets a pair with this one, and says in
            `NUM_PAIRS` that it does not count. Ranks that share one sharded model have to run the same modules: where
            one leaves out the vision tower, ZeRO-2 aborts and ZeRO-3 waits for ever. None: no pair is added.
    """

    image_token_id: int | None = None
    stand_in: Image | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates B rows."""
        rows = [{key: value for key, value in row.items() if key not in REF_COLUMNS} for row in examples]
        for row in rows:
            if "images" in row:
                row["images"] = row["images"] or []  # where a data set has null
        lacks = self.stand_in is not None and not any(row.get("images") or row.get("image") for row in rows)
        batch = self._cut(self._whole([*rows, self._picture_row(rows[0])] if lacks else rows))
        if lacks:
            batch[NUM_PAIRS] = len(rows)
            batch["completion_mask"][[len(rows), -1]] = 0
        for name in REF_COLUMNS:
            if name in examples[0]:
                numbers = [row[name] for row in examples] + [0.0] * lacks
                batch[name] = torch.tensor(numbers, dtype=torch.float32)
        return batch

    def _whole(self, rows: list[dict[str, Any]]) -> Any:
        max_length, self.max_length = self.max_length, None
        try:
            return super().torch_call(rows)
        finally:
            self.max_length = max_length

    def _cut(self, batch: Any) -> Any:
        if self.max_length is not None:
            limits = {"max_length": self.max_length, "image_token_id": self.image_token_id}
            check_batch(batch["input_ids"], batch["completion_mask"], **limits)
            for name in _PER_TOKEN & batch.keys():
                batch[name] = batch[name][:, : self.max_length]
        return batch

    def _picture_row(self, like: dict[str, Any]) -> dict[str, Any]:
        """A row with the stand-in and next to no text, in the form of another row."""
        row = {"prompt": [{"role": "user", "content": "."}]}
        row |= {name: [{"role": "assistant", "content": "."}] for name in ("chosen", "rejected")}
        if not is_conversational(like):
            row = rendered(row, 1, self.processor)
        return {**row, **({"image": self.stand_in} if "image" in like else {"images": [self.stand_in]})}


def has_pictures(dataset: Any) -> bool:
    """Whether a data set (or stream) has a column of pictures; what is neither has none."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    names = dataset.column_names or next(iter(dataset), {}).keys()
    return not {"image", "images"}.isdisjoint(names)


def picture_collator(processor: Any, args: DPOConfig, dataset: Any) -> PreferenceCollator:
    """The collator for a data set with pictures, with TRL's choice of padding token.

    Raises:
        ValueError: The padding token is not in the vocabulary.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token not in tokenizer.get_vocab():
        raise ValueError(f"`pad_token` {tokenizer.pad_token!r} is not in the vocabulary of the tokenizer.")
    return PreferenceCollator(
        processor=processor,
        max_length=args.max_length,
        pad_to_multiple_of=args.pad_to_multiple_of,
        stand_in=stand_in(args, dataset),
    )


def stand_in(args: TrainingArguments, dataset: Any) -> Any:
    """A picture for batches without any, where several ranks share one model and so have to run the same modules.

    Returns:
        The first picture of the data set; None without any, and where every rank has the whole model.
    """
    fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if args.world_size == 1 or not (args.deepspeed_plugin or fsdp):
        return None
    pictures = ([row["image"]] if "image" in row else row["images"] for row in dataset)
    return next((found[0] for found in pictures if found and found[0] is not None), None)
