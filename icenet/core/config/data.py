"""The section `data`: the source of the batches, one class per kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from icenet.core.config import custom
from icenet.core.config.open_section import OpenSection
from icenet.core.config.section import Section


class DataConfig(Section):
    """Source of batches of text."""

    section: ClassVar[str] = "data"

    kind: Literal["text"] = "text"
    """Kind of data."""
    source: str = "stdlib"
    """A text file, a folder, a glob, or stdlib: the source code of Python's standard library."""
    tokenizer: str = "bytes"
    """bytes (UTF-8 bytes 0 to 255, and 256 for the end of a text), or the path of a tokenizer.json."""
    text_key: str = "text"
    """Key of the text in each object of a JSON Lines file (.jsonl, .ndjson, .json, also .gz)."""
    errors: Literal["stop", "skip", "replace"] = "stop"
    """A file, line or character that cannot be used: stop; skip it; or replace invalid bytes by U+FFFD."""
    packing: bool = True
    """Concatenate texts; otherwise each text begins a new row, which is padded and masked."""
    seq_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens in one training sequence; null: the model's max_seq_length."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the tokens held out for evaluation."""


class ChatDataConfig(Section):
    """Source of batches of conversations, or of pairs of prompt and completion, of which the answers are trained."""

    section: ClassVar[str] = "data"

    kind: Literal["chat"] = "chat"
    """Kind of data."""
    source: str
    """A file of JSON lines with messages, or prompt and completion; or a folder or a glob of such files."""
    tokenizer: str = "bytes"
    """The path of a tokenizer.json, whose folder has the chat template of messages; or bytes."""
    train_on: Literal["answers", "all"] = "answers"
    """The tokens that the loss counts: those of answers and of completions, or all."""
    errors: Literal["stop", "skip"] = "stop"
    """A line that cannot be used: stop, or skip it."""
    seq_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens after which a conversation is cut; null: the model's max_seq_length."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the conversations held out for evaluation."""


PIXEL_KEYS = ("image_size", "normalize", "mean", "std")
"""Keys of images that `preprocessor` takes the place of."""


class ImageDataConfig(Section):
    """Source of batches of images and classes."""

    section: ClassVar[str] = "data"

    kind: Literal["images"] = "images"
    """Kind of data."""
    source: str = "digits"
    """A folder of class folders, MNIST IDX files or CIFAR-10 binary files; or digits: scikit-learn's digits."""
    image_size: Annotated[int, Field(ge=1, le=2**16)] | None = None
    """Height and width; other images are resized and center-cropped; null: the size in the source."""
    channels: Literal[1, 3] | None = None
    """1 converts to grayscale, 3 to RGB; null: the channels in the source (of a folder: 3)."""
    background: Annotated[str, Field(pattern=r"^(white|black|gray|#[0-9a-fA-F]{6})$")] = "white"
    """Colour behind transparent pixels of image files: white, black, gray or '#RRGGBB'."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Fraction of each class held out for evaluation, if the source has no validation or test set of its own."""
    horizontal_flip: bool = False
    """Mirror training images with probability 0.5."""
    crop_padding: Annotated[int, Field(ge=0, le=2**16)] = 0
    """Pad training images with this number of zeros on each side and crop at random to the original size."""
    normalize: bool = True
    """Subtract the mean of each channel and divide by its standard deviation."""
    mean: list[float] | None = None
    """Mean of each channel, for values from 0 to 1; null: that of the training images."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """Standard deviation of each channel, for values from 0 to 1; null: that of the training images."""
    preprocessor: dict[str, Any] | None = None
    """Content of a preprocessor_config.json, instead of image_size, mean and std; model.path takes its model's."""

    @model_validator(mode="after")
    def _check_preprocessor(self) -> Self:
        if self.preprocessor is not None and (others := [key for key in PIXEL_KEYS if self._differs(key)]):
            raise ValueError(
                f"{others[0]} has no effect with preprocessor, which decides the size and the values of pixels; "
                f"remove it, or set preprocessor to null"
            )
        return self

    def _differs(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @model_validator(mode="after")
    def _check_normalize(self) -> Self:
        if not self.normalize and (self.mean is not None or self.std is not None):
            raise ValueError(
                "normalize is false, so mean and std have no effect; remove them, or set normalize to true"
            )
        for name in ("mean", "std"):
            outside = [value for value in getattr(self, name) or () if not 0 <= value <= 1]
            if outside:
                raise ValueError(
                    f"{name} {outside[0]:g} is not from 0 to 1, as the values of images are; divide values for "
                    "0 to 255 by 255"
                )
        return self


class CustomDataConfig(OpenSection):
    """A data set in a file of the user, with the options that its class reads (see docs/data.md)."""

    section: ClassVar[str] = "data"
    selector: ClassVar[str] = "kind"

    kind: Annotated[str, Field(pattern=custom.PATTERN)]
    """A file and the class in it: my_data.py:MyData."""


def _data_tag(value: Any) -> str | None:
    kind = value.get("kind", "text") if isinstance(value, Mapping) else getattr(value, "kind", "text")
    if custom.is_custom(kind):
        return CustomDataConfig.__name__
    return next((section.__name__ for section in DATA if kind == section.model_fields["kind"].default), None)


DATA: tuple[type[Section], ...] = (DataConfig, ChatDataConfig, ImageDataConfig)
"""The class of each kind of ours. A new kind adds its class here."""

if TYPE_CHECKING:
    AnyDataConfig = DataConfig
else:
    AnyDataConfig = Annotated[
        Union[tuple(Annotated[section, Tag(section.__name__)] for section in (*DATA, CustomDataConfig))],  # noqa: UP007
        Discriminator(
            _data_tag,
            custom_error_type="kind",
            custom_error_message="unknown kind",
            custom_error_context={"known": ", ".join(section.model_fields["kind"].default for section in DATA)},
        ),
    ]
