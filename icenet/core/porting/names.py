"""The names of attributes in a port.

MLX takes arrays and modules of an attribute that begins with "_" for no parameters: they are not trained and not
saved. So such an attribute of the original has a name without the underscore.
"""

from __future__ import annotations

from icenet.core.porting.record import Graph

_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict")


def new_names(*graphs: Graph | None) -> dict[str, str]:
    """Returns the attribute of each module and array whose name begins with "_", by its path in the original.

    A constant of a graph is an attribute of the whole module.
    """
    paths: dict[str, tuple[str, str]] = {}
    modules = {}
    for graph in graphs:
        if graph is None:
            continue
        modules.update(graph.modules)
        for path in graph.modules:
            paths[path] = _parts(path)
        for array in graph.arrays.values():
            paths[array.path] = ("", flat(array.path)) if array.kind == "constant" else _parts(array.path)
    siblings: dict[str, set[str]] = {}
    for owner, leaf in paths.values():
        siblings.setdefault(owner, set()).add(leaf)
    found: dict[str, str] = {}
    for path, (owner, leaf) in paths.items():
        is_item = owner in modules and modules[owner].class_name in _CONTAINERS
        if not leaf.startswith("_") or is_item:
            continue
        name = leaf.lstrip("_") or "module"
        while name in siblings[owner]:
            name += "_"
        siblings[owner].add(name)
        found[path] = name
    return found


def flat(path: str) -> str:
    """Returns the path of a constant as one name."""
    return path.replace(".", "_")


def _parts(path: str) -> tuple[str, str]:
    owner, _, leaf = path.rpartition(".")
    return owner, leaf


def native(path: str, names: dict[str, str]) -> str:
    """Returns a path of the original with the names in the port."""
    parts = path.split(".")
    return ".".join(names.get(".".join(parts[: end + 1]), part) for end, part in enumerate(parts))


def optimizer_notes(*graphs: Graph | None) -> list[str]:
    """Returns a note for each parameter that MLX's optimizers do not train as PyTorch's do.

    They keep values of their own next to those of the children, and square a complex gradient as it is.
    """
    trained = {
        array.path: array
        for graph in graphs
        if graph is not None
        for array in graph.arrays.values()
        if array.kind == "parameter" and array.is_trainable
    }
    children = {path.partition(".")[0] for path in trained}
    notes = [
        f"{name}: MLX's optimizers have a value of their own under this name, and fail to update the port; to train "
        f"it, give the optimizer a module that holds the port as a child, or rename {name} in the original"
        for name in ("learning_rate", "step")
        if name in children
    ]
    complex_ones = [path for path, array in trained.items() if array.tensor.is_complex]
    if complex_ones:
        notes.append(
            f"{complex_ones[0]} is complex: optimizers of MLX that square gradients, such as Adam, update it "
            "otherwise than PyTorch's; SGD does not"
        )
    return notes
