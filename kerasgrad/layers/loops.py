"""The loops over time that the recurrences run in, forward and back, as a machine needs them.

On a processor they go by chunks of steps: what need not wait for the step before is done for a
chunk at once, which a core's cache holds, and a loop inside takes the chunk's single steps. The
loops are compiled by XLA, and each pass of a step is over one long row, the numbers of every unit
of every example, as vector instructions need.

A GPU waits for each launch of an operation, and not for its cache: there all steps are one chunk,
and a round of the loop takes several steps, which XLA launches together. Where what is handed on
depends linearly on what came,

    s_t = a_t ⊙ s_{t-1} + b_t,

no loop over the steps is left: `scan` takes all of them at once, in log_2 T passes.

All of it is called in compiled functions, on arrays whose first axis is time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from kerasgrad import devices

# Compiled apart from the model around them: under XLA these loops write their results in place,
# which the same loops in a plain graph do not. (Of a tensor's argument that has a Greek name,
# TensorFlow warns.)
compiled = tf.function(jit_compile=True, reduce_retracing=True, autograph=False)

# How large a chunk is at the most, as measured. With gates, so many numbers of each array: a core's
# cache (1 MB) has to hold some ten of them. For the simple recurrence's sums, so many examples of
# steps.
GATES_NUMBERS, SIMPLE_EXAMPLES = 2**14, 2**8
# A product of more multiplications TensorFlow cuts in two, for the other core, which has its own
# share to do.
UNCUT_MULTIPLICATIONS = 1_400_000
# How many steps a round of a GPU's loop takes, as measured: with more of them a step of training is
# little faster or not at all, and compiling takes longer.
SIMPLE_STEPS_OF_A_ROUND, GATED_STEPS_OF_A_ROUND = 4, 16


def examples_of_a_simple_chunk(features: tf.Tensor, units: tf.Tensor) -> tf.Tensor:
    """How many examples of steps are summed up at once for ∂L/∂U and ∂L/∂W."""
    uncut = UNCUT_MULTIPLICATIONS // ((features + units) * units)
    # With so large weights that fewer are left, small products cost more than cut ones.
    return tf.minimum(tf.where(uncut < 32, SIMPLE_EXAMPLES, uncut), SIMPLE_EXAMPLES)


def steps_of_a_chunk(T: tf.Tensor, step: tf.Tensor, most: tf.Tensor) -> tf.Tensor:
    """How many of T steps, where one is so large, and a chunk may be so large."""
    return T if devices.on_gpu() else tf.clip_by_value(most // tf.maximum(1, step), 1, T)


# Forward


def forward(
    x: tf.Tensor,
    s_0: tf.Tensor,
    mask: tf.Tensor | None,
    of_inputs: Callable[[tf.Tensor], list[tf.Tensor]],
    step: Callable[..., tf.Tensor],
    steps_of_a_round: int,
) -> tf.Tensor:
    """s_0 to s_T, (T + 1, numbers of a step).

    Args:
        x: (T, examples, features).
        s_0: (examples, units).
        mask: (T, examples) bool or None; False repeats the state.
        of_inputs: from x of some steps to a list of arrays, which hold what these steps need.
        step: from s_{t-1}, one row, and what step t needs of each array, to s_t.
        steps_of_a_round: on a GPU.
    """
    T, units, s_0 = tf.shape(x)[0], tf.shape(s_0)[1], flat(s_0)

    def after(s, t, needed, row):
        s_t = step(s, *(array[row] for array in needed))
        return s_t if mask is None else tf.where(tf.repeat(mask[t], units), s_t, s)

    if devices.on_gpu():
        needed = of_inputs(x)
        _, s = _in_rounds(T, steps_of_a_round, lambda t, s: [after(s, t, needed, t)] * 2, s_0, 1)
        return tf.concat([s_0[tf.newaxis], s], axis=0)
    steps = steps_of_a_chunk(T, tf.size(s_0), GATES_NUMBERS)

    def through_chunk(chunk, states):
        # The last chunk is as long as the others, and begins within the one before.
        start = tf.minimum(chunk * steps, T - steps)
        needed = of_inputs(some_of(x, start, steps))

        def body(t, states):
            s = states.read(start + t)
            return t + 1, states.write(start + t + 1, after(s, start + t, needed, t))

        return chunk + 1, tf.while_loop(lambda t, _: t < steps, body, (0, states))[1]

    chunks = _chunks(T, steps)
    states = _filled_in_place(T + 1, s_0).write(0, s_0)
    return tf.while_loop(lambda chunk, _: chunk < chunks, through_chunk, (0, states))[1].stack()


def _chunks(T, steps):
    """How many chunks of so many steps T steps are, the one that is not full among them."""
    return (T - 1) // steps + 1


def _filled_in_place(T, like):
    """An array for T steps, which a compiled loop fills in place; 0 where it does not."""
    return tf.TensorArray(like.dtype, T, element_shape=[None], clear_after_read=False)


# Backward


def back_by_chunks(
    T: tf.Tensor,
    steps: tf.Tensor,
    through_chunk: Callable[..., tuple],
    kept: Sequence[tuple[tf.DType, int]],
    from_later: tf.Tensor,
    *sums: tf.Tensor,
) -> tuple:
    """From the last chunk of so many steps to the first, which comes first of those T.

    All chunks have as many steps, so that they are compiled once; of the first one's only so many
    are its own, and the others, at its end, belong to the second.

    Args:
        through_chunk: from the step that the chunk starts with, how many steps are its own, what
            comes from later ones, and the sums, to what goes on to earlier steps, a list of arrays
            to keep, (steps, ...) each, and the sums.
        kept: (dtype, rank) of each array to keep.
        from_later: what goes into the last step.
        sums: what they start with.

    Returns:
        What goes on from the first step; a list of the arrays, of all T steps; and the sums.
    """
    if devices.on_gpu():
        return through_chunk(0, T, from_later, *sums)
    chunks = _chunks(T, steps)

    def body(chunk, from_later, arrays, *sums):
        end = T - (chunks - 1 - chunk) * steps
        start = tf.maximum(end - steps, 0)
        own = end - start
        from_later, values, *sums = through_chunk(start, own, from_later, *sums)
        # Its own last, so that those of all chunks follow each other.
        arrays = [
            array.write(chunk, tf.roll(of_steps, steps - own, axis=0))
            for array, of_steps in zip(arrays, values, strict=True)
        ]
        return from_later, arrays, *sums

    arrays = [tf.TensorArray(dtype, chunks, element_shape=[None] * rank) for dtype, rank in kept]
    from_later, arrays, *sums = _from_last(chunks, body, from_later, arrays, *sums)
    by_chunk = [array.stack() for array in arrays]
    of_steps = [tf.reshape(array, [-1, *tf.unstack(tf.shape(array))[2:]]) for array in by_chunk]
    return from_later, [array[-T:] for array in of_steps], *sums


def back_through_steps(
    steps: tf.Tensor,
    own: tf.Tensor,
    back: Callable[[tf.Tensor, tf.Tensor], tuple],
    from_later: tf.Tensor,
    count: int,
    steps_of_a_round: int,
) -> tuple:
    """The loop over a chunk's own steps, from the last: what goes on to earlier ones, and arrays.

    Args:
        steps: how many steps the chunk has.
        own: how many are its own, the first ones.
        back: from t and what comes from later steps, one row, to what goes on, and step t of each
            array.
        count: how many arrays these are.
        steps_of_a_round: on a GPU.

    Returns:
        What goes on from step 0, and each array, (steps, numbers of a step); 0 of those not its
        own.
    """
    if not devices.on_gpu():
        return _back_one_by_one(steps, own, back, from_later, count)

    def step(t, from_later):
        return back(own - 1 - t, from_later)

    from_later, *backwards = _in_rounds(own, steps_of_a_round, step, from_later, count)
    return from_later, *(tf.reverse(array, [0]) for array in backwards)


def _back_one_by_one(steps, own, back, from_later, count):
    def body(t, from_later, *arrays):
        from_later, *of_step = back(t, from_later)
        written = (array.write(t, value) for array, value in zip(arrays, of_step, strict=True))
        return from_later, *written

    arrays = [_filled_in_place(steps, from_later) for _ in range(count)]
    from_later, *arrays = _from_last(own, body, from_later, *arrays)
    return from_later, *(array.stack() for array in arrays)


def back_through_elementwise_steps(
    own: tf.Tensor, to_earlier: tf.Tensor, upstream: tf.Tensor | None, from_later: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """As `back_through_steps`, of λ alone, where step t hands on to_earlier_t ⊙ λ_t.

    Args:
        to_earlier: (steps, numbers of a step).
        upstream: g of the steps, of the same shape, or None for 0.
    """
    if devices.on_gpu():
        # λ_t = g_t + to_earlier_{t+1} ⊙ λ_{t+1}, from the last step, which has from_later.
        a = tf.concat([to_earlier[1:], tf.ones_like(to_earlier[:1])], axis=0)
        b = tf.zeros_like(a) if upstream is None else upstream
        backwards = scan(tf.reverse(a, [0]), tf.reverse(b, [0]), from_later)
        λ = tf.reverse(backwards[1:], [0])
        return to_earlier[0] * λ[0], λ

    def back(t, from_later):
        λ_t = plus_upstream(upstream, t, from_later)
        return to_earlier[t] * λ_t, λ_t

    return _back_one_by_one(tf.shape(to_earlier)[0], own, back, from_later, 1)


def plus_upstream(upstream: tf.Tensor | None, t: tf.Tensor, from_later: tf.Tensor) -> tf.Tensor:
    """λ_t, of g_t and what comes from later steps."""
    return from_later if upstream is None else upstream[t] + from_later


def _from_last(count, body, *carried):
    """carried = body(t, *carried) for t from count - 1 to 0."""

    def body_of_loop(t, *carried):
        after = body(t, *carried)
        # Where one trace serves layers of several sizes, TensorFlow loses shapes on the way.
        for old, new in zip(tf.nest.flatten(carried), tf.nest.flatten(after), strict=True):
            if isinstance(new, tf.Tensor):
                new.set_shape(old.shape)
        return t - 1, *after

    return tf.while_loop(lambda t, *_: t >= 0, body_of_loop, (count - 1, *carried))[1:]


# On a GPU, forward and backward


def scan(a: tf.Tensor, b: tf.Tensor, s_0: tf.Tensor) -> tf.Tensor:
    """s_0 to s_T of s_t = a_t ⊙ s_{t-1} + b_t, all steps at once (Kogge and Stone 1973).

    Each pass doubles how many steps back s_t reaches; a_t is the product of their factors. None
    divides: the factors of closed gates may be 0.

    Args:
        a: (T, numbers of a step), no larger than 1, or a product of many may overflow.
        b: (T, numbers of a step).
        s_0: (numbers of a step,).
    """
    T = tf.shape(a)[0]
    t = tf.range(T)

    def twice(reach, a, s):
        def before(array):
            earlier = tf.gather(array, tf.maximum(t - reach, 0))
            return tf.where(t[:, tf.newaxis] < reach, tf.zeros_like(array), earlier)

        return 2 * reach, a * before(a), s + a * before(s)

    s = tf.concat([a[:1] * s_0 + b[:1], b[1:]], axis=0)
    s = tf.while_loop(lambda reach, *_: reach < T, twice, (1, a, s))[2]
    return tf.concat([s_0[tf.newaxis], s], axis=0)


def _in_rounds(T, steps_of_a_round, step, carried, count):
    """carried after T steps, and arrays of what the steps give: carried, *given = step(t, carried).

    Several steps are a round, which writes what they give at once, and the rest are rounds of one.
    XLA counts all rounds beforehand, upwards as they go, and so need not ask the host after each.

    Args:
        T: how many steps.
        steps_of_a_round: how many are a round.
        step: from t, from 0 to T - 1, and what is carried, to what is carried and what is given.
        carried: one array of one axis; those given have its dtype, and one axis each.
        count: how many are given.
    """

    def rounds(first, number, steps, carried):
        def round_(n, carried, *arrays):
            shape, given = carried.shape, []
            for t in range(steps):
                carried, *of_step = step(first + n * steps + t, carried)
                given.append(of_step)
            carried.set_shape(shape)
            of_round = (tf.stack(of_step) for of_step in zip(*given, strict=True))
            written = (array.write(n, of) for array, of in zip(arrays, of_round, strict=True))
            return n + 1, carried, *written

        # XLA does not compile what writes to an array of no rounds.
        arrays = [
            tf.TensorArray(carried.dtype, tf.maximum(number, 1), element_shape=[steps, None])
            for _ in range(count)
        ]
        loop = tf.while_loop(lambda n, *_: n < number, round_, (0, carried, *arrays))
        return loop[1], [rows(array.stack())[: number * steps] for array in loop[2:]]

    whole = T // steps_of_a_round
    carried, given = rounds(0, whole, steps_of_a_round, carried)
    carried, rest = rounds(whole * steps_of_a_round, T % steps_of_a_round, 1, carried)
    return carried, *(tf.concat(parts, axis=0) for parts in zip(given, rest, strict=True))


# Arrays, as the loops need them


def some_of(array: tf.Tensor, start: tf.Tensor, steps: tf.Tensor, axis: int = 0) -> tf.Tensor:
    """So many steps of an array, from one on."""
    # Unlike array[start : start + steps], of a size that XLA can tell.
    size = tf.unstack(tf.shape(array))
    begin = [0] * len(size)
    begin[axis], size[axis] = start, steps
    return tf.slice(array, begin, size)


def flat(array: tf.Tensor) -> tf.Tensor:
    """All numbers of an array in one row."""
    return tf.reshape(array, [-1])


def swap(array: tf.Tensor) -> tf.Tensor:
    """Batch first, where time was, or time first again."""
    return tf.transpose(array, [1, 0, 2])


def rows(array: tf.Tensor) -> tf.Tensor:
    """An array of vectors as a matrix of their rows."""
    # Not array.shape[-1]: it is None once one trace serves layers of different sizes.
    return tf.reshape(array, [-1, tf.shape(array)[-1]])
