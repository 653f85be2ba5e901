"""Training data of any source -> one dataset in the columns that TRL's trainers take.

`mpo.sources` opens files, folders and Hub data sets, `mpo.preferences` says what a row must be; here rows become
columns. JSON is turned into Arrow some rows at a time; a table whose columns fit stays where it is, memory-mapped.
Pictures stay paths or encoded bytes until a batch needs them: `datasets` decodes on access, turned as EXIF says.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Json, List, Value, concatenate_datasets

from data_builders.records import InputError, Row
from data_builders.shards import read_stage
from mpo.pictures import IMAGES, ImagePaths, num_images, table_images
from mpo.preferences import COLUMNS, RENDERED, preference, with_places, without_nulls
from mpo.sources import TAKEN, NumberedRow, open_source

_ROWS_AT_A_TIME = 2000
_STRING = Value("string")
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_MESSAGES_OF_PARTS = List(
    {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
)
_CONVERSATION = ("prompt", "completion", "messages")
_SHOWN = {_CONVERSATION[:2]: "prompt", _CONVERSATION[2:]: "messages"}  # by the shape of a row: where its pictures are
_MESSAGES_OF_ANY_KIND = List(Json())  # decodes to just the fields that were given


def preference_dataset(sources: Iterable[str | Path], image_root: str | Path) -> Dataset:
    """Preference data of any source as TRL's preference data: columns `images`, `prompt`, `chosen`, `rejected`.

    Taken are rows of `mpo pair` and TRL's preference format in all its shapes: strings or lists of messages, with an
    explicit prompt or one that `chosen` and `rejected` share, with `images` (a list), `image` (one) or neither. Images
    are paths under `image_root`, or encoded bytes in a Parquet file or a saved data set (the Hub's convention). Other
    columns are left out.

    Args:
        sources: JSONL, JSON or Parquet files, folders of JSONL shards or Parquet files, folders that
            `Dataset.save_to_disk` wrote, local copies of Hub data sets, or Hub ids (`org/name`, `org/name/config`);
            `:split` behind a folder or an id takes another split than train. They are read in this order.
        image_root: The folder that image paths are relative to.

    Returns:
        Conversations (lists of messages), or strings if all rows are strings without a `kind`, which TRL trains on
        without a chat template. Without any image there is no column `images`.

    Raises:
        InputError: A source cannot be read or has no rows, a row is broken, strings are mixed with conversations, or
            an image is missing or cannot be decoded.
    """
    images = ImagePaths(Path(image_root))
    formats: dict[str, str] = {}
    pieces: list[Dataset] = []
    for source in sources:
        opened = open_source(source)
        if isinstance(opened, Dataset):
            pieces += _table_pieces(opened, str(source), images, formats)
        else:
            pieces += _pieces(_preferences(opened, images, formats))
    images.check()
    return _joined(pieces, COLUMNS)


def sft_dataset(sources: Iterable[str | Path], image_root: str | Path) -> Dataset:
    """Conversations as TRL's SFT data: columns `images`, and `prompt` and `completion`, or `messages`, or all three.

    Args:
        sources: JSONL files, or folders of JSONL shards, of rows with `images`, and either `prompt` and `completion`
            or `messages`, as lists of messages. Pictures come first, or stand where typed parts have places for them.
        image_root: The folder that image paths are relative to.

    Raises:
        InputError: There are no rows, a row is broken, or an image is missing or cannot be decoded.
    """
    images = ImagePaths(Path(image_root))
    rows = (row for source in sources for row in read_stage(Path(source)))
    pieces = list(_pieces(_conversations(rows, images)))
    images.check()
    return _without_empty(_joined(pieces, _CONVERSATION))


def _preferences(rows: Iterable[NumberedRow], images: ImagePaths, formats: dict[str, str]) -> Iterator[Row]:
    for where, row in rows:
        names = _image_names(row, where)
        columns = preference(row, len(names), where)
        _check_alike(columns, where, formats)
        yield {"images": [images.file(name, str(row.get("id") or where)) for name in names], **columns}


def _image_names(row: Row, where: str) -> list[str]:
    if row.get("image") is not None and row.get("images"):
        raise InputError(f"{where}: has both `image` and `images`. Keep `images`, with all of the row's images.")
    names = (row.get("images") or []) if row.get("image") is None else [row["image"]]
    if not _is_list_of_paths(names):
        raise InputError(
            f'{where}: `images` must be a list of paths such as ["a.png"], or `image` one path, got {names!r:.80}.'
        )
    return names


def _check_alike(columns: Row, where: str, formats: dict[str, str]) -> None:
    """Remembers the first row of each format: a trainer takes the first row's format for that of all rows."""
    formats.setdefault("strings" if isinstance(columns["chosen"], str) else "messages", where)
    if len(formats) == 2:
        raise InputError(
            f"{formats['strings']} has strings and no `kind`, which TRL trains on without a chat template, and "
            f"{formats['messages']} is a conversation: one run takes one of the two. Write the strings as lists of "
            'messages such as [{"role": "user", "content": "..."}].'
        )


def _conversations(rows: Iterable[Row], images: ImagePaths) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        where = f"SFT row {number} ({row.get('id', 'without id')})"
        keys = _CONVERSATION[2:] if row.get("messages") is not None else _CONVERSATION[:2]
        for key in keys:
            if not _is_conversation(row.get(key), parts=key != "completion"):
                raise InputError(
                    f'{where}: `{key}` must be a list of messages such as [{{"role": "user", "content": "..."}}], got '
                    f"{row.get(key)!r:.80}."
                )
        names = row.get("images") or []
        if not _is_list_of_paths(names):
            raise InputError(f'{where}: `images` must be a list of paths such as ["a.png"], got {names!r:.80}.')
        paths = [images.file(name, str(row.get("id") or where)) for name in names]
        found = {name: row[name] if name in keys else None for name in _CONVERSATION}
        found[_SHOWN[keys]] = with_places(row[_SHOWN[keys]], len(names), where)
        yield {"images": paths, **found}


def _is_conversation(value: Any, *, parts: bool) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and (isinstance(message.get("content"), str) or (parts and _is_parts(message.get("content"))))
            for message in value
        )
    )


