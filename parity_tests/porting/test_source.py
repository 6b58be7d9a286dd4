"""The source of a port in the form that a person writes, and that it computes the same."""

from __future__ import annotations

import ast
import re
from typing import Any

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from mlx.utils import tree_flatten
from torch import nn

from icenet.core.porting.kinds import Helpers
from icenet.core.porting.source.lines import Line, wrapped
from icenet.core.porting.source.loops import roll
from icenet.core.porting.source.simplify import simplified, text
from icenet.core.porting.source.specialize import NOT_NONE, Calls, specialized


class Layer(nn.Module):
    """A recurrent layer whose states are all used."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(3, 4, **options)

    def forward(self, x: torch.Tensor, h0: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        y, states = self.layer(x) if h0 is None else self.layer(x, (h0, 2 * h0) if self.is_lstm() else h0)
        return (y, *states) if self.is_lstm() else (y, states)

    def is_lstm(self) -> bool:
        return isinstance(self.layer, nn.LSTM)


RECURRENT: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "two layers in both directions": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "projected": (nn.LSTM, {"proj_size": 2, "bias": False, "num_layers": 2, "dropout": 0.5}),
    "GRU": (nn.GRU, {"num_layers": 2, "batch_first": True}),
    "GRU in both directions": (nn.GRU, {"bidirectional": True, "bias": False}),
    "RNN": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True, "num_layers": 2}),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_layer_is_a_class_with_its_options(name: str) -> None:
    torch.manual_seed(0)
    kind, options = RECURRENT[name]
    module, x = Layer(kind, **options).eval(), torch.randn(5, 2, 3)
    model, source = ported(module, x)
    for sizes in ((5, 2, 3), (3, 4, 3)):
        x = torch.randn(sizes)
        for ours, theirs in zip(model(mx.array(x.numpy())), module(x), strict=True):
            close(ours, theirs)
    names = re.findall(r"^class (\w+)", source, re.MULTILINE)
    assert names == [f"Bi{kind.__name__}" if "bidirectional" in options else kind.__name__, "Layer"]
    assert re.findall(r"^def (\w+)", source, re.MULTILINE) == [kind.__name__.lower()]
    assert "b_ih is None" not in source and "w_hr is" not in source and max(map(len, source.splitlines())) <= 118
    assert {path for path, _ in tree_flatten(model.parameters())} == set(module.state_dict())
    named = dict(tree_flatten(type(model)().parameters()))  # the values with which PyTorch begins
    assert all(0 < mx.abs(value).max().item() <= 4**-0.5 for value in named.values())
    if "dropout" in options:  # between the layers only
        calls: list[int] = []
        model.layer.dropout = lambda x: calls.append(1) or x
        model(mx.zeros((5, 2, 3)))
        assert len(calls) == options["num_layers"] - 1


@pytest.mark.parametrize(
    ("kind", "options", "x_size", "state_size"),
    [
        (nn.LSTM, {"batch_first": True}, (2, 5, 3), (1, 2, 4)),
        (nn.GRU, {"batch_first": True}, (2, 5, 3), (1, 2, 4)),
        (nn.GRU, {"num_layers": 2, "bidirectional": True}, (5, 2, 3), (4, 2, 4)),
        (nn.LSTM, {}, (5, 3), (1, 4)),  # without a batch
        (nn.GRU, {"bidirectional": True}, (5, 3), (2, 4)),
    ],
)
def test_a_recurrent_layer_takes_an_initial_state(
    kind: type[nn.RNNBase], options: dict[str, Any], x_size: tuple[int, ...], state_size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module, x, h0 = Layer(kind, **options).eval(), torch.randn(x_size), torch.randn(state_size)
    model, source = ported(module, x, h0)
    for ours, theirs in zip(model(mx.array(x.numpy()), mx.array(h0.numpy())), module(x, h0), strict=True):
        close(ours, theirs)
    assert ("def __call__(self, x, states):" if kind is nn.LSTM else "def __call__(self, x, h0):") in source


class Twice(nn.Module):
    """A layer that is called without and with a state, and one without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRU(3, 4), nn.LSTM(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, h = self.gru(x)
        y, _ = self.gru(x, h)
        return self.lstm(y[:, 0])[0]


def test_a_recurrent_layer_serves_calls_with_and_without_a_state() -> None:
    torch.manual_seed(0)
    module, x = Twice().eval(), torch.randn(5, 2, 3)
    model, source = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))
    assert "h0=None" in source and "_, h = self.gru(x)" in source


