"""Sampling: the order of the filters that turn logits into the next token.

The order is that of Hugging Face's `generate`. Logits are fp32 `[B, V]`.

    1. repetition_penalty   Logits of tokens that are already in the row (prompt or continuation, not padding) are
                            divided by the penalty if positive and multiplied by it if negative (Keskar et al., 2019).
    2. temperature          0 selects the most likely token and skips all later steps. Otherwise logits / temperature.
    3. top_k                Drops all but the k highest logits. Ties with the k-th highest are kept.
    4. top_p                Drops the least likely tokens whose probabilities add up to at most 1 - top_p
                            (nucleus sampling, Holtzman et al., 2020).
    5. min_p                Drops tokens that are less than min_p times as likely as the most likely token.
    6. Gumbel noise         argmax(logits + g) with g = -log(-log(u)) is an exact draw from the softmax of the
                            remaining logits (the Gumbel-max trick). u is uniform under the key
                            (seed, "sample", row, index), so a draw does not depend on the backend, the device, the
                            batch size or the prefill chunks.

`compute_scores` applies steps 1 to 6. The backend's `generation/sampling.py` implements each step on the device.
Two backends choose the same token unless the two best scores are closer than their rounding errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from icenet.core import rng
from icenet.core.config import GenerationConfig

MIN_TEMPERATURE = 1e-30
"""Lower temperatures are raised to this one, so that logits / temperature stays in the range of fp32."""
SMALLEST_UNIFORM = 2.0**-33
"""Replaces a draw of zero, whose Gumbel noise would be -infinite. The other draws are multiples of 2^-32."""


class SamplingOps(Protocol):
    """The sampling steps of one backend: the functions of its `generation/sampling.py`, on its arrays."""

    def to_fp32(self, logits: Any) -> Any: ...
    def penalize_repetition(self, logits: Any, seen: Any, penalty: float) -> Any: ...
    def keep_top_k(self, logits: Any, top_k: int) -> Any: ...
    def keep_top_p(self, logits: Any, top_p: float) -> Any: ...
    def keep_min_p(self, logits: Any, min_p: float) -> Any: ...
    def add_gumbel_noise(self, logits: Any, keys: Any) -> Any: ...


def compute_scores(ops: SamplingOps, logits: Any, settings: GenerationConfig, keys: Any, seen: Any) -> Any:
    """Applies the sampling steps to logits. The next token of a row is the argmax of its scores.

    Args:
        ops: Sampling steps of the backend.
        logits: Logits `[B, V]` in any floating dtype.
        settings: Sampling options.
        keys: Key of each row's draw, `[B, 2]`, or None for the most likely token.
        seen: Tokens that each row contains, bool `[B, V]`, or None without a repetition penalty.

    Returns:
        Scores `[B, V]`; -inf for dropped tokens. They are fp32, or the logits as they are if no step changes them.
    """
    if keys is None and seen is None:
        return logits
    logits = ops.to_fp32(logits)
    if seen is not None:
        logits = ops.penalize_repetition(logits, seen, settings.repetition_penalty)
    if keys is None:
        return logits
    logits = logits / max(settings.temperature, MIN_TEMPERATURE)
    if 0 < settings.top_k < logits.shape[-1]:
        logits = ops.keep_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = ops.keep_top_p(logits, settings.top_p)
    if settings.min_p > 0:
        logits = ops.keep_min_p(logits, settings.min_p)
    return ops.add_gumbel_noise(logits, keys)


def draw_keys(
    seed: int, rows: int | Sequence[int], tokens: int, first: int | Sequence[int] = 0
) -> NDArray[np.uint32]:
    """Returns the keys of the draws of new tokens `first`, `first + 1`, ..., uint32 `[tokens, rows, 2]`.

    Args:
        seed: Seed of the draws.
        rows: Number of rows, or their indices.
        tokens: Number of draws of each row.
        first: Index of the first token, or that of each row.
    """
    by_row = rng.fold(rng.key(seed, "sample")[None, :], np.arange(rows) if isinstance(rows, int) else np.array(rows))
    return rng.fold(by_row[None, :, :], np.arange(tokens)[:, None] + np.array(first))
