"""CUDA kernel for linear layers of a few rows, MLX: norm, product, bias, activation and residual in one.

Weights are floating or packed ones in the format of `icenet.core.weights.quantization`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.nn import cuda
from icenet.nn.arrays import Array, is_half, on_cpu
from icenet.nn.device_limits import Limits, device_limits

STEP, PACKED_STEP = 512, 1024
"""Inputs that a warp reads at a time: more need so many registers that fewer warps run at once."""
CHUNK = 128
"""Inputs that a warp reads at a time with tensor cores; of packed ones as many times more as there are in 16 bits."""
TENSOR_BITS = (0, 4, 8)
"""Bits of the weights that tensor cores multiply; 0: floating ones."""
WARPS = 8
"""Most warps of a thread block."""
BLOCKS_OF_A_PROCESSOR, TENSOR_BLOCKS_OF_A_PROCESSOR = 3, 2
"""Thread blocks that a multiprocessor is given. Each computes the norm, then several groups of outputs."""
SHARED_MEMORY = (16000, 48000, 90112, 180224)
"""Bytes of shared memory of a block. Each size is a kernel of its own."""
KINDS = ("none", "layer", "rms", "rms_offset")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")

_HEADER = """
#define DYNAMIC_ARRAY(type, name) \\
  extern __shared__ __align__(16) unsigned char dynamic_memory[]; \\
  type* name = (type*)dynamic_memory
