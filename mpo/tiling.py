"""Dynamic image splitting: how a picture of any size becomes views that an encoder of fixed size can read.

Two published rules, as plans that know sizes only: MM1.5's (the aspect is kept, the rest is padding) and InternVL's
(the picture is stretched to the closest aspect ratio). `Tiling` adds the rule for several pictures, `tile_image` cuts,
`tile_row` makes a row of training data of it, and `convert_boxes` carries boxes in texts from frame to frame.

Sizes are (width, height) and boxes (x1, y1, x2, y2), in pixels; grids are (rows, columns). Views are numbered from 0:
the tiles row by row, then the overview. Pillow is needed only where pictures are cut, torch nowhere.
Sources: McKinzie et al. 2024, "MM1.5", https://arxiv.org/abs/2409.20566, section on dynamic image splitting;
Chen et al. 2024, "How Far Are We to GPT-4V?" (InternVL 1.5), https://arxiv.org/abs/2404.16821.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data_builders.records import InputError, Row

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
Box = tuple[float, float, float, float]
Indicator = Literal["none", "index", "seps"]
Units = Literal["pixels", "0-1", "0-999", "0-1000"]

MEAN_COLOR = (123, 117, 104)
"""What padding is filled with: the mean that CLIP's normalisation takes away (0.481, 0.458, 0.408)."""
_WHOLE_FROM = 3  # MM1.5 splits pictures only in samples with fewer than so many
_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}
_STEPS = {"0-1": 1, "0-999": 999, "0-1000": 1000}
_NUMBER = r"\s*(-?(?:[0-9]{1,7}(?:\.[0-9]{1,12})?|\.[0-9]{1,12}))\s*"
_BOX = re.compile(f"<{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}>")


@dataclass(frozen=True)
class TilingPlan:
    """How one picture becomes views; made by `plan_mm1_5` and `plan_internvl`.

    Args:
        width: Of the original picture, in pixels.
        height: Of the original picture, in pixels.
        rows: Of the grid of tiles (n_h).
        columns: Of the grid of tiles (n_w).
        side: Of a view, in pixels; views are square.
        resized: The size that the picture is resized to before it is cut.
        padding: Pixels added left, above, right and below of it, which make it the size of the grid.
        stretched: Whether the overview fills its view, as InternVL's; if not, it keeps its aspect and is padded.
        tokens_per_view: Image tokens of a view in the language model.
    """

    width: int
    height: int
    rows: int
    columns: int
    side: int
    resized: Size
    padding: tuple[int, int, int, int]
    stretched: bool
    tokens_per_view: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the grid, without the overview."""
        return self.rows * self.columns

    @property
    def overview(self) -> int | None:
        """The number of the view that shows the whole picture: always the last; None where the only tile does."""
        return self.num_tiles if self.num_tiles > 1 else None

    @property
    def num_views(self) -> int:
        """Tiles and overview."""
        return self.num_tiles + (self.overview is not None)

    @property
    def tokens(self) -> int:
        """Image tokens of all views."""
        return self.tokens_per_view * self.num_views

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Each tile in the resized and padded picture, row by row."""
        side = self.side
        corners = [(column * side, row * side) for row in range(self.rows) for column in range(self.columns)]
        return [(x, y, x + side, y + side) for x, y in corners]

    @property
    def original_boxes(self) -> list[Box]:
        """What each tile shows of the original picture; a box without area for a tile that holds padding alone."""
        whole, corners = Frame(), (0, 0, self.side, self.side)
        limits = (self.width, self.height, self.width, self.height)
        shown = [convert_box(corners, self, Frame(tile), whole) for tile in range(self.num_tiles)]
        return [tuple(min(max(x, 0), end) for x, end in zip(box, limits, strict=True)) for box in shown]


