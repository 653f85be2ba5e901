"""Images named by rows: paths under one root, checked before any long work starts.

Needs Pillow only where a picture is opened.
"""

import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from data_builders.records import InputError, Row

if TYPE_CHECKING:
    from PIL.Image import Image

_WINDOW = 1024  # files that wait to be decoded
# what Pillow's decoders raise on broken files: each format has its own habits
DECODING_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, LookupError, struct.error, zlib.error)


def image_path(root: Path, name: str) -> Path:
    """The file that a row's image names.

    Args:
        root: The folder that all image paths are relative to.
        name: The path as it stands in the row.

    Raises:
        InputError: The path is absolute or leaves the root (also through a link), or no such file exists.
    """
    try:
        path = (root / name).resolve()
        exists = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL character, a loop of links
        raise InputError(f"image {name!r:.80} cannot be the name of a file ({error!s:.80}).") from error
    if Path(name).is_absolute() or not path.is_relative_to(root.resolve()):
        raise InputError(
            f"image {name!r} is outside the image root {root}: paths must be relative to `image_root` and stay in it."
        )
    if not exists:
        raise InputError(f"image {name!r} does not exist under the image root {root}. Is `image_root` right?")
    return path


def load_image(root: Path, name: str) -> "Image":
    """The picture in RGB, the right way up: turned as its EXIF data says, as `datasets` does in training.

    Raises:
        InputError: As `image_path`, or the file cannot be decoded, or has more than 8 bits to a channel.
    """
    from PIL import Image, ImageOps

    path = image_path(root, name)
    try:
        with Image.open(path) as image:
            mode, picture = image.mode, ImageOps.exif_transpose(image).convert("RGB")
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be decoded ({error}): the file is broken or not an image.") from error
    if mode[0] in "IF":
        raise InputError(
            f"image {path} has more than 8 bits to a channel (mode {mode}), and Pillow would clip it to white: scale "
            "it to 8 bits."
        )
    return picture


def image_size(root: Path, name: str) -> tuple[int, int]:
    """Height and width in pixels as the file's head says, before any turn by its EXIF data; decodes nothing.

    Raises:
        InputError: As `image_path`, or the file does not begin as an image does, or has too many pixels for Pillow.
    """
    from PIL import Image

    path = image_path(root, name)
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (*DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise InputError(f"image {path} cannot be read ({error}): the file is broken or not an image.") from error


def check_images(rows: Iterable[Row], root: Path, *, threads: int = 8) -> int:
    """Opens every image that the rows name, so that a broken one is found before the work and not in the middle.

    Args:
        rows: Rows with `id` and `images`.
        root: The folder that image paths are relative to.
        threads: How many files are decoded at a time.

    Returns:
        How many distinct images there are.

    Raises:
        InputError: Names the row and the image.
    """
    first_row: dict[str, str] = {}
    for row in rows:
        for name in row.get("images") or []:
            first_row.setdefault(name, str(row.get("id", "?")))

    def check(name: str) -> None:
        try:
            load_image(root, name)
        except InputError as error:
            raise InputError(f"row {first_row[name]!r}: {error}") from error

    names = iter(tqdm(first_row, desc="checking images", unit="image", delay=2))
    with ThreadPoolExecutor(threads) as pool:
        while window := list(islice(names, _WINDOW)):
            for _ in pool.map(check, window):
                pass
    return len(first_row)
