"""The command line: its options come from `options.py`, its work is done in `commands.py`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

from .attention import WHOLE
from .errors import UserError, shown
from .options import CHANGEABLE, COMPARE_DEFAULTS, DataOptions, ModelOptions, TrainingOptions, flag

COMMANDS = ("train", "sample", "compare")
SAMPLE_OPTIONS = ("-h", "--help", "--out", "--prompt", "--tokens", "--temperature", "--top-k",
                  "--seed", "--device")  # fmt: skip
PACKAGES = ("matplotlib", "rich", "safetensors")


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what follows the program's name; `sys.argv[1:]` if None. Without the name of a
            command they are for `train`.

    Returns:
        The exit code.

    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or (words[0] not in COMMANDS and words[0] not in ("-h", "--help")):
        words = ["train", *words]
    try:
        _check_packages()
        return _run(vars(build_parser().parse_args(_joined_prompt(words))))
    except UserError as error:
        print(shown(f"error: {error}"), file=sys.stderr)
        return 1
    except MemoryError:
        print("error: there is not enough memory: choose smaller sizes", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _joined_prompt(words: list[str]) -> list[str]:
    """`--prompt TEXT` as one word, so that a text that begins with "-" is not taken for an option.

    What is an option of `sample`, and not a text, stays an option.
    """
    for place, word in enumerate(words[:-1]):
        text = words[place + 1]
        if word == "--prompt" and text.startswith("-") and text.split("=")[0] not in SAMPLE_OPTIONS:
            return [*words[:place], f"{word}={text}", *words[place + 2 :]]
    return words


def _run(values: dict[str, Any]) -> int:
    from .commands import sample_command, train_command
    from .compare import compare_command
    from .report import Terminal

    terminal = Terminal()
    command = values.pop("command")
    if command == "sample":
        return sample_command(**values, terminal=terminal)
    if command == "compare":
        return compare_command(values, values.pop("kinds"), values.pop("record"), terminal)
    files = {name: values.pop(name) for name in ("out", "resume", "overwrite", "record")}
    return train_command(values, **files, terminal=terminal)


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"this program needs {', '.join(missing)}: run `make train`, "
            "or pip install -e '.[train]' in the checkout"
        )


def build_parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    parser = argparse.ArgumentParser(
        prog="run_transformer.py",
        description="Train a small transformer on text, write text with it, or set flash beside "
        "standard attention. Without a command: train.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model (the default)")
    run = train.add_argument_group("the run")
    run.add_argument(
        "--out", metavar="DIR", default="runs/train", help="its folder (default: %(default)s)"
    )
    start = run.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, which keeps its own options; those that may be given "
        f"anew: {', '.join(map(flag, CHANGEABLE))}. With more --steps the learning rate goes on as "
        "in a run that had as many from the start",
    )
    start.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew where --out has a run, or files of its names, already: they are lost",
    )
    run.add_argument(
        "--record", metavar="FILE", default="", help="also write the result as a Markdown page"
    )
    _add_options(train, {})
    _add_sample(commands.add_parser("sample", help="write text with a trained model"))
    compare = commands.add_parser(
        "compare",
        help="train with flash and with standard attention, or other kinds, show loss, time and "
        "memory of each",
    )
    compare.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        default=WHOLE,
        help="kinds of attention, as --attention of train has them (default: flash standard)",
    )
    compare.add_argument(
        "--record", metavar="FILE", default="", help="also write the result as a Markdown page"
    )
    _add_options(compare, COMPARE_DEFAULTS, without=("attention", "eval_every", "save_every"))
    return parser


def _add_options(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any], without: tuple[str, ...] = ()
) -> None:
    """One argument for each field; those that are not given stay out of the result."""
    for part in (ModelOptions, DataOptions, TrainingOptions):
        name = part.__name__.removesuffix("Options").lower()
        group = parser.add_argument_group(name, part.__doc__)
        for field in dataclasses.fields(part):
            if field.name in without:
                continue
            default = defaults.get(field.name, field.default)
            shown = "none" if default == "" else default
            text = f"{field.metadata['help']} (default: {shown})"
            if isinstance(field.default, bool):  # --graph and --no-graph
                group.add_argument(
                    flag(field.name),
                    action=argparse.BooleanOptionalAction,
                    default=argparse.SUPPRESS,
                    help=text,
                )
                continue
            group.add_argument(
                flag(field.name),
                type=type(field.default),
                choices=field.metadata["choices"],
                metavar=None if field.metadata["choices"] else type(field.default).__name__.upper(),
                default=argparse.SUPPRESS,
                help=text,
            )


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument(
        "--out", metavar="DIR", default="runs/train", help="folder of a run, or a checkpoint file"
    )
    parser.add_argument(
        "--prompt", default="", help="what the text begins with; a line break if it is empty"
    )
    parser.add_argument(
        "--tokens", type=int, default=500, dest="count", metavar="N", help="how many to add"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest, more surprises more"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0 means all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the chance")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where it is computed"
    )
