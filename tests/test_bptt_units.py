"""States, gates, saturation, dead units and half-lives, against the published equations."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from helpers import TwoStates, randomize
from keras import layers
from reference_cells import STEPS, run, sigmoid

import kerasgrad as kg
from kerasgrad import bptt
from kerasgrad.memory import forget_bias_for_horizon, half_life

X = np.random.default_rng(0).normal(size=(4, 6, 2))


def built(layer, scale=1.0):
    layer.build(X.shape)
    return randomize(layer, scale=scale)


def weights_of(layer):
    return [w.numpy() for w in layer.trainable_weights]


# Gates


def _gates_by_hand(kind, layer):
    """The gates as the papers write them, from the weights and the states."""
    U, W, b = weights_of(layer)
    h = bptt.states(layer, X)["h"]
    before = np.concatenate([np.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    a = X @ U + before @ W + (b.sum(axis=0) if b.ndim == 2 else b)
    parts = np.split(sigmoid(a), 4 if kind is layers.LSTM else 3, axis=-1)
    if kind is layers.LSTM:
        return {"input": parts[0], "forget": parts[1], "output": parts[3]}
    return {"update": parts[0], "reset": parts[1]}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(layers.LSTM, {}), (layers.GRU, {}), (layers.GRU, {"reset_after": False})],
    ids=["LSTM", "GRU", "GRU, reset before"],
)
def test_gates_are_those_of_the_papers(kind, arguments):
    layer = built(kind(3, dtype="float64", **arguments))
    gates, expected = bptt.gates(layer, X), _gates_by_hand(kind, layer)
    assert gates.keys() == expected.keys()
    for name, gate in gates.items():
        np.testing.assert_allclose(gate, expected[name], rtol=1e-10)


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU, kg.layers.SimplifiedLSTM])
def test_gates_in_mixed_precision(kind):
    arguments = {"project_input": True} if kind is kg.layers.SimplifiedLSTM else {}
    mixed = built(kind(3, dtype="mixed_float16", **arguments))
    plain = built(kind(3, **arguments))
    for name, gate in bptt.gates(plain, X).items():
        np.testing.assert_allclose(bptt.gates(mixed, X)[name], gate, atol=0.01)
        np.testing.assert_allclose(
            bptt.saturation(mixed, X)[name], bptt.saturation(plain, X)[name], atol=0.1
        )


def test_gates_make_the_states_that_the_layer_makes():
    """c_t = f c_{t-1} + i g and h_t = o tanh(c_t) name the gates: no two can be exchanged."""
    layer = built(layers.LSTM(3, dtype="float64"))
    gates, states = bptt.gates(layer, X), bptt.states(layer, X)
    np.testing.assert_allclose(states["h"], gates["output"] * np.tanh(states["c"]), rtol=1e-12)
    c = states["c"]
    g = (c[:, 1:] - gates["forget"][:, 1:] * c[:, :-1]) / gates["input"][:, 1:]
    assert (np.abs(g) <= 1).all(), "what is let in is a tanh"
    layer = built(layers.GRU(3, dtype="float64"))
    z, h = bptt.gates(layer, X)["update"][:, 1:], bptt.states(layer, X)["h"]
    assert (np.abs((h[:, 1:] - z * h[:, :-1]) / (1 - z)) <= 1).all()


def test_gates_of_the_simplified_lstm():
    layer = built(kg.layers.SimplifiedLSTM(3, project_input=True, dtype="float64"))
    f, i, o, _, b_f, b_i, b_o = weights_of(layer)
    for name, kernel, bias in [("forget", f, b_f), ("input", i, b_i), ("output", o, b_o)]:
        expected = sigmoid(X @ kernel + bias)
        np.testing.assert_allclose(bptt.gates(layer, X)[name], expected, rtol=1e-12)


def test_stacked_cells_have_gates_each():
    cells = [layers.LSTMCell(3, dtype="float64"), layers.GRUCell(2, dtype="float64")]
    stacked = layers.StackedRNNCells(cells, dtype="float64")
    stack = built(layers.RNN(stacked, dtype="float64"))
    lstm = layers.LSTM(3, return_sequences=True, dtype="float64")
    gru = layers.GRU(2, dtype="float64")
    model = keras.Sequential([keras.Input(X.shape[1:], dtype="float64"), lstm, gru])
    model.set_weights(stack.get_weights())
    # A Sequential casts its input to float32; the layers by themselves do not.
    x = X.astype("float32").astype("float64")
    gates = bptt.gates(stack, x)
    for layer, prefix in [(lstm, "cell_0"), (gru, "cell_1")]:
        for name, expected in bptt.gates(model, x, layer).items():
            np.testing.assert_allclose(gates[f"{prefix}/{name}"], expected, rtol=1e-10)
    assert len(gates) == 5
    assert list(bptt.states(stack, x)) == ["cell_0/h", "cell_0/c", "cell_1/h"]
    assert bptt.saturation(stack, x).keys() == {*gates, "cell_0/c"}
    with pytest.raises(ValueError, match="one forget gate"):
        bptt.memory_half_life(stack, x)


@pytest.mark.parametrize("layer", [layers.SimpleRNN(2), layers.RNN(TwoStates(2))])
def test_a_layer_without_gates(layer):
    for function in (bptt.gates, bptt.memory_half_life):
        with pytest.raises(ValueError, match="no gates that are known: expected"):
            function(layer, X)


# States


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("simple_rnn", layers.SimpleRNN(3, dtype="float64")),
        ("lstm", layers.LSTM(3, dtype="float64", go_backwards=True)),
        ("two_states", layers.RNN(TwoStates(3, dtype="float64"), dtype="float64")),
    ],
)
def test_states_are_those_of_the_numpy_cell(name, layer):
    built(layer)
    x = X[:, ::-1] if layer.go_backwards else X
    expected = {}

    def keep(t, state, value):
        expected.setdefault(state, []).append(value)
        return value

    weights, count = weights_of(layer), len(keras.tree.flatten(layer.cell.state_size))
    run(STEPS[name], x, [np.zeros((4, 3))] * count, lambda t: weights, keep)
    states = bptt.states(layer, X)
    assert states.keys() == expected.keys()
    for state, values in states.items():
        np.testing.assert_allclose(values, np.stack(expected[state], axis=1), rtol=1e-10)


# Half-lives


def test_half_life_is_when_a_half_is_left():
    for f in (0.1, 0.5, 0.99):
        (steps,) = half_life(np.full((2, 3, 1), f))
        assert f**steps == pytest.approx(0.5)
    mixed = np.array([0.2, 0.8]).reshape(1, 2, 1)
    assert half_life(mixed)[0] == pytest.approx(np.log(0.5) / np.log([0.2, 0.8]).mean())
    assert half_life(np.array([1.0, 0.0]).reshape(1, 1, 2)).tolist() == [np.inf, 0]
    with_mask = np.array([0.5, np.nan]).reshape(1, 2, 1)
    assert half_life(with_mask).tolist() == [1.0]


def test_memory_half_life_of_layers():
    for bias, layer in [
        (3.0, kg.layers.SimplifiedLSTM(2, forget_bias=3.0, kernel_initializer="zeros")),
        (1.0, layers.LSTM(2, kernel_initializer="zeros", recurrent_initializer="zeros")),
        (0.0, layers.GRU(2, kernel_initializer="zeros", recurrent_initializer="zeros")),
    ]:
        expected = np.log(0.5) / np.log(sigmoid(bias))
        np.testing.assert_allclose(bptt.memory_half_life(layer, X), expected, rtol=1e-6)


@pytest.mark.parametrize("timesteps", [10, 50, 784])
def test_forget_bias_for_horizon(timesteps):
    """σ(b)^T = 1/2 exactly at b = -ln(2^(1/T) - 1); ln(T/ln 2) is its limit."""
    bias = forget_bias_for_horizon(timesteps)
    assert bias == pytest.approx(-np.log(2 ** (1 / timesteps) - 1), abs=0.4 / timesteps)
    assert sigmoid(bias) ** timesteps == pytest.approx(0.5, abs=0.02)
    # Tallec and Ollivier: 1/e is left after 1/(1 - σ(b)) steps, b = ln(T - 1).
    forgetting_time = 1 / (1 - sigmoid(np.log(timesteps - 1)))
    assert forgetting_time == pytest.approx(timesteps)
    assert bptt.forget_bias_for_horizon is forget_bias_for_horizon
    with pytest.raises(ValueError, match="positive"):
        forget_bias_for_horizon(0)


# Saturation and dead units


def test_saturation_of_tanh_is_counted():
    """Φ' < 5 % of its largest: 1 - s² < .05, beyond |s| = .9747."""
    layer = layers.SimpleRNN(
        1, kernel_initializer="ones", recurrent_initializer="zeros", dtype="float64"
    )
    edge = np.arctanh(np.sqrt(0.95))
    x = np.array([0.0, edge - 0.01, edge + 0.01, -edge - 0.01, 1.0, 5.0]).reshape(2, 3, 1)
    assert bptt.saturation(layer, x) == {"h": pytest.approx(3 / 6)}


