"""How far updates move the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from kerasgrad.norms import at_least_float32, gradient_norms


class WeightsBefore:
    """Copies of weights as they are before updates, each on the device of its weight.

    Args:
        variables: the weights; one that comes twice is copied once.
    """

    def __init__(self, variables: Iterable[Any]):
        each = {id(variable): variable for variable in variables}
        self._copies = {key: tf.identity(tf.convert_to_tensor(v)) for key, v in each.items()}

    def holds(self, variables: Iterable[Any]) -> bool:
        """Whether there is a copy of each of these weights."""
        return all(id(variable) in self._copies for variable in variables)

    def norms_of(self, variable: Any) -> tuple[float, float]:
        """(‖w' - w‖₂, ‖w‖₂), where w is the copy and w' the weight as it is now."""
        before = at_least_float32(self._copies[id(variable)])
        after = at_least_float32(tf.convert_to_tensor(variable))
        moved, size = gradient_norms([after - before, before])
        return float(moved), float(size)
