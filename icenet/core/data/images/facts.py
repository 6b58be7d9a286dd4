"""How the images of a model are read, and the names of its classes: stored in checkpoints and in saved models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import Self

from icenet.core.config.section import Section
from icenet.core.data.images import preprocess
from icenet.core.data.images.augment import normalize
from icenet.core.data.images.decode import WHITE, decode
from icenet.core.data.images.preprocess import Preprocessor
from icenet.core.errors import ConfigError
from icenet.core.families import folder, json_files, vision
from icenet.core.families.keys import Values

FILE = "images.json"
"""Name of the file of a saved model that has its `ImageFacts`."""


class ImageFacts(Section):
    """How a model reads its images, and its classes.

    Either `image_size`, `mean` and `std` say how, or `preprocessor`; with neither it is unknown.
    """

    classes: list[str]
    channels: int = Field(ge=1)
    image_size: int | None = Field(default=None, ge=1)
    mean: list[float] | None = None
    std: list[float] | None = None
    background: str = WHITE
    preprocessor: dict[str, Any] | None = None
    """Content of a `preprocessor_config.json`, with its image_processor_type."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        own = [self.image_size, self.mean, self.std]
        if self.preprocessor is not None or own == [None] * 3:
            return self
        if self.image_size is None or self.mean is None or self.std is None:
            raise ValueError("image_size, mean and std belong together")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} do not have {self.channels} channels")
        return self

    @property
    def processor(self) -> Preprocessor | None:
        """The image processor of `preprocessor`. Raises ConfigError if it is not supported."""
        return None if self.preprocessor is None else preprocess.from_values(self.preprocessor, "", self.channels)

    def read(self, path: Path) -> tuple[NDArray[np.float32], bool]:
        """Returns the input of the model for a file, `[H, W, C]`, and whether the file has more frames.

        Raises:
            ConfigError: It is not known how images are read.
            DataError: The file is not an image, is damaged or has an extreme shape.
        """
        if self.channels not in (1, 3):
            raise ConfigError(f"the model reads images of {self.channels} channels, and files have 1 or 3")
        if (processor := self.processor) is not None:
            return processor.read(path, self.channels, self.background)
        if self.image_size is None or self.mean is None or self.std is None:
            raise ConfigError(f"it is not known how the images of the model are read: no {folder.PREPROCESSOR}")
        image = decode(path, self.image_size, self.channels, self.background)
        return normalize(image.pixels, self.mean, self.std), image.has_more_frames

    def statistics(self) -> tuple[list[float], list[float]] | None:
        """Returns what is subtracted from each channel of values from 0 to 1, and its divisor; None if unknown.

        Raises:
            ConfigError: `preprocessor` is not supported.
        """
        if (processor := self.processor) is not None:
            return processor.statistics(self.channels)
        return None if self.mean is None or self.std is None else (self.mean, self.std)

    def files(self) -> folder.ImageFiles:
        """Returns the names of the classes and the `preprocessor_config.json` of an exported model."""
        if self.preprocessor is None and self.image_size is not None:
            return folder.ImageFiles(self.classes, _written(self))
        return folder.ImageFiles(self.classes, self.preprocessor)

    def data_keys(self) -> dict[str, Any]:
        """Returns the keys of the section `data` that read images in this way, in training too.

        Raises:
            ConfigError: `preprocessor` is not supported, or gives images of different sizes.
        """
        found: dict[str, Any] = {"channels": self.channels} if self.channels in (1, 3) else {}
        if (processor := self.processor) is not None:
            processor.check_shape()
            return {**found, "preprocessor": self.preprocessor}
        if self.image_size is not None:
            found |= {"image_size": self.image_size, "background": self.background}
            is_plain = self.mean == [0.0] * self.channels and self.std == [1.0] * self.channels
            found |= {"normalize": False} if is_plain else {"mean": self.mean, "std": self.std}
        return found

    def to_json(self) -> bytes:
        """Returns the content of `FILE`."""
        return (json.dumps(self.model_dump(exclude_none=True), indent=1, ensure_ascii=False) + "\n").encode()


def of_folder(path: Path, values: Mapping[str, Any]) -> ImageFacts:
    """Returns the facts of a folder of Hugging Face.

    Args:
        path: The folder.
        values: The content of its config.json.

    Raises:
        ConfigError: The names of its classes or its preprocessor_config.json cannot be read.
    """
    file = path / folder.PREPROCESSOR
    content = None
    if file.is_file():
        content = dict(json_files.read_object(file))
        if content.get("image_processor_type") is None and content.get("feature_extractor_type") is None:
            kind = preprocess.DEFAULT_PROCESSORS.get(str(values.get("model_type")), "ViT")
            content["image_processor_type"] = f"{kind}ImageProcessor"
    channels = Values(values).whole("num_channels", 3)
    return ImageFacts(classes=vision.labels(Values(values)), channels=channels or 3, preprocessor=content)


def of_saved(path: Path) -> ImageFacts | None:
    """Returns the facts of a saved model; None if it has none. Raises ConfigError if its file is damaged."""
    if not (path / FILE).is_file():
        return None
    content = json_files.read_object(path / FILE)
    try:
        return ImageFacts(**content)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path / FILE}: {error}") from None


def _written(facts: ImageFacts) -> dict[str, Any]:
    """Returns the content of a `preprocessor_config.json` for a run's way to read images.

    Images of the size of the run get the same pixels. Others differ slightly: the run crops before it resizes, and it
    enlarges images with another filter.
    """
    size = facts.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 4,  # averages pixels
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": facts.mean,
        "image_std": facts.std,
    }


def describe_statistics(values: Sequence[float]) -> str:
    """Returns numbers as a text, rounded."""
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
