"""Histories with one planted defect, of which the finding is known; and healthy ones, with none."""

from __future__ import annotations

import ast
import io
import math
import re
import warnings
from html.parser import HTMLParser

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import kerasgrad as kg
from kerasgrad import GradientHistory, diagnose
from kerasgrad.diagnosis import KINDS, PRESETS, Diagnosis, advice
from kerasgrad.diagnosis.gradients import _running_median
from kerasgrad.diagnosis.rules import RULES

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


def kinds(findings) -> set[str]:
    return {finding.kind for finding in findings}


def the_finding(history: GradientHistory) -> kg.Finding:
    (finding,) = diagnose(history)
    return finding


def clipnorm_of(advice: str) -> float:
    return float(re.search(r"global_clipnorm = (.+)", advice)[1])


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


def test_an_explosion_that_clipping_did_not_keep_off_calls_for_smaller_steps():
    norms = np.array([1.0] * 20 + [500.0, 900.0, 600.0])
    finding = the_finding(clipped_history(norms, 1.5))
    assert finding.kind == "exploding"
    assert "learning_rate = 0.1 *" in finding.advice


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


@pytest.mark.parametrize(
    ("before", "clipped_to"),
    [
        ([0.2, 0.3, 0.3, 0.4, 0.3, 0.3, 8.0], 0.3),  # It grew: back to the median,
        ([20.0, 30.0, 40.0, 90.0, 3e4, 6e5, 9e9], 1.0),  # but not to what may be too much already.
        ([2e5], 1.0),  # Far too large from the start.
        ([], 1.0),  # Nothing is known.
        ([0.2, 0.3, 0.3, 0.4, 0.3, 0.3, 2.0], None),  # Without notice: an example of the data.
        ([2.0], None),
    ],
)
def test_what_grew_before_it_was_nan_is_clipped_and_else_the_data_are_looked_at(before, clipped_to):
    finding = diagnose(record([*before, np.nan]))[0]
    if clipped_to is None:
        assert finding.advice == advice.FINITE_EXAMPLES
    else:
        assert clipnorm_of(finding.advice) == clipped_to


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


def test_a_step_that_a_loss_scale_optimizer_skipped_is_no_fault():
    norms = np.array([np.inf, np.nan, *[1.0] * 20])
    assert diagnose(record(norms, updated=np.isfinite(norms), loss=np.ones(22))) == []
    loss = np.where(np.arange(22) == 1, np.nan, 1.0)  # But a loss that is NaN is.
    assert the_finding(record(norms, updated=np.isfinite(norms), loss=loss)).where == "loss"


def test_the_gravest_comes_first():
    norms = [1.0] * 20 + [1000.0, np.nan]
    found = [(f.kind, f.severity) for f in diagnose(record(norms))]
    assert found == [("non_finite", "error"), ("exploding", "warning")]


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


