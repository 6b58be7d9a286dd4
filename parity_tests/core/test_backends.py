"""Importing a framework."""

from __future__ import annotations

import gc
import sys
import types

import pytest

from icenet.core.garbage_collection import without_garbage_collection


@pytest.mark.parametrize("is_enabled", [True, False])
def test_objects_of_an_import_are_not_collected_again_and_again(
    is_enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the oldest generation, and the collector is as it was, also after an error."""
    gc.unfreeze()  # what conftest.py has frozen
    before = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        with pytest.raises(ImportError), without_garbage_collection():
            assert not gc.isenabled()
            made = [[] for _ in range(10)]
            monkeypatch.setitem(sys.modules, "imported", types.ModuleType("imported"))
            raise ImportError
        assert gc.isenabled() == is_enabled and gc.get_freeze_count() == 0
        oldest = {id(found) for found in gc.get_objects(generation=2)}
        assert all(id(found) in oldest for found in made)
    finally:
        (gc.enable if before else gc.disable)()