class Ranks(nn.Module):
    """A layer that is called with a batch and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.gru(x)
        return self.gru(y[:, 0])[0]


def test_a_recurrent_layer_serves_calls_with_and_without_a_batch() -> None:
    torch.manual_seed(0)
    module, x = Ranks().eval(), torch.randn(5, 2, 3)
    model, _ = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))


class Shared(nn.Module):
    """A layer whose weights another module has, which no class of its own can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.RNN(3, 3), nn.RNN(3, 3)
        self.b.weight_hh_l0 = self.a.weight_hh_l0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)[0])[0]


def test_a_recurrent_layer_with_the_weights_of_another_is_ported() -> None:
    torch.manual_seed(0)
    module, x = Shared().eval(), torch.randn(5, 2, 3)
    model, _ = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))
    assert len(tree_flatten(model.parameters())) == len(list(module.parameters()))


class Decoder(nn.Module):
    """A loop over steps that appends, inner functions and tuples of variables."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(4, 4), nn.Linear(4, 2)
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.Tanh()))
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.full((4,), 0.5))

    def halves(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat([right, -left], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        h, c = self.halves(x[:, 0]), self.halves(x[:, 1])
        outputs = []
        for step in range(4):
            h, c = self.cell(x[:, step] * self.scale + self.shift, (h, c))
            outputs.append(self.out(h))
        return torch.stack(outputs, 1)


def test_a_source_has_the_loops_functions_and_names_of_the_original() -> None:
    torch.manual_seed(0)
    module, x = Decoder().eval(), torch.randn(2, 4, 3)
    model, source = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))
    for line in (
        "left, right = mx.split(",
        "for step in range(4):",
        "h, c = self.cell(x[:, step] * self.scale + self.shift, h, c)",
        "outputs.append(self.out(h))",
        "return mx.stack(outputs, axis=1)",
        "x = self.stem(x)",
        "self.stem = Sequential([nn.Linear(3, 4), Sequential([nn.LayerNorm(4), nn.Tanh()])])",
        "self.scale = mx.ones((4,))",
        "self.shift = mx.full((4,), 0.5)",
    ):
        assert line in source
    assert {path for path, _ in tree_flatten(model.parameters())} == set(module.state_dict())


class Parts(nn.Module):
    """A sequence one of whose layers is called by itself, and one that changes the order of axes."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.images = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(nn.Flatten(2), nn.Softmax(-1)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.images(x)
        return self.used(images.mean(-1)) + self.used[0](images.sum(-1)), images


