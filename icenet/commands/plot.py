"""`icenet plot`: draws loss, learning rate, gradient norm and throughput of one or several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from icenet.commands.plot_runs import Curve, Run, read
from icenet.core.errors import IceNetError, UsageError
from icenet.core.report import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# the palette of Okabe and Ito without its yellow, which is pale on white; repeated with dashes
COLOURS = (canvas.BLUE, canvas.ORANGE, canvas.GREEN, canvas.PURPLE, "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_POINTS = 3000
"""Maximum number of points of a curve; more cannot be distinguished."""


def plot(
    paths: Sequence[Path],
    out: Path | None = None,
    smooth: int | None = None,
    x: str = "step",
    overwrite: bool = False,
) -> Path:
    """Draws the metrics of runs in one picture and returns its path.

    Args:
        paths: Folders of runs, finished or not.
        out: The picture, PNG, PDF or SVG by its name. Default: plot.png, in the run's folder if there is one run.
        smooth: Window of the moving average in steps. Default: a fortieth of the run. 1: no average.
        x: Unit of the x axis: `step`, `tokens` (or images), or `time` spent in training steps.
        overwrite: Whether to replace a file that is not a picture of IceNet.

    Raises:
        IceNetError: A run has no metrics, matplotlib is not installed, or the picture cannot be written.
    """
    if out is not None:
        out = canvas.output_file(out, overwrite)
    runs = read(paths)
    if out is None:  # the plot.png in the folder of a run belongs to the run
        is_run = len(runs) == 1
        out = runs[0].folder / "plot.png" if is_run else canvas.output_file(Path("plot.png"), overwrite)
    if not canvas.available():
        raise IceNetError("icenet plot needs matplotlib: pip install 'icenet[plot]'")
    units = {run.unit for run in runs}
    if x == "tokens" and len(units) > 1:
        raise UsageError(
            "--x tokens: some of these runs are trained on tokens and some on images; use --x step or --x time"
        )
    scale, label = _axis(runs, x)
    title = _caption(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"
    same = _equal_curves(runs)
    heights, height = [3.6, *[1.6] * bool(same), 1.1, 1.1, 1.1], 11.3 if same else 9.4
    # the blank subtitle leaves space for the name of the first panel
    figure, panels = canvas.new_figure((9, height), heights, title, " ", right=0.75, space=0.32)
    if same:
        _draw_differences(panels.pop(1), runs, same, scale[0])
    rates, norms, speeds = ([run.curve(key) for run in runs] for key in ("learning_rate", "grad_norm", "speed"))
    for index, run in enumerate(runs):
        look, at = _look(index), scale[index]
        # a wider line stays visible under equal ones
        group = same.get(index, index)
        extra = 2.6 * min(sum(1 for later, first in same.items() if first == group and later > index), 4)
        _draw(panels[0], run.curve("loss"), look, at, smooth, width=1.8 + extra)
        _draw(panels[1], rates[index], look, at, 1, width=1.8 + extra)
        _draw(panels[2], norms[index], look, at, smooth, width=1.8 + extra)
        _draw(panels[3], speeds[index], look, at, smooth, run.changes)
        _mark(panels[0], run, look, at, smooth, index, size=5 + extra)
    _finish_loss(panels[0], runs, smooth)
    _finish(panels[1], rates, "learning rate", _rates_need_log_axis([values for _, values in rates]), _small)
    _finish(panels[2], norms, "gradient norm", _wide([values for _, values in norms], 0.05, 0.99, 20), _small)
    name = f"{' or '.join(sorted(units, reverse=True))} a second"
    _finish(panels[3], speeds, name, _wide([values for _, values in speeds], 0.5, 0.5, 10), _large)
    _finish_x(panels[-1], label)
    return canvas.save(figure, out)


def _look(index: int) -> dict[str, Any]:
    """Returns the line style of a run."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def _caption(run: Run) -> str:
    """Returns the name of a run and the backends that trained it."""
    names = [backend for _, backend in run.backends]
    used = " → ".join(names if len(names) <= 4 else [*names[:2], "…", names[-1]])
    return f"{run.name}  ({used})" if used else run.name


def _small(value: float, _: Any = None) -> str:
    """Formats a small number: 0.05, 5e-4."""
    text = f"{value:g}" if value == 0 or abs(value) >= 0.01 else f"{value:.3e}"
    mantissa, _, exponent = text.partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if exponent else text


