"""GradientHistory against plain loops over its rows, and its files against damage."""

from __future__ import annotations

import builtins
import math
import os
import pickle
import stat
import tracemalloc
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kerasgrad.history import GradientHistory

NAN, INF = np.nan, np.inf

# A record in plain Python: a list of rows {"step": ..., "norms": {weight: float}, ...}, where what
# a row does not mention is missing. `appended` is the oracle of everything GradientHistory says.


@st.composite
def pieces(draw):
    """Arguments of GradientHistory.append."""
    floats = st.floats(width=32, min_value=0)
    n = draw(st.integers(0, 4))
    weights = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))

    def array(shape, elements, dtype):
        size = math.prod(shape)
        values = draw(st.lists(elements, min_size=size, max_size=size))
        return np.array(values, dtype).reshape(shape)

    W = len(weights)
    missing = array((n, W), st.booleans(), bool)
    updated = array((n,), st.booleans(), bool)
    norms = np.where(missing, NAN, array((n, W), floats, "float32"))
    applied = np.where(missing | ~updated[:, None], NAN, array((n, W), floats, "float32"))
    layers = draw(st.lists(st.sampled_from(["rnn", "lstm"]), unique=True))
    piece = {
        "weights": weights,
        "step": array((n,), st.integers(0, 2**40), "int64"),
        "epoch": draw(st.integers(0, 1000)),
        "loss": array((n,), st.floats(width=32), "float32"),
        "norms": norms.astype("float32"),
        "applied_norms": applied.astype("float32"),
        "missing": missing,
        "updated": updated,
        "clip_factor": array((n,), st.floats(0, 1, width=32), "float32"),
        "state_norms": {
            layer: array((n, draw(st.integers(1, 3))), floats, "float32") for layer in layers
        },
    }
    if draw(st.booleans()):  # Nothing clipped, as the callback says it.
        piece["applied_norms"] = piece["norms"]
    return piece


norms_of_weights = st.floats(width=32, min_value=0)


@st.composite
def updates(draw):
    """Arguments of GradientHistory.append_updates."""
    weights = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True))
    norms = st.lists(norms_of_weights, min_size=len(weights), max_size=len(weights))
    return {
        "step": draw(st.integers(0, 2**40)),
        "weights": weights,
        "update_norms": draw(norms),
        "weight_norms": draw(norms),
        "update_count": draw(st.integers(1, 9)),
    }


@st.composite
def probes(draw):
    """Arguments of GradientHistory.append_probe."""
    states = draw(st.lists(st.sampled_from(["lstm:h", "lstm:c", "rnn:h"]), unique=True))
    norms = st.lists(norms_of_weights, min_size=1, max_size=3)
    return {
        "step": draw(st.integers(0, 2**40)),
        "state_norms": {state: draw(norms) for state in states},
    }


def append(history, piece):
    if "norms" in piece:
        history.append(**piece)
    elif "update_norms" in piece:
        history.append_updates(**piece)
    else:
        history.append_probe(**piece)


def of_kind(all_pieces, key):
    return [piece for piece in all_pieces if key in piece]


def rows_of(all_pieces):
    for piece in of_kind(all_pieces, "norms"):
        for i in range(len(piece["step"])):
            yield {
                **{name: piece[name][i] for name in ("step", "loss", "updated", "clip_factor")},
                "epoch": piece["epoch"],
                **{
                    name: dict(zip(piece["weights"], piece[name][i], strict=True))
                    for name in ("norms", "applied_norms", "missing")
                },
                "state_norms": {k: v[i].tolist() for k, v in piece["state_norms"].items()},
            }


