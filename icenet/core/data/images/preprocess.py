"""Reads images as the image processor of a Hugging Face folder does (`preprocessor_config.json`).

The pixel values are those of the library's processors with Pillow, such as `ViTImageProcessorPil`. Those of its
processors with torchvision differ by a rounding error of the resized pixels.

Sources: `image_processing_backends`, `image_transforms` and the classes of `PROCESSORS` in `transformers` 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from icenet.core.data.images.decode import MAX_PIXELS, WHITE, Pixels, decode, pillow
from icenet.core.errors import ConfigError, DataError
from icenet.core.families.folder import PREPROCESSOR
from icenet.core.families.json_files import read_object
from icenet.core.families.keys import Values, shown

_HALF = [0.5, 0.5, 0.5]
_CLIP = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": 224,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2, "image_mean": _HALF, "image_std": _HALF},
    "ConvNext": {
        "size": {"shortest_edge": 384},
        "crop_pct": 224 / 256,
        "resample": 3,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "DeiT": {
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": 224,
        "resample": 3,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "Bit": _CLIP,
    "CLIP": _CLIP,
}
"""The library's classes without their ending, and the values of keys that are absent."""

DEFAULT_PROCESSORS: Mapping[str, str] = {"vit": "ViT", "deit": "DeiT", "resnet": "ConvNext"}
"""The processor of a `model_type`, for files that name none."""

_ENDINGS = ("ImageProcessorPil", "ImageProcessorFast", "ImageProcessor", "FeatureExtractor")
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_KEYS = frozenset(
    {
        *(*_SWITCHES, "size", "crop_size", "crop_pct", "resample", "rescale_factor", "image_mean", "image_std"),
        "default_to_square",
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "model_input_names"),
        *("data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "use_fast"),
        *("do_convert_rgb", "image_seq_length"),
    }
)
"""Keys about the file and the program. Images are always converted to the channels of the model."""

Kind = Literal["exact", "shortest", "crop"]


@dataclass(frozen=True)
class Resize:
    """How an image is resized.

    Attributes:
        kind: To a size (exact), until the shorter side has a length (shortest), or that and a crop of its centre,
            for sizes below 384 (crop).
        height, width: The size; equal for `shortest` and `crop`.
        filter: Pillow's number of the filter.
        crop_pct: The part of the shorter side that a crop keeps.
    """

    kind: Kind
    height: int
    width: int
    filter: int
    crop_pct: float = 1.0


