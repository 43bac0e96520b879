"""GradientNorms: the gradient norms of every step of `model.fit`, from the gradients it computed.

How the record is made. `fit` compiles its train step into a graph, so what is to be measured must
be part of that graph. While a callback records, `TrainStepHooks` stands around a handful of methods
of this one model and its optimizer (instance attributes; the classes stay as they are):

    model.train_step          a step begins
    model.compute_loss        its loss
    layer.inner_loop          a call of a kerasgrad layer, whose BPTT will hand over ∂L/∂s_t
    optimizer.apply           the gradients, as the train step's own GradientTape computed them
    optimizer._clip_gradients the gradients, after clipping
    model.train_function      counts steps, and takes all hooks away when a step fails
    model.make_train_function takes all hooks away when the next fit begins

The norms are assigned, inside the graph, to variables used as ring buffers (`_RingBuffer`), which
the host reads now and then. Nothing is computed twice, and no batch waits for the host.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kerasgrad.history import GradientHistory, global_norm, is_clipped

_ROWS = 256  # Steps between two reads of a ring buffer, at most.
_NO_GRADIENT = -1.0  # A norm is never negative, and NaN is a norm that can occur.


class GradientNorms(keras.callbacks.Callback):
    """Records the gradient norms of every step of `model.fit` into a `GradientHistory`.

    The gradients are those that the train step's own GradientTape computed for this very batch:
    there is no second backward pass, and the weights after training are bit for bit those of a
    training without the callback. Recorded for each optimizer step, before and after clipping,
    loss scale undone: the L2 norm of each weight's gradient, the batch's own loss, and for
    kerasgrad's recurrent layers the norms of ∂L/∂s_t. See `kerasgrad.GradientHistory`.

    Each epoch's logs gain `grad_norm` (mean over the epoch's steps of the global norm before
    clipping), `grad_norm_max` (its maximum) and `grad_clip_rate` (share of the updates that
    clipping changed); with several optimizers each name ends in `_<key of optimizers>`. A NaN in
    any step makes the first two NaN. History, CSVLogger and trackers see them; a callback that
    monitors them, such as EarlyStopping(monitor="grad_norm", mode="min"), must come after
    GradientNorms in the list, since Keras hands logs from callback to callback in that order.

    `fit` called again with the same callback goes on with the same record. When `fit` ends, or a
    step raises, the model is as if the callback had never been there. An exception elsewhere (in
    another callback, in the data) leaves the hooks until the next `fit`, `detach()`, or the end of
    `with GradientNorms() as norms:`.

    Args:
        optimizers: None for `model.optimizer`, or a dict of names to optimizers for a model whose
            `train_step` uses several; `histories` then has one record for each.

    Raises:
        ValueError: at the start of `fit`, when the model has no optimizer or no trainable weights,
            or its `train_step` is wrapped in tf.function.

    Example:

    >>> import keras, numpy as np
    >>> import kerasgrad as kg
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.SGD(0.1, clipnorm=1.0), loss="mse")
    >>> norms = kg.callbacks.GradientNorms()
    >>> x, y = np.ones((8, 2)), 100 * np.ones((8, 1))
    >>> _ = model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[norms])
    >>> norms.history
    <GradientHistory: 6 steps, 2 weights>
    >>> bool(norms.history.global_norm.min() > 100), norms.history.clip_rate
    (True, 1.0)
    """

    def __init__(self, optimizers: Mapping[str, keras.optimizers.Optimizer] | None = None):
        super().__init__()
        self._optimizers = optimizers
        self._recorders: dict[str, _Recorder] = {}
        self._hooks: TrainStepHooks | None = None

    @property
    def history(self) -> GradientHistory:
        """The record, up to the last finished step.

        Raises:
            ValueError: with `optimizers=`, where there is one record for each: see `histories`.
        """
        if self._optimizers is not None:
            raise ValueError(
                "This GradientNorms has one history for each of its optimizers. Use "
                f"`histories[name]` with one of {list(self._optimizers)}."
            )
        return self.histories.get("", GradientHistory())

    @property
    def histories(self) -> dict[str, GradientHistory]:
        """{name: record}, up to the last finished step; one record under "" without optimizers=."""
        for recorder in self._recorders.values():
            recorder.read()
        return {name: recorder.history for name, recorder in self._recorders.items()}

    def on_train_begin(self, logs=None):
        model = self.model
        optimizers = self._optimizers
        if optimizers is None:
            if model.optimizer is None:
                raise ValueError(
                    "GradientNorms records what model.optimizer is given, and this model has none. "
                    "Call model.compile(optimizer=..., loss=...) before fit, or pass "
                    'optimizers={"name": optimizer} for a train_step with its own optimizers.'
                )
            optimizers = {"": model.optimizer}
        # A model without an input shape has no weights at all before its first batch.
        if model.built and not model.trainable_variables:
            raise ValueError(
                f"GradientNorms found no trainable weights in model {model.name!r}: there is no "
                "gradient to record. Set `trainable = True` on a layer and compile again."
            )
        if isinstance(model.train_step, tf.types.experimental.PolymorphicFunction):
            raise ValueError(
                f"{type(model).__name__}.train_step is wrapped in tf.function, which keeps what it "
                "once traced: GradientNorms cannot record in it. Remove the tf.function; fit "
                "compiles train_step itself."
            )
        self._hooks = TrainStepHooks.of(model, self._hooks)
        for name, optimizer in optimizers.items():
            recorder = self._recorders.setdefault(name, _Recorder())
            recorder.begin(optimizer, model.steps_per_execution)
            self._hooks.add(recorder)

    def on_epoch_begin(self, epoch, logs=None):
        for recorder in self._recorders.values():
            recorder.begin_epoch(epoch)

    def on_epoch_end(self, epoch, logs=None):
        for name, recorder in self._recorders.items():
            recorder.read()
            if logs is not None:
                suffix = f"_{name}" if name else ""
                logs |= {key + suffix: value for key, value in recorder.summary().items()}

    def on_train_end(self, logs=None):
        self.detach()

    def detach(self) -> None:
        """Take the hooks off the model. The record stays; the next `fit` goes on with it."""
        for recorder in self._recorders.values():
            recorder.read()
            if self._hooks is not None:
                self._hooks.remove(recorder)

    def __enter__(self) -> GradientNorms:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


class TrainStepHooks:
    """The hooks around one model's train step, shared by all callbacks that record it.

    Stands in as `model.train_function` while there are recorders.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.recorders: list[_Recorder] = []
        # What fit has just made with make_train_function, and has not traced with any hook on.
        self._plain_function = model.train_function
        self._recording_function: Callable | None = None
        self._traced_for: list[_Recorder] = []
        self._replaced: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._steps: dict[int, _Step] = {}
        # Held in variables from where they are computed until the optimizer has the step's row: the
        # place may be inside of a tf.function of the user's, from which no tensor can be carried
        # out.
        self._held_loss = tf.Variable(np.nan, dtype=tf.float64, trainable=False)
        self._held_state_norms: dict[tuple[str, int], _HeldStateNorms] = {}

    @classmethod
    def of(cls, model: keras.Model, earlier: TrainStepHooks | None) -> TrainStepHooks:
        """The hooks now on the model; else those of an earlier fit, if still right; else new ones.

        Keras keeps its compiled train function until the model is compiled again, and so do the
        hooks: a second fit traces nothing anew.
        """
        if isinstance(model.train_function, cls):
            return model.train_function
        if (
            earlier is not None
            and earlier.model is model
            and earlier._plain_function is model.train_function
        ):
            return earlier
        return cls(model)

    def add(self, recorder: _Recorder) -> None:
        updating = _updating(recorder.optimizer)
        _check_clip_method(updating)
        if not self.recorders:
            self._attach()
        self.recorders.append(recorder)
        self._replace(recorder.optimizer, "apply", self._apply)
        self._replace(updating, _CLIP_METHOD, self._clip_gradients)

    def remove(self, recorder: _Recorder) -> None:
        if recorder in self.recorders:
            self.recorders.remove(recorder)
            if not self.recorders:
                self._detach()

    def __call__(self, iterator):
        """One call of the train function by `fit`: steps_per_execution steps."""
        if self._traced_for != self.recorders:
            self._make_recording_function()
        try:
            logs = self._recording_function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            raise  # The end of the data, which fit expects.
        except BaseException:
            self._remove_all()
            raise
        for recorder in self.recorders:
            recorder.read_if_due()
        return logs

    def _attach(self):
        model = self.model
        self._replace(model, "train_step", self._train_step)
        self._replace(model, "compute_loss", self._compute_loss)
        self._replace(model, "make_train_function", self._begin_next_fit)
        for layer in _all_layers(model):
            if hasattr(layer, "on_state_gradients"):
                self._replace(layer, "inner_loop", self._inner_loop)
        model.train_function = self

    def _detach(self):
        for owner, name, before in self._replaced.values():
            _restore(owner, name, before)
        self._replaced.clear()
        if self.model.train_function is self:
            self.model.train_function = self._plain_function

    def _remove_all(self):
        for recorder in list(self.recorders):
            recorder.read()
            self.remove(recorder)

    def _replace(self, owner, name, around):
        """Shadow owner.name by around(owner, inner, ...), on this one object, until _detach."""
        if (id(owner), name) in self._replaced:
            return
        inner = getattr(owner, name)

        def replacement(*args, **kwargs):
            return around(owner, inner, *args, **kwargs)

        self._replaced[id(owner), name] = owner, name, vars(owner).get(name)
        # Keras's own __setattr__ would track what it is given as a part of the model.
        object.__setattr__(owner, name, replacement)

    def _begin_next_fit(self, model, make_train_function, force=False):
        # fit makes its train function before it tells any callback that training begins: hooks
        # that are still here were left by a fit that did not end.
        self._remove_all()
        return make_train_function(force=force)

    def _make_recording_function(self):
        """A train function that is traced with the hooks of just these recorders on."""
        self._traced_for = list(self.recorders)
        self._held_state_norms = {}
        for recorder in self.recorders:
            recorder.start_new_buffers()
        model = self.model
        begin_next_fit = vars(model)["make_train_function"]
        object.__delattr__(model, "make_train_function")
        model.make_train_function(force=True)
        self._recording_function = model.train_function
        model.train_function = self
        object.__setattr__(model, "make_train_function", begin_next_fit)

    # What follows runs while TensorFlow traces the train step (or at each step, run eagerly).

    def _train_step(self, model, train_step, *args, **kwargs):
        replica = _replica_id()
        self._steps[replica] = _Step()
        if _is_first_replica():
            self._held_loss.assign(np.nan)
        try:
            return train_step(*args, **kwargs)
        finally:
            del self._steps[replica]

    def _compute_loss(self, model, compute_loss, *args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        if _replica_id() in self._steps:  # Validation computes a loss, too.
            # What the tape differentiates is the sum, where somebody's loss is not a scalar.
            (total,) = _sum_over_replicas([tf.reduce_sum(_read_apart(loss))])
            if _is_first_replica():
                self._held_loss.assign(tf.cast(total, tf.float64))
        return loss

    def _inner_loop(self, layer, inner_loop, sequences, *args, **kwargs):
        step = self._steps.get(_replica_id())
        if step is None:
            return inner_loop(sequences, *args, **kwargs)
        # The gradients of a layer's calls come in no particular order: each call has its number.
        step.calls += 1
        call, T = step.calls, sequences.shape[1]
        before = vars(layer).get("on_state_gradients")
        object.__setattr__(
            layer,
            "on_state_gradients",
            lambda λ: self._hold_state_norms(layer.path, call, T, λ),
        )
        try:
            return inner_loop(sequences, *args, **kwargs)
        finally:
            _restore(layer, "on_state_gradients", before)

    def _hold_state_norms(self, path, call, T, λ):
        step = self._steps.get(_replica_id())
        if step is None:  # Somebody's own tape, outside of the train step.
            return
        # Counted again as they arrive: Keras also calls layers just to learn their output shapes,
        # but only when it builds them, and every trace must find the variables of the first.
        key = path, step.state_gradients[path]
        step.state_gradients[path] += 1
        norms = _mean_over_replicas(tf.ensure_shape(_state_norms(λ), [T]))
        if key not in self._held_state_norms:
            self._held_state_norms[key] = _outside_of_the_trace(lambda: _HeldStateNorms(T))
        held = self._held_state_norms[key]
        held.call = call
        if self.model.jit_compile is True and held.timesteps != T:
            warnings.warn(
                f"GradientNorms records no state norms of layer {path!r} for sequences of "
                "varying length under jit_compile=True, where a variable cannot change its shape. "
                "Pad the sequences to one length, or compile with jit_compile=False.",
                stacklevel=2,
            )
        elif _is_first_replica():
            held.variable.assign(norms)

    def _apply(self, optimizer, apply, grads, trainable_variables=None):
        step = self._steps.get(_replica_id())
        # Nothing to record: somebody's own update, outside of the train step, or an empty one.
        if step is None or len(grads) == 0:
            return apply(grads, trainable_variables)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = trainable_variables or _variables_built_on(optimizer)
        # The scales of float8 training come as gradients, too, and are no such thing.
        given = [
            (g, v)
            for g, v in zip(grads, variables, strict=False)
            if not getattr(v, "overwrite_with_gradient", False)
        ]
        step.grads, variables = [g for g, _ in given], [v for _, v in given]
        # With loss scaling, what comes is the gradient of the scaled loss.
        scale = optimizer.scale_loss(1.0)
        step.norms = _norms(step.grads)
        if _is_first_replica():
            iterations, loss = _updating(optimizer).iterations, self._held_loss.read_value()
            step.rows = [
                recorder.open_row(variables, iterations, step.norms, scale, loss)
                for recorder in self.recorders
                if recorder.optimizer is optimizer
            ]
            for key, held in self._held_state_norms.items():
                norms = held.take() / tf.cast(scale, tf.float64)
                for row in step.rows:
                    row.write_state_norms(
                        key, norms, held, fixed_length=self.model.jit_compile is True
                    )
        apply(grads, trainable_variables)
        for row in step.rows:
            row.close()
        step.end_update()
        return None

    def _clip_gradients(self, optimizer, clip_gradients, grads):
        grads = list(grads)
        clipped = list(clip_gradients(grads))
        step = self._steps.get(_replica_id())
        if step is None or not step.grads:  # Not of an update that is recorded.
            return clipped
        given = [(g, norm) for g, norm in zip(step.grads, step.norms, strict=True) if g is not None]
        if _same(grads, [g for g, _ in given]):
            before = [norm for _, norm in given]
        else:  # Unscaled, or the mean over the micro-steps of gradient accumulation.
            before = _norms(grads)
        after = before if _same(grads, clipped) else _norms(clipped)
        for row in step.rows:
            row.write_applied(before, after)
        return clipped


class _Step:
    """What the hooks have seen of the train step that is being traced."""

    def __init__(self):
        self.calls = 0  # of recurrent layers
        self.state_gradients: Counter[str] = Counter()  # of each recurrent layer, by path
        self.end_update()

    def end_update(self):
        self.grads: list = []
        self.norms: list[tf.Tensor] = []
        self.rows: list[_Row] = []
        self.state_gradients.clear()


class _HeldStateNorms:
    """A layer's state norms of one call, (T,) float64, from its gradient until the update."""

    def __init__(self, timesteps: int | None):
        self.timesteps = timesteps  # of the first trace; others may differ, except under XLA
        self.call = 0
        self.variable = tf.Variable(
            tf.fill([timesteps or 0], tf.constant(np.nan, tf.float64)),
            shape=[None],
            trainable=False,
        )

    def take(self) -> tf.Tensor:
        norms = self.variable.read_value()
        # A layer that the next step does not use must not show this step's norms there.
        self.variable.assign(tf.fill(tf.shape(norms), tf.constant(np.nan, tf.float64)))
        return norms


class _Recorder:
    """One optimizer's record: ring buffers in the graph, and the history they are read into."""

    def __init__(self):
        self.history = GradientHistory()
        self.optimizer: keras.optimizers.Optimizer | None = None
        self._buffers: dict[tuple[str, ...], _RingBuffer] = {}
        self._capacity = _ROWS
        self._epoch = 0
        # A user may read the history from a thread, or while Keras dispatches callbacks in one.
        self._lock = threading.Lock()
        self.begin_epoch(0)

    def begin(self, optimizer: keras.optimizers.Optimizer, steps_per_execution: int) -> None:
        self.optimizer = optimizer
        self._capacity = max(_ROWS, 4 * steps_per_execution)
        self._calls = 0
        self._calls_to_next_read = 1

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._sum, self._max, self._steps, self._updates, self._clipped = 0.0, 0.0, 0, 0, 0

    def summary(self) -> dict[str, float]:
        """grad_norm, grad_norm_max and grad_clip_rate of the steps since begin_epoch."""
        return {
            "grad_norm": self._sum / self._steps if self._steps else np.nan,
            "grad_norm_max": self._max if self._steps else np.nan,
            "grad_clip_rate": self._clipped / self._updates if self._updates else np.nan,
        }

    def start_new_buffers(self) -> None:
        self.read()
        self._buffers = {}

    def open_row(self, variables, step, norms, scale, loss) -> _Row:
        """In the graph: a new row, with what is known before the optimizer has its turn."""
        weights = _paths(variables)
        if weights not in self._buffers:
            wide = any(v.dtype in ("float64", tf.float64) for v in variables)
            dtype = tf.float64 if wide else tf.float32
            self._buffers[weights] = _outside_of_the_trace(
                lambda: _RingBuffer(weights, self._capacity, dtype)
            )
        row = _Row(self._buffers[weights], norms)
        row.write_given(step, scale, loss)
        return row

    def read_if_due(self) -> None:
        """Read the buffers in time before they come round."""
        self._calls += 1
        if self._calls >= self._calls_to_next_read:
            rows_per_call = self.read() / self._calls
            self._calls_to_next_read = max(1, int(self._capacity / (2 * max(rows_per_call, 1))))
            self._calls = 0

    def read(self) -> int:
        """Move the rows that are not in the history yet into it; their number."""
        with self._lock:
            pieces = [buffer.read() for buffer in self._buffers.values()]
            # More than one only where an optimizer is given now these weights, now those.
            pieces = sorted((p for p in pieces if len(p["step"])), key=lambda p: p["step"][0])
            for piece in pieces:
                self.history.append(epoch=self._epoch, **piece)
                self._summarize(piece)
            return sum(len(piece["step"]) for piece in pieces)

    def _summarize(self, piece):
        norms = global_norm(piece["norms"], piece["missing"])
        self._steps += len(norms)
        self._sum += norms.sum()
        self._max = np.maximum(self._max, norms.max())  # NaN if either is
        self._updates += np.count_nonzero(piece["updated"])
        self._clipped += np.count_nonzero(is_clipped(piece["clip_factor"]))


class _RingBuffer:
    """Rows that the train step writes in the graph, and the host reads."""

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
        self.state_norms: dict[tuple[str, int], tf.Variable] = {}
        self._calls: dict[tuple[str, int], int] = {}
        self._read = 0

    def state_norms_of(self, key: tuple[str, int], held: _HeldStateNorms) -> tf.Variable:
        """(capacity, T); T grows with the longest sequence, where it is not known beforehand."""
        self._calls[key] = held.call
        if key not in self.state_norms:
            shape = self.capacity, held.timesteps or 0
            self.state_norms[key] = _outside_of_the_trace(
                lambda: tf.Variable(
                    tf.fill(shape, tf.constant(np.nan, self.dtype)),
                    shape=[self.capacity, None],
                    trainable=False,
                )
            )
        return self.state_norms[key]

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
                for key, variable in self.state_norms.items()
            },
        }

    def _name(self, key):
        """The layer's path; and the number of the call, where a step calls the layer repeatedly."""
        path, _ = key
        calls = sorted(call for (other, _), call in self._calls.items() if other == path)
        number = calls.index(self._calls[key]) + 1
        return path if len(calls) == 1 else f"{path} (call {number} of {len(calls)})"


