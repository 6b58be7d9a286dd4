"""Loops over an open size: one port serves every number of steps."""

from __future__ import annotations

import itertools

import icenet.blas  # before mlx

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn

import icenet


class Cells(nn.Module):
    """A recurrent layer in both directions, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.forth, self.back = nn.Linear(7, 4), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        h = x.new_zeros(batch, 4)
        forth, back = [], []
        for t in range(length):
            h = torch.tanh(self.forth(torch.cat([x[:, t], h], -1)))
            forth.append(h)
        h = x.new_zeros(batch, 4)
        for t in reversed(range(length)):
            h = torch.tanh(self.back(torch.cat([x[:, t], h], -1)))
            back.append(h)
        back.reverse()
        return torch.cat([torch.stack(forth, 1), torch.stack(back, 1)], -1) + x.mean(-1, keepdim=True)


class Partition(nn.Module):
    """The sum over the paths of a conditional random field, whose loop begins at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha = x[:, 0]
        for t in range(1, x.size(1)):
            alpha = torch.logsumexp(alpha.unsqueeze(2) + self.transitions + x[:, t].unsqueeze(1), dim=1)
        return torch.logsumexp(alpha, dim=1)


class Average(nn.Module):
    """A moving average, whose first value is in the list before the loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [x[:, 0]]
        for t in range(1, x.shape[1]):
            found.append(0.7 * found[-1] + 0.3 * x[:, t])
        return torch.stack(found, dim=1)


class Parts(nn.Module):
    """A loop over the parts of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, found = x.new_zeros(x.size(0), 4), []
        for part in x.unbind(1):
            h = self.cell(part, h)
            found.append(h.unsqueeze(1))
        return torch.cat(found, dim=1)


class Repeated(nn.Module):
    """Joins as many parts of an open size as the example has steps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x[:, 0]
        for t in range(1, x.shape[1]):
            y = torch.sin(y) + x[:, t]
        return torch.cat([x, x + 1, x, x, x], 1) + y.unsqueeze(1)


class Taps(nn.Module):
    """Two values are assigned at once."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.new_zeros(x.shape[0], 3), x.new_ones(x.shape[0], 3)
        for t in range(x.shape[1]):
            a, b = b, torch.tanh(a * self.w + b + x[:, t])
        return a - b


class Together(nn.Module):
    """A loop over the parts of two tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, found = x.new_zeros(x.size(0), 3), []
        for part, gate in zip(x.unbind(1), torch.sigmoid(x).unbind(1), strict=True):
            h = gate * torch.tanh(h + part)
            found.append(h)
        return torch.stack(found, dim=1)


class Kept(nn.Module):
    """Parts that keep their axis, by a comprehension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.sin(part) * 2 for part in x.split(1, dim=1)], dim=1)


class Named(nn.Module):
    """Parts and joins by keywords, of which PyTorch has two names for some."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.chunk(x, 2, axis=2)  # type: ignore[call-overload]
        (c,) = torch.split(tensor=b, split_size_or_sections=2, dim=2)
        found = [torch.tanh(a + c)[:, t] for t in range(x.shape[1])]
        whole = torch.stack(found, axis=1)  # type: ignore[call-overload]
        return torch.cat([whole, *x.unbind(axis=0)[:0]], axis=1)  # type: ignore[call-overload, call-arg]


class Grid(nn.Module):
    """A loop over rows with a loop over columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, rows = x.new_zeros(x.size(0)), []
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                h = torch.tanh(h + x[:, i, j])
            rows.append(h)
        return torch.stack(rows, dim=1)


