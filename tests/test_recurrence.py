"""The recurrences and their explicit BPTT against closed forms, sums by hand, and differences."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    EXPLICIT_ACTIVATIONS,
    MODES,
    assigning,
    finite_differences,
    module_at,
    relative_error,
)

from kerasgrad import devices
from kerasgrad.layers import loops
from kerasgrad.layers import recurrence as recurrence_module
from kerasgrad.layers.recurrence import gated_recurrence, is_explicit, simple_recurrence

linear, tanh, relu = (keras.activations.get(name) for name in ("linear", "tanh", "relu"))

T, BATCH, UNITS = 5, 3, 4
MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]], bool).T


# Both recurrences in the form that they share, s_t = Φ(z_t + A_t s_{t-1}), with time first.


def simple(z, s_0, W, **options):
    """A_t = W; the kernel is the identity, so that z_t is the input."""
    kernel = tf.eye(W.shape[0], dtype=W.dtype)
    return time_first(simple_recurrence(time_first(z), s_0, kernel, W, **options))


def gated(z, s_0, f, **options):
    """A_t = diag(f_t): the input holds f_t before the sigmoid, an open input gate, and z_t."""
    units = f.shape[2]
    # σ(40) is 1 in float64.
    logit = tf.where(f == 1, tf.constant(40, f.dtype), tf.math.log(f / (1 - f)))
    x = tf.concat([logit, tf.fill(tf.shape(f), tf.constant(40, f.dtype)), z], axis=2)
    kernels = tf.split(tf.eye(3 * units, dtype=f.dtype), 3, axis=1)
    return time_first(gated_recurrence(time_first(x), s_0, kernels, **options))


def time_first(array):
    return array if array.shape.rank == 2 else tf.transpose(array, [1, 0, 2])


ACTIVATIONS = pytest.mark.parametrize("activation", EXPLICIT_ACTIVATIONS)
RECURRENCES = pytest.mark.parametrize("recurrence", [simple, gated])
ALL_MODES = pytest.mark.parametrize("mode", MODES)


def arguments(recurrence, dtype="float64", seed=0):
    """z, s_0, and W or f, at random."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(T, BATCH, UNITS))
    s_0 = rng.normal(size=(BATCH, UNITS))
    if recurrence is simple:
        last = 0.6 * rng.normal(size=(UNITS, UNITS))
    else:
        last = rng.uniform(0.1, 0.95, size=(T, BATCH, UNITS))
    return [array.astype(dtype) for array in (z, s_0, last)]


def back_propagate(recurrence, arrays, cotangent, **options):
    """The states, [∂L/∂z, ∂L/∂s_0, ∂L/∂W or ∂L/∂f] and λ, for L = Σ cotangent ⊙ states."""
    tensors = [tf.constant(array) for array in arrays]
    received, norms = [], []
    options |= {"on_state_gradients": received.append, "on_state_norms": norms.append}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        states = recurrence(*tensors, **options)
        loss = tf.reduce_sum(states * cotangent)
    gradients = tape.gradient(loss, tensors)
    (shares,) = received
    λ = np.concatenate(shares, axis=1)
    (norms,) = norms
    assert norms.dtype == tf.float64
    of_λ = np.linalg.norm(λ.astype("float64"), axis=-1).mean(axis=1)
    np.testing.assert_allclose(norms, of_λ, rtol=1e-13)
    return states.numpy(), [gradient.numpy() for gradient in gradients], λ


def only_last(c, timesteps):
    """The cotangent of L = cᵀs_T."""
    cotangent = np.zeros((timesteps, *np.shape(c)))
    cotangent[-1] = c
    return cotangent


# Closed forms


