"""How far an update moves the weights, as GradientNorms samples it, against copies by NumPy.

That a training with a GradientNorms, which samples in each epoch, has bit for bit the weights of
one without, and traces nothing anew, is in test_callbacks.py.
"""

from __future__ import annotations

import dataclasses
import weakref

import keras
import numpy as np
import pytest
from test_callbacks import (
    BATCH,
    EPOCHS,
    GAN,
    TOKENS,
    Case,
    X,
    Y,
    constrained,
    dense,
    distributed,
    embedding,
    linear,
    linear_model,
    sgd,
    unused_weights,
    without_input_shape,
)

from kerasgrad import callbacks as callbacks_module
from kerasgrad import updates as updates_module
from kerasgrad.callbacks import GradientNorms
from kerasgrad.updates import WeightsBefore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:keras")


@dataclasses.dataclass
class Call:
    """One call of the train function: the step of its first update, how many, and the weights."""

    epoch: int
    step: int
    count: int
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


class Copies(keras.callbacks.Callback):
    """The oracle: all weights before and after each call of the train function."""

    def __init__(self, optimizer=None):
        super().__init__()
        self.optimizer, self.calls = optimizer, []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        self.before, self.step = self.weights(), self.updates()

    def on_train_batch_end(self, batch, logs=None):
        count = self.updates() - self.step
        self.calls.append(Call(self.epoch, self.step, count, self.before, self.weights()))

    def weights(self):
        return {w.path: np.array(w.numpy(), "float64") for w in self.model.trainable_variables}

    def updates(self):
        optimizer = self.optimizer or self.model.optimizer
        return int(getattr(optimizer, "inner_optimizer", optimizer).iterations.numpy())

    def samples(self):
        """The first call of each epoch that has updated weights which were there before it."""
        first = {}
        for call in self.calls:
            if call.count and call.before:
                first.setdefault(call.epoch, call)
        return list(first.values())


def assert_sampled(history, calls, rtol=1e-6):
    """The history holds these calls, in the order of its weights."""
    assert len(calls) > 0
    assert history.update_step.tolist() == [call.step for call in calls]
    assert history.update_counts.tolist() == [call.count for call in calls]
    moved = [
        [np.linalg.norm(call.after[w] - call.before[w]) for w in history.weights] for call in calls
    ]
    sizes = [[np.linalg.norm(call.before[w]) for w in history.weights] for call in calls]
    np.testing.assert_allclose(history.update_norms, moved, rtol=rtol)
    np.testing.assert_allclose(history.weight_norms, sizes, rtol=rtol)


def of_tokens(**options):
    return Case(embedding, fit=lambda: {"x": TOKENS, "y": Y, "batch_size": BATCH}, **options)


ADAM = lambda: keras.optimizers.Adam(0.01)  # noqa: E731