class Prefixes(nn.Module):
    """Each step reads all values up to its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for t in range(x.size(1)):
            weights = (x[:, : t + 1] @ x[:, t].unsqueeze(-1)).softmax(1)
            found.append((weights * x[:, : t + 1]).sum(1))
        return torch.stack(found, 1)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Taps(), ["for step in range(T):", "a, b = b, mx.tanh("]),
        (Together(), ["for step in range(T):", "x[:, step]"]),
        (Named(), []),
        (Kept(), ["for step in range(T):", "x[:, step:step + 1]"]),
        (Grid(), ["for step in range(T):", "for i in range(C):", "x[:, step, i]"]),
        (Prefixes(), ["for step in range(1, T + 1):", "x[:, :step]"]),
        (Cells(), ["for step in range(T):", "for i in reversed(range(T)):", "back[::-1]"]),
        (Partition(), ["T = x.shape[1]", "for step in range(1, T):"]),
        (Average(), ["for step in range(1, T):"]),
        (Parts(), ["for step in range(T):", "self.cell(x[:, step], h)"]),
        (Repeated(), ["for step in range(1, T):"]),
    ],
)
def test_a_loop_over_a_length_has_its_size(module: nn.Module, expected: list[str]) -> None:
    ours, source = ported(module, torch.randn(2, 5, 3))
    assert all(text in source for text in expected)
    for shape in ((1, 5, 3), (3, 8, 3), (2, 2, 3), (2, 1, 3)):
        x = torch.randn(shape)
        close(ours(mx.array(x.numpy())), module(x))


class Zipped(nn.Module):
    """A loop over the parts of two inputs, whose sizes an export takes for different ones."""

    def forward(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(x[:, 0])
        for part, gate in zip(x.unbind(1), gates.unbind(1), strict=True):
            h = torch.tanh(h + part) * gate[:, None]
        return h


def test_inputs_of_one_loop_have_one_length() -> None:
    ours, source = ported(Zipped(), torch.randn(2, 5, 4), torch.rand(2, 5))
    assert "for step in range(T):" in source
    x, gates = torch.randn(3, 8, 4), torch.rand(3, 8)
    close(ours(mx.array(x.numpy()), mx.array(gates.numpy())), Zipped()(x, gates))


class Halving(nn.Module):
    """Steps that a loop in the source cannot have, since each is another expression."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for t in range(x.shape[1]):
            x = x * (0.5 + t / 3)
        return x


