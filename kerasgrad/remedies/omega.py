"""Ω of equation 9, whose gradient goes through everything: second derivatives, by nested tapes.

`kerasgrad.layers.omega` has the equations. Ω holds ∂L/∂a_k, which depends on every weight of the
network and on its output layers, too; so unlike equation 10 it cannot be had inside of one layer.
`OmegaSequential` takes both gradients, with Keras's own loop, since kerasgrad's layers refuse
second derivatives. A training step takes several times as long as one without Ω.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from kerasgrad.layers.omega import check_no_mask, check_omega, omega
from kerasgrad.layers.recurrence import StateNorms
from kerasgrad.norms import summed_norms


class _PerturbedCell(keras.layers.SimpleRNNCell):
    """s_t = Φ(U x_t + W s_{t-1} + b) + η_t, where the input is x_t and η_t side by side.

    η is 0, and ∂L/∂η_t is ∂L/∂s_t: by way of all later steps, too.
    """

    def call(self, x, states, training=False):
        output, _ = super().call(x[:, : -self.units], states, training=training)
        output = output + x[:, -self.units :]
        return output, [output]


class PerturbedSimpleRNN(keras.layers.RNN):
    """A simple recurrent layer in Keras's own loop, for `OmegaSequential` to differentiate twice.

        s_t = Φ(U x_t + W s_{t-1} + b)

    Args:
        units: int, the size of s_t.
        activation: Φ: "tanh", "relu", "sigmoid" or "linear" (None).
        recurrent_initializer: W at the start.
        **kwargs: those of `keras.layers.RNN`, such as return_sequences.

    Raises:
        ValueError: for another activation, or a mask.

    Example:

    >>> import numpy as np
    >>> from kerasgrad.remedies.omega import PerturbedSimpleRNN
    >>> PerturbedSimpleRNN(4)(np.zeros((2, 7, 3))).shape
    TensorShape([2, 4])

    Source: Elman (1990), "Finding structure in time".
    """

    # Set by GradientNorms while it records: called with the mean over the batch of ‖∂L/∂s_t‖.
    on_state_norms: StateNorms | None = None

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_initializer: Any = "orthogonal",
        **kwargs: Any,
    ):
        cell = _PerturbedCell(
            units, activation=activation, recurrent_initializer=recurrent_initializer
        )
        super().__init__(cell, **kwargs)
        check_omega(self, cell.activation)
        self.perturbed: _Perturbed | None = None

    def inner_loop(self, sequences, initial_state, mask, training=False):
        perturbed, units = self.perturbed, self.cell.units
        batch, T = ops.shape(sequences)[:2]
        if perturbed is None:
            η = ops.zeros((batch, T, units), dtype=sequences.dtype)
        else:
            check_no_mask(self, mask)
            η = perturbed.start(self, batch, T, sequences.dtype)
        returns = self.return_sequences
        self.return_sequences = True
        try:
            last, s, state = super().inner_loop(
                ops.concatenate([sequences, η], axis=-1), initial_state, mask, training=training
            )
        finally:
            self.return_sequences = returns
        if perturbed is not None:
            perturbed.states = s
        return last, s, state


class _Perturbed:
    """What one call of a `PerturbedSimpleRNN` under a tape leaves for Ω."""

    def __init__(self, tape: tf.GradientTape):
        self._tape = tape
        self.states: tf.Tensor | None = None

    def start(self, layer, batch, timesteps, dtype):
        self.η = tf.zeros([batch, timesteps, layer.cell.units], dtype)
        self._tape.watch(self.η)
        self._observer = layer.on_state_norms
        self._cell = layer.cell
        return self.η

    def omega(self, state_gradients):
        """Ω of equation 9; an observer is told the norms of ∂L/∂s_t by the way."""
        λ, s = (tf.transpose(array, [1, 0, 2]) for array in (state_gradients, self.states))
        if self._observer is not None:
            self._observer(summed_norms(λ) / tf.cast(tf.shape(λ)[1], tf.float64))
        W = ops.convert_to_tensor(self._cell.recurrent_kernel)
        return omega(λ, s, W, activation=self._cell.activation, equation=9)


class OmegaSequential(keras.Sequential):
    """A `keras.Sequential` that is trained on L + α Ω, Ω the paper's equation 9.

        Ω = Σ_k (ρ_k - 1)²

    Its recurrent layer is a `PerturbedSimpleRNN`. The loss that is shown is L.

    Args:
        layers: the layers, one of them a `PerturbedSimpleRNN`.
        omega: α; the paper's is 4.

    Raises:
        ValueError: when there is no `PerturbedSimpleRNN`, or several.

    Example:

    >>> import keras, numpy as np
    >>> from kerasgrad.remedies.omega import OmegaSequential, PerturbedSimpleRNN
    >>> model = OmegaSequential([PerturbedSimpleRNN(4), keras.layers.Dense(1)])
    >>> model.compile("sgd", loss="mse")
    >>> _ = model.fit(np.ones((8, 5, 2)), np.ones((8, 1)), verbose=0)

    Source: Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent neural
    networks", equation 9.
    """

    def __init__(
        self, layers: Sequence[keras.layers.Layer], omega: float = 4.0, name: str | None = None
    ):
        super().__init__(layers, name=name)
        recurrent = [layer for layer in layers if isinstance(layer, PerturbedSimpleRNN)]
        if len(recurrent) != 1:
            raise ValueError(
                "OmegaSequential needs one PerturbedSimpleRNN, to take ∂L/∂s_t of. Received: "
                f"{', '.join(layer.name for layer in recurrent) or 'none'}."
            )
        self.omega = omega

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        (recurrent,) = (layer for layer in self.layers if isinstance(layer, PerturbedSimpleRNN))
        with tf.GradientTape() as outer:
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                perturbed = recurrent.perturbed = _Perturbed(inner)
                try:
                    y_pred = self(x, training=True)
                finally:
                    recurrent.perturbed = None
                loss = self.compute_loss(
                    x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
                )
            Ω = perturbed.omega(inner.gradient(loss, perturbed.η))
            total = self.optimizer.scale_loss(loss + self.omega * tf.cast(Ω, loss.dtype))
        variables = self.trainable_variables
        self.optimizer.apply(outer.gradient(total, variables), variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=tf.shape(keras.tree.flatten(x)[0])[0])
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