@dataclass(frozen=True)
class Preprocessor:
    """The steps of an image processor, in their order; None: without the step.

    Attributes:
        resize: How images are resized.
        crop: Height and width of the centre that is cropped; smaller images are padded with zeros.
        scale: Factor of the pixel values, from 0 to 255.
        mean, std: Subtracted from each channel, and its divisor.
    """

    resize: Resize | None = None
    crop: tuple[int, int] | None = None
    scale: float | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] = field(default_factory=list)

    def __call__(self, pixels: Pixels) -> NDArray[np.float32]:
        """Returns the input of the model, float32 `[H', W', C]`, for an image uint8 `[H, W, C]`."""
        return self.scaled(self.fitted(pixels))

    def fitted(self, pixels: Pixels) -> Pixels:
        """Returns a resized and cropped image, uint8 `[H', W', C]`."""
        if self.resize is not None:
            pixels = resized(pixels, self.resize)
        return pixels if self.crop is None else center_crop(pixels, *self.crop)

    def scaled(self, pixels: Pixels) -> NDArray[np.float32]:
        """Returns the values of pixels uint8 `[..., C]`, float32."""
        values: NDArray[np.float32] = pixels.astype(np.float32)
        if self.scale is not None:
            values = (pixels.astype(np.float64) * self.scale).astype(np.float32)
        if self.mean is not None:
            mean, std = (np.array(given, np.float32) for given in (self.mean, self.std))
            values = (values - mean) / std
        return values

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width of all images; None if they depend on the image."""
        if self.crop is not None or self.resize is None or self.resize.kind == "shortest":
            return self.crop
        return self.resize.height, self.resize.width

    def check_shape(self) -> tuple[int, int]:
        """Returns the height and width of all images.

        Raises:
            ConfigError: They depend on the image, so images cannot be a batch.
        """
        if self.shape is None:
            raise ConfigError(
                "images of different sizes stay so, and a batch needs one size; set do_center_crop and crop_size"
            )
        return self.shape

    def statistics(self, channels: int) -> tuple[list[float], list[float]]:
        """Returns what is subtracted from each channel of values from 0 to 1, and its divisor."""
        scale = 255 * (1 if self.scale is None else self.scale)
        mean, std = ([0.0] * channels, [1.0] * channels) if self.mean is None else (self.mean, self.std)
        return [value / scale for value in mean], [value / scale for value in std]

    def read(self, path: Path, channels: int, background: str = WHITE) -> tuple[NDArray[np.float32], bool]:
        """Returns the input of the model for a file, and whether the file has more frames, which are not read.

        The image is upright, with the background behind transparent pixels, as in `decode.decode`.

        Raises:
            DataError: The file is not an image, is damaged or has an extreme shape.
        """
        pixels, _, has_more = decode(path, None, channels, background)
        try:
            return self(pixels), has_more
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def read(folder: Path, model_type: str, channels: int) -> Preprocessor:
    """Returns the image processor of a folder.

    Args:
        folder: The folder.
        model_type: That of its config.json, for the default processor.
        channels: Channels of the model's images.

    Raises:
        ConfigError: The file is missing, or has a key or a value that is not supported.
    """
    file = folder / PREPROCESSOR
    if not file.is_file():
        raise ConfigError(
            f"{folder}: has no {PREPROCESSOR}, which says how images are read; copy it from the original model"
        )
    values = read_object(file)
    try:
        return from_values(values, model_type, channels)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def from_values(given: Mapping[str, Any], model_type: str, channels: int) -> Preprocessor:
    """Returns the image processor for the content of a `preprocessor_config.json`; see `read`."""
    name = given.get("image_processor_type") or given.get("feature_extractor_type")
    kind = DEFAULT_PROCESSORS.get(model_type, "ViT") if name is None else _kind(name)
    defaults: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    defaults |= PROCESSORS[kind]
    unknown = [
        key
        for key, value in given.items()
        if key not in _KEYS | _WITHOUT_EFFECT and not key.startswith("_") and value not in (None, False)
    ]
    if "crop_pct" in given and kind != "ConvNext" and given["crop_pct"] is not None:
        unknown.append("crop_pct")
    if unknown:
        raise ConfigError(
            f"{', '.join(map(shown, unknown))}: unknown for the image processor {kind}, and may change the pixel "
            "values; remove what has no effect"
        )
    values = Values({**defaults, **{key: value for key, value in given.items() if value is not None}})
    does = {switch: values.flag(switch, False) for switch in _SWITCHES}
    crop = _height_and_width(values, "crop_size") if does["do_center_crop"] else None
    return Preprocessor(
        _resize(values, kind) if does["do_resize"] else None,
        crop,
        values.number("rescale_factor", 1 / 255) if does["do_rescale"] else None,
        _for_channels(values, "image_mean", channels) if does["do_normalize"] else None,
        _for_channels(values, "image_std", channels) if does["do_normalize"] else [],
    )


def _kind(name: Any) -> str:
    for ending in _ENDINGS:
        if isinstance(name, str) and name.removesuffix(ending) in PROCESSORS and name.endswith(ending):
            return name.removesuffix(ending)
    known = ", ".join(f"{kind}ImageProcessor" for kind in PROCESSORS)
    raise ConfigError(f"image_processor_type: {shown(name)} is not supported; only {known}")


def _resize(values: Values, kind: str) -> Resize:
    resample = values.whole("resample", None, most=5, least=0)
    resample = 2 if resample is None else resample
    size = values.get("size")
    is_square = values.flag("default_to_square", kind in ("ViT", "DeiT"))
    if isinstance(size, int) and not is_square:
        size = {"shortest_edge": size}
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        side = _size(Values(size), "shortest_edge", "size")
        if kind != "ConvNext":
            return Resize("shortest", side, side, resample)
        part = values.number("crop_pct", None) or 0.0
        if side >= 384:
            return Resize("exact", side, side, resample)
        if not 0 < part <= 1:
            raise ConfigError(f"crop_pct: {shown(values.get('crop_pct'))} is not a number above 0 and up to 1")
        return Resize("crop", side, side, resample, part)
    if kind == "ConvNext":
        raise ConfigError(f"size: {shown(size)} is not supported by ConvNextImageProcessor, only shortest_edge")
    return Resize("exact", *_height_and_width(values, "size"), resample)


def _height_and_width(values: Values, key: str) -> tuple[int, int]:
    size = values.get(key)
    if isinstance(size, dict):
        if set(size) != {"height", "width"}:
            raise ConfigError(
                f"{key}: {shown(size)} is not supported; only a number, height and width, or shortest_edge"
            )
        return _size(Values(size), "height", key), _size(Values(size), "width", key)
    if isinstance(size, list) and len(size) == 2:
        pair = Values({"height": size[0], "width": size[1]})
        return _size(pair, "height", key), _size(pair, "width", key)
    side = _size(values, key, "")
    return side, side


def _size(values: Values, key: str, within: str) -> int:
    side = values.get(key)
    if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= MAX_SIDE:
        name = f"{within}.{key}" if within else key
        raise ConfigError(f"{name}: {shown(side)} is not a whole number from 1 to {MAX_SIDE}")
    return side


MAX_SIDE = 2**13
"""Largest height and width of a preprocessed image."""


def _for_channels(values: Values, key: str, channels: int) -> list[float]:
    given = values.get(key)
    numbers = given if isinstance(given, list) else [given] * channels
    is_number = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in numbers]
    if len(numbers) != channels or not all(is_number) or not all(np.isfinite(numbers)):
        raise ConfigError(f"{key}: {shown(given)} is not a number for each of {channels} channels")
    if key == "image_std" and 0 in numbers:
        raise ConfigError(f"{key}: {shown(given)} has zeros, by which pixels are divided")
    return [float(value) for value in numbers]


def resized(pixels: Pixels, resize: Resize) -> Pixels:
    """Returns a resized image, uint8 `[H', W', C]`."""
    height, width = resize.height, resize.width
    if resize.kind != "exact":
        height, width = _with_shorter_side(int(height / resize.crop_pct), *pixels.shape[:2])
        if height * width > MAX_PIXELS:
            raise DataError(f"would have {width:,} x {height:,} pixels after it is resized; crop it")
    image = pillow().fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    found = np.asarray(image.resize((width, height), resample=resize.filter), np.uint8)
    found = found.reshape(height, width, pixels.shape[2])
    return center_crop(found, resize.height, resize.width) if resize.kind == "crop" else found


def _with_shorter_side(length: int, height: int, width: int) -> tuple[int, int]:
    if width <= height:
        return int(length * height / width), length
    return length, int(length * width / height)


def center_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """Returns the centre of an image; a smaller image is padded with zeros."""
    missing = [max(0, wanted - length) for wanted, length in zip((height, width), pixels.shape[:2], strict=True)]
    if any(missing):  # the odd pixel is at the top and left, as in the library
        pixels = np.pad(pixels, [*((-(-count // 2), count // 2) for count in missing), (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
