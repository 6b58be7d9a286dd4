"""The page parity.html, which shows the comparison of a port."""

from __future__ import annotations

import html

from icenet.parity.ports.report import PortReport

_STYLE = (
    "body{font:16px system-ui;margin:2em auto;max-width:60em;padding:0 1em}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ccc}"
)
_EXPLANATION = (
    "Each row compares the port with the original. The difference is the largest one, relative to the largest value. "
    "The ratio is the error of the port against the original in float64, in units of the error that the original "
    "itself has in its dtype; up to 8 passes. The layers are those of mlx.nn, as in model.py, or IceNet's, as in "
    "port.module."
)


def html_page(class_name: str, report: PortReport) -> str:
    """Returns a comparison as a self-contained HTML page.

    Args:
        class_name: The class of the port.
        report: The comparison.
    """
    title, first = html.escape(class_name), html.escape(str(report).splitlines()[0])
    rows = "".join(
        f"<tr><td>{html.escape(check.mode)}</td><td>{html.escape(check.what)}</td><td>{html.escape(check.sizes)}</td>"
        f"<td>{check.ratio:.2g}</td><td>{check.difference:.1e}</td><td>{check.layers}</td>"
        f"<td>{html.escape(check.name)}</td></tr>"
        for check in report.checks
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}: parity</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{first}</p><p>{_EXPLANATION}</p>"
        "<table><tr><th>mode<th>compared<th>sizes<th>ratio<th>difference<th>layers<th>largest at</tr>"
        f"{rows}</table><ul>{notes}</ul></html>\n"
    )
