"""Changes of the axes before the calls of modules, so that a class takes images with channels last in all places."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

from icenet.core.porting.record import Node, Ref, map_refs, refs

_Permutation = tuple[str, tuple[int, ...]]
"""A value, and the order of its axes."""
_FILLS = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")


@dataclass
class _Call:
    enter: Node
    items: list[Node | _Call]
    exit: Node


def hoisted(nodes: list[Node], sequences: Container[str], moved: Container[str]) -> list[Node]:
    """Returns nodes in which a module gets an argument with the axes in which it reads it.

    The change of axes that it makes at first stands before its call. The whole module keeps its arguments, and a
    layer of an `nn.Sequential`, such as `nn.Flatten`, makes the change from channels last to the original's itself.

    Args:
        nodes: The nodes of a graph, with "permute" where an operation needs another order.
        sequences: The paths of modules that are sequences of layers.
        moved: The values whose axes have another order than the original's.
    """
    items = _parsed(iter(nodes))
    renamed: dict[str, str] = {}
    for item in items:
        if isinstance(item, _Call):
            _hoist(item, renamed, sequences, moved)

    def final(ref: Ref) -> Ref:
        name = ref.name
        while name in renamed:
            name = renamed[name]
        return Ref(name)

    return [replace(node, args=map_refs(node.args, final)) for node in _flat(items)]


def _parsed(nodes: Iterator[Node]) -> list[Node | _Call]:
    """Returns the nodes up to the end of a call, with the calls in it."""
    found: list[Node | _Call] = []
    for node in nodes:
        if node.op == "enter":
            inner = _parsed(nodes)
            end = inner.pop()
            assert isinstance(end, Node)
            found.append(_Call(node, inner, end))
        else:
            found.append(node)
            if node.op == "exit":
                break
    return found


def _flat(items: list[Node | _Call]) -> Iterator[Node]:
    for item in items:
        if isinstance(item, Node):
            yield item
        else:
            yield item.enter
            yield from _flat(item.items)
            yield item.exit


def _permutation(item: Node | _Call) -> _Permutation | None:
    """Returns what a node permutes, None if it is not one that the layout has inserted."""
    if not isinstance(item, Node) or item.op != "permute" or not item.name.rpartition("_p")[2].isdigit():
        return None
    return item.args["self"].name, tuple(item.args["dims"])


def _hoist(call: _Call, renamed: dict[str, str], sequences: Container[str], moved: Container[str]) -> None:
    """Moves the permutations out of the calls in a call, and keeps the first of equal ones."""
    items: list[Node | _Call] = []
    made: dict[_Permutation, str] = {}

    def add(node: Node, key: _Permutation) -> None:
        if key in made:
            renamed[node.name] = made[key]
        else:
            made[key] = node.name
            items.append(_filled(items, node))

    for item in call.items:
        key = _permutation(item)
        if isinstance(item, Node):
            if key is None:
                items.append(item)
            else:
                add(item, key)
            continue
        _hoist(item, renamed, sequences, moved)
        given = set(refs(item.enter.args))
        for node in list(item.items):
            key = _permutation(node)
            if key is None or not isinstance(node, Node):
                continue
            is_own = call.enter.args["path"] in sequences and node.name not in moved
            if not is_own and key[0] in given and _is_only_use(item, node):
                _take(item, node)
                add(replace(node, place=item.enter.place), key)
        items.append(item)
    call.items = items


def _filled(items: list[Node | _Call], permute: Node) -> Node:
    """Returns a permutation of a new array of one number as another new array."""
    source = permute.args["self"].name
    for item in items:
        if isinstance(item, Node) and item.name == source and item.base in _FILLS:
            sizes = [item.args["size"][dim] for dim in permute.args["dims"]]
            return replace(item, name=permute.name, args={**item.args, "size": sizes}, out=permute.out)
    return permute


def _is_only_use(call: _Call, permute: Node) -> bool:
    """Returns whether a call reads a value in one order only, but for its sizes."""
    name = permute.args["self"].name
    users = [node for node in (*_flat(call.items), call.exit) if node is not permute and name in refs(node.args)]
    return all(node.op == "sym.sym_size" for node in users)


def _take(call: _Call, permute: Node) -> None:
    """Removes a permutation from a call, which gets the permuted value."""
    name, dims = permute.args["self"].name, permute.args["dims"]

    def changed(node: Node) -> Node:
        if name not in refs(node.args):
            return node
        args = map_refs(node.args, lambda ref: Ref(permute.name) if ref.name == name else ref)
        if node.op == "sym.sym_size":
            args["dim"] = dims.index(node.args["dim"] % len(dims))
        return replace(node, args=args)

    def walk(items: list[Node | _Call]) -> list[Node | _Call]:
        return [
            changed(item)
            if isinstance(item, Node)
            else _Call(changed(item.enter), walk(item.items), changed(item.exit))
            for item in items
            if item is not permute
        ]

    call.enter, call.items = changed(call.enter), walk(call.items)
