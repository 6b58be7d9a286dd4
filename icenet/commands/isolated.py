"""Runs functions in other Python processes: memory starts at zero, and a crash does not affect the caller."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from typing_extensions import Self

# Answers are written to a copy of standard output, because frameworks print to it.
# sys.path is the parent's: with the child's own, a torch.py in the current folder would be imported.
_CHILD = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.path[:] = json.loads(sys.argv[1])
from icenet.core.errors import IceNetError
target = None
for line in sys.stdin:
    name, arguments = json.loads(line)
    try:
        if target is None:
            import MODULE as target
        found = getattr(target, name)(*arguments)
        if name == sys.argv[2]:
            target, found = found, None
        answer = {"value": found}
    except IceNetError as error:
        answer = {"error": str(error)}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
"""
_GRACE = 10.0
"""Seconds within which a process that closed its answers must exit."""


class IsolatedError(Exception):
    """The function raised an error, or its process crashed or exceeded the timeout. The message is one line."""


class TimeoutReached(IsolatedError):
    """The function exceeded the timeout."""


class Worker:
    """A Python process that runs functions of a module, or methods of an object, one after another.

    The object is made while the caller continues, and the first call waits for it. Ctrl-C in the terminal does not
    reach the process. It ends with `close`, with the caller, if the factory fails, and after any exception in `call`
    other than an error of the function itself.

    Args:
        module: Dotted name of the module; it is imported in the new process only.
        factory: Name of a function or class of the module that makes the object whose methods are called. None: the
            functions of the module are called.
        arguments: Arguments of the factory, in JSON types.
        environment: Environment variables to set in addition to the current ones.
    """

    def __init__(
        self, module: str, factory: str | None = None, *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD.replace("MODULE", module), json.dumps(sys.path), factory or ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self._is_ready = factory is None
        if factory is not None:
            self._send(factory, arguments)

    def call(self, name: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Returns the result of a function or method, in JSON types.

        Args:
            name: Name of the function or method.
            arguments: Its arguments, in JSON types.
            timeout: Seconds after which the process is killed.

        Raises:
            TimeoutReached: There is no result in time.
            IsolatedError: There is no result; the message has the reason. The factory may have failed.
        """
        try:
            if not self._is_ready:
                self._is_ready = True
                self._make(timeout)
            self._send(name, arguments)
            return self._receive(timeout)
        except BaseException as error:
            if not (isinstance(error, IsolatedError) and self._process.poll() is None):
                self.close()
            raise

    def _make(self, timeout: float | None) -> None:
        """Waits for the object; without it the process ends."""
        try:
            self._receive(timeout)
        except IsolatedError:
            self.close()
            raise

    def _send(self, name: str, arguments: tuple[Any, ...]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the process has ended; the reason is read below
            self._process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, timeout: float | None) -> Any:
        line = self._read_line(timeout)
        if line is None:
            raise IsolatedError(self._reason())
        answer = json.loads(line)
        if "error" in answer:
            raise IsolatedError(" ".join(answer["error"].split()))
        return answer["value"]

    def _read_line(self, timeout: float | None) -> bytes | None:
        """Returns the next line of the answers, or None if the process has closed them."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([descriptor], [], [], left)[0]:
                self.close()
                raise TimeoutReached(f"no result within {timeout:g} s")
            part = os.read(descriptor, 1 << 16)
            if not part:
                return None
            self._unread += part
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _reason(self) -> str:
        """Returns why a process has ended without an answer."""
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return "the process closed its output"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (the kernel sends it when memory runs out)" if name == "SIGKILL" else ""
            return f"the process was killed by {name}{hint}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the process exited with code {code} and no result: {lines[-1] if lines else 'no message'}"

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not sent to a process that has ended
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def call(
    module: str,
    function: str,
    *arguments: Any,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Returns `module.function(*arguments)`, computed in a fresh Python process.

    Args:
        module: Dotted name of the module; it is imported in the new process only.
        function: Name of the function.
        arguments: Its arguments, in JSON types, as the result must be.
        timeout: Seconds after which the process is killed.
        environment: Environment variables to set in addition to the current ones.

    Raises:
        IsolatedError: There is no result; the message has the reason.
    """
    with Worker(module, environment=environment) as worker:
        return worker.call(function, *arguments, timeout=timeout)
