"""Runs kernels of `mx.fast.cuda_kernel` and `mx.fast.metal_kernel` on the CPU, compiled by g++.

Each thread of the GPU is a coroutine that stops at barriers, shuffles and waits. A block runs until all of its
threads wait for other blocks, then the next one: a block that should have waited reads values that were not written,
which are NaN. If all blocks wait, the run is an error. Arrays declared `__shared__` are those of one block at a time:
kernels whose blocks wait for each other use SHARED_ARRAY.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

# isort: split
import mlx.core as mx
import numpy as np

from icenet.nn.arrays import from_numpy, to_numpy

COMPILER = shutil.which("g++")
C_TYPES = {"float32": "float", "float16": "_Float16", "bfloat16": "bfloat16", "bool": "bool", "uint32": "unsigned"}
C_TYPES |= {"int32": "int", "uint8": "unsigned char"}

_MACHINE = r"""
#include <cmath>
#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>
using std::min;
using std::max;
using ushort = unsigned short;
using uint = unsigned;
struct bfloat16 {
  ushort bits;
  bfloat16() = default;
  explicit bfloat16(float value) {
    unsigned word;
    memcpy(&word, &value, 4);
    bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;  // to the nearest, ties to even
  }
  explicit operator float() const {
    const unsigned word = (unsigned)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};

namespace machine {
struct Barrier { int waiting = 0, generation = 0; };
struct Warp { Barrier barrier; float values[32]; unsigned words[32][6]; };
struct Block { Barrier barrier; std::vector<Warp> warps; char* fixed; char* dynamic; };
struct Thread { jmp_buf point; ucontext_t context; int block, thread; bool started = false, done = false; };
std::vector<Block> blocks;
std::vector<Thread> threads;
int threads_of_block, current;
bool moved;  // whether any thread passed a barrier or a wait in this round
jmp_buf scheduler;
void (*body)(void*);  // the kernel; a std::function takes a third of the time of compilation
void* arguments;

Block& own_block() { return blocks[threads[current].block]; }
void yield() {
  if (!_setjmp(threads[current].point)) _longjmp(scheduler, 1);
}
void meet(Barrier& barrier, int size) {
  const int generation = barrier.generation;
  if (++barrier.waiting == size) {
    barrier.waiting = 0;
    barrier.generation++;
    moved = true;
  }
  while (barrier.generation == generation) yield();
}
void sync_block() { meet(own_block().barrier, threads_of_block); }
float exchange(float value, int mask) {
  const int thread = threads[current].thread;
  Warp& warp = own_block().warps[thread / 32];
  warp.values[thread % 32] = value;
  meet(warp.barrier, 32);
  const float other = warp.values[thread % 32 ^ mask];
  meet(warp.barrier, 32);
  return other;
}
void entry() {
  body(arguments);
  threads[current].done = true;
  moved = true;
  _longjmp(scheduler, 1);
}
// Returns false if all threads wait for each other.
template <class Kernel>
bool run(int number_of_blocks, int size, int dynamic, bool reversed, Kernel kernel) {
  body = [](void* arguments) { (*(Kernel*)arguments)(); };
  arguments = &kernel;
  threads_of_block = size;
  blocks = std::vector<Block>(number_of_blocks);
  for (Block& block : blocks) {
    block.warps.resize((size + 31) / 32);
    block.fixed = (char*)malloc(1 << 16);
    block.dynamic = (char*)aligned_alloc(64, (dynamic / 64 + 1) * 64);
    memset(block.fixed, 0xff, 1 << 16);  // NaN: nothing may be read that was not written
    memset(block.dynamic, 0xff, dynamic);
  }
  threads = std::vector<Thread>(number_of_blocks * size);
  constexpr int STACK = 1 << 16;
  char* stacks = (char*)malloc((size_t)STACK * threads.size());  // pages that are not used take no memory
  auto resume = [&](int index) {
    current = index;
    Thread& thread = threads[current];
    if (thread.done || _setjmp(scheduler)) return;
    if (thread.started) _longjmp(thread.point, 1);
    thread.started = true;
    thread.block = current / size;
    thread.thread = current % size;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = &stacks[(size_t)STACK * current];
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
    setcontext(&thread.context);
  };
  bool any;
  do {
    any = false;
    for (int i = 0; i < number_of_blocks; i++) {
      const int block = reversed ? number_of_blocks - 1 - i : i;
      do {  // until all threads of the block are done or wait for other blocks
        moved = false;
        for (int t = 0; t < size; t++) resume(block * size + (reversed ? size - 1 - t : t));
        any |= moved;
      } while (moved);
    }
  } while (any);
  free(stacks);
  for (Thread& thread : threads) {
    if (!thread.done) return false;
  }
  for (Block& block : blocks) free(block.fixed), free(block.dynamic);
  return true;
}
}  // namespace machine
"""

_CUDA = r"""
#define __device__
#define __shared__ static
#define __syncthreads machine::sync_block
#define __shfl_xor_sync(all, value, mask) machine::exchange(value, mask)
#define __expf(x) expf((x) * (1 + 1.2e-7f))  // about as inexact: 2 + 1.17 |x| units in the last place
struct Index { int x; };
#define blockIdx (Index{machine::threads[machine::current].block})
#define threadIdx (Index{machine::threads[machine::current].thread})
#define gridDim (Index{(int)machine::blocks.size()})
"""

_METAL = r"""
#define device
#define constant
#define threadgroup
enum class mem_flags { mem_threadgroup };
#define threadgroup_barrier(flags) machine::sync_block()
inline float simd_shuffle_xor(float value, ushort mask) { return machine::exchange(value, mask); }
namespace metal { namespace precise { using std::exp; using std::tanh; } }
struct Index { int x; };
#define threadgroup_position_in_grid (Index{machine::threads[machine::current].block})
#define thread_position_in_threadgroup (Index{machine::threads[machine::current].thread})
#define threadgroups_per_grid (Index{(int)machine::blocks.size()})
"""

_MEMORY = r"""
#undef SHARED_ARRAY
#define SHARED_ARRAY(type, name, size) type* name = (type*)machine::own_block().fixed
#undef DYNAMIC_ARRAY
#define DYNAMIC_ARRAY(type, name) type* name = (type*)machine::own_block().dynamic
"""


def memory_of(array: mx.array) -> np.ndarray:
    """Returns a copy of an array whose address is as far from a multiple of 16 as that of a view is on a GPU.

