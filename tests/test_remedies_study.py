"""Studies: runs in parallel, on a cluster, kept on disk, killed, resumed; and what is chosen."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import joblib
import keras
import numpy as np
import pytest
import tensorflow as tf

import kerasgrad as kg
from kerasgrad import GradientHistory
from kerasgrad.remedies import Comparison, FailedRun, Remedy, Run, Settings, Study, seeds_of
from kerasgrad.remedies import study as study_module
from kerasgrad.remedies.kept import KeptRuns, fingerprint
from kerasgrad.remedies.training import hold_out_validation, make_model

REPOSITORY = Path(__file__).parents[1]
TINY = {"units": 4, "batch_size": 32, "steps": 4, "verbose": 0}

# Without recurrence a training takes a fraction of a second, where that is all the same.
LINEAR = {"linear": Remedy("", lambda units, timesteps, **_: keras.layers.Flatten())}

TRAINED: list[str] = []


def counted(name, units, timesteps, **options):
    TRAINED.append(name)
    return keras.layers.Flatten()


COUNTED = {name: Remedy("", partial(counted, name)) for name in ("one", "other")}


@pytest.fixture(autouse=True)
def _none_trained():
    TRAINED.clear()


def tiny_task(**options) -> kg.tasks.Task:
    return kg.tasks.adding_problem(**{"samples": 64, "timesteps": 6, "test_samples": 32} | options)


def assert_same_runs(result: Comparison, expected: Comparison):
    """Bit for bit, but for the time that they took and the layers' numbers in the names."""
    assert len(result.runs) == len(expected.runs)
    for run, other in zip(result.runs, expected.runs, strict=True):
        for name in ("remedy", "seed", "learning_rate", "validation_loss"):
            assert getattr(run, name) == getattr(other, name)
        for name in ("test_steps", "test_losses", "test_accuracies"):
            np.testing.assert_array_equal(getattr(run, name), getattr(other, name))
        for name in ("step", "epoch", "loss", "norms", "applied_norms", "clip_factor"):
            one, two = (getattr(r.history, name) for r in (run, other))
            np.testing.assert_array_equal(one, two)
        states = (r.history.state_norms.values() for r in (run, other))
        for one, two in zip(*states, strict=True):
            np.testing.assert_array_equal(one, two)


# The plan


def test_each_remedy_gets_each_seed_and_learning_rate_once():
    study = Study(
        tiny_task(), COUNTED, Settings(), seeds=(3, 1, 3), learning_rates=(0.1, 0.01, 0.1)
    )
    assert [(p.seed, p.remedy, p.learning_rate) for p in study.plan] == [
        (seed, name, rate) for seed in (3, 1) for name in COUNTED for rate in (0.1, 0.01)
    ]


def test_a_number_of_seeds():
    assert seeds_of(4) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="Received: 0"):
        kg.compare(tiny_task(), LINEAR, seeds=0, **TINY)


