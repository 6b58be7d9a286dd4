"""Linear layers and convolutions of size 1, which compute the same, with the weight of the other one.

A user writes `mlx.nn.Linear` for `torch.nn.Conv2d(n, m, 1)`, because MLX has the channels last. The weights have the
same values, but for axes of length 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Pointwise(nn.Module):
    """Computes what a layer does with a weight that has other axes of length 1 at its end.

    Args:
        layer: A linear layer, or a convolution for which `is_pointwise` is true.
        shape: The shape of the weight.
    """

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().reshape(shape), layer.weight.requires_grad)
        self.bias = layer.bias
        self.train(layer.training)
        self._axes = layer.weight.ndim

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.flatten(1)
        if self._axes == 2:
            return nn.functional.linear(input, weight, self.bias)
        function = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self._axes - 3]
        return function(input, weight.reshape(*weight.shape, *[1] * (self._axes - 2)), self.bias)


def is_pointwise(layer: nn.Module) -> bool:
    """Returns whether a layer of PyTorch computes each position alone, with one matrix and no hooks."""
    if layer._forward_pre_hooks or layer._forward_hooks or type(layer) not in (nn.Linear, *_CONVOLUTIONS):
        return False
    if isinstance(layer, nn.Linear):
        return True
    assert isinstance(layer, _CONVOLUTIONS)
    padding = layer.padding if isinstance(layer.padding, tuple) else (0,)
    return layer.groups == 1 and set(layer.kernel_size) == set(layer.stride) == {1} and set(padding) == {0}


def with_weight_shape(model: nn.Module, path: str, shape: tuple[int, ...]) -> nn.Module:
    """Returns a model with another shape of the weight of a layer, at all places that hold the layer.

    Args:
        model: The model, which is changed. A layer that is the model itself is not.
        path: The path of the layer, for which `is_pointwise` is true.
        shape: The shape of the weight, with the same values.
    """
    layer = model.get_submodule(path)
    assert isinstance(layer, (nn.Linear, *_CONVOLUTIONS))
    with torch.no_grad():
        new = Pointwise(layer, shape)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is layer:
                setattr(module, name, new)
    return new if not path else model
