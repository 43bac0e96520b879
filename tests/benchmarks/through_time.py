"""How long kerasgrad.bptt takes, and how much memory, as sequences grow.

    python tests/benchmarks/through_time.py [--quick]

Prints a table and writes through_time.json beside this file. Each line is a process of its own, so
that its peak memory is its own; "exponent" is d ln(time) / d ln(T) between the shortest and the
longest sequence: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

FUNCTIONS = ("state_gradients", "step_contributions", "lyapunov_exponents", "jacobian_spectrum")
LAYERS = ("SimpleRNN", "LSTM", "GRU")


def measure(layer, function, timesteps, units, batch):
    """{seconds, peak_gigabytes} of one call, after one on a short sequence; of this process."""
    import keras
    import numpy as np

    from kerasgrad import bptt

    recurrent = getattr(keras.layers, layer)(units)
    model = keras.Sequential([keras.Input((None, 2)), recurrent, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(batch, timesteps, 2)).astype("float32"), np.zeros((batch, 1))
    targets = (y,) if function in ("state_gradients", "step_contributions") else ()
    getattr(bptt, function)(model, x[:, :2], *targets)
    start = time.perf_counter()
    getattr(bptt, function)(model, x, *targets)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_gigabytes": peak}


def in_its_own_process(*arguments):
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences, to see that it runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*json.loads(arguments.one))))
        return
    import math

    import keras
    import tensorflow as tf
    from rich.console import Console
    from rich.table import Table

    lengths = (10, 20) if arguments.quick else (250, 1000)
    layers = LAYERS[:1] if arguments.quick else LAYERS
    units, batch = (8, 4) if arguments.quick else (64, 32)
    table = Table("layer", "function", *(f"T = {T}" for T in lengths), "exponent", "peak memory")
    results = []
    for layer in layers:
        for function in FUNCTIONS:
            rows = [in_its_own_process(layer, function, T, units, batch) for T in lengths]
            seconds = [row["seconds"] for row in rows]
            exponent = math.log(seconds[-1] / seconds[0]) / math.log(lengths[-1] / lengths[0])
            peak = rows[-1]["peak_gigabytes"]
            results.append(
                {
                    "layer": layer,
                    "function": function,
                    "timesteps": lengths,
                    "seconds": seconds,
                    "exponent": exponent,
                    "peak_gigabytes": peak,
                }
            )
            shown = [f"{value:.2f} s" for value in seconds]
            table.add_row(layer, function, *shown, f"{exponent:.2f}", f"{peak:.2f} GB")
    Console().print(table)
    report = {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "cores": os.cpu_count(),
        "units": units,
        "batch": batch,
        "results": results,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
