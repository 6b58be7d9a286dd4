"""Random numbers as a pure function of a key, the same on every backend and device.

The generator is threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011). MLX uses the same generator: `bits(key, n)` returns the words that MLX draws for an array of n
32-bit values under the same key. MLX uses its own kernels, and `icenet_torch.nn.random` reproduces them with integer
operations.

A key identifies a draw: `key(seed, "dropout", step, "blocks.0.feed_forward.dropout")`. There is no hidden state, so
the order of evaluation, recomputation and resuming a run have no effect.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from icenet.core.host.threads import for_ranges

Words = NDArray[np.uint32]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # the constant of the Threefish key schedule, 32-bit form
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 16  # words per chunk, so that the working set stays in the cache
_PAIRS = 1 << 17  # pairs of normal variates per chunk
_THREADS = 4  # at most, that draw normal variates
# numpy releases Python's lock within each of the 170 operations on a chunk, and threads wait for it in between.
# Measured on a Xeon with 16 cores, in ns per pair, by the size of a chunk and the number of threads (1, 2, 4, 8, 16):
#   2^15: 36, 28, 41, 44, 49    2^17: 37, 21, 13, 16, 15    2^19: 65, 35, 17, 11, 12 (not in the cache, 27 MB each)
_ANGLE = 2.0 * np.pi * 2.0**-32  # of a word, in radians
_SINE = (  # sin(pi/2 x) = x P(x^2) for |x| <= 1: the polynomial of this degree with the smallest error (Remez, 1934)
    1.570796326794307,
    -0.6459640974842117,
    0.07969262600786799,
    -0.004681752998645458,
    0.00016043839979722318,
    -3.5951840720871704e-06,
    5.446499619434672e-08,
)
_SINE_ERROR = 2.0**-43  # above that of the polynomial, 2^-44.5, and of its evaluation in float64, 2^-51


def threefry2x32(key: tuple[Words, Words], counter: tuple[Words, Words]) -> tuple[Words, Words]:
    """Computes the threefry-2x32-20 hash of `counter` under `key`, elementwise.

    Key and counter are pairs of uint32 arrays that broadcast together. The result is such a pair. Arithmetic is
    modulo 2^32.
    """
    x0, x1 = (np.array(word) for word in np.broadcast_arrays(*counter, *key)[:2])
    _hash_in_place(key, x0, x1, np.empty_like(x1))
    return x0, x1


def _hash_in_place(key: tuple[Words, Words], x0: Words, x1: Words, scratch: Words) -> None:
    """Replaces a counter by its hash. Without new arrays, whose memory would take longer than the arithmetic."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ np.uint32(_PARITY))
    with np.errstate(over="ignore"):
        x0 += k0
        x1 += k1
        for group in range(5):
            for rotation in _ROTATIONS[group % 2]:
                x0 += x1
                np.left_shift(x1, np.uint32(rotation), out=scratch)
                x1 >>= np.uint32(32 - rotation)
                x1 |= scratch
                x1 ^= x0
            x0 += schedule[(group + 1) % 3]
            x1 += schedule[(group + 2) % 3] + np.uint32(group + 1)


def _word(value: int | str) -> int:
    """Returns the 64-bit word of one part of a key: an integer itself, or the first 8 bytes of a name's SHA-256."""
    if isinstance(value, str):
        return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "little")
    return int(value) & 0xFFFFFFFFFFFFFFFF


def fold(keys: Words, words: int | str | NDArray[np.integer]) -> Words:
    """Derives keys, uint32 `[..., 2]`, from keys `[..., 2]` and one word or an array of words `[...]`."""
    if isinstance(words, (int, str)):
        word = _word(words)
        if keys.ndim == 1:
            return np.array(_threefry_of_ints(int(keys[0]), int(keys[1]), word & _MASK, word >> 32), np.uint32)
        words = np.asarray(word, dtype=np.uint64)
    else:
        words = np.asarray(words).astype(np.uint64)
    low = (words & np.uint64(_MASK)).astype(np.uint32)
    high = (words >> np.uint64(32)).astype(np.uint32)
    return np.stack(np.broadcast_arrays(*threefry2x32((keys[..., 0], keys[..., 1]), (low, high))), axis=-1)


def _threefry_of_ints(k0: int, k1: int, x0: int, x1: int) -> tuple[int, int]:
    """Computes `threefry2x32` of single words; for these, numpy's calls take ten times as long."""
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = (x0 + k0) & _MASK, (x1 + k1) & _MASK
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & _MASK
            x1 = ((x1 << rotation) & _MASK | x1 >> (32 - rotation)) ^ x0
        x0 = (x0 + schedule[(group + 1) % 3]) & _MASK
        x1 = (x1 + schedule[(group + 2) % 3] + group + 1) & _MASK
    return x0, x1


def key(seed: int, stream: str, *words: int | str) -> Words:
    """Returns the key of a draw, uint32 `[2]`: the seed, the kind of draw (`stream`), and its index (`words`)."""
    result = fold(np.zeros(2, np.uint32), seed)
    for word in (stream, *words):
        result = fold(result, word)
    return result


def dropout_threshold(p: float) -> int:
    """Returns the smallest 32-bit word that keeps a value, for a probability p of dropping it."""
    return min(round(p * 2**32), 2**32 - 1)


def native_seed(seed: int, step: int, rank: int = 0) -> int:
    """Returns the seed of a framework's own generator for a step, below 2^63; it differs between processes."""
    high, low = (int(word) for word in key(seed, f"native {rank}" if rank else "native", step))
    return (high << 32 | low) >> 1


