# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Back-propagation through time, by hand
#
# A recurrent network reads a sequence one *time step* after the other and keeps a *state*, its
# memory. Each of its weights acts on the loss at every time step. Adding all these ways up to get
# the gradient of the loss is *back-propagation through time* (BPTT).
#
# This tutorial computes one such gradient four times: by hand with single numbers, in NumPy, with
# TensorFlow's GradientTape, and with a Keras layer. The four must agree to 12 digits. Then it sorts
# the gradient by the number of steps that it travelled. Run time: 10 seconds on two cores.

# %%
import os

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import kerasgrad as kg

QUICK = os.environ.get("KERASGRAD_QUICK") == "1"  # A short form, for the tests.
keras.utils.set_random_seed(0)
keras.config.set_floatx("float64")  # Double precision: equal numbers agree to 12 digits.

# %% [markdown]
# ## Forward: three steps
#
# With $x_t$ the input, $s_t$ the state and $o_t$ the output at time step $t$, the network is
#
# $$s_t = \tanh(U x_t + W s_{t-1}) \quad (1), \qquad o_t = \mathrm{softmax}(V s_t) \quad (2)$$
#
# $U$, $W$ and $V$ are its weights, the same ones at every step. To compute with a pocket
# calculator, we take one unit and one input: $s_t$, $x_t$, $U$ and $W$ are then plain numbers.
# There are two classes, so $V$ and $o_t$ are two numbers each.

# %%
U, W, V = 0.5, 1.5, np.array([1.0, -2.0])
x_1, x_2, x_3 = 1.0, -0.5, -0.4
s_0 = 0.3
s_1 = np.tanh(U * x_1 + W * s_0)
s_2 = np.tanh(U * x_2 + W * s_1)
s_3 = np.tanh(U * x_3 + W * s_2)
print(f"s_1 = {s_1:.4f}   s_2 = {s_2:.4f}   s_3 = {s_3:.4f}")

# %% [markdown]
# Put into one another, the three lines are one formula. $W$ stands in it three times: that is all
# in which BPTT differs from the chain rule of a feed-forward network.
#
# $$s_3 = \tanh(U x_3 + W \tanh(U x_2 + W \tanh(U x_1 + W s_0)))$$
#
# The loss of a step is the cross-entropy $L_t = -\sum ō_t \log o_t$ of the output $o_t$ and the
# truth $ō_t$, which is 1 for the true class and 0 for the other. The loss of the sequence is
# $L = \sum_t L_t$.


# %%
def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def cross_entropy(ō, o):
    return -(ō * np.log(o)).sum()


assert s_3 == np.tanh(U * x_3 + W * np.tanh(U * x_2 + W * np.tanh(U * x_1 + W * s_0)))
x, s = np.array([x_1, x_2, x_3]), np.array([s_1, s_2, s_3])
ō = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
o = np.array([softmax(V * s_t) for s_t in s])  # (time steps, classes)
print("L_1, L_2, L_3 =", *(round(cross_entropy(*pair), 4) for pair in zip(ō, o, strict=True)))

# %% [markdown]
# Let $z = V s_t$ be what softmax is given. One often reads that $-\sum ō \log o$ has the derivative
# $\partial L/\partial z = o - ō$. In truth it is $(\sum ō)\, o - ō$ with softmax outputs, and
# $-ō\,(1 - o)$ with sigmoid outputs, which is never positive: nothing ever pushes an output down.
# There it is *binary* cross-entropy, $-\sum [ō \log o + (1 - ō) \log(1 - o)]$, that has $o - ō$.
# The judge is *finite differences*: move a number a little to both sides, and divide the change of
# the loss by the change of the number. They know nothing of the chain rule.


# %%
def finite_differences(f, w):
    moves = 1e-6 * np.eye(np.size(w))
    return np.array([(f(w + move) - f(w - move)).item() / 2e-6 for move in moves])


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


