"""Events: the calls of all modules in one run, as a tree, with their arguments, outputs and gradients.

A backend's `tools.calls` passes each call of a module to a `Recorder`. Arrays are numpy (`Value`) with the axes of
their framework. Above a limit they are on disk.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from icenet.core.errors import FileError
from icenet.parity.calls.array_files import ArrayFiles
from icenet.parity.calls.structures import (
    argument_names,
    is_constant,
    keys_of,
    leaves,
    named_slots,
    rebuild,
    take_apart,
)
from icenet.parity.trace import Value

Array = npt.NDArray[Any]

MEMORY_LIMIT = 2 << 30
"""Bytes of the arrays of a comparison that are held in memory; the others are in files."""


@dataclass
class Event:
    """One call of a module.

    Attributes:
        path: Path of the module; empty for the model itself.
        call: Number of the call of this module in the run, from 0.
        number: Number of the event in the order in which calls begin.
        parent: The call that contains it.
        children: The calls that it contains, one level down, in order.
        arguments: The arrays among the arguments, in order.
        names: Their names: position or keyword, and the index within nested arguments.
        given: `(args, kwargs)` with a `Slot` in place of each array.
        outputs: The arrays of the result, in order.
        result: The result with a `Slot` in place of each array.
        gradients: The gradient of the loss by each output; None if absent.
        is_complete: Whether the call returned; it did not if a module within it raised an error.
    """

    path: str
    call: int
    number: int
    parent: Event | None = None
    children: list[Event] = field(default_factory=list)
    arguments: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    given: Any = None
    outputs: list[Any] = field(default_factory=list)
    result: Any = None
    gradients: list[Any] = field(default_factory=list)
    is_complete: bool = False

    @property
    def output_names(self) -> list[str]:
        """The keys or fields on the way to each output, such as `boxes[1]`; empty if one of them has none."""
        return named_slots(self.result)

    @property
    def is_storable(self) -> bool:
        """Whether the arguments can be given again: they hold nothing that a call may change, such as a cache."""
        return all(map(is_constant, leaves(self.given)))

    @property
    def is_rebuildable(self) -> bool:
        """Whether the result holds nothing but arrays and constants."""
        return bool(self.outputs) and all(map(is_constant, leaves(self.result)))

    def output_label(self, index: int) -> str:
        """Returns what to call an output: `output`, `output[1]`, or with its key, as `output["logits"]`."""
        keys = keys_of(self.result).get(index, "")
        return f"output{keys}" if keys else "output" + (f"[{index}]" if index else "")

    def walk(self) -> Iterator[Event]:
        """Yields the event and all within it, in order."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass
class Run:
    """The events of a run, and what a training step computes.

    Attributes:
        events: All calls in the order in which they begin; the first is that of the model.
        loss: The loss; None in a run without gradients.
        gradients: The gradient of each trainable parameter, by path, in PyTorch's axes.
        input_gradients: The gradient of each floating argument of the model, in order, and None for the others; empty
            if they are not known.
    """

    events: list[Event]
    loss: Value | None = None
    gradients: dict[str, Value] = field(default_factory=dict)
    input_gradients: list[Value | None] = field(default_factory=list)

    def by_call(self) -> dict[tuple[str, int], Event]:
        """Returns the events by path and number of the call."""
        return {(event.path, event.call): event for event in self.events}


class Store:
    """Keeps arrays in memory, and above a limit in temporary files. Equal arrays are in the files once.

    Attributes:
        runs: The runs whose arrays it keeps.
    """

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self._limit, self._used = limit, 0
        self.runs: list[Run] = []
        self._files = ArrayFiles()
        self._held: weakref.WeakValueDictionary[tuple[int, int], Array] = weakref.WeakValueDictionary()
        """The arrays in memory, by place and size. Arrays of MLX that a module passes on share their memory."""

    def keep(self, value: Value) -> Value:
        """Returns the value, its array in memory or in a file.

        Raises:
            FileError: The file cannot be written.
        """
        array, place = value.array, _place(value.array)
        if array.size == 0 or place in self._held:
            return value
        if self._used + array.nbytes <= self._limit:
            self._used += array.nbytes
            self._held[place] = array
            return value
        try:
            return Value(self._files.write(array), value.dtype)
        except OSError as error:  # not of the user's module, in whose call this may be
            reason = (error.strerror or "no space left on device").lower()
            raise _no_space(f"cannot write the arrays of a comparison ({reason})") from None

    def check_space(self, run: Run, times: int) -> None:
        """Checks that the arrays which follow a run fit.

        Args:
            run: The run.
            times: How much larger than its arrays those that follow are together.

        Raises:
            FileError: The disk has too little space for them.
        """
        sizes = {
            _place(item.array): item.array.nbytes
            for event in run.events
            for item in (*event.arguments, *event.outputs, *event.gradients)
            if item is not None
        }
        needed = times * sum(sizes.values()) - max(self._limit - self._used, 0)
        if needed <= 0:
            return
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if needed > free:
            raise _no_space(
                f"the comparison needs {needed / 1e9:.2g} GB more for its arrays, {free / 1e9:.2g} are free"
            )

    def free(self, kept: Sequence[Run] = ()) -> None:
        """Deletes the arrays of all runs but some. Their events refer to each other, so nothing else would."""
        ids = set(map(id, kept))
        for run in self.runs:
            for event in run.events if id(run) not in ids else ():
                event.parent = None
                for items in (event.children, event.arguments, event.outputs, event.gradients):
                    items.clear()
        self.runs = [run for run in self.runs if id(run) in ids]
        self._used = sum(array.nbytes for array in self._held.values())

    def close(self) -> None:
        """Deletes all arrays."""
        self.free()
        self._files.close()


