"""compare(): each training against what its settings, its history and Keras itself say."""

from __future__ import annotations

import csv
import dataclasses
import io
import math

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

import kerasgrad as kg
from kerasgrad import GradientHistory
from kerasgrad.remedies import (
    CLIPPINGS,
    DEFAULT_REMEDIES,
    REMEDIES,
    Comparison,
    Remedy,
    Run,
    Settings,
    by_name,
    make_model,
)
from kerasgrad.remedies.omega import OmegaSequential, PerturbedSimpleRNN

T = 6
CLIPNORM = 0.05
# 64 sequences in batches of 32 are 2 steps an epoch; 5 steps are 3 epochs, whole ones.
TINY = {"units": 4, "batch_size": 32, "steps": 5, "clipnorm": CLIPNORM, "verbose": 0}
TINY_STEPS = 6


# Without recurrence a training takes a fraction of a second, where that is all the same.
LINEAR = {
    "linear": Remedy("", lambda units, timesteps, **_: keras.layers.Flatten()),
    "linear, clipped": Remedy("", lambda units, timesteps, **_: keras.layers.Flatten(), clips=True),
}


def tiny_task(**options) -> kg.tasks.Task:
    return kg.tasks.adding_problem(**{"samples": 64, "timesteps": T, "test_samples": 32} | options)


def text_of(result: Comparison, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(result.table())
    return console.file.getvalue()


def line_of(text: str, remedy: str) -> list[str]:
    (line,) = (line.split() for line in text.splitlines() if line.split()[:1] == [remedy])
    return line


def equal_up_to_rounding(cell: str, value: float) -> bool:
    """That a cell of at least one digit is this number, at the digits that it has."""
    digits = len(cell.split("e")[0].strip("-").replace(".", "").lstrip("0"))
    return float(cell) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits))


@pytest.fixture(scope="module")
def result() -> Comparison:
    return kg.compare(tiny_task(), ("baseline", "clipnorm", "keras_lstm"), **TINY)


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "made" / "on the way"
    result.save(folder)
    return folder


# What a comparison holds


def test_a_run_for_each_remedy(result):
    names = ["baseline", "clipnorm", "keras_lstm"]
    assert [row["remedy"] for row in result.rows()] == names
    assert list(result.histories) == [(name, 0) for name in names]
    for history in result.histories.values():
        assert isinstance(history, GradientHistory)
        assert history.step.tolist() == list(range(TINY_STEPS))
        assert history.epoch.tolist() == [0, 0, 1, 1, 2, 2]
        assert np.isfinite(history.loss).all()


def test_rows_are_what_the_histories_say(result):
    for row, run in zip(result.rows(), result.runs, strict=True):
        history = run.history
        assert row["seed"] == 0
        assert row["steps"] == TINY_STEPS
        assert row["constant_loss"] == pytest.approx(1 / 6)
        assert row["test_loss"] == run.test_losses[-1]
        assert math.isnan(row["test_accuracy"])
        norms = np.sqrt((history.norms**2).sum(axis=1))
        assert row["largest_norm_before_clipping"] == pytest.approx(norms.max())
        factors = (history.applied_norms / history.norms).min(axis=1)
        assert row["clip_rate"] == np.mean(factors < 0.999)
        assert (row["solved"], row["solved_at_step"]) == (False, None)
        kinds = [finding.kind for finding in row["findings"]]
        assert kinds == (["clipping_always"] if row["clip_rate"] > 0.9 else [])
        assert run.test_steps == [2, 4, 6]


def test_reach_is_of_the_kerasgrad_layers_and_unknown_for_others(result):
    for row, history in zip(result.rows(), result.histories.values(), strict=True):
        if row["remedy"] == "keras_lstm":
            assert history.state_norms == {}
            assert math.isnan(row["reach"])
        else:
            (norms,) = history.state_norms.values()
            assert norms.shape == (TINY_STEPS, T)
            assert row["reach"] == pytest.approx(np.median(norms[:, 0] / norms[:, -1]))


