"""The transformer on MLX compared with its PyTorch mirror, and the mirror with PyTorch's own layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import is_one_line
from parity_config import transformer_config

from icenet.core import rng
from icenet.core.config import Config
from icenet.core.errors import NonFiniteError
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import compare_engines, curves, optimizer_rows, random_batch, run, unequal
from icenet.parity.curves import judge_curve
from icenet.parity.yardstick import FACTOR, judge

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


def check(config: Config, batch: Any, dtype: str = "fp32") -> None:
    """Compares the backends on a batch, and checks that the report is complete."""
    report = compare_engines(build(config, dtype), batch, step=2)
    assert report.unequal_weights == []
    assert report.passed, report.verdict()
    titles = [section.title for section in report.sections]
    assert titles[-2:] == ["loss and gradients, training", "training step on equal gradients"]
    assert ("layers, training" in titles) is (config.model.dropout > 0)
    parameters = {row.path for row in report.sections[-2].rows if row.kind == "gradient"}
    assert len(parameters) == report.num_weights  # every parameter has a gradient


SLOW_CASES = ("post-norm", "bidirectional", "tied", "four layers")
"""Cases whose options another case has as well."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_CASES else name for name in CASES]
)
def test_fp32(name: str) -> None:
    config = transformer_config(**CASES[name])
    check(config, random_batch(config, rows=3, length=37))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dropout", "bf16"),
        ("silu, wide", "bf16"),
        ("post-norm, bidirectional, tied, dropout", "fp16"),
        pytest.param("dropout", "fp16", marks=pytest.mark.slow),
        pytest.param("silu, wide", "fp16", marks=pytest.mark.slow),
        pytest.param("post-norm, bidirectional, tied, dropout", "bf16", marks=pytest.mark.slow),
    ],
)
def test_half_precision(name: str, dtype: str) -> None:
    config = transformer_config(**CASES[name])
    check(config, random_batch(config, rows=3, length=37), dtype)


@pytest.mark.parametrize(
    ("side", "causal"),
    [
        ("left", True),
        ("right", False),
        pytest.param("left", False, marks=pytest.mark.slow),
        pytest.param("right", True, marks=pytest.mark.slow),
    ],
)
def test_padding(causal: bool, side: str) -> None:
    config = transformer_config(causal=causal, dropout=0.1)
    batch = random_batch(config, rows=3, length=21)
    mask = np.arange(21) < np.array([[21], [13], [1]])
    mask = mask if side == "right" else mask[:, ::-1]
    batch["labels"] = np.where(mask, batch["labels"], -100).astype(np.int32)
    check(config, {**batch, "attention_mask": np.ascontiguousarray(mask).astype(np.int32)})


def test_one_token() -> None:
    """Softmax over one position: the gradients of queries and keys are exactly zero in every dtype."""
    config = transformer_config()
    check(config, random_batch(config, rows=1, length=1))


def test_weights_that_are_not_finite() -> None:
    config = transformer_config()
    weights = build(config).torch.weights()
    weights["blocks.0.attention.out_proj.bias"][3] = np.inf
    with pytest.raises(NonFiniteError) as caught:
        run(config, weights)
    assert is_one_line(caught.value, "blocks.0.attention.out_proj.bias")


def test_large_weights() -> None:
    """Peaked attention and large logits, as in a trained model: error and noise both grow."""
    config = transformer_config(dropout=0.1)
    engines = build(config)
    weights = {path: array * np.float32(4) for path, array in engines.torch.weights().items()}
    for engine in engines:
        engine.set_weights(weights)
    report = compare_engines(engines, random_batch(config, rows=3, length=37))
    assert report.passed, report.verdict()


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3])
def test_initial_weights_are_equal_bit_for_bit(seed: int) -> None:
    config = transformer_config(tie_embeddings=seed == 1)
    config.seed = seed
    engines = build(config)
    assert unequal(engines.mlx.weights(), engines.torch.weights()) == []
    other = transformer_config(tie_embeddings=seed == 1)
    assert len(unequal(build(other).torch.weights(), engines.torch.weights())) > 5  # another seed, other weights


