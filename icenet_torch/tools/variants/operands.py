"""Single calls in the code of a user: left out, or with another variable or number in the place of an operand."""

from __future__ import annotations

import contextlib
import linecache
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from icenet_torch.tools.variants.activations import ACTIVATIONS
from icenet_torch.tools.variants.variant import Site, name_of, user_frame

_LONGEST = 60
"""Number of characters of an expression that a text shows."""
_LARGEST_SIZE = 64
"""Whole numbers, which may be sizes, do not become larger than this or four times as large."""
_MOST_ITEMS = 8
"""Length of lists whose numbers are changed."""
_WITHOUT_VALUES = frozenset({"get", "set", "size", "dim", "detach", "contiguous", "stride", "numel"})
"""Calls that are not changed: they only read or copy an array."""


Function = Callable[..., Any]


class Change(NamedTuple):
    """A change of the calls at one place in the code, or of a function.

    Attributes:
        text: What is different in the module under test, in one line.
        rank: Its place among the changes: the more likely ones first.
        site: The place; with -1 for the instruction, the whole function.
        run: Called as `run(function, args, kwargs, variables)` in place of `function(*args, **kwargs)`, with the
            variables of the code.
        line: The line of the code; 0 for each.
    """

    text: str
    rank: int
    site: Site
    run: Function
    line: int = 0


@contextlib.contextmanager
def listing(numbers: Sequence[float], others: Sequence[float]) -> Iterator[list[Change]]:
    """Yields a list that holds the changes of all calls when the context is closed.

    Args:
        numbers, others: Those that may take the place of others, the more likely ones, and the rest.
    """
    found: dict[tuple[str, Site], Change] = {}
    changes: list[Change] = []
    with _Listing(found, numbers, others):
        yield changes
    changes += sorted(found.values(), key=lambda change: change.rank)


@contextlib.contextmanager
def changing(change: Change) -> Iterator[None]:
    """Applies a change to the calls of its site while the context is open."""
    with _Changing(change):
        yield


class _Listing(TorchFunctionMode):
    def __init__(
        self, found: dict[tuple[str, Site], Change], numbers: Sequence[float], others: Sequence[float]
    ) -> None:
        super().__init__()
        self._found, self._numbers, self._others = found, numbers, others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        frame = user_frame()
        if name_of(func) not in _WITHOUT_VALUES and not str(frame.f_globals.get("__name__")).startswith("icenet"):
            call = _Call(frame, name_of(func), args, kwargs, y)
            for change in call.changes(self._numbers, self._others):
                self._found.setdefault((change.text, change.site), change)
        return y


class _Changing(TorchFunctionMode):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        frame, change = user_frame(), self._change
        if (
            not _is_at(frame, change.site)
            or change.line not in (0, frame.f_lineno)
            or name_of(func) in _WITHOUT_VALUES
        ):
            return func(*args, **kwargs)
        return change.run(func, args, kwargs, frame.f_locals)


def _is_at(frame: FrameType, site: Site) -> bool:
    code = frame.f_code
    return (code.co_filename, code.co_firstlineno) == site[:2] and site[2] in (-1, frame.f_lasti)


