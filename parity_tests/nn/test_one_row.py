"""Layers for one row of one token on a CPU, MLX, against float64 and against the layers of training."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
import pytest

from icenet import nn as ops
from icenet.core.config import TransformerConfig
from icenet.models.transformer import TransformerModel
from icenet.nn import one_row


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_one_row_has_the_values_of_the_layer(bias: bool) -> None:
    with mx.stream(mx.cpu):
        layer: Any = ops.Linear(96, 40, bias)
        x = normal(1, 1, 96)
        before = layer(x)
        layer.prepare_generation(layer, mx.float32)
        assert one_row.can_compute(x, layer._row)
        assert layer(x).shape == (1, 1, 40)
        np.testing.assert_allclose(np.array(layer(x)), np.array(before), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms_offset"])
def test_a_norm_of_one_row_is_that_of_float64(kind: str, offset: float) -> None:
    with mx.stream(mx.cpu):
        layer: Any = ops.LayerNorm(770, 1e-3) if kind == "layer" else ops.RMSNorm(770, 1e-3, kind == "rms_offset")
        layer.weight, x = normal(770, seed=1), 0.1 * normal(1, 1, 770, seed=2) + offset
        if kind == "layer":
            layer.bias = normal(770, seed=3)
        before = np.array(layer(x))
        layer.prepare_generation(layer, mx.float32)
        assert one_row.can_compute(x, layer._row)
        found = np.array(layer(x))
    y, weight = np.array(x, np.float64), np.array(layer.weight, np.float64)
    y = y - y.mean() if kind == "layer" else y
    y = y / np.sqrt(np.square(y).mean() + 1e-3) * (weight + 1 if kind == "rms_offset" else weight)
    y = y + np.array(layer.bias, np.float64) if kind == "layer" else y
    assert np.abs(found - y).max() <= 8 * max(np.abs(before - y).max(), 1e-7)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 1, 8), "float32"), ((1, 2, 8), "float32"), ((1, 1, 8), "float16")])
def test_other_inputs_are_not_computed_as_one_row(shape: tuple[int, ...], dtype: str) -> None:
    with mx.stream(mx.cpu):
        layer: Any = ops.LayerNorm(8)
        layer.prepare_generation(layer, mx.float32)
        x = mx.zeros(shape, getattr(mx, dtype))
        assert not one_row.can_compute(x, layer._row)
        assert layer(x).shape == shape and layer(x).dtype == x.dtype
    assert one_row.make_norm(mx.zeros(8, mx.bfloat16), None, 1e-5) is None


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_the_tokens_are_those_without_it_also_after_a_change_in_place(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"vocab_size": 90, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_length": 32}
    with mx.stream(mx.cpu):
        model = TransformerModel(TransformerConfig(type="transformer", norm=norm, **options), seed=3)  # type: ignore[arg-type]
        model.eval()

        def generate() -> Any:
            return model.generate([[3, 1, 4, 1]], max_new_tokens=20, temperature=0.0, ignore_eos=True)

        calls: list[int] = []
        separate = one_row.product
        monkeypatch.setattr(one_row, "product", lambda *given: calls.append(1) or separate(*given))
        first = generate()
        assert calls
        for block in model.blocks:  # one weight that the layers share with the copy, and one of a norm
            block.attention.out_proj.weight *= -3
            block.feed_forward_norm.weight *= -2
        second = generate()
        monkeypatch.setattr(one_row, "can_compute", lambda x, operands: False)
        assert not np.array_equal(first, second)
        assert np.array_equal(second, generate())
