"""Calls a function in a fresh Python process: memory starts at zero, and a crash does not affect the caller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_RESULT = "icenet-result "
"""Marks the line of standard output that holds the result: frameworks print there as well."""
# sys.path is the parent's: with the child's own, a torch.py in the current folder would be imported
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from icenet.core.errors import IceNetError
try:
    from {module} import {function}
    result = {{"value": {function}(*json.load(sys.stdin))}}
except IceNetError as error:
    result = {{"error": str(error)}}
except BaseException as error:
    result = {{"error": f"{{type(error).__name__}}: {{error}}"}}
print("\\n" + {marker!r} + json.dumps(result), flush=True)
"""


class IsolatedError(Exception):
    """The function raised an error, or its process crashed or exceeded the timeout. The message is one line."""


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
    code = _CHILD.format(module=module, function=function, marker=_RESULT)
    try:
        process = subprocess.run(
            [sys.executable, "-c", code, json.dumps(sys.path)],
            input=json.dumps(arguments),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired:
        raise IsolatedError(f"no result within {timeout:g} s") from None
    lines = [line for line in process.stdout.splitlines() if line.startswith(_RESULT)]
    if lines:
        result = json.loads(lines[-1].removeprefix(_RESULT))
        if "error" in result:
            raise IsolatedError(" ".join(result["error"].split()))
        return result["value"]
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        hint = " (the kernel sends it when memory runs out)" if name == "SIGKILL" else ""
        raise IsolatedError(f"the process was killed by {name}{hint}")
    last = "".join(process.stderr.strip().splitlines()[-1:])
    raise IsolatedError(f"the process exited with code {process.returncode} and no result: {last or 'no message'}")
