"""What TensorFlow has to compute with."""

from __future__ import annotations

import tensorflow as tf


def on_gpu() -> bool:
    """Whether TensorFlow has a GPU: there it is launches and waits that cost, not passes."""
    return bool(tf.config.list_logical_devices("GPU"))
