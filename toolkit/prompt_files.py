"""Files of prompts, and of the answers to them that earlier calls have written. Imports no torch."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from config import ConfigError
from toolkit import strict_json
from toolkit.encodings import not_utf8
from toolkit.regular_files import not_regular

Prompt = str | list[dict[str, str]]  # a text, or the messages of a chat, of which the last is the user's


def clean(value: Any) -> Any:
    """Return the prompt with question marks instead of lone surrogates, which tokenizers and UTF-8 do not accept."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def read_row(line: str) -> Prompt:
    """Return the prompt of a line of .jsonl, `prompt` or `messages` up to the user's last one; raise ValueError."""
    with contextlib.suppress(Exception):  # whatever is wrong with the line, the error below says what is expected
        row = strict_json.decode(line, halves=True)  # `clean` replaces them
        prompt = row.get("prompt", row.get("messages"))
        if isinstance(prompt, str) and prompt.strip():
            return clean(prompt)
        messages = [{"role": message["role"] + "", "content": message["content"] + ""} for message in prompt]
        messages = (
            messages[:-1] if messages[-1]["role"] == "assistant" else messages
        )  # training data ends with the answer
        if messages[-1]["role"] == "user":
            return clean(messages)
    raise ValueError(
        "expected an object with a text `prompt`, or with `messages` (role, content) that end with the user's"
    )


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a .txt file (one per line, blank lines are skipped) or a .jsonl file; raise ConfigError."""
    read = {".txt": clean, ".jsonl": read_row}.get(path.suffix.lower())
    if read is None:
        raise ConfigError(f"--prompts: expected a .txt or .jsonl file, got {path}")
    where, prompts = str(path), []
    try:
        if os.path.lexists(path) and (problem := not_regular(path)):
            raise ConfigError(f"--prompts: expected a file, got {path}, which is {problem}")
        if problem := not_utf8(path):
            raise ConfigError(f"--prompts: cannot read {path}: {problem}")
        # utf-8-sig: editors on Windows may begin a file with a byte order mark
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            where = f"{path}, line {number}"
            prompts += [read(line)] if line.strip() else []
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts: {where}: {error}") from None
    if not prompts:
        raise ConfigError(f"--prompts: {path} has no prompts")
    return prompts


def finished_rows(output: Path, prompts: list[Prompt], names: list[str]) -> tuple[int, int]:
    """Return how many prompts an output file answers, and the bytes of those rows.

    Raise ConfigError if the file was not written for these prompts and, if there are several, these adapters.
    """
    try:
        if output.exists() and not_regular(output):  # reading a pipe would wait for its other end
            raise ValueError
        *rows, torn = output.read_bytes().split(b"\n") if output.exists() else [b""]
        found = [json.loads(row) for row in rows]
        known = [row["prompt"] for row in found] == prompts[: len(rows)]
        known &= all([*row.get("completions", [])] == (names if len(names) > 1 else []) for row in found)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        known = False
    # An incomplete last row, left by a call that was killed, is written again. Any other file is never overwritten.
    if not known or not (torn.startswith(b'{"prompt": ') or b'{"prompt": '.startswith(torn)):
        raise ConfigError(
            f"--output: {output} already exists and was not written for these prompts"
            f"{' and adapters' if len(names) > 1 else ''}; choose another --output"
        )
    return len(rows), sum(len(row) + 1 for row in rows)
