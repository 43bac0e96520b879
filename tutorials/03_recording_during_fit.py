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
# # Recording gradient norms during `fit`
#
# A recurrent network is trained with `model.fit` and does not learn. Its loss says *that*, not
# *why*. The gradient says why: it may be enormous, or it may never reach the early time steps.
#
# `GradientNorms` is a callback that records, for every optimizer step, the norm of each weight's
# gradient. The gradients are the ones that `fit` computed anyway, so the training does not change
# by a single bit. This tutorial adds it to a training, reads what it recorded, and draws it. Run
# time: under a minute on two cores.

# %%
import os

import keras
import matplotlib.pyplot as plt
import numpy as np

import kerasgrad as kg

QUICK = os.environ.get("KERASGRAD_QUICK") == "1"  # A short form, for the tests.
keras.utils.set_random_seed(0)

# %% [markdown]
# ## A problem with a long memory
#
# The adding problem: a sequence of $T$ steps, with two numbers at each. The first is random,
# between 0 and 1. The second is 1 at two of the steps, and 0 elsewhere. Wanted is the sum of the
# two random numbers that are marked.
#
# Whoever ignores the input answers 1, the mean of that sum. The error of that answer is the
# variance of a sum of two uniform numbers, $2 \cdot 1/12 = 1/6$. A network that has learned
# nothing about the past stays at 1/6.

# %%
T = 50
task = kg.tasks.adding_problem(samples=640 if QUICK else 3200, timesteps=T, seed=0)
print(f"x {task.x.shape}, y {task.y.shape}, error of a constant answer {task.constant_loss:.4f}")
assert abs(np.var(task.y) - 1 / 6) < 0.02

# %% [markdown]
# ## One callback
#
# The model is the simplest recurrent network, $s_t = \tanh(U x_t + W s_{t-1} + b)$, and a linear
# output. `kg.layers.SimpleRNN` is a drop-in for `keras.layers.SimpleRNN` that also lets
# $\partial L/\partial s_t$ be recorded; the callback works with any layer.


