"""What the units and gates of a recurrent layer do: saturated, dead, open, forgetful."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kerasgrad.bptt.gradients import Layer
from kerasgrad.bptt.unrolled import Steps, cells_of, record, state_names
from kerasgrad.layers import SimpleRNNCell, SimplifiedLSTMCell
from kerasgrad.memory import half_life

# A convention: an activation whose derivative is below this share of its largest is saturated.
SATURATED_BELOW = 0.05

# The derivative as a function of the activation's output, over the largest derivative.
_RELATIVE_DERIVATIVE = {
    keras.activations.tanh: lambda value: 1 - value**2,
    keras.activations.sigmoid: lambda value: 4 * value * (1 - value),
}


def states(
    model: keras.Model | keras.layers.Layer, x: Any, layer: Layer = None
) -> dict[str, np.ndarray]:
    """The states s_t of a recurrent layer for each example, time step and unit.

    Args:
        model: a Keras model, or a recurrent layer.
        x: a batch of the model's input (of the layer's, where a layer is given).
        layer: the name or path of the recurrent layer, or the layer; None for the only one.

    Returns:
        {"h": (batch, timesteps, units)}; the names are those of `kerasgrad.bptt.state_gradients`.
        Where the mask leaves out a step, the state of the step before.

    Raises:
        ValueError: for a model that has no recurrent layer, several and none named, or calls it
            more than once.

    Example:

    >>> import keras, numpy as np
    >>> from kerasgrad import bptt
    >>> {name: s.shape for name, s in bptt.states(keras.layers.LSTM(3), np.ones((2, 5, 1))).items()}
    {'h': (2, 5, 3), 'c': (2, 5, 3)}
    """
    steps, layer = record(model, x, layer)
    return _states(steps, layer)


def gates(
    model: keras.Model | keras.layers.Layer, x: Any, layer: Layer = None
) -> dict[str, np.ndarray]:
    """How open each gate of a recurrent layer is, from 0 (closed) to 1, at each step.

        f_t = σ(W_f x_t + R_f h_{t-1} + b_f), and the others likewise; kerasgrad's SimplifiedLSTM
        has no R

    Args:
        model, x, layer: as in `states`.

    Returns:
        {"forget": (batch, timesteps, units), "input": ..., "output": ...} of an LSTM and of
        kerasgrad's SimplifiedLSTM; {"update", "reset"} of a GRU, whose update gate is what stands
        between h_{t-1} and h_t. Of StackedRNNCells "cell_0/forget" and so on. NaN where the mask
        leaves out a step.

    Raises:
        ValueError: as in `states`, and for a layer without gates.

    Example:

    >>> import numpy as np
    >>> import kerasgrad as kg
    >>> layer = kg.layers.SimplifiedLSTM(2, forget_bias=np.log(3), kernel_initializer="zeros")
    >>> kg.bptt.gates(layer, np.ones((1, 4, 2)))["forget"][0, 0].round(4).tolist()
    [0.75, 0.75]

    Source: Hochreiter and Schmidhuber (1997); Gers, Schmidhuber and Cummins (2000); Cho et al.
    (2014), equations 5 and 6.
    """
    steps, layer = record(model, x, layer)
    values = _gates(steps, layer)
    if not values:
        raise ValueError(
            f"Layer {layer.path!r} ({type(layer).__name__}) has no gates that are known: expected "
            "keras.layers.LSTM or GRU, their cells, or kerasgrad's SimplifiedLSTM."
        )
    return values


def memory_half_life(
    model: keras.Model | keras.layers.Layer, x: Any, layer: Layer = None
) -> np.ndarray:
    """Time steps after which a half of what a cell holds is forgotten, for each unit.

        ln ½ / ⟨ln f⟩,    f the forget gate (a GRU's update gate), ⟨·⟩ over examples and steps

    Args:
        model, x, layer: as in `states`; StackedRNNCells are not taken.

    Returns:
        (units,), in time steps.

    Raises:
        ValueError: as in `gates`.

    Example:

    >>> import numpy as np
    >>> import kerasgrad as kg
    >>> layer = kg.layers.SimplifiedLSTM(2, forget_bias=0.0, kernel_initializer="zeros")
    >>> kg.bptt.memory_half_life(layer, np.ones((1, 4, 2))).tolist()
    [1.0, 1.0]

    Source: Tallec and Ollivier (2018), section 2; the article's section 5 for Π f.
    """
    values = gates(model, x, layer)
    for name in ("forget", "update"):
        if name in values:
            return half_life(values[name])
    raise ValueError(
        f"Expected a layer with one forget gate (or a GRU's update gate). It has {list(values)}."
    )


def saturation(
    model: keras.Model | keras.layers.Layer, x: Any, layer: Layer = None
) -> dict[str, np.ndarray]:
    """The share of examples and steps at which an activation is flat, for each unit.

        Φ'(a) < 0.05 · max Φ':    |tanh(a)| > 0.975;    σ(a) < 0.013 or σ(a) > 0.987

    5 % is a convention of this package.

    Args:
        model, x, layer: as in `states`.

    Returns:
        {name: (units,)} of each gate, and of "h" (SimpleRNN), "S" (SimplifiedLSTM) or "c" (LSTM:
        tanh(c_t)) where the activation is tanh or sigmoid. {} for a layer that has none of these.
        Steps that the mask leaves out do not count.

    Raises:
        ValueError: as in `states`.

    Example:

    >>> import numpy as np
    >>> import kerasgrad as kg
    >>> layer = kg.layers.SimpleRNN(2, kernel_initializer="ones")
    >>> x = np.array([0.0, 0.0, 9.0]).reshape(1, 3, 1)
    >>> kg.bptt.saturation(layer, x)["h"].round(2).tolist()
    [0.33, 0.33]
    """
    steps, layer = record(model, x, layer)
    of_states = _states(steps, layer)
    outputs = _gates(steps, layer)
    activations = {name: _gate_activation(cell) for name, cell in _named_cells(layer, outputs)}
    for name, cell in _named_cells(layer, of_states):
        if isinstance(cell, SimpleRNNCell | SimplifiedLSTMCell):
            outputs[name] = of_states[name]
        elif isinstance(cell, keras.layers.LSTMCell) and name.endswith("c"):
            outputs[name] = np.asarray(cell.activation(of_states[name]))
        else:
            continue  # A GRU's state is a mean of activations, and no activation itself.
        activations[name] = cell.activation
    unmasked = _unmasked(steps)
    return {
        name: (_RELATIVE_DERIVATIVE[activations[name]](value) < SATURATED_BELOW)[unmasked].mean(0)
        for name, value in outputs.items()
        if activations[name] in _RELATIVE_DERIVATIVE
    }


def dead_units(model: keras.Model | keras.layers.Layer, x: Any, layer: Layer = None) -> np.ndarray:
    """Which units have a state of 0 at every step of every example: ReLUs that never learn again.

    A unit that is off at one step, or for one example, is not dead.

    Args:
        model, x, layer: as in `states`; x should be large enough to stand for the data.

    Returns:
        (units,) bool, for the units of all states.

    Raises:
        ValueError: as in `states`.

    Example:

    >>> import numpy as np
    >>> import kerasgrad as kg
    >>> layer = kg.layers.SimpleRNN(2, activation="relu", kernel_initializer="ones")
    >>> x = np.array([-1.0, -1.0, 1.0]).reshape(1, 3, 1)
    >>> kg.bptt.dead_units(layer, x).tolist(), kg.bptt.dead_units(layer, -np.abs(x)).tolist()
    ([False, False], [True, True])

    Source: the article's section 5, and what is true of it.
    """
    values = states(model, x, layer).values()
    return np.concatenate([(value == 0).all(axis=(0, 1)) for value in values])


def _gates(steps: Steps, layer: keras.layers.RNN) -> dict[str, np.ndarray]:
    """The gates' values, (batch, timesteps, units), NaN at masked steps."""
    # All steps are rows of one batch: the gates need no recurrence once the states are known.
    x = tf.concat(steps.inputs, axis=0)
    before = [tf.concat(s, axis=0) for s in zip(*steps.before, strict=True)]
    cells = cells_of(layer.cell)
    values = {}
    for i, cell in enumerate(cells):
        count = len(keras.tree.flatten(cell.state_size))
        own, before = before[:count], before[count:]
        for name, value in _gate_values(cell, x, own).items():
            values[name if len(cells) == 1 else f"cell_{i}/{name}"] = value
        if i + 1 < len(cells):
            x, _ = cell(x, own)
    T, unmasked = len(steps), _unmasked(steps)
    return {
        name: np.where(
            unmasked[..., np.newaxis],
            np.moveaxis(np.reshape(value, (T, -1, value.shape[-1])), 0, 1),
            np.nan,
        )
        for name, value in values.items()
    }


def _gate_values(cell, x, states):
    if isinstance(cell, SimplifiedLSTMCell):
        return {
            "forget": cell.forget_gate(x),
            "input": cell.input_gate(x),
            "output": cell.output_gate(x),
        }
    if isinstance(cell, keras.layers.LSTMCell):
        # Keras keeps the gates' weights side by side: input, forget, candidate, output.
        a = _products(cell, x, states[0])
        if cell.use_bias:
            a += cell.bias
        i, f, _, o = tf.split(cell.recurrent_activation(a), 4, axis=-1)
        return {"forget": f, "input": i, "output": o}
    if isinstance(cell, keras.layers.GRUCell):
        # Update, reset, candidate. With reset_after there is a second bias, for h.
        a = _products(cell, x, states[0])
        if cell.use_bias:
            a += tf.reduce_sum(tf.reshape(cell.bias, [-1, 3 * cell.units]), axis=0)
        z, r, _ = tf.split(cell.recurrent_activation(a), 3, axis=-1)
        return {"update": z, "reset": r}
    return {}


def _products(cell, x, h):
    # In mixed precision the weights are more precise than what they multiply.
    dtype = cell.kernel.dtype
    return tf.cast(x, dtype) @ cell.kernel + tf.cast(h, dtype) @ cell.recurrent_kernel


def _gate_activation(cell):
    # The gates of the SimplifiedLSTM are sigmoids by definition.
    return getattr(cell, "recurrent_activation", keras.activations.sigmoid)


def _named_cells(layer, names):
    """(name, the cell that it belongs to) for names as those of `gates` and `states`."""
    cells = cells_of(layer.cell)
    for name in names:
        prefix, _, _ = name.rpartition("/")
        yield name, cells[int(prefix.removeprefix("cell_"))] if prefix else cells[0]


def _unmasked(steps):
    """(batch, timesteps) bool."""
    if steps.mask is None:
        return np.ones((len(steps.inputs[0]), len(steps)), bool)
    return np.asarray(steps.mask)


def _states(steps: Steps, layer: keras.layers.RNN) -> dict[str, np.ndarray]:
    """The states as carried on, (batch, timesteps, units)."""
    by_state = zip(*steps.carried, strict=True)
    return {
        name: np.stack([np.asarray(s_t) for s_t in s], axis=1)
        for name, s in zip(state_names(layer), by_state, strict=True)
    }
