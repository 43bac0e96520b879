# %% [markdown]
# # Clipping and Ω on the temporal order problem
#
# **The paper.** Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent neural
# networks", section 4.1.1 and figure 7: 50 units, plain SGD with a learning rate of 0.01, batches
# of 20 fresh sequences, at most 5 million steps, 5 runs each. A run succeeds if fewer than 1 % of
# 10 000 sequences are misclassified. Three starts: "sigmoid" (weights from N(0, 0.01²)), "tanh"
# (N(0, 0.1²)) and "smart tanh" (15 recurrent weights a unit, the spectral radius .95, other weights
# N(0, 0.01²)). Three trainings: SGD, SGD clipped at a gradient norm of 1, and that with the
# regularizer Ω. Their figure 7 shows the success rate by T: it falls as T grows, later with
# clipping than without, and latest with Ω.
#
# All but the figure's curves was checked against the paper's text, and against the authors' code
# (github.com/pascanur/trainingRNNs). The code tells that the 0.01 and 0.1 of the paper's N(0, 0.01)
# and N(0, 0.1) are standard deviations. The two differ thrice: α is 4 for Ω in the paper, and 2 in
# the code; a run of the code ends without a single error among the 10 000, not at 1 %; and its
# second symbol comes between 5 T/10 and 6 T/10, where the paper's text has just "middle", and the
# task here 4 T/10 to 5 T/10.
#
# **Ours, scaled down.** The same network, learning rate, batch size, threshold, the paper's
# criterion, the code's Ω (equation 10, α = 2), the three starts, T = 10 to 50. Three runs each
# instead of five; at most 5000 steps instead of 5 million, which is what 20 minutes on two cores
# allow: a step takes about 2 ms. The training set is 10 000 sequences, gone through anew each 500
# steps, after which the criterion is checked; theirs are always fresh, and checked each 20 steps.
# The output layer starts as Keras's does. In an earlier pilot the sigmoid start had learned nothing
# after 10 000 steps at T = 20, even with Ω: it is here since it is the paper's, and a rate of 0 is
# a result. An earlier run of this script, with the same seeds, had T = 20, 30, 40 and no sigmoid
# start, and the one after it 6000 steps, which took 24 minutes; the other settings are theirs.
#
# **The rule**, set before the run. A success rate is over all lengths, starts and seeds, with
# Wilson's interval, as if they were alike; and, in rows of its own, over all lengths and seeds of
# one start. "A gets further than B" *agrees* if the rate of A is larger and the intervals lie
# apart, *agrees in direction* if the rate is larger but they meet, and *does not agree* otherwise.

# %%
from functools import partial

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras.initializers import RandomNormal
from record import Claim, Estimate, Script, UntilSolved, larger, rows

import kerasgrad as kg
from kerasgrad.layers import OmegaSimpleRNN, SimpleRNN
from kerasgrad.remedies import Remedy

script = Script(__file__)
SETTINGS = {
    "units": 50,
    "batch_size": 20,
    "learning_rate": 0.01,
    "momentum": 0.0,
    "global_clipnorm": 1.0,
    "omega": 2.0,
    "timesteps": [10] if script.quick else [10, 20, 30, 40, 50],
    "seeds": [11] if script.quick else [11, 12, 13],
    "steps": 20 if script.quick else 5000,
    "training_sequences": 200 if script.quick else 10_000,
    "test_sequences": 200 if script.quick else 10_000,
    "success_accuracy": 0.99,
    "nonzeros": 15,
    "spectral_radius": 0.95,
}


# %%
@keras.saving.register_keras_serializable(package="papers")
class SmartStart(keras.initializers.Initializer):
    """N(0, 1) in 15 places of each row, 0 elsewhere, scaled to the spectral radius .95."""

    def __call__(self, shape, dtype=None):
        # Keras's seed sets NumPy's, too.
        draw = np.random.default_rng(np.random.randint(2**31))
        W = draw.normal(size=shape)
        for row in W:
            row[draw.permutation(len(row))[SETTINGS["nonzeros"] :]] = 0
        W *= SETTINGS["spectral_radius"] / np.abs(np.linalg.eigvals(W)).max()
        return keras.ops.convert_to_tensor(W, dtype)

    def get_config(self):
        return {}


def solved(logs):
    return logs["val_accuracy"] > SETTINGS["success_accuracy"]


def start(name, cls, units, timesteps, **options):
    """The recurrent layer of one of the paper's starts."""
    deviation = 0.1 if name == "tanh" else 0.01
    return cls(
        units,
        activation=name.removeprefix("smart "),
        kernel_initializer=RandomNormal(stddev=deviation),
        recurrent_initializer=(
            SmartStart() if name == "smart tanh" else RandomNormal(stddev=deviation)
        ),
        **options,
    )


