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
from typing import TYPE_CHECKING

from icenet.core import files
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
from icenet.parity.yardstick import FACTOR

if TYPE_CHECKING:
    from icenet.parity.results.result import Histogram, Module, Report, Row, Stage

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
    "forward": "Outputs of each module, in the run and on the inputs of the reference.",
    "loss": "The loss.",
    "gradients": "Gradients of each parameter and output.",
    "optimizer": "Parameters after updates on equal gradients.",
    "training": "Losses of both sides while they train.",
}


def write(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes the page of a report, in place of an earlier page. Returns its path.

    Raises:
        UsageError: There is a folder, or a file of another kind.
        FileError: The file cannot be written. Nothing is changed then.
    """
    target = files.output_file(files.user_path(path, "to_html"), is_earlier_output=_is_page)
    files.write_text(target, page(report))
    return target


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return _GENERATOR.encode() in file.read(500)


def page(report: Report) -> str:
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
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


# ---- the sections -------------------------------------------------------------------------------------------


def _header(report: Report) -> str:
    a, b = (escape(name or side) for name, side in zip(report.names, "ab", strict=True))
    state = "ok" if report.passed else "bad"
    frameworks = [_framework(report.environment.get(side, {})) for side in ("a", "b")]
    pair = (
        f"<b>a</b> is {a} {frameworks[0]}, under test. <b>b</b> is {b} {frameworks[1]}, the reference. The noise is "
        f"what rounding to {report.dtype} changes in b."
    )
    lines = [
        f'<header class="{state}"><p class="state">{"Agrees" if report.passed else "Differs"}</p>',
        f"<h1>{escape(report.verdict)}</h1></header>",
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
                return i, f"begins before {_short(path)}"
    return begins, f"begins at {_short(row.name)}"


def _culprit(report: Report) -> str:
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


def _charts(report: Report) -> Iterator[str]:
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
            f"<section><h2>Error of the {what} by depth</h2><p>Relative error against the reference in float64, in "
            "the order of the computation. Both lines rise together while both sides only round. Where they part, a "
            f"difference begins.</p>{_line_chart(curves, [row.name for row in rows], begins)}</section>"
        )
    if report.losses and all(report.losses.values()):
        steps = [f"step {i}" for i in range(max(map(len, report.losses.values())))]
        yield f"<section><h2>Training</h2>{_line_chart(list(report.losses.items()), steps, None, False)}</section>"


def _names(report: Report) -> list[str]:
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
    tree = "".join(draw(module) for module in roots if module.path not in shown)
    return f'<section><h2>Modules</h2><p class="legend">{legend}</p><ul class="tree">{tree}</ul></section>'


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


def _histograms(report: Report) -> str:
    rows = [(row, row.histogram) for _, row in report.rows() if row.histogram is not None]
    if not rows:
        return ""
    rows.sort(key=lambda pair: pair[0].path != report.culprit)
    figures = [
        f"<figure>{_histogram_chart(histogram, report)}<figcaption>{escape(row.name)} "
        f"<small>{_shape(row)}</small></figcaption></figure>"
        for row, histogram in rows[:MAX_HISTOGRAMS]
    ]
    more = f"<p>{len(rows) - MAX_HISTOGRAMS} further tensors differ.</p>" if len(rows) > MAX_HISTOGRAMS else ""
    names = _names(report)
    return (
        "<section><h2>Values of the tensors that differ</h2><p>How many values each side has, by size.</p>"
        f'{_legend(names)}<div class="figures">{"".join(figures)}</div>{more}</section>'
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
        note = "; ".join(filter(None, (row.where, row.note)))
        lines.append(
            f'<tr class="{colour}"><td title="{escape(meaning)}"><span class="mark">{mark}</span></td>'
            f"<td>{escape(stage.name)}</td><td><code>{escape(row.name)}</code></td><td>{_shape(row)}</td>"
            f"<td>{number(row.ratio)}</td><td>{own}</td><td>{_scientific(row.error)}</td>"
            f"<td>{_scientific(row.noise)}</td><td>{_scientific(row.scale)}</td><td>{escape(note)}</td></tr>"
        )
    cut = f"<p>The {MAX_ROWS} rows with the largest ratios of {len(rows)}.</p>" if len(rows) > MAX_ROWS else ""
    heads = ("", "stage", "value", "shape", "ratio", "replay", "error", "noise", "size", "remark")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return (
        f"<section><details><summary><h2>All {len(rows)} values</h2></summary><p>replay: the ratio on the inputs of "
        "the reference. error, noise, size: RMS of the error of the side under test, of the reference's own error, "
        f'and of the value.</p>{cut}<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></details></section>"
    )


def _repeat(report: Report) -> str:
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


def _scientific(value: float) -> str:
    if not value:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else number(value)


def _legend(names: Sequence[str]) -> str:
    keys = "".join(f'<span><span class="key s{i}"></span>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{keys}</p>'


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 260, 56, 24, 22


def _line_chart(
    curves: Sequence[tuple[str, Sequence[float]]],
    labels: Sequence[str],
    begins: tuple[int, str] | None,
    logarithmic: bool = True,
) -> str:
    """Returns lines over the same points.

    Args:
        curves: Name and values of each line.
        labels: The name of each point.
        begins: Number and label of the point where the difference begins; None if there is none.
        logarithmic: Whether the vertical axis is. Then zeros are drawn at the bottom.
    """
    finite = [v for _, values in curves for v in values if math.isfinite(v) and (v > 0 or not logarithmic)]
    if not finite:
        return ""
    transform = math.log10 if logarithmic else float
    low, high = transform(min(finite)), transform(max(finite))
    if logarithmic:
        low, high = math.floor(low), math.ceil(high)
    if high <= low:
        low, high = low - 1, high + 1
    columns = max(len(labels) - 1, 1)

    def x(index: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - 8) * index / columns

    def y(value: float) -> float:
        # zeros of a logarithmic axis are at the bottom, infinities at the top
        share = 0.0 if logarithmic and value <= 0 else (transform(value) - low) / (high - low)
        return _TOP + (_HEIGHT - _BOTTOM - _TOP) * (1 - min(max(share, 0.0), 1.0))

    drawn = []
    step = max(1, math.ceil((high - low) / 6)) if logarithmic else (high - low) / 4
    for i in range(math.floor((high - low) / step) + 1):
        at = low + i * step
        height = y(10**at if logarithmic else at)
        text = f"1e{at:.0f}" if logarithmic else f"{at:.3g}"
        drawn.append(f'<path class="grid" d="M{_LEFT} {height:.1f}H{_WIDTH - 8}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{text}</text>')
    drawn.append(f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{escape(_short(labels[0]))}</text>')
    drawn.append(f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 4}" text-anchor="end">{escape(_short(labels[-1]))}</text>')
    if begins is not None:
        at, label = begins
        side = 'text-anchor="end" dx="-6"' if at > columns / 2 else 'dx="6"'
        drawn.append(f'<path class="begins" d="M{x(at):.1f} 4V{_HEIGHT - _BOTTOM}"/>')
        drawn.append(f'<text class="begins" x="{x(at):.1f}" y="15" {side}>{escape(label)}</text>')
    for i, (name, values) in enumerate(curves):
        points = [(x(j), y(value)) for j, value in enumerate(values) if not math.isnan(value)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        drawn.append(f'<polyline class="s{i}" points="{line}"/>')
        if len(values) <= 200:  # further points make the page large and cannot be distinguished
            drawn += [
                f'<circle class="s{i}" cx="{x(j):.1f}" cy="{y(value):.1f}" r="3">'
                f"<title>{escape(labels[j])}\n{escape(name)}: {_scientific(value)}</title></circle>"
                for j, value in enumerate(values)
                if not math.isnan(value)
            ]
    names = [name for name, _ in curves]
    label = escape(f"lines of {', '.join(names)} over {len(labels)} points")
    return (
        f'{_legend(names)}<div class="wide"><svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(drawn)}</svg></div>'
    )


def _short(name: str, limit: int = 44) -> str:
    return name if len(name) <= limit else "…" + name[1 - limit :]


def _histogram_chart(histogram: Histogram, report: Report) -> str:
    bins = len(histogram.a)
    top = max((*histogram.a, *histogram.b, 1))
    full, height = 300, 110
    bottom, bar = height - 16, full / max(bins, 1)
    drawn = []
    for i, (name, counts) in enumerate(zip(_names(report), (histogram.a, histogram.b), strict=True)):
        for j, count in enumerate(counts):
            tall = (bottom - 6) * count / top
            between = f"{histogram.edges[j]:.3g} to {histogram.edges[j + 1]:.3g}"
            x, width = j * bar + i * bar / 2, bar / 2
            drawn.append(
                f'<rect class="s{i}" x="{x:.1f}" y="{bottom - tall:.1f}" width="{width:.1f}" height="{tall:.1f}">'
                f"<title>{escape(name)}: {count} values from {between}</title></rect>"
            )
    drawn.append(f'<path class="grid" d="M0 {bottom}H{full}"/>')
    drawn.append(f'<text x="0" y="{height - 3}">{histogram.edges[0]:.3g}</text>')
    drawn.append(f'<text x="{full}" y="{height - 3}" text-anchor="end">{histogram.edges[-1]:.3g}</text>')
    return f'<svg viewBox="0 0 {full} {height}" role="img" aria-label="histogram">{"".join(drawn)}</svg>'


_SCRIPT = "addEventListener('beforeprint',()=>document.querySelectorAll('details').forEach(d=>d.open=true))"

_STYLE = """
:root{--text:#1c2126;--muted:#5b6670;--back:#fff;--panel:#f4f6f8;--line:#d5dbe1;
--ok:#1a7f4b;--bad:#c0312b;--warn:#96680a;
--s0:#c2410c;--s1:#2563a8;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--text:#e5e9ed;--muted:#9aa5af;--back:#14181c;--panel:#1e242a;--line:#38424c;
--ok:#4cc38a;--bad:#ff7a70;--warn:#e0ae45;--s0:#fb923c;--s1:#6cb2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:1rem}
header{border-left:.5rem solid;padding:.25rem 1rem;background:var(--panel);border-radius:.25rem}
header.ok{border-color:var(--ok)}header.bad{border-color:var(--bad)}
header .state{margin:0;font-weight:700}header.ok .state{color:var(--ok)}header.bad .state{color:var(--bad)}
h1{font-size:1.2rem;margin:.2rem 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:1.5rem 0 .5rem}summary h2{display:inline-block;margin:1rem 0 0}
summary{cursor:pointer}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;overflow-wrap:anywhere}
pre{background:var(--panel);padding:.75rem;overflow-x:auto;border-radius:.25rem;white-space:pre-wrap}
small{color:var(--muted)}
.ok>.mark,.ok .mark{color:var(--ok)}.bad>.mark,.bad .mark{color:var(--bad)}.warn>.mark,.warn .mark{color:var(--warn)}
.none>.mark,.none .mark{color:var(--muted)}
.mark{font-weight:700;display:inline-block;min-width:1.2em}
.culprit{border:1px solid var(--bad);border-radius:.25rem;padding:0 1rem .5rem;margin:1rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.5rem 0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.stages{list-style:none;padding:0;margin:0}
.stages li{display:flex;gap:.25rem;padding:.3rem 0;border-top:1px solid var(--line)}
.tree,.tree ul{list-style:none;padding-left:1.1rem;margin:0}.tree{padding-left:0}
.tree ul{border-left:1px solid var(--line);margin-left:.35rem}
.tree li{padding:.1rem 0}.tree summary{list-style-position:outside;margin-left:1rem}.tree li>.module{margin-left:1rem}
.module.bad code{color:var(--bad);font-weight:700}
.ratio{display:inline-block;position:relative;width:6rem;background:var(--panel);border-radius:.2rem;
margin-left:.5rem;padding:0 .3rem;font-size:.8em;vertical-align:middle}
.ratio .bar{position:absolute;inset:0 auto 0 0;background:var(--line);border-radius:.2rem}
.bad .ratio .bar{background:var(--bad);opacity:.5}.ratio span:last-child{position:relative}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;width:100%}th,td{text-align:left;padding:.2rem .5rem;
border-top:1px solid var(--line);vertical-align:top}thead th{border-top:0;color:var(--muted);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.85rem;color:var(--muted)}
.key{display:inline-block;width:1.4em;height:.5em;margin-right:.4em;border-radius:.2em}
.key.s0{background:var(--s0)}.key.s1{background:var(--s1)}.key.s2{background:var(--muted)}
svg{width:100%;height:auto;display:block}svg.chart{min-width:32rem}
svg text{fill:var(--muted);font-size:12px}svg .grid{stroke:var(--line);fill:none}
polyline{fill:none;stroke-width:2}polyline.s0{stroke:var(--s0)}polyline.s1{stroke:var(--s1);stroke-dasharray:6 3}
polyline.s2{stroke:var(--muted);stroke-dasharray:2 3}
circle.s0,rect.s0{fill:var(--s0)}circle.s1,rect.s1{fill:var(--s1)}circle.s2{fill:var(--muted)}
svg path.begins{stroke:var(--bad);stroke-dasharray:3 3}svg text.begins{fill:var(--bad);font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem}figure{margin:0;max-width:25rem}
figcaption{font-size:.85rem;overflow-wrap:anywhere}
@media print{body{font-size:11px}main{max-width:none;padding:0}.wide{overflow:visible}svg.chart{min-width:0}
section,figure,tr{break-inside:avoid}section:has(table),section:has(.tree){break-inside:auto}
details::details-content{content-visibility:visible;display:block}}
"""
