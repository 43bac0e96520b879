"""State gradients and the steps' shares: closed forms, autodiff, and every kind of model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import TwoStates, randomize, relative_error
from keras import layers

import kerasgrad as kg
from kerasgrad import bptt

T = 5
rng = np.random.default_rng(0)
X = rng.normal(size=(4, T, 3))
Y = rng.normal(size=(4, 1))
Y_SEQUENCE = rng.normal(size=(4, T, 1))
# The first example is whole, the second ends early, the third begins late, the fourth has a hole.
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]], bool)
X_MASKED = np.where(MASK[..., np.newaxis], X, 0)


@pytest.fixture(autouse=True)
def _float64():
    """What has to agree with autodiff within 1e-6 is computed in float64."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")


def compiled(model, loss="mse", **how):
    randomize(model)
    model.compile(loss=loss, **how)
    return model


def sequential(*parts, timesteps=T, features=3):
    return compiled(keras.Sequential([keras.Input((timesteps, features)), *parts]))


# Closed forms


@pytest.mark.parametrize("σ", [0.5, 1.0, 1.3])
def test_orthogonal_recurrence(σ):
    """h_t = σ Q h_{t-1} + U x_t, L = mean of c·h_T: ‖∂L/∂h_{T-ℓ}‖ = σ^ℓ ‖c‖ / batch, exactly."""
    T, units = 200, 6
    model = sequential(
        layers.SimpleRNN(units, activation="linear"), layers.Dense(1), timesteps=T, features=2
    )
    model.compile(loss=lambda y, y_pred: y_pred[:, 0])
    Q, _ = np.linalg.qr(rng.normal(size=(units, units)))
    _, W, _, c, _ = model.trainable_weights
    W.assign(σ * Q)
    x = rng.normal(size=(3, T, 2))
    λ = bptt.state_gradients(model, x, np.zeros(3))["h"]
    expected = σ ** np.arange(T - 1, -1, -1) * np.linalg.norm(c) / 3
    np.testing.assert_allclose(np.linalg.norm(λ, axis=2), np.tile(expected, (3, 1)), rtol=1e-9)


def test_one_unit_chain():
    """∂h_T/∂h_t = Π_{k>t} w (1 - h_k²), for one tanh unit."""
    model = sequential(layers.SimpleRNN(1), features=1)
    model.compile(loss=lambda y, y_pred: y_pred[:, 0])
    u, w, b = [float(v.numpy().squeeze()) for v in model.trainable_weights]
    h, chain = 0.0, []
    for x in X[0, :, 0]:
        h = np.tanh(u * x + w * h + b)
        chain.append(w * (1 - h**2))
    expected = [np.prod(chain[t + 1 :]) for t in range(T)]
    λ = bptt.state_gradients(model, X[:1, :, :1], Y[:1])["h"]
    np.testing.assert_allclose(λ[0, :, 0], expected, rtol=1e-10)


def test_linear_simplified_lstm():
    """∂L/∂S_t = c ⊙ o_T ⊙ Π_{k>t} f_k: the product of the forget gates, and nothing else."""
    layer = kg.layers.SimplifiedLSTM(3)
    model = sequential(layer)
    model.compile(loss=lambda y, y_pred: tf.reduce_sum(y_pred, axis=1))
    λ = bptt.state_gradients(model, X, Y)["S"]
    gates = bptt.gates(model, X)
    for t in range(T):
        f = np.prod(gates["forget"][:, t + 1 :], axis=1)
        np.testing.assert_allclose(λ[:, t], gates["output"][:, -1] * f / len(X), rtol=1e-10)


