"""Activations: each in place of the one that a module calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from icenet_torch.tools.variants.variant import Run, Variant

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "no activation": lambda x: x,  # before those that change negative values only
    "ReLU": F.relu,
    "exact GELU": F.gelu,
    "the tanh approximation of GELU": lambda x: F.gelu(x, approximate="tanh"),
    "the sigmoid approximation of GELU, x * sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "the sigmoid approximation of GELU, x * sigmoid(1.773 x)": lambda x: x * torch.sigmoid(1.773 * x),  # older MLX
    "SiLU": F.silu,
    "leaky ReLU with slope 0.01": lambda x: F.leaky_relu(x, 0.01),
    "leaky ReLU with slope 0.1": lambda x: F.leaky_relu(x, 0.1),
    "leaky ReLU with slope 0.2": lambda x: F.leaky_relu(x, 0.2),
    "ReLU6": F.relu6,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "ELU": F.elu,
    "SELU": F.selu,
    "SELU with constants of six digits, as in MLX,": lambda x: 1.0507 * F.elu(x, 1.67326),
    "CELU": F.celu,
    "softplus": F.softplus,
    "Mish": F.mish,
    "hard swish": F.hardswish,
    "hard sigmoid": F.hardsigmoid,
    "the square of ReLU": lambda x: F.relu(x).square(),
    "exp": torch.exp,
    "sine": torch.sin,
    "absolute value": torch.abs,
}

ACTIVATION_NAMES = frozenset(
    {"gelu", "silu", "relu", "leaky_relu", "relu6", "tanh", "sigmoid", "elu", "selu", "celu", "softplus", "mish"}
    | {"hardswish", "hardsigmoid", "hardtanh"}
)
"""Functions that are replaced."""


def _activation(name: str) -> Variant:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        # a function that changes its input in place must still do so
        y = ACTIVATIONS[name](x.clone() if kwargs.get("inplace") else x)
        return x.copy_(y) if kwargs.get("inplace") else y

    return Variant(f"{name} in a, {{0}} in b", ACTIVATION_NAMES, run)


def _in_place_of(new: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    return lambda func, args, kwargs: new(args[0] if args else kwargs["input"])


def _gate(name: str) -> Variant:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        first, second = x.chunk(2, kwargs.get("dim", args[1] if len(args) > 1 else -1))
        return first * ACTIVATIONS[name](second)

    return Variant(f"{name} in the gate of GLU in a, sigmoid in b", frozenset({"glu"}), run)


VARIANTS = [
    *(_activation(name) for name in ACTIVATIONS),
    *(_gate(name) for name in ("no activation", "ReLU", "exact GELU", "SiLU", "tanh")),
    Variant("cosine in a, sine in b", frozenset({"sin"}), _in_place_of(torch.cos)),
    Variant("sine in a, cosine in b", frozenset({"cos"}), _in_place_of(torch.sin)),
    Variant("no sine in a", frozenset({"sin"}), _in_place_of(lambda x: x)),
]


USUAL_ACTIVATIONS = ("ReLU", "exact GELU", "the tanh approximation of GELU", "SiLU", "tanh", "sigmoid")
"""Those that are tried on the outputs of modules."""


def activated(name: str, array: np.ndarray) -> np.ndarray:
    """Returns the activation with a name of ACTIVATIONS of an array."""
    found: np.ndarray = ACTIVATIONS[name](torch.from_numpy(np.array(array, np.float64))).numpy()
    return found


def activation_name(name: str, kwargs: dict[str, Any], args: tuple[Any, ...] = ()) -> str:
    """Returns what an activation function is called in a message."""
    if name == "gelu":
        return "the tanh approximation of GELU" if "tanh" in (*args, *kwargs.values()) else "exact GELU"
    if name == "relu6" or (name == "hardtanh" and {0.0, 6.0} <= {*args, *kwargs.values()}):
        return "ReLU6"
    if name == "leaky_relu":
        slope = kwargs.get("negative_slope", args[1] if len(args) > 1 else None)
        return f"leaky ReLU with slope {0.01 if slope is None else slope:g}"
    names = {"silu": "SiLU", "relu": "ReLU", "elu": "ELU", "mish": "Mish"}
    return names.get(name, name)
