"""SimpleRNN and IRNN against keras.layers.SimpleRNN, the cell unrolled, and the paper."""

from __future__ import annotations

import functools
import json
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    BATCH,
    EXPLICIT_ACTIVATIONS,
    FEATURES,
    HOLES,
    KERAS,
    LAYER_RUNS,
    MODES,
    TIMESTEPS,
    TOLERANCE,
    UNITS,
    assert_equal_results,
    outputs_and_gradients,
    randomize,
    relative_error,
    run_layer_case,
    state_gradients_through,
    unrolled_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kerasgrad.layers import IRNN, ScaledIdentity, SimpleRNN, SimpleRNNCell

Ours = functools.partial(SimpleRNN, UNITS)
Theirs = functools.partial(keras.layers.SimpleRNN, UNITS)

ALL_MODES = pytest.mark.parametrize("mode", MODES)


def sequences(batch=BATCH, dtype="float32", seed=21):
    return np.random.default_rng(seed).normal(size=(batch, TIMESTEPS, FEATURES)).astype(dtype)


@functools.cache
def keras_case(case, dtype):
    return run_layer_case(Theirs, case, "eager", dtype)


@functools.cache
def keras_stack(stack):
    return run_stack(Theirs, stack, "eager", TIMESTEPS)


# The layer against Keras's


