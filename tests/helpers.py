"""Independent oracles: what the package computes, by other and slower means.

None of them uses the package's recurrences. `unrolled_gradients` is automatic differentiation of
the cell, step by step, under a tf.GradientTape; `finite_differences` needs no derivative at all.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import keras
import numpy as np
import tensorflow as tf

EXPLICIT_ACTIVATIONS = ("linear", "tanh", "sigmoid", "relu")

MODES = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function, autograph=False),
    "xla": lambda function: tf.function(function, autograph=False, jit_compile=True),
}

KERAS = tuple(map(int, keras.__version__.split(".")[:2]))


def relative_error(actual, expected) -> float:
    """‖actual - expected‖ / ‖expected‖, or ‖actual‖ where expected is zero; NaN equals NaN."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if np.array_equal(actual, expected, equal_nan=True):
        return 0.0
    return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1.0))


def largest_relative_error(actual: Sequence, expected: Sequence) -> float:
    """The largest `relative_error` over two equally long lists of arrays."""
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def randomize(layer: keras.Layer, scale: float = 0.5, seed: int = 0) -> keras.Layer:
    """Draw every trainable weight from N(0, scale²), biases too; returns the layer.

    Two layers with the same weights in the same order come out equal.
    """
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_weights:
        weight.assign(scale * rng.normal(size=weight.shape))
    return layer


