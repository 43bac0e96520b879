"""The command line, in this process and, for a real Ctrl-C, in another."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import kerasgrad.cli
import kerasgrad.remedies.report
import kerasgrad.remedies.study
from kerasgrad import GradientHistory
from kerasgrad.cli import main
from kerasgrad.remedies import DEFAULT_REMEDIES, REMEDIES, Run, Settings
from kerasgrad.tasks import TASKS

REPOSITORY = Path(__file__).parents[1]
# The command line's 4000 sequences are 4 steps of 1000.
TINY = ["--timesteps", "5", "--units", "3", "--batch-size", "1000", "--steps", "4"]

DRAW = kerasgrad.remedies.report.draw


@pytest.fixture
def no_training(monkeypatch):
    """Whatever is wrong must be found before the first training starts."""

    def train(*_, **__):
        pytest.fail("a training was started")

    monkeypatch.setattr(kerasgrad.remedies.study, "train", train)


@pytest.fixture
def planted_training(monkeypatch):
    """In place of each training a history of three steps, for what only concerns the command."""
    trained = []

    def train(task, name, remedy, settings, seed, *, validation, on_step):
        trained.append((task, name, settings, seed))
        history = GradientHistory()
        history.append(
            weights=["w"],
            step=range(3),
            norms=np.ones((3, 1)),
            loss=np.ones(3),
            state_norms={"rnn": np.ones((3, 4))},
        )
        loss = None if validation is None else settings.learning_rate
        return Run(name, seed, history, [3], [0.5], [], settings.learning_rate, loss)

    monkeypatch.setattr(kerasgrad.remedies.study, "train", train)
    # Figures take longer to draw than all else; what `save` writes is in test_compare and
    # test_remedies_report.py.
    monkeypatch.setattr(kerasgrad.remedies.report, "draw", lambda comparison: {})
    return trained


def only_line(err: str) -> str:
    """The one line of an error, without its prefix."""
    (line,) = err.splitlines()
    prefix = "kerasgrad: error: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


# The main job


def test_compare(tmp_path, capsys):
    out = tmp_path / "made" / "here"
    status = main(["compare", *TINY, "--remedies", "baseline", "clipnorm", "--out", str(out)])
    assert status == 0
    stdout, stderr = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in stdout.splitlines() if line.strip()}
    assert rows["baseline"][2] == rows["clipnorm"][2] == "no"
    assert rows["baseline"][4] == "0%"
    assert "adding, T = 5, 4000 sequences: 3 units, batches of 1000, 4 steps of" in stdout
    assert str(out) in stdout.splitlines()[-1]
    (bar,) = stderr.splitlines()
    assert "2/2 runs" in bar
    assert {path.name for path in out.iterdir()} == {
        *("comparison.csv", "baseline.npz", "clipnorm.npz", "runs"),
        *("loss.png", "gradient_norms.png", "state_norms.png"),
        *("report.html", "summary.csv", "summary.md"),
    }
    assert len(list((out / "runs").glob("*.npz"))) == 2
    with open(out / "comparison.csv", newline="", encoding="utf-8") as file:
        cells = {row["remedy"]: row for row in csv.DictReader(file)}
    assert rows["baseline"][1] == f"{float(cells['baseline']['test_loss']):.4g}"
    assert len(GradientHistory.load(out / "clipnorm.npz")) == 4


@pytest.mark.usefixtures("planted_training")
def test_findings_are_told_in_whole_lines_under_the_table(tmp_path, capsys, monkeypatch):
    def train(task, name, *_, **__):
        history = GradientHistory()
        history.append(weights=["w"], step=[0, 1], norms=[[3.0], [np.nan]], loss=[1.0, np.nan])
        return Run(name, 0, history, [2], [np.nan], learning_rate=0.1)

    monkeypatch.setattr(kerasgrad.remedies.study, "train", train)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["compare", *TINY, "--remedies", "relu", "--out", str(tmp_path)]) == 0
    expected = "relu: non finite, step 1 (w): NaN, after a largest global norm of 3 before clipping"
    assert expected in capsys.readouterr().out.splitlines()


def test_the_defaults_are_those_of_the_main_job(planted_training, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare"]) == 0
    assert [name for _, name, _, _ in planted_training] == list(DEFAULT_REMEDIES)
    task, _, settings, seed = planted_training[0]
    assert (task.name, task.timesteps, seed) == ("adding", 100, 0)
    assert settings == Settings()
    assert (tmp_path / "kerasgrad-compare" / "comparison.csv").exists()


def test_options_arrive(planted_training, tmp_path, capsys):
    options = "--units 7 --batch-size 50 --steps 9 --learning-rate 0.5 --momentum 0 --clipnorm 3"
    arguments = ["compare", "--task", "copying", "--timesteps", "8", *options.split()]
    arguments += ["--seeds", "2", "--remedies", "keras_lstm", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert [(name, seed) for _, name, _, seed in planted_training] == [
        ("keras_lstm", 0),
        ("keras_lstm", 1),
    ]
    task, _, settings, _ = planted_training[0]
    assert (task.name, task.timesteps) == ("copying", 8 + 20)
    assert settings == Settings(7, 50, 9, 0.5, 0.0, 3.0)
    assert (tmp_path / "keras_lstm-seed1.npz").exists()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_named(task, planted_training, tmp_path, capsys):
    if task == "digits":
        pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    timesteps = [] if task == "digits" else ["--timesteps", "20"]
    arguments = ["compare", "--task", task, *timesteps, "--remedies", "relu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert planted_training[0][0].name == task


# Bad input

BAD_INPUT = {
    "unknown task": (["--task", "magic"], ["'magic'", *TASKS]),
    "unknown remedy": (["--remedies", "relu", "magic"], ["'magic'", *REMEDIES]),
    "one step": (["--timesteps", "1"], ["timesteps=1", "at least 2"]),
    "digits of another length": (["--task", "digits", "--timesteps", "65"], ["65", "64"]),
    "no seed": (["--seeds", "0"], ["--seeds", "at least 1", "0"]),
    "negative steps": (["--steps", "-1"], ["steps must be positive", "-1"]),
    "no units": (["--units", "0"], ["units must be positive", "0"]),
    "no learning rate": (["--learning-rate", "nan"], ["learning_rate must be positive", "nan"]),
    "momentum of 1": (["--momentum", "1"], ["momentum must be in [0, 1)", "1.0"]),
    "negative rate": (["--learning-rates", "0.1", "-1"], ["learning_rate must be positive"]),
    "no jobs": (["--jobs", "0"], ["jobs must be", "0"]),
    "two layers": (["--remedies", "irnn+keras_gru"], ["each bring a layer of their own"]),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("options", "words"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_and_status_2(options, words, tmp_path, capsys):
    assert main(["compare", "--out", str(tmp_path / "out"), *options]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    message = only_line(stderr)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists(), "an empty folder was left"


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("below", ["", "folder", "folder/folder"])
def test_an_unwritable_folder_is_found_before_training(below, tmp_path, capsys):
    # Permissions would not keep root out; a folder cannot be where there is a file.
    (tmp_path / "file").write_text("precious")
    folder = tmp_path / "file" / below
    assert main(["compare", *TINY, "--out", str(folder)]) == 2
    message = only_line(capsys.readouterr().err)
    assert f"cannot write into the folder {folder}" in message
    assert "--out" in message
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.usefixtures("no_training")
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_found_before_training(tmp_path, capsys):
    tmp_path.chmod(0o555)
    try:
        assert main(["compare", *TINY, "--out", str(tmp_path)]) == 2
    finally:
        tmp_path.chmod(0o755)
    assert "Permission denied" in only_line(capsys.readouterr().err)


@pytest.mark.usefixtures("no_training")
def test_digits_without_scikit_learn(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["compare", "--task", "digits", "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "kerasgrad[digits]"' in only_line(capsys.readouterr().err)


def test_an_error_of_several_lines_is_told_in_one(tmp_path, capsys, monkeypatch):
    """Keras's own messages often have several."""

    def make_task(*_, **__):
        raise ValueError("The task has\n\n  no shape.\nGive it one.")

    monkeypatch.setattr(kerasgrad.cli, "make_task", make_task)
    assert main(["compare", *TINY, "--out", str(tmp_path)]) == 2
    assert only_line(capsys.readouterr().err) == "The task has no shape. Give it one."


