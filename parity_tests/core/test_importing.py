"""The garbage collector and Ctrl-C during an import."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import types
from collections.abc import Iterator

import pytest

from icenet.core.importing import interrupt_deferred, without_garbage_collection


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    """A shell starts background processes with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_raised_at_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the block")
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_has_precedence() -> None:
    with pytest.raises(ImportError), interrupt_deferred():
        signal.raise_signal(signal.SIGINT)
        raise ImportError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_and_threads_stay_as_they_are() -> None:
    calls: list[int] = []

    def handle(number: int, frame: object) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        with interrupt_deferred():
            signal.raise_signal(signal.SIGINT)
            assert calls == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)

    def work() -> None:
        with interrupt_deferred():  # Python allows no handlers here
            calls.append(0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert calls == [signal.SIGINT, 0]


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
