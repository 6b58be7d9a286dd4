"""Tests every optimizer on both backends: steps against formulas in float64, groups, state, a change of backend.

The formulas are written in numpy from the papers and PyTorch's documentation, in PyTorch's layouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import both_backends, is_one_line, losses, native, plain, same_bits, tiny

from icenet.commands import info
from icenet.core import backends, rng
from icenet.core.config import Config
from icenet.core.config.training import ParameterGroup, TrainingConfig
from icenet.core.distributed import processes
from icenet.core.engine.optimizer import orthogonalize
from icenet.core.engine.parameter_groups import Group, assign, gather
from icenet.core.errors import CheckpointError, ConfigError
from icenet.core.runs import checkpoint
from icenet.core.training.schedule import learning_rate
from icenet.core.training.trainer import Trainer
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import curves
from icenet.parity.curves import CurveJudgement, judge_curve
from icenet.parity.yardstick import judge

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")

OPTIMIZERS = ("sgd", "adam", "adamw", "adafactor", "lion", "muon")
RATES = {"sgd": 0.1, "adam": 3e-3, "adamw": 3e-3, "adafactor": 1e-2, "lion": 3e-4, "muon": 3e-3}
"""Learning rates at which the tiny model learns."""

pytestmark = pytest.mark.usefixtures("no_plots")
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)

Array = Any
Slots = dict[str, Array]


# ---- the formulas -----------------------------------------------------------------------------------------


def sgd(p: Array, g: Array, s: Slots, t: int, rate: float, decay: float, c: TrainingConfig) -> Array:
    """Sutskever et al. (2013) as PyTorch has it: v = mu v + g; the step is g + mu v."""
    g = g + decay * p
    mu = 0.9 if c.momentum is None else c.momentum
    if mu == 0:
        return p - rate * g
    s["momentum_buffer"] = mu * s.get("momentum_buffer", 0) + g
    return p - rate * (g + mu * s["momentum_buffer"] if c.nesterov else s["momentum_buffer"])


def adam(p: Array, g: Array, s: Slots, t: int, rate: float, decay: float, c: TrainingConfig) -> Array:
    """Kingma and Ba (2015), algorithm 1, of the loss and decay/2 |p|^2."""
    g = g + decay * p
    s["exp_avg"] = c.beta1 * s.get("exp_avg", 0) + (1 - c.beta1) * g
    s["exp_avg_sq"] = c.beta2 * s.get("exp_avg_sq", 0) + (1 - c.beta2) * g * g
    m, v = s["exp_avg"] / (1 - c.beta1**t), s["exp_avg_sq"] / (1 - c.beta2**t)
    return p - rate * m / (np.sqrt(v) + c.eps)


def adamw(p: Array, g: Array, s: Slots, t: int, rate: float, decay: float, c: TrainingConfig) -> Array:
    """Loshchilov and Hutter (2019), algorithm 2, with the rate before the decay as PyTorch has it."""
    return adam((1 - rate * decay) * p, g, s, t, rate, 0.0, c)


def adafactor(p: Array, g: Array, s: Slots, t: int, rate: float, decay: float, c: TrainingConfig) -> Array:
    """Shazeer and Stern (2018), algorithms 4 and 5, with the epsilons where PyTorch has them (2^-23 and 1e-3)."""
    tiny_value = 2.0**-23
    moved = t**-0.8
    step = max(1e-3, math.sqrt(np.mean(p * p))) * min(rate, 1 / math.sqrt(t))
    p = (1 - rate * decay) * p
    if p.ndim > 1:
        s["row_var"] = (1 - moved) * s.get("row_var", 0) + moved * np.mean(g * g, axis=-1, keepdims=True)
        s["col_var"] = (1 - moved) * s.get("col_var", 0) + moved * np.mean(g * g, axis=-2, keepdims=True)
        all_rows = np.mean(s["row_var"], axis=-2, keepdims=True)
        v = s["row_var"] * s["col_var"] / np.maximum(all_rows, tiny_value)
    else:
        v = s["variance"] = (1 - moved) * s.get("variance", 0) + moved * g * g
    u = g / np.maximum(np.sqrt(v), tiny_value)
    return p - step * u / max(1.0, math.sqrt(np.mean(u * u)))


def lion(p: Array, g: Array, s: Slots, t: int, rate: float, decay: float, c: TrainingConfig) -> Array:
    """Chen et al. (2023), algorithm 2."""
    m = s.get("exp_avg", np.zeros_like(p))
    s["exp_avg"] = c.beta2 * m + (1 - c.beta2) * g
    return p - rate * (np.sign(c.beta1 * m + (1 - c.beta1) * g) + decay * p)


def muon(p: Array, g: Array, s: Slots, t: int, rate: float, decay: float, c: TrainingConfig) -> Array:
    """Jordan (2024); the size of the step from Liu et al. (2025), equation 4."""
    mu = 0.95 if c.momentum is None else c.momentum
    s["momentum_buffer"] = mu * s.get("momentum_buffer", 0) + (1 - mu) * g
    m = mu * s["momentum_buffer"] + (1 - mu) * g if c.nesterov else s["momentum_buffer"]
    # the iteration moves singular values and leaves singular vectors: that, by the SVD, in place of its products
    left, values, right = np.linalg.svd(m, full_matrices=False)
    values = values / (np.sqrt(np.sum(values**2)) + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (1 - rate * decay) * p - rate * 0.2 * math.sqrt(max(p.shape)) * (left * values) @ right


FORMULAS: dict[str, Callable[..., Array]] = {
    "sgd": sgd, "adam": adam, "adamw": adamw, "adafactor": adafactor, "lion": lion, "muon": muon,
}  # fmt: skip


def gradients_of(shapes: dict[str, tuple[int, ...]], step: int) -> dict[str, np.ndarray]:
    """The same for every engine, of seven orders of magnitude."""
    return {
        path: rng.normal(rng.key(1, "gradient", step, index), shape) * np.float32(10.0 ** -(index % 7))
        for index, (path, shape) in enumerate(shapes.items())
    }


FIRST = {"transformer": "token_embedding.", "cnn": "stem.conv.", "lstm": "layers.0."}
"""The parameters of the first of two groups."""


def two_groups(family: str) -> str:
    """Returns the override that puts `FIRST` and all biases in groups with their own rate and decay."""
    first = f'{{parameters: ["{FIRST[family]}*"], learning_rate: 0.002, weight_decay: 0.0}}'
    return f'training.parameter_groups=[{first}, {{parameters: ["*.bias"], weight_decay: 0.4}}]'


def expected_settings(
    family: str, path: str, shape: tuple[int, ...], training: TrainingConfig
) -> tuple[float, float]:
    """Returns learning rate, relative to the schedule's, and weight decay of a parameter in `two_groups`."""
    if path.startswith(FIRST[family]):
        return 0.002 / training.learning_rate, 0.0
    return 1.0, 0.4 if path.endswith(".bias") else training.weight_decay if len(shape) > 1 else 0.0


