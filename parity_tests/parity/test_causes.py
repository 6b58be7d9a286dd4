"""Each known cause, planted in a small pair as a user writes it, is named; so are those of public reports."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import icenet.blas

import mlx.core as mx
import mlx.nn as M
import mlx.optimizers as optimizers
import numpy as np
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw, randomized, tokens
from written_pairs import Pair, between, convolution, linear, net, verdict

import icenet
from icenet.parity import compare


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "tanh gelu": (lambda m, x: M.gelu_approx(x), lambda m, x: F.gelu(x), "the tanh approximation of GELU in a"),
    "exact gelu": (
        lambda m, x: M.gelu(x),
        lambda m, x: F.gelu(x, approximate="tanh"),
        "exact GELU in a, the tanh approximation of GELU in b",
    ),
    "elu": (lambda m, x: M.elu(x, 0.5), lambda m, x: F.elu(x), "alpha is 0.5 in a, 1 in b"),
    "exp": (lambda m, x: mx.exp(x), lambda m, x: F.softplus(x), "exp in a, softplus in b"),
    "axis of log_softmax": (
        lambda m, x: mx.log(mx.softmax(x, axis=-2)),
        lambda m, x: F.log_softmax(x, dim=-1),
        "softmax over the axis -2 in a",
    ),
    "unbiased norm": (
        lambda m, x: (x - x.mean(-1, keepdims=True)) / mx.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5),
        lambda m, x: F.layer_norm(x, (8,)),
        "unbiased variance (ddof 1) in a, biased in b",
    ),
    "eps of the deviation": (
        lambda m, x: (x - x.mean(-1, keepdims=True)) / (mx.sqrt(x.var(-1, keepdims=True)) + 1e-1),
        lambda m, x: F.layer_norm(x, (8,), eps=1e-1),
        "eps is added to the standard deviation in a",
    ),
    "biased variance": (
        lambda m, x: x / mx.sqrt(x.var(-1, keepdims=True) + 1e-5),
        lambda m, x: x / torch.sqrt(x.var(-1, keepdim=True) + 1e-5),
        "biased variance (ddof 0) in a, unbiased in b",
    ),
    "unbiased variance": (
        lambda m, x: x / mx.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5),
        lambda m, x: x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
        "unbiased variance (ddof 1) in a, biased in b",
    ),
    "swapped axes": (
        lambda m, x: x.reshape(2, 8, 5).transpose(0, 2, 1),
        lambda m, x: x.reshape(2, 5, 8),
        "swapped axes|order",
    ),
    "eps in the code": (
        lambda m, x: x * mx.rsqrt((x * x).mean(-1, keepdims=True) + 1e-3),
        lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        "eps is 0.001 in a, 1e-06 in b",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    ours, theirs, words = FUNCTIONS[name]
    cause = verdict(between(ours, theirs), draw(2, 5, 6))
    assert any(word in cause for word in words.split("|")), cause


def test_the_default_eps_of_the_rms_norms() -> None:
    """That of PyTorch is the epsilon of the dtype."""
    pair = net(lambda m, x: m.norm(x), lambda m, x: m.norm(x), norm=(M.RMSNorm(6), T.RMSNorm(6)))
    assert "eps is 1e-05 in a, 1.19209e-07 in b" in verdict(pair, 0.01 * draw(2, 6))


# ---- attention ----------------------------------------------------------------------------------------------


def hidden_by(where: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns how scores are hidden on each side, given those that are kept."""
    if where == "where":
        return lambda s, keep: mx.where(keep, s, -1e9), lambda s, keep: torch.where(keep, s, -torch.inf)
    if where == "masked_fill":
        return lambda s, keep: mx.where(keep, s, -mx.inf), lambda s, keep: s.masked_fill(~keep, -math.inf)
    return (
        lambda s, keep: s + mx.where(keep, 0.0, -1e9),
        lambda s, keep: s + torch.zeros(keep.shape, dtype=s.dtype).masked_fill(~keep, -1e9),
    )