class Uneven(nn.Module):
    """A mask may be longer than the values, whose number is that of the steps."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for t in range(x.shape[1]):
            x = x * (mask[:, t : t + 1] + t / 3)
        return x


def test_a_loop_whose_steps_differ_has_those_of_the_example() -> None:
    port = icenet.port(Halving(), torch.randn(2, 3))
    assert port.report.notes[0].startswith("x has a fixed size, 3 in dimension 1")
    with pytest.raises(ValueError, match="x has 4 in dimension 1; the port was made for 3"):
        port.module(mx.zeros((2, 4)))


def test_steps_that_need_equal_sizes_of_two_inputs_are_not_accepted_in_silence() -> None:
    port = icenet.port(Uneven(), (torch.randn(2, 3), torch.randn(2, 3)))
    with pytest.raises(ValueError, match="x has 4 in dimension 1; the port was made for 3"):
        port.module(mx.zeros((2, 4)), mx.zeros((2, 4)))


def test_part_of_a_size_as_the_number_of_steps_is_served_or_refused() -> None:
    class Blocks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.new_zeros(x.shape[0])
            for t in range(x.shape[1] // 2):
                y = torch.sin(y + x[:, t]) * 2
            return y

    port = icenet.port(Blocks(), torch.randn(2, 6))
    x = torch.randn(2, 13)
    close(port.module(mx.array(x.numpy())), Blocks()(x))


def test_a_loop_over_an_array_of_numbers_reads_its_elements() -> None:
    class Lags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x)
            for k in range(3):
                y = y + self.w[k] * torch.roll(x, k, 1)
            return y

    theirs = Lags()
    ours, source = ported(theirs, torch.randn(2, 6))
    assert "enumerate(self.w)" in source
    x = torch.randn(3, 4)
    close(ours(mx.array(x.numpy())), theirs(x))


def test_complex_parameters_are_noted_for_the_optimizers() -> None:
    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, dtype=torch.cfloat))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.w).real

    notes = icenet.port(Phase(), torch.randn(2, 3)).report.notes
    assert any(note.startswith("w is complex: optimizers of MLX that square gradients") for note in notes)


class UNet(nn.Module):
    """Its skips are in a list, which the way up takes from its end."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (2, 3, 4, 5)
        self.downs = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 2, 2)])
            for a, b in itertools.pairwise(sizes)
        )
        self.ups = nn.ModuleList()
        for size in (5, 4, 3):
            self.ups.append(nn.ConvTranspose2d(5, size, 2, 2))
            self.ups.append(nn.Conv2d(2 * size, 5, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for conv, down in self.downs:
            x = torch.relu(conv(x))
            skips.append(x)
            x = down(x)
        for index in range(0, len(self.ups), 2):
            x = self.ups[index](x)
            x = torch.relu(self.ups[index + 1](torch.cat([x, skips.pop()], 1)))
        return x


def test_a_unet_has_its_loops_and_its_list_of_skips() -> None:
    theirs = UNet().eval()
    ours, source = ported(theirs, torch.randn(2, 2, 16, 16))
    for text in ("for conv, down in self.downs:", "skips.append(x)", "for step in range(0, 6, 2):", "skips.pop()"):
        assert text in source, source
    assert "x_2" not in source  # nothing reads the earlier x after a skip is in the list
    x = torch.randn(1, 2, 8, 24)
    close(ours(mx.array(x.numpy())), theirs(x))


def test_expressions_are_those_that_a_person_writes() -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            a, b = pair
            y = F.pad(x, (0, 0, 1, -1)) * (1 / 24)
            z = torch.einsum("bct,bcs->bts", y.transpose(1, 2), x.transpose(1, 2))
            largest = torch.zeros_like(x).scatter(2, x.argmax(2, keepdim=True), y[..., :1])
            return F.glu(largest, 2) + z.sum() + F.mse_loss(a, b) + x[:, 0][:, 2].sum()

    theirs = Mixed()
    x, a, b = torch.randn(2, 5, 4), torch.randn(2, 3), torch.randn(2, 3)
    ours, source = ported(theirs, x, (a, b))
    for text in (
        *("a, b = pair", "mx.pad(x[:, :-1], ", "1 / 24", "nn.glu(", "mx.put_along_axis("),
        *('"btc,bsc->bts", y, x', "x[:, 0, 2]"),
    ):
        assert text in source, source
    close(ours(*(mx.array(x.numpy()), (mx.array(a.numpy()), mx.array(b.numpy())))), theirs(x, (a, b)))


class Late(nn.Module):
    """A decision that no turn of the example makes."""

    def __init__(self, decides: str) -> None:
        super().__init__()
        self.decides, self.warm_up, self.at = decides, 14, [24, 28]
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, found = x[:, 0], []
        for t in range(x.shape[1]):
            if self.decides == "break" and t > self.warm_up:
                break
            h = torch.tanh(h + self.scale * x[:, t])
            if self.decides == "gradient" and t and t % 16 == 0:
                h = h.detach()
            if self.decides == "list" and t in self.at:
                h = h * 2
            found.append(h)
        return torch.stack(found[-20:], 1).sum(1) if self.decides == "slice" else h


class First(nn.Module):
    """A loop over the first of some weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.sum(1)
        for t in range(x.shape[1]):
            h = torch.tanh(h + x[:, t : t + 1].sum(1) * self.w[t])
        return h


@pytest.mark.parametrize("module", [Late("break"), Late("gradient"), Late("list"), Late("slice"), First()])
def test_turns_that_the_example_does_not_have_are_tried(module: nn.Module) -> None:
    port = icenet.port(module, torch.randn(2, 4, 3))
    for size in (3, 40):
        with pytest.raises(ValueError, match=f"x has {size} in dimension 1; the port was made for 4"):
            port.module(mx.zeros((2, size, 3)))


class Window(nn.Module):
    """Sums of the last three steps: the first turns take fewer and are written before the loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, max(0, t - 2) : t + 1].sum(1) for t in range(x.shape[1])], 1)


def test_turns_before_a_loop_are_the_least_number_of_steps() -> None:
    x = torch.randn(2, 6, 3)
    port = icenet.port(Window(), x)
    assert port.report.limits == {"x": {1: [3, None]}}
    close(port.module(mx.array(x[:, :3].numpy())), Window()(x[:, :3]))
    with pytest.raises(ValueError, match="made for at least 3"):
        port.module(mx.array(x[:, :2].numpy()))
