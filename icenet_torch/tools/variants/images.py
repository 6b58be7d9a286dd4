"""Operations on images: resizing, padding and pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

from icenet_torch.tools.variants.variant import Run, Variant, arguments, name_of

_RESIZE = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


def _aligned(align_corners: bool) -> Run:
    """Returns the variant of interpolate with the other meaning of the corners."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(_RESIZE, args, kwargs)
        has_corners = given.get("mode", "nearest") not in ("nearest", "nearest-exact", "area")
        if not has_corners or bool(given.get("align_corners")) is align_corners:
            return NotImplemented
        return func(**{**given, "align_corners": align_corners})

    return run


def _interpolated(mode: str) -> Run:
    """Returns the variant of interpolate in another mode; linear stands for that of each number of axes."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(_RESIZE, args, kwargs)
        linear = {3: "linear", 4: "bilinear", 5: "trilinear"}[given["input"].ndim]
        new = linear if mode == "linear" else mode
        if new == given.get("mode", "nearest"):
            return NotImplemented
        changed = {"mode": new, "align_corners": None if new == "nearest" else False, "antialias": False}
        return func(**{**given, **changed})

    return run


def _tiled(func: Any, args: Any, kwargs: Any) -> Any:
    """Repeats the whole image in place of each pixel."""
    given = arguments(_RESIZE, args, kwargs)
    x, y = given["input"], func(*args, **kwargs)
    sizes = [new // old for new, old in zip(y.shape, x.shape, strict=True)]
    fits = tuple(size * old for size, old in zip(sizes, x.shape, strict=True)) == tuple(y.shape)
    return x.repeat(sizes) if fits and given.get("mode", "nearest") == "nearest" else NotImplemented


def _aliased(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(_RESIZE, args, kwargs)
    return func(**{**given, "antialias": False}) if given.get("antialias") else NotImplemented


def _sampled(option: str, value: Any) -> Run:
    """Returns the variant of grid_sample with another option."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(("input", "grid", "mode", "padding_mode", "align_corners"), args, kwargs)
        return NotImplemented if given.get(option) == value else func(**{**given, option: value})

    return run


def _grid_exchanged(func: Any, args: Any, kwargs: Any) -> Any:
    given = arguments(("input", "grid", "mode", "padding_mode", "align_corners"), args, kwargs)
    return func(**{**given, "grid": given["grid"].flip(-1)})


def _channels_shuffled(func: Any, args: Any, kwargs: Any) -> Any:
    """Takes the channels of a pixel shuffle in the order [r, r, C] in place of [C, r, r]."""
    given = arguments(("input", "upscale_factor"), args, kwargs)
    x, size = given["input"], given["upscale_factor"]
    parts = x.unflatten(1, (size * size, -1)).transpose(1, 2)
    return func(parts.reshape(x.shape), size)


_PAD = ("input", "pad", "mode", "value")


def _padded(mode: str) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(_PAD, args, kwargs)
        if given.get("mode", "constant") == mode:
            return NotImplemented
        return func(given["input"], given["pad"], mode=mode)

    return run


def _padded_at(change: Callable[[list[int]], list[int]]) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(_PAD, args, kwargs)
        given["pad"] = change(list(given["pad"]))
        return func(**given)

    return run


