"""The command line: a flag for each setting of config.py, --help, and the errors about flags. It imports no torch."""

from __future__ import annotations

import argparse
import copy
import sys
import typing
from collections.abc import Sequence
from typing import Any

from config import LEAVES, SECTIONS, SHORT, ConfigError, shown
from toolkit import spelling


class _Help(argparse.RawDescriptionHelpFormatter):
    """Show each flag in its shortest form, and name its value once."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=34, **options)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return (
            f"{action.option_strings[-1]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )


class _Parser(argparse.ArgumentParser):
    """A parser that raises ConfigErrors, accepts dashes in flags, and whose help begins with what the script does."""

    everyday: Sequence[str] = ()  # the flags that --help shows first, in this order

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._underscored(word) for word in args], namespace)

    def _underscored(self, word: str) -> str:
        """Return `--batch-size=4` as `--batch_size=4`; return a word that is then no flag of this parser unchanged."""
        flag, equals, value = word.partition("=")
        flag = "--" + flag[2:].replace("-", "_")
        return flag + equals + value if word.startswith("--") and flag in self._option_string_actions else word

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        daily = [self._option_string_actions[flag] for flag in self.everyday]
        groups = [("flags that you need most often", [_short(action) for action in daily])]
        groups += [(group.title, [a for a in group._group_actions if a not in daily]) for group in self._action_groups]
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def _short(action: argparse.Action) -> argparse.Action:
    """Return the flag of a setting with only the beginning of its help; return the script's own flags unchanged."""
    if action.dest not in LEAVES:
        return action
    field, action = LEAVES[action.dest].field, copy.copy(action)
    text = field.metadata["help"]
    text = text if field.default is None else text.split(";")[0]  # of a null default keep all: it says what null means
    action.help = f"{text} (default: {shown(field.default)})".replace("%", "%%")
    return action


def build_parser(
    description: str, takes: Sequence[str] = tuple(SECTIONS), everyday: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Return a parser with --config and a flag for each setting that a script uses: --section.key, and --key if unique.

    takes: the sections that the script uses, or names of single settings. everyday: the flags that --help shows first.
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=_Help)
    parser.everyday, parser._optionals.title = everyday, "other flags of this script"
    parser.add_argument(
        "--config", metavar="PATH", help="config file to use instead of the config.yaml beside the script"
    )
    taken = [leaf for leaf in LEAVES.values() if leaf.section in takes or leaf.name in takes]
    names = {leaf.name: [f"--{leaf.name}"] for leaf in taken}
    for short, name in SHORT.items():
        if name in names:
            names[name].append(f"--{short}")
    groups = {
        section: parser.add_argument_group(f"{section} (--{section}.KEY works as well)")
        for section in dict.fromkeys(leaf.section for leaf in taken)
    }
    for leaf in taken:
        text = f"{leaf.field.metadata['help']} (allowed: {leaf.expected}; default: {shown(leaf.field.default)})"
        groups[leaf.section].add_argument(
            *names[leaf.name],
            dest=leaf.name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            nargs="+" if leaf.takes_sources else None,
            help=text.replace("%", "%%"),
        )
    return parser


# The flags that one script has beside the settings, and the other does not have.
SCRIPTS = {
    "train_qlora.py": ("plan", "card", "evaluate", "stride", "compare", "overwrite", "runs", "push", "public"),
    "inference_example.py": ("mode", "prompt", "prompts", "raw", "merge_base"),
}


def _unknown(flag: str, known: Sequence[str]) -> str:
    """Return the message about an unknown flag: that it belongs to another script, or which flag has a similar name."""
    word = flag.lstrip("-").replace("-", "_")
    if owner := [script for script, flags in SCRIPTS.items() if word in flags]:
        return f"{flag}: belongs to {owner[0]}"
    usual = word if word in SHORT else spelling.usual(word, SHORT)
    name = word if word in LEAVES else SHORT.get(usual or "")
    if name is not None and f"--{name}" not in known:
        here = [
            f"; here it is --{key}"
            for key, names in spelling.USUAL_NAMES.items()
            if word in names and f"--{key}" in known
        ]
        return f"{flag}: belongs to train_qlora.py{'' if word in (usual, name) else f', as --{usual}'}{''.join(here)}"
    return f"{spelling.word(flag)}: unknown flag{spelling.nearest(flag, known, SHORT)}"


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the script's own options and the settings given as flags, {name: text, or several texts}.

    The ConfigError about an unknown flag names the flag that is most like it.
    """
    namespace, unknown = parser.parse_known_args(argv)
    flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
    known = [option for action in parser._actions for option in action.option_strings]
    problems = [_unknown(flag, known) for flag in flags]
    if unknown and not flags:
        problems = [f"unexpected argument{'s' if len(unknown) > 1 else ''}: {' '.join(map(spelling.word, unknown))}"]
    if problems:
        raise ConfigError(*problems)
    given = ((name, value) for name, value in vars(namespace).items() if name in LEAVES)
    return namespace, {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in given}
