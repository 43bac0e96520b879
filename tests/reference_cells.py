"""Keras's and kerasgrad's recurrent cells in NumPy, one step each, for finite differences.

A step is step(x_t, states, weights, touch) -> (output, states). It hands each state to touch(name,
value) at the moment that it is computed, before anything is made of it, and goes on with what touch
returns: a finite difference there is ∂L/∂s_t.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def simple_rnn(x, states, weights, touch, activation=np.tanh):
    (h,) = states
    U, W, b = weights
    h = touch("h", activation(x @ U + h @ W + b))
    return h, [h]


def lstm(x, states, weights, touch):
    h, c = states
    U, W, b = weights
    i, f, g, o = np.split(x @ U + h @ W + b, 4, axis=-1)
    c = touch("c", sigmoid(f) * c + sigmoid(i) * np.tanh(g))
    h = touch("h", sigmoid(o) * np.tanh(c))
    return h, [h, c]


def gru(x, states, weights, touch, reset_after=True):
    (h,) = states
    U, W, b = weights
    b, b_h = b if reset_after else (b, np.zeros_like(b))
    U_z, U_r, U_g = np.split(x @ U + b, 3, axis=-1)
    W_z, W_r, W_g = np.split(W, 3, axis=-1)
    b_z, b_r, b_g = np.split(b_h, 3)
    z, r = sigmoid(U_z + h @ W_z + b_z), sigmoid(U_r + h @ W_r + b_r)
    g = np.tanh(U_g + (r * (h @ W_g + b_g) if reset_after else (r * h) @ W_g))
    h = touch("h", z * h + (1 - z) * g)
    return h, [h]


def simplified_lstm(x, states, weights, touch, activation=lambda a: a):
    (S,) = states
    kernel_f, kernel_i, kernel_o, kernel_c, bias_f, bias_i, bias_o = weights
    f, i = sigmoid(x @ kernel_f + bias_f), sigmoid(x @ kernel_i + bias_i)
    S = touch("S", activation(f * S + i * (x @ kernel_c)))
    return sigmoid(x @ kernel_o + bias_o) * S, [S]


def two_states(x, states, weights, touch):
    """The cell of `helpers.TwoStates`: neither of its states is its output."""
    a, b = states
    U, W = weights
    a = touch("state_0", np.tanh(x @ U + b @ W))
    b = touch("state_1", b + 0.5 * a)
    return a * b, [a, b]


def relu(a):
    return np.maximum(a, 0)


STEPS: dict[str, Callable] = {
    "simple_rnn": simple_rnn,
    "relu": partial(simple_rnn, activation=relu),
    "lstm": lstm,
    "gru": gru,
    "gru_reset_before": partial(gru, reset_after=False),
    "simplified_lstm": simplified_lstm,
    "simplified_lstm_tanh": partial(simplified_lstm, activation=np.tanh),
    "two_states": two_states,
}


def run(step, x, states, weights_of: Callable, touch: Callable) -> np.ndarray:
    """The outputs, (batch, timesteps, units).

    Args:
        x: (batch, timesteps, features).
        states: those before the first step.
        weights_of: t -> the weights that step t uses.
        touch: (t, name, value) -> value.
    """
    outputs = []
    for t in range(x.shape[1]):
        output, states = step(x[:, t], states, weights_of(t), partial(touch, t))
        outputs.append(output)
    return np.stack(outputs, axis=1)


def finite_difference(function: Callable, at: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """The derivative of function(array) at an array, entry by entry, by central differences."""
    derivative = []
    for index in np.ndindex(at.shape):
        bump = np.zeros(at.shape)
        bump[index] = eps
        derivative.append((function(bump) - function(-bump)) / (2 * eps))
    derivative = np.asarray(derivative)
    return derivative.reshape(*at.shape, *derivative.shape[1:])
