"""A family as a table of the keys of its config.json and of the names of its tensors.

Each part of the table reads keys of config.json into fields of `TransformerConfig` and writes them back. Whether a
family has the options of a model is not stated a second time: its config is written, read again and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from icenet.core.config import Config, TransformerConfig, transformer_plan
from icenet.core.errors import ConfigError
from icenet.core.families.tensors import Row

Options = Mapping[str, Any]
"""The options of a model without abbreviations (see `options_of`)."""

MAX_LAYERS = 2**14

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


SCALINGS: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "original_max_position_embeddings": "original_length",
    },
}
"""Types of scaled rotary positions: their keys, and the fields of `RotaryScaling`."""


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
        raise ConfigError(f"{key}: {_shown(value)} is not a whole number from {least} to {most}")

    def number(self, key: str, default: float | None) -> float | None:
        """Returns a finite number, or None."""
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        raise ConfigError(f"{key}: {_shown(value)} is not a number")

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false; null is the default."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{key}: {_shown(value)} is neither true nor false")

    def within(self, key: str) -> Values:
        """Returns the object of a key; an empty one if it is absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{key}: {_shown(value)} is not an object")
        return Values(value or {})

    def __iter__(self) -> Any:
        return iter(self._values)


class Part(Protocol):
    """A part of a table: some keys of config.json and the fields that belong to them."""

    @property
    def keys(self) -> Sequence[str]:
        """The keys that it reads."""
        ...

    def read(self, values: Values) -> dict[str, Any]:
        """Returns fields of `TransformerConfig`. Raises ConfigError for a value that no field can express."""
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
        raise ConfigError(f"{self.key}: activation {_shown(given)} is not supported; only {known}")

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
            raise ConfigError(f"{self.key}: {_shown(given)} is not supported, only {_shown(self.value)}")
        return {}

    def write(self, options: Options) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class HeadSize:
    """`head_dim`, which the library derives from the other sizes if it is absent and has no default."""

    default: int | None = None

    @property
    def keys(self) -> Sequence[str]:
        return ("head_dim",)

    def read(self, values: Values) -> dict[str, Any]:
        size = values.whole("head_dim", self.default)
        if size is None:  # as the library rounds, also if it is no divisor
            size = (values.whole("hidden_size", None) or 0) // (values.whole("num_attention_heads", None) or 1)
        return {"head_size": size or None}

    def write(self, options: Options) -> dict[str, Any]:
        size = options["head_size"]
        return (
            {}
            if self.default is None and size * options["num_heads"] == options["hidden_size"]
            else {"head_dim": size}
        )


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: `rope_parameters`, or the older keys `rope_theta` and `rope_scaling`."""

    theta_key: str = "rope_theta"
    fraction_key: str | None = None
    """Key of the rotated part of a head, of families that have it."""
    fraction: float = 1.0
    theta: float = 10000.0
    scales: bool = True
    """Whether the library accepts `SCALINGS`."""

    @property
    def keys(self) -> Sequence[str]:
        names = ("rope_parameters", "rope_scaling", "rope_theta", self.theta_key, "partial_rotary_factor")
        return (*names, *([self.fraction_key] if self.fraction_key else []))

    def read(self, values: Values) -> dict[str, Any]:
        name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        given = values.within(name)
        theta = given.number("rope_theta", values.number(self.theta_key, values.number("rope_theta", None)))
        fraction = given.number("partial_rotary_factor", values.number("partial_rotary_factor", None))
        if self.fraction_key and fraction is None:
            fraction = values.number(self.fraction_key, self.fraction)
        if not self.fraction_key and fraction not in (None, 1.0):
            raise ConfigError(f"partial_rotary_factor: {fraction} is not supported, only 1.0")
        fields: dict[str, Any] = {"rotary_theta": self.theta if theta is None else theta}
        if scaling := self._read_scaling(name, given, values):
            fields["rotary_scaling"] = scaling
        return {**fields, "rotary_fraction": 1.0 if fraction is None else fraction}

    def _read_scaling(self, name: str, given: Values, values: Values) -> dict[str, Any] | None:
        kind = given.get("rope_type") or given.get("type") or "default"
        known = {} if kind == "default" else SCALINGS.get(kind) if isinstance(kind, str) and self.scales else None
        if known is None:
            raise ConfigError(f"{name}: scaled rotary positions of type {_shown(kind)} are not supported")
        others = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *known)
        if unknown := [key for key in given if key not in others and given.get(key) is not None]:
            raise ConfigError(f"{name}: {', '.join(map(_shown, unknown))} is not supported")
        if not known:
            return None
        found = {field: given.get(key) for key, field in known.items() if given.get(key) is not None}
        if "original_length" in known.values():
            found.setdefault("original_length", values.get("max_position_embeddings"))
        return {"type": kind, **found}

    def write(self, options: Options) -> dict[str, Any]:
        theta, fraction = options.get("rotary_theta", self.theta), options.get("rotary_fraction", 1.0)
        written = {self.theta_key: theta, **({self.fraction_key: fraction} if self.fraction_key else {})}
        if self.scales and (scaling := options.get("rotary_scaling")):
            known = SCALINGS[scaling["type"]]
            given = {key: scaling[field] for key, field in known.items() if scaling[field] is not None}
            written["rope_scaling"] = {"rope_type": scaling["type"], **given}
        return written


@dataclass(frozen=True)
class Window:
    """`sliding_window` of all layers."""

    default: int | None

    @property
    def keys(self) -> Sequence[str]:
        return ("sliding_window",)

    def read(self, values: Values) -> dict[str, Any]:
        return {"sliding_window": values.whole("sliding_window", self.default)}

    def write(self, options: Options) -> dict[str, Any]:
        return {"sliding_window": next((window for window in options["windows"] if window), None)}


@dataclass(frozen=True)
class LayerWindows:
    """`sliding_window` of the layers that `layer_types` names."""

    default: int | None
    is_sliding: Callable[[int, Values], bool]
    """Whether a layer has a window if `layer_types` is absent."""
    switch: str | None = None
    """Key that must be true for windows."""
    others: Sequence[str] = ()
    """Keys that `is_sliding` reads."""

    @property
    def keys(self) -> Sequence[str]:
        return ("sliding_window", "layer_types", *([self.switch] if self.switch else []), *self.others)

    def read(self, values: Values) -> dict[str, Any]:
        window = values.whole("sliding_window", self.default)
        if self.switch and not values.flag(self.switch, False):
            window = None
        count = values.whole("num_hidden_layers", None, MAX_LAYERS) or 0
        types = values.get("layer_types")
        if types is None:
            types = [_SLIDING if self.is_sliding(index, values) else _FULL for index in range(count)]
        if not isinstance(types, list) or any(kind not in (_SLIDING, _FULL) for kind in types):
            raise ConfigError(f"layer_types: {_shown(types)} is not a list of {_SLIDING} and {_FULL}")
        sliding = window is not None and _SLIDING in types
        names = ["sliding" if kind == _SLIDING and sliding else "full" for kind in types]
        return {"sliding_window": window if sliding else None, "layer_types": names}

    def write(self, options: Options) -> dict[str, Any]:
        windows = options["windows"]
        written = {"sliding_window": next((window for window in windows if window), None)}
        if self.switch:
            written[self.switch] = written["sliding_window"] is not None
        if written["sliding_window"] is None:
            written["sliding_window"] = self.default  # some readers need a number
        return {**written, "layer_types": [_SLIDING if window else _FULL for window in windows]}


_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class ScalarScale:
    """`query_pre_attn_scalar` n: scores are multiplied by 1 / sqrt(n)."""

    key: str
    default: int

    @property
    def keys(self) -> Sequence[str]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        return {"attention_scale": (values.whole(self.key, self.default) or self.default) ** -0.5}

    def write(self, options: Options) -> dict[str, Any]:
        return {self.key: round(options["attention_scale"] ** -2)}


@dataclass(frozen=True)
class IsScaled:
    """A flag: whether scores are multiplied by 1 / sqrt(head_size)."""

    key: str

    @property
    def keys(self) -> Sequence[str]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        return {"attention_scale": None if values.flag(self.key, True) else 1.0}

    def write(self, options: Options) -> dict[str, Any]:
        return {self.key: options["attention_scale"] != 1.0}


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


@dataclass(frozen=True)
class Family:
    """A family of decoders.

    Attributes:
        model_type: Its name in config.json.
        architecture: Class of its language model in `transformers`.
        fixed: Fields that all of its models have.
        parts: Keys of config.json.
        prefix: Beginning of the names of most tensors. Files of the model without its head lack it.
        rows: Names of tensors.
        head: Name of the output projection, a copy of the embedding in some files of tied models.
        buffers: Patterns of the names of tensors that are not weights.
        ignored: Keys that do not change the numbers, besides `IGNORED`.
        divides_width: Whether the library requires hidden_size to be a multiple of num_heads.
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

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of `TransformerConfig` for the content of a config.json.

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
                f"{', '.join(map(_shown, unknown))}: unknown for model_type {self.model_type}, and may change what "
                "the model computes; remove what has no effect"
            )
        checked = Values(values)
        fields: dict[str, Any] = {"type": "transformer", "dropout": 0.0, **self.fixed}
        for part in parts:
            fields |= part.read(checked)
        if isinstance(count := fields["num_layers"], int) and count > MAX_LAYERS:
            raise ConfigError(f"num_layers: {count} is more than {MAX_LAYERS}")
        return fields

    def write(self, config: TransformerConfig) -> dict[str, Any]:
        """Returns the keys of config.json for a model of the family."""
        options = options_of(config)
        written: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        for part in self.parts:
            written |= part.write(options)
        return written


