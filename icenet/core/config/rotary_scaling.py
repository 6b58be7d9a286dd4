"""The section `model.rotary_scaling`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from icenet.core.config.section import PositiveFloat, Section, Size

_SCALING_OPTIONS = {
    "original_length": ("dynamic", "yarn", "longrope", "llama3"),
    "low_frequency_factor": ("llama3",),
    "high_frequency_factor": ("llama3",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "truncate": ("yarn",),
    "attention_factor": ("yarn", "longrope"),
    "short_factors": ("longrope",),
    "long_factors": ("longrope",),
}
"""The types of scaling that read an option of `RotaryScaling`."""


class RotaryScaling(Section):
    """Scaling of rotary positions, for contexts longer than those of the original training."""

    section: ClassVar[str] = "model.rotary_scaling"

    type: Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
    """Frequencies divided by factor: all (linear), or the low ones (yarn, llama3); each by its own factor (longrope);
    or those of a base that depends on the number of tokens (dynamic)."""
    factor: PositiveFloat
    """Ratio of the context to the original one."""
    original_length: Size | None = None
    """Number of tokens of the original context; for all types but linear."""
    low_frequency_factor: PositiveFloat = 1.0
    """llama3: frequencies with fewer turns in the original context are divided by factor."""
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: frequencies with more turns in the original context are kept."""
    beta_fast: PositiveFloat = 32.0
    """yarn: frequencies with more turns in the original context are kept."""
    beta_slow: PositiveFloat = 1.0
    """yarn: frequencies with fewer turns in the original context are divided by factor."""
    truncate: bool = True
    """yarn: round the ends of the range between beta_fast and beta_slow to whole pairs."""
    attention_factor: PositiveFloat | None = None
    """yarn, longrope: factor of queries and keys; null: 0.1 ln(factor) + 1, and for longrope
    sqrt(1 + ln(factor) / ln(original_length))."""
    short_factors: list[PositiveFloat] | None = None
    """longrope: divisor of each frequency in texts of at most original_length tokens."""
    long_factors: list[PositiveFloat] | None = None
    """longrope: divisor of each frequency in longer texts."""

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.type != "linear" and self.original_length is None:
            raise ValueError(f"rotary_scaling of type {self.type} needs original_length")
        if self.type == "longrope" and (self.short_factors is None or self.long_factors is None):
            raise ValueError("rotary_scaling of type longrope needs short_factors and long_factors")
        if self.type == "longrope" and self.original_length == 1:
            raise ValueError("rotary_scaling of type longrope needs an original_length above 1")
        for name, types in _SCALING_OPTIONS.items():
            if self.type not in types and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"rotary_scaling.{name} is for type {' and '.join(types)}, not {self.type}")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError("high_frequency_factor must be larger than low_frequency_factor")
        return self
