"""Histories with one planted defect, of which the finding is known; and healthy ones, with none."""

from __future__ import annotations

import ast
import math
import re
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kerasgrad as kg
from kerasgrad import GradientHistory, diagnose

FIRST = 500  # The histories start at this step, so that a row's number cannot pass for its step.


def record(global_norms, *, shares=(0.6, 0.8), **columns) -> GradientHistory:
    """A history with these global norms, two weights having 0.6 and 0.8 of each."""
    norms = np.outer(np.asarray(global_norms, float), shares)
    history = GradientHistory()
    history.append(
        weights=[f"model/w{i}" for i in range(len(shares))],
        step=FIRST + np.arange(len(norms)),
        norms=norms,
        **columns,
    )
    return history


def the_finding(history: GradientHistory) -> kg.Finding:
    (finding,) = diagnose(history)
    return finding


def clipnorm_of(advice: str) -> float:
    return float(re.search(r"'clipnorm': ([^,}]+)", advice)[1])


# Exploding


def test_exploding_names_its_steps_and_its_numbers():
    # 20 norms of 2, then 400. The geometric mean before row 20 + k is 2 · 200^(k/(20+k)), so the
    # ratio is 200^(20/(20+k)): 100.2 at k = 3, 82.8 at k = 4.
    finding = the_finding(record([2.0] * 20 + [400.0] * 10))
    assert (finding.kind, finding.severity, finding.where) == (
        "exploding",
        "warning",
        "all weights",
    )
    assert finding.steps == (FIRST + 20, FIRST + 23)
    assert "up to 4e+02 before clipping at step 520, 2e+02 times" in finding.evidence
    assert "(more than 100)" in finding.evidence
    assert clipnorm_of(finding.advice) == 2.0
    assert finding.title == "exploding, step 520"
    assert str(finding) == f"exploding, step 520 (all weights): {finding.evidence}"


def test_the_worst_step_is_told_where_it_is_not_the_first():
    finding = the_finding(record([1.0] * 20 + [101.0, 1.0, 5000.0, 1.0]))
    assert finding.steps == (FIRST + 20, FIRST + 22)
    assert "up to 5e+03 before clipping at step 522" in finding.evidence
    assert clipnorm_of(finding.advice) == 1.0  # of before the first, not of before the worst


@pytest.mark.parametrize(("before", "found"), [(9, False), (10, True)])
def test_a_mean_takes_ten_steps(before, found):
    assert bool(diagnose(record([1.0] * before + [101.0]))) is found


@pytest.mark.parametrize(("ratio", "found"), [(99.0, False), (101.0, True)])
def test_the_ratio_must_pass_the_threshold(ratio, found):
    assert bool(diagnose(record([3.0] * 15 + [3.0 * ratio]))) is found


def test_zeros_count_neither_as_steps_nor_in_the_mean():
    # log 0 would pull the mean to 0, and each later step would explode.
    assert diagnose(record([0.0] * 5 + [1.0] * 20)) == []
    assert diagnose(record([0.0] * 5 + [1.0] * 9 + [101.0])) == []
    assert the_finding(record([0.0] * 5 + [1.0] * 10 + [101.0])).steps == (FIRST + 15,) * 2


# Not finite


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_non_finite_names_its_step_and_weight(value, name):
    norms = np.full((20, 3), 1.0)
    norms[4] = 2.0, 3.0, 6.0  # the largest before: sqrt(4 + 9 + 36) = 7
    norms[7, 1] = value
    norms[8:] = np.nan  # as in a training: one weight first, then all
    history = GradientHistory()
    history.append(weights=["a", "b", "c"], step=FIRST + np.arange(20), norms=norms)
    finding = the_finding(history)
    assert (finding.kind, finding.severity, finding.where) == ("non_finite", "error", "b")
    assert finding.steps == (FIRST + 7, FIRST + 19)
    assert finding.evidence == f"{name}, after a largest global norm of 7 before clipping"
    # The median of the seven before: six of sqrt(3) and one of 7.
    assert clipnorm_of(finding.advice) == pytest.approx(math.sqrt(3), rel=0.05)


def test_a_loss_that_is_not_finite_is_found_before_its_gradients_are():
    loss = np.ones(12)
    loss[5] = np.inf
    finding = the_finding(record([1.0] * 12, loss=loss))
    assert (finding.kind, finding.where) == ("non_finite", "loss")
    assert finding.steps == (FIRST + 5,) * 2
    assert finding.evidence.startswith("Inf")


def test_the_weight_says_more_than_the_loss_at_the_same_step():
    norms = np.ones((3, 2))
    norms[2, 0] = np.nan
    history = GradientHistory()
    history.append(weights=["a", "b"], step=[0, 1, 2], norms=norms, loss=[1.0, 1.0, np.nan])
    assert the_finding(history).where == "a"


