"""The simple recurrent layer of the article's equation 1, and its identity start (IRNN)."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

# Keras's own cell is equation 1 already, s_t = Φ(U x_t + W s_{t-1} + b): a second one would only
# repeat it.
from keras.layers import SimpleRNNCell

from kerasgrad.layers.recurrence import StateGradients, StateNorms, is_explicit, simple_recurrence
from kerasgrad.layers.sequences import in_order_of_steps, outputs_under_mask

__all__ = ["IRNN", "ScaledIdentity", "SimpleRNN", "SimpleRNNCell"]


@keras.saving.register_keras_serializable(package="kerasgrad")
class SimpleRNN(keras.layers.SimpleRNN):
    """`keras.layers.SimpleRNN` with explicit back-propagation through time.

        s_t = Φ(U x_t + W s_{t-1} + b)

    U is `kernel`, W `recurrent_kernel` and b `bias` (transposed, as always in Keras, where a row
    vector is multiplied from the left). A drop-in: same arguments, same weights in the same order,
    same outputs and gradients. What differs is how the gradient is computed (see
    `kerasgrad.layers.recurrence`), which makes ∂L/∂s_t available to
    `kerasgrad.callbacks.GradientNorms` while `fit` runs. `unroll` is accepted and changes nothing.

    Args:
        units: int, the size of s_t.
        activation: Φ. "tanh", "relu", "sigmoid" and "linear" (None) take the explicit recurrence;
            any other works through Keras's own loop, without ∂L/∂s_t in the record.
        *args, **kwargs: those of `keras.layers.SimpleRNN`.

    Input and output shapes are those of Keras: (batch, timesteps, features) in, (batch, units) out,
    or (batch, timesteps, units) with return_sequences=True.

    Raises:
        ValueError: when a second derivative is asked for (the gradient of a gradient).

    Example:

    >>> import numpy as np
    >>> import kerasgrad as kg
    >>> layer = kg.layers.SimpleRNN(4, return_sequences=True)
    >>> layer(np.zeros((2, 7, 3))).shape
    TensorShape([2, 7, 4])

    Source: Elman (1990), "Finding structure in time"; the article's equations 1 and 4 to 7.
    """

    # Called with ∂L/∂s_t, in shares of the batch; and, set by GradientNorms while it records, with
    # the mean over the batch of its norms.
    on_state_gradients: StateGradients | None = None
    on_state_norms: StateNorms | None = None

    def inner_loop(self, sequences, initial_state, mask, training=False):
        if not is_explicit(self.activation):
            return super().inner_loop(sequences, initial_state, mask, training=training)
        cell = self.cell
        (initial_state,) = keras.tree.flatten(initial_state)
        x, mask = in_order_of_steps(sequences, mask, self.go_backwards)
        recurrent_dropout_mask = None
        if training:
            dropout_mask = cell.get_dropout_mask(x[:, 0])
            if dropout_mask is not None:
                x = x * dropout_mask[:, tf.newaxis]
            recurrent_dropout_mask = cell.get_recurrent_dropout_mask(initial_state)

        # Under a mask the last output is that of the last unmasked step.
        every_step = self.return_sequences or mask is not None
        states = simple_recurrence(
            x,
            initial_state,
            cell.kernel,
            cell.recurrent_kernel,
            cell.bias,
            activation=self.activation,
            mask=mask,
            recurrent_dropout_mask=recurrent_dropout_mask,
            return_sequences=every_step,
            on_state_gradients=self.on_state_gradients,
            on_state_norms=self.on_state_norms,
        )
        if not every_step:
            return states, ops.expand_dims(states, 1), [states]
        outputs = outputs_under_mask(states, mask, self.zero_output_for_mask)
        return outputs[:, -1], outputs, [states[:, -1]]


@keras.saving.register_keras_serializable(package="kerasgrad")
class ScaledIdentity(keras.initializers.Initializer):
    """gain · I: where the recurrent kernel of an `IRNN` starts.

    Keras's own identity loses its gain when a model is saved (Keras 3.15), or cannot be loaded at
    all (Keras 3.6).

    Args:
        gain: float.

    Example:

    >>> import kerasgrad as kg
    >>> kg.layers.ScaledIdentity(0.5)((2, 2)).numpy()
    array([[0.5, 0. ],
           [0. , 0.5]], dtype=float32)
    """

    def __init__(self, gain: float = 1.0):
        self.gain = gain

    def __call__(self, shape: tuple[int, int], dtype: str | None = None) -> tf.Tensor:
        return self.gain * ops.eye(*shape, dtype=dtype)

    def get_config(self) -> dict[str, float]:
        """The arguments of the constructor."""
        return {"gain": self.gain}


@keras.saving.register_keras_serializable(package="kerasgrad")
class IRNN(SimpleRNN):
    """A ReLU recurrent layer that starts from the identity: s_t = max(0, U x_t + W s_{t-1} + b).

    W = I and b = 0 at the start, U ~ N(0, 0.001²): while its units stay active, the layer adds its
    inputs up, and ∂s_t/∂s_{t-1} = I neither shrinks nor grows.

    Args:
        units: int, the size of s_t.
        activation: Φ, "relu".
        kernel_initializer: U at the start; by default normal with standard deviation 0.001.
        recurrent_initializer: W at the start, by default `ScaledIdentity()`; ScaledIdentity(0.01)
            is the paper's choice where long memory is not wanted.
        **kwargs: those of `keras.layers.SimpleRNN`.

    Example:

    >>> import numpy as np
    >>> import kerasgrad as kg
    >>> layer = kg.layers.IRNN(2)
    >>> _ = layer(np.zeros((1, 5, 3)))
    >>> layer.cell.recurrent_kernel.numpy()
    array([[1., 0.],
           [0., 1.]], dtype=float32)

    Source: Le, Jaitly and Hinton (2015), "A simple way to initialize recurrent networks of
    rectified linear units", section 2.
    """

    def __init__(
        self,
        units: int,
        activation: Any = "relu",
        kernel_initializer: Any = None,
        recurrent_initializer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(
            units,
            activation=activation,
            kernel_initializer=(
                kernel_initializer or keras.initializers.RandomNormal(stddev=0.001)
            ),
            recurrent_initializer=recurrent_initializer or ScaledIdentity(),
            **kwargs,
        )
