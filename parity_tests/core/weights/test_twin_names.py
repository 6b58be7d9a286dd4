"""`icenet.from_torch` and `to_torch`: names that differ, shared arrays, and dtypes."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import pytest
from helpers import is_one_line, same_bits
from twin_modules import Mine, Net, Theirs, TorchNet, close, randomize

import icenet
from icenet.core.errors import WeightsError
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
    assert is_one_line(raised.value, "layer.weight_ih_l1_reverse", "rename={'layer.*_l0_reverse': 'PATH.*_l0'}")
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
@pytest.mark.usefixtures("mlx_on_cpu")  # MLX has float64 on a CPU alone
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