def assert_holds(history, all_pieces):
    rows = list(rows_of(all_pieces))
    assert len(history) == len(rows)
    weights = list(dict.fromkeys(w for piece in all_pieces for w in piece.get("weights", ())))
    assert list(history.weights) == weights
    for name in "step", "epoch", "loss", "updated", "clip_factor":
        np.testing.assert_array_equal(getattr(history, name), [row[name] for row in rows])
    for name, fill in ("norms", NAN), ("applied_norms", NAN), ("missing", True):
        expected = [[row[name].get(w, fill) for w in weights] for row in rows]
        array = getattr(history, name)
        assert array.shape == (len(rows), len(weights))
        np.testing.assert_array_equal(array, np.reshape(expected, array.shape))
    pieces = of_kind(all_pieces, "norms")
    layers = list(dict.fromkeys(k for piece in pieces for k in piece["state_norms"]))
    assert list(history.state_norms) == layers
    for layer in layers:
        T = max(p["state_norms"][layer].shape[1] for p in pieces if layer in p["state_norms"])
        expected = [row["state_norms"].get(layer, []) for row in rows]
        expected = [values + [NAN] * (T - len(values)) for values in expected]
        np.testing.assert_array_equal(history.state_norms[layer], np.reshape(expected, (-1, T)))
    assert_derived(history, rows)
    assert_samples(history, all_pieces, weights)


def assert_samples(history, all_pieces, weights):
    samples = of_kind(all_pieces, "update_norms")
    assert history.update_step.tolist() == [sample["step"] for sample in samples]
    assert history.update_counts.tolist() == [sample["update_count"] for sample in samples]
    for name in "update_norms", "weight_norms":
        known = [dict(zip(s["weights"], s[name], strict=True)) for s in samples]
        expected = [[row.get(w, NAN) for w in weights] for row in known]
        array = getattr(history, name)
        assert array.shape == (len(samples), len(weights))
        np.testing.assert_array_equal(array, np.reshape(expected, array.shape))
    of_probes = [piece for piece in all_pieces if "weights" not in piece]
    assert history.probe_step.tolist() == [probe["step"] for probe in of_probes]
    known = [probe["state_norms"] for probe in of_probes]
    assert list(history.probe_state_norms) == list(dict.fromkeys(k for row in known for k in row))
    for key, array in history.probe_state_norms.items():
        T = max(len(row[key]) for row in known if key in row)
        expected = [row.get(key, []) + [NAN] * (T - len(row.get(key, []))) for row in known]
        np.testing.assert_array_equal(array, expected)


def assert_derived(history, rows):
    """The definitions of global_norm, clipped, clip_rate and reach, row by row."""
    updates = clipped = 0
    for i, row in enumerate(rows):
        squares = [float(v) ** 2 for w, v in row["norms"].items() if not row["missing"][w]]
        assert_close(history.global_norm[i], math.sqrt(sum(squares)))
        squares = [float(v) ** 2 for w, v in row["applied_norms"].items() if not row["missing"][w]]
        expected = math.sqrt(sum(squares)) if row["updated"] else NAN
        assert_close(history.applied_global_norm[i], expected)
        shortened = row["clip_factor"] < 1 - 1e-5
        assert history.clipped[i] == shortened
        updates += row["updated"]
        clipped += row["updated"] and shortened
        for layer, values in row["state_norms"].items():
            first, last = values[0], [NAN, *(v for v in values if not math.isnan(v))][-1]
            if not math.isnan(first) and last and first != INF:
                assert_close(history.reach[layer][i], first / last)
    assert_close(history.clip_rate, clipped / updates if updates else NAN)


