"""The chat in a real terminal, with a stub instead of a model; its commands and its history."""

import builtins
import contextlib
import json
import locale
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from config import ConfigError, load_config
from toolkit import chat
from toolkit.chat import HISTORY_BYTES, Conversation, History, Keyboard, command, load, save

with contextlib.suppress(ImportError):  # Windows
    from tests.terminal import BACKSPACE, CTRL_C, CTRL_D, UP, Terminal, environment

ROOT = Path(__file__).resolve().parents[2]
FIVE = "one\n\ttwo\n\n/four: 你好\nfive"

# Answers with what it was asked, and never answers the message "wait".
STUB = """
import signal, sys, time
from config import load_config
from toolkit.chat import Conversation, Keyboard, chat, remark, show

def turn(message, talk):
    if message == "wait":
        print("thinking")
        time.sleep(600)
    if message == "slow":
        print("thinking", flush=True)
        time.sleep(1)
    show(f"{len(talk.messages)} before " + (repr(message) if len(message) < 999 else f"{len(message)} characters"))
    remark("[" + " | ".join(["12 statistics of it"] * 5) + "]")
    talk.messages = [*talk.messages, {"role": "user", "content": message}, {"role": "assistant", "content": "yes"}]

signal.signal(signal.SIGINT, signal.default_int_handler)
for stream in (sys.stdin, sys.stdout):
    stream.reconfigure(errors="replace")  # as quantization_utils.quiet_libraries does
show("ready")
sys.exit(chat(Conversation(load_config(()).generation), turn, Keyboard("--no_history" not in sys.argv)))
"""


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., "Terminal"]]:
    """A function that starts a chat with the stub in a terminal: terminal(*flags, columns=80, **environment)."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, columns: int = 80, before: str = "", as_windows: str = "", **changes: str) -> "Terminal":
            program = [sys.executable, "-c", before + STUB.replace('show("ready")', as_windows), *flags]
            started = stack.enter_context(Terminal(program, environment(tmp_path, **changes), columns))
            started.wait("\n> ")
            return started

        yield start


def is_gnu_readline() -> bool:
    try:
        import readline
    except ImportError:
        return False
    return "libedit" not in (readline.__doc__ or "")


in_terminal = pytest.mark.skipif(not is_gnu_readline(), reason="Python has no GNU readline here")


@pytest.fixture
def talk() -> Conversation:
    turns = [{"role": role, "content": f"{role} {n}, 好"} for n in range(2) for role in ("user", "assistant")]
    return Conversation(load_config(()).generation, turns)


def never(message: str, talk: Conversation) -> None:
    raise AssertionError(f"{message!r} is no message")


# ------------------------------------------------------------------------------------------------ what is typed


@in_terminal
def test_pasted_lines_are_one_message_and_so_is_a_block(terminal: Callable) -> None:
    screen = terminal()
    screen.type(screen.pasted(FIVE), then="five")
    screen.enter(then=f"0 before {FIVE!r}")
    screen.enter(screen.pasted(FIVE + "\n"), then=f"2 before {FIVE!r}")  # with the last line's end
    screen.type('"""\r', then="\n... ")
    screen.type("/reset\r", then="\n... ")
    screen.enter('exit"""', then="4 before '/reset\\nexit'")
    screen.enter('"""/reset"""', then="6 before '/reset'")
    screen.enter(screen.pasted('"""A program.\n"""\nx = 1'), then=repr('"""A program.\n"""\nx = 1'))
    screen.enter(screen.pasted('"""A\nB"""'), then="10 before 'A\\nB'")
    screen.type('"""\r', then="\n... ")
    screen.type(CTRL_D, then='the message was not sent: expected """ at its end\n')
    screen.wait("\n> ")
    screen.enter("/system ", screen.pasted("One.\nTwo."), then="system_prompt = One.\nTwo.\n")
    screen.enter(UP, UP, then="12 before 'A\\nB'")  # a message of several lines comes back whole
    assert screen.left("exit\r") == 0


def test_a_block_and_the_words_that_leave_need_no_terminal(tmp_path: Path) -> None:
    for word in ("/exit", "exit", "/quit", "/bye", "exit "):
        typed = f'"""one\n\n/two\n"""\n exit\n{word}\nnever read\n'
        command = [sys.executable, "-c", STUB]
        env = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(command, input=typed, env=env, capture_output=True, encoding="utf-8")
        assert (done.returncode, done.stderr) == (0, "")
        assert "0 before 'one\\n\\n/two'\n" in done.stdout and "2 before ' exit'" in done.stdout
        assert "never" not in done.stdout and "\x1b" not in done.stdout
    assert not (tmp_path / ".local").exists()  # a history is for what a person types


