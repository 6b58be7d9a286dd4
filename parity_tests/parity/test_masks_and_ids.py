"""Correct pairs whose inputs determine ids, lengths and rows: masks of floats, packed sequences, codebooks, heads."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw, randomized, tokens
from written_pairs import Pair, linear, net, verdict

from icenet.parity import Report, compare


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


def report_of(pair: Pair, given: Any, **options: Any) -> Report:
    randomized(pair.theirs)
    return compare(pair.ours, pair.theirs, given, copy_weights=True, **options)


# ---- a mask of floats whose sum is the number of the last position ------------------------------------------


def last(shift: int = 1) -> Pair:
    """Returns a model that takes the last position that a mask of 1 and 0 shows, and pools what it shows."""

    def ours(m: Any, x: Any, mask: Any) -> Any:
        h = mx.tanh(m.inner(x)) * mask[..., None]
        at = mask.sum(1).astype(mx.int32) - shift
        return m.out(h[mx.arange(len(x)), at] + h.max(axis=1))

    def theirs(m: Any, x: Any, mask: Any) -> Any:
        h = torch.tanh(m.inner(x)) * mask.unsqueeze(-1)
        at = mask.long().sum(1) - 1
        return m.out(h.gather(1, at[:, None, None].expand(-1, 1, h.shape[-1])).squeeze(1) + h.max(1).values)

    return net(ours, theirs, inner=linear(5, 8), out=linear(8, 3))


def masked() -> dict[str, np.ndarray]:
    mask = np.ones((3, 6), np.float32)
    mask[1, 4:] = mask[2, 1:] = 0
    return {"x": draw(3, 6, 5), "mask": mask}


def test_a_mask_of_floats_may_determine_ids() -> None:
    report = report_of(last(), masked())
    assert report.passed, report.verdict


def test_another_last_position_is_found() -> None:
    line = verdict(last(shift=2), masked(), stages=["forward"])
    assert "differs in the model (MlxNet) itself, between inner and out" in line, line


# ---- packed sequences ---------------------------------------------------------------------------------------


class Packed(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = T.Embedding(9, 6), T.GRU(6, 5, batch_first=True), T.Linear(5, 2)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        pack = T.utils.rnn.pack_padded_sequence(
            self.embed(ids), lengths.long(), batch_first=True, enforce_sorted=False
        )
        hidden, _ = T.utils.rnn.pad_packed_sequence(self.rnn(pack)[0], batch_first=True, total_length=ids.shape[1])
        return self.out(hidden)


class Padded(M.Module):
    def __init__(self, is_masked: bool) -> None:
        super().__init__()
        self.embed, self.rnn, self.out, self.is_masked = M.Embedding(9, 6), M.GRU(6, 5), M.Linear(5, 2), is_masked

    def __call__(self, ids: mx.array, lengths: mx.array) -> mx.array:
        hidden = self.rnn(self.embed(ids))
        shown = mx.arange(ids.shape[1])[None] < lengths[:, None]
        return self.out(mx.where(shown[..., None], hidden, 0) if self.is_masked else hidden)


@pytest.mark.parametrize("is_masked", [True, False])
def test_packed_sequences(is_masked: bool) -> None:
    given = {"ids": tokens(3, 5, below=9), "lengths": np.array([5, 2, 3], np.int32)}
    report = report_of(Pair(Padded(is_masked), Packed()), given)
    assert report.passed == is_masked, report.verdict
    assert is_masked or "differs in the model (Padded) itself, between embed and out" in report.verdict


# ---- a codebook behind stop_gradient ------------------------------------------------------------------------


class Codebook(M.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = mx.zeros((7, 4))
        self.freeze()

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        distances = (mx.square(x[..., None, :] - self.codes)).sum(-1)
        ids = mx.argmin(distances, axis=-1)
        return self.codes[ids], ids


class TorchCodebook(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(7, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.cdist(x, self.codes).argmin(-1)
        return F.embedding(ids, self.codes), ids


class Quantized(M.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.quantize, self.decode = M.Linear(5, 4), Codebook(), M.Linear(4, 5)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        h = self.encode(x)
        codes, ids = self.quantize(mx.stop_gradient(h))
        return self.decode(h + mx.stop_gradient(codes - h)), ids


class TorchQuantized(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.quantize, self.decode = T.Linear(5, 4), TorchCodebook(), T.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.encode(x)
        codes, ids = self.quantize(h.detach())
        return self.decode(h + (codes - h).detach()), ids


def test_ids_of_values_that_have_no_gradient() -> None:
    report = report_of(Pair(Quantized(), TorchQuantized()), draw(6, 5))
    assert report.passed, report.verdict


def test_ids_of_values_that_have_a_gradient_cannot_be_trained() -> None:
    class Open(Quantized):
        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            h = self.encode(x)
            codes, ids = self.quantize(h)
            return self.decode(codes), ids

    class TorchOpen(TorchQuantized):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            codes, ids = self.quantize(self.encode(x))
            return self.decode(codes), ids

    report = report_of(Pair(Open(), TorchOpen()), draw(6, 5))
    assert not report.passed and "differs in quantize; a raises an error in training mode" in report.verdict


# ---- norms of queries and keys, before or after heads and positions are exchanged ----------------------------


def normed_heads(exchanged_first: bool, positions: int) -> Pair:
    """Returns an attention of four heads whose queries and keys are normalized; `b` normalizes [B, L, H, E]."""

    def ours(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (layer(x).reshape(b, n, 4, 6) for layer in (m.q, m.k, m.v))
        if not exchanged_first:
            q, k = m.q_norm(q), m.k_norm(k)
        q, k, v = (y.transpose(0, 2, 1, 3) for y in (q, k, v))
        if exchanged_first:
            q, k = m.q_norm(q), m.k_norm(k)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=6**-0.5, mask="causal")
        return m.out(y.transpose(0, 2, 1, 3).reshape(b, n, 24))

    def theirs(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 4, 6) for layer in (m.q, m.k, m.v))
        q, k, v = m.q_norm(q).transpose(1, 2), m.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    layers = {name: linear(24, 24) for name in ("q", "k", "v", "out")}
    norms = {name: Pair(M.RMSNorm(6, eps=1e-6), T.RMSNorm(6, eps=1e-6)) for name in ("q_norm", "k_norm")}
    return net(ours, theirs, **layers, **norms)


@pytest.mark.parametrize("positions", [7, 4])
@pytest.mark.parametrize("exchanged_first", [True, False])
def test_norms_of_heads_may_get_positions_last_or_first(exchanged_first: bool, positions: int) -> None:
    report = report_of(normed_heads(exchanged_first, positions), draw(2, positions, 24))
    assert report.passed, report.verdict
