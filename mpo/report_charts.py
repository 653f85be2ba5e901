"""The charts of the report: numbers in, one inline `<svg>` out that follows the page's light or dark theme.

Figures are drawn by matplotlib without its global state. A colour is drawn as a stand-in (`#000011`) and becomes a CSS
variable (`var(--series-1)`) in the SVG, so one drawing serves both themes. Names that come from data are never parsed
as TeX and are escaped by the XML writer. Needs matplotlib only where a chart is drawn.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

from data_builders.records import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

INK, MUTED, GRID, ON_FILL = "#000001", "#000002", "#000003", "#000004"
BASELINE, BLUE, ORANGE, GREEN, PURPLE = "#000010", "#000011", "#000012", "#000013", "#000014"
CSS_NAMES = {
    INK: "ink", MUTED: "muted", GRID: "line", ON_FILL: "on-fill",
    BASELINE: "baseline", BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple",
}  # fmt: skip
VERDICT_COLORS = {"correct": BLUE, "wrong": ORANGE, "no_answer": BASELINE}

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


def label(text: str, limit: int = 26) -> str:
    r"""A name from data as one short printable line: XML knows no control characters, and a chart no second line.

    >>> label("a chart\x00 question", limit=9)
    'a chart …'
    """
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


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
    with _house_style("accuracy"):
        pitch = len(models) + 0.7
        right = named + (_INTERVAL if gains else 0)
        figure, axes = _canvas(9.6, 0.23 * pitch * len(kinds) + 0.3, left=_room(names), right=right)
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
        return _to_markup(figure, "Accuracy by kind of question. " + "; ".join(said))


def _kind_name(kind: str) -> str:
    return "All questions" if kind == "all" else kind or "(no source)"


def _draw_interval(axes: "Axes", height: float, row: Row, color: str, *, baseline: bool) -> None:
    axes.plot([row["low"], row["high"]], [height, height], color=color, linewidth=2.2, alpha=0.55)
    fill = GRID if baseline else color
    axes.plot([row["accuracy"]], [height], "o", color=color, markersize=6.5, markerfacecolor=fill, markeredgewidth=1.6)
    weight = "normal" if baseline else "bold"
    _beside(axes, height, 0.2, _score_text(row), color=MUTED if baseline else color, fontweight=weight)


def _score_text(row: Row) -> str:
    return f"{percent(row['accuracy'])}  {label(row['model'], 20)}"


def _draw_gain(axes: "Axes", height: float, row: Row | None, offset: float) -> None:
    if row is not None:
        certain = row["low"] > 0 or row["high"] < 0
        interval = f"({points(row['low'])} to {points(row['high'])})"
        _beside(axes, height, offset, points(row["difference"]), color=INK if certain else MUTED, fontweight="bold")
        _beside(axes, height, offset + 0.5, interval, color=INK if certain else MUTED)


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
    with _house_style(name):
        figure, axes = _canvas(4.8, 3.0, left=0.5, right=1.3, bottom=0.42)
        for line in drawn:
            _draw_line(axes, line)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_xlabel("step")
        axes.margins(x=0.02, y=0.08)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=5, integer=True)
        _name_line_ends(axes, drawn)
        ends = ", ".join(f"{line.label} {number(line.points[-1][1])}" for line in drawn)
        return _to_markup(figure, f"{description} At the last logged step: {ends}.")


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
        _beside(axes, height - shift, 0.09, text, color=line.color, fontweight="bold")


def verdict_chart(counts: Mapping[str, Mapping[str, int]]) -> Markup:
    """Shares of correct, wrong and unreadable responses by source, with the counts in the bars.

    Args:
        counts: Source -> verdict -> number of responses. Beyond 16 sources the smallest are drawn as one.
    """
    rows = _largest(counts)
    names = [label(_kind_name(source)) for source, _ in rows]
    with _house_style("verdicts"):
        figure, axes = _canvas(9.6, 0.36 * len(rows) + 0.3, left=_room(names), right=1.3)
        for height, (_, numbers) in enumerate(rows):
            _draw_shares(axes, height, numbers)
        axes.set_yticks(range(len(rows)), names, color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        said = (
            f"{_kind_name(source)}: " + ", ".join(f"{n} {v}" for v, n in numbers.items()) for source, numbers in rows
        )
        return _to_markup(figure, "Verdicts by source. " + "; ".join(said))


def _largest(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, Mapping[str, int]]]:
    rows = sorted(counts.items(), key=lambda row: (-sum(row[1].values()), row[0]))
    if len(rows) <= MAX_KINDS:
        return rows
    rest = rows[MAX_KINDS - 1 :]
    together = {verdict: sum(numbers.get(verdict, 0) for _, numbers in rest) for verdict in VERDICT_COLORS}
    return [*rows[: MAX_KINDS - 1], (f"{len(rest)} more sources", together)]


def _draw_shares(axes: "Axes", height: float, numbers: Mapping[str, int]) -> None:
    total, left = sum(numbers.values()), 0.0
    for verdict, color in VERDICT_COLORS.items():
        share = numbers.get(verdict, 0) / total
        axes.barh(height, share, left=left, height=0.68, color=color, edgecolor="none")
        text = f"{numbers.get(verdict, 0):,}"
        if share > 0.012 * len(text) + 0.01:
            middle = left + share / 2
            axes.text(middle, height, text, color=ON_FILL, ha="center", va="center_baseline", fontweight="bold")
        left += share
    _beside(axes, height, 0.15, f"{total:,} responses", color=MUTED)


def _room(names: Sequence[str]) -> float:
    """Inches that names to the left of a plot need."""
    return 0.2 + _CHARACTER * max(len(name) for name in names)


@contextmanager
def _house_style(name: str) -> Iterator[None]:
    """What all charts share. The salt makes ids differ between charts and be the same in every run."""
    import matplotlib

    settings = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "text.usetex": False,
        "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.unicode_minus": True,
        "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": GRID,
        "xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 6, "ytick.major.pad": 8,
        "axes.axisbelow": True, "lines.solid_capstyle": "round",
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has its own fonts
        yield


def _canvas(width: float, height: float, *, left: float, right: float, bottom: float = 0.24) -> "tuple[Figure, Axes]":
    """A figure of `width` x `height` inches with one bare plot; the margins are kept for text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="none")
    top = 0.06
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    axes = figure.add_axes(box, facecolor="none")
    axes.spines[:].set_visible(False)
    return figure, axes