class _Row:
    """In the graph: the row of a ring buffer that the present step writes."""

    def __init__(self, buffer: _RingBuffer, norms: list[tf.Tensor]):
        self._buffer = buffer
        self._norms = norms
        self._index = tf.cast(buffer.count % buffer.capacity, tf.int32)

    def write_given(self, step, scale, loss):
        buffer = self._buffer
        scale = tf.cast(scale, tf.float64)
        norms = [norm if norm is None else norm / scale for norm in self._norms]
        self._write(buffer.step, tf.cast(step, tf.int64))
        self._write(buffer.loss, tf.cast(loss, buffer.dtype))
        self._write(buffer.norms, self._by_weight(norms))
        # What stays where the optimizer leaves the weights alone.
        not_updated = tf.fill([2 * len(norms)], tf.constant(_NO_GRADIENT, buffer.dtype))
        self._write(buffer.clipping, not_updated)

    def write_state_norms(self, key, norms, held, fixed_length):
        variable = self._buffer.state_norms_of(key, held)
        norms = tf.cast(norms, variable.dtype)
        if not fixed_length:
            _make_as_wide(variable, norms)
            unused = tf.shape(variable)[1] - tf.shape(norms)[0]
            norms = tf.pad(norms, [[0, unused]], constant_values=np.nan)
        self._write(variable, norms)

    def write_applied(self, before, after):
        values = tf.concat([self._by_weight(before), self._by_weight(after)], axis=0)
        self._write(self._buffer.clipping, values)

    def close(self):
        # TensorFlow runs in any order what does not depend on each other, and a step that fails
        # half way must not leave a row.
        with tf.control_dependencies(_side_effects()):
            self._buffer.count.assign_add(1)

    def _by_weight(self, norms):
        """Norms in the buffer's columns; `norms` may leave out those of missing gradients."""
        present = [i for i, norm in enumerate(self._norms) if norm is not None]
        values = [_NO_GRADIENT] * len(self._norms)
        for i, norm in zip(present, [n for n in norms if n is not None], strict=True):
            values[i] = norm
        return tf.cast(tf.stack([tf.cast(v, tf.float64) for v in values]), self._buffer.dtype)

    def _write(self, variable, value):
        variable.scatter_update(tf.IndexedSlices(value, self._index))


