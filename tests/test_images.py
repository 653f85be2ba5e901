"""Images: which paths a row may name, and that every picture that is handed on is whole, in RGB and upright."""

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_builders.images import check_images, image_path, load_image
from data_builders.records import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a red picture in it, and a green one beside it."""
    folder = tmp_path / "root"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (4, 2), (255, 0, 0)).save(folder / "deep" / "red.png")
    Image.new("RGB", (4, 2), (0, 255, 0)).save(tmp_path / "green.png")
    return folder


def test_a_path_under_the_root_is_found(root: Path) -> None:
    assert image_path(root, "deep/red.png").samefile(root / "deep" / "red.png")
    assert image_path(root, "deep/../deep/./red.png").samefile(root / "deep" / "red.png")
    assert load_image(root, "deep/red.png").getpixel((0, 0)) == (255, 0, 0)


def test_a_root_that_is_a_link_or_relative_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "link").symlink_to(root)
    monkeypatch.chdir(root.parent)
    for name in (root.parent / "link", Path("root"), Path("link"), Path("root/deep/..")):
        assert load_image(name, "deep/red.png").size == (4, 2)


@pytest.mark.parametrize("name", ["../green.png", "deep/../../green.png", "..", "../root-2/red.png"])
def test_a_path_that_leaves_the_root_is_refused(root: Path, name: str) -> None:
    (root.parent / "root-2").mkdir()
    (root / "deep" / "red.png").rename(root.parent / "root-2" / "red.png")
    with pytest.raises(
        InputError, match="is outside the image root .*: paths must be relative to `image_root` and st"
    ):
        image_path(root, name)


def test_an_absolute_path_is_refused_even_to_a_file_under_the_root(root: Path) -> None:
    with pytest.raises(InputError, match="is outside the image root .*: paths must be relative to `image_root`"):
        image_path(root, str(root / "deep" / "red.png"))


def test_a_link_that_leads_out_of_the_root_is_refused(root: Path) -> None:
    (root / "file.png").symlink_to(root.parent / "green.png")
    (root / "folder").symlink_to(root.parent)
    (root / "inside.png").symlink_to(root / "deep" / "red.png")
    for name in ("file.png", "folder/green.png"):
        with pytest.raises(InputError, match="is outside the image root"):
            load_image(root, name)
    assert load_image(root, "inside.png").size == (4, 2)


def test_an_image_that_is_missing_is_named(root: Path) -> None:
    for name in ("blue.png", "deep", "", "deep/red.png/more.png"):
        with pytest.raises(InputError, match=rf"image '{name}' does not exist under .* Is `image_root` right\?"):
            load_image(root, name)


def test_what_cannot_be_the_name_of_a_file_is_refused(root: Path) -> None:
    (root / "loop.png").symlink_to(root / "loop.png")
    for name in ("a\0b.png", "x" * 5000, "loop.png"):
        with pytest.raises(InputError, match=r"^image '"):
            load_image(root, name)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "RGB"])
def test_every_kind_of_picture_becomes_rgb(root: Path, mode: str) -> None:
    picture = Image.new("RGB", (4, 2), (255, 255, 255)).convert("L").convert("LA" if mode == "PA" else "L")
    (picture.convert("P") if mode == "PA" else picture.convert("RGB")).convert(mode).save(root / "a.tiff")
    loaded = load_image(root, "a.tiff")
    assert (loaded.mode, loaded.size, loaded.getpixel((3, 1))) == ("RGB", (4, 2), (255, 255, 255))


def test_grey_transparent_and_palette_pictures_keep_their_colours(root: Path) -> None:
    Image.new("L", (1, 1), 100).save(root / "grey.png")
    Image.new("RGBA", (1, 1), (10, 20, 30, 40)).save(root / "transparent.png")
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 7, 8, 9])
    palette.save(root / "palette.png")
    pixels = [load_image(root, f"{name}.png").getpixel((0, 0)) for name in ("grey", "transparent", "palette")]
    assert pixels == [(100, 100, 100), (10, 20, 30), (7, 8, 9)]


def test_a_photo_is_turned_as_the_camera_was(root: Path) -> None:
    photo = Image.new("RGB", (8, 4), (0, 0, 0))
    photo.paste((255, 255, 255), (0, 0, 4, 4))  # white on the left
    exif = photo.getexif()
    exif[0x0112] = 6  # the camera stood on its side: turn by 90 degrees clockwise
    photo.save(root / "photo.png", exif=exif)
    upright = load_image(root, "photo.png")
    assert (upright.size, upright.getpixel((2, 1)), upright.getpixel((2, 6))) == ((4, 8), (255,) * 3, (0,) * 3)


@pytest.mark.parametrize(
    ("picture", "mode"), [(Image.new("I;16", (2, 2), 30_000), "I;16"), (Image.new("F", (2, 2), 0.5), "F")]
)
def test_more_than_8_bits_to_a_channel_are_refused_rather_than_clipped(
    root: Path, picture: Image.Image, mode: str
) -> None:
    picture.save(root / "scan.tiff")
    with pytest.raises(
        InputError, match=rf"scan\.tiff has more than 8 bits to a channel \(mode {mode}\).* scale it to"
    ):
        load_image(root, "scan.tiff")


def broken_files() -> dict[str, bytes]:
    """Damaged files of every common format: cut off, or with some bytes changed, in the header or anywhere."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    chance, files = random.Random(0), {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "DDS", "SGI"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind)
        for number in range(45):
            content = bytearray(buffer.getvalue())
            if number % 3 == 0:
                del content[chance.randrange(1, len(content)) :]
            for _ in range(number % 3):
                content[chance.randrange(60 if number % 2 else len(content))] = chance.randrange(256)
            files[f"{kind}-{number}"] = bytes(content)
    return files


