"""The record of a module's graph: what a backend exports and the writer of the source reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

Dim: TypeAlias = "int | str"
"""A size: a number, or an expression of symbols such as "s0" or "2*s0"."""


@dataclass(frozen=True)
class Ref:
    """A value of the graph, by name."""

    name: str


@dataclass(frozen=True)
class Dtype:
    """A dtype as an argument of an operation: float32, int64, bool, ..."""

    name: str


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype of a value."""

    shape: tuple[Dim, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def is_complex(self) -> bool:
        return self.dtype.startswith("complex")


@dataclass(frozen=True)
class Place:
    """The statement of the original that computed a value."""

    file: str
    line: int
    """First line of the statement."""
    code: str
    targets: tuple[str, ...] = ()
    """The variables to which the statement assigns; those of all statements of a line with several."""
    is_several: bool = False
    """Whether there are several statements on the line, as in `a = f(x); b = g(x)`."""
    operations: tuple[str, ...] = ()
    """The outermost operation in the value of each target; empty where it is not known."""
    has_all: bool = True
    """Whether every value of the line that a later one reads is in a target; a list of values has one for several."""
    outer: tuple[tuple[str, int], ...] = ()
    """File and first line of the statements that led to it, from the `forward` of its module on."""

    @property
    def chain(self) -> tuple[tuple[str, int], ...]:
        """The statements from the `forward` of the module to this one."""
        return (*self.outer, (self.file, self.line))

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" ({self.code})" if self.code else "")


@dataclass
class Node:
    """One operation.

    `op` is the name of an ATen operation with its overload, "add.Tensor"; "sym.NAME" for arithmetic of sizes; "item"
    for an element of a result with several tensors; "enter" and "exit" around the call of a module; "layer" for a
    module that is called as a whole.
    """

    name: str
    op: str
    args: dict[str, Any]
    out: Any
    """A Tensor, a list of Tensors and None, or the expression of a size."""
    place: Place | None = None
    mutates: str | None = None
    """The name of the argument that the operation changes in place."""
    alias: int | None = None
    """A number that values with the same memory share."""

    @property
    def base(self) -> str:
        """The name of the operation without its overload."""
        return self.op.partition(".")[0] if not self.op.startswith("sym.") else self.op


@dataclass(frozen=True)
class Constructor:
    """Where the original makes a module: file and first line of `__init__`, and the numbers of its class by name."""

    file: str
    line: int
    constants: tuple[tuple[str, float], ...] = ()


@dataclass
class Module:
    """A module of the original: its class, its settings and what it holds."""

    path: str
    kind: str
    """The qualified name of its class, such as torch.nn.modules.linear.Linear."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Its attributes that are numbers, strings, booleans, None or tuples of them."""
    children: list[str] = field(default_factory=list)
    """The names of its children in their order."""
    arguments: list[str] = field(default_factory=list)
    """The names of the arguments of `forward`."""
    own_class: str = ""
    """The name of its class if `kind` is the base of it that computes the same."""
    constructor: Constructor | None = None
    """Where its class is written, None if that is not known or a class of torch."""

    @property
    def class_name(self) -> str:
        return self.kind.rpartition(".")[2]


@dataclass(frozen=True)
class Array:
    """A parameter, buffer or constant of the original."""

    path: str
    tensor: Tensor
    kind: str
    """parameter, buffer or constant."""
    is_trainable: bool = True
    value: Any = None
    """The value of a small constant: a number, or a list."""
    fill: float | None = None
    """The number that all elements are, None if they differ."""
    is_saved: bool = True
    """Whether the module's `state_dict` has it."""


@dataclass(frozen=True)
class Argument:
    """A parameter of the original's `forward` and its value in the example."""

    name: str
    value: Any
    """A Ref, a structure of them, or a constant."""
    is_keyword_only: bool = False
    has_default: bool = False
    """Whether the original has a default for it."""


