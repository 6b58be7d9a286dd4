"""The root of the configuration, `Config`: read from YAML or Python, with overrides."""

from __future__ import annotations

import filecmp
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from icenet.core.config import custom, imported, typed, written, yaml_file
from icenet.core.config.data import AnyDataConfig, ChatDataConfig, DataConfig
from icenet.core.config.embedding import EmbeddingConfig
from icenet.core.config.generation import GenerationConfig
from icenet.core.config.model import SECTIONS as MODEL_SECTIONS
from icenet.core.config.model import AnyModelConfig, CustomConfig, ImageModelConfig, TransformerConfig
from icenet.core.config.scalars import Scalar
from icenet.core.config.section import KeyPath, Section, explain, location, shortened
from icenet.core.config.training import TrainingConfig
from icenet.core.errors import ConfigError

_log = logging.getLogger("icenet")


class _Override(NamedTuple):
    """A change `key=value`, as it is written, and its parts."""

    text: str
    key: KeyPath
    value: Scalar


class Config(Section):
    """Configuration of one run: backend, model, data, training, generation and embedding."""

    backend: Literal["auto", "mlx", "torch"] = "auto"
    """mlx, torch or auto; auto is mlx if it runs on this machine, otherwise torch."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|gpu|mps|cuda(:[0-9]+)?)$")] = "auto"
    """auto, cpu, gpu (MLX), cuda, cuda:N or mps (PyTorch)."""
    blas: str = "auto"
    """BLAS of MLX on a Linux CPU: auto, torch, openblas, none, or the path of a library; ICENET_BLAS overrides it."""
    allow_tf32: bool = False
    """Whether fp32 products may use TF32 (10 bits of mantissa) on a GPU that has it: CUDA, and Apple's from M5 on."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, data order, dropout and sampling."""
    model: AnyModelConfig
    data: AnyDataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    embedding: EmbeddingConfig = Field(default_factory=EmbeddingConfig)

    @model_validator(mode="after")
    def _check_new_head(self) -> Self:
        if self.training.new_head and not isinstance(self.model, ImageModelConfig):
            raise ValueError(
                f"training.new_head is for the classifiers of images, and model.type is {self.model.type}; remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_seq_length(self) -> Self:
        limit = getattr(self.model, "max_seq_length", None)
        length = getattr(self.data, "seq_length", None)
        if limit and length and length > limit:
            raise ValueError(f"data.seq_length {length} is more than model.max_seq_length {limit}")
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = (), *, trust_code: bool = True) -> Config:
        """Reads a YAML file or a preset.

        Args:
            path: Path of the file, or the name of a preset (`transformer-tiny`).
            overrides: `key=value` changes (`training.learning_rate=1e-3`).
            trust_code: Whether a Python file that `model.type` names may be run. False for the configuration of a
                checkpoint.

        Raises:
            ConfigError: The file cannot be read, or its content is invalid.
        """
        from icenet.core.config.presets import find

        file = find(path)
        values, lines = yaml_file.read(file)
        parsed = _parse(overrides)
        config = cls._checked(values, parsed, lines, file)
        for key, reference in custom.references(config).items():
            section, _, name = key.partition(".")
            found = custom.resolve(reference, file.parent, key)
            setattr(getattr(config, section), name, str(Path(found).parent) if key == "model.port" else found)
        if trust_code:
            custom.trust_all(config)
        keys = [override.key for override in parsed]

        def absolute(value: str, section: str, key: str) -> str:
            overridden = (section,) in keys or (section, key) in keys
            return _absolute(value, f"{section}.{key}", Path() if overridden else file.parent, trust_code)

        has_tokenizer = isinstance(config.data, (DataConfig, ChatDataConfig))
        if has_tokenizer and config.data.tokenizer.strip() not in ("", "bytes"):
            config.data.tokenizer = absolute(config.data.tokenizer, "data", "tokenizer")
        if config.training.init_from is not None:
            config.training.init_from = absolute(config.training.init_from, "training", "init_from")
        if config.embedding.dense:
            config.embedding.dense = [absolute(path, "embedding", "dense") for path in config.embedding.dense]
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
        """Validates a tree of plain values, with `key=value` overrides.

        Raises:
            ConfigError: The content is invalid.
        """
        return cls._checked(values, _parse(overrides), {}, None)

    @classmethod
    def _checked(
        cls, values: Mapping[str, Any], parsed: Sequence[_Override], lines: yaml_file.Lines, file: Path | None
    ) -> Config:
        model_path = imported.path_of(values, [(key, value) for _, key, value in parsed])
        folder, changed = file.parent if file else Path(), {key: value for _, key, value in parsed}
        tree = imported.expand(yaml_file.copy_tree(values), model_path, folder, changed)
        given: dict[KeyPath, str] = {}
        for override, key, value in parsed:
            if key == ("model", "path") and model_path is not None:
                continue
            follows = f"has no effect: --set {shortened(override)} follows"
            within = [path for path in given if path[: len(key)] == key]
            for path in within:
                _log.warning(f"--set {given.pop(path)}: {follows}")
            around = [path for path in given if path == key[: len(path)]]
            given[key] = shortened(override)
            replaced, is_new = yaml_file.assign(tree, key, value)
            if around and not within and not is_new:
                _log.warning(f"--set {given[around[-1]]}: its {'.'.join(key)} {follows}")
            lines = {path: line for path, line in lines.items() if path[: len(replaced)] != replaced} | {replaced: 0}
        try:
            return cls.model_validate(typed.resolve(tree, cls))
        except typed.InvalidValueError as error:
            raise ConfigError(f"{location(error.path, lines, file)}{error.key}: {error}") from None
        except ValidationError as error:
            raise ConfigError(explain(error, cls, lines=lines, file=file)) from None

    def with_overrides(self, *overrides: str) -> Config:
        """Returns a new configuration with `key=value` changes (`training.learning_rate=1e-3`)."""
        return self.from_dict(written.tree(self), overrides)

    def checked(self) -> Config:
        """Returns the same configuration, validated as a whole: an assignment validates its section only."""
        return self.from_dict(written.tree(self))

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as a tree of plain values, for `from_dict`."""
        return self.model_dump(mode="python")

    def to_yaml(self) -> str:
        """Returns the configuration as YAML with every key."""
        return yaml_file.dump(self.to_dict())


def _parse(overrides: Sequence[str]) -> list[_Override]:
    if isinstance(overrides, str):  # its letters would be taken for overrides
        raise ConfigError(f"overrides must be a list, not a text; write [{overrides!r}]")
    return [_Override(text, *yaml_file.parse_override(text)) for text in overrides]


def _absolute(value: str, key: str, folder: Path, warn: bool) -> str:
    """Returns the absolute path of a file, looked up in a folder and then in the working directory.

    Args:
        value: The value of a key.
        key: The key, such as `data.tokenizer`.
        folder: The folder of the YAML file.
        warn: Whether a warning says that two files with different contents exist. A checkpoint has a file of its own.
    """
    places = [os.path.abspath(place / os.path.expanduser(value)) for place in (folder, Path())]
    found = [path for path in places if os.path.exists(path)]
    if warn and len(found) == 2 and all(map(os.path.isfile, found)) and not filecmp.cmp(found[0], found[1], False):
        _log.warning(
            f"{key}: {os.path.relpath(found[0])} next to the config is used, not {value} of the working "
            f"directory; write {found[1]} for that one"
        )
    return found[0] if found else value


def check_device(device: str) -> None:
    """Checks the syntax of a device given on the command line.

    Raises:
        ConfigError: It is not valid.
    """
    Config(model=TransformerConfig(), device=device)


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of the configuration, for editors. `icenet schema` prints it."""
    schema = Config.model_json_schema()
    for section, described in ((Config, schema), (TrainingConfig, schema["$defs"][TrainingConfig.__name__])):
        for key, field in section.model_fields.items():
            if typed.may_be_empty(field):
                described["properties"][key] = _or_null(described["properties"][key])
    for model_section in MODEL_SECTIONS:
        if model_section is not CustomConfig:
            schema["$defs"][model_section.__name__]["properties"]["path"] = imported.SCHEMA
    schema["title"] = "IceNet configuration"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a value that may also be null."""
    shape = {key: schema[key] for key in ("$ref", "oneOf", "type", "items") if key in schema}
    about = {key: value for key, value in schema.items() if key not in shape}
    return {"anyOf": [shape, {"type": "null"}], **about}
