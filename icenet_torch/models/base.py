"""The base class of all PyTorch models."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from icenet.core.config import ModelConfig
from icenet.core.generation.request import Tokens
from icenet.core.models.base import ModelBase
from icenet_torch.generation.decoder import Decoder
from icenet_torch.nn import tree
from icenet_torch.nn.arithmetic import tf32
from icenet_torch.nn.arrays import DTYPES, is_half, to_numpy
from icenet_torch.nn.dropout import key_dropouts
from icenet_torch.nn.embedding import guard_embeddings, reading_ids, to_host


class BaseModel(ModelBase, nn.Module):
    """The base class of all models. A subclass defines its layers in `__init__`, and `forward`.

    If `__init__` ends with `self.init_weights(seed)`, the initial values are the same on both backends.

    Args:
        config: The model section of the configuration.
    """

    backend = "torch"
    decoder_type = Decoder
    array_type = torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = self.checked_config(config)
        self.compute_dtype = torch.float32
        self.gradient_checkpointing = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():  # compiled code has the arithmetic of its caller
            return super().__call__(*inputs, **options)
        with self.arithmetic():
            return super().__call__(*inputs, **options)

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.allow_tf32 is None else tf32(self.allow_tf32)

    @property
    def is_on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def without_gradients(self) -> contextlib.AbstractContextManager[None]:
        return torch.no_grad()

    @property
    def device(self) -> torch.device:
        """Device of the parameters; the CPU without any."""
        arrays = itertools.chain(self.parameters(), self.buffers())  # the walk over the modules ends at the first one
        return next((array.device for array in arrays), torch.device("cpu"))

    def native_arrays(self) -> dict[str, torch.Tensor]:
        """Returns parameters and statistics by path, without those that MLX lacks (`num_batches_tracked`)."""
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

    def _named_arrays(self) -> Sequence[tuple[str, torch.Tensor, bool]]:
        return tree.named_arrays(self)

    def key_dropouts(self) -> None:
        key_dropouts(self._named_layers())

    def guard_embeddings(self, reads_all: bool = False) -> None:
        guard_embeddings(self._named_layers(), reads_all)

    def reading_ids(self) -> contextlib.AbstractContextManager[None]:
        return reading_ids(self._named_layers())

    def _assign_weights(self, values: Iterable[tuple[str, np.ndarray]]) -> None:
        tree.assign_weights(self, values)

    def _host_memory(self) -> dict[str, np.ndarray]:
        return tree.host_memory(self)

    def _to_host(self, array: torch.Tensor, waits: bool = False) -> np.ndarray | None:
        return to_host(array, waits)

    def _to_float_host(self, array: torch.Tensor) -> np.ndarray:
        return to_numpy(array.float() if is_half(array) else array)

    def _to_native_floats(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, self.compute_dtype)

    def _to_native_tokens(self, tokens: Tokens) -> torch.Tensor:
        return torch.from_numpy(tokens).long().to(self.device)
