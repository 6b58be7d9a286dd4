"""The loss of a linear layer in chunks, against PyTorch's cross-entropy of all logits in float64."""

from __future__ import annotations

from typing import Any

import icenet.blas

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_MODELS, both_backends, build_model, native, plain, token_ids

import icenet.nn
import icenet_torch.nn
from icenet.core.config import Config
from icenet.core.nn import loss
from icenet.nn.arrays import from_numpy, to_numpy
from icenet.parity.yardstick import judge

ROWS, VOCAB, WIDTH = 300, 37, 16
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 128 * VOCAB)
    assert loss.rows_of_a_chunk(ROWS, VOCAB) == 128  # three chunks, and the last one is shorter


def arrays(has_bias: bool, dtype: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns x, weight and bias, and labels of which some are ignored, also all of a chunk."""
    drawn = np.random.default_rng(0)
    shapes = [(ROWS, WIDTH), (VOCAB, WIDTH), *([(VOCAB,)] if has_bias else [])]
    values = [drawn.standard_normal(shape).astype(np.float32) for shape in shapes]
    values[0] = torch.from_numpy(values[0]).to(getattr(torch, dtype)).float().numpy()
    labels = drawn.integers(0, VOCAB, ROWS)
    labels[::7] = -100
    labels[128:256] = -1
    return values, labels


def of_torch(values: list[np.ndarray], labels: np.ndarray, softcap: float | None, dtype: str) -> list[np.ndarray]:
    """Returns loss and gradients by PyTorch; x has the dtype, the parameters are fp32 but in float64."""
    double = dtype == "float64"
    x, *parameters = (
        torch.from_numpy(value).to(getattr(torch, dtype) if index == 0 or double else torch.float32).requires_grad_()
        for index, value in enumerate(values)
    )
    found = icenet_torch.nn.linear_cross_entropy(
        x.reshape(3, ROWS // 3, WIDTH), parameters[0], (parameters[1:] or [None])[0],
        torch.from_numpy(labels).reshape(3, -1), softcap,
    )  # fmt: skip
    (3 * found).backward()
    return [array.detach().double().numpy() for array in (found, *(a.grad for a in (x, *parameters)))]  # type: ignore[union-attr]


def of_mlx(values: list[np.ndarray], labels: np.ndarray, softcap: float | None, dtype: str) -> list[np.ndarray]:
    def f(x: mx.array, weight: mx.array, *bias: mx.array) -> list[mx.array]:
        rows, ids = x.reshape(3, ROWS // 3, WIDTH), mx.array(labels).reshape(3, -1)
        return [icenet.nn.linear_cross_entropy(rows, weight, bias[0] if bias else None, ids, softcap)]

    inputs = [from_numpy(value) for value in values]
    inputs[0] = inputs[0].astype(getattr(mx, dtype))
    outputs, gradients = mx.vjp(f, inputs, [mx.array(3.0)])
    return [to_numpy(array.astype(mx.float32)) for array in (*outputs, *gradients)]


def of_logits(values: list[np.ndarray], labels: np.ndarray, softcap: float | None) -> list[np.ndarray]:
    """The same by PyTorch's own functions of all logits, in float64."""
    x, *parameters = (torch.from_numpy(value).double().requires_grad_() for value in values)
    logits = F.linear(x, *parameters)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = F.cross_entropy(logits, torch.from_numpy(np.where(labels < 0, -100, labels)))
    (3 * found).backward()
    return [array.detach().numpy() for array in (found, *(a.grad for a in (x, *parameters)))]  # type: ignore[union-attr]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(dtype: str, softcap: float | None, has_bias: bool) -> None:
    values, labels = arrays(has_bias, dtype)
    exact = of_logits(values, labels, softcap)
    assert all(
        np.allclose(a, b, atol=1e-12)
        for a, b in zip(of_torch(values, labels, softcap, "float64"), exact, strict=True)
    )
    theirs, ours = of_torch(values, labels, softcap, dtype), of_mlx(values, labels, softcap, dtype)
    for index, (a, b, r) in enumerate(zip(ours, theirs, exact, strict=True)):
        stored = SHORT[dtype] if index == 1 else "fp32"
        judgement = judge(a, b, r, SHORT[dtype], stored=stored)
        assert judgement.passed, (index, judgement)
        step = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]  # PyTorch's, too, are near
        assert np.abs(b - r).max() <= step * max(np.abs(r).max(), 1e-3), index


@pytest.mark.usefixtures("small_chunks")
def test_the_weight_alone_has_a_gradient() -> None:
    """The layers below are frozen: their result needs no gradient."""
    values, labels = arrays(False, "float32")
    weight = torch.from_numpy(values[1]).requires_grad_()
    icenet_torch.nn.linear_cross_entropy(
        torch.from_numpy(values[0]), weight, None, torch.from_numpy(labels)
    ).backward()
    assert weight.grad is not None
    np.testing.assert_allclose(3 * weight.grad, of_logits(values, labels, None)[2], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
@both_backends
def test_the_loss_is_that_of_logits_in_the_dtype_of_the_layer(backend: str) -> None:
    """Also on a CPU, which computes products of half precision in fp32."""
    values, labels = arrays(True, "bfloat16")
    x, weight, bias = (native(backend, value) for value in values)
    nn, x = (icenet.nn, x.astype(mx.bfloat16)) if backend == "mlx" else (icenet_torch.nn, x.bfloat16())
    ids = native(backend, labels)
    expected = nn.cross_entropy(nn.linear.linear(x, weight, bias), ids)[0].item()
    assert abs(nn.linear_cross_entropy(x, weight, bias, ids).item() - expected) <= 1e-6 * expected


@pytest.mark.usefixtures("small_chunks")
@both_backends
def test_labels_that_are_all_ignored(backend: str) -> None:
    values, labels = arrays(True, "float32")
    found = (of_mlx if backend == "mlx" else of_torch)(values, np.full_like(labels, -1), None, "float32")
    assert all(not array.any() for array in found)


@both_backends
@pytest.mark.parametrize("change", [{}, {"tie_embeddings": True}, {"logit_softcap": 3.0}])
def test_a_transformer_computes_the_loss_of_its_logits(backend: str, change: dict[str, Any]) -> None:
    """The loss without logits is the cross-entropy of the logits that the model returns."""
    model = build_model(backend, Config.from_dict({"model": {**TINY_MODELS["transformer"], **change}}).model)
    ids = token_ids(3, 9, vocab_size=257)
    labels = np.where(ids % 5 == 0, -1, np.roll(ids, 1))
    logits = torch.from_numpy(plain(model(native(backend, ids))).astype(np.float64))
    exact = F.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(np.where(labels < 0, -100, labels)).flatten().long()
    )
    found = model(native(backend, ids), labels=native(backend, labels))
    assert float(plain(found)) == pytest.approx(exact.item(), rel=2e-6)


@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 50_000), (16_384, 50_000), (100, 7), (5, 1 << 30), (0, 10)])
def test_chunks_have_about_the_same_size(rows: int, vocab_size: int) -> None:
    size = loss.rows_of_a_chunk(rows, vocab_size)
    assert size >= 1 and (size % 128 == 0 or rows == 0)
    assert size == 128 or (size - 128) * vocab_size <= loss.CHUNK
