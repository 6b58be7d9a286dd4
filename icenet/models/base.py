"""The base class of all MLX models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from icenet.core.config import ModelConfig
from icenet.core.generation.request import Tokens
from icenet.core.models.base import ModelBase
from icenet.core.weights import layout
from icenet.generation.decoder import Decoder
from icenet.nn.arrays import from_numpy, to_numpy
from icenet.nn.dropout import Dropout
from icenet.nn.kinds import kind_of


class BaseModel(ModelBase, nn.Module):
    """The base class of all models. A subclass defines its layers in `__init__`, and `forward`.

    If `__init__` ends with `self.init_weights(seed)`, the initial values are the same on both backends.

    Args:
        config: The model section of the configuration.
    """

    backend = "mlx"
    decoder_type = Decoder
    dropout_type = Dropout

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = mx.float32
        self.gradient_checkpointing = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.forward(*inputs, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Returns the model's output; defined by each model."""
        raise NotImplementedError

    def native_arrays(self) -> dict[str, mx.array]:
        """Returns parameters and statistics by path, in MLX's layouts."""
        return dict(tree_flatten(self.parameters()))

    def weights(self) -> dict[str, np.ndarray]:
        arrays = {path: to_numpy(array) for path, array in self.native_arrays().items()}
        return layout.tree_to_torch(arrays, self.layer_kinds())

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        kinds = self.layer_kinds()
        return {
            path: layout.torch_shape(layout.parameter_kind(kinds, path), path.rpartition(".")[2], array.shape)
            for path, array in self.native_arrays().items()
        }

    def trainable_paths(self) -> set[str]:
        return {path for path, _ in tree_flatten(self.trainable_parameters())}

    def _kind_of(self, module: nn.Module) -> str | None:
        return kind_of(module)

    def _assign_weights(self, values: Mapping[str, np.ndarray]) -> None:
        arrays = layout.tree_to_mlx(values, self.layer_kinds())
        dtypes = {path: array.dtype for path, array in self.native_arrays().items()}
        self.load_weights([(path, from_numpy(values).astype(dtypes[path])) for path, values in arrays.items()])
        mx.eval(self.parameters())

    def _to_native_tokens(self, tokens: Tokens) -> mx.array:
        return mx.array(tokens)
