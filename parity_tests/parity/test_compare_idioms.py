"""`icenet.parity.compare` on what users write: shared layers, caches, ties, hidden states, operations in place."""

from __future__ import annotations

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
from pairs import draw, tokens, with_equal_weights

import icenet
from icenet.parity import compare

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


def test_random_numbers_without_a_key_are_said() -> None:
    ours, theirs = with_equal_weights(Net(lambda m, x: m.fc(x), fc=M.Linear(6, 6)), TorchNet(None, fc=T.Linear(6, 6)))
    theirs.call = lambda m, x: F.dropout(m.fc(x), 0.5, m.training)
    theirs.drop = T.Dropout(0.0)
    report = compare(Net(lambda m, x: m.drop(m.fc(x)), fc=ours.fc, drop=M.Dropout(0.5)), theirs, draw(4, 6))
    assert report.passed and any("without a key" in note for note in report.notes), str(report)


def test_weights_of_layers_with_other_parameters_are_compared() -> None:
    ours, theirs, x = last_state()
    ours.gru.Wh = ours.gru.Wh * 1.01
    report = compare(ours, theirs, x)
    assert report.culprit == "gru" and report.failed_stage is not None and report.failed_stage.name == "weights"
    assert compare(ours, theirs, x, copy_weights=True).passed


def test_modes_that_differ_are_a_difference() -> None:
    ours, theirs = M.Sequential(M.Linear(6, 6), M.Dropout(0.5)), T.Sequential(T.Linear(6, 6), T.Dropout(0.5))
    report = compare(ours.eval(), theirs, draw(4, 6), copy_weights=True)
    assert report.culprit == "1" and "evaluation mode in a" in report.verdict and "eval()" in report.cause
