"""The article's own figures: tanh, ReLU, and the product Z = tanh'(x)·σ(y) of its gated cell."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes

from kerasgrad.plots.style import COLORS, draw_line, legend, new_axes

_NEITHER_0_NOR_1 = (0.05, 0.95)  # The article: Z is "basically 0 or 1".


def plot_tanh(ax: Axes | None = None) -> Axes:
    """tanh and its derivative, which is 1 only at 0: the article's section 4.

        tanh'(x) = 1 - tanh²(x) <= 1

    Args:
        ax: axes to draw into; new ones by default.

    Returns:
        The axes, with a line each.

    Example:

    >>> from kerasgrad import plots
    >>> [line.get_label() for line in plots.plot_tanh().lines[:2]]
    ['tanh(x)', "tanh'(x) = 1 - tanh²(x)"]
    """
    ax = ax or new_axes()
    x = np.linspace(-5, 5, 501)
    draw_line(ax, x, np.tanh(x), color=COLORS[0], label="tanh(x)")
    draw_line(ax, x, _tanh_derivative(x), color=COLORS[1], ls="--", label="tanh'(x) = 1 - tanh²(x)")
    return _labelled(ax)


def plot_relu(ax: Axes | None = None) -> Axes:
    """ReLU and its derivative, 0 below 0 and 1 above: the article's section 5.

    At 0 there is no derivative, so its line has a gap there.

    Args:
        ax: axes to draw into; new ones by default.

    Returns:
        The axes, with a line each.

    Example:

    >>> from kerasgrad import plots
    >>> [line.get_label() for line in plots.plot_relu().lines[:2]]
    ['ReLU(x) = max(0, x)', "ReLU'(x)"]
    """
    ax = ax or new_axes()
    x = np.linspace(-2, 2, 401)
    derivative = np.where(x == 0, np.nan, (x > 0).astype(float))
    draw_line(ax, x, np.maximum(0, x), color=COLORS[0], label="ReLU(x) = max(0, x)")
    draw_line(ax, x, derivative, color=COLORS[1], ls="--", label="ReLU'(x)")
    return _labelled(ax)


def plot_gate_product(ax: Axes | None = None) -> Axes:
    """The surface Z = tanh'(x)·σ(y): one time step's ∂S_t/∂S_{t-1} of the article's gated cell.

    x is what the tanh is given, y what the forget gate is given.

    Args:
        ax: three-dimensional axes to draw into; new ones by default.

    Returns:
        The axes.

    Raises:
        ValueError: for axes that are not three-dimensional.

    Example:

    >>> from kerasgrad import plots
    >>> plots.plot_gate_product().get_zlabel()
    "Z = tanh'(x)·σ(y)"
    """
    if ax is not None and ax.name != "3d":
        raise ValueError(
            "A surface needs three-dimensional axes, as made by "
            'plt.subplots(subplot_kw={"projection": "3d"}). Received axes with the projection '
            f"{ax.name!r}."
        )
    ax = ax or new_axes(subplot_kw={"projection": "3d"})
    x, y = np.meshgrid(np.linspace(-4, 4, 81), np.linspace(-6, 6, 81))
    Z = _tanh_derivative(x) * _sigmoid(y)
    ax.plot_surface(
        x, y, Z, cmap="cividis", vmin=0, vmax=1, rcount=81, ccount=81, lw=0, antialiased=False
    )
    ax.set(xlabel="x, given to tanh", ylabel="y, given to the gate", zlabel="Z = tanh'(x)·σ(y)")
    ax.set_zlim(0, 1)
    ax.view_init(elev=28, azim=-50)
    ax.set_box_aspect(None, zoom=0.9)  # The label of z is cut off otherwise.
    return ax


def plot_gate_product_distribution(ax: Axes | None = None) -> Axes:
    """How Z = tanh'(x)·σ(y) is distributed for x, y ~ N(0, 1): hardly ever 0 or 1.

        P(Z <= z) = E_x[Φ(logit(z / tanh'(x)))],    Φ the normal distribution function

    The article takes Z for "basically 0 or 1", and drops the product from the gradient. The
    geometric mean is what the product loses a step.

    Args:
        ax: axes to draw into; new ones by default.

    Returns:
        The axes, with the probability density over 40 equal bins, each by quadrature, and the
        probability of 0.05 < Z < 0.95, the mean and the geometric mean in the legend.

    Example:

    >>> from kerasgrad import plots
    >>> ax = plots.plot_gate_product_distribution()
    >>> [text.get_text() for text in ax.get_legend().get_texts()][0]
    'P(0.05 < Z < 0.95) = 90.5 %'
    """
    ax = ax or new_axes()
    edges = np.linspace(0, 1, 41)
    density = np.diff(_probability_below(edges)) / np.diff(edges)
    low, high = _probability_below(_NEITHER_0_NOR_1)
    mean = _mean(_tanh_derivative) * _mean(_sigmoid)
    log_mean = _mean(lambda x: np.log(_tanh_derivative(x))) + _mean(lambda y: np.log(_sigmoid(y)))

    ax.stairs(density, edges, fill=True, color="gainsboro")
    inside = (edges > _NEITHER_0_NOR_1[0] - 1e-9) & (edges < _NEITHER_0_NOR_1[1] + 1e-9)
    ax.stairs(
        density[inside[:-1] & inside[1:]],
        edges[inside],
        fill=True,
        color=COLORS[4],
        label="P({:g} < Z < {:g}) = {:.1f} %".format(*_NEITHER_0_NOR_1, 100 * (high - low)),
    )
    for value, name, ls, color in (
        (mean, "mean", "-", "black"),
        (math.exp(log_mean), "geometric mean", "--", COLORS[1]),
    ):
        ax.axvline(value, color=color, ls=ls, label=f"{name} {value:.2f}")
    ax.set(
        xlim=(0, 1),
        xlabel="Z = tanh'(x)·σ(y),  x, y ~ N(0, 1)",
        ylabel="probability density",
    )
    legend(ax)
    return ax


def _tanh_derivative(x):
    return np.cosh(x) ** -2.0  # 1 - tanh², without the cancellation.


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


# The rule of rectangles is exact to rounding for what is smooth and ends as N(0, 1) does.
_NODES = np.linspace(-10, 10, 2001)
_WEIGHTS = np.exp(-(_NODES**2) / 2) / np.exp(-(_NODES**2) / 2).sum()


def _mean(function):
    """E[function(x)] for x ~ N(0, 1)."""
    return float(_WEIGHTS @ function(_NODES))


def _probability_below(z):
    """P(Z <= z) of each z in [0, 1]."""
    gate = np.asarray(z)[:, np.newaxis] / _tanh_derivative(_NODES)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(gate < 1, np.log(gate / (1 - gate)), np.inf)
    Φ = 0.5 + 0.5 * np.vectorize(math.erf)(y / math.sqrt(2))
    return Φ @ _WEIGHTS


def _labelled(ax):
    ax.axhline(0, color="grey", lw=0.7, zorder=0)
    ax.axvline(0, color="grey", lw=0.7, zorder=0)
    ax.set(xlabel="x, the activation's input", ylabel="the activation and its derivative")
    legend(ax)
    return ax
