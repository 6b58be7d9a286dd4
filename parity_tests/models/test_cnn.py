"""The CNN on both backends: the guide's snippet, sizes, parity, running statistics, ResNets against an independent
implementation, and the layers whose frameworks differ (strides, pooling, batch norm, dropout of images)."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import icenet.blas

# isort: split
import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, PACKAGES, both_backends, build_model, is_one_line, losses, native, plain
from torch import nn

import icenet.nn
import icenet_torch.nn
from icenet.commands.convert import convert_model
from icenet.core import backends, rng
from icenet.core.config import CNNConfig, Config, ModelConfig, cnn_plan, presets
from icenet.core.errors import ConfigError, UsageError
from icenet.core.runs import checkpoint
from icenet.core.training.trainer import Trainer
from icenet.core.weights import files as weight_files
from icenet.parity.configuration.engines import build, record
from icenet.parity.configuration.run import compare_engines, curves, random_batch, unequal
from icenet.parity.curves import judge_curve
from icenet.parity.yardstick import FACTOR, judge

BASE = {
    "type": "cnn",
    "base_channels": 8,
    "num_layers": 4,
    "hidden_size": 24,
    "vocab_size": 11,
    "dropout": 0.1,
}
RESNET = {"stem": "conv7", "classifier": "linear", "dropout": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "alternating, dropout": {},
    "no dropout": {"dropout": 0.0},
    "conv blocks, gelu": {"block": "conv", "num_layers": 3, "activation": "gelu"},
    "basic blocks, silu, grey": {"block": "basic", "num_layers": 5, "activation": "silu", "image_channels": 1},
    "bottlenecks, large stem": {
        "block": "bottleneck",
        "stem": "conv7",
        "num_layers": 3,
        "stage_depths": [1, 2],
        "stage_widths": [4, 6],
    },
    "as ResNet-18": {
        **RESNET,
        "block": "basic",
        "num_layers": 8,
        "stage_depths": [2, 2, 2, 2],
        "hidden_size": 64,
    },
    "as ResNet-50": {
        **RESNET,
        "block": "bottleneck",
        "num_layers": 5,
        "stage_depths": [2, 1, 1, 1],
        "hidden_size": 256,
    },
    "one layer, gelu_tanh, odd widths": {"num_layers": 1, "base_channels": 5, "activation": "gelu_tanh"},
}


def config(seed: int = 7, training: dict[str, Any] | None = None, **model: Any) -> Config:
    return Config.from_dict({"seed": seed, "device": "cpu", "model": {**BASE, **model}, "training": training or {}})


def digits(*overrides: str) -> Config:
    return Config.from_yaml("cnn-digits", ["device=cpu", *overrides])


def model_of(backend: str, seed: int | None = 3, **changes: Any) -> Any:
    """Returns a model in evaluation mode."""
    return build_model(backend, ModelConfig(**{**BASE, **changes}), seed)


def native_images(backend: str, images: Any) -> Any:
    """Returns images `[B, H, W, C]` in the layout of a backend's models."""
    return native(backend, images, images=True)


def normal(*shape: int, name: str = "x") -> Any:
    return rng.normal(rng.key(0, "test", name), shape)


# ---- the guide --------------------------------------------------------------------------------------------

GUIDE = """
from icenet.models import CNNModel
from icenet.core.config import ModelConfig

config = ModelConfig(
    type="cnn",
    hidden_size=512,
    num_layers=5,
    vocab_size=1000,  # num_classes
)

model = CNNModel(config)

# Forward pass
logits = model(images)  # [batch, num_classes]

# Feature extraction
features = model.extract_features(images)  # [batch, hidden_size]
"""