def test_a_seed_gives_each_remedy_the_same_start(result):
    """The same weights and batch give the same first loss and gradients."""
    baseline, clipped = (result.histories[name, 0] for name in ("baseline", "clipnorm"))
    assert clipped.loss[0] == baseline.loss[0]
    np.testing.assert_array_equal(clipped.norms[0], baseline.norms[0])
    assert clipped.loss[-1] != baseline.loss[-1]  # And then clipping makes a difference.


def test_only_the_remedies_that_clip_clip(result):
    for (name, _), history in result.histories.items():
        if REMEDIES[name].clips:
            # Keras's clipnorm is per weight; the rounding is that of float32.
            np.testing.assert_array_less(history.applied_norms, CLIPNORM * (1 + 1e-6))
            assert (history.norms > 2 * CLIPNORM).any()
            kept = history.norms < CLIPNORM * (1 - 1e-6)
            np.testing.assert_allclose(history.applied_norms[kept], history.norms[kept], rtol=1e-6)
            assert history.clip_rate > 0
        else:
            np.testing.assert_array_equal(history.applied_norms, history.norms)
            assert history.clip_rate == 0


def test_the_numbers_are_those_of_the_optimizer_that_the_settings_name():
    """The same training by hand, with another copy of the network and a tape of its own."""
    task = tiny_task(samples=8)  # One batch: its order plays no part.
    settings = {"learning_rate": 0.3, "momentum": 0.5, "batch_size": 8, "steps": 4}
    history = kg.compare(task, ["clipnorm"], **TINY | settings).histories["clipnorm", 0]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Input((T, 2)), keras.layers.SimpleRNN(4), keras.layers.Dense(1)]
    )
    velocities = [np.zeros(w.shape) for w in model.trainable_weights]
    losses, norms = [], []
    for _ in range(4):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(task.x) - task.y) ** 2)
        gradients = tape.gradient(loss, [w.value for w in model.trainable_weights])
        losses.append(float(loss))
        norms.append([float(np.linalg.norm(g)) for g in gradients])
        for i, (weight, g) in enumerate(zip(model.trainable_weights, gradients, strict=True)):
            g = g.numpy() * min(1, CLIPNORM / norms[-1][i])
            velocities[i] = 0.5 * velocities[i] - 0.3 * g
            weight.assign_add(velocities[i])
    np.testing.assert_allclose(history.loss, losses, rtol=1e-4)
    np.testing.assert_allclose(history.norms, norms, rtol=1e-3)


# The table


def test_the_table_says_what_the_rows_say(result):
    text = text_of(result)
    for row in result.rows():
        cells = line_of(text, row["remedy"])
        assert equal_up_to_rounding(cells[1], row["test_loss"])
        assert cells[2] == "no"
        assert equal_up_to_rounding(cells[3], row["largest_norm_before_clipping"])
        assert cells[4] == f"{100 * row['clip_rate']:.0f}%"
        if row["remedy"] == "keras_lstm":
            assert cells[5] == "unknown"
        else:
            assert equal_up_to_rounding(cells[5], row["reach"])
        wrong = "clipping always, step 0" if row["findings"] else "nothing found"
        assert cells[6:] == wrong.split()
    assert "accuracy" not in text


def test_the_title_has_all_settings_and_the_task(result):
    title = " ".join(text_of(result).split())
    for words in (
        "adding, T = 6, 64 sequences",
        "4 units, batches of 32, 5 steps of SGD(learning_rate=0.1, momentum=0.9)",
        "clipnorm=0.05 (per weight) where a remedy clips",
        "held-out loss (mse) below 0.01",
        "constant answer has 0.1667",
    ):
        assert words in title


def test_the_table_fits_a_terminal_of_80_columns(result):
    text = text_of(result, width=80)
    assert max(map(len, text.splitlines())) <= 80
    for row in result.rows():
        assert "…" not in line_of(text, row["remedy"])[0]


# save()


