"""Random numbers that are a pure function of their key, PyTorch."""

from __future__ import annotations

import torch

from icenet_torch.nn.arrays import Array


def signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def threefry2x32(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """`icenet.core.rng.threefry2x32` on int32 tensors: the same bits."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    x0, x1 = counter[0] + key[0], counter[1] + key[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            # >> repeats the sign bit: the mask keeps the bits that came from above
            x1 = (x1 << rotation) | ((x1 >> (32 - rotation)) & ((1 << rotation) - 1))
            x1 = x1 ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + (schedule[(group + 2) % 3] + (group + 1))
    return x0, x1


def threefry2x32_in_place(room: Array, key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """`threefry2x32` of keys `[R, 1]` and counters `[N]`, worked out in `room`, int32 `[3, >= R N]`."""
    shape = (key[0].shape[0], counter[0].shape[0])
    x0, x1, above = (part[: shape[0] * shape[1]].view(shape) for part in room)
    schedule = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    torch.add(counter[0], key[0], out=x0)
    torch.add(counter[1], key[1], out=x1)
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0.add_(x1)
            # >> repeats the sign bit: the mask keeps the bits that came from above
            torch.bitwise_right_shift(x1, 32 - rotation, out=above).bitwise_and_((1 << rotation) - 1)
            torch.add(above, x1, alpha=1 << rotation, out=x1)  # a shift and an or in one pass
            x1.bitwise_xor_(x0)
        x0.add_(schedule[(group + 1) % 3])
        x1.add_(schedule[(group + 2) % 3] + (group + 1))
    return x0, x1


def random_bits(keys: Array, n: int) -> Array:
    """`n` random words under each of the keys, int32 `[..., 2]`: int32 `[..., n]`, as `rng.bits` orders them."""
    half, odd = divmod(n, 2)
    first = torch.arange(half + odd, dtype=torch.int32, device=keys.device)
    second = torch.where(first < half, first + half + odd, 0)  # the middle word of an odd count is alone
    words = threefry2x32((keys[..., :1], keys[..., 1:]), (first, second))
    return torch.cat((words[0], words[1][..., :half]), dim=-1)


def random_uniform(keys: Array, n: int) -> Array:
    """Uniform variates in [0, 1), float32 `[..., n]`, under each of the keys: MLX's own, bit for bit."""
    words = random_bits(keys, n).to(torch.int64) & 0xFFFFFFFF
    return (words.to(torch.float32) * 2.0**-32).clamp(max=1 - 2.0**-24)
