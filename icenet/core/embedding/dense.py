"""The layers after the pooling: the module `Dense` of sentence-transformers, y = activation(W x + b), or that plus x.

Source: `sentence_transformers.base.modules.Dense`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import ConfigError, WeightsError
from icenet.core.weights import files as weight_files

CONFIG = "config.json"
PICKLED = "pytorch_model.bin"
_SENTENCE = "sentence_embedding"
_KEYS = ("in_features", "out_features", "bias", "activation_function", "use_residual")
_NAMES = ("module_input_name", "module_output_name")
_MOST = 1 << 20
"""Maximum of the two widths."""

Doubles = NDArray[np.float64]
_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS: Mapping[str, Callable[[Doubles], Doubles]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "Sigmoid": lambda x: _sigmoid(x),
    "SiLU": lambda x: x * _sigmoid(x),
}
"""Activations by the name of their class in PyTorch."""


@dataclass(frozen=True)
class Shape:
    """What the config.json of a layer states.

    Attributes:
        width_in, width_out: Number of values of a vector before and after it.
        has_bias: Whether it has b.
        activation: One of `ACTIVATIONS`.
        is_residual: Whether x is added to the result, or its projection if the widths differ.
    """

    width_in: int
    width_out: int
    has_bias: bool
    activation: str
    is_residual: bool


def unsupported(values: Mapping[str, Any]) -> str | None:
    """Returns what of the config.json of a layer is not supported; None if everything is."""
    activation = values.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not (
        isinstance(activation, str)
        and activation.startswith("torch.nn.")
        and activation.rpartition(".")[2] in ACTIVATIONS
    ):
        return f"activation_function {str(activation)[:80]!r} (only {', '.join(ACTIVATIONS)} of torch.nn)"
    other = next((name for name in _NAMES if values.get(name, _SENTENCE) not in (_SENTENCE, None)), None)
    return f"{other} {str(values[other])[:80]!r}" if other else None


def shape_of(file: Path, values: Mapping[str, Any]) -> Shape:
    """Returns what the config.json of a layer states.

    Args:
        file: Its path, for error messages.
        values: Its content.

    Raises:
        ConfigError: It has an unknown key, or a value of another type.
    """
    if unknown := [key for key in values if key not in (*_KEYS, *_NAMES)]:
        raise ConfigError(
            f"{file}: {', '.join(repr(key[:80]) for key in unknown)}: unknown, and may change embeddings"
        )
    widths: list[Any] = [values.get(key) for key in _KEYS[:2]]
    flags = [values.get("bias", True), values.get("use_residual", False)]
    if any(isinstance(width, bool) or not isinstance(width, int) or not 0 < width <= _MOST for width in widths):
        raise ConfigError(f"{file}: in_features and out_features must be numbers from 1 to {_MOST:,}")
    if not all(isinstance(flag, bool) for flag in flags):
        raise ConfigError(f"{file}: bias and use_residual must be true or false")
    activation = str(values.get("activation_function", "Tanh")).rpartition(".")[2]
    return Shape(int(widths[0]), int(widths[1]), flags[0], activation, flags[1])


def read(folder: Path) -> Dense:
    """Returns the layer in a folder: config.json and model.safetensors.

    Raises:
        ConfigError, WeightsError: A file is absent, damaged or not supported.
    """
    file = folder / CONFIG
    try:
        content = file.read_bytes() if file.stat().st_size <= _MOST else b""
        values = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror or "").lower() if isinstance(error, OSError) else "not JSON"
        raise ConfigError(f"embedding.dense: {file}: {reason}; copy the folder again") from None
    if not isinstance(values, dict) or (problem := unsupported(values)) is not None:
        raise ConfigError(f"embedding.dense: {file}: {problem if isinstance(values, dict) else 'no object'}")
    return Dense(folder, shape_of(file, values))


class Dense:
    """A layer and its weights.

    Attributes:
        shape: Its shape and options.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        """Reads model.safetensors.

        Args:
            folder: The folder of the layer.
            shape: What its config.json states.

        Raises:
            WeightsError: The file is absent or damaged, or has other tensors.
        """
        file = folder / weight_files.DEFAULT_NAME
        if not file.is_file() and (folder / PICKLED).is_file():
            raise WeightsError(
                f"{folder}: its weights are pickled, which can run code when they are read; convert them with "
                f"icenet convert {folder / PICKLED} {file} --to torch"
            )
        self.shape = shape
        expected: dict[str, tuple[int, ...]] = {"linear.weight": (shape.width_out, shape.width_in)}
        if shape.has_bias:
            expected["linear.bias"] = (shape.width_out,)
        if shape.is_residual and shape.width_in != shape.width_out:
            expected["residual.weight"] = (shape.width_out, shape.width_in)
        found = weight_files.read(file)
        if sorted(found) != sorted(expected):
            raise WeightsError(f"{file}: has {', '.join(sorted(found)) or 'no tensors'}, not {', '.join(expected)}")
        self._arrays: dict[str, Doubles] = {}
        for name, wanted in expected.items():
            array = np.asarray(found[name])
            if array.shape != wanted:
                raise WeightsError(f"{file}: {name} has the shape {list(array.shape)}, not {list(wanted)}")
            self._arrays[name] = array.astype(np.float64)

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the vectors `[N, width_out]` for `[N, width_in]`."""
        given = vectors.astype(np.float64)
        found = given @ self._arrays["linear.weight"].T + self._arrays.get("linear.bias", 0.0)
        found = ACTIVATIONS[self.shape.activation](found)
        if self.shape.is_residual:
            projection = self._arrays.get("residual.weight")
            found = found + (given if projection is None else given @ projection.T)
        return np.asarray(found, np.float32)


def _sigmoid(x: Doubles) -> Doubles:
    """Returns 1 / (1 + exp(-x)) without an overflow."""
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
