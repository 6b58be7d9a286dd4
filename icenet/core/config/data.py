"""The configuration's section `data`: where batches come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from icenet.core.config.section import Section


class DataConfig(Section):
    """Where batches of text come from."""

    section: ClassVar[str] = "data"

    kind: Literal["text"] = "text"
    """What is read: text."""
    source: str = "stdlib"
    """A text file, a folder, a glob, or 'stdlib': the Python standard library's own source."""
    tokenizer: str = "bytes"
    """How text becomes tokens: `bytes` (UTF-8 bytes 0 to 255, and 256 for the end of a text) or a tokenizer.json."""
    text_key: str = "text"
    """Of files of JSON lines (.jsonl, .jsonl.gz): the key of the text in each."""
    packing: bool = True
    """Texts follow each other without a gap; if not, each begins a row of its own, filled up and masked."""
    seq_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens in one training sequence; the model's max_seq_length when absent."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of tokens held out for evaluation."""


class ImageDataConfig(Section):
    """Where batches of images and their classes come from."""

    section: ClassVar[str] = "data"

    kind: Literal["images"] = "images"
    """What is read: images."""
    source: str = "digits"
    """A folder of class folders, of MNIST's IDX files or of CIFAR-10's binary files; or 'digits', scikit-learn's."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Height and width; images of another size are resized and their middle is taken. Absent: as they are."""
    channels: Literal[1, 3] | None = None
    """1 turns colour to grey, 3 grey to colour. Absent: as the source has them (a folder: 3)."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The share of each class held out for evaluation, where the source has no test files of its own."""
    horizontal_flip: bool = False
    """Mirror every second training image, at random."""
    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Pad training images with so many zeros on each side and cut a random piece of the old size."""
    normalize: bool = True
    """Subtract the mean of each channel and divide by its standard deviation."""
    mean: list[float] | None = None
    """Mean of each channel, of values from 0 to 1; that of the training images when absent."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """Standard deviation of each channel; that of the training images when absent."""

    @model_validator(mode="after")
    def _mean_is_used(self) -> Self:
        if not self.normalize and (self.mean is not None or self.std is not None):
            raise ValueError("normalize is off, so mean and std are not used; leave them out, or turn it on")
        return self


def _data_tag(value: Any) -> str | None:
    kind = value.get("kind", "text") if isinstance(value, Mapping) else getattr(value, "kind", "text")
    return next((section.__name__ for section in DATA if kind == section.model_fields["kind"].default), None)


DATA: tuple[type[Section], ...] = (DataConfig, ImageDataConfig)
"""The kinds of data; a new one adds its section here."""

if TYPE_CHECKING:
    AnyDataConfig = DataConfig
else:
    AnyDataConfig = Annotated[
        Union[tuple(Annotated[section, Tag(section.__name__)] for section in DATA)],  # noqa: UP007
        Discriminator(
            _data_tag,
            custom_error_type="kind",
            custom_error_message="no such kind",
            custom_error_context={"known": ", ".join(section.model_fields["kind"].default for section in DATA)},
        ),
    ]
