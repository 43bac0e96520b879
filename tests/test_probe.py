"""GradientNorms(probe=...): what it records, that nothing else changes, and what it refuses."""

from __future__ import annotations

import random
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from test_callbacks import (
    WEIGHTS,
    CountsTraces,
    Twice,
    X,
    Y,
    assert_same_weights,
    dense,
    recurrent_model,
    sequences,
    sgd,
    untouched,
)
from test_updates import RaiseAfter

import kerasgrad as kg
from kerasgrad import bptt
from kerasgrad import recorder as recorder_module
from kerasgrad.callbacks import GradientNorms
from kerasgrad.probe import Probe
from kerasgrad.recorder import NO_LIMITS, Recorder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:keras")

OTHER_X, OTHER_Y = sequences(4, seed=7)[:6], Y[:6]
FIT = {"x": sequences(), "y": Y, "batch_size": 8, "verbose": 0}  # 3 batches an epoch


class ByHand(keras.callbacks.Callback):
    """The oracle: the state gradients of the batch at each epoch's and each second step's end."""

    def __init__(self, *batch):
        super().__init__()
        self.batch, self.second_steps, self.epochs = batch, [], []

    def probed(self):
        x, y, sample_weight = (*self.batch, None)[:3]
        norms = {}
        for path, layer in bptt.recurrent_layers(self.model).items():
            λ = bptt.state_gradients(self.model, x, y, layer, sample_weight=sample_weight)
            for state, values in λ.items():
                by_example = [
                    [np.linalg.norm(v.astype("float64")) for v in example] for example in values
                ]
                norms[f"{path}:{state}"] = np.mean(by_example, axis=0)
        return int(self.model.optimizer.iterations.numpy()), norms

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations % 2 == 0:
            self.second_steps.append(self.probed())

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(self.probed())


def assert_probed(history, probes):
    assert history.probe_step.tolist() == [step for step, _ in probes]
    assert list(history.probe_state_norms) == list(probes[0][1])
    for key, norms in history.probe_state_norms.items():
        np.testing.assert_array_equal(norms, [of_step[key] for _, of_step in probes])


def stacked():
    """Three recurrent layers: an LSTM, and both directions of a SimpleRNN."""
    return keras.Sequential(
        [
            keras.Input((None, 3)),
            layers.LSTM(2, return_sequences=True, name="lstm"),
            layers.Bidirectional(layers.SimpleRNN(2, name="rnn")),
            layers.Dense(1),
        ]
    )


def test_a_probe_is_what_bptt_says_at_that_moment():
    batch = OTHER_X, OTHER_Y, WEIGHTS[:6]
    each_epoch, each_second = GradientNorms(probe=batch), GradientNorms(probe=batch, probe_every=2)
    by_hand = ByHand(*batch)
    model = stacked()
    model.compile(sgd()(), "mse")
    for _ in range(2):  # The second fit goes on.
        model.fit(**FIT, callbacks=[each_epoch, by_hand, each_second])
    assert each_epoch.history.probe_step.tolist() == [3, 6]
    assert each_second.history.probe_step.tolist() == [2, 4, 6]
    assert_probed(each_epoch.history, by_hand.epochs)
    assert_probed(each_second.history, by_hand.second_steps)
    keys = [key.split("/")[-1] for key in each_epoch.history.probe_state_norms]
    assert keys == ["lstm:h", "lstm:c", "forward_rnn:h", "backward_rnn:h"]
    assert all(norms.shape == (2, 4) for norms in each_epoch.history.probe_state_norms.values())
    assert all((norms > 0).all() for norms in each_epoch.history.probe_state_norms.values())
    assert untouched(model)


@pytest.mark.parametrize(
    "options", [{}, {"jit_compile": True}, {"steps_per_execution": 2}], ids=str
)
def test_a_probe_of_the_training_batch_equals_the_next_step_s_own_state_norms(options):
    # After step k the weights are those that step k + 1 starts from, and its batch is the same.
    x, layer = sequences(), kg.layers.SimplifiedLSTM(3)
    norms, model = GradientNorms(probe=(x, Y), probe_every=1), recurrent_model(layer)
    plain = GradientNorms()
    model.compile(sgd(learning_rate=0.5)(), "mse", **options)
    fit = {"x": np.tile(x, (2, 1, 1)), "y": np.tile(Y, (2, 1)), "batch_size": 20}
    model.fit(**fit, epochs=2, shuffle=False, verbose=0, callbacks=[norms, plain])
    history = norms.history
    assert history.step.tolist() == [0, 1, 2, 3]
    assert history.probe_step.tolist() == (
        [2, 4] if "steps_per_execution" in options else [1, 2, 3, 4]
    )
    (probed,), (recorded,) = history.probe_state_norms.values(), history.state_norms.values()
    (key,) = history.probe_state_norms
    assert key == f"{layer.path}:S"
    for step, values in zip(history.probe_step[:-1], probed, strict=False):
        np.testing.assert_allclose(values, recorded[step], rtol=1e-5)
    assert (np.abs(probed[0] / probed[-1] - 1) > 1e-3).any()  # Or the case shows nothing.


