"""A program in a real terminal, a pseudo-terminal with a size: what is typed into it, and what it shows."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UP, CTRL_C, CTRL_D, BACKSPACE = "\x1b[A", "\x03", "\x04", "\x7f"


def environment(home: Path, **changes: str) -> dict[str, str]:
    """Return the environment for a program in an xterm of a user with another home folder, in UTF-8 unless changed."""
    own = ("LC_", "LANG", "NO_COLOR", "XDG_", "COLUMNS")  # of whoever runs the tests
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    kept |= {"TERM": "xterm", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT), "HOME": str(home), "INPUTRC": "/dev/null"}
    return kept | changes


class Terminal:
    """A program that runs in a terminal of its own; `with` ends it if it has not ended."""

    def __init__(self, command: list[str], env: dict[str, str], columns: int = 80) -> None:
        self.raw, self.seen, self.code = b"", 0, None
        self.child, self.end = pty.fork()
        if not self.child:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
            os.execve(command[0], command, env)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        if self.code is None:
            os.kill(self.child, 9)
            os.waitpid(self.child, 0)
        os.close(self.end)

    @property
    def text(self) -> str:
        """What was shown so far, without escape sequences and carriage returns."""
        text = self.raw.decode("utf-8", "replace")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)

    def type(self, *keys: str, then: str) -> str:
        """Type, wait until a text appears after what was waited for before, and return what was shown up to it."""
        self._send(*keys)
        return self.wait(then)

    def pasted(self, text: str) -> str:
        """Return what a terminal sends for a pasted text: Enter for each end of a line, and marks if they are asked for."""
        asked = self.raw.rfind(b"\x1b[?2004h") > self.raw.rfind(b"\x1b[?2004l")
        return (f"\x1b[200~{text}\x1b[201~" if asked else text).replace("\n", "\r")

    def enter(self, *keys: str, then: str) -> str:
        """Type a message and Enter, wait for a text and for the next prompt; return what was shown up to the text.

        What is typed before the prompt is edited by the terminal itself, which does not know all keys.
        """
        shown = self.type(*keys, "\r", then=then)
        self.wait("\n> ")
        return shown

    def wait(self, text: str, seconds: float = 60) -> str:
        """Wait until a text appears after what was waited for before; return what was shown up to it."""
        limit = time.monotonic() + seconds
        while (place := self.text.find(text, self.seen)) < 0:
            assert time.monotonic() < limit and self._read(), f"{text!r} does not appear in: {self.text[self.seen :]!r}"
        shown, self.seen = self.text[self.seen : place], place + len(text)
        return shown

    def _send(self, *keys: str) -> None:
        if keys[0] == CTRL_C:
            time.sleep(0.25)  # Python notices Ctrl-C only while it waits for a key, not while it shows the one before
        os.write(self.end, "".join(keys).encode())

    def _read(self) -> bool:
        """Add what the program shows within a second; return False if it has ended."""
        if select.select([self.end], [], [], 1)[0]:
            try:
                data = os.read(self.end, 65536)
            except OSError:  # on Linux, the end of a program that has closed the terminal
                data = b""
            self.raw += data
            return bool(data)
        return True

    def left(self, *keys: str) -> int:
        """Type, wait until the program ends, and return its exit code."""
        self._send(*keys)
        limit = time.monotonic() + 60
        while self._read():
            assert time.monotonic() < limit, f"does not end: {self.text[self.seen :]!r}"
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        return self.code
