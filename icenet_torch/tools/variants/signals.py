"""Signals: Fourier transforms, windows and cumulative sums."""

from __future__ import annotations

from typing import Any

import torch

from icenet_torch.tools.variants.variant import Run, Variant, arguments

_FORWARD = frozenset({"fft_rfft", "fft_fft"})
_BACKWARD = frozenset({"fft_irfft", "fft_ifft"})
_WINDOWS = frozenset(f"{name}_window" for name in ("hann", "hamming", "blackman", "bartlett"))


def _of_length(factor: float) -> Run:
    """Returns the variant of Fourier transforms of another length."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "n", "dim", "norm"), args, kwargs)
        x, name = given["input"], str(getattr(func, "__name__", ""))
        size = x.shape[given.get("dim", -1)]
        length = given.get("n") or (2 * (size - 1) if name == "fft_irfft" else size)
        new = int(length * factor)
        return func(**{**given, "n": new}) if new > 1 else NotImplemented

    return run


def _window(is_periodic: bool) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given, rest = dict(kwargs), list(args)
        before = given.pop("periodic", rest.pop(1) if len(rest) > 1 and isinstance(rest[1], bool) else True)
        return NotImplemented if before is is_periodic else func(rest[0], is_periodic, *rest[1:], **given)

    return run


def _padded_by(mode: str) -> Run:
    """Returns the variant of a short-time Fourier transform that pads in another mode."""
    names = ("input", "n_fft", "hop_length", "win_length", "window", "center", "pad_mode")

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments((*names, "normalized", "onesided", "return_complex"), args, kwargs)
        is_same = not given.get("center", True) or given.get("pad_mode", "reflect") == mode
        return NotImplemented if is_same else func(**{**given, "pad_mode": mode})

    return run


def _exclusive(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "dim"), args, kwargs)
    y = func(*args, **kwargs)
    return y - given["input"].to(y.dtype)


def _backwards(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "dim"), args, kwargs)
    dim = given.get("dim", -1)
    return func(given["input"].flip(dim), dim).flip(dim)


def _log_of(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    return getattr(torch, "log10" if func.__name__ == "log" else "log")(x)


VARIANTS: list[Variant] = [
    Variant(
        "the Fourier transform is half as long in a: a product of transforms that are not padded is a circular "
        "convolution",
        _FORWARD | _BACKWARD,
        _of_length(0.5),
    ),
    Variant(
        "the Fourier transform is twice as long in a: a product of transforms that are padded is a linear "
        "convolution, a circular one in b",
        _FORWARD | _BACKWARD,
        _of_length(2),
    ),
    *(
        Variant(f"the ends of the signal are padded with {text} in a", frozenset({"stft"}), _padded_by(mode))
        for mode, text in (
            ("constant", "zeros"),
            ("reflect", "its reflection"),
            ("replicate", "its last value"),
            ("circular", "its other end"),
        )
    ),
    Variant("the window is symmetric in a, periodic in b", _WINDOWS, _window(False)),
    Variant("the window is periodic in a, symmetric in b", _WINDOWS, _window(True)),
    Variant(
        "the cumulative sum leaves out the element itself in a (inclusive=False)", frozenset({"cumsum"}), _exclusive
    ),
    Variant("the cumulative sum runs in the other direction in a (reverse=True)", frozenset({"cumsum"}), _backwards),
    Variant(
        "another base of the logarithm in a, e in place of 10 or the reverse", frozenset({"log", "log10"}), _log_of
    ),
]
