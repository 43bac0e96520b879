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


# Each example from a fresh start, in one process: to import TensorFlow takes longer than they do.
RUN = """
import sys
import keras

for code in sys.argv[1:]:
    keras.utils.clear_session()  # Keras's names begin anew.
    print("example", flush=True)
    exec(code, {"__name__": "__main__"})
"""


def printed_by(*codes):
    """What each prints."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *codes],
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout.split("example\n")[1:]


def without_times(text):
    return re.sub(r"\d+m?s(/step)? - ", "", text).replace("- -", "-").splitlines()


def test_the_examples_print_what_the_readme_shows():
    # (which block of Python, which block of text): recording, comparing, through time.
    blocks = [(0, 0), (1, 2), (3, 3)]
    printed = printed_by(*(block("python", code) for code, _ in blocks))
    for (_, text), output in zip(blocks, printed, strict=True):
        assert_same_but_for_rounding(without_times(output), without_times(block("text", text)))


def assert_same_but_for_rounding(now, shown):
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
