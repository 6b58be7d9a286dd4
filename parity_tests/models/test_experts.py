"""Mixtures of experts: routing, products and gradients, against PyTorch in float64 and written-out formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import both_backends, build_model, native, plain

from icenet.core import backends
from icenet.core.config import Config, ModelConfig, TrainingConfig
from icenet.core.config.transformer_plan import ExpertsPlan, FeedForwardPlan
from icenet.core.models import modules
from icenet.core.training.parameter_groups import assign
from icenet.parity.engines import build
from icenet.parity.run import compare_engines, random_batch, run

HERE = Path(__file__)

WIDTH, INNER, COUNT, PER_TOKEN = 6, 5, 4, 2
PLANS = {
    "plain, biases": FeedForwardPlan(WIDTH, INNER, "gelu", experts=ExpertsPlan(COUNT, PER_TOKEN)),
    "gated": FeedForwardPlan(WIDTH, INNER, "silu", True, False, experts=ExpertsPlan(COUNT, PER_TOKEN, False)),
    "one of four": FeedForwardPlan(WIDTH, INNER, "gelu_tanh", True, experts=ExpertsPlan(COUNT, 1, False)),
    "all": FeedForwardPlan(WIDTH, INNER, "silu", True, experts=ExpertsPlan(COUNT, COUNT)),
}
by_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def mixture(backend: str, plan: FeedForwardPlan) -> Any:
    """Returns a module with random weights; of "exact" in float64."""
    model = backends.module("torch" if backend == "exact" else backend, "models.transformer")
    module = model.MixtureOfExperts(plan, plan.experts)
    drawn = np.random.default_rng(3)
    weights = {
        path: drawn.normal(size=array.shape).astype(np.float32)
        for path, array in sorted(modules.get_weights(module).items())
    }
    modules.set_weights(module, weights)
    return module.double() if backend == "exact" else module


def formula(plan: FeedForwardPlan, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Computes a mixture token by token and expert by expert, in the dtype of x."""
    assert plan.experts is not None
    activation = {
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    }[plan.activation]

    def project(name: str, expert: int, y: torch.Tensor) -> torch.Tensor:
        y = weights[f"experts.{name}.weight"][expert] @ y
        bias = weights.get(f"experts.{name}.bias")
        return y if bias is None else y + bias[expert]

    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        probabilities = torch.softmax(weights["router.weight"] @ token, 0)
        chosen = probabilities.argsort(descending=True)[: plan.experts.per_token]
        total = probabilities[chosen].sum() if plan.experts.normalize else 1.0
        row = torch.zeros_like(token)
        for expert in map(int, chosen):
            inner = activation(project("gate_proj" if plan.is_gated else "up_proj", expert, token))
            if plan.is_gated:
                inner = inner * project("up_proj", expert, token)
            row = row + probabilities[expert] / total * project("down_proj", expert, inner)
        rows.append(row)
    return torch.stack(rows).reshape(x.shape)


