"""Norms of gradients, as operations in the graph of a train step."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

# Between these a float32 sum of squares neither overflows nor loses what matters to underflow.
_SMALLEST, _LARGEST = 1e-15, 1e15

# Up to so many elements float64 throughout costs less than to choose in the graph: for a single
# condition TensorFlow runs every operation of the train step with an executor that is slower.
_FEW = 2**16

_PRODUCTS = {"Mul": tf.raw_ops.Mul, "RealDiv": tf.raw_ops.RealDiv}


def gradient_norms(gradients: list[tf.Tensor | tf.IndexedSlices]) -> list[tf.Tensor]:
    """The L2 norm of each gradient, float64, true for gradients of 1e-30 and of 1e30, too.

    ‖g‖ is summed in float64; that of a gradient with many elements in its own precision, where that
    is enough. Of a gradient that the graph has just multiplied by a scalar, as clipping by a norm
    does, it is ‖s·g‖ = |s|·‖g‖, which costs no further pass over the gradient.
    """
    if not gradients:
        return []
    bases, factors = zip(*map(_factored, gradients), strict=True)
    large = [base for base in bases if not _has_few_elements(base)]
    norms_of_large = iter(_chosen_norms(large) if large else [])
    norms = [
        _norm(tf.cast(base, tf.float64)) if _has_few_elements(base) else next(norms_of_large)
        for base in bases
    ]
    return [
        norm if factor is None else norm * factor
        for norm, factor in zip(norms, factors, strict=True)
    ]


def at_least_float32(values: tf.Tensor) -> tf.Tensor:
    """The same numbers; half precision becomes float32."""
    return tf.cast(values, tf.float32) if values.dtype.size < 4 else values


def state_norms(state_gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """(T,) float64: mean over the batch of ‖∂L/∂s_t‖₂, from ∂L/∂s_t in shares of the batch.

    Each share is (T, examples, units).
    """
    examples = tf.add_n([tf.shape(λ)[1] for λ in state_gradients])
    return tf.add_n([_summed_norms(λ) for λ in state_gradients]) / tf.cast(examples, tf.float64)


@tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
def _summed_norms(state_gradients):
    λ = tf.cast(state_gradients, tf.float64)
    T, examples, units = tf.unstack(tf.shape(λ))
    # Compiled, a sum over the last axis adds one number at a time; a product with ones does not.
    squares = tf.reshape(λ * λ, [T * examples, units]) @ tf.ones([units, 1], tf.float64)
    return tf.reduce_sum(tf.sqrt(tf.reshape(squares, [T, examples])), axis=1)


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


def _has_few_elements(gradient):
    elements = gradient.shape.num_elements()
    return elements is not None and elements <= _FEW


def _chosen_norms(gradients):
    quick = tf.stack([tf.cast(_norm(at_least_float32(g)), tf.float64) for g in gradients])
    enough = tf.reduce_all((quick > _SMALLEST) & (quick < _LARGEST))
    norms = tf.cond(
        enough,
        lambda: quick,
        lambda: tf.stack([_norm(tf.cast(g, tf.float64)) for g in gradients]),
    )
    return tf.unstack(norms)


def _norm(values):
    return tf.sqrt(2 * tf.nn.l2_loss(values))


def _factored(tensor):
    """(base, factor): tensor = base times a scalar of absolute value `factor`, None for 1.

    Nobody then reads the product itself (see read_apart). Of a sparse gradient, base is dense.
    """
    if isinstance(tensor, tf.IndexedSlices):
        values, factor = _factored(tensor.values)
        return _summed_rows(values, tensor.indices), factor
    if tf.executing_eagerly():
        return tensor, None
    if tensor.op.type == "Identity":
        return _factored(tensor.op.inputs[0])
    if tensor.op.type not in _PRODUCTS:
        return tensor, None
    x, y = tensor.op.inputs
    if tensor.op.type == "Mul" and x.shape.num_elements() == 1:
        x, y = y, x
    if y.shape.num_elements() != 1:
        return read_apart(tensor), None
    base, factor = _factored(x)
    scalar = tf.abs(tf.cast(tf.reshape(y, []), tf.float64))
    if tensor.op.type == "RealDiv":
        scalar = 1 / scalar
    return base, scalar if factor is None else scalar * factor


def _summed_rows(values, indices):
    """The rows of an embedding's sparse gradient, those of the same index added up."""
    order = tf.argsort(indices)
    sorted_indices = tf.gather(indices, order)
    is_new = tf.cast(sorted_indices[1:] != sorted_indices[:-1], tf.int32)
    segments = tf.concat([[0], tf.cumsum(is_new)], axis=0)
    return tf.math.unsorted_segment_sum(tf.gather(values, order), segments, tf.shape(indices)[0])