@dataclass(frozen=True)
class OpenLoop:
    """A loop of the original over a range with an open size: `for t in range(x.shape[1])`."""

    file: str
    first: int
    last: int
    """Its lines."""
    start: str
    stop: str
    """The expressions of its bounds."""
    low: int
    high: int
    """The bounds in the example."""
    numbers: tuple[int, ...] = ()
    """Numbers of steps beyond which a turn may be another one: 14 in `if t > 14:`."""

    def symbols(self) -> list[str]:
        """Returns the open sizes in its bounds."""
        return re.findall(r"\b[a-z]+\d+\b", f"{self.start} {self.stop}")

    def surrounds(self, place: Place | None) -> bool:
        """Returns whether a statement is in the loop, or led to by one that is."""
        return place is not None and any(self.surrounds_line(*statement) for statement in place.chain)

    def surrounds_line(self, file: str, line: int) -> bool:
        """Returns whether a line is in the loop."""
        return file == self.file and self.first <= line <= self.last


@dataclass
class Graph:
    """The graph of one mode of a module."""

    nodes: list[Node]
    inputs: list[Ref]
    """The tensors of the example, in the order of the flattened arguments."""
    input_tree: Any
    """(args, kwargs) with a Ref in the place of each tensor, and constants."""
    output_tree: Any
    arrays: dict[str, Array]
    """By the name of the value that reads it."""
    modules: dict[str, Module]
    shared: dict[str, str]
    """The owner's path of each further path of an array."""
    tensors: dict[str, Any]
    """Shape and dtype of inputs and arrays by name."""
    aliases: dict[str, int] = field(default_factory=dict)
    updates: dict[str, Any] = field(default_factory=dict)
    """The value after the call of each array that the module changes, by path."""
    training: bool = False
    signature: list[Argument] = field(default_factory=list)
    """The parameters of the module, in their order; none if the example cannot be described so."""
    functions: list[str] = field(default_factory=list)
    """The calls of functions that have a backward of their own, of which the graph has the forward."""
    constants: dict[str, int] = field(default_factory=dict)
    """The values of buffers that the export took as constants, by path."""
    shared_modules: dict[str, str] = field(default_factory=dict)
    """The first path of each further path of a module."""
    loops: list[OpenLoop] = field(default_factory=list)
    """The loops whose number of steps is open."""

    def values(self) -> dict[str, Any]:
        """Returns shape and dtype of every value: inputs, arrays and results of operations."""
        return {**self.tensors, **{node.name: node.out for node in self.nodes}}

    def results(self) -> set[str]:
        """Returns the names of the values that the module returns or that its arrays have after the call."""
        return {*refs(self.output_tree), *refs(self.updates)}


WHOLE = ("layer", "recurrent", "attention")
"""The operations that are the call of a whole module."""


def map_refs(value: Any, function: Callable[[Ref], Any]) -> Any:
    """Returns an argument with each reference replaced by the result of a function."""
    if isinstance(value, Ref):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_refs(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_refs(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_refs(item, function) for item in (value.start, value.stop, value.step)))
    return value


def with_nodes(graph: Graph, nodes: list[Node], current: Callable[[Ref], Any]) -> Graph:
    """Returns a graph with other nodes, which give it what it returns and updates.

    Args:
        graph: The graph.
        nodes: The nodes.
        current: Returns the reference in the place of one of the graph.
    """
    outputs, updates = map_refs(graph.output_tree, current), map_refs(graph.updates, current)
    return replace(graph, nodes=nodes, output_tree=outputs, updates=updates)


def users_of(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """Returns the nodes that read each value, in their order. A value that none reads is absent."""
    users: dict[str, list[Node]] = {}
    for node in nodes:
        for name in dict.fromkeys(refs(node.args)):
            users.setdefault(name, []).append(node)
    return users


def refs(value: Any) -> Iterator[str]:
    """Yields the names of the values in an argument, in order."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)
    elif isinstance(value, slice):
        yield from refs([value.start, value.stop, value.step])
