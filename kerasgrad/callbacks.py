"""GradientNorms: the gradient norms of every step of `model.fit`, from the gradients it computed.

How the record is made. `fit` compiles its train step into a graph, so what is to be measured must
be part of that graph. While a callback records, `_TrainStepHooks` stands around a handful of
methods of this one model and its optimizer (instance attributes; the classes stay as they are):

    model.train_step          a step begins
    model.compute_loss        its loss
    layer.inner_loop          a call of a kerasgrad layer, whose BPTT will hand over ∂L/∂s_t
    optimizer.apply           the gradients, as the train step's own GradientTape computed them
    optimizer._clip_gradients the gradients, after clipping
    model.train_function      copies weights around an update, and takes all hooks away when a
                              step fails
    model.make_train_function takes all hooks away when the next fit begins

The norms are assigned, inside the graph, to variables used as ring buffers (see
`kerasgrad.ring_buffer`), which the host reads now and then. Nothing is computed twice, and no batch
but an epoch's first waits for the host.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kerasgrad.history import GradientHistory
from kerasgrad.keras_private import (
    CLIP_METHOD,
    all_layers,
    check_clip_method,
    skips_non_finite_steps,
    updating_optimizer,
    variables_built_on,
)
from kerasgrad.norms import gradient_norms, read_apart
from kerasgrad.probe import Probe
from kerasgrad.recorder import NO_LIMITS, Limits, Recorder, file_named
from kerasgrad.ring_buffer import HeldStateNorms, Row, outside_of_the_trace, same, when
from kerasgrad.streams import CSVStream, TensorBoardStream
from kerasgrad.updates import WeightsBefore

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

    Once an epoch also how far an update moves each recorded weight, ‖w' - w‖ and ‖w‖, over the
    epoch's first call of the train function that updates: `update_norms` and `weight_norms`. That
    costs one copy of the recorded weights, on their device, while the call runs (and while those
    before it run that made no update, such as the micro-steps of gradient accumulation). Weights
    that the first step itself makes are copied for the second.

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
        every: record the steps whose number divides by this; weights' gradients have no norms taken
            at the others. "stop", "raise" and stop_above look at each step all the same, and record
            the last one.
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
        probe: (x, y) or (x, y, sample_weight), one batch as arrays. On it, always the same,
            `kerasgrad.bptt.state_gradients` of each recurrent layer, kerasgrad's or Keras's, are
            taken now and then: `probe_state_norms`. The model runs in inference mode and is
            afterwards as before, so the training stays what it is. It runs eagerly, step by step,
            for each layer (and each of `optimizers`), which takes as long as some dozen training
            steps. A probe that fails warns, and the training goes on.
        probe_every: "epoch", or N to probe after each call of the train function in which a step
            whose number divides by N was reached.

    csv, log_dir, batch_logs, on_nonfinite and stop_above read the record after each call of the
    train function; otherwise it is read every hundred steps or so. Updates and probes are in the
    history alone, in neither of the two. Under MirroredStrategy a training that is stopped has
    applied its last gradient.

    Raises:
        ValueError: at the start of `fit`, when the model has no optimizer or no trainable weights,
            its `train_step` is wrapped in tf.function, no weight is selected, `csv` is a file of
            somebody else's, the model is trained under a strategy other than MirroredStrategy,
            or there is a `probe` and the model has no recurrent layer, no loss, or does not take x.
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
        probe: Sequence[Any] | None = None,
        probe_every: str | int = "epoch",
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
        if probe is None and probe_every != "epoch":
            raise ValueError(
                f"probe_every={probe_every!r} says when to probe, and there is no probe. Pass "
                "probe=(x, y), too."
            )
        self._optimizers = optimizers
        self._probe = None if probe is None else Probe(probe, probe_every)
        self._recorders = {
            name: Recorder(
                name,
                weights=weights,
                every=every,
                limits=Limits(on_nonfinite, stop_above),
                csv=None if csv is None else CSVStream(file_named(Path(csv), name)),
                tensorboard=None if log_dir is None else TensorBoardStream(Path(log_dir) / name),
                batch_logs=batch_logs,
                probe=self._probe,
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
        if self._probe is not None:
            self._probe.check(model)
        for recorder in self._recorders.values():
            if model.built:
                recorder.check_selection(model.trainable_variables)
            recorder.check()

    def on_epoch_begin(self, epoch, logs=None):
        for recorder in self._recorders.values():
            recorder.begin_epoch(epoch)

    def on_epoch_end(self, epoch, logs=None):
        for recorder in self._recorders.values():
            recorder.end_epoch(self.model)
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
        self.recorders: list[Recorder] = []
        # What fit has just made with make_train_function, and has not traced with any hook on.
        self._plain_function = model.train_function
        self._recording_function: Callable | None = None
        self._traced_for: list[Recorder] = []
        self._replaced: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._steps: dict[int, _Step] = {}
        # What is computed inside of a tf.function of the user's, from which no tensor can be
        # carried out, is held in a variable until the optimizer has the step's row; and then NaN
        # again, for a step that does not compute it.
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

    def add(self, recorder: Recorder) -> None:
        updating = updating_optimizer(recorder.optimizer)
        check_clip_method(updating)
        if not self.recorders:
            self._attach()
        self.recorders.append(recorder)
        self._replace(recorder.optimizer, "apply", self._apply)
        self._replace(updating, CLIP_METHOD, self._clip_gradients)

    def remove(self, recorder: Recorder) -> None:
        if recorder in self.recorders:
            self.recorders.remove(recorder)
            if not self.recorders:
                self._detach()

    def __call__(self, iterator):
        """One call of the train function by `fit`: steps_per_execution steps."""
        if self._traced_for != self.recorders:
            self._make_recording_function()
        before = WeightsBefore(v for r in self.recorders for v in r.to_copy(self.model))
        try:
            logs = self._recording_function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            raise  # The end of the data, which fit expects.
        except BaseException:
            self._remove_all()
            raise
        for recorder in self.recorders:
            recorder.sample_updates(before)
            recorder.read_if_due()
        del before
        self._act_on_problems()
        for recorder in self.recorders:
            recorder.probe_if_due(self.model)
        shown = [recorder.summary() for recorder in self.recorders if recorder.batch_logs]
        return {key: value for part in (logs, *shown) for key, value in part.items()}

    def _act_on_problems(self):
        limited = [recorder for recorder in self.recorders if recorder.limits != NO_LIMITS]
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
        # A call that failed in the middle of a step has left them set.
        self._halted.assign(0)
        self._held_loss.assign(np.nan)
        self._replace(model, "train_step", self._train_step)
        self._replace(model, "compute_loss", self._compute_loss)
        self._replace(model, "make_train_function", self._begin_next_fit)
        for layer in all_layers(model):
            if hasattr(layer, "on_state_norms"):
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
        step = self._steps[replica] = _Step()
        try:
            logs = train_step(*args, **kwargs)
        finally:
            del self._steps[replica]
        if step.holds_loss:
            self._held_loss.assign(np.nan)
        return logs

    def _compute_loss(self, model, compute_loss, *args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        step = self._steps.get(_replica_id())
        if step is not None:  # Validation computes a loss, too.
            # What the tape differentiates is the sum, where somebody's loss is not a scalar.
            (total,) = _sum_over_replicas([tf.reduce_sum(read_apart(loss))])
            if _is_first_replica():
                step.take_loss(tf.cast(total, tf.float64), self._held_loss)
        return loss

    def _inner_loop(self, layer, inner_loop, sequences, *args, **kwargs):
        step = self._steps.get(_replica_id())
        if step is None:
            return inner_loop(sequences, *args, **kwargs)
        # The gradients of a layer's calls come in no particular order: each call has its number.
        step.calls += 1
        call, T = step.calls, sequences.shape[1]
        before = vars(layer).get("on_state_norms")
        object.__setattr__(
            layer,
            "on_state_norms",
            lambda norms: self._hold_state_norms(layer.path, call, T, norms),
        )
        try:
            return inner_loop(sequences, *args, **kwargs)
        finally:
            _restore(layer, "on_state_norms", before)

    def _hold_state_norms(self, path, call, T, norms):
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
        step.timesteps[key] = T
        if self.model.jit_compile is True and held.timesteps != T:
            warnings.warn(
                f"GradientNorms records no state norms of layer {path!r} for sequences of "
                "varying length under jit_compile=True, where a variable cannot change its shape. "
                "Pad the sequences to one length, or compile with jit_compile=False.",
                stacklevel=2,
            )
        elif _replicas() is not None:  # Replicas must meet outside of any condition.
            norms = _mean_over_replicas(norms)
            if _is_first_replica():
                held.variable.assign(norms)
        else:
            # A step that a limit forbids has a row at any time.
            due = [None if r.limits.forbid else r.is_due() for r in self.recorders]
            due = None if None in due else tf.reduce_any(due)
            when(due, lambda: held.variable.assign(tf.ensure_shape(norms, [T])))

    def _apply(self, optimizer, apply, grads, trainable_variables=None):
        step = self._steps.get(_replica_id())
        # Nothing to record: somebody's own update, outside of the train step, or an empty one.
        if step is None or len(grads) == 0:
            return apply(grads, trainable_variables)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = trainable_variables or variables_built_on(optimizer)
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
        norms = gradient_norms([step.summed[i] for i in present]) / tf.cast(scale, tf.float64)
        skips_non_finite = skips_non_finite_steps(recorders[0].optimizer)
        forbidding = tf.constant(0, tf.int64)
        for recorder in reversed(limited):
            selected = [k for k, i in enumerate(present) if recorder.selects(variables[i])]
            if selected:
                forbids = recorder.limits.are_broken(tf.gather(norms, selected), skips_non_finite)
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
            row = Row(
                buffer,
                [step.summed[i] for i in columns],
                due,
                step=updating_optimizer(recorder.optimizer).iterations,
                scale=scale,
                loss=self._held_loss.read_value() if step.loss is None else step.loss,
            )
            step.rows.append((row, columns))
        for key, held in self._held_state_norms.items():
            norms = held.take() / tf.cast(scale, tf.float64)
            for row, _ in step.rows:
                row.write_state_norms(
                    key,
                    norms,
                    held,
                    timesteps=step.timesteps.get(key),
                    fixed_length=self.model.jit_compile is True,
                )

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
        self.timesteps: dict[tuple[str, int], int | None] = {}  # of each of these
        self.loss: tf.Tensor | None = None  # None, too, while a variable holds it
        self.holds_loss = False
        self._graph = tf.compat.v1.get_default_graph()
        self.end_update()

    def take_loss(self, loss: tf.Tensor, held: tf.Variable) -> None:
        """The loss; `held` is for one that is computed inside of a tf.function of the user's."""
        if tf.compat.v1.get_default_graph() is self._graph:
            self.loss = loss
        else:
            self.loss, self.holds_loss = None, True
            held.assign(loss)

    def end_update(self):
        self.grads: list = []
        self.summed: list = []  # over the replicas
        self.rows: list[tuple[Row, list[int]]] = []  # with the weights that each records
        self.state_gradients.clear()
        self.timesteps.clear()


def _restore(owner: Any, name: str, before: Any) -> None:
    """Undo object.__setattr__(owner, name, ...), where vars(owner).get(name) was `before`."""
    object.__delattr__(owner, name)
    if before is not None:
        object.__setattr__(owner, name, before)


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
