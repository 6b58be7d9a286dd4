"""Keys of a config.json that only transformers have (see `keys`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from icenet.core.config import TransformerConfig, transformer_plan
from icenet.core.errors import ConfigError
from icenet.core.families.keys import Options, Values, shown
from icenet.core.nn.rotary import attention_factor

MAX_LAYERS = 2**14
SLIDING, FULL = "sliding_attention", "full_attention"
"""The types of layers in `layer_types`."""


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
    pattern: str | None = None
    """Key of the number n, if each n-th layer has no window and all others have one, which some readers need."""

    @property
    def keys(self) -> Sequence[str]:
        further = [key for key in (self.switch, self.pattern) if key]
        return ("sliding_window", "layer_types", *further, *self.others)

    def read(self, values: Values) -> dict[str, Any]:
        window = values.whole("sliding_window", self.default)
        if self.switch and not values.flag(self.switch, False):
            if window is not None and SLIDING in (values.get("layer_types") or ()):
                raise ConfigError(f"layer_types: has {SLIDING}, and {self.switch} is false; change one of them")
            window = None
        count = values.whole("num_hidden_layers", None, MAX_LAYERS) or 0
        types = values.get("layer_types")
        if types is None:
            types = [SLIDING if self.is_sliding(index, values) else FULL for index in range(count)]
        if not isinstance(types, list) or any(kind not in (SLIDING, FULL) for kind in types):
            raise ConfigError(f"layer_types: {shown(types)} is not a list of {SLIDING} and {FULL}")
        sliding = window is not None and SLIDING in types
        names = ["sliding" if kind == SLIDING and sliding else "full" for kind in types]
        return {"sliding_window": window if sliding else None, "layer_types": names}

    def write(self, options: Options) -> dict[str, Any]:
        windows = options["windows"]
        written = {"sliding_window": next((window for window in windows if window), None)}
        if self.switch:
            written[self.switch] = written["sliding_window"] is not None
        if written["sliding_window"] is None:
            written["sliding_window"] = self.default  # some readers need a number
        if self.pattern and (period := period_of(windows)):
            written[self.pattern] = period
        return {**written, "layer_types": [SLIDING if window else FULL for window in windows]}


def period_of(windows: Sequence[int | None]) -> int | None:
    """Returns n if each n-th layer has no window and all others have one."""
    return next(
        (
            period
            for period in range(1, len(windows) + 1)
            if all((window is None) == (index % period == 0) for index, window in enumerate(windows, 1))
        ),
        None,
    )


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
        values = {name: value for name, value in values.items() if not name.startswith(("rotary_", "sliding_rotary"))}
    if config.relative_buckets is None:
        del values["relative_max_distance"]
    blocks = transformer_plan.blocks(config)
    attention, size = blocks[0].attention, transformer_plan.head_size(config)
    values["num_kv_heads"], values["head_size"] = attention.num_kv_heads, size
    values["attention_output_bias"] = attention.output_bias
    values["attention_scale"] = config.attention_scale or size**-0.5
    sparse = [index for index, block in enumerate(blocks) if block.feed_forward.experts]
    dense = [block.feed_forward.inner for block in blocks if not block.feed_forward.experts]
    if sparse:
        values["expert_layers"], values["expert_size"] = sparse, blocks[sparse[0]].feed_forward.inner
    # if all layers have experts, the width of the others has no effect
    values["feed_forward_size"] = dense[0] if dense else values["expert_size"]
    values["embedding_scale"] = config.embedding_scale or config.hidden_size**0.5
    values["windows"] = [block.attention.window for block in blocks]
    if config.positions == "rotary":
        values |= _rotary_options(config, blocks)
    return values


def _rotary_options(config: TransformerConfig, blocks: Sequence[transformer_plan.BlockPlan]) -> dict[str, Any]:
    """Returns options of rotary positions with null resolved."""
    scaling, sliding = config.rotary_scaling, config.sliding_rotary_theta
    if sliding is None and scaling is None and any(block.attention.window for block in blocks):
        sliding = config.rotary_theta
    found: dict[str, Any] = {
        "rotary_layers": [index for index, block in enumerate(blocks) if block.attention.rotary],
        "sliding_rotary_theta": sliding,
    }
    if scaling is not None and scaling.type in ("yarn", "longrope"):
        written = {**scaling.model_dump(mode="python"), "attention_factor": attention_factor(scaling)}
        # long-rope's factor is only a part of attention_factor
        found["rotary_scaling"] = {**written, "factor": 1.0} if scaling.type == "longrope" else written
    return found
