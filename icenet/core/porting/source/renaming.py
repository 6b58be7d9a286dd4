"""Variables and arguments that made way for the name of a function which the source does not call after all."""

from __future__ import annotations

import ast

from icenet.core.porting.source import helpers
from icenet.core.porting.source.lines import Body


def free_names(body: Body, trees: list[ast.stmt], functions: set[str]) -> None:
    """Gives variables such as `std_` the name of the original, in place.

    Args:
        body: The body of a method.
        trees: Its statements.
        functions: The names of the functions of the source.
    """
    found = [item for tree in trees for item in ast.walk(tree) if isinstance(item, ast.Name)]
    names = {item.id for item in found} | {*body.names}
    free = {name for name in names if name.endswith("_") and helpers.exists(name[:-1])}
    free = {name for name in free if name[:-1] not in functions | names and name not in body.names}
    for item in found:
        if item.id in free:
            item.id = item.id[:-1]


def free_arguments(body: Body, trees: list[ast.stmt], arguments: list[str]) -> None:
    """Gives the parameters the names of the original, such as `len` for `len_`, unless the body needs that name.

    Args:
        body: The body of a method; left as it is if the parameters are not those of the original.
        trees: Its statements, which are changed.
        arguments: The parameters of the original's forward.
    """
    parameters = [name for name in body.names if name != "*"]
    if [name.rstrip("_") for name in parameters] != [name.rstrip("_") for name in arguments]:
        return
    found = [item for tree in trees for item in ast.walk(tree) if isinstance(item, ast.Name)]
    used = {item.id for item in found} | {*parameters}
    free = {name: own for name, own in zip(parameters, arguments, strict=True) if name != own and own not in used}
    for item in found:
        item.id = free.get(item.id, item.id)
    body.parameters = [
        text.replace(name, free[name], 1) if (name := text.partition("=")[0]) in free else text
        for text in body.parameters
    ]