def attention(
    ours: Callable[[Any, Any], Any],
    how: str,
    scale: float = 1.0,
    turn: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (lambda x: x, lambda x: x),
) -> Pair:
    """Returns an attention with a causal mask, whose mask in MLX a function changes.

    Args:
        ours: Called as `ours(keep, n)`; returns what MLX keeps.
        how: The name of `hidden_by`.
        scale: Factor of the scores of MLX.
        turn: Turns queries and keys [B, H, T, E] on each side.
    """
    hide, torch_hide = hidden_by(how)

    def mlx_call(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (layer(x).reshape(b, n, 2, 4).transpose(0, 2, 1, 3) for layer in (m.q, m.k, m.v))
        scores = turn[0](q) @ turn[0](k).transpose(0, 1, 3, 2) * 4**-0.5 * scale
        keep = ours(mx.tri(n, dtype=mx.bool_), n)
        y = mx.softmax(scores if keep is None else hide(scores, keep), axis=-1) @ v
        return m.out(y.transpose(0, 2, 1, 3).reshape(b, n, -1))

    def torch_call(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 2, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        scores = turn[1](q) @ turn[1](k).transpose(-1, -2) * 4**-0.5
        y = torch_hide(scores, torch.ones(n, n, dtype=torch.bool).tril()).softmax(-1) @ v
        return m.out(y.transpose(1, 2).reshape(b, n, -1))

    return net(mlx_call, torch_call, **{name: linear(8, 8) for name in ("q", "k", "v", "out")})


MASKS: dict[str, tuple[Callable[[Any, int], Any], str]] = {
    "none": (lambda keep, n: None, "no attention mask in a|left out"),
    "next": (lambda keep, n: mx.tri(n, k=1, dtype=mx.bool_), "off by one"),
    "itself": (lambda keep, n: mx.tri(n, k=-1, dtype=mx.bool_), "off by one"),
}


@pytest.mark.parametrize("how", ["where", "masked_fill", "add"])
@pytest.mark.parametrize("name", ["none", "next", "itself"])
def test_masks(name: str, how: str) -> None:
    ours, words = MASKS[name]
    if (name, how) == ("itself", "masked_fill"):
        pytest.skip("the first row would have no finite score")
    cause = verdict(attention(ours, how), draw(2, 6, 8))
    assert any(word in cause for word in words.split("|")), cause


def test_the_scale_of_attention() -> None:
    cause = verdict(attention(lambda keep, n: keep, "where", scale=0.5), draw(2, 6, 8))
    assert "scale is" in cause or "multiplied" in cause, cause


def tables(x: Any, theta: float) -> tuple[Any, Any]:
    """Returns cosines and sines [T, E] as a model of PyTorch computes them once."""
    angles = torch.outer(torch.arange(x.shape[-2]).float(), theta ** (-torch.arange(0, 4, 2).float() / 4))
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate_half(x: Any, theta: float = 10000.0) -> Any:
    cos, sin = tables(x, theta)
    return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin


@pytest.mark.parametrize(
    ("options", "words"),
    [({"traditional": True}, "rotary positions of pairs (x[..., ::2]) in a"), ({"base": 1e3}, "theta is 1000 in a")],
)
def test_rotary_layers(options: dict[str, Any], words: str) -> None:
    """MLX's layer next to the code of Hugging Face's models."""
    pair = attention(lambda keep, n: keep, "where", turn=(M.RoPE(4, **options), rotate_half))
    cause = verdict(pair, draw(2, 6, 8))
    assert words in cause, cause
    assert compare(
        *attention(lambda keep, n: keep, "where", turn=(M.RoPE(4), rotate_half)),
        draw(2, 6, 8), stages=["forward"], copy_weights=True,
    ).passed  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [({"traditional": True}, "rotary positions of pairs"), ({"base": 500.0}, "theta is 500 in a")],
)
def test_rotary_tables_that_the_model_hands_to_its_layers(options: dict[str, Any], words: str) -> None:
    def mlx_layer(m: Any, x: Any) -> Any:
        b, n, _ = x.shape
        q, k = (m.rope(layer(x).reshape(b, n, 2, 4).transpose(0, 2, 1, 3)) for layer in (m.q, m.k))
        return m.out((mx.softmax(q @ k.transpose(0, 1, 3, 2), axis=-1) @ x[:, None]).mean(axis=1))

    def torch_layer(m: Any, x: Any, cos: Any, sin: Any) -> Any:
        b, n, _ = x.shape
        q, k = (layer(x).view(b, n, 2, 4).transpose(1, 2) for layer in (m.q, m.k))
        q, k = (y * cos + torch.cat([-y[..., 2:], y[..., :2]], -1) * sin for y in (q, k))
        return m.out(((q @ k.transpose(-1, -2)).softmax(-1) @ x[:, None]).mean(1))

    layer = net(mlx_layer, torch_layer, **{name: linear(8, 8) for name in ("q", "k", "out")})
    layer.ours.rope = M.RoPE(4, **options)
    pair = net(lambda m, x: m.layer(x), lambda m, x: m.layer(x, *tables(x, 10000.0)), layer=layer)
    cause = verdict(pair, draw(2, 6, 8))
    assert words in cause, cause


# ---- images -------------------------------------------------------------------------------------------------

PADDING = [("edge", "replicate"), ("constant", "constant")]


@pytest.mark.parametrize(("mode", "shown"), PADDING)
def test_padding_modes(mode: str, shown: str) -> None:
    pair = net(
        lambda m, x: m.conv(mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode=mode)),
        lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")),
        conv=convolution(3, 4, 3),
    )
    cause = verdict(pair, draw(2, 6, 6, 3))
    assert f"padding mode {shown} in a" in cause, cause


