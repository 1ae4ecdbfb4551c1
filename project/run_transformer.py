"""Train a small transformer on text, sample from it, compare flash with standard attention.

    python project/run_transformer.py                 train on the text inside Python itself
    python project/run_transformer.py sample          write text with the trained model
    python project/run_transformer.py compare         flash beside standard attention
    python project/run_transformer.py train --help    all options and their defaults

The parts are in `project/transformer/`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minitorch  # noqa: F401  # before numpy: it settles how threads wait (minitorch/threads.py)
from project.transformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
