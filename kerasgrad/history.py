"""GradientHistory: what GradientNorms measured, one row an optimizer step, as plain arrays."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas

# Clipping multiplies an unclipped gradient by c/c, which rounds: a factor this near to 1 is 1.
_CLIPPED_BELOW = 1 - 1e-5
_FORMAT = "kerasgrad.GradientHistory/1"


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

    Example:

    >>> history = GradientHistory()
    >>> history.append(weights=["w", "b"], step=[0, 1], loss=[1.0, 0.5], norms=[[3, 4], [6, 8]])
    >>> history.global_norm
    array([ 5., 10.])
    """

    def __init__(self) -> None:
        self._pieces: list[_Rows] = []

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

        def array(name, values, shape, dtype=None):
            values = np.asarray(values, dtype=dtype)
            if values.shape != shape:
                raise ValueError(
                    f"`{name}` must have shape {shape}, for {n} steps and {W} weights. "
                    f"Received shape {values.shape}."
                )
            return values

        def floats(name, values, shape):
            values = np.asarray(values)
            dtype = values.dtype if values.dtype in (np.float32, np.float64) else np.float64
            return array(name, values, shape, dtype)

        norms = floats("norms", norms, (n, W))
        applied_norms = norms if applied_norms is None else applied_norms
        applied_norms = floats("applied_norms", applied_norms, (n, W))
        if np.array_equal(applied_norms, norms):
            applied_norms = norms  # Nothing clipped: one array in memory serves for both.
        missing = np.broadcast_to(False, (n, W)) if missing is None else missing
        missing = array("missing", missing, (n, W), bool)
        if not missing.any():
            missing = np.broadcast_to(False, (n, W))
        self._pieces.append(
            _Rows(
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
        )

    def truncate(self, rows: int) -> None:
        """Keep the first `rows` rows, and drop the others."""
        whole = self._rows()
        self._pieces = [
            _Rows(
                weights=whole.weights,
                state_norms={path: norms[:rows] for path, norms in whole.state_norms.items()},
                **{name: getattr(whole, name)[:rows] for name in _COLUMNS},
            )
        ]

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def __repr__(self) -> str:
        return f"<GradientHistory: {len(self)} steps, {len(self.weights)} weights>"

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(w for piece in self._pieces for w in piece.weights))

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
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(
                    file,
                    format=_FORMAT,
                    weights=np.array(rows.weights, dtype=str),
                    layers=np.array(layers, dtype=str),
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
                if file["format"] != _FORMAT:
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
        if len(self._pieces) != 1:
            self._pieces = [_joined(self._pieces)]
        return self._pieces[0]


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


def _joined(pieces):
    """One piece with all rows, over the union of the pieces' weights and layers."""
    weights = tuple(dict.fromkeys(w for piece in pieces for w in piece.weights))
    layers = dict.fromkeys(layer for piece in pieces for layer in piece.state_norms)
    clipped = any(piece.applied_norms is not piece.norms for piece in pieces)
    incomplete = any(piece.weights != weights or piece.missing.any() for piece in pieces)
    n, W = sum(map(len, pieces)), len(weights)

    def column(name, empty):
        return np.concatenate([getattr(piece, name) for piece in pieces] or [empty])

    def by_weight(name, fill):
        return np.concatenate(
            [_spread(getattr(piece, name), piece.weights, weights, fill) for piece in pieces]
            or [np.zeros((0, 0))]
        )

    norms = by_weight("norms", np.nan)
    return _Rows(
        weights=weights,
        step=column("step", np.zeros(0, np.int64)),
        epoch=column("epoch", np.zeros(0, np.int32)),
        loss=column("loss", np.zeros(0)),
        norms=norms,
        applied_norms=by_weight("applied_norms", np.nan) if clipped else norms,
        missing=by_weight("missing", True) if incomplete else np.broadcast_to(False, (n, W)),
        updated=column("updated", np.zeros(0, bool)),
        clip_factor=column("clip_factor", np.zeros(0)),
        state_norms={
            layer: _stacked([piece.state_norms.get(layer) for piece in pieces], pieces)
            for layer in layers
        },
    )


def _spread(array, columns, all_columns, fill):
    """The array with its columns at their places among all_columns, `fill` in the others."""
    if columns == all_columns:
        return array
    spread = np.full((len(array), len(all_columns)), fill, dtype=array.dtype)
    spread[:, [all_columns.index(column) for column in columns]] = array
    return spread


def _stacked(arrays, pieces):
    """The (n, T) arrays below each other, T that of the longest; NaN where there is nothing."""
    T = max(array.shape[1] for array in arrays if array is not None)
    dtype = next(array.dtype for array in arrays if array is not None)
    stacked = np.full((sum(map(len, pieces)), T), np.nan, dtype)
    start = 0
    for array, piece in zip(arrays, pieces, strict=True):
        if array is not None:
            stacked[start : start + len(piece), : array.shape[1]] = array
        start += len(piece)
    return stacked