def test_the_folder_has_the_files(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "baseline.npz",
        "clipnorm.npz",
        "comparison.csv",
        "gradient_norms.png",
        "keras_lstm.npz",
        "loss.png",
        "report.html",
        "state_norms.png",
        "summary.csv",
        "summary.md",
    ]


def test_the_csv_has_the_rows(result, saved):
    with open(saved / "comparison.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(result.rows())
    for row, cells in zip(result.rows(), read, strict=True):
        assert list(cells) == list(row)
        for name, value in row.items():
            if name == "findings":
                assert cells[name] == "; ".join(map(str, value))
            elif value is None:
                assert cells[name] == ""
            elif isinstance(value, float):
                np.testing.assert_equal(float(cells[name]), value)
            else:
                assert cells[name] == str(value)


def test_the_records_are_the_histories(result, saved):
    for (name, _), history in result.histories.items():
        read = GradientHistory.load(saved / f"{name}.npz")
        assert read.weights == history.weights
        for column in ("step", "epoch", "loss", "norms", "applied_norms", "clip_factor"):
            np.testing.assert_array_equal(getattr(read, column), getattr(history, column))
        assert list(read.state_norms) == list(history.state_norms)


@pytest.mark.parametrize("name", ["loss", "gradient_norms", "state_norms"])
def test_the_figures_are_pictures_of_something(saved, name):
    pixels = plt.imread(saved / f"{name}.png")[..., :3]
    assert min(pixels.shape[:2]) >= 300
    colours = np.unique((pixels.reshape(-1, 3) * 255).astype(int), axis=0)
    # Text and axes are grey; the lines are not.
    assert np.ptp(colours, axis=1).max() > 50
    assert len(colours) > 50


def test_save_leaves_no_figure_open(saved):
    assert plt.get_fignums() == []


# Bad names and settings


def test_an_unknown_remedy_lists_those_that_exist():
    with pytest.raises(ValueError, match="Unknown remedy: 'magic', 'more'") as error:
        kg.compare(tiny_task(), ("baseline", "magic", "more"), **TINY)
    assert all(name in str(error.value) for name in REMEDIES)


def test_one_name_may_stand_alone():
    """A string is a sequence, too: of letters that are no remedies."""
    with pytest.raises(ValueError, match="Unknown remedy: 'magic'"):
        kg.compare(tiny_task(), "magic", **TINY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("units", 0),
        ("batch_size", -1),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("clipnorm", -0.1),
        ("momentum", 1.0),
        ("momentum", -0.1),
    ],
)
def test_a_setting_out_of_its_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .* Received: {value}\.$"):
        Settings(**{name: value})


def test_the_settings_of_compare_are_its_fields():
    with pytest.raises(TypeError, match="patience"):
        kg.compare(tiny_task(), patience=3)


def test_nothing_to_compare_is_an_empty_table(tmp_path):
    result = kg.compare(tiny_task(), (), **TINY)
    assert (result.rows(), result.histories) == ([], {})
    assert "solved" in text_of(result)
    result.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


# The remedies


