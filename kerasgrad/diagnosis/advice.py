"""The code of each advice: to be pasted where `model` is the compiled model.

What changes the optimizer or a layer in place ends in `model.train_function = None`, without which
Keras would go on with the train step that it has compiled. What changes the layers makes a fresh
copy of the model, to be trained from its start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kerasgrad.memory import forget_bias_for_horizon

_COMPILE_ANEW = "model.train_function = None  # so that fit compiles its step anew"

_COPY = """\
optimizer, loss = type(model.optimizer).from_config(model.optimizer.get_config()), model.loss
model = keras.models.clone_model(model, clone_function=copied)
model.compile(optimizer, loss=loss)"""

FINITE_EXAMPLES = """\
import numpy as np

finite = [np.isfinite(array).all(axis=tuple(range(1, array.ndim))) for array in (x, y)]
x, y = x[finite[0] & finite[1]], y[finite[0] & finite[1]]"""

USUAL_EXAMPLES = """\
import numpy as np

def usual(array):  # not further out of the quartiles than ten times their distance
    low, high = np.quantile(array, [0.25, 0.75], axis=0)
    reach = np.where(high > low, 10 * (high - low), np.inf)
    inside = (array >= low - reach) & (array <= high + reach)
    return inside.reshape(len(array), -1).all(axis=1)

keep = usual(x) & usual(y)
x, y = x[keep], y[keep]"""

NORMALIZED_INPUT = """\
import keras

normalize = keras.layers.Normalization()
normalize.adapt(x)
x = normalize(x).numpy()  # and so every other input of the model"""

NORMALIZED_LAYERS = f"""\
import keras

def copied(layer):
    copy = type(layer).from_config(layer.get_config())
    if layer is model.layers[-1] or not layer.weights:
        return copy
    return keras.Sequential([copy, keras.layers.LayerNormalization()])

{_COPY}"""


def clip_at(norm: float) -> str:
    """Clip the whole gradient to this norm, in place of any other clipping."""
    # Where nothing usual was measured, 1: Keras refuses 0.
    norm = norm if 0 < norm < np.inf else 1.0
    return f"""\
optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
optimizer.clipnorm = optimizer.clipvalue = None
optimizer.global_clipnorm = {norm:.2g}
{_COMPILE_ANEW}"""


def set_learning_rate(rate: float) -> str:
    """Go on with a constant learning rate, in place of a schedule, too."""
    return f"""\
config = model.optimizer.get_config() | {{"learning_rate": {rate:.2g}}}
model.compile(type(model.optimizer).from_config(config), loss=model.loss)"""


def scale_learning_rate(factor: float, now: float | None = None, has_schedule: bool = False) -> str:
    """Multiply the learning rate.

    Args:
        factor: what to multiply by.
        now: the present rate, if known.
        has_schedule: whether it comes from a schedule, which cannot be multiplied.
    """
    if has_schedule and now:
        return set_learning_rate(factor * now)
    return f"model.optimizer.learning_rate = {factor:.2g} * float(model.optimizer.learning_rate)"


def layer_named(path: str) -> str:
    """An expression for the layer of this path, as far as the path tells it."""
    return f"model.get_layer({path.rpartition('/')[2]!r})"


def gated_layer(layer: str, timesteps: int, is_replaceable: bool = True) -> str:
    """Put a SimplifiedLSTM in place of a recurrent layer.

    Args:
        layer: an expression for the layer.
        timesteps: the length of the sequences.
        is_replaceable: whether the model can be copied with another layer in this place; if not,
            the code is that of the new layer alone.
    """
    head = f"""\
import keras
import kerasgrad

old = {layer}
new = kerasgrad.layers.SimplifiedLSTM(
    old.cell.units,
    project_input=True,
    forget_bias={forget_bias_for_horizon(timesteps):.2f},  # ln(T / ln 2), T = {timesteps}
    return_sequences=old.return_sequences,
)"""
    if not is_replaceable:
        return f"{head}  # to stand in place of `old` where the model is made"
    return f"""\
{head}

def copied(layer):
    return new if layer is old else type(layer).from_config(layer.get_config())

{_COPY}"""


# The forget gate's part of its bias. In Keras a GRU's update gate keeps the old state where it is
# open, and with reset_after there are two biases, which add up.
_FORGET_BIAS = {
    "lstm": ("bias", "bias[cell.units : 2 * cell.units] = {0}"),
    "gru": ("bias", "bias[..., : cell.units] = {0} / (bias.size // (3 * cell.units))"),
    "simplified_lstm": ("bias_f", "bias[:] = {0}"),
}


def forget_bias(layer: str, cell: str, timesteps: int) -> str:
    """Give the forget gate a bias with which half of the state is left after T steps.

    Args:
        layer: an expression for the layer.
        cell: "lstm", "gru" or "simplified_lstm".
        timesteps: T, the length of the sequences.
    """
    variable, assignment = _FORGET_BIAS[cell]
    return f"""\
cell = {layer}.cell
bias = cell.{variable}.numpy()
{assignment.format(f"{forget_bias_for_horizon(timesteps):.2f}")}  # ln(T / ln 2), T = {timesteps}
cell.{variable}.assign(bias)"""


def leaky_relu(layers: Sequence[str]) -> str:
    """Give these layers (or cells) a slope below 0, so that what is off can come back.

    Args:
        layers: an expression for each.
    """
    return f"""\
import keras

for layer in ({", ".join(layers)},):
    if isinstance(layer, keras.layers.ReLU):
        layer.negative_slope = 0.1
    else:
        layer.activation = keras.activations.leaky_relu
{_COMPILE_ANEW}"""


def drawn_anew(weights: Sequence[str]) -> str:
    """Give the kernels among these weights random values of the usual scale.

    Args:
        weights: their paths.
    """
    paths = ",\n    ".join(map(repr, weights))
    return f"""\
import keras

paths = [
    {paths},
]
for variable in model.trainable_variables:
    if variable.path in paths and len(variable.shape) > 1:
        is_recurrent = variable.name == "recurrent_kernel"
        scheme = keras.initializers.Orthogonal if is_recurrent else keras.initializers.GlorotUniform
        variable.assign(scheme()(variable.shape))"""