# %%
def build(layer, **optimizer_arguments):
    model = keras.Sequential([keras.layers.Input((T, 2)), layer, keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.05, **optimizer_arguments)
    model.compile(optimizer, loss="mse")
    return model


model = build(kg.layers.SimpleRNN(32), clipnorm=1.0)
norms = kg.callbacks.GradientNorms()
epochs = model.fit(task.x, task.y, batch_size=32, epochs=4, verbose=0, callbacks=[norms])
history = norms.history
print(history)
assert len(history) == 4 * len(task.x) // 32

# %% [markdown]
# ## What was recorded
#
# One row for each optimizer step, one column for each weight.

# %%
for i, path in enumerate(history.weights):
    first, last = history.norms[0, i], history.norms[-1, i]
    print(f"{path:55s} first step {first:7.4f}   last step {last:7.4f}")

# %% [markdown]
# `history.norms` is **before** clipping and `history.applied_norms` **after** it. Both are
# measured, on the gradients that went into clipping and on those that came out. With
# `clipnorm=1.0`, Keras scales each weight's gradient down to a norm of 1 if it is longer:
#
# $$\hat g_w = g_w \cdot \min\left(1, \frac{1}{\lVert g_w \rVert}\right)$$

# %%
expected = np.minimum(history.norms, 1.0)
print(f"clipped: {history.clip_rate:.1%} of the updates")
print(f"largest difference from the formula: {np.abs(history.applied_norms - expected).max():.1e}")
assert np.allclose(history.applied_norms, expected, rtol=1e-5)

# %% [markdown]
# `history.global_norm` is the norm of all gradients together, the root of the sum of the squares
# of a row, and `history.loss` is each batch's own loss (Keras's progress bar shows a running mean).

# %%
assert np.allclose(history.global_norm, np.sqrt((history.norms**2).sum(axis=1)), rtol=1e-6)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
kg.plots.plot_loss(history, left, average=5)
left.axhline(task.constant_loss, color="grey", lw=0.8)
kg.plots.plot_norms(history, right)
plt.show()

# %% [markdown]
# **Question.** The loss stays near 1/6 (the grey line), yet the gradient is not small. What, then,
# is missing?
#
# <details><summary>Answer</summary>
# The norm of the whole gradient says nothing about which time steps it comes from. The next
# section looks at that.
# </details>

# %% [markdown]
# ## Which time steps the gradient reaches
#
# By the chain rule, $\partial L/\partial s_{t-1}$ is $\partial L/\partial s_t$ times the Jacobian
# $\partial s_t / \partial s_{t-1} = \operatorname{diag}(\tanh'(a_t))\, W$, so it is multiplied by
# one such matrix for each step back. `history.state_norms` has the norm of
# $\partial L/\partial s_t$ for every time step $t$ (mean over the batch), at every optimizer step.

# %%
(layer,) = history.state_norms
print(f"{layer}: {history.state_norms[layer].shape} = (optimizer steps, time steps)")
reach = np.median(history.reach[layer])
print(f"of the gradient at the last time step, {reach:.1e} reaches the first")

# %% [markdown]
# A cell with gates can hold that gradient up: in the simplified LSTM,
# $S_t = f_t \odot S_{t-1} + i_t \odot W_c x_t$, the Jacobian is $\operatorname{diag}(f_t)$, and a
# forget gate near 1 passes the gradient on.

# %%
gated_model = build(kg.layers.SimplifiedLSTM(32, project_input=True, forget_bias=4.0), clipnorm=1.0)
gated_norms = kg.callbacks.GradientNorms()
gated_model.fit(task.x, task.y, batch_size=32, epochs=4, verbose=0, callbacks=[gated_norms])
gated = gated_norms.history
(gated_layer,) = gated.state_norms
gated_reach = np.median(gated.reach[gated_layer])
print(f"simplified LSTM: {gated_reach:.1e}")
assert gated_reach > 10 * reach

ax = kg.plots.plot_state_norms(history, label="tanh SimpleRNN")
kg.plots.plot_state_norms(gated, ax, label="simplified LSTM", ls="--")
plt.show()

# %% [markdown]
# **Question.** On a log scale the line of the tanh network is nearly straight. Why?
#
# <details><summary>Answer</summary>
# Each step back multiplies by a matrix of about the same size, so the norm is about
# $c \cdot q^{T-t}$, whose logarithm is linear in $t$. The slope is $\log q$, with $q$ below 1 here:
# the gradient vanishes.
# </details>

# %% [markdown]
# ## What is wrong, in words
#
# `diagnose` reads a record and says what it finds, with the numbers and the threshold behind it.

# %%
for finding in kg.diagnose(history):
    print(finding)
    print("    try:", finding.advice)

# %% [markdown]
# ## In the logs
#
# Each epoch's logs have three more entries, so everything that reads Keras's logs sees them:
# `History`, `CSVLogger`, experiment trackers. A callback that watches one of them must stand after
# `GradientNorms` in the list.

# %%
for name in ("loss", "grad_norm", "grad_norm_max", "grad_clip_rate"):
    print(f"{name:15s}", *(f"{value:8.4f}" for value in epochs.history[name]))
per_epoch = history.global_norm.reshape(4, -1)
assert np.allclose(epochs.history["grad_norm"], per_epoch.mean(axis=1), rtol=1e-5)
assert np.allclose(epochs.history["grad_norm_max"], per_epoch.max(axis=1), rtol=1e-5)

# %%
stop = keras.callbacks.EarlyStopping(monitor="grad_norm", mode="min", min_delta=0.05)
again = kg.callbacks.GradientNorms()
model.fit(task.x, task.y, batch_size=32, epochs=10, verbose=0, callbacks=[again, stop])
print(f"stopped after {again.history.epoch[-1] + 1} epochs of at most 10")

# %% [markdown]
# ## Keeping the record

# %%
history.save("run.npz")
kept = kg.GradientHistory.load("run.npz")
assert np.array_equal(kept.norms, history.norms)
os.remove("run.npz")

# %% [markdown]
# ## On your own model, in five lines
#
# ```python
# import kerasgrad as kg
#
# norms = kg.callbacks.GradientNorms()
# model.fit(x, y, callbacks=[norms])
# print(*kg.diagnose(norms.history), sep="\n")
# kg.plots.plot_norms(norms.history)
# ```
