"""Random numbers: threefry against published vectors, MLX and an implementation in plain integers; equal bits,
uniform variates and dropout masks in NumPy, MLX and PyTorch; distributions; keys; initial values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import icenet.blas

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import both_backends, is_one_line
from hypothesis import given, settings
from hypothesis import strategies as st

import icenet.models
import icenet.nn
import icenet_torch.models
import icenet_torch.nn
from icenet.core import rng
from icenet.core.config import ModelConfig
from icenet.core.errors import WeightsError
from icenet.core.host import threads
from icenet.core.models import init

CHUNK = 1 << 16  # numpy and PyTorch draw this many words at a time; sizes around it are tested
SIZES = [0, 1, 2, 3, 4, 5, 31, 32, 33, 255, 256, 257, 1000, 1001, 65535, 65536, 65537]
LARGE = [2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK + 7]
KEYS = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
CPU = torch.device("cpu")


def words(*values: int) -> Any:
    return np.array(values, np.uint32)


def torch_key(key: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(key).view(np.int32))


def plain_threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32-20 (Salmon et al., 2011) in Python integers, written from the paper."""
    mask = 0xFFFFFFFF
    ks = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (counter[0] + ks[0]) & mask, (counter[1] + ks[1]) & mask
    for round_number in range(20):
        distance = [13, 15, 26, 6, 17, 29, 16, 24][round_number % 8]
        x = (x + y) & mask
        y = ((y << distance | y >> (32 - distance)) & mask) ^ x
        if round_number % 4 == 3:
            group = round_number // 4 + 1
            x = (x + ks[group % 3]) & mask
            y = (y + ks[(group + 1) % 3] + group) & mask
    return x, y


def plain_bits(key: tuple[int, int], n: int) -> list[int]:
    """MLX's order: words i and i + ceil(n / 2) share a counter; the middle word of an odd count has (i, 0)."""
    half, odd = n // 2, n % 2
    pairs = [plain_threefry(key, (i, i + half + odd)) for i in range(half)]
    middle = [plain_threefry(key, (half, 0))[0]] if odd else []
    return [a for a, _ in pairs] + middle + [b for _, b in pairs]


# ---- the generator ----------------------------------------------------------------------------------------

# kat_vectors of Random123, "threefry2x32 20": counter, key, result
VECTORS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),  # the digits of pi
]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_published_vectors(counter: Any, key: Any, result: Any) -> None:
    pair = tuple(words(word) for word in key), tuple(words(word) for word in counter)
    assert tuple(int(word[0]) for word in rng.threefry2x32(*pair)) == result
    assert tuple(rng.fold(np.array(key, np.uint32), counter[0] | counter[1] << 32).tolist()) == result
    signed = [tuple(torch_key(word) for word in part) for part in pair]
    mirrored = icenet_torch.nn.random.threefry2x32(*signed)
    assert tuple(int(word.numpy().view(np.uint32)[0]) for word in mirrored) == result
    assert plain_threefry(key, counter) == result


@settings(max_examples=40, deadline=None)
@given(key=KEYS, n=st.integers(0, 41))
def test_bits_are_the_hash_of_their_counters(key: tuple[int, int], n: int) -> None:
    assert rng.bits(words(*key), n).tolist() == plain_bits(key, n)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000, CHUNK - 1, CHUNK, CHUNK + 1])
def test_bits_equal_mlxs(n: int) -> None:
    key = rng.key(7, "bits", n)
    assert np.array_equal(np.array(mx.random.split(mx.array(key), n)).reshape(-1), rng.bits(key, 2 * n))


@pytest.mark.parametrize("n", SIZES + LARGE)
def test_uniform_variates_equal_mlxs(n: int) -> None:
    key = rng.key(3, "uniform", n)
    ours = rng.uniform(key, (n,))
    assert ours.dtype == np.float32 and ours.shape == (n,)
    assert np.array_equal(ours, np.array(mx.random.uniform(shape=(n,), key=mx.array(key))))


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1), (3, 5), (2, 3, 4)])
def test_uniform_variates_of_any_shape(shape: tuple[int, ...]) -> None:
    key = rng.key(3, "shape")
    assert np.array_equal(rng.uniform(key, shape), np.array(mx.random.uniform(shape=shape, key=mx.array(key))))


