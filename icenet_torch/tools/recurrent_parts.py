"""Recurrent layers of several layers or directions as one module for each of them, as they are written with MLX.

`mlx.nn.LSTM`, `GRU` and `RNN` have one layer and one direction. So a user writes two of them for
`bidirectional=True`, and one for each of `num_layers`. MLX has no cells, so a user calls such a layer with a sequence
of one step. `with_parts` returns a module whose layers and cells can be compared with those one by one.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from icenet_torch.tools.calls import held_results

_SIZES = (
    "input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "mode", "proj_size"
)  # fmt: skip


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CELLS: dict[type, type[nn.RNNBase]] = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU, nn.RNNCell: nn.RNN}
_WEIGHT = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh)(?:_(l\d+(?:_reverse)?))?")


class Cell(nn.Module):
    """Computes what a cell of PyTorch does, with a layer that gets a sequence of one step.

    The layer is `l0`, and has the parameters of the cell.

    Args:
        whole: An LSTMCell, GRUCell or RNNCell.
    """

    part_names = ("l0",)

    def __init__(self, whole: nn.RNNCellBase) -> None:
        super().__init__()
        for name in ("input_size", "hidden_size", "bias"):
            setattr(self, name, getattr(whole, name))
        self.l0 = _part(whole, "", whole.input_size)
        self.train(whole.training)

    def __getattr__(self, name: str) -> Any:
        found = _weight(self, name)
        return super().__getattr__(name) if found is None else found

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        is_pair = isinstance(hx, tuple)
        given = tuple(item.unsqueeze(0) for item in hx) if is_pair else hx if hx is None else hx.unsqueeze(0)
        outputs, state = self.l0(input.unsqueeze(-2), given)
        hidden = outputs.squeeze(-2)
        return (hidden, state[1].squeeze(0)) if isinstance(state, tuple) else hidden


class Parts(nn.Module):
    """Computes what a recurrent layer of PyTorch does, with a module for each layer and direction.

    The modules are `l0`, `l0_reverse`, `l1` and so on, and have the parameters of the whole. Between layers is the
    dropout of the whole, if it has one.

    Args:
        whole: An LSTM, GRU or RNN without projections.
    """

    def __init__(self, whole: nn.RNNBase) -> None:
        super().__init__()
        for name in _SIZES:
            setattr(self, name, getattr(whole, name))
        self.part_names = tuple(part_names(whole))
        directions = 2 if whole.bidirectional else 1
        for index, name in enumerate(self.part_names):
            size = whole.input_size if index < directions else directions * whole.hidden_size
            setattr(self, name, _part(whole, name, size))
        self.between = nn.Dropout(whole.dropout) if whole.dropout and whole.num_layers > 1 else None
        self.train(whole.training)

    def __getattr__(self, name: str) -> Any:
        found = _weight(self, name)
        return super().__getattr__(name) if found is None else found

    def flatten_parameters(self) -> None:
        """Does nothing: the parts have arrays of their own."""

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        if isinstance(input, PackedSequence):
            raise NotImplementedError(
                "a layer of several layers or directions is compared with padded sequences only"
            )
        time = 1 if self.batch_first and input.ndim == 3 else 0
        states = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                own = None if hx is None else _at(hx, index)
                given = input.flip(time) if direction else input
                output, state = getattr(self, self.part_names[index])(given, own)
                outputs.append(output.flip(time) if direction else output)
                states.append(state)
            input = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
            if self.between is not None and layer < self.num_layers - 1:
                rows_first = input.movedim(time, -2)  # as in MLX, so that equal rows have equal masks
                input = self.between(rows_first).movedim(-2, time)
        if isinstance(states[0], tuple):
            return input, tuple(torch.cat(list(items)) for items in zip(*states, strict=True))
        return input, torch.cat(states)


def part_names(whole: nn.Module) -> list[str]:
    """Returns the names of the parts of a recurrent layer: `l0`, `l0_reverse`, `l1`, ...; of a cell, `l0`."""
    if not isinstance(whole, nn.RNNBase):
        return ["l0"]
    ends = ("", "_reverse") if whole.bidirectional else ("",)
    return [f"l{layer}{end}" for layer in range(whole.num_layers) for end in ends]


def with_parts(module: nn.Module, counts: Mapping[str, int], kept: Collection[str] = ()) -> nn.Module:
    """Returns a copy of a module in which its recurrent layers are divided, or the module itself if none is.

    The copy has the parameters of the module.

    Args:
        module: Any module.
        counts: How many layers of one direction the other side has, by class: "LSTM", "GRU" or "RNN". Those of a
            class are divided if there are as many as parts. A layer with hooks, such as that of the old
            `torch.nn.utils.weight_norm`, stays whole: they would not be called.
        kept: Paths at which the other side has a module of another kind. A cell at such a path stays as it is.
    """
    kinds = (*_CELLS, *_CELLS.values())
    layers = [
        inner
        for path, inner in module.named_modules()
        if type(inner) in kinds and not (type(inner) in _CELLS and path in kept)
    ]
    needed: Counter[str] = Counter()
    for layer in layers:
        needed[_class_of(layer)] += len(part_names(layer))
    memo: dict[int, Any] = {}
    for layer in layers:
        has_hooks = any(vars(layer)[name] for name in _HOOKS)
        is_cell = type(layer) in _CELLS
        is_divided = is_cell or (len(part_names(layer)) > 1 and not layer.proj_size)
        if is_divided and not has_hooks and needed[_class_of(layer)] <= counts.get(_class_of(layer), 0):
            shown = type(type(layer).__name__, (Cell if is_cell else Parts,), {"__module__": Parts.__module__})
            memo[id(layer)] = shown(layer)
    if not memo:
        return module
    memo |= {id(parameter): parameter for parameter in module.parameters()} | held_results(module)
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied


def _class_of(layer: nn.Module) -> str:
    return _CELLS.get(type(layer), type(layer)).__name__


def _part(whole: Any, name: str, size: int) -> nn.RNNBase:
    """Returns one layer and direction of a recurrent layer, or the layer for a cell, with its parameters.

    Args:
        whole: The recurrent layer or cell.
        name: The name of the part; empty for a cell.
        size: Size of its inputs.
    """
    options: dict[str, Any] = {"nonlinearity": whole.nonlinearity} if hasattr(whole, "nonlinearity") else {}
    options |= {"bias": whole.bias, "batch_first": getattr(whole, "batch_first", True), "device": "meta"}
    part: nn.RNNBase = _CELLS.get(type(whole), type(whole))(size, whole.hidden_size, **options)
    for own in list(part._parameters):
        setattr(part, own, getattr(whole, own.replace("_l0", f"_{name}" if name else "")))
    return part


def _weight(divided: nn.Module, name: str) -> Any:
    """Returns the weight of a part by its name in the whole, for code that reads it; None for other names."""
    found = _WEIGHT.fullmatch(name)
    part = vars(divided).get("_modules", {}).get(found[2] or "l0") if found else None
    return None if part is None or found is None else getattr(part, f"{found[1]}_l0")


def _at(state: Any, index: int) -> Any:
    """Returns the state of a part: one row of each array."""
    if isinstance(state, tuple):
        return tuple(_at(item, index) for item in state)
    return state[index : index + 1]
