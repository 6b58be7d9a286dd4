"""Writes the Python source of a port: one class for each class of the original, as a person would write it."""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from icenet.core.errors import PortError
from icenet.core.porting import helpers
from icenet.core.porting import signature as signatures
from icenet.core.porting.calls import Call, Item, tree
from icenet.core.porting.layers import DEFAULTS, NAMES, Layer
from icenet.core.porting.names import flat, new_names
from icenet.core.porting.record import Argument, Array, Graph, Module, Node, Ref, Tensor, refs
from icenet.core.porting.table import TABLE
from icenet.core.porting.table.base import Operation, atom, mlx_dtype

WIDTH = 112
"""Longest line."""
INLINE = 92
"""Longest expression that takes another expression as its argument."""

_RESERVED = {
    *dir(__builtins__),
    *keyword.kwlist,
    "mx",
    "nn",
    "math",
    "self",
    "np",
    "layer",
    "abs",
    "all",
    "any",
    "dict",
    "float",
    "int",
    "len",
    "list",
    "max",
    "min",
    "print",
    "range",
    "slice",
    "sum",
    "tuple",
    "zip",
    "input",
} - {"input"}
_METHODS = {
    "keys",
    "values",
    "items",
    "get",
    "pop",
    "update",
    "copy",
    "clear",
    "setdefault",
    "popitem",
    "fromkeys",
    "train",
    "eval",
    "state",
    "children",
    "parameters",
    "modules",
    "freeze",
    "unfreeze",
    "apply",
    "training",
    "load_weights",
    "save_weights",
    "leaf_modules",
    "named_modules",
    "update_modules",
    "set_dtype",
    "filter_and_map",
    "apply_to_modules",
    "is_module",
    "trainable_parameters",
    "trainable_parameter_filter",
    "valid_child_filter",
    "valid_parameter_filter",
}
"""Attributes of `mlx.nn.Module`, which is a dict: a layer or array of such a name is set and read as an item."""


@dataclass
class Line:
    """One statement, and a comment about its shape."""

    code: str
    comment: str = ""
    depth: int = 0


@dataclass
class Body:
    """The text of one call of a module."""

    parameters: list[str]
    lines: list[Line]
    returns: list[str]
    """The names of the values that it returns."""

    def key(self) -> str:
        return "\n".join([", ".join(self.parameters), *("    " * line.depth + line.code for line in self.lines)])


@dataclass
class Class:
    """A generated class."""

    name: str
    init: list[str]
    bodies: list[Body] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


def write(graph: Graph, layers: dict[str, Layer], train: Graph | None, title: str, trace: bool = False) -> str:
    """Returns the source of a module.

    Args:
        graph: The graph in evaluation mode, with the axes in memory.
        layers: Its layers of mlx.nn by path.
        train: The graph in training mode, None if there is none.
        title: First line of the docstring.
        trace: Whether to record every value.
    """
    return _Writer(graph, layers, train, title, trace).source()


def class_of(module: Module) -> str:
    """Returns the name of the class of a module."""
    name = module.class_name.lstrip("_")
    return name if name.isidentifier() and not keyword.iskeyword(name) and name not in ("nn", "mx") else "Module"


