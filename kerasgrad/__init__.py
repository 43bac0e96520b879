"""kerasgrad: why does my recurrent network not learn, and what mends it?"""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"kerasgrad records gradients inside TensorFlow's train step, and Keras runs on "
        f"{keras.backend.backend()!r} here. Set the backend before the first import of keras:\n"
        '    import os; os.environ["KERAS_BACKEND"] = "tensorflow"'
    )

from kerasgrad import callbacks, layers, tasks
from kerasgrad.history import GradientHistory

__all__ = ["GradientHistory", "callbacks", "layers", "tasks"]
