"""The article's LSTM, abstracted to three multiplications: gates that see the input alone."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from kerasgrad.layers.recurrence import (
    StateGradients,
    StateNorms,
    gated_recurrence,
    is_explicit,
)
from kerasgrad.layers.sequences import in_order_of_steps, outputs_under_mask


@keras.saving.register_keras_serializable(package="kerasgrad")
class SimplifiedLSTMCell(keras.layers.Layer):
    """One step of the article's simplified LSTM.

        f_t = σ(W_f x_t + b_f)          forget gate
        i_t = σ(W_i x_t + b_i)          input gate
        o_t = σ(W_o x_t + b_o)          output gate
        S_t = Φ(f_t ⊙ S_{t-1} + i_t ⊙ x_t)
        h_t = o_t ⊙ S_t                 the output; S_t is the state

    With project_input=True, W_c x_t stands in for x_t in the state equation, so that the number of
    features need not equal `units`. The weights are W_f, W_i, W_o (`kernel_f`, `kernel_i`,
    `kernel_o`), then W_c (`kernel_c`) if there is one, then b_f, b_i, b_o (`bias_f`, `bias_i`,
    `bias_o`): one weight a gate, so that each gate has its own gradient norm in a record.

    Args:
        units: int, the size of S_t and h_t.
        activation: Φ; None (linear) is the article's first form, "tanh" its second.
        project_input: bool, whether W_c x_t replaces x_t.
        use_bias: bool, whether the gates have biases.
        kernel_initializer, bias_initializer: of the kernels, and of the biases except where the
            next two arguments say otherwise.
        unit_forget_bias: bool, start b_f at 1 instead of by bias_initializer.
        forget_bias: float or None, start b_f at this value; it takes precedence. A gate that is to
            hold half of its content for T steps needs about ln(T / ln 2).
        kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint: as in Keras.
        **kwargs: those of `keras.layers.Layer`.

    Raises:
        ValueError: when the number of features differs from `units` without project_input.

    Example:

    >>> import keras, numpy as np
    >>> import kerasgrad as kg
    >>> cells = [kg.layers.SimplifiedLSTMCell(8, project_input=True) for _ in range(2)]
    >>> keras.layers.RNN(cells)(np.zeros((2, 7, 3))).shape
    TensorShape([2, 8])

    Source: the article's section 5; Hochreiter and Schmidhuber (1997) and Gers et al. (2000) for
    the full cell, whose gates also see h_{t-1}.
    """

    def __init__(
        self,
        units: int,
        activation: Any = None,
        project_input: bool = False,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        unit_forget_bias: bool = True,
        forget_bias: float | None = None,
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(units, int) or units <= 0:
            raise ValueError(f"units must be a positive integer. Received: {units!r}.")
        super().__init__(**kwargs)
        self.units = units
        self.activation = keras.activations.get(activation)
        self.project_input = project_input
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.unit_forget_bias = unit_forget_bias
        self.forget_bias = forget_bias
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.state_size = units
        self.output_size = units

    def build(self, input_shape):
        features = input_shape[-1]
        if features != self.units and not self.project_input:
            raise ValueError(
                f"The state equation adds i_t ⊙ x_t to f_t ⊙ S_(t-1), so the input needs as many "
                f"features as the cell has units. Received {features} features and units="
                f"{self.units}. Pass project_input=True to add i_t ⊙ (W_c x_t) instead, or set "
                f"units={features}."
            )
        self.kernel_f = self._add_kernel("kernel_f", features)
        self.kernel_i = self._add_kernel("kernel_i", features)
        self.kernel_o = self._add_kernel("kernel_o", features)
        self.kernel_c = self._add_kernel("kernel_c", features) if self.project_input else None
        self.bias_f = self._add_bias("bias_f", self._forget_bias_initializer())
        self.bias_i = self._add_bias("bias_i", self.bias_initializer)
        self.bias_o = self._add_bias("bias_o", self.bias_initializer)
        super().build(input_shape)

    def _add_kernel(self, name, features):
        # An initializer object draws the same numbers at every call: a clone draws its own.
        return self.add_weight(
            name=name,
            shape=(features, self.units),
            initializer=self.kernel_initializer.clone(),
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )

    def _add_bias(self, name, initializer):
        if not self.use_bias:
            return None
        return self.add_weight(
            name=name,
            shape=(self.units,),
            initializer=initializer,
            regularizer=self.bias_regularizer,
            constraint=self.bias_constraint,
        )

    def _forget_bias_initializer(self):
        if self.forget_bias is not None:
            return keras.initializers.Constant(self.forget_bias)
        return keras.initializers.Ones() if self.unit_forget_bias else self.bias_initializer

    def forget_gate(self, x: tf.Tensor) -> tf.Tensor:
        """f_t = σ(W_f x_t + b_f), of one step or of a whole sequence."""
        return _gate(x, self.kernel_f, self.bias_f)

    def input_gate(self, x: tf.Tensor) -> tf.Tensor:
        """i_t = σ(W_i x_t + b_i), of one step or of a whole sequence."""
        return _gate(x, self.kernel_i, self.bias_i)

    def output_gate(self, x: tf.Tensor) -> tf.Tensor:
        """o_t = σ(W_o x_t + b_o), of one step or of a whole sequence."""
        return _gate(x, self.kernel_o, self.bias_o)

    def candidate(self, x: tf.Tensor) -> tf.Tensor:
        """x_t itself, or W_c x_t with project_input."""
        return x if self.kernel_c is None else ops.matmul(x, self.kernel_c)

    def call(self, x, states, training=False):
        (S,) = states
        S = self.activation(self.forget_gate(x) * S + self.input_gate(x) * self.candidate(x))
        return self.output_gate(x) * S, [S]

    def get_initial_state(self, batch_size: int | tf.Tensor | None = None) -> list[tf.Tensor]:
        """S_0 = 0, for a batch of this size."""
        return [ops.zeros((batch_size, self.units), dtype=self.compute_dtype)]

    def get_config(self):
        return {**super().get_config(), **_cell_config(self)}


def _gate(x, kernel, bias):
    a = ops.matmul(x, kernel)
    return ops.sigmoid(a if bias is None else a + bias)


def _cell_config(cell):
    return {
        "units": cell.units,
        "activation": keras.activations.serialize(cell.activation),
        "project_input": cell.project_input,
        "use_bias": cell.use_bias,
        "kernel_initializer": keras.initializers.serialize(cell.kernel_initializer),
        "bias_initializer": keras.initializers.serialize(cell.bias_initializer),
        "unit_forget_bias": cell.unit_forget_bias,
        "forget_bias": cell.forget_bias,
        "kernel_regularizer": keras.regularizers.serialize(cell.kernel_regularizer),
        "bias_regularizer": keras.regularizers.serialize(cell.bias_regularizer),
        "kernel_constraint": keras.constraints.serialize(cell.kernel_constraint),
        "bias_constraint": keras.constraints.serialize(cell.bias_constraint),
    }


@keras.saving.register_keras_serializable(package="kerasgrad")
class SimplifiedLSTM(keras.layers.RNN):
    """The article's simplified LSTM over a sequence: S_t = Φ(f_t ⊙ S_{t-1} + i_t ⊙ x_t).

    The output is h_t = o_t ⊙ S_t, the state S_t alone. With the default linear Φ,
    ∂S_t/∂S_{t-1} = diag(f_t): the state's gradient cannot explode, decays as the product of the
    forget gates, and units never mix. With activation="tanh" it is diag((1 - S_t²) ⊙ f_t), which
    decays even with open gates. Equations and weights: `SimplifiedLSTMCell`.

    Args:
        units: int, the size of S_t and h_t.
        activation: Φ; None (linear) is the article's first form, "tanh" its second. Those two,
            "relu" and "sigmoid" take the explicit recurrence; any other works through Keras's own
            loop, without ∂L/∂S_t in the record.
        project_input: bool, whether i_t ⊙ (W_c x_t) replaces i_t ⊙ x_t.
        use_bias, kernel_initializer, bias_initializer, unit_forget_bias, forget_bias,
            kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint: as in
            `SimplifiedLSTMCell`.
        **kwargs: those of `keras.layers.RNN`: return_sequences, return_state, go_backwards,
            stateful, unroll (which changes nothing), zero_output_for_mask; and of `Layer`.

    Input and output shapes are those of Keras: (batch, timesteps, features) in, (batch, units) out,
    or (batch, timesteps, units) with return_sequences=True.

    Raises:
        ValueError: when the number of features differs from `units` without project_input; when a
            second derivative is asked for.

    Example:

    >>> import numpy as np
    >>> import kerasgrad as kg
    >>> layer = kg.layers.SimplifiedLSTM(8, project_input=True, forget_bias=4.0)
    >>> layer(np.zeros((2, 7, 3))).shape
    TensorShape([2, 8])

    Source: the article's section 5.
    """

    # Called with ∂L/∂S_t, in shares of the batch; and, set by GradientNorms while it records, with
    # the mean over the batch of its norms.
    on_state_gradients: StateGradients | None = None
    on_state_norms: StateNorms | None = None

    def __init__(
        self,
        units: int,
        activation: Any = None,
        project_input: bool = False,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        unit_forget_bias: bool = True,
        forget_bias: float | None = None,
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ):
        cell = SimplifiedLSTMCell(
            units,
            activation=activation,
            project_input=project_input,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            unit_forget_bias=unit_forget_bias,
            forget_bias=forget_bias,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            dtype=kwargs.get("dtype"),
            trainable=kwargs.get("trainable", True),
            name="simplified_lstm_cell",
        )
        super().__init__(cell, **kwargs)
        self.input_spec = [keras.layers.InputSpec(ndim=3)]

    def inner_loop(self, sequences, initial_state, mask, training=False):
        cell = self.cell
        if not is_explicit(cell.activation):
            return super().inner_loop(sequences, initial_state, mask, training=training)
        (initial_state,) = keras.tree.flatten(initial_state)
        x, mask = in_order_of_steps(sequences, mask, self.go_backwards)
        # Under a mask the last output is that of the last unmasked step.
        every_step = self.return_sequences or mask is not None
        S = gated_recurrence(
            x,
            initial_state,
            [cell.kernel_f, cell.kernel_i] + ([cell.kernel_c] if cell.project_input else []),
            [cell.bias_f, cell.bias_i] if cell.use_bias else None,
            activation=cell.activation,
            mask=mask,
            return_sequences=every_step,
            on_state_gradients=self.on_state_gradients,
            on_state_norms=self.on_state_norms,
        )
        if not every_step:
            output = cell.output_gate(x[:, -1]) * S
            return output, ops.expand_dims(output, 1), [S]
        outputs = outputs_under_mask(cell.output_gate(x) * S, mask, self.zero_output_for_mask)
        return outputs[:, -1], outputs, [S[:, -1]]

    @property
    def units(self) -> int:
        """The size of S_t and h_t."""
        return self.cell.units

    def get_config(self):
        config = super().get_config()
        del config["cell"]
        return {**config, **_cell_config(self.cell)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)