@pytest.mark.parametrize("name", REMEDIES)
def test_each_remedy_makes_the_layer_that_it_says(name):
    layer = REMEDIES[name].make_layer(5, 50, return_sequences=True)
    assert layer(np.zeros((2, 50, 3), "float32")).shape == (2, 50, 5)
    kind, activation, clipping = {
        "baseline": (kg.layers.SimpleRNN, "tanh", None),
        "clipnorm": (kg.layers.SimpleRNN, "tanh", "clipnorm"),
        "global_clipnorm": (kg.layers.SimpleRNN, "tanh", "global_clipnorm"),
        "clipvalue": (kg.layers.SimpleRNN, "tanh", "clipvalue"),
        "relu": (kg.layers.SimpleRNN, "relu", None),
        "relu_clipnorm": (kg.layers.SimpleRNN, "relu", "clipnorm"),
        "irnn": (kg.layers.IRNN, "relu", None),
        "irnn_clipnorm": (kg.layers.IRNN, "relu", "clipnorm"),
        "orthogonal": (kg.layers.SimpleRNN, "tanh", None),
        "glorot": (kg.layers.SimpleRNN, "tanh", None),
        "omega_9": (PerturbedSimpleRNN, "tanh", "global_clipnorm"),
        "omega_10": (kg.layers.OmegaSimpleRNN, "tanh", "global_clipnorm"),
        "simplified_lstm": (kg.layers.SimplifiedLSTM, "linear", "clipnorm"),
        "simplified_lstm_tanh": (kg.layers.SimplifiedLSTM, "tanh", "clipnorm"),
        "keras_lstm": (keras.layers.LSTM, "tanh", "clipnorm"),
        "keras_gru": (keras.layers.GRU, "tanh", "clipnorm"),
    }[name]
    assert type(layer) is kind
    assert layer.cell.activation.__name__ == activation
    assert REMEDIES[name].clipping == clipping
    assert bool(REMEDIES[name].clips) is (clipping is not None)
    if clipping is not None and name != "simplified_lstm_tanh":
        assert REMEDIES[name].description.endswith(f", {clipping}")
    if kind is kg.layers.IRNN:
        np.testing.assert_array_equal(layer.cell.recurrent_kernel, np.eye(5))
    elif name == "glorot":
        assert np.linalg.norm(layer.cell.recurrent_kernel, 2) > 1.1
    elif kind in (kg.layers.SimpleRNN, kg.layers.OmegaSimpleRNN, PerturbedSimpleRNN):
        W = np.asarray(layer.cell.recurrent_kernel)  # Keras's default start is orthogonal.
        np.testing.assert_allclose(W @ W.T, np.eye(5), atol=1e-5)
    if kind is kg.layers.SimplifiedLSTM:
        np.testing.assert_allclose(layer.cell.bias_f, math.log(50 / math.log(2)), rtol=1e-6)


def test_the_optimizer_clips_as_the_remedy_says():
    settings = Settings(clipnorm=1.0, global_clipnorm=2.0, clipvalue=3.0)
    for name, remedy in REMEDIES.items():
        optimizer = make_model(tiny_task(), remedy, settings, 0).optimizer
        thresholds = {clip: getattr(optimizer, clip) for clip in CLIPPINGS}
        expected = dict.fromkeys(CLIPPINGS)
        if remedy.clipping:
            expected[remedy.clipping] = getattr(settings, remedy.clipping)
        assert thresholds == expected, name