def losses(first, last, n=50):
    """n losses that stay at the first for half of the training, and then at the last."""
    return np.where(np.arange(n) < n // 2, first, last)


@pytest.mark.parametrize(
    ("first", "last", "found"),
    [(1.0, 0.51, True), (1.0, 0.49, False), (-2.0, -2.9, True), (-2.0, -3.1, False)],
)
def test_what_vanishes_in_a_training_that_learns_is_no_fault(first, last, found):
    norms = decaying(50, 8, 1e-9)
    history = record([1.0] * 50, state_norms={"rnn": norms}, loss=losses(first, last))
    assert ("vanishing_through_time" in kinds(diagnose(history))) is found


def test_a_training_that_ends_in_nan_does_not_learn():
    loss = np.append(losses(1.0, 0.1, 49), np.nan)
    history = record([1.0] * 50, state_norms={"rnn": decaying(50, 8, 1e-9)}, loss=loss)
    assert "vanishing_through_time" in kinds(diagnose(history))


def test_vanishing_is_seen_by_the_probe_where_the_layer_records_nothing():
    history = record([1.0] * 30)
    for step in (510, 520, 530):
        history.append_probe(
            step=step, state_norms={"lstm:h": [1e-9, 0.1, 1.0], "lstm:c": [1e-8, 0.1, 1.0]}
        )
    finding = the_finding(history)
    assert (finding.kind, finding.where) == ("vanishing_through_time", "lstm")
    assert finding.steps == (510, 530)
    assert "gets 1.0e-08 of" in finding.evidence  # What carries most of it.
    # A state "c" is that of an LSTM, whose forget gate is to be opened.
    assert "bias[cell.units : 2 * cell.units] = 1.47" in finding.advice


def test_one_state_that_carries_the_gradient_is_enough():
    history = record([1.0] * 30)
    history.append_probe(step=1, state_norms={"lstm:h": [0.0, 1.0], "lstm:c": [0.5, 1.0]})
    assert diagnose(history) == []


def test_the_record_of_the_steps_goes_before_the_probe():
    history = record([1.0] * 30, state_norms={"rnn": decaying(30, 4, 0.5)})
    history.append_probe(step=1, state_norms={"rnn:h": [0.0, 1.0]})
    assert diagnose(history) == []


# Clipping always


def clipped_history(norms, thresholds, name="global_clipnorm", **columns):
    """What Keras's clipping leaves of two gradients that are 0.6 and 0.8 of these norms."""
    before = np.outer(norms, (0.6, 0.8))
    thresholds = np.broadcast_to(thresholds, len(before))[:, np.newaxis]
    whole = np.asarray(norms)[:, np.newaxis] if name == "global_clipnorm" else before
    factors = np.minimum(1, thresholds / whole) * np.ones((1, 2))
    return record(norms, applied_norms=before * factors, clip_factor=factors.min(axis=1), **columns)


@pytest.mark.parametrize(("clipped", "found"), [(90, False), (91, True), (100, True)])
def test_clipping_always(clipped, found):
    norms = np.linspace(3.0, 5.0, 100)
    thresholds = np.where(np.arange(100) < clipped, 0.02 * norms, np.inf)
    findings = diagnose(clipped_history(norms, thresholds))
    assert bool(findings) is found
    if found:
        (finding,) = findings
        assert (finding.kind, finding.severity) == ("clipping_always", "warning")
        assert finding.where == "all weights"
        assert finding.steps == (FIRST, FIRST + clipped - 1)
        assert finding.evidence == (
            f"{clipped}% of the updates were clipped (more than 90%), in the median to 0.02 of the "
            "global norm of 4 (less than 0.1)"
        )
        assert clipnorm_of(finding.advice) == 4.0


@pytest.mark.parametrize(("kept", "found"), [(0.09, True), (0.11, False)])
def test_steps_that_are_clipped_a_little_are_no_fault(kept, found):
    norms = np.linspace(3.0, 5.0, 100)
    assert ("clipping_always" in kinds(diagnose(clipped_history(norms, kept * norms)))) is found


def test_only_updates_count_as_clipped_or_not():
    """With gradient accumulation nine of ten steps are no update: their factor is NaN."""
    updated = np.arange(100) % 10 == 9
    factor = np.where(updated, 0.05, np.nan)
    history = record(
        [1.0] * 100,
        updated=updated,
        clip_factor=factor,
        applied_norms=np.outer(factor, (0.6, 0.8)),
    )
    assert the_finding(history).evidence.startswith("100% of the updates")


# A threshold far from the usual norm


@pytest.mark.parametrize("name", ["global_clipnorm", "clipnorm"])
@pytest.mark.parametrize(
    ("threshold", "found"),
    # Of 100 norms around 4, of which each tenth is 400: the median is 4.
    [(1.9, True), (2.1, False), (39.0, False), (41.0, True)],
)
def test_a_threshold_from_half_to_ten_times_the_median_norm_is_near(name, threshold, found):
    norms = np.where(np.arange(100) % 10 == 5, 400.0, 4.0 + 0.01 * np.sin(np.arange(100)))
    if name == "clipnorm":
        threshold *= 0.8  # of the larger of the two weights' gradients
    findings = diagnose(clipped_history(norms, threshold, name))
    assert kinds(findings) == ({"clip_threshold_far"} if found else set())
    if found:
        (finding,) = findings
        assert f"{name}={threshold:.2g} is " in finding.evidence
        assert "Pascanu" in finding.threshold_source
        assert clipnorm_of(finding.advice) == pytest.approx(4.0, rel=0.01)


def test_a_far_threshold_in_a_training_that_learns_is_no_fault():
    norms = np.where(np.arange(50) % 10 == 5, 400.0, 4.0)
    assert diagnose(clipped_history(norms, 41.0, loss=losses(1.0, 0.1))) == []


def test_a_threshold_that_the_record_does_not_tell_is_not_judged():
    diagnosis = diagnose(record([4.0] * 100))
    assert diagnosis.not_looked_for["clip_threshold_far"].startswith("needs model=")
    # clipvalue leaves another norm each time.
    norms = np.linspace(3, 5, 100)
    history = clipped_history(norms, 0.2 * norms)
    assert "clip_threshold_far" in diagnose(history).not_looked_for


# Loss spikes


def noisy_losses(n=200, seed=0):
    return np.exp(0.1 * np.random.default_rng(seed).normal(size=n))


def test_a_spike_stands_out_of_the_losses_before_it():
    loss = noisy_losses()
    loss[[80, 120, 160]] = 5.0, 9.0, 5.0
    finding = the_finding(record([1.0] * 200, loss=loss))
    assert (finding.kind, finding.where) == ("loss_spikes", "loss")
    assert finding.steps == (FIRST + 80, FIRST + 160)
    before = np.log(loss[70:120])
    median = np.median(before)
    times = (np.log(9.0) - median) / np.median(np.abs(before - median))
    assert finding.evidence == (
        f"3 of 200 losses stand out, most at step 620: 9, {times:.2g} times the usual deviation "
        "above the median of the 50 before (more than 15)"
    )


@pytest.mark.parametrize(
    "loss",
    [
        noisy_losses(),
        noisy_losses() * np.logspace(0, -4, 200),
        np.logspace(0, -6, 200),
        np.full(200, 0.3),
        np.exp(1.5 * np.random.default_rng(1).normal(size=200)) * 1e-3,  # near 0, by factors
        noisy_losses() - 5.0,  # as of a density
    ],
    ids=["noise", "falling noise", "falling", "constant", "wide", "negative"],
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_ordinary_losses_have_no_spike(loss, scale):
    assert diagnose(record([1.0] * 200, loss=scale * loss)) == []


def test_a_constant_loss_has_a_spike_only_if_it_is_half_as_high_again():
    for height, found in ((1.4, False), (1.6, True)):
        loss = np.ones(100)
        loss[[60, 80]] = height
        assert bool(diagnose(record([1.0] * 100, loss=loss))) is found


def test_the_running_median_is_that_of_the_50_before():
    values = np.random.default_rng(0).normal(size=10_200)
    median, deviation = _running_median(values)
    assert np.isnan(median[:10]).all()
    for i in (10, 11, 49, 50, 51, 9_999, 10_050, 10_051, 10_199):
        before = values[max(0, i - 50) : i]
        assert median[i] == np.median(before)
        assert deviation[i] == np.median(np.abs(before - np.median(before)))
    assert all(np.isnan(part).all() for part in _running_median(values[:9]))


def test_one_spike_is_none():
    loss = noisy_losses()
    loss[100] = 1e6
    assert diagnose(record([1.0] * 200, loss=loss)) == []


def test_spikes_that_pass_are_sought_in_the_data_and_lasting_ones_in_the_step():
    passing, lasting = noisy_losses(), noisy_losses()
    passing[[100, 150]] = 20.0
    lasting[100:120] = 20.0
    assert "keep" in the_finding(record([1.0] * 200, loss=passing)).advice
    assert "learning_rate" in the_finding(record([1.0] * 200, loss=lasting)).advice


def test_the_advice_on_data_keeps_what_is_usual():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(200, 3)), np.eye(3)[rng.integers(3, size=200)]], axis=1)
    y = rng.normal(size=(200, 1))
    x[3, 0], y[5, 0] = 1e4, -1e3
    names = {"x": x, "y": y}
    exec(advice.USUAL_EXAMPLES, names)
    expected = np.delete(np.arange(200), [3, 5])
    np.testing.assert_array_equal(names["x"], x[expected])
    np.testing.assert_array_equal(names["y"], y[expected])
    rare = (rng.random((200, 1)) < 0.02).astype(float)  # Rare labels are no outliers.
    names = {"x": x[expected], "y": rare[expected]}
    exec(advice.USUAL_EXAMPLES, names)
    assert len(names["y"]) == 198


