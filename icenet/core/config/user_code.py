"""Runs a Python file of the user together with the modules next to it.

As in a script, `from layers import Block` imports `layers.py` or the package `layers` from the folder of the file
before an installed module of that name. `from .layers import Block` does the same.

Unlike a script, the file changes neither `sys.path` nor the imports of other modules. It is run as a package of its
own, and the modules next to it are submodules of that package. Two files in different folders can therefore have
siblings of the same name, and a sibling `random.py` does not replace the `random` of the standard library elsewhere.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from icenet.core.errors import IceNetError, UsageError
from icenet.core.host import blas
from icenet.core.messages import first_line

_PREFIX = "icenet_custom_"
"""Beginning of the names of these packages in `sys.modules`."""


def run_file(file: Path, key: str = "model.type") -> ModuleType:
    """Runs a file as a module, once for each version of its content and of the modules next to it.

    Args:
        file: The file.
        key: The key that names it, for messages.

    Raises:
        ImportError: The file imports something that does not exist; the message names the line.
        UsageError: The file cannot be read, or fails to run.
    """
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{key}: {file} cannot be read: {error.strerror}") from None
    name = _PREFIX + hashlib.sha256(str(file.resolve()).encode() + source).hexdigest()[:16]
    if name in sys.modules and not _has_changed(name):
        return sys.modules[name]
    _forget(name)
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    folder = str(file.resolve().parent)
    spec = importlib.util.spec_from_file_location(
        name, file, loader=_Loader(name, str(file)), submodule_search_locations=[folder]
    )
    if spec is None or spec.loader is None:
        raise UsageError(f"{key}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # under both names: a sibling that imports this file gets this module
    sys.modules[name] = sys.modules[f"{name}.{file.stem}"] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        _forget(name)
        message = str(error).replace(f"{name}.", "")
        raise ImportError(f"{message}{_in_brackets(error)}") from None
    except (Exception, SystemExit) as error:
        _forget(name)
        reason = first_line(error)
        where = "" if isinstance(error, SyntaxError) else _in_brackets(error)
        raise UsageError(f"{key}: {file} cannot be run: {type(error).__name__}: {reason}{where}") from None
    return module


def call(function: Callable[[], Any], reference: str) -> Any:
    """Returns what a class or function of a user's file returns without arguments.

    Args:
        function: The class or function.
        reference: Its name, for messages.

    Raises:
        UsageError: It needs arguments, or fails; the message names the line.
    """
    try:
        with contextlib.suppress(ValueError):  # some of C have no signature
            inspect.signature(function).bind()
    except TypeError as error:
        raise UsageError(
            f"{reference}: cannot be called without arguments ({error}); name a function without arguments that "
            f"returns the module"
        ) from None
    try:
        return function()
    except IceNetError:
        raise
    except (Exception, SystemExit) as error:
        reason = first_line(error, "")
        raise UsageError(f"{reference}: fails: {type(error).__name__}: {reason}{_in_brackets(error)}") from error


def hashes(module: str) -> dict[str, str]:
    """Returns the SHA-256 of each file of the user that was run for a module, by its path relative to their folder.

    Args:
        module: Name of the module of a class in such a file; of another module the result is empty.
    """
    package = module.partition(".")[0]
    if not package.startswith(_PREFIX) or package not in sys.modules:
        return {}
    found = {}
    for name, each in list(sys.modules.items()):
        loader = getattr(each.__spec__, "loader", None) if name.partition(".")[0] == package else None
        if isinstance(loader, _Loader):
            path = os.path.relpath(loader.path, os.path.dirname(_loader_of(package).path))
            found[Path(path).as_posix()] = hashlib.sha256(loader.source).hexdigest()
    return dict(sorted(found.items()))


def changed(folder: Path, stored: Mapping[str, str]) -> list[str]:
    """Returns the names of the files in a folder whose content differs from what `hashes` returned."""
    contents = {name: _read(str(folder / name)) for name in stored}
    return [
        name
        for name, content in contents.items()
        if content is not None and hashlib.sha256(content).hexdigest() != stored[name]
    ]


def _loader_of(package: str) -> _Loader:
    loader = getattr(sys.modules[package].__spec__, "loader", None)
    assert isinstance(loader, _Loader)
    return loader


class _Loader(SourceFileLoader):
    """Runs the source of a module, never a compiled file next to it, which the user cannot read."""

    source: bytes = b""

    def get_code(self, fullname: str) -> Any:
        self.source = self.get_data(self.path)
        return self.source_to_code(self.source, self.path)

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import_of(package)}
        super().exec_module(module)


class _Finder:
    """The entry of `sys.meta_path` that finds the modules next to a file. It finds only source files and folders."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if path is None or not name.startswith(_PREFIX):
            return None
        found = (FileFinder(folder, (_Loader, [".py"])).find_spec(name) for folder in path)
        return next((spec for spec in found if spec is not None), None)


