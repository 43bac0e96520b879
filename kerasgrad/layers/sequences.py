"""Between Keras's sequences, (batch, timesteps, units), and the recurrences' time-major arrays."""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import ops


def to_time_major(
    sequences: tf.Tensor, mask: tf.Tensor | list | None, go_backwards: bool
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Sequences as (timesteps, batch, features) and the mask as (timesteps, batch, 1) bool.

    Step 0 is the first step that the layer takes: the last of the input under go_backwards.
    """
    # Keras hands over a list of masks when the layer is called with an initial state.
    masks = keras.tree.flatten(mask)
    mask = masks[0] if masks else None
    sequences = tf.transpose(sequences, [1, 0, 2])
    if mask is not None:
        mask = tf.cast(mask, tf.bool)
        mask = mask if mask.shape.rank == 3 else mask[..., tf.newaxis]
        mask = tf.transpose(mask, [1, 0, 2])
    if go_backwards:
        sequences = tf.reverse(sequences, [0])
        mask = None if mask is None else tf.reverse(mask, [0])
    return sequences, mask


def to_keras(
    layer: keras.layers.RNN, outputs: tf.Tensor, state: tf.Tensor, mask: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """What `keras.layers.RNN.inner_loop` returns: (last_output, outputs, final states).

    Args:
        layer: whose return_sequences and zero_output_for_mask apply.
        outputs: (timesteps, batch, units), as computed at every step, masked or not.
        state: (batch, units), the state after the last step.
        mask: (timesteps, batch, 1) bool or None.
    """
    if mask is not None:
        if not layer.zero_output_for_mask:
            outputs = _repeat_last_unmasked(outputs, mask)
            mask = tf.math.cumsum(tf.cast(mask, tf.int32)) > 0
        outputs = tf.where(mask, outputs, tf.zeros_like(outputs))
    last_output = outputs[-1]
    if layer.return_sequences:
        return last_output, tf.transpose(outputs, [1, 0, 2]), [state]
    return last_output, ops.expand_dims(last_output, 1), [state]


def _repeat_last_unmasked(outputs, mask):
    """outputs[t] from the latest unmasked step up to t; arbitrary before the first one."""
    mask = tf.transpose(mask[..., 0])
    unmasked_first = tf.argsort(tf.cast(mask, tf.int32), direction="DESCENDING", stable=True)
    seen = tf.math.cumsum(tf.cast(mask, tf.int32), axis=1)
    latest = tf.gather(unmasked_first, tf.maximum(seen - 1, 0), batch_dims=1)
    by_example = tf.gather(tf.transpose(outputs, [1, 0, 2]), latest, batch_dims=1)
    return tf.transpose(by_example, [1, 0, 2])
