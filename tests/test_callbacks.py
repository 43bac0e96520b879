"""GradientNorms against hand-written training loops: every norm at every step, nothing changed.

The oracle, `tape_loop`, is a GradientTape loop over the same batches from the same weights, run
eagerly. It writes its losses out by hand and does its clipping, unscaling and averaging in NumPy;
only the update rule is Keras's.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KERAS, randomize, unrolled_gradients
from keras import layers

import kerasgrad as kg
from kerasgrad import callbacks as callbacks_module
from kerasgrad import recorder as recorder_module
from kerasgrad.callbacks import GradientNorms

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:keras")


rng = np.random.default_rng(0)
X = rng.normal(size=(20, 4)).astype("float32")
Y = (X @ rng.normal(size=(4, 1)) + 2).astype("float32")
LABELS = (Y > 2).astype("float32")
WEIGHTS = rng.uniform(0.2, 2, size=20).astype("float32")
TOKENS = rng.integers(0, 3, size=(20, 6))  # 3 tokens, 6 places: indices repeat in every example.
BATCH, EPOCHS = 8, 2  # Batches of 8, 8 and 4, twice.


def batches(*arrays, epochs=EPOCHS, batch_size=BATCH):
    """The batches of fit(..., shuffle=False), as tuples."""
    starts = range(0, len(arrays[0]), batch_size)
    return [
        tuple(array[i : i + batch_size] for array in arrays) for _ in range(epochs) for i in starts
    ]


# The oracle


@dataclass
class Expected:
    """One step of the oracle; lists have a number a weight, None where it has no gradient."""

    step: int
    loss: float
    norms: list
    before: list | None = None  # What went into clipping; None where the weights were not updated.
    applied: list | None = None


def norm(g):
    return None if g is None else float(np.sqrt(np.sum(np.asarray(g, "float64") ** 2)))


def dense_gradients(gradients):
    return [None if g is None else np.asarray(tf.convert_to_tensor(g)) for g in gradients]


def clipped_by_hand(gradients, optimizer):
    """Keras's three ways to clip, from their definitions."""
    with np.errstate(invalid="ignore"):
        if c := optimizer.clipnorm:
            return [None if g is None else g * min(1, c / norm(g)) for g in gradients]
        if c := optimizer.global_clipnorm:
            total = np.sqrt(sum(norm(g) ** 2 for g in gradients if g is not None))
            return [None if g is None else g * min(1, c / total) for g in gradients]
        if c := optimizer.clipvalue:
            return [None if g is None else np.clip(g, -c, c) for g in gradients]
    return gradients


def mse(model, x, y, sample_weight=None):
    """The mean squared error, weighted, and whatever the model's layers add to it."""
    errors = tf.reduce_mean(tf.square(tf.cast(model(x, training=True), tf.float32) - y), axis=-1)
    if sample_weight is not None:
        errors = errors * sample_weight
    return tf.reduce_mean(errors) + sum(tf.cast(loss, tf.float32) for loss in model.losses)


def tape_loop(model, optimizer, data, loss=mse) -> list[Expected]:
    """Train the model by hand on the batches of `data`."""
    rows, micro_gradients = [], []
    every = optimizer.gradient_accumulation_steps or 1
    for i, batch in enumerate(data):
        with tf.GradientTape() as tape:
            value = loss(model, *batch)
        weights = model.trainable_variables
        gradients = tape.gradient(value, weights)
        row = Expected(i // every, float(value), [norm(g) for g in dense_gradients(gradients)])
        rows.append(row)
        micro_gradients.append(dense_gradients(gradients))
        if len(micro_gradients) == every:
            mean = [
                None if g[0] is None else sum(g) / every for g in zip(*micro_gradients, strict=True)
            ]
            row.before = [norm(g) for g in mean]
            row.applied = [norm(g) for g in clipped_by_hand(mean, optimizer)]
            micro_gradients = []
        scale = optimizer.loss_scale_factor or 1.0  # Keras divides by it again.
        if scale != 1.0:
            gradients = [g * scale for g in gradients]
        optimizer.apply(gradients, weights)
    return rows


def assert_recorded(history, rows, rtol=1e-5):
    """The history holds the oracle's rows, in the order of its weights."""

    def numbers(name):
        columns = len(history.weights)
        values = [getattr(row, name) or [None] * columns for row in rows]
        return np.array([[np.nan if v is None else v for v in row] for row in values])

    def same(actual, expected):
        # The norms are about 1. A gradient whose terms nearly cancel keeps their rounding errors.
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=0.1 * rtol)

    norms, before, applied = numbers("norms"), numbers("before"), numbers("applied")
    updated = np.array([row.applied is not None for row in rows])
    missing = np.array([[value is None for value in row.norms] for row in rows])
    assert len(history) == len(rows)
    np.testing.assert_array_equal(history.step, [row.step for row in rows])
    np.testing.assert_array_equal(history.updated, updated)
    np.testing.assert_array_equal(history.missing, missing)
    same(history.loss, [row.loss for row in rows])
    same(history.norms, norms)
    same(history.applied_norms, applied)
    same(history.global_norm, np.sqrt(np.nansum(norms**2, axis=1)))
    same(
        history.applied_global_norm,
        np.where(updated, np.sqrt(np.nansum(applied**2, axis=1)), np.nan),
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        factors = np.where(missing | (before == 0), 1, applied / before).min(axis=1)
    same(history.clip_factor, np.where(updated, factors, np.nan))


# Models


def dense(**options):
    options = {"activation": "tanh"} | options
    return keras.Sequential([keras.Input((4,)), layers.Dense(5, **options), layers.Dense(1)])


def linear():
    return keras.Sequential([keras.Input((4,)), layers.Dense(1)])


def without_input_shape():
    return keras.Sequential([layers.Dense(5, activation="tanh"), layers.Dense(1)])


def functional():
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(1)(layers.Dense(5, activation="tanh")(x)))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(5, activation="tanh")
        self.head = layers.Dense(1)

    def call(self, x):
        return self.head(self.hidden(x))


class OwnTrainStep(Subclassed):
    """The update through optimizer.apply or apply_gradients, as custom train steps write it."""

    def __init__(self, update):
        super().__init__()
        self.update = update

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_weights)
        if self.update == "apply":
            self.optimizer.apply(gradients, self.trainable_weights)
        elif self.update == "apply, built before":
            self.optimizer.apply(gradients)
        else:
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return {"loss": loss}


def built_before():
    model = OwnTrainStep("apply, built before")
    model(X[:1])
    return model


class OwnFunctions(Subclassed):
    """Its gradients come from a tf.function inside of the train step, loss and all."""

    @tf.function
    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        return loss, tape.gradient(loss, self.trainable_weights)

    def train_step(self, data):
        loss, gradients = self.gradients(*data)
        # An empty update, which Keras takes for nothing at all.
        self.optimizer.apply([], [])
        self.optimizer.apply(gradients, iter(self.trainable_weights))
        return {"loss": loss}


class FunctionCall(Subclassed):
    def __init__(self):
        super().__init__()
        # Keras's fit finds no gradients where the tf.function itself creates the weights.
        self.hidden.build((None, 4))
        self.head.build((None, 5))

    @tf.function
    def call(self, x):
        return self.head(self.hidden(x))


