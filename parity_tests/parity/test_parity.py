"""The transformer on MLX against its PyTorch mirror, by the yardstick; and the mirror against what is not ours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from icenet.core import rng
from icenet.core.config import Config
from icenet.core.models.init import sinusoidal_positions
from icenet.parity.run import build, curves, judge_engines, optimizer_rows, random_batch, run, unequal
from icenet.parity.yardstick import FACTOR, judge, judge_curve
from icenet_torch.nn import random

BASE = {"hidden_size": 48, "num_layers": 2, "num_heads": 3, "vocab_size": 83, "max_seq_length": 40, "dropout": 0.0}

CASES: dict[str, dict[str, Any]] = {
    "pre-norm, causal": {},
    "dropout": {"dropout": 0.1},
    "post-norm": {"norm_position": "post"},
    "post-norm, bidirectional, tied, dropout": {
        "norm_position": "post",
        "causal": False,
        "tie_embeddings": True,
        "dropout": 0.2,
    },
    "bidirectional": {"causal": False},
    "tied": {"tie_embeddings": True},
    "relu": {"activation": "relu"},
    "silu, wide": {"activation": "silu", "feed_forward_multiplier": 3, "num_heads": 6},
    "gelu_tanh, dropout": {"activation": "gelu_tanh", "dropout": 0.3},
    "one head, odd vocabulary": {"num_heads": 1, "vocab_size": 257, "hidden_size": 34},
    "four layers": {"num_layers": 4, "hidden_size": 64, "num_heads": 4},
}


def config(**model: Any) -> Config:
    return Config.from_dict({"seed": 7, "device": "cpu", "model": {"type": "transformer", **BASE, **model}})


def judged(given: Config, batch: Any, dtype: str = "fp32") -> None:
    report = judge_engines(build(given, dtype), batch, step=2)
    assert report.unequal_weights == []
    assert report.passed, report.verdict()
    titles = [section.title for section in report.sections]
    assert titles[-2:] == ["loss and gradients, training", "optimizer step on equal gradients"]
    assert ("layers, training" in titles) is (given.model.dropout > 0)
    parameters = {row.path for row in report.sections[-2].rows if row.kind == "gradient"}
    assert len(parameters) == report.num_weights  # every parameter has a gradient


@pytest.mark.parametrize("name", CASES)
def test_fp32(name: str) -> None:
    given = config(**CASES[name])
    judged(given, random_batch(given, rows=3, length=37))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["dropout", "post-norm, bidirectional, tied, dropout", "silu, wide"])
def test_half_precision(name: str, dtype: str) -> None:
    given = config(**CASES[name])
    judged(given, random_batch(given, rows=3, length=37), dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(causal: bool, side: str) -> None:
    given = config(causal=causal, dropout=0.1)
    batch = random_batch(given, rows=3, length=21)
    mask = np.arange(21) < np.array([[21], [13], [1]])
    mask = mask if side == "right" else mask[:, ::-1]
    batch["labels"] = np.where(mask, batch["labels"], -100).astype(np.int32)
    judged(given, {**batch, "attention_mask": np.ascontiguousarray(mask).astype(np.int32)})


def test_one_token() -> None:
    """Softmax over one position: the gradients of queries and keys are zero exactly, in every dtype."""
    given = config()
    judged(given, random_batch(given, rows=1, length=1))


def test_large_weights() -> None:
    """Sharp attention and large logits, as a trained model has: the noise grows, and so does the yardstick."""
    given = config(dropout=0.1)
    engines = build(given)
    weights = {path: array * np.float32(4) for path, array in engines.torch.weights().items()}
    for engine in engines:
        engine.set_weights(weights)
    report = judge_engines(engines, random_batch(given, rows=3, length=37))
    assert report.passed, report.verdict()


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3])
def test_initial_weights_are_equal_bit_for_bit(seed: int) -> None:
    given = config(tie_embeddings=seed == 1)
    given.seed = seed
    engines = build(given)
    assert unequal(engines.mlx.weights(), engines.torch.weights()) == []
    other = config(tie_embeddings=seed == 1)
    assert len(unequal(build(other).torch.weights(), engines.torch.weights())) > 5  # another seed, other weights


def test_ten_optimizer_steps_on_equal_gradients() -> None:
    given = config()
    given.training.learning_rate = 3e-3
    engines = build(given)
    gradients = [
        {
            path: rng.normal(rng.key(step, "gradient", path), array.shape) * np.float32(10.0 ** -(index % 5))
            for index, (path, array) in enumerate(engines.torch.weights().items())
        }
        for step in range(10)
    ]
    rows = optimizer_rows(engines, gradients)
    assert {row.kind for row in rows} == {"parameter", "moment"}
    assert len(rows) == 3 * len(gradients[0])
    worst = max(rows, key=lambda row: row.ratio)
    assert worst.ratio <= FACTOR, f"{worst.path}: {worst.ratio}"


@pytest.mark.parametrize("shape", [(8, 1024), (1, 8192), (8192,), (2, 37)])
def test_a_bias_that_sums_many_positions(shape: tuple[int, ...]) -> None:
    """MLX adds up a bias's gradient term by term on the CPU, which is 13 times PyTorch's error at 8192 terms."""
    import mlx.core as mx

    from icenet import nn as mlx_ops
    from icenet_torch import nn as torch_ops

    x, g = (rng.normal(rng.key(0, name), (*shape, 48)) for name in ("x", "g"))
    weight, bias = rng.normal(rng.key(0, "weight"), (48, 48)) / 7, np.zeros(48, np.float32)
    with mx.stream(mx.cpu):
        _, mlx = mx.vjp(mlx_ops.linear, [mx.array(x), mx.array(weight), mx.array(bias)], [mx.array(g)])
        found = [np.array(gradient) for gradient in mlx]
    noise, exact = [], []
    for dtype, results in ((torch.float32, noise), (torch.float64, exact)):
        leaves = [torch.tensor(array, dtype=dtype, requires_grad=True) for array in (x, weight, bias)]
        torch_ops.linear(*leaves).backward(torch.tensor(g, dtype=dtype))
        results.extend(leaf.grad.numpy() for leaf in leaves)
    for name, ours, theirs, truth in zip(("input", "weight", "bias"), found, noise, exact, strict=True):
        assert judge(ours, theirs, truth).ratio <= FACTOR, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_training_curve_on_real_text(dtype: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICENET_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"line %d: the quick brown fox, %d times\n" % (i, i * i % 97) for i in range(3000)))
    given = config(dropout=0.1, vocab_size=257)
    given.data.source = str(text)
    given.training.learning_rate = 3e-3
    given.training.max_steps, given.training.warmup_steps, given.training.batch_size = 30, 5, 4
    losses = curves(build(given, dtype), 30)
    assert all(len(curve) == 30 for curve in losses.values())
    assert losses["PyTorch float64"][-1] < losses["PyTorch float64"][0] - 1.5  # it did learn
    verdict = judge_curve(*losses.values())
    assert verdict.passed, f"{verdict.worst} at step {verdict.worst_step}"


def test_run_tells_its_progress_and_takes_weights() -> None:
    given = config()
    told: list[tuple[str, int, int]] = []
    weights = build(config(), None).torch.weights()
    weights["output.weight"] = weights["output.weight"] + np.float32(0.5)
    report = run(given, weights, progress=lambda *stage: told.append(stage))
    assert report.passed, report.verdict()
    assert {stage for stage, _, _ in told} >= {"building", "layers, evaluation", "gradients", "optimizer step"}
    assert report.engines["MLX"]["framework"] == "MLX" and report.engines["reference"]["device"] == "cpu"


# ---- what is not ours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_mirror_is_torchs_own_encoder_layer(norm_position: str, causal: bool) -> None:
    """The hidden states are those of `torch.nn.TransformerEncoderLayer` with our weights, in float64."""
    given = config(norm_position=norm_position, causal=causal)
    ours = build(given).reference
    values = {
        path: torch.from_numpy(rng.normal(rng.key(1, "own", path), array.shape).astype(np.float64) / 6)
        + (1 if "norm.weight" in path else 0)
        for path, array in ours.weights().items()
    }
    ours.set_weights({path: tensor.numpy() for path, tensor in values.items()})
    layers = []
    for index in range(2):
        layer = torch.nn.TransformerEncoderLayer(
            48, 3, 192, 0.0, "gelu", batch_first=True, norm_first=norm_position == "pre", dtype=torch.float64
        )
        of = {path.removeprefix(f"blocks.{index}."): tensor for path, tensor in values.items()}
        state = {
            "self_attn.in_proj_weight": torch.cat([of[f"attention.{x}_proj.weight"] for x in "qkv"]),
            "self_attn.in_proj_bias": torch.cat([of[f"attention.{x}_proj.bias"] for x in "qkv"]),
        }
        names = {
            "self_attn.out_proj": "attention.out_proj",
            "linear1": "feed_forward.up_proj",
            "linear2": "feed_forward.down_proj",
            "norm1": "attention_norm",
            "norm2": "feed_forward_norm",
        }
        for theirs, name in names.items():
            state |= {f"{theirs}.{part}": of[f"{name}.{part}"] for part in ("weight", "bias")}
        layer.load_state_dict(state, strict=True)
        layers.append(layer.train())  # the fused path for inference is another implementation; dropout is 0
    ids = torch.from_numpy(random_batch(given, rows=3, length=37)["inputs"]).long()
    positions = torch.tensor(papers_positions(37, 48), dtype=torch.float32).double()
    x = values["token_embedding.weight"][ids] * math.sqrt(48) + positions
    mask = torch.nn.Transformer.generate_square_subsequent_mask(37, dtype=torch.float64) if causal else None
    for layer in layers:
        x = layer(x, src_mask=mask)
    if norm_position == "pre":
        x = torch.nn.functional.layer_norm(x, (48,), values["final_norm.weight"], values["final_norm.bias"], 1e-5)
    expected = (x @ values["output.weight"].T).detach().numpy()
    found = ours.forward({"inputs": ids.numpy().astype(np.int32)})
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def papers_positions(length: int, width: int) -> list[list[float]]:
    """Section 3.5 of the paper, written with `math` alone."""
    table = []
    for position in range(length):
        row = []
        for column in range(width):
            angle = position / 10000 ** (2 * (column // 2) / width)
            row.append(math.sin(angle) if column % 2 == 0 else math.cos(angle))
        table.append(row)
    return table


@pytest.mark.parametrize(("length", "width"), [(1, 2), (37, 48), (512, 34)])
def test_sinusoidal_positions_are_the_papers(length: int, width: int) -> None:
    found = sinusoidal_positions(length, width)
    assert found.dtype == np.float32 and found.shape == (length, width)
    np.testing.assert_allclose(found, papers_positions(length, width), rtol=0, atol=1e-7)


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32-20 as the paper states it, on Python's integers."""
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    k = [*key, 0x1BD11BDA ^ key[0] ^ key[1]]
    x = [(counter[0] + k[0]) % 2**32, (counter[1] + k[1]) % 2**32]
    for r in range(20):
        x[0] = (x[0] + x[1]) % 2**32
        x[1] = ((x[1] << rotations[r % 8]) | (x[1] >> (32 - rotations[r % 8]))) % 2**32
        x[1] ^= x[0]
        if r % 4 == 3:
            s = r // 4 + 1
            x = [(x[0] + k[s % 3]) % 2**32, (x[1] + k[(s + 1) % 3] + s) % 2**32]
    return x[0], x[1]


