"""Code in a file of the user, named by the configuration: `type: my_models.py:CustomModel`.

A model (`model.type`), a data set (`data.kind`) or a loss (`training.loss`). Reading it runs the file. Only files
that the user named are run: by a configuration file given to a command or to `Config.from_yaml`, or with
`--trust-code`. A file that a checkpoint names is not run, because a checkpoint may come from anyone.

The file of a model contains a subclass of `BaseModel` for one backend. The class for the other backend has the same
name and is in the same file, or in `my_models_torch.py` (`my_models_mlx.py`) next to it. The function of a loss may
be in such a file too. A data set is one class, which uses numpy. To trust a file is to trust the modules next to it
that it imports (see `icenet.core.config.user_code`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from icenet.core.config import user_code
from icenet.core.errors import BackendError, ConfigError, UsageError

PATTERN = r"^.+\.py:[A-Za-z_][A-Za-z0-9_]*$"
"""The value of a key that names code."""
_log = logging.getLogger("icenet")
_trusted: set[Path] = set()
"""The files that the user of this process has named. A checkpoint that names one of them may run it."""
_everything_trusted: ContextVar[bool] = ContextVar("everything_trusted", default=False)


def is_custom(family: Any) -> bool:
    """Returns whether a `type` names a class in a file."""
    return isinstance(family, str) and ".py:" in family


def split(family: str) -> tuple[Path, str]:
    """Splits `my_models.py:CustomModel` into file and class name."""
    file, _, name = family.rpartition(":")
    return Path(file), name


def resolve(family: str, folder: Path, key: str = "model.type") -> str:
    """Returns a `type` whose file is relative to the working directory; it is looked up there, then in `folder`.

    A warning says if both exist.
    """
    file, name = split(family)
    other = folder / file
    if file.is_absolute() or not other.is_file():
        return family
    if not file.is_file():
        return f"{os.path.relpath(other)}:{name}"
    if not file.samefile(other):
        _log.warning(
            f"{key}: {file} of the working directory is used, not {os.path.relpath(other)} next to the config; "
            f"write `{key.rpartition('.')[2]}: {os.path.relpath(other)}:{name}` for that one"
        )
    return family


def trust(family: str) -> None:
    """Allows the file of a `type` that the user named, and its counterpart for the other backend, to be run."""
    if is_custom(family):
        _trusted.add(split(family)[0].resolve())


def trust_model(model: Any) -> None:
    """Allows the files of a model section that the user gave to be run."""
    trust(model.type)
    if has_port(model):
        trust(port_reference(model))


def trust_all(config: Any) -> None:
    """Allows all files that a `Config` of the user names to be run."""
    for reference in references(config).values():
        trust(reference)


def references(config: Any) -> dict[str, str]:
    """Returns the code that a `Config` names, by key."""
    named = {"model.type": config.model.type, "data.kind": config.data.kind, "training.loss": config.training.loss}
    found = {key: value for key, value in named.items() if is_custom(value)}
    return {**found, "model.port": port_reference(config.model)} if has_port(config.model) else found


def has_port(model: Any) -> bool:
    """Returns whether a model is a PyTorch module with a port."""
    return is_custom(model.type) and model.port is not None


def port_reference(model: Any) -> str:
    """Returns the file of a model's port and the class in it, whose name is that of `type` in messages."""
    return f"{Path(model.port) / PORT_FILE}:{split(model.type)[1]}"


PORT_FILE = "model.py"
"""The file of the source in the folder of a port."""


@contextlib.contextmanager
def everything_trusted() -> Iterator[None]:
    """Allows every file that a checkpoint names to be run, while the context is open (`--trust-code`)."""
    token = _everything_trusted.set(True)
    try:
        yield
    finally:
        _everything_trusted.reset(token)


def original_of(reference: str) -> Any:
    """Returns what `type` names in a file: the class of a PyTorch module, or a function that returns one.

    Raises:
        ConfigError, UsageError: As in `model_class`.
    """
    file, name = split(reference)
    _check(reference, "model.type", "model")
    found = _read(file, name, "model.type")
    if found is None:
        raise UsageError(f"model.type: {file} has no {name}")
    return found


def port_module(model: Any) -> Any:
    """Returns the module of Python of a model's port. This runs its file.

    Raises:
        ConfigError, UsageError: As in `model_class`.
    """
    reference = port_reference(model)
    _check(reference, "model.port", "port")
    try:
        return user_code.run_file(split(reference)[0], "model.port")
    except ImportError as error:
        raise UsageError(f"model.port: {split(reference)[0]} cannot be imported: {error}") from None


