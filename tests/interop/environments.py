"""The engines that our files are given to, each in an environment of its own below one folder, made once.

llama.cpp's converters   the source package of llama-cpp-python, with sentencepiece and gguf
llama.cpp's runtime      the prebuilt CPU library of node-llama-cpp
the rest                 lm-evaluation-harness, `transformers serve` and the OpenAI client, on the toolkit's own packages
"""

import json
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

LLAMA_CPP_PYTHON, NODE_LLAMA_CPP = "0.3.36", "3.22.1"
PACKAGES = ["lm-eval==0.4.13", "sentencepiece", "openai", "transformers[serving]"]
HERE = Path(__file__).resolve().parent


def run(*command: object, stdin: str | None = None, cwd: Path | None = None, env: dict | None = None) -> str:
    """Run a command and return what it prints; an error shows its last lines."""
    words = [str(word) for word in command]
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, f"{' '.join(words)[:300]}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def converters(folder: Path) -> Path:
    """Return the folder of llama.cpp that holds its converters."""
    found = folder / "src" / "vendor" / "llama.cpp"
    if not (found / "convert_hf_to_gguf.py").is_file():
        name = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
        run(
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            name,
            "-d",
            folder / "sdist",
        )
        with tarfile.open(next((folder / "sdist").glob("*.tar.gz"))) as archive:
            wanted = [m for m in archive.getmembers() if "/vendor/llama.cpp/" in m.name]
            wanted = [m for m in wanted if any(w in m.name for w in ("/conversion/", "/gguf-py/gguf/", "/convert_"))]
            for member in wanted:
                member.name = member.name.partition("/")[2]
            archive.extractall(folder / "src", members=wanted, filter="data")
    return found


def node(folder: Path) -> Path:
    """Return the folder of a node project that has llama.cpp's runtime."""
    found = folder / "node"
    if not (found / "node_modules" / "node-llama-cpp").is_dir():
        found.mkdir(parents=True, exist_ok=True)
        (found / "package.json").write_text(json.dumps({"private": True, "type": "module"}))
        name = f"node-llama-cpp@{NODE_LLAMA_CPP}"
        run("npm", "install", name, "--ignore-scripts", "--no-audit", "--no-fund", cwd=found)
    return found


def python(folder: Path) -> Path:
    """Return the Python that has lm-evaluation-harness and the server, and the toolkit's packages as they are here."""
    found = folder / "evalenv"
    program = found / "bin" / "python"
    if not (found / "complete").is_file():
        run(sys.executable, "-m", "venv", found)
        places = [sysconfig.get_paths()[name] for name in ("purelib", "platlib")]
        packages = next(found.glob("lib/python*/site-packages"))
        (packages / "parent.pth").write_text("\n".join(dict.fromkeys(places)) + "\n")
        run(program, "-m", "pip", "install", "-q", *PACKAGES)
        (found / "complete").touch()
    return program


def llama(folder: Path, model: Path, chats: list[list[int]], most: int, adapter: Path | None = None) -> dict:
    """Return the greedy tokens of llama.cpp after these prompts, at most so many, and whether it ended by itself."""
    place = node(folder)
    script = place / "run_llama.mjs"
    script.write_text((HERE / "run_llama.mjs").read_text(encoding="utf-8"), encoding="utf-8")
    asked = json.dumps({"chats": chats, "most": most})
    return json.loads(
        run("node", script, model, *([adapter] if adapter else []), stdin=asked, cwd=place).splitlines()[-1]
    )
