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
from icenet.generation.decoder import Decoder
from icenet.nn import tree
from icenet.nn.activations import match_gradients_at_zero
from icenet.nn.arrays import DTYPES, is_half, on_cpu, to_numpy
from icenet.nn.dropout import key_dropouts
from icenet.nn.embedding import guard_embeddings, reading_ids, to_host


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
        self.config = self.checked_config(config)
        self.compute_dtype = mx.float32
        self.gradient_checkpointing = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with self.arithmetic():
            return self.forward(*inputs, **options)

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.device is None else mx.stream(self.device)

    @property
    def is_on_cpu(self) -> bool:
        with self.arithmetic():
            return on_cpu()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Returns the model's output; defined by each model."""
        raise NotImplementedError

    def without_gradients(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def native_arrays(self) -> dict[str, mx.array]:
        """Returns parameters and statistics by canonical path, in MLX's layouts; shared ones under each path."""
        return tree.native_arrays(self)

    def weights(self) -> dict[str, np.ndarray]:
        return tree.weights(self)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return tree.weight_shapes(self)

    def layer_kinds(self) -> dict[str, str]:
        return tree.layer_kinds(self)

    @property
    def is_meta(self) -> bool:
        return tree.is_meta(self)

    def unregistered(self) -> list[str]:
        return tree.unregistered(self)

    def mlx_names(self) -> dict[str, str]:
        return tree.mlx_names(self)

    def set_weight_dtype(self, dtype: str) -> None:
        tree.set_dtype(self, DTYPES[dtype])
        self.compute_dtype = DTYPES[dtype]

    def _named_layers(self) -> Iterable[tuple[str, nn.Module]]:
        return tree.named_modules(self)

    def _named_arrays(self) -> Sequence[tuple[str, mx.array, bool]]:
        return tree.named_arrays(self)

    def key_dropouts(self) -> None:
        key_dropouts(self._named_layers())

    def match_gradients_at_zero(self) -> None:
        match_gradients_at_zero(self._named_layers())

    def guard_embeddings(self, reads_all: bool = False) -> None:
        guard_embeddings(self._named_layers(), reads_all)

    def reading_ids(self) -> contextlib.AbstractContextManager[None]:
        return reading_ids(self._named_layers())

    def _assign_weights(self, values: Iterable[tuple[str, np.ndarray]]) -> None:
        tree.assign_weights(self, values)

    def _host_memory(self) -> dict[str, np.ndarray]:
        return tree.host_memory(self)

    def _to_host(self, array: mx.array, waits: bool = False) -> np.ndarray | None:
        return to_host(array)

    def _to_float_host(self, array: mx.array) -> np.ndarray:
        return to_numpy(array.astype(mx.float32) if is_half(array) else array)

    def _to_native_floats(self, array: np.ndarray) -> mx.array:
        return mx.array(array).astype(self.compute_dtype)

    def _to_native_tokens(self, tokens: Tokens) -> mx.array:
        return mx.array(tokens)
