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
# # Clipping: what a threshold mends
#
# Where gradients explode, one step of the optimizer can throw away all that was learned. The cure
# is old and short: if a gradient is longer than a threshold, make it shorter. This tutorial looks
# at the place where it happens, lets the three clippings of Keras walk there, chooses a threshold
# from recorded norms, and ends with what no threshold can do. Run time: 40 seconds on two cores.

# %%
import os
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np

import kerasgrad as kg

QUICK = os.environ.get("KERASGRAD_QUICK") == "1"  # A short form, for the tests.
keras.config.set_floatx("float64")  # On a cliff, rounding decides where a walk goes.

# %% [markdown]
# ## The cliff
#
# The smallest recurrent network has one unit, no input, and two parameters, $w$ and $b$. Pascanu,
# Mikolov and Bengio (2013, figure 6) ask it to be at 0.7 after 50 steps:
#
# $$x_t = w\,\sigma(x_{t-1}) + b, \qquad x_0 = \tfrac12, \qquad E = (\sigma(x_{50}) - 0.7)^2$$
#
# With the state $s_t = \sigma(x_t)$ this is a sigmoid layer, $s_t = \sigma(w s_{t-1} + b)$. In
# NumPy, for many $(w, b)$ at once, the derivatives carried along from step to step:


# %%
def error_and_gradient(w, b):
    """E, and (∂E/∂w, ∂E/∂b)."""
    s, ds_dw, ds_db = S_0 + 0 * w, 0 * w, 0 * w
    for _ in range(50):
        ds_dw, ds_db = s + w * ds_dw, 1 + w * ds_db
        s = 1 / (1 + np.exp(-w * s - b))
        ds_dw, ds_db = s * (1 - s) * ds_dw, s * (1 - s) * ds_db
    return (s - 0.7) ** 2, 2 * (s - 0.7) * np.stack([ds_dw, ds_db])


S_0 = 1 / (1 + np.exp(-0.5))  # σ(x_0)
figure = plt.figure(figsize=(10, 4.2), layout="constrained")
surface = figure.add_subplot(1, 2, 1, projection="3d")
w, b = np.meshgrid(np.linspace(3.5, 6, 251), np.linspace(-4, -1.5, 251))
surface.plot_surface(w, b, error_and_gradient(w, b)[0], cmap="cividis", rcount=120, ccount=120)
surface.set(xlabel="w", ylabel="b", zlabel="error E")
surface.view_init(elev=35, azim=160)
slices = figure.add_subplot(1, 2, 2)
b = np.linspace(-4, -1.5, 20001)
for w, color, ls in ((3.5, "#0072B2", "-"), (4.5, "#D55E00", "--")):
    norm = np.linalg.norm(error_and_gradient(w, b)[1], axis=0)
    slices.plot(b, norm, color=color, ls=ls, label=f"w = {w}: at most {norm.max():.3g}")
slices.set(xlabel="b", ylabel="norm of the gradient (∂E/∂w, ∂E/∂b)", yscale="log")
slices.legend()
plt.show()
wall = np.ptp(b[norm > 1])
print(f"w = 4.5: gradients above 1 on a strip {wall:.4f} wide, median of all {np.median(norm):.2f}")
print(f"products of 50 Jacobians: at most {(3.5 / 4) ** 50:.4f} and {(4.5 / 4) ** 50:.0f}")
assert 150 < norm.max() < 165 and 0.008 < wall < 0.009 and np.median(norm) < 0.1

# %% [markdown]
# A wall, less than 0.01 wide, with gradients above 150 inside, and small ones outside. Why there?
# The Jacobian is $\partial s_t/\partial s_{t-1} = w\,\sigma'(a_t) \le w/4$. For $w < 4$ it is below
# 1, and the product of 50 below $(3.5/4)^{50} = 0.0013$. For $w > 4$ two states near $\tfrac12$
# drift apart from step to step, by a factor of up to $(4.5/4)^{50} = 361$ in all.
#
# **Question.** The wall is thin, so a walk will rarely land on it. Why does it matter?
#
# <details><summary>Answer</summary>
# One landing is enough. With a learning rate of 0.1 and a gradient of 150, that step is 15 long,
# six times the width of the picture. Where it lands, the gradient is tiny: there is no way back.
# </details>

