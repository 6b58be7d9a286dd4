"""Sums that need care to be exact to the last bits, MLX."""

from __future__ import annotations

import math

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array, on_cpu


def _channel_sums(x: Array) -> Array:
    """Sums over all but the last axis, `[..., C]` to `[C]`.

    On a CPU they are taken in fp64, as PyTorch takes them; of many values but for the first eight, which makes them
    3 to 6 times more exact than the two stages of `linear` at about their cost. All in fp64 they would be up to
    three times as exact again, and a training step a tenth slower.
    """
    positions = x.size // x.shape[-1]
    if on_cpu():
        most = 8 if positions > 2048 else 1
        group = next(n for n in range(most, 0, -1) if positions % n == 0)
        sums = x.reshape(-1, group, x.shape[-1])
        sums = sums.sum(axis=1) if group > 1 else sums[:, 0]
        return sums.astype(mx.float64).sum(axis=0).astype(x.dtype)
    group = next(n for n in range(math.isqrt(positions), 0, -1) if positions % n == 0)
    return x.reshape(group, -1, x.shape[-1]).sum(axis=0).sum(axis=0)


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each channel, `[..., C]` to `[C]`; the mean is taken twice, as the loss's is."""
    share = x.shape[-1] / x.size
    rough = _channel_sums(x) * share
    rest = x - rough
    left = _channel_sums(rest) * share
    return rough + left, _channel_sums(mx.square(rest)) * share - mx.square(left)


@mx.custom_function
def _normalize(x: Array, weight: Array, bias: Array, mean: Array, scale: Array) -> Array:
    """weight (x - mean) scale + bias, where mean and scale = 1 / deviation are those of x's own channels."""
    return (x - mean) * (scale * weight) + bias


@_normalize.vjp
def _normalize_gradient(inputs: tuple[Array, ...], cotangent: Array, _: Array) -> tuple[Array, ...]:
    # written out: differentiating through mean and variance doubles the passes over the images
    x, weight, _, mean, scale = inputs
    normal = (x - mean) * scale
    bias_gradient, weight_gradient = _channel_sums(cotangent), _channel_sums(cotangent * normal)
    share = x.shape[-1] / x.size
    inner = cotangent - (bias_gradient + normal * weight_gradient) * share
    zeros = mx.zeros_like(mean)
    return inner * (weight * scale), weight_gradient, bias_gradient, zeros, zeros


@mx.custom_function
def _scale_and_shift(x: Array, scale: Array, shift: Array) -> Array:
    return x * scale + shift


@_scale_and_shift.vjp
def _scale_and_shift_gradient(inputs: tuple[Array, ...], cotangent: Array, _: Array) -> tuple[Array, ...]:
    x, scale, _ = inputs
    return cotangent * scale, _channel_sums(cotangent * x), _channel_sums(cotangent)


def gradient_norms(gradients: list[Array]) -> tuple[Array, Array]:
    """The Euclidean norm of all gradients together, and of each, `[N]`; fp32.

    Summed row by row first: one long sum in fp32 is off by 1e-5 over 1e7 values in MLX.
    """
    rows = [mx.square(gradient.astype(mx.float32)).sum(axis=-1) for gradient in gradients]
    squares = mx.stack([row.sum() for row in rows])
    return mx.sqrt(squares.sum()), mx.sqrt(squares)
