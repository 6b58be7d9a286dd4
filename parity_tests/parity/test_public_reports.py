"""Public reports of ports to MLX whose results are not those of the original: the tool names the cause.

Each is a small pair with the mistake of the report. Those about optimizers, initial values and padding are in
test_causes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import icenet.blas

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pairs import draw, randomized, tokens
from test_transformer_causes import attention, embedding, rotary
from written_pairs import Pair, convolution, linear, net

import icenet
from icenet.parity import compare


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


def glm_turns_all_values_of_a_head() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx-lm#1698: `partial_rotary_factor` is not read."""
    pair = attention(turn=(lambda x: pair.ours.rope(x), rotary(4)))
    pair.ours.rope = M.RoPE(8)
    return pair, draw(2, 6, 16), "", "rotary positions turn 8 of the 8 values of a head in a, 4 in b"


def llama_has_the_base_of_an_older_one() -> tuple[Pair, Any, str, str]:
    """lyogavin/airllm#369: `rope_theta` is not carried from the config."""
    pair = attention(turn=(lambda x: pair.ours.rope(x), rotary(8)))
    pair.ours.rope = M.RoPE(8, base=500000.0)  # the other way round: tables of the reference have 10000
    return pair, draw(2, 6, 16), "", "theta is 500000 in a, 10000 in b"


def embeddings_are_means_in_place_of_the_first_token() -> tuple[Pair, Any, str, str]:
    """Blaizzy/mlx-embeddings#63: the pooling of the checkpoint is that of the first token."""

    def mlx_call(m: Any, ids: Any, mask: Any) -> Any:
        x, keep = m.encoder(ids), mask[..., None].astype(mx.float32)
        return m.dense((x * keep).sum(axis=1) / mx.maximum(keep.sum(axis=1), 1e-9))

    pair = net(
        mlx_call,
        lambda m, ids, mask: m.dense(m.encoder(ids)[:, 0]),
        encoder=net(lambda m, ids: mx.tanh(m.tok(ids)), lambda m, ids: torch.tanh(m.tok(ids)), tok=embedding(20)),
        dense=linear(8, 4),
    )
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.int32)
    return pair, {"ids": tokens(2, 6, below=20), "mask": mask}, "", "the mean over axis 1 of the output of encoder"


def a_group_norm_has_the_default_eps() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx-examples#1434: `Transformer2D` of Stable Diffusion has 1e-6."""
    norm = Pair(M.GroupNorm(2, 4, pytorch_compatible=True), T.GroupNorm(2, 4, eps=1e-6))
    pair = net(lambda m, x: m.norm(m.conv(x)), lambda m, x: m.norm(m.conv(x)), conv=convolution(3, 4, 3), norm=norm)
    return pair, draw(2, 6, 6, 3, scale=0.01), "norm", "eps is 1e-05 in a, 1e-06 in b"


def gemma_has_the_exact_gelu() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx-examples#1057: `nn.gelu_approx` in place of `nn.gelu`."""
    pair = net(
        lambda m, x: m.down(M.gelu(m.gate(x)) * m.up(x)),
        lambda m, x: m.down(F.gelu(m.gate(x), approximate="tanh") * m.up(x)),
        gate=linear(8, 16, False), up=linear(8, 16, False), down=linear(16, 8, False),
    )  # fmt: skip
    return pair, draw(4, 8), "", "exact GELU in a, the tanh approximation of GELU in b"


def a_soft_cap_of_logits_is_left_out() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx-lm#1710: `final_logit_softcapping` is left out, which no ranking of tokens shows."""
    pair = net(
        lambda m, ids: m.lm_head(m.tok(ids)),
        lambda m, ids: 20.0 * torch.tanh(m.lm_head(m.tok(ids)) / 20.0),
        tok=embedding(20), lm_head=linear(8, 20, False),
    )  # fmt: skip
    return pair, tokens(2, 6, below=20), "", "the soft cap of b, 20 * tanh(x / 20), is left out in a"


def an_encoder_layer_adds_what_is_not_normalized() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx#1327: `norm_first=False` of MLX added the input of the first norm to the second branch."""

    def call(m: Any, x: Any, relu: Any, wrong: bool) -> Any:
        y = x + m.attend(x)
        h = m.ln1(y)
        return m.ln2((y if wrong else h) + m.linear2(relu(m.linear1(h))))

    norm = (lambda: Pair(M.LayerNorm(8), T.LayerNorm(8)))()
    pair = net(
        lambda m, x: call(m, x, M.relu, True),
        lambda m, x: call(m, x, F.relu, False),
        attend=linear(8, 8), ln1=norm, linear1=linear(8, 16), linear2=linear(16, 8),
        ln2=Pair(M.LayerNorm(8), T.LayerNorm(8)),
    )  # fmt: skip
    return pair, draw(2, 5, 8), "", ""


