"""What is wrong in a training, on what evidence, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

# Each of these modules adds its rules to RULES.
from kerasgrad.diagnosis import clipping, gradients, units, updates  # noqa: F401
from kerasgrad.diagnosis.finding import Diagnosis, Finding
from kerasgrad.diagnosis.rules import RULES, Case
from kerasgrad.history import GradientHistory

if TYPE_CHECKING:
    import keras

__all__ = ["KINDS", "PRESETS", "Case", "Diagnosis", "Finding", "diagnose", "look"]

# The gravest first: what stops a training, what keeps it from learning, what may be better.
KINDS = (
    "non_finite",
    "exploding",
    "loss_spikes",
    "vanishing_through_time",
    "vanishing_through_depth",
    "unchanged_weights",
    "dead_relu_units",
    "saturated_activations",
    "forget_bias_too_low",
    "updates_too_large",
    "updates_too_small",
    "clipping_always",
    "clip_threshold_far",
    "clipping_never",
)

PRESETS = ("kerasgrad", "smdebug", "autotrainer")


def diagnose(
    history: GradientHistory,
    *,
    model: keras.Model | None = None,
    x: Any = None,
    y: Any = None,
    preset: str = "kerasgrad",
) -> Diagnosis:
    """The findings in a training, the gravest first; an empty list where nothing was found.

    From the record alone, by the thresholds of the preset "kerasgrad" (a convention of this package
    where no source is named):

    - non_finite: a gradient norm or a loss that is NaN or Inf
    - exploding: global_norm[i] > 100 · the geometric mean of global_norm[:i], from i = 10 on
    - loss_spikes: a loss that stands out from the 50 before it
    - vanishing_through_time: median ‖∂L/∂s_1‖/‖∂L/∂s_T‖ < 1e-3, of a layer with state norms
    - vanishing_through_depth: the first kernel's gradient norm < 1e-3 of the global norm, from
      three layers on (AutoTrainer's 1e-3, there of the last kernel's)
    - unchanged_weights: weights that no sampled update moved
    - updates_too_large, updates_too_small: ‖Δw‖/‖w‖ of all weights, far from 1e-3 (Karpathy)
    - clipping_always: more than 90 % of the updates were clipped, in the median to less than 0.1
    - clip_threshold_far: below half of the median norm, or above ten times (Pascanu et al. 2013)

    With `model`, also whether clipping never acts; with `model` and `x`, what the units do:

    - clipping_never: a threshold above ten times the median norm, which clipped nothing
    - dead_relu_units: more than 3/4 of a layer's ReLUs are 0 for every example, at every step
    - saturated_activations: more than half of a layer's units are flat almost everywhere
    - forget_bias_too_low: no unit of a gated layer remembers for a tenth of the sequence

    and with `y`, too, ∂L/∂s_t of any recurrent layer. The kinds of vanishing, the forget bias and a
    far threshold are found only in a training that does not learn, as a gradient may well fade in
    one that learns what it should: with `y`, where the model's loss is not below 0.7 of its loss
    with the targets of other examples; else where the loss did not fall by half between the first
    fifth of the training and the last.

    The presets "smdebug" (Amazon SageMaker Debugger's built-in rules) and "autotrainer" look for
    the kinds that those tools have, by their thresholds.

    Args:
        history: the record of a training, of any length.
        model: the trained Keras model.
        x, y: one batch of some hundred examples, as `fit` takes them.
        preset: "kerasgrad", "smdebug" or "autotrainer".

    Returns:
        A `Diagnosis`: a list of `Finding` that prints itself and says what it could not look for.

    Raises:
        ValueError: for an unknown preset; for x without model, y without x, or x and y that do not
            fit the model.

    Example:

    >>> from kerasgrad import GradientHistory, diagnose
    >>> history = GradientHistory()
    >>> history.append(weights=["w"], step=[0, 1, 2], norms=[[1.0], [2.0], [float("nan")]])
    >>> print(diagnose(history)[0])
    non finite, step 2 (w): NaN, after a largest global norm of 2 before clipping
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}. Received: {preset!r}.")
    if model is None and (x is not None or y is not None):
        raise ValueError("Received x or y without model: pass model=, too.")
    measured = None
    if model is not None:
        from kerasgrad.inspection import measure

        measured = measure(model, x, y)
    return look(Case(history, measured), preset)


def look(case: Case, preset: str) -> Diagnosis:
    """What `diagnose` finds, in a record and a model that have been measured before.

    Args:
        case: the record, and what `kerasgrad.inspection.measure` returned, or None.
        preset: as in `diagnose`.

    Example:

    >>> look(Case(GradientHistory()), "smdebug").not_looked_for["dead_relu_units"]
    'needs model= and x='
    """
    findings, looked_for, lacking = [], set(), {}
    # A record has NaN, Inf and zeros to divide by; each rule leaves out what comes of them.
    with np.errstate(all="ignore"):
        for rule in RULES:
            if rule.preset != preset:
                continue
            reason = rule.lacking(case)
            if reason is None:
                looked_for.add(rule.kind)
                findings += rule.look(case, rule)
            else:
                lacking[rule.kind] = reason
    findings.sort(key=lambda f: (f.severity != "error", KINDS.index(f.kind)))
    skipped = case.measured.skipped if case.measured is not None else {}
    return Diagnosis(
        findings,
        preset=preset,
        looked_for=[kind for kind in KINDS if kind in looked_for],
        not_looked_for={kind: lacking[kind] for kind in KINDS if kind in lacking}
        | {f"layer {layer}": reason for layer, reason in skipped.items()},
    )
