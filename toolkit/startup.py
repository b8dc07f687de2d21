"""Code that runs before torch is imported, and the printing of errors. This module imports no torch."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import gc
import importlib
import logging
import math
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # config needs PyYAML, and the installation check must be able to say that it is missing
    from config import ConfigError

# The modules that a run imports; the two scripts import all modules of the project.
MODULES: tuple[str, ...] = ("yaml", "config", "torch", "bitsandbytes", "transformers", "peft", "datasets", "accelerate")
MODULES += ("matplotlib.pyplot", "train_qlora", "inference_example")


def import_failures(modules: tuple[str, ...] = MODULES) -> list[str]:
    """Return a line with the reason for each module that cannot be imported; the same reason appears only once."""
    lines, reasons = [], set()
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken package can raise anything: ImportError, OSError, SyntaxError
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if reason not in reasons:
                lines.append(f"import {name}: fails: {reason}")
            reasons.add(reason)
    return lines


CANNOT_RUN = "training cannot run here: see the lines above"


def stop_where_imports_fail() -> None:
    """For the installation check: if an import of a run fails, print a line for each one and exit with code 1."""
    failures = import_failures(MODULES[:2])
    if not failures:
        with contextlib.suppress(Exception):  # an import that fails here fails again below, where it is named
            before_heavy_imports()
        failures = import_failures()
    if failures:
        print(*failures, CANNOT_RUN, sep="\n")
        sys.exit(1)


@contextlib.contextmanager
def compiling_later() -> Iterator[None]:
    """Delay torch.compile until the function that it returns is called, since it imports Inductor, which is slow."""
    import torch  # not at the top, so that errors in the configuration appear at once

    compile_now = torch.compile

    def compile_later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *arguments, **keywords: compiled()(*arguments, **keywords))

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


def before_heavy_imports(announce: bool = False) -> None:
    """Prepare for the heavy imports: make them quiet and quick, and let none run code from the hub.

    announce: say on stderr that they begin, since they take seconds.
    The scripts call this; importing a module does not.
    While it is imported, bitsandbytes would download a kernel from the hub if the package `kernels` is installed, and
    print a message if not. Where the system allows it, torch's allocator grows its segments, which reserves less
    memory (docs/measurements.md). `after_heavy_imports` undoes what holds for the imports alone.
    """
    refuse_unwritable_folders()
    if announce:
        say_loading()
    gc.disable()  # the imports make a million objects that stay; to look through them again and again takes a second
    if sys.platform != "win32" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    share_cores()
    # Use Triton's own folder, or the one beside Inductor's cache, from the start. Otherwise Inductor changes the folder
    # when it first compiles a kernel, and a second run does not find the kernels of the first one.
    home = os.path.join(os.environ.get("TRITON_HOME", os.path.expanduser("~")), ".triton", "cache")
    beside = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(beside, "triton") if beside else home)
    sys.excepthook = in_one_line
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # None makes `import kernels` fail
    # transformers imports sklearn where it is installed, which takes 1.3 s, for one kind of assisted generation.
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]
    with compiling_later():
        import bitsandbytes  # noqa: F401  (calls torch.compile for four functions that are rarely used)


def share_cores() -> None:
    """Let OpenMP's threads wait for each other in a loop for a shorter time, unless the user has chosen how they wait.

    By default they keep their cores for so long that another program which wants these, such as a browser, makes
    everything several times slower (docs/measurements.md, "A CPU that is shared"). Must be called before torch is imported.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "10000"


def refuse_unwritable_folders() -> None:
    """Exit with a line unless torch can write to the folders that it needs while it is imported."""
    from config import ConfigError  # not at the top: it needs PyYAML, whose absence is reported elsewhere

    setting, folder = "TMPDIR", os.environ.get("TMPDIR", "")
    try:
        tempfile.gettempdir()
        if chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            setting, folder = "TORCHINDUCTOR_CACHE_DIR", chosen
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        where = f"{folder!r}" if folder else "none"
        sys.exit(
            report(ConfigError(f"{setting}: expected a folder that can be written, got {where}: {error.strerror}"))
        )


def say_loading() -> None:
    """Say on stderr that the imports begin; of several processes only the first one says so."""
    if sys.stderr is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a full disk, a closed console
            print("loading torch, transformers, peft and bitsandbytes ...", file=sys.stderr, flush=True)


