"""Image data: reading, splitting, augmenting and normalizing; damaged and unsupported files; training on the digits
of scikit-learn and classifying image files with the result."""

from __future__ import annotations

import gzip
import json
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, is_one_line
from PIL import Image

from icenet.cli.main import main
from icenet.commands.predict import predict
from icenet.core import backends, rng
from icenet.core.config import Config, ImageDataConfig
from icenet.core.data.datasets import dataset_for
from icenet.core.data.images import files as image_files
from icenet.core.data.images.augment import augment, normalize
from icenet.core.data.images.dataset import ImageDataset, class_table
from icenet.core.data.images.decode import decode
from icenet.core.data.images.files import FileImages, find_images, read_idx
from icenet.core.errors import CheckpointError, ConfigError, DataError, UsageError
from icenet.core.report.metrics import MetricsLog
from icenet.core.runs import checkpoint
from icenet.core.training.trainer import Trainer

ON_BOTH = pytest.mark.parametrize("backend", BACKENDS)


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def settings(source: Path | str = "digits", **changes: Any) -> ImageDataConfig:
    return ImageDataConfig(source=str(source), **changes)


def folder_of(path: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8), suffix: str = ".png") -> Path:
    """A folder of class folders of random pictures."""
    for name, count in counts.items():
        (path / name).mkdir(parents=True)
        for index in range(count):
            pixels = noise(size[1], size[0], 3, seed=index * 101 + len(name))
            Image.fromarray(pixels).save(path / name / f"{index}{suffix}")
    return path


# ---- augmentation, against plain loops ----------------------------------------------------------------------


