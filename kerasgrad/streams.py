"""Where GradientNorms writes its rows while the training runs: a CSV file, TensorBoard's events."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from kerasgrad.history import global_norm

# A row of the file: these, then norm/<weight path> and applied_norm/<weight path> of each weight.
_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "updated",
    "clip_factor",
    "global_norm",
    "applied_global_norm",
)


class CSVStream:
    """Appends rows to a CSV file, each as soon as it is known.

    A file that is there already is gone on with: rows from the first new step on, which a training
    that is restored from a backup takes a second time, are replaced. A training that starts at
    step 0 puts the earlier file aside, as <name>.previous.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._weights: tuple[str, ...] | None = None
        self._file: Any = None

    def check(self) -> None:
        """Find out before the training that the file cannot be written, or is somebody else's.

        Raises:
            OSError: when it cannot be written.
            ValueError: when it is there and is not a file of this class.
        """
        with open(self.path, "a", encoding="utf-8"):
            pass
        header = self._read()[0]
        if header and tuple(header[: len(_COLUMNS)]) != _COLUMNS:
            raise ValueError(
                f"{self.path} exists and was not written by GradientNorms: its header begins with "
                f"{','.join(header[:3])!r}, expected {','.join(_COLUMNS[:3])!r}. Choose another "
                "file for csv=."
            )

    @property
    def is_begun(self) -> bool:
        """Whether `begin` was called."""
        return self._weights is not None

    def begin(self, weights: tuple[str, ...], first_step: int) -> list[dict[str, Any]]:
        """Start a file with these columns; the rows before first_step that were there, as pieces.

        A piece has the arguments of GradientHistory.append.
        """
        self.close()
        self._weights = weights
        header, rows = self._read()
        norms = [f"{kind}/{w}" for kind in ("norm", "applied_norm") for w in weights]
        expected = [*_COLUMNS, *norms]
        kept = [row for row in rows if int(row[0]) < first_step] if header == expected else []
        if rows and not kept:
            os.replace(self.path, self.path.with_name(self.path.name + ".previous"))
        partial = self.path.with_name(self.path.name + ".partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([expected, *kept])
        os.replace(partial, self.path)
        return [_piece(weights, kept)] if kept else []

    def write(self, piece: dict[str, Any]) -> None:
        """Append the rows of one piece: the arguments of GradientHistory.append."""
        if self._file is None:
            self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        unknown = set(piece["weights"]) - set(self._weights)
        if unknown:
            warnings.warn(
                f"{self.path} has no columns for weights that came later: {', '.join(unknown)}. "
                "The history has them.",
                stacklevel=2,
            )
        at = [piece["weights"].index(w) if w in piece["weights"] else None for w in self._weights]
        applied_global = global_norm(piece["applied_norms"], piece["missing"])
        whole = global_norm(piece["norms"], piece["missing"])
        writer = csv.writer(self._file)
        for i, step in enumerate(piece["step"]):
            updated = bool(piece["updated"][i])
            norms = [_cell(piece["norms"], piece["missing"], i, j) for j in at]
            applied = [_cell(piece["applied_norms"], piece["missing"], i, j) for j in at]
            writer.writerow(
                [
                    int(step),
                    int(piece["epoch"]),
                    float(piece["loss"][i]),
                    int(updated),
                    float(piece["clip_factor"][i]),
                    float(whole[i]),
                    float(applied_global[i]) if updated else float("nan"),
                    *norms,
                    *applied,
                ]
            )
        self._file.flush()

    def close(self) -> None:
        """Close the file; `write` goes on with it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self):
        """Header and whole rows; the last row may have been cut off by a killed process."""
        if not self.path.exists():
            return [], []
        with open(self.path, newline="", encoding="utf-8") as file:
            text = file.read()
        whole_lines = text[: text.rfind("\n") + 1].splitlines()
        header, *rows = list(csv.reader(whole_lines)) or [[]]
        return header, [row for row in rows if len(row) == len(header)]


def _cell(norms, missing, row, column):
    """A norm; empty where the weight had no gradient."""
    return "" if column is None or missing[row, column] else float(norms[row, column])


def _piece(weights, rows):
    """Rows of the file as arguments of GradientHistory.append."""
    start, W = len(_COLUMNS), len(weights)
    cells = np.array(rows)
    values = np.where(cells == "", "nan", cells).astype(np.float64)
    return {
        "weights": weights,
        "step": values[:, 0].astype(np.int64),
        "epoch": values[:, 1].astype(np.int32),
        "loss": values[:, 2],
        "updated": values[:, 3] == 1,
        "clip_factor": values[:, 4],
        "norms": values[:, start : start + W],
        "applied_norms": values[:, start + W :],
        "missing": cells[:, start : start + W] == "",
    }


class TensorBoardStream:
    """Writes rows as TensorBoard scalars, with the optimizer's step as x.

    Tags: gradient_norm/global and gradient_norm/<weight path> before clipping,
    applied_gradient_norm/... after it, batch_loss; and once an epoch an image
    state_gradients/<layer path>, steps of the epoch downwards, time steps to the right, log10 of
    ‖∂L/∂s_t‖ from black (the smallest) to white (the largest).
    """

    def __init__(self, log_dir: str | os.PathLike):
        self._writer = tf.summary.create_file_writer(os.fspath(log_dir))
        self._state_norms: dict[str, list[np.ndarray]] = {}

    def write(self, piece: dict[str, Any]) -> None:
        """Add the rows of one piece: the arguments of GradientHistory.append."""
        columns = {"batch_loss": piece["loss"]}
        for tag, norms in (
            ("gradient_norm", piece["norms"]),
            ("applied_gradient_norm", piece["applied_norms"]),
        ):
            columns[f"{tag}/global"] = global_norm(norms, piece["missing"])
            columns |= {f"{tag}/{w}": norms[:, i] for i, w in enumerate(piece["weights"])}
        with self._writer.as_default():
            for i, step in enumerate(piece["step"]):
                # One event a step, where tf.summary.scalar would write one for each of the tags.
                values = [
                    tf.compat.v1.Summary.Value(tag=tag, simple_value=float(column[i]))
                    for tag, column in columns.items()
                    if self._has_value(tag, piece, i)
                ]
                summary = tf.compat.v1.Summary(value=values)
                tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step=int(step))
        for path, norms in piece["state_norms"].items():
            self._state_norms.setdefault(path, []).append(norms)
        self._writer.flush()

    def end_epoch(self, step: int) -> None:
        """Write the images of the epoch's state gradients."""
        with self._writer.as_default():
            for path, pieces in self._state_norms.items():
                T = max(piece.shape[1] for piece in pieces)
                norms = np.concatenate(
                    [
                        np.pad(piece, ((0, 0), (0, T - piece.shape[1])), constant_values=np.nan)
                        for piece in pieces
                    ]
                )
                image = _grey(norms)[np.newaxis, ..., np.newaxis]
                tf.summary.image(f"state_gradients/{path}", image, step=step)
        self._state_norms.clear()
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _has_value(self, tag, piece, row):
        """Whether there is something to draw, unlike for a missing gradient or a skipped update."""
        if tag.startswith("applied_") and not piece["updated"][row]:
            return False
        path = tag.partition("/")[2]
        if path in piece["weights"]:
            return not piece["missing"][row, piece["weights"].index(path)]
        return True


def _grey(norms):
    """log10 of the norms between 0 and 1; what is 0, NaN or Inf is black."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(norms)
    finite = np.isfinite(logs)
    low, high = (logs[finite].min(), logs[finite].max()) if finite.any() else (0, 1)
    span = high - low or 1.0
    return np.where(finite, (logs - low) / span, 0).astype(np.float32)
