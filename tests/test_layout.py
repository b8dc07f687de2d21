"""The layout's rules: which way imports point, who imports Triton, what stands at the top level, what answers at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = {"train_qlora.py", "inference_example.py", "quantization_utils.py", "config.py"}
FOLDERS = {"toolkit", "fast_path", "tiny", "tests", "docs", "notebooks", ".ci"}
PACKAGES = ("toolkit", "fast_path")
FILES = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
# What a module may import of these: those below it, and those of its own package that are not above it. Arrows run
# scripts -> toolkit -> quantization_utils -> fast_path -> config.
LEVELS = {"config": 1, "fast_path": 2, "quantization_utils": 3, "toolkit": 4, "train_qlora": 5, "inference_example": 5}
# Toolkit's basic modules stand further down, so that config (level 0) or quantization_utils (level 2) may import them. They
# import no torch, and nothing of the project but config (level 2) and each other. fast_path imports none of them.
BASIC = {"toolkit.plain_values": 0, "toolkit.spelling": 0, "toolkit.local_paths": 2, "toolkit.hub": 2}


def imports(node: ast.AST) -> set[str]:
    """Return the full names of what an import statement may import: modules, and names that could be modules."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "absolute imports only: scripts are run from anywhere"
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def imported(path: Path) -> set[str]:
    """Return all that a file imports, within functions too."""
    return set().union(*map(imports, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))


def as_a_module(path: Path) -> set[str]:
    """Return what importing a file imports: not what its functions import, nor what it imports as a script or for types."""
    found, todo = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        skipped = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        if not (skipped or isinstance(node, (ast.FunctionDef, ast.Lambda))):
            found |= imports(node)
            todo += ast.iter_child_nodes(node)
    return found


def level(name: str) -> int:
    """Return the level of a module, or of a name within it; -1 for other libraries, and for the packages: they are empty."""
    module = ".".join(name.split(".")[:2])
    return -1 if name in PACKAGES else BASIC.get(module, LEVELS.get(name.split(".")[0], -1))


def test_only_the_scripts_and_the_schema_stand_at_the_top_level():
    assert {path.name for path in ROOT.glob("*.py")} == TOP
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.split("/")[0] for name in tracked.splitlines() if "/" in name} == FOLDERS
    assert not (ROOT / "kernels").exists(), "toolkit.startup blocks a package of this name"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    own, package = level(name), name.split(".")[0]
    # As a script quantization_utils is the installation check, which stands in toolkit.
    names = as_a_module(MODULES[name]) if name == "quantization_utils" else imported(MODULES[name])
    for other in names:
        same = other.split(".")[0] == package in PACKAGES
        assert level(other) < own or (same and level(other) == own), f"{name} imports {other}"
        assert package != "fast_path" or not other.startswith("toolkit"), f"{name} imports {other}"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: as_a_module(path) & MODULES.keys() for name, path in MODULES.items()}
    while leaves := {name for name, needs in graph.items() if not needs}:
        graph = {name: needs - leaves for name, needs in graph.items() if name not in leaves}
    assert not graph


def test_only_fast_path_imports_triton():
    users = {name for name, path in MODULES.items() if {"triton", "triton.language"} & imported(path)}
    assert users and {name.split(".")[0] for name in users} == {"fast_path"}


def test_packages_are_empty():
    """Importing toolkit.startup, for --help, must import nothing else."""
    assert [(ROOT / package / "__init__.py").read_text(encoding="utf-8") for package in PACKAGES] == ["", ""]


@pytest.mark.parametrize(
    "name",
    [
        "config",
        *BASIC,
        "toolkit.startup",
        "toolkit.flags",
        "toolkit.cards",
        "toolkit.run_commands",
        "toolkit.push",
        "toolkit.runs",
        "toolkit.chat",
        "toolkit.text_width",
        "toolkit.side_by_side",
        "toolkit.adapter_choice",
        "toolkit.prompt_files",
        "fast_path.families",
    ],
)
def test_what_runs_first_imports_no_heavy_library(name):
    program = f"import sys, {name}; print({{'torch', 'transformers', 'numpy', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_inference_imports_no_datasets():
    """It takes a second or two to import, and only training and its installation check read data."""
    seen, todo = set(), ["inference_example"]
    while todo:
        name = todo.pop()
        seen.add(name)
        found = imported(MODULES[name]) if name == "inference_example" else as_a_module(MODULES[name])
        assert "datasets" not in found, name
        todo += (found & MODULES.keys()) - seen
    assert {"toolkit.memory", "toolkit.generation", "toolkit.cards"} <= seen


def test_the_label_of_unsupervised_positions_is_written_once():
    """Elsewhere it is fast_path.loss.IGNORED."""
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
            if negative and isinstance(node.operand, ast.Constant) and node.operand.value == 100:
                found.add(name)
    assert found == {"fast_path.loss"}


def test_functions_of_the_tutorial_are_where_it_has_them():
    import quantization_utils
    import train_qlora

    names = (
        "create_bnb_config",
        "create_lora_config",
        "load_model_and_tokenizer",
        "prepare_model_for_training",
        "main",
    )
    assert all(callable(getattr(quantization_utils, name)) for name in names)
    assert all(callable(getattr(train_qlora, name)) for name in ("prepare_dataset", "plot_training_curves", "main"))


def test_the_key_of_compiled_layers_is_made_of_every_file_of_the_operators():
    """Each file that defines an operator of ours, or makes the operands whose strides are compiled in."""
    from fast_path import compiled

    holders = {name for name, path in MODULES.items() if 'custom_op("qlora::' in path.read_text(encoding="utf-8")}
    holders |= {"fast_path.packed_weights", "fast_path.dropout"}
    listed = compiled.operators_tag.__wrapped__.__defaults__[0]
    assert {module.__name__ for module in listed} == holders
