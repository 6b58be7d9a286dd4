"""Values of nearby problems, in which the noise is sampled (see `icenet.parity.yardstick`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from icenet.core import rng
from icenet.parity import yardstick
from icenet.parity.measures import Floats, half_ulp


def nearby(values: npt.ArrayLike, dtype: str, sample: int) -> Floats:
    """Returns values that differ from the given ones by up to 4 ulps of `dtype`, not rounded to it.

    The difference is a function of the value and the sample, so it does not depend on the axes of the array, and
    equal values stay equal. Zeros and values that are not finite (masks) stay.
    """
    array = np.asarray(values, np.float64)
    bits = array.astype(np.float32).view(np.uint32)
    key = rng.key(0, "nearby", sample)
    words, _ = rng.threefry2x32((key[:1], key[1:]), (bits.reshape(-1), np.zeros(bits.size, np.uint32)))
    uniform = words.reshape(array.shape) * 2.0**-31 - 1
    movable = np.isfinite(array) & (array != 0)
    moved: Floats = array + np.where(movable, 8 * uniform * half_ulp(np.where(movable, array, 1.0), dtype), 0.0)
    return moved


def perturb_by_ulp(values: npt.ArrayLike, dtype: str, key: npt.NDArray[np.uint32], sample: int) -> Floats:
    """Returns the values of one sample: one in SAMPLES of them is moved up or down by one ulp of `dtype`.

    With the same key, each value is moved in exactly one of the samples 0 to SAMPLES - 1, so the mean square of its
    changes is ulp^2 / 12, that of a rounding. The result is exact in `dtype`. Zeros and values that are not finite
    (masks) stay.
    """
    array = np.asarray(values, np.float64)
    slots = np.floor(rng.uniform(key, array.shape).astype(np.float64) * (2 * yardstick.SAMPLES))
    ulps = (slots == 2 * sample).astype(np.float64) - (slots == 2 * sample + 1)
    movable = np.isfinite(array) & (array != 0)
    moved: Floats = array + np.where(movable, 2 * ulps * half_ulp(np.where(movable, array, 1.0), dtype), 0.0)
    return moved
