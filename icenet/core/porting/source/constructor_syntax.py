"""The constructors of the original as they are written: which expression it gives to each argument of a layer."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from icenet.core.porting.statements import syntax_tree

_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
_TRANSPOSED = (*_CONVOLUTION[:5], "output_padding", "groups", "bias", "dilation")
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "nn.Linear": ("in_features", "out_features", "bias"),
    "nn.Embedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    "PaddedEmbedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    "nn.LayerNorm": ("normalized_shape", "eps"),
    "nn.RMSNorm": ("normalized_shape", "eps"),
    "nn.BatchNorm": ("num_features", "eps", "momentum"),
    "nn.InstanceNorm": ("num_features", "eps"),
    "nn.GroupNorm": ("num_groups", "num_channels", "eps"),
    "MultiheadSelfAttention": ("embed_dim", "num_heads"),
    "MultiheadAttention": ("embed_dim", "num_heads"),
    **{f"nn.Dropout{rank}": ("p",) for rank in ("", "2d", "3d")},
    **{f"nn.Conv{rank}d": _CONVOLUTION for rank in (1, 2, 3)},
    **{f"nn.ConvTranspose{rank}d": _TRANSPOSED for rank in (1, 2, 3)},
    **{f"nn.{kind}Pool{rank}d": _CONVOLUTION[2:5] for kind in ("Max", "Avg") for rank in (1, 2, 3)},
    **{f"{bi}{kind}": ("input_size", "hidden_size", "num_layers") for bi in ("", "Bi") for kind in ("LSTM", "GRU")},
}
"""The arguments of the layers of torch.nn in their order, by their names in the source of a port."""
_LISTS = {"Sequential", "ModuleList"}
_FILLED = {"ones", "zeros", "empty", "full", "randn", "rand", "Tensor", "FloatTensor"}
"""Functions of torch whose arguments are sizes."""


@dataclass(frozen=True)
class Original:
    """A constructor of the original.

    Attributes:
        parameters: Its parameters, without `self`.
        defaults: Their default values.
        attributes: The values that it gives to attributes, by name.
        appended: The values that it appends to lists in attributes or variables.
        assigned: The values that it gives to variables.
        targets: The variables without a known value: those of loops, and those that are computed from themselves.
        functions: The functions of the file that return a call, such as `conv3x3`.
        calls: What it calls.
    """

    parameters: tuple[str, ...]
    defaults: dict[str, ast.expr]
    attributes: dict[str, list[ast.expr]] = field(default_factory=dict)
    appended: dict[str, list[ast.expr]] = field(default_factory=dict)
    assigned: dict[str, list[ast.expr]] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    calls: list[ast.Call] = field(default_factory=list)

    def variable(self, name: str) -> ast.expr | None:
        """Returns the only value that the constructor gives to a variable."""
        values = self.assigned.get(name, [])
        return values[0] if len(values) == 1 and name not in self.parameters else None

    def source_of(self, key: str) -> str:
        """Returns the variable or attribute of which a variable is a copy; `key` itself if it is none."""
        while (variable := self.variable(key)) is not None and key_of(variable):
            key = key_of(variable)
        return key

    def gives(self, kind: str, number: int, parameter: str) -> bool:
        """Returns whether it gives a class an argument: the one with a number or a name."""
        for call in self.calls:
            if key_of(call.func).rpartition(".")[2] == kind:
                is_open = any(isinstance(item, ast.Starred) for item in call.args)
                if is_open or len(call.args) > number or any(item.arg in (parameter, None) for item in call.keywords):
                    return True
        return False

    def pairs(
        self, line: str, signatures: Mapping[str, Any], layers: Mapping[str, Original | None]
    ) -> Iterator[tuple[int, ast.expr, bool]]:
        """Yields the column of each number of a written statement, with an expression that the original has there.

        The third value is whether it is sure that the number is that of the expression. It is not where the original
        calls something unknown, such as `norm_layer(dim)`.

        Args:
            line: The statement, such as `self.fc = nn.Linear(64, 256)`.
            signatures: The arguments of other generated classes, by name.
            layers: The constructors of classes that become a layer, by name; None if there are several.
        """
        bare = line.lstrip()
        try:
            statement = ast.parse(bare).body[0]
        except SyntaxError:
            return
        if not isinstance(statement, ast.Assign):
            return
        name = key_of(statement.targets[0]).removeprefix("self.")
        pairing = _Pairing(self, signatures, layers)
        for key in dict.fromkeys((name, f"_{name}")):
            for theirs in self.attributes.get(key, []):
                for column, expression in pairing.of(statement.value, theirs):
                    yield column + len(line) - len(bare), expression, column not in pairing.unsure
            for theirs in self.appended.get(key, []):
                for ours, _ in _elements(statement.value):
                    for column, expression in pairing.of(ours, theirs):
                        yield column + len(line) - len(bare), expression, column not in pairing.unsure


def key_of(node: ast.AST) -> str:
    """Returns a variable or an attribute as text, "dim" or "config.hidden_size"; empty for another node."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        outer = key_of(node.value)
        return f"{outer}.{node.attr}" if outer else ""
    return ""