def test_budget_is_another_name_for_steps():
    result = kg.compare(tiny_task(), LINEAR, **TINY | {"steps": 4})
    settings = {name: value for name, value in TINY.items() if name != "steps"}
    assert_same_runs(kg.compare(tiny_task(), LINEAR, budget=4, **settings), result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4, "budget": 4}, "steps=4 and budget=4 say the same thing twice"),
        ({"learning_rate": 1, "learning_rates": (1, 2)}, "learning_rate=1 and learning_rates"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"learning_rates": (0.1, -1)}, "learning_rate must be positive"),
        ({"resume": True}, "Pass the folder="),
        ({"jobs": 0}, "jobs must be a number"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        kg.compare(tiny_task(), COUNTED, **options)
    assert not TRAINED


# Validation data


def test_validation_takes_a_fifth_of_the_training_sequences_and_no_test_sequence():
    task = tiny_task()
    smaller, (x, y) = hold_out_validation(task)
    assert (smaller.samples, len(x)) == (51, 13)
    rows = {array.tobytes(): float(target[0]) for array, target in zip(task.x, task.y, strict=True)}
    parts = [*zip(smaller.x, smaller.y, strict=True), *zip(x, y, strict=True)]
    assert {array.tobytes(): float(target[0]) for array, target in parts} == rows
    np.testing.assert_array_equal(smaller.x_test, task.x_test)
    again = hold_out_validation(tiny_task())[1][0]
    np.testing.assert_array_equal(again, x)


def test_one_sequence_cannot_be_split():
    with pytest.raises(ValueError, match="one training sequence"):
        kg.compare(tiny_task(samples=1), COUNTED, learning_rates=(0.1, 0.2), **TINY)
    assert not TRAINED


RATES = (0.001, 0.03, 1e6)


@pytest.fixture(scope="module")
def searched() -> Comparison:
    options = TINY | {"steps": 12}
    return kg.compare(tiny_task(), LINEAR, seeds=2, learning_rates=RATES, **options)


def test_the_choice_looks_at_no_test_sequence(searched):
    """With other test targets the results change, and nothing before them does."""
    task = tiny_task()
    wrong = dataclasses.replace(task, y_test=-100 * task.y_test, x_test=task.x_test[::-1].copy())
    options = TINY | {"steps": 12}
    other = kg.compare(wrong, LINEAR, seeds=1, learning_rates=RATES, **options)
    assert other.chosen_learning_rates == searched.chosen_learning_rates
    for run, same in zip(other.runs, searched.runs[: len(RATES)], strict=True):
        np.testing.assert_array_equal(run.history.loss, same.history.loss)
        np.testing.assert_equal(run.validation_loss, same.validation_loss)
        if not run.diverged:
            assert run.final_loss > 1000 * same.final_loss


def test_validation_sequences_are_not_trained_on(searched):
    for run in searched.runs:
        if not run.diverged:
            assert len(run.history) == 12  # 51 sequences are 2 batches: 6 epochs.
    # The validation loss is that of the trained network on just those, here one without recurrence.
    # The validation loss is that of just those, by a network trained on just the others.
    smaller, (x, y) = hold_out_validation(tiny_task())
    run = searched.chosen_runs[0]
    settings = Settings(4, 32, 12, run.learning_rate)
    again = kg.remedies.make_model(smaller, LINEAR["linear"], settings, run.seed)
    again.fit(smaller.x, smaller.y, batch_size=32, epochs=6, verbose=0)
    assert run.validation_loss == pytest.approx(again.evaluate(x, y, verbose=0), rel=1e-5)


def test_the_least_median_validation_loss_is_chosen(searched):
    losses = searched.validation_losses("linear")
    assert list(losses) == list(RATES)
    medians = {rate: np.median(losses[rate]) for rate in RATES}
    assert medians[1e6] == math.inf  # Runs that diverged.
    assert medians[0.03] < medians[0.001]
    assert searched.chosen_learning_rates == {"linear": 0.03}
    assert {run.learning_rate for run in searched.chosen_runs} == {0.03}
    assert list(searched.histories) == [("linear", 0), ("linear", 1)]
    (row,) = searched.summary()
    assert (row["learning_rate"], row["runs"], row["diverged"]) == (0.03, 2, 0)


def test_one_learning_rate_holds_nothing_out():
    one, two = (
        kg.compare(tiny_task(), LINEAR, **TINY | options)
        for options in ({"learning_rate": 0.03}, {"learning_rates": (0.03,)})
    )
    assert_same_runs(two, one)
    assert two.runs[0].validation_loss is None


# The choice and the summary, on planted runs


def planted(remedy="planted", seed=0, rate=0.1, *, validation=None, test=0.5, **options) -> Run:
    history = GradientHistory()
    columns = {"step": range(4), "norms": np.ones((4, 1)), "loss": np.ones(4)}
    history.append(weights=["w"], **columns | options.pop("columns", {}))
    losses = options.pop("test_losses", [test])
    steps = [10 * (i + 1) for i in range(len(losses))]
    return Run(remedy, seed, history, steps, losses, [], rate, validation, **options)


def comparison(runs, failed=(), rates=(0.01, 0.1)) -> Comparison:
    remedies = {run.remedy: Remedy("") for run in runs}
    return Comparison(tiny_task(), Settings(), list(runs), list(failed), remedies, rates)


def test_a_better_test_loss_does_not_count():
    result = comparison(
        [planted(rate=0.01, validation=0.3, test=0.9), planted(rate=0.1, validation=0.4, test=0.0)]
    )
    assert result.chosen_learning_rates == {"planted": 0.01}
    assert result.summary()[0]["test_loss"] == 0.9


def test_diverged_and_failed_runs_count_as_inf_and_of_equals_the_smallest_is_chosen():
    diverged = {"loss": np.r_[np.ones(3), np.nan]}
    runs = [
        planted(seed=0, rate=0.1, validation=0.1),
        planted(seed=1, rate=0.1, validation=0.1, columns=diverged),
        *(planted(seed=seed, rate=0.01, validation=0.2) for seed in range(3)),
    ]
    failed = [FailedRun("planted", 2, 0.1, "E", "traceback")]
    result = comparison(runs, failed)
    assert result.validation_losses("planted")[0.1] == [0.1, math.inf, math.inf]
    assert result.chosen_learning_rates == {"planted": 0.01}
    assert comparison(runs[:2] + runs[2:3] * 2).chosen_learning_rates == {"planted": 0.01}
    all_bad = [planted(rate=rate, validation=math.nan) for rate in (0.1, 0.01)]
    assert comparison(all_bad).chosen_learning_rates == {"planted": 0.01}


@pytest.mark.parametrize(
    ("losses", "test_loss", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1e25, False),  # Seen after all choices.
        ([0.5, 1e25, 3.0, 500.0], 1.0, False),
        ([0.5, 0.5, 3.0, 501.0], 1.0, True),
        ([0.5, 1e9, 1e17, 1e25], 1e25, True),
        ([0.5, np.inf, 1.0, 1.0], 1.0, True),
        ([0.5, 0.5, 0.5, 0.5], math.nan, True),
    ],
)
def test_what_has_diverged(losses, test_loss, expected):
    run = planted(test=test_loss, columns={"loss": np.array(losses)})
    assert run.diverged is expected
    assert run.ranked_loss == (math.inf if expected else test_loss)


