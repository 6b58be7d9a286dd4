"""Reads images: single files, class folders, MNIST's IDX files, CIFAR-10's binary files, scikit-learn's digits.

Files are not trusted: the size that a header claims is checked before memory is allocated. Pickles are not opened.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import DataError

Pixels = NDArray[np.uint8]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
MAX_PIXELS = 100_000_000
"""Largest number of pixels of one image, 300 MB in colour. A file of a few kilobytes can claim more."""
IN_MEMORY = 1 << 30
"""Size in bytes up to which the images of a folder are decoded once and kept."""
_TEST_FOLDERS = ("validation", "val", "test")
_INSTALL = "pip install 'icenet[images]'"


class Images(Protocol):
    """Images of one size, by index."""

    shape: tuple[int, int, int]
    """(height, width, channels)"""

    def __len__(self) -> int: ...

    def take(self, indices: NDArray[np.int64]) -> Pixels:
        """Returns the images of these indices, uint8 `[len(indices), H, W, C]`."""


@dataclass(frozen=True)
class ImageSource:
    """Labelled images.

    Attributes:
        images: The images.
        labels: Indices into `classes`, int32.
        classes: Names of the classes.
        description: Names the source in messages.
        fingerprint: Hash of images and labels, which a resumed run compares.
        held_out: Number of images at the end that are the source's own test set.
    """

    images: Images
    labels: NDArray[np.int32]
    classes: list[str]
    description: str
    fingerprint: str
    held_out: int = 0


class ArrayImages:
    """Images in memory, uint8 `[N, H, W, C]`."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.shape = pixels.shape[1:]

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: NDArray[np.int64]) -> Pixels:
        return self.pixels[indices]


class FileImages:
    """Images that are decoded from their files in each call of `take`."""

    def __init__(self, paths: Sequence[Path], size: int, channels: int) -> None:
        self.paths = paths
        self.shape = (size, size, channels)

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: NDArray[np.int64]) -> Pixels:
        pixels = np.empty((len(indices), *self.shape), np.uint8)
        for image, index in zip(pixels, indices, strict=True):
            image[:] = read_image(self.paths[index], self.shape[0], self.shape[2])
        return pixels


def find_images(source: str, size: int | None = None, channels: int | None = None) -> ImageSource:
    """Opens the images that `data.source` names.

    Args:
        source: A folder, or 'digits'.
        size: Height and width in pixels; None keeps the images' own, which must be equal.
        channels: 1 or 3; None keeps the images' own, and 3 for class folders.

    Raises:
        DataError: The source does not exist, is not supported, or a file is damaged.
    """
    if source == "digits":
        return _digits(size, channels)
    path = Path(source).expanduser()
    if path.is_file():
        raise _not_a_folder(path)
    if not path.is_dir():
        raise DataError(f"data.source {source!r} does not exist; name a folder of images, or 'digits'")
    names = {entry.name for entry in path.iterdir()}
    if any("idx3-ubyte" in name for name in names):
        return _mnist(path, sorted(names), size, channels)
    if any(name.startswith("data_batch_") and name.endswith(".bin") for name in names):
        return _cifar(path, sorted(names), size, channels)
    if "batches.meta" in names or "data_batch_1" in names:
        raise DataError(
            f"data.source {source!r} is the Python version of CIFAR-10. Pickles can run code and are not "
            "opened; use the binary version (data_batch_1.bin and so on)"
        )
    return _class_folders(path, size, channels)


def _not_a_folder(path: Path) -> DataError:
    if path.name.endswith((".tar.gz", ".tgz", ".tar", ".zip")):
        return DataError(f"data.source {str(path)!r} is an archive; unpack it and name the folder")
    if path.suffix in (".pkl", ".pickle"):
        return DataError(
            f"data.source {str(path)!r} is a pickle. Pickles can run code and are not opened; name a folder of images"
        )
    return DataError(f"data.source {str(path)!r} is a file; name the folder that holds it")


# ---- single images ----------------------------------------------------------------------------------------


