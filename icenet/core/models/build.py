"""Builds a model of either backend from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from icenet.core import backends
from icenet.core.config import Config, ModelConfig, custom, user_code
from icenet.core.errors import ConfigError, IceNetError, UsageError
from icenet.core.models.base import ModelBase


def check_config(model: Any) -> None:
    """Checks that a model has the arrays of its config. A saved model is built from it, and so are checkpoints.

    A model that was changed after it was built has others: a new head, or parametrized layers. Quantized layers are
    not in the config, but in the file of the weights. The class of a custom model is not built again here.

    Raises:
        UsageError: An array is missing, is not one of the config's, or has another shape.
    """
    config = model.config
    if custom.is_custom(config.type):
        return
    found = model.weight_shapes()
    built = backends.module(model.backend, "engine.build").meta_model(Config(model=config))
    built.quantize_layers(model.quantized_layers())
    expected = built.weight_shapes()
    names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if names:
        ours, theirs = (
            str(list(shapes[names[0]])) if names[0] in shapes else "absent" for shapes in (found, expected)
        )
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UsageError(
            f"the model differs from its config, model.type {config.type}, from which it is built when it is loaded: "
            f"{names[0]} is {ours} in the model, {theirs} by the config{more}; change model.config too, or save the "
            "weights alone: icenet.core.weights.write(path, model.weights())"
        )


def class_of(config: ModelConfig, backend: str) -> type[Any]:
    """Returns the class of a custom model for a backend. This runs the user's files.

    Raises:
        ConfigError, UsageError, BackendError: As in `custom.model_class`.
    """
    if custom.has_port(config):
        found: type[Any] = backends.module(backend, "models.ported").PortedModel
        return found
    return custom.model_class(config.type, backend)


def new_model(
    config: ModelConfig, families: Mapping[str, Callable[..., Any]], backend: str, seed: int | None = None
) -> Any:
    """Returns a model of one of the backend's families or of a class in the user's file.

    Args:
        config: The model's section of the configuration.
        families: The backend's model classes by the value of `model.type`.
        backend: mlx or torch.
        seed: Seed of the initial weights; without one the weights are undefined.

    Raises:
        ConfigError: The user's class does not accept its options.
        UsageError: The user's class holds layers that the framework does not train, or a class of its file does not
            call the framework's `__init__`.
    """
    if not custom.is_custom(config.type):
        return families[config.type](config, seed=seed)
    model_class = class_of(config, backend)
    try:
        model = model_class(config)
    except IceNetError:
        raise
    except (AttributeError, TypeError, ValueError) as error:  # an option that is missing, or of a wrong type
        where = user_code.location(error)
        if _lacks_init(error):
            raise _no_super(f"{config.type}: __init__", where) from error
        text = f"{config.type} cannot be built from its options under model: {error}"
        raise ConfigError(f"{text} ({where})" if where else text) from error
    _check_forward(config.type, model)
    try:
        _check_structure(config.type, model)
    except AttributeError as error:
        if not _lacks_init(error):
            raise
        raise _no_super(f"{config.type}: __init__ of {type(error.obj).__name__}") from error
    model.key_dropouts()
    model.guard_embeddings()
    model.match_gradients_at_zero()
    if seed is not None:
        model.init_weights(seed)
    return model


def _lacks_init(error: Exception) -> bool:
    """Returns whether an error says that a module has not run the framework's `__init__`."""
    if not isinstance(error, AttributeError):
        return False
    return error.name == "_no_grad" or "before Module.__init__() call" in str(error)  # that of MLX; that of PyTorch


def _no_super(what: str, where: str = "") -> UsageError:
    text = f"{what} does not begin with super().__init__(...)"
    return UsageError(f"{text} ({where})" if where else text)


def _check_forward(family: str, model: Any) -> None:
    """Raises UsageError if a user's class defines `__call__`, or no `forward`.

    `BaseModel.__call__` calls `forward` on the model's device, with its arithmetic, and parity records it.
    """
    classes = type(model).__mro__
    base = next(index for index, cls in enumerate(classes) if ModelBase in cls.__bases__)
    own = {name for cls in classes[:base] for name in vars(cls)} | set(vars(model))
    if "__call__" in own:
        raise UsageError(f"{family}: the class defines __call__, which BaseModel has; name the method forward")
    if "forward" not in own:
        raise UsageError(f"{family}: the class has no method forward, which returns the logits")


_CONTAINERS = {"mlx": "a list or a dict", "torch": "nn.ModuleList, nn.ModuleDict or nn.ParameterList"}


def _check_structure(family: str, model: Any) -> None:
    """Raises UsageError if a user's model holds layers that are not trained, or a shared array half frozen."""
    if lost := model.unregistered():
        raise UsageError(
            f"{family}: {lost[0]} is a plain container whose layers or arrays are neither trained nor saved: "
            f"make it {_CONTAINERS[model.backend]}"
        )
    model.trainable_paths()
