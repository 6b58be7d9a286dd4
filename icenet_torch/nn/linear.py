"""Linear layers and embeddings, PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from icenet_torch.nn import cpu_products
from icenet_torch.nn.arrays import Array, Dtype, cast_weight, product_dtype
from icenet_torch.nn.embedding import CheckedEmbedding
from icenet_torch.nn.quantized import QuantizedLayer, dequantized, quantization_of, quantized_product


class Linear(nn.Linear):
    """A linear layer, x W^T + b: x `[..., in]` to `[..., out]`, in the dtype of x.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output. The weight is `[out, in]`, the bias `[out]`.
        bias: Whether the layer has a bias.
        init_scale: Factor of the weight's initial values (see `icenet.core.models.init`).
    """

    weight: nn.Parameter
    bias: nn.Parameter
    can_quantize = True
    quantized_type: type[QuantizedLayer]
    _generates = False

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.init_scale = init_scale

    def reset_parameters(self) -> None:
        """Does nothing: initial values come from `icenet.core.models.init`."""

    def forward(self, x: Array) -> Array:
        return linear(x, self.weight, self.bias, self._generates)

    def prepare_generation(self, original: Linear, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: casts the weight once and not at each token.

        Args:
            original: The layer of the model of which this one is the copy.
            dtype: Dtype of the activations.
        """
        self._generates = True
        self.weight = cast_for_products(original.weight, dtype)
        if original.bias is not None:
            self.bias = cast_for_products(original.bias, dtype)


