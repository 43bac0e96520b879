"""How fast kerasgrad's recurrent layers are, beside Keras's and beside what the machine allows.

    python tests/benchmarks/layers.py [--quick] [--only TABLE ...]

Prints the tables and keeps them in layers.json beside this file (--quick leaves the file alone).
Where TensorFlow has a GPU, that is what is measured, and kept in layers_gpu.json: fewer shapes, and
beside Keras's layers as `fit` runs them there, SimpleRNN compiled by XLA and LSTM by cuDNN.

What is compared takes turns in one process, and a ratio is the median over the turns of (the one's
time) / (the other's time in the same turn). A turn is about 0.3 s of steps and counts with its
median step, so that what else the machine does in between weighs little.

    simple_rnn       SimpleRNN in `fit`, against the fastest of keras.layers.SimpleRNN's modes
    simplified_lstm  SimplifiedLSTM in `fit`, against the fastest of keras.layers.LSTM's modes
    recurrences      the recurrences alone, forward and backward, against a roofline
    scaling          a step of `fit` as the sequences grow
    first_step       tracing and compiling, and whether it happens again
    import           `import kerasgrad` against `import keras`
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time

from measuring import (
    answer,
    at_least,
    at_most,
    gpu_name,
    in_its_own_process,
    machine,
    median,
    quartiles,
    ratio,
    report_path,
    show,
)
from rich.table import Table

BATCH = 32
SECONDS_A_TURN = 0.3
UNROLL_LIMIT = 30.0  # seconds, to trace, compile and take the first step


# Timing


def step_times(model, x, y, steps):
    """Seconds of each of so many steps of one call of `fit`, without the first."""
    import keras

    class Clock(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.ends = []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())

    clock = Clock()
    count = (steps + 1) * BATCH
    rows = [row % len(x) for row in range(count)]
    model.fit(x[rows], y[rows], batch_size=BATCH, shuffle=False, verbose=0, callbacks=[clock])
    return [end - start for start, end in itertools.pairwise(clock.ends)]


def take_turns(variants, turns):
    """Seconds a step of each variant in each turn: {name: [turns]}.

    Args:
        variants: {name: function from a number of steps to the seconds of each}.
    """
    steps = {}
    for name, times in variants.items():
        times(2)  # traces and compiles
        steps[name] = max(2, round(SECONDS_A_TURN / median(times(3))))
    taken = {name: [] for name in variants}
    for _ in range(turns):
        for name, times in variants.items():
            taken[name].append(median(times(steps[name])))
    return taken


# Models in fit


def regression(layer, timesteps, features, **compile_options):
    """A compiled model of one recurrent layer, a function from steps to their seconds."""
    import keras
    import numpy as np

    model = keras.Sequential([keras.Input((timesteps, features)), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.001, clipnorm=1.0), "mse", **compile_options)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, timesteps, features)).astype("float32")
    y = rng.normal(size=(BATCH, 1)).astype("float32")
    return lambda steps: step_times(model, x, y, steps)


def keras_modes(kind, units, timesteps, features):
    """{mode: function that makes the model} of the ways to run Keras's layer."""
    import keras

    layer = getattr(keras.layers, kind)
    modes = {"default": lambda: regression(layer(units), timesteps, features)}
    if gpu_name():
        return modes
    modes["jit_compile"] = lambda: regression(layer(units), timesteps, features, jit_compile=True)
    if unrolls_in_time(kind, timesteps):
        modes["unroll"] = lambda: regression(layer(units, unroll=True), timesteps, features)
    return modes


UNROLLED: dict[tuple[str, int], float] = {}


def unrolls_in_time(kind, timesteps):
    """Whether the unrolled layer takes its first step in the time allowed.

    Found out in a process of its own; beyond the first length that does not, by proportion to the
    length, which the true time exceeds.
    """
    known = [(T, seconds) for (of, T), seconds in UNROLLED.items() if of == kind and timesteps >= T]
    if (kind, timesteps) not in UNROLLED:
        if any(seconds * timesteps / T > UNROLL_LIMIT for T, seconds in known):
            return False
        try:
            seconds = in_its_own_process("unrolled", kind, timesteps, timeout=3 * UNROLL_LIMIT)
        except subprocess.TimeoutExpired:
            seconds = 3 * UNROLL_LIMIT
        UNROLLED[kind, timesteps] = seconds
    return UNROLLED[kind, timesteps] <= UNROLL_LIMIT


