"""Runs checks of Triton kernels in Triton's interpreter, on the CPU, and translates what was launched as for a GPU."""

import inspect
import os
import pickle
import subprocess
import sys
import tempfile
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
        seen = f"{folder}/launches"
        checked = (
            f"import torch; from tests import interpreter; interpreter.patch_once(); from {module} import *; {checks}"
        )
        kept = f"from tests import interpreter; interpreter.keep({seen!r})"
        translated = f"from tests import interpreter; interpreter.translate({seen!r})"
        for program, mode in ((f"{checked}; {kept}", "1"), (translated, "0")):
            environment = {**os.environ, "TRITON_INTERPRET": mode, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-2000:]


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
