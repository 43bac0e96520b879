"""What every recurrent layer of kerasgrad must do alike, against Keras and the cell unrolled.

Keras's side is keras.layers.SimpleRNN for SimpleRNN, and keras.layers.RNN around the cell, with
Keras's own loop and automatic differentiation, for SimplifiedLSTM.
"""

from __future__ import annotations

import functools
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
    assigning,
    outputs_and_gradients,
    randomize,
    relative_error,
    run_layer_case,
    state_gradients_through,
    unrolled_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kerasgrad.layers import (
    IRNN,
    SimpleRNN,
    SimplifiedLSTM,
    SimplifiedLSTMCell,
    explicit_gradient,
    recurrence,
)

_OF_THE_CELL = ("activation", "use_bias", "forget_bias", "dtype", "trainable")


def rnn_around_the_cell(**arguments):
    of_the_cell = {name: arguments[name] for name in _OF_THE_CELL if name in arguments}
    cell = SimplifiedLSTMCell(UNITS, project_input=True, **of_the_cell)
    of_the_layer = {
        name: value
        for name, value in arguments.items()
        if name not in _OF_THE_CELL or name in ("dtype", "trainable")
    }
    return keras.layers.RNN(cell, **of_the_layer)


OURS = {
    "SimpleRNN": functools.partial(SimpleRNN, UNITS),
    "SimplifiedLSTM": functools.partial(SimplifiedLSTM, UNITS, project_input=True),
}
THEIRS = {
    "SimpleRNN": functools.partial(keras.layers.SimpleRNN, UNITS),
    "SimplifiedLSTM": rnn_around_the_cell,
}

KINDS = pytest.mark.parametrize("kind", OURS)


def for_kinds(names, simple_rnn, simplified_lstm):
    """Parameters for each kind of layer: all of them for one, the costliest left out for the other.

    The layers share their code but for the compiled loops, so what tests the shared part need not
    run twice.
    """
    runs = [("SimpleRNN", *run) for run in simple_rnn]
    runs += [("SimplifiedLSTM", *run) for run in simplified_lstm]
    return pytest.mark.parametrize(("kind", *names), runs)


@pytest.fixture
def two_shares(monkeypatch):
    """The batch is cut in two, as that of a larger layer is."""
    monkeypatch.setattr(explicit_gradient, "_worth_sharing", lambda batch, units: True)


def sequences(batch=BATCH, dtype="float32", seed=21):
    return np.random.default_rng(seed).normal(size=(batch, TIMESTEPS, FEATURES)).astype(dtype)


def run_model(model, x, mode):
    randomize(model)
    return outputs_and_gradients(model, model.trainable_variables, [x], mode)


# The layer against Keras's


@functools.cache
def keras_case(kind, case, dtype):
    return run_layer_case(THEIRS[kind], case, "eager", dtype)


@KINDS
@pytest.mark.parametrize(("mode", "dtype", "case"), LAYER_RUNS)
def test_outputs_and_gradients_equal_keras(kind, mode, dtype, case):
    actual = run_layer_case(OURS[kind], case, mode, dtype)
    assert_equal_results(actual, keras_case(kind, case, dtype), TOLERANCE[dtype])


@for_kinds(
    ["activation"],
    simple_rnn=[(name,) for name in (*EXPLICIT_ACTIVATIONS, None, "elu", "softsign")],
    simplified_lstm=[(name,) for name in (*EXPLICIT_ACTIVATIONS, "elu")],
)
def test_activations_equal_keras(kind, activation):
    results = [
        run_layer_case(
            functools.partial(make[kind], activation=activation),
            "holes, sequences, initial state",
            "eager",
            "float64",
        )
        for make in (OURS, THEIRS)
    ]
    assert_equal_results(*results, 1e-10)


