"""Quantized weights in MLX's format: the formula against MLX, and views of packed weights."""

from __future__ import annotations

import json
from typing import Any

import icenet.blas  # noqa: F401  (before mlx.core)

import ml_dtypes
import numpy as np
import pytest
from helpers import is_one_line, same_bits

from icenet.core.errors import IceNetError, UsageError
from icenet.core.weights.packed import KINDS, DequantizedWeights, QuantizedWeights, packed_of
from icenet.core.weights.packing import dequantize, pack, quantize, unpack
from icenet.core.weights.quantization import (
    BITS,
    GROUP_SIZES,
    METADATA,
    Quantization,
    check,
    describe,
    layers_to_quantize,
    metadata_of,
    settings_of,
    stated_settings,
)

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def awkward(dtype: Any) -> np.ndarray:
    """Returns rows of all sizes, some of which have one value, one sign, or almost no range."""
    generator = np.random.default_rng(1)
    rows = generator.standard_normal((12, 256)) * generator.lognormal(0, 3, (12, 1))
    rows[:4] = [[0.0], [1.5], [-2.0], [1e-9]]
    rows[4], rows[5] = np.abs(rows[4]), -np.abs(rows[5])
    rows[6, :70] = 0
    rows[7] *= 1e-6
    return rows.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_the_formula_has_the_bits_of_mlx(bits: int, dtype: str) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = awkward(DTYPES[dtype])
    native = mx.array(weight.astype(np.float32)).astype(getattr(mx, dtype))
    for size in GROUP_SIZES:
        with mx.stream(mx.cpu):
            parts = mx.quantize(native, size, bits)
            theirs = [np.array(parts[0]), *(np.array(part.astype(mx.float32)) for part in parts[1:])]
        ours = quantize(weight, Quantization(bits, size))
        assert ours[1].dtype == ours[2].dtype == weight.dtype
        floats = [part.astype(np.float32) for part in ours[1:]]
        for mine, other in zip([ours[0], *floats], theirs, strict=True):
            assert mine.shape == other.shape and mine.tobytes() == other.tobytes()


def test_a_large_weight_is_quantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((3, 16, 64)).astype(np.float32)
    whole = quantize(weight, Quantization(4, 32))
    monkeypatch.setattr("icenet.core.weights.packing._CHUNK_VALUES", 96)
    parts = quantize(weight, Quantization(4, 32))
    assert same_bits(dict(zip(KINDS, parts, strict=True)), dict(zip(KINDS, whole, strict=True)))
    values, again = np.empty_like(weight), np.empty_like(weight)
    dequantize(parts, Quantization(4, 32), values)
    monkeypatch.undo()
    dequantize(parts, Quantization(4, 32), again)
    np.testing.assert_array_equal(values, again)
    errors = np.abs(values - weight).reshape(*whole[1].shape, 32)  # half a step, or a whole one at the far end
    assert (errors <= np.abs(whole[1])[..., None]).all() and np.median(errors / np.abs(whole[1])[..., None]) < 0.3


@pytest.mark.parametrize("bits", BITS)
def test_numbers_are_packed(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (3, 96)).astype(np.uint8)
    words = pack(values, bits)
    stream = (values[..., None].astype(np.uint64) >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    expected = (stream.reshape(3, -1, 32) << np.arange(32, dtype=np.uint64)).sum(-1)
    assert words.dtype == np.uint32 and np.array_equal(words, expected)
    assert np.array_equal(unpack(words, bits), values)


def test_views_of_packed_weights() -> None:
    generator = np.random.default_rng(1)
    weights = {
        "a.weight": generator.standard_normal((4, 64)).astype(ml_dtypes.bfloat16),
        "a.bias": np.ones(4, np.float32),
        "b.weight": generator.standard_normal((2, 3, 32)),
        "c.weight": np.ones((2, 2), np.float32),
    }
    layers = {"a": Quantization(4, 64), "b": Quantization(8, 32)}
    packed = QuantizedWeights(weights, layers)
    assert set(packed) == {*weights, "a.scales", "a.biases", "b.scales", "b.biases"} and len(packed) == 8
    assert "b.scales" in packed and "c.scales" not in packed and "c.weight" in packed
    assert packed["b.scales"].dtype == np.float32 and packed["a.weight"].dtype == np.uint32
    found = DequantizedWeights(packed, {"key": "value"})
    assert list(found) == list(weights) and packed_of(found) is packed and found.metadata == {"key": "value"}
    exact = DequantizedWeights(packed, dtype=np.float32, kept=["b"])
    assert set(exact) == {*weights, "b.scales", "b.biases"} and exact["b.weight"].dtype == np.uint32
    for view in (packed, found, exact):
        for name in view:
            assert (view[name].dtype, view[name].shape) == view.spec(name)
    whole = unpack(packed["a.weight"], 4).astype(np.float64)
    value = whole * packed["a.scales"].astype(np.float64) + packed["a.biases"].astype(np.float64)
    np.testing.assert_allclose(exact["a.weight"], value, rtol=1e-6, atol=1e-7)
    assert found["a.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(found["a.weight"].astype(np.float64), value, rtol=0.01, atol=0.02)


def test_settings_are_those_of_mlx_lm() -> None:
    layers = {"a": Quantization(4, 64), "b": Quantization(4, 64), "c": Quantization(8, 32)}
    settings = settings_of(layers)
    assert settings == {"group_size": 64, "bits": 4, "mode": "affine", "c": {"group_size": 32, "bits": 8}}
    assert stated_settings(metadata_of(layers), "model") == settings
    assert metadata_of({}) == {} and stated_settings({}, "model") is None
    assert describe(layers) == "2 layers have 4 bits in groups of 64, 1 layer has 8 bits in groups of 32"
    for damaged in ("{", json.dumps([4])):
        with pytest.raises(IceNetError) as error:
            stated_settings({METADATA: damaged}, "model")
        assert is_one_line(str(error.value), "model", METADATA)


def test_layers_of_other_widths_are_left_out() -> None:
    shapes = {"a": (8, 64), "b": (64, 48), "c": (3, 8, 128)}
    layers, others = layers_to_quantize(shapes, Quantization(4, 64))
    assert list(layers) == ["a", "c"] and others == ["b"]
    with pytest.raises(UsageError) as error:
        layers_to_quantize({"b": (64, 48)}, Quantization(4, 32))
    assert is_one_line(str(error.value), "group_size 32", "48")
    for bits, size in ((7, 64), (True, 64), (4, 48), ("4", 64)):
        with pytest.raises(UsageError) as error:
            check(bits, size)  # type: ignore[arg-type]
        assert is_one_line(str(error.value), "one of")
