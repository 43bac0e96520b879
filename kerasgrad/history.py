"""GradientHistory: what GradientNorms measured, one row an optimizer step, as plain arrays."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas

# Clipping multiplies an unclipped gradient by c/c, which rounds: a factor this near to 1 is 1.
_CLIPPED_BELOW = 1 - 1e-5
_FORMAT = "kerasgrad.GradientHistory/2"
_FORMAT_WITHOUT_SAMPLES = "kerasgrad.GradientHistory/1"


@dataclass
class _Rows:
    """Consecutive rows of a record with one set of weights."""

    weights: tuple[str, ...]
    step: np.ndarray
    epoch: np.ndarray
    loss: np.ndarray
    norms: np.ndarray
    applied_norms: np.ndarray
    missing: np.ndarray
    updated: np.ndarray
    clip_factor: np.ndarray
    state_norms: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.step)


@dataclass
class _Updates:
    """Consecutive samples of how far updates moved the weights."""

    weights: tuple[str, ...]
    step: np.ndarray
    update_norms: np.ndarray
    weight_norms: np.ndarray
    update_counts: np.ndarray
    rows: np.ndarray  # How many rows the record had when the sample was added.

    def __len__(self) -> int:
        return len(self.step)


@dataclass
class _Probes:
    """Consecutive probes."""

    step: np.ndarray
    state_norms: dict[str, np.ndarray]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.step)


class GradientHistory:
    """Gradient norms of a training, one row for each time that the optimizer was given gradients.

    With g_w the gradient of this batch's loss with respect to weight w, loss scale undone:

        norms[i, w]         = ‖g_w‖₂, before clipping
        applied_norms[i, w] = ‖clip(g_w)‖₂, of what the optimizer's update rule received; with
                              gradient accumulation, of the clipped mean over the micro-steps
        global_norm[i]      = sqrt(Σ_w norms[i, w]²)

    n rows, W weights:

    - weights: tuple of W variable paths
    - step (n,) int: the optimizer's `iterations` when the gradient arrived; step 0 is the first
    - epoch (n,) int
    - loss (n,): this batch's own loss, regularization included, before the update; NaN also where
      the train step does not call `compute_loss`
    - norms, applied_norms (n, W); NaN and Inf are kept. NaN in `norms` where `missing`, in
      `applied_norms` where not `updated`
    - missing (n, W) bool: this weight had no gradient (None), which is not a gradient of 0
    - updated (n,) bool: False where the weights were left alone: a micro-step of gradient
      accumulation, a non-finite step that a LossScaleOptimizer skipped
    - clip_factor (n,): the smallest ‖clip(g_w)‖/‖g_w‖ over w, 1 where clipping did nothing
    - state_norms {layer path: (n, T)}: mean over the batch of ‖∂L/∂s_t‖₂, L the batch's loss (so
      with a mean over B examples, each ∂L/∂s_t carries the factor 1/B); t counts the steps in the
      order that the layer takes them. Rows of fewer than T steps end in NaN

    Sampled beside the rows, once an epoch: m times how far updates moved the weights, with w the
    weights before and w' those after `update_counts` updates:

        update_norms[j, w] = ‖w' - w‖₂        weight_norms[j, w] = ‖w‖₂

    - update_step (m,) int: the step of the first of these updates
    - update_norms, weight_norms (m, W); NaN for a weight that was not known then
    - update_counts (m,) int: 1, or more with steps_per_execution

    and p times, on a batch that stays the same (GradientNorms(probe=...)):

    - probe_step (p,) int: the optimizer's `iterations` then, so the step that starts from the
      weights that were probed
    - probe_state_norms {"<layer path>:<state>": (p, T)}: mean over the batch of ‖∂L/∂s_t‖₂, as in
      state_norms; NaN where a probe has none

    Example:

    >>> history = GradientHistory()
    >>> history.append(weights=["w", "b"], step=[0, 1], loss=[1.0, 0.5], norms=[[3, 4], [6, 8]])
    >>> history.global_norm
    array([ 5., 10.])
    """

    def __init__(self) -> None:
        """An empty record: `append` adds rows, `append_updates` and `append_probe` samples."""
        self._weights: dict[str, None] = {}  # In order of appearance.
        self._pieces: list[_Rows] = []
        self._updates: list[_Updates] = []
        self._probes: list[_Probes] = []

    def append(
        self,
        *,
        weights: Sequence[str],
        step: Sequence[int] | np.ndarray,
        norms: np.ndarray | Sequence[Sequence[float]],
        loss: np.ndarray | Sequence[float] | None = None,
        epoch: int | Sequence[int] | np.ndarray = 0,
        applied_norms: np.ndarray | Sequence[Sequence[float]] | None = None,
        missing: np.ndarray | None = None,
        updated: np.ndarray | None = None,
        clip_factor: np.ndarray | None = None,
        state_norms: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add rows at the end. What is left out means: nothing clipped, missing or skipped.

        Args:
            weights: the W columns of these rows; they may differ from the earlier rows' (a layer
                frozen in between), and are then missing there or here.
            step, norms, loss, epoch, applied_norms, missing, updated, clip_factor, state_norms:
                as the attributes of the class; n is the length of `step`.

        Raises:
            ValueError: when an array's shape does not follow from n and W.
        """
        step = np.asarray(step, dtype=np.int64)
        n, W = len(step), len(weights)
        array, floats = _checks(f"{n} steps and {W} weights")
        norms = floats("norms", norms, (n, W))
        applied_norms = norms if applied_norms is None else applied_norms
        applied_norms = floats("applied_norms", applied_norms, (n, W))
        if np.array_equal(applied_norms, norms):
            applied_norms = norms  # Nothing clipped: one array in memory serves for both.
        missing = np.broadcast_to(False, (n, W)) if missing is None else missing
        missing = array("missing", missing, (n, W), bool)
        if not missing.any():
            missing = np.broadcast_to(False, (n, W))
        rows = _Rows(
            weights=tuple(weights),
            step=step,
            epoch=array("epoch", np.broadcast_to(epoch, (n,)), (n,), np.int32),
            loss=floats("loss", np.full(n, np.nan) if loss is None else loss, (n,)),
            norms=norms,
            applied_norms=applied_norms,
            missing=missing,
            updated=array("updated", np.ones(n) if updated is None else updated, (n,), bool),
            clip_factor=floats(
                "clip_factor", np.ones(n) if clip_factor is None else clip_factor, (n,)
            ),
            state_norms={
                path: floats(f"state_norms[{path!r}]", values, (n, np.shape(values)[-1]))
                for path, values in (state_norms or {}).items()
            },
        )
        self._weights |= dict.fromkeys(rows.weights)
        self._pieces.append(rows)

    def append_updates(
        self,
        *,
        step: int,
        weights: Sequence[str],
        update_norms: np.ndarray | Sequence[float],
        weight_norms: np.ndarray | Sequence[float],
        update_count: int = 1,
    ) -> None:
        """Add one sample of how far updates moved the weights.

        Args:
            step: the step of the first of the updates.
            weights: W paths.
            update_norms: (W,), ‖w' - w‖₂ of each weight, over all the updates together.
            weight_norms: (W,), ‖w‖₂ of each weight before them.
            update_count: how many updates.

        Raises:
            ValueError: when the norms are not one for each weight.

        Example:

        >>> history = GradientHistory()
        >>> history.append(weights=["w"], step=[0], norms=[[5.0]])
        >>> history.append_updates(step=0, weights=["w"], update_norms=[0.5], weight_norms=[100])
        >>> history.update_norms / history.weight_norms
        array([[0.005]])
        """
        self._append_updates(
            weights,
            step=[step],
            update_norms=[update_norms],
            weight_norms=[weight_norms],
            update_counts=[update_count],
            rows=[len(self)],
        )

    def _append_updates(self, weights, *, step, update_norms, weight_norms, update_counts, rows):
        m, W = len(step), len(weights)
        array, floats = _checks(f"{m} samples of {W} weights")
        sample = _Updates(
            weights=tuple(weights),
            step=array("step", step, (m,), np.int64),
            update_norms=floats("update_norms", update_norms, (m, W)),
            weight_norms=floats("weight_norms", weight_norms, (m, W)),
            update_counts=array("update_counts", update_counts, (m,), np.int64),
            rows=array("rows", rows, (m,), np.int64),
        )
        self._weights |= dict.fromkeys(sample.weights)
        self._updates.append(sample)

    def append_probe(
        self, *, step: int, state_norms: Mapping[str, np.ndarray | Sequence[float]]
    ) -> None:
        """Add one probe.

        Args:
            step: the optimizer's `iterations`, which is how many updates the weights have had.
            state_norms: {"<layer path>:<state>": (T,)}, the batch mean of ‖∂L/∂s_t‖₂.

        Raises:
            ValueError: when the norms of a state are not a vector.

        Example:

        >>> history = GradientHistory()
        >>> history.append_probe(step=100, state_norms={"lstm:h": [0.0, 0.1, 1.0]})
        >>> history.probe_step, history.probe_state_norms["lstm:h"]
        (array([100]), array([[0. , 0.1, 1. ]]))
        """
        self._append_probes(
            step=[step],
            state_norms={key: [values] for key, values in state_norms.items()},
            rows=[len(self)],
        )

    def _append_probes(self, *, step, state_norms, rows):
        p = len(step)
        array, floats = _checks(f"{p} probes")
        self._probes.append(
            _Probes(
                step=array("step", step, (p,), np.int64),
                state_norms={
                    key: floats(f"state_norms[{key!r}]", values, (p, *np.shape(values)[-1:]))
                    for key, values in state_norms.items()
                },
                rows=array("rows", rows, (p,), np.int64),
            )
        )

    def truncate(self, rows: int, step: int | None = None) -> None:
        """Keep the first `rows` rows and the samples up to there, and drop the others.

        Args:
            rows: how many rows to keep.
            step: of the row that will come next: updates from this step on and probes of later
                weights go. None for the one that follows the last row kept.
        """
        whole = self._rows()
        next_step = whole.step + whole.updated
        if step is None:
            step = max(next_step[:rows][-1:], default=0)
        # Where an earlier step comes next, another training begins. Samples belong to that of the
        # rows which were the last when they were added.
        starts = np.flatnonzero(whole.step[1:] < next_step[:-1]) + 1
        start = max(starts[starts < rows], default=0)
        end = min(starts[starts >= rows], default=len(self))

        def kept(samples, is_before):
            of_earlier_trainings = (samples.rows > 0) & (samples.rows <= start)
            samples = _only(samples, of_earlier_trainings | ((samples.rows <= end) & is_before))
            return replace(samples, rows=np.minimum(samples.rows, rows))

        updates, probes = self._all_updates(), self._all_probes()
        self._pieces = [_only(whole, slice(rows))]
        self._updates = [kept(updates, updates.step < step)]
        self._probes = [kept(probes, probes.step <= step)]

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def __repr__(self) -> str:
        return f"<GradientHistory: {len(self)} steps, {len(self.weights)} weights>"

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(self._weights)

    @property
    def step(self) -> np.ndarray:
        return self._rows().step

    @property
    def epoch(self) -> np.ndarray:
        return self._rows().epoch

    @property
    def loss(self) -> np.ndarray:
        return self._rows().loss

    @property
    def norms(self) -> np.ndarray:
        return self._rows().norms

    @property
    def applied_norms(self) -> np.ndarray:
        return self._rows().applied_norms

    @property
    def missing(self) -> np.ndarray:
        return self._rows().missing

    @property
    def updated(self) -> np.ndarray:
        return self._rows().updated

    @property
    def clip_factor(self) -> np.ndarray:
        return self._rows().clip_factor

    @property
    def state_norms(self) -> dict[str, np.ndarray]:
        return self._rows().state_norms

    @property
    def update_step(self) -> np.ndarray:
        return self._all_updates().step

    @property
    def update_norms(self) -> np.ndarray:
        return self._all_updates().update_norms

    @property
    def weight_norms(self) -> np.ndarray:
        return self._all_updates().weight_norms

    @property
    def update_counts(self) -> np.ndarray:
        return self._all_updates().update_counts

    @property
    def probe_step(self) -> np.ndarray:
        return self._all_probes().step

    @property
    def probe_state_norms(self) -> dict[str, np.ndarray]:
        return self._all_probes().state_norms

    @property
    def global_norm(self) -> np.ndarray:
        """(n,) L2 norm of the whole gradient, before clipping; missing gradients left out."""
        rows = self._rows()
        return global_norm(rows.norms, rows.missing)

    @property
    def applied_global_norm(self) -> np.ndarray:
        """(n,) L2 norm of the whole gradient that was applied; NaN where not updated."""
        rows = self._rows()
        return np.where(rows.updated, global_norm(rows.applied_norms, rows.missing), np.nan)

    @property
    def clipped(self) -> np.ndarray:
        """(n,) bool: clipping made some weight's gradient smaller, as measured."""
        return is_clipped(self.clip_factor)

    @property
    def clip_rate(self) -> float:
        """Share of the updates that clipping changed; NaN when there was no update."""
        updates = int(np.count_nonzero(self.updated))
        return int(np.count_nonzero(self.clipped & self.updated)) / updates if updates else np.nan

    @property
    def reach(self) -> dict[str, np.ndarray]:
        """{layer path: (n,)}: ‖∂L/∂s_1‖ / ‖∂L/∂s_T‖, how much of the last step's reaches the first.

        0 is a vanished gradient, 1 a kept one; far above 1, an exploding one.
        """
        return {path: _first_over_last(norms) for path, norms in self.state_norms.items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write the record to one .npz file. The file appears whole or not at all."""
        rows = self._rows()
        layers = list(rows.state_norms)
        arrays = {name: getattr(rows, name) for name in _COLUMNS}
        arrays |= {f"state_norms_{i}": rows.state_norms[layer] for i, layer in enumerate(layers)}
        updates, probes = self._all_updates(), self._all_probes()
        probed = list(probes.state_norms)
        arrays |= {f"updates_{name}": getattr(updates, name) for name in _UPDATE_COLUMNS}
        arrays |= {f"probes_{name}": getattr(probes, name) for name in ("step", "rows")}
        arrays |= {f"probes_state_norms_{i}": probes.state_norms[k] for i, k in enumerate(probed)}
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(
                    file,
                    format=_FORMAT,
                    weights=np.array(rows.weights, dtype=str),
                    layers=np.array(layers, dtype=str),
                    probed=np.array(probed, dtype=str),
                    **arrays,
                )
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> GradientHistory:
        """The record that `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file is truncated, or not one that `save` wrote.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if file["format"] not in (_FORMAT, _FORMAT_WITHOUT_SAMPLES):
                    raise ValueError(f"its format is {file['format']}")
                history = cls()
                history.append(
                    weights=file["weights"].tolist(),
                    state_norms={
                        layer: file[f"state_norms_{i}"]
                        for i, layer in enumerate(file["layers"].tolist())
                    },
                    **{name: file[name] for name in _COLUMNS},
                )
                if file["format"] == _FORMAT:
                    history._append_updates(
                        history.weights,
                        **{name: file[f"updates_{name}"] for name in _UPDATE_COLUMNS},
                    )
                    history._append_probes(
                        step=file["probes_step"],
                        state_norms={
                            key: file[f"probes_state_norms_{i}"]
                            for i, key in enumerate(file["probed"].tolist())
                        },
                        rows=file["probes_rows"],
                    )
        except FileNotFoundError:
            raise
        except _UNREADABLE as error:
            raise ValueError(
                f"{os.fspath(path)} is not a whole record of GradientHistory.save ({error}). "
                f"Expected a .npz file that it wrote, in format {_FORMAT}."
            ) from error
        return history

    def to_dataframe(self) -> pandas.DataFrame:
        """The record as a table: step, epoch, loss, the global norms, then two columns a weight.

        Columns "norm/<path>" and "applied_norm/<path>" are before and after clipping.

        Raises:
            ImportError: when pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_dataframe() needs pandas: pip install pandas") from None
        rows = self._rows()
        columns = {
            "step": rows.step,
            "epoch": rows.epoch,
            "loss": rows.loss,
            "global_norm": self.global_norm,
            "applied_global_norm": self.applied_global_norm,
            "clip_factor": rows.clip_factor,
            "updated": rows.updated,
        }
        for i, path in enumerate(rows.weights):
            columns[f"norm/{path}"] = rows.norms[:, i]
        for i, path in enumerate(rows.weights):
            columns[f"applied_norm/{path}"] = rows.applied_norms[:, i]
        return pandas.DataFrame(columns)

    def _rows(self) -> _Rows:
        # Appending costs the same at the millionth step as at the first; the pieces are joined
        # when somebody reads.
        if len(self._pieces) != 1 or self._pieces[0].weights != self.weights:
            self._pieces = [_joined_rows(self._pieces, self.weights)]
        return self._pieces[0]

    def _all_updates(self) -> _Updates:
        if len(self._updates) != 1 or self._updates[0].weights != self.weights:
            self._updates = [_joined_updates(self._updates, self.weights)]
        return self._updates[0]

    def _all_probes(self) -> _Probes:
        if len(self._probes) != 1:
            self._probes = [_joined_probes(self._probes)]
        return self._probes[0]


# What NumPy and zipfile raise for files that they did not write, or that were cut off or damaged.
_UNREADABLE = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)

_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "norms",
    "applied_norms",
    "missing",
    "updated",
    "clip_factor",
)

_UPDATE_COLUMNS = ("step", "update_norms", "weight_norms", "update_counts", "rows")


def global_norm(norms: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """sqrt(Σ_w norms[i, w]²) of each row, over the weights that have a gradient."""
    # In float64 the square of any float32 norm neither overflows nor vanishes.
    squares = np.square(norms, dtype=np.float64, where=~missing, out=np.zeros(norms.shape))
    return np.sqrt(np.sum(squares, axis=1))


def is_clipped(clip_factor: np.ndarray) -> np.ndarray:
    """Whether a clip factor is below 1 by more than rounding."""
    return clip_factor < _CLIPPED_BELOW


def _first_over_last(norms):
    """norms[:, 0] / norms[:, T - 1], where rows of fewer than T steps end in NaN."""
    T = np.maximum(np.count_nonzero(~np.isnan(norms), axis=1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return norms[:, 0] / norms[np.arange(len(norms)), T - 1]


def _checks(of):
    """(array, floats), which refuse values of another shape than they should have for `of`."""

    def array(name, values, shape, dtype=None):
        values = np.asarray(values, dtype=dtype)
        if values.shape != shape:
            raise ValueError(
                f"`{name}` must have shape {shape}, for {of}. Received shape {values.shape}."
            )
        return values

    def floats(name, values, shape):
        values = np.asarray(values)
        dtype = values.dtype if values.dtype in (np.float32, np.float64) else np.float64
        return array(name, values, shape, dtype)

    return array, floats


def _only(piece, index):
    """A piece with these of its rows."""

    def of(value):
        if isinstance(value, dict):
            return {key: array[index] for key, array in value.items()}
        return value[index] if isinstance(value, np.ndarray) else value

    return replace(piece, **{field: of(value) for field, value in vars(piece).items()})


def _joined_rows(pieces, weights):
    """One piece with all rows, over these weights and the union of the pieces' layers."""
    layers = dict.fromkeys(layer for piece in pieces for layer in piece.state_norms)
    clipped = any(piece.applied_norms is not piece.norms for piece in pieces)
    incomplete = any(piece.weights != weights or piece.missing.any() for piece in pieces)
    n, W = sum(map(len, pieces)), len(weights)

    def column(name, dtype):
        return _column(pieces, name, dtype)

    def by_weight(name, fill):
        return _by_weight(pieces, name, weights, fill)

    norms = by_weight("norms", np.nan)
    return _Rows(
        weights=weights,
        step=column("step", np.int64),
        epoch=column("epoch", np.int32),
        loss=column("loss", np.float64),
        norms=norms,
        applied_norms=by_weight("applied_norms", np.nan) if clipped else norms,
        missing=by_weight("missing", True) if incomplete else np.broadcast_to(False, (n, W)),
        updated=column("updated", bool),
        clip_factor=column("clip_factor", np.float64),
        state_norms={layer: _stacked(pieces, layer) for layer in layers},
    )


def _joined_updates(pieces, weights):
    """One piece with all samples, over these weights."""
    return _Updates(
        weights=weights,
        step=_column(pieces, "step", np.int64),
        update_norms=_by_weight(pieces, "update_norms", weights, np.nan),
        weight_norms=_by_weight(pieces, "weight_norms", weights, np.nan),
        update_counts=_column(pieces, "update_counts", np.int64),
        rows=_column(pieces, "rows", np.int64),
    )


def _joined_probes(pieces):
    """One piece with all probes, over the union of their states."""
    keys = dict.fromkeys(key for piece in pieces for key in piece.state_norms)
    return _Probes(
        step=_column(pieces, "step", np.int64),
        state_norms={key: _stacked(pieces, key) for key in keys},
        rows=_column(pieces, "rows", np.int64),
    )


def _column(pieces, name, dtype):
    return np.concatenate([getattr(piece, name) for piece in pieces] or [np.zeros(0, dtype)])


def _by_weight(pieces, name, weights, fill):
    """The pieces' columns below each other, `fill` where a piece does not know a weight."""
    arrays = [_spread(getattr(piece, name), piece.weights, weights, fill) for piece in pieces]
    return np.concatenate(arrays or [np.zeros((0, len(weights)))])


def _spread(array, columns, all_columns, fill):
    """The array with its columns at their places among all_columns, `fill` in the others."""
    if columns == all_columns:
        return array
    spread = np.full((len(array), len(all_columns)), fill, dtype=array.dtype)
    spread[:, [all_columns.index(column) for column in columns]] = array
    return spread


def _stacked(pieces, key):
    """The (n, T) state norms below each other, T the longest; NaN where there is nothing."""
    arrays = [piece.state_norms.get(key) for piece in pieces]
    T = max(array.shape[1] for array in arrays if array is not None)
    dtype = next(array.dtype for array in arrays if array is not None)
    stacked = np.full((sum(map(len, pieces)), T), np.nan, dtype)
    start = 0
    for array, piece in zip(arrays, pieces, strict=True):
        if array is not None:
            stacked[start : start + len(piece), : array.shape[1]] = array
        start += len(piece)
    return stacked
