"""Which operations of a call belong to one statement of the original, and to one turn of its loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from icenet.core.porting.graph.calls import Call, Item
from icenet.core.porting.record import WHOLE, Node, Ref, refs
from icenet.core.porting.source.loops import kind
from icenet.core.porting.source.originals import is_in_loop
from icenet.core.porting.source.structure import Structure
from icenet.core.porting.source.values import Values


class Statements:
    """The operations and calls in one call of a module, by the statements of the original that compute them.

    Attributes:
        items: They, with those of the calls that are written in their place.
        users: What reads each value.
        runs: The execution of a statement to which an item belongs, by the item and the depth of its calls.
    """

    def __init__(self, structure: Structure, graph: Values, call: Call) -> None:
        self.structure, self.graph, self.call = structure, graph, call
        self.items = list(self.flatten(call))
        self.users: dict[str, list[Item]] = {}
        for item in self.items:
            for name in self.used_by(item):
                self.users.setdefault(name, []).append(item)
        self.runs: dict[tuple[int, int], int] = {}
        self.number_runs()

    def flatten(self, call: Call) -> Iterator[Item]:
        for item in call.items:
            if isinstance(item, Call) and self.structure.is_inlined(item.path):
                results = list(refs(item.results))
                for inner in self.flatten(item):
                    is_result = isinstance(inner, Node) and results == [inner.name] and item.place is not None
                    yield replace(inner, place=item.place) if is_result and isinstance(inner, Node) else inner
            else:
                yield item

    def used_by(self, item: Item) -> list[str]:
        return self.graph.read_by(item)

    def is_final(self, item: Item, name: str) -> bool:
        """Returns whether a value is the result of its statement: no later operation of the statement uses it."""
        users = self.users.get(name, ())
        return not any(self.is_within(user, item) for user in users if user is not item)

    def is_same_statement(self, a: Item, b: Item) -> bool:
        """Returns whether one execution of a statement of the original computes both."""
        return a.place is not None and a.place == b.place and self.is_within(a, b)

    def is_within(self, inner: Item, item: Item) -> bool:
        """Returns whether the statement that computes an item, or a function that it calls, computes another one."""
        if item.place is None or inner.place is None:
            return False
        depth = len(item.place.chain)
        same = inner.place.chain[:depth] == item.place.chain
        return same and self.runs.get((id(inner), depth)) == self.runs.get((id(item), depth))

    def is_last_turn(self, item: Item) -> bool:
        """Returns whether the statement that computes a value has run before, in a loop."""
        earlier = self.items[: self.items.index(item)]
        return any(other.place == item.place and not self.is_within(other, item) for other in earlier)

    def number_runs(self) -> None:
        """Numbers the executions of statements: one in a loop is a sequence of operations that repeats."""
        depths = {len(item.place.chain) for item in self.items if item.place is not None}
        for depth in sorted(depths):
            self.number_runs_at(depth)

    def number_runs_at(self, depth: int) -> None:
        """Numbers the executions of statements within a number of calls; with the functions that it calls."""

        def chain(item: Item) -> Any:
            return item.place.chain[:depth] if item.place is not None else None

        start = 0
        while start < len(self.items):
            end = start
            while end < len(self.items) and chain(self.items[end]) == chain(self.items[start]):
                end += 1
            end = max(end, start + 1)
            kinds = [kind(item) for item in self.items[start:end]]
            size = next(
                n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0 and kinds == kinds[:n] * (len(kinds) // n)
            )
            place = self.items[start].place
            is_turn = place is not None and (len(place.targets) == 1 or self.gives(start, size, len(place.targets)))
            if not is_turn or self.runs_once(self.items[start:end], depth):
                size = len(kinds)
            for index in range(start, end):
                self.runs[id(self.items[index]), depth] = start + (index - start) // size * size
            start = end

    @staticmethod
    def runs_once(items: list[Item], depth: int) -> bool:
        """Returns whether operations of one statement, which is in no loop, are one execution: x[::2, ::2]."""
        place = items[0].place
        is_plain = all(isinstance(item, Node) and item.op not in WHOLE for item in items)
        return place is not None and is_plain and not any(is_in_loop(*at) for at in place.chain[:depth])

    def gives(self, start: int, size: int, count: int) -> bool:
        """Returns whether some operations are a call with a number of results: `h, c = cell(x, h, c)` in a loop."""
        calls = [item for item in self.items[start : start + size] if isinstance(item, Call)]
        return len(calls) == 1 and len(self.graph.returns(calls[0])) == count

    def is_element(self, item: Item) -> bool:
        """Returns whether this is a call of an element of a list."""
        path = (
            item.args["path"]
            if isinstance(item, Node) and item.op in WHOLE
            else ""
            if isinstance(item, Node)
            else item.path
        )
        parent = path.rpartition(".")[0]
        return (
            bool(parent)
            and self.structure.is_container(parent)
            and self.structure.is_dense(parent)
            and (len(self.structure.modules[parent].children) > 1)
        )

    def is_listed(self, item: Item) -> bool:
        """Returns whether this is a call of an element of an `nn.ModuleList`, whose loop the original has written."""
        if not self.is_element(item):
            return False
        path = item.args["path"] if isinstance(item, Node) else item.path
        return self.structure.modules[path.rpartition(".")[0]].class_name == "ModuleList"

    def is_next_turn(self, item: Item, other: Item) -> bool:
        """Returns whether a loop of the original calls two elements of a list: `for layer in self.layers:`."""
        if not self.is_listed(item) or not self.is_listed(other) or item.place is None:
            return False
        paths = [one.args["path"] if isinstance(one, Node) else one.path for one in (item, other)]
        in_loop = any(is_in_loop(*at) for at in item.place.chain)
        return in_loop and paths[0].rpartition(".")[0] == paths[1].rpartition(".")[0]

    def is_turn(self, item: Item) -> bool:
        """Returns whether the next turn of a loop over a list reads what an element returns."""
        results = [item.name] if isinstance(item, Node) else self.graph.returns(item)
        return any(self.is_next_turn(item, user) for name in results for user in self.users.get(name, ()))

    def target_of(self, item: Item, name: str) -> str:
        """Returns the variable of a value of `a, b = f(x), g(x)`, an empty string if it is not known."""
        targets = item.place.targets if item.place and not item.place.is_several else ()
        values = [
            (other, value)
            for other in self.items
            if self.is_same_statement(other, item)
            for value in ([other.name] if isinstance(other, Node) else self.graph.returns(other))
        ]
        final = [value for other, value in values if self.users.get(value) and self.is_final(other, value)]
        if len(final) != len(targets) or name not in final:
            return ""
        parts = [self.part_of(value, item) for value in final]
        if sorted(parts) == list(range(len(targets))):  # q, k, v = x.chunk(3), in any order of their forms
            return targets[parts[final.index(name)]].strip("_")
        return targets[final.index(name)].strip("_")

    def part_of(self, value: str, item: Item) -> int:
        """Returns which part of a result a value is computed from in the statement of an item; -1 for none."""
        node = self.graph.by_name.get(value)
        while node is not None and node.op != "item":
            given = node.args.get("self")
            node = self.graph.by_name.get(given.name) if isinstance(given, Ref) else None
        return int(node.args["index"]) if node is not None and self.is_same_statement(node, item) else -1

    @staticmethod
    def is_plain(node: Node) -> bool:
        """Returns whether a node only changes the order of the axes in memory."""
        return node.base == "permute" and node.name.rpartition("_p")[2].isdigit()
