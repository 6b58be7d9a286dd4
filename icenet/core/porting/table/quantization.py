"""Rounding to the numbers of a quantization, for training that knows of it."""

from __future__ import annotations

from icenet.core.porting.table.base import Operation, entry


@entry("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine")
def fake_quantize(n: Operation) -> str:
    scale = n["scale"] if n.tensor("scale") is not None else f"mx.array({n['scale']})"
    given = n["self"], scale, n["zero_point"], n["quant_min"], n["quant_max"]
    return n.call("fake_quantize", *given, *([n["axis"]] if "axis" in n.args else []))