@pytest.mark.parametrize("others", [True, False])
def test_a_training_that_fails_is_told_and_the_others_go_on(
    others, planted_training, tmp_path, capsys, monkeypatch
):
    planted = kerasgrad.remedies.study.train

    def train(task, name, *arguments, **options):
        if name == "relu" or not others:
            raise ValueError("The layer has\n\n  no shape.")
        return planted(task, name, *arguments, **options)

    monkeypatch.setattr(kerasgrad.remedies.study, "train", train)
    remedies = ["--remedies", "baseline", "relu", "clipnorm"]
    assert main(["compare", *TINY, *remedies, "--out", str(tmp_path)]) == 1
    stdout, stderr = capsys.readouterr()
    told = [line for line in stderr.splitlines() if line.startswith("kerasgrad: error: ")]
    expected = "kerasgrad: error: relu, seed 0, learning rate 0.1 failed: ValueError: The layer has"
    assert f"{expected} no shape." in told
    assert len(told) == (1 if others else 3)
    first_words = [line.split()[0] for line in stdout.splitlines() if line.strip()]
    assert ("baseline" in first_words and "clipnorm" in first_words) is others
    if others:
        assert "Traceback" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["magic"], "magic"),
        (["compare", "--magic"], "--magic"),
        (["compare", "--steps", "many"], "many"),
        (["compare", "--remedies"], "--remedies"),
        (["compare", "--learning-rate", "1", "--learning-rates", "1", "2"], "--learning-rates"),
    ],
)
def test_what_argparse_refuses_is_status_2_too(arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error:" in last
    assert word in last


def test_help_names_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (
        "--out",
        "--seeds",
        "--learning-rates",
        "--resume",
        "default: 1500",
        *TASKS,
        *REMEDIES,
    ):
        assert word in text


# Ctrl-C


@pytest.mark.parametrize("before", [0, 2])
def test_an_interrupted_comparison_keeps_what_finished_and_goes_on(
    before, planted_training, tmp_path, capsys, monkeypatch
):
    planted = kerasgrad.remedies.study.train

    def interrupted(*arguments, **options):
        if len(planted_training) == before:
            raise KeyboardInterrupt
        return planted(*arguments, **options)

    remedies = ["baseline", "clipnorm", "relu", "keras_lstm"]
    command = ["compare", *TINY, "--remedies", *remedies, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(kerasgrad.remedies.study, "train", interrupted)
        assert main(command) == 130
    stdout, stderr = capsys.readouterr()
    expected = (
        f"kerasgrad: interrupted; {before} of 4 runs finished and are kept in {tmp_path / 'runs'}; "
        "the same command with --resume goes on"
    )
    assert stderr.splitlines()[-1] == expected
    finished = set(remedies[:before])
    assert {path.stem for path in tmp_path.glob("*.npz")} == finished
    assert len(list(tmp_path.glob("runs/*.npz"))) == before
    assert (tmp_path / "comparison.csv").exists() is bool(finished)
    first_words = {line.split()[0] for line in stdout.splitlines() if line.strip()}
    assert set(remedies) & first_words == finished
    # And the same command with --resume trains the others only.
    assert main([*command, "--resume"]) == 0
    assert [name for _, name, _, _ in planted_training] == remedies
    first_words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(remedies) <= first_words


def test_a_search_of_learning_rates(planted_training, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kerasgrad.remedies.report, "draw", DRAW)
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--learning-rates", "0.3", "0.01", "0.1", "--seeds", "2", "--remedies", "relu"]
    assert main(["compare", *TINY, *options, "--out", str(tmp_path)]) == 0
    tried = [(settings.learning_rate, seed) for _, _, settings, seed in planted_training]
    assert tried == [(rate, seed) for seed in (0, 1) for rate in (0.3, 0.01, 0.1)]
    out = capsys.readouterr().out
    assert "SGD(learning_rate of 0.3, 0.01, 0.1, momentum=0.9)" in " ".join(out.split())
    # The planted validation loss is the learning rate.
    (line,) = (line.split() for line in out.splitlines() if line.startswith("relu "))
    assert line[1] == "0.01"
    assert {path.name for path in tmp_path.glob("*.npz")} == {"relu-seed0.npz", "relu-seed1.npz"}
    assert (tmp_path / "learning_rates.png").exists()


def interrupt(process, times=3, seconds=20):
    """Ctrl-C, and again where nothing ended, as a person does; what the process printed.

    Python drops a KeyboardInterrupt that arrives while it runs a destructor, and a trace runs many.
    """
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"still running after {times} interrupts")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_a_real_interrupt(tmp_path):
    """The first remedy is over soon, as it goes to NaN; the second would take for ever."""
    arguments = ["compare", *TINY[:-2], "--steps", "100000000", "--learning-rate", "1e6"]
    arguments += ["--remedies", "baseline", "clipnorm", "--out", str(tmp_path / "out")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "FORCE_COLOR": "1",  # rich then shows the bars as they move, as on a terminal.
        "PYTHONUNBUFFERED": "1",
    }
    # Straight from a shell's background job, SIGINT would be ignored.
    start = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "runpy.run_module('kerasgrad', run_name='__main__', alter_sys=True)"
    log = tmp_path / "stderr"
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", start, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=tmp_path,
            env=environment,
        )
        try:
            deadline = time.monotonic() + 120
            while not re.search(rb"clipnorm.*loss", log.read_bytes()):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            time.sleep(0.5)
            stdout = interrupt(process)
        finally:
            process.kill()
            process.wait()
    told = log.read_text()
    assert process.returncode == 130, told
    # What Python says of an interrupt that a destructor swallowed.
    told = re.sub(r"Exception ignored in.*?KeyboardInterrupt[^\n]*\n", "", told, flags=re.DOTALL)
    assert "interrupted; 1 of 2 runs finished and are kept in" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert "non finite" in stdout.decode()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"baseline.npz", "comparison.csv", "loss.png"} <= names
    assert "clipnorm.npz" not in names
    assert not np.isfinite(GradientHistory.load(tmp_path / "out" / "baseline.npz").loss[-1])