class Frame:
    """Writes the body of one call."""

    def __init__(self, writer: _Writer, graph: _Graph, call: Call) -> None:
        self.writer, self.graph, self.call = writer, graph, call
        self.items = list(self.flatten(call))
        self.text: dict[str, str] = {}
        self.lines: list[Line] = []
        self.names: dict[str, str] = {}
        """The value that each variable holds."""
        self.last_use: dict[str, int] = {}
        self.position = 0
        self.sizes: dict[str, str] = {}
        self.unpacked: set[str] = set()
        self.pinned: set[str] = set()
        self.runs: dict[int, int] = {}
        self.number_runs()
        """Tensors whose sizes are read later."""
        self.scope: set[str] = set()

    # ---- which values

    def flatten(self, call: Call) -> Iterator[Item]:
        for item in call.items:
            if isinstance(item, Call) and self.writer.is_inlined(item.path):
                yield from self.flatten(item)
            else:
                yield item

    def used_by(self, item: Item) -> list[str]:
        if isinstance(item, Node):
            return list(refs(item.args))
        return [name for _, name in self.graph.parameters(item)]

    def body(self) -> Body:
        graph = self.graph
        parameters = graph.parameters(self.call)
        results = graph.returns(self.call)
        final = {name: path for path, name in graph.updates_in(self.call)}
        is_root = self.call.path == "" and self.call is graph.root
        for index, item in enumerate(self.items):
            for name in self.used_by(item):
                self.last_use[name] = index
        names, defined = [name for _, name in parameters], graph.definers(self.items)
        for index, item in enumerate(self.items):
            for name in self.used_by(item):
                if graph.size(name) is not None and not (isinstance(item, Node) and item.op.startswith("sym.")):
                    for source in graph.sources_of_size(name, index, names, defined) or ():
                        self.last_use[source] = max(self.last_use.get(source, -1), index + 1)
                        self.pinned.add(source)
        outputs = list(refs(graph.graph.output_tree)) if is_root else results
        for name in (*outputs, *final):
            self.last_use[name] = len(self.items)
        self.uses = Counter(name for item in self.items for name in self.used_by(item))
        self.uses.update(outputs)
        self.uses.update(final.keys())
        self.consumer: dict[str, int] = {}
        self.users: dict[str, list[Item]] = {}
        for index, item in enumerate(self.items):
            for name in self.used_by(item):
                self.consumer[name] = index
                self.users.setdefault(name, []).append(item)
        signature = []
        if is_root and graph.graph.signature:
            signature = self.original_signature(graph.graph.signature)
        else:
            for hint, name in parameters:
                variable = self.variable(hint, name)
                self.text[name] = variable
                signature.append(variable)
        self.scope = {name for _, name in parameters}
        self.open_sizes(parameters)
        for index, item in enumerate(self.items):
            self.position = index
            if isinstance(item, Node):
                self.node(item, index)
            else:
                self.child(item, index)
        self.position = len(self.items)
        for name, path in final.items():
            target = self.writer.attribute(self.call.path, path, graph)
            if self.text.get(name) != target:
                self.lines.append(Line(f"{target} = {self.expression(Ref(name))}"))
        if is_root:
            self.lines.append(Line(f"return {self.structure(graph.graph.output_tree)}"))
        elif results:
            self.lines.append(Line("return " + ", ".join(self.expression(Ref(name)) for name in results)))
        lines = roll(self.lines)
        for line in lines:
            line.code = _RANGE.sub(self.elements, line.code)
        return Body(signature, lines, results)

    def original_signature(self, arguments: list[Argument]) -> list[str]:
        """Returns the parameters of the original, and writes the statements that check and unpack them."""

        def variable(hint: str, value: str) -> str:
            self.last_use.setdefault(value, 0)
            name = self.variable(hint, value)
            self.text[value] = name
            return name

        self.position = -1  # before the first operation
        found, lines = signatures.parameters(arguments, variable)
        for line in lines:
            code = line.lstrip()
            self.lines.append(Line(code, depth=(len(line) - len(code)) // 4))
        return found

    def open_sizes(self, parameters: list[tuple[str, str]]) -> None:
        """Names the open sizes of the arguments that are used more than once."""
        used = Counter(
            str(self.graph.size(name))
            for item in self.items
            if isinstance(item, Node)
            for name in refs(item.args)
            if self.graph.size(name) is not None and item.base != "sym.sym_size"
        )
        for _, value in parameters:
            tensor = self.graph.tensors.get(value)
            if not isinstance(tensor, Tensor):
                continue
            found = {
                axis: str(size)
                for axis, size in enumerate(tensor.shape)
                if isinstance(size, str) and size in self.writer.symbols and used[size] > 0 and size not in self.sizes
            }
            if sum(used[size] for size in found.values()) < 2:
                continue
            names = []
            for axis in range(max(tensor.ndim, 1)):
                name = self.writer.symbols[found[axis]] if axis in found else "_"
                if name != "_":
                    self.sizes[found[axis]] = name
                    self.names[name] = f"size {name}"
                    self.last_use[f"size {name}"] = len(self.items) + 1
                names.append(name)
            text = self.text[value]
            if tensor.ndim == 1 or len(names) - names.count("_") == 1:
                axis = next(axis for axis, name in enumerate(names) if name != "_")
                self.lines.append(Line(f"{names[axis]} = {text}.shape[{axis}]"))
            else:
                self.lines.append(Line(f"{', '.join(names)} = {text}.shape"))

    def elements(self, match: re.Match[str]) -> str:
        """Returns a list, or the part of it over which a loop runs."""
        text, start, stop = match[1], int(match[2]), int(match[3])
        inner = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", text)[5:]
        path = self.writer.original(self.writer.outer(self.call.path), inner)
        size = len(self.writer.modules[path].children) or len(self.writer.arrays_by_owner.get(path, ()))
        if start == 0 and stop == size:
            return text
        return f"{text}[{start or ''}:{stop if stop != size else ''}]"

    # ---- names

    def variable(self, hint: str, value: str) -> str:
        """Returns a variable for a value: that of the original if it is free."""
        hint = re.sub(r"\W", "_", hint).strip("_") or "y"
        if hint in _RESERVED or not hint.isidentifier() or hint in self.writer.used_helpers or helpers.exists(hint):
            hint += "_"
        name, number = hint, 1
        while name in self.names and self.is_live(self.names[name]) and self.names[name] != value:
            number += 1
            name = f"{hint}_{number}"
        self.names[name] = value
        return name

    def is_live(self, value: str) -> bool:
        return self.last_use.get(value, -1) > self.position

    def is_final(self, item: Item, name: str) -> bool:
        """Returns whether a value is the result of its statement: no later operation of the statement uses it."""
        users = self.users.get(name, ())
        return not any(self.is_same_statement(user, item) for user in users if user is not item)

    def is_same_statement(self, a: Item, b: Item) -> bool:
        """Returns whether one execution of a statement of the original computes both."""
        return a.place is not None and a.place == b.place and self.runs.get(id(a)) == self.runs.get(id(b))

    def number_runs(self) -> None:
        """Numbers the executions of statements: one in a loop is a sequence of operations that repeats."""
        start = 0
        while start < len(self.items):
            end = start
            while end < len(self.items) and self.items[end].place == self.items[start].place:
                end += 1
            end = max(end, start + 1)
            kinds = [_kind(item) for item in self.items[start:end]]
            size = next(
                n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n)
            )
            place = self.items[start].place
            if place is None or len(place.targets) != 1:
                size = len(kinds)
            for index in range(start, end):
                self.runs[id(self.items[index])] = start + (index - start) // size * size
            start = end

    def is_element(self, item: Item) -> bool:
        """Returns whether this is a call of an element of a list."""
        path = (
            item.args["path"]
            if isinstance(item, Node) and item.op == "layer"
            else ""
            if isinstance(item, Node)
            else item.path
        )
        parent = path.rpartition(".")[0]
        return (
            bool(parent)
            and self.writer.is_container(parent)
            and self.writer.is_dense(parent)
            and (len(self.writer.modules[parent].children) > 1)
        )

    def element_name(self, item: Item, name: str, given: str) -> str | None:
        """Returns the variable of the argument for the result of a list's element, so that a loop may run."""
        text = self.text.get(given, "")
        if (
            self.is_element(item)
            and self.names.get(text) == given
            and not self.is_live(given)
            and given not in self.scope
        ):
            return re.sub(r"_\d+$", "", text)
        return None

    def hint(self, item: Item, name: str) -> str:
        place = item.place
        if isinstance(item, Node) and item.op == "layer":
            found = self.element_name(item, name, item.args["self"].name)
            if found:
                return found
        if place is not None and place.targets and self.is_final(item, name):
            if len(place.targets) == 1:
                return place.targets[0]
            if isinstance(item, Node) and item.op == "item" and item.args["index"] < len(place.targets):
                found = place.targets[item.args["index"]]
                return found if found != "_" else "y"
        if not isinstance(item, Node):
            return item.path.rpartition(".")[2]
        if item.base in ("alias", "dropout", "detach") or self.is_plain(item):
            given = item.args.get("self", item.args.get("input"))
            source = self.text.get(given.name, "") if isinstance(given, Ref) else ""
            if source.isidentifier():  # the same value in another form
                return re.sub(r"_\d+$", "", source)
        base = item.args["path"].rpartition(".")[2] if item.op == "layer" else item.base
        if not base or base.isdigit() or self.is_element(item):
            base = "y"
        words = {"scaled_dot_product_attention": "attended", "item": "part", "view": "y", "reshape": "y"}
        return words.get(base, base)

    # ---- expressions

    def expression(self, ref: Ref) -> str:
        name = ref.name
        if name in self.text:
            return self.text[name]
        graph = self.graph
        array = graph.graph.arrays.get(name)
        if array is not None:
            return self.writer.read_array(self.call.path, array, graph)
        size = graph.size(name)
        if size is not None:
            return self.size_expression(name, size)
        raise PortError(f"{self.call.path or 'the module'}: the value {name} is not known where it is used")

    def size_expression(self, name: str, expression: str) -> str:
        """Returns the source of a size: an axis of a value that is known here, or arithmetic of sizes."""
        if expression in self.sizes:
            return self.sizes[expression]
        for value in self.text:
            tensor = self.graph.tensors.get(value)
            variable = self.text[value]
            if isinstance(tensor, Tensor) and self.names.get(variable) == value:
                sizes = list(map(str, tensor.shape))
                if expression in sizes:
                    return f"{variable}.shape[{sizes.index(expression)}]"
        node = self.graph.by_name.get(name)
        if node is not None and node.op.startswith("sym.") and node.op != "sym.sym_size":
            return self.operation(node)
        for part, tensor in self.graph.tensors.items():  # an expression such as 2*s0 of a symbol that is known
            if part in self.text and isinstance(tensor, Tensor) and self.text[part].isidentifier():
                if self.names.get(self.text[part]) != part:
                    continue
                for axis, size in enumerate(tensor.shape):
                    if isinstance(size, str) and size.isidentifier() and re.search(rf"\b{size}\b", expression):
                        source = re.sub(rf"\b{size}\b", f"{self.text[part]}.shape[{axis}]", expression)
                        if not re.search(r"\bs\d+\b|\bu\d+\b", source):
                            return source
        raise PortError(f"{self.call.path or 'the module'}: the size {expression} is not known where it is used")

    def operation(self, node: Node) -> str:
        name = node.base
        if name == "layer":
            return f"{self.writer.child(self.call.path, node.args['path'])}({self.expression(node.args['self'])})"
        found = TABLE.get(name)
        if found is None:
            raise PortError(f"{node.place or node.name}: no entry for {node.op}")
        operation = Operation(node, self.expression, self.graph.tensors.get, self.writer.used_helpers)
        operation.training = self.graph.graph.training  # type: ignore[attr-defined]
        return found(operation)

    def structure(self, value: Any) -> str:
        if isinstance(value, Ref):
            return self.expression(value)
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self.structure(item)}" for key, item in value.items()) + "}"
        if isinstance(value, tuple):
            inner = ", ".join(map(self.structure, value))
            return f"({inner}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.structure, value))}]"
        return repr(value)

    # ---- statements

    def node(self, node: Node, index: int) -> None:
        if self.uses[node.name] == 0 and node.name in self.graph.removable:
            return
        if node.name in self.unpacked:
            return
        if self.graph.size(node.name) is not None:
            return  # written where it is used
        text = self.operation(node)
        trace = self.writer.trace
        inline = self.uses[node.name] == 1 and self.is_inlined(node, index, text) and not trace
        if inline or (text.isidentifier() and not trace):
            self.text[node.name] = text
            if text.isidentifier() and text in self.names:  # the same value under another name
                held = self.names[text]
                self.last_use[held] = max(self.last_use.get(held, -1), self.last_use.get(node.name, -1))
            return
        if isinstance(node.out, list) and not trace and self.unpack(node, text):
            return
        variable = self.variable(self.hint(node, node.name), node.name)
        self.assign(variable, text, node.out)
        self.text[node.name] = variable
        if trace:
            self.lines.append(Line(f"_record({node.name!r}, {variable})"))

    def keep(self, text: str, position: int) -> None:
        """Keeps the variables of an expression until the statement that it is written in."""
        for word in set(re.findall(r"[A-Za-z_]\w*", text)):
            if word in self.names:
                value = self.names[word]
                self.last_use[value] = max(self.last_use.get(value, -1), position)

    def unpack(self, node: Node, text: str) -> bool:
        """Assigns the parts of a result to variables, if nothing else uses it."""
        users = self.users.get(node.name, [])
        if not users or any(not isinstance(user, Node) or user.op != "item" for user in users) or len(node.out) < 2:
            return False
        if self.uses[node.name] != len(users) or len(node.out) > 8:
            return False
        position = self.position
        items = {user.args["index"]: user for user in users if isinstance(user, Node)}
        if len(items) != len(users):
            return False
        self.position = max(self.items.index(user) for user in users)
        variables = []
        for index in range(len(node.out)):
            if index not in items:
                variables.append("_")
                continue
            user = items[index]
            variable = self.variable(self.hint(user, user.name), user.name)
            variables.append(variable)
            self.text[user.name] = variable
            self.unpacked.add(user.name)
        self.position = position
        out = next((item for item in node.out if isinstance(item, Tensor)), None)
        self.assign(", ".join(variables), text, out)
        return True

    def is_inlined(self, node: Node, index: int, text: str) -> bool:
        """Returns whether an expression is written within the statement that uses it."""
        consumer = self.consumer.get(node.name)
        if node.name in self.pinned:
            return False
        if _ELEMENT.match(text):
            return False  # a loop may run over the list
        if consumer is None:  # the return reads it
            if len(text) >= INLINE or (node.place is not None and node.place.targets and len(text) >= 60):
                return False
            self.keep(text, len(self.items))
            return True
        user = self.items[consumer]
        if self.is_element(user):
            return False  # the loop reads a variable
        if len(text) > INLINE or (node.op == "item" and isinstance(user, Call)):
            return False
        same = self.is_same_statement(user, node) or self.is_same_statement(user, self.items[index])
        if not same and node.place is not None and node.place.targets and not self.is_plain(node):
            return False
        self.keep(text, consumer)
        return True

    @staticmethod
    def is_plain(node: Node) -> bool:
        """Returns whether a node only changes the order of the axes in memory."""
        return node.base == "permute" and node.name.rpartition("_p")[2].isdigit()

    def child(self, call: Call, index: int) -> None:
        results = self.graph.returns(call)
        if not results and not self.graph.has_effect(call):
            return
        given = ", ".join(self.expression(Ref(name)) for _, name in self.graph.parameters(call))
        method = self.writer.method(call)
        text = f"{self.writer.child(self.call.path, call.path)}{method}({given})"
        if not results:
            self.lines.append(Line(text))
            return
        if len(results) == 1 and self.uses[results[0]] == 1:
            fake = Node(results[0], "call", {}, self.graph.tensors.get(results[0]), call.place)
            if self.is_inlined(fake, index, text) and not self.writer.trace:
                self.text[results[0]] = text
                return
        targets = call.place.targets if call.place else ()
        variables = []
        for position, name in enumerate(results):
            hint = (
                targets[position]
                if len(targets) == len(results)
                else targets[0]
                if targets and position == 0 and len(results) == 1
                else ""
            )
            first = self.graph.parameters(call)[:1]
            reused = self.element_name(call, name, first[0][1]) if first and position == 0 else None
            if reused:
                hint = reused
            elif not hint or hint == "_" or not self.is_final(call, name):
                leaf = [part for part in call.path.split(".") if not part.isdigit()]
                hint = (leaf[-1] if leaf else "y") if position == 0 else "extra"
                first = self.graph.parameters(call)[:1]
                if (
                    call.path.rpartition(".")[2].isdigit()
                    and first
                    and self.text.get(first[0][1], "-").isidentifier()
                ):
                    hint = re.sub(r"_\d+$", "", self.text[first[0][1]])
            variables.append(self.variable(hint, name))
            self.text[name] = variables[-1]
        self.assign(", ".join(variables), text, self.graph.tensors.get(results[0]) if len(results) == 1 else None)

    def assign(self, variable: str, text: str, out: Any) -> None:
        comment = ""
        if isinstance(out, Tensor):
            comment = self.writer.shape_comment(out)
        self.lines.append(Line(f"{variable} = {text}", comment))


