"""The child process in which chat_templates.py has chat templates rendered: JSON in, JSON out.

A template comes with a model or an adapter, so it is a program of a stranger. The sandbox of jinja2 keeps it from Python and from
files, but not from loops that never end and not from texts that fill the memory. This process is the limit for both.
It imports nothing of the project and, of transformers, only the module that renders: 0.3 s instead of 1.4 s.
"""

import faulthandler
import importlib.util
import json
import os
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

MOST = 32  # renderings in a request
SECONDS = 10  # for a request; sound templates need less than a millisecond for each rendering
MEMORY = 2**30  # bytes in addition to what the imports take; only Linux keeps to it
LONGER = 100_000, 10  # a chat may have so many characters more than its messages and tools, and so many times as many


def import_renderer() -> Callable[..., Any]:
    """Return transformers' function that renders a chat, without the imports of transformers and transformers.utils."""
    folder = os.path.dirname(importlib.util.find_spec("transformers").origin)
    packages = {"transformers": folder, "transformers.utils": os.path.join(folder, "utils")}
    try:
        for name, path in packages.items():
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [path]
        from transformers.utils.chat_template_utils import render_jinja_template
    except Exception:  # in a version of transformers whose module needs the whole package
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
            del sys.modules[name]
        from transformers.utils.chat_template_utils import render_jinja_template
    return render_jinja_template


def limit_memory() -> None:
    """Have every allocation beyond MEMORY fail, and write no core files."""
    if sys.platform == "linux":
        import resource  # Windows has no such module, and macOS does not keep to this limit

        with open("/proc/self/statm", encoding="ascii") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def described(error: Exception) -> str:
    """Return an error's kind and its message, cut to a line's length."""
    text = str(getattr(error, "message", None) or error)[:300]
    number = getattr(error, "lineno", None)
    line = f" (line {number})" if isinstance(number, int) else ""
    return f"{type(error).__name__}: {text}{line}" if text else type(error).__name__


def answer(render: Callable[..., Any], messages: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, str]:
    """Return a rendered chat as `text`; otherwise what the template `refuses` it with, or why it `fails`."""
    try:
        most = LONGER[0] + LONGER[1] * len(json.dumps([messages, options.get("tools")], ensure_ascii=False))
        [text], _ = render([messages], **options)
        text.encode("utf-8")  # half a character, such as "\ud800", is an error here
    except Exception as error:  # anything: the template is a program
        if type(error).__name__ == "TemplateError":  # of raise_exception; jinja2's own errors are subclasses
            return {"refuses": str(error)[:300]}
        return {"fails": described(error)}
    if len(text) > most:
        return {"fails": f"it gives {len(text):,} characters, expected at most {most:,} for this chat"}
    return {"text": text} if text.strip() else {"fails": "it gives no text"}


def serve() -> None:
    """Answer requests until the parent closes the pipe or ends: [[chat, its own options] ..., options of all], a line for
    each chat.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too, but is for the parent
    render = import_renderer()
    limit_memory()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for line in sys.stdin.buffer:
            requests, options = json.loads(line)
            # A thread in C: it ends the process even while a single operation of Python does not return.
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=nowhere)
            for messages, own in requests:
                sys.stdout.buffer.write(json.dumps(answer(render, messages, options | own)).encode() + b"\n")
                sys.stdout.buffer.flush()  # so that the parent knows which chat did not end
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]  # the parent's, without the current folder
    serve()
