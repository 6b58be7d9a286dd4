"""Operations in place, and views of what they change, as operations without side effects.

A value that an operation changes gets a new name. If the value is a view, its new value is written into a copy of the
value that it views (`scatter_view`), and other views of that are computed again when they are read next.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from icenet.core.porting.record import Graph, Node, Ref, Tensor, map_refs, refs, with_nodes

SAME = frozenset(
    [
        "alias",
        "contiguous",
        "detach",
        "lift_fresh",
        "positive",
        "resolve_conj",
        "resolve_neg",
        "sum_to_size",
        "to",
        "type_as",
    ]
)
"""Operations whose result, if it shares the memory of their argument, is their argument."""

DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
"""Operations that return their argument in evaluation mode."""

BATCH_NORMS = ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update")
"""Operations that change their running statistics in training."""


def make_functional(graph: Graph) -> Graph:
    """Returns the graph without operations in place; `updates` has the new values of parameters and buffers."""
    return _Functional(graph).run()


class _Functional:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.out: list[Node] = []
        self.tensors = dict(graph.tensors) | {node.name: node.out for node in graph.nodes}
        self.alias: dict[str, int | None] = {**graph.aliases, **{node.name: node.alias for node in graph.nodes}}
        self.current: dict[str, str] = {}
        self.version: dict[str, int] = {}
        self.view_of: dict[str, tuple[str, Node, int]] = {}
        """The value that a view shows, the node that makes it, and the version of that value."""
        self.count: dict[str, int] = {}
        self.place: Any = None
        self.scatters: dict[str, Node] = {}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            self.place = node.place
            if node.mutates is not None and node.base not in BATCH_NORMS:
                self.mutate_by(node)
                continue
            new = replace(node, args=self.read_all(node.args))
            written = self.just_written(node, new)
            if written is None:
                self.out.append(new)
            else:
                self.current[node.name] = written
            source = node.args.get("self", node.args.get("input", node.args.get("tensor")))
            self.update_statistics(node, new)
            if isinstance(source, Ref) and self.shares(node, source.name):
                if is_whole(node, self.tensors) or node.base in DROPOUTS:
                    node = replace(node, op="alias", args={"self": source})
                self.view_of[node.name] = (source.name, node, self.version.get(source.name, 0))
        outputs = self.read_all(self.graph.output_tree)
        updates = {}
        for name, array in self.graph.arrays.items():
            final = self.read(name)
            if final != name:
                updates[array.path] = Ref(final)
        return replace(self.graph, nodes=self.out, output_tree=outputs, updates=updates)

    def just_written(self, node: Node, new: Node) -> str | None:
        """Returns the values that were written into an array at the place of the view that is read now."""
        source = new.args.get("self")
        if not isinstance(source, Ref) or source.name not in self.scatters:
            return None
        scatter = self.scatters[source.name]
        if scatter.args["view"] != new.op or scatter.args["args"] != {
            k: v for k, v in new.args.items() if k != "self"
        }:
            return None
        return scatter.args["src"].name

    def update_statistics(self, node: Node, new: Node) -> None:
        """The running statistics that a batch norm changes, which its signature does not say."""
        kind = "batch_norm" if node.base in BATCH_NORMS else node.base
        flag = {"batch_norm": "training", "instance_norm": "use_input_stats"}.get(kind)
        if flag is None or not node.args.get(flag, node.base == "_batch_norm_with_update"):
            return
        for which in ("mean", "var"):
            running = node.args.get(f"running_{which}")
            if isinstance(running, Ref):
                args = {
                    "input": new.args["input"],
                    "running": Ref(self.read(running.name)),
                    "momentum": node.args["momentum"],
                    "which": which,
                }
                self.mutate(
                    running.name, self.emit(f"{kind}_statistics", args, self.tensors[running.name], running.name)
                )

    def shares(self, node: Node, source: str) -> bool:
        """Returns whether a result shares the memory of its source: a view, or the source itself."""
        if node.base == "item" and source not in self.view_of:
            return False  # a part of several new tensors
        mine, theirs = self.alias.get(node.name), self.alias.get(source)
        return mine is not None and mine == theirs

    def read_all(self, value: Any) -> Any:
        return map_refs(value, lambda ref: Ref(self.read(ref.name)))

    def read(self, name: str) -> str:
        """Returns the present value of a name; a view of a changed value is computed again."""
        if name in self.view_of:
            parent, node, seen = self.view_of[name]
            present = self.read(parent)
            if self.version.get(parent, 0) != seen:
                args = {**self.read_all({k: v for k, v in node.args.items() if k not in ("self", "input")})}
                key = "self" if "self" in node.args else "input" if "input" in node.args else "tensor"
                self.current[name] = self.emit(node.op, {key: Ref(present), **args}, node.out, name)
                self.version[name] = self.version.get(name, 0) + 1
                self.view_of[name] = (parent, node, self.version.get(parent, 0))
        return self.current.get(name, name)

    def emit(self, op: str, args: dict[str, Any], out: Any, like: str) -> str:
        self.count[like] = self.count.get(like, 0) + 1
        name = f"{like}_v{self.count[like]}"
        self.out.append(Node(name, op, args, out, self.place))
        return name

    def mutate_by(self, node: Node) -> None:
        target = node.args[node.mutates or ""]
        args = self.read_all(node.args)
        base, _, overload = node.op.partition(".")
        if not isinstance(target, Ref):  # of several values, such as _foreach_add_: missing in the table
            self.out.append(replace(node, args=args))
            return
        present = args[node.mutates or ""]
        out = self.tensors[target.name]
        if base == "copy_" and args.get("src") == present:
            new = present.name
        elif base.endswith("_"):
            new = node.name
            if base.startswith("resize"):
                out = node.out
            self.out.append(replace(node, op=f"{base[:-1]}.{overload}", args=args, out=out, mutates=None))
        else:  # an operation with out=
            new, out = node.name, node.out
            kept = {key: value for key, value in args.items() if key != node.mutates}
            self.out.append(replace(node, op=base, args=kept, mutates=None))
        self.tensors[new] = out
        self.mutate(target.name, new)
        if node.name != target.name:
            # the result of the operation is its target: both names show later changes of either
            self.current[node.name] = new
            self.view_of[node.name] = (
                target.name,
                Node(node.name, "alias", {"self": target}, out, node.place),
                self.version.get(target.name, 0),
            )

    def takes_gradient(self, name: str) -> bool:
        """Returns whether a value may take a gradient: it is neither of integers nor a buffer."""
        while name in self.view_of:
            name = self.view_of[name][0]
        array, tensor = self.graph.arrays.get(name), self.tensors[name]
        return (array is None or array.kind == "parameter") and isinstance(tensor, Tensor) and tensor.is_floating

    def mutate(self, name: str, new: str) -> None:
        self.current[name] = new
        self.version[name] = self.version.get(name, 0) + 1
        if name not in self.view_of:
            return
        parent, node, _ = self.view_of[name]
        if node.base == "detach" and self.takes_gradient(parent):
            args = {"self": Ref(self.read(parent)), "src": Ref(new)}
            written = self.emit("with_values", args, self.tensors[parent], parent)
        elif node.base in SAME:
            written = new
        elif node.base == "item":
            listed, list_node, _ = self.view_of[parent]
            present = self.read(listed)
            args = {**self.read_all({k: v for k, v in list_node.args.items() if k not in ("self", "input")})}
            written = self.emit(
                "scatter_item",
                {
                    "self": Ref(present),
                    "src": Ref(new),
                    "view": list_node.op,
                    "args": args,
                    "index": node.args["index"],
                },
                self.tensors[listed],
                listed,
            )
            self.mutate(listed, written)
            self.version[parent] = self.version.get(parent, 0) + 1
            self.current[parent] = self.emit(list_node.op, {"self": Ref(written), **args}, list_node.out, parent)
            self.view_of[parent] = (listed, list_node, self.version[listed])
            self.view_of[name] = (parent, node, self.version[parent])
            return
        else:
            present = self.read(parent)
            args = {**self.read_all({k: v for k, v in node.args.items() if k not in ("self", "input", "tensor")})}
            written = self.emit(
                "scatter_view",
                {"self": Ref(present), "src": Ref(new), "view": node.op, "args": args},
                self.tensors[parent],
                parent,
            )
        if self.out and self.out[-1].name == written and self.out[-1].op == "scatter_view":
            self.scatters[written] = self.out[-1]
        if written != new:
            self.tensors[written] = self.tensors[parent]
        self.mutate(parent, written)
        self.view_of[name] = (parent, node, self.version[parent])


_COPIES = ("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "lift_fresh_copy")


def without_copies(graph: Graph) -> Graph:
    """Returns a graph without the operations that return their argument: copies, x * 1, x + 0 and constants.detach().

    An export takes the result of `x.to(dtype)` for x in all that follows, also outside of the module that calls it.
    """
    tensors = graph.values()
    same: dict[str, Ref] = {}

    def given(ref: Ref) -> Ref:
        return same.get(ref.name, ref)

    nodes = []
    joined: dict[str, list[Ref]] = {}
    for node in graph.nodes:
        node = replace(node, args=map_refs(node.args, given))
        source = node.args.get("self")
        if node.base == "broadcast_tensors":
            joined[node.name] = node.args["tensors"]
        parts = joined.get(source.name) if node.op == "item" and isinstance(source, Ref) else None
        if parts is not None and _has_shape(tensors[parts[node.args["index"]].name], node.out):
            same[node.name] = parts[node.args["index"]]
            continue
        if not isinstance(source, Ref) or tensors.get(source.name) != node.out:
            nodes.append(node)
            continue
        array = graph.arrays.get(source.name)
        is_constant = array is not None and array.kind == "constant"  # torch.tensor(...) is detached
        if _is_identity(node) or (is_constant and node.base == "detach"):
            same[node.name] = source
        else:
            nodes.append(node)
    return with_nodes(graph, nodes, given)


def _has_shape(given: Tensor, out: Tensor) -> bool:
    """Returns whether broadcasting leaves a shape as it is: none of its sizes is 1, and it has all axes."""
    is_wide = all(size != 1 or wanted == 1 for size, wanted in zip(given.shape, out.shape, strict=False))
    return given.ndim == out.ndim and is_wide


def _is_identity(node: Node) -> bool:
    other = node.args.get("other")
    if type(other) in (int, float):
        return (node.base in ("mul", "div") and other == 1 and not node.args.get("rounding_mode")) or (
            node.base in ("add", "sub") and other == 0
        )
    return node.base in _COPIES or node.base in ("expand", "view", "reshape")  # of the same shape


def with_exact_gradients(graph: Graph) -> Graph:
    """Returns a graph whose choices by a mask have no gradient where they leave a value out.

    MLX multiplies the gradient there by 0, so that NaN and infinite ones, as of a softmax over a row that is masked
    as a whole, are NaN. PyTorch drops them.
    """
    nodes = [
        replace(node, op=f"exact_{node.op}") if node.base in ("where", "masked_fill") else node
        for node in graph.nodes
    ]
    return replace(graph, nodes=nodes)


def is_whole(node: Node, tensors: dict[str, Any]) -> bool:
    """Returns whether a slice is all of its source."""
    if node.base != "slice":
        return False
    end = node.args.get("end")
    return (
        node.args.get("start") in (None, 0)
        and node.args.get("step") in (None, 1)
        and (end is None or (isinstance(end, int) and end > 2**40))
    )


def used_values(graph: Graph) -> set[str]:
    """Returns the names of the values that the outputs and updates depend on."""
    needed: set[str] = set()
    pending = [*graph.results()]
    by_name = {node.name: node for node in graph.nodes}
    while pending:
        name = pending.pop()
        if name in needed:
            continue
        needed.add(name)
        if name in by_name:
            pending.extend(refs(by_name[name].args))
    return needed
