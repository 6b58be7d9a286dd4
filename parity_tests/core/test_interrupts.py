"""Ctrl-C during work that must not be cut."""

from __future__ import annotations

import signal
import threading

import pytest

from icenet.core.interrupts import interrupt_deferred


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