def test_a_seed_gives_the_same_weights_to_remedies_with_the_same_weights():
    names = ["baseline", "clipnorm", "global_clipnorm", "clipvalue", "relu", "relu_clipnorm"]
    names += ["orthogonal", "omega_9", "omega_10", "relu+global_clipnorm"]
    models = [make_model(tiny_task(), by_name(n)[n], Settings(units=4), seed=3) for n in names]
    first, *others = (model.get_weights() for model in models)
    for name, weights in zip(names[1:], others, strict=True):
        for mine, theirs in zip(first, weights, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
    (other_seed,) = by_name("baseline").values()
    other_seed = make_model(tiny_task(), other_seed, Settings(units=4), seed=4).get_weights()
    assert not np.array_equal(first[0], other_seed[0])


def test_the_orthogonal_start_is_the_baseline_once_more():
    histories = kg.compare(tiny_task(), ("baseline", "orthogonal"), **TINY).histories
    for column in ("loss", "norms"):
        baseline, same = (getattr(histories[n, 0], column) for n in ("baseline", "orthogonal"))
        np.testing.assert_array_equal(baseline, same)


# Remedies put together


@pytest.mark.parametrize(
    ("name", "kind", "activation", "clipping", "description"),
    [
        (
            *("relu+global_clipnorm", kg.layers.SimpleRNN, "relu", "global_clipnorm"),
            "ReLU SimpleRNN, global_clipnorm",
        ),
        (
            *("global_clipnorm+relu", kg.layers.SimpleRNN, "relu", "global_clipnorm"),
            "ReLU SimpleRNN, global_clipnorm",
        ),
        ("relu+clipnorm", kg.layers.SimpleRNN, "relu", "clipnorm", "ReLU SimpleRNN, clipnorm"),
        ("baseline+clipvalue", kg.layers.SimpleRNN, "tanh", "clipvalue", None),
        (
            *("simplified_lstm+clipvalue", kg.layers.SimplifiedLSTM, "linear", "clipvalue"),
            "simplified LSTM, forget bias ln(T/ln 2), clipvalue",
        ),
        (
            *("relu+glorot+clipvalue", kg.layers.SimpleRNN, "relu", "clipvalue"),
            "ReLU SimpleRNN, Glorot start, clipvalue",
        ),
        ("irnn+orthogonal+clipnorm", kg.layers.IRNN, "relu", "clipnorm", None),
        ("omega_9+relu", PerturbedSimpleRNN, "relu", "global_clipnorm", None),
        ("omega_10+relu+clipnorm", kg.layers.OmegaSimpleRNN, "relu", "clipnorm", None),
        ("keras_gru+baseline", keras.layers.GRU, "tanh", "clipnorm", "Keras's GRU, clipnorm"),
    ],
)
def test_remedies_go_together(name, kind, activation, clipping, description):
    (remedy,) = by_name(name).values()
    layer = remedy.make_layer(4, T)
    assert (type(layer), layer.cell.activation.__name__) == (kind, activation)
    assert remedy.clipping == clipping
    assert remedy.description == (description or remedy.description)
    model = make_model(tiny_task(), remedy, Settings(units=4), 0)
    assert type(model) is (OmegaSequential if "omega_9" in name else keras.Sequential)
    if "orthogonal" in name:
        layer.build((None, T, 2))
        W = np.asarray(layer.cell.recurrent_kernel)
        np.testing.assert_allclose(W @ W.T, np.eye(4), atol=1e-5)
        assert not np.array_equal(W, np.eye(4))


def test_remedies_together_are_trained_under_their_name():
    result = kg.compare(tiny_task(), ("relu_clipnorm", "relu+clipnorm"), **TINY)
    assert [row["remedy"] for row in result.rows()] == ["relu_clipnorm", "relu+clipnorm"]
    one, other = result.histories.values()
    np.testing.assert_array_equal(one.norms, other.norms)


def test_two_layers_do_not_go_together():
    with pytest.raises(ValueError, match="each bring a layer of their own"):
        kg.compare(tiny_task(), "keras_lstm+irnn", **TINY)


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match="Unknown remedy: 'magic'"):
        kg.compare(tiny_task(), "relu+magic", **TINY)


def test_a_clipping_that_keras_does_not_have():
    with pytest.raises(ValueError, match=r"'clipnorm'.*Received: 'clip'"):
        Remedy("", clips="clip")


def test_the_default_remedies():
    assert DEFAULT_REMEDIES == (
        "baseline",
        "clipnorm",
        "relu",
        "relu_clipnorm",
        "irnn_clipnorm",
        "simplified_lstm",
    )


# Remedies of one's own


class SeenBatches(keras.layers.Layer):
    """Notes the batches that it is trained on, and hands them to the layer inside."""

    def __init__(self, inner, seen):
        super().__init__()
        self.inner = inner
        self.note = seen.append  # Keras would make a list of its own out of a list.

    def call(self, x, training=False):
        if training:
            tf.py_function(lambda x: self.note(x.numpy()), [x], [])
        return self.inner(x)


def test_every_remedy_gets_the_same_batches_in_the_same_order():
    """Whatever random numbers its layer drew for its weights before."""
    task = tiny_task()
    seen: dict[str, list] = {"one": [], "other": []}
    remedies = {
        "one": Remedy("", lambda *_, **__: SeenBatches(keras.layers.Flatten(), seen["one"])),
        "other": Remedy(
            "", lambda n, T, **_: SeenBatches(keras.layers.GRU(n, dropout=0.1), seen["other"])
        ),
    }
    kg.compare(task, remedies, **TINY)
    one, other = (np.array(batches) for batches in seen.values())
    np.testing.assert_array_equal(one, other)
    assert one.shape == (TINY_STEPS, 32, T, 2)
    for epoch in one.reshape(3, 64, -1):  # Each sequence once, and shuffled.
        assert {row.tobytes() for row in epoch} == {row.tobytes() for row in task.x}
        assert not np.array_equal(epoch, task.x.reshape(64, -1))


