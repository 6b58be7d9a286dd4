"""Correct models that differ by more than the noise of PyTorch: what MLX computes less exactly is no difference."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import mlx.optimizers as optim
import numpy as np
import pytest
import rare_pairs
import torch
import torch.nn as T
import torch.nn.functional as F
from evidence import check_model
from pairs import draw, with_equal_weights
from written_pairs import Pair, linear, net

from icenet.nn import BatchNorm2d
from icenet.parity import compare
from icenet_torch.tools.sums import summing_in_order


class Net(M.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.up, self.down, self.function = M.Linear(8, 16), M.Linear(16, 4), function

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(self.function(self.up(x)))


class TorchNet(T.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.up, self.down, self.function = T.Linear(8, 16), T.Linear(16, 4), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.function(self.up(x)))


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0])
def test_the_error_of_erf_is_no_difference(scale: float) -> None:
    """MLX's has errors of 4e-7 near 0, PyTorch's of 1e-8."""
    pair = with_equal_weights(Net(mx.erf), TorchNet(torch.erf))
    report = compare(*pair, draw(40, 8, scale=scale), stages=["forward", "gradients"])
    assert report.passed, report
    wrong = with_equal_weights(Net(lambda x: mx.erf(1.00001 * x)), TorchNet(torch.erf))
    assert not compare(*wrong, draw(40, 8, scale=scale), stages=["forward", "gradients"]).passed


def test_a_loss_that_is_a_mean_has_the_rounding_of_a_sum_term_by_term() -> None:
    """As in a VQ-VAE, whose codebook returns its loss."""
    errors: dict[str, list[float]] = {"mlx": [], "torch": [], "in order": []}
    for seed in range(20):
        x, y = draw(1024, seed=seed, scale=30.0), draw(1024, seed=100 + seed)
        exact = np.square(x.astype(np.float64) - y).mean()
        given = torch.from_numpy(x), torch.from_numpy(y)
        errors["mlx"].append(mx.square(mx.array(x) - mx.array(y)).mean().item() - exact)
        errors["torch"].append(F.mse_loss(*given).item() - exact)
        with summing_in_order(seed):
            errors["in order"].append(F.mse_loss(*given).item() - exact)
    sizes = {name: np.sqrt(np.square(found).mean()) for name, found in errors.items()}
    assert sizes["mlx"] < 3 * sizes["in order"]
    assert sizes["in order"] > 3 * sizes["torch"]


@pytest.mark.parametrize("padding", [3, 0])
def test_a_causal_convolution_may_pad_its_input_itself(padding: int) -> None:
    """As in ports of Mamba: PyTorch pads both ends and cuts off the last values, MLX gets padded values."""
    theirs = net(
        lambda m, x: m.out(M.silu(m.conv(mx.pad(m.inner(x), [(0, 0), (padding, 3 - padding), (0, 0)])))),
        lambda m, x: m.out(F.silu(m.conv(m.inner(x).transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)),
        inner=linear(5, 8),
        conv=Pair(M.Conv1d(8, 8, 4, groups=8), T.Conv1d(8, 8, 4, groups=8, padding=3)),
        out=linear(8, 3),
    )
    report = compare(*with_equal_weights(*theirs), draw(2, 9, 5))
    assert report.passed == (padding == 3), report
    assert padding or (report.culprit, report.where) == ("", "between inner and out"), report


@pytest.mark.parametrize("first", [1, 2])
def test_a_convolution_may_get_an_input_that_is_padded_as_the_other_pads_it(first: int) -> None:
    theirs = net(
        lambda m, x: m.out(m.conv(mx.pad(m.inner(x), [(0, 0), (first, 2 - first), (0, 0)]))),
        lambda m, x: m.out(m.conv(m.inner(x).transpose(1, 2)).transpose(1, 2)),
        inner=linear(5, 8),
        conv=Pair(M.Conv1d(8, 8, 3), T.Conv1d(8, 8, 3, padding=1)),
        out=linear(8, 3),
    )
    report = compare(*with_equal_weights(*theirs), draw(2, 9, 5))
    assert report.passed == (first == 1), report
    assert report.passed or report.verdict.endswith("cause: conv: padding is 0 in a, 1 in b"), report


def test_a_sigmoid_whose_exponential_overflows_is_no_difference() -> None:
    """In fp16, MLX's is 0 below -11.1."""

    def functions(shift: float) -> tuple[Any, Any]:
        return with_equal_weights(Net(lambda x: mx.sigmoid(x - shift)), TorchNet(lambda x: torch.sigmoid(x - 14)))

    assert compare(*functions(14), draw(4, 8), dtype="fp16", stages=["forward", "gradients"]).passed
    assert not compare(*functions(8), draw(4, 8), dtype="fp16", stages=["forward"]).passed


