"""The charts of the page: lines over the modules, and histograms, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from icenet.parity.results.result import Histogram
from icenet.parity.results.status import number


def legend(names: Sequence[str]) -> str:
    """Returns the key of the colours of the sides."""
    keys = "".join(f'<span><span class="key s{i}"></span>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{keys}</p>'


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 260, 56, 24, 26


def line_chart(
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
        logarithmic: Whether the vertical axis is logarithmic. Then zeros are drawn at the bottom.
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
    drawn.append(f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{escape(short(labels[0]))}</text>')
    drawn.append(f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 4}" text-anchor="end">{escape(short(labels[-1]))}</text>')
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
                f"<title>{escape(labels[j])}\n{escape(name)}: {scientific(value)}</title></circle>"
                for j, value in enumerate(values)
                if not math.isnan(value)
            ]
    names = [name for name, _ in curves]
    label = escape(f"lines of {', '.join(names)} over {len(labels)} points")
    return (
        f'{legend(names)}<div class="wide"><svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(drawn)}</svg></div>'
    )


def short(name: str, limit: int = 28) -> str:
    """Returns the end of a name that is longer than a label may be."""
    return name if len(name) <= limit else "…" + name[1 - limit :]


def histogram_chart(histogram: Histogram, names: Sequence[str]) -> str:
    """Returns the bars of both sides, whose names are given, next to each other."""
    bins = len(histogram.a)
    top = max((*histogram.a, *histogram.b, 1))
    full, height = 300, 110
    bottom, bar = height - 16, full / max(bins, 1)
    drawn = []
    for i, (name, counts) in enumerate(zip(names, (histogram.a, histogram.b), strict=True)):
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


def scientific(value: float) -> str:
    """Returns a number with two digits and its power of ten."""
    if not value:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else number(value)
