"""How many tokens a picture takes, from its size and the model's configuration: where its processor is not at hand.

The image processor alone is asked for its tiles if its settings are found: they are a small file, which needs no
tokenizer. Towers of fixed size (InternVL, LLaVA, SmolVLM) take a picture as tiles; Qwen-VL's takes any number of
patches.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, PreTrainedConfig

PictureCounter = Callable[[tuple[int, int]], int]
"""Width and height of a picture to its tokens in the language model."""

_SETTINGS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Tile:
    """A picture, or one tile of it, as a tower of fixed size takes it.

    Attributes:
        patches: Tokens of the tower.
        tokens: Tokens of the language model.
    """

    patches: int
    tokens: int


def tile_of(base: nn.Module) -> Tile | None:
    """The tile of a model; None where the tower takes pictures of any size, as Qwen-VL's does.

    Args:
        base: Without adapters around it.
    """
    config, vision = base.config, base.config.vision_config
    if getattr(vision, "spatial_merge_size", None) is not None:
        return None
    sides = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size] * 2
    patches = math.prod(side // patch_size(vision) for side in sides)
    has_class_token = any(name.endswith(("cls_token", "class_embedding")) for name, _ in base.named_parameters())
    if (ratio := getattr(config, "downsample_ratio", None)) is not None:
        tokens = round(patches * ratio**2)
    elif (factor := getattr(config, "scale_factor", None)) is not None:
        tokens = patches // factor**2
    else:
        tokens = getattr(config, "mm_tokens_per_image", None) or patches
    return Tile(patches + has_class_token, tokens)


def patches_per_token(base: nn.Module) -> float:
    """Tokens of the tower that become one of the language model, on average."""
    tile = tile_of(base)
    return base.config.vision_config.spatial_merge_size**2 if tile is None else tile.patches / tile.tokens


def patch_size(vision: PreTrainedConfig) -> int:
    """Pixels along the side of a patch."""
    size = vision.patch_size
    return size[0] if isinstance(size, list | tuple) else size


def shipped_architectures() -> Path:
    """The folder of configurations that ship with mpo, `owner/name/config.json` each."""
    package = Path(__file__).parent.parent
    beside = package.parent / "configs"
    return (beside if beside.is_dir() else package / "configs") / "architectures"


def picture_counter(base: nn.Module, places: Iterable[str]) -> PictureCounter:
    """Tokens of pictures by their size.

    Args:
        base: The model, without adapters around it.
        places: Folders, or Hub ids of which mpo ships a copy, with the settings of an image processor.
    """
    asks = getattr(_image_processor(places), "get_number_of_image_patches", None)
    tile, side = tile_of(base), patch_size(base.config.vision_config)
    merge = patches_per_token(base)
    options = {"crop_to_patches": True}  # InternVL's processor says so to its image processor; others ignore it

    def count(size: tuple[int, int]) -> int:
        width, height = size
        if tile is not None:
            return tile.tokens * (asks(height, width, options) if asks else 1)
        patches = asks(height, width, options) if asks else math.ceil(width / side) * math.ceil(height / side)
        return round(patches / merge)

    return count


def _image_processor(places: Iterable[str]) -> Any:
    """The first image processor that is found and can be built; None if there is none."""
    folders = [folder for place in places for folder in (Path(place), shipped_architectures() / place)]
    for folder in folders:
        if any((folder / name).is_file() for name in _SETTINGS):
            try:
                return AutoImageProcessor.from_pretrained(str(folder))
            except (OSError, ValueError, ImportError):  # ours is only to estimate: training says what is wrong with it
                continue
    return None
