"""Plain layers of MLX and PyTorch, and twins of them: correct ones pass, faults are found. No config is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import icenet.blas  # noqa: F401  (before mlx: it decides which BLAS MLX finds)

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
from helpers import is_one_line, same_bits

from icenet import nn as own
from icenet.core.errors import UsageError
from icenet.core.models.modules import copy_weights, get_weights
from icenet.parity import Report, compare
from icenet.parity.results.result import Row
from icenet_torch import nn as their_own
from icenet_torch.tools.sums import summing_in_order

Twins = tuple[Any, Any]
STAGES = ("structure", "weights", "forward", "gradients")


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU: the sums of other devices have another order."""
    torch.manual_seed(0)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def last(x: np.ndarray) -> np.ndarray:
    """Returns an array with the channels last."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim > 2 else x


def check(twins: Twins, x: np.ndarray, *, same_axes: bool = False) -> Report:
    """Compares twins with equal weights on an input with PyTorch's axes."""
    ours, theirs = twins
    copy_weights(theirs, ours)
    if same_axes:
        return compare(ours, theirs, x, layout="same", stages=STAGES)
    return compare(ours, theirs, last(x), layout="channels_last", stages=STAGES)


def rows(report: Report, stage: str = "") -> list[Row]:
    """Returns the rows of a stage, or of all."""
    return [row for found, row in report.rows() if stage in ("", found.name)]


# ---- every kind of layer ------------------------------------------------------------------------------------

SIGNAL, IMAGE, VOLUME, TOKENS = (3, 6, 9), (3, 6, 8, 5), (2, 6, 4, 5, 3), (4, 7, 16)
SQUARE = (3, 8, 8)  # as many channels as positions: the shape does not tell which axis is which

CHANNELS_FIRST: dict[str, tuple[Callable[[], Twins], tuple[int, ...]]] = {
    "conv1d": (lambda: (M.Conv1d(6, 8, 3, padding=1), T.Conv1d(6, 8, 3, padding=1)), SIGNAL),
    "conv1d, square": (lambda: (M.Conv1d(8, 8, 3, padding=1), T.Conv1d(8, 8, 3, padding=1)), SQUARE),
    "conv2d": (lambda: (M.Conv2d(6, 8, 3, stride=2), T.Conv2d(6, 8, 3, stride=2)), IMAGE),
    "conv3d": (lambda: (M.Conv3d(6, 4, 2), T.Conv3d(6, 4, 2)), VOLUME),
    "conv_transpose1d": (lambda: (M.ConvTranspose1d(6, 8, 3), T.ConvTranspose1d(6, 8, 3)), SIGNAL),
    "conv_transpose2d": (lambda: (M.ConvTranspose2d(6, 8, 3), T.ConvTranspose2d(6, 8, 3)), IMAGE),
    "conv_transpose3d": (lambda: (M.ConvTranspose3d(6, 4, 2), T.ConvTranspose3d(6, 4, 2)), VOLUME),
    "batch norm [B, C]": (lambda: (M.BatchNorm(6), T.BatchNorm1d(6)), (9, 6)),
    "batch norm [B, C, L]": (lambda: (M.BatchNorm(6), T.BatchNorm1d(6)), SIGNAL),
    "batch norm, square": (lambda: (M.BatchNorm(8), T.BatchNorm1d(8)), SQUARE),
    "batch norm 2d": (lambda: (M.BatchNorm(6), T.BatchNorm2d(6)), IMAGE),
    "group norm of signals": (lambda: (M.GroupNorm(2, 6, pytorch_compatible=True), T.GroupNorm(2, 6)), SIGNAL),
    "group norm, square": (lambda: (M.GroupNorm(2, 8, pytorch_compatible=True), T.GroupNorm(2, 8)), SQUARE),
    "group norm of images": (lambda: (M.GroupNorm(3, 6, pytorch_compatible=True), T.GroupNorm(3, 6)), IMAGE),
    "instance norm 1d": (lambda: (M.InstanceNorm(6, affine=True), T.InstanceNorm1d(6, affine=True)), SIGNAL),
    "instance norm 2d": (lambda: (M.InstanceNorm(6), T.InstanceNorm2d(6)), IMAGE),
    "instance norm 3d": (lambda: (M.InstanceNorm(6), T.InstanceNorm3d(6)), VOLUME),
    "max pool 1d": (lambda: (M.MaxPool1d(3, 2), T.MaxPool1d(3, 2)), SIGNAL),
    "max pool 2d": (lambda: (M.MaxPool2d(2, 2), T.MaxPool2d(2, 2)), IMAGE),
    "max pool 3d": (lambda: (M.MaxPool3d(2, 2), T.MaxPool3d(2, 2)), VOLUME),
    "average pool 1d": (lambda: (M.AvgPool1d(3, 2), T.AvgPool1d(3, 2)), SIGNAL),
    "average pool 2d": (lambda: (M.AvgPool2d(2, 2), T.AvgPool2d(2, 2)), IMAGE),
    "average pool 3d": (lambda: (M.AvgPool3d(2, 2), T.AvgPool3d(2, 2)), VOLUME),
    "upsample nearest": (lambda: (M.Upsample(2, "nearest"), T.Upsample(scale_factor=2)), IMAGE),
    "upsample linear 1d": (lambda: (M.Upsample(2, "linear"), T.Upsample(scale_factor=2, mode="linear")), SIGNAL),
    "upsample bilinear": (
        lambda: (
            M.Upsample(2, "linear", align_corners=True),
            T.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        ),
        IMAGE,
    ),
    "prelu of signals": (lambda: (M.PReLU(6), T.PReLU(6)), SIGNAL),
    "relu of signals": (lambda: (M.ReLU(), T.ReLU(inplace=True)), SIGNAL),
}

