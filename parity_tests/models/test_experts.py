"""Mixtures of experts: routing, products and gradients, against PyTorch in float64 and written-out formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import both_backends, native, plain

from icenet.core import backends
from icenet.core.config.transformer_plan import ExpertsPlan, FeedForwardPlan
from icenet.core.models import modules

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
