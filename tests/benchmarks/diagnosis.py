"""How often `diagnose` finds a planted fault, raises a false alarm, and whether its advice helps.

    python tests/benchmarks/diagnosis.py [--quick]

Small models are trained with one fault planted in each, and as many without any; each is diagnosed
from its record and from the model. Thresholds were chosen while looking at the even seeds alone;
the table is that of the odd ones. Then the same model is made anew, the code of the finding's
advice is executed, and the training is repeated: is the finding gone? Prints its tables and writes
diagnosis.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from keras.initializers import Constant, Orthogonal, RandomNormal
from rich.console import Console
from rich.table import Table

import kerasgrad as kg
from kerasgrad.diagnosis import KINDS, PRESETS, Case, look
from kerasgrad.inspection import measure
from kerasgrad.memory import forget_bias_for_horizon

SEEDS = 2
BATCHES = 40  # an epoch
EPOCHS = 5
EXAMPLES = 128  # that the model is measured on


@dataclass
class Training:
    """A compiled model and its data, about to be fitted."""

    model: keras.Model
    x: np.ndarray
    y: np.ndarray
    batch_size: int = 32
    epochs: int = EPOCHS

    def fit(self) -> tuple[kg.GradientHistory, dict[str, list[kg.Finding]]]:
        """Train it, and what each preset finds."""
        norms = kg.callbacks.GradientNorms()
        self.model.fit(
            self.x,
            self.y,
            batch_size=self.batch_size,
            epochs=self.epochs,
            verbose=0,
            callbacks=[norms],
        )
        measured = measure(self.model, self.x[:EXAMPLES], self.y[:EXAMPLES])
        case = Case(norms.history, measured)
        return norms.history, {preset: look(case, preset) for preset in PRESETS}


# Data. Each function draws (x, y).


def samples(batch_size=32):
    return BATCHES * batch_size


def regression(rng, features=12, noise=0.1, n=None):
    """A smooth function of the features."""
    x = rng.normal(size=(n or samples(), features))
    a, b = rng.normal(size=(2, features)) / np.sqrt(features)
    y = np.sin(2 * x @ a) + x @ b + noise * rng.normal(size=len(x))
    return x.astype("float32"), y[:, None].astype("float32")


def classification(rng, features=12, classes=4, spread=1.0):
    """Gaussian clouds around random centres."""
    centres = 1.5 * rng.normal(size=(classes, features))
    y = rng.integers(classes, size=samples())
    x = centres[y] + spread * rng.normal(size=(len(y), features))
    return x.astype("float32"), y


def images(rng, size=8):
    """Horizontal, vertical or no bar in noise."""
    y = rng.integers(3, size=samples())
    x = 0.3 * rng.normal(size=(len(y), size, size, 1))
    for image, label, place in zip(x, y, rng.integers(size, size=len(y)), strict=True):
        if label:
            image[(place,) if label == 1 else (slice(None), place)] += 1
    return x.astype("float32"), y


def mean_of_sequence(rng, timesteps=15, features=2, per_step=False):
    """The mean of the first feature so far, times √t: needs each step a little."""
    x = rng.normal(size=(samples(), timesteps, features))
    t = np.arange(1, timesteps + 1)
    y = np.cumsum(x[..., 0], axis=1) / np.sqrt(t)
    y = y[..., None] if per_step else y[:, -1:]
    return x.astype("float32"), y.astype("float32")


def last_steps(rng, timesteps=20, features=3):
    """The sign of a sum over the last three steps: needs a short memory only."""
    x = rng.normal(size=(samples(), timesteps, features))
    y = (x[:, -3:, 0].sum(axis=1) > 0).astype("float32")
    return x.astype("float32"), y[:, None]


def tokens(rng, timesteps=15, words=20):
    """Whether there are more words of the first half of the vocabulary."""
    x = rng.integers(words, size=(samples(), timesteps))
    return x, ((x < words / 2).sum(axis=1) > timesteps / 2).astype("float32")[:, None]


def adding(rng, timesteps=40):
    """Add the two marked numbers: needs a long memory."""
    task = kg.tasks.adding_problem(samples(), timesteps, int(rng.integers(1 << 30)), test_samples=1)
    return task.x, task.y


# Models


def network(data, *hidden, outputs=1, activation=None):
    x, _ = data
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    return keras.Sequential([inputs, *hidden, layers.Dense(outputs, activation=activation)])


def dense(units, count=2, activation="relu", initializer=None, **kwargs):
    initializer = initializer or ("he_normal" if activation == "relu" else "glorot_uniform")
    return [
        layers.Dense(units, activation=activation, kernel_initializer=initializer, **kwargs)
        for _ in range(count)
    ]


def training(data, hidden, optimizer, loss="mse", **kwargs):
    classes = int(data[1].max()) + 1 if loss.startswith("sparse") else 1
    activation = {"mse": None, "binary_crossentropy": "sigmoid"}.get(loss, "softmax")
    model = network(data, *hidden, outputs=classes, activation=activation)
    model.compile(optimizer, loss=loss)
    return Training(model, *data, **kwargs)


SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
SPARSE, BINARY = "sparse_categorical_crossentropy", "binary_crossentropy"


@dataclass(frozen=True)
class Scenario:
    """A way of making a training, with a planted fault or none.

    - make: make(rng) -> Training
    - plants: the kind that is to be found; None for a healthy training
    - implies: kinds that follow from the fault and count neither for nor against
    """

    name: str
    family: str
    make: Callable[[np.random.Generator], Training]
    plants: str | None = None
    implies: frozenset[str] = field(default_factory=frozenset)


SCENARIOS: list[Scenario] = []


def scenario(family: str, plants: str | None = None, implies: str = ""):
    def register(make):
        name = make.__name__.replace("_", " ")
        SCENARIOS.append(Scenario(name, family, make, plants, frozenset(implies.split())))
        return make

    return register


FAMILIES = recurrent, feed_forward = "recurrent", "feed-forward"

# What a training that blows up does on its way.
BLOWS_UP = "non_finite exploding loss_spikes updates_too_large"
# What units that do not answer to their input do to all below them.
CUT_OFF = "vanishing_through_time vanishing_through_depth unchanged_weights"


# Planted faults


@scenario(recurrent, "non_finite", f"{BLOWS_UP} {CUT_OFF} dead_relu_units")
def relu_rnn_overflows(rng):
    rnn = layers.SimpleRNN(16, activation="relu", recurrent_initializer=Orthogonal(1.8))
    return training(adding(rng), [rnn], SGD(0.1))


@scenario(recurrent, "non_finite", f"{BLOWS_UP} {CUT_OFF}")
def sequences_with_a_nan(rng):
    x, y = mean_of_sequence(rng)
    x[rng.integers(len(x)), 3] = np.nan
    return training((x, y), [layers.LSTM(12)], Adam(0.005))


@scenario(feed_forward, "non_finite", f"{BLOWS_UP} {CUT_OFF} dead_relu_units")
def mlp_at_a_huge_learning_rate(rng):
    return training(regression(rng), dense(32, 3, activation="linear"), SGD(5.0))


@scenario(feed_forward, "non_finite", f"{BLOWS_UP} {CUT_OFF}")
def examples_with_an_inf(rng):
    x, y = regression(rng)
    x[rng.integers(len(x)), 0] = np.inf
    return training((x, y), dense(32), Adam(0.002))


@scenario(
    recurrent,
    "exploding",
    f"{BLOWS_UP} {CUT_OFF} clipping_always clip_threshold_far dead_relu_units",
)
def stacked_relu_rnn_drifts_off(rng):
    first = layers.SimpleRNN(12, activation="relu", return_sequences=True)
    hidden = [first, layers.SimpleRNN(12, activation="relu")]
    return training(mean_of_sequence(rng, 20), hidden, SGD(0.1))


@scenario(recurrent, "exploding", f"{BLOWS_UP} {CUT_OFF}")
def linear_rnn_drifts_off(rng):
    rnn = layers.SimpleRNN(8, activation="linear", recurrent_initializer=Orthogonal(0.9))
    return training(mean_of_sequence(rng), [rnn], SGD(0.04))


@scenario(feed_forward, "exploding", BLOWS_UP)
def least_squares_just_above_stability(rng):
    x, y = regression(rng)
    return training((x, y), [], SGD(1.0))


@scenario(
    feed_forward,
    "exploding",
    f"{BLOWS_UP} {CUT_OFF} clipping_always clip_threshold_far dead_relu_units",
)
def linear_mlp_with_too_much_momentum(rng):
    return training(regression(rng), dense(32, 1, "linear"), SGD(0.1, momentum=0.95))


@scenario(recurrent, "loss_spikes", "exploding updates_too_large")
def sequences_with_outliers(rng):
    x, y = mean_of_sequence(rng)
    y[rng.choice(len(y), 8, replace=False)] += 60
    return training((x, y), [layers.GRU(16)], Adam(0.005))


@scenario(feed_forward, "loss_spikes", "exploding updates_too_large")
def examples_with_outliers(rng):
    x, y = regression(rng)
    y[rng.choice(len(y), 8, replace=False)] += 60
    return training((x, y), dense(32), Adam(0.005))


@scenario(recurrent, "vanishing_through_time", "forget_bias_too_low")
def tanh_rnn_on_long_sequences(rng):
    return training(adding(rng, 60), [layers.SimpleRNN(24)], SGD(0.05, clipnorm=1.0))


@scenario(recurrent, "vanishing_through_time", "forget_bias_too_low")
def our_rnn_with_small_weights(rng):
    rnn = kg.layers.SimpleRNN(24, recurrent_initializer=Orthogonal(0.7))
    return training(adding(rng, 50), [rnn], Adam(0.002))


@scenario(
    recurrent,
    "vanishing_through_depth",
    "vanishing_through_time unchanged_weights updates_too_small",
)
def stacked_sigmoid_rnn(rng):
    small = RandomNormal(stddev=0.1)
    hidden = [
        layers.SimpleRNN(12, activation="sigmoid", kernel_initializer=small, return_sequences=i < 3)
        for i in range(4)
    ]
    return training(mean_of_sequence(rng, 10), hidden, SGD(0.05))


@scenario(feed_forward, "vanishing_through_depth", "unchanged_weights updates_too_small")
def ten_sigmoid_layers(rng):
    return training(regression(rng), dense(24, 10, activation="sigmoid"), SGD(0.1))


@scenario(feed_forward, "vanishing_through_depth", "unchanged_weights updates_too_small")
def six_tanh_layers_with_small_weights(rng):
    hidden = dense(24, 6, activation="tanh", initializer=RandomNormal(stddev=0.02))
    return training(classification(rng), hidden, SGD(0.1), SPARSE)


@scenario(recurrent, "unchanged_weights", f"{CUT_OFF} updates_too_small forget_bias_too_low")
def lstm_at_a_learning_rate_of_zero(rng):
    return training(mean_of_sequence(rng), [layers.LSTM(8)], SGD(0.0))


@scenario(recurrent, "unchanged_weights", f"{CUT_OFF} dead_relu_units")
def rnn_under_zero_weights(rng):
    hidden = [layers.SimpleRNN(12), *dense(12, 2, initializer="zeros")]
    return training(mean_of_sequence(rng), hidden, SGD(0.05))


@scenario(feed_forward, "unchanged_weights", f"{CUT_OFF} updates_too_small")
def mlp_after_its_schedule_ended(rng):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.0, 0.0])
    return training(regression(rng), dense(32), Adam(schedule))


@scenario(feed_forward, "unchanged_weights", f"{CUT_OFF} dead_relu_units")
def mlp_of_zeros(rng):
    return training(regression(rng), dense(32, 3, initializer="zeros"), SGD(0.05))


@scenario(recurrent, "dead_relu_units", CUT_OFF)
def relu_rnn_with_a_low_bias(rng):
    rnn = layers.SimpleRNN(16, activation="relu", bias_initializer=Constant(-8.0))
    return training(mean_of_sequence(rng), [rnn], SGD(0.02))


@scenario(feed_forward, "dead_relu_units", CUT_OFF)
def mlp_with_a_low_bias(rng):
    return training(regression(rng), dense(32, 2, bias_initializer=Constant(-9.0)), SGD(0.02))


@scenario(feed_forward, "dead_relu_units", f"{CUT_OFF} {BLOWS_UP}")
def mlp_killed_by_its_learning_rate(rng):
    return training(regression(rng), dense(32, 3), Adam(0.5))


@scenario(
    recurrent, "saturated_activations", f"{CUT_OFF} forget_bias_too_low exploding updates_too_small"
)
def rnn_with_unscaled_inputs(rng):
    x, y = mean_of_sequence(rng)
    return training((300 * x, y), [layers.SimpleRNN(16)], SGD(0.02))


@scenario(
    recurrent, "saturated_activations", f"{CUT_OFF} forget_bias_too_low exploding updates_too_small"
)
def lstm_with_large_weights(rng):
    lstm = layers.LSTM(12, kernel_initializer=RandomNormal(stddev=300.0))
    return training(mean_of_sequence(rng), [lstm], Adam(0.002))


@scenario(feed_forward, "saturated_activations", f"{CUT_OFF} exploding updates_too_small")
def tanh_mlp_with_large_weights(rng):
    hidden = dense(32, 2, activation="tanh", initializer=RandomNormal(stddev=300.0))
    return training(regression(rng), hidden, SGD(0.02))


@scenario(feed_forward, "saturated_activations", f"{CUT_OFF} exploding updates_too_small")
def sigmoid_mlp_with_unscaled_inputs(rng):
    x, y = classification(rng)
    return training((1000 * x, y), dense(32, 2, activation="sigmoid"), Adam(0.001), SPARSE)


@scenario(recurrent, "forget_bias_too_low", "vanishing_through_time")
def lstm_on_long_sequences(rng):
    return training(adding(rng, 60), [layers.LSTM(12)], Adam(0.005))


@scenario(recurrent, "forget_bias_too_low", "vanishing_through_time")
def gru_that_forgets(rng):
    return training(adding(rng, 60), [layers.GRU(12, bias_initializer=Constant(-2.0))], Adam(0.002))


@scenario(recurrent, "forget_bias_too_low", "vanishing_through_time")
def simplified_lstm_without_bias_for_its_length(rng):
    layer = kg.layers.SimplifiedLSTM(16, project_input=True, forget_bias=0.0)
    return training(adding(rng, 60), [layer], Adam(0.002))


@scenario(
    recurrent, "updates_too_small", "unchanged_weights vanishing_through_time forget_bias_too_low"
)
def lstm_at_a_tiny_learning_rate(rng):
    return training(mean_of_sequence(rng), [layers.LSTM(12)], Adam(1e-6))


@scenario(feed_forward, "updates_too_small", "unchanged_weights")
def mlp_at_a_tiny_learning_rate(rng):
    return training(classification(rng), dense(32), SGD(1e-5), SPARSE)


@scenario(
    recurrent,
    "updates_too_large",
    f"{BLOWS_UP} {CUT_OFF} saturated_activations forget_bias_too_low",
)
def gru_at_a_large_learning_rate(rng):
    return training(mean_of_sequence(rng), [layers.GRU(12)], Adam(1.0))


@scenario(feed_forward, "updates_too_large", f"{BLOWS_UP} {CUT_OFF} dead_relu_units")
def mlp_at_a_large_learning_rate(rng):
    return training(classification(rng), dense(32), Adam(1.0), SPARSE)


@scenario(recurrent, "clipping_always")
def lstm_clipped_at_each_step(rng):
    return training(mean_of_sequence(rng), [layers.LSTM(12)], SGD(0.5, clipnorm=0.001))


@scenario(feed_forward, "clipping_always")
def mlp_clipped_at_each_step(rng):
    return training(regression(rng), dense(32), SGD(0.02, global_clipnorm=0.01))


@scenario(recurrent, "clip_threshold_far", "loss_spikes exploding")
def rnn_clipped_only_at_outliers(rng):
    x, y = mean_of_sequence(rng)
    y[rng.choice(len(y), 4, replace=False)] += 1000
    optimizer = SGD(0.002, global_clipnorm=100.0)
    return training((x, y), [layers.SimpleRNN(12)], optimizer)


@scenario(feed_forward, "clip_threshold_far", "loss_spikes exploding")
def mlp_clipped_only_at_outliers(rng):
    x, y = regression(rng)
    y[rng.choice(len(y), 10, replace=False)] += 1000
    return training((x, y), dense(32), SGD(0.005, clipnorm=600.0))


@scenario(recurrent, "clip_threshold_far")
def lstm_clipped_to_a_fifth(rng):
    return training(mean_of_sequence(rng), [layers.LSTM(12)], SGD(0.01, global_clipnorm=0.1))


@scenario(feed_forward, "clip_threshold_far")
def mlp_clipped_to_a_quarter(rng):
    return training(regression(rng), dense(32), SGD(0.0002, global_clipnorm=1.8))


@scenario(recurrent, "clipping_never")
def gru_never_clipped(rng):
    return training(mean_of_sequence(rng), [layers.GRU(12)], Adam(0.005, clipnorm=1000.0))


@scenario(feed_forward, "clipping_never")
def mlp_never_clipped(rng):
    return training(classification(rng), dense(32), SGD(0.05, global_clipnorm=500.0), SPARSE)


# Healthy trainings


@scenario(recurrent)
def rnn_with_adam(rng):
    return training(mean_of_sequence(rng), [layers.SimpleRNN(16)], Adam(0.005))


@scenario(recurrent)
def rnn_with_sgd_and_clipnorm(rng):
    return training(mean_of_sequence(rng), [layers.SimpleRNN(24)], SGD(0.05, clipnorm=1.0))


@scenario(recurrent)
def our_rnn_with_momentum(rng):
    optimizer = SGD(0.02, momentum=0.9, global_clipnorm=1.0)
    return training(mean_of_sequence(rng), [kg.layers.SimpleRNN(24)], optimizer)


@scenario(recurrent)
def irnn(rng):
    return training(mean_of_sequence(rng), [kg.layers.IRNN(24)], Adam(0.003, clipnorm=1.0))


@scenario(recurrent)
def lstm_with_adam(rng):
    return training(mean_of_sequence(rng), [layers.LSTM(16)], Adam(0.01))


@scenario(recurrent)
def gru_with_rmsprop(rng):
    return training(mean_of_sequence(rng), [layers.GRU(16)], keras.optimizers.RMSprop(0.003))


@scenario(recurrent)
def lstm_that_needs_the_last_steps_alone(rng):
    return training(last_steps(rng, 40), [layers.LSTM(16)], Adam(0.01), BINARY)


@scenario(recurrent)
def our_rnn_that_needs_the_last_steps_alone(rng):
    return training(last_steps(rng, 50), [kg.layers.SimpleRNN(24)], Adam(0.005), BINARY)


@scenario(recurrent)
def gru_that_needs_the_last_steps_alone(rng):
    return training(last_steps(rng, 30), [layers.GRU(12)], Adam(0.01), BINARY)


@scenario(recurrent)
def simplified_lstm_on_the_adding_problem(rng):
    layer = kg.layers.SimplifiedLSTM(
        24, project_input=True, forget_bias=forget_bias_for_horizon(40)
    )
    optimizer = SGD(0.1, momentum=0.9, clipnorm=0.2)
    return training(adding(rng, 40), [layer], optimizer, epochs=10)


@scenario(recurrent)
def lstm_for_each_step(rng):
    data = mean_of_sequence(rng, 30, per_step=True)
    return training(data, [layers.LSTM(16, return_sequences=True)], Adam(0.01))


@scenario(recurrent)
def embedding_and_gru(rng):
    hidden = [layers.Embedding(20, 8), layers.GRU(12)]
    return training(tokens(rng), hidden, Adam(0.01), BINARY)


@scenario(recurrent)
def masked_embedding_and_lstm(rng):
    x, y = tokens(rng)
    x = np.where(np.arange(15) < rng.integers(8, 16, size=(len(x), 1)), x + 1, 0)
    y = ((x > 10).sum(axis=1) > ((x > 0) & (x <= 10)).sum(axis=1)).astype("float32")[:, None]
    hidden = [layers.Embedding(21, 8, mask_zero=True), layers.LSTM(12)]
    return training((x, y), hidden, Adam(0.01), BINARY)


@scenario(recurrent)
def bidirectional_lstm(rng):
    hidden = [layers.Bidirectional(layers.LSTM(8))]
    return training(mean_of_sequence(rng, 10), hidden, Adam(0.01))


@scenario(recurrent)
def two_stacked_lstms(rng):
    hidden = [layers.LSTM(12, return_sequences=True), layers.LSTM(12)]
    return training(mean_of_sequence(rng, 12), hidden, Adam(0.01, global_clipnorm=1.0))


@scenario(recurrent)
def rnn_and_dense_head(rng):
    hidden = [layers.SimpleRNN(16), *dense(16, 1)]
    return training(mean_of_sequence(rng), hidden, Adam(0.003))


@scenario(recurrent)
def convolution_and_gru(rng):
    hidden = [layers.Conv1D(8, 3, activation="relu"), layers.GRU(12)]
    return training(mean_of_sequence(rng, 20), hidden, Adam(0.005))


@scenario(recurrent)
def lstm_of_four_units(rng):
    return training(mean_of_sequence(rng, 10), [layers.LSTM(4)], Adam(0.02))


@scenario(recurrent)
def gru_with_dropout(rng):
    return training(mean_of_sequence(rng), [layers.GRU(24, dropout=0.1)], Adam(0.005))


@scenario(recurrent)
def lstm_with_a_decaying_rate(rng):
    schedule = keras.optimizers.schedules.CosineDecay(0.02, EPOCHS * BATCHES)
    return training(mean_of_sequence(rng), [layers.LSTM(16)], Adam(schedule))


@scenario(recurrent)
def rnn_in_batches_of_eight(rng):
    x, y = mean_of_sequence(rng, 10)
    data = x[: samples(8)], y[: samples(8)]
    return training(data, [layers.SimpleRNN(12)], SGD(0.02, clipnorm=2.0), batch_size=8)


def with_noise(data, scale, rng):
    """Targets of which so much can be learned, and no more."""
    x, y = data
    return x, (y + scale * rng.normal(size=y.shape)).astype("float32")


def with_wrong_labels(data, share, rng):
    x, y = data
    wrong = rng.random(len(y)) < share
    y = y.copy()
    y[wrong] = rng.permutation(y[wrong])
    return x, y


@scenario(recurrent)
def gru_on_noisy_targets(rng):
    data = with_noise(mean_of_sequence(rng, 30), 1.0, rng)
    return training(data, [layers.GRU(16)], Adam(0.005))


@scenario(recurrent)
def lstm_with_wrong_labels(rng):
    data = with_wrong_labels(last_steps(rng, 40), 0.3, rng)
    return training(data, [layers.LSTM(12)], Adam(0.01), BINARY)


@scenario(recurrent)
def our_rnn_that_needs_the_last_of_100_steps(rng):
    x, y = last_steps(rng, 100)
    return training((x, y), [kg.layers.SimpleRNN(16)], Adam(0.01, clipnorm=1.0), BINARY)


@scenario(recurrent)
def chrono_lstm(rng):
    """A forget bias of ln(T / ln 2): a gate that is open from the start."""
    lstm = layers.LSTM(16, name="lstm")
    made = training(mean_of_sequence(rng, 40), [lstm], Adam(0.005))
    bias = lstm.cell.bias.numpy()
    bias[16:32] = forget_bias_for_horizon(40)
    lstm.cell.bias.assign(bias)
    return made


@scenario(feed_forward)
def mlp_on_noisy_targets(rng):
    return training(with_noise(regression(rng), 1.0, rng), dense(32), Adam(0.003))


@scenario(feed_forward)
def classifier_with_wrong_labels(rng):
    data = with_wrong_labels(classification(rng), 0.3, rng)
    return training(data, dense(32), Adam(0.003), SPARSE)


@scenario(feed_forward)
def eight_tanh_layers(rng):
    hidden = dense(32, 8, activation="tanh")
    return training(classification(rng), hidden, SGD(0.05, momentum=0.9), SPARSE)


@scenario(feed_forward)
def classifier_of_rare_examples(rng):
    """One in twenty is of the second class."""
    x, y = classification(rng, classes=2)
    keep = (y == 0) | (rng.random(len(y)) < 0.05)
    data = x[keep], y[keep, None].astype("float32")
    return training(data, dense(24), Adam(0.005), BINARY, epochs=8)


@scenario(feed_forward)
def mlp_with_sgd(rng):
    return training(regression(rng), dense(32), SGD(0.02))


@scenario(feed_forward)
def mlp_with_adam(rng):
    return training(regression(rng), dense(64), Adam(0.003))


@scenario(feed_forward)
def mlp_with_adamw_and_clipping(rng):
    optimizer = keras.optimizers.AdamW(0.003, global_clipnorm=1.0)
    return training(regression(rng), dense(32), optimizer)


@scenario(feed_forward)
def tanh_mlp(rng):
    return training(regression(rng), dense(32, 2, activation="tanh"), SGD(0.05, momentum=0.9))


@scenario(feed_forward)
def sigmoid_mlp(rng):
    return training(classification(rng), dense(24, 1, activation="sigmoid"), Adam(0.01), SPARSE)


@scenario(feed_forward)
def classifier(rng):
    return training(classification(rng), dense(32), Adam(0.003), SPARSE)


@scenario(feed_forward)
def classifier_of_separate_clouds(rng):
    return training(classification(rng, spread=0.3), dense(32), Adam(0.005), SPARSE)


@scenario(feed_forward)
def logistic_regression(rng):
    x, y = classification(rng, classes=2)
    return training((x, y[:, None].astype("float32")), [], SGD(0.1), BINARY)


@scenario(feed_forward)
def linear_regression(rng):
    return training(regression(rng), [], SGD(0.02))


@scenario(feed_forward)
def deep_mlp(rng):
    return training(classification(rng), dense(32, 6), Adam(0.002), SPARSE)


@scenario(feed_forward)
def deep_mlp_with_batch_normalization(rng):
    hidden = [part for layer in dense(24, 4) for part in (layer, layers.BatchNormalization())]
    return training(classification(rng), hidden, SGD(0.02, momentum=0.9), SPARSE)


@scenario(feed_forward)
def convolutions(rng):
    hidden = [
        layers.Conv2D(8, 3, activation="relu"),
        layers.Conv2D(8, 3, activation="relu"),
        layers.Flatten(),
    ]
    return training(images(rng), hidden, Adam(0.005), SPARSE)


@scenario(feed_forward)
def convolutions_with_pooling(rng):
    hidden = [layers.Conv2D(12, 3), layers.ReLU(), layers.MaxPooling2D(), layers.Flatten()]
    return training(images(rng), [*hidden, *dense(16, 1)], SGD(0.05, momentum=0.9), SPARSE)


@scenario(feed_forward)
def wide_mlp(rng):
    return training(regression(rng), dense(256), Adam(0.001))


@scenario(feed_forward)
def tiny_mlp(rng):
    return training(regression(rng, features=4), dense(4, 1, "tanh"), Adam(0.02))


@scenario(feed_forward)
def mlp_with_dropout(rng):
    hidden = [part for layer in dense(48) for part in (layer, layers.Dropout(0.2))]
    return training(classification(rng), hidden, Adam(0.003), SPARSE)


@scenario(feed_forward)
def mlp_with_weight_decay(rng):
    return training(regression(rng), dense(32, kernel_regularizer="l2"), Adam(0.005))


@scenario(feed_forward)
def selu_mlp(rng):
    hidden = dense(32, 4, activation="selu", initializer="lecun_normal")
    return training(regression(rng), hidden, SGD(0.02, clipnorm=1.0))


@scenario(feed_forward)
def mlp_with_a_warm_up(rng):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, EPOCHS * BATCHES - 20, warmup_target=0.01, warmup_steps=20
    )
    return training(regression(rng), dense(32), Adam(schedule))


@scenario(feed_forward)
def mlp_in_batches_of_four(rng):
    x, y = regression(rng, noise=0.5)
    data = x[: samples(4)], y[: samples(4)]
    return training(data, dense(24), SGD(0.005), batch_size=4, epochs=8)


@scenario(feed_forward)
def mlp_with_accumulation(rng):
    optimizer = Adam(0.01, gradient_accumulation_steps=4)
    return training(regression(rng), dense(32), optimizer, epochs=10)


# Measuring


def make(scenario: Scenario, seed: int) -> Training:
    """The scenario's training: the same for the same seed, down to the names of its layers."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    return scenario.make(np.random.default_rng(seed))