class _Graph:
    """A graph with its tree of calls, and which values each call takes and returns."""

    def __init__(self, writer: _Writer, graph: Graph) -> None:
        self.writer, self.graph = writer, graph
        self.root = tree(graph)
        self.by_name = {node.name: node for node in self.root.nodes()}
        self.tensors: dict[str, Any] = {**graph.tensors, **{name: node.out for name, node in self.by_name.items()}}
        self.order = {name: index for index, name in enumerate(self.by_name)}
        self.prune()
        self._parameters: dict[str, list[tuple[str, str]]] = {}
        self._returns: dict[str, list[str]] = {}
        self.inside: dict[str, set[str]] = {}
        self.analyse(self.root)
        self.removable = set(self.by_name)

    def prune(self) -> None:
        """Removes operations that nothing depends on."""
        needed: set[str] = set()
        pending = [*refs(self.graph.output_tree), *refs(self.graph.updates)]
        while pending:
            name = pending.pop()
            if name not in needed:
                needed.add(name)
                if name in self.by_name:
                    pending.extend(refs(self.by_name[name].args))
        self.needed = needed

        def walk(call: Call) -> None:
            for item in list(call.items):
                if isinstance(item, Call):
                    walk(item)
            call.items = [item for item in call.items if isinstance(item, Call) or item.name in needed]

        walk(self.root)

    def analyse(self, call: Call) -> None:
        order: list[tuple[str, tuple[str, ...]]] = []

        def walk(item: Call, stack: tuple[str, ...]) -> None:
            stack = (*stack, item.entered)
            for inner in item.items:
                if isinstance(inner, Node):
                    order.extend((name, stack) for name in refs(inner.args))
                    for entered in stack:
                        self.inside.setdefault(entered, set()).add(inner.name)
                else:
                    walk(inner, stack)

        walk(call, ())
        for name in (*refs(self.graph.output_tree),):
            order.append((name, (self.root.entered,)))
        self.uses = order
        self.outside: dict[str, set[str]] = {}
        by_value: dict[str, list[tuple[str, ...]]] = {}
        for name, stack in order:
            by_value.setdefault(name, []).append(stack)
        self.by_value = by_value
        for item in reversed(list(call.calls())):  # what a call needs depends on the calls in it
            self.sort(item)

    def is_value(self, name: str) -> bool:
        return self.size(name) is None and name not in self.graph.arrays

    def size(self, name: str) -> str | None:
        """Returns the expression of a size, None for a tensor."""
        out = self.tensors.get(name)
        return out if isinstance(out, str) else None

    def own_items(self, call: Call) -> list[Item]:
        """Returns what the body of a call contains: operations, and calls that are not written inline."""
        found: list[Item] = []
        for item in call.items:
            if isinstance(item, Call) and self.writer.is_inlined(item.path):
                found += self.own_items(item)
            else:
                found.append(item)
        return found

    def definers(self, items: list[Item]) -> list[tuple[int, str]]:
        """Returns the tensors that a body defines, with their positions."""
        found = []
        for position, item in enumerate(items):
            for name in [item.name] if isinstance(item, Node) else self.returns(item):
                if isinstance(self.tensors.get(name), Tensor):
                    found.append((position, name))
        return found

    def sources_of_size(
        self, name: str, position: int, given: list[str], defined: list[tuple[int, str]]
    ) -> list[str] | None:
        """Returns the tensors from whose axes a body can compute a size, None if it cannot."""
        if name in given:
            return []
        expression = self.size(name) or ""
        known = [*given, *(value for place, value in defined if place < position)]

        def with_axis(size: str) -> str | None:
            return next(
                (value for value in known if size in map(str, getattr(self.tensors.get(value), "shape", ()))), None
            )

        if re.fullmatch(r"-?\d+", expression):
            return []
        direct = with_axis(expression)
        if direct is not None:
            return [direct]
        node = self.by_name.get(name)
        if node is not None and node.op.startswith("sym.") and node.op not in ("sym.sym_size", "sym.sym_numel"):
            found: list[str] = []
            for inner in refs(node.args):
                sources = self.sources_of_size(inner, position, given, defined)
                if sources is None:
                    break
                found += sources
            else:
                return found
        if node is not None and node.op == "sym.sym_size" and node.args["self"].name in known:
            return [node.args["self"].name]
        symbols = [with_axis(symbol) for symbol in set(re.findall(r"[A-Za-z_]\w*", expression))]
        if symbols and None not in symbols and re.fullmatch(r"[\w\s()+*/-]+", expression):
            return [symbol for symbol in symbols if symbol is not None]
        return None

    def sort(self, call: Call) -> None:
        inside = self.inside.get(call.entered, set())
        items = self.own_items(call)
        used: list[str] = []
        sizes: list[tuple[int, str]] = []
        seen: set[str] = set()

        def need(name: str, position: int) -> None:
            if self.size(name) is not None:
                sizes.append((position, name))
                return
            if name in seen:
                return
            seen.add(name)
            if name in inside:
                return
            array = self.graph.arrays.get(name)
            if array is not None and (array.value is not None or self.writer.can_reach(call.path, array.path)):
                return
            used.append(name)

        for position, item in enumerate(items):
            for name in refs(item.args) if isinstance(item, Node) else [name for _, name in self.parameters(item)]:
                if not (isinstance(item, Node) and item.op.startswith("sym.")):
                    need(name, position)
        if call is self.root:
            for name in refs(self.graph.output_tree):
                need(name, len(items))
        given: list[tuple[str, str]] = []
        declared: set[str] = set()
        for argument, value in call.given.items():
            leaves = [name for name in refs(value) if self.is_value(name) or name in used]
            for number, name in enumerate(leaves):
                if name not in declared and (name in used or call is self.root):
                    declared.add(name)
                    given.append((argument if len(leaves) == 1 else f"{argument}_{number}", name))
        if call is self.root:
            for ref in self.graph.inputs:
                if ref.name not in declared:
                    declared.add(ref.name)
                    given.append((ref.name, ref.name))
            wanted = [ref.name for ref in self.graph.inputs]
            given.sort(key=lambda pair: wanted.index(pair[1]) if pair[1] in wanted else len(wanted))
        for name in used:
            if name not in declared:
                declared.add(name)
                given.append((self.hint(name), name))
        defined = self.definers(items)
        for position, name in sizes:
            names = [value for _, value in given]
            if name not in declared and self.sources_of_size(name, position, names, defined) is None:
                if call is self.root:
                    raise PortError(f"the size {self.size(name)} depends on values, not on the sizes of the inputs")
                declared.add(name)
                given.append((self.hint(name), name))
        self._parameters[call.entered] = given
        results = [name for name in refs(call.results) if name in inside and self.is_value(name)]
        updates = {value.name for value in self.graph.updates.values() if isinstance(value, Ref)}
        escaping = [
            name for name in self.order if name in inside and self.is_value(name) and self.escapes(name, call)
        ]
        returned = list(dict.fromkeys([name for name in results if name in escaping] + escaping))
        returned += [name for name in updates & inside if name not in returned and not self.updates_here(name, call)]
        self._returns[call.entered] = returned if call is not self.root else []

    def escapes(self, name: str, call: Call) -> bool:
        return any(call.entered not in stack for stack in self.by_value.get(name, ())) or (
            call is self.root and False
        )

    def hint(self, name: str) -> str:
        node = self.by_name.get(name)
        if self.size(name) is not None:
            targets = node.place.targets if node is not None and node.place is not None else ()
            return targets[0] if len(targets) == 1 else "size"
        array = self.graph.arrays.get(name)
        if array is not None:
            return array.path.rpartition(".")[2]
        if node is not None and node.place is not None and len(node.place.targets) == 1:
            return node.place.targets[0]
        if node is not None and node.op == "item" and node.place is not None:
            index = node.args["index"]
            if index < len(node.place.targets):
                return node.place.targets[index]
        return node.base if node is not None else name

    def parameters(self, call: Call) -> list[tuple[str, str]]:
        return self._parameters[call.entered]

    def returns(self, call: Call) -> list[str]:
        return self._returns[call.entered]

    def updates_here(self, name: str, call: Call) -> bool:
        return any(value == name for _, value in self.updates_in(call, all_levels=True))

    def updates_in(self, call: Call, all_levels: bool = False) -> list[tuple[str, str]]:
        """Returns (path, value) of the arrays that a call sets: those whose value it computes itself."""
        found = []
        for path, value in self.graph.updates.items():
            if not isinstance(value, Ref):
                continue
            inside = value.name in self.inside.get(call.entered, ())
            reach = self.writer.can_reach(call.path, path)
            deeper = any(
                value.name in self.inside.get(inner.entered, ()) and self.writer.can_reach(inner.path, path)
                for inner in call.calls()
                if inner is not call and not self.writer.is_inlined(inner.path)
            )
            if (
                reach
                and (inside or (call is self.root and not deeper and value.name not in self.by_name))
                and (all_levels or not deeper)
            ):
                found.append((path, value.name))
        return found

    def has_effect(self, call: Call) -> bool:
        return any(self.updates_in(inner) for inner in call.calls())


