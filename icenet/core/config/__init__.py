"""The configuration: one YAML file, one tree of checked sections, shared by both backends.

    config = Config.from_yaml("configs/quickstart.yaml", overrides=["training.learning_rate=1e-3"])
    config.training.mixed_precision = "bf16"      # an assignment is checked too

Strict on purpose: an unknown key, a wrong type or an impossible combination is a `ConfigError` of one line
that names the key, the file and line where it stands, what is allowed and the nearest known key.
"""

from __future__ import annotations

from icenet.core.config.data import DATA, DataConfig, ImageDataConfig
from icenet.core.config.generation import GenerationConfig
from icenet.core.config.model import (
    FAMILIES,
    CNNConfig,
    CustomConfig,
    ModelConfig,
    RecurrentConfig,
    TransformerConfig,
)
from icenet.core.config.run import Config, check_device, json_schema
from icenet.core.config.training import ParameterGroup, TrainingConfig

__all__ = [
    "DATA",
    "FAMILIES",
    "CNNConfig",
    "Config",
    "CustomConfig",
    "DataConfig",
    "GenerationConfig",
    "ImageDataConfig",
    "ModelConfig",
    "ParameterGroup",
    "RecurrentConfig",
    "TrainingConfig",
    "TransformerConfig",
    "check_device",
    "json_schema",
]