def test_the_guides_snippet_as_printed() -> None:
    """On `icenet` and, with the package name replaced, on `icenet_torch`; images in the layout of each framework."""
    images, found = normal(2, 32, 32, 3), {}
    for backend, package in PACKAGES.items():
        scope: dict[str, Any] = {"images": native_images(backend, images)}
        exec(GUIDE.replace("icenet.", f"{package}."), scope)
        scope["model"].eval()
        for name, width in (("logits", 1000), ("features", 512)):
            assert type(scope[name]) is (mx.array if backend == "mlx" else torch.Tensor)
            assert tuple(scope[name].shape) == (2, width) and np.isfinite(plain(scope[name])).all()
        assert scope["model"].num_params == 5_087_144
        # the other model has updated its running statistics in training mode
        fresh = scope["CNNModel"](scope["config"])
        fresh.eval()
        found[backend] = plain(fresh(scope["images"]))
    np.testing.assert_allclose(found["mlx"], found["torch"], rtol=0, atol=2e-5 * np.abs(found["torch"]).max())


# ---- sizes ------------------------------------------------------------------------------------------------

PUBLISHED = {"resnet-18": 11_689_512, "resnet-34": 21_797_672, "resnet-50": 25_557_032}
"""torchvision's documentation of `resnet18`, `resnet34` and `resnet50`, for 1000 classes."""


@both_backends
@pytest.mark.parametrize("name", PUBLISHED)
def test_resnets_have_the_published_number_of_parameters(backend: str, name: str) -> None:
    model = backends.module(backend, "engine.build").meta_model(Config.from_yaml(name))
    assert model.num_params == PUBLISHED[name]
    assert model.memory("fp16") == 2 * PUBLISHED[name]  # running statistics are not parameters
    assert sum(model.part_sizes().values()) == PUBLISHED[name]


def expected_parameters(config: CNNConfig) -> int:
    """Returns the number by hand: a k x k convolution has k * k * in * out weights, its norm 2 * out."""

    def conv(inputs: int, outputs: int, size: int) -> int:
        return size * size * inputs * outputs + 2 * outputs

    total = conv(config.image_channels, config.base_channels, 7 if config.stem == "conv7" else 3)
    for kind, inputs, outputs, stride in cnn_plan.blocks(config):
        if kind == "conv":
            total += conv(inputs, outputs, 3)
            continue
        if kind == "basic":
            total += conv(inputs, outputs, 3) + conv(outputs, outputs, 3)
        else:
            inner = outputs // 4
            total += conv(inputs, inner, 1) + conv(inner, inner, 3) + conv(inner, outputs, 1)
        total += conv(inputs, outputs, 1) if inputs != outputs or stride != 1 else 0
    last = cnn_plan.blocks(config)[-1].outputs
    if config.classifier == "hidden":
        total += (last + 1) * config.hidden_size
    return total + (config.hidden_size + 1) * config.vocab_size


@both_backends
@pytest.mark.parametrize("name", CASES)
def test_sizes(backend: str, name: str) -> None:
    model = model_of(backend, seed=None, **CASES[name])
    assert model.num_params == expected_parameters(model.config)


@pytest.mark.parametrize(("name", "classes"), [("cnn-small", 1000), ("cnn-medium", 1000), ("cnn-large", 1000)])
def test_presets_match_the_guide(name: str, classes: int) -> None:
    given = Config.from_yaml(name).model
    parameters, memory = presets.GUIDE[name]
    model = backends.module("torch", "engine.build").meta_model(Config.from_yaml(name))
    assert given.vocab_size == classes
    assert 0.92 * parameters < model.num_params <= parameters and model.memory("fp16") <= memory


def test_the_blocks_of_each_stage() -> None:
    assert [cnn_plan.depths(CNNConfig(num_layers=n)) for n in (1, 3, 4, 5, 6, 8)] == [
        [1], [1, 1, 1], [1, 1, 1, 1], [2, 1, 1, 1], [2, 2, 1, 1], [3, 3, 1, 1],
    ]  # fmt: skip
    for count in range(1, 12):
        blocks = cnn_plan.blocks(CNNConfig(num_layers=count))
        assert len(blocks) == count and blocks[-1].kind == "basic"
        assert all(a.outputs == b.inputs and a.kind != b.kind for a, b in pairwise(blocks))
        assert [b.stride for b in blocks].count(2) == min(count, 4) - 1
        assert all(b.outputs == b.inputs * b.stride for b in blocks)
    bottlenecks = cnn_plan.blocks(CNNConfig(block="bottleneck", num_layers=2, stage_depths=[2], stage_widths=[3]))
    assert bottlenecks == [("bottleneck", 64, 12, 1), ("bottleneck", 12, 12, 1)]


