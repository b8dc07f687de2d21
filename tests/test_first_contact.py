"""What a user meets first: every module imports, wherever Triton is not installed too, and each script runs from any folder."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from toolkit.startup import share_cores

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for path in sorted(ROOT.rglob("*.py")) if not path.relative_to(ROOT).parts[0].startswith((".", "output"))]
SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0] not in ("tests", "tiny")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]

# One process for each module, forked from one that has imported the libraries and nothing of the project.
IMPORTER = """
import os, sys, traceback
sys.path.insert(0, {root!r})
if {hidden!r}:
    sys.modules["triton"] = sys.modules["triton.language"] = None  # their import fails, as where they are not installed
from toolkit.startup import before_heavy_imports
before_heavy_imports()
import accelerate, datasets, peft, torch, transformers
for name in {modules!r}:
    if not (child := os.fork()):
        code = 0
        try:
            __import__(name)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


@pytest.mark.both
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(False, marks=pytest.mark.skipif(not find_spec("triton"), reason="the same as without Triton")),
        True,
    ],
    ids=["as installed", "without Triton"],
)
def test_every_module_imports_by_itself(hidden, tmp_path):
    assert len(MODULES) > 15
    program = IMPORTER.format(root=str(ROOT), hidden=hidden, modules=MODULES)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-3000:]


def bound(statements: list[ast.stmt]) -> set[str]:
    """Return the names that these statements bind whichever way they go: what one branch alone binds does not count."""
    names: set[str] = set()
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.If):
            names |= bound(node.body) & bound(node.orelse)
        elif isinstance(node, ast.Try):
            ways = [bound(node.body + node.orelse), *(bound(handler.body) for handler in node.handlers)]
            names |= set.intersection(*ways) | bound(node.finalbody)
        elif isinstance(node, ast.With):
            names |= bound(node.body)
        elif isinstance(node, ast.For):
            names |= {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
    return names


def test_no_name_is_imported_that_exists_only_where_a_package_is_installed():
    """`lane_level` was one, and every script died where Triton was not installed."""
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(MODULES, SOURCES, strict=True)}
    missing = []
    for importer, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in trees:
                always = bound(trees[node.module].body)
                missing += [
                    f"{importer}: {alias.name} of {node.module}" for alias in node.names if alias.name not in always
                ]
    assert missing == []


def test_the_analysis_of_names_tells_them_apart():
    source = "import a\nif a:\n    x = 1\n    y = 1\nelse:\n    x = 2\ntry:\n    import b\n    z = 1\nexcept ImportError:\n    b = None\n"
    assert bound(ast.parse(source).body) == {"a", "x", "b"}


def test_the_first_line_comes_before_torch(run_cli, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch')", encoding="utf-8")
    command = ("train_qlora.py", "--config", ROOT / "tiny" / "config.yaml")
    done = run_cli(*command, env={"PYTHONPATH": str(tmp_path)}, fresh=True)
    assert done.stderr == "loading torch, transformers, peft and bitsandbytes ...\ntorch\n" and done.stdout == ""
    second = run_cli(*command, env={"PYTHONPATH": str(tmp_path), "LOCAL_RANK": "1"}, fresh=True)
    assert second.stderr == "torch\n"


@pytest.mark.both
@pytest.mark.parametrize("script, flag", [("train_qlora.py", "--rank"), ("inference_example.py", "--max_new_tokens")])
def test_a_script_runs_from_another_folder(run_cli, script, flag, tmp_path):
    """Its modules are found beside it, whatever the folder holds."""
    (tmp_path / "config.py").write_text("raise SystemExit('this is not the toolkit')", encoding="utf-8")
    done = run_cli(script, "--config", ROOT / "tiny" / "config.yaml", flag, "0", fresh=True)
    assert done.returncode == 2 and "expected an integer >= 1 and <= " in done.stderr, done.stderr


@pytest.mark.parametrize(
    "words", [("train_qlora.py",), ("inference_example.py", "--adapter", "none"), ("quantization_utils.py",)]
)
def test_a_cache_that_cannot_be_written_is_one_line(run_cli, words, tmp_path):
    """torch makes this folder while it is imported."""
    (tmp_path / "file").touch()
    done = run_cli(*words, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}, fresh=True)
    wanted = "error: TORCHINDUCTOR_CACHE_DIR: expected a folder that can be written, got "
    assert done.returncode == 2 and done.stderr.startswith(wanted) and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    "given, kept", [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_threads_do_not_keep_cores_that_others_want(given, kept, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    share_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == kept


def test_the_cores_are_shared_before_torch_is_imported(run_cli, tmp_path):
    (tmp_path / "torch.py").write_text("import os\nraise SystemExit(os.environ['GOMP_SPINCOUNT'])", encoding="utf-8")
    done = run_cli(
        "train_qlora.py", "--config", ROOT / "tiny" / "config.yaml", env={"PYTHONPATH": str(tmp_path)}, fresh=True
    )
    assert done.stderr.splitlines()[-1] == "10000"


@pytest.mark.parametrize("script", ["train_qlora.py", "inference_example.py"])
def test_a_package_that_is_missing_is_named_with_the_remedy(script, tmp_path):
    """As where the environment was not activated: -S leaves the installed packages out."""
    command = [sys.executable, "-S", ROOT / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: the package yaml is not installed in ")
    assert "pip install -r requirements.txt" in line


@pytest.mark.parametrize(
    "words",
    [
        ("inference_example.py", "--adapter", "none", "--model_name"),
        ("train_qlora.py", "--init_adapter"),
        ("train_qlora.py", "--runs"),
    ],
)
def test_a_name_that_is_too_long_is_one_line(words, tmp_path):
    script, *flags = words
    command = [sys.executable, str(ROOT / script), *flags, "n" * 5000]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nnn" in done.stderr, done.stderr
