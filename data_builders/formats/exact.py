"""Rows of any format into ours and back, exactly.

A format maps the plain meaning of a row. What that loses is kept as a difference: our row remembers in `as_read` what
the format said otherwise, and a foreign row carries in one string, `mpo`, what it has no place for. A difference says
for each field what stood there when it was taken, so a field that was changed since keeps its change.
"""

import hashlib
import json
from dataclasses import replace
from typing import Any

from data_builders.formats.protocol import AS_READ, CARRIED, Context, Format, Found, RefusedError, in_order
from data_builders.records import Row

_UNKNOWN = "\0"  # stands for what only the reader of the file will make up
_DIFFERENCES = ("set", "unset", "order")


def read_row(found: Found, kind: Format) -> Row:
    """Our row for a row of a format.

    Raises:
        RefusedError: It has none.
    """
    fields = {name: value for name, value in found.fields.items() if name != CARRIED}
    if (carried := found.fields.get(CARRIED)) is not None:
        row, _ = kind.to_row(fields, replace(found.context, defaults={}))
        return restored(in_order(row), _parsed(carried))
    row, hints = kind.to_row(fields, found.context)
    row = in_order(row)
    plain = kind.from_row(row, replace(found.context, hints=hints))
    memory = {**hints, **differences(plain, fields)}
    return {**row, AS_READ: {"format": kind.name, **memory}} if memory else row


def write_row(row: Row, kind: Format, context: Context, *, extras: bool = True) -> Row:
    """A row of a format for ours.

    Args:
        row: Ours.
        kind: The format.
        context: Its `image_root` alone counts.
        extras: Keep what the format has no field for in further columns; otherwise it is left away.

    Raises:
        RefusedError: The format has nothing like it.
    """
    memory = row.get(AS_READ) or {}
    hints = memory if memory.get("format") == kind.name else {}
    context = Context(context.image_root, hints=_without_differences(hints))
    fields = restored(kind.from_row(row, context), hints)
    if not extras:
        return {name: value for name, value in fields.items() if name in kind.columns}
    defaults = {name: row.get(name, _UNKNOWN) for name in kind.made_up}
    as_placed = replace(context, defaults=defaults | ({"kind": row["kind"]} if "kind" in row else {}))
    if _text(read_row(Found("", fields, as_placed), kind)) == _text(row):
        return fields
    plain, _ = kind.to_row(fields, context)
    return {**fields, CARRIED: _text(differences(in_order(plain), row))}


def differences(plain: Row, wanted: Row) -> Row:
    """What `restored` needs to make one row out of another; empty if they are the same to the last byte.

    >>> differences({"image": "a.png", "id": "1"}, {"image": ["a.png"]})
    {'set': {'image': ['53b5fe1e', ['a.png']]}, 'unset': {'id': '391552c0'}}
    """
    changed = {name: [_key(plain, name), wanted[name]] for name in wanted if _differs(plain, wanted, name)}
    gone = {name: _key(plain, name) for name in plain if name not in wanted}
    rest = [name for name in plain if name in wanted] + [name for name in changed if name not in plain]
    found = {"set": changed, "unset": gone, "order": list(wanted) if rest != list(wanted) else []}
    return {name: value for name, value in found.items() if value}


def restored(plain: Row, found: Row) -> Row:
    """The row that `differences` was asked for, made from the plain one; a field that changed since stays as it is."""
    row = {name: value for name, value in plain.items() if found.get("unset", {}).get(name) != _key(plain, name)}
    for name, (was, value) in found.get("set", {}).items():
        if was == _key(plain, name):
            row[name] = value
    order = found.get("order", [])
    return {name: row[name] for name in order} if order and set(order) == set(row) else row


def _without_differences(memory: Row) -> Row:
    return {name: value for name, value in memory.items() if name not in ("format", *_DIFFERENCES)}


def _differs(plain: Row, wanted: Row, name: str) -> bool:
    return name not in plain or _text(plain[name]) != _text(wanted[name])


def _key(row: Row, name: str) -> str | None:
    """A short name for what a field holds; None if there is no such field."""
    return hashlib.sha256(_text(row[name]).encode()).hexdigest()[:8] if name in row else None


def _text(value: Any) -> str:
    return json.dumps(value)


def _parsed(carried: Any) -> Row:
    try:
        found = json.loads(carried)
        if found.keys() <= set(_DIFFERENCES):
            return found
    except (TypeError, ValueError, AttributeError):
        pass
    raise RefusedError(f"a column `{CARRIED}` that `mpo convert` did not write", carried)
