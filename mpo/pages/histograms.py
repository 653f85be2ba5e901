"""Histograms of whole numbers, such as lengths of texts: how often each occurs in, an inline `<svg>` out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from mpo.pages.drawing import GRID, canvas, house_style, to_markup

_MIN_BARS, _MAX_BARS = 12, 40


@dataclass(frozen=True)
class Series:
    """One side of a histogram: how often each whole number occurs."""

    label: str
    counts: Mapping[int, int]
    color: str


def histogram(name: str, series: Sequence[Series], unit: str, *, wide: bool = False) -> Markup:
    """Shares of whole numbers over their size, several series in one plot; the outer bars hold all that is beyond.

    Args:
        name: Tells the charts of one page apart.
        series: What is drawn, at least one number in each.
        unit: What is counted, below the axis.
        wide: Over the whole width of the page rather than half of it.
    """
    edges = bin_edges([one.counts for one in series])
    with house_style(name):
        figure, axes = canvas(9.6 if wide else 4.5, 1.7, left=0.45, right=0.15, bottom=0.45)
        for one in series:
            shares = binned(one.counts, edges)
            axes.stairs(shares, edges, fill=True, color=one.color, alpha=0.22, linewidth=0)
            axes.stairs(shares, edges, color=one.color, linewidth=1.5)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_xlabel(unit)
        axes.locator_params(axis="x", nbins=10 if wide else 6, integer=True)
        axes.locator_params(axis="y", nbins=3)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        said = (f"{one.label}, in {unit}: {spread(one.counts)}" for one in series)
        return to_markup(figure, f"Histogram. {'; '.join(said)}.")


def bin_edges(counts: Sequence[Mapping[int, int]]) -> list[float]:
    """Where the bars of a histogram begin and end: 12 to 41, as wide as 1, 2 or 5 times a power of ten.

    >>> bin_edges([{1: 9, 3: 1}])
    [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5, 11.5, 12.5]
    >>> bin_edges([{0: 1, 790: 1}])[-3:]
    [759.5, 779.5, 799.5]
    """
    low = min(quantile(one, 0.01) for one in counts)
    high = max(quantile(one, 0.99) for one in counts)
    width = next(
        base * 10**power for power in range(20) for base in (1, 2, 5) if high - low < _MAX_BARS * base * 10**power
    )
    first = low - low % width
    num_bars = max(_MIN_BARS, (high - first) // width + 1)
    return [first + width * number - 0.5 for number in range(num_bars + 1)]


def binned(counts: Mapping[int, int], edges: Sequence[float]) -> list[float]:
    """The share of the numbers that falls into each bin; what lies beyond the edges is in the first and the last one.

    >>> binned({0: 1, 1: 1, 2: 1, 99: 1}, [0.5, 1.5, 2.5])
    [0.5, 0.5]
    """
    width, shares = edges[1] - edges[0], [0.0] * (len(edges) - 1)
    total = sum(counts.values())
    for value, num in counts.items():
        shares[min(max(int((value - edges[0]) / width), 0), len(shares) - 1)] += num / total
    return shares


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The smallest number that at least this share of all numbers does not exceed.

    >>> quantile({1: 3, 2: 1}, 0.5), quantile({1: 3, 2: 1}, 0.99)
    (1, 2)
    """
    values, total = sorted(counts), sum(counts.values())
    reached = zip(values, accumulate(counts[value] for value in values), strict=True)
    return next(value for value, seen in reached if seen >= share * total)


def spread(counts: Mapping[int, int]) -> str:
    """The middle and the range of most of the numbers, in words.

    >>> spread({1: 1, 2: 8, 9: 1})
    'median 2, 90% between 1 and 9'
    """
    low, middle, high = (f"{quantile(counts, share):,}" for share in (0.05, 0.5, 0.95))
    return f"median {middle}, 90% between {low} and {high}"
