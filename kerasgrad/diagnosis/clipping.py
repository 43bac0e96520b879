"""Clipping: always, never, or at a threshold that is far from the usual norm."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kerasgrad.diagnosis import advice
from kerasgrad.diagnosis.finding import CONVENTION, Finding
from kerasgrad.diagnosis.rules import Case, Rule, rule
from kerasgrad.diagnosis.sources import PASCANU
from kerasgrad.history import GradientHistory

LEAST_UPDATES = 50  # before clipping counts as never active
ALWAYS = 0.9  # share of the updates
LEAST_SHARE = 0.5  # of the usual norm: a threshold below is far


@rule("clipping_always", needs=["rows"], kerasgrad=(0.1, CONVENTION))
def clipping_always(case: Case, rule: Rule) -> Iterator[Finding]:
    """More than 90 % of the updates were clipped, in the median to less than a tenth.

    Clipping each step to a third or so is no fault: it is a step of fixed length.
    """
    history = case.history
    kept = _kept(history)
    if history.clip_rate > ALWAYS and kept < rule.threshold:
        usual = _usual_norm(history)
        yield rule.finding(
            "all weights",
            case.steps(np.flatnonzero(history.clipped)),
            f"{history.clip_rate:.0%} of the updates were clipped (more than {ALWAYS:.0%}), in the "
            f"median to {kept:.2g} of the global norm of {usual:.2g} (less than "
            f"{rule.threshold:g})",
            advice.clip_at(usual),
        )


@rule("clip_threshold_far", needs=["rows", "clip_threshold"], kerasgrad=(10.0, PASCANU))
def clip_threshold_far(case: Case, rule: Rule) -> Iterator[Finding]:
    """A threshold below half of the usual norm, or above ten times it and yet active.

    In a training that does not learn. The usual norm is the median, which a few exploded steps do
    not move as they do a mean. What clips each step to almost nothing, or none at all, is a kind of
    its own.
    """
    history = case.history
    name, threshold = case.clip_threshold
    always = history.clip_rate > ALWAYS and _kept(history) < 0.1
    if case.learns or always or not history.clip_rate > 0:
        return
    usual = _usual_norm(history, name)
    # A bound on each number may well be small beside the norm of all.
    least = 0 if name == "clipvalue" else LEAST_SHARE
    if not (usual > 0 and threshold > 0) or least <= threshold / usual <= rule.threshold:
        return
    yield rule.finding(
        "all weights",
        case.steps(np.flatnonzero(history.clipped)),
        f"{name}={threshold:.2g} is {threshold / usual:.2g} times the median norm of {usual:.2g} "
        f"before clipping (not in {LEAST_SHARE:g} to {rule.threshold:g})",
        advice.clip_at(_usual_norm(history)),
    )


@rule("clipping_never", needs=["rows", "model"], kerasgrad=(10.0, PASCANU))
def clipping_never(case: Case, rule: Rule) -> Iterator[Finding]:
    """A threshold above ten times the usual norm, at which no update was clipped."""
    history = case.history
    name, threshold = case.clip_threshold
    updates = np.count_nonzero(history.updated)
    usual = _usual_norm(history, name)
    if history.clipped.any() or updates < LEAST_UPDATES or not usual > 0:
        return
    if threshold > rule.threshold * usual:
        yield rule.finding(
            "all weights",
            case.steps(np.flatnonzero(history.updated)),
            f"{name}={threshold:.2g} clipped none of {updates} updates: it is "
            f"{threshold / usual:.2g} times the median norm of {usual:.2g} "
            f"(more than {rule.threshold:g})",
            # Out of the way of usual steps, and there when one explodes.
            advice.clip_at(2 * _usual_norm(history)),
        )


def _kept(history: GradientHistory) -> float:
    """The median of how much clipping left of the whole gradient's norm."""
    kept = history.applied_global_norm / history.global_norm
    kept = kept[np.isfinite(kept)]
    return float(np.median(kept)) if len(kept) else np.nan


def _usual_norm(history: GradientHistory, name: str = "global_clipnorm") -> float:
    """The median of the finite norms that this kind of clipping compares with its threshold."""
    norms = history.global_norm
    if name == "clipnorm" and history.norms.shape[1]:
        # Per weight: the largest gradient is the one that is clipped first.
        norms = np.max(np.where(history.missing, 0, history.norms), axis=1)
    finite = norms[np.isfinite(norms)]
    return float(np.median(finite)) if len(finite) else np.nan