def unrolled(kind, timesteps):
    import keras

    times = regression(getattr(keras.layers, kind)(32, unroll=True), timesteps, 2)
    start = time.perf_counter()
    times(1)
    return time.perf_counter() - start


def fastest_mode(modes):
    """(name, its function from steps to seconds, {mode: seconds a step}) by some steps of each."""
    made, seconds = {}, {}
    for mode, make in modes.items():
        made[mode] = make()
        made[mode](1)
        first = made[mode](1)[0]
        # Ten times slower under XLA is not rare: one step is enough to see that.
        slow = seconds and first > 2 * min(seconds.values())
        seconds[mode] = first if slow else median(made[mode](max(2, round(0.2 / first))))
    best = min(seconds, key=seconds.get)
    return best, made[best], seconds


def in_fit(kind, targets, quick, products=None):
    """Rows of a table of kerasgrad's layers in fit, against Keras's of this kind.

    The rest of the step is the same model with the last x_T in place of the recurrent layer: what
    `fit`, the dense layer and the optimizer take, whatever the layer. products(units, timesteps,
    features) times the matrix products that the layer needs, and nothing else of it.
    """
    import keras

    ours = layers_beside(kind)
    on_gpu = gpu_name() is not None
    grid, turns = (QUICK_GRID, 2) if quick else (GPU_GRID, 5) if on_gpu else (FIT_GRID, 9)
    for features, units, timesteps in grid:
        mode, times, by_mode = fastest_mode(keras_modes(kind, units, timesteps, features))
        no_loop = keras.layers.Lambda(lambda sequences: sequences[:, -1])
        variants = {"keras": times, "rest": regression(no_loop, timesteps, features)}
        for name, make in ours.items():
            variants[name] = regression(make(units), timesteps, features)
        if products is not None and not on_gpu:
            variants["products"] = products(units, timesteps, features)
        taken = take_turns(variants, turns)
        floor = None
        if "products" in variants:
            floor = [sum(both) for both in zip(taken["rest"], taken["products"], strict=True)]
        for name in ours:
            speedup = ratio(taken["keras"], taken[name])
            yield {
                "layer": name,
                "features": features,
                "units": units,
                "timesteps": timesteps,
                "ms_a_step": 1e3 * median(taken[name]),
                "keras_ms_a_step": 1e3 * median(taken["keras"]),
                "rest_ms_a_step": 1e3 * median(taken["rest"]),
                "rest_and_products_ms": 1e3 * median(floor) if floor else None,
                "keras_mode": mode,
                "keras_ms_by_mode": {name: 1e3 * value for name, value in by_mode.items()},
                "times_faster": speedup["median"],
                "quartiles": speedup["quartiles"],
                "target": None if on_gpu else targets(units, timesteps),
            }


# Features, units, timesteps.
FIT_GRID = list(itertools.product((2, 32), (32, 64, 128), (100, 400, 1600)))
GPU_GRID = [(32, 128, 400), (32, 128, 1600), (32, 512, 400)]
QUICK_GRID = [(2, 8, 10)]
FIT_COLUMNS = (
    "layer",
    "features",
    "units",
    "T",
    "ms a step",
    "rest of the step",
    "with the products",
    "Keras's",
    "mode",
    "times faster",
)


def fit_row(row):
    return (
        row["layer"],
        row["features"],
        row["units"],
        row["timesteps"],
        f"{row['ms_a_step']:.2f}",
        f"{row['rest_ms_a_step']:.2f}",
        "" if row["rest_and_products_ms"] is None else f"{row['rest_and_products_ms']:.2f}",
        f"{row['keras_ms_a_step']:.2f}",
        row["keras_mode"],
        at_least(row["times_faster"], row["quartiles"], row["target"]),
    )


def simple_rnn(quick):
    def target(units, timesteps):
        return (2.5 if units == 128 else 3.0) if timesteps >= 400 else 1.0

    yield from in_fit("SimpleRNN", target, quick)


def simplified_lstm(quick):
    def target(units, timesteps):
        return 10.0 if timesteps >= 1600 else 6.0 if timesteps >= 400 else 3.0

    yield from in_fit("LSTM", target, quick, gate_products)


