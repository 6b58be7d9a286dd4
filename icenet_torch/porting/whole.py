"""Functions that torch cannot export as one operation.

`istft` reads values, `grouped_mm` takes bfloat16 only, and `fake_quantize` has no open sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

_library = torch.library.Library("icenet_whole", "DEF")
_library.define(
    "istft(Tensor self, int n_fft, int hop_length, int win_length, Tensor? window, bool center, bool normalized, "
    "bool onesided, SymInt? length, bool return_complex) -> Tensor"
)
_library.define("grouped_mm(Tensor self, Tensor mat2, Tensor offs) -> Tensor")
_istft = torch.istft
_grouped_mm: Any = getattr(F, "grouped_mm", None)  # torch 2.10 and later


def _shape(
    self: torch.Tensor,
    n_fft: int,
    hop_length: int,
    win_length: int,
    window: Any,
    center: bool,
    normalized: bool,
    onesided: bool,
    length: Any,
    return_complex: bool,
) -> torch.Tensor:
    size = n_fft + hop_length * (self.shape[-1] - 1) - (n_fft // 2 * 2 if center else 0)
    dtype = self.dtype if return_complex else self.dtype.to_real()
    return self.new_empty((*self.shape[:-2], size if length is None else length), dtype=dtype)


_library.impl("istft", lambda *args: _istft(*args), "CompositeExplicitAutograd")
torch.library.register_fake("icenet_whole::istft", _shape, lib=_library)


def _grouped_shape(self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return self.new_empty((self.shape[0], mat2.shape[-1]))


_library.impl("grouped_mm", lambda a, b, offs: _grouped_mm(a, b, offs=offs), "CompositeExplicitAutograd")
torch.library.register_fake("icenet_whole::grouped_mm", _grouped_shape, lib=_library)

_QUANTIZERS = {
    "fake_quantize_per_tensor_affine": "float scale, int zero_point",
    "fake_quantize_per_channel_affine": "Tensor scale, Tensor zero_point, int axis",
}
_quantizers: dict[str, Any] = {name: getattr(torch, name) for name in _QUANTIZERS}
for _name, _given in _QUANTIZERS.items():
    _library.define(f"{_name}(Tensor self, {_given}, int quant_min, int quant_max) -> Tensor")
    _library.impl(_name, _quantizers[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"icenet_whole::{_name}", lambda self, *_: torch.empty_like(self), lib=_library)


def _quantizer(name: str) -> Any:
    whole = getattr(torch.ops.icenet_whole, name)

    def call(input: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        is_plain = bool(args) and not options and isinstance(args[0], torch.Tensor) == ("channel" in name)
        made: torch.Tensor = (whole if is_plain else _quantizers[name])(input, *args, **options)
        return made

    return call


@contextlib.contextmanager
def whole_functions() -> Iterator[None]:
    """Makes each of them one operation while the context is open."""
    method = torch.Tensor.istft

    def whole(
        input: torch.Tensor,
        n_fft: int,
        hop_length: int | None = None,
        win_length: int | None = None,
        window: torch.Tensor | None = None,
        center: bool = True,
        normalized: bool = False,
        onesided: bool | None = None,
        length: Any = None,
        return_complex: bool = False,
    ) -> torch.Tensor:
        hop = n_fft // 4 if hop_length is None else hop_length
        is_half = input.shape[-2] != n_fft if onesided is None else onesided
        size = n_fft if win_length is None else win_length
        options = (window, center, normalized, is_half, length, return_complex)
        made: torch.Tensor = torch.ops.icenet_whole.istft(input, n_fft, hop, size, *options)
        return made

    def grouped(
        mat_a: torch.Tensor, mat_b: torch.Tensor, *, offs: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        is_plain = (mat_a.ndim, mat_b.ndim) == (2, 3) and all(item is None for item in options.values())
        if not is_plain or offs is None:
            return _grouped_mm(mat_a, mat_b, offs=offs, **options)
        made: torch.Tensor = torch.ops.icenet_whole.grouped_mm(mat_a, mat_b, offs)
        return made

    torch.istft = torch.Tensor.istft = whole  # type: ignore[assignment, method-assign]
    if _grouped_mm is not None:
        F.grouped_mm = grouped  # type: ignore[assignment]
    for name in _QUANTIZERS:
        setattr(torch, name, _quantizer(name))
    try:
        yield
    finally:
        for name, function in _quantizers.items():
            setattr(torch, name, function)
        torch.istft, torch.Tensor.istft = _istft, method  # type: ignore[method-assign]
        if _grouped_mm is not None:
            F.grouped_mm = _grouped_mm
