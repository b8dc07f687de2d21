"""Runs checks of Triton kernels in Triton's interpreter, on the CPU, and translates what was launched as for a GPU."""

import atexit
import functools
import inspect
import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CAPABILITY = 89  # of the GPU that kernels are translated for: an RTX 4060's
LAUNCHES: dict[tuple, tuple[dict[str, str], dict[str, Any]]] = {}  # by file, kernel, types and constants


def interpret(module: str, checks: str) -> None:
    """Run checks with the names of a module of tests, in a process of its own: Triton's import chooses the interpreter.

    Another process translates each kernel that was launched, since the interpreter runs what the compiler refuses, such
    as a variable that changes its type within a loop.
    """
    pytest.importorskip("triton", reason="pip install triton: the kernels need it")
    with tempfile.TemporaryDirectory() as folder:
        seen, output = f"{folder}/launches", Path(folder, "output")
        checked = (
            f"import torch; from tests import interpreter; from {module} import *; {checks}; interpreter.keep({seen!r})"
        )
        server = interpreters()
        server.stdin.write(json.dumps([checked, str(output)]) + "\n")
        server.stdin.flush()
        assert server.stdout.readline() == "0\n", output.read_text(encoding="utf-8")[-2000:]
        program = f"from tests import interpreter; interpreter.translate({seen!r})"
        done = subprocess.run([sys.executable, "-c", program], **started_with("0"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


def started_with(mode: str) -> dict[str, Any]:
    """Return the options of a process with Triton's interpreter (mode 1) or without (0)."""
    return {"cwd": ROOT, "env": {**os.environ, "TRITON_INTERPRET": mode, "PYTHONPATH": str(ROOT)}}


@functools.cache
def interpreters() -> subprocess.Popen:
    """Return the process that forks those of `interpret`, so that the imports, which take most of a short one, are paid once."""
    program = "from tests import interpreter; interpreter.serve()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    server = subprocess.Popen([sys.executable, "-c", program], **started_with("1"), **pipes)
    atexit.register(lambda: (server.stdin.close(), server.wait(), server.stdout.close()))
    return server


def serve() -> None:
    """Fork a child for each program on stdin, and answer with its exit code. What the child prints goes into a file.

    This process computes nothing: autograd refuses to run in the child of one that has.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    import_module("tests.fast_path.test_decode_step")  # and with it all that is heavy
    patch_once()
    for line in sys.stdin:
        program, output = json.loads(line)
        if not (child := os.fork()):
            code = 1
            try:
                with open(output, "w", encoding="utf-8") as file:
                    for stream in (1, 2):
                        os.dup2(file.fileno(), stream)
                exec(program, {})
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)  # nothing of the parent's is unwound twice
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def patch_once() -> None:
    """Have the interpreter prepare its language for the functions of a file once a launch, and remember each launch.

    Triton 3.9 goes through all names of the language at every call of a device function: a third of the time.
    """
    from triton.runtime import interpreter

    prepared, launch = set(), interpreter.GridExecutor.__call__

    def launch_anew(self, *args, **kwargs):
        prepared.clear()
        signature, constants = types_of(self, args, kwargs)
        LAUNCHES[self.fn.__module__, self.fn.__name__, repr(signature), repr(constants)] = signature, constants
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch_anew, call


def types_of(grid: Any, args: tuple, kwargs: dict) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the type of each argument of a launch, in Triton's spelling, and the values of those that are constants."""
    from triton.runtime.jit import mangle_type

    named = {name: value for name, value in kwargs.items() if name in inspect.signature(grid.fn).parameters}
    values = inspect.signature(grid.fn).bind(*args, **named).arguments
    constants = {name: value for name, value in values.items() if value is None or name in grid.constexprs}
    return {n: "constexpr" if n in constants else mangle_type(value) for n, value in values.items()}, constants


def keep(path: str) -> None:
    """Write the launches of this process into a file."""
    Path(path).write_bytes(pickle.dumps([(*key[:2], *value) for key, value in LAUNCHES.items()]))


def translate(path: str) -> None:
    """Make Triton's intermediate code of the launches in a file: what the compiler does before it needs a GPU's tools."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", CAPABILITY, 32)
    backend = make_backend(target)
    options = backend.parse_options({})
    for module, name, signature, constants in pickle.loads(Path(path).read_bytes()):
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(getattr(import_module(module), name), signature, constants)
        source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
