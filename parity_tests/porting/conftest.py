"""Settings of the tests of ports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

AS_USERS_EXPORT = ("test_port", "test_proof", "test_sharing")
"""Modules of tests that keep torch's cache of fake tensors, as a user's export has it."""


@pytest.fixture(scope="module", autouse=True)
def without_cache_of_fake_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Exports without torch's cache of fake tensors: small modules fill it, which is a third of their time."""
    if request.module.__name__ in AS_USERS_EXPORT:
        yield
        return
    config = pytest.importorskip("torch._dynamo.config")
    with config.patch(fake_tensor_cache_enabled=False):
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws the same initial values and inputs in each run: a value next to a jump would fail in one of many."""
    pytest.importorskip("torch").manual_seed(0)
