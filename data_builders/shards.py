"""JSONL files and folders of JSONL shards: read with the line in every complaint, written whole or not at all.

A stage of the pipeline is a folder of shards (`00000.jsonl`, `00001.jsonl`, ...). A shard is written under a temporary
name and renamed when it is whole, so a shard that exists is complete and a killed run goes on after the last one.
"""

import codecs
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from data_builders.records import InputError, Record, Row, check_row

SETTINGS_FILE = "settings.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BLANK = b" \t\r\n\f\v" + codecs.BOM_UTF8
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Place:
    """Where a row stands in a file: its line, from 1 on, and the byte at which that starts."""

    line: int = 1
    byte: int = 0


_FIRST = Place()


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    process = f"{os.getpid()}-{token_hex(4)}"  # on several machines some have the same number
    temporary = path.with_name(f".{path.name}.{process}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes what a killed run left of a file that was not whole."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def full_disk_explained(path: Path, advice: str) -> Iterator[None]:
    """Turns the error of a full disk into an `InputError` that names what was not written and ends with advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise InputError(f"{path} could not be written: {error.strerror}. {advice}") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSON lines, whole or not at all.

    Half a surrogate pair, which a server's JSON may hold, is no character and cannot be written: U+FFFD stands for it.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, _LONE_SURROGATE.sub("\ufffd", text))


def read_rows(path: Path, model: type[Record] | None = None) -> Iterator[Row]:
    """The rows of one JSONL file; blank lines are passed over.

    Args:
        path: A file of JSON lines in UTF-8, with or without a byte order mark.
        model: The row type that each line must have; None takes any object.

    Raises:
        InputError: The file is missing, or a line is not JSON or lacks a field; the message has the line number.
    """
    return (row for _, row in read_placed_rows(path, model))


def read_placed_rows(
    path: Path, model: type[Record] | None = None, start: Place = _FIRST
) -> Iterator[tuple[Place, Row]]:
    """The rows of one JSONL file from a place on, each with its own place; otherwise as `read_rows`."""
    try:
        with path.open("rb") as file:
            byte = file.seek(start.byte)
            for number, line in enumerate(file, start.line):
                if line.strip(_BLANK):
                    yield Place(number, byte), _parse(line, model, f"{path}, line {number}")
                byte += len(line)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error


def _parse(line: bytes, model: type[Record] | None, where: str) -> Row:
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode()
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error}); is it a JSONL file?") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not a JSON object ({error.msg} at column {error.colno}): {text.strip()[:80]!r}. Each line must "
            "be one whole JSON object; was the file cut off, or is it one big JSON array?"
        ) from error
    if model is not None:
        return check_row(row, model, where)
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {row!r:.80}. Is the file one big JSON array?")
    return row


def shard_paths(source: Path) -> list[Path]:
    """The JSONL files that make up a stage: the file itself, or the shards of a folder in order of name.

    Raises:
        InputError: There is nothing to read; says which step would write it.
    """
    if source.is_file():
        return [source]
    if not source.exists():
        raise InputError(f"{source} does not exist; expected a JSONL file or a folder of JSONL shards.")
    shards = sorted(path for path in source.glob("*.jsonl") if not path.name.startswith("."))
    if not shards:
        raise InputError(f"{source} holds no JSONL shard: the step that fills this folder has not run, or failed.")
    return shards


def read_stage(source: Path, model: type[Record] | None = None) -> Iterator[Row]:
    """The rows of a file, or of all shards of a folder.

    Raises:
        InputError: There is no row at all, or a row is broken.
    """
    empty = True
    for path in shard_paths(source):
        for row in read_rows(path, model):
            empty = False
            yield row
    if empty:
        raise InputError(f"{source} holds no row: the step that writes it produced nothing.")


def claim_folder(folder: Path, settings: Row, inputs: Iterable[Path] = ()) -> None:
    """Binds a folder to the settings that fill it, so that work made with other settings is never mixed in.

    Args:
        folder: The output folder, made if need be.
        settings: Everything that changes what is written, fit for JSON.
        inputs: The files or folders that are read; a change of their content counts as another setting.

    Raises:
        InputError: The folder was filled with other settings or from other input (says which), or holds files that
            no run of the step wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output {folder} is a file: give a folder.")
    remove_leftovers(folder / SETTINGS_FILE)
    wanted = json.loads(json.dumps({**settings, "inputs": {str(path): _content_key(path) for path in inputs}}))
    path = folder / SETTINGS_FILE
    if not path.exists():
        if foreign := sorted(folder.glob("*.jsonl")):
            raise InputError(
                f"the output folder {folder} holds {foreign[0].name} but no {SETTINGS_FILE}: no earlier run wrote "
                "that file, and it would be taken for a part of this one. Give an output folder of its own."
            )
        write_text(path, json.dumps(wanted, indent=1) + "\n")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if changed:
        key = changed[0]
        raise InputError(
            f"{folder} was filled with other settings ({key}: then {found.get(key)!r}, now {wanted.get(key)!r}). Give "
            "another output folder, or delete this one to start again."
        )


def _content_key(path: Path) -> str:
    """A short name for what a file or the files of a folder hold; big files go by size and time of change."""
    digest = hashlib.sha256()
    inside = (p for p in path.rglob("*") if p.is_file() and not str(p.relative_to(path)).startswith("."))
    for file in [path] if path.is_file() else sorted(inside):
        status = file.stat()
        small = status.st_size < 64 * 2**20
        name = file.name if file == path else str(file.relative_to(path))
        digest.update(repr((name, status.st_size)).encode())
        digest.update(file.read_bytes() if small else str(status.st_mtime_ns).encode())
    return digest.hexdigest()[:16]
