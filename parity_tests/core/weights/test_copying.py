"""Copies of arrays: the values are those of numpy, for all layouts and several threads."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from icenet.core.host import threads
from icenet.core.weights import copying

SHAPES = [(), (0, 3), (3, 0), (1, 5), (7,), (5, 33), (70, 9), (2, 3, 4), (3, 1, 4, 2)]


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.complex128, ml_dtypes.bfloat16])
@pytest.mark.parametrize("cores", [1, 3])
def test_copies_have_the_bits_of_their_source(cores: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(copying, "PART", 64)
    for shape in SHAPES:
        array = np.random.default_rng(1).integers(-100, 100, shape).astype(dtype)
        for source in (array, array.T, np.flip(array), array[..., ::2] if shape else array):
            copy = copying.contiguous(source)
            assert copy.flags.c_contiguous and (copy.dtype, copy.shape) == (source.dtype, source.shape)
            assert copy.tobytes() == source.tobytes()
    assert copying.contiguous(array) is array


def test_copies_are_cast() -> None:
    source = np.array([[1.5, -0.0, np.inf], [np.nan, 1e-40, 3e38]], ml_dtypes.bfloat16)
    target = np.empty((3, 2), np.float32)
    copying.copy_to(target, source.T)
    assert target.tobytes() == source.T.astype(np.float32).tobytes()
