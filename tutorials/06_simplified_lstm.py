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
# # Gates: the simplified LSTM
#
# In a simple recurrent network each step back multiplies the gradient by a matrix,
# $\operatorname{diag}(\tanh')\, W$, and the product vanishes or explodes (tutorial 2). The LSTM
# (Hochreiter and Schmidhuber 1997; with a forget gate: Gers, Schmidhuber and Cummins 2000) has
# numbers between 0 and 1 in its place, which the network sets itself. What do they do to the
# gradient, and when does that help? Run time: one minute on two cores.

# %%
import os

import keras
import matplotlib.pyplot as plt
import numpy as np

import kerasgrad as kg
from kerasgrad.plots.style import styles

QUICK = os.environ.get("KERASGRAD_QUICK") == "1"  # A short form, for the tests.
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


# %% [markdown]
# ## Three gates, two forms, a diagonal Jacobian
#
# A **gate** is a sigmoid, $\sigma(a) = 1/(1 + e^{-a})$, that something is multiplied by: at 0
# nothing passes, at 1 everything. This cell has three, and they see the input $x_t$ alone:
#
# $$f_t = \sigma(W_f x_t + b_f), \; i_t = \sigma(W_i x_t + b_i), \; o_t = \sigma(W_o x_t + b_o)$$
#
# The forget gate $f$ keeps the state, the input gate $i$ lets the input in ($\odot$: element by
# element). The state has two forms, without and with tanh:
#
# $$S_t = f_t \odot S_{t-1} + i_t \odot x_t, \quad S_t = \tanh(f_t \odot S_{t-1} + i_t \odot x_t)$$
#
# The article that this package follows defines the output gate $o_t$ and never uses it. It belongs
# to the output, $h_t = o_t \odot S_t$. And $i_t \odot x_t$ needs as many features as units; with
# other numbers, `project_input=True` puts $W_c x_t$ in its place. In NumPy, beside the layer:

# %%
x = rng.normal(size=(1, 3, 4)).astype("float32")  # One sequence: 3 steps, 4 features.
layers = {form: kg.layers.SimplifiedLSTM(4, activation=form) for form in ("linear", "tanh")}
for form, layer in layers.items():
    h = np.asarray(layer(x))[0]  # The last step's output.
    W_f, W_i, W_o, b_f, b_i, b_o = layer.get_weights()
    S = np.zeros(4)
    for x_t in x[0]:
        f, i, o = sigmoid(x_t @ W_f + b_f), sigmoid(x_t @ W_i + b_i), sigmoid(x_t @ W_o + b_o)
        S = f * S + i * x_t if form == "linear" else np.tanh(f * S + i * x_t)
    print(f"{form}: h_3 in NumPy {np.round(o * S, 3)}, of the layer {np.round(h, 3)}")
    assert np.allclose(o * S, h, atol=1e-6) and not np.allclose(S, h, atol=0.01)
try:
    kg.layers.SimplifiedLSTM(32)(x)
except ValueError as error:
    message = str(error)
print(message)

# %% [markdown]
# The entry $[i, j]$ of the Jacobian $\partial S_t / \partial S_{t-1}$ is how much unit $i$ moves
# with unit $j$ of the step before. For the two forms it is
#
# $$\operatorname{diag}(f_t), \qquad \operatorname{diag}\big((1 - S_t^2) \odot f_t\big)$$
#
# Units never mix, and no entry is above 1. So no product of them can explode, whatever the weights.

# %%
x = rng.normal(size=(16, 50, 4)).astype("float32")
for form, layer in layers.items():
    J, f, S = (get(layer, x) for get in (kg.bptt.state_jacobians, kg.bptt.gates, kg.bptt.states))
    diagonal = f["forget"] * (1 - S["S"] ** 2 if form == "tanh" else 1)
    assert np.allclose(J, diagonal[..., np.newaxis] * np.eye(4), atol=1e-6)
    layer.set_weights([100 * w for w in layer.get_weights()])
    product = np.einsum("btii->bti", kg.bptt.state_jacobians(layer, x)).prod(axis=1)
    print(f"{form}, weights 100 times as large: J_50···J_1 has entries up to {product.max():.1e}")
    assert product.max() <= 1

# %% [markdown]
# **Question.** Does this bound the gradient of the weights?
#
# <details><summary>Answer</summary>
# No: it is a sum over time steps, of terms that contain S, which has no bound without tanh.
# </details>

