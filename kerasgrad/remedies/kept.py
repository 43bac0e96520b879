"""Finished runs on disk: one file each, found again by all that the run depends on.

A file is the .npz of `GradientHistory.save`, which `GradientHistory.load` and `kerasgrad diagnose`
read, with one member more, run.json: what else the run came to, or the traceback of one that
raised. Its name ends in a hash of the task's arrays, the remedy and its code, settings, seed,
learning rate and versions: a run with anything else is another file, and none is ever deleted.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import types
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from kerasgrad.history import GradientHistory
from kerasgrad.remedies.training import FailedRun, Run

_MEMBER = "run.json"


def versions() -> dict[str, str]:
    """The versions that numbers depend on: {package: version}."""
    found = {}
    for package in ("kerasgrad", "keras", "tensorflow", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # kerasgrad itself, from a folder on PYTHONPATH.
            found[package] = "unknown"
    return found


@dataclass(frozen=True)
class KeptRuns:
    """The folder of a study's finished runs."""

    folder: Path

    def path(self, remedy: str, seed: int, learning_rate: float, fingerprint: str) -> Path:
        """Where this run's file is, or would be."""
        name = re.sub(r"[^\w.+-]+", "_", remedy)
        return self.folder / f"{name}-seed{seed}-lr{learning_rate:g}-{fingerprint[:16]}.npz"

    def load(self, path: Path) -> Run | FailedRun | None:
        """The run in a file; None where there is no file, or not a whole one."""
        try:
            with zipfile.ZipFile(path) as file:
                found = json.loads(file.read(_MEMBER))
            if "traceback" in found:
                return FailedRun(**found)
            return Run(history=GradientHistory.load(path), **found)
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
            return None

    def save(self, path: Path, run: Run | FailedRun) -> None:
        """Write a run's file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(f"{path.name}.{os.getpid()}.partial")
        history = run.history if isinstance(run, Run) else GradientHistory()
        columns = [column.name for column in fields(run) if column.name != "history"]
        found = {name: getattr(run, name) for name in columns}
        try:
            history.save(partial_file)
            with zipfile.ZipFile(partial_file, "a") as file:
                file.writestr(_MEMBER, json.dumps(found))
            os.replace(partial_file, path)
        finally:
            partial_file.unlink(missing_ok=True)


def fingerprint(*things: Any) -> str:
    """A hash of all that these consist of, the same in each process.

    Of arrays the bytes; of dataclasses the fields; of a function its code, its defaults, the
    variables that it closes over, and the functions and plain values of its own module that it
    uses; of a class or a module, whose code is not looked into, the name.

    Example:

    >>> from kerasgrad.remedies.kept import fingerprint
    >>> fingerprint(lambda x: x + 1) == fingerprint(lambda x: x + 1) != fingerprint(lambda x: x + 2)
    True
    """
    digest = hashlib.sha256()
    for part in _parts(things, set()):
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _parts(thing: Any, seen: set[int]) -> Iterator[str | bytes]:
    """The thing taken apart, in an order that is the same in each process."""
    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes)):
        yield f"{type(thing).__name__} {thing!r}"
    elif isinstance(thing, np.ndarray):
        yield f"array {thing.dtype.str} {thing.shape}"
        yield np.ascontiguousarray(thing).tobytes()
    elif isinstance(thing, types.ModuleType):
        yield f"module {thing.__name__}"
    elif isinstance(thing, type):
        yield f"class {thing.__module__}.{thing.__qualname__}"
    elif id(thing) in seen:  # A function that calls itself, a list that holds itself.
        yield "again"
    else:
        yield from _parts_of_a_whole(thing, seen | {id(thing)})


def _parts_of_a_whole(thing, seen):
    yield type(thing).__name__
    if isinstance(thing, Mapping):
        inner = sorted(thing.items(), key=lambda item: repr(item[0]))
    elif isinstance(thing, (set, frozenset)):
        inner = sorted(thing, key=repr)
    elif isinstance(thing, (list, tuple)):
        inner = thing
    elif is_dataclass(thing):
        inner = [(column.name, getattr(thing, column.name)) for column in fields(thing)]
    elif isinstance(thing, partial):
        inner = [thing.func, thing.args, thing.keywords]
    elif isinstance(thing, types.MethodType):
        inner = [thing.__func__, thing.__self__]
    elif isinstance(thing, types.CodeType):
        inner = [thing.co_code, thing.co_names, thing.co_varnames, thing.co_consts]
    elif inspect.isfunction(thing):
        inner = _parts_of_a_function(thing)
    elif hasattr(thing, "get_config"):  # A layer or an initializer of Keras.
        inner = [type(thing), thing.get_config()]
    elif hasattr(thing, "__dict__"):
        inner = [type(thing), vars(thing)]
    else:
        inner = [repr(thing)]
    for part in inner:
        yield from _parts(part, seen)


def _parts_of_a_function(function):
    yield from (function.__code__, function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        yield cell.cell_contents
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        own = getattr(value, "__module__", None) == function.__module__
        plain = isinstance(value, (bool, int, float, str, bytes, tuple, np.ndarray))
        if plain or (own and inspect.isfunction(value)):
            yield name, value
        elif name in function.__globals__:
            qualified = getattr(value, "__qualname__", type(value).__qualname__)
            yield name, f"{getattr(value, '__module__', '')}.{qualified}"


def _names(code):
    """The global names that a function's code uses, at any depth."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