SAME_AXES: dict[str, tuple[Callable[[], Twins], tuple[int, ...]]] = {
    "linear": (lambda: (M.Linear(16, 8), T.Linear(16, 8)), TOKENS),
    "linear of a square": (lambda: (M.Linear(7, 7), T.Linear(7, 7)), (4, 7, 7)),
    "layer norm": (lambda: (M.LayerNorm(16), T.LayerNorm(16)), TOKENS),
    "rms norm": (lambda: (M.RMSNorm(16), T.RMSNorm(16, eps=1e-5)), TOKENS),
    "softmax": (lambda: (M.Softmax(), T.Softmax(-1)), TOKENS),
    "gelu": (lambda: (M.GELU(), T.GELU()), TOKENS),
    "gelu tanh": (lambda: (M.GELU("tanh"), T.GELU("tanh")), TOKENS),
    "silu": (lambda: (M.SiLU(), T.SiLU()), TOKENS),
    "tanh": (lambda: (M.Tanh(), T.Tanh()), TOKENS),
    "sigmoid": (lambda: (M.Sigmoid(), T.Sigmoid()), TOKENS),
    "glu": (lambda: (M.GLU(), T.GLU()), TOKENS),
}


@pytest.mark.parametrize("name", CHANNELS_FIRST | SAME_AXES)
def test_correct_layers_pass(name: str) -> None:
    build, shape = (CHANNELS_FIRST | SAME_AXES)[name]
    report = check(build(), draw(*shape), same_axes=name in SAME_AXES)
    assert report.passed, report.verdict
    found = rows(report)
    assert not any(row.status == "less exact" for row in found)
    assert all(row.own_ratio is not None for row in found if row.path == "" and "output" in row.part)
    is_norm = name.startswith("batch norm")  # is compared in both modes
    assert [row.part for row in found].count("output") == 1 + is_norm


def test_embedding_and_bilinear() -> None:
    ours, theirs = M.Embedding(11, 8), T.Embedding(11, 8)
    copy_weights(theirs, ours)
    assert compare(ours, theirs, np.arange(10, dtype=np.int32).reshape(2, 5), stages=STAGES).passed
    ours, theirs = M.Bilinear(4, 5, 6), T.Bilinear(4, 5, 6)
    copy_weights(theirs, ours)
    assert compare(ours, theirs, (draw(7, 4), draw(7, 5)), stages=STAGES).passed


