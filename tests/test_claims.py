"""What the tutorials' README says of the article's claims, each number computed a second time.

One test a row of its table, named by the row's claim, which is the test's docstring. The numbers
come from closed forms, quadrature and plain NumPy: derivatives by complex steps or by finite sums,
not by the package. Each number of the row's "measured" must be accounted for by its test, and must
stand in the sections of the tutorials that the row names.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import kerasgrad as kg

FOLDER = Path(__file__).parents[1] / "tutorials"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))

# Not the 1 of s_1, which is part of a name.
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def table(first_header):
    """The rows of the table whose first column has this header, as lists of cells."""
    lines = README[README.index(f"| {first_header} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


CLAIMS = {
    claim: (measured, shown_in) for claim, _, measured, shown_in in table("the article's claim")
}


class Measured:
    """The numbers in a row's "measured", until each is accounted for."""

    def __init__(self, text):
        self.left = NUMBER.findall(text)

    def given(self, *numbers):
        """Settings, not results."""
        for number in numbers:
            self.left.remove(number)

    def equals(self, number, value):
        """The value rounds to the number as it is written."""
        self.left.remove(number)
        digits, _, exponent = number.partition("e")
        last_digit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
        assert abs(value - float(number)) <= 0.5000001 * last_digit, (value, number)

    def above(self, number, value):
        self.left.remove(number)
        assert value > float(number)

    def below(self, number, value):
        self.left.remove(number)
        assert value < float(number)


@pytest.fixture
def measured(request):
    """The "measured" of the row whose claim is the docstring of the test."""
    numbers = Measured(CLAIMS[request.function.__doc__][0])
    yield numbers
    assert not numbers.left, "numbers that no test stands behind"


# Oracles


def derivative(function, at):
    """d function/d at, of complex steps: exact to rounding, without a difference of two numbers."""
    return np.imag(function(at + 1e-30j)) / 1e-30


def gradient(function, at):
    at = np.asarray(at, complex)
    return np.array([derivative(lambda h, e=e: function(at + h * e), 0) for e in np.eye(len(at))])


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def relu(a, cap=np.inf):
    return np.where(a.real > cap, cap, np.where(a.real > 0, a, 0))


def orthogonal(n, rng):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def gradient_back(a_of, slope, W, V, s_0, T):
    """The states of s_t = Φ(a_t), and λ_t = ∂(V·s_T)/∂s_t for t = 1..T, of a batch.

    a_of(t, s) is (a_t, Φ(a_t)); slope(a) is Φ'.
    """
    s, a = [s_0], []
    for t in range(T):
        a_t, s_t = a_of(t, s[-1])
        a.append(a_t)
        s.append(s_t)
    λ = [np.broadcast_to(V, s[-1].shape)]
    for a_t in reversed(a[1:]):
        λ.insert(0, (slope(a_t) * λ[0]) @ W)
    return np.array(s[1:]), np.array(λ)


def tanh_network(W, U, x, rng):
    """The states and gradients of a tanh network read out at the end; x is (T, batch, features)."""

    def a_of(t, s):
        a = x[t] @ U.T + s @ W.T
        return a, np.tanh(a)

    V = rng.normal(size=len(W))
    s_0 = np.zeros((x.shape[1], len(W)))
    return gradient_back(a_of, lambda a: np.cosh(a) ** -2.0, W, V, s_0, len(x))


def reach(λ):
    """‖∂L/∂s_1‖/‖∂L/∂s_T‖ of each example."""
    return np.linalg.norm(λ[0], axis=-1) / np.linalg.norm(λ[-1], axis=-1)


# Tutorial 2


def test_tanh_slope(measured):
    """The gradient is governed by tanh' ≤ 1."""
    measured.given("50", "0.8", "1", "1.25", "1.5")
    s = math.sqrt(0.2)
    assert np.isclose(derivative(np.tanh, math.atanh(s)), 0.8)

    def after_50_steps(W):
        def run(state):
            for _ in range(50):
                state = np.tanh(math.atanh(s) - W * s + W * state)
            return state

        assert np.isclose(run(s), s)
        return derivative(run, s)

    measured.equals("1.43e-05", after_50_steps(1.0))
    measured.equals("1", after_50_steps(1.25))
    measured.equals("9.1e+03", after_50_steps(1.5))

    rng = np.random.default_rng(0)
    for Φ, γ in ((np.tanh, 1), (sigmoid, 1 / 4)):
        for _ in range(20):
            W, a, s = rng.normal(size=(8, 8)), rng.normal(size=8), rng.normal(size=8)
            J = gradient(lambda s, Φ=Φ, W=W, a=a: Φ(a + W @ s), s).T
            bound = γ * np.linalg.norm(W, 2)
            assert np.linalg.norm(J, 2) <= bound
            # Reached where the slope is largest.
            J = gradient(lambda s, Φ=Φ, W=W: Φ(W @ s), np.zeros(8)).T
            assert np.isclose(np.linalg.norm(J, 2), bound)