def test_the_summary_of_planted_runs():
    task = tiny_task()
    runs = [
        planted(seed=0, test_losses=[0.5, 0.009, 0.008], seconds_per_step=0.001),
        planted(seed=1, test_losses=[0.5, 0.5, 0.001], seconds_per_step=0.003),
        planted(seed=2, test_losses=[0.5, 0.5, 0.2], seconds_per_step=0.002),
        planted(seed=3, test_losses=[math.inf]),
    ]
    failed = [FailedRun("planted", 4, 0.1, "ValueError: no", "Traceback")]
    (row,) = Comparison(task, Settings(), runs, failed).summary()
    assert (row["runs"], row["diverged"], row["failed"], row["solved"]) == (4, 1, 1, 2)
    assert row["test_loss"] == (0.008 + 0.2) / 2
    assert (row["test_loss_low"], row["test_loss_high"]) == (0.001, math.inf)
    assert row["success_rate"] == 0.5
    assert row["steps_to_solve"] == 25  # Of those that solved it: after 20 and 30 steps.
    assert row["seconds_per_step"] == 0.002
    assert row["clip_rate"] == 0
    # p = 1/2, n = 4, z = 1.96: the middle is 1/2, too.
    half = 1.959964 * math.sqrt(0.25 / 4 + 1.959964**2 / 64) / (1 + 1.959964**2 / 4)
    assert row["success_rate_low"] == pytest.approx(0.5 - half, abs=1e-6)
    assert row["success_rate_high"] == pytest.approx(0.5 + half, abs=1e-6)


# In parallel


@pytest.fixture(scope="module")
def one_by_one() -> Comparison:
    return kg.compare(tiny_task(), ("baseline",), seeds=2, **TINY)


def test_runs_in_parallel_are_the_same_bit_for_bit(one_by_one):
    result = kg.compare(tiny_task(), ("baseline",), seeds=2, jobs=2, **TINY)
    assert_same_runs(result, one_by_one)


