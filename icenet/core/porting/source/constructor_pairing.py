"""Which expression of the original's constructor stands in the place of each number of a written one."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from icenet.core.porting.source.constructor_syntax import Original, key_of

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
_DICTS = ("ModuleDict", "Sequential", "OrderedDict", "dict")
_FILLED = {"ones", "zeros", "empty", "full", "randn", "rand", "Tensor", "FloatTensor"}
"""Functions of torch whose arguments are sizes."""


class Pairing:
    """Walks a written statement and that of the original side by side.

    Args:
        original: The constructor of the original.
        signatures: The arguments of other generated classes, by name.
        layers: The constructors of classes that become a layer, by name; None if there are several.
    """

    def __init__(
        self, original: Original, signatures: Mapping[str, Any], layers: Mapping[str, Original | None]
    ) -> None:
        self.original, self.signatures, self.layers = original, signatures, layers
        self.unsure: set[int] = set()
        """The columns of numbers that may be those of other arguments."""

    def pairs(self, line: str) -> Iterator[tuple[int, ast.expr, bool]]:
        """Yields the column of each number of a written statement, with an expression that the original has there.

        The third value is whether it is sure that the number is that of the expression. It is not where the original
        calls something unknown, such as `norm_layer(dim)`.

        Args:
            line: The statement, such as `self.fc = nn.Linear(64, 256)`.
        """
        bare = line.lstrip()
        try:
            statement = ast.parse(bare).body[0]
        except SyntaxError:
            return
        if not isinstance(statement, ast.Assign):
            return
        name = key_of(statement.targets[0]).removeprefix("self.")
        for key in dict.fromkeys((name, f"_{name}")):
            given = [(statement.value, theirs) for theirs in self.original.attributes.get(key, [])]
            appended = self.original.appended.get(key, [])
            given += [(ours, theirs) for theirs in appended for ours, _ in _elements(statement.value)]
            for ours, theirs in given:
                for column, expression in self.of(ours, theirs):
                    yield column + len(line) - len(bare), expression, column not in self.unsure

    def of(self, ours: ast.expr, theirs: ast.expr) -> Iterator[tuple[int, ast.expr]]:
        """Yields the column of each number of a written expression, with what an expression has there."""
        if isinstance(ours, ast.Call) and key_of(ours.func) == "NamedSequential":
            ours = ours.args[0]
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
        elif isinstance(ours, ast.DictComp):
            for element in self.appended_to(theirs):
                yield from self.of(ours.value, element)
        elif _is_list(ours):
            yield from self.lists(ours, theirs)
        elif isinstance(ours, ast.Call) and key_of(ours.func).startswith("mx."):
            yield from self.arrays(ours, theirs)
        elif isinstance(ours, ast.Call) and isinstance(theirs, ast.Call):
            yield from self.calls(ours, theirs)

    def dicts(self, ours: ast.Dict, theirs: ast.expr) -> Iterator[tuple[int, ast.expr]]:
        for element in self.appended_to(theirs):
            for value in ours.values:
                yield from self.of(value, element)
        while isinstance(theirs, ast.Call) and theirs.args and key_of(theirs.func).endswith(_DICTS):
            theirs = theirs.args[0]
        items = {}
        if isinstance(theirs, ast.Dict):
            items = {ast.unparse(key): item for key, item in zip(theirs.keys, theirs.values, strict=True) if key}
        elif isinstance(theirs, ast.Call):
            items = {repr(item.arg): item.value for item in theirs.keywords}
        elif isinstance(theirs, ast.List):  # of pairs
            parts = [item.elts for item in theirs.elts if isinstance(item, ast.Tuple) and len(item.elts) == 2]
            items = {ast.unparse(key): value for key, value in parts}
        for key, value in zip(ours.keys, ours.values, strict=True):
            if key is not None and ast.unparse(key) in items:
                yield from self.of(value, items[ast.unparse(key)])

    def appended_to(self, theirs: ast.expr) -> list[ast.expr]:
        """Returns what the original puts into a dict of which it makes a sequence: `nn.Sequential(layers)`."""
        while isinstance(theirs, ast.Call) and theirs.args and key_of(theirs.func).endswith(_DICTS):
            theirs = theirs.args[0]
        return self.original.appended.get(theirs.id, []) if isinstance(theirs, ast.Name) else []

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
        given = _given(original.parameters, theirs)
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


def _given(parameters: Iterable[str], call: ast.Call) -> dict[str, ast.expr]:
    """Returns the arguments of a call by the names of the parameters."""
    given = dict(zip(parameters, call.args, strict=False))
    return given | {item.arg: item.value for item in call.keywords if item.arg}


def _inlined(function: ast.FunctionDef, call: ast.Call) -> ast.expr | None:
    """Returns what a function returns, with the arguments of a call in the place of its parameters."""
    parameters = [item.arg for item in function.args.args]
    values = dict(zip(parameters[::-1], function.args.defaults[::-1], strict=False))
    values |= _given(parameters, call)
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