@pytest.mark.parametrize("σ", [0.8, 1.0, 1.3])
def test_orthogonal_recurrent_kernel_scales_the_gradient_by_σ_a_step(σ):
    timesteps = 40
    rng = np.random.default_rng(1)
    Q, _ = np.linalg.qr(rng.normal(size=(UNITS, UNITS)))
    c = rng.normal(size=(BATCH, UNITS))
    arrays = rng.normal(size=(timesteps, BATCH, UNITS)), rng.normal(size=(BATCH, UNITS)), σ * Q
    _, (dz, ds_0, _), λ = back_propagate(simple, arrays, only_last(c, timesteps), activation=linear)
    lag = np.arange(timesteps - 1, -1, -1)[:, np.newaxis]
    expected = σ**lag * np.linalg.norm(c, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(λ, axis=-1), expected, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(ds_0, axis=-1), σ * expected[0], rtol=1e-12)
    np.testing.assert_array_equal(dz, λ)  # Φ' = 1


def test_spectral_radius_below_one_does_not_bound_the_gradient():
    # The converse trap of the article's "W too large": ‖W^k‖ first grows to 38.7.
    W = np.array([[0.9, 10.0], [0.0, 0.9]])
    c = np.array([[0.0, 1.0]])
    timesteps = 200
    arrays = np.zeros((timesteps, 1, 2)), np.zeros((1, 2)), W
    _, _, λ = back_propagate(simple, arrays, only_last(c, timesteps), activation=linear)
    k = np.arange(timesteps - 1, -1, -1)
    expected = np.stack([10 * k * 0.9 ** np.maximum(k - 1, 0), 0.9**k], axis=-1)
    np.testing.assert_allclose(λ[:, 0], expected, rtol=1e-9, atol=1e-14)
    norm = np.linalg.norm(λ[::-1, 0], axis=-1)
    assert norm.argmax() in (9, 10)
    assert 38 < norm.max() < 39
    assert norm[-1] < 1e-5


def test_linear_gated_state_gradient_is_the_product_of_later_forget_gates():
    z, s_0, f = arguments(gated)
    c = np.random.default_rng(2).normal(size=(BATCH, UNITS))
    _, (_, ds_0, df), λ = back_propagate(gated, (z, s_0, f), only_last(c, T), activation=linear)
    for t in range(T):
        np.testing.assert_allclose(λ[t], c * np.prod(f[t + 1 :], axis=0), rtol=1e-13)
    np.testing.assert_allclose(ds_0, c * np.prod(f, axis=0), rtol=1e-13)
    np.testing.assert_allclose(df[0], λ[0] * s_0, rtol=1e-13)


@pytest.mark.parametrize(
    ("timesteps", "start", "drive", "bounds"),
    [
        # f = 1 and no input: the decay n^(-3/2) is slow, and is there all the same.
        (1000, 0.5, 0.0, (4.4e-4, 4.6e-4)),
        # Constant drive: the state settles at 0.961, and a step passes 1 - 0.961² = 0.076.
        (50, 0.961, 1.0, (1e-56, 1e-55)),
    ],
)
def test_tanh_gated_state_gradient_vanishes_with_open_gates(timesteps, start, drive, bounds):
    shape = (timesteps, 1, 1)
    arrays = np.full(shape, drive), np.full(shape[1:], start), np.ones(shape)
    s, (_, ds_0, _), _ = back_propagate(
        gated, arrays, only_last([[1.0]], timesteps), activation=tanh
    )
    np.testing.assert_allclose(ds_0.item(), np.prod(1 - s**2), rtol=1e-11)
    assert bounds[0] < ds_0.item() < bounds[1]


def test_gradient_explodes_to_infinity_and_says_so():
    timesteps = 200
    arrays = [
        np.zeros((timesteps, 1, 1), "float32"),
        np.zeros((1, 1), "float32"),
        np.full((1, 1), 2.0, "float32"),
    ]
    cotangent = only_last([[1.0]], timesteps).astype("float32")
    _, _, λ = back_propagate(simple, arrays, cotangent, activation=linear)
    np.testing.assert_array_equal(λ[-128:, 0, 0], 2.0 ** np.arange(127, -1, -1))
    assert np.isposinf(λ[0]).all()


