"""Loops over an open size, such as `for t in range(x.shape[1])`.

An export runs a loop in Python, so its number of steps would fix the size. Here `range` runs the steps of the example
and keeps the size open, and the writer of the source gives the loop its size again. `torch.stack` and `torch.cat` of
a list that has as many elements as such a loop has steps have the size, too. A port whose loops need more is found by
its proof; it is made without this.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from icenet.core.porting.record import OpenLoop
from icenet.core.porting.source.conditions import numbers_around
from icenet.core.porting.source.originals import loop_at
from icenet_torch.porting.sizes import changed_names

_library = torch.library.Library("icenet_step", "DEF")
for _name in ("stack", "cat"):
    _library.define(f"{_name}(Tensor[] tensors, int dim, SymInt size) -> Tensor")


def _joined(join: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def joined(tensors: Any, dim: int, size: Any) -> torch.Tensor:
        return join(tensors, dim)

    return joined


def _shape(name: str) -> Callable[..., torch.Tensor]:
    def shape(tensors: Any, dim: int, size: Any) -> torch.Tensor:
        sizes = list(tensors[0].shape)
        sizes[dim : dim + (name == "cat")] = [size]
        dtype = functools.reduce(torch.promote_types, (item.dtype for item in tensors))
        made: torch.Tensor = tensors[0].new_empty(sizes, dtype=dtype)
        return made

    return shape


for _name in ("stack", "cat"):
    _library.impl(_name, _joined(getattr(torch, _name)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"icenet_step::{_name}", _shape(_name), lib=_library)


_library.define("slice.Tensor(Tensor self, int dim, int start, int end, int step) -> Tensor")


def _slice(x: torch.Tensor, dim: int, start: int, end: int, step: int) -> torch.Tensor:
    return x.narrow(dim, start, end - start).clone()


def _slice_shape(x: torch.Tensor, dim: int, start: int, end: int, step: int) -> torch.Tensor:
    return x.new_empty([end - start if axis == dim else size for axis, size in enumerate(x.shape)])


_library.impl("slice.Tensor", _slice, "CompositeExplicitAutograd")
torch.library.register_fake("icenet_step::slice.Tensor", _slice_shape, lib=_library)


class Steps:
    """Keeps the sizes of loops open."""

    def __init__(self) -> None:
        self.found: list[tuple[str, tuple[int, int], Any, Any]] = []
        """File, first and last line of each loop, and the bounds of its range."""
        self.unread: Any = None
        """The size of the last tensor of which a loop takes the parts, until it takes one."""
        self.numbers: set[int] = set()
        """What the functions with the loops compare, and the classes of the module."""

    def loops(self) -> list[OpenLoop]:
        """Returns the loops, with the expressions that their sizes have at the end of the export."""
        loops = []
        for file, (first, last), start, stop in self.found:
            low, high = _value(start), _value(stop)
            numbers = tuple(sorted(item for item in self.numbers if high - low <= item <= MOST_STEPS))
            loops.append(OpenLoop(file, first, last, _text(start), _text(stop), low, high, numbers))
        return list(dict.fromkeys(loops))

    @contextlib.contextmanager
    def open(self, module: nn.Module) -> Iterator[None]:
        """Replaces `range` in the files of a module's classes, `torch.stack` and `torch.cat`."""
        self.found.clear()
        self.unread = None
        self.numbers = _numbers_of(module)
        before = {name: getattr(torch, name) for name in ("stack", "cat", "unbind", "split", "chunk")}
        with changed_names(module, lambda names: {} if "range" in names else {"range": self.range}):
            torch.stack, torch.cat = self.joining("stack", torch.stack), self.joining("cat", torch.cat)  # type: ignore[assignment]
            torch.unbind = torch.Tensor.unbind = lambda *args, **names: self.unbind(*args, **_own(names))  # type: ignore[assignment, method-assign]
            split, torch.split = torch.Tensor.split, self.splitting(torch.split)  # type: ignore[assignment]
            torch.Tensor.split = self.splitting(split)  # type: ignore[assignment, method-assign]
            torch.chunk = torch.Tensor.chunk = lambda *args, **names: self.chunk(*args, **_own(names))  # type: ignore[assignment, method-assign]
            iterate, torch.Tensor.__iter__ = torch.Tensor.__iter__, lambda x: iter(self.unbind(x))  # type: ignore[method-assign]
            torch.Tensor.__getitem__ = lambda x, index: self.element(x, index)  # type: ignore[assignment, method-assign]
            try:
                yield
            finally:
                for name, function in before.items():
                    setattr(torch, name, function)
                torch.Tensor.split = split  # type: ignore[method-assign]
                del torch.Tensor.unbind, torch.Tensor.chunk, torch.Tensor.__getitem__
                torch.Tensor.__iter__ = iterate  # type: ignore[method-assign]

    def unbind(self, input: torch.Tensor, dim: int = 0) -> Any:
        """Returns the parts of a tensor, which a loop over an open size takes one by one."""
        parts = self.parts(input, dim, keepdim=False)
        return torch._C.TensorBase.unbind(input, dim) if parts is None else parts

    def splitting(self, split: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `torch.split` of such parts, each with an axis of size 1."""

        def splitted(input: torch.Tensor, split_size: Any, dim: int = 0) -> Any:
            parts = self.parts(input, dim, keepdim=True) if type(split_size) is int and split_size == 1 else None
            return split(input, split_size, dim) if parts is None else parts

        return lambda *args, **names: splitted(*args, **_own(names))

    def chunk(self, input: torch.Tensor, chunks: Any, dim: int = 0) -> Any:
        """Returns the chunks of a tensor, as many as its size, as such parts."""
        is_whole = isinstance(chunks, torch.SymInt) and _text(chunks) == _text(input.shape[dim])
        parts = self.parts(input, dim, keepdim=True) if is_whole else None
        return torch._C.TensorBase.chunk(input, chunks, dim) if parts is None else parts

    def parts(self, input: torch.Tensor, dim: int, keepdim: bool) -> Any:
        """Returns the parts along an axis if its size is open and a loop takes them, else None."""
        size = input.shape[dim] if input.ndim else 0
        lines = self.lines() if isinstance(size, torch.SymInt) else None
        if lines is None:
            return None
        if self.unread is not None and self.found[-1][:2] == lines and _value(self.unread) == _value(size):
            torch._check(self.unread == size)  # zip(x.unbind(1), y.unbind(1)): the export takes them for one size
        self.unread = size
        self.found.append((*lines, 0, size))
        return _Parts(input, dim, keepdim, self)

    def element(self, x: torch.Tensor, index: Any) -> torch.Tensor:
        """Returns `x[index]`; the size of `x[:, : t + 1]` is the number, without a comparison with that of x."""
        items = list(index) if isinstance(index, tuple) else [index]
        is_plain = bool(self.found) and len(items) <= x.ndim and all(type(item) in (int, slice) for item in items)
        for dim, item in enumerate(items) if is_plain else ():
            if type(item) is slice and self.is_part(item, x.shape[dim]):
                x = torch.ops.icenet_step.slice.Tensor(x, dim, item.start or 0, item.stop, 1)
                items[dim] = slice(None)
        return torch._C.TensorBase.__getitem__(x, tuple(items) if isinstance(index, tuple) else items[0])

    def is_part(self, item: slice, size: Any) -> bool:
        """Returns whether a slice ends at a number within an axis that has the size of a loop."""
        start, stop = item.start or 0, item.stop
        if not (type(start) is type(stop) is int and item.step in (None, 1) and isinstance(size, torch.SymInt)):
            return False
        is_steps = any(_text(size) == _text(bound) for _, _, _, bound in self.found)
        return is_steps and 0 <= start < stop <= _value(size)

    def range(self, *bounds: Any) -> Any:
        """Returns `range` with the steps of the example."""
        start, stop, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
        if not any(isinstance(item, torch.SymInt) for item in (start, stop)) or step not in (1, -1):
            return builtins.range(*bounds)
        lines = self.lines()
        if lines is None:
            return builtins.range(*map(int, bounds))
        low, high = (start, stop) if step == 1 else (stop + 1, start + 1)
        self.found.append((*lines, low, high))
        return builtins.range(_value(start), _value(stop), step)

    def lines(self) -> tuple[str, tuple[int, int]] | None:
        """Returns the file and the lines of the loop whose head calls a method of this object, None without one."""
        caller: Any = sys._getframe(2)
        while caller.f_code.co_filename == __file__:
            caller = caller.f_back
        file = caller.f_code.co_filename
        lines = loop_at(file, caller.f_lineno)
        if lines is None:
            return None
        self.numbers |= _integers(numbers_around(file, caller.f_lineno), {**caller.f_globals, **caller.f_locals})
        return file, lines

    def joining(self, name: str, join: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Returns `torch.stack` or `torch.cat` of lists that have a size of a loop."""

        def joined(tensors: Any, dim: int = 0, **options: Any) -> torch.Tensor:
            dim = options.pop("axis", dim)
            is_own = not options and not str(sys._getframe(1).f_globals.get("__name__")).startswith("torch.")
            size = self.size_of(len(tensors)) if is_own and isinstance(tensors, (list, tuple)) else None
            if size is None:
                return join(tensors, dim, **options)
            first = tensors[0]
            parts = [item.shape[dim] if name == "cat" and item.ndim else 1 for item in tensors]
            if not all(type(part) is int and part == parts[0] for part in parts):  # open sizes have no sum here
                return join(tensors, dim)
            dim %= first.ndim + (name == "stack")
            made: torch.Tensor = getattr(torch.ops.icenet_step, name)(list(tensors), dim, size * parts[0])
            return made

        return joined

    def size_of(self, length: int) -> Any:
        """Returns the open size that the last loop with this number of steps has, None without one."""
        for _, _, start, stop in reversed(self.found):
            for size in (stop - start, stop):
                if length > 1 and isinstance(size, torch.SymInt) and _value(size) == length:
                    return size
        return None


def _own(names: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments of `torch.split`, `chunk` and `unbind` by keywords with the names that they have here."""
    own = {"axis": "dim", "tensor": "input", "split_size_or_sections": "split_size"}
    return {own.get(name, name): value for name, value in names.items()}


class _Parts(Sequence[torch.Tensor]):
    """The parts of a tensor along an axis with the size of the example, each made when it is read."""

    def __init__(self, whole: torch.Tensor, dim: int, keepdim: bool, steps: Steps) -> None:
        self.whole, self.dim, self.keepdim, self.steps = whole, dim, keepdim, steps

    def __len__(self) -> int:
        return _value(self.whole.shape[self.dim])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in builtins.range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        self.steps.unread = None
        if self.keepdim:
            return self.whole.narrow(self.dim, index % len(self), 1)
        return self.whole.select(self.dim, index)


MOST_STEPS = 1000
"""The largest number of a condition beyond which a loop is tried."""


def _numbers_of(module: nn.Module) -> set[int]:
    """Returns the integers that the classes of a module compare, divide by, or take elements with."""
    found = set()
    for inner in module.modules():
        code = getattr(inspect.unwrap(type(inner).forward), "__code__", None)
        if code is not None and not type(inner).__module__.startswith("torch."):
            names = {**inspect.unwrap(type(inner).forward).__globals__, "self": inner}
            found |= _integers(numbers_around(code.co_filename, code.co_firstlineno, whole_class=True), names)
    return found


def _integers(values: tuple[int | str, ...], names: dict[str, Any]) -> set[int]:
    """Returns the integers of some values, which are integers and names such as `self.window`.

    Those of a list or another container are its elements, and the number of its elements.
    """
    found: list[Any] = []
    for value in values:
        if isinstance(value, str):
            first, *rest = value.split(".")
            with contextlib.suppress(Exception):  # it is no name, or not set
                value = functools.reduce(getattr, rest, names[first])
                found += [*value, len(value) - 2] if isinstance(value, (list, tuple, set, dict)) else [value]
        else:
            found.append(value)
    return {value for value in found if type(value) is int}


def _value(size: Any) -> int:
    """Returns the value of a size in the example, which stays open."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _text(size: Any) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)