@in_terminal
def test_ctrl_c_in_each_place(terminal: Callable) -> None:
    screen = terminal()
    screen.type("half", then="half")
    assert screen.type(CTRL_C, then="\n> ") == "\n"
    screen.enter("whole", then="0 before 'whole'")  # what was half typed is gone
    screen.type(CTRL_C, then="[press Ctrl-C again to leave]\n\n> ")
    screen.type("half", then="half")
    screen.type(CTRL_C, then="\n> ")
    screen.type("wait\r", then="thinking")
    screen.type(CTRL_C, then="[stopped]\n\n> ")
    screen.type(CTRL_C, then="[press Ctrl-C again to leave]\n\n> ")  # the one before was for the message
    screen.type('"""\r', then="\n... ")
    screen.type("dropped\r", then="\n... ")
    screen.type(CTRL_C, then="\n> ")
    screen.enter("still here", then="2 before 'still here'")
    screen.type("half", then="half")
    screen.type(CTRL_C, then="\n> ")  # it clears the line, and counts for nothing more
    screen.type(CTRL_C, then="[press Ctrl-C again to leave]\n\n> ")
    assert screen.left(CTRL_C) == 0
    assert "Traceback" not in screen.text


@in_terminal
@pytest.mark.parametrize("name", ["C.UTF-8", "C", "xx_XX.UTF-8"])
def test_typed_chinese_is_edited_by_the_character(terminal: Callable, name: str) -> None:
    screen = terminal(LC_ALL=name)
    screen.enter("你好吗x", BACKSPACE, BACKSPACE, then="0 before '你好'\n")
    screen.enter(UP, then="2 before '你好'\n")
    assert screen.left(CTRL_D) == 0


@in_terminal
def test_a_locale_that_has_no_chinese_is_named(terminal: Callable) -> None:
    screen = terminal(LC_ALL="C", PYTHONUTF8="0")
    screen.enter("x 你", then="the message has characters that are not ascii, which Python reads here; leave,\n")
    assert "  and start again with LC_ALL=C.UTF-8\n" in screen.text
    screen.enter("plain", then="0 before 'plain'")


def test_a_system_without_a_utf8_locale_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing(category: int, name: str) -> str:
        raise locale.Error("unsupported locale setting")

    class Typed:
        encoding = "UTF-8"

    monkeypatch.setattr(sys, "stdin", Typed())
    monkeypatch.setattr(locale, "setlocale", missing)
    monkeypatch.setenv("LC_ALL", "C")
    chat.use_utf8_locale()
    assert os.environ["LC_ALL"] == "C"
    assert capsys.readouterr().out.startswith("[this system has no UTF-8 locale: ")


# ------------------------------------------------------------------------------------------------ what is shown


@in_terminal
def test_statistics_fit_the_screen_and_have_a_colour_where_there_are_colours(terminal: Callable) -> None:
    piece = "12 statistics of it"
    folded = f"[{piece} | {piece} | {piece} | 12\n statistics of it | {piece}]\n"
    for columns, shown in ((80, folded), (200, f"[{' | '.join([piece] * 5)}]\n")):
        screen = terminal(columns=columns)
        screen.enter("Hello", then=shown)
        colour = screen.raw.index(b"\x1b[36m[12")
        assert b"before" in screen.raw[:colour] and screen.raw[colour:].index(b"\x1b[0m") > 5 * len(piece)
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        screen = terminal(**plain)
        screen.enter("Hello", then=folded)
        assert b"\x1b[36m" not in screen.raw


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_help_is_broken_between_words(columns: int) -> None:
    lines = chat.help_text(columns).splitlines()
    assert max(map(len, lines)) < columns
    expected = " ".join([*(f"{name} {what}" for name, what in chat.COMMANDS.items()), chat.NOTES])
    assert " ".join(lines).split() == expected.split()  # no word is cut
    assert len(chat.help_text(200)) == len(chat.help_text(80))  # lines of 200 columns are hard to read


def test_what_the_chat_says_is_broken_between_words(terminal: Callable) -> None:
    screen = terminal(columns=60)
    folded = "/set: there is no key nothing; the keys are max_new_tokens,\n  temperature, top_p, top_k, "
    screen.enter("/set nothing", then=folded)