def saved(tmp_path, history):
    history.save(tmp_path / "run.npz")
    return str(tmp_path / "run.npz")


def test_diagnose_prints_what_the_record_shows(tmp_path, capsys):
    history = GradientHistory()
    history.append(weights=["w"], step=[0, 1, 2, 3], norms=[[1.0], [1.0], [1e9], [np.nan]])
    assert main(["diagnose", saved(tmp_path, history)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("non finite, step 3 (w): NaN, after a largest global norm of 1e+09")
    assert lines[1] == "    threshold: NaN and Inf are no numbers; try:"
    assert "        optimizer.global_clipnorm = 1" in lines
    assert lines[-1] == "not looked for (needs model=): clipping never"


def test_diagnose_of_a_healthy_record(tmp_path, capsys):
    history = GradientHistory()
    history.append(weights=["w"], step=np.arange(50), norms=np.ones((50, 1)))
    assert main(["diagnose", saved(tmp_path, history)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nothing found"
    assert lines[1].startswith("looked for: non finite, exploding, ")


def test_diagnose_by_the_thresholds_of_others(tmp_path, capsys):
    history = GradientHistory()
    weights = ["a/kernel", "b/kernel", "c/kernel"]
    history.append(weights=weights, step=np.arange(50), norms=np.tile([1e-8, 1.0, 1.0], (50, 1)))
    path = saved(tmp_path, history)
    for preset, source in {
        "kerasgrad": "there against the last kernel",
        "smdebug": "Amazon SageMaker Debugger, VanishingGradient",
        "autotrainer": "AutoTrainer (Zhang, Zhai, Ma and Shen, ICSE 2021): β1 = 1e-3, and β2",
    }.items():
        assert main(["diagnose", path, "--preset", preset]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("vanishing through depth, step 0 (a/kernel): ")
        assert source in printed
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", path, "--preset", "mine"])
    assert stop.value.code == 2
    assert "invalid choice: 'mine'" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [0, 10, -30], ids=["empty", "start", "truncated"])
def test_diagnose_of_a_damaged_record(tmp_path, capsys, cut):
    history = GradientHistory()
    history.append(weights=["w"], step=[0], norms=[[2.0]])
    path = tmp_path / "run.npz"
    history.save(path)
    path.write_bytes(path.read_bytes()[:cut])
    assert main(["diagnose", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kerasgrad: error:") and error.count("\n") == 1
    assert "run.npz is not a whole record of GradientHistory.save" in error


def test_diagnose_of_a_missing_record(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path / "none.npz")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none.npz" in error
