"""Products of numpy's rows with a recurrent weight, by the function of the BLAS that MLX calls.

MLX would copy the rows, compute the product in another thread and allocate the result. At each step of a layer this
takes as long as a part of the product. Microseconds of processor time of a product with W^T, one thread of an AMD
EPYC with AVX2, MKL, loaded cores (medians of 15 rounds in turn):

    rows x inputs x outputs    MLX's    the BLAS called directly
          4 x 128 x 512          174                          39
         16 x 256 x 1024         468                         250
        128 x 128 x 512          544                         316
         64 x 512 x 2048       5,346                       4,188
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np


@lru_cache
def _sgemm() -> Any:
    """Returns `sgemm_` as MLX finds it: in the global scope, or in the libraries of MLX."""
    everything = ctypes.CDLL(None)
    function = (everything if hasattr(everything, "sgemm_") else ctypes.CDLL(mx.__file__)).sgemm_
    function.restype = None
    return function


class Product:
    """Adds products with a weight to rows, in place.

    Args:
        weight: fp32 `[n, m]`.
        rows: Number of rows of each product.
        transposed: Whether rows `[B, m]` are multiplied with W^T, or rows `[B, n]` with W.
    """

    def __init__(self, weight: np.ndarray, rows: int, transposed: bool) -> None:
        self._weight = weight = np.ascontiguousarray(weight, np.float32)
        terms, outputs = weight.shape[::-1] if transposed else weight.shape
        self._shapes = (rows, terms), (rows, outputs)
        # Fortran takes addresses. What has rows in numpy has columns there, so it computes the transposed product.
        columns, width, count, length = (
            ctypes.byref(ctypes.c_int(size)) for size in (outputs, weight.shape[1], rows, terms)
        )
        one = ctypes.byref(ctypes.c_float(1))
        address = ctypes.c_void_p(weight.ctypes.data)
        self._before = b"T" if transposed else b"N", b"N", columns, count, length, one, address, width
        self._length, self._one, self._columns = length, one, columns
        self._function = _sgemm()

    def add_to(self, out: np.ndarray, rows: Any) -> None:
        """Adds the products of `rows` to `out`, both fp32. `out` is contiguous."""
        rows = np.ascontiguousarray(rows)  # the first state may be a view
        assert (rows.shape, out.shape) == self._shapes and out.flags.c_contiguous
        read, written = (ctypes.c_void_p(array.ctypes.data) for array in (rows, out))
        self._function(*self._before, read, self._length, self._one, written, self._columns)