@KINDS
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_stateful_carries_the_state_over_two_batches_and_resets(kind, mode):
    def run(make, mode):
        layer = make[kind](stateful=True)
        layer.build((BATCH, TIMESTEPS, FEATURES))
        randomize(layer)
        one_batch = functools.partial(
            outputs_and_gradients, layer, layer.trainable_variables, mode=mode
        )
        first, second = one_batch([sequences()]), one_batch([sequences(seed=22)])
        state = layer.states[0].numpy()
        layer.reset_state()
        return first, second, one_batch([sequences()]), state

    *ours, our_state = run(OURS, mode)
    *theirs, their_state = run(THEIRS, "eager")
    for actual, expected in zip(ours, theirs, strict=True):
        assert_equal_results(actual, expected, 1e-5)
    assert_equal_results(ours[2], ours[0], 1e-6)
    assert relative_error(our_state, their_state) < 1e-5
    if kind == "SimpleRNN":
        assert relative_error(our_state, ours[1][0][0]) == 0  # its output is its state


@for_kinds(
    ["mode", "policy", "tolerance"],
    simple_rnn=[
        ("eager", "mixed_float16", 5e-3),
        ("xla", "mixed_float16", 5e-3),
        ("graph", "mixed_bfloat16", 4e-2),
    ],
    simplified_lstm=[("eager", "mixed_float16", 5e-3), ("xla", "mixed_bfloat16", 4e-2)],
)
def test_mixed_precision_equals_keras(kind, mode, policy, tolerance):
    def run(make, mode):
        layer = make[kind](dtype=policy, return_sequences=True)
        layer.build((BATCH, TIMESTEPS, FEATURES))
        randomize(layer)
        call = functools.partial(layer, mask=HOLES)
        return layer, outputs_and_gradients(call, layer.trainable_variables, [sequences()], mode)

    layer, actual = run(OURS, mode)
    _, expected = run(THEIRS, "eager")
    assert actual[0][0].dtype == expected[0][0].dtype == layer.compute_dtype != "float32"
    assert all(gradient.dtype == "float32" for gradient in actual[1])
    assert_equal_results(actual, expected, tolerance)


@pytest.mark.parametrize(
    ("kind", "options", "weight", "share"),
    [
        ("SimpleRNN", {"recurrent_initializer": "identity"}, "kernel", 1.0),
        # Its open forget gate passes all on; i = o = 1/2.
        ("SimplifiedLSTM", {"forget_bias": 20.0}, "kernel_c", 0.25),
    ],
)
def test_half_precision_sums_over_many_steps_in_more(kind, options, weight, share):
    # 2000 equal shares: bfloat16, which has 8 bits, would stop adding at 256 of them.
    layer = OURS[kind](
        activation="linear", kernel_initializer="zeros", dtype="mixed_bfloat16", **options
    )
    x = np.ones((1, 2000, FEATURES), "float32")
    layer.build(x.shape)
    (weight,) = (w for w in layer.trainable_weights if w.name == weight)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x))
    np.testing.assert_allclose(tape.gradient(loss, weight.value), 2000 * share, rtol=1e-2)


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


def everything(layer):
    return [
        keras.layers.Masking(),
        keras.layers.Bidirectional(layer(return_sequences=True)),
        layer(return_sequences=True, activation="tanh"),
        layer(),
    ]


def run_stack(make, stack, mode, length):
    x = sequences()
    x[~HOLES] = 0  # what Masking skips
    return run_model(keras.Sequential([keras.Input((length, FEATURES)), *stack(make)]), x, mode)


@functools.cache
def keras_stack(kind, stack):
    return run_stack(THEIRS[kind], stack, "eager", TIMESTEPS)


@for_kinds(
    ["mode", "length", "stack"],
    simple_rnn=[
        *(
            ("eager", TIMESTEPS, stack)
            for stack in (masking, bidirectional, bidirectional_own_backward_layer, stacked, shared)
        ),
        *(
            (mode, length, stack)
            for mode, length in [("graph", None), ("xla", TIMESTEPS)]
            for stack in (bidirectional, stacked)
        ),
    ],
    simplified_lstm=[("eager", TIMESTEPS, everything), ("graph", None, everything)],
)
def test_stacks_equal_keras(kind, mode, length, stack):
    actual = run_stack(OURS[kind], stack, mode, length)
    assert_equal_results(actual, keras_stack(kind, stack), 1e-5)


