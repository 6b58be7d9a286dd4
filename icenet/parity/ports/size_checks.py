"""The statements with which the source of a port refuses sizes that it does not serve."""

from __future__ import annotations

import re
from collections.abc import Collection

from icenet.core.porting import signature
from icenet.core.porting.build import Plan
from icenet.parity.ports.inputs import port_axes
from icenet.parity.ports.limits import Guard
from icenet.parity.ports.report import PortReport, limit_text


def with_size_checks(plan: Plan, report: PortReport, is_nhwc: bool) -> str:
    """Returns the source of a plan that begins its call with checks of the sizes.

    Args:
        plan: The plan.
        report: The sizes that the port serves.
        is_nhwc: Whether the port takes images with their channels last.
    """
    start = plan.source.index(f"class {plan.class_name}(nn.Module):")
    call = re.compile(r"    def __call__\((?P<parameters>.*?)\):\n", re.DOTALL).search(plan.source, start)
    assert call is not None
    parameters = {item.partition("=")[0].strip() for item in call["parameters"].split(",")}
    sizes = _Sizes(plan, parameters, is_nhwc)
    lines = [
        *(line for name in {**report.fixed, **report.limits} for line in _checks_of_input(name, report, sizes)),
        *(line for guard in report.guards for line in _check_of_guard(guard, sizes)),
    ]
    return plan.source[: call.end()] + "".join(lines) + plan.source[call.end() :]


class _Sizes:
    """The expressions for the sizes of the inputs in the call of a port.

    Args:
        plan: The plan.
        parameters: The names of the parameters of the call.
        is_nhwc: Whether the port takes images with their channels last.
    """

    def __init__(self, plan: Plan, parameters: Collection[str], is_nhwc: bool) -> None:
        self.graph, self.is_nhwc = plan.graph, is_nhwc
        self.names = [ref.name for ref in plan.graph.inputs]
        self.expressions = {name: name for name in self.names if name in parameters}
        """The expression for each input that the call has, by its name in the graph."""
        for item in plan.graph.signature:
            if item.name in parameters:
                self.expressions.update(
                    {name: text for name, text, _ in signature.leaves(item.value, item.name, item.name)}
                )

    def dim(self, name: str, dim: int) -> int:
        """Returns the dimension in the port of a dimension of the original."""
        return port_axes(self.graph.tensors[name].ndim, self.is_nhwc).index(dim)

    def text(self, name: str, dim: int) -> str:
        """Returns the expression for the size of an input in a dimension of the original."""
        return f"{self.expressions[name]}.shape[{self.dim(name, dim)}]"


def _checks_of_input(name: str, report: PortReport, sizes: _Sizes) -> list[str]:
    """Returns the checks of one input's sizes, each by itself, in the order of the dimensions."""
    if name not in sizes.expressions:
        return []
    found = {}
    for dim, size in report.fixed.get(name, {}).items():
        found[dim] = f"{sizes.text(name, dim)} != {size}", f"{size}"
    for dim, (low, high) in report.limits.get(name, {}).items():
        size_text = sizes.text(name, dim)
        if low is None:
            outside = f"{size_text} > {high}"
        elif high is None:
            outside = f"{size_text} < {low}"
        else:
            outside = f"not {low} <= {size_text} <= {high}"
        found[dim] = outside, limit_text(low, high)
    lines = []
    for dim in sorted(found, key=lambda dim: sizes.dim(name, dim)):
        outside, made_for = found[dim]
        lines += [
            f"        if {outside}:\n",
            f'            raise ValueError(f"{_given(name, dim, sizes)}; the port was made for {made_for}")\n',
        ]
    return lines


def _check_of_guard(guard: Guard, sizes: _Sizes) -> list[str]:
    """Returns the check of a condition on several sizes; none if the call lacks one of the inputs."""
    places = [(sizes.names[number], dim) for (number, dim), *_ in guard.places.values()]
    if any(name not in sizes.expressions for name, _ in places):
        return []
    condition, outside = guard.texts(lambda place: sizes.text(sizes.names[place[0]], place[1]))
    given = [_given(*place, sizes) for place in places]
    texts = [*(f'f"{text} and "' for text in given[:-1]), f'f"{given[-1]}; "', f'"the port was made for {condition}"']
    return [
        f"        if {outside}:\n",
        "            raise ValueError(\n",
        *(f"                {text}\n" for text in texts),
        "            )\n",
    ]


def _given(name: str, dim: int, sizes: _Sizes) -> str:
    """Returns the part of an f-string that says which size an input has."""
    return f"{sizes.expressions[name]} has {{{sizes.text(name, dim)}}} in dimension {sizes.dim(name, dim)}"
