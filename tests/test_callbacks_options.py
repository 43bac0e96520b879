"""GradientNorms's every, weights, batch_logs, on_nonfinite and stop_above, against the tape loop.

And a property test over whole trainings. Where a number is expected, it comes from `tape_loop` or
from NumPy; where weights are, from a `fit` without the callback, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import randomize
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras import layers
from test_callbacks import (
    Case,
    Poisonable,
    Subclassed,
    X,
    Y,
    all_variables,
    assert_recorded,
    assert_same_weights,
    batches,
    dense,
    expected_state_norms,
    linear_model,
    mse,
    recurrent_model,
    sequences,
    sgd,
    untouched,
)

import kerasgrad as kg
from kerasgrad import norms as norms_module
from kerasgrad import recorder as recorder_module
from kerasgrad.callbacks import GradientNorms
from kerasgrad.history import GradientHistory

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:keras")

MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "jit_compile": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 4},
}


@functools.cache
def every_third():
    """A case of 10 steps with a recurrent layer; the oracle's rows and state norms of each step."""
    x, of_states = sequences(), []

    def loss(model, x, y):
        of_states.append(expected_state_norms(model, model.layers[0].cell, x, y))
        return mse(model, x, y)

    case = Case(
        lambda: recurrent_model(kg.layers.SimpleRNN(3)),
        sgd(global_clipnorm=0.8),
        fit=lambda: {"x": x, "y": Y, "batch_size": 4},
        data=batches(x, Y, batch_size=4),
        loss=loss,
    )
    return case, case.oracle(), np.array(of_states)


# every=


@pytest.mark.parametrize("mode", MODES)
def test_every_third_step(mode):
    case, rows, of_states = every_third()
    case = dataclasses.replace(case, compile=MODES[mode])
    third, fourth = GradientNorms(every=3), GradientNorms(every=4)
    plain, recorded = case.trained(), case.trained([third, fourth])
    assert_same_weights(plain, recorded)
    for norms, every in (third, 3), (fourth, 4):
        assert_recorded(norms.history, rows[::every])
        np.testing.assert_array_equal(norms.history.epoch, np.repeat([0, 1], 5)[::every])
        (recorded_states,) = norms.history.state_norms.values()
        np.testing.assert_allclose(recorded_states, of_states[::every], rtol=1e-5)


