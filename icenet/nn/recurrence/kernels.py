"""Kernels of the recurrent layers, MLX on a GPU: all steps of a layer in one launch on CUDA, one step on Metal.

The loops of `icenet.nn.recurrence.loops` launch about eight kernels per step, and MLX's CUDA build spends about 20
microseconds on each. Here one launch computes all steps, as cuDNN's persistent kernels do (Diamos et al., 2016).

A thread block owns some of the hidden units and some of the rows of the batch. It keeps the weights of its units in
shared memory for all steps. At each step it multiplies the values that all blocks computed in the step before (the
state in the forward pass, the gradients of the gates in the backward pass) by its weights, and computes its units.
Then the blocks with the same rows wait for each other.

One source serves CUDA and Metal. Metal guarantees no progress of all thread groups at once, so they cannot wait for
each other, and each launch computes one step. The Metal kernels are tested in an emulation only and unmeasured.

Shapes: T steps, B rows, H hidden_size, G gates, K values per row that a step reads (H forward, G*H backward).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx

from icenet.core.errors import UsageError
from icenet.nn.arrays import Array, device_index, on_cpu
from icenet.nn.device_limits import device_limits, on_metal
from icenet.nn.recurrence.source import BACKWARD, FORWARD, GATES, Kernel
from icenet.nn.recurrence.tiles import LANES, WARPS, choose_tiles

SMALLEST_HIDDEN_SIZE = 8
"""Metal passes arrays of fewer elements in another address space."""


class Fused(NamedTuple):
    """Kernels that compute a loop over time.

    Args:
        forward: Returns the results, and with `record=True` also the records, each joined over the steps.
        backward: As that of the loop.
    """

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Any, ...]]


def are_used(projected: Array, weight: Array) -> bool:
    """Returns whether the kernels compute a layer. The environment variable ICENET_RECURRENT_KERNELS decides.

    Without it they run on CUDA, and not on Metal, where they are unmeasured. `mx.vmap` over a layer needs "off": MLX
    cannot vectorize kernels.

    Args:
        projected: Contribution of the inputs to the gates, `[T, B, G*H]`.
        weight: Recurrent weights, `[G*H, H]`.
    """
    if on_cpu() or weight.shape[1] < SMALLEST_HIDDEN_SIZE or not projected.size:
        return False
    default = "off" if on_metal() else "on"
    chosen = os.environ.get("ICENET_RECURRENT_KERNELS", default)
    if chosen not in ("on", "off"):
        raise UsageError(f"ICENET_RECURRENT_KERNELS is {chosen!r}; it must be on or off")
    return chosen == "on" and device_limits(device_index(mx.default_device())) is not None


@lru_cache(maxsize=256)
def build(kernel: Kernel, shared_memory: int) -> Any:
    """Returns MLX's callable of a kernel with this many bytes of shared memory for the weights."""
    arguments: dict[str, Any] = {
        "name": "icenet_recurrent_" + ("backward" if kernel.backward else "forward"),
        "input_names": list(kernel.inputs),
        "output_names": list(kernel.outputs),
        "source": kernel.source,
        "header": kernel.header,
    }
    if kernel.metal:
        return mx.fast.metal_kernel(**arguments)
    return mx.fast.cuda_kernel(**arguments, shared_memory=shared_memory)


@lru_cache
def _no_counters() -> Array:
    """Returns an array for a launch of one step, which needs no counters."""
    counters = mx.zeros((1,), mx.uint32)
    mx.eval(counters)  # not lazy: another thread may use it
    return counters


@lru_cache
def _zeros_kernel() -> Any:
    source = "if (threadIdx.x < SIZE) counters[threadIdx.x] = 0;"
    return mx.fast.cuda_kernel("icenet_zeros", ["after"], ["counters"], source)


