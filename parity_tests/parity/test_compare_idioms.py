"""`icenet.parity.compare` on what users write: shared layers, caches, ties, hidden states, operations in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import icenet.blas

import mlx.core as mx
import mlx.nn as M
import numpy as np
import pytest
import torch
import torch.nn as T
import torch.nn.functional as F
from pair_faults import PAIRS
from pairs import draw, tokens, with_equal_weights

import icenet
from icenet.parity import align, compare, inputs
from icenet.parity.calls.propagation import own_errors
from icenet.parity.comparison import ModuleComparison
from icenet.parity.stages import forward
from icenet.parity.stages.order import run_stages
from icenet.parity.trace import Value
from icenet_torch.tools.probe import perturbing

Twins = tuple[Any, Any, Any]


@pytest.fixture(autouse=True)
def seeded(mlx_on_cpu: None) -> None:
    """Draws the same initial values in each run, on the CPU."""
    torch.manual_seed(0)


class Net(M.Module):
    """Layers, and a function that calls them."""

    def __init__(self, call: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


class TorchNet(T.Module):
    def __init__(self, call: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


def twins(ours: Any, theirs: Any, x: Any) -> Twins:
    return *with_equal_weights(ours, theirs), x


def shared() -> Twins:
    """One layer, called three times."""

    def call(m: Any, x: Any, tanh: Any) -> Any:
        for _ in range(3):
            x = x + tanh(m.fc(m.norm(x)))
        return x

    ours = Net(lambda m, x: call(m, x, mx.tanh), fc=M.Linear(6, 6), norm=M.LayerNorm(6))
    theirs = TorchNet(lambda m, x: call(m, x, torch.tanh), fc=T.Linear(6, 6), norm=T.LayerNorm(6))
    return twins(ours, theirs, draw(3, 6))


def tied() -> Twins:
    """The matrix of an embedding is also that of the output."""
    ours = Net(lambda m, x: m.emb.as_linear(mx.tanh(m.fc(m.emb(x)))), emb=M.Embedding(20, 8), fc=M.Linear(8, 8))
    theirs = TorchNet(
        lambda m, x: F.linear(torch.tanh(m.fc(m.emb(x))), m.emb.weight), emb=T.Embedding(20, 8), fc=T.Linear(8, 8)
    )
    return twins(ours, theirs, tokens(2, 5, below=20))


def tied_layers() -> Twins:
    ours = Net(lambda m, x: m.head(mx.tanh(m.emb(x))), emb=M.Embedding(20, 8), head=M.Linear(8, 20, bias=False))
    theirs = TorchNet(
        lambda m, x: m.head(torch.tanh(m.emb(x))), emb=T.Embedding(20, 8), head=T.Linear(8, 20, bias=False)
    )
    theirs.head.weight = theirs.emb.weight
    ours.emb.weight = ours.head.weight = mx.array(theirs.emb.weight.detach().numpy())
    return ours, theirs, tokens(2, 5, below=20)


def in_place() -> Twins:
    def call(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm2(m.conv2(m.relu(m.norm1(m.conv1(x)))))
        y += m.down(x)
        return m.relu(y)

    def layers(nn: Any, norm: Any) -> dict[str, Any]:
        convs = {f"conv{i + 1}": nn.Conv2d((3, 4)[i], 4, 3, padding=1) for i in range(2)}
        return {**convs, "norm1": norm(4), "norm2": norm(4), "down": nn.Conv2d(3, 4, 1)}

    ours = Net(
        lambda m, x: m.relu(m.norm2(m.conv2(m.relu(m.norm1(m.conv1(x))))) + m.down(x)),
        **layers(M, M.BatchNorm),
        relu=M.ReLU(),
    )
    theirs = TorchNet(call, **layers(T, T.BatchNorm2d), relu=T.ReLU(inplace=True))
    return twins(ours, theirs, draw(2, 6, 6, 3))


@dataclass
class Output:
    logits: Any
    hidden: Any = None


def structures() -> Twins:
    """A dataclass with a tuple, and an optional keyword argument."""

    def call(m: Any, x: Any, mask: Any = None) -> Output:
        h = m.body(x)
        h = h if mask is None else h * mask[..., None]
        return Output(m.head(h), (h, 2 * h))

    ours = Net(call, body=M.Linear(6, 6), head=M.Linear(6, 3))
    theirs = TorchNet(call, body=T.Linear(6, 6), head=T.Linear(6, 3))
    return twins(ours, theirs, {"x": draw(2, 4, 6), "mask": np.ones((2, 4), np.float32)})


class Cache:
    def __init__(self) -> None:
        self.keys: Any = None

    def update(self, keys: Any, concatenate: Any) -> Any:
        self.keys = keys if self.keys is None else concatenate([self.keys, keys])
        return self.keys


def cached() -> Twins:
    """Layers that write to an object."""

    def attend(m: Any, x: mx.array, cache: Cache) -> mx.array:
        k = cache.update(m.k(x), lambda items: mx.concatenate(items, 1))
        return mx.softmax(m.q(x) @ k.transpose(0, 2, 1), axis=-1) @ k

    def torch_attend(m: Any, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        k = cache.update(m.k(x), lambda items: torch.cat(items, 1))
        return torch.softmax(m.q(x) @ k.transpose(1, 2), -1) @ k

    layer = Net(attend, k=M.Linear(6, 6), q=M.Linear(6, 6))
    other = TorchNet(torch_attend, k=T.Linear(6, 6), q=T.Linear(6, 6))
    return twins(
        Net(lambda m, x: x + m.layer(x, Cache()), layer=layer),
        TorchNet(lambda m, x: x + m.layer(x, Cache()), layer=other),
        draw(2, 4, 6),
    )


def last_state() -> Twins:
    """The last state of PyTorch's layer is a further output, in MLX a part of the first."""
    ours = Net(lambda m, x: m.fc(m.gru(x)[:, -1]), gru=M.GRU(5, 6), fc=M.Linear(6, 2))
    theirs = TorchNet(lambda m, x: m.fc(m.gru(x)[1][-1]), gru=T.GRU(5, 6, batch_first=True), fc=T.Linear(6, 2))
    return icenet.from_torch(theirs, ours), theirs, draw(3, 7, 5)


