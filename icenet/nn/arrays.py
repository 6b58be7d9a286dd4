"""MLX arrays: dtypes of products, and conversion to and from numpy."""

from __future__ import annotations

import contextlib
import copyreg
import io
import itertools
import json
import math
import weakref
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import ml_dtypes
import mlx.core as mx
import numpy as np

from icenet.core.dtypes import FLOAT_DTYPES
from icenet.core.weights.safetensors import dtype_name

Array: TypeAlias = mx.array
Dtype: TypeAlias = mx.Dtype

DTYPES: dict[str, mx.Dtype] = {name: getattr(mx, dtype) for name, dtype in FLOAT_DTYPES.items()}
"""Dtypes of parameters and of activations by their name in configs and commands."""


def _dtype(name: str) -> mx.Dtype:
    found: mx.Dtype = getattr(mx, name)
    return found


def _device(kind: str, index: int) -> mx.Device:
    return mx.Device(getattr(mx, kind), index)


def _reduce_dtype(dtype: mx.Dtype) -> tuple[Any, ...]:
    return _dtype, (str(dtype).rpartition(".")[2],)


def _reduce_device(device: mx.Device) -> tuple[Any, ...]:
    return _device, (device.type.name, device_index(device))


# MLX's arrays and modules can be copied and pickled, but not the dtypes and devices that a module may hold
copyreg.pickle(mx.Dtype, _reduce_dtype)
copyreg.pickle(mx.Device, _reduce_device)


def device_index(device: mx.Device) -> int:
    """Returns the number of a device among those of its type."""
    return next(index for index in itertools.count() if mx.Device(device.type, index) == device)


def on_cpu() -> bool:
    """Returns whether MLX's default device is the CPU. In `ModelBase.arithmetic` it is the model's device."""
    return mx.default_device().type == mx.DeviceType.cpu


def is_half(x: Array) -> bool:
    """Returns whether x is fp16 or bf16."""
    return x.dtype in (mx.float16, mx.bfloat16)


def product_dtype(x: Array) -> mx.Dtype:
    """Returns the dtype in which products with x are computed (matrix products, convolutions, attention).

    It is the dtype of x, or fp32 for half precision on a CPU, where such products are about 20 times slower.
    """
    return mx.float32 if is_half(x) and on_cpu() else x.dtype


def cast_weight(weight: Array, x: Array) -> Array:
    """Rounds a weight to the dtype of x and returns it in `product_dtype(x)`."""
    return weight.astype(x.dtype).astype(product_dtype(x))


def to_numpy(array: mx.array) -> np.ndarray:
    """Returns a numpy array with the same bits; bfloat16 becomes `ml_dtypes.bfloat16`."""
    if array.dtype == mx.bfloat16:  # MLX exports no bfloat16 to numpy
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def from_numpy(array: np.ndarray) -> mx.array:
    """Returns an MLX array with the same values; `ml_dtypes.bfloat16` becomes bfloat16, float64 becomes float32."""
    if array.dtype == ml_dtypes.bfloat16:
        return from_numpy(array.view(np.uint16)).view(mx.bfloat16)
    # MLX reads neither the other byte order nor negative strides, which an axis of length 1 may have too
    if not array.flags.c_contiguous or min(array.strides, default=0) < 0:
        array = array.copy(order="C")
    return mx.array(array.astype(array.dtype.newbyteorder("="), copy=False))


def filled(shape: tuple[int, ...], dtype: np.dtype, fill: Callable[[np.ndarray], None]) -> mx.array:
    """Returns a new MLX array, computed, whose memory a function writes.

    `mx.empty` and `mx.array` write the memory in one thread, which takes as long as reading a file into it (2.9 GB:
    1.5 s of 2.5 s). `mx.load` gives new memory to its file object.

    Args:
        shape: The shape.
        dtype: A dtype that MLX has.
        fill: Called with the memory, from another thread.
    """
    memory: Any = _Memory(tuple(shape), np.dtype(dtype), fill)
    errors: list[BaseException] = memory.errors
    freed: SimpleQueue[object] = SimpleQueue()
    reference = weakref.ref(memory, freed.put)
    loaded: Any = mx.load(memory, format="safetensors")
    del memory
    array: mx.array = loaded["array"]
    mx.eval(array)
    del loaded
    # A thread of MLX frees the file object later. If the process ends before, it aborts: Python ends a thread that
    # waits for its lock, which C++ does not allow in a destructor.
    with contextlib.suppress(Empty):
        freed.get(timeout=1.0)
    del reference
    if errors:  # MLX passes over the errors of its threads
        raise errors[0]
    return array


def address(array: mx.array) -> int:
    """Returns where an array is in memory. On a GPU this may move it to the host."""
    return int(np.array(array.reshape(-1).view(mx.uint8), copy=False).ctypes.data)


def array_of_parts(parts: Sequence[mx.array]) -> mx.array | None:
    """Returns the array whose parts along the first axis are these, without a copy; None if they are no such parts.

    MLX does not tell the array of which another one is a view, but addresses do. Arrays of their own never follow one
    another without a gap, because MLX's allocator stores the size of each before its values. With a GPU, MLX has
    another allocator, of whole pages, also for a CPU.
    """
    if not on_cpu() or mx.metal.is_available() or mx.cuda.is_available():
        return None
    if any(part.dtype != parts[0].dtype or part.shape[1:] != parts[0].shape[1:] for part in parts):
        return None
    starts = [address(part) for part in parts]
    ends = [start + part.nbytes for start, part in zip(starts, parts, strict=True)]
    if starts[1:] != ends[:-1]:
        return None
    shape = sum(part.shape[0] for part in parts), *parts[0].shape[1:]
    return mx.as_strided(parts[0], shape)


class _Memory(io.RawIOBase):
    """A safetensors file of one array, whose values a function writes into the memory that reads them."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, fill: Callable[[np.ndarray], None]) -> None:
        self.errors: list[BaseException] = []
        self._shape, self._dtype, self._fill = shape, dtype, fill
        nbytes = math.prod(shape) * dtype.itemsize
        entry = {"dtype": dtype_name(dtype), "shape": shape, "data_offsets": [0, nbytes]}
        table = json.dumps({"array": entry}).encode()
        self._header = len(table).to_bytes(8, "little") + table
        self._stop, self._at = len(self._header) + nbytes, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._stop)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, memory: Any) -> int:
        begin, count = self._at, len(memory)
        self._at += count
        if begin < len(self._header):
            memory[:] = self._header[begin : self._at]
            return count
        fill, errors, target = self._fill, self.errors, np.frombuffer(memory, self._dtype).reshape(self._shape)
        del self  # the frames of an error would keep it, and `filled` waits for its end
        try:
            fill(target)
        except BaseException as error:
            errors.append(error)
        return count