def _make_as_wide(variable, values):
    """Give the (capacity, T) variable at least as many columns as there are values."""

    def widen():
        missing = tf.shape(values)[0] - tf.shape(variable)[1]
        wider = tf.pad(variable, [[0, 0], [0, missing]], constant_values=np.nan)
        variable.assign(wider)

    tf.cond(tf.shape(values)[0] > tf.shape(variable)[1], widen, lambda: None)


def _outside_of_the_trace(create: Callable[[], Any]) -> Any:
    """create(), which makes variables, while TensorFlow traces the train step.

    tf.function traces a second time when it sees a variable being made (even in tf.init_scope),
    and refuses one that a later trace makes. In a thread of its own there is nothing to see.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(create).result()


def _side_effects() -> list[tf.Operation]:
    """All operations of the train step that is being traced which do more than compute a value."""
    if tf.executing_eagerly():
        return []
    operations = tf.compat.v1.get_default_graph().get_operations()
    return [operation for operation in operations if operation.op_def.is_stateful]


def _restore(owner: Any, name: str, before: Any) -> None:
    """Undo object.__setattr__(owner, name, ...), where vars(owner).get(name) was `before`."""
    object.__delattr__(owner, name)
    if before is not None:
        object.__setattr__(owner, name, before)


def _updating(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """What clips, updates and counts: the optimizer inside of a LossScaleOptimizer, or itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _norms(grads: list) -> list[tf.Tensor | None]:
    """L2 norm of each gradient, float64; None for None. Over all replicas, of their sum."""
    present = _sum_over_replicas([g for g in grads if g is not None])
    norms = iter([_norm(g) for g in present])
    return [None if g is None else next(norms) for g in grads]


