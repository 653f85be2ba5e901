"""Names of images: always paths under one root, whatever the source calls them. Touches no file."""

import os
import re
from pathlib import Path, PurePosixPath

from data_builders.formats.protocol import RefusedError
from data_builders.records import Row

_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]+:(//|.*;base64,)")


def name_in_root(name: object, image_root: Path, base: str = "") -> str:
    """The name of an image relative to the image root.

    Args:
        name: As it stands in a file: a path, relative or absolute.
        image_root: The folder that our names are relative to.
        base: The folder that a relative name is relative to, itself relative to the root.

    Raises:
        RefusedError: It is no path, or leads out of the root.

    >>> name_in_root("a.png", Path("data"), base="chartqa"), name_in_root("./b.png", Path("data"))
    ('chartqa/a.png', './b.png')
    """
    if not isinstance(name, str) or not name:
        raise RefusedError("an image that is no path", repr(name))
    if _ADDRESS.match(name):
        raise RefusedError("an image that is an address, not a path", name)
    if os.path.isabs(name):
        return _under_root(name, image_root)
    joined = f"{base}/{name}" if base else name
    if Path(os.path.normpath(joined)).parts[:1] == ("..",):
        raise RefusedError("an image outside the image root", joined)
    return joined


def names_in_root(value: object, image_root: Path, base: str = "") -> list[str]:
    """The names of a row's images, which may be one path, a list of them, an empty string, or nothing at all."""
    if value is None or value == "":
        return []
    values = value if isinstance(value, list) else [value]
    return [name_in_root(name, image_root, base) for name in values]


def base_in_root(folder: Path, image_root: Path) -> str:
    """A folder relative to the image root; empty for the root itself.

    >>> base_in_root(Path("data/chartqa"), Path("data")), base_in_root(Path("data"), Path("data"))
    ('chartqa', '')
    """
    base = PurePosixPath(Path(os.path.relpath(folder, image_root)).as_posix())
    return "" if base == PurePosixPath() else str(base)


def check_names(row: Row, image_root: Path) -> None:
    """Refuses one of our rows whose images are not a list of paths under the root.

    Raises:
        RefusedError: Says which.
    """
    names = row.get("images", [])
    if not isinstance(names, list):
        raise RefusedError("`images` that is no list", names)
    for name in names:
        if isinstance(name, str) and os.path.isabs(name):
            raise RefusedError("an image outside the image root", name)
        name_in_root(name, image_root)


def _under_root(name: str, image_root: Path) -> str:
    path, root = Path(os.path.normpath(name)), Path(os.path.abspath(image_root))
    if not path.is_relative_to(root):
        raise RefusedError("an image outside the image root", name)
    return path.relative_to(root).as_posix()
