"""The pixels of image files: transparency, depth, orientation, frames. Files are written byte by byte where Pillow
cannot write them, and values are computed by hand."""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line
from PIL import Image

from icenet.core.config import ImageDataConfig
from icenet.core.data.images import files
from icenet.core.data.images.dataset import ImageDataset
from icenet.core.data.images.decode import decode
from icenet.core.data.images.files import FileImages, find_images
from icenet.core.errors import ConfigError, DataError
from icenet.core.host import threads

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""Colour types of PNG."""


def png(path: Path, depth: int, kind: int, width: int, row: bytes, **chunks: bytes) -> Path:
    """Writes a PNG of one row of pixels, with the chunks tRNS and PLTE if given (https://www.w3.org/TR/png)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    content = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    content += b"".join(chunk(name.encode(), chunks[name]) for name in ("PLTE", "tRNS") if name in chunks)
    content += chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def over(colour: Any, alpha: float, background: Any) -> Any:
    """Returns colours over a background, as floats (Porter and Duff, 1984)."""
    return alpha / 255 * np.asarray(colour, np.float64) + (1 - alpha / 255) * np.asarray(background, np.float64)


def values(path: Path, channels: int, background: str = "white") -> Any:
    """Returns the pixels of an image of one row, `[width]` or `[width, 3]`."""
    return decode(path, None, channels, background).pixels[0].squeeze(-1 if channels == 1 else ())


BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "#20c0FF": (32, 192, 255)}
LUMA = np.array([0.299, 0.587, 0.114])
"""Grey value of a colour (ITU-R BT.601), as Pillow computes it."""


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_black_glyph_on_a_transparent_background(channels: int, background: str, tmp_path: Path) -> None:
    alphas = np.array([0, 1, 100, 128, 254, 255], np.uint8)
    pixels = np.zeros((1, 6, 4), np.uint8)
    pixels[0, :, 3] = alphas
    pixels[0, 0, :3] = 77  # the colour of an invisible pixel has no effect
    wanted = np.array([over((0, 0, 0), alpha, BACKGROUNDS[background]) for alpha in alphas])
    wanted = wanted @ LUMA if channels == 1 else wanted
    pictures = {
        **{f"rgba.{suffix}": Image.fromarray(pixels) for suffix in ("png", "webp", "tif")},
        **{f"la.{suffix}": Image.fromarray(pixels[..., 2:]) for suffix in ("png", "tif")},
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
        found = decode(tmp_path / name, None, channels, background)
        assert found.is_transparent
        assert np.abs(found.pixels[0].squeeze(-1 if channels == 1 else ()) - wanted).max() <= 1, name


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("key", [0, 1])
def test_the_transparent_grey_of_a_png_has_the_depth_of_the_file(depth: int, key: int, tmp_path: Path) -> None:
    row = bytes([0b01 << 6 if depth == 1 else 1 << (8 - 2 * depth)]) if depth < 8 else bytes([0, 1])
    if depth == 16:
        row = struct.pack(">2H", 0, 1)
    path = png(tmp_path / "x.png", depth, GREY, 2, row, tRNS=struct.pack(">H", key))
    opaque = [0, round(255 / (2**depth - 1))]
    wanted = [32 if value == key else opaque[value] for value in (0, 1)]
    np.testing.assert_array_equal(values(path, 1, "#202020"), wanted)


def test_the_transparent_colour_of_a_png(tmp_path: Path) -> None:
    path = png(tmp_path / "8.png", 8, RGB, 3, bytes([9, 8, 7, 9, 8, 6, 0, 0, 0]), tRNS=struct.pack(">3H", 9, 8, 7))
    np.testing.assert_array_equal(values(path, 3), [[255, 255, 255], [9, 8, 6], [0, 0, 0]])
    colour = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    path = png(tmp_path / "16.png", 16, RGB, 2, colour + bytes(6), tRNS=colour)
    np.testing.assert_array_equal(values(path, 3), [[255, 255, 255], [0, 0, 0]])


@pytest.mark.parametrize("alphas", [bytes([0]), bytes([0, 128]), bytes([255, 0, 255])])
def test_transparent_colours_of_a_palette(alphas: bytes, tmp_path: Path) -> None:
    palette = [(0, 0, 0), (200, 100, 0), (10, 20, 30)]
    path = png(tmp_path / "x.png", 8, PALETTE, 3, bytes([0, 1, 2]), PLTE=bytes(sum(palette, ())), tRNS=alphas)
    wanted = [over(colour, alpha, (255, 255, 255)) for colour, alpha in zip(palette, alphas + b"\xff" * 2)]  # noqa: B905
    assert np.abs(values(path, 3) - np.array(wanted)).max() <= 1
    assert np.abs(values(path, 1) - np.array(wanted) @ LUMA).max() <= 1


def test_transparency_of_16_bits(tmp_path: Path) -> None:
    path = png(tmp_path / "la.png", 16, GREY_ALPHA, 2, struct.pack(">4H", 0, 0, 0x8000, 0xFFFF))
    np.testing.assert_array_equal(values(path, 1), [255, 128])
    path = png(tmp_path / "rgba.png", 16, RGBA, 2, struct.pack(">8H", 0, 0, 0, 0, 0xFFFF, 0, 0x8000, 0xFFFF))
    np.testing.assert_array_equal(values(path, 3), [[255, 255, 255], [255, 0, 128]])


def test_a_gif_with_a_transparent_colour(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.save(tmp_path / "x.gif", transparency=0)
    np.testing.assert_array_equal(values(tmp_path / "x.gif", 3), [[255, 255, 255], [255, 0, 0]])


def test_transparent_pixels_are_blended_before_the_image_is_scaled(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, :2] = (0, 0, 0, 255)
    pixels[:, 2:] = (255, 0, 0, 0)  # red, and invisible
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(decode(tmp_path / "x.png", 1, 3).pixels, [[[128, 128, 128]]])


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8(suffix: str, tmp_path: Path) -> None:
    grey = np.array([[0, 128, 129, 1000, 32768, 65278, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / f"x.{suffix}")
    wanted = np.round(grey[0] / 257)
    np.testing.assert_array_equal(values(tmp_path / f"x.{suffix}", 1), wanted)
    np.testing.assert_array_equal(values(tmp_path / f"x.{suffix}", 3), np.repeat(wanted[:, None], 3, 1))


@pytest.mark.parametrize(("mode", "value"), [("I", 7), ("F", 0.5), ("LAB", (1, 2, 3))])
def test_pixels_without_an_8_bit_form(mode: str, value: Any, tmp_path: Path) -> None:
    Image.new(mode, (2, 2), value).save(tmp_path / "x.tif")
    with pytest.raises(DataError) as caught:
        decode(tmp_path / "x.tif", None, 3)
    assert is_one_line(caught.value, "x.tif", f"mode {mode}", "8-bit")


def test_other_modes(tmp_path: Path) -> None:
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    np.testing.assert_allclose(values(tmp_path / "cmyk.jpg", 3), [[255, 0, 0]], atol=3)
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "1.png")
    np.testing.assert_array_equal(values(tmp_path / "1.png", 1), [255, 0])


def test_orientation_with_transparency_and_16_bits(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(values(tmp_path / "a.png", 1), [255, 0])
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "b.png", exif=exif)
    np.testing.assert_array_equal(values(tmp_path / "b.png", 1), [255, 0])


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_the_first_frame_is_read_and_that_is_said(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("#0a0a0a", "#c8c8c8")]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        frames[1].save(tmp_path / name / f"1.{suffix}")
    frames[0].save(tmp_path / "b" / f"2.{suffix}", **options, **({"lossless": True} if suffix == "webp" else {}))
    for limit in [files.IN_MEMORY] + [0] * (suffix != "png"):  # decoded at once, or later
        monkeypatch.setattr(files, "IN_MEMORY", limit)
        found = find_images(str(tmp_path))
        assert found.images.take(np.array([2]))[0, 0, 0].tolist() == [10, 10, 10]
        (note,) = found.notes
        assert is_one_line(note, "1 image", "first frame", str(tmp_path / "b" / f"2.{suffix}"))


def test_a_photo_with_a_second_picture_is_no_animation(tmp_path: Path) -> None:
    content = io.BytesIO()
    photo, depth_map = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    photo.save(content, "MPO", save_all=True, append_images=[depth_map])
    (tmp_path / "x.jpg").write_bytes(content.getvalue())
    found = decode(tmp_path / "x.jpg", None, 1)
    assert not found.has_more_frames and found.pixels.min() >= 250


def test_the_dataset_uses_the_background_of_the_config(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / name / "1.png")
        Image.new("RGBA", (2, 2), (0, 0, 0, 255)).save(tmp_path / name / "2.png")
    for background, value in (("white", 255), ("#ff0000", 76)):
        settings = ImageDataConfig(
            source=str(tmp_path), channels=1, normalize=False, validation_fraction=0, background=background
        )
        dataset = ImageDataset.open(settings, 0)
        inputs = dataset.train_batch(0, 4)["inputs"].max(axis=(1, 2, 3))
        np.testing.assert_allclose(sorted(inputs), [0, 0, value / 255, value / 255], atol=1e-6)
        assert dataset.facts["background"] == background and dataset.source.is_transparent
    with pytest.raises(ConfigError) as caught:
        ImageDataConfig(background="#ff00")
    assert is_one_line(caught.value, "data.background", "#ff00")


def test_damaged_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Any cut is an error or, if only the end mark of the file is missing, has the right pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(pixels).save(path)
        whole, content = decode(path, None, 3).pixels, path.read_bytes()
        refused = 0
        for length in sorted({0, 1, *range(5, len(content), len(content) // 12), len(content) - 1}):
            path.write_bytes(content[:length])
            try:
                np.testing.assert_array_equal(decode(path, None, 3).pixels, whole)
            except DataError as error:
                assert is_one_line(error, str(path))
                refused += 1
        assert refused >= 10, suffix
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError) as caught:
        decode(path, None, 3)
    assert is_one_line(caught.value, str(path), "Git LFS pointer", "git lfs pull")


def test_threads_decode_what_one_decodes_and_leave_the_filters_of_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = np.random.default_rng(0)
    paths = [tmp_path / f"{index:03}.png" for index in range(300)]  # more than are decoded at once
    for path in paths:
        pixels = drawn.integers(0, 256, (9, 7, 4), np.uint8)
        pixels[..., 3] = 255 * drawn.integers(0, 2)  # some are transparent
        Image.fromarray(pixels).save(path)
    indices = drawn.permutation(300)
    filters = list(warnings.filters)
    found = []
    for cores in (1, 8):
        monkeypatch.setattr(threads, "usable_cores", lambda cores=cores: cores)
        images = FileImages(paths, 5, 3)
        found.append(images.take(indices))
        assert images.is_transparent
    np.testing.assert_array_equal(*found)
    assert warnings.filters == filters
