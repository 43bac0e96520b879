"""The remedies by name, and compare(): trainings of each on a task, side by side."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kerasgrad.remedies.comparison import COLUMNS, Comparison
from kerasgrad.remedies.remedy import CLIPPINGS, DEFAULT_REMEDIES, REMEDIES, Remedy, by_name
from kerasgrad.remedies.study import PlannedRun, Study, seeds_of
from kerasgrad.remedies.training import FailedRun, Run, Settings, make_model
from kerasgrad.tasks import Task

__all__ = [
    "CLIPPINGS",
    "COLUMNS",
    "DEFAULT_REMEDIES",
    "REMEDIES",
    "Comparison",
    "FailedRun",
    "PlannedRun",
    "Remedy",
    "Run",
    "Settings",
    "Study",
    "by_name",
    "compare",
    "make_model",
    "seeds_of",
]


def compare(
    task: Task,
    remedies: str | Sequence[str] | Mapping[str, Remedy] = DEFAULT_REMEDIES,
    *,
    seeds: int | Sequence[int] = (0,),
    learning_rates: Sequence[float] | None = None,
    budget: int | None = None,
    jobs: int = 1,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    verbose: int = 1,
    **settings: Any,
) -> Comparison:
    """Train networks for each remedy on the task, with `model.fit`, and compare them.

    Each network is Dense(layer(x)). A seed gives each remedy the same batches in the same order,
    and the same initial weights where their layers have the same weights. A training ends early
    where its loss becomes NaN or Inf.

    With several learning rates each remedy gets all of them, for each seed, with the same number
    of steps. A fifth of the training sequences is then held out: the learning rate of a remedy is
    the one with the least median loss on those, over the seeds, and the results are on the test
    data, which no choice saw. The seeds of the choice and of the results are the same.

    Trainings run one after the other in this process, or several at a time through joblib: in
    processes of their own, which share the cores among their TensorFlow threads, or wherever
    joblib's backend is, as on a cluster:

        with joblib.parallel_config("dask"): kg.compare(...)
        with joblib.parallel_config("ray", n_jobs=-1): kg.compare(...)

    A run's numbers do not depend on where and beside what it runs, bit for bit, as long as
    TensorFlow has as many threads there: it splits long sums among them, which rounds otherwise.
    (A cluster of one core is left alone by joblib.) A process that dies takes no other run with it.

    Args:
        task: from kerasgrad.tasks.
        remedies: names out of REMEDIES, several joined by + ("relu+global_clipnorm"), or a mapping
            {name: Remedy}.
        seeds: one training of each remedy a seed; a number n for the seeds 0 to n - 1.
        learning_rates: to choose from for each remedy; None for the setting `learning_rate`.
        budget: optimizer steps of each training; another name of the setting `steps`.
        jobs: trainings at a time; -1 for one on each core.
        folder: keeps each run in folder/runs as soon as it has ended.
        resume: take the runs that are kept there, where task, remedy, settings and versions are
            the same, and train only the others. Otherwise all are trained, and each replaces its
            earlier self when it has ended; no other file is touched.
        verbose: 1 shows one bar for all trainings, with the time that has passed and that is left;
            0 nothing. Of a training in another process nothing is heard until it ends: the bar
            moves by the time that others took.
        **settings: the fields of `Settings`: units, batch_size, steps, learning_rate, momentum,
            clipnorm, global_clipnorm, clipvalue.

    Returns:
        A Comparison: .table(), .summary(), .rows(), .histories, .save(folder). A training that
        raised is in .failed, with its traceback, and told in a warning.

    Raises:
        ValueError: for a name that REMEDIES does not have, a setting out of its range, two names
            for one setting, or resume without a folder.
        RuntimeError: when every training raised.

    Example:

    >>> import kerasgrad as kg
    >>> task = kg.tasks.adding_problem(samples=64, timesteps=10)
    >>> result = kg.compare(task, ("baseline", "clipnorm"), steps=4, verbose=0)
    >>> [row["remedy"] for row in result.rows()]
    ['baseline', 'clipnorm']
    """
    for name, other, given in (
        ("steps", "budget", budget),
        ("learning_rate", "learning_rates", learning_rates),
    ):
        if given is not None and name in settings:
            raise ValueError(
                f"{name}={settings[name]} and {other}={given} say the same thing twice. Pass one."
            )
    if budget is not None:
        settings["steps"] = budget
    if learning_rates is not None and not len(learning_rates):
        raise ValueError("learning_rates is empty. Pass one at least, or None.")
    study = Study(
        task,
        by_name(remedies),
        Settings(**settings),
        seeds=seeds_of(seeds),
        learning_rates=() if learning_rates is None else tuple(map(float, learning_rates)),
        jobs=jobs,
        folder=None if folder is None else Path(folder),
        resume=resume,
        verbose=verbose,
    )
    comparison = Comparison.of(study)
    for run in study.run():
        comparison.add(run)
    comparison.sort(study.plan)
    for run in comparison.failed:
        warnings.warn(
            f"The training of {run.remedy!r} with seed {run.seed} and learning rate "
            f"{run.learning_rate:g} failed: {run.error}",
            stacklevel=2,
        )
    if comparison.failed and not comparison.runs:
        raise RuntimeError(
            f"Every training failed. The first one:\n{comparison.failed[0].traceback}"
        )
    return comparison
