"""The remedies by name, and compare(): one training of each on a task, side by side."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kerasgrad.callbacks import GradientNorms
from kerasgrad.diagnosis import diagnose
from kerasgrad.history import GradientHistory
from kerasgrad.layers import IRNN, SimpleRNN, SimplifiedLSTM
from kerasgrad.memory import forget_bias_for_horizon
from kerasgrad.tasks import Task


@dataclass(frozen=True)
class Remedy:
    """One way of building the recurrent layer and of clipping, to be compared with others.

    - description: what it is, for the table
    - make_layer: make_layer(units, timesteps, **kwargs) -> a recurrent layer; kwargs are Keras's,
      such as return_sequences
    - clips: whether the optimizer gets compare's clipnorm

    Example, a remedy of one's own:

    >>> import keras
    >>> import kerasgrad as kg
    >>> gru = kg.remedies.Remedy(
    ...     "Keras's GRU, clipnorm",
    ...     lambda units, timesteps, **kwargs: keras.layers.GRU(units, **kwargs),
    ...     clips=True,
    ... )
    >>> kg.compare(
    ...     kg.tasks.adding_problem(samples=64, timesteps=5), {"gru": gru}, steps=2, verbose=0
    ... ).histories.keys()
    dict_keys([('gru', 0)])
    """

    description: str
    make_layer: Callable[..., keras.layers.Layer]
    clips: bool = False


def _simple(units, timesteps, **kwargs):
    return SimpleRNN(units, **kwargs)


def _relu(units, timesteps, **kwargs):
    return SimpleRNN(units, activation="relu", **kwargs)


def _irnn(units, timesteps, **kwargs):
    return IRNN(units, **kwargs)


def _simplified_lstm(units, timesteps, **kwargs):
    bias = forget_bias_for_horizon(timesteps)
    return SimplifiedLSTM(units, project_input=True, forget_bias=bias, **kwargs)


def _simplified_lstm_tanh(units, timesteps, **kwargs):
    return _simplified_lstm(units, timesteps, activation="tanh", **kwargs)


def _keras_lstm(units, timesteps, **kwargs):
    return keras.layers.LSTM(units, **kwargs)


REMEDIES: Mapping[str, Remedy] = {
    "baseline": Remedy("tanh SimpleRNN", _simple),
    "clipnorm": Remedy("tanh SimpleRNN, clipnorm", _simple, clips=True),
    "relu": Remedy("ReLU SimpleRNN", _relu),
    "relu_clipnorm": Remedy("ReLU SimpleRNN, clipnorm", _relu, clips=True),
    "irnn_clipnorm": Remedy("ReLU from the identity (IRNN), clipnorm", _irnn, clips=True),
    "simplified_lstm": Remedy(
        "simplified LSTM, forget bias ln(T/ln 2), clipnorm", _simplified_lstm, clips=True
    ),
    "simplified_lstm_tanh": Remedy(
        "the same with tanh around the state", _simplified_lstm_tanh, clips=True
    ),
    "keras_lstm": Remedy("Keras's LSTM, clipnorm", _keras_lstm, clips=True),
}

DEFAULT_REMEDIES = (
    "baseline",
    "clipnorm",
    "relu",
    "relu_clipnorm",
    "irnn_clipnorm",
    "simplified_lstm",
)


@dataclass(frozen=True)
class Settings:
    """What all trainings of a comparison have in common.

    - units: of the recurrent layer
    - batch_size: sequences a step
    - steps: optimizer steps; whole epochs, so a little more where the two do not divide
    - learning_rate, momentum: of keras.optimizers.SGD
    - clipnorm: of those remedies that clip; per weight, as Keras's clipnorm is
    """

    units: int = 64
    batch_size: int = 32
    steps: int = 1500
    learning_rate: float = 0.1
    momentum: float = 0.9
    clipnorm: float = 0.2

    def __post_init__(self):
        for name in ("units", "batch_size", "steps", "learning_rate", "clipnorm"):
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


@dataclass
class Run:
    """One training: a remedy, a seed, and what came of it.

    - history: its gradients and losses by step
    - test_steps, test_losses, test_accuracies: on the held-out data, at the end of each epoch; the
      accuracies are NaN for a regression
    """

    remedy: str
    seed: int
    history: GradientHistory
    test_steps: list[int] = field(default_factory=list)
    test_losses: list[float] = field(default_factory=list)
    test_accuracies: list[float] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """Held-out loss at the end; NaN or Inf where the training stopped at one."""
        return self.test_losses[-1] if self.test_losses else float(self.history.loss[-1])

    def solved_at(self, solved_below: float) -> int | None:
        """The first step at which the held-out loss was below the task's threshold, or None."""
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