def test_ten_optimizer_steps_on_equal_gradients() -> None:
    config = transformer_config()
    config.training.learning_rate = 3e-3
    engines = build(config)
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
def test_a_bias_gradient_that_sums_many_positions(shape: tuple[int, ...]) -> None:
    """MLX sums a bias gradient term by term on the CPU, which has 13 times PyTorch's error at 8192 terms."""
    import mlx.core as mx

    from icenet.nn import linear as mlx_ops
    from icenet_torch.nn import linear as torch_ops

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


@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_training_curve_on_text(dtype: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"line %d: the quick brown fox, %d times\n" % (i, i * i % 97) for i in range(3000)))
    config = transformer_config(dropout=0.1, vocab_size=257)
    config.data.source = str(text)
    config.training.learning_rate = 3e-3
    config.training.max_steps, config.training.warmup_steps, config.training.batch_size = 30, 5, 4
    steps = 30 if dtype == "fp32" else 12
    losses = curves(build(config, dtype), steps)
    assert all(len(curve) == steps for curve in losses.values())
    if dtype == "fp32":
        assert losses["PyTorch float64"][-1] < losses["PyTorch float64"][0] - 1.5  # the model learns
    verdict = judge_curve(*losses.values())
    assert verdict.passed, f"{verdict.worst} at step {verdict.worst_step}"


def test_run_reports_progress_and_accepts_weights() -> None:
    config = transformer_config()
    stages: list[tuple[str, int, int]] = []
    weights = build(transformer_config()).torch.weights()
    weights["output.weight"] = weights["output.weight"] + np.float32(0.5)
    report = run(config, weights, progress=lambda *stage: stages.append(stage))
    assert report.passed, report.verdict()
    assert {stage for stage, _, _ in stages} >= {"building", "layers, evaluation", "gradients", "training step"}
    assert report.engines["MLX"]["framework"] == "MLX" and report.engines["reference"]["device"] == "cpu"


# ---- PyTorch's own layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_mirror_equals_torchs_encoder_layer(norm_position: str, causal: bool) -> None:
    """The logits equal those of `torch.nn.TransformerEncoderLayer` with the same weights, in float64."""
    config = transformer_config(norm_position=norm_position, causal=causal)
    ours = build(config).reference
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
        block = {path.removeprefix(f"blocks.{index}."): tensor for path, tensor in values.items()}
        state = {
            "self_attn.in_proj_weight": torch.cat([block[f"attention.{x}_proj.weight"] for x in "qkv"]),
            "self_attn.in_proj_bias": torch.cat([block[f"attention.{x}_proj.bias"] for x in "qkv"]),
        }
        names = {
            "self_attn.out_proj": "attention.out_proj",
            "linear1": "feed_forward.up_proj",
            "linear2": "feed_forward.down_proj",
            "norm1": "attention_norm",
            "norm2": "feed_forward_norm",
        }
        for theirs, name in names.items():
            state |= {f"{theirs}.{part}": block[f"{name}.{part}"] for part in ("weight", "bias")}
        layer.load_state_dict(state, strict=True)
        layers.append(layer.train())  # not eval: the fused inference path is another implementation
    ids = torch.from_numpy(random_batch(config, rows=3, length=37)["inputs"]).long()
    positions = torch.tensor(paper_positions(37, 48), dtype=torch.float32).double()
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


def paper_positions(length: int, width: int) -> list[list[float]]:
    """Returns the sinusoidal positions `[length, width]` of section 3.5 of "Attention Is All You Need"."""
    table = []
    for position in range(length):
        row = []
        for column in range(width):
            angle = position / 10000 ** (2 * (column // 2) / width)
            row.append(math.sin(angle) if column % 2 == 0 else math.cos(angle))
        table.append(row)
    return table