# Vanishing through depth


def layered(firsts, lasts, biases=0.5, **columns):
    """The kernels of three layers, and a bias."""
    n = len(firsts)
    history = GradientHistory()
    history.append(
        weights=["m/first/kernel", "m/middle/kernel", "m/last/kernel", "m/last/bias"],
        step=FIRST + np.arange(n),
        norms=np.column_stack([firsts, np.full(n, 1e-3), lasts, np.full(n, biases)]),
        **columns,
    )
    return history


@pytest.mark.parametrize(("first", "found"), [(0.9e-3, True), (1.1e-3, False)])
def test_the_first_kernel_must_have_a_thousandth_of_the_gradient(first, found):
    # sqrt(0.6² + 0.8²) = 1
    findings = diagnose(layered(np.full(20, first), np.full(20, 0.6), 0.8))
    assert kinds(findings) == ({"vanishing_through_depth"} if found else set())
    if found:
        assert findings[0].where == "m/first/kernel"
        assert findings[0].steps == (FIRST, FIRST + 19)
        assert "gradient norm is 9.0e-04 of the global norm (less than 0.001)" in str(findings[0])
        assert "β1" in findings[0].threshold_source


def test_a_first_kernel_without_gradient_in_a_few_steps_is_no_fault():
    firsts = np.where(np.arange(20) < 9, 0.0, 1.0)
    assert diagnose(layered(firsts, np.ones(20))) == []
    assert diagnose(layered(np.full(50, 1e-9), np.ones(50), loss=losses(1.0, 0.1))) == []


