"""The line of the user's code at which an export or a call fails."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from pathlib import Path

import torch

from icenet.core.errors import PortError
from icenet.core.messages import first_line

TORCH = str(Path(torch.__file__).parent)
HERE = str(Path(__file__).parent)
PYTHON = sysconfig.get_paths()["stdlib"]
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_CONTROL = re.compile(r"\b(if|for|while|assert|and|or|not|any|all|bool)\b")
"""What a line has that reads the values of a tensor as a condition."""
TESTED = ("2.11", "2.13")
"""The versions of PyTorch with which ports are tested."""


def where(error: Exception) -> str:
    """Returns the last line of the user's code in a traceback, or an empty string."""
    places = users_lines(error)
    return "{}:{}: {!r}: ".format(*places[-1]) if places else ""


def users_lines(error: Exception) -> list[tuple[str, int, str]]:
    """Returns file, line and code of each frame of a traceback in code of the user, or of a package that it uses."""
    return [
        (frame.filename, frame.lineno or 0, frame.line or "")
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((TORCH, HERE, "<"))
        and "/icenet" not in frame.filename
        and (not frame.filename.startswith(PYTHON) or "site-packages" in frame.filename)
    ]


def hint(error: Exception) -> str:
    """Returns what to do about ids that are no integers, or none of the table; else an empty string."""
    if "Long, Int" in str(error):  # of an embedding
        return "; give ids as integers, such as --shape 2x12:int1000 or torch.randint(1000, (2, 12))"
    if "index out of range in self" not in str(error):
        return ""
    given = [frame.f_locals.get("weight") for frame, _ in traceback.walk_tb(error.__traceback__)]
    rows = next((len(weight) for weight in reversed(given) if isinstance(weight, torch.Tensor)), None)
    if rows is None:
        return ""
    return f"; the table has {rows} rows: give ids below {rows}, such as --shape 2x12:int{rows}"


def is_data_dependent(error: Exception) -> bool:
    return "data-dependent" in str(error).lower() or "DataDependent" in type(error).__name__


def broken(error: Exception) -> PortError:
    """Returns the error that names the line of the user's code at which the graph breaks."""
    text = str(error)
    places = users_lines(error)
    for match in FRAME.finditer(text):  # the code of the user in a message of torch
        if not match["file"].startswith((TORCH, HERE)) and match["file"].startswith("/"):
            places.append((match["file"], int(match["line"]), ""))
    first = re.sub(r"\s+", " ", first_line(error))
    where = code = ""
    if places:
        file, line, code = places[-1]
        code = code or linecache.getline(file, line).strip()
        where = f"{file}:{line}: {code!r}: "
    remedy = ""
    if unknown := re.match(r"Found <class '([^']+)'> in output", text):
        first = f"the output has a {unknown[1].rpartition('.')[2]}"
        remedy = "; return tensors, numbers, dicts, lists, tuples or data classes of them"
        if unknown[1].endswith("Cache"):
            remedy += ", for a model of transformers by example_kwargs={'use_cache': False}"
    elif is_data_dependent(error) and (not places or _CONTROL.search(code)):
        first = "the control flow depends on the values of a tensor"
        remedy = "; write it with torch.where, or compute the condition before the call"
    elif is_data_dependent(error):
        first = "a size depends on the values of a tensor"
        remedy = "; give it as an argument that is a number, or compute with the largest size and mask the rest"
    elif isinstance(error, TypeError) and ("forward()" in text or "argument" in text):
        remedy = "; check the example inputs"
    elif "fake tensor in the exported program constant" in text:
        first = "a tensor is changed through .data, as in buffer.data.copy_(...), which an export does not see"
        remedy = "; write buffer.copy_(...) under torch.no_grad()"
    elif "Constraints violated" in text:
        remedy = "; give `dynamic` only the dimensions that may change"
    return PortError(f"{where}cannot be exported: {first}{remedy}{version_note(torch.__version__)}")


def version_note(version: str) -> str:
    """Returns what is said of a version of PyTorch that is older than those with which ports are tested."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers >= tuple(map(int, TESTED[0].split("."))):
        return ""
    return f"; this is PyTorch {version}, and icenet.port is tested with {' and '.join(TESTED)}"
