"""Frequencies of rotary positions against those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from icenet.core.config import RotaryScaling
from icenet.core.config.transformer_plan import RotaryPlan
from icenet.core.nn.position_tables import TableBase
from icenet.core.nn.rotary import RotaryRows, attention_factor, frequencies

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


@pytest.mark.parametrize(
    ("kind", "length"),
    [("longrope", 512), ("longrope", 513), ("dynamic", 7), ("dynamic", 512), ("dynamic", 513), ("dynamic", 2500)],
)
def test_frequencies_for_a_number_of_tokens_equal_those_of_transformers(kind: str, length: int) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    compute = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    short, long = [1.0 + 0.1 * pair for pair in range(32)], [1.0 + 2.0 * pair for pair in range(32)]
    parameters: dict[str, Any] = {"rope_theta": 1e4, "rope_type": kind, "factor": 3.3}
    ours: dict[str, Any] = {}
    if kind == "longrope":
        parameters |= {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 512}
        ours = {"short_factors": short, "long_factors": long}
    scaling = RotaryScaling(type=kind, factor=3.3, original_length=512, **ours)
    config = transformers.LlamaConfig(head_dim=64, max_position_embeddings=512, rope_parameters=parameters)
    expected, factor = compute(config, "cpu", seq_len=torch.tensor(length))
    found = frequencies(64, 1e4, scaling, length)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)
    # the row of the table for position 3 of a text of that length
    rows = RotaryRows(RotaryPlan(64, 1e4, scaling))
    row = rows.make(0, rows.count(length))[rows.index(np.array([3]), np.array([length]))[0]]
    np.testing.assert_allclose(
        row,
        found if kind == "dynamic" else factor * np.stack([np.cos(3 * found), -np.sin(3 * found), np.sin(3 * found)]),
        rtol=1e-6,
    )


def test_a_table_has_the_rows_that_are_needed() -> None:
    made: list[tuple[int, int]] = []

    class Table(TableBase):
        def _joined(self, rows: list[Any]) -> Any:
            return np.concatenate([*([] if self.array is None else [self.array]), *rows])

        def __getitem__(self, index: Any) -> Any:
            return self.array[index]

    def make(start: int, stop: int) -> Any:
        made.append((start, stop))
        return np.arange(start, stop, dtype=np.float32)

    table = Table(make, 2**24)
    assert table.count == 0  # none before the first call
    for count in (1, 4096, 4097, 8000, 30_000):
        table.reserve(count)
        np.testing.assert_array_equal(table.array, np.arange(table.count))
    assert table.count == 30_000
    assert made[:2] == [(0, 4096), (4096, 8192)] and sum(stop - start for start, stop in made) == 30_000
    small = Table(make, 100)
    small.reserve(1)
    assert small.count == 100


def test_the_table_has_the_length_of_the_attention_factor() -> None:
    scaling = RotaryScaling(type="yarn", factor=4.0, original_length=64)
    cos, negative, sin = RotaryRows(RotaryPlan(16, 1e4, scaling)).make(0, 50).swapaxes(0, 1)
    assert np.array_equal(negative, -sin)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * np.log(4) + 1, rtol=1e-6)
    plain = RotaryRows(RotaryPlan(16, 1e4)).make(0, 50)
    np.testing.assert_allclose(plain[7, 0], np.cos(7 * frequencies(16, 1e4)), rtol=1e-6)
