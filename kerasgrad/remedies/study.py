"""The runs of a comparison: planned, taken from disk where kept, trained by joblib, kept again."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import joblib
import keras
import numpy as np
import tensorflow as tf

from kerasgrad.remedies.kept import KeptRuns, fingerprint, versions
from kerasgrad.remedies.progress import StudyProgress
from kerasgrad.remedies.remedy import Remedy
from kerasgrad.remedies.training import FailedRun, Run, Settings, hold_out_validation, train
from kerasgrad.tasks import Task


@dataclass(frozen=True)
class PlannedRun:
    """One training of a study.

    - remedy: its name
    """

    remedy: str
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Study:
    """What is to be run, and how: each remedy, seed and learning rate, with the same settings.

    - task: to train on; with several learning rates a fifth of the training sequences is held out
    - folder: keeps each finished run in `folder/runs`, or None
    - resume: whether runs that are kept there are taken from there; those that raised run again
    - jobs: trainings at a time, as joblib's n_jobs
    - verbose: 1 shows progress, 0 nothing
    """

    task: Task
    remedies: Mapping[str, Remedy]
    settings: Settings
    seeds: Sequence[int] = (0,)
    learning_rates: Sequence[float] = ()
    jobs: int = 1
    folder: Path | None = None
    resume: bool = False
    verbose: int = 1

    def __post_init__(self):
        for rate in self.learning_rates:
            replace(self.settings, learning_rate=rate)  # Refuses what is not positive.
        if self.resume and self.folder is None:
            raise ValueError(
                "resume=True goes on with the runs that are kept in a folder, and there is none. "
                "Pass the folder= of the study that is to go on."
            )
        if not isinstance(self.jobs, int) or self.jobs == 0:
            raise ValueError(
                f"jobs must be a number of trainings at a time, or -1 for one on each core. "
                f"Received: {self.jobs!r}."
            )
        if len(self.learning_rates) > 1:
            hold_out_validation(self.task)

    @property
    def tried(self) -> tuple[float, ...]:
        """The learning rates that each remedy and seed gets, each once."""
        rates = self.learning_rates or (self.settings.learning_rate,)
        return tuple(dict.fromkeys(map(float, rates)))

    @property
    def plan(self) -> list[PlannedRun]:
        """The runs, in order."""
        return [
            PlannedRun(name, seed, rate)
            for seed in dict.fromkeys(self.seeds)
            for name in self.remedies
            for rate in self.tried
        ]

    def run(self) -> Iterator[Run | FailedRun]:
        """Each run as soon as it has ended, in whichever order; those kept on disk first."""
        task, validation = self.task, None
        if len(self.tried) > 1:
            task, validation = hold_out_validation(task)
        kept, paths = self._kept_paths(task, validation)
        found = {planned: kept.load(path) for planned, path in paths.items() if self.resume}
        found = {planned: run for planned, run in found.items() if isinstance(run, Run)}
        left = [planned for planned in self.plan if planned not in found]
        steps = self.settings.epochs(task.samples) * ceil(task.samples / self.settings.batch_size)
        yield from found.values()
        with StudyProgress(self.plan, left, steps, disable=not self.verbose) as progress:
            for run in _in_parallel(self._call(task, validation), left, self.jobs, progress):
                planned = PlannedRun(run.remedy, run.seed, run.learning_rate)
                if planned in paths:
                    kept.save(paths[planned], run)
                progress.end_run(planned)
                yield run

    def _kept_paths(self, task, validation):
        if self.folder is None:
            return None, {}
        kept, paths = KeptRuns(Path(self.folder) / "runs"), {}
        # The task's arrays are large, and the same in each run.
        data = fingerprint(task, validation, versions(), keras.config.dtype_policy().name)
        for planned in self.plan:
            remedy = self.remedies[planned.remedy]
            settings = replace(self.settings, learning_rate=planned.learning_rate)
            key = fingerprint(data, planned, remedy, settings)
            paths[planned] = kept.path(planned.remedy, planned.seed, planned.learning_rate, key)
        return kept, paths

    def _call(self, task, validation):
        """call(planned): the arguments with which joblib calls `_train_one`."""
        threads = max(1, joblib.cpu_count() // joblib.effective_n_jobs(_n_jobs(self.jobs)))
        policy = keras.config.dtype_policy().name

        def call(planned):
            settings = replace(self.settings, learning_rate=planned.learning_rate)
            remedy = self.remedies[planned.remedy]
            return joblib.delayed(_train_one)(
                task, planned, remedy, settings, validation, threads, policy
            )

        return call


def _in_parallel(call, planned_runs, jobs, progress):
    """The runs that joblib trains, wherever its backend does."""
    left = list(planned_runs)
    try:
        for run in _results(call, planned_runs, jobs, progress):
            left.remove(PlannedRun(run.remedy, run.seed, run.learning_rate))
            yield run
    except BrokenProcessPool:
        # A process died without an exception: killed for its memory, say. Which run it had is not
        # told, and takes the others with it. One by one, each in a process of its own, it is.
        for planned in left:
            try:
                yield from _results(call, [planned], 2, progress)
            except BrokenProcessPool as error:
                yield _failed(planned, "The process that trained it died.", str(error))


def _results(call, planned_runs, jobs, progress):
    global _progress
    _progress = progress
    try:
        at_a_time = min(len(planned_runs), joblib.effective_n_jobs(_n_jobs(jobs)))
        progress.begin(at_a_time)
        try:
            parallel = joblib.Parallel(n_jobs=_n_jobs(jobs), return_as="generator_unordered")
        except ValueError:
            # Ray's backend hands out its results at the end of a call alone: there is a call for
            # as many runs as it takes at a time, so that they are kept, and shown, as they finish.
            for start in range(0, len(planned_runs), at_a_time):
                some = planned_runs[start : start + at_a_time]
                yield from joblib.Parallel(n_jobs=_n_jobs(jobs))(map(call, some))
        else:
            yield from parallel(map(call, planned_runs))
    finally:
        _progress = None


def _n_jobs(jobs):
    # Of joblib 1 is an order to stay in this process, whatever parallel_config says; None is not.
    return None if jobs == 1 else jobs


# The study's progress where a training runs in the very process of the study, and None elsewhere.
_progress: StudyProgress | None = None

# Keras's random numbers are the process's, not the thread's: of the threads that a cluster's worker
# may have, one trains at a time.
_ONE_AT_A_TIME = threading.Lock()


def _train_one(
    task: Task,
    planned: PlannedRun,
    remedy: Remedy,
    settings: Settings,
    validation: tuple[np.ndarray, np.ndarray] | None,
    threads: int,
    policy: str,
) -> Run | FailedRun:
    progress = _progress
    on_step = None
    with _ONE_AT_A_TIME:
        try:
            if progress is None:
                _limit_threads(threads)
                keras.config.set_dtype_policy(policy)
            else:
                progress.begin_run(planned)
                on_step = progress.step
            return train(
                task,
                planned.remedy,
                remedy,
                settings,
                planned.seed,
                validation=validation,
                on_step=on_step,
            )
        except Exception as error:
            told = "".join(traceback.format_exception_only(error))
            return _failed(planned, " ".join(told.split()), traceback.format_exc())


def _failed(planned, error, traceback):
    return FailedRun(planned.remedy, planned.seed, planned.learning_rate, error, traceback)


def _limit_threads(threads):
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    except RuntimeError:
        pass  # TensorFlow runs already: in a worker of an earlier run, with its threads.


def seeds_of(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds: 0 to n - 1 for a number n.

    Raises:
        ValueError: for a number below 1.

    Example:

    >>> from kerasgrad.remedies.study import seeds_of
    >>> seeds_of(3), seeds_of([7])
    ((0, 1, 2), (7,))
    """
    if isinstance(seeds, int):
        if seeds < 1:
            raise ValueError(
                f"seeds must be at least 1, or the seeds themselves. Received: {seeds}."
            )
        return tuple(range(seeds))
    return tuple(seeds)