@pytest.mark.parametrize("is_aligned", [True, False])
def test_align_corners(is_aligned: bool) -> None:
    pair = net(
        lambda m, x: m.up(m.conv(x)),
        lambda m, x: F.interpolate(m.conv(x), scale_factor=2.0, mode="bilinear", align_corners=not is_aligned),
        conv=convolution(3, 4, 3),
    )
    pair.ours.up = M.Upsample(2, "linear", align_corners=is_aligned)
    assert f"align_corners is {is_aligned} in a, {not is_aligned} in b" in verdict(pair, draw(2, 6, 6, 3))


def test_numbers_of_layers_whose_shapes_differ() -> None:
    pair = net(
        lambda m, x: m.conv(x), lambda m, x: m.conv(x),
        conv=Pair(M.Conv2d(3, 4, 3), T.Conv2d(3, 4, 3, padding=1)),
    )  # fmt: skip
    report = compare(*pair, draw(2, 6, 6, 3), copy_weights=True)
    assert report.culprit == "conv" and "padding is (0, 0) in a, (1, 1) in b" in report.cause, report.verdict
    pair = net(
        lambda m, x: m.conv(x), lambda m, x: m.conv(x),
        conv=Pair(M.Conv1d(3, 4, 3), T.Conv1d(3, 4, 3, padding=1)),
    )  # fmt: skip
    report = compare(*pair, draw(2, 6, 3), copy_weights=True)
    assert report.cause == "padding is 0 in a, 1 in b", report.verdict  # 1 and (1,) are equal strides


def test_two_numbers_of_a_module() -> None:
    """Neither explains the difference alone."""
    pair = net(lambda m, x: m.bent(x), lambda m, x: m.bent(x), bent=Pair(Bent(0.5, 2.0), TorchBent(1.0, 3.0)))
    assert "alpha is 0.5 in a, 1 in b; beta is 2 in a, 3 in b" in verdict(pair, draw(4, 6))


def test_a_number_that_is_no_cause_does_not_hide_one() -> None:
    pair = net(lambda m, x: m.bent(x), lambda m, x: m.bent(x), bent=Pair(Bent(1.0, 2.0), TorchBent(1.0, 3.0)))
    pair.ours.bent.alpha = 0.5  # the code does not use it
    assert "; cause: beta is 2 in a, 3 in b" in verdict(pair, draw(4, 6))


class Bent(M.Module):
    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha, self.beta, self.used = alpha, beta, alpha

    def __call__(self, x: mx.array) -> mx.array:
        return mx.where(x > 0, self.beta * x, self.used * x)


class TorchBent(T.Module):
    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, self.beta * x, self.alpha * x)


