"""What a diagnosis needs to know of a Keras model and a batch of its data, as plain arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kerasgrad import bptt
from kerasgrad.bptt.units import SATURATED_BELOW
from kerasgrad.bptt.unrolled import build, tensors, unchanged
from kerasgrad.keras_private import all_layers, updating_optimizer
from kerasgrad.layers import SimplifiedLSTMCell

_RELU = (keras.activations.relu, keras.activations.relu6)

# The derivative as a function of the activation's output, over the largest derivative.
_RELATIVE_DERIVATIVE = {
    keras.activations.tanh: lambda value: 1 - value**2,
    keras.activations.sigmoid: lambda value: 4 * value * (1 - value),
}

_CELLS = {
    keras.layers.LSTMCell: "lstm",
    keras.layers.GRUCell: "gru",
    SimplifiedLSTMCell: "simplified_lstm",
}


@dataclass(frozen=True)
class Activity:
    """What the units of one layer did.

    - layer: its path
    - active: (units,) share of the values (examples, steps, places of a convolution) that are not
      0, for ReLU; None for other activations
    - saturated: {"tanh", "sigmoid", or the state or gate of a recurrent layer: (units,) share of
      the values at which the derivative is below 5 % of its largest}
    """

    layer: str
    active: np.ndarray | None = None
    saturated: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Recurrent:
    """What one recurrent layer is like.

    - cell: "lstm", "gru", "simplified_lstm", or None for another, and for one without bias
    - is_replaceable: whether a copy of the model can have another layer in its place
    - timesteps: how many it was given
    - half_life: (units,) time steps after which a half is forgotten; None without a forget gate
    """

    cell: str | None
    is_replaceable: bool
    timesteps: int
    half_life: np.ndarray | None


@dataclass(frozen=True)
class Measurements:
    """A model and a batch, measured.

    - clipping: {"clipnorm" | "global_clipnorm" | "clipvalue": threshold} of the optimizer
    - learning_rate: the present one; NaN without optimizer
    - has_schedule: whether that comes from a schedule
    - weight_sizes: {weight path: how many numbers}
    - input_scale: root mean square of x; NaN where x was not given
    - nonfinite_examples: how many examples of x, y have a NaN or an Inf
    - expressions: {layer path: code that finds it in `model`}
    - activities, recurrent: of the layers; None and {} where x was not given
    - state_norms: {layer path: {state: (T,) batch mean of ‖∂L/∂s_t‖₂}}; None without y
    - zero_gradients: share of the entries of the model's gradient that are 0; None without y
    - loss, shuffled_loss: the model's loss without regularization, on x and y and on x with the
      targets of other examples; the same for a model that makes no use of x; NaN without y
    - skipped: {layer path: why it could not be measured}
    """

    clipping: dict[str, float]
    learning_rate: float
    has_schedule: bool
    weight_sizes: dict[str, int]
    expressions: dict[str, str]
    input_scale: float = np.nan
    nonfinite_examples: int = 0
    activities: list[Activity] | None = None
    recurrent: dict[str, Recurrent] = field(default_factory=dict)
    state_norms: dict[str, dict[str, np.ndarray]] | None = None
    zero_gradients: float | None = None
    loss: float = np.nan
    shuffled_loss: float = np.nan
    skipped: dict[str, str] = field(default_factory=dict)


def measure(model: keras.Model, x: Any = None, y: Any = None) -> Measurements:
    """Measure a model on one batch, in inference mode; the model is afterwards as it was.

    Args:
        model: a built Keras model; compiled, where y is given.
        x: what `fit` takes as x, as arrays, some hundred examples of it; None for what the
            optimizer and the weights tell alone.
        y: what `fit` takes as y.

    Raises:
        ValueError: for something else than a Keras model, for y without x, for x and y of
            different lengths, and for a model that is not compiled where y is given.

    Example:

    >>> import keras, numpy as np
    >>> layer = keras.layers.Dense(2, activation="relu", kernel_initializer="ones", name="hidden")
    >>> model = keras.Sequential([keras.Input((1,)), layer])
    >>> measured = measure(model, np.array([[-1.0], [-1.0], [1.0]]))
    >>> measured.activities[0].active.round(2).tolist()
    [0.33, 0.33]
    >>> measured.expressions[layer.path]
    "model.get_layer('hidden')"
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received {type(model).__name__}.")
    if x is None and y is not None:
        raise ValueError("Received y without x: pass both, as fit takes them.")
    if x is None:
        return Measurements(**_of_the_optimizer(model), **_of_the_weights(model))
    if y is not None and not model.compiled:
        raise ValueError(
            f"Received y, and model {model.name!r} has no loss to compare it with: call "
            "model.compile(optimizer=..., loss=...) first, or leave y out."
        )
    lengths = sorted({len(array) for array in keras.tree.flatten((x, y)) if array is not None})
    if len(lengths) != 1:
        raise ValueError(
            f"Expected as many examples in x as in y. Received arrays of lengths {lengths}."
        )
    nonfinite, scale = _of_the_data(x, y)
    x, y = tensors(x), None if y is None else tensors(y)
    build(model, x)
    activities, recurrent, state_norms, skipped = _of_feed_forward_layers(model, x), {}, {}, {}
    for path, layer in bptt.recurrent_layers(model).items():
        try:
            activity, recurrent[path] = _of_a_recurrent_layer(model, x, layer)
            if y is not None:
                state_norms[path] = {
                    name: np.linalg.norm(λ.astype(np.float64), axis=-1).mean(axis=0)
                    for name, λ in bptt.state_gradients(model, x, y, layer).items()
                }
        except ValueError as error:  # It is called twice, or has no part in the loss.
            skipped[path] = str(error).partition("\n")[0]
            recurrent.pop(path, None)
        else:
            activities.append(activity)
    return Measurements(
        **_of_the_optimizer(model),
        **_of_the_weights(model),
        input_scale=scale,
        nonfinite_examples=nonfinite,
        activities=activities,
        recurrent=recurrent,
        state_norms=None if y is None else state_norms,
        **({} if y is None else _of_the_loss(model, x, y)),
        skipped=skipped,
    )


