"""One training: its settings, its network, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil

import keras
import numpy as np

from kerasgrad.callbacks import GradientNorms
from kerasgrad.history import GradientHistory
from kerasgrad.keras_private import default_seeds_from
from kerasgrad.remedies.remedy import Remedy
from kerasgrad.tasks import Task

# Of the training sequences, one in so many is held out where a learning rate is to be chosen.
_VALIDATION_SHARE = 5

# A loss that ends so many times above where it began has diverged, though it is a number: a float32
# has room for 1e38.
DIVERGED_TIMES = 1000


@dataclass(frozen=True)
class Settings:
    """What all trainings of a comparison have in common.

    - units: of the recurrent layer
    - batch_size: sequences a step
    - steps: optimizer steps; whole epochs, so a little more where the two do not divide
    - learning_rate, momentum: of keras.optimizers.SGD
    - clipnorm: of those remedies that clip so; per weight, as Keras's clipnorm is
    - global_clipnorm, clipvalue: of those remedies that clip so; for the whole gradient, and for
      each of its entries
    """

    units: int = 64
    batch_size: int = 32
    steps: int = 1500
    learning_rate: float = 0.1
    momentum: float = 0.9
    clipnorm: float = 0.2
    global_clipnorm: float = 0.5
    clipvalue: float = 0.01

    def __post_init__(self):
        for name in (
            *("units", "batch_size", "steps", "learning_rate"),
            *("clipnorm", "global_clipnorm", "clipvalue"),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive. Received: {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1). Received: {self.momentum}.")

    def __str__(self) -> str:
        return (
            f"{self.units} units, batches of {self.batch_size}, {self.steps} steps of "
            f"SGD(learning_rate={self.learning_rate:g}, momentum={self.momentum:g}); "
            f"clipnorm={self.clipnorm:g} (per weight) where a remedy clips"
        )

    def epochs(self, samples: int) -> int:
        """How many passes over so many sequences the steps take."""
        return ceil(self.steps / ceil(samples / self.batch_size))


@dataclass
class Run:
    """One training: a remedy, a seed, a learning rate, and what came of it.

    - history: its gradients and losses by step
    - test_steps, test_losses, test_accuracies: on the test data, at the end of each epoch; the
      accuracies are NaN for a regression
    - validation_loss: at the end, on the sequences held out to choose the learning rate; None where
      there was nothing to choose
    - seconds_per_step: median time of a training step, the first one (which compiles) left out
    """

    remedy: str
    seed: int
    history: GradientHistory
    test_steps: list[int] = field(default_factory=list)
    test_losses: list[float] = field(default_factory=list)
    test_accuracies: list[float] = field(default_factory=list)
    learning_rate: float = float("nan")
    validation_loss: float | None = None
    seconds_per_step: float = float("nan")

    @property
    def final_loss(self) -> float:
        """Test loss at the end; NaN or Inf where the training stopped at one."""
        return self.test_losses[-1] if self.test_losses else float(self.history.loss[-1])

    @property
    def diverged(self) -> bool:
        """Whether a batch's loss, or the test loss at the end, was NaN or Inf.

        Or whether the last batch's loss was more than 1000 times the first one's.
        """
        losses = self.history.loss
        finite = np.isfinite(self.final_loss) and np.isfinite(losses).all()
        # Not by the test loss, of which the choice of a learning rate must not know.
        return bool(not finite or losses[-1] > DIVERGED_TIMES * losses[0])

    @property
    def ranked_loss(self) -> float:
        """The final loss as it counts beside others: Inf, larger than any, where it diverged."""
        return np.inf if self.diverged else self.final_loss

    def solved_at(self, solved_below: float) -> int | None:
        """The first step at which the test loss was below the task's threshold, or None."""
        for step, loss in zip(self.test_steps, self.test_losses, strict=True):
            if loss < solved_below:
                return step
        return None

    @property
    def reach(self) -> float:
        """‖∂L/∂s_1‖/‖∂L/∂s_T‖, median of the last 100 steps that have one; NaN where none has."""
        for reach in self.history.reach.values():
            known = reach[np.isfinite(reach)]
            if len(known):
                return float(np.median(known[-100:]))
        return np.nan


@dataclass(frozen=True)
class FailedRun:
    """A training that raised.

    - error: the kind of exception and its message, in one line
    - traceback: where, as Python prints it
    """

    remedy: str
    seed: int
    learning_rate: float
    error: str
    traceback: str