def _beside(axes: "Axes", height: float, offset: float, text: str, *, color: str, fontweight: str = "normal") -> None:
    """Text to the right of the plot, `offset` inches from its edge."""
    axes.annotate(
        text, (1, height), xycoords=("axes fraction", "data"), xytext=(72 * offset, 0), textcoords="offset points",
        va="center_baseline", color=color, fontweight=fontweight, annotation_clip=False,
    )  # fmt: skip


def _to_markup(figure: "Figure", description: str) -> Markup:
    """The figure as an inline SVG: no XML header, metadata, global style, namespaces or ids that nothing uses."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    used = set(re.findall(r'(?:href="#|url\(#)(\w+)', text.getvalue()))
    root = ElementTree.fromstring(text.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in {"metadata", "style"}]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items() if key != "id" or value in used}
        attributes["style"] = _themed(attributes.get("style", ""))
        element.attrib = {key: value for key, value in attributes.items() if value}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label(description, 2000)}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _themed(style: str) -> str:
    """Stand-in colours become CSS variables, and the page chooses the font.

    >>> _themed("fill: #000011; font-family: 'DejaVu Sans', sans-serif")
    'fill: var(--blue)'
    """
    kept = [part for part in style.split("; ") if not part.startswith("font-family")]
    return re.sub(r"#\w{6}", lambda match: f"var(--{CSS_NAMES[match[0]]})", "; ".join(kept))
