"""`icenet.from_torch` and `to_torch`: names that differ, shared arrays, dtypes and errors."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, same_bits
from twin_modules import Net, TorchNet, close, randomize

import icenet
from icenet.core import weights
from icenet.core.errors import IceNetError, UsageError, WeightsError
from icenet.core.models import modules
from icenet.core.weights.rename import apply_rename

torch: Any = pytest.importorskip("torch")
pytest.importorskip("mlx")
importlib.import_module("icenet.blas")  # before mlx.core
mx: Any = importlib.import_module("mlx.core")
mnn: Any = importlib.import_module("mlx.nn")
mlx_utils: Any = importlib.import_module("mlx.utils")
tree: Any = importlib.import_module("icenet.nn.tree")
arrays: Any = importlib.import_module("icenet.nn.arrays")
tnn: Any = torch.nn
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


# ---- names ------------------------------------------------------------------------------------------------


class Mine(mnn.Module):  # type: ignore[misc]
    """A network as users write it: a list, a dict, a Sequential, arrays of its own, a tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = mnn.Embedding(11, 8)
        self.blocks = [Block() for _ in range(2)]
        self.heads = {"a": mnn.Linear(8, 3), "b": mnn.Linear(8, 4)}
        self.stem = mnn.Sequential(mnn.Conv2d(1, 4, 3), mnn.ReLU(), mnn.Sequential(mnn.Conv2d(4, 5, (2, 3))))
        self.position = mx.zeros((6, 8))
        self.table = mx.zeros((3,), mx.int32)
        self.freeze(keys=["table"], recurse=False)
        self._cache = mx.zeros((2,))


