"""Between Keras's recurrent layers, with their masks and directions, and the recurrences."""

from __future__ import annotations

import keras
import tensorflow as tf


def in_order_of_steps(
    sequences: tf.Tensor, mask: tf.Tensor | list | None, go_backwards: bool
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Sequences, (batch, timesteps, features), and the mask as (batch, timesteps) bool or None.

    Step 0 is the first step that the layer takes: the last of the input under go_backwards.
    """
    # Keras hands over a list of masks when the layer is called with an initial state.
    masks = keras.tree.flatten(mask)
    mask = masks[0] if masks else None
    if mask is not None:
        mask = tf.cast(mask, tf.bool)
        mask = mask if mask.shape.rank == 2 else mask[..., 0]
    if go_backwards:
        sequences = tf.reverse(sequences, [1])
        mask = None if mask is None else tf.reverse(mask, [1])
    return sequences, mask


def outputs_under_mask(
    outputs: tf.Tensor, mask: tf.Tensor | None, zero_output_for_mask: bool
) -> tf.Tensor:
    """What a Keras layer hands out at every step, for outputs computed at every step.

    That is, at a masked step: 0 under zero_output_for_mask, and else the output of the latest
    unmasked step, or 0 before the first.

    Args:
        outputs: (batch, timesteps, units).
        mask: (batch, timesteps) bool or None.
    """
    if mask is None:
        return outputs
    if not zero_output_for_mask:
        unmasked_first = tf.argsort(tf.cast(mask, tf.int32), direction="DESCENDING", stable=True)
        seen = tf.math.cumsum(tf.cast(mask, tf.int32), axis=1)
        latest = tf.gather(unmasked_first, tf.maximum(seen - 1, 0), batch_dims=1)
        outputs = tf.gather(outputs, latest, batch_dims=1)
        mask = seen > 0
    return tf.where(mask[..., tf.newaxis], outputs, tf.zeros_like(outputs))
