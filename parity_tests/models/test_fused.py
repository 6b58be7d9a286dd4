"""Blocks whose norms, activations and sums are computed by the kernels of their products, on CUDA.

Without a GPU, the tests replace the kernel by separate operations and look at what it is called with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

# isort: split
import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LLAMA, build_model, token_ids

from icenet.core.config import ModelConfig
from icenet.core.generation.request import make_request
from icenet.generation.capture import fuse_kernels as mlx_fuse_kernels
from icenet.models.fused import FusedBlock as MLXFusedBlock
from icenet.models.transformer import TransformerBlock as MLXBlock
from icenet.nn import activation as mlx_activation
from icenet.nn import linear_kernels as mlx_kernels
from icenet.nn.device_limits import Limits
from icenet_torch.generation.capture import fuse_kernels
from icenet_torch.models import fused
from icenet_torch.models.fused import FusedBlock
from icenet_torch.models.transformer import FeedForward, TransformerBlock
from icenet_torch.nn import activation, few_rows

WITHOUT_BIASES: dict[str, Any] = {**LLAMA, "attention_bias": False, "feed_forward_bias": False}
# kernels of a block: queries, keys and values; the output of attention; the first and the second of the network
OPTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({}, 4),
    "llama": (WITHOUT_BIASES, 4),
    "gemma": ({**WITHOUT_BIASES, "norm_position": "sandwich", "norm_offset": True, "query_key_norm": "head"}, 4),
    "post": ({"norm_position": "post", "activation": "relu"}, 4),
    "branch": ({**WITHOUT_BIASES, "norm_position": "branch", "query_key_norm": "all"}, 4),
    "parallel": ({**WITHOUT_BIASES, "parallel_residual": True, "feed_forward": "plain"}, 4),
    "experts": ({**WITHOUT_BIASES, "num_experts": 4}, 2),
}


def build(name: str = "llama", device: str = "cpu", backend: str = "torch", hidden_size: int = 24) -> Any:
    sizes = {"hidden_size": hidden_size, "num_layers": 2, "num_heads": 4, "vocab_size": 61, "max_seq_length": 40}
    values = {"type": "transformer", "dropout": 0.0, **sizes, **OPTIONS[name][0]}
    model = build_model(backend, ModelConfig(**values))
    if backend == "mlx":
        draw = np.random.default_rng(0).standard_normal
        model.set_weights({path: w + 0.3 * draw(w.shape).astype(w.dtype) for path, w in model.weights().items()})
        model.eval()
        return model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases and weights of norms that have an effect
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    return model.to(device)


def decode(model: Any, rows: int = 2, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Returns the greedy tokens `[count, rows]` and their scores `[count, rows, V]`."""
    prompts = [token_ids(1, 3 + row, vocab_size=61, seed=row)[0].tolist() for row in range(rows)]
    request = make_request(model, prompts, None, 0, {"max_new_tokens": count, "temperature": 0.0})
    tokens, scores = [], []
    with model.decoder_type(model, request) as decoder:
        for index in range(count):
            tokens.append(decoder.fetch(decoder.submit(index)))
            scores.append(decoder.fetch_scores()[1].copy())
    return np.stack(tokens), np.stack(scores)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Makes captured steps run in Python with the blocks for them. Returns the layers of the calls of the kernel."""
    found: list[Any] = []

    def separate(layer: Any, x: Any, norm: Any, name: Any, is_gated: bool, residual: Any) -> torch.Tensor:
        found.append(layer)
        assert residual is None or residual.shape == (*x.shape[:-1], layer.weight.shape[0])
        y = F.linear(x if norm is None else norm(x), layer.weight, layer.bias)
        if is_gated:
            gate, up = y.chunk(2, dim=-1)
            return activation(name, gate) * up
        y = y if name is None else activation(name, y)
        return y if residual is None else y + residual

    def capture(decoder: Any, state: Any, token: Any, step: Any = None) -> Any:
        fuse_kernels(decoder.model)
        return step or decoder.decode_step

    monkeypatch.setattr(few_rows, "_fused", separate)
    monkeypatch.setattr(fused, "has_few_rows", lambda x: True)
    monkeypatch.setattr("icenet_torch.generation.decoder.Decoder.capture", capture)
    yield found


def expected(model: Any) -> tuple[np.ndarray, np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "has_few_rows", lambda x: False)
        return decode(model)


def check_equal(model: Any, calls: list[Any], count: int) -> None:
    """The first of 4 tokens comes from the prompt, the other 3 from steps with `count` kernels each."""
    tokens, scores = expected(model)
    assert calls == []
    found_tokens, found = decode(model)
    assert np.array_equal(found_tokens, tokens) and len(calls) == 3 * count
    assert np.abs(found - scores).max() <= 8 * 2.0**-24 * np.abs(scores).max()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fused_block_computes_what_the_block_does(name: str, calls: list[Any]) -> None:
    model = build(name)
    check_equal(model, calls, 2 * OPTIONS[name][1])
    assert all(type(block) is TransformerBlock for block in model.blocks)
    assert all(type(block) is FusedBlock for block in model.for_generation().blocks)


class Twice(FeedForward):
    """A user's network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class OwnBlock(TransformerBlock):
    """A user's block."""

    def forward(self, x: torch.Tensor, *others: Any) -> Any:
        return super().forward(-x, *others)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (lambda block: setattr(block.feed_forward, "__class__", Twice), 6),
        (lambda block: setattr(block, "__class__", OwnBlock), 4),
        (lambda block: setattr(block.attention, "q_proj", torch.nn.Linear(24, 24)), 7),
        (lambda block: setattr(block, "attention_norm", torch.nn.LayerNorm(24)), 7),
        (lambda block: block.attention.register_forward_hook(lambda module, x, y: 2 * y), 6),
        (lambda block: block.attention.out_proj.register_forward_hook(lambda module, x, y: 2 * y), 6),
        (lambda block: block.feed_forward.down_proj.register_forward_pre_hook(lambda module, x: -x[0]), 6),
    ],
    ids=["network", "block", "projection", "norm", "hook of attention", "hook of its output", "hook before"],
)
def test_layers_of_a_user_and_hooks_are_called(change: Any, count: int, calls: list[Any]) -> None:
    model = build()
    before, _ = expected(model)
    change(model.blocks[1])
    model._generation_copy = None  # hooks are seen by a new copy
    assert not np.array_equal(expected(model)[1], before)
    check_equal(model, calls, count)