@pytest.mark.parametrize("weights", ["a/kernel a/recurrent_kernel", "a/kernel b/kernel b/bias"])
def test_two_layers_have_no_depth(weights):
    history = GradientHistory()
    weights = weights.split()
    norms = np.tile([1e-9, *np.ones(len(weights) - 1)], (20, 1))
    history.append(weights=weights, step=range(20), norms=norms)
    assert diagnose(history) == []


# Updates


def updated_history(ratios, *, norms=1.0, counts=1):
    """Two weights of norm 3 and 4, moved in equal shares, by these parts of the norm of both."""
    history = record([norms] * 40)
    for i, ratio in enumerate(ratios):
        history.append_updates(
            step=FIRST + 10 * i,
            weights=history.weights,
            update_norms=5 * np.asarray(ratio) * np.array([0.6, 0.8]),
            weight_norms=[3.0, 4.0],
            update_count=counts,
        )
    return history


@pytest.mark.parametrize(
    ("ratios", "kind"),
    [
        ([0.51, 1e-3, 1e-3], "updates_too_large"),
        ([0.49, 0.49, 0.49], None),
        ([0.9e-5, 1e-7, 0.0], "updates_too_small"),
        ([1.1e-5, 1e-7, 0.0], None),
        ([0.0, 0.0, 0.0], "unchanged_weights"),
        ([0.0, 1e-3, 1e-3], None),  # a warm-up
        ([7.0], None),  # One sample is too few.
    ],
)
def test_updates_against_weights(ratios, kind):
    history = updated_history(ratios)
    diagnosis = diagnose(history)
    assert kinds(diagnosis) == ({kind} if kind else set())
    if kind:
        assert diagnosis[0].where == "all weights"
        assert diagnosis[0].steps == (FIRST, FIRST + 20)
    assert ("updates_too_large" in diagnosis.looked_for) is (len(ratios) > 1)


def test_an_update_counts_its_part_of_several():
    assert kinds(diagnose(updated_history([1.0, 1.0], counts=4))) == set()
    assert kinds(diagnose(updated_history([3.0, 3.0], counts=4))) == {"updates_too_large"}


@pytest.mark.parametrize(("ratio", "factor"), [(1e-6, 1e3), (2e-8, 1e5), (1.0, 1e-3), (40.0, 1e-5)])
def test_the_advised_rate_takes_the_updates_to_a_thousandth(ratio, factor):
    (finding,) = diagnose(updated_history([ratio] * 3))
    advised = float(re.search(r"learning_rate = (\S+) \*", finding.advice)[1])
    assert advised == pytest.approx(factor)
    assert "CS231n" in finding.threshold_source


def test_weights_that_stay_the_same_are_named():
    history = updated_history([(0.0, 1e-3)] * 3)
    finding = the_finding(history)
    assert (finding.kind, finding.where) == ("unchanged_weights", "model/w0")
    assert finding.evidence == (
        "1 of 2 weights were moved by no more than 0 of their norm in each of 3 sampled updates, "
        "though they have gradients"
    )
    assert "learning_rate" in finding.advice


