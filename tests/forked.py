"""Runs the scripts' command lines in children that are forked from one process which has imported what they import.

Each child is a process of its own, with its folder, environment and standard streams, but does not pay the 5 to 20 s that the
imports take on a busy core. The process that forks has never computed anything: autograd refuses to run in the child of one that
has. Where a test is about the imports or the start itself, it runs the script as a user does (run_cli with fresh=True).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_qlora", "inference_example", "quantization_utils")


def run_script(script: str, arguments: list[str]) -> int:
    """Return the exit code of a script's own last lines: arguments are checked first, then `main` runs."""
    from config import ConfigError
    from toolkit.startup import report

    module = sys.modules[script]
    if script == "quantization_utils":
        return module.main()
    try:
        module.parse(arguments)
    except ConfigError as error:
        return report(error)
    return module.main(arguments)


def become(request: dict[str, Any]) -> None:
    """Take the folder, environment and standard streams of a request."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    for number, mode in enumerate(("r", "w", "w")):
        descriptor = os.open(request["streams"][number], os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
        name = ("stdin", "stdout", "stderr")[number]
        unlike = {"stdin": "strict", "stdout": "strict", "stderr": "backslashreplace"}[name]
        stream = open(number, mode, encoding=encoding, errors=errors or unlike, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def serve() -> None:
    """Fork a child for every line of JSON on stdin, and answer with its exit code."""
    from toolkit.startup import before_heavy_imports

    before_heavy_imports()
    for name in SCRIPTS:
        __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            code = 1
            try:
                become(request)
                sys.argv = [request["script"], *request["arguments"]]
                code = run_script(request["script"], request["arguments"])
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)  # nothing of the parent's is unwound twice
        deadline = time.monotonic() + request["timeout"]
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, 9)
            time.sleep(0.01)
        print(json.dumps(os.waitstatus_to_exitcode(ended[1])), flush=True)


class Forker:
    """The process that forks, started at its first use."""

    def __init__(self) -> None:
        self.server: subprocess.Popen | None = None

    def run(
        self, script: str, arguments: list[str], cwd: Path, env: dict[str, str], input: str | None, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a script's command line in a child, and return its exit code and what it printed."""
        if self.server is None:
            program = "from tests.forked import serve; serve()"
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
            self.server = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes)
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
            for stream, content in zip(streams, (input or "", "", ""), strict=True):
                stream.write_text(content, encoding="utf-8")
            request = {"script": script, "arguments": arguments, "cwd": str(cwd), "env": env, "timeout": timeout}
            self.server.stdin.write(json.dumps(request | {"streams": list(map(str, streams))}) + "\n")
            self.server.stdin.flush()
            code = json.loads(self.server.stdout.readline())
            out, err = (stream.read_bytes().decode("utf-8", "replace") for stream in streams[1:])
        return subprocess.CompletedProcess([script, *arguments], code, out, err)

    def close(self) -> None:
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait()
            self.server.stdout.close()