@both_backends
def test_any_size_that_the_strides_allow(backend: str) -> None:
    for changes, least in (({}, 5), ({"num_layers": 1}, 1), ({"stem": "conv7"}, 17)):
        model = model_of(backend, **changes)
        assert cnn_plan.min_image_size(model.config) == least
        for height, width in ((least, least), (least + 1, least + 6), (2 * least + 3, least)):
            logits = plain(model(native_images(backend, normal(2, height, width, 3))))
            assert logits.shape == (2, 11) and np.isfinite(logits).all()
        if least > 1:
            with pytest.raises(UsageError) as caught:
                model(native_images(backend, normal(2, least - 1, 40, 3)))
            assert is_one_line(caught.value, f"{least - 1}x40", f"{least}x{least}")


@both_backends
def test_images_that_do_not_fit(backend: str) -> None:
    model = model_of(backend)
    layout = "[batch, height, width, channels]" if backend == "mlx" else "[batch, channels, height, width]"
    training = model_of(backend, num_layers=2)
    training.train()
    cases = [
        (lambda: model(native_images(backend, normal(2, 8, 8, 4))), ("4 channels", "model.image_channels", layout)),
        (lambda: model(native(backend, np.zeros((8, 8, 3), np.float32))), (layout, "[8, 8, 3]")),
        (lambda: model.generate([[1, 2]]), ("cnn", "images", "icenet predict")),
        (lambda: training(native_images(backend, normal(1, 2, 2, 3))), ("batch norm", "training.batch_size")),
    ]
    for call, names in cases:
        with pytest.raises(UsageError) as caught:
            call()
        assert is_one_line(caught.value, *names)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"stage_depths": [2, 2]}, ("stage_depths [2, 2]", "num_layers is 5", "num_layers to 4")),
        ({"stage_depths": [], "num_layers": 1}, ("stage_depths", "empty")),
        ({"stage_widths": [8, 16]}, ("stage_widths [8, 16]", "stage_depths [2, 1, 1, 1]")),
        ({"classifier": "linear"}, ("hidden_size 24", "64")),
        ({"block": "dense"}, ("model.block", "'alternating', 'conv', 'basic' or 'bottleneck'", "'dense'")),
        ({"base_chanels": 8}, ("model.base_chanels", "base_channels")),
    ],
)
def test_contradictory_configurations(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({"model": {**BASE, "num_layers": 5, **changes}})
    assert is_one_line(caught.value, *names)


# ---- parity -----------------------------------------------------------------------------------------------


def judged(given: Config, dtype: str = "fp32") -> None:
    engines = build(given, dtype)
    before = engines.mlx.weights()
    report = compare_engines(engines, random_batch(given), step=2)
    assert report.unequal_weights == []
    assert report.passed, report.verdict()
    assert "layers, training" in [section.title for section in report.sections]
    parameters = {row.path for row in report.sections[-2].rows if row.kind == "gradient"}
    assert parameters == engines.torch.model.trainable_paths()  # every parameter has a gradient
    for engine in engines[:2]:
        assert unequal(engine.weights(), before) == []  # running statistics included


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "as ResNet-18" else name for name in CASES]
)
def test_fp32(name: str) -> None:
    judged(config(**CASES[name]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("conv blocks, gelu", "bf16"),
        ("conv blocks, gelu", "fp16"),
        ("basic blocks, silu, grey", "bf16"),
        pytest.param("basic blocks, silu, grey", "fp16", marks=pytest.mark.slow),
    ],
)
def test_half_precision(name: str, dtype: str) -> None:
    """With smooth activations: a ReLU whose input is rounded to the other side of zero differs by more than noise."""
    judged(config(**CASES[name]), dtype)


