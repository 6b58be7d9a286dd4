"""Engines and a batch that several parity tests compare. They must leave them unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from parity_config import transformer_config

from icenet.parity import resampling
from icenet.parity.configuration.engines import Engines, build
from icenet.parity.configuration.run import random_batch


@pytest.fixture(scope="module")
def engines() -> Engines:
    """Returns engines of the small transformer with dropout."""
    return build(transformer_config(dropout=0.1))


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Returns 2 rows of 24 tokens."""
    return random_batch(transformer_config(), rows=2, length=24)


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures the noise with few samples, for faults that are far above it."""
    monkeypatch.setattr(resampling, "SAMPLES", 2)