def test_weights_without_gradient_are_drawn_anew():
    history = updated_history([0.0] * 3, norms=0.0)
    finding = the_finding(history)
    assert finding.evidence.endswith("and have no gradient but 0")
    assert "'model/w0'" in finding.advice and "'model/w1'" in finding.advice


# The thresholds of others


def test_smdebug_judges_by_its_own_rules():
    vanished = layered(np.full(20, 0.9e-7), np.ones(20))
    (finding,) = diagnose(vanished, preset="smdebug")
    assert (finding.kind, finding.where) == ("vanishing_through_depth", "m/first/kernel")
    assert "VanishingGradient" in finding.threshold_source
    # Relative to the others it is nothing, and to SageMaker's rule it is enough.
    assert diagnose(layered(np.full(20, 1.1e-7), np.ones(20)), preset="smdebug") == []
    for ratio, kind in [
        (11.0, {"updates_too_large"}),
        (9.0, set()),
        (0.9e-8, {"updates_too_small", "unchanged_weights"}),
        (0.9e-5, {"unchanged_weights"}),
        (1.1e-5, set()),
    ]:
        found = diagnose(updated_history([ratio] * 3), preset="smdebug")
        assert kinds(found) == kind, ratio
        assert all("SageMaker" in finding.threshold_source for finding in found)


@pytest.mark.parametrize(
    ("first", "last", "kind"),
    [
        (0.9e-4, 0.1, {"vanishing_through_depth"}),
        (1.1e-4, 1.0, set()),  # β2: not small in itself
        (0.9e-4, 0.08, set()),  # β1: more than a thousandth
        (71.0, 1.0, {"exploding"}),
        (69.0, 1.0, set()),
    ],
)
def test_autotrainer_judges_by_its_own_parameters(first, last, kind):
    history = layered(np.full(50, first), np.full(50, last))
    assert kinds(diagnose(history, preset="autotrainer")) == kind
    learning = layered(np.full(50, first), np.full(50, last), loss=losses(1.0, 0.1))
    assert diagnose(learning, preset="autotrainer") == []


def test_a_preset_looks_for_the_kinds_that_its_tool_has():
    history = record([1.0] * 30, loss=np.ones(30), state_norms={"rnn": decaying(30, 4, 1e-9)})
    for preset, own in {
        "kerasgrad": set(KINDS),
        "smdebug": {
            *("non_finite", "vanishing_through_depth", "unchanged_weights", "dead_relu_units"),
            *("saturated_activations", "updates_too_large", "updates_too_small"),
        },
        "autotrainer": {
            *("non_finite", "exploding", "vanishing_through_depth", "dead_relu_units"),
        },
    }.items():
        diagnosis = diagnose(history, preset=preset)
        assert diagnosis.preset == preset
        assert {*diagnosis.looked_for, *diagnosis.not_looked_for} == own


# What is asked for wrongly


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="one of kerasgrad, smdebug, autotrainer"):
        diagnose(GradientHistory(), preset="mine")


def test_data_without_a_model_is_refused():
    with pytest.raises(ValueError, match="without model"):
        diagnose(GradientHistory(), x=np.ones((2, 2)))


# The advice works as code


def dense_model(optimizer, **kwargs):
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2, name="dense")])
    model.compile(optimizer, loss="mse", **kwargs)
    return model


def one_step(model):
    """How far one step of fit moved the kernel."""
    before = model.get_layer("dense").kernel.numpy()
    model.fit(np.ones((4, 3)), 100 * np.ones((4, 2)), verbose=0)
    return np.linalg.norm(model.get_layer("dense").kernel.numpy() - before)


@pytest.mark.parametrize(
    "before", [{}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.1}], ids=str
)
def test_the_clipping_advice_works_on_a_compiled_model(before):
    model = dense_model(keras.optimizers.SGD(0.05, **before), metrics=["mae"])
    one_step(model)  # So that a train step is compiled, with the old clipping in it.
    exec(the_finding(record([2.0] * 20 + [900.0])).advice, {"model": model})
    optimizer = model.optimizer
    # Keras takes one kind of clipping at a time: the advice replaces what there was.
    assert (optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue) == (None, 2.0, None)
    # Of 2, the kernel's three equal rows have √3/2, and the bias the rest.
    assert one_step(model) == pytest.approx(0.05 * 2.0 * math.sqrt(3) / 2, rel=1e-4)
    assert "mae" in model.get_metrics_result()


