"""Products of layers that generate on a CPU, against float64, on both backends."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from icenet import nn as mlx_ops
from icenet.core.config import TransformerConfig
from icenet.core.host import blas
from icenet.models import TransformerModel as MLXTransformerModel
from icenet.nn import cpu_products as mlx_products
from icenet.nn.linear import linear as mlx_linear
from icenet_torch.models import TransformerModel
from icenet_torch.nn import Linear, cpu_products
from icenet_torch.nn.linear import linear


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions are tested on each processor that has them, not only where they are faster."""
    monkeypatch.setattr(cpu_products, "IS_FASTER", cpu_products.HAS_FUNCTIONS)
    monkeypatch.setattr(mlx_products, "_is_faster", lambda: True)
    monkeypatch.setattr(blas, "num_threads", lambda: 2)
    torch.manual_seed(0)


def generating(inputs: int, outputs: int, bias: bool) -> Any:
    """Returns a layer with random weights, prepared for generation."""
    layer = Linear(inputs, outputs, bias)
    generator = torch.Generator().manual_seed(0)
    for array in layer.parameters():
        array.data = torch.randn(array.shape, generator=generator)
    layer.prepare_generation(layer, torch.float32)
    return layer


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("outputs", [1024, 1031, 1234, 2057])  # 1031 is prime, 1234 is 2 x 617, 2057 is 187 x 11
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_float64(rows: int, outputs: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, product = [], cpu_products.product
    monkeypatch.setattr(cpu_products, "product", lambda *inputs: calls.append(1) or product(*inputs))
    layer = generating(512, outputs, bias)
    x = torch.randn((rows, 1, 512), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = layer(x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        separate = F.linear(x, layer.weight, layer.bias)
    error, noise = ((array.double() - exact).abs().max() for array in (y, separate))
    assert y.shape == (rows, 1, outputs) and y.dtype == torch.float32
    assert error <= 8 * noise
    assert len(calls) == cpu_products.HAS_FUNCTIONS


@pytest.mark.parametrize("rows", [1, 3])
def test_views_are_read_in_their_own_order(rows: int) -> None:
    x, weight, bias = torch.randn(rows, 1024)[:, ::2], torch.randn(2048, 512)[1024:], torch.randn(2048)[::2]
    with torch.no_grad():
        assert cpu_products.can_compute(x, weight) == cpu_products.HAS_FUNCTIONS
        found = linear(x, weight, bias, generates=True)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert (found - exact).abs().max() <= 8 * (F.linear(x, weight, bias) - exact).abs().max()


def test_other_products_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights, other dtypes, sizes and modes, a transposed weight, a backward pass, and oneDNN switched off."""
    x, weight = torch.randn(1, 512), torch.randn(1024, 512)
    assert not cpu_products.can_compute(x, weight)  # gradients
    with torch.no_grad():
        assert cpu_products.can_compute(x, weight) == cpu_products.HAS_FUNCTIONS
        assert not cpu_products.can_compute(x, weight[:100])
        assert not cpu_products.can_compute(x.double(), weight.double())
        assert not cpu_products.can_compute(x, torch.randn(512, 1024).T)
        assert not cpu_products.can_compute(x[:0], weight)
        assert not cpu_products.can_compute(torch.randn(4, 256), weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert not cpu_products.can_compute(x, weight)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not cpu_products.can_compute(x, weight)
        monkeypatch.setattr(cpu_products, "IS_FASTER", False)  # such as on Intel
        assert not cpu_products.can_compute(x, weight)


@pytest.mark.parametrize("rows", [1, 8])
def test_the_same_tokens_are_generated(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"vocab_size": 1040, "hidden_size": 256, "num_layers": 2, "num_heads": 4, "max_seq_length": 32}
    model = TransformerModel(TransformerConfig(**options), seed=3)
    prompts = np.arange(6 * rows).reshape(rows, 6) * 7 % 1040
    found = model.generate(prompts, max_new_tokens=8, temperature=0.0, ignore_eos=True)
    monkeypatch.setattr(cpu_products, "can_compute", lambda x, weight: False)
    assert np.array_equal(found, model.generate(prompts, max_new_tokens=8, temperature=0.0, ignore_eos=True))


@pytest.mark.parametrize(("rows", "inputs"), [(1, 512), (1, 4096), (2, 512), (3, 577), (4, 1536)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_mlx_is_that_of_float64(
    rows: int, inputs: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, product = [], mlx_products.product
    monkeypatch.setattr(mlx_products, "product", lambda *given: calls.append(1) or product(*given))
    with mx.stream(mx.cpu):
        layer: Any = mlx_ops.Linear(inputs, 1031, bias)
        layer.weight, x = (
            mx.random.normal(shape, key=mx.random.key(0)) for shape in ((1031, inputs), (rows, 1, inputs))
        )
        layer.prepare_generation(layer, mx.float32)
        y = layer(x)
        separate = np.array(x @ layer.weight.T + layer.get("bias", 0))
    weight = np.array(layer.weight, np.float64)
    exact = np.array(x, np.float64) @ weight.T + np.array(layer.get("bias", 0.0), np.float64)
    error, noise = (np.abs(np.array(array) - exact).max() for array in (y, separate))
    assert y.shape == (rows, 1, 1031) and y.dtype == mx.float32
    assert error <= 8 * noise
    assert len(calls) == 1


def test_other_products_of_mlx_are_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights, other dtypes and sizes, many rows or none, long or odd inputs, and another BLAS or processor."""
    x, weight = mx.zeros((1, 512)), mx.zeros((1024, 512))
    with mx.stream(mx.cpu):
        assert mlx_products.can_compute(x, weight)
        assert not mlx_products.can_compute(x, weight[:100])
        assert not mlx_products.can_compute(x.astype(mx.bfloat16), weight)
        assert not mlx_products.can_compute(mx.zeros((5, 512)), weight)
        assert not mlx_products.can_compute(mx.zeros((0, 512)), weight)
        assert not mlx_products.can_compute(mx.zeros((2, 256)), weight)
        assert not mlx_products.can_compute(mx.zeros((2, 2048)), mx.zeros((1024, 2048)))
        assert not mlx_products.can_compute(mx.zeros((1, 1023)), mx.zeros((1024, 1023)))
        assert mlx_products.can_compute(mx.zeros((1, 2048)), mx.zeros((1024, 2048)))
        monkeypatch.setattr(blas, "num_threads", lambda: 1)
        assert mlx_products.can_compute(mx.zeros((1, 1024)), mx.zeros((1024, 1024)))
        assert not mlx_products.can_compute(x, weight)
        assert not mlx_products.can_compute(mx.zeros((1, 2048)), mx.zeros((1024, 2048)))
        assert mlx_products.can_compute(mx.zeros((2, 512)), weight)
        monkeypatch.setattr(mlx_products, "_is_faster", lambda: False)
        assert not mlx_products.can_compute(x, weight)


@pytest.mark.parametrize("rows", [1, 3])
def test_mlx_generates_the_same_tokens(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"vocab_size": 2080, "hidden_size": 256, "num_layers": 2, "num_heads": 4, "max_seq_length": 32}
    model = MLXTransformerModel(TransformerConfig(**options), seed=3)
    prompts = np.arange(6 * rows).reshape(rows, 6) * 7 % 1040
    found = model.generate(prompts, max_new_tokens=8, temperature=0.0, ignore_eos=True)
    monkeypatch.setattr(mlx_products, "can_compute", lambda x, weight: False)
    assert np.array_equal(found, model.generate(prompts, max_new_tokens=8, temperature=0.0, ignore_eos=True))


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_products_of_half_precision_are_rounded_once(dtype: str, bits: int, bias: bool, rows: int) -> None:
    """On both backends, with a weight that MLX casts a part at a time; its last part is smaller."""
    outputs, inputs = 2049, 1040
    generator = torch.Generator().manual_seed(rows)
    weight, vector, x = (
        torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        for shape in ((outputs, inputs), (outputs,), (rows, 1, inputs))
    )
    exact = F.linear(x.double(), weight.double(), vector.double() if bias else None).numpy()
    with torch.no_grad():
        found = linear(x, weight, vector if bias else None, generates=True)
    with mx.stream(mx.cpu):
        array, matrix, added = (mx.array(a.float().numpy()).astype(getattr(mx, dtype)) for a in (x, weight, vector))
        assert mlx_products.can_compute_half(array, matrix)
        other = mlx_linear(array, matrix, added if bias else None, generates=True)
        assert other.dtype == array.dtype
        values = np.array(other.astype(mx.float32))
    assert found.dtype == x.dtype
    for y in (found.float().numpy(), values):
        assert y.shape == (rows, 1, outputs)
        assert np.all(np.abs(y - exact) <= 2.0**-bits * np.abs(exact) + 1e-5 * np.abs(exact).max())


def test_other_products_of_half_precision_are_cast() -> None:
    """Products with a backward pass, other dtypes, many rows and small weights."""
    x, weight = torch.zeros(1, 1024, dtype=torch.float16), torch.zeros(2048, 1024, dtype=torch.float16)
    assert not cpu_products.can_compute_half(x, weight)  # gradients
    with torch.no_grad():
        assert cpu_products.can_compute_half(x, weight)
        assert not cpu_products.can_compute_half(x, weight.bfloat16())
        assert not cpu_products.can_compute_half(x.expand(5, 1024), weight)
        assert not cpu_products.can_compute_half(x.float(), weight.float())
        with torch.backends.mkldnn.flags(enabled=False):
            assert not cpu_products.can_compute_half(x.bfloat16(), weight.bfloat16())
    half, matrix = mx.zeros((1, 1024), mx.float16), mx.zeros((2048, 1024), mx.float16)
    assert mlx_products.can_compute_half(half, matrix)
    assert not mlx_products.can_compute_half(half, matrix.astype(mx.bfloat16))
    assert not mlx_products.can_compute_half(half, matrix[1:])
    assert not mlx_products.can_compute_half(mx.zeros((17, 1024), mx.float16), matrix)
    assert not mlx_products.can_compute_half(half.astype(mx.float32), matrix.astype(mx.float32))


def assert_greedy(model: Any, found: Any, new_tokens: int) -> None:
    """The last tokens have the largest scores of a whole pass, or scores that differ by roundings.

    Which of two close scores is larger depends on the processor's order of additions.
    """
    tokens = np.array(found.tolist())
    with torch.no_grad():
        scores = model(model._to_native_tokens(tokens[:, :-1]))
    scores = np.array(scores.astype(mx.float32)) if isinstance(scores, mx.array) else scores.float().numpy()
    scores = scores[:, -new_tokens:]
    chosen = np.take_along_axis(scores, tokens[:, -new_tokens:, None], -1)[..., 0]
    assert np.all(scores.max(-1) - chosen <= 2.0**-5 * np.abs(scores).max())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.usefixtures("mlx_on_cpu")  # the products of a CPU
def test_half_precision_generates_the_tokens_of_fp32_products(
    backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"vocab_size": 8200, "hidden_size": 256, "num_layers": 1, "num_heads": 4, "max_seq_length": 32}
    model: Any = (MLXTransformerModel if backend == "mlx" else TransformerModel)(TransformerConfig(**options), seed=3)
    model.set_weight_dtype(dtype)
    model.init_weights(3)
    model.eval()
    products = mlx_products if backend == "mlx" else cpu_products
    monkeypatch.setattr(cpu_products, "_MULTIPLIES_BF16", True)
    can_compute, answers = products.can_compute_half, []
    monkeypatch.setattr(
        products, "can_compute_half", lambda *arrays: answers.append(can_compute(*arrays)) or answers[-1]
    )
    prompts = np.arange(18).reshape(3, 6) * 7 % 1040
    found = model.generate(prompts, max_new_tokens=6, temperature=0.0, ignore_eos=True)
    assert any(answers)
    assert_greedy(model, found, 6)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_fp32_weights_are_cast_once_for_a_request_of_bf16(backend: str) -> None:
    options = {"vocab_size": 97, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_seq_length": 32}
    model: Any = (MLXTransformerModel if backend == "mlx" else TransformerModel)(TransformerConfig(**options), seed=3)
    model.compute_dtype = mx.bfloat16 if backend == "mlx" else torch.bfloat16
    model.eval()
    assert_greedy(model, model.generate([[3, 1, 4, 1, 5]], max_new_tokens=6, temperature=0.0, ignore_eos=True), 6)
    layer, original = model.for_generation().blocks[0].feed_forward.up_proj, model.blocks[0].feed_forward.up_proj
    assert ("bfloat16" in str(layer.weight.dtype)) and ("float32" in str(original.weight.dtype))


@pytest.mark.parametrize(("rows", "inputs"), [(0, 512), (2, 0)])
def test_layers_that_generate_take_empty_arrays(rows: int, inputs: int) -> None:
    bias = np.arange(1024, dtype=np.float32)
    with torch.no_grad():
        layer = generating(inputs, 1024, bias=True)
        layer.bias.copy_(torch.from_numpy(bias))
        found = layer(torch.zeros(rows, inputs)).numpy()
    with mx.stream(mx.cpu):
        other: Any = mlx_ops.Linear(512, 1024)
        other.weight, other.bias = mx.zeros((1024, inputs)), mx.array(bias)
        other.prepare_generation(other, mx.float32)
        both = found, np.array(other(mx.zeros((rows, inputs))))
    assert all(np.array_equal(array, np.tile(bias, (rows, 1))) for array in both)