def assert_close(actual, expected):
    assert actual == pytest.approx(expected, rel=1e-6, nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(st.lists(pieces() | updates() | probes(), max_size=5), st.booleans())
def test_append_save_and_load_keep_every_row(tmp_path_factory, all_pieces, read_between):
    history = GradientHistory()
    for piece in all_pieces:
        append(history, piece)
        if read_between:  # What has been joined goes on being appended to.
            assert len(history.norms) == len(history)
            assert len(history.update_norms) == len(history.update_step)
            probed = history.probe_state_norms.values()
            assert all(len(norms) == len(history.probe_step) for norms in probed)
    assert_holds(history, all_pieces)
    path = tmp_path_factory.mktemp("history") / "run.npz"
    history.save(path)
    loaded = GradientHistory.load(path)
    assert_holds(loaded, all_pieces)
    for name in "step", "loss", "norms", "applied_norms", "clip_factor":
        assert getattr(loaded, name).dtype == getattr(history, name).dtype


def small():
    history = GradientHistory()
    history.append(
        weights=["w", "b"],
        step=[0, 1, 2],
        epoch=[0, 0, 1],
        loss=[1.0, NAN, INF],
        norms=[[3, 4], [NAN, 1], [0, 0]],
        applied_norms=[[1.5, 2], [NAN, NAN], [0, 0]],
        missing=[[False, False], [True, False], [False, False]],
        updated=[True, False, True],
        clip_factor=[0.5, NAN, 1.0],
        state_norms={"rnn": [[1.0, 2.0, 4.0], [6.0, 2.0, NAN], [0.0, 0.0, 0.0]]},
    )
    return history


def sampled():
    history = small()
    history.append_updates(
        step=2, weights=["w", "b"], update_norms=[1, NAN], weight_norms=[10, 20], update_count=3
    )
    history.append_probe(step=5, state_norms={"rnn:h": [0.5, 1.0], "rnn:c": [2.0]})
    return history


def test_definitions_by_hand():
    history = small()
    np.testing.assert_array_equal(history.global_norm, [5, 1, 0])
    np.testing.assert_array_equal(history.applied_global_norm, [2.5, NAN, 0])
    np.testing.assert_array_equal(history.clipped, [True, False, False])
    assert history.clip_rate == 0.5
    np.testing.assert_array_equal(history.reach["rnn"], [0.25, 3, NAN])
    assert repr(history) == "<GradientHistory: 3 steps, 2 weights>"


def test_global_norm_neither_overflows_nor_vanishes():
    history = GradientHistory()
    for size in 1e-30, 1e30:
        norms = np.array([[3 * size, 4 * size]], "float32")
        history.append(weights=["w", "b"], step=[0], norms=norms)
    np.testing.assert_allclose(history.global_norm, [5e-30, 5e30], rtol=1e-6)


def test_nan_and_inf_reach_the_global_norm_but_missing_gradients_do_not():
    history = GradientHistory()
    history.append(
        weights=["w", "b"],
        step=[0, 1, 2, 3],
        norms=[[NAN, 1], [INF, 1], [NAN, 1], [NAN, INF]],
        missing=[[False, False], [False, False], [True, False], [False, False]],
    )
    np.testing.assert_array_equal(history.global_norm, [NAN, INF, 1, NAN])


def test_rounding_is_not_clipping():
    history = GradientHistory()
    factors = np.array([1, 1 - 1e-7, 1 - 1e-3], "float32")
    history.append(weights=["w"], step=[0, 1, 2], norms=[[1]] * 3, clip_factor=factors)
    np.testing.assert_array_equal(history.clipped, [False, False, True])


def test_empty_record(tmp_path):
    history = GradientHistory()
    assert (len(history), history.weights, history.norms.shape) == (0, (), (0, 0))
    assert history.update_norms.shape == history.weight_norms.shape == (0, 0)
    assert history.update_step.dtype == history.update_counts.dtype == np.int64
    assert (history.update_step.shape, history.update_counts.shape) == ((0,), (0,))
    assert (history.probe_step.shape, history.probe_state_norms) == ((0,), {})
    assert history.state_norms == history.reach == {}
    assert math.isnan(history.clip_rate)
    assert history.global_norm.shape == history.applied_global_norm.shape == (0,)
    history.save(tmp_path / "empty.npz")
    assert len(GradientHistory.load(tmp_path / "empty.npz")) == 0
    assert len(history.to_dataframe()) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norms", [[1.0]]),
        ("norms", [1.0, 2.0]),
        ("loss", [1.0]),
        ("applied_norms", [[1.0, 2.0]]),
        ("missing", [[True, True]]),
        ("updated", [True]),
        ("clip_factor", [1.0] * 3),
        ("state_norms", {"rnn": [[1.0, 2.0]]}),
    ],
)
def test_wrong_shapes_are_refused(name, value):
    history = small()
    arguments = {"weights": ["w", "b"], "step": [3, 4], "norms": [[1, 2], [3, 4]], name: value}
    with pytest.raises(ValueError, match=f"`{name}.* must have shape .*Received shape"):
        history.append(**arguments)
    assert len(history) == 3  # As it was.