def options_of(config: TransformerConfig) -> dict[str, Any]:
    """Returns the options of a model with null resolved, so that equal models have equal options.

    `windows` has the window of each layer in place of sliding_window and layer_types.
    """
    values = config.model_dump(mode="python")
    for name in ("type", "compile_model", "feed_forward_multiplier", "layer_types", "sliding_window"):
        del values[name]
    if config.positions != "rotary":
        values = {name: value for name, value in values.items() if not name.startswith("rotary_")}
    blocks = transformer_plan.blocks(config)
    attention, size = blocks[0].attention, transformer_plan.head_size(config)
    values["num_kv_heads"], values["head_size"] = attention.num_kv_heads, size
    values["attention_output_bias"] = attention.output_bias
    values["attention_scale"] = config.attention_scale or size**-0.5
    values["feed_forward_size"] = blocks[0].feed_forward.inner
    values["embedding_scale"] = config.embedding_scale or config.hidden_size**0.5
    values["windows"] = [block.attention.window for block in blocks]
    return values


def different_options(family: Family, config: TransformerConfig) -> list[str]:
    """Returns the names of the options of a model that a family does not have; dropout does not count."""
    wanted = options_of(config)
    try:
        fields = family.read(family.write(config))
        found = options_of(Config.from_dict({"model": fields}).model)  # type: ignore[arg-type]
    except ConfigError as error:  # a value that the family restricts
        return [f"{family.model_type} ({error})"]
    names = [name for name, value in wanted.items() if name != "dropout" and not _equal(value, found.get(name))]
    if family.divides_width and config.hidden_size % config.num_heads:
        names.append("num_heads (not a divisor of hidden_size)")
    return ["sliding_window" if name == "windows" else name for name in names]


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-12)
    return bool(left == right)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
