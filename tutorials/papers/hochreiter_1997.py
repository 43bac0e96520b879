# %% [markdown]
# # The adding problem of the first LSTM
#
# **The paper.** Hochreiter and Schmidhuber (1997), "Long short-term memory", section 5.4, table 7.
# Each sequence has T to 1.1 T steps of two inputs: numbers from [-1, 1], and a mark. Two numbers
# are marked with 1: one of the first ten, and one of the first T/2 - 1 that are left. Both ends
# have the mark -1, and a marked first number is 0. The target is 0.5 + (X1 + X2)/4. An answer is
# right if it is off by less than 0.04. A training is over when the mean error is below 0.01 and
# each of the 2000 most recent sequences was answered right. At T = 100 that took 74 000 sequences,
# the mean of 10 runs, with 4 cells in 2 blocks (93 weights), one sequence a step, plain SGD with a
# learning rate of 0.5, gates that see the cells' outputs too. (All of this was checked against the
# paper's text.)
#
# **Ours.** The task, T, and the criterion are the paper's. The cell is the article's: a forget
# gate, gates that see the input only, no squashing, 16 units (193 weights). It is trained by SGD
# with momentum, clipnorm, in batches of 20 sequences, with full backpropagation through time. The
# criterion is checked after each 1000 fresh sequences, on these before they are trained on; at most
# 120 000 sequences. Shorter sequences are padded with zeros at the beginning, which leave the
# linear cell's state at 0 and so change nothing. "Mean error" is taken as the mean absolute error.
#
# **The rule**, set before the run, for the median number of sequences until the criterion holds (a
# run that never gets there counts as Inf): it *agrees* if the paper's 74 000 lies within its 95 %
# interval; it *agrees in direction* if half of the runs succeed at least (the median is a number,
# as cell, optimizer and batches are not the paper's); and it *does not agree* otherwise. For "the
# problem is solved": it *agrees* if each run succeeds, in direction if half do.

# %%
import math

import keras
import numpy as np
from record import AGREES, DOES_NOT, IN_DIRECTION, Claim, Estimate, Script

import kerasgrad as kg
from kerasgrad.memory import forget_bias_for_horizon

script = Script(__file__)
SETTINGS = {
    "timesteps": 20 if script.quick else 100,
    "units": 16,
    "batch_size": 20,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "clipnorm": 0.2,
    "block": 100 if script.quick else 1000,
    "recent": 200 if script.quick else 2000,
    "most_sequences": 300 if script.quick else 120_000,
    "right_below": 0.04,
    "mean_error_below": 0.01,
    "seeds": [21] if script.quick else list(range(21, 31)),
}
PAPERS_SEQUENCES = 74_000


# %%
def draw(rng, n, timesteps):
    """n sequences of the task, (n, 1.1 T, 2), padded at the beginning, and their targets."""
    longest = timesteps + timesteps // 10
    x, y = np.zeros((n, longest, 2), np.float32), np.zeros((n, 1), np.float32)
    for sequence, target in zip(x, y, strict=True):
        used = sequence[longest - rng.integers(timesteps, longest + 1) :]
        used[:, 0] = rng.uniform(-1, 1, len(used))
        used[[0, -1], 1] = -1
        first = rng.integers(10)
        second = rng.choice(np.delete(np.arange(timesteps // 2), first)[: timesteps // 2 - 1])
        if first == 0 or second == 0:
            used[0, 0] = 0
        used[[first, second], 1] = 1
        target[:] = 0.5 + used[[first, second], 0].sum() / 4
    return x, y


def train(seed, settings):
    """One training: the sequences until the criterion holds, or None, and the mean errors."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    units, timesteps = settings["units"], settings["timesteps"]
    bias = forget_bias_for_horizon(timesteps)
    model = keras.Sequential(
        [
            keras.layers.Input((timesteps + timesteps // 10, 2)),
            kg.layers.SimplifiedLSTM(units, project_input=True, forget_bias=bias),
            keras.layers.Dense(1),
        ]
    )
    optimizer = keras.optimizers.SGD(
        settings["learning_rate"], settings["momentum"], clipnorm=settings["clipnorm"]
    )
    model.compile(optimizer, loss="mse")
    block, recent, means = settings["block"], np.empty(0), []
    for sequences in range(0, settings["most_sequences"] + 1, block):
        x, y = draw(rng, block, timesteps)
        error = np.abs(model.predict(x, batch_size=500, verbose=0) - y)[:, 0]
        recent = np.concatenate([recent, error])[-settings["recent"] :]
        means.append(float(error.mean()))
        if (
            len(recent) == settings["recent"]
            and recent.max() < settings["right_below"]
            and recent.mean() < settings["mean_error_below"]
        ):
            return {"seed": seed, "sequences": sequences, "mean_errors": means}
        if not np.isfinite(error).all():
            break
        model.fit(x, y, batch_size=settings["batch_size"], epochs=1, verbose=0)
    return {"seed": seed, "sequences": None, "mean_errors": means}


# %%
runs = script.trained(train, [(seed, SETTINGS) for seed in SETTINGS["seeds"]])
for run in runs:
    print(f"seed {run['seed']}: {run['sequences']}, mean error {run['mean_errors'][-1]:.4f}")

# %%
counts = [math.inf if run["sequences"] is None else run["sequences"] for run in runs]
solved = sum(math.isfinite(count) for count in counts)
sequences, share = Estimate.median(counts), Estimate.share(solved, len(runs))


def verdict_of_success():
    if solved == len(runs):
        return AGREES
    return IN_DIRECTION if 2 * solved >= len(runs) else DOES_NOT


def verdict_of_number():
    if sequences.low <= PAPERS_SEQUENCES <= sequences.high:
        return AGREES
    return IN_DIRECTION if math.isfinite(sequences.value) else DOES_NOT


OURS = (
    f"the paper's task and criterion, T = {SETTINGS['timesteps']}; the article's cell, "
    f"{SETTINGS['units']} units, batches of {SETTINGS['batch_size']}; {len(runs)} runs of at most "
    f"{SETTINGS['most_sequences']} sequences"
)
PAPER = "Hochreiter, Schmidhuber 1997"
script.finish(
    SETTINGS,
    runs,
    [
        Claim(
            PAPER,
            "adding problem, T = 100, LSTM: solved",
            OURS,
            "solved (table 7)",
            f"{solved} of {len(runs)} runs: {share}",
            verdict_of_success(),
        ),
        Claim(
            PAPER,
            "adding problem, T = 100, LSTM: sequences until solved",
            OURS,
            "74 000 (table 7)",
            f"median {sequences.value:.0f} [{sequences.low:.0f}, {sequences.high:.0f}]",
            verdict_of_number(),
        ),
    ],
)
