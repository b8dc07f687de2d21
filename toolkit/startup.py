"""What runs before torch is imported, and how an error reaches the console. Imports no torch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the installation check must say that PyYAML is missing, which config needs
    from config import ConfigError

# What a run imports; the scripts import all of the project.
MODULES = ("yaml", "config", "torch", "bitsandbytes", "transformers", "peft", "datasets", "accelerate")
MODULES += ("matplotlib.pyplot", "train_qlora", "inference_example")


def import_failures(modules: tuple[str, ...] = MODULES) -> list[str]:
    """Return a line for each module that cannot be imported, with the reason, each reason once."""
    lines, reasons = [], set()
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken package raises anything: ImportError, OSError of a library, SyntaxError
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if reason not in reasons:
                lines.append(f"import {name}: fails: {reason}")
            reasons.add(reason)
    return lines


CANNOT_RUN = "training cannot run here: see the lines above"


def stop_where_imports_fail() -> None:
    """End the process with a line for each import of a run that fails; for the installation check."""
    failures = import_failures(MODULES[:2])
    if not failures:
        with contextlib.suppress(Exception):  # what fails in it fails again below, where it has a name
            before_heavy_imports()
        failures = import_failures()
    if failures:
        print(*failures, CANNOT_RUN, sep="\n")
        sys.exit(1)


@contextlib.contextmanager
def compiling_later() -> Iterator[None]:
    """Have torch.compile wait until what it returns is called: it imports Inductor, which takes seconds."""
    import torch  # not at the top, where every error in the configuration would wait for it

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


def before_heavy_imports() -> None:
    """Keep the libraries that are imported next quiet, quick and from running code of the hub; called by the scripts, not
    by imports.

    bitsandbytes would fetch a kernel from the hub while it is imported, where the package `kernels` is installed,
    and say so where not. The allocator of torch grows its segments where the system lets it: 0.36 GiB less reserved
    at 16 x 512 tokens of Qwen2.5-3B.
    """
    if sys.platform != "win32" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Triton's own choice, or beside Inductor's. By itself Inductor moves it when it first compiles a kernel: a first run
    # would leave our kernels where a second one does not look.
    home = os.path.join(os.environ.get("TRITON_HOME", os.path.expanduser("~")), ".triton", "cache")
    beside = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(beside, "triton") if beside else home)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load ends the process without a traceback
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # None makes `import kernels` fail
    with compiling_later():
        import bitsandbytes  # noqa: F401  (compiles four fallbacks that are rarely called)


def redact(text: str) -> str:
    """Return a text without access tokens: the environment's, Hugging Face's by their form, and those in addresses."""
    for name, value in os.environ.items():
        if re.search(r"(TOKEN|API_KEY|SECRET|PASSWORD)$", name) and len(value) >= 8:
            text = text.replace(value, "***")
    return re.sub(r"\bhf_\w{16,}|(?<=://)[^\s/@]+(?=@)", "***", text)


def report(error: ConfigError) -> int:
    """Print one line a problem on stderr and return exit code 2."""
    for problem in error.problems:
        line = "error: " + redact(" ".join(problem.splitlines()))
        line = line if len(line) < 600 else f"{line[:400]} ... {line[-150:]}"  # a value may be a whole file
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError):  # a file on a full disk; nor must a cp950 console hide an error
            print(line.encode(encoding, "replace").decode(encoding), file=sys.stderr)
    return 2


def reader_gone(last: str = "") -> bool:
    """Write out what stdout holds, and a last text; return whether its reader has gone, as in `... | head`."""
    try:
        print(end=last, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more as it ends
        return True
    except OSError:  # a full disk, say, of which Python tells as it ends
        pass
    return False
