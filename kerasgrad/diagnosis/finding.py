"""Finding and Diagnosis: what was found, and how it prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from textwrap import indent
from typing import Any

CONVENTION = "convention of kerasgrad"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong in a training.

    - kind: a name for it, one of `kerasgrad.diagnosis.KINDS`
    - severity: "error" where the training cannot go on, else "warning"
    - where: the weight or layer path, or "all weights"
    - steps: (first, last) optimizer step that it was seen at; what was measured in the model itself
      is of its last step
    - evidence: the measured numbers, with the threshold behind the finding
    - advice: code to paste, with `model` the compiled model (and `x`, `y` where it needs them)
    - threshold_source: who set the threshold: a paper, a tool, or a convention of this package

    Example:

    >>> from kerasgrad import GradientHistory, diagnose
    >>> history = GradientHistory()
    >>> history.append(weights=["w"], step=[7, 8], norms=[[2.0], [float("inf")]])
    >>> finding, = diagnose(history)
    >>> finding.kind, finding.severity, finding.where, finding.steps
    ('non_finite', 'error', 'w', (8, 8))
    """

    kind: str
    severity: str
    where: str
    steps: tuple[int, int]
    evidence: str
    advice: str
    threshold_source: str = CONVENTION

    @property
    def title(self) -> str:
        """What is wrong and since when, in a few words."""
        return f"{in_words(self.kind)}, step {self.steps[0]}"

    def __str__(self) -> str:
        return f"{self.title} ({self.where}): {self.evidence}"


class Diagnosis(list):
    """The findings in a training, the gravest first: a list that says what it looked for.

    Prints itself, in a terminal, by `rich.print`, and in a notebook.

    - preset: whose thresholds these are
    - looked_for: the kinds of finding that could be looked for
    - not_looked_for: {kind, or layer that could not be measured: why}

    Example:

    >>> from kerasgrad import GradientHistory, diagnose
    >>> history = GradientHistory()
    >>> history.append(weights=["w"], step=[0, 1], norms=[[1.0], [1.0]], loss=[2.0, 1.0])
    >>> diagnosis = diagnose(history)
    >>> print(str(diagnosis).splitlines()[0])
    nothing found
    >>> diagnosis.not_looked_for["dead_relu_units"]
    'needs model= and x='
    """

    def __init__(
        self,
        findings: Iterable[Finding] = (),
        *,
        preset: str = "kerasgrad",
        looked_for: Iterable[str] = (),
        not_looked_for: Mapping[str, str] | None = None,
    ):
        super().__init__(findings)
        self.preset = preset
        self.looked_for = tuple(looked_for)
        self.not_looked_for = dict(not_looked_for or {})

    def __str__(self) -> str:
        return "\n".join([*map(_text, self), *self._closing_lines()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.padding import Padding
        from rich.syntax import Syntax
        from rich.text import Text

        parts = []
        for finding in self:
            style = "bold red" if finding.severity == "error" else "bold yellow"
            head = Text.assemble((finding.title, style), f" ({finding.where}): {finding.evidence}")
            code = Syntax(finding.advice, "python", background_color="default", word_wrap=True)
            source = Text(f"threshold: {finding.threshold_source}; try", style="dim")
            parts += [head, Padding(source, (0, 0, 0, 4)), Padding(code, (0, 0, 1, 4))]
        parts += [Text(line, style="dim" if self else "") for line in self._closing_lines()]
        return Group(*parts)

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><td><b>{escape(finding.title)}</b><br>{escape(finding.severity)}</td>"
            f"<td>{escape(finding.where)}</td>"
            f"<td>{escape(finding.evidence)}<br>"
            f"<small>threshold: {escape(finding.threshold_source)}</small></td>"
            f"<td><pre>{escape(finding.advice)}</pre></td></tr>"
            for finding in self
        ]
        head = "<tr><th>what is wrong</th><th>where</th><th>evidence</th><th>try</th></tr>"
        table = f"<table>{head}{''.join(rows)}</table>" if rows else ""
        return table + "".join(f"<p>{escape(line)}</p>" for line in self._closing_lines())

    def _closing_lines(self):
        if not self:
            yield "nothing found"
            if self.looked_for:
                yield f"looked for: {', '.join(map(in_words, self.looked_for))}"
        lacking: dict[str, list[str]] = {}
        for kind, reason in self.not_looked_for.items():
            lacking.setdefault(reason, []).append(in_words(kind))
        for reason, kinds in lacking.items():
            yield f"not looked for ({reason}): {', '.join(kinds)}"


def in_words(kind: str) -> str:
    """The name of a kind of finding, to be read.

    >>> in_words("dead_relu_units")
    'dead ReLU units'
    """
    return kind.replace("_", " ").replace("relu", "ReLU")


def _text(finding):
    source = f"    threshold: {finding.threshold_source}; try:"
    return f"{finding}\n{source}\n{indent(finding.advice, ' ' * 8)}"
