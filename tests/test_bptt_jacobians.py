"""Jacobians, the singular values of their products, and Lyapunov exponents: closed forms."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from helpers import TwoStates, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import kerasgrad as kg
from kerasgrad import bptt


def linear_layer(W, **arguments):
    """h_t = W h_{t-1} + x_t in float64, for a matrix W that multiplies from the left."""
    n = len(W)
    layer = layers.SimpleRNN(n, activation="linear", dtype="float64", **arguments)
    layer.build((None, None, n))
    layer.set_weights([np.eye(n), np.asarray(W, float).T, np.zeros(n)])
    return layer


def zeros(T, n, batch=1):
    return np.zeros((batch, T, n))


def rotation(n, seed=0):
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return Q


# Closed forms


@pytest.mark.parametrize("σ", [0.5, 1.0, 1.5])
def test_orthogonal_recurrence(σ):
    """J = σ Q: all exponents are ln σ, all singular values of the product of t are σ^t."""
    layer = linear_layer(σ * rotation(8))
    x = zeros(300, 8)
    np.testing.assert_allclose(bptt.state_jacobians(layer, x)[0, 3], σ * rotation(8), atol=1e-15)
    np.testing.assert_allclose(bptt.lyapunov_exponents(layer, x), np.log(σ), atol=1e-12)
    steps, logs = bptt.jacobian_spectrum(layer, x)
    assert steps[0] == 1 and steps[-1] == 300 and (np.diff(steps) > 0).all()
    expected = np.broadcast_to(steps[:, np.newaxis] * np.log(σ), (1, len(steps), 8))
    np.testing.assert_allclose(logs, expected, atol=1e-9)


def test_small_singular_values_do_not_underflow():
    """J = Q diag(d) Qᵀ: after 1000 steps d^1000, which is below any float for d = 0.1."""
    d = np.array([1.1, 0.9, 0.5, 0.2, 0.1])
    Q = rotation(5)
    layer = linear_layer(Q @ np.diag(d) @ Q.T)
    logs = bptt.jacobian_spectrum(layer, zeros(1000, 5), steps=[10, 1000]).log_singular_values
    np.testing.assert_allclose(logs[0, 0], 10 * np.log(d), rtol=1e-10)
    np.testing.assert_allclose(logs[0, 1], 1000 * np.log(d), rtol=1e-9)
    np.testing.assert_allclose(
        bptt.lyapunov_exponents(layer, zeros(1000, 5), burn_in=500), np.log(d), atol=1e-12
    )


def test_spectral_radius_below_1_and_a_transient_of_38_7():
    """[[.9, 10], [0, .9]]: the norm of the power peaks at 38.7, at k = 9 (a converse trap)."""
    W = [[0.9, 10.0], [0.0, 0.9]]
    steps, logs = bptt.jacobian_spectrum(linear_layer(W), zeros(30, 2), steps=range(1, 31))
    norms = np.exp(logs[0, :, 0])
    assert steps[np.argmax(norms)] == 9
    assert norms.max() == pytest.approx(38.7, abs=0.05)
    # det W^k = .81^k
    np.testing.assert_allclose(logs[0].sum(axis=1), steps * np.log(0.81), rtol=1e-9)


def test_nilpotent_recurrence():
    """W³ = 0: from the third step on there is nothing left, whose logarithm is -Inf."""
    layer = linear_layer(np.triu(np.ones((3, 3)), 1))
    logs = bptt.jacobian_spectrum(layer, zeros(6, 3), steps=[1, 2, 3, 6]).log_singular_values[0]
    for t, row in enumerate(logs[:2], 1):
        W = np.linalg.matrix_power(np.triu(np.ones((3, 3)), 1), t)
        kept = 3 - t
        expected = np.linalg.svd(W, compute_uv=False)[:kept]
        np.testing.assert_allclose(np.exp(row[:kept]), expected, rtol=1e-10)
        assert (row[kept:] == -np.inf).all()
    assert (logs[2:] == -np.inf).all()
    assert (bptt.lyapunov_exponents(layer, zeros(6, 3), burn_in=3) == -np.inf).all()


def test_linear_simplified_lstm():
    """J_t = diag(f_t): the singular values are the products of the forget gates."""
    layer = kg.layers.SimplifiedLSTM(4, dtype="float64")
    x = np.random.default_rng(0).normal(size=(3, 200, 4))
    layer.build(x.shape)
    randomize(layer, scale=1.5)
    f = bptt.gates(layer, x)["forget"]
    J = bptt.state_jacobians(layer, x)
    np.testing.assert_allclose(J, f[..., np.newaxis] * np.eye(4), atol=1e-15)
    _, logs = bptt.jacobian_spectrum(layer, x, steps=[200])
    expected = np.sort(np.log(f).sum(axis=1), axis=1)[:, ::-1]
    np.testing.assert_allclose(logs[:, 0], expected, rtol=1e-9)


def test_identity_start_of_irnn():
    layer = kg.layers.IRNN(3, kernel_initializer="ones", dtype="float64")
    J = bptt.state_jacobians(layer, np.ones((2, 7, 2)))
    np.testing.assert_array_equal(J, np.broadcast_to(np.eye(3), (2, 7, 3, 3)))
    np.testing.assert_allclose(
        bptt.lyapunov_exponents(layer, np.ones((2, 7, 2))), np.zeros(3), atol=1e-14
    )


def test_a_relu_that_is_off_takes_a_direction_away():
    layer = kg.layers.IRNN(2, use_bias=False, dtype="float64")
    layer.build((None, None, 2))
    layer.set_weights([np.diag([1.0, -1.0]), np.eye(2)])
    x = np.ones((1, 5, 2))
    np.testing.assert_array_equal(bptt.state_jacobians(layer, x)[0, 0], np.diag([1.0, 0.0]))
    # The first step turns Q towards the direction that stays.
    exponents = bptt.lyapunov_exponents(layer, x, burn_in=1)
    assert exponents[0] == pytest.approx(0) and exponents[1] == -np.inf


def test_as_many_values_as_relus_are_on():
    layer = kg.layers.SimpleRNN(32, activation="relu")
    x = np.random.default_rng(0).normal(size=(1, 1, 2))
    J = bptt.state_jacobians(layer, x)[0, 0].astype("float64")
    (values,) = bptt.jacobian_spectrum(layer, x).log_singular_values[0]
    on = J.any(axis=1).sum()
    assert 0 < on < 32 and np.isfinite(values).sum() == on
    np.testing.assert_allclose(np.exp(values), np.linalg.svd(J, compute_uv=False), atol=1e-12)


def test_tanh_driven_to_a_fixed_point():
    """The article's cell with tanh, f = 1 and i X = 1: S* = .961, J = 1 - S*² = .076."""
    layer = kg.layers.SimplifiedLSTM(1, activation="tanh", forget_bias=40.0, dtype="float64")
    layer.build((None, None, 1))
    weights = {w.name: w for w in layer.trainable_weights}
    for name, value in {"kernel_f": 0, "kernel_i": 0, "kernel_o": 0, "bias_i": 40}.items():
        weights[name].assign(np.full(weights[name].shape, value))
    (exponent,) = bptt.lyapunov_exponents(layer, np.ones((1, 400, 1)), burn_in=50)
    S = 0.5
    for _ in range(100):
        S = np.tanh(S + 1)
    assert pytest.approx(0.961, abs=5e-4) == S
    assert np.exp(exponent) == pytest.approx(1 - S**2, rel=1e-6)
    assert np.exp(exponent) == pytest.approx(0.076, abs=5e-4)