@each_optimizer
@pytest.mark.parametrize("family", ["transformer", "cnn", "lstm"])
def test_against_the_formula(tmp_path: Path, optimizer: str, family: str) -> None:
    """22 steps on equal gradients, with warm-up, groups and decay.

    PyTorch in float64 must equal the formula up to rounding, and MLX must be as close to it as PyTorch in fp32. The
    noise of PyTorch is a sample of an array's values: of 4 values it can be a tenth of the usual one by chance.
    """
    wide = ["model.base_channels=16"] if family == "cnn" else []
    config = tiny(
        tmp_path, *wide, f"training.optimizer={optimizer}", f"training.learning_rate={RATES[optimizer]}",
        "training.weight_decay=0.3", "training.max_steps=22", two_groups(family), family=family,
    )  # fmt: skip
    training = config.training
    engines = build(config)
    start = {p: a for p, a in engines.mlx.weights().items() if p in engines.mlx.model.trainable_paths()}
    exact: dict[str, Array] = {path: array.astype(np.float64) for path, array in start.items()}
    slots: dict[str, Slots] = {path: {} for path in start}
    for step in range(22):
        rate = learning_rate(step, training)
        gradients = gradients_of({path: array.shape for path, array in start.items()}, step)
        for engine in engines:
            engine.apply_gradients(gradients, step, rate)
        for path, g in gradients.items():
            share, decay = expected_settings(family, path, g.shape, training)
            method = optimizer
            if optimizer == "muon" and not uses_muon(path):
                method = "adamw"
            exact[path] = FORMULAS[method](
                exact[path], g.astype(np.float64), slots[path], step + 1, rate * share, decay, training
            )
    reference = {f"{path}.{slot}": array for path, own in slots.items() for slot, array in own.items()}
    ours, theirs, truth = ({**e.weights(), **e.optimizer_state()} for e in engines)
    assert engines.mlx.optimizer_state().keys() == engines.torch.optimizer_state().keys() == reference.keys()
    moved = 0.0
    for name, array in {**exact, **reference}.items():
        np.testing.assert_allclose(truth[name], array, rtol=1e-9, atol=1e-14 * np.abs(array).max(), err_msg=name)
        verdict = judge(ours[name], theirs[name], array)
        assert verdict.passed, (name, verdict)
        assert np.allclose(theirs[name], array, rtol=1e-3, atol=1e-3 * np.abs(array).max()), name
        moved = max(moved, float(np.abs(array - start[name]).max()) if name in start else 0.0)
    assert moved > RATES[optimizer], "the parameters hardly changed"