def new_counters(after: Array, size: int) -> Array:
    """Returns zeros, uint32 `[size]`, for one launch.

    `mx.compile` would give equal calls of `mx.zeros` the same array, and two launches must not share it.
    """
    [counters] = _zeros_kernel()(
        inputs=[after],
        template=[("SIZE", size)],
        grid=(1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[mx.uint32],
    )
    return counters


def launch(
    kernel: Kernel, arrays: dict[str, Array], shapes: dict[str, tuple[int, ...]], **constants: Any
) -> list[Array]:
    """Runs one kernel.

    Args:
        kernel: The kernel.
        arrays: Its inputs by name; `mask` and `later` may be missing.
        shapes: Shapes of its outputs by name.
        constants: HAS_LATER and RELU.

    Returns:
        The outputs.
    """
    weight, rows = arrays["weight"], arrays["d_hs" if kernel.backward else "projected"]
    steps, batch = rows.shape[:2]
    states = rows.dtype
    hidden = shapes["carried_h" if kernel.backward else "hs"][-1]
    terms = weight.shape[1]
    gates = weight.shape[0] // hidden
    limits = device_limits(device_index(mx.default_device()))
    assert limits is not None
    if steps == 1:
        limits = replace(limits, shared_memory=0)  # each weight is read once
    tiles = choose_tiles(gates, hidden, terms, batch, weight.itemsize, limits)
    template = {
        **{"T": weight.dtype, "S": states, "GATES": gates, "H": hidden, "K": terms, "FIELDS": kernel.cell.fields},
        **{name: getattr(tiles, name) for name in ("M", "U", "WB", "WU", "KS", "GROUPS", "V", "SHARED_K")},
        **{"BACKWARD": kernel.backward, "RECORD": kernel.record, "MASKED": "mask" in arrays},
        **{"HAS_LATER": False, "RELU": False, **constants},
    }
    given = {"mask": rows, "later": rows, "later_h": rows, **arrays}
    if not kernel.metal:
        given["counters"] = new_counters(rows, tiles.parts) if steps > 1 else _no_counters()
    return build(kernel, tiles.SHARED_K * gates * tiles.U * tiles.WU * tiles.GROUPS * weight.itemsize)(
        inputs=[given[name] for name in kernel.inputs],
        template=list(template.items()),
        grid=(tiles.unit_blocks * tiles.parts * LANES * WARPS, 1, 1),
        threadgroup=(LANES * WARPS, 1, 1),
        output_shapes=[shapes[name] for name in kernel.outputs],
        output_dtypes=[states] * len(kernel.outputs),
    )


def forward(
    kind: str,
    projected: Array,
    weight: Array,
    state: tuple[Array, ...],
    mask: Array | None,
    bias: Array | None = None,
    *,
    record: bool,
    relu: bool = False,
) -> dict[str, Array]:
    """Runs a layer over all steps.

    Args:
        kind: "lstm", "gru" or "rnn".
        projected: Contribution of the inputs to the gates, `[T, B, G*H]`.
        weight: Recurrent weights `[G*H, H]`, in the dtype of products.
        state: h, and c of an LSTM, before the first step, `[B, H]` each.
        mask: bool `[T, B, 1]`, False for padding, or None.
        bias: `bias_hn` of a GRU, `[H]`.
        record: Whether to return what `backward` needs.
        relu: Whether an RNN's activation is relu.

    Returns:
        The outputs of the kernel by name, `[T, B, ...]`: `hs`; of an LSTM `cs`, which is the last c `[B, H]` without
        records; and the records.
    """
    metal = on_metal()
    kernel = Kernel(FORWARD[kind], False, record, metal)
    steps, batch, _ = projected.shape
    hidden = weight.shape[1]
    running = {"h": state[0], **({"c": state[1]} if kind == "lstm" else {})}
    fixed = {"weight": weight, **({} if bias is None else {"bias": bias})}
    results: list[dict[str, Array]] = []
    for begin, end in _ranges(steps, metal):
        widths = {"gates": (GATES[kind] if kind == "lstm" else 2) * hidden}
        shapes: dict[str, tuple[int, ...]] = {
            name: (end - begin, batch, widths.get(name, hidden)) for name in kernel.outputs
        }
        if not record and "cs" in shapes:
            shapes["cs"] = (batch, hidden)
        arrays = {"projected": projected[begin:end], **running, **fixed}
        if mask is not None:
            arrays["mask"] = mask[begin:end]
        results.append(dict(zip(kernel.outputs, launch(kernel, arrays, shapes, RELU=relu), strict=True)))
        running["h"] = results[-1]["hs"][-1]
        if kind == "lstm":
            running["c"] = results[-1]["cs"][-1] if record else results[-1]["cs"]
    joined = _join(results)
    if kind == "lstm" and not record:
        joined["cs"] = running["c"]
    return joined


def backward(
    kind: str,
    weight: Array,
    state: tuple[Array, ...],
    mask: Array | None,
    records: dict[str, Array],
    d_hs: Array,
    d_c: Array | None = None,
    *,
    relu: bool = False,
) -> dict[str, Array]:
    """Runs a layer's gradient back through all steps.

    Args:
        kind, weight, state, mask, relu: See `forward`.
        records: Results of `forward`.
        d_hs: Gradient of the outputs, `[T, B, H]`.
        d_c: Gradient of an LSTM's last c, `[B, H]`.

    Returns:
        The outputs of the kernel by name: `d_gates` `[T, B, G*H]`, the gradient of the recurrent products; of a GRU
        `d_projected`, that of the inputs' contributions (of the others they are equal); `carried_h` and `carried_c`,
        the gradients of h and c before the first step, `[B, H]`. To `carried_h` the product of the first `d_gates`
        and the weights must be added. Except for a GRU it is only set with a mask.
    """
    metal = on_metal()
    kernel = Kernel(BACKWARD[kind], True, False, metal)
    steps, batch, hidden = d_hs.shape
    # contiguous rows, so that all lanes of a warp read neighbours
    fixed = {"weight": mx.contiguous(weight.T)}
    running: dict[str, Array] = {"later_h": mx.zeros((batch, hidden), d_hs.dtype)}
    if d_c is not None:
        running["later_c"] = d_c
    first = {"h": state[0], **({"c": state[1]} if kind == "lstm" else {})}
    results: list[dict[str, Array]] = []
    for begin, end in reversed(_ranges(steps, metal)):
        shapes: dict[str, tuple[int, ...]] = {}
        for name in kernel.outputs:
            wide = (end - begin, batch, GATES[kind] * hidden)
            shapes[name] = wide if name in ("d_gates", "d_projected") else (batch, hidden)
        arrays = {"d_hs": d_hs[begin:end], **fixed, **running}
        arrays |= {name: array[begin:end] for name, array in records.items() if name in kernel.inputs}
        before = {"h": "hs", "c": "cs"}
        arrays |= {name: array if begin == 0 else records[before[name]][begin - 1] for name, array in first.items()}
        if mask is not None:
            arrays["mask"] = mask[begin:end]
        found = launch(kernel, arrays, shapes, RELU=relu, HAS_LATER=bool(results))
        results.append(dict(zip(kernel.outputs, found, strict=True)))
        running["later"], running["later_h"] = results[-1]["d_gates"][0], results[-1]["carried_h"]
        if kind == "lstm":
            running["later_c"] = results[-1]["carried_c"]
    joined = _join(results[::-1])
    return {**joined, **{name: results[-1][name] for name in joined if name.startswith("carried")}}


def _ranges(steps: int, metal: bool) -> list[tuple[int, int]]:
    """Returns the first step and the end of each launch."""
    return [(step, step + 1) for step in range(steps)] if metal else [(0, steps)]


def _join(results: list[dict[str, Array]]) -> dict[str, Array]:
    """Joins the outputs of launches along the steps."""
    if len(results) == 1:
        return results[0]
    return {name: mx.concatenate([result[name] for result in results]) for name in results[0]}
