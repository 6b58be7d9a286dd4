"""Keys of a config.json about rotary positions (see `keys`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from icenet.core.config import RotaryScaling
from icenet.core.errors import ConfigError
from icenet.core.families.keys import Options, Values, shown
from icenet.core.families.transformer_keys import FULL, SLIDING, LayerWindows
from icenet.core.nn.rotary import attention_factor

_ORIGINAL = {"original_max_position_embeddings": "original_length"}
SCALINGS: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        **_ORIGINAL,
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        **_ORIGINAL,
    },
    "longrope": {
        "factor": "factor",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
        "attention_factor": "attention_factor",
        **_ORIGINAL,
    },
}
"""Types of scaled rotary positions: their keys, and the fields of `RotaryScaling`."""
_MSCALES = ("mscale", "mscale_all_dim")
"""Keys of yarn from which the library computes attention_factor."""


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: `rope_parameters`, or the older keys `rope_theta` and `rope_scaling`."""

    theta_key: str = "rope_theta"
    fraction_key: str | None = None
    """Key of the rotated part of a head, of families that have it."""
    fraction: float = 1.0
    theta: float = 10000.0

    names: ClassVar[Mapping[str, str]] = {name: name for name in SCALINGS}
    """Types of scaling that the library accepts, and ours."""

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
        fields = {"rotary_theta": self.theta if theta is None else theta}
        return {
            **fields,
            **self._scaling(name, given, values),
            "rotary_fraction": 1.0 if fraction is None else fraction,
        }

    def _scaling(self, name: str, given: Values, values: Values) -> dict[str, Any]:
        """Returns the fields of the scaling that an object of keys describes."""
        kind = given.get("rope_type") or given.get("type") or "default"
        ours = kind if kind == "default" else self.names.get(kind) if isinstance(kind, str) else None
        if ours is None:
            raise ConfigError(f"{name}: scaled rotary positions of type {shown(kind)} are not supported")
        known = {} if ours == "default" else SCALINGS[ours]
        others = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *known, *_MSCALES * (ours == "yarn"))
        if unknown := [key for key in given if key not in others and given.get(key) is not None]:
            raise ConfigError(f"{name}: {', '.join(map(shown, unknown))} is not supported")
        if ours == "default":
            return {}
        found = {field: given.get(key) for key, field in known.items() if given.get(key) is not None}
        if ours == "linear":
            return {"rotary_scaling": {"type": ours, **found}}
        longest = values.whole("max_position_embeddings", None)
        found["original_length"] = self._original_length(values, found.get("original_length") or longest)
        if ours == "dynamic":  # which the library uses for contexts of any length
            factor = given.number("factor", None) or 1.0
            return {
                "rotary_scaling": {"type": ours, **found},
                "max_seq_length": max(int((longest or 1) * factor), longest or 1),
            }
        if ours in ("yarn", "longrope") and "factor" not in found and isinstance(found["original_length"], int):
            found["factor"] = (longest or 1) / max(found["original_length"], 1)
        scales = [given.number(key, None) for key in _MSCALES]
        if all(scales) and "attention_factor" not in found:
            top, bottom = (_mscale(given.number("factor", None) or 1.0, scale or 1.0) for scale in scales)
            found["attention_factor"] = top / bottom
        return {"rotary_scaling": {"type": ours, **found}}

    def _original_length(self, values: Values, default: Any) -> Any:
        """Returns the length of the context before scaling."""
        return default

    def write(self, options: Options) -> dict[str, Any]:
        theta, fraction = options.get("rotary_theta", self.theta), options.get("rotary_fraction", 1.0)
        written = {self.theta_key: theta, **({self.fraction_key: fraction} if self.fraction_key else {})}
        return {**written, **self._write_scaling(options)}

    def _write_scaling(self, options: Options) -> dict[str, Any]:
        scaling = options.get("rotary_scaling")
        if not scaling or scaling["type"] not in self.names.values():
            return {}
        ours, longest = scaling["type"], options["max_seq_length"]
        given = {key: scaling[field] for key, field in SCALINGS[ours].items() if scaling.get(field) is not None}
        if ours == "longrope":
            given["factor"] = longest / scaling["original_length"]
        if "attention_factor" in given:
            plain = {**scaling, "factor": given["factor"], "attention_factor": None}
            if attention_factor(RotaryScaling(**plain)) == given["attention_factor"]:
                del given["attention_factor"]  # the library's default
        written: dict[str, Any] = {"rope_scaling": {"rope_type": ours, **given}}
        if ours == "dynamic":
            written["max_position_embeddings"] = scaling["original_length"]
        return written