z, true, half = V * s_3, ō[2], np.array([0.4, 0.1])
for name, ō_z, o_z, derivative in (
    ("softmax, Σō = 1", true, softmax, softmax(z) - true),
    ("softmax, Σō = ½", half, softmax, softmax(z) / 2 - half),
    ("sigmoid", true, sigmoid, -true * (1 - sigmoid(z))),
):
    measured = finite_differences(lambda z: cross_entropy(ō_z, o_z(z)), z)  # noqa: B023
    print(f"{name}: ∂L/∂z = {measured.round(4) + 0}, o - ō = {(o_z(z) - ō_z).round(4)}")
    assert np.allclose(measured, derivative, atol=1e-9)
other = finite_differences(lambda z: cross_entropy(1 - true, 1 - sigmoid(z)), z)  # Makes it binary.
assert np.allclose(measured + other, sigmoid(z) - true, atol=1e-9)

# %% [markdown]
# **Question.** In how many ways does $W$ act on $L_2$, and in how many on $L = L_1 + L_2 + L_3$?
#
# <details><summary>Answer</summary>
# Two on L_2, through s_2 and through s_1. On L: 1 + 2 + 3 = 6.
# </details>

# %% [markdown]
# ## Backward: two sums
#
# First the loss of step 3 alone. $V$ acts on it once. $U$ and $W$ act at each of the steps
# $k = 1, 2, 3$, and what they do at step $k$ reaches $s_3$ through the steps between:
#
# $$\frac{\partial L_3}{\partial V} = \frac{\partial L_3}{\partial z_3}\, s_3 \tag{3}$$
# $$\frac{\partial L_3}{\partial w} = \sum_{k=1}^{3} \frac{\partial L_3}{\partial s_3}
#   \left(\prod_{j=k+1}^{3} \frac{\partial s_j}{\partial s_{j-1}}\right)
#   \frac{\partial^{+} s_k}{\partial w}, \qquad w = U \;(4), \quad w = W \;(5)$$
#
# Equation 6 has any $t$ in place of 3. The factors $J_j = \partial s_j/\partial s_{j-1}$ are called
# *Jacobians*; since $\tanh' = 1 - \tanh^2$, here $J_j = (1 - s_j^2)\,W$. The plus marks the
# *immediate* derivative, with $s_{k-1}$ held fixed. The total derivative of $s_k$ has the earlier
# steps in it, and the sum over $k$ would count those again.

# %%
dz = o - ō  # ∂L_t/∂z_t of each step
dL_ds = dz @ V  # ∂L_t/∂s_t of each step
J_2, J_3 = (1 - s_2**2) * W, (1 - s_3**2) * W
s_1_W, s_2_W, s_3_W = (1 - s_1**2) * s_0, (1 - s_2**2) * s_1, (1 - s_3**2) * s_2  # ∂⁺s_k/∂W
three = dL_ds[2] * np.array([J_3 * J_2 * s_1_W, J_3 * s_2_W, s_3_W])
print(f"∂L_3/∂W = {' + '.join(f'({term:.4f})' for term in three)} = {three.sum():.4f}")
s_2_all, s_3_all = s_2_W + J_2 * s_1_W, s_3_W + J_3 * (s_2_W + J_2 * s_1_W)  # ds_k/dW
wrong = dL_ds[2] * (J_3 * J_2 * s_1_W + J_3 * s_2_all + s_3_all)
print(f"with total derivatives in it {wrong:.4f}, which is wrong")
assert abs(wrong / three.sum() - 1) > 0.5

# %% [markdown]
# The loss of the whole sequence needs a second sum, over the loss's own step $t$. That makes not
# three terms but six, a triangle:
#
# $$\frac{\partial L}{\partial w} = \sum_{t=1}^{T} \sum_{k=1}^{t} \frac{\partial L_t}{\partial s_t}
#   \left(\prod_{j=k+1}^{t} J_j\right) \frac{\partial^{+} s_k}{\partial w}$$

# %%
J = (1 - s**2) * W
ways = [[dL_ds[t] * np.prod(J[k + 1 : t + 1]) * (k <= t) for k in range(3)] for t in range(3)]
of_U, of_W = ways * ((1 - s**2) * x), ways * np.array([s_1_W, s_2_W, s_3_W])
print("rows t = 1, 2, 3; columns k = 1, 2, 3:", of_W.round(4) + 0, sep="\n")
print(f"∂L/∂W = {of_W.sum():.4f}; the last row alone, equation 5, {of_W[2].sum():.4f}")
by_hand = np.array([of_U.sum(), of_W.sum(), *(dz * s[:, np.newaxis]).sum(axis=0)])
assert np.allclose(of_W[2], three)

