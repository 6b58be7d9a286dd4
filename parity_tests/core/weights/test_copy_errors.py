"""`icenet.from_torch` and `to_torch`: what does not fit is named, and nothing changes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, same_bits
from twin_modules import Mine, Net, Theirs, TorchNet, randomize

import icenet
from icenet.core import weights
from icenet.core.errors import IceNetError, UsageError, WeightsError
from icenet.core.models import modules

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")
importlib.import_module("icenet.blas")  # before mlx.core
mx: Any = importlib.import_module("mlx.core")
mnn: Any = importlib.import_module("mlx.nn")
tnn: Any = torch.nn
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


# ---- errors -----------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    theirs, ours = Theirs(), Mine()
    ours.heads["b"] = mnn.Linear(8, 5)
    ours.stem.layers[0] = mnn.ConvTranspose2d(1, 4, 3)
    ours.extra = mx.zeros((2,))
    before = modules.get_weights(ours), {n: t.clone() for n, t in theirs.state_dict().items()}
    names = ("wte.weight", "mask", "embedding.weight", "extra", "blocks.1.attention.in_proj_weight")
    shapes = ("heads.b.weight", "[4, 8]", "[5, 8]", "heads.b.bias", "h.0.attn.in_proj_bias")
    for copied in (lambda: icenet.from_torch(theirs, ours), lambda: icenet.to_torch(ours, theirs)):
        with pytest.raises(WeightsError) as raised:
            copied()
        assert is_one_line(raised.value, *names, *shapes, "stem.0.weight", "conv2d", "conv_transpose2d", "rename")
    assert same_bits(modules.get_weights(ours), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in theirs.state_dict().items())


def test_a_convolution_of_size_1_is_a_linear_layer_of_a_module_only() -> None:
    ours, theirs = Net(mnn.Linear(4, 6)), TorchNet(tnn.Conv2d(4, 6, 1))
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(theirs.state_dict(), ours)
    assert is_one_line(raised.value, "[6, 4, 1, 1]", "a convolution of size 1", "give the module of PyTorch")
    icenet.from_torch(theirs, ours)
    for other in (tnn.Conv2d(4, 6, 2), tnn.Conv2d(4, 6, 1, groups=2)):
        with pytest.raises(WeightsError, match="conv2d"):
            icenet.from_torch(TorchNet(other), ours)


def test_equal_shapes_of_other_kinds_are_refused() -> None:
    """No axes are guessed: of [4, 4, 4, 4] every permutation fits."""
    holder = Net(mnn.Module())
    holder.layer.weight = mx.zeros((4, 4, 4, 4))
    conv = TorchNet(tnn.Conv2d(4, 4, 4, bias=False))
    for ours in (Net(mnn.ConvTranspose2d(4, 4, 4, bias=False)), holder):
        with pytest.raises(WeightsError) as raised:
            icenet.from_torch(conv, ours)
        assert is_one_line(raised.value, "layer.weight", "conv2d")

    class Patches(mnn.Module):  # type: ignore[misc]
        layer_kind = "conv2d"

    holder.layer = Patches()
    holder.layer.weight = mx.zeros((4, 4, 4, 4))
    icenet.from_torch(conv, holder)
    assert np.array_equal(np.array(holder.layer.weight).transpose(0, 3, 1, 2), conv.layer.weight.detach())


class Raw(mnn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.zeros((4, 3, 2, 5))


class Gained(mnn.Linear):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(2, 3)
        self.gain, self.shift = mx.ones((3,)), mx.ones((3,))


MLX_LINEAR, TORCH_LINEAR = mnn.Linear(2, 3), tnn.Linear(2, 3)

MISUSES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "swapped": (lambda: icenet.from_torch(MLX_LINEAR, TORCH_LINEAR), ("swapped", "PyTorch module first")),
    "swapped back": (lambda: icenet.to_torch(TORCH_LINEAR, MLX_LINEAR), ("swapped", "MLX module first")),
    "two of MLX": (lambda: icenet.from_torch(MLX_LINEAR, MLX_LINEAR), ("first argument", "torch.nn.Module", "MLX")),
    "two of PyTorch": (lambda: icenet.from_torch(TORCH_LINEAR, TORCH_LINEAR), ("second", "mlx.nn.Module", "PyTorch")),
    "two of PyTorch back": (lambda: icenet.to_torch(TORCH_LINEAR, TORCH_LINEAR), ("first", "mlx.nn.Module")),
    "two of MLX back": (lambda: icenet.to_torch(MLX_LINEAR, MLX_LINEAR), ("second", "torch.nn.Module")),
    "a path": (lambda: icenet.from_torch("model.pt", MLX_LINEAR), ("model.pt", "torch.load")),
    "a Path": (lambda: icenet.from_torch(Path("model.pt"), MLX_LINEAR), ("model.pt", "torch.load")),
    "a path back": (lambda: icenet.to_torch(MLX_LINEAR, "model.pt"), ("second", "torch.nn.Module", "str")),
    "a class": (lambda: icenet.from_torch(TORCH_LINEAR, mnn.Linear), ("class Linear", "instance")),
    "nothing": (lambda: icenet.from_torch(None, MLX_LINEAR), ("first", "NoneType")),
    "an empty state dict": (lambda: icenet.from_torch({}, MLX_LINEAR), ("empty",)),
    "a checkpoint": (
        lambda: icenet.from_torch({"model": {"weight": 1}, "step": 3}, MLX_LINEAR),
        ("'model'", "dict", "only"),
    ),
    "a checkpoint with weights": (
        lambda: icenet.from_torch({"step": 1, "model": TORCH_LINEAR.state_dict()}, MLX_LINEAR),
        ("'step'", "pass state_dict['model']"),
    ),
    "a step": (lambda: icenet.from_torch({"weight": torch.ones(3, 2), "step": 3}, MLX_LINEAR), ("'step'", "int")),
    "arrays of MLX": (lambda: icenet.from_torch(dict(MLX_LINEAR), MLX_LINEAR), ("'weight'", "array of MLX")),
    "a state dict back": (lambda: icenet.to_torch(MLX_LINEAR, TORCH_LINEAR.state_dict()), ("second", "dict")),
    "no values": (lambda: icenet.from_torch(tnn.Linear(2, 3, device="meta"), MLX_LINEAR), ("meta",)),
    "lazy": (lambda: icenet.to_torch(MLX_LINEAR, tnn.LazyLinear(3)), ("lazy",)),
    "no weights": (lambda: icenet.from_torch(tnn.ReLU(), MLX_LINEAR), ("weight", "bias")),
    "two kinds of names": (
        lambda: icenet.from_torch({**TORCH_LINEAR.state_dict(), "old.weight": torch.ones(3, 2)}, MLX_LINEAR),
        ("old.weight", "None"),
    ),
    "a prefix": (lambda: icenet.from_torch(tnn.DataParallel(tnn.Linear(2, 3)), MLX_LINEAR), ("{'module': ''}",)),
    "a missing prefix": (lambda: icenet.from_torch(tnn.Linear(2, 3), Net(mnn.Linear(2, 3))), ("{'': 'layer'}",)),
    "groups": (
        lambda: icenet.from_torch(tnn.ConvTranspose1d(4, 4, 3, groups=2), mnn.ConvTranspose1d(4, 4, 3)),
        ("weight", "[4, 2, 3]", "groups"),
    ),
    "groups of volumes": (
        lambda: icenet.from_torch(tnn.Conv3d(4, 4, 3, groups=2), mnn.Conv3d(4, 4, 3)),
        ("weight", "[4, 2, 3, 3, 3]", "groups"),
    ),
    "an attention without biases": (
        lambda: icenet.from_torch(tnn.MultiheadAttention(8, 2), mnn.MultiHeadAttention(8, 2)),
        ("in_proj_bias", "out_proj.bias", "bias=True"),
    ),
    "more biases": (
        lambda: icenet.from_torch(
            tnn.MultiheadAttention(8, 2, add_bias_kv=True), mnn.MultiHeadAttention(8, 2, bias=True)
        ),
        ("bias_k", "bias_v"),
    ),
    "a projection": (lambda: icenet.from_torch(tnn.LSTM(3, 4, proj_size=2), mnn.LSTM(3, 4)), ("weight_hr_l0",)),
    "no final norm": (
        lambda: icenet.from_torch(
            tnn.TransformerEncoder(tnn.TransformerEncoderLayer(8, 2, 12), 1, enable_nested_tensor=False),
            mnn.TransformerEncoder(1, 8, 2, 12),
        ),
        ("ln.weight", "norm.weight"),
    ),
    "statistics": (
        lambda: icenet.from_torch(tnn.BatchNorm1d(3), mnn.BatchNorm(3, track_running_stats=False)),
        ("running_mean", "running_var"),
    ),
    "a parametrized weight": (
        lambda: icenet.from_torch(tnn.utils.parametrizations.weight_norm(tnn.Linear(2, 3)), MLX_LINEAR),
        ("parametrizations.weight.original0", "remove_parametrizations"),
    ),
    "a spectral norm": (
        lambda: icenet.from_torch(tnn.utils.spectral_norm(tnn.Linear(2, 3)), MLX_LINEAR),
        ("weight_orig", "weight_u", "remove_spectral_norm"),
    ),
    "two dtypes": (
        lambda: icenet.from_torch(
            {"weight": torch.ones(3, 2).to(torch.float8_e4m3fn), "bias": torch.ones(3).to_sparse()}, MLX_LINEAR
        ),
        ("from_torch", "weight", "bias", "numpy"),
    ),
    "a number for a name in a state dict": (lambda: icenet.from_torch({0: torch.ones(3)}, MLX_LINEAR), ("text", "0")),
    "an extra state": (
        lambda: icenet.from_torch({**TORCH_LINEAR.state_dict(), "_extra_state": {"a": 1}}, MLX_LINEAR),
        ("'_extra_state'", "tensors only"),
    ),
    "a layer with a bias": (
        lambda: icenet.from_torch(TORCH_LINEAR, mnn.Linear(2, 3, bias=False)),
        ("bias", "option"),
    ),
    "a layer without a bias": (
        lambda: icenet.from_torch(tnn.LSTM(3, 4, bias=False), mnn.LSTM(3, 4)),
        ("bias_ih_l0", "bias_hh_l0"),
    ),
    "arrays of a subclass": (lambda: icenet.to_torch(Gained(), TORCH_LINEAR), ("gain", "shift", "'linear'")),
    "an array of a convolution": (
        lambda: icenet.from_torch({"weight": torch.ones(4, 5, 3, 2)}, Raw()),
        ("weight", "layer_kind"),
    ),
    "twice": (
        lambda: icenet.from_torch(
            {"a": torch.ones(3, 2), "weight": torch.ones(3, 2), "bias": torch.ones(3)}, MLX_LINEAR, {"a": "weight"}
        ),
        ("a and weight",),
    ),
    "a rename of another type": (lambda: icenet.from_torch(TORCH_LINEAR, MLX_LINEAR, 3), ("rename", "int")),
    "an unused name": (
        lambda: icenet.from_torch(TORCH_LINEAR, MLX_LINEAR, {"wieght": "a"}),
        ("'wieght'", "'weight'"),
    ),
    "swapped names with a mistake": (
        lambda: icenet.from_torch(
            {"w": torch.ones(3, 2), "bias": torch.ones(3)}, MLX_LINEAR, {"weight": "w", "biass": "bias"}
        ),
        ("'weight', 'biass'", "'w'"),
    ),
    "wildcards": (lambda: icenet.from_torch(TORCH_LINEAR, MLX_LINEAR, {"weight": "*"}), ("wildcard", "'weight'")),
    "a number for a name": (lambda: icenet.from_torch(TORCH_LINEAR, MLX_LINEAR, {"weight": 3}), ("rename", "3")),
    "a function that fails": (
        lambda: icenet.from_torch(TORCH_LINEAR, MLX_LINEAR, lambda name: {}[name]),
        ("rename", "KeyError", "'weight'"),
    ),
    "a function without text": (
        lambda: icenet.from_torch(TORCH_LINEAR, MLX_LINEAR, lambda name: 3),
        ("rename", "int", "'weight'"),
    ),
}


@pytest.mark.parametrize("name", MISUSES)
@pytest.mark.filterwarnings("ignore")
def test_a_misuse_is_one_line(name: str) -> None:
    copied, names = MISUSES[name]
    before = modules.get_weights(MLX_LINEAR), modules.get_weights(TORCH_LINEAR)
    with pytest.raises(IceNetError) as raised:
        copied()
    assert is_one_line(raised.value, *names)
    assert same_bits(modules.get_weights(MLX_LINEAR), before[0])
    assert same_bits(modules.get_weights(TORCH_LINEAR), before[1])


def test_a_subclass_with_arrays_of_its_own() -> None:
    class Plain(Gained):
        layer_kind = "plain"

    theirs, ours = tnn.Linear(2, 3), Plain()
    theirs.gain, theirs.shift = tnn.Parameter(torch.zeros(3)), tnn.Parameter(torch.zeros(3))
    icenet.from_torch(randomize(theirs), ours)
    assert same_bits(modules.get_weights(ours), modules.get_weights(theirs))


def test_state_dicts_without_pytorch_tensors(tmp_path: Path) -> None:
    theirs, ours = randomize(TorchNet(tnn.Conv2d(2, 3, (2, 4)))), Net(mnn.Conv2d(2, 3, (2, 4)))
    weights.write(tmp_path / "w.safetensors", modules.get_weights(theirs))
    icenet.from_torch(weights.read(tmp_path / "w.safetensors"), ours)
    assert same_bits(modules.get_weights(ours), modules.get_weights(theirs))
    ours.save_weights(str(tmp_path / "mlx.safetensors"))
    icenet.core.weights.convert.convert(
        tmp_path / "w.safetensors", tmp_path / "m.safetensors", "mlx", kinds={"layer": "conv2d"}
    )
    with pytest.raises(UsageError) as raised:
        icenet.from_torch(weights.read(tmp_path / "m.safetensors"), ours)
    assert is_one_line(raised.value, "load_weights")


def test_an_expanded_buffer_is_checked_before_anything_is_written() -> None:
    theirs, ours = TorchNet(tnn.Linear(2, 3)), Net(mnn.Linear(2, 3))
    theirs.register_buffer("scale", torch.ones(1).expand(4))
    ours.scale = mx.full((4,), 2.0)
    before = theirs.layer.weight.clone()
    with pytest.raises(WeightsError) as raised:
        icenet.to_torch(ours, theirs)
    assert is_one_line(raised.value, "scale", "expanded") and torch.equal(theirs.layer.weight, before)
    ours.scale = mx.ones((4,))
    icenet.to_torch(ours, theirs)
    assert not torch.equal(theirs.layer.weight, before)


@pytest.mark.slow  # torch.compile is imported in 5 s
def test_compiled_modules() -> None:
    theirs, ours = TorchNet(tnn.Linear(2, 3)), Net(mnn.Linear(2, 3))
    icenet.from_torch(torch.compile(theirs), ours)
    assert same_bits(modules.get_weights(ours), modules.get_weights(theirs))
    ours.layer.weight = ours.layer.weight + 1
    icenet.to_torch(ours, torch.compile(theirs))
    assert same_bits(modules.get_weights(ours), modules.get_weights(theirs))


def test_an_optimizer_keeps_its_parameters() -> None:
    theirs, ours = TorchNet(tnn.Linear(2, 3)), Net(mnn.Linear(2, 3))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    ours.layer.weight = ours.layer.weight + 1
    parameter = theirs.layer.weight
    icenet.to_torch(ours, theirs)
    assert theirs.layer.weight is parameter and parameter.requires_grad
    theirs.layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(parameter, torch.tensor(np.array(ours.layer.weight)) - 1)


def test_integers_keep_their_values() -> None:
    theirs, ours = tnn.Module(), mnn.Module()
    theirs.register_buffer("table", torch.tensor([1, 2**40]))
    ours.table = mx.zeros((2,), mx.int32)
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(theirs, ours)
    assert is_one_line(raised.value, "table", "1099511627776", "int32")
    theirs.table[1] = -7
    icenet.from_torch(theirs, ours)
    assert ours.table.tolist() == [1, -7]
    ours.table = mx.zeros((2,), mx.uint32)
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(theirs, ours)
    assert is_one_line(raised.value, "table", "-7", "uint32")


def test_layers_that_a_framework_does_not_see() -> None:
    theirs, ours = tnn.Module(), mnn.Module()
    ours.blocks = (mnn.Linear(2, 2),)
    theirs.blocks = tnn.ModuleList([tnn.Linear(2, 2)])
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(theirs, ours)
    assert is_one_line(raised.value, "blocks.0.weight", "MLX does not see", "lists")
    ours.blocks, theirs.blocks = list(ours.blocks), None
    theirs.__dict__["blocks"] = [tnn.Linear(2, 2)]
    with pytest.raises(WeightsError) as raised:
        icenet.to_torch(ours, theirs)
    assert is_one_line(raised.value, "blocks.0.weight", "PyTorch does not see", "ModuleList")


def test_an_attention_that_is_used_twice() -> None:
    ours, theirs = mnn.Module(), tnn.Module()
    ours.a, theirs.a = mnn.MultiHeadAttention(8, 2, bias=True), tnn.MultiheadAttention(8, 2)
    ours.b, theirs.b = ours.a, theirs.a
    for source in (randomize(theirs), {n: t for n, t in theirs.state_dict().items() if n[0] == "b"}):
        icenet.from_torch(source, ours)
        assert np.array_equal(np.array(ours.b.value_proj.weight), theirs.a.in_proj_weight[16:].detach())
    icenet.to_torch(ours, theirs)
    assert theirs.a is theirs.b


def test_an_array_that_is_no_weight() -> None:
    ours = Net(mnn.Linear(2, 3))
    ours.angles = mx.zeros((3,))
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(TorchNet(tnn.Linear(2, 3)), ours)
    assert is_one_line(raised.value, "angles", "begins with _")


def test_copies_between_modules_of_one_framework() -> None:
    for first, second in (
        (Net(mnn.LSTM(2, 3)), Net(mnn.LSTM(2, 3))),
        (TorchNet(tnn.LSTM(2, 3)), TorchNet(tnn.LSTM(2, 3))),
    ):
        modules.copy_weights(first, second)
        assert same_bits(modules.get_weights(first), modules.get_weights(second))