class _Writer:
    def __init__(
        self, graph: Graph, layers: dict[str, Layer], train: Graph | None, title: str, trace: bool = False
    ) -> None:
        self.layers, self.title = layers, title
        self.modules = graph.modules
        self.used_helpers: set[str] = set()
        self.names = new_names(graph, train)
        self.trace = trace
        self.arrays_by_owner: dict[str, list[Array]] = {}
        seen: set[str] = set()
        for source in (graph, train) if train is not None else (graph,):
            for array in source.arrays.values():
                if array.path not in seen and array.kind != "constant":
                    seen.add(array.path)
                    self.arrays_by_owner.setdefault(array.path.rpartition(".")[0], []).append(array)
        self.constants: dict[str, Array] = {
            array.path: array
            for source in (graph, train)
            if source
            for array in source.arrays.values()
            if array.kind == "constant"
        }
        self.shared = graph.shared
        self.called = {call.path for source in (graph, train) if source for call in tree(source).calls()}
        self.methods: dict[str, str] = {}
        self.classes: list[Class] = []
        self.instances: list[_Instance] = []
        self.graph = _Graph(self, graph)
        self.train = _Graph(self, train) if train is not None else None
        self.symbols = self.name_symbols(graph)
        self.keywords = self.all_keywords()

    def sort_of(self, path: str) -> tuple[str, str, str]:
        """Returns what layers of equal role in equal classes have in common."""
        parent = path.rpartition(".")[0]
        inner = path.rpartition(".")[2]
        while parent and self.is_container(parent):
            inner = f"{parent.rpartition('.')[2]}.{inner}"
            parent = parent.rpartition(".")[0]
        return self.modules[parent].kind, inner, self.layers[path].constructor

    def all_keywords(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Returns the keywords that the layers of equal role have, with their default values."""
        found: dict[tuple[str, str, str], dict[str, Any]] = {}
        for path, layer in self.layers.items():
            known = found.setdefault(self.sort_of(path), {})
            for key in layer.keywords:
                known[key] = DEFAULTS.get(key, layer.keywords[key])
        for path, layer in self.layers.items():
            known = found[self.sort_of(path)]
            if any(key not in layer.keywords and key not in DEFAULTS for key in known):
                found[self.sort_of(path)] = {}  # without a known default they differ
        return found

    # ---- what each module becomes

    def is_list(self, path: str) -> bool:
        module = self.modules[path]
        return module.class_name in ("Sequential", "ModuleList", "ParameterList") or (
            bool(module.children)
            and all(name.isdigit() for name in module.children)
            and module.class_name != "ModuleDict"
            and not self.arrays_by_owner.get(path)
            and path != ""
            and [int(name) for name in module.children] == list(range(len(module.children)))
        )

    def is_container(self, path: str) -> bool:
        """Returns whether a module is a list or a dict of modules."""
        if path == "":
            return False
        name = self.modules[path].class_name
        return name in ("Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict") and not (
            self.arrays_by_owner.get(path) and name not in ("ParameterList", "ParameterDict")
        )

    def is_inlined(self, path: str) -> bool:
        """Returns whether the calls of a module are written where it is called."""
        if path == "":
            return False
        if self.is_container(path):
            return True
        return (
            not self.has_arrays(path) and not self.in_list(path) and self.modules[path].kind.startswith("torch.nn.")
        )

    def in_list(self, path: str) -> bool:
        parent = path.rpartition(".")[0]
        return self.is_container(parent)

    def has_arrays(self, path: str) -> bool:
        prefix = f"{path}." if path else ""
        return any(owner == path or owner.startswith(prefix) for owner in self.arrays_by_owner) or any(
            other == path or other.startswith(prefix) for other in self.layers
        )

    def can_reach(self, path: str, array: str) -> bool:
        """Returns whether a module may read an array as an attribute of itself or of a module below it."""
        if array in self.constants:
            return path == ""
        while path and self.is_inlined(path):
            path = path.rpartition(".")[0]
        owner = array.rpartition(".")[0]
        return path == "" or owner == path or owner.startswith(path + ".")

    def outer(self, path: str) -> str:
        """Returns the module in whose class the calls of a module are written."""
        while path and self.is_inlined(path):
            path = path.rpartition(".")[0]
        return path

    def child(self, path: str, child: str) -> str:
        """Returns the source of a module below another one."""
        path = self.outer(path)
        if path and not child.startswith(path + "."):
            raise PortError(f"{path}: calls {child}, which is not below it")
        text, at = "self", path
        for part in (child[len(path) + 1 :] if path else child).split("."):
            holder = at
            at = f"{at}.{part}" if at else part
            part = self.names.get(at, part)
            if holder != path and self.is_container(holder):
                dense = self.is_dense(holder)
                text += f"[{part}]" if dense else f"[{part!r}]"
            else:
                text += _member(part)
        return text

    def original(self, path: str, inner: str) -> str:
        """Returns the path in the original of attributes below a module."""
        for part in inner.split("."):
            names = self.modules[path].children if path in self.modules else []
            children = {self.names.get(child, name): child for name in names for child in [_join(path, name)]}
            path = children.get(part, _join(path, part))
        return path

    def is_dense(self, path: str) -> bool:
        names = self.modules[path].children or [
            array.path.rpartition(".")[2] for array in self.arrays_by_owner.get(path, [])
        ]
        return [str(index) for index in range(len(names))] == names

    def attribute(self, path: str, array: str, graph: _Graph) -> str:
        if array in self.constants:
            return f"self.{self.names.get(array, flat(array))}"
        return self.child(path, array)

    def read_array(self, path: str, array: Array, graph: _Graph) -> str:
        if array.value is not None:
            text = re.sub(r"-?\b(inf|nan)\b", lambda m: f'float("{m[0]}")', repr(array.value))
            return f"mx.array({text}, mx.{mlx_dtype(array.tensor.dtype)})"
        return self.attribute(path, array.path, graph)

    def method(self, call: Call) -> str:
        return self.methods.get(call.entered, "")

    def name_symbols(self, graph: Graph) -> dict[str, str]:
        """Returns names of the open sizes, for comments."""
        names: dict[str, str] = {}
        for ref in graph.inputs:
            shape = graph.tensors[ref.name].shape
            letters = {4: "BCHW", 3: "BTC", 2: "BT", 1: "B", 5: "BCDHW"}.get(len(shape), "")
            if len(letters) > 3 and isinstance(shape[1], str) and isinstance(shape[-1], int):
                letters = f"B{letters[2:]}C"  # of images with their channels last, which alone have a fixed number
            for letter, size in zip(letters, shape, strict=False):
                if isinstance(size, str) and size not in names:
                    taken = set(names.values())
                    names[size] = letter if letter not in taken else f"{letter}{len(names)}"
        return names

    def shape_comment(self, tensor: Tensor) -> str:
        sizes = []
        for axis, size in enumerate(tensor.shape):
            text = str(size)
            for symbol, name in self.symbols.items():
                text = re.sub(rf"\b{symbol}\b", name, text)
            text = text[1:-1] if re.fullmatch(r"\([^()]*\)", text) else text
            letters = {3: "BTC", 4: "BHWC", 5: "BDHWC"}.get(tensor.ndim, "?" * tensor.ndim)
            sizes.append(text if len(text) < 14 else letters[axis])
        return f"[{', '.join(sizes)}]"

    # ---- classes

    def source(self) -> str:
        bodies = self.bodies()
        self.build("", bodies)
        self.classes = self.resolve()
        lines = ['"""' + self.title, "", "Written by icenet.port. It depends on mlx only.", '"""', ""]
        code = "\n\n\n".join([*self.helper_sources(), *(self.class_source(item) for item in self.classes)])
        imports = []
        if re.search(r"\bmath\.", code):
            imports += ["import math", ""]
        if re.search(r"\bnp\.", code):
            imports += ["import numpy as np"]
        imports += ["import mlx.core as mx", "import mlx.nn as nn"]
        return "\n".join([*lines, *imports, "", "", code, ""])

    def helper_sources(self) -> list[str]:
        return helpers.sources(self.used_helpers)

    def bodies(self) -> dict[str, list[Body]]:
        """Returns the bodies of each module that becomes a class, one for each way in which it is called."""
        per_mode = []
        for graph in (self.graph, self.train):
            if graph is None:
                continue
            found: dict[str, list[tuple[Call, Body]]] = {}
            # children first, as a method has a name when it is called
            for call in reversed(list(graph.root.calls())):
                if self.is_inlined(call.path):
                    continue
                body = Frame(self, graph, call).body()
                found.setdefault(call.path, []).append((call, body))
            per_mode.append(found)
        result: dict[str, list[Body]] = {}
        for path in dict.fromkeys(path for found in per_mode for path in found):
            modes = [found.get(path, []) for found in per_mode]
            variants: list[Body] = []
            for calls in zip(*modes, strict=False) if all(modes) else [(item,) for mode in modes for item in mode]:
                body = calls[0][1]
                if len(calls) > 1 and calls[1][1].key() != body.key():
                    body = _either(calls[1][1], body)
                keys = [item.key() for item in variants]
                if body.key() not in keys:
                    variants.append(body)
                    keys.append(body.key())
                number = keys.index(body.key())
                if number:
                    for call, _ in calls:
                        self.methods[call.entered] = f".call_{number + 1}"
            result[path] = variants
        if self.methods and not getattr(self, "_again", False):
            self._again = True
            return self.bodies()
        return result

    def build(self, path: str, bodies: dict[str, list[Body]]) -> str:
        """Makes the class of a module and returns the source of a new instance of it."""
        if path in self.layers:
            layer = self.layers[path]
            known = self.keywords.get(self.sort_of(path), {})
            given = {key: layer.keywords.get(key, value) for key, value in known.items()}
            return replace(
                layer, keywords=given if layer.keywords.keys() <= given.keys() else layer.keywords
            ).source()
        module = self.modules[path]
        if self.is_container(path):
            return self.container(path, module, bodies)
        init: list[str] = []
        frozen: list[str] = []
        for array in self.arrays_by_owner.get(path, []):
            name = self.names.get(array.path, array.path.rpartition(".")[2])
            init.append(f"{self.target(name)} = {_zeros(array)}")
            if array.kind != "parameter" or not array.is_trainable:
                frozen.append(name)
        if path == "":
            for constant in self.constants.values():
                if constant.value is not None:
                    continue  # written where it is used
                name = self.names.get(constant.path, flat(constant.path))
                init.append(f"self.{name} = {_zeros(constant)}")
                frozen.append(name)
        for name in module.children:
            child = f"{path}.{name}" if path else name
            if self.is_needed(child):
                init.append(f"{self.target(self.names.get(child, name))} = {self.build(child, bodies)}")
        for name in module.children:
            child = f"{path}.{name}" if path else name
            if child in self.layers and self.is_needed(child):
                locked = [
                    array.path.rpartition(".")[2]
                    for array in self.arrays_by_owner.get(child, [])
                    if array.kind == "parameter" and not array.is_trainable
                ]
                if locked:
                    attribute = self.target(self.names.get(child, name))
                    init.append(f"{attribute}.freeze(keys={locked!r}, recurse=False)")
        if frozen:
            init.append(f"self.freeze(keys={frozen!r}, recurse=False)")
        return self.instance_of(module, init, bodies.get(path, []))

    @staticmethod
    def target(name: str) -> str:
        return f"self{_member(name)}"

    def is_needed(self, path: str) -> bool:
        return (
            self.has_arrays(path)
            or (self.in_list(path))
            or (path in self.called and not self.is_inlined(path))
            or any(inner.startswith(path + ".") and not self.is_inlined(inner) for inner in self.called)
        )

    def container(self, path: str, module: Module, bodies: dict[str, list[Body]]) -> str:
        arrays = self.arrays_by_owner.get(path, [])
        if arrays:  # a ParameterList or ParameterDict
            if self.is_dense(path):
                return f"[{', '.join(_zeros(array) for array in arrays)}]"
            pairs = [f"{array.path.rpartition('.')[2]!r}: {_zeros(array)}" for array in arrays]
            return "{" + ", ".join(pairs) + "}"
        parts = [self.build(f"{path}.{name}", bodies) for name in module.children]
        if not self.is_dense(path):
            return (
                "{" + ", ".join(f"{name!r}: {part}" for name, part in zip(module.children, parts, strict=True)) + "}"
            )
        return _list_source(parts)

    def instance_of(self, module: Module, init: list[str], bodies: list[Body]) -> str:
        """Notes an instance of a class, and returns a mark in the place of its constructor."""
        name = class_of(module)
        children = [int(found) for line in init for found in _MARK.findall(line)]
        height = 1 + max((self.instances[child].height for child in children), default=0)
        self.instances.append(_Instance(name, init, bodies, height))
        return f"@{len(self.instances) - 1}@"

    def resolve(self) -> list[Class]:
        """Makes the classes of all instances. Instances that differ in numbers only share one."""
        classes: list[Class] = []
        sources: dict[int, str] = {}
        names: Counter[str] = Counter()
        for height in sorted({item.height for item in self.instances}):
            groups: dict[tuple[str, str], list[int]] = {}
            for index, item in enumerate(self.instances):
                if item.height == height:
                    item.init = [_lists(_MARK.sub(lambda m: sources[int(m[1])], line)) for line in item.init]
                    item.text = "\n".join([*item.init, "-" * 8, *(body.key() for body in item.bodies)])
                    groups.setdefault((item.name, _NUMBER.sub("#", item.text)), []).append(index)
            for (name, _), members in groups.items():
                names[name] += 1
                unique = (
                    name
                    if names[name] == 1 and not helpers.exists(name)
                    else f"{name}{names[name] + helpers.exists(name)}"
                )
                made, arguments = _unified(unique, [self.instances[index] for index in members])
                classes.append(made)
                for index, values in zip(members, arguments, strict=True):
                    sources[index] = f"{unique}({', '.join(values)})"
        return classes

    def class_source(self, item: Class) -> str:
        lines = [f"class {item.name}(nn.Module):"]
        if item.init or item.parameters:
            lines.append(f"    def __init__(self{''.join(', ' + name for name in item.parameters)}):")
            lines.append("        super().__init__()")
            for text in item.init:
                lines += _wrapped(text, 8)
        for number, body in enumerate(item.bodies):
            if len(lines) > 1:
                lines.append("")
            name = "__call__" if number == 0 else f"call_{number + 1}"
            lines += _wrapped(f"def {name}({', '.join(['self', *body.parameters])}):", 4)
            shape = None
            for line in body.lines:
                wrapped = _wrapped(line.code, 8 + 4 * line.depth)
                if line.comment and line.comment != shape and len(wrapped[-1]) + len(line.comment) + 4 <= WIDTH:
                    wrapped[-1] += f"  # {line.comment}"
                shape = line.comment or shape
                lines += wrapped
            if not body.lines:
                lines.append("        pass")
        if len(lines) == 1:
            lines.append("    pass")
        return "\n".join(lines)


def _member(name: str) -> str:
    """Returns the source of a module's child or array after the module's own."""
    is_attribute = name.isidentifier() and not keyword.iskeyword(name) and name not in _METHODS
    return f".{name}" if is_attribute else f"[{name!r}]"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


_MARK = re.compile(r"@(\d+)@")
_NUMBER = re.compile(r"(?<![\w.\]])(?:(?:-(?=\d))?\d+(?:\.\d+)?(?:e-?\d+)?|True|False)(?![\w])")


@dataclass
class _Instance:
    name: str
    init: list[str]
    bodies: list[Body]
    height: int
    text: str = ""


def _unified(name: str, members: list[_Instance]) -> tuple[Class, list[list[str]]]:
    """Returns the class of some instances whose texts differ in numbers, and the arguments of each instance."""
    numbers = [_NUMBER.findall(item.text) for item in members]
    columns = list(zip(*numbers, strict=True))
    varying = [index for index, column in enumerate(columns) if len(set(column)) > 1]
    first = members[0]
    if not varying:
        return Class(name, first.init, _common_comments(members)), [[] for _ in members]
    in_init = len(_NUMBER.findall("\n".join(first.init)))
    hints = _hints(first.text)
    parameters: dict[tuple[str, ...], str] = {}
    replacement: dict[int, str] = {}
    taken = {*re.findall(r"self\.(\w+)", first.text), *_METHODS}
    stored: dict[str, None] = {}
    for index in varying:
        column = columns[index]
        if column not in parameters:
            hint = hints[index]
            unique, number = hint, 1
            while unique in taken:
                number += 1
                unique = f"{hint}_{number}"
            taken.add(unique)
            parameters[column] = unique
        replacement[index] = parameters[column]
        if index >= in_init:
            stored[parameters[column]] = None
            replacement[index] = f"self.{parameters[column]}"
    position = -1

    def put(match: re.Match[str]) -> str:
        nonlocal position
        position += 1
        return replacement.get(position, match[0])

    init = [_NUMBER.sub(put, line) for line in first.init]
    _NUMBER.sub(put, "-" * 8)
    bodies = []
    for body, common in zip(first.bodies, _common_comments(members), strict=True):
        lines = [
            Line(_NUMBER.sub(put, line.code), other.comment, line.depth)
            for line, other in zip(body.lines, common.lines, strict=True)
        ]
        bodies.append(Body(body.parameters, lines, body.returns))
    init = [*(f"self.{item} = {item}" for item in stored), *init]
    arguments = [[column[row] for column in parameters] for row in range(len(members))]
    return Class(name, init, bodies, list(parameters.values())), arguments


def _common_comments(members: list[_Instance]) -> list[Body]:
    """Returns the bodies of the first instance with the comments that all instances have."""
    bodies = []
    for number, body in enumerate(members[0].bodies):
        others = [item.bodies[number].lines for item in members[1:]]
        lines = [
            Line(
                line.code,
                line.comment if all(other[row].comment == line.comment for other in others) else "",
                line.depth,
            )
            for row, line in enumerate(body.lines)
        ]
        bodies.append(Body(body.parameters, lines, body.returns))
    return bodies


def _hints(text: str) -> list[str]:
    """Returns a name for each number of a text: its keyword, or the argument of the constructor."""
    hints = []
    for match in _NUMBER.finditer(text):
        before = text[: match.start()].rpartition("\n")[2]
        found = re.search(r"(\w+)=\(?(?:\d+, )*$", before)
        attribute = re.match(r"self\.(\w+) = ", before)
        hint = ""
        if found:
            hint = found[1]
        else:
            opened = re.search(r"([\w.]+)\(([^()]*)$", before)
            if opened and opened[1] in NAMES:
                names = NAMES[opened[1]]
                place = opened[2].count(",")
                hint = names[place] if place < len(names) else ""
            elif opened and opened[1] in ("range",):
                hint = "num_layers"
            elif attribute:
                hint = f"{attribute[1]}_size"
        if not hint and "reshape(" in before:
            hint = "size"
        hint = hint or "value"
        hints.append({"num_features": "channels", "axis": "axis"}.get(hint, hint))
    return hints


def _lists(line: str) -> str:
    """Writes a list of equal constructors with `range`."""
    match = re.fullmatch(r"(.* = )?\[(.*)\]", line)
    if match is None:
        return line
    parts = _split(match[2])
    runs: list[tuple[str, int]] = []
    for part in parts:
        part = _lists(part)
        if runs and runs[-1][0] == part:
            runs[-1] = (part, runs[-1][1] + 1)
        else:
            runs.append((part, 1))
    if len(runs) == 1 and runs[0][1] > 1:
        return f"{match[1] or ''}[{runs[0][0]} for _ in range({runs[0][1]})]"
    texts = []
    for part, count in runs:
        texts += [f"*({part} for _ in range({count}))"] if count > 2 else [part] * count
    return f"{match[1] or ''}[{', '.join(texts)}]"


def _split(text: str) -> list[str]:
    """Splits at the commas that are within no brackets or strings."""
    parts, depth, start, quote = [], 0, 0, ""
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def _wrapped(code: str, indent: int) -> list[str]:
    """Returns a statement as lines of at most WIDTH characters: a long bracket has one part on each line."""
    line = " " * indent + code
    if len(line) <= WIDTH:
        return [line]
    best = None
    depth, start, quote = 0, 0, ""
    for index, letter in enumerate(code):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            if depth == 0:
                start = index
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth == 0 and index - start > 2 and (best is None or index - start >= best[1] - best[0]):
                best = (start, index)
    if best is None:
        return [line]
    start, end = best
    inner = _split(code[start + 1 : end])
    if not inner or (len(inner) == 1 and " for " not in inner[0] and "(" not in inner[0]):
        return [line]
    lines = [" " * indent + code[: start + 1]]
    joined = " " * (indent + 4) + ", ".join(inner)
    if len(joined) <= WIDTH and len(inner) > 0 and code[start] != "[":
        lines.append(joined)
    else:
        for part in inner:
            lines += _wrapped(f"{part}," if len(inner) > 1 else part, indent + 4)
    lines.append(" " * indent + code[end:])
    return lines


def _zeros(array: Array) -> str:
    shape = ", ".join(map(str, array.tensor.shape))
    comma = "," if len(array.tensor.shape) == 1 else ""
    dtype = mlx_dtype(array.tensor.dtype)
    return f"mx.zeros(({shape}{comma}){'' if dtype == 'float32' else f', mx.{dtype}'})"


def _list_source(parts: list[str]) -> str:
    return f"[{', '.join(parts)}]"


def _either(train: Body, evaluation: Body) -> Body:
    """Returns a body with both modes: statements that differ are in branches."""
    import difflib

    parameters = list(dict.fromkeys([*evaluation.parameters, *train.parameters]))
    ours, theirs = _statements(train.lines), _statements(evaluation.lines)
    keys = [[tuple((line.depth, line.code) for line in part) for part in side] for side in (ours, theirs)]
    lines: list[Line] = []

    def indented(parts: list[list[Line]]) -> list[Line]:
        return [Line(line.code, line.comment, line.depth + 1) for part in parts for line in part]

    for kind, a, b, c, d in difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
        if kind == "equal":
            lines += [line for part in theirs[c:d] for line in part]
            continue
        if b > a:
            lines += [Line("if self.training:"), *indented(ours[a:b])]
        if d > c and b > a:
            lines += [Line("else:"), *indented(theirs[c:d])]
        elif d > c:
            lines += [Line("if not self.training:"), *indented(theirs[c:d])]
    return Body(parameters, lines, evaluation.returns)


def _statements(lines: list[Line]) -> list[list[Line]]:
    """Returns the statements of a body with their inner lines."""
    found: list[list[Line]] = []
    for line in lines:
        if line.depth == 0 or not found:
            found.append([line])
        else:
            found[-1].append(line)
    return found


_ELEMENT = re.compile(r"self[\w.\[\]'\"]*\[\d+\](\.\w+)?\(")
_RANGE = re.compile(r"(self[^@\s]*)@(\d+):(\d+)@")
_INDEX = re.compile(r"(self(?:\.\w+|\[\"?'?\w+'?\"?\])*?)\[(\d+)\]")


def _kind(item: Item) -> str:
    """Returns what an operation has in common with that of another turn of a loop."""
    if isinstance(item, Node) and item.op != "layer":
        return item.op
    return re.sub(r"\.\d+(?=\.|$)", ".#", item.args["path"] if isinstance(item, Node) else item.path)


def roll(lines: list[Line]) -> list[Line]:
    """Writes repeated statements that differ in the index of a list as a loop."""
    index = 0
    while index < len(lines):
        best = None
        for size in range(1, min(24, (len(lines) - index) // 2) + 1):
            found = _run(lines, index, size)
            if found is not None and (best is None or found[0] * size > best[0] * best[1]):
                best = (*found[:1], size, *found[1:])
        if best is None:
            index += 1
            continue
        count, size, lists, start = best
        block = lines[index : index + size]
        names = [_singular(text) for text in lists]
        names = [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]
        inner = []
        for line in block:
            code = line.code
            for text, name in zip(lists, names, strict=True):
                code = code.replace(f"{text}[{start}]", name)
            inner.append(Line(code, line.comment, line.depth + 1))
        ranges = [f"{text}@{start}:{start + count}@" for text in lists]
        head = f"for {', '.join(names)} in " + (ranges[0] if len(ranges) == 1 else f"zip({', '.join(ranges)})") + ":"
        lines = [*lines[:index], Line(head, "", block[0].depth), *inner, *lines[index + size * count :]]
        index += size + 1
    return lines


def _singular(text: str) -> str:
    name = re.sub(r"\W", "", text.rpartition(".")[2]) or "layer"
    if name.endswith("ies"):
        return name[:-3] + "y"
    if name.endswith("s") and not name.endswith("ss"):
        return name[:-1]
    return (
        "layer"
        if name in ("features", "net", "model") or name.startswith("layer")
        else "block"
        if name.startswith(("stage", "block"))
        else "layer"
    )


def _run(lines: list[Line], index: int, size: int) -> tuple[int, list[str], int] | None:
    """Returns how often a block of statements repeats, with which lists, and the first index."""
    block = [line.code for line in lines[index : index + size]]
    depths = [line.depth for line in lines[index : index + size]]
    indices = [(match[1], int(match[2])) for code in block for match in _INDEX.finditer(code)]
    if not indices or any(line.startswith(("for ", "if ", "return")) for line in block):
        return None
    starts = {number for _, number in indices}
    if len(starts) != 1:
        return None
    start = starts.pop()
    lists = list(dict.fromkeys(text for text, _ in indices))

    def at(step: int) -> list[str]:
        return [_INDEX.sub(lambda m: f"{m[1]}[{start + step}]", code) for code in block]

    count = 1
    while True:
        part = lines[index + size * count : index + size * (count + 1)]
        if [line.code for line in part] != at(count) or [line.depth for line in part] != depths:
            break
        count += 1
    return (count, lists, start) if count > 1 else None


__all__ = ["WIDTH", "atom", "write"]
