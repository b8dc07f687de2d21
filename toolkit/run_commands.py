"""What train_qlora.py does with runs that exist: the flags, and the commands that need no torch."""

import argparse
import sys
from pathlib import Path

from toolkit.runs import print_runs
from toolkit.startup import reader_gone, visible
from toolkit.text_width import for_stream


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of these commands."""
    parser.add_argument(
        "--runs", nargs="?", const=".", metavar="FOLDER", help="list the runs in and below a folder (default: this one)"
    )


def is_asked(options: argparse.Namespace) -> bool:
    """Return whether one of these commands is asked for."""
    return options.runs is not None


def answer(options: argparse.Namespace) -> int | None:
    """Carry out the command that is asked for and return the exit code; None if none of them is. Raises ConfigError."""
    if not is_asked(options):
        return None
    try:
        return print_runs(Path(options.runs).expanduser(), say)
    finally:
        reader_gone()


def say(line: str) -> None:
    """Print a line on stderr."""
    print(for_stream(visible(line), sys.stderr), file=sys.stderr, flush=True)
