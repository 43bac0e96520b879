"""Models measured against numbers known by hand, and diagnosed; the advice followed."""

from __future__ import annotations

import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import module_at
from keras import layers
from keras.initializers import Constant

import kerasgrad as kg
from kerasgrad import bptt, diagnose
from kerasgrad.diagnosis import KINDS
from kerasgrad.inspection import measure


def compiled(*hidden, optimizer=None, loss="mse"):
    model = keras.Sequential(hidden)
    model.compile(optimizer or keras.optimizers.SGD(0.01), loss=loss)
    return model


def activity(measured, layer):
    """Of the layer of this name. (Keras puts the model's name before some paths.)"""
    (found,) = [a for a in measured.activities if name_of(a.layer) == layer]
    return found


def name_of(path):
    return path.rpartition("/")[2]


def column(values):
    return np.array(values, "float32")[:, np.newaxis]


# What the units do


def test_relu_units_are_active_where_their_input_is_positive():
    kernel = np.array([[1.0, -1.0, 0.0]])
    model = keras.Sequential(
        [layers.Input((1,)), layers.Dense(3, activation="relu", name="hidden")]
    )
    model.layers[0].set_weights([kernel, np.array([0.0, -1.0, -1.0])])
    # x > 0 at three of four; -x - 1 > 0 at one; -1 never.
    measured = measure(model, column([-2.0, 1.0, 2.0, 3.0]))
    np.testing.assert_allclose(activity(measured, "hidden").active, [0.75, 0.25, 0.0])
    assert activity(measured, "hidden").saturated == {}


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: layers.Conv2D(2, 1, activation="relu", name="relu"), (4, 4, 1)),
        (lambda: layers.Conv1D(2, 1, activation="relu", name="relu"), (4, 1)),
        (lambda: layers.TimeDistributed(layers.Dense(2, activation="relu", name="relu")), (4, 1)),
    ],
)
def test_each_place_of_a_convolution_counts(make, shape):
    model = keras.Sequential([layers.Input(shape), make()])
    for variable in model.trainable_variables:
        is_bias = len(variable.shape) == 1
        variable.assign(np.zeros(2) if is_bias else np.broadcast_to([1.0, -1.0], variable.shape))
    x = np.full((2, *shape), -1.0)
    x[0, 0] = 1.0  # a quarter of the places of one of two examples
    (found,) = measure(model, x).activities
    np.testing.assert_allclose(found.active, [1 / 8, 7 / 8])


def test_layers_that_are_an_activation_count_and_leaky_ones_do_not():
    model = keras.Sequential(
        [
            layers.Input((2,)),
            layers.ReLU(name="relu"),
            layers.Activation("relu", name="activation"),
            layers.ReLU(negative_slope=0.1, name="leaky"),
            layers.Activation("gelu", name="gelu"),
        ]
    )
    measured = measure(model, np.array([[-1.0, 1.0], [-2.0, -1.0]]))
    assert [name_of(a.layer) for a in measured.activities] == ["relu", "activation"]
    np.testing.assert_allclose(activity(measured, "relu").active, [0.0, 0.5])


def test_a_unit_is_flat_where_its_derivative_is_below_5_percent():
    # tanh' = 1 - tanh² < 0.05 beyond arctanh(sqrt(0.95)) = 2.18; σ' < 0.0125 beyond 4.36.
    model = keras.Sequential(
        [
            layers.Input((1,)),
            layers.Dense(1, "tanh", kernel_initializer="ones", name="tanh"),
            layers.Dense(1, "sigmoid", kernel_initializer=Constant(100.0), name="sigmoid"),
            layers.Dense(1, name="head"),
        ]
    )
    measured = measure(model, column([0.0, 2.1, -2.3, 5.0]))
    np.testing.assert_allclose(activity(measured, "tanh").saturated["tanh"], [0.5])
    np.testing.assert_allclose(activity(measured, "sigmoid").saturated["sigmoid"], [0.75])


def test_the_output_of_a_classifier_may_be_sure():
    sure = layers.Dense(1, "sigmoid", kernel_initializer=Constant(100.0), name="output")
    model = keras.Sequential([layers.Input((1,)), sure])
    assert measure(model, column([-9.0, 9.0])).activities == []