class VectorLoss(Subclassed):
    """A compute_loss that leaves the sum over the batch to the tape."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return tf.reduce_sum(tf.square(y - y_pred), axis=-1)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        return {"loss": tf.reduce_mean(loss)}


def vector_loss(model, x, y):
    return tf.reduce_sum(tf.square(model(x) - y))


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(0.3 * tf.reduce_mean(tf.square(x)))
        return x


def adds_loss():
    return keras.Sequential([keras.Input((4,)), layers.Dense(5), AddsLoss(), layers.Dense(1)])


def regularized():
    return dense(kernel_regularizer=keras.regularizers.L1L2(0.1, 0.2))


def constrained():
    return dense(kernel_constraint=keras.constraints.MaxNorm(0.3))


def nested():
    inner = keras.Sequential([keras.Input((5,)), layers.Dense(5, "tanh"), layers.Dense(5)])
    return keras.Sequential([keras.Input((4,)), layers.Dense(5), inner, layers.Dense(1)])


def shared_layer():
    x = keras.Input((4,))
    shared = layers.Dense(4, activation="tanh")
    return keras.Model(x, layers.Dense(1)(shared(shared(x))))


def frozen():
    model = dense()
    model.layers[0].trainable = False
    return model


def unused_weights():
    """Two weights that have no part in the loss."""
    x = keras.Input((4,))
    main, auxiliary = layers.Dense(1)(x), layers.Dense(2, name="unused")(x)
    model = keras.Model(x, [main, auxiliary])
    return model


def first_output_mse(model, x, y):
    return tf.reduce_mean(tf.square(model(x)[0] - y))


def two_outputs():
    x = keras.Input((4,))
    hidden = layers.Dense(5, activation="tanh")(x)
    return keras.Model(x, [layers.Dense(1, name="a")(hidden), layers.Dense(1, name="b")(hidden)])


def two_outputs_loss(model, x, a, b):
    of_a, of_b = model(x)
    return tf.reduce_mean(tf.square(of_a - a)) + 0.25 * tf.reduce_mean(tf.abs(of_b - b))


def embedding():
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(5, 3),
            layers.GlobalAveragePooling1D(),
            layers.Dense(1),
        ]
    )


class Data(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[i * BATCH : (i + 1) * BATCH], Y[i * BATCH : (i + 1) * BATCH]


def generator():
    while True:
        yield from batches(X, Y, epochs=1)


class Heavy(keras.optimizers.Optimizer):
    """A user's own update rule: gradient descent."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, tf.cast(learning_rate, variable.dtype) * gradient)


# Cases: each a training that people run


def sgd(**options):
    return lambda: keras.optimizers.SGD(**({"learning_rate": 0.05} | options))


SGD = sgd()


@dataclass
class Case:
    build: Callable[[], keras.Model] = dense
    optimizer: Callable[[], keras.optimizers.Optimizer] = SGD
    compile: dict[str, Any] = field(default_factory=dict)
    fit: Callable[[], dict[str, Any]] = lambda: {"x": X, "y": Y, "batch_size": BATCH}
    data: list[tuple] = field(default_factory=lambda: batches(X, Y))
    loss: Callable = mse
    rtol: float = 1e-5

    def trained(self, callbacks=()):
        keras.utils.set_random_seed(3)
        model = self.build()
        model.compile(self.optimizer(), **({"loss": "mse"} | self.compile))
        options = {"epochs": EPOCHS, "shuffle": False, "verbose": 0} | self.fit()
        model.fit(callbacks=list(callbacks), **options)
        return model

    def oracle(self):
        keras.utils.set_random_seed(3)
        model = self.build()
        if not model.built:
            model(self.data[0][0])
        return tape_loop(model, self.optimizer(), self.data, self.loss)


OPTIMIZERS = [
    keras.optimizers.Adadelta,
    keras.optimizers.Adafactor,
    keras.optimizers.Adagrad,
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.Adamax,
    keras.optimizers.Ftrl,
    keras.optimizers.Lamb,
    keras.optimizers.Lion,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
]
if KERAS >= (3, 11):  # The Muon of Keras 3.10 fails on TensorFlow's variables, with or without us.
    OPTIMIZERS.append(keras.optimizers.Muon)

# The ways to hand over data, and weights of examples; each optimizer is tried with one of them.
DATA: dict[str, dict[str, Any]] = {
    "arrays": {},
    "tf.data": {
        "fit": lambda: {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)},
    },
    "generator": {"fit": lambda: {"x": generator(), "steps_per_epoch": 3}},
    "PyDataset": {"fit": lambda: {"x": Data()}},
    "sample_weight": {
        "fit": lambda: {"x": X, "y": Y, "sample_weight": WEIGHTS, "batch_size": BATCH},
        "data": batches(X, Y, WEIGHTS),
    },
    "class_weight": {
        "fit": lambda: {
            **{"x": X, "y": LABELS, "batch_size": BATCH},
            "class_weight": {0: 0.5, 1: 3.0},
        },
        "data": batches(X, LABELS, np.where(LABELS == 1, 3.0, 0.5)[:, 0].astype("float32")),
    },
}

