"""The arguments of the classes within a port: each is tried with others, on the inputs that it has in the port."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from icenet.core import backends
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


class InnerArguments(ArgumentTrials):
    """Tries the classes within a port; see `ArgumentTrials`."""

    def __init__(self, plan: Plan, module: Any, weights: dict[str, np.ndarray], example: Arguments) -> None:
        super().__init__(plan, module, weights, example)
        self.wrong: dict[str, dict[str, list[Any]]] = {}
        """For each class the arguments with which it differs, with the values of its instances."""

    def try_all(self) -> None:
        """Tries each class of which the port has an instance with numbers as arguments, and fills `wrong`."""
        source = self.load.run_source(self.plan.source, self.plan.class_name)
        instances = backends.module("mlx", "porting.instances").record(source)
        model = getattr(source, self.plan.class_name)()
        self.load.assign(model, self.plan.native(self.weights))
        arrays = single_arrays(self.example)
        try:
            with self.load.mode(model, False):
                self.load.run(model, arrays, self.plan.arguments)
            calls = self.torch.first_calls(self.module, *with_arrays(self.example, arrays))
        except Exception:  # whatever a source or a user's code raises
            return
        made_of: dict[str, list[dict[str, Any]]] = {}
        for item in instances.values():
            made_of.setdefault(item.kind, []).append(item.made)
        names = new_names(self.plan.graph, self.plan.train)
        tried: dict[str, list[str]] = {}
        for path, inner in self.module.named_modules():
            port = _at(model, native(path, names)) if path else None
            made = instances.get(id(port))
            kind = type(port).__name__
            if made is None or not made.called or path not in calls:
                continue
            if kind not in tried:
                tried[kind] = self._wrong(inner, calls[path], getattr(source, kind), made)
        for kind, wrong in tried.items():
            if wrong:
                self.wrong[kind] = {name: [given[name] for given in made_of[kind]] for name in wrong}

    def _wrong(self, inner: Any, call: Arguments, kind: Any, made: Any) -> list[str]:
        """Returns the arguments of a class with which it computes something else than the original's."""
        numbers = {name: value for name, value in made.made.items() if type(value) in (bool, int, float)}
        arguments = self.torch.arguments_of(inner, numbers)
        like = self.torch.made(inner, arguments) if arguments and _size(inner) <= _LARGEST else None
        if arguments is None or like is None or not self.torch.is_like(inner, like):
            return []
        given = arrays_of(made.called[:2])
        axes = [_axes(theirs, ours) for theirs, ours in zip(arrays_of(call), given, strict=False)]
        if None in axes or len(axes) != len(given) or len(given) != len(arrays_of(call)):
            return []
        try:
            results = self._outputs(like, kind(**made.made), made, call, [item for item in axes if item is not None])
        except Exception:  # weights with other axes in a port by itself, or buffers that the original does not save
            return []
        if results is None:
            return []
        found = [_axes(one.array, other) for one, other in zip(results[0].values(), results[2], strict=False)]
        if None in found or len(results[0]) != len(results[2]):
            return []
        both = ([item for item in axes if item is not None], [item for item in found if item is not None])
        return [
            name for name in numbers if name in arguments and not self._agrees(inner, call, kind, made, name, *both)
        ]

    def _agrees(
        self, inner: Any, call: Arguments, kind: Any, made: Any, name: str, axes: Axes, returned: Axes
    ) -> bool:
        """Returns whether a class computes what the original's computes with other values of an argument."""
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
        return True

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


def _at(model: Any, path: str) -> Any:
    """Returns the module at a path of a port, None if it has none there."""
    for part in path.split("."):
        try:
            model = model[int(part)] if isinstance(model, list) else model[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return model


def _axes(theirs: np.ndarray, ours: np.ndarray) -> tuple[int, ...] | None:
    """Returns the axes of an array of the original in the order of the port's, None if it is another array."""
    for axes in itertools.permutations(range(theirs.ndim)) if theirs.ndim == ours.ndim <= 5 else []:
        turned = theirs.transpose(axes)
        if turned.shape == ours.shape and np.allclose(turned, ours, rtol=1e-3, atol=1e-4, equal_nan=True):
            return axes
    return None
