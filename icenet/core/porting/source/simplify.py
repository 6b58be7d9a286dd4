"""Expressions of a source in the form that a person writes."""

from __future__ import annotations

import ast
import copy
import io
import math
import re
import tokenize
from typing import Any

from icenet.core.porting.layers.mlx_layers import DEFAULTS
from icenet.core.porting.source.lines import WIDTH


def simplified(code: str) -> ast.stmt:
    """Returns a statement, or the head of one, in its simplest form."""
    is_head = code.endswith(":")
    statement = ast.parse(f"{code} pass" if is_head and not code.startswith("else") else code).body[0]
    return ast.fix_missing_locations(_Simplify().visit(statement))


def text(tree: ast.AST) -> str:
    """Returns the source of a tree with double quotes."""
    generators = _Generators()
    tree = generators.visit(copy.deepcopy(tree))
    found = ast.unparse(tree)
    is_tuple = isinstance(tree, ast.Return) and isinstance(tree.value, ast.Tuple) and len(tree.value.elts) > 1
    if is_tuple and len(found) <= WIDTH - 8:  # in brackets it has several lines
        found = f"return {found[len('return (') : -1]}"
    is_pair = isinstance(tree, ast.Assign) and isinstance(tree.value, ast.Tuple) and len(tree.value.elts) > 1
    if (
        is_pair
        and isinstance(tree, ast.Assign)
        and isinstance(tree.targets[0], ast.Tuple)
        and len(found) <= WIDTH - 8
    ):
        target = ast.unparse(tree.targets[0]).removeprefix("(").removesuffix(")")
        found = f"{target} = {ast.unparse(tree.value)[1:-1]}"
    for name, inner in reversed(generators.found.items()):
        found = found.replace(name, inner)
    if isinstance(tree, (ast.If, ast.For)) and len(tree.body) == 1 and isinstance(tree.body[0], ast.Pass):
        found = found.splitlines()[0]
    return _double_quotes(_short(found))


_FLOAT = re.compile(r"(?<![\w.\"'])(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+)(?![\w.])")
_POWER = re.compile(
    r"(?<![\w.\])}] )\b([A-Za-z_][\w.]*|\d+) \*\* (?:\((-?[A-Za-z_\d][\w.]*)\)|([A-Za-z_\d][\w.]*))(?![\w.(\[])"
)


def _short(code: str) -> str:
    """Writes 1e-06 as 1e-6, 1000000.0 as 1e6, and a power of simple operands without spaces."""

    def number(match: re.Match[str]) -> str:
        value = float(match[0])
        short = re.sub(
            r"e([+-]?)0*", lambda m: "e" + m[1].replace("+", ""), f"{value:g}" if value >= 1e6 else match[0]
        )
        return short if float(short) == value and len(short) < len(match[0]) else match[0]

    parts = re.split(r"(\"[^\"]*\"|'[^']*')", code)  # strings stay as they are
    parts[::2] = [_POWER.sub(r"\1**\2\3", _FLOAT.sub(number, part)) for part in parts[::2]]
    parts[::2] = [re.sub(r" \*\* \((-[\w.]+)\)(?! \*\*)", r" ** \1", part) for part in parts[::2]]
    return "".join(parts)


class _Generators(ast.NodeTransformer):
    """Puts names in the place of generators that are the only argument: `ast.unparse` writes them in two brackets."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        if len(node.args) == 1 and isinstance(node.args[0], ast.GeneratorExp) and not node.keywords:
            name = f"generator_{len(self.found)}_"
            self.found[name] = ast.unparse(node.args[0])[1:-1]
            node.args = [ast.Name(name)]
        return node


def _double_quotes(code: str) -> str:
    if "'" not in code:
        return code
    lines = code.splitlines(keepends=True)
    try:
        tokens = list(
            tokenize.generate_tokens(io.StringIO(code if not code.endswith(":") else code + "\n    pass").readline)
        )
    except (tokenize.TokenError, IndentationError):
        return code
    for (row, start), (last, end) in reversed(_strings(tokens)):
        line = lines[row - 1]
        prefix, quote, text = line[start:end].partition("'")
        if row == last and prefix in ("", "f") and quote and '"' not in text and "\\" not in text:
            lines[row - 1] = f'{line[:start]}{prefix}"{text[:-1]}"{line[end:]}'
    return "".join(lines)


def _strings(tokens: list[tokenize.TokenInfo]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns where each string starts and ends. Those within an f-string are parts of it.

    Python 3.12 and later divide an f-string into tokens, and write both kinds of strings with the same quotes.
    """
    found, starts = [], []
    for token in tokens:
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            starts.append(token.start)
        elif kind == "FSTRING_END":
            start = starts.pop()
            if not starts:
                found.append((start, token.end))
        elif kind == "STRING" and not starts:
            found.append((token.start, token.end))
    return found


