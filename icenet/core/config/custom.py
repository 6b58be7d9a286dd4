"""Models in a user's own file, named in the configuration: `type: my_models.py:CustomModel`.

Such a file is code and is run. Only what a person names is: a configuration file given to a command or to
`Config.from_yaml`, or `--trust-code`. What a checkpoint names is not, since a checkpoint may come from anyone.

The file holds a subclass of `BaseModel` for one backend. Its twin for the other has the same class name, in
the same file or in `my_models_torch.py` (`my_models_mlx.py`) beside it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from icenet.core.errors import BackendError, ConfigError, UsageError

_BASES = {"mlx": "icenet.models.base", "torch": "icenet_torch.models.base"}

_trusted: set[Path] = set()
_trust_everything = False


def is_custom(family: Any) -> bool:
    """Whether a `type` names a class in a file."""
    return isinstance(family, str) and ".py:" in family


def split(family: str) -> tuple[Path, str]:
    """The file and the class of `my_models.py:CustomModel`."""
    file, _, name = family.rpartition(":")
    return Path(file), name


def beside(family: str, folder: Path) -> str:
    """The same `type`, its file looked for in the working folder first and then in `folder`."""
    file, name = split(family)
    if file.is_absolute() or file.is_file() or not (folder / file).is_file():
        return family
    return f"{os.path.relpath(folder / file)}:{name}"


def trust(family: str) -> None:
    """Allows the file that a `type` names, and its twins, to be run: a person has named it."""
    if is_custom(family):
        _trusted.add(split(family)[0].resolve())


def trust_everything() -> None:
    """Allows whatever a checkpoint names (`--trust-code`)."""
    global _trust_everything
    _trust_everything = True


def model_class(family: str, backend: str) -> type[Any]:
    """The class that a `type` names, for a backend.

    Raises:
        UsageError: the file is not trusted, not there, cannot be run, or has no such class.
        BackendError: the class is written for the other backend only.
    """
    file, name = split(family)
    if not file.is_file():
        raise ConfigError(f"model.type: {file}: no such file; run this in the folder that it lies in")
    if not _trust_everything and file.resolve() not in _trusted:
        raise UsageError(f"the model is code of its own, {family}: read it, then add --trust-code to run it")
    found, problems = [], []
    # the twin first: the other backend's file would import the other framework
    for candidate in (file.with_name(f"{file.stem}_{backend}.py"), file):
        if not candidate.is_file():
            continue
        try:
            made: Any = getattr(_module(candidate), name, None)
        except ImportError as error:  # of the other framework, where only one is installed
            problems.append(f"{candidate} cannot be imported: {error}")
            continue
        written_for = _backend_of(made)
        if written_for == backend:
            return made  # type: ignore[no-any-return]
        found.append(written_for)
    if problems:  # first: a twin that is there and cannot be imported is not missing
        raise UsageError(f"model.type: {problems[0]}")
    other = {"mlx": "torch", "torch": "mlx"}[backend]
    if other in found:
        raise BackendError(
            f"{family} is written for {other} only: choose --backend {other}, "
            f"or write its twin {file.stem}_{backend}.py:{name}"
        )
    raise UsageError(f"model.type: {file} has no class {name} that is a subclass of {_BASES[backend]}.BaseModel")


def _backend_of(made: Any) -> str | None:
    """The backend of a proper subclass of a `BaseModel`, told without importing either; None of anything else."""
    if isinstance(made, type):
        for base in made.__mro__[1:]:
            for backend, module in _BASES.items():
                if (base.__module__, base.__name__) == (module, "BaseModel"):
                    return backend
    return None


def _module(file: Path) -> ModuleType:
    """Runs a file as a module, once for each of its versions.

    What is run is the text that a person can read, never a compiled form that lies beside it.
    """
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UsageError(f"model.type: {file} cannot be read: {error.strerror}") from None
    name = f"icenet_custom_{hashlib.sha256(str(file.resolve()).encode() + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise UsageError(f"model.type: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
    except ImportError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"model.type: {file} cannot be run: {type(error).__name__}: {first}") from None
    return module
