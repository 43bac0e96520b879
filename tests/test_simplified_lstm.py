"""What is SimplifiedLSTM's own: the article's equation in numpy, its gates, its configuration.

What it shares with the other recurrent layers is in test_recurrent_layers.py.
"""

from __future__ import annotations

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    BATCH,
    FEATURES,
    TIMESTEPS,
    UNITS,
    assert_equal_results,
    outputs_and_gradients,
    randomize,
    state_gradients_through,
)

from kerasgrad.layers import SimplifiedLSTM, SimplifiedLSTMCell

Ours = functools.partial(SimplifiedLSTM, UNITS, project_input=True)


def sequences(features=FEATURES, dtype="float32"):
    rng = np.random.default_rng(31)
    return rng.normal(size=(BATCH, TIMESTEPS, features)).astype(dtype)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


# The article's equation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "tanh"},
        {"unit_forget_bias": False},
        {"forget_bias": 3.0, "activation": "tanh"},
        {"project_input": True},
        {"use_bias": False},
    ],
    ids=str,
)
def test_equation_of_the_article(options):
    units = 4
    phi = np.tanh if options.get("activation") == "tanh" else np.positive
    projected = options.get("project_input", False)
    features = 3 if projected else units
    x = sequences(features=features, dtype="float64")
    layer = SimplifiedLSTM(
        units, return_sequences=True, return_state=True, dtype="float64", **options
    )
    outputs, state = layer(x)

    # The weights by their names, transposed: the article multiplies column vectors.
    weights = {weight.name: weight.numpy().T for weight in layer.weights}
    assert len(weights) == 3 + projected + 3 * options.get("use_bias", True)
    W_f, W_i, W_o = (weights[f"kernel_{gate}"] for gate in "fio")
    b_f, b_i, b_o = (weights.get(f"bias_{gate}", np.zeros(units)) for gate in "fio")
    for example in range(BATCH):
        S = np.zeros(units)
        for t in range(TIMESTEPS):
            x_t = x[example, t]
            f, i, o = (sigmoid(W @ x_t + b) for W, b in ((W_f, b_f), (W_i, b_i), (W_o, b_o)))
            S = phi(f * S + i * (weights["kernel_c"] @ x_t if projected else x_t))
            np.testing.assert_allclose(outputs[example, t], o * S, rtol=1e-12)
        np.testing.assert_allclose(state[example], S, rtol=1e-12)


TWO = {"class_name": "Constant", "config": {"value": 2.0}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1.0),
        ({"unit_forget_bias": False}, 0.0),
        ({"unit_forget_bias": False, "bias_initializer": TWO}, 2.0),
        ({"bias_initializer": TWO}, 1.0),
        ({"forget_bias": 4.25}, 4.25),
        ({"forget_bias": 0.0}, 0.0),
        ({"unit_forget_bias": False, "forget_bias": -1.0}, -1.0),
    ],
    ids=str,
)
def test_forget_bias_at_the_start(options, expected):
    cell = SimplifiedLSTMCell(3, **options)
    cell.build((None, 3))
    np.testing.assert_array_equal(cell.bias_f, np.full(3, expected))
    others = 2.0 if "bias_initializer" in options else 0.0
    np.testing.assert_array_equal(cell.bias_i, np.full(3, others))
    np.testing.assert_array_equal(cell.bias_o, np.full(3, others))


def test_every_gate_starts_from_its_own_numbers():
    layer = Ours(kernel_initializer=keras.initializers.GlorotUniform(seed=1))
    fresh = Ours()
    for each in (layer, fresh):
        each.build((None, None, FEATURES))
    kernels = [weight.numpy() for weight in fresh.weights if "kernel" in weight.name]
    assert len(kernels) == 4
    for first in range(4):
        for second in range(first):
            assert not np.array_equal(kernels[first], kernels[second])


def test_weights_have_an_order_and_names():
    layer = Ours(name="lstm")
    layer.build((None, None, FEATURES))
    names = ["kernel_f", "kernel_i", "kernel_o", "kernel_c", "bias_f", "bias_i", "bias_o"]
    assert [w.path for w in layer.weights] == [f"lstm/simplified_lstm_cell/{n}" for n in names]
    assert {w.shape for w in layer.weights} == {(FEATURES, UNITS), (UNITS,)}


def test_stacked_cells_equal_stacked_layers():
    cells = [SimplifiedLSTMCell(UNITS, project_input=True), SimplifiedLSTMCell(UNITS)]
    of_cells = keras.layers.RNN(keras.layers.StackedRNNCells(cells), return_sequences=True)
    of_layers = keras.Sequential(
        [Ours(return_sequences=True), SimplifiedLSTM(UNITS, return_sequences=True)]
    )
    results = []
    for model in (of_cells, of_layers):
        model.build((BATCH, TIMESTEPS, FEATURES))
        randomize(model)
        results.append(outputs_and_gradients(model, model.trainable_variables, [sequences()]))
    assert_equal_results(*results, 1e-5)