class _Call:
    """A call of a function in the code of a user, and how it may be changed."""

    def __init__(self, frame: FrameType, name: str, args: Any, kwargs: dict[str, Any], y: Any) -> None:
        code = frame.f_code
        self.site = code.co_filename, code.co_firstlineno, frame.f_lasti
        self.everywhere: Site = code.co_filename, code.co_firstlineno, -1
        self.line = frame.f_lineno
        self.variables = {n: item for n, item in frame.f_locals.items() if isinstance(item, torch.Tensor)}
        self.names = {id(item): name for name, item in self.variables.items()}
        self.name, self.args, self.kwargs, self.y, self.shown = name, args, kwargs, y, _expression(frame)
        self.operands = _operands(args)

    def changes(self, numbers: Sequence[float], others: Sequence[float]) -> Iterator[Change]:
        yield from self._with_numbers(numbers, 0)
        yield from self._left_out()
        yield from self._with_other_grid()
        yield from self._with_variables()
        yield from self._written_activations()
        yield from self._with_numbers(others, 6)

    def _with_numbers(self, numbers: Sequence[float], rank: int) -> Iterator[Change]:
        """Yields other numbers in place of those of the call; from a rank above 0, also those that are near."""
        places: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        known = [(place, old) for place, item in places for old in dict.fromkeys(_numbers((item,)))]
        times = Counter(old for _, old in known)
        both: list[tuple[int | str, float]] = [
            ("", old) for old in times if times[old] > 1 and isinstance(old, float)
        ]
        for place, old in [*both, *known]:
            ranks = dict.fromkeys((float(number) for number in numbers), rank)
            if rank and isinstance(old, int):
                ranks |= dict.fromkeys((old + 1.0, old - 1.0), 5 if self.name == "getitem" else 8)
            if rank:
                ranks |= dict.fromkeys((2.0 * old, 0.5 * old), 8)
            for new, found in ranks.items():
                is_size = new.is_integer() and new <= max(4 * old, _LARGEST_SIZE)
                if new != old and (isinstance(old, float) or is_size):
                    run = partial(_run_number, place, old, new if isinstance(old, float) else int(new))
                    which = f"each {old:.6g}" if place == "" else f"{old:.6g}"
                    text = f"{new:.6g} in a in place of {which} in {self.shown} of b"
                    yield Change(text, found, self.site, run)

    def _left_out(self) -> Iterator[Change]:
        y = self.y
        for index, old in enumerate(self.operands):
            if isinstance(y, torch.Tensor) and y.shape == old.shape and y.dtype == old.dtype and y is not old:
                single = len(self.operands) == 1
                what = f"{self.shown} of b is left out in a" if single else f"of {self.shown} of b, a has only {{}}"
                name = self.names.get(id(old)) or _ORDER[min(index, 3)]
                yield Change(what.format(name), 1, self.site, partial(_run_left_out, index))

    def _with_other_grid(self) -> Iterator[Change]:
        if self.name == "meshgrid":
            old = self.kwargs.get("indexing", "ij")
            new_one = "xy" if old == "ij" else "ij"
            text = f"meshgrid has the indexing {new_one} in a, {old} in b"
            yield Change(text, 0, self.site, partial(_run_keyword, "indexing", new_one))

    def _with_variables(self) -> Iterator[Change]:
        for index, old in enumerate(self.operands):
            own = self.names.get(id(old), "")
            for name, item in self.variables.items() if own else ():
                if item is old or not _is_like(item, old) or name == own:
                    continue
                text = f"a has {name} in place of {own} in {self.shown} of b"
                yield Change(text, 3, self.site, partial(_run_variable, index, name))
                text = f"the variables {' and '.join(sorted((own, name)))} of b are exchanged in a"
                yield Change(text, 4, self.everywhere, partial(_run_exchanged, own, name))
                text += f", in `{linecache.getline(self.site[0], self.line).strip()}`"
                yield Change(text, 4, self.everywhere, partial(_run_exchanged, own, name), self.line)
                if old.is_floating_point():
                    for sign, what in ((1, "+"), (-1, "-")):
                        text = f"a has {own} {what} {name} in place of {own} in {self.shown} of b"
                        yield Change(text, 7, self.site, partial(_run_added, index, name, sign))

    def _written_activations(self) -> Iterator[Change]:
        """Yields other activations in place of one written as x * f(x)."""
        x = next((item for item in self.operands if id(item) in self.names), None)
        f_of_x = [item for item in self.operands if item is not x and id(item) not in self.names]
        if self.name != "mul" or x is None or not f_of_x or f_of_x[0].shape != x.shape:
            return
        for name in ACTIVATIONS:
            text = f"{name} in a in place of {self.shown} of b"
            yield Change(text, 5, self.site, partial(_run_activation, name, self.operands.index(x)))


def _run_number(
    place: int | str, old: float, new: float, func: Function, args: Any, kwargs: Any, variables: Any
) -> Any:
    changed = (_with_number(item, old, new) if place in ("", i) else item for i, item in enumerate(args))
    named = {n: _with_number(item, old, new) if place in ("", n) else item for n, item in kwargs.items()}
    return func(*changed, **named)


