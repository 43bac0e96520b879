"""report.html: a comparison on one page that needs no other file."""

from __future__ import annotations

import base64
import io
import platform
import re
from collections.abc import Mapping
from html import escape
from string import Template
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from kerasgrad import plots
from kerasgrad.remedies.comparison import COLUMNS, Comparison, run_cells
from kerasgrad.remedies.intervals import median_interval
from kerasgrad.remedies.kept import versions

_CAPTIONS = {
    "test_loss": "Test loss by optimizer step: median over the seeds, and the range of all seeds.",
    "final_loss": "Test loss at the end: each run a dot, the median and its 95 % bootstrap "
    "interval, × for a run that diverged.",
    "learning_rates": "What the learning rates were chosen by: the validation loss at the end, "
    "median over the seeds.",
    "loss": "Training loss of each batch, mean of 25 steps, of the first seed.",
    "gradient_norms": "Norm of the whole gradient by step, before and after clipping, of the first "
    "seed.",
    "state_norms": "‖∂L/∂s_t‖ by time step, of the first seed.",
}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
.box { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td.text { white-space: normal; text-align: left; min-width: 14rem; }
thead th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
@media (max-width: 30rem) { th, td { padding: .3rem .35rem; } }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption, dd { font-size: .875rem; color: #444; }
dt { font-weight: 600; margin-top: .5rem; }
dd { margin-left: 0; }
pre { overflow-x: auto; background: #f5f5f5; padding: .75rem; font-size: .8rem; }
summary { cursor: pointer; padding: .4rem 0; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$heading</p>
$failures
<h2>Remedies</h2>
<div class="box">$summary</div>
<details><summary>What the columns are</summary><dl>$columns</dl></details>
<h2>Figures</h2>
$figures
<h2>Settings</h2>
<div class="box">$settings</div>
<h2>Runs</h2>
<details><summary>All $count runs</summary><div class="box">$runs</div></details>
</body>
</html>
""")


def draw(comparison: Comparison) -> dict[str, bytes]:
    """The figures of a comparison: {name: PNG}.

    Args:
        comparison: with one run at least.
    """
    runs, task = comparison.chosen_runs, comparison.task
    first = runs[0].seed if runs else None
    shown = {run.remedy: run.history for run in runs if run.seed == first}
    axes: dict[str, Any] = {}
    if len(comparison.seeds) > 1 or comparison.learning_rates:
        names = list(dict.fromkeys(run.remedy for run in runs))
        final = {n: [run.ranked_loss for run in runs if run.remedy == n] for n in names}
        by_step = {n: _by_step([run for run in runs if run.remedy == n]) for n in names}
        by_step = {name: losses for name, losses in by_step.items() if len(losses[0])}
        axes["test_loss"] = plots.plot_median_losses(by_step, task.constant_loss)
        intervals = {name: median_interval(losses) for name, losses in final.items()}
        axes["final_loss"] = plots.plot_final_losses(final, intervals, task.constant_loss)
    if comparison.learning_rates:
        chosen = comparison.chosen_learning_rates
        losses = {name: comparison.validation_losses(name) for name in chosen}
        axes["learning_rates"] = plots.plot_learning_rates(losses, chosen)
    if shown:
        axes["loss"] = plots.plot_compared_losses(shown, task.constant_loss)
        axes["gradient_norms"] = plots.plot_compared_norms(shown)[0]
        axes["state_norms"] = plots.plot_compared_state_norms(shown)
    figures = {}
    for name, ax in axes.items():
        picture = io.BytesIO()
        ax.figure.savefig(picture, format="png", dpi=120)
        plt.close(ax.figure)
        figures[name] = picture.getvalue()
    return figures


def report(comparison: Comparison, figures: Mapping[str, bytes]) -> str:
    """The page: table, figures, settings, versions, seeds, and the tracebacks of failed runs.

    Args:
        comparison: what to tell.
        figures: {name: PNG}, as `draw` makes them; they become a part of the page.

    Returns:
        HTML that asks for nothing outside of itself.
    """
    headers, rows = comparison.summary_cells()
    task = comparison.task
    return _PAGE.substitute(
        title=escape(f"Remedies compared: {task.name}, T = {task.timesteps}"),
        heading=escape(comparison.heading()).replace("\n", "<br>"),
        failures=_failures(comparison),
        summary=_table(headers, rows),
        columns="".join(
            f"<dt>{escape(name)}</dt><dd>{escape(COLUMNS[name])}</dd>"
            for name in headers
            if name in COLUMNS
        ),
        figures="".join(_figure(name, picture) for name, picture in figures.items()),
        settings=_table(["", ""], _settings(comparison), text=True),
        count=len(comparison.runs) + len(comparison.failed),
        runs=_runs(comparison),
    )


def _settings(comparison):
    rates = comparison.learning_rates or (comparison.settings.learning_rate,)
    task, seeds = comparison.task, comparison.seeds
    held_out = (
        "a fifth of the training sequences, drawn once for all runs"
        if comparison.learning_rates
        else "none: there was no choice to make"
    )
    remedies = {name: remedy.description for name, remedy in comparison.remedies.items()}
    rows = {
        "task": f"{task.name}: {task.samples} training and {len(task.x_test)} test sequences of "
        f"{task.timesteps} steps; {task.source}",
        "validation data": held_out,
        "seeds": ", ".join(map(str, seeds)),
        "learning rates": ", ".join(f"{rate:g}" for rate in rates),
    }
    rows |= {
        name: f"{value:g}"
        for name, value in vars(comparison.settings).items()
        if name != "learning_rate"
    }
    rows |= {f"remedy {name}": description for name, description in remedies.items()}
    rows |= versions() | {"python": platform.python_version(), "machine": platform.machine()}
    return [[name, value] for name, value in rows.items()]


def _runs(comparison):
    headers = ["remedy", "seed", "learning rate", "validation loss", "test loss", "solved at step"]
    headers += ["steps", "reach", "clipped", "what went wrong"]
    searched = bool(comparison.learning_rates)
    rows = []
    for row in comparison.rows():
        text = run_cells(row)
        rows.append(
            [
                row["remedy"],
                str(row["seed"]),
                f"{row['learning_rate']:g}" + (" (chosen)" if searched and row["chosen"] else ""),
                "–" if row["validation_loss"] is None else f"{row['validation_loss']:.4g}",
                text["test loss"],
                text["solved at step"],
                str(row["steps"]),
                text["reach"],
                text["clipped"],
                "; ".join(text["findings"]),
            ]
        )
    rows += [
        [run.remedy, str(run.seed), f"{run.learning_rate:g}", *["–"] * 6, f"failed: {run.error}"]
        for run in comparison.failed
    ]
    return _table(headers, rows, text=True)


def _failures(comparison):
    if not comparison.failed:
        return ""
    parts = [
        f"<details><summary>{escape(run.remedy)}, seed {run.seed}, learning rate "
        f"{run.learning_rate:g}: {escape(run.error)}</summary><pre>{escape(run.traceback)}</pre>"
        "</details>"
        for run in comparison.failed
    ]
    return f"<h2>Runs that failed: {len(parts)}</h2>" + "".join(parts)


def _table(headers, rows, *, text=False):
    """A table; its last column is text, which may wrap, where so told."""

    def cells(row):
        kinds = [""] * (len(row) - 1) + [' class="text"' if text else ""]
        name, *others = map(escape, row)
        # A phone is narrow: intervals go below their medians.
        others = [re.sub(r" (\[.*\])$", r"<br><small>\1</small>", cell) for cell in others]
        pairs = zip(kinds, [name, *others], strict=True)
        return "".join(f"<td{kind}>{cell}</td>" for kind, cell in pairs)

    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    head = f"<thead><tr>{head}</tr></thead>" if any(headers) else ""
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _figure(name, picture):
    caption = escape(_CAPTIONS[name])
    data = base64.b64encode(picture).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _by_step(runs):
    """(steps, (runs, n) test losses); Inf from where a run has ended early."""
    steps = max((run.test_steps for run in runs), key=len, default=[])
    losses = np.full((len(runs), len(steps)), np.inf)
    for i, run in enumerate(runs):
        losses[i, : len(run.test_losses)] = run.test_losses
    return np.array(steps), losses
