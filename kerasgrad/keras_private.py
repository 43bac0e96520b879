"""What Keras keeps private and nothing public stands in for.

tests/test_callbacks.py fails loudly when a version of Keras changes one of these.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import keras

# Gradients after unscaling and accumulation go in, what the update rule receives comes out.
CLIP_METHOD = "_clip_gradients"


def check_clip_method(optimizer: keras.optimizers.Optimizer) -> None:
    """Find out before the training that clipping cannot be measured.

    Raises:
        RuntimeError: when the optimizer has no such method.
    """
    _private(optimizer, CLIP_METHOD)


def variables_built_on(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables of optimizer.apply(grads), when it is called without them."""
    return _private(optimizer, "_trainable_variables")


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers at every depth, inside of wrappers and nested models, too."""
    return list(_private(model, "_flatten_layers")(include_self=False, recursive=True))


def calls_of(optimizer: keras.optimizers.Optimizer) -> int:
    """How many times it was given gradients: unlike its `iterations`, micro-steps count."""
    return int(_private(updating_optimizer(optimizer), "_iterations").numpy())


def iterations_of(optimizer: keras.optimizers.Optimizer) -> int:
    """How many updates it has made."""
    return int(updating_optimizer(optimizer).iterations.numpy())


def updating_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """What clips, updates and counts: the optimizer inside of a LossScaleOptimizer, or itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def skips_non_finite_steps(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether it leaves the weights alone when a gradient is NaN or Inf: a LossScaleOptimizer."""
    return updating_optimizer(optimizer) is not optimizer


@contextmanager
def default_seeds_from(seed: int) -> Iterator[None]:
    """Initializers and layers made in here draw their seeds as after `set_random_seed(seed)`.

    That seeds Python's own generator, which other threads draw from, too: in a Dask worker they do,
    in the middle of the making of a model.
    """
    module = import_module("keras.src.random.seed_generator")
    of_all_threads = _private(module, "python_random")
    module.python_random = random.Random(seed)
    try:
        yield
    finally:
        module.python_random = of_all_threads


def _private(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise RuntimeError(
            f"{type(owner).__name__} of Keras {keras.__version__} has no {name}, which "
            "kerasgrad needs. Expected a model and an optimizer of Keras's own classes or "
            "derived from them, in a version of Keras that kerasgrad's tests pass with (3.6 to "
            "3.15)."
        ) from None
