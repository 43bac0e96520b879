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
are compiled by XLA, and each pass is over one long row, the numbers of every unit of every example,
as vector instructions need. What nobody asks for is not computed: outputs before the last, a λ that
is kept, and ∂L/∂x, which takes a walk back of its own. And the examples of a batch do not meet
before their gradients are summed: two cores take half of them each. λ, the quantity that vanishes
or explodes, is there for the taking: `on_state_gradients` receives it, and `on_state_norms` its
norms, which are taken chunk by chunk, so that λ need not be kept for them.

A GPU waits for each launch of an operation, and not for its cache: there all steps are one chunk,
and a round of the loop takes several steps. Where what is handed on depends linearly on what came,
which is s_t with a linear Φ and λ_t of every gated recurrence, no loop over the steps is left: all
are taken at once, in log_2 T passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

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

    return _explicit(
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

    return _explicit(
        (states, gradients, input_gradient),
        (x, initial_state, mask, None),
        kernels,
        biases is not None,
        return_sequences,
        (on_state_gradients, on_state_norms),
    )


# Compiled apart from the model around them: under XLA these loops write their results in place,
# which the same loops in a plain graph do not. (Of a tensor's argument that has a Greek name,
# TensorFlow warns.) In all of them time comes first, and the numbers of a step, those of every unit
# of every example, are one row: a pass over many short rows XLA vectorizes badly or not at all.
_compiled = tf.function(jit_compile=True, reduce_retracing=True, autograph=False)


@_compiled
def _by_example(shares, s_0):
    """(batch, timesteps, units), from s_0 to s_T of each share of the batch."""
    units = tf.shape(s_0)[1]
    shares = [tf.reshape(s[1:], [tf.shape(s)[0] - 1, -1, units]) for s in shares]
    return _swap(tf.concat(shares, axis=1))


# Forward, from x batch first


@_compiled
def _simple_states(x, s_0, mask, dropout, U, W, activation, with_bias):
    """x by step, and s_0 to s_T."""
    x = _by_step(x, with_bias)
    U_W = tf.concat([U, W], axis=0)

    def of_inputs(x):
        return [tf.reshape(_rows(x) @ U, [tf.shape(x)[0], -1])] if _on_gpu() else [x]

    def step(s, of_input):
        s = _dropped(tf.reshape(s, tf.shape(s_0)), dropout)
        if _on_gpu():  # A launch less at a step.
            return activation(of_input + _flat(s @ W))
        return activation(_flat(tf.concat([of_input, s], axis=1) @ U_W))

    return x, _states(x, s_0, mask, of_inputs, step)


@_compiled
def _gated_states(x, s_0, mask, kernels, activation, with_bias):
    """x by step, and s_0 to s_T."""
    x = _by_step(x, with_bias)

    def of_inputs(x):
        f, i, c = _gates(x, kernels)
        return [f, i * c]

    def step(s, f, z):
        return activation(f * s + z)

    if _on_gpu() and activation is keras.activations.linear:
        f, z = of_inputs(x)
        if mask is not None:
            taken = tf.repeat(mask, tf.shape(s_0)[1], axis=1)
            f, z = tf.where(taken, f, tf.ones_like(f)), tf.where(taken, z, tf.zeros_like(z))
        return x, _scan(f, z, _flat(s_0))
    return x, _states(x, s_0, mask, of_inputs, step)


def _by_step(x, with_bias):
    """(timesteps, batch, features); with a bias, 1 is the last feature."""
    x = _swap(x)
    return tf.pad(x, [[0, 0], [0, 0], [0, 1]], constant_values=1) if with_bias else x


def _gates(x, kernels):
    """f, i and c of some steps, each (steps, numbers of a step)."""
    K_f, K_i, *K_c = kernels
    steps, units = tf.shape(x)[0], tf.shape(K_f)[1]

    def product(K):
        return tf.reshape(_rows(x) @ K, [steps, -1])

    c = product(K_c[0]) if K_c else tf.reshape(x[..., :units], [steps, -1])
    return tf.sigmoid(product(K_f)), tf.sigmoid(product(K_i)), c


def _states(x, s_0, mask, of_inputs, step):
    """The forward loop: s_0 to s_T.

    Args:
        of_inputs: from x of some steps to a list of arrays, which hold what these steps need.
        step: from s_{t-1} and what step t needs to s_t.
    """
    T, units = tf.shape(x)[0], tf.shape(s_0)[1]

    def after(s, t, needed, row):
        s_t = step(s, *(array[row] for array in needed))
        return s_t if mask is None else tf.where(tf.repeat(mask[t], units), s_t, s)

    if _on_gpu():
        needed = of_inputs(x)
        _, s = _in_rounds(T, lambda t, s: [after(s, t, needed, t)] * 2, _flat(s_0), 1)
        return tf.concat([_flat(s_0)[tf.newaxis], s], axis=0)
    steps = _steps_of_a_chunk(T, tf.size(s_0), GATES_NUMBERS)

    def through_chunk(chunk, states):
        # The last chunk is as long as the others, and begins within the one before.
        start = tf.minimum(chunk * steps, T - steps)
        needed = of_inputs(_slice(x, start, steps))

        def body(t, states):
            s = states.read(start + t)
            return t + 1, states.write(start + t + 1, after(s, start + t, needed, t))

        return chunk + 1, tf.while_loop(lambda t, _: t < steps, body, (0, states))[1]

    chunks = _chunks(T, steps)
    states = _steps(T + 1, s_0).write(0, _flat(s_0))
    return tf.while_loop(lambda chunk, _: chunk < chunks, through_chunk, (0, states))[1].stack()


# Backward. What the outputs alone pass to the states: g_1 to g_T, batch first, or None where only
# the last state is an output, and what the loop starts from, 0 or ∂L/∂s_T.


@_compiled
def _simple_gradients(g, at_end, s, x, mask, dropout, W, activation, observed):
    """∂L/∂U and ∂L/∂W; ∂L/∂s_0; what is observed of λ."""
    (T, batch, features), units = tf.unstack(tf.shape(x)), tf.shape(W)[0]
    backward = _simple_backward(g, s, mask, dropout, W, activation)
    steps = _steps_of_a_chunk(T, batch, _examples_of_a_simple_chunk(features, units))

    def through_chunk(chunk, start, own, from_later, arrays, dU_W):
        from_later, δ, λ = backward(start, steps, own, from_later)
        λ = tf.reshape(λ, [steps, batch, units])
        arrays = _with_chunk(arrays, chunk, own, _observed(λ, observed))
        s_before = tf.reshape(_slice(s, start, steps), [steps, batch, units])
        x_s = tf.concat([_slice(x, start, steps), _dropped(s_before, dropout)], axis=2)
        dU_W += _sum_of_products(x_s, tf.reshape(δ, [-1, units]), dU_W.dtype)
        return from_later, arrays, dU_W

    arrays = _arrays_by_chunk(_chunks(T, steps), _kinds_observed(observed, s))
    dU_W = _zeros([features + units, units], s)
    ds_0, arrays, dU_W = _by_chunks(T, steps, through_chunk, at_end, arrays, dU_W)
    dweights = tf.split(tf.cast(dU_W, s.dtype), [features, units])
    return dweights, tf.reshape(ds_0, [batch, units]), [_of_steps(array, T) for array in arrays]


@_compiled
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
            λ_t = _plus_upstream(upstream, t, from_later)
            δ_t = derivative(s[start + t + 1]) * λ_t
            to_earlier = _flat(_dropped(tf.reshape(δ_t, [-1, units]) @ W_T, dropout))
            if mask is not None:
                taken = tf.repeat(mask[start + t], units)
                δ_t = tf.where(taken, δ_t, tf.zeros_like(δ_t))
                to_earlier = tf.where(taken, to_earlier, λ_t)
            return to_earlier, δ_t, λ_t

        return _through_steps(own, back, from_later, [_steps(steps, s), _steps(steps, s)])

    return backward


@_compiled
def _gated_gradients(g, at_end, s, x, mask, kernels, activation, observed):
    """∂L/∂K of each kernel; ∂L/∂s_0; what is observed of λ."""
    (T, batch, features), units = tf.unstack(tf.shape(x)), tf.shape(kernels[0])[1]
    backward = _gated_backward(g, s, x, mask, kernels, activation)
    steps = _steps_of_a_chunk(T, batch * units, GATES_NUMBERS)

    def through_chunk(chunk, start, own, from_later, arrays, *dkernels):
        from_later, κ, _, λ = backward(start, steps, own, from_later)
        λ = tf.reshape(λ, [steps, batch, units])
        arrays = _with_chunk(arrays, chunk, own, _observed(λ, observed))
        x_of_chunk = _slice(x, start, steps)
        dkernels = [
            dkernel + _sum_of_products(x_of_chunk, κ_of_kernel, dkernel.dtype)
            for dkernel, κ_of_kernel in zip(dkernels, κ, strict=True)
        ]
        return from_later, arrays, *dkernels

    arrays = _arrays_by_chunk(_chunks(T, steps), _kinds_observed(observed, s))
    sums = [_zeros([features, units], s) for _ in kernels]
    ds_0, arrays, *sums = _by_chunks(T, steps, through_chunk, at_end, arrays, *sums)
    dkernels = [tf.cast(dkernel, s.dtype) for dkernel in sums]
    return dkernels, tf.reshape(ds_0, [batch, units]), [_of_steps(array, T) for array in arrays]


@_compiled
def _gated_input_gradient(g, at_end, s, x, mask, kernels, activation):
    """∂L/∂x, by step."""
    (T, batch, features), units = tf.unstack(tf.shape(x)), tf.shape(kernels[0])[1]
    backward = _gated_backward(g, s, x, mask, kernels, activation)
    steps = _steps_of_a_chunk(T, batch * units, GATES_NUMBERS)

    def through_chunk(chunk, start, own, from_later, arrays):
        from_later, κ, dc, _ = backward(start, steps, own, from_later)
        dx = tf.add_n([κ @ tf.transpose(K) for κ, K in zip(κ, kernels, strict=True)])
        if len(kernels) == 2:
            dx += tf.pad(dc, [[0, 0], [0, features - units]])
        dx = tf.reshape(dx, [steps, batch, features])
        return from_later, _with_chunk(arrays, chunk, own, [dx])

    arrays = _arrays_by_chunk(_chunks(T, steps), [(s.dtype, 3)])
    _, (dx,) = _by_chunks(T, steps, through_chunk, at_end, arrays)
    return _of_steps(dx, T)


def _gated_backward(g, s, x, mask, kernels, activation):
    """The loop over a chunk's own steps: to what goes on to earlier ones, κ, ∂L/∂c, and λ.

    κ of each kernel, and ∂L/∂c, of all steps of the chunk, as rows, and λ: 0 of those not its own.
    """
    derivative, units = DERIVATIVE_AT_OUTPUT[activation], tf.shape(kernels[0])[1]

    def backward(start, steps, own, from_later):
        f, i, c = _gates(_slice(x, start, steps), kernels)
        slope = derivative(_slice(s, start + 1, steps))
        to_earlier = f * slope
        if mask is not None:
            taken = tf.repeat(_slice(mask, start, steps), units, axis=1)
            slope = tf.where(taken, slope, tf.zeros_like(slope))
            to_earlier = tf.where(taken, to_earlier, tf.ones_like(slope))

        from_later, λ = _through_elementwise_steps(
            own, to_earlier, _upstream(g, start, steps), from_later, _steps(steps, s)
        )
        δ = slope * λ
        dc = δ * i
        κ = [δ * _slice(s, start, steps) * f * (1 - f), dc * c * (1 - i), dc][: len(kernels)]
        *κ, dc = (tf.reshape(array, [-1, units]) for array in (*κ, dc))
        return from_later, κ, dc, λ

    return backward


def _upstream(g, start, steps):
    """g of some steps, (steps, numbers of a step), or None."""
    if g is None:
        return None
    # Time comes first only here, in a chunk: of all steps it would be one more array of their size.
    return tf.reshape(_swap(_slice(g, start, steps, axis=1)), [steps, -1])


def _plus_upstream(upstream, t, from_later):
    """λ_t."""
    return from_later if upstream is None else upstream[t] + from_later


# What is observed of λ, as `_explicit` says: λ itself, its norms, both, or nothing.


def _observed(λ, observed):
    """Of λ of some steps, (steps, examples, units)."""
    with_λ, with_norms = observed
    return [λ] * with_λ + [summed_norms(λ)] * with_norms


def _kinds_observed(observed, s):
    """The dtype and rank of each of these."""
    with_λ, with_norms = observed
    return [(s.dtype, 3)] * with_λ + [(tf.float64, 1)] * with_norms


# By chunks of steps


# How large a chunk is at the most, as measured. With gates, so many numbers of each array: a core's
# cache (1 MB) has to hold some ten of them. For the simple recurrence's sums, so many examples of
# steps.
GATES_NUMBERS, SIMPLE_EXAMPLES = 2**14, 2**8
# A product of more multiplications TensorFlow cuts in two, for the other core, which has its own
# share to do.
UNCUT_MULTIPLICATIONS = 1_400_000


def _examples_of_a_simple_chunk(features, units):
    """How many examples of steps are summed up at once."""
    uncut = UNCUT_MULTIPLICATIONS // ((features + units) * units)
    # With so large weights that fewer are left, small products cost more than cut ones.
    return tf.minimum(tf.where(uncut < 32, SIMPLE_EXAMPLES, uncut), SIMPLE_EXAMPLES)


def _steps_of_a_chunk(T, step, most):
    """How many of T steps, where one is so large, and a chunk may be so large."""
    return T if _on_gpu() else tf.clip_by_value(most // tf.maximum(1, step), 1, T)


def _chunks(T, steps):
    """How many chunks of so many steps T steps are, the one that is not full among them."""
    return (T - 1) // steps + 1


def _by_chunks(T, steps, through_chunk, *carried):
    """From the last chunk to the first: through_chunk(chunk, start, own, *carried) is carried on.

    All chunks have as many steps, so that they are compiled once; of the first one's only so many
    are its own, and the others, at its end, belong to the second.
    """
    if _on_gpu():
        return through_chunk(0, 0, T, *carried)
    chunks = _chunks(T, steps)

    def body(chunk, *carried):
        end = T - (chunks - 1 - chunk) * steps
        start = tf.maximum(end - steps, 0)
        return through_chunk(chunk, start, end - start, *carried)

    return _from_last(chunks, body, *carried)


def _arrays_by_chunk(chunks, kinds):
    """An array for each (dtype, rank) of what a chunk's steps give, which a compiled loop fills."""
    return [tf.TensorArray(dtype, chunks, element_shape=[None] * rank) for dtype, rank in kinds]


def _with_chunk(arrays, chunk, own, values):
    """The arrays with the values of a chunk's steps, of which so many are its own."""
    # Its own last, so that those of all chunks follow each other.
    return [
        array.write(chunk, tf.roll(of_steps, tf.shape(of_steps)[0] - own, axis=0))
        for array, of_steps in zip(arrays, values, strict=True)
    ]


def _of_steps(array, T):
    """What such an array holds, of the T steps."""
    values = array.stack()
    return tf.reshape(values, [-1, *tf.unstack(tf.shape(values))[2:]])[-T:]


def _from_last(count, body, *carried):
    """carried = body(t, *carried) for t from count - 1 to 0."""

    def body_of_loop(t, *carried):
        after = body(t, *carried)
        # Where one trace serves layers of several sizes, TensorFlow loses shapes on the way.
        for old, new in zip(tf.nest.flatten(carried), tf.nest.flatten(after), strict=True):
            if isinstance(new, tf.Tensor):
                new.set_shape(old.shape)
        return t - 1, *after

    return tf.while_loop(lambda t, *_: t >= 0, body_of_loop, (count - 1, *carried))[1:]


def _through_steps(own, back, from_later, arrays):
    """The loop over a chunk's own steps: to what goes on to earlier ones, and the arrays filled.

    Args:
        back: from t and what comes from later steps to what goes on, and step t of each array.
    """
    if _on_gpu():
        from_later, *backwards = _in_rounds(
            own, lambda t, from_later: back(own - 1 - t, from_later), from_later, len(arrays)
        )
        return from_later, *(tf.reverse(array, [0]) for array in backwards)

    def body(t, from_later, *arrays):
        from_later, *of_step = back(t, from_later)
        written = (array.write(t, value) for array, value in zip(arrays, of_step, strict=True))
        return from_later, *written

    from_later, *arrays = _from_last(own, body, from_later, *arrays)
    return from_later, *(array.stack() for array in arrays)


def _through_elementwise_steps(own, to_earlier, upstream, from_later, array):
    """As `_through_steps`, of λ alone, where step t hands on to_earlier_t ⊙ λ_t."""
    if _on_gpu():
        # λ_t = g_t + to_earlier_{t+1} ⊙ λ_{t+1}, from the last step, which has from_later.
        a = tf.concat([to_earlier[1:], tf.ones_like(to_earlier[:1])], axis=0)
        b = tf.zeros_like(a) if upstream is None else upstream
        backwards = _scan(tf.reverse(a, [0]), tf.reverse(b, [0]), from_later)
        λ = tf.reverse(backwards[1:], [0])
        return to_earlier[0] * λ[0], λ

    def back(t, from_later):
        λ_t = _plus_upstream(upstream, t, from_later)
        return to_earlier[t] * λ_t, λ_t

    return _through_steps(own, back, from_later, [array])


# On a GPU


# With more a step is faster, but the first one, which compiles, slower: 4 and 64 were measured.
STEPS_OF_A_ROUND = 16


def _in_rounds(T, step, carried, count_given):
    """carried after T steps, and arrays of what the steps give: carried, *given = step(t, carried).

    Several steps are a round, which writes what they give at once, and the rest are rounds of one.
    XLA counts all rounds beforehand, upwards as they go, and so need not ask the host after each.

    Args:
        T: how many steps.
        step: from t, from 0 to T - 1, and what is carried, to what is carried and what is given.
        carried: one array of one axis; those given have its dtype, and one axis each.
        count_given: how many are given.
    """

    def rounds(first, count, steps, carried):
        def round_(n, carried, *arrays):
            shape, given = carried.shape, []
            for t in range(steps):
                carried, *of_step = step(first + n * steps + t, carried)
                given.append(of_step)
            carried.set_shape(shape)
            of_round = (tf.stack(of_step) for of_step in zip(*given, strict=True))
            written = (array.write(n, of) for array, of in zip(arrays, of_round, strict=True))
            return n + 1, carried, *written

        # XLA does not compile what writes to an array of no rounds.
        arrays = [
            tf.TensorArray(carried.dtype, tf.maximum(count, 1), element_shape=[steps, None])
            for _ in range(count_given)
        ]
        loop = tf.while_loop(lambda n, *_: n < count, round_, (0, carried, *arrays))
        return loop[1], [_rows(array.stack())[: count * steps] for array in loop[2:]]

    whole = T // STEPS_OF_A_ROUND
    carried, given = rounds(0, whole, STEPS_OF_A_ROUND, carried)
    carried, rest = rounds(whole * STEPS_OF_A_ROUND, T % STEPS_OF_A_ROUND, 1, carried)
    return carried, *(tf.concat(parts, axis=0) for parts in zip(given, rest, strict=True))


def _scan(a, b, s_0):
    """s_0 to s_T of s_t = a_t ⊙ s_{t-1} + b_t, all steps at once (Kogge and Stone 1973).

    Each pass doubles how many steps back s_t reaches; a_t is the product of their factors. None
    divides: the factors of closed gates may be 0.
    """
    T = tf.shape(a)[0]
    t = tf.range(T)

    def twice(reach, a, s):
        def before(array):
            earlier = tf.gather(array, tf.maximum(t - reach, 0))
            return tf.where(t[:, tf.newaxis] < reach, tf.zeros_like(array), earlier)

        return 2 * reach, a * before(a), s + a * before(s)

    s = tf.concat([a[:1] * s_0 + b[:1], b[1:]], axis=0)
    s = tf.while_loop(lambda reach, *_: reach < T, twice, (1, a, s))[2]
    return tf.concat([s_0[tf.newaxis], s], axis=0)


def _steps(T, like):
    """An array for T steps, which a compiled loop fills in place; 0 where it does not."""
    return tf.TensorArray(like.dtype, T, element_shape=[None], clear_after_read=False)


def _slice(array, start, steps, axis=0):
    # Unlike array[start : start + steps], of a size that XLA can tell.
    size = tf.unstack(tf.shape(array))
    begin = [0] * len(size)
    begin[axis], size[axis] = start, steps
    return tf.slice(array, begin, size)


def _flat(array):
    return tf.reshape(array, [-1])


def _rows(array):
    """An array of vectors as a matrix of their rows."""
    # Not array.shape[-1]: it is None once one trace serves layers of different sizes.
    return tf.reshape(array, [-1, tf.shape(array)[-1]])


def _swap(array):
    return tf.transpose(array, [1, 0, 2])


def _zeros(shape, like):
    # In 16 bits a sum over many chunks would lose what a single product keeps.
    return tf.zeros(shape, tf.float32 if like.dtype.size < 4 else like.dtype)


def _sum_of_products(a, b, dtype):
    """Σ_t a_t b_tᵀ, over the examples too."""
    return tf.cast(tf.matmul(_rows(a), _rows(b), transpose_a=True), dtype)


def _dropped(s, dropout):
    return s if dropout is None else s * dropout


# As TensorFlow is to see it


def _with_biases(kernels, biases):
    """The kernels with the weights of the constant input 1; those of a last one are 0."""
    biases = _tensors(biases)
    biases += [tf.zeros_like(biases[0])] * (len(kernels) - len(biases))
    return [
        tf.concat([kernel, bias[tf.newaxis]], axis=0)
        for kernel, bias in zip(_tensors(kernels), biases, strict=True)
    ]


def _tensors(values):
    # A custom gradient keeps a variable as it is, and would read it in the backward pass, when a
    # stateful layer has already put the new state there.
    return [tf.convert_to_tensor(value) for value in values]


def _explicit(functions, examples, weights, with_bias, return_sequences, observers):
    """The recurrence whose compiled functions are given, as TensorFlow is to see it.

    Args:
        functions: for a share of the examples, time first but in g, and in what goes into states:
            states(x, s_0, mask, dropout, *weights, with_bias=) is x by step, and s_0 to s_T;
            gradients((g, at_end), s, x, mask, dropout, *weights, observed=) is [∂L/∂weight of
            each]; ∂L/∂s_0; and a list of what is observed, where the pair `observed` says True:
            λ_1 to λ_T, (timesteps, examples, units), and the sums over the examples of their norms,
            (timesteps,);
            input_gradient((g, at_end), s, x, mask, dropout, *weights) is ∂L/∂x.
        examples: x, s_0, and the two masks or None; batch first.
        weights: the kernels' last feature is the bias, if with_bias.
        return_sequences: as in `simple_recurrence`.
        observers: its on_state_gradients and on_state_norms.
    """
    states, gradients, input_gradient = functions
    x, s_0, *masks = examples
    x, s_0, *weights = _tensors([x, s_0, *weights])
    batch, timesteps, _ = x.shape
    units = s_0.shape[1]
    on_state_gradients, on_state_norms = observers
    observed = on_state_gradients is not None, on_state_norms is not None

    def of_share(x, s_0, mask, dropout, weights):
        """The states of a share of the batch, and the function from g of its outputs to others."""
        tensors = [x, s_0, *weights]
        x, s_0, *weights = _constants(tensors)
        masks = None if mask is None else tf.transpose(mask), dropout
        x, s = states(x, s_0, *masks, *weights, with_bias=with_bias)

        def gradient(g):
            (constant_g,) = _constants([g])
            if return_sequences:
                upstream = constant_g, tf.zeros_like(s[0])
            else:
                upstream = None, _flat(constant_g)
            arguments = upstream, s, x, *masks, *weights
            dweights, ds_0, of_λ = _differentiable_once(
                lambda: gradients(*arguments, observed=observed), [g, *tensors]
            )
            # A function of its own: TensorFlow leaves it out where nobody asks for ∂L/∂x.
            dx = _swap(_differentiable_once(lambda: input_gradient(*arguments), [g, *tensors]))
            return dx[..., :-1] if with_bias else dx, ds_0, dweights, of_λ

        return s, gradient

    @tf.custom_gradient
    def recurrence(x, s_0, *weights):
        shares = [of_share(*share, weights) for share in _shares(s_0, x, s_0, *masks)]
        states = [s for s, _ in shares]
        if return_sequences:
            outputs = _by_example(states, *_constants([s_0]))
        else:
            outputs = tf.concat([tf.reshape(s[-1], [-1, units]) for s in states], axis=0)

        def gradient(g):
            parts = [
                gradient(g) for (g,), (_, gradient) in zip(_shares(s_0, g), shares, strict=True)
            ]
            dx, ds_0, dweights, of_λ = zip(*parts, strict=True)
            if on_state_gradients is not None:
                on_state_gradients([_of_shape(λ, [timesteps, None, units]) for λ, *_ in of_λ])
            if on_state_norms is not None:
                norms = tf.add_n([norms for *_, norms in of_λ]) / tf.cast(
                    tf.shape(s_0)[0], tf.float64
                )
                on_state_norms(_of_shape(norms, [timesteps]))
            dweights = [tf.add_n(parts) for parts in zip(*dweights, strict=True)]
            inputs, dinputs = [x, s_0, *weights], [tf.concat(dx, 0), tf.concat(ds_0, 0), *dweights]
            return [_of_shape(d, input.shape) for d, input in zip(dinputs, inputs, strict=True)]

        shape = [batch, timesteps, units] if return_sequences else [batch, units]
        return _of_shape(outputs, shape), gradient

    return recurrence(x, s_0, *weights)


def _of_shape(tensor, shape):
    # One trace of a compiled function serves layers of different sizes, and does not know this
    # one's.
    tensor.set_shape(shape)
    return tensor


def _shares(s_0, *arrays):
    """The arrays, cut along the batch into the shares that run side by side."""
    batch, units = s_0.shape
    if not _worth_sharing(batch, units):
        return [arrays]
    half = (tf.shape(s_0)[0] if batch is None else batch) // 2
    return [
        [None if array is None else array[share] for array in arrays]
        for share in (slice(None, half), slice(half, None))
    ]


def _worth_sharing(batch, units):
    # As measured on two cores: of smaller layers, both halves take as long as the whole. Not by the
    # number of cores: a training gives the same numbers on one core as on two.
    large = units >= 32 and (batch is None or batch >= 32)
    return large and not _on_gpu()


def _on_gpu():
    return bool(tf.config.list_logical_devices("GPU"))


def _constants(tensors):
    # An eager tape would otherwise record the compiled loop itself and ask XLA for a list of its
    # intermediate tensors, which it cannot hand out.
    return [tf.stop_gradient(tensor) for tensor in tensors]


def _differentiable_once(function, tensors):
    """function(), with an error where a second derivative would come out wrong.

    That is, where somebody asks for the derivative of its result by one of the tensors.
    """

    @tf.custom_gradient
    def guarded(*_):
        def second_derivative(*_):
            raise ValueError(
                "kerasgrad's recurrent layers are differentiable once, and a second derivative "
                "(a gradient penalty, a Hessian) or a forward-mode one was asked for. Use "
                "keras.layers.SimpleRNN, or keras.layers.RNN around the kerasgrad cell, in this "
                "model: both take the same weights."
            )

        return function(), second_derivative

    return guarded(*tensors)