def test_regularizers_constraints_and_frozen_weights():
    layer = Ours(kernel_regularizer="l2", bias_regularizer="l1", kernel_constraint="non_neg")
    layer(sequences())
    randomize(layer)
    kernels = [w.numpy() for w in layer.weights if "kernel" in w.name]
    biases = [w.numpy() for w in layer.weights if "bias" in w.name]
    expected = sum(0.01 * np.sum(k**2) for k in kernels) + sum(
        0.01 * np.sum(abs(b)) for b in biases
    )
    np.testing.assert_allclose(sum(map(float, layer.losses)), expected, rtol=1e-5)
    constraints = {w.name: w.constraint for w in layer.weights}
    for name, constraint in constraints.items():
        assert isinstance(constraint, keras.constraints.NonNeg) == ("kernel" in name)

    frozen = Ours(trainable=False)
    frozen(sequences())
    assert frozen.trainable_weights == []
    assert len(frozen.weights) == 7


# Back-propagation through time


def test_linear_state_gradient_is_the_product_of_forget_gates():
    layer = Ours(dtype="float64", forget_bias=2.0)
    x = sequences(dtype="float64")
    c = np.random.default_rng(34).normal(size=(BATCH, UNITS))

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(c * layer(x))
        tape.gradient(loss, layer.trainable_weights[0].value)

    λ = state_gradients_through(layer, step)
    weights = {weight.name: weight.numpy() for weight in layer.weights}
    f = sigmoid(x @ weights["kernel_f"] + weights["bias_f"])
    o = sigmoid(x @ weights["kernel_o"] + weights["bias_o"])
    for t in range(TIMESTEPS):
        expected = c * o[:, -1] * np.prod(f[:, t + 1 :], axis=1)
        np.testing.assert_allclose(λ[t], expected, rtol=1e-12)


UNUSUAL_CELL = {
    "activation": "tanh",
    "project_input": True,
    "use_bias": True,
    "kernel_initializer": "he_normal",
    "bias_initializer": "ones",
    "unit_forget_bias": False,
    "forget_bias": 2.5,
    "kernel_regularizer": "l2",
    "bias_regularizer": "l1",
    "kernel_constraint": "unit_norm",
    "bias_constraint": "non_neg",
    "dtype": "float64",
    "name": "unusual",
}

CLASSES = {
    "kernel_initializer": ("keras.initializers", "HeNormal"),
    "bias_initializer": ("keras.initializers", "Ones"),
    "kernel_regularizer": ("keras.regularizers", "L2"),
    "bias_regularizer": ("keras.regularizers", "L1"),
    "kernel_constraint": ("keras.constraints", "UnitNorm"),
    "bias_constraint": ("keras.constraints", "NonNeg"),
}

UNUSUAL_LAYER = UNUSUAL_CELL | {
    "return_sequences": True,
    "return_state": True,
    "go_backwards": True,
    "stateful": True,
    "unroll": True,
    "zero_output_for_mask": True,
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SimplifiedLSTMCell, UNUSUAL_CELL), (SimplifiedLSTM, UNUSUAL_LAYER), (SimplifiedLSTM, {})],
    ids=["cell", "layer", "defaults"],
)
def test_configuration_round_trip(kind, options):
    layer = kind(3, **options)
    config = layer.get_config()
    for name, value in {"units": 3, **options}.items():
        kept = config[name]
        if isinstance(kept, dict):  # Keras's serialized form of an object
            module, class_name = CLASSES.get(name, ("keras", kept["class_name"]))
            assert (kept["module"], kept["class_name"]) == (module, class_name)
        else:
            assert kept == value
    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert serialized["registered_name"] == f"kerasgrad>{kind.__name__}"
    for copied in (kind.from_config(config), keras.saving.deserialize_keras_object(serialized)):
        assert type(copied) is kind
        assert copied.get_config() == layer.get_config()
        assert getattr(copied, "cell", copied).compute_dtype == layer.compute_dtype


# Bad input


@pytest.mark.parametrize("kind", [SimplifiedLSTM, SimplifiedLSTMCell])
@pytest.mark.parametrize("units", [0, -1, 2.5, "3", None])
def test_units_must_be_a_positive_integer(kind, units):
    with pytest.raises(ValueError, match="units must be a positive integer") as error:
        kind(units)
    assert repr(units) in str(error.value)


@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: layer.build(x.shape)])
@pytest.mark.parametrize("symbolic", [True, False])
def test_features_other_than_units_without_projection(call, symbolic):
    x = keras.Input((None, FEATURES)) if symbolic else sequences()
    with pytest.raises(ValueError, match="project_input=True") as error:
        call(SimplifiedLSTM(UNITS), x)
    assert f"Received {FEATURES} features and units={UNITS}" in str(error.value)
    call(Ours(), x)
