"""Recorder: one optimizer's record while `fit` runs, between the ring buffers and the history."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kerasgrad.history import GradientHistory, global_norm, is_clipped
from kerasgrad.keras_private import (
    calls_of,
    iterations_of,
    skips_non_finite_steps,
    updating_optimizer,
)
from kerasgrad.probe import Probe
from kerasgrad.ring_buffer import RingBuffer, outside_of_the_trace
from kerasgrad.streams import CSVStream, TensorBoardStream, rows_before
from kerasgrad.updates import WeightsBefore

_ROWS = 256  # Steps between two reads of a ring buffer, at most.


@dataclass(frozen=True)
class Limits:
    """What makes a training stop."""

    on_nonfinite: str | None
    stop_above: float | None

    @property
    def forbid(self) -> bool:
        """Whether an update may have to be left out."""
        return self.on_nonfinite in ("stop", "raise") or self.stop_above is not None

    def are_broken(self, norms: tf.Tensor, skips_non_finite: bool) -> tf.Tensor:
        """In the graph: scalar bool, whether an update with these norms must be left out.

        A non-finite one that a LossScaleOptimizer skips anyway does not count.
        """
        finite = tf.reduce_all(tf.math.is_finite(norms))
        nonfinite_counts = self.on_nonfinite in ("stop", "raise") and not skips_non_finite
        broken = ~finite if nonfinite_counts else tf.constant(False)
        if self.stop_above is not None:
            above = tf.norm(norms) > self.stop_above
            broken |= above & finite if skips_non_finite else above
        return broken

    def problem_of(
        self, piece: dict[str, Any], i: int, skips_non_finite: bool, forbidden: bool | None
    ) -> tuple[str, str] | None:
        """(what was wrong in row i, what to do), or None.

        Args:
            forbidden: what `are_broken` said of this row; None where nobody asked it.
        """
        norms, missing, step = piece["norms"][i], piece["missing"][i], piece["step"][i]
        bad = np.flatnonzero(~np.isfinite(norms) & ~missing)
        nonfinite_counts = len(bad) > 0 and not skips_non_finite
        acts = not forbidden if self.on_nonfinite == "warn" else forbidden is not False
        if self.on_nonfinite and nonfinite_counts and acts:
            value = "NaN" if np.isnan(norms[bad[0]]) else "Inf"
            others = f" (and of {len(bad) - 1} more weights)" if len(bad) > 1 else ""
            where = f"{piece['weights'][bad[0]]}{others}"
            return f"The gradient of {where} is {value} at step {step}", self.on_nonfinite
        if self.stop_above is not None and forbidden is not False:
            (whole,) = global_norm(norms[np.newaxis], missing[np.newaxis])
            skipped = len(bad) > 0 and skips_non_finite
            if forbidden or (whole > self.stop_above and not skipped):
                above = f"above stop_above={self.stop_above:g}"
                return f"The gradient norm is {whole:.3g} at step {step}, {above}", "stop"
        return None


NO_LIMITS = Limits(None, None)


class Recorder:
    """One optimizer's record: ring buffers in the graph, their history, and where rows also go."""

    def __init__(
        self,
        name: str,
        weights: str | Sequence[str] | Callable[[keras.Variable], bool] | None,
        every: int,
        limits: Limits,
        csv: CSVStream | None,
        tensorboard: TensorBoardStream | None,
        batch_logs: bool,
        probe: Probe | None,
    ):
        self.history = GradientHistory()
        self.optimizer: keras.optimizers.Optimizer | None = None
        self.selects = _selector(weights)
        self._weights = weights
        self.limits = limits
        self.batch_logs = batch_logs
        self._unchecked: list[dict[str, Any]] = []  # against the limits
        self._suffix = f"_{name}" if name else ""
        self._every = every
        self._csv = csv
        self._tensorboard = tensorboard
        self._probe = probe
        self._reads_each_call = batch_logs or limits != NO_LIMITS
        self._reads_each_call |= csv is not None or tensorboard is not None
        self._buffers: dict[tuple[str, ...], RingBuffer] = {}
        self._variables: dict[str, keras.Variable] = {}  # of the buffers' columns
        self._capacity = _ROWS
        # A user may read the history from a thread, or while Keras dispatches callbacks in one.
        self._lock = threading.RLock()
        self._first_row = 0  # of those that this optimizer has made
        self._calls_at_end = 0  # of the optimizer, in the fit before
        self._has_begun = False
        self.begin_epoch(0)

    def check_selection(self, variables: list) -> None:
        """Find out that `weights=` selects none of these, with a ValueError."""
        if not any(map(self.selects, variables)):
            raise ValueError(
                f"weights={self._weights!r} selects none of the trainable weights: "
                f"{', '.join(_paths(variables))}."
            )

    def check(self) -> None:
        """Find out before the training that a file cannot be written."""
        for stream in (self._csv, self._tensorboard):
            if stream is not None:
                stream.check()

    def begin(self, optimizer: keras.optimizers.Optimizer, steps_per_execution: int) -> None:
        """A fit begins, whose steps give their gradients to this optimizer."""
        if optimizer is not self.optimizer:
            self._first_row = len(self.history)
        self.optimizer = optimizer
        self._unchecked = []
        self._warned = False
        self._capacity = max(_ROWS, 4 * steps_per_execution)
        self._calls = self._rows = 0
        self._calls_to_next_read = 1
        self._is_first_piece = True
        self._has_begun = False
        self._steps_per_execution = steps_per_execution

    def begin_epoch(self, epoch: int) -> None:
        """What is read from now on is of this epoch."""
        self._epoch = epoch
        # Only now has each callback's on_train_begin been called, BackupAndRestore's too.
        if self.optimizer is not None and not self._has_begun:
            self._has_begun = True
            self._put_back()
        self._is_to_sample = True
        if self._tensorboard is not None:
            self._tensorboard.begin_epoch()
        self._sum, self._max, self._steps, self._updates, self._clipped = 0.0, 0.0, 0, 0, 0

    def end_epoch(self, model: keras.Model) -> None:
        """The epoch has no further steps."""
        self.read()
        if self._probe is not None and self._probe.every == "epoch":
            self._probe_now(model, iterations_of(self.optimizer))
        if self._tensorboard is not None and len(self.history):
            step = int(self.history.step[-1])
            self._stream("log_dir", lambda: self._tensorboard.end_epoch(step))

    def end(self) -> None:
        """The fit has no further steps."""
        with self._lock:
            self.read()
            for buffer in self._buffers.values():
                buffer.forget_unfinished_row()
        if self.optimizer is not None:
            self._calls_at_end = calls_of(self.optimizer)
        if self._csv is not None:
            self._stream("csv", self._csv.close)

    def summary(self) -> dict[str, float]:
        """grad_norm, grad_norm_max and grad_clip_rate of the steps since begin_epoch."""
        values = {
            "grad_norm": self._sum / self._steps if self._steps else np.nan,
            "grad_norm_max": self._max if self._steps else np.nan,
            "grad_clip_rate": self._clipped / self._updates if self._updates else np.nan,
        }
        return {key + self._suffix: value for key, value in values.items()}

    def is_due(self) -> tf.Tensor | None:
        """In the graph: scalar bool, whether this step is recorded; None where each one is."""
        if self._every == 1:
            return None
        return tf.equal(
            tf.cast(updating_optimizer(self.optimizer).iterations, tf.int64) % self._every, 0
        )

    def start_new_buffers(self) -> None:
        """A train function is about to be traced, which needs ring buffers of its own."""
        self.read()
        self._buffers = {}
        self._variables = {}

    def buffer_of(self, variables: list) -> RingBuffer:
        """In the graph: the ring buffer with a column for each of these weights."""
        weights = _paths(variables)
        if weights not in self._buffers:
            wide = any(v.dtype in ("float64", tf.float64) for v in variables)
            dtype = tf.float64 if wide else tf.float32
            self._buffers[weights] = outside_of_the_trace(
                lambda: RingBuffer(weights, self._capacity, dtype)
            )
            self._variables |= zip(weights, variables, strict=True)
        return self._buffers[weights]

    def to_copy(self, model: keras.Model) -> list:
        """The weights to copy before the next call of the train function; most times none."""
        if not self._is_to_sample:
            return []
        self._step_before = iterations_of(self.optimizer)
        # What a custom train step updates is known only once it has been traced.
        return list(self._variables.values()) or list(
            filter(self.selects, model.trainable_variables)
        )

    def sample_updates(self, before: WeightsBefore) -> None:
        """After the call: how far it has moved the weights, if it has and nobody knows it yet."""
        if not self._is_to_sample:
            return
        count = iterations_of(self.optimizer) - self._step_before
        variables = self._variables.values()
        if count == 0 or not variables or not before.holds(variables):
            return  # The next call may do better.
        self._is_to_sample = False
        moved, sizes = before.norms_of(variables)
        with self._lock:
            self.read()
            self.history.append_updates(
                step=self._step_before,
                weights=list(self._variables),
                update_norms=moved,
                weight_norms=sizes,
                update_count=count,
            )

    def probe_if_due(self, model: keras.Model) -> None:
        """After a call of the train function: probe where it has passed a step that is due."""
        if self._probe is None or self._probe.every == "epoch":
            return
        self._calls_to_next_look -= 1
        if self._calls_to_next_look > 0:
            return
        step, every = iterations_of(self.optimizer), self._probe.every
        if step // every > self._step_at_last_look // every:
            self._probe_now(model, step)
        # To look makes the host wait for the device: not before the step can have been reached.
        per_call = max(self._steps_per_execution, step - self._step_at_last_look)
        self._calls_to_next_look = max(1, (every - step % every) // per_call)
        self._step_at_last_look = step

    def _probe_now(self, model, step):
        norms = self._probe.state_norms(model)
        if norms:
            with self._lock:
                self.read()
                self.history.append_probe(step=step, state_norms=norms)

    def read_if_due(self) -> None:
        """Read the buffers in time before they come round."""
        self._calls += 1
        if self._reads_each_call:
            self.read()
        elif self._calls >= self._calls_to_next_read:
            self.read()
            rows_per_call = self._rows / self._calls  # Others have read some of them.
            self._calls_to_next_read = max(1, int(self._capacity / (2 * max(rows_per_call, 1))))
            self._calls = self._rows = 0

    def problems(self, forbids: bool | None) -> list[tuple[str, str]]:
        """(what was wrong, what to do) of the rows read since the last call.

        Args:
            forbids: whether the limits have forbidden the last row; None where the graph did not
                ask them.
        """
        with self._lock:
            rows = [(p, i) for p in self._unchecked for i in range(len(p["step"]))]
            self._unchecked = []
        found = []
        for number, (piece, i) in enumerate(rows, 1):
            forbidden = forbids and number == len(rows)
            problem = self.limits.problem_of(
                piece, i, skips_non_finite_steps(self.optimizer), forbidden
            )
            if problem is None or (problem[1] == "warn" and self._warned):
                continue
            found.append(problem)
            if problem[1] != "warn":
                break
            self._warned = True
        return found

    def read(self) -> int:
        """Move the rows that are not in the history yet into it; their number."""
        with self._lock:
            pieces = [buffer.read() for buffer in self._buffers.values()]
            # More than one only where an optimizer is given now these weights, now those.
            pieces = sorted((p for p in pieces if len(p["step"])), key=lambda p: p["step"][0])
            for piece in pieces:
                self._take(piece)
            return sum(len(piece["step"]) for piece in pieces)

    def _take(self, piece):
        if self._is_first_piece:
            self._is_first_piece = False
            self._resume(piece)
        self._rows += len(piece["step"])
        self.history.append(epoch=self._epoch, **piece)
        self._summarize(piece)
        if self.limits != NO_LIMITS:
            self._unchecked.append(piece)
        row = piece | {"epoch": self._epoch}
        for argument, stream in (("csv", self._csv), ("log_dir", self._tensorboard)):
            if stream is not None:
                self._stream(argument, lambda stream=stream: stream.write(row))

    def _put_back(self):
        """Take out of the record what a fit will do once more that starts from an earlier step."""
        calls = calls_of(self.optimizer)
        self._step_at_last_look, self._calls_to_next_look = iterations_of(self.optimizer), 1
        # A backup may lie between the micro-steps of one update, which have the same number.
        self._first_step, self._micro_steps = divmod(
            calls, updating_optimizer(self.optimizer).gradient_accumulation_steps or 1
        )
        self._is_put_back = 0 < calls < self._calls_at_end and len(self.history) > self._first_row
        if self._is_put_back:
            with self._lock:
                rows = rows_before(self.history.step, self._first_step, self._micro_steps)
                self.history.truncate(rows, self._first_step)

    def _resume(self, piece):
        """Make place for the first rows of a fit, where it starts from an earlier step."""
        first = int(piece["step"][0])
        micro_steps = self._micro_steps if first == self._first_step else 0
        if first == 0 and not self._is_put_back:
            self._first_row = len(self.history)
        if self._csv is not None and (self._is_put_back or not self._csv.is_begun):
            pieces = self._stream(
                "csv", lambda: self._csv.begin(piece["weights"], first, micro_steps)
            )
            if len(self.history) == 0:
                for earlier in pieces or ():
                    self.history.append(**earlier)
        if self._tensorboard is not None:
            self._stream("log_dir", lambda: self._tensorboard.begin(first))

    def _summarize(self, piece):
        norms = global_norm(piece["norms"], piece["missing"])
        self._steps += len(norms)
        self._sum += norms.sum()
        self._max = np.maximum(self._max, norms.max())  # NaN if either is
        self._updates += np.count_nonzero(piece["updated"])
        self._clipped += np.count_nonzero(is_clipped(piece["clip_factor"]))

    def _stream(self, argument, act):
        """act(), whose failing must not end the training."""
        try:
            return act()
        except (OSError, tf.errors.OpError) as error:
            # A full disk must not end a training of days.
            warnings.warn(f"GradientNorms({argument}=) could not write: {error}", stacklevel=2)


def _selector(weights):
    """The argument `weights` as a function of a variable."""
    if weights is None:
        return lambda variable: True
    if callable(weights):
        return weights
    patterns = [weights] if isinstance(weights, str) else list(weights)

    def selects(variable):
        names = (getattr(variable, "path", variable.name), variable.name)
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    return selects


def file_named(path: Path, name: str) -> Path:
    """The file of one of several optimizers."""
    return path.with_name(f"{path.stem}_{name}{path.suffix}") if name else path


def _paths(variables: list) -> tuple[str, ...]:
    """A name for each weight that no other has."""
    paths = [getattr(v, "path", v.name) for v in variables]
    seen: Counter[str] = Counter()
    unique = []
    for path in paths:
        seen[path] += 1
        unique.append(path if seen[path] == 1 else f"{path}_{seen[path]}")
    return tuple(unique)
