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

    It has the attributes and the hooks of the layer. `weight` is a view in the layer's shape, for code that reads it;
    the parameter has the other shape.

    Args:
        layer: A linear layer, or a convolution for which `is_pointwise` is true.
        shape: The shape of the weight.
    """

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.__dict__.update({name: item for name, item in vars(layer).items() if name != "_parameters"})
        self._parameters["weight"] = nn.Parameter(layer.weight.detach().reshape(shape), layer.weight.requires_grad)
        self.bias = layer.bias
        self._shape = layer.weight.shape

    @property
    def weight(self) -> Tensor:
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter.reshape(self._shape)

    def forward(self, input: Tensor) -> Tensor:
        axes = len(self._shape)
        if axes == 2:
            return nn.functional.linear(input, self.weight, self.bias)
        function = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[axes - 3]
        return function(input, self.weight, self.bias)


def is_pointwise(layer: nn.Module, model: nn.Module) -> bool:
    """Returns whether a layer of PyTorch computes each position alone, with one matrix that no other module has.

    Args:
        layer: Any layer.
        model: The model that has the layer.
    """
    # the old spectral_norm and weight_norm compute the weight in such a hook
    if layer._forward_pre_hooks or type(layer) not in (nn.Linear, *_CONVOLUTIONS):
        return False
    if layer.weight._backward_hooks:  # they take the gradient in the shape of the layer
        return False
    held = [parameter for module in model.modules() for parameter in module._parameters.values()]
    if sum(parameter is layer.weight for parameter in held) > 1:
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
        for name, child in module._modules.items():  # at each place: named_children has a shared layer once
            if child is layer:
                module._modules[name] = new
    return new if not path else model
