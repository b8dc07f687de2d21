"""Train on one GPU and on two of one machine: tokens/s, losses, a killed process, a process out of memory.

    python tests/benchmarks/bench_two_gpus.py MODEL                     on two GPUs, about 220 s for the 3B shape
    python tests/benchmarks/bench_two_gpus.py tiny/model --sequences 4 --length 64 --steps 6           a trial, on two CPU processes too

MODEL is a folder; without a tokenizer of its own it gets tiny's. Every run is the command line of a user: the same optimizer steps
of --sequences sequences, in micro-batches of half of them, so each of the two GPUs computes one micro-batch per step and the single
one two. Prints a line for each finding, and exit code 1 if one is not as it should be. NVLink multicast stays off.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

# A run whose second process asks for more memory than there is, once, in the third step.
FULL = """
import os, sys
sys.path.insert(0, {root!r})
import toolkit.startup as startup
startup.before_heavy_imports()
import torch, train_qlora

def micro_batches(run, numbers, of=train_qlora.micro_batches, asked=[]):
    if run.progress.step == 2 and os.environ["RANK"] == "1" and not asked:
        asked.append(1)
        if run.accelerator.device.type == "cuda":
            torch.empty(2**40, dtype=torch.uint8, device="cuda")
        raise torch.OutOfMemoryError("made up on a CPU")
    yield from of(run, numbers)

train_qlora.micro_batches = micro_batches
startup.run_and_exit(train_qlora.main)
"""


class Bench:
    """The folder of the runs, their common flags, and what was found."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options, self.good, self.started = folder, options, True, time.monotonic()
        model = folder / "model"
        model.mkdir()
        for path in Path(options.model).resolve().iterdir():
            (model / path.name).symlink_to(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (model / name).exists():
                shutil.copy(ROOT / "tiny" / "model" / name, model / name)
        (folder / "full.py").write_text(FULL.format(root=str(ROOT)), encoding="utf-8")
        micro_batch = options.sequences // 2
        self.flags = ["--config", ROOT / "config.yaml", "--model_name", model, "--dataset", ROOT / "tiny" / "text"]
        self.flags += ["--max_length", options.length, "--batch_size", micro_batch, "--gradient_accumulation_steps", 2]
        self.flags += ["--max_eval_samples", 300, "--eval_steps", 1000, "--warmup_ratio", 0, "--auto_fit", "false"]
        self.flags += [] if torch.cuda.is_available() else ["--compute_dtype", "float32"]
        self.flags += ["--gradient_checkpointing", "false", "--rank", 16, "--lora.dropout", 0.05]

    def start(self, name: str, two: bool, *flags: object, script: Path = ROOT / "train_qlora.py") -> subprocess.Popen:
        """Start a run that writes into the folder `name`; two: on both GPUs, otherwise on the first one."""
        launch = LAUNCH if two else [sys.executable]
        command = [*launch, script, *self.flags, "--output_dir", self.folder / name, *flags]
        environment = {
            **os.environ,
            **OFF,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(max(1, os.cpu_count() // 8)),
            "PYTHONUNBUFFERED": "1",
        }
        environment |= {} if two else {"CUDA_VISIBLE_DEVICES": "0"}
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=self.folder, env=environment)

    def wait(self, name: str, process: subprocess.Popen, seconds: float = 150) -> int:
        """Wait for a run and return its exit code; show the end of its log if it is not 0."""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = -1
        if code:
            print(f"--- {name} ended with {code}:\n{self.log(name)[-3000:]}\n---", flush=True)
        return code

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def rows(self, name: str) -> list[dict]:
        """Return the logged steps of a run."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if "loss" in row]

    def speed(self, name: str) -> float:
        rates = [row["tokens_per_second"] for row in self.rows(name)[2:]]
        return statistics.median(rates) if rates else 0.0

    def apart(self, name: str, other: str) -> tuple[float, float, int]:
        """Return the largest relative difference of losses and of gradient norms, and over how many logged steps."""
        pairs = list(zip(self.rows(name), self.rows(other), strict=False))
        found = [[abs(a[key] / b[key] - 1) for a, b in pairs] for key in ("loss", "grad_norm")]
        return max(found[0], default=9), max(found[1], default=9), len(pairs)

    def say(self, line: str, good: bool = True) -> None:
        self.good &= good
        print(f"[{time.monotonic() - self.started:5.0f} s] {'' if good else 'NOT AS IT SHOULD BE: '}{line}", flush=True)


def second_process(launcher: subprocess.Popen) -> psutil.Process:
    """Return the process of rank 1."""
    return next(p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == "1")


def measure(bench: Bench) -> None:
    """Time two GPUs, kill the second process and see what is left; then time one."""
    steps, every = bench.options.steps, max(1, bench.options.steps // 8)
    flags = ("--max_steps", steps, "--logging_steps", every)
    run = bench.start("two", True, *flags)
    last, until = every * (steps // every) - every, time.monotonic() + 150
    while run.poll() is None and time.monotonic() < until and not any(r["step"] >= last for r in bench.rows("two")):
        time.sleep(0.05)
    speed, before = bench.speed("two"), time.monotonic()
    second_process(run).send_signal(signal.SIGKILL)
    bench.say(f"two GPUs: {speed:,.0f} tokens/s", speed > 0)
    for line in re.findall(r"^fast path: .*|^memory: .*|^peak .*", bench.log("two"), re.M):
        bench.say(line)
    run.wait(90)
    seconds = time.monotonic() - before
    found = sorted(path.name for path in (bench.folder / "two").glob("checkpoint-*"))
    named, good = re.findall(r"error: (rank 1 .*?);", bench.log("two")), seconds < 60 and bool(found)
    bench.say(f"rank 1 killed: all ended after {seconds:.1f} s, said {named}, left {found}", good)
    code = bench.wait("one", bench.start("one", False, *flags))
    ratio = speed / max(1, bench.speed("one"))
    bench.say(f"one GPU: {bench.speed('one'):,.0f} tokens/s, exit code {code}; ratio {ratio:.3f}", code == 0)
    loss, norm, count = bench.apart("two", "one")
    bench.say(f"losses apart {loss:.2e}, gradient norms {norm:.2e} over {count} logged steps", loss < 2e-3)


def go_on(bench: Bench) -> None:
    """Continue the killed run on one GPU and on two, beside a run whose second process runs out of memory."""
    shutil.copytree(bench.folder / "two", bench.folder / "two-on-one")
    flags = ("--max_steps", bench.options.steps, "--logging_steps", max(1, bench.options.steps // 8))
    runs = {name: bench.start(name, name == "two", *flags) for name in ("two", "two-on-one")}
    runs["full"] = bench.start("full", True, "--max_steps", 4, "--logging_steps", 1, script=bench.folder / "full.py")
    for name, run in runs.items():
        code = bench.wait(name, run, 170)
        if name == "full":
            lines = re.findall(r"^out of GPU memory.*", bench.log(name), re.M)
            bench.say(f"out of memory on rank 1: exit code {code}, {lines}", code == 0 and bool(lines))
            continue
        loss, norm, count = bench.apart(name, "one")
        good = code == 0 and loss < 2e-3 and "resuming from" in bench.log(name)
        bench.say(f"{name} continued: exit code {code}, losses apart from one GPU's {loss:.2e} in {count} rows", good)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sequences", type=int, default=32, help="per optimizer step")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        measure(bench)
        go_on(bench)
    return 0 if bench.good else 1


if __name__ == "__main__":
    sys.exit(main())
