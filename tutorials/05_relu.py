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
# # ReLU: what it mends, and what it needs
#
# "The derivative of ReLU is 1 for positive input, so the gradient does not vanish", says the source
# article, "it can explode, which a threshold prevents; and for negative input the units can die".
# Each of the three is half of the truth. This tutorial measures the other halves: the recurrent
# weights decide whether the gradient vanishes, a unit that is off is not dead, and the threshold
# belongs on the gradient. Run time: half a minute on two cores.

# %%
import os

import keras
import matplotlib.pyplot as plt
import numpy as np

import kerasgrad as kg

QUICK = os.environ.get("KERASGRAD_QUICK") == "1"  # A short form, for the tests.
rng = np.random.default_rng(0)
keras.utils.set_random_seed(0)

# %% [markdown]
# ## The gain is in W
#
# The *gain* of a step is the factor by which it multiplies the gradient on the way back. With
# $s_t = \max(0, a_t)$, $a_t = U x_t + W s_{t-1}$ and $\lambda_t = \partial L/\partial s_t$,
#
# $$\lambda_{t-1} = W^\top (\Phi'(a_t) \odot \lambda_t)$$
#
# where $\Phi'$ is 1 for units that are on ($a > 0$) and 0 for those that are off. If half of the
# $n$ units are on, and $W_{ij} \sim N(0, g^2/n)$, then on average
#
# $$\lVert \lambda_{t-1} \rVert^2 \approx g^2 \cdot \tfrac12 \cdot \lVert \lambda_t \rVert^2$$
#
# The ½ is ReLU's share, $g^2$ that of the weights. (He, Zhang, Ren and Sun (2015) count so for the
# layers of a deep network, and draw them with $g = \sqrt2$.) Some draws of $W$ for each $g$:


# %%
def reach_back(layer, x):
    """‖∂L/∂s_t‖ over ‖∂L/∂s_T‖, (batch, T); and the model."""
    model = keras.Sequential([keras.Input(x.shape[1:]), layer, keras.layers.Dense(1)])
    model.compile(loss="mse")
    λ = kg.bptt.state_gradients(model, x, np.zeros((len(x), 1)))["h"].astype("float64")
    norms = np.linalg.norm(λ, axis=-1)
    return norms / norms[:, -1:], model


def random_layer(g, seed, activation="relu", n=200):
    U = keras.initializers.RandomNormal(stddev=1.0, seed=seed)
    W = keras.initializers.RandomNormal(stddev=g / n**0.5, seed=seed + 1)
    return kg.layers.SimpleRNN(n, activation, kernel_initializer=U, recurrent_initializer=W)


T, lag = 51, np.arange(51)  # 50 steps back
x = rng.normal(size=(8, T, 8))
left, right = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")[1]
kg.plots.plot_relu(left)
draws = range(2 if QUICK else 5)
for g, color, ls in ((1.0, "#0072B2", "-"), (2**0.5, "#009E73", "--"), (1.6, "#D55E00", "-.")):
    ratios = np.stack([reach_back(random_layer(g, 10 * i), x)[0] for i in draws])
    curves = np.exp(np.log(ratios).mean(axis=1))[:, ::-1]  # Geometric mean over the batch
    right.plot(lag, curves.T, color=color, ls=ls, lw=0.8)
    right.plot(lag, (g**2 / 2) ** (lag / 2), color="black", lw=0.8)
    mean, ends = np.exp(np.log(curves[:, -1]).mean()), np.sort(curves[:, -1])
    right.plot([], [], color=color, ls=ls, label=f"g = {g:.3g}: {mean:.2g} after 50 steps")
    theory = (g**2 / 2) ** 25
    print(f"g = {g:.3f}: {mean:.2g} ({ends[0]:.2g} to {ends[-1]:.2g}), (g²/2)^25 = {theory:.3g}")
    assert theory / 5 < mean < theory * 5