CASES = {
    "graph": Case(),
    "run_eagerly": Case(compile={"run_eagerly": True}),
    "jit_compile": Case(compile={"jit_compile": True}),
    "steps_per_execution=3": Case(compile={"steps_per_execution": 3}),
    "clipnorm": Case(optimizer=sgd(clipnorm=0.9)),
    "global_clipnorm": Case(optimizer=sgd(global_clipnorm=1.5)),
    "clipvalue": Case(optimizer=sgd(clipvalue=0.4)),
    "clipnorm, run_eagerly": Case(
        optimizer=sgd(clipnorm=0.9), compile={"run_eagerly": True, "steps_per_execution": 3}
    ),
    "global_clipnorm, jit_compile": Case(
        optimizer=sgd(global_clipnorm=1.5), compile={"jit_compile": True, "steps_per_execution": 3}
    ),
    "functional": Case(functional),
    "subclassed": Case(Subclassed),
    "without input shape": Case(without_input_shape),
    "embedding": Case(
        embedding,
        fit=lambda: {"x": TOKENS, "y": Y, "batch_size": BATCH},
        data=batches(TOKENS, Y),
    ),
    "embedding, run_eagerly": Case(
        embedding,
        compile={"run_eagerly": True},
        fit=lambda: {"x": TOKENS, "y": Y, "batch_size": BATCH},
        data=batches(TOKENS, Y),
    ),
    "frozen": Case(frozen),
    **{
        f"{cls.__name__}, {data}": Case(linear, lambda cls=cls: cls(0.01), **DATA[data])
        for cls, data in zip(OPTIMIZERS, itertools.cycle(DATA), strict=False)
    },
    "own optimizer": Case(build=linear, optimizer=lambda: Heavy(0.05, clipnorm=0.9)),
    "loss_scale_factor": Case(optimizer=sgd(loss_scale_factor=64.0, clipnorm=0.9)),
    "gradient accumulation": Case(optimizer=sgd(gradient_accumulation_steps=4, clipnorm=0.5)),
    "gradient accumulation, run_eagerly, loss_scale_factor": Case(
        optimizer=sgd(gradient_accumulation_steps=2, loss_scale_factor=8.0, global_clipnorm=1.0),
        compile={"run_eagerly": True},
    ),
    # Not a power of 2, and no clipping: see test_products_are_compiled_as_without_a_reader.
    "loss_scale_factor=50": Case(build=linear, optimizer=sgd(loss_scale_factor=50.0)),
    "gradient accumulation=3": Case(build=linear, optimizer=sgd(gradient_accumulation_steps=3)),
    "use_ema": Case(
        build=linear, optimizer=sgd(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2)
    ),
    "weight_decay": Case(
        build=linear, optimizer=lambda: keras.optimizers.AdamW(0.01, weight_decay=0.2)
    ),
    "schedule": Case(
        build=linear,
        optimizer=lambda: keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), momentum=0.9
        ),
    ),
    "own train_step, apply": Case(lambda: OwnTrainStep("apply")),
    "own train_step, apply_gradients": Case(
        lambda: OwnTrainStep("apply_gradients"), sgd(clipvalue=0.4)
    ),
    "own train_step, tf.function inside": Case(OwnFunctions, sgd(clipnorm=0.9)),
    "call is a tf.function": Case(FunctionCall),
    "loss is a vector": Case(VectorLoss, sgd(learning_rate=0.01), loss=vector_loss),
    "add_loss": Case(adds_loss),
    "regularizers": Case(regularized),
    "constraints": Case(constrained),
    "nested": Case(nested),
    "shared layer": Case(shared_layer),
    "two outputs": Case(
        two_outputs,
        compile={"loss": ["mse", "mae"], "loss_weights": [1.0, 0.25]},
        fit=lambda: {"x": X, "y": [Y, LABELS], "batch_size": BATCH},
        data=batches(X, Y, LABELS),
        loss=two_outputs_loss,
    ),
    "missing gradients": Case(
        unused_weights,
        sgd(clipnorm=0.9),
        compile={"loss": ["mse", None]},
        fit=lambda: {"x": X, "y": [Y, Y], "batch_size": BATCH},
        loss=first_output_mse,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_record_equals_a_tape_loop_and_training_is_the_same(name):
    case = CASES[name]
    norms = GradientNorms()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist")
        plain, recorded, rows = case.trained(), case.trained([norms]), case.oracle()
    assert_recorded(norms.history, rows, case.rtol)
    assert norms.history.weights == tuple(w.path for w in recorded.trainable_variables)
    np.testing.assert_array_equal(norms.history.epoch, [0, 0, 0, 1, 1, 1])
    assert_same_weights(plain, recorded)
    if case.optimizer().clipnorm or case.optimizer().global_clipnorm or case.optimizer().clipvalue:
        assert norms.history.clip_rate > 0  # Or the case shows nothing.


def assert_same_weights(model, other):
    for a, b in zip(all_variables(model), all_variables(other), strict=True):
        assert np.array_equal(a, b, equal_nan=True), a.path


def all_variables(model):
    return [*model.variables, *model.optimizer.variables]


class Elementwise(layers.Layer):
    """Weights whose gradients are elementwise products, not sums over the batch."""

    def build(self, input_shape):
        self.only_regularized = self.add_weight(
            shape=(7, 3), initializer="normal", regularizer=keras.regularizers.L2(0.3)
        )
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return x * self.scale


@pytest.mark.parametrize("options", [{}, {"loss_scale_factor": 50.0}, {"global_clipnorm": 0.7}])
def test_products_are_compiled_as_without_a_reader(options):
    # TensorFlow's graph optimizer turns lr * (a * b) into (lr * a) * b, which rounds otherwise, but
    # not where a second reader, such as a norm, wants a * b.
    case = Case(
        lambda: keras.Sequential([keras.Input((4,)), Elementwise(), layers.Dense(1)]),
        sgd(**options),
    )
    norms = GradientNorms()
    plain, recorded = case.trained(), case.trained([norms])
    assert_recorded(norms.history, case.oracle())
    assert_same_weights(plain, recorded)


# What clipping does, where it is not what one would infer


def test_clipnorm_counts_the_rows_of_a_sparse_gradient_apart():
    # Keras clips an embedding's gradient by the norm over the batch's rows, before the rows of a
    # repeated token are added up: what is applied may be longer than clipnorm, and is recorded so.
    model = embedding()
    model.compile(keras.optimizers.SGD(0.0, clipnorm=0.5), "mse")
    with tf.GradientTape() as tape:
        loss = mse(model, TOKENS, Y)
    gradient = tape.gradient(loss, model.layers[0].embeddings)
    assert isinstance(gradient, tf.IndexedSlices)
    norms = GradientNorms()
    model.fit(TOKENS, Y, batch_size=20, verbose=0, callbacks=[norms])
    (whole,) = norms.history.norms[:, 0]
    factor = min(1, 0.5 / norm(gradient.values))
    np.testing.assert_allclose(whole, norm(tf.convert_to_tensor(gradient)), rtol=1e-5)
    np.testing.assert_allclose(norms.history.applied_norms[0, 0], whole * factor, rtol=1e-5)
    assert norms.history.applied_norms[0, 0] > 0.5


# steps_per_execution that does not divide the epoch


def test_steps_per_execution_that_does_not_divide_the_epoch():
    case = Case(compile={"steps_per_execution": 2})
    norms = GradientNorms()
    plain, recorded = case.trained(), case.trained([norms])
    rows = case.oracle()
    if int(plain.optimizer.iterations) == 8:
        # Keras 3.6 looks for a fourth batch, and counts the step that fails there.
        for row in rows[3:]:
            row.step += 1
    assert_recorded(norms.history, rows)
    assert_same_weights(plain, recorded)


# Mixed precision


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.9}])
def test_mixed_precision(policy, options):
    keras.config.set_dtype_policy(policy)
    inner = sgd(**options)
    case = Case(optimizer=inner)
    if policy == "mixed_float16":  # The scale that compile() chooses overflows at first.
        case.optimizer = lambda: keras.optimizers.LossScaleOptimizer(inner(), initial_scale=64.0)
    norms = GradientNorms()
    plain, recorded = case.trained(), case.trained([norms])
    case.optimizer = inner
    assert_recorded(norms.history, case.oracle(), rtol=2e-2)
    assert_same_weights(plain, recorded)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_skipped_steps_of_a_loss_scale_optimizer_are_recorded_as_such(run_eagerly):
    keras.config.set_dtype_policy("mixed_float16")

    def model():
        keras.utils.set_random_seed(3)
        return dense()

    def optimizer():
        inner = keras.optimizers.SGD(0.05, global_clipnorm=1.0)
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**17)

    # The oracle keeps a loss scale of its own: halved at each step that is not finite, and the
    # step skipped.
    oracle, scale = model(), 2.0**17
    expected, updated, factors = [], [], []
    for x, y in batches(X, Y):
        with tf.GradientTape() as tape:
            loss = mse(oracle, x, y) * scale
        gradients = [
            np.asarray(g, "float32") / np.float32(scale)
            for g in tape.gradient(loss, oracle.trainable_variables)
        ]
        expected.append([norm(g) for g in gradients])
        total = np.sqrt(np.sum(np.square(expected[-1])))
        updated.append(np.isfinite(total))
        factors.append(min(1.0, 1.0 / total) if updated[-1] else np.nan)
        if updated[-1]:
            for weight, g in zip(oracle.trainable_variables, gradients, strict=True):
                weight.assign_sub(0.05 * g * factors[-1])
        else:
            scale /= 2
    assert 0 < sum(updated) < len(updated)

    trained = []
    for callbacks in [], [norms := GradientNorms()]:
        trained.append(model())
        trained[-1].compile(optimizer(), "mse", run_eagerly=run_eagerly)
        trained[-1].fit(X, Y, BATCH, EPOCHS, verbose=0, shuffle=False, callbacks=callbacks)
    assert_same_weights(*trained)
    history = norms.history
    np.testing.assert_array_equal(history.updated, updated)
    np.testing.assert_array_equal(np.isfinite(history.norms), np.isfinite(expected))
    np.testing.assert_allclose(
        history.norms[updated], np.array(expected)[updated], rtol=2e-2, atol=2e-3
    )
    np.testing.assert_allclose(history.clip_factor, factors, rtol=2e-2)
    np.testing.assert_array_equal(np.isnan(history.applied_norms).all(axis=1), ~np.array(updated))
    assert np.isfinite(history.loss).all()
    assert history.clip_rate == np.mean(np.array(factors)[updated] < 1)