# %% [markdown]
# ## Three ways to clip
#
# With $g_w$ the gradient of one weight (an array), $g$ all of them together and $c$ the threshold:
#
# - `clipvalue`: each entry by itself, $\hat g_i = \max(-c, \min(c, g_i))$
# - `clipnorm`: each weight by itself, $\hat g_w = g_w \min(1, c/\lVert g_w \rVert)$
# - `global_clipnorm`: all together, $\hat g_w = g_w \min(1, c/\lVert g \rVert)$; this is
#   Pascanu's algorithm 1
#
# Only the last keeps the direction of the gradient. With a learning rate of 1 and weights of 0, the
# weights after one step are the negative of the clipped gradient.


# %%
def clipped(gradients, **clipping):
    """What Keras's optimizer makes of these gradients, one array a weight."""
    variables = [keras.Variable(np.zeros_like(g)) for g in gradients]
    keras.optimizers.SGD(1.0, **clipping).apply([keras.ops.array(g) for g in gradients], variables)
    return np.concatenate([-v.numpy() for v in variables])


CLIPPINGS = ({}, {"clipvalue": 1.0}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0})
weights = [np.array([3.0, 4.0]), np.array([0.5])]
g = np.concatenate(weights)
expected = (g, [1, 1, 0.5], [0.6, 0.8, 0.5], g / np.linalg.norm(g))
for clipping, entries, degrees in zip(CLIPPINGS, expected, (0, 16, 21, 0), strict=True):
    ĝ = clipped(weights, **clipping)
    cosine = ĝ @ g / np.linalg.norm(ĝ) / np.linalg.norm(g)
    angle = np.degrees(np.arccos(min(1, cosine)))
    print(f"{clipping!s:25} {ĝ.round(3)}, length {np.linalg.norm(ĝ):.2f}, turned by {angle:.0f}°")
    assert np.allclose(ĝ, entries) and round(angle) == degrees

# %% [markdown]
# **Question.** A weight has one entry only. How does `clipnorm` differ from `clipvalue` then?
#
# <details><summary>Answer</summary>
# Not at all: the norm of one number is its absolute value. The unit on the cliff has two such
# weights, so there clipnorm will walk just as clipvalue does.
# </details>

# %% [markdown]
# ## Walking on the cliff
#
# The same unit as a Keras model, $s_0$ its initial state and its input always 0, trained by `fit`
# from $w = 5$, $b = -3.2$, below the wall. (Norms before clipping; E: median of the last 50 steps.)


# %%
def fit_from_the_start(steps, **clipping):
    """The record, and (w, b) before each step."""
    inputs = keras.Input((50, 1)), keras.Input((1,))
    layer = kg.layers.SimpleRNN(1, activation="sigmoid")
    model = keras.Model(inputs, layer(inputs[0], initial_state=inputs[1]))
    layer.set_weights([np.zeros((1, 1)), np.full((1, 1), 5.0), np.full(1, -3.2)])
    model.compile(keras.optimizers.SGD(0.1, **clipping), loss="mse")
    norms, points = kg.callbacks.GradientNorms(), []
    walk = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: points.append(layer.get_weights()[1:])
    )
    x, y = (np.zeros((steps, 50, 1)), np.full((steps, 1), S_0)), np.full((steps, 1), 0.7)
    model.fit(x, y, batch_size=1, verbose=0, callbacks=[norms, walk])
    return norms.history, np.transpose([(w.item(), b.item()) for w, b in points])