def test_errors_of_erf_are_below_an_ulp_of_one() -> None:
    x = torch.from_numpy(draw(1000, scale=0.1))
    with summing_in_order(1):
        found = [torch.erf(x), torch.nn.functional.gelu(x)]
    exact = [torch.erf(x.double()), torch.nn.functional.gelu(x.double())]
    errors = [(y - z).numpy() for y, z in zip(found, exact, strict=True)]
    assert 2.0**-25 < np.abs(errors[0]).max() < 2.0**-22
    assert np.abs(errors[1]).max() < np.abs(errors[0]).max()
    with summing_in_order(1):
        assert torch.equal(torch.erf(x.double()), exact[0])


@pytest.mark.parametrize("seed", [10377, 110565])
def test_errors_of_modules_are_larger_with_the_gradients_of_the_run(seed: int) -> None:
    """The derivative of the norm of a single value, and of a softmax of nearly equal scores, is a difference of equal
    numbers; each is far within the tolerance with random gradients."""
    assert check_model(seed)["alarm"] == ""


def test_statistics_of_many_values_with_a_mean_near_zero_are_no_difference() -> None:
    """PyTorch takes them in float64, so that they have hardly any noise."""
    x = np.random.default_rng(0).standard_normal((8, 32, 32, 6)).astype(np.float32)
    report = compare(BatchNorm2d(6), T.BatchNorm2d(6), x, layout="channels_last", stages=["forward"])
    assert report.passed, str(report)


