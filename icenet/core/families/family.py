"""A family as a table of the keys of its config.json and of the names of its tensors.

Whether a family has the options of a model is not stated a second time: its config is written, read again and
compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from icenet.core.config import Config, ModelConfig, TransformerConfig
from icenet.core.errors import ConfigError
from icenet.core.families.keys import COMMON, IGNORED, Key, Part, Values, shown
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
        alternatives: Sets of rows that replace those of the same layers, in the files of other programs.
        head: Name of the output projection, a copy of the embedding in some files of tied models.
        buffers: Patterns of the names of tensors that are not weights.
        unused: Patterns of the names of weights that our model does not have, such as a pooler.
        masked_head: Name of a tensor that files of an encoder have if they have its head for masked language models.
        head_activation: Activation of that head, of families in which it is not that of the blocks.
        copies: Patterns of the names of copies of weights.
        renamed: Endings of names in older files, and those of the table.
        has_counters: Whether its batch norms count batches, in tensors `num_batches_tracked`.
        ignored: Keys that do not change the numbers, besides `IGNORED`.
        divides_width: Whether the library requires hidden_size to be a multiple of num_heads.
        text_family: Family of the text part of models of text and images; a model without images is written as it.
        section: Class of its configurations.
        rows_of: Returns further rows for a configuration, of families whose names depend on it.
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
    unused: Sequence[str] = ()
    masked_head: str | None = None
    head_activation: str | None = None
    copies: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    has_counters: bool = False
    ignored: frozenset[str] = frozenset()
    divides_width: bool = False
    text_family: Family | None = None
    section: type[ModelConfig] = TransformerConfig
    options: Callable[[Any], dict[str, Any]] = options_of
    rows_of: Callable[[Any], Sequence[Row]] | None = None
    alternatives: Sequence[Sequence[Row]] = ()

    @property
    def bare_architecture(self) -> str:
        """Class of the model without its head in `transformers`."""
        return re.sub("(ForCausalLM|LMHeadModel|ForMaskedLM)$", "Model", self.architecture)

    def canonical(self, name: str) -> str:
        """Returns the name of a tensor as the table has it, for that in a file."""
        old = next((ending for ending in self.renamed if name.endswith(ending)), None)
        return name if old is None else name.removesuffix(old) + self.renamed[old]

    def has_head(self, names: Set[str]) -> bool:
        """Returns whether the tensors of a file have the projection to logits, or should have it."""
        if self.masked_head is not None:
            return self.masked_head in names
        others = [row.name_of((), "weight") for rows in self.alternatives for row in rows if row.ours == ["output"]]
        return not names.isdisjoint([self.head, *others]) or any(name.startswith(self.prefix) for name in names)

    def read(self, values: Mapping[str, Any], has_head: bool | None = None) -> dict[str, Any]:
        """Returns the fields of the configuration for the content of a config.json.

        Args:
            values: The content.
            has_head: Whether the model has a projection to logits; None: if `architectures` names a class with it.

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
        defaults = {part.key: part.default for part in parts if isinstance(part, Key)}
        checked = Values({**defaults, **values})
        fields: dict[str, Any] = {"dropout": 0.0, **self.fixed}
        for part in parts:
            fields |= part.read(checked)
        if isinstance(count := fields["num_layers"], int) and count > MAX_LAYERS:
            key = next(
                (part.key for part in parts if isinstance(part, Key) and part.name == "num_layers"), "num_layers"
            )
            raise ConfigError(f"{key}: {count} is more than {MAX_LAYERS}")
        return fields if self.section is not TransformerConfig else self._with_head(fields, values, has_head)

    def _with_head(self, fields: dict[str, Any], values: Mapping[str, Any], has_head: bool | None) -> dict[str, Any]:
        """Returns the fields of a transformer with its head, or without it."""
        if has_head is None:
            classes = values.get("architectures") or []
            has_head = self.bare_architecture not in classes
            if self.masked_head is not None:
                has_head = any(str(name).endswith(("ForMaskedLM", "ForPreTraining")) for name in classes)
        if has_head and self.masked_head is not None:
            if self.head_activation not in (None, fields["activation"]):
                raise ConfigError(
                    f"activation {fields['activation']} is not supported in a masked language model of "
                    f"{self.model_type}, only {self.head_activation}, which is that of its head"
                )
            return {**fields, "output": "transform", "output_bias": True}
        if has_head or (self.masked_head is None and fields.get("tie_embeddings")):
            return fields
        return {**fields, "output": "none", "tie_embeddings": False, "output_bias": False, "logit_softcap": None}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the keys of config.json for a model of the family."""
        options = self.options(config)
        architecture = self.bare_architecture if options.get("output") == "none" else self.architecture
        written: dict[str, Any] = {"model_type": self.model_type, "architectures": [architecture]}
        for part in self.parts:
            written |= part.write(options)
        return written


OF_TRAINING = ("dropout", "router_aux_loss_coef")
"""Options that matter in training only, which not every family has."""
_REFUSES = "a value of the model: "
_SHORT = (bool, int, float, str)


def is_refusal(name: str) -> bool:
    """Returns whether an entry of `different_options` is the error of a family that refuses a value."""
    return name.startswith(_REFUSES)


def different_options(family: Family, config: ModelConfig) -> list[str]:
    """Returns the names of the options of a model that a family does not have; those of training do not count."""
    wanted = family.options(config)
    try:
        found = family.options(_as_written(family, config))
    except ConfigError as error:  # a value that the family restricts
        return [f"{_REFUSES}{error}"]
    names = [
        name for name, value in wanted.items() if name not in OF_TRAINING and not same_value(value, found.get(name))
    ]
    if family.divides_width and config.hidden_size % getattr(config, "num_heads", 1):
        names.append("num_heads (not a divisor of hidden_size)")
    return ["sliding_window" if name == "windows" else name for name in names]


def with_values(family: Family, config: ModelConfig, names: list[str]) -> list[str]:
    """Returns the names of `different_options` with the values of both sides where they are short."""
    if any(is_refusal(name) for name in names):
        return names
    wanted, found = family.options(config), family.options(_as_written(family, config))
    short = [name for name in names if isinstance(wanted.get(name), _SHORT) and isinstance(found.get(name), _SHORT)]
    return [
        f"{name}: {_yaml(wanted[name])} (it has {_yaml(found[name])})" if name in short else name for name in names
    ]


def _yaml(value: bool | float | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_written(family: Family, config: ModelConfig) -> ModelConfig:
    """Returns the model that is read from the config.json that a family writes for a model."""
    return Config.from_dict({"model": family.read(family.write(config))}).model


def same_value(left: Any, right: Any, tolerance: float = 1e-12) -> bool:
    """Returns whether two options have the same value within rounding."""
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=tolerance)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_value(left[key], right[key], tolerance) for key in left)
    return bool(left == right)
