"""Probe: a batch that stays the same, on which a training's ∂L/∂s_t are looked at now and then."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kerasgrad import bptt
from kerasgrad.bptt.unrolled import unchanged
from kerasgrad.keras_private import all_layers


class Probe:
    """State gradients of each recurrent layer of a model on one batch.

    Args:
        batch: (x, y) or (x, y, sample_weight), arrays as `fit` takes them.
        every: "epoch", or a number of optimizer steps.

    Raises:
        ValueError: for another batch, or another `every`.
    """

    def __init__(self, batch: Sequence[Any], every: str | int):
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            length = f" of length {len(batch)}" if hasattr(batch, "__len__") else ""
            raise ValueError(
                "probe must be a tuple (x, y) or (x, y, sample_weight). Received: "
                f"{type(batch).__name__}{length}."
            )
        lengths = [_length(array) for array in keras.tree.flatten(tuple(batch))]
        if None in lengths or len(set(lengths)) != 1:
            raise ValueError(
                "probe must hold arrays with the same number of examples. Received lengths: "
                f"{', '.join('no array' if n is None else str(n) for n in lengths)}."
            )
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(
                f'probe_every must be "epoch" or a positive number of steps. Received: {every!r}.'
            )
        self.every = every
        self._x, self._y, self._sample_weight = (*batch, None)[:3]
        self._warned = False

    def check(self, model: keras.Model) -> None:
        """Find out before the training that this model cannot be probed.

        Raises:
            ValueError: when it has no recurrent layer, does not take x, or has no loss.
        """
        self._warned = False
        layers = all_layers(model)
        if not any(isinstance(layer, keras.layers.RNN) for layer in layers):
            raise ValueError(
                "GradientNorms(probe=...) looks at recurrent layers, and model "
                f"{model.name!r} has none: expected keras.layers.RNN or a layer derived from it. "
                f"It has {', '.join(type(layer).__name__ for layer in layers)}. Remove probe=."
            )
        if not model.built:  # Nothing can be asked of it before its first batch.
            return
        try:
            with unchanged(model):
                model(self._x, training=False)
                has_loss = model.loss is not None or bool(model.losses)
        except Exception as error:
            raise ValueError(
                f"GradientNorms(probe=...): model {model.name!r} does not take the probe's x, "
                f"which must be as fit takes it. {_line(error)}"
            ) from error
        if not has_loss and type(model).compute_loss is keras.Model.compute_loss:
            raise ValueError(
                "GradientNorms(probe=...) differentiates the loss that a model is compiled with, "
                f"and model {model.name!r} has none. Call model.compile(optimizer=..., loss=...), "
                "or remove probe=."
            )

    def state_norms(self, model: keras.Model) -> dict[str, np.ndarray]:
        """{"<layer path>:<state>": (T,)}: mean over the batch of ‖∂L/∂s_t‖₂.

        A layer for which they cannot be had is left out, with a warning.
        """
        norms = {}
        for path, layer in bptt.recurrent_layers(model).items():
            try:
                gradients = bptt.state_gradients(
                    model, self._x, self._y, layer, sample_weight=self._sample_weight
                )
            except Exception as error:  # Whatever it is, the training is worth more.
                self._warn(f"of layer {path!r}", error)
                continue
            for state, λ in gradients.items():
                sizes = np.sqrt(np.sum(np.square(λ, dtype=np.float64), axis=-1))
                norms[f"{path}:{state}"] = sizes.mean(axis=0)
        return norms

    def _warn(self, what, error):
        """Once for each training: the next probe may go wrong in the same way."""
        if not self._warned:
            warnings.warn(
                f"GradientNorms(probe=...) has no state gradients {what}: {_line(error)} The "
                "training goes on.",
                stacklevel=2,
            )
        self._warned = True


def _length(array):
    """The number of examples; None for what is no array."""
    shape = getattr(array, "shape", None)
    return int(shape[0]) if shape else None


def _line(error):
    """What an error says, as one short line."""
    # Of a layer's error Keras sets what happened in bold, between where and with what arguments.
    bold = re.search(r"\x1b\[1m(.*?)\x1b\[0m", str(error), re.DOTALL)
    text = " ".join((bold[1] if bold else str(error)).split())
    text = re.sub(r"\[\[.*\]\]", "[[...]]", text)  # The numbers of an array.
    return textwrap.shorten(text or type(error).__name__, 300, placeholder=" ...").rstrip(".") + "."
