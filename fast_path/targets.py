"""Which modules of a model get adapters, by their names: lists, regular expressions and numbers of layers, as peft reads them.

This module imports no torch, since the check of an adapter's files uses it before torch is imported.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence

from config import ConfigError, brief, shown

SECONDS = 5  # for matching the regular expressions
Names = Sequence[str] | str  # a list of names, or a regular expression

# Reads [[method of re, pattern], ...] and names; writes for each pattern the names that match, or a text: the error.
MATCHER = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
except (ImportError, OSError, ValueError):
    pass
try:
    patterns, names = json.load(sys.stdin)
    json.dump([[n for n in names if getattr(p, how)(n)] for how, p in [(h, re.compile(t)) for h, t in patterns]], sys.stdout)
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    json.dump(str(error) or type(error).__name__, sys.stdout)
"""


def match(patterns: list[tuple[str, str]], names: list[str], where: str) -> list[list[str]]:
    """Return for each (method of re, regular expression) the names that match.

    It runs in a process of its own, since one expression may take for ever, and then holds Python's lock. where: the
    beginning of the ConfigError about an expression that is wrong or takes too long.
    """
    command, task = [sys.executable, "-I", "-S", "-c", MATCHER], json.dumps([patterns, names])
    try:
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=SECONDS)
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        got = ", ".join(brief(pattern) for _, pattern in patterns)
        raise ConfigError(
            f"{where}: expected a regular expression that takes less than {SECONDS} s, got {got}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot match the regular expressions: {error}") from None
    if isinstance(found, str):
        raise ConfigError(f"{where}: not a regular expression: {found[:200]}")
    return found


def is_pattern(targets: Names) -> bool:
    """Return whether targets are a regular expression, and neither a list nor the word all-linear."""
    return isinstance(targets, str) and targets != "all-linear"


@functools.cache
def matching(pattern: str, names: tuple[str, ...], where: str) -> frozenset[str]:
    """Return the names that a regular expression matches as a whole; it raises ConfigError as `match` does."""
    return frozenset(match([("fullmatch", pattern)], list(names), where)[0])


def named(wanted: Names, names: Sequence[str], where: str) -> set[str]:
    """Return the names that peft takes: those in a list and those that end with one, or those that a pattern matches."""
    if isinstance(wanted, str):
        return set(matching(wanted, tuple(names), where))
    endings = tuple(f".{name}" for name in wanted)
    return {name for name in names if name in wanted or name.endswith(endings)}


def select(
    names: Sequence[str], targets: Names, exclude: Names | None, layers: Collection[int] | None, count: int,
    head: str = "",
) -> list[str]:  # fmt: skip
    """Return the names of the linear layers that get an adapter, in their order; raise ConfigError if there are none.

    names: of all linear layers that may get one. targets: a list, a regular expression or all-linear. exclude: what
    gets none. layers: the numbers of the decoder layers; None means all of the model's, which are `count`. head: the name
    of the output head, for an error.
    """
    if layers is not None and (odd := [number for number in layers if not 0 <= number < count]):
        raise ConfigError(f"lora.layers_to_transform: expected numbers from 0 to {count - 1}, got {odd[0]}")
    wanted = set(names) if targets == "all-linear" else named(targets, names, "lora.target_modules")
    if not wanted:
        raise ConfigError(f"lora.target_modules: {_brief(targets)} matches no linear layer; {_own(names)}")
    for entry in [exclude] if isinstance(exclude, str) else exclude or ():
        out = named(entry if entry is exclude else [entry], names, "lora.exclude_modules") & wanted
        if not out:  # peft only warns
            known = named(entry if entry is exclude else [entry], [*names, head], "lora.exclude_modules")
            why = "gets no adapter anyway: leave it out" if known else f"is no linear layer of the model; {_own(names)}"
            raise ConfigError(f"lora.exclude_modules: {_brief(entry)} {why}")
        wanted -= out
    whole = () if isinstance(targets, str) else targets  # as in peft a full name means its layer whatever `layers` says
    kept = [n for n in names if n in wanted and (layers is None or layer_of(n) in layers or n in whole)]
    if not kept:
        cause = "exclude_modules" if exclude else "layers_to_transform"
        raise ConfigError(f"lora.{cause}: leaves no layer to adapt; {_own(names)}")
    return kept


def layer_of(name: str) -> int | None:
    """Return the number of the decoder layer in a module's name, as peft finds it, or None."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(found[1]) if found else None


def _brief(value: Names) -> str:
    return brief(value) if isinstance(value, str) else shown(tuple(value))


def _own(names: Sequence[str]) -> str:
    """Return some of a model's names of modules, with N for the number of a layer, for an error."""
    forms = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))
    return f"the model's are {', '.join(forms[:12])}{', …' if len(forms) > 12 else ''}"