def encoder_layer() -> Twins:
    """The layers within have other names, and are compared as one."""
    ours = Net(lambda m, x: m.layer(x, None), layer=M.TransformerEncoderLayer(16, 4, 32, norm_first=True))
    layer = T.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, norm_first=True)
    theirs = TorchNet(lambda m, x: m.layer(x), layer=layer)
    return icenet.from_torch(theirs, ours), theirs, draw(2, 5, 16)


def prefixed() -> Twins:
    """The reference has one more module around the layers."""

    def call(m: Any, x: Any) -> Any:
        for layer in m.layers:
            x = layer(x)
        return x

    ours = Net(call, layers=[M.Linear(6, 6), M.Linear(6, 6)])
    inner = TorchNet(call, layers=T.ModuleList([T.Linear(6, 6), T.Linear(6, 6)]))
    for layer, other in zip(ours.layers, inner.layers, strict=True):
        layer.weight, layer.bias = (mx.array(p.detach().numpy()) for p in (other.weight, other.bias))
    return ours, TorchNet(lambda m, x: m.model(x), model=inner), draw(2, 6)


def transposed_inside() -> Twins:
    """The reference takes channels last although its first layer is a convolution."""
    ours = Net(lambda m, x: m.head(M.relu(m.conv(x))), conv=M.Conv1d(5, 8, 3, padding=1), head=M.Linear(8, 2))
    theirs = TorchNet(
        lambda m, x: m.head(F.relu(m.conv(x.transpose(1, 2))).transpose(1, 2)),
        conv=T.Conv1d(5, 8, 3, padding=1),
        head=T.Linear(8, 2),
    )
    return twins(ours, theirs, draw(2, 9, 5))


IDIOMS = (
    shared,
    tied,
    tied_layers,
    in_place,
    structures,
    cached,
    last_state,
    encoder_layer,
    prefixed,
    transposed_inside,
)


