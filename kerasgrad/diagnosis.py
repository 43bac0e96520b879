"""What a GradientHistory says is wrong, on what evidence, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kerasgrad.history import GradientHistory

# Conventions of this package, not results: chosen so that each is far outside of what a training
# that goes well shows.
EXPLODING_RATIO = 100.0  # a step's global norm over the geometric mean of those before it
EXPLODING_AFTER = 10  # steps that make up a mean
VANISHED_REACH = 1e-3  # ‖∂L/∂s_1‖ / ‖∂L/∂s_T‖, median
CLIPPING_ALWAYS = 0.9  # share of the updates that clipping changed


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong in a training.

    - kind: a name for it: "non_finite", "exploding", "vanishing_through_time", "clipping_always"
    - severity: "error" where the training cannot go on, else "warning"
    - where: the weight or layer path, or "all weights"
    - steps: (first, last) optimizer step that it was seen at
    - evidence: the measured numbers, with the threshold behind the finding
    - advice: Keras code to change
    """

    kind: str
    severity: str
    where: str
    steps: tuple[int, int]
    evidence: str
    advice: str

    @property
    def title(self) -> str:
        """What is wrong and since when, in a few words."""
        return f"{self.kind.replace('_', ' ')}, step {self.steps[0]}"

    def __str__(self) -> str:
        return f"{self.title} ({self.where}): {self.evidence}"


def diagnose(history: GradientHistory) -> list[Finding]:
    """The findings in a record, the gravest first; an empty list where nothing was found.

    Looked for, each by a convention of this package:

    - non_finite: a gradient norm or a loss that is NaN or Inf
    - exploding: global_norm[i] > 100 · the geometric mean of global_norm[:i], from i = 10 on
    - vanishing_through_time: median_i ‖∂L/∂s_1‖/‖∂L/∂s_T‖ < 1e-3, of a layer with state norms
    - clipping_always: more than 90 % of the updates were clipped

    Args:
        history: the record of a training, of any length.

    Example:

    >>> from kerasgrad import GradientHistory, diagnose
    >>> history = GradientHistory()
    >>> history.append(weights=["w"], step=[0, 1, 2], norms=[[1.0], [2.0], [float("nan")]])
    >>> print(diagnose(history)[0])
    non finite, step 2 (w): NaN, after a largest global norm of 2 before clipping
    """
    if len(history) == 0:
        return []
    return [finding for look in _LOOK_FOR for finding in look(history)]


def _non_finite(history: GradientHistory) -> Iterator[Finding]:
    loss = history.loss[:, np.newaxis]
    if np.isnan(loss).all():  # The train step did not tell it.
        loss = np.zeros_like(loss)
    names = ("loss", *history.weights)
    values = np.concatenate([loss, np.where(history.missing, 0, history.norms)], axis=1)
    bad = ~np.isfinite(values)
    steps = np.flatnonzero(bad.any(axis=1))
    if len(steps) == 0:
        return
    first = steps[0]
    # A NaN loss has NaN gradients; the weight whose gradient was first says more.
    column = np.flatnonzero(bad[first])[-1]
    before = history.global_norm[:first]
    after = f", after a largest global norm of {before.max():.3g} before clipping" if first else ""
    yield Finding(
        kind="non_finite",
        severity="error",
        where=names[column],
        steps=_steps(history, steps),
        evidence=("NaN" if np.isnan(values[first, column]) else "Inf") + after,
        advice=_clip_at(np.median(before) if first else 1.0),
    )


def _exploding(history: GradientHistory) -> Iterator[Finding]:
    norms = history.global_norm
    usable = np.isfinite(norms) & (norms > 0)
    logs = np.where(usable, np.log(np.where(usable, norms, 1)), 0)
    count = np.cumsum(usable) - usable
    with np.errstate(divide="ignore", invalid="ignore"):
        usual = np.exp((np.cumsum(logs) - logs) / count)
        ratio = np.where(usable & (count >= EXPLODING_AFTER), norms / usual, 0)
    steps = np.flatnonzero(ratio > EXPLODING_RATIO)
    if len(steps) == 0:
        return
    worst = steps[np.argmax(norms[steps])]
    yield Finding(
        kind="exploding",
        severity="warning",
        where="all weights",
        steps=_steps(history, steps),
        evidence=(
            f"global norm up to {norms[worst]:.2g} before clipping at step {history.step[worst]}, "
            f"{ratio[worst]:.2g} times the geometric mean of the steps before "
            f"(more than {EXPLODING_RATIO:g})"
        ),
        advice=_clip_at(usual[steps[0]]),
    )


def _vanishing_through_time(history: GradientHistory) -> Iterator[Finding]:
    for layer, reach in history.reach.items():
        known = np.isfinite(reach)
        median = np.median(reach[known]) if known.any() else np.nan
        T = history.state_norms[layer].shape[1]
        if median < VANISHED_REACH:
            yield Finding(
                kind="vanishing_through_time",
                severity="warning",
                where=layer,
                steps=_steps(history, np.flatnonzero(known & (reach < VANISHED_REACH))),
                evidence=(
                    f"the first step gets {median:.1e} of the last step's gradient "
                    f"(less than {VANISHED_REACH:g})"
                ),
                # Half of the cell's content is then left after T steps.
                advice=(
                    "kerasgrad.layers.SimplifiedLSTM(units, project_input=True, "
                    f"forget_bias={np.log(T / np.log(2)):.1f})"
                ),
            )


def _clipping_always(history: GradientHistory) -> Iterator[Finding]:
    if history.clip_rate > CLIPPING_ALWAYS:
        finite = history.global_norm[np.isfinite(history.global_norm)]
        median = np.median(finite) if len(finite) else np.nan
        yield Finding(
            kind="clipping_always",
            severity="warning",
            where="all weights",
            steps=_steps(history, np.flatnonzero(history.clipped)),
            evidence=(
                f"{history.clip_rate:.0%} of the updates were clipped (more than "
                f"{CLIPPING_ALWAYS:.0%}), with a median global norm of {median:.2g} before"
            ),
            advice=_clip_at(median),
        )


_LOOK_FOR: tuple[Callable[[GradientHistory], Iterator[Finding]], ...] = (
    _non_finite,
    _exploding,
    _vanishing_through_time,
    _clipping_always,
)


def _clip_at(norm):
    # Where nothing usual was measured, 1: Keras refuses 0. It takes one kind of clipping at a time.
    norm = norm if 0 < norm < np.inf else 1.0
    clipping = f"{{'clipnorm': {norm:.2g}, 'global_clipnorm': None, 'clipvalue': None}}"
    return (
        "model.compile(type(model.optimizer).from_config("
        f"model.optimizer.get_config() | {clipping}), loss=model.loss)"
    )


def _steps(history, rows):
    return int(history.step[rows[0]]), int(history.step[rows[-1]])
