"""A recurrent layer inside of its model, run step by step, so that each step can be looked at.

Keras's layers run their recurrence as one compiled loop, whose states nobody sees. Here the layer's
`inner_loop` is replaced, on this one object and for one call of the model, by Keras's own loop
unrolled (`keras.layers.RNN(cell, unroll=True)`) around a cell that keeps what it is given and what
it returns. All else is the model's own: its other layers, masks, initial states, the direction.

With o_t, s_t = F(x_t, s_{t-1}; w) the cell, what means different things is a tensor of its own,
also where a cell returns one for all:

    s_t as computed           whatever follows from it, at step t or later, is on the tape
    s_t as carried on         what the next step takes; where the mask leaves out step t, s_{t-1}
    o_t as handed out         what the layers above take
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from kerasgrad.keras_private import all_layers
from kerasgrad.layers import SimplifiedLSTMCell


@dataclass
class Steps:
    """What happened at the T steps of one call of a recurrent layer, in the layer's own order.

    - inputs: x_t, (batch, features)
    - before: the states that step t was given, as carried on from step t - 1
    - weights: step t's copies of the cell's trainable weights, where copies were asked for
    - outputs: o_t as handed out
    - after: the states as the cell computed them
    - final: the states as carried on from step T
    - structure: how the cell nests its states
    - mask: (batch, T) bool, or None
    """

    cell: Any
    inputs: list[tf.Tensor] = field(default_factory=list)
    before: list[list[tf.Tensor]] = field(default_factory=list)
    weights: list[list[tf.Tensor]] = field(default_factory=list)
    outputs: list[tf.Tensor] = field(default_factory=list)
    after: list[list[tf.Tensor]] = field(default_factory=list)
    final: list[tf.Tensor] = field(default_factory=list)
    structure: Any = None
    mask: tf.Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def carried(self) -> list[list[tf.Tensor]]:
        """The states that each step carried on to the next."""
        return [*self.before[1:], self.final]

    def run(
        self, inputs: tf.Tensor, states: list[tf.Tensor], weights: list[tf.Tensor]
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The cell's output and new states, with these weights (or its own), for any rows."""
        cell = self.cell
        states = keras.tree.pack_sequence_as(self.structure, states)
        copies = list(zip(cell.trainable_variables, weights, strict=True)) if weights else []
        # The scope also keeps the cell from drawing seeds for a dropout that is not applied.
        with keras.StatelessScope(copies):
            output, after = cell(inputs, states)
        for one in cells_of(cell):
            # Some versions keep a mask, of this batch size, even where none is applied.
            if hasattr(one, "reset_dropout_mask"):
                one.reset_dropout_mask()
                one.reset_recurrent_dropout_mask()
        return output, keras.tree.flatten(after)


@contextmanager
def unrolled(
    layer: keras.layers.RNN,
    tape: tf.GradientTape | None = None,
    *,
    copies_of_weights: bool = False,
    carries_gradients: bool = True,
) -> Iterator[Steps]:
    """While it lasts, a call of the layer fills the Steps.

    Args:
        layer: any Keras recurrent layer.
        tape: watches all tensors of the Steps.
        copies_of_weights: each step uses its own copies of the cell's trainable weights: the
            gradient with respect to a copy is the step's share.
        carries_gradients: False cuts the tape between step and step.

    Raises:
        ValueError: when the layer was not called exactly once.
    """
    steps = Steps(layer.cell)
    calls = 0

    def watched(tensor):
        if tape is not None:
            tape.watch(tensor)
        return tensor

    def cell(inputs, states):
        steps.structure = states
        before = [watched(state) for state in keras.tree.flatten(states)]
        given = [tf.identity(s) if carries_gradients else tf.stop_gradient(s) for s in before]
        weights = steps.cell.trainable_variables if copies_of_weights else []
        weights = [watched(tf.identity(weight.value)) for weight in weights]
        output, after = steps.run(inputs, given, weights)
        after = [watched(state) for state in after]
        output = watched(tf.identity(output))
        for kept, value in (
            (steps.inputs, inputs),
            (steps.before, before),
            (steps.weights, weights),
            (steps.outputs, output),
            (steps.after, after),
        ):
            kept.append(value)
        carried = [tf.identity(state) for state in after]
        return output, keras.tree.pack_sequence_as(states, carried)

    def inner_loop(sequences, initial_state, mask, training=False):
        nonlocal calls
        calls += 1
        loop = keras.layers.RNN(
            _Cell(cell, steps.cell.state_size),
            return_sequences=layer.return_sequences,
            go_backwards=layer.go_backwards,
            zero_output_for_mask=layer.zero_output_for_mask,
            unroll=True,
            name=layer.name,  # Or each call would count on in Keras's automatic names.
        )
        # A list of masks when the layer is called with an initial state.
        mask = (keras.tree.flatten(mask) or [None])[0]
        if mask is not None:
            mask = tf.reshape(tf.cast(mask, tf.bool), tf.shape(mask)[:2])
            steps.mask = tf.reverse(mask, [1]) if layer.go_backwards else mask
        # A stateful layer hands in its variables.
        initial_state = keras.tree.map_structure(tf.convert_to_tensor, initial_state)
        last_output, outputs, states = loop.inner_loop(sequences, initial_state, mask)
        steps.final = [watched(tf.identity(state)) for state in keras.tree.flatten(states)]
        return last_output, outputs, keras.tree.pack_sequence_as(states, steps.final)

    replaced = vars(layer).get("inner_loop")
    # Past Keras's __setattr__, which would track the function as a part of the layer.
    object.__setattr__(layer, "inner_loop", inner_loop)
    try:
        yield steps
    finally:
        if replaced is None:
            object.__delattr__(layer, "inner_loop")
        else:
            object.__setattr__(layer, "inner_loop", replaced)
    if calls != 1:
        raise ValueError(
            f"Expected a model that calls its layer {layer.path!r} once. It was called {calls} "
            "times: there is not one gradient for each of its time steps."
        )