def test_units_that_are_off_pass_no_gradient_and_those_at_zero_are_off():
    z = np.array([1.0, -1.0, 0.0]).reshape(1, 1, 3)
    arrays = z, np.zeros((1, 3)), np.eye(3)
    _, (dz, ds_0, _), λ = back_propagate(simple, arrays, np.ones((1, 1, 3)), activation=relu)
    np.testing.assert_array_equal(λ, np.ones((1, 1, 3)))
    np.testing.assert_array_equal(dz, [[[1.0, 0.0, 0.0]]])
    np.testing.assert_array_equal(ds_0, [[1.0, 0.0, 0.0]])


# The article's equations 4 and 5, written out for T = 3 as sums over k of products of Jacobians.


@pytest.mark.parametrize("loss_steps", [(3,), (1, 2, 3)], ids=["L_3", "L_1+L_2+L_3"])
def test_three_step_sums_of_equations_4_and_5(loss_steps):
    rng = np.random.default_rng(3)
    U, W = rng.normal(size=(4, 2)), rng.normal(size=(4, 4))  # column vectors, as the article's
    x = {t: rng.normal(size=2) for t in (1, 2, 3)}
    g = {t: rng.normal(size=4) for t in loss_steps}  # ∂L_t/∂o_t · ∂o_t/∂s_t
    s = {0: rng.normal(size=4)}
    for t in (1, 2, 3):
        s[t] = np.tanh(U @ x[t] + W @ s[t - 1])
    slope = {t: np.diag(1 - s[t] ** 2) for t in (1, 2, 3)}  # Φ'(a_t)
    J = {t: slope[t] @ W for t in (1, 2, 3)}  # ∂s_t/∂s_{t-1}

    dU, dW = np.zeros_like(U), np.zeros_like(W)
    for t in loss_steps:
        for k in range(1, t + 1):
            product = np.eye(4)  # Π_{j=k+1..t} ∂s_j/∂s_{j-1}, the latest leftmost
            for j in range(t, k, -1):
                product = product @ J[j]
            at_k = g[t] @ product @ slope[k]
            dU += np.outer(at_k, x[k])  # ∂s_k/∂U with s_{k-1} held fixed
            dW += np.outer(at_k, s[k - 1])

    kernel, recurrent_kernel = tf.constant(U.T), tf.constant(W.T)
    inputs = tf.constant(np.stack([x[t] for t in (1, 2, 3)])[np.newaxis])
    with tf.GradientTape() as tape:
        tape.watch([kernel, recurrent_kernel])
        states = simple_recurrence(
            inputs, tf.constant(s[0][np.newaxis]), kernel, recurrent_kernel, activation=tanh
        )
        loss = tf.add_n([tf.tensordot(states[0, t - 1], g[t], 1) for t in loss_steps])
    dU_explicit, dW_explicit = tape.gradient(loss, [kernel, recurrent_kernel])
    np.testing.assert_allclose(states[0], [s[1], s[2], s[3]], rtol=1e-13)
    np.testing.assert_allclose(dU_explicit, dU.T, rtol=1e-12)
    np.testing.assert_allclose(dW_explicit, dW.T, rtol=1e-12)


# Finite differences


@RECURRENCES
@pytest.mark.parametrize(
    ("activation", "mask"),
    [("tanh", None), *((activation, MASK) for activation in EXPLICIT_ACTIVATIONS)],
)
def test_gradients_equal_finite_differences(recurrence, activation, mask):
    activation = keras.activations.get(activation)
    arrays = arguments(recurrence)
    cotangent = np.random.default_rng(4).normal(size=(T, BATCH, UNITS))
    _, gradients, _ = back_propagate(
        recurrence, arrays, cotangent, activation=activation, mask=mask
    )
    loss = loss_of(recurrence, cotangent, activation=activation, mask=mask)
    for position, gradient in enumerate(gradients):
        difference = finite_differences(at_position(loss, arrays, position), arrays[position])
        assert relative_error(gradient, difference) < 1e-7


def loss_of(recurrence, cotangent, **options):
    """L = Σ cotangent ⊙ states as one call of a graph: it is called some hundred times."""

    @tf.function(autograph=False)
    def loss(*arrays):
        return tf.reduce_sum(recurrence(*arrays, **options) * cotangent)

    return loss


