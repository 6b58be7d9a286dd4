"""The base class of all MLX models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from icenet.core.config import ModelConfig
from icenet.core.generation.request import Tokens
from icenet.core.models.base import ModelBase
from icenet.core.weights import layout
from icenet.generation.decoder import Decoder
from icenet.nn import tree
from icenet.nn.arrays import from_numpy, to_numpy
from icenet.nn.dropout import key_dropouts


class BaseModel(ModelBase, nn.Module):
    """The base class of all models. A subclass defines its layers in `__init__`, and `forward`.

    If `__init__` ends with `self.init_weights(seed)`, the initial values are the same on both backends.

    Args:
        config: The model section of the configuration.

    Attributes:
        device: Device that computes the model. None, for a model that `icenet.build` did not make, is MLX's default.
    """

    backend = "mlx"
    decoder_type = Decoder
    array_type = mx.array
    device: mx.Device | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = mx.float32
        self.gradient_checkpointing = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with self.arithmetic():
            return self.forward(*inputs, **options)

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.device is None else mx.stream(self.device)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Returns the model's output; defined by each model."""
        raise NotImplementedError

    def native_arrays(self) -> dict[str, mx.array]:
        """Returns parameters and statistics by canonical path, in MLX's layouts; shared ones under each path."""
        return {path: array for path, array, _ in self._named_arrays()}

    def weights(self) -> dict[str, np.ndarray]:
        arrays = {path: to_numpy(array) for path, array in self.native_arrays().items()}
        return layout.tree_to_torch(arrays, self.layer_kinds())

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        kinds = self.layer_kinds()
        return {
            path: layout.torch_shape(layout.parameter_kind(kinds, path), path.rpartition(".")[2], array.shape)
            for path, array in self.native_arrays().items()
        }

    def layer_kinds(self) -> dict[str, str]:
        return tree.layer_kinds(self)

    @property
    def is_meta(self) -> bool:
        return tree.is_meta(self)

    def unregistered(self) -> list[str]:
        return tree.unregistered(self)

    def mlx_names(self) -> dict[str, str]:
        return tree.mlx_names(self)

    def _named_layers(self) -> Iterable[tuple[str, nn.Module]]:
        return tree.named_modules(self)

    def _named_arrays(self) -> Sequence[tuple[str, mx.array, bool]]:
        return tree.named_arrays(self)

    def key_dropouts(self) -> None:
        key_dropouts(self._named_layers())

    def _assign_weights(self, values: Iterable[tuple[str, np.ndarray]]) -> None:
        own, kinds = tree.Arrays(self, trainable=False), self.layer_kinds()
        dtypes = {path: array.dtype for path, array in own.get().items()}
        for path, array in values:
            native = layout.to_mlx(layout.parameter_kind(kinds, path), layout.split(path)[1], array)
            own.set({path: from_numpy(native).astype(dtypes[path])})
        mx.eval(self.parameters())

    def _to_host(self, array: mx.array) -> np.ndarray | None:
        try:
            return np.array(array)
        except (RuntimeError, ValueError):  # in a function that mx.compile or mx.vmap traces
            return None

    def _to_native_tokens(self, tokens: Tokens) -> mx.array:
        return mx.array(tokens)
