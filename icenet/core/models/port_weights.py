"""The weights of a port and of its original: their places, which the port or its folder holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icenet.core import backends
from icenet.core.errors import FileError, WeightsError
from icenet.core.porting.places import Place, Places
from icenet.core.weights import layout, sharing

_PLACES = "icenet_places"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The number of an element of a list in a path."""


def mark(mlx_module: Any, places: Places) -> None:
    """Notes the places of a port, and the further names of its arrays in the original, at its class."""
    setattr(type(mlx_module), _PLACES, places)
    others = {path: places[path].name for path in _shared(places)}
    setattr(type(mlx_module), sharing.OTHER_NAMES, others)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config.json of the folder of a port, with its places under `weights`.

    Raises:
        FileError: It is no such folder.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config["weights"] = {
            name: Place(**{**place, "axes": tuple(place["axes"])}) for name, place in config["weights"].items()
        }
        return {**config, "class": str(config["class"]), "layout": str(config["layout"])}
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}; give the folder that icenet port --out has written") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileError(f"{path}: not the config of a port, or of an older version: port the module again") from None


def places_of(mlx_module: Any, torch_module: Any) -> Places | None:
    """Returns the places of a port; None if the modules are not a port and a module with its original's arrays.

    A module of a saved port has them in the config.json next to its file.
    """
    kind = type(mlx_module)
    places: Places | None = getattr(kind, _PLACES, None)
    if places is None and (file := getattr(getattr(kind.__call__, "__code__", None), "co_filename", "")):
        folder = Path(file).parent
        if Path(file).name != "model.py" or not (folder / "config.json").is_file():
            return None
        try:
            config = read_config(folder)
        except FileError:
            return None
        if config["class"] != kind.__name__:
            return None
        places = config["weights"]
        assert places is not None
        mark(mlx_module, places)
    if places is None:
        return None
    tensors = backends.module("torch", "porting.weights").tensors(torch_module)
    arrays = backends.module("mlx", "porting.weights").arrays(mlx_module)
    return _of_arrays(places, tensors, arrays)


def _of_arrays(places: Places, tensors: Iterable[str], arrays: Iterable[str]) -> Places | None:
    """Returns the places of two modules with these arrays; None if they are not a port and its original.

    They may have more layers or fewer than those of which the places are: `blocks.4.conv` has the axes of `blocks.3`.
    """
    given, own = set(tensors), set(arrays)
    found = {path: place for path, place in places.items() if place.name in own or not place.is_saved}
    like = {_numbered(path): place for path, place in places.items() if place.kind != "constant"}
    for path in given - places.keys():
        if (place := like.get(_numbered(path))) is not None:
            found[path] = replace(place, name=_with_numbers(place.name, path))
    present = {place.name for path, place in _of_original(found).items() if path in given}
    if any(place.name not in present for place in _of_original(found).values()):
        return None  # of a shared array one name is enough
    constants = {place.name for place in found.values() if place.kind == "constant"}
    return found if own <= present | constants else None


def _numbered(path: str) -> str:
    """Returns a path without its numbers."""
    return _NUMBER.sub("*", path)


def _with_numbers(name: str, path: str) -> str:
    """Returns a name with the numbers of a path."""
    numbers = iter(_NUMBER.findall(path))
    return _NUMBER.sub(lambda match: next(numbers, match[0]), name)


@dataclass(frozen=True)
class MLXFacts:
    """How the MLX form of a trained port has the weights of its original.

    Attributes:
        kinds: Module path -> layer kind.
        names: MLX's name -> canonical name, where the two differ.
        aliases: Further names of shared arrays, which the port does not have.
    """

    kinds: dict[str, str]
    names: dict[str, str]
    aliases: set[str]


def mlx_facts(config: Any, prefix: str, kinds: Mapping[str, str]) -> MLXFacts:
    """Returns how the MLX form has the weights of a port. MLX is not needed.

    Args:
        config: The model section of a configuration, whose `port` is the folder of the port.
        prefix: The path of the port in the model.
        kinds: Module path -> layer kind of the model, whose module is the port or its original. A port computes some
            layers by functions, whose arrays keep the original's axes.

    Raises:
        FileError: The folder is not that of a port.
        WeightsError: The port has an array with other axes than those of MLX's layer.
    """
    folder = Path(config.port)
    places: Places = read_config(folder)["weights"]
    found, names = dict(kinds), {}
    aliases = {layout.join(prefix, path) for path in _shared(places)}
    unchanged: set[str] = set()
    permuted: set[str] = set()
    for path, place in _of_original(places).items():
        own = layout.join(prefix, path)
        if not place.is_saved or layout.is_left_out(kinds, own):
            continue
        if place.name != path and own not in aliases:
            names[layout.join(prefix, place.name)] = own
        module, name = layout.split(own)
        axes = layout.rule(kinds.get(module, "plain"), name).to_mlx
        if axes is not None:
            (permuted if place.axes else unchanged).add(module)
        if place.axes and place.axes != axes:
            raise WeightsError(f"{folder}: holds {path} with the axes {list(place.axes)}, which no layer of MLX has")
    if mixed := sorted(unchanged & permuted):
        raise WeightsError(f"{folder}: holds some arrays of {mixed[0]} with the axes of PyTorch and some with MLX's")
    found |= dict.fromkeys(unchanged, "plain")
    return MLXFacts(found, names, aliases)


def to_torch(places: Places, mlx_module: Any, torch_module: Any) -> None:
    """Copies the arrays of a port to its original, with its buffers that are not persistent.

    Raises:
        WeightsError: A shape differs; nothing is copied.
    """
    ours, theirs = backends.module("mlx", "porting.weights"), backends.module("torch", "porting.weights")
    found, tensors = ours.arrays(mlx_module), theirs.arrays(torch_module)
    values = {
        path: place.to_torch(found[place.name])
        for path, place in _of_original(places).items()
        if path in tensors
        and (place.is_saved or place.name in found)  # a trained model holds the others as constants
    }
    _check("to_torch", {path: (tuple(tensors[path].shape), value.shape) for path, value in values.items()})
    theirs.assign(torch_module, values)


def from_torch(places: Places, torch_module: Any, mlx_module: Any) -> None:
    """Copies the arrays of the original to its port.

    Raises:
        WeightsError: A shape differs, or two arrays that the original shared are unequal; nothing is copied.
    """
    ours, theirs = backends.module("mlx", "porting.weights"), backends.module("torch", "porting.weights")
    found, tensors = ours.arrays(mlx_module), sharing.complete(theirs.arrays(torch_module), _shared(places))
    own = {path: p for path, p in _of_original(places).items() if p.is_saved or p.name in found}
    values = {place.name: place.to_port(tensors[path]) for path, place in own.items()}
    shapes = {path: (values[place.name].shape, found[place.name].shape) for path, place in own.items()}
    _check("from_torch", shapes)
    ours.assign(mlx_module, values)


def _of_original(places: Places) -> dict[str, Place]:
    return {path: place for path, place in places.items() if place.kind != "constant"}


def _shared(places: Places) -> dict[str, str]:
    """Returns the first path of each further path of an array in the original."""
    first: dict[str, str] = {}
    owners = {path: first.setdefault(place.name, path) for path, place in places.items()}
    return {path: owner for path, owner in owners.items() if path != owner}


def _check(function: str, shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    problems = [
        f"{path} has the shape {list(torch_shape)}, in the port {list(own_shape)}"
        for path, (torch_shape, own_shape) in shapes.items()
        if tuple(torch_shape) != tuple(own_shape)
    ]
    if problems:
        raise WeightsError(f"{function}: nothing is copied; {'; '.join(problems)}")