@pytest.mark.parametrize(
    ("name", "value"),
    [("update_norms", [1.0]), ("update_norms", 1.0), ("weight_norms", [1.0] * 3), ("step", [1, 2])],
)
def test_wrong_shapes_of_updates_are_refused(name, value):
    history = small()
    arguments = {"step": 3, "weights": ["w", "b"], "update_norms": [1, 2], "weight_norms": [3, 4]}
    with pytest.raises(ValueError, match=f"`{name}` must have shape .*Received shape"):
        history.append_updates(**arguments | {name: value})
    assert history.update_norms.shape == (0, 2)


def test_wrong_shapes_of_probes_are_refused():
    history = small()
    for value in 1.0, [[1.0, 2.0]]:
        with pytest.raises(ValueError, match=r"`state_norms\['rnn:h'\]` must have shape"):
            history.append_probe(step=3, state_norms={"rnn:h": value})
    assert history.probe_step.shape == (0,)


def test_a_record_without_samples_has_columns_for_its_weights():
    history = small()
    assert history.update_norms.shape == history.weight_norms.shape == (0, 2)
    assert history.probe_state_norms == {}


def test_samples_of_other_weights():
    history = small()
    history.append_updates(
        step=0, weights=["b", "new"], update_norms=[1, 2], weight_norms=[10, 20], update_count=3
    )
    assert history.weights == ("w", "b", "new")
    np.testing.assert_array_equal(history.update_norms, [[NAN, 1, 2]])
    np.testing.assert_array_equal(history.weight_norms, [[NAN, 10, 20]])
    np.testing.assert_array_equal(history.norms[:, 2], [NAN] * 3)
    assert history.missing[:, 2].all()
    np.testing.assert_array_equal(history.global_norm, small().global_norm)
    history.append(weights=["late"], step=[3], norms=[[1]])
    np.testing.assert_array_equal(history.update_norms, [[NAN, 1, 2, NAN]])


# truncate


@st.composite
def trainings(draw):
    """Events in the order of a training, or of several, each with the number of rows so far.

    Steps rise by one with each update; a sample comes after the rows of its own call.
    """
    events, rows = [], 0
    for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        step = 0
        for _ in range(n):
            updated = draw(st.booleans()) if step else True
            norms = [[draw(norms_of_weights)]]
            row = {"weights": ["w"], "step": [step], "norms": norms, "updated": [updated]}
            rows += 1
            events.append((rows, row))
            if updated and draw(st.booleans()):
                sample = {"step": step, "weights": ["w"], "update_norms": [rows]}
                events.append((rows, sample | {"weight_norms": [1]}))
            step += updated
            if updated and draw(st.booleans()):
                events.append((rows, {"step": step, "state_norms": {"rnn:h": [rows]}}))
    return events


@settings(deadline=None, max_examples=60)
@given(trainings(), st.data())
def test_truncate_leaves_the_record_of_a_training_that_ended_there(tmp_path_factory, events, data):
    rows = data.draw(st.integers(1, events[-1][0]))
    whole, expected = GradientHistory(), GradientHistory()
    for number, event in events:
        append(whole, event)
        if number <= rows:
            append(expected, event)
    if data.draw(st.booleans()):
        path = tmp_path_factory.mktemp("history") / "run.npz"
        whole.save(path)
        whole = GradientHistory.load(path)
    for _ in range(2):  # The second time there is nothing to drop.
        whole.truncate(rows)
        assert_same_record(whole, expected)


def assert_same_record(actual, expected):
    assert actual.weights == expected.weights
    names = "step norms applied_norms missing updated clip_factor update_step update_norms"
    for name in [*names.split(), "weight_norms", "update_counts", "probe_step"]:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), name)
    for name in "state_norms", "probe_state_norms":
        found, wanted = getattr(actual, name), getattr(expected, name)
        assert set(wanted) <= set(found)
        for key, norms in found.items():  # A state whose probes are all gone has no rows.
            np.testing.assert_array_equal(norms, wanted.get(key, np.zeros((0, norms.shape[1]))))