def test_large_weights(measured):
    """If W is too large, the gradient explodes."""
    measured.given("2", "0.1", "10", "0.9", "10", "0", "0.9")
    rng = np.random.default_rng(1)
    W = 2 * orthogonal(32, rng)
    x = rng.normal(size=(50, 8, 32))
    small, large = (np.median(reach(tanh_network(W, np.eye(32), c * x, rng)[1])) for c in (0.1, 10))
    measured.above("1e3", small)
    measured.below("1e-3", large)

    trap = np.array([[0.9, 10], [0, 0.9]])
    measured.equals("0.9", np.abs(np.linalg.eigvals(trap)).max())
    norms = [np.linalg.norm(np.linalg.matrix_power(trap, k), 2) for k in range(200)]
    measured.equals("38.7", max(norms))
    measured.equals("9", np.argmax(norms))


# Tutorial 1, with its numbers

U, V, S_0 = 0.5, np.array([1.0, -2.0]), 0.3
X = (1.0, -0.5, -0.4)
TRUTH = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


def states(W, upto=3):
    s = [S_0]
    for x_t in X[:upto]:
        s.append(np.tanh(U * x_t + W * s[-1]))
    return s[1:]


def cross_entropy(ō, o):
    return -(ō * np.log(o)).sum()


def losses(s):
    return [cross_entropy(ō, softmax(V * s_t)) for ō, s_t in zip(TRUTH, s, strict=True)]


def test_one_sum(measured):
    """The gradient is one sum, over k."""
    measured.given("3")
    W = 1.5
    measured.equals("1.9987", derivative(lambda W: losses(states(W))[2], W))
    measured.equals("1.7979", derivative(lambda W: sum(losses(states(W))), W))
    # ∂L_3/∂s_3 · Σ_k Π_j J_j · ds_k/dW
    s = states(W)
    total = [derivative(lambda W, k=k: states(W)[k], W) for k in range(3)]
    before = [S_0, s[0], s[1]]
    J = [
        derivative(lambda s, x_t=x_t: np.tanh(U * x_t + W * s), s_t)
        for x_t, s_t in zip(X, before, strict=True)
    ]
    of_s_3 = derivative(lambda s_3: losses([*s[:2], s_3])[2], s[2])
    measured.equals("3.2423", of_s_3 * (J[2] * J[1] * total[0] + J[2] * total[1] + total[2]))


def test_cross_entropy(measured):
    """The loss -Σ ō log o has the gradient o - ō."""
    measured.given("0", "1", "2")
    z, true, half = V * states(1.5)[2], TRUTH[2], np.array([0.4, 0.1])
    by_sigmoid = gradient(lambda z: cross_entropy(true, sigmoid(z)), z)
    measured.equals("0", by_sigmoid[0])
    measured.equals("0.6655", (sigmoid(z) - true)[0])
    by_half = gradient(lambda z: cross_entropy(half, softmax(z)), z)
    measured.equals("0.0437", by_half[0])
    measured.equals("0.4874", (softmax(z) - half)[0])

    assert np.allclose(by_sigmoid, -true * (1 - sigmoid(z)))
    assert np.allclose(by_half, half.sum() * softmax(z) - half)
    assert np.allclose(gradient(lambda z: cross_entropy(true, softmax(z)), z), softmax(z) - true)
    binary = gradient(
        lambda z: cross_entropy(true, sigmoid(z)) + cross_entropy(1 - true, 1 - sigmoid(z)), z
    )
    assert np.allclose(binary, sigmoid(z) - true)


# Tutorials 4 and 5


def relu_network(W, U, x, V):
    def a_of(t, s):
        a = x[t] @ U.T + s @ W.T
        return a, np.maximum(0, a)

    s_0 = np.zeros((x.shape[1], len(W)))
    return gradient_back(a_of, lambda a: (a > 0).astype(float), W, V, s_0, len(x))


