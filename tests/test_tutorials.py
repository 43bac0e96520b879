"""The tutorials run, as scripts and as notebooks, and the notebooks are those of the scripts.

A script and its notebook are the same code: `out_of_step` compares them cell by cell. So the
notebook's run from top to bottom, in a clean kernel and in the short form, is the run of both, and
one plain run of a script stands for what only scripts have: no IPython, no place for figures.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from helpers import module_at
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[1] / "tutorials"


notebooks = module_at(FOLDER / "make_notebooks.py")
SCRIPTS = notebooks.scripts()

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def figures_in(notebook):
    return [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]


# The tutorials


def test_the_tutorials_are_numbered():
    assert [script.name[:2] for script in SCRIPTS] == [f"{i:02}" for i in range(1, 8)]


@each
def test_notebook_runs_from_top_to_bottom(script, tmp_path):
    """In the short form, its own assertions included, without a warning, and it leaves no file."""
    notebook = nbformat.read(notebooks.notebook_of(script), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start = time.perf_counter()
    notebooks.execute(notebook, tmp_path, quick=True)
    print(f"{script.stem}: {time.perf_counter() - start:.0f} s")
    assert notebooks.problems(notebook) == []
    assert figures_in(notebook)
    assert not list(tmp_path.iterdir())


@each
def test_notebook_is_in_step_with_its_script(script):
    assert notebooks.out_of_step(script) is None, "run tutorials/make_notebooks.py"


@each
def test_notebook_can_be_shown(script):
    """The notebook as it is in the repository, made by the long form."""
    notebook = nbformat.read(notebooks.notebook_of(script), as_version=4)
    nbformat.validate(notebook)
    assert notebooks.problems(notebook) == []
    assert figures_in(notebook)
    assert not any(output.output_type == "error" for output in outputs_of(notebook))


def test_no_notebook_is_left_over():
    made = {notebooks.notebook_of(script) for script in SCRIPTS}
    assert set(notebooks.NOTEBOOKS.glob("*.ipynb")) == made


def test_runs_as_a_script(tmp_path):
    script = SCRIPTS[0]
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg", "KERASGRAD_QUICK": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not list(tmp_path.iterdir())


@each
def test_form(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert 'os.environ.get("KERASGRAD_QUICK") == "1"' in text
    cells = notebooks.build(script, None).cells[1:]
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert prose[0].startswith("# ") and cells[0].source == prose[0]
    # Each section ends with a question and its folded answer. That is HTML, in which the marks of
    # Markdown and of equations stand as they are.
    sections = re.split(r"^## ", "\n\n".join(prose), flags=re.M)[1:]
    for section in sections:
        if not section.startswith("On your own model"):
            last = section.strip().rpartition("**Question.**")[2]
            answer = re.search(r"<details><summary>Answer</summary>\n(.*)</details>$", last, re.S)
            assert answer, section.splitlines()[0]
            assert not re.search(r"[`$]|\*\*", answer[1]), answer[1]
    # An equation within the text does not go on in the next line: not each viewer takes that.
    for cell in prose:
        inline = re.sub(r"\$\$.*?\$\$|`[^`]*`", "", cell, flags=re.S)
        assert not [line for line in inline.splitlines() if line.count("$") % 2]


# The tool that makes the notebooks, on a small tutorial

SMALL = """\
# %% [markdown]
# # Small

# %%
import os

import matplotlib.pyplot as plt

QUICK = os.environ.get("KERASGRAD_QUICK") == "1"
print("quick" if QUICK else "long")


# %%
def double(x):
    return 2 * x