def slowly(images: Any, indices: Any, seed: int, epoch: int, flip: bool, padding: int) -> Any:
    """`augment`, one image and one pixel at a time, its draws from `rng.fold` alone."""
    out = np.zeros_like(images)
    _, height, width, _ = images.shape
    for row, index in enumerate(indices):
        key = rng.fold(rng.key(seed, "augment", epoch), int(index))
        top, left = (int(word) * (2 * padding + 1) // 2**32 for word in rng.fold(key, "crop"))
        mirrored = flip and int(rng.fold(key, "flip")[0]) >> 31 == 1
        for y in range(height):
            for x in range(width):
                column = width - 1 - x if mirrored else x
                source = (y + top - padding, column + left - padding)
                if 0 <= source[0] < height and 0 <= source[1] < width:
                    out[row, y, x] = images[row, source[0], source[1]]
    return out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_augmentation(flip: bool, padding: int) -> None:
    images, indices = noise(9, 6, 5, 3), np.array([0, 3, 4, 70_000, 2, 8, 9, 1, 5])
    found = augment(images, indices, 5, 2, flip=flip, padding=padding)
    np.testing.assert_array_equal(found, slowly(images, indices, 5, 2, flip, padding))
    if flip or padding:
        assert not np.array_equal(found, augment(images, indices, 5, 3, flip=flip, padding=padding))
    alone = augment(images[4:5], indices[4:5], 5, 2, flip=flip, padding=padding)
    np.testing.assert_array_equal(alone[0], found[4])  # the rest of the batch does not matter


def test_offsets_and_mirroring_are_uniform() -> None:
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    count = 20_000
    found = augment(np.repeat(image, count, 0), np.arange(count), 0, 0, flip=True, padding=1)
    kinds, seen = np.unique(found.reshape(count, 9), axis=0, return_counts=True)
    assert len(kinds) == 2 * 9
    assert np.abs(seen - count / 18).max() < 5 * math.sqrt(count / 18)


def test_normalization() -> None:
    images = noise(4, 3, 3, 3)
    found = normalize(images, [0.1, 0.5, 0.9], [0.2, 0.3, 0.4])
    expected = (images.astype(np.float64) / 255 - [0.1, 0.5, 0.9]) / [0.2, 0.3, 0.4]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


# ---- the dataset --------------------------------------------------------------------------------------------


def test_digits() -> None:
    from sklearn.datasets import load_digits

    dataset, raw = ImageDataset.open(settings(), 0), load_digits()
    assert len(dataset.train) + len(dataset.validation) == 1797 and dataset.classes == list("0123456789")
    assert abs(len(dataset.validation) - 1797 / 5) <= 2
    pixels = dataset.source.images.take(np.arange(1797))
    np.testing.assert_array_equal(np.round(pixels[..., 0] / 255 * 16), raw.images)
    np.testing.assert_array_equal(dataset.source.labels, raw.target)
    chosen = pixels[dataset.train] / 255
    assert dataset.mean == pytest.approx([chosen.mean()]) and dataset.std == pytest.approx([chosen.std()])
    batch = dataset.train_batch(3, 32)
    assert batch["inputs"].shape == (32, 8, 8, 1) and batch["inputs"].dtype == np.float32
    assert batch["labels"].shape == (32,) and batch["labels"].dtype == np.int32


def test_the_split_is_a_share_of_each_class_and_a_function_of_the_seed() -> None:
    parts = [ImageDataset.open(settings(), seed) for seed in (0, 0, 1)]
    for dataset in parts:
        assert set(dataset.train).isdisjoint(dataset.validation)
        for label in range(10):
            members = int((dataset.source.labels == label).sum())
            assert int((dataset.source.labels[dataset.validation] == label).sum()) == round(members / 5)
    assert np.array_equal(parts[0].validation, parts[1].validation)
    assert not np.array_equal(parts[0].validation, parts[2].validation)


def test_an_epoch_takes_each_training_image_once_in_its_own_order() -> None:
    dataset = ImageDataset.open(settings(normalize=False), 4)
    steps = dataset.steps_per_epoch(100)
    assert steps == len(dataset.train) // 100

    def epoch(number: int) -> Any:
        batches = [dataset.train_batch(number * steps + step, 100) for step in range(steps)]
        return np.concatenate([batch["inputs"].reshape(100, -1) for batch in batches])

    first, second = epoch(0), epoch(1)
    pool = dataset.source.images.take(dataset.train).reshape(len(dataset.train), -1).astype(np.float32) / np.float32(
        255
    )
    wanted = {row.tobytes() for row in np.round(pool * 255).astype(np.uint8)}
    assert {row.tobytes() for row in np.round(first * 255).astype(np.uint8)} <= wanted
    assert len(np.unique(first, axis=0)) >= len(first) - 5  # the digits hold a few twins
    assert not np.array_equal(first, second)
    again = ImageDataset.open(settings(normalize=False), 4)
    np.testing.assert_array_equal(again.train_batch(steps + 3, 100)["inputs"].reshape(100, -1), second[300:400])


def test_validation_in_full_or_spread_evenly() -> None:
    dataset = ImageDataset.open(settings(), 0)
    batches = list(dataset.validation_batches(100))
    assert [len(batch["labels"]) for batch in batches] == [100, 100, 100, len(dataset.validation) - 300]
    np.testing.assert_array_equal(
        np.concatenate([batch["labels"] for batch in batches]), dataset.source.labels[dataset.validation]
    )
    some = np.concatenate([batch["labels"] for batch in dataset.validation_batches(10, 2)])
    spread = dataset.validation[np.arange(20) * len(dataset.validation) // 20]
    np.testing.assert_array_equal(some, dataset.source.labels[spread])
    plain = dataset.source.images.take(dataset.validation[:100])  # not augmented
    np.testing.assert_array_equal(batches[0]["inputs"], normalize(plain, dataset.mean, dataset.std))


def test_the_table_of_classes() -> None:
    assert class_table(["cat", "dog"], [1200, 3], [300, 0]) == [
        "class      training  validation",
        "cat           1,200         300",
        "dog               3           0",
        "2 classes     1,203         300",
    ]
    sizes = list(range(1, 1001))
    lines = class_table([f"class-{size}" * 9 for size in sizes], sizes, [2] * 1000)
    assert len(lines) <= 12 and max(map(len, lines)) <= 80
    assert "... 991 more" in lines[7] and "7 to 997" in lines[7] and "1,000 classes" in lines[-1]
    assert "500,500" in lines[-1] and "2,000" in lines[-1]


def test_given_mean_and_deviation() -> None:
    dataset = ImageDataset.open(settings(mean=[0.25], std=[0.5]), 0)
    assert (dataset.mean, dataset.std) == ([0.25], [0.5])
    with pytest.raises(DataError, match=r"data\.mean has 3 values"):
        ImageDataset.open(settings(mean=[0.1, 0.2, 0.3]), 0)
    for name, value in (("mean", -0.5), ("mean", 127), ("std", 58.4)):
        with pytest.raises(ConfigError, match=rf"{name} {value} is not from 0 to 1.*divide .* by 255"):
            Config.from_dict({"model": MODEL, "data": {"kind": "images", name: [value]}})
    with pytest.raises(DataError, match=r"data.crop_padding 8: a crop of 8x8 pixels may .* 7 or less"):
        ImageDataset.open(settings(crop_padding=8), 0)
    ImageDataset.open(settings(crop_padding=7), 0)
    with pytest.raises(ConfigError, match="normalize is false, so mean and std have no effect"):
        settings(normalize=False, mean=[0.5])


# ---- files --------------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    folder_of(tmp_path, {"cat": 5, "dog": 10})
    (tmp_path / "cat" / "notes.txt").write_text("not an image, and not called one")
    (tmp_path / ".hidden").mkdir()
    found = find_images(str(tmp_path))
    assert found.classes == ["cat", "dog"] and found.labels.tolist() == [0] * 5 + [1] * 10
    assert found.images.shape == (8, 8, 3) and found.held_out == 0
    first = np.asarray(Image.open(tmp_path / "cat" / "0.png"))
    np.testing.assert_array_equal(found.images.take(np.array([0]))[0], first)
    grey = find_images(str(tmp_path), channels=1)
    assert grey.images.shape == (8, 8, 1) and grey.fingerprint != found.fingerprint
    assert find_images(str(tmp_path)).fingerprint == found.fingerprint
    dataset = ImageDataset.open(settings(tmp_path), 0)
    assert (len(dataset.train), len(dataset.validation)) == (12, 3)


def test_a_folder_too_large_for_memory_is_read_as_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, {"a": 6, "b": 6}, (10, 7))
    whole = find_images(str(tmp_path), size=6)
    monkeypatch.setattr(image_files, "IN_MEMORY", 100)
    lazy = find_images(str(tmp_path), size=6)
    assert isinstance(lazy.images, FileImages) and not isinstance(whole.images, FileImages)
    rows = np.array([11, 0, 5])
    np.testing.assert_array_equal(lazy.images.take(rows), whole.images.take(rows))


def test_train_and_test_folders(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", {"a": 4, "b": 4})
    folder_of(tmp_path / "val", {"a": 2, "b": 1})
    dataset = ImageDataset.open(settings(tmp_path), 0)
    assert dataset.source.held_out == 3 and dataset.validation.tolist() == [8, 9, 10]
    assert dataset.source.labels[dataset.validation].tolist() == [0, 0, 1]
    (tmp_path / "val" / "c").mkdir()
    with pytest.raises(DataError, match="same class folders"):
        find_images(str(tmp_path))


def test_runs_below_the_images_are_no_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 4, "b": 4, "runs/x": 1})  # plot.png
    for name in ("config.yaml", "run.json"):
        (tmp_path / "runs" / "x" / name).touch()
    dataset = ImageDataset.open(settings(tmp_path, validation_fraction=0.25), 0)
    assert dataset.classes == ["a", "b"]
    assert dataset.notes == [f"{tmp_path}: not read: 1 folder of a run (runs/x)"]


