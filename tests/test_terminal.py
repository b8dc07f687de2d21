"""Training in a real terminal: the screens as text, at two widths and in two locales, and Ctrl-C at several moments.

Numbers that differ from machine to machine are written as N.
"""

import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from toolkit.text_width import width

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny" / "config.yaml"
BAR = r"%\||examples/s"  # a bar of a known length, or of an unknown one


def screen(command: list[object], columns: int, locale: str, folder: Path, keys: dict[str, bytes]) -> tuple[str, int]:
    """Return what a terminal shows of a command, as lines, and its exit code.

    keys: what is typed once a text has appeared, in this order. A line that a bar has drawn over is what it became last.
    """
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(folder)
        environment = {**os.environ, "LC_ALL": locale, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        os.execve(sys.executable, [sys.executable, *map(str, command)], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, b"\x32\0" + columns.to_bytes(2, sys.byteorder) + bytes(4))
    shown, todo, deadline = b"", list(keys.items()), time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        shown += part
        if todo and todo[0][0].encode() in shown:
            os.write(terminal, todo.pop(0)[1])
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert not todo, shown.decode(errors="replace")
    lines = shown.decode().replace("\r\n", "\n").replace("\x1b[A", "").split("\n")  # \x1b[A: a line up, between bars
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines), os.waitstatus_to_exitcode(
        status
    )


def steady(text: str) -> str:
    """Return a screen without its bar, and with N for numbers that are not the same everywhere."""
    text = "\n".join(line for line in text.split("\n") if line and not re.search(BAR, line))
    text = re.sub(r"(Python|torch|transformers|peft|bitsandbytes) \d[^ \n]*", r"\1 N", text)
    text = re.sub(r"(threads: |Memory: |memory |lr |norm |loss [+-]?|perplexity |before, |± )[\d.e+-]+", r"\1N", text)
    return re.sub(r"[\d,]+ tokens/s", "N tokens/s", text)


@pytest.fixture
def flags(tmp_path):
    """Flags of a run of three short steps on forty lines of text."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text for the terminal\n" for i in range(60)), "utf-8")
    flags = ["--config", TINY, "--dataset", "text.txt", "--max_length", 32, "--max_steps", 3, "--logging_steps", 2]
    return [*flags, "--compute_dtype", "float32", "--output_dir", "out put"]


SCREEN = """\
loading torch, transformers, peft and bitsandbytes ...
============================================================
Device: cpu
GPU: none | CPU threads: N
Python N | torch N | transformers N
peft N | bitsandbytes N
Compute type: torch.float32 | processes: 1
============================================================
Memory: N GiB in this process (no GPU)
trainable params: 315,392 || all params: 4,580,608 || trainable%: 6.8854
fast path: none (no gain on a CPU)
data: 57 rows, 1 document, 675 tokens in 22 blocks of 32
data: held out: 37 tokens in 2 blocks
steps: 3 of 8 sequences; 3 per epoch, the last of 6 (8 without packing)
steps: 3 in all learn little: training.max_steps ends the run there
data: read as text, from column text, each row a line of one running text
first block: line 0 of a text for the terminal\\nline 1 of a text for the term …
step 0: validation loss N | perplexity N | best
step 2/3 | loss N | lr N | grad norm N | N tokens/s
step 3/3 | loss N | lr N | grad norm N | N tokens/s
step 3: validation loss N | perplexity N | best
step 3: checkpoint written to out put/checkpoint-3
perplexity N before, N after (step 3, the best by validation loss)
adapter - base: loss -N ± N (standard error over 2 blocks)
peak memory N GiB
adapter, curves and log are in out put
try it: python inference_example.py --adapter 'out put' --raw"""


@pytest.mark.parametrize("columns, locale", [(80, "C.UTF-8"), (200, "C")])
def test_a_run_in_a_terminal(tmp_path, flags, columns, locale):
    shown, code = screen([ROOT / "train_qlora.py", *flags], columns, locale, tmp_path, {})
    assert code == 0 and max(map(width, shown.split("\n"))) <= columns
    assert steady(shown) == SCREEN
    log = (tmp_path / "out put" / "training_log.txt").read_text(encoding="utf-8").splitlines()
    assert steady("\n".join(log)) == SCREEN.partition("\n")[2]  # all but the first line, whatever the width


def test_a_long_line_is_broken_between_words(tmp_path, flags):
    deep = Path("a folder", *["with words in its name"] * 5)
    shown, code = screen([ROOT / "train_qlora.py", *flags, "--output_dir", deep], 80, "C.UTF-8", tmp_path, {})
    lines = shown.split("\n")
    assert code == 0 and max(map(width, lines)) <= 80
    said = f"step 3: checkpoint written to {deep / 'checkpoint-3'}"
    assert said in " ".join(line.strip() for line in lines)
    assert said in (tmp_path / deep / "training_log.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_in_a_run_says_how_to_continue(tmp_path, flags, again):
    """Once, at the first step; or twice."""
    keys = {"perplexity": b"\x03"} | ({"stopping after this step": b"\x03"} if again else {})
    long = [*flags, "--max_steps", 4000, "--seed", 3, "--overwrite"]
    shown, code = screen([ROOT / "train_qlora.py", *long], 80, "C.UTF-8", tmp_path, keys)
    assert code == 130
    *_, said, command = [line for line in shown.split("\n") if line and not re.search(BAR, line)]
    ended = "stopped at once; there is no checkpoint yet; to start again:"
    # The terminal echoes ^C before what is said.
    assert said.endswith(ended) if again else re.fullmatch(r"stopped after step \d+ of 4000; to continue:", said), shown
    assert shown.endswith("\n")  # and not the bar, beside which the shell's next line would stand
    assert command == "  " + shlex.join(map(str, [sys.executable, ROOT / "train_qlora.py", *long[:-1]]))


def test_a_run_with_nothing_left_to_train(tmp_path, flags):
    run = [ROOT / "train_qlora.py", *flags]
    assert screen(run, 80, "C.UTF-8", tmp_path, {})[1] == 0
    shown, code = screen([*run, "--max_steps", 2], 80, "C.UTF-8", tmp_path, {})
    lines = shown[shown.index("resuming") :].splitlines()
    assert code == 0 and lines[:2] == [
        "resuming from out put/checkpoint-3 at step 3",
        "nothing left to train: training.max_steps asks for 2 steps",
    ]
    assert lines[2].startswith("perplexity ") and "step/s" not in shown


def test_ctrl_c_before_the_first_step(tmp_path, flags):
    shown, code = screen([ROOT / "train_qlora.py", *flags], 80, "C", tmp_path, {"Compute type": b"\x03"})
    assert code == 130 and not (tmp_path / "out put").exists()
    assert shown.endswith("stopped before the first step; the same command starts again\n")
