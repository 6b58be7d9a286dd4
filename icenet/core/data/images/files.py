"""Reads collections of images: class folders, MNIST's IDX files, CIFAR-10's binary files, scikit-learn's digits.

Files are not trusted: the size that a header claims is checked before memory is allocated. Pickles are not opened.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core.data.images.decode import INSTALL, WHITE, Pixels, decode, fit, has_more_frames, opened, pillow
from icenet.core.data.images.folders import class_folders
from icenet.core.data.images.preprocess import Preprocessor
from icenet.core.errors import DataError
from icenet.core.host.threads import for_ranges
from icenet.core.messages import some

IN_MEMORY = 1 << 30
"""Size in bytes up to which the images of a folder are decoded once and kept."""

AT_ONCE = 256
"""Files of which up to 8 threads decode a part each: 64 photos of 640 x 480 take 50 ms instead of 259 on 16 cores."""


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
        held_out: Number of images at the end that are the source's own validation set.
        notes: Messages for the user on how the images were read.
        is_transparent: Whether an image is transparent somewhere; None if the images are decoded later.
    """

    images: Images
    labels: NDArray[np.int32]
    classes: list[str]
    description: str
    fingerprint: str
    held_out: int = 0
    notes: Sequence[str] = ()
    is_transparent: bool | None = False


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
    """Images that are decoded from their files in each call of `take`.

    Attributes:
        paths: The files.
        is_transparent: Whether a decoded image was transparent somewhere.
        with_more_frames: Decoded files of several frames.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int | None,
        channels: int,
        background: str = WHITE,
        processor: Preprocessor | None = None,
    ) -> None:
        self.paths = paths
        height, width = (size or 0, size or 0) if processor is None else processor.check_shape()
        self.shape = (height, width, channels)
        self.background = background
        self.processor = processor
        self.is_transparent = False
        self.with_more_frames: list[Path] = []

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: NDArray[np.int64]) -> Pixels:
        pixels = np.empty((len(indices), *self.shape), np.uint8)
        for first in range(0, len(indices), AT_ONCE):  # Ctrl-C waits for the threads
            block, rows = pixels[first : first + AT_ONCE], indices[first : first + AT_ONCE]
            for_ranges(partial(self._decode, block, rows), len(rows), 4, 8)
        return pixels

    def _decode(self, pixels: Pixels, indices: NDArray[np.int64], start: int, stop: int) -> None:
        """Decodes a part of some images into `pixels`; several threads do so at the same time."""
        for image, index in zip(pixels[start:stop], indices[start:stop], strict=True):
            size = self.shape[0] if self.processor is None else None
            found, is_transparent, has_more = decode(self.paths[index], size, self.shape[2], self.background)
            image[:] = found if self.processor is None else self.processor.fitted(found)
            if is_transparent:
                self.is_transparent = True
            if has_more:
                self.with_more_frames.append(self.paths[index])


def find_images(
    source: str,
    size: int | None = None,
    channels: int | None = None,
    background: str = WHITE,
    processor: Preprocessor | None = None,
) -> ImageSource:
    """Opens the images that `data.source` names.

    Args:
        source: A folder, or 'digits'.
        size: Height and width in pixels; None keeps the images' own, which must be equal.
        channels: 1 or 3; None keeps the images' own, and 3 for class folders.
        background: Colour behind transparent pixels of image files (see `decode.decode`).
        processor: Resizes and crops the images instead of `size`.

    Raises:
        ConfigError: The processor gives images of different sizes.
        DataError: The source does not exist, is not supported, or a file is damaged.
    """
    if source == "digits":
        return _digits(size, channels, processor)
    path = Path(source).expanduser()
    if path.is_file():
        raise _not_a_folder(path)
    if not path.is_dir():
        raise DataError(f"data.source {source!r} does not exist; name a folder of images, or 'digits'")
    names = {entry.name for entry in path.iterdir()}
    if any("idx3-ubyte" in name for name in names):
        return _mnist(path, sorted(names), size, channels, processor)
    if any(name.startswith("data_batch_") and name.endswith(".bin") for name in names):
        return _cifar(path, sorted(names), size, channels, processor)
    if "batches.meta" in names or "data_batch_1" in names:
        raise DataError(
            f"data.source {source!r} is the Python version of CIFAR-10. Pickles can run code and are not "
            "opened; use the binary version (data_batch_1.bin and so on)"
        )
    return _class_folders(path, size, channels, background, processor)


def _not_a_folder(path: Path) -> DataError:
    if path.name.endswith((".tar.gz", ".tgz", ".tar", ".zip")):
        return DataError(f"data.source {str(path)!r} is an archive; unpack it and name the folder")
    if path.suffix in (".pkl", ".pickle"):
        return DataError(
            f"data.source {str(path)!r} is a pickle. Pickles can run code and are not opened; name a folder of images"
        )
    return DataError(f"data.source {str(path)!r} is a file; name the folder that holds it")


def _converted(pixels: Pixels, size: int | None, channels: int | None, processor: Preprocessor | None) -> ArrayImages:
    """Converts an array of images, uint8 `[N, H, W, C]`, to a size and a number of channels."""
    _, height, width, own = pixels.shape
    channels = channels or own
    if processor is None and (size is None or (height, width) == (size, size)) and channels == own:
        return ArrayImages(pixels)
    Image = pillow()
    size = size or height
    shape = (size, size) if processor is None else processor.check_shape()
    result = np.empty((len(pixels), *shape, channels), np.uint8)
    for target, image in zip(result, pixels, strict=True):
        picture = Image.fromarray(image[:, :, 0] if own == 1 else image).convert("L" if channels == 1 else "RGB")
        if processor is None:
            target[:] = np.asarray(fit(picture, size)).reshape(target.shape)
        else:
            target[:] = processor.fitted(np.asarray(picture).reshape(height, width, channels))
    return ArrayImages(result)


# ---- collections ------------------------------------------------------------------------------------------


def _source(
    images: Images,
    labels: NDArray[Any],
    classes: list[str],
    description: str,
    content: bytes,
    held_out: int = 0,
    notes: Sequence[str] = (),
    is_transparent: bool | None = False,
) -> ImageSource:
    if len(classes) < 2:
        raise DataError(f"{description} has only one class ({classes[0]}); a classifier needs two or more")
    digest = hashlib.sha256(repr((images.shape, classes, held_out)).encode())
    digest.update(np.ascontiguousarray(labels, np.int32).tobytes())
    digest.update(content)
    fingerprint = digest.hexdigest()
    return ImageSource(
        images, labels.astype(np.int32), classes, description, fingerprint, held_out, notes, is_transparent
    )


def _digits(size: int | None, channels: int | None, processor: Preprocessor | None) -> ImageSource:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"data.source 'digits' needs scikit-learn: {INSTALL}") from None
    digits = load_digits()
    pixels = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # grey values from 0 to 16
    images = _converted(pixels, size, channels, processor)
    classes = [str(name) for name in digits.target_names]
    return _source(images, digits.target, classes, "scikit-learn's digits", images.pixels.tobytes())


def _class_folders(
    folder: Path, size: int | None, channels: int | None, background: str, processor: Preprocessor | None
) -> ImageSource:
    found = class_folders(folder)
    parts = [found.train] if found.validation is None else [found.train, found.validation]
    paths = [path for part in parts for members in part for path in members]
    labels = [label for part in parts for label, members in enumerate(part) for _ in members]
    held_out = 0 if found.validation is None else sum(map(len, found.validation))
    if size is None and processor is None:
        size = _common_size(paths)
    files = FileImages(paths, size, channels or 3, background, processor)
    labels_array, description = np.array(labels), f"folder {folder}"
    if len(paths) * math.prod(files.shape) <= IN_MEMORY:
        images = ArrayImages(files.take(np.arange(len(paths))))
        content, is_transparent = images.pixels.tobytes(), files.is_transparent
        notes = [*found.notes, *frames_note(sorted(files.with_more_frames))]
        return _source(images, labels_array, found.classes, description, content, held_out, notes, is_transparent)
    content = repr([(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]).encode()
    content += b"" if background == WHITE else background.encode()
    content += b"" if processor is None else repr((processor.resize, processor.crop)).encode()
    notes = [*found.notes, *frames_note(path for path in paths if _may_have_frames(path))]
    return _source(files, labels_array, found.classes, description, content, held_out, notes, None)


def _may_have_frames(path: Path) -> bool:
    """Returns whether a file has several frames; False without a look inside for formats that usually have one."""
    if path.suffix.lower() not in (".gif", ".tif", ".tiff", ".webp"):
        return False
    with opened(path) as image:
        return has_more_frames(image)


def frames_note(paths: Iterable[Path]) -> list[str]:
    """Returns a message about the files of several frames, or none."""
    names = [str(path) for path in paths]
    files = "image of several frames: its" if len(names) == 1 else "images of several frames: their"
    return [f"{len(names):,} {files} first frame is read ({some(names)})"] if names else []


def _common_size(paths: list[Path]) -> int:
    """Returns the height and width of all images. Raises DataError if they are not square and of one size."""
    common: int | None = None
    for path in paths:
        with opened(path) as image:
            width, height = image.size
        common = common or height
        if not width == height == common:
            raise DataError(
                f"{path} is {width}x{height} pixels, but images must be square and of one size; "
                "set data.image_size to resize them, or data.preprocessor for another height than width"
            )
    assert common is not None
    return common


def _mnist(
    folder: Path, names: list[str], size: int | None, channels: int | None, processor: Preprocessor | None
) -> ImageSource:
    def read_set(*words: str) -> tuple[Pixels, NDArray[Any]] | None:
        found = [name for name in names if "idx3-ubyte" in name and any(word in name for word in words)]
        if not found:
            return None
        if len({name.removesuffix(".gz") for name in found}) > 1:
            raise DataError(
                f"data.source {str(folder)!r} has several sets of images: {some(found)}; move all but one out"
            )
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
    images = _converted(pixels, size, channels, processor)
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


def _cifar(
    folder: Path, names: list[str], size: int | None, channels: int | None, processor: Preprocessor | None
) -> ImageSource:
    expected = [f"data_batch_{number}.bin" for number in range(1, 6)]
    train = [name for name in expected if name in names]
    tests = [name for name in names if name == "test_batch.bin"]
    missing = [name for name in expected if name not in names]
    others = [name for name in names if name.endswith(".bin") and name not in train + tests]
    notes = [f"{folder}: {some(missing)} of CIFAR-10 is missing: an incomplete copy?"] if missing else []
    notes += [f"{folder}: not read: {some(others)}, which is no file of CIFAR-10"] if others else []
    if not train:
        raise DataError(f"data.source {str(folder)!r} has no training images of CIFAR-10 ({expected[0]} and so on)")
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
    images = _converted(pixels, size, channels, processor)
    held_out = len(parts[-1]) if tests else 0
    description, content = f"CIFAR-10 in {folder}", images.pixels.tobytes()
    return _source(images, records[:, 0], classes, description, content, held_out, notes)
