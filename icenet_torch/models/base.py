"""What every PyTorch model is: a `torch.nn.Module` that knows its config, its weights and how to generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from icenet.core.config import ModelConfig
from icenet.core.generation import request as generation
from icenet.core.generation import streaming
from icenet.core.models.base import ModelBase
from icenet.core.weights import layout
from icenet_torch.generation.decoder import Decoder
from icenet_torch.nn.arrays import from_numpy, to_numpy
from icenet_torch.nn.dropout import Dropout, seed_dropouts
from icenet_torch.nn.kinds import kind_of


class BaseModel(ModelBase, nn.Module):
    """The base of all models. A subclass defines its layers in `__init__` and `forward`.

    `config` is the model's section of the configuration. A model whose `__init__` ends with
    `self.init_weights(seed)` starts from initial values that are the same on both backends.
    """

    backend = "torch"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def generate(
        self,
        input_ids: Any,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[int | str] | None = None,
        overflow: str | None = None,
        prefill_chunk: int | None = None,
        attention_mask: Any = None,
        pad_token_id: int = 0,
        stream: bool = False,
    ) -> torch.Tensor | Iterator[np.ndarray]:
        """Continues prompts; see `icenet.core.config.GenerationConfig` for the options.

        `input_ids` is int `[B, T]`, `[T]`, or a list of lists of unequal length. Gives int64 `[B, L]`: the
        prompts (padded on the left where unequal) and what follows; with `stream`, an iterator of the next
        tokens, numpy int32 `[B]`.
        """
        options = {
            "max_length": max_length,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop,
            "overflow": overflow,
            "prefill_chunk": prefill_chunk,
        }
        request = generation.request(self, input_ids, attention_mask, pad_token_id, options)
        decoder = Decoder(self, request)
        if stream:
            return streaming.stream(decoder, request)
        tokens = streaming.collect(streaming.complete(decoder, request), request)
        return torch.from_numpy(tokens).long().to(self.device)

    # ---- weights -----------------------------------------------------------------------------------------

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(tensor.shape) for path, tensor in self.own_arrays().items()}

    def own_arrays(self) -> dict[str, torch.Tensor]:
        """Parameters and statistics as they are, without what MLX has not (a batch norm's count of batches)."""
        kinds = self.layer_kinds()
        # of a parameter that is spread over several processes, this one's piece
        state = {path: t.to_local() if hasattr(t, "to_local") else t for path, t in self.state_dict().items()}
        return {path: t for path, t in state.items() if not layout.is_left_out(kinds, path)}

    def trainable_paths(self) -> set[str]:
        return {path for path, parameter in self.named_parameters() if parameter.requires_grad}

    def layer_kinds(self) -> dict[str, str]:
        return {path: kind for path, module in self.named_modules() if (kind := kind_of(module))}

    def init_scales(self) -> dict[str, float]:
        return {path: module.init_scale for path, module in self.named_modules() if hasattr(module, "init_scale")}

    def weights(self) -> dict[str, np.ndarray]:
        """The canonical weights: numpy arrays in PyTorch's layouts, by path."""
        return {path: to_numpy(tensor).copy() for path, tensor in self.own_arrays().items()}

    @torch.no_grad()
    def _assign_weights(self, values: Mapping[str, np.ndarray]) -> None:
        for path, tensor in self.own_arrays().items():
            tensor.copy_(from_numpy(values[path]))

    # ---- dropout -----------------------------------------------------------------------------------------

    def dropout_layers(self) -> dict[str, Dropout]:
        found = {path: m for path, m in self.named_modules() if isinstance(m, Dropout) and m.p > 0}
        return dict(sorted(found.items()))

    def seed_dropout(self, keys: torch.Tensor | None) -> None:
        """Gives each dropout its keys, int32 `[sites, rows, 2]` of `dropout_keys`; None: PyTorch's generator."""
        seed_dropouts(list(self.dropout_layers().values()), keys)