def test_a_transposed_parameter() -> None:
    class Theirs(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = T.Parameter(torch.randn(6, 4))

        def forward(self, x: Any) -> Any:
            return x @ self.w

    class Ours(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = mx.zeros((4, 6))

        def __call__(self, x: Any) -> Any:
            return x @ self.w.T

    report = compare(Ours(), Theirs(), draw(3, 6))
    assert "w is [4, 6] in a, [6, 4] in b" in report.verdict and "w is transposed in a" in report.cause


def test_a_linear_for_a_convolution_of_size_1_with_a_stride() -> None:
    """Without a stride they are compared."""

    class Ported(M.Module):
        def __init__(self, layer: M.Module) -> None:
            super().__init__()
            self.project = layer

        def __call__(self, x: Any) -> Any:
            return self.project(x)

    original = T.Sequential(OrderedDict(project=T.Conv2d(3, 5, 1, stride=2)))
    images = np.zeros((2, 4, 4, 3), np.float32)
    report = compare(Ported(M.Linear(3, 5)), original, images)
    assert report.culprit == "project" and "use mlx.nn.Conv2d(3, 5, 1) with the stride" in report.cause
    assert compare(Ported(M.Conv2d(3, 5, 1, stride=2)), original, images).passed


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: M.BatchNorm(4, momentum=0.9), "momentum is 0.9 in a, 0.1 in b"),
        (lambda: M.BatchNorm(4).eval(), "differs in norm; it is in evaluation mode in a"),
        (lambda: M.BatchNorm(4, eps=1e-3), "eps is 0.001 in a, 1e-05 in b"),
    ],
)
def test_batch_norms(layer: Callable[[], Any], words: str) -> None:
    pair = net(
        lambda m, x: m.norm(m.conv(x)),
        lambda m, x: m.norm(m.conv(x)),
        conv=convolution(3, 4, 3),
        norm=Pair(layer(), T.BatchNorm2d(4)),
    )
    assert words in verdict(pair, draw(3, 6, 6, 3))


def test_dropout() -> None:
    pair = between(lambda m, x: m.drop(x), lambda m, x: m.drop(x), drop=Pair(M.Dropout(0.2), T.Dropout(0.1)))
    assert "the rate p of the dropout is 0.2 in a, 0.1 in b" in verdict(pair, draw(2, 5, 6))
    pair = between(lambda m, x: m.drop(x), lambda m, x: m.drop(x), drop=Pair(M.Dropout(0.1).eval(), T.Dropout(0.1)))
    assert "differs in drop; it is in evaluation mode in a" in verdict(pair, draw(2, 5, 6))


# ---- weights, precision, training ---------------------------------------------------------------------------


def test_gate_order() -> None:
    pair = net(
        lambda m, x: m.head(m.lstm(x)[0]),
        lambda m, x: m.head(m.lstm(x)[0]),
        lstm=Pair(M.LSTM(6, 5), T.LSTM(6, 5, batch_first=True)),
        head=linear(5, 3),
    )
    randomized(pair.theirs)
    icenet.from_torch(pair.theirs, pair.ours)
    layer = pair.ours.lstm
    for name in ("Wx", "Wh", "bias"):
        i, f, g, o = mx.split(layer[name], 4)
        layer[name] = mx.concatenate([i, f, o, g])
    report = compare(*pair, draw(2, 7, 6), copy_weights=False)
    assert report.culprit == "lstm" and "order" in report.cause and "gate" in report.cause, report.verdict


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w[::-1], "differs only in the order along axis 0, which is reversed"),
        (lambda w: w * 1.001, "it is multiplied by 1.001 in a"),
        (lambda w: w.astype(mx.bfloat16).astype(mx.float32), "it has the precision of bf16 in a"),
        (lambda w: w.T, "weight of a is equal to that of b after x.transpose(1, 0)"),
    ],
)
def test_weights_that_are_changed(change: Callable[[Any], Any], words: str) -> None:
    pair = net(lambda m, x: m.fc(x), lambda m, x: m.fc(x), fc=linear(6, 6))
    randomized(pair.theirs)
    icenet.from_torch(pair.theirs, pair.ours)
    pair.ours.fc.weight = change(pair.ours.fc.weight)
    report = compare(*pair, draw(4, 6), copy_weights=False)
    assert report.culprit == "fc" and words in report.cause, report.verdict


