"""Small models that generate, on both backends."""

from __future__ import annotations

from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

# isort: split
import mlx.core as mx
import numpy as np
import torch
from helpers import build_model, plain

from icenet.core.config import ModelConfig

VOCAB = 61

PROMPTS = [[1, 2, 3, 2], [0], [5, 9, 60] * 6]


def config_of(**changes: Any) -> Any:
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "max_seq_length": 330}
    return ModelConfig(type="transformer", **{**sizes, **changes})


_built: dict[Any, Any] = {}


def build(backend: str, **changes: Any) -> Any:
    """Returns a model in evaluation mode, which tests share; backend "exact" is PyTorch in float64."""
    key = (backend, *sorted(changes.items()))
    if key not in _built:
        model = build_model(backend, config_of(**changes), seed=7)
        # larger logits than those of a new model, so that a choice depends on the context
        weights = model.weights()
        weights["output.weight"] = weights["output.weight"] * np.float32(2)
        model.set_weights(weights)
        _built[key] = model
    return _built[key]


def fresh(backend: str, **changes: Any) -> Any:
    """Returns a new small model in training mode."""
    model = build_model(backend, config_of(hidden_size=32, num_layers=1, max_seq_length=48, **changes), seed=7)
    model.train()
    return model


def run(backend: str, prompts: Any, *, model: Any = None, **options: Any) -> Any:
    """Returns the tokens of `generate` as numpy, int `[B, L]`."""
    out = (model if model is not None else build(backend)).generate(prompts, **options)
    assert type(out) is (mx.array if backend == "mlx" else torch.Tensor)
    return plain(out)
