"""What the units do, as measured in the model: dead, saturated, forgetful."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kerasgrad.diagnosis import advice
from kerasgrad.diagnosis.finding import CONVENTION, Finding
from kerasgrad.diagnosis.rules import Case, Rule, rule
from kerasgrad.diagnosis.sources import autotrainer, smdebug
from kerasgrad.memory import forget_bias_for_horizon

# Conventions of this package, which only choose between two pieces of advice.
UNSCALED = 10.0  # root mean square of x, where 1 is usual
GROWN = 3.0  # norm of a weight, over that at the start of its training


@rule(
    "dead_relu_units",
    needs=["x"],
    kerasgrad=(0.75, CONVENTION),
    smdebug=(0.5, smdebug("DeadRelu", "threshold_layer = 50 %, threshold_inactivity = 1 %")),
)
def dead_relu_units(case: Case, rule: Rule) -> Iterator[Finding]:
    """More than three quarters of a layer's ReLUs are off, at each step of each example.

    A layer whose input hardly varies has half of them off from the start, and may well learn.
    SageMaker's rule: more than a half are off at 99 %.
    """
    least = 0.01 if rule.preset == "smdebug" else 0.0
    for activity in case.measured.activities:
        if activity.active is None:
            continue
        off = activity.active < least if least else activity.active == 0
        if off.mean() > rule.threshold:
            yield rule.finding(
                activity.layer,
                case.last_step,
                f"{off.sum()} of {len(off)} units are "
                + ("0 for every example" if not least else f"active in less than {least:.0%}")
                + f" (more than {rule.threshold:.0%} of them)",
                advice.leaky_relu([_with_activation(case, activity.layer)]),
            )


@rule("dead_relu_units", needs=["y"], autotrainer=(0.7, autotrainer("γ = 0.7")))
def zero_gradients(case: Case, rule: Rule) -> Iterator[Finding]:
    """More than 70 % of all entries of the gradient are 0, where nothing is learned."""
    share = case.measured.zero_gradients
    if share > rule.threshold and not case.learns:
        relu = [a for a in case.measured.activities if a.active is not None]
        if relu:
            yield rule.finding(
                "all weights",
                case.last_step,
                f"{share:.0%} of the entries of the gradient are 0 "
                f"(more than {rule.threshold:.0%})",
                advice.leaky_relu([_with_activation(case, a.layer) for a in relu]),
            )


@rule(
    "saturated_activations",
    needs=["x"],
    kerasgrad=(0.5, CONVENTION),
    smdebug=(
        0.5,
        smdebug("SaturatedActivation", "threshold_layer = 50 %, threshold_inactivity = 1 %")
        + "; what is saturated is kerasgrad's",
    ),
)
def saturated_activations(case: Case, rule: Rule) -> Iterator[Finding]:
    """More than a half of a layer's units are flat (Φ' < 5 % of its largest) almost always."""
    least = 0.99 if rule.preset == "smdebug" else 0.95
    for activity in case.measured.activities:
        shares = {name: np.mean(flat > least) for name, flat in activity.saturated.items()}
        beyond = [
            f"{share:.0%} ({name})" for name, share in shares.items() if share > rule.threshold
        ]
        if beyond:
            yield rule.finding(
                activity.layer,
                case.last_step,
                f"of its units, {', '.join(beyond)} are flat for {least:.0%} of all values (more "
                f"than {rule.threshold:.0%} of the units)",
                _without_saturation(case, activity.layer),
            )


@rule("forget_bias_too_low", needs=["x"], kerasgrad=(0.1, CONVENTION))
def forget_bias_too_low(case: Case, rule: Rule) -> Iterator[Finding]:
    """No unit remembers for a tenth of the sequence, in a training that does not learn."""
    if case.learns:
        return
    for layer, recurrent in case.measured.recurrent.items():
        if recurrent.half_life is None:
            continue
        longest = recurrent.half_life.max()
        if longest < rule.threshold * recurrent.timesteps:
            yield rule.finding(
                layer,
                case.last_step,
                f"the longest memory has lost a half after {longest:.2g} of "
                f"{recurrent.timesteps} steps (less than {rule.threshold:.0%}); a bias of "
                f"{forget_bias_for_horizon(recurrent.timesteps):.2g} keeps a half over all of them",
                case.remembering(layer, recurrent.timesteps),
            )


def _without_saturation(case, layer):
    """Code against the cause, as far as it can be told: the data, the training, or the start."""
    if case.measured.input_scale > UNSCALED:
        return advice.NORMALIZED_INPUT
    own = [path for path in case.measured.weight_sizes if path.startswith(f"{layer}/")]
    if not own:  # An activation that is a layer of its own.
        return advice.NORMALIZED_LAYERS
    columns = [i for i, weight in enumerate(case.history.weights) if weight in own]
    norms = case.history.weight_norms[:, columns]
    # Biases start at 0, from where all is growth.
    if len(norms) and np.any((norms[0] > 0) & (norms[-1] > GROWN * norms[0])):
        return case.scaled_learning_rate(0.1)
    return advice.drawn_anew(own)


def _with_activation(case, layer):
    """An expression for what has the activation: the layer, or a recurrent layer's cell."""
    return case.layer(layer) + (".cell" if layer in case.measured.recurrent else "")
