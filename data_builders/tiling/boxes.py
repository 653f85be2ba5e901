"""Boxes in texts, carried from one frame to another: the original picture, a tile of it, or shares of either."""

import re
from dataclasses import dataclass
from typing import Literal

from data_builders.records import InputError
from data_builders.tiling.plans import Axis, Box, TilingPlan, axes, check_known

Units = Literal["pixels", "0-1", "0-999", "0-1000"]

_STEPS = {"0-1": 1, "0-999": 999, "0-1000": 1000}
_NUMBER = r"\s*(-?(?:[0-9]{1,7}(?:\.[0-9]{1,12})?|\.[0-9]{1,12}))\s*"
_BOX = re.compile(f"<{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}>")


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
        check_known("units", self.units, ("pixels", *_STEPS))


def convert_box(box: Box, plan: TilingPlan, source: Frame, target: Frame) -> Box:
    """A box in another frame, not rounded.

    Args:
        box: In `source`.
        plan: Of the picture.
        source: What the box refers to.
        target: What it shall refer to. A box that is not in that tile keeps its place, outside of it.

    Raises:
        InputError: The plan has no such view, or shares of the original picture exceed their scale.

    >>> from data_builders.tiling.plans import plan_mm1_5
    >>> convert_box((700, 10, 800, 20), plan_mm1_5(1344, 1344, n_min=4, n_max=4), Frame(), Frame(view=1))
    (28.0, 10.0, 128.0, 20.0)
    """
    start, end = axes(plan, source.view) * 2, axes(plan, target.view) * 2
    if source.view is None and max(box) > _STEPS.get(source.units, float("inf")):
        raise InputError(
            f"the box {box} exceeds the scale {source.units} of its picture of {plan.width} x {plan.height}: it is "
            "most likely in other units. Give the source's `units`."
        )
    return tuple(
        _share(after.from_original(before.to_original(_pixels(x, before, source.units))), after, target.units)
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

    >>> from data_builders.tiling.plans import plan_mm1_5
    >>> plan = plan_mm1_5(1344, 1344, n_min=4, n_max=4)
    >>> convert_boxes("the dog <700,10,800,20>", plan, Frame(), Frame(units="0-999"))
    'the dog <520,7,595,15>'
    """

    def converted(found: re.Match[str]) -> str:
        box = convert_box(tuple(float(x) for x in found.groups()), plan, source, target)
        return f"<{','.join(_written(x, target.units) for x in box)}>"

    return _BOX.sub(converted, text)


def _pixels(x: float, axis: Axis, units: Units) -> float:
    return x if units == "pixels" else x * axis.extent / _STEPS[units]


def _share(x: float, axis: Axis, units: Units) -> float:
    return x if units == "pixels" else x * _STEPS[units] / axis.extent


def _written(x: float, units: Units) -> str:
    return f"{round(x, 3) + 0.0:.3f}" if units == "0-1" else str(round(x))  # + 0.0: no minus before a zero
