"""csv= and log_dir= of GradientNorms: what is in the files, and what a killed training leaves.

The oracles are readers that are not ours: the csv module, pandas, TensorBoard's EventAccumulator
and a TensorBoard server; and, for a training that is interrupted and goes on, an uninterrupted
training over the same batches in the same order.
"""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pandas
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kerasgrad as kg
from kerasgrad.callbacks import GradientNorms
from kerasgrad.streams import TensorBoardStream, rows_before

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:keras"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

rng = np.random.default_rng(0)
BATCH = 4
X = rng.normal(size=(28, 5, 2)).astype("float32")
Y = rng.normal(size=(28, 1)).astype("float32")
STEPS = 7  # an epoch
BAD = Y.copy()  # The second batch's gradient is NaN, the third's is Inf.
BAD[BATCH], BAD[2 * BATCH] = np.nan, np.inf


class HasUnused(keras.layers.Layer):
    """Has a weight that the loss does not depend on."""

    def build(self, shape):
        self.unused = self.add_weight(shape=(2,), name="unused")

    def call(self, x):
        return x


def rnn():
    return [keras.layers.Input(X.shape[1:]), kg.layers.SimpleRNN(3), keras.layers.Dense(1)]


def dense():
    return [keras.layers.Input(X.shape[1:]), keras.layers.Flatten(), keras.layers.Dense(1)]


def with_unused():
    return [*dense(), HasUnused()]


def compiled(build=dense, optimizer=None, **compile_arguments):
    """A model with the same weights and the same names each time."""
    keras.utils.set_random_seed(1)
    keras.backend.clear_session()
    model = keras.Sequential(build(), name="model")
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.5, global_clipnorm=1.0)
    model.compile(optimizer, "mse", **{"jit_compile": False} | compile_arguments)
    return model


def fit(model, *callbacks, y=Y, n=None, **arguments):
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | arguments
    return model.fit(X[:n], y[:n], callbacks=list(callbacks), **arguments)


# What is in the files


class GAN(keras.Model):
    """Two optimizers; the second is asked in every step, and has one weight more."""

    def __init__(self):
        super().__init__(name="gan")
        self.g, self.d = keras.layers.Dense(1, name="g"), keras.layers.Dense(1, name="d")
        self.g_optimizer = keras.optimizers.SGD(0.1, clipnorm=0.1)
        self.d_optimizer = keras.optimizers.SGD(0.01)

    def build(self, shape):
        self.g.build((None, 2))
        self.d.build((None, 1))
        self.built = True

    def call(self, x):
        return self.d(self.g(x[:, 0]))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        for layer, optimizer in ((self.g, self.g_optimizer), (self.d, self.d_optimizer)):
            weights = layer.trainable_variables
            optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


def gan():
    keras.utils.set_random_seed(1)
    model = GAN()
    model.compile(loss="mse", jit_compile=False)
    return model


CASES = {
    # 7 steps an epoch, 4 in one call of the train function.
    "rnn": lambda: compiled(rnn, keras.optimizers.SGD(0.1, clipnorm=0.1), steps_per_execution=4),
    "unused": lambda: compiled(with_unused),
    "skipped": lambda: compiled(
        optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    ),
    "diverged": lambda: compiled(run_eagerly=True),
    "accumulation": lambda: compiled(
        optimizer=keras.optimizers.SGD(0.1, clipnorm=0.1, gradient_accumulation_steps=3)
    ),
    "gan": gan,
}
# (case, key of the optimizer) of each record.
RECORDS = [*((case, "") for case in CASES if case != "gan"), ("gan", "g"), ("gan", "d")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(scope="module")
def trained(folder):
    """{case: its GradientNorms after a training that wrote <case>.csv and the folder <case>}."""
    trained = {}

    def train(case):
        if case not in trained:
            model = CASES[case]()
            optimizers = None
            if case == "gan":
                optimizers = {"g": model.g_optimizer, "d": model.d_optimizer}
            norms = GradientNorms(optimizers, csv=folder / f"{case}.csv", log_dir=folder / case)
            y = BAD if case in ("skipped", "diverged") else Y
            fit(model, norms, y=y, epochs=2)
            trained[case] = norms
        return trained[case]

    return train


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file, strict=True))


def steps_in(path):
    return [int(row[0]) for row in rows_of(path)[1:]]


