"""Each benchmark runs in its short form, prints its table, and leaves the kept figures alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import module_at

BENCHMARKS = Path(__file__).parent / "benchmarks"
page = module_at(BENCHMARKS / "page.py")


def run(name, *options):
    return subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--quick", *options],
        capture_output=True,
        text=True,
        check=True,
        # The benchmarks import kerasgrad from where the tests do.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ).stdout


@pytest.mark.parametrize(
    ("name", "options", "printed"),
    [
        ("callback", [], ["recompute each batch"]),
        (
            "layers",
            ["--only", "simplified_lstm", "recurrences"],
            ["times faster", "times the roofline"],
        ),
        ("memory", [], ["kerasgrad SimpleRNN", "Keras's MB"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_quick_form_prints_its_table_and_keeps_the_figures(name, options, printed):
    if name == "memory" and not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from Linux's /proc")
    kept = (BENCHMARKS / f"{name}.json").read_bytes()
    output = " ".join(run(name, *options).split())
    for words in printed:
        assert words in output
    assert (BENCHMARKS / f"{name}.json").read_bytes() == kept


def test_on_a_gpu_keras_runs_as_fit_chooses_and_figures_have_a_place_of_their_own(monkeypatch):
    layers = page.layers
    monkeypatch.setattr(layers, "gpu_name", lambda: "the processor in its place")
    seconds = {"keras": 0.004, "rest": 0.001, "SimpleRNN": 0.002}

    def take_turns(variants, turns):
        assert all(taken > 0 for times in variants.values() for taken in times(1))
        return {name: turns * [seconds[name]] for name in variants}

    # In place of what a clock says: no test asserts a time.
    monkeypatch.setattr(layers, "take_turns", take_turns)
    (row,) = layers.simple_rnn(quick=True)
    assert row["keras_mode"] == "default"
    assert row["ms_a_step"] > row["rest_ms_a_step"] > 0
    assert (row["ms_a_step"], row["rest_ms_a_step"], row["times_faster"]) == (2, 1, 2)
    for on_gpu, name in ((True, "layers_gpu.json"), (False, "layers.json")):
        assert page.report_path(layers.__file__, on_gpu).name == name


@pytest.mark.parametrize("name", ["callback", "callback_gpu", "layers", "layers_gpu", "memory"])
def test_kept_figures_say_what_they_were_measured_on(name):
    report = json.loads((BENCHMARKS / f"{name}.json").read_text())
    for part in report.values() if name.startswith("layers") else [report]:
        assert {"python", "tensorflow", "keras", "cores"} <= set(part)
        assert bool(part.get("gpu")) == name.endswith("_gpu")


def test_tables_of_the_page_are_those_of_the_kept_figures():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text


def test_a_table_whose_place_is_gone_is_missed():
    text = page.PAGE.read_text(encoding="utf-8").replace("<!-- scaling -->\n", "")
    with pytest.raises(ValueError, match="no line <!-- scaling -->"):
        page.filled(text)


def test_a_table_that_is_not_kept_is_missed_but_of_a_gpu(monkeypatch):
    kept = page.kept

    def without_scaling(benchmark, on_gpu=False):
        return {name: part for name, part in kept(benchmark, on_gpu).items() if name != "scaling"}

    assert "scaling" in page.tables() and "scaling, GPU" not in page.tables()
    monkeypatch.setattr(page, "kept", without_scaling)
    with pytest.raises(KeyError, match="scaling"):
        page.tables()


def test_what_the_page_says_of_the_cells():
    text = " ".join(page.PAGE.read_text(encoding="utf-8").split())
    for name in ("simple_rnn", "simplified_lstm"):
        rows = page.kept(page.layers)[name]["rows"]
        short = sum(row["times_faster"] < row["target"] for row in rows)
        assert f"{short} of these {len(rows)} cells are short of their targets" in text


def test_what_the_readme_says_of_the_figures():
    readme = " ".join((BENCHMARKS.parents[1] / "README.md").read_text(encoding="utf-8").split())

    def times_faster(name, on_gpu=False):
        rows = page.kept(page.layers, on_gpu)[name]["rows"]
        return [row["times_faster"] for row in rows]

    def percent_more(variant, on_gpu=False):
        rows = page.kept(page.callback, on_gpu)["results"]
        return {row["model"]: 100 * (row["ratio"] - 1) for row in rows if row["variant"] == variant}

    def span(values):
        # Two digits, as the sentence has.
        return " to ".join(f"{value:.2g}" for value in (min(values), max(values)))

    cost = percent_more("GradientNorms")
    assert f"a Keras LSTM's step of 4.4 ms {cost['keras_lstm']:.1f} %" in readme
    assert f"with a million weights {cost['feed_forward']:.0f} %" in readme
    assert f"with ∂L/∂s_t, {cost['recurrent']:.0f} %" in readme
    again = percent_more("recompute each batch").values()
    assert f"again costs {min(again):.0f} to {max(again):.0f} %" in readme
    assert f"SimpleRNN there takes {span(times_faster('simple_rnn'))} times less" in readme
    assert f"SimplifiedLSTM {span(times_faster('simplified_lstm'))} times less" in readme
    there = percent_more("GradientNorms", on_gpu=True).values()
    assert f"recording cost {min(there):.0f} to {max(there):.0f} %" in readme
    names = "simple_rnn", "simplified_lstm"
    faster = [ratio for name in names for ratio in times_faster(name, on_gpu=True)]
    assert f"took {span(faster)} times less than Keras's there" in readme