def _of_the_optimizer(model):
    if getattr(model, "optimizer", None) is None:  # Not compiled, or without one.
        return {"clipping": {}, "learning_rate": np.nan, "has_schedule": False}
    optimizer = updating_optimizer(model.optimizer)
    names = ("clipnorm", "global_clipnorm", "clipvalue")
    thresholds = {name: getattr(optimizer, name, None) for name in names}
    return {
        "clipping": {name: float(c) for name, c in thresholds.items() if c},
        "learning_rate": float(optimizer.learning_rate),
        "has_schedule": isinstance(optimizer.get_config().get("learning_rate"), dict),
    }


def _of_the_weights(model):
    return {
        "weight_sizes": {v.path: int(np.prod(v.shape)) for v in model.trainable_variables},
        "expressions": _expressions(model),
    }


def _of_the_data(x, y):
    """(how many examples are not finite, root mean square of x's floating-point arrays)."""
    bad, squares, count = False, 0.0, 0
    for structure in (x, y):
        for array in keras.tree.flatten(structure):
            array = np.asarray(array)
            if array.dtype.kind != "f":
                continue
            finite = np.isfinite(array)
            bad = bad | ~finite.reshape(len(array), -1).all(axis=1)
            if structure is x:
                squares += np.square(array[finite], dtype=np.float64).sum()
                count += np.count_nonzero(finite)
    return int(np.sum(bad)), float(np.sqrt(squares / count)) if count else np.nan