def test_a_shared_layer_is_measured_over_all_of_its_calls():
    shared = layers.Dense(1, "relu", kernel_initializer="ones", name="shared")
    a, b = layers.Input((1,)), layers.Input((1,))
    model = keras.Model([a, b], layers.Add()([shared(a), shared(b)]))
    x = [column([1.0, 1.0]), column([-1.0, 1.0])]
    np.testing.assert_allclose(activity(measure(model, x), "shared").active, [0.75])


def test_relu_states_count_over_all_steps():
    rnn = layers.SimpleRNN(2, activation="relu", name="rnn")
    model = keras.Sequential([layers.Input((3, 1)), rnn])
    rnn.set_weights([np.array([[1.0, 1.0]]), np.zeros((2, 2)), np.array([0.0, -9.0])])
    x = np.array([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]])[..., np.newaxis]
    np.testing.assert_allclose(activity(measure(model, x), "rnn").active, [1 / 3, 0.0])


def test_gates_are_flat_where_they_do_not_move_but_for_those_that_are_always_open():
    layer = kg.layers.SimplifiedLSTM(2, kernel_initializer="zeros", name="lstm")
    model = keras.Sequential([layers.Input((3, 2)), layer])
    layer.cell.bias_f.assign([9.0, -9.0])  # open, closed
    layer.cell.bias_i.assign([4.5, 4.0])  # open, in between
    found = activity(measure(model, np.ones((2, 3, 2))), "lstm").saturated
    np.testing.assert_array_equal(found["forget"], [0.0, 1.0])
    np.testing.assert_array_equal(found["input"], [0.0, 0.0])


@pytest.mark.parametrize(
    ("layer", "cell"),
    [
        (layers.LSTM(3), "lstm"),
        (layers.GRU(3), "gru"),
        (kg.layers.SimplifiedLSTM(3, project_input=True), "simplified_lstm"),
        (layers.SimpleRNN(3), None),
        (layers.LSTM(3, use_bias=False), None),
    ],
)
def test_recurrent_layers_are_known_by_their_cells(layer, cell):
    model = keras.Sequential([layers.Input((7, 2)), layer])
    x = np.random.default_rng(0).normal(size=(4, 7, 2))
    (recurrent,) = measure(model, x).recurrent.values()
    assert (recurrent.cell, recurrent.timesteps, recurrent.is_replaceable) == (cell, 7, True)
    if isinstance(layer, layers.SimpleRNN):
        assert recurrent.half_life is None
    else:
        expected = bptt.memory_half_life(model, x)
        np.testing.assert_allclose(recurrent.half_life, expected)


# The optimizer, the data, the loss


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_the_clipping_of_the_optimizer(name):
    optimizer = keras.optimizers.Adam(0.25, **{name: 3.0})
    for wrapped in (optimizer, keras.optimizers.LossScaleOptimizer(optimizer)):
        measured = measure(compiled(layers.Input((2,)), layers.Dense(1), optimizer=wrapped))
        assert measured.clipping == {name: 3.0}
        assert (measured.learning_rate, measured.has_schedule) == (0.25, False)
        assert measured.activities is None and measured.state_norms is None


def test_a_schedule_and_no_optimizer():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)
    model = compiled(layers.Input((2,)), layers.Dense(1), optimizer=keras.optimizers.SGD(schedule))
    measured = measure(model)
    assert (measured.learning_rate, measured.has_schedule) == (0.5, True)
    bare = keras.Sequential([layers.Input((2,)), layers.Dense(3)])
    measured = measure(bare, np.ones((2, 2)))
    assert measured.clipping == {} and np.isnan(measured.learning_rate)
    assert sorted(measured.weight_sizes.values()) == [3, 6]


def test_the_data_that_are_not_finite_and_their_scale():
    x = {"a": np.full((4, 2), 3.0), "b": np.full((4, 1), 4), "c": np.full((4, 2), -1.0)}
    x["a"][0, 1] = np.nan
    y = np.array([1.0, 2.0, np.inf, 3.0])[:, np.newaxis]
    a, b, c = (layers.Input((n,), name=name) for name, n in (("a", 2), ("b", 1), ("c", 2)))
    model = keras.Model({"a": a, "b": b, "c": c}, layers.Dense(1)(layers.Add()([a, b, c])))
    model.compile(loss="mse")
    measured = measure(model, x, y)
    assert measured.nonfinite_examples == 2
    # Integers have no scale: seven 3s and eight 1s.
    assert measured.input_scale == pytest.approx(np.sqrt((7 * 9 + 8) / 15))