@dataclass(frozen=True)
class Phi3Rotary(Rotary):
    """Rotary positions of Phi-3: long-rope, with the original length next to `rope_scaling`."""

    names: ClassVar[Mapping[str, str]] = {"longrope": "longrope", "su": "longrope", "yarn": "longrope"}

    @property
    def keys(self) -> Sequence[str]:
        return (*super().keys, "original_max_position_embeddings")

    def _original_length(self, values: Values, default: Any) -> Any:
        return values.whole("original_max_position_embeddings", 4096)

    def _write_scaling(self, options: Options) -> dict[str, Any]:
        written = super()._write_scaling(options)
        if scaling := written.get("rope_scaling"):  # as in the published models, which mlx-lm needs
            del scaling["factor"], scaling["rope_type"]
            original = scaling.pop("original_max_position_embeddings")
            return {"rope_scaling": {"type": "longrope", **scaling}, "original_max_position_embeddings": original}
        return written


@dataclass(frozen=True)
class SlidingRotary(Rotary):
    """Rotary positions that have another base and no scaling in sliding layers, as in Gemma 3."""

    windows: LayerWindows | None = None
    theta: float = 1000000.0
    sliding_theta: float = 10000.0

    @property
    def keys(self) -> Sequence[str]:
        return ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")

    def read(self, values: Values) -> dict[str, Any]:
        given = values.within("rope_parameters")
        if unknown := [key for key in given if key not in (FULL, SLIDING)]:
            raise ConfigError(
                f"rope_parameters: {', '.join(map(shown, unknown))} is not supported, only {FULL}, {SLIDING}"
            )
        full, sliding = given.within(FULL), given.within(SLIDING)
        name, scaled = ("rope_scaling", values.within("rope_scaling")) if values.get("rope_scaling") else (FULL, full)
        if self._scaling(SLIDING, sliding, values):
            raise ConfigError(f"rope_parameters: {SLIDING}: scaled rotary positions are not supported")
        for part in (full, sliding, scaled):
            if part.number("partial_rotary_factor", 1.0) != 1.0:
                raise ConfigError("partial_rotary_factor: is not supported")
        theta = scaled.number("rope_theta", full.number("rope_theta", values.number("rope_theta", self.theta)))
        local = sliding.number("rope_theta", values.number("rope_local_base_freq", self.sliding_theta))
        fields = {"rotary_theta": theta, **self._scaling(name, scaled, values)}
        has_windows = self.windows is not None and self.windows.read(values)["sliding_window"] is not None
        return {**fields, "sliding_rotary_theta": local if has_windows else None}

    def write(self, options: Options) -> dict[str, Any]:
        local = options.get("sliding_rotary_theta")
        thetas = {"rope_theta": options.get("rotary_theta", self.theta), "rope_local_base_freq": local}
        if local is None:
            thetas["rope_local_base_freq"] = self.sliding_theta
        return {**thetas, **self._write_scaling(options)}


@dataclass(frozen=True)
class RotaryLayers:
    """`no_rope_layers`: 1 for a layer with rotary positions, 0 for one without; by default every fourth has none."""

    @property
    def keys(self) -> Sequence[str]:
        return ("no_rope_layers", "no_rope_layer_interval")

    def read(self, values: Values) -> dict[str, Any]:
        count = values.whole("num_hidden_layers", None) or 0
        listed = values.get("no_rope_layers")
        if listed is None:
            interval = values.whole("no_rope_layer_interval", 4) or 4
            listed = [int((index + 1) % interval != 0) for index in range(count)]
        if not isinstance(listed, list) or any(item not in (0, 1) for item in listed) or len(listed) < count:
            raise ConfigError(f"no_rope_layers: {shown(listed)} is not a list of 0 or 1 for each layer")
        return {"rotary_layers": [index for index, item in enumerate(listed[:count]) if item]}

    def write(self, options: Options) -> dict[str, Any]:
        layers = options.get("rotary_layers", [])
        return {"no_rope_layers": [int(index in layers) for index in range(options["num_layers"])]}


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
