"""`icenet.from_torch` and `icenet.to_torch`: every layer of mlx.nn against the one of torch.nn."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import ROOT, is_one_line, same_bits
from twin_modules import Net, TorchNet, close, randomize

import icenet
from icenet.core.errors import WeightsError
from icenet.core.models import modules
from icenet.core.weights import layout

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")
importlib.import_module("icenet.blas")  # before mlx.core
mx: Any = importlib.import_module("mlx.core")
mnn: Any = importlib.import_module("mlx.nn")
mlx_utils: Any = importlib.import_module("mlx.utils")
inn: Any = importlib.import_module("icenet.nn")
tree: Any = importlib.import_module("icenet.nn.tree")
tnn: Any = torch.nn
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


def same_call(layer: Any, *inputs: Any) -> Any:
    return layer(*inputs)


def channels_last(layer: Any, x: Any) -> Any:
    return mx.moveaxis(layer(mx.moveaxis(x, 1, -1)), -1, 1)


def attention(layer: Any, *inputs: Any) -> Any:
    q, k, v = inputs * 3 if len(inputs) == 1 else inputs
    return layer(q, k, v) if isinstance(layer, mnn.Module) else layer(q, k, v, need_weights=False)[0]


class Case(NamedTuple):
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    inputs: tuple[tuple[int, ...], ...]
    call: Callable[..., Any] = same_call
    torch_call: Callable[..., Any] | None = None


def conv(dims: int, **options: Any) -> Case:
    """Returns a convolution; the axes have unequal lengths, so that a wrong permutation cannot fit."""
    kernel, shape = (3, 2, 4)[:dims], (9, 8, 7)[:dims]
    size = kernel if dims > 1 else kernel[0]
    ours, theirs = (getattr(nn, f"Conv{dims}d") for nn in (mnn, tnn))
    given = ((2, 4, *shape),)
    return Case(
        lambda: ours(4, 6, size, **options), lambda: theirs(4, 6, size, **options), given, channels_last, same_call
    )


def first_output(layer: Any, *inputs: Any) -> Any:
    return layer(*inputs)[0]


def no_mask(layer: Any, *inputs: Any) -> Any:
    masks = {mnn.TransformerEncoderLayer: 1, mnn.TransformerEncoder: 1, mnn.Transformer: 3}
    is_mlx = isinstance(layer, mnn.Module)
    return layer(*inputs, *[None] * masks.get(type(layer), 2)) if is_mlx else layer(*inputs)


def time_first(layer: Any, x: Any) -> Any:
    if isinstance(layer, mnn.Module):
        return layer(x.swapaxes(0, 1))[0].swapaxes(0, 1)
    return layer(x)[0]


def transposed(dims: int, **options: Any) -> Case:
    kernel, shape = (3, 2, 4)[:dims], (5, 4, 3)[:dims]
    size = kernel if dims > 1 else kernel[0]
    ours, theirs = (getattr(nn, f"ConvTranspose{dims}d") for nn in (mnn, tnn))
    given = ((2, 4, *shape),)
    return Case(
        lambda: ours(4, 6, size, **options), lambda: theirs(4, 6, size, **options), given, channels_last, same_call
    )


def recurrent(name: str, **options: Any) -> Case:
    def ours() -> Any:
        return getattr(mnn, name)(5, 6, **options)

    def theirs() -> Any:
        return getattr(tnn, name)(5, 6, batch_first=True, **options)

    return Case(ours, theirs, ((2, 4, 5),), first_output if name == "LSTM" else same_call, first_output)


def own_recurrent(name: str, bidirectional: bool) -> Case:
    def theirs() -> Any:
        return getattr(tnn, name)(5, 6, batch_first=True, bidirectional=bidirectional)

    return Case(lambda: getattr(inn, name)(5, 6, bidirectional), theirs, ((2, 4, 5),), time_first)


def normed(name: str, theirs: Callable[[], Any], *arguments: Any, **options: Any) -> Case:
    def ours() -> Any:
        return getattr(mnn, name)(*arguments, **options)

    return Case(ours, theirs, ((4, 6, 3, 5),), channels_last, same_call)


def transformer(name: str, *arguments: Any, norm_first: bool, bias: bool = True) -> Case:
    """Returns `mlx.nn.TransformerEncoderLayer` or one of its relatives, with 8 features and 2 heads."""
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first, "bias": bias}

    def theirs() -> Any:
        if name == "Transformer":
            return tnn.Transformer(8, 2, 1, 2, 12, **options)
        kind = name.removesuffix("Layer")
        layer = getattr(tnn, f"{kind}Layer")(8, 2, 12, **options)
        extra = {"enable_nested_tensor": False} if kind == "TransformerEncoder" else {}
        return layer if name.endswith("Layer") else getattr(tnn, kind)(layer, 2, tnn.LayerNorm(8, bias=bias), **extra)

    def ours() -> Any:
        return getattr(mnn, name)(
            *arguments, 8, 2, *((1, 2) if name == "Transformer" else ()), 12, norm_first=norm_first
        )

    inputs = ((2, 4, 8),) if "Encoder" in name else ((2, 4, 8), (2, 5, 8))
    return Case(ours, theirs, inputs, no_mask)


CASES: dict[str, Case] = {
    "Linear": Case(lambda: mnn.Linear(5, 7), lambda: tnn.Linear(5, 7), ((3, 5),)),
    "Linear, no bias": Case(lambda: mnn.Linear(5, 7, bias=False), lambda: tnn.Linear(5, 7, bias=False), ((3, 5),)),
    "Bilinear": Case(lambda: mnn.Bilinear(5, 4, 7), lambda: tnn.Bilinear(5, 4, 7), ((3, 5), (3, 4))),
    "Bilinear, no bias": Case(
        lambda: mnn.Bilinear(5, 4, 7, bias=False), lambda: tnn.Bilinear(5, 4, 7, bias=False), ((3, 5), (3, 4))
    ),
    "Embedding": Case(
        lambda: mnn.Embedding(9, 5),
        lambda: tnn.Embedding(9, 5),
        ((3, 4),),
        lambda layer, x: layer(mx.round(x * x).astype(mx.int32)),
        lambda layer, x: layer(torch.round(x * x).int()),
    ),
    **{f"Conv{dims}d": conv(dims) for dims in (1, 2, 3)},
    **{f"Conv{dims}d, stride": conv(dims, stride=2, padding=1, bias=False) for dims in (1, 2, 3)},
    **{f"Conv{dims}d, groups": conv(dims, groups=2) for dims in (1, 2)},  # MLX's Conv3d has none
    **{f"Conv{dims}d, dilation": conv(dims, dilation=2) for dims in (1, 2, 3)},
    "Conv1d, depthwise": Case(
        lambda: mnn.Conv1d(4, 4, 3, groups=4),
        lambda: tnn.Conv1d(4, 4, 3, groups=4),
        ((2, 4, 9),),
        channels_last,
        same_call,
    ),
    **{f"ConvTranspose{dims}d": transposed(dims) for dims in (1, 2, 3)},
    **{
        f"ConvTranspose{dims}d, stride": transposed(dims, stride=2, padding=1, output_padding=1, bias=False)
        for dims in (1, 2, 3)
    },
    **{f"ConvTranspose{dims}d, dilation": transposed(dims, dilation=2) for dims in (1, 2, 3)},
    "LayerNorm": Case(lambda: mnn.LayerNorm(6), lambda: tnn.LayerNorm(6), ((4, 6),)),
    "LayerNorm, no bias": Case(lambda: mnn.LayerNorm(6, bias=False), lambda: tnn.LayerNorm(6, bias=False), ((4, 6),)),
    "LayerNorm, not affine": Case(
        lambda: mnn.LayerNorm(6, affine=False), lambda: tnn.LayerNorm(6, elementwise_affine=False), ((4, 6),)
    ),
    "RMSNorm": Case(lambda: mnn.RMSNorm(6, eps=1e-5), lambda: tnn.RMSNorm(6, eps=1e-5), ((4, 6),)),
    "GroupNorm": normed("GroupNorm", lambda: tnn.GroupNorm(2, 6), 2, 6, pytorch_compatible=True),
    "GroupNorm, not affine": normed(
        "GroupNorm", lambda: tnn.GroupNorm(2, 6, affine=False), 2, 6, affine=False, pytorch_compatible=True
    ),
    "InstanceNorm": normed("InstanceNorm", lambda: tnn.InstanceNorm2d(6, affine=True), 6, affine=True),
    "InstanceNorm, not affine": normed("InstanceNorm", lambda: tnn.InstanceNorm2d(6), 6),
    "BatchNorm": normed("BatchNorm", lambda: tnn.BatchNorm2d(6), 6),
    "BatchNorm, not affine": normed("BatchNorm", lambda: tnn.BatchNorm2d(6, affine=False), 6, affine=False),
    "BatchNorm, no statistics": normed(
        "BatchNorm", lambda: tnn.BatchNorm2d(6, track_running_stats=False), 6, track_running_stats=False
    ),
    "PReLU": Case(mnn.PReLU, tnn.PReLU, ((4, 6),)),
    "PReLU, channels": Case(lambda: mnn.PReLU(6), lambda: tnn.PReLU(6), ((4, 6),)),
    **{name: recurrent(name) for name in ("LSTM", "GRU", "RNN")},
    **{f"{name}, no bias": recurrent(name, bias=False) for name in ("LSTM", "GRU", "RNN")},
    **{f"icenet.nn.{name}": own_recurrent(name, name == "GRU") for name in ("LSTM", "GRU", "RNN")},
    "MultiHeadAttention": Case(
        lambda: mnn.MultiHeadAttention(8, 2, bias=True),
        lambda: tnn.MultiheadAttention(8, 2, batch_first=True),
        ((2, 4, 8),),
        attention,
    ),
    "MultiHeadAttention, no bias": Case(
        lambda: mnn.MultiHeadAttention(8, 2),
        lambda: tnn.MultiheadAttention(8, 2, bias=False, batch_first=True),
        ((2, 4, 8),),
        attention,
    ),
    "MultiHeadAttention, kdim and vdim": Case(
        lambda: mnn.MultiHeadAttention(8, 2, key_input_dims=6, value_input_dims=5, bias=True),
        lambda: tnn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True),
        ((2, 4, 8), (2, 3, 6), (2, 3, 5)),
        attention,
    ),
    **{
        f"{name}, norm {'first' if norm_first else 'last'}": transformer(name, norm_first=norm_first)
        for name in ("TransformerEncoderLayer", "TransformerDecoderLayer")
        for norm_first in (True, False)
    },
    "TransformerEncoderLayer, no bias": transformer("TransformerEncoderLayer", norm_first=True, bias=False),
    "TransformerDecoderLayer, no bias": transformer("TransformerDecoderLayer", norm_first=False, bias=False),
    "TransformerEncoder": transformer("TransformerEncoder", 2, norm_first=True),
    "TransformerEncoder, no bias": transformer("TransformerEncoder", 2, norm_first=True, bias=False),
    "TransformerDecoder": transformer("TransformerDecoder", 2, norm_first=True),
    "Transformer": transformer("Transformer", norm_first=True),
}
"""Layers with their options: of MLX, of PyTorch, the shapes of the inputs in PyTorch, and how they are called."""

KINDS_OF_CASES = {name.partition(",")[0] for name in CASES}


def pair_of(name: str) -> tuple[Any, Any, list[np.ndarray]]:
    case = CASES[name]
    draw = np.random.default_rng(1)
    inputs = [draw.standard_normal(shape).astype(np.float32) for shape in case.inputs]
    return Net(case.ours()).eval(), randomize(TorchNet(case.theirs())).eval(), inputs


def torch_results(module: Any, case: Case, inputs: list[np.ndarray], dtype: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns the output of a layer, and the gradients of its parameters for a fixed gradient of the output."""
    module = copy.deepcopy(module).to(dtype)
    output = (case.torch_call or case.call)(module.layer, *(torch.from_numpy(x).to(dtype) for x in inputs))
    if output.requires_grad:
        output.backward(torch.cos(torch.arange(output.numel(), dtype=torch.float64)).to(dtype).reshape(output.shape))
    gradients = {n: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}
    return output.detach().numpy(), gradients


