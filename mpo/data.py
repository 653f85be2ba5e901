"""Rows on disk <-> the columns that TRL's trainers take.

Pictures stay paths until a batch needs them: the columns are `datasets` features that decode on access.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.images import check_images, image_path
from data_builders.records import InputError, Pair, Row
from data_builders.shards import read_stage

if TYPE_CHECKING:
    from datasets import Dataset


def preference_dataset(sources: Iterable[str | Path], image_root: str | Path) -> "Dataset":
    """Pairs as TRL's conversational preference data: columns `images`, `prompt`, `chosen`, `rejected`.

    Args:
        sources: Files or folders of pair rows.
        image_root: The folder that image paths are relative to.

    Raises:
        InputError: There are no rows, a row is broken, or an image is missing or cannot be decoded.
    """
    rows = [row for source in sources for row in read_stage(Path(source), Pair)]
    columns = [
        {
            "images": row.get("images", []),
            "prompt": [_message("user", row["prompt"])],
            "chosen": [_message("assistant", row["chosen"])],
            "rejected": [_message("assistant", row["rejected"])],
        }
        for row in rows
    ]
    return _dataset(rows, columns, Path(image_root))


def sft_dataset(sources: Iterable[str | Path], image_root: str | Path) -> "Dataset":
    """Conversations as TRL's prompt-completion data: columns `images`, `prompt`, `completion`.

    Args:
        sources: Files or folders of rows with `images`, and `prompt` and `completion` as lists of messages.
        image_root: The folder that image paths are relative to.

    Raises:
        InputError: There are no rows, a row is broken, or an image is missing or cannot be decoded.
    """
    rows = [row for source in sources for row in read_stage(Path(source))]
    for number, row in enumerate(rows, 1):
        for key in ("prompt", "completion"):
            if not _is_conversation(row.get(key)):
                raise InputError(
                    f"SFT row {number} ({row.get('id', 'without id')}): `{key}` must be a list of messages such as "
                    f'[{{"role": "user", "content": "..."}}], got {row.get(key)!r:.80}.'
                )
        if not _is_list_of_paths(row.get("images") or []):
            raise InputError(
                f"SFT row {number} ({row.get('id', 'without id')}): `images` must be a list of paths such as "
                f'["a.png"], got {row["images"]!r:.80}.'
            )
    columns = [
        {"images": row.get("images") or [], "prompt": row["prompt"], "completion": row["completion"]} for row in rows
    ]
    return _dataset(rows, columns, Path(image_root))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )


def _is_list_of_paths(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _dataset(rows: list[Row], columns: list[Row], image_root: Path) -> "Dataset":
    from datasets import Dataset, Features, Image, List, Value

    check_images(rows, image_root)
    for row in columns:
        row["images"] = [str(image_path(image_root, name)) for name in row["images"]]
    turn = List({"role": Value("string"), "content": Value("string")})
    features = {name: List(Image(mode="RGB")) if name == "images" else turn for name in columns[0]}
    if not any(row["images"] for row in columns):  # TRL takes a data set with this column for a vision data set
        features.pop("images")
        columns = [{name: row[name] for name in features} for row in columns]
    return Dataset.from_list(columns, features=Features(features))