def pillow() -> Any:
    """Imports Pillow's module `Image`. Raises DataError if it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"reading image files needs Pillow: {_INSTALL}") from None
    return Image


def read_image(path: Path, size: int | None, channels: int) -> Pixels:
    """Reads one image, uint8 `[H, W, channels]`.

    The image is rotated as its EXIF orientation says, and its alpha channel is dropped.

    Args:
        path: The file.
        size: Height and width of the result; None keeps the image's own. The image is scaled until its shorter side
            has this length, by averaging pixels or, to enlarge it, bilinearly, and its centre is cropped.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        DataError: The file is not an image, is damaged or too large, or has more than 8 bits per channel.
    """
    pillow()  # the error if it is not installed
    from PIL import ImageOps

    with _opened(path) as image:
        picture = _fit(ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB"), size)
        return np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens an image whose header is checked. Pillow decodes the pixels when they are used."""
    Image = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual tags, and about a size that is checked here
            with Image.open(path) as image:
                if math.prod(image.size) > MAX_PIXELS:
                    raise DataError(
                        f"{path}: claims {image.size[0]:,} x {image.size[1]:,} pixels and is not opened "
                        f"(the limit is {MAX_PIXELS:,}); shrink it"
                    )
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"{path}: has pixels of mode {image.mode}, more than 8 bits; save it as 8-bit")
                yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (Image.UnidentifiedImageError, IsADirectoryError):
        raise DataError(f"{path}: not an image that Pillow can read; remove it, or convert it to PNG") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: claims far too many pixels and is not opened; shrink it") from None
    except PermissionError:
        raise DataError(f"{path}: cannot be read: permission denied") from None
    except Exception as error:  # the decoder of a damaged file can raise anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: damaged or cut short ({first}); remove it, or download it again") from None


def _fit(picture: Any, size: int | None) -> Any:
    """Scales an image until its shorter side is `size`, and crops its centre."""
    width, height = picture.size
    if size is None or (width, height) == (size, size):
        return picture
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    filters = pillow().Resampling
    return picture.resize((size, size), filters.BOX if side > size else filters.BILINEAR, box=box)


def _converted(pixels: Pixels, size: int | None, channels: int | None) -> ArrayImages:
    """Converts an array of images, uint8 `[N, H, W, C]`, to a size and a number of channels."""
    _, height, width, own = pixels.shape
    channels = channels or own
    if (size is None or (height, width) == (size, size)) and channels == own:
        return ArrayImages(pixels)
    Image = pillow()
    size = size or height
    result = np.empty((len(pixels), size, size, channels), np.uint8)
    for target, image in zip(result, pixels, strict=True):
        picture = Image.fromarray(image[:, :, 0] if own == 1 else image).convert("L" if channels == 1 else "RGB")
        target[:] = np.asarray(_fit(picture, size)).reshape(target.shape)
    return ArrayImages(result)


# ---- collections ------------------------------------------------------------------------------------------


def _source(
    images: Images, labels: NDArray[Any], classes: list[str], description: str, content: bytes, held_out: int = 0
) -> ImageSource:
    if len(classes) < 2:
        raise DataError(f"{description} has only one class ({classes[0]}); a classifier needs two or more")
    digest = hashlib.sha256(repr((images.shape, classes, held_out)).encode())
    digest.update(np.ascontiguousarray(labels, np.int32).tobytes())
    digest.update(content)
    return ImageSource(images, labels.astype(np.int32), classes, description, digest.hexdigest(), held_out)


def _digits(size: int | None, channels: int | None) -> ImageSource:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"data.source 'digits' needs scikit-learn: {_INSTALL}") from None
    digits = load_digits()
    pixels = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # grey values from 0 to 16
    images = _converted(pixels, size, channels)
    classes = [str(name) for name in digits.target_names]
    return _source(images, digits.target, classes, "scikit-learn's digits", images.pixels.tobytes())


