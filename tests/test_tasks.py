"""The tasks against their definitions, recomputed here by other means than the module's."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kerasgrad import tasks
from kerasgrad.tasks import (
    TASKS,
    Task,
    adding_problem,
    copying_memory,
    digits,
    make_task,
    temporal_order,
)

SYNTHETIC = [adding_problem, copying_memory, temporal_order]
MAKERS = pytest.mark.parametrize("maker", SYNTHETIC)

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32)
counts = st.integers(1, 8)


def rows(x: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in x}


def both_halves(task: Task) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(task.x, task.y), (task.x_test, task.y_test)]


def cross_entropy(probabilities: np.ndarray, y: np.ndarray) -> float:
    """Mean over every target, as Keras averages over samples and steps."""
    return -np.log(np.take_along_axis(probabilities, y[..., None], axis=-1)).mean()


# Every synthetic task -----------------------------------------------------------------------------


@MAKERS
def test_same_seed_same_data_and_another_seed_other_data(maker):
    one, same, other = maker(20, seed=3), maker(20, seed=3), maker(20, seed=4)
    for name in ("x", "y", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
        assert not np.array_equal(getattr(one, name), getattr(other, name))


@MAKERS
def test_held_out_set_is_another_stream_that_more_training_samples_leave_alone(maker):
    short, long = maker(5, test_samples=7), maker(50, test_samples=7)
    assert len(short.x_test) == len(short.y_test) == 7
    np.testing.assert_array_equal(short.x_test, long.x_test)
    assert not rows(short.x) & rows(short.x_test)


def test_sequences_met_by_chance_are_drawn_again():
    # 4**3 = 64 sequences: 20 drawn independently of 20 others would share some, all but surely.
    task = copying_memory(20, 5, symbols=4, length=3, test_samples=20)
    assert not rows(task.x) & rows(task.x_test)
    np.testing.assert_array_equal(task.x_test[:, :3].argmax(-1), task.y_test[:, -3:])


def test_no_sequence_left_to_hold_out():
    with pytest.raises(ValueError, match=r"got samples=100, which leaves too few.*fewer samples"):
        copying_memory(100, 5, symbols=2, length=1)


@MAKERS
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"samples": 0}, r"got samples=0, expected at least 1.*pass samples=1 or more"),
        ({"test_samples": -2}, r"got test_samples=-2, expected at least 1"),
        ({"timesteps": 1}, r"got timesteps=1, expected at least \d+.*pass timesteps=\d+ or more"),
    ],
)
def test_too_few(maker, kwargs, message):
    with pytest.raises(ValueError, match=message):
        maker(**kwargs)


@pytest.mark.parametrize(
    ("maker", "least"), [(adding_problem, 2), (copying_memory, 2), (temporal_order, 10)]
)
def test_shortest_sequence(maker, least):
    assert len(maker(2, least, test_samples=2).x) == 2
    with pytest.raises(ValueError, match=f"expected at least {least}, as "):
        maker(2, least - 1)


@MAKERS
def test_types_and_properties(maker):
    task = maker(6, 12, test_samples=3)
    assert task.x.dtype == task.x_test.dtype == np.float32
    assert (task.samples, task.timesteps, task.features) == task.x.shape
    assert task.x_test.shape == (3, *task.x.shape[1:])
    assert task.per_step == (task.y.shape == task.x.shape[:2])
    assert 0 < task.solved_below < task.constant_loss
    if task.loss == "mse":
        assert (task.output_activation, task.outputs) == (None, task.y.shape[1])
    else:
        assert (task.loss, task.output_activation) == (
            "sparse_categorical_crossentropy",
            "softmax",
        )
        assert np.issubdtype(task.y.dtype, np.integer)


def test_task_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        adding_problem(1).name = "other"


# Adding -------------------------------------------------------------------------------------------


@few
@given(samples=counts, timesteps=st.integers(2, 31), seed=seeds)
def test_adding_sums_the_marked_numbers(samples, timesteps, seed):
    task = adding_problem(samples, timesteps, seed, test_samples=3)
    assert task.x.shape == (samples, timesteps, 2)
    assert task.y.shape == (samples, 1) and task.y.dtype == np.float32
    for x, y in both_halves(task):
        assert ((x[..., 0] >= 0) & (x[..., 0] < 1)).all()
        for sequence, (target,) in zip(x, y, strict=True):
            marked = [t for t, mark in enumerate(sequence[:, 1]) if mark == 1]
            assert len(marked) == np.count_nonzero(sequence[:, 1]) == 2
            assert marked[0] < timesteps // 2 <= marked[1]
            assert target == pytest.approx(sum(float(sequence[t, 0]) for t in marked), abs=1e-6)


def test_adding_marks_reach_every_step():
    marks = adding_problem(500, 7).x[..., 1].sum(axis=0)
    assert (marks > 0).all() and marks[:3].sum() == marks[3:].sum() == 500


def test_adding_constant_loss_is_the_variance_of_the_sum():
    task = adding_problem(20_000, 4)
    assert task.constant_loss == 1 / 6
    # d = (y - 1)² has mean 1/6 and, y - 1 being triangular on [-1, 1], second moment 1/15.
    error = math.sqrt((1 / 15 - 1 / 36) / task.samples)
    assert np.mean((task.y - 1.0) ** 2) == pytest.approx(1 / 6, abs=4 * error)
    # No other constant does better: the mean of y is 1 within its standard error.
    assert task.y.mean() == pytest.approx(1, abs=4 * math.sqrt(1 / 6 / task.samples))


# Copying ------------------------------------------------------------------------------------------


@few
@given(
    samples=counts,
    blank=st.integers(2, 20),
    seed=seeds,
    symbols=st.integers(5, 9),
    length=st.integers(3, 6),
)
def test_copying_repeats_the_message(samples, blank, seed, symbols, length):
    task = copying_memory(samples, blank, seed, symbols=symbols, length=length, test_samples=3)
    assert task.x.shape == (samples, blank + 2 * length, symbols + 2)
    assert (task.outputs, task.per_step) == (symbols + 1, True)
    for x, y in both_halves(task):
        assert (np.sort(x, axis=-1)[..., :-1] == 0).all() and (x.max(axis=-1) == 1).all()
        for code, target in zip(x.argmax(axis=-1).tolist(), y.tolist(), strict=True):
            message = code[:length]
            assert max(message) < symbols
            filler = [symbols] * (blank - 1) + [symbols + 1] + [symbols] * length
            assert code == message + filler
            assert target == [symbols] * (blank + length) + message


@pytest.mark.parametrize("blank", [10, 100, 1000])
def test_copying_baseline_of_the_paper(blank):
    task = copying_memory(2, blank, test_samples=2)
    assert task.constant_loss == pytest.approx(10 * math.log(8) / (blank + 20), rel=1e-15)
    # One symbol of the ten guessed and the rest known.
    assert task.solved_below == pytest.approx(math.log(8) / (blank + 20), rel=1e-15)


def test_copying_constant_loss_is_what_the_memoryless_answer_scores():
    task = copying_memory(30, 12, symbols=5, length=4)
    answer = np.zeros((*task.y.shape, 6))
    answer[:, :16, 5] = 1  # Blank, surely, until the recall …
    answer[:, 16:, :5] = 1 / 5  # … and any symbol in it.
    assert cross_entropy(answer, task.y) == pytest.approx(task.constant_loss, rel=1e-12)


def test_copying_uses_every_symbol_at_every_place():
    message = copying_memory(500, 2, symbols=3, length=8).y[:, -8:]
    assert all(set(place) == {0, 1, 2} for place in message.T)


@pytest.mark.parametrize(("name", "least"), [("symbols", 2), ("length", 1)])
def test_copying_bounds(name, least):
    with pytest.raises(ValueError, match=rf"got {name}={least - 1}, expected at least {least}"):
        copying_memory(1, **{name: least - 1})


# Temporal order -----------------------------------------------------------------------------------


@few
@given(samples=counts, timesteps=st.integers(10, 64), seed=seeds)
def test_temporal_order_classes_and_windows(samples, timesteps, seed):
    task = temporal_order(samples, timesteps, seed, test_samples=3)
    assert task.x.shape == (samples, timesteps, 6)
    for x, y in both_halves(task):
        assert (x.sum(axis=-1) == 1).all() and ((x == 0) | (x == 1)).all()
        for code, label in zip(x.argmax(axis=-1), y, strict=True):
            text = "".join("ABcdef"[k] for k in code)
            (i, first), (j, second) = ((t, s) for t, s in enumerate(text) if s in "AB")
            assert timesteps <= 10 * i <= 2 * timesteps
            assert 4 * timesteps <= 10 * j <= 5 * timesteps
            assert ["AA", "AB", "BA", "BB"][label] == first + second


def test_temporal_order_fills_its_windows_and_classes():
    task = temporal_order(1000, 20)
    relevant = task.x[..., :2].sum(axis=(0, 2))
    assert np.flatnonzero(relevant).tolist() == [2, 3, 4, 8, 9, 10]
    assert set(task.x.argmax(axis=-1).ravel()) == set(range(6))
    # Each class is binomial with p = 1/4.
    error = math.sqrt(1000 * 1 / 4 * 3 / 4)
    assert np.bincount(task.y) == pytest.approx([250] * 4, abs=4 * error)


def test_temporal_order_losses():
    task = temporal_order(50, 20)
    assert cross_entropy(np.full((50, 4), 1 / 4), task.y) == pytest.approx(math.log(4))
    assert task.constant_loss == math.log(4)
    # The cheapest way to misclassify 1%: a tie on those, certainty on the rest.
    answer = np.eye(4)[[0] * 100]
    answer[0] = [1 / 2, 1 / 2, 0, 0]
    assert task.solved_below == pytest.approx(cross_entropy(answer, np.zeros(100, int)))


# Digits -------------------------------------------------------------------------------------------


def test_digits_are_the_images_pixel_by_pixel():
    images = pytest.importorskip("sklearn.datasets").load_digits()
    task = digits()
    assert task.x.dtype == np.float32 and task.x.shape[1:] == (64, 1)
    assert (task.outputs, task.output_activation, task.per_step) == (10, "softmax", False)
    labels = {
        tuple(image[r, c] for r in range(8) for c in range(8)): label
        for image, label in zip(images.images, images.target, strict=True)
    }
    assert len(labels) == 1797 and (len(task.x), len(task.x_test)) == (1438, 359)
    for x, y in both_halves(task):
        assert [labels.pop(tuple(16 * sequence[:, 0])) for sequence in x] == y.tolist()
    assert not labels  # Each image is in exactly one of the two sets.


def test_digits_split_is_stratified_and_seeded():
    pytest.importorskip("sklearn")
    task, same, other = digits(1), digits(1), digits(2)
    np.testing.assert_array_equal(task.x_test, same.x_test)
    assert rows(task.x_test) != rows(other.x_test)
    held_out = np.bincount(task.y_test)
    assert held_out / (held_out + np.bincount(task.y)) == pytest.approx([0.2] * 10, abs=0.5 / 174)


def test_digits_constant_loss_is_what_the_training_frequencies_score():
    pytest.importorskip("sklearn")
    task = digits()
    frequencies = [np.mean(task.y == label) for label in range(10)]
    answer = np.tile(frequencies, (len(task.y_test), 1))
    assert task.constant_loss == pytest.approx(cross_entropy(answer, task.y_test), rel=1e-12)
    assert task.constant_loss == pytest.approx(math.log(10), abs=0.01)
    assert type(task.constant_loss) is float


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = r'needs scikit-learn: pip install "kerasgrad\[digits\]"$'
    with pytest.raises(ImportError, match=message) as caught:
        digits()
    assert caught.value.__suppress_context__


# By name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adding", "copying", "temporal_order"])
def test_make_task_is_the_maker_of_that_name(name):
    made, direct = make_task(name, samples=3, timesteps=15, seed=2), TASKS[name](3, 15, 2)
    assert made.name == name
    np.testing.assert_array_equal(made.x, direct.x)
    assert make_task(name, samples=3).x.shape == TASKS[name](3).x.shape


@pytest.mark.parametrize("timesteps", [None, 64])
def test_make_task_digits(timesteps):
    pytest.importorskip("sklearn")
    task = make_task("digits", timesteps=timesteps, seed=1)
    assert (task.name, task.timesteps) == ("digits", 64)
    np.testing.assert_array_equal(task.x, digits(1).x)


def test_make_task_digits_of_another_length():
    with pytest.raises(ValueError, match="got timesteps=100, but digits has fixed 64 timesteps"):
        make_task("digits", timesteps=100)


def test_make_task_unknown_name():
    message = "no task 'sorting': choose one of adding, copying, temporal_order, digits$"
    with pytest.raises(ValueError, match=message):
        make_task("sorting")


def test_module_needs_neither_keras_nor_tensorflow_nor_scikit_learn():
    # By path, as the package around the module may well import Keras.
    script = (
        "import runpy, sys\n"
        "for name in ('keras', 'tensorflow', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        # dataclasses look up the module they are defined in.
        f"runpy.run_path({tasks.__file__!r}, run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