# Batches of 8, 8 and 4, twice; where the updates that are sampled begin, and how many they are.
CASES = {
    "SGD, clipnorm": (Case(optimizer=sgd(clipnorm=0.9)), [0, 3], 1),
    "Adam": (Case(optimizer=ADAM), [0, 3], 1),
    "run_eagerly": (Case(optimizer=ADAM, compile={"run_eagerly": True}), [0, 3], 1),
    "jit_compile": (Case(linear, ADAM, compile={"jit_compile": True}), [0, 3], 1),
    "steps_per_execution=3": (Case(compile={"steps_per_execution": 3}), [0, 3], 3),
    "embedding": (of_tokens(), [0, 3], 1),
    # Updates come with the second, fourth and sixth batch.
    "gradient accumulation": (Case(optimizer=sgd(gradient_accumulation_steps=2)), [0, 1], 1),
    "gradient accumulation, steps_per_execution=3": (
        Case(optimizer=sgd(gradient_accumulation_steps=2), compile={"steps_per_execution": 3}),
        [0, 1],
        None,
    ),
    "constraints": (Case(constrained), [0, 3], 1),
    # The weights are made by the first step itself.
    "without input shape": (Case(without_input_shape), [1, 3], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_updates_equal_copies_of_the_weights(name):
    case, steps, count = CASES[name]
    norms, copies = GradientNorms(), Copies()
    case.trained([copies, norms])
    history = norms.history
    assert_sampled(history, copies.samples())
    assert history.update_step.tolist() == steps
    assert history.update_counts.tolist() == ([1, 2] if count is None else [count] * 2)
    assert (history.update_norms > 0).all() and (history.weight_norms[-1] > 0).all()


def test_an_sgd_update_is_the_learning_rate_times_the_clipped_gradient():
    norms = GradientNorms()
    Case(optimizer=sgd(learning_rate=0.05, clipnorm=0.9)).trained([norms])
    history = norms.history
    assert history.clip_rate > 0
    applied = history.applied_norms[np.isin(history.step, history.update_step)]
    # w' - w is a difference of rounded weights.
    np.testing.assert_allclose(history.update_norms, 0.05 * applied, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e25])
def test_tiny_and_huge_updates(size):
    # L = y w x and w = 0, so w' - w = -y x; the square of these overflows or vanishes in float32.
    norms, model = GradientNorms(), linear_model()
    model.layers[0].kernel.assign([[0.0]])
    model.optimizer.learning_rate.assign(1.0)
    x = np.full((1, 1), size, "float32")
    model.fit(x, np.ones((1, 1), "float32"), verbose=0, epochs=2, callbacks=[norms])
    np.testing.assert_allclose(norms.history.update_norms, [[size]] * 2, rtol=1e-6)
    np.testing.assert_allclose(norms.history.weight_norms, [[0], [size]], rtol=1e-6)


def test_a_weight_without_a_gradient_does_not_move():
    norms, copies = GradientNorms(), Copies()
    Case(
        unused_weights,
        compile={"loss": ["mse", None]},
        fit=lambda: {"x": X, "y": [Y, Y], "batch_size": BATCH},
    ).trained([norms, copies])
    assert_sampled(norms.history, copies.samples())
    unused = ["unused" in path for path in norms.history.weights]
    np.testing.assert_array_equal(norms.history.update_norms == 0, [unused] * 2)


def test_steps_that_a_loss_scale_optimizer_skips_are_no_updates():
    keras.config.set_dtype_policy("mixed_float16")
    norms, copies = GradientNorms(), Copies()
    Case(
        # Twice too large a scale: the first two steps are skipped.
        optimizer=lambda: keras.optimizers.LossScaleOptimizer(sgd()(), initial_scale=2.0**17)
    ).trained([norms, copies])
    history = norms.history
    assert not history.updated[0]
    assert_sampled(history, copies.samples())
    assert history.update_step[0] == 0 and (history.update_norms > 0).all()


def test_half_precision_weights():
    keras.config.set_dtype_policy("bfloat16")
    norms, copies = GradientNorms(), Copies()
    Case(optimizer=sgd(learning_rate=0.5)).trained([norms, copies])
    assert_sampled(norms.history, copies.samples())


def test_selected_weights_and_steps():
    callbacks = {
        "one weight": GradientNorms(weights="*/bias"),
        "every": GradientNorms(every=4),
        "all": GradientNorms(),
    }
    copies = Copies()
    Case().trained([*callbacks.values(), copies])
    for norms in callbacks.values():  # Also of steps that have no row.
        assert_sampled(norms.history, copies.samples())
    assert callbacks["one weight"].history.update_norms.shape == (2, 2)
    assert callbacks["every"].history.step.tolist() == [0, 4]
    assert callbacks["every"].history.update_step.tolist() == [0, 3]


def test_two_optimizers():
    model = GAN()
    model.compile()
    optimizers = {"g": model.g_optimizer, "d": model.d_optimizer}
    norms = GradientNorms(optimizers=optimizers)
    copies = {name: Copies(optimizer) for name, optimizer in optimizers.items()}
    model.fit(X, batch_size=BATCH, epochs=2, verbose=0, callbacks=[norms, *copies.values()])
    for name, history in norms.histories.items():
        assert_sampled(history, copies[name].samples())
        assert {path.split("/")[-2] for path in history.weights} == {name}


def test_mirrored_strategy(mirrored_strategy):
    norms, copies = GradientNorms(), Copies()
    distributed(mirrored_strategy, dense, sgd(), callbacks=[norms, copies])
    assert_sampled(norms.history, copies.samples())
    assert norms.history.update_step.tolist() == [0, 2]


def test_updates_that_a_limit_forbids_are_none():
    x = X.copy()
    x[0] = np.nan
    norms = GradientNorms(on_nonfinite="stop")
    model = dense()
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="is NaN at step 0: the training stops"):
        model.fit(x, Y, batch_size=4, shuffle=False, verbose=0, callbacks=[norms])
    assert norms.history.updated.tolist() == [False]
    assert len(norms.history.update_step) == 0


