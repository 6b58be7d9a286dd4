"""Data as numpy batches, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from icenet.core.config import CNNConfig, ImageDataConfig, cnn_plan, custom
from icenet.core.data.images.dataset import ImageDataset
from icenet.core.data.text.documents import DocumentDataset
from icenet.core.data.text.packed import Batch, TextDataset
from icenet.core.data.text.prepare import Progress
from icenet.core.errors import ConfigError
from icenet.core.report.bar import Bar
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.base import Tokenizer
from icenet.core.tokenizers.bytes import ByteTokenizer

if TYPE_CHECKING:
    from icenet.core.config import Config, DataConfig

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Dataset",
    "DocumentDataset",
    "ImageDataset",
    "TextDataset",
    "Tokenizer",
    "dataset_for",
    "get_tokenizer",
    "open_dataset",
]


class Dataset(Protocol):
    """What the training loop needs of data. Batches are pure functions of (seed, step)."""

    fingerprint: str
    """SHA-256 of what is read: equal where the data is equal."""
    description: str
    unit: str
    """What a row of a batch is counted in: tokens (`tok`) or images (`img`)."""

    @property
    def items_per_row(self) -> int: ...

    @property
    def facts(self) -> dict[str, Any]:
        """What using the model needs to know of the data, in JSON's types; stored with each checkpoint."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Files that go with each checkpoint, by name: what using the model needs beside its configuration."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in one pass; raises DataError where there is not one."""

    def train_batch(self, step: int, batch_size: int) -> Batch: ...

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]: ...


def dataset_for(config: Config, *, workers: int | None = None, quiet: bool = True) -> Dataset:
    """The data of a configuration, checked against its model.

    Args:
        config: the configuration.
        workers: processes that make the tokens of a text, where that is not done; None: as many as are worth it.
        quiet: show no progress of it.

    Raises:
        ConfigError: model and data do not go together.
        DataError: see `open_dataset`.
    """
    section: Any = config.data
    kind = "images" if isinstance(section, ImageDataConfig) else "tokens"
    if config.model.input_kind not in (kind, "anything"):
        wanted = "images" if kind == "tokens" else "text"
        raise ConfigError(
            f"data.kind {section.kind}: model.type {config.model.type} reads {config.model.input_kind}; "
            f"set data.kind={wanted}, or choose another model"
        )
    if isinstance(section, ImageDataConfig):
        return _images_for(config, section)
    tokenizer = get_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"data.tokenizer {config.data.tokenizer}; set model.vocab_size={tokenizer.vocab_size} or more"
        )
    if not config.data.packing:
        _check_masks(config)
    length = sequence_length(config)
    with Bar(f"making tokens of {config.data.source}", quiet) as bar:
        dataset = open_dataset(config.data, length, config.seed, tokenizer=tokenizer, workers=workers, progress=bar)
    dataset.steps_per_epoch(config.training.batch_size)  # raises where the text is too short
    return dataset


def _check_masks(config: Config) -> None:
    """Refuses a user's model that could not tell tokens from what rows are filled up with."""
    if not custom.is_custom(config.model.type):
        return
    import inspect

    from icenet.core import backends as backend

    forward = custom.model_class(config.model.type, backend.choose(config)).forward
    taken = inspect.signature(forward).parameters
    if "attention_mask" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ConfigError(
            f"data.packing: false needs a model whose forward takes attention_mask, and that of {config.model.type} "
            "does not; add it, or set data.packing=true"
        )


def _images_for(config: Config, section: ImageDataConfig) -> ImageDataset:
    """Images, checked against the model that is to read them."""
    dataset = ImageDataset.open(section, config.seed)
    classes, (height, width, channels) = len(dataset.classes), dataset.source.images.shape
    if config.model.vocab_size != classes:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size}, and {dataset.description} has {classes} classes; "
            f"set model.vocab_size={classes}"
        )
    if isinstance(config.model, CNNConfig):
        if config.model.image_channels != channels:
            raise ConfigError(
                f"model.image_channels: {config.model.image_channels}, and {dataset.description} gives {channels}; "
                f"set model.image_channels={channels}"
                + (f", or data.channels={wanted}" if (wanted := config.model.image_channels) in (1, 3) else "")
            )
        least = cnn_plan.min_image_size(config.model)
        if min(height, width) < least:
            raise ConfigError(
                f"data.image_size: images of {height}x{width} are too small for the strides of this model, "
                f"whose least is {least}x{least}; set data.image_size={least} or more, or use fewer stages"
            )
    dataset.steps_per_epoch(config.training.batch_size)  # raises where there are too few
    return dataset


def sequence_length(config: Config) -> int:
    """Tokens in one training sequence: `data.seq_length`, else the model's `max_seq_length`."""
    length = config.data.seq_length or getattr(config.model, "max_seq_length", None)
    if length is None:
        raise ConfigError("data.seq_length: required for a model without max_seq_length")
    return int(length)


def open_dataset(
    data_config: DataConfig,
    seq_length: int,
    seed: int,
    cache_dir: str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> TextDataset:
    """Opens the data that a configuration names. A new kind of source adds its branch here.

    Args:
        data_config: the section `data` of a configuration.
        seq_length: tokens in one sequence (`data.seq_length`, or else the model's longest).
        seed: of the order of batches.
        cache_dir: where prepared data is kept; $ICENET_CACHE or ~/.cache/icenet when absent.
        tokenizer: the one that `data_config` names, where it has been read already.
        workers, progress: see `icenet.core.data.text.cache.load_tokens`.

    Raises:
        DataError: the source is missing, empty, not text or too short, or the cache cannot be written.
    """
    kind = TextDataset if data_config.packing else DocumentDataset
    return kind.open(
        data_config.source,
        seq_length=seq_length,
        seed=seed,
        tokenizer=tokenizer or data_config.tokenizer,
        validation_fraction=data_config.validation_fraction,
        cache_dir=cache_dir,
        text_key=data_config.text_key,
        workers=workers,
        progress=progress,
    )