def hold_out_validation(task: Task) -> tuple[Task, tuple[np.ndarray, np.ndarray]]:
    """The task without a fifth of its training sequences, and these: (x, y).

    Which ones is drawn once for a task, and is the same for each remedy, seed and learning rate.
    The test sequences are not touched.

    Raises:
        ValueError: when there is just one training sequence.

    Example:

    >>> import kerasgrad as kg
    >>> from kerasgrad.remedies.training import hold_out_validation
    >>> task, (x, y) = hold_out_validation(kg.tasks.adding_problem(samples=10, timesteps=5))
    >>> task.samples, len(x)
    (8, 2)
    """
    if task.samples < 2:
        raise ValueError(
            "Several learning rates need validation data to choose by, and the task has one "
            "training sequence only. Make it with more samples."
        )
    order = np.random.default_rng(0).permutation(task.samples)
    held_out, kept = np.split(order, [ceil(task.samples / _VALIDATION_SHARE)])
    held_out.sort()
    kept.sort()
    return (
        replace(task, x=task.x[kept], y=task.y[kept]),
        (task.x[held_out], task.y[held_out]),
    )


def make_model(task: Task, remedy: Remedy, settings: Settings, seed: int) -> keras.Model:
    """The compiled network of a run: Dense(layer(x)).

    Remedies whose layers draw as many initializers in the same order start from the same weights.

    Args:
        task: whose shapes and loss it has.
        remedy: which makes the layer and clips.
        settings: units, optimizer, thresholds.
        seed: of all random numbers, for weights and batches.

    Example:

    >>> import kerasgrad as kg
    >>> from kerasgrad.remedies import REMEDIES, Settings, make_model
    >>> task = kg.tasks.adding_problem(samples=10, timesteps=5)
    >>> make_model(task, REMEDIES["clipvalue"], Settings(clipvalue=0.5), seed=0).optimizer.clipvalue
    0.5
    """
    keras.utils.set_random_seed(seed)
    with default_seeds_from(seed):
        model = remedy.make_model(
            [
                keras.layers.Input((task.timesteps, task.features)),
                remedy.make_layer(settings.units, task.timesteps, return_sequences=task.per_step),
                keras.layers.Dense(task.outputs, activation=task.output_activation),
            ]
        )
    clipping = remedy.clipping
    model.compile(
        keras.optimizers.SGD(
            settings.learning_rate,
            momentum=settings.momentum,
            **({clipping: getattr(settings, clipping)} if clipping else {}),
        ),
        loss=task.loss,
        metrics=[] if task.loss == "mse" else ["accuracy"],
    )
    return model


def train(
    task: Task,
    name: str,
    remedy: Remedy,
    settings: Settings,
    seed: int,
    *,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    on_step: Callable[[float], None] | None = None,
) -> Run:
    """Train the network of a remedy with `model.fit`; it ends early at a NaN or Inf loss.

    Args:
        task: x, y to train on, x_test, y_test to measure on at the end of each epoch.
        name: of the remedy.
        remedy, settings, seed: as in `make_model`.
        validation: (x, y) to measure on when the training has ended.
        on_step: called after each step with the epoch's mean loss so far.
    """
    model = make_model(task, remedy, settings, seed)
    norms, watch = GradientNorms(), _Watch(on_step)
    result = model.fit(
        task.x,
        task.y,
        batch_size=settings.batch_size,
        epochs=settings.epochs(task.samples),
        validation_data=(task.x_test, task.y_test),
        validation_batch_size=256,
        verbose=0,
        callbacks=[norms, watch],
    )
    logs = result.history
    losses = [float(loss) for loss in logs["val_loss"]]
    history = norms.history
    ends = [int(history.step[history.epoch == epoch][-1]) + 1 for epoch in range(len(losses))]
    validation_loss = None
    if validation is not None:
        metrics = model.evaluate(*validation, batch_size=256, verbose=0, return_dict=True)
        validation_loss = float(metrics["loss"])
    return Run(
        name,
        seed,
        history,
        test_steps=ends,
        test_losses=losses,
        test_accuracies=[float(a) for a in logs.get("val_accuracy", [])],
        learning_rate=settings.learning_rate,
        validation_loss=validation_loss,
        seconds_per_step=float(np.median(watch.seconds[1:])) if watch.seconds[1:] else np.nan,
    )


class _Watch(keras.callbacks.Callback):
    """Times the steps of a fit, tells each one's loss, and ends the fit when it is no number."""

    def __init__(self, on_step: Callable[[float], None] | None):
        super().__init__()
        self.seconds: list[float] = []
        self._on_step = on_step

    def on_train_batch_begin(self, batch, logs=None):
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self._begun)
        if self._on_step is not None:
            self._on_step(logs["loss"])
        if not np.isfinite(logs["loss"]):
            self.model.stop_training = True
