"""Reads one image file as 8-bit pixels: orientation, transparency, depth, colour, size.

Files are not trusted: the size that a header claims is checked before memory is allocated.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import DataError
from icenet.core.files import LFS_POINTER, LFS_REMEDY
from icenet.core.messages import first_line

Pixels = NDArray[np.uint8]

SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
}
MAX_PIXELS = 100_000_000
"""Largest number of pixels of one image, 300 MB in colour. A file of a few kilobytes can claim more."""
INSTALL = "pip install 'icenet[images]'"
WHITE = "white"
"""The default of `data.background`."""

_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
"""Pillow's modes of 8 bits per channel that convert to RGB."""
_PHOTO_FORMATS = {"MPO"}
"""Formats whose further frames are other versions of one photo, such as a thumbnail or a depth map."""


class Decoded(NamedTuple):
    """The pixels of an image file, and what they do not show."""

    pixels: Pixels
    """uint8 `[H, W, channels]`."""
    is_transparent: bool
    """Whether a pixel is transparent, so that the background changes the result."""
    has_more_frames: bool
    """Whether the file contains frames after the first one."""


def pillow() -> Any:
    """Imports Pillow's module `Image`. Raises DataError if it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"reading image files needs Pillow: {INSTALL}") from None
    return Image


def decode(path: Path, size: int | None, channels: int, background: str = WHITE) -> Decoded:
    """Reads one image.

    The image is rotated as its EXIF orientation says. Transparent pixels are blended with the background. Grey values
    of 16 bits (PNG, TIFF, PGM) are scaled to 8. Of several frames the first one is read.

    Args:
        path: The file.
        size: Height and width of the result; None keeps the image's own. The image is scaled until its shorter side
            has this length, by averaging pixels or, to enlarge it, bilinearly, and its centre is cropped.
        channels: 1 (grey) or 3 (RGB).
        background: Colour behind transparent pixels: white, black, gray or #RRGGBB.

    Raises:
        DataError: The file is not an image, is damaged or too large, or has pixels of an unsupported type.
    """
    pillow()  # the error if it is not installed
    with opened(path) as image:
        has_more = has_more_frames(image)
        picture, is_transparent = _opaque(image, background)
        picture = fit(picture.convert("L" if channels == 1 else "RGB"), size)
        pixels = np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)
        return Decoded(pixels, is_transparent, has_more)


def has_more_frames(image: Any) -> bool:
    """Returns whether an opened image is an animation or has several pages."""
    return bool(getattr(image, "is_animated", False)) and image.format not in _PHOTO_FORMATS


def _is_lfs_pointer(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
    return False


_quiet = contextlib.ExitStack()
_quiet_users = 0
_quiet_lock = threading.Lock()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Ignores warnings while a thread is in the block.

    The filters belong to the process: threads that enter and leave `warnings.catch_warnings` in turn would leave them
    changed. So the first thread changes them, and the last one restores them.
    """
    global _quiet_users
    with _quiet_lock:
        if _quiet_users == 0:
            _quiet.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _quiet_users += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if _quiet_users == 0:
                _quiet.close()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens an image whose header is checked. Pillow decodes the pixels when they are used.

    Raises:
        DataError: See `decode`. Errors of the block, in which the pixels are decoded, are included.
    """
    Image = pillow()
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty (0 bytes); remove it, or download it again")
        with _without_warnings(), Image.open(path) as image:  # of unusual tags, and of a size that is checked here
            if math.prod(image.size) > MAX_PIXELS:
                raise DataError(
                    f"{path}: claims {image.size[0]:,} x {image.size[1]:,} pixels and is not opened "
                    f"(the limit is {MAX_PIXELS:,}); shrink it"
                )
            if image.mode not in _MODES and _white(image) is None:
                raise DataError(
                    f"{path}: has pixels of mode {image.mode}, which have no exact 8-bit form; save it as "
                    "8-bit RGB or grey"
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (Image.UnidentifiedImageError, IsADirectoryError):
        if _is_lfs_pointer(path):
            raise DataError(f"{path}: is a Git LFS pointer, not the image; {LFS_REMEDY}") from None
        raise DataError(f"{path}: not an image that Pillow can read; remove it, or convert it to PNG") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: claims far too many pixels and is not opened; shrink it") from None
    except PermissionError:
        raise DataError(f"{path}: cannot be read: permission denied") from None
    except Exception as error:  # the decoder of a damaged file can raise anything
        first = first_line(error)
        raise DataError(f"{path}: damaged or cut short ({first}); remove it, or download it again") from None


def _white(image: Any) -> int | None:
    """Returns the value of white of an image with 16-bit grey values; if white is 0, that of black, negative.

    Returns None for an image of another depth. Pillow drops what it says when it converts the image.
    """
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        return None  # 32 bits, or signed: the value of white is unknown
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return None
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 is the number of bits, and 262 is 0 if white is 0
    bits = tags.get(258, 16)
    largest: int = 2 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1
    return -largest if tags.get(262) == 0 else largest


def _color_key(image: Any) -> Any:
    """Returns the transparent colour of a PNG (chunk tRNS) in the values of Pillow's pixels; None without one."""
    key = image.info.get("transparency")
    if key is None or image.mode not in ("1", "L", "RGB", "I;16", "I"):
        return None
    # the file has it in its own depth; Pillow scales pixels of 1, 2 and 4 bits to 8, and cuts colours of 16 bits to 8
    raw = image.tile[0][3] if image.tile else ""
    if image.mode == "1":
        return 255 if key else 0
    if raw in ("L;2", "L;4"):
        return key * (85 if raw == "L;2" else 17)
    return tuple(value >> 8 for value in key) if raw == "RGB;16B" else key


def _opaque(image: Any, background: str) -> tuple[Any, bool]:
    """Returns an upright image with 8 bits per channel and no transparency, and whether a pixel was transparent."""
    from PIL import Image, ImageOps

    white, key = _white(image), _color_key(image)
    image = ImageOps.exif_transpose(image)
    values = np.asarray(image.convert("L") if image.mode == "1" else image) if white or key is not None else None
    if white is not None:
        grey = np.round(np.asarray(values, np.float64) * (255 / abs(white))).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(255 - grey if white < 0 else grey)
    if key is not None:
        is_key = np.asarray(values == np.asarray(key))
        alpha = Image.fromarray(
            np.where(is_key.all(axis=-1) if is_key.ndim == 3 else is_key, 0, 255).astype(np.uint8)
        )
    elif (
        image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info or _has_palette_alpha(image)
    ):
        image = image.convert("LA" if image.mode in ("LA", "La") else "RGBA")
        alpha = image.getchannel("A")
    else:
        return image, False
    if alpha.getextrema()[0] == 255:
        return image, False
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image.convert("RGB"), mask=alpha)
    return canvas, True


def _has_palette_alpha(image: Any) -> bool:
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def fit(picture: Any, size: int | None) -> Any:
    """Scales an image until its shorter side is `size`, and crops its centre."""
    width, height = picture.size
    if size is None or (width, height) == (size, size):
        return picture
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    filters = pillow().Resampling
    return picture.resize((size, size), filters.BOX if side > size else filters.BILINEAR, box=box)