def test_a_sequence_is_called_as_a_whole_or_by_its_layers() -> None:
    torch.manual_seed(0)
    module, x = Parts().eval(), torch.randn(2, 2, 5, 6)
    model, source = ported(module, x)
    for ours, theirs in zip(model(mx.array(x.numpy())), module(x), strict=True):
        close(ours, theirs)
    assert "self.used(" in source and "self.used[0](" in source


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("y = (a * b) + (c / d)", "y = a * b + c / d"),
        ("return (a, (b + c))", "return a, b + c"),
        ("y = x / 2.8284271247461903", "y = x / math.sqrt(8)"),
        ("y = x * 0.09999999999999998", "y = x * (1 - 0.9)"),
        ("y = x * 2.0794415416798357", "y = x * math.log(8)"),
        ("y = x / 2.302585092994046", "y = x / math.log(10)"),
        ("y = x * 0.14391156831212787", "y = x * (math.log(10000) / 64)"),
        ("y = x * 2.0794415416798353", "y = x * 2.0794415416798353"),  # of no number that is known
        ("y = x * 0.09999999999999996", "y = x * 0.09999999999999996"),
        ("y = mx.where(mx.logical_not(m), a, b)", "y = mx.where(m, b, a)"),
        ("y = x.swapaxes(1, 2).transpose(0, 2, 1)", "y = x"),
        ("y = x.transpose(0, 2, 3, 1).transpose(0, 3, 1, 2)", "y = x"),
        ("y = x.transpose(1, 0, 2).transpose(0, 2, 1)", "y = x.transpose(1, 2, 0)"),
        ("y = x.T.T", "y = x"),
        ("y = x.swapaxes(1, 2).swapaxes(2, 1)", "y = x"),
        ("y = x.swapaxes(1, 2).swapaxes(1, 3)", "y = x.swapaxes(1, 2).swapaxes(1, 3)"),
        ("y = x[:, 0][:, None]", "y = x[:, 0, None]"),
        ("y = x[0][None]", "y = x[0][None]"),  # x may be a tuple
        ("y = x[:, 1:3, 0][:, :, None]", "y = x[:, 1:3, 0, None]"),
        ("y = x[mask][:, None]", "y = x[mask][:, None]"),
        ("y = f('it\\'s', 'b')", 'y = f("it\'s", "b")'),
        ("y = any((item for item in x))", "y = any(item for item in x)"),
        ("if a is (not None):", "if a is (not None):"),
    ],
)
def test_an_expression_is_simple(code: str, expected: str) -> None:
    assert text(simplified(code)) == expected


def test_a_simple_index_reads_the_same_elements() -> None:
    names = {"x": mx.arange(120).reshape(2, 3, 4, 5)}
    for code in ("x[:, 0][:, None]", "x[:, 1:3, 0][:, :, None]", "x[:, :, 1][None, :, :, None]"):
        joined = text(simplified(code))
        assert "][" not in joined
        np.testing.assert_array_equal(np.array(eval(joined, names)), np.array(eval(code, names)))


def test_a_long_expression_has_an_operand_on_each_line() -> None:
    mask = f"({'a' * 60} <= b[:, None])"
    assert wrapped(f"y = {mask} & {mask}", 4) == ["    y = (", f"        {mask}", f"        & {mask}", "    )"]
    code = f"return conv({'x' * 90}, 1) + self.bias if c else f({', '.join('b' * 60)})"
    lines = wrapped(code, 8)
    assert lines[0] == "        return (" and max(map(len, lines)) <= 112
    assert ast.dump(ast.parse("\n".join(lines).strip())) == ast.dump(ast.parse(code))
    assert wrapped(f"y = {'a' * 120}", 0) == [f"y = {'a' * 120}"]


def functions(name: str, *calls: str) -> str:
    trees: list[ast.AST] = [ast.parse(call) for call in calls]
    return "\n".join(specialized(Helpers({name}), Calls(trees)))


def test_a_function_has_the_branches_that_its_calls_take() -> None:
    both = functions("clip", "y = clip(x, 0, 1)", "z = clip(x, 0, 2)")
    assert "if low" not in both and both.count("mx.where") == 2
    low = functions("clip", "y = clip(x, low, None)")
    assert low.count("mx.where") == 1 and "def clip(x, low):" in low
    either = functions("clip", "y = clip(x, 0, None)", "z = clip(x, None, 1)")
    assert "if low is not None" in either and "if high is not None" in either
    call = ast.parse("y = clip(x, 0, None)")
    specialized(Helpers({"clip"}), Calls([call]))
    assert ast.unparse(call) == "y = clip(x, 0)"
    given = dict.fromkeys(["x", "h", "c", "w_ih", "w_hh"], NOT_NONE)
    (lstm,) = specialized(Helpers({"lstm"}), Calls([], {"lstm": [given]}))
    assert "def lstm(x, h, c, w_ih, w_hh):" in lstm and "None" not in lstm and "# " not in lstm


