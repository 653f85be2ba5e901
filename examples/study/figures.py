"""The study's two figures: the claims' differences with their intervals, and what happens while models train."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from data_builders.records import Row
from examples.study.claims import MARGIN, Finding
from examples.study.plan import SFT, Records, Study, runs, tests

mpl.use("Agg")

_COLORS = {"supported": "#2a7d4f", "contradicted": "#b3362b", "undecided": "#777777"}
_TICKS = (-30, -10, -3, -1, -0.5, -0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 3, 10, 30)  # of rewards
_NEAR = 4.0  # points
_REACH = 12.0  # points; what lies beyond is written at the edge


def draw_claims(found: Sequence[Finding], path: Path) -> None:
    """A forest plot: one line per claim, coloured by its verdict."""
    shown = [finding for finding in found if finding.verdict != "not run"][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for line, finding in enumerate(shown):
        color = _COLORS[finding.verdict]
        low, high, middle = np.clip([finding.low, finding.high, finding.mean], -_REACH, _REACH)
        axes.plot([low, high], [line, line], color=color, linewidth=2)
        axes.plot(
            np.clip(finding.by_seed, -_REACH, _REACH), [line] * len(finding.by_seed), "|", color=color, alpha=0.6
        )
        axes.plot(middle, line, "o", color=color, markersize=5)
        if abs(finding.mean) > _REACH:
            axes.annotate(f"{finding.mean:+.1f}", (middle, line), (-6, 5), textcoords="offset points", ha="right")
    axes.set_yticks(range(len(shown)), [f"{f.claim['says']} ({f.claim['task']})" for f in shown], fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(-MARGIN, color="black", linewidth=0.6, linestyle=":")
    lowest = min((finding.low for finding in shown), default=-MARGIN)
    axes.set_xlim(max(lowest - 1.0, -_REACH - 0.5), _REACH + 0.5)
    axes.set_xlabel(
        "paired difference on the test scans in points, 95% interval over seeds; a tick per seed", fontsize=8
    )
    for verdict, color in _COLORS.items():
        axes.plot([], [], "o-", color=color, label=verdict)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def draw_curves(study: Study, records: Records, path: Path) -> None:
    """For each task a row: reward margin and chosen reward by optimizer step, and where its methods end up."""
    shown = [task for task in study.tasks if tests(study, records, task, SFT)] or list(study.tasks)[:1]
    figure = Figure(figsize=(11, 0.4 + 3.4 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 3, squeeze=False)
    colors = mpl.colormaps["tab20"].colors
    of_method = {name: colors[place % len(colors)] for place, name in enumerate(study.methods)} | {SFT: "black"}
    for task, (margin, chosen, accuracy) in zip(shown, grid, strict=True):
        for method in study.tasks[task]["methods"]:
            found, color = runs(study, records, task, method), of_method[method]
            _draw_curve(margin, found, "rewards/margins", color)
            _draw_curve(chosen, found, "rewards/chosen", color)
        _look_near(accuracy, tests(study, records, task, SFT))
        for method in (SFT, *study.tasks[task]["methods"]):
            _draw_accuracy(accuracy, tests(study, records, task, method), study.name(method), of_method[method])
        for axes, title in ((margin, "reward margin"), (chosen, "reward of the chosen")):
            axes.set_yscale("asinh", linear_width=0.3)
            low, high = axes.get_ylim()
            axes.set_yticks([tick for tick in _TICKS if low <= tick <= high], minor=False)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{task}: {title}", fontsize=9)
            axes.set_xlabel("optimizer step", fontsize=8)
        accuracy.set_title(f"{task}: test accuracy near SFT's, %", fontsize=9)
        accuracy.set_xlabel("Direct", fontsize=8)
        accuracy.set_ylabel("CoT", fontsize=8)
        handles, _ = accuracy.get_legend_handles_labels()
        if handles:
            accuracy.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        for axes in (margin, chosen, accuracy):
            axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)


def _draw_curve(axes: Any, found: Sequence[Row], name: str, color: Any) -> None:
    curves = [run["curve"] for run in found if name in run["curve"]]
    if curves:
        length = min(len(curve["step"]) for curve in curves)
        values = np.mean([curve[name][:length] for curve in curves], axis=0)
        axes.plot(curves[0]["step"][:length], values, color=color, linewidth=1.2)


def _accuracy(found: dict[int, Row]) -> tuple[float, float]:
    direct, cot = (float(np.mean([row[style] for row in found.values()])) for style in ("direct", "cot"))
    return direct, cot


def _draw_accuracy(axes: Any, found: dict[int, Row], label: str, color: Any) -> None:
    """A point; one that lies outside is a cross at the edge, and the legend says where it belongs."""
    if not found:
        return
    direct, cot = _accuracy(found)
    at = np.clip(direct, *axes.get_xlim()), np.clip(cot, *axes.get_ylim())
    if at == (direct, cot):
        axes.plot(*at, "o", color=color, label=label, markersize=6)
    else:
        label = f"{label} (at {direct:.1f}, {cot:.1f})"
        axes.plot(*at, "x", color=color, label=label, markersize=7, markeredgewidth=2, clip_on=False)


def _look_near(axes: Any, found: dict[int, Row]) -> None:
    """Shows what lies within some points of the SFT model; a method that collapsed would hide all others."""
    if found:
        direct, cot = _accuracy(found)
        axes.set_xlim(direct - _NEAR, direct + _NEAR / 2)
        axes.set_ylim(cot - _NEAR, cot + _NEAR)