# Nothing else changes


def noisy():
    """All that a call of a model may change: a layer's state, statistics, seeds."""
    return keras.Sequential(
        [
            keras.Input(batch_shape=(4, None, 3)),
            CountsTraces(),
            layers.SimpleRNN(3, stateful=True, return_sequences=True, dropout=0.3, seed=4),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=5),
            kg.layers.SimpleRNN(3, stateful=True),
            layers.Dense(1),
        ]
    )


class Eavesdrops(keras.callbacks.Callback):
    """The logs of each batch, and what the random generators of the process would say."""

    def on_train_begin(self, logs=None):
        self.heard = []

    def on_train_batch_end(self, batch, logs=None):
        states = [v.numpy() for v in self.model.non_trainable_variables]
        python, numpy = random.getstate(), np.random.get_state()[1].tolist()
        self.heard.append((dict(logs), states, python, numpy))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=["graph", "run_eagerly"])
def test_the_training_and_the_record_are_the_same(options):
    x, trained = sequences(), []
    probe = {"probe": (x[:4, :3] + 1, Y[:4]), "probe_every": 2}
    for arguments in {}, probe:
        keras.utils.set_random_seed(3)
        model, norms, heard = noisy(), GradientNorms(**arguments), Eavesdrops()
        model.compile(sgd(momentum=0.9)(), "mse", metrics=["mae"], **options)
        fit = {"batch_size": 4, "verbose": 0, "callbacks": [norms, heard]}
        model.fit(x, Y, **fit)
        trained.append((model, norms.history, heard.heard))
    (plain, expected, before), (probed, history, after) = trained
    assert history.probe_step.tolist() == [2, 4]
    assert len(history.probe_state_norms) == 2
    assert_same_weights(plain, probed)
    for one, other in zip(before, after, strict=True):
        assert one[0] == other[0]
        assert all(map(np.array_equal, one[1], other[1]))
        assert one[2:] == other[2:]
    for name in "step", "loss", "norms", "applied_norms", "clip_factor", "update_norms":
        np.testing.assert_array_equal(getattr(history, name), getattr(expected, name))
    assert list(history.state_norms) != []
    for of_plain, of_probed in zip(
        expected.state_norms.values(), history.state_norms.values(), strict=True
    ):
        np.testing.assert_array_equal(of_plain, of_probed)
    assert plain.layers[0].traces == probed.layers[0].traces


