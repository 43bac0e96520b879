"""Gradients through time against finite differences in float64, of the same cells in NumPy."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers import TwoStates, randomize
from reference_cells import STEPS, finite_difference, run

import kerasgrad as kg
from kerasgrad import bptt

B, T, FEATURES, UNITS = 2, 4, 2, 3
_rng = np.random.default_rng(0)
# A model casts what it is given to its own dtype, whatever that of its layers.
X = _rng.normal(size=(B, T, FEATURES)).astype("float32").astype("float64")
Y = _rng.normal(size=(B, T, 1))

LAYERS = {
    "simple_rnn": keras.layers.SimpleRNN,
    "relu": lambda *a, **kw: kg.layers.SimpleRNN(*a, activation="relu", **kw),
    "lstm": keras.layers.LSTM,
    "gru": keras.layers.GRU,
    "gru_reset_before": lambda *a, **kw: keras.layers.GRU(*a, reset_after=False, **kw),
    "simplified_lstm": lambda *a, **kw: kg.layers.SimplifiedLSTM(*a, project_input=True, **kw),
    "simplified_lstm_tanh": lambda *a, **kw: kg.layers.SimplifiedLSTM(
        *a, project_input=True, activation="tanh", **kw
    ),
    "two_states": lambda units, dtype, **kw: keras.layers.RNN(
        TwoStates(units, dtype=dtype), dtype=dtype, **kw
    ),
}


@pytest.fixture(scope="module", params=LAYERS)
def case(request):
    """A recurrent layer and a Dense, with the loss of each step as a NumPy function."""
    layer = LAYERS[request.param](UNITS, return_sequences=True, dtype="float64")
    model = keras.Sequential(
        [
            keras.Input((T, FEATURES), dtype="float64"),
            layer,
            keras.layers.Dense(1, dtype="float64"),
        ]
    )
    randomize(model)
    model.compile(loss=keras.losses.MeanSquaredError(dtype="float64"))
    *weights, V, c = [w.numpy() for w in model.trainable_weights]
    step = STEPS[request.param]
    zeros = [np.zeros((B, UNITS)) for _ in keras.tree.flatten(layer.cell.state_size)]

    def outputs(touch=lambda t, name, value: value, weights_of=lambda t: weights):
        return run(step, X, zeros, weights_of, touch) @ V + c

    def losses(**how):
        """(T,): each step's part of the loss."""
        return np.square(outputs(**how) - Y).mean(axis=(0, 2)) / T

    return SimpleNamespace(
        model=model, layer=layer, step=step, weights=weights, outputs=outputs, losses=losses
    )


def test_the_numpy_cell_is_the_layer(case):
    np.testing.assert_allclose(case.outputs(), case.model(X), rtol=1e-12)


def test_state_gradients(case):
    for name, λ in bptt.state_gradients(case.model, X, Y).items():
        assert λ.shape == (B, T, UNITS)
        for at in range(T):

            def touch(t, computed, value, bump, at=at, name=name):
                return value + bump if (t, computed) == (at, name) else value

            def loss(bump, touch=touch):
                return case.losses(touch=partial(touch, bump=bump)).sum()

            expected = finite_difference(loss, np.zeros((B, UNITS)))
            np.testing.assert_allclose(λ[:, at], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("by_lag", [False, True])
def test_step_contributions(case, by_lag):
    """A weight moves at step k alone: what the loss of step t does is its share, of lag t - k."""
    contributions = bptt.step_contributions(case.model, X, Y, by_lag=by_lag)
    for number, G in enumerate(contributions.values()):
        expected = np.zeros_like(G)
        for k in range(T):

            def losses(bump, k=k, number=number):
                weights = [case.weights] * T
                weights[k] = [w + bump if i == number else w for i, w in enumerate(case.weights)]
                return case.losses(weights_of=weights.__getitem__)

            of_losses = np.moveaxis(finite_difference(losses, case.weights[number]), -1, 0)
            assert not of_losses[:k].any(), "a later step's weight has no part in an earlier loss"
            for t in range(k, T):
                expected[t - k if by_lag else k] += of_losses[t]
        np.testing.assert_allclose(G, expected, rtol=1e-6, atol=1e-9)


def test_state_jacobians(case):
    states = list(bptt.states(case.model, X).values())
    J = bptt.state_jacobians(case.model, X)
    np.testing.assert_array_equal(J, bptt.state_jacobians(case.layer, X))
    n = UNITS * len(states)
    assert J.shape == (B, T, n, n)
    for t in range(T):
        before = [s[:, t - 1] if t else np.zeros((B, UNITS)) for s in states]
        for b in range(B):

            def after(bump, t=t, b=b, before=before):
                parts = np.split(bump, len(before))
                moved = [s[b] + part for s, part in zip(before, parts, strict=True)]
                _, new = case.step(X[b, t], moved, case.weights, lambda name, value: value)
                return np.concatenate(new)

            expected = finite_difference(after, np.zeros(n)).T
            np.testing.assert_allclose(J[b, t], expected, rtol=1e-6, atol=1e-9)
