"""Small random configurations over every option of every model family.

Each is built, compared layer by layer (forward and backward) and converted. One in three is trained, saved, resumed.
A case depends only on its seed and index.
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import numpy as np
import pytest
from helpers import same_bits
from mlx.utils import tree_flatten

from icenet.commands.convert import convert_model
from icenet.core import rng
from icenet.core.config import FAMILIES, Config, ModelConfig, cnn_plan
from icenet.core.engine import Batch
from icenet.core.training import checkpoint
from icenet.core.weights import files as weight_files
from icenet.parity.engines import Engines, build
from icenet.parity.run import compare_engines, optimizer_rows, random_batch
from icenet.parity.yardstick import FACTOR, judge

SEED, COUNT = 2024, 40
SLOW_SEEDS, SLOW_COUNT = range(1, 6), 60
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
YES_NO = (True, False)
LEARNING_RATE = 1e-2


# ---- random cases -------------------------------------------------------------------------------------------


class Draw(random.Random):
    """The random numbers of one case.

    `cycle` goes through options in a shuffled order, so that any `len(options)` consecutive cases of a family cover
    them all. Independent draws would need many more cases.
    """

    def __init__(self, seed: int, index: int) -> None:
        super().__init__(f"{seed} {index}")
        self._seed = seed
        self.number, family = divmod(index, len(FAMILIES))
        self.family = list(FAMILIES)[family]

    def cycle(self, name: str, options: Sequence[Any]) -> Any:
        round_number, position = divmod(self.number, len(options))
        order = random.Random(f"{self._seed} {self.family} {name} {round_number}")
        return order.sample(list(options), len(options))[position]


def transformer(draw: Draw) -> dict[str, Any]:
    heads = draw.randint(1, 4)
    head_size = draw.choice([size for size in range(1, 14) if heads * size % 2 == 0])
    return {
        "hidden_size": heads * head_size,
        "num_layers": draw.randint(1, 3),
        "num_heads": heads,
        "max_seq_length": draw.choice([16, 33]),
        "activation": draw.cycle("activation", ACTIVATIONS),
        "feed_forward_multiplier": draw.randint(1, 4),
        "norm_position": draw.cycle("norm_position", ["pre", "post"]),
        "causal": draw.cycle("causal", YES_NO),
        "tie_embeddings": draw.cycle("tie_embeddings", YES_NO),
    }


def recurrent(draw: Draw) -> dict[str, Any]:
    direction = draw.cycle("direction", ["forward", "forward, tied", "bidirectional"])
    return {
        "hidden_size": draw.randint(1, 24),
        "num_layers": draw.randint(1, 3),
        "bidirectional": direction == "bidirectional",
        "activation": draw.cycle("activation", ["tanh", "relu"]) if draw.family == "rnn" else "tanh",
        "tie_embeddings": direction == "forward, tied",
    }


def cnn(draw: Draw) -> dict[str, Any]:
    depths = None
    if draw.cycle("stage_depths", YES_NO):
        depths = [draw.randint(1, 2) for _ in range(draw.randint(1, 3))]
    model: dict[str, Any] = {
        "num_layers": sum(depths) if depths else draw.randint(1, 5),
        "activation": draw.cycle("activation", ACTIVATIONS),
        "image_channels": draw.choice([1, 2, 3, 5]),
        "stem": draw.cycle("stem", ["conv3", "conv3", "conv7"]),
        "base_channels": draw.randint(2, 9),
        "block": draw.cycle("block", ["alternating", "conv", "basic", "bottleneck"]),
        "stage_depths": depths,
        "classifier": draw.cycle("classifier", ["hidden", "linear"]),
        "hidden_size": draw.randint(2, 24),
    }
    num_stages = len(depths) if depths else min(model["num_layers"], 4)
    given_widths = draw.cycle("stage_widths", YES_NO)
    model["stage_widths"] = [draw.randint(2, 12) for _ in range(num_stages)] if given_widths else None
    if model["classifier"] == "linear":  # then hidden_size is the width of the last stage
        plain: Any = ModelConfig(type="cnn", **{**model, "classifier": "hidden"})
        model["hidden_size"] = cnn_plan.blocks(plain)[-1].outputs
    return model


def case(seed: int, index: int) -> tuple[Config, dict[str, Any]]:
    """Returns a configuration, and the sizes of its batches."""
    draw = Draw(seed, index)
    model = {"transformer": transformer, "cnn": cnn}.get(draw.family, recurrent)(draw)
    model |= {
        "type": draw.family,
        "dropout": draw.cycle("dropout", [0.0, 0.1, 0.3, 0.5]),
        "vocab_size": draw.choice([2, 7, 83]),
        # not by default: MLX compiles each new kernel with g++ on the CPU, one second for each of 30 to 50 kernels
        "compile_model": seed in SLOW_SEEDS and draw.cycle("compile_model", [True] + [False] * 7),
    }
    training = {
        "mixed_precision": draw.cycle("mixed_precision", ["fp32"] * 6 + ["bf16", "fp16"]),
        "gradient_checkpointing": draw.cycle("gradient_checkpointing", [True, False, False, False]),
        "weight_decay": draw.choice([0.0, 0.1]),
        "max_grad_norm": draw.choice([None, 0.1, 1.0]),
    }
    config = Config.from_dict({"seed": draw.randrange(2**40), "device": "cpu", "model": model, "training": training})
    rows = draw.choice([1, 2, 3, 4])
    if draw.family != "cnn":
        padded = draw.cycle("padded", [True, False])
        return config, {"rows": rows, "length": draw.choice([1, 2, 5, 13, 16]), "padded": padded}
    smallest = cnn_plan.min_image_size(config.model)  # type: ignore[arg-type]
    size = [smallest + draw.randint(0, 7) for _ in range(2)]
    return config, {"rows": max(rows, 2), "size": size}  # batch norm needs two values per channel


def batch_of(config: Config, sizes: Mapping[str, Any], step: int = 0) -> Batch:
    """Returns the batch of a step: images, or tokens, padded on the left if `sizes["padded"]`."""
    key = config.seed + 1 + step
    if "size" in sizes:
        shape = (sizes["rows"], *sizes["size"], config.model.image_channels)  # type: ignore[attr-defined]
        labels = rng.uniform(rng.key(key, "labels"), (sizes["rows"],)) * config.model.vocab_size
        return {"inputs": rng.normal(rng.key(key, "images"), shape), "labels": labels.astype(np.int32)}
    batch = random_batch(config.with_overrides(f"seed={key}"), sizes["rows"], sizes["length"])
    if sizes["padded"]:
        rows, length = batch["inputs"].shape
        real = 1 + (rng.uniform(rng.key(key, "real"), (rows, 1)) * length).astype(np.int32)  # 1 to length
        mask = np.arange(length) >= length - real
        batch["labels"] = np.where(mask, batch["labels"], -100).astype(np.int32)
        batch["attention_mask"] = mask.astype(np.int32)
    return batch


# ---- checks -------------------------------------------------------------------------------------------------


def check_case(seed: int, index: int, folder: Path) -> None:
    config, sizes = case(seed, index)
    settings = {"model": config.model.model_dump(), "training": config.training.model_dump(exclude_defaults=True)}
    label = f"\nsweep {seed} {index}: {json.dumps({'seed': config.seed, **settings, 'batch': sizes})}"
    engines = build(config)
    report = compare_engines(engines, batch_of(config, sizes), step=3)
    assert report.unequal_weights == [], label
    assert same_bits(engines.mlx.weights(), engines.torch.weights()), label
    assert report.passed, report.verdict() + label
    gradients = {row.path for row in report.sections[-2].rows if row.kind == "gradient"}
    assert gradients == set(engines.torch.weights()) - running_statistics(engines), label  # every parameter has one
    check_conversion(engines, folder, label)
    if index % 3 == 0:
        check_resume(engines, sizes, folder, bool(index % 2), label)


def running_statistics(engines: Engines) -> set[str]:
    """Returns the names of the running statistics: weights without a gradient."""
    return {path for path in engines.torch.weights() if path.rpartition(".")[2].startswith("running_")}


def check_conversion(engines: Engines, folder: Path, label: str) -> None:
    """Converts weights to MLX's form and back: the bits are the same, and the MLX form equals the MLX model."""
    config = engines.torch.config
    weights = engines.torch.weights()
    source = checkpoint.save(folder / "start", config, 0, weights, engines.torch.optimizer_state(), {})
    mlx_form, back = folder / "mlx.safetensors", folder / "back.safetensors"
    settings = str(source / "config.yaml")
    convert_model(source / "model.safetensors", mlx_form, "mlx", None, settings, False)
    convert_model(mlx_form, back, "canonical", None, settings, False)
    loaded = {path: np.array(array) for path, array in mx.load(str(mlx_form)).items()}
    parameters = {path: np.array(array) for path, array in tree_flatten(engines.mlx.model.parameters())}
    assert same_bits(loaded, {path: parameters[path] for path in loaded}) and len(loaded) == len(weights), label
    returned = weight_files.read(back)
    assert same_bits({path: returned[path] for path in returned}, weights), label


