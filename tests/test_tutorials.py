"""Each tutorial runs from top to bottom as a script, its own assertions included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted(Path(__file__).parents[1].glob("tutorials/[0-9][0-9]_*.py"))


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda script: script.stem)
def test_runs_as_a_script(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg", "KERASGRAD_QUICK": "1", "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "a tutorial leaves no files behind"


def test_there_are_tutorials():
    assert TUTORIALS
