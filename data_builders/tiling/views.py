"""Cuts pictures into the views of their plan, in rows of training data too.

Pillow is needed only where pictures are cut.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.records import InputError, Row
from data_builders.shards import write_text
from data_builders.tiling.plans import Indicator, Size, Tiling, TilingPlan, indicators, overview_placed

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN_COLOR = (123, 117, 104)
"""What padding is filled with: the mean that CLIP's normalisation takes away (0.481, 0.458, 0.408)."""
TILING_FILE = "tiling.json"
"""Where a model's folder says how its pictures are cut."""

_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}


def tile_image(image: "Image", plan: TilingPlan, *, fill: tuple[int, int, int] = MEAN_COLOR) -> "list[Image]":
    """Cuts a picture into the views of its plan: the tiles row by row, then the overview.

    Tiles and overview are each resized from the original picture, bicubically as InternVL does.

    Args:
        image: Of the size that the plan was made for.
        plan: What to cut.
        fill: The colour of the padding (red, green, blue).

    Returns:
        Pictures in RGB of `plan.side` x `plan.side` pixels.

    Raises:
        InputError: The picture has another size than the plan.
    """
    if image.size != (plan.width, plan.height):
        raise InputError(
            f"the picture has {image.width} x {image.height} pixels and its plan is for {plan.width} x {plan.height}: "
            "make the plan from the picture as it is loaded, after it was turned as its EXIF data says."
        )
    image = image.convert("RGB")
    grid = _on_canvas(image, plan.resized, plan.padding, fill)
    tiles = [grid.crop(box) for box in plan.boxes]
    return tiles if plan.overview is None else [*tiles, _on_canvas(image, *overview_placed(plan), fill)]


def tile_row(row: Row, load: Callable[[Any], "Image"], tiling: Tiling) -> Row:
    """A row whose pictures are tiles, for any model that takes several pictures.

    Every place for a picture in the prompt becomes the places of its views, each after its indicator. Boxes in texts
    are left as they are, in the frame of the original picture.

    Args:
        row: With `images` (or `image`) and `prompt` or `messages`: a string, or messages whose content is a string or
            typed parts. Without places the pictures come first in the first user's message.
        load: Gives the picture of an element of `images`, such as `partial(load_image, root)`.
        tiling: The rule.

    Returns:
        The row with all views in `images`, and messages in typed parts. Strings in `prompt`, `chosen`, `rejected` and
        `completion` become a user's turn and an assistant's.

    Raises:
        InputError: There is no prompt, or it has more or fewer places than the row has pictures.

    >>> from PIL import Image
    >>> from data_builders.tiling.plans import Tiling
    >>> row = {"images": ["a.png"], "prompt": "What is this?"}
    >>> tiled = tile_row(row, lambda name: Image.new("RGB", (900, 400)), Tiling("internvl", 1, 12, "seps"))
    >>> len(tiled["images"]), [part.get("text", "image") for part in tiled["prompt"][0]["content"]]
    (3, ['image', ',', 'image', ':', 'image', 'What is this?'])
    """
    images = row.get("images") or ([] if row.get("image") is None else [row["image"]])
    pictures = [load(image) for image in images]
    plans = tiling.plans([picture.size for picture in pictures])
    views = [view for picture, plan in zip(pictures, plans, strict=True) for view in tile_image(picture, plan)]
    parts = [list(_view_parts(plan, number, tiling.indicator)) for number, plan in enumerate(plans, 1)]
    turns = {name: _turn(name, value) for name, value in row.items() if name != "image"}
    key = "prompt" if turns.get("prompt") is not None else "messages"
    return {**turns, "images": views, key: _with_views(turns.get(key), parts, f"row {row.get('id', '?')!r}")}


def tile_batch(batch: dict[str, list[Any]], load: Callable[[Any], "Image"], tiling: Tiling) -> dict[str, list[Any]]:
    """`tile_row` for columns of rows, as `datasets.Dataset.with_transform` asks: pictures are cut when they are read.

    Args:
        batch: Columns of one length.
        load: As in `tile_row`; `datasets` gives decoded pictures, for which it is `lambda picture: picture`.
        tiling: The rule.
    """
    columns = zip(*batch.values(), strict=True)
    rows = [tile_row(dict(zip(batch, values, strict=True)), load, tiling) for values in columns]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else batch)}


def _on_canvas(
    image: "Image", resized: Size, padding: tuple[int, int, int, int], fill: tuple[int, int, int]
) -> "Image":
    from PIL import Image

    left, above, right, below = padding
    canvas = Image.new("RGB", (left + resized[0] + right, above + resized[1] + below), fill)
    canvas.paste(image.resize(resized, Image.Resampling.BICUBIC), (left, above))
    return canvas


def _view_parts(plan: TilingPlan, number: int, style: Indicator) -> Iterator[Row]:
    for text in indicators(plan, number, style):
        if text:
            yield {"type": "text", "text": text}
        yield {"type": "image"}


def _turn(name: str, value: Any) -> Any:
    return [{"role": _ROLES[name], "content": value}] if name in _ROLES and isinstance(value, str) else value


def _with_views(messages: Any, parts: list[list[Row]], where: str) -> list[Row]:
    """The messages with the parts of each picture's views where its place was."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(
            f"{where}: a row to tile needs a `prompt` (a string or a list of messages) or a list of `messages`, got "
            f"{messages!r:.80}."
        )
    if not _num_places(messages):
        messages = _with_places_first(messages, len(parts))
    num_places = _num_places(messages)
    if num_places != len(parts):
        raise InputError(
            f'{where}: the prompt has {num_places} places for images ({{"type": "image"}}), and the row has '
            f"{len(parts)}. Make them as many, or leave the places out of all messages: the images then come first."
        )
    views = iter(parts)

    def replaced(message: Row) -> Row:
        if message.get("content") is None:  # a call of a tool
            return message
        lists = [next(views) if _is_place(part) else [part] for part in _content(message)]
        return {**message, "content": [part for parts in lists for part in parts]}

    return [replaced(message) for message in messages]


def _with_places_first(messages: list[Row], count: int) -> list[Row]:
    """As TRL does: before the text of the first user's message, if that is a string."""
    for place, message in enumerate(messages):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            content = [{"type": "image"}] * count + _content(message)
            return [*messages[:place], {**message, "content": content}, *messages[place + 1 :]]
    return messages


def _num_places(messages: list[Row]) -> int:
    return sum(_is_place(part) for message in messages for part in _content(message))


def _content(message: Row) -> list[Any]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


def _is_place(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def save_tiling(tiling: Tiling, folder: Path) -> None:
    """Writes down, beside a model, how the pictures that it was trained on were cut."""
    write_text(folder / TILING_FILE, json.dumps(asdict(tiling), indent=1) + "\n")


def load_tiling(folder: str | Path | None) -> Tiling | None:
    """How the pictures of a model are cut; None where its folder says nothing, and for what is no folder.

    Raises:
        InputError: The file is broken.
    """
    if not folder or not (path := Path(folder) / TILING_FILE).is_file():
        return None
    try:
        return Tiling(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not say how pictures are cut ({error!s:.200}): copy it again from the model's folder, or "
            "delete it if the model was trained on whole pictures."
        ) from error