def mlx_results(net: Any, case: Case, inputs: list[np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    given = [mx.array(x) for x in inputs]

    def loss(parameters: Any) -> Any:
        net.update(parameters)
        output = case.call(net.layer, *given)
        cotangent = np.cos(np.arange(output.size, dtype=np.float64)).astype(np.float32).reshape(output.shape)
        return (output * mx.array(cotangent)).sum(), output

    parameters = net.trainable_parameters()
    has_parameters = bool(mlx_utils.tree_flatten(parameters))
    (_, output), gradients = mx.value_and_grad(loss)(parameters) if has_parameters else (loss(parameters), {})
    native = {path: np.array(array) for path, array in mlx_utils.tree_flatten(gradients)}
    names = tree.mlx_names(net)
    canonical = {names.get(path, path): array for path, array in native.items()}
    return np.array(output), layout.tree_to_torch(canonical, tree.layer_kinds(net))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    case, (ours, theirs, inputs) = CASES[name], pair_of(name)
    assert icenet.from_torch(theirs, ours) is ours
    exact, exact_gradients = torch_results(theirs, case, inputs, torch.float64)
    expected, gradients = torch_results(theirs, case, inputs, torch.float32)
    output, native = mlx_results(ours, case, inputs)
    assert close(output, expected, exact)

    pairing = modules.pair(ours, theirs)
    converted = pairing.to_torch(native, gradients=True)
    assert converted.keys() == gradients.keys()
    assert all(close(converted[path], gradients[path], exact_gradients[path]) for path in gradients)
    assert not native or same_bits(pairing.to_mlx(converted, gradients=True), native)
    assert {path for paths in pairing.pairs().values() for path in paths} == set(modules.get_weights(ours))

    target = randomize(TorchNet(case.theirs()), seed=2).eval()
    assert icenet.to_torch(ours, target) is target
    assert close(torch_results(target, case, inputs, torch.float32)[0], expected, exact)
    again = Net(case.ours()).eval()
    icenet.from_torch(target.state_dict() or target, again)
    assert pairing.pairs() == {} or same_bits(modules.get_weights(again), modules.get_weights(ours))
    if "bias_ih" not in "".join(theirs.state_dict()):  # PyTorch has two biases, whose sum is kept
        assert all(torch.equal(value, theirs.state_dict()[path]) for path, value in target.state_dict().items())


@pytest.mark.parametrize("is_linear", [True, False])
def test_a_convolution_of_size_1_may_be_a_linear_layer(is_linear: bool) -> None:
    ours, theirs = (mnn.Linear(4, 6), tnn.Conv2d(4, 6, 1)) if is_linear else (mnn.Conv1d(4, 6, 1), tnn.Linear(4, 6))
    icenet.from_torch(theirs, ours)
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 4) if is_linear else (2, 5, 4)).astype(np.float32)
    given = torch.from_numpy(np.moveaxis(x, -1, 1).copy() if is_linear else x)
    expected = theirs(given).detach().numpy()
    np.testing.assert_allclose(ours(mx.array(x)), np.moveaxis(expected, 1, -1) if is_linear else expected, atol=1e-6)
    other = type(theirs)(*((4, 6, 1) if is_linear else (4, 6)))
    icenet.to_torch(ours, other)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in other.state_dict().items())
    pairing, gradients = modules.pair(ours, theirs), modules.get_weights(ours)
    assert pairing.to_torch(gradients, gradients=True)["weight"].shape == theirs.weight.shape