# %% [markdown]
# **Question.** The double sum has $T(T+1)/2$ terms. Must BPTT take $T^2$ time?
#
# <details><summary>Answer</summary>
# No: first add up what arrives at s_k from all later steps, and then go one step further back.
# </details>

# %% [markdown]
# ## The same numbers three more times
#
# **NumPy**, for any number of units. Let $\lambda_t = \partial L/\partial s_t$ be all that arrives
# at $s_t$, from its own output and from step $t + 1$, and $\delta_t$ the same before tanh:
#
# $$\lambda_t = V^\top (o_t - ō_t) + W^\top \delta_{t+1}, \qquad
#   \delta_t = (1 - s_t^2) \odot \lambda_t, \qquad \delta_{T+1} = 0$$
# $$\frac{\partial L}{\partial U} = \sum_t \delta_t x_t^\top, \qquad
#   \frac{\partial L}{\partial W} = \sum_t \delta_t s_{t-1}^\top, \qquad
#   \frac{\partial L}{\partial V} = \sum_t (o_t - ō_t)\, s_t^\top$$


# %%
def bptt(x, ō, s_0, U, W, V):
    """The gradients of U, W and V, and λ, for one sequence of column vectors."""
    s = [s_0]
    for x_t in x:
        s.append(np.tanh(U @ x_t + W @ s[-1]))
    dU, dW, dV, δ, λ = 0, 0, 0, 0 * s_0, [None] * len(x)
    for t in reversed(range(len(x))):
        dz = softmax(V @ s[t + 1]) - ō[t]
        λ[t] = V.T @ dz + W.T @ δ
        δ = (1 - s[t + 1] ** 2) * λ[t]
        dU, dW, dV = dU + δ @ x[t].T, dW + δ @ s[t].T, dV + dz @ s[t + 1].T
    return [dU, dW, dV], np.array(λ)


arrays = [x.reshape(3, 1, 1), ō.reshape(3, 2, 1), *(np.reshape(w, (-1, 1)) for w in (s_0, U, W, V))]
by_numpy, λ = bptt(*arrays)

# %%
# GradientTape notes the forward pass, and applies the chain rule to what it noted.
x_tape, ō_tape, s_t, *weights = map(tf.Variable, arrays)
with tf.GradientTape() as tape:
    L = 0.0
    for t in range(3):
        s_t = tf.tanh(weights[0] @ x_tape[t] + weights[1] @ s_t)
        L += tf.nn.softmax_cross_entropy_with_logits(ō_tape[t], weights[2] @ s_t, axis=0)
by_tape = tape.gradient(L, weights)

# %% [markdown]
# **A Keras layer.** Its `kernel` is $U^\top$ and its `recurrent_kernel` $W^\top$, since Keras
# multiplies row vectors from the left. Softmax is in the loss here, which is a mean over examples
# and time steps unless told `reduction="sum"`. `kg.bptt.state_gradients` gives $\lambda_t$, and the
# callback `GradientNorms` records the norm of each gradient that `fit` computes.


# %%
def build(U, W, V):
    x, s_0 = keras.Input((None, U.shape[1])), keras.Input((len(U),))
    layer = kg.layers.SimpleRNN(len(U), use_bias=False, return_sequences=True)
    z = keras.layers.Dense(2, use_bias=False)(layer(x, initial_state=s_0))
    model = keras.Model([x, s_0], z)
    model.set_weights([U.T, W.T, V.T])
    L = keras.losses.CategoricalCrossentropy(from_logits=True, reduction="sum")
    model.compile(keras.optimizers.SGD(1.0), loss=L)
    return model


