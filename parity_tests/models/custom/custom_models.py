"""Files of custom models, and commands that fail."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import error_line

from icenet.cli.main import main

TEXT = {
    "my_models.py": """
import mlx.core as mx
import mlx.nn as nn

from icenet.models.base import BaseModel


class CustomModel(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.gain = config.gain * mx.arange(1, config.hidden_size + 1)
        self.custom_layer = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x):
        past = mx.cumsum(self.embedding(x), axis=1)
        return self.custom_layer(self.gain * mx.tanh(self.hidden(self.norm(past))))


class ImageModel(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(1, config.hidden_size, 7)
        self.norm = nn.BatchNorm(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, images):
        x = nn.relu(self.norm(self.conv(images)))
        return self.classifier(x.mean(axis=(1, 2)))
""",
    "my_models_torch.py": """
import torch
import torch.nn as nn

from icenet_torch.models.base import BaseModel


class CustomModel(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.gain = nn.Parameter(config.gain * torch.arange(1, config.hidden_size + 1, dtype=torch.float32))
        self.custom_layer = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x):
        past = torch.cumsum(self.embedding(x), dim=1)
        return self.custom_layer(self.gain * torch.tanh(self.hidden(self.norm(past))))


class ImageModel(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(1, config.hidden_size, 7)
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, images):
        x = torch.relu(self.norm(self.conv(images)))
        return self.classifier(x.mean(dim=(2, 3)))
""",
    "one_mlx.py": """
import mlx.nn as nn

from icenet.models.base import BaseModel


class Only(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, x):
        return self.embedding(x)
""",
    "one_torch.py": """
import torch.nn as nn

from icenet_torch.models.base import BaseModel


class Only(BaseModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, x):
        return self.embedding(x)
""",
}

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "seed": 3,
    "model": {"type": "my_models.py:CustomModel", "hidden_size": 16, "vocab_size": 257, "gain": 0.125},
    "data": {"source": "text.txt", "seq_length": 24},
    "training": {
        "max_steps": 20,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "eval_every": 10,
        "eval_batches": 2,
        "checkpoint_every": 10,
    },
}

IMAGES: dict[str, Any] = {
    **SETTINGS,
    "model": {"type": "my_models.py:ImageModel", "hidden_size": 16, "vocab_size": 10},
    "data": {"kind": "images", "source": "digits"},
    "training": {"max_steps": 60, "batch_size": 32, "learning_rate": 3e-2, "eval_every": 30},
}

ONLY = {"type": "one_mlx.py:Only", "hidden_size": 1, "vocab_size": 257}


def failure(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail and returns its error."""
    capfd.readouterr()
    assert main(arguments) in (1, 2)
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err and "ICENET_DEBUG" not in err
    return error_line(err)


def with_model(**model: Any) -> dict[str, Any]:
    return {**SETTINGS, "model": {"hidden_size": 16, "vocab_size": 257, **model}}
