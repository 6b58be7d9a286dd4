"""The backend flag: from a name to an Engine. The only place that imports a backend, by name and late.

A backend is a package with the modules `models`, `nn`, `engine`, `probe` and `facts`; an Engine is its hands:
it owns one model and its optimizer and takes and gives numpy.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from icenet.core.config import Config, custom
from icenet.core.errors import BackendError, IceNetError

if TYPE_CHECKING:
    from icenet.core.engine import Engine

PACKAGES = {"mlx": "icenet", "torch": "icenet_torch"}
_INSTALL = {
    "mlx": "pip install 'icenet[cpu]' on Linux, 'icenet[cuda]' with an NVIDIA GPU, 'icenet' on a Mac",
    "torch": "pip install 'icenet[torch]'",
}


def resolve(name: str, blas: str = "auto") -> str:
    """The backend that a flag means: `auto` is mlx where it runs, else torch.

    `blas` is the configuration's choice of a BLAS for MLX on a Linux CPU; ICENET_BLAS goes before it.

    Raises:
        BackendError: the backend, or with `auto` any, is not installed or does not start.
    """
    if blas != "auto":
        os.environ.setdefault("ICENET_BLAS", blas)
    if name != "auto":
        _import(name)
        return name
    reasons = []
    for candidate in PACKAGES:
        try:
            _import(candidate)
            return candidate
        except BackendError as error:
            reasons.append(str(error))
    raise BackendError("no backend runs here. " + "; ".join(reasons))


def choose(config: Config, backend: str | None = None) -> str:
    """The backend for a configuration: what is asked for, else what it says.

    `auto` takes one that a model of the user's own is written for.
    """
    name = backend or config.backend
    if name != "auto" or not custom.is_custom(config.model.type):
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


def installed(name: str) -> bool:
    """Whether a backend's framework can be found, without importing it."""
    return importlib.util.find_spec(name) is not None


def _import(name: str) -> None:
    if name not in PACKAGES:
        raise BackendError(f"no backend {name!r}: mlx, torch or auto")
    framework = "mlx.core" if name == "mlx" else "torch"
    if not installed(name):
        others = [other for other in PACKAGES if other != name and installed(other)]
        instead = f"; or choose --backend {others[0]}" if others else ""
        raise BackendError(f"backend {name} is not installed: {_INSTALL[name]}{instead}")
    try:
        if name == "mlx":
            importlib.import_module("icenet.blas")
        importlib.import_module(framework)
    except (ImportError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendError(f"backend {name} is installed but does not start ({first}); see icenet doctor") from None


def module(name: str, part: str) -> ModuleType:
    """A module of a backend's package: `module("torch", "engine.engine")` is `icenet_torch.engine.engine`."""
    _import(name)
    return importlib.import_module(f"{PACKAGES[name]}.{part}")


def engine(
    config: Config, backend: str | None = None, device: str | None = None, *, dtype: str = "float32"
) -> Engine:
    """An Engine for a configuration; `backend` and `device` override what it says.

    `dtype` is that of the parameters: float32, or float64 for the reference of parity (PyTorch only).
    """
    name = choose(config, backend)
    made: Engine = module(name, "engine.engine").Engine(config, device or config.device, dtype)
    return made


def meta_model(config: Config) -> Any:
    """Returns a model of a configuration without parameter values: its shapes, layer kinds and sizes.

    These do not depend on the backend, so any that runs here is used.
    """
    return module(choose(config, "auto"), "engine.build").meta_model(config)


def exact_products() -> None:
    """Has MLX multiply fp32 matrices in full, for comparisons; no effect once MLX is imported.

    On CUDA and on M5 chips MLX's default is TF32, which has 10 bits of mantissa. PyTorch's default is full
    precision for products; for convolutions on CUDA the PyTorch engine asks for it where this was called.
    """
    if "mlx.core" not in sys.modules:
        os.environ["MLX_ENABLE_TF32"] = "0"
