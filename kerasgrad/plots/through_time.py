"""A recurrent layer by time step: its gradients, Jacobians and activations, and where they end."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import PercentFormatter

from kerasgrad.plots.style import (
    COLORS,
    draw_line,
    legend,
    log_scale,
    new_axes,
    off_scale_note,
    on_log_scale,
    styles,
    time_axis,
    whole_numbers,
)

if TYPE_CHECKING:
    from kerasgrad.bptt import Contributions, JacobianSpectrum
    from kerasgrad.history import GradientHistory

_MAP_COLUMNS = 400  # As many as a screen tells apart.
_HORIZON = 0.9  # Share of Σ‖G_ℓ‖
# Where a colour map of logarithms has no colour: hatched, to be told apart in grey.
_OFF_SCALE = {
    "0": {"fc": "black", "ec": "white", "hatch": "...."},
    "Inf": {"fc": COLORS[1], "ec": "black", "hatch": "xxxx"},
    "NaN": {"fc": "white", "ec": "black", "hatch": "////"},
    "no such t": {"fc": "white", "ec": "grey", "hatch": "---"},
}


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
        layer: path of the recurrent layer; may be left out where there is only one. Its state norms
            are those of the training's own steps or, where the layer has none, of the probe; a
            layer with several states is named with the state: "<layer path>:<state>".
        last: the line is the median over this many steps (or probes) at the end of the record.
        label: for the legend; the layer's path by default.
        **style: for `Axes.plot`.

    Returns:
        The axes. A time step whose median is 0, NaN or Inf has no place on a log scale and leaves
        a gap, which the legend counts. The label of y says of how many steps or probes the lines
        are the median, those that were there before included.

    Raises:
        ValueError: when there is no state norm to draw, or several layers and none named.

    Example:

    >>> from kerasgrad import GradientHistory, plots
    >>> history = GradientHistory()
    >>> history.append(
    ...     weights=["w"], step=[0, 1], norms=[[1], [1]], state_norms={"rnn": [[0, 0.1], [0, 0.3]]}
    ... )
    >>> plots.plot_state_norms(history).lines[0].get_label()
    'rnn (0 at 1 of 2 t)'
    """
    name, _, norms, of_probe = _recorded_state_norms(history, layer)
    ax = ax or new_axes()
    median = np.median(norms[-last:], axis=0)
    note = off_scale_note(
        np.count_nonzero(median == 0), np.count_nonzero(~np.isfinite(median)), len(median), "t"
    )
    t = np.arange(1, len(median) + 1)
    draw_line(ax, t, on_log_scale(median), label=(label or name) + note, **{"lw": 1.4} | style)
    log_scale(ax)
    time_axis(ax)
    moments = _moments(
        min(last, len(norms)), "probes" if of_probe else "optimizer steps", ax.get_ylabel()
    )
    ax.set_ylabel(f"‖∂L/∂s_t‖₂, mean over the batch,\nmedian of the last {moments}")
    legend(ax)
    return ax


def plot_compared_state_norms(
    histories: Mapping[str, GradientHistory], ax: Axes | None = None
) -> Axes:
    """`plot_state_norms` of several trainings in one picture; those without state norms left out.

    Args:
        histories: {name: record}; a line for each recurrent layer of each.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes.

    Example:

    >>> from kerasgrad import GradientHistory, plots
    >>> rows = {"weights": ["w"], "step": [0], "norms": [[1]]}
    >>> gated, plain = GradientHistory(), GradientHistory()
    >>> gated.append(**rows, state_norms={"rnn": [[0.2, 0.3]]})
    >>> plain.append(**rows)
    >>> ax = plots.plot_compared_state_norms({"gated": gated, "feed-forward": plain})
    >>> [line.get_label() for line in ax.lines]
    ['gated']
    """
    ax = ax or new_axes(figsize=(8, 5))
    style = styles()
    for name, history in histories.items():
        layers = [layer for layer, norms in history.state_norms.items() if len(norms)]
        for layer in layers:
            label = name if len(layers) == 1 else f"{name}, {layer}"
            plot_state_norms(history, ax, layer=layer, label=label, **next(style))
    return ax