def outputs_and_gradients(
    call: Callable, variables: Sequence, inputs: Sequence, mode: str = "eager"
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The outputs of call(*inputs), and ∂L/∂input and ∂L/∂variable for a fixed L.

    L is the sum over all outputs, each multiplied by its own constant, so that no two outputs
    can be exchanged unnoticed.

    Args:
        call: from tensors to a tensor or a structure of tensors.
        variables: Keras variables, already built.
        inputs: float arrays.
        mode: "eager", "graph" (tf.function) or "xla" (with jit_compile=True).
    """
    inputs = [tf.convert_to_tensor(array) for array in inputs]

    def step(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = keras.tree.flatten(call(*inputs))
            loss = tf.add_n([tf.reduce_sum(output * _constants_like(output)) for output in outputs])
        return outputs, tape.gradient(loss, [*inputs, *(v.value for v in variables)])

    outputs, gradients = MODES[mode](step)(*inputs)
    # An Embedding's gradient is sparse.
    gradients = [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]
    return [output.numpy() for output in outputs], gradients


def _constants_like(tensor):
    counted = tf.cast(tf.range(tf.size(tensor)), tensor.dtype)
    return tf.reshape(tf.cos(1 + counted), tf.shape(tensor))


def unrolled_gradients(
    cell: keras.Layer,
    x,
    loss: Callable,
    *,
    initial_state=None,
    mask=None,
    go_backwards: bool = False,
    zero_output_for_mask: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Back-propagation through time by a tape that watches the cell unrolled over the steps.

    Args:
        cell: a built Keras cell with one state, of which its output is a function.
        x: (batch, timesteps, features).
        loss: from the outputs, (batch, timesteps, units) in the order of the steps taken, to a
            scalar.
        initial_state: (batch, units), or None for zeros.
        mask: (batch, timesteps) bool or None; False keeps the state and repeats the output.
        go_backwards: whether the last step of x is taken first.
        zero_output_for_mask: whether the output of a masked step is 0 instead of repeated.

    Returns:
        The outputs (batch, timesteps, units); ∂L/∂s_t, the total derivative, as (timesteps, batch,
        units) in the order of the steps taken; and [∂L/∂x, ∂L/∂s_0, then ∂L/∂weight of each
        trainable weight of the cell].
    """
    x = tf.convert_to_tensor(x)
    batch, T = x.shape[:2]
    s_0 = tf.zeros((batch, cell.units), x.dtype) if initial_state is None else initial_state
    s_0 = tf.convert_to_tensor(s_0)
    mask = np.ones((batch, T), bool) if mask is None else np.asarray(mask)
    steps = list(reversed(range(T))) if go_backwards else list(range(T))
    new_states, kept_states, outputs = [], [], []
    with tf.GradientTape() as tape:
        tape.watch([x, s_0])
        state, output = s_0, tf.zeros_like(s_0)
        for t in steps:
            unmasked = mask[:, t, np.newaxis]
            new_output, (new_state,) = cell(x[:, t], [state])
            # The output sees new_state, the next step sees state: the total derivative is that of
            # new_state where the step counts, and that of the state handed on where it does not.
            state = tf.where(unmasked, new_state, state)
            output = tf.where(unmasked, new_output, 0 * output if zero_output_for_mask else output)
            new_states.append(new_state)
            kept_states.append(state)
            outputs.append(output)
        total = loss(tf.stack(outputs, axis=1))
    weights = [weight.value for weight in cell.trainable_weights]
    by_new, by_kept, rest = tape.gradient(
        total, [new_states, kept_states, [x, s_0, *weights]], unconnected_gradients="zero"
    )
    state_gradients = np.where(mask.T[steps][..., np.newaxis], by_new, by_kept)
    return np.stack(outputs, axis=1), state_gradients, [np.asarray(gradient) for gradient in rest]


def state_gradients_through(layer: keras.Layer, step: Callable) -> np.ndarray:
    """What the layer hands to `on_state_gradients` while step() takes one gradient, eagerly."""
    received = []
    layer.on_state_gradients = received.append
    try:
        step()
    finally:
        layer.on_state_gradients = None
    (shares,) = received
    return np.concatenate(shares, axis=1)


def assigning(variable: tf.Variable) -> Callable:
    """For `on_state_gradients`: ∂L/∂s_t, of the whole batch, into the variable."""
    return lambda shares: variable.assign(tf.concat(shares, axis=1))


def finite_differences(function: Callable, array, step: float = 1e-6) -> np.ndarray:
    """∂function/∂array by central differences; function returns a scalar. For float64.

    The error is about step² times the third derivative, plus 1e-16 / step of rounding.
    """
    array = np.array(array, "float64")
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        change = np.zeros_like(array)
        change[index] = step
        gradient[index] = (function(array + change) - function(array - change)) / (2 * step)
    return gradient


# What a recurrent layer can be asked for: name -> (arguments of the layer, of its call). The same
# table serves every layer that is compared with Keras's.

BATCH, TIMESTEPS, FEATURES, UNITS = 4, 6, 3, 5

PADDED_AFTER = np.arange(TIMESTEPS) < np.array([[6], [3], [1], [4]])
PADDED_BEFORE = PADDED_AFTER[:, ::-1]
# Holes, a masked first step, and one row that is masked throughout.
HOLES = np.array(
    [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool
)

_SEQUENCES = {"return_sequences": True}
_STATE = {"return_state": True}
_ZERO = {"zero_output_for_mask": True}
_BACKWARDS = {"go_backwards": True}
_UNROLL = {"unroll": True}
_START = {"initial_state": True}

LAYER_CASES: dict[str, tuple[dict, dict]] = {
    "last output": ({}, {}),
    "sequences": (_SEQUENCES, {}),
    "state": (_STATE, {}),
    "sequences, state": (_SEQUENCES | _STATE, {}),
    "backwards": (_BACKWARDS, {}),
    "backwards, sequences, state": (_BACKWARDS | _SEQUENCES | _STATE, {}),
    "initial state": (_SEQUENCES, _START),
    "no bias": ({"use_bias": False}, _START),
    "unroll": (_UNROLL | _SEQUENCES, {}),
    "padded after": (_SEQUENCES, {"mask": PADDED_AFTER}),
    "padded before": (_SEQUENCES, {"mask": PADDED_BEFORE}),
    "holes, last output, state": (_STATE, {"mask": HOLES}),
    "holes, sequences, initial state": (_SEQUENCES | _STATE, {"mask": HOLES} | _START),
    "holes, backwards": (_BACKWARDS | _SEQUENCES, {"mask": HOLES} | _START),
    "holes, zero output": (_ZERO, {"mask": HOLES} | _START),
    "holes, zero output, sequences": (_ZERO | _SEQUENCES | _STATE, {"mask": HOLES}),
    "holes, unroll": (_UNROLL | _SEQUENCES | _STATE, {"mask": HOLES} | _START),
    "mask with a last axis": (_SEQUENCES, {"mask": HOLES[..., np.newaxis]}),
    "mask of integers": (_SEQUENCES, {"mask": HOLES.astype("int32")}),
}

# Every case eagerly; in a graph and under XLA, which take longer to compile, the richest ones.
_COMPILED_CASES = (
    "last output",
    "backwards, sequences, state",
    "holes, sequences, initial state",
    "holes, zero output",
)

LAYER_RUNS = [
    *(("eager", "float64", case) for case in LAYER_CASES),
    *((mode, "float32", case) for mode in ("graph", "xla") for case in _COMPILED_CASES),
]


def run_layer_case(make: Callable, case: str, mode: str, dtype: str):
    """`outputs_and_gradients` of make(dtype=..., **arguments) with random weights and input.

    The gradients are those of the input, of the initial state where the case has one, and of the
    weights.
    """
    arguments, call_arguments = LAYER_CASES[case]
    rng = np.random.default_rng(11)
    inputs = [rng.normal(size=(BATCH, TIMESTEPS, FEATURES)).astype(dtype)]
    if "initial_state" in call_arguments:
        inputs.append(rng.normal(size=(BATCH, UNITS)).astype(dtype))
    layer = make(dtype=dtype, **arguments)
    layer.build((BATCH, TIMESTEPS, FEATURES))
    randomize(layer)

    def call(x, initial_state=None):
        return layer(x, initial_state=initial_state, mask=call_arguments.get("mask"))

    return outputs_and_gradients(call, layer.trainable_variables, inputs, mode)


TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def assert_equal_results(actual, expected, tolerance: float) -> None:
    """That two results of `outputs_and_gradients` are equal within a relative error."""
    for kind, ours, theirs in zip(("outputs", "gradients"), actual, expected, strict=True):
        error = largest_relative_error(ours, theirs)
        assert error <= tolerance, f"{kind}: relative error {error:.1e}"


@keras.saving.register_keras_serializable(package="tests")
class TwoStates(keras.layers.Layer):
    """A user's own cell: a = tanh(x U + b W), b' = b + a/2; its output a b' is neither state."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.state_size = [units, units]
        self.output_size = units

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), name="kernel")
        self.recurrent_kernel = self.add_weight(
            shape=(self.units, self.units), name="recurrent_kernel"
        )

    def call(self, x, states):
        _, b = states
        a = keras.ops.tanh(x @ self.kernel + b @ self.recurrent_kernel)
        b = b + 0.5 * a
        return a * b, [a, b]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def module_at(path: Path) -> ModuleType:
    """The module of a file that is no part of a package, which may import those beside it."""
    sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(path.stem)
    finally:
        sys.path.remove(str(path.parent))
