"""The scripts of tutorials/papers: their short form, their records, and the table of README.md."""

from __future__ import annotations

import itertools
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
from helpers import module_at

FOLDER = Path(__file__).parents[1] / "tutorials" / "papers"


record = module_at(FOLDER / "record.py")
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
    # The full run's record has a figure exactly where the short one's has.
    expected = {path.name for path in record.RESULTS.glob(f"{script.stem}.*")}
    assert {path.name for path in out.iterdir()} == expected
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
        seeds = {made["seed"] for made in found["runs"] if "seed" in made}
        assert seeds == {*settings["seeds"], settings.get("grid_seed", settings["seeds"][0])}


def apart_or_larger(first, second):
    """The verdict on "the first is larger", of (low, value, high) each."""
    if first[0] > second[2]:
        return record.AGREES
    return record.IN_DIRECTION if first[1] > second[1] else record.DOES_NOT


def not_larger(first, second):
    """The verdict on "the first is no larger", of (low, value, high) each."""
    if first[1] <= second[1]:
        return record.AGREES
    return record.IN_DIRECTION if first[0] <= second[2] else record.DOES_NOT


def spread(values):
    """(low, median, high) of three runs, whose bootstrap interval spans them all."""
    low, median, high = sorted(map(float, values))
    return low, median, high


def shown(number):
    low, value, high = number
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def test_pascanu_by_hand():
    """Each rate, interval and verdict of the table from the runs, Wilson's interval by SciPy."""
    binomtest = pytest.importorskip("scipy.stats").binomtest
    found = RECORDS["pascanu_2013"]
    settings, runs = found["settings"], found["runs"]
    starts, trainings = ("sigmoid", "tanh", "smart tanh"), ("SGD", "clipped", "clipped and Ω")
    cells = [(made["remedy"], made["timesteps"], made["seed"]) for made in runs]
    assert sorted(cells) == sorted(
        (f"{start}, {training}", timesteps, seed)
        for start in starts
        for training in trainings
        for timesteps in settings["timesteps"]
        for seed in settings["seeds"]
    )
    for made in runs:
        assert made["success"] == (made["test_accuracy"] > settings["success_accuracy"])
        assert made["success"] or made["diverged"] or made["steps"] == settings["steps"]

    def rate(training, start):
        mine = [
            made["success"]
            for made in runs
            if made["remedy"] in {f"{each}, {training}" for each in start}
        ]
        result = binomtest(sum(mine), len(mine))
        low, high = result.proportion_ci(method="wilson")
        return low, result.statistic, high

    pairs = [
        ("clipped", "SGD", starts),
        ("clipped and Ω", "clipped", starts),
        *(("clipped and Ω", "SGD", start) for start in (starts, *([each] for each in starts))),
    ]
    for claim, (first, second, start) in zip(found["claims"], pairs, strict=True):
        one, other = rate(first, start), rate(second, start)
        assert claim["our_number"] == f"success rate {shown(one)}, against {shown(other)}"
        assert claim["verdict"] == apart_or_larger(one, other)


def test_le_by_hand():
    """The grid is whole, the settings are its best, and the rows follow from the runs."""
    found = RECORDS["le_2015"]
    settings = found["settings"]
    grid = [made for made in found["runs"] if made["stage"] == "grid"]
    results = [made for made in found["runs"] if made["stage"] == "result"]
    names = ("network", "forget_bias", "learning_rate", "clip")
    biases = {"tanh": [None], "IRNN": [None], "LSTM": settings["forget_biases"]}
    # In the order of the script, in which the first of equals is taken.
    assert [tuple(made[name] for name in names) for made in grid] == [
        setting
        for network in biases
        for setting in itertools.product(
            [network], biases[network], settings["learning_rates"], settings["clips"]
        )
    ]
    for made in grid:
        assert (made["seed"], made["timesteps"]) == (
            settings["grid_seed"],
            settings["grid_timesteps"],
        )
    for made in found["runs"]:
        # It ends where it is solved, or diverged, and nowhere else before its time.
        *earlier, last = map(float, made["test_losses"])
        assert min(earlier, default=math.inf) >= settings["solved_below"]
        assert made["solved"] == (last < settings["solved_below"])
        assert made["diverged"] == (not math.isfinite(last))
        most = settings["grid_steps" if made["stage"] == "grid" else "steps"]
        assert made["steps"] == len(made["test_losses"]) * settings["check"]
        assert made["steps"] == most or made["solved"] or made["diverged"]

    losses = {}
    for network in biases:
        tried = [made for made in grid if made["network"] == network]
        means = []
        for made in tried:
            values = np.array(made["test_losses"], float)
            checks = settings["grid_steps"] // settings["check"]
            means.append(np.pad(values, (0, checks - len(values)), mode="edge").mean())
        best = tried[int(np.argmin(np.where(np.isfinite(means), means, np.inf)))]
        for timesteps in settings["timesteps"]:
            mine = [
                made
                for made in results
                if (made["network"], made["timesteps"]) == (network, timesteps)
            ]
            assert [made["seed"] for made in mine] == settings["seeds"]
            for made in mine:
                assert [made[name] for name in names] == [best[name] for name in names]
            losses[network, timesteps] = spread(
                math.inf
                if made["diverged"]
                else max(settings["solved_below"], made["test_losses"][-1])
                for made in mine
            )
    assert len(results) == len(losses) * len(settings["seeds"])

    pairs = [
        (timesteps, *pair)
        for timesteps in settings["timesteps"]
        for pair in (("tanh", "IRNN", apart_or_larger), ("IRNN", "LSTM", not_larger))
    ]
    for claim, (timesteps, first, second, rule) in zip(found["claims"], pairs, strict=True):
        one, other = losses[first, timesteps], losses[second, timesteps]
        assert claim["ours"].startswith(f"T = {timesteps}, ")
        assert claim["our_number"] == f"test loss {first} {shown(one)}, {second} {shown(other)}"
        learned = min(one[1], other[1]) <= settings["learned_below"]
        assert claim["verdict"] == (rule(one, other) if learned else record.DOES_NOT)