def model_class(family: str, backend: str) -> type[Any]:
    """Returns the class of a `type` for a backend. This runs the file.

    Raises:
        ConfigError: The file does not exist.
        UsageError: The file is not trusted, fails to run, or has no such class.
        BackendError: The class is for the other backend only.
    """
    file, name = split(family)
    _check(family, "model.type", "model")
    backends_found, import_errors, modules = [], [], []
    # the backend's own file first: the other one would import the other framework
    for candidate in (file.with_name(f"{file.stem}_{backend}.py"), file):
        if not candidate.is_file():
            continue
        try:
            modules.append(user_code.run_file(candidate))
            found: Any = getattr(modules[-1], name, None)
        except ImportError as error:  # of the other framework, if only one is installed
            import_errors.append(f"{candidate} cannot be imported: {error}")
            continue
        found_backend = _backend_of(found)
        if found_backend == backend:
            return found  # type: ignore[no-any-return]
        backends_found.append(found_backend)
    if import_errors:  # before the error about a missing class: the class may be in the file that failed
        raise UsageError(f"model.type: {import_errors[0]}")
    other = {"mlx": "torch", "torch": "mlx"}[backend]
    if other in backends_found:
        raise BackendError(
            f"{family} is written for {other} only: choose --backend {other}, "
            f"or write {file.stem}_{backend}.py:{name} for {backend}"
        )
    if any(_is_torch_module(getattr(module, name, None)) for module in modules):
        raise UsageError(
            f"model.type: {family} is a torch.nn.Module: port it with icenet port {family} --shape SIZES --out FOLDER"
            " and set model.port: FOLDER"
        )
    package = {"mlx": "icenet", "torch": "icenet_torch"}[backend]
    raise UsageError(f"model.type: {file} has no class {name} that is a subclass of {package}.models.base.BaseModel")


def loss_function(reference: str, backend: str) -> Callable[..., Any]:
    """Returns the function of `training.loss` for a backend. This runs the file.

    Raises:
        ConfigError, UsageError: As in `model_class`.
    """
    file, name = split(reference)
    _check(reference, "training.loss", "loss")
    own = file.with_name(f"{file.stem}_{backend}.py")
    found = _read(own if own.is_file() else file, name, "training.loss")
    if not callable(found):
        raise UsageError(f"training.loss: {file} has no function {name}")
    return found  # type: ignore[no-any-return]


def data_class(reference: str) -> Callable[..., Any]:
    """Returns the class of `data.kind`. This runs the file.

    Raises:
        ConfigError, UsageError: As in `model_class`.
    """
    file, name = split(reference)
    _check(reference, "data.kind", "data set")
    found = _read(file, name, "data.kind")
    if not callable(getattr(found, "train_batch", None)):
        raise UsageError(f"data.kind: {file} has no class {name} with the method train_batch(step, batch_size)")
    return found  # type: ignore[no-any-return]


def _check(reference: str, key: str, what: str) -> None:
    """Raises an error if the file of a reference does not exist or is not trusted."""
    file, _ = split(reference)
    if not file.is_file():
        raise ConfigError(f"{key}: {file}: no such file; run this command in the folder that contains it")
    if not _everything_trusted.get() and file.resolve() not in _trusted:
        raise UsageError(
            f"the {what} is defined by Python code, {reference}: read it, then add --trust-code to run it"
        )


def _read(file: Path, name: str, key: str) -> Any:
    """Returns what has a name in a file, or None."""
    try:
        return getattr(user_code.run_file(file, key), name, None)
    except ImportError as error:
        raise UsageError(f"{key}: {file} cannot be imported: {error}") from None


def twin_file(family: str, backend: str) -> Path | None:
    """Returns the file that may hold the class of a `type` for the other backend than `backend`, or None."""
    file, _ = split(family)
    other = {"mlx": "torch", "torch": "mlx"}[backend]
    if (twin := file.with_name(f"{file.stem}_{other}.py")).is_file():
        return twin
    has_own_file = file.with_name(f"{file.stem}_{backend}.py").is_file()  # then the file itself is for the other one
    return file if has_own_file and file.is_file() else None


def _is_torch_module(found: Any) -> bool:
    """Returns whether an object is a class of PyTorch's modules, and no `BaseModel`. Imports no framework."""
    bases = found.__mro__ if isinstance(found, type) else ()
    return not any(base.__name__ == "BaseModel" for base in bases) and any(
        f"{base.__module__}.{base.__name__}" == "torch.nn.modules.module.Module" for base in bases
    )


def _backend_of(found: Any) -> str | None:
    """Returns the backend of a proper subclass of a `BaseModel`; None for anything else. Imports no framework."""
    bases = found.__mro__[1:] if isinstance(found, type) else ()
    return next(
        (vars(base)["backend"] for base in bases if base.__name__ == "BaseModel" and "backend" in vars(base)), None
    )
