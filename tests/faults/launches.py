"""Launches of two processes in which something happens to one of them, and a campaign that kills one at a random moment.

python tests/faults/launches.py --kills 30            kill a random rank at a random time; continue, and compare with an unbroken run

Prints a line of JSON with the counts; exit code 0 where every run could be continued, none hung and no process was left.
"""

import argparse
import collections
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run"]
MINUTE = 60.0
SIGNALS = {"hang": signal.SIGSTOP, "signal": signal.SIGTERM, "die": signal.SIGKILL}  # what a process sends itself
SAME = 1e-4  # the largest difference between the losses of runs that are the same within rounding


def start(
    fault: str, flags: list, output_dir: Path, rank: int = 1, count: int = 2, **constants: str
) -> subprocess.Popen:
    """Start a run of the tiny model in `count` processes, and let `fault` happen to one of them; its output is piped.

    constants: of toolkit/processes.py. The fault `restart` comes once, and torchrun starts all again.
    """
    argv = ["--config", ROOT / "tiny" / "config.yaml", *flags, "--output_dir", output_dir.name]
    child = [__file__, fault, rank, json.dumps(constants), *argv]
    again = ["--max-restarts", "1"] if fault == "restart" else []
    command = [*LAUNCH, "--standalone", *again, "--nproc_per_node", count, *child]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(list(map(str, command)), env=environment, cwd=output_dir.parent, **pipes)


def launch(fault: str, flags: list, output_dir: Path, rank: int = 1, count: int = 2, **constants: str):
    """Return the ended launch, with its stdout and stderr; see start."""
    run = start(fault, flags, output_dir, rank, count, **constants)
    try:
        out, err = run.communicate(timeout=300)
    finally:
        run.kill()
    return subprocess.CompletedProcess(run.args, run.returncode, out, err)


