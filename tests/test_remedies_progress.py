"""The study's progress bar on a clock of the tests': what it shows, and the time left."""

from __future__ import annotations

import pytest
from rich.console import Console

from kerasgrad.remedies import PlannedRun
from kerasgrad.remedies.progress import StudyProgress

STEPS = 10


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def plan(remedies="a", seeds=1, rates=(0.1,)):
    return [
        PlannedRun(name, seed, rate) for seed in range(seeds) for name in remedies for rate in rates
    ]


def progress_of(runs, left=None):
    clock = Clock()
    return clock, StudyProgress(runs, runs if left is None else left, STEPS, get_time=clock)


def drawn(progress):
    """What it shows now, in one line; and how much of the bar is full, in runs."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(*progress.get_renderables())
    return capture.get().strip(), progress.tasks[0].completed


# In this process


def test_in_order_each_step_tells_how_long_a_run_takes():
    runs = plan(seeds=3)
    clock, progress = progress_of(runs)
    progress.begin(1)
    progress.begin_run(runs[0])
    assert progress.seconds_left() is None
    clock.now += 5  # The first step compiles.
    progress.step(0.7)
    assert progress.seconds_left() is None  # Not 9 more such steps.
    for _ in range(3):
        clock.now += 1
        progress.step(0.5)
    # A run takes 5 + 9 seconds: 6 more of the first, and two more runs.
    assert progress.seconds_left() == pytest.approx(6 + 2 * 14)
    text, completed = drawn(progress)
    assert text.startswith("a, seed 0 ━")
    assert "0/3 runs 0:00:08, 0:00:34 left" in text
    assert completed == pytest.approx(8 / 14)
    clock.now += 1
    assert progress.seconds_left() == pytest.approx(5 + 2 * 14)  # It counts down between steps.


def test_a_run_that_ended_early_is_one_that_is_done():
    runs = plan("ab")
    clock, progress = progress_of(runs)
    progress.begin(1)
    progress.begin_run(runs[0])
    progress.step(1.0)
    clock.now += 2
    progress.step(float("nan"))
    progress.end_run(runs[0])
    text, completed = drawn(progress)
    assert text.startswith("a, loss nan ━") and "1/2 runs" in text
    assert completed == 1


@pytest.mark.parametrize("several", [{}, {"seeds": 12, "rates": (0.03, 0.1)}])
def test_nothing_is_cut_in_eighty_columns(several):
    runs = plan(["simplified_lstm"], **several)
    clock, progress = progress_of(runs)
    progress.begin(1)
    progress.begin_run(runs[-1])
    clock.now += 3600
    progress.step(-1.234e-05)
    (text,) = drawn(progress)[0].splitlines()
    name = "simplified_lstm, seed 11, rate 0.1" if several else "simplified_lstm, loss -1.234e-05"
    nothing_done = " " * 10
    assert text == f"{name} {nothing_done} 0/{len(runs)} runs 1:00:00, -:--:-- left"


# Elsewhere


def test_elsewhere_nothing_is_known_until_a_run_has_ended():
    clock, progress = progress_of(plan(seeds=4))
    progress.begin(2)
    clock.now += 61
    text, completed = drawn(progress)
    assert text.startswith("2 at a time ")
    assert "0/4 runs" in text
    assert text.endswith("0:01:01, -:--:-- left")
    assert completed == 0


def test_elsewhere_time_left_is_that_of_the_runs_over_those_at_a_time():
    runs = plan(seeds=6)
    clock, progress = progress_of(runs)
    progress.begin(2)
    clock.now += 100
    for run in runs[:2]:  # At one moment: the second run did not take no time.
        progress.end_run(run)
    assert progress.seconds_left() == pytest.approx(4 * 100 / 2)
    clock.now += 30  # It counts down, and the bar moves, while nothing is heard.
    assert progress.seconds_left() == pytest.approx(4 * 100 / 2 - 30)
    text, completed = drawn(progress)
    assert "2/6 runs" in text
    assert text.endswith("0:02:10, 0:02:50 left")
    assert completed == pytest.approx(2 + 2 * 0.3)
    clock.now += 70
    for run in runs[2:4]:
        progress.end_run(run)
    clock.now += 40
    progress.end_run(runs[5])  # The last one first, and soon.
    # One is left, by the mean of 4 · 100 and 40.
    assert progress.seconds_left() == pytest.approx(88 - 40)


def test_a_remedy_is_expected_to_take_as_long_as_it_took_before():
    runs = plan(["slow", "fast"], seeds=3)
    clock, progress = progress_of(runs)
    progress.begin(1)
    clock.now += 100
    progress.end_run(runs[0])
    assert progress.seconds_left() == pytest.approx(5 * 100)
    clock.now += 10
    progress.end_run(runs[1])
    assert progress.seconds_left() == pytest.approx(2 * 110)


def test_the_longest_run_is_waited_for():
    """Three workers do not share one run."""
    runs = plan(seeds=4)
    clock, progress = progress_of(runs)
    progress.begin(3)
    clock.now += 60
    for run in runs[:3]:
        progress.end_run(run)
    assert progress.seconds_left() == pytest.approx(60)


def test_a_run_that_is_overdue_is_not_over_and_the_bar_does_not_go_back():
    runs = plan(["fast", "slow"])
    clock, progress = progress_of(runs)
    progress.begin(2)
    clock.now += 10
    progress.end_run(runs[0])
    before = drawn(progress)[1]
    for _ in range(100):
        clock.now += 1
        assert progress.seconds_left() > 0
        after = drawn(progress)[1]
        assert before <= after < 2
        before = after
    progress.end_run(runs[1])
    text, completed = drawn(progress)
    assert (progress.seconds_left(), completed) == (0, 2)
    assert text.endswith("0:01:50, 0:00:00 left")


def test_runs_kept_on_disk_have_ended_and_took_no_time():
    runs = plan(seeds=5)
    clock, progress = progress_of(runs, runs[3:])
    progress.begin(1)
    clock.now += 20
    assert "3/5 runs" in drawn(progress)[0]
    progress.end_run(runs[3])
    assert progress.seconds_left() == pytest.approx(20)


def test_after_a_process_died_the_runs_that_are_left_begin_anew():
    runs = plan(seeds=3)
    clock, progress = progress_of(runs)
    progress.begin(2)
    clock.now += 1000
    progress.begin(1)
    clock.now += 10
    progress.end_run(runs[0])
    assert progress.seconds_left() == pytest.approx(2 * 10)