def _place(array: Array) -> tuple[int, int]:
    """Returns where an array is in memory, and its size."""
    return array.__array_interface__["data"][0], array.nbytes


def _no_space(problem: str) -> FileError:
    return FileError(
        f"{tempfile.gettempdir()}: {problem}; set TMPDIR to a folder with more space, or compare a smaller batch"
    )


class Recorder:
    """A handler of `tools.calls.intercepting` that records events.

    Args:
        tools: The backend's `tools.calls`.
        store: Keeps the arrays.
        with_gradients: Whether to record the gradients of the outputs.
        with_values: Whether to record the arguments and the outputs.
    """

    def __init__(self, tools: Any, store: Store, with_gradients: bool, with_values: bool = True) -> None:
        self.tools, self.store, self.with_gradients = tools, store, with_gradients
        self.with_values = with_values
        self.events: list[Event] = []
        self.failed: str | None = None
        """Path of the innermost module whose call raised."""
        self._open: list[Event] = []
        self._calls: dict[str, int] = {}
        self._known: dict[Any, tuple[weakref.ref[Any], Any]] = {}
        """Each array that was taken, and what it held, by its version. Modules pass the same array on."""

    def __call__(self, path: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.events and self.events[0].is_complete:  # a call that the backward pass repeats
            return call(*args, **kwargs)
        number = self._calls.get(path, 0)
        self._calls[path] = number + 1
        event = Event(path, number, len(self.events), self._open[-1] if self._open else None)
        event.given, given = take_apart((args, kwargs), self.tools.ARRAY)
        event.names = argument_names(event.given)
        # taken before the call, which may change its arguments in place
        event.arguments = [self._taken(array) for array in given] if self.with_values else []
        self.events.append(event)
        if event.parent is not None:
            event.parent.children.append(event)
        self._open.append(event)
        try:
            result = call(*args, **kwargs)
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise
        finally:
            self._open.pop()
        event.result, arrays = take_apart(result, self.tools.ARRAY)
        event.outputs = [self._taken(array) for array in arrays] if self.with_values else []
        event.gradients = [None] * len(arrays)
        event.is_complete = True
        if not self.with_gradients:
            return result

        def storing(index: int) -> Callable[[Any], None]:
            def store(gradient: Any) -> None:
                event.gradients[index] = self.store.keep(gradient) if isinstance(gradient, Value) else gradient

            return store

        tapped = [
            self.tools.tap(array, storing(index), any(array is other for other in given))
            if "float" in str(array.dtype)
            else array
            for index, array in enumerate(arrays)
        ]
        for new, taken in zip(tapped, event.outputs, strict=self.with_values):
            self._remember(new, taken)
        return result if all(a is b for a, b in zip(tapped, arrays, strict=True)) else rebuild(event.result, tapped)

    def _taken(self, array: Any) -> Any:
        """Returns what an array holds: PyTorch's at once, MLX's is computed with the run."""
        version = self.tools.version(array)
        known = self._known.get(version)
        if known is not None and known[0]() is array:
            return known[1]
        taken = self.tools.snapshot(array)
        taken = self.store.keep(taken) if isinstance(taken, Value) else taken
        self._remember(array, taken)
        return taken

    def _remember(self, array: Any, taken: Any) -> None:
        if (version := self.tools.version(array)) is not None:
            self._known[version] = weakref.ref(array), taken

    def finish(self) -> None:
        """Turns the arrays of the events into numpy, after the computation."""
        self._known.clear()
        for event in self.events:
            for items in (event.arguments, event.outputs, event.gradients):
                items[:] = [
                    item if item is None or isinstance(item, Value) else self.store.keep(self.tools.value(item))
                    for item in items
                ]