def _is_parts(content: Any) -> bool:
    """Whether it is text with places for pictures; text alone is a string."""
    if not isinstance(content, list) or {"type": "image"} not in content:
        return False
    return all(part == {"type": "image"} or _is_text(part) for part in content)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.keys() == {"type", "text"} and isinstance(part["text"], str)


def _is_list_of_paths(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _pieces(rows: Iterator[Row]) -> Iterator[Dataset]:
    """Rows as Arrow tables of some thousand each: 200,000 pairs take 0.6 GB so, and 4.3 GB as Python objects."""
    while batch := list(islice(rows, _ROWS_AT_A_TIME)):
        features = {name: _feature([row[name] for row in batch]) if name != "images" else IMAGES for name in batch[0]}
        yield Dataset.from_list(batch, features=Features(features))


def _feature(values: list[Any]) -> Value | List:
    if isinstance(values[0], str):
        return _STRING
    messages = (message for value in values if value is not None for message in value)
    plain = all(message.keys() == {"role", "content"} and isinstance(message["content"], str) for message in messages)
    return _MESSAGES if plain else _MESSAGES_OF_ANY_KIND


def _table_pieces(table: Dataset, source: str, images: ImagePaths, formats: dict[str, str]) -> Iterator[Dataset]:
    for name in ("chosen", "rejected"):
        if name not in table.column_names:
            raise InputError(
                f"{source} has no column `{name}`, but {', '.join(table.column_names) or 'none at all'}. Preference "
                "data has `prompt`, `chosen` and `rejected`; rename the columns."
            )
    if not len(table):
        raise InputError(f"{source} holds no row.")
    pictures = table_images(table, source, images)
    rows = _table_preferences(table, source, num_images(pictures), formats)
    if (features := _fitting(table)) is None:
        start = 0
        for piece in _pieces(rows):
            yield concatenate_datasets([piece, pictures.select(range(start, start + len(piece)))], axis=1)
            start += len(piece)
        return
    deque(rows, maxlen=0)
    kept = table.select_columns(list(features))
    text = Dataset(
        kept.data.cast(features.arrow_schema), info=DatasetInfo(features=features), fingerprint=kept._fingerprint
    )
    yield concatenate_datasets([text, pictures], axis=1)


def _table_preferences(table: Dataset, source: str, counts: list[int], formats: dict[str, str]) -> Iterator[Row]:
    names = [name for name in (*COLUMNS, *RENDERED, "id", "kind") if name in table.column_names]
    number = 0
    for batch in table.select_columns(names).iter(_ROWS_AT_A_TIME):
        for values in zip(*batch.values(), strict=True):
            number += 1
            where = f"{source}, row {number}"
            columns = preference(dict(zip(batch, values, strict=True)), counts[number - 1], where)
            _check_alike(columns, where, formats)
            yield columns


def _fitting(table: Dataset) -> Features | None:
    """The features of a table whose columns need no change but the order of their fields; None for others."""
    if "prompt" not in table.column_names or table.data.column("prompt").null_count or "kind" in table.column_names:
        return None
    wanted = (_STRING, _MESSAGES, _MESSAGES_OF_PARTS)
    features = {name: next((w for w in wanted if w == table.features[name]), None) for name in COLUMNS}
    alike = len({feature == _STRING for feature in features.values()}) == 1
    return Features(features) if alike and None not in features.values() else None


def _joined(pieces: list[Dataset], columns: tuple[str, ...]) -> Dataset:
    if not pieces:
        raise InputError(f"there is no training data: name at least one source. {TAKEN}.")
    for name in columns:
        if any(piece.features[name] != pieces[0].features[name] for piece in pieces):
            pieces = [_with_any_messages(piece, name) for piece in pieces]
    vision = any(pc.max(pc.list_value_length(piece.data.column("images"))).as_py() for piece in pieces)
    # TRL takes a data set with this column for a vision data set
    return concatenate_datasets(pieces).select_columns([*(["images"] if vision else []), *columns])


def _without_empty(dataset: Dataset) -> Dataset:
    """Without the columns that no row has anything in: a trainer looks at which ones there are."""
    empty = [name for name in dataset.column_names if dataset.data.column(name).null_count == len(dataset)]
    return dataset.remove_columns(empty)


def _with_any_messages(piece: Dataset, name: str) -> Dataset:
    """The piece with its messages in the feature that holds every kind of them."""
    if piece.features[name] == _MESSAGES_OF_ANY_KIND:
        return piece
    features = Features({name: _MESSAGES_OF_ANY_KIND})
    batches = (batch[name] for batch in piece.select_columns(name).iter(_ROWS_AT_A_TIME))
    texts = [
        Dataset.from_list([{name: value and without_nulls(value)} for value in batch], features=features)
        for batch in batches
    ]
    return concatenate_datasets([piece.remove_columns(name), concatenate_datasets(texts)], axis=1)