def uses_muon(path: str) -> bool:
    """Whether Muon updates a parameter of the tiny models; AdamW updates the others."""
    return path.endswith(("_proj.weight", "hidden.weight"))


def test_the_comparison_detects_another_formula(tmp_path: Path) -> None:
    """Decoupled weight decay in place of L2, or another epsilon."""
    config = tiny(tmp_path, "training.optimizer=adam", "training.weight_decay=0.01")
    engines = build(config)
    start = engines.mlx.weights()
    path = "blocks.0.attention.q_proj.weight"
    gradients = gradients_of({p: a.shape for p, a in start.items()}, 0)
    for engine in engines:
        engine.apply_gradients(gradients, 0, 1e-3)
    ours, theirs = engines.mlx.weights()[path], engines.torch.weights()[path]
    p, g = start[path].astype(np.float64), gradients[path].astype(np.float64)
    assert judge(ours, theirs, adam(p, g, {}, 1, 1e-3, 0.01, config.training)).passed
    wrong = config.training.model_copy()
    wrong.eps = 1e-4
    other = [adamw(p, g, {}, 1, 1e-3, 0.01, config.training), adam(p, g, {}, 1, 1e-3, 0.01, wrong)]
    for found in other:
        assert not judge(found, theirs, engines.reference.weights()[path]).passed


@pytest.mark.parametrize("options", ["momentum=0", "momentum=0.5, nesterov=false", "nesterov=false"])
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_momentum_and_nesterov(tmp_path: Path, optimizer: str, options: str) -> None:
    given = [f"training.{option}" for option in ("weight_decay=0.1", *options.split(", "))]
    config = tiny(tmp_path, f"training.optimizer={optimizer}", *given)
    engines = build(config)
    start = engines.mlx.weights()
    path = "blocks.0.feed_forward.up_proj.weight"
    exact: Array = start[path].astype(np.float64)
    slots: Slots = {}
    for step in range(4):
        gradients = gradients_of({p: a.shape for p, a in start.items()}, step)
        for engine in engines:
            engine.apply_gradients(gradients, step, 1e-2)
        exact = FORMULAS[optimizer](
            exact, gradients[path].astype(np.float64), slots, step + 1, 1e-2, 0.1, config.training
        )
    np.testing.assert_allclose(engines.reference.weights()[path], exact, rtol=1e-10)
    assert judge(engines.mlx.weights()[path], engines.torch.weights()[path], exact).passed
    assert {name.rpartition(".")[2] for name in engines.mlx.optimizer_state() if name.startswith(path)} == set(slots)


