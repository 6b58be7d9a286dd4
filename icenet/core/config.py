"""The configuration: one YAML file, one tree of checked sections, shared by both backends.

    config = Config.from_yaml("configs/quickstart.yaml", overrides=["training.learning_rate=1e-3"])
    config.training.mixed_precision = "bf16"      # an assignment is checked too

Strict on purpose: an unknown key, a wrong type or an impossible combination is a `ConfigError` of one line
that names the key, the file and line where it stands, what is allowed and the nearest known key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator
from typing_extensions import Self

from icenet.core import custom, yaml_file
from icenet.core.errors import ConfigError
from icenet.core.families import (
    FAMILIES,
    AnyModelConfig,
    CNNConfig,
    CustomConfig,
    ModelConfig,
    RecurrentConfig,
    TransformerConfig,
)
from icenet.core.sections import Section, explain
from icenet.core.training import ParameterGroup, TrainingConfig

__all__ = [
    "DATA",
    "FAMILIES",
    "CNNConfig",
    "Config",
    "CustomConfig",
    "DataConfig",
    "GenerationConfig",
    "ImageDataConfig",
    "ModelConfig",
    "ParameterGroup",
    "RecurrentConfig",
    "TrainingConfig",
    "TransformerConfig",
    "check_device",
    "json_schema",
]


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


class GenerationConfig(Section):
    """How tokens are chosen. `icenet.core.sampling` says in which order the filters apply."""

    section: ClassVar[str] = "generation"

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens to add to the prompt."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens in prompt and continuation together, when max_new_tokens is absent."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Logits are divided by it; 0 chooses the most likely token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only the k most likely tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the most likely tokens whose probabilities add up to p."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only tokens at least this share as likely as the most likely one."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Logits of tokens already there are divided by it when positive, multiplied when negative."""
    seed: int | None = None
    """Seed of the draws; the configuration's own when absent."""
    stop: list[int | str] = Field(default_factory=list)
    """Tokens and texts after which a sequence ends; they are not part of what is returned."""
    overflow: Literal["error", "slide"] = "error"
    """Beyond max_seq_length: refuse before any work, or forget the older half of the context."""
    prefill_chunk: Annotated[int, Field(ge=1)] = 512
    """Prompt tokens read in one forward pass."""


# ---- the whole --------------------------------------------------------------------------------------------


class Config(Section):
    """One run: a model, its data, its training, and the backend that carries it out."""

    backend: Literal["auto", "mlx", "torch"] = "auto"
    """mlx, torch, or auto: mlx where it runs, else torch."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|gpu|mps|cuda(:[0-9]+)?)$")] = "auto"
    """auto, cpu, gpu (MLX), cuda, cuda:N or mps (PyTorch)."""
    blas: str = "auto"
    """MLX on a Linux CPU: auto, torch, openblas, none, or the path of a library; ICENET_BLAS goes first."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Initial weights, data order, dropout and sampling follow from it."""
    model: AnyModelConfig
    data: AnyDataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)

    @model_validator(mode="after")
    def _sequence_fits(self) -> Self:
        longest = getattr(self.model, "max_seq_length", None)
        wanted = getattr(self.data, "seq_length", None)
        if longest and wanted and wanted > longest:
            raise ValueError(f"data.seq_length {wanted} is more than model.max_seq_length {longest}")
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = (), *, trust_code: bool = True) -> Config:
        """Reads a YAML file, or a preset by its name (`transformer-tiny`), and applies `key=value` overrides.

        A file of the user's own that `model.type` names may be run from now on, unless `trust_code` is False
        (a configuration that came with a checkpoint).

        Raises:
            ConfigError: the file cannot be read, or what it says is wrong.
        """
        from icenet.core.presets import find

        file = find(path)
        values, lines = yaml_file.read(file)
        config = cls._checked(values, overrides, lines, file)
        if isinstance(config.model, CustomConfig):
            config.model.type = custom.beside(config.model.type, file.parent)
            if trust_code:
                custom.trust(config.model.type)
        if isinstance(config.data, DataConfig):
            told = any(override.partition("=")[0].strip() in ("data", "data.tokenizer") for override in overrides)
            config.data.tokenizer = _found(config.data.tokenizer, Path() if told else file.parent)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
        """Checks a tree of plain values, as YAML would give it."""
        return cls._checked(values, overrides, {}, None)

    @classmethod
    def _checked(
        cls, values: Mapping[str, Any], overrides: Sequence[str], lines: yaml_file.Lines, file: Path | None
    ) -> Config:
        tree = yaml_file.copy_tree(values)
        for override in overrides:
            key, value = yaml_file.parse_override(override)
            key = yaml_file.assign(tree, key, value)
            lines = {path: line for path, line in lines.items() if path[: len(key)] != key} | {key: 0}
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, lines=lines, file=file)) from None

    def with_overrides(self, *overrides: str) -> Config:
        """A new configuration in which `key=value` texts replace values (`training.learning_rate=1e-3`)."""
        return self.from_dict(self.to_dict(), overrides)

    def checked(self) -> Config:
        """The same configuration, checked as a whole: assignments check one section at a time."""
        return self.from_dict(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """A tree of plain values; `from_dict` gives the same configuration back."""
        return self.model_dump(mode="python")

    def to_yaml(self) -> str:
        """The configuration as YAML text, every key written out."""
        return yaml_file.dump(self.to_dict())


def _found(tokenizer: str, folder: Path) -> str:
    """A tokenizer's file as an absolute path, looked for in a folder first and then in the working folder."""
    for place in (folder, Path()):
        path = os.path.abspath(place / os.path.expanduser(tokenizer))
        if tokenizer.strip() not in ("", "bytes") and os.path.exists(path):
            return path
    return tokenizer


def check_device(device: str) -> None:
    """Refuses a device of the command line that no configuration could name."""
    Config(model=TransformerConfig(), device=device)


def json_schema() -> dict[str, Any]:
    """The JSON schema of the configuration, for editors: `icenet schema` prints it."""
    schema = Config.model_json_schema()
    schema["title"] = "IceNet configuration"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
