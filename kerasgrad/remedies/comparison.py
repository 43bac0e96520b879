"""Comparison: the runs of a study, the learning rate chosen for each remedy, and the tables."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from kerasgrad.diagnosis import diagnose
from kerasgrad.history import GradientHistory
from kerasgrad.remedies.intervals import median_interval, wilson_interval
from kerasgrad.remedies.remedy import CLIPPINGS, Remedy
from kerasgrad.remedies.study import PlannedRun, Study
from kerasgrad.remedies.training import DIVERGED_TIMES, FailedRun, Run, Settings
from kerasgrad.tasks import Task

_CLIPS_WHAT = {
    "global_clipnorm": "the whole gradient",
    "clipvalue": "each entry of the gradient",
}

# What the columns of the summary hold; `report.html` and the table say it to the reader.
COLUMNS = {
    "learning rate": "of those tried, the one with the least median validation loss over the "
    "seeds; diverged and failed runs count as Inf",
    "test loss": "at the end, on sequences that no choice saw: median over the seeds, 95 % "
    "bootstrap interval; a diverged run counts as Inf",
    "accuracy": "on the test data at the end, median over the seeds",
    "solved": "share of the runs whose test loss was below the task's threshold at the end of some "
    "epoch, 95 % Wilson interval",
    "steps to solve": "optimizer steps until then, median over the runs that solved the task",
    "reach": "‖∂L/∂s_1‖/‖∂L/∂s_T‖, median of a run's last 100 steps, median over the seeds",
    "clipped": "share of the updates that clipping changed, median over the seeds",
    "ms/step": "time of a training step, GradientNorms included: median of a run's steps, median "
    "over the seeds; trainings side by side slow each other down",
    "diverged": "runs with a NaN or Inf loss, or whose last batch's loss was more than "
    f"{DIVERGED_TIMES} times the first one's; failed: runs that raised",
}


# The headers where there are 80 columns for all.
_NARROW = {
    "learning rate": "rate",
    "steps to solve": "steps\nto\nsolve",
    "clipped": "clip-\nped",
    "ms/step": "ms/\nstep",
    "diverged": "di-\nverged",
}


@dataclass
class Comparison:
    """What `compare` returns: the runs, and how to read them.

    - task, settings: what all runs have in common
    - runs: those that ended, diverged ones too
    - failed: those that raised
    - remedies: {name: Remedy}
    - learning_rates: those that were tried; empty where there was no choice
    """

    task: Task
    settings: Settings
    runs: list[Run] = field(default_factory=list)
    failed: list[FailedRun] = field(default_factory=list)
    remedies: Mapping[str, Remedy] = field(default_factory=dict)
    learning_rates: Sequence[float] = ()

    @classmethod
    def of(cls, study: Study) -> Comparison:
        """The comparison of a study, without its runs yet."""
        return cls(
            study.task,
            replace(study.settings, learning_rate=study.tried[0]),
            remedies=study.remedies,
            learning_rates=study.tried if len(study.tried) > 1 else (),
        )

    def add(self, run: Run | FailedRun) -> None:
        """Put a run where it belongs."""
        (self.runs if isinstance(run, Run) else self.failed).append(run)

    def sort(self, plan: Sequence[PlannedRun]) -> None:
        """Put the runs, which end in any order, into that of the plan."""
        place = {planned: i for i, planned in enumerate(plan)}
        for runs in (self.runs, self.failed):
            runs.sort(key=lambda run: place[PlannedRun(run.remedy, run.seed, run.learning_rate)])

    @property
    def histories(self) -> dict[tuple[str, int], GradientHistory]:
        """{(remedy, seed): record}, at the learning rate that was chosen."""
        return {(run.remedy, run.seed): run.history for run in self.chosen_runs}

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return list(dict.fromkeys(run.seed for run in [*self.runs, *self.failed]))

    @property
    def chosen_learning_rates(self) -> dict[str, float]:
        """{remedy: the learning rate with the least median validation loss over its seeds}.

        A run that diverged or failed counts as Inf, and of equals the smallest is chosen. No test
        sequence plays a part. Where one learning rate was tried, it is that one.
        """
        chosen = {}
        for name in dict.fromkeys(run.remedy for run in [*self.runs, *self.failed]):
            losses = self.validation_losses(name)
            chosen[name] = min(sorted(losses), key=lambda rate: np.median(losses[rate]))
        return chosen

    def validation_losses(self, remedy: str) -> dict[float, list[float]]:
        """{learning rate: validation loss at the end of each run}; Inf for diverged and failed."""
        losses: dict[float, list[float]] = {}
        for run in [*self.runs, *self.failed]:
            if run.remedy == remedy:
                loss = getattr(run, "validation_loss", None)
                finite = isinstance(run, Run) and not run.diverged and loss is not None
                is_number = finite and np.isfinite(loss)
                losses.setdefault(run.learning_rate, []).append(loss if is_number else np.inf)
        return losses

    @property
    def chosen_runs(self) -> list[Run]:
        """The runs at the learning rates that were chosen."""
        if not self.learning_rates:
            return self.runs
        chosen = self.chosen_learning_rates
        return [run for run in self.runs if run.learning_rate == chosen[run.remedy]]

    def rows(self) -> list[dict[str, Any]]:
        """One row a run, as numbers and `Finding`s: what `comparison.csv` holds."""
        task, chosen = self.task, self.chosen_learning_rates
        return [
            {
                "remedy": run.remedy,
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "chosen": run.learning_rate == chosen[run.remedy] or not self.learning_rates,
                "steps": len(run.history),
                "validation_loss": run.validation_loss,
                "test_loss": run.final_loss,
                "constant_loss": task.constant_loss,
                "test_accuracy": run.test_accuracies[-1] if run.test_accuracies else np.nan,
                "solved": run.solved_at(task.solved_below) is not None,
                "solved_at_step": run.solved_at(task.solved_below),
                "diverged": run.diverged,
                "largest_norm_before_clipping": _largest(run.history.global_norm),
                "clip_rate": run.history.clip_rate,
                "reach": run.reach,
                "seconds_per_step": run.seconds_per_step,
                "findings": diagnose(run.history),
            }
            for run in self.runs
        ]

    def summary(self) -> list[dict[str, Any]]:
        """One row a remedy, over its seeds at the chosen learning rate: what `summary.csv` holds.

        `COLUMNS` says how each number is made. Intervals are NaN where there is one run.
        """
        chosen, solved_below = self.chosen_learning_rates, self.task.solved_below
        rows = []
        for name, rate in chosen.items():
            runs = [run for run in self.chosen_runs if run.remedy == name]
            losses = [run.ranked_loss for run in runs]
            low, high = median_interval(losses)
            solved = [run.solved_at(solved_below) for run in runs]
            solved = [step for step in solved if step is not None]
            rate_low, rate_high = wilson_interval(len(solved), len(runs))
            rows.append(
                {
                    "remedy": name,
                    "learning_rate": rate,
                    "runs": len(runs),
                    "diverged": sum(run.diverged for run in runs),
                    "failed": sum(
                        run.remedy == name and run.learning_rate == rate for run in self.failed
                    ),
                    "test_loss": _median(losses),
                    "test_loss_low": low,
                    "test_loss_high": high,
                    "test_accuracy": _median(
                        [run.test_accuracies[-1] for run in runs if run.test_accuracies]
                    ),
                    "solved": len(solved),
                    "success_rate": len(solved) / len(runs) if runs else np.nan,
                    "success_rate_low": rate_low,
                    "success_rate_high": rate_high,
                    "steps_to_solve": _median(solved),
                    "reach": _median([run.reach for run in runs if np.isfinite(run.reach)]),
                    "clip_rate": _median([run.history.clip_rate for run in runs]),
                    "seconds_per_step": _median(
                        [run.seconds_per_step for run in runs if np.isfinite(run.seconds_per_step)]
                    ),
                }
            )
        return rows

    def summary_cells(self) -> tuple[list[str], list[list[str]]]:
        """The headers and the cells of `summary`, as text for a table of any kind."""
        headers = ["remedy", "learning rate", *list(COLUMNS)[1:]]
        hidden = set()
        if not self.learning_rates:
            hidden.add("learning rate")
        if self.task.loss == "mse":
            hidden.add("accuracy")
        rows = []
        for row in self.summary():
            failed = f", {row['failed']} failed" if row["failed"] else ""
            rows.append(
                {
                    "remedy": row["remedy"],
                    "learning rate": f"{row['learning_rate']:g}",
                    "test loss": _with_interval(row, "test_loss", "{:.3g}"),
                    "accuracy": _number(row["test_accuracy"], "{:.1%}"),
                    "solved": f"{row['solved']}/{row['runs']}"
                    + _interval(row, "success_rate", "{:.2f}"),
                    "steps to solve": _number(row["steps_to_solve"], "{:.0f}"),
                    "reach": _number(row["reach"], "{:.0e}"),
                    "clipped": _number(row["clip_rate"], "{:.0%}"),
                    "ms/step": _number(1000 * row["seconds_per_step"], "{:.1f}"),
                    "diverged": f"{row['diverged']}{failed}",
                }
            )
        shown = [header for header in headers if header not in hidden]
        return shown, [[row[header] for header in shown] for row in rows]

    def heading(self) -> str:
        """The task, the settings, and when it counts as solved."""
        task = self.task
        learning = str(self.settings)
        if self.learning_rates:
            rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
            learning = learning.replace(
                f"learning_rate={self.settings.learning_rate:g}", f"learning_rate of {rates}"
            )
        used = {remedy.clipping for remedy in self.remedies.values()}
        for name in CLIPPINGS:
            if name in used and name in _CLIPS_WHAT:
                learning += f"; {name}={getattr(self.settings, name):g} ({_CLIPS_WHAT[name]})"
        return (
            f"{task.name}, T = {task.timesteps}, {task.samples} sequences: {learning}\n"
            f"solved: held-out loss ({task.loss}) below {task.solved_below:.3g}; the best "
            f"constant answer has {task.constant_loss:.4g}"
        )

    def table(self) -> Table:
        """The comparison as a rich table: `rich.print(result.table())`.

        One row a run where there is one seed and one learning rate, else one row a remedy.
        """
        if len(self.seeds) > 1 or self.learning_rates:
            return self._table_of_remedies()
        return self._table_of_runs()

    def _table_of_remedies(self):
        headers, rows = self.summary_cells()
        seeds = len(self.seeds)
        searched = (
            " rate: the learning rate, chosen for each remedy by its median validation loss;"
            if self.learning_rates
            else ""
        )
        table = _new_table(
            self.heading(),
            f"medians over {seeds} seed{'s' * (seeds > 1)};{searched} below them: 95 % intervals, "
            "of the median by bootstrap, of the share of solved runs after Wilson; reach: "
            "‖∂L/∂s_1‖/‖∂L/∂s_T‖; all losses are of test data that no choice saw",
        )
        table.collapse_padding = True
        for header in headers:
            table.add_column(_NARROW.get(header, header), justify="right", no_wrap=True)
        table.columns[0].justify = "left"
        for name, *cells in rows:
            table.add_row(escape(name), *(escape(_narrow(cell)) for cell in cells))
        return table

    def _table_of_runs(self):
        classification = self.task.loss != "mse"
        table = _new_table(
            self.heading(),
            "largest norm: of the whole gradient, before clipping; reach: ‖∂L/∂s_1‖/‖∂L/∂s_T‖, "
            "median of the last 100 steps",
        )
        table.add_column("remedy", no_wrap=True)
        table.add_column("held-out\nloss", justify="right", no_wrap=True)
        if classification:
            table.add_column("accuracy", justify="right", no_wrap=True)
        table.add_column("solved\nat step", justify="right", no_wrap=True)
        table.add_column("largest\nnorm", justify="right", no_wrap=True)
        table.add_column("steps\nclipped", justify="right", no_wrap=True)
        table.add_column("reach", justify="right", no_wrap=True)
        table.add_column("what went wrong")
        for row in self.rows():
            text = run_cells(row)
            cells = [
                escape(row["remedy"]),  # One's own name may have brackets: rich's markup.
                text["test loss"],
                text["solved at step"],
                f"{row['largest_norm_before_clipping']:.2g}",
                text["clipped"],
                text["reach"],
                "\n".join(text["findings"]),
            ]
            if classification:
                cells.insert(2, f"{row['test_accuracy']:.1%}")
            table.add_row(*cells)
        for run in self.failed:
            blank = [""] * (len(table.columns) - 2)
            table.add_row(escape(run.remedy), *blank, f"failed: {escape(run.error)}")
        return table

    def markdown(self) -> str:
        """The summary as a Markdown table, with its heading and what its columns are."""
        headers, rows = self.summary_cells()
        lines = [self.heading().replace("\n", "  \n"), ""]
        for row in [headers, ["---"] * len(headers), *rows]:
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        lines += ["", *(f"- **{name}**: {COLUMNS[name]}" for name in headers if name in COLUMNS)]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | os.PathLike) -> None:
        """Write the results into a folder: tables, records, figures, and a report of all of them.

        - report.html: by itself, for a browser
        - summary.csv, summary.md: one row a remedy; comparison.csv: one row a run
        - <remedy>.npz: the record of each run at the chosen learning rate; <remedy>-seed<k>.npz
          with several seeds
        - loss.png, gradient_norms.png, state_norms.png: of the first seed; and with several seeds
          or learning rates test_loss.png, final_loss.png, learning_rates.png
        """
        # Matplotlib is slow to import.
        from kerasgrad.remedies.report import draw, report

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        several_seeds = len(self.seeds) > 1
        for run in self.chosen_runs:
            seed = f"-seed{run.seed}" if several_seeds else ""
            name = re.sub(r'[<>:"/\\|?*]', "_", run.remedy)  # No file has these in its name.
            run.history.save(folder / f"{name}{seed}.npz")
        if not self.runs:
            return
        rows = [row | {"findings": "; ".join(map(str, row["findings"]))} for row in self.rows()]
        _write_csv(folder / "comparison.csv", rows)
        _write_csv(folder / "summary.csv", self.summary())
        (folder / "summary.md").write_text(self.markdown(), encoding="utf-8")
        figures = draw(self)
        for name, picture in figures.items():
            (folder / f"{name}.png").write_bytes(picture)
        (folder / "report.html").write_text(report(self, figures), encoding="utf-8")


def run_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a table of runs says of a row of `Comparison.rows`, as text; of findings a list."""
    return {
        "test loss": f"{row['test_loss']:.4g}",
        "solved at step": str(row["solved_at_step"]) if row["solved"] else "no",
        "clipped": f"{row['clip_rate']:.0%}",
        "reach": f"{row['reach']:.0e}" if np.isfinite(row["reach"]) else "unknown",
        "findings": [finding.title for finding in row["findings"]] or ["nothing found"],
    }


def _new_table(title, caption):
    return Table(
        title=title,
        title_justify="left",
        title_style="",
        caption=caption,
        caption_justify="left",
        box=None,
        padding=(0, 1),
        pad_edge=False,
    )


def _write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _narrow(cell):
    """80 columns are few: an interval goes below its median, without brackets and zeros."""
    median, bracket, interval = cell.partition(" [")
    low, _, high = interval.rstrip("]").partition(", ")
    if bracket:
        return f"{median}\n{low.removeprefix('0') or low}–{high.removeprefix('0') or high}"
    return cell.replace(", ", "\n")


def _median(values):
    return float(np.median(values)) if len(values) else np.nan


def _number(value, form):
    return "–" if np.isnan(value) else form.format(value)


def _interval(row, name, form):
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if np.isnan(low) else f" [{form.format(low)}, {form.format(high)}]"


def _with_interval(row, name, form):
    return _number(row[name], form) + _interval(row, name, form)


def _largest(norms):
    """The largest norm; Inf or NaN where no step was finite."""
    finite = norms[np.isfinite(norms)]
    return float(finite.max()) if len(finite) else float(norms[-1])
