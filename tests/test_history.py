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


def rows_of(all_pieces):
    for piece in all_pieces:
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
    weights = list(dict.fromkeys(w for piece in all_pieces for w in piece["weights"]))
    assert list(history.weights) == weights
    for name in "step", "epoch", "loss", "updated", "clip_factor":
        np.testing.assert_array_equal(getattr(history, name), [row[name] for row in rows])
    for name, fill in ("norms", NAN), ("applied_norms", NAN), ("missing", True):
        expected = [[row[name].get(w, fill) for w in weights] for row in rows]
        array = getattr(history, name)
        assert array.shape == (len(rows), len(weights))
        np.testing.assert_array_equal(array, np.reshape(expected, array.shape))
    layers = list(dict.fromkeys(k for piece in all_pieces for k in piece["state_norms"]))
    assert list(history.state_norms) == layers
    for layer in layers:
        T = max(p["state_norms"][layer].shape[1] for p in all_pieces if layer in p["state_norms"])
        expected = [row["state_norms"].get(layer, []) for row in rows]
        expected = [values + [NAN] * (T - len(values)) for values in expected]
        np.testing.assert_array_equal(history.state_norms[layer], np.reshape(expected, (-1, T)))
    assert_derived(history, rows)


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
@given(st.lists(pieces(), max_size=4), st.booleans())
def test_append_save_and_load_keep_every_row(tmp_path_factory, all_pieces, read_between):
    history = GradientHistory()
    for piece in all_pieces:
        history.append(**piece)
        if read_between:  # What has been joined goes on being appended to.
            assert len(history.norms) == len(history)
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


# Files


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
    np.savez(folder / "newer.npz", format="kerasgrad.GradientHistory/2")
    np.savez(folder / "pickled.npz", format=np.array([{}], dtype=object))
    np.save(folder / "array.npy", np.zeros(3))
    (folder / "pickle.npz").write_bytes(pickle.dumps({"format": 1}))
    (folder / "text.npz").write_text("step,loss\n0,1\n")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "folder.npz").mkdir()
    arrays = dict(np.load(folder.parent / "whole.npz"))
    np.savez(folder / "shapes.npz", **arrays | {"norms": arrays["norms"][:2]})
    np.savez(folder / "scalar.npz", **arrays | {"state_norms_0": np.float32(1)})
    del arrays["updated"]
    np.savez(folder / "column.npz", **arrays)


def test_foreign_files_are_refused(tmp_path):
    small().save(tmp_path / "whole.npz")
    folder = tmp_path / "foreign"
    folder.mkdir()
    foreign_files(folder)
    for path in folder.iterdir():
        assert_refused(path)


def test_truncated_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "run.npz"
    small().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        assert_refused(path)
    expected = small()
    for i in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[i] ^= 0xFF
        path.write_bytes(damaged)
        try:
            loaded = GradientHistory.load(path)
        except ValueError as error:
            assert "is not a whole record" in str(error)
        else:  # The byte did not matter: a date, say.
            np.testing.assert_array_equal(loaded.norms, expected.norms)
            assert loaded.weights == expected.weights


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
