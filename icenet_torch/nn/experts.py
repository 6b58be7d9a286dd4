"""Experts: feed-forward networks side by side, of which each token uses a few, PyTorch."""

from __future__ import annotations

import sys
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from icenet.core.config.transformer_plan import ExpertsPlan, FeedForwardPlan
from icenet_torch.nn.activations import activation, gated_activation
from icenet_torch.nn.arrays import Array, cast_weight, is_half, product_dtype
from icenet_torch.nn.linear import Linear, linear


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

    def forward(self, x: Array) -> Array:
        return super().forward(x.float() if is_half(x) else x)


def route(scores: Array, plan: ExpertsPlan) -> tuple[Array, Array]:
    """Returns the weights and the indices of the experts with the largest scores, the largest first.

    Of equal scores, that of the first expert counts as larger, on both backends.

    Args:
        scores: `[..., E]`.
        plan: The number of experts, and whether the weights of those of a token add up to 1.

    Returns:
        Weights, the softmax of the scores, and indices, int `[..., experts of a token]`.
    """
    # not topk, which takes any of equal scores
    indices = scores.detach().sort(dim=-1, descending=True, stable=True)[1][..., : plan.per_token]
    if plan.normalize:
        return scores.gather(-1, indices).softmax(-1), indices
    return scores.softmax(-1).gather(-1, indices), indices


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
    rows = torch.cat([layer.reshape(-1, plan.total) for layer in scores])  # [N, E]
    if attention_mask is None:
        counted = rows.new_ones(len(rows), 1)
    else:
        counted = attention_mask.reshape(-1, 1).to(rows.dtype).tile(len(scores), 1)
    chosen = rows.detach().sort(dim=-1, descending=True, stable=True)[1][:, : plan.per_token]
    is_chosen = (chosen[..., None] == torch.arange(plan.total, device=rows.device)).any(dim=1)
    total = counted.sum().clamp(min=1)
    used = (is_chosen * counted).sum(0) / total
    probability = (rows.softmax(-1) * counted).sum(0) / total
    return plan.total * (used * probability).sum()


class StackedLinear(nn.Module):
    """The parameters of E linear layers of equal size: weight `[E, out, in]` and bias `[E, out]`."""

    layer_kind = "stacked_linear"
    can_quantize = True

    def __init__(
        self, count: int, in_features: int, out_features: int, bias: bool = True, init_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.zeros(count, out_features)) if bias else None)
        self.init_scale = init_scale