_ORDER = ("stride", "padding", "dilation", "groups", "output_padding")
"""The order of keywords of convolutions; others follow."""


class Constructors(ast.NodeTransformer):
    """Removes the keywords of layers of mlx.nn that are their defaults, and brings the others in their order."""

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        name = _dotted(node.func)
        if name.startswith("nn.") and "Pool" not in name:
            kept = [
                item
                for item in node.keywords
                if not (isinstance(item.value, ast.Constant) and item.value.value == DEFAULTS.get(item.arg or "", ()))
            ]
            places = {key: index for index, key in enumerate(_ORDER)}
            node.keywords = sorted(kept, key=lambda item: places.get(item.arg or "", len(places)))
        return node


class _Simplify(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        name = _dotted(node.func)
        if name == "mx.where" and len(node.args) == 3:
            condition = node.args[0]
            if isinstance(condition, ast.Call) and _dotted(condition.func) == "mx.logical_not":
                node.args = [condition.args[0], node.args[2], node.args[1]]
        if name == "mx.fast.scaled_dot_product_attention":
            node.keywords = [item for item in node.keywords if ast.unparse(item) != "mask=None"]
        if name.startswith("mx.conv"):
            node.keywords = [item for item in node.keywords if not _is_default(item)]
        if name == "mx.full" and len(node.args) == 3 and _is_integer(node.args[1]):
            function = {"0": "zeros", "1": "ones"}.get(ast.unparse(node.args[1]))
            if function and ast.unparse(node.args[2]) != "mx.bool_":
                is_float32 = ast.unparse(node.args[2]) == "mx.float32"
                made = f"mx.{function}"
                return ast.Call(
                    ast.parse(made, mode="eval").body, [node.args[0], *node.args[2:]][: 2 - is_float32], []
                )
        if name == "mx.concatenate" and isinstance(node.args[0], ast.List) and len(node.args[0].elts) == 1:
            return node.args[0].elts[0]
        if name == "mx.diag" and len(node.args) == 2 and ast.unparse(node.args[1]) == "0":
            node.args = node.args[:1]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "flatten":
            while node.args and ast.unparse(node.args[-1]) == ("0" if len(node.args) == 1 else "-1"):
                node.args = node.args[:-1]
        if name == "mx.einsum":
            _take_axes(node)
        if name == "mx.pad" and len(node.args) == 2 and ast.unparse(node.args[1]).strip("[(0, )]") == "":
            return node.args[0]  # of no elements
        return self.transposed(node)

    def transposed(self, node: ast.Call) -> Any:
        """Joins two changes of the order of axes."""
        swapped = _swapped(node)
        if swapped and isinstance(node.func, ast.Attribute) and _swapped(node.func.value) == swapped:
            assert isinstance(node.func.value, ast.Call) and isinstance(node.func.value.func, ast.Attribute)
            return node.func.value.func.value  # x.swapaxes(1, 2).swapaxes(1, 2)
        outer = _permutation(node)
        if outer is None or not isinstance(node.func, ast.Attribute):
            return node
        product = node.func.value
        if isinstance(product, ast.Call) and _dotted(product.func) == "mx.einsum":
            return _with_result(product, outer) or node
        if outer == list(range(len(outer))):
            return node.func.value
        inner = node.func.value
        if not isinstance(inner, ast.Call) or not isinstance(inner.func, ast.Attribute):
            return node
        first = _permutation(inner) or _swap(inner, len(outer))
        if first is None or len(first) != len(outer):
            return node
        both = [first[axis] for axis in outer]
        if both == list(range(len(both))):
            return inner.func.value
        node.func.value = inner.func.value
        node.args = [ast.Constant(axis) for axis in both]
        return node

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        """Joins x[:, 0][:, None] as x[:, 0, None], and x[:, 0][:, 1] as x[:, 0, 1]."""
        self.generic_visit(node)
        if not isinstance(node.value, ast.Subscript):
            return node
        first, second = _indices(node.value), _indices(node)
        is_plain = all(isinstance(item, ast.Slice) or _is_integer(item) for item in first)
        is_part = not isinstance(node.value.slice, (ast.Tuple, ast.Slice))  # x[0] may be an element of a tuple
        numbers = [_is_new_axis(item) or _is_integer(item) or _is_inner_step(item) for item in second]
        if (
            not is_plain
            or is_part
            or not all(number or _is_whole(item) for number, item in zip(numbers, second, strict=True))
        ):
            return node
        if not any(numbers):
            return node
        joined: list[ast.expr] = []
        for item in first:
            if isinstance(item, ast.Slice):
                while second and _is_new_axis(second[0]):
                    joined.append(second.pop(0))
                other = second.pop(0) if second else None
                if other is not None and not _is_whole(other):
                    if not _is_whole(item):
                        return node  # an element of a part
                    item = other
            joined.append(item)
        joined += second
        while joined and _is_whole(joined[-1]):
            joined.pop()
        return ast.Subscript(node.value.value, ast.Tuple(joined, ast.Load()), node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        self.generic_visit(node)
        if node.attr == "T" and isinstance(node.value, ast.Attribute) and node.value.attr == "T":
            return node.value.value
        made = node.value
        if node.attr == "shape" and isinstance(made, ast.Call) and _dotted(made.func) in ("mx.zeros", "mx.ones"):
            return made.args[0]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        right = node.right
        if (
            isinstance(node.op, ast.Add)
            and isinstance(right, ast.UnaryOp)
            and isinstance(right.op, ast.USub)
            and isinstance(right.operand, ast.Constant)
        ):
            return ast.BinOp(node.left, ast.Sub(), right.operand)
        node.left, node.right = _broadcast(node.left, node.right), _broadcast(node.right, node.left)
        return node

    def visit_Constant(self, node: ast.Constant) -> Any:
        value = node.value
        if not isinstance(value, float) or math.isinf(value) or math.isnan(value):
            return node
        written = _written(value)
        return ast.parse(written, mode="eval").body if written else node


def _broadcast(value: ast.expr, other: ast.expr) -> ast.expr:
    """Returns an operand without the `mx.broadcast_to(value, x.shape)` that an operation with x does itself."""
    if isinstance(value, ast.Call) and _dotted(value.func) == "mx.broadcast_to" and isinstance(other, ast.Name):
        return value.args[0] if ast.unparse(value.args[1]) == f"{other.id}.shape" else value
    return value


def _letters(node: ast.Call) -> str:
    """Returns the letters of an `mx.einsum`, empty if they do not name all axes."""
    spec = ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else ""
    return spec if isinstance(spec, str) and "." not in spec else ""


def _take_axes(node: ast.Call) -> None:
    """Gives `mx.einsum` its operands without a change of their axes: the letters change."""
    given, arrow, result = _letters(node).partition("->")
    if not given:
        return
    letters = given.split(",")
    for number, operand in enumerate(node.args[1:]):
        if not isinstance(operand, ast.Call) or not isinstance(operand.func, ast.Attribute):
            continue
        axes = _permutation(operand) or _swap(operand, len(letters[number]))
        if axes is not None and len(axes) == len(letters[number]):
            own = dict(zip(axes, letters[number], strict=True))
            letters[number] = "".join(own[axis] for axis in range(len(axes)))
            node.args[number + 1] = operand.func.value
    node.args[0] = ast.Constant(",".join(letters) + arrow + result)


def _with_result(node: ast.Call, axes: list[int]) -> ast.Call | None:
    """Returns an `mx.einsum` whose result has its axes in another order, None if it does not name them."""
    head, arrow, result = _letters(node).partition("->")
    if len(result) != len(axes) or not arrow:
        return None
    node.args[0] = ast.Constant(f"{head}->{''.join(result[axis] for axis in axes)}")
    return node


def _is_default(item: ast.keyword) -> bool:
    """Returns whether a keyword of a convolution is its default."""
    default = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}.get(item.arg or "")
    return default is not None and isinstance(item.value, ast.Constant) and item.value.value == default


def _written(value: float) -> str:
    """Returns the expression from which a number comes, such as math.sqrt(8); an empty string if none is known."""
    limits = {"float32": 2.0**127 * (2 - 2.0**-23), "bfloat16": 2.0**127 * (2 - 2.0**-7)}
    for name, number in limits.items():
        if abs(value) == number:
            return f"mx.finfo(mx.{name}).{'min' if value < 0 else 'max'}"
    short = re.sub(r"e[+-]0*", lambda m: m[0].rstrip("0").rstrip("+"), f"{value:g}")
    if "e" in short and len(short) + 2 < len(repr(value)) and float(short) == value:
        return short
    if len(repr(value)) < 12:
        return ""
    square = round(value * value)
    if 2 <= square < 10**6 and math.sqrt(square) == value:
        return f"math.sqrt({square})"
    if 0 < value < 1:
        whole = round(1 / value)
        if whole < 10**4 and 1 / whole == value:
            return f"1 / {whole}"
        square = round(1 / (value * value))
        if 2 <= square < 10**6 and 1 / math.sqrt(square) == value:
            return f"1 / math.sqrt({square})"
        if square**-0.5 == value:
            return f"{square}**-0.5"
        rest = round(1 - value, 6)
        if 1 - rest == value:
            return f"1 - {rest}"
    if value == math.sqrt(2 / math.pi):
        return "math.sqrt(2 / math.pi)"
    number = round(math.exp(value)) if value < 20 else 0
    if 2 <= number < 10**6 and math.log(number) == value:
        return f"math.log({number})"
    for divisor in range(2, 1025):  # sinusoidal positions
        if value == math.log(10000) / divisor:
            return f"math.log(10000) / {divisor}"
    return ""


def _permutation(node: ast.Call) -> list[int] | None:
    """Returns the axes of a transpose that names them all."""
    if not isinstance(node.func, ast.Attribute) or node.func.attr != "transpose" or node.keywords:
        return None
    axes = [item.value for item in node.args if isinstance(item, ast.Constant) and type(item.value) is int]
    return axes if len(axes) == len(node.args) and axes and sorted(axes) == list(range(len(axes))) else None


def _swapped(node: ast.AST) -> set[str]:
    """Returns the axes of a swap as they are written, none for another expression."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "swapaxes":
        return set()
    return {ast.unparse(item) for item in node.args}


def _swap(node: ast.Call, ndim: int) -> list[int] | None:
    """Returns the axes of a swap in a value with a number of axes."""
    if not isinstance(node.func, ast.Attribute) or node.func.attr != "swapaxes":
        return None
    try:
        first, second = (ast.literal_eval(item) for item in node.args)
    except ValueError:
        return None
    axes = list(range(ndim))
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def _indices(node: ast.Subscript) -> list[ast.expr]:
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def _is_whole(item: ast.expr) -> bool:
    return isinstance(item, ast.Slice) and item.lower is None and item.upper is None and item.step is None


def _is_new_axis(item: ast.expr) -> bool:
    return isinstance(item, ast.Constant) and item.value is None


def _is_integer(item: ast.expr) -> bool:
    item = item.operand if isinstance(item, ast.UnaryOp) else item
    is_step = isinstance(item, ast.Name) and item.id == "step"  # of a loop
    return is_step or (isinstance(item, ast.Constant) and type(item.value) is int)


def _is_inner_step(item: ast.expr) -> bool:
    """Returns whether an index is the counter of a loop within a loop; of an array, too, it may follow a number."""
    return isinstance(item, ast.Name) and item.id == "i"


def _dotted(node: ast.expr) -> str:
    return (
        f"{node.value.id}.{node.attr}" if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
    )
