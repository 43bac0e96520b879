"""Ω of Pascanu et al.: both equations against finite differences of a network written out here."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import kerasgrad as kg
from kerasgrad.callbacks import GradientNorms
from kerasgrad.layers.omega import omega
from kerasgrad.remedies.omega import OmegaSequential, PerturbedSimpleRNN

B, T, F, N = 3, 5, 2, 4
ALPHA = 0.7
Φ = {
    "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda a: np.exp(-a) / (1 + np.exp(-a)) ** 2),
    "relu": (lambda a: np.maximum(a, 0), lambda a: (a > 0).astype(float)),
    "linear": (lambda a: a, np.ones_like),
}
ACTIVATIONS = {name: keras.activations.get(name) for name in Φ}


@pytest.fixture
def float64():
    keras.config.set_dtype_policy("float64")


def batch(seed=0):
    """x and y that float32 can hold, which is what `fit` makes of them."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, F), (B, 1)
    return [rng.normal(size=shape).astype("float32").astype("float64") for shape in shapes]


def start(seed=1):
    """U, W, b of the recurrent layer, V, c of the output: large enough to saturate a little."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) * 0.6 for shape in ((F, N), (N, N), (N,), (N, 1), (1,))]


def network(weights, x, y, activation):
    """The mean squared error, a_k and δ_k = ∂L/∂a_k, both (T, B, N), by BPTT in plain loops."""
    U, W, b, V, c = weights
    φ, dφ = Φ[activation]
    s, a = np.zeros((len(x), N)), []
    for t in range(T):
        a.append(x[:, t] @ U + s @ W + b)
        s = φ(a[-1])
    error = s @ V + c - y
    loss = np.mean(error**2)
    λ, δ = 2 * error @ V.T / len(x), []
    for t in reversed(range(T)):
        δ.append(dφ(a[t]) * λ)
        λ = δ[-1] @ W.T
    return loss, np.array(a), np.array(δ[::-1])


def Ω(W, a, δ, activation, equation):
    """The paper's equations, one example and one step at a time: x_k is a_k."""
    dφ, terms = Φ[activation][1], []
    for k in range(T - 1):
        for example in range(a.shape[1]):
            later = δ[k + 1, example]
            if np.linalg.norm(later) < 1e-10:
                continue
            # ∂x_{k+1}/∂x_k = W diag(σ'(x_k)) for columns; Keras's W is its transpose.
            jacobian = W.T @ np.diag(dφ(a[k, example]))
            ρ = np.linalg.norm(later @ jacobian) / np.linalg.norm(later)
            terms.append((ρ - 1) ** 2 if equation == 9 else (ρ**2 - 1) ** 2)
    return np.mean(terms) if terms else 0.0


def differences(function, weights, ε=1e-6):
    """∂function/∂weight of each weight, by central differences."""
    found = []
    for weight in weights:
        derivative = np.zeros_like(weight)
        for index in np.ndindex(weight.shape):
            kept = weight[index]
            weight[index] = kept + ε
            above = function()
            weight[index] = kept - ε
            below = function()
            weight[index] = kept
            derivative[index] = (above - below) / (2 * ε)
        found.append(derivative)
    return found


def applied_gradients(model, x, y):
    """The gradient of each weight, as one step of `fit` with SGD(1) applies it."""
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(1.0), loss="mse")
    loss = model.fit(x, y, batch_size=len(x), verbose=0).history["loss"][0]
    return loss, [b - a for b, a in zip(before, model.get_weights(), strict=True)]


def model_of(kind, activation, alpha=ALPHA, **options):
    if kind is kg.layers.OmegaSimpleRNN:
        options["omega"] = alpha
    layer = kind(N, activation=activation, **options)
    layers = [keras.layers.Input((T, F)), layer, keras.layers.Dense(1)]
    if kind is PerturbedSimpleRNN:
        model = OmegaSequential(layers, omega=alpha)
    else:
        model = keras.Sequential(layers)
    model.set_weights(start())
    return model


# The value


@pytest.mark.parametrize("equation", [9, 10])
@pytest.mark.parametrize("activation", Φ)
def test_omega_is_the_papers(activation, equation):
    weights, (x, y) = start(), batch()
    _, a, δ = network(weights, x, y, activation)
    φ, dφ = Φ[activation]
    # λ is not unique where Φ' is 0, and plays no part there.
    with np.errstate(divide="ignore", invalid="ignore"):
        λ = np.where(dφ(a) > 0, δ / dφ(a), 3.0)
    value = omega(
        *map(tf.constant, (λ, φ(a), weights[1])),
        activation=ACTIVATIONS[activation],
        equation=equation,
    )
    expected = Ω(weights[1], a, δ, activation, equation)
    assert expected > 0.01
    assert float(value) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("equation", [9, 10])