class QuantizedLinear(QuantizedLayer):
    """A linear layer with a quantized weight, x W^T + b, in the dtype of x. It is made from a `Linear`."""

    layer_kind = "linear"
    bias: nn.Parameter | None

    def forward(self, x: Array) -> Array:
        return _add_bias(quantized_product(x, self), self.bias)

    def prepare_generation(self, original: QuantizedLinear, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: makes the weight in the layout of PyTorch's product."""
        self.prepare_product()


Linear.quantized_type = QuantizedLinear


def cast_for_products(weight: nn.Parameter, dtype: Dtype) -> nn.Parameter:
    """Returns a weight in the dtype of the activations."""
    if weight.dtype == dtype:
        return weight
    return nn.Parameter(weight.detach().to(dtype), requires_grad=False)


def linear(x: Array, weight: Array, bias: Array | None = None, generates: bool = False) -> Array:
    """Computes x W^T + b: x `[..., in]`, weight `[out, in]`, bias `[out]` to `[..., out]` in the dtype of x.

    Args:
        generates: Whether there is no backward pass: products without one are faster on a CPU.
    """
    if x.dtype == weight.dtype and x.dtype == product_dtype(x):  # casts that change nothing take 1 us each
        bias = None if bias is None else bias.to(x.dtype)
        if generates and cpu_products.can_compute(x, weight):
            return cpu_products.product(x, weight, bias)
        return F.linear(x, weight, bias)
    if generates and cpu_products.can_compute_half(x, weight):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y, w = x.to(product_dtype(x)), cast_weight(weight, x)
    return F.linear(y, w, None if bias is None else cast_weight(bias, x)).to(x.dtype)


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
        self.sizes = [layer.weight.shape[0] for layer in layers]
        self.weight = self._join(layers, "weight", dtype)
        self.bias = self._join(layers, "bias", dtype) if layers[0].bias is not None else None

    def _join(self, layers: Sequence[Linear], name: str, dtype: Dtype) -> nn.Parameter:
        arrays = [getattr(layer, name) for layer in layers]
        joined = nn.Parameter(torch.cat([array.detach() for array in arrays]), requires_grad=False)
        cast = cast_for_products(joined, dtype)
        if cast is joined:
            for array, part in zip(arrays, joined.detach().split(self.sizes), strict=True):
                array.data = part
        return cast

    def forward(self, x: Array) -> tuple[Array, ...]:
        # not Tensor.split, whose Python code takes 1.5 us
        return torch.split_with_sizes(linear(x, self.weight, self.bias, generates=True), self.sizes, dim=-1)


class QuantizedProjections(QuantizedLayer):
    """`Projections` of layers with quantized weights: the joined one has their packed rows after one another."""

    def __init__(self, layers: Sequence[QuantizedLinear], dtype: Dtype) -> None:
        super().__init__()
        self.bits, self.group_size = layers[0].bits, layers[0].group_size
        self.sizes = [layer.weight.shape[0] for layer in layers]
        self.weight, self.scales, self.biases = (self._join(layers, name) for name in ("weight", "scales", "biases"))
        self.bias = self._join(layers, "bias") if layers[0].bias is not None else None
        self.prepare_product()

    def _join(self, layers: Sequence[QuantizedLinear], name: str) -> Array:
        arrays = [getattr(layer, name).detach() for layer in layers]
        if name == "weight":  # PyTorch has few operations for uint32
            joined = torch.cat([array.view(torch.int32) for array in arrays]).view(torch.uint32)
        else:
            joined = torch.cat(arrays)
        for layer, part in zip(layers, joined.split(self.sizes), strict=True):
            getattr(layer, name).data = part
        return joined

    def forward(self, x: Array) -> tuple[Array, ...]:
        return _add_bias(quantized_product(x, self), self.bias).split(self.sizes, dim=-1)


_JOINED: dict[type, type] = {Linear: Projections, QuantizedLinear: QuantizedProjections}


def join(layers: Sequence[nn.Module], dtype: Dtype) -> Projections | QuantizedProjections | None:
    """Returns several linear layers of the same input as one; None if they are not of one class and dtype.

    Args:
        layers: The layers, with the same number of inputs.
        dtype: Dtype of the activations.
    """
    joined = _JOINED.get(type(layers[0]))
    if joined is None or any(type(layer) is not type(layers[0]) for layer in layers):
        return None
    values = "scales" if joined is QuantizedProjections else "weight"
    kinds = {(getattr(layer, values).dtype, layer.bias is None, quantization_of(layer)) for layer in layers}
    return joined(layers, dtype) if len(kinds) == 1 else None  # type: ignore[no-any-return]


def _add_bias(y: Array, bias: Array | None) -> Array:
    """Returns y `[..., out]` with a bias `[out]`, if there is one, in the dtype of y."""
    return y if bias is None else y + bias.to(y.dtype)


class Embedding(CheckedEmbedding):
    """A table of vectors: ids int `[...]` to `[..., D]`, in the dtype of the table.

    Args:
        num_embeddings: Number of rows V of the weight `[V, D]`.
        dims: D.
    """

    can_quantize = True
    quantized_type: type[QuantizedLayer]

    def __init__(self, num_embeddings: int, dims: int) -> None:
        super().__init__(num_embeddings, dims)
        self._output_weight: nn.Parameter | None = None  # that of `as_linear`, for generation

    def reset_parameters(self) -> None:
        """Does nothing: initial values come from `icenet.core.models.init`."""

    def forward(self, ids: Array) -> Array:
        # as MLX, which takes integers of all sizes; PyTorch's function takes these two
        return super().forward(ids if ids.dtype in (torch.int32, torch.int64) else ids.long())

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


class QuantizedEmbedding(QuantizedLayer):
    """A table of quantized vectors: ids int `[...]` to `[..., D]`. It is made from an `Embedding`."""

    layer_kind = "embedding"

    def forward(self, ids: Array) -> Array:
        return dequantized(self, self.scales.dtype, ids)

    def as_linear(self, x: Array) -> Array:
        """Returns logits `[..., V]` of x `[..., D]`, with the table as the weight of a linear layer."""
        return quantized_product(x, self)

    def prepare_generation(self, original: QuantizedEmbedding, dtype: Dtype) -> None:
        """See `icenet.core.generation.copies`: makes the weight in the layout of PyTorch's product."""
        self.prepare_product()


Embedding.quantized_type = QuantizedEmbedding


class Bias(nn.Module):
    """A bias, x + b, in the dtype of x: that of a projection whose weight belongs to another layer.

    Args:
        features: Size of the last axis of x and of b.
    """

    layer_kind = "linear"

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Array) -> Array:
        return _add_bias(x, self.bias)
