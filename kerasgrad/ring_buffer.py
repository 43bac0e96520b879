"""RingBuffer: rows that a train step writes in its graph, and the host reads now and then."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from kerasgrad.norms import gradient_norms

# No gradient, or no row. A norm is never negative, and NaN is a norm that can occur.
_NONE = np.float64(-1)


class HeldStateNorms:
    """A layer's state norms of one call, (T,) float64, from its gradient until the update.

    Args:
        timesteps: T of the first trace; others may have another, except under XLA.
    """

    def __init__(self, timesteps: int | None):
        self.timesteps = timesteps
        self.call = 0
        self.variable = tf.Variable(
            tf.fill([timesteps or 0], tf.constant(np.nan, tf.float64)),
            shape=[None],
            trainable=False,
        )

    def take(self) -> tf.Tensor:
        """The norms, which are then NaN: a layer that the next step does not use has none there."""
        norms = self.variable.read_value()
        self.variable.assign(tf.fill(tf.shape(norms), tf.constant(np.nan, tf.float64)))
        return norms


class RingBuffer:
    """Rows that the train step writes in the graph, and the host reads.

    Args:
        weights: the names of the columns.
        capacity: the number of rows that are kept until they are read.
        dtype: of the norms as they are read.
    """

    def __init__(self, weights: tuple[str, ...], capacity: int, dtype: tf.DType):
        W = len(weights)
        self.weights = weights
        self.dtype = dtype
        self.capacity = capacity
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False)
        # What is written together lies in one variable: to write a number takes as long as to write
        # a hundred. A whole number is exact in float64 up to 2**53.
        # Columns: the step, its loss, W norms.
        self.given = tf.Variable(tf.zeros([capacity, 2 + W], tf.float64), trainable=False)
        # Columns: the row's number, that of an earlier one where the optimizer has skipped this
        # update; W norms of what went into clipping, W of what came out.
        self.applied = tf.Variable(tf.fill([capacity, 1 + 2 * W], _NONE), trainable=False)
        self._state_norms: dict[tuple[str, int], tf.Variable] = {}
        self._calls: dict[tuple[str, int], int] = {}
        self._read = 0

    def state_norms_of(self, key: tuple[str, int], held: HeldStateNorms) -> tf.Variable:
        """(capacity, T); T grows with the longest sequence, where it is not known beforehand."""
        self._calls[key] = held.call
        if key not in self._state_norms:
            shape = self.capacity, held.timesteps or 0
            self._state_norms[key] = outside_of_the_trace(
                lambda: tf.Variable(
                    tf.fill(shape, tf.constant(np.nan, self.dtype)),
                    shape=[self.capacity, None],
                    trainable=False,
                )
            )
        return self._state_norms[key]

    def read(self) -> dict[str, Any]:
        """The rows written since the last read, as arguments of GradientHistory.append."""
        count, first = int(self.count.numpy()), self._read
        self._read = count
        if count - first > self.capacity:
            warnings.warn(
                f"GradientNorms lost {count - first - self.capacity} rows: one call of the train "
                f"function made {count - first} updates, and its buffer holds {self.capacity}.",
                stacklevel=2,
            )
            first = count - self.capacity
        numbers = np.arange(first, count)
        rows = numbers % self.capacity
        (step, loss), norms = _split_columns(self.given.numpy()[rows], 2)
        (number,), applied = _split_columns(self.applied.numpy()[rows], 1)
        updated = number == numbers
        before, after = np.split(applied, 2, axis=1)
        missing = norms == _NONE
        without = (after == _NONE) | ~updated[:, None]
        dtype = self.dtype.as_numpy_dtype
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            factors = np.where(missing | (before == 0), 1, after / before)
            return {
                "weights": self.weights,
                "step": step.astype(np.int64),
                "loss": loss.astype(dtype),
                "norms": np.where(missing, np.nan, norms).astype(dtype),
                "applied_norms": np.where(without, np.nan, after).astype(dtype),
                "missing": missing,
                "updated": updated,
                "clip_factor": np.where(updated, factors.min(axis=1), np.nan).astype(dtype),
                "state_norms": {
                    self._name(key): variable.numpy()[rows]
                    for key, variable in self._state_norms.items()
                },
            }

    def forget_unfinished_row(self) -> None:
        """A step has failed: the next one writes a row of the same number."""
        self.applied.assign(tf.fill(self.applied.shape, _NONE))

    def _name(self, key):
        """The layer's path; and the number of the call, where a step calls the layer repeatedly."""
        path, _ = key
        calls = sorted(call for (other, _), call in self._calls.items() if other == path)
        number = calls.index(self._calls[key]) + 1
        return path if len(calls) == 1 else f"{path} (call {number} of {len(calls)})"


