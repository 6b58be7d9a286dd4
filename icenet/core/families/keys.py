"""Keys of a config.json and the fields of a model's configuration that belong to them, in both directions.

Each part of a family's table reads some keys into fields and writes them back. Here are those of any model; those of
transformers are in `transformer_keys`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from icenet.core.errors import ConfigError

Options = Mapping[str, Any]
"""The options of a model without abbreviations (see `Family.options`)."""


IGNORED = frozenset(
    {
        # about the file and the program
        *("architectures", "auto_map", "dtype", "model_type", "name_or_path", "torch_dtype", "torchscript"),
        *("transformers.js_config", "transformers_version", "use_bfloat16"),
        # what a call returns, and how it is computed
        *("attn_implementation", "cache_implementation", "chunk_size_feed_forward", "gradient_checkpointing"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "use_return_dict"),
        # initial values, dropout of attention weights (in training only) and special tokens
        *("initializer_range", "attention_dropout", "attn_pdrop", "bos_token_id", "eos_token_id"),
        *("pad_token_id", "sep_token_id", "unk_token_id", "cls_token_id", "mask_token_id"),
        *("decoder_start_token_id", "tokenizer_class", "prefix"),
        # other tasks than language modelling
        *("classifier_dropout", "finetuning_task", "id2label", "label2id", "num_labels", "problem_type"),
        *("task_specific_params", "summary_type", "summary_use_proj", "summary_activation"),
        *("summary_proj_to_labels", "summary_first_dropout"),
        # settings of generation, which belong to generation_config.json
        *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
        *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
        *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values"),
        *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k"),
        *("top_p", "typical_p"),
    }
)
"""Keys that do not change what a model computes. Those that begin with `_` are about the program, too."""

ACTIVATIONS: Mapping[str, Sequence[str]] = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
    "relu": ("relu",),
}
"""Our names of activations and theirs; the first one is written."""


class Values:
    """The content of a config.json, with types checked on access."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def whole(self, key: str, default: int | None, most: int = 2**31, least: int = 1) -> int | None:
        """Returns a whole number within bounds, or None."""
        value = self.get(key, default)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most):
            return value
        raise ConfigError(f"{key}: {shown(value)} is not a whole number from {least} to {most}")

    def number(self, key: str, default: float | None) -> float | None:
        """Returns a finite number, or None."""
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        raise ConfigError(f"{key}: {shown(value)} is not a number")

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false; null is the default."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{key}: {shown(value)} is neither true nor false")

    def within(self, key: str) -> Values:
        """Returns the object of a key; an empty one if it is absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{key}: {shown(value)} is not an object")
        return Values(value or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)


class Part(Protocol):
    """A part of a table: some keys of config.json and the fields that belong to them."""

    @property
    def keys(self) -> Sequence[str]:
        """The keys that it reads."""
        ...

    def read(self, values: Values) -> dict[str, Any]:
        """Returns fields of the configuration. Raises ConfigError for a value that no field can express."""
        ...

    def write(self, options: Options) -> dict[str, Any]:
        """Returns keys of config.json. Of options that they cannot express it returns something near."""
        ...


@dataclass(frozen=True)
class Key:
    """A key with the values of a field."""

    key: str
    name: str
    default: Any
    """What the library uses if the key is absent."""

    @property
    def keys(self) -> Sequence[str]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        return {self.name: values.get(self.key, self.default)}

    def write(self, options: Options) -> dict[str, Any]:
        return {self.key: options[self.name]}


@dataclass(frozen=True)
class Repeated:
    """A key that is not read and is written with the value of a field, for programs that require it."""

    key: str
    name: str

    @property
    def keys(self) -> Sequence[str]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        return {}

    def write(self, options: Options) -> dict[str, Any]:
        return {self.key: options[self.name]}


@dataclass(frozen=True)
class Activation:
    """The key of the activation."""

    key: str
    default: str
    written: Mapping[str, str] = field(default_factory=dict)
    """Names to write that are not the first of `ACTIVATIONS`."""

    @property
    def keys(self) -> Sequence[str]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        given = values.get(self.key) or self.default
        for name, others in ACTIVATIONS.items():
            if given in others:
                return {"activation": name}
        known = ", ".join(other for others in ACTIVATIONS.values() for other in others)
        raise ConfigError(f"{self.key}: activation {shown(given)} is not supported; only {known}")

    def write(self, options: Options) -> dict[str, Any]:
        name = options["activation"]
        return {self.key: self.written.get(name, ACTIVATIONS[name][0])}


@dataclass(frozen=True)
class Only:
    """A key that may have one value only: for the others there is no option."""

    key: str
    value: Any

    @property
    def keys(self) -> Sequence[str]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        if (given := values.get(self.key)) is not None and given != self.value:
            raise ConfigError(f"{self.key}: {shown(given)} is not supported, only {shown(self.value)}")
        return {}

    def write(self, options: Options) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Dropout:
    """Dropout of residual branches, and of embeddings, which have the same probability here."""

    names: Sequence[str]
    default: float

    @property
    def keys(self) -> Sequence[str]:
        return self.names

    def read(self, values: Values) -> dict[str, Any]:
        return {"dropout": values.number(self.names[0], self.default)}

    def write(self, options: Options) -> dict[str, Any]:
        return dict.fromkeys(self.names, options["dropout"])


COMMON = (
    Only("is_encoder_decoder", False),
    Only("tie_encoder_decoder", False),
    Only("add_cross_attention", False),
    Only("cross_attention_hidden_size", None),
    Only("pruned_heads", {}),
)


def shown(value: Any) -> str:
    """Returns a value as text for an error, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
