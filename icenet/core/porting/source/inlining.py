"""Which expressions are written within the statement that uses them."""

from __future__ import annotations

import re

from icenet.core.porting.graph.calls import Call, Item
from icenet.core.porting.kinds import Helpers
from icenet.core.porting.record import WHOLE, Node, Ref, Tensor
from icenet.core.porting.source.loops import ELEMENT
from icenet.core.porting.source.written_sizes import WrittenSizes
from icenet.core.porting.table import TABLE
from icenet.core.porting.table.base import Operation

INLINE = 92
"""Longest expression that takes another expression as its argument."""

RETURNED = 104
"""Longest expression after `return`."""

_DEFAULT = re.compile(r", (?:stride=1|padding=0|dilation=1|output_padding=0|groups=1)(?=[,)])")
"""Keywords that are left out at the end."""

_SHAPES = ("transpose", "permute", "swapaxes", "reshape", "view", "flatten", "squeeze", "unsqueeze")


class Inlining(WrittenSizes):
    """Decides for each value of a call whether it has a variable.

    Attributes:
        consumer: The place of the last item that reads each value; none for what is returned.
    """

    consumer: dict[str, int]

    def keep(self, text: str, position: int) -> None:
        """Keeps the variables of an expression until the statement that it is written in."""
        for word in set(re.findall(r"[A-Za-z_]\w*", text)):
            if word in self.names:
                value = self.names[word]
                self.last_use[value] = max(self.last_use.get(value, -1), position)

    def is_inlined(self, node: Node, index: int, text: str) -> bool:
        """Returns whether an expression is written within the statement that uses it."""
        consumer, length = self.consumer.get(node.name), len(_DEFAULT.sub("", text))
        if node.name in self.pinned:
            return False
        user = self.items[consumer] if consumer is not None else None
        is_part = user is not None and self.is_same_statement(user, self.items[index])
        item = self.items[index]
        if ELEMENT.match(text) and not (is_part and (self.is_listed(item) or not self.is_element(item))):
            return False  # a loop may run over the list
        if consumer is None:  # the return reads it
            is_named = node.place is not None and bool(node.place.targets)
            if length >= RETURNED or (is_named and (length >= 60 or self.is_last_turn(item))):
                return False
            self.keep(text, len(self.items))
            return True
        assert user is not None
        if self.is_next_turn(item, user) or self.is_last_element(node, user) or self.is_step(node, user):
            return False
        if self.is_element(user) and not (is_part and self.is_listed(user) and not self.is_turn(user)):
            return False  # the loop reads a variable
        if self.is_plain(node) and self.is_listed(user):
            return False  # a permuted image, too: the other turns read a variable there
        if length > INLINE or (node.op == "item" and isinstance(user, Call)) or self.is_repeated(node, user):
            return False
        if node.base == "scaled_dot_product_attention":
            return False  # a statement of its own, which is the same in both modes but for the function
        same = self.is_same_statement(user, node) or self.is_same_statement(user, self.items[index])
        is_named = node.place is not None and bool(node.place.targets) and self.is_final(node, node.name)
        if not same and is_named and not self.is_plain(node) and not self.is_passed_on(node, user):
            return False
        self.keep(text, consumer)
        return True

    def is_last_element(self, node: Node, user: Item) -> bool:
        """Returns whether a value is the last one of a list whose others, of the same statement, have variables."""
        if not isinstance(user, Node) or user.base not in ("stack", "cat") or node.name in self.lists:
            return False
        names = [ref.name for ref in user.args["tensors"]]
        other = self.graph.by_name.get(names[-2]) if len(names) > 2 and names[-1] == node.name else None
        return other is not None and other.place == node.place is not None and self.uses[other.name] > 1

    def is_step(self, node: Node, user: Item) -> bool:
        """Returns whether a value is that of one turn of a loop over an open size, of which the next joins all."""
        if not isinstance(user, Node) or user.base not in ("stack", "cat") or not self.graph.graph.loops:
            return False
        dim, whole = user.args["dim"], user.out
        if not isinstance(whole, Tensor) or not isinstance(whole.shape[dim], str):
            return False
        parts = (
            [self.graph.tensors[ref.name].shape[dim] for ref in user.args["tensors"]] if user.base == "cat" else []
        )
        return all(isinstance(part, int) for part in parts)

    def is_passed_on(self, node: Node, user: Item) -> bool:
        """Returns whether the next operation gives another shape to a value that has another shape and no name."""
        between = self.items[self.position + 1 : self.items.index(user)]
        is_next = all(isinstance(item, Node) and self.graph.size(item.name) is not None for item in between)
        is_shape = isinstance(user, Node) and user.base in _SHAPES and node.base in _SHAPES
        name = self.operation_name(node) if is_shape and is_next else ""
        return (
            bool(name)
            and name not in (node.place.targets if node.place else ())
            and self.hint(node, node.name, with_forms=False) == name
        )

    def is_repeated(self, node: Node, user: Item) -> bool:
        """Returns whether the expression of an operation has a value more than once, so that it needs a variable."""
        if not isinstance(user, Node) or user.base not in TABLE or user.base in WHOLE:
            return False
        mark = "repeated_"
        is_training = self.graph.graph.training

        def source(ref: Ref) -> str:
            return mark if ref.name == node.name else "other_"

        trial = Operation(user, source, self.graph.tensors.get, Helpers(), is_training)
        return TABLE[user.base](trial).count(mark) > 1
