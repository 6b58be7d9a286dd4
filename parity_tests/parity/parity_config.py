"""The small transformer of the parity tests."""

from __future__ import annotations

from typing import Any

from icenet.core.config import Config

MODEL: dict[str, Any] = {
    "type": "transformer",
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 3,
    "vocab_size": 83,
    "max_seq_length": 40,
    "dropout": 0.0,
}


def transformer_config(**model: Any) -> Config:
    """Returns the configuration, with some fields of its model replaced."""
    return Config.from_dict({"seed": 7, "device": "cpu", "model": {**MODEL, **model}})
