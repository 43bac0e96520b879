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
from kerasgrad.remedies import (
    DEFAULT_REMEDIES,
    REMEDIES,
    Comparison,
    Settings,
    Study,
    by_name,
    seeds_of,
)
from kerasgrad.tasks import TASKS, make_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done; 1: a training failed, and the others are told of; 2: bad input, told in one line on
    standard error; 130: interrupted, and what had finished is kept.
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
        help=f"any of {', '.join(REMEDIES)}; several as one: relu+global_clipnorm",
    )
    compare.add_argument("--seeds", type=int, default=1, help="number of trainings of each remedy")
    compare.add_argument(
        "--jobs", type=int, default=1, help="trainings at a time; -1 for one on each core"
    )
    compare.add_argument(
        "--resume",
        action="store_true",
        help="go on with the runs that an earlier command kept in the folder",
    )
    compare.add_argument(
        "--out", type=Path, default=Path("kerasgrad-compare"), help="folder for the results"
    )
    rates = compare.add_mutually_exclusive_group()
    rates.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=(),
        metavar="RATE",
        help="to choose from for each remedy, on validation data",
    )
    for setting in fields(Settings):
        group = rates if setting.name == "learning_rate" else compare
        group.add_argument(
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
    settings = {setting.name: getattr(options, setting.name) for setting in fields(Settings)}
    samples = {} if options.task == "digits" else {"samples": 4000}
    study = Study(
        make_task(options.task, timesteps=options.timesteps, **samples),
        by_name(options.remedies),
        Settings(**settings),
        seeds=seeds_of(options.seeds),
        learning_rates=options.learning_rates,
        jobs=options.jobs,
        folder=options.out,
        resume=options.resume,
    )
    _check_writable(options.out)
    comparison = Comparison.of(study)
    status = 0
    try:
        for run in study.run():
            comparison.add(run)
    except KeyboardInterrupt:
        print(
            f"kerasgrad: interrupted; {len(comparison.runs)} of {len(study.plan)} runs finished "
            f"and are kept in {options.out / 'runs'}; the same command with --resume goes on",
            file=sys.stderr,
        )
        status = 130
    comparison.sort(study.plan)
    for run in comparison.failed:
        print(
            f"kerasgrad: error: {run.remedy}, seed {run.seed}, learning rate "
            f"{run.learning_rate:g} failed: {run.error}",
            file=sys.stderr,
        )
        status = status or 1
    if comparison.runs:
        _show(comparison, options.out)
    return status


def _show(comparison: Comparison, folder: Path) -> None:
    comparison.save(folder)  # First, as whoever reads what is printed may stop reading.
    console = Console()
    console.print(comparison.table())
    if len(comparison.runs) == len(comparison.summary()):
        for row in comparison.rows():
            for finding in row["findings"]:
                console.print(f"{row['remedy']}: {finding}", highlight=False)
    print(f"Records and figures: {folder}")


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