def unusable(flags: dict[str, Any]) -> list[str]:
    """Return a message if the current folder is gone, and one for each path or text that files in UTF-8 cannot hold.

    flags: what the user typed, by the name of the flag.
    """
    try:
        texts: dict[str, Any] = {"the current folder": os.getcwd()}
    except FileNotFoundError:
        return ["the current folder does not exist any more; change to another one"]
    problems = []
    for name, value in (texts | {f"--{name.split('.')[-1]}": value for name, value in flags.items()}).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text != text.encode("utf-8", "ignore").decode():
                problems.append(f"{name}: expected valid UTF-8, got {text!r}")
    return problems


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that main memory is exhausted. Only Python's own has a type of its own."""
    text = str(error).lower()
    known = ("bad_alloc", "can't allocate memory", "cannot allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(words in text for words in known)


def in_one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As sys.excepthook: print a line instead of a traceback if memory runs out while the libraries are imported, if one
    of them is not installed, or if a path is too long for the system, which many functions of Path raise.
    """
    if out_of_memory(error):
        print("error: out of main memory", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and error.name not in (None, "config", "toolkit", "fast_path"):
        remedy = "activate the environment that has it (. .venv/bin/activate), or pip install -r requirements.txt"
        print(f"error: the package {error.name} is not installed in {sys.executable}: {remedy}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        print(
            f"error: the name of a file or folder is too long: {visible(str(error.filename))[:100]}…", file=sys.stderr
        )
        sys.exit(2)
    else:
        sys.__excepthook__(kind, error, trace)


def redact(text: str) -> str:
    """Return a text without secrets: those of the environment, tokens of Hugging Face, and passwords in addresses."""
    for name, value in os.environ.items():
        if re.search(r"(TOKEN|API_KEY|SECRET|PASSWORD)$", name) and len(value) >= 8:
            text = text.replace(value, "***")
    return re.sub(r"\bhf_\w{16,}|(?<=://)[^\s/@]+(?=@)", "***", text)


def visible(text: str) -> str:
    """Return a text with its control characters as Python writes them, such as \\x1b; newlines and tabs stay.

    Data, file names and models come from others: an escape sequence could clear the screen, write into the clipboard or
    show other words than are there. So do characters that reverse the direction of writing.
    """
    return re.sub(
        "[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]",
        lambda found: repr(found[0])[1:-1],
        text.replace("\r\n", "\n"),
    )


def report(error: ConfigError) -> int:
    """Print one line per problem on stderr and return exit code 2."""
    for problem in error.problems:
        line = "error: " + visible(redact(" ".join(problem.splitlines())))
        line = line if len(line) < 600 else f"{line[:400]} ... {line[-150:]}"  # a value may be a whole file
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        with contextlib.suppress(
            OSError
        ):  # stderr may be a file on a full disk; and any console must be able to show the line
            print(line.encode(encoding, "replace").decode(encoding), file=sys.stderr)
    return 2


def reader_gone(last: str = "") -> bool:
    """Flush stdout after a last text; return whether its reader is gone, as in `... | head`."""
    try:
        print(end=last, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains again when it exits
        return True
    except OSError:  # such as a full disk, which Python reports when it exits
        pass
    return False


def announced() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several, and says where they meet."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def launched() -> bool:
    """Return whether torchrun started this process, which starts all processes again after a failure."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launcher_started() -> float:
    """Return when the torchrun that started this process began, in seconds as of files; infinity without one."""
    if not launched():
        return math.inf
    import psutil  # not at the top, since a process without a launcher needs it later or never

    with contextlib.suppress(psutil.Error):
        return psutil.Process(os.getppid()).create_time()
    return math.inf


def wake_gpu() -> None:
    """Create the context of the GPU while the other imports run.

    Only the scripts call this, as soon as torch is imported, and not under a launcher, where each process has a GPU of
    its own.
    """
    import torch

    if "LOCAL_RANK" not in os.environ and torch.cuda.is_available():
        threading.Thread(target=torch.cuda.synchronize, daemon=True).start()


def after_heavy_imports() -> None:
    """Undo what `before_heavy_imports` set for the imports alone."""
    if sys.modules.get("sklearn", gc) is None:  # it may be imported from here on, for example by a model's own code
        del sys.modules["sklearn"]
    gc.freeze()  # what the imports made stays until the end
    gc.enable()


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Run a script's main after the imports, and end the process with the exit code that it returns."""
    after_heavy_imports()
    leave(main())


def leave(code: int) -> NoReturn:
    """End the process with an exit code, without taking apart what the system frees anyway, which takes a second.

    The exit functions of the libraries run, and the standard streams are written out.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:  # such as a full disk; Python's own exit code is 120 too
            code = code or 120
            with contextlib.suppress(OSError, ValueError):
                print(f"error: cannot write to {stream.name}: {error}", file=sys.stderr)
    os._exit(code)
