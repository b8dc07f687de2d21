"""How long one waits for the first answer, the first step and an evaluation: processes timed from their start to their exit.

python tests/benchmarks/bench_startup.py --model DIR --data DIR        on a GPU: a 3B-shaped model (docs/measurements.md)
python tests/benchmarks/bench_startup.py                               on a CPU: tiny/, beside what the imports alone take

Each command runs twice in a process of its own as a user starts it, and once more with clocks on its stages. The second
run is the figure: the first one fills the caches of compiled kernels and of the file system.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = "import torch, transformers, peft, bitsandbytes"

# What is timed inside of a process: module, name, what it is called in the table. Stages may contain each other.
STAGES = (
    ("toolkit.turn_ends", "load_tokenizer", "tokenizer"),
    ("transformers.AutoModelForCausalLM", "from_pretrained", "read and quantise the weights"),
    ("toolkit.adapters", "load_adapter", "attach the adapter"),
    ("train_qlora", "prepare_dataset", "read and tokenise the data"),
    ("train_qlora", "build_learner", "attach a fresh adapter, fuse"),
    ("fast_path.micro_step.Learner", "_capture", "compile and capture the step"),
    ("train_qlora", "evaluate_and_keep_best", "an evaluation of the run"),
    ("train_qlora", "training_step", "an optimizer step"),
    ("toolkit.evaluation", "block_losses", "losses of the blocks"),
    ("toolkit.generation", "Generator", "fuse"),
    ("fast_path.decoder.Decoder", "generate", "answer"),
    ("fast_path.decoder.Decoder", "_capture", "capture a step of the answer"),
)


def child(report: str, script: str, arguments: list[str]) -> None:
    """Run a script's main with clocks on its stages and write the table into `report`."""
    began, table = float(os.environ["BENCH_BEGAN"]), []

    def note(stage: str, start: float) -> None:
        table.append((stage, start - began, time.time() - start))

    note("start Python", began)
    sys.path.insert(0, str(ROOT))
    for names in (("torch",), ("transformers", "peft"), (script,)):
        start = time.time()
        if names != ("torch",):
            from toolkit.startup import after_heavy_imports, before_heavy_imports

            before_heavy_imports()
        for name in names:
            importlib.import_module(name)
        note(f"import {', '.join(names)}", start)

    def timed(function, stage: str):
        @functools.wraps(function)
        def run(*positional, **named):
            start = time.time()
            try:
                return function(*positional, **named)
            finally:
                note(stage, start)

        return run

    for module, name, stage in STAGES:
        parts = module.split(".")
        try:
            owner = importlib.import_module(module)
        except ImportError:
            owner = getattr(importlib.import_module(".".join(parts[:-1])), parts[-1])
        plain = getattr(owner, name)
        function = timed(plain, stage)
        setattr(owner, name, function)
        for other in (script, "toolkit.evaluation", "toolkit.generation", "quantization_utils"):
            if getattr(sys.modules.get(other), name, None) is plain:  # imported there by its name
                setattr(sys.modules[other], name, function)
    after_heavy_imports()
    code = sys.modules[script].main(arguments)
    Path(report).write_text(json.dumps({"table": table, "main ended": time.time() - began}), encoding="utf-8")
    sys.exit(code)


def run(command: list[str], folder: str) -> tuple[float, str]:
    """Run a command and return its seconds and the last line that it printed."""
    start = time.time()
    env = os.environ | {"BENCH_BEGAN": str(start), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, encoding="utf-8")
    seconds = time.time() - start
    if done.returncode:
        sys.exit(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, (done.stderr + done.stdout).strip().splitlines()[-1] if done.stderr + done.stdout else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model; without it tiny/ is used")
    parser.add_argument("--data", help="folder of texts for it")
    parser.add_argument("--tokens", type=int, default=64, help="length of the answer")
    parser.add_argument("--blocks", type=int, default=100, help="blocks of an evaluation, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config", str(ROOT / "tiny" / "config.yaml")]
        if options.model:
            settings = {"model": {"name": os.path.abspath(options.model)}}
            settings["data"] = {"dataset": os.path.abspath(options.data)}
            (Path(folder) / "c.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
            flags = ["--config", "c.yaml"]
        flags += ["--max_eval_samples", str(options.blocks)]
        out = ["--output_dir", "out"]
        answer = ["--mode", "text", "--prompt", "Why is the sky blue?", "--max_new_tokens", str(options.tokens)]
        commands = {
            "train_qlora.py, 1 step": ["train_qlora", *flags, *out, "--overwrite", "--max_steps", "1"],
            "text mode": ["inference_example", "--adapter", "out", *answer],
            "--evaluate": ["train_qlora", "--evaluate", "--adapter", "out", *flags],
        }
        for name, (script, *arguments) in commands.items():
            path = str(ROOT / f"{script}.py")
            times = [run([path, *arguments], folder) for _ in range(2)]
            run([__file__, "--child", "report.json", script, *arguments], folder)
            report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
            print(f"\n{name}: {times[0][0]:.1f} s, again {times[1][0]:.1f} s   {times[1][1]}", flush=True)
            for stage, start, seconds in sorted(report["table"], key=lambda row: row[1]):
                print(f"  at {start:6.2f} s  {seconds:6.2f} s  {stage}")
            print(f"  at {report['main ended']:6.2f} s           exit")
        imports = [run(["-c", LIBRARIES], folder)[0] for _ in range(2)]
        print(f"\npython -c '{LIBRARIES}': {imports[0]:.1f} s, again {imports[1]:.1f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4:])
    main()
