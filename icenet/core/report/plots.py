"""Plots of the metrics of a run and of a comparison of backends (`pip install 'icenet[plot]'`).

Each function returns the path of the file, or None if matplotlib is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from icenet.core.report.canvas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE_BLUE,
    PURPLE,
    add_legend,
    available,
    end_labels,
    literal,
    mark_backends,
    new_figure,
    robust_top,
    save,
    series,
    set_limits,
    smoothed,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RAW_POINTS = 4000
_GAP, _ALLOWED = "|MLX − PyTorch|", "allowed: 8 × |PyTorch fp32 − fp64|"
"""Names in the legend of `plot_parity`."""


def plot_metrics(metrics: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> Path | None:
    """Draws the loss of a run, and below it the learning rate and the gradient norm.

    Args:
        metrics: Records as in metrics.jsonl: `step` with `loss`, `learning_rate`, `grad_norm`, `backend`, or
            with `validation_loss`. Missing and non-finite values are not drawn.
        path: Path of the file.
        title: Text above the panels.

    Returns:
        The path, or None if matplotlib is not installed.

    Raises:
        IceNetError: The file cannot be written.
    """
    if not available():
        return None
    steps, loss = series(metrics, "loss")
    eval_steps, eval_loss = series(metrics, "validation_loss")
    small = [
        (name, *found, colour)
        for name, key, colour in (
            ("learning rate", "learning_rate", GREEN),
            ("gradient norm", "grad_norm", PURPLE),
        )
        if len((found := series(metrics, key))[0])
    ]
    figure, panels = new_figure((9, 4.6 + 1.1 * len(small)), [4.2, *[1] * len(small)], title, right=1.25)
    axes = panels[0]
    smooth = smoothed(loss)
    ends = []
    if len(loss):
        thin = slice(None, None, max(1, len(loss) // _RAW_POINTS))
        axes.plot(steps[thin], loss[thin], color=BLUE, alpha=0.28, linewidth=0.8)
        axes.plot(steps, smooth, color=BLUE, linewidth=2, marker="o" if len(loss) == 1 else None)
        ends.append((float(smooth[-1]), f"train\n{loss[-1]:.4f}", BLUE))  # the loss that the command prints
    if len(eval_loss):
        axes.plot(eval_steps, eval_loss, color=ORANGE, linewidth=1, alpha=0.5)
        axes.plot(eval_steps, eval_loss, "o", color=ORANGE, markersize=5.5, markeredgecolor="white")
        ends.append((float(eval_loss[-1]), f"validation\n{eval_loss[-1]:.4f}", ORANGE))
    if ends:
        set_limits(axes, np.concatenate([loss, eval_loss]), np.concatenate([smooth, eval_loss]))
        end_labels(axes, ends)
    else:
        axes.text(0.5, 0.5, "no finite loss yet", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_ylabel("loss (nats)")
    mark_backends(axes, metrics)
    for panel, (name, at, values, colour) in zip(panels[1:], small, strict=True):
        panel.plot(at, values, color=colour, linewidth=1.4)
        panel.text(1, 0.5, " " + name.replace(" ", "\n "), transform=panel.transAxes, va="center", color=colour)
        panel.set_ylim(0, 1.15 * robust_top(values) or 1)
        panel.locator_params(axis="y", nbins=3)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("e-0", "e-"))
    panels[-1].set_xlabel("step")
    return save(figure, path)


def plot_parity(
    path: str | Path,
    *,
    steps: Sequence[int],
    curves: Mapping[str, ArrayLike],
    gap: ArrayLike,
    allowed: ArrayLike,
    switch_step: int | None = None,
    switch_label: str = "the checkpoint changes backend",
    title: str = "One run, two backends",
    passed: bool | None = None,
) -> Path | None:
    """Draws loss curves that should coincide, and below them their distance and the allowed distance.

    Args:
        path: Path of the file.
        steps: The steps of the longest curve.
        curves: Loss (nats) per step, by name, the reference first. Shorter curves, and a shorter `gap` and
            `allowed`, are those of the last steps. NaN is not drawn.
        gap: |first curve - second curve| per step. Exact zeros are drawn at the lower edge. NaN after the
            first number counts as infinite.
        allowed: Largest allowed gap per step: 8 x |PyTorch fp32 - PyTorch fp64|.
        switch_step: Last step before the change of backend.
        switch_label: Text next to its line.
        title: Text above the panels; the verdict is below it.
        passed: The verdict. Default: whether every gap is at most `allowed`.

    Returns:
        The path, or None if matplotlib is not installed.

    Raises:
        IceNetError: The file cannot be written.
        ValueError: A curve is longer than `steps`.
    """
    if not available():
        return None
    at = np.asarray(steps, np.float64)
    gaps, limits = _aligned(gap, len(at), "gap"), _aligned(allowed, len(at), "allowed")
    verdict, passed = _verdict(at, gaps, limits, passed)
    figure, (above, below) = new_figure((9, 6.6), [3, 2], title, verdict, GREEN if passed else ORANGE, space=0.24)

    _draw_curves(above, at, curves)
    _draw_gap(below, at, gaps, limits)
    below.set_xlabel("step")
    figure.align_ylabels([above, below])
    if switch_step is not None:
        for axes in (above, below):
            axes.axvline(switch_step, color=INK, linewidth=1, dashes=(2, 2))
        # left of the line, where the falling curve leaves space, except near the start
        early = len(at) > 0 and switch_step < at[0] + 0.35 * (at[-1] - at[0])
        above.annotate(
            literal(switch_label),
            (switch_step, 0.7),
            xycoords=("data", "axes fraction"),
            xytext=(6 if early else -6, 0),
            textcoords="offset points",
            ha="left" if early else "right",
            color=INK,
            fontsize=10.5,
        )
    return save(figure, path)


def _draw_curves(axes: Axes, at: NDArray[Any], curves: Mapping[str, ArrayLike]) -> None:
    """Draws the upper panel: the loss curves."""
    ends, entries = [], []
    # a thick pale line under a thin dashed one: both are visible if the curves coincide
    looks: list[dict[str, Any]] = [
        {"color": PALE_BLUE, "linewidth": 5, "solid_joinstyle": "round"},
        {"color": ORANGE, "linewidth": 1.5, "dashes": (4, 2)},
        {"color": INK, "linewidth": 1.2, "dashes": (1, 2)},
    ]
    for index, (name, values) in enumerate(curves.items()):
        look = looks[min(index, len(looks) - 1)]
        curve = _aligned(values, len(at), name)
        seen = np.isfinite(curve)
        entries.append((axes.plot(at[seen], curve[seen], **look)[0], name))
        ends.append(curve[seen])
    everything = np.concatenate(ends) if ends else np.zeros(0)
    if len(everything):
        set_limits(axes, everything, everything)
    axes.set_ylabel("loss (nats)")
    add_legend(axes, entries, loc="upper right", frameon=False, fontsize=10.5, handlelength=2.6, labelcolor=INK)


def _draw_gap(axes: Axes, at: NDArray[Any], gaps: NDArray[Any], limits: NDArray[Any]) -> None:
    """Draws the lower panel: distances as points on a logarithmic axis, and the allowed region shaded."""
    from matplotlib.ticker import NullLocator

    positive = np.concatenate([gaps, limits])
    positive = positive[np.isfinite(positive) & (positive > 0)]
    floor = 10 ** math.floor(math.log10(positive.min()) - 0.3) if len(positive) else 1e-9
    top = 10 ** math.ceil(math.log10(positive.max()) + 0.1) if len(positive) else 1.0
    entries = []
    known = np.isfinite(limits)
    if known.any():
        edge = np.maximum(limits[known], floor)
        axes.fill_between(at[known], floor, edge, color=GREEN, alpha=0.13, linewidth=0)
        entries.append((axes.plot(at[known], edge, color=GREEN, linewidth=1.2)[0], _ALLOWED))
    over = gaps > np.where(known, limits, np.inf)
    shown = (gaps > 0) & ~over
    points: dict[str, Any] = {"linestyle": "none", "markeredgewidth": 0, "clip_on": False}
    if shown.any():
        entries.append((axes.plot(at[shown], gaps[shown], "o", color=BLUE, markersize=3.5, **points)[0], _GAP))
    if over.any():
        clipped = np.clip(gaps[over], floor, top)
        marks = axes.plot(at[over], clipped, "D", color=ORANGE, markersize=4, **points)
        entries.append((marks[0], f"{_GAP}, above it"))
    if (gaps == 0).any():
        at_floor = np.full(int((gaps == 0).sum()), floor)
        points["markeredgewidth"] = 1
        marks = axes.plot(at[gaps == 0], at_floor, "|", color=BLUE, markersize=9, **points)
        entries.append((marks[0], "exactly zero"))
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(floor, top)
    axes.set_ylabel("distance (nats)")
    add_legend(
        axes,
        entries,
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.99),
        ncols=4,
        frameon=False,
        fontsize=10.5,
        labelcolor=INK,
        handletextpad=0.6,
        columnspacing=1.8,
    )


def _verdict(at: NDArray[Any], gaps: NDArray[Any], limits: NDArray[Any], passed: bool | None) -> tuple[str, bool]:
    """Returns the verdict as text and as a bool. The worst step has the largest ratio of gap to allowed gap."""
    begun = np.cumsum(~np.isnan(gaps)) > 0
    both = begun & ~np.isnan(limits)
    gaps = np.where(np.isnan(gaps), np.inf, gaps)  # NaN in the second curve is a difference
    if not both.any():
        return "no steps to compare", bool(passed)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(gaps[both] > 0, gaps[both] / limits[both], 0.0)
    worst = int(shares.argmax())
    if passed is None:
        passed = bool(shares[worst] <= 1)
    share = shares[worst]
    words = f"at most {share:.2f} of" if share <= 1 else f"up to {share:,.{0 if share >= 10 else 1}f} times"
    largest, step = _short(gaps[both].max()), f"step {at[both][worst]:,.0f}"
    opening = "The same curve" if passed else "The curves differ"
    return f"{opening}: largest distance {largest}, {words} the allowed distance ({step})", passed


def _short(value: float) -> str:
    """Formats a number with two digits: 4.8e-7."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+") if value else "0"


def _aligned(values: ArrayLike, length: int, name: str) -> NDArray[Any]:
    """Returns values of the last steps, padded with NaN at the front."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) > length:
        raise ValueError(f"{name} has shape {array.shape}, and there are {length} steps")
    return np.concatenate([np.full(length - len(array), np.nan), array])