def test_the_loss_with_the_targets_of_others_tells_whether_x_is_made_use_of():
    x = column(np.linspace(-1, 1, 64))
    penalty = keras.regularizers.L2(0.5)
    model = compiled(layers.Input((1,)), layers.Dense(1, kernel_regularizer=penalty))
    model.layers[0].set_weights([np.array([[2.0]]), np.zeros(1)])
    measured = measure(model, x, 2 * x)
    assert measured.loss == pytest.approx(0, abs=1e-6)  # The penalty of 2 left out.
    assert measured.shuffled_loss == pytest.approx(2 * np.var(2 * x), rel=0.3)
    model.layers[0].set_weights([np.array([[0.0]]), np.zeros(1)])
    measured = measure(model, x, 2 * x)
    assert measured.loss == pytest.approx(np.mean(4 * x**2))
    assert measured.loss == pytest.approx(measured.shuffled_loss, rel=1e-5)


def test_the_share_of_zero_gradients():
    model = compiled(layers.Input((2,)), layers.Dense(4, "relu"), layers.Dense(1))
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    model.layers[0].set_weights([np.tile([1.0, 1.0, 1.0, -1.0], (2, 1)), np.zeros(4)])
    # Of 8 + 4 + 4 + 1 entries, those of the fourth unit: 2 + 1 + 1.
    assert measure(model, np.ones((3, 2)), np.zeros((3, 1))).zero_gradients == pytest.approx(4 / 17)


def test_state_norms_are_those_of_bptt():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 6, 2)), rng.normal(size=(5, 1))
    lstm = layers.LSTM(3, return_sequences=True, name="lstm")
    model = compiled(layers.Input((6, 2)), lstm, layers.SimpleRNN(2, name="rnn"), layers.Dense(1))
    measured = measure(model, x, y)
    assert set(map(name_of, measured.state_norms)) == {"lstm", "rnn"}
    for path, states in measured.state_norms.items():
        for name, λ in bptt.state_gradients(model, x, y, path).items():
            expected = np.sqrt((λ.astype(float) ** 2).sum(axis=2)).mean(axis=0)
            np.testing.assert_allclose(states[name], expected, rtol=1e-6)


# Where a layer is


