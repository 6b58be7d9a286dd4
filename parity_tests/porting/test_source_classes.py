"""Classes and loops of a port's source: one class for its variants, which take images with channels last."""

from __future__ import annotations

import re
from types import SimpleNamespace

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import pytest
import torch
from made_ports import close, ported
from torch import nn

from icenet.core.porting.source.lines import Body, Line
from icenet.core.porting.source.variants import union

DOWN = "self.down = nn.Linear(3, 3)"


class Residual(nn.Module):
    """A block with two layers that some of its instances lack."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, project: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.project = None
        if project:
            self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        if self.project is not None:
            x = self.project(x)
        return y + x


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Residual(3, 3), Residual(3, 6, 2, project=True)
        self.c, self.d = Residual(6, 6), Residual(6, 4, 1, project=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_a_layer_that_some_instances_lack_is_an_option_of_their_class() -> None:
    module, x = Stages().eval(), torch.randn(2, 3, 8, 8)
    model, source = ported(module, x)
    assert source.count("class Residual") == 1
    assert "        if project:\n            self.project = Sequential(" in source
    assert "self.b = Residual(3, 6, 2, project=True)" in source
    assert '        if "project" in self:\n            x = self.project(x)' in source
    close(model(mx.array(x.numpy())), module(x))
    assert source.count("transpose") == 2  # of the input and of the result: no class changes the axes


class Cell(nn.Module):
    """A recurrent layer of images, whose first state is not an image in MLX's order yet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 6, 3, padding=1)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        a, b = self.conv(torch.cat([x, h], 1)).chunk(2, 1)
        return torch.sigmoid(a) * torch.tanh(b) + h


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = Cell(), nn.Conv2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[0], 3, *x.shape[3:])
        found = []
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
            found.append(self.head(h))
        return torch.stack(found, 1)


def test_steps_over_images_are_a_loop() -> None:
    module, x = Steps().eval(), torch.randn(2, 3, 2, 5, 6)
    model, source = ported(module, x)
    assert "call_2" not in source and "for step in range(T):" in source
    for frames in (x, torch.randn(1, 5, 2, 4, 6)):
        close(model(mx.array(frames.numpy())), module(frames))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            result = result + weights[:, index].unsqueeze(-1) * expert(x)
        h = result
        for layer in self.layers:
            h = torch.relu(layer(h) + result)
        return h


def test_loops_over_experts_and_over_layers_after_another_variable() -> None:
    module, x = Experts().eval(), torch.randn(5, 4)
    model, source = ported(module, x)
    assert "expert in enumerate(self.experts):" in source
    assert "for layer in self.layers:" in source
    close(model(mx.array(x.numpy())), module(x))


class Collected(nn.Module):
    """The values of all turns of a loop are results."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in self.layers:
            x = x + layer(x)
            found.append(x)
        return [x.sum(), *found]


def test_values_of_all_turns_stay_apart() -> None:
    module, x = Collected().eval(), torch.randn(5, 4)
    model, _ = ported(module, x)
    for ours, theirs in zip(model(mx.array(x.numpy())), module(x), strict=True):
        close(ours, theirs)


class Shift(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        return y


def test_values_after_an_index_are_a_concatenation() -> None:
    module, x = Shift().eval(), torch.randn(2, 5, 3)
    model, source = ported(module, x)
    assert "def put" not in source and "mx.concatenate([" in source
    close(model(mx.array(x.numpy())), module(x))


class Numbered(nn.ModuleDict):
    """Layers with numbers as names, which are no list: torchvision's `IntermediateLayerGetter`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.values():
            y = layer(x)
            x = y * y
        return x


def test_layers_with_numbers_as_names_are_called_by_their_names() -> None:
    module, x = Numbered({str(number): nn.Linear(4, 4) for number in range(3)}).eval(), torch.randn(2, 4)
    model, source = ported(module, x)
    assert 'y = self["2"](x)' in source
    close(model(mx.array(x.numpy())), module(x))


class Grid(nn.Module):
    """Takes sizes only, in training mode one more than in evaluation mode and in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, height: int, width: int) -> torch.Tensor:
        if self.training:
            return self.scale * torch.arange(width) + torch.arange(height)[:, None]
        return self.scale * torch.arange(height)[:, None]


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grid = nn.Conv2d(1, 2, 2, 2), Grid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x + self.grid(*x.shape[2:])


class Table(nn.Module):
    def forward(self, height: int, width: int) -> torch.Tensor:
        return torch.ones(height, width).cumsum(0)


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(1, 2, 2, 2), Table()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        _, _, height, width = x.shape
        x = x.reshape(-1, 2, height * width).softmax(-1).reshape(-1, 2, height, width)
        return x + self.table(height, width)


@pytest.mark.parametrize("module", [Positions(), Places()], ids=lambda module: type(module).__name__)
def test_a_module_may_take_sizes_only(module: nn.Module) -> None:
    x = torch.randn(2, 1, 8, 6)
    model, _ = ported(module, x)
    for training in (True, False):
        model.train(training)
        close(model(mx.array(x.numpy())), module.train(training)(x))


def joined(small: list[str], large: list[str], further: tuple[str, ...] = (DOWN,), given: str = "x") -> list[str]:
    """Returns the method of one class for two variants of a block, of which the second has further layers."""
    variants = [
        (["self.fc = nn.Linear(3, 3)", *init], [Body(["self", parameter], [Line(code) for code in lines], [])])
        for init, parameter, lines in (((), "x", small), (further, given, large))
    ]

    def masked(text: str) -> str:
        return re.sub(r"\b\d+\b", "§", text)

    found = union(*variants, masked)
    if found is None:
        return []
    [body] = found[0].written(*variants[0], is_large=False, masked=masked)[1]
    return ["    " * line.depth + line.code for line in body.lines]


def test_the_methods_of_two_variants_are_one_where_they_compute_the_same() -> None:
    small, large = ["y = self.fc(x)", "return y + x"], ["y = self.fc(x)", "z = self.down(x)", "return y + z"]
    assert joined(small, large) == ["y = self.fc(x)", 'z = self.down(x) if "down" in self else x', "return y + z"]
    assert joined(small, large, further=(DOWN, "self.fc.weight = mx.zeros((3, 3))")) == []  # not a layer
    assert joined(small, large, given="state") == []
    for ours, theirs in (("y + x", "y + q"), ("y + x * z", "y + z * z")):  # q is no z, and z has a value before
        code = joined(["y = self.fc(x)", f"return {ours}"], [*large[:2], f"return {theirs}"])
        branches = [
            'if "down" in self:',
            "    z = self.down(x)",
            f"    return {theirs}",
            "else:",
            f"    return {ours}",
        ]
        assert code[1:] == branches


class Layer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.up, self.down = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class TwoConfigurations(nn.Module):
    """The last layer has another configuration than the others."""

    def __init__(self, config: SimpleNamespace, last: SimpleNamespace) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(config.inputs, config.width), nn.Linear(config.width, config.outputs)
        self.first, self.last = Layer(config), Layer(last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.last(self.first(self.input(x))))


def test_an_instance_with_another_configuration_has_its_own_numbers() -> None:
    sizes = {"inputs": 3, "width": 8, "hidden": 12, "outputs": 5, "eps": 1e-6}
    module = TwoConfigurations(SimpleNamespace(**sizes), SimpleNamespace(**{**sizes, "hidden": 20})).eval()
    x = torch.randn(2, 3)
    model, source = ported(module, x)
    assert "last_hidden=20" in source and "self.last = Layer(last_width, last_eps, last_hidden)" in source
    close(model(mx.array(x.numpy())), module(x))
