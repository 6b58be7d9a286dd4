"""CUDA kernel of activations and their gradients, MLX."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn.arrays import Array
from icenet.nn.training_kernels.common import THREADS

_ACTIVATION = """
    constexpr int N = VECTOR;
    struct alignas(sizeof(T) * N) Pack { T values[N]; };
    const long long index = blockIdx.x * 512LL + threadIdx.x;
    if (index * N >= x_shape[0]) return;
    Pack pack = reinterpret_cast<const Pack*>(x)[index];
    const Pack other = reinterpret_cast<const Pack*>(dy)[index];
    for (int i = 0; i < N; i++) {
      const float value = (float)pack.values[i];
      float y, slope;
      if (KIND == 0) {  // x * Phi(x)
        const float probability = 0.5f * (1.f + erff(value * 0.70710678118654752f));
        y = value * probability;
        slope = probability + value * 0.39894228040143268f * expf(-0.5f * value * value);
      } else if (KIND == 1) {
        const float t = tanhf(0.79788456080286536f * (value + 0.044715f * value * value * value));
        y = 0.5f * value * (1.f + t);
        slope = 0.5f * (1.f + t)
            + 0.5f * value * (1.f - t * t) * 0.79788456080286536f * (1.f + 0.134145f * value * value);
      } else if (KIND == 2) {
        const float gate = 1.f / (1.f + expf(-value));
        y = value * gate;
        slope = gate * (1.f + value * (1.f - gate));
      } else {
        y = value < 0.f ? 0.f : value;
        slope = value <= 0.f ? 0.f : 1.f;
      }
      pack.values[i] = (T)(GRADIENT ? slope * (float)other.values[i] : y);
    }
    reinterpret_cast<Pack*>(out)[index] = pack;
"""


def activation(name: str, x: Array) -> Array:
    """Computes `icenet.nn.activation` in fp32 and in one kernel, and its gradient in another."""

    @mx.custom_function
    def compute(x: Array) -> Array:
        return _run(name, x, x, False)

    @compute.vjp
    def gradient(x: Array, cotangent: Array, _: Array) -> Array:
        return activation_gradient(name, x, cotangent)

    y: Any = compute(x)
    return y  # type: ignore[no-any-return]


def activation_gradient(name: str, x: Array, cotangent: Array) -> Array:
    """Returns the gradient of x. For relu, x may be its result, too."""
    return _run(name, x, cotangent, True)


def _run(name: str, x: Array, dy: Array, is_gradient: bool) -> Array:
    packed = 16 // x.itemsize
    vector = packed if x.size % packed == 0 else 1
    [out] = _activation()(
        inputs=[x.reshape(-1), dy.reshape(-1)],
        template=[
            ("T", x.dtype),
            ("VECTOR", vector),
            ("KIND", _ACTIVATIONS.index(name)),
            ("GRADIENT", is_gradient),
        ],
        grid=(-(-x.size // vector), 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    result: Array = out
    return result


_ACTIVATIONS = ["gelu", "gelu_tanh", "silu", "relu"]


@lru_cache
def _activation() -> Any:
    return mx.fast.cuda_kernel("icenet_activation", ["x", "dy"], ["out"], _ACTIVATION)
