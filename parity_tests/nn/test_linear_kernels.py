"""The kernel of MLX for linear layers of few rows: on CUDA, and on the CPU as C++."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (first: it decides which BLAS MLX finds)

# isort: split
import emulated_gpu
import mlx.core as mx
import numpy as np
import pytest
from scipy.special import erf

from icenet.nn import linear_kernels as kernels
from icenet.nn.arrays import to_numpy
from icenet.nn.device_limits import Limits

# what a block of three dimensions needs in addition to `emulated_gpu`
_THREADS = r"""
struct Index3 { int x, y, z; };
#define THREAD (machine::threads[machine::current].thread)
#undef threadIdx
#define threadIdx (Index3{THREAD % 32, THREAD / 32 % BLOCK_Y, THREAD / 32 / BLOCK_Y})
#define blockDim (Index3{32, BLOCK_Y, BLOCK_Z})
#define __syncwarp() machine::exchange(0.f, 0)
inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
"""

# what `tensor_cores.cuh` defines, by its comment
_TENSOR_CORES = r"""
template <class T> struct Half {
  static constexpr bool IS_BFLOAT = std::is_same_v<T, bfloat16>;
  static constexpr int MANTISSA = IS_BFLOAT ? 7 : 10;
  static constexpr unsigned ONES = IS_BFLOAT ? 0x43004300 : 0x64006400;
  static float number(unsigned word, int i) {
    T value;
    memcpy(&value, (const char*)&word + 2 * i, 2);
    return (float)value;
  }
  static unsigned word(float first, float second) {
    const T pair[2] = {(T)first, (T)second};
    unsigned found;
    memcpy(&found, pair, 4);
    return found;
  }
  static unsigned subtract(unsigned x, unsigned y) {
    return word(number(x, 0) - number(y, 0), number(x, 1) - number(y, 1));
  }
  static unsigned sixteenfold(unsigned x, unsigned y) {
    return word(16 * number(x, 0) + number(y, 0), 16 * number(x, 1) + number(y, 1));
  }
  static void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const int thread = machine::threads[machine::current].thread, g = thread % 32 / 4, t = thread % 4;
    machine::Warp& warp = machine::own_block().warps[thread / 32];
    const unsigned given[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(warp.words[thread % 32], given, sizeof given);
    machine::meet(warp.barrier, 32);
    for (int i = 0; i < 4; i++) {
      for (int k = 0; k < 16; k++) {
        const unsigned* left = warp.words[4 * g + k % 8 / 2];
        const unsigned* right = warp.words[4 * (2 * t + i % 2) + k % 8 / 2];
        c[i] += number(left[i / 2 + k / 8 * 2], k % 2) * number(right[4 + k / 8], k % 2);
      }
    }
    machine::meet(warp.barrier, 32);
  }
};
inline unsigned masked(unsigned word, unsigned mask, unsigned ones) { return word & mask | ones; }
inline void copy_16_bytes(void* into, const void* from) { memcpy(into, from, 16); }
inline void wait_for_copies() {}
"""


def emulated(
    folder: Path,
    reversed_order: bool,
    on_tensor_cores: bool,
    has_several_rows: bool,
    given: tuple[str, ...],
    is_joined: bool,
) -> Callable[..., Any]:
    def call(*, inputs: Any, template: Any, grid: Any, threadgroup: Any, **outputs: Any) -> list[mx.array]:
        run = emulated_gpu.kernel(
            folder,
            name="linear",
            input_names=["x", "weight", *given],
            output_names=["out"],
            source=kernels._source(on_tensor_cores, has_several_rows, given, is_joined),
            header=kernels._HEADER + _THREADS + _TENSOR_CORES,
            shared_memory=1 << 17,
            reversed_order=reversed_order,
        )
        size = threadgroup[0] * threadgroup[1] * threadgroup[2]
        assert size <= 32 * kernels.WARPS and grid[1:] == threadgroup[1:]
        blocks = [("x_ndim", inputs[0].ndim), ("BLOCK_Y", threadgroup[1]), ("BLOCK_Z", threadgroup[2])]
        grid = (grid[0] // 32 * size, 1, 1)
        return run(inputs=inputs, template=[*template, *blocks], grid=grid, threadgroup=(size, 1, 1), **outputs)

    return call


needs_compiler = pytest.mark.skipif(emulated_gpu.COMPILER is None, reason="needs g++")


@pytest.fixture(
    params=[
        pytest.param("gpu", marks=pytest.mark.gpu),
        pytest.param("first thread first", marks=needs_compiler),
        pytest.param("last thread first", marks=[needs_compiler, pytest.mark.slow]),
    ]
)
def device(request: Any, tmp_path: Path, monkeypatch: Any) -> str:
    if request.param == "gpu":
        if not mx.cuda.is_available():
            pytest.skip("needs CUDA")
    else:
        is_reversed = request.param.startswith("last")
        monkeypatch.setattr(
            kernels,
            "_kernel",
            lambda cores, several, _, *inputs: emulated(tmp_path, is_reversed, cores, several, *inputs),
        )
        monkeypatch.setattr(kernels, "limits", lambda: Limits(4, 1 << 18, has_tensor_cores=True))
    return request.param


# rows, outputs, inputs, dtype, bits, group size, norm, bias, activation, gated, residual
CASES: dict[str, tuple[Any, ...]] = {
    "gpt": (1, 40, 776, mx.float32, 0, 0, "layer", True, "gelu", False, True),
    "llama": (2, 33, 1536, mx.bfloat16, 0, 0, "rms", False, "silu", True, False),
    "gemma": (3, 9, 24, mx.float16, 0, 0, "rms_offset", True, "gelu_tanh", True, False),
    "head": (8, 701, 264, mx.bfloat16, 0, 0, None, False, None, False, False),
    "4 bits": (1, 37, 1184, mx.bfloat16, 4, 32, "rms", False, "silu", True, True),
    "4 bits, several rows": (6, 20, 640, mx.float16, 4, 64, "rms", False, "silu", True, False),
    "4 bits, large groups": (2, 70, 1280, mx.bfloat16, 4, 128, None, True, None, False, True),
    "8 bits": (5, 21, 384, mx.float16, 8, 128, "layer without bias", True, "relu", False, True),
    "8 bits, small groups": (1, 90, 608, mx.bfloat16, 8, 32, None, False, "gelu", False, False),
    "6 bits": (2, 21, 2112, mx.float32, 6, 64, None, True, None, False, True),
    "5 bits": (1, 7, 96, mx.float32, 5, 32, None, False, None, False, False),
    "3 bits": (4, 50, 320, mx.float16, 3, 64, "rms", True, None, False, True),
    "2 bits": (1, 50, 2080, mx.float32, 2, 32, None, False, "gelu", False, False),
}


def reference(x: Any, weight: Any, bias: Any, norm: Any, name: Any, is_gated: bool, residual: Any, cast: Any) -> Any:
    """The formulas in float64; `cast` rounds as an operation does."""
    y = x
    if norm is not None:
        kind, gain, shift = norm
        y = y - y.mean(-1, keepdims=True) if kind.startswith("layer") else y
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * (gain + (kind == "rms_offset"))
        y = cast(y if shift is None else y + shift)
    y = y @ weight.T
    y = cast(y if bias is None else y + bias)
    gate, up = np.split(y, 2, axis=-1) if is_gated else (y, None)
    if name == "gelu":
        gate = gate * (1 + erf(gate / 2**0.5)) / 2
    elif name == "gelu_tanh":
        gate = gate / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    elif name == "silu":
        gate = gate / (1 + np.exp(-gate))
    elif name == "relu":
        gate = np.maximum(gate, 0)
    y = cast(gate) if up is None else cast(cast(gate) * up)
    return y if residual is None else cast(y + residual)


# compiling a case takes 3 s
@pytest.mark.parametrize(
    "case", [c if c in ("gpt", "4 bits", "5 bits") else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
@pytest.mark.parametrize("is_aligned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_kernel_rounds_as_separate_operations(case: str, is_aligned: bool, device: str) -> None:
    """Its error against float64 is that of the operations, each of which rounds its result."""
    rows, outputs, size, dtype, bits, group_size, kind, has_bias, name, is_gated, has_residual = CASES[case]
    random = np.random.default_rng(0)

    def draw(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape).astype(np.float32)).astype(dtype)

    def exact(a: Any) -> Any:
        return None if a is None else to_numpy(a).astype(np.float64)

    x, weight = draw(rows, 1, size) + 1.5, draw((2 if is_gated else 1) * outputs, size) / size**0.5
    bias = draw(weight.shape[0]) if has_bias else None
    residual = draw(rows, 1, outputs) if has_residual else None
    norm = None if kind is None else kernels.Norm(kind.partition(" ")[0], draw(size), None, 1e-5)
    if kind == "layer":
        norm = norm._replace(bias=draw(size))
    if norm is not None and is_aligned:
        vectors = [vector for vector in (bias, norm.weight, norm.bias) if vector is not None]
        norm = norm._replace(joined=mx.concatenate(vectors))
    packed, values = None, exact(weight)
    if bits:
        with mx.stream(mx.cpu):
            weight, scales, biases = mx.quantize(weight.astype(mx.float32), group_size, bits)
            if dtype != mx.float32:
                scales, biases = scales.astype(dtype), biases.astype(dtype)
            values = exact(mx.dequantize(weight, *(a.astype(mx.float32) for a in (scales, biases)), group_size, bits))
        packed = kernels.Packed(scales, biases, bits, group_size)
        if is_aligned and scales.nbytes % 4 == 0:
            parts = [part.reshape(-1).view(mx.uint32) for part in (weight, scales, biases)]
            packed = packed._replace(joined=mx.concatenate(parts))
    if not is_aligned:
        weight = mx.concatenate([weight.reshape(-1)[:1], weight.reshape(-1)])[1:].reshape(weight.shape)
        mx.eval(weight)
    found = kernels.fused_linear(x, weight, bias, norm, name, is_gated, residual, packed)
    assert found.shape == (rows, 1, outputs) and found.dtype == dtype
    terms = exact(x), values, exact(bias), norm and (kind, exact(norm.weight), exact(norm.bias)), name, is_gated
    truth = reference(*terms, exact(residual), lambda y: y)
    plain = reference(*terms, exact(residual), lambda y: exact(mx.array(y.astype(np.float32)).astype(dtype)))
    error, noise = np.abs(exact(found) - truth).max(), np.abs(plain - truth).max()
    assert error <= 2 * noise + 16 * 2.0**-24 * np.abs(truth).max()


@pytest.mark.slow  # compiling takes 3 s
@pytest.mark.parametrize("bits", [0, 3, 4, 8])
def test_a_row_that_is_not_finite_leaves_the_others(bits: int, device: str) -> None:
    """The rows of a batch are those of different users, and tensor cores multiply them together."""
    random = np.random.default_rng(0)
    x, w = (mx.array(random.standard_normal(shape).astype(np.float32)) for shape in ((5, 1, 352), (21, 352)))
    weight, packed = w.astype(mx.bfloat16), None
    if bits:
        with mx.stream(mx.cpu):
            weight, scales, biases = mx.quantize(w, 32, bits)
        packed = kernels.Packed(scales.astype(mx.bfloat16), biases.astype(mx.bfloat16), bits, 32)
    norm = kernels.Norm("layer", mx.ones((352,), mx.bfloat16), None, 1e-5)
    finite = kernels.fused_linear(x.astype(mx.bfloat16), weight, norm=norm, packed=packed)
    x[1, 0, 7], x[3, 0, 351] = float("nan"), float("-inf")
    found = kernels.fused_linear(x.astype(mx.bfloat16), weight, norm=norm, packed=packed)
    assert np.isfinite(to_numpy(found).astype(np.float32)).all((1, 2)).tolist() == [True, False, True, False, True]
    assert np.array_equal(to_numpy(found)[::2], to_numpy(finite)[::2])


def test_blocks_have_all_outputs_and_all_multiprocessors() -> None:
    limits = Limits(132, 227 << 10)
    shapes = [
        (1, 768, 768, False, 0),
        (1, 768, 3072, False, 4),
        (8, 2048, 5632, False, 4),
        (2, 5632, 2048, True, 4),
        (4, 50257, 768, False, 0),
        (1, 3, 8192, False, 0),
    ]
    for (rows, outputs, size, is_gated, bits), has_tensor_cores in itertools.product(shapes, [False, True]):
        of_gpu = dataclasses.replace(limits, has_tensor_cores=has_tensor_cores)
        found = kernels.choose_blocks(rows, outputs, size, is_gated, mx.bfloat16, bits, False, of_gpu)
        assert found is not None and found.on_tensor_cores == has_tensor_cores
        groups = outputs / (found.outputs // (2 if is_gated else 1))
        assert found.number * found.teams >= min(groups, 132) and found.number <= 3 * 132
        assert (found.teams * (found.number - 1)) < groups and found.parts * found.teams <= kernels.WARPS


@pytest.mark.usefixtures("mlx_on_cpu")  # without kernels, until they are put in
def test_products_that_the_kernel_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = mx.zeros((1, 64), mx.bfloat16), mx.zeros((16, 64), mx.bfloat16)
    assert not kernels.can_compute(x, weight)  # on a CPU
    monkeypatch.setattr(kernels, "limits", lambda: Limits(4, 1 << 18))
    assert kernels.can_compute(x, weight)
    assert not kernels.can_compute(mx.zeros((9, 64), mx.bfloat16), weight)
    assert not kernels.can_compute(mx.zeros((5, 64)), weight.astype(mx.float32))
    assert not kernels.can_compute(x, weight.astype(mx.float32))
    assert not kernels.can_compute(mx.zeros((1, 63), mx.bfloat16), weight[:, :63])
    assert not kernels.can_compute(mx.zeros((8, 40000), mx.bfloat16), mx.zeros((1, 40000), mx.bfloat16))