def _norm(g: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    # In float64 the square of any smaller float neither overflows nor vanishes: a gradient of
    # 1e-30 has a norm, and so has one of 1e30.
    values = _summed_rows(g) if isinstance(g, tf.IndexedSlices) else _read_apart(g)
    values = tf.cast(values, tf.float64)
    return tf.sqrt(tf.reduce_sum(values * values))


_PRODUCTS = {"Mul": tf.raw_ops.Mul, "RealDiv": tf.raw_ops.RealDiv}


def _read_apart(tensor: tf.Tensor) -> tf.Tensor:
    """The same tensor, read so that the update is compiled as it is without a reader.

    TensorFlow's graph optimizer turns lr * (scale * g) into (lr * scale) * g, which rounds
    otherwise, unless somebody else reads scale * g. So a product is not read, but multiplied once
    more; a Snapshot of its factors keeps the optimizer from seeing that both are the same.
    """
    if tf.executing_eagerly() or tensor.op.type not in _PRODUCTS:
        return tensor
    x, y = (tf.raw_ops.Snapshot(input=_read_apart(factor)) for factor in tensor.op.inputs)
    return _PRODUCTS[tensor.op.type](x=x, y=y)


def _summed_rows(g: tf.IndexedSlices) -> tf.Tensor:
    """The rows of an embedding's sparse gradient, those of the same index added up."""
    order = tf.argsort(g.indices)
    indices = tf.gather(g.indices, order)
    is_new = tf.cast(indices[1:] != indices[:-1], tf.int32)
    segments = tf.concat([[0], tf.cumsum(is_new)], axis=0)
    return tf.math.unsorted_segment_sum(
        tf.gather(_read_apart(g.values), order), segments, tf.shape(g.indices)[0]
    )


def _state_norms(λ: tf.Tensor) -> tf.Tensor:
    """(T,) mean over the batch of ‖∂L/∂s_t‖₂, from λ (T, batch, units)."""
    λ = tf.cast(λ, tf.float64)
    return tf.reduce_mean(tf.sqrt(tf.reduce_sum(λ * λ, axis=2)), axis=1)


def _same(tensors: list, others: list) -> bool:
    return len(tensors) == len(others) and all(a is b for a, b in zip(tensors, others, strict=True))


# tf.distribute: each replica traces the train step. The loss and the gradients of the global batch
# are the sums over the replicas, and the first replica writes them down.


def _replicas() -> tf.distribute.ReplicaContext | None:
    context = tf.distribute.get_replica_context()
    return context if context is not None and context.num_replicas_in_sync > 1 else None


def _replica_id() -> int:
    context = _replicas()
    return int(tf.get_static_value(context.replica_id_in_sync_group)) if context else 0


def _is_first_replica() -> bool:
    return _replica_id() == 0


def _sum_over_replicas(tensors: list) -> list:
    context = _replicas()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors) if context else tensors


