"""The article's figures: the functions are what they say, the probabilities what chance gives."""

from __future__ import annotations

import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kerasgrad import plots


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    plt.close("all")
    yield
    plt.close("all")


def drawn(ax, label):
    """(x, y) of the line whose label begins so."""
    (line,) = (line for line in ax.lines if line.get_label().startswith(label))
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def finite_difference(function, x, step=1e-6):
    return np.array([(function(v + step) - function(v - step)) / (2 * step) for v in x])


def test_tanh_and_its_derivative():
    ax = plots.plot_tanh()
    x, y = drawn(ax, "tanh(x)")
    np.testing.assert_allclose(y, [math.tanh(v) for v in x], rtol=1e-12)
    x, y = drawn(ax, "tanh'(x)")
    np.testing.assert_allclose(y, finite_difference(math.tanh, x), atol=1e-9)
    # 1 at 0, and nowhere else.
    assert x[y == y.max()].tolist() == [0.0]
    assert y.max() == 1
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "tanh(x)",
        "tanh'(x) = 1 - tanh²(x)",
    ]


def test_relu_and_its_derivative():
    ax = plots.plot_relu()
    x, y = drawn(ax, "ReLU(x)")
    np.testing.assert_array_equal(y, [max(0.0, v) for v in x])
    x, y = drawn(ax, "ReLU'(x)")
    at_0 = np.isnan(y)
    assert x[at_0].tolist() == [0.0]
    expected = finite_difference(lambda v: max(0.0, v), x[~at_0])
    np.testing.assert_allclose(y[~at_0], expected, atol=1e-9)


@pytest.mark.parametrize("draw", [plots.plot_tanh, plots.plot_relu])
def test_both_lines_can_be_told_apart_in_grey(draw):
    first, second = draw().lines[:2]
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_color() != second.get_color()


@pytest.mark.parametrize(
    "draw", [plots.plot_tanh, plots.plot_relu, plots.plot_gate_product_distribution]
)
def test_axes_in_axes_out(draw):
    left, right = plt.subplots(1, 2)[1]
    assert draw(right) is right
    assert right.lines and not left.lines
    assert right.get_xlabel() and right.get_ylabel()
    new = draw()
    assert new not in (left, right)
    new.figure.canvas.draw()


# Z = tanh'(x)·σ(y)


def test_the_surface_is_the_product():
    """A face's colour is the mean of Z at its four corners: read them back one by one."""
    ax = plots.plot_gate_product()
    (surface,) = ax.collections
    x, y = np.linspace(-4, 4, 81), np.linspace(-6, 6, 81)
    Z = np.array([[1 / math.cosh(v) ** 2 / (1 + math.exp(-w)) for v in x] for w in y])
    faces = (Z[:-1, :-1] + Z[1:, :-1] + Z[:-1, 1:] + Z[1:, 1:]) / 4
    np.testing.assert_allclose(np.sort(surface.get_array()), np.sort(faces, axis=None), rtol=1e-9)
    assert (ax.get_xlim()[0] <= -4, ax.get_ylim()[1] >= 6, ax.get_zlim()) == (True, True, (0, 1))
    assert "tanh" in ax.get_xlabel() and "gate" in ax.get_ylabel()
    assert ax.get_zlabel() == "Z = tanh'(x)·σ(y)"
    ax.figure.canvas.draw()


def test_the_surface_needs_axes_with_three_dimensions():
    solid = plt.figure().add_subplot(projection="3d")
    assert plots.plot_gate_product(solid) is solid
    with pytest.raises(ValueError, match="three-dimensional") as error:
        plots.plot_gate_product(plt.subplots()[1])
    # The error's own code mends it.
    code = re.search(r"plt\.subplots\(.*?\}\)", str(error.value)).group()
    plots.plot_gate_product(eval(code)[1])


def test_the_distribution_is_that_of_a_large_sample():
    n = 1_000_000
    x, y = np.random.default_rng(0).standard_normal((2, n))
    Z = 1 / np.cosh(x) ** 2 / (1 + np.exp(-y))
    ax = plots.plot_gate_product_distribution()

    whole, between = (patch.get_data() for patch in ax.patches)
    counts = np.histogram(Z, whole.edges)[0]
    expected = whole.values * np.diff(whole.edges)
    assert abs(expected.sum() - 1) < 1e-9
    # Five standard deviations of a count.
    assert (np.abs(counts - n * expected) < 5 * np.sqrt(n * expected) + 5).all()
    # The part in colour is the same histogram, from .05 to .95.
    np.testing.assert_allclose(between.edges[[0, -1]], [0.05, 0.95])
    share = (between.values * np.diff(between.edges)).sum()
    inside = np.count_nonzero((Z > 0.05) & (Z < 0.95)) / n
    assert abs(share - inside) < 0.0015  # Five standard deviations of a share of .905.

    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == f"P(0.05 < Z < 0.95) = {100 * share:.1f} %"
    mean, geometric_mean = drawn(ax, "mean")[0][0], drawn(ax, "geometric mean")[0][0]
    assert abs(mean - Z.mean()) < 5 * Z.std() / math.sqrt(n)
    assert abs(math.log(geometric_mean) - np.log(Z).mean()) < 5 * np.log(Z).std() / math.sqrt(n)
    # What the article's readers are told.
    assert texts == ["P(0.05 < Z < 0.95) = 90.5 %", "mean 0.30", "geometric mean 0.21"]


def test_the_mean_of_a_gate_is_one_half_by_symmetry():
    """σ(y) + σ(-y) = 1, so E[Z] = E[tanh']/2; by Gauss and Hermite's rule, not the figure's."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    expected = weights @ (1 - np.tanh(nodes) ** 2) / weights.sum() / 2
    mean = drawn(plots.plot_gate_product_distribution(), "mean")[0][0]
    assert abs(mean - expected) < 1e-6
