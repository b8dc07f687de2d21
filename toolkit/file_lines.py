"""Lines for the log about the files that a data set has: what each is for, links that lead elsewhere, and copies."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from config import counted

MOST_NAMED = 20  # files, or sources, with lines of their own


def some(lines: Sequence[str], what: str) -> list[str]:
    """Return the first lines, and one with the number of the others. what: a name for the others."""
    more = [f"and {len(lines) - MOST_NAMED:,} {what}"] if len(lines) > MOST_NAMED else []
    return [*lines[:MOST_NAMED], *more]


def file_lines(
    chosen: dict[str, list[str]], unused: dict[str, str], counts: dict[str, int], folder: Path
) -> Iterator[str]:
    """Yield a line on each file of a folder: its rows and what they are for. Of many files, a line on each use."""
    uses = {"train": "for training", "validation": "for validation"}
    told = [(name, uses[split]) for split, files in chosen.items() for name in files]
    told += [(name, f"not used, since {reason}") for name, reason in unused.items()]
    if len(told) > MOST_NAMED:
        for use, group in itertools.groupby(told, key=lambda entry: entry[1]):
            names = [name for name, _ in group]
            rows = f", {counted(sum(counts[name] for name in names), 'row')}" if names[0] in counts else ""
            yield f"{counted(len(names), 'file')}{rows}: {use}"
        return
    for name, use in told:
        rows = f"{counted(counts[name], 'row')}, " if name in counts else ""
        yield f"{os.path.relpath(name, folder)}: {rows}{use}"


def link_lines(names: Iterable[str], folder: Path) -> Iterator[str]:
    """Yield a line if files of a folder are links that lead out of it: their content is not what came with the folder."""
    home = os.path.join(os.path.realpath(folder), "")
    out = [(name, real) for name in names if not (real := os.path.realpath(name)).startswith(home)]
    if out and folder.is_dir():
        name, real = out[0]
        more = f", and so are {len(out) - 1:,} more" if len(out) > 1 else ""
        yield f"warning: {os.path.relpath(name, folder)} is a link to {real}, outside of {folder}{more}"
    if linked := sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() and p.is_dir()):
        yield f"not used: {', '.join(linked[:3])}, {'links' if len(linked) > 1 else 'a link'} to a folder"


def copy_lines(digests: Mapping[str, str], folder: Path | None = None) -> Iterator[str]:
    """Yield a line if files have the same content, for what is held out of one is trained on in the other.

    digests: the files, each with the hash of its content. folder: what their names are shown relative to.
    """
    alike: dict[str, list[str]] = {}
    for name, digest in digests.items():
        alike.setdefault(digest, []).append(os.path.relpath(name, folder) if folder else name)
    copies = [names for names in alike.values() if len(names) > 1]
    if copies:
        more = sum(map(len, copies)) - 2
        others = f" (and {counted(more, 'more file')} like this)" if more else ""
        yield f"warning: {copies[0][0]} and {copies[0][1]} have the same content{others}: rows held out of one are learned from the other"
