"""Linear layers and embeddings, MLX."""

from __future__ import annotations

from collections.abc import Sequence

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn import exact
from icenet.nn.arrays import Array, Dtype, cast_weight, on_cpu, product_dtype
from icenet.nn.embedding import CheckedEmbedding


class Linear(nn.Linear):
    """A linear layer, x W^T + b, in the dtype of x.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        bias: Whether the layer has a bias.
        init_scale: Factor of the weight's initial values (see `icenet.core.models.init`).
    """

    weight: Array
    bias: Array

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_scale = init_scale

    def __call__(self, x: Array) -> Array:
        return linear(x, self.weight, self.get("bias"))

    def prepare_generation(self, original: Linear, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: casts the weight once and not at each token."""
        self.weight = cast_for_products(original.weight, dtype)
        if "bias" in original:
            self.bias = cast_for_products(original.bias, dtype)


def cast_for_products(weight: Array, dtype: Dtype) -> Array:
    """Returns a weight in the dtype of the activations if products have that dtype, otherwise as it is."""
    return weight if on_cpu() or weight.dtype == dtype else weight.astype(dtype)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Computes x W^T + b: x `[..., in]`, weight `[out, in]`, bias `[out]` to `[..., out]` in the dtype of x."""
    y, w = x.astype(product_dtype(x)), cast_weight(weight, x).T
    if bias is None:
        return (y @ w).astype(x.dtype)
    b = cast_weight(bias, x)
    if on_cpu():
        return exact.add_bias(y @ w, b).astype(x.dtype)
    if y.size == y.shape[-1] and mx.cuda.is_available():  # MLX has a kernel for one row; addmm calls cuBLAS, +15 us
        return y @ w + b
    return mx.addmm(b, y, w).astype(x.dtype)


class Projections(nn.Module):
    """Several linear layers of the same input, computed as one product.

    For one token, the time of a product is that of reading its weights and of starting it.

    Args:
        layers: The layers. If the products have the dtype of their weights, the weights become parts of the joined
            one, so that they are in memory once.
        dtype: Dtype of the activations.
    """

    def __init__(self, layers: Sequence[Linear], dtype: Dtype) -> None:
        super().__init__()
        self.ends = [0]
        for layer in layers:
            self.ends.append(self.ends[-1] + layer.weight.shape[0])
        self.weight = self._join(layers, "weight", dtype)
        self.bias = self._join(layers, "bias", dtype) if "bias" in layers[0] else None

    def _join(self, layers: Sequence[Linear], name: str, dtype: Dtype) -> Array:
        joined = mx.concatenate([layer[name] for layer in layers])
        cast = cast_for_products(joined, dtype)
        if cast is joined:
            parts = [joined[start:end] for start, end in zip(self.ends, self.ends[1:], strict=False)]
            mx.eval(parts)
            for layer, part in zip(layers, parts, strict=True):
                layer[name] = part
        mx.eval(cast)
        return cast

    def __call__(self, x: Array) -> list[Array]:
        return list(mx.split(linear(x, self.weight, self.bias), self.ends[1:-1], axis=-1))


def join(layers: Sequence[nn.Module], dtype: Dtype) -> Projections | None:
    """Returns several linear layers of the same input as one; None if a layer is of another class or dtype."""
    kinds = {(type(layer), layer.weight.dtype, "bias" in layer) for layer in layers if isinstance(layer, Linear)}
    same = len(kinds) == 1 and all(type(layer) is Linear for layer in layers)
    return Projections(layers, dtype) if same else None  # type: ignore[arg-type]


class Embedding(CheckedEmbedding):
    """A table of vectors: ids int `[...]` to `[..., D]`."""

    def __init__(self, num_embeddings: int, dims: int) -> None:
        super().__init__(num_embeddings, dims)
        self._output_weight: Array | None = None  # that of `as_linear`, for generation

    def as_linear(self, x: Array) -> Array:
        """Returns logits `[..., V]` of x `[..., D]`, with the table as the weight of a linear layer."""
        return linear(x, self.weight if self._output_weight is None else self._output_weight)

    def prepare_generation(self, original: Embedding, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: casts the weight of `as_linear` once and not at each token."""
        self._output_weight = cast_for_products(original.weight, dtype)


class Bias(nn.Module):
    """A bias, x + b, in the dtype of x: that of a projection whose weight belongs to another layer."""

    layer_kind = "linear"

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = mx.zeros((features,))

    def __call__(self, x: Array) -> Array:
        b = cast_weight(self.bias, x)
        return (exact.add_bias(x, b) if on_cpu() else x + b).astype(x.dtype)
