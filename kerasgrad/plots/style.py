"""What every figure shares: new axes, colours, lines with gaps, log scales, marks and legends."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, told apart by colour-blind readers; the line styles tell them in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINESTYLES = ("-", "--", "-.", ":")


def new_axes(**options: object) -> Axes:
    """Axes in a figure of their own: the current ones may hold another figure."""
    return plt.subplots(layout="constrained", **options)[1]


def styles(ax: Axes | None = None) -> Iterator[dict[str, str]]:
    """Colour and line style of each line to come, after those that the axes have already."""
    pairs = ({"color": c, "ls": ls} for c, ls in zip(cycle(COLORS), cycle(LINESTYLES)))
    return islice(pairs, 0 if ax is None else len(ax.lines), None)


def on_log_scale(values: np.ndarray) -> np.ndarray:
    """Values with gaps where a log scale has no place for them."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def draw_line(ax: Axes, x: np.ndarray, y: np.ndarray, **style: object) -> Line2D:
    """A line with gaps where y is NaN, and a dot at each point that has a gap on both sides."""
    finite = np.isfinite(y)
    shown = np.pad(finite, 1)
    alone = np.flatnonzero(shown[1:-1] & ~shown[:-2] & ~shown[2:])
    if len(alone):
        style = {"marker": "o", "ms": 4, "markevery": alone.tolist()} | style
    (line,) = ax.plot(x, y, **style)
    if finite.any():
        # A gap at the beginning or the end can be seen only where the axes reach over it.
        height = y[np.argmax(finite)]
        ax.update_datalim([(x[0], height), (x[-1], height)])
        ax.autoscale_view()
    return line


def off_scale_note(zeros: int, non_finite: int, total: int, what: str) -> str:
    """What to add to a label: " (0 at 3, NaN or Inf at 2 of 100 t)"; "" where all are shown."""
    counts = {"0": int(zeros), "NaN or Inf": int(non_finite)}
    parts = [f"{name} at {count}" for name, count in counts.items() if count]
    return f" ({', '.join(parts)} of {total} {what})" if parts else ""


def mark_non_finite(
    ax: Axes, x: np.ndarray, values: np.ndarray, *, color: str = "black", label: str | None
) -> None:
    """A cross at the upper edge for each NaN or Inf."""
    _mark(ax, x[~np.isfinite(values)], 0.97, "x", color=color, label=label)


def mark_zeros(
    ax: Axes, x: np.ndarray, values: np.ndarray, *, color: str = "black", label: str | None
) -> None:
    """A triangle at the lower edge for each 0, which a log scale has no place for."""
    _mark(ax, x[values == 0], 0.03, "v", color=color, label=label)


def log_scale(ax: Axes) -> None:
    """A log scale for y, or a linear one where a line is below 0."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    if any((y < 0).any() for y in drawn):
        ax.set_yscale("linear")
    # A log axis without one positive value warns at every draw.
    elif any(np.isfinite(on_log_scale(y)).any() for y in drawn):
        ax.set_yscale("log")


def time_axis(ax: Axes, label: str = "time step t of the sequence") -> None:
    """x counts whole time steps."""
    ax.set_xlabel(label)
    whole_numbers(ax.xaxis)


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers only, on a linear axis."""
    if axis.get_scale() == "linear":
        axis.set_major_locator(
            MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )


def legend(ax: Axes, **options: object) -> None:
    """A legend whose lines are long enough to tell their styles, where there is a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**{"loc": "best", "fontsize": "small", "handlelength": 4} | options)


def _mark(ax, x, height, marker, **style):
    if len(x):
        heights = np.full(len(x), height)
        ax.plot(x, heights, marker, transform=ax.get_xaxis_transform(), **style)
