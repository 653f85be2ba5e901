"""Reference log-probabilities of a data set, computed once and kept on disk.

The reference model never changes, so what it says of a response has to be computed once for all epochs, runs and
ranks, and no second model stays in memory. An entry is a folder of JSONL shards, one line per row of the data set,
bound to the content of everything that the numbers depend on: model, data, processor and settings. The content counts
and not where it lies, so an entry that was computed on another machine can be copied and used.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model, send_to_device
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed
from trl.trainer.utils import use_adapter

from data_builders.records import InputError, Row
from data_builders.shards import SETTINGS_FILE, claim_folder, read_rows, write_rows
from mpo.drop_path import without_chance
from mpo.groups import question_keys
from mpo.models import base_of
from mpo.scores import REF_COLUMNS, num_counted, score_tokens, sequence_logps

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
        adapter, chance = nullcontext(), nullcontext()
        if self.ref_model is None:
            chance = without_chance(self.model)
            if is_peft_model(self.model):
                unwrapped = self.accelerator.unwrap_model(self.model)
                adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        base = base_of(self.accelerator.unwrap_model(model))
        with checkpointing, adapter, chance, self.accelerator.autocast():
            token_logps = score_tokens(model, base, inputs).logps
        return sequence_logps(token_logps, inputs["completion_mask"][:, 1:], self.ld_alpha).chunk(2)

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
        self._settle()
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
            self._for_collator(dataset),
            self._reference_of,
            accelerator=self.accelerator,
            name=name,
            batch_size=batch_size,
            by_question=self.shares_prefixes,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        joined = concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)  # which forgets transforms
        return joined.with_transform(transform) if (transform := _transform_of(dataset)) else joined

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
        self._pending: dict[int, Row] = {}

    def missing(self) -> list[int]:
        """The rows that have no numbers on disk yet."""
        found = {row["row"] for row in self._written()}
        return [row for row in range(self.num_rows) if row not in found]

    def add(self, rows: Sequence[int], chosen: Sequence[float], rejected: Sequence[float]) -> None:
        """Takes the numbers of some rows, in any order, and writes a shard when there are enough of them."""
        for row, *numbers in zip(rows, chosen, rejected, strict=True):
            self._pending[row] = {"row": row, **dict(zip(REF_COLUMNS, numbers, strict=True))}
        if len(self._pending) >= _ROWS_PER_SHARD:
            self.write()

    def write(self) -> None:
        """Writes what has been taken and is not on disk yet."""
        if self._pending:
            claim_folder(self.folder, {**self.parts, "rows": self.num_rows})
            number = len(list(self.folder.glob("*.jsonl")))
            write_rows(self.folder / f"{number:05d}.jsonl", self._pending.values())
            self._pending = {}

    def columns(self) -> dict[str, list[float]]:
        """All numbers, one list per column of `REF_COLUMNS`.

        Raises:
            InputError: The entry does not hold what it should.
        """
        by_row = {row["row"]: row for row in self._written()}
        if by_row.keys() != set(range(self.num_rows)):
            raise InputError(
                f"{self.folder} holds {len(by_row)} rows of reference log-probabilities for {self.num_rows} rows of "
                "data: a file was changed by hand. Delete the folder; it is computed again."
            )
        return {name: [by_row[row][name] for row in range(self.num_rows)] for name in REF_COLUMNS}

    def relatives(self) -> list[str]:
        """What keeps other entries of this root from being used, when they differ in one thing: one line each."""
        lines = []
        for path in sorted(self.root.glob(f"*/{SETTINGS_FILE}")):
            other = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name, value in self.parts.items() if other.get(name) != value]
            if len(differing) == 1:
                lines.append(f"{path.parent} has another {differing[0].replace('_', ' ')}")
        return lines

    def _written(self) -> Iterator[Row]:
        for path in sorted(self.folder.glob("*.jsonl")):
            for row in read_rows(path):
                if row.keys() != {"row", *REF_COLUMNS}:
                    raise InputError(f"{path} is not a shard of reference log-probabilities: delete {self.folder}.")
                yield row


def fill(
    cache: ReferenceCache,
    dataset: Dataset,
    score: Callable[[Any], tuple[Tensor, ...]],
    *,
    accelerator: Accelerator,
    name: str,
    batch_size: int,
    by_question: bool,
    **loader_settings: Any,
) -> dict[str, list[float]]:
    """Computes what an entry lacks, over all ranks, and gives its columns to every rank.

    Only the first rank reads and writes files, so the others need not share a file system with it.

    Args:
        cache: The entry.
        dataset: The rows.
        score: A batch to the summed reference log-probabilities of its chosen and rejected responses, (B,) each.
        accelerator: What tells the ranks apart.
        name: Of the data set, for the progress bar.
        batch_size: Pairs in a batch of one rank.
        by_question: Whether all pairs of a question make one batch, however many, so that a forest scores each of
            their responses once for the whole data set.
        **loader_settings: Of `torch.utils.data.DataLoader`: the collator at least.

    Returns:
        One list per column of `REF_COLUMNS`, in the order of the data set.
    """
    main = accelerator.is_main_process
    (missing,) = broadcast_object_list([cache.missing() if main else None])
    if missing and main:
        for line in cache.relatives():
            logger.warning("reference log-probabilities of the %s data are computed anew: %s.", name, line)
    batches = _batches(dataset, missing, batch_size, by_question)
    rounds = -(-len(batches) // accelerator.num_processes)
    mine = [batches[(accelerator.process_index + i * accelerator.num_processes) % len(batches)] for i in range(rounds)]
    loader = DataLoader(dataset, batch_sampler=mine, **loader_settings)
    with tqdm(total=len(missing), desc=f"Reference log-probs of {name} data", unit=" pairs", disable=not main) as bar:
        for rows, batch in zip(mine, loader, strict=True):
            found = score(send_to_device(batch, accelerator.device))
            for result in gather_object([(rows, *(numbers.tolist() for numbers in found))]):
                if main:
                    cache.add(*result)
                bar.update(len(result[0]))
    if main:
        cache.write()
    (columns,) = broadcast_object_list([cache.columns() if main else None])
    return columns


def _batches(dataset: Dataset, missing: list[int], batch_size: int, by_question: bool) -> list[list[int]]:
    """The missing rows in batches of one rank."""
    if not by_question or not missing:
        return [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    keys = question_keys(dataset)
    groups: dict[bytes, list[int]] = {}
    for row in missing:
        groups.setdefault(keys[row], []).append(row)
    batches: list[list[int]] = [[]]
    for group in groups.values():
        if batches[-1] and len(batches[-1]) + len(group) > batch_size:
            batches.append([])
        batches[-1] += group
    return batches


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
    """Names the content of the columns that training uses: texts whole, pictures by size and both ends of the file.

    What a transform makes of rows as they are read (`Dataset.with_transform`, tilings) counts too, by its code and
    arguments.
    """
    used = [name for name in _USED_COLUMNS if name in dataset.column_names]
    digest = hashlib.sha256()
    for table in dataset.select_columns(used).with_format("arrow").iter(batch_size=_ROWS_PER_SHARD):
        for row in table.to_pylist():
            pictures = row.pop("images", None) or [row.pop("image", None)]
            digest.update(json.dumps([row, [_picture_digest(p) for p in pictures]], default=str).encode())
    if transform := _transform_of(dataset):
        digest.update(Hasher.hash(transform).encode())
    return digest.hexdigest()[:16]


def _transform_of(dataset: Dataset) -> Callable[[Row], Row] | None:
    """What rows go through as they are read, of the user or for tiles."""
    return dataset.format["format_kwargs"].get("transform") if dataset.format["type"] == "custom" else None


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
