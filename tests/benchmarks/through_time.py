"""How long kerasgrad.bptt takes, and how much memory, as sequences grow.

    python tests/benchmarks/through_time.py [--quick]

Prints a table and writes through_time.json beside this file (--quick leaves the file alone). Each
line is a process of its own, so that its peak memory is its own; "exponent" is
d ln(time) / d ln(T) between the shortest and the longest sequence: 1 is linear.
"""

from __future__ import annotations

import argparse
import math
import resource
import time

from measuring import answer, in_its_own_process, show, write_report
from rich.table import Table

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences, to see that it runs")
    arguments = parser.parse_args()
    lengths = (10, 20) if arguments.quick else (250, 1000)
    layers = LAYERS[:1] if arguments.quick else LAYERS
    units, batch = (8, 4) if arguments.quick else (64, 32)
    table = Table("layer", "function", *(f"T = {T}" for T in lengths), "exponent", "peak memory")
    results = []
    for layer in layers:
        for function in FUNCTIONS:
            rows = [
                in_its_own_process("measure", layer, function, T, units, batch) for T in lengths
            ]
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
    show(table)
    if not arguments.quick:
        write_report(__file__, units=units, batch=batch, results=results)


if __name__ == "__main__":
    answer([measure])
    main()