def test_truncate_to_a_step_between_two_rows():
    # every=3: rows of the steps 0, 3, 6; the backup lies before step 5.
    history = GradientHistory()
    for step in range(8):
        if step % 3 == 0:
            history.append(weights=["w"], step=[step], norms=[[1]])
        history.append_updates(step=step, weights=["w"], update_norms=[1], weight_norms=[1])
        history.append_probe(step=step + 1, state_norms={"rnn:h": [step, NAN]})
    history.truncate(2, step=5)
    assert history.step.tolist() == [0, 3]
    assert history.update_step.tolist() == [0, 1, 2, 3, 4]
    assert history.probe_step.tolist() == [1, 2, 3, 4, 5]
    history.truncate(0)
    assert (len(history), len(history.update_step), len(history.probe_step)) == (0, 0, 0)
    assert history.weights == ("w",)


def test_truncate_of_a_record_whose_samples_came_after_all_rows():
    history = small()  # The second of its steps 0, 1, 2 was no update.
    for step in range(3):
        history.append_updates(step=step, weights=["w"], update_norms=[1], weight_norms=[1])
        history.append_probe(step=step, state_norms={"rnn:h": [step]})
    history.truncate(100)
    assert (len(history), len(history.update_step)) == (3, 3)
    history.truncate(1)
    assert (history.update_step.tolist(), history.probe_step.tolist()) == ([0], [0, 1])
    # Another training, put back to its first row: what the first one had stays.
    history.append(weights=["w"], step=[0, 1], norms=[[1], [1]])
    history.append_updates(step=1, weights=["w"], update_norms=[1], weight_norms=[1])
    history.truncate(2)
    assert (history.update_step.tolist(), history.probe_step.tolist()) == ([0], [0, 1])


# Files


def test_files_of_the_first_format_still_load(tmp_path):
    """As they were written before there were updates and probes in them."""
    expected = small()
    np.savez_compressed(
        tmp_path / "old.npz",
        format="kerasgrad.GradientHistory/1",
        weights=np.array(["w", "b"]),
        layers=np.array(["rnn"]),
        step=np.array([0, 1, 2]),
        epoch=np.array([0, 0, 1], "int32"),
        loss=np.array([1.0, NAN, INF]),
        norms=np.array([[3.0, 4], [NAN, 1], [0, 0]]),
        applied_norms=np.array([[1.5, 2], [NAN, NAN], [0, 0]]),
        missing=np.array([[False, False], [True, False], [False, False]]),
        updated=np.array([True, False, True]),
        clip_factor=np.array([0.5, NAN, 1.0]),
        state_norms_0=np.array([[1.0, 2.0, 4.0], [6.0, 2.0, NAN], [0.0, 0.0, 0.0]]),
    )
    history = GradientHistory.load(tmp_path / "old.npz")
    assert_same_record(history, expected)
    np.testing.assert_array_equal(history.loss, expected.loss)
    np.testing.assert_array_equal(history.epoch, expected.epoch)
    history.append_updates(step=2, weights=["w"], update_norms=[1], weight_norms=[10])
    history.save(tmp_path / "new.npz")
    again = GradientHistory.load(tmp_path / "new.npz")
    np.testing.assert_array_equal(again.update_norms, [[1, NAN]])