def test_a_first_step_that_is_not_finite_has_nothing_before_it():
    finding = the_finding(record([np.nan, 1.0]))
    assert (finding.evidence, finding.steps) == ("NaN", (FIRST, FIRST))
    assert clipnorm_of(finding.advice) == 1.0


def test_what_was_not_told_is_not_a_nan():
    """A loss that no step has, and the norm of a weight without gradient, are NaN in the record."""
    missing = np.zeros((15, 2), bool)
    missing[:, 1] = True
    history = GradientHistory()
    history.append(
        weights=["a", "b"],
        step=range(15),
        norms=np.where(missing, np.nan, 1.0),
        missing=missing,
        loss=np.full(15, np.nan),
    )
    assert diagnose(history) == []


def test_the_gravest_comes_first():
    norms = [1.0] * 20 + [1000.0, np.nan]
    kinds = [(f.kind, f.severity) for f in diagnose(record(norms))]
    assert kinds == [("non_finite", "error"), ("exploding", "warning")]


# Vanishing through time


def decaying(n: int, T: int, reach: float) -> np.ndarray:
    """(n, T) norms of ∂L/∂s_t that fall geometrically from T back to 1, to this share."""
    return np.tile(reach ** np.linspace(1, 0, T), (n, 1))


def test_vanishing_names_its_layer_its_steps_and_its_reach():
    norms = np.concatenate([decaying(5, 8, 0.5), decaying(25, 8, 2e-6)])
    history = record([1.0] * 30, state_norms={"model/rnn": norms, "model/good": decaying(30, 8, 1)})
    finding = the_finding(history)
    assert (finding.kind, finding.severity) == ("vanishing_through_time", "warning")
    assert finding.where == "model/rnn"
    assert finding.steps == (FIRST + 5, FIRST + 29)
    assert "gets 2.0e-06 of the last step's gradient (less than 0.001)" in finding.evidence


@pytest.mark.parametrize(("reach", "found"), [(0.0, True), (9e-4, True), (1.1e-3, False)])
def test_the_reach_must_pass_the_threshold(reach, found):
    norms = decaying(12, 4, 0.5)
    norms[:, 0] = reach * norms[:, -1]
    assert bool(diagnose(record([1.0] * 12, state_norms={"rnn": norms}))) is found


def test_one_vanished_step_in_a_while_is_no_finding():
    norms = decaying(30, 6, 0.3)
    norms[::3, 0] = 0.0
    assert diagnose(record([1.0] * 30, state_norms={"rnn": norms})) == []


def test_sequences_of_varying_length_have_their_own_last_step():
    norms = decaying(20, 6, 0.5)
    norms[:, 3:] = np.nan  # As the record has rows of fewer steps.
    assert diagnose(record([1.0] * 20, state_norms={"rnn": norms})) == []
    norms[:, 0] = 1e-9
    assert the_finding(record([1.0] * 20, state_norms={"rnn": norms})).where == "rnn"


@pytest.mark.parametrize("T", [20, 100, 400])
def test_the_advised_cell_keeps_half_of_its_state(T):
    history = record([1.0] * 12, state_norms={"rnn": decaying(12, T, 1e-8)})
    advice = the_finding(history).advice
    layer = eval(advice, {"kerasgrad": kg, "units": 3})
    assert isinstance(layer, kg.layers.SimplifiedLSTM)
    layer.build((None, T, 2))
    (bias,) = re.findall(r"forget_bias=([\d.]+)", advice)
    # The advice rounds to a decimal, which is 0.05 · T · (1 - σ) = 0.035 in the exponent.
    assert (1 / (1 + math.exp(-float(bias)))) ** T == pytest.approx(0.5, abs=0.02)


# Clipping always


@pytest.mark.parametrize(("clipped", "found"), [(90, False), (91, True), (100, True)])
def test_clipping_always(clipped, found):
    factor = np.where(np.arange(100) < clipped, 0.5, 1.0)
    norms = np.linspace(3.0, 5.0, 100)
    findings = diagnose(record(norms, clip_factor=factor))
    assert bool(findings) is found
    if found:
        (finding,) = findings
        assert (finding.kind, finding.severity) == ("clipping_always", "warning")
        assert finding.where == "all weights"
        assert finding.steps == (FIRST, FIRST + clipped - 1)
        assert finding.evidence == (
            f"{clipped}% of the updates were clipped (more than 90%), with a median global norm "
            "of 4 before"
        )
        assert clipnorm_of(finding.advice) == 4.0


def test_only_updates_count_as_clipped_or_not():
    """With gradient accumulation nine of ten steps are no update: their factor is NaN."""
    updated = np.arange(100) % 10 == 9
    factor = np.where(updated, 0.5, np.nan)
    history = record([1.0] * 100, updated=updated, clip_factor=factor)
    assert the_finding(history).evidence.startswith("100% of the updates")