@pytest.mark.parametrize(("mode", "dtype", "case"), LAYER_RUNS)
def test_outputs_and_gradients_equal_keras(mode, dtype, case):
    actual = run_layer_case(Ours, case, mode, dtype)
    assert_equal_results(actual, keras_case(case, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("activation", [*EXPLICIT_ACTIVATIONS, None, "elu", "softsign"])
def test_activations_equal_keras(activation):
    results = [
        run_layer_case(
            functools.partial(make, activation=activation),
            "holes, sequences, initial state",
            "eager",
            "float64",
        )
        for make in (Ours, Theirs)
    ]
    assert_equal_results(*results, 1e-10)


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


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_stateful_carries_the_state_over_two_batches_and_resets(mode):
    def run(make, mode):
        layer = make(stateful=True)
        layer.build((BATCH, TIMESTEPS, FEATURES))
        randomize(layer)
        one_batch = functools.partial(
            outputs_and_gradients, layer, layer.trainable_variables, mode=mode
        )
        first, second = one_batch([sequences()]), one_batch([sequences(seed=22)])
        state = layer.states[0].numpy()
        layer.reset_state()
        return first, second, one_batch([sequences()]), state

    *ours, our_state = run(Ours, mode)
    *theirs, their_state = run(Theirs, "eager")
    for actual, expected in zip(ours, theirs, strict=True):
        assert_equal_results(actual, expected, 1e-5)
    assert_equal_results(ours[2], ours[0], 1e-6)
    assert relative_error(our_state, their_state) < 1e-5
    assert relative_error(our_state, ours[1][0][0]) == 0


@pytest.mark.parametrize(
    ("mode", "policy", "tolerance"),
    [
        ("eager", "mixed_float16", 5e-3),
        ("xla", "mixed_float16", 5e-3),
        ("graph", "mixed_bfloat16", 4e-2),
    ],
)
def test_mixed_precision_equals_keras(mode, policy, tolerance):
    def run(make, mode):
        layer = make(dtype=policy, return_sequences=True)
        layer.build((BATCH, TIMESTEPS, FEATURES))
        randomize(layer)
        x = sequences()
        call = functools.partial(layer, mask=HOLES)
        return layer, outputs_and_gradients(call, layer.trainable_variables, [x], mode)

    layer, actual = run(Ours, mode)
    _, expected = run(Theirs, "eager")
    assert actual[0][0].dtype == expected[0][0].dtype == layer.compute_dtype
    assert all(gradient.dtype == "float32" for gradient in actual[1])
    assert_equal_results(actual, expected, tolerance)


# Models of several layers


def masking(layer):
    return [keras.layers.Masking(), layer(return_sequences=True), layer()]


def bidirectional(layer):
    return [
        keras.layers.Masking(),
        keras.layers.Bidirectional(layer(return_sequences=True)),
        keras.layers.Bidirectional(layer(), merge_mode="sum"),
    ]


def bidirectional_own_backward_layer(layer):
    backward = layer(go_backwards=True, activation="relu")
    return [keras.layers.Bidirectional(layer(), backward_layer=backward)]


def stacked(layer):
    return [layer(return_sequences=True), layer(return_sequences=True, activation="relu"), layer()]


def shared(layer):
    twice = layer(return_sequences=True)
    # Its input is made as wide as its output.
    return [keras.layers.Dense(UNITS), twice, twice]


STACKS = [
    masking,
    bidirectional,
    bidirectional_own_backward_layer,
    stacked,
    shared,
]


def run_stack(make, stack, mode, length):
    x = sequences()
    x[~HOLES] = 0  # what Masking skips
    return run_model(keras.Sequential([keras.Input((length, FEATURES)), *stack(make)]), x, mode)


def run_model(model, x, mode):
    randomize(model)
    return outputs_and_gradients(model, model.trainable_variables, [x], mode)


@pytest.mark.parametrize(
    ("mode", "length", "stack"),
    [
        *(("eager", TIMESTEPS, stack) for stack in STACKS),
        *(
            (mode, length, stack)
            for mode, length in [("graph", None), ("xla", TIMESTEPS)]
            for stack in (bidirectional, stacked)
        ),
    ],
)
def test_stacks_equal_keras(mode, length, stack):
    actual = run_stack(Ours, stack, mode, length)
    assert_equal_results(actual, keras_stack(stack), 1e-5)


@ALL_MODES
def test_embedding_mask_zero_equals_keras(mode):
    tokens = np.where(HOLES, np.random.default_rng(23).integers(1, 7, HOLES.shape), 0)

    def run(make, mode):
        model = keras.Sequential(
            [
                keras.Input((None,), dtype="int32"),
                keras.layers.Embedding(7, FEATURES, mask_zero=True),
                make(return_sequences=True),
                make(),
            ]
        )
        randomize(model)
        return outputs_and_gradients(lambda: model(tokens), model.trainable_variables, [], mode)

    assert_equal_results(run(Ours, mode), run(Theirs, "eager"), 1e-5)


@pytest.mark.parametrize(("mode", "outer"), [("eager", 2), ("graph", None)])
def test_time_distributed_equals_keras(mode, outer):
    x = sequences(batch=2 * 3).reshape(3, 2, TIMESTEPS, FEATURES)

    def build(make):
        inputs = keras.Input((outer, TIMESTEPS, FEATURES))
        outputs = keras.layers.TimeDistributed(make())(inputs)
        return keras.Model(inputs, make()(outputs))

    expected = run_model(build(Theirs), x, "eager")
    assert_equal_results(run_model(build(Ours), x, mode), expected, 1e-5)


@ALL_MODES
def test_encoder_state_through_a_mask_equals_keras(mode):
    # A layer called with both a mask and an initial state gets a list of masks from Keras.
    x = sequences()
    x[~HOLES] = 0

    def build(make):
        inputs = keras.Input((None, FEATURES))
        masked = keras.layers.Masking()(inputs)
        _, state = make(return_state=True)(masked)
        return keras.Model(inputs, make(return_sequences=True)(masked, initial_state=state))

    expected = run_model(build(Theirs), x, "eager")
    assert_equal_results(run_model(build(Ours), x, mode), expected, 1e-5)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("timesteps", [1, 2])
def test_smallest_shapes_equal_keras(batch, timesteps):
    x = sequences()[:batch, :timesteps]
    results = []
    for make in (Ours, Theirs):
        layer = make(return_sequences=True, return_state=True)
        layer.build(x.shape)
        randomize(layer)
        results.append(outputs_and_gradients(layer, layer.trainable_variables, [x]))
    assert_equal_results(*results, 1e-5)


def test_the_cell_in_keras_rnn_equals_the_layer():
    layer = Ours(return_sequences=True)
    around_the_cell = keras.layers.RNN(SimpleRNNCell(UNITS), return_sequences=True)
    stacked_cells = keras.layers.RNN(
        keras.layers.StackedRNNCells([SimpleRNNCell(UNITS), SimpleRNNCell(UNITS)])
    )
    results = []
    for model in (layer, around_the_cell):
        model.build((BATCH, TIMESTEPS, FEATURES))
        randomize(model)
        results.append(outputs_and_gradients(model, model.trainable_variables, [sequences()]))
    assert_equal_results(*results, 1e-5)

    results = []
    two_layers = keras.Sequential([Ours(return_sequences=True), Ours()])
    for model in (two_layers, stacked_cells):
        model.build((BATCH, TIMESTEPS, FEATURES))
        results.append(run_model(model, sequences(), "eager"))
    assert_equal_results(*results, 1e-5)


# Back-propagation through time


@settings(max_examples=15, deadline=None)
@given(
    timesteps=st.integers(1, 12),
    batch=st.integers(1, 3),
    units=st.integers(1, 4),
    features=st.integers(1, 3),
    activation=st.sampled_from(EXPLICIT_ACTIVATIONS),
    mask_density=st.sampled_from([None, 0.0, 0.3, 0.7, 1.0]),
    go_backwards=st.booleans(),
    zero_output_for_mask=st.booleans(),
    with_initial_state=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_explicit_recurrence_equals_the_unrolled_cell(
    timesteps,
    batch,
    units,
    features,
    activation,
    mask_density,
    go_backwards,
    zero_output_for_mask,
    with_initial_state,
    seed,
):
    rng = np.random.default_rng(seed)
    x = tf.constant(rng.normal(size=(batch, timesteps, features)))
    mask = None if mask_density is None else rng.random((batch, timesteps)) < mask_density
    initial_state = rng.normal(size=(batch, units)) if with_initial_state else None
    c = rng.normal(size=(batch, timesteps, units))

    def loss(outputs):
        return tf.reduce_sum(c * outputs)

    layer = SimpleRNN(
        units,
        activation=activation,
        return_sequences=True,
        go_backwards=go_backwards,
        zero_output_for_mask=zero_output_for_mask,
        dtype="float64",
    )
    layer.build(x.shape)
    randomize(layer, seed=seed)
    outputs, state_gradients, (dx, _, *dweights) = unrolled_gradients(
        layer.cell,
        x,
        loss,
        initial_state=initial_state,
        mask=mask,
        go_backwards=go_backwards,
        zero_output_for_mask=zero_output_for_mask,
    )
    results = {}

    def step():
        with tf.GradientTape() as tape:
            tape.watch(x)
            results["outputs"] = layer(x, initial_state=initial_state, mask=mask)
            value = loss(results["outputs"])
        results["gradients"] = tape.gradient(
            value, [x, *(weight.value for weight in layer.trainable_weights)]
        )

    λ = state_gradients_through(layer, step)
    assert relative_error(results["outputs"], outputs) < 1e-10
    assert relative_error(λ, state_gradients) < 1e-10
    for gradient, expected in zip(results["gradients"], [dx, *dweights], strict=True):
        assert relative_error(gradient, expected) < 1e-10


def test_state_gradients_of_a_model_inside_fit_are_the_unrolled_ones():
    x = sequences(batch=8)
    y = np.random.default_rng(24).normal(size=(8, 1)).astype("float32")
    rnn = Ours()
    model = keras.Sequential([keras.Input((TIMESTEPS, FEATURES)), rnn, keras.layers.Dense(1)])
    randomize(model)
    dense = model.layers[-1]
    _, expected, _ = unrolled_gradients(
        rnn.cell, x, lambda outputs: tf.reduce_mean((dense(outputs[:, -1]) - y) ** 2)
    )
    for options in ({}, {"jit_compile": True}, {"run_eagerly": True}):
        λ = tf.Variable(tf.zeros((TIMESTEPS, 8, UNITS)))
        rnn.on_state_gradients = λ.assign
        # A learning rate of zero leaves the weights for the next round.
        model.compile(keras.optimizers.SGD(0.0), "mse", **options)
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        assert relative_error(λ, expected) < 1e-5


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


# In fit


def regression_data(samples=10):
    return sequences(samples), np.random.default_rng(27).normal(size=(samples, 1)).astype("float32")


def compiled_model(make, optimizer="sgd", **options):
    model = keras.Sequential([keras.Input((None, FEATURES)), make(), keras.layers.Dense(1)])
    randomize(model)
    model.compile(optimizer, "mse", **options)
    return model


def losses(model, samples=10, epochs=3):
    # Ten samples in batches of four: the last batch is smaller.
    data = regression_data(samples)
    return model.fit(*data, batch_size=4, epochs=epochs, verbose=0, shuffle=False).history["loss"]


@functools.cache
def keras_losses():
    return losses(compiled_model(Theirs))


@pytest.mark.parametrize(
    "options",
    [{"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}],
    ids=["graph", "xla", "eager"],
)
def test_fit_gives_the_losses_that_keras_gives(options):
    expected = keras_losses()
    np.testing.assert_allclose(losses(compiled_model(Ours, **options)), expected, rtol=1e-5)
    assert expected[-1] < expected[0]


@pytest.mark.skipif(KERAS < (3, 10), reason="Keras 3.6 does not average over the replicas")
def test_fit_under_mirrored_strategy_gives_the_losses_of_one_device(mirrored_strategy):
    # Eight samples: under a strategy Keras weighs a smaller last batch differently, for any layer.
    with mirrored_strategy.scope():
        mirrored = compiled_model(Ours)
    alone = compiled_model(Ours, run_eagerly=True)
    np.testing.assert_allclose(losses(mirrored, samples=8), losses(alone, samples=8), rtol=1e-5)


def test_frozen_layer_does_not_train_and_passes_the_gradient_on():
    results = []
    for make in (Ours, Theirs):
        model = keras.Sequential([keras.layers.Dense(FEATURES), make(trainable=False)])
        model.build((BATCH, TIMESTEPS, FEATURES))
        assert len(model.trainable_variables) == 2
        model.layers[1].set_weights(
            [np.cos(np.arange(w.size)).reshape(w.shape) for w in model.layers[1].get_weights()]
        )
        results.append(run_model(model, sequences(), "eager"))
    assert_equal_results(*results, 1e-5)


def test_float64_policy():
    keras.config.set_dtype_policy("float64")
    model = compiled_model(Ours, run_eagerly=True)
    x, y = (array.astype("float64") for array in regression_data(4))
    model.fit(x, y, verbose=0)
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
    theirs, ours = compiled_model(Theirs), compiled_model(Ours)
    for weight in ours.trainable_weights:
        weight.assign(0 * weight)
    path = str(tmp_path / "keras.weights.h5")
    theirs.save_weights(path)
    ours.load_weights(path)
    assert relative_error(ours(sequences()), theirs(sequences())) < 1e-5


def test_a_trained_model_and_its_copies_go_on_alike(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, FEATURES)),
            keras.layers.Bidirectional(Ours(return_sequences=True, dropout=0.0)),
            IRNN(UNITS),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse", run_eagerly=True)
    losses(model, epochs=1)
    pickled = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(pickled(sequences()), model(sequences()))
    path = str(tmp_path / "model.keras")
    model.save(path)
    copied = keras.saving.load_model(path)
    assert type(copied.layers[0].forward_layer) is SimpleRNN
    assert type(copied.layers[1]) is IRNN
    np.testing.assert_array_equal(copied(sequences()), model(sequences()))
    # The optimizer's moments came along too; how to run did not.
    copied.run_eagerly = True
    np.testing.assert_allclose(losses(copied, epochs=2), losses(model, epochs=2), rtol=1e-6)


def test_exported_saved_model_gives_the_same_outputs(tmp_path):
    model = compiled_model(Ours, run_eagerly=True)
    losses(model, epochs=1)
    model.export(str(tmp_path), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path))
    for x in (sequences(), sequences()[:1, :1]):
        assert relative_error(loaded.serve(x), model(x)) < 1e-6


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


def test_clone_model_is_of_the_same_layers_and_draws_its_own_weights():
    model = compiled_model(Ours)
    clone = keras.models.clone_model(model)
    assert [type(layer) for layer in clone.layers] == [SimpleRNN, keras.layers.Dense]
    assert [w.shape for w in clone.weights] == [w.shape for w in model.weights]
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(sequences()), model(sequences()))


# Bad input


@pytest.mark.parametrize("kind", [SimpleRNN, IRNN, SimpleRNNCell])
@pytest.mark.parametrize("units", [0, -1])
def test_units_must_be_positive(kind, units):
    with pytest.raises(ValueError, match=f"positive integer, got {units}"):
        kind(units)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5, 6)])
