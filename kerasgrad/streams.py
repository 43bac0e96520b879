"""Where GradientNorms writes its rows while the training runs: a CSV file, TensorBoard's events."""

from __future__ import annotations

import csv
import io
import itertools
import os
import platform
import time
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
_LONGEST_HEADER = 10_000_000  # bytes
_CHUNK = 4096  # rows
_NUMBER_OF_FILE = itertools.count()


class CSVStream:
    """Appends rows to a CSV file, each as soon as it is known.

    A file that is there already is gone on with: rows from the first new step on, which a training
    that is restored from a backup takes a second time, are cut off. A training that starts at
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
        header, expected = self._header(), ",".join(_COLUMNS)
        if header and not header.startswith(expected):
            raise ValueError(
                f"{self.path} exists and was not written by GradientNorms: its header begins with "
                f"{header[:30]!r}, expected {expected[:30]!r}. Choose another file for csv=."
            )

    @property
    def is_begun(self) -> bool:
        """Whether `begin` was called, and did not fail."""
        return self._weights is not None

    def begin(
        self, weights: tuple[str, ...], first_step: int, micro_steps: int = 0
    ) -> list[dict[str, Any]]:
        """Make the file ready for rows from this step on; the earlier rows in it, as pieces.

        Args:
            weights: the columns, when `begin` is called for the first time.
            first_step: the step of the next row.
            micro_steps: how many rows of this step there are before it.

        Returns:
            Pieces have the arguments of GradientHistory.append.
        """
        self.close()
        weights = self._weights or weights
        norms = [f"{kind}/{w}" for kind in ("norm", "applied_norm") for w in weights]
        header = io.StringIO(newline="")
        csv.writer(header).writerow([*_COLUMNS, *norms])
        header = header.getvalue()
        pieces, end = [], 0
        if self._header() == header:
            pieces, end = self._rows_before(weights, first_step, micro_steps)
        if pieces:
            os.truncate(self.path, end)
        else:
            if self.path.exists() and self._has_rows():
                os.replace(self.path, self.path.with_name(self.path.name + ".previous"))
            partial = self.path.with_name(self.path.name + ".partial")
            with open(partial, "w", newline="", encoding="utf-8") as file:
                file.write(header)
            os.replace(partial, self.path)
        self._weights = weights
        return pieces

    def write(self, piece: dict[str, Any]) -> None:
        """Append the rows of one piece: the arguments of GradientHistory.append."""
        if self._weights is None:  # `begin` failed, and left no file to go on with.
            return
        if self._file is None:
            self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        unknown = [w for w in piece["weights"] if w not in self._weights]
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
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _header(self):
        """The first line; empty where the file is, or where it is not there."""
        if not self.path.exists():
            return ""
        with open(self.path, "rb") as file:
            # However long the first line of somebody else's file is, if it has lines at all.
            return file.readline(_LONGEST_HEADER).decode("utf-8", errors="replace")

    def _has_rows(self):
        with open(self.path, "rb") as file:
            file.readline()
            return bool(file.readline())

    def _rows_before(self, weights, first_step, micro_steps):
        """The rows before `first_step` of the last training in the file, and where they end.

        The last row may have been cut off by a killed process; the first that is not whole ends
        them.
        """
        with open(self.path, "rb") as file:
            steps, ends = [], [len(file.readline())]
            for line in file:
                cells = line.count(b",") + 1
                if not line.endswith(b"\n") or cells != len(_COLUMNS) + 2 * len(weights):
                    break
                steps.append(int(line[: line.index(b",")]))
                ends.append(ends[-1] + len(line))
            rows = rows_before(np.array(steps, np.int64), first_step, micro_steps)
            file.seek(ends[0])
            lines = itertools.islice(file, rows)
            # Some rows at a time: as text, a long training would take many times its place.
            chunks = iter(lambda: list(itertools.islice(lines, _CHUNK)), [])
            pieces = [_piece(weights, chunk) for chunk in chunks]
        return pieces, ends[rows]


def rows_before(steps: np.ndarray, first_step: int, micro_steps: int = 0) -> int:
    """How many of the rows stay when the last training in them is put back to `first_step`.

    Args:
        steps: of the rows; where they fall, another training begins.
        first_step: the step of the next row.
        micro_steps: how many rows of this step there are before it, under gradient accumulation.
    """
    starts = np.flatnonzero(np.diff(steps) < 0) + 1
    start = int(starts[-1]) if len(starts) else 0
    rows = start + int(np.searchsorted(steps[start:], first_step))
    same = int(np.count_nonzero(steps[rows:] == first_step))
    return rows + min(micro_steps, same)


def _cell(norms, missing, row, column):
    """A norm; empty where the weight had no gradient."""
    return "" if column is None or missing[row, column] else float(norms[row, column])


def _piece(weights, lines):
    """Lines of the file as arguments of GradientHistory.append."""
    start, W = len(_COLUMNS), len(weights)
    cells = np.array([line.decode("ascii").rstrip().split(",") for line in lines])
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
        self._folder = os.fspath(log_dir)
        self._file: Any = None
        self._state_norms: dict[str, list[np.ndarray]] = {}

    def check(self) -> None:
        """Find out before the training that the folder cannot be written.

        Raises:
            OSError: when it cannot be written.
        """
        try:
            self._open()
        except tf.errors.OpError as error:
            raise OSError(f"log_dir={self._folder!r} cannot be written: {error}") from error

    def begin(self, first_step: int) -> None:
        """What follows goes on from this step; TensorBoard drops the points that it had there."""
        log = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._write(first_step, session_log=log)

    def begin_epoch(self) -> None:
        """Forget the state gradients of an epoch that did not end."""
        self._state_norms.clear()

    def write(self, piece: dict[str, Any]) -> None:
        """Add the rows of one piece: the arguments of GradientHistory.append."""
        columns = {"batch_loss": piece["loss"]}
        for tag, norms in (
            ("gradient_norm", piece["norms"]),
            ("applied_gradient_norm", piece["applied_norms"]),
        ):
            columns[f"{tag}/global"] = global_norm(norms, piece["missing"])
            columns |= {f"{tag}/{w}": norms[:, i] for i, w in enumerate(piece["weights"])}
        for path, norms in piece["state_norms"].items():
            self._state_norms.setdefault(path, []).append(norms)
        for i, step in enumerate(piece["step"]):
            values = [
                tf.compat.v1.Summary.Value(tag=tag, simple_value=float(column[i]))
                for tag, column in columns.items()
                if self._has_value(tag, piece, i)
            ]
            self._write(int(step), summary=tf.compat.v1.Summary(value=values))
        self._file.flush()

    def end_epoch(self, step: int) -> None:
        """Write the images of the epoch's state gradients."""
        values = []
        for path, pieces in self._state_norms.items():
            T = max(piece.shape[1] for piece in pieces)
            norms = np.concatenate(
                [
                    np.pad(piece, ((0, 0), (0, T - piece.shape[1])), constant_values=np.nan)
                    for piece in pieces
                ]
            )
            height, width = norms.shape
            pixels = np.rint(255 * _grey(norms)).astype(np.uint8)[..., np.newaxis]
            image = tf.compat.v1.Summary.Image(
                height=height,
                width=width,
                colorspace=1,  # grey
                encoded_image_string=tf.io.encode_png(pixels).numpy(),
            )
            values.append(tf.compat.v1.Summary.Value(tag=f"state_gradients/{path}", image=image))
        self._state_norms.clear()
        if values:
            self._write(step, summary=tf.compat.v1.Summary(value=values))
            self._file.flush()

    def _open(self):
        if self._file is None:
            tf.io.gfile.makedirs(self._folder)
            # TensorBoard reads a folder's files in the order of their names.
            name = (
                f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}."
                f"{os.getpid()}.{next(_NUMBER_OF_FILE)}.kerasgrad"
            )
            # A file of events is a file of records, and unlike tf.summary's writers this one can
            # tell TensorBoard that a training was put back.
            self._file = tf.io.TFRecordWriter(os.path.join(self._folder, name))
            self._write(0, file_version="brain.Event:2")
            self._file.flush()

    def _write(self, step, **content):
        self._open()
        event = tf.compat.v1.Event(wall_time=time.time(), step=step, **content)
        self._file.write(event.SerializeToString())

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