class Experts(nn.Module):
    """Feed-forward networks of equal size, of which each token uses some.

    The products are arranged in four ways. On recent NVIDIA GPUs and in bf16, one kernel multiplies the rows of all
    experts. Elsewhere a prompt or a training step sorts the tokens by expert and multiplies the rows of each. This
    needs the number of rows on the host, so that it cannot be captured. A decoding step takes the weights of the
    experts that it uses, or with many sequences multiplies all tokens with all experts, which reads each weight once.

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

    def forward(self, x: Array, weights: Array, indices: Array) -> Array:
        """Returns the weighted sum of the outputs of each token's experts.

        Args:
            x: `[B, T, D]`.
            weights: `[B, T, N]`, of the N experts of each token.
            indices: Their numbers, int `[B, T, N]`.
        """
        tokens, chosen = x.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])
        if _has_kernel(tokens, self.up_proj):
            products: _Products = _Grouped(tokens, chosen, self.count)
        elif self.training or x.shape[-2] > 1:
            # torch.compiler.disable imports the compiler, which takes seconds: only where something is compiled
            make = _sorted_untraced if "torch._dynamo" in sys.modules else _Sorted
            products = make(tokens, chosen, self.count)
        else:
            products = (_Gathered if chosen.numel() <= self.count else _Dense)(tokens, chosen, self.count)
        y = products.inputs
        if self.is_gated:
            inner = gated_activation(self.activation, products(self.gate_proj, y), products(self.up_proj, y))
        else:
            inner = activation(self.activation, products(self.up_proj, y))
        outputs = products.outputs(products(self.down_proj, inner))  # [B * T, N, D]
        mixed = (outputs.to(weights.dtype) * weights.reshape(*chosen.shape, 1)).sum(dim=1)
        return mixed.to(x.dtype).reshape(x.shape)


class _Products(Protocol):
    """An arrangement of rows for the products with the weights of experts.

    Args of the constructor: tokens `[T, D]`, the numbers of the experts of each, int `[T, N]`, and of all experts.
    """

    inputs: Array
    """The tokens as rows."""

    def __init__(self, tokens: Array, chosen: Array, count: int) -> None: ...

    def __call__(self, layer: StackedLinear, rows: Array) -> Array:
        """Returns the products of rows `[..., in]` with the weights of their experts, `[..., out]`."""
        ...

    def outputs(self, rows: Array) -> Array:
        """Returns rows as `[T, N, D]`."""
        ...


class _Sorted(_Products):
    """A row for each token and each of its experts, sorted by expert."""

    def __init__(self, tokens: Array, chosen: Array, count: int) -> None:
        self._shape = (*chosen.shape, -1)
        order = chosen.reshape(-1).argsort(stable=True)
        self._inverse = order.argsort()
        self._sizes: list[int] = chosen.reshape(-1).bincount(minlength=count).tolist()
        # each row is taken once, so that the gradients of a token's rows are added in a fixed order
        self.inputs = tokens[:, None].expand(*chosen.shape, -1).reshape(-1, tokens.shape[-1]).index_select(0, order)

    def __call__(self, layer: StackedLinear, rows: Array) -> Array:
        biases = [None] * len(self._sizes) if layer.bias is None else layer.bias.unbind()
        # unbind, because the gradient of weight[index] would have the size of all weights for each index
        parts = zip(rows.split(self._sizes), layer.weight.unbind(), biases, strict=True)
        return torch.cat([linear(part, weight, bias) for part, weight, bias in parts if len(part)])

    def outputs(self, rows: Array) -> Array:
        return rows.index_select(0, self._inverse).reshape(self._shape)


class _Grouped(_Products):
    """A row for each token and each of its experts, sorted by expert; one kernel for all of them."""

    def __init__(self, tokens: Array, chosen: Array, count: int) -> None:
        self._shape = (*chosen.shape, -1)
        experts, order = chosen.reshape(-1).sort(stable=True)
        self._inverse = order.argsort()
        self._is_of = experts[:, None] == torch.arange(count, device=tokens.device)  # [rows, E]
        self._ends = self._is_of.sum(0).cumsum(0).to(torch.int32)
        self.inputs = tokens[:, None].expand(*chosen.shape, -1).reshape(-1, tokens.shape[-1]).index_select(0, order)

    def __call__(self, layer: StackedLinear, rows: Array) -> Array:
        y = F.grouped_mm(rows, cast_weight(layer.weight, rows).mT, offs=self._ends)
        if layer.bias is not None:
            # a product, because the order in which the gradient of bias[experts] is summed is not fixed
            y = y + self._is_of.to(y.dtype) @ cast_weight(layer.bias, rows)
        return y

    def outputs(self, rows: Array) -> Array:
        return rows.index_select(0, self._inverse).reshape(self._shape)


def _has_kernel(x: Array, layer: StackedLinear) -> bool:
    """Returns whether PyTorch has a kernel for `_Grouped`. Otherwise its function may copy the sizes to the host."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")):
        return False
    fits = all(size % 8 == 0 for size in layer.weight.shape[1:])  # rows begin at multiples of 16 bytes
    return fits and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


class _Gathered(_Products):
    """A row for each token and each of its experts, with a copy of the expert's weights."""

    def __init__(self, tokens: Array, chosen: Array, count: int) -> None:
        self._shape = (*chosen.shape, -1)
        self._experts = chosen.reshape(-1)
        self.inputs = tokens[:, None].expand(*chosen.shape, -1).reshape(-1, tokens.shape[-1])

    def __call__(self, layer: StackedLinear, rows: Array) -> Array:
        weight = cast_weight(layer.weight.index_select(0, self._experts), rows)
        y = (rows.to(product_dtype(rows))[:, None] @ weight.mT)[:, 0]
        if layer.bias is not None:
            y = y + cast_weight(layer.bias.index_select(0, self._experts), rows)
        return y.to(rows.dtype)

    def outputs(self, rows: Array) -> Array:
        return rows.reshape(self._shape)


class _Dense(_Products):
    """A row for each expert and each token, `[E, T, ...]`."""

    def __init__(self, tokens: Array, chosen: Array, count: int) -> None:
        self._chosen = chosen
        self.inputs = tokens.expand(count, -1, -1)

    def __call__(self, layer: StackedLinear, rows: Array) -> Array:
        y = rows.to(product_dtype(rows)) @ cast_weight(layer.weight, rows).mT
        if layer.bias is not None:
            y = y + cast_weight(layer.bias, rows)[:, None]
        return y.to(rows.dtype)

    def outputs(self, rows: Array) -> Array:
        return rows[self._chosen, torch.arange(len(self._chosen), device=rows.device)[:, None]]


_sorted_untraced = torch._disable_dynamo(_Sorted)  # imports the compiler at its first call
