"""One function a figure: it draws into axes, makes them where none are given, and returns them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from kerasgrad.history import GradientHistory

# Okabe and Ito's colours, told apart by colour-blind readers; the line styles tell them in grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINESTYLES = ("-", "--", "-.", ":")


def plot_norms(history: GradientHistory, ax: Axes | None = None) -> Axes:
    """The global gradient norm of each step, on a log scale, before and after clipping.

    Steps with a NaN or Inf norm are crosses at the upper edge: they are shown, not dropped.

    Args:
        history: the record.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes, with a line "before clipping", one "after clipping" where clipping changed
        something, and a line "NaN or Inf" where there is one.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    step = history.step
    ax.plot(step, _finite(history.global_norm), color=_COLORS[0], lw=1, label="before clipping")
    if history.clipped.any():
        # Nothing is applied where there is no update: gaps there would leave no line.
        updated = history.updated
        after = _finite(history.applied_global_norm[updated])
        ax.plot(step[updated], after, color=_COLORS[1], lw=1, ls="--", label="after clipping")
    _mark_non_finite(ax, step, history.global_norm)
    _log_scale(ax)
    ax.set(xlabel="optimizer step", ylabel="global gradient norm")
    ax.legend(loc="best", fontsize="small")
    return ax


def plot_weight_norms(
    history: GradientHistory, ax: Axes | None = None, *, average: int = 1
) -> Axes:
    """The gradient norm of each weight by step, before clipping, on a log scale.

    Args:
        history: the record.
        ax: axes to draw into; new ones by default.
        average: mean over this many steps, for lines that can be read; the axis says so.

    Returns:
        The axes, with one line a weight, labelled by its path.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    for style, path, norms in zip(_styles(), history.weights, history.norms.T, strict=False):
        steps, norms = _averaged(history.step, norms, average)
        ax.plot(steps, _finite(norms), lw=1, label=path, **style)
    _mark_non_finite(ax, history.step, history.global_norm)
    _log_scale(ax)
    ax.set(xlabel="optimizer step", ylabel="gradient norm before clipping" + _mean_of(average))
    if ax.lines:
        ax.legend(loc="best", fontsize="x-small")
    return ax


def plot_loss(
    history: GradientHistory,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    average: int = 1,
    **style: object,
) -> Axes:
    """Each batch's own loss by step, on a log scale.

    Args:
        history: the record.
        ax: axes to draw into; new ones by default.
        label: for the legend.
        average: mean over this many steps, for a line that can be read; the axis says so.
        **style: for `Axes.plot`.

    Returns:
        The axes. Steps with a NaN or Inf loss are crosses at the upper edge.
    """
    ax = ax or plt.subplots(layout="constrained")[1]
    steps, losses = _averaged(history.step, history.loss, average)
    (line,) = ax.plot(steps, _finite(losses), lw=1.4, label=label, **style)
    _mark_non_finite(ax, history.step, history.loss, color=line.get_color(), label=None)
    _log_scale(ax)
    ax.set(xlabel="optimizer step", ylabel="loss of the batch" + _mean_of(average))
    return ax


def plot_state_norms(
    history: GradientHistory,
    ax: Axes | None = None,
    *,
    layer: str | None = None,
    last: int = 100,
    label: str | None = None,
    **style: object,
) -> Axes:
    """‖∂L/∂s_t‖ against t, on a log scale: how much gradient reaches each time step.

    Args:
        history: the record.
        ax: axes to draw into; new ones by default.
        layer: path of the recurrent layer; may be left out where there is only one.
        last: the line is the median over this many steps at the end of the record.
        label: for the legend; the layer's path by default.
        **style: for `Axes.plot`.

    Returns:
        The axes. A time step whose median is 0, NaN or Inf has no place on a log scale and leaves
        a gap, which the legend counts.

    Raises:
        ValueError: when there is no state norm to draw, or several layers and none named.
    """
    norms = history.state_norms
    if layer is None and len(norms) == 1:
        (layer,) = norms
    if layer not in norms:
        raise ValueError(
            f"Expected the path of one recurrent layer of this record. Received: layer={layer!r}; "
            f"the record has {list(norms)}."
        )
    ax = ax or plt.subplots(layout="constrained")[1]
    median = np.median(norms[layer][-last:], axis=0)
    shown = _finite(median)
    off_scale = np.count_nonzero(np.isnan(shown))
    note = f" (0, NaN or Inf at {off_scale} of {len(median)} t)" if off_scale else ""
    if off_scale >= len(median) - 1:
        style |= {"marker": "o"}  # A line of one point cannot be seen.
    t = np.arange(1, len(median) + 1)
    ax.plot(t, shown, lw=1.4, label=(label or layer) + note, **style)
    _log_scale(ax)
    ax.set(
        xlabel="time step t of the sequence",
        ylabel=f"‖∂L/∂s_t‖, median of the last {min(last, len(history))} optimizer steps",
    )
    ax.legend(loc="best", fontsize="small", handlelength=4)
    return ax


def plot_compared_losses(
    histories: Mapping[str, GradientHistory], constant_loss: float, ax: Axes | None = None
) -> Axes:
    """The loss of several trainings by step, beside that of the best constant answer.

    Args:
        histories: {name: record}.
        constant_loss: drawn as a horizontal line.
        ax: axes to draw into; new ones by default.
    """
    ax = ax or plt.subplots(figsize=(8, 5), layout="constrained")[1]
    for style, (name, history) in zip(_styles(), histories.items(), strict=False):
        plot_loss(history, ax, label=name, average=25, **style)
    ax.axhline(
        constant_loss, color="grey", lw=0.8, zorder=0, label=f"constant answer, {constant_loss:.3g}"
    )
    # One training that explodes would flatten all others: its line leaves through the upper edge.
    if ax.dataLim.y1 > 1e3 * constant_loss:
        ax.set_ylim(top=1e3 * constant_loss)
    ax.legend(loc="upper right", fontsize="small", handlelength=4, title="×: NaN or Inf")
    return ax


def plot_compared_norms(histories: Mapping[str, GradientHistory]) -> np.ndarray:
    """`plot_norms` of several trainings side by side, on common scales.

    Args:
        histories: {name: record}.

    Returns:
        An array of axes, one a training, titled by its name.
    """
    columns = min(3, len(histories))
    rows = -(-len(histories) // columns)
    axes = plt.subplots(
        rows,
        columns,
        figsize=(4 * columns, 3 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )[1].flat
    for ax, (name, history) in zip(axes, histories.items(), strict=False):
        plot_norms(history, ax).set_title(name, fontsize="medium")
        ax.label_outer()
    for ax in axes[len(histories) :]:
        ax.remove()
    return axes[: len(histories)]


def plot_compared_state_norms(
    histories: Mapping[str, GradientHistory], ax: Axes | None = None
) -> Axes:
    """`plot_state_norms` of several trainings in one picture; those without state norms left out.

    Args:
        histories: {name: record}; a line for each recurrent layer of each.
        ax: axes to draw into; new ones by default.
    """
    ax = ax or plt.subplots(figsize=(8, 5), layout="constrained")[1]
    styles = _styles()
    for name, history in histories.items():
        layers = list(history.state_norms)
        for layer in layers:
            label = name if len(layers) == 1 else f"{name}, {layer}"
            plot_state_norms(history, ax, layer=layer, label=label, **next(styles))
    return ax


def _styles():
    return ({"color": c, "ls": ls} for c, ls in zip(cycle(_COLORS), cycle(_LINESTYLES)))


def _averaged(steps, values, average):
    """Mean of each `average` steps, at the last of them; as it is where there are fewer."""
    if len(values) < average:
        return steps, values
    n = len(values) // average * average
    # In float64, as the sum of float32 losses that explode may be beyond their range.
    means = values[:n].reshape(-1, average).mean(axis=1, dtype=np.float64)
    return steps[:n].reshape(-1, average)[:, -1], means


def _mean_of(average):
    return f", mean of {average} steps" if average > 1 else ""


def _finite(values):
    """Values with gaps where a log scale has no place for them."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _mark_non_finite(ax, step, values, color="black", label="NaN or Inf"):
    """A cross at the upper edge for each step whose value is NaN or Inf."""
    at = step[~np.isfinite(values)]
    if len(at):
        ax.plot(
            at,
            np.full(len(at), 0.97),
            "x",
            color=color,
            label=label,
            transform=ax.get_xaxis_transform(),
        )


def _log_scale(ax):
    # A log axis without one positive value warns at every draw.
    if any((_finite(line.get_ydata()) > 0).any() for line in ax.lines):
        ax.set_yscale("log")