@pytest.mark.filterwarnings("ignore:::PIL")
def test_a_broken_file_is_a_picture_or_a_complaint_and_nothing_else(root: Path) -> None:
    complaints = {}
    for name, content in broken_files().items():
        (root / name).write_bytes(content)
        try:
            assert load_image(root, name).mode == "RGB"
        except InputError as error:
            complaints[name] = str(error)
    assert len(complaints) > 100
    for name, complaint in complaints.items():
        assert complaint.startswith(f"image {root.resolve() / name} cannot be decoded (")
        assert complaint.endswith("the file is broken or not an image.")


def test_a_picture_that_unpacks_to_too_many_pixels_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(root / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png cannot be decoded \(Image size \(10000 pixels\) exceeds limit"):
        load_image(root, "bomb.png")


def test_distinct_images_are_counted_and_each_is_opened_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (2, 2)).save(root / "grey.png")
    opened, really_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path).name) or really_open(path))
    rows = [
        {"id": "a", "images": ["deep/red.png", "grey.png"]},
        {"id": "b", "images": ["grey.png"]},
        {"id": "c", "images": []},
        {"id": "d"},
        {"id": "e", "images": None},
    ]
    assert check_images(iter(rows), root) == 2
    assert sorted(opened) == ["grey.png", "red.png"]
    assert check_images([], root) == 0


def test_a_missing_image_is_named_with_the_first_row_that_wants_it(root: Path) -> None:
    rows = [{"id": "a", "images": ["deep/red.png"]}, *({"id": name, "images": ["blue.png"]} for name in "bc")]
    with pytest.raises(InputError, match=r"^row 'b': image 'blue\.png' does not exist under"):
        check_images(rows, root)


def test_a_truncated_image_is_named_with_its_row(root: Path) -> None:
    noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    noise.save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"^row 'b': image .*cut\.jpg cannot be decoded \(.*truncated"):
        check_images([{"id": "a", "images": ["deep/red.png"]}, {"id": "b", "images": ["cut.jpg"]}], root)