    There new arrays begin at multiples of 16, but for those of up to 8 bytes. On a CPU, MLX puts their size before
    them.
    """
    values = np.ascontiguousarray(to_numpy(array))
    distance = (_address(array) - _address(mx.arange(8))) % 16
    memory = np.empty(values.nbytes + 32, np.uint8)
    start = -memory.ctypes.data % 16 + distance
    found = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    found[...] = values
    return found


def kernel(
    folder: Path,
    *,
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str = "",
    shared_memory: int = 0,
    metal: bool = False,
    reversed_order: bool = False,
) -> Callable[..., list[mx.array]]:
    """Returns a function that is called as the kernels of MLX are; the arguments, too, are MLX's.

    Args:
        folder: Where compiled kernels are stored.
        metal: Whether the source is Metal's, not CUDA's.
        reversed_order: Whether the last thread runs first.
    """
    assert COMPILER is not None

    def call(
        *, inputs: Any, template: Any, grid: Any, threadgroup: Any, output_shapes: Any, output_dtypes: Any
    ) -> list[mx.array]:
        arrays = [memory_of(array) for array in inputs]
        shapes = [name for name in input_names if re.search(rf"\b{name}_shape\b", source)]
        arguments, shape_arguments = [], []
        for index, (label, array) in enumerate(zip(input_names, inputs, strict=True)):
            arguments.append(
                f"const {_c_type(array.dtype)}* {label} = (const {_c_type(array.dtype)}*)arrays[{index}];"
            )
            if label in shapes:
                position = sum(inputs[other].ndim for other in range(index))
                shape_arguments.append(f"const int* {label}_shape = shapes + {position};")
        for index, (label, dtype) in enumerate(zip(output_names, output_dtypes, strict=True), len(inputs)):
            arguments.append(f"{_c_type(dtype)}* {label} = ({_c_type(dtype)}*)arrays[{index}];")
        constants = []
        for label, value in template:
            if isinstance(value, mx.Dtype):
                constants.append(f"using {label} = {_c_type(value)};")
            else:
                constants.append(f"constexpr {'bool' if isinstance(value, bool) else 'int'} {label} = {int(value)};")
        text = "\n".join(
            [
                _MACHINE + (_METAL if metal else _CUDA) + header + _MEMORY,
                'extern "C" bool run_kernel(void** arrays, const int* shapes, int blocks, int size, int dynamic,',
                "                           bool reversed) {",
                "  return machine::run(blocks, size, dynamic, reversed, [&]() {",
                *arguments,
                *shape_arguments,
                *constants,
                source,
                "  });\n}",
            ]
        )
        run = _compiled(folder, text)
        results = [_uninitialised(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        pointers = (ctypes.c_void_p * (len(arrays) + len(results)))(*(a.ctypes.data for a in [*arrays, *results]))
        dimensions = [size for array in inputs for size in array.shape]
        finished = run(
            pointers,
            (ctypes.c_int * len(dimensions))(*dimensions),
            -(-grid[0] // threadgroup[0]),
            threadgroup[0],
            shared_memory,
            reversed_order,
        )
        assert finished, f"{name}: all threads wait for each other"
        return [from_numpy(array) for array in results]

    return call


def _address(array: mx.array) -> int:
    return np.array(array.view(mx.uint8) if array.ndim else array[None], copy=False).ctypes.data


def _c_type(dtype: mx.Dtype) -> str:
    return C_TYPES[str(dtype).rpartition(".")[2]]


def _uninitialised(shape: Any, dtype: mx.Dtype) -> np.ndarray:
    """Returns an array whose bits are all set: NaN."""
    array = to_numpy(mx.zeros(shape, dtype)).copy()
    array.view(np.uint8).fill(255)
    return array


def _compiled(folder: Path, text: str) -> Any:
    stem = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    library = stem.with_suffix(".so")
    if not library.exists():
        stem.with_suffix(".cpp").write_text(text)
        command = [COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-o", str(library)]
        subprocess.run([*command, str(stem.with_suffix(".cpp"))], check=True)
    run = ctypes.CDLL(str(library)).run_kernel
    run.restype = ctypes.c_bool
    return run
