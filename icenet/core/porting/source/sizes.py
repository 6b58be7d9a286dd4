"""Names of sizes, such as B, T, H and W, and shapes in comments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

from icenet.core.porting.record import Dim, Tensor

LONGEST = 14
"""The number of characters of the longest size in a comment."""


def named(shapes: Iterable[Sequence[Dim]], taken: set[str], is_time_first: bool = False) -> dict[str, str]:
    """Returns names of the open sizes of some arguments, by their expressions.

    Args:
        shapes: The shapes of the arguments.
        taken: Variables that have another meaning.
        is_time_first: Whether sequences are [T, B, C], and not [B, T, C].
    """
    names: dict[str, str] = {}
    for shape in shapes:
        for letter, size in zip(_letters(shape, is_time_first), shape, strict=False):
            if isinstance(size, int) or size in names:
                continue
            used = {*names.values(), *taken}
            options = [letter, letter.lower(), *(f"{letter}{number}" for number in range(2, 99))]
            options = options if letter in taken else [letter, *options[2:]]
            names[size] = next(option for option in options if option not in used)
    return names


def _letters(shape: Sequence[Dim], is_time_first: bool) -> str:
    """Returns a letter for each axis of a shape. A size that is a number is that of the channels."""
    fixed = [isinstance(size, int) for size in shape]
    if len(shape) == 5 and fixed[2] and not any(fixed[:2]):
        return "BTCHW"  # a video
    if len(shape) == 5:
        return "BDHWC" if fixed[-1] and not fixed[1] else "BCDHW"
    if len(shape) == 4:
        return "BCHW" if not fixed[-1] else "BHTC" if fixed[1] else "BHWC"
    if len(shape) == 3 and fixed[1] and not fixed[2]:
        return "BCT"
    return {3: "TBC", 2: "TB"}.get(len(shape), "B") if is_time_first else "BTC"[: len(shape)]


def shape_comment(tensor: Tensor, names: dict[str, str]) -> str:
    """Returns a shape with the names of its sizes; an empty string if a size has none or is long."""
    sizes = [_size(str(size), names) for size in tensor.shape]
    is_known = all(len(size) < LONGEST and not re.search(r"\b[a-z]+\d+\b", size) for size in sizes)
    return f"[{', '.join(sizes)}]" if is_known and sizes else ""


def _size(expression: str, names: dict[str, str]) -> str:
    """Returns the expression of a size with names, and with the parentheses that it needs."""
    for part, name in sorted(names.items(), key=lambda item: -len(item[0])):
        if expression == part:
            return name
        if part.isidentifier():
            expression = re.sub(rf"\b{part}\b", name, expression)
        elif re.fullmatch(r"\([^()]*\)", part):
            expression = expression.replace(part, f"({name})")
    if expression.isalnum():
        return expression
    try:
        tree = _Products([*names.values()]).visit(ast.parse(expression, mode="eval"))
    except SyntaxError:
        return expression
    return ast.unparse(tree).replace(" * ", "*").replace(" // ", "//")


class _Products(ast.NodeTransformer):
    """Brings the factors of a product in the order of the sizes: H*W for W*H."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def visit_BinOp(self, node: ast.BinOp) -> ast.BinOp:
        self.generic_visit(node)
        left, right = node.left, node.right
        if isinstance(node.op, ast.Mult) and isinstance(left, ast.Name) and isinstance(right, ast.Name):
            places = [self.names.index(item.id) for item in (left, right) if item.id in self.names]
            if len(places) == 2 and places[0] > places[1]:
                node.left, node.right = right, left
        return node
