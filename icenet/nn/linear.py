"""Linear layers and embeddings, MLX."""

from __future__ import annotations

from collections.abc import Sequence

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.nn import cpu_products, exact, linear_kernels, one_row, training_kernels
from icenet.nn.arrays import Array, Dtype, array_of_parts, cast_weight, is_half, on_cpu, product_dtype
from icenet.nn.embedding import CheckedEmbedding
from icenet.nn.quantized import QuantizedLayer, join_parts, quantization_of, quantized_product, to_quantized


class Linear(nn.Linear):
    """A linear layer, x W^T + b: x `[..., in]` to `[..., out]`, in the dtype of x.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output. The weight is `[out, in]`, the bias `[out]`.
        bias: Whether the layer has a bias.
        init_scale: Factor of the weight's initial values (see `icenet.core.models.init`).
    """

    weight: Array
    bias: Array
    can_quantize = True
    quantized_type: type[QuantizedLayer]
    to_quantized = to_quantized
    _generates = False
    _row: one_row.Product | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_scale = init_scale

    def __call__(self, x: Array) -> Array:
        return linear(x, self["weight"], self.get("bias"), self._generates, self.get("_row"))

    def prepare_generation(self, original: Linear, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: casts the weight once and not at each token.

        Args:
            original: The layer of the model of which this one is the copy.
            dtype: Dtype of the activations.
        """
        self._generates = True
        self.weight = cast_for_products(original.weight, dtype)
        if "bias" in original:
            self.bias = cast_for_products(original.bias, dtype)
        self._row = one_row.make_product(self.weight, self.get("bias"))
        one_row.own_arrays(self, ("weight", "bias") if self._row else ())


class QuantizedLinear(QuantizedLayer, nn.QuantizedLinear):
    """A linear layer with a quantized weight, x W^T + b, in the dtype of x. It is made from a `Linear`."""

    layer_kind = "linear"
    bias: Array

    def __call__(self, x: Array) -> Array:
        return _add_bias(quantized_product(x, self), self.get("bias"))

    def prepare_generation(self, original: QuantizedLinear, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: casts scales and biases once and not at each token."""
        self._generates = True
        for name in ("scales", "biases"):
            self[name] = cast_for_products(original[name], _dtype_of_scales(original, dtype))
        if "bias" in original:
            self.bias = cast_for_products(original.bias, dtype)
        if self.weight is original.weight:  # otherwise the original has become a part of `QuantizedProjections`
            join_parts(self, [original])


Linear.quantized_type = QuantizedLinear


def cast_for_products(weight: Array, dtype: Dtype) -> Array:
    """Returns a weight in the dtype of the activations."""
    return weight if weight.dtype == dtype else weight.astype(dtype)


def _dtype_of_scales(layer: QuantizedLayer, dtype: Dtype) -> Dtype:
    """Returns the dtype of scales in generation. On a CPU, products are in fp32 and scales are not rounded."""
    return layer.scales.dtype if on_cpu() else dtype


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    generates: bool = False,
    row: one_row.Product | None = None,
) -> Array:
    """Computes x W^T + b: x `[..., in]`, weight `[out, in]`, bias `[out]` to `[..., out]` in the dtype of x.

    Args:
        generates: Whether there is no backward pass: a kernel without one is faster for few rows on CUDA.
        row: Weight and bias for one row, on a CPU.
    """
    if generates and on_cpu():
        return _linear_on_cpu(x, weight, bias, row)
    # one row without a bias is one operation of MLX, which is as fast
    if generates and (bias is not None or x.size > x.shape[-1]) and linear_kernels.can_compute(x, weight):
        return linear_kernels.fused_linear(x, weight, bias)
    y, w = x.astype(product_dtype(x)), cast_weight(weight, x).T
    if bias is None:
        return (y @ w).astype(x.dtype)
    if is_half(y) and training_kernels.is_worthwhile(y):
        return _linear_with_exact_bias(y, w.T, bias)  # type: ignore[return-value]  # MLX types the result as an object
    b = cast_weight(bias, x)
    if on_cpu():
        return exact.add_bias(y @ w, b).astype(x.dtype)
    if y.size == y.shape[-1] and mx.cuda.is_available():  # MLX has a kernel for one row; addmm calls cuBLAS, +15 us
        return y @ w + b
    return mx.addmm(b, y, w).astype(x.dtype)


def _linear_on_cpu(x: Array, weight: Array, bias: Array | None, row: one_row.Product | None) -> Array:
    """Computes the same as `linear`, without a backward pass, in as few operations as possible."""
    if row is not None and one_row.can_compute(x, row) and not cpu_products.can_compute(x, weight):
        return one_row.product(x, row)
    if cpu_products.can_compute_half(x, weight):
        return cpu_products.half_product(x, weight, bias).astype(x.dtype)
    y = x
    if x.dtype != weight.dtype or is_half(x):  # casts that change nothing take time, too
        y, weight = x.astype(product_dtype(x)), cast_weight(weight, x)
        bias = None if bias is None else cast_weight(bias, x)
    if cpu_products.can_compute(y, weight):
        y = cpu_products.product(y, weight, bias)
    else:
        y = y @ weight.T if bias is None else mx.addmm(bias, y, weight.T)
    return y if y.dtype == x.dtype else y.astype(x.dtype)


@mx.custom_function
def _linear_with_exact_bias(x: Array, weight: Array, bias: Array) -> Array:
    """Computes x W^T + b of half precision, with a gradient of the bias that is added up in fp32.

    MLX's CUDA adds it up in half precision. The bias is not cast before, so that its gradient needs no cast.
    """
    return mx.addmm(bias.astype(x.dtype), x, weight.T)


