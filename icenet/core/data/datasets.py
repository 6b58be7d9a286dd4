"""The data set of a configuration, checked against its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from icenet.core.config import (
    ChatDataConfig,
    CustomDataConfig,
    ImageDataConfig,
    ImageModelConfig,
    TransformerConfig,
    custom,
)
from icenet.core.data.images.dataset import ImageDataset
from icenet.core.data.text.conversations import ConversationDataset, open_conversations
from icenet.core.data.text.documents import DocumentDataset
from icenet.core.data.text.packed import Batch, TextDataset
from icenet.core.data.text.prepare import Progress
from icenet.core.data.user import UserDataset
from icenet.core.errors import ConfigError
from icenet.core.messages import some
from icenet.core.report.bar import Bar
from icenet.core.tokenizers import get_tokenizer
from icenet.core.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from icenet.core.config import Config, DataConfig


class Dataset(Protocol):
    """A data set as the training loop uses it. Batches are a pure function of (seed, step).

    Implemented by `text.packed.TextDataset`, `text.documents.DocumentDataset`,
    `text.conversations.ConversationDataset`, `images.dataset.ImageDataset` and `user.UserDataset`.
    They also determine the order of an epoch.
    """

    fingerprint: str
    """SHA-256 of the data: equal data sets have equal fingerprints."""
    description: str
    """Name of the data set in messages."""
    unit: str
    """Unit in which throughput is counted: tokens (`tok`), images (`img`) or rows (`row`)."""

    @property
    def notes(self) -> Sequence[str]:
        """Messages on how the data was read, such as the files that were skipped. Shown when training begins."""

    @property
    def summary(self) -> Sequence[str]:
        """Lines that describe the data, such as a table of the classes. Shown when training begins, unless quiet."""

    @property
    def items_per_row(self) -> int:
        """Number of units in one row of a batch, on average."""

    @property
    def facts(self) -> dict[str, Any]:
        """Properties of the data that inference needs, such as class names, in JSON types. Checkpoints store them."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Files that inference needs, such as the tokenizer, by name. Checkpoints store them."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of batches in one pass. Raises DataError if it is zero."""

    def train_batch(self, step: int, batch_size: int) -> Batch:
        """Returns the batch of a step, counted from 0."""

    def validation_batches(self, batch_size: int, count: int | None = None) -> Iterator[Batch]:
        """Yields at most `count` validation batches, the same in every call."""


def dataset_for(config: Config, *, workers: int | None = None, quiet: bool = True) -> Dataset:
    """Returns the data set of a configuration, checked against its model.

    Args:
        config: The configuration.
        workers: Number of threads that encode a text whose tokens are not in the cache (default: one per processor).
        quiet: Show no progress of the encoding.

    Raises:
        ConfigError: The model cannot be trained on this data.
        DataError: See `open_dataset`.
    """
    section: Any = config.data
    if isinstance(section, CustomDataConfig):
        own = UserDataset.open(section, config.seed)
        own.check(config.training.batch_size)
        return own
    kind = "images" if isinstance(section, ImageDataConfig) else "tokens"
    if config.model.input_kind not in (kind, "anything"):
        wanted = "images" if kind == "tokens" else "text"
        raise ConfigError(
            f"data.kind {section.kind}: model.type {config.model.type} reads {config.model.input_kind}; "
            f"set data.kind={wanted}, or choose another model"
        )
    if isinstance(section, ImageDataConfig):
        return _images_for(config, section)
    if isinstance(config.model, TransformerConfig) and config.model.output == "none":
        raise ConfigError("model.output: none has no logits to train; set model.output=linear or transform")
    tokenizer = get_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"data.tokenizer {config.data.tokenizer}; set model.vocab_size={tokenizer.vocab_size} or more"
        )
    if isinstance(section, ChatDataConfig):
        _check_masks(config, "data.kind: chat", "add it")
    elif not section.packing:
        _check_masks(config, "data.packing: false", "add it, or set data.packing=true")
    length = sequence_length(config)
    dataset: TextDataset | ConversationDataset
    with Bar(f"encoding {config.data.source}", quiet) as bar:
        if isinstance(section, ChatDataConfig):
            dataset = open_conversations(
                section.source,
                tokenizer,
                seq_length=length,
                seed=config.seed,
                validation_fraction=section.validation_fraction,
                train_on=section.train_on,
                errors=section.errors,
                progress=bar,
            )
        else:
            dataset = open_dataset(
                config.data, length, config.seed, tokenizer=tokenizer, workers=workers, progress=bar
            )
    dataset.steps_per_epoch(config.training.batch_size)  # raises if the text is too short
    return dataset


def _check_masks(config: Config, cause: str, remedy: str) -> None:
    """Checks that a user's model accepts the attention mask of rows with padding."""
    if not custom.is_custom(config.model.type):
        return
    import inspect

    from icenet.core import backends
    from icenet.core.models.build import class_of

    forward = class_of(config.model, backends.choose(config)).forward
    parameters = inspect.signature(forward).parameters
    if "attention_mask" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(
            f"{cause} needs a model whose forward takes attention_mask, and that of {config.model.type} does not; "
            f"{remedy}"
        )


def _images_for(config: Config, section: ImageDataConfig) -> ImageDataset:
    """Returns the images of a configuration, checked against its model."""
    dataset = ImageDataset.open(section, config.seed)
    classes, (height, width, channels) = len(dataset.classes), dataset.source.images.shape
    if config.model.vocab_size != classes:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size}, but {dataset.description} has {classes} classes "
            f"({some(dataset.classes)}); set model.vocab_size={classes}{_new_head(config)}"
        )
    if isinstance(config.model, ImageModelConfig):
        if config.model.image_channels != channels:
            raise ConfigError(
                f"model.image_channels: {config.model.image_channels}, but {dataset.description} has {channels}; "
                f"set model.image_channels={channels}"
                + (f", or data.channels={wanted}" if (wanted := config.model.image_channels) in (1, 3) else "")
            )
        if problem := config.model.size_problem(height, width):
            size = config.model.smallest_size
            key, remedy = "data.image_size", f"set data.image_size={size[0]}"
            if section.preprocessor is not None or size[0] != size[1]:
                key, remedy = "data.preprocessor", f"its images must get {size[0]}x{size[1]} pixels (size, crop_size)"
            raise ConfigError(f"{key}: {problem}; {remedy}")
    dataset.steps_per_epoch(config.training.batch_size)  # raises if there are too few images
    return dataset


def _new_head(config: Config) -> str:
    """Returns what a changed number of classes means for a run that begins with trained weights."""
    if config.training.init_from is None or config.training.new_head:
        return ""
    return " and training.new_head=true: the output layer then has new initial values"


def sequence_length(config: Config) -> int:
    """Returns the number of tokens in a training sequence: `data.seq_length`, or the model's `max_seq_length`."""
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
    """Opens the text data of a configuration.

    Args:
        data_config: The section `data` of a configuration.
        seq_length: Number of tokens in a sequence (see `sequence_length`).
        seed: Determines the order of batches.
        cache_dir: The folder of token files (default: $ICENET_CACHE or ~/.cache/icenet).
        tokenizer: The tokenizer that `data_config` names, if it has been read already.
        workers, progress: See `icenet.core.data.text.cache.load_tokens`.

    Raises:
        DataError: The source is missing, empty, not text or too short.
        FileError: The cache cannot be written.
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
        errors=data_config.errors,
        workers=workers,
        progress=progress,
    )