@pytest.mark.parametrize("mode", ["graph", "eager", "steps_per_execution"])
def test_no_gradient_has_its_norm_taken_at_the_other_steps(mode, monkeypatch):
    executed, by_call = 0, []

    def count():
        nonlocal executed
        executed += 1

    def counting(tensors):
        tf.py_function(count, [], [])  # Each time that it is executed, not traced.
        return norms_of(tensors)

    class Counts(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            by_call.append(executed)

    norms_of = norms_module._norms
    monkeypatch.setattr(norms_module, "_norms", counting)
    # The norms of how far an epoch's first update moves the weights have no part in this.
    monkeypatch.setattr(recorder_module.Recorder, "sample_updates", lambda self, before: None)
    model, norms = recurrent_model(kg.layers.SimpleRNN(3)), GradientNorms(every=5)
    model.compile(sgd(clipnorm=0.1)(), "mse", **MODES[mode])
    for _ in range(2):
        model.fit(sequences(), Y, batch_size=4, verbose=0, callbacks=[norms, Counts()])
    assert norms.history.step.tolist() == [0, 5]
    # All in the call of step 0 and, a second time, in that of step 5.
    assert executed > 0
    half = executed // 2
    assert by_call == np.repeat([half, executed], len(by_call) // 2).tolist()


def test_every_with_gradient_accumulation_and_a_second_fit():
    # The step is that of the update: of its micro-steps either all are recorded or none.
    case = Case(
        optimizer=sgd(gradient_accumulation_steps=2, clipnorm=0.5),
        fit=lambda: {"x": X, "y": Y, "batch_size": 5},
        data=batches(X, Y, batch_size=5, epochs=4),
    )
    plain, norms = case.trained(), GradientNorms(every=3)
    recorded = case.trained([norms])
    for model, callbacks in (plain, []), (recorded, [norms]):
        model.fit(X, Y, batch_size=5, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    rows = case.oracle()
    assert [row.step for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert_recorded(norms.history, [row for row in rows if row.step % 3 == 0])
    assert_same_weights(plain, recorded)


def test_the_record_is_read_in_time_after_somebody_else_has_read_it(monkeypatch):
    # Read at each batch at first, the buffer seems to fill slowly; then it fills at its real pace.
    monkeypatch.setattr(recorder_module, "_ROWS", 16)
    norms, model = GradientNorms(), dense()
    model.compile("sgd", "mse", steps_per_execution=4)

    def read(batch, logs):
        if batch < 40:
            len(norms.history)

    x, y = np.tile(X, (12, 1)), np.tile(Y, (12, 1))
    reader = keras.callbacks.LambdaCallback(on_train_batch_end=read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(x, y, batch_size=1, verbose=0, callbacks=[norms, reader])
    np.testing.assert_array_equal(norms.history.step, np.arange(240))


# weights=

# weights= of a model with (kernel, recurrent_kernel, bias) and a head of (kernel, bias): columns.
SELECTIONS = {
    "a pattern of paths": ("*/recurrent_kernel", [1]),
    "a name": ("bias", [2, 4]),
    "a list": (["kernel", "*/bias"], [0, 2, 3, 4]),
    "a pattern of names": ("*kernel", [0, 1, 3]),
    "a predicate": (lambda v: len(v.shape) == 1, [2, 4]),
    "all": ("*", [0, 1, 2, 3, 4]),
}


def only(rows, columns):
    """The oracle's rows with these weights only."""

    def of(values):
        return None if values is None else [values[i] for i in columns]

    return [
        dataclasses.replace(
            row, norms=of(row.norms), before=of(row.before), applied=of(row.applied)
        )
        for row in rows
    ]


def test_selected_weights():
    # All in one fit, on the same model: each has its own columns.
    case, rows, of_states = every_third()
    callbacks = {name: GradientNorms(weights=weights) for name, (weights, _) in SELECTIONS.items()}
    plain, recorded = case.trained(), case.trained(callbacks.values())
    assert_same_weights(plain, recorded)
    paths = [w.path for w in recorded.trainable_variables]
    for name, norms in callbacks.items():
        columns = SELECTIONS[name][1]
        assert norms.history.weights == tuple(paths[i] for i in columns)
        # Global norms are those of the selection, clipping is that of all weights together.
        assert_recorded(norms.history, only(rows, columns))
        assert norms.history.clip_rate > 0
        (recorded_states,) = norms.history.state_norms.values()
        np.testing.assert_allclose(recorded_states, of_states, rtol=1e-5)


@pytest.mark.parametrize("build", [dense, Subclassed])
@pytest.mark.parametrize("weights", ["nothing", [], lambda v: False])
def test_selection_of_nothing(build, weights):
    model = build()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="selects none of the trainable weights") as error:
        model.fit(X, Y, verbose=0, callbacks=[GradientNorms(weights=weights)])
    assert model.optimizer.iterations == 0
    assert untouched(model)
    for weight in model.trainable_variables:
        assert weight.path in str(error.value)


def test_selected_weights_that_are_frozen_and_thawed():
    model, norms = dense(), GradientNorms(weights="bias")
    hidden, head = (layer.bias.path for layer in model.layers)
    for trainable in False, True, False:
        model.layers[0].trainable = trainable
        model.compile("sgd", "mse")
        model.fit(X, Y, batch_size=20, verbose=0, callbacks=[norms])
    assert norms.history.weights == (head, hidden)
    np.testing.assert_array_equal(
        norms.history.missing, [[False, True], [False, False], [False, True]]
    )
    model.layers[1].trainable, norms = False, GradientNorms(weights=head)
    model.layers[0].trainable = True
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=re.escape(hidden)):
        model.fit(X, Y, verbose=0, callbacks=[norms])


# batch_logs=


class Seen(keras.callbacks.Callback):
    """The logs of each batch and epoch, as this callback sees them."""

    def on_train_begin(self, logs=None):
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(dict(logs))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(dict(logs))


def test_batch_logs_are_seen_by_all_callbacks_in_any_order(tmp_path, capsys):
    keras.utils.set_random_seed(3)
    model, norms, seen = dense(), GradientNorms(batch_logs=True), Seen()
    model.compile(keras.optimizers.SGD(0.05, clipnorm=0.9), "mse")
    never = {"monitor": "grad_norm", "mode": "min", "min_delta": 1e9}
    before = [
        seen,
        keras.callbacks.EarlyStopping(patience=2, **never),
        keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.5, **never),
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        keras.callbacks.ModelCheckpoint(
            str(tmp_path / "{grad_norm:.6f}.keras"), monitor="grad_norm", mode="min"
        ),
        keras.callbacks.TensorBoard(str(tmp_path / "tb"), write_graph=False),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # They warn of a metric that is not there.
        log = model.fit(
            X, Y, batch_size=4, epochs=9, shuffle=False, verbose=1, callbacks=[*before, norms]
        ).history
    history = norms.history
    assert len(history) == 15  # Stopped after the third epoch.
    assert history.step.tolist() == list(range(15))
    means, rates = [], []
    for epoch in range(3):
        whole = np.linalg.norm(history.norms[history.epoch == epoch].astype("float64"), axis=1)
        clipped = (history.applied_norms < history.norms * (1 - 1e-5)).any(axis=1)
        clipped = clipped[history.epoch == epoch]
        means += [whole[: n + 1].mean() for n in range(5)]
        rates += [clipped[: n + 1].mean() for n in range(5)]
        maximum = seen.batches[5 * epoch + 2]["grad_norm_max"]
        np.testing.assert_allclose(maximum, whole[:3].max(), rtol=1e-6)
    np.testing.assert_allclose([logs["grad_norm"] for logs in seen.batches], means, rtol=1e-6)
    np.testing.assert_allclose([logs["grad_clip_rate"] for logs in seen.batches], rates)
    of_epochs = means[4::5]
    for values in log["grad_norm"], [logs["grad_norm"] for logs in seen.epochs]:
        np.testing.assert_allclose(values, of_epochs, rtol=1e-6)
    # The progress bar, the CSV file, the checkpoint's name, the learning rate.
    shown = re.findall(r"grad_norm: (\S+)", capsys.readouterr().out)
    np.testing.assert_allclose(float(shown[-1]), means[-1], atol=1e-4)
    header, *lines = [line.split(",") for line in (tmp_path / "log.csv").read_text().split()]
    written = [float(line[header.index("grad_norm")]) for line in lines]
    np.testing.assert_allclose(written, of_epochs, rtol=1e-6)
    assert (tmp_path / f"{of_epochs[0]:.6f}.keras").exists()
    assert model.optimizer.learning_rate < 0.05
    assert "epoch_grad_norm" in written_tags(tmp_path / "tb" / "train")
    assert untouched(model)


def written_tags(folder):
    (file,) = folder.glob("events*")
    return {
        value.tag
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }


@pytest.mark.parametrize("mode", ["eager", "steps_per_execution"])
def test_batch_logs_leave_the_other_logs_and_the_training_alone(mode):
    case = Case(
        compile=MODES[mode] | {"metrics": ["mae"]}, fit=lambda: {"x": X, "y": Y, "batch_size": 4}
    )
    logs = {}
    for name, callbacks in {"plain": [], "recorded": [GradientNorms(batch_logs=True)]}.items():
        seen = Seen()
        logs[name] = case.trained([seen, *callbacks]), seen
    plain, recorded = (seen.batches + seen.epochs for _, seen in logs.values())
    added = {"grad_norm", "grad_norm_max", "grad_clip_rate"}
    for before, after in zip(plain, recorded, strict=True):
        assert set(after) - set(before) == added
        assert all(np.array_equal(after[key], before[key]) for key in before)
    assert_same_weights(logs["plain"][0], logs["recorded"][0])


# on_nonfinite= and stop_above=


class Spoil(layers.Layer):
    """Hands on its first input; its gradient is NaN where the second is above 100."""

    def call(self, inputs):
        @tf.custom_gradient
        def spoiled(h, x):
            factor = tf.where(tf.reduce_any(x > 100), np.nan, 1.0)
            return tf.identity(h), lambda g: (g * factor, tf.zeros_like(x))

        return spoiled(*inputs)


def spoilable():
    """Of its weights only the hidden layer's can have a gradient of NaN."""
    keras.utils.set_random_seed(3)
    x = keras.Input((4,))
    hidden = layers.Dense(5, activation="tanh", name="hidden")(Poisonable()(x))
    return keras.Model(x, layers.Dense(1, name="head")(Spoil()([hidden, x])))


BAD = 5  # The step at which the gradient is NaN, or larger than before.


def spoiled(bad=BAD, value=101.0):
    x = X.copy()
    x[2 * bad] = value
    return x


def fit(model, x, callbacks=(), y=Y, **options):
    options = {"batch_size": 2, "shuffle": False, "verbose": 0} | options
    return model.fit(x, y, callbacks=list(callbacks), **options)


def momentum():
    return keras.optimizers.SGD(0.01, momentum=0.9, global_clipnorm=5.0)


@functools.cache
def fit_until_bad(mode):
    """All variables after the steps before BAD, and after another fit, without the callback."""
    model = spoilable()
    model.compile(momentum(), "mse", **MODES[mode])
    fit(model, X[: 2 * BAD], y=Y[: 2 * BAD])
    before = [v.numpy() for v in all_variables(model)]
    fit(model, X)
    return before, [v.numpy() for v in all_variables(model)]


def assert_variables(model, expected):
    for variable, value in zip(all_variables(model), expected, strict=True):
        assert np.array_equal(variable, value), variable.path


@pytest.mark.parametrize(
    ("mode", "limit"),
    [
        *((mode, "stop") for mode in MODES),
        *((mode, "raise") for mode in ("graph", "eager")),
        *((mode, "stop_above") for mode in ("jit_compile", "steps_per_execution")),
    ],
)
def test_stops_at_the_very_step(mode, limit):
    before, after = fit_until_bad(mode)
    model = spoilable()
    model.compile(momentum(), "mse", **MODES[mode])
    # The gradient of the spoiled batch is finite where its cause is below 100, and large.
    norms = (
        GradientNorms(stop_above=100.0)
        if limit == "stop_above"
        else GradientNorms(on_nonfinite=limit)
    )
    x = spoiled(value=99.0) if limit == "stop_above" else spoiled()
    y = np.where(np.arange(20)[:, None] == 2 * BAD, 1e4, Y) if limit == "stop_above" else Y
    if limit == "raise":
        ends = pytest.raises(FloatingPointError, match=rf"hidden/kernel \(and.*NaN at step {BAD}$")
    elif limit == "stop":
        ends = pytest.warns(UserWarning, match=rf"hidden/kernel \(and of 1 .* NaN at step {BAD}: ")
    else:
        ends = pytest.warns(UserWarning, match=rf"norm is \S+ at step {BAD}, above stop_above=100")
    with ends:
        log = fit(model, x, [norms], y=y, epochs=3)
        assert len(log.history["loss"]) == 1
    assert_variables(model, before)
    history = norms.history
    assert history.step.tolist() == list(range(BAD + 1))
    assert history.updated.tolist() == [True] * BAD + [False]
    if limit == "stop_above":
        assert np.isfinite(history.norms).all()
        assert (history.global_norm[:BAD] < 100).all() and history.global_norm[BAD] > 100
    else:
        np.testing.assert_array_equal(
            np.isnan(history.norms[BAD]), ["hidden" in path for path in history.weights]
        )
    assert np.isfinite(history.norms[:BAD]).all() and np.isfinite(history.loss).all()
    assert np.isnan(history.applied_norms[BAD]).all() and np.isnan(history.clip_factor[BAD])
    # The model trains on, momentum and all, as if the bad step had never come.
    assert untouched(model)
    fit(model, X, [norms])
    assert_variables(model, after)
    assert norms.history.step[BAD:].tolist() == [BAD, *range(BAD, BAD + 10)]


@pytest.mark.parametrize("mode", ["graph", "steps_per_execution"])
def test_warns_once_and_goes_on(mode):
    def trained(callbacks):
        model = spoilable()
        model.compile(momentum(), "mse", **MODES[mode])
        fit(model, spoiled(), callbacks, epochs=2)
        return model

    norms = GradientNorms(on_nonfinite="warn")
    with pytest.warns(UserWarning) as caught:
        recorded = trained([norms])
    assert [str(w.message).split(" is ")[1] for w in caught] == [f"NaN at step {BAD}"]
    assert len(norms.history) == 20 and norms.history.updated.all()
    assert_same_weights(trained([]), recorded)  # NaN equals NaN.


LIMITS = {"on_nonfinite": "raise", "stop_above": 1e6}
OPTIMIZERS = {
    "SGD, global_clipnorm": sgd(global_clipnorm=1.0),
    "Adam, clipnorm": lambda: keras.optimizers.Adam(0.01, clipnorm=0.5),
    "momentum": momentum,
    "accumulation": sgd(gradient_accumulation_steps=2, clipvalue=0.5),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=8.0
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_limit_that_is_never_met_changes_nothing(name):
    mode = "jit_compile" if name == "momentum" else "graph"
    case = Case(
        optimizer=OPTIMIZERS[name],
        compile=MODES[mode],
        fit=lambda: {"x": X, "y": Y, "batch_size": 5},
        data=batches(X, Y, batch_size=5),
    )
    norms = GradientNorms(**LIMITS)
    plain, recorded = case.trained(), case.trained([norms])
    assert_same_weights(plain, recorded)
    if name == "loss scale":
        case.optimizer = lambda: keras.optimizers.Adam(0.01)
    assert_recorded(norms.history, case.oracle(), rtol=1e-4)


@pytest.mark.parametrize("options", [{"on_nonfinite": "stop"}, LIMITS, {"on_nonfinite": "warn"}])
def test_steps_that_a_loss_scale_optimizer_skips_do_not_count(options):
    def trained(callbacks):
        model = spoilable()
        optimizer = keras.optimizers.LossScaleOptimizer(sgd()(), initial_scale=8.0)
        model.compile(optimizer, "mse")
        fit(model, spoiled(), callbacks, epochs=2)
        return model

    norms = GradientNorms(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain, recorded = trained([]), trained([norms])
    assert_same_weights(plain, recorded)
    assert np.flatnonzero(~norms.history.updated).tolist() == [BAD, 10 + BAD]


def test_an_infinite_norm_that_a_loss_scale_optimizer_skips_is_not_above_the_limit():
    model = linear_model()
    model.compile(keras.optimizers.LossScaleOptimizer(sgd()(), initial_scale=8.0), model.loss)
    x = np.array([[1.0], [np.inf], [1.0], [50.0]], "float32")
    norms = GradientNorms(stop_above=10.0)
    with pytest.warns(UserWarning, match="norm is 50 at step 2, above stop_above=10"):
        fit(model, x, [norms], y=np.ones_like(x), batch_size=1)
    assert norms.history.updated.tolist() == [True, False, True, False]


def stopped(norms, x=None, callbacks=(), build=spoilable, y=Y, **options):
    """The model after a fit that ends with one warning, and the warning."""
    model = build()
    model.compile(options.pop("optimizer", sgd())(), "mse", **options)
    with pytest.warns(UserWarning) as caught:
        fit(model, spoiled() if x is None else x, [norms, *callbacks], y=y, epochs=3)
    (warning,) = caught
    return str(warning.message)


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 4}, {"run_eagerly": True}])
def test_limits_hold_at_steps_that_are_not_recorded(options):
    norms, other = GradientNorms(every=3, on_nonfinite="stop"), GradientNorms(every=2)
    assert f"at step {BAD}: the training stops" in stopped(norms, None, [other], **options)
    assert norms.history.step.tolist() == [0, 3, BAD]
    assert norms.history.updated.tolist() == [True, True, False]
    assert other.history.step.tolist() == [0, 2, 4]


def test_limits_are_those_of_the_selected_weights():
    norms = GradientNorms(weights="hidden/bias", on_nonfinite="stop")
    assert stopped(norms).startswith(f"The gradient of hidden/bias is NaN at step {BAD}:")
    assert norms.history.weights == ("hidden/bias",)
    # The head's own gradients are finite at BAD, where the hidden weights become NaN, and are not
    # at the next step.
    norms = GradientNorms(weights="head/*", on_nonfinite="stop", stop_above=1e9)
    assert f"The gradient of head/kernel (and of 1 more weights) is NaN at step {BAD + 1}" in (
        stopped(norms)
    )


def test_a_warning_does_not_hide_a_limit():
    x, y = spoiled(2), np.where(np.arange(20)[:, None] == 12, 1e6, Y)

    class Resets(keras.callbacks.Callback):
        """Puts the weights back that the step with NaN has spoiled."""

        def on_train_batch_end(self, batch, logs=None):
            if not np.isfinite(self.model.get_weights()[0]).all():
                randomize(self.model)

    model = spoilable()
    model.compile(sgd()(), "mse")
    norms = GradientNorms(on_nonfinite="warn", stop_above=1e3)
    with pytest.warns(UserWarning) as caught:
        fit(model, x, [norms, Resets()], y=y, epochs=3)
    assert ["is NaN at step 2" in str(w.message) for w in caught] == [True, False]
    assert "at step 6, above stop_above=1000: the training stops" in str(caught[1].message)
    assert norms.history.updated.tolist() == [True] * 6 + [False]


def test_inf_is_above_any_limit():
    x = np.array([[1.0], [np.inf], [1.0]], "float32")
    for options in {}, {"on_nonfinite": "warn"}:
        model, norms = linear_model(), GradientNorms(stop_above=10.0, **options)
        with pytest.warns(UserWarning, match="norm is inf at step 1, above stop_above=10: the tr"):
            fit(model, x, [norms], y=np.ones_like(x), batch_size=1)
        assert norms.history.updated.tolist() == [True, False]


def test_a_limit_between_the_norm_and_what_float32_makes_of_it():
    # The record is rounded; what the graph has decided must still be seen by the host.
    for x in np.linspace(0.1, 0.9, 30, dtype="float32"):
        exact = np.float64(np.float32(x * np.float32(3))) / 3
        if np.float32(exact) < exact:
            break
    model = linear_model(loss_scale_factor=3.0)
    norms = GradientNorms(stop_above=(np.float64(np.float32(exact)) + exact) / 2)
    with pytest.warns(UserWarning, match="at step 0, above"):
        fit(model, np.full((3, 1), x), [norms], y=np.ones((3, 1), "float32"), batch_size=1)
    assert norms.history.updated.tolist() == [False]
    assert norms.history.global_norm[0] < norms._recorders[""].limits.stop_above


def test_a_call_that_fails_after_a_step_that_is_forbidden():
    model, norms = spoilable(), GradientNorms(on_nonfinite="stop")
    model.compile(sgd()(), "mse", steps_per_execution=4)
    x = spoiled()
    x[2 * BAD + 2] = 1e9  # Poisonable raises at the next step of the same call.
    with pytest.raises(tf.errors.InvalidArgumentError):
        fit(model, x, [norms])
    assert norms.history.step.tolist() == list(range(BAD + 1))
    assert not norms.history.updated[-1]
    fit(model, X, [norms])
    assert norms.history.updated[-10:].all()


def test_two_callbacks_with_different_limits():
    first, second = GradientNorms(stop_above=1e9), GradientNorms(on_nonfinite="stop")
    assert "hidden/kernel" in stopped(first, None, [second])
    for norms in first, second:
        assert norms.history.updated.tolist() == [True] * BAD + [False]


def test_gradient_accumulation_stops_at_the_micro_step():
    norms = GradientNorms(on_nonfinite="stop")
    message = stopped(norms, optimizer=sgd(gradient_accumulation_steps=4))
    assert "is NaN at step 1: " in message
    assert norms.history.updated.tolist() == [False] * 3 + [True, False, False]


def test_mirrored_strategy_stops_after_the_step(mirrored_strategy):
    norms = GradientNorms(on_nonfinite="stop")
    with mirrored_strategy.scope():
        model = spoilable()
        model.compile(sgd()(), "mse")
    with pytest.warns(UserWarning, match=rf"NaN at step {BAD}: the training stops\.$"):
        fit(model, spoiled(), [norms])
    assert norms.history.updated.tolist() == [True] * (BAD + 1)


def test_no_gradient_at_all_is_still_keras_s_error():
    def message(callbacks):
        model = dense()
        model.compile("sgd", loss=lambda y, y_pred: tf.reduce_sum(y))
        with pytest.raises(ValueError, match="No gradients") as error:
            fit(model, X, callbacks)
        return str(error.value).split("\n")[0]

    assert message([]) == message([GradientNorms(**LIMITS)])


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"every": -2},
        {"every": 1.5},
        {"on_nonfinite": "halt"},
        {"on_nonfinite": True},
        {"stop_above": 0},
        {"stop_above": -1.0},
        {"stop_above": np.nan},
    ],
    ids=str,
)
def test_invalid_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"^{name} must be .*Received: {re.escape(repr(value))}"):
        GradientNorms(**options)


