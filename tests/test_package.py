"""The package as it is installed and imported: its wheel, its names, what it loads and when."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kerasgrad

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "kerasgrad"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(kerasgrad.__path__, "kerasgrad.")
    if module.name != "kerasgrad.__main__"  # Importing it runs it.
)


def run_python(*arguments: str, path: Path | str = REPOSITORY, **options):
    """Another interpreter, which finds kerasgrad in `path`."""
    environment = os.environ | {"PYTHONPATH": str(path)} | options.pop("environment", {})
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


# What an import loads

# Keras itself imports these where they are installed. Here they are not, until later.
_IMPORT = """
import json, sys
absent = ("matplotlib", "sklearn", "pandas")
for name in absent:
    sys.modules[name] = None
import kerasgrad as kg
early = "kerasgrad.plots" in sys.modules
for name in absent:
    del sys.modules[name]
ax = kg.plots.plot_loss(kg.GradientHistory())
print(json.dumps([early, kg.plots.__name__, type(ax).__name__]))
"""


def test_import_leaves_out_what_a_training_does_not_need(tmp_path):
    done = run_python("-c", _IMPORT, cwd=tmp_path, environment={"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, "kerasgrad.plots", "Axes"]


def test_another_backend_is_one_clear_error(tmp_path):
    """Keras on JAX is stood in for: the error must come before anything else is loaded."""
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras" / "__init__.py").write_text("from keras import backend\n")
    (tmp_path / "keras" / "backend.py").write_text("def backend():\n    return 'jax'\n")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = run_python("-c", "import kerasgrad", path=path, cwd=tmp_path)
    assert done.returncode == 1
    error = done.stderr[done.stderr.index("ImportError: ") :].splitlines()
    assert len(error) == 2
    assert "'jax'" in error[0]
    # The line that mends it is code that does.
    fix = error[1].strip()
    show = "; print(os.environ['KERAS_BACKEND'])"
    mended = run_python("-c", fix + show, environment={"KERAS_BACKEND": "jax"})
    assert mended.stdout.split() == ["tensorflow"], mended.stderr


def imports(path: Path) -> set[str]:
    """The modules that a file names in its imports, at any place but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# The house has floors: room (a module, or a package) -> the other rooms that it may import.
BELOW = {
    "tasks": set(),
    "history": set(),
    "memory": set(),
    "devices": set(),
    "norms": {"devices"},
    "layers": {"devices", "norms"},
    "keras_private": set(),
    "ring_buffer": {"norms"},
    "streams": {"history"},
    "bptt": {"keras_private", "layers", "memory"},
    "plots": set(),
    "updates": {"norms"},
    "probe": {"bptt", "keras_private"},
    "recorder": {"history", "keras_private", "probe", "ring_buffer", "streams", "updates"},
    "callbacks": {
        "history",
        "keras_private",
        "norms",
        "probe",
        "recorder",
        "ring_buffer",
        "streams",
        "updates",
    },
    "inspection": {"bptt", "keras_private", "layers"},
    # The model is measured elsewhere, and only where one is given.
    "diagnosis": {"history", "inspection", "memory"},
    "remedies": {
        "callbacks",
        "diagnosis",
        "history",
        "keras_private",
        "layers",
        "memory",
        "norms",
        "plots",
        "tasks",
    },
    "cli": {"diagnosis", "history", "remedies", "tasks"},
}


def files_of(room: str) -> list[Path]:
    module = PACKAGE / f"{room}.py"
    return [module] if module.exists() else sorted((PACKAGE / room).glob("*.py"))


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_from_below(room):
    for file in files_of(room):
        names = {name for name in imports(file) if name.startswith("kerasgrad.")}
        assert {name.split(".")[1] for name in names} - {room} <= BELOW[room], file.name


@pytest.mark.parametrize("room", ["tasks", "history", "memory", "diagnosis", "plots"])
def test_plain_arrays_need_neither_keras_nor_tensorflow(room):
    names = set().union(*map(imports, files_of(room)))
    roots = {name.partition(".")[0] for name in names}
    assert not {"keras", "tensorflow"} & roots
    assert ("matplotlib" in roots) is (room == "plots")


# The names