def test_mirrored_strategy(mirrored_strategy):
    def trained(callbacks):
        keras.utils.set_random_seed(3)
        with mirrored_strategy.scope():
            model = keras.Sequential(
                [
                    keras.Input((None, 3)),
                    layers.BatchNormalization(),
                    layers.Dropout(0.5, seed=5),
                    kg.layers.SimpleRNN(3),
                    layers.Dense(1),
                ]
            )
            model.compile(sgd()(), "mse")
        model.fit(**FIT | {"batch_size": 10}, shuffle=False, callbacks=callbacks)
        return model

    norms, by_hand = GradientNorms(probe=(OTHER_X, OTHER_Y)), ByHand(OTHER_X, OTHER_Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        probed = trained([norms, by_hand])
    assert_same_weights(trained([]), probed)
    assert_probed(norms.history, by_hand.epochs)


# When


class Stub(Probe):
    def state_norms(self, model):
        return {"rnn:h": np.ones(2)}


def recorder_with(probe):
    return Recorder(
        "",
        weights=None,
        every=1,
        limits=NO_LIMITS,
        csv=None,
        tensorboard=None,
        batch_logs=False,
        probe=probe,
    )


@settings(deadline=None, max_examples=60)
@given(
    start=st.integers(0, 9),
    every=st.integers(1, 7),
    steps_per_execution=st.integers(1, 4),
    updates=st.sampled_from([0.5, 1, 2]),  # of a train step
)
def test_a_probe_comes_with_the_call_that_passes_a_due_step(
    start, every, steps_per_execution, updates
):
    optimizer = keras.optimizers.SGD()
    recorder = recorder_with(Stub((X, Y), every))
    optimizer.iterations.assign(start)
    recorder.begin(optimizer, steps_per_execution)
    recorder.begin_epoch(0)
    expected, step = [], start
    for call in range(1, 25):
        before = step
        step = start + int(call * steps_per_execution * updates)
        optimizer.iterations.assign(step)
        if any(number % every == 0 for number in range(before + 1, step + 1)):
            expected.append(step)
        recorder.probe_if_due(None)
        recorder.end_epoch(None)  # Another question.
    assert recorder.history.probe_step.tolist() == expected


def test_between_due_steps_nobody_asks_for_the_step(monkeypatch):
    # It would make the host wait for the device at each call.
    asked, ask = [], recorder_module.iterations_of
    monkeypatch.setattr(recorder_module, "iterations_of", lambda o: asked.append(1) or ask(o))
    optimizer, recorder = keras.optimizers.SGD(), recorder_with(Stub((X, Y), 100))
    recorder.begin(optimizer, 1)
    recorder.begin_epoch(0)
    for step in range(1, 1001):
        optimizer.iterations.assign(step)
        recorder.probe_if_due(None)
    assert recorder.history.probe_step.tolist() == list(range(100, 1001, 100))
    assert len(asked) < 25


def test_a_training_that_is_put_back(tmp_path):
    # 5 batches an epoch, interrupted after 14 steps and put back to step 10. No row has the number
    # of a step of then.
    norms = GradientNorms(probe=(OTHER_X, OTHER_Y), probe_every=3, every=7)
    model = recurrent_model(layers.SimpleRNN(2))
    model.compile("sgd", "mse")
    fit = FIT | {"batch_size": 4, "epochs": 3}
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq="epoch")
    with pytest.raises(InterruptedError):
        model.fit(**fit, callbacks=[norms, backup, RaiseAfter(14)])
    assert norms.history.probe_step.tolist() == [3, 6, 9, 12]
    (first,) = norms.history.probe_state_norms.values()
    model.layers[-1].kernel.assign(0 * model.layers[-1].kernel)  # The backup has it otherwise.
    model.fit(**fit, callbacks=[norms, backup])
    assert norms.history.probe_step.tolist() == [3, 6, 9, 12, 15]
    (second,) = norms.history.probe_state_norms.values()
    np.testing.assert_array_equal(second[:3], first[:3])
    assert (second > 0).all()


def test_with_named_optimizers_each_history_has_its_probes():
    model = recurrent_model(layers.SimpleRNN(2))
    model.compile("sgd", "mse")
    norms = GradientNorms({"only": model.optimizer}, probe=(OTHER_X, OTHER_Y))
    by_hand = ByHand(OTHER_X, OTHER_Y)
    model.fit(**FIT, callbacks=[norms, by_hand])
    assert_probed(norms.histories["only"], by_hand.epochs)


def test_a_model_without_input_shape_is_probed_once_it_is_built():
    model = keras.Sequential([layers.SimpleRNN(2), layers.Dense(1)])
    model.compile("sgd", "mse")
    norms, by_hand = GradientNorms(probe=(OTHER_X, OTHER_Y)), ByHand(OTHER_X, OTHER_Y)
    model.fit(**FIT, epochs=2, callbacks=[norms, by_hand])
    assert_probed(norms.history, by_hand.epochs)


# What it refuses


def without_loss():
    model = recurrent_model(layers.SimpleRNN(2))
    model.compile("sgd")
    return model


def compiled(build):
    model = build()
    model.compile("sgd", "mse")
    return model