# Other strategies


def test_strategies_that_add_up_otherwise():
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0"])
    with strategy.scope():
        model = dense()
        model.compile("sgd", "mse")
    # Made without its collectives, which a process can start only once.
    several = object.__new__(tf.distribute.MultiWorkerMirroredStrategy)
    for given_strategy, name in (strategy, "CentralStorage"), (several, "MultiWorkerMirrored"):
        model._distribute_strategy = given_strategy
        norms = GradientNorms()
        norms.set_model(model)
        with pytest.raises(ValueError, match=rf"{name}Strategy adds up.*MirroredStrategy, OneDev"):
            norms.on_train_begin()
        assert untouched(model)
    model._distribute_strategy = strategy
    with pytest.raises(ValueError, match="CentralStorageStrategy"):
        fit(model, X, [GradientNorms()])
    assert model.optimizer.iterations == 0


# The cost of a record


def test_a_read_costs_the_same_however_long_the_record(monkeypatch):
    work = []
    whole = GradientHistory._rows
    monkeypatch.setattr(GradientHistory, "_rows", lambda self: work.append(1) or whole(self))
    counts = []
    for epochs in 1, 8:
        norms, model = GradientNorms(batch_logs=True, **LIMITS), dense()
        model.compile("sgd", "mse")
        fit(model, X, [norms], epochs=epochs)
        counts.append(len(work))
        work.clear()
        assert len(norms.history) == 10 * epochs
    assert counts[0] == counts[1]  # Nobody joined the pieces of the record.