def follow(advice: str, training: Training) -> Training:
    """Execute an advice as its reader would, before the training."""
    names = {"model": training.model, "x": training.x, "y": training.y}
    exec(advice, names)
    return Training(names["model"], names["x"], names["y"], training.batch_size, training.epochs)


def final_loss(history: kg.GradientHistory) -> float:
    """Median loss of the last tenth of the steps."""
    return float(np.median(history.loss[-max(1, len(history) // 10) :]))


def run(job: tuple[str, int]) -> dict[str, Any]:
    """One training of a scenario; and where its fault was found, one more after the advice."""
    name, seed = job
    scenario = next(s for s in SCENARIOS if s.name == name)
    start = perf_counter()
    history, found = make(scenario, seed).fit()
    row = {
        "scenario": name,
        "family": scenario.family,
        "plants": scenario.plants,
        "seed": seed,
        "found": {preset: sorted({f.kind for f in fs}) for preset, fs in found.items()},
        "first_loss": float(np.median(history.loss[:10])),
        "final_loss": final_loss(history),
    }
    advices = dict.fromkeys(f.advice for f in found["kerasgrad"] if f.kind == scenario.plants)
    if advices:
        anew = make(scenario, seed)
        for advice in advices:  # One a layer, where several have the fault.
            anew = follow(advice, anew)
        history, found = anew.fit()
        row["after_advice"] = {
            "gone": scenario.plants not in {f.kind for f in found["kerasgrad"]},
            "found": sorted({f.kind for f in found["kerasgrad"]}),
            "final_loss": final_loss(history),
        }
    return row | {"seconds": round(perf_counter() - start, 1)}


def count(rows: list[dict], kind: str) -> dict[str, int]:
    """How often a kind was found where it was planted, and elsewhere.

    Where it follows from another fault it counts neither for nor against.
    """
    implies = {s.name: s.implies for s in SCENARIOS}
    counts = dict.fromkeys(
        (
            "planted",
            "found",
            "false_in_healthy",
            "false_in_others",
            "implied",
            "followed",
            "gone",
            "loss_lower",
            "others_afterwards",
        ),
        0,
    )
    for row in rows:
        is_found = kind in row["found"]["kerasgrad"]
        if row["plants"] == kind:
            counts["planted"] += 1
            counts["found"] += is_found
            if is_found:
                after = row["after_advice"]
                counts["followed"] += 1
                counts["gone"] += after["gone"]
                # A loss that was NaN is higher than any.
                counts["loss_lower"] += not after["final_loss"] >= np.nan_to_num(
                    row["final_loss"], nan=np.inf
                )
                counts["others_afterwards"] += bool(set(after["found"]) - {kind})
        elif is_found and row["plants"] is None:
            counts["false_in_healthy"] += 1
        elif is_found and kind in implies[row["scenario"]]:
            counts["implied"] += 1
        elif is_found:
            counts["false_in_others"] += 1
    return counts


def ratio(part: int, whole: int) -> str:
    return f"{part / whole:.2f} ({part}/{whole})" if whole else "-"


def tables(rows: list[dict]) -> tuple[list[Table], dict[str, Any]]:
    """The tables of these rows, and their numbers."""
    by_kind = {kind: count(rows, kind) for kind in KINDS}
    faults = Table(
        "kind",
        *(f"recall,\n{family}" for family in FAMILIES),
        "precision",
        "false alarms:\nhealthy",
        "other\nfaults",
        "after the advice:\ngone",
        "loss\nlower",
        "another\nfinding",
        title="Planted faults",
        title_justify="left",
    )
    for kind, n in by_kind.items():
        of = [count([r for r in rows if r["family"] == family], kind) for family in FAMILIES]
        false = n["false_in_healthy"] + n["false_in_others"]
        faults.add_row(
            kind,
            *(ratio(m["found"], m["planted"]) for m in of),
            ratio(n["found"], n["found"] + false),
            *map(str, (n["false_in_healthy"], n["false_in_others"])),
            f"{n['gone']} of {n['followed']}",
            *map(str, (n["loss_lower"], n["others_afterwards"])),
        )
    healthy = [row for row in rows if row["plants"] is None]
    planted = [row for row in rows if row["plants"]]
    presets = {}
    whole = Table(
        "thresholds of",
        "the planted kind",
        "any finding, planted",
        "any finding, healthy",
        title="All trainings",
        title_justify="left",
    )
    for preset in PRESETS:
        presets[preset] = {
            "planted_kind": sum(row["plants"] in row["found"][preset] for row in planted),
            "any_planted": sum(bool(row["found"][preset]) for row in planted),
            "any_healthy": sum(bool(row["found"][preset]) for row in healthy),
        }
        kind, any_planted, any_healthy = presets[preset].values()
        whole.add_row(
            preset,
            ratio(kind, len(planted)),
            ratio(any_planted, len(planted)),
            ratio(any_healthy, len(healthy)),
        )
    learned = sum(row["final_loss"] < 0.5 * row["first_loss"] for row in healthy)
    whole.caption = f"{learned} of {len(healthy)} healthy trainings at least halved their loss"
    numbers = {
        "by_kind": by_kind,
        "presets": presets,
        "planted": len(planted),
        "healthy": len(healthy),
        "healthy_that_halved_their_loss": learned,
    }
    return [faults, whole], numbers


def without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN and no Inf: null."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def use_one_core() -> None:
    """Two processes with one core each are faster than with two each."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two scenarios, to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(SEEDS)))
    parser.add_argument("--only", nargs="*", help="scenarios with one of these words in their name")
    options = parser.parse_args()
    words, seeds = options.only, options.seeds
    if options.quick:
        words, seeds = ["mlp never clipped", "mlp with sgd"], [1]
    chosen = [s for s in SCENARIOS if not words or any(word in s.name for word in words)]
    jobs = [(s.name, seed) for seed in seeds for s in chosen]
    console = Console(width=None if sys.stdout.isatty() else 160)
    start = perf_counter()
    with ProcessPoolExecutor(2 if len(jobs) > 4 else 1, initializer=use_one_core) as pool:
        rows = []
        for row in pool.map(run, jobs):
            rows.append(row)
            print(f"\r{len(rows)} of {len(jobs)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    report = {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "minutes": round((perf_counter() - start) / 60, 1),
        "seeds": seeds,
    }
    for name, half in (("tuned_on", 0), ("reported", 1)):
        of_half = [row for row in rows if row["seed"] % 2 == half]
        if of_half:
            console.rule(f"{name}: seeds {sorted({row['seed'] for row in of_half})}")
            printed, report[name] = tables(of_half)
            console.print(*printed)
    if not options.quick and not words:
        summary = json.dumps(report, indent=1).removesuffix("\n}")
        trainings = ",\n  ".join(json.dumps(without_nan(row)) for row in rows)  # A line each.
        path = Path(__file__).with_suffix(".json")
        path.write_text(f'{summary},\n "trainings": [\n  {trainings}\n ]\n}}\n')


if __name__ == "__main__":
    main()
