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
cheaper to compute again than to keep. A step is one matrix product, [x_t, s_{t-1}] times U and W
stacked, and one pass over its result, which goes in place into one array of all steps: the loops
are compiled by XLA. The weights' gradients of the simple recurrence, sums over steps, wait until
after the loop and are one product. The gated recurrence goes back by chunks of steps that a core's
cache holds. As A_t is diagonal, its loop over single steps is λ_{t-1} = g_{t-1} + f_t Φ'(a_t) λ_t
and nothing else; the gates before it, and κ and its share of ∂L/∂K after it, are each one pass or
one product over the whole chunk, and no κ outlives its chunk. What nobody asks for is not computed:
outputs before the last, ∂L/∂x, and the simple recurrence's λ. And the examples of a batch do not
meet before their gradients are summed: two cores take half of them each. λ, the quantity that
vanishes or explodes, is there for the taking: `on_state_gradients` receives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

# Φ' as a function of the output s = Φ(a): what lets the backward pass forget a.
DERIVATIVE_AT_OUTPUT = {
    keras.activations.linear: tf.ones_like,
    keras.activations.tanh: lambda s: 1 - s * s,
    keras.activations.sigmoid: lambda s: s * (1 - s),
    keras.activations.relu: lambda s: tf.cast(s > 0, s.dtype),
}