model = build(*arrays[3:])
batch = [x.reshape(1, 3, 1), arrays[2]], ō[np.newaxis]
assert np.allclose(kg.bptt.state_gradients(model, *batch)["h"][0], λ[..., 0], rtol=1e-12, atol=0)
_, G = kg.bptt.step_contributions(model, *batch, by_lag=True).values()  # For the next section.
norms = kg.callbacks.GradientNorms()
model.fit(*batch, verbose=0, callbacks=[norms])
# A step of SGD with a learning rate of 1 moves each weight by its gradient.
by_layer = [w - moved.T for w, moved in zip(arrays[3:], model.get_weights(), strict=True)]
assert np.allclose(norms.history.norms[0], [np.linalg.norm(g) for g in by_layer], rtol=1e-12)
print("                ∂L/∂U       ∂L/∂W       ∂L/∂V, two classes")
four = {"by hand": by_hand, "NumPy": by_numpy, "GradientTape": by_tape, "Keras layer": by_layer}
for name, gradients in four.items():
    numbers = np.concatenate([np.ravel(gradient) for gradient in gradients])
    print(f"{name:12s}", *(f"{number:11.8f}" for number in numbers))
    assert np.allclose(numbers, by_hand, rtol=1e-12, atol=0)

# %% [markdown]
# **Question.** Of `layer(x)` with `return_sequences=True` a tape can give the gradient of $L$ with
# respect to the outputs $s_1, s_2, s_3$, too. That is not $\lambda_t$. What does it leave out?
#
# <details><summary>Answer</summary>
# The way through the later steps: inside of the layer the tape sees one operation for all steps. It
# gives ∂L_t/∂s_t alone, the first term of λ_t, and 0 at each step whose output no loss looks at.
# </details>

# %% [markdown]
# ## The sum by lag
#
# Sort the six terms by the number of steps that they travelled, the *lag* $\ell = t - k$: the
# diagonals of the triangle. With $G_\ell$ the sum of the terms of lag $\ell$,
# $\partial L/\partial W = \sum_\ell G_\ell$. `kg.bptt.step_contributions` computes $G_\ell$ for
# any Keras recurrent layer, and `horizon(0.9)` the lag within which 90 % of
# $\sum_\ell \lVert G_\ell \rVert$ lie: how far back the layer learns from.

# %%
assert np.allclose(G.ravel(), [np.trace(of_W, -lag) for lag in range(3)], rtol=1e-12)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
left.bar(["$G_0$", "$G_1$", "$G_2$"], G.ravel(), color="#0072B2")
left.bar("their sum, ∂L/∂W", G.sum(), color="grey")
left.set_ylabel("share in ∂L/∂W, one unit, T = 3")

units, T = (8, 20) if QUICK else (32, 50)  # W is an orthogonal matrix Q times a number.
rng = np.random.default_rng(0)
x, ō = rng.normal(size=(16, T, 2)), np.eye(2)[rng.integers(2, size=(16, T))]
U, V = rng.normal(size=(units, 2)) / 2, rng.normal(size=(2, units))
Q, _ = np.linalg.qr(rng.normal(size=(units, units)))
horizons = []
for gain, color, width in ((1.4, "#E69F00", 0.9), (0.8, "#0072B2", 0.5)):
    model = build(U, gain * Q, V)
    shares = kg.bptt.step_contributions(model, [x, np.zeros((16, units))], ō, by_lag=True)
    path = model.layers[2].cell.recurrent_kernel.path
    horizons.append(shares.horizon(0.9)[path])
    label = f"W = {gain} Q: 90 % within lag {horizons[-1]}"
    right.bar(range(T), shares.norms[path], width, color=color, label=label)
right.set(yscale="log", xlabel="lag ℓ in time steps", ylabel=f"‖$G_ℓ$‖, {units} units, T = {T}")
right.margins(y=0.25)
right.legend()
plt.show()
assert horizons[0] >= 2 * horizons[1]

# %% [markdown]
# **Question.** Why do the bars fall by about the same factor from lag to lag, and why is there none
# at lag 49?
#
# <details><summary>Answer</summary>
# Each step back multiplies by one more Jacobian of about the same size: the next tutorial is about
# that size. Lag 49 is the way from step 50 to step 1, where W multiplies s_0, which is 0 here.
# </details>