def test_other_threads_that_draw_random_numbers_change_no_weight():
    task = tiny_task()

    def weights():
        return make_model(task, kg.remedies.REMEDIES["baseline"], Settings(4), 0).get_weights()

    expected, over = weights(), threading.Event()

    def draw():
        while not over.is_set():
            random.random()

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        actual = [weights() for _ in range(5)]
    finally:
        over.set()
        thread.join()
    for found in actual:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def noting(path, units, timesteps, **_):
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    policy = keras.config.dtype_policy().name
    with open(path, "a") as file:
        file.write(json.dumps([os.getpid(), threads, policy]) + "\n")
    return keras.layers.Flatten()


def notes(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_processes_share_the_cores_and_know_the_dtype_policy(tmp_path):
    keras.config.set_dtype_policy("float64")
    remedies = {"noting": Remedy("", partial(noting, str(tmp_path / "notes")))}
    kg.compare(tiny_task(), remedies, seeds=2, jobs=2, **TINY)
    for process, threads, policy in notes(tmp_path / "notes"):
        assert process != os.getpid()
        assert threads == max(1, joblib.cpu_count() // 2)
        assert policy == "float64"


@pytest.mark.filterwarnings("ignore")  # Whatever a cluster that is shut down has to say.
def test_a_dask_cluster_needs_no_change_of_the_call(tmp_path, one_by_one):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            # joblib leaves a cluster of one core alone, and stays in this process. One process
            # imports TensorFlow once; its two threads train one at a time.
            n_workers=1,
            threads_per_worker=2,
            processes=True,
            dashboard_address=None,
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        result = kg.compare(tiny_task(), ("baseline",), seeds=2, **TINY)
        remedies = {"noting": Remedy("", partial(noting, str(tmp_path / "notes")))}
        kg.compare(tiny_task(), remedies, folder=tmp_path, **TINY)
    assert_same_runs(result, one_by_one)
    ((process, threads, _),) = notes(tmp_path / "notes")
    assert process != os.getpid()
    assert threads == max(1, joblib.cpu_count() // 2)
    assert len(list(tmp_path.glob("runs/*.npz"))) == 1


class ListsAlone(joblib.parallel.ThreadingBackend):
    """A backend that cannot hand out results one by one, as Ray's cannot."""

    supports_return_generator = False


def test_a_backend_that_hands_out_lists_alone_needs_no_change_of_the_call(tmp_path, one_by_one):
    joblib.register_parallel_backend("lists_alone", ListsAlone)
    kept, ended = tmp_path / "runs", []

    def third(units, timesteps, **options):
        ended.append(len(list(kept.glob("*"))))
        return kg.layers.SimpleRNN(units, **options)

    remedies = {"baseline": kg.remedies.REMEDIES["baseline"], "third": Remedy("", third)}
    with joblib.parallel_config("lists_alone", n_jobs=2):
        result = kg.compare(tiny_task(), remedies, seeds=2, folder=tmp_path, **TINY)
    result.runs = [run for run in result.runs if run.remedy == "baseline"]
    assert_same_runs(result, one_by_one)
    assert ended == [0, 2]  # Both runs of the first list were kept before the second began.


# Runs that fail


def broken(units, timesteps, **_):
    raise ValueError("The layer has\n  no shape.")


def dying(units, timesteps, **_):
    os._exit(3)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_raises_is_told_and_kept_and_the_others_go_on(jobs, tmp_path):
    remedies = {"broken": Remedy("", broken)} | LINEAR
    with pytest.warns(UserWarning, match=r"'broken'.*ValueError: The layer has no shape\."):
        result = kg.compare(tiny_task(), remedies, seeds=2, jobs=jobs, folder=tmp_path, **TINY)
    assert [(run.remedy, run.seed) for run in result.runs] == [("linear", 0), ("linear", 1)]
    assert [(run.remedy, run.seed) for run in result.failed] == [("broken", 0), ("broken", 1)]
    assert "in broken\n" in result.failed[0].traceback
    assert [row["failed"] for row in result.summary()] == [0, 2]
    kept = KeptRuns(tmp_path / "runs")
    runs = [kept.load(path) for path in sorted(kept.folder.iterdir())]
    assert runs[:2] == result.failed
    assert [type(run) for run in runs] == [FailedRun, FailedRun, Run, Run]


def test_a_run_that_failed_runs_again(tmp_path):
    """Memory may have been short, or a file missing."""
    remedies = {"sometimes": Remedy("", partial(sometimes, str(tmp_path / "file")))} | LINEAR
    with pytest.warns(UserWarning, match="No such file"):
        kg.compare(tiny_task(), remedies, folder=tmp_path, **TINY)
    (tmp_path / "file").touch()
    result = kg.compare(tiny_task(), remedies, folder=tmp_path, resume=True, **TINY)
    assert [run.remedy for run in result.runs] == ["sometimes", "linear"]
    assert not result.failed


def sometimes(path, units, timesteps, **_):
    open(path).close()
    return keras.layers.Flatten()


def test_when_every_run_fails_it_is_an_error():
    with (
        pytest.warns(UserWarning, match="no shape"),
        pytest.raises(RuntimeError, match="Every training failed"),
    ):
        kg.compare(tiny_task(), {"broken": Remedy("", broken)}, **TINY)


@pytest.mark.skipif(sys.platform == "win32", reason="exit statuses of another kind")
def test_a_process_that_dies_takes_no_other_run_with_it():
    remedies = {"dying": Remedy("", dying)} | LINEAR
    with pytest.warns(UserWarning, match="The process that trained it died"):
        result = kg.compare(tiny_task(), remedies, jobs=2, **TINY)
    assert [run.remedy for run in result.runs] == ["linear"]
    assert [run.remedy for run in result.failed] == ["dying"]


# Kept runs


def test_a_finished_run_is_not_run_again(tmp_path):
    first = kg.compare(tiny_task(), {"one": COUNTED["one"]}, folder=tmp_path, **TINY)
    assert TRAINED == ["one"]
    options = {"folder": tmp_path, "resume": True} | TINY
    more = kg.compare(tiny_task(), COUNTED, seeds=2, **options)
    assert TRAINED == ["one", "other", "one", "other"]
    again = kg.compare(tiny_task(), COUNTED, seeds=2, **options)
    assert len(TRAINED) == 4
    assert_same_runs(again, more)
    assert [row["seed"] for row in again.rows()] == [0, 0, 1, 1]
    np.testing.assert_array_equal(more.runs[0].history.norms, first.runs[0].history.norms)
    assert more.runs[0].seconds_per_step == first.runs[0].seconds_per_step


@pytest.fixture
def planted_training(monkeypatch):
    """Runs of four steps in place of trainings: what they are kept by is all that matters."""

    def train(task, name, remedy, settings, seed, *, validation, on_step):
        remedy.make_layer(settings.units, task.timesteps)  # Which notes its name.
        loss = None if validation is None else 0.5
        return planted(name, seed, settings.learning_rate, validation=loss)

    monkeypatch.setattr(study_module, "train", train)


@pytest.mark.usefixtures("planted_training")
def test_without_resume_it_runs_again_and_touches_no_other_file(tmp_path):
    kg.compare(tiny_task(), COUNTED, folder=tmp_path, **TINY)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    kg.compare(tiny_task(), {"one": COUNTED["one"]}, folder=tmp_path, **TINY)
    assert TRAINED == ["one", "other", "one"]
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    changed = {path.name[:4] for path in after if after[path] != before[path]}
    assert (set(after), changed) == (set(before), {"one-"})


def test_a_kept_run_is_a_record(tmp_path):
    result = kg.compare(tiny_task(), LINEAR, folder=tmp_path, **TINY)
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name.startswith("linear-seed0-lr0.1-")
    np.testing.assert_array_equal(GradientHistory.load(path).norms, result.runs[0].history.norms)


def test_a_file_that_was_cut_off_is_no_finished_run(tmp_path):
    options = {"folder": tmp_path, "resume": True} | TINY
    whole = kg.compare(tiny_task(), {"one": COUNTED["one"]}, **options)
    (path,) = (tmp_path / "runs").iterdir()
    path.write_bytes(path.read_bytes()[:-50])
    assert_same_runs(kg.compare(tiny_task(), {"one": COUNTED["one"]}, **options), whole)
    assert TRAINED == ["one", "one"]


def test_nan_and_inf_are_kept_as_they_are(tmp_path):
    kept = KeptRuns(tmp_path)
    run = planted("a/b [c]", test_losses=[0.1, math.nan, math.inf], validation=math.inf)
    path = kept.path(run.remedy, run.seed, run.learning_rate, "0" * 64)
    assert path.parent == tmp_path
    kept.save(path, run)
    read = kept.load(path)
    assert read.remedy == "a/b [c]"
    np.testing.assert_equal(read.test_losses, run.test_losses)
    assert read.validation_loss == math.inf
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.usefixtures("planted_training")
@pytest.mark.parametrize(
    "change",
    [
        {"task": tiny_task(seed=1)},
        {"learning_rate": 0.2},
        {"units": 5},
        {"momentum": 0.5},
        {"remedies": {"one": Remedy("", partial(counted, "another"))}},
        {"remedies": {"one": Remedy("", partial(counted, "one"), clips=True)}},
        {"learning_rates": (0.1, 0.2)},  # A fifth of the training sequences is held out.
    ],
)
def test_a_run_of_anything_else_is_another_run(change, tmp_path):
    options = {"task": tiny_task(), "remedies": {"one": COUNTED["one"]}, "folder": tmp_path} | TINY
    kg.compare(**options)
    kg.compare(**options | change, resume=True)
    assert len(TRAINED) == (3 if "learning_rates" in change else 2)


# What a run is known by

SCALE = 1.0


def closing_over(number):
    return lambda units, timesteps, **kwargs: keras.layers.GRU(units + number, **kwargs)


def calling_another(units):
    return _called(units) * SCALE


def _called(units):
    return units + 1


def test_functions_are_known_by_their_code_and_what_they_use(monkeypatch):
    assert fingerprint(closing_over(1)) == fingerprint(closing_over(1))
    assert fingerprint(closing_over(1)) != fingerprint(closing_over(2))
    before = fingerprint(calling_another)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    scaled = fingerprint(calling_another)
    monkeypatch.setattr(sys.modules[__name__], "_called", closing_over(1))
    assert len({before, scaled, fingerprint(calling_another)}) == 3


def test_a_function_that_calls_itself_has_a_fingerprint():
    def countdown(n):
        return n and countdown(n - 1)

    assert len(fingerprint(countdown)) == 64


SCRIPT = """
import sys
import keras
import kerasgrad as kg

SIZES = {"b": 2, "a": 1}

def layer(units, timesteps, **kwargs):
    assert units not in {"x", "y", "z"}, SIZES
    print("trained", flush=True)
    return keras.layers.Flatten()

task = kg.tasks.adding_problem(samples=64, timesteps=6, test_samples=32)
result = kg.compare(
    task, {"own": kg.remedies.Remedy("", layer)}, seeds=int(sys.argv[2]), folder=sys.argv[1],
    units=4, batch_size=32, steps=4, resume=True, verbose=0,
)
print("losses", *(repr(run.final_loss) for run in result.runs), flush=True)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))

    def start(*arguments, hash_seed):
        environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": str(hash_seed)}
        return subprocess.Popen(
            [sys.executable, tmp_path / "script.py", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | environment,
        )

    return start


def test_a_killed_study_goes_on_where_it_stopped(script, tmp_path):
    """With SIGKILL, in mid-run; what it adds up to is what an undisturbed one gives."""
    folder = tmp_path / "study"
    process = script(folder, 100, hash_seed=1)
    deadline = time.monotonic() + 120
    try:
        while len(list(folder.glob("runs/*.npz"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
    kept = len(list(folder.glob("runs/*.npz")))
    assert 2 <= kept < 90
    # The function is known again, though Python orders its sets and strings otherwise.
    *trained, losses = (
        script(folder, kept + 1, hash_seed=2).communicate(timeout=120)[0].splitlines()
    )
    assert trained == ["trained"]
    undisturbed = kg.compare(tiny_task(), LINEAR, seeds=kept + 1, **TINY)
    assert losses.split()[1:] == [repr(run.final_loss) for run in undisturbed.runs]