def test_threefry_is_the_papers() -> None:
    # known answers of the authors' Random123 distribution (kat_vectors)
    assert threefry((0, 0), (0, 0)) == (0x6B200159, 0x99BA4EFE)
    assert threefry((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2) == (0x1CB996FC, 0xBB002BE7)
    assert threefry((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)) == (0xC4923A9C, 0x483DF7A0)
    key = rng.key(3, "test", 1)
    for n in (1, 2, 7, 100):
        half = (n + 1) // 2
        pairs = [threefry((int(key[0]), int(key[1])), (i, i + half if i + half < n else 0)) for i in range(half)]
        assert rng.bits(key, n).tolist() == ([a for a, _ in pairs] + [b for _, b in pairs])[:n]


@pytest.mark.parametrize("n", [1, 2, 5, 1000, 70001])
def test_bits_are_the_same_in_numpy_mlx_and_torch(n: int) -> None:
    import mlx.core as mx

    from icenet.nn import dropout as mlx_ops
    from icenet_torch.nn import dropout as torch_ops

    key = rng.key(5, "bits", n)
    torch_key = torch.from_numpy(key.view(np.int32).copy())
    np.testing.assert_array_equal(random.random_bits(torch_key, n).numpy().view(np.uint32), rng.bits(key, n))
    uniform = rng.uniform(key, (n,))
    np.testing.assert_array_equal(np.array(mx.random.uniform(shape=(n,), key=mx.array(key))), uniform)
    np.testing.assert_array_equal(random.random_uniform(torch_key, n).numpy(), uniform)
    assert uniform.min() >= 0 and uniform.max() < 1
    ours = np.array(mlx_ops.dropout_mask((1, n), 0.3, mx.array(key[None])))
    theirs = torch_ops.dropout_mask((1, n), 0.3, torch_key[None], torch.device("cpu")).numpy()
    np.testing.assert_array_equal(ours, theirs)
    if n > 10000:
        assert abs(ours.mean() - 0.7) < 5 * math.sqrt(0.21 / n)


def test_normal_variates_are_normal_and_the_permutation_one() -> None:
    values = rng.normal(rng.key(0, "normal"), (100_000,)).astype(np.float64)
    deviations = sorted([abs(values.mean()), abs(values.var() - 1) / math.sqrt(2), abs((values**3).mean()) / 4])
    assert deviations[-1] < 5 / math.sqrt(100_000)
    inside = (np.abs(values) < 1.96).mean()
    assert abs(inside - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 100_000)
    order = rng.permutation(rng.key(0, "order"), 1000)
    assert sorted(order.tolist()) == list(range(1000)) and order.tolist() != list(range(1000))