def left_running(folder: Path) -> list[int]:
    """Return the processes whose current folder is this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(process.pid)
        except psutil.Error:
            continue
    return [pid for pid in found if pid != os.getpid()]


# ------------------------------------------------------------------------------------------------ within a process


def become_faulty(fault: str, flags: list[str]) -> None:
    """Let `fault` happen to this process."""
    import torch

    import train_qlora
    from toolkit import evaluation

    if fault == "config":
        flags += ["--learning_rate", "0.1"]
    if fault == "folder":
        os.makedirs("other", exist_ok=True)
        os.chdir("other")
    if fault == "data":
        place = flags.index("--dataset") + 1
        other = Path("other.txt")
        other.write_text(Path(flags[place]).read_text(encoding="utf-8")[::-1], encoding="utf-8")
        flags[place] = str(other)
    originals = train_qlora.micro_batches, evaluation.own_batches

    def micro_batches(run, numbers):
        if run.progress.step == 2:
            if fault == "full" or (fault == "reshape" and run.plan.micro_batch > 1):
                raise torch.OutOfMemoryError("made up")
            if fault == "error" or (fault == "restart" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
                raise RuntimeError("made up")
            if fault in SIGNALS:
                os.kill(os.getpid(), SIGNALS[fault])
        yield from originals[0](run, numbers)

    def own_batches(blocks, numbers, micro_batch, *rest):
        if fault == "reshape" and micro_batch > 1:
            raise torch.OutOfMemoryError("made up")
        yield from originals[1](blocks, numbers, micro_batch, *rest)

    train_qlora.micro_batches, evaluation.own_batches = micro_batches, own_batches


def child(fault: str, rank: str, constants: str, *flags: str) -> None:
    """Run train_qlora in one of the processes."""
    sys.path.insert(0, str(ROOT))
    from toolkit import startup

    startup.before_heavy_imports()
    import train_qlora
    from toolkit import processes

    for name, value in json.loads(constants).items():
        setattr(processes, name, float(value))
    if fault == "shared" and os.environ["WORLD_SIZE"] != "1":  # both on the first GPU, which NCCL refuses
        processes.backend_of = lambda gpu: "gloo"
        os.environ["LOCAL_RANK"] = "0"
    given = list(flags)
    if os.environ["RANK"] == rank:
        become_faulty(fault, given)
    startup.run_and_exit(lambda: train_qlora.main(given))


def fork_two(fault: str, rank: str, output_dir: str, *flags: str) -> list[int]:
    """Fork two processes of a run as torchrun starts them, let `fault` happen to one, and return their process ids by rank."""
    import train_qlora

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for number in ("0", "1"):
        if not (child := os.fork()):
            os.environ.update(RANK=number, LOCAL_RANK=number, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            code, given = 1, [*flags, "--output_dir", output_dir]
            try:
                if number == rank:
                    become_faulty(fault, given)
                code = train_qlora.main(given)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def codes_of(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def forked(*words: str) -> int:
    """Return 0 if two forked processes did; see fork_two. To be called by tests/forked.py, in a process that has the imports."""
    return max(map(abs, codes_of(fork_two(*words))))


def kill_one_of_two(rank: str, after: str, output_dir: str, *flags: str) -> int:
    """Kill one of two forked processes some seconds after their next logged step.

    Prints a line of JSON: the exit codes by rank and the seconds until both had ended. To be called by tests/forked.py.
    """
    before = steps_logged(Path(output_dir))
    children = fork_two("none", rank, output_dir, *flags)
    while steps_logged(Path(output_dir)) <= before and os.waitpid(children[0], os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    time.sleep(float(after))
    os.kill(children[int(rank)], signal.SIGKILL)
    killed = time.monotonic()
    print(json.dumps([codes_of(children), time.monotonic() - killed]))
    return 0


# ------------------------------------------------------------------------------------------------ the campaign


CAMPAIGN = (
    "--max_length 32 --rank 4 --batch_size 2 --gradient_accumulation_steps 2 --compile off --compute_dtype float32 --max_steps 40 "
    "--optim adamw_torch --logging_steps 1 --save_steps 5 --eval_steps 8 --max_train_samples 200 --max_eval_samples 60"
)
STEPPED = "/40 |"  # in a line of the log about a step


def last_step(output_dir: Path) -> int:
    from toolkit.earlier_run import checkpoints, step_of

    found = checkpoints(output_dir) if output_dir.is_dir() else []
    return step_of(found[0]) if found else 0


def steps_logged(output_dir: Path) -> int:
    log = output_dir / "metrics.jsonl"
    return log.read_text(encoding="utf-8").count('"grad_norm"') if log.is_file() else 0


def wait_for_a_step(run: subprocess.Popen, output_dir: Path) -> None:
    """Wait until a run has logged a step more than it has now, or has ended."""
    before = steps_logged(output_dir)
    while run.poll() is None and steps_logged(output_dir) <= before:
        time.sleep(0.02)


def kill_one(run: subprocess.Popen, after: float, rank: int) -> float:
    """Kill a process of a launch some seconds from now; return how long the launch went on, or -1 if it was over."""
    time.sleep(after)
    try:
        ranks = [p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == str(rank)]
        ranks[0].kill()
    except (psutil.Error, IndexError):
        return -1.0
    killed = time.monotonic()
    run.wait(300)
    return time.monotonic() - killed


def campaign(kills: int, seed: int, folder: Path) -> dict:
    """Kill until it is enough, continuing the same run each time; return the counts."""
    chance, counts = random.Random(seed), collections.Counter()
    steps = CAMPAIGN.split()
    slowest, furthest, whole, number, problems = 0.0, 0.0, folder / "whole", 0, []
    begun, first = time.monotonic(), start("none", steps, whole)
    wait_for_a_step(first, whole)
    set_up = time.monotonic() - begun
    assert first.communicate(timeout=300) and first.returncode == 0
    training = time.monotonic() - begun - set_up
    while counts["kills"] < kills:
        output_dir, before = folder / f"run-{number}", last_step(folder / f"run-{number}")
        run = start("none", steps, output_dir)
        rank, early = chance.randrange(2), chance.random() < 0.25
        if not early:  # before the first step there is nothing to lose, so most kills come after it
            wait_for_a_step(run, output_dir)
        took = kill_one(run, chance.uniform(0, set_up if early else training / 2), rank)
        out, err = run.communicate(timeout=300)
        counts["left processes"] += len(left_running(folder))
        if took < 0 or run.returncode == 0:  # it was done
            counts["finished"] += run.returncode == 0
            distance = apart(output_dir, whole) if run.returncode == 0 else math.inf
            same, furthest = distance < SAME, max(furthest, distance)
            counts["same losses"] += same
            problems += [] if same else [f"run {number}: {(out + err)[-500:]}"]
            number += 1
            continue
        counts["kills"] += 1
        counts[f"of rank {rank}"] += 1
        slowest = max(slowest, took)
        counts["slower than a minute"] += took > MINUTE
        counts["in training"] += STEPPED in out
        counts["named"] += f"rank {rank} (" in out + err and "has ended" in out + err
        now = last_step(output_dir)
        counts["lost steps"] += now < before
        steps_said = [
            int(line.split("/")[0].split()[1])
            for line in out.splitlines()
            if line.startswith("step ") and STEPPED in line
        ]
        counts["saved the last step"] += bool(steps_said) and now >= max(steps_said)
        print(
            json.dumps({"run": number, "rank": rank, "seconds": round(took, 1), "checkpoint": now, **counts}),
            flush=True,
        )
    done = launch("none", steps, folder / f"run-{number}")  # the last one has to be able to end
    counts["finished"] += done.returncode == 0
    distance = apart(folder / f"run-{number}", whole) if done.returncode == 0 else math.inf
    same, furthest = distance < SAME, max(furthest, distance)
    counts["same losses"] += same
    problems += [] if same else [f"run {number}: {(done.stdout + done.stderr)[-500:]}"]
    return {**counts, "runs": number + 1, "slowest": round(slowest, 1), "losses apart": furthest, "problems": problems}


def metrics(folder: Path) -> list[tuple]:
    """Return (step, loss) of each row."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in rows]


def apart(one: Path, other: Path) -> float:
    """Return the largest difference between the losses of two runs; infinity if they have not the same steps."""
    a, b = metrics(one), metrics(other)
    if [step for step, _ in a] != [step for step, _ in b]:
        return math.inf
    return max(abs(x - y) for (_, x), (_, y) in zip(a, b, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        counts = campaign(options.kills, options.seed, Path(folder))
    print(json.dumps(counts), flush=True)
    wrong = counts.get("slower than a minute", 0) + counts.get("left processes", 0) + counts.get("lost steps", 0)
    return 0 if not wrong and not counts["problems"] and counts["finished"] == counts["runs"] else 1


if __name__ == "__main__":
    if "RANK" in os.environ:
        child(*sys.argv[1:])
    sys.exit(main())
