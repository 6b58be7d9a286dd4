"""Keys of a config.json that only transformers have (see `keys`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icenet.core.config import TransformerConfig, transformer_plan
from icenet.core.errors import ConfigError
from icenet.core.families.keys import Options, Values, shown

MAX_LAYERS = 2**14
_SLIDING, _FULL = "sliding_attention", "full_attention"

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
            raise ConfigError(f"{name}: scaled rotary positions of type {shown(kind)} are not supported")
        others = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *known)
        if unknown := [key for key in given if key not in others and given.get(key) is not None]:
            raise ConfigError(f"{name}: {', '.join(map(shown, unknown))} is not supported")
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
            raise ConfigError(f"layer_types: {shown(types)} is not a list of {_SLIDING} and {_FULL}")
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