def test_pictures_are_scaled_to_their_shorter_side_and_cut(tmp_path: Path) -> None:
    pixels = noise(16, 40, 3)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = decode(tmp_path / "wide.png", 4, 3).pixels
    middle = pixels[:, 12:28].reshape(4, 4, 4, 4, 3).astype(np.float64).mean(axis=(1, 3))
    assert np.abs(found - middle).max() <= 1  # means of 4 x 4, rounded
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=_turned(), quality=100)
    assert decode(tmp_path / "turned.jpg", None, 3).pixels.shape == (40, 16, 3)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{mode}.{suffix}")
        assert decode(tmp_path / f"{mode}.{suffix}", 8, 3).pixels.shape == (8, 8, 3)
        assert decode(tmp_path / f"{mode}.{suffix}", 8, 1).pixels.shape == (8, 8, 1)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    return exif


def test_arrays_are_resized_and_recoloured_like_pictures() -> None:
    large = find_images("digits", 16, 3)
    assert large.images.shape == (16, 16, 3)
    pixels = large.images.take(np.arange(5))
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()


def idx(path: Path, array: Any, zipped: bool = False) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    with (gzip.open if zipped else open)(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path: Path, zipped: bool) -> None:
    end = ".gz" if zipped else ""
    train, test = noise(20, 28, 28), noise(6, 28, 28, seed=1)
    labels = np.arange(20, dtype=np.uint8) % 10
    idx(tmp_path / f"train-images-idx3-ubyte{end}", train, zipped)
    idx(tmp_path / f"train-labels-idx1-ubyte{end}", labels, zipped)
    dataset = ImageDataset.open(settings(tmp_path, validation_fraction=0.5), 0)
    assert (len(dataset.train), len(dataset.validation)) == (10, 10)
    idx(tmp_path / f"t10k-images-idx3-ubyte{end}", test, zipped)
    idx(tmp_path / f"t10k-labels-idx1-ubyte{end}", labels[:6], zipped)
    dataset = ImageDataset.open(settings(tmp_path), 0)
    assert dataset.source.images.shape == (28, 28, 1) and len(dataset.train) == 20
    np.testing.assert_array_equal(dataset.source.images.take(dataset.validation)[..., 0], test)
    assert dataset.source.labels[dataset.validation].tolist() == list(range(6))


