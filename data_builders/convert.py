"""`mpo convert`: reads and writes the formats of others, and looks for faults in any of them.

A row is read into one of ours and written from there, so that there are as many mappings as formats. What a format has
no field for stays in further columns and comes back; what cannot be said in it is counted and listed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from data_builders.engine import DROPPED
from data_builders.formats.exact import read_row, write_row
from data_builders.formats.files import WholeFile
from data_builders.formats.internvl import InternvlPrompt, InternvlSft, MammothVl
from data_builders.formats.jsonl import OurRows
from data_builders.formats.llamafactory import LlamaFactory
from data_builders.formats.mmpr import Mmpr
from data_builders.formats.ms_swift import MsSwift
from data_builders.formats.parquet import Parquet
from data_builders.formats.protocol import (
    AS_READ,
    CARRIED,
    Context,
    Format,
    Found,
    Kind,
    RefusedError,
    cannot_hold,
    kind_of,
)
from data_builders.formats.tags import places_of
from data_builders.formats.trl import Trl
from data_builders.inspection import Inspection
from data_builders.records import InputError, Row, Summary
from data_builders.shards import claim_folder, full_disk_explained

FormatName = Literal[
    "jsonl",
    "mmpr",
    "internvl_sft",
    "internvl_prompt",
    "trl",
    "ms_swift",
    "llamafactory",
    "parquet",
    "mammoth_vl",
]
FORMATS: dict[str, type[Format]] = {
    one.name: one
    for one in (OurRows, Mmpr, InternvlSft, InternvlPrompt, Trl, MsSwift, LlamaFactory, Parquet, MammothVl)
}
_INSIDE = "pictures between the words"
_ROUNDS = "conversations with several answers"


@dataclass(kw_only=True)
class ConvertConfig:
    """Settings of `mpo convert`."""

    input: str = field(metadata={"help": "A file or folder in the format `from`; for mmpr its meta.json."})
    from_: FormatName = field(metadata={"help": "Format that is read; jsonl are the rows of the other steps."})
    to: FormatName | None = field(default=None, metadata={"help": "Format that is written."})
    output: str | None = field(default=None, metadata={"help": "Folder for what is written."})
    image_root: str = field(default=".", metadata={"help": "Folder that image paths are relative to, and stay in."})
    kind: Literal["correctness", "format", "dropout_ntp"] | None = field(
        default=None,
        metadata={
            "help": "Kind of the pairs whose file does not say it; without one they become lists of messages, which "
            "train alike."
        },
    )
    extras: bool = field(
        default=True,
        metadata={"help": "Keep what the format has no field for in further columns; false leaves it away."},
    )
    shard_size: int = field(default=5000, metadata={"help": "Rows of each shard, where shards are written."})
    check: bool = field(
        default=False,
        metadata={"help": "Look for faults instead, and end with exit code 1 if there are any; writes check.json."},
    )
    max_similarity: float = field(
        default=0.9,
        metadata={"help": "Check: pairs that share more of their words than this are reported as near-duplicates."},
    )

    def __post_init__(self) -> None:
        """Refuses settings that do not go together.

        Raises:
            InputError: `to` or `output` is missing, or a number is out of its range.
        """
        if not self.check and (self.to is None or self.output is None):
            raise InputError(
                "`mpo convert` needs `to`, the format to write, and `output`, the folder for it; with `--check` it "
                "only looks for faults."
            )
        if self.shard_size < 1:
            raise InputError(f"`shard_size` must be at least 1, got {self.shard_size}.")
        if not 0.0 < self.max_similarity <= 1.0:
            raise InputError(f"`max_similarity` must be above 0 and at most 1, got {self.max_similarity}.")


CONFIGS = (ConvertConfig,)


def run(config: ConvertConfig) -> Summary:
    """Converts a data set, or looks for faults in it.

    Raises:
        InputError: The input is missing or broken, the target cannot hold such rows, or the folder holds other work.
    """
    return _check(config) if config.check else _convert(config)


def _check(config: ConvertConfig) -> Summary:
    source = FORMATS[config.from_]()
    inspection = Inspection(Path(config.image_root), config.max_similarity)
    for found in _found(source, config, "checking"):
        try:
            inspection.add(_row(found, source), found.where, found.pictures)
        except RefusedError as error:
            inspection.refuse(error.reason, found.where, error.detail)
    return inspection.summary(config.input, Path(config.output) if config.output else None, source.notes)


def _convert(config: ConvertConfig) -> Summary:
    source, target = FORMATS[config.from_](), FORMATS[config.to]()
    _check_kinds(source.kinds, source.name, target)
    output = Path(config.output)
    settings = {"from": config.from_, "to": config.to, "image_root": config.image_root, "kind": config.kind}
    settings |= {"extras": config.extras, "shard_size": config.shard_size}
    claim_folder(output, settings, source.inputs(Path(config.input)))
    tally = _Tally(target, extras=config.extras)
    with full_disk_explained(output, "Make room, and give the same command again."):
        _write(source, target, config, tally)
    return tally.summary(config, [*source.notes, *target.notes])


def _write(source: Format, target: Format, config: ConvertConfig, tally: "_Tally") -> None:
    output, embedded = Path(config.output), isinstance(source, Parquet)
    image_root = output if embedded else Path(config.image_root)
    with ExitStack() as stack:
        writer = stack.enter_context(target.writer(output, image_root, config.shard_size))
        left_out = stack.enter_context(WholeFile(output / DROPPED / "00000.jsonl"))
        for found in _found(source, config, "converting"):
            try:
                row = _row(found, source)
                _check_kinds({kind_of(row)}, found.where, target)
                for name, picture in found.pictures.items():
                    _write_picture(output / name, picture)
                fields = row if isinstance(target, OurRows) else _fields(row, target, image_root, config.extras)
            except RefusedError as error:
                left_out.add({"id": found.where, "reason": error.reason, "detail": error.detail})
                tally.left_out[error.reason] += 1
                continue
            writer.add(fields, row)
            tally.add(row, fields)
    if not tally.left_out:
        left_out.path.unlink()


def _found(source: Format, config: ConvertConfig, title: str) -> Iterator[Found]:
    """The rows of the input, counted as they go by."""
    bar = tqdm(source.read(Path(config.input), Path(config.image_root)), desc=title, unit="row")
    for found in bar:
        defaults = {"kind": config.kind, **found.context.defaults} if config.kind else found.context.defaults
        yield replace(found, context=replace(found.context, defaults=defaults))


def _row(found: Found, source: Format) -> Row:
    return source.to_row(found.fields, found.context)[0] if isinstance(source, OurRows) else read_row(found, source)


def _fields(row: Row, target: Format, image_root: Path, extras: bool) -> Row:
    return write_row(row, target, Context(image_root), extras=extras)


def _check_kinds(kinds: Iterable[Kind], what: str, target: Format) -> None:
    """Refuses what the target has no form for, before or as soon as it is met."""
    if not target.kinds.isdisjoint(kinds):
        return
    able = ", ".join(name for name, one in FORMATS.items() if not one.kinds.isdisjoint(kinds))
    raise InputError(
        f"{what} holds {' and '.join(sorted(kinds))}, and {target.name} can only hold "
        f"{' and '.join(sorted(target.kinds))}. Formats for {' and '.join(sorted(kinds))}: {able}."
    )


def _write_picture(path: Path, picture: bytes) -> None:
    """Writes an image that the source held, unless it is there: its name says what is in it."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(picture)
    temporary.replace(path)


