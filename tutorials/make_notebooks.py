"""Makes notebooks/NN_name.ipynb from each tutorial NN_name.py, outputs and figures included.

    python tutorials/make_notebooks.py              all of them
    python tutorials/make_notebooks.py 01 04        some of them
    python tutorials/make_notebooks.py --check      which ones are out of step with their scripts

A notebook has the cells of its script, after a badge that opens it in Colab and a cell that
installs kerasgrad there. Both need the repository's public address, which stands in one place:
`url` in the [metadata] of setup.cfg. While there is none, there is no badge, and the cell installs
from the checkout that the notebook is in.

Needs jupytext, nbclient and ipykernel: pip install -e ".[notebooks]"
"""

from __future__ import annotations

import argparse
import configparser
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

TUTORIALS = Path(__file__).parent
REPOSITORY = TUTORIALS.parent
NOTEBOOKS = TUTORIALS / "notebooks"
LARGEST = 600_000  # Bytes: GitHub shows no larger ones.

_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
_COLAB = "https://colab.research.google.com/github/{}/blob/main/tutorials/notebooks/{}.ipynb"
_FROM_ADDRESS = """\
import sys

if "google.colab" in sys.modules:
    %pip install --quiet "kerasgrad[digits] @ git+{}\""""
_FROM_CHECKOUT = """\
import sys

if "google.colab" in sys.modules:
    # kerasgrad has no public address yet: upload its folder, and %cd to this notebook's.
    %pip install --quiet "../..[digits]\""""


def scripts() -> list[Path]:
    """The tutorials, in order."""
    return sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))


def notebook_of(script: Path) -> Path:
    """Where the notebook of a tutorial is."""
    return NOTEBOOKS / f"{script.stem}.ipynb"


def address() -> str | None:
    """The repository's public address, from setup.cfg; None while there is none."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return setup.get("metadata", "url", fallback="").rstrip("/") or None


def build(script: Path, url: str | None) -> NotebookNode:
    """The notebook of a script, not yet executed.

    Args:
        script: the tutorial.
        url: the repository's public address. Colab opens notebooks of github.com alone, so there is
            a badge for such an address only.
    """
    cells = []
    if url and url.startswith("https://github.com/"):
        repository = url.removeprefix("https://github.com/")
        cells.append(new_markdown_cell(f"{_BADGE}({_COLAB.format(repository, script.stem)})"))
    cells.append(new_code_cell(_FROM_ADDRESS.format(url) if url else _FROM_CHECKOUT))
    cells += jupytext.read(script).cells
    for i, cell in enumerate(cells):
        # Jupytext's are random, and it notes how many blank lines the script has between cells.
        cell.id, cell.metadata = f"cell-{i:02}", {}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    language = {"name": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": language})


def execute(notebook: NotebookNode, folder: Path, *, quick: bool = False) -> None:
    """Runs a notebook from top to bottom in a kernel of its own, and keeps the outputs in it.

    What TensorFlow's C++ writes to the process's stderr as it starts goes to this process's stderr,
    as it does from a script, and not into the notebook. Python's warnings do go into the notebook.

    Args:
        notebook: as from `build`; changed in place.
        folder: where it runs.
        quick: the short form of the tutorial, for tests.

    Raises:
        nbclient.exceptions.CellExecutionError: when a cell fails.
    """
    metadata = notebook.metadata.copy()
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--IPKernelApp.capture_fd_output=False"],
        record_timing=False,
        coalesce_streams=True,
    )
    with tempfile.TemporaryDirectory() as settings:
        # Nothing of the user's own IPython, and figures in the notebook.
        environment = os.environ | {"KERASGRAD_QUICK": str(int(quick)), "IPYTHONDIR": settings}
        environment.pop("MPLBACKEND", None)
        client.execute(env=environment)
    notebook.metadata = metadata  # It has got the version of Python.


def problems(notebook: NotebookNode) -> list[str]:
    """What a reader should not see in an executed notebook: warnings, this machine's paths."""
    found = []
    paths = {str(REPOSITORY), str(Path.home()), sys.prefix, tempfile.gettempdir()} - {"/"}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            shown = output.get("data", {}).items()
            texts = [str(data) for kind, data in shown if not kind.startswith("image/")]
            texts.append(output.get("text", ""))
            if output.get("name") == "stderr":
                found.append(f"{cell.id} warns: {output.text.strip()}")
            found += [
                f"{cell.id} shows the path {path}"
                for path in sorted(paths)
                if any(path in text for text in texts)
            ]
    size = len(nbformat.writes(notebook))
    if size > LARGEST:
        found.append(f"{size} bytes, and at most {LARGEST} are wanted: fewer or smaller figures")
    return found


def out_of_step(script: Path) -> str | None:
    """Why a tutorial's notebook is not the one that would be made of it now; None if it is.

    Nothing is executed: the sources are compared, and that each cell was run in its turn.
    """
    path = notebook_of(script)
    if not path.exists():
        return "there is none"
    notebook = nbformat.read(path, as_version=4)
    wanted = build(script, address())
    if notebook.metadata != wanted.metadata:
        return "other metadata"
    made = [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]
    for is_one, cell in zip(made, wanted.cells, strict=False):
        if is_one != (cell.id, cell.cell_type, cell.source):
            return f"{cell.id} is another in the script"
    if len(made) != len(wanted.cells):
        return f"{len(made)} cells, and the script has {len(wanted.cells)}"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        return "not executed from top to bottom"
    return None


def make(script: Path) -> None:
    """Writes the notebook of a tutorial.

    Raises:
        SystemExit: when it has what a reader should not see.
    """
    notebook = build(script, address())
    execute(notebook, TUTORIALS)
    if found := problems(notebook):
        sys.exit(f"{script.name} not made into a notebook:\n" + "\n".join(found))
    NOTEBOOKS.mkdir(exist_ok=True)
    nbformat.write(notebook, notebook_of(script))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="01 for 01_name.py; all where none is given")
    parser.add_argument("--check", action="store_true", help="make none, tell what is out of step")
    arguments = parser.parse_args()
    chosen = [s for s in scripts() if not arguments.numbers or s.name[:2] in arguments.numbers]
    if missing := set(arguments.numbers) - {script.name[:2] for script in chosen}:
        parser.error(f"no tutorial {', '.join(sorted(missing))}")
    if not arguments.check:
        for script in chosen:
            make(script)
            path = notebook_of(script)
            print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size / 1000:.0f} kB")
        return
    reasons = {notebook_of(script).name: out_of_step(script) for script in chosen}
    if not arguments.numbers:
        known = {notebook_of(script) for script in scripts()}
        left_over = set(NOTEBOOKS.glob("*.ipynb")) - known
        reasons |= {path.name: "its script is gone" for path in left_over}
    wrong = {name: reason for name, reason in sorted(reasons.items()) if reason}
    for name, reason in wrong.items():
        print(f"{name}: {reason}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