def check_resume(engines: Engines, sizes: Mapping[str, Any], folder: Path, from_torch: bool, label: str) -> None:
    """Trains two steps on one backend and saves; compares the third step on all engines."""
    first = engines.torch if from_torch else engines.mlx
    config = engines.torch.config
    for step in range(2):
        result = first.read(first.train_step(batch_of(config, sizes, step), step, LEARNING_RATE))
        assert result.finite, label
    saved = checkpoint.load(checkpoint.save(folder / "run", config, 2, first.weights(), first.optimizer_state(), {}))
    weights, state = dict(saved.weights), dict(saved.optimizer)
    for engine in engines:
        engine.set_weights(weights)
        engine.set_optimizer_state(state)
    for engine in engines[:2]:
        assert same_bits(engine.weights(), weights) and same_bits(engine.optimizer_state(), state), label
    batch = batch_of(config, sizes, 2)
    report = compare_engines(engines, batch, step=2)
    assert report.passed, "resumed: " + report.verdict() + label
    gradients = engines.reference.gradients(batch, 2)[1]
    equal = {path: gradient.astype(np.float32) for path, gradient in gradients.items()}
    rows = optimizer_rows(engines, [equal], first_step=2)
    worst = max(rows, key=lambda row: row.ratio)
    assert worst.passed, f"resumed, third update on equal gradients: {worst.path} {worst.ratio:.3g}" + label
    results = [engine.read(engine.train_step(batch, 2, LEARNING_RATE)) for engine in engines]
    assert all(result.finite for result in results), label
    ratios = state_ratios(engines)
    kind, ratio = max(ratios.items(), key=lambda pair: pair[1])
    assert ratio <= FACTOR, f"resumed, third step: {kind} {ratio:.3g}" + label