def test_prompts_and_large_batches_have_separate_operations(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "has_few_rows", lambda x: x.shape[0] * x.shape[1] <= 2)
    model = build()
    decode(model, rows=3)
    assert calls == []
    prepared = model.for_generation()
    assert type(prepared.blocks[0]) is FusedBlock
    prepared(torch.tensor([[5, 6]]))  # without a cache
    prepared(torch.tensor([[5, 6]]), cache=prepared.make_cache())  # a prompt
    assert calls == []


# ---- MLX --------------------------------------------------------------------------------------------------


@pytest.fixture
def mlx_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Makes MLX's captured steps run on the CPU, with separate operations for the kernel.

    Returns whether the weight is packed, for each call of the kernel.
    """
    found: list[bool] = []

    def fused(
        x: Any,
        weight: Any,
        bias: Any = None,
        norm: Any = None,
        name: Any = None,
        is_gated: bool = False,
        residual: Any = None,
        packed: Any = None,
    ) -> Any:
        found.append(packed is not None)
        if norm is not None and norm.joined is not None:  # the kernel reads this array instead
            first = 0 if bias is None else weight.shape[0]
            bias = norm.joined[:first] if first else None
            vectors = mx.split(norm.joined[first:], 1 if norm.bias is None else 2)
            norm = norm._replace(weight=vectors[0], bias=vectors[1] if norm.bias is not None else None)
        if norm is not None and norm.kind == "layer":
            x = mx.fast.layer_norm(x, norm.weight, norm.bias, norm.eps)
        elif norm is not None:
            x = mx.fast.rms_norm(x, norm.weight + (norm.kind == "rms_offset"), norm.eps)
        if packed is not None:
            weight = mx.dequantize(weight, *packed[:2], group_size=packed.group_size, bits=packed.bits)
        y = x @ weight.T if bias is None else x @ weight.T + bias
        if is_gated:
            gate, up = mx.split(y, 2, axis=-1)
            return mlx_activation(name, gate) * up
        y = y if name is None else mlx_activation(name, y)
        assert residual is None or residual.shape == y.shape
        return y if residual is None else y + residual

    def capture(decoder: Any, state: Any, token: Any, step: Any = None) -> Any:
        mlx_fuse_kernels(decoder.model)
        return step or decoder.decode_step

    monkeypatch.setattr(mlx_kernels, "fused_linear", fused)
    monkeypatch.setattr(mlx_kernels, "limits", lambda: Limits(4, 1 << 18))
    monkeypatch.setattr("icenet.nn.linear.on_cpu", lambda: False)  # a CPU has products of its own
    monkeypatch.setattr("icenet.generation.decoder.Decoder.capture", capture)
    return found


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_fused_block_of_mlx_computes_what_the_block_does(
    name: str, bits: int, mlx_calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, backend="mlx", hidden_size=64)
    if bits:
        mlx_nn.quantize(model, group_size=32, bits=bits)
    with monkeypatch.context() as patch:
        patch.setattr(mlx_kernels, "limits", lambda: None)
        tokens, scores = decode(model)
    assert mlx_calls == []
    found_tokens, found = decode(model)
    routers = 3 * 2 * (name == "experts")  # of the steps; they are not quantized
    products = 3 * 2 * OPTIONS[name][1] + 4  # with the logits after the prompt and after each step
    assert len(mlx_calls) == products + routers and sum(mlx_calls) == (products if bits else 0)
    assert np.array_equal(found_tokens, tokens)
    assert np.abs(found - scores).max() <= 2.0**-18 * np.abs(scores).max()  # sums of another order
    assert all(type(block) is MLXFusedBlock for block in model.for_generation().blocks)
    assert all(type(block) is MLXBlock for block in model.blocks)


def test_blocks_of_mlx_share_a_network_but_not_its_norm(
    mlx_calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("default", backend="mlx", hidden_size=64)
    model.blocks[1].feed_forward = model.blocks[0].feed_forward
    with monkeypatch.context() as patch:
        patch.setattr(mlx_kernels, "limits", lambda: None)
        _, scores = decode(model)
    _, found = decode(model)
    assert mlx_calls and np.abs(found - scores).max() <= 2.0**-18 * np.abs(scores).max()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_captured_steps_of_mlx_with_fused_blocks(
    name: str, rows: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not mx.cuda.is_available():
        pytest.skip("needs CUDA")
    model = build(name, backend="mlx", hidden_size=64)
    if bits:
        mlx_nn.quantize(model, group_size=32, bits=bits)
    found_tokens, found = decode(model, rows, 20)
    assert all(type(block) is MLXFusedBlock for block in model.for_generation().blocks)
    monkeypatch.setattr(mlx_kernels, "limits", lambda: None)
    tokens, scores = decode(model, rows, 20)
    assert np.array_equal(found_tokens, tokens)
    assert np.abs(found - scores).max() <= 2.0**-16 * np.abs(scores).max()


# ---- the kernel of PyTorch --------------------------------------------------------------------------------

# rows, outputs, inputs, dtype, norm, bias, activation, gated, residual
CASES = [
    (1, 40, 24, torch.float32, "layer", True, "gelu", False, True),
    (3, 33, 77, torch.float32, "layer without bias", False, "gelu_tanh", True, False),
    (1, 3, 4100, torch.float32, "rms", False, "silu", True, True),
    (4, 33, 100, torch.float16, "rms_offset", True, "relu", True, True),
    (2, 7, 4100, torch.float16, None, True, None, False, True),
    (2, 200, 100, torch.float32, "rms", False, "relu", True, False),
]


@pytest.fixture
def kernel(triton_device: str) -> Any:
    """Returns the module of the kernel and the device."""
    from icenet_torch.nn import linear_kernels

    return linear_kernels, triton_device


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_kernel_rounds_as_separate_operations(case: Any, kernel: Any) -> None:
    """Its error against float64 is that of the operations, each of which rounds its result."""
    rows, outputs, size, dtype, kind, has_bias, name, is_gated, has_residual = case
    kernels, device = kernel
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight = draw(rows, size) + 1.5, draw((2 if is_gated else 1) * outputs, size) / size**0.5
    bias = draw(len(weight)) if has_bias else None
    norm_weight, norm_bias = draw(size), draw(size) if kind == "layer" else None
    residual = draw(rows, outputs) if has_residual else None

    def separate(compute: torch.dtype, rounded: torch.dtype) -> torch.Tensor:
        def cast(a: torch.Tensor | None) -> Any:
            return None if a is None else a.to(rounded).to(compute)

        y = cast(x)
        if kind is not None and kind.startswith("layer"):
            y = cast(F.layer_norm(y, (size,), cast(norm_weight), cast(norm_bias)))
        elif kind is not None:
            y = cast(F.rms_norm(y, (size,), cast(norm_weight) + (kind == "rms_offset"), 1e-5))
        y = cast(F.linear(y, cast(weight), cast(bias)))
        if is_gated:
            gate, up = y.chunk(2, dim=-1)
            y = cast(cast(activation(name, gate)) * up)
        elif name is not None:
            y = cast(activation(name, y))
        return y if residual is None else cast(y + cast(residual))

    def move(a: torch.Tensor | None) -> Any:
        return None if a is None else a.to(device)

    norm = None
    if kind is not None:
        norm = kernels.Norm(kind.partition(" ")[0], move(norm_weight), move(norm_bias), 1e-5)
    found = kernels.fused_linear(move(x), move(weight), move(bias), norm, name, is_gated, move(residual))
    exact, plain = separate(torch.float64, torch.float64), separate(torch.float32, dtype)
    error, noise = ((a.cpu().double() - exact).abs().max() for a in (found, plain))
    assert error <= 2 * noise + 8 * 2.0**-24 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [1, 2])
def test_captured_steps_with_fused_blocks(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, "cuda")
    found_tokens, found = decode(model, rows, 20)
    assert all(type(block) is FusedBlock for block in model.for_generation().blocks)
    monkeypatch.setattr(fused, "has_few_rows", lambda x: False)
    tokens, scores = decode(model, rows, 20)
    assert np.array_equal(found_tokens, tokens)
    assert np.abs(found - scores).max() <= 2.0**-16 * np.abs(scores).max()
