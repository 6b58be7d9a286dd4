"""Common parts of the plots: colors, panels, smoothing, labels and atomic saving.

The object-oriented interface of matplotlib with the Agg canvas needs no screen and does not use pyplot.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from icenet.core import files
from icenet.core.errors import UsageError
from icenet.core.files import staged
from icenet.core.report.streams import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the palette of Okabe and Ito, distinguishable with every form of color blindness
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
PALE_BLUE = "#9ED0EE"
INK, GREY, FAINT = "#222222", "#6B6B6B", "#E4E4E4"
SUFFIXES = (".png", ".pdf", ".svg")
"""Supported file formats, by file name extension."""
_CREATOR = "IceNet with Matplotlib"
"""Metadata of each picture, by which it is recognized."""


_FALLBACK_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC", "WenQuanYi Zen Hei"),
    *("Noto Sans Arabic", "Noto Sans Devanagari", "Noto Sans Thai"),
    *("Arial Unicode MS", "Apple SD Gothic Neo", "Segoe UI Symbol"),
)
"""Fonts, where they are installed, for characters that matplotlib's own font lacks."""


def literal(text: str, length: int = 70) -> str:
    r"""Returns a text of the user's as matplotlib must get it to draw it as it is: `$` begins no formula.

    Control characters are escaped, and a text longer than `length` is cut in its middle.
    """
    text = printable(text)
    if len(text) > length:
        text = f"{text[: length // 2]}…{text[len(text) - (length - length // 2 - 1) :]}"
    return text.replace("$", r"\$")


def add_legend(axes: Axes, entries: Sequence[tuple[Artist, str]], **options: Any) -> None:
    """Adds a legend of artists and their texts. Matplotlib's own would leave out texts that begin with `_`.

    Args:
        axes: The panel.
        entries: Artist and text of each entry.
        options: Those of `Axes.legend`.
    """
    legend = axes.legend([artist for artist, _ in entries], ["label"] * len(entries), **options)
    for shown, (_, text) in zip(legend.get_texts(), entries, strict=True):
        shown.set_text(literal(text, 60))


