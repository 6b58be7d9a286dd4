"""`icenet parity mine.py:Net ref.py:Net`: compares modules that files of the user define."""

from __future__ import annotations

import shlex
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icenet.commands.parity import progress_bar
from icenet.core import backends, weights
from icenet.core.config import user_code
from icenet.core.errors import DataError, UsageError, WeightsError
from icenet.core.models import modules
from icenet.core.report.console import new_console
from icenet.parity import ALL_STAGES, Report, compare, read_trace, record

_STYLES = {"✓": "green", "✗": "bold red", "~": "yellow", "·": "yellow", "-": "dim"}
"""Styles of the lines of a report, by their marks."""


def compare_files(
    module: str,
    reference: str,
    *,
    input_file: Path | None = None,
    weights_file: Path | None = None,
    seed: int = 0,
    dtype: str = "fp32",
    rename: Mapping[str, str] | None = None,
    stages: Sequence[str] | None = None,
    copy_weights: bool | None = None,
    replay: Path | None = None,
    quiet: bool = False,
) -> Report:
    """Compares two modules that files define (see `icenet.parity.compare`). The files are run.

    Args:
        module, reference: `FILE.py:NAME` of a module, or of a class or function without arguments that returns one.
        input_file: A .npz file with the arguments; None to draw them.
        weights_file: A .safetensors file whose tensors both modules receive; None to keep the weights they have.
        seed, dtype, rename, stages, copy_weights, replay: See `icenet.parity.compare`.
        quiet: Show no progress bar.

    Raises:
        UsageError: A file or a name in it is wrong, or the modules cannot be compared.
        DataError: The inputs cannot be read.
        WeightsError: The weights do not fit.
    """
    a, b = (load_module(name, weights_file, rename) for name in (module, reference))
    inputs = None if input_file is None else read_inputs(input_file)
    options = {"dtype": dtype, "seed": seed, "replay": None if replay is None else str(replay)}
    return _compare(a, b, inputs, stages, quiet, rename=rename, copy_weights=copy_weights, **options)


def _compare(a: Any, b: Any, inputs: Any, stages: Sequence[str] | None, quiet: bool, **options: Any) -> Report:
    """Returns the report of `icenet.parity.compare`, with the command that makes it."""
    chosen = ALL_STAGES if stages is None else tuple(stages)
    with progress_bar(quiet) as update:
        report = compare(a, b, inputs, stages=chosen, progress=update, **options)
    report.command = shlex.join(["icenet", *sys.argv[1:]])
    return report


def record_file(
    module: str,
    folder: Path,
    *,
    input_file: Path | None = None,
    weights_file: Path | None = None,
    seed: int = 0,
    dtype: str = "fp32",
) -> str:
    """Records a module that a file defines (see `icenet.parity.record`), and returns one line on the trace.

    Args:
        module, input_file, weights_file, seed, dtype: See `compare_files`.
        folder: Folder of the trace.

    Raises:
        UsageError: The file, a name in it or the folder is wrong, or the module fails.
        DataError: The inputs cannot be read.
        WeightsError: The weights do not fit.
    """
    loaded = load_module(module, weights_file)
    inputs = None if input_file is None else read_inputs(input_file)
    with progress_bar() as update:
        written = record(loaded, inputs, folder, dtype=dtype, seed=seed, progress=update)
    size = sum(file.stat().st_size for file in written.iterdir())
    return f"recorded {module}: {written} ({size / 1e6:.1f} MB); check a module against it with icenet parity check"


def check_file(
    module: str,
    trace: Path,
    *,
    weights_file: Path | None = None,
    rename: Mapping[str, str] | None = None,
    stages: Sequence[str] | None = None,
    copy_weights: bool | None = None,
    quiet: bool = False,
) -> Report:
    """Compares a module that a file defines with a trace.

    Args:
        module, weights_file, rename, stages, copy_weights, quiet: See `compare_files`.
        trace: Folder of the trace.

    Raises:
        UsageError: The file or a name in it is wrong, or the module cannot be compared.
        DataError: The trace cannot be read.
        WeightsError: The weights do not fit.
    """
    recorded = read_trace(trace)
    tested = load_module(module, weights_file, rename)
    options = {"rename": rename, "dtype": recorded.dtype, "copy_weights": copy_weights}
    return _compare(tested, recorded, None, stages, quiet, **options)


def load_module(reference: str, weights_file: Path | None = None, rename: Mapping[str, str] | None = None) -> Any:
    """Returns the module that `FILE.py:NAME` names. This runs the file.

    Args:
        reference: `FILE.py:NAME` of a module, or of a class or function without arguments that returns one.
        weights_file, rename: See `set_weights`; None keeps the weights that the module has.

    Raises:
        UsageError: There is no such file or name, or calling it fails.
        WeightsError: The weights do not fit.
    """
    module = _defined(reference)
    if weights_file is not None:
        set_weights(module, weights_file, rename)
    return module


def _defined(reference: str) -> Any:
    """Returns what `FILE.py:NAME` defines, or what it returns."""
    file, separator, name = reference.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise UsageError(f"{reference}: is not FILE.py:NAME, such as mine.py:Net")
    try:
        found = getattr(user_code.run_file(Path(file), reference), name)
    except ImportError as error:
        raise UsageError(f"{reference}: {error}") from None
    except AttributeError:
        raise UsageError(f"{reference}: {file} has no {name!r}") from None
    if not callable(found) or (hasattr(found, "parameters") and not isinstance(found, type)):
        return found  # compare says what is no module
    return user_code.call(found, reference)


def set_weights(module: Any, file: Path, rename: Mapping[str, str] | None = None) -> None:
    """Sets the weights of a module to those of a .safetensors file with PyTorch's names and axes.

    Args:
        module: A module of MLX or PyTorch.
        file: The file.
        rename: The names of MLX, see `icenet.from_torch`.

    Raises:
        FileError: The file cannot be read.
        UsageError: It is no module.
        WeightsError: The weights do not fit.
    """
    values = weights.read(file)
    try:
        if backends.backend_of(module) == "mlx":
            modules.from_torch(values, module, rename)
        else:
            modules.set_weights(module, values)
    except WeightsError as error:
        raise WeightsError(f"{file}: {str(error).removeprefix('from_torch: nothing is copied; ')}") from None


def read_inputs(file: Path) -> Any:
    """Returns the arguments that a .npz file holds: keyword arguments, or a tuple if they are named arr_0, arr_1, ...

    Raises:
        DataError: The file cannot be read, or an array has no numbers, such as one of strings.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, KeyError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is no .npz file of arrays"
        raise DataError(f"{file}: cannot be read ({reason}); write it with numpy.savez({str(file)!r}, x=x)") from None
    if not found:
        raise DataError(f"{file}: has no arrays")
    for name, array in found.items():
        if array.dtype.kind in "USMm":  # not "V": numpy writes bfloat16 so
            raise DataError(f"{file}: {name} is an array of {array.dtype}, not of numbers; leave it out of the file")
    positional = [f"arr_{i}" for i in range(len(found))]
    return tuple(found[name] for name in positional) if set(found) == set(positional) else found


def show(report: Report, html: Path | None = None) -> None:
    """Prints a report, with colors in a terminal."""
    from rich.text import Text

    console = new_console()
    first, *lines = str(report).splitlines()
    console.print(Text(first, "bold green" if report.passed else "bold red"))
    for line in lines:
        console.print(Text(line, _STYLES.get(line.strip()[:1], "")), soft_wrap=True)
    if html is not None:
        console.print(Text(f"page: {html}"), soft_wrap=True)
