"""Convolutions, pools and resizes of images, which have their channels last here."""

from __future__ import annotations

from typing import Any

from icenet.core.porting.record import Tensor
from icenet.core.porting.table.base import Operation, atom, entry, in_floating_point


def _one(n: Operation, value: Any, rank: int) -> str:
    """Returns (3, 3) as 3. Numbers may be sizes of an input."""
    if not isinstance(value, (list, tuple)):
        return n.source(value)
    texts = [n.source(item) for item in value] * (rank if len(value) == 1 else 1)
    return texts[0] if len(set(texts)) == 1 else f"({', '.join(texts)})"


def _batched(n: Operation, rank: int, text: str, name: str = "input") -> tuple[str, str, str]:
    """Returns the input with a batch axis, and what surrounds the result."""
    tensor = n.tensor(name)
    assert tensor is not None
    if tensor.ndim == rank + 1:
        return f"{atom(text)}[None]", "(", ")[0]"
    return text, "", ""


def _spatial(rank: int) -> str:
    return ", ".join(map(str, range(2, 2 + rank)))


@entry("conv1d", "conv2d", "conv3d")
@in_floating_point
def conv(n: Operation) -> str:
    rank = int(n.node.base[4])
    x, before, after = _batched(n, rank, n["input"])
    weight = f"{n.atom('weight')}.transpose(0, {_spatial(rank)}, 1)"
    padding = n.args["padding"]
    kernel = n.tensor("weight").shape[2:]  # type: ignore[union-attr]
    dilation = n.args["dilation"]
    if padding == "valid":
        padding = [0]
    if padding == "same":
        wide = [
            d * (int(k) - 1)
            for d, k in zip(list(dilation) * (rank if len(dilation) == 1 else 1), kernel, strict=True)
        ]
        padding = [size // 2 for size in wide]
        if any(size % 2 for size in wide):
            pads = ", ".join(["(0, 0)", *(f"(0, {size % 2})" for size in wide), "(0, 0)"])
            x = f"mx.pad({x}, [{pads}])"
    # defaults are left out at the end, so that layers of which some have them share a class
    options = [("stride", n.args["stride"]), ("padding", padding), ("dilation", dilation)]
    given = "".join(f", {name}={_one(n, value, rank)}" for name, value in options)
    groups = n.args["groups"]
    given += f", groups={n['groups']}" if groups != 1 else ""
    if rank == 3 and groups != 1:
        text = n.call(
            "grouped_conv3d", x, weight, n["groups"], *(f"{name}={_one(n, value, rank)}" for name, value in options)
        )
    else:
        text = f"mx.conv{rank}d({x}, {weight}{given})"
    if n.args.get("bias") is not None:
        text = f"{text} + {n.atom('bias')}"
    return f"{before}{text}{after}"


@entry("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
@in_floating_point
def conv_transpose(n: Operation) -> str:
    rank = int(n.node.base[14])
    x, before, after = _batched(n, rank, n["input"])
    groups = n.args["groups"]
    options = [
        ("stride", n.args["stride"]),
        ("padding", n.args["padding"]),
        ("dilation", n.args["dilation"]),
        ("output_padding", n.args["output_padding"]),
    ]
    given = "".join(f", {name}={_one(n, value, rank)}" for name, value in options)
    names = ("output_padding", "padding", "dilation")
    wide = [list(n.args[name]) * (rank // len(n.args[name])) for name in names]
    kernel = n.tensor("weight").shape[2:]  # type: ignore[union-attr]
    is_odd = any(
        not all(isinstance(number, int) for number in (more, size, d, k)) or more > size or size > d * (int(k) - 1)
        for more, size, d, k in zip(*wide, kernel, strict=True)
    )
    if groups != 1 or is_odd:
        given += f", groups={n['groups']}" if groups != 1 else ""
        text = n.call("conv_transpose", x, n["weight"], repr(rank) + given)
    else:
        text = f"mx.conv_transpose{rank}d({x}, {n.atom('weight')}.transpose(1, {_spatial(rank)}, 0){given})"
    if n.args.get("bias") is not None:
        text = f"{text} + {n.atom('bias')}"
    return f"{before}{text}{after}"


@entry(*(f"max_pool{rank}d" for rank in (1, 2, 3)), *(f"max_pool{rank}d_with_indices" for rank in (1, 2, 3)))
def max_pool(n: Operation) -> str:
    rank = int(n.node.base[8])
    x, before, after = _batched(n, rank, n["self"], "self")
    stride = n.args["stride"] or n.args["kernel_size"]
    indices = n.node.base.endswith("indices")
    dilation = n.args["dilation"]
    ceil = bool(n.args["ceil_mode"])
    given = [_one(n, n.args["kernel_size"], rank), _one(n, stride, rank), _one(n, n.args["padding"], rank)]
    if indices:
        before, after = ("", "") if not before else ("tuple(part[0] for part in ", ")")
        return (
            before
            + n.call("max_pool_with_indices", x, repr(rank), *given, _one(n, dilation, rank), repr(ceil))
            + after
        )
    keywords = {}
    if _one(n, dilation, rank) != "1":
        keywords["dilation"] = _one(n, dilation, rank)
    if ceil:
        keywords["ceil_mode"] = "True"
    while len(given) > 1 and given[-1] == ("0" if len(given) == 3 else given[0]):
        given.pop()
    return before + n.call("max_pool", x, repr(rank), *given, **keywords) + after


@entry("avg_pool1d", "avg_pool2d", "avg_pool3d")
@in_floating_point
def avg_pool(n: Operation) -> str:
    rank = int(n.node.base[8])
    x, before, after = _batched(n, rank, n["self"], "self")
    stride = n.args["stride"] or n.args["kernel_size"]
    given = [_one(n, n.args["kernel_size"], rank), _one(n, stride, rank), _one(n, n.args["padding"], rank)]
    keywords = {}
    if n.args["ceil_mode"]:
        keywords["ceil_mode"] = "True"
    if not n.args["count_include_pad"] and _one(n, n.args["padding"], rank) != "0":
        keywords["count_include_pad"] = "False"
    if n.args.get("divisor_override"):
        keywords["divisor"] = repr(n.args["divisor_override"])
    return before + n.call("avg_pool", x, repr(rank), *given, **keywords) + after


@entry(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)
def adaptive_pool(n: Operation) -> str:
    name = n.node.base.strip("_")
    rank = int(name[-2])
    size = n.args["output_size"]
    size = [size] * rank if isinstance(size, int) else size
    tensor = n.tensor("self")
    assert tensor is not None
    if "avg" in name and all(item == 1 for item in size):
        first = tensor.ndim - rank - 1
        return f"{n.atom('self')}.mean(axis={_axes(first, rank)}, keepdims=True)"
    x, before, after = _batched(n, rank, n["self"], "self")
    if "max" in name:
        before, after = ("", "") if not before else ("tuple(part[0] for part in ", ")")
        if all(item == 1 for item in size):
            return before + n.call("global_max_pool", x) + after
        return before + n.call("adaptive_max_pool", x, n.source(size)) + after
    return before + n.call("adaptive_avg_pool", x, n.source(size)) + after


@entry("max_unpool2d", "max_unpool3d")
def max_unpool(n: Operation) -> str:
    return n.call("max_unpool", n["self"], n["indices"], n["output_size"])


@entry("max_pool2d_with_indices_backward")
def max_pool_backward(n: Operation) -> str:
    shape = n.tensor("self").shape[-2:]  # type: ignore[union-attr]
    return n.call("max_pool_backward", n["grad_output"], n["indices"], n.source(list(shape)))


@entry("fractional_max_pool2d", "fractional_max_pool3d")
def fractional_max_pool(n: Operation) -> str:
    return n.call("fractional_max_pool", n["self"], n["kernel_size"], n["output_size"], n["random_samples"])


def _axes(first: int, count: int) -> str:
    axes = tuple(range(first, first + count))
    return repr(axes[0]) if count == 1 else repr(axes)


_MODES = {
    "upsample_nearest": "nearest",
    "_upsample_nearest_exact": "nearest_exact",
    "upsample_linear": "linear",
    "upsample_bilinear": "linear",
    "upsample_trilinear": "linear",
    "upsample_bicubic": "cubic",
}


@entry(
    *(f"{kind}{rank}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for rank in (1, 2, 3)),
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
)
def upsample(n: Operation) -> str:
    name = n.node.base
    mode = _MODES[name[:-2]]
    x = n.tensor("input" if "input" in n.args else "self")
    assert isinstance(x, Tensor)
    size, scales = n.args.get("output_size"), n.args.get("scale_factors")
    if scales is None:
        scales = [n.args.get(key) for key in ("scales", "scales_d", "scales_h", "scales_w") if key in n.args]
        scales = None if not scales or None in scales else scales
    key = "input" if "input" in n.args else "self"
    if mode == "nearest" and size is None and scales is not None and all(scale % 1 == 0 for scale in scales):
        text = n[key]
        for axis, scale in enumerate(scales, 1):
            text = f"mx.repeat({text}, {int(scale)}, axis={axis})" if scale != 1 else text
        return text
    keywords = {}
    if size is not None:
        keywords["size"] = n.source(size)
    if scales is not None:
        keywords["scales"] = n.source([float(value) for value in scales])
    if n.args.get("align_corners"):
        keywords["align_corners"] = "True"
    return n.call(f"upsample_{mode}", n[key], **keywords)


@entry("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
def upsample_antialias(n: Operation) -> str:
    key = "input" if "input" in n.args else "self"
    size, scales = n.args.get("output_size"), n.args.get("scale_factors")
    if scales is None and n.args.get("scales_h"):
        scales = [n.args["scales_h"], n.args["scales_w"]]
    return n.call(
        "upsample_antialias",
        n[key],
        n.source(size),
        n.source(scales),
        repr("cubic" if "bicubic" in n.node.base else "linear"),
        repr(bool(n.args["align_corners"])),
    )


@entry("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(n: Operation) -> str:
    factor = n.args.get("upscale_factor", n.args.get("downscale_factor"))
    return n.call(n.node.base, n["self"], repr(factor))


@entry("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(n: Operation) -> str:
    return n.call(
        "grid_sample", n["input"], n["grid"], n["interpolation_mode"], n["padding_mode"], n["align_corners"]
    )


@entry("affine_grid_generator")
def affine_grid(n: Operation) -> str:
    return n.call("affine_grid", n["theta"], n["size"], n["align_corners"])
