"""The kernel of MLX for one token that attends to a cache: on CUDA, and on the CPU as C++."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import icenet.blas  # noqa: F401  (first: it decides which BLAS MLX finds)

# isort: split
import emulated_gpu
import mlx.core as mx
import numpy as np
import pytest

from icenet.nn import cached_attention as attention
from icenet.nn.arrays import to_numpy

# what a grid of three dimensions and strides need in addition to `emulated_gpu`
_GRID = r"""
struct Index3 { int x, y, z; };
#define BLOCK (machine::threads[machine::current].block)
#undef blockIdx
#define blockIdx (Index3{BLOCK % GRID_X, BLOCK / GRID_X % GRID_Y, BLOCK / GRID_X / GRID_Y})
inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
"""


def emulated(folder: Path, names: tuple[str, ...], written: dict[str, np.ndarray]) -> Callable[..., Any]:
    """`written` is given the inputs after the call: the kernel has copies of MLX's arrays."""

    def call(*, inputs: Any, template: Any, grid: Any, threadgroup: Any, **outputs: Any) -> list[mx.array]:
        strides = []
        for name, array in zip(names, inputs, strict=True):  # of arrays that are contiguous
            sizes = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
            strides.append(f"const size_t {name}_strides[] = {{{', '.join(map(str, sizes))}}};")
        run = emulated_gpu.kernel(
            folder,
            name="attention",
            input_names=list(names),
            output_names=["out"],
            source="\n".join([*strides, attention._source(names)]),
            header=_GRID,
        )
        blocks = [grid[0] // threadgroup[0], grid[1], grid[2]]
        sizes = [("GRID_X", blocks[0]), ("GRID_Y", blocks[1])]
        grid = (int(np.prod(blocks)) * threadgroup[0], 1, 1)
        copies = {id(array): emulated_gpu.memory_of(array) for array in inputs}
        written.update({name: copies[id(array)] for name, array in zip(names, inputs, strict=True)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emulated_gpu, "memory_of", lambda array: copies[id(array)])
            return run(inputs=inputs, template=[*template, *sizes], grid=grid, threadgroup=threadgroup, **outputs)

    return call


def emulated_join(folder: Path) -> Callable[..., Any]:
    return emulated_gpu.kernel(
        folder, name="join", input_names=["parts"], output_names=["out"], source=attention._JOIN
    )


@pytest.fixture(
    params=[
        pytest.param("gpu", marks=pytest.mark.gpu),
        pytest.param("cpu", marks=pytest.mark.skipif(emulated_gpu.COMPILER is None, reason="needs g++")),
    ]
)
def written(request: Any, tmp_path: Path, monkeypatch: Any) -> dict[str, np.ndarray]:
    """The inputs that the kernel has written to by name; empty on a GPU, where they are MLX's own arrays."""
    inputs: dict[str, np.ndarray] = {}
    if request.param == "gpu":
        if not mx.cuda.is_available():
            pytest.skip("needs CUDA")
    else:
        monkeypatch.setattr(attention, "_kernel", lambda names: emulated(tmp_path, names, inputs))
        monkeypatch.setattr(attention, "_join_kernel", lambda: emulated_join(tmp_path))
    return inputs


# heads, heads of keys, size of a head, columns, tokens of each row before, dtype, and other options
CASES: dict[str, tuple[Any, ...]] = {
    "llama": (4, 2, 64, 256, [250, 250], mx.bfloat16, {"rotated": 64}),
    "gpt": (2, 2, 40, 64, [5], mx.float32, {}),
    "large head": (2, 1, 128, 128, [70], mx.float32, {"rotated": 32, "pairs": "interleaved"}),
    "own positions": (2, 1, 20, 128, [100, 3], mx.float32, {"rotated": 20, "angles per row": True}),
    "window and padding": (2, 2, 16, 64, [40, 60], mx.float16, {"window": 9, "padding": [35, 2]}),
    "two parts": (1, 1, 8, 1100, [1090], mx.float32, {"softcap": 3.0, "scale": 0.7}),
    "first token": (1, 1, 256, 64, [0], mx.float32, {}),
}


def rotated(x: Any, cosine: Any, sine: Any, pairs: str, cast: Any) -> Any:
    """Rotates the first values of heads `[..., E]` by angles `[..., R / 2]`, in float64; `cast` rounds the result."""
    size = 2 * cosine.shape[-1]
    y = x.copy()
    first, second = (slice(0, size, 2), slice(1, size, 2))
    if pairs == "half":
        first, second = (slice(0, size // 2), slice(size // 2, size))
    y[..., first] = cast(x[..., first] * cosine - x[..., second] * sine)
    y[..., second] = cast(x[..., second] * cosine + x[..., first] * sine)
    return y


@pytest.mark.parametrize(
    "case", [c if c in ("llama", "two parts") else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
@pytest.mark.parametrize("is_joined", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_it_is_attention_to_the_tokens_of_a_row(case: str, is_joined: bool, written: dict[str, np.ndarray]) -> None:
    heads, kv_heads, size, columns, lengths, dtype, options = CASES[case]
    random = np.random.default_rng(0)

    def draw(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape).astype(np.float32)).astype(dtype)

    def exact(a: Any) -> Any:
        return (a if isinstance(a, np.ndarray) else to_numpy(a)).astype(np.float64)

    def cast(a: Any) -> Any:
        return exact(mx.array(a.astype(np.float32)).astype(dtype))

    batch, padding = len(lengths), options.get("padding")
    keys, values = draw(batch, kv_heads, columns, size), draw(batch, kv_heads, columns, size)
    for row, length in enumerate(lengths):  # nothing may be read that is no token
        keys[row, :, length:] = values[row, :, length:] = float("nan")
    keys, values = mx.contiguous(keys), mx.contiguous(values)
    before = exact(keys), exact(values)
    qkv = draw(batch, 1, (heads + 2 * kv_heads) * size)
    position = mx.array(lengths if len(set(lengths)) > 1 else lengths[:1], mx.int32)
    angles = cosine = sine = None
    if "rotated" in options:
        rows = batch if options.get("angles per row") else 1
        phase = random.uniform(-3, 3, (rows, 1, 1, options["rotated"] // 2)).astype(np.float32)
        cosine, sine = np.cos(phase), np.sin(phase)
        angles = mx.array(np.stack([cosine, -sine, sine], axis=1)[:, :, 0, 0])
    scale, cap = options.get("scale", size**-0.5), options.get("softcap")
    pairs = options.get("pairs", "half")
    plan: Any = SimpleNamespace(scale=options.get("scale"), softcap=cap, window=options.get("window"))
    plan.rotary_pairs = pairs
    state = position, None if padding is None else mx.array(padding, mx.int32), angles, plan
    if is_joined:
        found = attention.joined_attention(qkv, keys, values, *state)
        assert found.shape == (batch, 1, heads * size) and found.dtype == dtype
    else:
        split = qkv.reshape(batch, -1, 1, size).split([heads, heads + kv_heads], axis=1)
        q, k, v = (mx.contiguous(part) for part in split)
        found = attention.cached_attention(q, k, v, keys, values, *state)
        assert found.shape == (batch, heads, 1, size) and found.dtype == dtype
    found = exact(found).reshape(batch, heads, size)

    q, k, v = np.split(exact(qkv).reshape(batch, -1, size), [heads, heads + kv_heads], axis=1)
    if cosine is not None and sine is not None:
        q, k = (rotated(x, cosine[:, 0], sine[:, 0], pairs, cast) for x in (q, k))
    for row, length in enumerate(lengths):
        first = padding[row] if padding is not None else 0
        if plan.window is not None:
            first = max(first, length - plan.window + 1)
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            all_keys = np.concatenate([before[0][row, kv_head, first:length], k[row, kv_head][None]])
            all_values = np.concatenate([before[1][row, kv_head, first:length], v[row, kv_head][None]])
            scores = all_keys @ q[row, head] * scale
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            truth = weights @ all_values / weights.sum()
            limit = np.abs(cast(truth) - truth).max() + 64 * 2.0**-24 * np.abs(all_values).max()
            assert np.abs(found[row, head] - truth).max() <= limit
        stored = [exact(written.get(name, array)) for name, array in (("keys", keys), ("values", values))]
        assert np.abs(stored[0][row, :, length] - k[row]).max() <= 8 * 2.0**-24 * np.abs(k).max()
        assert np.array_equal(stored[1][row, :, length], v[row])