def keys_for_names(base: Words, names: list[str]) -> Words:
    """Returns one key for each name, derived from a base key `[2]`: uint32 `[len(names), 2]`."""
    return fold(base[None, :], np.array([_word(name) for name in names], dtype=np.uint64))


def bits(key: Words, n: int) -> Words:
    """Returns `n` random words under a key `[2]`, uint32, in MLX's order."""
    half, odd = divmod(n, 2)
    out = np.empty(n, np.uint32)
    pair = (key[0], key[1])
    for start in range(0, half, _CHUNK):
        first = np.arange(start, min(start + _CHUNK, half), dtype=np.uint32)
        second = first + np.uint32(half + odd)
        out[start : start + len(first)], out[half + odd + start : half + odd + start + len(first)] = threefry2x32(
            pair, (first, second)
        )
    if odd:  # the middle word of an odd count has no partner; its second counter is zero
        out[half] = threefry2x32(pair, (np.full(1, half, np.uint32), np.zeros(1, np.uint32)))[0][0]
    return out


def uniform(key: Words, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns uniform variates in [0, 1), float32, bitwise equal to `mx.random.uniform(shape=shape, key=key)`."""
    words = bits(key, int(np.prod(shape, dtype=np.int64)))
    values = words.astype(np.float32) * np.float32(2.0**-32)
    return np.minimum(values, np.float32(1 - 2.0**-24)).reshape(shape)


def normal(
    key: Words, shape: tuple[int, ...], scale: float = 1.0, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Returns normal variates, float32, drawn on several cores.

    They are computed by the Box-Muller transform (1958) in float64, rounded to float32, and multiplied by `scale` in
    float32. They are drawn on the host, because the frameworks' inverse error functions differ.

    Args:
        key: Key of the draw, uint32 `[2]`.
        shape: Shape of the result.
        scale: Standard deviation. The mean is 0.
        out: C-contiguous memory of this shape, which is used for an even number of variates. The two of a pair have
            places half the array apart, and with an odd number the last has none.
    """
    n = int(np.prod(shape, dtype=np.int64))
    pairs = (n + 1) // 2
    values = np.empty((2, pairs), np.float32) if out is None or n % 2 else out.reshape(2, pairs)

    def draw(start: int, stop: int) -> None:
        size = min(_PAIRS, stop - start)
        counter = np.arange(size, dtype=np.uint32)
        words, scratch = np.empty((3, size), np.uint32), np.empty((4, size), np.float64)
        for begin in range(start, stop, _PAIRS):
            chunk = values[:, begin : min(begin + _PAIRS, stop)]
            first, second, third = words[:, : chunk.shape[1]]
            np.add(counter[: len(first)], np.uint32(begin), out=first)
            np.add(first, np.uint32(pairs), out=second)
            _hash_in_place((key[0], key[1]), first, second, third)
            box_muller(first, second, chunk, scratch[:, : len(first)])
            if scale != 1.0:
                chunk *= np.float32(scale)

    for_ranges(draw, pairs, smallest=_PAIRS, most=_THREADS)
    return values.reshape(-1)[:n].reshape(shape)


def box_muller(first: Words, second: Words, out: NDArray[np.float32], scratch: NDArray[np.float64]) -> None:
    """Computes radius * cos(angle) and radius * sin(angle) of pairs of words.

    The results are those of `np.cos` and `np.sin` in float64, rounded to float32, in half the time. A polynomial
    computes cosine and sine. Where its error could change the rounded value, which is 1 value in 38,500, numpy's
    function is called.

    Args:
        first, second: Random words of radius and angle, `[n]`.
        out: The variates, float32 `[2, n]`.
        scratch: Memory for intermediate results, `[4, n]`.
    """
    radius, sine, angle, square = scratch
    # (word + 1/2) / 2^32 is strictly between 0 and 1, so the logarithm is finite
    np.copyto(radius, first)
    radius += 0.5
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    rounded = square.view(np.float32)[: len(first)]
    for row, quarter_turns, function in ((out[0], 0, np.cos), (out[1], 1, np.sin)):
        # cos(a) = sin(pi/2 - |a|), an angle between -pi/2 and pi/2. int32 wraps as angles do.
        turns = row.view(np.int32)
        np.subtract(second.view(np.int32), np.int32(quarter_turns << 30), out=turns)
        np.abs(turns, out=turns)
        np.subtract(np.int32(2**30), turns, out=turns)
        np.copyto(angle, turns)
        angle *= 2.0**-30
        _sine(angle, sine, square)
        sine -= _SINE_ERROR
        np.multiply(sine, radius, out=angle)
        np.copyto(row, angle, casting="same_kind")
        sine += 2 * _SINE_ERROR
        sine *= radius
        np.copyto(rounded, sine, casting="same_kind")
        uncertain = np.flatnonzero(row != rounded)
        row[uncertain] = radius[uncertain] * function(_ANGLE * second[uncertain])


def _sine(x: NDArray[np.float64], out: NDArray[np.float64], square: NDArray[np.float64]) -> None:
    """Computes sin(pi/2 x) for |x| <= 1 with an error of at most `_SINE_ERROR`; `square` is scratch memory."""
    np.multiply(x, x, out=square)
    np.multiply(square, _SINE[-1], out=out)
    for coefficient in _SINE[-2:0:-1]:
        out += coefficient
        out *= square
    out += _SINE[0]
    out *= x


def permutation(key: Words, n: int) -> NDArray[np.int64]:
    """Returns a random permutation of range(n), int64 `[n]`: the stable argsort of n random 64-bit words."""
    words = bits(key, 2 * n).astype(np.uint64)
    return np.argsort((words[:n] << np.uint64(32)) | words[n:], kind="stable").astype(np.int64)
