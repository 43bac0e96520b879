"""The figures of a record, read from their artists: what is drawn is what the record holds."""

from __future__ import annotations

import statistics
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kerasgrad import Finding, GradientHistory, diagnose, plots

N, T = 60, 7


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    plt.close("all")
    yield
    plt.close("all")


def record(*, n=N, clipped=True, seed=0, **columns) -> GradientHistory:
    """A history of two weights and one layer; every second step clipped to a half."""
    rng = np.random.default_rng(seed)
    factor = np.where(np.arange(n) % 2, 0.5, 1.0) if clipped else np.ones(n)
    norms = rng.lognormal(0, 2, (n, 2))
    norms = columns.pop("norms", norms)
    history = GradientHistory()
    history.append(
        weights=["model/rnn/kernel", "model/rnn/bias"],
        step=1000 + np.arange(n),
        norms=norms,
        applied_norms=norms * factor[:, np.newaxis],
        clip_factor=factor,
        **{
            "loss": rng.lognormal(0, 1, n),
            "state_norms": {"model/rnn": rng.lognormal(-3, 2, (n, T))},
        }
        | columns,
    )
    return history


def lines(ax) -> dict[str, plt.Line2D]:
    return {line.get_label(): line for line in ax.lines}


def legend_of(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def assert_line(line, x, y) -> None:
    """That the line goes through these points; what has no place on a log scale is a gap."""
    np.testing.assert_array_equal(line.get_xdata(), x)
    np.testing.assert_allclose(line.get_ydata(), np.where(np.greater(y, 0), y, np.nan), rtol=1e-12)


# Axes in, axes out


def _of_one(draw):
    return lambda ax=None: draw(record(), ax)


ONE_AXES = {
    "norms": _of_one(plots.plot_norms),
    "weight norms": _of_one(plots.plot_weight_norms),
    "loss": _of_one(plots.plot_loss),
    "state norms": _of_one(plots.plot_state_norms),
    "compared losses": lambda ax=None: plots.plot_compared_losses({"a": record()}, 1.0, ax),
    "compared state norms": lambda ax=None: plots.plot_compared_state_norms({"a": record()}, ax),
}


@pytest.mark.parametrize("draw", ONE_AXES.values(), ids=ONE_AXES.keys())
def test_axes_in_axes_out(draw):
    figure, (left, right) = plt.subplots(1, 2)
    assert draw(ax=right) is right
    assert right.lines and not left.lines
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("draw", ONE_AXES.values(), ids=ONE_AXES.keys())
def test_new_axes_where_none_are_given(draw):
    """Drawing into the current axes would put two figures over each other."""
    current = plt.subplots()[1]
    first, second = draw(), draw()
    assert len({current, first, second}) == 3
    assert not current.lines
    assert len(plt.get_fignums()) == 3


@pytest.mark.parametrize("draw", ONE_AXES.values(), ids=ONE_AXES.keys())
def test_log_scale_and_labels(draw):
    ax = draw()
    assert ax.get_yscale() == "log"
    assert ax.get_xscale() == "linear"
    assert ax.get_xlabel() and ax.get_ylabel()
    ax.figure.canvas.draw()


# plot_norms


def test_norms_before_and_after_clipping():
    history = record()
    ax = plots.plot_norms(history)
    drawn = lines(ax)
    assert list(drawn) == ["before clipping", "after clipping"] == legend_of(ax)
    norms = np.sqrt((history.norms**2).sum(axis=1))
    assert_line(drawn["before clipping"], 1000 + np.arange(N), norms)
    assert_line(drawn["after clipping"], 1000 + np.arange(N), norms * np.tile([1, 0.5], N // 2))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "global gradient norm")


def test_no_line_after_clipping_where_nothing_was_clipped():
    ax = plots.plot_norms(record(clipped=False))
    assert legend_of(ax) == list(lines(ax)) == ["before clipping"]


def test_the_line_after_clipping_joins_the_updates():
    """Gradient accumulation: a micro-step is no update, and a gap at each would leave no line."""
    updated = np.arange(N) % 2 == 1
    history = record(updated=updated)
    line = lines(plots.plot_norms(history))["after clipping"]
    assert_line(line, history.step[updated], history.global_norm[updated] / 2)


def test_norms_that_are_nan_or_inf_are_crosses_at_their_steps():
    norms = np.ones((N, 2))
    norms[10, 0], norms[40, 1] = np.nan, np.inf
    ax = plots.plot_norms(record(norms=norms))
    crosses = lines(ax)["NaN or Inf"]
    assert crosses.get_xdata().tolist() == [1010, 1040]
    assert (crosses.get_marker(), crosses.get_linestyle()) == ("x", "None")
    assert "NaN or Inf" in legend_of(ax)
    # At the upper edge whatever the scale: y is in parts of the axes' height.
    assert crosses.get_transform() == ax.get_xaxis_transform()
    assert (np.abs(crosses.get_ydata() - 0.95) < 0.05).all()
    before = lines(ax)["before clipping"].get_ydata()
    assert np.flatnonzero(np.isnan(before)).tolist() == [10, 40]


def test_finite_norms_have_no_crosses():
    assert "NaN or Inf" not in lines(plots.plot_norms(record()))


def test_a_norm_of_zero_is_a_gap_and_a_triangle_at_its_step():
    norms = np.ones((N, 2))
    norms[5] = 0.0
    ax = plots.plot_norms(record(norms=norms))
    drawn = lines(ax)
    assert np.flatnonzero(np.isnan(drawn["before clipping"].get_ydata())).tolist() == [5]
    assert "NaN or Inf" not in drawn
    triangle = drawn["0"]
    assert triangle.get_xdata().tolist() == [1005]
    assert (triangle.get_marker(), triangle.get_linestyle()) == ("v", "None")
    # At the lower edge whatever the scale.
    assert triangle.get_transform() == ax.get_xaxis_transform()
    assert 0 < triangle.get_ydata()[0] < 0.1
    assert "0" in legend_of(ax)


def test_a_step_alone_between_two_gaps_can_be_seen():
    """A line needs two points: 0 at every second step would leave nothing but the triangles."""
    norms = np.ones((N, 2))
    norms[::2] = 0.0
    norms[58] = 1.0
    line = lines(plots.plot_norms(record(norms=norms)))["before clipping"]
    assert line.get_marker() == "o"
    assert line.get_markevery() == list(range(1, 57, 2))


def test_a_gap_at_the_beginning_is_inside_of_the_axes():
    norms = np.ones((N, 2))
    norms[:40] = np.nan
    left, right = plots.plot_norms(record(norms=norms)).get_xlim()
    assert left < 1000
    assert right > 1000 + N - 1


# plot_weight_norms


def test_a_line_for_each_weight():
    history = record()
    ax = plots.plot_weight_norms(history)
    assert list(lines(ax)) == ["model/rnn/kernel", "model/rnn/bias"] == legend_of(ax)
    for column, path in enumerate(history.weights):
        assert_line(lines(ax)[path], history.step, history.norms[:, column])
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 2
    assert ax.get_ylabel() == "gradient norm before clipping"


def test_a_weight_without_gradient_is_a_gap_and_no_cross():
    missing = np.zeros((N, 2), bool)
    missing[:20, 1] = True
    norms = np.where(missing, np.nan, 1.0)
    drawn = lines(plots.plot_weight_norms(record(norms=norms, missing=missing)))
    assert np.isnan(drawn["model/rnn/bias"].get_ydata()[:20]).all()
    assert_line(drawn["model/rnn/kernel"], 1000 + np.arange(N), np.ones(N))
    assert "NaN or Inf" not in drawn


def test_norms_of_zero_are_counted_in_the_label_of_their_weight():
    norms = np.ones((N, 2))
    norms[:7, 1] = 0.0
    drawn = lines(plots.plot_weight_norms(record(norms=norms), average=10))
    assert list(drawn) == ["model/rnn/kernel", "model/rnn/bias (0 at 7 of 60 steps)"]


def test_many_weights_can_be_told_apart():
    history = GradientHistory()
    history.append(weights=[f"w{i}" for i in range(20)], step=[0, 1], norms=np.ones((2, 20)))
    ax = plots.plot_weight_norms(history)
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 20


# Averages


@pytest.mark.parametrize("n", [60, 63, 69])  # 63, 69: the last block is not whole
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_averages_are_plain_means_at_the_last_step_of_each_block(n, dtype):
    rng = np.random.default_rng(1)
    history = record(
        n=n,
        loss=rng.lognormal(0, 1, n).astype(dtype),
        norms=rng.lognormal(0, 1, (n, 2)).astype(dtype),
    )
    steps = [1009, 1019, 1029, 1039, 1049, 1059]

    def means(values):
        return [sum(map(float, values[i : i + 10])) / 10 for i in range(0, 60, 10)]

    ax = plots.plot_loss(history, average=10)
    assert_line(ax.lines[0], steps, means(history.loss))
    assert ax.get_ylabel() == "loss of the batch, mean of 10 steps"
    ax = plots.plot_weight_norms(history, average=10)
    for column, line in enumerate(ax.lines):
        assert_line(line, steps, means(history.norms[:, column]))
    assert ax.get_ylabel().endswith(", mean of 10 steps")


def test_a_mean_over_a_nan_is_a_gap_and_its_steps_are_crosses():
    loss = np.ones(N)
    loss[[13, 14]] = np.inf, np.nan
    ax = plots.plot_loss(record(loss=loss), average=10)
    line, crosses = ax.lines
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [1]
    assert crosses.get_xdata().tolist() == [1013, 1014]


def test_a_mean_of_large_float32_losses_is_finite():
    """A loss that explodes: the sum of 25 is beyond float32, the mean is not."""
    loss = np.full(50, 1e38, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = plots.plot_loss(record(n=50, loss=loss), average=25)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 1e38, rtol=1e-6)


def test_fewer_steps_than_the_average_are_drawn_as_they_are():
    history = record(n=5)
    assert_line(plots.plot_loss(history, average=25).lines[0], history.step, history.loss)


# plot_loss


def test_loss_line_its_label_and_style():
    history = record()
    ax = plots.plot_loss(history, label="mine", color="#123456", ls=":")
    (line,) = ax.lines
    assert_line(line, history.step, history.loss)
    assert (line.get_label(), line.get_color(), line.get_linestyle()) == ("mine", "#123456", ":")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "loss of the batch")


def test_a_loss_that_is_nan_is_a_cross_in_the_colour_of_its_line():
    loss = np.ones(N)
    loss[[3, 59]] = np.nan, np.inf
    line, crosses = plots.plot_loss(record(loss=loss), color="red").lines
    assert crosses.get_xdata().tolist() == [1003, 1059]
    assert crosses.get_marker() == "x"
    assert crosses.get_color() == line.get_color() == "red"


def test_a_loss_without_a_name_explains_its_marks():
    loss = np.ones(N)
    loss[[3, 7]] = np.nan, 0
    ax = plots.plot_loss(record(loss=loss))
    assert legend_of(ax) == ["NaN or Inf", "0"]
    assert lines(ax)["0"].get_xdata().tolist() == [1007]
    assert plots.plot_loss(record()).get_legend() is None
    # With a name, the legend is the caller's, who may draw more lines.
    assert plots.plot_loss(record(loss=loss), label="mine").get_legend() is None


def test_losses_below_zero_are_drawn_on_a_linear_scale():
    """A negative log likelihood of a density: a log scale would leave out what is below 0."""
    loss = np.linspace(2, -3, N)
    loss[9] = 0.0
    ax = plots.plot_loss(record(loss=loss))
    assert ax.get_yscale() == "linear"
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_ydata(), loss)
    # Beside another, whose losses are all above 0.
    plots.plot_loss(record(), ax)
    assert ax.get_yscale() == "linear"


# plot_state_norms


@pytest.mark.parametrize(("last", "n"), [(100, 60), (10, 60), (1, 60)])
def test_state_norms_are_the_median_of_the_last_steps(last, n):
    history = record(n=n)
    ax = plots.plot_state_norms(history, last=last)
    rows = history.state_norms["model/rnn"][max(0, n - last) :]
    medians = [statistics.median(column) for column in rows.T.tolist()]
    assert_line(ax.lines[0], range(1, T + 1), medians)
    assert ax.get_xlabel() == "time step t of the sequence"
    assert ax.get_ylabel() == (
        f"‖∂L/∂s_t‖₂, mean over the batch,\nmedian of the last {min(last, n)} optimizer steps"
    )
    assert legend_of(ax) == ["model/rnn"]


def test_state_norms_of_a_named_layer():
    norms = {"a": np.full((N, T), 1.0), "b": np.full((N, T), 2.0)}
    ax = plots.plot_state_norms(record(state_norms=norms), layer="b", label="mine")
    assert_line(ax.lines[0], range(1, T + 1), np.full(T, 2.0))
    assert legend_of(ax) == ["mine"]


def test_state_norms_off_the_scale_are_counted_in_the_legend():
    norms = np.ones((N, T))
    norms[:, :2] = 0.0, np.inf
    ax = plots.plot_state_norms(record(state_norms={"rnn": norms}))
    assert legend_of(ax) == ["rnn (0 at 1, NaN or Inf at 1 of 7 t)"]
    assert np.isnan(ax.lines[0].get_ydata()[:2]).all()


def test_the_one_time_step_left_can_be_seen():
    norms = np.zeros((N, T))
    norms[:, -1] = 1.0
    (line,) = plots.plot_state_norms(record(state_norms={"rnn": norms})).lines
    assert line.get_marker() == "o"


def test_state_norms_of_the_probe_where_the_layer_has_no_other():
    history = record(state_norms={})
    for step in (1000, 1010, 1020):
        history.append_probe(step=step, state_norms={"lstm:c": np.full(T, step / 1000)})
    ax = plots.plot_state_norms(history)
    assert_line(ax.lines[0], range(1, T + 1), np.full(T, 1.01))
    assert legend_of(ax) == ["lstm:c"]
    assert ax.get_ylabel().endswith("\nmedian of the last 3 probes")


def test_the_label_of_state_norms_holds_for_each_line():
    probed = record(state_norms={})
    for step in (1000, 1010, 1020):
        probed.append_probe(step=step, state_norms={"lstm:c": np.ones(T)})
    ax = plots.plot_state_norms(record())
    for history, moments in (
        (probed, "60 optimizer steps or 3 probes"),
        (record(n=21), "21 to 60 optimizer steps or 3 probes"),
        (record(n=40), "21 to 60 optimizer steps or 3 probes"),
    ):
        plots.plot_state_norms(history, ax)
        assert ax.get_ylabel() == (
            f"‖∂L/∂s_t‖₂, mean over the batch,\nmedian of the last {moments}"
        )


@pytest.mark.parametrize(
    ("layers", "layer", "received"),
    [
        ([], None, "layer=None; the record has []"),
        (["a", "b"], None, "layer=None; the record has ['a', 'b']"),
        (["a"], "c", "layer='c'; the record has ['a']"),
    ],
)
def test_state_norms_of_no_or_of_which_layer(layers, layer, received):
    history = record(state_norms={path: np.ones((N, T)) for path in layers})
    with pytest.raises(ValueError, match="Expected the path of one recurrent layer") as error:
        plots.plot_state_norms(history, layer=layer)
    assert received in str(error.value)
    assert plt.get_fignums() == []  # An empty figure would be shown in a notebook.


# Several trainings


def test_compared_losses():
    histories = {name: record(seed=seed) for seed, name in enumerate(["one", "two"])}
    ax = plots.plot_compared_losses(histories, 0.25)
    assert legend_of(ax) == ["one", "two", "constant answer, 0.25"]
    drawn = lines(ax)
    assert set(drawn["constant answer, 0.25"].get_ydata()) == {0.25}
    for name, history in histories.items():
        means = [history.loss[:25].mean(), history.loss[25:50].mean()]
        assert_line(drawn[name], [1024, 1049], means)
    assert drawn["one"].get_color() != drawn["two"].get_color()
    ax.figure.canvas.draw()
    beside = ax.get_legend().get_window_extent()
    assert ax.get_window_extent().x1 <= beside.x0 < beside.x1 <= ax.figure.bbox.x1


def test_one_explosion_does_not_flatten_the_other_losses():
    exploding = record(loss=np.logspace(0, 30, N))
    ax = plots.plot_compared_losses({"bad": exploding, "good": record(loss=np.ones(N))}, 0.5)
    assert ax.get_ylim()[1] <= 1e3 * 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_compared_norms_are_one_axes_each_on_common_scales(count):
    histories = {f"remedy {i}": record(seed=i) for i in range(count)}
    axes = plots.plot_compared_norms(histories)
    assert [ax.get_title() for ax in axes] == list(histories)
    (figure,) = {ax.figure for ax in axes}
    assert figure.axes == list(axes)  # Places left over in the grid are no empty axes.
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in axes}) == 1
    figure.canvas.draw()
    # The steps are written below each column, be its last row another's or not.
    lowest = [i + 3 >= count for i in range(count)]
    assert [bool(ax.get_xlabel()) for ax in axes] == lowest
    assert [any(t.get_visible() for t in ax.get_xticklabels()) for ax in axes] == lowest
    for ax, history in zip(axes, histories.values(), strict=True):
        assert_line(lines(ax)["before clipping"], history.step, history.global_norm)
        assert ax.get_yscale() == "log"


