"""The bodies of both modes of a module as one, with branches."""

from __future__ import annotations

import difflib

from icenet.core.porting.source.lines import Body, Line


def either(train: Body, evaluation: Body) -> Body:
    """Returns a body with both modes: statements that differ are in branches.

    Their parameters have the same names; those that one mode lacks are None there.
    """
    count = min(len(train.parameters), len(evaluation.parameters))
    longer = max(evaluation.parameters, train.parameters, key=len)
    parameters = [*longer[:count], *(f"{name}=None" for name in longer[count:])]
    ours, theirs = _statements(train.lines), _statements(evaluation.lines)
    keys = [[tuple((line.depth, line.code) for line in part) for part in side] for side in (ours, theirs)]
    lines: list[Line] = []

    def indented(parts: list[list[Line]]) -> list[Line]:
        return [Line(line.code, line.comment, line.depth + 1) for part in parts for line in part]

    for kind, a, b, c, d in difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
        if kind == "equal":
            lines += [line for part in theirs[c:d] for line in part]
            continue
        if b > a:
            lines += [Line("if self.training:"), *indented(ours[a:b])]
        if d > c and b > a:
            lines += [Line("else:"), *indented(theirs[c:d])]
        elif d > c:
            lines += [Line("if not self.training:"), *indented(theirs[c:d])]
    return Body(parameters, lines, evaluation.returns)


def _statements(lines: list[Line]) -> list[list[Line]]:
    """Returns the statements of a body with their inner lines."""
    found: list[list[Line]] = []
    for line in lines:
        if line.depth == 0 or not found:
            found.append([line])
        else:
            found[-1].append(line)
    return found
