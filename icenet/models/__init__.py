"""The model families, MLX. A new family is added to the imports and to `MODELS`."""

from __future__ import annotations

from collections.abc import Callable

import icenet.models.fused  # noqa: F401  (the classes for captured steps)
from icenet.models.base import BaseModel
from icenet.models.cnn import CNNModel
from icenet.models.rnn import GRUModel, LSTMModel, RNNModel
from icenet.models.transformer import TransformerModel
from icenet.models.vit import ViTModel

MODELS: dict[str, Callable[..., BaseModel]] = {
    "cnn": CNNModel,
    "transformer": TransformerModel,
    "lstm": LSTMModel,
    "gru": GRUModel,
    "rnn": RNNModel,
    "vit": ViTModel,
}

__all__ = ["MODELS", "BaseModel", "CNNModel", "GRUModel", "LSTMModel", "RNNModel", "TransformerModel", "ViTModel"]