def test_the_clipping_advice_reaches_through_a_loss_scale():
    inner = keras.optimizers.SGD(0.05)
    model = dense_model(keras.optimizers.LossScaleOptimizer(inner))
    exec(advice.clip_at(3.0), {"model": model})
    assert inner.global_clipnorm == 3.0


def test_the_advice_can_be_followed_where_nothing_can_be_measured():
    """Gradients of 0 (dead ReLUs) before a NaN: Keras refuses clipnorm=0."""
    for history in (record([0.0, 0.0, 5e4, np.nan]), record([np.inf, 1.0])):
        clipnorm = clipnorm_of(the_finding(history).advice)
        assert keras.optimizers.SGD(global_clipnorm=clipnorm).global_clipnorm == 1.0


def test_the_advice_on_the_learning_rate_works_with_and_without_schedule():
    model = dense_model(keras.optimizers.Adam(0.5))
    exec(advice.scale_learning_rate(0.1), {"model": model})
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.9)
    model = dense_model(keras.optimizers.Adam(schedule, beta_1=0.8))
    exec(advice.scale_learning_rate(0.1, now=0.5, has_schedule=True), {"model": model})
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)
    assert model.optimizer.beta_1 == 0.8


@pytest.mark.parametrize("T", [20, 100, 400])
def test_the_advised_cell_keeps_half_of_its_state(T):
    model = keras.Sequential(
        [
            keras.layers.Input((T, 2)),
            keras.layers.SimpleRNN(3, return_sequences=True, name="rnn"),
            keras.layers.Dense(1, name="head"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.05, momentum=0.5), loss="mae")
    names = {"model": model}
    history = record([1.0] * 12, state_norms={"sequential/rnn": decaying(12, T, 1e-8)})
    exec(the_finding(history).advice, names)
    changed = names["model"]
    layer = changed.layers[0]
    assert isinstance(layer, kg.layers.SimplifiedLSTM)
    assert changed.output_shape == (None, T, 1)
    assert changed.layers[1].get_config() == model.layers[1].get_config()
    assert (changed.loss, changed.optimizer.momentum) == ("mae", 0.5)
    assert changed.optimizer is not model.optimizer
    # With an input of 0 the gate is σ(bias), and T of them keep a half.
    gates = kg.bptt.gates(layer, np.zeros((1, T, 2)))["forget"][0, :, 0]
    assert np.prod(gates.astype(float)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("cell", "layer"),
    [
        ("lstm", lambda: keras.layers.LSTM(3, name="rnn")),
        ("gru", lambda: keras.layers.GRU(3, name="rnn")),
        ("gru", lambda: keras.layers.GRU(3, reset_after=False, name="rnn")),
        ("simplified_lstm", lambda: kg.layers.SimplifiedLSTM(3, project_input=True, name="rnn")),
    ],
)
def test_the_advised_forget_bias_keeps_half_of_the_state(cell, layer):
    T = 50
    layer = layer()
    model = keras.Sequential([keras.layers.Input((T, 2)), layer])
    before = [np.copy(w) for w in layer.get_weights()]
    exec(advice.forget_bias("model.get_layer('rnn')", cell, T), {"model": model})
    # Only the gate's own bias is another.
    changed = sum(np.sum(a != b) for a, b in zip(before, layer.get_weights(), strict=True))
    assert changed in (3, 6)  # With reset_after a GRU has two biases.
    gates = kg.bptt.gates(model, np.zeros((1, T, 2)))
    gate = gates.get("forget", gates.get("update"))
    # h is not 0 in later steps, so the first step alone has σ(bias).
    assert float(gate[0, 0, 0]) ** T == pytest.approx(0.5, abs=0.02)


def test_layers_are_normalized_in_a_fresh_copy():
    inputs = keras.layers.Input((4,))
    hidden = keras.layers.Dense(6, activation="tanh", name="hidden")(inputs)
    hidden = keras.layers.Dropout(0.1)(hidden)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))
    model.compile("adam", loss="mse")
    names = {"model": model}
    exec(advice.NORMALIZED_LAYERS, names)
    copy = names["model"]
    names = [type(layer).__name__ for layer in copy._flatten_layers(include_self=False)]
    assert names.count("LayerNormalization") == 1 and names.count("Dense") == 2
    assert copy.loss == "mse" and copy.predict(np.ones((3, 4)), verbose=0).shape == (3, 2)


