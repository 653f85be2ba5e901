"""The study's two figures: the claims' differences with their intervals, and what happens while models train."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from data_builders.records import Row
from examples.study.claims import MARGIN, Finding
from examples.study.plan import Records, Study, runs

mpl.use("Agg")

_COLORS = {"supported": "#2a7d4f", "contradicted": "#b3362b", "undecided": "#777777"}
_CURVES = {"rewards/margins": "reward margin", "rewards/chosen": "reward of the chosen", "loss": "loss"}
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
    axes.set_xlim(-_REACH - 0.5, _REACH + 0.5)
    axes.set_xlabel(
        "paired difference on the test scans in points, 95% interval over seeds; a tick per seed", fontsize=8
    )
    for verdict, color in _COLORS.items():
        axes.plot([], [], "o-", color=color, label=verdict)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def draw_curves(study: Study, records: Records, path: Path) -> None:
    """For each task a row: means over seeds of margin, chosen reward and loss by optimizer step."""
    figure = Figure(figsize=(10, 2.6 * len(study.tasks)), layout="constrained")
    grid = figure.subplots(len(study.tasks), len(_CURVES), squeeze=False)
    colors = mpl.colormaps["tab20"].colors
    of_method = {name: colors[place % len(colors)] for place, name in enumerate(study.methods)}
    for line, (task, row) in enumerate(zip(study.tasks, grid, strict=True)):
        for axes, (name, title) in zip(row, _CURVES.items(), strict=True):
            for method in study.tasks[task]["methods"]:
                _draw_curve(axes, runs(study, records, task, method), name, study.name(method), of_method[method])
            axes.set_title(f"{task}: {title}", fontsize=9)
            axes.tick_params(labelsize=7)
            if name != "loss":
                axes.set_yscale("symlog", linthresh=1.0)
        row[-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        grid[line][0].set_ylabel("mean over seeds", fontsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step", fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_curve(axes: Any, found: Sequence[Row], name: str, label: str, color: Any) -> None:
    curves = [run["curve"] for run in found if name in run["curve"]]
    if curves:
        length = min(len(curve["step"]) for curve in curves)
        values = np.mean([curve[name][:length] for curve in curves], axis=0)
        axes.plot(curves[0]["step"][:length], values, color=color, label=label, linewidth=1.2)
