"""Peak memory of a train step of kerasgrad's recurrent layers, beside Keras's.

    python tests/benchmarks/memory.py [--quick]

Prints a table and writes memory.json beside this file (--quick leaves the file alone). A process
takes a step, so that all is traced and compiled, gives back what is free (malloc_trim), resets
Linux's record of its peak memory (/proc/self/clear_refs), takes three more steps, and reports the
peak (VmHWM). A figure is this peak minus that of a process with sequences of SHORT steps: what the
length of the sequences costs, without the code that both have.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

from measuring import answer, at_most, in_its_own_process, median, show, write_report
from rich.table import Table

BATCH, FEATURES = 32, 2

# (ours, Keras's); half of Keras's is the target.
PAIRS = [
    ("kerasgrad SimpleRNN", "keras SimpleRNN"),
    ("kerasgrad SimplifiedLSTM", "keras LSTM"),
    ("kerasgrad SimplifiedLSTM, tanh", "keras LSTM"),
]
TARGET = 0.5
SHORT = 10


def make(layer, units, sequences):
    import keras

    import kerasgrad as kg

    options = {"return_sequences": sequences}
    return {
        "kerasgrad SimpleRNN": lambda: kg.layers.SimpleRNN(units, **options),
        "kerasgrad SimplifiedLSTM": lambda: kg.layers.SimplifiedLSTM(
            units, project_input=True, **options
        ),
        "kerasgrad SimplifiedLSTM, tanh": lambda: kg.layers.SimplifiedLSTM(
            units, "tanh", project_input=True, **options
        ),
        "keras SimpleRNN": lambda: keras.layers.SimpleRNN(units, **options),
        "keras LSTM": lambda: keras.layers.LSTM(units, **options),
    }[layer]()


def measure(layer, units, timesteps, sequences):
    """Megabytes that the process has in use at the peak of a step."""
    import keras
    import numpy as np

    model = keras.Sequential([keras.Input((timesteps, FEATURES)), make(layer, units, sequences)])
    if sequences:
        model.add(keras.layers.GlobalAveragePooling1D())
    model.add(keras.layers.Dense(1))
    model.compile(keras.optimizers.SGD(0.001), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, timesteps, FEATURES)).astype("float32")
    y = rng.normal(size=(BATCH, 1)).astype("float32")
    model.train_on_batch(x, y)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        model.train_on_batch(x, y)
    return memory("VmHWM")


def memory(name):
    """A line of /proc/self/status, in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}: this benchmark needs Linux.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences, to see that it runs")
    arguments = parser.parse_args()
    units, timesteps, runs = (8, 20, 1) if arguments.quick else (128, 1600, 3)
    table = Table(*COLUMNS)
    results = []
    pairs, outputs = (PAIRS[:1], (False,)) if arguments.quick else (PAIRS, (False, True))
    for sequences in outputs:
        peaks = {
            layer: [
                in_its_own_process("measure", layer, units, timesteps, sequences)
                - in_its_own_process("measure", layer, units, SHORT, sequences)
                for _ in range(runs)
            ]
            for layer in {name: None for pair in pairs for name in pair}
        }
        for ours, theirs in pairs:
            one, other = median(peaks[ours]), median(peaks[theirs])
            row = {
                "layer": ours,
                "against": theirs,
                "return_sequences": sequences,
                "megabytes": one,
                "runs": peaks[ours],
                "keras_megabytes": other,
                "keras_runs": peaks[theirs],
                "ratio": one / other,
                "target": TARGET,
            }
            results.append(row)
            table.add_row(*shown(row))
    show(table)
    if not arguments.quick:
        write_report(
            __file__,
            batch=BATCH,
            features=FEATURES,
            units=units,
            timesteps=timesteps,
            results=results,
        )


COLUMNS = ("layer", "output", "MB (least to largest)", "Keras's MB (least to largest)", "ratio")


def shown(row):
    """The cells of a row."""
    return (
        row["layer"],
        "every step" if row["return_sequences"] else "last step",
        spread(row["runs"]),
        spread(row["keras_runs"]),
        at_most(row["ratio"], None, row["target"]),
    )


def spread(values):
    middle = sorted(values)[len(values) // 2]
    return f"{middle:.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    answer([measure])
    main()
