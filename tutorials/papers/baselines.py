# %% [markdown]
# # Two baselines, exactly
#
# A network that learns nothing about the long lag still learns the best answer that needs no
# memory, and its loss stays there. The paper draws this baseline as a line in its figures:
#
# - **Arjovsky, Shah and Bengio (2016)**, copying memory: 10 ln 8/(T + 20) nats a step. The network
#   writes blanks, and in the recall each of the 8 symbols with probability 1/8.
# - **Arjovsky, Shah and Bengio (2016)**, adding problem: a mean squared error of 0.167, that of the
#   constant answer 1, as the sum of two uniform numbers has the variance 2/12 = 1/6.
#
# Both were checked against texts that quote the paper: Tallec and Ollivier (2018), "Can recurrent
# neural networks warp time?", and public re-implementations of its tasks.
#
# **Ours.** The same tasks, at the same size: nothing is trained. The loss of the memoryless answer
# is taken by Keras's own losses over sequences of `kerasgrad.tasks`, and the constant of
# `Task.constant_loss` is compared with it.
#
# **The rule**, set before the run: a baseline *agrees* if the closed form lies within the 95 %
# interval of the sample's mean (± 1.96 standard errors; 1e-6 for rounding is added), and *does not
# agree* otherwise. For copying every sequence has the same loss, so that the interval is rounding
# alone.

# %%
import math

import keras
import numpy as np
from record import AGREES, DOES_NOT, Claim, Estimate, Script

import kerasgrad as kg

script = Script(__file__)
SETTINGS = {
    "copying_timesteps": [100] if script.quick else [100, 200, 300, 500],
    "adding_timesteps": [100] if script.quick else [100, 200, 400, 750],
    "sequences": 200 if script.quick else 5000,
    "symbols": 8,
    "length": 10,
    "seed": 1,
}
ROUNDING = 1e-6


# %%
def estimate(losses):
    """The mean of the losses, one a sequence, and its interval."""
    mean = float(np.mean(losses))
    spread = 1.96 * float(np.std(losses, ddof=1)) / math.sqrt(len(losses)) + ROUNDING
    return Estimate(mean, mean - spread, mean + spread)


def copying(timesteps):
    """(closed form, sample): nats a step, of the best answer without memory of the symbols."""
    symbols, length = SETTINGS["symbols"], SETTINGS["length"]
    task = kg.tasks.copying_memory(
        1, timesteps, seed=SETTINGS["seed"], test_samples=SETTINGS["sequences"]
    )
    answer = np.zeros((task.timesteps, task.outputs), np.float32)
    answer[:-length, symbols] = 1  # blank
    answer[-length:, :symbols] = 1 / symbols
    losses = keras.losses.sparse_categorical_crossentropy(
        task.y_test, np.broadcast_to(answer, (len(task.y_test), *answer.shape))
    )
    closed = length * math.log(symbols) / (timesteps + 2 * length)
    assert math.isclose(closed, task.constant_loss)
    return closed, estimate(np.asarray(losses).mean(axis=1))


def adding(timesteps):
    """(closed form, sample): mean squared error of the constant answer 1."""
    task = kg.tasks.adding_problem(
        1, timesteps, seed=SETTINGS["seed"], test_samples=SETTINGS["sequences"]
    )
    losses = keras.losses.mean_squared_error(task.y_test, np.ones_like(task.y_test))
    assert math.isclose(1 / 6, task.constant_loss)
    return 1 / 6, estimate(np.asarray(losses))


def verdict(closed, sample):
    return AGREES if sample.low <= closed <= sample.high else DOES_NOT


# %%
runs, verdicts = [], {}
for measure, name in ((copying, "copying"), (adding, "adding")):
    for timesteps in SETTINGS[f"{name}_timesteps"]:
        closed, sample = measure(timesteps)
        told = verdict(closed, sample)
        verdicts.setdefault(name, []).append(told)
        runs.append(
            {
                "task": name,
                "timesteps": timesteps,
                "closed_form": closed,
                "sample": sample.value,
                "low": sample.low,
                "high": sample.high,
                "verdict": told,
            }
        )
        print(f"{name:8s} T = {timesteps:3d}: {closed:.6f}, sample {sample.value:.6f}, {told}")


# %% [markdown]
# A baseline agrees if it does so at each T.


# %%
def claim(task, papers_number, setting):
    mine = [run for run in runs if run["task"] == task]
    numbers = ", ".join(
        f"T = {run['timesteps']}: {run['sample']:.5f} [{run['low']:.5f}, {run['high']:.5f}]"
        for run in mine
    )
    return Claim(
        "Arjovsky, Shah, Bengio 2016",
        setting,
        f"the same; {SETTINGS['sequences']} sequences a T, nothing trained",
        papers_number,
        numbers,
        AGREES if set(verdicts[task]) == {AGREES} else DOES_NOT,
    )


script.finish(
    SETTINGS,
    runs,
    [
        claim("copying", "10 ln 8/(T + 20)", "copying, 10 of 8 symbols: answer without memory"),
        claim("adding", "0.167, which is 1/6", "adding problem: constant answer"),
    ],
)