# The advice on clipping works as code


@pytest.mark.parametrize(
    "before", [{}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.1}], ids=str
)
def test_the_clipping_advice_works_on_a_compiled_model(before):
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.05, momentum=0.5, **before), loss="mse")
    advice = the_finding(record([2.0] * 20 + [900.0])).advice
    exec(advice, {"model": model})
    optimizer = model.optimizer
    assert type(optimizer) is keras.optimizers.SGD
    # Keras takes one kind of clipping at a time: the advice replaces what there was.
    assert (optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue) == (2.0, None, None)
    assert float(optimizer.learning_rate) == pytest.approx(0.05)
    assert optimizer.momentum == 0.5
    assert model.loss == "mse"


def test_the_advice_can_be_followed_where_nothing_can_be_measured():
    """Gradients of 0 (dead ReLUs) before a NaN: Keras refuses clipnorm=0."""
    for history in (record([0.0, 0.0, np.nan]), record([np.inf, 1.0])):
        clipnorm = clipnorm_of(the_finding(history).advice)
        assert keras.optimizers.SGD(clipnorm=clipnorm).clipnorm == 1.0


# Nothing wrong


def _steady_state(n):
    return {"state_norms": {"rnn": decaying(n, 10, 0.01)}}


HEALTHY = {
    "noise": lambda rng: record(rng.lognormal(0, 1, 1000)),
    "slow decay over three decades": lambda rng: record(
        np.logspace(2, -1, 1000) * rng.lognormal(0, 0.3, 1000)
    ),
    "slow rise over three decades": lambda rng: record(
        np.logspace(-3, 0, 1000) * rng.lognormal(0, 0.3, 1000)
    ),
    "large norms at the start": lambda rng: record([1e4, 5e3, 1e3, 100] + [1.0] * 300),
    "one clipped step in two": lambda rng: record(
        rng.lognormal(0, 0.5, 200), clip_factor=np.tile([1.0, 0.3], 100)
    ),
    "a gradient that fades but arrives": lambda rng: record([1.0] * 50, **_steady_state(50)),
    "one step": lambda rng: record([1e9]),
    "only zeros": lambda rng: record([0.0] * 50),
}


@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY.keys())
def test_a_healthy_training_has_no_findings(make):
    assert diagnose(make(np.random.default_rng(3))) == []


def test_an_empty_record_has_no_findings():
    assert diagnose(GradientHistory()) == []


def test_diagnose_changes_nothing():
    history = record([1.0] * 20 + [np.nan], state_norms={"rnn": decaying(21, 4, 1e-9)})
    before = history.norms.copy(), history.state_norms["rnn"].copy()
    assert diagnose(history) == diagnose(history)
    np.testing.assert_array_equal(history.norms, before[0])
    np.testing.assert_array_equal(history.state_norms["rnn"], before[1])


# Any history at all

values = st.one_of(st.sampled_from([0.0, 1.0, 1e-150, 1e150, np.inf, np.nan]), st.floats(1e-9, 1e9))


def table(draw, n, columns, elements=values):
    cells = draw(st.lists(elements, min_size=n * columns, max_size=n * columns))
    return np.array(cells, float).reshape(n, columns)


@st.composite
def histories(draw) -> GradientHistory:
    history = GradientHistory()
    for piece in range(draw(st.integers(0, 2))):
        n, W = draw(st.integers(0, 14)), draw(st.integers(0, 3))
        missing = table(draw, n, W, st.booleans()).astype(bool)
        history.append(
            weights=[f"w{i + piece}" for i in range(W)],
            step=100 * piece + np.arange(n),
            norms=np.where(missing, np.nan, table(draw, n, W)),
            missing=missing,
            loss=table(draw, n, 1)[:, 0],
            updated=table(draw, n, 1, st.booleans())[:, 0].astype(bool),
            clip_factor=table(draw, n, 1, st.sampled_from([0.1, 1.0, np.nan]))[:, 0],
            state_norms={
                layer: table(draw, n, draw(st.integers(1, 4)))
                for layer in draw(st.sets(st.sampled_from(["rnn", "rnn_1"])))
            },
        )
    return history


@given(histories())
@settings(max_examples=150, deadline=None)
def test_any_history_can_be_diagnosed(history):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # A NaN that numpy warns of would be printed at the user.
        findings = diagnose(history)
    for finding in findings:
        ast.parse(finding.advice)
        assert finding.severity in ("error", "warning")
        first, last = finding.steps
        assert first <= last and {first, last} <= set(history.step.tolist())
        if "clipnorm" in finding.advice:
            assert 0 < clipnorm_of(finding.advice) < np.inf
        assert "\n" not in str(finding)
    if not np.isfinite(np.where(history.missing, 0, history.norms)).all():
        assert findings[0].kind == "non_finite"
