"""How far updates move the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from kerasgrad.norms import at_least_float32, gradient_norms

# Of so many, or of one weight, differences are held at a time.
_ELEMENTS = 2**20


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

    def norms_of(self, variables: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
        """‖w' - w‖₂ and ‖w‖₂ of each, where w is the copy and w' the weight as it is now."""
        norms = [self._norms_of_some(some) for some in _pieces(variables)]
        return np.concatenate([moved for moved, _ in norms]), np.concatenate([w for _, w in norms])

    def _norms_of_some(self, variables):
        before = [at_least_float32(self._copies[id(variable)]) for variable in variables]
        after = [at_least_float32(tf.convert_to_tensor(variable)) for variable in variables]
        moved = [w_now - w for w_now, w in zip(after, before, strict=True)]
        return np.split(gradient_norms([*moved, *before]).numpy(), 2)


def _pieces(variables):
    """Lists of weights: small ones together, since one norm takes nearly as long as many."""
    pieces, elements = [[]], 0
    for variable in variables:
        size = int(np.prod(variable.shape))
        if pieces[-1] and elements + size > _ELEMENTS:
            pieces.append([])
            elements = 0
        pieces[-1].append(variable)
        elements += size
    return pieces