def layers_beside(kind):
    """{name: units -> layer} of kerasgrad's that are compared with Keras's of this kind."""
    import kerasgrad as kg

    if kind == "SimpleRNN":
        return {"SimpleRNN": kg.layers.SimpleRNN}

    def make(activation):
        return lambda units: kg.layers.SimplifiedLSTM(units, activation, project_input=True)

    return {"SimplifiedLSTM": make(None), "SimplifiedLSTM, tanh": make("tanh")}


def gate_products(units, timesteps, features):
    """A function from steps to seconds of x K of three kernels, forward and backward, and of xᵀ κ.

    Of x with the constant input of the bias; both halves of the batch side by side, in the layer's
    chunks, in compiled loops that only add the results up.
    """
    import numpy as np
    import tensorflow as tf

    from kerasgrad.layers.loops import GATES_NUMBERS

    examples = BATCH // 2
    rows = max(1, GATES_NUMBERS // (examples * units)) * examples
    chunks = math.ceil(timesteps * examples / rows)
    rng = np.random.default_rng(0)
    *halves, K = (
        tf.constant(rng.normal(size=shape).astype("float32"))
        for shape in (2 * [(chunks, rows, features + 1)] + [(3, features + 1, units)])
    )

    @tf.function(jit_compile=True, autograph=False)
    def of_half(x, K):
        def loop(product, sums):
            def body(chunk, *sums):
                return chunk + 1, *(sum + product(x[chunk], k) for k, sum in enumerate(sums))

            return tf.while_loop(lambda chunk, *_: chunk < chunks, body, (0, *sums))[1:]

        def gates(x, k):
            return x @ K[k]

        z = loop(gates, loop(gates, [tf.zeros([rows, units])] * 3))
        return loop(
            lambda x, k: tf.matmul(x, z[k], transpose_a=True),
            [tf.zeros([features + 1, units])] * 3,
        )

    @tf.function(autograph=False)
    def both_halves(halves, K):
        return [of_half(x, K) for x in halves]

    return timed(lambda: both_halves(halves, K))


# The recurrences alone


def recurrences(quick):
    for units, timesteps in [(8, 10)] if quick else itertools.product((32, 64, 128), (400, 1600)):
        functions = recurrence_functions(units, timesteps)
        variants = {name: timed(function) for name, function in functions.items()}
        taken = take_turns(variants, turns=2 if quick else 15)
        loops = zip(taken["bare loop"], taken["product"], strict=True)
        rooflines = {
            "simple": [2 * loop + product for loop, product in loops],
            "gated": taken["elementwise"],
        }
        for name, roofline in rooflines.items():
            over = ratio(taken[name], roofline)
            yield {
                "recurrence": name,
                "units": units,
                "timesteps": timesteps,
                "ms": 1e3 * median(taken[name]),
                "roofline_ms": 1e3 * median(roofline),
                "times_the_roofline": over["median"],
                "quartiles": over["quartiles"],
                "target": 1.5 if units >= 64 else None,
            }


def recurrence_functions(units, timesteps, features=2):
    """Both recurrences, forward and backward from the last state, and what rooflines are made of.

    - bare loop: s ← tanh(s W), compiled, `timesteps` times; nothing is kept
    - product: one matrix product for ∂L/∂W of all steps
    - elementwise: what a gated recurrence reads and writes once its gates are given: forward z and
      f in, s out; backward g, s and f in, ∂L/∂z and ∂L/∂f out; compiled, all steps at once
    """
    import keras
    import numpy as np
    import tensorflow as tf

    from kerasgrad.layers.recurrence import gated_recurrence, simple_recurrence

    compiled = tf.function(jit_compile=True, autograph=False)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return tf.constant((rng.normal(size=shape) / shape[-1] ** 0.5).astype("float32"))

    x, s_0 = normal(BATCH, timesteps, features), normal(BATCH, units)
    U, W, kernels = normal(features, units), normal(units, units), [normal(features, units)] * 3
    steps = normal(timesteps, BATCH, units)

    @tf.function(autograph=False)
    def simple(x, s_0, U, W):
        with tf.GradientTape() as tape:
            tape.watch([s_0, U, W])
            last = simple_recurrence(
                x, s_0, U, W, activation=keras.activations.tanh, return_sequences=False
            )
        return tape.gradient(last, [s_0, U, W])

    @tf.function(autograph=False)
    def gated(x, s_0, kernels):
        with tf.GradientTape() as tape:
            tape.watch([s_0, kernels])
            last = gated_recurrence(
                x, s_0, kernels, activation=keras.activations.linear, return_sequences=False
            )
        return tape.gradient(last, [s_0, kernels])

    @compiled
    def bare_loop(s, W):
        return tf.while_loop(
            lambda t, _: t < timesteps, lambda t, s: (t + 1, tf.tanh(s @ W)), (0, s)
        )[1]

    @tf.function(autograph=False)
    def product(a, b):
        a, b = (tf.reshape(array, [-1, units]) for array in (a, b))
        return tf.matmul(a, b, transpose_a=True)

    @compiled
    def forward(z, f):
        return z * f

    @compiled
    def backward(g, s, f):
        return g * f, g * s

    return {
        "simple": lambda: simple(x, s_0, U, W),
        "bare loop": lambda: bare_loop(s_0, W),
        "product": lambda: product(steps, steps),
        "gated": lambda: gated(x, s_0, kernels),
        "elementwise": lambda: (forward(steps, steps), backward(steps, steps, steps)),
    }


def timed(function):
    def times(steps):
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return seconds

    return times


RECURRENCES_COLUMNS = ("recurrence", "units", "T", "ms", "roofline, ms", "times the roofline")


def recurrences_row(row):
    return (
        row["recurrence"],
        row["units"],
        row["timesteps"],
        f"{row['ms']:.2f}",
        f"{row['roofline_ms']:.2f}",
        at_most(row["times_the_roofline"], row["quartiles"], row["target"]),
    )


# Long sequences


def scaling(quick):
    import kerasgrad as kg

    layers = {
        "SimpleRNN": lambda units: kg.layers.SimpleRNN(units),
        "SimplifiedLSTM": lambda units: kg.layers.SimplifiedLSTM(units, project_input=True),
    }
    lengths = (10, 40) if quick else (100, 400, 1600, 6400, 25600)
    for (name, make), units in itertools.product(layers.items(), (8,) if quick else (16, 64)):
        # Lengths take turns, so that a busy minute does not bend the curve.
        variants = {T: regression(make(units), T, 2) for T in lengths}
        taken = take_turns(variants, turns=2 if quick else 5)
        seconds = [median(taken[T]) for T in lengths]
        exponents = [
            math.log(later / earlier) / math.log(T / before)
            for (before, earlier), (T, later) in itertools.pairwise(
                zip(lengths, seconds, strict=True)
            )
        ]
        yield {
            "layer": name,
            "units": units,
            "timesteps": lengths,
            "ms_a_step": [1e3 * value for value in seconds],
            "exponents": exponents,
            "exponent": math.log(seconds[-1] / seconds[0]) / math.log(lengths[-1] / lengths[0]),
            "target": 1.05,
        }
    for name, make in layers.items():
        T = 80 if quick else 65536
        seconds = regression(make(16), T, 2)(3)
        yield {"layer": name, "units": 16, "timesteps": [T], "ms_a_step": [1e3 * median(seconds)]}


SCALING_COLUMNS = ("layer", "units", "T", "ms a step", "exponent by length", "exponent")


def scaling_row(row):
    trains = "target" not in row
    return (
        row["layer"],
        row["units"],
        ", ".join(map(str, row["timesteps"])),
        ", ".join(f"{value:.1f}" for value in row["ms_a_step"]),
        "" if trains else ", ".join(f"{value:.2f}" for value in row["exponents"]),
        "trains" if trains else at_most(row["exponent"], None, row["target"]),
    )


# The first step


def first_step(quick):
    lengths = (10,) if quick else (100, 1600) if gpu_name() else (100, 1600, 25600)
    for kind, T in itertools.product(("SimpleRNN", "SimplifiedLSTM"), lengths):
        ours = in_its_own_process("first_steps", "kerasgrad", kind, T)
        keras_kind = {"SimplifiedLSTM": "LSTM"}.get(kind, kind)
        theirs = in_its_own_process("first_steps", "keras", keras_kind, T)
        yield {
            "layer": kind,
            "timesteps": T,
            **ours,
            "keras_seconds": theirs["seconds"],
            "target": 3.0,
        }


def first_steps(package, kind, timesteps):
    """Seconds to the end of the first step, and how often a train step was traced after it."""
    import importlib

    import keras
    import numpy as np

    layers = importlib.import_module(f"{package}.layers")
    options = {"project_input": True} if kind == "SimplifiedLSTM" else {}
    layer = getattr(layers, kind)(32, **options)
    model = keras.Sequential([keras.Input((timesteps, 2)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    # Two batches, the second smaller.
    x, y = np.zeros((BATCH + 5, timesteps, 2), "float32"), np.zeros((BATCH + 5, 1), "float32")
    ends = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
    )
    start = time.perf_counter()
    model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[clock])
    traces = [count_traces()]
    model.fit(x, y, batch_size=BATCH, verbose=0, epochs=3, callbacks=[clock])
    traces.append(count_traces())
    return {
        "seconds": ends[0] - start,
        "smaller_batch_seconds": ends[1] - ends[0],
        "smaller_batch_again_seconds": ends[-1] - ends[-2],
        "traces_after_1_and_4_epochs": traces,
    }


def count_traces():
    """Of all the compiled functions of the recurrences."""
    from kerasgrad.layers import explicit_gradient, recurrence

    things = [*vars(recurrence).values(), *vars(explicit_gradient).values()]
    functions = [f for f in things if hasattr(f, "experimental_get_tracing_count")]
    return sum(function.experimental_get_tracing_count() for function in functions)


FIRST_STEP_COLUMNS = (
    "layer",
    "T",
    "first step, s",
    "Keras's, s",
    "first smaller batch, s",
    "the same again, s",
    "traces after 1 and 4 epochs",
)


def first_step_row(row):
    return (
        row["layer"],
        row["timesteps"],
        at_most(row["seconds"], None, row["target"]),
        f"{row['keras_seconds']:.2f}",
        f"{row['smaller_batch_seconds']:.2f}",
        f"{row['smaller_batch_again_seconds']:.3f}",
        "{} and {}".format(*row["traces_after_1_and_4_epochs"]),
    )


# The import


IMPORTS = """
import time
start = time.perf_counter()
import keras, tensorflow
middle = time.perf_counter()
import kerasgrad
print(middle - start, time.perf_counter() - middle)
"""


def import_time(quick):
    # One after the other in the same process: those of two processes differ by more than kerasgrad.
    taken = []
    for _ in range(1 if quick else 9):
        done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, check=True)
        taken.append([float(seconds) for seconds in done.stdout.split()])
    of_keras, more = zip(*taken, strict=True)
    low, middle, high = quartiles(more)
    yield {
        "keras_seconds": median(of_keras),
        "more_seconds": middle,
        "quartiles": [low, high],
        "target": 0.2,
    }


IMPORT_COLUMNS = ("import keras, tensorflow, s", "and then import kerasgrad, s")


def import_row(row):
    return (
        f"{row['keras_seconds']:.2f}",
        at_most(row["more_seconds"], row["quartiles"], row["target"]),
    )


# Tables

TABLES = {
    "simple_rnn": (simple_rnn, FIT_COLUMNS, fit_row),
    "simplified_lstm": (simplified_lstm, FIT_COLUMNS, fit_row),
    "recurrences": (recurrences, RECURRENCES_COLUMNS, recurrences_row),
    "scaling": (scaling, SCALING_COLUMNS, scaling_row),
    "first_step": (first_step, FIRST_STEP_COLUMNS, first_step_row),
    "import": (import_time, IMPORT_COLUMNS, import_row),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=TABLES, help="by default all of them")
    arguments = parser.parse_args()
    path = report_path(__file__, on_gpu=gpu_name() is not None)
    for name in arguments.only or TABLES:
        rows_of, columns, row = TABLES[name]
        start = time.perf_counter()
        rows = list(rows_of(arguments.quick))
        table = Table(*columns, title=name)
        for values in rows:
            table.add_row(*map(str, row(values)))
        show(table)
        if arguments.quick:
            continue
        report = json.loads(path.read_text()) if path.exists() else {}
        report[name] = machine() | {
            "batch": BATCH,
            "minutes": round((time.perf_counter() - start) / 60, 1),
            "rows": rows,
        }
        path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    answer([first_steps, unrolled])
    main()
