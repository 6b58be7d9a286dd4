"""What every MLX model is: an `mlx.nn.Module` that knows its config, its weights and how to generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from icenet.core.config import ModelConfig
from icenet.core.generation import request as generation
from icenet.core.generation import streaming
from icenet.core.models.base import ModelBase
from icenet.core.weights import layout
from icenet.generation.decoder import Decoder
from icenet.nn.arrays import from_numpy, to_numpy
from icenet.nn.dropout import Dropout, seed_dropouts
from icenet.nn.kinds import kind_of


class BaseModel(ModelBase, nn.Module):
    """The base of all models. A subclass defines its layers in `__init__` and `forward`.

    `config` is the model's section of the configuration. A model whose `__init__` ends with
    `self.init_weights(seed)` starts from initial values that are the same on both backends.
    """

    backend = "mlx"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = mx.float32
        self.gradient_checkpointing = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.forward(*inputs, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The model's output; defined by each model."""
        raise NotImplementedError

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
    ) -> mx.array | Iterator[np.ndarray]:
        """Continues prompts; see `icenet.core.config.GenerationConfig` for the options.

        `input_ids` is int `[B, T]`, `[T]`, or a list of lists of unequal length. Gives int32 `[B, L]`: the
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
        return mx.array(streaming.collect(streaming.complete(decoder, request), request))

    # ---- weights -----------------------------------------------------------------------------------------

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        kinds = self.layer_kinds()
        return {
            path: layout.torch_shape(layout.parameter_kind(kinds, path), path.rpartition(".")[2], array.shape)
            for path, array in self.own_arrays().items()
        }

    def own_arrays(self) -> dict[str, mx.array]:
        """Parameters and statistics as they are."""
        return dict(tree_flatten(self.parameters()))

    def trainable_paths(self) -> set[str]:
        return {path for path, _ in tree_flatten(self.trainable_parameters())}

    def layer_kinds(self) -> dict[str, str]:
        return {path: kind for path, module in self.named_modules() if (kind := kind_of(module))}

    def init_scales(self) -> dict[str, float]:
        return {path: module.init_scale for path, module in self.named_modules() if hasattr(module, "init_scale")}

    def weights(self) -> dict[str, np.ndarray]:
        """The canonical weights: numpy arrays in PyTorch's layouts, by path."""
        arrays = {path: to_numpy(array) for path, array in self.own_arrays().items()}
        return layout.tree_to_torch(arrays, self.layer_kinds())

    def _assign_weights(self, values: Mapping[str, np.ndarray]) -> None:
        arrays = layout.tree_to_mlx(values, self.layer_kinds())
        dtypes = {path: array.dtype for path, array in self.own_arrays().items()}
        self.load_weights([(path, from_numpy(values).astype(dtypes[path])) for path, values in arrays.items()])
        mx.eval(self.parameters())

    # ---- dropout -----------------------------------------------------------------------------------------

    def dropout_layers(self) -> dict[str, Dropout]:
        found = {path: m for path, m in self.named_modules() if isinstance(m, Dropout) and m.p > 0}
        return dict(sorted(found.items()))

    def seed_dropout(self, keys: mx.array | None) -> None:
        """Gives each dropout its keys, uint32 `[sites, rows, 2]` of `dropout_keys`; None: MLX's generator."""
        seed_dropouts(list(self.dropout_layers().values()), keys)
