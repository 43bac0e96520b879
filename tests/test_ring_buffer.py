"""The ring buffer against a plain list of rows, read at random times."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from kerasgrad.ring_buffer import HeldStateNorms, RingBuffer, Row, outside_of_the_trace, same, when

WEIGHTS = ("a", "b", "c")


def write_row(buffer, number, *, missing=(), applied=None, scale=1.0, due=None):
    """A row whose numbers all follow from its own; the gradient of weight w is 2 numbers."""
    gradients = [
        None if w in missing else tf.fill([2], scale * float(10 * number + w + 1))
        for w in range(len(buffer.weights))
    ]
    loss = tf.constant(number / 2, tf.float64)
    row = Row(buffer, gradients, due, step=tf.constant(number), scale=scale, loss=loss)
    if applied is not None:
        before = [g / scale for g in gradients if g is not None]
        row.write_applied(before, before if applied == 1 else [applied * g for g in before])
    row.close()


def expected_row(number, *, missing=(), applied=None, **_) -> dict[str, Any]:
    norms = [np.sqrt(2) * (10 * number + w + 1) for w in range(len(WEIGHTS))]
    norms = [np.nan if w in missing else norm for w, norm in enumerate(norms)]
    return {
        "step": number,
        "loss": number / 2,
        "norms": norms,
        "applied_norms": [np.nan if applied is None else applied * norm for norm in norms],
        "missing": [w in missing for w in range(len(WEIGHTS))],
        "updated": applied is not None,
        # A missing gradient counts as not clipped.
        "clip_factor": np.nan if applied is None else min(applied, 1) if missing else applied,
    }


def assert_piece(piece, rows):
    assert piece["weights"] == WEIGHTS
    for name in "step", "loss", "norms", "applied_norms", "missing", "updated", "clip_factor":
        expected = np.array([row[name] for row in rows])
        assert len(piece[name]) == len(rows)
        if rows:
            np.testing.assert_allclose(piece[name], expected, rtol=1e-6, err_msg=name)


ROWS = st.fixed_dictionaries(
    {},
    optional={
        "missing": st.sampled_from([(), (0,), (1, 2)]),
        "applied": st.sampled_from([None, 1, 0.25]),
        "scale": st.sampled_from([1.0, 64.0]),
        "due": st.sampled_from([None, tf.constant(True), tf.constant(False)]),
    },
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.lists(st.one_of(st.just("read"), ROWS), max_size=16))
def test_rows_come_out_as_they_went_in(capacity, actions):
    buffer, unread = RingBuffer(WEIGHTS, capacity, tf.float32), []
    for number, action in enumerate([*actions, "read"]):
        if action != "read":
            write_row(buffer, number, **action)
            due = action.get("due")
            if due is None or bool(due):
                unread.append(expected_row(number, **action))
            continue
        lost = max(0, len(unread) - capacity)
        reports = pytest.warns(UserWarning, match=f"lost {lost} rows.*made {len(unread)} updates")
        with reports if lost else contextlib.nullcontext(), warnings.catch_warnings():
            if not lost:
                warnings.simplefilter("error")
            piece = buffer.read()
        assert_piece(piece, unread[lost:])
        unread = []
    assert_piece(buffer.read(), [])  # Nothing twice.


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_compiled_function(jit_compile):
    buffer = RingBuffer(WEIGHTS, 4, tf.float64)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def step(number, due):
        gradients = [tf.fill([2], tf.cast(number, tf.float64) + w) for w in range(2)]
        loss = tf.cast(number, tf.float64)
        row = Row(buffer, [*gradients, None], due, step=number, scale=2.0, loss=loss)
        row.write_applied(gradients, [g * 0.5 for g in gradients])
        row.close()

    for number in range(1, 10):
        step(tf.constant(number), tf.constant(number % 3 > 0))
        if number in (4, 6):
            piece = buffer.read()
    np.testing.assert_array_equal(piece["step"], [5])
    piece = buffer.read()
    np.testing.assert_array_equal(piece["step"], [7, 8])
    expected = np.sqrt(2) * np.array([[7, 8, np.nan], [8, 9, np.nan]])
    np.testing.assert_allclose(piece["norms"], expected / 2, rtol=1e-12)  # Loss scale undone.
    np.testing.assert_allclose(piece["applied_norms"], expected / 2, rtol=1e-12)
    np.testing.assert_allclose(piece["clip_factor"], 0.5, rtol=1e-12)
    assert piece["missing"].tolist() == [[False, False, True]] * 2


def test_a_row_that_is_not_closed_does_not_count():
    buffer = RingBuffer(WEIGHTS, 4, tf.float32)
    write_row(buffer, 0, applied=1)
    gradients = [tf.ones(2)] * 3
    row = Row(buffer, gradients, None, step=tf.constant(1), scale=1.0, loss=tf.constant(0.0))
    row.write_applied(gradients, gradients)
    assert_piece(buffer.read(), [expected_row(0, applied=1)])
    buffer.forget_unfinished_row()
    write_row(buffer, 2)  # Nor does what was applied two rows before shine through.
    assert_piece(buffer.read(), [expected_row(2)])


def test_zero_and_non_finite_norms_are_no_missing_gradients():
    buffer = RingBuffer(WEIGHTS, 2, tf.float32)
    gradients = [tf.zeros(2), tf.constant([np.nan, 1.0]), tf.constant([np.inf, 1.0])]
    loss = tf.constant(np.nan, tf.float64)
    row = Row(buffer, gradients, None, step=tf.constant(0), scale=1.0, loss=loss)
    row.write_applied(gradients, gradients)
    row.close()
    piece = buffer.read()
    np.testing.assert_array_equal(piece["norms"], [[0, np.nan, np.inf]])
    np.testing.assert_array_equal(piece["applied_norms"], [[0, np.nan, np.inf]])
    assert piece["updated"].all() and not piece["missing"].any()


def test_all_gradients_missing():
    buffer = RingBuffer(WEIGHTS, 2, tf.float32)
    write_row(buffer, 0, missing=(0, 1, 2))
    piece = buffer.read()
    assert piece["missing"].all() and np.isnan(piece["norms"]).all()
    assert not piece["updated"].any()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(1, 4))
def test_state_norms_of_any_length(lengths, capacity):
    buffer, held = RingBuffer(("a",), capacity, tf.float64), HeldStateNorms(None)
    key, unread, widest = ("layer", 0), [], 0
    for number, T in enumerate(lengths):
        values = np.arange(T) + 10.0 * number
        held.variable.assign(values)
        step, loss = tf.constant(number), tf.constant(0.0)
        row = Row(buffer, [tf.ones(1)], None, step=step, scale=1.0, loss=loss)
        row.write_state_norms(key, held.take(), held, timesteps=None, fixed_length=False)
        row.close()
        # What a layer has handed over is taken once: a step without the layer has NaN.
        assert held.take().shape == (T,) and np.isnan(held.take()).all()
        unread, widest = [*unread, values][-capacity:], max(widest, T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorded = buffer.read()["state_norms"]["layer"]
    padded = [np.pad(v, (0, widest - len(v)), constant_values=np.nan) for v in unread]
    np.testing.assert_array_equal(recorded, padded)


def test_calls_of_one_layer_are_numbered_in_their_order():
    buffer = RingBuffer(("a",), 2, tf.float32)
    for index, call in enumerate([5, 2]):  # The gradient of the later call comes first.
        held = HeldStateNorms(1)
        held.call = call
        buffer.state_norms_of(("layer", index), held)
    assert list(buffer.read()["state_norms"]) == ["layer (call 2 of 2)", "layer (call 1 of 2)"]


def test_when():
    acts = []
    when(None, lambda: acts.append("always"))
    when(tf.constant(True), lambda: acts.append("true"))
    when(tf.constant(False), lambda: acts.append("false"))
    assert acts == ["always", "true"]


def test_same():
    a, b = tf.ones(2), tf.ones(2)
    assert same([a, b], [a, b]) and same([], [])
    assert not same([a], [b]) and not same([a], [a, b])


def test_variables_made_in_a_trace():
    made = []

    @tf.function(autograph=False)
    def step(x):
        if not made:
            made.append(outside_of_the_trace(lambda: tf.Variable(3.0)))
        return made[0] * x

    assert float(step(tf.constant(2.0))) == 6
    assert step.experimental_get_tracing_count() == 1
    with pytest.raises(ZeroDivisionError):
        outside_of_the_trace(lambda: 1 / 0)
