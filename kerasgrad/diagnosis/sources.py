"""Whose thresholds these are, in full."""

from __future__ import annotations

PASCANU = "Pascanu, Mikolov and Bengio (2013), section 3.2: half to ten times the average norm"
KARPATHY = "Karpathy, CS231n: about 1e-3; how far from it is a convention of kerasgrad"


def smdebug(rule: str, parameter: str) -> str:
    """A default of one of Amazon SageMaker Debugger's built-in rules, as its manual gives it."""
    return f"Amazon SageMaker Debugger, {rule}: {parameter}"


def autotrainer(parameter: str) -> str:
    """A default of AutoTrainer's monitor; the names of its parameters are the paper's."""
    return f"AutoTrainer (Zhang, Zhai, Ma and Shen, ICSE 2021): {parameter}"