@pytest.mark.parametrize("make", IDIOMS, ids=lambda make: make.__name__)
def test_correct_twins_pass(make: Callable[[], Twins]) -> None:
    report = compare(*make())
    assert report.passed, str(report)


def test_a_fault_in_a_layer_that_is_called_three_times() -> None:
    ours, theirs, x = shared()
    ours.norm.eps = 1e-3
    report = compare(ours, theirs, x)
    assert report.culprit == "norm" and "eps" in report.cause
    statuses = {module.path: module.status for module in report.modules}
    assert statuses == {"": "contains", "norm": "differs", "fc": "inherits"}


@pytest.mark.parametrize("rate", [0.5, 0.4])
def test_a_dropout_layer_has_the_masks_of_a_function(rate: float) -> None:
    ours, theirs = with_equal_weights(Net(lambda m, x: m.fc(x), fc=M.Linear(6, 6)), TorchNet(None, fc=T.Linear(6, 6)))
    theirs.call = lambda m, x: F.dropout(m.fc(x), 0.5, m.training)
    theirs.drop = T.Dropout(0.0)
    report = compare(Net(lambda m, x: m.drop(m.fc(x)), fc=ours.fc, drop=M.Dropout(rate)), theirs, draw(4, 6))
    assert report.passed == (rate == 0.5) and "not compared" not in report.verdict, str(report)


def test_weights_of_layers_with_other_parameters_are_compared() -> None:
    ours, theirs, x = last_state()
    ours.gru.Wh = ours.gru.Wh * 1.01
    report = compare(ours, theirs, x)
    assert report.culprit == "gru" and report.failed_stage is not None and report.failed_stage.name == "weights"
    assert compare(ours, theirs, x, copy_weights=True).passed


@pytest.mark.parametrize(
    ("options", "parts"), [({"bidirectional": True}, "2 directions"), ({"num_layers": 2}, "2 layers")]
)
def test_a_recurrent_layer_of_several_parts_needs_its_parameters(options: dict[str, Any], parts: str) -> None:
    theirs = TorchNet(lambda m, x: m.gru(x)[0], gru=T.GRU(5, 6, batch_first=True, **options))
    report = compare(Net(lambda m, x: m.gru(x), gru=M.GRU(5, 6)), theirs, draw(2, 4, 5))
    assert report.culprit == "gru" and report.failed_stage is not None and report.failed_stage.name == "structure"
    assert parts in report.verdict and "icenet port writes" in report.notes[-1]
    within = Net(lambda m, x: m.gru(x), gru=Net(lambda m, x: x, fw=M.GRU(5, 6)))
    assert any(parts in note for note in compare(within, theirs, draw(2, 4, 5)).notes)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_sum_of_two_biases_is_rounded_once_in_a_and_twice_in_b(dtype: str) -> None:
    ours, theirs, x = last_state()
    with torch.no_grad():
        theirs.gru.bias_ih_l0.copy_(torch.from_numpy(draw(18, seed=5)))
        theirs.gru.bias_hh_l0.copy_(torch.from_numpy(draw(18, seed=6)))
    icenet.from_torch(theirs, ours)
    assert compare(ours, theirs, x, dtype=dtype, stages=["weights", "forward"], copy_weights=False).passed
    ours.gru.b = ours.gru.b * (1.02 if dtype == "bf16" else 1.002)
    assert compare(ours, theirs, x, dtype=dtype, stages=["weights"], copy_weights=False).culprit == "gru"


def test_derivatives_smaller_than_the_last_bit_of_one_are_equal() -> None:
    """float64 has 0 for that of tanh at 20, as 1 - tanh^2; MLX has 1.7e-17."""

    def net(kind: Any, nn: Any) -> Any:
        return kind(lambda m, x: m.act(x * 4 + 20), act=nn.Tanh())

    report = compare(net(Net, M), net(TorchNet, T), np.abs(draw(4, 6)), stages=["forward", "gradients"])
    assert report.passed, report


