"""Problems that recurrent networks are trained on, each with the loss of an answer without memory.

A network that learns must leave `constant_loss` behind; one whose gradients vanish stays there.

The problems come from three papers:

- Hochreiter & Schmidhuber 1997, "Long short-term memory", Neural Computation 9(8).
- Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks", ICML.
- Arjovsky, Shah & Bengio 2016, "Unitary evolution recurrent neural networks", ICML.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from typing import Any

import numpy as np

__all__ = [
    "TASKS",
    "Task",
    "adding_problem",
    "copying_memory",
    "digits",
    "make_task",
    "temporal_order",
]

_DIGITS_TIMESTEPS = 64


@dataclass(frozen=True, eq=False)  # Arrays have no single truth value to compare tasks by.
class Task:
    """A training set, a held-out set, and what a good and a memoryless answer score on them.

        solved  ⇔  loss(network(x_test), y_test) < solved_below

    Shapes: `x` and `x_test` are (samples, timesteps, features), float32. `y` and `y_test` are
    (samples, 1) float32 for `loss` "mse"; integer classes for "sparse_categorical_crossentropy",
    (samples, timesteps) if `per_step`, else (samples,).
    Units: `constant_loss` and `solved_below` are in those of `loss`, cross-entropies in nats;
    `outputs` counts the units of the output layer, activated by `output_activation`.

    >>> task = temporal_order(samples=5, timesteps=20)
    >>> task.samples, task.timesteps, task.features, task.outputs
    (5, 20, 6, 4)
    """

    name: str
    x: np.ndarray = field(repr=False)
    y: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    loss: str
    outputs: int
    output_activation: str | None
    per_step: bool
    constant_loss: float
    solved_below: float
    source: str

    @property
    def samples(self) -> int:
        """Number of training sequences."""
        return self.x.shape[0]

    @property
    def timesteps(self) -> int:
        """Number of steps of a sequence."""
        return self.x.shape[1]

    @property
    def features(self) -> int:
        """Number of inputs at each step."""
        return self.x.shape[2]


def adding_problem(
    samples: int = 1000, timesteps: int = 100, seed: int = 0, *, test_samples: int = 1000
) -> Task:
    """Add the two marked numbers of a sequence of random ones.

        y = x[i, 0] + x[j, 0],  x[t, 0] ~ U(0, 1),  x[t, 1] = 1 if t ∈ {i, j} else 0,
        i ~ U{0, …, ⌊T/2⌋ - 1},  j ~ U{⌊T/2⌋, …, T - 1},  T = timesteps

    Shapes: x (samples, timesteps, 2), y (samples, 1); both without unit.

    The best constant is E[y] = 1, whose mean squared error is Var[y] = 2/12 = 1/6.
    `solved_below` is 0.01, a convention chosen here: a root-mean-square error of 0.1, which is .05
    of the range of y. The original calls a sequence processed correctly if its absolute error is
    below .04 of that range.

    The original differs: numbers in [-1, 1], target 0.5 + (X1 + X2)/4, lengths random in
    [T, 1.1 T], the first mark among the first ten steps, the second among the first T/2 - 1 steps
    left, and -1 as the mark of both ends.

    Raises ValueError if timesteps < 2, samples < 1 or test_samples < 1.

    >>> task = adding_problem(samples=3, timesteps=8)
    >>> task.x[..., 1].sum(axis=1).tolist()
    [2.0, 2.0, 2.0]
    >>> bool(np.allclose(task.y[:, 0], task.x.prod(axis=2).sum(axis=1)))
    True

    Source: Hochreiter & Schmidhuber 1997, section 5.4; numbers in [0, 1] and one mark in each half
    as in Arjovsky, Shah & Bengio 2016, section 4.2, and much like Le, Jaitly & Hinton 2015,
    "A simple way to initialize recurrent networks of rectified linear units", section 4.1.
    """
    _require("timesteps", timesteps, 2, "each of the two marked numbers takes a step")
    half = timesteps // 2

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(n)
        first, second = rng.integers(half, size=n), rng.integers(half, timesteps, size=n)
        x = np.zeros((n, timesteps, 2), np.float32)
        x[..., 0] = rng.random((n, timesteps), np.float32)
        x[rows, first, 1] = x[rows, second, 1] = 1
        return x, (x[rows, first, 0] + x[rows, second, 0])[:, None]

    return Task(
        "adding",
        *_split(draw, samples, test_samples, seed),
        loss="mse",
        outputs=1,
        output_activation=None,
        per_step=False,
        constant_loss=1 / 6,
        solved_below=0.01,
        source="Hochreiter & Schmidhuber 1997, section 5.4; Arjovsky et al. 2016, section 4.2",
    )


def copying_memory(
    samples: int = 1000,
    timesteps: int = 100,
    seed: int = 0,
    *,
    symbols: int = 8,
    length: int = 10,
    test_samples: int = 1000,
) -> Task:
    """Recall, after a blank, the symbols that came before it.

        input   s_1 … s_L  (T - 1) × blank  delimiter  L × blank,    s_k ~ U{0, …, symbols - 1}
        target  (T + L) × blank                        s_1 … s_L
        T = timesteps (the blank, its delimiter included), L = length

    Shapes: x (samples, T + 2L, symbols + 2), one-hot with the blank second to last and the
    delimiter last; y (samples, T + 2L), classes 0 … symbols, the blank being class `symbols`.
    Thus `Task.timesteps` is T + 2L.

    `constant_loss` is that of the best answer without memory of the symbols, "blank" before the
    recall and the uniform distribution in it: L ln(symbols)/(T + 2L) nats a step, 10 ln 8/(T + 20)
    by default. It changes once, so one distribution for all steps would score worse.
    `solved_below` is a tenth of it, a convention chosen here as the paper states none: with
    L = 10 it is as if one symbol of the ten were guessed and the rest known.

    Raises ValueError if timesteps < 2, symbols < 2, length < 1, samples < 1 or test_samples < 1,
    or if the training set leaves (almost) none of the symbols**length sequences to hold out.

    >>> task = copying_memory(1, timesteps=3, seed=1, symbols=4, length=2, test_samples=1)
    >>> task.x[0].argmax(axis=1).tolist()  # 4: blank, 5: delimiter
    [0, 2, 4, 4, 5, 4, 4]
    >>> task.y[0].tolist()
    [4, 4, 4, 4, 4, 0, 2]

    Source: Arjovsky, Shah & Bengio 2016, section 4.1, after the long time lag problems of
    Hochreiter & Schmidhuber 1997.
    """
    _require("timesteps", timesteps, 2, "the blank is a blank step and the delimiter")
    _require("symbols", symbols, 2, "one symbol alone needs no memory")
    _require("length", length, 1, "there must be a symbol to recall")
    blank, delimiter = symbols, symbols + 1
    steps = timesteps + 2 * length

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        message = rng.integers(symbols, size=(n, length))
        code = np.full((n, steps), blank)
        y = code.copy()
        code[:, :length] = y[:, -length:] = message
        code[:, length + timesteps - 1] = delimiter
        return _one_hot(code, symbols + 2), y

    constant_loss = length * log(symbols) / steps
    return Task(
        "copying",
        *_split(draw, samples, test_samples, seed),
        loss="sparse_categorical_crossentropy",
        outputs=symbols + 1,
        output_activation="softmax",
        per_step=True,
        constant_loss=constant_loss,
        solved_below=constant_loss / 10,
        source="Arjovsky et al. 2016, section 4.1; Hochreiter & Schmidhuber 1997",
    )


def temporal_order(
    samples: int = 1000, timesteps: int = 100, seed: int = 0, *, test_samples: int = 1000
) -> Task:
    """Tell in which order two of the symbols A and B came among distractors.

        s_i, s_j ~ U{A, B},  s_t ~ U{c, d, e, f} elsewhere,  y = 2 [s_i = B] + [s_j = B],
        i ~ U{T/10 ≤ t ≤ 2T/10},  j ~ U{4T/10 ≤ t ≤ 5T/10},  t = 0, …, T - 1,  T = timesteps

    Shapes: x (samples, timesteps, 6), one-hot in the order A, B, c, d, e, f; y (samples,), the
    classes 0, 1, 2, 3 being AA, AB, BA, BB.

    The best constant is the uniform distribution: ln 4 nats. `solved_below` is 0.01 ln 2 nats,
    which implies the criterion of Pascanu et al., under 1% of sequences misclassified, as a
    misclassified one gives its class at most probability 1/2 and so costs at least ln 2. The
    converse fails: a network may meet their criterion at a greater loss.

    Hochreiter & Schmidhuber's task 6a has lengths random in [100, 110], i in [10, 20], j in
    [50, 60], and symbols of its own for the first step and the last.

    Raises ValueError if timesteps < 10, samples < 1 or test_samples < 1, or if the training set
    leaves (almost) no sequences to hold out.

    >>> task = temporal_order(samples=1, timesteps=10, seed=1)
    >>> "".join("ABcdef"[k] for k in task.x[0].argmax(axis=1)), int(task.y[0])
    ('ceAcBeeddc', 1)

    Source: Pascanu, Mikolov & Bengio 2013, section 4.1.1; Hochreiter & Schmidhuber 1997,
    section 5.6, task 6a.
    """
    # A closed interval of length T/10 is sure to hold an integer only if T/10 ≥ 1.
    _require("timesteps", timesteps, 10, "the two symbols come in windows of timesteps/10 steps")

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        code = rng.integers(2, 6, size=(n, timesteps))
        relevant = rng.integers(2, size=(n, 2))
        for k, tenths in enumerate((1, 4)):
            first, last = -(-tenths * timesteps // 10), (tenths + 1) * timesteps // 10
            code[np.arange(n), rng.integers(first, last + 1, size=n)] = relevant[:, k]
        return _one_hot(code, 6), relevant @ [2, 1]

    return Task(
        "temporal_order",
        *_split(draw, samples, test_samples, seed),
        loss="sparse_categorical_crossentropy",
        outputs=4,
        output_activation="softmax",
        per_step=False,
        constant_loss=log(4),
        solved_below=0.01 * log(2),
        source="Pascanu et al. 2013, section 4.1.1; Hochreiter & Schmidhuber 1997, section 5.6",
    )


def digits(seed: int = 0) -> Task:
    """Classify handwritten digits of 8 × 8 pixels read pixel by pixel, row by row.

        x[8 r + c, 0] = pixel[r, c] / 16,  y ∈ {0, …, 9}

    Shapes: x (samples, 64, 1), grey levels in [0, 1]; y (samples,). Of the 1797 images a fifth of
    each class, chosen by `seed`, is held out.

    `constant_loss` is that of answering the class frequencies p of the training set,
    -mean(ln p[y_test]) nats, near ln 10. `solved_below` is a tenth of it, a convention chosen here
    as there is no customary one for images this small.

    Raises ImportError without scikit-learn, which holds the images.

    >>> task = digits()
    >>> task.x.shape, task.x_test.shape
    ((1438, 64, 1), (359, 64, 1))

    Source: scikit-learn's load_digits, the test set of Alpaydin & Kaynak 1998, "Optical
    recognition of handwritten digits", UCI; read as sequences like the images of Le, Jaitly &
    Hinton 2015, section 4.2.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ImportError(
            'the digits task needs scikit-learn: pip install "kerasgrad[digits]"'
        ) from None
    pixels, y = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32)[..., None]

    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(y), bool)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(y == label))
        held_out[members[: round(len(members) / 5)]] = True

    frequencies = np.bincount(y[~held_out]) / np.count_nonzero(~held_out)
    constant_loss = -float(np.log(frequencies[y[held_out]]).mean())
    return Task(
        "digits",
        *(x[~held_out], y[~held_out], x[held_out], y[held_out]),
        loss="sparse_categorical_crossentropy",
        outputs=10,
        output_activation="softmax",
        per_step=False,
        constant_loss=constant_loss,
        solved_below=constant_loss / 10,
        source="scikit-learn load_digits; Alpaydin & Kaynak 1998, UCI",
    )


