"""How long a forget gate remembers, and the bias that makes it remember for longer."""

from __future__ import annotations

import numpy as np


def half_life(forget_gate: np.ndarray) -> np.ndarray:
    """Time steps after which a half of a cell's content is left.

        ln ½ / ⟨ln f⟩,    ⟨·⟩ the mean over examples and time steps

    Args:
        forget_gate: f in [0, 1], (batch, timesteps, units); NaN where there is no step.

    Returns:
        (units,), in time steps: Inf for a gate that is always 1, 0 for one that is ever 0.

    Example:

    >>> import numpy as np
    >>> half_life(np.full((1, 3, 2), 0.5)).tolist()
    [1.0, 1.0]
    """
    with np.errstate(divide="ignore"):
        mean_log = np.nanmean(np.log(np.asarray(forget_gate, np.float64)), axis=(0, 1))
        return np.abs(np.log(0.5) / mean_log)


def forget_bias_for_horizon(timesteps: float) -> float:
    """The forget gate's bias b with which a half of the content is left after `timesteps` steps.

        σ(b)^T = 1/2, to first order in 1/T:    b = ln(T / ln 2)

    Tallec and Ollivier count until 1/e is left, which takes 1/(1 - σ(b)) = 1 + e^b steps, and so
    start with b = ln(T - 1); they draw T for each unit uniformly up to the longest dependency.
    The half-life is longer by the factor 1/ln 2.

    Args:
        timesteps: T, the half-life in time steps; positive.

    Raises:
        ValueError: when `timesteps` is not positive.

    Example:

    >>> round(forget_bias_for_horizon(50), 2), round(forget_bias_for_horizon(784), 2)
    (4.28, 7.03)

    Source: Tallec and Ollivier (2018), "Can recurrent neural networks warp time?", section 2.
    """
    if not timesteps > 0:
        raise ValueError(f"timesteps must be positive. Received: {timesteps!r}.")
    return float(np.log(timesteps / np.log(2)))