def test_a_remedy_of_ones_own_with_two_recurrent_layers(tmp_path):
    """It has state norms for each direction, a name that rich would take for markup, and clips."""
    both = Remedy(
        "both ways",
        lambda units, timesteps, **kwargs: keras.layers.Bidirectional(
            kg.layers.SimpleRNN(units, **kwargs)
        ),
        clips=True,
    )
    result = kg.compare(tiny_task(), {"rnn[both]": both}, **TINY | {"steps": 2})
    (history,) = result.histories.values()
    assert len(history.state_norms) == 2
    np.testing.assert_array_less(history.applied_norms, CLIPNORM * (1 + 1e-6))
    assert line_of(text_of(result), "rnn[both]")
    result.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"rnn[both].npz", "state_norms.png"}


# Trainings that go wrong, and ones that go well


def test_a_training_that_becomes_nan_stops_and_the_others_go_on(tmp_path):
    settings = TINY | {"learning_rate": 1e6, "steps": 40}
    result = kg.compare(tiny_task(), ("baseline", "clipnorm"), **settings)
    bad, other = result.rows()
    history = result.histories["baseline", 0]
    assert bad["steps"] < 40 == other["steps"]
    assert not np.isfinite(history.loss[-1])
    assert np.isfinite(history.loss[0])
    assert (bad["solved"], bad["solved_at_step"]) == (False, None)
    assert not np.isfinite(bad["test_loss"])
    finding = bad["findings"][0]
    finite = np.isfinite(np.column_stack([history.loss, history.norms])).all(axis=1)
    first = int(np.argmin(finite))
    assert (finding.kind, finding.steps[0]) == ("non_finite", first)
    assert np.isfinite(bad["largest_norm_before_clipping"])
    assert not any(f.kind == "non_finite" for f in other["findings"])
    cells = line_of(text_of(result), "baseline")
    assert cells[1] in ("nan", "inf")
    assert cells[2] == "no"
    assert f"non finite, step {first}" in " ".join(cells)
    result.save(tmp_path)
    read = GradientHistory.load(tmp_path / "baseline.npz")
    np.testing.assert_array_equal(read.loss, history.loss)


def planted(test_losses, test_steps=None, **columns) -> Run:
    history = GradientHistory()
    history.append(
        weights=["w"],
        **{"step": range(30), "norms": np.ones((30, 1)), "loss": np.ones(30)} | columns,
    )
    steps = test_steps or [10 * (i + 1) for i in range(len(test_losses))]
    return Run("planted", 0, history, test_steps=steps, test_losses=test_losses)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([0.5, 0.02, 0.005], 30),
        ([0.5, 0.009, 0.5], 20),  # the first time; that it got worse is seen in the final loss
        ([0.01, 0.01, 0.01], None),  # below, not at
        ([math.nan, math.nan], None),
        ([], None),
    ],
)
def test_solved_at_the_first_step_below_the_threshold(losses, step):
    run = planted(losses)
    assert run.solved_at(0.01) == step
    result = Comparison(tiny_task(), Settings(), [run])
    (row,) = result.rows()
    assert (row["solved"], row["solved_at_step"]) == (step is not None, step)
    assert line_of(text_of(result), "planted")[2] == (str(step) if step else "no")


def test_the_final_loss_is_the_last_one_held_out_or_else_of_the_last_batch():
    assert planted([0.5, 0.2]).final_loss == 0.2
    assert planted([], loss=np.r_[np.ones(29), np.inf]).final_loss == math.inf