def events_in(folder):
    sizes = {"scalars": 0, "images": 0}
    return EventAccumulator(os.fspath(folder), size_guidance=sizes).Reload()


def points(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def expected_points(history):
    """{tag: [(step, value)]} of a whole record."""
    everywhere = np.ones(len(history), bool)
    columns = {
        "batch_loss": (history.loss, everywhere),
        "gradient_norm/global": (history.global_norm, everywhere),
        "applied_gradient_norm/global": (history.applied_global_norm, history.updated),
    }
    for i, weight in enumerate(history.weights):
        there = ~history.missing[:, i]
        columns[f"gradient_norm/{weight}"] = history.norms[:, i], there
        columns[f"applied_gradient_norm/{weight}"] = (
            history.applied_norms[:, i],
            there & history.updated,
        )
    points = {
        tag: [(int(s), np.float32(v)) for s, v, there in zip(history.step, *column, strict=True)
              if there]
        for tag, column in columns.items()
    }  # fmt: skip
    return {tag: values for tag, values in points.items() if values}


def assert_same_points(actual, expected):
    np.testing.assert_array_equal([step for step, _ in actual], [step for step, _ in expected])
    np.testing.assert_array_equal([v for _, v in actual], np.array([v for _, v in expected]))


def test_the_cases_hold_what_they_are_for(trained):
    """Else the comparisons below would compare less than they say."""
    rnn, unused, skipped, diverged, accumulation = (
        trained(case).history for case in CASES if case != "gan"
    )
    np.testing.assert_array_equal(rnn.step, np.arange(2 * STEPS))
    assert rnn.clipped.all()
    assert unused.missing.any(axis=0).sum() == 1
    np.testing.assert_array_equal(skipped.updated, ([1] + [0] * 2 + [1] * 4) * 2)
    assert np.isnan(skipped.global_norm[1]) and np.isinf(skipped.global_norm[2])
    assert np.isnan(diverged.norms[2:]).all()
    assert 0 < accumulation.updated.sum() < len(accumulation)
    assert set(trained("gan").histories) == {"g", "d"}


@pytest.mark.parametrize("case, key", RECORDS)
def test_csv_holds_the_history(case, key, trained, folder):
    history = trained(case).histories[key]
    path = folder / (f"{case}_{key}.csv" if key else f"{case}.csv")
    header, *rows = rows_of(path)
    columns = {
        "step": history.step,
        "epoch": history.epoch,
        "loss": history.loss,
        "updated": history.updated,
        "clip_factor": history.clip_factor,
        "global_norm": history.global_norm,
        "applied_global_norm": history.applied_global_norm,
    }
    for kind, norms in (("norm", history.norms), ("applied_norm", history.applied_norms)):
        for i, weight in enumerate(history.weights):
            cells = norms[:, i].astype(object)
            cells[history.missing[:, i]] = ""
            columns[f"{kind}/{weight}"] = cells
    assert header == list(columns)
    assert len(rows) == len(history) > 0
    for name, cells in zip(columns, zip(*rows, strict=True), strict=True):
        actual = [cell if cell == "" else float(cell) for cell in cells]
        expected = [cell if isinstance(cell, str) else float(cell) for cell in columns[name]]
        assert repr(actual) == repr(expected), name  # NaN is NaN, and not one digit is lost.
    frame = pandas.read_csv(path)
    np.testing.assert_array_equal(frame["step"], history.step)
    np.testing.assert_array_equal(frame["global_norm"], history.global_norm)


@pytest.mark.parametrize("case, key", RECORDS)
def test_log_dir_holds_the_history(case, key, trained, folder):
    expected = expected_points(trained(case).histories[key])
    events = events_in(folder / case / key)
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag in expected:
        assert_same_points(points(events, tag), expected[tag])


@pytest.mark.parametrize("case", ["unused", "gan"])
def test_no_images_without_a_recurrent_layer(case, trained, folder):
    trained(case)
    assert events_in(folder / case / ("g" if case == "gan" else "")).Tags()["images"] == []


def test_an_image_an_epoch_of_the_state_gradients(trained, folder):
    history, events = trained("rnn").history, events_in(folder / "rnn")
    (path,) = history.state_norms
    assert events.Tags()["images"] == [f"state_gradients/{path}"]
    images = events.Images(f"state_gradients/{path}")
    assert [image.step for image in images] == [STEPS - 1, 2 * STEPS - 1]  # The last of each.
    for epoch, image in enumerate(images):
        assert (image.width, image.height) == (X.shape[1], STEPS)
        pixels = tf.io.decode_png(image.encoded_image_string).numpy()
        assert pixels.shape == (STEPS, X.shape[1], 1)
        logs = np.log10(history.state_norms[path][history.epoch == epoch])
        scaled = 255 * (logs - logs.min()) / (logs.max() - logs.min())
        assert pixels.min() == 0 and pixels.max() == 255
        np.testing.assert_allclose(pixels[..., 0], scaled, atol=0.51)


def test_black_is_the_smallest_and_what_has_no_logarithm(tmp_path):
    stream = TensorBoardStream(tmp_path)
    piece = {
        "step": np.array([3, 4]),
        "loss": np.zeros(2),
        "norms": np.ones((2, 1)),
        "applied_norms": np.ones((2, 1)),
        "missing": np.zeros((2, 1), bool),
        "updated": np.ones(2, bool),
        "weights": ("w",),
    }
    stream.write(piece | {"state_norms": {"a": np.array([[1e-4, 1e-2], [0, np.nan]])}})
    stream.write(piece | {"state_norms": {"a": np.array([[1.0, np.inf, 1e-1]] * 2)}})
    stream.end_epoch(4)
    (image,) = events_in(tmp_path).Images("state_gradients/a")
    pixels = tf.io.decode_png(image.encoded_image_string).numpy()[..., 0]
    rows = [[0, 128, 0], [0, 0, 0], [255, 0, 191], [255, 0, 191]]
    np.testing.assert_allclose(pixels, rows, atol=1)


def test_the_image_of_an_epoch_that_was_interrupted_is_forgotten(tmp_path):
    model, norms = compiled(rnn), GradientNorms(log_dir=tmp_path)
    with pytest.raises(Interrupted):
        fit(model, norms, RaiseAfter(2), epochs=1)
    fit(model, norms, epochs=1)
    (tag,) = events_in(tmp_path).Tags()["images"]
    assert [image.height for image in events_in(tmp_path).Images(tag)] == [STEPS]


@contextlib.contextmanager
def tensorboard_server(log_dir, output):
    """A TensorBoard server on loopback; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", os.fspath(log_dir)]
    command += ["--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"]
    with open(output, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", output.read_text())):
            assert server.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def get(address, **query):
    with urllib.request.urlopen(f"{address}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
        return json.load(answer)


def test_a_tensorboard_server_shows_the_history(trained, folder, tmp_path):
    runs = {"rnn": "", "gan/g": "g", "gan/d": "d"}
    expected = {
        run: expected_points(trained(run.split("/")[0]).histories[key]) for run, key in runs.items()
    }
    with tensorboard_server(folder, tmp_path / "output.txt") as address:
        scalars, images = f"{address}/data/plugin/scalars", f"{address}/data/plugin/images"
        deadline = time.monotonic() + 30
        # It reads the files after it has begun to answer, one run after the other.
        while not (set(expected) <= set(tags := get(f"{scalars}/tags")) and get(f"{images}/tags")):
            assert time.monotonic() < deadline, tags
            time.sleep(0.2)
        for run in expected:
            assert set(tags[run]) == set(expected[run])
        for run, tag in [
            ("rnn", "gradient_norm/global"),
            ("rnn", "applied_gradient_norm/global"),
            ("gan/g", "batch_loss"),
            ("gan/d", "gradient_norm/global"),
        ]:
            answer = get(f"{scalars}/scalars", run=run, tag=tag)
            assert_same_points([(step, value) for _, step, value in answer], expected[run][tag])
        ((tag, _),) = get(f"{images}/tags")["rnn"].items()
        shown = get(f"{images}/images", run="rnn", tag=tag, sample=0)
        assert [image["step"] for image in shown] == [STEPS - 1, 2 * STEPS - 1]
        address = f"{images}/individualImage?{shown[0]['query']}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            assert tf.io.decode_png(answer.read()).shape[:2] == (STEPS, X.shape[1])


# The file while the training runs, and from one training to the next


class OnBatchEnd(keras.callbacks.Callback):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def on_train_batch_end(self, batch, logs=None):
        self.act()


class OnTrainBegin(keras.callbacks.Callback):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def on_train_begin(self, logs=None):
        self.act()


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_a_row_is_on_disk_as_soon_as_its_step_is_done(steps_per_execution, tmp_path):
    model = compiled(steps_per_execution=steps_per_execution)
    path, seen = tmp_path / "norms.csv", []

    def look():
        done = int(model.optimizer.iterations.numpy())
        events = points(events_in(tmp_path / "events"), "batch_loss")
        seen.append((done, steps_in(path), [step for step, _ in events]))

    norms = GradientNorms(csv=path, log_dir=tmp_path / "events")
    fit(model, OnBatchEnd(look), norms, OnBatchEnd(look))
    assert len(seen) == 2 * -(-STEPS // steps_per_execution)
    for done, *steps in seen:
        assert steps == [list(range(done))] * 2


def test_a_second_fit_goes_on_in_the_same_files(tmp_path):
    model, norms = compiled(), GradientNorms(csv=tmp_path / "a.csv", log_dir=tmp_path)
    for _ in range(2):
        fit(model, norms)
    assert steps_in(tmp_path / "a.csv") == list(range(2 * STEPS))
    steps = [step for step, _ in points(events_in(tmp_path), "batch_loss")]
    assert steps == list(range(2 * STEPS))
    assert not (tmp_path / "a.csv.previous").exists()


def test_every_and_weights_are_those_of_the_record(tmp_path):
    model = compiled()
    norms = GradientNorms(csv=tmp_path / "a.csv", log_dir=tmp_path, every=3, weights="*/kernel")
    fit(model, norms, epochs=2)
    assert steps_in(tmp_path / "a.csv") == [0, 3, 6, 9, 12]
    assert rows_of(tmp_path / "a.csv")[0][-2:] == [
        "norm/model/dense/kernel",
        "applied_norm/model/dense/kernel",
    ]
    events = events_in(tmp_path)
    assert [step for step, _ in points(events, "batch_loss")] == [0, 3, 6, 9, 12]
    assert "gradient_norm/model/dense/bias" not in events.Tags()["scalars"]


def test_a_weight_that_comes_later_is_in_the_history(tmp_path):
    model, norms = compiled(), GradientNorms(csv=tmp_path / "a.csv")
    layer = model.layers[-1]
    layer.bias.trainable = False
    fit(model, norms)
    header = rows_of(tmp_path / "a.csv")[0]
    layer.bias.trainable = True
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    with pytest.warns(UserWarning, match="no columns for weights that came later: model/dense/b"):
        fit(model, norms)
    rows = rows_of(tmp_path / "a.csv")
    assert rows[0] == header and not any("bias" in name for name in header)
    assert [float(row[header.index("norm/model/dense/kernel")]) for row in rows[1:]] == list(
        norms.history.norms[:, norms.history.weights.index("model/dense/kernel")]
    )
    bias = norms.history.weights.index("model/dense/bias")
    assert (norms.history.norms[STEPS:, bias] > 0).all()


def test_a_training_from_step_0_puts_the_earlier_file_aside(tmp_path):
    path, previous = tmp_path / "a.csv", tmp_path / "a.csv.previous"
    fit(compiled(), GradientNorms(csv=path), epochs=2)
    earlier = path.read_bytes()
    norms = GradientNorms(csv=path)
    fit(compiled(), norms)
    assert steps_in(path) == list(range(STEPS)) == norms.history.step.tolist()
    assert previous.read_bytes() == earlier
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.csv", "a.csv.previous"]


def test_a_file_with_other_columns_is_put_aside(tmp_path):
    """Its rows cannot be gone on with, even when the training starts later."""
    path = tmp_path / "a.csv"
    fit(compiled(rnn), GradientNorms(csv=path))
    earlier = path.read_bytes()
    model = compiled()
    model.optimizer.iterations.assign(3)
    fit(model, GradientNorms(csv=path))
    assert steps_in(path) == list(range(3, 3 + STEPS))
    assert (tmp_path / "a.csv.previous").read_bytes() == earlier


def assert_no_training(error, norms, match):
    model, batches = compiled(), []
    before = model.get_weights()
    with pytest.raises(error, match=match):
        fit(model, norms, OnBatchEnd(lambda: batches.append(1)))
    assert batches == [] and int(model.optimizer.iterations.numpy()) == 0
    for weight, was in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, was)
    fit(model)  # Nothing is left on the model.


FOREIGN = {
    "other columns": b"epoch,loss\n0,1.5\n",
    "begins like ours": b"step,epoch\n0,0\n",
    "one line without an end": b"notes of mine",
    "one long line": b"x" * 300_000,
    "binary": b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe" * 100,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_somebody_elses_file_is_refused_and_not_touched(content, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert_no_training(ValueError, GradientNorms(csv=path), "was not written by GradientNorms")
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("name", ["missing/a.csv", "folder"])
def test_a_csv_that_cannot_be_written_is_refused(name, tmp_path):
    (tmp_path / "folder").mkdir()
    assert_no_training(OSError, GradientNorms(csv=tmp_path / name), name.split("/")[0])


def test_a_log_dir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    norms = GradientNorms(log_dir=tmp_path / "file" / "events")
    assert_no_training(OSError, norms, "cannot be written")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_does_not_end_the_training(tmp_path):
    """Neither the rows nor closing the file, which writes what is left of them."""
    model, path = compiled(), tmp_path / "a.csv"
    norms = GradientNorms(csv=path)
    fit(model, norms)

    def fill_the_disk():
        path.unlink()
        path.symlink_to("/dev/full")

    with pytest.warns(UserWarning, match=r"GradientNorms\(csv=\) could not write: .*space"):
        fit(model, norms, OnTrainBegin(fill_the_disk))
    assert norms.history.step.tolist() == list(range(2 * STEPS))
    path.unlink()
    fit(model, norms)  # There is room again.
    assert norms.history.step.tolist() == list(range(3 * STEPS))
    assert len(path.read_text().splitlines()) == STEPS


def test_a_csv_that_cannot_be_begun_does_not_end_the_training(tmp_path):
    model, path = compiled(), tmp_path / "gone" / "a.csv"
    path.parent.mkdir()
    norms = GradientNorms(csv=path)

    def remove_the_folder():
        path.unlink()
        path.parent.rmdir()

    with pytest.warns(UserWarning, match=r"GradientNorms\(csv=\) could not write"):
        fit(model, norms, OnTrainBegin(remove_the_folder))
    assert norms.history.step.tolist() == list(range(STEPS))


def test_events_that_cannot_be_written_do_not_end_the_training(tmp_path, monkeypatch):
    model, norms = compiled(rnn), GradientNorms(log_dir=tmp_path)
    write = TensorBoardStream._write

    def write_two_steps(self, step, **content):
        if step >= 2:
            raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")
        write(self, step, **content)

    monkeypatch.setattr(TensorBoardStream, "_write", write_two_steps)
    with pytest.warns(UserWarning, match=r"GradientNorms\(log_dir=\) could not write"):
        fit(model, norms, epochs=2)
    assert norms.history.step.tolist() == list(range(2 * STEPS))
    assert [step for step, _ in points(events_in(tmp_path), "batch_loss")] == [0, 1]


# Interrupted trainings. 6 steps an epoch, 4 epochs; interrupted after step 13, in the third.

EPOCHS, PER_EPOCH, LAST = 4, 6, 13
N = PER_EPOCH * BATCH
# save_freq of BackupAndRestore -> the step that the training goes on from, and at which epoch.
# Keras starts the epoch of a backup anew: batches are taken again, steps are not.
GOES_ON_FROM = {"epoch": (12, 2), 5: (10, 1)}
SAVE_FREQS = list(GOES_ON_FROM)


class Interrupted(Exception):
    pass


class RaiseAfter(keras.callbacks.Callback):
    """Raises Interrupted when so many batches are done."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise Interrupted


def interrupted_and_not(save_freq):
    """(epoch, number of the batch in it) of each step of a training that was interrupted."""
    step, epoch = GOES_ON_FROM[save_freq]
    batches = [divmod(i, PER_EPOCH) for i in range(PER_EPOCH * EPOCHS)]
    return batches[:step] + batches[epoch * PER_EPOCH :]


def uninterrupted(save_freq):
    """The record of a training over the same batches in one go, and the epochs of its steps."""
    taken = interrupted_and_not(save_freq)
    rows = np.concatenate([np.arange(BATCH) + BATCH * batch for _, batch in taken])
    model, norms = compiled(optimizer=sgd()), GradientNorms()
    model.fit(X[rows], Y[rows], batch_size=BATCH, shuffle=False, verbose=0, callbacks=[norms])
    return norms.history, [epoch for epoch, _ in taken]


def sgd(**arguments):
    return keras.optimizers.SGD(0.05, momentum=0.5, global_clipnorm=0.5, **arguments)


@pytest.fixture(scope="module")
def reference():
    """save_freq -> (record, epochs) of the uninterrupted training."""
    records = {}

    def get(save_freq):
        if save_freq not in records:
            records[save_freq] = uninterrupted(save_freq)
        return records[save_freq]

    return get


def assert_uninterrupted(history, path, log_dir, expected, epochs):
    """The record and both files have each step once, with the numbers of `expected`."""
    for name in ("step", "updated"):
        np.testing.assert_array_equal(getattr(history, name), getattr(expected, name))
    np.testing.assert_array_equal(history.epoch, epochs)
    for name in ("norms", "applied_norms", "loss", "clip_factor", "global_norm"):
        np.testing.assert_allclose(getattr(history, name), getattr(expected, name), rtol=1e-6)
    frame = pandas.read_csv(path)
    assert steps_in(path) == expected.step.tolist()
    np.testing.assert_array_equal(frame["epoch"], epochs)
    np.testing.assert_allclose(frame["loss"], expected.loss, rtol=1e-6)
    for i, weight in enumerate(expected.weights):
        np.testing.assert_allclose(frame[f"norm/{weight}"], expected.norms[:, i], rtol=1e-6)
    events = points(events_in(log_dir), "gradient_norm/global")
    assert [step for step, _ in events] == expected.step.tolist()
    values = [value for _, value in events]
    np.testing.assert_allclose(values, expected.global_norm, rtol=1e-6)


def in_order(norms, backup, norms_first):
    return [norms, backup] if norms_first else [backup, norms]


@pytest.mark.parametrize("save_freq", SAVE_FREQS)
@pytest.mark.parametrize("norms_first", [True, False])
def test_backup_and_restore_with_the_same_callback(save_freq, norms_first, tmp_path, reference):
    norms = GradientNorms(csv=tmp_path / "a.csv", log_dir=tmp_path / "events")
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=save_freq)
    callbacks = in_order(norms, backup, norms_first)
    model = compiled(optimizer=sgd())
    with pytest.raises(Interrupted):
        fit(model, *callbacks, RaiseAfter(LAST + 1), n=N, epochs=EPOCHS)
    assert norms.history.step.tolist() == list(range(LAST + 1))
    fit(model, *callbacks, n=N, epochs=EPOCHS)
    expected, epochs = reference(save_freq)
    assert_uninterrupted(norms.history, tmp_path / "a.csv", tmp_path / "events", expected, epochs)


