"""Random small configurations over every option of every family: built, forward, gradients, converted, resumed.

The draws follow from a seed, so a failure names what to repeat: `python parity_tests/test_sweep.py SEED INDEX`.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import icenet.blas

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from helpers import same_bits
from mlx.utils import tree_flatten

import icenet.nn
from icenet.commands.convert import convert_model
from icenet.core import rng
from icenet.core.config import FAMILIES, Config, ModelConfig, cnn_plan
from icenet.core.engine import Batch
from icenet.core.training import checkpoint
from icenet.parity.run import Engines, build, judge_engines, optimizer_rows, random_batch
from icenet.parity.yardstick import FACTOR, judge

SEED, COUNT = 2024, 60
SLOW_SEEDS, SLOW_COUNT = range(1, 6), 60
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
PRECISIONS = ("fp32",) * 8 + ("bf16", "fp16")
RATE = 1e-2


# ---- the draws ----------------------------------------------------------------------------------------------


def transformer(draw: random.Random) -> dict[str, Any]:
    heads = draw.randint(1, 4)
    size = draw.choice([n for n in range(1, 14) if heads * n % 2 == 0])  # of a head; odd ones too
    return {
        "hidden_size": heads * size,
        "num_layers": draw.randint(1, 3),
        "num_heads": heads,
        "max_seq_length": draw.choice([16, 33]),
        "activation": draw.choice(ACTIVATIONS),
        "feed_forward_multiplier": draw.randint(1, 4),
        "norm_position": draw.choice(["pre", "post"]),
        "causal": draw.random() < 0.6,
        "tie_embeddings": draw.random() < 0.5,
    }


def recurrent(draw: random.Random, family: str) -> dict[str, Any]:
    bidirectional = draw.random() < 0.4
    return {
        "hidden_size": draw.randint(1, 24),
        "num_layers": draw.randint(1, 3),
        "bidirectional": bidirectional,
        "activation": draw.choice(["tanh", "relu"]) if family == "rnn" else "tanh",
        "tie_embeddings": draw.random() < 0.5 and not bidirectional,
    }


def cnn(draw: random.Random) -> dict[str, Any]:
    depths = [draw.randint(1, 2) for _ in range(draw.randint(1, 3))] if draw.random() < 0.6 else None
    model: dict[str, Any] = {
        "num_layers": sum(depths) if depths else draw.randint(1, 5),
        "activation": draw.choice(ACTIVATIONS),
        "image_channels": draw.choice([1, 2, 3, 5]),
        "stem": draw.choice(["conv3", "conv3", "conv7"]),
        "base_channels": draw.randint(2, 9),
        "block": draw.choice(["alternating", "conv", "basic", "bottleneck"]),
        "stage_depths": depths,
        "classifier": draw.choice(["hidden", "linear"]),
        "hidden_size": draw.randint(2, 24),
    }
    count = len(depths) if depths else min(model["num_layers"], 4)
    model["stage_widths"] = [draw.randint(2, 12) for _ in range(count)] if draw.random() < 0.5 else None
    if model["classifier"] == "linear":  # it reads what the last stage gives
        plain: Any = ModelConfig(type="cnn", **{**model, "classifier": "hidden"})
        model["hidden_size"] = cnn_plan.blocks(plain)[-1].outputs
    return model


def case(seed: int, index: int) -> tuple[Config, dict[str, Any]]:
    """A configuration, and what its batches are like."""
    draw = random.Random(f"{seed} {index}")
    family = list(FAMILIES)[index % len(FAMILIES)]
    sections = {"transformer": transformer, "cnn": cnn}
    model = sections[family](draw) if family in sections else recurrent(draw, family)
    model |= {
        "type": family,
        "dropout": draw.choice([0.0, 0.1, 0.3, 0.5]),
        "vocab_size": draw.choice([2, 7, 83]),
        "compile_model": draw.random() < 0.15,
    }
    training = {
        "mixed_precision": draw.choice(PRECISIONS),
        "gradient_checkpointing": draw.random() < 0.2,
        "weight_decay": draw.choice([0.0, 0.1]),
        "max_grad_norm": draw.choice([None, 0.1, 1.0]),
    }
    config = Config.from_dict({"seed": draw.randrange(2**40), "device": "cpu", "model": model, "training": training})
    rows = draw.choice([1, 2, 3, 4])
    if family != "cnn":
        return config, {"rows": rows, "length": draw.choice([1, 2, 5, 13, 16]), "padded": draw.random() < 0.4}
    least = cnn_plan.min_image_size(config.model)  # type: ignore[arg-type]
    size = [least + draw.randint(0, 7) for _ in range(2)]
    return config, {"rows": max(rows, 2), "size": size}  # batch norm wants two values in every channel


def batch_of(config: Config, about: Mapping[str, Any], step: int = 0) -> Batch:
    """Another batch for each step: tokens, left-padded where the case says so, or images."""
    key = config.seed + 1 + step
    if "size" in about:
        shape = (about["rows"], *about["size"], config.model.image_channels)  # type: ignore[attr-defined]
        labels = rng.uniform(rng.key(key, "labels"), (about["rows"],)) * config.model.vocab_size
        return {"inputs": rng.normal(rng.key(key, "images"), shape), "labels": labels.astype(np.int32)}
    batch = random_batch(config.with_overrides(f"seed={key}"), about["rows"], about["length"])
    if about["padded"]:
        rows, length = batch["inputs"].shape
        real = 1 + (rng.uniform(rng.key(key, "real"), (rows, 1)) * length).astype(np.int32)  # 1 to length
        mask = np.arange(length) >= length - real
        batch["labels"] = np.where(mask, batch["labels"], -100).astype(np.int32)
        batch["attention_mask"] = mask.astype(np.int32)
    return batch


# ---- the judging --------------------------------------------------------------------------------------------


def sweep(seed: int, index: int, folder: Path) -> float:
    """Judges one configuration; gives its largest ratio."""
    config, about = case(seed, index)
    changed = {"model": config.model.model_dump(), "training": config.training.model_dump(exclude_defaults=True)}
    told = f"\nsweep {seed} {index}: {json.dumps({'seed': config.seed, **changed, 'batch': about})}"
    engines = build(config)
    report = judge_engines(engines, batch_of(config, about), step=3)
    assert report.unequal_weights == [], told
    assert same_bits(engines.mlx.weights(), engines.torch.weights()), told
    assert report.passed, report.verdict() + told
    gradients = {row.path for row in report.sections[-2].rows if row.kind == "gradient"}
    assert gradients == set(engines.torch.weights()) - running_statistics(engines), told  # every parameter has one
    worst = report.worst[1].ratio if report.worst else 0.0
    check_conversion(engines, folder, told)
    if index % 3 == 0:
        worst = max(worst, check_resume(engines, about, folder, bool(index % 2), told))
    return worst


def running_statistics(engines: Engines) -> set[str]:
    """The names of the running statistics: weights without a gradient."""
    return {path for path in engines.torch.weights() if path.rpartition(".")[2].startswith("running_")}


def check_conversion(engines: Engines, folder: Path, told: str) -> None:
    """Canonical to MLX's form and back is the same bit for bit; between them it is what MLX's model holds."""
    config = engines.torch.config
    weights = engines.torch.weights()
    source = checkpoint.save(folder / "start", config, 0, weights, engines.torch.optimizer_state(), {})
    there, back = folder / "there.safetensors", folder / "back.safetensors"
    settings = str(source / "config.yaml")
    convert_model(source / "model.safetensors", there, "mlx", None, settings, False)
    convert_model(there, back, "canonical", None, settings, False)
    loaded = {path: np.array(array) for path, array in mx.load(str(there)).items()}
    own = {path: np.array(array) for path, array in tree_flatten(engines.mlx.model.parameters())}
    assert same_bits(loaded, {path: own[path] for path in loaded}) and len(loaded) == len(weights), told
    returned = checkpoint.weight_files.read(back)
    assert same_bits({path: returned[path] for path in returned}, weights), told


def check_resume(engines: Engines, about: Mapping[str, Any], folder: Path, from_torch: bool, told: str) -> float:
    """Two steps on one backend, a checkpoint, and the third step on all three; gives the largest ratio."""
    first = engines.torch if from_torch else engines.mlx
    config = engines.torch.config
    for step in range(2):
        result = first.read(first.train_step(batch_of(config, about, step), step, RATE))
        assert result.finite, told
    saved = checkpoint.load(checkpoint.save(folder / "run", config, 2, first.weights(), first.optimizer_state(), {}))
    weights, state = dict(saved.weights), dict(saved.optimizer)
    for engine in engines:
        engine.set_weights(weights)
        engine.set_optimizer_state(state)
    for engine in engines[:2]:
        assert same_bits(engine.weights(), weights) and same_bits(engine.optimizer_state(), state), told
    batch = batch_of(config, about, 2)
    report = judge_engines(engines, batch, step=2)
    assert report.passed, "resumed: " + report.verdict() + told
    gradients = engines.reference.gradients(batch, 2)[1]
    equal = {path: gradient.astype(np.float32) for path, gradient in gradients.items()}
    rows = optimizer_rows(engines, [equal], first_step=2)
    worst = max(rows, key=lambda row: row.ratio)
    assert worst.passed, f"resumed, third update on equal gradients: {worst.path} {worst.ratio:.3g}" + told
    # and the step itself, whole
    results = [engine.read(engine.train_step(batch, 2, RATE)) for engine in engines]
    assert all(result.finite for result in results), told
    found = whole_step(engines)
    path, ratio = max(found.items(), key=lambda pair: pair[1])
    assert ratio <= FACTOR, f"resumed, third step: {path} {ratio:.3g}" + told
    return max(report.worst[1].ratio if report.worst else 0.0, worst.ratio, ratio)


def whole_step(engines: Engines) -> dict[str, float]:
    """The ratios of what a step leaves: the gradients' running mean, and the running statistics of batch norms.

    All tensors of a kind are judged as one, for the noise of a single one of two values is chance; each was judged
    by itself before. Adam's updates are not among them: where a gradient is zero but for rounding they are rounding,
    divided by its own size.
    """
    dtype = engines.torch.config.training.mixed_precision
    states = [{**engine.optimizer_state(), **engine.weights()} for engine in engines]
    found = {}
    for kind in ("exp_avg", "running_mean", "running_var"):
        joined = [
            np.concatenate([[0.0], *(a.ravel() for name, a in state.items() if name.endswith(f".{kind}"))])
            for state in states
        ]
        found[kind] = judge(*joined, dtype, stored="fp32").ratio
    return found


@pytest.mark.parametrize("index", range(COUNT))
def test_sweep(index: int, tmp_path: Path) -> None:
    sweep(SEED, index, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS)
@pytest.mark.parametrize("index", range(SLOW_COUNT))
def test_wide_sweep(seed: int, index: int, tmp_path: Path) -> None:
    sweep(seed, index, tmp_path)


def test_every_option_is_drawn() -> None:
    """Each option of each family takes several values in the sweep, and each choice all that it has."""
    seen: dict[tuple[str, str], set[str]] = {}
    for index in range(COUNT):
        model = case(SEED, index)[0].model
        for name in type(model).model_fields:
            seen.setdefault((type(model).__name__, name), set()).add(json.dumps(getattr(model, name)))
    for section in set(FAMILIES.values()):
        for name, field in section.model_fields.items():
            found = seen[section.__name__, name]
            choices = get_args(field.annotation) if "Literal" in str(field.annotation) else ()
            choices = choices or ((False, True) if field.annotation is bool else ())
            assert {json.dumps(choice) for choice in choices} <= found, (section, name, found)
            assert len(found) > 1 or len(choices) == 1, (section, name, found)


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "batch norm divides by n - 1": ("_moments", lambda own: partial(bessel, own)),
    "a bias gradient a hundred-thousandth too large": ("linear", lambda own: partial(biased, own)),
    "gelu by its approximation": ("activation", lambda own: lambda name, x: own("gelu_tanh", x)),
}


def bessel(own: Any, x: mx.array) -> Any:
    mean, var = own(x)
    count = x.size // x.shape[-1]
    return mean, var * (count / (count - 1))


def biased(own: Any, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    y: mx.array = own(x, weight, bias)
    return y if bias is None else y + 1e-5 * (bias - mx.stop_gradient(bias))


@pytest.mark.parametrize("fault", FAULTS)
def test_small_faults_in_narrow_layers_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise measured again on inputs rounded anew excuses chance, and no fault."""
    common = {"hidden_size": 4, "num_layers": 1, "vocab_size": 7, "dropout": 0.0, "activation": "gelu"}
    family = {"type": "transformer", "num_heads": 1, "max_seq_length": 16}
    about: dict[str, Any] = {"rows": 2, "length": 8, "padded": False}
    if "batch norm" in fault:
        family, about = {"type": "cnn", "base_channels": 2}, {"rows": 4, "size": [6, 6]}
    config = Config.from_dict({"seed": 5, "device": "cpu", "model": {**common, **family}})
    assert judge_engines(build(config), batch_of(config, about)).passed
    name, change = FAULTS[fault]
    monkeypatch.setattr(icenet.nn, name, change(getattr(icenet.nn, name)))
    report = judge_engines(build(config), batch_of(config, about))
    assert not report.passed and report.differing(), fault


if __name__ == "__main__":
    import tempfile

    chosen = [int(argument) for argument in sys.argv[1:]]
    for replayed in itertools.product(chosen[:1], chosen[1:] or range(COUNT)):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                result = f"{sweep(*replayed, Path(scratch)):.3g}"
            except AssertionError as error:
                result = f"FAILED {error}"
        print(*replayed, case(*replayed)[0].model.type, result, flush=True)
