"""Reading a prompt: on a GPU in fewer kernels and before the whole graph is made, with the same results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import icenet.blas  # before mlx: it decides which BLAS MLX finds

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import LLAMA, both_backends, native, plain, token_ids

import icenet
from icenet.core import backends
from icenet.core.config import Config, GenerationConfig
from icenet.core.generation.request import make_request
from icenet.nn import activations, attention, scheduling
from icenet_torch.nn.attention import rotate

MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "llama": LLAMA,
    "interleaved": {"positions": "rotary", "rotary_pairs": "interleaved", "rotary_fraction": 0.5},
    "windows": {"positions": "rotary", "sliding_window": 5, "layer_types": ["sliding", "full"]},
}


def build(backend: str, values: dict[str, Any], device: str = "cpu") -> Any:
    model = icenet.build(
        Config(
            model={
                "type": "transformer",
                "hidden_size": 64,
                "num_heads": 4,
                "num_layers": 2,
                "vocab_size": 97,
                "max_seq_length": 700,
                "dropout": 0.0,
                **values,
            }
        ),
        backend=backend,
        device=device,
    )
    model.eval()
    return model


def read(model: Any, tokens: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Returns the logits of the last position of a prompt that is read in pieces."""
    ids, cache, start = native(model.backend, tokens), model.make_cache(), 0
    ids = ids.to(model.device) if model.backend == "torch" else ids
    with torch.no_grad(), model.arithmetic():
        for size in pieces:
            hidden = model.hidden_states(ids[:, start : start + size], None, cache)
            start += size
        logits = model.project(hidden[:, -1])
        return plain(logits.float() if model.backend == "torch" else logits.astype(mx.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)
@both_backends
def test_a_prompt_on_a_gpu_has_the_logits_of_the_cpu(backend: str, values: dict[str, Any]) -> None:
    tokens = token_ids(3, 600, vocab_size=97)
    expected = read(build(backend, values), tokens, [600])
    on_gpu = build(backend, values, "gpu" if backend == "mlx" else "cuda")
    for pieces in ([600], [513, 80, 6, 1]):
        assert np.abs(read(on_gpu, tokens, pieces) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.gpu
@both_backends
def test_pieces_in_half_precision_attend_to_the_columns_before(backend: str) -> None:
    """The flash kernel of PyTorch aligns its causal mask to the end, here of 80 queries and 593 keys."""
    tokens = token_ids(2, 593, vocab_size=97)
    model = build(backend, MODELS["llama"], "gpu" if backend == "mlx" else "cuda")
    exact = read(model, tokens, [593])
    half = build(backend, MODELS["llama"], "gpu" if backend == "mlx" else "cuda")
    values = half.weights()
    half.set_weight_dtype("bf16")
    half.set_weights(values)
    noise = np.abs(read(half, tokens, [593]) - exact).max()
    assert np.abs(read(half, tokens, [513, 80]) - exact).max() <= 4 * noise


@pytest.fixture
def kernel(triton_device: str) -> Any:
    """Returns the module of the kernel and the device."""
    from icenet_torch.nn import kernels

    return kernels, triton_device


ROTATIONS = [
    # batch, heads, tokens, size, rotated values, pairs, angles for each row
    (1, 4, 5, 16, 16, "half", False),
    (2, 3, 4, 20, 8, "half", True),
    (2, 6, 3, 24, 24, "interleaved", False),
    (1, 2, 3, 80, 12, "interleaved", True),
]


def draw_rotation(case: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a part of joined projections, `[B, H, T, E]`, and angles."""
    batch, heads, tokens, size, rotated, _, per_row = case
    generator = torch.Generator().manual_seed(0)
    joined = torch.randn(batch, tokens, 3 * heads * size, generator=generator)
    x = joined[..., heads * size : 2 * heads * size].reshape(batch, tokens, heads, size).transpose(1, 2)
    shape = (batch, 1, tokens, rotated // 2) if per_row else (tokens, rotated // 2)
    turned = 6 * torch.rand(shape, generator=generator)
    return x, torch.stack([turned.cos(), -turned.sin(), turned.sin()], dim=-2)


@pytest.mark.parametrize("case", ROTATIONS, ids=str)
def test_one_kernel_rotates_as_separate_operations(case: Any, kernel: Any) -> None:
    kernels, device = kernel
    x, angles = draw_rotation(case)
    found = kernels.rotate(x.to(device), angles.to(device), case[5])
    assert (found.cpu() - rotate(x, angles, case[5])).abs().max() < 1e-6
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", ROTATIONS, ids=str)
def test_a_compiled_rotation_is_that_of_pytorch(case: Any, unfused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "on_cpu", lambda: False)
    x, angles = draw_rotation(case)
    expected = rotate(x, angles, case[5])
    found = attention.rotate(mx.array(x.numpy()), mx.array(angles.numpy()), case[5])
    assert np.abs(np.array(found) - expected.numpy()).max() < 1e-6


def test_a_compiled_gate_is_that_of_separate_operations(unfused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, x = (mx.random.normal((2, 3, 8), key=mx.random.key(seed)) for seed in (0, 1))
    expected = activations.gated_activation("silu", gate, x)
    monkeypatch.setattr(activations, "on_cpu", lambda: False)
    assert mx.allclose(activations.gated_activation("silu", gate, x), expected, rtol=1e-6)


@pytest.mark.parametrize("transform", ["none", "grad", "compile"])
def test_blocks_start_early_only_where_nothing_is_transformed(
    transform: str, unfused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, started = build("mlx", {}), []
    ids = mx.array(token_ids(2, 5, vocab_size=97))
    expected = model(ids)
    mx.eval(expected)
    monkeypatch.setattr(scheduling, "on_cpu", lambda: False)
    own = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda x: (own(x), started.append(x.shape)))
    if transform == "grad":
        assert mx.isfinite(mx.grad(lambda scale: (model(ids) * scale).sum())(mx.array(1.0))).item()
        gradient = mx.grad(
            lambda weight: (model.update({"token_embedding": {"weight": weight}}), model(ids))[1].sum()
        )
        assert mx.isfinite(gradient(model.token_embedding.weight)).all().item()
        return
    found = mx.compile(model)(ids) if transform == "compile" else model(ids)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert started == ([(2, 5, 64)] * 2 if transform == "none" else [])
    model(ids[:, :1])
    model.train()
    model(ids)
    assert len(started) == (2 if transform == "none" else 0)  # neither single tokens nor training


@both_backends
def test_the_passes_over_a_prompt(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(backend, {})

    def columns(rows: int, on_cpu: bool, **options: Any) -> int:
        request = make_request(model, [[1, 2]] * rows, None, 0, options)
        return request.prefill_columns(rows, model if on_cpu else SimpleNamespace(is_on_cpu=False))

    assert columns(8, True) == (128 if backend == "mlx" else 512)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "quantized_layers", lambda _: {"head": None})
        assert columns(8, True) == 512
    model.set_weight_dtype("bf16")
    assert columns(8, True) == (512 if backend == "mlx" else 2048)
    assert (columns(1, False), columns(8, False)) == (8192, 1024)
    assert columns(64, False) == 512
    assert columns(8, False, prefill_chunk=100) == columns(8, True, prefill_chunk=100) == 100
    assert GenerationConfig().prefill_chunk is None
    assert backends.module(backend, "generation.cache").KVCache(1).row_lengths is None
