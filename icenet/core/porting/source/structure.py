"""What each module of the original becomes: a class, a list, a layer, or statements where it is called."""

from __future__ import annotations

import keyword
import re

from icenet.core.errors import PortError
from icenet.core.porting.graph.calls import Call, tree
from icenet.core.porting.kinds import Helpers
from icenet.core.porting.layers.mlx_layers import Layer
from icenet.core.porting.layers.recurrent import Recurrent
from icenet.core.porting.names import flat, new_names
from icenet.core.porting.record import WHOLE, Array, Graph, Node, Ref, refs
from icenet.core.porting.source.lines import initial
from icenet.core.porting.table.base import mlx_dtype

METHODS = {
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


class Structure:
    """The modules and arrays of the original, and how they are read in the source.

    Args:
        graph: The graph in evaluation mode.
        layers: Its layers of mlx.nn by path.
        train: The graph in training mode, None if there is none.
        trace: Whether the source records every value.
    """

    def __init__(self, graph: Graph, layers: dict[str, Layer], train: Graph | None, trace: bool) -> None:
        self.layers = layers
        self.modules = graph.modules
        self.used_helpers = Helpers()
        self.names = new_names(graph, train)
        self.trace = trace
        self.arrays_by_owner: dict[str, list[Array]] = {}
        seen: set[str] = set()
        for source in (graph, train) if train is not None else (graph,):
            for array in source.arrays.values():
                if array.path not in seen and array.kind != "constant":
                    seen.add(array.path)
                    self.arrays_by_owner.setdefault(array.path.rpartition(".")[0], []).append(array)
        self._holders = {outer for path in (*self.arrays_by_owner, *layers) for outer in with_outer(path)}
        """The modules with arrays or layers, in them or below."""
        self.constants: dict[str, Array] = {
            array.path: array
            for source in (graph, train)
            if source
            for array in source.arrays.values()
            if array.kind == "constant"
        }
        self.shared_modules = graph.shared_modules
        self.fills: dict[tuple[str, str], set[float | None]] = {}
        """The numbers that arrays of equal role consist of."""
        for arrays in self.arrays_by_owner.values():
            for array in arrays:
                self.fills.setdefault(self.role(array), set()).add(array.fill)
        roots = [tree(source) for source in (graph, train) if source]
        self.called = {call.path for root in roots for call in root.calls()}
        self.passed: set[tuple[str, str]] = set()
        """Modules that a class calls and of which some instance holds none, by the class and their paths."""
        for root in roots:
            self.find_passed(root, ())
        self.layer_calls = {
            str(node.args["path"]) for source in (graph, train) if source for node in source.nodes if node.op in WHOLE
        }
        self.methods: dict[str, str] = {}
        self.returned: dict[str, list[str]] = {}
        """What the class of each module returns, by its path."""
        recurrent = [layer for layer in layers.values() if isinstance(layer, Recurrent)]
        self.is_time_first = bool(recurrent) and not any(
            layer.options & {"batch_first", "unbatched"} for layer in recurrent
        )
        """Whether sequences are [T, B, C]."""
        self.sequences = self.find_sequences([source for source in (graph, train) if source and not trace])

    def role(self, array: Array) -> tuple[str, str]:
        """Returns the class that holds an array, and its name."""
        owner, _, leaf = array.path.rpartition(".")
        return self.modules[owner].kind if owner in self.modules else "", leaf

    def role_of(self, path: str) -> tuple[str, str]:
        """Returns what the calls of a module have in common with those of equal modules of a list."""
        return (path.rpartition(".")[0], self.modules[path].kind) if self.in_list(path) else (path, "")

    def initial(self, array: Array) -> str:
        """Returns the source of the initial value of an array: that of the original where it is one number."""
        fills = self.fills.get(self.role(array), {None})
        return initial(array, next(iter(fills)) if len(fills) == 1 else None)

    # ---- what each module becomes

    def find_sequences(self, graphs: list[Graph]) -> set[str]:
        """Returns the paths of `nn.Sequential` whose calls are those of their layers, one after another."""
        found = {path for path, module in self.modules.items() if path and module.class_name == "Sequential"}
        shared = {alias.rpartition(".")[0] for alias in self.shared_modules}
        found = {
            path
            for path in found
            if not self.arrays_by_owner.get(path) and (self.is_dense(path) or path not in shared)
        }
        called = set()
        for graph in graphs:
            for call in tree(graph).calls():
                called.add(call.path)
                if call.path in found and not self.is_chain(call):
                    found.discard(call.path)
        return self.whole(found & called)

    def whole(self, sequences: set[str]) -> set[str]:
        """Returns the sequences in which each list of layers is a sequence, too."""
        while True:
            broken = {
                path
                for path in sequences
                for name in self.modules[path].children
                if self.is_container(f"{path}.{name}") and f"{path}.{name}" not in sequences
            }
            if not broken:
                return sequences
            sequences = sequences - broken

    def is_chain(self, call: Call) -> bool:
        """Returns whether each layer of a call takes the result of the one before."""
        names = [f"{call.path}.{name}" for name in self.modules[call.path].children]
        if self.is_dense(call.path):
            names = [self.element(f"{call.path}.{index}") for index in range(self.length(call.path))]
        given, results = list(refs(call.given)), list(refs(call.results))
        items = [item for item in call.items if not (isinstance(item, Node) and item.op.startswith("sym."))]
        if len(given) != 1 or len(results) != 1 or len(names) != len(items) or not names:
            return False
        value = given[0]
        for item, path in zip(items, names, strict=True):
            if isinstance(item, Node):
                if item.op != "layer" or item.args["path"] != path or item.args["self"] != Ref(value):
                    return False
                value = item.name
            else:
                inner = list(refs(item.results))
                if item.path != path or list(refs(item.given)) != [value] or len(inner) != 1:
                    return False
                value = inner[0]
        return value == results[0]

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
        if path == "" or path in self.sequences:
            return False
        if self.is_container(path):
            return True
        return (
            not self.has_arrays(path) and not self.in_list(path) and self.modules[path].kind.startswith("torch.nn.")
        )

    def in_list(self, path: str) -> bool:
        """Returns whether a module is an element of a list or dict."""
        parent = path.rpartition(".")[0]
        return self.is_container(parent)

    def is_idle(self, path: str) -> bool:
        """Returns whether a module is an identity that no statement calls."""
        layer = self.layers.get(path)
        is_identity = layer is not None and layer.constructor == "nn.Identity"
        return is_identity and path not in self.layer_calls and not self.in_list(path)

    def has_arrays(self, path: str) -> bool:
        """Returns whether a module has arrays or layers, itself or below it."""
        return path in self._holders

    def can_reach(self, path: str, array: str) -> bool:
        """Returns whether a module may read an array as an attribute of itself or of a module below it."""
        if array in self.constants:
            return path == ""
        while path and self.is_inlined(path):
            path = path.rpartition(".")[0]
        owner = array.rpartition(".")[0]
        return path == "" or owner == path or owner.startswith(path + ".")

    def find_passed(self, call: Call, outer: tuple[str, ...]) -> None:
        """Finds the modules that are called below others than those which hold them."""
        outer = (*outer, call.path) if call.path else outer
        for item in call.items:
            path = called_path(item)
            self.passed |= {(self.modules[p].kind, path) for p in outer if path and not path.startswith(p + ".")}
            if isinstance(item, Call):
                self.find_passed(item, outer)

    def has_module(self, path: str, module: str) -> bool:
        """Returns whether a module reads another one as an attribute; if not, it is an argument of the call."""
        path = self.outer(path)
        return path == "" or (module.startswith(path + ".") and (self.modules[path].kind, module) not in self.passed)

    def module_name(self, path: str, module: str) -> str:
        """Returns the name that a module has for another one: its attribute in the original."""
        paths = [alias for alias, owner in self.shared_modules.items() if owner == module]
        inside = [alias for alias in (module, *paths) if alias.startswith(path + ".")]
        parts = [part for part in min(inside or [module], key=len).split(".") if not part.isdigit()]
        return parts[-1] if parts else "layer"

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
                text += member(part)
        return text

    def original(self, path: str, inner: str) -> str:
        """Returns the path in the original of attributes below a module."""
        for part in inner.split("."):
            names = self.modules[path].children if path in self.modules else []
            children = {self.names.get(child, name): child for name in names for child in [join(path, name)]}
            path = children.get(part, join(path, part))
        return path

    def names_in(self, path: str) -> list[str]:
        """Returns the names of the elements of a container."""
        arrays = self.arrays_by_owner.get(path, [])
        return self.modules[path].children or [array.path.rpartition(".")[2] for array in arrays]

    def is_dense(self, path: str) -> bool:
        """Returns whether a container is a list in the source: its elements are numbered.

        An element of a list that another module holds is None there.
        """
        names = self.names_in(path)
        if self.modules[path].class_name in ("ModuleList", "Sequential", "ParameterList"):
            return all(name.isdigit() for name in names)
        return [str(index) for index in range(len(names))] == names

    def element(self, path: str) -> str:
        """Returns the path of an element of a list: that of another one if both are the same layer without arrays."""
        owner = self.shared_modules.get(path, path)
        layer = self.layers.get(owner)
        return owner if layer is not None and layer.is_stateless else path

    def length(self, path: str) -> int:
        """Returns the number of elements of a list, with those that another module holds."""
        others = [alias.rpartition(".")[2] for alias in self.shared_modules if alias.rpartition(".")[0] == path]
        return max((int(name) + 1 for name in (*self.names_in(path), *others) if name.isdigit()), default=0)

    def attribute(self, path: str, array: str) -> str:
        """Returns the source of an array as an attribute of a module."""
        if array in self.constants:
            return f"self.{self.names.get(array, flat(array))}"
        return self.child(path, array)

    def read_array(self, path: str, array: Array) -> str:
        """Returns the source of an array in a module: an attribute, or a constant as it is written."""
        if array.value is not None:
            text = re.sub(r"-?\b(inf|nan)\b", lambda m: f'float("{m[0]}")', repr(array.value))
            return f"mx.array({text}, mx.{mlx_dtype(array.tensor.dtype)})"
        return self.attribute(path, array.path)

    def method(self, call: Call) -> str:
        """Returns the method of a call, such as `.call_2`; empty for `__call__`."""
        return self.methods.get(call.entered, "")


def called_path(item: Node | Call) -> str:
    """Returns the path of the module that an item calls, an empty string for an operation."""
    if isinstance(item, Call):
        return item.path
    return str(item.args["path"]) if item.op in WHOLE else ""


def member(name: str) -> str:
    """Returns the source of a module's child or array after the module's own."""
    is_attribute = name.isidentifier() and not keyword.iskeyword(name) and name not in METHODS
    return f".{name}" if is_attribute else f"[{name!r}]"


def with_outer(path: str) -> list[str]:
    """Returns the path of a module and those of the modules around it, of which the outermost is empty."""
    parts = path.split(".")
    return ["", *(".".join(parts[:count]) for count in range(1, len(parts) + 1))]


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
