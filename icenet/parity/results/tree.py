"""The tree of the modules in a report: which modules there are, and the status of each."""

from __future__ import annotations

from icenet.parity.results import status as states
from icenet.parity.results.result import Module
from icenet.parity.results.rows import is_in
from icenet.parity.state import Comparison


def add_modules(c: Comparison) -> None:
    """Adds the modules of both sides to the report, in the order of `b`, parents first."""
    parents: list[str] = []
    back = {theirs: ours for ours, theirs in c.a.names.items()}
    inner_b = tuple(f"{path}." for path in c.opaque)
    opaque = tuple(f"{back[path]}." for path in c.opaque), inner_b
    for match in c.matches:
        path = match.b if match.b is not None else match.a
        assert path is not None
        sides = ((c.a, match.a), (c.b, match.b))
        if any(p is not None and p.startswith(inner) for (_, p), inner in zip(sides, opaque, strict=True)):
            continue  # part of a layer that is compared as one
        if (match.a is None or match.b is None) and all(p is None or _is_list(side.classes[p]) for side, p in sides):
            continue  # a list of modules, which computes nothing
        classes = [side.classes[p].rpartition(".")[2] if p is not None else "" for side, p in sides]
        module = Module(path, match.a, match.b, classes[0], classes[1])
        if match.note:
            module.notes.append(match.note)
        if match.a is None or match.b is None:
            module.status = states.SKIPPED
            side = "b" if match.a is None else "a"
            is_sequence = classes[0 if side == "a" else 1] == "Sequential"
            only = "in {} only; its layers are compared" if is_sequence else "exists in {} only"
            module.notes.append(only.format(side))
        if path in c.modules:
            continue
        c.modules[path] = module
        parents.append(path)
    for path in parents:
        if path:
            parent = path.rpartition(".")[0]
            while parent not in c.modules:
                parent = parent.rpartition(".")[0]
            c.modules[parent].children.append(path)
    order: list[Module] = []

    def visit(path: str) -> None:
        order.append(c.modules[path])
        for child in c.modules[path].children:
            visit(child)

    visit("")
    c.report.modules = order


def finish_modules(c: Comparison) -> None:
    """Sets the status of each module from the rows."""
    order = [states.DIFFERS, states.CONTAINS, states.INHERITS, states.LESS_EXACT, states.PASSED]
    for _, row in c.report.rows():
        module = c.modules.get(row.path)
        if module is None or module.status == states.SKIPPED:
            continue
        module.ratio = max(module.ratio, row.ratio)
        module.where = module.where or row.where
        if module.status == states.NOT_RUN or order.index(row.status) < order.index(module.status):
            module.status = row.status
    differing = [module.path for module in c.report.modules if module.status == states.DIFFERS]
    for module in c.report.modules:
        contains = any(is_in(path, module.path) and path != module.path for path in differing)
        if contains and module.status not in (states.DIFFERS, states.SKIPPED):
            module.status = states.CONTAINS


def _is_list(name: str) -> bool:
    """Returns whether a class holds modules and computes nothing."""
    return name.endswith((".ModuleList", ".ModuleDict", ".ParameterList", ".ParameterDict"))
