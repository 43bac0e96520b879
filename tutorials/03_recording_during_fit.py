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
# by a single bit. This tutorial adds it to a training, reads what it recorded, draws it, and lets
# `diagnose` say in words what is wrong. Run time: 20 seconds on two cores.

# %%
import os
import tempfile
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

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
# The model is the simplest recurrent network, $s_t = \tanh(U x_t + W s_{t-1} + b)$, and a linear
# output. `kg.layers.SimpleRNN` is a drop-in for `keras.layers.SimpleRNN` that also lets
# $\partial L/\partial s_t$ be recorded in each step; the callback works with any layer.


# %%
def build(layer):
    model = keras.Sequential([keras.Input((T, 2)), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05, clipnorm=1.0), loss="mse")
    return model


model = build(kg.layers.SimpleRNN(32))
norms = kg.callbacks.GradientNorms()
epochs = model.fit(task.x, task.y, batch_size=32, epochs=4, verbose=0, callbacks=[norms])
history = norms.history
print(history)
assert len(history) == 4 * len(task.x) // 32

# %% [markdown]
# **Question.** Four epochs of 100 batches give 400 rows. Would `every=10` make the training faster?
#
# <details><summary>Answer</summary>
# Hardly: the norms are computed in the train step's own graph, and cost little beside it. It makes
# the record ten times smaller.
# </details>

# %% [markdown]
# ## What the columns mean
#
# One row is one optimizer step (n of them), and one column of `norms` is one weight (W of them).
#
# | column | shape | what it is |
# | --- | --- | --- |
# | `step`, `epoch` | (n,) | the optimizer's count when the gradient arrived, from 0; the epoch |
# | `loss` | (n,) | this batch's own loss, before the update |
# | `norms` | (n, W) | norm of each weight's gradient, **before** clipping |
# | `applied_norms` | (n, W) | the same **after** clipping: what the update rule received |
# | `global_norm`, `applied_global_norm` | (n,) | of all weights together |
# | `clipped`, `clip_factor` | (n,) | did clipping change the step; the smallest factor |
# | `updated`, `missing` | (n,), (n, W) | was there an update; had a weight no gradient at all |
# | `state_norms` | {layer: (n, T)} | norm of $\partial L/\partial s_t$, mean over the batch |

# %%
for i, path in enumerate(history.weights):
    first, last = history.norms[0, i], history.norms[-1, i]
    print(f"{path:55s} first step {first:7.4f}   last step {last:7.4f}")
assert np.allclose(history.global_norm, np.sqrt((history.norms**2).sum(axis=1)), rtol=1e-6)
assert history.updated.all() and not history.missing.any()

# %% [markdown]
# Before and after clipping are both measured, on the gradients that went in and on those that came
# out. With `clipnorm=1.0`, Keras scales a weight's gradient down to a norm of 1 if it is longer:
#
# $$\hat g_w = g_w \cdot \min\left(1, \frac{1}{\lVert g_w \rVert}\right)$$

# %%
expected = np.minimum(history.norms, 1.0)
print(f"clipped: {history.clip_rate:.1%} of the updates")
print(f"largest difference from the formula: {np.abs(history.applied_norms - expected).max():.1e}")
assert np.allclose(history.applied_norms, expected, rtol=1e-5)
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
# $\partial s_t / \partial s_{t-1} = \operatorname{diag}(\tanh'(a_t))\, W$, one such matrix for each
# step back (tutorials 1 and 2). `history.reach` is the norm at the first time step over that at the
# last.

# %%
(layer,) = history.state_norms
print(f"{layer}: {history.state_norms[layer].shape} = (optimizer steps, time steps)")
reach = np.median(history.reach[layer])
print(f"of the gradient at the last time step, {reach:.1e} reaches the first")
assert reach < 1e-3

# %% [markdown]
# For layers that are not kerasgrad's, give the callback a *probe*: a batch that stays the same, on
# which $\partial L/\partial s_t$ is computed at each epoch's end. Here it looks at Keras's LSTM,
# which has two states: its output `h`, and `c`, the content of its cell. kerasgrad's simplified
# LSTM, $S_t = f_t \odot S_{t-1} + i_t \odot W_c x_t$, has the Jacobian
# $\operatorname{diag}(f_t)$: a *forget gate* $f_t$ near 1 passes the gradient on. Its bias decides
# how near it is. Keras starts with a bias of 1; the simplified LSTM gets 4 here.

# %%
lstm_norms = kg.callbacks.GradientNorms(probe=(task.x[:32], task.y[:32]))
lstm = build(keras.layers.LSTM(32))
lstm.fit(task.x, task.y, batch_size=32, epochs=2, verbose=0, callbacks=[lstm_norms])
of_h, of_c = lstm_norms.history.probe_state_norms
print(f"{of_c}: {lstm_norms.history.probe_state_norms[of_c].shape} = (probes, time steps)")

gated_norms = kg.callbacks.GradientNorms()
gated = build(kg.layers.SimplifiedLSTM(32, project_input=True, forget_bias=4.0))
gated.fit(task.x, task.y, batch_size=32, epochs=2, verbose=0, callbacks=[gated_norms])
(gated_layer,) = gated_norms.history.state_norms
gated_reach = np.median(gated_norms.history.reach[gated_layer])
print(f"simplified LSTM: {gated_reach:.1e} reaches the first step")
assert gated_reach > 0.1

