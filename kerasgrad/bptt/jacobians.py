"""The Jacobians ∂s_t/∂s_{t-1} of a recurrent layer, and what their product does to a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from kerasgrad.bptt.gradients import Layer, fit
from kerasgrad.bptt.unrolled import Steps, record

# What one piece of consecutive Jacobians may take, in entries.
_PIECE = 2**23
# Jacobi's method takes five to ten.
_SWEEPS = 40


def state_jacobians(
    model: keras.Model | keras.layers.Layer, x: Any, layer: Layer = None
) -> np.ndarray:
    """∂s_t/∂s_{t-1} of a recurrent layer at each step of each example.

        J_t[i, j] = ∂s_t[i] / ∂s_{t-1}[j],    for the simple cell J_t = diag(Φ'(a_t)) W

    A layer with several states has them one after the other, in the order of
    `kerasgrad.bptt.states`: h and then c of an LSTM. Where the mask leaves out a step, J_t is the
    identity.

    Args:
        model: a Keras model, or a recurrent layer.
        x: a batch of the model's input (of the layer's, where a layer is given).
        layer: the name or path of the recurrent layer, or the layer; None for the only one.

    Returns:
        (batch, timesteps, n, n), n the units of all states: batch · timesteps · n² numbers.

    Raises:
        ValueError: for a model that has no recurrent layer, several and none named, or calls it
            more than once.

    Example:

    >>> import keras, numpy as np
    >>> from kerasgrad import bptt
    >>> layer = keras.layers.SimpleRNN(
    ...     2, activation="linear", recurrent_initializer=keras.initializers.Identity(0.5)
    ... )
    >>> bptt.state_jacobians(layer, np.ones((1, 3, 1)))[0, 2].tolist()
    [[0.5, 0.0], [0.0, 0.5]]

    Source: the article's equation 7; Pascanu, Mikolov and Bengio (2013), equation 5.
    """
    steps, _ = record(model, x, layer)
    return np.concatenate(list(_pieces(steps)), axis=1)


def lyapunov_exponents(
    model: keras.Model | keras.layers.Layer, x: Any, layer: Layer = None, *, burn_in: int = 0
) -> np.ndarray:
    """The Lyapunov exponents of a recurrent layer driven by x, by the QR method.

        J_t Q_{t-1} = Q_t R_t,    λ_i = mean over t of ln |R_t[i, i]|

    The largest is the rate at which a gradient grows (λ > 0) or vanishes (λ < 0) on its way back,
    in nats a step. Q_0 is a random orthogonal matrix, always the same.

    Args:
        model, x, layer: as in `state_jacobians`.
        burn_in: steps at the start that turn Q towards the directions that grow, and do not count.

    Returns:
        (n,) descending, nats a time step, the mean over the batch; -Inf for a direction of which a
        singular Jacobian (a ReLU that is off) leaves nothing but rounding.

    Raises:
        ValueError: as in `state_jacobians`, and when burn_in leaves no step.

    Example:

    >>> import keras, numpy as np
    >>> from kerasgrad import bptt
    >>> layer = keras.layers.SimpleRNN(
    ...     2, activation="linear", recurrent_initializer=keras.initializers.Identity(0.5)
    ... )
    >>> bptt.lyapunov_exponents(layer, np.ones((1, 9, 1))).round(4).tolist()
    [-0.6931, -0.6931]

    Source: Engelken, Wolf and Abbott (2023), "Lyapunov spectra of chaotic recurrent neural
    networks", section II; Vogt, Puelma Touzel, Shlizerman and Lajoie (2022), "On Lyapunov
    exponents for RNNs".
    """
    steps, _ = record(model, x, layer)
    if not 0 <= burn_in < len(steps):
        raise ValueError(
            f"burn_in must be at least 0 and below the {len(steps)} time steps. "
            f"Received: {burn_in!r}."
        )
    Q, total = None, 0.0
    for t, J in enumerate(_each(steps)):
        Q = _start(J) if Q is None else Q
        Q, R = _qr(J, Q)
        if t >= burn_in:
            with np.errstate(divide="ignore"):
                total += np.log(np.abs(np.diagonal(R, axis1=1, axis2=2)))
    return np.sort((total / (len(steps) - burn_in)).mean(axis=0))[::-1]


class JacobianSpectrum(NamedTuple):
    """Singular values of J_t···J_1, as natural logarithms.

    - steps: (k,) int, the t of each
    - log_singular_values: (batch, k, n), descending; -Inf where a singular Jacobian (a ReLU that
      is off) has left nothing but rounding
    """

    steps: np.ndarray
    log_singular_values: np.ndarray


def jacobian_spectrum(
    model: keras.Model | keras.layers.Layer,
    x: Any,
    layer: Layer = None,
    *,
    steps: Sequence[int] | None = None,
) -> JacobianSpectrum:
    """The singular values of ∂s_t/∂s_0 of a recurrent layer, in logs: none underflows.

        ∂s_t/∂s_0 = J_t···J_1 = U diag(σ) Vᵀ

    ln σ_1/t is what a gradient can keep at most of itself, by step; the spread of the σ says over
    how many directions. The product is kept as Q diag(e^d) N, with Q orthogonal, rows of N of
    length 1 and d a logarithm, by one QR step a time step; one-sided Jacobi rotations then find the
    singular values of diag(e^d) N, small ones as exactly as large ones.

    Args:
        model, x, layer: as in `state_jacobians`.
        steps: at which t, each from 1 to T; about ten of them, evenly on a log scale, by default.

    Raises:
        ValueError: as in `state_jacobians`, and for steps outside of 1..T.

    Example:

    >>> import keras, numpy as np
    >>> from kerasgrad import bptt
    >>> layer = keras.layers.SimpleRNN(
    ...     2, activation="linear", recurrent_initializer=keras.initializers.Identity(0.5)
    ... )
    >>> spectrum = bptt.jacobian_spectrum(layer, np.ones((1, 2000, 1)), steps=[2000])
    >>> (spectrum.log_singular_values / np.log(0.5)).round(6).tolist()
    [[[2000.0, 2000.0]]]

    Source: Stewart (1997), "On graded QR decompositions of products of matrices"; Demmel and
    Veselić (1992), "Jacobi's method is more accurate than QR".
    """
    recorded, _ = record(model, x, layer)
    T = len(recorded)
    if steps is None:
        steps = np.unique(np.geomspace(1, T, num=10).round().astype(int))
    steps = np.asarray(steps)
    if not (steps.ndim == 1 and len(steps) and ((steps >= 1) & (steps <= T)).all()):
        raise ValueError(f"steps must be numbers from 1 to {T}. Received: {steps.tolist()!r}.")
    Q, kept = None, {}
    for t, J in enumerate(_each(recorded), 1):
        if Q is None:
            Q = _start(J)
            N = np.swapaxes(Q, 1, 2)
            d = np.zeros(J.shape[:2])
        Q, R = _qr(J, Q)
        d, N = _times(R, d, N)
        if t in steps:
            kept[t] = _log_singular_values(d, N)
    return JacobianSpectrum(steps, np.stack([kept[t] for t in steps.tolist()], axis=1))


def _pieces(steps: Steps) -> Iterator[np.ndarray]:
    """The Jacobians of consecutive steps, (batch, steps in this piece, n, n)."""
    B, n = len(steps.inputs[0]), sum(int(np.prod(s.shape[1:])) for s in steps.before[0])
    width = max(1, _PIECE // (B * n * n))
    for start in range(0, len(steps), width):
        piece = slice(start, start + width)
        inputs = tf.concat(steps.inputs[piece], axis=0)
        before = [tf.concat(s, axis=0) for s in zip(*steps.before[piece], strict=True)]
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(before)
            _, after = steps.run(inputs, before, [])
            if steps.mask is not None:
                mask = tf.reshape(tf.transpose(steps.mask[:, piece]), [-1])
                after = [tf.where(fit(mask, a), a, b) for a, b in zip(after, before, strict=True)]
            after = _flat(after)
        # Row i for all examples and steps at once: each is one row of the cell's batch.
        rows = []
        for i in range(n):
            direction = tf.one_hot(tf.fill([after.shape[0]], i), n, dtype=after.dtype)
            rows.append(_flat(tape.gradient(after, before, direction, "zero")))
        J = np.stack([np.asarray(row) for row in rows], axis=1)
        yield np.moveaxis(J.reshape(-1, B, n, n), 0, 1)


def _each(steps):
    """J_t, (batch, n, n) in float64, for t = 1..T."""
    for piece in _pieces(steps):
        yield from np.moveaxis(piece, 1, 0).astype(np.float64)


def _flat(states):
    return tf.concat([tf.reshape(s, [s.shape[0], -1]) for s in states], axis=1)


def _qr(J, Q):
    """Q' and R of J Q = Q' R, with rows of R that are nothing but rounding as zeros."""
    # TensorFlow's, since NumPy's threads get in each other's way with many small matrices.
    Q, R = (np.asarray(factor) for factor in tf.linalg.qr(tf.matmul(J, Q)))
    rows = np.linalg.norm(R, axis=2)
    rounding = np.finfo(R.dtype).eps * R.shape[-1] * np.linalg.norm(rows, axis=1)
    return Q, np.where((rows < rounding[:, np.newaxis])[..., np.newaxis], 0, R)


def _start(J):
    """Orthogonal matrices that favour no direction, so that the largest growth comes first."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=J.shape[1:]))
    return np.broadcast_to(Q, J.shape)