# Any training


def tokens():
    # Each token once a batch: how Keras clips repeated rows is in test_callbacks.py.
    return np.random.default_rng(4).permuted(np.tile(np.arange(16), (3, 1)), axis=1)


def bidirectional():
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(16, 3),
            layers.Bidirectional(kg.layers.SimpleRNN(2)),
            layers.Dense(1),
        ]
    )


RECURRENT = {
    "SimpleRNN": lambda: kg.layers.SimpleRNN(3),
    "SimplifiedLSTM": lambda: kg.layers.SimplifiedLSTM(3),
    "Keras's LSTM": lambda: layers.LSTM(3),
}
MODELS = {
    "MLP": (dense, X[:12]),
    **{
        name: (lambda make=make: recurrent_model(make()), sequences(4)[:12])
        for name, make in RECURRENT.items()
    },
    "Embedding, Bidirectional": (bidirectional, tokens().reshape(12, 4)),
}
RULES = {
    "SGD": keras.optimizers.SGD,
    "momentum": functools.partial(keras.optimizers.SGD, momentum=0.9),
    "Adam": keras.optimizers.Adam,
    "RMSprop": keras.optimizers.RMSprop,
    "AdamW": keras.optimizers.AdamW,
}
CLIPPING = [{}, {"clipnorm": 0.3}, {"global_clipnorm": 0.5}, {"clipvalue": 0.05}]


