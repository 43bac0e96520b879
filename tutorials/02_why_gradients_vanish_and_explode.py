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
# # Why gradients vanish and explode
#
# On its way back through a recurrent network, a gradient is multiplied by one matrix a time step,
# the *Jacobian*. Factors below 1 make a long product tiny, factors above 1 make it huge. This
# tutorial measures what they are: not $\tanh'$ alone, nor the size or the eigenvalues of $W$ alone.
# It ends with a map of where gradients vanish and explode. Run time: 20 seconds on two cores.

# %%
import os

import keras
import matplotlib.pyplot as plt
import numpy as np

import kerasgrad as kg

QUICK = os.environ.get("KERASGRAD_QUICK") == "1"  # A short form, for the tests.
keras.config.set_floatx("float64")  # Products of a hundred small factors leave float32.
rng = np.random.default_rng(0)

# %% [markdown]
# ## The story of 0.8
#
# For $s_t = \tanh(a_t)$ with $a_t = U x_t + W s_{t-1}$, the chain rule gives
#
# $$\frac{\partial s_t}{\partial s_{t-\ell}} = J_t J_{t-1} \cdots J_{t-\ell+1},
#   \qquad J_t = \operatorname{diag}(\tanh'(a_t))\, W$$
#
# The source article looks at $\tanh'$: at most 1, and 1 only at 0, so "the product is mostly over
# numbers below 1" and vanishes. Its example is $0.8^{50}$.

# %%
kg.plots.plot_tanh()
plt.show()
print(f"0.8 ** 50 = {0.8**50:.7e}")
assert f"{0.8**50:.7e}" == "1.4272477e-05"

# %% [markdown]
# But each factor has $W$ in it. One unit with $\tanh' = 0.8$ at each step and $W = 1.25$ has
# $0.8 \cdot 1.25 = 1$. We build it: the input holds the state at $s = \sqrt{0.2}$, where
# $\tanh' = 1 - s^2 = 0.8$. `kg.bptt.state_jacobians` gives $J_t$ of any Keras recurrent layer.


# %%
def layer(W, activation="tanh"):
    """s_t = Φ(x_t + W s_{t-1})."""
    W = np.atleast_2d(W)
    rnn = kg.layers.SimpleRNN(len(W), activation, use_bias=False)
    rnn.build((None, None, len(W)))
    rnn.set_weights([np.eye(len(W)), W.T])  # Keras multiplies row vectors from the left.
    return rnn


s = np.sqrt(0.2)
for W in (1.0, 1.25, 1.5):
    x = np.full((1, 51, 1), np.arctanh(s) - W * s)
    x[0, 0] = np.arctanh(s)  # s_0 = 0
    J = kg.bptt.state_jacobians(layer(W), x)[0, 1:, 0, 0]
    print(f"W = {W:.2f}: tanh' = {J.mean() / W:.2f}, product of 50 Jacobians {J.prod():.3g}")
    assert np.allclose(J, 0.8 * W)

# %% [markdown]
# **Question.** The derivative of the sigmoid is at most 1/4. How large must $W$ be for one sigmoid
# unit whose gradient does not vanish?
#
# <details><summary>Answer</summary>
# At least 4, and that only if the unit stays at σ = ½, where the derivative is largest.
# </details>

# %% [markdown]
# ## Below the bound everything vanishes
#
# With many units, the size of a matrix is how much it can stretch a vector: its largest *singular
# value*, $\sigma_{\max}$. With $\gamma$ the largest value of $\Phi'$ (1 for tanh, 1/4 for the
# sigmoid), every step obeys (Pascanu, Mikolov and Bengio 2013, section 2.1)
#
# $$\lVert J_t \rVert \le \gamma\, \sigma_{\max}(W)$$
#
# So $\sigma_{\max}(W) < 1/\gamma$ is *sufficient* to vanish, whatever the input:
# $\lVert \partial s_t/\partial s_{t-\ell} \rVert \le (\gamma\,\sigma_{\max})^\ell$.

