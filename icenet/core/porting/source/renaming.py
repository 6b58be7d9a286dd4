"""Variables that had to make way for the name of a helper function which the source does not have after all."""

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
    names = {item.id for item in found} | {*body.parameters}
    free = {name for name in names if name.endswith("_") and helpers.exists(name[:-1])}
    free = {name for name in free if name[:-1] not in functions | names and name not in body.parameters}
    for item in found:
        if item.id in free:
            item.id = item.id[:-1]