def _times(R, d, N):
    """R diag(e^d) N as diag(e^d') N', with rows of N' of length 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.abs(R)) + d[:, np.newaxis, :]
        largest = logs.max(axis=2)
        N = np.asarray(tf.matmul(np.sign(R) * np.exp(logs - largest[..., np.newaxis]), N))
    return _with_rows_of_length_1(largest, N)


def _with_rows_of_length_1(d, N):
    """diag(e^d) N with the lengths of N's rows moved into d; a row of zeros has d = -Inf."""
    length = np.linalg.norm(N, axis=-1)
    zero = (d == -np.inf) | (length == 0)
    length = np.where(zero, 1, length)
    return (
        np.where(zero, -np.inf, d + np.log(length)),
        np.where(zero[..., np.newaxis], 0, N / length[..., np.newaxis]),
    )


def _log_singular_values(d, N):
    """ln of the singular values of diag(e^d) N, (batch, n) descending: one-sided Jacobi rotations.

    Rows a = e^{d_i} u and b = e^{d_j} v with |a| >= |b| are made orthogonal by

        u' = u + r² τ v,    v' = v - τ u,    both times 1/√(1 + r² τ²),    r = e^{d_j - d_i}

    τ = 2c / (1 - r² + √((1 - r²)² + 4 r² c²)), c = uᵀv: no step leaves the range of floats,
    whatever d.
    """
    d, N = d.copy(), N.copy()
    n = d.shape[1]
    batch = np.arange(len(d))[:, np.newaxis]
    for _ in range(_SWEEPS):
        worst = 0.0
        for first, second in _disjoint_pairs(n):
            swap = d[:, first] < d[:, second]
            i, j = np.where(swap, second, first), np.where(swap, first, second)
            d_i, d_j = d[batch, i], d[batch, j]
            u, v = N[batch, i], N[batch, j]
            c = np.einsum("bpn,bpn->bp", u, v)
            with np.errstate(invalid="ignore"):
                r = np.where(np.isfinite(d_j), np.exp(d_j - d_i), 0)
            worst = max(worst, np.abs(c).max(initial=0))
            root = np.hypot(1 - r**2, 2 * r * c)
            below = 1 - r**2 + root
            τ = np.where(below > 0, 2 * c / np.where(below > 0, below, 1), 0)
            scale = 0.5 * np.log1p((r * τ) ** 2)
            r, τ = r[..., np.newaxis], τ[..., np.newaxis]
            d[batch, i], N[batch, i] = _with_rows_of_length_1(d_i - scale, u + r**2 * τ * v)
            d[batch, j], N[batch, j] = _with_rows_of_length_1(d_j - scale, v - τ * u)
        if worst < 1e-10:
            break
    return np.sort(d, axis=1)[:, ::-1]


def _disjoint_pairs(n):
    """Rounds of a round-robin tournament: each pair of 0..n-1 once, in each round nobody twice."""
    players = list(range(n + n % 2))
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = [
            (a, b)
            for a, b in zip(players[:half], reversed(players[half:]), strict=True)
            if max(a, b) < n
        ]
        if pairs:
            yield np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
        players = [players[0], players[-1], *players[1:-1]]