assert (f"{0.5**25:.1e}", round(theory)) == ("3.0e-08", 479)
right.plot([], [], color="black", lw=0.8, label="theory, (g²/2)^(ℓ/2)")
right.set(yscale="log", xlabel="lag ℓ in time steps", ylabel="‖∂L/∂s_{T-ℓ}‖ / ‖∂L/∂s_T‖")
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# With $g = 1$ the gradient vanishes: $2^{-25} = 3.0 \cdot 10^{-8}$ after 50 steps, although the
# derivative of each active unit is 1. With $g = 1.6$ it explodes, by theory to $1.28^{25} = 479$.
# Only $g = \sqrt2$ keeps it, and that on average: each draw of $W$ strays on its own way.
#
# Keras starts `SimpleRNN` with an orthogonal $W$, which keeps each norm: $g = 1$. There
# `activation="relu"` alone multiplies the squared norm by about ½ a step, and a tanh does not:

# %%
for gain, activation in ((1.0, "relu"), (2**0.5, "relu"), (1.0, "tanh")):
    start = keras.initializers.Orthogonal(gain=gain, seed=0)
    layer = kg.layers.SimpleRNN(200, activation, recurrent_initializer=start)
    ratio = np.median(reach_back(layer, 0.1 * rng.normal(size=(8, 101, 8)))[0][:, 0])
    print(f"{activation}, W = {gain:.3g} Q: {ratio:.1e} of the gradient is left after 100 steps")
    assert ratio < 1e-12 if (gain, activation) == (1.0, "relu") else ratio > 0.01

# %% [markdown]
# **Question.** Which $g$ keeps the gradient of a layer whose units are on 80 % of the time?
#
# <details><summary>Answer</summary>
# The gain of the squared norm is 0.8 g², so g = √(1/0.8) = 1.12. The share of active units is part
# of the gain, and changes in training: no g is right for good.
# </details>

# %% [markdown]
# ## Starting from the identity
#
# Le, Jaitly and Hinton (2015) start from $W = I$ and $b = 0$ (*IRNN*), so that $W^\top = I$ passes
# on what it gets. From $\lambda_{t-1} = \Phi'(a_t) \odot \lambda_t$ follows, unit by unit:
# $\lambda_t$ is $\lambda_T$ for a unit that is on at all steps from $t+1$ to $T$, and exactly 0 for
# one that is off at any of them. `kg.layers.IRNN`, with inputs of one sign and of both:

# %%
ax = plt.subplots(layout="constrained")[1]
noise = rng.normal(size=(32, T, 1))
for name, x, color, ls in (
    ("inputs ≥ 0", np.abs(noise), "#0072B2", "-"),
    ("inputs of both signs", noise, "#D55E00", "--"),
):
    ratio, model = reach_back(kg.layers.IRNN(100), x)
    λ = kg.bptt.state_gradients(model, x, np.zeros((32, 1)))["h"]
    on = kg.bptt.states(model, x)["h"] > 0
    # on_until_the_end[:, t]: on at all steps from t + 1 to T.
    on_until_the_end = np.minimum.accumulate(on[:, :0:-1], axis=1)[:, ::-1]
    assert np.array_equal(λ[:, :-1], np.where(on_until_the_end, λ[:, -1:], 0))
    survivors = on_until_the_end[:, 0].mean()
    ax.plot(lag, np.sqrt((ratio**2).mean(axis=0))[::-1], color=color, ls=ls, label=name)
    print(f"{name}: on at all {T - 1} later steps: {survivors:.0%} of the units")
    assert survivors > 0.3 if name == "inputs ≥ 0" else survivors < 0.2
ax.set(xlabel="lag ℓ in time steps", ylabel="‖∂L/∂s_{T-ℓ}‖ / ‖∂L/∂s_T‖, root mean square", ylim=0)
ax.legend()
plt.show()

# %% [markdown]
# The identity keeps the gradient of the units that stay active, and of no other. And it holds at
# the start of the training only: nothing keeps $W$ there.
#
# **Question.** With inputs of one sign the line is flat, but it is not at 1. Why?
#
# <details><summary>Answer</summary>
# With x ≥ 0 a unit whose input weight is positive is always on, and one whose weight is negative
# always off. About half of each: the norm falls once, to about √½, and stays.
# </details>