# %% [markdown]
# ## Is the product 0 or 1?
#
# With tanh, a step multiplies the gradient by $Z = \tanh'(x)\, \sigma(y)$. The article draws this
# surface, says that $Z$ is *basically 0 or 1*, and so drops the product from the gradient. But $Z$
# is strictly between, and seldom near 1. For $x, y \sim N(0, 1)$, 90.5 % lie between .05 and .95,
# and only $10^{-4}$ above; the mean is .30. In a product the geometric mean counts: .21 a step, or
# about $10^{-34}$ in 50. $Z \ge .99$ needs both $|x| \le .1$ and $y \ge 4.6$.

# %%
a, b = np.random.default_rng(3).normal(size=(2, 1_000_000))
Z = np.cosh(a) ** -2 * sigmoid(b)
inside, above, log_mean = np.mean((Z > 0.05) & (Z < 0.95)), np.mean(Z > 0.95), np.log(Z).mean()
print(f"mean {Z.mean():.2f}, P(.05 < Z < .95) = {inside:.1%}, P(Z > .95) = {above:.0e}")
print(f"geometric mean {np.exp(log_mean):.2f}, to the power of 50: {np.exp(50 * log_mean):.0e}")
limits = np.arctanh(np.sqrt(1 - 0.99)), np.log(0.99 / (1 - 0.99))
print(f"tanh'(x) = .99 at x = {limits[0]:.2f}; σ(y) = .99 at y = {limits[1]:.2f}")
assert 0 < Z.min() < Z.max() < 1 and abs(Z.mean() - 0.30) < 0.005 and abs(inside - 0.905) < 0.002
assert 5e-5 < above < 2e-4 and abs(np.exp(log_mean) - 0.21) < 0.002
assert 1e-34 < np.exp(50 * log_mean) < 3e-34 and np.allclose(limits, [0.1, 4.6], rtol=0.01)
fig = plt.figure(figsize=(10, 4), layout="constrained")
kg.plots.plot_gate_product(fig.add_subplot(1, 2, 1, projection="3d"))
kg.plots.plot_gate_product_distribution(fig.add_subplot(1, 2, 2))
plt.show()

# %% [markdown]
# What comes of dropping it? With $\lambda_t = \partial L/\partial S_t$, the gradient of `kernel_f`
# (Keras has a row for each feature) is
#
# $$\sum_t x_t [\lambda_t \odot (1 - S_t^2) \odot S_{t-1} \odot f_t \odot (1 - f_t)]^T,$$
#
# and without the product, $\lambda_T$ stands for each $\lambda_t$. Over 20 steps that makes it more
# than twice as long, and it points elsewhere.

# %%
x, y = rng.normal(size=(64, 20, 8)).astype("float32"), rng.normal(size=(64, 1))
model = keras.Sequential([kg.layers.SimplifiedLSTM(8, activation="tanh"), keras.layers.Dense(1)])
model.compile(loss="mse")
model.build(x.shape)
λ, S = kg.bptt.state_gradients(model, x, y)["S"], kg.bptt.states(model, x)["S"]
f, before = kg.bptt.gates(model, x)["forget"], np.pad(S, ((0, 0), (1, 0), (0, 0)))[:, :-1]
part = (1 - S**2) * before * f * (1 - f)
true, dropped = (np.einsum("btf,btu->fu", x, each * part) for each in (λ, λ[:, -1:]))
autodiff = kg.bptt.step_contributions(model, x, y)[model.layers[0].cell.kernel_f.path].sum(axis=0)
ratio = np.linalg.norm(dropped) / np.linalg.norm(true)
cosine = np.sum(dropped * true) / np.linalg.norm(true) ** 2 / ratio
print(f"product dropped: {ratio:.1f} times as long, cosine of the angle {cosine:.2f}")
assert np.allclose(true, autodiff, atol=1e-6) and ratio > 2 and cosine < 0.8

# %% [markdown]
# **Question.** If $Z$ really were 0 or 1 at each step, could the product be dropped?
#
# <details><summary>Answer</summary>
# No: over many steps it would be 1 only if every factor were 1, and else 0.
# </details>

# %% [markdown]
# ## An open gate does not save the tanh
#
# Open the forget gate fully, $f = 1$, and give no input after a first one. Without tanh, state and
# gradient stay as they are for ever. With it, $S_n = \tanh(S_{n-1})$. Near 0,
# $\tanh S \approx S - S^3/3$, so $S_n \approx \sqrt{3/(2n)}$ and
#
# $$\prod_{k \le n} (1 - S_k^2) \approx \exp\Big(-\sum_{k \le n} 3/(2k)\Big) \propto n^{-3/2}$$
#
# From $S_0 = .5$, only $4.5 \cdot 10^{-4}$ is left after 1000 steps. A constant drive,
# $i \cdot x = 1$, is far worse: $S$ settles at .961, where one step keeps .076 of the gradient and
# 50 steps $10^{-56}$. The Jacobians are the layer's own.