"""

# Sizes are part of the kernel: shapes cost a launch 1 us. The number of rows changes while a batch is decoded.
_ONE_ROW = "constexpr int size = SIZE, weight_rows = WEIGHT_ROWS, rows = 1;"
_SEVERAL_ROWS = """
constexpr int size = SIZE, weight_rows = WEIGHT_ROWS;
int rows = 1;
for (int i = 0; i + 1 < x_ndim; i++) rows *= x_shape[i];
"""
# packed numbers, scales and biases in one array; the bias of a layer and the weight and bias of a norm in another
_JOINED_WEIGHT = """
const T* scales = (const T*)(weight + (size_t)WEIGHT_ROWS * SIZE / 32 * BITS);
const T* biases = scales + (size_t)WEIGHT_ROWS * SIZE / GROUP;
"""
_JOINED_NORM = """
const T* bias = vectors;
const T* norm_weight = vectors + (BIAS ? WEIGHT_ROWS : 0);
const T* norm_bias = norm_weight + SIZE;
"""
_OPTIONAL = ("scales", "biases", "bias", "norm_weight", "norm_bias", "residual", "vectors")


class Norm(NamedTuple):
    """A normalization of the inputs.

    Attributes:
        kind: "layer", "rms" or "rms_offset", which multiplies by 1 + weight.
        weight, bias: `[in]`.
        eps: Added to the variance.
        joined: The bias of the product, the weight and the bias, those that there are, as one array in the dtype of
            the inputs; None if they are not.
    """

    kind: str
    weight: Array
    bias: Array | None
    eps: float
    joined: Array | None = None


class Packed(NamedTuple):
    """What describes packed numbers.

    Attributes:
        scales, biases: `[out, in / group_size]`.
        bits, group_size: The settings.
        joined: The numbers, scales and biases as one array, uint32 `[N]`; None if they are not parts of one.
    """

    scales: Array
    biases: Array
    bits: int
    group_size: int
    joined: Array | None = None


class Blocks(NamedTuple):
    """The parts of a product that thread blocks compute.

    Attributes:
        on_tensor_cores: Whether tensor cores multiply.
        rows: Rows that the kernel is compiled for; those that are missing are zero.
        outputs: Rows of the weight that a warp multiplies.
        parts: Warps that share the inputs of these outputs.
        teams: Number of such groups of warps in a block.
        number: Number of blocks.
        shared_memory: Bytes of each block, one of `SHARED_MEMORY`.
    """

    on_tensor_cores: bool
    rows: int
    outputs: int
    parts: int
    teams: int
    number: int
    shared_memory: int


def fused_linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    norm: Norm | None = None,
    activation: str | None = None,
    is_gated: bool = False,
    residual: Array | None = None,
    packed: Packed | None = None,
    blocks: Blocks | None = None,
) -> Array:
    """Computes residual + activation(norm(x) W^T + b), rounded where the separate operations round.

    Args:
        x: `[..., in]`, where `in` is a multiple of 8.
        weight: `[out, in]` in the dtype of x, or packed numbers. If it is gated, its first half is that of the gate,
            and the result is activation(gate) * up, `[..., out / 2]`.
        bias: `[out]`.
        norm: The norm of x; None: x is used as it is.
        activation: See `icenet.nn.activation`; None: none.
        is_gated: See `weight`.
        residual: Added to the result, with its shape.
        packed: None: the weight is not packed.
        blocks: None: `choose_blocks`.

    Returns:
        `[..., out]` in the dtype of x.
    """
    size = x.shape[-1]
    outputs = weight.shape[0] // (2 if is_gated else 1)
    if blocks is None:
        blocks = _blocks(x, outputs, is_gated, packed)
    assert blocks is not None
    joined = None if packed is None or packed.scales.dtype != x.dtype else packed.joined
    vectors = None if norm is None else norm.joined
    scales, biases = (None, None) if packed is None else packed[:2]
    norm_weight, norm_bias = (None, None) if norm is None else (norm.weight, norm.bias)
    optional = dict(zip(_OPTIONAL, (scales, biases, bias, norm_weight, norm_bias, residual, vectors), strict=True))
    parts = {*(_OPTIONAL[:2] if joined is not None else ()), *(_OPTIONAL[2:5] if vectors is not None else ())}
    given = {name: array for name, array in optional.items() if array is not None and name not in parts}
    [out] = _kernel(blocks.on_tensor_cores, blocks.rows > 1, blocks.shared_memory, tuple(given), joined is not None)(
        inputs=[x, weight if joined is None else joined, *given.values()],
        template=[
            ("T", x.dtype),
            ("SIZE", size),
            ("WEIGHT_ROWS", weight.shape[0]),
            ("ROWS", blocks.rows),
            ("PAIRED", packed is not None and packed.scales.shape[-1] % 2 == 0)
            if blocks.on_tensor_cores
            else ("OUTPUTS", blocks.outputs),
            ("BITS", 0 if packed is None else packed.bits),
            ("GROUP", 1 if packed is None else packed.group_size),
            ("NORM", 0 if norm is None else KINDS.index(norm.kind)),
            ("NORM_BIAS", norm is not None and norm.bias is not None),
            ("EPS", 0 if norm is None else cuda.bits_of_float(norm.eps)),
            ("BIAS", bias is not None),
            ("ACTIVATION", ACTIVATIONS.index(activation or "none")),
            ("GATED", is_gated),
            ("RESIDUAL", residual is not None),
        ],
        grid=(32 * blocks.number, blocks.parts, blocks.teams),
        threadgroup=(32, blocks.parts, blocks.teams),
        output_shapes=[(*x.shape[:-1], outputs)],
        output_dtypes=[x.dtype],
    )
    return out


@lru_cache
def choose_blocks(
    rows: int,
    outputs: int,
    size: int,
    is_gated: bool,
    dtype: mx.Dtype,
    bits: int,
    has_other_scales: bool,
    limits: Limits | None,
) -> Blocks | None:
    """Returns the parts of a product that thread blocks compute; None if no kernel can compute it.

    Args:
        rows, outputs, size: Number of rows of x, of outputs of a row, and of inputs.
        is_gated: See `fused_linear`.
        dtype: That of the inputs.
        bits: Bits of a weight; 0: it is not packed.
        has_other_scales: Whether packed weights have scales of another dtype, which only the kernel without tensor
            cores reads.
        limits: What the kernel may use; None: there is no kernel.
    """
    if limits is None or size % (32 if bits else 8):
        return None
    padded = 1 << (rows - 1).bit_length()
    if dtype == mx.float32 or has_other_scales or bits not in TENSOR_BITS or not limits.has_tensor_cores:
        return _plain_blocks(padded, outputs, size, is_gated, dtype.size, bits, limits)
    return _tensor_blocks(padded, outputs, size, is_gated, bits, limits)


def _tensor_blocks(rows: int, outputs: int, size: int, is_gated: bool, bits: int, limits: Limits) -> Blocks | None:
    """Returns the blocks with tensor cores: those of which the warps read the fewest chunks one after the other."""
    each, chunk = 8 if is_gated else 16, CHUNK * (16 // bits if bits else 1)
    tiles, chunks = -(-outputs // each), -(-size // chunk)
    sums = 16 * WARPS * rows + 16 * rows + (rows * chunks * chunk // 32 + 4 if bits else 0)
    shared_memory = _smallest(4 * sums + 2 * (rows * chunks * chunk + 32), limits)
    if shared_memory is None:
        return None
    found: list[tuple[int, Blocks]] = []
    for parts in (1, 2, 4, 8):
        teams = max(1, min(WARPS // parts, -(-tiles // limits.multiprocessors)))
        count = -(-tiles // teams)
        rounds = -(-count // (TENSOR_BLOCKS_OF_A_PROCESSOR * limits.multiprocessors))
        blocks = Blocks(True, rows, each, parts, teams, -(-count // rounds), shared_memory)
        found.append((rounds * -(-chunks // parts), blocks))
    return min(found, key=lambda each: each[0])[1]


def _plain_blocks(
    rows: int, outputs: int, size: int, is_gated: bool, itemsize: int, bits: int, limits: Limits
) -> Blocks | None:
    """Returns the blocks without tensor cores.

    Warps share outputs if there are too few outputs for all warps of a GPU, and blocks are small if there are too few
    for all multiprocessors.
    """
    each = 4 if 0 < bits <= 4 and rows <= 2 else 2
    step = PACKED_STEP if bits else STEP
    steps = -(-size // step)
    shared_memory = _smallest(4 * (WARPS * each * rows + WARPS * rows) + rows * steps * step * itemsize, limits)
    if shared_memory is None:
        return None
    groups = -(-outputs // (each // 2 if is_gated else each))
    parts = max(1, min(steps, WARPS, -(-limits.multiprocessors * WARPS // groups)))
    teams = max(1, min(WARPS // parts, -(-groups // limits.multiprocessors)))
    count = -(-groups // teams)
    count = -(-count // -(-count // (BLOCKS_OF_A_PROCESSOR * limits.multiprocessors)))
    return Blocks(False, rows, each, parts, teams, count, shared_memory)


def _smallest(needed: int, limits: Limits) -> int | None:
    """Returns the smallest size of shared memory that is enough; None if the GPU has less."""
    found = next((size for size in SHARED_MEMORY if needed <= size), None)
    return None if found is None or found > limits.shared_memory else found


def most_rows(x: Array) -> int:
    """Returns the number of rows up to which the kernel is used. With more, the sums do not fit in registers."""
    return 8 if is_half(x) else 4


def can_compute(x: Array, weight: Array, packed: Packed | None = None) -> bool:
    """Returns whether the kernel computes a product of these arrays: on CUDA, for few rows and of these sizes."""
    size = x.shape[-1]
    if x.size == 0 or x.size > most_rows(x) * size or x.dtype not in (mx.float32, mx.float16, mx.bfloat16):
        return False
    if packed is None and weight.dtype != x.dtype:
        return False
    return _blocks(x, weight.shape[0], False, packed) is not None


def _blocks(x: Array, outputs: int, is_gated: bool, packed: Packed | None) -> Blocks | None:
    size, bits = x.shape[-1], 0 if packed is None else packed.bits
    has_other_scales = packed is not None and packed.scales.dtype != x.dtype
    return choose_blocks(x.size // size, outputs, size, is_gated, x.dtype, bits, has_other_scales, limits())


def packed_weight(layer: Any) -> Packed | None:
    """Returns the scales and biases of a quantized layer; None for a layer with a floating weight."""
    if "scales" not in layer:
        return None
    return Packed(layer.scales, layer.biases, layer.bits, layer.group_size, layer.get("_packed_parts"))


def limits() -> Limits | None:
    """Returns what the kernel may use on the GPU; None where it is not used."""
    return None if on_cpu() or not mx.cuda.is_available() else device_limits()


@lru_cache
def _kernel(
    on_tensor_cores: bool, has_several_rows: bool, shared_memory: int, given: tuple[str, ...], is_joined: bool
) -> Any:
    """Returns the kernel with some of the optional inputs: MLX spends time on each input of a launch."""
    name = f"icenet_{'tensor_' if on_tensor_cores else ''}linear_{shared_memory}"
    header = cuda.body("tensor_cores.cuh") if on_tensor_cores else ""
    names, source = ["x", "weight", *given], _source(on_tensor_cores, has_several_rows, given, is_joined)
    return mx.fast.cuda_kernel(name, names, ["out"], source, header + _HEADER, shared_memory=shared_memory)


def _source(on_tensor_cores: bool, has_several_rows: bool, given: tuple[str, ...], is_joined: bool) -> str:
    sizes = _SEVERAL_ROWS if has_several_rows else _ONE_ROW
    joined = [*([_JOINED_WEIGHT] if is_joined else []), *([_JOINED_NORM] if "vectors" in given else [])]
    parts = {*(_OPTIONAL[:2] if is_joined else ()), *(_OPTIONAL[2:5] if "vectors" in given else ())}
    missing = [f"const T* {name} = x;  // not read" for name in _OPTIONAL if name not in parts and name not in given]
    body = "tensor_linear.cuh" if on_tensor_cores else "linear.cuh"
    return "\n".join([sizes, *joined, *missing, cuda.body("common.cuh"), cuda.body(body)])
