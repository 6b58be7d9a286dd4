"""Experts: feed-forward networks side by side, of which each token uses a few, MLX."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn

from icenet.core.config.transformer_plan import ExpertsPlan, FeedForwardPlan
from icenet.nn import exact
from icenet.nn.activations import activation, gated_activation
from icenet.nn.arrays import Array, cast_weight, is_half, on_cpu, product_dtype
from icenet.nn.linear import Linear
from icenet.nn.quantized import QuantizedLayer, to_quantized


class Router(Linear):
    """A linear layer without bias that scores experts, in fp32: in half precision many scores would be equal.

    x `[..., D]` of any floating dtype to scores `[..., E]` in fp32.

    Args:
        width: D.
        count: E, the number of experts.
    """

    can_quantize = False  # it is small, and its scores decide which weights are read

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width, count, bias=False)

    def __call__(self, x: Array) -> Array:
        return super().__call__(x.astype(mx.float32) if is_half(x) else x)


def route(scores: Array, plan: ExpertsPlan) -> tuple[Array, Array]:
    """Returns the weights and the indices of the experts with the largest scores, the largest first.

    Of equal scores, that of the first expert counts as larger, on both backends.

    Args:
        scores: `[..., E]`.
        plan: The number of experts, and whether the weights of those of a token add up to 1.

    Returns:
        Weights, the softmax of the scores, and indices, int `[..., experts of a token]`.
    """
    # not argpartition, which takes any of equal scores
    indices = mx.argsort(-mx.stop_gradient(scores), axis=-1)[..., : plan.per_token]
    if plan.normalize:
        return mx.softmax(mx.take_along_axis(scores, indices, axis=-1), axis=-1, precise=True), indices
    return mx.take_along_axis(mx.softmax(scores, axis=-1, precise=True), indices, axis=-1), indices


def balance_loss(scores: list[Array], plan: ExpertsPlan, attention_mask: Array | None = None) -> Array:
    """Returns the loss that is 1 if each expert gets the same number of tokens, and larger otherwise.

    E * sum over experts of (number of tokens that use it) / N * (mean probability of it), where N counts the tokens
    of all layers. Gradients are those of the probabilities only.

    Source: equations 4 to 6 of Fedus et al., "Switch Transformers", 2021, over all layers together, as
    `load_balancing_loss_func` of `transformers` computes it.

    Args:
        scores: Scores of the router of each layer, `[B, T, E]`.
        plan: The number of experts of a token.
        attention_mask: `[B, T]`, 0 or False for padding, which is not counted.
    """
    rows = mx.concatenate([layer.reshape(-1, plan.total) for layer in scores])  # [N, E]
    if attention_mask is None:
        counted = mx.ones((len(rows), 1), rows.dtype)
    else:
        counted = mx.tile(attention_mask.reshape(-1, 1).astype(rows.dtype), (len(scores), 1))
    chosen = mx.argsort(-mx.stop_gradient(rows), axis=-1)[:, : plan.per_token]
    is_chosen = (chosen[..., None] == mx.arange(plan.total)).any(axis=1)
    total = mx.maximum(counted.sum(), 1)
    used = exact.channel_sums(is_chosen * counted) / total
    probability = exact.channel_sums(mx.softmax(rows, axis=-1, precise=True) * counted) / total
    return plan.total * (used * probability).sum()


class StackedLinear(nn.Module):
    """The parameters of E linear layers of equal size: weight `[E, out, in]` and bias `[E, out]`."""

    layer_kind = "stacked_linear"
    can_quantize = True
    quantized_type: type[QuantizedLayer]
    to_quantized = to_quantized

    def __init__(
        self, count: int, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = mx.zeros((count, out_features, in_features))
        if bias:
            self.bias = mx.zeros((count, out_features))
        self.init_scale = init_scale


class QuantizedStackedLinear(QuantizedLayer):
    """The parameters of a `StackedLinear` with quantized weights."""

    layer_kind = "stacked_linear"


StackedLinear.quantized_type = QuantizedStackedLinear


class Experts(nn.Module):
    """Feed-forward networks of equal size, of which each token uses some.

    If there are more rows than experts, they are sorted by expert, so that each weight is read once. In training they
    always are, because the gradient of unsorted ones has the size of a weight for each row.

    Args:
        plan: Sizes and activation of each network.
        experts: The number of experts.
    """

    def __init__(self, plan: FeedForwardPlan, experts: ExpertsPlan) -> None:
        super().__init__()
        self.activation = plan.activation
        self.is_gated = plan.is_gated
        self.count = experts.total
        if plan.is_gated:
            self.gate_proj = StackedLinear(experts.total, plan.width, plan.inner, plan.bias)
        self.up_proj = StackedLinear(experts.total, plan.width, plan.inner, plan.bias)
        self.down_proj = StackedLinear(experts.total, plan.inner, plan.width, plan.bias, plan.init_scale)

    def __call__(self, x: Array, weights: Array, indices: Array) -> Array:
        """Returns the weighted sum of the outputs of each token's experts.

        Args:
            x: `[B, T, D]`.
            weights: `[B, T, N]`, of the N experts of each token.
            indices: Their numbers, int `[B, T, N]`.
        """
        tokens, chosen = x.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])
        products = _Products(tokens, chosen, self.count, is_sorted=self.training or chosen.size > self.count)
        y = products.inputs
        if self.is_gated:
            inner = gated_activation(self.activation, products(self.gate_proj, y), products(self.up_proj, y))
        else:
            inner = activation(self.activation, products(self.up_proj, y))
        outputs = products.outputs(products(self.down_proj, inner))  # [B * T, N, D]
        mixed = (outputs.astype(weights.dtype) * weights.reshape(*chosen.shape, 1)).sum(axis=1)
        return mixed.astype(x.dtype).reshape(x.shape)


class _Products:
    """Products with the weights of experts: a row for each token and each of its experts.

    Args:
        tokens: `[T, D]`.
        chosen: The numbers of the experts of each token, int `[T, N]`.
        count: The number of experts.
        is_sorted: Whether the rows are sorted by expert.
    """

    def __init__(self, tokens: Array, chosen: Array, count: int, is_sorted: bool) -> None:
        self._shape, self._count, self._is_sorted = (*chosen.shape, -1), count, is_sorted
        self._experts = chosen.reshape(-1)
        repeated = mx.broadcast_to(tokens[:, None], (*chosen.shape, tokens.shape[-1]))
        # contiguous: MLX's CUDA build (0.32.4) misreads rows of stride 0 in the gradient of a product
        self.inputs = mx.contiguous(repeated).reshape(-1, tokens.shape[-1])
        if is_sorted:
            order = mx.argsort(self._experts)
            self._inverse = mx.argsort(order)
            self._experts, self.inputs = self._experts[order], self.inputs[order]

    def __call__(self, layer: StackedLinear | QuantizedStackedLinear, rows: Array) -> Array:
        """Returns the products of rows `[..., in]` with the weights of their experts, `[..., out]`."""
        # not rows[:, None], whose strides MLX's CUDA build (0.32.4) misreads for sorted indices
        x = rows.astype(product_dtype(rows)).reshape(-1, 1, rows.shape[-1])
        if isinstance(layer, QuantizedStackedLinear):
            y = mx.gather_qmm(
                x,
                layer.weight,
                layer.scales.astype(x.dtype),
                layer.biases.astype(x.dtype),
                rhs_indices=self._experts,
                group_size=layer.group_size,
                bits=layer.bits,
                sorted_indices=self._is_sorted,
            )
        elif on_cpu() and is_half(rows) and not self._is_sorted:  # all weights would be cast
            y = x @ cast_weight(layer.weight[self._experts], rows).swapaxes(1, 2)
        else:
            weight = cast_weight(layer.weight, rows).swapaxes(1, 2)
            y = mx.gather_mm(x, weight, rhs_indices=self._experts, sorted_indices=self._is_sorted)
        y = y.reshape(-1, y.shape[-1])
        if "bias" in layer:
            # a product, because MLX sums the gradient of bias[experts] term by term
            chosen = self._experts[:, None] == mx.arange(self._count)
            y = y + chosen.astype(y.dtype) @ cast_weight(layer.bias, rows)
        return y.astype(rows.dtype)

    def outputs(self, rows: Array) -> Array:
        """Returns rows as `[T, N, D]`."""
        rows = rows[self._inverse] if self._is_sorted else rows
        return rows.reshape(self._shape)
