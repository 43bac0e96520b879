"""SimplifiedLSTM against the article's equation in numpy, its cell unrolled, and Keras's RNN."""

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

from kerasgrad.layers import SimplifiedLSTM, SimplifiedLSTMCell

Ours = functools.partial(SimplifiedLSTM, UNITS, project_input=True)

CELL_ARGUMENTS = ("activation", "use_bias", "forget_bias", "dtype", "trainable")


def Theirs(**arguments):
    """keras.layers.RNN around the cell: Keras's loop, and automatic differentiation."""
    of_the_cell = {name: arguments[name] for name in CELL_ARGUMENTS if name in arguments}
    cell = SimplifiedLSTMCell(UNITS, project_input=True, **of_the_cell)
    of_the_layer = {
        name: value
        for name, value in arguments.items()
        if name not in CELL_ARGUMENTS or name in ("dtype", "trainable")
    }
    return keras.layers.RNN(cell, **of_the_layer)


def sequences(batch=BATCH, features=FEATURES, dtype="float32", seed=31):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, TIMESTEPS, features)).astype(dtype)


def run_model(model, x, mode):
    randomize(model)
    return outputs_and_gradients(model, model.trainable_variables, [x], mode)


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


# The layer against Keras's loop over the cell


@functools.cache
def keras_case(case, dtype):
    return run_layer_case(Theirs, case, "eager", dtype)


