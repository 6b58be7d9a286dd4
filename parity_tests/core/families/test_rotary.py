"""Frequencies of rotary positions against those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from icenet.core.config import RotaryScaling
from icenet.core.config.transformer_plan import RotaryPlan
from icenet.core.models.rotary import RotaryRows, attention_factor, frequencies

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"factor": 4.0}, {"factor": 4.0}),
    "llama3": (
        {"factor": 8.0, "original_length": 512},
        {"factor": 8.0, "original_max_position_embeddings": 512, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "yarn": ({"factor": 4.0, "original_length": 1024}, {"factor": 4.0, "original_max_position_embeddings": 1024}),
}


@pytest.mark.parametrize("size", [8, 64, 96])
@pytest.mark.parametrize("kind", CASES)
def test_scaled_frequencies_equal_those_of_transformers(kind: str, size: int) -> None:
    transformers = pytest.importorskip("transformers")
    compute = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    ours, theirs = CASES[kind]
    scaling = RotaryScaling(type=kind, **ours)
    parameters = {"rope_theta": 5e5, "rope_type": kind, **theirs}
    length = int(4 * (scaling.original_length or 1024))
    config = transformers.LlamaConfig(
        hidden_size=4 * size,
        num_attention_heads=4,
        head_dim=size,
        max_position_embeddings=length,
        rope_parameters=parameters,
    )
    expected, factor = compute(config, "cpu")
    # a power in float32 can differ in its last bit
    np.testing.assert_allclose(frequencies(size, 5e5, scaling), expected.numpy(), rtol=5e-7)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)


def test_the_table_has_the_length_of_the_attention_factor() -> None:
    scaling = RotaryScaling(type="yarn", factor=4.0, original_length=64)
    cos, sin = RotaryRows(RotaryPlan(16, 1e4, scaling)).make(0, 50).swapaxes(0, 1)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * np.log(4) + 1, rtol=1e-6)
    plain = RotaryRows(RotaryPlan(16, 1e4)).make(0, 50)
    np.testing.assert_allclose(plain[7, 0], np.cos(7 * frequencies(16, 1e4)), rtol=1e-6)