def at_position(loss, arrays, position):
    tensors = [tf.constant(array) for array in arrays]

    def of_one(array):
        return float(loss(*tensors[:position], tf.constant(array), *tensors[position + 1 :]))

    return of_one


@ACTIVATIONS
def test_recurrent_dropout_equals_finite_differences(activation):
    activation = keras.activations.get(activation)
    arrays = arguments(simple, seed=5)
    dropout = 2.0 * np.random.default_rng(6).integers(0, 2, size=(BATCH, UNITS))
    cotangent = np.random.default_rng(7).normal(size=(T, BATCH, UNITS))
    options = {"activation": activation, "recurrent_dropout_mask": dropout, "mask": MASK}
    _, gradients, _ = back_propagate(simple, arrays, cotangent, **options)
    loss = loss_of(simple, cotangent, **options)
    for position in (1, 2):
        difference = finite_differences(at_position(loss, arrays, position), arrays[position])
        assert relative_error(gradients[position], difference) < 1e-7


MASKED = pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
OUTPUTS = pytest.mark.parametrize(
    "return_sequences", [False, True], ids=["last state", "every state"]
)


def assert_steps_of_a_chunk(steps, step, most):
    """Of 100; on a GPU they are all one."""
    chunk = loops.steps_of_a_chunk(100, step, most)
    assert chunk == (100 if devices.on_gpu() else steps)


