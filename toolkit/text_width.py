"""How many columns of a terminal a text needs, and how to make it fit. Imports no torch."""

import shutil
import sys
import unicodedata
from typing import Any

UNSEEN = ("Mn", "Me", "Cf")  # combining marks and characters that only change others


def width(text: str) -> int:
    """Return the columns that a text needs in a terminal: two per wide character, such as a Chinese one."""
    seen = (char for char in text if unicodedata.category(char) not in UNSEEN)
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in seen)


def start_of(text: str, columns: int) -> str:
    """Return the longest start of a text that needs at most this many columns."""
    needed = 0
    for place, char in enumerate(text):
        needed += width(char)
        if needed > columns:
            return text[:place]
    return text


def padded(text: str, columns: int, right: bool = False) -> str:
    """Return a text with spaces up to this many columns: after it or, to move it to the right, before it."""
    space = " " * (columns - width(text))
    return space + text if right else text + space


def wrapped(text: str, columns: int, indent: str = "  ") -> list[str]:
    """Return one line of text as lines that need at most this many columns, broken at spaces or within a long word.

    indent: what stands before each line but the first.
    """
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1].strip() else lines[-1] + word
        if width(joined) <= columns:
            lines[-1] = joined
            continue
        if lines[-1].strip():
            lines.append(indent)
        while width(lines[-1] + word) > columns:
            part = start_of(word, columns - width(lines[-1])) or word[:1]
            lines[-1] += part
            word = word[len(part) :]
            lines.append(indent)
        lines[-1] += word
    return lines


def fitted(text: str, columns: int) -> str:
    """Return a text whose lines fit a terminal of this many columns.

    Lines that begin with two spaces (rows of tables, commands to copy) stay as they are.
    """
    lines = text.split("\n")
    return "\n".join(part for line in lines for part in ([line] if line.startswith("  ") else wrapped(line, columns)))


def for_stream(text: str, stream: Any) -> str:
    """Return a text as a stream shows it best: fitted to its columns if it is a terminal, otherwise as it is."""
    terminal = getattr(stream, "isatty", bool)()  # a stream of an editor may have no isatty
    return fitted(text, shutil.get_terminal_size().columns) if terminal else text


def for_stdout(text: str) -> str:
    """Return a text as stdout shows it best."""
    return for_stream(text, sys.stdout)