# %%
def products(x, activation=None, forget_bias=30.0):
    """∂S_n/∂S_0 for n ≥ 1. With the kernels at 0, i = 1/2 and f = σ(forget_bias)."""
    options = {"kernel_initializer": "zeros", "forget_bias": forget_bias}
    layer = kg.layers.SimplifiedLSTM(1, activation=activation, **options)
    J = kg.bptt.state_jacobians(layer, np.reshape(x, (1, -1, 1)).astype("float32"))
    return np.cumprod(J[0, 1:, 0, 0], dtype="float64")


alone = products(np.r_[2 * np.arctanh(0.5), np.zeros(1000)], "tanh")  # S_0 = tanh(i·x) = .5
driven = products(np.full(101, 2.0), "tanh")
open_gate = products(np.r_[1, np.zeros(100)])
J, J_50, slope = driven[-1] / driven[-2], driven[-1] / driven[-51], np.log2(alone[999] / alone[499])
print(f"no input: {alone[999]:.1e} left after 1000 steps; from 500 to 1000 like n^{slope:.2f}")
print(f"i·x = 1: S = {np.sqrt(1 - J):.3f}, J = {J:.3f}, J^50 = {J_50:.0e}")
assert (open_gate == 1).all() and abs(alone[999] - 4.5e-4) < 5e-6 and abs(slope + 1.5) < 0.02
assert np.allclose([np.sqrt(1 - J), J], [0.961, 0.076], atol=5e-4) and 1e-56 < J_50 < 2e-56
n, ax = np.arange(1, 1001), plt.subplots(layout="constrained")[1]
lines = {"no tanh": open_gate, "tanh": alone, "tanh, i·x = 1": driven, "14 n^(-3/2)": 14 * n**-1.5}
for style, (label, line) in zip(styles(), lines.items(), strict=False):
    ax.loglog(n[: len(line)], line, label=label, **style)
ax.set(xlabel="n, time steps", ylabel="∂S_n/∂S_0 with the forget gate open", ylim=(1e-8, 30))
ax.legend(handlelength=4)
plt.show()

# %% [markdown]
# **Question.** What is the tanh good for, then?
#
# <details><summary>Answer</summary>
# It bounds S. The full LSTM, below, keeps one, but not on the path from a state to the next.
# </details>

# %% [markdown]
# ## The forget bias sets the horizon
#
# Without tanh, $\prod f$ is what is left, and it depends on the bias $b_f$ that a training starts
# from: $\sigma(0)^{50} = 8.9 \cdot 10^{-16}$, $\sigma(1)^{50} = 1.6 \cdot 10^{-7}$,
# $\sigma(5)^{50} = .71$. A half is left after $T$ steps if $\sigma(b)^T = 1/2$, so $b$ is about
# $\ln(T/\ln 2)$ (after Tallec and Ollivier 2018): 4.28 for $T = 50$ (exactly 4.27), 7.03 for 784.

# %%
bias, for_784 = map(kg.bptt.forget_bias_for_horizon, (50, 784))
exact, half_life = -np.log(2 ** (1 / 50) - 1), np.log(0.5) / np.log(sigmoid(1))
left = {b: products(np.ones(51), forget_bias=b)[-1] for b in (0.0, 1.0, bias, 5.0)}
for b, product in left.items():
    print(f"b = {b:.2f}: {product:.1e} left after 50 steps")
print(f"a half: b = {bias:.2f}, exactly {exact:.2f}; after 784 steps: b = {for_784:.2f}")
assert np.allclose(list(left.values()), [8.9e-16, 1.6e-7, 0.5, 0.71], rtol=0.03)
assert f"{bias:.2f} {exact:.2f} {for_784:.2f} {half_life:.1f}" == "4.28 4.27 7.03 2.2"

# %% [markdown]
# Does it matter in a training? In the adding problem (tutorial 3) of 100 steps, a constant answer
# has an error of 1/6. Three forget biases, and the tanh form with the third, $\ln(100/\ln 2)$;
# `reach` is $\lVert \partial L/\partial S_1 \rVert / \lVert \partial L/\partial S_T \rVert$:


