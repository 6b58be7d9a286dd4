"""Random numbers that are a pure function of a key, the same on every backend and device.

The generator is threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011), which is also MLX's own: `bits(key, n)` gives the words that MLX draws for an
array of n 32-bit values under the same key, so MLX uses its fast kernels and the PyTorch mirror
(`icenet_torch.nn.random.random_bits`) reproduces them with integer operations.

A key names what a draw is for: `key(seed, "dropout", step, "blocks.0.feed_forward.dropout")`. Nothing has a
hidden state, so order of evaluation, recomputation and a resume change nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # the constant of the Threefish key schedule, 32-bit form
_CHUNK = 1 << 16  # words a block in `bits`: the working set stays in the cache


def threefry2x32(key: tuple[Words, Words], counter: tuple[Words, Words]) -> tuple[Words, Words]:
    """The threefry-2x32-20 hash of `counter` under `key`, elementwise.

    Key and counter are pairs of uint32 arrays that broadcast together; so is the result. Arithmetic is
    modulo 2^32.
    """
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ np.uint32(_PARITY))
    with np.errstate(over="ignore"):
        x0 = counter[0] + k0
        x1 = counter[1] + k1
        for group in range(5):
            for rotation in _ROTATIONS[group % 2]:
                x0 = x0 + x1
                x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
                x1 = x1 ^ x0
            x0 = x0 + schedule[(group + 1) % 3]
            x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def _word(value: int | str) -> int:
    """A 64-bit word for one part of a key: integers as they are, names by the head of their SHA-256."""
    if isinstance(value, str):
        return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "little")
    return int(value) & 0xFFFFFFFFFFFFFFFF


def fold(keys: Words, words: int | str | NDArray[np.integer]) -> Words:
    """Derives keys from keys: uint32 `[..., 2]` and one word (or an array `[...]` of words) to `[..., 2]`."""
    if isinstance(words, (int, str)):
        words = np.asarray(_word(words), dtype=np.uint64)
    else:
        words = np.asarray(words).astype(np.uint64)
    low = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (words >> np.uint64(32)).astype(np.uint32)
    return np.stack(np.broadcast_arrays(*threefry2x32((keys[..., 0], keys[..., 1]), (low, high))), axis=-1)


def key(seed: int, stream: str, *words: int | str) -> Words:
    """The key, uint32 `[2]`, of one draw: a seed, what is drawn (`stream`), and which one (`words`)."""
    result = fold(np.zeros(2, np.uint32), seed)
    for word in (stream, *words):
        result = fold(result, word)
    return result


def dropout_threshold(p: float) -> int:
    """The least 32-bit word that keeps a value, where each is left out with probability p."""
    return min(round(p * 2**32), 2**32 - 1)


def native_seed(seed: int, step: int, rank: int = 0) -> int:
    """What a framework's own generator is seeded with before a step, below 2^63; each process has rows of its own."""
    high, low = (int(word) for word in key(seed, f"native {rank}" if rank else "native", step))
    return (high << 32 | low) >> 1


def keys_for_names(base: Words, names: list[str]) -> Words:
    """One key for each name under a base key `[2]`: uint32 `[len(names), 2]`, in one pass."""
    return fold(base[None, :], np.array([_word(name) for name in names], dtype=np.uint64))


def bits(key: Words, n: int) -> Words:
    """`n` uint32 words drawn under a key `[2]`, in the order in which MLX lays them out."""
    half, odd = divmod(n, 2)
    out = np.empty(n, np.uint32)
    pair = (key[0], key[1])
    for start in range(0, half, _CHUNK):
        first = np.arange(start, min(start + _CHUNK, half), dtype=np.uint32)
        second = first + np.uint32(half + odd)
        out[start : start + len(first)], out[half + odd + start : half + odd + start + len(first)] = threefry2x32(
            pair, (first, second)
        )
    if odd:  # the middle word of an odd count is drawn alone, with a second counter of zero
        out[half] = threefry2x32(pair, (np.full(1, half, np.uint32), np.zeros(1, np.uint32)))[0][0]
    return out


def uniform(key: Words, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Uniform variates in [0, 1), float32, equal to `mx.random.uniform(shape=shape, key=key)` bit for bit."""
    words = bits(key, int(np.prod(shape, dtype=np.int64)))
    values = words.astype(np.float32) * np.float32(2.0**-32)
    return np.minimum(values, np.float32(1 - 2.0**-24)).reshape(shape)


def normal(key: Words, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal variates, float32, by Box and Muller's transform (1958) in float64.

    Drawn on the host: the frameworks' inverse error functions differ from each other.
    """
    n = int(np.prod(shape, dtype=np.int64))
    pairs = (n + 1) // 2
    words = bits(key, 2 * pairs)
    out = np.empty(2 * pairs, np.float32)
    for start in range(0, pairs, _CHUNK):
        stop = min(start + _CHUNK, pairs)
        # (word + 1/2) / 2^32 lies strictly inside (0, 1), so the logarithm is finite
        radius = np.sqrt(-2.0 * np.log((words[start:stop] + 0.5) * 2.0**-32))
        angle = (2.0 * np.pi * 2.0**-32) * words[pairs + start : pairs + stop]
        out[start:stop] = radius * np.cos(angle)
        out[pairs + start : pairs + stop] = radius * np.sin(angle)
    return out[:n].reshape(shape)


def permutation(key: Words, n: int) -> NDArray[np.int64]:
    """A random order of range(n), int64 `[n]`: the argsort of n random 64-bit words (ties keep their order)."""
    words = bits(key, 2 * n).astype(np.uint64)
    return np.argsort((words[:n] << np.uint64(32)) | words[n:], kind="stable").astype(np.int64)