# %%
plt.plot([1, double(2)])
plt.show()
os.write(2, b"what TensorFlow writes");
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A repository with this one tutorial."""
    folder = tmp_path / "repository" / "tutorials"
    folder.mkdir(parents=True)
    monkeypatch.setattr(notebooks, "TUTORIALS", folder)
    monkeypatch.setattr(notebooks, "REPOSITORY", folder.parent)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", folder / "notebooks")
    (folder / "01_small.py").write_text(SMALL)
    return folder / "01_small.py"


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_notebooks.py", *arguments])
    notebooks.main()


def check(monkeypatch):
    """The exit code of --check."""
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "--check")
    return stop.value.code


def test_makes_the_same_notebook_again(small, monkeypatch, capsys):
    assert check(monkeypatch) == 1
    assert capsys.readouterr().out == "01_small.ipynb: there is none\n"
    run_main(monkeypatch)
    made = notebooks.notebook_of(small)
    first = made.read_bytes()
    run_main(monkeypatch, "01")
    assert made.read_bytes() == first
    assert check(monkeypatch) == 0
    notebook = nbformat.read(made, as_version=4)
    assert [cell.cell_type for cell in notebook.cells] == [
        "code",
        "markdown",
        "code",
        "code",
        "code",
    ]
    assert [output.text for output in outputs_of(notebook) if "text" in output] == ["long\n"]
    assert len(figures_in(notebook)) == 1


def edited(old, new):
    def edit(script):
        text = script.read_text()
        assert old in text
        script.write_text(text.replace(old, new))

    return edit


def in_notebook(change):
    def edit(script):
        path = notebooks.notebook_of(script)
        notebook = nbformat.read(path, as_version=4)
        change(notebook)
        nbformat.write(notebook, path)

    return edit


def published(script):
    (script.parents[1] / "setup.cfg").write_text("[metadata]\nurl = https://github.com/a/b\n")


@pytest.fixture
def unexecuted(small):
    """The small tutorial with its notebook as it is made, but that nothing was run."""
    notebook = notebooks.build(small, None)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for i, cell in enumerate(code, 1):
        cell.execution_count = i
    notebooks.NOTEBOOKS.mkdir()
    nbformat.write(notebook, notebooks.notebook_of(small))
    assert notebooks.out_of_step(small) is None
    return small


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (edited("2 * x", "3 * x"), "cell-03 is another in the script"),
        (edited("# # Small", "# # Larger"), "cell-01 is another in the script"),
        (published, "cell-00 is another in the script"),
        (
            lambda script: script.write_text(SMALL + "\n# %%\n1 + 1\n"),
            "5 cells, and the script has 6",
        ),
        (in_notebook(lambda n: n.cells.pop()), "4 cells, and the script has 5"),
        (in_notebook(lambda n: n.cells[2].update(source="1")), "cell-02 is another in the script"),
        (in_notebook(lambda n: n.metadata.update(colab={})), "other metadata"),
        (
            in_notebook(lambda n: n.cells[2].update(execution_count=7)),
            "not executed from top to bottom",
        ),
    ],
)
def test_notices_what_is_out_of_step(unexecuted, edit, reason):
    edit(unexecuted)
    assert notebooks.out_of_step(unexecuted) == reason


def test_check_names_notebooks_without_a_script(unexecuted, monkeypatch, capsys):
    assert check(monkeypatch) == 0
    unexecuted.rename(unexecuted.with_name("02_renamed.py"))
    assert check(monkeypatch) == 1
    assert capsys.readouterr().out.splitlines() == [
        "01_small.ipynb: its script is gone",
        "02_renamed.ipynb: there is none",
    ]


def test_the_address_is_that_of_setup_cfg(small):
    assert notebooks.address() is None
    first = notebooks.build(small, notebooks.address()).cells[0]
    assert first.cell_type == "code"
    assert '%pip install --quiet "../..' in first.source

    published(small)
    assert notebooks.address() == "https://github.com/a/b"
    badge, install, *_ = notebooks.build(small, notebooks.address()).cells
    assert badge.source.endswith(
        "(https://colab.research.google.com/github/a/b/blob/main/tutorials/notebooks/01_small.ipynb)"
    )
    assert "kerasgrad[digits] @ git+https://github.com/a/b" in install.source

    # Colab opens no notebook from elsewhere.
    install = notebooks.build(small, "https://example.org/a").cells[0]
    assert "git+https://example.org/a" in install.source


def test_install_cell_does_nothing_outside_of_colab(small):
    source = notebooks.build(small, None).cells[0].source.replace("%pip", "install = 1 #")
    names = {}
    exec(source, names)
    assert "install" not in names
    assert "google.colab" not in sys.modules


def test_makes_no_notebook_that_shows_what_it_should_not(small):
    small.write_text(
        SMALL
        + "import sys, warnings; warnings.warn('deprecated'); print(sys.prefix)\n"
        + "from pathlib import Path; Path('.').resolve()"
    )
    with pytest.raises(SystemExit) as stop:
        notebooks.make(small)
    reasons = str(stop.value)
    assert reasons.startswith("01_small.py not made")
    assert "deprecated" in reasons
    assert f"cell-04 shows the path {sys.prefix}" in reasons
    assert f"cell-04 shows the path {small.parents[1]}" in reasons
    assert not notebooks.notebook_of(small).exists()


def test_a_cell_that_fails_ends_it(small):
    small.write_text(SMALL + "assert double(2) == 5")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        notebooks.make(small)
    assert not notebooks.notebook_of(small).exists()


def test_a_notebook_may_not_be_too_large(small, monkeypatch):
    notebook = notebooks.build(small, None)
    assert notebooks.problems(notebook) == []
    monkeypatch.setattr(notebooks, "LARGEST", 100)
    (problem,) = notebooks.problems(notebook)
    assert "at most 100" in problem
