"""The arguments of the classes within a port: each is tried with others, on the inputs that it has in the port."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from icenet.core import backends
from icenet.core.messages import first_line, some
from icenet.core.models import modules
from icenet.core.porting.build import Plan
from icenet.core.porting.names import native, new_names
from icenet.parity.ports.inputs import Arguments, arrays_of, with_arrays
from icenet.parity.ports.trials import (
    TRIED,
    ArgumentTrials,
    are_close,
    given_for,
    has_old_rates,
    original_outputs,
    others,
    single_arrays,
)
from icenet.parity.trace import Value

_LARGEST = 2**22
"""Elements of the arrays of a module up to which its class is tried."""
Axes = list[tuple[int, ...]]
"""For each of some arrays: the axes of the original in the order of the port."""


class _NotTried(Exception):
    """Why a class is not tried, as text."""


class InnerArguments(ArgumentTrials):
    """Tries the classes within a port; see `ArgumentTrials`."""

    def __init__(self, plan: Plan, module: Any, weights: dict[str, np.ndarray], example: Arguments) -> None:
        super().__init__(plan, module, weights, example)
        self.wrong: dict[str, dict[str, list[Any]]] = {}
        """For each class the arguments with which it differs, with the values of its instances."""
        self.untried: dict[str, list[str]] = {}
        """The classes, or classes with some arguments, that were not tried, by the reason; no layers of PyTorch."""

    def try_all(self) -> None:
        """Tries each class of which the port has an instance with numbers as arguments; fills `wrong`, `untried`."""
        source = self.load.run_source(self.plan.source, self.plan.class_name)
        instances = backends.module("mlx", "porting.instances").record(source)
        model = getattr(source, self.plan.class_name)()
        self.load.assign(model, self.plan.native(self.weights))
        made_of: dict[str, list[dict[str, Any]]] = {}
        for key, item in instances.items():
            if key != id(model) and _numbers(item.made):
                made_of.setdefault(item.kind, []).append(item.made)
        arrays = single_arrays(self.example)
        try:
            with self.load.mode(model, False):
                self.load.run(model, arrays, self.plan.arguments)
            calls = self.torch.first_calls(self.module, *with_arrays(self.example, arrays))
        except Exception as error:  # whatever a source or a user's code raises
            self._not_tried(f"a call with the arrays of the example fails ({first_line(error)})", made_of)
            return
        names = new_names(self.plan.graph, self.plan.train)
        left = dict(made_of)
        for path, inner in self.module.named_modules():
            port = _at(model, native(path, names)) if path else None
            made, kind = instances.get(id(port)), type(port).__name__
            if made is None or not made.called or path not in calls or kind not in left:
                continue
            del left[kind]
            wrong, untried = self._wrong(inner, calls[path], getattr(source, kind), made)
            if type(inner).__module__.partition(".")[0] != "torch":
                for reason, text in untried.items():
                    self._not_tried(reason, [text])
            if wrong:
                self.wrong[kind] = {name: [given[name] for given in made_of[kind]] for name in wrong}
        self._not_tried("no module of the original has their place and is called", left)

    def _not_tried(self, reason: str, kinds: Iterable[str]) -> None:
        for kind in kinds:
            self.untried.setdefault(reason, []).append(kind)

    def notes(self) -> list[str]:
        """Returns what a report says of the classes that were not tried."""
        return [
            f"{some(kinds, 8)}: not tried with other arguments, since {reason}; compare a module that you make"
            for reason, kinds in self.untried.items()
        ]

    def _wrong(self, inner: Any, call: Arguments, kind: Any, made: Any) -> tuple[list[str], dict[str, str]]:
        """Returns the arguments of a class with which it computes something else than the original's, and those that
        were not tried, or the class, by the reason."""
        try:
            both = self._orders(inner, call, kind, made)
        except _NotTried as reason:
            return [], {str(reason): made.kind}
        arguments = self.torch.arguments_of(inner, made.made)
        names = list(_numbers(made.made))
        own = [name for name in names if name in arguments]
        agrees = {name: self._agrees(inner, call, kind, made, name, *both) for name in own}
        untried = {
            "the original has no such argument": [name for name in names if name not in own],
            "the original accepts no other value": [name for name, agreed in agrees.items() if agreed is None],
        }
        return (
            [name for name, agreed in agrees.items() if agreed is False],
            {reason: f"{made.kind} ({', '.join(left)})" for reason, left in untried.items() if left},
        )

    def _orders(self, inner: Any, call: Arguments, kind: Any, made: Any) -> tuple[Axes, Axes]:
        """Returns the axes of the inputs and of the outputs of a class, which agrees with its own arguments.

        Raises:
            _NotTried: It cannot be made and called by itself.
        """
        arguments = self.torch.arguments_of(inner, _numbers(made.made))
        if arguments is None:
            raise _NotTried("PyTorch's class needs an argument that the module does not keep")
        if _size(inner) > _LARGEST:
            raise _NotTried(f"a module has more than {_LARGEST} numbers")
        like = self.torch.made(inner, arguments)
        if like is None or not self.torch.is_like(inner, like):
            raise _NotTried("PyTorch's class makes another module of the arguments that the module keeps")
        given = arrays_of(made.called[:2])
        axes = _all_axes(arrays_of(call), given)
        if axes is None:
            raise _NotTried("the port calls them with other arrays than the original does")
        try:
            results = self._outputs(like, kind(**made.made), made, call, axes)
        except Exception as error:  # weights with other axes in a port by itself, or buffers that are not saved
            raise _NotTried("they cannot be made and run by themselves") from error
        found = results and _all_axes([value.array for value in results[0].values()], results[2])
        if found is None:
            raise _NotTried("they return something else by themselves")
        return axes, found

    def _agrees(
        self, inner: Any, call: Arguments, kind: Any, made: Any, name: str, axes: Axes, returned: Axes
    ) -> bool | None:
        """Returns whether a class computes what the original's does with other values of an argument; None if the
        original accepts none."""
        before, tried = made.made[name], 0
        arguments = self.torch.arguments_of(inner, made.made)
        shapes = [item.shape for item in arrays_of(call)]
        for value in others(before):
            other = self.torch.made(inner, {**arguments, name: value})
            if other is None:
                continue
            for given in given_for(value, before, call, shapes):
                try:
                    model = kind(**{**made.made, name: value})
                    if has_old_rates(inner, other, model):
                        return False
                    results = self._outputs(other, model, made, given, axes)
                except Exception:  # whatever a source raises whose numbers do not fit
                    return False
                if results is None:
                    continue
                single, exact, ours = results
                if len(ours) != len(returned) or any(
                    item.ndim != len(order) for item, order in zip(ours, returned, strict=True)
                ):
                    return False
                found = {
                    key: Value(item.transpose(np.argsort(order)), "fp32")
                    for key, item, order in zip(exact, ours, returned, strict=True)
                }
                if not are_close(found, single, exact):
                    return False
                tried += 1
                break
            if tried == TRIED:
                break
        return True if tried else None

    def _outputs(
        self, other: Any, model: Any, made: Any, call: Arguments, axes: Axes
    ) -> tuple[dict[str, Value], dict[str, Value], list[np.ndarray]] | None:
        """Returns the outputs of an original in both precisions, and those of the port with its weights."""
        single = original_outputs(other, call, False)
        exact = original_outputs(other, call, True) if single else None
        if not single or not exact:
            return None
        modules.from_torch(other, model)
        arrays = [item.transpose(order) for item, order in zip(arrays_of(call), axes, strict=True)]
        args, kwargs = with_arrays(made.called[:2], [self.load.to_array(item) for item in arrays])
        with self.load.mode(model.eval(), False):
            ours = [np.asarray(self.load.to_numpy(item)) for item in self.load.flat(model(*args, **kwargs))]
        return single, exact, ours


def _size(module: Any) -> int:
    return sum(value.numel() for value in module.state_dict().values())


def _numbers(made: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that are numbers."""
    return {name: value for name, value in made.items() if type(value) in (bool, int, float)}


def _at(model: Any, path: str) -> Any:
    """Returns the module at a path of a port, None if it has none there."""
    for part in path.split("."):
        try:
            model = model[int(part)] if isinstance(model, list) else model[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return model


def _all_axes(theirs: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> Axes | None:
    """Returns `_axes` of each of some arrays, None if one of them is another array."""
    found = [_axes(one, other) for one, other in zip(theirs, ours, strict=False)]
    axes = [item for item in found if item is not None]
    return axes if len(axes) == len(theirs) == len(ours) else None


def _axes(theirs: np.ndarray, ours: np.ndarray) -> tuple[int, ...] | None:
    """Returns the axes of an array of the original in the order of the port's, None if it is another array."""
    for axes in itertools.permutations(range(theirs.ndim)) if theirs.ndim == ours.ndim <= 5 else []:
        turned = theirs.transpose(axes)
        if turned.shape == ours.shape and np.allclose(turned, ours, rtol=1e-3, atol=1e-4, equal_nan=True):
            return axes
    return None
