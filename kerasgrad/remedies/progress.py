"""The one progress bar of a study, and how it knows what time is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

if TYPE_CHECKING:
    from kerasgrad.remedies.study import PlannedRun


class StudyProgress(Progress):
    """One bar for a whole study, on standard error: the share of its runs that is done.

    Of a run in this process each step counts. From one in another process, or on another machine,
    nothing is heard until it ends: until then it counts by the time that it has had, of the time
    that runs of its remedy took so far, or else those of any. Time left is what the runs are still
    expected to take, so many at a time.

    Args:
        plan: all runs of the study.
        left: those that are to be trained, in the order in which they begin.
        steps: of each run.
        disable: whether nothing is shown.
        get_time: a clock, in seconds.
    """

    def __init__(
        self,
        plan: Sequence[PlannedRun],
        left: Sequence[PlannedRun],
        steps: int,
        *,
        disable: bool = False,
        get_time: Callable[[], float] = time.monotonic,
    ):
        super().__init__(
            TextColumn("{task.description}", markup=False),
            # A column that may shrink would, to nothing, before a text is cut.
            BarColumn(10, table_column=Column(width=10)),
            TextColumn("{task.fields[runs]}"),
            TextColumn("{task.fields[times]}", style="progress.remaining"),
            console=Console(stderr=True),
            disable=disable,
            get_time=get_time,
        )
        self._several_seeds = len({planned.seed for planned in plan}) > 1
        self._several_rates = len({planned.learning_rate for planned in plan}) > 1
        self._in_all, self._steps = len(plan), steps
        # The bar is drawn from a thread of its own: what it looks at is replaced, never changed.
        self._left, self._at_a_time = tuple(left), 1
        self._begun: dict[PlannedRun, float] = {}  # when each of the running ones did
        self._took: dict[PlannedRun, float] = {}  # seconds of each that has ended
        self._here: _RunHere | None = None
        self._bar = self.add_task("", total=len(left), runs="", times="")

    def begin(self, at_a_time: int) -> None:
        """The runs that are left begin, so many at a time."""
        self._at_a_time, self._begun = at_a_time, {}
        self._begin_next()
        if at_a_time > 1:
            self.update(self._bar, description=f"{at_a_time} at a time")

    def begin_run(self, planned: PlannedRun) -> None:
        """A run begins, in this process."""
        self._here = _RunHere(planned, begun=self.get_time())
        self.update(self._bar, description=self._name(planned))

    def step(self, loss: float) -> None:
        """A step of this process's run has ended."""
        here, now = self._here, self.get_time()
        first = here.first if here.steps else now
        self._here = replace(here, steps=here.steps + 1, first=first, last=now)
        if not (self._several_seeds or self._several_rates):  # In 80 columns there is room for one.
            self.update(self._bar, description=f"{self._name(here.planned)}, loss {loss:.4g}")

    def end_run(self, planned: PlannedRun) -> None:
        """A run has ended, here or elsewhere."""
        self._took = self._took | {planned: self._elapsed(planned)}
        self._left = tuple(other for other in self._left if other != planned)
        self._here = None
        self._begin_next()

    def seconds_left(self) -> float | None:
        """How long the runs are still expected to take; None while there is nothing to go by."""
        if not self._left:
            return 0.0
        expected = self._expected()
        if not expected:
            return None
        remaining = [seconds - self._elapsed(planned) for planned, seconds in expected.items()]
        return max(sum(remaining) / min(self._at_a_time, len(remaining)), *remaining)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws, several times a second."""
        for bar in self.tasks:  # None yet where rich draws for the first time.
            expected = self._expected()
            running = sum(self._elapsed(p) / expected[p] for p in self._begun if p in expected)
            self.update(
                bar.id,
                # Expectations grow, too: the bar waits then, and does not go back.
                completed=max(bar.completed, len(self._took) + running),
                runs=f"{self._in_all - len(self._left)}/{self._in_all} runs",
                times=f"{_clock(bar.elapsed)}, {_clock(self.seconds_left())} left",
            )
        yield from super().get_renderables()

    def _name(self, planned):
        seed = f", seed {planned.seed}" if self._several_seeds else ""
        rate = f", rate {planned.learning_rate:g}" if self._several_rates else ""
        return f"{planned.remedy}{seed}{rate}"

    def _begin_next(self):
        now = self.get_time()
        self._begun = {p: self._begun.get(p, now) for p in self._left[: self._at_a_time]}

    def _elapsed(self, planned):
        """Seconds since the run began; 0 where it has not."""
        now = self.get_time()
        return now - self._begun.get(planned, now)

    def _expected(self):
        """{run that is left: seconds from its begin to its end}; empty where nothing is known."""
        took, here = dict(self._took), self._here
        if here is not None and here.steps > 1:
            took[here.planned] = here.expected(self._steps)
        if not took:
            return {}
        of_any = fmean(took.values())
        expected = {}
        for planned in self._left:
            same = [seconds for p, seconds in took.items() if p.remedy == planned.remedy]
            seconds = took.get(planned) or (fmean(same) if same else of_any)
            # A run that takes longer than others is not about to end at any moment, and may be.
            expected[planned] = max(seconds, 1.1 * self._elapsed(planned))
        return expected


@dataclass(frozen=True)
class _RunHere:
    """The run that is in this process: when it began, its steps, when the first and last ended."""

    planned: PlannedRun
    begun: float
    steps: int = 0
    first: float = 0.0
    last: float = 0.0

    def expected(self, steps):
        """Seconds from its begin to its end; the first step, which compiles, is like no other."""
        return self.first - self.begun + (steps - 1) * (self.last - self.first) / (self.steps - 1)


def _clock(seconds):
    if seconds is None:
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
