"""python -m kerasgrad: the command line."""

import sys

from kerasgrad.cli import main

sys.exit(main())