# Making a failing example smaller would take minutes; it is a small one anyway.
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from(list(MODELS)),
    st.sampled_from(list(RULES)),
    st.sampled_from(CLIPPING),
    st.sampled_from([None, 2]),
    st.sampled_from(list(MODES)),
    st.sampled_from([1, 2]),
)
def test_any_training(model, rule, clipping, accumulation, mode, every):
    build, x = MODELS[model]
    options = clipping | {"gradient_accumulation_steps": accumulation}
    case = Case(
        build,
        lambda: RULES[rule](0.01, **options),
        MODES[mode] | ({"steps_per_execution": 3} if mode == "steps_per_execution" else {}),
        lambda: {"x": x, "y": Y[:12], "batch_size": 4},
        batches(x, Y[:12], batch_size=4),
    )
    norms = GradientNorms(every=every)
    plain, recorded = case.trained(), case.trained([norms])
    if (model, mode) == ("Embedding, Bidirectional", "jit_compile") and "clipnorm" in clipping:
        # XLA fuses the sum inside of clipnorm otherwise where the rows of an embedding's gradient
        # have a second reader: the last bit differs.
        for a, b in zip(all_variables(plain), all_variables(recorded), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    else:
        assert_same_weights(plain, recorded)
    rows = [(i // 3, row) for i, row in enumerate(case.oracle()) if row.step % every == 0]
    # Where a gradient is near 0, an adaptive rule makes much of its rounding errors.
    assert_recorded(norms.history, [row for _, row in rows], rtol=1e-4)
    assert norms.history.epoch.tolist() == [epoch for epoch, _ in rows]
    assert norms.history.weights == tuple(w.path for w in recorded.trainable_variables)