def _run_left_out(index: int, func: Function, args: Any, kwargs: Any, variables: Any) -> Any:
    y, operands = func(*args, **kwargs), _operands(args)
    return operands[index].clone() if index < len(operands) and _is_like(y, operands[index]) else y


def _run_keyword(name: str, value: Any, func: Function, args: Any, kwargs: Any, variables: Any) -> Any:
    return func(*args, **{**kwargs, name: value})


def _run_variable(index: int, name: str, func: Function, args: Any, kwargs: Any, variables: Any) -> Any:
    operands, new = _operands(args), variables.get(name)
    is_changed = index < len(operands) and _is_like(new, operands[index])
    return func(*(_with_operand(args, index, new) if is_changed else args), **kwargs)


def _run_added(index: int, name: str, sign: int, func: Function, args: Any, kwargs: Any, variables: Any) -> Any:
    operands, new = _operands(args), variables.get(name)
    is_changed = index < len(operands) and _is_like(new, operands[index])
    return func(*(_with_operand(args, index, operands[index] + sign * new) if is_changed else args), **kwargs)


def _run_exchanged(first: str, second: str, func: Function, args: Any, kwargs: Any, variables: Any) -> Any:
    one, other = variables.get(first), variables.get(second)
    if _is_like(one, other):
        for index, operand in enumerate(_operands(args)):
            if operand is one or operand is other:
                args = _with_operand(args, index, other if operand is one else one)
    return func(*args, **kwargs)


def _run_activation(name: str, index: int, func: Function, args: Any, kwargs: Any, variables: Any) -> Any:
    return ACTIVATIONS[name](_operands(args)[index])


_ORDER = ("its first operand", "its second operand", "its third operand", "a later operand")


def _is_like(item: Any, old: Any) -> bool:
    both = isinstance(item, torch.Tensor) and isinstance(old, torch.Tensor)
    return both and item.shape == old.shape and item.dtype == old.dtype


def _operands(args: Any) -> list[torch.Tensor]:
    """Returns the arrays among the arguments, also those of lists and of indices."""
    found: list[torch.Tensor] = []
    for item in args:
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            found += _operands(item)
    return found


def _with_operand(args: Any, index: int, new: torch.Tensor) -> Any:
    """Returns arguments with another array in the place of one of them."""
    changed, first = [], 0
    for item in args:
        inner = _operands((item,))
        if first <= index < first + len(inner):
            whole = isinstance(item, torch.Tensor)
            item = new if whole else type(item)(_with_operand(tuple(item), index - first, new))
        first += len(inner)
        changed.append(item)
    return tuple(changed)


def _numbers(items: Any) -> list[float]:
    """Returns the numbers among arguments, also those of lists; without their signs."""
    found: list[float] = []
    for item in items:
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            found.append(abs(item))
        elif isinstance(item, (tuple, list)) and len(item) <= _MOST_ITEMS:
            found += _numbers(item)
        elif isinstance(item, slice):
            found += _numbers((item.start, item.stop, item.step))
    return found


def _with_number(item: Any, old: float, new: float) -> Any:
    """Returns an argument with another number in the place of one, of either sign."""
    if isinstance(item, (tuple, list)) and type(item) in (tuple, list):
        return type(item)(_with_number(inner, old, new) for inner in item)
    if isinstance(item, slice):
        return slice(*(_with_number(part, old, new) for part in (item.start, item.stop, item.step)))
    if isinstance(item, (int, float)) and not isinstance(item, bool) and abs(item) == old:
        return new if item >= 0 else -new
    return item


def _expression(frame: FrameType) -> str:
    """Returns the expression that a frame computes, or the line of it (before Python 3.11)."""
    name, code = frame.f_code.co_filename, frame.f_code
    line, start, end = linecache.getline(name, frame.f_lineno), 0, None
    if hasattr(code, "co_positions"):
        first, last, begin, stop = list(code.co_positions())[frame.f_lasti // 2]
        if first is not None and first == last:
            line, start, end = linecache.getline(name, first), begin or 0, stop
    text = line.encode()[start:end].decode(errors="ignore").strip()
    return f"`{text if len(text) <= _LONGEST else text[: _LONGEST - 3] + '...'}`"
