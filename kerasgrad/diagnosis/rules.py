"""What a kind of finding is made of: whom the threshold is from, what it needs, how it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kerasgrad.diagnosis import advice
from kerasgrad.diagnosis.finding import Finding
from kerasgrad.history import GradientHistory

if TYPE_CHECKING:
    from kerasgrad.inspection import Measurements

# Conventions. A training learns where, measured in the model, its loss is below 0.7 of the loss
# with the targets of other examples; else, in a record, where the loss of its last fifth is below
# 0.5 of that of its first. AutoTrainer, too, calls a gradient vanished or exploding only in a
# training that does not learn, but judges by the accuracy.
LEARNS_BELOW = 0.7
FALLEN_BELOW = 0.5


@dataclass(frozen=True)
class Case:
    """What a diagnosis looks at: the record, and what was measured in the model, if given."""

    history: GradientHistory
    measured: Measurements | None = None

    @cached_property
    def learns(self) -> bool:
        """Whether the training learns; False also where neither model nor record has a loss."""
        if self.measured is not None and self.measured.shuffled_loss > 0:
            return self.measured.loss < LEARNS_BELOW * self.measured.shuffled_loss
        loss = self.history.loss
        if len(loss) == 0 or not np.isfinite(loss[-1]):
            return False
        loss = loss[np.isfinite(loss)]
        fifth = max(1, len(loss) // 5)
        first, last = np.median(loss[:fifth]), np.median(loss[-fifth:])
        return bool(first - last > (1 - FALLEN_BELOW) * abs(first))

    @cached_property
    def last_step(self) -> tuple[int, int]:
        """(first, last) of what the model is like at the end of the record."""
        steps = self.history.step
        return (int(steps[-1]),) * 2 if len(steps) else (0, 0)

    @cached_property
    def clip_threshold(self) -> tuple[str, float]:
        """(name of the argument, threshold) of the clipping; ("", nan) where it is not known.

        As the model's optimizer has it, else as the record shows it: what was clipped to a norm has
        just that norm afterwards.
        """
        if self.measured is not None:
            return next(iter(self.measured.clipping.items()), ("", np.nan))
        history = self.history
        rows = history.clipped & history.updated
        smaller = history.applied_norms[rows] < (1 - 1e-5) * history.norms[rows]
        for name, after in (
            ("clipnorm", history.applied_norms[rows][smaller]),
            ("global_clipnorm", history.applied_global_norm[rows]),
        ):
            after = after[np.isfinite(after)]
            if len(after) and np.ptp(after) <= 1e-3 * after.max():
                return name, float(after.max())
        return "", np.nan

    @cached_property
    def state_norms(self) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
        """{layer path: (steps (n,), {state: (n, T) norms of ∂L/∂s_t})}.

        From the train steps themselves where they have it, else from the probes, else as measured
        in the model.
        """
        history, found = self.history, {}
        if self.measured is not None:
            for layer, states in (self.measured.state_norms or {}).items():
                by_state = {name: norms[np.newaxis] for name, norms in states.items()}
                found[layer] = np.array(self.last_step[:1]), by_state
        probed: dict[str, dict[str, np.ndarray]] = {}
        for key, norms in history.probe_state_norms.items():
            layer, _, state = key.rpartition(":")
            probed.setdefault(layer, {})[state] = norms
        found |= {layer: (history.probe_step, states) for layer, states in probed.items()}
        found |= {
            layer: (history.step, {"": norms}) for layer, norms in history.state_norms.items()
        }
        return found

    def scaled_learning_rate(self, factor: float) -> str:
        """Code that multiplies the learning rate."""
        if self.measured is None:
            return advice.scale_learning_rate(factor)
        return advice.scale_learning_rate(
            factor, self.measured.learning_rate, self.measured.has_schedule
        )

    def remembering(self, layer: str, timesteps: int) -> str:
        """Code with which the gradient reaches further back through this recurrent layer."""
        if self.measured is not None and layer in self.measured.recurrent:
            recurrent = self.measured.recurrent[layer]
            cell, is_replaceable = recurrent.cell, recurrent.is_replaceable
        else:
            cell, is_replaceable = _cell_from(self.history, layer), True
        if cell is None:
            return advice.gated_layer(self.layer(layer), timesteps, is_replaceable)
        return advice.forget_bias(self.layer(layer), cell, timesteps)

    def layer(self, path: str) -> str:
        """An expression for the layer of this path."""
        known = self.measured.expressions if self.measured is not None else {}
        return known.get(path, advice.layer_named(path))

    def steps(self, rows: Sequence[int] | np.ndarray) -> tuple[int, int]:
        """(first, last) optimizer step of these rows of the record."""
        return int(self.history.step[rows[0]]), int(self.history.step[rows[-1]])


def _cell_from(history, layer):
    """The kind of a recurrent layer's cell, as far as its weights and states tell it."""
    weights = [weight for weight in history.weights if weight.startswith(f"{layer}/")]
    if any(weight.endswith("/kernel_f") for weight in weights):
        return "simplified_lstm"
    return "lstm" if f"{layer}:c" in history.probe_state_norms else None


# What a rule needs: name -> (whether the case has it, what else to say).
NEEDS: dict[str, tuple[Callable[[Case], bool], str]] = {
    "rows": (lambda case: len(case.history) > 0, "the record has no steps"),
    "clip_threshold": (
        lambda case: case.measured is not None or case.clip_threshold[1] > 0,
        "needs model=, or steps clipped to a norm",
    ),
    "loss": (
        lambda case: bool(np.isfinite(case.history.loss).any()),
        "the record has no loss",
    ),
    "states": (
        lambda case: bool(
            case.history.state_norms
            or case.history.probe_state_norms
            or (case.measured and case.measured.state_norms is not None)
        ),
        "needs ∂L/∂s_t: kerasgrad's layers, GradientNorms(probe=...), or model=, x= and y=",
    ),
    "updates": (
        lambda case: len(case.history.update_step) >= 2,
        "needs the norms of updates in two epochs",
    ),
    "model": (lambda case: case.measured is not None, "needs model="),
    "x": (
        lambda case: case.measured is not None and case.measured.activities is not None,
        "needs model= and x=",
    ),
    "y": (
        lambda case: case.measured is not None and case.measured.zero_gradients is not None,
        "needs model=, x= and y=",
    ),
}


@dataclass(frozen=True)
class Rule:
    """How one kind of finding is looked for.

    - kind, severity: of the findings
    - preset: whose rule it is
    - threshold, source: the number, and who set it
    - needs: names in NEEDS
    - look: look(case, rule) yields the findings
    """

    kind: str
    preset: str
    threshold: float
    source: str
    needs: tuple[str, ...]
    severity: str
    look: Callable[[Case, Rule], Iterator[Finding]]

    def lacking(self, case: Case) -> str | None:
        """What this rule needs and the case does not have; None where it can be looked for."""
        for need in self.needs:
            has, reason = NEEDS[need]
            if not has(case):
                return reason
        return None

    def finding(self, where: str, steps: tuple[int, int], evidence: str, advice: str) -> Finding:
        """A finding by this rule."""
        return Finding(self.kind, self.severity, where, steps, evidence, advice, self.source)


RULES: list[Rule] = []


def rule(
    kind: str, *, needs: Sequence[str] = (), severity: str = "warning", **presets: tuple[float, str]
) -> Callable:
    """Decorates look(case, rule): one rule for each preset, given as preset=(threshold, source)."""

    def register(look):
        for preset, (threshold, source) in presets.items():
            RULES.append(Rule(kind, preset, threshold, source, tuple(needs), severity, look))
        return look

    return register