@_linear_with_exact_bias.vjp
def _gradients_of_linear(inputs: tuple[Array, ...], cotangent: Array, _: Array) -> tuple[Array, ...]:
    x, weight, bias = inputs
    rows, dy = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    d_bias = training_kernels.column_sums(dy).astype(bias.dtype)  # fp32 as a rule
    return (dy @ weight).reshape(x.shape), dy.T @ rows, d_bias


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
        self._row = one_row.make_product(self.weight, self.bias)

    def _join(self, layers: Sequence[nn.Module], name: str, dtype: Dtype) -> Array:
        whole = array_of_parts([layer[name] for layer in layers])
        joined = mx.concatenate([layer[name] for layer in layers]) if whole is None else whole
        cast = cast_for_products(joined, dtype) if mx.issubdtype(joined.dtype, mx.floating) else joined
        if cast is joined and whole is None:
            parts = [joined[start:end] for start, end in zip(self.ends, self.ends[1:], strict=False)]
            mx.eval(parts)
            for layer, part in zip(layers, parts, strict=True):
                layer[name] = part
        mx.eval(cast)
        return cast

    def __call__(self, x: Array) -> list[Array]:
        y = linear(x, self["weight"], self.get("bias"), True, self.get("_row"))
        return list(mx.split(y, self.ends[1:-1], axis=-1))


class QuantizedProjections(Projections, QuantizedLayer):
    """`Projections` of layers with quantized weights: the joined one has their packed rows after one another."""

    _generates = True

    def __init__(self, layers: Sequence[QuantizedLinear], dtype: Dtype) -> None:
        super().__init__(layers, dtype)
        self.bits, self.group_size = layers[0].bits, layers[0].group_size
        dtype = _dtype_of_scales(layers[0], dtype)
        self.scales, self.biases = (self._join(layers, name, dtype) for name in ("scales", "biases"))
        join_parts(self, layers)

    def __call__(self, x: Array) -> list[Array]:
        return list(mx.split(_add_bias(quantized_product(x, self), self.bias), self.ends[1:-1], axis=-1))


_JOINED: dict[type, type[Projections]] = {Linear: Projections, QuantizedLinear: QuantizedProjections}


def join(layers: Sequence[nn.Module], dtype: Dtype) -> Projections | None:
    """Returns several linear layers of the same input as one; None if they are not of one class and dtype.

    Args:
        layers: The layers, with the same number of inputs.
        dtype: Dtype of the activations.
    """
    joined = _JOINED.get(type(layers[0]))
    if joined is None or any(type(layer) is not type(layers[0]) for layer in layers):
        return None
    values = "scales" if joined is QuantizedProjections else "weight"
    kinds = {(layer[values].dtype, "bias" in layer, quantization_of(layer)) for layer in layers}
    return joined(layers, dtype) if len(kinds) == 1 else None


def _add_bias(y: Array, bias: Array | None) -> Array:
    """Returns y `[..., out]` with a bias `[out]`, if there is one, in the dtype of y."""
    if bias is None:
        return y
    b = cast_weight(bias, y)
    return (exact.add_bias(y, b) if on_cpu() else y + b).astype(y.dtype)


class Embedding(CheckedEmbedding):
    """A table of vectors: ids int `[...]` to `[..., D]`, in the dtype of the table.

    Args:
        num_embeddings: Number of rows V of the weight `[V, D]`.
        dims: D.
    """

    can_quantize = True
    quantized_type: type[QuantizedLayer]
    to_quantized = to_quantized

    def __init__(self, num_embeddings: int, dims: int) -> None:
        super().__init__(num_embeddings, dims)
        self._output_weight: Array | None = None  # that of `as_linear`, for generation

    def as_linear(self, x: Array) -> Array:
        """Returns logits `[..., V]` of x `[..., D]`, with the table as the weight of a linear layer."""
        if self._output_weight is None:
            return linear(x, self.weight)
        return linear(x, self._output_weight, generates=True)

    def prepare_generation(self, original: Embedding, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: casts the weight of `as_linear` once and not at each token.

        Args:
            original: The layer of the model of which this one is the copy.
            dtype: Dtype of the activations.
        """
        self._output_weight = cast_for_products(original.weight, dtype)


class QuantizedEmbedding(QuantizedLayer, nn.QuantizedEmbedding):
    """A table of quantized vectors: ids int `[...]` to `[..., D]`. It is made from an `Embedding`."""

    layer_kind = "embedding"

    def __call__(self, ids: Array) -> Array:
        weight, scales, biases = self.weight[ids], self.scales[ids], self.biases[ids]
        return mx.dequantize(weight, scales, biases, group_size=self.group_size, bits=self.bits)

    def as_linear(self, x: Array) -> Array:
        """Returns logits `[..., V]` of x `[..., D]`, with the table as the weight of a linear layer."""
        return quantized_product(x, self)

    def prepare_generation(self, original: QuantizedEmbedding, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: allows a product without a backward pass."""
        self._generates = True
        join_parts(self, [original])


Embedding.quantized_type = QuantizedEmbedding


class Bias(nn.Module):
    """A bias, x + b, in the dtype of x: that of a projection whose weight belongs to another layer.

    Args:
        features: Size of the last axis of x and of b.
    """

    layer_kind = "linear"

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = mx.zeros((features,))

    def __call__(self, x: Array) -> Array:
        return _add_bias(x, self.bias)
