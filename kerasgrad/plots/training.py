"""A training by optimizer step: loss, gradient norms, and what `diagnose` found in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from kerasgrad.plots.style import (
    COLORS,
    draw_line,
    legend,
    log_scale,
    mark_non_finite,
    mark_zeros,
    new_axes,
    off_scale_note,
    on_log_scale,
    styles,
)

if TYPE_CHECKING:
    from kerasgrad.diagnosis import Finding
    from kerasgrad.history import GradientHistory

# Told apart by shape too, for a picture in grey.
_SEVERITIES = {
    "error": {"color": COLORS[1], "marker": "X"},
    "warning": {"color": COLORS[0], "marker": "|"},
}


def plot_norms(history: GradientHistory, ax: Axes | None = None) -> Axes:
    """The global gradient norm of each step, on a log scale, before and after clipping.

    Steps with a NaN or Inf norm are crosses at the upper edge, those with a norm of 0 triangles at
    the lower one: they are shown, not dropped.

    Args:
        history: the record.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes, with a line "before clipping", one "after clipping" where clipping changed
        something, and lines "NaN or Inf" and "0" where there are such.

    Example:

    >>> from kerasgrad import GradientHistory, plots
    >>> history = GradientHistory()
    >>> history.append(weights=["w"], step=[0, 1], norms=[[3.0], [5.0]])
    >>> plots.plot_norms(history).lines[0].get_ydata().tolist()
    [3.0, 5.0]
    """
    ax = ax or new_axes()
    step = history.step
    before = on_log_scale(history.global_norm)
    draw_line(ax, step, before, color=COLORS[0], lw=1, label="before clipping")
    if history.clipped.any():
        # Nothing is applied where there is no update: gaps there would leave no line.
        step_of_update = step[history.updated]
        after = on_log_scale(history.applied_global_norm[history.updated])
        draw_line(ax, step_of_update, after, color=COLORS[1], lw=1, ls="--", label="after clipping")
    mark_non_finite(ax, step, history.global_norm, label="NaN or Inf")
    mark_zeros(ax, step, history.global_norm, label="0")
    log_scale(ax)
    ax.set(xlabel="optimizer step", ylabel="global gradient norm")
    legend(ax)
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
        The axes, with one line a weight, labelled by its path. Norms of 0 are counted in the label,
        steps whose global norm is NaN or Inf are crosses at the upper edge.

    Example:

    >>> from kerasgrad import GradientHistory, plots
    >>> history = GradientHistory()
    >>> history.append(weights=["rnn/kernel", "rnn/bias"], step=[0, 1], norms=[[3, 0], [5, 0]])
    >>> [line.get_label() for line in plots.plot_weight_norms(history).lines]
    ['rnn/kernel', 'rnn/bias (0 at 2 of 2 steps)']
    """
    ax = ax or new_axes()
    for style, path, norms in zip(styles(), history.weights, history.norms.T, strict=False):
        zeros = off_scale_note(np.count_nonzero(norms == 0), 0, len(norms), "steps")
        steps, norms = _averaged(history.step, norms, average)
        draw_line(ax, steps, on_log_scale(norms), lw=1, label=path + zeros, **style)
    mark_non_finite(ax, history.step, history.global_norm, label="NaN or Inf")
    log_scale(ax)
    ax.set(xlabel="optimizer step", ylabel="gradient norm before clipping" + _mean_of(average))
    legend(ax, fontsize="x-small")
    return ax


def plot_loss(
    history: GradientHistory,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    average: int = 1,
    **style: object,
) -> Axes:
    """Each batch's own loss by step, on a log scale; on a linear one where a loss is below 0.

    Args:
        history: the record.
        ax: axes to draw into; new ones by default.
        label: for the legend.
        average: mean over this many steps, for a line that can be read; the axis says so.
        **style: for `Axes.plot`.

    Returns:
        The axes. Steps with a NaN or Inf loss are crosses at the upper edge; on a log scale those
        with a loss of 0 are triangles at the lower one.

    Example:

    >>> from kerasgrad import GradientHistory, plots
    >>> history = GradientHistory()
    >>> history.append(weights=["w"], step=[0, 1], norms=[[1], [1]], loss=[2.0, 0.5])
    >>> plots.plot_loss(history).get_yscale()
    'log'
    """
    ax = ax or new_axes()
    losses = history.loss
    steps, means = _averaged(history.step, losses, average)
    finite = np.where(np.isfinite(means), means, np.nan)
    linear = bool((finite < 0).any())
    shown = finite if linear else on_log_scale(means)
    color = draw_line(ax, steps, shown, label=label, **{"lw": 1.4} | style).get_color()
    # The legend of a line with a name is left to the caller, who may draw more of them.
    non_finite, zero = ("NaN or Inf", "0") if label is None else (None, None)
    mark_non_finite(ax, history.step, losses, color=color, label=non_finite)
    if not linear:
        mark_zeros(ax, history.step, losses, color=color, label=zero)
    log_scale(ax)
    ax.set(xlabel="optimizer step", ylabel="loss of the batch" + _mean_of(average))
    if label is None:
        legend(ax)
    return ax


