r"""MMPR, the preference data of InternVL: a `meta.json` and annotations in JSON lines.

    {"image": "a.png", "question": "<image>\nHow many?", "chosen": "3", "rejected": "4", "answer_gt": "3"}

`image` is one path, a list, an empty string or absent; `answer_gt`, `chosen_meta` and `rejected_meta` are optional.
What kind of pairs a set holds stands in the end of its name alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from data_builders.formats.names import names_in_root
from data_builders.formats.protocol import AS_READ, Context, Found, Kind, RefusedError, further, placed
from data_builders.formats.sets import OfSets, SetWriter, set_writer
from data_builders.formats.tags import dialogue, pair_fields, with_tags, without_tags
from data_builders.records import Row

_UNIT = "<image>\n"
_ENDINGS = {
    "_pairs_vqa_correctness_rules": "correctness",
    "_pairs_vqa_direct_rules": "correctness",
    "_pairs_vqa_format_rules": "format",
    "_prefix_pair_sr0.5_wo_image": "dropout_ntp",
    "_prefix_pair_sr0.5_with_image": "dropout_ntp",
    "_prefix_pair_sr0.0_wo_image": "dropout_ntp",
    "_prefix_pair_sr0.0_with_image": "dropout_ntp",
}


class Mmpr(OfSets):
    """Pairs as InternVL publishes and trains on them."""

    name: ClassVar[str] = "mmpr"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"pairs"})
    columns: ClassVar[frozenset[str]] = frozenset(
        {"image", "question", "chosen", "rejected", "answer_gt", "chosen_meta", "rejected_meta"}
    )
    holds: ClassVar[frozenset[str]] = frozenset(
        {"images", "prompt", "chosen", "rejected", "source", "answer", "chosen_meta", "rejected_meta"}
    )

    def read(self, source: Path, image_root: Path) -> Iterator[Found]:
        """The rows of all sets, with the kind of pairs that a set's name tells."""
        for found in super().read(source, image_root):
            defaults, hints = found.context.defaults, found.context.hints
            if kind := _kind_of_set(defaults["source"]):
                defaults = {**defaults, "kind": kind}
            if found.fields.get("source", defaults["source"]) != defaults["source"]:
                hints = {**hints, "in_set": defaults["source"]}
            yield replace(found, context=replace(found.context, defaults=defaults, hints=hints))

    def to_row(self, fields: Row, context: Context) -> tuple[Row, Row]:
        """A pair.

        Raises:
            RefusedError: A response is missing, an image lies outside the root, or tags do not match the images.
        """
        images = images_of(fields, context)
        question = fields.get("question")
        if not isinstance(question, str):
            raise RefusedError("no `question`", repr(question))
        messages, hints = without_tags([("user", question)], len(images), _UNIT)
        row = {**placed(fields, self.columns, context), "images": images}
        row |= pair_fields(messages, fields.get("chosen"), fields.get("rejected"), row.get("kind"))
        if isinstance(fields.get("answer_gt"), str):
            row["answer"] = fields["answer_gt"]
        row |= {name: fields[name] for name in ("chosen_meta", "rejected_meta") if isinstance(fields.get(name), dict)}
        return row, {**_of_set(context.hints), **hints}

    def from_row(self, row: Row, context: Context) -> Row:
        """An annotation.

        Raises:
            RefusedError: There is more than one turn, or a text holds a tag that is none.
        """
        messages, chosen, rejected = dialogue(row)
        turns = with_tags(messages, len(row.get("images", [])), _UNIT, context.hints)
        if [role for role, _ in turns] != ["user"]:
            raise RefusedError("a conversation of several turns", [role for role, _ in turns])
        fields = {**image_field(row, context), "question": turns[0][1], "chosen": chosen, "rejected": rejected}
        fields |= {"answer_gt": row["answer"]} if row.get("answer") is not None else {}
        fields |= {name: row[name] for name in ("chosen_meta", "rejected_meta") if name in row}
        return {**fields, **further(row, {*self.columns, *self.holds} - {"source"})}

    @contextmanager
    def writer(self, folder: Path, image_root: Path, shard_size: int) -> Iterator["_SetsOfPairs"]:
        """Opens a folder with a `meta.json` and one annotation file for each source and kind."""
        del shard_size
        with set_writer(folder, image_root, meta=True) as writer:
            yield _SetsOfPairs(writer)


class _SetsOfPairs:
    def __init__(self, writer: SetWriter) -> None:
        self.writer = writer

    def add(self, fields: Row, row: Row) -> None:
        memory = row.get(AS_READ) or {}
        memory = memory if memory.get("format") == Mmpr.name else {}
        self.writer.add_to(memory.get("in_set") or _set_name(row), base_of(row, memory), fields)


def images_of(fields: Row, context: Context) -> list[str]:
    """The images of an annotation, as we name them."""
    return names_in_root(fields.get("image"), context.image_root, context.hints.get("root", ""))


def image_field(row: Row, context: Context) -> Row:
    """`image` as InternVL has it: nothing, one path, or a list of several."""
    base = base_of(row, context.hints)
    names = [name.removeprefix(f"{base}/") for name in row.get("images", [])]
    return {"image": names if len(names) > 1 else names[0]} if names else {}


def base_of(row: Row, hints: Row) -> str:
    """The image folder of the set that a row came from, if all of its images still lie there."""
    base = hints.get("root", "")
    return base if all(name.startswith(f"{base}/") for name in row.get("images", [])) else ""


def _of_set(hints: Row) -> Row:
    return {name: hints[name] for name in ("root", "in_set") if name in hints}


def _kind_of_set(name: str) -> str | None:
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)


def _set_name(row: Row) -> str:
    """The source, with an ending that says the kind."""
    source, kind = row.get("source") or "data", row.get("kind")
    if kind in (None, _kind_of_set(source)):
        return source
    endings = [ending for ending, meant in _ENDINGS.items() if meant == kind and _says_how(ending, row)]
    return source + (endings[0] if endings else f"_{kind}")


def _says_how(ending: str, row: Row) -> bool:
    """Whether an ending agrees with how a DropoutNTP pair was made; true for all others."""
    made = row.get("rejected_meta") or {}
    if row.get("kind") != "dropout_ntp" or "ratio" not in made:
        return True
    return ending == f"_prefix_pair_sr{made['ratio']:.1f}_{'with' if made.get('with_image') else 'wo'}_image"