@pytest.mark.parametrize("training", [True, False])
def test_statistics_in_training(training: bool) -> None:
    ours, theirs, [x] = pair_of("BatchNorm")
    icenet.from_torch(theirs, ours)
    ours.train(training), theirs.train(training)
    channels_last(ours.layer, mx.array(x)), theirs.layer(torch.from_numpy(x))
    for path, value in modules.get_weights(theirs).items():
        np.testing.assert_allclose(modules.get_weights(ours)[path], value, rtol=1e-6, atol=1e-6)
    assert theirs.layer.num_batches_tracked == training
    icenet.to_torch(ours, theirs)
    assert theirs.layer.num_batches_tracked == training


# ---- the table of the documentation -----------------------------------------------------------------------


WITHOUT_PARAMETERS = {
    *("CELU", "ELU", "GELU", "GLU", "SELU", "HardShrink", "Hardswish", "HardTanh", "LeakyReLU", "LogSigmoid"),
    *("LogSoftmax", "Mish", "ReLU", "ReLU2", "ReLU6", "Sigmoid", "SiLU", "Softmax", "Softmin", "Softplus"),
    *("Softshrink", "Softsign", "Step", "Tanh", "Dropout", "Dropout2d", "Dropout3d", "Identity", "ALiBi", "RoPE"),
    *("AvgPool1d", "AvgPool2d", "AvgPool3d", "MaxPool1d", "MaxPool2d", "MaxPool3d", "Upsample"),
    *("SinusoidalPositionalEncoding", "Module", "Sequential"),
}


