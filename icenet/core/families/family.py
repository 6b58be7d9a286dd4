"""A family as a table of the keys of its config.json and of the names of its tensors.

Whether a family has the options of a model is not stated a second time: its config is written, read again and
compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icenet.core.config import Config, ModelConfig, TransformerConfig
from icenet.core.errors import ConfigError
from icenet.core.families.keys import COMMON, IGNORED, Part, Values, shown
from icenet.core.families.tensors import Row
from icenet.core.families.transformer_keys import MAX_LAYERS, options_of


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        model_type: Its name in config.json.
        architecture: Class of its model in `transformers`.
        fixed: Fields that all of its models have, `type` among them.
        parts: Keys of config.json.
        prefix: Beginning of the names of most tensors. Files of the model without its head lack it.
        rows: Names of tensors.
        head: Name of the output projection, a copy of the embedding in some files of tied models.
        buffers: Patterns of the names of tensors that are not weights.
        ignored: Keys that do not change the numbers, besides `IGNORED`.
        divides_width: Whether the library requires hidden_size to be a multiple of num_heads.
        section: Class of its configurations.
        options: Returns the options of a configuration without abbreviations, so that equal models have equal ones.
    """

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]
    parts: Sequence[Part]
    prefix: str
    rows: Sequence[Row]
    head: str = "lm_head.weight"
    buffers: Sequence[str] = ()
    ignored: frozenset[str] = frozenset()
    divides_width: bool = False
    section: type[ModelConfig] = TransformerConfig
    options: Callable[[Any], dict[str, Any]] = options_of

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of the configuration for the content of a config.json.

        Raises:
            ConfigError: It has a value that is not supported, or keys that are unknown.
        """
        for key in ("quantization_config", "quantization"):
            if values.get(key) is not None:
                raise ConfigError(f"{key}: quantized weights are not supported; use the original weights")
        parts = [*self.parts, *COMMON]
        known = {key for part in parts for key in part.keys} | IGNORED | self.ignored
        given = [key for key, value in values.items() if value is not None and not key.startswith("_")]
        if unknown := [key for key in given if key not in known]:
            raise ConfigError(
                f"{', '.join(map(shown, unknown))}: unknown for model_type {self.model_type}, and may change what "
                "the model computes; remove what has no effect"
            )
        checked = Values(values)
        fields: dict[str, Any] = {"dropout": 0.0, **self.fixed}
        for part in parts:
            fields |= part.read(checked)
        if isinstance(count := fields["num_layers"], int) and count > MAX_LAYERS:
            raise ConfigError(f"num_layers: {count} is more than {MAX_LAYERS}")
        return fields

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the keys of config.json for a model of the family."""
        options = self.options(config)
        written: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        for part in self.parts:
            written |= part.write(options)
        return written


def different_options(family: Family, config: ModelConfig) -> list[str]:
    """Returns the names of the options of a model that a family does not have; dropout does not count."""
    wanted = family.options(config)
    try:
        fields = family.read(family.write(config))
        found = family.options(Config.from_dict({"model": fields}).model)
    except ConfigError as error:  # a value that the family restricts
        return [f"{family.model_type} ({error})"]
    names = [name for name, value in wanted.items() if name != "dropout" and not _equal(value, found.get(name))]
    if family.divides_width and config.hidden_size % getattr(config, "num_heads", 1):
        names.append("num_heads (not a divisor of hidden_size)")
    return ["sliding_window" if name == "windows" else name for name in names]


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-12)
    return bool(left == right)