# %%
W = rng.normal(size=(32, 32))
W *= 0.95 / np.linalg.norm(W, 2)  # σ_max(W) = 0.95
for activation, γ in (("tanh", 1), ("sigmoid", 1 / 4)):
    for size in (0.1, 1.0):
        x = size * rng.normal(size=(4, 50, 32))
        J = kg.bptt.state_jacobians(layer(W, activation), x)
        norms = np.linalg.norm(J, 2, axis=(-2, -1))
        print(f"{activation:7} input {size}: ‖J_t‖ up to {norms.max():.3f}, bound {γ * 0.95:.3f}")
        assert norms.max() <= γ * 0.95 + 1e-12

# %% [markdown]
# The bound is reached where nothing bends (linear units) and all directions are stretched alike,
# $W = \sigma Q$ with an orthogonal matrix $Q$ (a rotation). For $L = c^\top s_T$ then
# $\lVert \partial L/\partial s_{T-\ell} \rVert = \sigma^\ell \lVert c \rVert$ exactly.
# `kg.bptt.state_gradients` gives $\partial L/\partial s_t$ in a model.


# %%
def state_gradients(rnn, x):
    """∂L/∂s_t for L = cᵀ s_T with a random c: (batch, T, units)."""
    model = keras.Sequential([rnn, keras.layers.Dense(1, use_bias=False)])
    model.build(x.shape)
    model.layers[1].set_weights([rng.normal(size=(rnn.units, 1))])
    model.compile(loss=lambda y, y_pred: y_pred)
    return kg.bptt.state_gradients(model, x, np.zeros((len(x), 1)))["h"]


RATIO = r"$\|∂L/∂s_{T-ℓ}\|\;/\;\|∂L/∂s_T\|$"
Q, _ = np.linalg.qr(rng.normal(size=(32, 32)))
T = 50
ax = plt.subplots(layout="constrained")[1]
for σ, color, ls in ((1.1, "#D55E00", "--"), (1.0, "#009E73", "-."), (0.9, "#0072B2", "-")):
    λ = np.linalg.norm(state_gradients(layer(σ * Q, "linear"), np.ones((1, T, 32))), axis=-1)[0]
    ratio = λ[::-1] / λ[-1]
    ax.plot(ratio, color=color, ls=ls, label=f"σ = {σ}: {ratio[-1]:.3g} after {T - 1} steps")
    assert np.allclose(ratio, σ ** np.arange(T))
ax.set(yscale="log", xlabel="lag ℓ in time steps", ylabel=RATIO)
ax.legend()
plt.show()

# %% [markdown]
# **Question.** With σ = 0.9, after how many steps is a thousandth of the gradient left?
#
# <details><summary>Answer</summary>
# ln(1000)/ln(1/0.9) = 66.
# </details>

# %% [markdown]
# ## Above the bound nothing is certain
#
# "If $W$ is too large, the gradient explodes": $\sigma_{\max}(W) > 1/\gamma$ is *necessary* to
# explode, but not sufficient. A large state *saturates* tanh, $\tanh' = 1 - s^2 \to 0$. The same
# $W = 2Q$ with small and with large inputs ("saturated": the share of units and steps at which
# $\tanh' < 0.05$; "first/last": the norm of $\partial L/\partial s_1$ over that of
# $\partial L/\partial s_T$):

# %%
reached = []
for size in (0.1, 1.0, 3.0, 10.0):
    x = size * rng.normal(size=(8, T, 32))
    λ = np.linalg.norm(state_gradients(layer(2 * Q), x), axis=-1)
    reached.append(np.median(λ[:, 0] / λ[:, -1]))
    saturated = kg.bptt.saturation(layer(2 * Q), x)["h"].mean()
    print(f"inputs of size {size:4}: saturated {saturated:3.0%}, first/last {reached[-1]:.0e}")
assert reached[0] > 1e3 and reached[-1] < 1e-3

# %% [markdown]
# The converse trap: often the *eigenvalues* of $W$ are said to decide. The size of the largest is
# called the spectral radius, $\rho$. They decide in the end, but not soon. This matrix has
# $\rho = 0.9$, so $W^k \to 0$; on the way it stretches by up to 38.7, since $W^k$ has
# $10\,k \cdot 0.9^{k-1}$ in its corner. `kg.bptt.jacobian_spectrum` gives the singular values of
# $J_k \cdots J_1$, here $W^k$.