def test_gates_by_hand():
    """Quality: the worst verdict of three tasks. Speed: the median ratio, in direction at most."""
    found = RECORDS["gates_from_the_input"]
    chosen = [made for made in found["runs"] if made.get("chosen")]

    def losses(task, cell):
        mine = [made for made in chosen if (made["task"], made["remedy"]) == (task, cell)]
        return spread(made["test_loss"] for made in mine)

    order = (record.AGREES, record.IN_DIRECTION, record.DOES_NOT)
    cells = ("T-RNN", "minLSTM", "article's cell")
    for claim, cell in zip(found["claims"][:3], cells, strict=True):
        told = []
        for task in ("adding", "copying", "digits"):
            one, other = losses(task, cell), losses(task, "LSTM")
            told.append(not_larger(one, other))
            assert (
                f"{task} test loss {shown(one)}, LSTM {shown(other)} ({told[-1]})"
                in (claim["our_number"])
            )
        assert claim["setting"].startswith(f"{cell}:")
        assert claim["verdict"] == max(told, key=order.index)
    timings = {made["timesteps"]: made for made in found["runs"] if "seconds_lstm" in made}
    assert list(timings) == found["settings"]["speed_timesteps"]
    for claim in found["claims"][3:]:
        text = claim["our_number"]
        numbers = re.findall(r"T = (\d+): ([\d.]+) \[([\d.]+), ([\d.]+)\]", text)
        assert [int(timesteps) for timesteps, *_ in numbers] == list(timings)
        for timesteps, ratio, low, high in numbers:
            made = timings[int(timesteps)]
            ratios = np.divide(made["seconds_lstm"], made["seconds_article"])
            assert float(ratio) == pytest.approx(np.median(ratios), rel=0.005)
            assert ratios.min() <= float(low) * 1.005 and float(high) <= ratios.max() * 1.005
        expected = record.IN_DIRECTION if float(low) > 1 else record.DOES_NOT
        assert claim["verdict"] == expected


def test_baselines_by_hand():
    found = RECORDS["baselines"]
    for claim, task in zip(found["claims"], ("copying", "adding"), strict=True):
        mine = [made for made in found["runs"] if made["task"] == task]
        assert [made["timesteps"] for made in mine] == found["settings"][f"{task}_timesteps"]
        for made in mine:
            closed = 10 * math.log(8) / (made["timesteps"] + 20) if task == "copying" else 1 / 6
            assert made["closed_form"] == pytest.approx(closed, rel=1e-12)
        within = all(made["low"] <= made["closed_form"] <= made["high"] for made in mine)
        assert claim["verdict"] == (record.AGREES if within else record.DOES_NOT)