def exact_results(plan: FeedForwardPlan, x: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Returns the output of `formula` and the gradients of its weighted sum."""
    arrays = {
        name: torch.tensor(array, dtype=dtype) for name, array in modules.get_weights(mixture("torch", plan)).items()
    }
    leaves = {"input": torch.tensor(x, dtype=dtype), **arrays}
    for leaf in leaves.values():
        leaf.requires_grad_()
    output = formula(plan, leaves["input"], arrays)
    (output * cotangent(x).to(dtype)).sum().backward()
    return {"output": plain(output), **{name: plain(leaf.grad) for name, leaf in leaves.items()}}


def cotangent(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(size=x.shape).astype(np.float32))


def results(backend: str, plan: FeedForwardPlan, x: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the output of a mixture and the gradients of its weighted sum."""
    module = mixture(backend, plan).train(x.shape[-2] > 1)  # a decoding step is not in training mode
    if backend == "torch":
        given = torch.from_numpy(x).requires_grad_()
        output = module(given)
        (output * cotangent(x)).sum().backward()
        found = {path: plain(parameter.grad) for path, parameter in module.named_parameters()}
        return {"output": plain(output), "input": plain(given.grad), **found}
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    def loss(given: Any) -> Any:
        return (module(given) * mx.array(cotangent(x).numpy())).sum()

    gradients = dict(tree_flatten(nn.value_and_grad(module, loss)(mx.array(x))[1]))
    own = {"output": plain(module(mx.array(x))), "input": plain(mx.grad(loss)(mx.array(x)))}
    return {**own, **{path: plain(array) for path, array in gradients.items()}}


@both_backends
@by_plan
@pytest.mark.parametrize("shape", [(2, 7), (3, 1), (1, 1), (1, 2)], ids=["prompt", "step", "one token", "two tokens"])
def test_output_and_gradients_are_those_of_the_formula(
    backend: str, plan: FeedForwardPlan, shape: tuple[int, int]
) -> None:
    """By the yardstick. Each way in which the products are arranged is covered: (3, 1) and (1, 1) are steps."""
    x = np.random.default_rng(1).normal(size=(*shape, WIDTH)).astype(np.float32)
    exact, noise, found = (
        exact_results(plan, x, torch.float64),
        exact_results(plan, x, torch.float32),
        results(backend, plan, x),
    )
    assert found.keys() == exact.keys()
    for name, array in found.items():
        floor = 2.0**-23 * np.abs(exact[name]).max()
        assert np.abs(array - exact[name]).max() <= 8 * max(np.abs(noise[name] - exact[name]).max(), floor), name


@both_backends
def test_of_equal_scores_the_first_expert_is_chosen(backend: str) -> None:
    nn = backends.module(backend, "nn")
    scores = np.array([[1, 3, 3, 2, 3, 3], [0, 0, 0, 0, 0, 0], [-0.0, 0.0, -1, 5, 5, 5]], np.float32)
    weights, indices = nn.route(native(backend, scores), ExpertsPlan(6, 3))
    assert plain(indices).tolist() == [[1, 2, 4], [0, 1, 2], [3, 4, 5]]
    np.testing.assert_allclose(plain(weights), np.full((3, 3), 1 / 3), rtol=1e-6)
    many = np.zeros((2, 3, 300), np.float32)
    assert plain(nn.route(native(backend, many), ExpertsPlan(300, 5))[1]).tolist() == [[[0, 1, 2, 3, 4]] * 3] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 33), (4, 1)])
def test_on_a_gpu_mlx_computes_the_formula(shape: tuple[int, int]) -> None:
    """MLX's CUDA build misreads the strides of an axis of length 1 in products with sorted indices."""
    import mlx.core as mx

    if not mx.is_available(mx.gpu):
        pytest.skip("MLX has no GPU here")
    device, plan = mx.default_device(), PLANS["plain, biases"]
    x = np.random.default_rng(1).normal(size=(*shape, WIDTH)).astype(np.float32)
    exact = exact_results(plan, x, torch.float64)
    mx.set_default_device(mx.gpu)
    try:
        found = results("mlx", plan, x)
    finally:
        mx.set_default_device(device)
    for name, array in found.items():
        np.testing.assert_allclose(array, exact[name], rtol=0, atol=1e-2 * np.abs(exact[name]).max(), err_msg=name)


@both_backends
@pytest.mark.parametrize("shape", [(2, 7), (3, 1), (1, 1)])
def test_half_precision(backend: str, shape: tuple[int, int]) -> None:
    """Weights in bf16, as a loaded model has them: scores are fp32, outputs bf16 and close to the formula."""
    plan = PLANS["plain, biases"]
    module = mixture(backend, plan)
    if backend == "torch":
        module = module.bfloat16().eval()
    else:
        import mlx.core as mx

        module.apply(lambda array: array.astype(mx.bfloat16))
        module.eval()
    weights = {name: torch.tensor(array.astype(np.float64)) for name, array in modules.get_weights(module).items()}
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(*shape, WIDTH)).astype(np.float32)).bfloat16()
    exact = plain(formula(plan, x.double(), weights))
    given = x if backend == "torch" else mx.array(x.float().numpy()).astype(mx.bfloat16)
    output = module(given)
    assert output.dtype == given.dtype and str(module.router(given).dtype).endswith("float32")
    found = plain(output.float() if backend == "torch" else output.astype(mx.float32))
    assert np.abs(found - exact).max() <= 2.0**-6 * np.abs(exact).max()


