"""The chat in a terminal: what the user types, the commands, what is kept of it. Imports no torch.

    chat(talk, turn, keyboard) -> exit code          turn(message, talk) answers a message and prints the answer

The script brings `turn`, so nothing here knows how an answer is made.
"""

import codecs
import contextlib
import dataclasses
import json
import locale
import os
import select
import shutil
import stat
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from config import LEAVES, ConfigError, GenerationConfig, coerce_flag, counted
from toolkit.encodings import not_utf8
from toolkit.regular_files import not_regular
from toolkit.startup import visible
from toolkit.text_width import for_stdout, wrapped

COMMANDS = {
    "/help": "show these lines",
    "/retry": "answer the last message again",
    "/undo": "forget the last message and its answer",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system prompt; /system alone: the template's own",
    "/set KEY VALUE": "change a setting; /set KEY shows it, /set alone shows all",
    "/save FILE": "add the conversation to FILE, as a line of .jsonl",
    "/load FILE": "continue the last conversation in such a file",
    "/exit": "leave; exit, /quit, /bye and Ctrl-D do the same (on Windows: Ctrl-Z, Enter)",
    '"""': 'begin a message of several lines; a line that ends with """ ends it',
}
NOTES = '''\
Ctrl-C stops an answer, or clears a half-typed message; on an empty line it leaves when pressed twice. Any other line is \
a message. Pasted lines are one message; where Python has no readline (Windows), put them between """ and """. Put a \
space before a message that begins like a command.'''

LEAVE = ("/exit", "exit", "/quit", "/bye")
FENCE = '"""'  # begins and ends a block
STATISTICS = "\x1b[36m"  # cyan: old consoles of Windows have no dim text
LONGEST = 4095 if sys.platform == "linux" else 1023  # bytes of a line that a terminal keeps for a program that is busy
HISTORY_BYTES = 2**20  # of the newest messages that a chat begins with


class Command(NamedTuple):
    """A command that the script brings: what /help says, and what is done with the words after it."""

    what: str
    run: Callable[[str, "Conversation"], None]


def show(text: str) -> None:
    """Print a text on stdout for a person to read; on a terminal, broken between words."""
    print(for_stdout(visible(text)), flush=True)


def help_text(columns: int, more: Mapping[str, Command] | None = None) -> str:
    """Return what /help shows in a terminal of this many columns. more: commands that the script has brought."""
    columns = max(36, min(columns, 80)) - 1
    known = COMMANDS | {name: command.what for name, command in (more or {}).items()}
    lines = [line for name, what in known.items() for line in wrapped(f"{name:<18}{what}", columns, " " * 18)]
    return "\n".join([*lines, *wrapped(NOTES, columns, "")])


def has_colour() -> bool:
    """Return whether stdout is a terminal with colours and the user has not turned them off (https://no-color.org)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return False
    if os.name == "nt":
        import colorama  # tqdm installs it there

        colorama.just_fix_windows_console()
        return True
    return os.environ.get("TERM", "dumb") != "dumb"


def remark(text: str) -> None:
    """Print a line that is not part of an answer: on a terminal, in colour and broken between words."""
    text = visible(text)
    if sys.stdout.isatty():
        text = "\n".join(wrapped(text, max(20, shutil.get_terminal_size().columns - 1), " "))
    print(f"{STATISTICS}{text}\x1b[0m" if has_colour() else text, flush=True)


# ------------------------------------------------------------------------------------------------ keyboard


def history_file() -> Path:
    """Return the file that keeps what was typed in earlier chats; raise OSError if there is no home folder."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = state if os.path.isabs(state) else os.path.expanduser("~/.local/state")
    if not os.path.isabs(folder):
        raise OSError("there is no home folder")
    return Path(folder, "qlora", "chat_history.jsonl")


def check_own(path: Path) -> None:
    """Raise OSError if something is at a path that is no regular file of the user's own: a link leads to another file."""
    if not os.path.lexists(path):
        return
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
        raise OSError(f"{path} is a link")
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its other end
        raise OSError(f"{path} is not a file")
    if found.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to another user")


