"""Image sizes that a model can use: sides of 224 to 4096 pixels, at most seven times as long as wide.

Source of the numbers: Guo et al. 2024, "MAmmoTH-VL", https://arxiv.org/abs/2412.05237. Needs Pillow only where a
picture is opened.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from data_builders.formats.protocol import RefusedError
from data_builders.images import image_path, load_image
from data_builders.records import InputError
from data_builders.shards import full_disk_explained, write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

_JPEG = {".jpg", ".jpeg"}
_QUALITY = 95


@dataclass(frozen=True)
class Limits:
    """Between which sizes an image must lie.

    Attributes:
        min_side: Pixels of the shorter side, at least.
        max_side: Pixels of the longer side, at most.
        max_aspect: How many times the shorter side the longer one may be.
    """

    min_side: int = 224
    max_side: int = 4096
    max_aspect: int = 7

    def __post_init__(self) -> None:
        """Refuses limits that some shapes cannot keep at any size.

        Raises:
            InputError: A limit is not positive, or they exclude each other.
        """
        if min(self.min_side, self.max_aspect) < 1 or self.min_side * self.max_aspect > self.max_side:
            raise InputError(
                f"`min_side` ({self.min_side}) and `max_aspect` ({self.max_aspect}) must be at least 1, and "
                f"`max_side` ({self.max_side}) at least their product: else a long image could be too small and too "
                "large at once."
            )


def normal_size(width: int, height: int, limits: Limits) -> tuple[int, int] | None:
    """The size that an image is scaled to, its shape kept; its own if it fits, None if its shape is out of bounds.

    Rounding never leaves the limits, and a size that was given is given again.

    >>> normal_size(8192, 4096, Limits()), normal_size(100, 300, Limits()), normal_size(100, 800, Limits())
    ((4096, 2048), (224, 672), None)
    """
    short, long = sorted((width, height))
    if short < 1 or long > limits.max_aspect * short:
        return None
    if long > limits.max_side:
        short, long = -(-short * limits.max_side // long), limits.max_side
    elif short < limits.min_side:
        short, long = limits.min_side, long * limits.min_side // short
    return (short, long) if width <= height else (long, short)


class Normaliser:
    """Gives images in sizes within limits: those that are, as they are, and others scaled, in a folder of their own.

    Args:
        root: The folder that image paths are relative to.
        folder: Where scaled pictures go; below the root.
        limits: The sizes.
    """

    def __init__(self, root: Path, folder: Path, limits: Limits) -> None:
        self.root, self.folder, self.limits = root, folder, limits
        self.name_of = lru_cache(maxsize=4096)(self._name_of)  # rows about one picture follow each other

    def _name_of(self, name: str) -> str:
        """The path, under the root, of the picture or of a scaled copy, which is written if it is not there.

        Raises:
            RefusedError: There is no such picture, it cannot be decoded, or its shape is out of bounds.
            InputError: The disk is full.
        """
        try:
            path = image_path(self.root, name)
            copy = self._copy_of(path)
            if copy.exists():
                return self._under_root(copy)
            picture = load_image(self.root, name)
        except InputError as error:
            raise RefusedError("image missing or broken", error) from error
        size = normal_size(*picture.size, self.limits)
        if size is None:
            shape = f"{name}: {picture.width} x {picture.height}"
            raise RefusedError(f"image longer than {self.limits.max_aspect} times its width", shape)
        if size == picture.size:
            return name
        with full_disk_explained(copy, "Make room; the same command then goes on where this one stopped."):
            write_bytes(copy, _scaled(picture, size, jpeg=copy.suffix in _JPEG))
        return self._under_root(copy)

    def _copy_of(self, path: Path) -> Path:
        """Where the scaled copy of a picture belongs; the digest keeps `a.png` and `a.webp` apart."""
        inside = path.relative_to(self.root.resolve())
        digest = hashlib.sha256(str(inside).encode(errors="surrogateescape")).hexdigest()[:8]
        ending = ".jpg" if path.suffix.lower() in _JPEG else ".png"
        return self.folder / inside.parent / f"{path.stem[:100]}-{digest}{ending}"

    def _under_root(self, copy: Path) -> str:
        return copy.relative_to(self.root.resolve()).as_posix()


def _scaled(picture: "Image", size: tuple[int, int], *, jpeg: bool) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    scaled = picture.resize(size, Image.Resampling.LANCZOS)
    scaled.save(data, **({"format": "JPEG", "quality": _QUALITY} if jpeg else {"format": "PNG"}))
    return data.getvalue()
