"""What the benchmarks share: ratios of what took turns, processes of their own, tables, reports."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def median(values: Sequence[float]) -> float:
    return quartiles(values)[1]


def quartiles(values: Sequence[float]) -> list[float]:
    import numpy as np

    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """{median, quartiles} of the ratio in the same turn."""
    low, middle, high = quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])
    return {"median": middle, "quartiles": [low, high]}


def at_least(
    value: float, spread: Sequence[float] | None, target: float | None, digits: int = 2
) -> str:
    """The value for a table, marked where it is below its target."""
    return _shown(value, spread, target, target is None or value >= target, digits)


def at_most(
    value: float, spread: Sequence[float] | None, target: float | None, digits: int = 2
) -> str:
    """The value for a table, marked where it is above its target."""
    return _shown(value, spread, target, target is None or value <= target, digits)


def _shown(value, spread, target, reached, digits):
    text = f"{value:.{digits}f}"
    if spread is not None:
        low, high = spread
        text += f" ({low:.{digits}f} to {high:.{digits}f})"
    return text if reached else f"{text}, not {target:g}"


def in_its_own_process(*arguments: Any, timeout: float | None = None) -> Any:
    """What `answer` gives for these arguments in a new process of the same script."""
    done = subprocess.run(
        [sys.executable, sys.argv[0], "--one", json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout,
    )
    return json.loads(done.stdout.splitlines()[-1])


def answer(functions: Sequence[Callable[..., Any]]) -> None:
    """In such a process: print what the function of that name returns, as JSON, and end."""
    if "--one" in sys.argv:
        name, *arguments = json.loads(sys.argv[-1])
        named = {function.__name__: function for function in functions}
        print(json.dumps(named[name](*arguments)))
        sys.exit()


def show(table: Any) -> None:
    """Print a rich table; in a file, where nothing tells the width, wide enough for all of them."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)


def gpu_name() -> str | None:
    """The GPU that TensorFlow runs on, if there is one."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else None


def machine() -> dict[str, Any]:
    """What the figures of a report were measured on."""
    import keras
    import tensorflow as tf

    return {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "cores": os.cpu_count(),
        "gpu": gpu_name(),
    }


def report_path(script: str, on_gpu: bool) -> Path:
    """Where the figures of a benchmark are kept: a .json beside its file, and one of a GPU's."""
    path = Path(script)
    return path.with_name(f"{path.stem}_gpu.json" if on_gpu else f"{path.stem}.json")


def write_report(script: str, **contents: Any) -> None:
    """Keep the figures of a benchmark, with what they were measured on."""
    path = report_path(script, on_gpu=gpu_name() is not None)
    path.write_text(json.dumps(machine() | contents, indent=2) + "\n")