def test_the_error_of_what_a_model_computes_between_layers_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cosines of a time have an error that the gradients of all layers inherit; no layer has it."""
    ours, theirs, given = PAIRS["diffusion"]("")
    options = dict.fromkeys(("rename", "layout", "loss", "optimizer"), None) | {"copy_weights": False}
    comparison = ModuleComparison(ours, theirs, ("forward",), "fp32", 0, 0, options)
    errors: dict[tuple[str, str], float] = {}
    monkeypatch.setattr(
        forward, "judge_forward", lambda c, stage, pairs, *_: errors.update(own_errors(c, pairs, gradients=False))
    )
    run_stages(comparison, [inputs.read(given)])
    assert errors["argument", "time1"] > 1e-8 and ("argument", "") not in errors
    seen = []

    def perturb(value: Value, what: str, path: str, number: int) -> Value:
        seen.append((what, path))
        return Value(value.array * np.float32(1.5 if (what, path) == ("argument", "hidden") else 1), value.dtype)

    x, t = (torch.from_numpy(given[name]) for name in ("x", "t"))
    with perturbing(theirs, perturb, arguments=True):
        moved = theirs(x, t)
    assert ("argument", "hidden") in seen and not torch.equal(moved, theirs(x, t))


def test_modes_that_differ_are_a_difference() -> None:
    ours, theirs = M.Sequential(M.Linear(6, 6), M.Dropout(0.5)), T.Sequential(T.Linear(6, 6), T.Dropout(0.5))
    report = compare(ours.eval(), theirs, draw(4, 6), copy_weights=True)
    assert report.culprit == "1" and "evaluation mode in a" in report.verdict and "eval()" in report.cause


def attention(where: Callable[..., Any], softmax: Callable[..., Any], hide: float) -> Callable[..., Any]:
    def call(m: Any, x: Any, mask: Any) -> Any:
        scores = m.q(x) @ m.k(x).swapaxes(1, 2)
        return softmax(m, where(mask, scores, hide)) @ x

    return call


def masked(hide: float, inverted: bool = False) -> Twins:
    """Both sides mask before a softmax module, by other numbers, in a layer that receives booleans."""
    ours = Net(
        attention(lambda m, s, v: mx.where(~m if inverted else m, s, v), lambda m, s: m.softmax(s), hide),
        q=M.Linear(6, 6), k=M.Linear(6, 6), softmax=M.Softmax(),
    )  # fmt: skip
    theirs = TorchNet(
        attention(lambda m, s, v: s.masked_fill(~m, v), lambda m, s: m.softmax(s), -math.inf),
        q=T.Linear(6, 6), k=T.Linear(6, 6), softmax=T.Softmax(-1),
    )  # fmt: skip
    return *with_equal_weights(ours, theirs), {"x": draw(2, 5, 6), "mask": np.tri(5, dtype=bool)}


def additive(layer: Callable[..., Any], size: float, approximate: bool = False) -> Any:
    """A layer within a model; the mask is made by the model and handed to the layer in the form of each framework."""
    mlx = layer is Net
    nn = M if mlx else T

    def inner(m: Any, x: Any, mask: Any) -> Any:
        scores = m.q(x) @ m.k(x).swapaxes(1, 2)
        if mlx:
            y = mx.softmax(scores + mask, -1) @ x
            return m.out(M.gelu_approx(y) if approximate else M.gelu(y))
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return m.out(F.gelu(scores.softmax(-1) @ x))

    def outer(m: Any, x: Any, keep: Any) -> Any:
        if mlx:
            return m.block(x, mx.where(keep[:, None, :], 0.0, size))
        if math.isnan(size):  # booleans
            return m.block(x, ~keep[:, None])
        return m.block(x, torch.where(keep, 0.0, size).to(x.dtype)[:, None])

    return layer(outer, block=layer(inner, **{name: nn.Linear(6, 6) for name in ("q", "k", "out")}))


@pytest.mark.parametrize("hide", [-1e9, float(np.finfo(np.float32).min), -1e4])
def test_masks_by_other_numbers_are_equal(hide: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        report = compare(*masked(hide), stages=["forward", "gradients"])
        assert report.passed, report
        assert any("masked values are other numbers" in note for note in report.notes)
        wrong = compare(*masked(hide, inverted=True), stages=["forward"])
    assert (wrong.passed, wrong.culprit, wrong.where) == (False, "", "between k and softmax")


@pytest.mark.parametrize("other", [-math.inf, -1e9, math.nan])
def test_each_side_keeps_its_own_mask(other: float) -> None:
    keep = np.array([[True] * 4, [True, True, False, False]])
    for approximate in (False, True):
        ours = additive(Net, float(np.finfo(np.float32).min), approximate)
        pair = with_equal_weights(ours, additive(TorchNet, other))
        report = compare(*pair, {"x": draw(2, 4, 6), "keep": keep}, stages=["forward", "gradients"])
        assert report.passed is not approximate, report
    assert (report.culprit, report.where) == ("block", "between k and out")
    assert "GELU" in report.cause


def test_a_mask_is_negative_and_far_larger_than_the_rest() -> None:
    scores = np.array([[0.5, -2.0, -1e9], [1.0, -np.inf, -1e9]], np.float32)
    assert np.array_equal(align.masked(scores), [[False, False, True], [False, True, True]])
    assert align.masked(np.float32([-2000, 1500, 900])) is None, "large, but no larger than the rest"
    assert align.masked(np.float32([1e9, np.nan, 2])) is None
    assert align.masks_otherwise(scores, np.where(scores < -1e8, -np.inf, scores))
    assert not align.masks_otherwise(scores, scores)
    assert not align.masks_otherwise(scores, np.abs(scores)), "masked on one side only"
    assert align.is_mask(np.float32([0, -1e9])) and not align.is_mask(scores)


def often(net: Any, nn: Any, act: Any, first: int, hand: bool = False, factor: float = 1.0) -> Any:
    """A layer that is called some times, and a norm as a module or by hand."""

    def call(m: Any, x: Any) -> Any:
        for _ in range(first):
            x = act(m.fc(x))
        x = m.out(x) * factor
        return F.layer_norm(x, (6,)) + x if hand else m.norm(x) + x

    layers = {name: nn.Linear(6, 6) for name in ("fc", "out")}
    return net(call, **layers, **({} if hand else {"norm": nn.LayerNorm(6, affine=False)}))


def test_only_a_module_whose_call_makes_the_difference_is_a_cause() -> None:
    theirs = often(TorchNet, T, torch.tanh, 2, hand=True)
    named = "fc is called 3 times in a, 2 times in b"
    for count, factor, cause in ((2, 1.0, ""), (3, 1.0, named), (2, 0.9, "")):
        act = mx.tanh if count == 2 else lambda x: x
        other = theirs if count == 2 else often(TorchNet, T, lambda x: x, 2, hand=True)
        ours, other = with_equal_weights(often(Net, M, act, count, factor=factor), other)
        report = compare(ours, other, draw(4, 6), stages=["forward"])
        assert report.passed == (count == 2 and factor == 1.0), report
        assert report.cause == cause, report.verdict


def test_numbers_without_an_effect_are_said() -> None:
    def net(kind: Any, nn: Any, eps: float, rate: float) -> Any:
        subclass = type("Off", (nn.Dropout,), {})
        layers = {"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6, eps=eps), "off": nn.Dropout(rate)}
        layers |= {"own": subclass(rate), "second": nn.Dropout(rate), "third": nn.Dropout(rate)}
        return kind(lambda m, x: m.norm(m.fc(x) * 1e4), **layers)

    report = compare(*twins(net(Net, M, 1e-6, 0.1), net(TorchNet, T, 1e-5, 0.2), draw(4, 6)), stages=["forward"])
    assert report.passed, report
    for words in (
        "eps is 1e-06 in a, 1e-05 in b, in norm",
        "the rate p of the dropout is 0.1 in a, 0.2 in b, in off, own, second and 1 more,",
    ):
        assert any(words in note for note in report.notes), report.notes
    report = compare(*twins(net(Net, M, 1e-5, 0.1), net(TorchNet, T, 1e-5, 0.1), draw(4, 6)), stages=["forward"])
    assert report.passed and not any("in a," in note for note in report.notes)