def test_cifar(tmp_path: Path) -> None:
    records = noise(30, 3073)
    records[:, 0] %= 10
    for number in range(2):
        records[number * 10 : number * 10 + 10].tofile(tmp_path / f"data_batch_{number + 1}.bin")
    records[20:].tofile(tmp_path / "test_batch.bin")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    dataset = ImageDataset.open(settings(tmp_path), 0)
    assert dataset.classes == names and dataset.source.held_out == 10 and len(dataset.train) == 20
    pixels = dataset.source.images.take(np.arange(30))
    for channel in range(3):  # a record is red, then green, then blue, row by row
        plane = records[:, 1 + 1024 * channel : 1025 + 1024 * channel].reshape(30, 32, 32)
        np.testing.assert_array_equal(pixels[..., channel], plane)
    assert dataset.source.labels.tolist() == records[:, 0].tolist()
    missing = f"{tmp_path}: data_batch_3.bin, data_batch_4.bin, data_batch_5.bin of CIFAR-10 is missing"
    assert [note.startswith(missing) for note in dataset.notes] == [True]
    records[:10].tofile(tmp_path / "data_batch_1 (1).bin")  # a second download
    dataset = ImageDataset.open(settings(tmp_path), 0)
    assert len(dataset.train) == 20
    assert dataset.notes[1] == f"{tmp_path}: not read: data_batch_1 (1).bin, which is no file of CIFAR-10"


# ---- unsupported and damaged files --------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims so many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def break_picture(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder_of(folder, {"a": 3, "b": 3}, (32, 32), suffix=Path(name).suffix)
        file = folder / "b" / name
        file.write_bytes(content(file.read_bytes()))

    return make


def float_picture(folder: Path) -> None:
    folder_of(folder, {"a": 2, "b": 2})
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "b" / "2.tif")


def empty_class(folder: Path) -> None:
    folder_of(folder, {"a": 2, "b": 2})
    (folder / "c").mkdir()


def python_cifar(folder: Path) -> None:
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": [1]}))
    (folder / "batches.meta").write_bytes(b"")


def mnist_of(images: bytes | None = None, labels: int = 4) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        idx(folder / "train-images-idx3-ubyte", noise(4, 5, 5))
        if labels:
            idx(folder / "train-labels-idx1-ubyte", np.arange(labels, dtype=np.uint8))
        if images is not None:
            (folder / "train-images-idx3-ubyte").write_bytes(images)

    return make