def test_wrong_rank_is_a_clear_error(shape):
    with pytest.raises(ValueError, match=f"expected ndim=3, found ndim={len(shape)}"):
        Ours()(np.zeros(shape, "float32"))


def test_gradient_penalty_is_a_clear_error_and_works_with_the_cell():
    x = tf.constant(sequences())

    def penalty_gradient(layer):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x))
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(penalty, layer.trainable_variables[0].value)

    layer, around_the_cell = Ours(), keras.layers.RNN(SimpleRNNCell(UNITS))
    for model in (layer, around_the_cell):
        model.build(x.shape)
    with pytest.raises(ValueError, match="differentiable once"):
        penalty_gradient(layer)
    # What the error message advises.
    assert np.linalg.norm(penalty_gradient(around_the_cell)) > 0


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


class NotBuilt(keras.Model):
    """A model whose layers learn their sizes in the train step's graph."""

    def __init__(self, units):
        super().__init__()
        self.parts = [SimpleRNN(units), keras.layers.Dense(1)]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_layers_of_several_sizes_in_models_that_are_not_built():
    x, y = np.ones((4, 5, 2), "float32"), np.ones((4, 1), "float32")
    for units in (4, 3, 5):
        model = NotBuilt(units)
        model.compile("sgd", "mse")
        model.fit(x, y, verbose=0)
        assert model.parts[1].kernel.shape == (units, 1)