def assert_one_line(error, model):
    assert "\n" not in str(error.value)
    assert model.optimizer.iterations == 0
    assert untouched(model)


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (lambda: compiled(dense), X, r"model '\S+' has none: expected .*It has .*Dense.*Remove"),
        (without_loss, sequences(), r"the loss that a model is compiled .* Call model\.compile"),
        (
            lambda: compiled(lambda: recurrent_model(layers.SimpleRNN(2))),
            X,
            r"does not take the probe's x, which must be as fit takes it\. .*xpected .*\(20, 4\)",
        ),
    ],
    ids=["no recurrent layer", "no loss", "another x"],
)
def test_models_that_cannot_be_probed(make, x, message):
    model = make()
    norms = GradientNorms(probe=(x, Y))
    with pytest.raises(ValueError, match=f"^GradientNorms.probe=.*{message}") as error:
        model.fit(**FIT, callbacks=[norms])
    assert_one_line(error, model)
    assert len(norms.history) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": (X, Y[:5])}, r"probe must hold arrays .* same number.* lengths: 20, 5\."),
        ({"probe": (X, Y, WEIGHTS[:3])}, "lengths: 20, 20, 3"),
        ({"probe": ({"a": X, "b": X[:2]}, Y)}, "lengths: 20, 2, 20"),
        ({"probe": (X, None)}, "lengths: 20, no array"),
        ({"probe": X}, r"probe must be a tuple \(x, y\) .*Received: ndarray of length 20"),
        ({"probe": (X,)}, "Received: tuple of length 1"),
        ({"probe": (X, Y), "probe_every": 0}, 'probe_every must be "epoch" or .*Received: 0'),
        ({"probe": (X, Y), "probe_every": "batch"}, "Received: 'batch'"),
        ({"probe": (X, Y), "probe_every": 2.5}, r"Received: 2\.5"),
        ({"probe_every": 5}, "probe_every=5 says when .* no probe"),
    ],
    ids=str,
)
def test_probes_that_are_none(options, message):
    with pytest.raises(ValueError, match=message) as error:
        GradientNorms(**options)
    assert "\n" not in str(error.value)


def test_losses_of_layers_and_of_models_are_losses():
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(keras.ops.square(y - y_pred))

    x = keras.Input((None, 3))
    adds = layers.ActivityRegularization(l2=1.0)(layers.SimpleRNN(2)(x))
    for model in Own(x, layers.Dense(1)(layers.SimpleRNN(2)(x))), keras.Model(x, adds):
        model.compile("sgd")
        norms = GradientNorms(probe=(OTHER_X, OTHER_Y))
        model.fit(**FIT, callbacks=[norms])
        (probed,) = norms.history.probe_state_norms.values()
        assert (probed > 0).all()


# A probe that fails in mid-training


def test_a_layer_that_cannot_be_probed_is_left_out_and_the_training_goes_on():
    class Mixed(Twice):
        def __init__(self):
            super().__init__((0, 1))
            self.once = layers.SimpleRNN(2, return_sequences=True)

        def call(self, x):
            return super().call(self.once(x))

    trained = []
    norms = GradientNorms(probe=(OTHER_X, OTHER_Y), probe_every=1)
    for callbacks in [], [norms]:
        keras.utils.set_random_seed(3)
        trained.append(Mixed())
        trained[-1](OTHER_X)
        trained[-1].compile("sgd", "mse")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            trained[-1].fit(**FIT, shuffle=False, callbacks=callbacks)
    assert_same_weights(*trained)
    once, rnn = trained[1].once.path, trained[1].rnn.path
    assert list(norms.history.probe_state_norms) == [f"{once}:h"]
    assert norms.history.probe_step.tolist() == [1, 2, 3]
    (message,) = [str(w.message) for w in caught if "probe" in str(w.message)]  # Once.
    assert message.startswith(f"GradientNorms(probe=...) has no state gradients of layer {rnn!r}: ")
    assert "was called 2 times" in message
    assert message.endswith("The training goes on.")


def test_an_x_that_a_model_without_input_shape_does_not_take():
    model = keras.Sequential([layers.SimpleRNN(2), layers.Dense(1)])
    model.compile("sgd", "mse")
    norms = GradientNorms(probe=(OTHER_X[..., :2], OTHER_Y))
    with pytest.warns(UserWarning, match=r"no state gradients of layer .*The training goes on"):
        model.fit(**FIT, callbacks=[norms])
    assert len(norms.history) == 3
    assert norms.history.probe_state_norms == {}
    assert untouched(model)
    with pytest.raises(ValueError, match="does not take the probe's x"):  # Now it can be known.
        model.fit(**FIT, callbacks=[norms])


def test_a_probe_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch):
    trained, norms = [], GradientNorms(probe=(OTHER_X, OTHER_Y), probe_every=1)
    original = keras.layers.RNN.inner_loop

    def fails(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise RuntimeError("out of\nmemory")

    for callbacks in [], [norms]:
        keras.utils.set_random_seed(3)
        trained.append(recurrent_model(kg.layers.SimpleRNN(2)))
        trained[-1].compile("sgd", "mse")
        monkeypatch.setattr(keras.layers.RNN, "inner_loop", fails)  # of which bptt unrolls
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            trained[-1].fit(**FIT, shuffle=False, callbacks=callbacks)
    assert_same_weights(*trained)
    assert ["out of memory. The training goes on." in str(w.message) for w in caught] == [True]
    (of_layer,) = norms.history.state_norms.values()
    assert np.isfinite(of_layer).all() and of_layer.shape == (3, 5)
    assert untouched(trained[1])
