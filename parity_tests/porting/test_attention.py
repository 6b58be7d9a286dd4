"""Ports of `nn.MultiheadAttention`: one class with PyTorch's parameters and MLX's fused attention."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from mlx.utils import tree_flatten
from torch import nn


class Attends(nn.Module):
    """Attention with options of the layer and of its call."""

    def __init__(self, given: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.given = given
        for parameter in self.attn.parameters():
            nn.init.normal_(parameter, 0.0, 0.5)  # PyTorch's biases are 0

    def forward(self, x: Any, y: Any, attn_mask: Any = None, key_padding_mask: Any = None) -> Any:
        h, weights = self.attn(x, y, y, attn_mask=attn_mask, key_padding_mask=key_padding_mask, **self.given)
        return h if weights is None else (h, weights)


PADDING = torch.tensor([[False, False, False, True], [False, True, False, True]])
HIDES_ALL = torch.tensor([[False, False, False, True], [True, False, False, True]])
"""With CAUSAL, the first query of the second row has no key."""
CAUSAL = torch.triu(torch.ones(3, 4, dtype=torch.bool), 1)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Any, Any]]] = {
    "plain": ({"need_weights": False}, {"batch_first": True}, (None, None)),
    "steps first, without biases": ({"need_weights": False}, {"bias": False}, (None, None)),
    "padding": ({"need_weights": False}, {"batch_first": True}, (None, PADDING)),
    "an addend": ({"need_weights": False}, {}, (torch.randn(3, 4), None)),
    "both, of booleans": ({"need_weights": False}, {"batch_first": True, "dropout": 0.1}, (CAUSAL, HIDES_ALL)),
    "both, of two kinds": ({"need_weights": False}, {"dropout": 0.1}, (torch.randn(4, 3, 4), PADDING.float())),
    "weights": ({}, {"batch_first": True, "dropout": 0.1}, (CAUSAL, None)),
    "weights of each head": ({"average_attn_weights": False}, {}, (torch.randn(3, 4), None)),
}


@pytest.mark.parametrize("case", CASES)
def test_options(case: str) -> None:
    torch.manual_seed(0)
    given, options, masks = CASES[case]
    module = Attends(given, **options)
    shapes = [(2, 3, 8), (2, 4, 8)] if options.get("batch_first") else [(3, 2, 8), (4, 2, 8)]
    inputs = [torch.randn(shape) for shape in shapes]
    model, source = ported(module, *inputs, *masks)
    assert ("mx.fast.scaled_dot_product_attention(" in source) == (given.get("need_weights") is False)
    if "dropout" in options:
        assert "self.attn = MultiheadAttention(8, 2, dropout=0.1)" in source
        module.attn.dropout, model.attn.dropout = 0.0, nn.Identity()
    for training in (False, True):
        module.train(training)
        model.train(training)
        ours = model(*(None if item is None else mx.array(item.numpy()) for item in (*inputs, *masks)))
        theirs = module(*inputs, *masks)
        for a, b in zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]:
            close(a, b)


def test_a_row_without_keys() -> None:
    """PyTorch's fused attention gives zeros for it, and that with weights NaN."""
    x, mask = torch.randn(2, 3, 8), torch.tensor([[True, True, True], [False, True, False]])
    for given in ({"need_weights": False}, {"need_weights": True}):
        module = Attends(given, batch_first=True).eval()
        model, _ = ported(module, x, x, None, mask)
        ours = model(mx.array(x.numpy()), mx.array(x.numpy()), None, mx.array(mask.numpy()))
        theirs = module(x, x, None, mask)
        close(*((ours, theirs) if isinstance(ours, mx.array) else (ours[0], theirs[0])))


def test_a_row_of_minus_infinity() -> None:
    """As one of booleans, a mask that an input adds to the scores may leave a query without keys."""
    x, mask = torch.randn(2, 3, 8), torch.randn(3, 3)
    mask[1] = -torch.inf
    module = Attends({"need_weights": False}, batch_first=True, dropout=0.1)
    model, source = ported(module, x, x, mask)
    assert source.count("biased_attention(") == 2
    module.attn.dropout, model.attn.dropout = 0.0, nn.Identity()
    for training in (False, True):
        module.train(training)
        model.train(training)
        close(model(mx.array(x.numpy()), mx.array(x.numpy()), mx.array(mask.numpy())), module(x, x, mask))