def test_open_gate_with_tanh_decays_as_a_power():
    """S_t = tanh(S_{t-1}), S_0 = 1/2: Π (1 - S²) after 1000 steps is 4.5e-4, of order n^(-3/2)."""
    S = [0.5]
    for _ in range(20_000):
        S.append(np.tanh(S[-1]))
    jacobians = 1 - np.square(S[1:])
    product = np.cumprod(jacobians)
    assert product[999] == pytest.approx(4.5e-4, rel=0.02)
    slope = np.log(product[19_999] / product[9_999]) / np.log(2)
    assert slope == pytest.approx(-1.5, abs=0.005)

    T = 300
    layer = kg.layers.SimplifiedLSTM(1, activation="tanh", forget_bias=40.0, stateful=True)
    model = keras.Sequential([keras.Input(batch_shape=(1, T, 1)), layer])
    model.compile(loss=lambda y, y_pred: y_pred[:, 0])
    layer.states[0].assign([[0.5]])
    λ = bptt.state_gradients(model, np.zeros((1, T, 1)), np.zeros(1))["S"][0, :, 0]
    # h_T = o_T S_T with o_T = σ(0); λ_1 is taken at S_1, behind the first tanh.
    from_later = np.cumprod(jacobians[1:T][::-1])[::-1]
    np.testing.assert_allclose(λ, 0.5 * np.append(from_later, 1.0), rtol=1e-9)


def test_identity_start_of_irnn():
    """While its units are on, IRNN hands the gradient back as it is."""
    model = sequential(kg.layers.IRNN(4), layers.Dense(1))
    layer = model.layers[0]
    layer.set_weights([np.ones((3, 4)), np.eye(4), np.zeros(4)])
    λ = bptt.state_gradients(model, np.abs(X), Y)["h"]
    np.testing.assert_array_equal(λ, np.repeat(λ[:, -1:], T, axis=1))


def test_nilpotent_recurrence():
    """W³ = 0: nothing travels three steps."""
    model = sequential(layers.SimpleRNN(3, activation="linear", return_sequences=True))
    U, W, b = model.trainable_weights
    W.assign(np.triu(np.ones((3, 3)), 1))
    contributions = bptt.step_contributions(model, X, np.zeros((4, T, 3)), by_lag=True)
    for norms in contributions.norms.values():
        assert (norms[:3] > 0).all()
        assert (norms[3:] == 0).all()
    assert max(contributions.horizon(1.0).values()) == 2
    last = sequential(layers.SimpleRNN(3, activation="linear"), layers.Dense(1))
    last.layers[0].set_weights([U.numpy(), W.numpy(), b.numpy()])
    λ = bptt.state_gradients(last, X, Y)["h"]
    assert λ[:, 2:].any(axis=(0, 2)).all() and not λ[:, :2].any()


def test_by_lag_is_the_articles_recursion():
    """Δ_k^ℓ = Φ'(a_k) ⊙ WᵀΔ_{k+1}^{ℓ-1}, G_ℓ = Σ_k Δ_k^ℓ s_{k-1}ᵀ, written out for one example."""
    model = sequential(layers.SimpleRNN(2, return_sequences=True), layers.Dense(1))
    x, y = X[:1], Y_SEQUENCE[:1]
    _, W, _, V, c = [v.numpy() for v in model.trainable_weights]
    s = bptt.states(model, x)["h"][0]
    previous = np.vstack([np.zeros(2), s[:-1]])
    slope = 1 - s**2
    dz = 2 * (s @ V + c - y[0]) / T
    Δ = slope * (dz @ V.T)
    contributions = bptt.step_contributions(model, x, y, by_lag=True)
    path = next(path for path in contributions if path.endswith("recurrent_kernel"))
    for lag in range(T):
        np.testing.assert_allclose(contributions[path][lag], previous.T @ Δ, rtol=1e-9, atol=1e-12)
        Δ = np.vstack([slope[:-1] * (Δ[1:] @ W.T), np.zeros((1, 2))])


# Every kind of model: the shares sum to autodiff's gradient


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.recurrent = layers.GRU(3)
        self.out = layers.Dense(1)

    def call(self, x):
        return self.out(self.recurrent(x))


class InTFFunction(Subclassed):
    @tf.function
    def call(self, x):
        return self.out(self.recurrent(x))