def test_attention() -> None:
    """The layers have other parameters and return other values; output and input gradient are compared."""
    ours, theirs = M.MultiHeadAttention(16, 4, bias=True), T.MultiheadAttention(16, 4, batch_first=True)
    weight, bias = theirs.in_proj_weight.detach().numpy(), draw(48)
    theirs.in_proj_bias.data = torch.from_numpy(bias)
    for index, layer in enumerate((ours.query_proj, ours.key_proj, ours.value_proj)):
        layer.weight, layer.bias = (mx.array(a[16 * index : 16 * (index + 1)]) for a in (weight, bias))
    ours.out_proj.weight = mx.array(theirs.out_proj.weight.detach().numpy())
    ours.out_proj.bias = mx.array(theirs.out_proj.bias.detach().numpy())
    x = draw(3, 5, 16)
    report = compare(Attention(ours), TorchAttention(theirs), x, stages=STAGES)
    assert report.passed, report.verdict


def test_recurrent_layers() -> None:
    """PyTorch's two biases per gate are added for MLX; the GRU's n gate has a second one in both."""
    x = draw(3, 5, 6)
    for ours, theirs in (
        (M.LSTM(6, 4), T.LSTM(6, 4, batch_first=True)),
        (M.GRU(6, 4), T.GRU(6, 4, batch_first=True)),
        (M.RNN(6, 4), T.RNN(6, 4, batch_first=True)),
    ):
        weights = {name: parameter.detach().numpy() for name, parameter in theirs.named_parameters()}
        first, second = weights["bias_ih_l0"].copy(), weights["bias_hh_l0"].copy()
        if isinstance(ours, M.GRU):
            ours.bhn = mx.array(second[8:])
            second[8:] = 0
        names = ("Wxh", "Whh") if isinstance(ours, M.RNN) else ("Wx", "Wh")
        for name, value in zip(names, (weights["weight_ih_l0"], weights["weight_hh_l0"]), strict=True):
            ours[name] = mx.array(value)
        ours["b" if isinstance(ours, M.GRU) else "bias"] = mx.array(first + second)
        report = compare(ours, theirs, x, stages=STAGES)
        assert report.passed, report.verdict
        assert {row.path for row in rows(report, "forward")} == {""}


class Attention(M.Module):
    def __init__(self, attention: M.MultiHeadAttention) -> None:
        super().__init__()
        self.attention = attention

    def __call__(self, x: mx.array) -> mx.array:
        return self.attention(x, x, x)