def a_window_has_one_key_more() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx-lm#390: the mask of a sliding window of 3 shows 4 keys."""

    def keep(arange: Any, n: int, size: int) -> Any:
        distance = arange(n)[:, None] - arange(n)
        return (distance >= 0) & (distance < size)

    scores = (
        lambda s: mx.where(keep(mx.arange, 6, 4), s, -mx.inf),
        lambda s: s.masked_fill(~keep(torch.arange, 6, 3), -torch.inf),
    )
    return attention(scores=scores), draw(2, 6, 16), "", "the window of the attention mask is 1 key longer in a"


def experts(mlx_route: Callable[..., Any], torch_route: Callable[..., Any]) -> Pair:
    """Returns a mixture of experts of width 8, given the weights and the numbers of the experts that are taken."""

    def mlx_call(m: Any, x: Any) -> Any:
        weights, chosen = mlx_route(m, m.gate(x))
        y = mx.stack([expert(x) for expert in m.experts], axis=-2)
        return (mx.take_along_axis(y, chosen[..., None], axis=-2) * weights[..., None]).sum(axis=-2)

    def torch_call(m: Any, x: Any) -> Any:
        weights, chosen = torch_route(m, m.gate(x))
        y = torch.stack([expert(x) for expert in m.experts], -2)
        return (y.gather(-2, chosen[..., None].expand(*chosen.shape, 8)) * weights[..., None]).sum(-2)

    moe = net(mlx_call, torch_call, ("bias", 5), gate=linear(8, 5, False), experts=[linear(8, 8) for _ in range(5)])
    return net(lambda m, x: x + m.moe(x), lambda m, x: x + m.moe(x), moe=moe)


def mlx_chosen(scores: Any) -> Any:
    return mx.stop_gradient(mx.argsort(-scores, axis=-1)[..., :2])


def torch_route_by_bias(m: Any, scores: Any) -> Any:
    """The bias is for the choice of the experts only."""
    p = scores.sigmoid()
    chosen = torch.topk(p + m.bias, 2, -1)[1]
    return p.gather(-1, chosen), chosen


def a_router_has_softmax_in_place_of_sigmoid() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx-lm#1883: LFM2's mixture of experts."""

    def mlx_route(m: Any, scores: Any) -> Any:
        p = mx.softmax(scores, axis=-1)
        chosen = mlx_chosen(p + m.bias)
        return mx.take_along_axis(p, chosen, axis=-1), chosen

    return experts(mlx_route, torch_route_by_bias), draw(2, 5, 8), "moe", "softmax in a, sigmoid in b"


def a_router_has_its_bias_in_the_weights() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx-lm#1883: the bias is for the choice of the experts only."""

    def mlx_route(m: Any, scores: Any) -> Any:
        p = mx.sigmoid(scores) + m.bias
        return mx.take_along_axis(p, mlx_chosen(p), axis=-1), mlx_chosen(p)

    return (
        experts(mlx_route, torch_route_by_bias),
        draw(2, 5, 8),
        "moe",
        "the values by which topk chooses are taken in a",
    )


def a_router_has_a_softmax_of_the_chosen_scores() -> tuple[Pair, Any, str, str]:
    """lablup/mlxcel#391: OLMoE takes the probabilities of all experts, and does not normalize those it chose."""

    def mlx_route(m: Any, scores: Any) -> Any:
        chosen = mlx_chosen(scores)
        return mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1), chosen

    def torch_route(m: Any, scores: Any) -> Any:
        return torch.topk(scores.softmax(-1), 2, -1)

    words = "the values of topk are divided by their sum in a, such as by a softmax of them"
    return experts(mlx_route, torch_route), draw(2, 5, 8), "moe", words


def a_decoder_layer_has_its_first_norm_twice() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx#1636: `ln1` in the place of `ln2`."""

    def call(m: Any, x: Any, second: Any) -> Any:
        y = m.ln1(x + m.attend(x))
        return m.ln3(second(y + m.cross(x)) + m.linear(x))

    names = ("attend", "cross", "linear")
    norms = {name: Pair(M.LayerNorm(8), T.LayerNorm(8)) for name in ("ln1", "ln2", "ln3")}
    pair = net(
        lambda m, x: call(m, x, m.ln1), lambda m, x: call(m, x, m.ln2), **{n: linear(8, 8) for n in names}, **norms
    )
    return pair, draw(2, 4, 8), "", "a calls ln1 where b calls ln2"


def positions_are_resized_in_another_way() -> tuple[Pair, Any, str, str]:
    """Blaizzy/mlx-vlm#2266: the positions of SigLIP2 are resized bicubic in place of bilinear."""

    def torch_call(m: Any, x: Any) -> Any:
        positions = F.interpolate(m.table(torch.arange(64)).mT.reshape(1, 8, 8, 8), scale_factor=0.5, mode="bilinear")
        return m.out(x + positions.flatten(2).mT)

    def mlx_call(m: Any, x: Any) -> Any:
        positions = M.Upsample(0.5, "cubic")(m.table(mx.arange(64)).reshape(1, 8, 8, 8))
        return m.out(x + positions.reshape(1, 16, 8))

    pair = net(mlx_call, torch_call, table=embedding(64), out=linear(8, 3))
    return pair, draw(2, 16, 8), "", "interpolation mode bicubic in a"


