"""How a picture of any size becomes views of one size, as plans that know sizes only.

Two published rules: MM1.5's (the aspect is kept, the rest is padding) and InternVL's (the picture is stretched to the
closest aspect ratio). `Tiling` adds the rule for several pictures.

Sizes are (width, height) and boxes (x1, y1, x2, y2), in pixels; grids are (rows, columns). Views are numbered from 0:
the tiles row by row, then the overview.
Sources: McKinzie et al. 2024, "MM1.5", https://arxiv.org/abs/2409.20566, section on dynamic image splitting;
Chen et al. 2024, "How Far Are We to GPT-4V?" (InternVL 1.5), https://arxiv.org/abs/2404.16821.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from data_builders.records import InputError

Size = tuple[int, int]
Box = tuple[float, float, float, float]
Indicator = Literal["none", "index", "seps"]

_WHOLE_FROM = 3  # MM1.5 splits pictures only in samples with fewer than so many


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
        found = []
        for tile in range(self.num_tiles):
            across, down = axes(self, tile)
            corners = zip((0, 0, self.side, self.side), (across, down, across, down), strict=True)
            found.append(tuple(min(max(axis.to_original(x), 0), axis.length) for x, axis in corners))
        return found


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
        check_known("rule", self.rule, ("mm1_5", "internvl"))
        check_known("indicator", self.indicator, ("none", "index", "seps"))
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

    rows, columns = min(tile_grids(n_min, n_max), key=cost)
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
    for rows, columns in sorted(tile_grids(min_tiles, max_tiles), key=lambda grid: (grid[0] * grid[1], grid[1])):
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


def tile_grids(n_min: int, n_max: int) -> list[tuple[int, int]]:
    """All grids (rows, columns) of so many tiles."""
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


def overview_placed(plan: TilingPlan) -> tuple[Size, tuple[int, int, int, int]]:
    """The size of the picture in the overview, and the padding around it."""
    if plan.stretched:
        return (plan.side, plan.side), (0, 0, 0, 0)
    return _placed(plan.width, plan.height, (1, 1), plan.side)


class Axis(NamedTuple):
    """Where a picture lies along one axis of a frame: `scaled` pixels of its `length`, from `offset`, of `extent`."""

    length: int
    scaled: int
    offset: int
    extent: int

    def to_original(self, x: float) -> float:
        """A place in the frame, in pixels, as one in the original picture."""
        return (x - self.offset) * self.length / self.scaled

    def from_original(self, x: float) -> float:
        """A place in the original picture, in pixels, as one in the frame."""
        return x * self.scaled / self.length + self.offset


def axes(plan: TilingPlan, view: int | None) -> tuple[Axis, Axis]:
    """The horizontal and the vertical axis of a view."""
    width, height, side = plan.width, plan.height, plan.side
    if view is None:
        return Axis(width, width, 0, width), Axis(height, height, 0, height)
    if not 0 <= view < plan.num_views:
        raise InputError(f"there is no view {view}: the plan has {plan.num_views}, numbered from 0.")
    x, y = (0, 0) if view == plan.overview else plan.boxes[view][:2]
    resized, padding = overview_placed(plan) if view == plan.overview else (plan.resized, plan.padding)
    return Axis(width, resized[0], padding[0] - x, side), Axis(height, resized[1], padding[1] - y, side)


def check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuses a setting that is none of those there are."""
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
