"""Random numbers as a pure function of a key, PyTorch. They equal those of `icenet.core.rng` bit for bit.

PyTorch has no arithmetic on unsigned words, so words and keys are int32 with the same bits. PyTorch's own generators
are not used. `find_draw` finds the module that uses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from icenet_torch.nn.arrays import Array


def signed(word: int) -> int:
    """Returns the int32 with the bits of an unsigned 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def threefry2x32(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Computes `icenet.core.rng.threefry2x32` on int32 tensors."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    x0, x1 = counter[0] + key[0], counter[1] + key[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            # >> repeats the sign bit; the mask keeps the bits that were shifted in from above
            x1 = (x1 << rotation) | ((x1 >> (32 - rotation)) & ((1 << rotation) - 1))
            x1 = x1 ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + (schedule[(group + 2) % 3] + (group + 1))
    return x0, x1


def threefry2x32_in_place(
    buffers: Array, key: tuple[Array, Array], counter: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Computes `threefry2x32` of keys `[R, 1]` and counters `[N]` in preallocated buffers, int32 `[3, >= R N]`."""
    shape = (key[0].shape[0], counter[0].shape[0])
    x0, x1, high_bits = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
    schedule = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    torch.add(counter[0], key[0], out=x0)
    torch.add(counter[1], key[1], out=x1)
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0.add_(x1)
            # >> repeats the sign bit; the mask keeps the bits that were shifted in from above
            torch.bitwise_right_shift(x1, 32 - rotation, out=high_bits).bitwise_and_((1 << rotation) - 1)
            torch.add(high_bits, x1, alpha=1 << rotation, out=x1)  # a shift and an or in one pass
            x1.bitwise_xor_(x0)
        x0.add_(schedule[(group + 1) % 3])
        x1.add_(schedule[(group + 2) % 3] + (group + 1))
    return x0, x1


def random_bits(keys: Array, n: int) -> Array:
    """Returns `n` random words under each key: keys int32 `[..., 2]` to int32 `[..., n]`, ordered as `rng.bits`."""
    half, odd = divmod(n, 2)
    first = torch.arange(half + odd, dtype=torch.int32, device=keys.device)
    second = torch.where(first < half, first + half + odd, 0)  # the middle word of an odd count has no partner
    words = threefry2x32((keys[..., :1], keys[..., 1:]), (first, second))
    return torch.cat((words[0], words[1][..., :half]), dim=-1)


def random_uniform(keys: Array, n: int) -> Array:
    """Returns uniform variates in [0, 1) under each key: keys int32 `[..., 2]` to fp32 `[..., n]`."""
    words = random_bits(keys, n).to(torch.int64) & 0xFFFFFFFF
    return (words.to(torch.float32) * 2.0**-32).clamp(max=1 - 2.0**-24)


def random_bits_at_least(keys: Array, n: int, threshold: int) -> Array:
    """Returns whether random words are at least an unsigned threshold: keys int32 `[rows, 2]` to bool `[rows, n]`.

    Word pairs are laid out as in MLX's `mx.random.split`: counters (i, i + half) for i below half = ceil(n / 2).
    """
    rows, half = keys.shape[0], (n + 1) // 2
    # flipping the top bit of both sides makes the signed comparison order words as unsigned ones
    top_bit, signed_threshold = signed(0x80000000), signed(threshold ^ 0x80000000)
    if keys.device.type != "cpu" or torch.compiler.is_compiling():
        first = torch.arange(half, dtype=torch.int32, device=keys.device)
        words = threefry2x32((keys[:, :1], keys[:, 1:]), (first, first + half))
        return (torch.cat(words, dim=1) ^ top_bit)[:, :n] >= signed_threshold
    # On the CPU the hash makes about a hundred passes, which stay in the cache if they work in place on small tiles.
    # PyTorch divides more than 2^15 values among its threads. This is faster on an idle machine and many times slower
    # on a busy one, where each pass waits for all threads. With one thread, larger tiles need fewer calls.
    tile = 1 << (15 if torch.get_num_threads() > 1 else 16)
    tile_rows, tile_columns = min(max(tile // max(half, 1), 1), rows), max(min(tile, half), 1)
    buffers = torch.empty((3, tile_rows * tile_columns), dtype=torch.int32)
    out = torch.empty((rows, 2, half), dtype=torch.bool)
    for row in range(0, rows, tile_rows):
        key = (keys[row : row + tile_rows, :1], keys[row : row + tile_rows, 1:])
        for start in range(0, half, tile_columns):
            first = torch.arange(start, min(start + tile_columns, half), dtype=torch.int32)
            words = threefry2x32_in_place(buffers, key, (first, first + half))
            for index, word in enumerate(words):
                columns = slice(start, start + tile_columns)
                torch.ge(word ^ top_bit, signed_threshold, out=out[row : row + tile_rows, index, columns])
    return out.reshape(rows, -1)[:, :n]


def to_keys(keys: np.ndarray) -> Array:
    """Returns keys, uint32 numpy `[..., 2]`, as an array of the framework, int32, with the same bits."""
    return torch.from_numpy(keys.view(np.int32))


def generator_state() -> bytes:
    """Returns the states of PyTorch's own generators: the CPU's and those of the GPUs in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states.append(torch.mps.get_rng_state())
    return b"".join(state.numpy().tobytes() for state in states)


def find_draw(
    modules: Iterable[tuple[str, nn.Module]], call: Callable[[], object], states: Callable[[], object]
) -> tuple[str, nn.Module] | None:
    """Makes a call and returns the first module that changes the state of a random generator in it, and its path.

    Args:
        modules: All modules of a model, by path.
        call: Calls the model.
        states: Returns the states of the generators.

    Returns:
        The innermost module; None if the states stay.
    """
    paths: dict[int, str] = {}
    found: list[tuple[str, nn.Module]] = []
    before: list[object] = []  # of each call that has begun and not ended
    handles: list[Any] = []

    def begin(module: nn.Module, args: Any) -> None:
        before.append(states())

    def end(module: nn.Module, args: Any, outputs: Any) -> None:
        if states() != before.pop():
            found.append((paths[id(module)], module))

    try:
        for path, module in modules:
            if paths.setdefault(id(module), path) == path:
                handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
