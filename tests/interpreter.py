"""Runs checks of Triton kernels in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def interpret(module: str, checks: str) -> None:
    """Run checks with the names of a module of tests, in a process of its own: Triton's import chooses the interpreter."""
    pytest.importorskip("triton", reason="pip install triton: the kernels need it")
    program = f"import torch; from tests.interpreter import patch_once; patch_once(); from {module} import *; {checks}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def patch_once() -> None:
    """Have the interpreter prepare its language for the functions of a file once a launch.

    Triton 3.9 goes through all names of the language at every call of a device function: a third of the time.
    """
    from triton.runtime import interpreter

    prepared, launch = set(), interpreter.GridExecutor.__call__

    def launch_anew(self, *args, **kwargs):
        prepared.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch_anew, call
