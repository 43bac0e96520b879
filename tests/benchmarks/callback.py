"""What GradientNorms costs a step of `fit`, beside a callback that computes the gradients again.

    python tests/benchmarks/callback.py [--quick] [--turns 40]

Prints a table and writes callback.json, or on a GPU callback_gpu.json, beside this file (--quick
leaves the file alone). Each variant trains its own copy of the same model; the variants take turns,
one epoch each, and a ratio is the median over the turns of (this variant's time) / (plain fit's
time in the same turn). The first turns, which compile, do not count.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from measuring import at_most, median, ratio, show, write_report
from rich.table import Table

import kerasgrad as kg


class RecomputeNorms(keras.callbacks.Callback):
    """Gradient norms as they are often recorded: a second pass over the batch at its end."""

    def __init__(self, x, y, batch_size):
        super().__init__()
        self.batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size).repeat()
        self.norms = []

    def on_train_begin(self, logs=None):
        self.iterator = iter(self.batches)

        @tf.function
        def norms(x, y):
            with tf.GradientTape() as tape:
                loss = self.model.compute_loss(y=y, y_pred=self.model(x, training=True))
            return [tf.norm(g) for g in tape.gradient(loss, self.model.trainable_variables)]

        self.compute = getattr(self, "compute", norms)

    def on_train_batch_end(self, batch, logs=None):
        self.norms.append([norm.numpy() for norm in self.compute(*next(self.iterator))])


def feed_forward():
    """A step of about 5 ms on two cores, most of it spent on a million weights."""
    layers = [keras.layers.Dense(512, activation="relu") for _ in range(4)]
    return keras.Sequential([keras.layers.Input((256,)), *layers, keras.layers.Dense(1)]), (256,)


def keras_lstm():
    """A step of about 5 ms on two cores, with Keras's own recurrent layer."""
    layer = keras.layers.LSTM(32)
    return keras.Sequential([keras.layers.Input((40, 8)), layer, keras.layers.Dense(1)]), (40, 8)


def recurrent():
    """A step of about 5 ms on two cores, with ∂L/∂s_t recorded inside of it."""
    layer = kg.layers.SimpleRNN(64)
    return keras.Sequential([keras.layers.Input((250, 2)), layer, keras.layers.Dense(1)]), (250, 2)


def measure(build, turns, steps, batch_size=32):
    """Milliseconds a step of each variant in each turn: {variant: array of turns}."""
    rng = np.random.default_rng(0)
    _, shape = build()
    x = rng.normal(size=(steps * batch_size, *shape)).astype("float32")
    y = rng.normal(size=(steps * batch_size, 1)).astype("float32")
    variants = {
        "plain fit": None,
        "GradientNorms": kg.callbacks.GradientNorms(),
        "recompute each batch": RecomputeNorms(x, y, batch_size),
    }
    models = {}
    for name in variants:
        models[name], _ = build()
        models[name].compile(keras.optimizers.SGD(0.001, clipnorm=1.0), "mse")
    times = {name: [] for name in variants}
    warm_up = 2
    for turn in range(warm_up + turns):
        for name, callback in variants.items():
            start = time.perf_counter()
            models[name].fit(
                x,
                y,
                batch_size=batch_size,
                shuffle=False,
                verbose=0,
                callbacks=[callback] if callback else [],
            )
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start) / steps)
    return {name: np.array(values) for name, values in times.items()}


# Of plain fit's time; more is asked of a step that records ∂L/∂s_t too.
TARGETS = {keras_lstm: 1.03, feed_forward: 1.03, recurrent: 1.05}

COLUMNS = ("model", "variant", "ms a step (median)", "ratio to plain fit (quartiles)")


def shown(row):
    """The cells of a row."""
    of_plain = at_most(row["ratio"], row["quartiles"], row["target"], digits=3)
    return row["model"], row["variant"], f"{row['ms_a_step']:.2f}", of_plain


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one model, few turns: to see that it runs"
    )
    parser.add_argument("--turns", type=int, default=40)
    arguments = parser.parse_args()
    targets, turns, steps = TARGETS, arguments.turns, 100
    if arguments.quick:
        targets, turns, steps = {recurrent: TARGETS[recurrent]}, 2, 20
    table = Table(*COLUMNS)
    results = []
    for build, target in targets.items():
        times = measure(build, turns, steps)
        for name, values in times.items():
            of_plain = ratio(values, times["plain fit"])
            row = {
                "model": build.__name__,
                "variant": name,
                "ms_a_step": median(values),
                "ratio": of_plain["median"],
                "quartiles": of_plain["quartiles"],
                "target": target if name == "GradientNorms" else None,
            }
            results.append(row)
            table.add_row(*shown(row))
    show(table)
    if not arguments.quick:
        write_report(__file__, turns=turns, steps_a_turn=steps, results=results)


if __name__ == "__main__":
    main()
