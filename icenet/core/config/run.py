"""A run's configuration: the whole tree, read from YAML or from Python, with overrides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from icenet.core.config import custom, yaml_file
from icenet.core.config.data import AnyDataConfig, DataConfig
from icenet.core.config.generation import GenerationConfig
from icenet.core.config.model import (
    AnyModelConfig,
    CustomConfig,
    TransformerConfig,
)
from icenet.core.config.section import Section, explain
from icenet.core.config.training import TrainingConfig
from icenet.core.errors import ConfigError

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
        from icenet.core.config.presets import find

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