class Unreliable(keras.optimizers.SGD):
    """Updates; or fails with its gradients clipped already; or leaves an update out."""

    does = "update"

    def apply(self, grads, trainable_variables=None):
        if self.does != "skip":
            super().apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        if self.does == "fail":
            raise OSError("no update")
        super().update_step(gradient, variable, learning_rate)


def test_a_skipped_update_after_a_failed_step():
    # Both write the same row of the buffer, the failed one alone what it has clipped.
    model, optimizer, norms = dense(), Unreliable(0.01, clipnorm=1.0), GradientNorms()
    model.compile(optimizer, "mse", run_eagerly=True)
    for does in "update", "fail", "skip":
        optimizer.does = does
        with pytest.raises(OSError) if does == "fail" else contextlib.nullcontext():
            model.fit(X[:4], Y[:4], verbose=0, callbacks=[norms])
    assert norms.history.updated.tolist() == [True, False]
    assert np.isnan(norms.history.applied_norms[1]).all()


class LossNowAndThen(Subclassed):
    """At each second step Keras's loss inside of a condition, at the others one of its own."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = tf.cond(
                self.optimizer.iterations % 2 == 0,
                lambda: self.compute_loss(x=x, y=y, y_pred=y_pred),
                lambda: tf.reduce_mean(tf.square(y - y_pred)),
            )
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        return {"loss": loss}


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_loss_that_a_step_does_not_compute_is_not_that_of_the_step_before(run_eagerly):
    model, norms = LossNowAndThen(), GradientNorms()
    model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=run_eagerly)
    for _ in range(2):
        model.fit(X[:16], Y[:16], batch_size=4, verbose=0, callbacks=[norms])
    assert np.isfinite(norms.history.loss).tolist() == 4 * [True, False]


# Numbers at the edge of float32


def linear_model(**options):
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[1.0]])
    model.compile(keras.optimizers.SGD(0.0, **options), loss=lambda y, y_pred: y * y_pred)
    return model


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e25, 1e38])
def test_tiny_and_huge_gradients(size):
    # L = y w x, so ∂L/∂w = y x; the square of these overflows or vanishes in float32.
    norms = GradientNorms()
    x = np.full((1, 1), size, "float32")
    linear_model().fit(x, np.ones((1, 1), "float32"), verbose=0, callbacks=[norms])
    np.testing.assert_allclose(norms.history.norms, [[size]], rtol=1e-6)
    np.testing.assert_allclose(norms.history.global_norm, [size], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}])
def test_nan_and_inf_are_recorded_as_such(value, options):
    norms = GradientNorms()
    x = np.array([[1.0], [value], [2.0]], "float32")
    model = linear_model(**options)
    plain = linear_model(**options)
    arguments = {"batch_size": 1, "epochs": 2, "shuffle": False, "verbose": 0}
    plain.fit(x, np.ones_like(x), **arguments)
    log = model.fit(x, np.ones_like(x), **arguments, callbacks=[norms]).history
    np.testing.assert_array_equal(norms.history.norms[:3, 0], [1.0, value, 2.0])
    np.testing.assert_array_equal(norms.history.loss[:2], [1.0, value])
    assert norms.history.updated.all()
    np.testing.assert_array_equal(log["grad_norm_max"][0], value)
    np.testing.assert_array_equal(log["grad_norm"][0], value)
    assert_same_weights(plain, model)


def test_float64():
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")  # In which losses are computed.
    try:
        keras.utils.set_random_seed(3)
        x, y = X.astype("float64"), Y.astype("float64")
        model, norms = dense(), GradientNorms()
        with tf.GradientTape() as tape:
            loss = mse_in_float64(model, x, y)
        expected = [norm(g) for g in tape.gradient(loss, model.trainable_variables)]
        model.compile("sgd", "mse")
        model.fit(x, y, batch_size=20, verbose=0, shuffle=False, callbacks=[norms])
    finally:
        keras.config.set_floatx("float32")
    np.testing.assert_allclose(norms.history.norms, [expected], rtol=1e-12)
    np.testing.assert_allclose(norms.history.loss, [float(loss)], rtol=1e-12)


def mse_in_float64(model, x, y):
    return tf.reduce_mean(tf.square(model(x) - y))


@pytest.mark.skipif(KERAS < (3, 10), reason="Keras's float8 was another then")
def test_float8_scales_are_no_gradients():
    # Keras overwrites the scales of float8 training with "gradients" that are none.
    def trained(callbacks):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        model.quantize("float8")
        model.compile(keras.optimizers.SGD(0.05, clipnorm=0.9), "mse")
        model.fit(X, Y, BATCH, verbose=0, shuffle=False, callbacks=callbacks)
        return model

    norms = GradientNorms()
    plain, recorded = trained([]), trained([norms])
    assert [w.split("/")[-1] for w in norms.history.weights] == ["kernel", "bias"]
    assert len(norms.history) == 3
    assert_same_weights(plain, recorded)
    assert norms.history.applied_norms.max() <= 0.9 * (1 + 1e-5)


# Several fits


class CountsTraces(layers.Layer):
    """Identity; counts how often TensorFlow traces a training step through it."""

    traces = 0

    def call(self, x, training=False):
        if training:
            self.traces += 1
        return x


def counting():
    return keras.Sequential([keras.Input((4,)), CountsTraces(), layers.Dense(1)])


FIT = {"x": X, "y": Y, "batch_size": BATCH, "shuffle": False, "verbose": 0}


def test_the_record_goes_on_and_nothing_is_traced_again():
    keras.utils.set_random_seed(3)
    model, norms = counting(), GradientNorms()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(**FIT)
    plain_function, plain_traces = model.train_function, model.layers[0].traces
    model.fit(**FIT, callbacks=[norms])
    recorded_traces = model.layers[0].traces
    for _ in range(2):
        model.fit(**FIT, callbacks=[norms])
        model.fit(**FIT)
    assert model.layers[0].traces == recorded_traces == plain_traces + 1
    assert model.train_function is plain_function

    # The oracle trains through the six fits; recorded are the second, the third and the fifth.
    keras.utils.set_random_seed(3)
    rows = tape_loop(counting(), keras.optimizers.SGD(0.05), batches(X, Y, epochs=6))
    recorded = [*rows[3:9], *rows[12:15]]
    assert_recorded(norms.history, recorded)

    new = GradientNorms()
    model.fit(**FIT, callbacks=[new])
    assert len(new.history) == 3
    assert len(norms.history) == 9  # Nothing of it.
    assert new.history.step[0] == 18


def test_reading_the_record_in_mid_training_changes_nothing():
    norms, lengths = GradientNorms(), []
    read = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: lengths.append(len(norms.history))
    )
    case = CASES["graph"]
    plain, recorded = case.trained(), case.trained([read, norms])
    assert lengths == [1, 2, 3, 4, 5, 6]
    assert_recorded(norms.history, case.oracle())
    assert_same_weights(plain, recorded)


def test_more_steps_than_the_buffer_has_rows(monkeypatch):
    monkeypatch.setattr(recorder_module, "_ROWS", 4)
    norms = GradientNorms()
    model = dense()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(X, Y, batch_size=1, epochs=2, verbose=0, callbacks=[norms])
    np.testing.assert_array_equal(norms.history.step, np.arange(40))
    assert (norms.history.norms > 0).all()
    assert (norms.history.updated).all()


def test_freezing_and_compiling_between_two_fits():
    keras.utils.set_random_seed(3)
    model, norms = dense(), GradientNorms()
    kernels = [w.path for w in model.trainable_variables]
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(**FIT, callbacks=[norms])
    model.layers[0].trainable = False
    model.compile(keras.optimizers.Adam(0.01, clipnorm=0.3), "mse", steps_per_execution=3)
    model.fit(**FIT, callbacks=[norms])

    keras.utils.set_random_seed(3)
    oracle, data = dense(), batches(X, Y, epochs=1)
    rows = tape_loop(oracle, keras.optimizers.SGD(0.05), data)
    oracle.layers[0].trainable = False
    rows += tape_loop(oracle, keras.optimizers.Adam(0.01, clipnorm=0.3), data)
    for row in rows[3:]:
        row.norms, row.before, row.applied = (
            [None, None, *values] for values in (row.norms, row.before, row.applied)
        )
    assert norms.history.weights == tuple(kernels)
    assert_recorded(norms.history, rows)


def test_freezing_without_compiling_as_keras_lets_it_happen():
    # Keras goes on with the train function that it has, until other shapes make it trace again.
    norms = GradientNorms()
    inner = keras.Input((None, 4))
    model = keras.Model(inner, layers.Dense(1)(layers.Dense(2)(inner)))
    model.compile("sgd", "mse")
    model.fit(X[:, None], Y[:, None], batch_size=20, verbose=0, callbacks=[norms])
    model.layers[1].trainable = False
    x, y = np.stack([X, X], axis=1), np.stack([Y, Y], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x, y, batch_size=20, verbose=0, callbacks=[norms])
    np.testing.assert_array_equal(norms.history.missing, [[False] * 4, [True, True, False, False]])


def test_one_callback_for_two_models():
    norms = GradientNorms()
    for units in 2, 3:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1, name=f"head_{units}")])
        model.compile("sgd", "mse")
        model.fit(**FIT, callbacks=[norms])
    assert len(norms.history) == 6
    assert len(norms.history.weights) == 4
    assert norms.history.missing.sum() == 12


def test_two_callbacks_in_one_fit():
    case, both = CASES["clipnorm"], [GradientNorms(), GradientNorms()]
    plain, recorded = case.trained(), case.trained(both)
    rows = case.oracle()
    for norms in both:
        assert_recorded(norms.history, rows)
    assert_same_weights(plain, recorded)
    # One of them goes on alone.
    recorded.fit(**FIT, callbacks=both[:1])
    assert [len(norms.history) for norms in both] == [9, 6]
    assert untouched(recorded)


def test_inside_of_a_callback_list():
    keras.utils.set_random_seed(3)
    model, norms = dense(), GradientNorms()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    callbacks = keras.callbacks.CallbackList([norms], add_history=True, model=model, epochs=EPOCHS)
    log = model.fit(**FIT, epochs=EPOCHS, callbacks=callbacks).history
    assert_recorded(norms.history, CASES["graph"].oracle())
    assert len(log["grad_norm"]) == EPOCHS


# Logs


def test_logs(tmp_path):
    norms, path = GradientNorms(), tmp_path / "log.csv"
    model = dense()
    model.compile(keras.optimizers.SGD(0.05, clipnorm=0.9), "mse")
    log = model.fit(
        **FIT, epochs=3, callbacks=[norms, keras.callbacks.CSVLogger(str(path))]
    ).history
    history = norms.history
    for epoch in range(3):
        rows = history.epoch == epoch
        total = np.sqrt(np.sum(history.norms[rows].astype("float64") ** 2, axis=1))
        shortened = (history.applied_norms < history.norms * (1 - 1e-5))[rows].any(axis=1)
        np.testing.assert_allclose(log["grad_norm"][epoch], total.mean(), rtol=1e-6)
        np.testing.assert_allclose(log["grad_norm_max"][epoch], total.max(), rtol=1e-6)
        assert log["grad_clip_rate"][epoch] == shortened.mean()
    header, *lines = path.read_text().splitlines()
    assert {"grad_norm", "grad_norm_max", "grad_clip_rate", "loss"} < set(header.split(","))
    written = [float(line.split(",")[header.split(",").index("grad_norm")]) for line in lines]
    np.testing.assert_allclose(written, log["grad_norm"])


def test_early_stopping_sees_the_gradient_norm():
    stop = keras.callbacks.EarlyStopping("grad_norm", mode="min", patience=0, min_delta=1e9)
    model = dense()
    model.compile("sgd", "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # It warns of a metric that is not there.
        log = model.fit(**FIT, epochs=5, callbacks=[GradientNorms(), stop]).history
    assert len(log["loss"]) == 2
    assert untouched(model)


def test_clip_rate_of_accumulation_counts_updates():
    norms, model = GradientNorms(), dense()
    model.compile(keras.optimizers.SGD(0.01, clipnorm=1e-3, gradient_accumulation_steps=3), "mse")
    log = model.fit(**FIT, epochs=2, callbacks=[norms]).history
    np.testing.assert_array_equal(norms.history.updated, [False, False, True] * 2)
    assert norms.history.clip_rate == 1
    assert log["grad_clip_rate"] == [1, 1]


def test_validation_is_not_recorded():
    # Its loss, of other data, must not be taken for the batch's: least of all when run eagerly.
    for run_eagerly in False, True:
        norms = GradientNorms()
        keras.utils.set_random_seed(3)
        model = dense()
        model.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=run_eagerly)
        model.fit(**FIT, epochs=EPOCHS, validation_data=(X, 1000 + Y), callbacks=[norms])
        assert_recorded(norms.history, CASES["graph"].oracle())


# Several optimizers


class GAN(keras.Model):
    def __init__(self):
        super().__init__()
        self.g = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="g")])
        self.d = keras.Sequential([keras.Input((4,)), layers.Dense(1, name="d")])

    def compile(self):
        super().compile()
        self.g_optimizer = keras.optimizers.SGD(0.1, clipnorm=0.1)
        self.d_optimizer = keras.optimizers.Adam(0.01)

    def losses_of(self, x):
        """The discriminator's and the generator's loss."""
        real, fake = self.d(x), self.d(self.g(x))
        return tf.reduce_mean(tf.square(real - 1) + tf.square(fake)), tf.reduce_mean(
            tf.square(fake - 1)
        )

    def train_step(self, x):
        for i, (network, optimizer) in enumerate(self.turns()):
            with tf.GradientTape() as tape:
                loss = self.losses_of(x)[i]
            weights = network.trainable_variables
            optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}

    def turns(self):
        return [(self.d, self.d_optimizer), (self.g, self.g_optimizer)]


@pytest.mark.parametrize("names", [("g", "d"), ("g",)])
def test_two_optimizers(names):
    def gan():
        keras.utils.set_random_seed(3)
        model = GAN()
        model.compile()
        return model

    plain, recorded, oracle = gan(), gan(), gan()
    norms = GradientNorms(
        optimizers={name: getattr(recorded, f"{name}_optimizer") for name in names}
    )
    plain.fit(X, batch_size=BATCH, shuffle=False, verbose=0)
    log = recorded.fit(X, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[norms]).history
    expected = {"d": [], "g": []}
    for (x,) in batches(X, epochs=1):
        for i, (network, optimizer) in enumerate(oracle.turns()):
            with tf.GradientTape() as tape:
                loss = oracle.losses_of(x)[i]
            gradients = tape.gradient(loss, network.trainable_variables)
            expected["dg"[i]].append([norm(g) for g in gradients])
            optimizer.apply(gradients, network.trainable_variables)
    assert list(norms.histories) == list(names)
    for name in names:
        history = norms.histories[name]
        np.testing.assert_allclose(history.norms, expected[name], rtol=1e-5)
        np.testing.assert_array_equal(history.step, [0, 1, 2])
        assert np.isnan(history.loss).all()  # This train step calls no compute_loss.
        np.testing.assert_allclose(log[f"grad_norm_{name}"], history.global_norm.mean(), rtol=1e-6)
        assert log[f"grad_clip_rate_{name}"] == [1.0 if name == "g" else 0.0]
    with pytest.raises(ValueError, match=r"histories\[name\].*\['g'"):
        norms.history  # noqa: B018
    assert_same_weights(plain, recorded)
    assert not set(vars(recorded.g_optimizer)) - set(vars(plain.g_optimizer))


# Errors before training


def test_model_that_is_not_compiled():
    with pytest.raises(ValueError, match="compile"):
        dense().fit(X, Y, callbacks=[GradientNorms()])  # Keras says so itself.

    class OwnLoop(Subclassed):
        def train_step(self, data):
            return {}

    model = OwnLoop()
    model.compile(optimizer=None)
    with pytest.raises(ValueError, match=r"model\.compile\(optimizer=.*optimizers="):
        model.fit(**FIT, callbacks=[GradientNorms()])


def test_model_without_trainable_weights():
    model = dense()
    model.trainable = False
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="no trainable weights"):
        model.fit(**FIT, callbacks=[GradientNorms()])
    assert untouched(model)


def test_train_step_in_a_tf_function():
    class Wrapped(Subclassed):
        @tf.function
        def train_step(self, data):
            return super().train_step(data)

    model = Wrapped()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"Remove the tf\.function"):
        model.fit(**FIT, callbacks=[GradientNorms()])


# What Keras keeps private


def test_what_keras_keeps_private_is_still_there():
    """When this fails, Keras has changed what GradientNorms stands on: see callbacks.py."""
    optimizer = keras.optimizers.SGD(0.1, clipvalue=0.5)
    model = keras.Sequential([layers.Bidirectional(kg.layers.SimpleRNN(2))])
    model.build((None, 3, 1))
    optimizer.build(model.trainable_variables)
    (clipped,) = optimizer._clip_gradients([tf.constant([3.0])])
    assert clipped == 0.5
    assert all(map(lambda a, b: a is b, optimizer._trainable_variables, model.trainable_variables))
    assert int(optimizer._iterations) == int(optimizer.iterations)
    found = model._flatten_layers(include_self=False, recursive=True)
    assert sum(isinstance(layer, kg.layers.SimpleRNN) for layer in found) >= 2
    assert callable(kg.layers.SimpleRNN.inner_loop)
    model.compile(optimizer, "mse")
    assert model.train_function is None
    model.make_train_function(force=True)
    assert callable(model.train_function)
    assert model.jit_compile in (True, False)
    scaled = keras.optimizers.LossScaleOptimizer(optimizer)
    assert scaled.inner_optimizer is optimizer
    assert float(keras.optimizers.SGD(loss_scale_factor=3.0).scale_loss(1.0)) == 3


def test_an_optimizer_without_the_clipping_method():
    class Stranger:
        pass

    norms, model = GradientNorms(optimizers={"o": Stranger()}), dense()
    model.compile("sgd", "mse")
    with pytest.raises(RuntimeError, match=f"Stranger of Keras {keras.__version__} has no"):
        model.fit(**FIT, callbacks=[norms])
    assert untouched(model)
    model.fit(**FIT)


# State norms


def sequences(timesteps=5, seed=1):
    return np.random.default_rng(seed).normal(size=(20, timesteps, 3)).astype("float32")


def state_norms_by_hand(state_gradients):
    """(T, batch, units) to (T,)."""
    return np.mean(np.linalg.norm(np.asarray(state_gradients, "float64"), axis=-1), axis=1)


def recurrent_model(layer, *, mask=False):
    parts = [layers.Masking(-1.0)] if mask else []
    return keras.Sequential([keras.Input((None, 3)), *parts, layer, layers.Dense(1)])


def expected_state_norms(model, cell, x, y, *, mask=None, go_backwards=False):
    head = model.layers[-1]

    def loss(states):
        return tf.reduce_mean(tf.square(head(states[:, -1]) - y))

    _, λ, _ = unrolled_gradients(cell, x, loss, mask=mask, go_backwards=go_backwards)
    return state_norms_by_hand(λ)


STATE_MODES = {
    "graph": {},
    "run_eagerly": {"run_eagerly": True},
    "jit_compile": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 2},
}


@pytest.mark.parametrize("mode", STATE_MODES)
def test_state_norms(mode):
    layer = kg.layers.SimpleRNN(4)
    model = recurrent_model(layer)
    randomize(layer)
    x = sequences()
    expected = expected_state_norms(model, layer.cell, x, Y)
    model.compile(keras.optimizers.SGD(0.0), "mse", **STATE_MODES[mode])
    norms = GradientNorms()
    model.fit(x, Y, batch_size=20, epochs=2, verbose=0, shuffle=False, callbacks=[norms])
    assert list(norms.history.state_norms) == [layer.path]
    np.testing.assert_allclose(norms.history.state_norms[layer.path], [expected] * 2, rtol=1e-5)
    np.testing.assert_allclose(
        norms.history.reach[layer.path], [expected[0] / expected[-1]] * 2, rtol=1e-5
    )


def test_state_norms_under_a_loss_scale():
    x, recorded = sequences(), []
    for options in {}, {"loss_scale_factor": 50.0}:
        keras.utils.set_random_seed(3)
        model, norms = recurrent_model(kg.layers.IRNN(4)), GradientNorms()
        model.compile(keras.optimizers.SGD(0.1, **options), "mse")
        model.fit(x, Y, batch_size=BATCH, verbose=0, shuffle=False, callbacks=[norms])
        (values,) = norms.history.state_norms.values()
        recorded.append(values)
    np.testing.assert_allclose(*recorded, rtol=1e-5)


def test_state_norms_with_a_mask():
    layer = kg.layers.SimpleRNN(4)
    model = recurrent_model(layer, mask=True)
    randomize(layer)
    x, mask = sequences(), np.ones((20, 5), bool)
    mask[::2, 3:] = mask[::3, :2] = False
    x[~mask] = -1.0
    expected = expected_state_norms(model, layer.cell, x, Y, mask=mask)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    norms = GradientNorms()
    model.fit(x, Y, batch_size=20, verbose=0, callbacks=[norms])
    np.testing.assert_allclose(norms.history.state_norms[layer.path], [expected], rtol=1e-5)


def test_state_norms_of_bidirectional_and_stacked_layers():
    both = layers.Bidirectional(kg.layers.SimpleRNN(4), merge_mode="sum")
    last = kg.layers.SimpleRNN(4, return_sequences=True)
    x_in = keras.Input((None, 3))
    model = keras.Model(x_in, layers.Dense(1)(both(last(x_in))))
    for layer in last, both:
        randomize(layer)
    x = sequences()
    first_cell, forward, backward = (
        layer.cell for layer in (last, both.forward_layer, both.backward_layer)
    )
    head = model.layers[-1]

    with tf.GradientTape() as tape:
        states, sequence = unrolled(first_cell, tf.constant(x))
        of_forward, _ = unrolled(forward, sequence)
        of_backward, _ = unrolled(backward, sequence[:, ::-1])
        loss = tf.reduce_mean(tf.square(head(of_forward[-1] + of_backward[-1]) - Y))
    gradients = tape.gradient(loss, [states, of_forward, of_backward])
    expected = [state_norms_by_hand(λ) for λ in gradients]

    model.compile(keras.optimizers.SGD(0.0), "mse")
    norms = GradientNorms()
    model.fit(x, Y, batch_size=20, verbose=0, callbacks=[norms])
    for layer, values in zip(
        [last, both.forward_layer, both.backward_layer], expected, strict=True
    ):
        np.testing.assert_allclose(norms.history.state_norms[layer.path], [values], rtol=1e-5)
    assert len(norms.history.state_norms) == 3


def unrolled(cell, x):
    """The cell unrolled: its list of states, and (batch, T, units)."""
    state, states = tf.zeros((len(x), cell.units)), []
    for t in range(x.shape[1]):
        state = cell(x[:, t], [state])[0]
        states.append(state)
    return states, tf.stack(states, axis=1)


class Twice(keras.Model):
    """One layer called twice; its outputs meet in either order."""

    def __init__(self, order):
        super().__init__()
        self.rnn, self.head, self.order = kg.layers.SimpleRNN(4), layers.Dense(1), order

    def call(self, x):
        outputs = [self.rnn(x), 10.0 * self.rnn(x)]
        first, second = (self.head(outputs[i]) for i in self.order)
        return first + second


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_state_norms_tell_the_calls_of_a_layer_apart(order, run_eagerly):
    model, norms = Twice(order), GradientNorms()
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    model.fit(sequences(), Y, batch_size=20, epochs=2, verbose=0, callbacks=[norms])
    path = model.rnn.path
    first, second = (norms.history.state_norms[f"{path} (call {i} of 2)"] for i in (1, 2))
    np.testing.assert_allclose(second, 10 * first, rtol=1e-5)


@pytest.mark.parametrize("mode", ["graph", "run_eagerly", "two fits"])
def test_state_norms_of_sequences_of_varying_length(mode):
    layer = kg.layers.SimpleRNN(4)
    model, norms, lengths = recurrent_model(layer), GradientNorms(), (5, 7, 4, 5)
    randomize(layer)
    data = [sequences(timesteps) for timesteps in lengths]
    expected = [expected_state_norms(model, layer.cell, x, Y) for x in data]
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=mode == "run_eagerly")
    if mode == "two fits":
        for x in data:
            model.fit(x, Y, batch_size=20, verbose=0, callbacks=[norms])
    else:
        model.fit(((x, Y) for x in data), steps_per_epoch=len(data), verbose=0, callbacks=[norms])
    recorded = norms.history.state_norms[layer.path]
    assert recorded.shape == (4, 7)
    for row, values in zip(recorded, expected, strict=True):
        np.testing.assert_allclose(row[: len(values)], values, rtol=1e-5)
        assert np.isnan(row[len(values) :]).all()


@pytest.mark.parametrize(("units", "expected"), [(8, False), (257, True)])
def test_the_graph_of_a_step_has_no_condition(units, expected, monkeypatch):
    """With one, TensorFlow runs all of the step with a slower executor; large weights need it."""
    made, cond = [], tf.cond
    monkeypatch.setattr(
        tf, "cond", lambda *args, **kwargs: made.append(args) or cond(*args, **kwargs)
    )
    model, norms = recurrent_model(kg.layers.SimpleRNN(units)), GradientNorms()
    model.compile(keras.optimizers.SGD(0.01, clipnorm=1.0), "mse")
    model.fit(sequences(), Y, batch_size=10, verbose=0, callbacks=[norms])
    assert len(norms.history.state_norms) == 1
    assert bool(made) is expected


def test_state_norms_under_jit_compile_after_other_lengths():
    # The compiled recurrences are shared by all layers of a process, and serve any length after
    # the second; each model still has its one length, as XLA needs.
    for timesteps in 5, 7, 6:
        layer = kg.layers.SimpleRNN(2)
        model = keras.Sequential([keras.Input((timesteps, 3)), layer, layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=True)
        norms = GradientNorms()
        model.fit(sequences(timesteps), Y, batch_size=20, verbose=0, callbacks=[norms])
        recorded = norms.history.state_norms[layer.path]
        assert recorded.shape == (1, timesteps)
        assert np.isfinite(recorded).all()


def test_varying_length_under_jit_compile_is_said_not_to_be_recorded():
    layer = kg.layers.SimpleRNN(2)
    model, norms = recurrent_model(layer), GradientNorms()
    model.compile("sgd", "mse", jit_compile=True)
    model.fit(sequences(5), Y, batch_size=20, verbose=0, callbacks=[norms])
    with pytest.warns(UserWarning, match="records no state norms"):
        model.fit(sequences(7), Y, batch_size=20, verbose=0, callbacks=[norms])
    assert len(norms.history) == 2
    assert (norms.history.norms > 0).all()
    assert np.isnan(norms.history.state_norms[layer.path][1]).all()


class InFunction(keras.Model):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = kg.layers.SimpleRNN(4), layers.Dense(1)
        self.rnn.build((None, 5, 3))
        self.head.build((None, 4))

    @tf.function
    def call(self, x):
        return self.head(self.rnn(x))


def test_state_norms_of_a_layer_inside_of_a_tf_function():
    model, norms, x = InFunction(), GradientNorms(), sequences()
    expected = expected_state_norms(model, model.rnn.cell, x, Y)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    for _ in range(2):
        model.fit(x, Y, batch_size=20, verbose=0, callbacks=[norms])
        model.fit(x, Y, batch_size=20, verbose=0)
    np.testing.assert_allclose(norms.history.state_norms[model.rnn.path], [expected] * 2, rtol=1e-5)


# tf.distribute


def distributed(strategy, build, optimizer, x=X, callbacks=()):
    keras.utils.set_random_seed(3)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = build()
        model.compile(optimizer(), "mse")
    model.fit(x, Y, batch_size=10, epochs=2, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


@pytest.mark.parametrize(
    ("build", "optimizer", "x"),
    [
        (dense, sgd(), X),
        (lambda: recurrent_model(kg.layers.SimpleRNN(3)), sgd(), sequences()),
        (embedding, sgd(), TOKENS),
    ],
    ids=["dense", "recurrent", "embedding"],
)
def test_mirrored_strategy_equals_one_device(mirrored_strategy, build, optimizer, x):
    one, two = GradientNorms(), GradientNorms()
    single = distributed(None, build, optimizer, x, [one])
    plain = distributed(mirrored_strategy, build, optimizer, x)
    recorded = distributed(mirrored_strategy, build, optimizer, x, [two])
    assert_same_weights(plain, recorded)
    assert len(two.history) == 4
    # Keras 3.6 adds the replicas' gradients up and does not divide them by their number: it trains
    # otherwise than one device, with twice the gradient in the first step.
    as_one = np.allclose(plain.get_weights()[0], single.get_weights()[0], atol=1e-4)
    assert as_one or KERAS < (3, 10)
    steps, factor = (slice(None), 1) if as_one else (slice(1), 2)
    for name in "step", "updated", "missing", "clip_factor":
        np.testing.assert_array_equal(getattr(two.history, name), getattr(one.history, name))
    for name in "loss", "norms", "applied_norms":
        np.testing.assert_allclose(
            getattr(two.history, name)[steps],
            factor * getattr(one.history, name)[steps],
            rtol=1e-5,
            atol=1e-6,
        )
    pairs = zip(two.history.state_norms.values(), one.history.state_norms.values(), strict=True)
    for of_two, of_one in pairs:
        np.testing.assert_allclose(of_two[steps], factor * of_one[steps], rtol=1e-5)


def test_mirrored_strategy_clips_in_each_replica(mirrored_strategy):
    # Keras clips the replicas' gradients before it adds them up: what is applied is the sum of two
    # gradients of norm 0.2, not a gradient of norm 0.2.
    norms = GradientNorms()
    model = distributed(mirrored_strategy, dense, sgd(learning_rate=0.0, clipnorm=0.2), X, [norms])
    with mirrored_strategy.scope():
        weights = [w.numpy() for w in model.trainable_variables]
    oracle = dense()
    oracle.set_weights(weights)
    sums = 0
    for half in slice(0, 5), slice(5, 10):
        with tf.GradientTape() as tape:
            loss = mse(oracle, X[half], Y[half]) / 2
        gradients = dense_gradients(tape.gradient(loss, oracle.trainable_variables))
        sums += np.array([g * min(1, 0.2 / norm(g)) for g in gradients], dtype=object)
    expected = [norm(g.astype("float64")) for g in sums]
    np.testing.assert_allclose(norms.history.applied_norms[0], expected, rtol=1e-5)


# Nothing lost, nothing left behind


def attributes(model):
    """The names of the instance attributes of the model, its layers and its optimizer."""
    owners = [model, model.optimizer, *model._flatten_layers()]
    return [(type(owner).__name__, sorted(vars(owner))) for owner in owners]


def untouched(model):
    hooks = {"train_step", "compute_loss", "make_train_function", "apply", "_clip_gradients"}
    hooks |= {"inner_loop", "on_state_norms"}
    owners = [model, model.optimizer, *model._flatten_layers()]
    return not any(hooks & set(vars(owner)) for owner in owners) and not isinstance(
        model.train_function, callbacks_module._TrainStepHooks
    )


class Poisonable(layers.Layer):
    """Identity that fails on values above 1e6."""

    def call(self, x):
        tf.debugging.assert_less(x, 1e6)
        return x


class Interruptible(layers.Layer):
    """Identity that, run eagerly, is interrupted by values above 1e6."""

    def call(self, x):
        if tf.executing_eagerly() and np.max(x) > 1e6:
            raise KeyboardInterrupt
        return x


def fragile(run_eagerly=False):
    keras.utils.set_random_seed(3)
    guard = Interruptible() if run_eagerly else Poisonable()
    x = keras.Input((5, 3))
    hidden = kg.layers.SimpleRNN(4)(guard(x))
    model = keras.Model(x, layers.Dense(1)(hidden))
    model.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=run_eagerly)
    return model


def sound_data():
    return batches(sequences(), Y, epochs=1, batch_size=4)  # 5 batches


def sound_generator():
    yield from sound_data()


def poisoned_data():
    for i, (x, y) in enumerate(sound_data()):
        yield (np.full_like(x, 1e9) if i == 3 else x), y


class Raises(keras.callbacks.Callback):
    def __init__(self, error, batch=2):
        super().__init__()
        self.error, self.batch = error, batch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            raise self.error


class Stops(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            self.model.stop_training = True


def failing_generator():
    yield from sound_data()[:3]
    raise OSError("disk gone")


class FailingDataset(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        if i == 3:
            raise OSError("disk gone")
        return sound_data()[i]


# What ends the fit after its third step: (data, further callbacks, compile options, error).
ENDINGS = {
    "a step": (poisoned_data, [], False, tf.errors.InvalidArgumentError),
    "Ctrl-C in a step": (poisoned_data, [], True, KeyboardInterrupt),
    "another callback": (
        sound_generator,
        [Raises(RuntimeError("other"))],
        False,
        RuntimeError,
    ),
    "Ctrl-C in another callback": (
        sound_generator,
        [Raises(KeyboardInterrupt())],
        False,
        KeyboardInterrupt,
    ),
    "a generator": (failing_generator, [], False, Exception),
    "a PyDataset": (FailingDataset, [], False, Exception),
    "stop_training": (sound_generator, [Stops()], False, None),
}
RESTORED = {
    "next fit": lambda norms, model: model.fit(*sound_data()[0], epochs=0),
    "detach": lambda norms, model: norms.detach(),
    "with": lambda norms, model: norms.__exit__(None, None, None),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_after_an_unforeseen_end(ending, tmp_path):
    data, others, run_eagerly, error = ENDINGS[ending]
    model, norms = fragile(run_eagerly), GradientNorms()
    model.fit(*sound_data()[0], verbose=0)
    before, function = attributes(model), model.train_function

    rows = tape_loop(
        fragile(run_eagerly), keras.optimizers.SGD(0.05), [sound_data()[0], *sound_data()]
    )[1:4]
    # Where nothing is left behind, there is nothing to restore, in whichever way.
    at_once = ending in ("a step", "Ctrl-C in a step", "stop_training")
    ways = list(RESTORED.values())[: 1 if at_once else None]
    for i, restore in enumerate(ways):
        weights = fragile(run_eagerly).get_weights()
        model.set_weights(weights)
        model.fit(*sound_data()[0], verbose=0, shuffle=False)
        earlier = len(norms.history)
        assert earlier == 3 * i
        with pytest.raises(error) if error else contextlib.nullcontext():
            options = {} if ending == "a PyDataset" else {"steps_per_epoch": 5}
            model.fit(data(), verbose=0, shuffle=False, callbacks=[norms, *others], **options)
        history = norms.history
        assert len(history) == earlier + 3
        for name in "norms", "loss":
            np.testing.assert_allclose(
                getattr(history, name)[earlier:],
                [getattr(row, name) for row in rows],
                rtol=1e-5,
                atol=1e-6,
            )
        if at_once:
            assert attributes(model) == before  # At once.
        restore(norms, model)
        assert attributes(model) == before
        assert model.train_function is function

    # As if the callback had never been there.
    model.fit(*sound_data()[0], verbose=0)
    assert len(norms.history) == 3 * len(ways)
    model.save(tmp_path / "model.keras")
    custom = {"Poisonable": Poisonable, "Interruptible": Interruptible}
    for copy in (
        keras.models.load_model(tmp_path / "model.keras", custom_objects=custom),
        keras.models.clone_model(model),
        *([pickled(model, custom)]),
    ):
        assert untouched(copy) if copy.compiled else True
        assert [w.shape for w in copy.weights] == [w.shape for w in model.weights]


def pickled(model, custom):
    with keras.saving.custom_object_scope(custom):
        return pickle.loads(pickle.dumps(model))


def test_checkpoints_and_copies_taken_while_it_records(tmp_path):
    path = tmp_path / "model.keras"

    class Copies(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.copies = [
                pickle.loads(pickle.dumps(self.model)),
                keras.models.clone_model(self.model),
            ]

    copies = Copies()
    keras.utils.set_random_seed(3)
    model, norms = dense(), GradientNorms()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    checkpoint = keras.callbacks.ModelCheckpoint(str(path))
    model.fit(**FIT, callbacks=[norms, copies, checkpoint])
    loaded = keras.models.load_model(path)
    for copy in loaded, copies.copies[0]:
        assert untouched(copy)
        copy.fit(**FIT)
    assert len(norms.history) == 3
    assert all(map(np.array_equal, loaded.get_weights(), copies.copies[0].get_weights()))


def test_with_block():
    model = fragile()
    with pytest.raises(RuntimeError), GradientNorms() as norms:
        model.fit(
            *sound_data()[0],
            batch_size=1,
            verbose=0,
            callbacks=[norms, Raises(RuntimeError("other"))],
        )
    assert untouched(model)
    assert len(norms.history) == 3
    norms.detach()  # Once more does no harm.


def test_compiling_with_the_hooks_still_on():
    model, norms = fragile(), GradientNorms()
    with pytest.raises(RuntimeError):
        model.fit(*sound_data()[0], verbose=0, callbacks=[norms, Raises(RuntimeError(), 0)])
    assert not untouched(model)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(*sound_data()[0], verbose=0)
    assert untouched(model)
    assert len(norms.history) == 1
