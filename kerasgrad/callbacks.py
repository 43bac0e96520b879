"""GradientNorms: the gradient norms of every step of `model.fit`, from the gradients it computed.

How the record is made. `fit` compiles its train step into a graph, so what is to be measured must
be part of that graph. While a callback records, `_TrainStepHooks` stands around a handful of
methods of this one model and its optimizer (instance attributes; the classes stay as they are):

    model.train_step          a step begins
    model.compute_loss        its loss
    layer.inner_loop          a call of a kerasgrad layer, whose BPTT will hand over ∂L/∂s_t
    optimizer.apply           the gradients, as the train step's own GradientTape computed them
    optimizer._clip_gradients the gradients, after clipping
    model.train_function      counts steps, and takes all hooks away when a step fails
    model.make_train_function takes all hooks away when the next fit begins

The norms are assigned, inside the graph, to variables used as ring buffers (see
`kerasgrad.ring_buffer`), which the host reads now and then. Nothing is computed twice, and no batch
waits for the host.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kerasgrad.history import GradientHistory, global_norm, is_clipped
from kerasgrad.norms import gradient_norms, read_apart, state_norms
from kerasgrad.ring_buffer import (
    HeldStateNorms,
    RingBuffer,
    Row,
    outside_of_the_trace,
    same,
    when,
)
from kerasgrad.streams import CSVStream, TensorBoardStream, rows_before

_ROWS = 256  # Steps between two reads of a ring buffer, at most.
_STRATEGIES = (
    type(tf.distribute.get_strategy()),
    tf.distribute.OneDeviceStrategy,
    tf.distribute.MirroredStrategy,
)


class GradientNorms(keras.callbacks.Callback):
    """Records the gradient norms of every step of `model.fit` into a `GradientHistory`.

    The gradients are those that the train step's own GradientTape computed for this very batch:
    there is no second backward pass, and the weights after training are bit for bit those of a
    training without the callback; the last bit may differ under jit_compile=True where clipnorm
    clips an embedding, and with stop, raise or stop_above for a weight whose gradient is a mere
    product (one that has no part in the loss but its regularizer). Recorded for each optimizer
    step, before and after clipping, loss scale undone: the L2 norm of each weight's gradient, the
    batch's own loss, and for kerasgrad's recurrent layers the norms of ∂L/∂s_t. See
    `kerasgrad.GradientHistory`.

    Each epoch's logs gain `grad_norm` (mean over the epoch's recorded steps of the global norm
    before clipping), `grad_norm_max` (its maximum) and `grad_clip_rate` (share of the updates that
    clipping changed); with several optimizers each name ends in `_<key of optimizers>`. A NaN in
    any step makes the first two NaN. History, CSVLogger and trackers see them; a callback that
    monitors them, such as EarlyStopping(monitor="grad_norm", mode="min"), must come after
    GradientNorms in the list, since Keras hands logs from callback to callback in that order. With
    batch_logs=True they are in the logs before the first callback sees them, in any order.

    `fit` called again with the same callback goes on with the same record. A training that
    keras.callbacks.BackupAndRestore has put back to an earlier step replaces the rows from there
    on; in a new process it finds the earlier rows in `csv`. When `fit` ends, or a step raises, the
    model is as if the callback had never been there. An exception elsewhere (in another callback,
    in the data) leaves the hooks until the next `fit`, `detach()`, or the end of
    `with GradientNorms() as norms:`.

    Args:
        optimizers: None for `model.optimizer`, or a dict of names to optimizers for a model whose
            `train_step` uses several; `histories` then has one record for each.
        weights: which weights to record: a pattern or a list of patterns (as in fnmatch, against a
            variable's path or its name: "*/recurrent_kernel", "bias"), or a function of the
            variable. The global norms are then those of the recorded weights. None is all.
        every: record the steps whose number divides by this, and compute no norms at the others.
            "stop", "raise" and stop_above look at each step all the same, and record the last one.
        csv: a file that each row is appended to as soon as its step is done; with several
            optimizers <name>_<key>.csv each. ∂L/∂s_t is not in it.
        log_dir: a folder for TensorBoard: gradient_norm/... before and applied_gradient_norm/...
            after clipping by step, and once an epoch an image of ‖∂L/∂s_t‖; with several optimizers
            a folder each below it.
        batch_logs: show the epoch's grad_norm so far in the progress bar.
        on_nonfinite: what to do when a gradient is NaN or Inf: "warn" once and go on, "stop" the
            training, or "raise" a FloatingPointError. The last two leave the weights as they were
            before that step. Steps that a LossScaleOptimizer skips do not count. None does nothing.
        stop_above: stop the training when the global norm before clipping is above this, and leave
            the weights as they were before that step.

    csv, log_dir, batch_logs, on_nonfinite and stop_above read the record after each call of the
    train function; otherwise it is read every hundred steps or so. Under MirroredStrategy a
    training that is stopped has applied its last gradient.

    Raises:
        ValueError: at the start of `fit`, when the model has no optimizer or no trainable weights,
            its `train_step` is wrapped in tf.function, no weight is selected, `csv` is a file of
            somebody else's, or the model is trained under a strategy other than MirroredStrategy.
        OSError: at the start of `fit`, when `csv` or `log_dir` cannot be written.

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

    def __init__(
        self,
        optimizers: Mapping[str, keras.optimizers.Optimizer] | None = None,
        *,
        weights: str | Sequence[str] | Callable[[keras.Variable], bool] | None = None,
        every: int = 1,
        csv: str | os.PathLike | None = None,
        log_dir: str | os.PathLike | None = None,
        batch_logs: bool = False,
        on_nonfinite: str | None = None,
        stop_above: float | None = None,
    ):
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive number of steps. Received: {every!r}.")
        if on_nonfinite not in (None, "warn", "stop", "raise"):
            raise ValueError(
                f'on_nonfinite must be None, "warn", "stop" or "raise". Received: {on_nonfinite!r}.'
            )
        if stop_above is not None and not stop_above > 0:
            raise ValueError(f"stop_above must be a positive norm. Received: {stop_above!r}.")
        self._optimizers = optimizers
        self._batch_logs = batch_logs
        self._recorders = {
            name: _Recorder(
                name,
                weights=weights,
                every=every,
                limits=_Limits(on_nonfinite, stop_above),
                csv=None if csv is None else CSVStream(_named(Path(csv), name)),
                tensorboard=None if log_dir is None else TensorBoardStream(Path(log_dir) / name),
                batch_logs=batch_logs,
            )
            for name in ([""] if optimizers is None else optimizers)
        }
        self._hooks: _TrainStepHooks | None = None

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
        return self.histories[""]

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
        self._check(model)
        self._hooks = _TrainStepHooks.of(model, self._hooks)
        for name, recorder in self._recorders.items():
            recorder.begin(optimizers[name], model.steps_per_execution)
            self._hooks.add(recorder)

    def _check(self, model):
        strategy = model.distribute_strategy
        if strategy is not None and not isinstance(strategy, _STRATEGIES):
            # A class with two names, of which people know one.
            several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
            name = "MultiWorkerMirroredStrategy" if several else type(strategy).__name__
            raise ValueError(
                f"GradientNorms does not know how {name} adds up gradients. It "
                "records under tf.distribute.MirroredStrategy, OneDeviceStrategy, or none."
            )
        if isinstance(model.train_step, tf.types.experimental.PolymorphicFunction):
            raise ValueError(
                f"{type(model).__name__}.train_step is wrapped in tf.function, which keeps what it "
                "once traced: GradientNorms cannot record in it. Remove the tf.function; fit "
                "compiles train_step itself."
            )
        # A model without an input shape has no weights at all before its first batch.
        if model.built and not model.trainable_variables:
            raise ValueError(
                f"GradientNorms found no trainable weights in model {model.name!r}: there is no "
                "gradient to record. Set `trainable = True` on a layer and compile again."
            )
        for recorder in self._recorders.values():
            if model.built:
                recorder.check_selection(model.trainable_variables)
            recorder.check()

    def on_epoch_begin(self, epoch, logs=None):
        for recorder in self._recorders.values():
            recorder.begin_epoch(epoch)

    def on_epoch_end(self, epoch, logs=None):
        for recorder in self._recorders.values():
            recorder.end_epoch()
            if logs is not None:
                logs |= recorder.summary()

    def on_train_end(self, logs=None):
        self.detach()

    def detach(self) -> None:
        """Take the hooks off the model. The record stays; the next `fit` goes on with it."""
        for recorder in self._recorders.values():
            recorder.end()
            if self._hooks is not None:
                self._hooks.remove(recorder)

    def __enter__(self) -> GradientNorms:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


class _TrainStepHooks:
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
        # 0, or the number of the recorder whose limits forbid a step; no later step of the same
        # call counts.
        self._halted = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._held_state_norms: dict[tuple[str, int], HeldStateNorms] = {}

    @classmethod
    def of(cls, model: keras.Model, earlier: _TrainStepHooks | None) -> _TrainStepHooks:
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
        self._act_on_problems()
        shown = [recorder.summary() for recorder in self.recorders if recorder.batch_logs]
        return {key: value for part in (logs, *shown) for key, value in part.items()}

    def _act_on_problems(self):
        limited = [recorder for recorder in self.recorders if recorder.limits != _NO_LIMITS]
        if not limited:
            return
        # What the graph compared is not compared again: the record is rounded to float32.
        forbidding = int(self._halted.numpy())
        if forbidding:
            self._halted.assign(0)
        in_graph = self.model.distribute_strategy.num_replicas_in_sync == 1
        for recorder in limited:
            forbids = recorder is self.recorders[forbidding - 1] if forbidding else False
            for problem, action in recorder.problems(forbids if in_graph else None):
                if action == "raise":
                    self._remove_all()
                    raise FloatingPointError(problem)
                if action == "stop":
                    self.model.stop_training = True
                    problem += ": the training stops"
                    problem += ", with the weights of before this step." if in_graph else "."
                warnings.warn(problem, stacklevel=2)

    def _attach(self):
        model = self.model
        self._halted.assign(0)  # A call that failed after a forbidden step has left it set.
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
            recorder.end()
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
            (total,) = _sum_over_replicas([tf.reduce_sum(read_apart(loss))])
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
        if key not in self._held_state_norms:
            self._held_state_norms[key] = outside_of_the_trace(lambda: HeldStateNorms(T))
        held = self._held_state_norms[key]
        held.call = call
        if self.model.jit_compile is True and held.timesteps != T:
            warnings.warn(
                f"GradientNorms records no state norms of layer {path!r} for sequences of "
                "varying length under jit_compile=True, where a variable cannot change its shape. "
                "Pad the sequences to one length, or compile with jit_compile=False.",
                stacklevel=2,
            )
        elif _replicas() is not None:  # Replicas must meet outside of any condition.
            norms = _mean_over_replicas(state_norms(λ))
            if _is_first_replica():
                held.variable.assign(norms)
        else:
            # A step that a limit forbids has a row at any time.
            due = [None if r.limits.forbid else r.is_due() for r in self.recorders]
            due = None if None in due else tf.reduce_any(due)
            when(due, lambda: held.variable.assign(tf.ensure_shape(state_norms(λ), [T])))

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
        step.summed = _sum_over_replicas(step.grads)
        # With loss scaling, what comes is the gradient of the scaled loss.
        scale = optimizer.scale_loss(1.0)
        recorders = [recorder for recorder in self.recorders if recorder.optimizer is optimizer]
        forbidding = self._forbidding(recorders, step, variables, scale)
        if _is_first_replica():
            self._open_rows(recorders, step, variables, scale, forbidding)
        if forbidding is None:
            apply(grads, trainable_variables)
        else:
            if not optimizer.built:  # Variables cannot be made inside of a condition.
                optimizer.build(variables)
            when(tf.equal(self._halted, 0), lambda: self._halted.assign(forbidding))
            when(tf.equal(self._halted, 0), lambda: apply(grads, trainable_variables))
        for row, _ in step.rows:
            row.close()
        step.end_update()
        return None

    def _forbidding(self, recorders, step, variables, scale):
        """The number of the first recorder whose limits forbid this update, 0 for none, in int64.

        None where there are no limits.
        """
        limited = [r for r in recorders if r.limits.forbid]
        present = [i for i, g in enumerate(step.summed) if g is not None]
        # Keras has a better word for an update without any gradient.
        if not limited or not present or _replicas() is not None:
            return None
        norms = gradient_norms([step.summed[i] for i in present])
        skips_non_finite = _skips_non_finite(recorders[0].optimizer)
        forbidding = tf.constant(0, tf.int64)
        for recorder in reversed(limited):
            selected = [
                norm / tf.cast(scale, tf.float64)
                for i, norm in zip(present, norms, strict=True)
                if recorder.selects(variables[i])
            ]
            if selected:
                forbids = recorder.limits.are_broken(tf.stack(selected), skips_non_finite)
                number = tf.constant(1 + self.recorders.index(recorder), tf.int64)
                forbidding = tf.where(forbids, number, forbidding)
        return forbidding

    def _open_rows(self, recorders, step, variables, scale, forbidding):
        for recorder in recorders:
            columns = [i for i, v in enumerate(variables) if recorder.selects(v)]
            if not columns:
                # The model may have got its weights just now. None need be among those of one
                # update, where a train step makes several.
                recorder.check_selection([*variables, *self.model.trainable_variables])
                continue
            due = recorder.is_due()
            if forbidding is not None:
                counts = tf.equal(self._halted, 0)
                if due is not None:
                    due |= tf.equal(forbidding, 1 + self.recorders.index(recorder))
                due = counts if due is None else due & counts
            buffer = recorder.buffer_of([variables[i] for i in columns])
            row = Row(buffer, [step.summed[i] for i in columns], due)
            row.write_given(
                _updating(recorder.optimizer).iterations, scale, self._held_loss.read_value()
            )
            step.rows.append((row, columns))
        for key, held in self._held_state_norms.items():
            norms = held.take() / tf.cast(scale, tf.float64)
            for row, _ in step.rows:
                row.write_state_norms(key, norms, held, fixed_length=self.model.jit_compile is True)

    def _clip_gradients(self, optimizer, clip_gradients, grads):
        grads = list(grads)
        clipped = list(clip_gradients(grads))
        step = self._steps.get(_replica_id())
        if step is None or not step.grads:  # Not of an update that is recorded.
            return clipped
        # Keras leaves out missing gradients on the way here.
        present = [i for i, g in enumerate(step.grads) if g is not None]
        if same(grads, [step.grads[i] for i in present]):
            before = [step.summed[i] for i in present]
        else:  # Unscaled, or the mean over the micro-steps of gradient accumulation.
            before = _sum_over_replicas(grads)
        after = before if same(grads, clipped) else _sum_over_replicas(clipped)
        for row, columns in step.rows:
            recorded = [k for k, i in enumerate(present) if i in columns]
            row.write_applied([before[k] for k in recorded], [after[k] for k in recorded])
        return clipped


class _Step:
    """What the hooks have seen of the train step that is being traced."""

    def __init__(self):
        self.calls = 0  # of recurrent layers
        self.state_gradients: Counter[str] = Counter()  # of each recurrent layer, by path
        self.end_update()

    def end_update(self):
        self.grads: list = []
        self.summed: list = []  # over the replicas
        self.rows: list[tuple[Row, list[int]]] = []  # with the weights that each records
        self.state_gradients.clear()


@dataclass(frozen=True)
class _Limits:
    """What makes a training stop."""

    on_nonfinite: str | None
    stop_above: float | None

    @property
    def forbid(self) -> bool:
        """Whether an update may have to be left out."""
        return self.on_nonfinite in ("stop", "raise") or self.stop_above is not None

    def are_broken(self, norms, skips_non_finite):
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

    def problem_of(self, piece, i, skips_non_finite, forbidden):
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


_NO_LIMITS = _Limits(None, None)


class _Recorder:
    """One optimizer's record: ring buffers in the graph, their history, and where rows also go."""

    def __init__(
        self,
        name: str,
        weights: str | Sequence[str] | Callable[[keras.Variable], bool] | None,
        every: int,
        limits: _Limits,
        csv: CSVStream | None,
        tensorboard: TensorBoardStream | None,
        batch_logs: bool,
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
        self._reads_each_call = batch_logs or limits != _NO_LIMITS
        self._reads_each_call |= csv is not None or tensorboard is not None
        self._buffers: dict[tuple[str, ...], RingBuffer] = {}
        self._capacity = _ROWS
        # A user may read the history from a thread, or while Keras dispatches callbacks in one.
        self._lock = threading.RLock()
        self._first_row = 0  # of those that this optimizer has made
        self._calls_at_end = 0  # of the optimizer, in the fit before
        self.begin_epoch(0)

    def check_selection(self, variables: list) -> None:
        if not any(map(self.selects, variables)):
            raise ValueError(
                f"weights={self._weights!r} selects none of the trainable weights: "
                f"{', '.join(_paths(variables))}."
            )

    def check(self) -> None:
        for stream in (self._csv, self._tensorboard):
            if stream is not None:
                stream.check()

    def begin(self, optimizer: keras.optimizers.Optimizer, steps_per_execution: int) -> None:
        if optimizer is not self.optimizer:
            self._first_row = len(self.history)
        self.optimizer = optimizer
        self._unchecked = []
        self._warned = False
        self._capacity = max(_ROWS, 4 * steps_per_execution)
        self._calls = self._rows = 0
        self._calls_to_next_read = 1
        self._is_first_piece = True
        self._calls_before: int | None = None

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        # Only now has each callback's on_train_begin been called, BackupAndRestore's too.
        if self.optimizer is not None and self._calls_before is None:
            self._calls_before = _calls_of(self.optimizer)
        if self._tensorboard is not None:
            self._tensorboard.begin_epoch()
        self._sum, self._max, self._steps, self._updates, self._clipped = 0.0, 0.0, 0, 0, 0

    def end_epoch(self) -> None:
        self.read()
        if self._tensorboard is not None and len(self.history):
            step = int(self.history.step[-1])
            self._stream("log_dir", lambda: self._tensorboard.end_epoch(step))

    def end(self) -> None:
        self.read()
        if self.optimizer is not None:
            self._calls_at_end = _calls_of(self.optimizer)
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
        return tf.equal(tf.cast(_updating(self.optimizer).iterations, tf.int64) % self._every, 0)

    def start_new_buffers(self) -> None:
        self.read()
        self._buffers = {}

    def buffer_of(self, variables: list) -> RingBuffer:
        """In the graph: the ring buffer with a column for each of these weights."""
        weights = _paths(variables)
        if weights not in self._buffers:
            wide = any(v.dtype in ("float64", tf.float64) for v in variables)
            dtype = tf.float64 if wide else tf.float32
            self._buffers[weights] = outside_of_the_trace(
                lambda: RingBuffer(weights, self._capacity, dtype)
            )
        return self._buffers[weights]

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
            problem = self.limits.problem_of(piece, i, _skips_non_finite(self.optimizer), forbidden)
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
        if self.limits != _NO_LIMITS:
            self._unchecked.append(piece)
        row = piece | {"epoch": self._epoch}
        for argument, stream in (("csv", self._csv), ("log_dir", self._tensorboard)):
            if stream is not None:
                self._stream(argument, lambda stream=stream: stream.write(row))

    def _resume(self, piece):
        """Make place for the first rows of a fit, where it starts from an earlier step."""
        first, calls = int(piece["step"][0]), self._calls_before or 0
        is_put_back = 0 < calls < self._calls_at_end and len(self.history) > self._first_row
        # A backup may lie between the micro-steps of one update, which have the same number.
        update, micro_steps = divmod(
            calls, _updating(self.optimizer).gradient_accumulation_steps or 1
        )
        micro_steps = micro_steps if update == first else 0
        if is_put_back:
            self.history.truncate(rows_before(self.history.step, first, micro_steps))
        elif first == 0:
            self._first_row = len(self.history)
        if self._csv is not None and (is_put_back or not self._csv.is_begun):
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


def _named(path, name):
    """The file of one of several optimizers."""
    return path.with_name(f"{path.stem}_{name}{path.suffix}") if name else path


def _restore(owner: Any, name: str, before: Any) -> None:
    """Undo object.__setattr__(owner, name, ...), where vars(owner).get(name) was `before`."""
    object.__delattr__(owner, name)
    if before is not None:
        object.__setattr__(owner, name, before)


def _updating(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """What clips, updates and counts: the optimizer inside of a LossScaleOptimizer, or itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _skips_non_finite(optimizer: keras.optimizers.Optimizer) -> bool:
    return _updating(optimizer) is not optimizer


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


def _sum_over_replicas(gradients: list) -> list:
    """The gradients, or None for None, of the global batch."""
    context = _replicas()
    if context is None:
        return gradients
    present = [g for g in gradients if g is not None]
    summed = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, present))
    return [None if g is None else next(summed) for g in gradients]


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


def _calls_of(optimizer: keras.optimizers.Optimizer) -> int:
    """How many times it was given gradients: unlike its `iterations`, micro-steps count."""
    return int(_updating(optimizer)._iterations.numpy())


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