# %% [markdown]
# ## Off is not dead
#
# "For negative input the derivative is 0, so the unit dies." A unit that is off at one step gets no
# gradient *through that step*, and learns from all others. It is *dead* only if it is off at every
# step of every example: then no gradient reaches any of its weights, and nothing pulls it back.
# `kg.bptt.dead_units` counts so. On the adding problem (tutorial 3):

# %%
task = kg.tasks.adding_problem(samples=3200, timesteps=30)
x, y = task.x[:256], task.y[:256]


def build(layer, optimizer="sgd"):
    model = keras.Sequential([keras.Input((30, 2)), layer, keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse")
    return model


keras.utils.set_random_seed(0)
for name, layer, counts in (
    ("SimpleRNN, relu", kg.layers.SimpleRNN(64, "relu"), (62, 2)),
    ("IRNN", kg.layers.IRNN(64), (44, 15)),
):
    model = build(layer)
    off = kg.bptt.states(model, x)["h"] == 0
    dead = kg.bptt.dead_units(model, x)
    ever = off.any(axis=(0, 1)).sum()
    print(f"{name:15} off at {off.mean():.0%} of steps, {ever} units at some; dead {dead.sum()}")
    assert (ever, dead.sum()) == counts
    shares = kg.bptt.step_contributions(model, x, y)
    for G in shares.values():
        reached = np.abs(G.sum(axis=0)).reshape(-1, 64).max(axis=0) > 0
        assert np.array_equal(reached, ~dead)  # Of each weight, exactly the live units'.
    assert name != "IRNN" or np.array_equal(dead, (layer.cell.kernel.numpy() < 0).all(axis=0))

# %% [markdown]
# In the ReLU network 62 of the 64 units are off at some step of some example, and 2 are dead; in
# the IRNN 44 and 15. Weight by weight, just the columns of the dead have a gradient of 0. In the
# IRNN the dead are those whose two input weights are both negative (this task's inputs are not),
# about a quarter: there the start itself kills.
#
# **Question.** Can a unit that is dead on this data come to life on other data?
#
# <details><summary>Answer</summary>
# Yes: dead is said of a unit and the data it was measured on. On other inputs it may be on. So
# may it be later in training, if a layer below changes its input; here there is none.
# </details>

# %% [markdown]
# ## What kills, and what clipping does about it
#
# "Less likely with a suitable learning rate" is right. The same networks trained, with small and
# large steps, with and without clipping. (A constant answer has a loss of 1/6.)

# %%
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
relu, irnn = (lambda: kg.layers.SimpleRNN(64, "relu")), (lambda: kg.layers.IRNN(64))
runs = {
    "Adam(0.001)": (relu, Adam(0.001), 8),
    "Adam(0.03)": (relu, Adam(0.03), 8),
    "Adam(0.03), clipped to 1": (relu, Adam(0.03, global_clipnorm=1.0), 8),
    "IRNN, SGD(0.01)": (irnn, SGD(0.01, 0.9), 2),
    "IRNN, SGD(0.01), clipped to 0.1": (irnn, SGD(0.01, 0.9, global_clipnorm=0.1), 2),
}
runs = dict(list(runs.items())[:: 2 if QUICK else 1])
ax, deaths, losses = plt.subplots(figsize=(7, 4), layout="constrained")[1], [], []
colors, lines = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"), ("-", "--", "-.", ":", "-")
for (name, run), color, ls in zip(runs.items(), colors, lines, strict=not QUICK):
    make_layer, optimizer, epochs = run
    keras.utils.set_random_seed(0)
    model, norms = build(make_layer(), optimizer), kg.callbacks.GradientNorms()
    n, epochs = (320, 1) if QUICK else (3200, epochs)
    model.fit(task.x[:n], task.y[:n], epochs=epochs, verbose=0, callbacks=[norms])
    losses.append(np.median(norms.history.loss[-50:]))
    deaths.append(kg.bptt.dead_units(model, x).sum())
    largest = norms.history.global_norm.max()
    print(f"{name:32} dead {deaths[-1]} of 64, loss {losses[-1]:.4f}, largest norm {largest:.0e}")
    kg.plots.plot_loss(norms.history, ax, label=name, average=20, color=color, ls=ls)
ax.legend(fontsize="small")
plt.show()
if not QUICK:
    assert deaths[0] <= 10 and min(deaths[1:3]) > 32 and deaths[3] >= 60 and deaths[4] < 48
    assert losses[0] < 0.02 and losses[1] > 0.1 and losses[2] < 0.06

# %% [markdown]
# Adam with a small rate leaves almost all units alive and learns the task; with a large one it
# kills most of them. Clipping then saves the *training*, and not the units: Adam divides by the
# usual size of the gradient, so its steps are large all the same. In the IRNN with SGD the first
# long steps kill all units or all but one. There clipping bounds the steps, and saves units, too.
#
# **Question.** How far can `SGD(0.01, momentum=0.9, global_clipnorm=0.1)` go in one step?
#
# <details><summary>Answer</summary>
# 0.01, all weights together: the rate 0.01, times 0.1, times the 1/(1 - 0.9) = 10 of momentum.
# </details>

# %% [markdown]
# ## Clip the gradient, not the activation
#
# "A suitable threshold" could also be one for the activation: $\min(\max(0, a), 6)$, ReLU6. That
# bounds the state. But above the cap the derivative is 0, as below 0: what is too large no longer
# learns. One unit, $s_t = \Phi(1.5 s_{t-1} + 1)$, is to be 1 after 20 steps. Its first gradient,
# before and after clipping, and its loss after 100 steps of the optimizer:

# %%
for activation, clipping in (("relu", {}), ("relu", {"global_clipnorm": 1.0}), ("relu6", {})):
    model = keras.Sequential([keras.Input((20, 1)), kg.layers.SimpleRNN(1, activation)])
    model.layers[0].set_weights([np.ones((1, 1)), np.full((1, 1), 1.5), np.zeros(1)])
    model.compile(keras.optimizers.SGD(0.05, **clipping), loss="mse")
    norms = kg.callbacks.GradientNorms()
    model.fit(np.ones((100, 20, 1)), np.ones((100, 1)), batch_size=1, verbose=0, callbacks=[norms])
    before, after = norms.history.global_norm[0], norms.history.applied_global_norm[0]
    loss = norms.history.loss[-1]
    print(f"{activation:5} {clipping!s:24} gradient {before:.0e}, {after:.0e}; loss {loss:.2g}")
    if activation == "relu6":
        assert before == 0 and loss == 25
    elif clipping:
        assert before > 1e8 and np.isclose(after, 1) and loss < 0.1
    else:
        assert before > 1e8 and loss == 1

# %% [markdown]
# A first gradient of $10^9$ kills the unit: it is 0 for ever, 1 below what it should be. ReLU6
# stands at its cap, 5 above (loss 25), with a gradient of exactly 0. Clipped to 1, it learns. With
# many units, the cap turns off some more, and the gain is $g^2$ times the share that is left:

# %%
x = rng.normal(size=(8, T, 8))
for g in (1.6, 2.0):
    for activation, cap in (("relu", np.inf), ("relu6", 6)):
        ratio, model = reach_back(random_layer(g, 0, activation), x)
        s = kg.bptt.states(model, x)["h"]
        share, reach = ((s > 0) & (s < cap)).mean(), np.median(ratio[:, 0])
        print(
            f"g = {g}, {activation:5}: derivative 1 at {share:.0%} of the steps, reach {reach:.1e}"
        )
        assert (reach < 1) == ((g, activation) == (1.6, "relu6"))

# %% [markdown]
# The cap can make a gradient vanish ($g = 1.6$), and need not keep one from exploding ($g = 2$): it
# bounds states, not gradients.
#
# **Question.** Where, then, does a threshold belong?
#
# <details><summary>Answer</summary>
# On the gradient (tutorial 4), before the optimizer uses it. That bounds the step and leaves each
# derivative as it is. What has vanished it does not bring back: that takes a gate (tutorial 6).
# </details>
