"""What the scripts of this folder share: arguments, models, rules of verdicts, the record.

Run by itself it prints the table of README.md, made from results/*.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import keras
import numpy as np
from matplotlib.figure import Figure

from kerasgrad.remedies import Comparison
from kerasgrad.remedies.intervals import median_interval, wilson_interval
from kerasgrad.remedies.kept import fingerprint, versions

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"

AGREES = "agrees"
IN_DIRECTION = "agrees in direction"
DOES_NOT = "does not agree"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def median(cls, values: Sequence[float]) -> Estimate:
        """The median over runs, with its bootstrap interval."""
        return cls(statistics.median(values), *median_interval(values))

    @classmethod
    def share(cls, successes: int, runs: int) -> Estimate:
        """A success rate, with Wilson's interval."""
        return cls(successes / runs, *wilson_interval(successes, runs))

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Claim:
    """One row of the table: what a paper says, what was measured here, and whether they agree."""

    paper: str
    setting: str
    ours: str
    papers_number: str
    our_number: str
    verdict: str


class UntilSolved(keras.Sequential):
    """A model that trains until it has solved the problem, as solved(logs) of an epoch says."""

    def __init__(self, layers: Sequence[keras.Layer], solved: Callable[[dict], bool]):
        super().__init__(layers)
        self.solved = solved

    def fit(self, *args: Any, callbacks: Sequence = (), **options: Any) -> keras.callbacks.History:
        """As Keras's."""

        def on_epoch_end(epoch, logs):
            if self.solved(logs):
                self.stop_training = True

        until = keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end)
        return super().fit(*args, callbacks=[*callbacks, until], **options)


@keras.saving.register_keras_serializable(package="papers")
class ForgetBias(keras.initializers.Initializer):
    """The bias of Keras's LSTM: 0, but this number for the forget gate."""

    def __init__(self, bias):
        self.bias = bias

    def __call__(self, shape, dtype=None):
        bias = np.zeros(shape)
        units = shape[0] // 4  # In the order i, f, c, o.
        bias[units : 2 * units] = self.bias
        return keras.ops.convert_to_tensor(bias, dtype)

    def get_config(self):
        return {"bias": self.bias}


def larger(first: Estimate, second: Estimate) -> str:
    """The verdict on "the first is larger than the second".

    It agrees where their intervals lie apart, and in direction where only the numbers do.
    """
    if first.low > second.high:
        return AGREES
    return IN_DIRECTION if first.value > second.value else DOES_NOT


def no_larger(first: Estimate, second: Estimate) -> str:
    """The verdict on "the first is no larger than the second".

    It agrees where the number is no larger, and in direction where it is, but the intervals meet.
    """
    if first.value <= second.value:
        return AGREES
    return IN_DIRECTION if first.low <= second.high else DOES_NOT


class Script:
    """A script's arguments, and the record of its runs.

    Args:
        path: the script's __file__.
    """

    def __init__(self, path: str):
        self.name = Path(path).stem
        parser = argparse.ArgumentParser(description=f"{self.name}: see README.md of this folder.")
        parser.add_argument("--quick", action="store_true", help="a short form, for the tests")
        parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
        parser.add_argument("--out", type=Path, help="folder of the record, not results/")
        parser.add_argument("--runs", type=Path, help="folder of the finished runs, not runs/")
        given = parser.parse_args()
        self.quick: bool = given.quick
        self.jobs: int = 1 if given.quick else given.jobs
        # The short form leaves nothing behind that nobody asked for.
        self._out = given.out or (None if given.quick else RESULTS)
        runs = given.runs or (None if given.quick else FOLDER / "runs")
        self.runs = None if runs is None else runs / self.name
        self._begun = time.perf_counter()

    @property
    def keeping(self) -> dict[str, Any]:
        """The arguments of `compare` that keep finished runs and take up those that are kept."""
        return {"folder": self.runs, "resume": self.runs is not None, "jobs": self.jobs}

    def kept(self, train: Callable[..., dict], *arguments: Any) -> dict:
        """What train(*arguments) returns: from its file, or else trained and then kept."""
        if self.runs is None:
            return train(*arguments)
        path = self.runs / f"{fingerprint(train, arguments, versions())[:16]}.json"
        if not path.exists():
            found = json.dumps(train(*arguments))
            self.runs.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(found, encoding="utf-8")
            partial.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def trained(self, train: Callable[..., dict], calls: Sequence[tuple]) -> list[dict]:
        """What train returns for each call's arguments, as `kept` gives it, so many at a time."""
        os.environ["TF_NUM_INTRAOP_THREADS"] = "1"  # Of the processes that joblib starts.
        os.environ["TF_NUM_INTEROP_THREADS"] = "1"
        # One call at a time: after kept runs, which take no time, joblib would hand out several
        # trainings at once, and the other process might wait for them.
        return joblib.Parallel(n_jobs=self.jobs, batch_size=1)(
            joblib.delayed(self.kept)(train, *call) for call in calls
        )

    def finish(
        self,
        settings: dict,
        runs: Sequence[dict],
        claims: Sequence[Claim],
        figure: Figure | None = None,
    ) -> None:
        """Print the verdicts; write settings, versions, every run, the claims, and the figure."""
        print()
        for claim in claims:
            print(f"{claim.setting}: {claim.papers_number}")
            print(f"    ours ({claim.ours}): {claim.our_number}")
            print(f"    {claim.verdict}")
        if self._out is None:
            return
        record = {
            "script": self.name,
            "quick": self.quick,
            # Without those of runs that an earlier call had finished.
            "seconds_of_last_call": round(time.perf_counter() - self._begun),
            "versions": versions(),
            "settings": settings,
            "runs": list(runs),
            "claims": [asdict(claim) for claim in claims],
        }
        self._out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_strict(record), indent=1, ensure_ascii=False)
        (self._out / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")
        if figure is not None:
            figure.savefig(self._out / f"{self.name}.png", dpi=120)


def rows(comparison: Comparison, **added: Any) -> list[dict]:
    """Every run of a comparison as plain numbers, those that raised too."""
    found = []
    for row in comparison.rows():
        titles = [finding.title for finding in row["findings"]]
        found.append({**added, **row, "findings": titles})
    failed = [
        {**added, "remedy": run.remedy, "seed": run.seed, "error": run.error}
        for run in comparison.failed
    ]
    return found + failed


def table() -> str:
    """The rows of README.md, from the records in results/."""
    columns = ["paper", "setting", "ours", "the paper's number", "ours, with 95 % interval"]
    lines = ["| " + " | ".join([*columns, "verdict"]) + " |", "| " + " | ".join(["---"] * 6) + " |"]
    for path in sorted(RESULTS.glob("*.json")):
        for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]:
            paper, *others = claim.values()
            lines.append("| " + " | ".join([f"[{paper}]({path.stem}.py)", *others]) + " |")
    return "\n".join(lines)


def _strict(thing):
    """JSON has neither Inf nor NaN, nor the numbers of NumPy."""
    if isinstance(thing, dict):
        return {key: _strict(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_strict(value) for value in thing]
    if hasattr(thing, "item"):
        thing = thing.item()
    if isinstance(thing, float) and not math.isfinite(thing):
        return str(thing)
    return thing


if __name__ == "__main__":
    print(table())
