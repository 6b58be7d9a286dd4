"""Loops, lists and hooks of modules as people write them: their sources, and what they compute."""

from __future__ import annotations

import icenet.blas  # noqa: F401  (before mlx)

import mlx.core as mx
import pytest
import torch
import torch.nn.functional as F
from made_ports import close, ported
from torch import nn

from icenet.core import backends
from icenet.core.porting.source.lines import Line
from icenet.core.porting.source.loops import roll


class Greedy(nn.Module):
    """A decoder that reads its last token, with the states and weights of all steps in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.cell = nn.GRUCell(12, 6)
        self.query = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7)

    def step(self, token: torch.Tensor, hidden: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = (memory @ self.query(hidden)[:, :, None]).softmax(1)
        context = (weights * memory).sum(1)
        hidden = self.cell(torch.cat([self.embedding(token), context], 1), hidden)
        return self.out(hidden), hidden, weights

    def forward(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = memory.mean(1)
        token = torch.zeros(memory.shape[0], dtype=torch.long)
        outputs, attentions = [], []
        for _ in range(4):
            logits, hidden, weights = self.step(token, hidden, memory)
            outputs.append(logits)
            attentions.append(weights)
            token = logits.argmax(-1).detach()
        return torch.stack(outputs, dim=1), torch.cat(attentions, dim=2), hidden


def test_the_steps_of_a_decoder_are_a_loop() -> None:
    torch.manual_seed(0)
    theirs = Greedy().eval()
    ours, source = ported(theirs, torch.randn(2, 5, 6))
    assert "for _ in range(4):" in source and "outputs = []" in source and "attentions.append(weights)" in source
    assert source.count("self.cell(") == 1 and "logits_2" not in source
    memory = torch.randn(3, 8, 6)
    for a, b in zip(ours(mx.array(memory.numpy())), theirs(memory), strict=True):
        close(a, b)


class Score(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.randn(4, 4))

    def forward(self, emissions: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        score = emissions[0]
        for i in range(1, 5):
            score = torch.logsumexp(score[:, :, None] + self.transitions, 1) + emissions[i]
            score = score * (1 + self.transitions[tags[i - 1], tags[i]])[:, None]
        return score


def test_a_loop_reads_the_step_before() -> None:
    theirs = Score()
    emissions, tags = torch.randn(5, 3, 4), torch.randint(0, 4, (5, 3))
    ours, source = ported(theirs, emissions, tags)
    assert "for step in range(1, 5):" in source and "tags[step - 1], tags[step]" in source
    close(ours(mx.array(emissions.numpy()), mx.array(tags.numpy())), theirs(emissions, tags))


def test_turns_that_differ_stay_as_they_are() -> None:
    def rolled(*codes: str) -> list[str]:
        return ["    " * line.depth + line.code for line in roll([Line(code) for code in codes], {})]

    three = ["y = f(x)", "y_2 = f(y)", "y_3 = f(y_2)"]
    assert rolled(*three, "return y_3") == ["y = x", "for _ in range(3):", "    y = f(y)", "return y"]
    assert rolled(*three, "return [y, y_2, y_3]")[:2] == ["y = x", "ys = []"]
    for end in ("return y_3, y", "return [y_2, y_3]", "return y_2 + x"):  # the values of some turns are read
        assert rolled(*three, end) == [*three, end]
    far = ["a = f(x)", "b = f(a, x)", "c = f(b, x)", "d = f(c, a)", "e = f(d, b)", "return e"]  # three turns before
    assert rolled(*far) == far


class Gated(nn.Module):
    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.conv = torch.nn.utils.weight_norm(nn.Conv1d(4, 4, 3, padding=dilation, dilation=dilation))
        self.residual, self.skip = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.tanh(self.conv(x))
        return x + self.residual(z), self.skip(z)


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Gated(2**index) for index in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return total


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_blocks_with_normalized_weights_share_a_class_and_a_loop() -> None:
    """A hook computes the weights; the last block returns a value that nothing reads."""
    theirs = Waves().eval()
    ours, source = ported(theirs, torch.randn(2, 4, 20))
    assert source.count("class Gated") == source.count("class Conv1d") == 1
    assert "weight_norm(self.weight_v, self.weight_g" in source and "for block in self.blocks[1:]:" in source
    x = torch.randn(3, 4, 25)
    close(ours(mx.array(x.numpy())), theirs(x))


class Shared(nn.Module):
    """An activation and a layer that several lists hold, and sizes by `len`."""

    def __init__(self) -> None:
        super().__init__()
        activation, shared = nn.ReLU(), nn.Linear(4, 4)
        self.net = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 4), activation)
        self.stages = nn.ModuleList([nn.ModuleList([shared, nn.Linear(4, 4)]) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net(x)
        for first, second in self.stages:
            x = second(F.silu(first(x)))
        return torch.ones(len(x), len(x)).triu() @ x


def test_what_several_lists_hold(tmp_path: object) -> None:
    theirs = Shared()
    ours, source = ported(theirs, torch.randn(2, 4))
    assert "Sequential([nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU()])" in source
    assert "[None, nn.Linear(4, 4)]" in source
    ours.save_weights(f"{tmp_path}/weights.safetensors")
    ours.load_weights(f"{tmp_path}/weights.safetensors")
    x = torch.randn(5, 4)
    close(ours(mx.array(x.numpy())), theirs(x))


class Composed(nn.Module):
    """As minGPT's block: the attribute is a function that reads a layer by its variable."""

    def __init__(self) -> None:
        super().__init__()
        inner = self.inner = nn.Linear(4, 4)
        self.apply_inner = lambda x: torch.relu(inner(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_inner(x)


def test_the_reference_reads_its_own_layers() -> None:
    theirs, x = Composed(), torch.randn(3, 4)
    reference = backends.module("torch", "porting.run").Reference(theirs, True)
    found = reference.run((x.numpy(),), {}, False)["output[0]"].array
    assert found.dtype == "float64"
    torch.testing.assert_close(torch.from_numpy(found).float(), theirs(x))


class Written(nn.Module):
    """Values that are written into new arrays, into a part of a part, and into an array that is read afterwards."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        boxes = torch.zeros_like(x)
        boxes[..., 0] = x[..., 0].sigmoid()
        boxes[:, 1:, 1] = x[:, 1:, 1] * 2
        boxes[:, 0, 2:] = 3.0
        kept = boxes.exp()
        before = kept + 1
        same = kept
        kept = kept.clone()
        kept[:, 0] = before[:, 1]
        return boxes, before, same, kept


def test_values_are_written_as_in_the_original() -> None:
    theirs, x = Written(), torch.randn(3, 4, 5)
    ours, source = ported(theirs, torch.randn(2, 4, 5))
    assert "boxes[..., 0] = " in source and "boxes[:, 1:, 1] = " in source and "boxes[:, 0, 2:] = 3.0" in source
    given = mx.array(x.numpy())
    for a, b in zip(ours(given), theirs(x), strict=True):
        close(a, b)
    close(given, x)


class Changed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(3, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x[:, 0] = 1.0  # an argument
        self.table[0] = x[0]
        return x * 2, self.table + 1


def test_arguments_and_buffers_are_not_written_in_place() -> None:
    theirs, x = Changed(), torch.randn(3, 4)
    ours, _ = ported(theirs, torch.randn(2, 4))
    given = mx.array(x.numpy())
    for a, b in zip(ours(given), theirs(x.clone()), strict=True):
        close(a, b)
    close(given, x)
    close(ours["table"], theirs.table)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 3
        y = self.drop(h).clone()
        y[:, 0] = 1.0
        return y + h


def test_the_argument_that_dropout_returns_is_not_written_to() -> None:
    theirs, x = Dropped().eval(), torch.randn(3, 4)
    ours, _ = ported(theirs, torch.randn(2, 4))
    close(ours.eval()(mx.array(x.numpy())), theirs(x))


class Scan(nn.Module):
    """The last step computes no next state, whose input would be beyond the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x[:, 0] * 2
        found = []
        for step in range(4):
            found.append(h.exp() * x[:, step])
            if step < 3:
                h = h * 0.5 + x[:, step + 1]
        return torch.stack(found, 1)


def test_a_loop_reads_nothing_beyond_the_end() -> None:
    x = torch.randn(2, 4, 6)
    model, source = ported(Scan(), x)
    assert "for step in range(3):" in source
    close(model(mx.array(x.numpy())), Scan()(x))


class Weighted(nn.Module):
    """Numbers that rise are factors, divisors and terms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for t in range(1, 6):
            y[:, t] = x[:, t] * (t + 1) - (t + 3) + y[:, t - 1] / (t + 2) - (t + 4) * y[:, t - 1]
        return y


def test_a_counter_with_a_number_is_one_factor() -> None:
    x = torch.randn(2, 6, 3)
    model, source = ported(Weighted(), x)
    assert "* (step + 1)" in source
    close(model(mx.array(x.numpy())), Weighted()(x))
