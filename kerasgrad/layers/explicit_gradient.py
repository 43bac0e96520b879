"""A recurrence with its explicit BPTT, as TensorFlow is to see it: as one differentiable function.

The equations are in recurrence.py, as functions of time-first arrays that XLA compiles. Here they
become a custom gradient of batch-first tensors. The batch is cut in halves where that is worth it,
whose operations TensorFlow runs side by side; a second derivative, which would come out wrong, is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from kerasgrad import devices
from kerasgrad.layers.loops import compiled, flat, swap


def with_explicit_gradient(
    functions: tuple[Callable, Callable, Callable],
    examples: tuple[tf.Tensor | None, ...],
    weights: Sequence[tf.Tensor],
    with_bias: bool,
    return_sequences: bool,
    observers: tuple[Callable | None, Callable | None],
) -> tf.Tensor:
    """The states of the recurrence whose functions are given, with the gradient that they give.

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
    x, s_0, *weights = as_tensors([x, s_0, *weights])
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
                upstream = None, flat(constant_g)
            arguments = upstream, s, x, *masks, *weights
            dweights, ds_0, of_λ = _differentiable_once(
                lambda: gradients(*arguments, observed=observed), [g, *tensors]
            )
            # A function of its own: TensorFlow leaves it out where nobody asks for ∂L/∂x.
            dx = swap(_differentiable_once(lambda: input_gradient(*arguments), [g, *tensors]))
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
    return large and not devices.on_gpu()


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


@compiled
def _by_example(shares, s_0):
    """(batch, timesteps, units), from s_0 to s_T of each share of the batch."""
    units = tf.shape(s_0)[1]
    shares = [tf.reshape(s[1:], [tf.shape(s)[0] - 1, -1, units]) for s in shares]
    return swap(tf.concat(shares, axis=1))


def as_tensors(values: Sequence[tf.Tensor | tf.Variable]) -> list[tf.Tensor]:
    """The values, of variables as they are now."""
    # A custom gradient keeps a variable as it is, and would read it in the backward pass, when a
    # stateful layer has already put the new state there.
    return [tf.convert_to_tensor(value) for value in values]