def bidirectional(direction):
    def build():
        return sequential(
            layers.Bidirectional(layers.LSTM(3, name="lstm"), name="both"), layers.Dense(1)
        )

    return build, X, Y, direction


def stacked_layers(name):
    def build():
        first, second = layers.LSTM(3, return_sequences=True), kg.layers.SimpleRNN(2)
        first.name, second.name = "first", "second"
        return sequential(first, second, layers.Dense(1))

    return build, X, Y, name


def masked(layer, y, **arguments):
    def build():
        return sequential(
            layers.Masking(), layer(3, return_sequences=y is Y_SEQUENCE, **arguments),
            layers.Dense(1),
        )  # fmt: skip

    return build, X_MASKED, y, None


def encoder_decoder():
    """The decoder's start, not the encoder's output, is what the loss sees of the encoder."""
    start = keras.Input((T, 3))
    _, h, c = layers.LSTM(3, return_state=True, name="encoder")(start)
    decoded = layers.LSTM(3, return_sequences=True, name="decoder")(start, initial_state=[h, c])
    return compiled(keras.Model(start, layers.Dense(1)(decoded)))


def stateful():
    model = keras.Sequential(
        [keras.Input(batch_shape=X.shape), layers.LSTM(3, stateful=True), layers.Dense(1)]
    )
    model.layers[0].states[0].assign(rng.normal(size=(4, 3)))
    return compiled(model)


def two_inputs():
    sequence, other = keras.Input((T, 3), name="sequence"), keras.Input((T, 3), name="other")
    h = layers.GRU(2)(layers.Concatenate()([sequence, other]))
    return compiled(keras.Model({"sequence": sequence, "other": other}, layers.Dense(1)(h)))


def nested():
    inner = keras.Sequential([keras.Input((T, 3)), layers.GRU(3, name="inner")])
    return sequential(inner, layers.Dense(1))


def stacked_cells():
    cells = [layers.LSTMCell(3), layers.GRUCell(2), TwoStates(2)]
    return sequential(layers.RNN(cells, return_sequences=True), layers.Dense(1))


def regularized():
    layer = layers.SimpleRNN(3, kernel_regularizer="l2", activity_regularizer="l2")
    return sequential(layer, layers.Dense(1))


MODELS = {
    "keras SimpleRNN": (lambda: sequential(layers.SimpleRNN(3), layers.Dense(1)), X, Y, None),
    "kerasgrad SimpleRNN": (
        lambda: sequential(kg.layers.SimpleRNN(3, return_sequences=True), layers.Dense(1)),
        X,
        Y_SEQUENCE,
        None,
    ),
    "go_backwards": (
        lambda: sequential(
            layers.LSTM(3, go_backwards=True, return_sequences=True), layers.Dense(1)
        ),
        X,
        Y_SEQUENCE,
        None,
    ),
    "user's cell": (lambda: sequential(layers.RNN(TwoStates(3)), layers.Dense(1)), X, Y, None),
    "stacked cells": (stacked_cells, X, Y_SEQUENCE, None),
    "forward": bidirectional("forward_lstm"),
    "backward": bidirectional("both/backward_lstm"),
    "first of two": stacked_layers("first"),
    "second of two": stacked_layers("second"),
    "subclassed": (lambda: compiled(_called(Subclassed())), X, Y, None),
    "call in a tf.function": (lambda: compiled(_called(InTFFunction())), X, Y, None),
    "nested": (nested, X, Y, "inner"),
    "two inputs": (two_inputs, {"sequence": X, "other": X[:, ::-1]}, Y, None),
    "encoder": (encoder_decoder, X, Y_SEQUENCE, "encoder"),
    "decoder": (encoder_decoder, X, Y_SEQUENCE, "decoder"),
    "stateful": (stateful, X, Y, None),
    "masked SimpleRNN": masked(layers.SimpleRNN, Y_SEQUENCE),
    "masked LSTM": masked(layers.LSTM, Y),
    "masked GRU": masked(layers.GRU, Y_SEQUENCE, zero_output_for_mask=True),
    "masked, backwards": masked(layers.LSTM, Y_SEQUENCE, go_backwards=True),
    "masked SimplifiedLSTM": masked(
        lambda *a, **kw: kg.layers.SimplifiedLSTM(*a, activation="tanh", **kw), Y_SEQUENCE
    ),
    "regularized": (regularized, X, Y, None),
    "dropout": (
        lambda: sequential(layers.LSTM(3, dropout=0.5, recurrent_dropout=0.5), layers.Dense(1)),
        X,
        Y,
        None,
    ),
}


