"""Random numbers that an MLX model draws, from a given source. The mirror is `icenet_torch/tools/draws.py`."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np

from icenet.nn.arrays import from_numpy

Source = Callable[[str, tuple[int, ...]], np.ndarray]
"""Called as `source(distribution, shape)`; returns uniform numbers in [0, 1), or normal ones, fp32.

The distribution is that which the model draws from: `bernoulli`, `uniform`, `normal` or another one. All but `normal`
are made of uniform numbers.
"""


@contextlib.contextmanager
def replaced(source: Source) -> Iterator[None]:
    """Draws the numbers of `mx.random` from a source while the context is open.

    Calls with a key, in other threads, and of functions that are not in `_functions`, draw as usual. So does a
    function that code imported by its own name.
    """
    before = {name: getattr(mx.random, name) for name in _functions(source)}
    try:
        for name, function in _functions(source).items():
            setattr(mx.random, name, _without_key(function, before[name]))
        yield
    finally:
        for name, function in before.items():
            setattr(mx.random, name, function)


def _without_key(function: Callable[..., mx.array], original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    thread = threading.get_ident()  # other threads draw as usual, as in PyTorch
    names = list(inspect.signature(function).parameters)

    def draw(*args: Any, **kwargs: Any) -> mx.array:
        own = {**dict(zip(names, args, strict=False)), **kwargs}
        has_key = any(item is not None for item in (*args[len(names) :], kwargs.get("key")))
        options = {name: item for name, item in own.items() if name not in ("key", "stream")}
        if threading.get_ident() != thread or has_key or not set(options) <= set(names):
            return original(*args, **kwargs)
        return function(**options)

    return draw


def _functions(source: Source) -> dict[str, Callable[..., mx.array]]:
    """Returns the functions of `mx.random` that take their numbers from a source."""

    def draw(distribution: str, shape: Any) -> mx.array:
        return from_numpy(source(distribution, tuple(shape)))

    def bernoulli(p: Any = 0.5, shape: Any = None) -> mx.array:
        p = mx.array(p, mx.float32)
        # as `uniform >= rate`, in which the rate is that of zeros
        return draw("bernoulli", p.shape if shape is None else shape) >= 1 - p

    def uniform(low: Any = 0, high: Any = 1, shape: Any = (), dtype: Any = mx.float32) -> mx.array:
        numbers = draw("uniform", shape)
        return (numbers * (mx.array(high) - mx.array(low)) + mx.array(low)).astype(dtype or mx.float32)

    def normal(shape: Any = (), dtype: Any = mx.float32, loc: Any = None, scale: Any = None) -> mx.array:
        numbers = draw("normal", shape)
        numbers = numbers if scale is None else numbers * scale
        return (numbers if loc is None else numbers + loc).astype(dtype or mx.float32)

    def laplace(shape: Any = (), dtype: Any = mx.float32, loc: float = 0.0, scale: float = 1.0) -> mx.array:
        least = 2.0**-23 - 1  # as `torch.distributions.Laplace`
        numbers = draw("uniform", shape) * (1 - least) + least
        return (loc - scale * mx.sign(numbers) * mx.log1p(-mx.abs(numbers))).astype(dtype or mx.float32)

    def gumbel(shape: Any = (), dtype: Any = mx.float32) -> mx.array:
        return (-mx.log(-mx.log(_positive(draw("gumbel", shape))))).astype(dtype or mx.float32)

    def categorical(logits: mx.array, axis: int = -1, shape: Any = None, num_samples: int | None = None) -> mx.array:
        logits = mx.moveaxis(logits, axis, -1)
        if num_samples is not None:
            logits = mx.repeat(logits[..., None, :], num_samples, -2)
        drawn = logits.shape if shape is None else (*shape, logits.shape[-1])
        return mx.argmax(logits - mx.log(-mx.log(_positive(draw("categorical", drawn)))), axis=-1)

    def randint(low: Any, high: Any, shape: Any = (), dtype: Any = mx.int32) -> mx.array:
        low, high = mx.array(low), mx.array(high)
        return mx.minimum(mx.floor(draw("randint", shape) * (high - low)) + low, high - 1).astype(dtype or mx.int32)

    def permutation(x: Any, axis: int = 0) -> mx.array:
        order = mx.argsort(draw("permutation", (x if isinstance(x, int) else x.shape[axis],)))
        return order if isinstance(x, int) else mx.take(x, order, axis)

    named = (bernoulli, uniform, normal, laplace, gumbel, categorical, randint, permutation)
    return {function.__name__: function for function in named}


def _positive(numbers: mx.array) -> mx.array:
    """Returns uniform numbers without 0, whose logarithm is infinite."""
    return mx.maximum(numbers, 2.0**-24)