class Block(layers.Layer):
    """A layer that holds others, by name and in a list."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(2, "relu")
        self.rest = [layers.Dense(2, "relu"), layers.Dense(2, "tanh")]

    def call(self, x):
        for layer in (self.first, *self.rest):
            x = layer(x)
        return x


def test_each_layer_is_found_by_its_expression():
    inner = keras.Sequential([layers.Input((5, 2)), layers.Dense(2, name="in_a_model")])
    model = keras.Sequential(
        [
            layers.Input((5, 2)),
            inner,
            layers.ReLU(),
            layers.ReLU(),
            Block(),
            layers.TimeDistributed(layers.Dense(2)),
            layers.Bidirectional(layers.LSTM(2, name="lstm"), name="both"),
            layers.Dense(1),
        ]
    )
    expressions = measure(model).expressions
    all_layers = {
        layer.path or layer.name: layer for layer in model._flatten_layers(include_self=False)
    }
    for path, expression in expressions.items():
        assert eval(expression, {"model": model}) is all_layers[path], expression
    cells = {path for path, layer in all_layers.items() if hasattr(layer, "state_size")}
    inputs = {path for path, layer in all_layers.items() if isinstance(layer, layers.InputLayer)}
    assert set(expressions) >= set(all_layers) - cells - inputs
    (forward,) = [e for e in expressions.values() if e.endswith(".forward_layer")]
    assert forward == "model.get_layer('both').forward_layer"


def test_a_layer_inside_of_another_is_not_replaceable():
    both = layers.Bidirectional(layers.SimpleRNN(2))
    model = keras.Sequential([layers.Input((5, 2)), both])
    measured = measure(model, np.ones((2, 5, 2)))
    assert [r.is_replaceable for r in measured.recurrent.values()] == [False, False]


# The model is afterwards as it was


def test_measuring_changes_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 5, 2)), rng.normal(size=(4, 1))
    inputs = layers.Input(batch_shape=(4, 5, 2))
    hidden = layers.Dropout(0.5, seed=1)(inputs)
    hidden = layers.GRU(3, stateful=True, dropout=0.3)(hidden)
    hidden = layers.BatchNormalization()(layers.Dense(3, "relu")(hidden))
    model = keras.Model(inputs, layers.Dense(1)(hidden))
    model.compile("adam", loss="mse", metrics=["mae"])
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)

    def everything():
        return [np.copy(v) for v in (*model.variables, *model.metrics_variables)]

    before, calls = everything(), [vars(layer).get("call") for layer in model.layers]
    train_function = model.train_function
    measured = measure(model, x, y)
    assert measured.skipped == {}
    for now, then in zip(everything(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert [vars(layer).get("call") for layer in model.layers] == calls
    assert model.train_function is train_function


def test_a_model_that_fails_in_its_call_is_left_without_hooks():
    model = keras.Sequential([layers.Input((2,)), layers.Dense(2, "relu")])
    with pytest.raises(Exception):  # noqa: B017  # Keras's own, of the wrong shape.
        measure(model, np.ones((2, 3)))
    assert "call" not in vars(model.layers[0])


# What cannot be measured

MODEL = compiled(layers.Input((2,)), layers.Dense(1))
X, Y = np.ones((4, 2)), np.ones((4, 1))

BAD = {
    "no model": (lambda: measure(layers.Dense(1), X), "Expected a Keras model. Received Dense"),
    "y alone": (lambda: measure(MODEL, y=Y), "Received y without x"),
    "lengths": (lambda: measure(MODEL, X, Y[:3]), r"lengths \[3, 4\]"),
    "not compiled": (
        lambda: measure(keras.Sequential([layers.Input((2,)), layers.Dense(1)]), X, Y),
        "has no loss to compare it with: call model.compile",
    ),
}


@pytest.mark.parametrize(("ask", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error(ask, words):
    with pytest.raises(ValueError, match=words):
        ask()


def test_a_layer_called_twice_is_skipped_and_the_others_are_measured():
    shared = layers.GRU(2, return_sequences=True, name="shared")
    inputs = layers.Input((4, 2))
    outputs = layers.LSTM(2, name="lstm")(shared(shared(inputs)))
    model = keras.Model(inputs, outputs)
    measured = measure(model, np.ones((3, 4, 2)))
    assert [name_of(path) for path in measured.recurrent] == ["lstm"]
    assert [name_of(path) for path in measured.skipped] == ["shared"]
    diagnosis = diagnose(kg.GradientHistory(), model=model, x=np.ones((3, 4, 2)))
    assert "called 2 times" in str(diagnosis)


# Diagnosed

SEQUENCES, TARGETS = kg.tasks.adding_problem(samples=32, timesteps=40).x, column(np.ones(32))


def the_finding(model, x, y=None, history=None, kind=None, **options):
    diagnosis = diagnose(history or kg.GradientHistory(), model=model, x=x, y=y, **options)
    (finding,) = [f for f in diagnosis if f.kind == kind]
    return finding


def follow(finding, model, **data):
    names = {"model": model, **data}
    exec(finding.advice, names)
    return names


@pytest.mark.parametrize("dead", [12, 13])
def test_more_than_three_quarters_of_the_relus_must_be_dead(dead):
    bias = np.where(np.arange(16) < dead, -1.0, 1.0)
    model = compiled(layers.Input((2,)), layers.Dense(16, "relu", name="hidden"), layers.Dense(1))
    model.layers[0].set_weights([np.zeros((2, 16)), bias])
    x = np.ones((8, 2))
    kinds = {f.kind for f in diagnose(kg.GradientHistory(), model=model, x=x)}
    assert kinds == ({"dead_relu_units"} if dead == 13 else set())
    smdebug = diagnose(kg.GradientHistory(), model=model, x=x, preset="smdebug")
    assert [f.kind for f in smdebug] == ["dead_relu_units"]  # More than a half.
    if dead == 13:
        finding = the_finding(model, x, kind="dead_relu_units")
        assert finding.where == model.get_layer("hidden").path
        assert "13 of 16 units are 0 for every example (more than 75% of them)" in str(finding)


@pytest.mark.parametrize("is_recurrent", [False, True])
def test_dead_units_learn_again_after_the_advice(is_recurrent):
    low = {"activation": "relu", "bias_initializer": Constant(-9.0)}
    if is_recurrent:
        hidden, x = kg.layers.SimpleRNN(4, **low), np.ones((8, 3, 2))
    else:
        hidden, x = layers.Dense(4, **low), np.ones((8, 2))
    model = compiled(layers.Input(x.shape[1:]), hidden, layers.Dense(1))
    y = np.ones((8, 1))
    model.fit(x, y, verbose=0)
    before = hidden.get_weights()
    model.fit(x, y, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, hidden.get_weights(), strict=True))
    finding = the_finding(model, x, kind="dead_relu_units")
    follow(finding, model)
    assert not [f for f in diagnose(kg.GradientHistory(), model=model, x=x) if f == finding]
    model.fit(x, y, verbose=0)
    assert not np.array_equal(before[0], hidden.get_weights()[0])


def test_autotrainer_counts_the_zeros_of_the_gradient():
    dead = layers.Dense(64, "relu", bias_initializer=Constant(-9.0), name="dead")
    model = compiled(layers.Input((2,)), dead, layers.Dense(1))
    finding = the_finding(
        model, np.ones((4, 2)), np.ones((4, 1)), kind="dead_relu_units", preset="autotrainer"
    )
    assert "γ = 0.7" in finding.threshold_source and finding.where == "all weights"
    # All entries but the last bias: 2 · 64 + 64 + 64 of one more.
    assert "100% of the entries" in finding.evidence


def test_saturation_is_mended_at_its_cause():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3))

    def network(**kwargs):
        return compiled(
            layers.Input((3,)), layers.Dense(8, "tanh", name="hidden", **kwargs), layers.Dense(1)
        )

    # Inputs that are not scaled are scaled.
    model = network(kernel_initializer="ones")
    finding = the_finding(model, 1e4 * x, kind="saturated_activations")
    assert finding.where == model.get_layer("hidden").path
    assert finding.threshold_source == "convention of kerasgrad"
    assert "100% (tanh) are flat for 95% of all values (more than 50% of" in finding.evidence
    scaled = follow(finding, model, x=1e4 * x)["x"]
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-3)
    assert diagnose(kg.GradientHistory(), model=model, x=scaled) == []
    # Weights that started too large are drawn anew.
    history = kg.GradientHistory()
    model = network(kernel_initializer=Constant(1e4))
    paths = [v.path for v in model.trainable_variables]
    history.append(weights=paths, step=[0, 1], norms=np.ones((2, 4)))
    finding = the_finding(model, x, kind="saturated_activations", history=history)
    assert finding.steps == (1, 1)
    follow(finding, model)
    assert diagnose(kg.GradientHistory(), model=model, x=x) == []
    # Weights that grew in the training call for smaller steps.
    model = network(kernel_initializer=Constant(1e4))
    paths = [v.path for v in model.trainable_variables]
    history = kg.GradientHistory()
    history.append(weights=paths, step=[0, 1], norms=np.ones((2, 4)))
    for step, norms in enumerate(([1.0, 0.0, 1.0, 0.0], [3.1, 1.0, 1.0, 1.0])):
        history.append_updates(
            step=step, weights=paths, update_norms=np.full(4, 1e-3), weight_norms=norms
        )
    finding = the_finding(model, x, kind="saturated_activations", history=history)
    follow(finding, model)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.001)
    # An activation that is a layer of its own has no weights to draw.
    model = compiled(
        layers.Input((3,)),
        layers.Dense(8, kernel_initializer=Constant(1e4)),
        layers.Activation("tanh"),
        layers.Dense(1),
    )
    finding = the_finding(model, x, kind="saturated_activations")
    changed = follow(finding, model)["model"]
    assert diagnose(kg.GradientHistory(), model=changed, x=x) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.LSTM(4, name="rnn"),
        lambda: layers.GRU(4, bias_initializer=Constant(-3.0), name="rnn"),
        lambda: kg.layers.SimplifiedLSTM(4, project_input=True, name="rnn"),
    ],
)
def test_a_gate_that_forgets_before_a_tenth_of_the_sequence(make):
    model = compiled(layers.Input((40, 2)), make(), layers.Dense(1))
    finding = the_finding(model, SEQUENCES, kind="forget_bias_too_low")
    longest = bptt.memory_half_life(model, SEQUENCES).max()
    assert f"after {longest:.2g} of 40 steps (less than 10%)" in finding.evidence
    assert "a bias of 4.1 keeps" in finding.evidence  # ln(40 / ln 2) = 4.055
    follow(finding, model)
    assert bptt.memory_half_life(model, SEQUENCES).max() > 4
    kinds = {f.kind for f in diagnose(kg.GradientHistory(), model=model, x=SEQUENCES)}
    assert "forget_bias_too_low" not in kinds


def test_a_gradient_that_vanishes_is_seen_in_any_layer_and_mended():
    model = compiled(layers.Input((40, 2)), layers.SimpleRNN(6, name="rnn"), layers.Dense(1))
    rnn = model.get_layer("rnn")
    rnn.cell.recurrent_kernel.assign(0.5 * np.eye(6))
    finding = the_finding(model, SEQUENCES, TARGETS, kind="vanishing_through_time")
    λ = np.linalg.norm(bptt.state_gradients(model, SEQUENCES, TARGETS)["h"], axis=2).mean(axis=0)
    assert finding.where == rnn.path and λ[0] / λ[-1] < 0.5**39
    assert f"gets {λ[0] / λ[-1]:.1e} of" in finding.evidence
    changed = follow(finding, model)["model"]
    kinds = {f.kind for f in diagnose(kg.GradientHistory(), model=changed, x=SEQUENCES, y=TARGETS)}
    assert "vanishing_through_time" not in kinds and changed is not model


def test_a_model_that_makes_use_of_its_input_may_let_it_vanish():
    """The last input times ten, in a network that has forgotten the first long before."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 30, 1)).astype("float32")
    y = 10 * x[:, -1]
    rnn = layers.SimpleRNN(1, activation="linear", name="rnn")
    model = compiled(layers.Input((30, 1)), rnn, layers.Dense(1))
    rnn.set_weights([np.ones((1, 1)), 0.1 * np.ones((1, 1)), np.zeros(1)])
    model.layers[-1].set_weights([10 * np.ones((1, 1)), np.zeros(1)])
    assert "vanishing_through_time" not in {
        f.kind for f in diagnose(kg.GradientHistory(), model=model, x=x, y=y)
    }
    the_finding(model, x, rng.permutation(y), kind="vanishing_through_time")