@dataclass(frozen=True)
class Tiling:
    """A rule and its settings. A model should see the tiles it was trained with: keep `asdict(tiling)` beside it.

    With MM1.5, `n_min` 1 in place of 4 at inference alone takes grounding from 74.0 to 24.5.

    Args:
        rule: `mm1_5` or `internvl`.
        n_min: The fewest tiles of a picture, without the overview (MM1.5: 4, InternVL: 1).
        n_max: The most tiles of a picture, without the overview (MM1.5: 9, 16 for large pictures; InternVL: 12).
        indicator: The text that says where a view lies; see `indicators`.
        side: Of a view, in pixels; None: the rule's own.
        tokens_per_view: Image tokens of a view; None: the rule's own.
    """

    rule: Literal["mm1_5", "internvl"]
    n_min: int
    n_max: int
    indicator: Indicator = "none"
    side: int | None = None
    tokens_per_view: int | None = None

    def __post_init__(self) -> None:
        _check_known("rule", self.rule, ("mm1_5", "internvl"))
        _check_known("indicator", self.indicator, ("none", "index", "seps"))
        _check_counts(self.n_min, self.n_max)

    def plans(self, sizes: list[Size]) -> list[TilingPlan]:
        """One plan for each picture of a sample.

        MM1.5 splits only in samples with fewer than 3 pictures; InternVL's pictures share `n_max`, with at least one
        tile each.

        >>> [plan.tokens for plan in Tiling("mm1_5", n_min=4, n_max=9).plans([(2016, 2016)] * 2)]
        [1440, 1440]
        >>> [plan.tokens for plan in Tiling("mm1_5", n_min=4, n_max=9).plans([(2016, 2016)] * 3)]
        [144, 144, 144]
        """
        given = {"side": self.side, "tokens_per_view": self.tokens_per_view}
        given = {name: value for name, value in given.items() if value is not None}
        if self.rule == "mm1_5":
            n_min, n_max = (self.n_min, self.n_max) if len(sizes) < _WHOLE_FROM else (1, 1)
            return [plan_mm1_5(*size, n_min=n_min, n_max=n_max, **given) for size in sizes]
        share = max(1, self.n_max // max(1, len(sizes)))
        return [plan_internvl(*size, min_tiles=min(self.n_min, share), max_tiles=share, **given) for size in sizes]


def plan_mm1_5(
    width: int, height: int, *, side: int = 672, n_min: int, n_max: int, tokens_per_view: int = 144
) -> TilingPlan:
    """MM1.5's dynamic splitting: the grid that holds the picture with the least padding, its aspect kept.

    The picture is scaled, up or down, until it just fits a grid. Among grids that need no scaling down, the one with
    the least padding is taken; if all do, the one that scales down least. Of equals, the one with the fewest tiles,
    then with the fewest rows. The comparison is exact; only `resized` is rounded. The picture lies in the middle.

    Args:
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        side: Of a tile, in pixels.
        n_min: The fewest tiles, without the overview.
        n_max: The most tiles, without the overview.
        tokens_per_view: Image tokens of a tile, and of the overview.

    Raises:
        InputError: A number is not positive, or `n_min` is above `n_max`.

    >>> plan = plan_mm1_5(1344, 1000, n_min=4, n_max=9)
    >>> (plan.rows, plan.columns), plan.resized, plan.padding, plan.tokens
    ((2, 3), (1806, 1344), (105, 0, 105, 0), 1008)
    """
    _check_sizes(width=width, height=height, side=side, tokens_per_view=tokens_per_view)
    _check_counts(n_min, n_max)

    def cost(grid: tuple[int, int]) -> tuple[Any, ...]:
        scale, tiles = _scale(width, height, grid, side), grid[0] * grid[1]
        padding = tiles * side**2 - scale**2 * width * height
        return (scale < 1, padding if scale >= 1 else -scale, tiles, grid)

    rows, columns = min(_grids(n_min, n_max), key=cost)
    resized, padding = _placed(width, height, (rows, columns), side)
    return TilingPlan(width, height, rows, columns, side, resized, padding, False, tokens_per_view)


def plan_internvl(
    width: int, height: int, *, side: int = 448, min_tiles: int = 1, max_tiles: int = 12, tokens_per_view: int = 256
) -> TilingPlan:
    """InternVL's tiling: the picture is stretched to the grid with the closest aspect ratio.

    Grids are looked at by their number of tiles, then of columns. One that is just as close as the best so far takes
    its place if the picture has more than half of its pixels. Ratios are compared in floating point, as the released
    code and transformers do: their roundings decide some ties.

    Args:
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        side: Of a tile, in pixels.
        min_tiles: The fewest tiles, without the overview.
        max_tiles: The most tiles, without the overview.
        tokens_per_view: Image tokens of a tile, and of the overview.

    Raises:
        InputError: A number is not positive, or `min_tiles` is above `max_tiles`.

    >>> plan = plan_internvl(4000, 3000)
    >>> (plan.rows, plan.columns), plan.resized, plan.tokens
    ((3, 4), (1792, 1344), 3328)
    """
    _check_sizes(width=width, height=height, side=side, tokens_per_view=tokens_per_view)
    _check_counts(min_tiles, max_tiles)
    best, closest = (1, 1), float("inf")
    for rows, columns in sorted(_grids(min_tiles, max_tiles), key=lambda grid: (grid[0] * grid[1], grid[1])):
        distance = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * side * side * rows * columns
        if distance < closest or (distance == closest and large_enough):
            best, closest = (rows, columns), distance
    resized = (best[1] * side, best[0] * side)
    return TilingPlan(width, height, *best, side, resized, (0, 0, 0, 0), True, tokens_per_view)


def indicators(plan: TilingPlan, number: int, style: Indicator) -> list[str]:
    """The text that stands before each view of a picture.

    Args:
        plan: Of the picture.
        number: Of the picture in its sample (k), from 1.
        style: `index` gives (k,i,j) for the tile in row i and column j, from 1, and (k,0,0) for the overview; a
            picture that is not split has its one tile (k,1,1). `seps` puts `,` between columns, `<n>` between rows and
            `:` before the overview. `none` gives no text.

    >>> indicators(plan_mm1_5(1344, 1344, n_min=4, n_max=9), 1, "index")
    ['(1,1,1)', '(1,1,2)', '(1,2,1)', '(1,2,2)', '(1,0,0)']
    >>> indicators(plan_mm1_5(1344, 1344, n_min=4, n_max=9), 1, "seps")
    ['', ',', '<n>', ',', ':']
    """
    if style == "none":
        return [""] * plan.num_views
    places = [(row, column) for row in range(1, plan.rows + 1) for column in range(1, plan.columns + 1)]
    overview = plan.overview is not None
    if style == "index":
        return [f"({number},{row},{column})" for row, column in places + [(0, 0)] * overview]
    between = ["," if column > 1 else "<n>" for _, column in places[1:]]
    return ["", *between, *[":"] * overview]


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
    return tiles if plan.overview is None else [*tiles, _on_canvas(image, *_overview_placed(plan), fill)]


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


@dataclass(frozen=True)
class Frame:
    """What coordinates refer to.

    Args:
        view: The number of a view; None: the original picture.
        units: Pixels, or shares of the frame's width and height on a scale from 0 at the left (upper) edge to 1, 999
            or 1000 at the right (lower) one.
    """

    view: int | None = None
    units: Units = "pixels"

    def __post_init__(self) -> None:
        _check_known("units", self.units, ("pixels", *_STEPS))


def convert_box(box: Box, plan: TilingPlan, source: Frame, target: Frame) -> Box:
    """A box in another frame, not rounded.

    Args:
        box: In `source`.
        plan: Of the picture.
        source: What the box refers to.
        target: What it shall refer to. A box that is not in that tile keeps its place, outside of it.

    Raises:
        InputError: The plan has no such view, or shares of the original picture exceed their scale.

    >>> convert_box((700, 10, 800, 20), plan_mm1_5(1344, 1344, n_min=4, n_max=4), Frame(), Frame(view=1))
    (28.0, 10.0, 128.0, 20.0)
    """
    start, end = _axes(plan, source.view) * 2, _axes(plan, target.view) * 2
    if source.view is None and max(box) > _STEPS.get(source.units, float("inf")):
        raise InputError(
            f"the box {box} exceeds the scale {source.units} of its picture of {plan.width} x {plan.height}: it is "
            "most likely in other units. Give the source's `units`."
        )
    return tuple(
        after.share(after.from_original(before.to_original(before.pixels(x, source.units))), target.units)
        for x, before, after in zip(box, start, end, strict=True)
    )


def convert_boxes(text: str, plan: TilingPlan, source: Frame, target: Frame) -> str:
    """A text whose boxes `<x1,y1,x2,y2>` are in another frame; nothing else in it changes.

    Coordinates are rounded to whole numbers, on the scale 0-1 to thousandths.

    Args:
        text: Of a question or a response.
        plan: Of the picture that its boxes refer to.
        source: What they refer to.
        target: What they shall refer to.

    Raises:
        InputError: As `convert_box`.

    >>> plan = plan_mm1_5(1344, 1344, n_min=4, n_max=4)
    >>> convert_boxes("the dog <700,10,800,20>", plan, Frame(), Frame(units="0-999"))
    'the dog <520,7,595,15>'
    """

    def converted(found: re.Match[str]) -> str:
        box = convert_box(tuple(float(x) for x in found.groups()), plan, source, target)
        return f"<{','.join(_written(x, target.units) for x in box)}>"

    return _BOX.sub(converted, text)


class _Axis(NamedTuple):
    """Where a picture lies along one axis of a frame: `scaled` pixels of its `length`, from `offset`, of `extent`."""

    length: int
    scaled: int
    offset: int
    extent: int

    def to_original(self, x: float) -> float:
        return (x - self.offset) * self.length / self.scaled

    def from_original(self, x: float) -> float:
        return x * self.scaled / self.length + self.offset

    def pixels(self, x: float, units: Units) -> float:
        return x if units == "pixels" else x * self.extent / _STEPS[units]

    def share(self, x: float, units: Units) -> float:
        return x if units == "pixels" else x * _STEPS[units] / self.extent


def _axes(plan: TilingPlan, view: int | None) -> tuple[_Axis, _Axis]:
    """The horizontal and the vertical axis of a view."""
    width, height, side = plan.width, plan.height, plan.side
    if view is None:
        return _Axis(width, width, 0, width), _Axis(height, height, 0, height)
    if not 0 <= view < plan.num_views:
        raise InputError(f"there is no view {view}: the plan has {plan.num_views}, numbered from 0.")
    x, y = (0, 0) if view == plan.overview else plan.boxes[view][:2]
    resized, padding = _overview_placed(plan) if view == plan.overview else (plan.resized, plan.padding)
    return _Axis(width, resized[0], padding[0] - x, side), _Axis(height, resized[1], padding[1] - y, side)


def _written(x: float, units: Units) -> str:
    return f"{round(x, 3) + 0.0:.3f}" if units == "0-1" else str(round(x))  # + 0.0: no minus before a zero


def _grids(n_min: int, n_max: int) -> list[tuple[int, int]]:
    """All (rows, columns) with so many tiles."""
    sides = range(1, n_max + 1)
    return [(rows, columns) for rows in sides for columns in sides[: n_max // rows] if rows * columns >= n_min]


def _scale(width: int, height: int, grid: tuple[int, int], side: int) -> Fraction:
    """By how much a picture grows that just fits a grid, its aspect kept."""
    return min(Fraction(grid[1] * side, width), Fraction(grid[0] * side, height))


def _placed(width: int, height: int, grid: tuple[int, int], side: int) -> tuple[Size, tuple[int, int, int, int]]:
    """The size of a picture that just fits a grid, and the padding around it when it lies in the middle."""
    scale = _scale(width, height, grid, side)
    resized = max(1, round(scale * width)), max(1, round(scale * height))
    rest = grid[1] * side - resized[0], grid[0] * side - resized[1]
    left, above = rest[0] // 2, rest[1] // 2
    return resized, (left, above, rest[0] - left, rest[1] - above)


def _overview_placed(plan: TilingPlan) -> tuple[Size, tuple[int, int, int, int]]:
    if plan.stretched:
        return (plan.side, plan.side), (0, 0, 0, 0)
    return _placed(plan.width, plan.height, (1, 1), plan.side)


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


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"tiling: `{name}` must be one of {', '.join(known)}, got {value!r}.")


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value <= 0:
            raise InputError(
                f"tiling: `{name}` must be at least 1, got {value}. Is the picture empty, or a setting off?"
            )


def _check_counts(n_min: int, n_max: int) -> None:
    if n_min < 1 or n_max < n_min:
        raise InputError(
            f"tiling: the fewest tiles of a picture are {n_min} and the most are {n_max}: the fewest must be at least "
            "1, and the most no fewer. Are the two swapped?"
        )