def _mean_over_replicas(tensor: tf.Tensor) -> tf.Tensor:
    context = _replicas()
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, tensor) if context else tensor


# What Keras keeps private and nothing public stands in for. tests/test_callbacks.py fails loudly
# when a version of Keras changes one of these.

# Gradients after unscaling and accumulation go in, what the update rule receives comes out.
_CLIP_METHOD = "_clip_gradients"


def _check_clip_method(optimizer: keras.optimizers.Optimizer) -> None:
    if not callable(getattr(optimizer, _CLIP_METHOD, None)):
        raise RuntimeError(
            f"{type(optimizer).__name__} of Keras {keras.__version__} has no {_CLIP_METHOD}, "
            "where GradientNorms measures what clipping does. Expected an optimizer derived from "
            "keras.optimizers.Optimizer, of a Keras version that kerasgrad supports (see its "
            "README)."
        )


def _variables_built_on(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables of optimizer.apply(grads), when it is called without them."""
    return optimizer._trainable_variables


def _all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers at every depth, inside of wrappers and nested models, too."""
    return list(model._flatten_layers(include_self=False, recursive=True))


def _paths(variables: list) -> tuple[str, ...]:
    """A name for each weight that no other has."""
    paths = [getattr(v, "path", v.name) for v in variables]
    seen: Counter[str] = Counter()
    unique = []
    for path in paths:
        seen[path] += 1
        unique.append(path if seen[path] == 1 else f"{path}_{seen[path]}")
    return tuple(unique)