def _conv_padded(mode: str) -> Run:
    """Returns the variant of a convolution whose padding is not zeros."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        given = arguments(names, args, kwargs)
        padding = given.get("padding", 0)
        axes = given["input"].ndim - 2
        sizes = [padding] * axes if isinstance(padding, int) else list(padding)
        if isinstance(padding, str) or not any(sizes):
            return NotImplemented
        pad = [size for item in reversed(sizes) for size in (item, item)]
        given["input"], given["padding"] = F.pad(given["input"], pad, mode=mode), 0
        return func(**given)

    return run


def _pooled(kind: str) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "kernel_size", "stride", "padding")  # what both kinds have
        given = arguments(names, args, {k: v for k, v in kwargs.items() if k in names})
        axes = next(int(c) for c in name_of(func) if c.isdigit())
        return getattr(F, f"{kind}_pool{axes}d")(**given)

    return run


def _adaptive(kind: str) -> Run:
    """Returns the variant of an adaptive pooling of the other kind."""

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        axes = next(int(c) for c in name_of(func) if c.isdigit())
        given = arguments(("input", "output_size"), args, kwargs)
        return getattr(F, f"adaptive_{kind}_pool{axes}d")(given["input"], given["output_size"])

    return run


def _padded_count(counts: bool) -> Run:
    def run(func: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        given = arguments(names, args, kwargs)
        if bool(given.get("count_include_pad", True)) is counts:
            return NotImplemented
        return func(**{**given, "count_include_pad": counts})

    return run


_CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
_POOLS = frozenset({"max_pool1d", "max_pool2d", "max_pool3d", "boolean_dispatch", "fn"})
"""The last two are names of the functions that PyTorch calls."""
_AVERAGES = frozenset({"avg_pool1d", "avg_pool2d", "avg_pool3d"})


def _flattened_channels_last(func: Any, args: Any, kwargs: Any) -> Any:
    x, y = args[0] if args else kwargs["input"], func(*args, **kwargs)
    is_flat = x.ndim > 2 and y.ndim == 2 and len(x) == len(y) and x.shape[1] > 1
    return x.movedim(1, -1).reshape(y.shape) if is_flat else NotImplemented


_SAMPLES = frozenset({"grid_sample"})

VARIANTS: list[Variant] = [
    Variant(
        "flattened channels last: write mx.moveaxis(x, -1, 1).flatten(1) in MLX",
        frozenset({"flatten", "reshape", "view"}),
        _flattened_channels_last,
    ),
    *(
        Variant(
            f"align_corners is {flag} in a, {not flag} in b",
            frozenset({"interpolate", "upsample"}),
            _aligned(flag),
        )
        for flag in (True, False)
    ),
    *(
        Variant(f"{option} of grid_sample is {value} in a, another in b", _SAMPLES, _sampled(option, value))
        for option, values in (
            ("align_corners", (True, False)),
            ("padding_mode", ("zeros", "border", "reflection")),
            ("mode", ("bilinear", "nearest")),
        )
        for value in values
    ),
    Variant(
        "the image is repeated as a whole (tile) in a, each pixel (repeat) in b", frozenset({"interpolate"}), _tiled
    ),
    Variant("x and y of the grid of grid_sample are exchanged in a", _SAMPLES, _grid_exchanged),
    Variant(
        "the channels of pixel_shuffle are [r, r, C] in a, [C, r, r] in b",
        frozenset({"pixel_shuffle"}),
        _channels_shuffled,
    ),
    Variant("resizing without antialiasing in a", frozenset({"interpolate"}), _aliased),
    *(
        Variant(f"interpolation mode {mode} in a, another in b", frozenset({"interpolate"}), _interpolated(mode))
        for mode in ("nearest", "linear", "bicubic")
    ),
    *(
        Variant(f"padding mode {mode} in a, another in b", frozenset({"pad"}), _padded(mode))
        for mode in ("constant", "reflect", "replicate", "circular")
    ),
    Variant(
        "padding on the other side in a",
        frozenset({"pad"}),
        _padded_at(lambda pad: [p for i in range(0, len(pad), 2) for p in (pad[i + 1], pad[i])]),
    ),
    Variant(
        "padding in equal parts on both sides in a",
        frozenset({"pad"}),
        _padded_at(lambda pad: [(pad[i] + pad[i + 1]) // 2 for i in range(0, len(pad), 2) for _ in range(2)]),
    ),
    *(
        Variant(f"padding mode {mode} in a, zeros in b", _CONVS, _conv_padded(mode))
        for mode in ("reflect", "replicate", "circular")
    ),
    Variant("average pooling in a, maximum in b", _POOLS, _pooled("avg")),
    Variant("maximum pooling in a, average in b", _AVERAGES, _pooled("max")),
    *(
        Variant(f"{text} pooling in a, {other} in b", frozenset(f"adaptive_{of}_pool{n}d" for n in (1, 2, 3)), run)
        for kind, of, text, other in (("max", "avg", "maximum", "average"), ("avg", "max", "average", "maximum"))
        for run in (_adaptive(kind),)
    ),
    *(
        Variant(
            f"average pooling {'counts' if counts else 'does not count'} the padding in a (count_include_pad)",
            _AVERAGES,
            _padded_count(counts),
        )
        for counts in (True, False)
    ),
]
