"""Layers and functions of the MLX models. `icenet_torch.nn` has the same names with the same meaning."""

from __future__ import annotations

from icenet.nn.activations import activation, gated_activation
from icenet.nn.arrays import Dtype
from icenet.nn.attention import (
    Mask,
    biased_mask,
    by_distance,
    positions_and_masks,
    rotate,
    scaled_dot_product_attention,
)
from icenet.nn.checkpointing import checkpoint
from icenet.nn.conv import Conv2d, flatten_pixels, global_average_pool, max_pool, mean_of_patches
from icenet.nn.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from icenet.nn.experts import Experts, Router, balance_loss, route
from icenet.nn.linear import Bias, Embedding, Linear, Projections, join
from icenet.nn.loss import cross_entropy, linear_cross_entropy
from icenet.nn.norm import BatchNorm2d, LayerNorm, RMSNorm, make_norm
from icenet.nn.recurrent import GRU, LSTM, RNN
from icenet.nn.rotary import PositionTable, RotaryPositions
from icenet.nn.scheduling import cpu_prefill_columns, start

__all__ = [
    "BatchNorm2d",
    "Bias",
    "Conv2d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "Dtype",
    "Embedding",
    "Experts",
    "GRU",
    "LSTM",
    "LayerNorm",
    "Linear",
    "Mask",
    "PositionTable",
    "Projections",
    "RMSNorm",
    "RNN",
    "RotaryPositions",
    "Router",
    "activation",
    "balance_loss",
    "biased_mask",
    "by_distance",
    "checkpoint",
    "cpu_prefill_columns",
    "cross_entropy",
    "flatten_pixels",
    "gated_activation",
    "global_average_pool",
    "join",
    "linear_cross_entropy",
    "make_norm",
    "max_pool",
    "mean_of_patches",
    "positions_and_masks",
    "rotate",
    "route",
    "scaled_dot_product_attention",
    "start",
]