def test_compared_state_norms_leave_out_what_has_none():
    histories = {"a": record(), "lstm": record(state_norms={}), "c": record(seed=3)}
    ax = plots.plot_compared_state_norms(histories)
    assert legend_of(ax) == ["a", "c"]
    for name in ("a", "c"):
        median = np.median(histories[name].state_norms["model/rnn"], axis=0)
        assert_line(lines(ax)[name], range(1, T + 1), median)


def test_compared_state_norms_of_a_training_with_two_layers():
    """A Bidirectional has a layer for each direction."""
    both = {"forward": np.full((N, T), 1.0), "backward": np.full((N, T), 2.0)}
    ax = plots.plot_compared_state_norms({"one": record(), "two": record(state_norms=both)})
    assert legend_of(ax) == ["one", "two, forward", "two, backward"]
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 3


# plot_diagnosis


def finding(kind, steps, severity="warning", where="all weights") -> Finding:
    return Finding(kind, severity, where, steps, evidence="2 > 1", advice="pass")


FINDINGS = [
    finding("non_finite", (1040, 1059), severity="error", where="model/rnn/kernel"),
    finding("exploding", (1030, 1030)),
]


def test_each_finding_is_a_bar_from_its_first_to_its_last_step():
    strip = plots.plot_diagnosis(record(), FINDINGS)[2]
    assert [list(bar.get_xdata()) for bar in strip.lines] == [[1040, 1059], [1030, 1030]]
    assert [text.get_text() for text in strip.texts] == [
        "error: non finite, step 1040 (model/rnn/kernel)",
        "warning: exploding, step 1030 (all weights)",
    ]
    # Each text is above its bar, and the first finding at the top.
    heights = [
        y
        for text, bar in zip(strip.texts, strip.lines, strict=True)
        for y in (text.get_position()[1], bar.get_ydata()[0])
    ]
    bottom, top = strip.get_ylim()
    assert bottom > heights[3] > heights[2] > heights[1] > heights[0] > top
    # A finding of one step is a line without length: its marker is what can be seen.
    assert "None" not in {bar.get_marker() for bar in strip.lines}
    # An error is told from a warning in colour and in grey.
    error, warning = strip.lines
    assert error.get_color() != warning.get_color()
    assert error.get_marker() != warning.get_marker()


