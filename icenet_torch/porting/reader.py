"""Reads an exported program as the record of a graph."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from icenet.core.errors import PortError
from icenet.core.porting.graph.functional import DROPOUTS
from icenet.core.porting.record import Array, Dtype, Graph, Node, Place, Ref, Tensor
from icenet.core.porting.statements import place_at
from icenet_torch.porting.failures import FRAME, HERE, TORCH
from icenet_torch.porting.modules import file_of, fill_of, module_of, shared_arrays, shared_modules, signature_of

_DROPPED = (
    "_assert_scalar",
    "_assert_tensor_metadata",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
    "_functional_assert_async",
    "_assert_async.msg",
)
"""Checks of sizes and values, which a port leaves out."""
_BITS = {
    **{f"__i{name}__": f"bitwise_{name}_" for name in ("and", "or", "xor")},
    "__ilshift__": "bitwise_left_shift_",
    "__irshift__": "bitwise_right_shift_",
}
"""Operations in place whose names end otherwise than those of others."""
NUMBERS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
"""What reads a number from a tensor."""
_LIFTED = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
"""What `torch.tensor` in a forward does with a constant."""


class Reader:
    """Reads an exported program."""

    def __init__(
        self, module: nn.Module, program: Any, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
    ) -> None:
        self.module, self.program, self.training = module, program, training
        self.args, self.kwargs = args, kwargs
        self.files = {
            path: "" if isinstance(inner, (nn.Sequential, nn.ModuleList)) else file_of(type(inner))
            for path, inner in module.named_modules()
        }
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self.stored = {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
        self.trained = {path for path, value in parameters.items() if value.requires_grad}
        self.stack: list[str] = []
        self.storages: dict[int, int] = {}
        self.nodes: list[Node] = []
        self.count = 0
        self.taken: set[str] = set()
        self.differentiable: set[int | None] = set()
        self.buffers: set[int | None] = set()
        """The storages of parameters and inputs, and those of buffers."""
        self.parameters: dict[int | None, str] = {}
        """The paths of the parameters by their storages."""
        self.results: dict[str, list[Any]] = {}
        """The results of inlined regions by the name of their node."""

    def read(self) -> Graph:
        graph, signature = self.program.graph, self.program.graph_signature
        tensors: dict[str, Any] = {}
        aliases: dict[str, int] = {}
        arrays: dict[str, Array] = {}
        inputs: list[Any] = []
        shared = shared_arrays(self.module)
        specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
        for node in graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta.get("val")
            tensors[node.name] = self.meta(value)
            if isinstance(value, torch.Tensor):
                # a copy has memory of its own, which it lacks in an export
                is_copied = any(user.target in _LIFTED for user in node.users)
                aliases[node.name] = self.new_storage() if is_copied else self.storage(value)  # type: ignore[assignment]
            spec = specs.get(node.name)
            kind = spec.kind.name if spec is not None else "USER_INPUT"
            if spec is not None and kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
                path = shared.get(str(spec.target), str(spec.target))
                arrays[node.name] = self.array_of(spec, path, tensors[node.name])
            elif kind == "USER_INPUT":
                inputs.append(Ref(node.name))
            # custom objects and tokens have no counterpart: an operation that reads one is missing in the table
        for name, alias in aliases.items():
            is_buffer = name in arrays and arrays[name].kind != "parameter"
            if name in arrays and not is_buffer:
                self.parameters[alias] = arrays[name].path
            (self.buffers if is_buffer else self.differentiable).add(alias)
        self.convert(graph, {})
        output = next(node for node in graph.nodes if node.op == "output")
        values = [
            self.argument(item)
            for item, spec in zip(output.args[0], signature.output_specs, strict=True)
            if spec.kind.name == "USER_OUTPUT"
        ]
        output_tree = pytree.tree_unflatten(values, self.program.call_spec.out_spec)
        flat = iter(inputs)
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        input_tree = pytree.tree_unflatten([self.leaf(next(flat, None), leaf) for leaf in leaves], spec)
        modules = {path: module_of(path, inner) for path, inner in self.module.named_modules()}
        for path, item in modules.items():  # a module that another one has already is no child
            item.children = [name for name in item.children if (f"{path}.{name}" if path else name) in modules]
        return Graph(
            signature=signature_of(self.module, input_tree),
            nodes=self.nodes,
            inputs=[item for item in inputs if isinstance(tensors[item.name], Tensor)],
            input_tree=input_tree,
            output_tree=_plain(output_tree),
            arrays=arrays,
            modules=modules,
            shared=shared,
            shared_modules=shared_modules(self.module),
            tensors=tensors,
            aliases=aliases,
            training=self.training,
        )

    def array_of(self, spec: Any, path: str, tensor: Any) -> Array:
        """Returns the record of a parameter, a buffer or a constant.

        Args:
            spec: What the program says of it.
            path: Its path; of a shared one, the first.
            tensor: Its shape and dtype.
        """
        kind = {"PARAMETER": "parameter", "BUFFER": "buffer", "CONSTANT_TENSOR": "constant"}[spec.kind.name]
        constant = self.program.constants.get(spec.target) if kind == "constant" else None
        small = isinstance(constant, torch.Tensor) and constant.numel() <= 16 and not constant.is_complex()
        number = constant.tolist() if small and torch.isfinite(constant).all() else None  # type: ignore[union-attr]
        is_saved = kind == "parameter" or (kind == "buffer" and spec.persistent is not False)
        is_trained = spec.target in self.trained
        return Array(path, tensor, kind, is_trained, number, fill=fill_of(self.stored.get(path)), is_saved=is_saved)

    @staticmethod
    def leaf(ref: Any, leaf: Any) -> Any:
        return ref if isinstance(leaf, torch.Tensor) else leaf

    def convert(self, graph: Any, names: dict[str, Any]) -> None:
        """Appends the nodes of a graph. `names` maps the placeholders of an inner graph to values outside."""
        for node in graph.nodes:
            if node.op == "call_function":
                self.call(node, names)

    def call(self, node: Any, names: dict[str, Any]) -> None:
        target = node.target
        arguments = functools.partial(self.argument, names=names)
        if isinstance(target, torch._ops.HigherOrderOperator):
            self.higher(node, names)
            return
        if target is operator.getitem:
            self.append(node, "item", {"self": arguments(node.args[0]), "index": node.args[1]}, names)
            return
        if isinstance(target, torch._ops.OpOverload):
            namespace, _, rest = target.name().partition("::")
            if namespace == "icenet_port" and rest in ("enter", "exit"):
                self.marker(node, rest, arguments)
                return
            name = rest if namespace == "aten" else f"{namespace}::{rest}"
            if name.partition(".")[0] in _DROPPED:
                return
            base, _, overload = name.partition(".")
            name = f"{_BITS[base]}.{overload}" if base in _BITS else name
            if name.startswith("sym_"):
                args = {"self": arguments(node.args[0]), "dim": node.args[1] if len(node.args) > 1 else None}
                self.append(node, f"sym.{name.partition('.')[0]}", args, names)
                return
            if target in NUMBERS:
                self.append(node, "sym.item", {"self": arguments(node.args[0])}, names)
                return
            schema = target._schema
            if namespace in ("icenet_rnn", "icenet_loss", "icenet_size", "icenet_step", "icenet_whole"):
                name = rest
            given: dict[str, Any] = {}
            for index, item in enumerate(schema.arguments):
                if index < len(node.args) and not item.kwarg_only:
                    given[item.name] = arguments(node.args[index])
                elif item.name in node.kwargs:
                    given[item.name] = arguments(node.kwargs[item.name])
                else:
                    given[item.name] = arguments(item.default_value) if item.has_default_value() else None
            if namespace == "icenet_step":
                given.pop("size", None)  # the shape of the result has it
            mutates = next(
                (item.name for item in schema.arguments if item.alias_info is not None and item.alias_info.is_write),
                None,
            )
            self.append(node, name, given, names, mutates)
            return
        args = {str(index): arguments(item) for index, item in enumerate(node.args)}
        self.append(node, f"sym.{getattr(target, '__name__', target)}", args, names)

    def append(
        self, node: Any, op: str, args: dict[str, Any], names: dict[str, Any], mutates: str | None = None
    ) -> None:
        name = node.name
        if names or name in self.taken:
            name = self.fresh(node.name)
            names[node.name] = Ref(name)
        value = node.meta.get("val")
        if op.partition(".")[0] in DROPOUTS and not (args.get("train") and args.get("p")):
            self.same_storage(value, node.args[0].meta.get("val"))  # an export has a copy
        first = value[0] if isinstance(value, (list, tuple)) and value else value  # the parts of a tensor share it
        alias = self.storage(first) if isinstance(first, torch.Tensor) else None
        self.nodes.append(Node(name, op, args, self.meta(value), self.place(node), mutates, alias))
        self.taken.add(name)

    def fresh(self, name: str) -> str:
        self.count += 1
        return f"{name}__{self.count}"

    def higher(self, node: Any, names: dict[str, Any]) -> None:
        """Inlines a region without gradients or with a cast policy."""
        kind = node.target.name()
        graph_arg = next(
            (index for index, item in enumerate(node.args) if getattr(item, "op", "") == "get_attr"), None
        )
        if "wrap_with" not in kind or graph_arg is None:
            raise PortError(
                f"{self.place(node) or node.name}: {kind}: control flow within the graph cannot be ported"
            )
        inner = getattr(node.graph.owning_module, node.args[graph_arg].target)
        given = node.args[graph_arg + 1 :]
        outer = {
            item.name: self.argument(value, names)
            for item, value in zip((n for n in inner.graph.nodes if n.op == "placeholder"), given, strict=False)
        }
        stop = kind == "wrap_with_set_grad_enabled" and node.args[0] is False
        inner_names = {**outer, "": None}
        first = len(self.nodes)
        self.convert(inner.graph, inner_names)
        changed = self.without_gradient(first) if stop else {}
        output = next(item for item in inner.graph.nodes if item.op == "output")
        results = self.argument(output.args[0], inner_names)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        if stop:
            stopped = []
            for result in results:
                out = self.out_of(result)
                if isinstance(result, Ref) and result.name in changed:
                    result = changed[result.name]
                elif isinstance(result, Ref) and isinstance(out, Tensor) and (out.is_floating or out.is_complex):
                    name = self.fresh("stopped")
                    self.nodes.append(Node(name, "detach", {"self": result}, out, None, None, None))
                    result = Ref(name)
                stopped.append(result)
            results = stopped
        self.results[node.name] = results

    def without_gradient(self, first: int) -> dict[str, Ref]:
        """Makes what changes an outer value x in a region without gradients change x.detach().

        Returns:
            The outer values by the names of the results that are them.
        """
        outer = {*self.differentiable, *(node.alias for node in self.nodes[:first])} - self.buffers - {None}
        region, self.nodes[first:] = self.nodes[first:], []
        changed: dict[str, Ref] = {}
        for node in region:
            target = node.args.get(node.mutates) if node.mutates else None
            if isinstance(target, Ref) and node.alias in self.parameters:
                raise PortError(
                    f"{node.place or node.op}: the parameter {self.parameters[node.alias]} is changed in place, "
                    "which a port does not; compute with another value, such as weight = self.weight.clamp(-1, 1)"
                )
            if isinstance(target, Ref) and node.alias in outer:
                name = self.fresh("detached")
                self.nodes.append(Node(name, "detach", {"self": target}, node.out, node.place, None, node.alias))
                node = dataclasses.replace(node, args={**node.args, str(node.mutates): Ref(name)})
                changed[node.name] = target
            self.nodes.append(node)
        return changed

    def out_of(self, value: Any) -> Any:
        return next(
            (item.out for item in reversed(self.nodes) if isinstance(value, Ref) and item.name == value.name), None
        )

    def marker(self, node: Any, op: str, arguments: Any) -> None:
        info = json.loads(node.args[1])
        values = [arguments(item) for item in node.args[0]]
        place = self.place(node) if op == "enter" else None
        if op == "enter":
            self.stack.append(info["path"])
        elif self.stack:
            self.stack.pop()
        self.nodes.append(
            Node(node.name, op, {"path": info["path"], "values": _restore(info["values"], values)}, None, place)
        )

    def argument(self, value: Any, names: Mapping[str, Any] | None = None) -> Any:
        if isinstance(value, torch.fx.Node):
            if (
                value.op == "call_function"
                and value.target is operator.getitem
                and value.args[0].name in self.results
            ):
                return self.results[value.args[0].name][value.args[1]]
            return (names or {}).get(value.name, Ref(value.name))
        if isinstance(value, torch.dtype):
            return Dtype(str(value).removeprefix("torch."))
        if isinstance(value, (list, tuple)):
            return [self.argument(item, names) for item in value]
        if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
            return str(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str(value)
        if hasattr(value, "name") and type(value).__name__ in ("SymIntArgument", "TensorArgument"):
            return Ref(value.name)
        return value

    def meta(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            shape = tuple(size if type(size) is int else str(size.node.expr) for size in value.shape)
            shape = tuple(int(size) if isinstance(size, str) and size.isdigit() else size for size in shape)
            return Tensor(shape, str(value.dtype).removeprefix("torch."))
        if isinstance(value, (tuple, list)):
            return [self.meta(item) for item in value]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str(value.node.expr)
        return None if value is None else str(value)

    def storage(self, value: torch.Tensor) -> int | None:
        try:
            return self.storages.setdefault(value.untyped_storage()._cdata, len(self.storages))
        except (RuntimeError, NotImplementedError):
            return None

    def new_storage(self) -> int:
        return self.storages.setdefault(-len(self.storages), len(self.storages))

    def same_storage(self, value: torch.Tensor, other: torch.Tensor) -> None:
        """Gives the memory of a value the number of that of another one."""
        number = self.storage(other)
        if number is not None:
            self.storages[value.untyped_storage()._cdata] = number

    def place(self, node: Any) -> Place | None:
        """Returns the innermost statement of the user's code, or of the module's own file.

        Functions that the `forward` of a module calls are followed within the folder of its file.
        """
        own = self.files.get(self.stack[-1] if self.stack else "")
        found: list[tuple[str, int]] = []
        for match in FRAME.finditer(node.meta.get("stack_trace") or ""):
            file = match["file"]
            if file.startswith(HERE) or "/icenet_torch/" in file or (file.startswith(TORCH) and file != own):
                continue
            if match["function"].startswith("<"):
                continue  # a lambda or comprehension: its values are those of the statement that calls it
            if match["function"] == "forward":
                found = [(file, int(match["line"]))]
            elif found and Path(file).parent == Path(found[0][0]).parent:
                found.append((file, int(match["line"])))
        if not found:
            return None
        while len(found) > 1 and place_at(*found[-1]).code.startswith("return"):
            found.pop()  # what a function returns is a value of the statement that calls it
        outer = tuple((file, place_at(file, line).line) for file, line in found[:-1])
        place = dataclasses.replace(place_at(*found[-1]), outer=outer)
        # what a hook computes for a layer of torch.nn is no variable of the statement that calls the layer
        return (
            dataclasses.replace(place, targets=()) if (own or "").startswith(TORCH) and found[-1][0] != own else place
        )


def _restore(value: Any, tensors: Sequence[Any]) -> Any:
    """The inverse of `_describe`, with references in the place of tensors."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "dict" in value:
            return {key: _restore(item, tensors) for key, item in value["dict"].items()}
        return value
    if isinstance(value, list):
        return [_restore(item, tensors) for item in value]
    return value


def _plain(tree: Any) -> Any:
    """Returns an output with dicts in the place of data classes such as those of transformers."""
    if isinstance(tree, (Ref, str, int, float, type(None))):
        return tree
    if isinstance(tree, Mapping):
        return {key: _plain(item) for key, item in tree.items() if item is not None}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {name: _plain(getattr(tree, name)) for name in tree._fields}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_plain(item) for item in tree) if type(tree) in (list, tuple) else [*map(_plain, tree)]
    leaves, _ = pytree.tree_flatten(tree)
    return [_plain(item) for item in leaves] if leaves and leaves[0] is not tree else tree