def test_relu_gain(measured):
    """ReLU removes the vanishing."""
    measured.given("50", "1", "2", "1.6", "5")
    measured.equals("3.0e-8", 0.5**25)
    measured.equals("1", (math.sqrt(2) ** 2 / 2) ** 25)
    measured.equals("479", (1.6**2 / 2) ** 25)
    rng = np.random.default_rng(0)
    n = 200
    for g in (1, math.sqrt(2), 1.6):
        logs = []
        for _ in range(10):
            W, U = g / math.sqrt(n) * rng.normal(size=(n, n)), rng.normal(size=(n, 8))
            _, λ = relu_network(W, U, rng.normal(size=(51, 4, 8)), rng.normal(size=n))
            logs.append(np.log(reach(λ)).mean())
        assert abs(np.mean(logs) - 25 * math.log(g**2 / 2)) < math.log(5)

    # From the identity: what a unit passes on is all or nothing.
    U, x, V = rng.normal(size=(n, 1)), rng.normal(size=(50, 8, 1)), rng.normal(size=n)
    s, λ = relu_network(np.eye(n), U, x, V)
    always_on = (s[1:] > 0).all(axis=0)
    assert np.array_equal(λ[0], always_on * V)
    assert 0.02 < always_on.mean() < 0.5


def scalar_network(w, cap=np.inf):
    """The loss of s_t = Φ(u + w s_{t-1} + b) after 20 steps, which should be 1."""
    s = np.zeros(1, complex)
    for _ in range(20):
        s = relu(w[0] + w[1] * s + w[2], cap)
    return ((s - 1) ** 2)[0]


def clipped_training(rng, timesteps=100, units=32, rate=0.05):
    """A tanh network on the adding problem, by SGD with each weight's gradient clipped to 1.

    Returns the mean loss and the median reach of the last 100 of 300 steps.
    """
    task = kg.tasks.adding_problem(samples=3200, timesteps=timesteps)
    glorot = math.sqrt(6 / (2 + units))
    W, U = orthogonal(units, rng), glorot * rng.uniform(-1, 1, size=(units, 2))
    b, V, c = np.zeros(units), rng.normal(size=units) * math.sqrt(2 / (1 + units)), 0.0
    losses, reached = [], []
    for start in np.tile(np.arange(0, 3200, 32), 3):
        x = np.moveaxis(task.x[start : start + 32], 1, 0).astype(float)
        s = [np.zeros((32, units))]
        for x_t in x:
            s.append(np.tanh(x_t @ U.T + s[-1] @ W.T + b))
        error = s[-1] @ V + c - task.y[start : start + 32, 0]
        λ = [np.outer(2 * error / 32, V)]
        δ = []
        for t in range(timesteps, 0, -1):
            δ.append((1 - s[t] ** 2) * λ[-1])
            λ.append(δ[-1] @ W)
        δ = np.array(δ[::-1])
        gradients = [
            np.einsum("tbi,tbj->ij", δ, np.array(s[:-1])),
            np.einsum("tbi,tbj->ij", δ, x),
            δ.sum(axis=(0, 1)),
            2 * error @ s[-1] / 32,
            2 * error.mean(),
        ]
        W, U, b, V, c = (
            w - rate * g * min(1, 1 / np.linalg.norm(g))
            for w, g in zip((W, U, b, V, c), gradients, strict=True)
        )
        losses.append(np.mean(error**2))
        # λ[-1] is that of s_0.
        reached.append(np.median(reach([λ[-2], λ[0]])))
    return np.mean(losses[-100:]), np.median(reached[-100:])


def test_threshold(measured):
    """A suitable threshold prevents ReLU's explosion."""
    measured.given("1", "6", "100")
    w = np.array([1.0, 1.5, 0.0])
    measured.equals("1e9", np.linalg.norm(gradient(scalar_network, w)))
    for _ in range(100):
        g = gradient(scalar_network, w)
        w = w - 0.05 * g * min(1, 1 / max(np.linalg.norm(g), 1e-300))
    measured.equals("0", scalar_network(w).real)
    w = np.array([1.0, 1.5, 0.0])
    measured.equals("0", np.linalg.norm(gradient(lambda w: scalar_network(w, 6.0), w)))
    measured.equals("25", scalar_network(w, 6.0).real)

    loss, reached = clipped_training(np.random.default_rng(0))
    assert loss > 0.9 / 6
    measured.below("1e-3", reached)

    variables = [keras.Variable(np.zeros(2)), keras.Variable(np.zeros(1))]
    gradients = [keras.ops.array(g, "float32") for g in ([np.inf, 4.0], [0.5])]
    keras.optimizers.SGD(1.0, global_clipnorm=1.0).apply(gradients, variables)
    assert all(np.isnan(v.numpy()).all() for v in variables)


