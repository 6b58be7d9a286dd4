"""Layers and functions of both backends against their formulas, which numpy computes in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import both_backends

from icenet.core import backends
from icenet.core.config.transformer_plan import NormPlan

EPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of one rounding."""


def draw(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def call(backend: str, function: Any, *inputs: np.ndarray, **options: Any) -> np.ndarray:
    """Returns the result of a function of a backend, of arrays and as an array of numpy."""
    arrays = backends.module(backend, "nn.arrays")
    result: np.ndarray = arrays.to_numpy(function(*map(arrays.from_numpy, inputs), **options))
    return result


def assign(backend: str, layer: Any, **values: np.ndarray) -> None:
    """Sets arrays of a layer."""
    from_numpy = backends.module(backend, "nn.arrays").from_numpy
    for name, value in values.items():
        if backend == "mlx":
            setattr(layer, name, from_numpy(value))
        else:
            getattr(layer, name).data = from_numpy(value.copy())  # it shares the memory


@both_backends
@pytest.mark.parametrize("weight_dtype", ["float32", "x"])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "offset"])
def test_norms(name: str, dtype: str, weight_dtype: str, backend: str, request: pytest.FixtureRequest) -> None:
    """In half precision they round once, from fp32, whatever the dtype of the weights.

    With weights of half precision, MLX's kernels on a GPU round after the norm, too. Casts around them would
    be two more kernels for each norm of each token.
    """
    if weight_dtype == "x" and backend == "mlx":
        request.getfixturevalue("mlx_on_cpu")
    weight_dtype = dtype if weight_dtype == "x" else weight_dtype
    kind = name if name == "layer_norm" else "rms_norm"
    layer = backends.module(backend, "nn.norm").make_norm(NormPlan(kind, 1e-3, name == "offset"), 64)
    x, weight, bias = (
        draw(50, 64, dtype=dtype),
        draw(64, seed=1, dtype=weight_dtype),
        draw(64, seed=2, dtype=weight_dtype),
    )
    assign(backend, layer, weight=weight, **({"bias": bias} if kind == "layer_norm" else {}))
    y = wide(x) - (wide(x).mean(-1, keepdims=True) if kind == "layer_norm" else 0)
    y = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-3) * ((name == "offset") + wide(weight))
    y = y + (wide(bias) if kind == "layer_norm" else 0)
    found = call(backend, layer, x)
    assert found.dtype == x.dtype
    bound = EPS[dtype] * np.abs(y) + 16 * EPS["float32"] * (np.abs(y) + 1)
    assert (np.abs(wide(found) - y) <= bound).all()


