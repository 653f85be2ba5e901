"""The charts of the report: numbers in, one inline `<svg>` out that follows the page's light or dark theme."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from data_builders.records import Row
from mpo.pages.drawing import (
    BASELINE,
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    ON_FILL,
    ORANGE,
    PURPLE,
    beside,
    canvas,
    house_style,
    label,
    to_markup,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]

VERDICT_COLORS = {"correct": BLUE, "wrong": ORANGE, "no_answer": BASELINE}
KIND_COLORS = {"correctness": BLUE, "format": PURPLE, "dropout_ntp": GREEN}

MAX_KINDS = 16  # more rows than this make a chart that nobody reads; the table beside it has them all
_CHARACTER = 6.3 / 72  # inches that a character of a label takes at most, on average
_INTERVAL = 142 / 72  # inches for "+10.6 (+6.4 to +14.8)"


@dataclass(frozen=True)
class Line:
    """One labelled curve: `points` are (step, value), in order of steps."""

    label: str
    points: Points
    color: str
    dashed: bool = False


def percent(fraction: float) -> str:
    """A fraction as the report writes it.

    >>> percent(0.6119)
    '61.2%'
    """
    return f"{100 * fraction:.1f}%"


def points(fraction: float) -> str:
    """A difference of two fractions in percentage points, always with its sign.

    >>> points(0.058), points(-0.012), points(0.0)
    ('+5.8', '−1.2', '+0.0')
    """
    return f"{100 * fraction + 0.0:+.1f}".replace("-", "−")


def number(value: float, digits: int = 3) -> str:
    """A number with a real minus sign, and none before zero.

    >>> number(-1.5), number(-0.0001)
    ('−1.500', '0.000')
    """
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def model_colors(models: Sequence[str]) -> dict[str, str]:
    """One colour for each model: the first is the baseline and stays grey."""
    palette = [BLUE, ORANGE, GREEN, PURPLE]
    return {model: palette[(index - 1) % 4] if index else BASELINE for index, model in enumerate(models)}


def kinds_of(rows: Sequence[Row]) -> list[str]:
    """The sources that rows of an evaluation speak of: `all` first, then the kinds of question by size and name."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["source"]] = max(row["num"], sizes.get(row["source"], 0))
    return sorted(sizes, key=lambda source: (source != "all", -sizes[source], source))


def accuracy_chart(evaluation: Row, style: str) -> Markup:
    """Accuracy of every model by kind of question, with 95% intervals and the difference to the first model.

    Args:
        evaluation: What `evaluation.json` holds; fractions in 0..1.
        style: The style of answering that is drawn.
    """
    models = evaluation["models"]
    rows = {(row["source"], row["model"]): row for row in evaluation["accuracy"] if row["style"] == style}
    gains = {
        (row["source"], row["model"]): row
        for row in evaluation["differences"]
        if row["style"] == style and row["baseline"] == models[0]
    }
    kinds = kinds_of(list(rows.values()))[: MAX_KINDS + 1]
    said = [
        f"{_kind_name(kind)}: "
        + ", ".join(f"{m} {percent(rows[kind, m]['accuracy'])}" for m in models if (kind, m) in rows)
        for kind in kinds
    ]
    names = [label(_kind_name(kind)) for kind in kinds]
    named = 0.5 + _CHARACTER * max(len(_score_text(row)) for row in rows.values())
    with house_style("accuracy"):
        pitch = len(models) + 0.7
        right = named + (_INTERVAL if gains else 0)
        figure, axes = canvas(9.6, 0.23 * pitch * len(kinds) + 0.3, left=_room(names), right=right)
        for place, kind in enumerate(kinds):
            for offset, model in enumerate(models):
                if (kind, model) in rows:
                    height = place * pitch + offset
                    color = model_colors(models)[model]
                    _draw_interval(axes, height, rows[kind, model], color, baseline=model == models[0])
                    _draw_gain(axes, height, gains.get((kind, model)), named)
        axes.set_yticks([place * pitch + (len(models) - 1) / 2 for place in range(len(kinds))], names, color=INK)
        axes.get_yticklabels()[0].set_fontweight("bold" if kinds[0] == "all" else "normal")
        axes.set_ylim(len(kinds) * pitch - 0.85, -0.85)
        _percent_axis(axes, [row["low"] for row in rows.values()], [row["high"] for row in rows.values()])
        return to_markup(figure, "Accuracy by kind of question. " + "; ".join(said))


def _kind_name(kind: str) -> str:
    return "All questions" if kind == "all" else kind or "(no source)"


def _draw_interval(axes: "Axes", height: float, row: Row, color: str, *, baseline: bool) -> None:
    axes.plot([row["low"], row["high"]], [height, height], color=color, linewidth=2.2, alpha=0.55)
    fill = GRID if baseline else color
    axes.plot([row["accuracy"]], [height], "o", color=color, markersize=6.5, markerfacecolor=fill, markeredgewidth=1.6)
    weight = "normal" if baseline else "bold"
    beside(axes, height, 0.2, _score_text(row), color=MUTED if baseline else color, fontweight=weight)


def _score_text(row: Row) -> str:
    return f"{percent(row['accuracy'])}  {label(row['model'], 20)}"


def _draw_gain(axes: "Axes", height: float, row: Row | None, offset: float) -> None:
    if row is not None:
        certain = row["low"] > 0 or row["high"] < 0
        interval = f"({points(row['low'])} to {points(row['high'])})"
        beside(axes, height, offset, points(row["difference"]), color=INK if certain else MUTED, fontweight="bold")
        beside(axes, height, offset + 0.5, interval, color=INK if certain else MUTED)