def test_dead_units(measured):
    """A negative input kills a unit."""
    measured.given("64")
    x = np.moveaxis(kg.tasks.adding_problem(samples=3200, timesteps=30).x[:256], 1, 0)
    keras.utils.set_random_seed(0)
    layers = kg.layers.SimpleRNN(64, "relu"), kg.layers.IRNN(64)
    for layer, off_at_some_step, dead in zip(layers, ("62", "44"), ("2", "15"), strict=True):
        layer.build((None, 30, 2))
        U, W, b = layer.get_weights()
        s, _ = relu_network(W.T, U.T, x + 0 * b[0], np.ones(64))
        assert not b.any()
        measured.equals(off_at_some_step, (s == 0).any(axis=(0, 1)).sum())
        measured.equals(dead, (s == 0).all(axis=(0, 1)).sum())
    # From the identity: those that each of the two inputs, never negative, can only push down.
    assert np.array_equal((s == 0).all(axis=(0, 1)), (U < 0).all(axis=0))


# Tutorial 6


def test_gate_product(measured):
    """Z = tanh'(x) σ(y) is basically 0 or 1."""
    measured.given("0", "1", "0.05", "0.95", "0.95", "0.99")
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    slope = np.cosh(nodes) ** -2.0
    assert np.isclose(weights @ sigmoid(nodes), 0.5)
    measured.equals("0.30", 0.5 * (weights @ slope))
    measured.equals("0.21", math.exp(weights @ (np.log(slope) + np.log(sigmoid(nodes)))))

    # Given the gate, tanh'(x) > z is |x| < artanh √(1 - z), and P(|x| < a) = erf(a/√2).
    y = np.linspace(-10, 10, 20001)
    density = np.exp(-(y**2) / 2) / np.exp(-(y**2) / 2).sum()

    def probability_above(z):
        a = np.arctanh(np.sqrt(1 - np.minimum(z / sigmoid(y), 1)))
        return density @ np.vectorize(math.erf)(a / math.sqrt(2))

    measured.equals("90.5", 100 * (probability_above(0.05) - probability_above(0.95)))
    measured.equals("1e-4", probability_above(0.95))
    # Each factor alone must be at least 0.99, the other being below 1.
    measured.equals("0.1", math.atanh(math.sqrt(0.01)))
    measured.equals("4.6", math.log(0.99 / 0.01))


def simplified_lstm(x, weights, activation=lambda S: S):
    """(o_T ⊙ S_T, S_T); x is (T, batch, features)."""
    W_f, W_i, W_o, *W_c, b_f, b_i, b_o = weights
    S = 0.0
    for x_t in x:
        f, i, o = sigmoid(x_t @ W_f + b_f), sigmoid(x_t @ W_i + b_i), sigmoid(x_t @ W_o + b_o)
        S = activation(f * S + i * (x_t @ W_c[0] if W_c else x_t))
    return o * S, S


def test_features_and_units(measured):
    """The state takes in i_t X_t."""
    measured.given("4", "32")
    with pytest.raises(ValueError, match="broadcast"):
        np.ones(32) * np.ones(4)
    x = np.random.default_rng(0).normal(size=(2, 5, 4))
    with pytest.raises(ValueError, match="project_input=True"):
        kg.layers.SimplifiedLSTM(32)(x)
    layer = kg.layers.SimplifiedLSTM(32, project_input=True)
    h = np.asarray(layer(x.astype("float32")))
    expected, _ = simplified_lstm(np.moveaxis(x, 1, 0), layer.get_weights())
    assert np.allclose(h, expected, atol=1e-6)


def test_output_gate(measured):
    """There is an output gate o_t."""
    x = np.random.default_rng(0).normal(size=(3, 5, 4))
    error, difference = 0, np.inf
    for name, activation in ((None, lambda S: S), ("tanh", np.tanh)):
        layer = kg.layers.SimplifiedLSTM(4, activation=name)
        h = np.asarray(layer(x.astype("float32")))
        expected, S = simplified_lstm(np.moveaxis(x, 1, 0), layer.get_weights(), activation)
        error = max(error, np.abs(h - expected).max())
        difference = min(difference, np.abs(h - S).max())
    measured.below("1e-6", error)
    measured.above("0.01", difference)


def test_open_gate(measured):
    """The cell solves the vanishing gradient."""
    measured.given("1", "0.5", "1000", "1", "50")

    def run(S, steps, drive):
        for _ in range(steps):
            S = np.tanh(S + drive)
        return S

    measured.equals("4.5e-4", derivative(lambda S: run(S, 1000, 0.0), 0.5))
    slope = math.log2(
        derivative(lambda S: run(S, 20000, 0.0), 0.5)
        / derivative(lambda S: run(S, 10000, 0.0), 0.5)
    )
    assert abs(slope + 1.5) < 0.01
    S = run(0.0, 100, 1.0)
    J = derivative(lambda S: run(S, 1, 1.0), S)
    measured.equals("0.961", S)
    measured.equals("0.076", J)
    measured.equals("1e-56", J**50)


