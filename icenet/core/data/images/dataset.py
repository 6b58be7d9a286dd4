"""Images as training batches: which images stand in which batch, and how they are changed, is a pure function
of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import Self

from icenet.core import rng
from icenet.core.config import ImageDataConfig
from icenet.core.config.section import Section
from icenet.core.data.images.augment import augment, normalize
from icenet.core.data.images.files import ImageSource, find_images
from icenet.core.errors import DataError

Batch = dict[str, NDArray[Any]]
"""`inputs` float32 `[batch, H, W, C]` and `labels` int32 `[batch]`."""

SAMPLE = 2000  # training images from which mean and deviation are taken, evenly spread, where there are more


class ImageFacts(Section):
    """How images were read in training, which a prediction has to do alike."""

    classes: list[str]
    image_size: int = Field(ge=1)
    channels: Literal[1, 3]
    mean: list[float]
    std: list[float]

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} are not of {self.channels} channels")
        return self


class ImageDataset:
    """Labelled images, cut into a training part and a validation part.

    The validation part is the source's own test part where it has one, else a share of each class, drawn from
    the seed alone. An epoch is one pass over the training part, in an order drawn from (seed, epoch).

    Attributes:
        classes: the names of the classes; a label is an index into them.
        mean, std: of each channel, as they are taken from the images.
        train, validation: which images of the source are in the two parts, int64.
        fingerprint, description: see `icenet.core.data.datasets.Dataset`.
    """

    unit = "img"
    items_per_row = 1

    def __init__(self, source: ImageSource, settings: ImageDataConfig, seed: int) -> None:
        self.source = source
        self.settings = settings
        self.seed = seed
        self.classes = source.classes
        self.fingerprint = source.fingerprint
        self.description = source.description
        self.train, self.validation = split(source, settings.validation_fraction, seed)
        self.mean, self.std = self._statistics()
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    @classmethod
    def open(cls, settings: ImageDataConfig, seed: int) -> ImageDataset:
        """Opens the images that a section `data` names.

        Raises:
            DataError: they are missing, damaged, or too few.
        """
        return cls(find_images(settings.source, settings.image_size, settings.channels), settings, seed)

    @property
    def facts(self) -> dict[str, Any]:
        """`ImageFacts`, as they are stored with each checkpoint."""
        height, _, channels = self.source.images.shape
        facts: dict[str, Any] = {"image_size": height, "channels": channels, "mean": self.mean, "std": self.std}
        return ImageFacts(classes=self.classes, **facts).model_dump()

    @property
    def files(self) -> Mapping[str, bytes]:
        """None."""
        return {}

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in one pass over the training part; what is left over is dropped.

        Raises:
            DataError: there is not one.
        """
        steps = len(self.train) // batch_size
        if steps == 0:
            raise DataError(
                f"{self.description} has {len(self.train):,} training images, and training.batch_size is "
                f"{batch_size:,}: lower it, or name more images"
            )
        return steps

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """The batch of a step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch(batch_size))
        rows = self.train[self._order(epoch)[index * batch_size : (index + 1) * batch_size]]
        images = augment(
            self.source.images.take(rows),
            rows,
            self.seed,
            epoch,
            flip=self.settings.horizontal_flip,
            padding=self.settings.crop_padding,
        )
        return self._batch(images, rows)

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """At most `count` batches of validation images, the same every time; the last may be smaller.

        Where there are more than asked for, those taken are spread evenly. `count=None` takes all.
        """
        total = len(self.validation)
        taken = total if count is None else min(total, count * batch_size)
        chosen = self.validation[np.arange(taken) * total // max(taken, 1)]
        for first in range(0, taken, batch_size):
            rows = chosen[first : first + batch_size]
            yield self._batch(self.source.images.take(rows), rows)

    def _batch(self, images: NDArray[np.uint8], rows: NDArray[np.int64]) -> Batch:
        return {"inputs": normalize(images, self.mean, self.std), "labels": self.source.labels[rows]}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        cached = self._epoch  # read once: another thread may prefetch
        if cached is None or cached[0] != epoch:
            cached = (epoch, rng.permutation(rng.key(self.seed, "data", epoch), len(self.train)))
            self._epoch = cached
        return cached[1]

    def _statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of values from 0 to 1: as given, or of training images."""
        settings, channels = self.settings, self.source.images.shape[2]
        for name in ("mean", "std"):
            given = getattr(settings, name)
            if given is not None and len(given) != channels:
                raise DataError(f"data.{name} has {len(given)} values, and the images have {channels} channels")
        if not settings.normalize:
            return [0.0] * channels, [1.0] * channels
        mean, std = settings.mean, settings.std
        if mean is None or std is None:
            count = min(len(self.train), SAMPLE)
            sample = self.source.images.take(self.train[np.arange(count) * len(self.train) // count])
            values = sample.reshape(-1, channels) / 255
            mean = mean or values.mean(axis=0).tolist()
            std = std or np.where(values.std(axis=0) > 0, values.std(axis=0), 1.0).tolist()
        return mean, std


def split(source: ImageSource, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which images are for training and which for validation, each int64 and ascending.

    Raises:
        DataError: with this fraction a class would be in one of the two parts only.
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