# name: (what writes the files, what the message names)
REFUSED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "cut short": (break_picture("1.png", lambda b: b[: len(b) // 2]), ["b/1.png: damaged"]),
    "a cut JPEG": (break_picture("1.jpg", lambda b: b[: len(b) // 2]), ["b/1.jpg: damaged"]),
    "garbled": (break_picture("1.png", lambda b: b[:60] + bytes(60) + b[120:]), ["b/1.png: damaged"]),
    "not an image": (break_picture("1.png", lambda b: b"hello"), ["b/1.png: not an image"]),
    "empty file": (break_picture("1.png", lambda b: b""), ["b/1.png: is empty (0 bytes)"]),
    "a bomb": (break_picture("1.png", lambda b: bomb(12_000, 12_000)), ["b/1.png", "12,000 x 12,000 pixels"]),
    "a large bomb": (break_picture("1.png", lambda b: bomb(60_000, 60_000)), ["b/1.png", "too many pixels"]),
    "floats": (float_picture, ["b/2.tif", "mode F", "8-bit"]),
    "an empty class": (empty_class, ["c contains no images"]),
    "one class": (lambda f: folder_of(f, {"cat": 4}), ["cat", "two"]),
    "no classes": (lambda f: None, ["no folders"]),
    "unequal sizes": (
        lambda f: [folder_of(f, {"a": 2, "b": 1}), Image.fromarray(noise(9, 9, 3)).save(f / "b" / "z.png")],
        ["z.png", "9x9", "data.image_size"],
    ),
    "not square": (lambda f: folder_of(f, {"a": 2, "b": 2}, (8, 6)), ["8x6", "square"]),
    "one image in a class": (
        lambda f: folder_of(f, {"a": 9, "b": 1}), ["'b'", "1 images", "data.validation_fraction"]),
    "CIFAR in pickles": (python_cifar, ["CIFAR-10", "Pickles can run code", "binary version"]),
    "CIFAR, cut": (
        lambda f: (f / "data_batch_1.bin").write_bytes(bytes(3000)), ["data_batch_1.bin: damaged", "3,000 bytes"]),
    "not CIFAR-10": (
        lambda f: (f / "data_batch_1.bin").write_bytes(bytes([77]) * 3073), ["data_batch_1.bin", "label 77"]),
    "IDX, cut": (
        mnist_of(bytes([0, 0, 8, 3]) + struct.pack(">3I", 4, 5, 5) + bytes(99)),
        ["train-images-idx3-ubyte: damaged", "(4, 5, 5)"],
    ),
    "IDX, other": (
        mnist_of(b"GIF89a and so on, which is long enough"), ["train-images-idx3-ubyte: not an IDX file"]),
    "IDX, lying": (
        mnist_of(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 2))),
        ["train-images-idx3-ubyte: damaged", "(2147483648"],
    ),
    "IDX without labels": (mnist_of(labels=0), ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]),
    "two sets of IDX": (
        lambda f: [idx(f / f"emnist-{name}-train-images-idx3-ubyte", noise(4, 5, 5)) for name in ("digits", "mnist")],
        ["several sets of images", "emnist-digits-train-images", "emnist-mnist-train-images"],
    ),
    "IDX, unequal": (mnist_of(labels=3), ["4 images", "train-labels-idx1-ubyte has 3 labels"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_one_clear_line(name: str, tmp_path: Path) -> None:
    make, names = REFUSED[name]
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        ImageDataset.open(settings(tmp_path), 0)
    assert is_one_line(caught.value, *names) and len(str(caught.value)) < 400, caught.value


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("nowhere", "'digits'"),
        ("cifar-10-binary.tar.gz", "archive"),
        ("x.pkl", "Pickles can run code"),
        ("x.png", "folder"),
    ],
)
def test_sources_that_are_not_folders(name: str, named: str, tmp_path: Path) -> None:
    if name != "nowhere":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        find_images(str(tmp_path / name))
    assert is_one_line(caught.value, str(tmp_path / name), named)


def test_a_gzipped_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 2, 2) + bytes(50_000_000)))
    with pytest.raises(DataError, match="damaged"):
        read_idx(path, 3)