LATE = "[these lines came at once and are one message: Enter sends it,\n Ctrl-C drops it]\n"


LIBEDIT = """
import readline, sys, types
names = [name for name in dir(readline) if not name.startswith("__")]
fake = types.ModuleType("readline", "Importing this module enables command line editing using libedit readline.")
fake.__dict__.update({name: getattr(readline, name) for name in names if name != "parse_and_bind"})
sys.modules["readline"] = fake  # any call of parse_and_bind fails
"""


@in_terminal
def test_a_paste_that_is_not_marked_is_one_message_too(terminal: Callable) -> None:
    """As with libedit on macOS, or in a terminal that knows no marks."""
    screen = terminal(columns=64, before=LIBEDIT)
    for number, text in enumerate((FIVE, FIVE + "\n")):
        assert screen.pasted(text) == text.replace("\n", "\r")
        screen.type(screen.pasted(text), then=LATE)
        screen.wait("five")
        screen.enter(then=f"{2 * number} before {FIVE!r}")
    screen.type(screen.pasted('"""one\ntwo"""'), then=LATE)
    screen.wait('two"""')
    screen.enter(then="4 before 'one\\ntwo'")
    screen.enter("plain", then="6 before 'plain'")
    screen.enter(UP, UP, then="8 before 'one\\ntwo'")
    assert screen.left("exit\r") == 0


WINDOWS = """
import os, sys, types
for name in ("readline", "termios", "fcntl", "pwd", "resource"):
    sys.modules[name] = None
sys.modules["colorama"] = types.SimpleNamespace(just_fix_windows_console=lambda: None)
"""


def test_a_chat_without_readline_as_on_windows(terminal: Callable, tmp_path: Path) -> None:
    """A message of several lines between two marks, Ctrl-C and the end of the input; nothing is kept in a history."""
    screen = terminal(before=WINDOWS, as_windows="os.name, sys.platform = 'nt', 'win32'")
    screen.enter("plain", then="0 before 'plain'")
    screen.type('"""one\r', then="\n... ")
    screen.enter('/two"""', then="2 before 'one\\n/two'")
    screen.type('"""half\r', then="\n... ")
    assert screen.type(CTRL_C, then="\n> ").endswith("^C\n")
    screen.type(CTRL_C, then="[press Ctrl-C again to leave]\n\n> ")
    screen.enter("still here", then="4 before 'still here'")
    screen.type("wait\r", then="thinking")
    screen.type(CTRL_C, then="[stopped]\n\n> ")
    assert screen.left(CTRL_D) == 0
    assert "Traceback" not in screen.text and not (tmp_path / ".local").exists()


@in_terminal
def test_lines_pasted_before_the_prompt_are_one_message(terminal: Callable) -> None:
    """While a model is loaded or answers, the terminal does not mark a paste; its lines must not become messages."""
    screen = terminal(columns=64)
    for number, text in enumerate((FIVE, FIVE + "\n", "\n\n" + FIVE)):
        screen.type("slow\r", then="thinking\n")
        screen.type(screen.pasted(text), then=LATE)
        screen.wait(text[-4:].strip())
        screen.enter(then=f"{4 * number + 2} before {text.rstrip()!r}")
    assert screen.text.count("before 'one") == 2
    screen.type("slow\r", then="thinking\n")
    screen.type(screen.pasted("詩\n" * 3000), then=LATE)  # more than the 4,096 bytes that wait in a terminal
    screen.enter(then="14 before 5999 characters")
    screen.type("slow\r", then="thinking\n")
    screen.type("a line\r", then="18 before 'a line'")  # one line is a message, as before
    screen.wait("\n> ")
    screen.type("slow\r", then="thinking\n")
    screen.type("/help\rhalf", then=LATE)
    screen.wait("half")
    screen.type(CTRL_C, then="\n> ")
    screen.enter("still here", then="22 before 'still here'")
    screen.type("slow\r", then="thinking\n")
    screen.type("x" * 5000 + "\r", then="the terminal has cut a line that came before the prompt")
    screen.wait("\n> ")
    screen.type("slow\r", then="thinking\n")
    assert screen.left(CTRL_D) == 0


# ------------------------------------------------------------------------------------------------ commands


