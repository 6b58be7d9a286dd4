"""The variables of the sizes in one call of a module."""

from __future__ import annotations

import re
from dataclasses import replace

from icenet.core.errors import PortError
from icenet.core.porting.graph.calls import Call
from icenet.core.porting.record import Node, OpenLoop, Tensor, refs
from icenet.core.porting.source import sizes
from icenet.core.porting.source.lines import Line
from icenet.core.porting.source.structure import Structure
from icenet.core.porting.source.values import Values
from icenet.core.porting.source.variables import Variables

_STEPS = re.compile(r"(for \w+ in (?:reversed\()?range)\((?:(\d+), )?(\d+)\)(\)?:)")


class SizeVariables(Variables):
    """Gives sizes of the arguments to variables: `B, T, _ = x.shape`."""

    def __init__(self, structure: Structure, graph: Values, call: Call) -> None:
        super().__init__(structure, graph, call)
        self.sizes: dict[str, str] = {}
        """The variable of each size that has one, by its expression."""
        self.symbols: dict[str, str] = {}
        """The names of the sizes of the arguments, by their expressions."""
        self.unpackings: list[tuple[Line, str, list[str], Tensor]] = []
        """The statements that give these sizes to variables: the array, the name of each axis, and the shape."""
        self.pinned: set[str] = set()
        """Tensors whose sizes are read later."""

    def open_sizes(self, parameters: list[tuple[str, str]]) -> None:
        """Names the open sizes of the arguments that are used more than once, or after another value has the name."""
        reads: dict[str, list[int]] = {}
        for index, item in enumerate(self.items):
            for name in refs(item.args) if isinstance(item, Node) and item.base != "sym.sym_size" else ():
                if self.graph.size(name) is not None:
                    reads.setdefault(str(self.graph.size(name)), []).append(index)
        for loop in self.loops():
            start = next(index for index, item in enumerate(self.items) if loop.surrounds(item.place))
            for symbol in loop.symbols():
                reads.setdefault(symbol, []).extend([start] * 2)  # a loop reads a variable
        targets = {
            name
            for item in self.items
            if item.place is not None and not (isinstance(item, Node) and item.op.startswith("sym."))
            for name in item.place.targets
        }
        tensors = {value: self.graph.tensors.get(value) for _, value in parameters}
        shapes = [tensor.shape for tensor in tensors.values() if isinstance(tensor, Tensor)]
        taken = targets | {hint for hint, _ in parameters}
        self.symbols = sizes.named(shapes, taken, self.structure.is_time_first)
        for value, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                continue
            found = {
                axis: size
                for axis, size in enumerate(tensor.shape)
                if isinstance(size, str) and size in self.symbols and reads.get(size) and size not in self.sizes
            }
            last = max((index for index, item in enumerate(self.items) if value in self.used_by(item)), default=-1)
            late = any(index > last for size in found.values() for index in reads[size])
            is_replaced = late and self.is_replaced(value, max(max(reads[size]) for size in found.values()))
            if sum(len(reads[size]) for size in found.values()) < 2 and not is_replaced:
                continue
            names = []
            for axis in range(max(tensor.ndim, 1)):
                name = self.symbols[found[axis]] if axis in found else "_"
                if name != "_":
                    self.sizes[found[axis]] = name
                    self.names[name] = f"size {name}"
                    self.last_use[f"size {name}"] = len(self.items) + 1
                names.append(name)
            line = Line("")
            self.lines.append(line)
            self.unpackings.append((line, self.text[value], names, tensor))

    def loops(self) -> list[OpenLoop]:
        """Returns the loops over open sizes of this call."""
        return [loop for loop in self.graph.graph.loops if any(loop.surrounds(item.place) for item in self.items)]

    def with_open_loops(self, lines: list[Line]) -> list[Line]:
        """Gives loops whose number of steps is a size that size: `for step in range(T)`.

        Raises:
            PortError: A loop of the original is none here.
        """
        left = set(self.loops())
        found: list[Line] = []
        around: list[tuple[int, OpenLoop]] = []
        for index, line in enumerate(lines):
            around = [(depth, loop) for depth, loop in around if depth < line.depth]
            match = _STEPS.fullmatch(line.code)
            low, high = (int(match[2] or 0), int(match[3])) if match else (0, 0)
            end = next((at for at in range(index + 1, len(lines)) if lines[at].depth <= line.depth), len(lines))
            loop = self.loop_of(lines[index + 1 : end], low, high, [loop for _, loop in around]) if match else None
            if match and loop is not None:
                stop = self.bound(loop.stop, high - loop.high)
                start = self.bound(loop.start, low - loop.low)
                line = replace(line, code=f"{match[1]}({f'{start}, ' if start != '0' else ''}{stop}){match[4]}")
                left.discard(loop)
                around.append((line.depth, loop))
            found.append(line)
        if left and not self.structure.trace:
            loop = next(iter(left))
            raise PortError(f"{loop.file}:{loop.first}: the number of steps of the loop is that of the example")
        return found

    def loop_of(self, body: list[Line], low: int, high: int, around: list[OpenLoop]) -> OpenLoop | None:
        """Returns the loop of the original that a loop with these statements and bounds is, None without one.

        Args:
            body: The statements.
            low, high: The bounds.
            around: The loops of the original around it.
        """
        origins = [line.origin for line in body if line.origin]
        found = [
            loop
            for loop in self.loops()
            if origins
            and loop not in around
            and low >= loop.low
            and all(any(loop.surrounds_line(*statement) for statement in origin) for origin in origins)
        ]
        equal = [loop for loop in found if loop.high - loop.low == high - low]
        if any(_STEPS.fullmatch(line.code) for line in body):
            return min(equal, key=lambda item: item.first, default=None)
        return max(equal or found, key=lambda item: item.first, default=None)

    def bound(self, expression: str, more: int) -> str:
        """Returns the source of a bound of a loop, and a number added to it."""
        if re.fullmatch(r"-?\d+", expression):
            return str(int(expression) + more)
        text = re.sub(r"\b[a-z]+\d+\b", lambda match: self.sizes.get(match[0], match[0]), expression)
        if added := re.fullmatch(r"(\w+) ([+-]) (\d+)", text):
            text, more = added[1], more + int(added[2] + added[3])
        return f"{text} {'-' if more < 0 else '+'} {abs(more)}" if more else text

    def pin_sizes(self, parameters: list[str]) -> None:
        """Keeps the variables from which sizes without a variable are read."""
        defined = self.graph.definers(self.items)
        for index, item in enumerate(self.items):
            for name in self.used_by(item):
                size = self.graph.size(name)
                if size is None or size in self.sizes or (isinstance(item, Node) and item.op.startswith("sym.")):
                    continue
                for source in self.graph.sources_of_size(name, index, parameters, defined) or ():
                    self.last_use[source] = max(self.last_use.get(source, -1), index)
                    self.pinned.add(source)

    def is_replaced(self, value: str, end: int) -> bool:
        """Returns whether the original assigns another value to the variable of an argument, up to an item."""
        places = [item.place for item in self.items[: end + 1]]
        return any(place is not None and self.text[value] in place.targets for place in places)

    def unpack_sizes(self) -> None:
        """Writes the statements that give sizes to variables, those that are read."""
        in_loops = {self.sizes.get(symbol, "") for loop in self.loops() for symbol in loop.symbols()}
        for line, text, names, tensor in self.unpackings:
            self.name_length(names, tensor)
            words = {word for other in self.lines if other is not line for word in re.findall(r"\w+", other.code)}
            words |= in_loops
            # an axis of the same size as one before needs no variable
            kept = [name if name in words and name not in names[:axis] else "_" for axis, name in enumerate(names)]
            used = [axis for axis, name in enumerate(kept) if name != "_"]
            if not used:
                self.lines = [other for other in self.lines if other is not line]
            elif len(used) == 1:
                line.code = f"{kept[used[0]]} = {text}.shape[{used[0]}]"
            else:
                line.code = f"{', '.join(kept)} = {text}.shape"

    def name_length(self, names: list[str], tensor: Tensor) -> None:
        """Names a length that is a number in this port, where a reshape keeps it: `x.reshape(B, T, -1, 16)`.

        The classes of two stacks whose lengths differ are one then.
        """
        length, words = tensor.shape[1:2], {word for line in self.lines for word in re.findall(r"\w+", line.code)}
        is_fixed = tensor.ndim == 3 and isinstance(length[0], int) and length[0] not in (1, tensor.shape[2])
        if not is_fixed or names[0] == "_" or names[1] != "_" or "T" in words:
            return
        reshape = re.compile(rf"(\.reshape\({names[0]}, ){length[0]}(?=, )")
        if not any(reshape.search(line.code) for line in self.lines):
            return
        names[1] = "T"
        for line in self.lines:
            line.code = reshape.sub(r"\1T", line.code)
            parts = ["T" if part == str(length[0]) else part for part in line.comment.strip("[]").split(", ")]
            line.comment = f"[{', '.join(parts)}]" if line.comment else ""

    def size_expression(self, name: str, expression: str) -> str:
        """Returns the source of a size: an axis of a value that is known here, or arithmetic of sizes."""
        if expression in self.sizes:
            return self.sizes[expression]
        if re.fullmatch(r"\d+", expression):
            return expression
        computed = self.graph.by_name.get(name)
        if computed is not None and computed.base == "sym.mul" and self.has_sizes(computed):
            return self.operation(computed)  # H * W
        for value in self.text:
            tensor = self.graph.tensors.get(value)
            variable = self.text[value]
            if isinstance(tensor, Tensor) and self.names.get(variable) == value:
                shape = list(map(str, tensor.shape))
                if expression in shape:
                    return f"{variable}.shape[{shape.index(expression)}]"
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

    def has_sizes(self, node: Node) -> bool:
        """Returns whether there are variables of all sizes of which another one is computed."""
        return all(self.graph.size(name) in self.sizes for name in refs(node.args))

    def operation(self, node: Node) -> str:
        """Returns the source of an operation."""
        raise NotImplementedError