def table() -> list[list[str]]:
    """Returns the cells of the first table of the section Layers of the page, without the head."""
    text = (ROOT / "docs/weights.md").read_text(encoding="utf-8").partition("\n## Layers\n")[2].partition("\n#")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def made(name: str) -> Any:
    """Returns a layer, with the first arguments that it accepts."""
    for arguments in ((), (4,), (2, 4)):
        try:
            return getattr(mnn, name)(*arguments)
        except TypeError:
            continue
    raise AssertionError(name)


def test_every_layer_of_mlx_is_in_the_table() -> None:
    classes = {name for name, value in vars(mnn).items() if isinstance(value, type) and issubclass(value, mnn.Module)}
    listed = [name for row in table() for name in re.findall(r"`([\w.]+)`", row[0])]
    assert len(listed) == len(set(listed))
    own = {name for name in listed if name.startswith("icenet.nn.")}
    assert set(listed) - own == classes - WITHOUT_PARAMETERS
    assert all(not mlx_utils.tree_flatten(made(name).parameters()) for name in WITHOUT_PARAMETERS & classes)
    unsupported = {row[0] for row in table() if row[1].startswith("none")}
    not_converted = {name for cell in unsupported for name in re.findall(r"`([\w.]+)`", cell)}
    assert set(listed) - not_converted == KINDS_OF_CASES


@pytest.mark.parametrize(
    "name", ["QuantizedLinear", "QuantizedEmbedding", "AllToShardedLinear", "ShardedToAllLinear"]
)
def test_layers_without_a_counterpart_are_named(name: str) -> None:
    ours = Net(getattr(mnn, name)(64, 64))
    theirs = TorchNet(tnn.Embedding(64, 64) if "Embedding" in name else tnn.Linear(64, 64))
    for copied in (lambda: icenet.from_torch(theirs, ours), lambda: icenet.to_torch(ours, theirs)):
        with pytest.raises(WeightsError) as raised:
            copied()
        assert is_one_line(raised.value, "layer", "before it is")
