"""The tables of README.md, from the figures that the benchmarks keep.

    python tests/benchmarks/page.py

Puts layers.json, memory.json and callback.json into README.md, and those of a GPU: below each
<!-- name -->, or <!-- name, GPU -->, the table of that name, with the cells that the benchmark
prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import callback
import layers
import memory
from measuring import report_path

PAGE = Path(__file__).with_name("README.md")


def kept(benchmark, on_gpu: bool = False) -> dict:
    """The figures that a benchmark keeps; of a GPU it may keep none."""
    path = report_path(benchmark.__file__, on_gpu)
    return {} if on_gpu and not path.exists() else json.loads(path.read_text())


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, with an end of line."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def tables() -> dict[str, str]:
    """{name: table in Markdown} of the figures that are kept now."""
    found = {}
    for on_gpu, place in ((False, "{}"), (True, "{}, GPU")):
        of_layers = kept(layers, on_gpu)
        for name, (_, columns, row) in layers.TABLES.items():
            # Of a GPU those are kept that were measured there.
            if name in of_layers or not on_gpu:
                found[place.format(name)] = markdown(columns, map(row, of_layers[name]["rows"]))
        for benchmark in (memory, callback):
            if report := kept(benchmark, on_gpu):
                rows = map(benchmark.shown, report["results"])
                found[place.format(benchmark.__name__)] = markdown(benchmark.COLUMNS, rows)
    return found


def filled(text: str) -> str:
    """The page with these tables."""
    for name, table in tables().items():
        place = re.compile(rf"(<!-- {name} -->\n\n)(?:\|.*\n)*")
        if not place.search(text):
            raise ValueError(f"{PAGE.name} has no line <!-- {name} --> with an empty one below.")
        text = place.sub(lambda found, table=table: found[1] + table, text)
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