def test_a_diagnosis_has_the_loss_and_the_norms_above():
    history = record()
    loss, norms, strip = plots.plot_diagnosis(history, FINDINGS)
    assert_line(loss.lines[0], history.step, history.loss)
    assert {"before clipping", "after clipping"} < set(lines(norms))
    for ax in (loss, norms):
        first = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]
        assert first == [1040, 1030]
        assert ax.get_yscale() == "log"
    # One scale of steps, named once.
    assert loss.get_xlim() == norms.get_xlim() == strip.get_xlim()
    assert [ax.get_xlabel() for ax in (loss, norms, strip)] == ["", "", "optimizer step"]
    assert all(ax.get_ylabel() for ax in (loss, norms, strip))


def test_a_diagnosis_in_axes_of_ones_own():
    axes = plt.subplots(1, 3)[1]
    assert plots.plot_diagnosis(record(), FINDINGS, axes).tolist() == axes.tolist()
    assert [ax.get_xlabel() for ax in axes] == ["optimizer step"] * 3
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match=r"Expected three axes.*Received: 2"):
        plots.plot_diagnosis(record(), FINDINGS, axes[:2])


def test_what_diagnose_finds_is_drawn():
    norms = np.ones((N, 2))
    norms[50:] = np.inf
    history = record(norms=norms, state_norms={})
    findings = diagnose(history)
    strip = plots.plot_diagnosis(history, findings)[2]
    assert strip.texts[0].get_text().startswith("error: non finite, step 1050")
    assert len(strip.lines) == len(findings)
    assert list(strip.lines[0].get_xdata()) == [1050, 1059]


