"""The figures of a recurrent layer by time step, read from their artists."""

from __future__ import annotations

import math
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kerasgrad import GradientHistory, bptt, plots
from kerasgrad.bptt import Contributions, JacobianSpectrum


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    plt.close("all")
    yield
    plt.close("all")


def lines(ax) -> dict[str, plt.Line2D]:
    return {line.get_label(): line for line in ax.lines}


def legend_of(ax) -> list[str]:
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def y(line) -> list[float]:
    return np.asarray(line.get_ydata(), float).tolist()


def gaps(line) -> list[int]:
    return np.flatnonzero(np.isnan(np.asarray(line.get_ydata(), float))).tolist()


@pytest.fixture(scope="module")
def halving():
    """h_t = h_{t-1}/2 + x_t and L the mean of its first unit: ‖∂L/∂h_t‖ = .5^(T-t)/batch."""
    layer = keras.layers.SimpleRNN(
        3,
        activation="linear",
        recurrent_initializer=keras.initializers.Identity(0.5),
        name="halving",
    )
    model = keras.Sequential([keras.Input((5, 2)), layer])
    model.compile(loss=lambda y, y_pred: y_pred[:, 0])
    return model, np.ones((4, 5, 2)), np.zeros((4, 1))


# plot_state_gradients


def vectors(*lengths) -> np.ndarray:
    """(batch, 1, 2) gradients of these lengths: multiples of (3/5, 4/5)."""
    return np.array([[[0.6 * length, 0.8 * length]] for length in lengths])


def test_median_and_quartiles_of_the_norms():
    t_1, t_2 = vectors(4, 1, 3, 2), vectors(70, 10, 30, 50)
    ax = plots.plot_state_gradients({"h": np.concatenate([t_1, t_2], axis=1)})
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [1, 2]
    np.testing.assert_allclose(y(line), [2.5, 40])
    # A quarter of the four is one of them, three quarters are three.
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for t, lower, upper in ((1, 1, 3), (2, 10, 50)):
        at_t = corners[corners[:, 0] == t, 1]
        np.testing.assert_allclose([at_t.min(), at_t.max()], [lower, upper])
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "time step t of the sequence"
    assert ax.get_ylabel() == "‖∂L/∂s_t‖₂, median and quartiles\nover a batch of 4"
    assert legend_of(ax) == ["h"]


def test_a_line_and_a_band_for_each_state():
    ax = plots.plot_state_gradients({"h": np.ones((2, 3, 4)), "c": np.ones((2, 3, 1))})
    assert legend_of(ax) == ["h", "c"]
    assert y(lines(ax)["h"]) == [2, 2, 2]
    assert y(lines(ax)["c"]) == [1, 1, 1]
    assert len(ax.collections) == 2


def test_several_models_in_one_picture_can_be_told_apart():
    ax = plots.plot_state_gradients({"h": np.ones((2, 3, 4))}, label="RNN")
    assert plots.plot_state_gradients({"h": np.ones((2, 3, 4))}, ax, label="LSTM") is ax
    assert legend_of(ax) == ["RNN, h", "LSTM, h"]
    assert len({line.get_color() for line in ax.lines}) == 2
    assert len({line.get_linestyle() for line in ax.lines}) == 2


def test_one_array_of_gradients():
    assert legend_of(plots.plot_state_gradients(np.ones((2, 3, 4)))) == ["s"]
    assert legend_of(plots.plot_state_gradients(np.ones((2, 3, 4)), label="mine")) == ["mine"]


@pytest.mark.parametrize("size", [1e-200, 1e-310, 1e200])
def test_norms_whose_squares_are_out_of_range(size):
    """In float64 0.5^1000 is a number, its square is not."""
    ax = plots.plot_state_gradients({"h": size * vectors(5.0)})
    np.testing.assert_allclose(y(ax.lines[0]), [5 * size], rtol=1e-6)
    assert legend_of(ax) == ["h"]


def test_norms_off_the_scale_are_counted_and_hide_no_other():
    gradients = np.ones((4, 5, 1))
    gradients[0] = np.nan  # One broken example of four.
    gradients[1, 4] = -np.inf
    gradients[2:, 0] = 0
    ax = plots.plot_state_gradients({"h": gradients})
    assert legend_of(ax) == ["h (0 at 2, NaN or Inf at 6 of 20 norms)"]
    # t = 1: half of 0 and 1; t = 5: half of 1 and Inf.
    np.testing.assert_array_equal(y(ax.lines[0]), [0.5, 1, 1, 1, np.nan])
    assert ax.get_xlim()[1] > 5