axes = plt.subplots(1, 4, figsize=(12, 3.6), sharey=True, layout="constrained")[1]
w, b = np.meshgrid(np.linspace(4.2, 5.3, 221), np.linspace(-3.3, -1.7, 321))
walks, ends = {}, {}
for ax, clipping in zip(axes, CLIPPINGS, strict=True):
    name = next(iter(clipping), "no clipping")
    history, walks[name] = fit_from_the_start(60 if QUICK else 400, **clipping)
    norm = np.linalg.norm(error_and_gradient(*walks[name])[1], axis=0)
    assert np.allclose(history.global_norm[:20], norm[:20])  # Recorded before clipping.
    ends[name], rate = np.median(history.loss[-50:]), history.clip_rate
    print(f"{name:16} largest norm {norm.max():4.0f}, clipped {rate:2.0%}, E {ends[name]:.1e}")
    image = ax.pcolormesh(w, b, error_and_gradient(w, b)[0], cmap="Greys", rasterized=True)
    ax.plot(*walks[name], "o-", color="#D55E00", ms=2, lw=0.7)
    ax.plot(5, -3.2, "*", color="white", ms=12)
    ax.set(title=name, xlim=(4.2, 5.3), ylim=(-3.3, -1.7), xlabel="w")
axes[0].set(ylabel="b")
plt.colorbar(image, ax=axes, label="error E")
plt.show()
assert np.allclose(walks["clipnorm"], walks["clipvalue"])  # One entry a weight
assert QUICK or ends["global_clipnorm"] < 1e-3 < ends["clipvalue"] < ends["no clipping"]

# %% [markdown]
# All climb from the star to the wall and meet a large gradient there. Without clipping one such
# step leaves the picture, to where $s_{50} \to 1$, so that $E \to (1 - 0.7)^2 = 0.09$ and no
# gradient is left. `global_clipnorm` goes back and forth across the wall, and along it to the
# minimum. `clipvalue` is thrown along the diagonal, whatever way the gradient points.
#
# That was one start. From 500 starts, in NumPy:

# %%
rng = np.random.default_rng(0)
starts = np.stack([rng.uniform(4.2, 6, 500), rng.uniform(-4, -1.5, 500)])
for name, clip, share in (
    ("no clipping", lambda g: g, (0.25, 0.45)),
    ("clipvalue", lambda g: np.clip(g, -1, 1), (0.5, 0.7)),
    ("global_clipnorm", lambda g: g / np.maximum(1, np.linalg.norm(g, axis=0)), (0.99, 1)),
):
    points = starts.copy()
    for _ in range(100 if QUICK else 1000):
        points -= 0.1 * clip(error_and_gradient(*points)[1])
    E = error_and_gradient(*points)[0]
    print(f"{name:16} E < 0.01: {(E < 0.01).mean():4.0%}, E > 0.08: {(E > 0.08).mean():3.0%}")
    assert QUICK or share[0] <= (E < 0.01).mean() <= share[1]

# %% [markdown]
# **Question.** Is clipping the same as a smaller learning rate?
#
# <details><summary>Answer</summary>
# It is one, but only at the steps that need it. To make a gradient of 150 harmless by the learning
# rate alone, every step must be 150 times smaller, and the walk takes 150 times as many.
# </details>

# %% [markdown]
# ## Choosing the threshold
#
# Pascanu, Mikolov and Bengio advise half to ten times the average norm (section 3.2), so: record
# first. The task is theirs, temporal order: two symbols, A or B, stand among others, and wanted is
# in which order. A constant answer has the loss $\ln 4 = 1.386$. Printed beside the loss are the
# *reach*, $\lVert\partial L/\partial s_1\rVert / \lVert\partial L/\partial s_T\rVert$, and the
# share of states that are *saturated*: their $\tanh'$ is below 5 % of its largest.

# %%
task = kg.tasks.temporal_order(samples=320 if QUICK else 3200, timesteps=20)


def train(**clipping):
    keras.utils.set_random_seed(0)
    output = keras.layers.Dense(4, activation="softmax")
    model = keras.Sequential([keras.Input((20, 6)), kg.layers.SimpleRNN(32), output])
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9, **clipping), loss=task.loss)
    norms = kg.callbacks.GradientNorms()
    model.fit(task.x, task.y, epochs=1 if QUICK else 8, verbose=0, callbacks=[norms])
    (reach,), saturated = norms.history.reach.values(), kg.bptt.saturation(model, task.x[:64])["h"]
    return norms.history, np.median(reach[-100:]), saturated.mean()


