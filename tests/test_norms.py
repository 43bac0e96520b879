"""The norms in the graph against NumPy in float64: any size, precision and kind of gradient."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import MODES
from hypothesis import given, settings
from hypothesis import strategies as st

from kerasgrad import devices
from kerasgrad import norms as norms_module
from kerasgrad.keras_private import CLIP_METHOD
from kerasgrad.norms import gradient_norms, read_apart, summed_norms

RTOL = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 2e-6, "float64": 1e-12}
# Below the smallest normal number TensorFlow's kernels take a float32 for 0, as its optimizers do.
MAGNITUDES = {
    "float16": (1e-7, 1e-3, 1.0, 1e4),
    "bfloat16": (1e-36, 1e-20, 1.0, 1e20, 1e38),
    "float32": (1e-36, 1e-30, 1e-15, 1e-7, 1.0, 1e7, 1e15, 1e25, 1e38),
    "float64": (1e-150, 1e-38, 1.0, 1e38, 1e150),
}


def exact(gradient):
    """Scaled before squaring, so that float64 itself neither overflows nor underflows."""
    values = np.asarray(tf.cast(tf.convert_to_tensor(gradient), tf.float64)).ravel()
    largest = np.max(np.abs(values), initial=0)
    if largest == 0 or not np.isfinite(largest):
        return np.sqrt(np.sum(values**2))
    return largest * np.linalg.norm(values / largest)


def drawn(size, dtype, shape=(3, 5), seed=0):
    values = np.random.default_rng(seed).uniform(0.2, 1, shape) * size
    return tf.constant(np.where(np.arange(values.size).reshape(shape) % 2, values, -values), dtype)


def take_for_many(patch, on_gpu):
    """Each gradient, however small, is summed as one of many elements, with a GPU or without."""
    patch.setattr(norms_module, "_FEW", 0)
    patch.setattr(devices, "on_gpu", lambda: on_gpu)


@pytest.fixture(params=["few", "many", "many on a GPU"])
def _elements(request, monkeypatch):
    """With each gradient, however small, summed as one of few elements and as one of many."""
    if request.param != "few":
        take_for_many(monkeypatch, on_gpu="GPU" in request.param)


FEW_AND_MANY = pytest.mark.usefixtures("_elements")


def in_mode(mode, function, *inputs):
    return [float(norm) for norm in MODES[mode](function)(*inputs)]


@FEW_AND_MANY
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_any_magnitude(mode, dtype):
    # Beside a gradient of 1, whose norm must not suffer from what the other one needs.
    compiled = MODES[mode](lambda *gradients: gradient_norms(list(gradients)))
    ones = drawn(1.0, dtype, (4,), seed=1)
    for size in MAGNITUDES[dtype]:
        gradients = [drawn(size, dtype), ones]
        norms = compiled(*gradients)
        assert norms.dtype == tf.float64 and norms.shape == (2,)
        np.testing.assert_allclose(norms, [*map(exact, gradients)], rtol=RTOL[dtype])


@FEW_AND_MANY
@pytest.mark.parametrize("mode", MODES)
def test_special_values_stay_with_their_gradient(mode):
    gradients = [
        tf.zeros([3, 2]),
        tf.constant([1.0, np.nan]),
        tf.constant([np.inf, 1.0]),
        tf.constant([3.0, -4.0]),
        tf.constant([-np.inf, np.nan]),
        tf.constant(-2.0),  # A scalar weight.
        tf.zeros([0, 4]),
    ]
    norms = in_mode(mode, lambda *g: gradient_norms(list(g)), *gradients)
    np.testing.assert_array_equal(norms, [0, np.nan, np.inf, 5, np.nan, 2, 0])


def test_no_gradients():
    assert gradient_norms([]).shape == (0,)


@FEW_AND_MANY
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rows_of_one_index_are_added_up(mode, scale):
    indices = tf.constant([4, 1, 4, 0, 1, 4], tf.int64)
    values = tf.constant(np.random.default_rng(2).normal(size=(6, 3)) * scale, "float32")

    def norms(indices, values):
        once = tf.IndexedSlices(values, indices, dense_shape=[5, 3])
        # As an optimizer's clipping makes it.
        scaled = tf.IndexedSlices(values * tf.constant(-0.5), indices, dense_shape=[5, 3])
        return gradient_norms([once, scaled, tf.ones([2, 2])])

    summed = np.zeros((5, 3))
    np.add.at(summed, indices.numpy(), values.numpy().astype("float64"))
    whole = exact(summed)
    expected = [whole, whole / 2, 2]
    np.testing.assert_allclose(in_mode(mode, norms, indices, values), expected, rtol=2e-6)


def test_rows_that_cancel():
    slices = tf.IndexedSlices(tf.constant([[2.0], [-2.0], [1.0]]), tf.constant([3, 3, 0]))
    assert float(gradient_norms([slices])[0]) == 1


PRODUCTS = {
    "g * s": (lambda g, h, s: g * s, 3.0),
    "s * g": (lambda g, h, s: s * g, 3.0),
    "g / s": (lambda g, h, s: g / s, 1 / 3),
    "(g * s) / t": (lambda g, h, s: (g * -s) / tf.constant(2.0), 1.5),
    "a scalar of shape (1, 1)": (lambda g, h, s: g * tf.reshape(s, [1, 1]), 3.0),
    "through an Identity": (lambda g, h, s: tf.identity(tf.identity(g) * s), 3.0),
    "s / g": (lambda g, h, s: s / g, None),
    "g * h": (lambda g, h, s: g * h, None),
    "s * (g * h)": (lambda g, h, s: s * (g * h), None),
    "(g * h) / (g * s)": (lambda g, h, s: (g * h) / (g * s), None),
    "h of a row": (lambda g, h, s: g * h[:1], None),
    "a scalar to a matrix": (lambda g, h, s: s * g[0, 0], None),
    "no product": (lambda g, h, s: g + s * h, None),
}


@FEW_AND_MANY
@pytest.mark.parametrize("mode", MODES)
def test_products(mode):
    g, h, s = drawn(1.0, "float32", seed=3), drawn(2.0, "float32", seed=4), tf.constant(3.0)

    def norms(g, h, s):
        return gradient_norms([make(g, h, s) for make, _ in PRODUCTS.values()])

    eager = [make(g, h, s) for make, _ in PRODUCTS.values()]
    expected = [
        exact(product) if factor is None else exact(g) * factor
        for product, (_, factor) in zip(eager, PRODUCTS.values(), strict=True)
    ]
    np.testing.assert_allclose(in_mode(mode, norms, g, h, s), expected, rtol=1e-6)


@FEW_AND_MANY
@pytest.mark.parametrize("special", [0.0, np.inf, np.nan])
def test_products_with_special_scalars(special):
    g = tf.constant([3.0, -4.0])
    norms = in_mode("graph", lambda g, s: gradient_norms([g * s, g / s]), g, tf.constant(special))
    with np.errstate(all="ignore"):
        expected = [np.abs(5.0 * special), np.abs(5.0 / np.float64(special))]
    np.testing.assert_array_equal(norms, expected)


@FEW_AND_MANY
@pytest.mark.parametrize("name", [name for name, (_, factor) in PRODUCTS.items() if factor])
def test_nobody_reads_a_product_with_a_scalar(name):
    # A second reader would change how TensorFlow compiles the update: see read_apart.
    products = []

    @tf.function(autograph=False)
    def step(g, s):
        before = len(tf.compat.v1.get_default_graph().get_operations())
        products.append(PRODUCTS[name][0](g, g, s))
        made = tf.compat.v1.get_default_graph().get_operations()[before:]
        products.extend(op.outputs[0] for op in made if op.type in ("Mul", "RealDiv"))
        consumers = [len(product.consumers()) for product in products]
        result = gradient_norms(products[:1])
        assert [len(product.consumers()) for product in products] == consumers
        return result

    step(drawn(1.0, "float32"), tf.constant(3.0))
    assert len(products) > 1


def clipped_by(**options):
    clip = getattr(keras.optimizers.SGD(**options), CLIP_METHOD)
    return lambda g: clip([g])[0]


CLIPS = {
    "clipnorm": clipped_by(clipnorm=0.7),
    "global_clipnorm": clipped_by(global_clipnorm=0.7),
    "tf.clip_by_norm": lambda g: tf.clip_by_norm(g, 0.7),
}


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("clip", CLIPS)
def test_of_a_clipped_gradient_the_squares_are_summed_up_once(clip, mode, monkeypatch):
    take_for_many(monkeypatch, on_gpu=False)
    kinds = []

    def norms(g):
        clipped = CLIPS[clip](g)
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        result = gradient_norms([g, clipped])
        kinds.extend(op.type for op in graph.get_operations()[before:])
        return result

    compiled = MODES[mode](norms)
    for size in MAGNITUDES["float32"]:
        g = drawn(size, "float32")
        np.testing.assert_allclose(compiled(g), [exact(g), exact(CLIPS[clip](g))], rtol=2e-6)
    # What is summed up in float64, where that is needed, is inside of the condition.
    assert kinds and not {"L2Loss", "Square", "Sum"} & set(kinds)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_gpu_need_not_wait_for_a_condition(on_gpu, monkeypatch):
    take_for_many(monkeypatch, on_gpu)
    graph = tf.function(lambda g: gradient_norms([g]), autograph=False).get_concrete_function(
        tf.TensorSpec([3, 5], tf.float32)
    )
    conditions = [op for op in graph.graph.get_operations() if op.type in ("If", "StatelessIf")]
    assert len(conditions) == (0 if on_gpu else 1)


def test_other_sums_are_not_taken_for_that_of_the_squares(monkeypatch):
    take_for_many(monkeypatch, on_gpu=False)
    g, h = drawn(1.0, "float32", seed=7), drawn(2.0, "float32", seed=8)

    def norms(g, h):
        tf.reduce_sum(g * g, axis=0), tf.reduce_sum(g * h), tf.reduce_max(tf.square(g))
        return gradient_norms([g])

    np.testing.assert_allclose(in_mode("graph", norms, g, h), [exact(g)], rtol=2e-6)


def test_read_apart():
    g, h = drawn(1.0, "float32", seed=5), drawn(1.0, "float32", seed=6)
    assert read_apart(g) is g  # Eagerly there is nothing to rearrange.

    @tf.function(autograph=False)
    def read(g, h):
        products = [g * h, (g * h) / (h * h), 2.0 * g]
        others = [g, g + h]
        apart = [read_apart(tensor) for tensor in products]
        assert all(read_apart(tensor) is tensor for tensor in others)
        for product, copy in zip(products, apart, strict=True):
            assert copy is not product
            assert not product.consumers()
        return products, apart

    products, apart = read(g, h)
    for product, copy in zip(products, apart, strict=True):
        np.testing.assert_array_equal(product, copy)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_shapes_and_scales(data):
    shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
    parts = data.draw(
        st.lists(st.tuples(shapes, st.integers(-36, 37), st.integers(0, 99)), min_size=1)
    )
    gradients = [drawn(10.0**size, "float32", shape, seed) for shape, size, seed in parts]
    with pytest.MonkeyPatch.context() as patch:
        # Of few elements and of many, in any order.
        patch.setattr(norms_module, "_FEW", data.draw(st.integers(0, 64)))
        norms = gradient_norms(gradients)
    np.testing.assert_allclose(norms, [*map(exact, gradients)], rtol=2e-6)


# Of many vectors


def exact_sums(vectors):
    return [np.sum([exact(example) for example in step]) for step in vectors]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 40), st.integers(-36, 37))
def test_summed_norms(steps, examples, units, size):
    vectors = drawn(10.0**size, "float32", (steps, examples, units), seed=steps)
    actual = summed_norms(vectors)
    assert actual.dtype == tf.float64
    np.testing.assert_allclose(actual, exact_sums(vectors), rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_summed_norms_of_any_precision(mode, dtype):
    function = MODES[mode](summed_norms)
    for size in MAGNITUDES[dtype]:
        vectors = drawn(size, dtype, (3, 2, 4))
        np.testing.assert_allclose(function(vectors), exact_sums(vectors), rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_summed_norms_keep_special_values_to_their_step(mode):
    vectors = np.ones((4, 2, 4), "float32")
    vectors[1, 0, 2], vectors[2, 1, 0], vectors[3] = np.nan, -np.inf, 0
    norms = MODES[mode](summed_norms)(tf.constant(vectors))
    np.testing.assert_array_equal(norms, [4, np.nan, np.inf, 0])
