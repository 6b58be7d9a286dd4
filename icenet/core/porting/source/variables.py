"""The names of the variables in one call of a module: those of the original where they are free."""

from __future__ import annotations

import re
from collections import Counter

from icenet.core.porting.graph.calls import Call, Item
from icenet.core.porting.record import WHOLE, Node, Ref, Tensor
from icenet.core.porting.source import helpers
from icenet.core.porting.source.lines import RESERVED, Line
from icenet.core.porting.source.originals import second_name
from icenet.core.porting.source.statements import Statements
from icenet.core.porting.source.structure import Structure
from icenet.core.porting.source.values import Values

_FORMS = ("unsqueeze", "squeeze", "expand", "transpose", "permute", "flatten", "to", "contiguous", "slice")
"""Operations whose result has the elements of their argument."""


class Variables(Statements):
    """Chooses the variables of one call.

    Attributes:
        text: The source of each value that is known: a variable or an expression.
        names: The value that each variable holds.
        last_use: The place of the last item that reads a value.
        position: The place of the present item.
        uses: How often each value is read.
        scope: The parameters.
        collected: The lists to which the values of all turns of a loop are appended.
    """

    def __init__(self, structure: Structure, graph: Values, call: Call) -> None:
        super().__init__(structure, graph, call)
        self.text: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.last_use: dict[str, int] = {}
        self.position = 0
        self.uses: Counter[str] = Counter()
        self.scope: set[str] = set()
        self.collected: list[str] = []
        self.final: dict[str, str] = {}
        """The paths of the arrays that a value updates, by the value."""
        self.lines: list[Line] = []
        """The statements so far."""

    def variable(self, hint: str, value: str) -> str:
        """Returns a variable for a value: that of the original if it is free."""
        hint = re.sub(r"\W", "_", hint).strip("_").lstrip("0123456789") or "y"
        if hint in RESERVED or not hint.isidentifier() or hint in self.structure.used_helpers or helpers.exists(hint):
            hint += "_"
        self.keep_name(hint, value)
        name, number = hint, 1
        while name in self.names and self.is_live(self.names[name]) and self.names[name] != value:
            number += 1
            name = f"{hint}_{number}"
        self.names[name] = value
        return name

    def keep_name(self, variable: str, value: str) -> None:
        """Frees a variable for another value: what it holds gets the second name that the original gives to it.

        In `shortcut = x; x = self.norm(x)`, for example.
        """
        held = self.names.get(variable, value)
        item = self.items[self.position] if 0 <= self.position < len(self.items) else None
        if held == value or not self.is_live(held) or item is None or item.place is None:
            return
        made = self.place_of(held)
        file, line = item.place.chain[0]
        if self.text.get(held) != variable or (made is None and held not in self.scope):
            return
        name = second_name(file, variable, made[1] if made is not None else 0, line)
        read_later = [
            other
            for other, text in self.text.items()
            if other != held and self.is_live(other) and variable in re.findall(r"[A-Za-z_]\w*", text)
        ]
        if not name or name in RESERVED or self.is_taken(name) or helpers.exists(name) or read_later:
            return
        self.lines.append(Line(f"{name} = {variable}"))
        self.text[held] = name
        self.names[name] = held
        del self.names[variable]

    def place_of(self, value: str) -> tuple[str, int] | None:
        """Returns file and line of the statement of this method in which a value is computed."""
        for item in self.items:
            names = [item.name] if isinstance(item, Node) else self.graph.returns(item)
            if value in names:
                return item.place.chain[0] if item.place is not None else None
        return None

    def is_taken(self, name: str) -> bool:
        """Returns whether a name is that of a value that is read later, or of a function."""
        return name in self.structure.used_helpers or (name in self.names and self.is_live(self.names[name]))

    def is_live(self, value: str) -> bool:
        return self.last_use.get(value, -1) > self.position

    def collect(self) -> None:
        """Finds the lists to which the original appends the values that it joins, for loops."""
        self.lists: dict[str, str] = {}
        """The variable of the list by the name of each of its values, and of the operation that joins it."""
        self.joins: set[str] = set()
        """The operations that join the values of such a list."""
        for item in self.items:
            names = [ref.name for ref in item.args.get("tensors", ())] if isinstance(item, Node) else []
            places = {made.place for made in self.items if isinstance(made, Node) and made.name in names}
            place = next(iter(places), None)
            match = re.match(r"(\w+)\.append\(", place.code) if place is not None and len(places) == 1 else None
            is_joined = isinstance(item, Node) and item.base in ("stack", "cat") and len(names) > 2
            is_joined = is_joined and item.place != place  # boxes.append(torch.stack([x, y, w, h], -1))
            made = [made.name for made in self.items if isinstance(made, Node) and made.name in names]
            if match and is_joined and made == names and all(self.uses[name] == 1 for name in names):
                assert isinstance(item, Node)
                self.position = -1
                self.last_use[f"list {item.name}"] = self.items.index(item)
                variable = self.variable(match[1], f"list {item.name}")
                self.lists.update(dict.fromkeys([*names, item.name], variable))
                self.joins.add(item.name)
                self.collected.append(variable)

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

    def readers(self, name: str) -> list[Item]:
        """Returns what reads the elements of a value, not only a size."""
        found = self.users.get(name, [])
        return [item for item in found if not (isinstance(item, Node) and item.op.startswith("sym."))]

    def becomes(self, item: Node) -> str:
        """Returns the variable of the only value that needs a part: `q, k, v = map(f, parts)`."""
        name = item.name
        while True:
            users = self.readers(name)
            if len(users) != 1 or not isinstance(users[0], Node) or not self.is_same_statement(users[0], item):
                return ""
            name = users[0].name
            if self.is_final(users[0], name):
                return self.target_of(users[0], name)

    def becomes_later(self, item: Node) -> str:
        """Returns the variable of what a later statement with several variables makes of a part alone."""
        users = self.readers(item.name)
        if len(users) != 1 or not isinstance(users[0], Node) or users[0].place is None:
            return ""
        if self.is_same_statement(users[0], item) or len(users[0].place.targets) < 2:
            return ""
        return self.target_of(users[0], users[0].name) or self.becomes(users[0])

    def target_on_line(self, item: Item, name: str) -> str:
        """Returns the variable of a value of a line with several statements, empty for others or if it is not known.

        What a later line reads is in variables. They are known if there is a value for each target; otherwise that of
        a value is known whose operation only one statement has as its outermost one.
        """
        if item.place is None or not item.place.is_several or not item.place.targets:
            return ""
        targets = item.place.targets
        places = [index for index, other in enumerate(self.items) if self.is_same_statement(other, item)]
        made = [
            value
            for other in (self.items[index] for index in places)
            for value in ([other.name] if isinstance(other, Node) else self.graph.returns(other))
            if self.last_use.get(value, -1) > max(places)
        ]
        if name not in made:
            return ""
        if item.place.has_all and len(made) == len(targets):
            return targets[made.index(name)].strip("_")
        operations = item.place.operations
        same = [other for other in made if self.made_by(other) == self.made_by(name)]
        if not self.made_by(name) or len(same) > 1 or operations.count(self.made_by(name)) != 1:
            return ""
        return targets[operations.index(self.made_by(name))].strip("_")

    def made_by(self, value: str) -> str:
        """Returns the name of the operation or the attribute of the module that computes a value."""
        for item in self.items:
            if isinstance(item, Node) and item.name == value:
                return str(item.args["path"]).rpartition(".")[2] if item.op == "layer" else item.base
            if not isinstance(item, Node) and value in self.graph.returns(item):
                return item.path.rpartition(".")[2]
        return ""

    def hint(self, item: Item, name: str, with_forms: bool = True) -> str:
        """Returns the name that a value should have: that of the original, or that of what it is a form of."""
        place = item.place
        state = self.state_of(item)
        if state:
            return state
        if name in self.final and (place is None or not place.targets):  # self.mean.mul_(0.9).add_(...)
            return self.final[name].rpartition(".")[2]
        if isinstance(item, Node) and item.op == "item" and place is not None and len(place.targets) == 1:
            part = self.becomes_later(item)  # qkv = x.chunk(3), and then q, k, v = map(f, qkv)
            if part:
                return part
        if isinstance(item, Node) and item.op == "layer":
            found = self.element_name(item, name, item.args["self"].name)
            if found:
                return found
        on_line = self.target_on_line(item, name)
        if on_line:
            return on_line
        if place is not None and place.targets and not place.is_several and self.is_final(item, name):
            if len(place.targets) == 1 or (isinstance(item, Node) and item.op == "attention"):
                return place.targets[0]  # y, _ = self.attention(x, x, x)
            found = self.target_of(item, name)
            if found:
                return found
            if isinstance(item, Node) and item.op == "item" and item.args["index"] < len(place.targets):
                found = place.targets[item.args["index"]]
                return found if found != "_" else "y"
        if isinstance(item, Node) and item.op == "item":
            found = self.becomes(item)
            if found:
                return found
        if not isinstance(item, Node):
            return item.path.rpartition(".")[2]
        if item.base in ("alias", "dropout", "detach") or self.is_plain(item):
            given = item.args.get("self", item.args.get("input"))
            source = self.text.get(given.name, "") if isinstance(given, Ref) else ""
            if source.isidentifier():  # the same value in another form
                return re.sub(r"_\d+$", "", source)
        return self.unnamed(item, with_forms)

    def unnamed(self, item: Node, with_forms: bool) -> str:
        """Returns a name for a value within a statement: its variable if that is free, or the operation's."""
        name = (self.form_name(item) if with_forms else "") or self.operation_name(item)
        targets = item.place.targets if item.place is not None and not item.place.is_several else ()
        is_attention = item.base == "scaled_dot_product_attention"
        is_part = len(targets) == 1 and item.op not in WHOLE and self.becomes(item) == targets[0]
        if not (is_part or (is_attention and targets)) or targets[0] == "_":
            return name
        held = self.names.get(targets[0], "")
        return targets[0] if not self.is_live(held) and not self.is_read_as(targets[0]) else name

    def is_read_as(self, variable: str) -> bool:
        """Returns whether an expression that a later statement has reads a variable."""
        return any(
            self.is_live(value) and variable in re.findall(r"[A-Za-z_]\w*", text) for value, text in self.text.items()
        )

    def state_of(self, item: Item) -> str:
        """Returns the name of a state after one step of a recurrent layer, which PyTorch calls `ret`."""
        if not isinstance(item, Node) or item.place is None or item.place.targets != ("ret",):
            return ""
        source = self.graph.by_name.get(item.args["self"].name) if item.op == "item" else item
        if source is None or not source.base.endswith("_cell"):
            return ""
        return "hc"[item.args["index"]] if item.op == "item" else "h"

    def form_name(self, item: Node) -> str:
        """Returns the variable of which a value is another form or the beginning, empty without one."""
        given = item.args.get("self") if item.base in _FORMS else next(iter(item.args.get("tensors", ())), None)
        if item.base not in (*_FORMS, "cat") or not isinstance(given, Ref):
            return ""
        source = self.text.get(given.name, "")
        return re.sub(r"_\d+$", "", source) if source.isidentifier() else ""

    def operation_name(self, item: Node) -> str:
        """Returns a name for the result of an operation that the original does not name."""
        base = item.args["path"].rpartition(".")[2] if item.op == "layer" else item.base
        if not base or base.isdigit() or self.is_element(item):
            base = "y"
        if isinstance(item.out, Tensor) and item.out.dtype == "bool":
            return "mask"
        words = {"scaled_dot_product_attention": "attended", "item": "part", "view": "y", "reshape": "y"}
        return words.get(base, base)
