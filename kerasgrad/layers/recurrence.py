"""The recurrences and their back-propagation through time (BPTT), written out.

Both recurrences of this package have the form

    s_t = Φ(a_t),    a_t = z_t + A_t s_{t-1},    t = 1..T

where z_t holds whatever does not depend on the state (z_t = U x_t + b, computed for all steps in
one product before the loop) and A_t is what stands between two states:

    simple recurrence    A_t = W           (Elman 1990; the article's equation 1)
    gated recurrence     A_t = diag(f_t)   (the article's section 5, its simplified LSTM)

With g_t = ∂L/∂s_t as it arrives from the outputs alone, back-propagation through time is

    λ_t = g_t + A_{t+1}ᵀ δ_{t+1}           λ_t = ∂L/∂s_t, the total derivative; δ_{T+1} = 0
    δ_t = Φ'(a_t) ⊙ λ_t                    δ_t = ∂L/∂a_t = ∂L/∂z_t

    simple recurrence    ∂L/∂W   = Σ_t δ_t s_{t-1}ᵀ       (the article's equation 5, summed over t)
    gated recurrence     ∂L/∂f_t = δ_t ⊙ s_{t-1}

A step that the mask leaves out repeats the state, s_t = s_{t-1}, so δ_t = 0 and
λ_{t-1} = g_{t-1} + λ_t.

The code below is these lines. It is fast because only λ needs a loop: Φ' is a function of s_t
alone (1 - s² for tanh), so the forward pass keeps nothing but the states, and δ and the gradients
of the parameters follow for all steps at once. Arrays are time-major, (timesteps, batch, units),
so that a step is one contiguous block, and both loops are compiled by XLA. λ, the quantity that
vanishes or explodes, is there for the taking: `on_state_gradients` receives it.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

# Φ' as a function of the output s = Φ(a): what lets the backward pass forget a.
_DERIVATIVE_AT_OUTPUT = {
    keras.activations.linear: tf.ones_like,
    keras.activations.tanh: lambda s: 1 - s * s,
    keras.activations.sigmoid: lambda s: s * (1 - s),
    keras.activations.relu: lambda s: tf.cast(s > 0, s.dtype),
}

StateGradients = Callable[[tf.Tensor], None]


def is_explicit(activation: Callable) -> bool:
    """Whether Φ' can be had from Φ's output, as the recurrences of this module need."""
    return activation in _DERIVATIVE_AT_OUTPUT


def simple_recurrence(
    z: tf.Tensor,
    initial_state: tf.Tensor,
    recurrent_kernel: tf.Tensor,
    *,
    activation: Callable,
    mask: tf.Tensor | None = None,
    recurrent_dropout_mask: tf.Tensor | None = None,
    on_state_gradients: StateGradients | None = None,
) -> tf.Tensor:
    """States of s_t = Φ(z_t + s_{t-1} W), differentiable once, by explicit BPTT.

    Args:
        z: (timesteps, batch, units), the part of a_t that the state has no share in.
        initial_state: (batch, units), s_0.
        recurrent_kernel: (units, units), W; multiplies a row vector s from the right, as in Keras.
        activation: Φ, one of Keras's linear, tanh, sigmoid, relu.
        mask: (timesteps, batch, 1) bool; False repeats the previous state.
        recurrent_dropout_mask: (batch, units), multiplies s_{t-1} before W at every step.
        on_state_gradients: called with λ, (timesteps, batch, units), when the gradient is taken.

    Returns:
        (timesteps, batch, units), the states s_1 to s_T.
    """

    @tf.custom_gradient
    def recurrence(z, s_0, W):
        s = _simple_states(*_constants(z, s_0, W, mask, recurrent_dropout_mask), activation)
        # One trace serves layers of different sizes, and does not know this one's.
        s.set_shape(z.shape)

        def gradient(g):
            λ, dz, ds_0, dW = _differentiable_once(
                lambda g, s, s_0, W: _simple_gradients(
                    g, s, s_0, W, mask, recurrent_dropout_mask, activation
                ),
            )(g, s, s_0, W)
            if on_state_gradients is not None:
                on_state_gradients(λ)
            return dz, ds_0, dW

        return s, gradient

    return recurrence(*_tensors(z, initial_state, recurrent_kernel))


def gated_recurrence(
    z: tf.Tensor,
    initial_state: tf.Tensor,
    forget_gate: tf.Tensor,
    *,
    activation: Callable,
    mask: tf.Tensor | None = None,
    on_state_gradients: StateGradients | None = None,
) -> tf.Tensor:
    """States of s_t = Φ(z_t + f_t ⊙ s_{t-1}), differentiable once, by explicit BPTT.

    Args:
        z: (timesteps, batch, units), the gated input i_t ⊙ x_t.
        initial_state: (batch, units), s_0.
        forget_gate: (timesteps, batch, units), f_t.
        activation, mask, on_state_gradients: as in `simple_recurrence`.

    Returns:
        (timesteps, batch, units), the states s_1 to s_T.
    """

    @tf.custom_gradient
    def recurrence(z, s_0, f):
        s = _gated_states(*_constants(z, s_0, f, mask), activation)

        def gradient(g):
            λ, dz, ds_0, df = _differentiable_once(
                lambda g, s, s_0, f: _gated_gradients(g, s, s_0, f, mask, activation),
            )(g, s, s_0, f)
            if on_state_gradients is not None:
                on_state_gradients(λ)
            return dz, ds_0, df

        return s, gradient

    return recurrence(*_tensors(z, initial_state, forget_gate))


# Compiled apart from the model around them: under XLA these loops write their results in place,
# which the same loops in a plain graph do not.
_compiled = tf.function(jit_compile=True, reduce_retracing=True, autograph=False)


@_compiled
def _simple_states(z, s_0, W, mask, dropout, activation):
    return _states(z, s_0, lambda t, s: _dropped(s, dropout) @ W, mask, activation)


@_compiled
def _simple_gradients(g, s, s_0, W, mask, dropout, activation):
    W_T = tf.transpose(W)
    λ, δ, ds_0 = _back_propagate(
        g, s, lambda t, δ_t: _dropped(δ_t @ W_T, dropout), mask, activation
    )
    previous = _dropped(_previous(s, s_0), dropout)
    dW = tf.matmul(_all_steps(previous), _all_steps(δ), transpose_a=True)
    return λ, δ, ds_0, dW


@_compiled
def _gated_states(z, s_0, f, mask, activation):
    return _states(z, s_0, lambda t, s: tf.gather(f, t) * s, mask, activation)


@_compiled
def _gated_gradients(g, s, s_0, f, mask, activation):
    λ, δ, ds_0 = _back_propagate(g, s, lambda t, δ_t: tf.gather(f, t) * δ_t, mask, activation)
    return λ, δ, ds_0, δ * _previous(s, s_0)


def _states(z, s_0, propagate, mask, activation):
    """The forward loop; propagate(t, s_{t-1}) is A_t s_{t-1}."""
    T = tf.shape(z)[0]

    def step(t, s, states):
        s_t = activation(tf.gather(z, t) + propagate(t, s))
        if mask is not None:
            s_t = tf.where(tf.gather(mask, t), s_t, s)
        return t + 1, s_t, states.write(t, s_t)

    states = tf.TensorArray(z.dtype, T, element_shape=s_0.shape)
    states = tf.while_loop(lambda t, *_: t < T, step, (0, s_0, states))[2].stack()
    return tf.ensure_shape(states, z.shape)


def _back_propagate(g, s, propagate_back, mask, activation):
    """The backward loop; propagate_back(t, δ_t) is A_tᵀ δ_t. Returns λ, δ and ∂L/∂s_0."""
    T = tf.shape(s)[0]
    derivative = _DERIVATIVE_AT_OUTPUT[activation]

    def step(t, from_later, λ):
        λ_t = tf.gather(g, t) + from_later
        δ_t = derivative(tf.gather(s, t)) * λ_t
        if mask is None:
            to_earlier = propagate_back(t, δ_t)
        else:
            to_earlier = tf.where(tf.gather(mask, t), propagate_back(t, δ_t), λ_t)
        return t - 1, to_earlier, λ.write(t, λ_t)

    λ = tf.TensorArray(s.dtype, T, element_shape=s.shape[1:])
    start = (T - 1, tf.zeros_like(g[0]), λ)
    _, ds_0, λ = tf.while_loop(lambda t, *_: t >= 0, step, start)
    λ = tf.ensure_shape(λ.stack(), s.shape)
    δ = derivative(s) * λ
    if mask is not None:
        δ = tf.where(mask, δ, tf.zeros_like(δ))
    return λ, δ, ds_0


def _previous(s, s_0):
    return tf.concat([s_0[tf.newaxis], s[:-1]], axis=0)


def _all_steps(array):
    # Not array.shape[-1]: it is None once one trace serves layers of different sizes.
    return tf.reshape(array, [-1, tf.shape(array)[-1]])


def _dropped(s, dropout):
    return s if dropout is None else s * dropout


def _tensors(*values):
    # A custom gradient keeps a variable as it is, and would read it in the backward pass, when a
    # stateful layer has already put the new state there.
    return [tf.convert_to_tensor(value) for value in values]


def _constants(*tensors):
    # An eager tape would otherwise record the compiled loop itself and ask XLA for a list of its
    # intermediate tensors, which it cannot hand out.
    return [None if tensor is None else tf.stop_gradient(tensor) for tensor in tensors]


def _differentiable_once(function):
    """`function`, with a clear error where TensorFlow would return a wrong second derivative."""

    @tf.custom_gradient
    def guarded(*tensors):
        def second_derivative(*_):
            raise ValueError(
                "kerasgrad's recurrent layers are differentiable once, and a second derivative "
                "(a gradient penalty, a Hessian) or a forward-mode one was asked for. Use "
                "keras.layers.SimpleRNN, or keras.layers.RNN around the kerasgrad cell, in this "
                "model: both take the same weights."
            )

        return function(*_constants(*tensors)), second_derivative

    return guarded