@for_kinds(["mode"], simple_rnn=[(mode,) for mode in MODES], simplified_lstm=[("eager",)])
def test_embedding_mask_zero_equals_keras(kind, mode):
    tokens = np.where(HOLES, np.random.default_rng(23).integers(1, 7, HOLES.shape), 0)

    def run(make, mode):
        model = keras.Sequential(
            [
                keras.Input((None,), dtype="int32"),
                keras.layers.Embedding(7, FEATURES, mask_zero=True),
                make[kind](return_sequences=True),
                make[kind](),
            ]
        )
        randomize(model)
        return outputs_and_gradients(lambda: model(tokens), model.trainable_variables, [], mode)

    assert_equal_results(run(OURS, mode), run(THEIRS, "eager"), 1e-5)


@KINDS
@pytest.mark.parametrize(("mode", "outer"), [("eager", 2), ("graph", None)])
def test_time_distributed_equals_keras(kind, mode, outer):
    x = sequences(batch=2 * 3).reshape(3, 2, TIMESTEPS, FEATURES)

    def build(make):
        inputs = keras.Input((outer, TIMESTEPS, FEATURES))
        outputs = keras.layers.TimeDistributed(make[kind]())(inputs)
        return keras.Model(inputs, make[kind]()(outputs))

    expected = run_model(build(THEIRS), x, "eager")
    assert_equal_results(run_model(build(OURS), x, mode), expected, 1e-5)


@for_kinds(["mode"], simple_rnn=[(mode,) for mode in MODES], simplified_lstm=[("eager",)])
def test_encoder_state_through_a_mask_equals_keras(kind, mode):
    # A layer called with both a mask and an initial state gets a list of masks from Keras.
    x = sequences()
    x[~HOLES] = 0

    def build(make):
        inputs = keras.Input((None, FEATURES))
        masked = keras.layers.Masking()(inputs)
        output, state = make[kind](return_state=True)(masked)
        outputs = make[kind](return_sequences=True)(masked, initial_state=state)
        return keras.Model(inputs, [output, outputs])

    expected = run_model(build(THEIRS), x, "eager")
    assert_equal_results(run_model(build(OURS), x, mode), expected, 1e-5)


@for_kinds(
    ["batch", "timesteps"],
    simple_rnn=[(0, 1), (0, 2), (1, 1), (1, 2)],
    simplified_lstm=[(0, 2), (1, 1)],
)
def test_smallest_shapes_equal_keras(kind, batch, timesteps):
    x = sequences()[:batch, :timesteps]
    results = []
    for make in (OURS, THEIRS):
        layer = make[kind](return_sequences=True, return_state=True)
        layer.build(x.shape)
        results.append(run_model(layer, x, "eager"))
    assert_equal_results(*results, 1e-5)


@KINDS
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shares_of_a_small_batch_equal_keras(kind, batch, two_shares):
    test_smallest_shapes_equal_keras(kind, batch, timesteps=2)


# Back-propagation through time


