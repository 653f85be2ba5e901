"""Dynamic image splitting, for training code: what `data_builders.tiling` has for samplers and data alike."""

from data_builders.tiling.boxes import Frame, convert_box, convert_boxes
from data_builders.tiling.plans import Tiling, TilingPlan, indicators, plan_internvl, plan_mm1_5
from data_builders.tiling.views import (
    MEAN_COLOR,
    TILING_FILE,
    load_tiling,
    save_tiling,
    tile_batch,
    tile_image,
    tile_row,
)

__all__ = [
    "MEAN_COLOR",
    "TILING_FILE",
    "Frame",
    "Tiling",
    "TilingPlan",
    "convert_box",
    "convert_boxes",
    "indicators",
    "load_tiling",
    "plan_internvl",
    "plan_mm1_5",
    "save_tiling",
    "tile_batch",
    "tile_image",
    "tile_row",
]