def test_gradients_of_a_model(halving):
    model, x, target = halving
    ax = plots.plot_state_gradients(bptt.state_gradients(model, x, target))
    np.testing.assert_allclose(y(ax.lines[0]), [0.25 * 0.5 ** (5 - t) for t in range(1, 6)])


@pytest.mark.parametrize(
    ("gradients", "received"),
    [
        ({"h": np.ones((3, 4))}, "{'h': (3, 4)}"),
        (np.ones((3, 4)), "(3, 4)"),
        ({"h": np.ones((2, 3, 4)), "c": np.ones((0, 3, 4))}, "'c': (0, 3, 4)"),
        ({"h": np.ones((2, 0, 4))}, "(2, 0, 4)"),
        ({}, "{}"),
    ],
)
def test_gradients_of_another_shape(gradients, received):
    with pytest.raises(ValueError, match="batch, timesteps, units") as error:
        plots.plot_state_gradients(gradients)
    assert received in str(error.value)
    assert plt.get_fignums() == []


# plot_state_gradient_map


def record(norms, step=None, layer="rnn") -> GradientHistory:
    """A history with these (n, T) state norms."""
    n = len(norms)
    history = GradientHistory()
    history.append(
        weights=["w"],
        step=np.arange(n) if step is None else step,
        norms=np.ones((n, 1)),
        state_norms={layer: np.array(norms, float)},
    )
    return history


def image_of(ax) -> np.ma.MaskedArray:
    (image,) = ax.get_images()
    return image.get_array()


def cells_of(ax, what: str, steps, T) -> np.ndarray:
    """(n, T) bool: the centers that the patch of this kind covers; no patch, none."""
    patches = [patch for patch in ax.patches if patch.get_label().startswith(f"{what}:")]
    assert len(patches) <= 1
    return np.array(
        [
            [any(p.get_path().contains_point((step, t)) for p in patches) for t in range(1, T + 1)]
            for step in steps
        ]
    )


STRANGE = [
    [1e-3, 1e-2, 1e-1, 1],
    [0, 0, 1e-5, 1],
    [np.inf, 1, 0, np.inf],
    [1, 10, np.nan, np.nan],
    [np.nan, np.nan, np.nan, np.nan],
    [np.nan, np.nan, 1, 1],
]


def test_a_cell_of_the_map_is_the_logarithm_of_its_norm():
    ax = plots.plot_state_gradient_map(record(STRANGE))
    shown = image_of(ax)
    assert shown.shape == (4, 6)  # Rows are time steps.
    for row, values in enumerate(STRANGE):
        for t, value in enumerate(values):
            if 0 < value < math.inf:
                assert shown[t, row] == pytest.approx(math.log10(value))
            else:
                assert shown.mask[t, row]
    assert ax.get_xlabel() == "optimizer step"
    assert ax.get_ylabel() == "time step t of rnn"
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    assert bar.get_ylabel() == "log₁₀ ‖∂L/∂s_t‖₂, mean over the batch"


def test_what_has_no_logarithm_has_a_colour_of_its_own():
    ax = plots.plot_state_gradient_map(record(STRANGE))
    # What follows the last number of a row is no step of that sequence.
    assert legend_of(ax) == ["0: 3", "Inf: 2", "NaN: 6", "no such t: 2"]
    assert ax.get_legend().get_title().get_text() == "of 24 norms"
    norms = np.array(STRANGE)
    no_such = np.zeros((6, 4), bool)
    no_such[3, 2:] = True
    expected = {
        "0": norms == 0,
        "Inf": np.isinf(norms),
        "NaN": np.isnan(norms) & ~no_such,
        "no such t": no_such,
    }
    for what, cells in expected.items():
        np.testing.assert_array_equal(cells_of(ax, what, range(6), 4), cells, err_msg=what)
    # Each of another colour, and of another hatch where the picture is grey.
    assert len({patch.get_hatch() for patch in ax.patches}) == 4
    colors = {patch.get_facecolor() for patch in ax.patches}
    assert len(colors | {image.cmap(0.0) for image in ax.get_images()}) == 4


def test_no_legend_where_all_have_a_logarithm():
    ax = plots.plot_state_gradient_map(record([[1, 2], [3, 4]]))
    assert ax.get_legend() is None
    assert not ax.patches