def test_nan_moves_a_weight_by_nan():
    norms, model = GradientNorms(), linear_model()
    model.fit(np.full((1, 1), np.nan), np.ones((1, 1)), verbose=0, callbacks=[norms])
    np.testing.assert_array_equal(norms.history.update_norms, [[np.nan]])
    np.testing.assert_array_equal(norms.history.weight_norms, [[1.0]])


def test_freezing_between_two_fits():
    norms, copies, model = GradientNorms(), Copies(), dense()
    fit = {"x": X, "y": Y, "batch_size": BATCH, "verbose": 0, "callbacks": [norms, copies]}
    model.compile("sgd", "mse")
    model.fit(**fit)
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    model.fit(**fit)
    model.fit(**fit)
    history = norms.history
    assert history.update_step.tolist() == [0, 0, 3]
    of_head = [path.startswith(model.layers[1].path) for path in history.weights]
    known = np.array([[True] * 4, of_head, of_head])
    np.testing.assert_array_equal(np.isnan(history.update_norms), ~known)
    expected = [
        [
            np.linalg.norm(call.after[w] - call.before[w]) if w in call.before else np.nan
            for w in history.weights
        ]
        for call in (copies.calls[0], copies.calls[3], copies.calls[6])
    ]
    np.testing.assert_allclose(history.update_norms, expected, rtol=1e-6)


class RaiseAfter(keras.callbacks.Callback):
    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


@pytest.mark.parametrize(
    ("save_freq", "every", "steps"),
    # 5 batches an epoch, interrupted after 14; Keras starts the epoch of a backup anew.
    [("epoch", 1, [0, 5, 10]), (4, 5, [0, 5, 10, 12])],
)
def test_a_training_that_is_put_back(tmp_path, save_freq, every, steps):
    norms, copies, model = GradientNorms(every=every), Copies(), dense()
    model.compile("sgd", "mse")
    fit = {"x": X, "y": Y, "batch_size": 4, "epochs": 3, "shuffle": False, "verbose": 0}
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=save_freq)
    with pytest.raises(InterruptedError):
        model.fit(**fit, callbacks=[norms, backup, copies, RaiseAfter(14)])
    assert_sampled(norms.history, copies.samples())
    assert norms.history.update_step.tolist() == [0, 5, 10]
    before = copies.samples()
    copies.calls.clear()
    model.fit(**fit, callbacks=[norms, backup, copies])
    assert norms.history.update_step.tolist() == steps
    again = copies.samples()
    assert_sampled(norms.history, [*before[: len(steps) - len(again)], *again])


# The cost


def test_one_copy_an_epoch_and_none_is_kept(monkeypatch):
    made, alive = [], []

    class Counted(WeightsBefore):
        def __init__(self, variables):
            variables = list(variables)
            super().__init__(variables)
            made.append(len(variables))
            alive.extend(map(weakref.ref, self._copies.values()))

    class Looks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            assert [ref() for ref in alive] == [None] * len(alive)

    monkeypatch.setattr(callbacks_module, "WeightsBefore", Counted)
    model, norms = dense(), GradientNorms()
    model.compile("sgd", "mse")
    model.fit(X, Y, batch_size=4, epochs=EPOCHS, verbose=0, callbacks=[norms, Looks()])
    assert made == [4, 0, 0, 0, 0] * EPOCHS
    assert len(alive) == 4 * EPOCHS
    assert len(norms.history.update_step) == EPOCHS


def test_a_weight_that_two_callbacks_record_is_copied_once():
    kernel = keras.Variable([3.0, 4.0])
    before = WeightsBefore([kernel, kernel])
    assert len(before._copies) == 1
    assert before.holds([kernel]) and not before.holds([kernel, keras.Variable(0.0)])
    kernel.assign([3.0, 5.0])
    np.testing.assert_array_equal(before.norms_of([kernel]), [[1.0], [5.0]])


@pytest.mark.parametrize("elements", [1, 5, 100])
def test_norms_of_many_weights_in_pieces(elements, monkeypatch):
    monkeypatch.setattr(updates_module, "_ELEMENTS", elements)
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=n)) for n in (4, 1, 9, 1, 0)]
    before, earlier = WeightsBefore(variables), [v.numpy() for v in variables]
    for variable in variables:
        variable.assign(rng.normal(size=variable.shape))
    moved = [np.linalg.norm(v.numpy() - w) for v, w in zip(variables, earlier, strict=True)]
    expected = moved, [np.linalg.norm(w) for w in earlier]
    np.testing.assert_allclose(before.norms_of(variables), expected, rtol=1e-6)
    assert np.size(before.norms_of([])) == 0
