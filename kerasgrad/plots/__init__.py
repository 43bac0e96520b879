"""One function a figure: it draws into axes, makes them where none are given, and returns them.

A log scale has no place for 0, NaN and Inf: each figure shows them at its edge, or counts them in
its legend.
"""

from kerasgrad.plots.article import (
    plot_gate_product,
    plot_gate_product_distribution,
    plot_relu,
    plot_tanh,
)
from kerasgrad.plots.comparison import (
    plot_final_losses,
    plot_learning_rates,
    plot_median_losses,
)
from kerasgrad.plots.through_time import (
    plot_compared_state_norms,
    plot_contributions,
    plot_jacobian_spectrum,
    plot_saturation,
    plot_state_gradient_map,
    plot_state_gradients,
    plot_state_norms,
)
from kerasgrad.plots.training import (
    plot_compared_losses,
    plot_compared_norms,
    plot_diagnosis,
    plot_loss,
    plot_norms,
    plot_weight_norms,
)

__all__ = [
    "plot_compared_losses",
    "plot_compared_norms",
    "plot_compared_state_norms",
    "plot_contributions",
    "plot_diagnosis",
    "plot_final_losses",
    "plot_gate_product",
    "plot_gate_product_distribution",
    "plot_jacobian_spectrum",
    "plot_learning_rates",
    "plot_loss",
    "plot_median_losses",
    "plot_norms",
    "plot_relu",
    "plot_saturation",
    "plot_state_gradient_map",
    "plot_state_gradients",
    "plot_state_norms",
    "plot_tanh",
    "plot_weight_norms",
]
