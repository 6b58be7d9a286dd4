"""Chooses a backend and imports it. The only place in core that imports a backend, by name and when it is needed.

A backend is a package with the folders `models`, `nn`, `generation`, `engine` and `tools`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from icenet.core.config import Config, custom
from icenet.core.errors import BackendError, IceNetError, UsageError
from icenet.core.host import blas as blas_library
from icenet.core.importing import interrupt_deferred, without_garbage_collection
from icenet.core.messages import first_line

if TYPE_CHECKING:
    from icenet.core.engine import Engine

PACKAGES = {"mlx": "icenet", "torch": "icenet_torch"}
"""The package of each backend. `auto` tries them in this order."""
_INSTALL = {
    "mlx": "pip install 'icenet[cpu]' on Linux, 'icenet[cuda]' with an NVIDIA GPU, 'icenet' on a Mac",
    "torch": "pip install 'icenet[torch]'",
}


def resolve(name: str, blas: str = "auto") -> str:
    """Imports the framework of a backend and returns the backend's name.

    Args:
        name: mlx, torch or auto. auto is mlx if it runs here, otherwise torch.
        blas: The configuration's BLAS for MLX on a Linux CPU. The environment variable ICENET_BLAS overrides it.

    Raises:
        BackendError: The backend is not installed or does not start; with auto, none does.
    """
    if name != "auto":
        _import(name, blas)
        return name
    reasons = []
    for candidate in PACKAGES:
        try:
            _import(candidate, blas)
            return candidate
        except BackendError as error:
            reasons.append(str(error))
    raise BackendError("no backend runs here. " + "; ".join(reasons))


def choose(config: Config, backend: str | None = None) -> str:
    """Returns the backend for a configuration: `backend` if given, otherwise the configuration's.

    For a model in a user's file, auto is a backend for which the file has a class.

    Raises:
        BackendError: As in `resolve`, or the user's file has no class for the backend.
    """
    name = backend or config.backend
    if name != "auto" or not custom.is_custom(config.model.type) or custom.has_port(config.model):
        return resolve(name, config.blas)
    reasons: list[IceNetError] = []
    for candidate in PACKAGES:
        try:
            resolve(candidate, config.blas)
            custom.model_class(config.model.type, candidate)
            return candidate
        except BackendError as error:
            reasons.append(error)
    raise reasons[0]


def check_name(name: str) -> None:
    """Checks the name of a backend that is given in Python.

    Raises:
        BackendError: There is no such backend.
    """
    if name not in (*PACKAGES, "auto"):
        raise BackendError(f"no backend {name!r}; one of mlx, torch, auto")


def installed(name: str) -> bool:
    """Returns whether a backend's framework is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def _import(name: str, blas: str = "auto") -> None:
    check_name(name)
    framework = "mlx.core" if name == "mlx" else "torch"
    if not installed(name):
        others = [other for other in PACKAGES if other != name and installed(other)]
        alternative = f"; or use --backend {others[0]}" if others else ""
        raise BackendError(f"backend {name} is not installed: {_INSTALL[name]}{alternative}")
    try:
        if name == "mlx":
            blas_library.load(blas)
        if framework not in sys.modules:
            with without_garbage_collection(), interrupt_deferred():  # torch's start ends the process otherwise
                importlib.import_module(framework)
    except (ImportError, OSError) as error:
        first = first_line(error)
        raise BackendError(f"backend {name} is installed but does not start ({first}); see icenet doctor") from None


def module(name: str, part: str) -> ModuleType:
    """Imports a module of a backend: `module("torch", "engine.engine")` is `icenet_torch.engine.engine`."""
    _import(name)
    found = f"{PACKAGES[name]}.{part}"
    if found in sys.modules:
        return sys.modules[found]
    with without_garbage_collection():
        return importlib.import_module(found)


def backend_of(module: object) -> str:
    """Returns the backend of a module: "mlx" for an `mlx.nn.Module`, "torch" for a `torch.nn.Module`.

    Raises:
        UsageError: It is neither.
    """
    for base in type(module).__mro__:
        framework = base.__module__.partition(".")[0]
        if base.__name__ == "Module" and framework in PACKAGES:
            return framework
    if isinstance(module, type):
        raise UsageError(f"{module.__name__}: a class, not a module; create one: {module.__name__}(...)")
    if isinstance(module, Mapping):
        raise UsageError(
            f"{type(module).__name__}: not a module; give the module that has these weights, which icenet.from_torch "
            "copies"
        )
    raise UsageError(f"{type(module).__name__}: not a module; give an mlx.nn.Module or a torch.nn.Module")


def engine(
    config: Config, backend: str | None = None, device: str | None = None, *, dtype: str = "float32"
) -> Engine:
    """Returns a new engine.

    Args:
        config: The configuration.
        backend, device: Override the configuration's.
        dtype: The dtype of the parameters: float32, or float64 for a reference (PyTorch only).
    """
    new: Engine = module(choose(config, backend), "engine.engine").Engine(config, device or config.device, dtype)
    return new


def meta_model(config: Config) -> Any:
    """Returns a model of a configuration without parameter values: its shapes, layer kinds and sizes.

    These do not depend on the backend. That of the configuration is used if it runs here, otherwise any.
    """
    try:
        name = choose(config)
    except BackendError:
        name = choose(config, "auto")
    return module(name, "engine.build").meta_model(config)