# Against a product that fits into floats


@given(
    n=st.integers(1, 6),
    T=st.integers(1, 6),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    gain=st.sampled_from([0.3, 1.0, 3.0]),
)
@settings(max_examples=25, deadline=None)
def test_spectrum_is_the_svd_of_the_product(n, T, batch, seed, gain):
    random = np.random.default_rng(seed)
    layer = layers.SimpleRNN(n, dtype="float64")
    layer.build((None, None, 2))
    randomize(layer, scale=gain, seed=seed)
    x = random.normal(size=(batch, T, 2))
    J = bptt.state_jacobians(layer, x)
    _, logs = bptt.jacobian_spectrum(layer, x, steps=range(1, T + 1))
    assert logs.shape == (batch, T, n)
    product = np.broadcast_to(np.eye(n), (batch, n, n))
    for t in range(T):
        product = J[:, t] @ product
        expected = np.linalg.svd(product, compute_uv=False)
        # The SVD knows its values up to rounding of the largest.
        np.testing.assert_allclose(
            np.exp(logs[:, t]), expected, rtol=1e-8, atol=1e-12 * expected.max()
        )
        if gain <= 1:  # Not saturated: no 1 - s² is mere rounding.
            growth = np.linalg.slogdet(J[:, : t + 1])[1].sum(axis=1)
            np.testing.assert_allclose(logs[:, t].sum(axis=1), growth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [layers.LSTM, layers.GRU], ids=["LSTM", "GRU"])