def test_what_the_readme_says_of_the_accuracies():
    runs = RECORDS["pascanu_2013"]["runs"]
    sigmoid = [made for made in runs if made["remedy"].startswith("sigmoid")]
    assert len(sigmoid) == 45
    assert not any(made["success"] for made in sigmoid)
    assert max(made["test_accuracy"] for made in sigmoid) == pytest.approx(0.36, abs=0.005)
    for training, expected in (("SGD", 0.25), ("clipped", 0.49), ("clipped and Ω", 0.85)):
        accuracies = [
            made["test_accuracy"]
            for made in runs
            if made["remedy"].endswith(f"tanh, {training}") and made["timesteps"] > 20
        ]
        assert len(accuracies) == 18
        assert np.median(accuracies) == pytest.approx(expected, abs=0.005)


def test_what_the_readme_says_of_the_time():
    text = " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())
    for script, verb in (("pascanu_2013", " took"), ("gates_from_the_input", ""), ("le_2015", "")):
        minutes, seconds = divmod(RECORDS[script]["seconds_of_last_call"], 60)
        assert f"{script}.py{verb} {minutes} min {seconds} s" in text


def test_what_the_readme_says_of_the_identity_start():
    """Each T was learned by some network, so that its rows say something."""
    found = RECORDS["le_2015"]

    def made_with(network, timesteps):
        return [
            made
            for made in found["runs"]
            if made["stage"] == "result"
            and (made["network"], made["timesteps"]) == (network, timesteps)
        ]

    def loss(network, timesteps):
        return np.median(
            [
                math.inf if made["diverged"] else made["test_losses"][-1]
                for made in made_with(network, timesteps)
            ]
        )

    lengths = found["settings"]["timesteps"]
    for timesteps in lengths:
        networks = ("tanh", "IRNN", "LSTM")
        assert min(loss(network, timesteps) for network in networks) <= 0.15
    assert found["settings"]["learned_below"] == 0.15
    of_lstm = [made for timesteps in lengths for made in made_with("LSTM", timesteps)]
    assert all(made["solved"] for made in of_lstm)
    steps = [made["steps"] for made in of_lstm]
    assert (min(steps), max(steps)) == (750, 1750)
    of_irnn = [made for timesteps in lengths for made in made_with("IRNN", timesteps)]
    assert not any(made["solved"] for made in of_irnn)
    assert {made["steps"] for made in of_irnn} == {5000}
    medians = [loss("IRNN", timesteps) for timesteps in lengths]
    np.testing.assert_allclose(medians, [0.056, 0.043, 0.047], atol=0.0005)
    assert sum(made["test_losses"][-1] <= 0.15 for made in made_with("tanh", 50)) == 2
    assert loss("tanh", 50) < loss("IRNN", 50)
    medians = [loss("tanh", timesteps) for timesteps in (100, 150)]
    np.testing.assert_allclose(medians, [0.164, 0.164], atol=0.0005)


def test_what_the_readme_says_of_the_gates():
    chosen = [made for made in RECORDS["gates_from_the_input"]["runs"] if made.get("chosen")]
    family = ("T-RNN", "minLSTM", "article's cell")

    def mine(task, cell):
        return [made for made in chosen if (made["task"], made["remedy"]) == (task, cell)]

    def of_constant(task, cell):
        """The median loss over that of the constant answer."""
        return np.median(
            [
                math.inf if made["diverged"] else made["test_loss"] / made["constant_loss"]
                for made in mine(task, cell)
            ]
        )

    for task in ("adding", "copying", "digits"):
        assert min(of_constant(task, cell) for cell in (*family, "LSTM")) <= 0.5
    assert all(made["solved"] for cell in family for made in mine("adding", cell))
    assert not any(made["solved"] for made in mine("adding", "LSTM"))
    for task, lstm, (low, high) in (
        ("copying", 0.21, (0.79, 0.80)),
        ("digits", 0.33, (0.63, 0.74)),
    ):
        assert of_constant(task, "LSTM") == pytest.approx(lstm, abs=0.005)
        losses = [of_constant(task, cell) for cell in family]
        assert [min(losses), max(losses)] == pytest.approx([low, high], abs=0.005)


def test_hochreiter_by_hand():
    found = RECORDS["hochreiter_1997"]
    counts = [made["sequences"] or math.inf for made in found["runs"]]
    assert len(counts) == 10
    solved, number = found["claims"]
    finite = np.isfinite(counts).sum()
    assert solved["our_number"].startswith(f"{finite} of 10 runs")
    assert number["our_number"].startswith(f"median {np.median(counts):.0f} ")
    half = record.IN_DIRECTION if finite >= 5 else record.DOES_NOT
    assert solved["verdict"] == (record.AGREES if finite == 10 else half)
    low, high = re.search(r"\[(\d+), (\d+|inf)\]", number["our_number"]).groups()
    assert number["verdict"] == (record.AGREES if float(low) <= 74_000 <= float(high) else half)


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