# %%
W = np.array([[0.9, 10.0], [0.0, 0.9]])
k = np.arange(1, 151)
spectrum = kg.bptt.jacobian_spectrum(layer(W, "linear"), np.ones((1, 150, 2)), steps=k)
largest = np.exp(spectrum.log_singular_values[0, :, 0])
ax = plt.subplots(layout="constrained")[1]
ax.plot(k, largest, color="#0072B2", label="‖W^k‖")
ax.plot(k, 0.9**k, color="#D55E00", ls="--", label="0.9^k, what the eigenvalues promise")
ax.axhline(1, color="grey", lw=0.8)
ax.set(yscale="log", xlabel="k, time steps", ylabel="largest singular value")
ax.legend()
plt.show()
peak = largest.argmax()
print(f"‖W^k‖ is largest at k = {k[peak]}: {largest[peak]:.1f}; at k = 20 it is {largest[19]:.0f}")
assert np.isclose(largest[peak], np.linalg.norm(np.linalg.matrix_power(W, 9), 2))
assert (k[peak], round(largest[peak], 1), round(largest[19])) == (9, 38.7, 27)

# %% [markdown]
# **Question.** A network with this $W$ reads sequences of 20 steps. Vanishing or exploding?
#
# <details><summary>Answer</summary>
# Exploding: at k = 20 the norm is 27. What counts is the product over the steps that there are.
# </details>

# %% [markdown]
# ## The mean factor: Lyapunov exponents
#
# What a long product does on average is its growth *rate*, the largest Lyapunov exponent
#
# $$\lambda_1 = \lim_{T \to \infty} \frac{1}{T} \ln \lVert J_T \cdots J_1 \rVert$$
#
# in nats a step: a gradient grows as $e^{\lambda_1 \ell}$ or, with $\lambda_1 < 0$, vanishes so.
# There is one exponent for each direction. For linear units $\lambda_1 = \ln \rho(W)$; with tanh it
# depends on the input, too. `kg.bptt.lyapunov_exponents` measures them by QR factorizations
# (Engelken, Wolf and Abbott 2023), and the slope of a gradient must agree.

# %%
exponents = kg.bptt.lyapunov_exponents(layer(W, "linear"), np.ones((1, 400, 2)), burn_in=200)
print("trap:", exponents.round(3), " ln 0.9 =", np.log(0.9).round(3))
assert np.allclose(exponents, np.log(0.9), atol=0.01)

W = 1.5 * rng.normal(size=(32, 32)) / np.sqrt(32)
x = rng.normal(size=(4, 30 if QUICK else 100, 32))
exponents = kg.bptt.lyapunov_exponents(layer(W), x, burn_in=10)
λ = np.linalg.norm(state_gradients(layer(W), x), axis=-1)
slope = np.log(λ[:, 0] / λ[:, -1]).mean() / (x.shape[1] - 1)
print(f"tanh, 32 units: λ_1 = {exponents[0]:.3f} nats a step; slope of the gradient {slope:.3f}")
assert abs(slope - exponents[0]) < 0.1
spectrum = kg.bptt.jacobian_spectrum(layer(W), x)
kg.plots.plot_jacobian_spectrum(spectrum, lyapunov_exponents=exponents)
plt.show()

# %% [markdown]
# **Question.** The lowest lines fall much faster than the uppermost. What does that mean for a
# gradient of 32 numbers?
#
# <details><summary>Answer</summary>
# Far back, only its part along a few slow directions is left: it loses most of what it says.
# </details>

# %% [markdown]
# ## The map
#
# How does the factor depend on the size of $W$? Take random weights $W_{ij} \sim N(0, g^2/n)$, with
# $g$ the *gain*, and inputs $x_t \sim N(0, v)$. With many units $n$ each $a_t$ is a sum of many
# small terms, so it is normal, with variance $q$, and a gradient's mean square is multiplied by
# $\chi$ a step (Poole et al. 2016; Schoenholz et al. 2017; for RNNs Chen et al. 2018):
#
# $$q = g^2\, \mathbb{E}[\tanh^2(\sqrt q z)] + v, \qquad
#   \chi = g^2\, \mathbb{E}[\tanh'(\sqrt q z)^2], \qquad z \sim N(0, 1)$$
#
# After $\ell$ steps the norm is multiplied by about $\chi^{\ell/2}$, so gradients vanish where
# $\chi < 1$, and $\lambda_1 \approx \frac12 \ln \chi$. (At the edge, where nothing wins, the chance
# in $W$ tells most: $n$ is not infinite.)


