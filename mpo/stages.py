"""Runs verbs one after the other, each once: what a folder's record says is done is not done again."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_builders.records import InputError, Row, Summary
from data_builders.shards import write_text

RunVerb = Callable[[str, Sequence[str]], Summary]
LOG = "log.txt"
_RECORD = "progress.json"


@dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        name: What the folder's record calls it.
        verb: What runs; empty for a step that is `prepare` alone.
        settings: What is set besides the file.
        prepare: Writes what the verb reads.
        config: The settings file; None for a verb without one.
    """

    name: str
    verb: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None
    config: Path | None = None

    @property
    def argv(self) -> list[str]:
        """What would follow the verb on the command line."""
        file = ["--config", str(self.config)] if self.config else []
        return file + [word for key, value in self.settings.items() for word in (f"--{key}", value)]

    @property
    def key(self) -> str:
        """Changes with anything that changes what the step does."""
        text = self.config.read_text(encoding="utf-8") if self.config and self.config.is_file() else ""
        words = [f"--{key}={value}" for key, value in self.settings.items()]
        return hashlib.sha256(repr((self.verb, words, text)).encode()).hexdigest()[:16]


def run_stages(stages: Iterable[Stage], folder: Path, run_verb: RunVerb) -> Row:
    """Runs what is not done yet.

    Args:
        stages: In their order.
        folder: Of the whole run; its record says what is done.
        run_verb: Runs another verb in this process, as the command line would.

    Returns:
        The record: for every stage that is done its `seconds`.

    Raises:
        InputError: The folder holds other things, or a stage was run with other settings.
    """
    record = _claim(folder)
    done: Row = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for stage in stages:
        if stage.name in done and done[stage.name]["key"] != stage.key:
            raise InputError(
                f"stage {stage.name!r} in {folder} was run with other settings: give the run another folder, or "
                f"delete {folder} to start again."
            )
        if stage.name in done:
            continue
        start = time.perf_counter()
        if stage.prepare:
            stage.prepare()
        if stage.verb:
            run_verb(stage.verb, stage.argv)
        done[stage.name] = {"seconds": time.perf_counter() - start, "key": stage.key}
        if _is_first_rank():
            write_text(record, json.dumps(done, indent=1) + "\n")
    return done


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _claim(folder: Path) -> Path:
    """The run's record of what is done; a folder without one must be empty, since stages clear folders in it."""
    record = folder / _RECORD
    if not record.exists() and _is_first_rank():
        foreign = [path.name for path in folder.glob("*") if path.name != LOG]
        if foreign:
            raise InputError(
                f"{folder} holds {foreign[0]} and no {_RECORD}: no run of this verb wrote it. Give a folder that is "
                "new or empty."
            )
        write_text(record, "{}\n")
    return record
