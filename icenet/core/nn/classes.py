"""Layers of a framework that become those of IceNet in a model that is already built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def change_classes(modules: Iterable[tuple[str, Any]], classes: Mapping[type, type]) -> list[Any]:
    """Gives the layers of a model other classes, in place; subclasses of the framework's layers stay.

    Args:
        modules: All modules of the model, by path.
        classes: The new class, by the framework's class. The caller sets the attributes that it needs.

    Returns:
        The layers whose class has changed, each once.
    """
    changed = []
    for _, module in modules:
        if (new := classes.get(type(module))) is not None:
            # the class alone changes, so that the user's references stay valid
            object.__setattr__(module, "__class__", new)
            changed.append(module)
    return changed
