"""Reference log-probabilities of a data set, computed once and kept on disk.

The reference model never changes, so what it says of a response has to be computed once for all epochs, runs and
ranks, and no second model stays in memory. An entry is a folder of JSONL shards, one line per row of the data set,
bound to the content of everything that the numbers depend on: model, data, processor and settings. The content counts
and not where it lies, so an entry that was computed on another machine can be copied and used.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed
from trl.trainer.utils import use_adapter

from data_builders.records import InputError, Row
from data_builders.shards import SETTINGS_FILE, claim_folder, read_rows, write_rows
from mpo.scores import REF_COLUMNS, labels_of, model_inputs, num_counted, sequence_logps

_USED_COLUMNS = (
    *("prompt", "chosen", "rejected", "image", "images", "tools", "chat_template_kwargs"),
    *("prompt_ids", "chosen_ids", "rejected_ids"),
)
_ROWS_PER_SHARD = 1000
_END = 65_536  # bytes read of each end of a picture's file to tell whether it is still the same one

logger = logging.getLogger(__name__)


class CachesItsReference:
    """For `trl.DPOTrainer`: `precompute_ref_log_probs` on disk, for pictures too; sums in float32."""

    _reference_digest: str | None = None

    @torch.no_grad()
    def compute_ref_log_probs(self, model: Any, inputs: Row) -> tuple[Tensor, Tensor]:
        """TRL's seam for the reference: its own model, or the policy with its adapter off or as it was at the start.

        Returns:
            Summed log-probabilities of the chosen and of the rejected responses in float32, (B,) each.
        """
        adapter = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        mask = inputs["completion_mask"][:, 1:]
        with checkpointing, adapter, self.accelerator.autocast():
            token_logps = model(**model_inputs(inputs), labels=labels_of(inputs), fused_lm_head=True).log_probs
        return sequence_logps(token_logps[:, -mask.size(1) :], mask, self.ld_alpha).chunk(2)

    def reference_root(self) -> Path:
        """The folder that holds all entries: beside what `datasets` keeps, unless another one is named."""
        if self.args.ref_logps_dir:
            return Path(self.args.ref_logps_dir)
        return Path(datasets.config.HF_DATASETS_CACHE) / "mpo_ref_logps"

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's seam for the reference pass over a data set."""
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # says why it cannot be
        if set(REF_COLUMNS) <= set(dataset.column_names):
            return dataset
        self._put_liger_in()
        cache = ReferenceCache(self.reference_root(), self._reference_parts(dataset), len(dataset))
        is_gone = self.ref_model is None and not is_peft_model(self.model) and self.state.global_step > 0
        if is_gone and cache.missing():
            raise ValueError(
                f"the reference log-probabilities of the {name} data cannot be computed any more: with "
                "`precompute_ref_log_probs=True` no reference model is kept once training has started. Pass this data "
                "set as `eval_dataset` when the trainer is made, or set `precompute_ref_log_probs=False`."
            )
        columns = fill(
            cache,
            dataset,
            self._reference_of,
            accelerator=self.accelerator,
            name=name,
            batch_size=batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _reference_of(self, batch: Row) -> tuple[Tensor, ...]:
        """Log-probabilities of the pairs of a batch that count."""
        counted = num_counted(batch)
        return tuple(half[:counted] for half in self.compute_ref_log_probs(self._reference_model(), batch))

    def _reference_model(self) -> Any:
        if self.ref_model is not None or not self.is_deepspeed_enabled:
            return self.ref_model or self.model
        if self._precompute_engine is None:  # before training, DeepSpeed has not placed or gathered the policy yet
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        return self._precompute_engine

    def _reference_parts(self, dataset: Dataset) -> Row:
        """All that the reference's numbers for a data set depend on."""
        if self._reference_digest is None:
            self._reference_digest = model_digest(self.ref_model or self.model)
        settings = ("max_length", "truncation_mode", "ld_alpha", "bf16", "fp16", "use_liger")
        return {
            "reference_model": self._reference_digest,
            "data_set": data_digest(dataset),
            "processor": processor_digest(self.processing_class),
            **{name: getattr(self.args, name) for name in settings},
        }


class ReferenceCache:
    """One entry: the log-probabilities of every row of one data set under one reference.

    Args:
        root: The folder that holds all entries.
        parts: What the numbers depend on, as digests and plain values; the entry is named after it.
        num_rows: Rows of the data set.
    """

    def __init__(self, root: Path, parts: Row, num_rows: int) -> None:
        self.root, self.parts, self.num_rows = root, parts, num_rows
        self.folder = root / _digest(json.dumps(parts, sort_keys=True).encode())[:16]
        self._pending: list[Row] = []
        self._waiting = self._missing_shards()

    def missing(self) -> list[int]:
        """The rows that have no numbers yet, in order: those of whole shards."""
        return [row for shard in self._missing_shards() for row in self._rows_of(shard)]

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Takes the numbers of the next missing rows, and writes every shard that is whole."""
        self._pending += [
            dict(zip(REF_COLUMNS, row, strict=True)) for row in zip(chosen.tolist(), rejected.tolist(), strict=True)
        ]
        while self._waiting and len(self._pending) >= len(self._rows_of(self._waiting[0])):
            shard = self._waiting.pop(0)
            size = len(self._rows_of(shard))
            claim_folder(self.folder, {**self.parts, "rows": self.num_rows})
            write_rows(self._path(shard), self._pending[:size])
            self._pending = self._pending[size:]

    def columns(self) -> dict[str, list[float]]:
        """All numbers, one list per column of `REF_COLUMNS`.

        Raises:
            InputError: A shard does not hold what it should.
        """
        rows = [row for shard in self._shards() for row in read_rows(self._path(shard))]
        if len(rows) != self.num_rows or any(set(row) != set(REF_COLUMNS) for row in rows):
            raise InputError(
                f"{self.folder} holds {len(rows)} rows of reference log-probabilities for {self.num_rows} rows of "
                "data: a file was changed by hand. Delete the folder; it is computed again."
            )
        return {name: [row[name] for row in rows] for name in REF_COLUMNS}

    def relatives(self) -> list[str]:
        """What keeps other entries of this root from being used, when they differ in one thing: one line each."""
        lines = []
        for path in sorted(self.root.glob(f"*/{SETTINGS_FILE}")):
            other = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name, value in self.parts.items() if other.get(name) != value]
            if len(differing) == 1:
                lines.append(f"{path.parent} has another {differing[0].replace('_', ' ')}")
        return lines

    def _shards(self) -> range:
        return range(-(-self.num_rows // _ROWS_PER_SHARD))

    def _missing_shards(self) -> list[int]:
        return [shard for shard in self._shards() if not self._path(shard).exists()]

    def _rows_of(self, shard: int) -> range:
        return range(shard * _ROWS_PER_SHARD, min((shard + 1) * _ROWS_PER_SHARD, self.num_rows))

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.jsonl"


def fill(
    cache: ReferenceCache,
    dataset: Dataset,
    score: Callable[[Any], tuple[Tensor, ...]],
    *,
    accelerator: Accelerator,
    name: str,
    **loader_settings: Any,
) -> dict[str, list[float]]:
    """Computes what an entry lacks, over all ranks, and gives its columns to every rank.

    Only the first rank reads and writes files, so the others need not share a file system with it.

    Args:
        cache: The entry.
        dataset: The rows, in the entry's order.
        score: A batch to the summed reference log-probabilities of its chosen and rejected responses, (B,) each.
        accelerator: What distributes batches over ranks.
        name: Of the data set, for the progress bar.
        **loader_settings: Of `torch.utils.data.DataLoader`: batch size and collator at least.

    Returns:
        One list per column of `REF_COLUMNS`, in the order of the data set.
    """
    main = accelerator.is_main_process
    (missing,) = broadcast_object_list([cache.missing() if main else None])
    if missing and main:
        for line in cache.relatives():
            logger.warning("reference log-probabilities of the %s data are computed anew: %s.", name, line)
    if missing:
        rows = dataset if len(missing) == len(dataset) else dataset.select(missing)
        loader = accelerator.prepare_data_loader(DataLoader(rows, shuffle=False, **loader_settings))
        for batch in tqdm(loader, desc=f"Reference log-probs of {name} data", disable=not main):
            chosen, rejected = accelerator.gather_for_metrics(score(batch))
            if main:
                cache.add(chosen, rejected)
    (columns,) = broadcast_object_list([cache.columns() if main else None])
    return columns


def model_digest(model: nn.Module) -> str:
    """Names the weights and the architecture of a reference, wherever they were loaded from.

    Adapters do not count, but for one named "ref": TRL's copy of an adapter as it was before training. Parameters
    that DeepSpeed has sharded are gathered one after the other, so all ranks must call this together.
    """
    trained = set(getattr(model, "peft_config", {})) - {"ref"}
    digest = hashlib.sha256(json.dumps(_architecture(model.config), sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        if trained.isdisjoint(name.split(".")):
            with _whole(parameter):
                values = parameter.detach().cpu().contiguous().flatten()
                digest.update(f"{name} {values.dtype} {tuple(parameter.shape)}".encode())
                digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def data_digest(dataset: Dataset) -> str:
    """Names the content of the columns that training uses: texts whole, pictures by size and both ends of the file."""
    used = [name for name in _USED_COLUMNS if name in dataset.column_names]
    digest = hashlib.sha256()
    for table in dataset.select_columns(used).with_format("arrow").iter(batch_size=_ROWS_PER_SHARD):
        for row in table.to_pylist():
            pictures = row.pop("images", None) or [row.pop("image", None)]
            digest.update(json.dumps([row, [_picture_digest(p) for p in pictures]], default=str).encode())
    return digest.hexdigest()[:16]


def processor_digest(processor: Any) -> str:
    """Names how texts become tokens and pictures become pixels."""
    tokenizer = getattr(processor, "tokenizer", processor)
    settings = {} if tokenizer is processor else processor.to_dict()
    content = [getattr(tokenizer, "backend_tokenizer", None), tokenizer.chat_template, _without_names(settings)]
    content[0] = content[0].to_str() if content[0] is not None else sorted(tokenizer.get_vocab().items())
    content.append(getattr(processor, "chat_template", None))
    return _digest(json.dumps(content, sort_keys=True, default=str).encode())[:16]


def _architecture(config: Any) -> Row:
    return _without_names(config.to_dict())


def _without_names(value: Any) -> Any:
    """Settings without what changes when a folder is moved, a library updated or a trainer built."""
    left_out = {"_name_or_path", "name_or_path", "transformers_version", "processor_class", "auto_map", "dtype"}
    left_out |= {"pad_token_id", "use_cache"}
    if isinstance(value, dict):
        return {str(key): _without_names(item) for key, item in value.items() if key not in left_out}
    return value


def _picture_digest(picture: Any) -> str | None:
    """Of one picture as `datasets` stores it: bytes, or the path of a file."""
    if isinstance(picture, dict) and picture.get("bytes") is not None:
        return _digest(picture["bytes"])
    path = picture.get("path") if isinstance(picture, dict) else picture
    if path is None or not Path(path).is_file():
        return path
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(_END)
        file.seek(max(_END, size - _END))
        return _digest(head + file.read() + str(size).encode())


def _whole(parameter: Tensor) -> AbstractContextManager:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