@pytest.mark.parametrize("name", kerasgrad.__all__)
def test_every_public_name_exists(name):
    assert getattr(kerasgrad, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'plot'"):
        kerasgrad.plot  # noqa: B018


def _defined_in(module):
    """(name, object) of the public functions and classes of a module, and their methods."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield name, thing
        if inspect.isclass(thing):
            for attribute, member in vars(thing).items():
                member = getattr(member, "__func__", member)  # of a classmethod
                # What a base class defines is documented there.
                inherited = any(hasattr(base, attribute) for base in thing.__bases__)
                if inspect.isfunction(member) and not attribute.startswith("_") and not inherited:
                    yield f"{name}.{attribute}", member


PUBLIC = [
    pytest.param(thing, id=f"{module}.{name}")
    for module in MODULES
    for name, thing in _defined_in(importlib.import_module(module))
]


@pytest.mark.parametrize("module", ["kerasgrad", *MODULES])
def test_every_module_says_what_it_is_for(module):
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("thing", PUBLIC)
def test_public_functions_and_classes_have_a_docstring(thing):
    # dataclass writes one of its own, the signature, where there is none.
    assert thing.__doc__ and not thing.__doc__.startswith(f"{thing.__name__}(")


@pytest.mark.parametrize("thing", PUBLIC)
def test_public_functions_are_annotated(thing):
    function = vars(thing).get("__init__") if inspect.isclass(thing) else thing
    if function is None:
        return
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    bare = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
    assert not bare
    if not inspect.isclass(thing):
        assert signature.return_annotation is not inspect.Signature.empty


# The wheel

_BUILD = (
    "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `python -m build` makes, by the same call of the build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # With what else a checkout may have beside the package, and the wheel must not.
    for name in ("kerasgrad", "tests", "tutorials"):
        if (REPOSITORY / name).is_dir():
            shutil.copytree(
                REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, source / name)
    done = run_python("-c", _BUILD, str(folder), path=folder, cwd=source)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def test_the_wheel_has_every_file_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = {Path(name).name: name for name in archive.namelist() if name not in names}
        entry_points = archive.read(information["entry_points.txt"]).decode()
        metadata = archive.read(information["METADATA"]).decode().splitlines()
    expected = {path.relative_to(REPOSITORY).as_posix() for path in SOURCES}
    assert names == expected | {"kerasgrad/py.typed"}
    assert "kerasgrad = kerasgrad.cli:main" in entry_points
    assert "LICENSE" in information
    required = {line.removeprefix("Requires-Dist: ").replace(" ", "") for line in metadata}
    assert {"tensorflow>=2.18", "keras>=3.6", "matplotlib", "numpy", "joblib>=1.4"} <= required
    assert "Requires-Python: >=3.10" in metadata
    assert {"Provides-Extra: digits", "Provides-Extra: test"} <= set(metadata)


def test_the_wheel_alone_runs_the_main_job(wheel, tmp_path):
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    options = "--timesteps 5 --units 3 --batch-size 2000 --steps 2 --remedies baseline"
    show = "import sys, kerasgrad.cli; sys.stderr.write('from ' + kerasgrad.__file__ + chr(10));"
    done = run_python(
        "-c",
        show + "sys.exit(kerasgrad.cli.main())",
        *("compare", *options.split(), "--out", "results"),
        path=installed,
        cwd=tmp_path,
        environment={"MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr
    assert f"from {installed / 'kerasgrad' / '__init__.py'}" in done.stderr.splitlines()
    assert "baseline" in done.stdout
    assert (tmp_path / "results" / "comparison.csv").exists()


_RECORDED_TRAINING = """
import keras
import numpy as np
import kerasgrad as kg

model = keras.Sequential([
    keras.layers.Input((5, 3)),
    kg.layers.SimpleRNN(4, return_sequences=True),
    kg.layers.SimplifiedLSTM(4, project_input=True, return_sequences=True),
    kg.layers.SimplifiedLSTM(4),
    keras.layers.Dense(1),
])
model.compile("sgd", "mse")
norms = kg.callbacks.GradientNorms()
model.fit(np.ones((8, 5, 3)), np.ones((8, 1)), verbose=0, callbacks=[norms])
print(norms.history)
"""


def test_a_recorded_training_warns_of_nothing():
    done = run_python("-W", "error", "-c", _RECORDED_TRAINING)
    assert done.stdout.startswith("<GradientHistory: 1 steps"), done.stderr
    # TensorFlow's own, of every process that loads it.
    lines = [line for line in done.stderr.splitlines() if "absl::InitializeLog" not in line]
    assert not [line for line in lines if "warning" in line.lower()]


def test_python_m_kerasgrad_is_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kerasgrad", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("kerasgrad", run_name="__main__")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: kerasgrad ")
    assert "compare" in out