@pytest.mark.parametrize("n", SIZES + LARGE)
def test_torch_and_numpy_draw_the_same(n: int) -> None:
    keys = np.stack([rng.key(5, "torch", n, row) for row in range(3)])
    drawn = icenet_torch.nn.random.random_bits(torch_key(keys), n).numpy().view(np.uint32)
    assert np.array_equal(drawn, np.stack([rng.bits(key, n) for key in keys]))
    uniform = icenet_torch.nn.random.random_uniform(torch_key(keys), n)
    assert uniform.dtype == torch.float32
    assert np.array_equal(uniform.numpy(), np.stack([rng.uniform(key, (n,)) for key in keys]))


@pytest.mark.parametrize("n", [1, 2, 3, 257, 50_000])
def test_uniform_variates_under_many_keys(n: int) -> None:
    keys = np.stack([[rng.key(5, "many", row, column) for column in range(2)] for row in range(3)])
    expected = np.stack([[rng.uniform(key, (n,)) for key in row] for row in keys])
    assert np.array_equal(np.array(icenet.nn.random.random_uniform(mx.array(keys), n)), expected)
    assert np.array_equal(icenet_torch.nn.random.random_uniform(torch_key(keys), n).numpy(), expected)


def test_uniform_variates_stay_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest 128 words round to 2^32 in float32; the Gumbel draw needs log(u) < 0."""
    top = np.array([0, 1, 2**32 - 129, 2**32 - 128, 2**32 - 1], np.uint32)
    monkeypatch.setattr(rng, "bits", lambda key, n: top[:n])
    monkeypatch.setattr(icenet_torch.nn.random, "random_bits", lambda keys, n: torch_key(top)[:n])
    ours = rng.uniform(words(0, 0), (5,))
    assert ours.max() == 1 - 2.0**-24 and ours.min() == 0
    assert np.array_equal(icenet_torch.nn.random.random_uniform(torch.zeros(2, dtype=torch.int32), 5).numpy(), ours)


# ---- dropout ----------------------------------------------------------------------------------------------

SHAPES = [
    (1, 0),
    (1,),
    (2,),
    (3,),
    (7, 3),
    (2, 5, 9),
    (3, 0, 2),
    (16, 128),
    (4, 63, 65),
    (1, 2 * CHUNK + 1),
    (3, CHUNK),
]
RATES = [1e-12, 2.0**-33, 2.0**-32, 1e-3, 0.1, 0.25, 0.5, 2 / 3, 0.999, 1 - 2.0**-32, 1 - 2.0**-40]


def row_keys(key: Any, rows: int) -> Any:
    return np.stack([rng.fold(key, row) for row in range(rows)])


@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_masks_agree(shape: tuple[int, ...]) -> None:
    """Each row has its own key, so the number of rows that are drawn together has no effect."""
    n = math.prod(shape[1:])
    for p in RATES:
        keys = row_keys(rng.key(11, "dropout", 4, repr(p)), shape[0])
        drawn = np.stack([rng.bits(key, 2 * math.ceil(n / 2))[:n] for key in keys]).astype(np.float64)
        expected = (drawn >= min(np.rint(p * 2.0**32), 2.0**32 - 1)).reshape(shape)
        mlx = np.array(icenet.nn.dropout.dropout_mask(shape, p, mx.array(keys)))
        mirrored = icenet_torch.nn.dropout.dropout_mask(shape, p, torch_key(keys), CPU).numpy()
        assert mlx.dtype == mirrored.dtype == np.bool_ and mlx.shape == mirrored.shape == shape
        assert np.array_equal(mlx, expected), p
        assert np.array_equal(mirrored, expected), p


def test_rows_that_are_not_in_the_first_axis_are_drawn_under_the_first_key() -> None:
    """In a user's layer the first axis may not be the rows: keys are divided evenly, or only the first is used."""
    keys = row_keys(rng.key(2, "rows"), 4)
    for shape, groups in (((8, 3), 4), ((6, 5), 1)):
        n = math.prod(shape) // groups
        drawn = np.concatenate([rng.bits(key, 2 * math.ceil(n / 2))[:n] for key in keys[:groups]])
        expected = (drawn >= 2**31).reshape(shape)
        assert np.array_equal(np.array(icenet.nn.dropout.dropout_mask(shape, 0.5, mx.array(keys))), expected)
        mask = icenet_torch.nn.dropout.dropout_mask(shape, 0.5, torch_key(keys), CPU)
        assert np.array_equal(mask.numpy(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_on_a_gpu_equal_those_on_the_cpu(shape: tuple[int, ...]) -> None:
    keys = torch_key(row_keys(rng.key(11, "dropout"), shape[0]))
    for p in RATES:
        ours = icenet_torch.nn.dropout.dropout_mask(shape, p, keys.cuda(), torch.device("cuda"))
        assert torch.equal(ours.cpu(), icenet_torch.nn.dropout.dropout_mask(shape, p, keys, CPU)), p
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y = x.detach().cuda().requires_grad_()
        for leaf in (x, y):
            dropout = icenet_torch.nn.Dropout(0.3)
            dropout.seed(keys.to(leaf.device))
            (dropout(leaf) * 2).sum().backward()
        assert torch.equal(y.grad.cpu(), x.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(p: float) -> None:
    x = np.random.default_rng(0).normal(size=(101, 999)).astype(np.float32)
    keys = row_keys(rng.key(1, "dropout", 9, "site"), 101)
    ours, theirs = icenet.nn.Dropout(p), icenet_torch.nn.Dropout(p)
    ours.seed(mx.array(keys))
    theirs.seed(torch_key(keys))
    out, mirrored = np.array(ours(mx.array(x))), theirs(torch.from_numpy(x)).numpy()
    assert np.array_equal(out, mirrored)
    kept = out != 0
    assert abs(kept.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / x.size)
    np.testing.assert_allclose(out[kept], x[kept] / (1 - p), rtol=3e-7)
    ours.eval(), theirs.eval()
    assert np.array_equal(np.array(ours(mx.array(x))), x)
    assert np.array_equal(theirs(torch.from_numpy(x)).numpy(), x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dropout_keeps_the_type(dtype: str) -> None:
    keys = row_keys(rng.key(1, "dropout"), 1)
    ours, theirs = icenet.nn.Dropout(0.3), icenet_torch.nn.Dropout(0.3)
    ours.seed(mx.array(keys))
    theirs.seed(torch_key(keys))
    out = ours(mx.ones((64,), getattr(mx, dtype)))
    mirrored = theirs(torch.ones(64, dtype=getattr(torch, dtype)))
    assert out.dtype == getattr(mx, dtype) and mirrored.dtype == getattr(torch, dtype)
    assert np.array_equal(np.array(out.astype(mx.float32)), mirrored.float().numpy())


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_dropout_without_keys_uses_the_frameworks_generator(draw: int) -> None:
    x = np.ones((100, 100), np.float32)
    mx.random.seed(draw)
    torch.manual_seed(draw)
    for kept in (
        np.array(icenet.nn.Dropout(0.2)(mx.array(x))) != 0,
        icenet_torch.nn.Dropout(0.2)(torch.from_numpy(x)).numpy() != 0,
    ):
        assert abs(kept.mean() - 0.8) < 0.02


def test_each_site_step_and_row_has_its_own_key() -> None:
    config = ModelConfig(type="transformer", hidden_size=8, num_layers=2, num_heads=2, vocab_size=9, max_seq_length=8)
    model, mirror = icenet.models.TransformerModel(config), icenet_torch.models.TransformerModel(config)
    sites = model.dropout_sites()
    assert sites == mirror.dropout_sites() and len(sites) == 5
    drawn = np.concatenate([model.dropout_keys(seed, step, 3) for seed in (0, 1) for step in range(20)])
    assert len({tuple(key) for key in drawn.reshape(-1, 2).tolist()}) == 2 * 20 * 5 * 3
    keys = model.dropout_keys(3, 17, 4)
    assert keys.shape == (5, 4, 2)
    for rows, site in zip(keys, sites, strict=True):
        assert np.array_equal(rows, row_keys(rng.key(3, "dropout", 17, site), 4))
    assert np.array_equal(model.dropout_keys(3, 17, range(1, 3)), keys[:, 1:3])  # those of a micro-batch
    config.dropout = 0.0
    assert icenet.models.TransformerModel(config).dropout_sites() == []


# ---- distributions ----------------------------------------------------------------------------------------


def kolmogorov_smirnov(values: Any, distribution: Any) -> float:
    """sqrt(n) times the largest distance of the empirical distribution; above 1.63 in 1 of 100 samples."""
    n = len(values)
    cdf = distribution(np.sort(values.astype(np.float64)))
    above, below = np.arange(1, n + 1) / n - cdf, cdf - np.arange(n) / n
    return float(max(above.max(), below.max()) * math.sqrt(n))


def normal_cdf(x: Any) -> Any:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_normal_variates_are_normal(seed: int) -> None:
    x = rng.normal(rng.key(seed, "normal"), (200_001,)).astype(np.float64)
    n = len(x)
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs((x[:-1] * x[1:]).mean()) < 4 / math.sqrt(n)
    half = (n + 1) // 2  # the cosine and the sine of one angle
    assert abs((x[: n - half] * x[half:]).mean()) < 4 / math.sqrt(half)
    assert kolmogorov_smirnov(x[:50_000], normal_cdf) < 1.63
    assert kolmogorov_smirnov(x[half : half + 50_000], normal_cdf) < 1.63
    assert 4 < abs(x).max() < 6.8  # the largest value of a 32-bit radius is 6.66


@pytest.mark.parametrize("n", [0, 1, 2, 3, 2 * CHUNK + 3])
def test_normal_variates_are_those_of_box_and_muller(n: int) -> None:
    key = rng.key(2, "normal", n)
    x, pairs = rng.normal(key, (n,)), (n + 1) // 2
    assert x.dtype == np.float32 and x.shape == (n,)
    drawn = rng.bits(key, 2 * pairs)
    for at in {0, 1, n // 2, n - 1} & set(range(n)):
        index = at % pairs
        radius = math.sqrt(-2 * math.log((int(drawn[index]) + 0.5) / 2**32))
        angle = 2 * math.pi * int(drawn[pairs + index]) / 2**32
        expected = radius * (math.cos(angle) if at < pairs else math.sin(angle))
        assert abs(x[at] - expected) <= 2.0**-23 * max(abs(expected), 1e-7)


def plain_box_muller(first: Any, second: Any) -> Any:
    radius = np.sqrt(-2.0 * np.log((first + 0.5) * 2.0**-32))
    angle = (2.0 * np.pi * 2.0**-32) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)


def box_muller(first: Any, second: Any) -> Any:
    out = np.empty((2, len(first)), np.float32)
    rng.box_muller(first, second.copy(), out, np.empty((4, len(first))))
    return out


def test_the_polynomial_gives_the_bits_of_numpys_cosine_and_sine() -> None:
    drawn = rng.bits(rng.key(6, "polynomial"), 2 * CHUNK)
    assert np.array_equal(box_muller(drawn[:CHUNK], drawn[CHUNK:]), plain_box_muller(drawn[:CHUNK], drawn[CHUNK:]))
    axes = np.arange(4, dtype=np.uint32) << np.uint32(30)  # the quarter turns, where one of the two is zero
    second = np.concatenate([axes + np.uint32(offset % 2**32) for offset in range(-300, 301)])
    first = np.full(len(second), 12345, np.uint32)
    assert np.array_equal(box_muller(first, second), plain_box_muller(first, second))


def test_the_polynomial_has_the_stated_error() -> None:
    x = np.concatenate([np.linspace(-1, 1, 20_001), 2.0 ** -np.arange(31.0)])
    found = np.empty_like(x)
    rng._sine(x, found, np.empty_like(x))
    assert abs(found - np.sin(np.pi / 2 * x)).max() < rng._SINE_ERROR - 2.0**-51  # the error of numpy's sine


def test_normal_variates_are_finite_at_the_extreme_words() -> None:
    extreme = words(0, 0, 2**32 - 1, 2**32 - 1), words(0, 2**32 - 1, 0, 2**32 - 1)
    found = box_muller(*extreme)
    assert np.isfinite(found).all() and np.array_equal(found, plain_box_muller(*extreme))


@pytest.mark.parametrize("cores", [1, 3])
def test_normal_variates_do_not_depend_on_threads_and_chunks(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(rng, "_PAIRS", 16)
    n = 1001
    drawn = rng.bits(rng.key(8, "threads"), n + 1)
    expected = plain_box_muller(drawn[:501], drawn[501:]).reshape(-1)[:n] * np.float32(0.37)
    assert np.array_equal(rng.normal(rng.key(8, "threads"), (n,), 0.37), expected)


@pytest.mark.parametrize("n", [0, 1, 2, 1000, 1001])
def test_an_even_number_of_normal_variates_is_drawn_into_given_memory(n: int) -> None:
    memory = np.full((n, 1), np.nan, np.float32)
    drawn = rng.normal(rng.key(8, "memory"), (n, 1), 0.37, memory)
    assert drawn.tobytes() == rng.normal(rng.key(8, "memory"), (n, 1), 0.37).tobytes()
    assert np.shares_memory(drawn, memory) == (n > 0 and n % 2 == 0)


def test_uniform_variates_and_bits_are_uniform() -> None:
    u = rng.uniform(rng.key(4, "uniform"), (200_000,))
    assert kolmogorov_smirnov(u, lambda x: x) < 1.63
    counts = np.bincount(rng.bits(rng.key(4, "bytes"), 200_000).view(np.uint8), minlength=256)
    chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), n=st.integers(0, 300))
def test_a_permutation_contains_each_number_once(seed: int, n: int) -> None:
    order = rng.permutation(rng.key(seed, "order"), n)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, rng.permutation(rng.key(seed, "order"), n))


def test_permutations_are_all_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for index in range(1500):
        order = tuple(rng.permutation(rng.key(0, "order", index), 3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert sum((count - 250) ** 2 / 250 for count in counts.values()) < 20.5  # 1 in 1000 at 5 degrees


# ---- keys -------------------------------------------------------------------------------------------------


def many_keys() -> Iterator[Any]:
    for seed in (0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**63 - 1):
        yield rng.key(seed, "init")
        yield rng.key(seed, "sample")
        for word in (0, 1, 2**32, "0", "1", "", "a", "b", "ab", "blocks.0", "blocks.1", "é"):
            yield rng.key(seed, "init", word)
            yield rng.key(seed, "init", word, 0)
            yield rng.key(seed, "init", 0, 0, word)


def test_different_words_give_different_keys() -> None:
    keys = [tuple(key.tolist()) for key in many_keys()]
    assert len(set(keys)) == len(keys) > 250
    assert rng.key(0, "a", "b").dtype == np.uint32 and rng.key(0, "a").shape == (2,)


def test_the_order_of_words_matters() -> None:
    assert not np.array_equal(rng.key(0, "a", "b"), rng.key(0, "b", "a"))
    assert not np.array_equal(rng.key(0, "s", 1, 2), rng.key(0, "s", 2, 1))
    assert not np.array_equal(rng.key(0, "ab", "c"), rng.key(0, "a", "bc"))


def test_fold_of_an_array_equals_fold_of_each_word() -> None:
    base = rng.key(9, "base")
    count = np.arange(5)
    assert np.array_equal(rng.fold(base[None, :], count), np.stack([rng.fold(base, int(i)) for i in count]))
    names = ["a", "b", "blocks.0.x", ""]
    assert np.array_equal(rng.keys_for_names(base, names), np.stack([rng.fold(base, name) for name in names]))
    assert rng.keys_for_names(base, []).shape == (0, 2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_a_key_is_the_hash_of_its_seed(seed: int) -> None:
    expected = plain_threefry((0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    assert tuple(rng.fold(words(0, 0), seed).tolist()) == expected


# ---- initial values ---------------------------------------------------------------------------------------


def model_config(**changes: Any) -> Any:
    small = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 31, "max_seq_length": 8}
    return ModelConfig(type="transformer", **{**small, **changes})


def initial(backend: str, seed: int = 5, **changes: Any) -> Any:
    package = icenet.models if backend == "mlx" else icenet_torch.models
    return package.TransformerModel(model_config(**changes), seed=seed).weights()


SMALL: Any = {
    "transformer": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 31, "max_seq_length": 8},
    "lstm": {"hidden_size": 12, "num_layers": 2, "vocab_size": 17},
    "cnn": {"hidden_size": 16, "num_layers": 2, "base_channels": 4, "vocab_size": 5},
}
DIGESTS = {
    "transformer": "ccec65d620ba7671",
    "lstm": "76d4b28153beca8c",
    "cnn": "fc3e1eee41397098",
}
"""The first digits of the SHA-256 of all initial values of SMALL, by path, with seed 5."""


@pytest.mark.parametrize("family", SMALL)
@both_backends
def test_initial_values_are_those_of_earlier_versions(backend: str, family: str) -> None:
    config = ModelConfig(type=family, **SMALL[family])
    package = icenet.models if backend == "mlx" else icenet_torch.models
    digest = hashlib.sha256()
    for path, values in sorted(package.MODELS[family](config, seed=5).weights().items()):
        digest.update(path.encode() + np.ascontiguousarray(values).tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[family]


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"norm_position": "post"}, {"num_layers": 5}])
def test_both_backends_start_from_the_same_bits(changes: Any) -> None:
    ours, theirs = initial("mlx", **changes), initial("torch", **changes)
    assert list(ours) == list(theirs)
    for path in ours:
        assert ours[path].dtype == theirs[path].dtype == np.float32
        assert ours[path].tobytes() == theirs[path].tobytes(), path


@both_backends
def test_an_initial_value_depends_on_seed_and_path_only(backend: str) -> None:
    weights = initial(backend)
    for path, values in weights.items():
        if "norm" in path:
            expected = np.full(values.shape, 1 if path.endswith("weight") else 0, np.float32)
        elif path.endswith("bias"):
            expected = np.zeros(values.shape, np.float32)
        else:
            scale = 0.5 if path.endswith(("out_proj.weight", "down_proj.weight")) else 1.0  # 1 / sqrt(2 * 2)
            deviation = np.float32(scale / math.sqrt(values.shape[-1]))
            expected = rng.normal(rng.key(5, "init", path), values.shape) * deviation
        assert np.array_equal(values, expected), path
    # other layers, dropout and positions have no effect, nor have models built before
    for changes in ({"num_layers": 3}, {"tie_embeddings": True}, {"dropout": 0.7, "max_seq_length": 99}):
        other = initial(backend, **changes)
        for path in weights.keys() & other.keys():
            if "num_layers" not in changes or not path.endswith(("out_proj.weight", "down_proj.weight")):
                assert np.array_equal(weights[path], other[path]), path
    assert all(np.array_equal(weights[path], again) for path, again in initial(backend).items())


def test_pytorchs_initial_values_are_drawn_into_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(type="transformer", hidden_size=8, num_layers=1, num_heads=2, vocab_size=9, max_seq_length=8)
    model = icenet_torch.models.TransformerModel(config)
    expected = icenet_torch.models.TransformerModel(config, seed=4).weights()
    weight, before = next(model.parameters()), model.native_arrays()
    loss = (weight * weight).sum()
    copied = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b: (copied.append(tuple(a.shape)), copy(a, b))[1])
    model.init_weights(4)
    assert {len(shape) for shape in copied} == {1}  # ones and zeros
    assert all(array.numpy().tobytes() == expected[path].tobytes() for path, array in before.items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model.double().init_weights(4)  # other dtypes are converted
    assert all(np.array_equal(values, expected[path]) for path, values in model.weights().items())


def test_another_seed_gives_other_values() -> None:
    first, second = initial("mlx", seed=0), initial("mlx", seed=1)
    for path in first:
        assert np.array_equal(first[path], second[path]) == (path.endswith("bias") or "norm" in path), path


def test_the_last_projection_of_a_branch_shrinks_with_depth() -> None:
    for layers in (1, 2, 8):
        values = initial("torch", num_layers=layers, hidden_size=128)["blocks.0.attention.out_proj.weight"]
        expected = 1 / math.sqrt(2 * layers * 128)
        assert abs(values.std() / expected - 1) < 4 / math.sqrt(2 * values.size)


def test_an_unknown_kind_has_no_rule() -> None:
    with pytest.raises(WeightsError) as caught:
        init.initial_value("magic", "b", "a.b", (2, 2), 0)
    assert is_one_line(caught.value, "a.b", "'magic'")


def test_positions_are_those_of_the_paper() -> None:
    table = init.sinusoidal_rows(24, 0, 600)
    assert table.dtype == np.float32 and table.shape == (600, 24)
    for position in (0, 1, 7, 599):
        for column in range(24):
            angle = position / 10000 ** (column // 2 * 2 / 24)
            expected = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert abs(table[position, column] - expected) < 7e-8