def test_the_cells_lie_at_their_steps_and_times():
    """Steps 10, 20 and 40: each cell reaches half of the way to its neighbours."""
    norms = [[1, 2, 3], [0, 5, 6], [7, 8, 9]]
    ax = plots.plot_state_gradient_map(record(norms, step=[10, 20, 40]))
    (image,) = ax.get_images()
    assert list(image.get_extent()) == [5, 50, 0.5, 3.5]
    assert (ax.get_xlim(), ax.get_ylim()) == ((5, 50), (0.5, 3.5))
    (zero,) = ax.patches
    box = zero.get_path().get_extents()
    assert [box.x0, box.x1, box.y0, box.y1] == [15, 30, 0.5, 1.5]


def test_steps_that_begin_again_are_drawn_by_row():
    """Two fits, each with an optimizer of its own: cells would lie over each other."""
    ax = plots.plot_state_gradient_map(record([[1, 2]] * 4, step=[0, 1, 0, 1]))
    assert ax.get_xlabel() == "row of the record"
    assert ax.get_xlim() == (-0.5, 3.5)


def test_many_steps_share_columns_and_lose_nothing():
    n, T = 1001, 3
    norms = np.full((n, T), 1e-4)
    norms[::7] = 1e-2
    norms[500, 0], norms[700, 1] = np.inf, np.nan
    norms[:9, 2] = 0
    ax = plots.plot_state_gradient_map(record(norms))
    shown = image_of(ax)
    assert shown.shape == (T, 334)  # 1001 / 3, rounded up
    assert ax.get_xlabel() == "optimizer step, each column the largest of 3"
    assert legend_of(ax) == ["0: 9", "Inf: 1", "NaN: 1"]
    for column in range(334):
        block = norms[3 * column : 3 * column + 3, 0]
        if np.isfinite(block).all():
            assert shown[0, column] == pytest.approx(math.log10(max(block)))
    centers = 3 * np.arange(334) + 1
    assert np.argwhere(cells_of(ax, "Inf", centers, T)).tolist() == [[500 // 3, 0]]
    assert np.argwhere(cells_of(ax, "NaN", centers, T)).tolist() == [[700 // 3, 1]]
    assert np.argwhere(cells_of(ax, "0", centers, T)).tolist() == [[0, 2], [1, 2], [2, 2]]


@pytest.mark.parametrize(
    ("layer", "name", "largest"),
    [
        ("rnn", "rnn", 0.0),  # The training's own, of the layer that has both.
        ("rnn:h", "rnn:h", 1.0),
        ("gru", "gru:h", 2.0),  # It has but one state.
        ("lstm:c", "lstm:c", 4.0),
    ],
)
def test_which_state_norms_are_drawn(layer, name, largest):
    history = record([[1, 1], [1, 1]])
    probes = {"rnn:h": 1e1, "gru:h": 1e2, "lstm:h": 1e3, "lstm:c": 1e4}
    for step in (5, 15):
        states = {key: np.full(2, value) for key, value in probes.items()}
        history.append_probe(step=step, state_norms=states)
    ax = plots.plot_state_gradient_map(history, layer=layer)
    assert image_of(ax).max() == largest
    assert ax.get_ylabel() == f"time step t of {name}"
    of_probe = ":" in name
    assert ax.get_xlim() == ((0, 20) if of_probe else (-0.5, 1.5))
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    assert bar.get_ylabel().endswith("mean over the probe" if of_probe else "mean over the batch")


@pytest.mark.parametrize("layer", [None, "lstm", "other", "lstm:x"])
def test_state_norms_of_no_or_of_which_state(layer):
    history = GradientHistory()
    history.append_probe(step=5, state_norms={"lstm:h": np.ones(2), "lstm:c": np.ones(2)})
    with pytest.raises(ValueError, match="Expected the path of one recurrent layer") as error:
        plots.plot_state_gradient_map(history, layer=layer)
    received = f"Received: layer={layer!r}; the record has ['lstm:h', 'lstm:c']"
    assert received in str(error.value)
    assert plt.get_fignums() == []


def test_a_record_without_rows_has_no_state_norms_to_draw():
    history = record([[1, 2]])
    history.truncate(0)
    with pytest.raises(ValueError, match=r"the record has \[\]"):
        plots.plot_state_gradient_map(history)
    assert not plots.plot_compared_state_norms({"a": history}).lines


# plot_contributions


def shares(by_lag=True, **norms) -> Contributions:
    """One 1x2 share for each norm, of weights of one cell."""
    return Contributions(
        {
            f"model/rnn/cell/{name}": np.array([[[0.6 * v, 0.8 * v]] for v in values])
            for name, values in norms.items()
        },
        by_lag=by_lag,
    )


def test_the_norms_of_the_shares_by_time_step():
    contributions = shares(by_lag=False, kernel=[1, 2, 4], bias=[8, 0, 2])
    ax = plots.plot_contributions(contributions)
    assert legend_of(ax) == ["kernel", "bias (0 at 1 of 3 t)"]
    assert ax.get_legend().get_title().get_text() == "model/rnn/cell"
    assert lines(ax)["kernel"].get_xdata().tolist() == [1, 2, 3]
    np.testing.assert_allclose(y(lines(ax)["kernel"]), [1, 2, 4])
    np.testing.assert_allclose(y(lines(ax)["bias (0 at 1 of 3 t)"]), [8, np.nan, 2])
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "time step t of the sequence"
    assert ax.get_ylabel() == "‖G_t‖₂, share of time step t in ∂L/∂w"
    assert len(ax.lines) == 2


def test_by_lag_the_horizon_is_marked():
    """Of 16 in all, 90 % are 14.4: 8 + 4 + 2 are not enough. Of 10, they are 9."""
    contributions = shares(kernel=[8, 4, 2, 2], bias=[9, 0.5, 0.5, 0])
    ax = plots.plot_contributions(contributions)
    kernel, bias = "kernel, 90 % within lag 3", "bias, 90 % within lag 0 (0 at 1 of 4 ℓ)"
    assert legend_of(ax) == [kernel, bias]
    assert lines(ax)[kernel].get_xdata().tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(y(lines(ax)[kernel]), [8, 4, 2, 2])
    for label, lag in ((kernel, 3), (bias, 0)):
        line = lines(ax)[label]
        (mark,) = (
            other
            for other in ax.lines
            if other is not line and other.get_color() == line.get_color()
        )
        assert list(mark.get_xdata()) == [lag, lag]
        assert mark.get_linestyle() == line.get_linestyle()
    assert ax.get_xlabel().startswith("lag ℓ")
    assert ax.get_ylabel() == "‖G_ℓ‖₂, share of lag ℓ in ∂L/∂w"


@pytest.mark.parametrize("weight", ["recurrent_kernel", "model/rnn/cell/recurrent_kernel"])
def test_one_weight_by_its_path_or_its_end(weight):
    contributions = shares(by_lag=False, kernel=[1, 1], recurrent_kernel=[2, 2])
    ax = plots.plot_contributions(contributions, weight=weight)
    assert legend_of(ax) == ["recurrent_kernel"]
    np.testing.assert_allclose(y(ax.lines[0]), [2, 2])
    # "kernel" is the end of one path, not of both.
    assert legend_of(plots.plot_contributions(contributions, weight="kernel")) == ["kernel"]


def test_weights_of_several_cells_are_told_apart_by_what_differs():
    weights = {f"rnn/cell_{i}/kernel": np.ones((2, 1)) for i in range(2)}
    contributions = Contributions(weights, by_lag=False)
    ax = plots.plot_contributions(contributions)
    assert legend_of(ax) == ["cell_0/kernel", "cell_1/kernel"]
    with pytest.raises(ValueError, match="one weight") as error:
        plots.plot_contributions(contributions, weight="kernel")
    assert "weight='kernel'; the contributions have ['rnn/cell_0/kernel'," in str(error.value)


def test_shares_that_are_not_finite_have_no_horizon():
    ax = plots.plot_contributions(shares(kernel=[1, np.nan, np.inf], bias=[0, 0, 0]))
    assert legend_of(ax) == ["kernel (NaN or Inf at 2 of 3 ℓ)", "bias (0 at 3 of 3 ℓ)"]
    assert len(ax.lines) == 2
    assert lines(ax)["kernel (NaN or Inf at 2 of 3 ℓ)"].get_marker() == "o"  # A lone point


def test_contributions_of_a_model(halving):
    """Constant input: the share of lag ℓ in ∂L/∂b is the ℓ-th power of a half."""
    model, x, target = halving
    contributions = bptt.step_contributions(model, x, target, by_lag=True)
    ax = plots.plot_contributions(contributions, weight="bias")
    np.testing.assert_allclose(y(ax.lines[-1]), [0.5**lag for lag in range(5)])
    # 31/16 in all: 1 + 1/2 + 1/4 = 28/16 are 90.3 %.
    assert legend_of(ax) == ["bias, 90 % within lag 2"]


# plot_jacobian_spectrum


def spectrum(*singular_values, steps=None) -> JacobianSpectrum:
    """Of arrays (k, n), one an example."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.array(singular_values, float))
    return JacobianSpectrum(np.arange(1, logs.shape[1] + 1) if steps is None else steps, logs)


def test_largest_median_and_smallest_of_the_singular_values():
    e = math.e
    one = [[e**3, e, e**-1], [e**6, e**2, e**-2]]
    two = [[e**5, e, e**-3], [e**8, e**2, e**-4]]
    ax = plots.plot_jacobian_spectrum(spectrum(one, two, steps=np.array([10, 20])))
    labels = ["largest: 7 at t = 20", "median: 2 at t = 20", "smallest: -3 at t = 20"]
    assert legend_of(ax) == labels
    for label, expected in zip(labels, ([4, 7], [1, 2], [-2, -3]), strict=True):
        assert lines(ax)[label].get_xdata().tolist() == [10, 20]
        np.testing.assert_allclose(y(lines(ax)[label]), expected)
    assert ax.get_yscale() == "linear"  # They are logarithms already.
    assert ax.get_xlabel() == "time step t of the sequence"
    assert ax.get_ylabel() == "ln of the singular values of J_t···J_1,\nmedian over the batch"


def test_all_singular_values_are_thin_lines():
    values = np.exp(np.arange(12.0)[::-1].reshape(2, 6))
    ax = plots.plot_jacobian_spectrum(spectrum(values))
    thin = [line for line in ax.lines if line.get_linewidth() == 0.5]
    np.testing.assert_allclose(np.transpose([y(line) for line in thin]), np.log(values))
    assert legend_of(ax)[0] == "all 6"
    # Of an even number, the median lies between the middle two.
    np.testing.assert_allclose(y(lines(ax)["median: 2.5 at t = 2"]), [8.5, 2.5])


@pytest.mark.parametrize(("n", "names"), [(1, ["largest"]), (2, ["largest", "smallest"])])
def test_few_singular_values_are_drawn_once(n, names):
    ax = plots.plot_jacobian_spectrum(spectrum(np.ones((3, n))))
    assert [text.partition(":")[0] for text in legend_of(ax)] == names


def test_singular_values_of_zero_are_counted():
    """A ReLU layer's Jacobian is 0 in what is off: ln 0 is nowhere on the axis."""
    values = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, np.nan]]
    ax = plots.plot_jacobian_spectrum(spectrum(values))
    assert legend_of(ax) == [
        "all 4 (0 at 8, NaN or Inf at 1 of 12 values)",
        "largest: -inf at t = 3 (0 at 1 of 3 values)",
        "median: -inf at t = 3 (0 at 3 of 3 values)",
        "smallest: nan at t = 3 (0 at 2, NaN or Inf at 1 of 3 values)",
    ]
    assert gaps(lines(ax)["largest: -inf at t = 3 (0 at 1 of 3 values)"]) == [2]


def test_the_line_of_the_largest_exponent():
    ax = plots.plot_jacobian_spectrum(
        spectrum(np.ones((4, 2))), lyapunov_exponents=np.array([-0.25, -2])
    )
    line = lines(ax)["λ₁·t, λ₁ = -0.25 nats a step"]
    assert (list(line.get_xdata()), y(line)) == ([0, 4], [0, -1])
    ax = plots.plot_jacobian_spectrum(
        spectrum(np.ones((4, 2))), lyapunov_exponents=np.array([-np.inf, -np.inf])
    )
    assert gaps(lines(ax)["λ₁·t, λ₁ = -inf nats a step"]) == [0, 1]


def test_spectrum_of_a_model(halving):
    model, x, _ = halving
    ax = plots.plot_jacobian_spectrum(
        bptt.jacobian_spectrum(model, x), lyapunov_exponents=bptt.lyapunov_exponents(model, x)
    )
    for label, line in lines(ax).items():
        if not label.startswith("_"):
            expected = np.asarray(line.get_xdata()) * math.log(0.5)
            np.testing.assert_allclose(y(line), expected, rtol=1e-5, err_msg=label)
    assert len(legend_of(ax)) == 4


# plot_saturation


def test_units_are_sorted_by_their_saturation():
    ax = plots.plot_saturation({"forget": [0.25, 1, 0, 0.75], "c": [0.5]})
    assert legend_of(ax) == ["forget, mean 50 %", "c, mean 50 %"]
    forget, c = (patch.get_data() for patch in ax.patches)
    assert forget.values.tolist() == [1, 0.75, 0.25, 0]
    # Layers of different sizes share the axis.
    assert forget.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert (c.values.tolist(), c.edges.tolist()) == ([0.5], [0, 1])
    assert ax.get_xlabel() == "share of the units, the most saturated first"
    assert "share of examples and time steps" in ax.get_ylabel()
    assert not any(patch.get_fill() for patch in ax.patches)
    # Both ends can be seen.
    assert ax.get_ylim()[0] < 0 < 1 < ax.get_ylim()[1]


def test_saturations_that_are_not_known_are_counted():
    ax = plots.plot_saturation({"h": [np.nan, 0.5, 0.1, np.nan], "c": [np.nan]})
    assert legend_of(ax) == [
        "h, mean 30 % (NaN or Inf at 2 of 4 units)",
        "c, mean unknown (NaN or Inf at 1 of 1 units)",
    ]
    assert ax.patches[0].get_data().edges.tolist() == [0, 0.25, 0.5]


def test_where_nothing_can_saturate_the_axes_say_so():
    ax = plots.plot_saturation({})
    assert [text.get_text() for text in ax.texts] == ["no activation that saturates"]
    assert ax.get_legend() is None


# What all have in common


def _spectrum_of(gradients):
    with np.errstate(all="ignore"):
        logs = np.sort(np.log(np.abs(gradients)))[..., ::-1]
    return JacobianSpectrum(np.arange(1, gradients.shape[1] + 1), logs)


def _draw_all(gradients, axes):
    """Each figure of this file from (batch, T, units) numbers."""
    whole = np.abs(gradients)
    plots.plot_state_gradients({"h": gradients}, axes[0])
    plots.plot_state_gradient_map(record(whole[:, :, 0]), axes[1])
    plots.plot_contributions(Contributions({"a/w": gradients[0]}, by_lag=True), axes[2])
    plots.plot_contributions(Contributions({"a/w": gradients[0]}, by_lag=False), axes[3])
    plots.plot_jacobian_spectrum(
        _spectrum_of(gradients), axes[4], lyapunov_exponents=gradients[0, 0]
    )
    plots.plot_saturation({"h": whole[0, 0]}, axes[5])
    plots.plot_state_norms(record(whole[:, :, 0]), axes[6])


NAMES = [
    "state gradients",
    "map",
    "contributions by lag",
    "contributions",
    "spectrum",
    "saturation",
    "state norms",
]


def test_axes_in_axes_out():
    figure, axes = plt.subplots(2, 4, layout="constrained")
    _draw_all(np.random.default_rng(0).lognormal(0, 1, (3, 4, 5)), axes.flat)
    for name, ax in zip(NAMES, axes.flat, strict=False):
        assert ax.lines or ax.patches or ax.images, name
        assert ax.get_xlabel() and ax.get_ylabel(), name
    assert not axes.flat[7].lines
    assert plt.get_fignums() == [figure.number]


def test_new_axes_where_none_are_given():
    current = plt.subplots()[1]
    _draw_all(np.ones((3, 4, 5)), [None] * 7)
    assert not current.lines
    assert len(plt.get_fignums()) == 8


def test_time_steps_are_whole_numbers():
    """One time step: around it, Matplotlib would put 0.98 and 1.02."""
    ax = plots.plot_state_gradients(np.ones((2, 1, 3)))
    assert all(tick == round(tick) for tick in ax.get_xticks())
    logarithmic = plt.subplots()[1]
    logarithmic.set_xscale("log")
    assert plots.plot_state_gradients(np.ones((2, 9, 3)), logarithmic).get_xscale() == "log"


CELLS = st.sampled_from([0.0, 1.0, -2.5, 1e-320, 1e50, math.inf, -math.inf, math.nan])


@st.composite
def strange_arrays(draw):
    """(batch, timesteps, units) of whatever a broken training leaves behind."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5)))
    if draw(st.booleans()):
        return np.full(shape, draw(CELLS))
    count = math.prod(shape)
    return np.reshape(draw(st.lists(CELLS, min_size=count, max_size=count)), shape)


@settings(max_examples=6, deadline=None)
@given(strange_arrays())
@example(np.zeros((2, 3, 4)))
@example(np.full((2, 3, 4), np.nan))
@example(np.full((1, 1, 1), np.inf))
def test_nothing_strange_raises_or_warns(gradients):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, axes = plt.subplots(2, 4)
        _draw_all(gradients, axes.flat)
        figure.canvas.draw()
    assert all(ax.get_xlabel() for ax in axes.flat[:7])
    plt.close(figure)
