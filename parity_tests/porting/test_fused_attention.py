"""Ports of attention with masks and heads that MLX's fused attention needs not be given."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn


class Attention(nn.Module):
    """Attention of 4 heads whose keys may have fewer, with a mask that a function makes from the scores' size."""

    def __init__(self, mask: Any = None, kv_heads: int = 4, repeat: Any = None) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 4 * kv_heads), nn.Linear(8, 8)
        self.mask, self.repeat = mask, repeat
        self.register_buffer("band", torch.ones(32, 32, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        b, t, d = x.shape
        q = self.q(x).view(b, t, 4, 2).transpose(1, 2)
        k, v = (y.view(b, t, -1, 2).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        if self.repeat is not None:
            k, v = self.repeat(k), self.repeat(v)
        mask = None if self.mask is None else self.mask(self, t, padding)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, t, d))


def places(t: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(t)[:, None], torch.arange(t)[None]


def window(size: int) -> Any:
    def mask(self: Any, t: int, padding: Any) -> torch.Tensor:
        i, j = places(t)
        return (j <= i) & (j > i - size)

    return mask


def from_positions(self: Any, t: int, padding: Any) -> torch.Tensor:
    i, j = places(t)
    return (j <= i)[None, None]


def from_minus_infinity(self: Any, t: int, padding: Any) -> torch.Tensor:
    return torch.full((t, t), float("-inf")).triu(1)


def from_smallest_number(self: Any, t: int, padding: Any) -> torch.Tensor:
    return torch.zeros(t, t).masked_fill(torch.ones(t, t).tril() == 0, torch.finfo(torch.float32).min)


def attends_to_itself_only(self: Any, t: int, padding: Any) -> torch.Tensor:
    return torch.eye(t, dtype=torch.bool)


def distances(t: int) -> torch.Tensor:
    i, j = places(t)
    return i - j


def within(is_near: Any) -> Any:
    """Returns a causal mask that hides keys which are not near, for positions beyond those of the example."""
    return lambda self, t, padding: (distances(t) >= 0) & is_near(distances(t), t)


FAR = {
    "two steps": lambda d, t: d - 20 - 20 < 20,
    "blocks of blocks": lambda d, t: (torch.arange(t) // 8 // 8)[:, None] == torch.arange(t) // 8 // 8,
    "factor": lambda d, t: d * 0.01 < 0.3,
    "logarithm": lambda d, t: (d.clamp(min=0) + 1).log2() < 5,
    "exponential": lambda d, t: torch.exp(-d.float()) > 1e-10,
    "wave": lambda d, t: torch.sin(d * 0.1) > -0.5,
    "bits": lambda d, t: (torch.arange(t) >> 5)[:, None] == torch.arange(t) >> 5,
    "part of the length": lambda d, t: d <= (t + 100) // 4,
    "share of the length": lambda d, t: d / t < 0.97,
    "bf16": lambda d, t: torch.arange(t).bfloat16()[:, None] >= torch.arange(t).bfloat16() + 1,
}


@pytest.mark.parametrize("name", FAR)
def test_masks_that_hide_keys_far_beyond_the_example_stay(name: str) -> None:
    torch.manual_seed(0)
    module = Attention(within(FAR[name])).eval()
    model, source = ported(module, torch.randn(2, 6, 8))
    assert '"causal"' not in source
    x = torch.randn(1, 150, 8)
    if name != "bf16":  # a row without keys
        close(model(mx.array(x.numpy())), module(x))


CAUSAL = [from_positions, from_minus_infinity, from_smallest_number]
OTHER = {
    "window of 3": window(3),
    "window beyond the example": window(60),
    "window that is too large to try": window(9000),
    "itself": attends_to_itself_only,
    "buffer": lambda self, t, padding: self.band[:t, :t],
    "anticausal": lambda self, t, padding: places(t)[0] <= places(t)[1],
    "float": lambda self, t, padding: (places(t)[0] - places(t)[1]).abs() * -0.5,
    "fewer points for later keys": lambda self, t, padding: torch.full((t, t), -3.0).triu(1),
    "strictly causal but one": lambda self, t, padding: places(t)[1] <= places(t)[0].clamp(min=1),
}


def agree(module: nn.Module, model: Any, lengths: tuple[int, ...] = (1, 5, 9)) -> None:
    for length in lengths:
        x = torch.randn(3, length, 8, generator=torch.Generator().manual_seed(length))
        close(model(mx.array(x.numpy())), module(x))


@pytest.mark.parametrize("mask", CAUSAL)
def test_a_mask_that_is_causal_at_every_length_is_mlx_s(mask: Any) -> None:
    torch.manual_seed(0)
    module = Attention(mask).eval()
    model, source = ported(module, torch.randn(2, 6, 8))
    assert 'mask="causal"' in source and "arange" not in source and "tri" not in source
    agree(module, model)


@pytest.mark.parametrize("name", OTHER)
def test_other_masks_stay(name: str) -> None:
    torch.manual_seed(0)
    module = Attention(OTHER[name]).eval()
    model, source = ported(module, torch.randn(2, 6, 8))
    assert '"causal"' not in source
    agree(module, model, (2, 9) if name == "window beyond the example" else (1, 2, 9))


def test_a_window_is_kept_where_it_hides_tokens() -> None:
    torch.manual_seed(0)
    module = Attention(window(60)).eval()
    agree(module, ported(module, torch.randn(2, 6, 8))[0], (70,))


def test_a_mask_that_hides_nothing_is_left_out() -> None:
    torch.manual_seed(0)
    module = Attention(lambda self, t, padding: torch.ones(t, t, dtype=torch.bool)).eval()
    model, source = ported(module, torch.randn(2, 6, 8))
    assert "mask" not in source
    agree(module, model)


def test_a_causal_mask_with_padding_stays() -> None:
    torch.manual_seed(0)
    module = Attention(lambda self, t, padding: self.band[:t, :t] & padding[:, None, None]).eval()
    x, padding = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    padding[1, 4:] = False
    model, source = ported(module, x, padding)
    assert '"causal"' not in source
    close(model(mx.array(x.numpy()), mx.array(padding.numpy())), module(x, padding))


def expanded(x: torch.Tensor) -> torch.Tensor:
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)


def tiled(x: torch.Tensor) -> torch.Tensor:
    b, h, t, d = x.shape
    return x[:, None].expand(b, 2, h, t, d).reshape(b, 2 * h, t, d)


@pytest.mark.parametrize(
    "repeat", [expanded, lambda x: x.repeat_interleave(2, dim=1), lambda x: x.repeat_interleave(2, -3)]
)
def test_heads_repeated_one_by_one_are_given_once(repeat: Any) -> None:
    torch.manual_seed(0)
    module = Attention(from_positions, kv_heads=2, repeat=repeat).eval()
    model, source = ported(module, torch.randn(2, 6, 8))
    assert "broadcast_to" not in source and "repeat" not in source and 'mask="causal"' in source
    agree(module, model)


@pytest.mark.parametrize("repeat", [tiled, lambda x: x.repeat(1, 2, 1, 1)])
def test_heads_in_another_order_stay(repeat: Any) -> None:
    torch.manual_seed(0)
    module = Attention(from_positions, kv_heads=2, repeat=repeat).eval()
    model, source = ported(module, torch.randn(2, 6, 8))
    assert "broadcast_to" in source or "tile" in source
    agree(module, model)
