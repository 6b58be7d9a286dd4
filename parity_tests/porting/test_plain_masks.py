"""Masks that transformers computes element by element at their indices, as a person writes them."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn


class Masked(nn.Module):
    """The mask of `transformers.masking_utils.sdpa_mask`, causal or of the padding alone."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.out, self.is_causal = nn.Linear(4, 4), is_causal

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        rows = torch.arange(batch)[:, None, None, None]
        queries, keys = torch.arange(length)[None, None, :, None], torch.arange(length)[None, None, None]
        mask = queries.new_ones((), dtype=torch.bool)
        mask = mask & (keys <= queries if self.is_causal else queries >= 0)
        mask = (mask & padding.bool()[rows, keys]).expand(batch, -1, length, length)
        heads = x.view(batch, length, 2, 2).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(heads, heads, heads, mask).transpose(1, 2).reshape(x.shape))


class Diagonal(nn.Module):
    """Indices that are no whole axes in their order."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n = torch.arange(x.shape[0])
        rows, columns = n[:, None], n[None]
        return x[n, n], x[columns, rows], x[rows, columns + 0], x[n[1:, None], columns], (rows >= 0) & (x > 0)


def test_masks_have_no_indices_of_whole_ranges() -> None:
    x, padding = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for is_causal, expected in ((True, "mask = keys <= queries[:, None]"), (False, "mask = padding")):
        theirs = Masked(is_causal)
        ours, source = ported(theirs, x, padding)
        assert expected in source and "[:B, None, None, :T]" in source and "arange(B)" not in source, source
        assert "mx.ones" not in source and ("arange" in source) == is_causal
        for other, mask in ((x, padding), (torch.randn(3, 7, 4), torch.arange(21).view(3, 7) % 4)):
            close(ours(mx.array(other.numpy()), mx.array(mask.numpy())), theirs(other, mask))


def test_other_indices_stay() -> None:
    x = torch.randn(4, 4)
    ours, _ = ported(Diagonal(), x)
    for mine, value in zip(ours(mx.array(x.numpy())), Diagonal()(x), strict=True):
        assert mine.shape == tuple(value.shape)
        close(mine, value)
