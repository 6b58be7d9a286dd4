"""The model families, PyTorch. A new family is added to the imports and to `MODELS`."""

from __future__ import annotations

from collections.abc import Callable

import icenet_torch.models.fused  # noqa: F401  (the classes for captured steps)
from icenet_torch.models.base import BaseModel
from icenet_torch.models.cnn import CNNModel
from icenet_torch.models.rnn import GRUModel, LSTMModel, RNNModel
from icenet_torch.models.transformer import TransformerModel
from icenet_torch.models.vit import ViTModel

MODELS: dict[str, Callable[..., BaseModel]] = {
    "cnn": CNNModel,
    "transformer": TransformerModel,
    "lstm": LSTMModel,
    "gru": GRUModel,
    "rnn": RNNModel,
    "vit": ViTModel,
}

__all__ = ["MODELS", "BaseModel", "CNNModel", "GRUModel", "LSTMModel", "RNNModel", "TransformerModel", "ViTModel"]