def test_saturation_of_sigmoid_gates_is_counted():
    """σ' < 5 % of 1/4: σ(1 - σ) < .0125, below .0127 and above .9873."""
    layer = kg.layers.SimplifiedLSTM(1, use_bias=False, dtype="float64")
    layer.build((None, None, 1))
    layer.set_weights([np.array([[w]]) for w in (1.0, 2.0, 0.0)])
    at = np.log(0.9873 / 0.0127)
    x = np.array([0.0, at + 0.01, -at - 0.01, at - 0.01]).reshape(1, 4, 1)
    shares = bptt.saturation(layer, x)
    assert {name: share.tolist() for name, share in shares.items()} == {
        "forget": [0.5],
        "input": [0.75],
        "output": [0.0],
    }


def test_what_can_saturate():
    assert bptt.saturation(layers.SimpleRNN(2, activation="relu"), X) == {}
    assert bptt.saturation(layers.RNN(TwoStates(2)), X) == {}
    assert bptt.saturation(layers.LSTM(2), X).keys() == {"forget", "input", "output", "c"}
    assert bptt.saturation(layers.GRU(2), X).keys() == {"update", "reset"}
    tanh = kg.layers.SimplifiedLSTM(2, activation="tanh")
    assert bptt.saturation(tanh, X).keys() == {"forget", "input", "output", "S"}
    hard = layers.LSTM(2, recurrent_activation="hard_sigmoid", activation="relu")
    assert bptt.saturation(hard, X) == {}