def test_full_lstm(measured):
    """The gates see X_t only."""
    measured.given("8", "30")
    rng = np.random.default_rng(0)
    n = 32
    largest, largest_simplified = [], []
    for _ in range(8):
        x = 0.3 * rng.normal(size=(30, 4))
        limit = math.sqrt(6 / (4 + 4 * n))  # Glorot's, of Keras's kernel for all four gates
        W = limit * rng.uniform(-1, 1, size=(4, 4 * n))
        # Keras's recurrent kernel has orthogonal rows.
        R = 8 * np.linalg.qr(rng.normal(size=(4 * n, n)))[0].T
        b = np.repeat([0.0, 1, 0, 0], n)  # input, forget, candidate, output
        # One row for each direction of (h, c).
        h, c = np.split(1e-30j * np.eye(2 * n), 2, axis=1)
        for x_t in x:
            i, f, g, o = np.split(x_t @ W + h @ R + b, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        J = np.concatenate([h, c], axis=1).imag.T / 1e-30
        largest.append(np.linalg.norm(J, 2))

        W_f = 8 * math.sqrt(6 / (4 + n)) * rng.uniform(-1, 1, size=(4, n))
        largest_simplified.append(sigmoid(x @ W_f + 1).prod(axis=0).max())
    measured.above("100", np.median(largest))
    measured.below("1", max(largest_simplified))


# The README and the tutorials


def test_each_row_has_its_test():
    tests = [
        thing.__doc__
        for name, thing in globals().items()
        if name.startswith("test_") and "measured" in inspect.signature(thing).parameters
    ]
    assert sorted(tests) == sorted(CLAIMS)
    assert len(tests) == 12


LATEX_POWER = re.compile(r"(?:(\d*\.?\d+)\s*\\cdot\s*)?10\^\{?(-?\d+)\}?")


def numbers_in(text):
    """All numbers, also those written as 4.5 \\cdot 10^{-4} and .30."""
    powers = [float(f"{digits or 1}e{exponent}") for digits, exponent in LATEX_POWER.findall(text)]
    rest = LATEX_POWER.sub(" ", text)
    return powers + [float(n) for n in re.findall(r"\d*\.?\d+(?:e[-+]?\d+)?", rest)]


def section_of_script(script, title):
    """The lines of a section; its heading must be there, once."""
    parts = script.read_text(encoding="utf-8").split("\n# ## ")
    (section,) = [part for part in parts if part.splitlines()[0] == title]
    return section


def outputs_of_section(script, title):
    """What the section's cells print in the notebook; nothing while it has not been made."""
    notebook = FOLDER / "notebooks" / f"{script.stem}.ipynb"
    if not notebook.exists():
        return ""
    within, printed = False, []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for heading in re.findall(r"^## (.*)$", "".join(cell["source"]), re.M):
                within = heading == title
        elif within:
            printed += ["".join(output["text"]) for output in cell["outputs"] if "text" in output]
    return "\n".join(printed)


@pytest.mark.parametrize("claim", CLAIMS)
def test_tutorials_show_the_numbers(claim):
    measured, shown_in = CLAIMS[claim]
    shown, script = [], None
    for place in shown_in.split("; "):
        link = re.match(r"\[(\d)\]\((\w+\.py)\): ", place)
        if link:
            script = FOLDER / link[2]
            assert script.name.startswith(f"0{link[1]}_")
        title = place[link.end() :] if link else place
        shown += numbers_in(section_of_script(script, title))
        shown += numbers_in(outputs_of_section(script, title))
    missing = [n for n in NUMBER.findall(measured) if not np.isclose(float(n), shown, atol=0).any()]
    assert not missing


def test_the_tutorials_are_listed():
    rows = table("#")
    assert [int(row[0]) for row in rows] == [int(script.name[:2]) for script in SCRIPTS]
    for script, (_, link, sentence, time) in zip(SCRIPTS, rows, strict=True):
        text = script.read_text(encoding="utf-8")
        title = re.search(r"^# # (.*)$", text, re.M)[1]
        assert link == f"[{title}]({script.name})"
        assert f"Run time: {time} on two cores." in text.replace("\n# ", " ")
        assert sentence.endswith(".")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (FOLDER / path).exists()