def test_put_back_into_the_middle_of_an_accumulated_update(tmp_path):
    """The backup after 5 micro-steps lies between the two of update 2."""
    model = compiled(optimizer=sgd(gradient_accumulation_steps=2))
    norms, path = GradientNorms(csv=tmp_path / "a.csv"), tmp_path / "a.csv"

    def interrupted_fit(norms, batches):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=5)
        with pytest.raises(Interrupted):
            fit(model, norms, backup, RaiseAfter(batches), n=N, epochs=2)

    interrupted_fit(norms, 9)
    assert steps_in(path) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    in_new_process = tmp_path / "b.csv"
    in_new_process.write_bytes(path.read_bytes())
    interrupted_fit(norms, 3)
    assert norms.history.step.tolist() == steps_in(path) == [0, 0, 1, 1, 2, 2, 3, 3]
    norms = GradientNorms(csv=in_new_process)
    interrupted_fit(norms, 3)
    assert norms.history.step.tolist() == steps_in(in_new_process) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_second_fit_in_the_middle_of_an_accumulated_update_loses_no_row(tmp_path):
    model = compiled(optimizer=sgd(gradient_accumulation_steps=2))
    norms = GradientNorms(csv=tmp_path / "a.csv")
    for _ in range(2):
        fit(model, norms)  # 7 micro-steps
    assert norms.history.step.tolist() == [i // 2 for i in range(2 * STEPS)]
    assert steps_in(tmp_path / "a.csv") == [i // 2 for i in range(2 * STEPS)]


def test_a_training_that_is_put_back_leaves_the_ones_before_it_alone(tmp_path):
    """Another optimizer has begun at step 0 again: its rows are cut, not the first one's."""
    norms = GradientNorms(csv=tmp_path / "a.csv")
    fit(compiled(), norms)
    model = compiled()
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=3)
    with pytest.raises(Interrupted):
        fit(model, norms, backup, RaiseAfter(5))
    fit(model, norms, backup)
    steps = [*range(STEPS), *range(3 + STEPS)]
    assert norms.history.step.tolist() == steps_in(tmp_path / "a.csv") == steps


def test_rows_before():
    assert rows_before(np.array([], int), 3) == 0
    assert rows_before(np.array([0, 1, 2, 3]), 2) == 2
    assert rows_before(np.array([0, 1, 2, 3]), 9) == 4
    assert rows_before(np.array([0, 3, 6]), 4) == 2
    assert rows_before(np.array([0, 1, 2, 0, 1, 2]), 1) == 4
    assert rows_before(np.array([0, 0, 1, 1, 2, 2]), 1, micro_steps=1) == 3
    assert rows_before(np.array([0, 0, 1]), 2, micro_steps=1) == 3


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "a.csv"
    model = compiled()
    fit(model, GradientNorms(csv=path))
    whole = path.read_bytes()
    *_, last = whole.splitlines(keepends=True)
    for cut in (1, 2, 5, 30, len(last) - 1):
        path.write_bytes(whole[:-cut])
        model.optimizer.iterations.assign(STEPS - 1)  # The step whose row was cut is the next one.
        norms = GradientNorms(csv=path)
        fit(model, norms, n=2 * BATCH)
        steps = list(range(STEPS + 1))
        assert norms.history.step.tolist() == steps_in(path) == steps, cut
        assert path.read_bytes().startswith(whole[: -len(last)])
        assert pandas.read_csv(path)["step"].tolist() == steps


# Processes that are killed


def train(folder, backup_arguments, norms_first, kill_after):
    """In a process of its own: train, and kill it after so many batches; else keep the record."""
    folder = Path(folder)
    norms = GradientNorms(csv=folder / "a.csv", log_dir=folder / "events")
    callbacks = [norms]
    if backup_arguments is not None:
        backup = keras.callbacks.BackupAndRestore(folder / "backup", **backup_arguments)
        callbacks = in_order(norms, backup, norms_first)
    left = [kill_after or -1]

    def kill():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    fit(compiled(optimizer=sgd()), *callbacks, OnBatchEnd(kill), n=N, epochs=EPOCHS)
    norms.history.save(folder / "history.npz")


def in_a_process(*arguments):
    """train(...) in a new process; how it ended."""
    # A server that has imported TensorFlow, and never used it, saves each the import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "keras"])
    process = context.Process(target=train, args=arguments)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    "save_freq, norms_first", [(freq, first) for freq in SAVE_FREQS for first in (True, False)]
)
def test_a_killed_process_loses_nothing(save_freq, norms_first, tmp_path, reference):
    """The files are whole when it is dead, and a new process goes on in them."""
    path, log_dir, backup = tmp_path / "a.csv", tmp_path / "events", {"save_freq": save_freq}
    assert in_a_process(tmp_path, backup, norms_first, LAST + 1) == -signal.SIGKILL
    done = list(range(LAST + 1))
    assert steps_in(path) == done == pandas.read_csv(path)["step"].tolist()
    assert path.read_bytes().endswith(b"\n")
    assert [step for step, _ in points(events_in(log_dir), "batch_loss")] == done
    expected, epochs = reference(save_freq)
    step, _ = GOES_ON_FROM[save_freq]
    norms = pandas.read_csv(path)["global_norm"][:step]
    np.testing.assert_allclose(norms, expected.global_norm[:step], rtol=1e-6)

    assert in_a_process(tmp_path, backup, norms_first, None) == 0
    history = kg.GradientHistory.load(tmp_path / "history.npz")
    assert_uninterrupted(history, path, log_dir, expected, epochs)
    assert not (tmp_path / "a.csv.previous").exists()
