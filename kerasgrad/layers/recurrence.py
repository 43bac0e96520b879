"""The recurrences and their back-propagation through time (BPTT), written out.

Both recurrences of this package have the form

    s_t = Φ(a_t),    a_t = z_t + A_t s_{t-1},    t = 1..T

where z_t is what the input x_t adds, and A_t is what stands between two states:

    simple recurrence    z_t = U x_t         A_t = W           (Elman 1990; the article's eq. 1)
    gated recurrence     z_t = i_t ⊙ c_t     A_t = diag(f_t)   (its section 5, the LSTM)
                         f_t = σ(K_f x_t),   i_t = σ(K_i x_t),   c_t = K_c x_t, or x_t itself

With g_t = ∂L/∂s_t as it arrives from the outputs alone, back-propagation through time is

    λ_t = g_t + A_{t+1}ᵀ δ_{t+1}           λ_t = ∂L/∂s_t, the total derivative; δ_{T+1} = 0
    δ_t = Φ'(a_t) ⊙ λ_t                    δ_t = ∂L/∂a_t = ∂L/∂z_t

    simple recurrence    ∂L/∂U = Σ_t δ_t x_tᵀ,   ∂L/∂W = Σ_t δ_t s_{t-1}ᵀ   (eq. 4 and 5)
    gated recurrence     ∂L/∂K = Σ_t κ_t x_tᵀ for each kernel, with κ_t = ∂L/∂(K x_t):
                         δ_t ⊙ s_{t-1} ⊙ f_t ⊙ (1 - f_t)   of K_f
                         δ_t ⊙ c_t ⊙ i_t ⊙ (1 - i_t)       of K_i
                         δ_t ⊙ i_t                         of K_c

A step that the mask leaves out repeats the state, s_t = s_{t-1}, so δ_t = 0 and
λ_{t-1} = g_{t-1} + λ_t. A bias is one more column of U or K, for an input that is always 1.

The code below is these lines. It is fast because it keeps little and does little at a step. Φ' is a
function of s_t alone (1 - s² for tanh), so the forward pass keeps nothing but the states; gates are
cheaper to compute again than to keep. What need not wait for the step before is done for a chunk of
steps at once, as many as a core's cache holds: forward, the gates; backward, the gates once more,
κ, and the chunk's part of ∂L/∂U and ∂L/∂W or of ∂L/∂K, after which δ and κ are forgotten. What is
left to the loop over single steps is one product, by W or Wᵀ, and one pass over its result; as the
gated A_t is diagonal, its steps are a pass alone, λ_{t-1} = g_{t-1} + f_t Φ'(a_t) λ_t. The loops
themselves, and what a GPU does instead, are in loops.py. What nobody asks for is not computed:
outputs before the last, a λ that is kept, and ∂L/∂x, which takes a walk back of its own. And the
examples of a batch do not meet before their gradients are summed: two cores take half of them each.
λ, the quantity that vanishes or explodes, is there for the taking: `on_state_gradients` has it, and
`on_state_norms` its norms, which are taken chunk by chunk, so that λ need not be kept for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from kerasgrad import devices
from kerasgrad.layers import loops
from kerasgrad.layers.explicit_gradient import as_tensors, with_explicit_gradient
from kerasgrad.layers.loops import compiled, flat, rows, some_of, swap
from kerasgrad.norms import summed_norms

# Φ' as a function of the output s = Φ(a): what lets the backward pass forget a.
DERIVATIVE_AT_OUTPUT = {
    keras.activations.linear: tf.ones_like,
    keras.activations.tanh: lambda s: 1 - s * s,
    keras.activations.sigmoid: lambda s: s * (1 - s),
    keras.activations.relu: lambda s: tf.cast(s > 0, s.dtype),
}

StateGradients = Callable[[Sequence[tf.Tensor]], None]
StateNorms = Callable[[tf.Tensor], None]


def is_explicit(activation: Callable) -> bool:
    """Whether Φ' can be had from Φ's output, as the recurrences of this module need."""
    return activation in DERIVATIVE_AT_OUTPUT


def simple_recurrence(
    x: tf.Tensor,
    initial_state: tf.Tensor,
    kernel: tf.Tensor,
    recurrent_kernel: tf.Tensor,
    bias: tf.Tensor | None = None,
    *,
    activation: Callable,
    mask: tf.Tensor | None = None,
    recurrent_dropout_mask: tf.Tensor | None = None,
    return_sequences: bool = True,
    on_state_gradients: StateGradients | None = None,
    on_state_norms: StateNorms | None = None,
) -> tf.Tensor:
    """States of s_t = Φ(x_t U + s_{t-1} W + b), differentiable once, by explicit BPTT.

    Args:
        x: (batch, timesteps, features).
        initial_state: (batch, units), s_0.
        kernel: (features, units), U; multiplies a row vector x from the right, as in Keras.
        recurrent_kernel: (units, units), W.
        bias: (units,), b, or None.
        activation: Φ, one of Keras's linear, tanh, sigmoid, relu.
        mask: (batch, timesteps) bool; False repeats the previous state.
        recurrent_dropout_mask: (batch, units), multiplies s_{t-1} before W at every step.
        return_sequences: whether all states are returned, or the last.
        on_state_gradients: called with λ when the gradient is taken: a list of its shares of the
            batch, each (timesteps, examples, units).
        on_state_norms: called then, too, with the mean over the batch of ‖λ_t‖₂, (timesteps,)
            float64.

    Returns:
        (batch, timesteps, units), the states s_1 to s_T; or (batch, units), s_T.
    """
    if bias is not None:
        (kernel,) = _with_biases([kernel], [bias])

    def states(x, s_0, mask, dropout, U, W, with_bias):
        return _simple_states(x, s_0, mask, dropout, U, W, activation, with_bias)

    def gradients(upstream, s, x, mask, dropout, U, W, observed):
        return _simple_gradients(*upstream, s, x, mask, dropout, W, activation, observed)

    def input_gradient(upstream, s, x, mask, dropout, U, W):
        return _simple_input_gradient(*upstream, s, x, mask, dropout, U, W, activation)

    return with_explicit_gradient(
        (states, gradients, input_gradient),
        (x, initial_state, mask, recurrent_dropout_mask),
        (kernel, recurrent_kernel),
        bias is not None,
        return_sequences,
        (on_state_gradients, on_state_norms),
    )


def gated_recurrence(
    x: tf.Tensor,
    initial_state: tf.Tensor,
    kernels: Sequence[tf.Tensor],
    biases: Sequence[tf.Tensor] | None = None,
    *,
    activation: Callable,
    mask: tf.Tensor | None = None,
    return_sequences: bool = True,
    on_state_gradients: StateGradients | None = None,
    on_state_norms: StateNorms | None = None,
) -> tf.Tensor:
    """States of s_t = Φ(f_t ⊙ s_{t-1} + i_t ⊙ c_t), differentiable once, by explicit BPTT.

    Args:
        x: (batch, timesteps, features).
        initial_state: (batch, units), s_0.
        kernels: K_f and K_i of the gates f_t = σ(x_t K_f + b_f) and i_t = σ(x_t K_i + b_i), and
            K_c where c_t = x_t K_c; without it c_t = x_t. Each (features, units).
        biases: b_f and b_i, each (units,), or None.
        activation, mask, return_sequences, on_state_gradients, on_state_norms: as in
            `simple_recurrence`.

    Returns:
        (batch, timesteps, units), the states s_1 to s_T; or (batch, units), s_T.
    """
    if biases is not None:
        kernels = _with_biases(kernels, biases)

    def states(x, s_0, mask, _, *kernels, with_bias):
        return _gated_states(x, s_0, mask, kernels, activation, with_bias)

    def gradients(upstream, s, x, mask, _, *kernels, observed):
        return _gated_gradients(*upstream, s, x, mask, kernels, activation, observed)

    def input_gradient(upstream, s, x, mask, _, *kernels):
        return _gated_input_gradient(*upstream, s, x, mask, kernels, activation)

    return with_explicit_gradient(
        (states, gradients, input_gradient),
        (x, initial_state, mask, None),
        kernels,
        biases is not None,
        return_sequences,
        (on_state_gradients, on_state_norms),
    )


def _with_biases(kernels, biases):
    """The kernels with the weights of the constant input 1; those of a last one are 0."""
    biases = as_tensors(biases)
    biases += [tf.zeros_like(biases[0])] * (len(kernels) - len(biases))
    return [
        tf.concat([kernel, bias[tf.newaxis]], axis=0)
        for kernel, bias in zip(as_tensors(kernels), biases, strict=True)
    ]


# Forward, from x batch first


@compiled
def _simple_states(x, s_0, mask, dropout, U, W, activation, with_bias):
    """x by step, and s_0 to s_T."""
    x = _by_step(x, with_bias)
    U_W = tf.concat([U, W], axis=0)

    def by_example(s):
        return _dropped(tf.reshape(s, tf.shape(s_0)), dropout)

    if devices.on_gpu():
        # x U of all steps ahead: a launch less at a step.
        def of_inputs(x):
            return [tf.reshape(rows(x) @ U, [tf.shape(x)[0], -1])]

        def step(s, z_t):
            return activation(z_t + flat(by_example(s) @ W))
    else:
        # x U and s W in one product: a pass less.
        def of_inputs(x):
            return [x]

        def step(s, x_t):
            return activation(flat(tf.concat([x_t, by_example(s)], axis=1) @ U_W))

    return x, loops.forward(x, s_0, mask, of_inputs, step, loops.SIMPLE_STEPS_OF_A_ROUND)


@compiled
def _gated_states(x, s_0, mask, kernels, activation, with_bias):
    """x by step, and s_0 to s_T."""
    x = _by_step(x, with_bias)

    def of_inputs(x):
        f, i, c = _gates(x, kernels)
        return [f, i * c]

    def step(s, f, z):
        return activation(f * s + z)

    if devices.on_gpu() and activation is keras.activations.linear:
        f, z = of_inputs(x)
        if mask is not None:
            taken = tf.repeat(mask, tf.shape(s_0)[1], axis=1)
            f, z = tf.where(taken, f, tf.ones_like(f)), tf.where(taken, z, tf.zeros_like(z))
        return x, loops.scan(f, z, flat(s_0))
    return x, loops.forward(x, s_0, mask, of_inputs, step, loops.GATED_STEPS_OF_A_ROUND)


def _by_step(x, with_bias):
    """(timesteps, batch, features); with a bias, 1 is the last feature."""
    x = swap(x)
    return tf.pad(x, [[0, 0], [0, 0], [0, 1]], constant_values=1) if with_bias else x


def _gates(x, kernels):
    """f, i and c of some steps, each (steps, numbers of a step)."""
    K_f, K_i, *K_c = kernels
    steps, units = tf.shape(x)[0], tf.shape(K_f)[1]

    def product(K):
        return tf.reshape(rows(x) @ K, [steps, -1])

    c = product(K_c[0]) if K_c else tf.reshape(x[..., :units], [steps, -1])
    return tf.sigmoid(product(K_f)), tf.sigmoid(product(K_i)), c


# Backward. What the outputs alone pass to the states: g_1 to g_T, batch first, or None where only
# the last state is an output, and what the loop starts from, 0 or ∂L/∂s_T.


@compiled
def _simple_gradients(g, at_end, s, x, mask, dropout, W, activation, observed):
    """∂L/∂U and ∂L/∂W; ∂L/∂s_0; what is observed of λ."""
    (T, batch, features), units = tf.unstack(tf.shape(x)), tf.shape(W)[0]
    backward = _simple_backward(g, s, mask, dropout, W, activation)
    most = loops.examples_of_a_simple_chunk(features, units)
    steps = loops.steps_of_a_chunk(T, batch, most)

    def through_chunk(start, own, from_later, dU_W):
        from_later, δ, λ = backward(start, steps, own, from_later)
        s_before = tf.reshape(some_of(s, start, steps), [steps, batch, units])
        x_s = tf.concat([some_of(x, start, steps), _dropped(s_before, dropout)], axis=2)
        dU_W += _sum_of_products(x_s, tf.reshape(δ, [-1, units]), dU_W.dtype)
        return from_later, _observed(tf.reshape(λ, [steps, batch, units]), observed), dU_W

    ds_0, of_λ, dU_W = loops.back_by_chunks(
        T,
        steps,
        through_chunk,
        _kinds_observed(observed, s),
        at_end,
        _zeros([features + units, units], s),
    )
    dweights = tf.split(tf.cast(dU_W, s.dtype), [features, units])
    return dweights, tf.reshape(ds_0, [batch, units]), of_λ


@compiled
def _simple_input_gradient(g, at_end, s, x, mask, dropout, U, W, activation):
    """∂L/∂x, by step."""
    backward, T = _simple_backward(g, s, mask, dropout, W, activation), tf.shape(x)[0]
    _, δ, _ = backward(0, T, T, at_end)
    return tf.reshape(tf.reshape(δ, [-1, tf.shape(W)[0]]) @ tf.transpose(U), tf.shape(x))


def _simple_backward(g, s, mask, dropout, W, activation):
    """The loop over a chunk's own steps: to what goes on to earlier ones, δ, and λ.

    δ and λ of all steps of the chunk: 0 of those that are not its own. XLA leaves λ out where it is
    not read.
    """
    derivative, W_T, units = DERIVATIVE_AT_OUTPUT[activation], tf.transpose(W), tf.shape(W)[0]

    def backward(start, steps, own, from_later):
        upstream = _upstream(g, start, steps)

        def back(t, from_later):
            λ_t = loops.plus_upstream(upstream, t, from_later)
            δ_t = derivative(s[start + t + 1]) * λ_t
            to_earlier = flat(_dropped(tf.reshape(δ_t, [-1, units]) @ W_T, dropout))
            if mask is not None:
                taken = tf.repeat(mask[start + t], units)
                δ_t = tf.where(taken, δ_t, tf.zeros_like(δ_t))
                to_earlier = tf.where(taken, to_earlier, λ_t)
            return to_earlier, δ_t, λ_t

        return loops.back_through_steps(
            steps, own, back, from_later, 2, loops.SIMPLE_STEPS_OF_A_ROUND
        )

    return backward


@compiled
def _gated_gradients(g, at_end, s, x, mask, kernels, activation, observed):
    """∂L/∂K of each kernel; ∂L/∂s_0; what is observed of λ."""
    (T, batch, features), units = tf.unstack(tf.shape(x)), tf.shape(kernels[0])[1]
    backward = _gated_backward(g, s, x, mask, kernels, activation)
    steps = loops.steps_of_a_chunk(T, batch * units, loops.GATES_NUMBERS)

    def through_chunk(start, own, from_later, *dkernels):
        from_later, κ, _, λ = backward(start, steps, own, from_later)
        x_of_chunk = some_of(x, start, steps)
        dkernels = [
            dkernel + _sum_of_products(x_of_chunk, κ_of_kernel, dkernel.dtype)
            for dkernel, κ_of_kernel in zip(dkernels, κ, strict=True)
        ]
        of_λ = _observed(tf.reshape(λ, [steps, batch, units]), observed)
        return from_later, of_λ, *dkernels

    sums = [_zeros([features, units], s) for _ in kernels]
    ds_0, of_λ, *sums = loops.back_by_chunks(
        T, steps, through_chunk, _kinds_observed(observed, s), at_end, *sums
    )
    dkernels = [tf.cast(dkernel, s.dtype) for dkernel in sums]
    return dkernels, tf.reshape(ds_0, [batch, units]), of_λ


@compiled
def _gated_input_gradient(g, at_end, s, x, mask, kernels, activation):
    """∂L/∂x, by step."""
    (T, batch, features), units = tf.unstack(tf.shape(x)), tf.shape(kernels[0])[1]
    backward = _gated_backward(g, s, x, mask, kernels, activation)
    steps = loops.steps_of_a_chunk(T, batch * units, loops.GATES_NUMBERS)

    def through_chunk(start, own, from_later):
        from_later, κ, dc, _ = backward(start, steps, own, from_later)
        dx = tf.add_n([κ @ tf.transpose(K) for κ, K in zip(κ, kernels, strict=True)])
        if len(kernels) == 2:
            dx += tf.pad(dc, [[0, 0], [0, features - units]])
        return from_later, [tf.reshape(dx, [steps, batch, features])]

    _, (dx,) = loops.back_by_chunks(T, steps, through_chunk, [(s.dtype, 3)], at_end)
    return dx


def _gated_backward(g, s, x, mask, kernels, activation):
    """The loop over a chunk's own steps: to what goes on to earlier ones, κ, ∂L/∂c, and λ.

    κ of each kernel, and ∂L/∂c, of all steps of the chunk, as rows, and λ: 0 of those not its own.
    """
    derivative, units = DERIVATIVE_AT_OUTPUT[activation], tf.shape(kernels[0])[1]

    def backward(start, steps, own, from_later):
        f, i, c = _gates(some_of(x, start, steps), kernels)
        slope = derivative(some_of(s, start + 1, steps))
        to_earlier = f * slope
        if mask is not None:
            taken = tf.repeat(some_of(mask, start, steps), units, axis=1)
            slope = tf.where(taken, slope, tf.zeros_like(slope))
            to_earlier = tf.where(taken, to_earlier, tf.ones_like(slope))

        from_later, λ = loops.back_through_elementwise_steps(
            own, to_earlier, _upstream(g, start, steps), from_later
        )
        δ = slope * λ
        dc = δ * i
        κ = [δ * some_of(s, start, steps) * f * (1 - f), dc * c * (1 - i), dc][: len(kernels)]
        *κ, dc = (tf.reshape(array, [-1, units]) for array in (*κ, dc))
        return from_later, κ, dc, λ

    return backward


def _upstream(g, start, steps):
    """g of some steps, (steps, numbers of a step), or None."""
    if g is None:
        return None
    # Time comes first only here, in a chunk: of all steps it would be one more array of their size.
    return tf.reshape(swap(some_of(g, start, steps, axis=1)), [steps, -1])


# What is observed of λ, as `with_explicit_gradient` says: λ itself, its norms, both, or nothing.


def _observed(λ, observed):
    """Of λ of some steps, (steps, examples, units)."""
    with_λ, with_norms = observed
    return [λ] * with_λ + [summed_norms(λ)] * with_norms


def _kinds_observed(observed, s):
    """The dtype and rank of each of these."""
    with_λ, with_norms = observed
    return [(s.dtype, 3)] * with_λ + [(tf.float64, 1)] * with_norms


def _zeros(shape, like):
    # In 16 bits a sum over many chunks would lose what a single product keeps.
    return tf.zeros(shape, tf.float32 if like.dtype.size < 4 else like.dtype)


def _sum_of_products(a, b, dtype):
    """Σ_t a_t b_tᵀ, over the examples too."""
    return tf.cast(tf.matmul(rows(a), rows(b), transpose_a=True), dtype)


def _dropped(s, dropout):
    return s if dropout is None else s * dropout
