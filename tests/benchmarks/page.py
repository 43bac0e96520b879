"""The tables of README.md, from the figures that the benchmarks keep.

    python tests/benchmarks/page.py

Puts layers.json, memory.json and callback.json into README.md: below each <!-- name --> the table
of that name. In bold what is short of its target.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, with an end of line."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def kept(name: str) -> dict:
    """The figures that a benchmark keeps."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def rows_of(name: str) -> list[dict]:
    """The rows of a table of layers.json."""
    return kept("layers")[name]["rows"]


def marked(row: dict, key: str, reached: bool, digits: int = 2) -> str:
    """The number, in bold and with the target where that is not reached."""
    number = f"{row[key]:.{digits}f}"
    return number if reached else f"**{number}** (not {row['target']:g})"


def at_least(row: dict, key: str) -> str:
    return marked(row, key, row[key] >= row["target"])


def at_most(row: dict, key: str, digits: int = 2) -> str:
    return marked(row, key, row["target"] is None or row[key] <= row["target"], digits)


def spread(row: dict, digits: int = 2) -> str:
    return " to ".join(f"{value:.{digits}f}" for value in row["quartiles"])


def simple_rnn() -> str:
    return markdown(
        (
            *("features", "units", "T", "ms a step"),
            *("Keras's best, ms (mode)", "times faster", "quartiles"),
        ),
        (
            (
                *(row[name] for name in ("features", "units", "timesteps")),
                f"{row['ms_a_step']:.1f}",
                f"{row['keras_ms_a_step']:.1f} ({row['keras_mode']})",
                at_least(row, "times_faster"),
                spread(row),
            )
            for row in rows_of("simple_rnn")
        ),
    )


def simplified_lstm() -> str:
    of_shape: dict[tuple, dict[str, dict]] = {}
    for row in rows_of("simplified_lstm"):
        shape = row["features"], row["units"], row["timesteps"]
        of_shape.setdefault(shape, {})[row["layer"]] = row
    return markdown(
        (
            *("features", "units", "T", "linear, ms", "tanh, ms"),
            *("of these not the layer's", "with the products alone"),
            *("Keras LSTM's best, ms (mode)", "linear, times faster", "tanh, times faster"),
        ),
        (
            (
                *shape,
                *(f"{row['ms_a_step']:.1f}" for row in (linear, tanh)),
                f"{linear['rest_ms_a_step']:.1f}",
                f"{linear['rest_and_products_ms']:.1f}",
                f"{linear['keras_ms_a_step']:.1f} ({linear['keras_mode']})",
                *(at_least(row, "times_faster") for row in (linear, tanh)),
            )
            for shape, (linear, tanh) in (
                (shape, layers.values()) for shape, layers in of_shape.items()
            )
        ),
    )


def recurrences() -> str:
    return markdown(
        ("recurrence", "units", "T", "ms", "roofline, ms", "times the roofline", "quartiles"),
        (
            (
                *(row[name] for name in ("recurrence", "units", "timesteps")),
                *(f"{row[name]:.1f}" for name in ("ms", "roofline_ms")),
                at_most(row, "times_the_roofline"),
                spread(row),
            )
            for row in rows_of("recurrences")
        ),
    )


def scaling() -> str:
    return markdown(
        ("layer", "units", "T", "ms a step", "exponent by length", "exponent"),
        (
            (
                row["layer"],
                row["units"],
                ", ".join(map(str, row["timesteps"])),
                ", ".join(f"{value:.1f}" for value in row["ms_a_step"]),
                ", ".join(f"{value:.2f}" for value in row.get("exponents", ())),
                at_most(row, "exponent") if "exponent" in row else "trains",
            )
            for row in rows_of("scaling")
        ),
    )


def first_step() -> str:
    return markdown(
        (
            *("layer", "T", "first step, s", "Keras's, s"),
            *("first smaller batch, s", "again, s", "traces after 1 and 4 epochs"),
        ),
        (
            (
                row["layer"],
                row["timesteps"],
                at_most(row, "seconds"),
                f"{row['keras_seconds']:.2f}",
                f"{row['smaller_batch_seconds']:.2f}",
                f"{row['smaller_batch_again_seconds']:.3f}",
                "{} and {}".format(*row["traces_after_1_and_4_epochs"]),
            )
            for row in rows_of("first_step")
        ),
    )


def import_time() -> str:
    return markdown(
        ("import keras, tensorflow, s", "and then import kerasgrad, s", "quartiles"),
        (
            (
                f"{row['keras_seconds']:.2f}",
                at_most(row, "more_seconds"),
                spread(row),
            )
            for row in rows_of("import")
        ),
    )


def memory() -> str:
    def megabytes(value, runs):
        return f"{value:.0f} ({min(runs):.0f} to {max(runs):.0f})"

    return markdown(
        ("layer", "output", "MB (least to largest)", "Keras's MB (least to largest)", "ratio"),
        (
            (
                row["layer"],
                "every step" if row["return_sequences"] else "last step",
                megabytes(row["megabytes"], row["runs"]),
                f"{megabytes(row['keras_megabytes'], row['keras_runs'])}, {row['against']}",
                at_most(row, "ratio"),
            )
            for row in kept("memory")["results"]
        ),
    )


def callback() -> str:
    of_model: dict[str, dict[str, dict]] = {}
    for row in kept("callback")["results"]:
        of_model.setdefault(row["model"], {})[row["variant"]] = row
    return markdown(
        ("model", "plain fit, ms a step", "GradientNorms", "quartiles", "computing again"),
        (
            (
                MODELS[model],
                f"{plain['ms_a_step']:.1f}",
                at_most(recorded, "ratio", digits=3),
                spread(recorded, digits=3),
                f"{again['ratio']:.2f}",
            )
            for model, (plain, recorded, again) in (
                (model, variants.values()) for model, variants in of_model.items()
            )
        ),
    )


MODELS = {
    "keras_lstm": "Keras LSTM, 32 units, 40 steps",
    "feed_forward": "dense, 4 × 512, a million weights",
    "recurrent": "kerasgrad SimpleRNN, 64 units, 250 steps, with ∂L/∂s_t",
}

TABLES: dict[str, Callable[[], str]] = {
    "simple_rnn": simple_rnn,
    "simplified_lstm": simplified_lstm,
    "recurrences": recurrences,
    "scaling": scaling,
    "first_step": first_step,
    "import": import_time,
    "memory": memory,
    "callback": callback,
}


def filled(text: str) -> str:
    """The page with the tables of the figures that are kept now."""
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n\n)(?:\|.*\n)*")
        if not place.search(text):
            raise ValueError(f"{PAGE.name} has no line <!-- {name} --> with an empty one below.")
        text = place.sub(lambda found, table=table: found[1] + table(), text)
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
