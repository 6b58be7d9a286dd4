"""Fixtures of the tests of models."""

from __future__ import annotations

import functools

import pytest

from icenet.core.models import init


@pytest.fixture
def shared_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws each initial value once for both backends: the guide's models have up to 70 M parameters."""
    monkeypatch.setattr(init, "initial_value", functools.cache(init.initial_value))