def plot_state_gradients(
    gradients: Mapping[str, np.ndarray] | np.ndarray,
    ax: Axes | None = None,
    *,
    label: str | None = None,
) -> Axes:
    """‖∂L/∂s_t‖₂ of each example against t, on a log scale: its median and quartiles.

    Args:
        gradients: what `kerasgrad.bptt.state_gradients` returns, {state: (batch, timesteps,
            units)}, or one such array.
        ax: axes to draw into; new ones by default.
        label: for the legend, before the state's name: to tell several models apart in one picture.

    Returns:
        The axes, with a line for the median over the batch and a band from the lower to the upper
        quartile for each state. A NaN counts as larger than any number. Where one has no place on
        a log scale there is a gap; the legend counts the norms that are 0, NaN or Inf.

    Raises:
        ValueError: for arrays of another shape, or without an example, time step or unit.

    Example:

    >>> import numpy as np
    >>> from kerasgrad import plots
    >>> ax = plots.plot_state_gradients({"h": np.full((2, 3, 4), 0.5)})
    >>> ax.lines[0].get_ydata().tolist()
    [1.0, 1.0, 1.0]
    """
    states = gradients if isinstance(gradients, Mapping) else {"": gradients}
    arrays = {name: np.asarray(array, np.float64) for name, array in states.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if not shapes or any(len(shape) != 3 or 0 in shape for shape in shapes.values()):
        raise ValueError(
            "Expected arrays of shape (batch, timesteps, units), as bptt.state_gradients returns "
            f"them. Received shapes: {shapes if isinstance(gradients, Mapping) else shapes['']}."
        )
    ax = ax or new_axes()
    for style, (name, array) in zip(styles(ax), arrays.items(), strict=False):
        norms = _norms(array)
        off = np.count_nonzero(norms == 0), np.count_nonzero(~np.isfinite(norms))
        note = off_scale_note(*off, norms.size, "norms")
        lower, median, upper = _quartiles(norms)
        t = np.arange(1, len(median) + 1)
        text = ", ".join(filter(None, [label, name])) or "s"
        draw_line(ax, t, on_log_scale(median), lw=1.4, label=text + note, **style)
        ax.fill_between(
            t, on_log_scale(lower), on_log_scale(upper), color=style["color"], alpha=0.2, lw=0
        )
    log_scale(ax)
    time_axis(ax)
    batch = "/".join(dict.fromkeys(str(len(array)) for array in arrays.values()))
    ax.set_ylabel(f"‖∂L/∂s_t‖₂, median and quartiles\nover a batch of {batch}")
    legend(ax)
    return ax


def plot_state_gradient_map(
    history: GradientHistory, ax: Axes | None = None, *, layer: str | None = None
) -> Axes:
    """log₁₀ ‖∂L/∂s_t‖₂ for each optimizer step and time step t: when the gradient died, and where.

    Args:
        history: the record.
        ax: axes to draw into; new ones by default. The colour bar takes a part of their place.
        layer: as in `plot_state_norms`.

    Returns:
        The axes, with an image. What has no logarithm has a colour of its own, which the legend
        explains and counts: 0, Inf, NaN, and the time steps that a shorter sequence has not. Of
        more than 400 steps, several share a column, which shows the largest of them, NaN and Inf
        included.

    Raises:
        ValueError: when there is no state norm to draw, or several layers and none named.

    Example:

    >>> from kerasgrad import GradientHistory, plots
    >>> history = GradientHistory()
    >>> history.append(
    ...     weights=["w"], step=[0, 1], norms=[[1], [1]], state_norms={"rnn": [[0, 0.1], [0.01, 1]]}
    ... )
    >>> ax = plots.plot_state_gradient_map(history)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['0: 1']
    """
    name, steps, norms, of_probe = _recorded_state_norms(history, layer)
    ax = ax or new_axes(figsize=(8, 4.5))
    n, T = norms.shape
    # A row of NaN alone is a NaN gradient; after a number, the sequence was shorter.
    known = ~np.isnan(norms)
    length = np.where(known.any(axis=1), T - np.argmax(known[:, ::-1], axis=1), T)
    ended = np.arange(T) >= length[:, np.newaxis]
    counts = {
        "0": np.count_nonzero(norms == 0),
        "Inf": np.count_nonzero(np.isinf(norms)),
        "NaN": np.count_nonzero(~known & ~ended),
        "no such t": np.count_nonzero(ended),
    }
    share = -(-n // _MAP_COLUMNS)
    first = np.arange(0, n, share)
    with np.errstate(divide="ignore"):
        logs = np.log10(np.where(ended, 0.0, norms))
    # np.maximum hands on NaN and Inf, and -Inf, the logarithm of 0, only where all are 0.
    logs = np.maximum.reduceat(logs, first, axis=0).T
    ended = np.logical_and.reduceat(ended, first, axis=0).T
    steps_increase = bool((np.diff(steps) > 0).all())
    x = _edges(steps if steps_increase else np.arange(n))[[*first, n]]
    y = np.arange(T + 1) + 0.5

    image = ax.pcolorfast(x, y, np.ma.array(logs, mask=~np.isfinite(logs)), cmap="cividis")
    cells = {
        "0": np.isneginf(logs) & ~ended,
        "Inf": np.isposinf(logs),
        "NaN": np.isnan(logs),
        "no such t": ended,
    }
    for what, mask in cells.items():
        if counts[what]:
            label = f"{what}: {counts[what]}"
            ax.add_patch(_rectangles(mask, x, y, lw=0, label=label, **_OFF_SCALE[what]))
    columns = f", each column the largest of {share}" if share > 1 else ""
    time_axis(ax, ("optimizer step" if steps_increase else "row of the record") + columns)
    whole_numbers(ax.yaxis)
    ax.set_ylabel(f"time step t of {name}")
    if np.isfinite(logs).any():
        batch = "probe" if of_probe else "batch"
        ax.figure.colorbar(image, ax=ax, label="log₁₀ ‖∂L/∂s_t‖₂, mean over the " + batch)
    # Above the image, which it would hide.
    legend(
        ax,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        handlelength=2,
        columnspacing=1,
        title=f"of {norms.size} norms",
        title_fontsize="small",
        alignment="left",
        frameon=False,
    )
    return ax


def plot_contributions(
    contributions: Contributions, ax: Axes | None = None, *, weight: str | None = None
) -> Axes:
    """How much each time step, or each lag, adds to the gradient of a recurrent layer's weights.

        ‖G_i‖₂,    Σ_i G_i = ∂L/∂w

    Args:
        contributions: what `kerasgrad.bptt.step_contributions` returns.
        ax: axes to draw into; new ones by default.
        weight: path of one weight, or the end of it; all of them by default.

    Returns:
        The axes, with a line a weight, on a log scale; the legend counts the shares that are 0, NaN
        or Inf. By lag, a vertical line marks each weight's horizon, the lag within which 90 % of
        Σ‖G_ℓ‖ lie.

    Raises:
        ValueError: when no weight, or several, have this name.

    Example:

    >>> import numpy as np
    >>> from kerasgrad import plots
    >>> from kerasgrad.bptt import Contributions
    >>> shares = Contributions({"rnn/kernel": np.array([[[8.0]], [[1.0]], [[1.0]]])}, by_lag=True)
    >>> ax = plots.plot_contributions(shares)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['kernel, 90 % within lag 1']
    """
    norms = contributions.norms
    if weight is not None:
        named = [path for path in norms if f"/{path}".endswith(f"/{weight}")]
        if len(named) != 1:
            raise ValueError(
                "Expected the path of one weight of these contributions, or its end. Received: "
                f"weight={weight!r}; the contributions have {list(norms)}."
            )
        norms = {path: norms[path] for path in named}
    ax = ax or new_axes()
    layer = _common_folder(norms)
    horizons = contributions.horizon(_HORIZON) if contributions.by_lag else {}
    for style, (path, shares) in zip(styles(), norms.items(), strict=False):
        finite = np.isfinite(shares)
        off = np.count_nonzero(shares == 0), np.count_nonzero(~finite)
        i = np.arange(len(shares)) + (0 if contributions.by_lag else 1)
        label = path.removeprefix(layer)
        if horizons and finite.all() and shares.any():
            ax.axvline(horizons[path], color=style["color"], ls=style["ls"], lw=0.7, zorder=0)
            label += f", {100 * _HORIZON:g} % within lag {horizons[path]}"
        label += off_scale_note(*off, len(shares), "ℓ" if contributions.by_lag else "t")
        draw_line(ax, i, on_log_scale(shares), lw=1.4, label=label, **style)
    log_scale(ax)
    if contributions.by_lag:
        time_axis(ax, "lag ℓ, the steps that a share of the gradient travelled")
        ax.set_ylabel("‖G_ℓ‖₂, share of lag ℓ in ∂L/∂w")
    else:
        time_axis(ax)
        ax.set_ylabel("‖G_t‖₂, share of time step t in ∂L/∂w")
    legend(ax, title=layer.removesuffix("/") or None)
    return ax


def plot_jacobian_spectrum(
    spectrum: JacobianSpectrum,
    ax: Axes | None = None,
    *,
    lyapunov_exponents: np.ndarray | None = None,
) -> Axes:
    """ln of the singular values of J_t···J_1 against t: which directions last, which blow up.

    The slope of the largest tends to the largest Lyapunov exponent λ₁, nats a time step.

    Args:
        spectrum: what `kerasgrad.bptt.jacobian_spectrum` returns: steps (k,) and
            log_singular_values (batch, k, n), descending.
        ax: axes to draw into; new ones by default.
        lyapunov_exponents: (n,), descending; draws the line λ₁·t.

    Returns:
        The axes, with the median over the batch of the largest, the median and the smallest
        singular value's ln, and thin lines for all n. Singular values of 0, NaN and Inf have no
        place and leave gaps; the legend counts them.

    Example:

    >>> import numpy as np
    >>> from kerasgrad import plots
    >>> from kerasgrad.bptt import JacobianSpectrum
    >>> spectrum = JacobianSpectrum(np.array([1, 2]), np.log([[[2.0, 1.0], [4.0, 1.0]]]))
    >>> ax = plots.plot_jacobian_spectrum(spectrum)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['largest: 1.386 at t = 2', 'smallest: 0 at t = 2']
    """
    ax = ax or new_axes()
    t = np.asarray(spectrum.steps)
    logs = np.asarray(spectrum.log_singular_values, np.float64)
    n = logs.shape[-1]

    def draw(values, label, **style):
        off = np.count_nonzero(np.isneginf(values)), np.count_nonzero(~(values < np.inf))
        note = off_scale_note(*off, values.size, "values")
        median = _quartiles(values)[1].reshape(len(t), -1)
        if median.shape[1] == 1:
            label += f": {median[-1, 0]:.4g} at t = {t[-1]}"
        columns = np.where(np.isfinite(median), median, np.nan).T
        for column, text in zip_longest(columns, [label + note]):
            draw_line(ax, t, column, label=text, **style)

    ax.axhline(0, color="grey", lw=0.7, zorder=0)  # Neither grows nor shrinks.
    if n > 3:
        draw(logs, f"all {n}", color="grey", lw=0.5, alpha=0.5)
    style = styles()
    draw(logs[..., 0], "largest", lw=1.4, **next(style))
    if n > 2:
        with np.errstate(invalid="ignore"):  # Inf - Inf
            middle = (logs[..., (n - 1) // 2] + logs[..., n // 2]) / 2
        draw(middle, "median", lw=1.4, **next(style))
    if n > 1:
        draw(logs[..., -1], "smallest", lw=1.4, **next(style))
    if lyapunov_exponents is not None:
        λ = float(np.max(lyapunov_exponents))
        ends = np.array([0, t.max()])
        line = ends * λ if np.isfinite(λ) else np.full(2, np.nan)
        ax.plot(ends, line, color="black", ls=(0, (1, 3)), label=f"λ₁·t, λ₁ = {λ:.3g} nats a step")
    time_axis(ax)
    ax.set_ylabel("ln of the singular values of J_t···J_1,\nmedian over the batch")
    legend(ax)
    return ax


def plot_saturation(saturation: Mapping[str, np.ndarray], ax: Axes | None = None) -> Axes:
    """The units of each gate and state, the most saturated first.

    Args:
        saturation: what `kerasgrad.bptt.saturation` returns, {gate or state: (units,)}: the share
            of examples and time steps at which the activation's derivative is below 5 % of its
            largest.
        ax: axes to draw into; new ones by default.

    Returns:
        The axes, with stairs for each gate or state: at x, the share that x of the units exceed or
        reach. The legend has its mean over the units. Where nothing can saturate, the axes say so.

    Example:

    >>> import numpy as np
    >>> from kerasgrad import plots
    >>> ax = plots.plot_saturation({"forget": np.array([0.0, 0.5, 1.0, 0.5])})
    >>> ax.patches[0].get_data().values.tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    ax = ax or new_axes()
    for style, (name, shares) in zip(styles(), saturation.items(), strict=False):
        shares = np.asarray(shares, np.float64)
        known = np.sort(shares[np.isfinite(shares)])[::-1]
        note = off_scale_note(0, len(shares) - len(known), len(shares), "units")
        mean = f"{100 * known.mean():.0f} %" if len(known) else "unknown"
        ax.stairs(
            known,
            np.arange(len(known) + 1) / max(1, len(shares)),
            baseline=None,
            lw=1.6,
            label=f"{name}, mean {mean}{note}",
            edgecolor=style["color"],
            ls=style["ls"],
        )
    if not saturation:
        ax.text(0.5, 0.5, "no activation that saturates", transform=ax.transAxes, ha="center")
    ax.set(
        xlim=(0, 1),
        ylim=(-0.03, 1.03),
        xlabel="share of the units, the most saturated first",
        ylabel="share of examples and time steps\nat which the unit is saturated",
    )
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    legend(ax)
    return ax


def _recorded_state_norms(history, layer):
    """Name, steps and (n, T) norms of one layer's state, and whether they are the probe's."""
    recorded = {name: norms for name, norms in history.state_norms.items() if len(norms)}
    probed = {name: norms for name, norms in history.probe_state_norms.items() if len(norms)}
    if layer in probed:
        names = [layer]
    else:
        layers = {name: name.rpartition(":")[0] for name in probed}
        names = [*recorded, *(name for name in probed if layers[name] not in recorded)]
        if layer is not None:
            names = [name for name in names if layer in (name, layers.get(name))]
    if len(names) != 1:
        raise ValueError(
            "Expected the path of one recurrent layer of this record, or of one state of the "
            f'probe, "<layer path>:<state>". Received: layer={layer!r}; the record has '
            f"{[*recorded, *probed]}."
        )
    (name,) = names
    of_probe = name not in recorded
    steps = history.probe_step if of_probe else history.step
    norms = probed[name] if of_probe else recorded[name]
    return name, steps, np.asarray(norms, np.float64), of_probe


def _moments(count, what, label):
    """How many of what the median is of; where the label names others already, those too."""
    counts = {}
    for low, high, known in re.findall(r"(\d+)(?: to (\d+))? (optimizer steps|probes)", label):
        counts[known] = int(low), int(high or low)
    low, high = counts.get(what, (count, count))
    counts[what] = min(low, count), max(high, count)
    return " or ".join(
        f"{low} to {high} {what}" if low < high else f"{low} {what}"
        for what, (low, high) in counts.items()
    )


def _norms(array):
    """‖·‖₂ over the last axis, where the squares may be beyond the floating-point range."""
    with np.errstate(over="ignore"):
        return np.hypot.reduce(array, axis=-1)


def _quartiles(values):
    """Lower quartile, median and upper quartile over the first axis; NaN counts as the largest."""
    B = len(values)
    ordered = np.sort(values, axis=0)
    with np.errstate(invalid="ignore"):  # Inf - Inf
        median = ordered[(B - 1) // 2] / 2 + ordered[B // 2] / 2
    # The smallest value that a quarter, or three, of the examples do not exceed.
    return ordered[-(-B // 4) - 1], median, ordered[-(-3 * B // 4) - 1]


def _edges(centers):
    """The n + 1 edges of cells around n increasing centers."""
    if len(centers) == 1:
        return centers[0] + np.array([-0.5, 0.5])
    middles = (centers[:-1] + centers[1:]) / 2
    return np.array([2 * centers[0] - middles[0], *middles, 2 * centers[-1] - middles[-1]])


def _rectangles(mask, x, y, **style):
    """One patch over the cells (T, n) of a mask; one rectangle for each run of them in a column."""
    ends = np.diff(np.pad(mask.T.astype(np.int8), [(0, 0), (1, 1)]), axis=1)
    column, bottom = np.nonzero(ends == 1)
    _, top = np.nonzero(ends == -1)
    left, right, bottom, top = x[column], x[column + 1], y[bottom], y[top]
    corners = [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
    vertices = np.moveaxis(np.array(corners), -1, 0).reshape(-1, 2)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return PathPatch(Path(vertices, np.tile(codes, len(column))), **style)


def _common_folder(paths):
    """The longest "a/b/" that all paths begin with."""
    common = posixpath.commonpath(map(posixpath.dirname, paths))
    return common and common + "/"
