"""Gradients through time, taken apart by time step, for any Keras recurrent layer in its model."""

from kerasgrad.bptt.gradients import Contributions, state_gradients, step_contributions
from kerasgrad.bptt.jacobians import (
    JacobianSpectrum,
    jacobian_spectrum,
    lyapunov_exponents,
    state_jacobians,
)
from kerasgrad.bptt.units import dead_units, gates, memory_half_life, saturation, states
from kerasgrad.bptt.unrolled import recurrent_layers
from kerasgrad.memory import forget_bias_for_horizon

__all__ = [
    "Contributions",
    "JacobianSpectrum",
    "dead_units",
    "forget_bias_for_horizon",
    "gates",
    "jacobian_spectrum",
    "lyapunov_exponents",
    "memory_half_life",
    "recurrent_layers",
    "saturation",
    "state_gradients",
    "state_jacobians",
    "states",
    "step_contributions",
]