def plot_compared_losses(
    histories: Mapping[str, GradientHistory], constant_loss: float, ax: Axes | None = None
) -> Axes:
    """The loss of several trainings by step, beside that of the best constant answer.

    Args:
        histories: {name: record}.
        constant_loss: drawn as a horizontal line.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes, with one line a training, the mean of each 25 steps. The legend is to the right
        of the axes, where it covers no line.

    Example:

    >>> from kerasgrad import GradientHistory, plots
    >>> history = GradientHistory()
    >>> history.append(weights=["w"], step=[0, 1], norms=[[1], [1]], loss=[2.0, 0.5])
    >>> ax = plots.plot_compared_losses({"baseline": history}, constant_loss=0.25)
    >>> [line.get_label() for line in ax.lines]
    ['baseline', 'constant answer, 0.25']
    """
    ax = ax or new_axes(figsize=(10, 5))
    for style, (name, history) in zip(styles(), histories.items(), strict=False):
        plot_loss(history, ax, label=name, average=25, **style)
    ax.axhline(
        constant_loss, color="grey", lw=0.8, zorder=0, label=f"constant answer, {constant_loss:.3g}"
    )
    # One training that explodes would flatten all others: its line leaves through the upper edge.
    if ax.dataLim.y1 > 1e3 * constant_loss:
        ax.set_ylim(top=1e3 * constant_loss)
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    legend(ax, title="×: NaN or Inf, ▼: 0", title_fontsize="small", **beside)
    return ax


def plot_compared_norms(histories: Mapping[str, GradientHistory]) -> np.ndarray:
    """`plot_norms` of several trainings side by side, on common scales.

    Args:
        histories: {name: record}.

    Returns:
        An array of axes, one a training, titled by its name. The scales are written at the left of
        each row and below each column.

    Example:

    >>> from kerasgrad import GradientHistory, plots
    >>> history = GradientHistory()
    >>> history.append(weights=["w"], step=[0, 1], norms=[[3.0], [5.0]])
    >>> [ax.get_title() for ax in plots.plot_compared_norms({"tanh": history, "relu": history})]
    ['tanh', 'relu']
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
    # Above a place left over, too.
    for ax in axes[max(0, len(histories) - columns) : len(histories)]:
        ax.set_xlabel("optimizer step")
        ax.xaxis.set_tick_params(labelbottom=True)
    return axes[: len(histories)]


def plot_diagnosis(
    history: GradientHistory, findings: Sequence[Finding], axes: Iterable[Axes] | None = None
) -> np.ndarray:
    """Loss and global norm by step, and below them at which steps each finding was seen.

    A finding is a bar from its first to its last step, with its severity, title and place above it;
    in the other two a dotted line marks its first step.

    Args:
        history: the record.
        findings: what `kerasgrad.diagnose(history)` returns.
        axes: three axes to draw into, for the loss, the norms and the findings; new ones, one below
            the other, by default.

    Returns:
        An array of these three axes.

    Raises:
        ValueError: for another number of axes.

    Example:

    >>> from kerasgrad import GradientHistory, diagnose, plots
    >>> history = GradientHistory()
    >>> history.append(weights=["w"], step=[0, 1, 2], norms=[[1.0], [2.0], [float("nan")]])
    >>> axes = plots.plot_diagnosis(history, diagnose(history))
    >>> axes[2].texts[0].get_text()
    'error: non finite, step 2 (w)'
    """
    rows = max(1, len(findings))
    own = axes is None
    if own:
        strip = 0.35 + 0.4 * rows
        axes = plt.subplots(
            3,
            1,
            figsize=(8, 5 + strip),
            height_ratios=[2.5, 2.5, strip],
            sharex=True,
            layout="constrained",
        )[1]
    axes = np.array(list(axes), dtype=object)
    if len(axes) != 3:
        raise ValueError(
            f"Expected three axes: for the loss, the norms and the findings. Received: {len(axes)}."
        )
    loss, norms, strip = axes
    plot_loss(history, loss)
    plot_norms(history, norms)
    strip.set(xlabel="optimizer step", ylabel="findings", yticks=[], ylim=(rows, 0))
    if not findings:
        strip.text(0.01, 0.5, "nothing found", transform=strip.transAxes, va="center")
    for row, finding in enumerate(findings):
        style = _SEVERITIES[finding.severity]
        strip.plot(finding.steps, [row + 0.7] * 2, lw=4, ms=9, solid_capstyle="butt", **style)
        strip.text(
            0.01,
            row + 0.3,
            f"{finding.severity}: {finding.title} ({finding.where})",
            transform=strip.get_yaxis_transform(),
            fontsize="small",
            va="center",
        )
        for ax in (loss, norms):
            ax.axvline(finding.steps[0], color=style["color"], lw=0.8, ls=":", zorder=0)
    if own:
        loss.set_xlabel("")
        norms.set_xlabel("")
    return axes


def _averaged(steps, values, average):
    """Mean of each `average` steps, at the last of them; as it is where there are fewer."""
    if len(values) < average:
        return steps, values
    n = len(values) // average * average
    # In float64, as the sum of float32 losses that explode may be beyond their range.
    with np.errstate(invalid="ignore"):  # Inf - Inf
        means = values[:n].reshape(-1, average).mean(axis=1, dtype=np.float64)
    return steps[:n].reshape(-1, average)[:, -1], means


def _mean_of(average):
    return f", mean of {average} steps" if average > 1 else ""