@pytest.mark.parametrize(("threshold", "found"), [(9.0, False), (11.0, True)])
def test_a_threshold_that_clips_nothing_must_be_ten_times_the_norm(threshold, found):
    optimizer = keras.optimizers.SGD(0.1, global_clipnorm=threshold)
    model = compiled(layers.Input((2,)), layers.Dense(1), optimizer=optimizer)
    history = kg.GradientHistory()
    norms = np.tile([0.6, 0.8], (60, 1))
    history.append(weights=["kernel", "bias"], step=range(60), norms=norms)
    diagnosis = diagnose(history, model=model)
    assert [f.kind for f in diagnosis] == (["clipping_never"] if found else [])
    if found:
        assert "clipped none of 60 updates: it is 11 times" in str(diagnosis)
        follow(diagnosis[0], model)
        assert model.optimizer.global_clipnorm == 2.0
        assert diagnose(history, model=model) == []


@pytest.mark.parametrize(
    ("name", "threshold", "found"),
    [("global_clipnorm", 0.4, True), ("clipvalue", 0.4, False), ("clipvalue", 11.0, True)],
)
def test_a_clipvalue_may_be_small_beside_a_norm(name, threshold, found):
    optimizer = keras.optimizers.SGD(0.1, **{name: threshold})
    model = compiled(layers.Input((2,)), layers.Dense(1), optimizer=optimizer)
    history = kg.GradientHistory()
    factor = np.where(np.arange(60) % 2 == 0, 0.5, 1.0)
    norms = np.tile([0.6, 0.8], (60, 1))
    history.append(weights=["kernel", "bias"], step=range(60), norms=norms, clip_factor=factor)
    diagnosis = diagnose(history, model=model)
    assert [f.kind for f in diagnosis] == (["clip_threshold_far"] if found else [])