@both_backends
@pytest.mark.parametrize("dtype", EPS)
def test_running_statistics_of_a_batch(dtype: str, backend: str) -> None:
    """The batch has another number of channels than of rows, and statistics of half precision are updated, too."""
    layer = backends.module(backend, "nn").BatchNorm2d(3)
    layer.train()
    x = draw(2, 4, 5, 3) * 2 + 1
    values = {name: np.abs(draw(3, seed=i, dtype=dtype)) for i, name in enumerate(("weight", "bias", "running_mean"))}
    assign(backend, layer, **values, running_var=values["weight"])
    call(backend, layer, x if backend == "mlx" else np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    to_numpy = backends.module(backend, "nn.arrays").to_numpy
    rows = wide(x).reshape(-1, 3)
    for name, before, batch in (
        ("running_mean", values["running_mean"], rows.mean(0)),
        ("running_var", values["weight"], rows.var(0, ddof=1)),
    ):
        expected = 0.9 * wide(before) + 0.1 * batch
        np.testing.assert_allclose(wide(to_numpy(getattr(layer, name))), expected, rtol=4 * EPS[dtype])


def visible(length: int, columns: int, causal: bool) -> np.ndarray:
    """Returns which keys a query may see; the last query sees the last key."""
    rows = np.arange(columns - length, columns)[:, None]
    return (np.arange(columns) <= rows) | (not causal)


@both_backends
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize(("queries", "columns"), [(3, 3), (3, 5), (1, 5), (70, 73)])
def test_attention(queries: int, columns: int, kind: str, softcap: float | None, backend: str) -> None:
    """Four heads of queries share two heads of keys, each two neighbours one."""
    q, k, v = draw(2, 4, queries, 8), draw(2, 2, columns, 8, seed=1), draw(2, 2, columns, 8, seed=2)
    hidden, bias = draw(2, 1, queries, columns, seed=3) > 0.7, draw(1, 4, queries, columns, seed=4)
    hidden[..., 0] = False
    scores = np.einsum("bhtd,bhsd->bhts", wide(q), wide(k).repeat(2, axis=1)) * 0.6
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    if kind == "float":
        scores = scores + bias
    seen = ~hidden if kind == "bool" else visible(queries, columns, kind == "causal")
    weights = np.where(seen, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bhsd->bhtd", weights, wide(v).repeat(2, axis=1))
    from_numpy = backends.module(backend, "nn.arrays").from_numpy
    mask = {"none": None, "causal": "causal"}.get(kind) or {"bool": ~hidden, "float": bias}.get(kind)
    mask = mask if mask is None or isinstance(mask, str) else from_numpy(mask)
    attend = backends.module(backend, "nn.attention").scaled_dot_product_attention
    found = call(backend, attend, q, k, v, mask=mask, scale=0.6, softcap=softcap)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@both_backends
@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("is_padded", [False, True])
def test_masks_of_windows(is_padded: bool, causal: bool, window: int | None, backend: str) -> None:
    """A query sees itself, and a window has the tokens before it and the query's own. Positions leave out padding."""
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    given = np.array([[0, 0, 1, 1], [1, 1, 1, 1]], bool) if is_padded else None
    arrays, nn = (backends.module(backend, name) for name in ("nn.arrays", "nn.attention"))
    positions, masks = nn.positions_and_masks(
        arrays.from_numpy(tokens), None if given is None else arrays.from_numpy(given), causal, (window,)
    )
    found = np.broadcast_to(arrays.to_numpy(positions), (2, 4)).tolist()
    assert found == [[0, 0, 0, 1] if is_padded else [0, 1, 2, 3], [0, 1, 2, 3]]
    mask = masks[window]
    if mask is None or isinstance(mask, str):
        assert not is_padded and window in (None, 4) and mask == ("causal" if causal else None)
        return
    mask = np.broadcast_to(arrays.to_numpy(mask), (2, 1, 4, 4))
    for row in range(2):
        for i in range(4):
            for j in range(4):
                is_seen = (given is None or given[row, j]) and (j <= i or not causal)
                is_seen = is_seen and (window is None or j > i - window)
                assert mask[row, 0, i, j] == (is_seen or i == j), (row, i, j)


@both_backends
def test_a_table_of_distances(backend: str) -> None:
    table = draw(9)  # of the distances -4 to 4, from a query to a key
    by_distance = backends.module(backend, "nn.attention").by_distance
    expected = [[table[key - query + 4] for key in range(4)] for query in range(4)]
    assert call(backend, by_distance, table, length=4).tolist() == [[float(x) for x in row] for row in expected]


@both_backends
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [6, 8])
@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_rotations(pairs: str, size: int, dtype: str, backend: str) -> None:
    """Each pair of the first values of a head is turned as a complex number, and rounded once; the rest stays."""
    x, angles = draw(2, 3, 5, 8, dtype=dtype), draw(5, size // 2, seed=1)
    table = np.stack([np.cos(angles), -np.sin(angles), np.sin(angles)], axis=1)
    half = size // 2
    first, second = (slice(0, half), slice(half, size)) if pairs == "half" else (slice(0, size, 2), slice(1, size, 2))
    turned = (wide(x)[..., first] + 1j * wide(x)[..., second]) * np.exp(1j * wide(angles))
    expected = wide(x)
    expected[..., first], expected[..., second] = turned.real, turned.imag
    found = call(backend, backends.module(backend, "nn.attention").rotate, x, table, pairs=pairs)
    assert found.dtype == x.dtype
    error, bound = np.abs(wide(found) - expected), EPS[dtype] * np.abs(expected) + 8 * EPS["float32"]
    assert (error <= bound).all()