@dataclass
class _Cell:
    """The least that keras.layers.RNN takes for a cell."""

    call: Any
    state_size: Any

    def __call__(self, inputs, states):
        return self.call(inputs, states)


def record(
    model: keras.Model | keras.layers.Layer, x: Any, layer: str | keras.layers.RNN | None
) -> tuple[Steps, keras.layers.RNN]:
    """The Steps of a recurrent layer while the model is called on x, and the layer."""
    x = tensors(x)
    build(model, x)
    layer = recurrent_layer(model, layer)
    with unchanged(model), unrolled(layer) as steps:
        model(x, training=False)
    return steps, layer


@contextmanager
def unchanged(model: keras.Model | keras.layers.Layer) -> Iterator[None]:
    """Afterwards what a call in inference mode may change is as before.

    These are the variables that no optimizer trains (the states of stateful layers, statistics,
    the seeds of dropout) and the metrics.
    """
    variables = [*model.non_trainable_variables, *getattr(model, "metrics_variables", ())]
    # Keras does not count the states of a stateful layer among a model's variables.
    for layer in (model, *all_layers(model)):
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            variables += keras.tree.flatten(layer.states)
    before = [tf.identity(variable.value) for variable in variables]
    eagerly = tf.config.functions_run_eagerly()
    # A model may wrap its call in a tf.function, whose tensors nobody outside can see.
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(eagerly)
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def tensors(arrays: Any) -> Any:
    """Arrays, nested as they may be, as tensors."""
    return keras.tree.map_structure(tf.convert_to_tensor, arrays)


def build(model: keras.Model | keras.layers.Layer, x: Any) -> None:
    """Make the weights of a model that waits for its first input to know their shapes."""
    if not model.built:
        model(x, training=False)
        for layer in recurrent_layers(model).values():
            if layer.stateful:
                layer.reset_state()


def recurrent_layers(model: keras.Model | keras.layers.Layer) -> dict[str, keras.layers.RNN]:
    """{path: layer} of every Keras recurrent layer in a model, at any depth, in order of creation.

    A Bidirectional has two, one for each direction.

    Args:
        model: a built Keras model, or a layer.

    Raises:
        ValueError: when the model is not built, so that its layers have no paths.

    Example:

    >>> import keras
    >>> from kerasgrad import bptt
    >>> model = keras.Sequential(
    ...     [keras.Input((5, 2)), keras.layers.Bidirectional(keras.layers.LSTM(3, name="lstm"))]
    ... )
    >>> [layer.name for layer in bptt.recurrent_layers(model).values()]
    ['forward_lstm', 'backward_lstm']
    """
    if isinstance(model, keras.layers.RNN):
        return {model.path: model}
    if not model.built:
        raise ValueError(
            f"Expected a built model. Received {model.name!r}, whose weights do not exist yet: "
            "call it on an input, or start it with keras.Input."
        )
    found = [layer for layer in all_layers(model) if isinstance(layer, keras.layers.RNN)]
    order = {id(variable): i for i, variable in enumerate(model.variables)}

    def first_weight(layer):
        return min((order.get(id(v), len(order)) for v in layer.variables), default=len(order))

    return {layer.path: layer for layer in sorted(found, key=first_weight)}


def recurrent_layer(
    model: keras.Model | keras.layers.Layer, layer: str | keras.layers.RNN | None
) -> keras.layers.RNN:
    """The one recurrent layer that is meant.

    Args:
        model: a built model, or a recurrent layer.
        layer: a name, a path or the end of one, or the layer itself; None for the only one.

    Raises:
        ValueError: when there is none, several and no name, or none or several of this name.
    """
    layers = recurrent_layers(model)
    if not layers:
        raise ValueError(
            f"Expected a model with a recurrent layer, keras.layers.RNN or one derived from it. "
            f"{model.name!r} has {', '.join(type(one).__name__ for one in all_layers(model))}."
        )
    if layer is None:
        named = list(layers.values())
        wish = "none was named"
    else:
        named = [one for path, one in layers.items() if layer is one or _is_end(layer, path)]
        wish = f"received layer={getattr(layer, 'path', layer)!r}"
    if len(named) != 1:
        raise ValueError(
            f"Expected the name, the path or the object of one recurrent layer of model "
            f"{model.name!r}: {', '.join(map(repr, layers))}; {wish}."
        )
    return named[0]


def _is_end(name, path):
    return isinstance(name, str) and f"/{path}".endswith(f"/{name}")


def cells_of(cell: Any) -> list[Any]:
    """The cell itself, or those in a StackedRNNCells."""
    return list(cell.cells) if isinstance(cell, keras.layers.StackedRNNCells) else [cell]


def state_names(layer: keras.layers.RNN) -> list[str]:
    """A name for each state of the layer, in the order of its flat list of states."""
    cells = cells_of(layer.cell)
    names = [_state_names(cell) for cell in cells]
    if len(cells) == 1:
        return names[0]
    return [f"cell_{i}/{name}" for i, of_cell in enumerate(names) for name in of_cell]


def _state_names(cell):
    if isinstance(cell, keras.layers.LSTMCell):
        return ["h", "c"]
    if isinstance(cell, SimplifiedLSTMCell):
        return ["S"]
    count = len(keras.tree.flatten(cell.state_size))
    return ["h"] if count == 1 else [f"state_{i}" for i in range(count)]
