"""Views of weights as numpy arrays, in the byte order of this machine and of a numeric dtype, and by other names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from icenet.core import backends
from icenet.core.dtypes import FLOAT_DTYPES, FloatDtype
from icenet.core.errors import WeightsError
from icenet.core.messages import first_line
from icenet.core.weights.safetensors import Spec, release, spec_of

Array = npt.NDArray[Any]

_RANGES = ("float16", "bfloat16", "float32", "float64")
"""Dtypes in the order of their largest values."""

_KINDS = {"bool": 0, "int": 1, "uint": 1, "float": 2, "bfloat": 2, "complex": 3}
"""Rank of a kind of dtype; a value of a higher rank does not fit one of a lower rank."""


class WeightsView(Mapping[str, Array]):
    """A view of weights, whose arrays are made when they are looked up. A subclass sets the names."""

    _names: Collection[str]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a mapping's own method looks the array up

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class NumpyWeights(WeightsView):
    """A view of weights as numpy arrays (see `to_array`). Each array is converted when it is looked up."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """
        Args:
            values: Arrays by name: numpy arrays, nested lists, or arrays that `numpy.asarray` accepts.

        Raises:
            WeightsError: It is no mapping, or a name is not text.
        """
        if not isinstance(values, Mapping):
            raise WeightsError(f"weights must be a dict of names and arrays, not a {type(values).__name__}")
        for name in values:
            if not isinstance(name, str):
                raise WeightsError(f"the name of a weight must be text, not {name!r}")
        self._values = self._names = values

    def __getitem__(self, name: str) -> Array:
        return to_array(name, self._values[name])

    def spec(self, name: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        array = None if hasattr(self._values, "spec") else self[name]
        return spec_of(self._values, name) if array is None else Spec(array.dtype, tuple(array.shape))


class RenamedWeights(WeightsView):
    """A view of weights under other names.

    Args:
        weights: The weights.
        names: New name by name, where the two differ.
        left_out: Names that the view does not have.
    """

    def __init__(
        self, weights: Mapping[str, Array], names: Mapping[str, str], left_out: Collection[str] = ()
    ) -> None:
        self._weights = weights
        self._names: dict[str, str] = {names.get(name, name): name for name in weights if name not in left_out}

    def __getitem__(self, path: str) -> Array:
        return self._weights[self._names[path]]

    def spec(self, path: str) -> Spec:
        """Returns the dtype and the shape of an array."""
        return spec_of(self._weights, self._names[path])


def first_non_finite(weights: Mapping[str, Array]) -> str | None:
    """Returns the name of the first array with a value that is NaN or infinite; None if all are finite."""
    return next((name for name, array in weights.items() if not np.isfinite(array).all()), None)


def to_array(name: str, value: Any) -> Array:
    """Returns a value as a numpy array in the byte order of this machine, without a copy if possible.

    Args:
        name: Name for the message.
        value: A numpy array of any layout, a number, a nested list, an array of MLX or a tensor of PyTorch.

    Raises:
        WeightsError: It is no array of numbers of a dtype that the frameworks have.
    """
    try:
        backend = _backend_of(value)  # whose conversion keeps bfloat16, and copies from a GPU
        array = np.asarray(backends.module(backend, "nn.arrays").to_numpy(value) if backend else value)
    except Exception as error:  # of numpy, or of the framework of the array
        reason = first_line(error)
        raise WeightsError(f"{name}: cannot become a numpy array ({reason}); pass numpy arrays") from None
    if array.dtype != ml_dtypes.bfloat16 and (array.dtype.kind not in "biufc" or array.dtype.itemsize > 16):
        what = f"a {type(value).__name__}" if not isinstance(value, np.ndarray) else f"an array of {array.dtype}"
        raise WeightsError(f"{name}: is {what}, not an array of numbers; pass float32, for example")
    if array.dtype.kind in "fc" and array.dtype.itemsize > (8 if array.dtype.kind == "f" else 16):
        raise WeightsError(f"{name}: the frameworks have no {array.dtype}; cast it to float64 or float32")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _backend_of(value: Any) -> str | None:
    """Returns the backend of an array of MLX or a tensor of PyTorch; None for anything else. Imports no framework."""
    classes = {(base.__module__, base.__name__) for base in type(value).__mro__}
    return "torch" if ("torch", "Tensor") in classes else "mlx" if ("mlx.core", "array") in classes else None


def float_dtype(weights: Mapping[str, Array]) -> FloatDtype:
    """Returns bf16 or fp16 if most floating values have that dtype, otherwise fp32."""
    sizes: Counter[str] = Counter()
    for spec in (spec_of(weights, name) for name in weights):
        sizes[str(spec.dtype)] += spec.size
    names: dict[str, FloatDtype] = {theirs: name for name, theirs in FLOAT_DTYPES.items()}
    floats = [dtype for dtype, _ in sizes.most_common() if "float" in dtype]
    return names.get(floats[0], "fp32") if floats else "fp32"


def check_dtypes(expected: Mapping[str, str], values: Mapping[str, Array]) -> None:
    """Checks that no array loses its fraction or its imaginary part, and no value becomes infinite in a model.

    Args:
        expected: Dtype of the model's array by name, such as `float32`, `torch.int64` or `mlx.core.bfloat16`.
        values: Arrays with those names.

    Raises:
        WeightsError: An array of floats or complex numbers is for an array of integers or floats, or a value is too
            large for the model's dtype.
    """
    for name, dtype in expected.items():
        if name in values:
            given, own = str(spec_of(values, name).dtype), dtype.rpartition(".")[2]
            if _rank(given) > max(_rank(own), 1):
                raise WeightsError(f"{name}: is {given}, and the model's array is {own}; cast it first")
            if {_rank(given), _rank(own)} == {1} and not np.can_cast(given, own):
                _check_integers(name, values[name], own)
            if {given, own} <= set(_RANGES) and _RANGES.index(given) > _RANGES.index(own):
                _check_range(name, values[name], own)


def _check_integers(name: str, array: Array, dtype: str) -> None:
    if array.size and not np.array_equal(array, array.astype(dtype)):
        raise WeightsError(f"{name}: values from {array.min()} to {array.max()} do not fit into the model's {dtype}")
    release(array)


def _check_range(name: str, array: Array, dtype: str) -> None:
    with np.errstate(over="ignore"):
        overflows = np.isinf(array.astype(getattr(ml_dtypes if dtype == "bfloat16" else np, dtype)))
    overflows &= np.isfinite(array)
    if overflows.any():
        largest = float(np.abs(array[overflows]).max())
        raise WeightsError(f"{name}: {largest:g} is too large for the model's {dtype}; use bf16 or fp32")
    release(array)


def _rank(dtype: str) -> int:
    return _KINDS.get(dtype.rstrip("0123456789"), 2)