def _called(model):
    model(X)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_contributions_sum_to_autodiff(name):
    build, x, y, layer = MODELS[name]
    model = build()
    by_step = bptt.step_contributions(model, x, y, layer)
    by_lag = bptt.step_contributions(model, x, y, layer, by_lag=True)
    weights = {w.path: w for w in model.trainable_weights}
    # A tape sees nothing of Keras's variables inside of a user's tf.function.
    tf.config.run_functions_eagerly(name == "call in a tf.function")
    with tf.GradientTape() as tape:
        loss = model.compute_loss(y=tf.constant(y), y_pred=model(x, training=False))
        if name == "regularized":  # The penalty on the kernel is of no time step.
            loss -= 0.01 * tf.reduce_sum(tf.square(model.layers[0].cell.kernel.value))
    tf.config.run_functions_eagerly(False)
    expected = tape.gradient(loss, [weights[path].value for path in by_step])
    assert list(by_lag) == list(by_step)
    for path, gradient in zip(by_step, expected, strict=True):
        assert by_step[path].shape == by_lag[path].shape == (T, *weights[path].shape)
        assert relative_error(by_step[path].sum(axis=0), gradient) < 1e-6
        assert relative_error(by_lag[path].sum(axis=0), gradient) < 1e-6
        assert np.linalg.norm(gradient) > 0


@pytest.mark.parametrize("name", ["kerasgrad SimpleRNN", "masked SimplifiedLSTM"])
def test_state_gradients_are_those_recorded_in_fit(name):
    """What GradientNorms records inside of the step comes from kerasgrad's own BPTT."""
    build, x, y, _ = MODELS[name]
    model = build()
    expected = bptt.state_gradients(model, x, y)
    norms = kg.callbacks.GradientNorms()
    model.fit(x, y, batch_size=len(x), epochs=1, shuffle=False, verbose=0, callbacks=[norms])
    (recorded,) = norms.history.state_norms.values()
    (λ,) = expected.values()
    np.testing.assert_allclose(recorded[0], np.linalg.norm(λ, axis=2).mean(axis=0), rtol=1e-6)


def test_masked_steps_contribute_nothing_and_pass_gradients_on():
    build, x, y, _ = masked(layers.LSTM, Y)
    model = build()
    o, c = bptt.gates(model, x)["output"], bptt.states(model, x)["c"]
    λ = bptt.state_gradients(model, x, y)
    # What the computed c_t does through h_t; a c_t carried on from before has no such way.
    through_h = o * (1 - np.tanh(c) ** 2) * λ["h"]
    for example, mask in enumerate(MASK):
        one = slice(example, example + 1)
        for G in bptt.step_contributions(model, x[one], y[one]).values():
            assert G[mask].any() and not G[~mask].any()
        last = np.flatnonzero(mask)[-1]
        for t in range(1, last):
            if not mask[t]:
                np.testing.assert_array_equal(λ["h"][example, t - 1], λ["h"][example, t])
                expected = λ["c"][example, t] + (through_h[example, t - 1] if mask[t - 1] else 0)
                np.testing.assert_allclose(λ["c"][example, t - 1], expected, rtol=1e-10)
        # Behind the last step that counts, the state goes nowhere.
        assert not λ["h"][example, last + 1 :].any() and not λ["c"][example, last + 1 :].any()