def test_an_orthogonal_linear_network_has_none(equation):
    """Closed form: W = gQ passes on g of each gradient, whatever it is."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(N, N)))[0]
    λ = tf.constant(rng.normal(size=(T, B, N)))
    for gain in (1.0, 0.5, 2.0):
        value = omega(
            λ, 0 * λ, tf.constant(gain * Q), activation=keras.activations.tanh, equation=equation
        )
        expected = (gain - 1) ** 2 if equation == 9 else (gain**2 - 1) ** 2
        assert float(value) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("equation", [9, 10])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-5, 1e30])
def test_omega_does_not_depend_on_the_gradients_length_and_is_0_without_one(scale, equation):
    rng = np.random.default_rng(0)
    λ, s, W = (
        tf.constant(rng.normal(size=shape), tf.float32) for shape in ((T, B, N), (T, B, N), (N, N))
    )
    s = tf.tanh(s)
    with tf.GradientTape() as tape:
        tape.watch([λ, s, W])
        value = omega(scale * λ, s, W, activation=keras.activations.tanh, equation=equation)
    whole = omega(λ, s, W, activation=keras.activations.tanh, equation=equation)
    # Terms of a norm below 1e-10 do not count, as in the authors' code.
    assert float(value) == (0 if scale < 1e-10 else pytest.approx(float(whole), rel=1e-5))
    for gradient in tape.gradient(value, [λ, s, W]):
        assert np.isfinite(gradient).all()


def test_where_nothing_arrives_the_slope_is_0_and_not_nan():
    """ρ = 0 has a term, (0 - 1)², and a square root without a slope."""
    λ, s, W = tf.ones((T, B, N)), tf.zeros((T, B, N)), tf.zeros((N, N))
    with tf.GradientTape() as tape:
        tape.watch(W)
        value = omega(λ, s, W, activation=keras.activations.tanh, equation=9)
    assert float(value) == 1
    np.testing.assert_array_equal(tape.gradient(value, W), np.zeros((N, N)))


# The gradients, as fit applies them


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("activation", Φ)
def test_equation_10_is_the_immediate_derivative(activation):
    """With a_k and δ_k as they are, W alone moves."""
    weights, (x, y) = start(), batch()
    loss, a, δ = network(weights, x, y, activation)
    shown, gradients = applied_gradients(model_of(kg.layers.OmegaSimpleRNN, activation), x, y)
    assert shown == pytest.approx(loss, rel=1e-6)  # Ω is not in it; Keras shows float32.
    expected = differences(lambda: network(weights, x, y, activation)[0], weights)
    (immediate,) = differences(lambda: Ω(weights[1], a, δ, activation, 10), [weights[1]])
    assert np.linalg.norm(ALPHA * immediate) > 0.05 * np.linalg.norm(expected[1])
    expected[1] += ALPHA * immediate
    for actual, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("activation", Φ)
def test_equation_9_is_the_total_derivative(activation):
    """Every weight moves Ω: by the states, by the gradients, by the outputs."""
    weights, (x, y) = start(), batch()

    def total():
        loss, a, δ = network(weights, x, y, activation)
        return loss + ALPHA * Ω(weights[1], a, δ, activation, 9)

    shown, gradients = applied_gradients(model_of(PerturbedSimpleRNN, activation), x, y)
    assert shown == pytest.approx(network(weights, x, y, activation)[0], rel=1e-6)
    expected = differences(total, weights)
    plain = differences(lambda: network(weights, x, y, activation)[0], weights)
    moved = [np.linalg.norm(e - p) for e, p in zip(expected, plain, strict=True)]
    # A ReLU's or a linear network's slopes, and so its ρ, do not depend on U.
    assert moved[1] > 1e-3 and (moved[0] > 1e-4 or activation in ("relu", "linear"))
    for actual, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("float64")
def test_the_two_equations_differ_as_the_text_says():
    """The immediate derivative of (ρ² - 1)² is not that of (ρ - 1)², nor is it a total one."""
    weights, (x, y) = start(), batch()
    _, a, δ = network(weights, x, y, "tanh")
    (immediate_9,) = differences(lambda: Ω(weights[1], a, δ, "tanh", 9), [weights[1]])
    (immediate_10,) = differences(lambda: Ω(weights[1], a, δ, "tanh", 10), [weights[1]])
    total_9 = differences(
        lambda: Ω(weights[1], *network(weights, x, y, "tanh")[1:], "tanh", 9), weights
    )
    cosines = [
        np.vdot(immediate_10, other) / np.linalg.norm(immediate_10) / np.linalg.norm(other)
        for other in (immediate_9, total_9[1])
    ]
    assert all(abs(cosine) < 0.999 for cosine in cosines)


@pytest.mark.parametrize("kind", [kg.layers.OmegaSimpleRNN, PerturbedSimpleRNN])
@pytest.mark.parametrize(
    ("eager", "return_sequences"), [(False, False), (True, False), (False, True)]
)
def test_recording_works_beside_omega(kind, eager, return_sequences):
    """The same weights with and without GradientNorms, and its ∂L/∂s_t is that of L alone."""
    x, y = (array.astype("float32") for array in batch())
    y = np.repeat(y[:, None], T, axis=1) if return_sequences else y
    trained, norms = [], GradientNorms()
    for callbacks in ([], [norms]):
        model = model_of(kind, "tanh", return_sequences=return_sequences)
        model.compile(keras.optimizers.SGD(0.1), loss="mse", run_eagerly=eager)
        model.fit(x, y, batch_size=B, epochs=2, verbose=0, callbacks=callbacks)
        trained.append(model.get_weights())
    for with_it, without in zip(*trained, strict=True):
        np.testing.assert_array_equal(with_it, without)
    plain = keras.Sequential(
        [
            keras.layers.Input((T, F)),
            keras.layers.SimpleRNN(N, return_sequences=return_sequences),
            keras.layers.Dense(1),
        ]
    )
    plain.set_weights(start())
    plain.compile(loss="mse")
    λ = kg.bptt.state_gradients(plain, x, y)["h"]
    (recorded,) = norms.history.state_norms.values()
    np.testing.assert_allclose(recorded[0], np.linalg.norm(λ, axis=-1).mean(axis=0), rtol=1e-4)
    assert norms.history.loss[0] == pytest.approx(plain.evaluate(x, y, verbose=0), rel=1e-5)


@pytest.mark.parametrize("kind", [kg.layers.OmegaSimpleRNN, PerturbedSimpleRNN])
def test_without_alpha_it_is_a_simple_rnn(kind):
    x, y = (array.astype("float32") for array in batch())
    model = model_of(kind, "tanh", alpha=0.0)
    other = model_of(keras.layers.SimpleRNN, "tanh")
    np.testing.assert_allclose(model.predict(x, verbose=0), other.predict(x, verbose=0), rtol=1e-5)
    gradients = [applied_gradients(network, x, y)[1] for network in (model, other)]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_omega_keeps_the_gradient_of_a_training_from_vanishing():
    """From a start that passes on a half of the gradient at each step."""
    task = kg.tasks.adding_problem(samples=64, timesteps=12)
    reach = {}
    for name, kind in {"none": kg.layers.SimpleRNN, "omega": kg.layers.OmegaSimpleRNN}.items():
        keras.utils.set_random_seed(0)
        layer = kind(16, recurrent_initializer=kg.layers.ScaledIdentity(0.5))
        model = keras.Sequential([layer, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.05, global_clipnorm=0.5), loss="mse")
        norms = GradientNorms()
        model.fit(task.x, task.y, epochs=15, verbose=0, callbacks=[norms])
        (series,) = norms.history.reach.values()
        reach[name] = series[0], np.median(series[-10:])
    assert reach["none"][0] < 1e-3
    assert reach["omega"][1] > 100 * reach["none"][1]


# What it refuses


@pytest.mark.parametrize("kind", [kg.layers.OmegaSimpleRNN, PerturbedSimpleRNN])
def test_an_activation_without_explicit_derivative_is_refused(kind):
    with pytest.raises(ValueError, match="must be tanh, relu, sigmoid or linear"):
        kind(N, activation="gelu")


def test_recurrent_dropout_is_refused():
    with pytest.raises(ValueError, match=r"recurrent_dropout=0\.5"):
        kg.layers.OmegaSimpleRNN(N, recurrent_dropout=0.5)


@pytest.mark.parametrize("kind", [kg.layers.OmegaSimpleRNN, PerturbedSimpleRNN])
def test_a_mask_is_refused_in_training_only(kind):
    layers = [keras.layers.Masking(), kind(N), keras.layers.Dense(1)]
    model = OmegaSequential(layers) if kind is PerturbedSimpleRNN else keras.Sequential(layers)
    x, y = batch()
    model.compile("sgd", loss="mse")
    assert np.isfinite(model.evaluate(x, y, verbose=0))
    with pytest.raises(ValueError, match="no Ω for masked steps"):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("number", [0, 2])
def test_omega_sequential_needs_one_perturbed_layer(number):
    with pytest.raises(ValueError, match="needs one PerturbedSimpleRNN"):
        OmegaSequential([PerturbedSimpleRNN(2, return_sequences=True) for _ in range(number)])


def test_the_layer_can_be_saved(tmp_path):
    model = model_of(kg.layers.OmegaSimpleRNN, "relu", alpha=2.5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].omega == 2.5
    x, _ = batch()
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
