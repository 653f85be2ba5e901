"""The images of training data, named by path or embedded in a table: all of them looked at before training starts.

A column of images has `datasets`' storage, a struct of `bytes` and `path` for each image. Encoded bytes are not copied
(but where one column mixes them with paths): what comes out shares the memory, or the mapped file, of what went in.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import accumulate, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, Image, List
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable
from PIL import Image as PILImage
from PIL import ImageOps

from data_builders.images import DECODING_ERRORS, check_images, image_path
from data_builders.records import InputError, Row

IMAGES = List(Image(mode="RGB"))
"""The column `images` as trainers get it: decoded on access, turned as EXIF says."""
_FEATURES = Features({"images": IMAGES})
_ROWS_AT_A_TIME = 64
_THREADS = 8


class ImagePaths:
    """The images that rows name by path: each is looked up when it is first named, and opened once at the end.

    Args:
        root: The folder that image paths are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[str, tuple[str, str]] = {}

    def file(self, name: str, row: str) -> str:
        """The absolute path of an image.

        Args:
            name: The path as it stands in the row.
            row: The row, for messages.

        Raises:
            InputError: The path is absolute or leaves the root, or there is no such file.
        """
        if name not in self._found:
            try:
                self._found[name] = (str(image_path(self.root, name)), row)
            except InputError as error:
                raise InputError(f"row {row!r}: {error}") from error
        return self._found[name][0]

    def check(self) -> None:
        """Decodes every image that was named.

        Raises:
            InputError: One cannot be decoded; says which, and the first row that names it.
        """
        check_images(({"id": row, "images": [name]} for name, (_, row) in self._found.items()), self.root)


def table_images(table: Dataset, source: str, paths: ImagePaths) -> Dataset:
    """The images of a table as its one column `images`, checked.

    Args:
        table: With a column `images` (lists), `image` (one each) or neither, of paths, of encoded bytes, or of both as
            `datasets`' Image feature stores them; a null is no image.
        source: What the user called the table, for messages.
        paths: Where images that are named by path are found.

    Raises:
        InputError: The columns hold something else, an image is missing, or embedded bytes cannot be decoded.
    """
    pictures = _in_lists(table, source)
    stored = pictures.data.column("images")
    embedded = pc.struct_field(pc.list_flatten(stored), "bytes").null_count == 0
    rows = _checked_rows(stored, source, paths)
    if embedded:
        deque(rows, maxlen=0)
        return pictures
    batches = [pa.array(batch, type=stored.type) for batch in iter(lambda: list(islice(rows, _ROWS_AT_A_TIME)), [])]
    return _dataset(pa.chunked_array(batches), table, str(paths.root))


def num_images(pictures: Dataset) -> list[int]:
    """How many images each row of a column `images` has."""
    return pc.list_value_length(pictures.data.column("images")).to_pylist()


def _in_lists(table: Dataset, source: str) -> Dataset:
    """One list per row, each image in the storage of the Image feature; a column that is so already stays mapped."""
    given = [name for name in ("image", "images") if name in table.column_names]
    given = [name for name in given if table.data.column(name).null_count < len(table)]
    if len(given) == 2:
        raise InputError(f"{source} has a column `image` and a column `images`. Keep `images`, with all of them.")
    if not given:
        return _dataset(pa.chunked_array([_lists([0] * len(table), pa.array([], type=Image.pa_type))]), table)
    column, feature = table.data.column(given[0]), table.features[given[0]]
    if (
        given == ["images"]
        and isinstance(feature, List)
        and isinstance(feature.feature, Image)
        and not column.null_count
    ):
        kept = table.select_columns("images")
        return Dataset(
            kept.data.cast(_FEATURES.arrow_schema), info=DatasetInfo(features=_FEATURES), fingerprint=kept._fingerprint
        )
    return _dataset(pa.chunked_array([_stored(chunk, given[0], source) for chunk in column.chunks]), table)


def _stored(column: pa.Array, name: str, source: str) -> pa.ListArray:
    if name == "image":
        counts, values = column.is_valid(), column.drop_null()
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        counts, values = pc.fill_null(pc.list_value_length(column), 0), column.flatten()
    else:
        raise InputError(f"{source}: the column `images` must hold lists, got {column.type}. One each is `image`.")
    if pa.types.is_null(values.type):  # lists of which none has an element
        values = values.cast(pa.string())
    if not _can_hold_images(values.type):
        raise InputError(
            f"{source}: the column `{name}` holds {values.type}. It must hold paths, or images as `datasets` stores "
            "them (its Image feature)."
        )
    return _lists(counts.cast(pa.int32()).to_pylist(), Image().cast_storage(values))


def _can_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in kind.names or "path" in kind.names
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests)


def _lists(counts: list[int], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([0, *accumulate(counts)], type=pa.int32()), values)


def _dataset(column: pa.ChunkedArray, source: Dataset, *also: str) -> Dataset:
    return Dataset(
        InMemoryTable(pa.table({"images": column})),
        info=DatasetInfo(features=_FEATURES),
        fingerprint=Hasher.hash([source._fingerprint, *also]),  # without it all bytes would be read to make one
    )


def _checked_rows(stored: pa.ChunkedArray, source: str, paths: ImagePaths) -> Iterator[list[Row]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(stored), _ROWS_AT_A_TIME):
            rows = stored.slice(start, _ROWS_AT_A_TIME).to_pylist()
            wheres = [f"{source}, row {number}" for number in range(start + 1, start + len(rows) + 1)]
            found = [[_found(image, where, paths) for image in row] for where, row in zip(wheres, rows, strict=True)]
            images = [(image["bytes"], where) for where, row in zip(wheres, found, strict=True) for image in row]
            deque(pool.map(_check_bytes, images), maxlen=0)
            yield from found


def _found(image: Row | None, where: str, paths: ImagePaths) -> Row:
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise InputError(f"{where}: one of its images is null. Leave it out of the list, or the row out of the data.")
    if image["bytes"] is not None:
        return image
    return {"bytes": None, "path": paths.file(image["path"], where)}


def _check_bytes(image: tuple[bytes | None, str]) -> None:
    encoded, where = image
    if encoded is None:
        return
    try:
        with PILImage.open(BytesIO(encoded)) as picture:
            mode = picture.mode
            ImageOps.exif_transpose(picture).convert("RGB")
    except (*DECODING_ERRORS, PILImage.DecompressionBombError) as error:
        raise InputError(
            f"{where}: an embedded image cannot be decoded ({error}): it is broken or no image."
        ) from error
    if mode[0] in "IF":
        raise InputError(
            f"{where}: an embedded image has more than 8 bits to a channel (mode {mode}), and Pillow would clip it to "
            "white: scale it to 8 bits."
        )
