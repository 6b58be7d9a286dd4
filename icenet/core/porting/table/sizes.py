"""Arithmetic of sizes, which is Python's."""

from __future__ import annotations

import re

from icenet.core.porting.table.base import Operation, atom, entry


@entry("sym.sym_size")
def size(n: Operation) -> str:
    return f"{n.atom('self')}.shape[{n['dim']}]"


@entry("sym.sym_numel")
def numel(n: Operation) -> str:
    return f"{n.atom('self')}.size"


def _formatted(text: str):  # type: ignore[no-untyped-def]
    return lambda n: text.format(*(atom(n[key]) for key in sorted(n.args)))


def _binary(symbol: str):  # type: ignore[no-untyped-def]
    return lambda n: f"{atom(n['0'])} {symbol} {atom(n['1'])}"


for _name, _symbol in (
    ("add", "+"),
    ("sub", "-"),
    ("mul", "*"),
    ("floordiv", "//"),
    ("truediv", "/"),
    ("mod", "%"),
    ("pow", "**"),
    ("eq", "=="),
    ("ne", "!="),
    ("lt", "<"),
    ("le", "<="),
    ("gt", ">"),
    ("ge", ">="),
    ("and_", "and"),
    ("or_", "or"),
):
    entry(f"sym.{_name}")(_binary(_symbol))

for _name, _text in (
    ("sym_max", "max({0}, {1})"),
    ("sym_min", "min({0}, {1})"),
    ("sym_float", "float({0})"),
    ("sym_int", "int({0})"),
    ("neg", "-{0}"),
    ("trunc", "math.trunc({0})"),
    ("ceil", "math.ceil({0})"),
    ("floor", "math.floor({0})"),
    ("round", "round({0})"),
    ("sym_not", "not {0}"),
    ("abs", "abs({0})"),
    ("sym_ite", "({1} if {0} else {2})"),
    ("sym_sum", "sum({0})"),
):
    entry(f"sym.{_name}")(_formatted(_text))


@entry("sym._sym_sqrt", "sym.sqrt")
def sqrt(n: Operation) -> str:
    size = re.fullmatch(r"float\(([^()]*)\)", n["0"])
    return f"math.sqrt({size[1] if size else n['0']})"


@entry("sym.item")
def item(n: Operation) -> str:
    return f"{n.atom('self')}.item()"
