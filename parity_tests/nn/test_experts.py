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
from icenet.core.engine.parameter_groups import assign
from icenet.core.families import folder
from icenet.core.models import modules
from icenet.parity.configuration.engines import build
from icenet.parity.configuration.run import compare_engines, random_batch, run

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


# --- the loss that balances experts -------------------------------------------------------------------------


def balance_formula(scores: list[torch.Tensor], per_token: int, mask: torch.Tensor) -> torch.Tensor:
    """Equations 4 to 6 of Fedus et al., 2021, over the tokens of all layers that are not padding."""
    rows = torch.cat([layer[mask.bool()] for layer in scores])
    probabilities = torch.softmax(rows, -1)
    chosen = torch.zeros_like(rows).scatter(1, probabilities.topk(per_token, -1)[1], 1.0)
    return rows.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


@both_backends
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_that_balances_experts_is_that_of_the_paper(backend: str, masked: bool) -> None:
    drawn = np.random.default_rng(2)
    arrays = [drawn.normal(size=(2, 5, COUNT)).astype(np.float32) for _ in range(3)]
    mask = np.ones((2, 5), np.int32)
    if masked:
        mask[0, :2] = mask[1, 3:] = 0
    exact = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    expected = balance_formula(exact, PER_TOKEN, torch.tensor(mask))
    expected.backward()
    plan, ops = ExpertsPlan(COUNT, PER_TOKEN), backends.module(backend, "nn")
    given = native(backend, mask) if masked else None
    if backend == "torch":
        leaves = [torch.tensor(array, requires_grad=True) for array in arrays]
        loss = ops.balance_loss(leaves, plan, given)
        loss.backward()
        gradients = [leaf.grad for leaf in leaves]
    else:
        import mlx.core as mx

        own = [mx.array(array) for array in arrays]
        loss, gradients = mx.value_and_grad(lambda own: ops.balance_loss(own, plan, given))(own)
    np.testing.assert_allclose(plain(loss), expected.item(), rtol=1e-6)
    for gradient, leaf in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(plain(gradient), plain(leaf.grad), rtol=1e-5, atol=1e-8)
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    flat = tuple(leaf.detach().reshape(-1, COUNT) for leaf in exact)
    theirs = modeling.load_balancing_loss_func(flat, COUNT, PER_TOKEN, torch.tensor(mask) if masked else None)
    np.testing.assert_allclose(plain(loss), theirs.item(), rtol=1e-6)


@both_backends
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_training_has_the_loss_and_gradients_of_transformers(backend: str, kind: str, tmp_path: Path) -> None:
    """By the yardstick, with padding, and also with gradient checkpointing. Evaluation is without that loss."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        **{"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "intermediate_size": 10, "max_position_embeddings": 16, "bos_token_id": None},
        **{"eos_token_id": None, "output_router_logits": True, "router_aux_loss_coef": 0.3},
    }
    if kind == "Qwen3Moe":
        own = {"num_experts": 4, "moe_intermediate_size": 10, "head_dim": 6, "mlp_only_layers": [1]}
    else:
        own = {"num_local_experts": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, **own, num_experts_per_tok=2)
    config._experts_implementation = "eager"  # the others have no float64
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) + float(parameter.ndim == 1))
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(3).integers(0, 31, (2, 9)).astype(np.int32)
    mask = np.ones((2, 8), np.int32)
    mask[1, 5:] = 0
    labels = np.where(mask, tokens[:, 1:], -1).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "labels": labels, "attention_mask": mask}

    def reference(dtype: torch.dtype) -> tuple[float, float, torch.Tensor]:
        own = model.to(dtype)
        own.zero_grad()
        output = own(torch.tensor(batch["inputs"]), attention_mask=torch.tensor(mask), output_router_logits=True)
        logits, wanted = output.logits.flatten(0, 1), torch.tensor(labels).flatten().long()
        plain_loss = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1)
        (loss := plain_loss + 0.3 * output.aux_loss).backward()
        routers = own.model.layers[2]
        router = (routers.mlp if hasattr(routers, "mlp") else routers.block_sparse_moe).gate.weight.grad
        return loss.item(), plain_loss.item(), router.double().clone()

    single, exact = reference(torch.float32), reference(torch.float64)
    for checkpointing in ("false", "true"):
        values = {"device": "cpu", "model": {"path": str(tmp_path)}, "data": {"source": str(HERE)}}
        overrides = [f"training.gradient_checkpointing={checkpointing}", "model.max_seq_length=16"]
        found = folder.read(tmp_path)
        values["model"] = found.config.model.model_dump()
        engine = backends.engine(Config.from_dict(values).with_overrides(*overrides), backend)
        engine.set_weights(dict(found.weights))
        loss, gradients = engine.gradients(batch)
        noise = max(abs(single[0] - exact[0]), 2.0**-23 * exact[0])
        assert abs(loss - exact[0]) <= 8 * noise
        gradient = gradients["blocks.2.feed_forward.router.weight"]
        noise = max((single[2] - exact[2]).abs().max().item(), 2.0**-23 * exact[2].abs().max().item())
        assert np.abs(gradient - exact[2].numpy()).max() <= 8 * noise
        assert engine.evaluate(batch).loss == pytest.approx(exact[1], rel=1e-5)
    assert exact[0] - exact[1] > 0.25  # 0.3 is that of balanced experts


def test_both_backends_train_the_same_balanced_mixture() -> None:
    """With micro-batches, each of which has its own loss of balance, and with average weights."""
    overrides = ("model.router_aux_loss_coef=0.5", "training.gradient_accumulation=2", "training.ema_decay=0.9")
    report = run(config_of(*overrides), steps=2)
    assert report.passed and report.curve is not None and report.curve.passed, report.verdict()


@pytest.mark.slow
@both_backends
def test_a_compiled_model_balances_experts(backend: str) -> None:
    found = []
    for compiled in ("false", "true"):
        overrides = ("model.router_aux_loss_coef=0.5", f"model.compile_model={compiled}", "model.dropout=0")
        engine = backends.engine(config_of(*overrides), backend)
        batch = random_batch(engine.config, 4, 16)
        found.append([engine.read(engine.train_step(batch, step, 1e-2)).loss for step in range(3)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


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
