"""What the loss that balances experts needs from a forward pass."""

from __future__ import annotations

from typing import Any


class RouterScores:
    """The scores of routers, arrays `[B, T, E]` of each layer, from a forward pass to its loss.

    They are no part of the state of a model: a compiled function or a checkpoint does not see them.
    """

    def __init__(self) -> None:
        self._layers: list[Any] = []

    def keep(self, layers: list[Any]) -> None:
        """Replaces the scores."""
        self._layers = layers

    def take(self) -> list[Any]:
        """Returns the scores and forgets them."""
        layers, self._layers = self._layers, []
        return layers
