"""The base class of all PyTorch models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from icenet.core.config import ModelConfig
from icenet.core.generation.request import Tokens
from icenet.core.models.base import ModelBase
from icenet.core.weights import layout
from icenet_torch.generation.decoder import Decoder
from icenet_torch.nn.arrays import from_numpy, to_numpy
from icenet_torch.nn.dropout import Dropout
from icenet_torch.nn.kinds import kind_of


class BaseModel(ModelBase, nn.Module):
    """The base class of all models. A subclass defines its layers in `__init__`, and `forward`.

    If `__init__` ends with `self.init_weights(seed)`, the initial values are the same on both backends.

    Args:
        config: The model section of the configuration.
    """

    backend = "torch"
    decoder_type = Decoder
    dropout_type = Dropout

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def native_arrays(self) -> dict[str, torch.Tensor]:
        """Returns parameters and statistics by path, without those that MLX lacks (`num_batches_tracked`)."""
        kinds = self.layer_kinds()
        # a parameter that is sharded among processes is represented by the local shard
        state = {path: t.to_local() if hasattr(t, "to_local") else t for path, t in self.state_dict().items()}
        return {path: t for path, t in state.items() if not layout.is_left_out(kinds, path)}

    def weights(self) -> dict[str, np.ndarray]:
        return {path: to_numpy(tensor).copy() for path, tensor in self.native_arrays().items()}

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(tensor.shape) for path, tensor in self.native_arrays().items()}

    def trainable_paths(self) -> set[str]:
        return {path for path, parameter in self.named_parameters() if parameter.requires_grad}

    def _kind_of(self, module: nn.Module) -> str | None:
        return kind_of(module)

    @torch.no_grad()
    def _assign_weights(self, values: Mapping[str, np.ndarray]) -> None:
        for path, tensor in self.native_arrays().items():
            tensor.copy_(from_numpy(values[path]))

    def _to_native_tokens(self, tokens: Tokens) -> torch.Tensor:
        return torch.from_numpy(tokens).long().to(self.device)