def alternatives(node: ast.expr | None) -> list[ast.expr]:
    """Returns the expressions of which a value is one: those of `a or b` and of `a if c else b`."""
    if isinstance(node, ast.IfExp):
        return [*alternatives(node.body), *alternatives(node.orelse)]
    if isinstance(node, ast.BoolOp):
        return [inner for item in node.values for inner in alternatives(item)]
    return [node] if node is not None else []


def is_loop_variable(original: Original, key: str) -> bool:
    """Returns whether a variable is one of a loop, or a part of it."""
    return key.partition(".")[0] in original.targets


@functools.lru_cache(maxsize=512)
def original_at(file: str, line: int) -> Original | None:
    """Returns the constructor at a line of a file, None if there is none."""
    functions, constructors = _functions(file)
    node = constructors.get(line)
    return _original(node, functions) if node is not None else None


@functools.lru_cache(maxsize=64)
def _functions(file: str) -> tuple[dict[str, ast.FunctionDef], dict[int, ast.FunctionDef]]:
    """Returns the functions of a file that only return a call, by name, and the constructors by first line."""
    tree = syntax_tree(file)
    functions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            body = [item for item in node.body if not isinstance(item, ast.Expr)]
            if len(body) == 1 and isinstance(body[0], ast.Return) and isinstance(body[0].value, ast.Call):
                functions[node.name] = node
    constructors = {
        min([node.lineno, *(item.lineno for item in node.decorator_list)]): node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    }
    return functions, constructors


