"""The README's code does what the README says that it prints."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+\.?\d*(?:e[-+]?\d+)?")


def block(language, number=0):
    """The number-th fenced block of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)[number]


def printed_by(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout


def without_times(text):
    return re.sub(r"\d+m?s(/step)? - ", "", text).replace("- -", "-").splitlines()


# (which block of Python, which block of text)
@pytest.mark.parametrize(
    ("code", "text"), [(0, 0), (1, 2), (3, 3)], ids=["recording", "comparing", "through time"]
)
def test_an_example_prints_what_the_readme_shows(code, text):
    shown, now = (
        without_times(t) for t in (block("text", text), printed_by(block("python", code)))
    )
    # Word for word, apart from the numbers.
    assert [NUMBER.sub("#", line) for line in now] == [NUMBER.sub("#", line) for line in shown]
    for line, other in zip(now, shown, strict=True):
        for number, expected in zip(NUMBER.findall(line), NUMBER.findall(other), strict=True):
            # Three epochs amplify the rounding of one processor against another's; what has
            # vanished is a product of a hundred such factors.
            decades = 1.5 if float(expected) < 1e-4 else math.log10(1.1)
            assert float(number) == float(expected) or (
                abs(math.log10(float(number) / float(expected))) < decades
            )


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(path):
    assert (Path(__file__).parents[1] / path).exists()
