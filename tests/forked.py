"""Runs the scripts' command lines in children that are forked from one process which has imported what they import.

Each child is a process of its own, with its folder, environment and standard streams, but does not pay the 5 to 20 s that the
imports take on a busy core. The process that forks has never computed anything: autograd refuses to run in the child of one that
has. Where a test is about the imports or the start itself, it runs the script as a user does (run_cli with fresh=True).
"""

import json
import os
import shutil
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

    if script in ("forked", "kill_one_of_two"):
        from tests.faults import launches

        return getattr(launches, script)(*arguments)
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
    sys.dont_write_bytecode = True  # what a late import compiles would be a file written outside of the test's folder
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    for number, mode in enumerate(("r", "w", "w")):
        descriptor = os.open(request["streams"][number], os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
        name = ("stdin", "stdout", "stderr")[number]
        unlike = {"stdin": "strict", "stdout": "strict", "stderr": "backslashreplace"}[name]
        stream = open(number, mode, encoding=encoding, errors=errors or unlike, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def watch(folder: str, report: str) -> None:
    """Have this process write into `report` whatever it must not do with the hostile input in `folder`.

    That is to start a program, to open a connection, to run or compile code that lies under the input or among the modules which
    transformers copies from a model's folder, to unpickle anything that can run code, and to open a file for writing which lies
    neither under `folder` (what may change there is compared afterwards) nor in the caches of this test session.
    """
    if hasattr(os, "fork"):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tempfile.tempdir = os.environ["TMPDIR"]
    descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    written = tuple(map(os.path.realpath, (folder, os.environ["HF_HOME"], os.environ["MPLCONFIGDIR"])))
    home, python = os.path.realpath(folder), os.path.realpath(sys.executable)

    def foreign(name: object) -> bool:
        name = os.fsdecode(name) if isinstance(name, str | bytes) else ""
        if name.startswith(
            "<"
        ):  # such as <string>, code that a library writes: no file, though it would seem to lie in `folder`
            return False
        return "transformers_modules" in name or os.path.realpath(name).startswith(home + os.sep)

    def found(event: str, arguments: tuple) -> bool:
        if event in ("os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo"):
            return True
        if event == "subprocess.Popen":  # the toolkit may start itself, for what could hang or burst
            program = shutil.which(os.fsdecode(arguments[0])) or os.fsdecode(arguments[0])
            if os.path.basename(program) == "fc-list":  # matplotlib looks for fonts once for each MPLCONFIGDIR
                return False
            return os.path.realpath(program) != python or any(
                foreign(word) for word in arguments[1][1:3] if os.path.exists(word)
            )
        if event == "exec":
            return foreign(arguments[0].co_filename)
        if event == "compile":
            return foreign(arguments[1])
        if event == "pickle.find_class":
            return arguments[0] in ("os", "posix", "nt", "subprocess", "shutil", "socket", "builtins")
        if event == "open" and isinstance(arguments[0], str | bytes):
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC) if flags else False
            path = os.path.realpath(os.fsdecode(path))
            return bool(writes) and not path.startswith((*written, "/dev/", "/proc/self/"))
        return False

    def hook(event: str, arguments: tuple) -> None:
        if found(event, arguments):
            os.write(descriptor, f"{event} {arguments!r}"[:500].replace("\n", " ").encode("utf-8", "replace") + b"\n")

    sys.addaudithook(hook)


class Ended(subprocess.CompletedProcess):
    """What a child left: as subprocess.run says it, its peak of memory in bytes, its seconds of computing, and what was watched for."""

    peak: int
    cpu: float
    seen: list[str]


def serve() -> None:
    """Fork a child for every line of JSON on stdin, and answer with its exit code."""
    from toolkit.startup import after_heavy_imports, before_heavy_imports

    before_heavy_imports()
    for name in SCRIPTS:
        __import__(name)
    after_heavy_imports()
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            code = 1
            try:
                become(request)
                if request["watch"]:
                    watch(request["watch"], request["report"])
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
        started = time.monotonic()
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            if time.monotonic() > started + request["timeout"]:
                os.kill(child, 9)
            time.sleep(0.01)
        code, peak = os.waitstatus_to_exitcode(ended[1]), ended[2].ru_maxrss * 1024
        print(json.dumps([code, peak, ended[2].ru_utime + ended[2].ru_stime]), flush=True)


class Forker:
    """The process that forks, started at its first use."""

    def __init__(self) -> None:
        self.server: subprocess.Popen | None = None

    def run(
        self,
        script: str,
        arguments: list[str],
        cwd: Path,
        env: dict[str, str],
        input: str | None,
        timeout: float,
        watch: Path | None = None,
    ) -> Ended:
        """Run a script's command line in a child, and return its exit code and what it printed. watch: see `watch`."""
        if self.server is None:
            program = "from tests.forked import serve; serve()"
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
            self.server = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes)
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr", "report")]
            for stream, content in zip(streams, (input or "", "", "", ""), strict=True):
                stream.write_text(content, encoding="utf-8")
            request = {"script": script, "arguments": arguments, "cwd": str(cwd), "env": env, "timeout": timeout}
            request |= {"watch": str(watch or ""), "report": str(streams[3])}
            self.server.stdin.write(json.dumps(request | {"streams": list(map(str, streams))}) + "\n")
            self.server.stdin.flush()
            code, peak, cpu = json.loads(self.server.stdout.readline())
            out, err, seen = (stream.read_bytes().decode("utf-8", "replace") for stream in streams[1:])
        ended = Ended([script, *arguments], code, out, err)
        ended.peak, ended.cpu, ended.seen = peak, cpu, seen.splitlines()
        return ended

    def close(self) -> None:
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait()
            self.server.stdout.close()
