"""The nearby point at which layers are differentiable."""

from __future__ import annotations

import numpy as np
import pytest

from icenet.core import rng
from icenet.parity.measures import round_to
from icenet.parity.ties import may_be_kinks, moved_apart

KEY = rng.key(0, "test")
NORMAL = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
ARRAYS = {
    "normal": NORMAL,
    "behind a relu": np.maximum(NORMAL, 0),
    "probabilities": np.clip(NORMAL + 0.5, 0, 1),
    "negative": -np.maximum(NORMAL, 0),
    "zeros": np.zeros_like(NORMAL),
    "ones": np.ones_like(NORMAL),
    "minus ones": -np.ones_like(NORMAL),
    "large images": np.maximum(np.tile(NORMAL, (1, 1, 5, 5)), 0),
    "volumes": np.maximum(NORMAL.reshape(2, 6, 4, 8, 8), 0),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ARRAYS)
def test_values_of_a_window_differ_and_are_exact(name: str, dtype: str) -> None:
    array = round_to(ARRAYS[name], dtype)
    moved = moved_apart(array, dtype, KEY)
    assert np.array_equal(round_to(moved, dtype), moved) and not (2 * moved == np.rint(2 * moved)).any()
    size = (3,) * (array.ndim - 2)
    windows = np.lib.stride_tricks.sliding_window_view(moved, size, tuple(range(2, array.ndim)))
    assert (np.diff(np.sort(windows.reshape(-1, 3 ** len(size)))) > 0).all()
    # probabilities stay probabilities, and a root of positive values stays real
    low, high = min(array.min(), 0), max(array.max(), 0)
    assert low <= moved.min() and moved.max() <= max(high, 0.05)
    assert np.array_equal(moved, moved_apart(array, dtype, KEY))


def test_values_stay_near_and_in_order() -> None:
    moved = moved_apart(ARRAYS["behind a relu"], "fp32", KEY)
    order = np.argsort(moved, axis=None)
    assert (np.diff(ARRAYS["behind a relu"].ravel()[order]) >= 0).all()
    assert np.abs(moved - ARRAYS["behind a relu"]).max() < 0.01


def test_masks_stay() -> None:
    mask = np.where(NORMAL > 0, 0, -np.inf)
    moved = moved_apart(mask, "fp32", KEY)
    assert np.array_equal(np.isinf(moved), np.isinf(mask)) and np.abs(moved[np.isfinite(moved)]).max() < 0.01
    large = moved_apart(np.where(NORMAL > 0, 0, -1e9), "fp32", KEY)
    assert large[NORMAL > 0].min() > -1 and large[NORMAL <= 0].max() < -1e8


def test_where_an_array_may_have_ties() -> None:
    assert not may_be_kinks(np.array([0.3, 0.7]))
    assert may_be_kinks(np.array([0.3, 0.3])) and may_be_kinks(np.array([0.3, 6.0]))
