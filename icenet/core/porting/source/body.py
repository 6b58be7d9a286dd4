"""Writes the body of one call of a module."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

from icenet.core.errors import PortError
from icenet.core.porting import signature as signatures
from icenet.core.porting.graph.calls import Call
from icenet.core.porting.graph.writes import index_of
from icenet.core.porting.kinds import Helpers
from icenet.core.porting.record import WHOLE, Argument, Node, Place, Ref, Tensor, refs
from icenet.core.porting.source import simplify, sizes
from icenet.core.porting.source.inlining import Inlining
from icenet.core.porting.source.lines import Body, Line, returned, tuples
from icenet.core.porting.source.loops import RANGE, roll
from icenet.core.porting.source.structure import Structure
from icenet.core.porting.source.values import MODULE, Values
from icenet.core.porting.table import TABLE
from icenet.core.porting.table.base import Operation
from icenet.core.porting.table.writes import written_at

_GIVEN = re.compile(r"[\w.\[\]'\"]+$|(?!put\()\w+\(|self[\w.\[\]'\"]*\(")
"""An expression that may be an array which another variable holds."""

_JOIN = re.compile(r"\b(?:stack|cat|concat|concatenate)\(\s*(\w+)\s*[,)]")


class Frame(Inlining):
    """Writes the body of one call."""

    def __init__(self, structure: Structure, graph: Values, call: Call, parameters: list[str] | None = None) -> None:
        super().__init__(structure, graph, call)
        self.parameters = parameters or []
        """The names of the parameters in the other mode."""
        self.unpacked: set[str] = set()
        self.made: set[str] = set()
        """Values that a variable holds, and no other one: no arguments, attributes or results of a function."""
        self.joined: dict[str, Place] = {}
        """The statements of the operations that join lists."""
        self.list_names: dict[str, str] = {}
        """The variables of these lists in the original, by their texts here."""

    # ---- which values

    def body(self) -> Body:
        graph = self.graph
        parameters = graph.parameters(self.call)
        results = graph.returns(self.call)
        final = self.final = {name: path for path, name in graph.updates_in(self.call)}
        is_root = self.call.path == "" and self.call is graph.root
        for index, item in enumerate(self.items):
            for name in self.used_by(item):
                self.last_use[name] = index
        outputs = list(refs(graph.graph.output_tree)) if is_root else results
        for name in (*outputs, *final):
            self.last_use[name] = len(self.items)
        self.uses = Counter(name for item in self.items for name in self.used_by(item))
        self.uses.update(outputs)
        self.uses.update(final.keys())
        self.consumer = {}
        for index, item in enumerate(self.items):
            for name in self.used_by(item):
                self.consumer[name] = index
        signature = []
        if is_root and graph.graph.signature:
            signature = self.original_signature(graph.graph.signature)
        else:
            self.position = -1  # before the first operation, so that no two have one name
            for (hint, name), known in itertools.zip_longest(parameters, self.parameters[: len(parameters)]):
                self.last_use.setdefault(name, 0)
                variable = self.variable(known or hint, name)
                self.text[name] = variable
                signature.append(variable)
        self.collect()
        self.scope = {name for _, name in parameters}
        self.open_sizes(parameters)
        self.pin_sizes([name for _, name in parameters])
        self.lines += [Line(f"{variable} = []") for variable in self.collected]
        for index, item in enumerate(self.items):
            self.position, start = index, len(self.lines)
            if isinstance(item, Node):
                self.node(item, index)
            else:
                self.child(item, index)
            for line in self.lines[start:]:
                line.origin = item.place.chain if item.place is not None else None
        self.position = len(self.items) - 1  # what is returned is still needed
        updates = [(self.structure.attribute(self.call.path, path), name) for name, path in final.items()]
        updates = [(target, name) for target, name in updates if self.text.get(name) != target]
        self.keep_before(updates, outputs)
        self.lines += [Line(f"{target} = {self.expression(Ref(name))}") for target, name in updates]
        if is_root:
            self.lines.append(Line(f"return {self.output(graph.graph.output_tree)}"))
        elif results:
            texts = [self.expression(Ref(name)) for name in results]
            self.structure.returned[self.call.path] = texts
            self.lines.append(Line("return " + ", ".join(texts)))
        self.unpack_sizes()
        places = [item.place for item in self.items if item.place is not None]
        if places and self.lines and self.lines[-1].code.startswith("return "):
            self.lines[-1].origin = places[-1].chain  # that of the last operation, which is often in it
        rolled = self.with_open_loops(roll(self.lines, self.list_names))
        lines = returned(tuples(rolled, {place.chain: place.targets for place in places}))
        for line in lines:
            line.code = RANGE.sub(self.elements, line.code)
        return Body(signature, lines, results)

    def keep_before(self, updates: list[tuple[str, str]], outputs: list[str]) -> None:
        """Assigns to variables what is read after an update and would see the new value."""
        read = [(name, [target for target, _ in updates]) for name in outputs]
        read += [(name, [target for target, _ in updates[:index]]) for index, (_, name) in enumerate(updates)]
        for name, targets in read:
            if self.graph.size(name) is not None:
                continue
            code = self.expression(Ref(name))
            if any(re.search(rf"{re.escape(target)}(?!\w)", code) for target in targets):
                node, array = self.graph.by_name.get(name), self.graph.graph.arrays.get(name)
                hint = self.hint(node, name) if node is not None else array.path.rpartition(".")[2] if array else "y"
                variable = self.variable(hint, name)
                self.last_use[name] = len(self.items)
                self.assign(variable, code, self.graph.tensors.get(name))
                self.text[name] = variable

    def original_signature(self, arguments: list[Argument]) -> list[str]:
        """Returns the parameters of the original, and writes the statements that check and unpack them."""

        def variable(hint: str, value: str) -> str:
            self.last_use.setdefault(value, 0)
            name = self.variable(self.graph.part_names.get(value, hint), value)
            self.text[value] = name
            return name

        self.position = -1  # before the first operation
        found, lines = signatures.parameters(arguments, variable)
        for line in lines:
            code = line.lstrip()
            self.lines.append(Line(code, depth=(len(line) - len(code)) // 4))
        return found

    def elements(self, match: re.Match[str]) -> str:
        """Returns a list, or the part of it over which a loop runs."""
        text, start, stop = match[1], int(match[2]), int(match[3])
        inner = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", text)[5:]
        path = self.structure.original(self.structure.outer(self.call.path), inner)
        shapes = [array.tensor.shape for array in self.graph.graph.arrays.values() if array.path == path]
        size = self.structure.length(path) if path in self.structure.modules else shapes[0][0] if shapes else 0
        if start == 0 and stop == size:
            return text
        return f"{text}[{start or ''}:{stop if stop != size else ''}]"

    # ---- expressions

    def expression(self, ref: Ref) -> str:
        name = ref.name
        if name in self.text:
            return self.text[name]
        if name.startswith(MODULE):
            return self.structure.child(self.call.path, name.removeprefix(MODULE))
        graph = self.graph
        array = graph.graph.arrays.get(name)
        if array is not None:
            return self.structure.read_array(self.call.path, array)
        size = graph.size(name)
        if size is not None:
            return self.size_expression(name, size)
        raise PortError(f"{self.call.path or 'the module'}: the value {name} is not known where it is used")

    def module(self, path: str) -> str:
        """Returns the source of a module that is called: an attribute, or an argument of this call."""
        return self.expression(Ref(MODULE + path))

    def operation(self, node: Node) -> str:
        name = node.base
        table = self.table_of(node)
        if table:
            return f"{table}.as_linear({self.expression(node.args['input'])})"
        if name == "linear" and self.linear_of(node):
            return f"{self.linear_of(node)}({self.expression(node.args['input'])})"
        if name == "layer":
            return f"{self.module(node.args['path'])}({self.expression(node.args['self'])})"
        if name in ("recurrent", "attention"):
            text = self.module(node.args["path"])
            node = replace(node, args={**node.args, "text": text})
        found = TABLE.get(name)
        if found is None:
            raise PortError(f"{node.place or node.name}: no entry for {node.op}")
        is_training = self.graph.graph.training
        operation = Operation(node, self.expression, self.graph.tensors.get, self.structure.used_helpers, is_training)
        return found(operation)

    def table_of(self, node: Node) -> str:
        """Returns the source of the embedding whose weight a linear layer has, empty for another operation."""
        weight = node.args.get("weight") if node.base == "linear" and node.args.get("bias") is None else None
        array = self.graph.graph.arrays.get(weight.name) if isinstance(weight, Ref) else None
        layer = self.structure.layers.get(array.path.rpartition(".")[0]) if array is not None else None
        if (
            not isinstance(weight, Ref)
            or layer is None
            or layer.constructor not in ("nn.Embedding", "PaddedEmbedding")
        ):
            return ""
        text = self.expression(weight)
        return text.removesuffix(".weight") if text.endswith(".weight") else ""

    def linear_of(self, node: Node) -> str:
        """Returns the source of the layer whose weight and bias a linear operation has, empty for another one."""
        given = {key: node.args[key] for key in ("weight", "bias") if node.args.get(key) is not None}
        arrays = {key: self.graph.graph.arrays.get(ref.name) for key, ref in given.items() if isinstance(ref, Ref)}
        paths = {key: array.path for key, array in arrays.items() if array is not None}
        owner = paths.get("weight", "").rpartition(".")[0]
        layer = self.structure.layers.get(owner)
        if layer is None or layer.constructor != "nn.Linear" or len(paths) != len(given):
            return ""
        wanted = ("weight", "bias") if layer.keywords.get("bias", True) else ("weight",)
        text = self.expression(given["weight"])
        is_whole = paths == {key: f"{owner}.{key}" for key in wanted}
        return text.removesuffix(".weight") if is_whole and text.endswith(".weight") else ""

    def output(self, value: Any) -> str:
        if isinstance(value, Ref):
            return self.expression(value)
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self.output(item)}" for key, item in value.items()) + "}"
        if isinstance(value, tuple):
            inner = ", ".join(map(self.output, value))
            return f"({inner}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.output, value))}]"
        return repr(value)

    # ---- statements

    def node(self, node: Node, index: int) -> None:
        if self.uses[node.name] == 0 and node.name in self.graph.removable:
            return
        if node.name in self.unpacked:
            return
        if self.graph.size(node.name) is not None:
            return  # written where it is used
        if node.name in self.joins:
            function = "stack" if node.base == "stack" else "concatenate"
            text = f"mx.{function}({self.lists[node.name]}, axis={node.args['dim']})"
        else:
            text = self.with_written_sizes(node, self.operation(node))
            if node.base in ("stack", "cat") and node.place is not None:
                joined = _JOIN.findall(node.place.code)  # the statement may join several lists
                number = sum(place == node.place for place in self.joined.values())
                if number < len(joined):
                    self.list_names[", ".join(map(self.expression, node.args["tensors"]))] = joined[number]
                self.joined[node.name] = node.place
            if node.name in self.lists:
                self.lines.append(Line(f"{self.lists[node.name]}.append({text})"))
                return
        trace = self.structure.trace
        inline = self.uses[node.name] == 1 and self.is_inlined(node, index, text) and not trace
        if node.op == "recurrent" and node.place is not None and len(node.place.targets) > 1:
            inline = False  # y, _ = self.lstm(x)
        if inline or (text.isidentifier() and not trace):
            self.text[node.name] = text
            if text.isidentifier() and text in self.names:  # the same value under another name
                held = self.names[text]
                self.last_use[held] = max(self.last_use.get(held, -1), self.last_use.get(node.name, -1))
            return
        if isinstance(node.out, list) and not trace and self.unpack(node, text):
            return
        if text.startswith("put(") and not trace and self.write(node):
            return
        variable = self.variable(self.hint(node, node.name), node.name)
        self.assign(variable, text, node.out)
        self.text[node.name] = variable
        if node.op not in WHOLE and not _GIVEN.match(text):
            self.made.add(node.name)
        else:
            self.give(text)
        if trace:
            self.lines.append(Line(f"_record({node.name!r}, {variable})"))

    def write(self, node: Node) -> bool:
        """Writes values into an array that nothing else reads: `x[:, 0] = y`. Returns whether it is one."""
        index = index_of(node, self.graph.tensors) if node.op == "scatter_view" else None
        target, src = node.args.get("self"), node.args.get("src")
        if index is None or not isinstance(target, Ref) or not isinstance(src, Ref):
            return False
        variable = self.text.get(target.name, "")
        held = self.names.get(variable, "")
        is_shared = self.text.get(held) != variable or self.is_live(held) or self.is_live(target.name)
        if held not in self.made or is_shared or self.is_given(held):
            return False
        is_training = self.graph.graph.training
        operation = Operation(node, self.expression, self.graph.tensors.get, Helpers(), is_training)
        self.lines.append(Line(f"{variable}[{written_at(operation, index)}] = {self.written_value(src)}"))
        self.text[node.name] = variable
        self.names[variable] = node.name
        self.made.add(node.name)
        return True

    def is_given(self, name: str) -> bool:
        """Returns whether the expression of a value, in its simplest form, may be an array that has another name."""
        code = self.operation(self.graph.by_name[name])
        return _GIVEN.match(simplify.text(simplify.simplified(code))) is not None

    def give(self, text: str) -> None:
        """Notes that an expression may be an array that it has as an argument, which then has two names."""
        for word in re.findall(r"[A-Za-z_]\w*", text):
            self.made.discard(self.names.get(word, ""))

    def written_value(self, src: Ref) -> str:
        """Returns the source of values that are written; they need not have the shape of the part."""
        node, text = self.graph.by_name.get(src.name), self.expression(src)
        if node is None or node.base not in ("fill", "copy") or text.isidentifier():
            return text
        value = node.args.get("value", node.args.get("src"))
        array = self.graph.graph.arrays.get(value.name) if isinstance(value, Ref) else None
        if array is not None and type(array.value) in (int, float, bool):
            return repr(array.value) if math.isfinite(array.value) else f'float("{array.value}")'
        return self.expression(value) if isinstance(value, Ref) else text

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
        if node.op == "recurrent" and len(variables) == 3:  # the states of an LSTM are a pair
            states = variables[1:]
            variables = [variables[0], "_" if states == ["_", "_"] else f"({', '.join(states)})"]
        self.assign(", ".join(variables), text, out)
        return True

    def child(self, call: Call, index: int) -> None:
        results = self.graph.returns(call)
        if not results and not self.graph.has_effect(call):
            return
        given = ", ".join(self.expression(Ref(name)) for _, name in self.graph.parameters(call))
        method = self.structure.method(call)
        text = f"{self.called(call)}{method}({given})"
        self.give(text)
        if not results:
            self.lines.append(Line(text))
            return
        if len(results) == 1 and self.uses[results[0]] == 1:
            fake = Node(results[0], "call", {}, self.graph.tensors.get(results[0]), call.place)
            if self.is_inlined(fake, index, text) and not self.structure.trace:
                self.text[results[0]] = text
                return
        targets = call.place.targets if call.place and not call.place.is_several else ()
        variables = []
        for position, name in enumerate(results):
            is_unused = self.uses[name] == 0 and name not in self.pinned and not self.structure.trace
            if is_unused and len(targets) != len(results):
                variables.append("_")
                continue
            hint = (
                targets[position]
                if len(targets) == len(results)
                else targets[0]
                if targets and position == 0 and len(results) == 1
                else ""
            )
            first = self.graph.parameters(call)[:1]
            reused = self.element_name(call, name, first[0][1]) if first and position == 0 else None
            on_line = self.target_on_line(call, name)
            if reused:
                hint = reused
            elif on_line:
                hint = on_line
            elif len(results) > 1 and len(targets) < 2 and set(results) <= self.graph.part_names.keys():
                hint = self.graph.part_names[name]
            elif not hint or hint == "_" or not (self.is_final(call, name) or self.is_turn(call)):
                leaf = [part for part in call.path.split(".") if not part.isdigit()]
                own = self.structure.returned.get(call.path, [])[position : position + 1]
                further = re.sub(r"_\d+$", "", own[0]) if own and own[0].isidentifier() else "extra"
                hint = (leaf[-1] if leaf else "y") if position == 0 else further
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

    def called(self, call: Call) -> str:
        """Returns the source of the module of a call: `self.layer[-1]` where the original calls the last one so."""
        text, (holder, _, name) = self.module(call.path), call.path.rpartition(".")
        is_last = name.isdigit() and self.structure.length(holder) == int(name) + 1 and text.endswith(f"[{name}]")
        leaf = holder.rpartition(".")[2]
        if is_last and call.place is not None and f".{leaf}[-1](" in call.place.code:
            return f"{text.removesuffix(f'[{name}]')}[-1]"
        return text

    def assign(self, variable: str, text: str, out: Any) -> None:
        comment = ""
        if isinstance(out, Tensor):
            comment = sizes.shape_comment(out, self.symbols)
        self.lines.append(Line(f"{variable} = {text}", comment))