def _percent_axis(axes: "Axes", lows: Sequence[float], highs: Sequence[float]) -> None:
    low, high = math.floor(10 * min(lows)) / 10, math.ceil(10 * max(highs)) / 10
    axes.set_xlim(low - 0.01, max(high, low + 0.1) + 0.01)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.grid(axis="x", color=GRID, linewidth=0.8)


def line_chart(name: str, lines: Sequence[Line], description: str) -> Markup:
    """Curves over training steps, each named at its right end; long logs also get their moving mean.

    Args:
        name: Tells the charts of one page apart.
        lines: What is drawn; a line without points is left out.
        description: What the chart shows, for those who do not see it.
    """
    drawn = [line for line in lines if line.points]
    with house_style(name):
        figure, axes = canvas(4.8, 3.0, left=0.5, right=1.3, bottom=0.42)
        for line in drawn:
            _draw_line(axes, line)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_xlabel("step")
        axes.margins(x=0.02, y=0.08)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=5, integer=True)
        _name_line_ends(axes, drawn)
        ends = ", ".join(f"{line.label} {number(line.points[-1][1])}" for line in drawn)
        return to_markup(figure, f"{description} At the last logged step: {ends}.")


def _draw_line(axes: "Axes", line: Line) -> None:
    steps, values = zip(*line.points, strict=True)
    smooth = moving_mean(values)
    dashes = (0, (4, 2)) if line.dashed else "-"
    marker = "o" if len(steps) == 1 else ""
    if smooth != list(values):
        axes.plot(steps, values, color=line.color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smooth, color=line.color, linewidth=1.9, linestyle=dashes, marker=marker, markersize=4)


def moving_mean(values: Sequence[float]) -> list[float]:
    """A centred mean over a twentieth of the log; logs of fewer than 40 entries stay as they are.

    >>> moving_mean([0.0, 1.0] * 30)[28:31]
    [0.6666666666666666, 0.3333333333333333, 0.6666666666666666]
    """
    reach = len(values) // 40
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _name_line_ends(axes: "Axes", lines: Sequence[Line]) -> None:
    """Labels at the right ends of the curves, moved apart where curves end close together."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    ends = sorted(
        ((moving_mean([value for _, value in line.points])[-1], line) for line in lines), key=lambda end: end[0]
    )
    heights: list[float] = []
    for value, _ in ends:
        heights.append(max(value, heights[-1] + gap) if heights else value)
    shift = max(0.0, heights[-1] - high) if heights else 0.0
    for height, (_, line) in zip(heights, ends, strict=True):
        text = f"{line.label} {number(line.points[-1][1], 2)}"
        beside(axes, height - shift, 0.09, text, color=line.color, fontweight="bold")


def verdict_chart(counts: Mapping[str, Mapping[str, int]]) -> Markup:
    """Shares of correct, wrong and unreadable responses by source, with the counts in the bars.

    Args:
        counts: Source -> verdict -> number of responses. Beyond 16 sources the smallest are drawn as one.
    """
    return _shares_chart("verdicts", counts, VERDICT_COLORS, "Verdicts by source.", "responses")


def kind_chart(counts: Mapping[str, Mapping[str, int]]) -> Markup:
    """Shares of the kinds of pairs by source, with the counts in the bars.

    Args:
        counts: Source -> kind -> number of pairs. Beyond 16 sources the smallest are drawn as one.
    """
    return _shares_chart("kinds", counts, KIND_COLORS, "Kinds of pairs by source.", "pairs")


def _shares_chart(
    name: str, counts: Mapping[str, Mapping[str, int]], colors: Mapping[str, str], description: str, unit: str
) -> Markup:
    rows = _largest(counts, colors)
    names = [label(_kind_name(source)) for source, _ in rows]
    with house_style(name):
        figure, axes = canvas(9.6, 0.36 * len(rows) + 0.3, left=_room(names), right=1.3)
        for height, (_, numbers) in enumerate(rows):
            _draw_shares(axes, height, numbers, colors)
            beside(axes, height, 0.15, f"{sum(numbers.values()):,} {unit}", color=MUTED)
        axes.set_yticks(range(len(rows)), names, color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        said = (
            f"{_kind_name(source)}: " + ", ".join(f"{n} {v}" for v, n in numbers.items()) for source, numbers in rows
        )
        return to_markup(figure, f"{description} {'; '.join(said)}")


def _largest(
    counts: Mapping[str, Mapping[str, int]], colors: Mapping[str, str]
) -> list[tuple[str, Mapping[str, int]]]:
    rows = sorted(counts.items(), key=lambda row: (-sum(row[1].values()), row[0]))
    if len(rows) <= MAX_KINDS:
        return rows
    rest = rows[MAX_KINDS - 1 :]
    together = {key: sum(numbers.get(key, 0) for _, numbers in rest) for key in colors}
    return [*rows[: MAX_KINDS - 1], (f"{len(rest):,} more sources", together)]


def _draw_shares(axes: "Axes", height: float, numbers: Mapping[str, int], colors: Mapping[str, str]) -> None:
    total, left = sum(numbers.values()), 0.0
    for key, color in colors.items():
        share = numbers.get(key, 0) / total
        axes.barh(height, share, left=left, height=0.68, color=color, edgecolor="none")
        text = f"{numbers.get(key, 0):,}"
        if share > 0.012 * len(text) + 0.01:
            middle = left + share / 2
            axes.text(middle, height, text, color=ON_FILL, ha="center", va="center_baseline", fontweight="bold")
        left += share


def _room(names: Sequence[str]) -> float:
    """Inches that names to the left of a plot need."""
    return 0.2 + _CHARACTER * max(len(name) for name in names)
