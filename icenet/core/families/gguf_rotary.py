"""The scaling of rotary positions in GGUF files, which have settings or factors of the frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from icenet.core.errors import ConfigError
from icenet.core.families.gguf_metadata import Metadata, Values
from icenet.core.families.keys import shown
from icenet.core.weights.files import Array
from icenet.core.weights.gguf import GgufFile

ROPE_FREQUENCIES = "rope_freqs.weight"
LLAMA3_KEYS = {
    key: f"icenet.rope_scaling.{key}"
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
}
"""Keys of our own for the settings of Llama 3, of which files of llama.cpp have the factors only."""
LONG_ROPE = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}


def rotary_scaling(metadata: Metadata) -> Values | None:
    """Returns `rope_scaling` of config.json, None without scaling.

    Raises:
        ConfigError: The scaling is not supported.
    """
    file = metadata.file
    kind, factor = metadata.get("rope.scaling.type"), metadata.get("rope.scaling.factor")
    old = metadata.get("rope.scale_linear")
    original = metadata.get("rope.scaling.original_context_length")
    attention = metadata.get("rope.scaling.attn_factor")
    if ROPE_FREQUENCIES in file:
        if kind not in (None, "none"):
            raise ConfigError(f"rope_freqs.weight together with rope.scaling.type {shown(kind)} is not supported")
        return _factors_scaling(file, metadata.number("rope.freq_base", 10000.0))
    if all(name in file for name in LONG_ROPE.values()):
        factors = {key: [float(value) for value in file[name].reshape(-1)] for key, name in LONG_ROPE.items()}
        scaling: Values = {"rope_type": "longrope", **factors}
        return {**scaling, "attention_factor": attention} if attention else scaling
    if kind in (None, "none"):
        return {"rope_type": "linear", "factor": old} if old not in (None, 0, 1.0) else None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        keys = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        more = {theirs: metadata.get(f"rope.scaling.{key}") for key, theirs in keys.items()}
        given = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **more}
        return {key: value for key, value in given.items() if value is not None}
    raise ConfigError(f"rope.scaling.type: {shown(kind)} is not supported")


def llama3_factors(size: int, theta: float, scaling: Mapping[str, Any]) -> Array:
    """Returns what the wavelengths of Llama 3 are multiplied by, `[size / 2]`, as llama.cpp stores it.

    Args:
        size: Number of rotated values per head.
        theta: The base of the frequencies.
        scaling: `rope_scaling` of config.json.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    rotations = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth))


def _factors_scaling(file: GgufFile, theta: float) -> Values | None:
    """Returns `rope_scaling` of config.json for `rope_freqs.weight`, which a file has in place of its settings.

    They are those of Llama 3 if some settings give the factors. Others are the factors of long-rope, the same for
    texts of any length.
    """
    factors = np.asarray(file[ROPE_FREQUENCIES], np.float64).reshape(-1)
    if factors.size > 2**16 or not np.isfinite(factors).all() or not (factors > 0).all():
        raise ConfigError(f"{ROPE_FREQUENCIES}: has factors that are not numbers above 0, or too many")
    if np.all(factors == 1):
        return None
    for scaling in _llama3_candidates(file, factors, theta):
        with np.errstate(all="ignore"):
            found = llama3_factors(2 * factors.size, theta, scaling)
        if np.allclose(found, factors, rtol=1e-5):
            return scaling
    listed = factors.tolist()
    return {"rope_type": "longrope", "short_factor": listed, "long_factor": listed, "attention_factor": 1.0}


def _llama3_candidates(file: GgufFile, factors: Array, theta: float) -> Iterator[Values]:
    """Returns settings of Llama 3 that may give some factors: those that IceNet writes, published and fitted ones."""
    given: Values = {key: file.metadata.get(name) for key, name in LLAMA3_KEYS.items()}
    if all(type(value) in (int, float) and 0 < value < 2**31 for value in given.values()):
        yield {"rope_type": "llama3", **given}
    lengths = (8192, *(2**power for power in range(9, 21)))
    largest = float(factors.max())
    common = {"rope_type": "llama3", "factor": largest}
    for length in lengths:
        published = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": length}
        yield {**common, **published}
    # between the two limits, 1 / factor is linear in the frequency; only ratios of the other settings matter
    between = (factors > 1) & (factors < largest)
    if between.sum() < 2:
        return
    frequencies = theta ** -(np.arange(0, 2 * factors.size, 2)[between] / (2 * factors.size)) / (2 * math.pi)
    slope, offset = np.polyfit(frequencies, (1 / factors[between] - 1 / largest) / (1 - 1 / largest), 1)
    for length in lengths if slope > 0 > offset else ():
        low, high = -offset * length / slope, (1 - offset) * length / slope
        fitted = {"low_freq_factor": round(low, 4), "high_freq_factor": round(high, 4)}
        yield {**common, **fitted, "original_max_position_embeddings": length}
