"""∂L/∂s_t, and each time step's share of the gradient of a recurrent layer's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kerasgrad.bptt.unrolled import (
    Steps,
    build,
    recurrent_layer,
    state_names,
    tensors,
    unchanged,
    unrolled,
)

Layer = str | keras.layers.RNN | None


def state_gradients(
    model: keras.Model, x: Any, y: Any, layer: Layer = None, *, sample_weight: Any = None
) -> dict[str, np.ndarray]:
    """∂L/∂s_t of a recurrent layer in its model, for each example, time step and unit.

        λ_t = ∂L/∂s_t,    L the loss that the model was compiled with

    λ_t is the total derivative: it holds each way from s_t as the cell computes it to the loss,
    through the later steps and through the outputs of step t itself. So the "c" of an LSTM counts
    its way through h_t, as in the usual BPTT of the LSTM. Where the mask leaves out step t, s_t is
    s_{t-1} carried on.

    The model runs in inference mode (no dropout). Its weights, states, metrics and seeds are
    afterwards as they were.

    Args:
        model: a compiled Keras model. L is the mean over the batch where its loss is, as Keras's
            are: each example's ∂L/∂s_t then carries the factor 1/batch.
        x, y: what `fit` takes, as arrays: one batch.
        layer: the name or path of the recurrent layer, or the layer; None for the only one.
        sample_weight: as in `fit`.

    Returns:
        {"h": (batch, timesteps, units)}; an LSTM has "h" and "c", kerasgrad's SimplifiedLSTM "S",
        StackedRNNCells "cell_0/h" and so on, other cells with several states "state_0" and so on.
        t counts the steps in the order that the layer takes them. Loss scale undone.

    Raises:
        ValueError: for a model that is not compiled, has no recurrent layer, several and none
            named, or calls it more than once; for x and y of different lengths; for a loss that
            does not depend on the layer.

    Example:

    >>> import keras, numpy as np
    >>> from kerasgrad import bptt
    >>> layer = keras.layers.SimpleRNN(
    ...     2, activation="linear", recurrent_initializer=keras.initializers.Identity(0.5)
    ... )
    >>> model = keras.Sequential([keras.Input((4, 1)), layer])
    >>> model.compile(loss=lambda y, y_pred: y_pred[:, :1])
    >>> bptt.state_gradients(model, np.ones((1, 4, 1)), np.zeros((1, 1)))["h"][0, :, 0].tolist()
    [0.125, 0.25, 0.5, 1.0]

    Source: Pascanu, Mikolov and Bengio (2013), equations 3 to 5; the article's equation 4.
    """
    gradients, steps, layer = _differentiate(
        model, x, y, layer, sample_weight, lambda steps: [steps.after, steps.carried]
    )
    computed, carried = gradients
    # Neither the outputs nor the next step see what the cell computed at a masked step.
    if steps.mask is not None:
        masks = tf.unstack(steps.mask, axis=1)
        computed = [
            [tf.where(fit(mask, c), c, k) for c, k in zip(c_t, k_t, strict=True)]
            for mask, c_t, k_t in zip(masks, computed, carried, strict=True)
        ]
    by_state = zip(*computed, strict=True)
    return {
        name: np.stack([np.asarray(λ_t) for λ_t in λ], axis=1)
        for name, λ in zip(state_names(layer), by_state, strict=True)
    }


class Contributions(dict):
    """{weight path: (T, *weight.shape)}: shares of ∂L/∂w that add up to it.

    With G_i the i-th share of a weight, i the time step or, where `by_lag`, the number of steps
    that the gradient travelled:

        ∂L/∂w = Σ_i G_i
    """

    def __init__(self, shares: Mapping[str, np.ndarray], by_lag: bool):
        super().__init__(shares)
        self.by_lag = by_lag

    @property
    def norms(self) -> dict[str, np.ndarray]:
        """{weight path: (T,)}: ‖G_i‖₂."""
        return {path: _norms(G.reshape(len(G), -1).astype(np.float64)) for path, G in self.items()}

    @property
    def cancellation(self) -> dict[str, float]:
        """{weight path: ‖Σ_i G_i‖ / Σ_i ‖G_i‖}: 1 where all shares point the same way, 0 where
        they cancel each other; NaN where there is no gradient."""
        with np.errstate(invalid="ignore"):
            return {
                path: float(_norms(G.sum(axis=0, dtype=np.float64).reshape(1, -1))[0] / norms.sum())
                for (path, G), norms in zip(self.items(), self.norms.values(), strict=True)
            }

    def horizon(self, q: float = 0.9) -> dict[str, int]:
        """{weight path: the smallest lag ℓ with Σ_{k≤ℓ} ‖G_k‖ >= q · Σ_k ‖G_k‖}: how far back the
        layer learns from.

        Args:
            q: the share of the norms, in (0, 1].

        Raises:
            ValueError: for shares by time step, or for another q.
        """
        if not self.by_lag:
            raise ValueError(
                "The horizon is a number of steps that gradients travelled. These are shares by "
                "time step: use step_contributions(..., by_lag=True)."
            )
        if not 0 < q <= 1:
            raise ValueError(f"q must be a share in (0, 1]. Received: {q!r}.")
        horizons = {}
        for path, norms in self.norms.items():
            upto = np.cumsum(norms)
            horizons[path] = int(np.argmax(upto >= q * upto[-1]))
        return horizons


def step_contributions(
    model: keras.Model,
    x: Any,
    y: Any,
    layer: Layer = None,
    *,
    by_lag: bool = False,
    sample_weight: Any = None,
) -> Contributions:
    """Each time step's share of the gradient of a recurrent layer's weights.

        ∂L/∂w = Σ_k G_k,    G_k = ∂L/∂s_k · ∂⁺s_k/∂w

    ∂⁺ is the immediate derivative, with s_{k-1} held fixed: the share of step k is the gradient
    with respect to the copy of w that step k uses. With by_lag=True the shares are told apart by
    the number of steps ℓ that the gradient travelled, from the step t whose output the loss saw to
    the step k = t - ℓ that used w:

        Δ_t^0 = ∂⁺L/∂(o_t, s_t),    Δ_k^ℓ = (∂s_{k+1}/∂s_k)ᵀ Δ_{k+1}^{ℓ-1}
        G_ℓ = Σ_k (∂⁺s_k/∂w)ᵀ Δ_k^ℓ

    Both sum to the gradient of the model's loss, its regularization left out: a penalty on a
    weight belongs to no time step. The time grows linearly with T; by_lag=True takes T passes over
    all steps, so T².

    Args:
        model, x, y, layer, sample_weight: as in `state_gradients`.
        by_lag: shares by lag, instead of by time step.

    Returns:
        {weight path: (T, *weight.shape)}, with `norms`, `cancellation` and `horizon()`; for each
        trainable weight of the layer's cell.

    Raises:
        ValueError: as in `state_gradients`, and when the layer has no trainable weight.

    Example:

    >>> import keras, numpy as np
    >>> from kerasgrad import bptt
    >>> model = keras.Sequential([keras.Input((7, 2)), keras.layers.GRU(3), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = np.ones((4, 7, 2)), np.ones((4, 1))
    >>> shares = bptt.step_contributions(model, x, y, by_lag=True)
    >>> [share.shape for share in shares.values()]
    [(7, 2, 9), (7, 3, 9), (7, 2, 9)]
    >>> all(0 < lag < 7 for lag in shares.horizon(0.9).values())
    True

    Source: the article's equations 5 and 6; Pascanu, Mikolov and Bengio (2013), equations 3 to 5.
    """
    if by_lag:
        gradients, steps, layer = _differentiate(
            model,
            x,
            y,
            layer,
            sample_weight,
            lambda steps: [steps.outputs, steps.final],
            copies_of_weights=True,
            carries_gradients=False,
        )
        shares = _by_lag(steps, *gradients)
    else:
        (shares,), steps, layer = _differentiate(
            model, x, y, layer, sample_weight, lambda steps: [steps.weights], copies_of_weights=True
        )
    paths = [weight.path for weight in layer.cell.trainable_variables]
    return Contributions(
        {
            path: np.stack([np.asarray(G) for G in by_weight])
            for path, by_weight in zip(paths, zip(*shares, strict=True), strict=True)
        },
        by_lag,
    )


def _by_lag(steps, of_outputs, of_final):
    """G_ℓ of each weight for ℓ = 0..T-1, from ∂L/∂o_t as handed out and ∂L/∂s_T.

    Every step is one row more of the same function, so one pass takes all gradients one step back.
    """
    T = len(steps)
    inputs = tf.concat(steps.inputs, axis=0)
    before = [tf.concat(states, axis=0) for states in zip(*steps.before, strict=True)]
    weights = steps.weights[0]
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch([weights, before])
        output, after = steps.run(inputs, before, weights)
        if steps.mask is not None:
            mask = tf.reshape(tf.transpose(steps.mask), [-1])
            after = [tf.where(fit(mask, a), a, b) for a, b in zip(after, before, strict=True)]
        # One tensor for both would hand the gradient of one to the other.
        output, after = tf.identity(output), [tf.identity(state) for state in after]

    def one_step_back(targets, gradients):
        return tape.gradient(targets, [weights, before], gradients, unconnected_gradients="zero")

    def from_next_step(gradients, of_last):
        """The gradients of the states given to steps 1..T as those of the states after 1..T."""
        return [
            tf.concat([gradient[len(last) :], last], axis=0)
            for gradient, last in zip(gradients, of_last, strict=True)
        ]

    nothing = [tf.zeros_like(gradient) for gradient in of_final]
    of_after = from_next_step([tf.zeros_like(state) for state in before], of_final)
    G, of_before = one_step_back([output, *after], [tf.concat(of_outputs, axis=0), *of_after])
    shares = [G]
    while len(shares) < T and any(bool(tf.reduce_any(g != 0)) for g in of_before):
        G, of_before = one_step_back(after, from_next_step(of_before, nothing))
        shares.append(G)
    zeros = [tf.zeros_like(weight) for weight in weights]
    return shares + [zeros] * (T - len(shares))


def _differentiate(
    model: keras.Model,
    x: Any,
    y: Any,
    layer: Layer,
    sample_weight: Any,
    of: Callable[[Steps], list],
    **how: bool,
) -> tuple[list, Steps, keras.layers.RNN]:
    """The gradients of the model's loss with respect to tensors `of` the layer's Steps."""
    if not getattr(model, "compiled", False):
        raise ValueError(
            f"Expected a compiled model, whose loss is differentiated. Received {model.name!r}, "
            "which is not: call model.compile(optimizer=..., loss=...) first."
        )
    x, y = tensors(x), tensors(y)
    arrays = [array for array in keras.tree.flatten((x, y, sample_weight)) if array is not None]
    lengths = sorted({len(array) for array in arrays})
    if len(lengths) != 1:
        raise ValueError(
            f"Expected as many examples in x as in y. Received arrays of lengths {lengths}."
        )
    build(model, x)
    layer = recurrent_layer(model, layer)
    if how.get("copies_of_weights") and not layer.cell.trainable_variables:
        raise ValueError(
            f"Layer {layer.path!r} has no trainable weight, so no gradient to take apart. Set "
            "its `trainable` to True."
        )
    with (
        unchanged(model),
        tf.GradientTape(watch_accessed_variables=False) as tape,
        unrolled(layer, tape, **how) as steps,
    ):
        y_pred = model(x, training=False)
        loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
        loss, scale = _scaled(model.optimizer, loss)
    sources = of(steps)
    gradients = keras.tree.flatten(tape.gradient(loss, sources))
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"The loss of model {model.name!r} does not depend on its layer {layer.path!r}."
        )
    gradients = [
        tf.zeros_like(source) if gradient is None else _unscaled(gradient, scale)
        for source, gradient in zip(keras.tree.flatten(sources), gradients, strict=True)
    ]
    return keras.tree.pack_sequence_as(sources, gradients), steps, layer


def _norms(rows):
    # Squares of what has vanished, or exploded, would be beyond the range of floats.
    largest = np.abs(rows).max(axis=1, initial=0)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    return scale * np.linalg.norm(rows / scale[:, np.newaxis], axis=1)


def _scaled(optimizer, loss):
    """The loss as the train step differentiates it: times the loss scale of mixed precision."""
    if optimizer is None:
        return loss, None
    return optimizer.scale_loss(loss), optimizer.scale_loss(tf.ones_like(loss))


def _unscaled(gradient, scale):
    if scale is None:
        return gradient
    dtype = tf.float64 if gradient.dtype == tf.float64 else tf.float32
    return tf.cast(gradient, dtype) / tf.cast(scale, dtype)


def fit(mask: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    """A mask of the first axis, with as many axes as the tensor."""
    return tf.reshape(mask, [-1] + [1] * (tensor.shape.rank - 1))