class History:
    """The messages and commands of earlier chats, one JSON text per line, in a file that only the user can read.

    A file that cannot be read or written costs the history and one line that says so, and never the chat.
    """

    def __init__(self) -> None:
        self.file: Any = None  # open while lines can be added
        self.kept: list[str] = []  # the newest lines of earlier chats, the oldest of them first
        with self._or_say_why():
            path = history_file()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_own(path)
            self.kept = self._newest(path)
            # Without a buffer each line is one write, so that two chats do not mix their lines.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            os.fchmod(descriptor, 0o600)  # a copied file may be open to others
            self.file = open(descriptor, "ab", buffering=0)  # noqa: SIM115  # until the chat ends

    @contextlib.contextmanager
    def _or_say_why(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.file = None
            remark(f"[what you type is not kept for the next chat: {error}; --no_history hides this line]")

    def _newest(self, path: Path) -> list[str]:
        """Return the newest lines of the file, and shorten a file that has grown to twice their size."""
        if not path.exists():
            return []
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - HISTORY_BYTES))
            lines = file.read().splitlines(keepends=True)
        if size > 2 * HISTORY_BYTES:
            descriptor, name = tempfile.mkstemp(dir=path.parent)  # only the user can read it
            with open(descriptor, "wb") as file:
                file.writelines(lines[1:])
            os.replace(name, path)
        texts = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):  # a torn line
                texts.append(json.loads(line))
        return [text for text in texts if isinstance(text, str)]

    def add(self, text: str) -> None:
        """Write a message at the end of the file."""
        if self.file:
            with self._or_say_why():
                self.file.write((json.dumps(text) + "\n").encode())


def use_utf8_locale() -> None:
    """Have readline, which follows the locale, take a typed character such as 好 for one where Python reads UTF-8.

    With LC_ALL=C, or a locale that is not installed, Python reads UTF-8 and readline single bytes.
    """
    if codecs.lookup(sys.stdin.encoding).name != "utf-8":
        return
    given = os.environ.get("LC_ALL", "")  # an empty one is as good as none
    for name in (given, "C.UTF-8", "en_US.UTF-8"):
        os.environ["LC_ALL"] = name  # readline looks there at every line
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "")
            if codecs.lookup(locale.nl_langinfo(locale.CODESET)).name == "utf-8":
                return
    os.environ["LC_ALL"] = given
    remark("[this system has no UTF-8 locale: letters that are not ASCII cannot be typed at the prompt]")


def waiting_lines() -> str:
    """Return what was typed or pasted into a terminal and has not been asked for yet, if that has a whole line.

    Raise EOFError for a Ctrl-D alone, and ConfigError for a line that the terminal has cut.
    """
    import termios  # Windows has none

    data, descriptor = b"", sys.stdin.fileno()
    mode = termios.tcgetattr(descriptor)
    try:
        # A terminal holds 4,096 bytes; more of a long text follow as soon as these are read.
        while select.select([descriptor], [], [], 0.05 if data else 0)[0]:
            if not (part := os.read(descriptor, 65536)):
                if not data:
                    raise EOFError
                break
            if not data:  # from here on also what has no end of a line yet
                by_key = [*mode[:3], mode[3] & ~termios.ICANON, *mode[4:]]
                termios.tcsetattr(descriptor, termios.TCSANOW, by_key)
            data += part
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, mode)
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # what came at readline's prompt has the key itself
    if max(map(len, data.split(b"\n"))) >= LONGEST:
        raise ConfigError("the terminal has cut a line that came before the prompt, so it was dropped; paste it again")
    return data.decode(sys.stdin.encoding, "replace")