TASKS: dict[str, Callable[..., Task]] = {
    "adding": adding_problem,
    "copying": copying_memory,
    "temporal_order": temporal_order,
    "digits": digits,
}


def make_task(name: str, *, timesteps: int | None = None, **kwargs: Any) -> Task:
    """Make the task of that name.

        make_task(name, timesteps=T, …) = TASKS[name](timesteps=T, …)

    `timesteps` counts steps, in "copying" those of the blank; None leaves the task its default.
    "digits" has always 64. The other arguments go to the maker; `Task` has the shapes and units.

    Raises ValueError for a name not in `TASKS`, for "digits" with other than 64 timesteps, and
    where the maker does.

    >>> make_task("adding", samples=10, timesteps=30).x.shape
    (10, 30, 2)

    Source: the docstring of each maker names its own.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}: choose one of {', '.join(TASKS)}")
    if name == "digits":
        if timesteps not in (None, _DIGITS_TIMESTEPS):
            raise ValueError(
                f"got timesteps={timesteps}, but digits has fixed {_DIGITS_TIMESTEPS} timesteps, "
                f"a pixel each: pass timesteps={_DIGITS_TIMESTEPS} or leave it out"
            )
    elif timesteps is not None:
        kwargs["timesteps"] = timesteps
    return TASKS[name](**kwargs)


def _require(name: str, got: int, least: int, why: str) -> None:
    if got < least:
        raise ValueError(
            f"got {name}={got}, expected at least {least}, as {why}: pass {name}={least} or more"
        )


def _one_hot(code: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[code]


def _split(
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]],
    samples: int,
    test_samples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw x, y, x_test, y_test from two streams of one seed, no sequence being in both sets."""
    _require("samples", samples, 1, "there must be a sequence to train on")
    _require("test_samples", test_samples, 1, "there must be a sequence to hold out")
    train, test = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
    x, y = draw(train, samples)
    x_test, y_test = draw(test, test_samples)
    # Independent streams still meet by chance where sequences are few, so draw those again.
    seen = {row.tobytes() for row in x}
    for _ in range(100):
        shared = np.array([row.tobytes() in seen for row in x_test])
        if not shared.any():
            return x, y, x_test, y_test
        x_test[shared], y_test[shared] = draw(test, np.count_nonzero(shared))
    raise ValueError(
        f"got samples={samples}, which leaves too few sequences of this task to hold out "
        f"test_samples={test_samples}: pass fewer samples or a longer task"
    )
