"""What the charts of the report share: colours, text beside a plot, and the way from a figure to the page.

Figures are drawn by matplotlib without its global state. A colour is drawn as a stand-in (`#000011`) and becomes a CSS
variable (`var(--blue)`) in the SVG, so one drawing serves both themes. Names that come from data are never parsed
as TeX and are escaped by the XML writer. Needs matplotlib only where a chart is drawn.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, ON_FILL = "#000001", "#000002", "#000003", "#000004"
BASELINE, BLUE, ORANGE, GREEN, PURPLE = "#000010", "#000011", "#000012", "#000013", "#000014"
CSS_NAMES = {
    INK: "ink", MUTED: "muted", GRID: "line", ON_FILL: "on-fill",
    BASELINE: "baseline", BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple",
}  # fmt: skip


def label(text: str, limit: int = 26) -> str:
    r"""A name from data as one short printable line: XML knows no control characters, and a chart no second line.

    >>> label("a chart\x00 question", limit=9)
    'a chart …'
    """
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


@contextmanager
def house_style(name: str) -> Iterator[None]:
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


def canvas(width: float, height: float, *, left: float, right: float, bottom: float = 0.24) -> "tuple[Figure, Axes]":
    """A figure of `width` x `height` inches with one bare plot; the margins are kept for text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="none")
    top = 0.06
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    axes = figure.add_axes(box, facecolor="none")
    axes.spines[:].set_visible(False)
    return figure, axes


def beside(axes: "Axes", height: float, offset: float, text: str, *, color: str, fontweight: str = "normal") -> None:
    """Text to the right of the plot, `offset` inches from its edge."""
    axes.annotate(
        text, (1, height), xycoords=("axes fraction", "data"), xytext=(72 * offset, 0), textcoords="offset points",
        va="center_baseline", color=color, fontweight=fontweight, annotation_clip=False,
    )  # fmt: skip


def to_markup(figure: "Figure", description: str) -> Markup:
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
