"""Several trainings of each remedy: losses with their spread, and the search of learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from kerasgrad.plots.style import (
    COLORS,
    draw_line,
    legend,
    mark_non_finite,
    mark_zeros,
    new_axes,
    off_scale_note,
    on_log_scale,
    styles,
)


def plot_median_losses(
    losses: Mapping[str, tuple[np.ndarray, np.ndarray]],
    constant_loss: float,
    ax: Axes | None = None,
) -> Axes:
    """The test loss of each remedy by optimizer step: median over the seeds, and their range.

    Args:
        losses: {name: (steps, losses)}, (n,) and (seeds, n); NaN or Inf from where a run diverged,
            and such a run is above all others.
        constant_loss: of the best constant answer, drawn as a horizontal line.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes: a line and a band from the smallest to the largest loss for each name. Where the
        median is no number, it is a cross at the upper edge.

    Example:

    >>> import numpy as np
    >>> from kerasgrad import plots
    >>> losses = np.array([[1.0, 0.5], [0.8, 0.1], [0.9, np.inf]])
    >>> ax = plots.plot_median_losses({"relu": (np.array([10, 20]), losses)}, constant_loss=0.2)
    >>> ax.lines[0].get_ydata().tolist()
    [0.9, 0.5]
    """
    ax = ax or new_axes(figsize=(8, 5))
    shown = [*(on_log_scale(runs).ravel() for _, runs in losses.values()), [constant_loss]]
    bottom, top = _limits(np.concatenate(shown), 2)
    for style, (name, (steps, runs)) in zip(styles(), losses.items(), strict=False):
        runs = np.where(np.isnan(runs), np.inf, runs)
        middle, low, high = np.median(runs, axis=0), runs.min(axis=0), runs.max(axis=0)
        draw_line(ax, steps, on_log_scale(middle), lw=1.4, label=name, **style)
        # Out of the axes where a run diverged, or reached 0.
        ax.fill_between(
            steps,
            np.clip(low, bottom / 10, top * 10),
            np.clip(high, bottom / 10, top * 10),
            where=np.isfinite(low),
            **{"color": style["color"], "alpha": 0.15, "lw": 0},
        )
        mark_non_finite(ax, steps, middle, color=style["color"], label=None)
        mark_zeros(ax, steps, middle, color=style["color"], label=None)
    ax.axhline(
        constant_loss, color="grey", lw=0.8, zorder=0, label=f"constant answer, {constant_loss:.3g}"
    )
    # One remedy that explodes would flatten all others.
    ax.set_ylim(bottom, min(top, 1e3 * constant_loss))
    ax.set_yscale("log")
    ax.set(xlabel="optimizer step", ylabel="test loss, median over the seeds")
    legend(ax, loc="upper right", title="band: all seeds, ×: NaN or Inf")
    return ax


def plot_final_losses(
    losses: Mapping[str, Sequence[float]],
    intervals: Mapping[str, tuple[float, float]],
    constant_loss: float,
    ax: Axes | None = None,
) -> Axes:
    """The final test loss of each run, and of each remedy the median with its interval.

    Args:
        losses: {name: one a run}, NaN or Inf for a run that diverged.
        intervals: {name: (low, high)} of the median; NaN for none.
        constant_loss: of the best constant answer, drawn as a vertical line.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes, the first name on top: a dot a run, a bar and a thick mark a remedy. A run that
        diverged is a cross at the right edge, and counted in the name.

    Example:

    >>> from kerasgrad import plots
    >>> runs, interval = {"relu": [0.1, 0.2, float("inf")]}, {"relu": (0.1, float("inf"))}
    >>> ax = plots.plot_final_losses(runs, interval, constant_loss=0.2)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['relu (NaN or Inf at 1 of 3 runs)']
    """
    ax = ax or new_axes(figsize=(8, 1.2 + 0.45 * len(losses)))
    names = []
    shown = [*(on_log_scale(np.array(runs, float)) for runs in losses.values()), [constant_loss]]
    left, right = _limits(np.concatenate(shown), 3)
    for row, (name, runs) in enumerate(losses.items()):
        runs = np.where(np.isfinite(runs), runs, np.inf)
        interval = np.clip(intervals.get(name, (np.nan, np.nan)), left, right)
        ax.plot(interval, [row, row], color=COLORS[0], lw=5, alpha=0.35, solid_capstyle="butt")
        # A log scale has no place for either, but at its edges.
        diverged, zeros = np.isinf(runs).sum(), (runs == 0).sum()
        drawn = runs[np.isfinite(runs) & (runs > 0)]
        ax.plot(drawn, np.full(len(drawn), row), "o", color=COLORS[0], ms=4)
        ax.plot(np.full(diverged, right), np.full(diverged, row), "x", color=COLORS[1])
        ax.plot(np.full(zeros, left), np.full(zeros, row), "<", color=COLORS[0])
        if len(runs) and 0 < np.median(runs) < np.inf:
            ax.plot([np.median(runs)], [row], "|", color="black", ms=14, mew=2)
        names.append(name + off_scale_note(zeros, diverged, len(runs), "runs"))
    ax.axvline(constant_loss, color="grey", lw=0.8, zorder=0)
    ax.set_xlim(left / 1.2, right * 1.2)
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set(xlabel="test loss at the end: runs, median and its 95 % interval; grey: constant answer")
    return ax


def plot_learning_rates(
    losses: Mapping[str, Mapping[float, Sequence[float]]],
    chosen: Mapping[str, float],
    ax: Axes | None = None,
) -> Axes:
    """The validation loss at the end by learning rate: what each remedy's choice was made by.

    Args:
        losses: {name: {learning rate: one a run}}, Inf for a run that diverged or failed.
        chosen: {name: learning rate}.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes: a line for each name through the medians over the seeds, a ring around the one
        that was chosen; medians that are no number are crosses at the upper edge.

    Example:

    >>> from kerasgrad import plots
    >>> losses = {"relu": {0.01: [0.2, 0.3, 0.25], 0.1: [0.1, 0.1, 0.3]}}
    >>> ax = plots.plot_learning_rates(losses, {"relu": 0.1})
    >>> ax.lines[0].get_ydata().tolist()
    [0.25, 0.1]
    """
    ax = ax or new_axes(figsize=(8, 5))
    rates = np.array(sorted({rate for by_rate in losses.values() for rate in by_rate}))
    medians = [np.median(runs) for by_rate in losses.values() for runs in by_rate.values()]
    for style, (name, by_rate) in zip(styles(), losses.items(), strict=False):
        tried = np.array(sorted(by_rate))
        found = np.array([np.median(by_rate[rate]) for rate in tried])
        line = on_log_scale(found)
        draw_line(ax, tried, line, marker=".", label=name, **style)
        mark_non_finite(ax, tried, found, color=style["color"], label=None)
        mark_zeros(ax, tried, found, color=style["color"], label=None)
        ring = line[tried == chosen[name]]
        ax.plot([chosen[name]] * len(ring), ring, "o", ms=11, mfc="none", mec=style["color"])
    ax.set_xlim(*_limits(rates, 1.5))
    ax.set_ylim(*_limits(np.array(medians), 2))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="learning rate", ylabel="validation loss at the end, median over the seeds")
    legend(ax, title="ring: chosen, ×: NaN or Inf")
    return ax


def _limits(values, margin):
    """The range of the values that a log scale can show, wider by a factor."""
    shown = values[np.isfinite(values) & (values > 0)]
    low, high = (shown.min(), shown.max()) if len(shown) else (1, 1)
    return low / margin, high * margin
