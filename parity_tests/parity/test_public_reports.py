"""Public reports of ports to MLX whose results are not those of the original: the tool names the cause.

Each is a small pair with the mistake of the report. Those about optimizers, initial values and padding are in
test_causes.py.
"""

from __future__ import annotations

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


REPORTS: list[Callable[[], tuple[Pair, Any, str, str]]] = [
    glm_turns_all_values_of_a_head,
    llama_has_the_base_of_an_older_one,
    embeddings_are_means_in_place_of_the_first_token,
    a_group_norm_has_the_default_eps,
    gemma_has_the_exact_gelu,
    a_soft_cap_of_logits_is_left_out,
    an_encoder_layer_adds_what_is_not_normalized,
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.__name__)
def test_public_reports(report: Callable[[], tuple[Pair, Any, str, str]]) -> None:
    pair, given, path, words = report()
    randomized(pair.theirs)
    icenet.from_torch(pair.theirs, pair.ours)
    found = compare(*pair, given, copy_weights=False, stages=["forward"])
    assert found.culprit == path and words in found.cause, found.verdict