def test_pieces_of_jacobians_are_one_whole(make, monkeypatch):
    layer = make(3, dtype="float64")
    x = np.random.default_rng(0).normal(size=(2, 7, 2))
    whole = bptt.state_jacobians(layer, x)
    monkeypatch.setattr("kerasgrad.bptt.jacobians._PIECE", 2 * whole.shape[-1] ** 2 * 2)
    np.testing.assert_allclose(bptt.state_jacobians(layer, x), whole, rtol=1e-12)
    exponents = bptt.lyapunov_exponents(layer, x)
    growth = np.linalg.slogdet(whole)[1].mean()
    assert exponents.sum() == pytest.approx(growth), "the sum of them is the growth of volumes"
    assert (np.diff(exponents) <= 0).all()


def test_masked_steps_are_the_identity():
    start = keras.Input((4, 2))
    h = layers.RNN(TwoStates(2), name="recurrent")(layers.Masking()(start))
    model = keras.Model(start, h)
    x = np.random.default_rng(0).normal(size=(2, 4, 2))
    x[0, 1] = x[1, 3] = 0
    J = bptt.state_jacobians(model, x)
    for example, t in [(0, 1), (1, 3)]:
        np.testing.assert_array_equal(J[example, t], np.eye(4))
    assert not np.allclose(J[1, 1], np.eye(4))


def test_nan_stays_in_its_example():
    layer = linear_layer(0.5 * rotation(3))
    model_input = zeros(6, 3, batch=2)
    tanh = layers.SimpleRNN(3, dtype="float64")
    model_input[1, 2] = np.nan
    _, logs = bptt.jacobian_spectrum(tanh, model_input, steps=[1, 6])
    assert np.isfinite(logs[0]).all() and np.isfinite(logs[1, 0]).all()
    assert np.isnan(logs[1, 1]).all()
    assert np.isfinite(bptt.jacobian_spectrum(layer, model_input).log_singular_values).all()


# Errors


@pytest.mark.parametrize("steps", [[0], [8], [], [[1]], [-1]])
def test_steps_outside_of_the_sequence(steps):
    with pytest.raises(ValueError, match="numbers from 1 to 7"):
        bptt.jacobian_spectrum(linear_layer(np.eye(2)), zeros(7, 2), steps=steps)


@pytest.mark.parametrize("burn_in", [-1, 7])
def test_burn_in_that_leaves_nothing(burn_in):
    with pytest.raises(ValueError, match=f"below the 7 time steps. Received: {burn_in}"):
        bptt.lyapunov_exponents(linear_layer(np.eye(2)), zeros(7, 2), burn_in=burn_in)


@pytest.mark.parametrize("function", [bptt.state_jacobians, bptt.states, bptt.saturation])
def test_a_model_without_a_recurrent_layer(function):
    with pytest.raises(ValueError, match="Expected a model with a recurrent layer"):
        function(keras.Sequential([keras.Input((3,)), layers.Dense(1)]), np.zeros((1, 3)))
