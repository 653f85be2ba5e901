"""LLaMA-Factory's preference data in ShareGPT format, and its entry in `dataset_info.json`.

    {"conversations": [{"from": "human", "value": "<image>How many?"}], "chosen": {"from": "gpt", "value": "3"},
     "rejected": {"from": "gpt", "value": "4"}, "images": ["a.png"]}

What is read may have other names for all of this, if `dataset_info.json` says so; what is written has these.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from data_builders.formats.arrays import read_json
from data_builders.formats.files import DATA, LinesWriter, NumberedFiles, numbered
from data_builders.formats.names import names_in_root
from data_builders.formats.protocol import Context, Found, Kind, RefusedError, further, placed
from data_builders.formats.tags import TAG, dialogue, pair_fields, with_tags, without_tags
from data_builders.records import InputError, Row
from data_builders.shards import write_text

INFO = "dataset_info.json"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_FROM = {role: name for name, role in _ROLES.items()}
_COLUMNS = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}


class LlamaFactory(NumberedFiles):
    """Pairs as LLaMA-Factory trains on them."""

    name: ClassVar[str] = "llamafactory"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"pairs"})
    columns: ClassVar[frozenset[str]] = frozenset({*_COLUMNS.values(), "system"})
    holds: ClassVar[frozenset[str]] = frozenset({"images", "prompt", "chosen", "rejected"})

    def read(self, source: Path, image_root: Path) -> Iterator[Found]:
        """The rows of a file, of a folder, or of the preference data sets that a `dataset_info.json` names."""
        info = source / INFO if source.is_dir() else source
        if info.name != INFO or not info.is_file():
            yield from super().read(source, image_root)
            return
        for name, entry in _entries(info):
            for found in numbered(info.parent / entry["file_name"], image_root):
                yield Found(found.where, _renamed(found.fields, entry, f"{info}, {name}"), found.context)

    def to_row(self, fields: Row, context: Context) -> tuple[Row, Row]:
        """A pair.

        Raises:
            RefusedError: A response is missing, an image lies outside the root, or tags do not match the images.
        """
        images = names_in_root(fields.get("images"), context.image_root)
        turns = [_turn(turn) for turn in fields.get("conversations") or []]
        if isinstance(system := fields.get("system"), str) and system:
            turns.insert(0, ("system", system))
        (role, chosen), (other, rejected) = _turn(fields.get("chosen")), _turn(fields.get("rejected"))
        if (role, other) != ("assistant", "assistant"):
            raise RefusedError("a response that is not the assistant's", (role, other))
        messages, hints = without_tags(turns, len(images), TAG)
        row = {**placed(fields, self.columns, context), "images": images}
        return {**row, **pair_fields(messages, chosen, rejected, row.get("kind"))}, hints

    def from_row(self, row: Row, context: Context) -> Row:
        """A row of LLaMA-Factory.

        Raises:
            RefusedError: An answer is more than one text, a role has no counterpart, or a text holds a tag that is
                none.
        """
        prompt, chosen, rejected = dialogue(row)
        turns = with_tags(prompt, len(row.get("images", [])), TAG, context.hints)
        if strange := {role for role, _ in turns} - _FROM.keys():
            raise RefusedError(f"a message of the role {sorted(strange)[0]}", prompt)
        return {
            "conversations": [{"from": _FROM[role], "value": text} for role, text in turns],
            "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected},
            "images": row.get("images", []),
            **further(row, {*self.columns, *self.holds}, nested=False),
        }

    @contextmanager
    def writer(self, folder: Path, image_root: Path, shard_size: int) -> Iterator[LinesWriter]:
        """Opens a folder with a file of JSON lines and the `dataset_info.json` that describes it."""
        with super().writer(folder, image_root, shard_size) as writer:
            yield writer
        entry = {"file_name": DATA, "formatting": "sharegpt", "ranking": True, "columns": _COLUMNS, "tags": _TAGS}
        name = folder.absolute().name
        write_text(folder / INFO, json.dumps({name: entry}, ensure_ascii=False, indent=2) + "\n")
        self.notes.append(f"LLaMA-Factory: dataset_dir: {folder}, dataset: {name}, media_dir: the image root.")


def _entries(info: Path) -> list[tuple[str, Row]]:
    entries = [(name, entry) for name, entry in read_json(info).items() if isinstance(entry, dict)]
    taken = [
        (name, entry)
        for name, entry in entries
        if entry.get("ranking") and entry.get("formatting") == "sharegpt" and isinstance(entry.get("file_name"), str)
    ]
    if not taken:
        raise InputError(
            f"{info} names no preference data in ShareGPT format: an entry with `ranking` true, `formatting` sharegpt "
            f"and a `file_name`. It has {', '.join(name for name, _ in entries) or 'nothing'}."
        )
    return taken


def _renamed(fields: Row, entry: Row, where: str) -> Row:
    """The row under the names that LLaMA-Factory takes where an entry gives none."""
    columns, tags = {**_COLUMNS, **entry.get("columns", {})}, {**_TAGS, **entry.get("tags", {})}
    if columns | _COLUMNS == columns and tags | _TAGS == tags:
        return fields
    if columns["messages"] not in fields:
        raise InputError(f"{where}: rows have no column {columns['messages']!r}, but {', '.join(fields)}.")
    ours = {theirs: _COLUMNS.get(key, key) for key, theirs in columns.items()}
    renamed = {ours.get(name, name): value for name, value in fields.items()}
    renamed["conversations"] = [_renamed_turn(turn, tags) for turn in renamed["conversations"]]
    return renamed | {name: _renamed_turn(renamed.get(name), tags) for name in ("chosen", "rejected")}


def _renamed_turn(turn: Any, tags: Row) -> Any:
    if not isinstance(turn, dict):
        return turn
    roles = {tags[key]: _TAGS[key] for key in ("user_tag", "assistant_tag", "system_tag")}
    role = turn.get(tags["role_tag"])
    return {"from": roles.get(role, role), "value": turn.get(tags["content_tag"])}


def _turn(turn: Any) -> tuple[str, str]:
    said = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if said[0] not in _ROLES or not isinstance(said[1], str) or len(turn) != 2:
        raise RefusedError("a turn that is not `from` human, gpt or system with a text as its `value`", turn)
    return _ROLES[said[0]], said[1]
