"""What is SimpleRNN's own: Keras's dropout, weights and files; and IRNN, as its paper has it.

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
    HOLES,
    MODES,
    TIMESTEPS,
    UNITS,
    assert_equal_results,
    outputs_and_gradients,
    randomize,
    relative_error,
    state_gradients_through,
)

from kerasgrad.layers import IRNN, ScaledIdentity, SimpleRNN, SimpleRNNCell

Ours = functools.partial(SimpleRNN, UNITS)
Theirs = functools.partial(keras.layers.SimpleRNN, UNITS)

ALL_MODES = pytest.mark.parametrize("mode", MODES)


def sequences():
    rng = np.random.default_rng(21)
    return rng.normal(size=(BATCH, TIMESTEPS, FEATURES)).astype("float32")


def run_model(model):
    model.build((BATCH, TIMESTEPS, FEATURES))
    randomize(model)
    return outputs_and_gradients(model, model.trainable_variables, [sequences()])


# Not under XLA, which draws other numbers from the same seed, and takes Keras's loop six seconds.
@pytest.mark.parametrize(
    ("mode", "rates"),
    [
        ("eager", {"dropout": 0.4}),
        ("eager", {"recurrent_dropout": 0.4}),
        ("graph", {"dropout": 0.3, "recurrent_dropout": 0.5}),
    ],
    ids=["dropout", "recurrent_dropout", "both"],
)
def test_dropout_draws_the_masks_that_keras_draws(mode, rates):
    def run(make, mode, training):
        layer = make(seed=5, return_sequences=True, **rates)
        layer.build((BATCH, TIMESTEPS, FEATURES))
        randomize(layer)
        call = functools.partial(layer, training=training, mask=HOLES)
        results = [
            outputs_and_gradients(call, layer.trainable_variables, [sequences()], mode)
            for _ in range(2)
        ]
        return results if training else results[:1]

    ours, theirs = run(Ours, mode, True), run(Theirs, "eager", True)
    # The second call draws new masks, in both.
    for actual, expected in zip(ours, theirs, strict=True):
        assert_equal_results(actual, expected, 1e-5)
    assert relative_error(ours[0][0][0], ours[1][0][0]) > 0.1
    (without,) = run(Ours, mode, False)
    assert_equal_results(without, run(Theirs, "eager", False)[0], 1e-5)
    assert relative_error(ours[0][0][0], without[0][0]) > 0.1


def test_the_cell_in_keras_rnn_equals_the_layer():
    layer = Ours(return_sequences=True)
    around_the_cell = keras.layers.RNN(SimpleRNNCell(UNITS), return_sequences=True)
    assert_equal_results(run_model(layer), run_model(around_the_cell), 1e-5)

    two_layers = keras.Sequential([Ours(return_sequences=True), Ours()])
    stacked_cells = keras.layers.RNN(
        keras.layers.StackedRNNCells([SimpleRNNCell(UNITS), SimpleRNNCell(UNITS)])
    )
    assert_equal_results(run_model(two_layers), run_model(stacked_cells), 1e-5)


# Back-propagation through time


def test_orthogonal_recurrent_kernel_scales_the_gradient_by_σ_a_step():
    σ, timesteps = 0.9, 30
    layer = SimpleRNN(
        UNITS,
        activation="linear",
        recurrent_initializer=keras.initializers.Orthogonal(gain=σ, seed=1),
        dtype="float64",
    )
    x = np.random.default_rng(25).normal(size=(2, timesteps, FEATURES))
    c = np.random.default_rng(26).normal(size=(2, UNITS))

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(c * layer(x))
        tape.gradient(loss, layer.cell.recurrent_kernel.value)

    λ = state_gradients_through(layer, step)
    lag = np.arange(timesteps - 1, -1, -1)[:, np.newaxis]
    expected = σ**lag * np.linalg.norm(c, axis=-1)
    # Keras draws the orthogonal kernel in float32.
    np.testing.assert_allclose(np.linalg.norm(λ, axis=-1), expected, rtol=1e-5)


def test_frozen_layer_does_not_train_and_passes_the_gradient_on():
    results = []
    for make in (Ours, Theirs):
        model = keras.Sequential([keras.layers.Dense(FEATURES), make(trainable=False)])
        model.build((BATCH, TIMESTEPS, FEATURES))
        assert len(model.trainable_variables) == 2
        model.layers[1].set_weights(
            [np.cos(np.arange(w.size)).reshape(w.shape) for w in model.layers[1].get_weights()]
        )
        results.append(run_model(model))
    assert_equal_results(*results, 1e-5)


def test_float64_policy():
    keras.config.set_dtype_policy("float64")
    model = keras.Sequential([keras.Input((None, FEATURES)), Ours(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    x = sequences().astype("float64")
    model.fit(x, np.ones((BATCH, 1)), verbose=0)
    assert model(x).dtype == "float64"
    assert model.layers[0].cell.recurrent_kernel.dtype == "float64"


# Weights, configuration, files


def test_weights_have_keras_order_names_and_shapes():
    ours, theirs = (make(name="rnn") for make in (Ours, Theirs))
    for layer in (ours, theirs):
        layer.build((None, None, FEATURES))

    def described(layer):
        return [(weight.path, weight.name, weight.shape) for weight in layer.weights]

    assert described(ours) == described(theirs)
    assert [name for _, name, _ in described(ours)] == ["kernel", "recurrent_kernel", "bias"]


def test_weights_file_of_a_keras_model_loads(tmp_path):
    theirs, ours = (
        keras.Sequential([keras.Input((None, FEATURES)), make()]) for make in (Theirs, Ours)
    )
    assert relative_error(ours(sequences()), theirs(sequences())) > 0.1
    path = str(tmp_path / "keras.weights.h5")
    theirs.save_weights(path)
    ours.load_weights(path)
    assert relative_error(ours(sequences()), theirs(sequences())) < 1e-5


UNUSUAL = {
    "activation": "relu",
    "use_bias": False,
    "kernel_initializer": "he_normal",
    "recurrent_initializer": "glorot_normal",
    "kernel_regularizer": "l2",
    "recurrent_constraint": "unit_norm",
    "dropout": 0.25,
    "recurrent_dropout": 0.5,
    "return_sequences": True,
    "return_state": True,
    "go_backwards": True,
    "zero_output_for_mask": True,
    "seed": 3,
    "dtype": "float64",
    "name": "unusual",
}


@pytest.mark.parametrize("kind", [SimpleRNN, IRNN])
def test_configuration_round_trip(kind):
    layer = kind(UNITS, **UNUSUAL)
    config = layer.get_config()
    copied = kind.from_config(config)
    assert copied.get_config() == config == keras.layers.SimpleRNN(UNITS, **UNUSUAL).get_config()
    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert serialized["registered_name"] == f"kerasgrad>{kind.__name__}"
    assert type(keras.saving.deserialize_keras_object(serialized)) is kind


def test_irnn_keeps_the_gain_of_its_start(tmp_path):
    model = keras.Sequential(
        [keras.Input((None, 2)), IRNN(3, recurrent_initializer=ScaledIdentity(0.25))]
    )
    model.save(tmp_path / "model.keras")
    copied = keras.models.clone_model(keras.saving.load_model(tmp_path / "model.keras"))
    np.testing.assert_array_equal(copied.layers[0].cell.recurrent_kernel, 0.25 * np.eye(3))


# Bad input


@pytest.mark.parametrize("kind", [SimpleRNN, IRNN, SimpleRNNCell])
@pytest.mark.parametrize("units", [0, -1])
def test_units_must_be_positive(kind, units):
    with pytest.raises(ValueError, match=f"positive integer, got {units}"):
        kind(units)


# IRNN


def test_irnn_starts_as_the_paper_says():
    layer = IRNN(100)
    layer.build((None, None, 50))
    kernel, recurrent_kernel, bias = layer.get_weights()
    np.testing.assert_array_equal(recurrent_kernel, np.eye(100))
    np.testing.assert_array_equal(bias, 0)
    # 5000 draws: the standard deviation is known to 1 %, the mean to 1.4e-5.
    assert abs(kernel.std() - 0.001) < 5e-5
    assert abs(kernel.mean()) < 1e-4
    assert layer.activation is keras.activations.relu


def test_irnn_at_the_start_adds_its_inputs_up_and_keeps_the_gradient():
    layer = IRNN(UNITS, dtype="float64", kernel_initializer="ones")
    x = np.random.default_rng(28).uniform(0.1, 1, size=(2, 50, FEATURES))

    def step():
        with tf.GradientTape() as tape:
            outputs = layer(x)
            loss = tf.reduce_sum(outputs)
        tape.gradient(loss, layer.cell.recurrent_kernel.value)
        sums = x.sum(axis=(1, 2))
        np.testing.assert_allclose(outputs, np.stack([sums] * UNITS, axis=1), rtol=1e-12)

    np.testing.assert_array_equal(state_gradients_through(layer, step), np.ones((50, 2, UNITS)))


def test_irnn_takes_other_initializers_and_keeps_them():
    layer = IRNN(3, recurrent_initializer=keras.initializers.Identity(0.01))
    layer.build((None, None, 2))
    np.testing.assert_allclose(layer.cell.recurrent_kernel, 0.01 * np.eye(3), rtol=1e-6)

    # Not Identity(0.01): its own get_config leaves the gain out (Keras 3.15.1).
    layer = IRNN(3, recurrent_initializer=keras.initializers.Constant(0.01), activation="tanh")
    copied = IRNN.from_config(layer.get_config())
    copied.build((None, None, 2))
    np.testing.assert_allclose(copied.cell.recurrent_kernel, np.full((3, 3), 0.01), rtol=1e-6)
    assert copied.activation is keras.activations.tanh
    assert copied.cell.kernel_initializer.stddev == 0.001