def _class_folders(folder: Path, size: int | None, channels: int | None) -> ImageSource:
    below = _subfolders(folder)
    held_out = next((name for name in _TEST_FOLDERS if name in below), None)
    parts = [folder]
    if held_out is not None and "train" in below:
        parts = [folder / "train", folder / held_out]
    classes = _subfolders(parts[0])
    if not classes:
        raise DataError(
            f"data.source {str(folder)!r} contains no folders; it needs one for each class, with its images"
        )
    if len(parts) == 2 and _subfolders(parts[1]) != classes:
        raise DataError(f"{parts[1]} does not contain the same class folders as {parts[0]}")
    paths: list[Path] = []
    labels: list[int] = []
    for part in parts:
        first = len(paths)
        for label, name in enumerate(classes):
            found = image_files(part / name)
            if not found:
                raise DataError(f"class folder {part / name} contains no images ({', '.join(sorted(SUFFIXES))})")
            paths += found
            labels += [label] * len(found)
    channels = channels or 3
    images: Images
    size = size or _common_size(paths)
    if len(paths) * size * size * channels <= IN_MEMORY:
        images = ArrayImages(FileImages(paths, size, channels).take(np.arange(len(paths))))
        content = images.pixels.tobytes()
    else:
        images = FileImages(paths, size, channels)
        content = repr([(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]).encode()
    test = len(paths) - first if len(parts) == 2 else 0
    return _source(images, np.array(labels), classes, f"folder {folder}", content, test)


def image_files(folder: Path) -> list[Path]:
    """Returns the image files in a folder and its subfolders, by suffix, sorted. Hidden files are skipped."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _common_size(paths: list[Path]) -> int:
    """Returns the height and width of all images. Raises DataError if they are not square and of one size."""
    common: int | None = None
    for path in paths:
        with _opened(path) as image:
            width, height = image.size
        common = common or height
        if not width == height == common:
            raise DataError(
                f"{path} is {width}x{height} pixels, but images must be square and of one size; "
                "set data.image_size to resize them"
            )
    assert common is not None
    return common


def _mnist(folder: Path, names: list[str], size: int | None, channels: int | None) -> ImageSource:
    def read_set(*words: str) -> tuple[Pixels, NDArray[Any]] | None:
        found = [name for name in names if "idx3-ubyte" in name and any(word in name for word in words)]
        if not found:
            return None
        labels = folder / found[0].replace("images", "labels").replace("idx3", "idx1")
        if not labels.is_file():
            twin = labels.with_name(labels.name.removesuffix(".gz") + ("" if labels.suffix == ".gz" else ".gz"))
            if not twin.is_file():
                raise DataError(f"{folder / found[0]}: its file of labels is missing ({labels.name})")
            labels = twin
        pair = read_idx(folder / found[0], 3), read_idx(labels, 1)
        if len(pair[0]) != len(pair[1]):
            counts = f"{len(pair[0])} images, but {labels.name} has {len(pair[1])} labels"
            raise DataError(f"{folder / found[0]}: {counts}; download both again")
        return pair

    train, test = read_set("train"), read_set("t10k", "test")
    if train is None:
        raise DataError(f"data.source {str(folder)!r} has IDX files, but no training images (train-images-...)")
    if test is not None and test[0].shape[1:] != train[0].shape[1:]:
        raise DataError(f"{folder}: training images are {train[0].shape[1:]} and test images {test[0].shape[1:]}")
    parts = [train] if test is None else [train, test]
    pixels = np.concatenate([images for images, _ in parts])[..., None]
    labels = np.concatenate([labels for _, labels in parts])
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    images = _converted(pixels, size, channels)
    held_out = 0 if test is None else len(test[0])
    return _source(images, labels, classes, f"IDX files in {folder}", images.pixels.tobytes(), held_out)


def read_idx(path: Path, axes: int) -> Pixels:
    """Reads an IDX file of unsigned bytes, gzipped or not.

    Format: http://yann.lecun.com/exdb/mnist/

    Args:
        path: The file.
        axes: Number of axes of its array.

    Raises:
        DataError: The file has another type or number of axes, or its length differs from its header.
    """
    try:
        zipped = path.open("rb").read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            header = file.read(4 + 4 * axes)
            if header[:4] != bytes([0, 0, 8, axes]) or len(header) != 4 + 4 * axes:
                raise DataError(f"{path}: not an IDX file of {axes}-d unsigned bytes")
            shape = tuple(int(length) for length in np.frombuffer(header, ">u4", offset=4))
            expected = math.prod(shape)
            size = path.stat().st_size
            # gzip compresses 1032-fold at most
            possible = expected <= 1100 * size if zipped else expected == size - len(header)
            if expected == 0 or not possible:
                raise DataError(f"{path}: damaged or cut short: its header says {shape}")
            content = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut short ({error}); download it again") from None
    if len(content) != expected:
        raise DataError(f"{path}: damaged or cut short: its header says {shape}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _cifar(folder: Path, names: list[str], size: int | None, channels: int | None) -> ImageSource:
    train = [name for name in names if name.startswith("data_batch_") and name.endswith(".bin")]
    tests = [name for name in names if name == "test_batch.bin"]
    parts = []
    for name in train + tests:
        path = folder / name
        if path.stat().st_size == 0 or path.stat().st_size % 3073:
            raise DataError(
                f"{path}: damaged or cut short: {path.stat().st_size:,} bytes are not a multiple of 3,073"
            )
        parts.append(np.fromfile(path, np.uint8).reshape(-1, 3073))
        if parts[-1][:, 0].max() > 9:
            raise DataError(f"{path}: not CIFAR-10's binary version: it contains the label {parts[-1][:, 0].max()}")
    records = np.concatenate(parts)
    pixels = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    classes = [str(label) for label in range(10)]
    if "batches.meta.txt" in names:
        named = (folder / "batches.meta.txt").read_text(encoding="utf-8", errors="replace").split()
        classes = named if len(named) == 10 else classes
    images = _converted(pixels, size, channels)
    held_out = len(parts[-1]) if tests else 0
    return _source(images, records[:, 0], classes, f"CIFAR-10 in {folder}", images.pixels.tobytes(), held_out)
