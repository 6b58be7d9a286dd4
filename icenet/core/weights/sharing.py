"""Arrays that a model holds at several places: found by identity, stored under all names, trained as one.

The first place in the order of the model's modules owns the array: its path names the gradient, the optimizer state
and the initial value. The other paths are aliases. Files of weights contain all names, as PyTorch's state dicts do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icenet.core.errors import UsageError, WeightsError

Array = NDArray[Any]

OTHER_NAMES = "icenet_other_names"
"""The attribute of a class whose modules hold an array once that their twins hold at several places, as ports do: the
path of the array by each further path in the twin."""


def find_shared(arrays: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Returns the owner's path of each alias.

    Args:
        arrays: Path and array of each place, in the order of the model.
    """
    owners: dict[int, str] = {}
    held = list(arrays)  # keeps the arrays alive, so that their ids stay unique
    pairs = [(path, owners.setdefault(id(array), path)) for path, array in held]
    return {path: owner for path, owner in pairs if path != owner}


def aliases_in_twin(modules: Iterable[tuple[str, Any]]) -> set[str]:
    """Returns the paths of `OTHER_NAMES`, which only the twins of some modules have.

    Args:
        modules: Path and module.
    """
    named = ((path, name) for path, module in modules for name in getattr(type(module), OTHER_NAMES, ()))
    return {f"{path}.{name}" if path else name for path, name in named}


def trainable_paths(arrays: Iterable[tuple[str, Any, bool]], shared: Mapping[str, str]) -> set[str]:
    """Returns the paths of the trainable arrays, without aliases.

    Args:
        arrays: Path, array and whether it is trainable, for each place.
        shared: Owner's path by alias.

    Raises:
        UsageError: A shared array is frozen at one of its places only.
    """
    trainable = {path: is_trainable for path, _, is_trainable in arrays}
    for alias, owner in shared.items():
        if trainable[alias] != trainable[owner]:
            frozen, other = (owner, alias) if trainable[alias] else (alias, owner)
            raise UsageError(
                f"{frozen} is frozen and {other}, which is the same array, is not: freeze both or neither"
            )
    return {path for path, is_trainable in trainable.items() if is_trainable and path not in shared}


def complete(values: Mapping[str, Array], shared: Mapping[str, str]) -> Mapping[str, Array]:
    """Returns weights with all names of shared arrays, of which a file may have only one, as Hugging Face writes.

    Args:
        values: Weights by path.
        shared: Owner's path by alias.

    Raises:
        WeightsError: Two names of one array have unequal values. The message has all such pairs.
    """
    if not shared:
        return values
    found = dict(values)
    groups: dict[str, list[str]] = {}
    for alias, owner in shared.items():
        groups.setdefault(owner, [owner]).append(alias)
    unequal = []
    for names in groups.values():
        present = [name for name in names if name in found]
        if not present:
            continue
        first = found[present[0]]
        unequal += [f"{present[0]} and {name}" for name in present[1:] if not _is_equal(first, found[name])]
        found |= dict.fromkeys(names, first)
    if unequal:
        are = "are one array" if len(unequal) == 1 else "are one array each"
        raise WeightsError(
            f"{', '.join(unequal)} {are} in this model and have unequal values in the weights; "
            "use weights of a model that shares them, or remove one of the names"
        )
    return found


def renamed(values: Mapping[str, Array], names: Mapping[str, str], is_state: bool = False) -> Mapping[str, Array]:
    """Returns arrays by their canonical names.

    Args:
        values: Arrays by path, or with `is_state` by `PATH.SLOT`.
        names: Canonical path by MLX's path, where the two differ.
        is_state: Whether the names have a slot of the optimizer at their end.
    """
    if not names:
        return values

    def canonical(name: str) -> str:
        path, _, slot = name.rpartition(".") if is_state else (name, "", "")
        return f"{names.get(path, path)}.{slot}" if is_state else names.get(path, path)

    return {canonical(name): array for name, array in values.items()}


def _is_equal(a: Array, b: Array) -> bool:
    """Returns whether two arrays have equal bits."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return np.array_equal(first, second)
