"""What a record of gradient norms and losses shows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kerasgrad.diagnosis import advice
from kerasgrad.diagnosis.finding import CONVENTION, Finding
from kerasgrad.diagnosis.rules import Case, Rule, rule
from kerasgrad.diagnosis.sources import autotrainer, smdebug
from kerasgrad.history import GradientHistory

EXPLODING_AFTER = 10  # steps that make up a mean
# A NaN came without notice after norms of at most 10 times their median, and of less than 1000.
SUDDEN_RATIO, SUDDEN_NORM = 10.0, 1000.0
SPIKE_WINDOW = 50  # losses that make up a median
SPIKE_RATIO = 1.5  # a spike is at least so many times the median


@rule(
    "non_finite",
    needs=["rows"],
    severity="error",
    kerasgrad=(np.inf, "NaN and Inf are no numbers"),
    smdebug=(np.inf, smdebug("ExplodingTensor", "NaN or Inf")),
    autotrainer=(np.inf, autotrainer("NaN or Inf in loss or gradients")),
)
def non_finite(case: Case, rule: Rule) -> Iterator[Finding]:
    """A gradient norm or a loss that is NaN or Inf: the first step, the first weight."""
    history = case.history
    loss = history.loss[:, np.newaxis]
    if np.isnan(loss).all():  # The train step did not tell it.
        loss = np.zeros_like(loss)
    names = ("loss", *history.weights)
    # A step that was skipped, as a LossScaleOptimizer does while it looks for its scale, is none.
    counts = history.updated[:, np.newaxis] & ~history.missing
    values = np.concatenate([loss, np.where(counts, history.norms, 0)], axis=1)
    bad = ~np.isfinite(values)
    rows = np.flatnonzero(bad.any(axis=1))
    if len(rows) == 0:
        return
    first = rows[0]
    # A NaN loss has NaN gradients; the weight whose gradient was first says more.
    column = np.flatnonzero(bad[first])[-1]
    before = history.global_norm[:first]
    after = f", after a largest global norm of {before.max():.3g} before clipping" if first else ""
    bad_examples = case.measured.nonfinite_examples if case.measured is not None else 0
    if bad_examples:
        after += f"; {bad_examples} of the examples given are not finite themselves"
    # What explodes is large before it is NaN; a bad example comes without notice.
    is_sudden = first > 0 and before[-3:].max() <= min(
        SUDDEN_RATIO * np.median(before), SUDDEN_NORM
    )
    if bad_examples or is_sudden:
        change = advice.FINITE_EXAMPLES
    else:  # What was usual in a training that fails may have been too much already.
        change = advice.clip_at(min(1.0, np.median(before)) if first else 1.0)
    yield rule.finding(
        names[column],
        case.steps(rows),
        ("NaN" if np.isnan(values[first, column]) else "Inf") + after,
        change,
    )


@rule("exploding", needs=["rows"], kerasgrad=(100.0, CONVENTION))
def exploding(case: Case, rule: Rule) -> Iterator[Finding]:
    """global_norm[i] > threshold · the geometric mean of global_norm[:i], from i = 10 on."""
    norms = case.history.global_norm
    usable = np.isfinite(norms) & (norms > 0)
    logs = np.where(usable, np.log(np.where(usable, norms, 1)), 0)
    count = np.cumsum(usable) - usable
    usual = np.exp((np.cumsum(logs) - logs) / count)
    ratio = np.where(usable & (count >= EXPLODING_AFTER), norms / usual, 0)
    rows = np.flatnonzero(ratio > rule.threshold)
    if len(rows) == 0:
        return
    worst = rows[np.argmax(norms[rows])]
    # Where clipping was on and the norms grew all the same, clipping will not mend it.
    clipped = case.history.clipped[rows].mean() > 0.5
    yield rule.finding(
        "all weights",
        case.steps(rows),
        f"global norm up to {norms[worst]:.2g} before clipping at step {case.history.step[worst]}, "
        f"{ratio[worst]:.2g} times the geometric mean of the steps before "
        f"(more than {rule.threshold:g})",
        case.scaled_learning_rate(0.1) if clipped else advice.clip_at(usual[rows[0]]),
    )


@rule("exploding", needs=["rows"], autotrainer=(70.0, autotrainer("β3 = 70")))
def exploding_towards_the_input(case: Case, rule: Rule) -> Iterator[Finding]:
    """median of the first kernel's gradient norm over the last one's, where nothing is learned."""
    first, last, ratio = _first_kernel_over_last(case.history)
    large = np.isfinite(ratio) & (ratio > rule.threshold)
    if case.learns or not _in_most(large, ratio):
        return
    yield rule.finding(
        first,
        case.steps(np.flatnonzero(large)),
        f"its gradient norm is {np.median(ratio[large]):.2g} times that of {last} "
        f"(more than {rule.threshold:g})",
        advice.clip_at(np.median(case.history.global_norm[large])),
    )


@rule("loss_spikes", needs=["loss"], kerasgrad=(15.0, CONVENTION))
def loss_spikes(case: Case, rule: Rule) -> Iterator[Finding]:
    """Losses above the running median by more than 15 times the running median deviation.

    Two at least: one may be chance, or the end of the training. In logarithms where all losses are
    positive, since losses near 0 scatter by factors.
    """
    history = case.history
    loss = history.loss
    known = np.flatnonzero(np.isfinite(loss))
    values = loss[known].astype(np.float64)
    positive = bool((values > 0).all())
    values = np.log(values) if positive else values
    median, deviation = _running_median(values)
    rise = values - median
    least = np.log(SPIKE_RATIO) if positive else 0.0
    found = np.flatnonzero(rise > np.maximum(rule.threshold * deviation, least))
    if len(found) < 2:
        return
    spikes, excess = known[found], rise[found] / deviation[found]
    worst = int(np.argmax(excess))
    # Where the next loss is as usual, it was the batch, and no step that went too far.
    passing = np.mean(~np.isin(spikes + 1, spikes)) > 0.5
    yield rule.finding(
        "loss",
        case.steps(spikes),
        f"{len(spikes)} of {len(values)} losses stand out, most at step "
        f"{history.step[spikes[worst]]}: {loss[spikes[worst]]:.3g}, {excess[worst]:.2g} times the "
        f"usual deviation above the median of the {SPIKE_WINDOW} before "
        f"(more than {rule.threshold:g})",
        advice.USUAL_EXAMPLES if passing else case.scaled_learning_rate(0.1),
    )


def _running_median(values):
    """Median, and median distance from it, of the 50 values before each; NaN for the first 10."""
    n = len(values)
    median, deviation = np.full((2, n), np.nan)

    def fill(rows, windows):
        median[rows] = np.median(windows, axis=1)
        deviation[rows] = np.median(np.abs(windows - median[rows, np.newaxis]), axis=1)

    for i in range(EXPLODING_AFTER, min(SPIKE_WINDOW, n)):
        fill(slice(i, i + 1), values[np.newaxis, :i])
    for start in range(SPIKE_WINDOW, n, 10_000):  # In parts, for the memory's sake.
        rows = slice(start, min(start + 10_000, n))
        part = values[rows.start - SPIKE_WINDOW : rows.stop - 1]
        fill(rows, np.lib.stride_tricks.sliding_window_view(part, SPIKE_WINDOW))
    return median, deviation


@rule("vanishing_through_time", needs=["states"], kerasgrad=(1e-3, CONVENTION))
def vanishing_through_time(case: Case, rule: Rule) -> Iterator[Finding]:
    """median ‖∂L/∂s_1‖/‖∂L/∂s_T‖ < threshold, in a training that does not learn."""
    if case.learns:
        return
    for layer, (steps, by_state) in case.state_norms.items():
        # One state that carries the gradient is enough.
        reach = np.fmax.reduce([_reach(norms) for norms in by_state.values()])
        known = np.isfinite(reach)
        median = np.median(reach[known]) if known.any() else np.nan
        if not median < rule.threshold:
            continue
        vanished = steps[known & (reach < rule.threshold)]
        timesteps = max(norms.shape[1] for norms in by_state.values())
        yield rule.finding(
            layer,
            (int(vanished[0]), int(vanished[-1])),
            f"the first step gets {median:.1e} of the last step's gradient "
            f"(less than {rule.threshold:g})",
            case.remembering(layer, timesteps),
        )


def _reach(norms):
    """‖∂L/∂s_1‖/‖∂L/∂s_T‖ of each row; rows of fewer than T steps end in NaN."""
    T = np.maximum(np.count_nonzero(~np.isnan(norms), axis=1), 1)
    return norms[:, 0] / norms[np.arange(len(norms)), T - 1]


@rule(
    "vanishing_through_depth",
    needs=["rows"],
    kerasgrad=(1e-3, autotrainer("β1 = 1e-3") + ", there against the last kernel"),
)
def vanishing_through_depth(case: Case, rule: Rule) -> Iterator[Finding]:
    """median of the first kernel's gradient norm over that of all, where nothing is learned.

    From three layers on: below a single one, it is what that layer's units do.
    """
    history = case.history
    first, _, _ = _first_kernel_over_last(history, least_layers=3)
    if case.learns or first is None:
        return
    share = history.norms[:, history.weights.index(first)] / history.global_norm
    small = np.isfinite(share) & (share < rule.threshold)
    if _in_most(small, share):
        yield rule.finding(
            first,
            case.steps(np.flatnonzero(small)),
            f"its gradient norm is {np.median(share[small]):.1e} of the global norm "
            f"(less than {rule.threshold:g})",
            advice.NORMALIZED_LAYERS,
        )


@rule(
    "vanishing_through_depth",
    needs=["rows"],
    autotrainer=(1e-3, autotrainer("β1 = 1e-3, and β2 = 1e-4 for the first kernel itself")),
)
def vanishing_at_the_first_kernel(case: Case, rule: Rule) -> Iterator[Finding]:
    """The first kernel's gradient over the last one's, and itself, where nothing is learned."""
    first, last, ratio = _first_kernel_over_last(case.history)
    if case.learns or first is None:
        return
    norms = case.history.norms[:, case.history.weights.index(first)]
    small = np.isfinite(ratio) & (ratio < rule.threshold) & (norms < 1e-4)
    if _in_most(small, ratio):
        yield rule.finding(
            first,
            case.steps(np.flatnonzero(small)),
            f"its gradient norm is {np.median(ratio[small]):.1e} of that of {last} "
            f"(less than {rule.threshold:g}), and {np.median(norms[small]):.1e} (less than 1e-4)",
            advice.NORMALIZED_LAYERS,
        )


@rule(
    "vanishing_through_depth",
    needs=["rows"],
    smdebug=(1e-7, smdebug("VanishingGradient", "mean of absolute values below 1e-7")),
)
def vanishing_in_absolute_terms(case: Case, rule: Rule) -> Iterator[Finding]:
    """A kernel whose gradient is tiny, whatever the others are. mean |g| is at most ‖g‖/√size."""
    history = case.history
    for column, weight in enumerate(history.weights):
        if not _is_kernel(weight):
            continue
        size = case.measured.weight_sizes.get(weight, 1) if case.measured else 1
        means = history.norms[:, column] / np.sqrt(size)
        small = np.isfinite(means) & (means < rule.threshold)
        if _in_most(small, means):
            yield rule.finding(
                weight,
                case.steps(np.flatnonzero(small)),
                f"the mean of its gradient's absolute values is at most "
                f"{np.median(means[small]):.1e} (less than {rule.threshold:g})",
                advice.NORMALIZED_LAYERS,
            )


def _is_kernel(weight):
    name = weight.rpartition("/")[2]
    return "kernel" in name or name == "embeddings"


def _first_kernel_over_last(history: GradientHistory, least_layers: int = 2):
    """(first kernel, last kernel, ratio of their norms in each row); None for fewer layers."""
    kernels = [weight for weight in history.weights if _is_kernel(weight)]
    layers = [weight.rpartition("/")[0] for weight in kernels]
    if len(set(layers)) < least_layers:
        return None, None, np.full(len(history), np.nan)
    first, last = (history.norms[:, history.weights.index(w)] for w in (kernels[0], kernels[-1]))
    return kernels[0], kernels[-1], first / last


def _in_most(rows, values):
    """Whether more than a half of the finite values are in these rows."""
    return 2 * np.count_nonzero(rows) > np.count_nonzero(np.isfinite(values))