@KINDS
@settings(max_examples=10, deadline=None)
@given(
    timesteps=st.integers(1, 12),
    batch=st.integers(1, 3),
    units=st.integers(1, 4),
    features=st.integers(1, 3),
    activation=st.sampled_from(EXPLICIT_ACTIVATIONS),
    use_bias=st.booleans(),
    mask_density=st.sampled_from([None, 0.0, 0.3, 0.7, 1.0]),
    return_sequences=st.booleans(),
    go_backwards=st.booleans(),
    zero_output_for_mask=st.booleans(),
    with_initial_state=st.booleans(),
    two_shares=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_explicit_recurrence_equals_the_unrolled_cell(
    kind,
    timesteps,
    batch,
    units,
    features,
    activation,
    use_bias,
    mask_density,
    return_sequences,
    go_backwards,
    zero_output_for_mask,
    with_initial_state,
    two_shares,
    seed,
):
    rng = np.random.default_rng(seed)
    x = tf.constant(rng.normal(size=(batch, timesteps, features)))
    mask = None if mask_density is None else rng.random((batch, timesteps)) < mask_density
    initial_state = (
        rng.normal(size=(batch, units)) if with_initial_state else np.zeros((batch, units))
    )
    initial_state = tf.constant(initial_state)
    c = rng.normal(size=(batch, timesteps, units))
    if not return_sequences:
        c[:, :-1] = 0

    layer = {
        "SimpleRNN": SimpleRNN,
        "SimplifiedLSTM": functools.partial(SimplifiedLSTM, project_input=features != units),
    }[kind](
        units,
        activation=activation,
        use_bias=use_bias,
        return_sequences=return_sequences,
        go_backwards=go_backwards,
        zero_output_for_mask=zero_output_for_mask,
        dtype="float64",
    )
    layer.build(x.shape)
    randomize(layer, seed=seed)
    expected_outputs, expected_λ, expected_gradients = unrolled_gradients(
        layer.cell,
        x,
        lambda outputs: tf.reduce_sum(c * outputs),
        initial_state=initial_state,
        mask=mask,
        go_backwards=go_backwards,
        zero_output_for_mask=zero_output_for_mask,
    )
    results = {}

    def step():
        with tf.GradientTape() as tape:
            tape.watch([x, initial_state])
            outputs = layer(x, initial_state=initial_state, mask=mask)
            value = tf.reduce_sum(outputs * (c if return_sequences else c[:, -1]))
        results["outputs"] = outputs
        weights = [weight.value for weight in layer.trainable_weights]
        results["gradients"] = tape.gradient(
            value, [x, initial_state, *weights], unconnected_gradients="zero"
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explicit_gradient, "_worth_sharing", lambda batch, units: two_shares)
        λ = state_gradients_through(layer, step)
    if not return_sequences:
        expected_outputs = expected_outputs[:, -1]
    assert relative_error(results["outputs"], expected_outputs) < 1e-10
    assert relative_error(λ, expected_λ) < 1e-10
    for gradient, expected in zip(results["gradients"], expected_gradients, strict=True):
        assert relative_error(gradient, expected) < 1e-10


@pytest.mark.parametrize(
    ("kind", "shared"), [("SimpleRNN", False), ("SimpleRNN", True), ("SimplifiedLSTM", True)]
)
def test_state_gradients_of_a_model_inside_fit_are_the_unrolled_ones(kind, shared, monkeypatch):
    monkeypatch.setattr(explicit_gradient, "_worth_sharing", lambda batch, units: shared)
    x = sequences(batch=8)
    y = np.random.default_rng(24).normal(size=(8, 1)).astype("float32")
    rnn = OURS[kind]()
    model = keras.Sequential([keras.Input((TIMESTEPS, FEATURES)), rnn, keras.layers.Dense(1)])
    randomize(model)
    dense = model.layers[-1]
    _, expected, _ = unrolled_gradients(
        rnn.cell, x, lambda outputs: tf.reduce_mean((dense(outputs[:, -1]) - y) ** 2)
    )
    # In a share of the batch nothing depends on how the model runs.
    for options in ({},) if shared else ({}, {"jit_compile": True}, {"run_eagerly": True}):
        λ = tf.Variable(tf.zeros((TIMESTEPS, 8, UNITS)))
        rnn.on_state_gradients = assigning(λ)
        # A learning rate of zero leaves the weights for the next round.
        model.compile(keras.optimizers.SGD(0.0), "mse", **options)
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
        assert relative_error(λ, expected) < 1e-5


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
def keras_losses(kind):
    return losses(compiled_model(THEIRS[kind]))


@KINDS
@pytest.mark.parametrize(
    "options",
    [{"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}],
    ids=["graph", "xla", "eager"],
)
def test_fit_gives_the_losses_that_keras_gives(kind, options):
    expected = keras_losses(kind)
    np.testing.assert_allclose(losses(compiled_model(OURS[kind], **options)), expected, rtol=1e-5)
    assert expected[-1] < expected[0]


@KINDS
def test_a_layer_is_traced_once_for_all_batches_and_epochs(kind, two_shares):
    functions = [
        function
        for module in (recurrence, explicit_gradient)
        for function in vars(module).values()
        if hasattr(function, "experimental_get_tracing_count")
    ]
    assert len(functions) == 7

    def traces():
        return sum(function.experimental_get_tracing_count() for function in functions)

    model = compiled_model(OURS[kind])
    losses(model, epochs=1)
    after_one_epoch = traces()
    losses(model, epochs=2)
    assert traces() == after_one_epoch


@KINDS
@pytest.mark.skipif(KERAS < (3, 10), reason="Keras 3.6 does not average over the replicas")
def test_fit_under_mirrored_strategy_gives_the_losses_of_one_device(kind, mirrored_strategy):
    # Eight samples: under a strategy Keras weighs a smaller last batch differently, for any layer.
    with mirrored_strategy.scope():
        mirrored = compiled_model(OURS[kind])
    alone = compiled_model(OURS[kind], run_eagerly=True)
    np.testing.assert_allclose(
        losses(mirrored, samples=8, epochs=2), losses(alone, samples=8, epochs=2), rtol=1e-5
    )


# Files


def test_a_trained_model_and_its_copies_go_on_alike(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, FEATURES)),
            keras.layers.Bidirectional(SimpleRNN(UNITS, return_sequences=True, dropout=0.0)),
            IRNN(UNITS, return_sequences=True),
            SimplifiedLSTM(UNITS, return_sequences=True, forget_bias=2.0),
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
    copied = keras.saving.load_model(path)
    assert type(copied.layers[0].forward_layer) is SimpleRNN
    assert type(copied.layers[1]) is IRNN
    assert type(copied.layers[2]) is SimplifiedLSTM
    assert type(copied.layers[3].cell.cells[0]) is SimplifiedLSTMCell
    np.testing.assert_array_equal(copied(sequences()), model(sequences()))
    # The optimizer's moments came along too; how to run did not.
    copied.run_eagerly = True
    np.testing.assert_allclose(losses(copied, epochs=1), losses(model, epochs=1), rtol=1e-6)


@KINDS
def test_exported_saved_model_gives_the_same_outputs(kind, tmp_path):
    model = compiled_model(OURS[kind], run_eagerly=True)
    losses(model, epochs=1)
    model.export(str(tmp_path), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path))
    for x in (sequences(), sequences()[:1, :1]):
        assert relative_error(loaded.serve(x), model(x)) < 1e-6


@KINDS
def test_clone_model_is_of_the_same_layers_and_draws_its_own_weights(kind):
    model = compiled_model(OURS[kind])
    clone = keras.models.clone_model(model)
    assert [type(layer) for layer in clone.layers] == [OURS[kind].func, keras.layers.Dense]
    assert [w.shape for w in clone.weights] == [w.shape for w in model.weights]
    assert not np.array_equal(clone(sequences()), model(sequences()))
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(sequences()), model(sequences()))


# Bad input


@KINDS
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5, 6)])
def test_wrong_rank_is_a_clear_error(kind, shape):
    with pytest.raises(ValueError, match=f"expected ndim=3, found ndim={len(shape)}"):
        OURS[kind]()(np.zeros(shape, "float32"))


@KINDS
def test_gradient_penalty_is_a_clear_error_and_works_with_the_cell(kind):
    x = tf.constant(sequences())

    def penalty_gradient(layer):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x))
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(penalty, layer.trainable_variables[0].value)

    layer = OURS[kind]()
    around_the_cell = keras.layers.RNN(type(layer.cell)(**layer.cell.get_config()))
    for model in (layer, around_the_cell):
        model.build(x.shape)
    with pytest.raises(ValueError, match="differentiable once"):
        penalty_gradient(layer)
    # What the error message advises.
    assert np.linalg.norm(penalty_gradient(around_the_cell)) > 0