def test_weights_of_another_layer() -> None:
    pair = between(lambda m, x: m.a(x) * m.b(x), lambda m, x: m.a(x) * m.b(x), a=linear(8, 8), b=linear(8, 8))
    randomized(pair.theirs)
    icenet.from_torch(pair.theirs, pair.ours)
    pair.ours.a, pair.ours.b = pair.ours.b, pair.ours.a
    report = compare(*pair, draw(4, 6), copy_weights=False)
    assert report.culprit == "a" and "weight of a differs and is that of b.weight in b" in report.cause, (
        report.verdict
    )


def test_tf32() -> None:
    def rounded(x: mx.array) -> mx.array:
        factor = x * (2.0**13 + 1)
        return factor - (factor - x)

    pair = net(
        lambda m, x: rounded(m.up(x)) @ rounded(m.down.weight).T + m.down.bias,
        lambda m, x: m.down(m.up(x)),
        up=linear(6, 32),
        down=linear(32, 6),
    )
    assert "products in TF32 in a" in verdict(pair, draw(4, 6))


def test_a_missing_cast() -> None:
    """Positions of a time are angles of up to 1000, of which bf16 has two digits."""

    def angles(t: Any, x: Any) -> Any:
        return mx.sin(t[:, None].astype(x.dtype) * mx.array([1.0, 0.1, 0.01], x.dtype))

    pair = net(
        lambda m, x, t: m.down(mx.concatenate([x, angles(t, x)], axis=-1)),
        lambda m, x, t: m.down(
            torch.cat([x, torch.sin(t[:, None].float() * torch.tensor([1.0, 0.1, 0.01])).to(x.dtype)], -1)
        ),
        down=linear(9, 4),
    )
    cause = verdict(pair, {"x": draw(5, 6), "t": tokens(5, below=1000, seed=3)}, dtype="bf16")
    assert "a cast to fp32 is missing" in cause, cause


ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("options", "theirs", "words"),
    [
        ({"bias_correction": False}, ADAMW, "no bias correction in a"),
        ({"learning_rate": 2e-2}, ADAMW, "the learning rate is 0.02 in a, 0.01 in b"),
        ({"weight_decay": 0.2}, ADAMW, "weight decay is 0.2 in a, 0.1 in b"),
        ({"betas": [0.9, 0.95]}, ADAMW, "betas are [0.9, 0.95] in a, [0.9, 0.999] in b"),
        ({"eps": 1e-6}, ADAMW, "eps of the optimizer is 1e-06 in a, 1e-08 in b"),
        (
            {"learning_rate": 2e-2, "eps": 1e-5},
            ADAMW,
            "the learning rate is 0.02 in a, 0.01 in b; eps of the optimizer is 1e-05 in a, 1e-08 in b",
        ),
    ],
)
def test_options_of_the_optimizer(options: dict[str, Any], theirs: Any, words: str) -> None:
    pair = between(lambda m, x: mx.tanh(x), lambda m, x: torch.tanh(x))
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "bias_correction": True, **options}
    stages = ["forward", "loss", "gradients", "optimizer"]
    cause = verdict(pair, draw(4, 6), stages=stages, optimizer=(optimizers.AdamW(**settings), theirs))
    assert words in cause, cause


# ---- public reports -----------------------------------------------------------------------------------------


def test_difference_in_training_convergence_between_pytorch_and_mlx() -> None:
    """ml-explore/mlx#1153: a GPT with AdamW converges more slowly: MLX's AdamW had no correction of its bias."""

    def call(m: Any, ids: Any, arange: Any, mean: Any) -> Any:
        x = m.tok_emb(ids) + m.pos_emb(arange(ids.shape[1]))
        return m.out_head(m.final_norm(x + mean(m.ff(x))))

    pair = net(
        lambda m, ids: call(m, ids, mx.arange, M.gelu),
        lambda m, ids: call(m, ids, torch.arange, F.gelu),
        tok_emb=Pair(M.Embedding(20, 8), T.Embedding(20, 8)),
        pos_emb=Pair(M.Embedding(6, 8), T.Embedding(6, 8)),
        ff=linear(8, 8),
        final_norm=Pair(M.LayerNorm(8), T.LayerNorm(8)),
        out_head=linear(8, 20, False),
    )
    optimizer = optimizers.AdamW(learning_rate=4e-4, weight_decay=0.1)
    torch_optimizer = partial(torch.optim.AdamW, lr=4e-4, weight_decay=0.1)
    stages = ["forward", "loss", "gradients", "optimizer"]
    cause = verdict(pair, tokens(2, 6, below=20), stages=stages, optimizer=(optimizer, torch_optimizer))
    assert "no bias correction in a: pass bias_correction=True" in cause


