"""The default comparison shows what the README says of it."""

import csv
import math
import sys

with open(sys.argv[1], newline="", encoding="utf-8") as file:
    rows = {row["remedy"]: row for row in csv.DictReader(file)}


def number(remedy, column):
    return float(rows[remedy][column])


constant = number("baseline", "constant_loss")
solved = {name for name, row in rows.items() if row["solved"] == "True"}
checks = {
    "the baseline explodes": not math.isfinite(number("baseline", "test_loss")),
    "clipnorm keeps it finite": math.isfinite(number("clipnorm", "test_loss")),
    "but no better than a constant answer": number("clipnorm", "test_loss") > 0.9 * constant,
    "because the gradient has vanished": number("clipnorm", "reach") < 1e-3,
    "ReLU's vanishes even more": number("relu", "reach") < number("clipnorm", "reach"),
    "and explodes": not math.isfinite(number("relu", "test_loss")),
    "clipnorm keeps ReLU finite": math.isfinite(number("relu_clipnorm", "test_loss")),
    "whose gradient still jumps": "exploding" in rows["relu_clipnorm"]["findings"],
    "and stays vanished": number("relu_clipnorm", "reach") < 1e-3,
    "IRNN's reaches further": number("irnn_clipnorm", "reach") > number("clipnorm", "reach"),
    "and is clipped at each step": number("irnn_clipnorm", "clip_rate") > 0.9,
    "and does not settle": number("irnn_clipnorm", "test_loss") > constant,
    "the simplified LSTM's is kept": number("simplified_lstm", "reach") > 0.1,
    "and it alone solves the task": solved == {"simplified_lstm"},
}
failed = [claim for claim, holds in checks.items() if not holds]
sys.exit(f"the default comparison no longer shows: {'; '.join(failed)}" if failed else 0)
