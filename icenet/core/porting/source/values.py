"""Which values each call of a module takes, returns and sets."""

from __future__ import annotations

import itertools
import re
from typing import Any

from icenet.core.errors import PortError
from icenet.core.porting.graph.calls import Call, Item, tree
from icenet.core.porting.record import Graph, Node, Ref, Tensor, refs
from icenet.core.porting.source.originals import part_names
from icenet.core.porting.source.structure import Structure, called_path

MODULE = "module "
"""What the name of a module begins with that is an argument of a call."""
READS = ("sym.sym_size", "sym.sym_numel", "sym.item")
"""What reads a number from a tensor: an axis, the number of elements, or the value."""


class Values:
    """A graph with its tree of calls, and which values each call takes and returns.

    Args:
        structure: What each module becomes.
        graph: The graph, without operations in place.

    Attributes:
        root: The call of the whole module.
        by_name: The operations by name.
        tensors: What each value is: a tensor, the expression of a size, or a list of them.
        inside: The names of the operations in each call, by its entry.
    """

    def __init__(self, structure: Structure, graph: Graph) -> None:
        self.structure, self.graph = structure, graph
        self.root = tree(graph)
        self.by_name = {node.name: node for node in self.root.nodes()}
        self.tensors: dict[str, Any] = {**graph.tensors, **{name: node.out for name, node in self.by_name.items()}}
        self.of_tensors = {node.place for node in self.by_name.values() if not isinstance(node.out, str)}
        self.of_tensors |= {call.place for call in self.root.calls()}
        """The statements of the original that compute a tensor."""
        self.order = {name: index for index, name in enumerate(self.by_name)}
        self.prune()
        self._parameters: dict[str, list[tuple[str, str]]] = {}
        self._returns: dict[str, list[str]] = {}
        self.inside: dict[str, set[str]] = {}
        self.around: dict[str, tuple[Call, ...]] = {}
        """The calls around each operation, outermost first."""
        self._updates = [(path, ref.name) for path, ref in graph.updates.items() if isinstance(ref, Ref)]
        self.part_names: dict[str, str] = {}
        """The names of values that are parts of an argument which some module takes apart."""
        self.analyse(self.root)
        self.removable = set(self.by_name)

    def prune(self) -> None:
        """Removes operations that nothing depends on."""
        needed: set[str] = set()
        pending = [*self.graph.results()]
        results: dict[tuple[str, str], list[list[str]]] = {}
        for call in self.root.calls():
            results.setdefault(self.structure.role_of(call.path), []).append(list(refs(call.results)))
        while pending:
            name = pending.pop()
            if name not in needed:
                needed.add(name)
                if name in self.by_name:
                    pending.extend(refs(self.by_name[name].args))
            if not pending:  # every call of a module, or of equal ones of a list, returns what one is needed for
                for calls in results.values():
                    for names in zip(*calls, strict=False) if len(calls) > 1 else ():
                        if any(name in needed for name in names):
                            pending += [name for name in names if name not in needed and name in self.by_name]
        self.needed = needed

        def walk(call: Call) -> None:
            for item in list(call.items):
                if isinstance(item, Call):
                    walk(item)
            call.items = [item for item in call.items if isinstance(item, Call) or item.name in needed]

        walk(self.root)

    def analyse(self, call: Call) -> None:
        """Finds where each value is used, and from that what each call takes and returns."""
        order: list[tuple[str, tuple[str, ...]]] = []

        def walk(item: Call, around: tuple[Call, ...]) -> None:
            around = (*around, item)
            stack = tuple(outer.entered for outer in around)
            for inner in item.items:
                if isinstance(inner, Node):
                    self.around[inner.name] = around
                    order.extend((name, stack) for name in refs(inner.args))
                    for entered in stack:
                        self.inside.setdefault(entered, set()).add(inner.name)
                else:
                    walk(inner, around)

        walk(call, ())
        for name in refs(self.graph.output_tree):
            order.append((name, (self.root.entered,)))
        self.by_value: dict[str, list[tuple[str, ...]]] = {}
        """The calls around each use of a value, outermost first."""
        for name, stack in order:
            self.by_value.setdefault(name, []).append(stack)
        self.read_results: dict[tuple[str, str], set[int]] = {}
        """Which results of each module, or of the equal ones of a list, any of their calls needs: all return them."""
        for item in call.calls():
            inside = self.inside.get(item.entered, set())
            for index, name in enumerate(refs(item.results)):
                if name in inside and self.is_value(name) and self.escapes(name, item):
                    self.read_results.setdefault(self.structure.role_of(item.path), set()).add(index)
        for item in reversed(list(call.calls())):  # what a call needs depends on the calls in it
            self.find_interface(item)

    def broken_sequences(self) -> set[str]:
        """Returns the sequences whose call or whose layers take or return more than one value."""
        found = set()
        for call in self.root.calls():
            parts = [call, *(item for item in call.items if isinstance(item, Call))]
            if call.path in self.structure.sequences and any(
                len(self.parameters(part)) != 1 or len(self.returns(part)) != 1 for part in parts
            ):
                found.add(call.path)
        return found

    def is_value(self, name: str) -> bool:
        """Returns whether a name is that of a computed tensor, not of a size or an array of the module."""
        return self.size(name) is None and name not in self.graph.arrays

    def size(self, name: str) -> str | None:
        """Returns the expression of a size, None for a tensor."""
        out = self.tensors.get(name)
        return out if isinstance(out, str) else None

    def own_items(self, call: Call) -> list[Item]:
        """Returns what the body of a call contains: operations, and calls that are not written inline."""
        found: list[Item] = []
        for item in call.items:
            if isinstance(item, Call) and self.structure.is_inlined(item.path):
                found += self.own_items(item)
            else:
                found.append(item)
        return found

    def read_by(self, item: Item) -> list[str]:
        """Returns the values that an item reads, and the modules that it calls or passes on."""
        names = list(refs(item.args)) if isinstance(item, Node) else [name for _, name in self.parameters(item)]
        path = called_path(item)
        return [*names, MODULE + path] if path else names

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
        if node is not None and node.op.startswith("sym.") and node.op not in READS:
            found: list[str] = []
            for inner in refs(node.args):
                sources = self.sources_of_size(inner, position, given, defined)
                if sources is None:
                    break
                found += sources
            else:
                return found
        if node is not None and node.op in ("sym.sym_size", "sym.item"):
            source = node.args["self"].name
            if source in known or (node.op == "sym.item" and source in self.graph.arrays):
                return [source]
        symbols = [with_axis(symbol) for symbol in set(re.findall(r"[A-Za-z_]\w*", expression))]
        if symbols and None not in symbols and re.fullmatch(r"[\w\s()+*/-]+", expression):
            return [symbol for symbol in symbols if symbol is not None]
        return None

    def find_interface(self, call: Call) -> None:
        """Finds the parameters and the results of a call, given those of the calls in it."""
        items = self.own_items(call)
        used, sizes = self._needed_from_outside(call, items)
        given = self._arguments_of_original(call, used)
        declared = {name for _, name in given}
        for name in used:
            if name not in declared:
                declared.add(name)
                given.append((self._argument_name(call, name), name))
        defined = self.definers(items)
        for position, name in sizes:
            known = [value for _, value in given]
            if name not in declared and self.sources_of_size(name, position, known, defined) is None:
                if call is self.root:
                    raise self._size_of_values(name)
                declared.add(name)
                given.append((self.hint(name), name))
        self._parameters[call.entered] = given
        inside = self.inside.get(call.entered, set())
        self._returns[call.entered] = self._needed_results(call, inside) if call is not self.root else []

    def _needed_from_outside(self, call: Call, items: list[Item]) -> tuple[list[str], list[tuple[int, str]]]:
        """Returns what the body of a call reads and does not have.

        Returns:
            The values, arrays and modules that come from outside, and all sizes, each with the position of the item
            that reads it.
        """
        reads = [
            (position, name)
            for position, item in enumerate(items)
            if not (isinstance(item, Node) and item.op.startswith("sym."))
            for name in self.read_by(item)
        ]
        if call is self.root:
            reads += [(len(items), name) for name in refs(self.graph.output_tree)]
        sizes = [(position, name) for position, name in reads if self.size(name) is not None]
        inside = self.inside.get(call.entered, set())
        others = dict.fromkeys(name for _, name in reads if self.size(name) is None)
        return [name for name in others if name not in inside and not self._can_reach(call, name)], sizes

    def _can_reach(self, call: Call, name: str) -> bool:
        """Returns whether the body of a call has a module or an array by its own attributes, or as a constant."""
        if name.startswith(MODULE) and self.structure.has_module(call.path, name.removeprefix(MODULE)):
            return True
        array = self.graph.arrays.get(name)
        return array is not None and (array.value is not None or self.structure.can_reach(call.path, array.path))

    def _arguments_of_original(self, call: Call, used: list[str]) -> list[tuple[str, str]]:
        """Returns the values that the original gives to a call and that its body uses, with names for them.

        The root takes all inputs of the example, in their order.
        """
        given: dict[str, str] = {}
        for argument, value in call.given.items():
            leaves = [name for name in refs(value) if self.is_value(name) or name in used]
            named = value.items() if type(value) is dict else ()  # **kwargs, for example
            keys = {item.name: key for key, item in named if isinstance(item, Ref)}
            for number, name in enumerate(leaves):
                if name not in given and (name in used or call is self.root):
                    hint = argument if len(leaves) == 1 else self.part(call, argument, leaves, number)
                    given[name] = keys.get(name, hint)
        names = list(given)
        if call is self.root:
            inputs = [ref.name for ref in self.graph.inputs]
            given = {**dict(zip(inputs, inputs, strict=True)), **given}
            names = [*inputs, *(name for name in names if name not in inputs)]
        return [(given[name], name) for name in names]

    def _argument_name(self, call: Call, name: str) -> str:
        """Returns a name for an argument of a call that the original does not give to it."""
        if name.startswith(MODULE):
            return self.structure.module_name(call.path, name.removeprefix(MODULE))
        return self.hint(name)

    def _size_of_values(self, name: str) -> PortError:
        node = self.by_name.get(name)
        where = f"{node.place}: " if node is not None and node.place is not None else ""
        return PortError(
            f"{where}the size {self.size(name)} depends on values, not on the sizes of the inputs; "
            "give it as an argument that is a number"
        )

    def _needed_results(self, call: Call, inside: set[str]) -> list[str]:
        """Returns the values computed in a call that its caller, another call or an update of a buffer reads."""
        kept = self.read_results.get(self.structure.role_of(call.path), set())
        results = [
            name
            for index, name in enumerate(refs(call.results))
            if index in kept and name in inside and self.is_value(name)
        ]
        updates = {value.name for value in self.graph.updates.values() if isinstance(value, Ref)}
        escaping = [
            name for name in self.order if name in inside and self.is_value(name) and self.escapes(name, call)
        ]
        returned = list(dict.fromkeys([*results, *escaping]))
        updated = sorted(updates & inside, key=lambda name: self.order.get(name, -1))
        return returned + [name for name in updated if name not in returned and not self.updates_here(name, call)]

    def part(self, call: Call, argument: str, leaves: list[str], number: int) -> str:
        """Returns a name for a part of an argument: that of the original, here or in a module that takes it."""
        name, module = leaves[number], self.structure.modules[call.path]
        place = next((item.place for item in call.items if item.place is not None), None)
        known = part_names(*place.chain[0], argument) if place is not None else ()
        if module.kind.startswith("torch.nn.") and module.class_name == "LSTMCell":
            known = ("h", "c")
        if len(known) == len(leaves):
            self.part_names.setdefault(name, known[number])
            return known[number]
        return self.part_names.get(name, f"{argument}_{number}")

    def escapes(self, name: str, call: Call) -> bool:
        """Returns whether a value is used outside of a call."""
        return any(call.entered not in stack for stack in self.by_value.get(name, ()))

    def hint(self, name: str) -> str:
        """Returns a name for a parameter: that of the variable or array in the original."""
        node = self.by_name.get(name)
        place = node.place if node is not None else None
        targets = place.targets if place is not None and not place.is_several else ()
        if self.size(name) is not None:
            return targets[0] if len(targets) == 1 and place not in self.of_tensors else "size"
        array = self.graph.arrays.get(name)
        if array is not None:
            return array.path.rpartition(".")[2]
        if len(targets) == 1:
            return targets[0]
        if node is not None and node.op == "item" and node.args["index"] < len(targets):
            return targets[node.args["index"]]
        return node.base if node is not None else name

    def parameters(self, call: Call) -> list[tuple[str, str]]:
        """Returns the name of each parameter of a call, and its value."""
        return self._parameters[call.entered]

    def returns(self, call: Call) -> list[str]:
        """Returns the values that a call returns."""
        return self._returns[call.entered]

    def updates_here(self, name: str, call: Call) -> bool:
        """Returns whether a call sets an array to a value."""
        return any(value == name and self._sets(call, path, value) for path, value in self._updates)

    def updates_in(self, call: Call) -> list[tuple[str, str]]:
        """Returns (path, value) of the arrays that a call sets: those whose value it computes itself."""
        return [
            (path, value)
            for path, value in self._updates
            if self._sets(call, path, value) and not self._is_set_deeper(call, path, value)
        ]

    def _sets(self, call: Call, path: str, value: str) -> bool:
        """Returns whether a call, or one in it, sets an array to a value."""
        if value in self.inside.get(call.entered, ()):
            return self.structure.can_reach(call.path, path)
        return call is self.root and value not in self.by_name

    def _is_set_deeper(self, call: Call, path: str, value: str) -> bool:
        """Returns whether a call within another one sets an array to a value."""
        inwards = itertools.dropwhile(lambda outer: outer is not call, self.around.get(value, ()))
        return any(
            not self.structure.is_inlined(inner.path) and self.structure.can_reach(inner.path, path)
            for inner in itertools.islice(inwards, 1, None)
        )

    def has_effect(self, call: Call) -> bool:
        """Returns whether a call, or one in it, sets an array."""
        return any(self.updates_in(inner) for inner in call.calls())
