"""What every test starts from. Runs before TensorFlow is imported."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["MPLBACKEND"] = "Agg"

import keras
import pytest
import tensorflow as tf

# Two logical CPUs stand in for two accelerators. They can only be made before TensorFlow starts
# its devices; operations that name no device run on the first.
_cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def _freeze_survivors(phase, info):
    """What has survived a full garbage collection stays out of the later ones.

    Keras and TensorFlow keep what was traced: a search through the graphs of a few hundred tests
    takes up to twenty seconds, again and again.
    """
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()


gc.callbacks.append(_freeze_survivors)


@pytest.fixture(autouse=True)
def _same_start():
    """Each test has the same random numbers and leaves the global dtype policy as it was."""
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


@pytest.fixture(scope="session")
def mirrored_strategy():
    """The one MirroredStrategy of the session, over both logical CPUs.

    TensorFlow numbers the all-reduces of every strategy from 100 on, and a second strategy in the
    same process meets the shapes of the first one's ("Shape mismatch in the collective instance").
    """
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