def _over_nodes(is_global: bool, keeps_gradient: bool = True) -> tuple[Any, Any]:
    """Attention over the edges of a graph that subtracts the maximum of all scores, or of each node."""

    class Attention(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.source, self.target = M.Linear(5, 4, bias=False), mx.zeros((4,)), mx.zeros((4,))

        def __call__(self, x: mx.array, edges: mx.array) -> mx.array:
            z, (start, end) = self.lin(x), (edges[0], edges[1])
            e = M.leaky_relu((z * self.source).sum(-1)[start] + (z * self.target).sum(-1)[end], 0.2)
            top = mx.full((len(x),), -mx.inf).at[end].maximum(e)[end]
            e = mx.exp(e - (e.max() if is_global else top if keeps_gradient else mx.stop_gradient(top)))
            weights = e if not keeps_gradient else e / mx.zeros((len(x),)).at[end].add(e)[end]
            return mx.zeros_like(z).at[end].add(weights[:, None] * z[start])

    class TorchAttention(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.source, self.target = (
                T.Linear(5, 4, bias=False),
                *(T.Parameter(torch.randn(4)) for _ in range(2)),
            )

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            z, (start, end) = self.lin(x), (edges[0], edges[1])
            e = T.functional.leaky_relu((z @ self.source)[start] + (z @ self.target)[end], 0.2)
            top = torch.full((len(x),), -torch.inf, dtype=x.dtype).scatter_reduce(0, end, e, "amax")
            e = torch.exp(e - top[end])
            weights = e if not keeps_gradient else e / torch.zeros_like(top).scatter_add(0, end, e)[end]
            return torch.zeros_like(z).index_add(0, end, weights[:, None] * z[start])

    return Attention(), TorchAttention()


def test_a_maximum_that_a_softmax_subtracts_is_no_difference() -> None:
    """The gradient of the maximum of each node takes its rounding errors back, that of all scores does not."""
    edges = np.concatenate([np.random.default_rng(3).integers(0, 6, (2, 14)), np.stack([np.arange(6)] * 2)], 1)
    given = draw(6, 5), edges.astype(np.int32)
    for seed in (29, 71, 88):
        torch.manual_seed(seed)
        report = compare(*_over_nodes(True), given, copy_weights=True, stages=["forward", "gradients"], seed=seed)
        assert report.passed, report
    wrong = compare(*_over_nodes(False, False), given, copy_weights=True, stages=["forward", "gradients"])
    assert wrong.culprit == "" and wrong.failed_stage.name == "gradients"  # there its gradient counts


@pytest.mark.parametrize("shift", [3.0, 40.0])
def test_the_error_of_an_exponential_is_no_difference(shift: float) -> None:
    """On a CPU, that of MLX's exp(x) is |x| times as large as PyTorch's."""

    def functions(factor: float) -> tuple[Any, Any]:
        return with_equal_weights(Net(lambda x: mx.exp(factor * x - shift)), TorchNet(lambda x: torch.exp(x - shift)))

    assert compare(*functions(1), draw(40, 8), stages=["forward", "gradients"]).passed
    assert not compare(*functions(1.0001), draw(40, 8), stages=["forward", "gradients"]).passed


def test_a_loss_that_overflows_on_both_sides_is_no_difference() -> None:
    """Float64 holds it. Its gradients are finite."""
    pair = with_equal_weights(Net(lambda x: 1e19 * x), TorchNet(lambda x: 1e19 * x))
    report = compare(*pair, draw(40, 8, scale=3.0))
    assert report.passed, report


def test_losses_that_overflow_on_both_sides_are_no_difference() -> None:
    """Float64 holds the loss of such a step."""
    pair = with_equal_weights(Net(mx.exp), TorchNet(torch.exp))
    rates = optim.SGD(1.0), partial(torch.optim.SGD, lr=1.0)
    report = compare(*pair, draw(40, 8, scale=3.0), optimizer=rates, steps=4)
    assert report.passed, report
    assert report.stages[-1].note.startswith("the losses of a and b are infinite or NaN after"), report
    assert not np.isfinite(report.losses["a"][-1])


class Attention(M.Module):
    """An attention of one position, whose softmax is 1, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = M.Linear(3, 64), M.LayerNorm(64)
        self.attention = M.MultiHeadAttention(64, 1, bias=True)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.up(x)
        return self.norm(x + self.attention(x, x, x))


class TorchAttention(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = T.Linear(3, 64), T.LayerNorm(64)
        self.attention = T.MultiheadAttention(64, 1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


def test_training_that_only_the_rounding_of_pytorch_ends_is_no_difference() -> None:
    """The gradients by the scores are 0. PyTorch's fused attention has their rounding errors, times keys of 1e6."""
    torch.manual_seed(0)
    for rate, passes in ((1.0, True), (1.001, False)):
        rates = optim.SGD(rate), partial(torch.optim.SGD, lr=1.0)
        given = draw(2, 1, 3, scale=1e6)
        report = compare(Attention(), TorchAttention(), given, copy_weights=True, optimizer=rates, steps=3)
        assert report.passed is passes, report
        if passes:
            if np.isfinite(report.losses["b"]).all():
                pytest.skip("the gradients of PyTorch's attention are 0 on this processor")
            assert "the loss of b is infinite or NaN after 3 steps" in report.stages[-1].note
            assert not np.isfinite(report.losses["b"][-1]) and np.isfinite(report.losses["a"]).all()


def test_a_mean_that_overflows_in_fp16_is_a_difference_with_its_cause() -> None:
    """MLX sums fp16 in fp16, PyTorch in fp32."""
    for sums_in, words in (
        (mx.float16, "the mean of 10 values of the output of up overflows in a"),
        (mx.float32, ""),
    ):

        def mean(x: Any, sums_in: Any = sums_in) -> Any:
            return mx.mean(x.astype(sums_in), axis=1).astype(x.dtype)

        pair = with_equal_weights(Net(mean), TorchNet(lambda x: torch.mean(x, dim=1)))
        report = compare(*pair, np.full((4, 10, 8), 8e3, np.float32), dtype="fp16", stages=["forward"])
        assert report.passed is (not words) and words in report.cause, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_softmax_has_the_rounding_of_mlx(dtype: torch.dtype) -> None:
    """In half precision MLX rounds the products of probabilities and cotangents, PyTorch only the result."""
    scores = torch.from_numpy(draw(64, 40, scale=0.3)).to(dtype)
    cotangent = (1 + torch.from_numpy(draw(64, 40, scale=0.1, seed=1))).to(dtype)

    def gradient(as_dtype: torch.dtype) -> np.ndarray:
        x = scores.to(as_dtype).requires_grad_()
        return torch.autograd.grad(x.softmax(-1), x, cotangent.to(as_dtype))[0].double().numpy()

    arrays = [mx.array(x.float().numpy()).astype(getattr(mx, str(dtype)[6:])) for x in (scores, cotangent)]
    ours = mx.vjp(lambda x: mx.softmax(x, axis=-1, precise=True), arrays[:1], arrays[1:])[1][0]
    exact = gradient(torch.float64)
    with summing_in_order(1):
        sampled = gradient(dtype)
    errors = [np.sqrt(np.square(x - exact).mean()) for x in (np.array(ours.astype(mx.float32)), sampled)]
    assert 0.5 < errors[1] / errors[0] < 2
    assert 4 * np.sqrt(np.square(gradient(dtype) - exact).mean()) < errors[1]


@pytest.mark.usefixtures("mlx_on_cpu")  # the rounding is that of a CPU
def test_the_weight_gradient_of_a_convolution_with_groups_has_the_rounding_of_mlx() -> None:
    """MLX sums it term by term for any number of results, PyTorch in parts."""
    x, cotangent = (torch.from_numpy(draw(2, 32, 32, 32, seed=seed)) for seed in (0, 1))
    weight = torch.from_numpy(draw(32, 4, 3, 3, seed=2))

    def gradient(dtype: torch.dtype) -> np.ndarray:
        w = weight.to(dtype).requires_grad_()
        y = T.functional.conv2d(x.to(dtype), w, padding=1, groups=8)
        return torch.autograd.grad(y, w, cotangent.to(dtype))[0].double().numpy()

    arrays = [mx.array(array.movedim(1, -1).numpy()) for array in (x, weight, cotangent)]
    ours = mx.vjp(lambda w: mx.conv2d(arrays[0], w, padding=1, groups=8), arrays[1:2], arrays[2:])[1][0]
    exact = gradient(torch.float64)
    with summing_in_order(1):
        sampled = gradient(torch.float32)
    errors = [np.sqrt(np.square(g - exact).mean()) for g in (np.moveaxis(np.array(ours), -1, 1), sampled)]
    assert 0.5 < errors[1] / errors[0] < 2


def test_the_noise_of_attention_is_that_of_its_operations() -> None:
    """Not of a fused kernel, which depends on the processor: model 40010005 was an alarm with SSE4.2 alone.

    Its scores are nearly equal, and the gradient of the keys is a small difference of products.
    """
    found: set[str] = set()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.add(func.name())
            return func(*args, **(kwargs or {}))

    x = torch.from_numpy(draw(1, 1, 33, 2)).requires_grad_()
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    before = allowed()
    with Recorder(), summing_in_order(1):
        T.functional.scaled_dot_product_attention(x, x, x).sum().backward()
        assert (
            allowed()
        )  # products of bf16 are rounded to bf16: without, model 731593 was an alarm with AVX-512 alone
    assert allowed() == before
    assert "aten::_softmax_backward_data" not in found and not any("attention" in name for name in found), found
    np.testing.assert_allclose(x.grad, _gradient_of_attention(x.detach().double()), atol=1e-6)


def _gradient_of_attention(x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_()
    (torch.softmax(x @ x.mT / math.sqrt(2), dim=-1) @ x).sum().backward()
    assert x.grad is not None
    return x.grad


def test_functions_of_constants_are_rounded_again_in_each_sample() -> None:
    """Nearby problems do not move them: they would have the same error in each."""
    steps, weight = torch.tensor([531, 326]), torch.from_numpy(draw(100))
    found = []
    for sample in range(12):
        with summing_in_order(sample):
            angles = steps.float()[:, None] * torch.exp(torch.arange(100) / -7)
            exact = torch.arange(100) * 0.5 + steps.sum()
            assert torch.equal(exact, torch.arange(100) / 2 + 857)
            assert torch.equal(weight * weight, weight.square())
        found.append(angles.double())
    errors = torch.stack(found) / (steps[:, None] * torch.exp(torch.arange(100).double() / -7)) - 1
    assert (errors.std(dim=0) > 2.0**-27).double().mean() > 0.9
    assert errors.abs().max() < 16 * 2.0**-23


@pytest.mark.parametrize("seed", range(40, 46))
def test_rare_layers_modes_and_sizes_are_no_difference(seed: int) -> None:
    ours, theirs, inputs, dtype = rare_pairs.make(seed)
    report = compare(ours, theirs, inputs, dtype=dtype, copy_weights=True)
    assert report.passed, report.verdict