class TorchAttention(T.Module):
    def __init__(self, attention: T.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


# ---- users' own modules -------------------------------------------------------------------------------------


class Net(M.Module):
    """Layers, and a function that calls them."""

    def __init__(self, call: Callable[..., mx.array], **layers: M.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, x: mx.array) -> mx.array:
        return self.call(self, x)


class TorchNet(T.Module):
    def __init__(self, call: Callable[..., torch.Tensor], **layers: T.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, x)


def signal_net(call: Callable[..., mx.array], **layers: M.Module) -> Twins:
    """Returns a twin of convolutions over 8 channels and 8 positions."""
    ours = {
        "first": M.Conv1d(8, 8, 3, padding=1),
        "act": M.GELU(),
        "norm": M.GroupNorm(2, 8, pytorch_compatible=True),
        "last": M.Conv1d(8, 8, 3, padding=1),
        **layers,
    }
    theirs = TorchNet(
        lambda m, x: m.last(m.norm(m.act(m.first(x)))),
        first=T.Conv1d(8, 8, 3, padding=1),
        act=T.GELU(),
        norm=T.GroupNorm(2, 8),
        last=T.Conv1d(8, 8, 3, padding=1),
    )
    return Net(call, **ours), theirs


def test_a_net_of_square_signals() -> None:
    report = check(signal_net(lambda m, x: m.last(m.norm(m.act(m.first(x))))), draw(*SQUARE))
    assert report.passed, report.verdict
    assert [row.path for row in rows(report, "forward")] == ["", "first", "act", "norm", "last"]


@pytest.mark.usefixtures("few_samples")
def test_a_layer_that_receives_the_wrong_axes() -> None:
    """The shapes fit, because there are as many channels as positions."""
    report = check(signal_net(lambda m, x: m.last(m.norm(mx.swapaxes(m.act(m.first(x)), 1, 2)))), draw(*SQUARE))
    assert report.culprit == "" and report.where == "between act and norm"


@pytest.mark.usefixtures("few_samples")
def test_wrong_padding_is_a_row_and_not_a_crash() -> None:
    twins = signal_net(lambda m, x: m.last(m.norm(m.act(m.first(x)))), first=M.Conv1d(8, 8, 3, padding=0))
    report = check(twins, draw(*SQUARE))
    assert report.culprit == "first"
    assert is_one_line(report.verdict, "first", "[3, 6, 8]", "padding is 0 in a")


@pytest.mark.usefixtures("few_samples")
def test_padding_on_one_side_only() -> None:
    """The shape is right, the values are not."""

    def call(m: Any, x: mx.array) -> mx.array:
        return m.last(m.norm(m.act(m.first(mx.pad(x, [(0, 0), (2, 0), (0, 0)])))))

    for seed in (0, 8, 15):  # with the last two, chance makes wrong axes nearer
        torch.manual_seed(seed)
        twins = signal_net(call, first=M.Conv1d(8, 8, 3, padding=0))
        report = check(twins, draw(*SQUARE))
        assert report.culprit == "" and report.where == "before first"


def image_net(call: Callable[..., mx.array], size: int = 6) -> Twins:
    theirs = TorchNet(
        lambda m, x: m.head(torch.relu(m.conv(x)).flatten(1)),
        conv=T.Conv2d(3, 4, 3, padding=1),
        head=T.Linear(4 * size * size, 5),
    )
    return Net(call, conv=M.Conv2d(3, 4, 3, padding=1), head=M.Linear(4 * size * size, 5)), theirs


@pytest.mark.usefixtures("few_samples")
def test_flattened_images() -> None:
    x = draw(2, 3, 6, 6)
    correct = image_net(lambda m, x: m.head(mx.moveaxis(M.relu(m.conv(x)), -1, 1).flatten(1)))
    assert check(correct, x).passed
    report = check(image_net(lambda m, x: m.head(M.relu(m.conv(x)).flatten(1))), x)
    assert report.culprit == "" and report.where == "between conv and head"
    assert "mx.moveaxis(x, -1, 1).flatten(1)" in report.cause
    assert is_one_line(report.verdict, "head", "moveaxis")


@pytest.mark.usefixtures("few_samples")
def test_height_and_width_exchanged() -> None:
    twins = image_net(lambda m, x: m.head(mx.moveaxis(M.relu(m.conv(x.transpose(0, 2, 1, 3))), -1, 1).flatten(1)))
    report = check(twins, draw(2, 3, 6, 6))
    assert report.culprit == "" and report.where == "before conv"


def heads(call: Callable[..., mx.array]) -> Twins:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q = m.project(x).unflatten(-1, (4, 4)).transpose(1, 2)
        return m.out(T.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))

    theirs = TorchNet(forward, project=T.Linear(16, 16), out=T.Linear(16, 16))
    return Net(call, project=M.Linear(16, 16), out=M.Linear(16, 16)), theirs


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_missing_transposition_between_heads(is_wrong: bool) -> None:
    """As many heads as tokens: the shapes fit."""

    def call(m: Any, x: mx.array) -> mx.array:
        q = mx.unflatten(m.project(x), -1, (4, 4)).transpose(0, 2, 1, 3)
        mixed = mx.fast.scaled_dot_product_attention(q, q, q, scale=0.5)
        return m.out(mx.flatten(mixed if is_wrong else mixed.transpose(0, 2, 1, 3), 2))

    report = check(heads(call), draw(3, 4, 16), same_axes=True)
    assert report.passed is not is_wrong
    assert not is_wrong or (report.culprit, report.where) == ("", "between project and out")