ax = kg.plots.plot_state_norms(history, label="tanh SimpleRNN")
kg.plots.plot_state_norms(
    lstm_norms.history, ax, layer=of_c, label="LSTM, c (probe), forget bias 1", ls=":", c="#009E73"
)
kg.plots.plot_state_norms(
    gated_norms.history, ax, label="simplified LSTM, forget bias 4", ls="--", c="#D55E00"
)
plt.show()

# %% [markdown]
# **Question.** On a log scale the line of the tanh network is nearly straight. Why?
#
# <details><summary>Answer</summary>
# Each step back multiplies by a matrix of about the same size, so the norm is about c·q^(T - t),
# whose logarithm is linear in t. Here q is below 1: the gradient vanishes.
# </details>

# %% [markdown]
# ## How far an update moves the weights
#
# Once an epoch, the callback also measures how far an update moves each weight,
# $\lVert \Delta w \rVert$, beside $\lVert w \rVert$. For plain SGD it is the learning rate times
# the gradient after clipping. A ratio of about 1e-3 is a rule of thumb (Karpathy, cs231n).

# %%
rows = np.searchsorted(history.step, history.update_step)
assert np.allclose(history.update_norms, 0.05 * history.applied_norms[rows], rtol=1e-3)
for i, path in enumerate(history.weights):
    if "bias" not in path:  # A bias starts at 0.
        ratios = history.update_norms[:, i] / history.weight_norms[:, i]
        print(f"{path:55s}", *(f"{ratio:8.4f}" for ratio in ratios))
assert round(history.update_norms[0, 1] / history.weight_norms[0, 1], 4) == 0.0088

# %% [markdown]
# **Question.** The recurrent kernel's first ratio is 0.0088. Where does this number come from?
#
# <details><summary>Answer</summary>
# Its gradient was longer than 1 and cut to 1, so the update is 0.05 long. At the start the kernel
# is orthogonal, with a norm of √32 = 5.66. 0.05/5.66 = 0.0088.
# </details>

# %% [markdown]
# ## What is wrong, in words
#
# `diagnose` reads a record and says what it finds: since when, where, the measured number with the
# threshold behind it, and code that mends it. With `model=`, `x=` and `y=` it looks into the model,
# too: dead units, saturated activations, forget biases.

# %%
findings = kg.diagnose(history)
print(findings)
kg.plots.plot_diagnosis(history, findings)
plt.show()
assert "vanishing_through_time" in [finding.kind for finding in findings]

# %% [markdown]
# **Question.** Clipping was on. Why did it not help?
#
# <details><summary>Answer</summary>
# It shortens gradients that are too long. What has vanished on its way back, it cannot bring back.
# </details>

# %% [markdown]
# ## In the logs, in TensorBoard, in a file
#
# Each epoch's logs have three more entries, so everything that reads Keras's logs sees them:
# `History`, `CSVLogger`, experiment trackers. A callback that watches one of them, here
# `EarlyStopping`, must stand after `GradientNorms` in the list.

# %%
for name in ("loss", "grad_norm", "grad_norm_max", "grad_clip_rate"):
    print(f"{name:15s}", *(f"{value:8.4f}" for value in epochs.history[name]))
per_epoch = history.global_norm.reshape(4, -1)
assert np.allclose(epochs.history["grad_norm"], per_epoch.mean(axis=1), rtol=1e-5)
assert np.allclose(epochs.history["grad_norm_max"], per_epoch.max(axis=1), rtol=1e-5)

stop = keras.callbacks.EarlyStopping(monitor="grad_norm", mode="min", min_delta=0.05)
again = kg.callbacks.GradientNorms()
model.fit(task.x, task.y, batch_size=32, epochs=10, verbose=0, callbacks=[again, stop])
print(f"stopped after {again.history.epoch[-1] + 1} epochs of at most 10")
assert again.history.epoch[-1] + 1 < 10

# %% [markdown]
# `log_dir` writes the norms for TensorBoard as they come, and `csv` a table. To look at the first:
# `tensorboard --logdir logs`, or in a notebook `%load_ext tensorboard` and then
# `%tensorboard --logdir logs`. The record itself is saved by `history.save`, and
# `history.to_dataframe()` makes a pandas table of it.

# %%
with tempfile.TemporaryDirectory() as folder:
    logged = kg.callbacks.GradientNorms(log_dir=f"{folder}/logs", csv=f"{folder}/run.csv")
    model.fit(task.x, task.y, batch_size=32, epochs=1, verbose=0, callbacks=[logged])
    (events,) = Path(folder, "logs").rglob("*tfevents*")
    records = tf.data.TFRecordDataset(str(events)).as_numpy_iterator()
    written = [value for r in records for value in tf.compat.v1.Event.FromString(r).summary.value]
    print("TensorBoard:", *sorted({value.tag for value in written}), sep="\n    ")
    table = Path(folder, "run.csv").read_text().splitlines()
    print(f"CSV, {len(table) - 1} rows:\n    {table[0][:74]}...")

    logged.history.save(f"{folder}/run.npz")
    kept = kg.GradientHistory.load(f"{folder}/run.npz")
    assert np.array_equal(kept.norms, logged.history.norms)

# %% [markdown]
# **Question.** The training of a night is killed at 5 o'clock. Which of the three files are there?
#
# <details><summary>Answer</summary>
# The CSV file and TensorBoard's, up to the last finished step. The other is written at the end.
# </details>

# %% [markdown]
# ## On your own model, in five lines
#
# ```python
# import kerasgrad as kg
#
# norms = kg.callbacks.GradientNorms()
# model.fit(x, y, callbacks=[norms])
# print(kg.diagnose(norms.history, model=model, x=x[:256], y=y[:256]))
# kg.plots.plot_norms(norms.history)
# ```