def _import_of(package: str) -> Callable[..., ModuleType]:
    """Returns the `__import__` of the modules of a package: it looks for a submodule of the package first."""

    def import_module(
        name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] | None = (), level: int = 0
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level > 0 or not _is_sibling(package, top):
            if top == "mlx" and level == 0:
                blas.load()  # before MLX, also if the file imports it before a module of IceNet
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        if fromlist:
            return builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
        importlib.import_module(f"{package}.{name}")
        return sys.modules[f"{package}.{top}"]

    return import_module


def _is_sibling(package: str, name: str) -> bool:
    """Returns whether a module of a name is next to the file of a package.

    A folder without `__init__.py`, such as one of data, counts only if no other module has the name, as in Python.
    """
    spec = importlib.util.find_spec(f"{package}.{name}")
    if spec is None or spec.loader is not None:
        return spec is not None
    with contextlib.suppress(ValueError):  # a module without a spec, such as __main__
        return importlib.util.find_spec(name) is None
    return False


def _has_changed(package: str) -> bool:
    """Returns whether the source of a module of a package differs from what was run."""
    for name, module in list(sys.modules.items()):
        loader = getattr(module.__spec__, "loader", None) if name.startswith(f"{package}.") else None
        if isinstance(loader, _Loader) and loader.source != _read(loader.path):
            return True
    return False


def _read(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def _in_brackets(error: BaseException) -> str:
    where = location(error)
    return f" ({where})" if where else ""


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def location(error: BaseException) -> str:
    """Returns the last line of a user's file that an error passed through, `layers.py, line 3`; empty without one."""
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith(_PREFIX)
    ]
    return f"{os.path.basename(frames[-1][0])}, line {frames[-1][1]}" if frames else ""


@contextlib.contextmanager
def explain_errors(inputs: Any, what: str = "model", remedy_of_ids: str = "") -> Iterator[None]:
    """Turns an error in the file of a user's model or loss into a UsageError with the line and the inputs.

    Args:
        inputs: The inputs: an array of any framework.
        what: The code that may fail: model or loss.
        remedy_of_ids: What to do if a model fails on ids; by default what to change in the data.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError) as error:
        where = location(error)
        reason = first_line(error, "")
        if not where or isinstance(error, IceNetError) or "out of memory" in reason.lower():
            raise
        dtype, shape = str(inputs.dtype).rpartition(".")[2], list(inputs.shape)
        remedy = ""
        if "object is not callable" in reason and type(inputs).__module__.startswith("mlx"):
            remedy = "; in MLX a module computes in its method __call__, not forward"
        elif dtype.startswith("int") and what == "model" and not isinstance(error, AttributeError | NameError):
            remedy = remedy_of_ids or (
                "if it is a model of images, set data.kind=images and data.source; if it has fewer than"
                f" {shape[-1]} positions, set data.seq_length and model.max_seq_length"
            )
            remedy = f"; {remedy}"
        raise UsageError(
            f"{where}: the {what} fails on inputs {dtype} {shape}: {type(error).__name__}: {reason}{remedy}"
        ) from error
