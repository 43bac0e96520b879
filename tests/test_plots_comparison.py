"""The figures of a study: what their artists hold."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kerasgrad import plots


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def labels(ax):
    return [line.get_label() for line in ax.lines if not line.get_label().startswith("_")]


def test_median_losses_are_drawn_with_their_range():
    steps = np.array([10, 20, 30])
    losses = np.array([[1.0, 0.5, 0.1], [0.8, 0.4, 0.2], [0.9, math.inf, math.nan]])
    ax = plots.plot_median_losses({"good": (steps, losses)}, constant_loss=0.25)
    line, constant = ax.lines
    np.testing.assert_allclose(line.get_ydata(), [0.9, 0.5, 0.2])
    assert constant.get_ydata()[0] == 0.25
    assert labels(ax) == ["good", "constant answer, 0.25"]
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(0.1)
    # Where a run diverged, the band goes out of the axes.
    assert corners[corners[:, 0] == 30, 1].max() > ax.get_ylim()[1]
    assert ax.get_yscale() == "log"


def test_a_median_that_is_no_number_is_a_cross():
    steps, losses = np.array([10, 20]), np.array([[1.0, math.nan], [1.0, math.inf]])
    ax = plots.plot_median_losses({"bad": (steps, losses)}, constant_loss=0.25)
    (cross,) = (line for line in ax.lines if line.get_marker() == "x")
    assert cross.get_xdata().tolist() == [20]
    ax.figure.canvas.draw()


def test_final_losses_show_each_run_the_median_and_its_interval():
    losses = {"good": [0.1, 0.3, 0.2], "bad": [0.4, math.nan, math.inf], "none": []}
    intervals = {"good": (0.1, 0.3), "bad": (0.4, math.inf)}
    ax = plots.plot_final_losses(losses, intervals, constant_loss=0.25)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["good", "bad (NaN or Inf at 2 of 3 runs)", "none"]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert dots[0].get_xdata().tolist() == [0.1, 0.3, 0.2]
    assert dots[1].get_xdata().tolist() == [0.4]
    medians = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|"]
    assert medians == [0.2]  # Of the other it is Inf.
    crosses = [len(line.get_xdata()) for line in ax.lines if line.get_marker() == "x"]
    assert crosses == [0, 2, 0]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # The first on top.
    ax.figure.canvas.draw()


def test_a_search_rings_what_was_chosen():
    losses = {
        "one": {0.1: [0.3, 0.1, 0.2], 0.01: [0.5, 0.5, 0.5], 1.0: [math.inf, math.inf, 0.1]},
        "other": {0.1: [0.4], 0.01: [0.3], 1.0: [math.inf]},
    }
    ax = plots.plot_learning_rates(losses, {"one": 0.1, "other": 0.01})
    lines = {line.get_label(): line for line in ax.lines if line.get_label() in losses}
    assert lines["one"].get_xdata().tolist() == [0.01, 0.1, 1.0]
    np.testing.assert_equal(lines["one"].get_ydata(), [0.5, 0.2, math.nan])
    rings = [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines if line.get_ms() == 11]
    assert rings == [(0.1, 0.2), (0.01, 0.3)]
    crosses = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "x"]
    assert crosses == [[1.0], [1.0]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.01", "0.1", "1"]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_no_finite_loss_is_drawn_without_a_warning(value, recwarn):
    runs = np.full((2, 3), value)
    plots.plot_median_losses({"a": (np.arange(3), runs)}, 0.1).figure.canvas.draw()
    plots.plot_final_losses({"a": [value] * 2}, {"a": (value, value)}, 0.1).figure.canvas.draw()
    plots.plot_learning_rates({"a": {0.1: [value]}}, {"a": 0.1}).figure.canvas.draw()
    assert [str(warning.message) for warning in recwarn] == []