def available() -> bool:
    """Imports matplotlib, and returns whether it is installed (`pip install 'icenet[plot]'`).

    A notebook passes MPLBACKEND to the commands that it starts. matplotlib cannot be imported if that names a backend
    of the notebook that is not installed for them. Plots need no backend of a screen, so it is set only if it exists.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure

        if backend:
            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
    except ImportError:
        return False
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return True


def attempt(draw: Callable[[], Path | None]) -> tuple[Path | None, str]:
    """Draws a plot whose failure is no error, because the work that it shows is complete.

    Returns:
        The path and an empty text, or None and the reason why there is no plot.
    """
    try:
        plot = draw()
    except Exception as error:  # matplotlib, its fonts and its settings can raise anything
        return None, " ".join(str(error).split()) or type(error).__name__
    return plot, "" if plot else "matplotlib is not installed; pip install 'icenet[plot]'"


def new_figure(
    size: tuple[float, float],
    heights: list[float],
    title: str,
    subtitle: str = "",
    colour: str = GREY,
    *,
    right: float = 0.35,
    space: float = 0.14,
) -> tuple[Figure, list[Axes]]:
    """Returns a figure of panels with a common x axis, and a title and a subtitle at the upper left.

    Args:
        size: Width and height in inches.
        heights: Relative heights of the panels.
        title, subtitle: Texts above the panels, drawn literally.
        colour: Color of the subtitle.
        right: Margin for labels at the right, in inches.
        space: Space between panels, relative to their height.
    """
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    left = 0.95 / size[0]
    top = 1 - (0.2 + 0.4 * bool(title) + 0.32 * bool(subtitle)) / size[1]
    grid = figure.add_gridspec(
        len(heights),
        1,
        height_ratios=heights,
        hspace=space,
        left=left,
        right=1 - right / size[0],
        top=top,
        bottom=0.65 / size[1],
    )
    panels: list[Axes] = []
    for row in range(len(heights)):
        axes = figure.add_subplot(grid[row], sharex=panels[0] if panels else None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#AAAAAA")
        axes.tick_params(color="#AAAAAA", labelcolor=INK, labelsize=10, labelbottom=row == len(heights) - 1)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.label.set(color=INK, fontsize=11)
        axes.yaxis.label.set(color=INK, fontsize=11)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == round(value) else "")
        axes.margins(x=0.01)
        panels.append(axes)
    if title:
        figure.text(left, 1 - 0.2 / size[1], literal(title, 58), fontsize=15, fontweight="bold", color=INK, va="top")
    if subtitle:
        figure.text(left, 1 - 0.55 / size[1], literal(subtitle, 140), fontsize=11.5, color=colour, va="top")
    return figure, panels


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the steps and finite values of one metric, in order of step."""
    pairs = sorted(
        (float(record["step"]), float(record[key]))
        for record in metrics
        if isinstance(record.get(key), (int, float))
        and isinstance(record.get("step"), (int, float))
        and math.isfinite(record[key])
    )
    table = np.array(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smoothed(values: NDArray[Any], window: int | None = None) -> NDArray[Any]:
    """Returns the moving average over `window` values, by default a fortieth of the curve.

    The window is narrower at the start, and looks mostly backward at the end.
    """
    half = len(values) // 80 if window is None else window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first = np.maximum(index - half, 0)
    ahead = np.clip(index, half // 8, half)
    last = np.minimum(index + ahead, len(values) - 1)
    return np.asarray((total[last + 1] - total[first]) / (last + 1 - first))


def robust_top(values: NDArray[Any]) -> float:
    """Returns the largest value, ignoring a few spikes."""
    return float(min(values.max(), 3 * np.quantile(values, 0.98) + 1e-30))


def set_limits(axes: Axes, raw: NDArray[Any], shown: NDArray[Any]) -> None:
    """Sets y limits for all of `shown` and nearly all of `raw`, so that a spike does not flatten the rest."""
    low, high = float(raw.min()), max(float(shown.max()), float(np.quantile(raw, 0.995)))
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def end_labels(axes: Axes, ends: list[tuple[float, str, str]], apart: float = 0.11) -> None:
    """Writes labels at the right end of curves.

    Args:
        axes: The panel, whose limits and scale are set.
        ends: Last value, text and color of each curve.
        apart: Smallest distance of two labels, as a fraction of the height of the panel.
    """
    to_axes = axes.transScale + axes.transLimits  # also for a logarithmic axis
    ends = sorted(ends)
    targets = [min(max(float(to_axes.transform((1.0, value))[1]), 0.0), 1.0) for value, _, _ in ends]
    places = list(targets)
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + apart)
    moved = (places[-1] - targets[-1]) / 2
    places = [place - moved for place in places]
    for place, (_, text, colour) in zip(places, ends, strict=True):
        axes.annotate(
            text,
            (1.0, place),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=11,
            linespacing=1.1,
            annotation_clip=False,
        )


def mark_backends(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draws a vertical line at each change of backend, with the name of the new one."""
    steps = sorted((r["step"], r["backend"]) for r in metrics if r.get("backend") and r.get("step") is not None)
    changes = [now for before, now in itertools.pairwise(steps) if before[1] != now[1]]
    for step, backend in changes[:12]:
        axes.axvline(step, color=INK, linewidth=0.9, dashes=(2, 2))
        axes.annotate(
            literal(str(backend), 20),
            (step, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            va="top",
            color=INK,
            fontsize=10,
        )


def check_suffix(path: Path) -> None:
    """Checks that a plot can be written in the format of its file name.

    Raises:
        UsageError: The format is not supported.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: the name of a picture ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def output_file(path: Path, overwrite: bool = False) -> Path:
    """Returns the file to write for a picture that the user named. An earlier picture of IceNet may be replaced.

    Raises:
        UsageError: The format is not supported, or `path` is another file and `overwrite` is False.
    """
    check_suffix(path)
    return files.output_file(path, overwrite=overwrite, is_earlier_output=_is_our_picture)


def _is_our_picture(path: Path) -> bool:
    return _CREATOR.encode() in path.read_bytes()


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as PNG, PDF or SVG, by its file name, and returns its path. The file is replaced atomically."""
    from matplotlib import font_manager, rc_context
    from matplotlib.text import Text

    path = Path(path)
    check_suffix(path)
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fallback = [name for name in _FALLBACK_FONTS if name in installed]
    for text in figure.findobj(Text):
        text.set(usetex=False, fontfamily=[*text.get_fontfamily(), *fallback])  # type: ignore[attr-defined]
    # text stays text in a PDF, and equal data give equal files
    options = {"pdf.fonttype": 42, "svg.hashsalt": "icenet"}
    metadata: dict[str, dict[str, str | None]] = {
        ".png": {"Software": _CREATOR},
        ".pdf": {"CreationDate": None, "Creator": _CREATOR},
        ".svg": {"Date": None, "Creator": _CREATOR},
    }
    with warnings.catch_warnings(), rc_context(options), staged(path) as stage, stage.open(path) as file:
        # a character that no installed font has is drawn as a box
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, format=path.suffix[1:].lower(), metadata=metadata.get(path.suffix.lower()))
    return path
