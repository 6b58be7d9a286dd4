"""Which layers of mlx.nn a port uses: those that compute what PyTorch's do, with its gradients at edges."""

from __future__ import annotations

import re
from collections.abc import Callable

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from made_ports import close, ported
from torch import nn

from icenet.core.porting.source import helpers

EDGES = [0.0, -0.0, 0.3, -0.3, 1.0, -1.0, 3.0, -3.0, 6.0, 19.0, 20.0, 21.0, -20.0, 100.0, -100.0]
ACTIVATIONS: dict[str, tuple[nn.Module, Callable[[mx.array], mx.array]]] = {
    "nn.ReLU6()": (nn.ReLU6(), mlx.nn.ReLU6()),
    "nn.Softplus()": (nn.Softplus(), mlx.nn.Softplus()),
    "nn.Hardswish()": (nn.Hardswish(), mlx.nn.Hardswish()),
    "nn.Softsign()": (nn.Softsign(), mlx.nn.Softsign()),
    "nn.LogSigmoid()": (nn.LogSigmoid(), mlx.nn.LogSigmoid()),
    "nn.HardTanh()": (nn.Hardtanh(), mlx.nn.HardTanh()),
}
OTHERS = {
    "ELU": (nn.ELU(), mlx.nn.ELU(), 100.0),
    "LeakyReLU": (nn.LeakyReLU(), mlx.nn.LeakyReLU(), 0.0),
    "CELU": (nn.CELU(), mlx.nn.CELU(), 0.0),
    "SELU": (nn.SELU(), mlx.nn.SELU(), 100.0),
}
"""Layers of which MLX's have another gradient at a value: a port writes them itself."""


def gradients(theirs: nn.Module, ours: Callable[[mx.array], mx.array], values: list[float]) -> list[np.ndarray]:
    x = torch.tensor(values, requires_grad=True)
    theirs(x).sum().backward()
    assert x.grad is not None
    return [np.array(mx.grad(lambda x: ours(x).sum())(mx.array(values))), x.grad.numpy()]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_a_layer_of_mlx(name: str) -> None:
    theirs, ours = ACTIVATIONS[name]
    close(ours(mx.array(EDGES)), theirs(torch.tensor(EDGES)))
    np.testing.assert_allclose(*gradients(theirs, ours, EDGES), rtol=1e-5, atol=1e-6)


def test_layers_with_other_gradients_are_written() -> None:
    for theirs, ours, value in OTHERS.values():
        mine, expected = gradients(theirs, ours, [value])
        assert not np.allclose(mine, expected)
    names = nn.ModuleList(layer for layer, *_ in OTHERS.values())
    model, source = ported(nn.Sequential(*names), torch.tensor([EDGES]))
    assert not re.search(r"nn\.(C?ELU|SELU|LeakyReLU)\(", source)
    np.testing.assert_allclose(*gradients(nn.Sequential(*names), model, EDGES[:-2]), rtol=1e-5, atol=1e-6)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain = nn.InstanceNorm2d(3, affine=True, eps=1e-4), nn.InstanceNorm2d(3)
        self.acts = nn.Sequential(*(layer for layer, _ in ACTIVATIONS.values()))
        self.steep = nn.Softplus(2.0, 5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.steep(self.acts(self.plain(self.norm(x))))


def test_the_source_has_layers_of_mlx_and_no_function_that_it_does_not_call() -> None:
    torch.manual_seed(0)
    module, x = Images(), torch.randn(2, 3, 5, 4)
    nn.init.normal_(module.norm.weight)
    model, source = ported(module.eval(), x)
    close(model(mx.array(x.numpy())), module(x))
    for text in (*ACTIVATIONS, "nn.InstanceNorm(3, eps=0.0001, affine=True)", "nn.InstanceNorm(3)", "softplus("):
        assert text in source
    assert re.findall(r"^def (\w+)", source, re.MULTILINE) == ["softplus"]


def test_a_function_comes_with_those_that_it_reads() -> None:
    """An argument of `softplus` has the name of the function `threshold`."""
    assert [re.findall(r"def (\w+)", text) for text in helpers.sources({"softplus"})] == [["softplus"]]
    assert "def elu(" in "".join(helpers.sources({"celu"}))
    known = helpers._functions()
    for name, (text, *_) in known.items():  # every function that a source calls comes with it
        code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
        called = {word for word in re.findall(r"(?<![\w.])(\w+)\(", code) if word in known}
        given = "\n".join(helpers.sources({name}))
        assert called <= set(re.findall(r"(?:def|class) (\w+)", given)), name


class Masked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        return x.masked_fill(mask, 0) + x * torch.ones(size, size, dtype=torch.bool).triu(1)


def test_triangles_of_booleans_need_no_cast() -> None:
    x = torch.randn(2, 4, 4)
    model, source = ported(Masked(), x)
    close(model(mx.array(x.numpy())), Masked()(x))
    assert "mx.tril(mx.ones(" in source and "int32" not in source


class Excited(nn.Module):
    """Squeeze and excitation (Hu et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        batch, channels, _, _ = x.shape
        y = self.fc(x.mean((2, 3))).view(batch, channels, 1, 1)
        return x * y.expand_as(x)


class Window(nn.Module):
    """Images with their channels last, as Swin has them, and axes of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        y = self.proj(x).view(b, h * w, c).softmax(1)
        return y.view(b, h, w, c) + y.mean(1)[:, None, None]


def test_sizes_have_the_names_of_their_axes() -> None:
    module, x = Window().eval(), torch.randn(2, 4, 3, 5)
    model, source = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))
    assert "B, H, W, C = x.shape" in source and ".reshape(B, H * W, C)" in source and "[:, None, None]" in source


