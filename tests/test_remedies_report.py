"""The tables and the report of a study with several seeds and learning rates."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

import kerasgrad as kg
from kerasgrad import GradientHistory
from kerasgrad.remedies import COLUMNS, Comparison, FailedRun, Remedy, Run, Settings
from kerasgrad.remedies.report import draw, report

RATES = (0.01, 0.1)
HOSTILE = '<script>alert("x")</script> | [red]'


def run(remedy, seed, rate, losses, validation) -> Run:
    history = GradientHistory()
    loss = np.linspace(1, losses[0], 30)
    norms = {"rnn": np.outer(np.ones(30), np.geomspace(1e-3, 1, 6))}
    history.append(
        weights=["w"], step=range(30), norms=np.ones((30, 1)), loss=loss, state_norms=norms
    )
    steps = [10, 20, 30][: len(losses)]
    return Run(remedy, seed, history, steps, losses, [], rate, validation, 0.0125)


@pytest.fixture(scope="module")
def study() -> Comparison:
    """A remedy that solves the task, one that diverges at a learning rate, one that fails once."""
    runs = []
    for seed in range(3):
        runs += [
            run("good", seed, 0.01, [0.5, 0.3, 0.1 + seed / 100], 0.2),
            run("good", seed, 0.1, [0.5, 0.009, 0.001 * (1 + seed)], 0.1),
            run("bad", seed, 0.01, [0.5, 0.4, 0.2], 0.3),
            run("bad", seed, 0.1, [0.5, math.inf], math.nan),
        ]
    runs += [run(HOSTILE, seed, rate, [0.5, 0.4, 0.3], rate) for seed in (0, 1) for rate in RATES]
    failed = [FailedRun(HOSTILE, 2, 0.01, "ValueError: <b>no</b>", "Traceback <b>of</b> it")]
    remedies = {"good": Remedy("does it"), "bad": Remedy("does not"), HOSTILE: Remedy("<i>")}
    task = kg.tasks.adding_problem(samples=20, timesteps=6, test_samples=10)
    return Comparison(task, Settings(), runs, failed, remedies, RATES)


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    # A file's name is no place for a slash, which the hostile one has.
    named = [r for r in study.runs if r.remedy != HOSTILE]
    Comparison(study.task, study.settings, named, [], study.remedies, RATES).save(folder)
    return folder


def text_of(result, width) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(result.table())
    return console.file.getvalue()


def test_the_table_has_a_row_for_each_remedy(study):
    text = text_of(study, 140)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["good"][1:5] == ["0.1", "0.002", "3/3", "20"]
    assert rows["bad"][1:4] == ["0.01", "0.2", "0/3"]
    assert [".001–.003", ".44–1.00"] in [line.split() for line in text.splitlines()]
    (hostile,) = (line for line in text.splitlines() if line.startswith(HOSTILE))
    assert hostile.split()[-1] == "0" and text.count("1 failed") == 1
    assert "learning_rate of 0.01, 0.1" in " ".join(text.split())


def test_the_table_fits_a_terminal_of_80_columns():
    """With the longest name that there is, and intervals of all digits."""
    name = max(kg.remedies.REMEDIES, key=len)
    losses = [0.00333, 0.00494, 0.00982]
    runs = [run(name, seed, 0.001, [loss], 0.2) for seed, loss in enumerate(losses)]
    task = kg.tasks.adding_problem(samples=20, timesteps=6, test_samples=10)
    remedies = {name: kg.remedies.REMEDIES[name]}
    text = text_of(Comparison(task, Settings(), runs, [], remedies, (0.001, 0.1)), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert [name, "0.001", "0.00494", "3/3", "10", "1e-03", "0%", "12.5", "0"] in lines
    assert [".00333–.00982", ".44–1.00"] in lines


def test_markdown_has_the_same_cells(study):
    headers, rows = study.summary_cells()
    lines = study.markdown().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| remedy"))
    assert [cell.strip() for cell in lines[start].strip("|").split("|")] == headers
    for line, row in zip(lines[start + 2 : start + 2 + len(rows)], rows, strict=True):
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert cells == row
    for header in headers[1:]:
        assert f"- **{header}**: {COLUMNS[header]}" in lines


def test_the_folder_has_tables_of_runs_and_of_remedies(study, folder):
    with open(folder / "comparison.csv", newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 12
    chosen = [(r["remedy"], r["learning_rate"]) for r in runs if r["chosen"] == "True"]
    assert sorted(chosen) == [("bad", "0.01")] * 3 + [("good", "0.1")] * 3
    with open(folder / "summary.csv", newline="", encoding="utf-8") as file:
        good, bad = csv.DictReader(file)
    assert (good["test_loss"], good["test_loss_low"]) == ("0.002", "0.001")
    assert (bad["diverged"], bad["learning_rate"]) == ("0", "0.01")
    assert {path.name for path in folder.glob("*.npz")} == {
        f"{name}-seed{seed}.npz" for name in ("good", "bad") for seed in range(3)
    }
    for name in ("test_loss", "final_loss", "learning_rates", "loss", "gradient_norms"):
        assert min(plt.imread(folder / f"{name}.png").shape[:2]) > 150
    assert plt.get_fignums() == []


class Page(HTMLParser):
    """Which tags a page has, whether they are closed, and what it asks for."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.asked, self.text = [], [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.text += " " * (tag == "br")
        self.asked += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_page_that_asks_for_nothing(study):
    figures = draw(study)
    html = report(study, figures)
    page = Page(html)
    assert page.open == []
    assert page.asked and all(a.startswith("data:image/png;base64,") for a in page.asked)
    assert page.tags.count("img") == len(figures) == 6
    assert "url(" not in html and "@import" not in html
    assert {"script", "link", "iframe", "b", "i"}.isdisjoint(page.tags)
    assert 'name="viewport"' in html


def test_the_report_tells_table_settings_versions_seeds_and_failures(study):
    page = Page(report(study, {}))
    text = " ".join(page.text.split())
    for row in study.summary_cells()[1]:
        assert all(" ".join(cell.split()) in text for cell in row)
    for words in (
        *(HOSTILE, "ValueError: <b>no</b>", "Traceback <b>of</b> it", "0, 1, 2", "0.01, 0.1"),
        *("does it", "a fifth of the training sequences", "momentum", "tensorflow", "keras"),
        *(study.task.source, "All 17 runs"),
    ):
        assert words in text, words


def test_a_comparison_of_one_run_has_a_report_too(study, tmp_path):
    (one, *_) = study.runs
    one = dataclasses.replace(one, remedy="good/better")  # No name of a file.
    result = Comparison(study.task, study.settings, [one], [], {"good/better": Remedy("")})
    result.save(tmp_path)
    assert [path.name for path in tmp_path.glob("*.npz")] == ["good_better.npz"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 3
    assert "0/1" in page.text
