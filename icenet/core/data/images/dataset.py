"""Batches of labelled images. A training batch is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.config import ImageDataConfig
from icenet.core.data.epochs import Epochs, validation_rows
from icenet.core.data.images.augment import augment, normalize, pixel_scale
from icenet.core.data.images.facts import ImageFacts, describe_statistics
from icenet.core.data.images.files import ImageSource, find_images
from icenet.core.data.images.preprocess import Preprocessor
from icenet.core.errors import ConfigError, DataError

Batch = dict[str, NDArray[Any]]
"""`inputs` float32 `[batch, H, W, C]` and `labels` int32 `[batch]`."""

STATISTICS_IMAGES = 2000
"""Number of training images, evenly spread, from which mean and standard deviation are computed."""

MAX_ROWS, FIRST_ROWS, LAST_ROWS = 12, 6, 3
"""Largest number of classes that the table of classes shows in full, and the number it shows otherwise."""


class ImageDataset:
    """Labelled images, split into a training set and a validation set.

    The validation set is the source's own test set if it has one, else a fraction of each class that depends on the
    seed. An epoch is one pass over the training set, in the order of `Epochs`.

    Attributes:
        classes: Names of the classes; a label is an index into them.
        mean, std: Mean and standard deviation per channel, of values from 0 to 1.
        train, validation: Indices of the images of the two sets, int64, ascending.
        fingerprint, description, notes, summary: See `icenet.core.data.datasets.Dataset`.
    """

    unit = "img"
    items_per_row = 1

    def __init__(
        self, source: ImageSource, settings: ImageDataConfig, seed: int, processor: Preprocessor | None = None
    ) -> None:
        self.source = source
        self.processor = processor
        self.settings = settings
        self.seed = seed
        self.classes = source.classes
        self.fingerprint = source.fingerprint
        self.description = source.description
        self.notes: Sequence[str] = source.notes
        size = min(source.images.shape[:2])
        if size <= settings.crop_padding:
            raise DataError(
                f"data.crop_padding {settings.crop_padding}: a crop of {size}x{size} pixels may contain nothing of "
                f"the image; set it to {size - 1} or less"
            )
        self.train, self.validation = split(source, settings.validation_fraction, seed)
        self.mean, self.std = self._statistics()
        if processor is not None:
            height, width = source.images.shape[:2]
            mean, std = map(describe_statistics, (self.mean, self.std))
            note = f"images are read by data.preprocessor: {height}x{width} pixels, mean {mean}, std {std}"
            self.notes = [*source.notes, note]
        self._epochs = Epochs(len(self.train), seed, self._too_few_images)

    @classmethod
    def open(cls, settings: ImageDataConfig, seed: int) -> ImageDataset:
        """Opens the images of the section `data` of a config.

        Raises:
            ConfigError: `data.preprocessor` is not supported.
        DataError: The images are missing, damaged, or too few.
        """
        size, channels, background = settings.image_size, settings.channels, settings.background
        if settings.preprocessor is None:
            return cls(find_images(settings.source, size, channels, background), settings, seed)
        try:
            processor = ImageFacts(
                classes=[], channels=channels or 3, preprocessor=dict(settings.preprocessor)
            ).processor
            found = find_images(settings.source, None, channels or 3, background, processor)
        except ConfigError as error:
            raise ConfigError(f"data.preprocessor: {error}") from None
        return cls(found, settings, seed, processor)

    @property
    def facts(self) -> dict[str, Any]:
        """`ImageFacts` as a dict, for the state of a checkpoint."""
        height, _, channels = self.source.images.shape
        facts: dict[str, Any] = {"image_size": height, "mean": self.mean, "std": self.std}
        if self.processor is not None:
            facts = {"preprocessor": self.settings.preprocessor}
        found = ImageFacts(classes=self.classes, channels=channels, **facts, background=self.settings.background)
        return found.model_dump(exclude_none=True)

    @property
    def files(self) -> Mapping[str, bytes]:
        """Files that belong to a checkpoint: none."""
        return {}

    @property
    def summary(self) -> list[str]:
        """A table of the classes and their numbers of images."""
        sizes = [
            np.bincount(self.source.labels[part], minlength=len(self.classes))
            for part in (self.train, self.validation)
        ]
        return class_table(self.classes, *(part.tolist() for part in sizes))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of full batches in an epoch. The remaining images are dropped.

        Raises:
            DataError: There are fewer images than `batch_size`.
        """
        return self._epochs.steps(batch_size)

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """Returns the training batch of a step, counted from 0."""
        return self._batch(*self._train_images(step, batch_size))

    @property
    def pixel_scale(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Scale and shift of the bytes in `train_pixels`; None if a preprocessor computes other values."""
        return pixel_scale(self.mean, self.std) if self.processor is None else None

    def train_pixels(self, step: int, batch_size: int) -> Batch:
        """Returns the training batch of a step with inputs uint8, which `Engine.pixel_scale` normalizes.

        Bytes are a fourth of the values that the host would have to compute and to copy.
        """
        images, rows = self._train_images(step, batch_size)
        return {"inputs": images, "labels": self.source.labels[rows]}

    def _train_images(self, step: int, batch_size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Returns the images of a training batch after augmentation, and their indices."""
        epoch, indices = self._epochs.rows(step, batch_size)
        rows = self.train[indices]
        images = augment(
            self.source.images.take(rows),
            rows,
            self.seed,
            epoch,
            flip=self.settings.horizontal_flip,
            padding=self.settings.crop_padding,
        )
        return images, rows

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """Yields at most `count` batches of validation images, the same in every call; the last can be smaller.

        If there are more images, those of the batches are evenly spread. None yields all images.
        """
        for indices in validation_rows(len(self.validation), batch_size, count):
            rows = self.validation[indices]
            yield self._batch(self.source.images.take(rows), rows)

    def _batch(self, images: NDArray[np.uint8], rows: NDArray[np.int64]) -> Batch:
        inputs = normalize(images, self.mean, self.std) if self.processor is None else self.processor.scaled(images)
        return {"inputs": inputs, "labels": self.source.labels[rows]}

    def _too_few_images(self, batch_size: int) -> str:
        return (
            f"{self.description} has {len(self.train):,} training images, and training.batch_size is "
            f"{batch_size:,}; lower it, or add images"
        )

    def _statistics(self) -> tuple[list[float], list[float]]:
        """Returns mean and standard deviation per channel: those of the config, or those of training images."""
        settings, channels = self.settings, self.source.images.shape[2]
        if self.processor is not None:
            return self.processor.statistics(channels)
        for name in ("mean", "std"):
            values = getattr(settings, name)
            if values is not None and len(values) != channels:
                raise DataError(f"data.{name} has {len(values)} values, but the images have {channels} channels")
        if not settings.normalize:
            return [0.0] * channels, [1.0] * channels
        mean, std = settings.mean, settings.std
        if mean is None or std is None:
            count = min(len(self.train), STATISTICS_IMAGES)
            sample = self.source.images.take(self.train[np.arange(count) * len(self.train) // count])
            values = sample.reshape(-1, channels) / 255
            mean = mean or values.mean(axis=0).tolist()
            std = std or np.where(values.std(axis=0) > 0, values.std(axis=0), 1.0).tolist()
        return mean, std


def split(source: ImageSource, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the indices of the training images and of the validation images, int64, ascending.

    Args:
        source: The images. If it has a test set of its own, that is the validation set.
        fraction: Fraction of each class that is held out for validation.
        seed: Seed of the run.

    Raises:
        DataError: One of the two sets would have no image of a class.
    """
    everything = np.arange(len(source.labels))
    if source.held_out:
        return everything[: -source.held_out], everything[-source.held_out :]
    held_out = np.zeros(len(everything), np.bool_)
    for label, name in enumerate(source.classes):
        members = np.flatnonzero(source.labels == label)
        count = round(len(members) * fraction)
        if len(members) and fraction and not 0 < count < len(members):
            raise DataError(
                f"{source.description}: class {name!r} has {len(members)} images, of which "
                f"data.validation_fraction {fraction:g} holds out {count}; add images, or change it (0: none)"
            )
        order = rng.permutation(rng.key(seed, "validation", label), len(members))
        held_out[members[order[:count]]] = True
    return everything[~held_out], everything[held_out]


def class_table(classes: Sequence[str], train: Sequence[int], validation: Sequence[int]) -> list[str]:
    """Returns a table of the classes and their numbers of images, by line. Of many classes the middle is left out.

    Args:
        classes: Names of the classes.
        train, validation: Number of images of each class in the two sets.
    """
    rows: list[tuple[str, ...]] = [
        (_shortened(name), f"{ours:,}", f"{theirs:,}")
        for name, ours, theirs in zip(classes, train, validation, strict=True)
    ]
    if len(rows) > MAX_ROWS:
        middle = slice(FIRST_ROWS, len(rows) - LAST_ROWS)
        ranges = [f"{min(sizes[middle]):,} to {max(sizes[middle]):,}" for sizes in (train, validation)]
        rows[middle] = [(f"... {len(classes[middle]):,} more", *ranges)]
    total = f"{len(classes):,} classes"
    rows = [("class", "training", "validation"), *rows, (total, f"{sum(train):,}", f"{sum(validation):,}")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{name:<{widths[0]}}  {ours:>{widths[1]}}  {theirs:>{widths[2]}}" for name, ours, theirs in rows]


def _shortened(name: str, width: int = 40) -> str:
    return name if len(name) <= width else f"{name[: width - 3]}..."