def test_weights_are_drawn_anew_by_their_paths():
    model = keras.Sequential(
        [keras.layers.Input((5, 2)), keras.layers.SimpleRNN(4, name="rnn"), keras.layers.Dense(1)]
    )
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, 7.0))
    kernel, recurrent_kernel, bias, head, _ = model.trainable_variables
    exec(advice.drawn_anew([kernel.path, recurrent_kernel.path, bias.path]), {"model": model})
    assert np.abs(kernel).max() <= math.sqrt(6 / (2 + 4))  # Glorot's bound
    np.testing.assert_allclose(
        recurrent_kernel @ tf.transpose(recurrent_kernel), np.eye(4), atol=1e-5
    )
    assert (np.asarray(bias) == 7).all() and (np.asarray(head) == 7).all()


def test_examples_that_are_not_finite_are_left_out():
    x, y = np.ones((5, 3, 2)), np.ones((5, 1))
    x[1, 2, 0], y[4, 0] = np.nan, np.inf
    names = {"x": x, "y": y}
    exec(advice.FINITE_EXAMPLES, names)
    assert names["x"].shape == (3, 3, 2) and names["y"].shape == (3, 1)


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


def random_history(seed) -> GradientHistory:
    """Of any length, with any of the numbers that a training can yield, in any of its parts."""
    rng = np.random.default_rng(seed)
    special = [0.0, 1.0, 1e-150, 1e150, np.inf, np.nan]

    def table(n, columns):
        ordinary = 10 ** rng.uniform(-9, 9, (n, columns))
        is_special = rng.random((n, columns)) < rng.choice([0.0, 0.1, 1.0])
        return np.where(is_special, rng.choice(special, (n, columns)), ordinary)

    history = GradientHistory()
    for piece in range(rng.integers(3)):
        n, W = rng.choice([0, 1, 14, 70]), rng.integers(4)
        missing = rng.random((n, W)) < rng.choice([0.0, 0.3])
        history.append(
            weights=[f"layer_{i + piece}/kernel" for i in range(W)],
            step=100 * piece + np.arange(n),
            norms=np.where(missing, np.nan, table(n, W)),
            applied_norms=table(n, W),
            missing=missing,
            loss=rng.choice([-1, 1]) * table(n, 1)[:, 0],
            updated=rng.random(n) < rng.choice([0.5, 1.0]),
            clip_factor=rng.choice([0.1, 1.0, np.nan], n),
            state_norms={f"rnn_{i}": table(n, rng.integers(1, 5)) for i in range(rng.integers(3))},
        )
        for sample in range(rng.integers(4)):
            history.append_updates(
                step=100 * piece + sample,
                weights=[f"layer_{i}/kernel" for i in range(W)],
                update_norms=table(1, W)[0],
                weight_norms=table(1, W)[0],
                update_count=int(rng.integers(1, 4)),
            )
        if rng.random() < 0.5:
            probed = {"rnn_9:h": table(1, 3)[0], "rnn_9:c": table(1, 3)[0]}
            history.append_probe(step=100 * piece, state_norms=probed)
    return history


def diagnose_without_warning(history, preset="kerasgrad") -> Diagnosis:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # A NaN that numpy warns of would be printed at the user.
        return diagnose(history, preset=preset)


@given(st.integers(0, 10**9), st.sampled_from(PRESETS))
@settings(max_examples=200, deadline=None)
def test_any_history_can_be_diagnosed(seed, preset):
    history = random_history(seed)
    diagnosis = diagnose_without_warning(history, preset)
    for finding in diagnosis:
        ast.parse(finding.advice)
        assert finding.kind in diagnosis.looked_for
        assert finding.severity in ("error", "warning")
        first, last = finding.steps
        steps = {*history.step, *history.update_step, *history.probe_step}
        assert first <= last and {first, last} <= steps
        if "global_clipnorm" in finding.advice:
            assert 0 < clipnorm_of(finding.advice) < np.inf
        assert "\n" not in str(finding)
    counts = history.updated[:, np.newaxis] & ~history.missing
    if not np.isfinite(np.where(counts, history.norms, 0)).all():
        assert diagnosis[0].kind == "non_finite"
    order = [(f.severity != "error", KINDS.index(f.kind)) for f in diagnosis]
    assert order == sorted(order)
    for text in (str(diagnosis), diagnosis._repr_html_()):
        assert all(finding.title in text for finding in diagnosis)