def test_masked_steps_do_not_count():
    layer = layers.SimpleRNN(1, kernel_initializer="ones", recurrent_initializer="zeros")
    model = keras.Sequential([keras.Input((4, 1)), layers.Masking(), layer])
    x = np.array([9.0, 0.0, 0.0, 0.5]).reshape(1, 4, 1)
    assert bptt.saturation(model, x)["h"].tolist() == [0.5]
    lstm = keras.Sequential([keras.Input((4, 1)), layers.Masking(), layers.LSTM(2)])
    gate = bptt.gates(lstm, x)["forget"][0]
    np.testing.assert_array_equal(
        np.isnan(gate), [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    )
    assert np.isfinite(bptt.memory_half_life(lstm, x)).all()


def test_dead_is_zero_at_every_step_of_every_example():
    layer = layers.SimpleRNN(3, activation="relu", recurrent_initializer="zeros")
    layer.build((None, None, 1))
    _, W, _ = layer.get_weights()
    # Off for one example; off at all but one step; never on.
    layer.set_weights([np.array([[1.0, 0.01, 0.0]]), W, np.array([0.0, -0.05, -1.0])])
    x = np.array([[1, 1, 1, 1], [-1, -1, -1, 9]], float)[..., np.newaxis]
    assert bptt.dead_units(layer, x).tolist() == [False, False, True]
    assert bptt.dead_units(layer, x[:1]).tolist() == [False, True, True]