def _original(function: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> Original:
    given = function.args
    parameters = [*given.posonlyargs, *given.args]
    defaults = dict(zip([item.arg for item in parameters[::-1]], given.defaults[::-1], strict=False))
    for item, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        if default is not None:
            defaults[item.arg] = default
    names = [item.arg for item in (*parameters[1:], *given.kwonlyargs)]
    made = Original(tuple(names), defaults, functions=functions)
    changed: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.For, ast.comprehension)):
            made.targets.update(item.id for item in ast.walk(node.target) if isinstance(item, ast.Name))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                _note(made, target, node.value)
        elif isinstance(node, ast.Call):
            made.calls.append(node)
        elif isinstance(node, ast.AugAssign):
            made.targets.update(item.id for item in ast.walk(node.target) if isinstance(item, ast.Name))
            changed.add(key_of(node.target).removeprefix("self."))
        elif isinstance(node, ast.NamedExpr):
            _note(made, node.target, node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if node.func.attr in ("register_buffer", "register_parameter", "add_module") and len(node.args) > 1:
                if isinstance(name, str) and key_of(node.func.value) == "self":
                    made.attributes.setdefault(name, []).append(node.args[1])
            elif node.func.attr == "append" and len(node.args) == 1:
                holder = key_of(node.func.value).removeprefix("self.")
                made.appended.setdefault(holder, []).append(node.args[0])
    for name in changed & made.attributes.keys():
        del made.attributes[name]
    for name in _circular(made):
        made.targets.add(name)
        del made.assigned[name]
    return made


def _circular(made: Original) -> list[str]:
    """Returns the variables that are computed from themselves, as in `if h < w: h = w` and `else: w = h`."""
    read = {
        name: {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
        for name in made.assigned
        if (value := made.variable(name)) is not None
    }
    found = []
    for name in read:
        left, seen = [name], set[str]()
        while left:
            for inner in read.get(left.pop(), set()) - seen:
                seen.add(inner)
                left.append(inner)
        if name in seen:
            found.append(name)
    return found


def _note(made: Original, target: ast.expr, value: ast.expr) -> None:
    """Notes what an assignment gives to attributes and variables."""
    if isinstance(target, ast.Tuple):
        if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                _note(made, one, other)
        else:
            made.targets.update(item.id for item in ast.walk(target) if isinstance(item, ast.Name))
    elif isinstance(target, ast.Name):
        made.assigned.setdefault(target.id, []).append(value)
    elif key_of(target).startswith("self."):
        made.attributes.setdefault(key_of(target).removeprefix("self."), []).append(value)


def _elements(node: ast.expr) -> list[tuple[ast.expr, ast.expr | None]]:
    """Returns the elements of a list or of a sequence's layers, with the number of those of a comprehension."""
    if isinstance(node, ast.Call) and node.args:
        name = key_of(node.func).rpartition(".")[2]
        if name in _LISTS or isinstance(node.args[0], (ast.List, ast.GeneratorExp)):
            return [pair for item in node.args for pair in _elements(item)]
        return [(node, None)]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [pair for item in node.elts for pair in _elements(item)]
    if isinstance(node, ast.Starred):
        return _elements(node.value)
    if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        source = node.generators[0].iter
        is_range = isinstance(source, ast.Call) and key_of(source.func) == "range" and len(source.args) == 1
        return [(node.elt, source.args[0] if is_range and isinstance(source, ast.Call) else ast.Constant(None))]
    return [(node, None)]


def _is_list(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        name = key_of(node.func).rpartition(".")[2]
        return name in _LISTS or (len(node.args) == 1 and isinstance(node.args[0], (ast.List, ast.GeneratorExp)))
    return isinstance(node, (ast.List, ast.ListComp))


class _Pairing:
    """Walks a written expression and that of the original side by side."""

    def __init__(
        self, original: Original, signatures: Mapping[str, Any], layers: Mapping[str, Original | None]
    ) -> None:
        self.original, self.signatures, self.layers = original, signatures, layers
        self.unsure: set[int] = set()
        """The columns of numbers that may be those of other arguments."""

    def of(self, ours: ast.expr, theirs: ast.expr) -> Iterator[tuple[int, ast.expr]]:
        if _is_number(ours):
            yield ours.col_offset, theirs
            return
        if isinstance(theirs, (ast.Name, ast.Starred)) and not isinstance(ours, ast.Constant):
            inner = theirs.value if isinstance(theirs, ast.Starred) else theirs
            value = self.original.variable(inner.id) if isinstance(inner, ast.Name) else None
            if value is None or isinstance(value, ast.Name):
                return
            theirs = value
        if isinstance(theirs, ast.IfExp):
            yield from self.of(ours, theirs.body)
            yield from self.of(ours, theirs.orelse)
        elif isinstance(ours, ast.Dict):
            yield from self.dicts(ours, theirs)
        elif _is_list(ours):
            yield from self.lists(ours, theirs)
        elif isinstance(ours, ast.Call) and key_of(ours.func).startswith("mx."):
            yield from self.arrays(ours, theirs)
        elif isinstance(ours, ast.Call) and isinstance(theirs, ast.Call):
            yield from self.calls(ours, theirs)

    def dicts(self, ours: ast.Dict, theirs: ast.expr) -> Iterator[tuple[int, ast.expr]]:
        if isinstance(theirs, ast.Call) and theirs.args and key_of(theirs.func).endswith("ModuleDict"):
            theirs = theirs.args[0]
        items = {}
        if isinstance(theirs, ast.Dict):
            items = {ast.unparse(key): item for key, item in zip(theirs.keys, theirs.values, strict=True) if key}
        elif isinstance(theirs, ast.Call):
            items = {repr(item.arg): item.value for item in theirs.keywords}
        for key, value in zip(ours.keys, ours.values, strict=True):
            if key is not None and ast.unparse(key) in items:
                yield from self.of(value, items[ast.unparse(key)])

    def lists(self, ours: ast.expr, theirs: ast.expr) -> Iterator[tuple[int, ast.expr]]:
        if not _is_list(theirs):
            return
        mine, others = _elements(ours), []
        for item, count in _elements(theirs):
            value = self.original.variable(item.id) if isinstance(item, ast.Name) else None
            appended = self.original.appended.get(item.id, []) if isinstance(item, ast.Name) else []
            if value is not None and _is_list(value):
                others += _elements(value)
            if appended:
                others += [(element, ast.Constant(None)) for element in appended]
            if value is None and not appended:
                others.append((item, count))
        if len(mine) == len(others):
            pairs = list(zip(mine, others, strict=True))
        elif len(others) == 1:
            pairs = [(item, others[0]) for item in mine]
        else:
            return
        for (one, count), (other, other_count) in pairs:
            yield from self.of(one, other)
            if count is not None and other_count is not None and len(mine) == 1:
                yield from self.of(count, other_count)

    def arrays(self, ours: ast.Call, theirs: ast.expr) -> Iterator[tuple[int, ast.expr]]:
        """Yields the sizes of an array, and the number that it consists of."""
        factor = None
        for node in ast.walk(theirs):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                factor = node.left if isinstance(node.right, ast.Call) else node.right
            if isinstance(node, ast.Call) and key_of(node.func).rpartition(".")[2] in _FILLED and node.args:
                sizes = node.args
                if len(sizes) <= 2 and isinstance(sizes[0], (ast.Tuple, ast.List)):
                    sizes = sizes[0].elts
                first = ours.args[0] if ours.args else None
                if isinstance(first, ast.Tuple) and len(first.elts) == len(sizes):
                    for one, other in zip(first.elts, sizes, strict=True):
                        yield from self.of(one, other)
                if factor is not None and key_of(ours.func) == "mx.full":
                    yield from self.of(ours.args[1], factor)
                return

    def calls(self, ours: ast.Call, theirs: ast.Call) -> Iterator[tuple[int, ast.expr]]:
        """Yields the numbers of a layer with the arguments that the original gives to it."""
        if any(isinstance(item, ast.Starred) for item in theirs.args):
            return
        function = self.original.functions.get(key_of(theirs.func))
        if function is not None:
            inner = _inlined(function, theirs)
            if isinstance(inner, ast.Call):
                yield from self.calls(ours, inner)
            return
        made = self.made(theirs)
        if made is not theirs:
            yield from self.of(ours, made)
            return
        name, called = key_of(ours.func), key_of(theirs.func)
        signature = self.signatures.get(name)
        if not self.is_same(name, called):
            return
        if signature is not None:
            yield from self.instances(ours, theirs, signature)
            return
        names = _ARGUMENTS.get(name, ())
        leaf = called.rpartition(".")[2]
        layer = self.layers.get(leaf)
        if leaf in self.layers and (layer is None or "eps" not in names):
            return
        given = _given(layer.parameters if layer is not None else names, theirs)
        if layer is not None:  # a norm by hand, which has a size and an epsilon in any order
            given = {"eps" if "eps" in key else names[0]: value for key, value in reversed(given.items())}
        pairs = [*zip(names, ours.args, strict=False), *((item.arg or "", item.value) for item in ours.keywords)]
        for argument, item in pairs:
            if argument in given:
                for column, expression in self.of(item, given[argument]):
                    if self.is_open(called):
                        self.unsure.add(column)
                    yield column, expression

    def made(self, call: ast.Call) -> ast.expr:
        """Returns what a call makes: that of a lambda, of a partial function, or of the layer that a class is."""
        called = key_of(call.func)
        value = self.original.variable(called)
        if isinstance(value, ast.Lambda):
            return _Put(_given([item.arg for item in value.args.args], call)).visit(copy.deepcopy(value.body))
        if isinstance(value, ast.Call) and key_of(value.func).rpartition(".")[2] == "partial" and value.args:
            further = [item for item in value.keywords if item.arg not in [other.arg for other in call.keywords]]
            return ast.Call(value.args[0], [*value.args[1:], *call.args], [*call.keywords, *further])
        layer = self.layers.get(called.rpartition(".")[2])
        if layer is None or layer.assigned:
            return call
        for inner in layer.calls:
            if ast.unparse(inner.func) == "super().__init__" and inner.args:
                made = copy.deepcopy(inner)
                made.func = ast.Name("Layer")
                return _Put({**layer.defaults, **_given(layer.parameters, call)}).visit(made)
        return call

    def is_open(self, called: str) -> bool:
        """Returns whether a call is one of a variable, which may be any function."""
        return called in self.original.parameters or called in self.original.assigned or called.startswith("self.")

    def is_same(self, ours: str, theirs: str) -> bool:
        """Returns whether a call makes what a written one makes: by a class, or by a variable with one."""
        leaf = theirs.rpartition(".")[2]
        if self.is_open(theirs):
            return True
        return leaf.strip("_") == ours.rstrip("0123456789") if ours in self.signatures else leaf[:1].isupper()

    def instances(self, ours: ast.Call, theirs: ast.Call, signature: Any) -> Iterator[tuple[int, ast.expr]]:
        """Yields the numbers of an instance of a generated class: each is an argument, or a part of one."""
        original: Original = signature.original
        given = dict(zip(original.parameters, theirs.args, strict=False))
        given |= {item.arg: item.value for item in theirs.keywords if item.arg}
        names = [*signature.keys]
        pairs = [
            *zip(names, ours.args, strict=False),
            *((item.arg, item.value) for item in ours.keywords if item.arg),
        ]
        for name, item in pairs:
            root, _, part = signature.keys.get(name, "").partition(".")
            value = given.get(root) or original.defaults.get(root)
            copied = self.original.variable(value.id) if isinstance(value, ast.Name) else None
            if isinstance(copied, ast.Call) and key_of(copied.func).endswith("copy") and copied.args:
                value = copied.args[0]
            if value is None:
                continue
            if part:
                key = key_of(value)
                if key:
                    yield from self.of(item, ast.parse(f"{key}.{part}", mode="eval").body)
            else:
                yield from self.of(item, value)


def _given(parameters: Iterable[str], call: ast.Call) -> dict[str, ast.expr]:
    """Returns the arguments of a call by the names of the parameters."""
    given = dict(zip(parameters, call.args, strict=False))
    return given | {item.arg: item.value for item in call.keywords if item.arg}


def _inlined(function: ast.FunctionDef, call: ast.Call) -> ast.expr | None:
    """Returns what a function returns, with the arguments of a call in the place of its parameters."""
    parameters = [item.arg for item in function.args.args]
    values = dict(zip(parameters[::-1], function.args.defaults[::-1], strict=False))
    values |= dict(zip(parameters, call.args, strict=False))
    values |= {item.arg: item.value for item in call.keywords if item.arg}
    returned = next(item.value for item in function.body if isinstance(item, ast.Return))
    return _Put(values).visit(copy.deepcopy(returned)) if returned is not None else None


class _Put(ast.NodeTransformer):
    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.values.get(node.id, node))


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float, bool)
