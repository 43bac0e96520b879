"""Updates against weights: none, too small, too large."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kerasgrad.diagnosis import advice
from kerasgrad.diagnosis.finding import CONVENTION, Finding
from kerasgrad.diagnosis.rules import Case, Rule, rule
from kerasgrad.diagnosis.sources import KARPATHY, smdebug


@rule(
    "unchanged_weights",
    needs=["updates"],
    kerasgrad=(0.0, CONVENTION),
    smdebug=(1e-5, smdebug("UnchangedTensor", "rtol = 1e-5 in 3 saved steps, here by norm")),
)
def unchanged_weights(case: Case, rule: Rule) -> Iterator[Finding]:
    """Trainable weights that no sampled update moved: ‖Δw‖ <= threshold · ‖w‖."""
    history = case.history
    known = np.isfinite(history.update_norms) & np.isfinite(history.weight_norms)
    norms = np.where(known, history.weight_norms, 0)
    still = known & (history.update_norms <= rule.threshold * norms)
    least = 3 if rule.preset == "smdebug" else 2
    unchanged = [
        weight
        for weight, still_w, known_w in zip(history.weights, still.T, known.T, strict=True)
        if known_w.sum() >= least and still_w.sum() == known_w.sum()
    ]
    if not unchanged:
        return
    every = len(unchanged) == known.any(axis=0).sum()
    columns = [history.weights.index(weight) for weight in unchanged]
    gradients = np.where(history.missing, 0, history.norms)[:, columns]
    if np.any(gradients > 0):
        what, change = "though they have gradients", advice.set_learning_rate(1e-3)
    else:
        what, change = "and have no gradient but 0", advice.drawn_anew(unchanged)
    yield rule.finding(
        "all weights" if every else _some(unchanged),
        _steps(history),
        f"{len(unchanged)} of {known.any(axis=0).sum()} weights were moved by no more than "
        f"{rule.threshold:g} of their norm in each of {len(history.update_step)} sampled updates, "
        f"{what}",
        change,
    )


@rule("updates_too_small", needs=["updates"], kerasgrad=(1e-5, KARPATHY))
def updates_too_small(case: Case, rule: Rule) -> Iterator[Finding]:
    """The largest of the sampled updates moved the weights by less than 1e-5 of their norm."""
    ratios = _relative_updates(case)
    if len(ratios) and 0 < ratios.max() < rule.threshold:
        yield rule.finding(
            "all weights",
            _steps(case.history),
            f"an update moves the weights by at most {ratios.max():.1e} of their norm "
            f"(less than {rule.threshold:g}; about 1e-3 is usual)",
            case.scaled_learning_rate(_towards_usual(ratios.max())),
        )


@rule("updates_too_large", needs=["updates"], kerasgrad=(0.5, KARPATHY))
def updates_too_large(case: Case, rule: Rule) -> Iterator[Finding]:
    """The largest of the sampled updates moved the weights by more than half of their norm.

    The largest, as weights that grew so have moved on by less of their norm.
    """
    ratios = _relative_updates(case)
    if len(ratios) and ratios.max() > rule.threshold:
        yield rule.finding(
            "all weights",
            _steps(case.history),
            f"an update moves the weights by up to {ratios.max():.2g} of their norm "
            f"(more than {rule.threshold:g}; about 1e-3 is usual)",
            case.scaled_learning_rate(_towards_usual(ratios.max())),
        )


@rule(
    "updates_too_small",
    needs=["updates"],
    smdebug=(1e-8, smdebug("WeightUpdateRatio", "small_threshold = 1e-8")),
)
def a_tiny_update_ratio(case: Case, rule: Rule) -> Iterator[Finding]:
    """A weight whose updates are tiny, in the median."""
    yield from _by_weight(case, rule, lambda ratio: ratio < rule.threshold, "less")


@rule(
    "updates_too_large",
    needs=["updates"],
    smdebug=(10.0, smdebug("WeightUpdateRatio", "large_threshold = 10")),
)
def a_huge_update_ratio(case: Case, rule: Rule) -> Iterator[Finding]:
    """A weight whose updates are many times as large as it is, in the median."""
    yield from _by_weight(case, rule, lambda ratio: ratio > rule.threshold, "more")


def _by_weight(case, rule, is_beyond, word):
    history = case.history
    for column, weight in enumerate(history.weights):
        # The rule adds 1e-9 to the weight's norm, so that zeros divide.
        ratios = history.update_norms[:, column] / (history.weight_norms[:, column] + 1e-9)
        ratios = ratios[np.isfinite(ratios)]
        if len(ratios) and is_beyond(np.median(ratios)):
            yield rule.finding(
                weight,
                _steps(history),
                f"an update moves it by {np.median(ratios):.2g} of its norm in the median "
                f"({word} than {rule.threshold:g})",
                case.scaled_learning_rate(_towards_usual(np.median(ratios))),
            )


def _relative_updates(case):
    """How far each sampled update moved all weights together, over their norm."""
    history = case.history
    known = np.isfinite(history.update_norms) & np.isfinite(history.weight_norms)
    moved, norm = (
        np.sqrt(np.square(values, where=known, out=np.zeros(values.shape)).sum(axis=1))
        for values in (history.update_norms, history.weight_norms)
    )
    # Of several updates in one sample, each moved at least this much in the mean.
    ratios = moved / np.maximum(history.update_counts, 1)
    ratios = ratios / norm
    return ratios[np.isfinite(ratios)]


def _towards_usual(ratio):
    """The factor that takes this ratio to 1e-3, as a power of ten."""
    return float(10 ** np.round(np.log10(1e-3 / ratio))) if 0 < ratio < np.inf else 0.1


def _some(weights):
    more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
    return ", ".join(weights[:3]) + more


def _steps(history):
    return int(history.update_step[0]), int(history.update_step[-1])
