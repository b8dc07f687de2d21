"""The experiments of the README: what rank, targets and quantisation change, each over several seeds.

python tests/benchmarks/experiments.py --model MODEL --data TEXTS --out runs          on a GPU: 21 runs of 200 steps
python train_qlora.py --compare runs/*_seed1                                          the table and picture of one seed

Each run is train_qlora.py in a process of its own, with everything but its flags as in config.yaml. The table gives the
mean over the seeds, and the difference from the first experiment with its standard error: the seeds are pairs, since runs
of the same seed see the same blocks in the same order.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# name: flags. The first one is what the others are compared with: config.yaml as it is.
EXPERIMENTS = {
    "r16": [],
    "r8": ["--rank", "8", "--alpha", "16"],
    "r32": ["--rank", "32", "--alpha", "64"],
    "attention": ["--target_modules", "q_proj,k_proj,v_proj,o_proj"],
    "fp4": ["--quant_type", "fp4"],
    "single_quant": ["--use_double_quant", "false"],
    "fp8": ["--products", "fp8"],
}


def train(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """Train one experiment with one seed, if that was not done before, and return its figures."""
    folder = options.out / f"{name}_seed{seed}"
    script = ROOT / ("tests/benchmarks/cached_weights.py" if options.cached else "train_qlora.py")
    command = [sys.executable, str(script), "--config", str(ROOT / "config.yaml")]
    command += ["--model_name", str(options.model), "--dataset", str(options.data), "--seed", str(seed)]
    command += ["--max_steps", str(options.steps), "--output_dir", str(folder), *EXPERIMENTS[name], *options.flags]
    if not (folder / "adapter_model.safetensors").exists():
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    log = (folder / "training_log.txt").read_text(encoding="utf-8")
    trained = re.search(r"trainable params: ([\d,]+)", log)
    weights = re.search(r"packed weights +([\d.]+)", log)
    constants = re.search(r"quantisation constants +([\d.]+)", log)
    return {
        "base": losses[0],
        "loss": min(losses),
        "trained": int(trained[1].replace(",", "")),
        "gib": float(weights[1]) + float(constants[1]) if weights and constants else math.nan,
    }


def with_error(values: list[float]) -> str:
    """Return the mean of paired differences with its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):+.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--data", required=True, help="folder of texts, or hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--only", nargs="+", default=[*EXPERIMENTS], choices=EXPERIMENTS, help="the first is compared with"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--cached", action="store_true", help="on a CPU: weights are unpacked once (cached_weights.py)")
    options, options.flags = parser.parse_known_args()
    seeds = range(1, options.seeds + 1)
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {name: [pool.submit(train, options, name, seed) for seed in seeds] for name in options.only}
        runs = {name: [run.result() for run in group] for name, group in waiting.items()}
    first = next(iter(runs.values()))
    print("| experiment | trained weights | 4-bit weights, GiB | base loss | loss | difference from the first |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, group in runs.items():
        base, loss = (statistics.mean(run[key] for run in group) for key in ("base", "loss"))
        against = with_error([run["loss"] - other["loss"] for run, other in zip(group, first, strict=True)])
        against = "" if group is first else against
        print(f"| {name} | {group[0]['trained']:,} | {group[0]['gib']:.3f} | {base:.4f} | {loss:.4f} | {against} |")


if __name__ == "__main__":
    main()
