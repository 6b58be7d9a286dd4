"""The names of the activation functions of both backends."""

from __future__ import annotations

from icenet.core.errors import UsageError

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def check_activation(name: str) -> None:
    """Raises UsageError if no activation function has the name."""
    if name not in ACTIVATIONS:
        raise UsageError(f"activation {name!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