class Keyboard:
    """Reads what the user types, with line editing and a history where Python has readline and both ends are a terminal.

    keeps_history: whether the history is that of earlier chats too.
    """

    def __init__(self, keeps_history: bool = True) -> None:
        self.readline: Any = None
        self.history: History | None = None
        self.in_block = False
        if os.name == "nt" or not (sys.stdin.isatty() and sys.stdout.isatty()):  # Windows has line editing of its own
            return
        with contextlib.suppress(ImportError):
            import readline

            self.readline = readline
            use_utf8_locale()
            readline.set_auto_history(False)  # it would add each line of a block
            if "libedit" not in (readline.__doc__ or ""):  # which has no such setting
                readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
            self.history = History() if keeps_history else None
            for text in self.history.kept if self.history else ():
                self._offer(text)

    def half_typed(self) -> bool:
        """Return whether Ctrl-C, which has just come, interrupted a message; without readline only a block is known."""
        return self.in_block or bool(self.readline and self.readline.get_line_buffer())

    def _offer(self, text: str) -> None:
        with contextlib.suppress(ValueError):  # a null, or characters that this locale does not have
            self.readline.add_history(text)

    def remember(self, text: str) -> None:
        """Put a message into the history of this chat, and into that of the next ones."""
        if self.readline and text.strip() and text.rstrip() not in LEAVE:
            self._offer(text)
            if self.history:
                self.history.add(text)

    def read(self) -> tuple[str, bool]:
        """Return what the user enters, and whether it is certainly a message, since it was put between two FENCEs.

        Raise EOFError at the end of the input, KeyboardInterrupt at Ctrl-C, and ConfigError for what cannot be used.
        """
        self.in_block = False
        text = self._line()
        # A pasted text that only begins with a FENCE is a program with a docstring, and complete.
        fenced = text.startswith(FENCE) and ("\n" not in text or text.rstrip().endswith(FENCE))
        if fenced:
            text = self._block(text.removeprefix(FENCE))
        encoding = sys.stdin.encoding or "utf-8"
        if "\ufffd" in text and "\ufffd" not in text.encode(encoding, "replace").decode(encoding):
            raise ConfigError(
                f"the message has characters that are not {encoding}, which Python reads here; "
                "leave, and start again with LC_ALL=C.UTF-8"
            )
        self.remember(text)
        return text, fenced

    def _line(self) -> str:
        """Return what the user enters at the prompt.

        Several lines that came at once, or before the prompt, are offered for editing as one message: a paste that the
        terminal does not mark, since readline or the terminal cannot, or since it came while the model was busy.
        """
        if not self.readline:
            return input("\n> ")
        lines = waiting_lines()
        if not lines:
            text = input("\n> ")
            if not (lines := waiting_lines()):
                return text
            lines = f"{text}\n{lines}"
        elif lines.find("\n") == len(lines) - 1:  # a line that was typed while the model was busy
            print(f"\n> {visible(lines)}", end="", flush=True)
            return lines.removesuffix("\n")
        print()
        remark("[these lines came at once and are one message: Enter sends it, Ctrl-C drops it]")
        self.readline.set_startup_hook(lambda: self.readline.insert_text(lines.rstrip("\n").replace("\0", "")))
        try:
            return input("> ")
        finally:
            self.readline.set_startup_hook(None)

    def _block(self, first: str) -> str:
        """Return a block, whose first line is given; raise ConfigError if the input ends before the block does."""
        lines, self.in_block = [first], True
        while not lines[-1].rstrip().endswith(FENCE):
            try:
                lines.append(input("... "))
            except EOFError:
                raise ConfigError(f"the message was not sent: expected {FENCE} at its end") from None
        self.in_block = False
        return "\n".join(lines).rstrip().removesuffix(FENCE).strip("\n")


# ------------------------------------------------------------------------------------------------ commands


@dataclasses.dataclass
class Conversation:
    """What a chat remembers."""

    settings: GenerationConfig
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)  # user, assistant, user, …


Turn = Callable[[str, Conversation], None]


def set_knob(talk: Conversation, key: str, value: str) -> None:
    """Set a generation.* key as a flag would and show it; without a value only show it, without a key show all."""
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    if key and key not in names:
        raise ConfigError(f"/set: there is no key {key}; the keys are {', '.join(names)}")
    if value:
        change: dict[str, Any] = {key: coerce_flag(LEAVES[f"generation.{key}"], "" if value == '""' else value)}
        talk.settings = dataclasses.replace(talk.settings, **change)
    for name in [key] if key else names:
        now = talk.settings[name]
        shown = {None: "null", "": '""'}.get(now, now)
        show(f"{name} = {shown}")


def save(talk: Conversation, path: str) -> None:
    """Append the conversation, with the system prompt if one is set, to a file: {"messages": [...]}."""
    if not path or not talk.messages:
        raise ConfigError("/save: the conversation is still empty" if path else "/save: expected the name of a file")
    prompt = talk.settings.system_prompt
    system = [] if prompt is None else [{"role": "system", "content": prompt}]
    try:
        if os.path.exists(os.path.expanduser(path)) and (problem := not_regular(os.path.expanduser(path))):
            raise ValueError(f"expected a file to add to, got {problem}")
        # One write without a buffer, so that two sessions which save into one file do not mix their lines.
        with open(os.path.expanduser(path), "ab", buffering=0) as file:
            file.write((json.dumps({"messages": system + talk.messages}, ensure_ascii=False) + "\n").encode())
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise ConfigError(f"/save: {error}") from None
    show(f"added the conversation ({counted(len(talk.messages), 'message')}) to {path}")


def read_conversation(line: str) -> tuple[str | None, list[dict[str, str]]]:
    """Return the system prompt, or None, and the messages of a line that /save has written; raise ValueError."""
    with contextlib.suppress(Exception):  # whatever is wrong with the line, the error below says what is expected
        messages = [{"role": m["role"] + "", "content": m["content"] + ""} for m in json.loads(line)["messages"]]
        messages = json.loads(json.dumps(messages, ensure_ascii=False).encode("utf-8", "replace"))
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        if messages and [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2):
            return system, messages
    raise ValueError("expected `messages` (role, content) of user and assistant in turn in its last line")