@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_initial_weights_are_equal_bit_for_bit(seed: int) -> None:
    engines = build(config(seed=seed))
    ours = engines.mlx.weights()
    assert unequal(ours, engines.torch.weights()) == []
    for path, array in ours.items():
        if path.endswith("conv.weight"):  # He's rule
            assert abs(array.std() / math.sqrt(2 / math.prod(array.shape[1:])) - 1) < 6 / math.sqrt(array.size)
        elif "norm" in path:
            assert (array == (1 if path.endswith(("weight", "var")) else 0)).all()


def test_ten_training_steps_agree_and_so_do_the_running_statistics() -> None:
    given = digits("training.learning_rate=1e-3")
    engines = build(given)
    assert curves(engines, 10)
    ours, theirs, exact = (engine.weights() for engine in engines)
    assert sum(path.endswith("running_var") for path in exact) == 7
    for path, truth in exact.items():
        verdict = judge(ours[path], theirs[path], truth)
        assert verdict.passed, f"{path}: {verdict.ratio}"
        if path.endswith("running_var"):
            assert np.abs(truth - 1).min() > 1e-3  # they have changed


def test_a_short_training_curve() -> None:
    found = curves(build(digits()), 30)
    assert found["PyTorch float64"][-1] < found["PyTorch float64"][0] - 0.5  # it has learned
    verdict = judge_curve(*found.values())
    assert verdict.passed, f"{verdict.worst} at step {verdict.worst_step}"


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["model.dropout=0.0", "model.block=basic"], ["seed=5"]])
def test_a_training_curve_of_200_steps(overrides: list[str]) -> None:
    verdict = judge_curve(*curves(build(digits(*overrides)), 200).values())
    assert verdict.passed, f"{verdict.worst} at step {verdict.worst_step}"


# ---- ResNet against an independent implementation ------------------------------------------------------------


