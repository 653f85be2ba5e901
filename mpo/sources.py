"""Where training data lies: files, folders, saved data sets and Hub data sets, found and opened.

JSON is read row by row, since a column of mixed types breaks Arrow's inference; everything else is `datasets`' to open
and stays in its memory-mapped tables. Code that comes with a data set is never run: `datasets` refuses it.
"""

import glob
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable
from pyarrow import parquet

from data_builders.records import InputError, Row
from data_builders.shards import read_rows, shard_paths

NumberedRow = tuple[str, Row]
"""File and line, for messages, and what stands there."""

TAKEN = (
    "Taken are a JSONL file (.jsonl), a JSON array (.json), a Parquet file (.parquet), a folder of JSONL shards or of "
    "Parquet files, a folder that `Dataset.save_to_disk` wrote, a local copy of a Hub data set, and a Hub id "
    "(org/name or org/name/config); behind folders and ids `:split` names another split than train"
)
_JSON_LINES = (".jsonl", ".ndjson")
_SUFFIXES = (".parquet", ".json", *_JSON_LINES)
_WITH_SPLIT = re.compile(r"(?P<name>.+?):(?P<split>\w[\w.+-]*(\[[^]]*\])?)")
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:/(?P<config>\w[\w.-]*))?")
_NAMED_AFTER_A_SPLIT = re.compile(r"(train|test|val|valid|validation|dev|eval)(\b|[_-])", re.IGNORECASE)
_LOADING_ERRORS = (ValueError, OSError, RuntimeError, KeyError, DatasetsError)


def local_path(source: str | Path) -> Path | None:
    """The file or folder that a source names on this machine, without its `:split`; None for a Hub id."""
    path = Path(_divide(source)[0])
    return path if path.exists() else None


def open_source(source: str | Path) -> Dataset | Iterator[NumberedRow]:
    """Opens one source of training data.

    Args:
        source: A file, a folder or a Hub id; `mpo.sources.TAKEN` lists all of them.

    Returns:
        The rows of JSON files one by one, each with its file and line; a dataset for everything else.

    Raises:
        InputError: There is nothing of that name, or it is of a type that is not taken, broken or empty.
    """
    name, split = _divide(source)
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, split)
    if not path.exists():
        return _open_hub(name, split)
    if split is not None:
        raise InputError(f"{source}: a file has no splits. Leave `:{split}` away.")
    return _open_file(path)


def _divide(source: str | Path) -> tuple[str, str | None]:
    """The name and the split of a source; a colon that is part of an existing file's name stays one."""
    found = _WITH_SPLIT.fullmatch(str(source))
    return (str(source), None) if found is None or Path(source).exists() else (found["name"], found["split"])


def _open_file(path: Path) -> Dataset | Iterator[NumberedRow]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        if _load(path, lambda: parquet.read_metadata(path)).num_rows == 0:
            raise InputError(f"{path} holds no row.")
        return _load(path, lambda: load_dataset("parquet", data_files=glob.escape(str(path)), split="train"))
    if suffix == ".json" and _holds_an_array(path):
        return _array_rows(path)
    if suffix in _SUFFIXES:
        return _line_rows([path], path)
    raise InputError(f"{path} is of a type that is not read ({suffix or 'no suffix'}). {TAKEN}.")


def _open_folder(path: Path, split: str | None) -> Dataset | Iterator[NumberedRow]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _open_saved(path, split)
    shards = [shard for shard in path.glob("*.jsonl") if not shard.name.startswith(".")]
    of_splits = split or (path / "README.md").is_file() or any(_NAMED_AFTER_A_SPLIT.match(x.name) for x in shards)
    if shards and not of_splits:
        if any(path.glob("*.parquet")):
            raise InputError(f"{path} holds JSONL shards and Parquet files: name those that are meant.")
        return _line_rows(shard_paths(path), path)
    if not shards and not any(next(path.rglob(f"*{suffix}"), None) for suffix in (".parquet", *_JSON_LINES)):
        raise InputError(
            f"{path} holds no JSONL shard, no Parquet file and no saved data set: the step that fills this folder has "
            f"not run, or it is another folder. {TAKEN}."
        )
    return _load(f"{path}, split {split or 'train'},", lambda: load_dataset(str(path), split=split or "train"))


def _open_saved(path: Path, split: str | None) -> Dataset:
    saved = _load(path, lambda: load_from_disk(str(path)))
    if isinstance(saved, DatasetDict):
        if (split or "train") not in saved:
            splits = ", ".join(f"{path}:{name}" for name in saved)
            raise InputError(f"{path} has no split {split or 'train'!r}. Name one of its splits: {splits}.")
        saved = saved[split or "train"]
    elif split is not None:
        raise InputError(f"{path} is a saved data set without splits. Leave `:{split}` away.")
    if {"image", "images"} & set(saved.column_names):
        return saved
    # what TRL derives from a data set of text is written beside its file: not into a folder of the user's
    return Dataset(InMemoryTable(saved.data.table), info=saved.info, fingerprint=saved._fingerprint)


def _open_hub(name: str, split: str | None) -> Dataset:
    split = split or "train"
    found = _HUB_ID.fullmatch(name)
    if found is None or Path(name).suffix.lower() in _SUFFIXES or Path(found["name"]).exists():
        raise InputError(f"{name} does not exist. {TAKEN}.")
    call = f"load_dataset({', '.join(repr(part) for part in found.groups() if part)}, split={split!r})"
    return _load(
        f"{name} is no file or folder here, and as a Hub data set, {call},",
        lambda: load_dataset(found["name"], found["config"], split=split),
        advice="Is the name right, is there a network (HF_HUB_OFFLINE is not set), and are you allowed to read it?",
    )


def _load(what: str | Path, load: Callable[[], Any], *, advice: str = TAKEN + ".") -> Any:
    try:
        return load()
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{what} cannot be read: {type(error).__name__}: {reason:.400}. {advice}") from error


def _holds_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array_rows(path: Path) -> Iterator[NumberedRow]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also of the decoder of UTF-8
        raise InputError(f"{path} is not one whole JSON array ({error}). Was the file cut off?") from error
    if not rows:
        raise InputError(f"{path} holds no row: the array is empty.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: expected a JSON object, got {row!r:.80}.")
        yield f"{path}, row {number}", row


def _line_rows(paths: list[Path], source: Path) -> Iterator[NumberedRow]:
    empty = True
    for path in paths:
        with path.open(encoding="utf-8-sig") as file:
            numbers = (number for number, line in enumerate(file, 1) if line.strip())
            for row, number in zip(read_rows(path), numbers, strict=False):
                empty = False
                yield f"{path}, line {number}", row
    if empty:
        raise InputError(f"{source} holds no row: the step that writes it produced nothing.")