# %%
def growth(g, v):
    """χ for an array of gains, by sums over z in place of the integrals."""
    z = np.linspace(-6, 6, 301)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    q = np.ones_like(g)
    for _ in range(2000):
        q = g**2 * (np.tanh(np.sqrt(q)[:, np.newaxis] * z) ** 2 @ density) + v
    return g**2 * (np.cosh(np.sqrt(q)[:, np.newaxis] * z) ** -4.0 @ density)


def measured(g, v, n, T):
    """log10 of ‖∂L/∂s_{T-ℓ}‖ / ‖∂L/∂s_T‖ for ℓ = 0..T-1, median over 8 sequences."""
    W = g * rng.normal(size=(n, n)) / np.sqrt(n)
    x = np.sqrt(v) * rng.normal(size=(8, 50 + T, n))
    x[:, 0] = rng.normal(size=(8, n))  # Something to start from where v = 0.
    λ = np.linalg.norm(state_gradients(layer(W), x), axis=-1)[:, : -T - 1 : -1]
    return np.median(np.log10(λ / λ[:, :1]), axis=0)


n, T, gains = (64, 30, np.linspace(0.5, 3, 4)) if QUICK else (256, 100, np.linspace(0.5, 3, 11))
fine = np.linspace(0.5, 3, 51)
fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
for ax, v, name in zip(axes, (0.0, 1.0), ("no input", "inputs of variance 1"), strict=True):
    logs = np.array([measured(g, v, n, T) for g in gains])  # (gains, lags)
    image = ax.pcolormesh(gains, np.arange(T), logs.T, vmin=-6, vmax=6, cmap="cividis")
    decades = 0.5 * np.log10(growth(fine, v))  # a step
    edge = np.interp(0, decades, fine)
    ax.axvline(edge, color="white", ls=":", label="theory, 1 at every lag")
    for end, marker, color in ((-3, "o", "white"), (3, "^", "black")):
        side = end * decades > 0
        ax.plot(fine[side], end / decades[side], color=color, label=f"theory, $10^{{{end}}}$")
        crossed = logs * np.sign(end) >= abs(end)
        lag = np.where(crossed.any(axis=1), crossed.argmax(axis=1), np.nan)
        ax.plot(gains, lag, marker, color=color, mec="grey", label=f"measured, $10^{{{end}}}$")
    ax.set(ylim=(0, T - 1), xlabel="gain g of W", title=name)
    error = np.abs(logs[:, -1] / (T - 1) - 0.5 * np.log10(growth(gains, v))).max()
    print(f"{name}: edge at g = {edge:.2f}; slopes differ by up to {error:.3f} decades a step")
    assert error < 0.06 and abs(edge - (1.86 if v else 1.0)) < 0.02
axes[0].set_ylabel("lag ℓ in time steps")
lines = axes[0].get_legend_handles_labels()
fig.legend(*lines, loc="outside lower center", ncols=5, facecolor="darkgrey")
fig.colorbar(image, ax=axes, label=f"log₁₀ {RATIO}", extend="both")
plt.show()
W = rng.normal(size=(256, 256)) / np.sqrt(256)
σ_max, ρ = np.linalg.norm(W, 2), np.abs(np.linalg.eigvals(W)).max()
print(f"gain 1: σ_max = {σ_max:.2f}, ρ = {ρ:.2f}")
assert abs(σ_max - 2) < 0.1 and abs(ρ - 1) < 0.1

# %% [markdown]
# **Question.** Where on the map is the bound $\sigma_{\max} = 1$, and where the edge $\rho = 1$?
#
# <details><summary>Answer</summary>
# The bound at g = 1/2: to the left of it all must vanish. ρ = 1 at g = 1, which is the edge without
# input only. With input the edge is at g = 1.86, where σ_max = 3.7: large, and nothing explodes.
# </details>
