"""A report as one HTML page that needs no other file and no script of another host.

The page has the verdict, the stages, the error of both sides by depth, the tree of the modules, histograms of the
tensors that differ, all values, and what is needed to repeat the comparison. Charts are inline SVG. The only script
opens the folded parts before printing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from icenet.core import files
from icenet.core.errors import UsageError
from icenet.parity.results.charts import histogram_chart, legend, line_chart, scientific, short
from icenet.parity.results.result import Module, Result, Row, Stage
from icenet.parity.results.status import (
    CONTAINS,
    DIFFERS,
    FAILED,
    INHERITS,
    LESS_EXACT,
    NOT_RUN,
    PASSED,
    SKIPPED,
    number,
)
from icenet.parity.results.style import SCRIPT, STYLE
from icenet.parity.yardstick import FACTOR

MAX_ROWS = 2000
"""Rows of the table of all values. More make a page that a phone cannot show; `as_dict` has all."""
MAX_HISTOGRAMS = 12

_GENERATOR = '<meta name="generator" content="icenet parity">'

_STATUS = {
    PASSED: ("ok", "✓", "agrees"),
    LESS_EXACT: ("ok", "✓", "agrees within the error of sums in fp32"),
    DIFFERS: ("bad", "✗", "the difference begins here"),
    FAILED: ("bad", "✗", "failed"),
    CONTAINS: ("warn", "◦", "contains the module that differs"),
    INHERITS: ("warn", "~", "differs only because its inputs do"),
    SKIPPED: ("none", "–", "skipped"),
    NOT_RUN: ("none", "·", "not run"),
}
"""Status -> colour, mark, and meaning."""

_MEANING = {
    "structure": "Names and shapes of modules, parameters and outputs.",
    "weights": "Parameters and buffers, with their axes in the same order.",
    "forward": "Outputs of each module, in the run and when it is called with the inputs of the reference.",
    "loss": "The loss of equal outputs, and its gradient.",
    "gradients": "Gradients of each parameter and output.",
    "optimizer": "Parameters after updates of the optimizer with equal gradients.",
    "training": "Losses of both sides while they train.",
}


def write(report: Result, path: str | os.PathLike[str]) -> Path:
    """Writes the page of a report, in place of an earlier page. Returns its path.

    Raises:
        UsageError: There is a folder, or a file of another kind.
        FileError: The file cannot be written. Nothing is changed then.
    """
    target = check(path)
    files.write_text(target, page(report))
    return target


def check(path: str | os.PathLike[str]) -> Path:
    """Returns the file that `write` replaces or creates.

    Raises:
        UsageError: There is a folder, or a file of another kind, or the folder of the file cannot be written.
    """
    target = files.output_file(files.user_path(path, "to_html"), overwrite=True)
    if target.exists() and not _is_page(target):  # there is no option that would replace it
        raise UsageError(f"{path}: exists and is not a page of a comparison; choose another name, or delete it")
    files.check_folder(target.parent)
    return target


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return _GENERATOR.encode() in file.read(500)


def page(report: Result) -> str:
    """Returns the page of a report."""
    title = f"{'Agrees' if report.passed else 'Differs'}: {' and '.join(filter(None, report.names)) or 'parity'}"
    parts = [
        _header(report),
        _stages(report.stages),
        *_charts(report),
        _tree(report.modules),
        _histograms(report),
        _values(report.stages),
        _repeat(report),
    ]
    body = "\n".join(filter(None, parts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{_GENERATOR}\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


# ---- the sections -------------------------------------------------------------------------------------------


def _header(report: Result) -> str:
    a, b = (escape(name or side) for name, side in zip(report.names, "ab", strict=True))
    state = "ok" if report.passed else "bad"
    frameworks = [_framework(report.environment.get(side, {})) for side in ("a", "b")]
    pair = (
        f"<b>a</b> is {a} {frameworks[0]}, under test. <b>b</b> is {b} {frameworks[1]}, the reference. The noise is "
        f"what rounding to {report.dtype} changes in b."
    )
    lines = [
        f'<header class="{state}"><h1><span class="mark">{"✓" if report.passed else "✗"}</span> '
        f"{escape(report.verdict)}</h1></header>",
        f"<p>{pair}</p>",
    ]
    if not report.passed:
        lines.append(_culprit(report))
    lines.append(
        "<details><summary>How to read this page</summary><p>Two frameworks never agree to the last bit. So each "
        "value is compared with the same value of the reference in float64. The <b>noise</b> is the error of the "
        f"reference itself in {report.dtype}, which is rounding. The <b>ratio</b> is the error of the other side in "
        f"units of this noise: up to {FACTOR:g} is rounding too, more is a difference.</p><p>A difference spreads to "
        "everything that is computed later. So each module is also called with the inputs of the reference. The "
        "module that is over the tolerance there is where the difference begins.</p></details>"
    )
    return "\n".join(lines)


def _framework(facts: dict[str, str]) -> str:
    known = " ".join(filter(None, (facts.get("framework", ""), facts.get("version", ""))))
    return f"({escape(known)})" if known else ""


def _beginning(rows: Sequence[Row]) -> tuple[int, str] | None:
    """Returns the number of the row where the difference begins, with a label; None if there is none.

    A module that differs in what it gives to one within it ends after that one, which shows the difference first.
    """
    begins = next((i for i, row in enumerate(rows) if row.status == DIFFERS), None)
    if begins is None:
        return None
    row = rows[begins]
    inner = row.own_part.removeprefix("input of ")
    if inner != row.own_part:
        path = f"{row.path}.{inner}" if row.path else inner
        for i, other in enumerate(rows[:begins]):
            if other.path == path and other.call >= row.call:
                return i, f"begins before {short(path)}"
    return begins, f"begins at {short(row.name)}"


def _culprit(report: Result) -> str:
    """Returns the box that says where the first difference is."""
    row = report.culprit_row
    facts: list[tuple[str, str]] = []
    if report.culprit is not None:
        module = report.module(report.culprit)
        facts.append(("module", report.culprit or "the model itself"))
        if module is not None:
            same = module.class_a == module.class_b
            facts.append(
                ("class", module.class_a if same else f"{module.class_a or '-'} and {module.class_b or '-'}")
            )
    if report.where:
        facts.append(("where", report.where))
    if report.failed_stage is not None:
        facts.append(("stage", report.failed_stage.name))
    if row is not None:
        facts.append(("value", row.own_part or row.part))
        if math.isfinite(row.ratio) and row.ratio:
            ratio = f"{number(row.ratio)} times the noise, {FACTOR:g} are allowed"
            if row.own_ratio is not None and number(row.own_ratio) != number(row.ratio):
                ratio += f"; {number(row.own_ratio)} times on the inputs of the reference"
            facts.append(("off by", ratio))
        if row.note:
            facts.append(("remark", row.note))
    if report.cause:
        facts.append(("likely cause", report.cause))
    if report.replay:
        facts.append(("smallest input", report.replay))
    return f'<section class="culprit"><h2>Where it begins</h2>{_definitions(facts)}</section>' if facts else ""


def _stages(stages: Sequence[Stage]) -> str:
    if not stages:
        return ""
    lines = []
    for stage in stages:
        colour, mark, _ = _STATUS.get(stage.status, _STATUS[NOT_RUN])
        worst = stage.worst
        ratio = f"largest ratio {number(worst.ratio)} at {worst.name}" if worst is not None and worst.ratio else ""
        note = "; ".join(escape(part) for part in (stage.note, ratio) if part)
        count = f"{len(stage.rows)} values" if stage.rows else ""
        facts = " · ".join(filter(None, (stage.status, count, f"{stage.seconds:.1f} s" if stage.seconds else "")))
        lines.append(
            f'<li class="{colour}"><span class="mark">{mark}</span><div><b>{escape(stage.name)}</b> '
            f"<small>{facts}</small><br>{_MEANING.get(stage.name, '')}"
            f"{f'<br><small>{note}</small>' if note else ''}</div></li>"
        )
    return (
        "<section><h2>Stages</h2><p>Each stage must pass before the next one is run.</p>"
        f'<ol class="stages">{"".join(lines)}</ol></section>'
    )


def _charts(report: Result) -> Iterator[str]:
    """Yields a chart of the errors of both sides for the stages that have some, and one of the training losses."""
    for stage in report.stages:
        rows = [row for row in stage.rows if row.scale > 0 and math.isfinite(row.error) and math.isfinite(row.noise)]
        if stage.name not in ("forward", "gradients") or len(rows) < 2:
            continue
        rows = _by_end(rows) if stage.name == "forward" else sorted(rows, key=lambda row: row.depth)
        curves = [
            (name, [(row.error if i == 0 else row.noise) / row.scale for row in rows])
            for i, name in enumerate(_names(report))
        ]
        begins = _beginning(rows)
        what = "outputs" if stage.name == "forward" else "gradients"
        yield (
            f"<section><h2>Error of the {what} by depth</h2><p>Error of each side against the reference in float64, "
            "divided by the size of the value (RMS), in the order of the computation. Both lines rise together while "
            f"both sides only round. Where they part, a difference begins.</p>"
            f"{line_chart(curves, [row.name for row in rows], begins)}</section>"
        )
    if report.losses and all(report.losses.values()):
        steps = [f"step {i}" for i in range(max(map(len, report.losses.values())))]
        yield f"<section><h2>Training</h2>{line_chart(list(report.losses.items()), steps, None, False)}</section>"


def _names(report: Result) -> list[str]:
    """Returns how the two sides are called: by their classes, if those have other names."""
    same = report.names[0] == report.names[1]
    return [
        f"{name} ({side})" if same and name else name or side for name, side in zip(report.names, "ab", strict=True)
    ]


def _by_end(rows: Sequence[Row]) -> list[Row]:
    """Returns rows in the order in which their calls end: a module after those within it."""
    rows = sorted(rows, key=lambda row: row.depth)
    last: dict[str, int] = {}
    for i, row in enumerate(rows):
        parts = row.path.split(".") if row.path else []
        for end in range(len(parts) + 1):
            last[".".join(parts[:end])] = i
    return sorted(rows, key=lambda row: (last[row.path], -len(row.path)))


def _tree(modules: Sequence[Module]) -> str:
    if not modules:
        return ""
    by_path = {module.path: module for module in modules}
    inner = {child for module in modules for child in module.children}
    # a path may appear once only, or a wrong report would never end
    shown: set[str] = set()
    # what agrees throughout is folded below the top
    unfolded = {
        module.path[:end]
        for module in modules
        if module.status in (DIFFERS, CONTAINS)
        for end in (i for i in range(len(module.path) + 1) if module.path[i : i + 1] in ("", "."))
    }

    def draw(module: Module, outer: str = "") -> str:
        shown.add(module.path)
        children = [by_path[path] for path in module.children if path in by_path and path not in shown]
        line = _module_line(module, outer)
        if not children:
            return f"<li>{line}</li>"
        is_open = " open" if not module.path or module.path in unfolded else ""
        inside = "".join(draw(child, module.path) for child in children)
        return f"<li><details{is_open}><summary>{line}</summary><ul>{inside}</ul></details></li>"

    roots = [module for module in modules if module.path not in inner]
    legend = " ".join(
        f'<span class="{colour}"><span class="mark">{mark}</span>{meaning}</span>'
        for status, (colour, mark, meaning) in _STATUS.items()
        if status not in (FAILED, LESS_EXACT)
    )
    scale = (
        "The number of a module is the largest ratio of its values: their error in units of the noise. "
        f"Up to {FACTOR:g} is rounding; the bar is half full there."
    )
    tree = "".join(draw(module) for module in roots if module.path not in shown)
    legend = f'<p>{scale}</p><p class="legend">{legend}</p>'
    return f'<section><h2>Modules</h2>{legend}<ul class="tree">{tree}</ul></section>'


def _module_line(module: Module, outer: str) -> str:
    colour, mark, meaning = _STATUS.get(module.status, _STATUS[NOT_RUN])
    # with the list that holds it, which is no line
    name = (module.path[len(outer) + 1 :] if outer else module.path) or "(model)"
    same = module.class_a == module.class_b
    kind = module.class_b if same else " | ".join(filter(None, (module.class_a, module.class_b)))
    ratio = ""
    if module.ratio:
        # a bar from 1/8 to 8 times the tolerance, in logarithms
        width = 100 * min(max(math.log(max(module.ratio, 1e-9) / FACTOR, 8) / 2 + 0.5, 0.02), 1.0)
        ratio = (
            f'<span class="ratio"><span class="bar" style="width:{width:.0f}%"></span>'
            f"<span>{number(module.ratio)}</span></span>"
        )
    notes = "; ".join(filter(None, (module.where, *module.notes)))
    return (
        f'<span class="module {colour}" title="{escape(meaning)}"><span class="mark">{mark}</span>'
        f"<code>{escape(name)}</code> <small>{escape(kind)}</small>{ratio}"
        f"{f' <small>{escape(notes)}</small>' if notes else ''}</span>"
    )


def _histograms(report: Result) -> str:
    rows = [(row, row.histogram) for _, row in report.rows() if row.histogram is not None]
    if not rows:
        return ""
    rows.sort(key=lambda pair: pair[0].path != report.culprit)
    names = _names(report)
    figures = [
        f"<figure>{histogram_chart(histogram, names)}<figcaption>{escape(row.name)} "
        f"<small>{_shape(row)}</small></figcaption></figure>"
        for row, histogram in rows[:MAX_HISTOGRAMS]
    ]
    more = f"<p>{len(rows) - MAX_HISTOGRAMS} further tensors differ.</p>" if len(rows) > MAX_HISTOGRAMS else ""
    return (
        "<section><h2>Values of the tensors that differ</h2><p>How many values each side has in "
        "each interval: bars that are as high on both sides can still be other values in other places.</p>"
        f'{legend(names)}<div class="figures">{"".join(figures)}</div>{more}</section>'
    )


def _values(stages: Sequence[Stage]) -> str:
    rows = [(stage, row) for stage in stages for row in stage.rows]
    if not rows:
        return ""
    # the rows over the tolerance stay if the table is cut
    kept = rows
    if len(rows) > MAX_ROWS:
        ranked = sorted(range(len(rows)), key=lambda i: (rows[i][1].passed, -rows[i][1].ratio))[:MAX_ROWS]
        kept = [rows[i] for i in sorted(ranked)]
    lines = []
    for stage, row in kept:
        colour, mark, meaning = _STATUS.get(row.status, _STATUS[NOT_RUN])
        own = "" if row.own_ratio is None else number(row.own_ratio)
        figures = [number(row.ratio), own, scientific(row.error), scientific(row.noise), scientific(row.scale)]
        if stage.name == "structure":  # names and shapes have none
            figures = [""] * len(figures)
        note = "; ".join(filter(None, (row.where, row.note)))
        lines.append(
            f'<tr class="{colour}"><td title="{escape(meaning)}"><span class="mark">{mark}</span></td>'
            f"<td>{escape(stage.name)}</td><td><code>{escape(row.name)}</code></td><td>{_shape(row)}</td>"
            f"{''.join(f'<td>{figure}</td>' for figure in figures)}<td>{escape(note)}</td></tr>"
        )
    cut = f"<p>The {MAX_ROWS} rows with the largest ratios of {len(rows)}.</p>" if len(rows) > MAX_ROWS else ""
    heads = ("", "stage", "value", "shape", "ratio", "replay", "error", "noise", "size", "remark")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f'<section><details class="values"><summary><h2>All {len(rows)} values</h2></summary><p><b>ratio</b>: '
        f"the error in units of the noise, up to {FACTOR:g} is rounding. <b>replay</b>: the same when the module is "
        "called with the inputs of the reference. <b>error</b>, <b>noise</b>, <b>size</b>: root mean square of the "
        "error of a, of the error of b, and of the value. Open this table before printing to print it as well.</p>"
        f'{cut}<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></details></section>"
    )


def _repeat(report: Result) -> str:
    """Returns how to repeat the comparison: inputs, seed, command, environment, remarks."""
    facts = [(f"input {name}", text) for name, text in report.inputs.items()]
    if report.draws > 1:
        facts.append(("draws", str(report.draws)))
    facts.append(("seed", str(report.seed)))
    if report.replay:
        facts.append(("smallest input", report.replay))
    command = f"<pre>{escape(report.command)}</pre>" if report.command else ""
    environment = ""
    if report.environment:
        names = list(dict.fromkeys(name for values in report.environment.values() for name in values))
        head = "".join(f"<th>{escape(role)}</th>" for role in report.environment)
        body = "".join(
            f"<tr><th>{escape(name)}</th>"
            + "".join(f"<td>{escape(str(values.get(name, '')))}</td>" for values in report.environment.values())
            + "</tr>"
            for name in names
        )
        environment = (
            f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    remarks = f"<h2>Remarks</h2><ul>{notes}</ul>" if notes else ""
    return f"<section>{remarks}<h2>To repeat it</h2>{command}{_definitions(facts)}{environment}</section>"


# ---- parts of a page ----------------------------------------------------------------------------------------


def _definitions(facts: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts) + "</dl>"


def _shape(row: Row) -> str:
    return f"[{', '.join(map(str, row.shape))}]" if row.shape else ""