class Windowed(nn.Module):
    """Attention to a few keys before each query. MLX has a plain causal mask itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        hidden = torch.full((x.shape[1], x.shape[1]), -torch.inf)
        mask = hidden.triu(1) + hidden.tril(-3)
        return (
            F.scaled_dot_product_attention(q, k, v, mask if bias is None else mask + bias).transpose(1, 2).flatten(2)
        )


def test_only_masks_of_inputs_are_checked_for_empty_rows() -> None:
    x, bias = torch.randn(2, 3, 8), torch.tensor([[-torch.inf, 0.0, 0.0]]).expand(3, 3).clone()
    module = Windowed().eval()
    for inputs in ((x,), (x, bias)):
        model, source = ported(module, *inputs)
        assert ("biased_attention(" in source) == (len(inputs) == 2)
        close(model(*(mx.array(item.numpy()) for item in inputs)), module(*inputs))


TWO_CALLS: dict[str, Any] = {
    "with and without a mask": lambda attn, x, y, mask: (
        attn(x, x, x, attn_mask=mask, need_weights=False)[0],
        attn(x, x, x, need_weights=False)[0],
    ),
    "masks of two kinds": lambda attn, x, y, mask: (
        attn(x, x, x, attn_mask=mask, need_weights=False)[0],
        attn(x, x, x, attn_mask=mask * -2.0, need_weights=False)[0],
    ),
    "with a mask and with two": lambda attn, x, y, mask: (
        attn(x, x, x, key_padding_mask=mask[:2], attn_mask=mask, need_weights=False)[0],
        attn(x, x, x, key_padding_mask=mask[:2], need_weights=False)[0],
    ),
    "a query without a key is 0, and NaN": lambda attn, x, y, mask: (
        attn(x, x, x, attn_mask=mask, need_weights=False)[0],
        attn(x, x, x, attn_mask=mask)[0],
    ),
    "to itself and to another": lambda attn, x, y, mask: (attn(x, x, x)[0], attn(x, y, y)[0]),
}


class CalledTwice(nn.Module):
    def __init__(self, calls: Any) -> None:
        super().__init__()
        self.attn, self.calls = nn.MultiheadAttention(8, 2, batch_first=True), calls

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.calls(self.attn, x, y, mask)


@pytest.mark.parametrize("calls", TWO_CALLS)
def test_two_calls_of_one_attention(calls: str) -> None:
    torch.manual_seed(0)
    mask = torch.eye(3).bool()
    mask[1] = True
    module, inputs = CalledTwice(TWO_CALLS[calls]).eval(), (torch.randn(2, 3, 8), torch.randn(2, 4, 8), mask)
    model, _ = ported(module, *inputs)
    for ours, theirs in zip(model(*(mx.array(item.numpy()) for item in inputs)), module(*inputs), strict=True):
        close(ours, theirs)


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        decoder = nn.TransformerDecoderLayer(8, 4, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        memory = self.encoder(x, src_key_padding_mask=padding)
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        return self.decoder(y, memory, tgt_mask=mask, memory_key_padding_mask=padding)


def test_the_layers_of_a_transformer_share_classes() -> None:
    torch.manual_seed(0)
    module, inputs = Seq2Seq().eval(), (torch.randn(2, 4, 8), torch.randn(2, 3, 8), PADDING)
    model, source = ported(module, *inputs)
    classes = [line for line in source.splitlines() if line.startswith("class ") and "Attention" in line]
    assert classes == ["class MultiheadSelfAttention(nn.Module):", "class MultiheadAttention(nn.Module):"]
    assert "self.multihead_attn = MultiheadAttention(8, 4, dropout=0.1)" in source
    assert source.count("for layer in self.layers:") == 2
    close(model(*(mx.array(item.numpy()) for item in inputs)), module(*inputs))


def test_a_frozen_attention_stays_frozen() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False)
    model, _ = ported(nn.Sequential(encoder, nn.Linear(8, 2)), torch.randn(2, 4, 8))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert names == ["1.weight", "1.bias"]
