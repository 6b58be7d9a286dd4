"""The configuration: one YAML file, read into a tree of validated sections that both backends share.

    config = Config.from_yaml("configs/quickstart.yaml", overrides=["training.learning_rate=1e-3"])
    config.training.mixed_precision = "bf16"      # assignments are validated too

Validation is strict: an unknown key, a wrong type or an impossible combination is a `ConfigError`. Its message is one
line with the file, the line, the key, the allowed values and the closest known key.
"""

from __future__ import annotations

from icenet.core.config.data import DATA, ChatDataConfig, CustomDataConfig, DataConfig, ImageDataConfig
from icenet.core.config.embedding import EmbeddingConfig
from icenet.core.config.generation import GenerationConfig
from icenet.core.config.model import (
    FAMILIES,
    CNNConfig,
    CustomConfig,
    ImageModelConfig,
    ModelConfig,
    RecurrentConfig,
    RotaryScaling,
    TransformerConfig,
    ViTConfig,
    output_size,
)
from icenet.core.config.run import Config, check_device, json_schema
from icenet.core.config.training import ParameterGroup, TrainingConfig

__all__ = [
    "DATA",
    "FAMILIES",
    "CNNConfig",
    "ChatDataConfig",
    "Config",
    "CustomConfig",
    "CustomDataConfig",
    "DataConfig",
    "EmbeddingConfig",
    "GenerationConfig",
    "ImageDataConfig",
    "ImageModelConfig",
    "ModelConfig",
    "ParameterGroup",
    "RecurrentConfig",
    "RotaryScaling",
    "TrainingConfig",
    "TransformerConfig",
    "ViTConfig",
    "check_device",
    "json_schema",
    "output_size",
]