@given(st.integers(0, 10**6), st.floats(1e-12, 1e12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_healthy_record_is_healthy_on_any_scale(seed, scale, clipped_to):
    """The loss in another unit: nothing relative changes, whatever its gradients are."""
    rng = np.random.default_rng(seed)
    n = 120
    norms = np.logspace(0.5, -0.5, n) * rng.lognormal(0, 0.3, n) * scale
    thresholds = clipped_to * scale if clipped_to else np.inf
    loss = np.logspace(0, -1, n) * rng.lognormal(0, 0.1, n)
    history = clipped_history(
        norms, thresholds, loss=scale * loss, state_norms={"rnn": scale * decaying(n, 9, 0.01)}
    )
    for step in (FIRST, FIRST + 60):
        history.append_updates(
            step=step, weights=history.weights, update_norms=[3e-3, 1e-3], weight_norms=[1.0, 2.0]
        )
    assert diagnose_without_warning(history) == []


# How it is told


def test_a_diagnosis_is_a_list_that_prints_itself():
    norms = [1.0] * 20 + [1000.0, np.nan]
    history = record(norms, state_norms={"model/<rnn>": decaying(22, 4, 1e-9)})
    diagnosis = diagnose(history)
    assert isinstance(diagnosis, list) and len(diagnosis) == 3
    assert diagnosis == list(diagnosis)
    text = str(diagnosis).splitlines()
    for finding in diagnosis:
        assert str(finding) in text
        start = text.index(str(finding)) + 1
        assert text[start] == f"    threshold: {finding.threshold_source}; try:"
        code = finding.advice.splitlines()
        assert [line[8:] for line in text[start + 1 : start + 1 + len(code)]] == code
    assert text[-1] == "not looked for (needs model=): clipping never"


def test_rich_prints_all_of_it():
    console = Console(width=100, file=io.StringIO())
    diagnosis = diagnose(record([1.0] * 20 + [np.nan]))
    console.print(diagnosis)
    printed = console.file.getvalue()
    assert diagnosis[0].title in printed and diagnosis[0].advice.splitlines()[-1] in printed
    assert "not looked for (needs model= and x=): dead ReLU units" in printed


def test_a_notebook_shows_a_table_of_it():
    history = record([1.0] * 20, state_norms={"model/<rnn>": decaying(20, 4, 1e-9)})
    page = diagnose(history)._repr_html_()
    parser = HTMLParser()
    seen = []
    parser.handle_starttag = lambda tag, attributes: seen.append(tag)
    parser.feed(page)
    assert seen.count("tr") == 2 and seen.count("th") == 4 and "rnn" not in seen
    assert "model/&lt;rnn&gt;" in page


def test_nothing_found_says_what_was_looked_for():
    text = str(diagnose(record([1.0] * 50, loss=np.ones(50)))).splitlines()
    assert text[0] == "nothing found"
    assert text[1].startswith("looked for: non finite, exploding, loss spikes, ")
    lacking = "not looked for (needs model= and x=): dead ReLU units, saturated activations, "
    assert f"{lacking}forget bias too low" in text
    assert str(Diagnosis()) == "nothing found"


def test_every_kind_has_a_threshold_with_a_source_in_each_preset_that_has_it():
    for rule in RULES:
        assert rule.kind in KINDS and rule.preset in PRESETS
        assert rule.look.__doc__ and rule.source
        assert rule.threshold >= 0
    assert {rule.kind for rule in RULES if rule.preset == "kerasgrad"} == set(KINDS)
    sources = {rule.preset: set() for rule in RULES}
    for rule in RULES:
        sources[rule.preset].add(rule.source.partition(",")[0].partition(" (")[0])
    assert sources["smdebug"] == {"Amazon SageMaker Debugger"}
    assert sources["autotrainer"] == {"AutoTrainer"}