@dataclass
class Comparison:
    """What `compare` returns: the runs, and how to read them."""

    task: Task
    settings: Settings
    runs: list[Run] = field(default_factory=list)

    @property
    def histories(self) -> dict[tuple[str, int], GradientHistory]:
        """{(remedy, seed): record}."""
        return {(run.remedy, run.seed): run.history for run in self.runs}

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows, as numbers and `Finding`s: what `comparison.csv` holds."""
        task = self.task
        return [
            {
                "remedy": run.remedy,
                "seed": run.seed,
                "steps": len(run.history),
                "test_loss": run.final_loss,
                "constant_loss": task.constant_loss,
                "test_accuracy": run.test_accuracies[-1] if run.test_accuracies else np.nan,
                "solved": run.solved_at(task.solved_below) is not None,
                "solved_at_step": run.solved_at(task.solved_below),
                "largest_norm_before_clipping": _largest(run.history.global_norm),
                "clip_rate": run.history.clip_rate,
                "reach": run.reach,
                "findings": diagnose(run.history),
            }
            for run in self.runs
        ]

    def table(self) -> Table:
        """The comparison as a rich table: `rich.print(result.table())`."""
        task = self.task
        classification = task.loss != "mse"
        table = Table(
            title=(
                f"{task.name}, T = {task.timesteps}, {task.samples} sequences: {self.settings}\n"
                f"solved: held-out loss ({task.loss}) below {task.solved_below:.3g}; the best "
                f"constant answer has {task.constant_loss:.4g}"
            ),
            title_justify="left",
            title_style="",
            caption=(
                "largest norm: of the whole gradient, before clipping; reach: ‖∂L/∂s_1‖/‖∂L/∂s_T‖, "
                "median of the last 100 steps"
            ),
            caption_justify="left",
            box=None,
            padding=(0, 1),
            pad_edge=False,
        )
        table.add_column("remedy", no_wrap=True)
        table.add_column("held-out\nloss", justify="right", no_wrap=True)
        if classification:
            table.add_column("accuracy", justify="right", no_wrap=True)
        table.add_column("solved\nat step", justify="right", no_wrap=True)
        table.add_column("largest\nnorm", justify="right", no_wrap=True)
        table.add_column("steps\nclipped", justify="right", no_wrap=True)
        table.add_column("reach", justify="right", no_wrap=True)
        table.add_column("what went wrong")
        several_seeds = len({run.seed for run in self.runs}) > 1
        for row in self.rows():
            name = escape(row["remedy"])  # One's own name may have brackets: rich's markup.
            cells = [
                f"{name} (seed {row['seed']})" if several_seeds else name,
                f"{row['test_loss']:.4g}",
                str(row["solved_at_step"]) if row["solved"] else "no",
                f"{row['largest_norm_before_clipping']:.2g}",
                f"{row['clip_rate']:.0%}",
                f"{row['reach']:.0e}" if np.isfinite(row["reach"]) else "unknown",
                "\n".join(finding.title for finding in row["findings"]) or "nothing found",
            ]
            if classification:
                cells.insert(2, f"{row['test_accuracy']:.1%}")
            table.add_row(*cells)
        return table

    def save(self, folder: str | os.PathLike) -> None:
        """Write comparison.csv, one history .npz a run, and the figures into a folder.

        Files: comparison.csv; <remedy>.npz (<remedy>-seed<k>.npz with several seeds); loss.png,
        gradient_norms.png, state_norms.png, of the first seed.
        """
        import matplotlib.pyplot as plt

        from kerasgrad import plots

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        several_seeds = len({run.seed for run in self.runs}) > 1
        for run in self.runs:
            seed = f"-seed{run.seed}" if several_seeds else ""
            run.history.save(folder / f"{run.remedy}{seed}.npz")
        if not self.runs:
            return
        with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as file:
            rows = self.rows()
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow(row | {"findings": "; ".join(map(str, row["findings"]))})
        shown = {run.remedy: run.history for run in self.runs if run.seed == self.runs[0].seed}
        for name, ax in {
            "loss.png": plots.plot_compared_losses(shown, self.task.constant_loss),
            "gradient_norms.png": plots.plot_compared_norms(shown)[0],
            "state_norms.png": plots.plot_compared_state_norms(shown),
        }.items():
            ax.figure.savefig(folder / name, dpi=120)
            plt.close(ax.figure)


def compare(
    task: Task,
    remedies: Sequence[str] | Mapping[str, Remedy] = DEFAULT_REMEDIES,
    *,
    seeds: Sequence[int] = (0,),
    verbose: int = 1,
    **settings: Any,
) -> Comparison:
    """Train one network for each remedy and seed on the task, with `model.fit`, and compare them.

    Each network is Dense(layer(x)); a seed gives each remedy the same batches in the same order.
    A training ends early where its loss becomes NaN or Inf.

    Args:
        task: from kerasgrad.tasks.
        remedies: names out of REMEDIES, or a mapping {name: Remedy}.
        seeds: one training of each remedy a seed.
        verbose: 1 shows progress, 0 nothing.
        **settings: the fields of `Settings`: units, batch_size, steps, learning_rate, momentum,
            clipnorm.

    Returns:
        A Comparison: .table(), .histories, .rows(), .save(folder).

    Raises:
        ValueError: for a name that REMEDIES does not have, or a setting out of its range.

    Example:

    >>> import kerasgrad as kg
    >>> task = kg.tasks.adding_problem(samples=64, timesteps=10)
    >>> result = kg.compare(task, ("baseline", "clipnorm"), steps=4, verbose=0)
    >>> [row["remedy"] for row in result.rows()]
    ['baseline', 'clipnorm']
    """
    comparison = Comparison(task, Settings(**settings))
    for run in iterate_runs(task, remedies, comparison.settings, seeds, verbose):
        comparison.runs.append(run)
    return comparison


def iterate_runs(
    task: Task,
    remedies: Sequence[str] | Mapping[str, Remedy],
    settings: Settings,
    seeds: Sequence[int],
    verbose: int = 1,
) -> Iterator[Run]:
    """The runs of `compare`, each as soon as it has ended. A wrong name is told at once."""
    return _runs(task, _by_name(remedies), settings, seeds, verbose)


def _runs(task, remedies, settings, seeds, verbose):
    epochs = ceil(settings.steps / ceil(task.samples / settings.batch_size))
    steps = epochs * ceil(task.samples / settings.batch_size)
    with Progress(
        TextColumn("{task.description}", justify="left", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, loss {task.fields[loss]:.4g}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not verbose,
    ) as progress:
        for seed in seeds:
            for name, remedy in remedies.items():
                label = f"{name} (seed {seed})" if len(seeds) > 1 else name
                bar = progress.add_task(label, total=steps, loss=np.nan)
                watch = _Watch(progress, bar)
                yield _train(task, name, remedy, settings, seed, epochs, watch)


def _by_name(remedies):
    if isinstance(remedies, Mapping):
        return dict(remedies)
    if isinstance(remedies, str):
        remedies = [remedies]
    unknown = [name for name in remedies if name not in REMEDIES]
    if unknown:
        raise ValueError(
            f"Unknown remedy: {', '.join(map(repr, unknown))}. There are: {', '.join(REMEDIES)}."
        )
    return {name: REMEDIES[name] for name in remedies}


def _train(task, name, remedy, settings, seed, epochs, progress):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.layers.Input((task.timesteps, task.features)),
            remedy.make_layer(settings.units, task.timesteps, return_sequences=task.per_step),
            keras.layers.Dense(task.outputs, activation=task.output_activation),
        ]
    )
    model.compile(
        keras.optimizers.SGD(
            settings.learning_rate,
            momentum=settings.momentum,
            clipnorm=settings.clipnorm if remedy.clips else None,
        ),
        loss=task.loss,
        metrics=[] if task.loss == "mse" else ["accuracy"],
    )
    norms = GradientNorms()
    result = model.fit(
        task.x,
        task.y,
        batch_size=settings.batch_size,
        epochs=epochs,
        validation_data=(task.x_test, task.y_test),
        validation_batch_size=256,
        verbose=0,
        callbacks=[norms, progress],
    )
    logs = result.history
    losses = [float(loss) for loss in logs["val_loss"]]
    history = norms.history
    ends = [int(history.step[history.epoch == epoch][-1]) + 1 for epoch in range(len(losses))]
    return Run(
        name,
        seed,
        history,
        test_steps=ends,
        test_losses=losses,
        test_accuracies=[float(a) for a in logs.get("val_accuracy", [])],
    )


class _Watch(keras.callbacks.Callback):
    """Moves one rich progress bar along with a fit, and ends the fit when its loss is no number."""

    def __init__(self, progress: Progress, bar: Any):
        super().__init__()
        self._progress = progress
        self._bar = bar

    def on_train_batch_end(self, batch, logs=None):
        self._progress.update(self._bar, advance=1, loss=logs["loss"])
        if not np.isfinite(logs["loss"]):
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        # A training that ended early is not one that waits.
        bar = self._progress.tasks[self._bar]
        self._progress.update(self._bar, total=bar.completed)


def _largest(norms):
    """The largest norm; Inf or NaN where no step was finite."""
    finite = norms[np.isfinite(norms)]
    return float(finite.max()) if len(finite) else float(norms[-1])