def _large(value: float, _: Any = None) -> str:
    """Formats a large number: 950, 20k, 1.5M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


# ---- the x axis -------------------------------------------------------------------------------------------

Scale = Callable[[NDArray[Any]], NDArray[Any]]


def _axis(runs: Sequence[Run], x: str) -> tuple[list[Scale], str]:
    """Returns, for each run, the function from step to x coordinate, and the label of the axis."""
    if x == "step":
        return [lambda steps: steps] * len(runs), "step"
    if x == "tokens":
        sizes = [run.items_per_step() for run in runs]
        return [lambda steps, size=size: steps * size for size in sizes], runs[0].unit  # type: ignore[misc]
    clocks = [run.seconds() for run in runs]
    without = [run.name for run, (steps, _) in zip(runs, clocks, strict=True) if not len(steps)]
    if without:
        raise IceNetError(f"{without[0]}: its metrics contain no throughput, so the time is unknown; use --x step")
    longest = max(float(clock[1][-1]) for clock in clocks)
    unit, size = ("h", 3600.0) if longest >= 10800 else ("min", 60.0) if longest >= 180 else ("s", 1.0)
    return [
        lambda at, steps=steps, clock=clock: np.interp(at, steps, clock / size)  # type: ignore[misc]
        for steps, clock in clocks
    ], f"time in training steps ({unit})"


def _finish_x(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    if label != "step":
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(8))
        axes.xaxis.set_major_formatter(_large)


# ---- the panels -------------------------------------------------------------------------------------------


def _draw(
    axes: Axes,
    curve: Curve,
    look: dict[str, Any],
    at: Scale,
    smooth: int | None,
    breaks: Sequence[float] = (),
    width: float = 1.8,
) -> None:
    """Draws a curve as a thin line and its moving average, which does not cross `breaks`, as a thick one."""
    steps, values = curve
    if not len(steps):
        return
    thin = slice(None, None, max(1, len(steps) // _POINTS))
    places = at(steps)
    if smooth != 1:
        axes.plot(places[thin], values[thin], color=look["color"], alpha=0.22, linewidth=0.7)
    window = max(len(values) // 40, 1) if smooth is None else smooth
    parts = np.split(values, np.searchsorted(steps, breaks))
    mean = np.concatenate([canvas.smoothed(part, window) for part in parts if len(part)])
    marker = "o" if len(steps) == 1 else None
    axes.plot(places[thin], mean[thin], **look, linewidth=width, marker=marker, markersize=4)


def _mark(
    axes: Axes, run: Run, look: dict[str, Any], at: Scale, smooth: int | None, index: int, size: float = 5
) -> None:
    """Draws the evaluations of a run and its changes of backend."""
    from matplotlib.patheffects import withStroke

    white: dict[str, Any] = {"linestyle": "none", "color": look["color"], "markeredgecolor": "white"}
    steps, values = run.curve("validation_loss")
    if len(steps):
        few = slice(None, None, max(1, len(steps) // 100))
        axes.plot(at(steps)[few], values[few], marker="o", markersize=size, zorder=3, **white)
    steps, values = run.curve("loss")
    mean = canvas.smoothed(values, smooth)
    for step, backend in run.backends[1:13] if len(steps) else []:
        place, height = float(at(np.array([step]))[0]), float(np.interp(step, steps, mean))
        axes.plot([place], [height], marker="D", markersize=7, zorder=4, **white)
        axes.annotate(
            canvas.literal(backend, 20),
            (place, height),
            xytext=(0, 10 + 11 * (index % 3)),
            textcoords="offset points",
            ha="center",
            color=look["color"],
            fontsize=9.5,
            zorder=5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _finish_loss(axes: Axes, runs: Sequence[Run], smooth: int | None) -> None:
    """Sets the limits and the legend of the loss panel, and labels the last value of each run."""
    from matplotlib.lines import Line2D

    mean = "mean" if smooth is None else f"mean of {smooth} steps"
    what = ["line: each step"] if smooth == 1 else ["thin: each step", f"thick: {mean}"]
    curves = [canvas.smoothed(run.curve("loss")[1], smooth) for run in runs]
    evaluations = np.concatenate([run.curve("validation_loss")[1] for run in runs])
    what += ["points: validation"] if len(evaluations) else []
    what += ["diamonds: change of backend"] if any(run.changes for run in runs) else []
    shown = np.concatenate([*curves, evaluations])
    raw = np.concatenate([shown, *(run.curve("loss")[1] for run in runs)])
    _name(axes, "loss (nats)")
    if not len(shown):
        axes.text(0.5, 0.5, "no finite loss yet", transform=axes.transAxes, ha="center", color=canvas.GREY)
        axes.set_yticks([])
        return
    axes.set_title(",  ".join(what), loc="right", fontsize=9, color=canvas.GREY)
    if _wide([shown], 0.0, 1.0, 20):
        _logarithmic(axes, raw, _small)
    else:
        canvas.set_limits(axes, raw, shown)
    # the loss of the last step, which the command prints, at the end of the thick line
    last = [run.curve("loss")[1][-1:] for run in runs]
    ends = [
        (float(curve[-1]), f"{last[index][0]:.4f}", _look(index)["color"])
        for index, curve in enumerate(curves)
        if len(curve)
    ]
    if 0 < len(ends) <= 6:
        canvas.end_labels(axes, ends, 0.055)
    if len(runs) > 1:
        lines = [(Line2D([], [], **_look(index), linewidth=2), _caption(run)) for index, run in enumerate(runs)]
        canvas.add_legend(
            axes,
            lines,
            loc="upper right",
            framealpha=0.85,
            edgecolor="none",
            labelcolor=canvas.INK,
            fontsize=10.5 if len(runs) <= 8 else 8.5,
            ncols=1 + len(runs) // 11,
            handlelength=2.2,
        )


def _differences(first: Run, run: Run) -> Curve:
    """Returns the steps that two runs have in common, and the absolute differences of their losses."""
    (steps, values), (others, theirs) = first.curve("loss"), run.curve("loss")
    common, here, there = np.intersect1d(steps, others, return_indices=True)
    return common, np.abs(values[here] - theirs[there])


def _equal_curves(runs: Sequence[Run]) -> dict[int, int]:
    """Returns, for each run whose loss covers that of earlier ones in the picture, the index of the first of them."""
    found: dict[int, int] = {}
    for index, run in enumerate(runs):
        for earlier in range(index):
            _, difference = _differences(runs[earlier], run)
            visible = 0.01 * float(np.ptp(run.curve("loss")[1])) if len(difference) else 0.0
            if len(difference) and float(np.median(difference)) <= visible:
                found[index] = earlier
                break
    return found


def _draw_differences(axes: Axes, runs: Sequence[Run], same: dict[int, int], at: Scale) -> None:
    """Draws the differences between the losses of runs that are `same`, on a logarithmic axis.

    Zeros are marks at the lower edge.
    """
    found = {index: _differences(runs[earlier], runs[index]) for index, earlier in same.items()}
    everything = np.concatenate([values for _, values in found.values()])
    positive = everything[everything > 0]
    first, last = next((runs[earlier].name, runs[index].name) for index, earlier in same.items())
    names = f"|{canvas.literal(first, 40)} − {canvas.literal(last, 40)}|"
    what = [names if len(same) == 1 else "from the first run of the same loss"]
    _name(axes, "difference of the losses (nats)")
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1e-9, 1e-7)
    floor = 10 ** np.floor(np.log10(low) - 0.3)
    for index, (steps, values) in found.items():
        thin = slice(None, None, max(1, len(steps) // _POINTS))
        place, shown = at(steps)[thin], values[thin]
        look: dict[str, Any] = {"linestyle": "none", "color": _look(index)["color"], "clip_on": False}
        axes.plot(place[shown > 0], shown[shown > 0], "o", markersize=2.5, markeredgewidth=0, **look)
        axes.plot(place[shown == 0], np.full(int((shown == 0).sum()), floor), "|", markersize=8, **look)
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(floor, 10 ** np.ceil(np.log10(high) + 0.1))
    axes.yaxis.set_major_locator(LogLocator(10, numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_small)
    if (everything == 0).any():
        what.append("marks at the lower edge: exactly zero" if len(positive) else "exactly zero in every step")
    axes.set_title(",  ".join(what), loc="right", fontsize=9, color=canvas.GREY)
    if not len(positive):
        axes.set_yticks([])


def _name(axes: Axes, name: str) -> None:
    axes.set_title(name, loc="left", fontsize=11, color=canvas.INK)


def _finish(axes: Axes, curves: Sequence[Curve], name: str, log: bool, words: Callable[..., str]) -> None:
    """Sets the limits and labels of a small panel."""
    everything = np.concatenate([values for _, values in curves])
    _name(axes, name)
    if not len(everything):
        axes.text(0.5, 0.45, "not recorded", transform=axes.transAxes, ha="center", color=canvas.GREY)
        axes.set_yticks([])
        return
    if log:
        _logarithmic(axes, everything, words)
        return
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(0, 1.15 * canvas.robust_top(everything) or 1)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(words)


def _logarithmic(axes: Axes, values: NDArray[Any], words: Callable[..., str]) -> None:
    """Sets a logarithmic y axis for nearly all positive values."""
    from matplotlib.ticker import LogLocator, NullLocator

    positive = values[values > 0]
    low, high = float(np.quantile(positive, 0.001)), float(positive.max())
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * 1.3)
    few = high < 30 * low  # less than two powers of ten: also ticks at 2 and 5
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(words)


def _wide(curves: Sequence[NDArray[Any]], low: float, high: float, times: float) -> bool:
    """Returns whether the ratio of a high and a low quantile of the curves is too large for a linear axis."""
    lows = [float(np.quantile(curve, low)) for curve in curves if len(curve)]
    highs = [float(np.quantile(curve, high)) for curve in curves if len(curve)]
    return bool(lows) and min(lows) > 0 and max(highs) > times * min(lows)


def _rates_need_log_axis(curves: Sequence[NDArray[Any]]) -> bool:
    """Returns whether peaks differ tenfold, or a rate falls to less than 1/30 before the last quarter."""
    falls = [curve[curve.argmax() :] for curve in curves if len(curve) and curve.max() > 0]
    peaks = [np.array([fall[0]]) for fall in falls]
    return _wide(peaks, 0, 1, 10) or any(_wide([fall], 0.25, 1, 30) for fall in falls)
