"""RingBuffer: rows that a train step writes in its graph, and the host reads now and then."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from kerasgrad.norms import gradient_norms

_NO_GRADIENT = -1.0  # A norm is never negative, and NaN is a norm that can occur.


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
        dtype: of the norms.
    """

    def __init__(self, weights: tuple[str, ...], capacity: int, dtype: tf.DType):
        W = len(weights)
        self.weights = weights
        self.dtype = dtype
        self.capacity = capacity
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.step = tf.Variable(tf.zeros([capacity], tf.int64), trainable=False)
        self.loss = tf.Variable(tf.zeros([capacity], dtype), trainable=False)
        self.norms = tf.Variable(tf.zeros([capacity, W], dtype), trainable=False)
        # Norms of what went into clipping and of what came out of it, side by side.
        self.clipping = tf.Variable(tf.zeros([capacity, 2 * W], dtype), trainable=False)
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
        rows = np.arange(first, count) % self.capacity
        norms = self.norms.numpy()[rows]
        before, after = np.split(self.clipping.numpy()[rows], 2, axis=1)
        missing = norms == _NO_GRADIENT
        updated = (after != _NO_GRADIENT).any(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.where(missing | (before == 0), 1, after / before)
        return {
            "weights": self.weights,
            "step": self.step.numpy()[rows],
            "loss": self.loss.numpy()[rows],
            "norms": np.where(missing, np.nan, norms),
            "applied_norms": np.where(after == _NO_GRADIENT, np.nan, after),
            "missing": missing,
            "updated": updated,
            "clip_factor": np.where(updated, factors.min(axis=1), np.nan),
            "state_norms": {
                self._name(key): variable.numpy()[rows]
                for key, variable in self._state_norms.items()
            },
        }

    def _name(self, key):
        """The layer's path; and the number of the call, where a step calls the layer repeatedly."""
        path, _ = key
        calls = sorted(call for (other, _), call in self._calls.items() if other == path)
        number = calls.index(self._calls[key]) + 1
        return path if len(calls) == 1 else f"{path} (call {number} of {len(calls)})"


class Row:
    """In the graph: the row of a ring buffer that the present step writes.

    Args:
        buffer: the ring buffer.
        gradients: one for each of its weights, or None; summed over the replicas.
        due: scalar bool tensor, whether this step is recorded; None for always.
    """

    def __init__(self, buffer: RingBuffer, gradients: list, due: tf.Tensor | None):
        self._buffer = buffer
        self._present = [i for i, g in enumerate(gradients) if g is not None]
        self._gradients = [gradients[i] for i in self._present]
        self._due = due
        self._index = tf.cast(buffer.count % buffer.capacity, tf.int32)
        # Shared with write_applied; inside of a tf.cond there is nothing to share.
        self._norms = gradient_norms(self._gradients) if due is None else None

    def write_given(self, step: tf.Tensor, scale: Any, loss: tf.Tensor) -> None:
        """What is known before the optimizer has its turn; `scale` multiplies the gradients."""
        buffer = self._buffer

        def write():
            norms = gradient_norms(self._gradients) if self._norms is None else self._norms
            self._write(buffer.step, tf.cast(step, tf.int64))
            self._write(buffer.loss, tf.cast(loss, buffer.dtype))
            self._write(buffer.norms, self._by_weight(norms / tf.cast(scale, tf.float64)))
            # What stays where the optimizer leaves the weights alone.
            not_updated = tf.fill(
                [2 * buffer.norms.shape[1]], tf.constant(_NO_GRADIENT, buffer.dtype)
            )
            self._write(buffer.clipping, not_updated)

        when(self._due, write)

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
            unscaled = self._norms is None or not same(before, self._gradients)
            norms = gradient_norms(before) if unscaled else self._norms
            applied = norms if same(before, after) else gradient_norms(after)
            values = tf.concat([self._by_weight(norms), self._by_weight(applied)], axis=0)
            self._write(self._buffer.clipping, values)

        when(self._due, write)

    def close(self) -> None:
        """The step is done: its row counts."""
        # TensorFlow runs in any order what does not depend on each other, and a step that fails
        # half way must not leave a row.
        with tf.control_dependencies(_side_effects()):
            self._buffer.count.assign_add(1 if self._due is None else tf.cast(self._due, tf.int64))

    def _by_weight(self, norms):
        """The norms of the gradients that are there, in the buffer's columns."""
        columns = self._buffer.norms.shape[1]
        if len(self._present) < columns:
            of_column = np.full(columns, len(self._present))
            of_column[self._present] = np.arange(len(self._present))
            norms = tf.gather(tf.concat([norms, [_NO_GRADIENT]], axis=0), of_column)
        return tf.cast(norms, self._buffer.dtype)

    def _write(self, variable, value):
        variable.scatter_update(tf.IndexedSlices(value, self._index))


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