def test_reach_is_the_median_of_the_last_hundred_steps_that_have_one():
    norms = np.ones((400, T))
    norms[:300, 0], norms[300:, 0] = 7.0, np.linspace(0.1, 0.3, 100)
    norms[100:300] = np.nan  # A step may have no state norms, and is then left out.
    rows = {"step": range(400), "norms": np.ones((400, 1)), "loss": np.ones(400)}
    assert planted([], state_norms={"rnn": norms}, **rows).reach == pytest.approx(0.2)
    norms[350:] = np.nan  # Of the last hundred 50 are 7, and 50 below 0.2.
    assert planted([], state_norms={"rnn": norms}, **rows).reach == pytest.approx(
        (7 + norms[349, 0]) / 2
    )
    assert math.isnan(planted([]).reach)


def test_a_run_without_a_finite_step_has_no_largest_norm():
    run = planted([math.nan], norms=np.full((30, 1), np.inf), loss=np.full(30, np.nan))
    (row,) = Comparison(tiny_task(), Settings(), [run]).rows()
    assert row["largest_norm_before_clipping"] == math.inf
    assert row["findings"][0].steps == (0, 29)


# Seeds


def test_two_seeds(tmp_path):
    result = kg.compare(tiny_task(), LINEAR, seeds=(3, 7), **TINY | {"steps": 2})
    one, other = LINEAR
    keys = [(one, 3), (other, 3), (one, 7), (other, 7)]
    assert [(row["remedy"], row["seed"]) for row in result.rows()] == keys
    losses = {key: history.loss[0] for key, history in result.histories.items()}
    assert losses[one, 3] == losses[other, 3] != losses[one, 7]
    result.save(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == sorted(
        f"{name}-seed{seed}.npz" for name, seed in keys
    )
    for (name, seed), history in result.histories.items():
        read = GradientHistory.load(tmp_path / f"{name}-seed{seed}.npz")
        np.testing.assert_array_equal(read.loss, history.loss)


# The other tasks

OTHER_TASKS = {
    "copying": lambda: kg.tasks.copying_memory(32, timesteps=3, length=2, test_samples=16),
    "temporal_order": lambda: kg.tasks.temporal_order(32, timesteps=10, test_samples=16),
    "digits": lambda: kg.tasks.digits(),
}


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_classifications_have_an_accuracy(name):
    if name == "digits":
        pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    task = OTHER_TASKS[name]()
    task = dataclasses.replace(task, x=task.x[:32], y=task.y[:32])
    result = kg.compare(task, ("simplified_lstm",), **TINY | {"steps": 3})
    (row,) = result.rows()
    history = result.histories["simplified_lstm", 0]
    assert row["steps"] == 3
    assert 0 <= row["test_accuracy"] <= 1
    # Cross-entropy: an untrained network answers uniformly at best, ln(classes) nats.
    assert history.loss[0] > 0.8 * math.log(task.outputs)
    (norms,) = history.state_norms.values()
    assert norms.shape == (3, task.timesteps)
    text = text_of(result)
    assert "accuracy" in text
    assert line_of(text, "simplified_lstm")[2] == f"{100 * row['test_accuracy']:.1f}%"
    if task.per_step:
        # Each step has a loss of its own: the last step's gradient is not the only one.
        assert row["reach"] > 0


# Progress


def test_progress_goes_to_standard_error_and_can_be_silenced(capsys):
    kg.compare(tiny_task(), LINEAR, **TINY | {"steps": 2})
    assert capsys.readouterr() == ("", "")
    kg.compare(tiny_task(), LINEAR, **TINY | {"steps": 2, "verbose": 1})
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()  # One bar for all.
    assert line.startswith("linear, clipped, loss ")
    assert "2/2 runs " in line


def test_a_bar_for_several_seeds_and_rates_says_which(capsys):
    options = TINY | {"steps": 2, "verbose": 1}
    kg.compare(tiny_task(), {"one": LINEAR["linear"]}, seeds=2, **options)
    assert "one, seed 1 ━" in capsys.readouterr().err
