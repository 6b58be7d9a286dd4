"""Paths of layers and arrays of an MLX module: canonical ones, MLX's own, and those of PyTorch counterparts."""

from __future__ import annotations

from collections.abc import Mapping

from icenet.core.weights.counterparts import CHILD_NAMES
from icenet.core.weights.layout import join


class LayerPaths:
    """The names that a layer or an array of an MLX module has in PyTorch, and in MLX."""

    def __init__(
        self, kinds: Mapping[str, str], counterparts: Mapping[str, str], mlx_names: Mapping[str, str]
    ) -> None:
        """
        Args:
            kinds: Layer kind by path (`icenet.core.weights.layout`).
            counterparts: Kind of counterpart by path (`icenet.core.weights.counterparts`).
            mlx_names: Canonical path by MLX's own path, where the two differ.
        """
        self._children = {path: CHILD_NAMES.get(kind, {}) for path, kind in counterparts.items()}
        self._own: dict[str, str] = {}
        for own, path in mlx_names.items():  # of arrays; those of the layers follow
            while path and path not in self._own and own != path:
                self._own[path] = own
                own, _, last = own.rpartition(".")
                path, _, end = path.rpartition(".")
                if last != end:
                    break
        self._modules = {name: path for path in {**kinds, **counterparts} for name in (path, *self.aliases(path))}

    def torch(self, path: str) -> str:
        """Returns the path that the counterpart of a layer or an array has in PyTorch."""
        parent, names = "", []
        for part in path.split("."):
            names.append(self._children.get(parent, {}).get(part, part))
            parent = join(parent, part)
        return ".".join(names)

    def aliases(self, path: str) -> list[str]:
        """Returns other names of a canonical path: those of PyTorch and of MLX."""
        own = self._own.get(path)
        return [name for name in (self.torch(path), own) if name is not None and name != path]

    def module(self, name: str) -> str:
        """Returns the canonical path of a layer by any of its names."""
        return self._modules.get(name, name)