@pytest.mark.parametrize(("mode", "dtype", "case"), LAYER_RUNS)
def test_outputs_and_gradients_equal_keras(mode, dtype, case):
    actual = run_layer_case(Ours, case, mode, dtype)
    assert_equal_results(actual, keras_case(case, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("activation", [*EXPLICIT_ACTIVATIONS, "elu"])
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


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_stateful_carries_the_state_over_two_batches_and_resets(mode):
    def run(make, mode):
        layer = make(stateful=True)
        layer.build((BATCH, TIMESTEPS, FEATURES))
        randomize(layer)
        one_batch = functools.partial(
            outputs_and_gradients, layer, layer.trainable_variables, mode=mode
        )
        first, second = one_batch([sequences()]), one_batch([sequences(seed=32)])
        layer.reset_state()
        return first, second, one_batch([sequences()])

    ours, theirs = run(Ours, mode), run(Theirs, "eager")
    for actual, expected in zip(ours, theirs, strict=True):
        assert_equal_results(actual, expected, 1e-5)
    assert_equal_results(ours[2], ours[0], 1e-6)


@pytest.mark.parametrize(
    ("mode", "policy", "tolerance"),
    [("eager", "mixed_float16", 5e-3), ("xla", "mixed_bfloat16", 4e-2)],
)
def test_mixed_precision_equals_keras(mode, policy, tolerance):
    def run(make, mode):
        layer = make(dtype=policy, return_sequences=True)
        layer.build((BATCH, TIMESTEPS, FEATURES))
        randomize(layer)
        call = functools.partial(layer, mask=HOLES)
        return outputs_and_gradients(call, layer.trainable_variables, [sequences()], mode)

    actual, expected = run(Ours, mode), run(Theirs, "eager")
    assert actual[0][0].dtype == expected[0][0].dtype != "float32"
    assert all(gradient.dtype == "float32" for gradient in actual[1])
    assert_equal_results(actual, expected, tolerance)


@pytest.mark.parametrize(("mode", "length"), [("eager", TIMESTEPS), ("graph", None)])
def test_masking_bidirectional_and_stacking_equal_keras(mode, length):
    x = sequences()
    x[~HOLES] = 0

    def build(make):
        return keras.Sequential(
            [
                keras.Input((length, FEATURES)),
                keras.layers.Masking(),
                keras.layers.Bidirectional(make(return_sequences=True)),
                make(return_sequences=True, activation="tanh"),
                make(),
            ]
        )

    expected = run_model(build(Theirs), x, "eager")
    assert_equal_results(run_model(build(Ours), x, mode), expected, 1e-5)


def test_embedding_mask_zero_equals_keras():
    tokens = np.where(HOLES, np.random.default_rng(33).integers(1, 7, HOLES.shape), 0)
    results = []
    for make in (Ours, Theirs):
        embedding = keras.layers.Embedding(7, FEATURES, mask_zero=True)
        model = keras.Sequential([embedding, make(return_sequences=True), make()])
        model.build(tokens.shape)
        randomize(model)
        results.append(
            outputs_and_gradients(
                lambda model=model: model(tokens), model.trainable_variables, [], "eager"
            )
        )
    assert_equal_results(*results, 1e-5)


@pytest.mark.parametrize(("mode", "outer"), [("graph", None), ("eager", 2)])
def test_time_distributed_equals_keras(mode, outer):
    x = sequences(batch=2 * 3).reshape(3, 2, TIMESTEPS, FEATURES)

    def build(make):
        inputs = keras.Input((outer, TIMESTEPS, FEATURES))
        return keras.Model(inputs, make()(keras.layers.TimeDistributed(make())(inputs)))

    expected = run_model(build(Theirs), x, "eager")
    assert_equal_results(run_model(build(Ours), x, mode), expected, 1e-5)


@pytest.mark.parametrize(("batch", "timesteps"), [(0, 2), (1, 1)])
def test_smallest_shapes_equal_keras(batch, timesteps):
    x = sequences()[:batch, :timesteps]
    results = []
    for make in (Ours, Theirs):
        layer = make(return_sequences=True, return_state=True)
        layer.build(x.shape)
        results.append(run_model(layer, x, "eager"))
    assert_equal_results(*results, 1e-5)


def test_stacked_cells_equal_stacked_layers():
    cells = [SimplifiedLSTMCell(UNITS, project_input=True), SimplifiedLSTMCell(UNITS)]
    of_cells = keras.layers.RNN(keras.layers.StackedRNNCells(cells), return_sequences=True)
    of_layers = keras.Sequential(
        [Ours(return_sequences=True), SimplifiedLSTM(UNITS, return_sequences=True)]
    )
    results = []
    for model in (of_cells, of_layers):
        model.build((BATCH, TIMESTEPS, FEATURES))
        results.append(run_model(model, sequences(), "eager"))
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

    layer = SimplifiedLSTM(
        units,
        activation=activation,
        project_input=features != units,
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


# In fit


def regression_data(samples=10):
    return sequences(samples), np.random.default_rng(35).normal(size=(samples, 1)).astype("float32")


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
    with mirrored_strategy.scope():
        mirrored = compiled_model(Ours)
    alone = compiled_model(Ours, run_eagerly=True)
    np.testing.assert_allclose(
        losses(mirrored, samples=8, epochs=2), losses(alone, samples=8, epochs=2), rtol=1e-5
    )


# Configuration and files


def test_a_trained_model_and_its_copies_go_on_alike(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, FEATURES)),
            Ours(return_sequences=True, forget_bias=2.0),
            keras.layers.RNN([SimplifiedLSTMCell(2, activation="tanh", project_input=True)]),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse", run_eagerly=True)
    losses(model, epochs=1)
    pickled = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(pickled(sequences()), model(sequences()))
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert type(loaded.layers[0]) is SimplifiedLSTM
    assert type(loaded.layers[1].cell.cells[0]) is SimplifiedLSTMCell
    np.testing.assert_array_equal(loaded(sequences()), model(sequences()))
    # The optimizer's moments came along too; how to run did not.
    loaded.run_eagerly = True
    np.testing.assert_allclose(losses(loaded, epochs=1), losses(model, epochs=1), rtol=1e-6)


def test_exported_saved_model_gives_the_same_outputs(tmp_path):
    model = compiled_model(Ours, run_eagerly=True)
    losses(model, epochs=1)
    model.export(str(tmp_path), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path))
    for x in (sequences(), sequences()[:1, :1]):
        assert relative_error(loaded.serve(x), model(x)) < 1e-6


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


def test_clone_model_takes_the_same_weights():
    model = compiled_model(Ours)
    clone = keras.models.clone_model(model)
    assert [type(layer) for layer in clone.layers] == [SimplifiedLSTM, keras.layers.Dense]
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(sequences()), model(sequences()))


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

    layer, around_the_cell = Ours(), Theirs()
    for model in (layer, around_the_cell):
        model.build(x.shape)
    with pytest.raises(ValueError, match="differentiable once"):
        penalty_gradient(layer)
    # What the error message advises.
    assert np.linalg.norm(penalty_gradient(around_the_cell)) > 0
