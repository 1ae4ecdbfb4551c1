"""`python -m minitorch COMMAND`. The one command is `doctor`."""

import argparse
import sys

from . import doctor


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit code.

    Args:
        arguments: what follows the program's name; `sys.argv[1:]` if None.

    """
    parser = argparse.ArgumentParser(prog="python -m minitorch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, threads, CPU, GPU, and what is wrong with them")
    parser.parse_args(arguments)
    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