def test_different_outputs_from_pytorch_and_mlx_on_a_simple_mlp() -> None:
    """ml-explore/mlx#1424: the condition of the last ReLU is wrong in one of two MLPs with equal weights."""

    def call(m: Any, x: Any, relu: Any, last: int) -> Any:
        for i, layer in enumerate(m.layers):
            x = relu(layer(x)) if i < last else layer(x)
        return x

    pair = net(
        lambda m, x: call(m, x, M.relu, 3),
        lambda m, x: call(m, x, F.relu, 2),
        layers=[linear(6, 8), linear(8, 8), linear(8, 4)],
    )
    cause = verdict(pair, draw(5, 6))
    assert "ReLU in addition in a" in cause, cause


def test_getting_different_outputs_from_mlx_and_torch_mamba() -> None:
    """alxndrTL/mamba.py#68: "entirely due to weights initialisation of the nn.linear layers"."""

    def call(m: Any, x: Any, silu: Any) -> Any:
        return m.out_proj(silu(m.in_proj(x)) * m.gate(x))

    pair = net(
        lambda m, x: call(m, x, M.silu),
        lambda m, x: call(m, x, F.silu),
        in_proj=linear(8, 16, False),
        gate=linear(8, 16, False),
        out_proj=linear(16, 8, False),
    )
    report = compare(*pair, draw(2, 8, 8))
    assert report.passed and "the weights were not equal: those of b were used" in report.verdict
    report = compare(*pair, draw(2, 8, 8), copy_weights=False)
    assert "never copied" in report.cause and "icenet.from_torch" in report.cause, report.verdict


@pytest.mark.parametrize("is_layer_at_fault", [False, True])
def test_results_with_bert_are_not_the_same_as_torch(is_layer_at_fault: bool) -> None:
    """ToluClassics/mlx-transformers#23: of two sentences, the one with padding has another embedding.

    The mask of 0 and 1 is added to the scores as it is, which changes nothing for a sentence without padding.
    """

    def attend(m: Any, x: Any, mask: Any, softmax: Any) -> Any:
        scores = m.query(x) @ m.key(x).swapaxes(1, 2) / math.sqrt(8)
        return m.dense(softmax(scores + mask) @ m.value(x)) + x

    def mlx_attend(m: Any, x: Any, mask: Any) -> Any:
        if is_layer_at_fault:
            mask = mask[:, None, :].astype(mx.float32)
        return attend(m, x, mask, lambda s: mx.softmax(s, axis=-1))

    def torch_attend(m: Any, x: Any, mask: Any) -> Any:
        if is_layer_at_fault:
            mask = (1.0 - mask[:, None, :].to(x.dtype)) * torch.finfo(torch.float32).min
        return attend(m, x, mask, lambda s: s.softmax(-1))

    def torch_call(m: Any, ids: Any, mask: Any) -> Any:
        x = m.embeddings(ids)
        extended = (
            mask if is_layer_at_fault else (1.0 - mask[:, None, :].to(x.dtype)) * torch.finfo(torch.float32).min
        )
        return m.attention(x, extended)

    layer = net(mlx_attend, torch_attend, **{name: linear(8, 8) for name in ("query", "key", "value", "dense")})
    pair = net(
        lambda m, ids, mask: m.attention(m.embeddings(ids), mask if is_layer_at_fault else mask[:, None, :] * 1.0),
        torch_call,
        embeddings=Pair(M.Embedding(30, 8), T.Embedding(30, 8)),
        attention=layer,
    )
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.int32)
    cause = verdict(pair, {"ids": tokens(2, 6, below=30), "mask": mask})
    assert "the attention mask of 0 and 1 is" in cause and "cause: exp" not in cause, cause