def time_steps_have_a_lower_bound() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx-lm#1026: Nemotron-H has none."""

    def mlx_call(m: Any, x: Any) -> Any:
        return m.out(mx.exp(-mx.maximum(M.softplus(m.dt(x)), 0.25)) * m.up(x))

    pair = net(
        mlx_call, lambda m, x: m.out(torch.exp(-F.softplus(m.dt(x))) * m.up(x)),
        dt=linear(6, 6), up=linear(6, 6), out=linear(6, 4),
    )  # fmt: skip
    return pair, draw(4, 6, scale=3.0), "", "clipped at 0.25 from below in a"


def queries_have_a_layer_norm() -> tuple[Pair, Any, str, str]:
    """ml-explore/mlx-examples#1308: PLaMo 2 has an RMS norm of queries and keys."""

    def turn(x: Any) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    pair = net(
        lambda m, x: m.out(mx.fast.layer_norm(m.q(x), None, None, 1e-6)), lambda m, x: m.out(turn(m.q(x))),
        q=linear(8, 8), out=linear(8, 8),
    )  # fmt: skip
    return pair, draw(4, 8), "", "a layer norm in a, an RMS norm in b"


def a_window_is_symmetric() -> tuple[Pair, Any, str, str]:
    """Blaizzy/mlx-audio#859: the window of a Fourier transform is periodic in Kokoro."""
    window = 0.5 - 0.5 * mx.cos(2 * math.pi * mx.arange(8) / 7)
    pair = net(
        lambda m, x: m.out(x * window), lambda m, x: m.out(x * torch.hann_window(8, dtype=x.dtype)), out=linear(8, 4)
    )
    return pair, draw(4, 8), "", "the window is symmetric in a, periodic in b"


def downsampling_has_padding_on_all_sides() -> tuple[Pair, Any, str, str]:
    """VincentGourbin/flux-2-swift-mlx#106: the encoder of FLUX.2 pads at the bottom and at the right."""
    conv = Pair(M.Conv2d(3, 5, 3, stride=2), T.Conv2d(3, 5, 3, stride=2))
    pair = net(
        lambda m, x: m.out(m.conv(mx.pad(x, [(0, 0), (1, 0), (1, 0), (0, 0)]))),
        lambda m, x: m.out(m.conv(F.pad(x, (0, 1, 0, 1))).permute(0, 2, 3, 1)),
        conv=conv, out=linear(5, 2),
    )  # fmt: skip
    return pair, draw(2, 8, 8, 3), "", "padding on the other side in a"


REPORTS: list[Callable[[], tuple[Pair, Any, str, str]]] = [
    glm_turns_all_values_of_a_head,
    llama_has_the_base_of_an_older_one,
    embeddings_are_means_in_place_of_the_first_token,
    a_group_norm_has_the_default_eps,
    gemma_has_the_exact_gelu,
    a_soft_cap_of_logits_is_left_out,
    an_encoder_layer_adds_what_is_not_normalized,
    a_window_has_one_key_more,
    a_router_has_softmax_in_place_of_sigmoid,
    a_router_has_its_bias_in_the_weights,
    a_router_has_a_softmax_of_the_chosen_scores,
    a_decoder_layer_has_its_first_norm_twice,
    positions_are_resized_in_another_way,
    time_steps_have_a_lower_bound,
    queries_have_a_layer_norm,
    a_window_is_symmetric,
    downsampling_has_padding_on_all_sides,
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.__name__)
def test_public_reports(report: Callable[[], tuple[Pair, Any, str, str]]) -> None:
    pair, given, path, words = report()
    randomized(pair.theirs)
    icenet.from_torch(pair.theirs, pair.ours)
    found = compare(*pair, given, copy_weights=False, stages=["forward"])
    assert found.culprit == path and words in found.cause, found.verdict


def test_weights_of_a_convolution_keep_the_axes_of_pytorch() -> None:
    """Blaizzy/mlx-audio#715: those of a kernel of size 1 were not moved."""
    conv = Pair(M.Conv1d(4, 6, 1), T.Conv1d(4, 6, 1))
    pair = net(lambda m, x: m.up_conv(x), lambda m, x: m.up_conv(x.mT).mT, up_conv=conv)
    conv.ours.weight = mx.array(conv.theirs.weight.detach().numpy())
    found = compare(*pair, draw(2, 5, 4), copy_weights=False)
    assert found.culprit == "up_conv" and "weight has the axes of PyTorch in a" in found.cause, found.verdict