@pytest.mark.parametrize("timesteps", [4, 11], ids="T={}".format)
@MASKED
@pytest.mark.parametrize("projected", [False, True], ids=["x itself", "projected"])
@OUTPUTS
def test_chunks_of_gated_steps_give_the_gradients_of_autodiff(
    timesteps, masked, projected, return_sequences
):
    batch, units = 64, 128
    # The batch is cut in two halves.
    assert_steps_of_a_chunk(4, batch // 2 * units, loops.GATES_NUMBERS)
    rng = np.random.default_rng(timesteps)
    mask = tf.constant(rng.random((batch, timesteps)) < 0.7) if masked else None
    assert_gated_equals_autodiff(
        batch, timesteps, units, projected, mask=mask, return_sequences=return_sequences
    )


@pytest.mark.parametrize("features, units", [(1, 16), (3, 64), (33, 128), (3, 160), (3, 700)])
def test_as_many_examples_are_summed_up_as_make_a_product_that_is_not_cut(features, units):
    examples = int(loops.examples_of_a_simple_chunk(features, units))
    most = loops.UNCUT_MULTIPLICATIONS / ((features + units) * units)
    if most < 32:  # Cut, whatever the chunk.
        assert examples == loops.SIMPLE_EXAMPLES
    else:
        assert examples == min(int(most), loops.SIMPLE_EXAMPLES)


@pytest.mark.parametrize("timesteps, units, steps", [(8, 64, 8), (19, 64, 8), (19, 128, 2)])
@MASKED
@OUTPUTS
@pytest.mark.parametrize("dropout", [False, True], ids=["", "recurrent dropout"])
def test_chunks_of_simple_steps_give_the_gradients_of_autodiff(
    timesteps, units, steps, masked, return_sequences, dropout
):
    batch = 64
    examples = loops.examples_of_a_simple_chunk(4, units)  # The bias is one more.
    assert_steps_of_a_chunk(steps, batch // 2, examples)
    rng = np.random.default_rng(timesteps)
    mask = tf.constant(rng.random((batch, timesteps)) < 0.7) if masked else None
    dropout = tf.constant(rng.integers(0, 2, (batch, units)) * 2.0) if dropout else None
    shapes = [(batch, timesteps, 3), (batch, units), (3, units), (units, units), (units,)]
    # Small enough that neither a state nor a gradient grows from step to step: rounding would, too.
    tensors = [tf.constant(rng.normal(size=shape) / shape[-1]) for shape in shapes]

    def explicit(*tensors):
        return simple_recurrence(
            *tensors,
            activation=tanh,
            mask=mask,
            recurrent_dropout_mask=dropout,
            return_sequences=return_sequences,
        )

    def plain(x, s_0, U, W, b):
        def step(s, x_t):
            return tf.tanh(x_t @ U + (s if dropout is None else s * dropout) @ W + b)

        return step_by_step(x, s_0, step, mask, return_sequences)

    assert_same_states_and_gradients(explicit, plain, tensors)


@pytest.fixture(scope="module")
def recurrence_traced_anew():
    """The module once more: nothing that its functions have been compiled to before."""
    module = module_at(Path(recurrence_module.__file__))
    assert module is not recurrence_module
    return module


@pytest.mark.parametrize(
    "timesteps, masked, return_sequences",
    [(1, False, False), (9, True, False), (9, False, True)],
)
@pytest.mark.parametrize(
    "recurrence, activation",
    [(simple, tanh), (gated, linear), (gated, tanh)],
    ids=["simple", "gated, linear", "gated, tanh"],
)
def test_form_for_a_gpu_gives_the_same_numbers(
    recurrence, activation, return_sequences, masked, timesteps, recurrence_traced_anew, monkeypatch
):
    rng = np.random.default_rng(timesteps)
    shape = (timesteps, BATCH, UNITS)
    last = 0.6 * rng.normal(size=(UNITS, UNITS)) if recurrence is simple else rng.random(shape)
    arrays = [rng.normal(size=shape), rng.normal(size=(BATCH, UNITS)), last]
    options = {
        "activation": activation,
        "return_sequences": return_sequences,
        "mask": tf.constant(rng.random((BATCH, timesteps)) < 0.7) if masked else None,
    }
    if recurrence is simple:
        options["recurrent_dropout_mask"] = tf.constant(rng.integers(0, 2, (BATCH, UNITS)) * 2.0)
    cotangent = rng.normal(size=shape if return_sequences else (BATCH, UNITS))
    states, gradients, λ = back_propagate(recurrence, arrays, cotangent, **options)
    # What is compiled for a GPU runs on any device.
    monkeypatch.setattr(devices, "on_gpu", lambda: True)
    for name in ("SIMPLE_STEPS_OF_A_ROUND", "GATED_STEPS_OF_A_ROUND"):
        monkeypatch.setattr(loops, name, 4)
    for name in ("simple_recurrence", "gated_recurrence"):
        monkeypatch.setattr(sys.modules[__name__], name, getattr(recurrence_traced_anew, name))
    states_there, gradients_there, λ_there = back_propagate(
        recurrence, arrays, cotangent, **options
    )
    pairs = zip([states, λ, *gradients], [states_there, λ_there, *gradients_there], strict=True)
    for here, there in pairs:
        assert relative_error(there, here) < 1e-13


def test_scan_is_the_recurrence_step_by_step_and_looks_at_no_later_one():
    rng = np.random.default_rng(0)
    for steps in (1, 2, 3, 8, 21):
        a, b = rng.normal(size=(2, steps, 5))
        s = [rng.normal(size=5)]
        for a_t, b_t in zip(a, b, strict=True):
            s.append(a_t * s[-1] + b_t)
        scanned = loops.scan(*map(tf.constant, (a, b, s[0]))).numpy()
        np.testing.assert_allclose(scanned, s, rtol=1e-12)
        b[-1] = np.nan
        before = loops.scan(*map(tf.constant, (a, b, s[0]))).numpy()[:-1]
        np.testing.assert_array_equal(before, scanned[:-1])


def test_one_process_may_have_gated_recurrences_without_projection_of_any_sizes():
    for units in (3, 4, 2, 5):
        assert_gated_equals_autodiff(units + 1, 2 * units, units, projected=False)


def assert_gated_equals_autodiff(batch, timesteps, units, projected, **options):
    """gated_recurrence, and step_by_step under a tape: the same states and gradients."""
    rng = np.random.default_rng(timesteps)
    features = 3 if projected else units
    shapes = [(batch, timesteps, features), (batch, units)]
    shapes += (2 + projected) * [(features, units)] + 2 * [(units,)]
    tensors = [tf.constant(rng.normal(size=shape) / shape[-1] ** 0.5) for shape in shapes]

    def explicit(x, s_0, *weights):
        *kernels, b_f, b_i = weights
        return gated_recurrence(x, s_0, kernels, [b_f, b_i], activation=tanh, **options)

    def plain(x, s_0, K_f, K_i, *others):
        *K_c, b_f, b_i = others

        def step(s, x_t):
            f, i = tf.sigmoid(x_t @ K_f + b_f), tf.sigmoid(x_t @ K_i + b_i)
            return tf.tanh(f * s + i * (x_t @ K_c[0] if K_c else x_t))

        return step_by_step(x, s_0, step, **options)

    assert_same_states_and_gradients(explicit, plain, tensors)


def assert_same_states_and_gradients(explicit, plain, tensors):
    states, gradients = zip(
        *(gradients_of(function, tensors) for function in (explicit, plain)), strict=True
    )
    np.testing.assert_allclose(*states, rtol=1e-12, atol=1e-14)
    for ours, autodiff in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, autodiff, rtol=1e-9, atol=1e-13)


def step_by_step(x, s_0, step, mask=None, return_sequences=True):
    """A recurrence as it is written: step(s_{t-1}, x_t) is s_t."""
    states = [s_0]
    for t in range(x.shape[1]):
        s_t = step(states[-1], x[:, t])
        states.append(s_t if mask is None else tf.where(mask[:, t, None], s_t, states[-1]))
    return tf.stack(states[1:], axis=1) if return_sequences else states[-1]


def gradients_of(function, tensors):
    """function(*tensors), and the gradients of its weighted sum by each tensor."""
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = function(*tensors)
        loss = tf.reduce_sum(output * tf.cos(tf.range(output.shape[-1], dtype=output.dtype)))
    return output, tape.gradient(loss, tensors)


@RECURRENCES
def test_masked_steps_repeat_the_state_and_pass_its_gradient_on(recurrence):
    z, s_0, last = arguments(recurrence)
    cotangent = np.random.default_rng(8).normal(size=(T, BATCH, UNITS))
    s, (dz, ds_0, _), λ = back_propagate(
        recurrence, (z, s_0, last), cotangent, activation=tanh, mask=MASK
    )
    previous = np.concatenate([s_0[np.newaxis], s[:-1]])
    before = np.concatenate([ds_0[np.newaxis], λ[:-1] - cotangent[:-1]])
    masked = ~MASK.T
    np.testing.assert_array_equal(s[masked], previous[masked])
    np.testing.assert_array_equal(dz[masked], 0)
    np.testing.assert_allclose(before[masked], λ[masked], rtol=1e-12)
    assert np.all(s[~masked] != previous[~masked])


# How TensorFlow may call them


@RECURRENCES
@ALL_MODES
def test_same_numbers_in_every_mode(recurrence, mode):
    arrays = arguments(recurrence)
    cotangent = np.random.default_rng(9).normal(size=(T, BATCH, UNITS))
    expected = back_propagate(recurrence, arrays, cotangent, activation=tanh, mask=MASK)
    λ = tf.Variable(np.zeros((T, BATCH, UNITS)))

    def step(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            states = recurrence(
                *tensors, activation=tanh, mask=MASK, on_state_gradients=assigning(λ)
            )
            loss = tf.reduce_sum(states * cotangent)
        return states, tape.gradient(loss, tensors)

    states, gradients = MODES[mode](step)(*map(tf.constant, arrays))
    assert relative_error(states, expected[0]) < 1e-13
    for gradient, wanted in zip(gradients, expected[1], strict=True):
        assert relative_error(gradient, wanted) < 1e-13
    assert relative_error(λ, expected[2]) < 1e-13


@RECURRENCES
def test_lengths_and_batches_unknown_when_traced(recurrence):
    z, s_0, last = arguments(recurrence)
    batched = last.ndim == 3
    signature = [
        tf.TensorSpec([None, None, UNITS], "float64"),
        tf.TensorSpec([None, UNITS], "float64"),
        tf.TensorSpec([None, None, UNITS] if batched else [UNITS, UNITS], "float64"),
    ]

    @tf.function(input_signature=signature, autograph=False)
    def step(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = tf.reduce_sum(recurrence(*tensors, activation=tanh) ** 2)
        return tape.gradient(loss, tensors)

    for timesteps, batch in [(T, BATCH), (1, BATCH), (T, 1), (1, 1)]:
        arrays = z[:timesteps, :batch], s_0[:batch], last[:timesteps, :batch] if batched else last
        states = recurrence(*map(tf.constant, arrays), activation=tanh)
        _, expected, _ = back_propagate(recurrence, arrays, 2 * states, activation=tanh)
        for gradient, wanted in zip(step(*map(tf.constant, arrays)), expected, strict=True):
            assert relative_error(gradient, wanted) < 1e-13


@RECURRENCES
def test_one_process_may_have_layers_of_any_sizes(recurrence):
    # After a few sizes TensorFlow makes one trace for all of them, in which none is known.
    for timesteps, batch, units in [(2, 2, 2), (3, 1, 3), (1, 3, 1), (4, 4, 5)]:
        s_0 = np.ones((batch, units))
        last = 0.5 * (np.eye(units) if recurrence is simple else np.ones_like(s_0))
        last = last if recurrence is simple else np.stack([last] * timesteps)
        cotangent = only_last(s_0, timesteps)
        arrays = np.zeros((timesteps, batch, units)), s_0, last
        _, (_, ds_0, _), _ = back_propagate(recurrence, arrays, cotangent, activation=linear)
        np.testing.assert_array_equal(ds_0, 0.5**timesteps * s_0)


@RECURRENCES
def test_a_persistent_tape_gives_the_same_gradient_twice(recurrence):
    tensors = [tf.constant(array) for array in arguments(recurrence)]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(tensors)
        loss = tf.reduce_sum(recurrence(*tensors, activation=tanh) ** 2)
        twice = 2 * loss
    first, again, doubled = (tape.gradient(y, tensors) for y in (loss, loss, twice))
    for one, two, double in zip(first, again, doubled, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(double, 2 * one, rtol=1e-14)


@RECURRENCES
@pytest.mark.parametrize("vectorized", [True, False])
def test_tape_jacobian(recurrence, vectorized):
    z, s_0, last = map(tf.constant, arguments(recurrence))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(s_0)
        last_state = recurrence(z, s_0, last, activation=linear)[-1]
    jacobian = tape.batch_jacobian(last_state, s_0, experimental_use_pfor=vectorized)
    for example in range(BATCH):
        if recurrence is simple:
            expected = np.linalg.matrix_power(last.numpy().T, T)
        else:
            expected = np.diag(np.prod(last.numpy()[:, example], axis=0))
        np.testing.assert_allclose(jacobian[example], expected, atol=1e-13)


@RECURRENCES
@ALL_MODES
def test_second_derivative_is_a_clear_error(recurrence, mode):
    tensors = [tf.constant(array) for array in arguments(recurrence)]

    def gradient_penalty(*tensors):
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(tensors)
                loss = tf.reduce_sum(recurrence(*tensors, activation=tanh))
            penalty = tf.reduce_sum(inner.gradient(loss, tensors[0]) ** 2)
        return outer.gradient(penalty, tensors)

    with pytest.raises(ValueError, match="differentiable once") as error:
        MODES[mode](gradient_penalty)(*tensors)
    assert "keras.layers.SimpleRNN" in str(error.value)


@RECURRENCES
def test_forward_mode_is_a_clear_error(recurrence):
    z, s_0, last = map(tf.constant, arguments(recurrence))
    with (
        pytest.raises(ValueError, match="differentiable once"),
        tf.autodiff.ForwardAccumulator(z, tf.ones_like(z)),
    ):
        recurrence(z, s_0, last, activation=tanh)


@pytest.mark.parametrize("activation", [*EXPLICIT_ACTIVATIONS, None])
def test_explicit_activations(activation):
    assert is_explicit(keras.activations.get(activation))


@pytest.mark.parametrize("activation", ["elu", "softsign", "gelu", lambda a: a])
def test_other_activations_are_not_explicit(activation):
    assert not is_explicit(keras.activations.get(activation))