def state_ratios(engines: Engines) -> dict[str, float]:
    """Returns the ratios of the state after a step: mean gradients, and running statistics of batch norms.

    All tensors of a kind are compared as one, because the noise of a tensor of two values is small by chance; the
    tensors were compared one by one before. Adam's updates are left out: where a gradient is zero but for rounding,
    the update is rounding noise divided by its own size.
    """
    dtype = engines.torch.config.training.mixed_precision
    states = [{**engine.optimizer_state(), **engine.weights()} for engine in engines]
    ratios = {}
    for kind in ("exp_avg", "running_mean", "running_var"):
        joined = [
            np.concatenate([[0.0], *(a.ravel() for name, a in state.items() if name.endswith(f".{kind}"))])
            for state in states
        ]
        ratios[kind] = judge(*joined, dtype, stored="fp32").ratio
    return ratios


@pytest.mark.parametrize("index", range(COUNT))
def test_sweep(index: int, tmp_path: Path) -> None:
    check_case(SEED, index, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS)
@pytest.mark.parametrize("index", range(SLOW_COUNT))
def test_wide_sweep(seed: int, index: int, tmp_path: Path) -> None:
    check_case(seed, index, tmp_path)


def test_every_option_is_covered() -> None:
    """Each field of each family takes several values in the sweep, and each enumeration all of its values.

    The default sweep covers all fields but `compile_model`, and each family in each precision.
    """
    seen: dict[tuple[str, str], set[str]] = {}
    configs = [case(SEED, index)[0] for index in range(COUNT)]
    pairs = {(config.model.type, config.training.mixed_precision) for config in configs}
    assert pairs == set(itertools.product(FAMILIES, ["fp32", "bf16", "fp16"]))
    slow = [case(seed, index)[0] for seed in SLOW_SEEDS for index in range(SLOW_COUNT)]
    for config in configs:
        for name in type(config.model).model_fields:
            values = seen.setdefault((type(config.model).__name__, name), set())
            values.add(json.dumps(getattr(config.model, name)))
    for config in slow:
        values = seen[type(config.model).__name__, "compile_model"]
        values.add(json.dumps(config.model.compile_model))
    for section in set(FAMILIES.values()):
        for name, field in section.model_fields.items():
            found = seen[section.__name__, name]
            choices = get_args(field.annotation) if "Literal" in str(field.annotation) else ()
            choices = choices or ((False, True) if field.annotation is bool else ())
            assert {json.dumps(choice) for choice in choices} <= found, (section, name, found)
            assert len(found) > 1 or len(choices) == 1, (section, name, found)


# ---- planted faults -----------------------------------------------------------------------------------------


def bessel(moments: Any, x: mx.array) -> Any:
    mean, var = moments(x)
    count = x.size // x.shape[-1]
    return mean, var * (count / (count - 1))


def large_bias_gradient(linear: Any, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    y: mx.array = linear(x, weight, bias)
    return y if bias is None else y + 1e-5 * (bias - mx.stop_gradient(bias))


def approximate_gelu(activation: Any, name: str, x: mx.array) -> Any:
    return activation("gelu_tanh", x)


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "batch norm divides by n - 1": ("icenet.nn.exact.moments", bessel),
    "bias gradient too large by 1e-5": ("icenet.nn.linear.linear", large_bias_gradient),
    "gelu by its approximation": ("icenet.nn.activation", approximate_gelu),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_small_faults_in_narrow_layers_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra noise samples of floor 5 must not hide a fault."""
    common = {"hidden_size": 4, "num_layers": 1, "vocab_size": 7, "dropout": 0.0, "activation": "gelu"}
    family = {"type": "transformer", "num_heads": 1, "max_seq_length": 16}
    sizes: dict[str, Any] = {"rows": 2, "length": 8, "padded": False}
    if "batch norm" in fault:
        family, sizes = {"type": "cnn", "base_channels": 2}, {"rows": 4, "size": [6, 6]}
    config = Config.from_dict({"seed": 5, "device": "cpu", "model": {**common, **family}})
    assert compare_engines(build(config), batch_of(config, sizes)).passed
    target, replacement = FAULTS[fault]
    module, _, name = target.rpartition(".")
    original = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(target, partial(replacement, original))
    report = compare_engines(build(config), batch_of(config, sizes))
    assert not report.passed and report.differing(), fault