# %%
def remedy(b):
    def make_layer(units, timesteps, **options):
        return kg.layers.SimplifiedLSTM(units, project_input=True, forget_bias=b, **options)

    return kg.remedies.Remedy(f"simplified LSTM, forget bias {b}", make_layer, clips=True)


long, tanh = (kg.remedies.REMEDIES[name] for name in ("simplified_lstm", "simplified_lstm_tanh"))
remedies = {"b = 0": remedy(0), "b = 1": remedy(1), "b = 4.97": long, "b = 4.97, tanh": tanh}
if QUICK:
    del remedies["b = 1"], remedies["b = 4.97, tanh"]
task = kg.tasks.adding_problem(samples=320 if QUICK else 2000, timesteps=100)
result = kg.compare(task, remedies, units=32, steps=10 if QUICK else 900, verbose=0)
for run in result.runs:
    print(f"{run.remedy:15s} reach {run.reach:.0e}, held-out mse {run.final_loss:.4f}")
runs = {run.remedy: run for run in result.runs}
assert runs["b = 0"].reach < 1e-9 and runs["b = 4.97"].reach > 0.4
if not QUICK:
    assert [name for name, run in runs.items() if run.final_loss < 0.1] == ["b = 4.97"]
    assert runs["b = 4.97"].final_loss < 0.05
kg.plots.plot_compared_state_norms({name: run.history for name, run in runs.items()})
plt.show()

# %% [markdown]
# In this one run, the long horizon without tanh ends below .05, the others not below .1.
#
# **Question.** At $b = 1$, Keras's default, how many steps does a half last?
#
# <details><summary>Answer</summary>
# ln .5 / ln σ(1) = 2.2 steps.
# </details>

# %% [markdown]
# ## The full LSTM beside it
#
# The gates of Keras's LSTM also see $h_{t-1}$, through a recurrent kernel $R$. So
# $f_t = \sigma(W_f x_t + R_f h_{t-1} + b_f)$, $i_t$ and $o_t$ likewise, and
#
# $$c_t = f_t \odot c_{t-1} + i_t \odot \tanh(W_c x_t + R_c h_{t-1} + b_c), \qquad
#   h_t = o_t \odot \tanh(c_t)$$
#
# Its state is the pair $(h, c)$. $\partial c_t/\partial c_{t-1} = \operatorname{diag}(f_t)$, as in
# the simplified cell: no tanh on this path. But its Jacobian has extra terms, and since
# $\partial c_t/\partial h_{t-1}$ contains $R$, the product **can** explode. Here $R$, and the
# simplified cell's kernels, are 8 times a fresh layer's.

# %%
x = rng.normal(scale=0.3, size=(4, 100, 4)).astype("float32")
lstm, simple = keras.layers.LSTM(32), kg.layers.SimplifiedLSTM(32, project_input=True)
lstm.build(x.shape), simple.build(x.shape)
lstm.cell.recurrent_kernel.assign(8 * lstm.cell.recurrent_kernel)
simple.set_weights([8 * w if w.ndim == 2 else w for w in simple.get_weights()])
J, f = kg.bptt.state_jacobians(lstm, x), kg.bptt.gates(lstm, x)["forget"]
assert np.allclose(J[..., 32:, 32:], f[..., np.newaxis] * np.eye(32), atol=1e-6)  # h, then c.
extra = np.linalg.norm(J[:, 1:, 32:, :32], ord=2, axis=(2, 3)).mean()
print(f"mean σ_max: {f.max(axis=2).mean():.2f} of ∂c_t/∂c_(t-1), {extra:.1f} of ∂c_t/∂h_(t-1)")
ax = plt.subplots(layout="constrained")[1]
for style, name, layer in zip(styles(), ("LSTM", "SimplifiedLSTM"), (lstm, simple), strict=False):
    spectrum = kg.bptt.jacobian_spectrum(layer, x, steps=[1, 3, 10, 30, 100])
    largest = np.exp(np.median(spectrum.log_singular_values[..., 0], axis=0))
    assert largest[3] > 100 if layer is lstm else largest.max() <= 1
    ax.semilogy(spectrum.steps, largest, label=f"{name}, {largest[3]:.1e} at t = 30", **style)
ax.set(xlabel="time step t", ylabel="largest singular value of J_t···J_1, median of 4 examples")
ax.legend(handlelength=4)
plt.show()

# %% [markdown]
# **Question.** Which of the two would you take?
#
# <details><summary>Answer</summary>
# The simplified cell keeps a gradient safely, but is blind to what it has stored: a gate that sees
# the input alone cannot say "the second time only". Tutorial 7 has a task for each.
# </details>