def test_a_parameter_that_may_be_none_keeps_its_branch() -> None:
    """`gru_cell` passes its biases on; one of its calls has none."""
    trees: list[ast.AST] = [ast.parse(f"y = gru_cell(x, h, w, v, {given})") for given in ("None, None", "a, b")]
    assert all("is None" in code for code in specialized(Helpers({"gru_cell"}), Calls(trees)) if "def gru(" in code)
    biased: list[ast.AST] = [ast.parse("y = gru_cell(x, h, w, v, a, b)")]
    assert all("is None" not in code for code in specialized(Helpers({"gru_cell"}), Calls(biased)))


def test_statements_that_repeat_are_a_loop() -> None:
    def rolled(*codes: str) -> list[str]:
        return ["    " * line.depth + line.code for line in roll([Line(code) for code in codes], {})]

    steps = [f"h = f(x[{step}], h, 7)" for step in range(2, 6)]
    assert rolled("h = y", *steps) == ["h = y", "for step in range(2, 6):", "    h = f(x[step], h, 7)"]
    assert rolled(*["h = f(h)"] * 3) == ["for _ in range(3):", "    h = f(h)"]
    assert rolled(*(f"h = f(x[{step}])" for step in (0, 2, 4)))[0] == "for step in range(0, 6, 2):"
    for other in (
        ["h = f(h)"] * 2,
        ["a = x[0]", "b = x[1]", "c = x[2]", "return f(a, b, c)"],
        ["h = f(x[0])", "h = f(x[2])", "h = f(x[5])"],
    ):
        assert rolled(*other) == other


class OneClass(nn.Module):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.log_softmax(x, 1), F.cross_entropy(x[:, :1], target)


def test_a_softmax_over_one_element() -> None:
    """nn.log_softmax of MLX 0.32 ends the process if the axis has one element."""
    x, target = torch.randn(3, 2), torch.tensor([0, 0, 0])
    model, source = ported(OneClass(), x, target)
    assert "nn.log_softmax" not in source
    for size in (2, 1):
        for ours, theirs in zip(
            model(mx.array(x[:, :size].numpy()), mx.array(target.numpy())),
            OneClass()(x[:, :size], target),
            strict=True,
        ):
            close(ours, theirs)


class Classes(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.fc(x), dim=-1)


def test_a_class_of_one_class() -> None:
    made: dict[str, Any] = {}
    exec(ported(Classes(), torch.randn(2, 4))[1], made)
    assert not made["Classes"](num_classes=1)(mx.zeros((64, 4))).any()


class Updated(nn.Module):
    """Buffers that are read before they change, and whose values depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.ones(3))
        self.register_buffer("b", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, before = x * self.a, self.b.clone()
        total = self.a + self.b
        self.a += 1
        self.b.copy_(total)
        return y, before, self.a.clone()


def test_what_is_read_before_an_update_is_the_value_before() -> None:
    module, x = Updated().eval(), torch.randn(2, 3)
    model, _ = ported(module, x)
    module = Updated().eval()
    for _ in range(3):
        for ours, theirs in zip(model(mx.array(x.numpy())), module(x), strict=True):
            close(ours, theirs)
    close(model.a, module.a)
    close(model.b, module.b)


class Strided(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, ::2].mul_(3.0)
        return y


def test_an_update_of_every_other_column_leaves_the_others() -> None:
    module, x = Strided(), torch.randn(2, 5)
    model, _ = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))


class Copies(nn.Module):
    """A copy that changes nothing, whose result an export takes for its argument in all that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = Scaled(), Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.norm(x) * 1.0
        return (y + self.other(y)) / 1


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.float32)
        return self.weight * x


def test_a_copy_is_no_result_of_a_module() -> None:
    module, x = Copies().eval(), torch.randn(2, 3)
    model, source = ported(module, x)
    close(model(mx.array(x.numpy())), module(x))
    assert source.count("class Scaled") == 1 and "return self.weight * x\n" in source
    assert "y = x + self.norm(x)" in source and "return y + self.other(y)" in source