class PlainBlock(nn.Module):
    """A block of He et al. (2015), figure 5 and table 1, in plain torch.nn."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        if not bottleneck:
            sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, padding=k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        outputs = sizes[-1][1]
        self.projection = None
        if stride != 1 or inputs != outputs:
            self.projection = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if index < len(self.convs) - 1:
                y = y.relu()
        return (y + (x if self.projection is None else self.projection(x))).relu()


class PlainResNet(nn.Module):
    def __init__(self, depths: list[int], widths: list[int], bottleneck: bool, classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        blocks, inputs = [], 64
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for index in range(depth):
                blocks.append(PlainBlock(inputs, width, 2 if stage and not index else 1, bottleneck))
                inputs = width * (4 if bottleneck else 1)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.norm(self.conv(x)).relu(), 3, 2, 1)
        return self.fc(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


def plain_name(path: str) -> str:
    """Returns the name of one of our parameters in `PlainResNet`."""
    parts = path.split(".")
    if parts[0] in ("stem", "output"):
        return ".".join(parts[1:]) if parts[0] == "stem" else f"fc.{parts[1]}"
    _, index, branch, *rest = parts
    if branch == "shortcut":
        return f"blocks.{index}.projection.{'0' if rest[0] == 'conv' else '1'}.{rest[1]}"
    return f"blocks.{index}.{rest[1]}s.{rest[0]}.{rest[2]}"


@pytest.mark.parametrize(("block", "depths"), [("basic", [2, 1, 2, 1]), ("bottleneck", [1, 2, 1, 1])])
def test_the_mirror_is_the_papers_resnet(block: str, depths: list[int]) -> None:
    """Logits, all gradients and the running statistics in float64, with the same weights."""
    widths = [16, 24, 32, 40]
    hidden = widths[-1] * (4 if block == "bottleneck" else 1)
    given = config(
        **RESNET, block=block, num_layers=sum(depths), stage_depths=depths, stage_widths=widths,
        base_channels=64, hidden_size=hidden,
    )  # fmt: skip
    ours = build(given).reference
    theirs = PlainResNet(depths, widths, block == "bottleneck", 11).double()
    values = {
        path: normal(*array.shape, name=path).astype(np.float64) / 5 + (1 if "norm.weight" in path else 0)
        for path, array in ours.weights().items()
    }
    values = {path: np.abs(a) + 0.5 if path.endswith("running_var") else a for path, a in values.items()}
    ours.set_weights(values)
    named = {plain_name(path): torch.from_numpy(array) for path, array in values.items()}
    missing = theirs.load_state_dict(named, strict=False)
    assert not missing.unexpected_keys and all("num_batches" in key for key in missing.missing_keys)

    batch = random_batch(given, rows=3)
    images = torch.from_numpy(batch["inputs"]).double().permute(0, 3, 1, 2)
    expected = theirs.eval()(images).detach().numpy()
    np.testing.assert_allclose(ours.forward(batch), expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    theirs.train()
    loss = F.cross_entropy(theirs(images), torch.from_numpy(batch["labels"]).long())
    loss.backward()
    found, gradients = ours.gradients(batch)
    assert found == pytest.approx(loss.item(), rel=1e-12)
    parameters = dict(theirs.named_parameters())
    for path, gradient in gradients.items():
        truth = parameters[plain_name(path)].grad.numpy()
        np.testing.assert_allclose(gradient, truth, rtol=0, atol=1e-10 * np.abs(truth).max(), err_msg=path)
    ours.read(ours.train_step(batch, 0, 1e-3))
    buffers = dict(theirs.named_buffers())
    for path, array in ours.weights().items():
        if path.endswith(("running_mean", "running_var")):
            truth = buffers[plain_name(path)].numpy()
            np.testing.assert_allclose(array, truth, rtol=1e-11, atol=1e-12, err_msg=path)


# ---- layers that differ -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (1, 2), (3, 2), (7, 2), (3, 3), (5, 2)])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12)])
def test_convolutions_and_their_gradients(kernel: int, stride: int, size: tuple[int, int]) -> None:
    """MLX, which rewrites strided convolutions on the CPU, against PyTorch in float64."""
    x, weight = normal(2, *size, 3), normal(4, kernel, kernel, 3, name="weight")
    leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, weight)]
    images, filters = leaves[0].permute(0, 3, 1, 2), leaves[1].permute(0, 3, 1, 2)
    truth = F.conv2d(images, filters, None, stride, kernel // 2).permute(0, 2, 3, 1)
    g = normal(*truth.shape, name="g")
    truth.backward(torch.from_numpy(g).double())
    with mx.stream(mx.cpu):
        output, gradients = mx.vjp(
            lambda x, w: icenet.nn.conv.conv2d(x, w, stride, kernel // 2),
            [mx.array(x), mx.array(weight)],
            [mx.array(g)],
        )
    for ours, theirs in zip([output[0], *gradients], [truth, *(leaf.grad for leaf in leaves)], strict=True):
        theirs = theirs.detach().numpy()
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(np.array(ours), theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def test_pytorchs_convolutions_on_a_cpu_are_never_channels_last() -> None:
    """In that format their gradients write past their buffer. Neither inputs nor dropout may introduce it."""
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    weight = torch.randn(8, 4, 1, 1)
    assert icenet_torch.nn.conv.conv2d(x, weight, 2, 0).is_contiguous()
    assert icenet_torch.nn.arrays.to_channels_first(torch.randn(2, 6, 6, 4)).is_contiguous()
    dropout = icenet_torch.nn.Dropout(0.5, images=True)
    outputs = []
    for given in (x, x.contiguous()):
        dropout.seed(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32))  # the next call has other keys
        outputs.append(dropout(given))
    assert outputs[0].is_contiguous(memory_format=torch.channels_last) and outputs[1].is_contiguous()
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("size", [(7, 7), (8, 5), (3, 3)])
def test_max_pooling_gives_the_gradient_to_the_first_maximum(size: tuple[int, int]) -> None:
    x = np.maximum(np.round(normal(2, *size, 4) * 1.5), 0).astype(np.float32)  # many ties
    leaf = torch.tensor(x, requires_grad=True)
    truth = F.max_pool2d(leaf.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    g = normal(*truth.shape, name="g")
    truth.backward(torch.from_numpy(g))
    output, gradients = mx.vjp(lambda x: icenet.nn.max_pool(x, 3, 2, 1), [mx.array(x)], [mx.array(g)])
    np.testing.assert_array_equal(np.array(output[0]), truth.detach().numpy())
    np.testing.assert_allclose(np.array(gradients[0]), leaf.grad.numpy(), rtol=1e-6, atol=1e-6)
    pool = mlx.nn.MaxPool2d(3, 2, 1)
    split = np.array(mx.vjp(pool, [mx.array(x)], [mx.array(g)])[1][0])
    # the reason for `max_pool`; a failure means that MLX has changed
    assert np.abs(split - leaf.grad.numpy()).max() > 0.1


def test_relu_has_no_gradient_at_zero() -> None:
    values = [-1.0, -0.0, 0.0, 1.0]
    leaf = torch.tensor(values, requires_grad=True)
    icenet_torch.nn.activation("relu", leaf).sum().backward()
    ours = mx.grad(lambda x: icenet.nn.activation("relu", x).sum())(mx.array(values))
    assert leaf.grad.tolist() == np.array(ours).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("package", "x"), [(icenet.nn, mx.ones(2)), (icenet_torch.nn, torch.ones(2))])
def test_an_unknown_activation_is_an_error(package: Any, x: Any) -> None:
    for call in (lambda: package.activation("swish", x), lambda: package.gated_activation("swish", x, x)):
        with pytest.raises(UsageError) as caught:
            call()
        assert is_one_line(str(caught.value), "swish", "silu")


@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (1, 1, 2, 3), (16, 32, 32, 4)])
def test_batch_norm_equals_pytorchs(shape: tuple[int, ...]) -> None:
    """Outputs, gradients and statistics of two steps, then evaluation; MLX is judged by the yardstick."""
    channels = shape[-1]
    inputs = [normal(*shape, name=f"x{step}") * 3 + 5 for step in range(2)]
    g = normal(*shape, name="g")

    def with_torch(layer: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        layer = layer.to(dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, channels))
            layer.bias.copy_(torch.linspace(-1, 1, channels))
        found = {}
        for step, array in enumerate(inputs):
            layer.zero_grad()
            leaf = torch.tensor(array, dtype=dtype, requires_grad=True)
            output = layer(leaf.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            output.backward(torch.tensor(g, dtype=dtype))
            found[f"output {step}"], found[f"input {step}"] = output.detach().numpy(), leaf.grad.numpy()
            for name in ("weight", "bias"):
                found[f"{name} {step}"] = getattr(layer, name).grad.numpy().copy()
        for name in ("running_mean", "running_var"):
            found[name] = getattr(layer, name).numpy()
        leaf = torch.tensor(inputs[0], dtype=dtype).permute(0, 3, 1, 2)
        found["evaluation"] = layer.eval()(leaf).permute(0, 2, 3, 1).detach().numpy()
        return found

    truth = with_torch(nn.BatchNorm2d(channels), torch.float64)
    mirror = with_torch(icenet_torch.nn.BatchNorm2d(channels), torch.float64)
    for name, value in truth.items():
        np.testing.assert_allclose(mirror[name], value, rtol=1e-12, atol=1e-12, err_msg=name)

    layer = icenet.nn.BatchNorm2d(channels)
    layer.weight, layer.bias = mx.linspace(0.5, 2, channels), mx.linspace(-1, 1, channels)
    found = {}

    def call(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        layer.weight, layer.bias = weight, bias
        return layer(x)

    weight, bias = layer.weight, layer.bias
    with mx.stream(mx.cpu):
        for step, array in enumerate(inputs):
            output, gradients = mx.vjp(call, [mx.array(array), weight, bias], [mx.array(g)])
            for name, value in zip(("output", "input", "weight", "bias"), [*output, *gradients], strict=True):
                found[f"{name} {step}"] = np.array(value)
        layer.weight, layer.bias = weight, bias
        found |= {name: np.array(getattr(layer, name)) for name in ("running_mean", "running_var")}
        layer.eval()
        found["evaluation"] = np.array(layer(mx.array(inputs[0])))
    noise = with_torch(icenet_torch.nn.BatchNorm2d(channels), torch.float32)
    for name, value in truth.items():
        verdict = judge(found[name], noise[name], value)
        assert verdict.ratio <= FACTOR, f"{name}: {verdict}"


def test_dropout_of_images_drops_the_same_values_on_both() -> None:
    x = np.abs(normal(3, 4, 5, 6)) + 1
    keys = rng.fold(rng.key(1, "mask")[None], np.arange(3))
    ours, theirs = icenet.nn.Dropout(0.4, images=True), icenet_torch.nn.Dropout(0.4, images=True)
    ours.seed(mx.array(keys))
    theirs.seed(torch.from_numpy(keys.view(np.int32).copy()))
    kept = np.array(ours(mx.array(x)))
    mirrored = theirs(native_images("torch", x)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(kept == 0, mirrored == 0)
    assert 0.2 < (kept == 0).mean() < 0.6
    theirs.images = False
    other = theirs(native_images("torch", x)).permute(0, 2, 3, 1).numpy()
    assert (kept == 0).tolist() != (other == 0).tolist()  # the order of axes matters


# ---- running statistics -------------------------------------------------------------------------------------


def running_statistics(weights: dict[str, Any]) -> dict[str, Any]:
    return {path: a.copy() for path, a in weights.items() if path.endswith(("running_mean", "running_var"))}


@both_backends
def test_only_training_changes_the_running_statistics(backend: str) -> None:
    engine = backends.engine(config(), backend)
    batch = random_batch(config())
    before = running_statistics(engine.weights())
    assert not any("num_batches_tracked" in path for path in engine.weights())
    engine.evaluate(batch)
    engine.forward(batch)
    engine.gradients(batch)
    record(engine, batch, train=True, gradients=True)
    assert unequal(running_statistics(engine.weights()), before) == []
    engine.read(engine.train_step(batch, 0, 1e-3))
    assert len(unequal(running_statistics(engine.weights()), before)) == len(before)
    assert not {path for path in engine.optimizer_state() if "running" in path}


@both_backends
def test_a_skipped_step_changes_nothing(backend: str) -> None:
    given = config(training={"mixed_precision": "fp16"})
    engine = backends.engine(given, backend)
    before = {path: array.copy() for path, array in engine.weights().items()}
    batch = random_batch(given)
    assert not engine.read(engine.train_step(batch, 0, 1e-3, loss_scale=2.0**40)).finite
    assert unequal(engine.weights(), before) == []
    assert engine.read(engine.train_step(batch, 0, 1e-3, loss_scale=1.0)).finite
    assert len(unequal(engine.weights(), before)) == len(before)


@both_backends
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(backend: str, dropout: float) -> None:
    """Equal gradients, and running statistics that are updated once although the blocks run twice."""
    found = []
    for checkpointing in (False, True):
        given = config(dropout=dropout, training={"gradient_checkpointing": checkpointing})
        engine = backends.engine(given, backend)
        gradients = engine.gradients(random_batch(given), 1)[1]
        for step in range(2):
            engine.read(engine.train_step(random_batch(given), step, 1e-3))
        found.append({**gradients, **running_statistics(engine.weights())})
    for path, array in found[0].items():
        np.testing.assert_allclose(found[1][path], array, rtol=1e-5, atol=1e-6 * np.abs(array).max(), err_msg=path)


@pytest.mark.slow
def test_compiled_training_on_mlx_is_the_same() -> None:
    found = []
    for compiled in (False, True):
        engine = backends.engine(config(compile_model=compiled), "mlx")
        batch = random_batch(config())
        run = [engine.read(engine.train_step(batch, step, 1e-3)).loss for step in range(4)]
        found.append({"losses": np.array(run), **running_statistics(engine.weights())})
    for path, array in found[0].items():
        np.testing.assert_allclose(found[1][path], array, rtol=1e-4, atol=1e-5, err_msg=path)


# ---- weights and runs ---------------------------------------------------------------------------------------


def test_conversion_there_and_back(tmp_path: Path) -> None:
    given = config(**CASES["bottlenecks, large stem"])
    engine = backends.engine(given, "torch")
    engine.read(engine.train_step(random_batch(given), 0, 1e-2))  # so that not all statistics are 0 and 1
    weights, (yaml, source) = engine.weights(), (tmp_path / "c.yaml", tmp_path / "c.safetensors")
    yaml.write_text(given.to_yaml())
    weight_files.write(source, weights)
    forms = {"mlx": tmp_path / "m.safetensors", "torch": tmp_path / "t.pt"}
    for form, path in forms.items():
        convert_model(source, path, form, "canonical", str(yaml), False)
        back = tmp_path / f"back-{form}.safetensors"
        convert_model(path, back, "canonical", form, str(yaml), False)
        assert unequal(dict(weight_files.read(back)), weights) == []
    ours = backends.engine(config(seed=9, **given.model.model_dump(exclude={"type"})), "mlx").model
    ours.load_weights(str(forms["mlx"]), strict=True)
    assert unequal(ours.weights(), weights) == []
    theirs = model_of("torch", seed=9, **given.model.model_dump(exclude={"type"}))
    theirs.load_state_dict(torch.load(forms["torch"], weights_only=True), strict=True)
    assert unequal(theirs.weights(), weights) == []


@pytest.mark.parametrize("first", ["mlx", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_run_changes_backend(first: str, tmp_path: Path) -> None:
    """A run that changes backend half way, judged against the same run on one backend."""
    second = next(name for name in BACKENDS if name != first)
    given = digits("training.max_steps=12", "training.eval_every=6", "training.checkpoint_every=6")
    Trainer.start(given, tmp_path / "origin", backend=first, quiet=True).fit(6)
    runs = {"there": (first, "float32"), "changed": (second, "float32"), "exact": ("torch", "float64")}
    for name, (backend, dtype) in runs.items():
        trainer = Trainer.resume(tmp_path / "origin", run=tmp_path / name, backend=backend, dtype=dtype, quiet=True)
        assert not trainer.notes
        result = trainer.fit()
        assert result.step == 12 and result.validation_accuracy is not None
    curve = {name: losses(tmp_path / name)[6:] for name in runs}
    mlx, torch32 = ("there", "changed") if first == "mlx" else ("changed", "there")
    verdict = judge_curve(curve[mlx], curve[torch32], curve["exact"])
    assert verdict.passed, f"{verdict.worst} at step {verdict.worst_step}"
    found = [checkpoint.find(tmp_path / name) for name in runs]
    assert found[0].state["facts"] == found[1].state["facts"] and found[0].weights.keys() == found[1].weights.keys()


def test_statistics_are_restored_with_pytorchs_counter_of_batches() -> None:
    """A step that is skipped changes nothing; with `momentum=None` the counter is a part of the averages."""
    statistics = pytest.importorskip("icenet_torch.nn.norm")
    layer = torch.nn.BatchNorm1d(3, momentum=None)
    before = statistics.running_statistics(layer)
    layer(torch.ones(4, 3))
    assert int(layer.num_batches_tracked) == 1
    statistics.set_running_statistics(layer, before)
    assert int(layer.num_batches_tracked) == 0 and not layer.running_mean.any()