def test_both_backends_train_the_same_mixture() -> None:
    """Layers, gradients, steps of Muon and curves; each gradient is that of all experts."""
    report = run(config_of("training.optimizer=muon", "model.feed_forward=gated"), steps=4)
    assert report.passed and report.curve is not None and report.curve.passed, report.verdict()
    gradients = {row.path for row in report.sections[-2].rows if row.kind == "gradient"}
    assert {f"blocks.1.feed_forward.experts.{name}_proj.weight" for name in ("gate", "up", "down")} <= gradients
    layers = {row.path for row in report.sections[0].rows if row.own is not None}
    assert {"blocks.1.feed_forward.router", "blocks.1.feed_forward.experts"} <= layers


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_that_are_equal_but_for_rounding_are_no_alarm(precision: str) -> None:
    """Which of two experts is chosen then depends on the order of sums, on each backend."""
    engines = build(config_of(f"training.mixed_precision={precision}"))
    weights = engines.torch.weights()
    for block in range(2):
        router = weights[f"blocks.{block}.feed_forward.router.weight"]
        router[1] = np.nextafter(router[0], np.float32(9))
        router[3] = np.nextafter(router[2], np.float32(9))
    for engine in engines:
        engine.set_weights(weights)
    report = compare_engines(engines, random_batch(engines.torch.config, 4, 16))
    assert report.passed, report.verdict()


def config_of(*overrides: str) -> Config:
    model = {
        **{"type": "transformer", "hidden_size": 12, "num_layers": 2, "num_heads": 2, "vocab_size": 257},
        **{"max_seq_length": 16, "dropout": 0.1, "num_experts": 4, "expert_size": 10, "feed_forward_bias": False},
    }
    values = {"device": "cpu", "model": model, "data": {"source": str(HERE), "seq_length": 16}}
    return Config.from_dict(values).with_overrides(*overrides)


@both_backends
def test_muon_updates_each_expert_as_a_matrix_of_its_own(backend: str) -> None:
    engine = backends.engine(config_of("training.optimizer=muon", "training.weight_decay=0"), backend)
    start, path = engine.weights(), "blocks.0.feed_forward.experts.down_proj.weight"
    drawn = np.random.default_rng(4)
    gradients = {name: drawn.normal(size=array.shape).astype(np.float32) for name, array in start.items()}
    engine.apply_gradients(gradients, 0, 1e-2)
    update = (start[path] - engine.weights()[path]) / (1e-2 * 0.2 * 12**0.5)  # matrices of 12 x 10
    for expert, gradient in enumerate(gradients[path]):
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        values = np.diag(left.T @ update[expert] @ right.T)
        assert ((values > 0.6) & (values < 1.3)).all()


def test_biases_of_experts_have_no_weight_decay() -> None:
    shapes = {"experts.up.weight": (4, 3, 2), "experts.up.bias": (4, 3), "table": (4, 3)}
    kinds = {"experts.up": "stacked_linear", "": "plain"}
    for optimizer in ("adamw", "muon"):
        found = assign(TrainingConfig(optimizer=optimizer, weight_decay=0.1), shapes, kinds)
        assert {path: group.weight_decay for path, group in found.items()} == {
            "experts.up.weight": 0.1, "experts.up.bias": 0.0, "table": 0.1,
        }  # fmt: skip
        assert [group.method for group in found.values()] == [optimizer, "adamw", "adamw"]


def test_initial_values_are_those_of_linear_layers() -> None:
    """Normal with deviation 1 / sqrt(inputs) for each expert, and smaller in the last projection."""
    values = {"type": "transformer", "hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 9}
    weights = build_model("torch", ModelConfig(**values, num_experts=8, expert_size=100)).weights()
    prefix = "blocks.0.feed_forward.experts"
    up, down = (weights[f"{prefix}.{name}_proj.weight"] for name in ("up", "down"))
    assert (up.shape, down.shape) == ((8, 100, 64), (8, 64, 100))
    np.testing.assert_allclose(up.std(axis=(1, 2)), 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(down.std(axis=(1, 2)), 0.5 * 100**-0.5, rtol=0.05)
    assert not weights[f"{prefix}.up_proj.bias"].any()
    assert len({array.tobytes() for array in up}) == 8
