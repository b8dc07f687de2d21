"""The notebook's cells run, one after another, on a CPU with the small model of tiny/."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "qlora_colab.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
# What a CPU without a network cannot have, and what runs there instead. Everything else runs as it stands.
SMALL = "--config tiny/config.yaml --max_train_samples 400 --max_eval_samples 20"
COPY = f"mkdir qlora && git -C {ROOT} ls-files -z | tar -C {ROOT} --null -T - -cf - | tar -C qlora -xf -"
SUBSTITUTIONS = {
    "git clone --quiet $REPOSITORY qlora": COPY,
    "pip install -q -r requirements.txt": f"{sys.executable} -m pip install -q --dry-run --no-index -r requirements.txt",
    "train_qlora.py --plan": f"train_qlora.py {SMALL} --plan",
    "train_qlora.py --max_steps 60": f"train_qlora.py {SMALL} --max_steps 2",
    "train_qlora.py --evaluate": f"train_qlora.py {SMALL} --evaluate",
    "--mode text": "--mode text --max_new_tokens 8",
    "from IPython.display import Image": "from matplotlib.image import imread as Image",
}


class CellFailed(Exception):
    pass


class Session:
    """What Jupyter keeps between cells: the folder, and the names of the Python lines."""

    def __init__(self, folder: Path, run_cli: Callable) -> None:
        self.folder, self.run_cli, self.names, self.said = folder, run_cli, {}, ""

    def run(self, cell: str) -> None:
        """Run a cell: lines with ! are commands, %cd changes the folder, and the others are Python."""
        python = ""
        for line in cell.splitlines():
            if line.startswith("!"):
                self.python(python)
                python = ""
                self.command(re.sub(r"\$([A-Z]+)", lambda name: str(self.names[name[1]]), line[1:]))
            elif line.startswith("%cd "):
                self.folder = self.folder / line.removeprefix("%cd ")
            else:
                python += line + "\n"
        self.python(python)

    def python(self, text: str) -> None:
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            exec(compile(text, "cell", "exec"), self.names)
        finally:
            os.chdir(before)

    def command(self, line: str) -> None:
        """Run a command; a script of the toolkit in a child that has the imports behind it."""
        words = shlex.split(line)
        if words[0] == "python":
            done = self.run_cli(words[1], *words[2:], cwd=self.folder)
        else:
            done = subprocess.run(line, shell=True, cwd=self.folder, capture_output=True, text=True, timeout=300)
        self.said += done.stdout + done.stderr
        if done.returncode:
            raise CellFailed(f"{line}: exit code {done.returncode}: {done.stderr[-2000:]}")


def on_a_cpu(cell: str) -> str:
    for placeholder, instead in SUBSTITUTIONS.items():
        cell = cell.replace(placeholder, instead)
    return cell


@pytest.mark.minutes
def test_every_cell_runs(tmp_path, run_cli):
    session = Session(tmp_path, run_cli)
    for cell in CODE:
        session.run(on_a_cpu(cell))
    folder = tmp_path / "qlora"
    assert (folder / "output_t4" / "adapter_model.safetensors").exists() and (
        folder / "adapter.zip"
    ).stat().st_size > 1e5
    assert "fits in 14.50 GiB" in session.said and "card: T4" in session.said
    assert "step 2/2" in session.said and "adapter - base: loss" in session.said


def test_every_substitution_is_used_once():
    everything = "\n".join(CODE)
    assert [everything.count(placeholder) for placeholder in SUBSTITUTIONS] == [1] * len(SUBSTITUTIONS)


@pytest.mark.parametrize(
    "cell",
    [
        "!python train_qlora.py --config tiny/config.yaml --max_stepz 2",
        "!false",
        "%cd nowhere\n!true",
        "1 / 0",
        "!echo $MISSING",
    ],
)
def test_a_cell_that_fails_fails_the_test(cell, tmp_path, run_cli):
    with pytest.raises((CellFailed, FileNotFoundError, ZeroDivisionError, KeyError)):
        Session(tmp_path, run_cli).run(cell)


def test_it_is_a_notebook_without_results():
    """The fields that nbformat 4.5 asks for; results of a run would be large and of another machine."""
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5) and whole["metadata"]["kernelspec"]["name"]
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        common = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == common | ({"outputs", "execution_count"} if cell["cell_type"] == "code" else set())
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_it_says_that_no_t4_ran_it_in_both_languages():
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    assert "Not run on a T4" in text and "我們沒有在 T4 上實際跑過" in text
