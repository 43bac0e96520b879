"""The scripts of tutorials/papers: their short form, their records, and the table of README.md."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "tutorials" / "papers"


def _record():
    """tutorials/papers/record.py, which the scripts import from beside them."""
    spec = importlib.util.spec_from_file_location("record", FOLDER / "record.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["record"] = module  # Its dataclasses look themselves up there.
    spec.loader.exec_module(module)
    return module


record = _record()
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "record")
VERDICTS = {record.AGREES, record.IN_DIRECTION, record.DOES_NOT}

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def run(script, *arguments, folder):
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=folder,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def numbers_in(thing):
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, list):
        return [number for part in thing for number in numbers_in(part)]
    return [thing] if isinstance(thing, (int, float)) else []


# The short form


@each
def test_short_form(script, tmp_path):
    """It runs, tells a verdict of each claim, and leaves the record that it was asked for."""
    out = tmp_path / "out"
    done = run(script, "--quick", "--out", out, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} - {f"{script.stem}.png"} == {f"{script.stem}.json"}
    found = json.loads((out / f"{script.stem}.json").read_text(encoding="utf-8"))
    assert found["quick"] is True
    assert found["runs"] and found["settings"] and found["claims"]
    assert not [error for made in found["runs"] if (error := made.get("error"))]
    for claim in found["claims"]:
        assert claim["verdict"] in VERDICTS
        assert claim["our_number"] in done.stdout


def test_goes_on_where_it_was_ended(tmp_path):
    """Finished runs are taken from disk: the same record, and no run a second time."""
    script = FOLDER / "hochreiter_1997.py"
    arguments = ("--quick", "--out", tmp_path / "out", "--runs", tmp_path / "runs")
    assert run(script, *arguments, folder=tmp_path).returncode == 0
    (kept,) = (tmp_path / "runs" / "hochreiter_1997").iterdir()
    changed = json.loads(kept.read_text()) | {"sequences": 123}
    kept.write_text(json.dumps(changed))
    done = run(script, *arguments, folder=tmp_path)
    assert "seed 21: 123" in done.stdout, done.stderr


# The rules of verdicts


@pytest.mark.parametrize(
    ("first", "second", "larger", "no_larger"),
    [
        ((5, 4, 6), (2, 1, 3), record.AGREES, record.DOES_NOT),
        ((5, 2, 6), (2, 1, 3), record.IN_DIRECTION, record.IN_DIRECTION),
        ((2, 1, 3), (2, 1, 3), record.DOES_NOT, record.AGREES),
        ((2, 1, 3), (5, 2, 6), record.DOES_NOT, record.AGREES),
        ((2, 1, 3), (5, 4, 6), record.DOES_NOT, record.AGREES),
        ((math.inf, 4, math.inf), (2, 1, 3), record.AGREES, record.DOES_NOT),
    ],
)
def test_rules(first, second, larger, no_larger):
    first, second = record.Estimate(*first), record.Estimate(*second)
    assert record.larger(first, second) == larger
    assert record.no_larger(first, second) == no_larger


def test_one_run_says_nothing_for_certain():
    """Its interval is NaN, which lies apart from nothing."""
    first, second = record.Estimate.median([5.0]), record.Estimate.median([2.0])
    assert record.larger(first, second) == record.IN_DIRECTION


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [4.0, 1.0, 2.0, 3.0], [1.0]])
def test_median(values):
    assert record.Estimate.median(values).value == np.median(values)


def test_median_of_runs_that_never_succeeded():
    assert record.Estimate.median([math.inf, 1.0, math.inf]).value == math.inf
    assert record.Estimate.median([1.0, 2.0, math.inf]).value == 2.0


# What the scripts measured, and what README.md says of it

RECORDS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((FOLDER / "results").glob("*.json"))
}


def settings_in(script):
    """The constants of a script's SETTINGS as they stand in it, of the long form."""
    text = script.read_text(encoding="utf-8")
    (block,) = re.findall(r"^SETTINGS = (\{.*?^\})", text, re.S | re.M)
    return eval(block, {"script": SimpleNamespace(quick=False)})


def test_every_script_has_a_record():
    assert set(RECORDS) == {script.stem for script in SCRIPTS}


@each
def test_record_is_of_the_script_as_it_is(script):
    """Of the long form, with the settings that stand in the script, and no run left out."""
    found = RECORDS[script.stem]
    settings = settings_in(script)
    assert found["quick"] is False
    assert found["settings"] == settings
    assert {"keras", "tensorflow", "numpy"} <= set(found["versions"])
    if "seeds" in settings:
        assert {made["seed"] for made in found["runs"] if "seed" in made} == set(settings["seeds"])


def test_pascanu_by_hand():
    """The rates of the table from the runs of the record, by hand."""
    found = RECORDS["pascanu_2013"]
    rates = {}
    for training in ("SGD", "clipped", "clipped and Ω"):
        mine = [made for made in found["runs"] if made["remedy"].endswith(f", {training}")]
        assert len(mine) == 2 * 3 * len(found["settings"]["timesteps"])
        rates[training] = np.mean([made["test_accuracy"] > 0.99 for made in mine])
    first = found["claims"][1]
    one, other = re.findall(r"([\d.]+) \[", first["our_number"])
    assert float(one) == pytest.approx(rates["clipped and Ω"], abs=0.005)
    assert float(other) == pytest.approx(rates["clipped"], abs=0.005)


def test_what_the_readme_says_of_the_accuracies():
    for training, expected in (("SGD", 0.25), ("clipped", 0.5), ("clipped and Ω", 0.95)):
        accuracies = [
            made["test_accuracy"]
            for made in RECORDS["pascanu_2013"]["runs"]
            if made["remedy"].endswith(f", {training}") and made["timesteps"] > 20
        ]
        assert len(accuracies) == 12
        assert np.median(accuracies) == pytest.approx(expected, abs=0.0051)


def test_what_the_readme_says_of_the_gates():
    """Copying and digits were solved by no cell, adding by all but the full LSTM."""
    for made in RECORDS["gates_from_the_input"]["runs"]:
        if "task" in made and made["chosen"]:
            assert made["solved"] == (made["task"] == "adding" and made["remedy"] != "LSTM")


def test_hochreiter_by_hand():
    found = RECORDS["hochreiter_1997"]
    counts = [made["sequences"] or math.inf for made in found["runs"]]
    assert len(counts) == 10
    solved, number = found["claims"]
    assert solved["our_number"].startswith(f"{np.isfinite(counts).sum()} of 10 runs")
    assert number["our_number"].startswith(f"median {np.median(counts):.0f} ")


def test_table_of_readme_is_that_of_the_records():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert record.table() in text


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_form(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    if path.stem != "record":
        assert text.startswith("# %% [markdown]\n# # ")
        # The rule stands before anything is run.
        assert text.index("**The rule**") < text.index("import")