def load(talk: Conversation, path: str) -> None:
    """Continue the last conversation of a file that /save has written, with its system prompt."""
    if not path:
        raise ConfigError("/load: expected the name of a file")
    file = os.path.expanduser(path)
    try:
        if os.path.exists(file) and (problem := not_regular(file)):
            raise ValueError(f"expected a file of conversations, got {problem}")
        if problem := not_utf8(file):
            raise ValueError(problem)
        lines = [line for line in Path(file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        system, messages = read_conversation(lines[-1] if lines else "")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"/load: cannot continue {path}: {reason}") from None
    talk.messages = messages
    show(f"the conversation of {path} ({counted(len(messages), 'message')}) continues")
    if system != talk.settings.system_prompt:
        talk.settings = dataclasses.replace(talk.settings, system_prompt=system)
        set_knob(talk, "system_prompt", "")


def last_turn(talk: Conversation, word: str) -> str:
    """Take the last message and its answer out of the conversation and return the message."""
    if not talk.messages:
        raise ConfigError(f"{word}: the conversation is still empty")
    message = talk.messages[-2]["content"]
    talk.messages = talk.messages[:-2]
    return message


def retry(talk: Conversation, turn: Turn) -> None:
    """Answer the last message again; if that fails, the conversation stays as it was."""
    before = talk.messages
    message = last_turn(talk, "/retry")
    try:
        turn(message, talk)
    except BaseException:
        talk.messages = before
        raise


def command(line: str, talk: Conversation, turn: Turn, more: Mapping[str, Command] | None = None) -> None:
    """Carry out a line that begins with a slash. Raise ConfigError if it cannot be done. more: as in help_text."""
    word, _, rest = line.strip().partition(" ")
    key, _, value = rest.strip().partition(" ")
    brought = {name.split()[0]: found for name, found in (more or {}).items()}
    if word == "/help":
        print(help_text(shutil.get_terminal_size().columns, more))
    elif word in brought:
        brought[word].run(rest.strip(), talk)
    elif word == "/retry":
        retry(talk, turn)
    elif word == "/undo":
        show(f"forgotten: {textwrap.shorten(last_turn(talk, word), 60, placeholder=' ...')}")
    elif word == "/reset":
        talk.messages = []
        print("the conversation is forgotten")
    elif word == "/system":
        set_knob(talk, "system_prompt", rest.strip() or "null")
    elif word == "/set":
        set_knob(talk, key, value.strip())
    elif word == "/save":
        save(talk, rest.strip())
    elif word == "/load":
        load(talk, rest.strip())
    else:
        raise ConfigError(f"{word}: no such command; /help lists them")


# ------------------------------------------------------------------------------------------------ the chat


def respond(
    text: str, is_message: bool, talk: Conversation, turn: Turn, more: Mapping[str, Command] | None = None
) -> bool:
    """Carry out a command or answer a message; return False if the user wants to leave."""
    # Pasted lines that begin with a slash are a message too, such as an error with a file's name.
    if not is_message and ("\n" not in text or text.startswith("/system ")):
        if text.rstrip() in LEAVE:
            return False
        if text.startswith("/"):
            command(text, talk, turn, more)
            return True
    if text.strip():
        turn(text.rstrip("\n"), talk)
    return True


def chat(talk: Conversation, turn: Turn, keyboard: Keyboard, more: Mapping[str, Command] | None = None) -> int:
    """Answer messages and carry out commands until the user leaves; return 0.

    turn: answers a message, prints the answer and adds both to the conversation. It raises ConfigError, and changes
    nothing, if it cannot. more: as in help_text.
    """
    at_prompt, leaving = True, False  # leaving: the last key was Ctrl-C at the prompt
    while True:
        try:
            at_prompt = True
            text, is_message = keyboard.read()
            at_prompt = leaving = False
            if not respond(text, is_message, talk, turn, more):
                return 0
        except ConfigError as error:
            leaving = False
            show("\n".join(error.problems))
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            if not at_prompt:  # while a message was prepared, or a command carried out
                remark("[stopped]")
                continue
            half_typed = keyboard.half_typed()
            if leaving and not half_typed:
                return 0
            if not half_typed:
                remark("[press Ctrl-C again to leave]")
            leaving = not half_typed