def test_squeeze_and_excitation_needs_no_transpose() -> None:
    torch.manual_seed(0)
    module, x = Excited().eval(), torch.randn(2, 3, 5, 6)
    model, source = ported(module, x)
    assert source.count("transpose(") == 2 and ", 1, 1, 4)" in source  # of the images alone, at both ends
    for sizes in ((2, 3, 5, 6), (1, 3, 4, 7)):
        x = torch.randn(sizes)
        close(model(mx.array(x.numpy())), module(x))


class Flat(nn.Module):
    """Reshapes whose axes cannot be moved by a reshape, or whose value is used in both orders."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        image, column = y.view(-1, 4, 3, 1), y.reshape(-1, 12)[:, :4].reshape(-1, 4, 1, 1)
        return (x * image + column.expand_as(x)).sum(3) + column.flatten(1)[:, :, None]


def test_other_reshapes_keep_their_meaning() -> None:
    torch.manual_seed(0)
    module, x, y = Flat().eval(), torch.randn(2, 2, 3, 5), torch.randn(2, 12)
    model, _ = ported(module, x, y)
    close(model(mx.array(x.numpy()), mx.array(y.numpy())), module(x, y))


def test_batch_norm_of_volumes_is_no_layer_of_mlx() -> None:
    module, x = nn.Sequential(nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3)), torch.randn(2, 2, 3, 4, 4)
    model, _ = ported(module, x)
    for training in (True, False):  # in evaluation mode with the statistics of the call in training mode
        model.train(training)
        close(model(mx.array(x.numpy())), module.train(training)(x))


class Tied(nn.Module):
    """Tokens with a padding, whose table is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=-2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.embedding(ids)) @ self.embedding.weight.T


def test_a_padding_gets_its_gradient_by_the_head_only() -> None:
    theirs, ids = Tied(), torch.tensor([[0, 5, 5], [3, 5, 1]])
    ours, source = ported(theirs, ids)
    assert "PaddedEmbedding(7, 4, 5)" in source and "def embedding(" not in source, source
    (theirs(ids) - 1).square().sum().backward()  # of a score of 0, which a padding has, a square has no gradient
    _, grads = mlx.nn.value_and_grad(ours, lambda ids: (ours(ids) - 1).square().sum())(mx.array(ids.numpy()))
    close(grads["embedding"]["weight"], theirs.embedding.weight.grad)
    fresh = type(ours)()["embedding"]
    assert not fresh.weight[5].any() and not fresh(mx.array([5])).any() and fresh.weight[4].any()
