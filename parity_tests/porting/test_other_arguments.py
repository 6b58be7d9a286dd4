"""A class of a port that is made with other arguments computes what the original's class does, or is an error."""

from __future__ import annotations

import random
import runpy
from typing import Any

import icenet.blas  # (before mlx)

import mlx.core as mx
import numpy as np
import pytest
import torch
from made_ports import close
from torch import nn

import icenet


def saved_class(port: Any, folder: Any) -> Any:
    """Returns the class of a saved port, as `python folder/model.py` makes it."""
    return runpy.run_path(str(port.save(folder) / "model.py"))[port.plan.class_name]


class Buckets(nn.Module):
    """A bias for distances, whose buckets the methods compute from an argument that the module does not keep."""

    def __init__(self, dim: int = 8, num_buckets: int = 6, width: int = 16) -> None:
        super().__init__()
        self.bias = nn.Embedding(num_buckets, 1)
        self.fc = nn.Linear(dim, width)
        self.last = num_buckets // 2 - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        distance = (places[None] - places[:, None]).abs().clamp(max=self.last)
        return (self.bias(distance)[..., 0].softmax(-1) @ x) @ self.fc.weight.T


def test_an_argument_that_fixed_numbers_depend_on_is_an_error(tmp_path: Any) -> None:
    x = torch.randn(2, 7, 8)
    port = icenet.port(Buckets(), x)
    assert any("num_buckets" in note and "error" in note for note in port.report.notes)
    kind = saved_class(port, tmp_path)
    with pytest.raises(ValueError, match="num_buckets is 8; the port was made for 6"):
        kind(num_buckets=8)
    theirs = Buckets(width=5)
    close(icenet.from_torch(theirs, kind(width=5))(mx.array(x.numpy())), theirs(x))


class Stack(nn.Module):
    def __init__(self, dim: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(dim, dim, 3, padding=1) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@pytest.mark.parametrize("depth", [1, 3])
def test_weights_of_a_port_with_another_number_of_layers(depth: int, tmp_path: Any) -> None:
    x, theirs = torch.randn(2, 4, 5, 5), Stack(depth=depth)
    kind = saved_class(icenet.port(Stack(), x), tmp_path)
    ours = icenet.from_torch(theirs, kind(depth=depth))
    close(ours(mx.array(x.numpy())), theirs(x))
    back = icenet.to_torch(ours, Stack(depth=depth))
    close(ours(mx.array(x.numpy())), back(x))


class Given(nn.Module):
    """A module that keeps none of its arguments."""

    def __init__(self, kind: type[nn.Module], dim: int = 4) -> None:
        super().__init__()
        self.fc, self.activation = nn.Linear(dim, dim), kind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.fc(x))


def test_arguments_that_are_not_tried_are_in_the_notes() -> None:
    port = icenet.port(Given(nn.ReLU), torch.randn(2, 4))
    assert any("not tried with other values of dim" in note for note in port.report.notes)


class Scores(nn.Module):
    """Attention whose scale the methods compute from sizes that the module does not keep."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1]).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scores(16, 2), Scores(16, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_class_within_a_port_is_right_or_an_error_with_other_arguments(tmp_path: Any) -> None:
    port = icenet.port(Whole(), torch.randn(2, 5, 16))
    kind = runpy.run_path(str(port.save(tmp_path) / "model.py"))["Scores"]
    for given in ((16, 4), (8, 2), (8, 4)):
        theirs, x = Scores(*given), torch.randn(2, 5, given[0])
        try:
            ours = icenet.from_torch(theirs, kind(*given))
        except ValueError as error:
            assert "the port was made for" in str(error) or "takes" in str(error)
        else:
            close(ours(mx.array(x.numpy())), theirs(x))


class Positions(nn.Module):
    """A table of numbers that the original computes and does not save, next to its weights."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.arange(length), persistent=False)
        self.table = nn.Embedding(length, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(self.ids[: x.shape[1]])


def test_a_class_with_arrays_that_the_original_does_not_save_is_not_tried() -> None:
    module = nn.Sequential(Positions(8, 6), nn.Linear(8, 8)).eval()
    x = torch.randn(2, 5, 8)
    port = icenet.port(module, x)
    close(port.module(mx.array(x.numpy())), module(x))
    assert any(note.startswith("Positions: not tried with other arguments, since") for note in port.report.notes)


class Two(nn.Module):
    """A module whose constructor takes no second value of one of its arguments."""

    def __init__(self, dim: int, width: int, groups: int) -> None:
        super().__init__()
        if groups != 3:
            raise ValueError("give 3 groups")
        self.dim, self.width, self.groups = dim, width, groups
        self.fc = nn.Linear(dim, width * groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).view(*x.shape[:-1], self.groups, self.width).sum(-2)


def test_arguments_of_a_class_that_are_not_tried_are_in_the_notes() -> None:
    notes = icenet.port(nn.Sequential(Two(4, 5, 3), nn.ReLU()), torch.randn(2, 4)).report.notes
    assert [note for note in notes if note.startswith("Two (groups): not tried with other arguments, since")]
    notes = icenet.port(nn.Sequential(Given(nn.Tanh, 4), Given(nn.ReLU, 4)), torch.randn(2, 4)).report.notes
    assert [note for note in notes if "not tried" in note and "an argument that the module does not keep" in note]


class Rates(nn.Module):
    def __init__(self, dropout: float = 0.25) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 1, 4, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer(x))


def test_a_rate_of_dropout_that_some_layers_do_not_take_is_an_error(tmp_path: Any) -> None:
    kind = saved_class(icenet.port(Rates(), torch.randn(2, 3, 4)), tmp_path)
    with pytest.raises((TypeError, ValueError), match=r"the port was made for 0\.25|unexpected keyword"):
        kind(dropout=0.5)


class Careless(nn.Module):
    """A module whose constructor prints, draws random numbers, and ends the process with some arguments."""

    def __init__(self, dim: int = 4, width: int = 6) -> None:
        super().__init__()
        print("a new module", random.random(), np.random.rand())
        if dim != 4:
            raise SystemExit(f"dim is {dim}")
        self.fc = nn.Linear(dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_effects_of_a_constructor_are_not_seen(capsys: pytest.CaptureFixture[str]) -> None:
    module = Careless()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    capsys.readouterr()
    port = icenet.port(module, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert "a new module" not in "".join(capsys.readouterr())
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert any("not tried with other values of dim" in note for note in port.report.notes)


class Hooked(nn.Module):
    """A module that registers a hook in its first call, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.is_hooked = nn.Linear(4, 6), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_hooked:
            self.fc.register_forward_hook(lambda layer, args, output: output * 2)
            self.is_hooked = True
        return self.fc(x)


def test_hooks_of_the_first_call(tmp_path: Any) -> None:
    x, module = torch.randn(2, 4), Hooked()
    kind = saved_class(icenet.port(module, x), tmp_path)
    assert not module.is_hooked and not module.fc._forward_hooks
    close(icenet.from_torch(module, kind())(mx.array(x.numpy())), module(x))