class Block(mnn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.attention = mnn.MultiHeadAttention(8, 2, bias=True)
        self.norm = mnn.LayerNorm(8)


class Theirs(tnn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.wte = tnn.Embedding(11, 8)
        self.h = tnn.ModuleList([TheirBlock() for _ in range(2)])
        self.heads = tnn.ModuleDict({"a": tnn.Linear(8, 3), "b": tnn.Linear(8, 4)})
        self.stem = tnn.Sequential(tnn.Conv2d(1, 4, 3), tnn.ReLU(), tnn.Sequential(tnn.Conv2d(4, 5, (2, 3))))
        self.position = tnn.Parameter(torch.zeros(6, 8))
        self.register_buffer("table", torch.tensor([3, 1, 2]))
        self.register_buffer("mask", torch.ones(4))
        self.lm_head = tnn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight


class TheirBlock(tnn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.attn = tnn.MultiheadAttention(8, 2, batch_first=True)
        self.ln = tnn.LayerNorm(8)


MAPPING = {"wte": "embedding", "h.*.attn": "blocks.*.attention", "h.*.ln": "blocks.*.norm", "mask": None}


def function(name: str) -> str | None:
    if name == "mask":
        return None
    return (
        name.replace("wte", "embedding").replace("h.", "blocks.").replace("attn", "attention").replace("ln", "norm")
    )


@pytest.mark.parametrize("rename", [MAPPING, function], ids=["mapping", "function"])
@pytest.mark.parametrize("as_state_dict", [False, True], ids=["module", "state dict"])
def test_a_network_with_other_names(rename: Any, as_state_dict: bool) -> None:
    theirs, ours = randomize(Theirs()), Mine()
    icenet.from_torch(theirs.state_dict() if as_state_dict else theirs, ours, rename)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    assert np.array_equal(np.array(ours.blocks[1].attention.key_proj.bias), state["h.1.attn.in_proj_bias"][8:16])
    assert np.array_equal(
        np.array(ours.stem.layers[2].layers[0].weight).transpose(0, 3, 1, 2), state["stem.2.0.weight"]
    )
    assert np.array_equal(np.array(ours.heads["b"].bias), state["heads.b.bias"])
    assert ours.table.tolist() == [3, 1, 2] and ours.table.dtype == mx.int32
    assert np.array_equal(np.array(ours.embedding.weight), state["lm_head.weight"])
    back = randomize(Theirs(), seed=5)
    mask = back.mask.clone()
    icenet.to_torch(ours, back, rename)
    assert torch.equal(back.mask, mask) and back.lm_head.weight is back.wte.weight
    assert all(torch.equal(back.state_dict()[n], value) for n, value in theirs.state_dict().items() if n != "mask")


def test_the_most_specific_entry_of_a_mapping_applies() -> None:
    names = [
        "h.0.attn.weight",
        "h.0.attn.bias",
        "h.1.attn.weight",
        "head.weight",
        "x.weight_ih_l0",
        "x.weight_ih_l0_reverse",
    ]
    mapping = {
        "h.*.attn": "blocks.*.attention",
        "h.0.attn.bias": "first",
        "h.1": None,
        "": "net",
        "x.*_l0": "forward.*",
    }
    for entries in (mapping, dict(reversed(mapping.items()))):
        assert list(apply_rename(entries, names).values()) == [
            *("blocks.0.attention.weight", "first", "blocks.1.attention.weight"),
            *("net.head.weight", "forward.weight_ih", "net.x.weight_ih_l0_reverse"),
        ]
    assert apply_rename({"module.": ""}, ["module.a.b", "modules.c"]) == {
        "module.a.b": "a.b",
        "modules.c": "modules.c",
    }


def test_a_mapping_with_swapped_sides() -> None:
    theirs, ours = randomize(Theirs()), Mine()
    del theirs.mask
    icenet.from_torch(theirs, ours, {"embedding": "wte", "blocks.*.attention": "h.*.attn", "blocks.*.norm": "h.*.ln"})
    assert np.array_equal(np.array(ours.blocks[1].norm.bias), theirs.h[1].ln.bias.detach())
    ours, theirs = mnn.Module(), tnn.Module()  # names of both: the left side is PyTorch's
    for name in "ab":
        setattr(ours, name, mnn.Linear(2, 3))
        setattr(theirs, name, tnn.Linear(2, 3))
    icenet.to_torch(ours, theirs, {"a": "b", "b": "a"})
    assert np.array_equal(np.array(ours.a.weight), theirs.b.weight.detach())


def test_names_of_mlx_in_a_mapping() -> None:
    """A right side may be the name in PyTorch of the layer at that place, or that of MLX."""
    theirs = randomize(tnn.Sequential(tnn.Linear(2, 3), tnn.MultiheadAttention(4, 2, batch_first=True)))
    ours = Net(mnn.Sequential(mnn.Linear(2, 3), mnn.MultiHeadAttention(4, 2, bias=True)))
    for names in ({"": "layer"}, {"": "layer.layers"}, {"0": "layer.layers.0", "1": "layer.1"}):
        icenet.from_torch(theirs, ours, names)
        assert np.array_equal(np.array(ours.layer.layers[0].weight), theirs[0].weight.detach().numpy())
        icenet.to_torch(ours, randomize(copy.deepcopy(theirs), 3), names)
    state = {f"layer.1.{n}_proj.weight": np.full((4, 4), i, np.float32) for i, n in enumerate("qkvo")}
    state |= {f"layer.1.{n}_proj.bias": np.zeros(4, np.float32) for n in "qkvo"}
    state |= {f"layer.0.{n}": a.detach().numpy() for n, a in theirs[0].named_parameters()}
    own = {"q": "query", "k": "key", "v": "value", "o": "out"}
    icenet.from_torch(state, ours, {f"layer.1.{n}_proj": f"layer.1.{name}_proj" for n, name in own.items()})
    assert ours.layer.layers[1].value_proj.weight[0, 0] == 2


def test_packed_projections_of_a_linear_layer() -> None:
    """The names of PyTorch's attention stand for the three projections, whatever the layer in PyTorch is."""
    theirs, ours = randomize(TorchNet(tnn.Module())), Net(mnn.MultiHeadAttention(8, 2, bias=True))
    theirs.layer.qkv, theirs.layer.out_proj = randomize(tnn.Linear(8, 24), 1), randomize(tnn.Linear(8, 8), 2)
    names = {f"layer.qkv.{part}": f"layer.in_proj_{part}" for part in ("weight", "bias")}
    icenet.from_torch(theirs, ours, names)
    attention = tnn.MultiheadAttention(8, 2)
    icenet.to_torch(ours, TorchNet(attention))
    assert torch.equal(attention.in_proj_weight, theirs.layer.qkv.weight)
    packed = Net(mnn.Module())
    packed.layer.qkv, packed.layer.out_proj = mnn.Linear(8, 24), mnn.Linear(8, 8)
    icenet.from_torch(TorchNet(attention), packed, {new: name for name, new in names.items()})
    assert np.array_equal(np.array(packed.layer.qkv.bias), theirs.layer.qkv.bias.detach())


class Conv1D(tnn.Module):  # type: ignore[misc]
    """The layer of GPT-2 in Transformers, by its name."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (tnn.Parameter(torch.zeros(size)) for size in ((inputs, outputs), (outputs,)))

    def forward(self, x: Any) -> Any:
        return x @ self.weight + self.bias


def test_the_layer_of_gpt2_has_this_name() -> None:
    real = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert (real.__module__, real.__name__) == (Conv1D.__module__, Conv1D.__name__)
    assert {n: p.shape for n, p in real(5, 3).named_parameters()} == {
        n: p.shape for n, p in Conv1D(5, 3).named_parameters()
    }


def test_linear_layers_of_gpt2_are_transposed() -> None:
    """`Conv1D` of Transformers has the axes (in, out); here one of each shape, a square one and a packed one."""
    theirs, ours = tnn.Module(), mnn.Module()
    theirs.a, theirs.b, theirs.c_attn = Conv1D(5, 3), Conv1D(3, 3), Conv1D(24, 8)
    theirs.c_proj, theirs.raw = Conv1D(8, 8), Conv1D(3, 3)
    ours.a, ours.b, ours.attention = mnn.Linear(3, 5), mnn.Linear(3, 3), mnn.MultiHeadAttention(8, 2, bias=True)
    ours.raw = mnn.Module()  # a module that computes x @ weight + bias
    ours.raw.weight, ours.raw.bias = mx.zeros((3, 3)), mx.zeros((3,))
    names = {f"c_attn.{part}": f"attention.in_proj_{part}" for part in ("weight", "bias")} | {
        "c_proj": "attention.out_proj"
    }
    icenet.from_torch(randomize(theirs), ours, names)
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    for name in "ab":
        exact = copy.deepcopy(getattr(theirs, name)).double()(torch.from_numpy(x).double()).detach()
        assert close(
            np.array(getattr(ours, name)(mx.array(x))), getattr(theirs, name)(torch.from_numpy(x)).detach(), exact
        )
    assert np.array_equal(np.array(ours.raw.weight), theirs.raw.weight.detach())
    assert np.array_equal(np.array(ours.attention.key_proj.weight), theirs.c_attn.weight.detach().T[8:16])
    back = randomize(copy.deepcopy(theirs), seed=4)
    icenet.to_torch(ours, back, names)
    assert same_bits(modules.get_weights(back), modules.get_weights(theirs))


def test_gradients_of_frozen_weights_may_be_missing() -> None:
    ours, theirs = Net(mnn.MultiHeadAttention(4, 2, bias=True)), TorchNet(tnn.MultiheadAttention(4, 2))
    pairing = modules.pair(ours, theirs)
    all_of_them = modules.get_weights(ours)
    some = {name: array for name, array in all_of_them.items() if name != "layer.key_proj.weight"}
    assert set(pairing.to_torch(some, gradients=True)) == set(modules.get_weights(theirs)) - {"layer.in_proj_weight"}
    assert same_bits(pairing.to_mlx(pairing.to_torch(all_of_them, gradients=True), gradients=True), all_of_them)
    ours, theirs = Net(mnn.GRU(4, 2)), TorchNet(tnn.GRU(4, 2))
    pairing = modules.pair(ours, theirs)
    for frozen, left_out in {
        "bhn": {"bias_hh_l0"},
        "Wh": {"weight_hh_l0"},
        "b": {"bias_ih_l0", "bias_hh_l0"},
    }.items():
        some = {name: array for name, array in modules.get_weights(ours).items() if name != f"layer.{frozen}"}
        names = {f"layer.{name}" for name in left_out}
        assert set(pairing.to_torch(some, gradients=True)) == set(modules.get_weights(theirs)) - names


def test_an_lstm_of_several_layers_and_directions() -> None:
    theirs = randomize(TorchNet(tnn.LSTM(5, 6, 2, batch_first=True, bidirectional=True)))
    ours = mnn.Module()
    ours.forward = [mnn.LSTM(5, 6), mnn.LSTM(12, 6)]
    ours.backward = [mnn.LSTM(5, 6), mnn.LSTM(12, 6)]
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(theirs, ours)
    assert is_one_line(raised.value, "layer.weight_ih_l1_reverse", "'lstm.*_l1': 'layers.1.*_l0'")
    names = {f"layer.*_l{i}": f"forward.{i}.*_l0" for i in (0, 1)}
    names |= {f"layer.*_l{i}_reverse": f"backward.{i}.*_l0" for i in (0, 1)}
    icenet.from_torch(theirs, ours, names)
    x = np.random.default_rng(0).standard_normal((2, 4, 5)).astype(np.float32)
    y = mx.array(x)
    for forward, backward in zip(ours.forward, ours.backward, strict=True):
        y = mx.concatenate([forward(y)[0], backward(y[:, ::-1])[0][:, ::-1]], axis=-1)
    exact = copy.deepcopy(theirs).double().layer(torch.from_numpy(x).double())[0].detach()
    assert close(np.array(y), theirs.layer(torch.from_numpy(x))[0].detach(), exact)
    back = randomize(copy.deepcopy(theirs), seed=3)
    icenet.to_torch(ours, back, names)
    np.testing.assert_allclose(
        back.layer(torch.from_numpy(x))[0].detach(), theirs.layer(torch.from_numpy(x))[0].detach(), atol=1e-6
    )


def test_arrays_that_mlx_shares() -> None:
    ours, theirs = mnn.Module(), tnn.Module()
    ours.a, ours.b = mnn.Linear(3, 3, bias=False), mnn.Linear(3, 3, bias=False)
    ours.b.weight = ours.a.weight
    theirs.a, theirs.b = tnn.Linear(3, 3, bias=False), tnn.Linear(3, 3, bias=False)
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(theirs, ours)
    assert is_one_line(raised.value, "a.weight", "b.weight")
    theirs.b.weight = theirs.a.weight
    icenet.from_torch(theirs, ours)
    assert ours.b.weight is ours.a.weight
    icenet.from_torch({"a.weight": theirs.a.weight.detach() + 1}, ours)  # one of its names is enough
    assert ours.b.weight is ours.a.weight and np.array_equal(np.array(ours.a.weight), theirs.a.weight.detach() + 1)
    icenet.to_torch(ours, theirs)
    assert theirs.b.weight is theirs.a.weight and np.array_equal(np.array(ours.a.weight), theirs.a.weight.detach())


def test_all_unequal_values_of_shared_arrays_are_named() -> None:
    ours, theirs = mnn.Module(), tnn.Module()
    ours.layers = [mnn.Linear(3, 3)] * 2
    theirs.layers = tnn.ModuleList([tnn.Linear(3, 3), tnn.Linear(3, 3)])
    before = modules.get_weights(ours)
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(theirs, ours)
    assert is_one_line(raised.value, "layers.0.weight and layers.1.weight", "layers.0.bias and layers.1.bias")
    assert same_bits(modules.get_weights(ours), before)


def test_transformer_layers_with_biases_are_trained_like_pytorchs() -> None:
    """MLX's layers have no option for the biases of the attention: they get them, and lose them again."""
    ours, theirs = mnn.TransformerEncoderLayer(8, 2, 12), tnn.TransformerEncoderLayer(8, 2, 12)
    ours.attention.freeze()
    icenet.from_torch(theirs, ours)
    assert ours.attention.query_proj.bias.shape == (8,) and ours.linear1.bias.shape == (12,)
    assert "attention" not in dict(mlx_utils.tree_flatten(ours.trainable_parameters()))
    assert not any("attention" in name for name, _ in mlx_utils.tree_flatten(ours.trainable_parameters()))
    bare = tnn.TransformerEncoderLayer(8, 2, 12, bias=False)
    with pytest.raises(WeightsError) as raised:
        icenet.to_torch(ours, bare)
    assert is_one_line(raised.value, "linear1.bias", "attention.query_proj.bias", "ln2.bias")
    icenet.from_torch(bare, ours)
    assert not any("bias" in name for name, _ in mlx_utils.tree_flatten(ours.parameters()))
    icenet.to_torch(ours, bare)
    plain = mnn.TransformerEncoderLayer(8, 2, 12)
    icenet.to_torch(plain, randomize(theirs))
    assert not theirs.self_attn.in_proj_bias.any() and not theirs.self_attn.out_proj.bias.any()
    assert theirs.linear1.bias.any() and "bias" not in plain.attention.query_proj
    state = theirs.state_dict()
    del state["norm1.bias"]
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(state, plain)
    assert is_one_line(raised.value, "norm1.bias") and "bias" not in plain.attention.query_proj


# ---- dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("own", ["float16", "bfloat16", "float32", "float64"])
def test_each_side_keeps_its_dtype(dtype: str, own: str) -> None:
    theirs = randomize(TorchNet(tnn.LSTM(3, 4))).to(getattr(torch, dtype))
    ours = Net(mnn.LSTM(3, 4))
    ours.set_dtype(getattr(mx, own))
    icenet.from_torch(theirs, ours)
    state = theirs.state_dict()
    total = state["layer.bias_ih_l0"].double() + state["layer.bias_hh_l0"].double()
    native = tree.native_arrays(ours)
    if dtype != "float64":
        total = total.float().double()  # the sum is computed in fp32
    for name, value in (("layer.Wx", state["layer.weight_ih_l0"]), ("layer.bias", total)):
        assert native[name].dtype == getattr(mx, own)
        rounded = arrays.to_numpy(native[name]).astype(np.float64)
        np.testing.assert_array_equal(rounded, value.to(getattr(torch, own)).double().numpy())
    icenet.to_torch(ours, theirs)
    assert theirs.layer.weight_ih_l0.dtype == getattr(torch, dtype)
    expected = torch.tensor(arrays.to_numpy(native["layer.Wx"]).astype(np.float64)).to(getattr(torch, dtype))
    assert torch.equal(theirs.layer.weight_ih_l0, expected)


def test_special_values_keep_their_bits() -> None:
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001, 0x3F800000, 0x7F7FFFFF], np.uint32)
    theirs, ours = TorchNet(tnn.LSTM(3, 2)), Net(mnn.LSTM(3, 2))
    for name in ("weight_ih_l0", "bias_ih_l0", "weight_hh_l0"):
        array = getattr(theirs.layer, name)
        array.data = torch.from_numpy(np.resize(bits.view(np.float32), array.shape))
    theirs.layer.bias_hh_l0.data.zero_()
    state = copy.deepcopy(theirs.state_dict())
    icenet.to_torch(icenet.from_torch(theirs, ours), randomize(theirs))
    found = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    assert same_bits(found, {name: tensor.numpy() for name, tensor in state.items()})


def test_a_value_that_does_not_fit_is_named_and_nothing_changes() -> None:
    theirs, ours = TorchNet(tnn.Linear(2, 2)).double(), Net(mnn.Linear(2, 2))
    theirs.layer.weight.data.fill_(1e300)
    theirs.layer.bias.data.fill_(-1e39)
    before = modules.get_weights(ours)
    with pytest.raises(WeightsError) as raised:
        icenet.from_torch(theirs, ours)
    assert is_one_line(raised.value, "layer.weight", "1e+300", "layer.bias", "float32")
    assert same_bits(modules.get_weights(ours), before)


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