class Row:
    """In the graph: the row of a ring buffer that the present step writes.

    Made before the optimizer has its turn, and closed after that.

    Args:
        buffer: the ring buffer.
        gradients: one for each of its weights, or None; summed over the replicas.
        due: scalar bool tensor, whether this step is recorded; None for always.
        step: the number of updates before this one.
        scale: of the loss; the gradients are multiplied by it.
        loss: the batch's, not scaled.
    """

    def __init__(
        self,
        buffer: RingBuffer,
        gradients: list,
        due: tf.Tensor | None,
        *,
        step: tf.Tensor,
        scale: Any,
        loss: tf.Tensor,
    ):
        self._buffer = buffer
        self._present = [i for i, g in enumerate(gradients) if g is not None]
        self._gradients = [gradients[i] for i in self._present]
        self._due = due
        self._step_and_loss = [tf.cast(step, tf.float64), tf.cast(loss, tf.float64)]
        self._scale = scale
        self._number = buffer.count.read_value()
        self._index = self._number % buffer.capacity
        self._graph = tf.compat.v1.get_default_graph()
        self._norms: tf.Tensor | None = None

    def write_state_norms(
        self,
        key: tuple[str, int],
        norms: tf.Tensor,
        held: HeldStateNorms,
        timesteps: int | None,
        fixed_length: bool,
    ) -> None:
        """The state norms of one layer's call.

        timesteps is T in this trace, None where that is not known or the trace leaves the layer
        out; with fixed_length it is that of the first trace.
        """
        variable = self._buffer.state_norms_of(key, held)

        def write():
            values = tf.cast(norms, variable.dtype)
            if not fixed_length:
                # Only where it may be needed: see kerasgrad.norms of what a condition costs.
                if timesteps is None or timesteps > (held.timesteps or 0):
                    _make_as_wide(variable, values)
                unused = tf.shape(variable)[1] - tf.shape(values)[0]
                values = tf.pad(values, [[0, unused]], constant_values=np.nan)
            self._write(variable, values)

        when(self._due, write)

    def write_applied(self, before: list, after: list) -> None:
        """The gradients that went into clipping, and what came out, without missing ones."""

        def write():
            norms = self._norms_of(before)
            applied = norms if same(before, after) else gradient_norms(after)
            number = tf.cast(self._number, tf.float64)
            row = [[number], self._by_weight(norms), self._by_weight(applied)]
            self._write(self._buffer.applied, tf.concat(row, axis=0))

        when(self._due, write)

    def close(self) -> None:
        """The step is done: its row counts."""

        def write():
            # Only now, when the graph has what clipping by a norm has summed up.
            norms = self._norms_of(self._gradients) / tf.cast(self._scale, tf.float64)
            row = [self._step_and_loss, self._by_weight(norms)]
            self._write(self._buffer.given, tf.concat(row, axis=0))

        when(self._due, write)
        # TensorFlow runs in any order what does not depend on each other, and a step that fails
        # half way must not leave a row.
        with tf.control_dependencies(_side_effects()):
            self._buffer.count.assign_add(1 if self._due is None else tf.cast(self._due, tf.int64))

    def _norms_of(self, gradients):
        """Their norms; of the row's own gradients they are worked out once, where that can be."""
        # From inside of a condition no tensor can be carried out.
        is_inside = tf.compat.v1.get_default_graph() is not self._graph
        if is_inside or not same(gradients, self._gradients):
            return gradient_norms(gradients)
        if self._norms is None:
            self._norms = gradient_norms(gradients)
        return self._norms

    def _by_weight(self, norms):
        """The norms of the gradients that are there, in the buffer's columns."""
        columns = len(self._buffer.weights)
        if len(self._present) == columns:
            return norms
        of_column = np.full(columns, len(self._present))
        of_column[self._present] = np.arange(len(self._present))
        return tf.gather(tf.concat([norms, [_NONE]], axis=0), of_column)

    def _write(self, variable, value):
        variable.scatter_update(tf.IndexedSlices(value, self._index))


def _split_columns(array, number):
    """([column, ...], the rest of the columns)."""
    return list(array[:, :number].T), array[:, number:]


def same(tensors: list, others: list) -> bool:
    """Whether two lists hold the same tensors, and not only equal ones."""
    return len(tensors) == len(others) and all(a is b for a, b in zip(tensors, others, strict=True))


def when(condition: tf.Tensor | None, act: Callable[[], Any]) -> None:
    """In the graph: act() where the condition holds; None is a condition that always does."""

    def act_and_return_nothing():
        act()

    if condition is None:
        act()
    else:
        tf.cond(condition, act_and_return_nothing, lambda: None)


def outside_of_the_trace(create: Callable[[], Any]) -> Any:
    """create(), which makes variables, while TensorFlow traces the train step.

    tf.function traces a second time when it sees a variable being made (even in tf.init_scope),
    and refuses one that a later trace makes. In a thread of its own there is nothing to see.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(create).result()


def _make_as_wide(variable, values):
    """Give the (capacity, T) variable at least as many columns as there are values."""

    def widen():
        missing = tf.shape(values)[0] - tf.shape(variable)[1]
        wider = tf.pad(variable, [[0, 0], [0, missing]], constant_values=np.nan)
        variable.assign(wider)

    when(tf.shape(values)[0] > tf.shape(variable)[1], widen)


def _side_effects():
    """All operations of the train step that is being traced which do more than compute a value."""
    if tf.executing_eagerly():
        return []
    operations = tf.compat.v1.get_default_graph().get_operations()
    return [operation for operation in operations if operation.op_def.is_stateful]