MODEL = {"type": "cnn", "num_layers": 2, "base_channels": 4, "hidden_size": 8, "vocab_size": 10, "image_channels": 1}


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["model.vocab_size=12"], ["12", "model.vocab_size=10"]),
        (["model.image_channels=3"], ["model.image_channels=1", "data.channels=3"]),
        (["model.num_layers=4", "data.image_size=4"], ["4x4", "data.image_size=5"]),
        (["model={type: transformer, vocab_size: 300}"], ["data.kind images", "transformer"]),
        (["data={source: stdlib}"], ["data.kind text", "cnn", "data.kind=images"]),
        (["training.batch_size=5000"], ["training.batch_size", "5,000"]),
    ],
)
def test_models_and_data_that_do_not_fit(overrides: list[str], names: list[str]) -> None:
    config = Config.from_dict({"model": MODEL, "data": {"kind": "images"}}, overrides)
    with pytest.raises((ConfigError, DataError)) as caught:
        dataset_for(config)
    assert is_one_line(caught.value, *names)


# ---- training and predicting --------------------------------------------------------------------------------


def digits(*overrides: str) -> Config:
    return Config.from_yaml("cnn-digits", ["device=cpu", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the digits, in PyTorch."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    short = digits("training.max_steps=120", "training.eval_every=60", "training.batch_size=32")
    result = Trainer.start(short, folder, backend="torch", quiet=True).fit()
    assert result.validation_accuracy is not None and result.validation_accuracy > 0.9
    return folder


def test_the_metrics_tell_accuracy_and_images_a_second(run: Path) -> None:
    records = MetricsLog.read(run / "metrics.jsonl")
    evaluations = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in evaluations] == [60, 120]
    assert all(0 < record["validation_accuracy"] <= 1 for record in evaluations)
    assert all(record["images_per_second"] > 0 for record in records if "loss" in record)
    assert checkpoint.find(run).state["facts"]["classes"] == list("0123456789")


def write_digits(folder: Path, data: ImageDataset, count: int) -> list[int]:
    """Validation images as PNG files, eight times as large."""
    folder.mkdir()
    rows = data.validation[:count]
    for number, image in enumerate(data.source.images.take(rows)):
        Image.fromarray(np.kron(image[:, :, 0], np.ones((8, 8), np.uint8))).save(folder / f"{number:03}.png")
    return [int(label) for label in data.source.labels[rows]]


def test_predictions_are_those_of_the_validation_and_equal_on_both(run: Path, tmp_path: Path) -> None:
    data = ImageDataset.open(settings(), 0)
    write_digits(tmp_path / "images", data, 80)
    batch = next(data.validation_batches(80))
    engine = backends.engine(digits(), "torch", dtype="float64")
    engine.set_weights(dict(checkpoint.find(run).weights))
    truth = np.exp(engine.forward(batch))
    truth /= truth.sum(axis=1, keepdims=True)
    found = {backend: predict(run, [tmp_path / "images"], backend, "cpu") for backend in BACKENDS}
    for report in found.values():
        assert [image.name for image in report.images] == [f"{number:03}.png" for number in range(80)]
        np.testing.assert_allclose(report.probabilities, truth, atol=1e-5)
        order = np.argsort(-truth, axis=1)
        assert [int(report.ranked(row)[0][0]) for row in range(80)] == order[:, 0].tolist()
        assert [len(report.ranked(row)) for row in range(80)] == [3] * 80


def test_the_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    labels = write_digits(tmp_path / "images", ImageDataset.open(settings(), 0), 3)
    file = Path("images", "001.png")  # relative: a long path would be folded in the table
    assert main(["predict", str(run), str(file), "--backend", "torch", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "001.png" in out and f"{labels[1]}" in out and "%" in out
    arguments = (tmp_path / "images", "--json", "--top-k", "2", "--backend", "torch", "--device", "cpu")
    assert main(["predict", str(run), *map(str, arguments)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [Path(item["image"]).name for item in report] == ["000.png", "001.png", "002.png"]
    assert all(len(item["probabilities"]) == 2 for item in report)
    assert report[1]["class"] == report[1]["probabilities"][0]["class"]
    (tmp_path / "x.png").write_text("hello")
    for arguments, message in (
        ((run, tmp_path / "x.png"), "x.png: not an image"),
        ((run, tmp_path / "none.png"), "none.png: no such file"),
        ((tmp_path / "nowhere", file), "nowhere: no such run or checkpoint"),
    ):
        assert main(["predict", *map(str, arguments), "--backend", "torch"]) in (1, 2)
        assert is_one_line(capsys.readouterr().err, message)


def test_transparent_images_are_predicted_over_the_background_of_the_run(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alpha = noise(8, 8, seed=3)
    Image.fromarray(np.stack([np.zeros_like(alpha), alpha], axis=-1)).save(tmp_path / "glyph.png")
    Image.fromarray(255 - alpha).save(tmp_path / "over-white.png")
    (tmp_path / "Thumbs.db").touch()
    found = predict(run, [tmp_path], "torch", "cpu")
    assert [image.name for image in found.images] == ["glyph.png", "over-white.png"]
    np.testing.assert_allclose(found.probabilities[0], found.probabilities[1], atol=1e-6)
    assert is_one_line(caplog.messages[0], str(tmp_path), "Thumbs.db")


def test_runs_that_cannot_predict(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checkpoint.find(run)
    for change, message in (
        ({}, "how its images were read"),
        ({"facts": {**found.state["facts"], "classes": ["a", "b"]}}, "2 classes, but the model has 10"),
        ({"facts": {**found.state["facts"], "mean": [0.1, 0.2]}}, "how its images were read"),
        ({"facts": 3}, "how its images were read"),
    ):
        state = {key: value for key, value in found.state.items() if key != "facts"} | change
        folder = checkpoint.save(tmp_path / "other", found.config, 1, found.weights, found.optimizer, {
            key: value for key, value in state.items() if key not in ("format", "step")
        })  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            predict(folder, [tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: contains no image files"):
        predict(run, [tmp_path / "empty"])
    text = found.config.with_overrides("model={type: transformer, num_layers: 1}")
    folder = checkpoint.save(tmp_path / "text", text, 1, found.weights, found.optimizer, {})
    with pytest.raises(UsageError, match="transformer reads tokens, not images"):
        predict(folder, [tmp_path])
    mine = found.config.with_overrides("model={type: net.py:Net}", "data={kind: text}")
    folder = checkpoint.save(tmp_path / "mine", mine, 1, found.weights, found.optimizer, {})
    with pytest.raises(UsageError, match=r"trained with data\.kind text, not with images"):
        predict(folder, [tmp_path])


@ON_BOTH
def test_equal_images_whose_gradients_cancel_out(backend: str, tmp_path: Path, no_plots: None) -> None:
    """The gradients of a batch with as many labels of each class are zero; those of another batch are not."""
    for name in ("a", "b"):
        (tmp_path / "black" / name).mkdir(parents=True)
        for index in range(8):
            Image.new("L", (8, 8)).save(tmp_path / "black" / name / f"{index}.png")
    config = digits(
        f"data.source={tmp_path / 'black'}", "data.channels=1", "model.vocab_size=2", "model.hidden_size=8",
        "model.num_layers=1", "data.validation_fraction=0", "training.batch_size=16", "training.eval_every=null",
        "training.max_steps=2", "training.keep_best=false", "training.early_stopping=null",
    )  # fmt: skip
    trainer = Trainer.start(config, tmp_path / "run", backend=backend, quiet=True)
    batch = trainer.dataset.train_batch(0, 16)
    assert np.bincount(batch["labels"]).tolist() == [8, 8] and not batch["inputs"].any()
    loss, gradients = trainer.engine.gradients(batch)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert all(not gradient.any() for gradient in gradients.values())
    assert trainer.fit().step == 2


@pytest.mark.slow
@ON_BOTH
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_are_learnt(backend: str, seed: int, tmp_path: Path) -> None:
    """98 of 100 on a held-out fifth, as `icenet train configs/cnn-digits.yaml` does."""
    result = Trainer.start(digits(f"seed={seed}"), tmp_path / "run", backend=backend, quiet=True).fit()
    assert result.validation_accuracy is not None and result.validation_accuracy >= 0.98