def test_a_hole_in_the_mask_is_a_shorter_sequence():
    build, x, y, _ = masked(layers.LSTM, Y)
    model, steps = build(), MASK[3]
    short = sequential(layers.LSTM(3), layers.Dense(1), timesteps=steps.sum())
    expected = bptt.state_gradients(short, x[3:, steps], y[3:])
    for state, λ in bptt.state_gradients(model, x[3:], y[3:]).items():
        np.testing.assert_allclose(λ[:, steps], expected[state], rtol=1e-10)


# What it leaves as it was


def _trained():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(batch_shape=X.shape),
            layers.BatchNormalization(),
            layers.LSTM(3, stateful=True, dropout=0.3, return_sequences=True),
            layers.Dropout(0.5),
            layers.GRU(3),
            layers.Dense(1),
        ]
    )
    compiled(model, optimizer="adam", metrics=["mae"])
    model.fit(X, Y, batch_size=4, verbose=0)
    return model


def test_nothing_in_the_model_changes():
    model, other = _trained(), _trained()

    def everything(model):
        variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
        return [v.numpy() for v in (*variables, *model.layers[1].states)]

    before = everything(model)
    attributes = vars(model.layers[1]).keys()
    for layer in bptt.recurrent_layers(model):
        bptt.state_gradients(model, X, Y, layer)
        bptt.step_contributions(model, X, Y, layer, by_lag=True)
        bptt.lyapunov_exponents(model, X, layer)
        bptt.saturation(model, X, layer)
    for value, kept in zip(everything(model), before, strict=True):
        np.testing.assert_array_equal(value, kept)
    assert vars(model.layers[1]).keys() == attributes
    assert not tf.config.functions_run_eagerly()

    # The random stream goes on as if nobody had looked: dropout is part of what follows.
    for one in (model, other):
        one.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    for value, expected in zip(everything(model), everything(other), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_an_error_in_the_model_leaves_it_as_it_was():
    model = sequential(layers.LSTM(3), layers.Dense(1))
    loop = model.layers[0].inner_loop
    with pytest.raises(Exception, match=r"incompatible|expected"):
        bptt.state_gradients(model, X[..., :2], Y)
    assert model.layers[0].inner_loop == loop
    assert not tf.config.functions_run_eagerly()


# Dtypes and losses


def test_mixed_precision_undoes_the_loss_scale():
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16")
    mixed = sequential(layers.LSTM(3), layers.Dense(1, dtype="float32"))
    mixed.compile("sgd", "mse")
    assert isinstance(mixed.optimizer, keras.optimizers.LossScaleOptimizer)
    keras.config.set_dtype_policy("float32")
    plain = sequential(layers.LSTM(3), layers.Dense(1))
    expected = bptt.state_gradients(plain, X, Y)
    for name, λ in bptt.state_gradients(mixed, X, Y).items():
        assert λ.dtype == np.float32
        assert relative_error(λ, expected[name]) < 0.01
    shares, expected = bptt.step_contributions(mixed, X, Y), bptt.step_contributions(plain, X, Y)
    for G, expected_G in zip(shares.values(), expected.values(), strict=True):
        assert relative_error(G, expected_G) < 0.01


def test_sample_weight_weighs():
    model = sequential(layers.GRU(3), layers.Dense(1))
    weighed = bptt.state_gradients(model, X, Y, sample_weight=np.array([1.0, 0.0, 2.0, 0.0]))["h"]
    plain = bptt.state_gradients(model, X, Y)["h"]
    np.testing.assert_allclose(weighed, plain * np.array([1, 0, 2, 0])[:, None, None], rtol=1e-6)


def test_a_frozen_layer_has_state_gradients():
    model = sequential(layers.GRU(3), layers.Dense(1))
    expected = bptt.state_gradients(model, X, Y)["h"]
    model.layers[0].trainable = False
    model.compile(loss="mse")
    np.testing.assert_array_equal(bptt.state_gradients(model, X, Y)["h"], expected)
    with pytest.raises(ValueError, match="no trainable weight"):
        bptt.step_contributions(model, X, Y)


# What is read off the shares


def test_norms_cancellation_and_horizon():
    G = np.zeros((4, 2, 2))
    G[0], G[1], G[3] = [[3, 0], [0, 4]], [[0, 0], [0, -4]], [[0.5, 0], [0, 0]]
    shares = bptt.Contributions({"w": G}, by_lag=True)
    np.testing.assert_allclose(shares.norms["w"], [5, 4, 0, 0.5])
    assert shares.cancellation["w"] == pytest.approx(3.5 / 9.5)
    assert [shares.horizon(q)["w"] for q in (0.1, 0.5, 0.9, 0.95, 1.0)] == [0, 0, 1, 3, 3]
    with pytest.raises(ValueError, match="by_lag=True"):
        bptt.Contributions({"w": G}, by_lag=False).horizon()
    with pytest.raises(ValueError, match=r"\(0, 1\]. Received: 0"):
        shares.horizon(0)
    tiny = bptt.Contributions({"w": 1e-300 * G, "v": 1e300 * G}, by_lag=True)
    np.testing.assert_allclose(tiny.norms["w"], 1e-300 * shares.norms["w"])
    np.testing.assert_allclose(tiny.norms["v"], 1e300 * shares.norms["w"])
    nothing = bptt.Contributions({"w": 0 * G}, by_lag=True)
    assert np.isnan(nothing.cancellation["w"]) and nothing.horizon()["w"] == 0


# Errors


def _bad_input(name):
    plain = sequential(layers.GRU(3), layers.Dense(1))
    if name == "no recurrent layer":
        return sequential(layers.Flatten(), layers.Dense(1)), X, Y, None
    if name == "not compiled":
        return keras.Sequential([keras.Input((T, 3)), layers.GRU(3)]), X, Y, None
    if name == "two layers, none named":
        return stacked_layers(None)[0](), X, Y, None
    if name == "a name that is not there":
        return plain, X, Y, "gur"
    if name == "the name of both directions":
        return bidirectional("")[0](), X, Y, "both"
    if name == "lengths":
        return plain, X, Y[:3], None
    if name == "called twice":
        start, gru = keras.Input((T, 3)), layers.GRU(3)
        both = layers.Concatenate()([gru(start), gru(layers.Activation("tanh")(start))])
        return compiled(keras.Model(start, layers.Dense(1)(both))), X, Y, None
    if name == "not in the loss":
        start = keras.Input((T, 3))
        outputs = layers.Dense(1)(layers.Flatten()(start)) + 0 * layers.Dense(1)(start)[:, 0]
        side = layers.GRU(3)(start)
        model = keras.Model(start, [outputs, side])
        model.compile(loss=["mse", None])
        return model, X, [Y, np.zeros((4, 3))], None
    raise KeyError(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no recurrent layer", r"recurrent layer.* has InputLayer, Flatten, Dense"),
        ("not compiled", r"compiled model.*model\.compile\("),
        ("two layers, none named", r"'\S*first', '\S*second'; none was named"),
        ("a name that is not there", r"one recurrent layer.*received layer='gur'"),
        ("the name of both directions", r"'\S*both/forward_lstm', '\S*both/backward_lstm'"),
        ("lengths", r"lengths \[3, 4\]"),
        ("called twice", r"calls its layer '\S*gru\S*' once.*2 times"),
        ("not in the loss", r"does not depend on"),
    ],
)
def test_bad_input_is_one_clear_error(name, message):
    model, x, y, layer = _bad_input(name)
    with pytest.raises(ValueError, match=message):
        bptt.state_gradients(model, x, y, layer)
    with pytest.raises(ValueError, match=message):
        bptt.step_contributions(model, x, y, layer)


def test_recurrent_layers_of_a_model_without_weights():
    with pytest.raises(ValueError, match="built model"):
        bptt.recurrent_layers(Subclassed())