usual, losses = None, {}
for factor in (None, 0.01) if QUICK else (None, 10.0, 0.5, 0.1, 0.01):
    history, reach, saturated = train(global_clipnorm=factor and factor * usual)
    if factor is None:
        usual = history.global_norm[:100].mean()
        print(f"mean norm of 100 steps {usual:.2f}, of all {history.global_norm.mean():.2f}")
        assert QUICK or (reach < 0.01 and saturated > 0.5 and history.global_norm.mean() < usual)
    losses[factor] = np.median(history.loss[-100:])
    found = ", ".join(finding.title for finding in kg.diagnose(history)) or "nothing found"
    print(f"threshold {factor} × mean: clipped {history.clip_rate:.0%}, loss {losses[factor]:.4f}")
    print(f"    reach {reach:.0e}, saturated {saturated:.0%}, diagnosis: {found}")
assert QUICK or max(losses[0.1], losses[0.5]) < 0.01 < 0.1 * losses[0.01]
assert QUICK or min(losses[None], losses[10.0]) > 1.2

# %% [markdown]
# Half of the mean and a tenth solve the task. A hundredth clips every step and is slow. Ten times
# the mean, the upper end of the advice, is too much here. And see how it fails: no NaN, no large
# loss. Long steps drive the units into saturation, and there the gradient **vanishes**. Who looks
# only at the end sees a vanished gradient, and would never think of clipping.
#
# **Question.** Why the mean of the first 100 steps, and not of the whole training?
#
# <details><summary>Answer</summary>
# The training without clipping dies, and a dead network has small gradients: the mean of all steps
# is smaller. Record a healthy stretch, or clip loosely at first and record again.
# </details>

# %% [markdown]
# ## What clipping cannot do
#
# "The explosion can be prevented by a suitable threshold", says the article. It leaves out two
# things. First: clipping multiplies a weight's gradient by one number. Its shares $G_\ell$, which
# travelled $\ell$ steps (`kg.bptt.step_contributions`), all shrink alike: a lost one stays lost.

# %%
task = kg.tasks.adding_problem(samples=640 if QUICK else 3200, timesteps=100)
model = keras.Sequential([keras.Input((100, 2)), kg.layers.SimpleRNN(32), keras.layers.Dense(1)])
model.compile(keras.optimizers.SGD(0.05, clipnorm=1.0), loss="mse")
norms = kg.callbacks.GradientNorms()
model.fit(task.x, task.y, epochs=1 if QUICK else 3, verbose=0, callbacks=[norms])
shares = kg.bptt.step_contributions(model, task.x[:32], task.y[:32], by_lag=True)
kg.plots.plot_contributions(shares, weight="recurrent_kernel")
plt.show()
(reach,), loss = norms.history.reach.values(), norms.history.loss[-50:].mean()
print(f"clipped {norms.history.clip_rate:.0%}, loss {loss:.3f} (a constant answer: {1 / 6:.3f})")
print(f"of the gradient at step 100, {np.median(reach):.0e} reaches step 1")
assert np.median(reach) < 1e-3 and loss > 0.9 / 6 and max(shares.horizon().values()) < 50

# %% [markdown]
# Second: clipping divides by the norm. Where one entry is Inf, so is the norm, and with
# `global_clipnorm` *every* gradient becomes NaN; `clipnorm` ruins that weight, `clipvalue` hides
# it. `on_nonfinite="stop"` ends the training, with the weights of before that step.

# %%
weights = [np.array([np.inf, 4.0]), np.array([0.5])]
for clipping in CLIPPINGS:
    print(f"{clipping!s:25}", clipped(weights, **clipping))
assert np.isnan(clipped(weights, global_clipnorm=1.0)).all()
before, norms = model.get_weights(), kg.callbacks.GradientNorms(on_nonfinite="stop")
task.x[0, 0, 0] = np.nan
with warnings.catch_warnings(record=True) as told:
    model.fit(task.x, task.y, shuffle=False, verbose=0, callbacks=[norms])
print(told[-1].message)
assert all(map(np.array_equal, before, model.get_weights()))

# %% [markdown]
# **Question.** Which of the two, then, does the advice "clip your gradients" mend?
#
# <details><summary>Answer</summary>
# Neither. It mends steps that are finite and too long, before they do harm. A vanished gradient
# needs another cell (tutorial 6), and the cause of a NaN needs to be found.
# </details>