@pytest.mark.usefixtures("few_samples")
def test_a_function_that_fails_on_equal_inputs_is_a_row() -> None:
    """The MLX module accepts its own input only, as one that checks a property of the data would."""

    def call(m: Any, x: mx.array) -> mx.array:
        if x.max().item() < 100:
            raise ValueError("too small")
        return m.head(x)

    class Large(M.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(call, head=M.Linear(4, 4))

        def __call__(self, x: mx.array) -> mx.array:
            return self.net(x + 1000)

    class Small(T.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TorchNet(lambda m, x: m.head(x), head=T.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    report = check((Large(), Small()), draw(3, 4))
    assert report.culprit == "" and report.where == "before net"
    found = {row.path: row for row in rows(report, "forward")}
    assert found["net"].status == "differs" and "too small" in found["net"].note


# ---- sums ---------------------------------------------------------------------------------------------------


class WithoutAffine(M.BatchNorm):
    def __call__(self, x: mx.array) -> mx.array:
        mean, var = self._calc_stats(x)
        return (x - mean) * mx.rsqrt(var + self.eps)


class Unbiased(M.BatchNorm):
    def __call__(self, x: mx.array) -> mx.array:
        mean, var = self._calc_stats(x, ddof=1)
        return self.weight * (x - mean) * mx.rsqrt(var + self.eps) + self.bias


def norms(layer: M.BatchNorm) -> Twins:
    theirs = T.BatchNorm2d(2)
    theirs.weight.data, theirs.bias.data = (torch.from_numpy(1 + draw(2, seed=seed) / 4) for seed in (1, 2))
    return layer, theirs


MANY = (32, 2, 16, 16)  # 8192 values per channel


def less_exact(report: Report) -> list[str]:
    return [row.part for row in rows(report) if row.status == "less exact"]


def test_sums_of_a_plain_batch_norm_are_less_exact() -> None:
    report = check(norms(M.BatchNorm(2)), draw(*MANY))
    assert report.passed, report.verdict
    assert "output" in less_exact(report) and all(row.own_ratio < 8 for row in rows(report) if row.own_ratio)
    assert "less exact" in str(report)
    assert "less exact" in json.dumps(report.as_dict()["stages"])


SUMMED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "batch norm": lambda x: T.functional.batch_norm(x, None, None, training=True),
    "group norm": lambda x: T.functional.group_norm(x, 1),
    "instance norm": lambda x: T.functional.instance_norm(x),
    "layer norm": lambda x: T.functional.layer_norm(x, x.shape[1:]),
    "var": lambda x: x.var(2, unbiased=False),
    "var_mean": lambda x: torch.var_mean(x, (1, 2), unbiased=False)[0],
    "std": lambda x: x.std(),
    "mean": lambda x: x.mean(1),
    "norm": lambda x: x.norm(dim=-1),
}


@pytest.mark.parametrize("name", SUMMED)
def test_sums_term_by_term_are_less_exact_in_each_function(name: str) -> None:
    x = torch.from_numpy(draw(4, 160, 160))
    exact = SUMMED[name](x.double())
    with summing_in_order():
        summed = SUMMED[name](x)
    errors = [float((found - exact).square().mean()) for found in (SUMMED[name](x), summed)]
    assert summed.dtype == torch.float32 and summed.shape == exact.shape
    assert 2 * errors[0] ** 0.5 < errors[1] ** 0.5 < 1e-4


def test_each_sample_sums_in_another_order() -> None:
    """The roundings of a long sum hardly depend on its terms, so that equal orders have equal errors."""
    x = torch.from_numpy(draw(100_000))
    sums = []
    for sample in range(4):
        with summing_in_order(sample):
            sums.append(float(x.sum()))
    assert len(set(sums)) > 2 and max(sums) - min(sums) < 1e-2


def test_products_with_few_results_of_many_terms_are_sums_too() -> None:
    """As the weight gradient of a layer of 3 features over 50,000 positions: a BLAS may sum it term by term."""
    x, few = torch.from_numpy(draw(50_000, 3)), torch.from_numpy(draw(3, 50_000))
    exact, found = few.double() @ x.double(), []
    short = few[:, :100] @ x[:100]
    for sample in range(3):
        with summing_in_order(sample):
            found.append(few @ x)
            assert torch.equal(few[:, :100] @ x[:100], short)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    for product in found:
        np.testing.assert_allclose(product, exact, rtol=1e-4, atol=0.02)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"])
def test_gradients_of_convolutions_by_few_weights_are_sums_too(name: str) -> None:
    """PyTorch takes them image by image, or term by term as MLX does: that depends on strides and the processor."""
    count, function = int(name[-2]), getattr(torch.nn.functional, name)
    x = torch.from_numpy(draw(3, 4, *[9] * (count - 1), 200))
    channels = (4, 3) if "transpose" in name else (6, 2)
    weight = torch.from_numpy(draw(*channels, *[2] * count, seed=1)).requires_grad_()
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    cotangent = torch.from_numpy(draw(*function(x, weight, **options).shape, seed=2))

    def gradient(dtype: torch.dtype) -> np.ndarray:
        y = function(x.to(dtype), weight.to(dtype), **options)
        return torch.autograd.grad(y, weight, cotangent.to(dtype))[0].numpy()

    found = []
    for sample in range(2):
        with summing_in_order(sample):
            found.append(gradient(torch.float32))
    assert not np.array_equal(*found)
    for array in found:
        np.testing.assert_allclose(array, gradient(torch.float64), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_linear_layer_of_few_features_over_many_is_a_sum_too(rank: int) -> None:
    layer, x = torch.nn.Linear(20_000, 3), torch.from_numpy(draw(*[2] * (rank - 1), 20_000))
    found = []
    for sample in range(2):
        with summing_in_order(sample):
            found.append(layer(x).detach().numpy())
    assert not np.array_equal(*found)
    for array in found:
        exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        np.testing.assert_allclose(array, exact.detach(), rtol=1e-4, atol=1e-4)


def test_sums_of_a_plain_group_norm_are_less_exact() -> None:
    x = draw(1, 4, 60, 60, seed=16)  # one mean and variance only: a single draw of the error
    report = check((M.GroupNorm(1, 4, pytorch_compatible=True), T.GroupNorm(1, 4)), x)
    assert report.passed and "output" in less_exact(report), report.verdict
    report = check((M.GroupNorm(1, 4, eps=2e-5, pytorch_compatible=True), T.GroupNorm(1, 4)), x / 4)
    assert report.culprit == ""


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("layer", [lambda: M.BatchNorm(2, eps=1e-3), lambda: WithoutAffine(2), lambda: Unbiased(2)])
def test_a_wrong_batch_norm_is_found_in_spite_of_its_sums(layer: Callable[[], M.BatchNorm]) -> None:
    report = check(norms(layer()), draw(*MANY))
    assert report.culprit == "" and report.failed_stage is not None and report.failed_stage.name == "forward"


@pytest.mark.usefixtures("few_samples")
def test_icenets_own_layers_do_not_need_the_noise_of_sums() -> None:
    report = check((own.BatchNorm2d(2), their_own.BatchNorm2d(2)), 1 + draw(*MANY))
    assert report.passed and not less_exact(report)


def test_a_comparison_leaves_the_modules_unchanged() -> None:
    """Running statistics and PyTorch's counters of batches too, in one and three dimensions."""
    ours = M.Sequential(M.BatchNorm(6), M.Conv1d(6, 6, 1))
    theirs = T.Sequential(T.BatchNorm1d(6), T.Conv1d(6, 6, 1))
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    assert check((ours, theirs), draw(*SIGNAL)).passed
    assert same_bits(get_weights(ours), get_weights(theirs))
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())
    volumes = T.BatchNorm3d(6).train()
    with their_own.norm.keep_buffers(volumes):
        volumes(torch.from_numpy(draw(*VOLUME)))
        assert volumes.num_batches_tracked == 1 and volumes.running_mean.any()
    assert volumes.num_batches_tracked == 0 and not volumes.running_mean.any()


def test_pooling_layers_are_compared_in_training_mode() -> None:
    """They hold functions of MLX, which cannot be copied."""
    twins = M.Sequential(M.MaxPool2d(2), M.BatchNorm(6)), T.Sequential(T.MaxPool2d(2), T.BatchNorm2d(6))
    assert check(twins, draw(2, 6, 8, 8)).passed


def test_what_is_no_module() -> None:
    with pytest.raises(UsageError):
        compare("net", T.Linear(2, 2), draw(1, 2))


# ---- ties and edges -----------------------------------------------------------------------------------------


class Scaled(M.Module):
    """A layer whose backward pass is wrong by 5 %, at each point."""

    def __init__(self, layer: M.Module) -> None:
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        y = self.layer(x)
        return 1.05 * y - mx.stop_gradient(0.05 * y)


def with_ties(*shape: int) -> np.ndarray:
    """Returns values behind a ReLU that is clipped at 1: many are 0, and many are 1."""
    return np.clip(draw(*shape), 0, 1)


AT_TIES: dict[str, Callable[[], Twins]] = {
    "max pool 1d": lambda: (M.MaxPool1d(3, 2), T.MaxPool1d(3, 2)),
    "max pool 2d": lambda: (M.MaxPool2d(2), T.MaxPool2d(2)),
    "max pool 3d": lambda: (M.MaxPool3d(2), T.MaxPool3d(2)),
    "maximum over positions": lambda: (Net(lambda m, x: x.max(axis=1)), TorchNet(lambda m, x: x.max(dim=2).values)),
    "relu": lambda: (M.ReLU(), T.ReLU()),
    "leaky relu": lambda: (M.LeakyReLU(), T.LeakyReLU()),
    "absolute value": lambda: (Net(lambda m, x: mx.abs(x)), TorchNet(lambda m, x: x.abs())),
    "clip": lambda: (Net(lambda m, x: mx.clip(x, 0, 1)), TorchNet(lambda m, x: x.clip(0, 1))),
    "maximum": lambda: (Net(lambda m, x: mx.maximum(x, 0)), TorchNet(lambda m, x: x.maximum(torch.zeros_like(x)))),
}


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("name", AT_TIES)
def test_subgradients_at_ties_and_edges(name: str) -> None:
    """Each framework may choose its own. A wrong gradient elsewhere is found."""
    x = with_ties(*(VOLUME if name == "max pool 3d" else SIGNAL if "1d" in name or "positions" in name else IMAGE))
    report = check(AT_TIES[name](), x)
    assert report.passed, report.verdict
    ours, theirs = AT_TIES[name]()
    report = check((Scaled(ours), TorchNet(lambda m, x: theirs(x))), x)
    assert report.culprit == "" and is_one_line(report.verdict, "gradient", "(gradients, 8 are allowed)")


def with_gradient(function: Callable[..., mx.array], vjp: Callable[..., Any]) -> Any:
    """Returns a function with another gradient."""
    wrapped = mx.custom_function(function)
    wrapped.vjp(vjp)
    return wrapped


def windows(x: mx.array) -> mx.array:
    """Returns the values of each window of 2x2: `[B, H / 2, W / 2, 4, C]`."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4, c)


def both_maxima(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent[:, :, :, None] * (x == y[:, :, :, None])


def no_maximum(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    """Each of two equal maxima has a neighbour that is not smaller."""
    is_only = mx.sum(x == y[:, :, :, None], axis=3, keepdims=True) == 1
    return cotangent[:, :, :, None] * ((x == y[:, :, :, None]) & is_only)


def pooling(vjp: Callable[..., mx.array]) -> Callable[[], Twins]:
    call = with_gradient(lambda x: x.max(axis=3), vjp)
    return lambda: (Net(lambda m, x: call(windows(x))), T.MaxPool2d(2))


def pair(vjp: Callable[..., Any]) -> Callable[[], Twins]:
    """Returns the maximum of each value and its neighbour in the next channel."""
    call = with_gradient(lambda a, b: mx.maximum(a, b), vjp)
    theirs = TorchNet(lambda m, x: torch.maximum(x[:, ::2], x[:, 1::2]))
    return lambda: (Net(lambda m, x: call(x[..., ::2], x[..., 1::2])), theirs)


def clipped(at_edge: float) -> Callable[[], Twins]:
    def vjp(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
        inner = (x > 0) & (x < 1)
        return cotangent * mx.where(inner, 1.0, mx.where((x == 0) | (x == 1), at_edge, 0.0))

    call = with_gradient(lambda x: mx.clip(x, 0, 1), vjp)
    return lambda: (Net(lambda m, x: call(x)), TorchNet(lambda m, x: x.clip(0, 1)))


def first_of_two(primals: Any, cotangent: mx.array, y: mx.array) -> Any:
    a, b = primals
    return cotangent * (a >= b), cotangent * (a < b)


def both_of_two(primals: Any, cotangent: mx.array, y: mx.array) -> Any:
    a, b = primals
    return cotangent * (a >= b), cotangent * (b >= a)


def none_of_two(primals: Any, cotangent: mx.array, y: mx.array) -> Any:
    a, b = primals
    return cotangent * (a > b), cotangent * (b > a)


WRONG_AT_TIES: dict[str, tuple[Callable[[], Twins], bool]] = {
    "each of equal maxima has the whole gradient": (pooling(both_maxima), True),
    "none of equal maxima has a gradient": (pooling(no_maximum), True),
    "maximum of two, the first": (pair(first_of_two), False),
    "maximum of two, both": (pair(both_of_two), True),
    "maximum of two, none": (pair(none_of_two), True),
    "clip, all of the gradient": (clipped(1.0), False),
    "clip, part of the gradient": (clipped(0.3), False),
    "clip, twice the gradient": (clipped(2.0), True),
    "clip, a negative gradient": (clipped(-0.1), True),
}


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("name", WRONG_AT_TIES)
def test_a_gradient_that_is_wrong_at_ties_only_is_found(name: str) -> None:
    """A valid choice passes, whatever it is."""
    twins, is_wrong = WRONG_AT_TIES[name]
    x = np.round(with_ties(*IMAGE[:2], 8, 8) * 4) / 4  # equal values that are not zeros of a ReLU, too
    report = check(twins(), x)
    assert report.passed is not is_wrong, report.verdict
    assert not is_wrong or is_one_line(report.verdict, "gradient of the input", "at ties")
    assert check(twins(), draw(*IMAGE[:2], 8, 8)).passed


@pytest.mark.usefixtures("few_samples")
def test_a_smooth_layer_with_equal_inputs_has_no_ties() -> None:
    """Its gradient differs by its sums, not by a choice."""
    x = np.round(2 * draw(*MANY)) / 2
    report = check(norms(M.BatchNorm(2)), x)
    assert report.passed and "ties" not in str(report)
    ours, theirs = norms(M.BatchNorm(2))
    report = check((Scaled(ours), TorchNet(lambda m, x: m.layer(x), layer=theirs)), x)
    assert not report.passed and "ties" not in str(report)


def test_max_pooling_behind_a_relu() -> None:
    ours = M.Sequential(M.Conv2d(6, 4, 3), M.ReLU(), M.MaxPool2d(2))
    report = check((ours, T.Sequential(T.Conv2d(6, 4, 3), T.ReLU(), T.MaxPool2d(2))), draw(2, 6, 8, 8))
    assert report.passed, report.verdict
    remarks = {module.path: module.notes for module in report.modules if module.notes}
    assert list(remarks) == ["2"] and "MLX divides it among equal maxima" in remarks["2"][0]
    assert "MLX divides it among equal maxima" in str(report)


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("is_plain", [True, False])
def test_gradients_that_differ_at_ties_name_the_cause(is_plain: bool) -> None:
    """A weight per position: which of equal maxima gets the gradient matters. IceNet's pooling chooses as PyTorch.

    Both choices are right, so the comparison passes; a note says why the gradients differ.
    """

    def pool(m: Any, x: mx.array) -> mx.array:
        return m.pool(x) if is_plain else own.max_pool(x, 2, 2, 0)

    def their_pool(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.pool(x) if is_plain else their_own.max_pool(x, 2, 2, 0)

    ours = Net(lambda m, x: pool(m, mx.maximum(x, 0) + m.gain - mx.stop_gradient(m.gain)), pool=M.MaxPool2d(2))
    theirs = TorchNet(
        lambda m, x: their_pool(m, x.relu() + (m.gain - m.gain.detach()).movedim(-1, 0)), pool=T.MaxPool2d(2)
    )
    ours.gain, theirs.gain = mx.ones((8, 8, 1)), T.Parameter(torch.ones(8, 8, 1))
    report = check((ours, theirs), draw(2, 3, 8, 8))
    assert report.passed, report.verdict
    assert ("gradient of gain" in less_exact(report)) is is_plain
    assert ("(gain); possible cause: ties in pool" in str(report)) is is_plain
    assert ("max_pool of icenet.nn" in str(report)) is is_plain
