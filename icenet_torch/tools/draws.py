"""Random numbers that a PyTorch model draws, from a given source. The mirror is `icenet/tools/draws.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from icenet_torch.nn.arrays import from_numpy

Source = Callable[[str, tuple[int, ...]], np.ndarray]
"""Called as `source(distribution, shape)`; returns uniform numbers in [0, 1), or normal ones, fp32.

The distribution is that which the model draws from: `bernoulli`, `uniform`, `normal` or another one. All but `normal`
are made of uniform numbers.
"""

aten = torch.ops.aten


@contextlib.contextmanager
def replaced(source: Source) -> Iterator[None]:
    """Draws the numbers of PyTorch from a source while the context is open, those of `torch.nn.functional` included.

    Calls with a generator, of complex numbers, and of operations not listed in `_Draws`, draw as usual.
    """
    with _Replaced(_Draws(source).functions()):
        yield


class _Replaced(TorchDispatchMode):
    def __init__(self, functions: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in self._functions or kwargs.get("generator") is not None or _is_complex(args, kwargs):
            return func(*args, **kwargs)
        kwargs.pop("generator", None)
        return self._functions[func](*args, **kwargs)


def _is_complex(args: Any, kwargs: Any) -> bool:
    dtype = kwargs.get("dtype") or next((item.dtype for item in args if isinstance(item, Tensor)), None)
    return dtype is not None and dtype.is_complex


class _Draws:
    """The operations of PyTorch that draw, with numbers from a source."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def functions(self) -> dict[Any, Callable[..., Any]]:
        """Returns the function for each operation that is replaced."""
        draw, like, integers, integers_like = self._draw, self._like, self._integers, self._integers_like
        return {
            aten.rand.default: self._new("uniform"),
            aten.randn.default: self._new("normal"),
            aten.rand_like.default: lambda x, dtype=None, **_: like("uniform", x, dtype),
            aten.randn_like.default: lambda x, dtype=None, **_: like("normal", x, dtype),
            aten.uniform_.default: lambda x, a=0.0, b=1.0: x.copy_(like("uniform", x) * (b - a) + a),
            aten.normal_.default: lambda x, mean=0.0, std=1.0: x.copy_(like("normal", x) * std + mean),
            aten.normal.float_float: lambda mean, std, size, dtype=None, device=None, **_: (
                draw("normal", size, dtype, device) * std + mean
            ),
            aten.normal.Tensor_float: self._normal,
            aten.normal.float_Tensor: self._normal,
            aten.normal.Tensor_Tensor: self._normal,
            aten.exponential_.default: lambda x, rate=1.0: x.copy_(_exponential(like("gumbel", x)) / rate),
            aten.bernoulli.default: lambda x: self._keeps(x, x).to(x.dtype),
            aten.bernoulli.p: lambda x, p: self._keeps(x, p).to(x.dtype),
            aten.bernoulli_.float: lambda x, p=0.5: x.copy_(self._keeps(x, p)),
            aten.bernoulli_.Tensor: lambda x, p: x.copy_(self._keeps(x, p)),
            aten.native_dropout.default: self._dropout,
            aten.multinomial.default: self._multinomial,
            aten.randint.default: lambda high, size, dtype=None, device=None, **_: integers(
                0, high, size, dtype, device
            ),
            aten.randint.low: lambda low, high, size, dtype=None, device=None, **_: integers(
                low, high, size, dtype, device
            ),
            **dict.fromkeys(
                (aten.randint_like.default, aten.randint_like.generator),
                lambda x, high, **options: integers_like(x, 0, high, **options),
            ),
            **dict.fromkeys((aten.randint_like.low_dtype, aten.randint_like.low_generator_dtype), integers_like),
            aten.random_.to: lambda x, high: x.copy_(integers_like(x, 0, high)),
            getattr(aten.random_, "from"): lambda x, low, high: x.copy_(integers_like(x, low, high)),
            aten.log_normal_.default: lambda x, mean=1.0, std=2.0: x.copy_((like("normal", x) * std + mean).exp()),
            aten.randperm.default: self._order,
        }

    def _draw(self, distribution: str, shape: Any, dtype: Any = None, device: Any = None) -> Tensor:
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.get_default_dtype()
        return from_numpy(self._source(distribution, tuple(shape))).to(device or "cpu", dtype)

    def _like(self, distribution: str, x: Tensor, dtype: Any = None) -> Tensor:
        return self._draw(distribution, x.shape, dtype or x.dtype, x.device)

    def _new(self, distribution: str) -> Callable[..., Tensor]:
        return lambda size, dtype=None, device=None, **_: self._draw(distribution, size, dtype, device)

    def _keeps(self, x: Tensor, p: Any) -> Tensor:
        # fp32 numbers, as on all sides; `uniform >= rate`, in which the rate is that of zeros
        numbers = self._draw("bernoulli", x.shape, torch.float32, x.device)
        return numbers >= 1 - torch.as_tensor(p, dtype=torch.float32)

    def _dropout(self, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
        keep = self._keeps(x, 1 - p) if train is not False else torch.ones_like(x, dtype=torch.bool)
        return x * keep * (1 / (1 - p) if p < 1 and train is not False else 1.0), keep

    def _gumbels(self, x: Tensor) -> Tensor:
        return -torch.log(_exponential(self._like("categorical", x)))

    def _multinomial(self, x: Tensor, count: int, replacement: bool = False) -> Tensor:
        if count == 1:
            return (x.log() + self._gumbels(x)).argmax(-1, keepdim=True)
        if replacement:
            rows = x[..., None, :].expand(*x.shape[:-1], count, x.shape[-1])
            return (rows.log() + self._gumbels(rows)).argmax(-1)
        return (x.log() + self._gumbels(x)).topk(count, -1).indices  # distributed as one after the other

    def _integers(self, low: int, high: int, shape: Any, dtype: Any = None, device: Any = None) -> Tensor:
        numbers = self._draw("randint", shape, torch.float32, device)
        return ((numbers * (high - low)).floor() + low).clamp(max=high - 1).to(dtype or torch.int64)

    def _integers_like(self, x: Tensor, low: int, high: int, dtype: Any = None, **_: Any) -> Tensor:
        return self._integers(low, high, x.shape, dtype or x.dtype, x.device)

    def _order(self, n: int, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        numbers = self._draw("permutation", (n,), torch.float32, device)
        return numbers.argsort(stable=True).to(dtype or torch.int64)

    def _normal(self, mean: Any, std: Any = 1.0) -> Tensor:
        like = mean if isinstance(mean, Tensor) else std
        shape = torch.broadcast_shapes(*map(np.shape, (mean, std)))
        return self._like("normal", like.expand(shape)) * std + mean


def _exponential(numbers: Tensor) -> Tensor:
    """Returns exponentially distributed numbers, given uniform ones, of which 0 would be infinite."""
    return -torch.log(numbers.clamp(min=2.0**-24))
