"""Answers beside each other: a column for each of several voices, and a blind test of two. Imports no torch.

A voice is the base or one of its adapters.
"""

import json
import math
import os
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import ConfigError, counted
from toolkit.chat import Command, Conversation, remark, show
from toolkit.encodings import not_utf8
from toolkit.regular_files import not_regular
from toolkit.startup import visible
from toolkit.text_width import padded, wrapped

BASE = "base"  # what the base alone is called among the adapters
GAP, NARROWEST = 2, 16  # columns of the terminal between answers, and of an answer
RESULTS = "ab.jsonl"

# ------------------------------------------------------------------------------------------------ columns


def beside(texts: dict[str, str], columns: int) -> str:
    """Return texts beside each other under their names, within the columns of the terminal.

    Where there is no room for all, the rest stands below.
    """
    room = max(1, min(len(texts), (columns + GAP) // (NARROWEST + GAP)))
    names = list(texts)
    blocks = [names[i : i + room] for i in range(0, len(names), room)]
    size = max(1, (columns + GAP) // room - GAP)
    return "\n\n".join("\n".join(block({name: texts[name] for name in part}, size)) for part in blocks)


def block(texts: dict[str, str], size: int) -> list[str]:
    """Return the lines of texts beside each other, each `size` columns wide, under their names and a rule."""
    cells = []
    for name, text in texts.items():
        lines = visible(text).replace("\t", "    ").split("\n")
        head = wrapped(visible(name), size, indent="")
        cells.append((head, [part for line in lines for part in wrapped(line, size, indent="")]))
    high = max(len(head) for head, _ in cells)
    stacks = [[*[""] * (high - len(head)), *head, "-" * size, *lines] for head, lines in cells]
    rows = [[stack[i] if i < len(stack) else "" for stack in stacks] for i in range(max(map(len, stacks)))]
    return [(" " * GAP).join(padded(cell, size) for cell in row).rstrip() for row in rows]


# ------------------------------------------------------------------------------------------------ the blind test


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p of a sign test: how likely so uneven a result is if both were equally good. No ties."""
    n, few = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of earlier comparisons; [] if there is none. Raise ConfigError if it is another file."""
    if not os.path.lexists(path):
        return []
    expected = f"/ab: expected a file of earlier comparisons, or a new name, got {path}"
    try:
        if problem := not_regular(path) or not_utf8(path):
            raise ValueError(problem)
        *lines, torn = path.read_text(encoding="utf-8").split("\n")
        if torn:  # the next row would be written behind it
            raise ValueError("its last line has no end")
        rows = [json.loads(line) for line in lines if line.strip()]
        for row in rows:
            if not (row["voices"][0] != row["voices"][1] and row["better"] in (*row["voices"], None)):
                raise ValueError("a row that names no two voices")
        return rows
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ConfigError(f"{expected} ({' '.join(str(error).split())[:150]})") from None


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line about each pair of voices: how often each was better, and whether that may be chance."""
    lines = []
    for one, two in dict.fromkeys(tuple(sorted(row["voices"])) for row in rows):
        better = [row["better"] for row in rows if sorted(row["voices"]) == [one, two]]
        wins, losses, ties = better.count(one), better.count(two), better.count(None)
        p = sign_test(wins, losses) if wins + losses else 1.0
        means = "unlikely to be chance" if p < 0.05 else "may be chance"
        lines.append(f"{one} better {wins}, {two} better {losses}, alike {ties}: sign test p = {p:.3g} ({means})")
    return lines


OFF = "/ab off"  # what ends the test


class BlindTest:
    """The commands of a chat about its voices: /adapter and /adapters, and /ab, which compares two without names.

    voices: their names. use: makes one of them answer from now on. answer: prints an answer of the voice that is in use,
    without adding it to the conversation, and returns it; it may raise what a turn does.
    """

    def __init__(
        self, voices: dict[str, str], active: str, use: Callable[[str], None],
        answer: Callable[[str, Conversation], str], draw: random.Random | None = None,
    ):  # fmt: skip
        self.voices, self.active, self.use, self.answer = voices, active, use, answer
        self.draw = draw or random.Random()
        self.file: Path | None = None
        self.pair: list[str] = []  # the two that /ab names; empty: drawn anew for each message
        self.rows: list[dict[str, Any]] = []

    def commands(self) -> dict[str, Command]:
        """Return the commands by what /help shows of them."""
        found = {"/adapters": Command("list the adapters", lambda rest, talk: self.show_voices())}
        found["/adapter NAME"] = Command(
            "switch to another adapter, or to base, which has none", lambda rest, talk: self.switch(rest)
        )
        what = "answer twice, without names, and ask which is better; /ab FILE.jsonl and /ab NAME NAME choose; /ab off"
        return found | {"/ab": Command(what, lambda rest, talk: self.begin_or_end(rest))}

    def known(self, name: str, command: str) -> str:
        """Return a voice's name; raise ConfigError if there is none of this name."""
        if name not in self.voices:
            raise ConfigError(f"{command}: there is no {name or 'name'}; the names are {', '.join(self.voices)}")
        return name

    def show_voices(self) -> None:
        for name, what in self.voices.items():
            show(f"{'*' if name == self.active else ' '} {name} ({what})")

    def switch(self, name: str) -> None:
        """Have another voice answer from the next message on; the conversation stays."""
        self.active = self.known(name, "/adapter")
        self.use(name)
        show(f"{name} answers from here on; the conversation stays")

    # -------------------------------------------------------------------------------------------- two at a time

    def begin_or_end(self, rest: str) -> None:
        """Begin the test, with the words after /ab, or end it."""
        if rest == "off" or (self.file and not rest):
            self.end()
            return
        try:
            words = shlex.split(rest)  # a name with a space stands in quotes
        except ValueError as error:
            raise ConfigError(f"/ab: {error}: {rest}") from None
        file = Path(os.path.expanduser(words.pop() if words and words[-1].endswith(".jsonl") else RESULTS))
        pair = [self.known(name, "/ab") for name in words]
        if len(self.voices) < 2:
            raise ConfigError("/ab: expected an adapter beside base, got base alone; --adapter names adapters")
        if len(pair) not in (0, 2) or len(set(pair)) < len(pair):
            raise ConfigError(f"/ab: expected two different ones of {', '.join(self.voices)}, got {' '.join(pair)}")
        self.rows = read_results(file)
        if not os.access(file if file.exists() else file.parent, os.W_OK):  # before the user has judged two answers
            raise ConfigError(f"/ab: cannot write {file}")
        self.file, self.pair = file, pair
        earlier = f", which has {counted(len(self.rows), 'comparison')}" if self.rows else ""
        show(f"each message gets two answers now, in random order; results go to {file}{earlier}; /ab off ends it")

    def end(self) -> None:
        """End the test, if there is one, and say how it came out."""
        if self.file:
            for line in summary(self.rows) or ["no comparison was made"]:
                show(line)
        self.file = None

    def turn(self, text: str, talk: Conversation) -> None:
        """Answer a message twice, ask which answer is better, and go on with that one. What is stopped changes nothing."""
        pair = self.pair or self.draw.sample(list(self.voices), 2)
        pair, answers = self.draw.sample(pair, 2), []
        try:
            for number, name in enumerate(pair, 1):
                show(f"\n--- answer {number}")
                self.use(name)
                answers.append(self.answer(text, talk))
            choice = self.ask()
        finally:
            self.use(self.active)
        if choice in ("s", OFF):
            remark("[nothing was counted, and the message was dropped]")
            if choice == OFF:
                self.end()
            return
        better = {"1": 0, "2": 1}.get(choice)
        self.record(
            {"prompt": text, "voices": pair, "answers": answers, "better": None if better is None else pair[better]}
        )
        user, assistant = {"role": "user", "content": text}, {"role": "assistant", "content": answers[better or 0]}
        talk.messages = [*talk.messages, user, assistant]
        remark(f"[1 was {pair[0]}, 2 was {pair[1]}; {counted(len(self.rows), 'comparison')} so far]")

    def ask(self) -> str:
        """Return 1, 2, =, s or /ab off, as the user types it."""
        while True:
            typed = input("which is better? 1, 2, = (alike) or s (skip): ").strip().lower()
            if typed in ("1", "2", "=", "s", OFF):
                return typed
            remark(f"[not read: here 1, 2, =, s or {OFF} is expected, then the next message]")

    def record(self, row: dict[str, Any]) -> None:
        """Add a comparison to the file."""
        try:
            with open(self.file, "ab", buffering=0) as file:  # type: ignore[arg-type]  # one write: a whole row or none
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        except OSError as error:
            raise ConfigError(f"/ab: cannot write {self.file}: {error.strerror or error}") from None
        self.rows.append(row)