STARTS = ["smart tanh"] if script.quick else ["sigmoid", "tanh", "smart tanh"]
TRAININGS = ("SGD", "clipped", "clipped and Ω")
REMEDIES, MODEL = {}, partial(UntilSolved, solved=solved)
for name in STARTS:
    plain = partial(start, name, SimpleRNN)
    with_omega = partial(start, name, partial(OmegaSimpleRNN, omega=SETTINGS["omega"]))
    REMEDIES |= {
        f"{name}, SGD": Remedy(name, plain, model=MODEL),
        f"{name}, clipped": Remedy(name, plain, "global_clipnorm", model=MODEL),
        f"{name}, clipped and Ω": Remedy(name, with_omega, "global_clipnorm", model=MODEL),
    }

# %%
runs = []
for timesteps in SETTINGS["timesteps"]:
    result = kg.compare(
        kg.tasks.temporal_order(
            SETTINGS["training_sequences"],
            timesteps,
            seed=1,
            test_samples=SETTINGS["test_sequences"],
        ),
        REMEDIES,
        seeds=SETTINGS["seeds"],
        budget=SETTINGS["steps"],
        verbose=0,
        **{
            name: SETTINGS[name]
            for name in ("units", "batch_size", "learning_rate", "momentum", "global_clipnorm")
        },
        **script.keeping,
    )
    runs += rows(result, timesteps=timesteps)
for run in runs:
    # One that raised, or that diverged before the first check, has no accuracy.
    run["success"] = bool(run.get("test_accuracy", 0.0) > SETTINGS["success_accuracy"])


# %%
def rate(training, timesteps=None, name=None):
    """The success rate of a training: over all lengths and starts, or of one of them."""
    mine = [
        run["success"]
        for run in runs
        if run["remedy"].endswith(f", {training}")
        and timesteps in (None, run["timesteps"])
        and (name is None or run["remedy"].startswith(f"{name},"))
    ]
    return Estimate.share(sum(mine), len(mine))


print("success rate by T, 95 % Wilson interval")
for name in STARTS:
    for training in TRAININGS:
        cells = [f"T = {T}: {rate(training, T, name)}" for T in SETTINGS["timesteps"]]
        print(f"{name + ', ' + training:27s}" + "   ".join(cells))


# %%
def draw():
    """As the paper's figure 7: a panel a start, a line a training."""
    figure, panels = plt.subplots(
        1, len(STARTS), figsize=(10, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    # Side by side, so that no interval hides another.
    looks = zip(TRAININGS, (-0.9, 0, 0.9), ("#8c8c8c", "#0072b2", "#d55e00"), "os^", strict=True)
    for training, shift, color, marker in looks:
        for ax, name in zip(panels[0], STARTS, strict=True):
            rates = [rate(training, T, name) for T in SETTINGS["timesteps"]]
            values = np.array([each.value for each in rates])
            ends = [[each.low for each in rates], [each.high for each in rates]]
            ax.errorbar(
                np.array(SETTINGS["timesteps"]) + shift,
                values,
                yerr=np.abs(np.array(ends) - values),
                color=color,
                marker=marker,
                capsize=2,
                elinewidth=0.8,
                label=training,
            )
    for ax, name in zip(panels[0], STARTS, strict=True):
        ax.set(title=f"{name} start", xlabel="T", xticks=SETTINGS["timesteps"], ylim=(-0.03, 1.03))
        ax.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("success rate, 95 % Wilson interval")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


# %%
OURS = (
    f"T = {', '.join(map(str, SETTINGS['timesteps']))}; {len(SETTINGS['seeds'])} seeds; at most "
    f"{SETTINGS['steps']} steps; {', '.join(STARTS)}"
)


def claim(what, first, second, name=None):
    """One row: what the paper's figure 7 shows, and the rates of two trainings."""
    one, other = rate(first, name=name), rate(second, name=name)
    return Claim(
        "Pascanu, Mikolov, Bengio 2013",
        f"temporal order, 50 units, SGD 0.01: {what}",
        OURS if name is None else OURS.replace(", ".join(STARTS), name),
        "figure 7 shows a higher success rate (in direction)",
        f"success rate {one}, against {other}",
        larger(one, other),
    )


script.finish(
    SETTINGS,
    runs,
    [
        claim("clipping gets further than SGD", "clipped", "SGD"),
        claim("clipping and Ω get further than clipping", "clipped and Ω", "clipped"),
        claim("clipping and Ω get further than SGD", "clipped and Ω", "SGD"),
        *(
            claim(
                f"clipping and Ω get further than SGD, {name} start", "clipped and Ω", "SGD", name
            )
            for name in STARTS
        ),
    ],
    draw(),
)