def test_no_threshold_is_none_that_never_clips():
    history = kg.GradientHistory()
    history.append(weights=["kernel"], step=range(60), norms=np.ones((60, 1)))
    assert diagnose(history, model=MODEL) == []


def test_bad_examples_are_named_and_left_out():
    x, y = np.ones((6, 2)), np.ones((6, 1))
    x[2, 0] = np.nan
    history = kg.GradientHistory()
    history.append(weights=["w"], step=[0, 1], norms=[[1.0], [np.nan]])
    finding = the_finding(MODEL, x, y, history=history, kind="non_finite")
    assert "1 of the examples given are not finite themselves" in finding.evidence
    assert len(follow(finding, MODEL, x=x, y=y)["x"]) == 5


def test_a_model_of_nan_is_diagnosed_without_a_warning():
    model = compiled(
        layers.Input((40, 2)), layers.LSTM(2), layers.Dense(3, "relu"), layers.Dense(1)
    )
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, np.nan))
    history = kg.GradientHistory()
    history.append(weights=["w"], step=[0], norms=[[np.nan]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        diagnosis = diagnose(history, model=model, x=SEQUENCES, y=TARGETS)
    assert [f.kind for f in diagnosis] == ["non_finite"]


def test_a_training_is_diagnosed_from_its_callback_to_its_advice():
    """All parts together: a rate of 0 in fit, found in the record, mended, found no more."""
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    y = x[:, :1]
    model = compiled(
        layers.Input((3,)),
        layers.Dense(4, "relu"),
        layers.Dense(1),
        optimizer=keras.optimizers.SGD(0.0),
    )
    for expected in (["unchanged_weights"], []):
        norms = kg.callbacks.GradientNorms()
        model.fit(x, y, epochs=3, verbose=0, callbacks=[norms])
        diagnosis = diagnose(norms.history, model=model, x=x, y=y)
        assert [f.kind for f in diagnosis] == expected
        for finding in diagnosis:
            follow(finding, model)


# The benchmark counts what it says


@pytest.fixture(scope="module")
def benchmark():
    return module_at(Path(__file__).parent / "benchmarks" / "diagnosis.py")


def test_the_benchmark_counts_right_and_wrong_findings(benchmark):
    healthy = {"scenario": "mlp with sgd", "plants": None, "final_loss": 1.0}
    dead = {"scenario": "mlp with a low bias", "plants": "dead_relu_units", "final_loss": np.nan}
    after = {"gone": True, "found": ["exploding"], "final_loss": 0.5}
    rows = [
        healthy | {"found": {"kerasgrad": []}},
        healthy | {"found": {"kerasgrad": ["dead_relu_units", "exploding"]}},
        dead | {"found": {"kerasgrad": ["dead_relu_units"]}, "after_advice": after},
        dead | {"found": {"kerasgrad": ["unchanged_weights", "exploding"]}},  # follows; does not
    ]
    assert benchmark.count(rows, "dead_relu_units") == {
        **{"planted": 2, "found": 1, "false_in_healthy": 1, "false_in_others": 0, "implied": 0},
        **{"followed": 1, "gone": 1, "loss_lower": 1, "others_afterwards": 1},
    }
    exploding = benchmark.count(rows, "exploding")
    assert (exploding["false_in_healthy"], exploding["false_in_others"]) == (1, 1)
    assert benchmark.count(rows, "unchanged_weights")["implied"] == 1


def test_the_benchmark_plants_each_kind_and_as_many_healthy_trainings(benchmark):
    planted = [s for s in benchmark.SCENARIOS if s.plants]
    healthy = [s for s in benchmark.SCENARIOS if not s.plants]
    assert {s.plants for s in planted} == set(KINDS)
    assert len(healthy) >= len(planted)
    assert len({s.name for s in benchmark.SCENARIOS}) == len(benchmark.SCENARIOS)
    # Kinds that need a sequence.
    in_time = {"vanishing_through_time", "forget_bias_too_low"}
    for family, kinds in {"recurrent": set(KINDS), "feed-forward": set(KINDS) - in_time}.items():
        assert {s.plants for s in planted if s.family == family} == kinds


def test_the_benchmark_finds_a_fault_and_after_the_advice_no_more(benchmark, monkeypatch):
    monkeypatch.setattr(keras.utils, "clear_session", lambda: None)  # Other tests' models live on.
    row = benchmark.run(("mlp never clipped", 1))
    assert row["found"] == {"kerasgrad": ["clipping_never"], "smdebug": [], "autotrainer": []}
    assert row["after_advice"]["gone"] and row["after_advice"]["found"] == []
    assert row["final_loss"] < row["first_loss"]