@pytest.mark.parametrize("n", [0, 1, N])
def test_a_diagnosis_without_a_finding_says_so(n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = plots.plot_diagnosis(record(n=n), [])
        axes[0].figure.canvas.draw()
    assert [text.get_text() for text in axes[2].texts] == ["nothing found"]


# Histories with nothing to draw


def _nothing() -> GradientHistory:
    return GradientHistory()


def _all_nan() -> GradientHistory:
    nan = np.full((N, 2), np.nan)
    return record(norms=nan, loss=nan[:, 0], state_norms={"rnn": np.full((N, T), np.nan)})


def _all_zero() -> GradientHistory:
    zero = np.zeros((N, 2))
    return record(norms=zero, loss=zero[:, 0], state_norms={"rnn": np.zeros((N, T))})


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (make, draw)
        for make in (_nothing, _all_nan, _all_zero)
        for draw in (plots.plot_norms, plots.plot_weight_norms, plots.plot_loss)
    ]
    + [(_all_nan, plots.plot_state_norms), (_all_zero, plots.plot_state_norms)],
)
def test_a_record_without_a_finite_number_is_drawn_without_a_warning(make, draw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = draw(make())
        ax.figure.canvas.draw()
    if make is _all_nan and draw is not plots.plot_state_norms:
        assert ax.lines[-1].get_xdata().tolist() == list(range(1000, 1000 + N))


def test_trainings_without_a_finite_number_are_compared_without_a_warning():
    histories = {"a": _all_nan(), "b": _all_zero(), "c": record()}
    steps = list(range(1000, 1000 + N))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = plots.plot_compared_losses(histories, 0.1)
        norms = plots.plot_compared_norms(histories)
        states = plots.plot_compared_state_norms(histories)
        for ax in (losses, norms[0], states):
            ax.figure.canvas.draw()
    # What has no place on the scale is seen beside what has one.
    a, crosses, b, triangles, c, _ = losses.lines
    assert [line.get_label() for line in (a, b, c)] == ["a", "b", "c"]
    assert np.isnan([a.get_ydata(), b.get_ydata()]).all()
    assert np.isfinite(c.get_ydata()).all()
    assert (crosses.get_marker(), crosses.get_xdata().tolist()) == ("x", steps)
    assert (triangles.get_marker(), triangles.get_xdata().tolist()) == ("v", steps)
    assert losses.get_legend().get_title().get_text() == "×: NaN or Inf, ▼: 0"
    assert lines(norms[0])["NaN or Inf"].get_xdata().tolist() == steps
    assert lines(norms[1])["0"].get_xdata().tolist() == steps
    assert legend_of(norms[2]) == ["before clipping", "after clipping"]
    off = ["a (NaN or Inf at 7 of 7 t)", "b (0 at 7 of 7 t)", "c"]
    assert legend_of(states) == off
