"""What train_qlora.py does with runs that exist: the flags, and the commands that need no torch."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from config import ConfigError, load_config
from toolkit.runs import print_runs
from toolkit.startup import reader_gone, visible
from toolkit.text_width import for_stream


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of these commands."""
    parser.add_argument(
        "--runs", nargs="?", const=".", metavar="FOLDER", help="list the runs in and below a folder (default: this one)"
    )
    parser.add_argument(
        "--push",
        metavar="NAME",
        help="upload the finished run in output_dir to the Hugging Face hub, as NAME or OWNER/NAME",
    )
    parser.add_argument("--public", action="store_true", help="with --push: everybody may see it (default: private)")


def is_asked(options: argparse.Namespace, overrides: dict[str, Any]) -> bool:
    """Return whether one of these commands is asked for; `options` keeps the settings given as flags for it."""
    options.overrides = overrides
    if options.public and options.push is None:
        raise ConfigError("--public: goes with --push")
    if options.runs is not None and (overrides or options.push is not None or options.config):
        other = "--push" if options.push is not None else "--config" if options.config else f"--{next(iter(overrides))}"
        raise ConfigError(f"--runs: goes alone; {other} does nothing with it")
    return options.runs is not None or options.push is not None


def commands_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags say but for settings, which are compared as configurations: what a script is to do."""
    apart = ("config", "notes", "overrides")
    return {f"--{name}": value for name, value in vars(options).items() if name not in apart and "." not in name}


def answer(options: argparse.Namespace) -> int | None:
    """Carry out the command that is asked for and return the exit code; None if none of them is. Raises ConfigError."""
    if options.runs is None and options.push is None:
        return None
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one does it
        return 0
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console that lacks a character
    try:
        return print_runs(Path(options.runs).expanduser(), say) if options.runs is not None else push_run(options)
    finally:
        reader_gone()


def push_run(options: argparse.Namespace) -> int:
    """Upload the run in training.output_dir."""
    from toolkit.push import push  # not at the top: the hub's client takes a moment to import

    given = Path(options.config) if options.config else Path(__file__).resolve().parents[1] / "config.yaml"
    folder = Path(load_config([given], options.overrides).training.output_dir)
    return push(
        options.push, folder, options.overrides.get("model.name"), private=not options.public,
        replace=options.overwrite, say=say,
    )  # fmt: skip


def say(line: str) -> None:
    """Print a line on stderr."""
    print(for_stream(visible(line), sys.stderr), file=sys.stderr, flush=True)