class _Tally:
    """Counts what was converted, what the target has no field for, and what was left out."""

    def __init__(self, target: Format, *, extras: bool) -> None:
        self.target, self.extras = target, extras
        self.kinds: Counter[str] = Counter()
        self.homeless: Counter[tuple[str, str]] = Counter()
        self.left_out: Counter[str] = Counter()
        self.special: Counter[str] = Counter()

    def add(self, row: Row, fields: Row) -> None:
        """Counts one row."""
        self.kinds[kind_of(row)] += 1
        self.special[_INSIDE] += _has_pictures_inside(row)
        self.special[_ROUNDS] += "completion" in row and any(m["role"] == "assistant" for m in _messages(row))
        if isinstance(self.target, OurRows):
            return
        for name in cannot_hold(self.target, row):
            if name != AS_READ or row[name].get("format") != self.target.name:
                self.homeless[name, self._home(name, row, fields)] += 1

    def _home(self, name: str, row: Row, fields: Row) -> str:
        if not self.extras:
            return "left away"
        return f"column {name}" if name in fields and fields[name] == row[name] else f"column {CARRIED}"

    def summary(self, config: ConvertConfig, notes: list[str]) -> Summary:
        """What to tell."""
        rows = [[kind, f"{count:,}", config.output] for kind, count in sorted(self.kinds.items())]
        rows += [[f"left out: {reason}", f"{count:,}", "-"] for reason, count in self.left_out.most_common()]
        rows += [[f"`{name}`", f"{count:,}", home] for (name, home), count in sorted(self.homeless.items())]
        if self.homeless:
            notes.append(
                f"{self.target.name} has no field for what is listed by name: "
                + ("other readers skip those columns." if self.extras else "it is gone.")
            )
        if self.left_out:
            notes.append(f"Rows that were left out are listed in {Path(config.output) / DROPPED}.")
        notes += [text.format(self.special[name]) for name, text in _NOTES.items() if self.special[name]]
        return Summary("Converted", ["what", "rows", "where"], rows, notes, self._next_command(config))

    def _next_command(self, config: ConvertConfig) -> str | None:
        root = config.output if config.from_ == Parquet.name else config.image_root
        verbs = {
            "pairs": f"mpo train --data {config.output} --model_name_or_path MODEL --output_dir mpo-model",
            "questions": f"mpo sample --questions {config.output} --model MODEL --output responses",
            "conversations": f"mpo sft --data {config.output} --model_name_or_path MODEL --output_dir sft-model",
        }
        verb = verbs.get(next(iter(self.kinds), ""))
        return f"{verb} --image_root {root}" if verb and config.to == OurRows.name else None


_NOTES = {
    _INSIDE: "{:,} rows have pictures between the words: `mpo train` and `mpo sft` leave them there; of a question "
    "`mpo sample` shows them first.",
    _ROUNDS: "{:,} conversations have several answers: `mpo sft` learns the last one, and reads those before it.",
}


def _has_pictures_inside(row: Row) -> bool:
    asked_otherwise = "<image>" in str(row.get(AS_READ, {}).get("set", {}).get("question", ""))
    return places_of(row.get("prompt")) > 0 or ("question" in row and "completion" not in row and asked_otherwise)


def _messages(row: Row) -> list[Row]:
    return row["prompt"] if isinstance(row.get("prompt"), list) else []