def test_undo_forgets_the_last_turn(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    turns = talk.messages
    command("/undo", talk, never)
    assert talk.messages == turns[:2] and capsys.readouterr().out == "forgotten: user 1, 好\n"
    command("/undo", talk, never)
    for word in ("/undo", "/retry"):
        with pytest.raises(ConfigError, match=f"{word}: the conversation is still empty"):
            command(word, talk, never)


def test_retry_answers_the_last_message_again(talk: Conversation) -> None:
    turns, asked = talk.messages, []
    command("/retry", talk, lambda message, talk: asked.append((message, talk.messages)))
    assert asked == [("user 1, 好", turns[:2])]


@pytest.mark.parametrize("error", [ConfigError("too long"), KeyboardInterrupt()])
def test_a_retry_that_fails_changes_nothing(talk: Conversation, error: BaseException) -> None:
    def fails(message: str, talk: Conversation) -> None:
        raise error

    turns = list(talk.messages)
    with pytest.raises(type(error)):
        command("/retry", talk, fails)
    assert talk.messages == turns


@pytest.mark.parametrize("system", [None, "", "Be brief.\nBe kind."])
def test_load_continues_what_save_wrote(
    talk: Conversation, system: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "talk.jsonl")
    save(Conversation(talk.settings, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), path)
    talk.settings = talk.settings.__class__(**{**vars(talk.settings), "system_prompt": system})
    save(talk, path)
    new = Conversation(load_config((), {"generation.system_prompt": "Other.", "generation.top_k": "3"}).generation)
    capsys.readouterr()
    command(f"/load {path}", new, never)
    assert new.messages == talk.messages and new.settings.system_prompt == system and new.settings.top_k == 3
    shown = {None: "null", "": '""'}.get(system, system)
    assert capsys.readouterr().out == f"the conversation of {path} (4 messages) continues\nsystem_prompt = {shown}\n"
    command(f"/load {path}", new, never)
    assert "system_prompt" not in capsys.readouterr().out  # it is what it was


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD = {
    "empty": "",
    "no JSON": "Hello",
    "deep": "[" * 100_000,
    "a text": '"messages"',
    "no messages": '{"prompt": "a"}',
    "none at all": '{"messages": []}',
    "only the system's": json.dumps({"messages": [{"role": "system", "content": "a"}]}),
    "ends with the user's": json.dumps({"messages": [USER]}),
    "two users": json.dumps({"messages": [USER, USER, ASSISTANT, ASSISTANT]}),
    "another role": json.dumps({"messages": [{"role": "tool", "content": "a"}, ASSISTANT]}),
    "content of parts": json.dumps({"messages": [{"role": "user", "content": ["a"]}, ASSISTANT]}),
    "bad after good": json.dumps({"messages": [USER, ASSISTANT]}) + "\nHello",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_file_that_holds_no_conversation_changes_nothing(talk: Conversation, text: str, tmp_path: Path) -> None:
    turns, path = list(talk.messages), tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"/load: cannot continue .*bad\.jsonl: expected `messages` \(role, content\)"
    ):
        load(talk, str(path))
    assert talk.messages == turns


def test_files_that_cannot_be_loaded_are_named(talk: Conversation, tmp_path: Path) -> None:
    (tmp_path / "big5.jsonl").write_bytes("你好,世界。這是一個對話的檔案".encode("big5"))
    expected = {"": "expected the name", "~nobody/a": "No such file", "a\0b": "null", str(tmp_path): "expected a file"}
    expected[str(tmp_path / "big5.jsonl")] = "line 1 is not UTF-8: it looks like Big5"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        expected[str(tmp_path / "pipe")] = "expected a file"
        (tmp_path / "zeros").symlink_to("/dev/zero")
        expected[str(tmp_path / "zeros")] = "got a pipe, a socket or a device"
    if sys.platform == "linux":
        (tmp_path / "log").symlink_to("/proc/kmsg")
        expected[str(tmp_path / "log")] = "got /proc/kmsg, a file of the system"
    for path, reason in expected.items():
        with pytest.raises(ConfigError, match=f"^/load: .*{reason}"):
            load(talk, path)
    for path in [path for path in expected if path and not path.endswith("big5.jsonl")]:
        with pytest.raises(ConfigError, match="^/save: "):
            save(talk, path)


def test_half_a_character_in_a_file_becomes_a_question_mark(talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}')
    load(talk, str(path))
    assert talk.messages[0]["content"] == "?"


# ------------------------------------------------------------------------------------------------ history


@in_terminal
def test_what_was_typed_is_there_in_the_next_chat(terminal: Callable, tmp_path: Path) -> None:
    screen = terminal()
    screen.enter(screen.pasted(FIVE), then="0 before")
    screen.enter("/set top_p", then="top_p = ")
    assert screen.left("exit\r") == 0
    file = tmp_path / ".local" / "state" / "qlora" / "chat_history.jsonl"
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [FIVE, "/set top_p"]
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    file.chmod(0o644)
    screen = terminal("--no_history")
    screen.enter(UP, "new", then="0 before 'new'")
    assert screen.left("exit\r") == 0 and "new" not in file.read_text(encoding="utf-8")
    screen = terminal(LC_ALL="C")
    screen.enter(UP, UP, then=f"0 before {FIVE!r}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@in_terminal
def test_a_history_of_another_locale_is_no_hindrance(terminal: Callable, tmp_path: Path) -> None:
    (tmp_path / ".local" / "state" / "qlora").mkdir(parents=True)
    file = tmp_path / ".local" / "state" / "qlora" / "chat_history.jsonl"
    file.write_text('"known"\n"a\\u0000b"\n"\\ud83d"\n"\\u4f60"\n', encoding="utf-8")
    screen = terminal(LC_ALL="C", PYTHONUTF8="0", LANG="C")
    screen.enter(UP, then="0 before 'known'")


def test_the_history_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert chat.history_file() == tmp_path / "qlora" / "chat_history.jsonl"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # which the specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert chat.history_file() == tmp_path / ".local" / "state" / "qlora" / "chat_history.jsonl"


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "qlora").mkdir()
    return tmp_path / "qlora" / "chat_history.jsonl"


def test_torn_and_foreign_lines_of_the_history_are_left_out(history: Path) -> None:
    history.write_bytes(b'"one"\n"tor\n{"two": 2}\n\xff\n' + b"[" * 100_000 + b'\n\n"\\u4f60"\n')
    assert History().kept == ["one", "你"]


def test_a_long_history_is_shortened_to_its_newest_lines(history: Path) -> None:
    line = json.dumps("x" * 99) + "\n"
    history.write_text(line * (2 * HISTORY_BYTES // len(line) - 9) + '"last"\n')
    size = history.stat().st_size
    assert len(History().kept) < HISTORY_BYTES / len(line) + 1 and history.stat().st_size == size
    history.write_text(line * (2 * HISTORY_BYTES // len(line) + 9) + '"last"\n')
    first = History()
    assert first.kept[-1] == "last" and HISTORY_BYTES - len(line) <= history.stat().st_size <= HISTORY_BYTES
    first.add("new")
    second = History()
    assert second.kept == [*first.kept, "new"] and list(history.parent.iterdir()) == [history]


BLOCKED: dict[str, Callable[[Path], object]] = {
    "a link to a file": lambda path: (path.with_name("other").write_text(""), path.symlink_to("other")),
    "a second name of a file": lambda path: (
        path.with_name("other").write_text(""),
        os.link(path.with_name("other"), path),
    ),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a loop of links": lambda path: path.symlink_to(path),
    "a file instead of the folder": lambda path: (path.parent.rmdir(), path.parent.write_text("")),
}


@pytest.mark.skipif(os.name == "nt", reason="a chat on Windows keeps no history")
@pytest.mark.parametrize("block", BLOCKED.values(), ids=BLOCKED)
def test_a_history_that_cannot_be_kept_costs_one_line(
    history: Path, block: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    block(history)
    lost = History()
    lost.add("one")
    assert lost.kept == []
    other = history.with_name("other")
    assert not other.exists() or other.read_text() == ""
    assert capsys.readouterr().out.count("[what you type is not kept for the next chat: ") == 1


@in_terminal
def test_a_full_disk_does_not_end_a_chat(terminal: Callable, tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # the child begins with this limit
    try:
        screen = terminal(PYTHONDONTWRITEBYTECODE="1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    screen.type("one\r", then="[what you type is not kept for the next chat: [Errno 27] File too large")
    screen.wait("0 before 'one'")
    screen.wait("\n> ")
    assert "not kept" not in screen.enter("two", then="2 before 'two'")


def test_a_keyboard_without_a_terminal_keeps_nothing(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["one", "two"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    monkeypatch.setattr(sys, "stdin", open(os.devnull, encoding="utf-8"))  # noqa: SIM115
    keyboard = Keyboard()
    assert [keyboard.read(), keyboard.read()] == [("one", False), ("two", False)]
    assert not history.exists() and not keyboard.half_typed()
