"""kerasgrad: why does my recurrent network not learn, and what mends it?"""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"kerasgrad records gradients inside TensorFlow's train step, and Keras runs on "
        f"{keras.backend.backend()!r} here. Set the backend before the first import of keras:\n"
        '    import os; os.environ["KERAS_BACKEND"] = "tensorflow"'
    )

from kerasgrad import bptt, callbacks, layers, remedies, tasks
from kerasgrad.diagnosis import Finding, diagnose
from kerasgrad.history import GradientHistory
from kerasgrad.remedies import compare

__all__ = [
    "Finding",
    "GradientHistory",
    "bptt",
    "callbacks",
    "compare",
    "diagnose",
    "layers",
    "plots",
    "remedies",
    "tasks",
]


def __getattr__(name: str):
    # Matplotlib is slow to import, and a training needs none of it.
    if name == "plots":
        import importlib

        return importlib.import_module("kerasgrad.plots")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