def _of_feed_forward_layers(model, x):
    """The activities of layers with ReLU, tanh or sigmoid that have no time of their own."""
    layers = [layer for layer in all_layers(model) if _activation_of(layer) is not None]
    counts: dict[int, list] = {id(layer): [] for layer in layers}

    def watch(layer, output):
        axes = tuple(a for a in range(output.ndim) if a != _unit_axis(layer, output.ndim))
        activation, value = _activation_of(layer), np.asarray(output, np.float64)
        derivative = _RELATIVE_DERIVATIVE.get(activation)
        hit = value != 0 if derivative is None else derivative(value) < SATURATED_BELOW
        hits = hit.sum(axis=axes)
        counts[id(layer)].append((output, hits, hit.size // hits.size))

    with unchanged(model), _watched(layers, watch):
        y_pred = keras.tree.flatten(model(x, training=False))
    found = []
    for layer in layers:
        calls = counts[id(layer)]
        if not calls:
            continue
        share = sum(hits for _, hits, _ in calls) / sum(n for _, _, n in calls)
        name = _activation_of(layer).__name__
        if _activation_of(layer) in _RELU:
            found.append(Activity(_path(layer), active=share))
        # A classifier's own output is to be near 0 and 1.
        elif not any(output is y for output, _, _ in calls for y in y_pred):
            found.append(Activity(_path(layer), saturated={name: share}))
    return found


def _path(layer):
    # Some layers without weights have no path in Keras.
    return layer.path or layer.name


def _activation_of(layer):
    """The activation of a feed-forward layer, if it is one that is looked at."""
    if isinstance(layer, keras.layers.RNN) or hasattr(layer, "state_size"):
        return None
    if isinstance(layer, keras.layers.ReLU):
        return None if layer.negative_slope or layer.threshold else keras.activations.relu
    activation = getattr(layer, "activation", None)
    is_known = any(activation is known for known in (*_RELU, *_RELATIVE_DERIVATIVE))
    return activation if is_known else None


def _unit_axis(layer, rank):
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


@contextmanager
def _watched(layers, watch) -> Iterator[None]:
    """While it lasts, watch(layer, output) is called after each call of these layers."""

    def watching(layer, call):
        def watched_call(*args, **kwargs):
            output = call(*args, **kwargs)
            watch(layer, output)
            return output

        return watched_call

    for layer in layers:
        # Past Keras's __setattr__, which would track the function as a part of the layer.
        object.__setattr__(layer, "call", watching(layer, layer.call))
    try:
        yield
    finally:
        for layer in layers:
            object.__delattr__(layer, "call")


def _of_a_recurrent_layer(model, x, layer):
    states = bptt.states(model, x, layer)
    timesteps = next(iter(states.values())).shape[1]
    cell = next((name for type_, name in _CELLS.items() if isinstance(layer.cell, type_)), None)
    saturated = bptt.saturation(model, x, layer)
    half_life, gates = None, {}
    if cell is not None:
        gates = bptt.gates(model, x, layer)
        # A model of NaN has no memory that could be measured.
        if np.isfinite(gates["update" if cell == "gru" else "forget"]).any():
            half_life = bptt.memory_half_life(model, x, layer)
    for name, value in gates.items():
        # A gate that is always open hands on both the state and the gradient.
        open_steps = np.count_nonzero(value > 1 - SATURATED_BELOW / 4, axis=(0, 1))
        always_open = open_steps > 0.99 * np.count_nonzero(~np.isnan(value), axis=(0, 1))
        saturated[name] = np.where(always_open, 0, saturated[name])
    active = None
    if getattr(layer.cell, "activation", None) in _RELU:
        active = np.mean(next(iter(states.values())) != 0, axis=(0, 1))
    has_bias = getattr(layer.cell, "use_bias", False)
    is_copied_by_layers = isinstance(model, keras.Sequential) or hasattr(model, "operations")
    is_replaceable = is_copied_by_layers and any(layer is own for own in model.layers)
    return (
        Activity(layer.path, active, saturated),
        Recurrent(cell if has_bias else None, is_replaceable, timesteps, half_life),
    )


def _of_the_loss(model, x, y):
    order = np.random.default_rng(0).permutation(len(keras.tree.flatten(y)[0]))
    shuffled = keras.tree.map_structure(lambda array: tf.gather(array, order), y)
    with unchanged(model), tf.GradientTape() as tape:
        y_pred = model(x, training=False)
        loss = model.compute_loss(x=x, y=y, y_pred=y_pred)
        of_shuffled = model.compute_loss(x=x, y=shuffled, y_pred=y_pred)
        penalty = sum(float(penalty) for penalty in model.losses)
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    arrays = [np.asarray(tf.convert_to_tensor(g)) for g in gradients if g is not None]
    zeros, size = sum(np.sum(a == 0) for a in arrays), sum(a.size for a in arrays)
    return {
        "zero_gradients": float(zeros / size) if size else 1.0,
        "loss": float(loss) - penalty,
        "shuffled_loss": float(of_shuffled) - penalty,
    }


def _expressions(model):
    """{layer path: code that finds it}, for layers of models, and attributes of other layers."""
    found, queue = {}, [("model", model)]
    for code, layer in queue:  # Grows while it is walked, so what is near comes first.
        if isinstance(layer, keras.Model):
            inner = [(f"{code}.get_layer({own.name!r})", own) for own in layer.layers]
        else:
            inner = [(f"{code}.{name}", value) for name, value in vars(layer).items()]
            inner += [
                (f"{inner_code}[{i}]", part)
                for inner_code, value in inner
                if isinstance(value, list | tuple)
                for i, part in enumerate(value)
            ]
        for inner_code, value in inner:
            if isinstance(value, keras.layers.Layer) and _path(value) not in found:
                found[_path(value)] = inner_code
                queue.append((inner_code, value))
    return found
