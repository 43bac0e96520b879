"""The command line: kerasgrad compare, kerasgrad diagnose."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from kerasgrad.diagnosis import PRESETS, diagnose
from kerasgrad.history import GradientHistory
from kerasgrad.remedies import DEFAULT_REMEDIES, REMEDIES, Comparison, Settings, iterate_runs
from kerasgrad.tasks import TASKS, make_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done; 2: bad input, told in one line on standard error; 130: interrupted, and what had
    finished is kept.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"kerasgrad: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kerasgrad", description="Why does my recurrent network not learn, and what mends it?"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="train one network for each remedy on a task, and show what each remedy does",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compare.set_defaults(command=_compare)
    compare.add_argument("--task", default="adding", help=f"one of {', '.join(TASKS)}")
    compare.add_argument(
        "--timesteps", type=int, help="length of the sequences (default: 100; digits have 64)"
    )
    compare.add_argument(
        "--remedies",
        nargs="+",
        default=list(DEFAULT_REMEDIES),
        metavar="REMEDY",
        help=f"any of {', '.join(REMEDIES)}",
    )
    compare.add_argument("--seeds", type=int, default=1, help="number of trainings of each remedy")
    compare.add_argument(
        "--out", type=Path, default=Path("kerasgrad-compare"), help="folder for the results"
    )
    for setting in fields(Settings):
        compare.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=type(setting.default),
            default=setting.default,
            help="of every training",
        )
    record = commands.add_parser(
        "diagnose", help="say what is wrong in a training, from its record"
    )
    record.set_defaults(command=_diagnose)
    record.add_argument("record", type=Path, help="a .npz file of GradientHistory.save")
    record.add_argument(
        "--preset",
        choices=PRESETS,
        default="kerasgrad",
        help="whose thresholds: kerasgrad's, Amazon SageMaker Debugger's, AutoTrainer's "
        "(default: kerasgrad)",
    )
    return parser


def _diagnose(options: argparse.Namespace) -> int:
    print(diagnose(GradientHistory.load(options.record), preset=options.preset))
    return 0


def _compare(options: argparse.Namespace) -> int:
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1. Received: {options.seeds}.")
    settings = Settings(
        **{setting.name: getattr(options, setting.name) for setting in fields(Settings)}
    )
    samples = {} if options.task == "digits" else {"samples": 4000}
    task = make_task(options.task, timesteps=options.timesteps, **samples)
    runs = iterate_runs(task, options.remedies, settings, range(options.seeds))
    _check_writable(options.out)
    comparison = Comparison(task, settings)
    status = 0
    try:
        for run in runs:
            comparison.runs.append(run)
    except KeyboardInterrupt:
        finished = ", ".join(run.remedy for run in comparison.runs) or "none"
        print(f"kerasgrad: interrupted; remedies that finished: {finished}", file=sys.stderr)
        status = 130
    if comparison.runs:
        console = Console()
        console.print(comparison.table())
        for row in comparison.rows():
            for finding in row["findings"]:
                console.print(f"{row['remedy']}: {finding}", highlight=False)
        comparison.save(options.out)
        print(f"Records and figures: {options.out}")
    return status


def _check_writable(folder: Path) -> None:
    """Find out before an hour of training that its results cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"cannot write into the folder {folder} ({error.strerror}). "
            "Pass another one with --out."
        ) from error
