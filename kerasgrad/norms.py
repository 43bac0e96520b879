"""Norms of gradients, as operations in the graph of a train step."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from kerasgrad import devices

# Between these a float32 sum of squares neither overflows nor loses what matters to underflow.
_SMALLEST, _LARGEST = 1e-15, 1e15

# Up to so many elements float64 throughout costs less than to choose in the graph: for a single
# condition TensorFlow runs every operation of the train step with an executor that is slower, and
# what the condition may need is held until it is known.
_FEW = 2**16

_PRODUCTS = {"Mul": tf.raw_ops.Mul, "RealDiv": tf.raw_ops.RealDiv}


def gradient_norms(gradients: list[tf.Tensor | tf.IndexedSlices]) -> tf.Tensor:
    """(gradients,) float64: the L2 norm of each, true for gradients of 1e-30 and of 1e30, too.

    ‖g‖ is summed in float64; without a GPU, that of a gradient with many elements in its own
    precision, where that is enough. Two kinds of gradients cost no pass over their elements: one
    that the graph has just multiplied by a scalar, as clipping by a norm does, since
    ‖s·g‖ = |s|·‖g‖; and one with many elements, without a GPU, whose squares the graph has summed
    up already, again as clipping by a norm does.
    """
    if not gradients:
        return tf.zeros([0], tf.float64)
    # What follows the sums is done for all of them at once: in a step of few milliseconds, a few
    # operations for each weight would be seen.
    bases, scalars = zip(*map(_factored, gradients), strict=True)
    in_float64 = [i for i, base in enumerate(bases) if _is_summed_in_float64(base)]
    others = sorted({*range(len(bases))} - {*in_float64})
    norms = _norms([tf.cast(bases[i], tf.float64) for i in in_float64])
    if others:
        norms = tf.concat([norms, _chosen_norms([bases[i] for i in others])], axis=0)
        norms = tf.gather(norms, np.argsort(in_float64 + others))
    return norms * _absolute_products(scalars) if any(scalars) else norms


def at_least_float32(values: tf.Tensor) -> tf.Tensor:
    """The same numbers; half precision becomes float32."""
    return tf.cast(values, tf.float32) if values.dtype.size < 4 else values


def summed_norms(vectors: tf.Tensor) -> tf.Tensor:
    """(steps,) float64: for each step the sum over the examples of the vectors' L2 norms.

    The vectors are (steps, examples, units).
    """
    vectors = tf.cast(vectors, tf.float64)
    steps, examples, units = tf.unstack(tf.shape(vectors))
    # Compiled, a sum over the last axis adds one number at a time; a product with ones does not.
    squares = tf.reshape(vectors * vectors, [-1, units]) @ tf.ones([units, 1], tf.float64)
    return tf.reduce_sum(tf.sqrt(tf.reshape(squares, [steps, examples])), axis=1)


def read_apart(tensor: tf.Tensor) -> tf.Tensor:
    """The same tensor, read so that the update is compiled as it is without a reader.

    TensorFlow's graph optimizer turns lr * (scale * g) into (lr * scale) * g, which rounds
    otherwise, unless somebody else reads scale * g. So a product is not read, but multiplied once
    more; a Snapshot of its factors keeps the optimizer from seeing that both are the same.
    """
    if tf.executing_eagerly() or tensor.op.type not in _PRODUCTS:
        return tensor
    x, y = (tf.raw_ops.Snapshot(input=read_apart(factor)) for factor in tensor.op.inputs)
    return _PRODUCTS[tensor.op.type](x=x, y=y)


def _is_summed_in_float64(gradient):
    # On a GPU a pass over a gradient is short, and the host would wait for what a condition says.
    elements = gradient.shape.num_elements()
    return devices.on_gpu() or (elements is not None and elements <= _FEW)


def _chosen_norms(gradients):
    quick = tf.sqrt(_stacked([_sum_of_squares(g) for g in gradients]))
    enough = tf.reduce_all((quick > _SMALLEST) & (quick < _LARGEST))
    return tf.cond(
        enough,
        lambda: quick,
        lambda: _norms([tf.cast(g, tf.float64) for g in gradients]),
    )


def _sum_of_squares(tensor):
    """Σ g², in the tensor's own precision or in float32: the one that the graph has, or a new one.

    Keras clips by ops.sum(ops.square(g)), TensorFlow by reduce_sum(g * g, keepdims=True).
    """
    if not tf.executing_eagerly() and tensor.dtype.size >= 4:
        squares = (op for op in tensor.consumers() if _is_square(op))
        readers = (reader for op in squares for reader in op.outputs[0].consumers())
        for op in readers:
            if op.type == "Sum" and op.outputs[0].shape.num_elements() == 1:
                return tf.reshape(op.outputs[0], [])
    return 2 * tf.nn.l2_loss(at_least_float32(tensor))


def _is_square(op):
    return op.type == "Square" or (op.type == "Mul" and op.inputs[0] is op.inputs[1])


def _norms(tensors):
    if not tensors:
        return tf.zeros([0], tf.float64)
    return tf.sqrt(2 * _stacked([tf.nn.l2_loss(t) for t in tensors]))


def _stacked(scalars):
    """One vector of them, in float64."""
    if len({scalar.dtype for scalar in scalars}) > 1:
        scalars = [tf.cast(scalar, tf.float64) for scalar in scalars]
    return tf.cast(tf.stack(scalars), tf.float64)


def _absolute_products(scalars):
    """|product| of each list of (scalar, exponent), where the exponent is 1 or -1."""
    longest = max(map(len, scalars))
    dtypes = [scalar.dtype for pairs in scalars for scalar, _ in pairs]
    one = tf.ones([], dtypes[0]), 1
    factors, exponents = zip(
        *(pair for pairs in scalars for pair in [*pairs, *[one] * (longest - len(pairs))]),
        strict=True,
    )
    factors = tf.abs(_stacked([tf.reshape(s, []) for s in factors]))
    powers = factors ** np.array(exponents, np.float64)
    return tf.reduce_prod(tf.reshape(powers, [-1, longest]), axis=1)


def _factored(tensor):
    """(base, [(scalar, 1 or -1), ...]): tensor = base times the scalars or, with -1, divided by.

    Nobody then reads the product itself (see read_apart). Of a sparse gradient, base is dense.
    """
    if isinstance(tensor, tf.IndexedSlices):
        values, scalars = _factored(tensor.values)
        return _summed_rows(values, tensor.indices), scalars
    if tf.executing_eagerly():
        return tensor, []
    if tensor.op.type == "Identity":
        return _factored(tensor.op.inputs[0])
    if tensor.op.type not in _PRODUCTS:
        return tensor, []
    x, y = tensor.op.inputs
    if tensor.op.type == "Mul" and x.shape.num_elements() == 1:
        x, y = y, x
    if y.shape.num_elements() != 1:
        return read_apart(tensor), []
    base, scalars = _factored(x)
    return base, [*scalars, (y, 1 if tensor.op.type == "Mul" else -1)]


def _summed_rows(values, indices):
    """The rows of an embedding's sparse gradient, those of the same index added up."""
    order = tf.argsort(indices)
    sorted_indices = tf.gather(indices, order)
    is_new = tf.cast(sorted_indices[1:] != sorted_indices[:-1], tf.int32)
    segments = tf.concat([[0], tf.cumsum(is_new)], axis=0)
    return tf.math.unsorted_segment_sum(tf.gather(values, order), segments, tf.shape(indices)[0])
