"""Values of nearby problems, in which the noise is sampled (see `icenet.parity.resampling`)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from icenet.core import rng
from icenet.parity import resampling
from icenet.parity.measures import BLOCK, Floats, half_ulp, is_binary, round_to
from icenet.parity.trace import Call, Value

Array = npt.NDArray[Any]


def nearby(values: npt.ArrayLike, dtype: str, sample: int, ulps: int = 4) -> Floats:
    """Returns values that differ from the given ones by up to some ulps of `dtype`, not rounded to it.

    The difference is a function of the value and the sample, so it does not depend on the axes of the array, and
    equal values stay equal. Zeros and values that are not finite (masks) stay.
    """
    key = rng.key(0, "nearby", sample)

    def uniform(part: Floats, start: int) -> Floats:
        return _hash(part.astype(np.float32).view(np.uint32), key).astype(np.float64) * 2.0**-31 - 1

    return _moved(values, dtype, 2 * ulps, uniform)


def perturb_by_ulp(values: npt.ArrayLike, dtype: str, key: npt.NDArray[np.uint32], sample: int) -> Floats:
    """Returns the values of one sample: one in SAMPLES of them is moved up or down by one ulp of `dtype`.

    With the same key, each value is moved in exactly one of the samples 0 to SAMPLES - 1, so the mean square of its
    changes is ulp^2 / 12, that of a rounding. The result is exact in `dtype`. Zeros and values that are not finite
    (masks) stay.
    """

    def ulps(part: Floats, start: int) -> Floats:
        places = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        slots = _hash(places, key).astype(np.uint64) * (2 * resampling.SAMPLES) >> np.uint64(32)
        return (slots == 2 * sample).astype(np.float64) - (slots == 2 * sample + 1)

    return _moved(values, dtype, 2, ulps)


def _moved(values: npt.ArrayLike, dtype: str, halves: int, share: Callable[[Floats, int], Floats]) -> Floats:
    """Returns values that are moved by shares of some halves of an ulp. Zeros and values that are not finite stay.

    Args:
        values: The values, which are moved block by block.
        dtype: That of the ulps.
        halves: Number of halves of an ulp.
        share: Returns the shares, -1 to 1, of a block and the place of its first value.
    """
    array = np.asarray(values, np.float64)
    flat = array.reshape(-1)
    moved = np.empty_like(flat)
    for start in range(0, flat.size, BLOCK):
        part = flat[start : start + BLOCK]
        movable = np.isfinite(part) & (part != 0)
        change = halves * share(part, start) * half_ulp(np.where(movable, part, 1.0), dtype)
        moved[start : start + BLOCK] = part + np.where(movable, change, 0.0)
    return moved.reshape(array.shape)


def _hash(words: npt.NDArray[np.uint32], key: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Returns hashes of words under a key by the finalizer of MurmurHash3 (Appleby, 2011), once per word of the key.

    Noise needs no better hash. With Threefry, `nearby` took four times as long: 92 s of the 145 s of the proof of a
    ResNet-50 next to a GPU.
    """
    for word in key:
        words = words ^ word
        words ^= words >> np.uint32(16)
        words *= np.uint32(0x85EBCA6B)
        words ^= words >> np.uint32(13)
        words *= np.uint32(0xC2B2AE35)
        words ^= words >> np.uint32(16)
    return words


class Perturbation:
    """The values of a sample of the noise (see `icenet.parity.resampling`).

    Args:
        dtype: Compute dtype under test.
        sample: Number of the sample, 0 to SAMPLES - 1.
        rounds: Whether values are also moved by an ulp, as by one more rounding.
        ulps: By how many ulps of their own dtype the values of the problem are moved at most.
    """

    def __init__(self, dtype: str, sample: int, rounds: bool = True, ulps: int = 4) -> None:
        self.dtype, self.sample, self.rounds, self.ulps = dtype, sample, rounds, ulps

    def __call__(self, value: Value, *name: str | int) -> Value:
        """Returns the value of the nearby problem. `name` is the key of the move by an ulp."""
        if not value.is_float or is_binary(value.array):
            return value
        moved = round_to(nearby(value.array, value.dtype, self.sample, self.ulps), value.dtype)
        nearest = Value(moved.astype(value.array.dtype), value.dtype)
        return self.rounded(nearest, *name) if self.rounds else nearest

    def rounded(self, value: Value, *name: str | int) -> Value:
        """Returns the value, moved by an ulp in one of the samples."""
        moved = perturb_by_ulp(value.array, value.dtype, rng.key(0, "perturbation", *name), self.sample)
        return Value(moved.astype(value.array.dtype), value.dtype)

    def array(self, array: Array, *name: str | int) -> Array:
        """Returns a weight, gradient or optimizer state, which is moved by ulps of `dtype` if it is a float."""
        if not np.issubdtype(array.dtype, np.floating):
            return array
        moved = np.asarray(round_to(nearby(array, self.dtype, self.sample), "fp32"))  # a scalar stays an array
        if self.rounds:
            moved = perturb_by_ulp(moved, self.dtype, rng.key(0, "perturbation", *name), self.sample)
        found: Array = np.asarray(moved).astype(array.dtype)
        return found

    def call(self, call: Call) -> Call:
        """Returns a call with perturbed arguments."""
        numbers = count()
        return call.map(lambda value: self(value, "argument", next(numbers)))