StateGradients = Callable[[Sequence[tf.Tensor]], None]


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

    Returns:
        (batch, timesteps, units), the states s_1 to s_T; or (batch, units), s_T.
    """
    x, initial_state, kernel, recurrent_kernel = _tensors(
        x, initial_state, kernel, recurrent_kernel
    )
    if bias is not None:
        x, kernel = _with_bias(x, kernel, tf.convert_to_tensor(bias))

    def states(x, s_0, mask, dropout, U, W):
        return _simple_states(x, s_0, mask, dropout, U, W, activation)

    def gradients(g, s, x, s_0, mask, dropout, U, W):
        δ, ds_0, *λ = _differentiable_once(
            lambda g, s, x, s_0, U, W: _simple_gradients(
                g, return_sequences, s, mask, dropout, W, activation, on_state_gradients is not None
            )
        )(g, s, x, s_0, U, W)
        dx = _swap(tf.tensordot(δ, U, axes=[2, 1]))
        dU = _sum_of_products(_swap(x), δ)
        dW = _sum_of_products(_dropped(s[:-1], dropout), δ)
        return dx, ds_0, [dU, dW], λ

    return _explicit(
        states,
        gradients,
        (x, initial_state, mask, recurrent_dropout_mask),
        (kernel, recurrent_kernel),
        return_sequences,
        on_state_gradients,
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
) -> tf.Tensor:
    """States of s_t = Φ(f_t ⊙ s_{t-1} + i_t ⊙ c_t), differentiable once, by explicit BPTT.

    Args:
        x: (batch, timesteps, features).
        initial_state: (batch, units), s_0.
        kernels: K_f and K_i of the gates f_t = σ(x_t K_f + b_f) and i_t = σ(x_t K_i + b_i), and
            K_c where c_t = x_t K_c; without it c_t = x_t. Each (features, units).
        biases: b_f and b_i, each (units,), or None.
        activation, mask, return_sequences, on_state_gradients: as in `simple_recurrence`.

    Returns:
        (batch, timesteps, units), the states s_1 to s_T; or (batch, units), s_T.
    """
    projected = len(kernels) == 3
    x, initial_state, *kernels = _tensors(x, initial_state, *kernels)
    kernel = tf.concat(kernels, axis=1)
    if biases is not None:
        biases = _tensors(*biases)
        of_candidate = [tf.zeros_like(biases[0])] if projected else []
        x, kernel = _with_bias(x, kernel, tf.concat(biases + of_candidate, axis=0))

    def states(x, s_0, mask, _, K):
        return _gated_states(x, s_0, mask, K, activation, projected)

    def gradients(g, s, x, s_0, mask, _, K):
        dK, ds_0, λ = _differentiable_once(
            lambda g, s, x, s_0, K: _gated_gradients(
                g, return_sequences, s, x, mask, K, activation, projected
            )
        )(g, s, x, s_0, K)
        # A function of its own: TensorFlow leaves it out where nobody asks for ∂L/∂x.
        dx = _differentiable_once(
            lambda λ, s, x, K: _gated_input_gradient(λ, s, x, mask, K, activation, projected)
        )(λ, s, x, K)
        return dx, ds_0, [dK], [λ]

    return _explicit(
        states,
        gradients,
        (x, initial_state, mask, None),
        (kernel,),
        return_sequences,
        on_state_gradients,
    )


# Compiled apart from the model around them: under XLA these loops write their results in place,
# which the same loops in a plain graph do not. (Of a tensor's argument that has a Greek name,
# TensorFlow warns.)
_compiled = tf.function(jit_compile=True, reduce_retracing=True, autograph=False)


@_compiled
def _simple_states(x, s_0, mask, dropout, U, W, activation):
    """s_0 to s_T."""
    U_W = tf.concat([U, W], axis=0)

    def step(x_t, s):
        return activation(tf.concat([x_t, _dropped(s, dropout)], axis=1) @ U_W)

    return _states(x, s_0, mask, step)


@_compiled
def _gated_states(x, s_0, mask, K, activation, projected):
    """s_0 to s_T."""

    def step(x_t, s):
        f, i, c = _gates(x_t, K, tf.shape(s)[1], projected)
        return activation(f * s + i * c)

    return _states(x, s_0, mask, step)


def _gates(x, K, units, projected):
    """f, i and c of one step, or of several."""
    f, i, *c = _by_kernel(x @ K, projected)
    return tf.sigmoid(f), tf.sigmoid(i), c[0] if projected else x[:, :units]


def _states(x, s_0, mask, step):
    """The forward loop; step(x_t, s_{t-1}) is s_t. Returns s_0 to s_T."""
    T = tf.shape(x)[1]

    def body(t, states):
        s = states.read(t)
        s_t = step(x[:, t], s)
        if mask is not None:
            s_t = tf.where(mask[:, t, tf.newaxis], s_t, s)
        return t + 1, states.write(t + 1, s_t)

    states = tf.TensorArray(s_0.dtype, T + 1, element_shape=s_0.shape, clear_after_read=False)
    return tf.while_loop(lambda t, _: t < T, body, (0, states.write(0, s_0)))[1].stack()


@_compiled
def _simple_gradients(g, return_sequences, s, mask, dropout, W, activation, with_λ):
    """δ_1 to δ_T; ∂L/∂s_0; where asked for, λ_1 to λ_T."""
    T, W_T = tf.shape(s)[0] - 1, tf.transpose(W)
    derivative = DERIVATIVE_AT_OUTPUT[activation]

    # What goes from one round of the loop to the next: δ_t, and λ_t where a masked step passes it
    # on. Of each array more that went, XLA would make another pass over the step's numbers.
    def through_activation(t, λ_t):
        δ_t = derivative(s[t + 1]) * λ_t
        if mask is None:
            return (δ_t,)
        return tf.where(mask[:, t, tf.newaxis], δ_t, tf.zeros_like(δ_t)), λ_t

    def through_step(t, δ_t, *λ_t):
        to_earlier = _dropped(δ_t @ W_T, dropout)
        return to_earlier if mask is None else tf.where(mask[:, t, tf.newaxis], to_earlier, *λ_t)

    def body(t, at_t, _, δ, λ):
        from_later = through_step(t, *at_t)
        λ_before = g[:, t - 1] + from_later if return_sequences else from_later
        # λ_0, of the last round, goes where λ_T will be.
        λ = [array.write((t - 1) % T, λ_before) for array in λ]
        return t - 1, through_activation(t - 1, λ_before), at_t, δ.write(t, at_t[0]), λ

    λ_T = g[:, T - 1] if return_sequences else g
    at_T = through_activation(T - 1, λ_T)
    δ = tf.TensorArray(s.dtype, T, element_shape=s.shape[1:])
    λ = [tf.TensorArray(s.dtype, T, element_shape=s.shape[1:])] if with_λ else []
    # The last round goes one step too far, and its λ_0 has passed through an activation that s_0
    # has not: ∂L/∂s_0 is taken from the round before.
    _, _, at_1, δ, λ = tf.while_loop(lambda t, *_: t >= 0, body, (T - 1, at_T, at_T, δ, λ))
    λ = [array.write(T - 1, λ_T).stack() for array in λ]
    return δ.stack(), through_step(0, *at_1), *λ


@_compiled
def _gated_gradients(g, return_sequences, s, x, mask, K, activation, projected):
    """∂L/∂K; ∂L/∂s_0; λ_1 to λ_T."""
    T = tf.shape(x)[1]
    chunks, steps, steps_of_last = _chunks(T, s)

    def through_chunk(start, steps, from_later, λ, dkernels):
        chunk = _Chunk(start, steps, s, x, mask, K, activation, projected)

        def body(t, from_later, λ):
            λ_t = g[:, start + t] + from_later if return_sequences else from_later
            return t - 1, chunk.to_earlier[t] * λ_t, λ.write(start + t, λ_t)

        _, from_later, λ = tf.while_loop(lambda t, *_: t >= 0, body, (steps - 1, from_later, λ))
        κ, _ = chunk.gradients(λ.stack())
        dkernels = [
            dkernel + tf.cast(_sum_of_products(chunk.x, κ_of_kernel), dkernel.dtype)
            for dkernel, κ_of_kernel in zip(dkernels, κ, strict=True)
        ]
        return from_later, λ, dkernels

    def body(chunk, *carried):
        return chunk - 1, *through_chunk(chunk * steps, steps, *carried)

    from_later = tf.zeros_like(s[0]) if return_sequences else g
    λ = tf.TensorArray(s.dtype, T, element_shape=s.shape[1:], clear_after_read=False)
    # In 16 bits a sum over many chunks would lose what a single product keeps.
    sum_type = tf.float32 if s.dtype.size < 4 else s.dtype
    dkernels = [tf.zeros_like(kernel, sum_type) for kernel in _by_kernel(K, projected)]
    carried = through_chunk(chunks * steps, steps_of_last, from_later, λ, dkernels)
    _, ds_0, λ, dkernels = tf.while_loop(lambda chunk, *_: chunk >= 0, body, (chunks - 1, *carried))
    return tf.cast(tf.concat(dkernels, axis=1), K.dtype), ds_0, λ.stack()


@_compiled
def _gated_input_gradient(state_gradients, s, x, mask, K, activation, projected):
    """∂L/∂x, from λ_1 to λ_T."""
    λ = state_gradients
    T, _, units = tf.unstack(tf.shape(λ))
    batch, _, features = tf.unstack(tf.shape(x))
    chunks, steps, steps_of_last = _chunks(T, s)

    def of_chunk(start):
        chunk = _Chunk(start, steps, s, x, mask, K, activation, projected)
        κ, dc = chunk.gradients(λ)
        kernels = _by_kernel(K, projected)
        dx = tf.add_n([κ @ tf.transpose(kernel) for κ, kernel in zip(κ, kernels, strict=True)])
        if not projected:
            dx += tf.pad(dc, [[0, 0], [0, features - units]])
        return tf.reshape(dx, [steps, batch, features])

    # The last chunk is as long as the others here, and begins within the one before.
    starts = tf.minimum(steps * tf.range(chunks + 1), T - steps)
    dx = tf.map_fn(of_chunk, starts, fn_output_signature=x.dtype)
    before_last = tf.reshape(dx[:-1], [chunks * steps, batch, features])
    return _swap(tf.concat([before_last, dx[-1, steps - steps_of_last :]], axis=0))


class _Chunk:
    """A few steps of the gated recurrence, their gates computed again, all in one product.

    x (of a row for each step of each example), and to_earlier, (steps, batch, units): what takes
    λ_t to the step before, f_t ⊙ Φ'(a_t), or 1 where the mask leaves the step out.
    """

    def __init__(self, start, steps, s, x, mask, K, activation, projected):
        self._start, self._steps = start, steps
        self.x = _rows(_swap(_slice(x, 1, start, steps)))
        self._f, self._i, self._c = _gates(self.x, K, tf.shape(s)[2], projected)
        self._s_before = self._of_steps(s)
        self._derivative = DERIVATIVE_AT_OUTPUT[activation](self._of_steps(s, 1))
        to_earlier = self._f * self._derivative
        if mask is not None:
            mask = _rows(tf.transpose(_slice(mask, 1, start, steps))[..., tf.newaxis])
            self._derivative = tf.where(mask, self._derivative, tf.zeros_like(to_earlier))
            to_earlier = tf.where(mask, to_earlier, tf.ones_like(to_earlier))
        self.to_earlier = tf.reshape(to_earlier, [steps, *tf.unstack(tf.shape(s))[1:]])
        self._projected = projected

    def gradients(self, λ):
        """([∂L/∂(K x_t) of each kernel], ∂L/∂c_t), from λ of all steps of the sequence."""
        f, i, c = self._f, self._i, self._c
        δ = self._derivative * self._of_steps(λ)
        dc = δ * i
        κ = [δ * self._s_before * f * (1 - f), dc * c * (1 - i)]
        return κ + [dc] * self._projected, dc

    def _of_steps(self, array, shift=0):
        return _rows(_slice(array, 0, self._start + shift, self._steps))


def _chunks(T, s):
    """How T steps are cut: n chunks of so many steps, and a last one of so many."""
    # As measured: what a core's cache (1 MB) holds, and enough for products at full speed.
    numbers_a_step = tf.maximum(1, tf.shape(s)[1] * tf.shape(s)[2])
    steps = tf.clip_by_value(2**14 // numbers_a_step, 1, T)
    return (T - 1) // steps, steps, (T - 1) % steps + 1


def _by_kernel(K, projected):
    return tf.split(K, 3 if projected else 2, axis=1)


def _slice(array, axis, start, size):
    # Unlike array[start : start + size], of a size that XLA can tell.
    begin, sizes = [0] * array.shape.rank, tf.unstack(tf.shape(array))
    begin[axis], sizes[axis] = start, size
    return tf.slice(array, begin, sizes)


def _rows(array):
    """An array of vectors as a matrix of their rows."""
    # Not array.shape[-1]: it is None once one trace serves layers of different sizes.
    return tf.reshape(array, [-1, tf.shape(array)[-1]])


def _swap(array):
    return tf.transpose(array, [1, 0, 2])


def _sum_of_products(a, b):
    """Σ_t a_t b_tᵀ, over the examples too."""
    return tf.matmul(_rows(a), _rows(b), transpose_a=True)


def _dropped(s, dropout):
    return s if dropout is None else s * dropout


def _with_bias(x, kernel, bias):
    """x with the constant input 1, and the kernel with its weight."""
    x = tf.pad(x, [[0, 0], [0, 0], [0, 1]], constant_values=1)
    return x, tf.concat([kernel, bias[tf.newaxis]], axis=0)


def _tensors(*values):
    # A custom gradient keeps a variable as it is, and would read it in the backward pass, when a
    # stateful layer has already put the new state there.
    return [tf.convert_to_tensor(value) for value in values]


def _explicit(states, gradients, examples, weights, return_sequences, on_state_gradients):
    """The recurrence whose compiled loops are given, as TensorFlow is to see it.

    Args:
        states: from a share of the examples, then the weights, to s_0 to s_T, time first.
        gradients: from g, the states and the same arguments, to ∂L/∂x and ∂L/∂s_0 of the share,
            its part of ∂L/∂weight of each weight, and [λ_1 to λ_T] or [].
        examples: x, s_0, and the two masks or None; batch first.
        weights: tensors.
        return_sequences, on_state_gradients: as in `simple_recurrence`.
    """
    x, s_0, *masks = examples
    batch, timesteps = x.shape[:2]
    units = s_0.shape[1]

    @tf.custom_gradient
    def recurrence(x, s_0, *weights):
        shares = _shares(s_0, x, s_0, *masks)
        s = [states(*_constants(*share, *weights)) for share in shares]

        def gradient(g):
            parts = [
                gradients(g, s, *share, *weights)
                for (g,), s, share in zip(_shares(s_0, g), s, shares, strict=True)
            ]
            dx, ds_0, dweights, λ = zip(*parts, strict=True)
            if on_state_gradients is not None:
                on_state_gradients([_of_shape(λ, [timesteps, None, units]) for (λ,) in λ])
            dweights = [tf.add_n(parts) for parts in zip(*dweights, strict=True)]
            inputs, dinputs = [x, s_0, *weights], [tf.concat(dx, 0), tf.concat(ds_0, 0), *dweights]
            return [_of_shape(d, input.shape) for d, input in zip(dinputs, inputs, strict=True)]

        if return_sequences:
            outputs = tf.concat([_swap(s[1:]) for s in s], axis=0)
            return _of_shape(outputs, [batch, timesteps, units]), gradient
        return _of_shape(tf.concat([s[-1] for s in s], axis=0), [batch, units]), gradient

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
    return large and not tf.config.list_logical_devices("GPU")


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
