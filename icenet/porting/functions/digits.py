"""Integers, the parts of floating-point numbers, and numbers of few bits."""

# The text of these functions is copied into ports, without types.
# mypy: ignore-errors

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.porting.functions.shapes import with_values


def gcd(a, b):
    """Returns the greatest common divisor of integers (Euclid)."""
    a, b = mx.broadcast_arrays(mx.abs(mx.array(a)), mx.abs(mx.array(b)))
    for _ in range(12 * a.dtype.size):  # at most 1.44 steps for each bit
        a, b = mx.where(b == 0, a, b), mx.where(b == 0, 0, a % mx.where(b == 0, 1, b))
    return a


def lcm(a, b):
    """Returns the least common multiple of integers."""
    divisor = gcd(a, b)
    return mx.where(divisor == 0, 0, mx.abs(a // mx.where(divisor == 0, 1, divisor) * b))


def frexp(x):
    """Returns the mantissas, of an absolute value in [0.5, 1), and the exponents of 2."""
    wide = mx.stop_gradient(x.astype(mx.float32))
    is_plain = mx.isfinite(wide) & (wide != 0)
    is_tiny = mx.abs(wide) < 2.0**-100
    bits = mx.view(mx.where(is_tiny, wide * 2.0**60, wide), mx.int32)
    exponent = mx.where(is_plain, ((bits >> 23) & 255) - 126 - mx.where(is_tiny, 60, 0), 0)
    half = exponent // 2
    two = mx.array(2.0, x.dtype)
    scaled = x * mx.power(two, -half.astype(x.dtype)) * mx.power(two, (half - exponent).astype(x.dtype))
    return scaled, exponent


def nextafter(a, b):
    """Returns the next number after a in the direction of b."""
    x, b = mx.broadcast_arrays(a, b)
    a, b = mx.stop_gradient(x), mx.stop_gradient(b)
    kind = {4: mx.int32, 2: mx.int16}[a.dtype.size]
    bits = mx.view(a, kind)
    step = mx.where((a < b) == (a > 0), 1, -1).astype(kind)
    smallest = mx.where(b > 0, mx.array(1, kind), mx.array(1 - 2 ** (8 * a.dtype.size - 1), kind))
    moved = mx.view(mx.where(a == 0, smallest, bits + step), a.dtype)
    x = mx.where(mx.isfinite(x), x, 0)
    return with_values(x, mx.where(mx.isnan(a) | mx.isnan(b), a + b, mx.where(a == b, b, moved)))


def fake_quantize(x, scale, zero_point, low, high, axis=None):
    """Returns the nearest of the numbers (q - zero_point) * scale, with the gradient of x where q is in range."""
    scale = mx.stop_gradient(scale)
    if axis is not None:
        shape = [-1 if number == axis % x.ndim else 1 for number in range(x.ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    q = mx.round(mx.stop_gradient(x) * (1 / scale)) + zero_point
    inside = (q >= low) & (q <= high)
    return with_values(mx.where(inside, x, 0), (mx.clip(q, low, high) - zero_point) * scale)