def test_sgd_adam_and_adafactor_equal_torch_optim(tmp_path: Path) -> None:
    """Ours equals `torch.optim` with its default options in fp32 bit for bit."""
    theirs: dict[str, Callable[..., Any]] = {
        "sgd": lambda ps: torch.optim.SGD(ps, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
        "adam": lambda ps: torch.optim.Adam(ps, 1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        "adamw": lambda ps: torch.optim.AdamW(ps, 1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        "adafactor": lambda ps: torch.optim.Adafactor(ps, 1e-2, weight_decay=0.1),
    }
    for optimizer, make in theirs.items():
        config = tiny(tmp_path, f"training.optimizer={optimizer}", "training.weight_decay=0.1", family="cnn")
        engine = backends.engine(config, "torch")
        shapes = {p: a.shape for p, a in engine.weights().items() if p in engine.model.trainable_paths()}
        copies = {p: torch.nn.Parameter(torch.from_numpy(engine.weights()[p])) for p in shapes}
        own = make([copies[path] for path, shape in shapes.items() if len(shape) > 1])
        for step in range(3):
            gradients = gradients_of(shapes, step)
            engine.apply_gradients(gradients, step, 1e-2)
            for path, parameter in copies.items():
                parameter.grad = torch.from_numpy(gradients[path])
            own.step()
        for path, shape in shapes.items():
            if len(shape) > 1:
                assert np.array_equal(engine.weights()[path], copies[path].detach().numpy()), (optimizer, path)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs PyTorch 2.9")
@both_backends
def test_muon_is_close_to_torch_optim(tmp_path: Path, backend: str) -> None:
    """As close as the bf16 in which PyTorch orthogonalizes."""
    config = tiny(tmp_path, "training.optimizer=muon")
    engine = backends.engine(config, backend)
    start = engine.weights()
    path = "blocks.0.feed_forward.down_proj.weight"
    copy = torch.nn.Parameter(torch.from_numpy(start[path].copy()))
    own = torch.optim.Muon([copy], 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        gradients = gradients_of({p: a.shape for p, a in start.items()}, step)
        engine.apply_gradients(gradients, step, 1e-2)
        copy.grad = torch.from_numpy(gradients[path])
        own.step()
    ours, theirs = engine.weights()[path] - start[path], copy.detach().numpy() - start[path]
    cosine = np.sum(ours * theirs) / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine > 0.999 and np.linalg.norm(ours) == pytest.approx(np.linalg.norm(theirs), rel=0.02)


@both_backends
@pytest.mark.parametrize("shape", [(12, 12), (7, 40), (40, 7)])
def test_orthogonalize(backend: str, shape: tuple[int, int]) -> None:
    """Singular vectors are unchanged, singular values become close to 1 (Jordan: about 0.7 to 1.2)."""
    matrix = rng.normal(rng.key(3, "matrix"), shape)
    norm = backends.module(backend, "engine.optimizers").frobenius_norm
    found = plain(orthogonalize(native(backend, matrix), norm))
    assert found.shape == shape
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    moved = left.T @ found @ right.T
    large = values > 0.05 * values.max()
    assert np.abs(moved - np.diag(np.diag(moved))).max() < 1e-4
    assert ((np.diag(moved)[large] > 0.6) & (np.diag(moved)[large] < 1.3)).all()


# ---- groups -----------------------------------------------------------------------------------------------

SHAPES = {"token_embedding.weight": (9, 4), "blocks.0.up.weight": (9, 4), "blocks.0.up.bias": (9,),
          "norm.weight": (4,), "conv.weight": (4, 4, 3, 3), "output.weight": (9, 4)}  # fmt: skip
KINDS = {"token_embedding": "embedding", "blocks.0.up": "linear", "norm": "layer_norm", "conv": "conv2d",
         "output": "linear"}  # fmt: skip


def group(*parameters: str, **more: float) -> ParameterGroup:
    return ParameterGroup(parameters=list(parameters), **more)


def test_matrices_decay_and_vectors_do_not() -> None:
    found = assign(TrainingConfig(weight_decay=0.2), SHAPES, KINDS)
    assert {path: g.weight_decay for path, g in found.items()} == {
        "token_embedding.weight": 0.2, "blocks.0.up.weight": 0.2, "blocks.0.up.bias": 0.0, "norm.weight": 0.0,
        "conv.weight": 0.2, "output.weight": 0.2,
    }  # fmt: skip
    assert {(g.method, g.lr_scale) for g in found.values()} == {("adamw", 1.0)}
    for optimizer, usual in (
        ("adamw", 0.1),
        ("muon", 0.1),
        ("adam", 0.0),
        ("sgd", 0.0),
    ):  # no decay by default where it is added to the gradient
        assert assign(TrainingConfig(optimizer=optimizer), SHAPES, KINDS)["output.weight"].weight_decay == usual
    assert list(found) == list(SHAPES)
    assert gather(found) == {
        Group("adamw", 1.0, 0.2): ["token_embedding.weight", "blocks.0.up.weight", "conv.weight", "output.weight"],
        Group("adamw", 1.0, 0.0): ["blocks.0.up.bias", "norm.weight"],
    }


def test_a_parameter_is_in_the_first_group_that_matches() -> None:
    groups = [group("*.bias", "norm.*", weight_decay=0.5), group("blocks.*", learning_rate=1e-3), group("output.*")]
    found = assign(TrainingConfig(learning_rate=1e-2, parameter_groups=groups), SHAPES, KINDS)
    assert found["blocks.0.up.bias"] == Group("adamw", 1.0, 0.5)  # not of the second group
    assert found["norm.weight"] == Group("adamw", 1.0, 0.5)
    assert found["blocks.0.up.weight"] == Group("adamw", pytest.approx(0.1), 0.1)
    assert found["output.weight"] == Group("adamw", 1.0, 0.1)  # a group without settings


def test_muon_updates_hidden_matrices_only() -> None:
    training = TrainingConfig(optimizer="muon")
    found = assign(training, SHAPES, KINDS, outputs=9)
    # a hidden layer as wide as the vocabulary is in a numbered stack, so it is not the output layer
    assert [path for path, g in found.items() if g.method == "muon"] == ["blocks.0.up.weight"]
    assert {g.method for g in found.values()} == {"muon", "adamw"}
    assert assign(training, SHAPES, KINDS, outputs=None)["output.weight"].method == "muon"


@both_backends
@pytest.mark.parametrize("family, count", [("transformer", 6), ("cnn", 1), ("lstm", 0)])
def test_muon_in_the_families(tmp_path: Path, backend: str, family: str, count: int) -> None:
    config = tiny(tmp_path, "training.optimizer=muon", family=family)
    state = backends.engine(config, backend).optimizer_state()
    found = [name.rpartition(".")[0] for name in state if name.endswith(".momentum_buffer")]
    assert len(found) == count and all(uses_muon(path) for path in found)


@pytest.mark.parametrize("pattern, nearest", [
    ("blocks.1.*", "blocks.0."), ("lm_head.weight", ".weight"), ("*.BIAS", "."), ("output.weigth", "output.weight")
])  # fmt: skip
@both_backends
def test_a_pattern_that_matches_nothing(tmp_path: Path, backend: str, pattern: str, nearest: str) -> None:
    config = tiny(tmp_path)
    config.training.parameter_groups = [group("output.*"), group("*.bias", pattern, learning_rate=0.0)]
    with pytest.raises(ConfigError) as error:
        backends.engine(config, backend)
    text = str(error.value)
    assert is_one_line(text, f"training.parameter_groups.1.parameters: {pattern!r}")
    assert nearest in text.partition(repr(pattern))[2]


@each_optimizer
def test_elementwise_optimizers(optimizer: str) -> None:
    """An optimizer may be sharded exactly if its formula updates halves of a parameter as it updates the whole."""
    p, g = (rng.normal(rng.key(4, name), (6, 5)).astype(np.float64) for name in ("p", "g"))
    formula, training = FORMULAS[optimizer], TrainingConfig(optimizer=optimizer, sharded=True)  # type: ignore[arg-type]
    whole = formula(p, g, {}, 1, 1e-2, 0.1, training)
    pieces = [formula(part, slope, {}, 1, 1e-2, 0.1, training) for part, slope in ((p[:3], g[:3]), (p[3:], g[3:]))]
    if np.array_equal(np.concatenate(pieces), whole):
        processes.check_training(training, 2)
    else:
        with pytest.raises(ConfigError) as error:
            processes.check_training(training, 2)
        assert is_one_line(error.value, "training.sharded", optimizer, "training.sharded=false")


@both_backends
@each_optimizer
def test_a_learning_rate_of_zero_changes_nothing(tmp_path: Path, backend: str, optimizer: str) -> None:
    config = tiny(tmp_path, f"training.optimizer={optimizer}")
    config.training.parameter_groups = [group("blocks.0.attention.*", learning_rate=0.0)]
    engine = backends.engine(config, backend)
    start = engine.weights()
    for step in range(3):
        engine.apply_gradients(gradients_of({p: a.shape for p, a in start.items()}, step), step, 1e-2)
    for path, array in engine.weights().items():
        assert (array.tobytes() == start[path].tobytes()) == path.startswith("blocks.0.attention."), path


# ---- state ------------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("family", ["cnn", "lstm", "gru"])
def test_state_moves_between_backends(tmp_path: Path, optimizer: str, family: str) -> None:
    """MLX -> PyTorch -> MLX bit for bit, and the next step is the same with it."""
    config = tiny(tmp_path, f"training.optimizer={optimizer}", family=family)
    mlx, other, back = (backends.engine(config, name) for name in ("mlx", "torch", "mlx"))
    shapes = {p: a.shape for p, a in mlx.weights().items() if p in mlx.model.trainable_paths()}
    for step in range(2):
        mlx.apply_gradients(gradients_of(shapes, step), step, 1e-3)
    state = mlx.optimizer_state()
    assert state.keys() == other.optimizer_state().keys() and any(array.any() for array in state.values())
    read_only = {name: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for name, a in state.items()}
    other.set_weights(mlx.weights())
    other.set_optimizer_state(read_only)
    back.set_weights(other.weights())
    back.set_optimizer_state(other.optimizer_state())
    assert same_bits(back.optimizer_state(), state) and same_bits(other.optimizer_state(), state)
    for name, array in state.items():  # the layouts are PyTorch's
        path, _, slot = name.rpartition(".")
        wanted = list(shapes[path])
        if slot in ("row_var", "col_var"):
            wanted[-1 if slot == "row_var" else -2] = 1
        assert list(array.shape) == wanted, name
    for engine in (mlx, other, back):
        engine.apply_gradients(gradients_of(shapes, 2), 2, 1e-3)
    assert same_bits(back.optimizer_state(), mlx.optimizer_state()) and same_bits(back.weights(), mlx.weights())
    for name, array in mlx.weights().items():
        np.testing.assert_allclose(other.weights()[name], array, rtol=1e-4, atol=1e-7, err_msg=name)
    assert same_bits({"": next(iter(read_only.values()))}, {"": next(iter(state.values()))})  # the input is unchanged


@both_backends
@pytest.mark.parametrize("written, reader, names", [
    ("adamw", "lion", [".exp_avg_sq'", "lion", "adamw or adam", "--set training.optimizer=adamw"]),
    ("lion", "adam", [".exp_avg_sq'", "adam", "--set training.optimizer=lion"]),
    ("sgd", "adafactor", [".row_var'", "adafactor", "--set training.optimizer=sgd"]),
    ("adafactor", "adamw", [".exp_avg'", "adamw", "--set training.optimizer=adafactor"]),
    ("muon", "sgd", [".momentum_buffer'", "sgd", "--set training.optimizer=muon"]),
    ("sgd", "sgd momentum=0", [".momentum_buffer'", "sgd"]),
    ("sgd momentum=0", "sgd", ["sgd", "--set training.optimizer=sgd --set training.momentum=0"]),
])  # fmt: skip
def test_the_state_of_another_optimizer(
    tmp_path: Path, backend: str, written: str, reader: str, names: list[str]
) -> None:
    def new_engine(text: str) -> Any:
        name, *more = text.split()
        given = [f"training.{option}" for option in more]
        return backends.engine(tiny(tmp_path, f"training.optimizer={name}", *given), backend)

    engine = new_engine(reader)
    before = engine.optimizer_state()
    with pytest.raises(CheckpointError) as error:
        engine.set_optimizer_state(new_engine(written).optimizer_state())
    assert is_one_line(error.value, *names)
    assert same_bits(engine.optimizer_state(), before) if before else engine.optimizer_state() == {}


@both_backends
def test_adam_and_adamw_have_the_same_state(tmp_path: Path, backend: str) -> None:
    first, second = (backends.engine(tiny(tmp_path, f"training.optimizer={o}"), backend)
                     for o in ("adam", "adamw"))  # fmt: skip
    first.apply_gradients(gradients_of({p: a.shape for p, a in first.weights().items()}, 0), 0, 1e-3)
    second.set_optimizer_state(first.optimizer_state())
    assert same_bits(second.optimizer_state(), first.optimizer_state())


@both_backends
def test_a_state_of_another_shape(tmp_path: Path, backend: str) -> None:
    engine = backends.engine(tiny(tmp_path), backend)
    other = backends.engine(tiny(tmp_path, "model.vocab_size=300"), backend)
    with pytest.raises(CheckpointError) as error:
        engine.set_optimizer_state(other.optimizer_state())
    assert is_one_line(error.value, "token_embedding.weight.exp_avg", "[300, 32]", "[257, 32]")


# ---- runs that change backend -----------------------------------------------------------------------------


def moving_config(folder: Path, optimizer: str, steps: int) -> Config:
    return tiny(
        folder, f"training.optimizer={optimizer}", f"training.learning_rate={RATES[optimizer]}",
        f"training.max_steps={steps}", f"training.checkpoint_every={steps // 2}", "training.eval_every=null",
        "training.keep_checkpoints=2", "training.gradient_accumulation=2",
    )  # fmt: skip


def moved_losses(config: Config, run: Path, first: str, second: str) -> list[float]:
    """Returns the losses of a run that changes its backend halfway."""
    Trainer.start(config, run, backend=first, quiet=True).fit(config.training.max_steps // 2)
    Trainer.resume(run, backend=second, quiet=True).fit()
    return losses(run)


def judge_moves(config: Config, folder: Path) -> dict[str, CurveJudgement]:
    """Compares both directions of a change of backend with the uninterrupted run, by the yardstick."""
    whole = curves(build(config), config.training.max_steps)
    return {
        f"{first} to {second}": judge_curve(
            moved_losses(config, folder / first, first, second), whole["PyTorch"], whole["PyTorch float64"]
        )
        for first, second in (("mlx", "torch"), ("torch", "mlx"))
    }


@each_optimizer
def test_changing_backend(tmp_path: Path, optimizer: str) -> None:
    config = moving_config(tmp_path, optimizer, 6)
    for direction, verdict in judge_moves(config, tmp_path).items():
        assert verdict.passed, (direction, verdict.worst, verdict.worst_step)
    found = checkpoint.find(tmp_path / "mlx")
    assert found.optimizer and found.step == 6
    with pytest.raises(CheckpointError, match=r"training\.optimizer"):
        Trainer.resume(
            tmp_path / "mlx", run=tmp_path / "other", quiet=True,
            overrides=[f"training.optimizer={'sgd' if optimizer != 'sgd' else 'lion'}", "training.max_steps=20"],
        )  # fmt: skip


@pytest.mark.slow
@each_optimizer
def test_changing_backend_in_300_steps(tmp_path: Path, optimizer: str) -> None:
    """With dropout 0.1, two micro-batches per step and clipping; the backend changes at step 150."""
    config = moving_config(tmp_path, optimizer, 300)
    assert config.model.dropout == 0.1 and config.training.max_grad_norm == 1.0
    for direction, verdict in judge_moves(config, tmp_path).items():
        print(
            f"{optimizer:>10}, {direction:>12}: ratio {verdict.worst:.2f} at step {verdict.worst_step + 1}, "
            f"largest gap {verdict.gap.max():.1e}, noise {verdict.noise.max():.1e}"
        )
        assert verdict.passed, (direction, verdict.worst, verdict.worst_step)
    assert losses(tmp_path / "mlx")[-1] < 0.6 * losses(tmp_path / "mlx")[0]  # it learns


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_a_compiled_step(tmp_path: Path, optimizer: str) -> None:
    """A function of `mx.compile` captures the state: it must read what each step and each resume sets."""
    config = moving_config(tmp_path, optimizer, 6)
    eager, compiled = (backends.engine(config.with_overrides(f"model.compile_model={given}"), "mlx")
                       for given in ("false", "true"))  # fmt: skip
    batch = {"inputs": np.ones((2, 8), np.int32), "labels": np.arange(16, dtype=np.int32).reshape(2, 8)}
    state: dict[str, np.ndarray] = {}
    for step in range(6):
        if step == 3:
            eager.set_optimizer_state(state)  # that of step 1, again
            compiled.set_optimizer_state(state)
        for engine in (eager, compiled):
            engine.read(engine.train_step(batch, step, 1e-2 / (step + 1)))
        state = state or eager.optimizer_state()
    found = compiled.optimizer_state()
    for name, array in eager.optimizer_state().items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("family", ["transformer", "cnn"])
@pytest.mark.parametrize("optimizer", [*RATES, "sgd without momentum"])
def test_the_estimated_size_of_the_state(tmp_path: Path, optimizer: str, family: str) -> None:
    """The estimate of `icenet info` equals the size of an engine's state."""
    given = f"training.optimizer={optimizer.split()[0]}"
    more = ["training.momentum=0"] if "without" in optimizer else ["training.ema_decay=0.9"]
    config = tiny(tmp_path, given, *more, family=family)
    engine = backends.engine(config, "torch")
    kept = sum(array.size for array in engine.optimizer_state().values())
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf-8")
    found = info.model_report(str(tmp_path / "c.yaml"))
    assert found.training_bytes == 4 * (2 * engine.model.num_params + kept)


@pytest.mark.parametrize("has_gaps", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_arrays_whose_axes_have_other_orders_in_memory(optimizer: str, has_gaps: bool) -> None:
    """PyTorch's fused Adam reads all arrays in the order of memory, and parameters with gaps must not be read so."""
    from icenet_torch.engine.optimizers import Optimizer

    draws = np.random.default_rng(0)
    values = {path: draws.normal(size=(5, 4)) for path in ("turned", "plain")}
    module = torch.nn.Module()
    module.turned = torch.nn.Parameter(torch.tensor(np.asfortranarray(values["turned"])))
    module.plain = torch.nn.Parameter(torch.tensor(values["plain"]))
    if has_gaps:
        values["gaps"] = draws.normal(size=(5, 4))
        module.gaps = torch.nn.Parameter(torch.tensor(np.repeat(values["gaps"], 2, 1))[:, ::2])
    module.layer_kinds, module.config = dict, None
    training = TrainingConfig(optimizer=optimizer, weight_decay=0.0)
    own, slots = Optimizer(training, module), {path: {} for path in values}
    for step in range(3):
        gradients = {path: draws.normal(size=(5, 4)) for path in values}
        own.prepare(step, 1e-2)
        own.update({path: torch.tensor(np.asarray(array, order="CF"[step % 2])) for path, array in gradients.items()})
        for path, gradient in gradients.items():
            values[path] = adam(values[path], gradient, slots[path], step + 1, 1e-2, 0.0, training)
    for path, expected in values.items():
        np.testing.assert_allclose(getattr(module, path).detach().numpy(), expected, rtol=1e-12)
