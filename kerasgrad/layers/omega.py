"""The regularizer Ω of Pascanu, Mikolov and Bengio (2013): gradients that keep their norm.

The paper writes its network with the state before the activation:

    x_k = W σ(x_{k-1}) + W_in u_k + b        ∂x_{k+1}/∂x_k = W diag(σ'(x_k))

so its x_k is what this package calls a_k, with s_k = Φ(a_k) and Φ for σ, and its ∂E/∂x_k is
δ_k = ∂L/∂a_k = Φ'(a_k) ⊙ λ_k, where λ_k = ∂L/∂s_k. With ρ_k the part of δ_{k+1} that arrives one
step earlier,

    ρ_k = ‖Φ'(a_k) ⊙ Wᵀ δ_{k+1}‖ / ‖δ_{k+1}‖,    k = 1..T-1

    equation 9     Ω = Σ_k (ρ_k - 1)²
    equation 10    ∂⁺Ω/∂W = Σ_k ∂⁺(ρ_k² - 1)²/∂W,  a_k and δ_{k+1} held fixed

Equation 10 is not the derivative of equation 9: it has the squared norms, and it is the immediate
derivative, without the ways in which W moves the states and the gradients themselves. It moves W
alone; the gradient of equation 9 moves every weight.

Two things the equations leave open are here as in the authors' code
(github.com/pascanur/trainingRNNs): terms with ‖δ_{k+1}‖ < 1e-10 do not count, and the sum is
divided by the number of those that do, in all examples, so that one weight α suits every length.
That code takes s_k instead of a_k: its ρ_k = ‖Wᵀ(Φ'(a_k) ⊙ λ_k)‖/‖λ_k‖ has Φ' on the other side.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from kerasgrad.layers.recurrence import DERIVATIVE_AT_OUTPUT, is_explicit
from kerasgrad.layers.simple_rnn import SimpleRNN

# Of the norm of ∂L/∂a, L a mean over the batch.
_SMALLEST = 1e-10


def omega(
    state_gradients: tf.Tensor,
    states: tf.Tensor,
    recurrent_kernel: tf.Tensor,
    *,
    activation: Any,
    equation: int = 9,
) -> tf.Tensor:
    """Ω of a batch, from its states and their gradients.

        equation 9     mean over k and the examples of (ρ_k - 1)²
        equation 10    mean over k and the examples of (ρ_k² - 1)²

    Differentiable in all three tensors; hold two of them fixed for the immediate derivative.

    Args:
        state_gradients: λ, (timesteps, batch, units), ∂L/∂s_t.
        states: s_t, of the same shape.
        recurrent_kernel: W as Keras has it, (units, units), which multiplies a row vector s.
        activation: Φ: Keras's tanh, relu, sigmoid or linear.
        equation: 9 or 10, of the paper.

    Returns:
        A scalar; 0 where no term counts.

    Example:

    >>> import keras, tensorflow as tf
    >>> from kerasgrad.layers.omega import omega
    >>> λ, s, W = tf.ones((5, 1, 2)), tf.zeros((5, 1, 2)), 0.5 * tf.eye(2)
    >>> float(omega(λ, s, W, activation=keras.activations.tanh))  # (0.5 - 1)²
    0.25

    Source: Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent neural
    networks", section 3.3.
    """
    derivative = DERIVATIVE_AT_OUTPUT[activation](states)
    δ = (derivative * state_gradients)[1:]
    # ρ_k does not depend on the length of δ, whose square might be beyond the range of a float.
    largest = tf.stop_gradient(tf.reduce_max(tf.abs(δ), axis=-1, keepdims=True))
    δ = tf.math.divide_no_nan(δ, largest)
    arriving = derivative[:-1] * tf.matmul(δ, recurrent_kernel, transpose_b=True)
    squares = tf.reduce_sum(δ * δ, axis=-1)
    counts = tf.sqrt(tf.stop_gradient(squares)) * largest[..., 0] >= _SMALLEST
    ρ_squared = tf.reduce_sum(arriving * arriving, axis=-1) / tf.where(
        counts, squares, tf.ones_like(squares)
    )
    if equation == 9:
        # The slope of a square root at 0 is Inf; where nothing arrives, no direction is better.
        arrives = ρ_squared > 0
        ρ = tf.sqrt(tf.where(arrives, ρ_squared, tf.ones_like(ρ_squared)))
        terms = (tf.where(arrives, ρ, tf.zeros_like(ρ)) - 1) ** 2
    else:
        terms = (ρ_squared - 1) ** 2
    terms = tf.where(counts, terms, tf.zeros_like(terms))
    number = tf.reduce_sum(tf.cast(counts, terms.dtype))
    return tf.math.divide_no_nan(tf.reduce_sum(terms), number)


def check_omega(layer: keras.layers.Layer, activation: Any) -> None:
    """Find out before the training that Ω is not defined for a layer.

    Raises:
        ValueError: for an activation without explicit derivative, or recurrent dropout.
    """
    if not is_explicit(activation):
        raise ValueError(
            f"{type(layer).__name__} needs Φ' as a function of Φ's output: activation must be "
            f"tanh, relu, sigmoid or linear. Received: {activation!r}."
        )
    if getattr(layer, "recurrent_dropout", 0):
        raise ValueError(
            f"{type(layer).__name__} has no Ω for recurrent_dropout, which changes the Jacobian "
            f"from batch to batch. Received: recurrent_dropout={layer.recurrent_dropout}. Use "
            "dropout, of the inputs."
        )


@keras.saving.register_keras_serializable(package="kerasgrad")
class OmegaSimpleRNN(SimpleRNN):
    """`SimpleRNN` with the paper's equation 10 added to its recurrent kernel's gradient.

        ∂L/∂W + α ∂⁺Ω/∂W,    ∂⁺Ω/∂W = Σ_k ∂⁺(ρ_k² - 1)²/∂W

    Added in training only, inside the backward pass that computes ∂L/∂s_t anyhow: the loss that is
    shown is L, and the gradient that GradientNorms records has both parts. Equations:
    `kerasgrad.layers.omega`.

    Args:
        units: int, the size of s_t.
        omega: α; the paper's is 4.
        activation: Φ: "tanh", "relu", "sigmoid" or "linear" (None).
        **kwargs: those of `keras.layers.SimpleRNN`, but for recurrent_dropout.

    Raises:
        ValueError: for another activation, recurrent dropout, or a mask.

    Example:

    >>> import numpy as np
    >>> import kerasgrad as kg
    >>> kg.layers.OmegaSimpleRNN(4, omega=2.0)(np.zeros((2, 7, 3))).shape
    TensorShape([2, 4])

    Source: Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent neural
    networks", equation 10.
    """

    def __init__(self, units: int, omega: float = 4.0, activation: Any = "tanh", **kwargs: Any):
        super().__init__(units, activation=activation, **kwargs)
        self.omega = omega
        check_omega(self, self.activation)

    def inner_loop(self, sequences, initial_state, mask, training=False):
        if not training:
            return super().inner_loop(sequences, initial_state, mask, training=training)
        check_no_mask(self, mask)
        # Both are there once the gradient is taken, which is when they are needed.
        taken: dict[str, tf.Tensor] = {}
        observer, cell = self.on_state_gradients, self.cell
        variable, returns = cell.recurrent_kernel, self.return_sequences

        def take(shares):
            taken["λ"] = tf.concat(shares, axis=1)
            if observer is not None:
                observer(shares)

        @tf.custom_gradient
        def with_omega(W):
            def gradient(dW):
                return dW + self.omega * self._immediate_derivative(W, **taken)

            return tf.identity(W), gradient

        # A custom gradient refuses variables, and Keras may leave one as it is.
        W = with_omega(tf.convert_to_tensor(ops.convert_to_tensor(variable)))
        # Keras's __setattr__ would take a tensor for a weight that is replaced.
        object.__setattr__(cell, "recurrent_kernel", W)
        object.__setattr__(self, "on_state_gradients", take)
        self.return_sequences = True
        try:
            last, s, state = super().inner_loop(sequences, initial_state, mask, training=training)
        finally:
            object.__setattr__(cell, "recurrent_kernel", variable)
            object.__setattr__(self, "on_state_gradients", observer)
            self.return_sequences = returns
        taken["s"] = tf.stop_gradient(tf.transpose(s, [1, 0, 2]))
        return last, s if returns else last[:, tf.newaxis], state

    def _immediate_derivative(self, W, λ, s):
        λ = tf.stop_gradient(λ)
        with tf.GradientTape() as tape:
            tape.watch(W)
            Ω = omega(λ, s, W, activation=self.activation, equation=10)
        return tape.gradient(Ω, W)

    def get_config(self):
        return {**super().get_config(), "omega": self.omega}


def check_no_mask(layer: keras.layers.Layer, mask: Any) -> None:
    """Refuse a mask.

    Raises:
        ValueError: where there is one.
    """
    if any(part is not None for part in keras.tree.flatten(mask)):
        raise ValueError(
            f"{type(layer).__name__} has no Ω for masked steps. Expected sequences of one length, "
            "without a mask. Use SimpleRNN for masked ones."
        )