def test_save_replaces_the_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    small().save(path)
    content = path.read_bytes()

    def disk_full(file, **arrays):
        file.write(b"PK half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    with pytest.raises(OSError, match="No space"):
        small().save(path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["run.npz"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_saved_files_have_the_permissions_of_any_file(tmp_path):
    (tmp_path / "other").touch()
    small().save(tmp_path / "run.npz")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "run.npz")]
    assert modes[0] == modes[1]


def test_load_takes_a_string_and_a_missing_file_is_said_to_be_missing(tmp_path):
    small().save(str(tmp_path / "run.npz"))
    assert len(GradientHistory.load(str(tmp_path / "run.npz"))) == 3
    with pytest.raises(FileNotFoundError):
        GradientHistory.load(tmp_path / "none.npz")


def assert_refused(path):
    with pytest.raises(ValueError, match=rf"{path.name} is not a whole record.*Expected a \.npz"):
        GradientHistory.load(path)


def foreign_files(folder):
    np.savez(folder / "other.npz", weights=np.zeros(3))
    np.savez(folder / "newer.npz", format="kerasgrad.GradientHistory/3")
    np.savez(folder / "pickled.npz", format=np.array([{}], dtype=object))
    np.save(folder / "array.npy", np.zeros(3))
    (folder / "pickle.npz").write_bytes(pickle.dumps({"format": 1}))
    (folder / "text.npz").write_text("step,loss\n0,1\n")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "folder.npz").mkdir()
    arrays = dict(np.load(folder.parent / "whole.npz"))
    np.savez(folder / "shapes.npz", **arrays | {"norms": arrays["norms"][:2]})
    np.savez(folder / "scalar.npz", **arrays | {"state_norms_0": np.float32(1)})
    np.savez(folder / "updates.npz", **arrays | {"updates_weight_norms": np.zeros((1, 2))})
    np.savez(folder / "probes.npz", **arrays | {"probes_rows": np.zeros(1)})
    np.savez(folder / "probed.npz", **arrays | {"probed": np.array(["rnn:h"])})
    for name in "updated", "updates_step":
        np.savez(folder / f"{name}.npz", **{k: v for k, v in arrays.items() if k != name})


def test_foreign_files_are_refused(tmp_path):
    small().save(tmp_path / "whole.npz")
    folder = tmp_path / "foreign"
    folder.mkdir()
    foreign_files(folder)
    for path in folder.iterdir():
        assert_refused(path)


def test_truncated_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "run.npz"
    sampled().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        assert_refused(path)
    expected = sampled()
    for i in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[i] ^= 0xFF
        path.write_bytes(damaged)
        try:
            loaded = GradientHistory.load(path)
        except ValueError as error:
            assert "is not a whole record" in str(error)
        else:  # The byte did not matter: a date, say.
            assert_same_record(loaded, expected)


# Tables


def test_to_dataframe():
    table = small().to_dataframe()
    assert list(table.columns) == [
        "step",
        "epoch",
        "loss",
        "global_norm",
        "applied_global_norm",
        "clip_factor",
        "updated",
        "norm/w",
        "norm/b",
        "applied_norm/w",
        "applied_norm/b",
    ]
    np.testing.assert_array_equal(table["norm/w"], [3, NAN, 0])
    np.testing.assert_array_equal(table["applied_norm/b"], [2, NAN, 0])
    np.testing.assert_array_equal(table["global_norm"], [5, 1, 0])
    np.testing.assert_array_equal(table["updated"], [True, False, True])


def test_to_dataframe_without_pandas(monkeypatch):
    original = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name.split(".")[0] == "pandas":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ImportError, match="needs pandas: pip install pandas"):
        small().to_dataframe()


# Size


@pytest.mark.parametrize("clipping", [False, True])
def test_a_million_steps_of_20_weights(clipping):
    weights, rows = [f"weight_{i}" for i in range(20)], 1000
    history, seconds = GradientHistory(), []
    tracemalloc.start()
    try:
        for start in range(0, 1_000_000, rows):
            norms = np.full((rows, 20), start, "float32")
            applied = norms / 2 if clipping else norms.copy()
            began = perf_counter()
            history.append(
                weights=weights,
                step=np.arange(start, start + rows),
                epoch=start // 100_000,
                loss=np.zeros(rows, "float32"),
                norms=norms,
                applied_norms=applied,
                missing=np.zeros((rows, 20), bool),
                updated=np.ones(rows, bool),
                clip_factor=np.full(rows, 0.5 if clipping else 1.0, "float32"),
            )
            seconds.append(perf_counter() - began)
        del norms, applied
        appended, _ = tracemalloc.get_traced_memory()
        assert history.norms.shape == (1_000_000, 20)
        joined, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert max(appended, joined) < 200e6
    # Medians, since other processes take their share of time.
    assert np.median(seconds[-300:]) < 3 * np.median(seconds[:300])
