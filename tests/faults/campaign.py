"""Break runs at random moments, start them again until they are done, and compare what they leave with an unbroken run.

python tests/faults/campaign.py --runs 100 --signal KILL       kills; also TERM and INT
python tests/faults/campaign.py --runs 20 --signal FSIZE       no file may grow past a random size
python tests/faults/campaign.py --runs 20 --signal FULL        a tmpfs that fills at a random moment (needs root)
python tests/faults/campaign.py --runs 10 --spawn --flags "--deterministic true"      on a GPU

Prints a line of JSON with the counts; exit code 0 where nothing was lost. Every run is a process of its own, forked from
this one, which has only imported what a run needs: that saves the 6 s of imports a run. Half of the runs take the plain
path and half the fused one; half of the kills aim at a checkpoint's write.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from toolkit.startup import after_heavy_imports, before_heavy_imports  # noqa: E402  # found by the path above

before_heavy_imports()
import matplotlib.backends.backend_agg  # noqa: E402  # else every run imports it for its picture
import matplotlib.figure  # noqa: E402, F401
import torch  # noqa: E402

import train_qlora  # noqa: E402
from toolkit.checkpoints import REPLACED, TEMPORARY, flatten_state, read_checkpoint  # noqa: E402
from toolkit.earlier_run import checkpoints  # noqa: E402

after_heavy_imports()

PATHS = {
    "plain": ("--fused_lora", "off", "--optim", "adamw_8bit"),
    "fused": ("--fused_lora", "on", "--compute_dtype", "float32", "--optim", "adamw_torch"),
}
VARYING = ("tokens_per_second", "learned_tokens_per_second", "peak_gib")
FILES = ("adapter_model.safetensors", "adapter_config.json")


def flags_of(path: str, data: Path, output_dir: Path, steps: int) -> list[str]:
    """Return the command line of a run that logs and saves at every step and evaluates at every third."""
    shape = "--max_length 32 --batch_size 2 --gradient_accumulation_steps 2 --lora.dropout 0.05 --compile off --rank 4"
    often = f"--max_steps {steps} --logging_steps 1 --save_steps 1 --eval_steps 3 --save_total_limit 2"
    files = ["--config", ROOT / "tiny" / "config.yaml", "--dataset", data, "--output_dir", output_dir]
    return [*map(str, files), *shape.split(), *often.split(), *PATHS[path]]


SPAWN = False  # whether a run is started from its command line, imports and all, as one with a GPU has to be


def start(flags: list[str], log: Path, limit: int | None = None) -> int:
    """Fork a process that trains and return its id; its output goes to `log`. limit: bytes that a file may have."""
    if SPAWN:
        with open(log, "ab") as file:
            command = [sys.executable, str(ROOT / "train_qlora.py"), *flags]
            return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL).pid
    if pid := os.fork():
        return pid
    code = 99
    try:
        with open(log, "ab") as file:  # by a pipe, to which the limit does not apply
            out = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file).stdin
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        # Not the parent's, which remember whether theirs was a file.
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = train_qlora.main(flags)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of the parent's is unwound twice


def ended(pid: int, wait: bool = False) -> int | None:
    """Return the exit code of a process, minus the signal that killed it, or None while it runs."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait_for(pid: int, happened: Callable[[], bool], pause: float = 0.005) -> int | None:
    """Wait until happened() or the process ends; return its exit code if that came first."""
    while True:
        if (code := ended(pid)) is not None:
            return code
        if happened():
            return None
        time.sleep(pause)


def logged_steps(output_dir: Path) -> int:
    try:
        return (output_dir / "metrics.jsonl").read_text(encoding="utf-8").count('"loss"')
    except OSError:
        return 0


def rows_of(output_dir: Path) -> list[dict]:
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in VARYING} for line in lines]


def difference(output_dir: Path, whole: Path) -> str:
    """Return what two finished runs differ in, or nothing."""
    last = checkpoints(whole)[0].name
    names = [*FILES, f"{last}/adapter_model.safetensors"]
    for name in names:
        if not (output_dir / name).is_file() or (output_dir / name).read_bytes() != (whole / name).read_bytes():
            return name
    # Of the rest of its state not the evaluation of the last step, which a signal in that step puts off to the next start.
    (trees, tensors), states = ([], [{}, {}]), [read_checkpoint(folder / last)[1] for folder in (output_dir, whole)]
    for state, found in zip(states, tensors, strict=True):
        trees.append(flatten_state([state["optimizer"], state["scheduler"], state["scaler"]], "state", found))
    same = all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])
    if trees[0] != trees[1] or not same:
        return f"the optimizer of {last}"
    if rows_of(output_dir) != rows_of(whole):
        return "metrics.jsonl"
    if {p.name for p in output_dir.iterdir()} != {p.name for p in whole.iterdir()}:
        return f"the files in the folder: {sorted(p.name for p in output_dir.iterdir())}"
    return ""


class Campaign:
    """The counts of a campaign and the runs that it breaks."""

    def __init__(self, folder: Path, kind: str, steps: int, seed: int, most: int):
        self.folder, self.kind, self.steps, self.most = folder, kind, steps, most
        self.random, self.counts = random.Random(seed), collections.Counter()
        self.whole, self.seconds, self.problems = {}, {}, []
        self.data = folder / "few.txt"
        text = (ROOT / "tiny" / "text" / "train.txt").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()][:64]
        self.data.write_text("\n\n".join("\n".join(lines[i : i + 8]) for i in range(0, 64, 8)) + "\n", encoding="utf-8")

    def reference(self, path: str) -> Path:
        """Return the folder of a run that nothing disturbs, made on first use; notes how long its steps take."""
        if path not in self.whole:
            output_dir = self.folder / f"whole-{path}"
            pid = start(flags_of(path, self.data, output_dir, self.steps), self.folder / f"whole-{path}.log")
            code = wait_for(pid, lambda: logged_steps(output_dir))
            first = time.monotonic()
            code = ended(pid, wait=True) if code is None else code
            assert code == 0, (self.folder / f"whole-{path}.log").read_text(encoding="utf-8")
            self.whole[path], self.seconds[path] = output_dir, time.monotonic() - first
        return self.whole[path]

    def kill(self, pid: int, output_dir: Path, path: str) -> int:
        """Wait for a logged step, send the signal at a random moment, return the exit code."""
        before = logged_steps(output_dir)
        if (code := wait_for(pid, lambda: logged_steps(output_dir) > before)) is not None:
            return code
        signum = getattr(signal, "SIG" + self.kind)
        until = time.monotonic() + self.random.uniform(0, self.seconds[path])
        if self.random.random() < 0.5:  # within a checkpoint's write, which takes a few milliseconds
            until = time.monotonic() + self.random.uniform(0, 0.5 * self.seconds[path])
            if (code := wait_for(pid, lambda: time.monotonic() > until)) is not None:
                return code
            if (code := wait_for(pid, lambda: any(output_dir.glob(TEMPORARY + "checkpoint-*")), 0.0003)) is not None:
                return code
            until = time.monotonic() + self.random.uniform(0, 0.006)
        if (code := wait_for(pid, lambda: time.monotonic() > until, 0.0003)) is not None:
            return code
        os.kill(pid, signum)
        self.counts["signals"] += 1
        code = ended(pid, wait=True)
        if any(output_dir.glob(TEMPORARY + "checkpoint-*")) or any(output_dir.glob(REPLACED + "*")):
            self.counts["inside a checkpoint's write"] += 1
        return code

    def fill(self, pid: int, output_dir: Path, path: str) -> int:
        """Leave next to no room on the disk at a random moment, return the exit code, and make room again."""
        if (code := wait_for(pid, lambda: logged_steps(output_dir))) is not None:
            return code
        time.sleep(self.random.uniform(0, 0.8 * self.seconds[path]))
        ballast, room = output_dir.parent / "ballast", self.random.choice([0, 4096, 65536, 400_000])
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while (size := shutil.disk_usage(output_dir.parent).free - room) > 0:
                file.write(bytes(min(size, 2**20)))
        self.counts["filled"] += 1
        code = ended(pid, wait=True)
        ballast.unlink(missing_ok=True)
        return code

    def broken(self, flags: list[str], log: Path, output_dir: Path, path: str) -> int:
        """Start a run, do to it what the campaign is about, and return its exit code."""
        if self.kind == "FSIZE":
            return ended(start(flags, log, self.random.choice([2000, 20_000, 60_000, 200_000, 400_000])), wait=True)
        break_it = self.fill if self.kind == "FULL" else self.kill
        return break_it(start(flags, log), output_dir, path)

    def run(self, number: int) -> None:
        """Break one run once or more, let it finish, and compare."""
        path = ("plain", "fused")[number % 2]
        whole = self.reference(path)
        place = self.folder / str(number)
        place.mkdir()
        if self.kind == "FULL":
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=True)
        output_dir, log = place / "output", self.folder / f"{number}.log"
        flags, code = flags_of(path, self.data, output_dir, self.steps), None
        for attempt in range(self.random.randint(1, self.most)):
            code = self.broken(flags, log, output_dir, path)
            while code == 0 and attempt == 0 and self.kind in ("KILL", "TERM", "INT"):  # it was too fast: once more
                shutil.rmtree(output_dir)
                code = self.broken(flags, log, output_dir, path)
            self.counts[f"exit {code}"] += 1
            self.sound(output_dir)
            if code == 0 or self.only_the_adapter(code, output_dir):
                break
        if code != 0 and not self.only_the_adapter(code, output_dir):
            code = ended(start(flags, log), wait=True)
            self.counts[f"last exit {code}"] += 1
        self.judge(number, path, code, difference(output_dir, whole) if code == 0 else "")
        if self.kind == "FULL":
            subprocess.run(["umount", str(place)], check=True)
        shutil.rmtree(place)

    def only_the_adapter(self, code: int | None, output_dir: Path) -> bool:
        """Return whether a run made all its steps and had room for what they gave, and for no checkpoint."""
        return code == 1 and (output_dir / FILES[0]).is_file() and not checkpoints(output_dir)

    def judge(self, number: int, path: str, code: int, apart: str) -> None:
        """Count how a run came out."""
        printed = (self.folder / f"{number}.log").read_text(encoding="utf-8")
        self.counts["damaged"] += printed.count("is damaged")
        self.counts["tracebacks"] += printed.count("Traceback")
        if code == 1:  # only the adapter
            names = [self.folder / str(number) / "output" / FILES[0], self.whole[path] / FILES[0]]
            apart = "" if names[0].read_bytes() == names[1].read_bytes() else FILES[0]
            self.counts["with no room for any checkpoint"] += 1
        if code not in (0, 1) or apart:
            self.problems.append(f"run {number} ({path}): exit {code}" + (f", differs in {apart}" if apart else ""))
        else:
            self.counts["identical"] += 1

    def sound(self, output_dir: Path) -> None:
        """Note a folder under a checkpoint's name that is none."""
        found = checkpoints(output_dir)
        for folder in found:
            try:
                read_checkpoint(folder)
            except ValueError as error:
                self.problems.append(f"{folder}: {error}")
        self.counts["without a checkpoint"] += not found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", "--kills", type=int, default=100, help="runs to break, each at least once")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT", "FSIZE", "FULL"), nargs="+", default=["KILL"])
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps a run")
    parser.add_argument("--most", type=int, default=3, help="times that a run is broken at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spawn", action="store_true", help="start each run from its command line, not by fork")
    parser.add_argument("--flags", default="", help="more flags of train_qlora.py")
    parser.add_argument("--keep", action="store_true", help="leave the folder of the campaign")
    options = parser.parse_args()
    global SPAWN
    SPAWN, folder = options.spawn, Path(tempfile.mkdtemp(prefix="faults-"))
    for path, flags in PATHS.items():
        PATHS[path] = (*flags, *options.flags.split())
    lost = 0
    campaign = Campaign(folder, options.signal[0], options.steps, options.seed, options.most)
    numbers = itertools.count()  # on through the signals, since every other run takes the fused path
    for kind in options.signal:
        begin = time.monotonic()
        campaign.kind, campaign.counts, campaign.problems = kind, collections.Counter(), []
        for number in itertools.islice(numbers, options.runs):
            campaign.run(number)
        seconds = round(time.monotonic() - begin, 1)
        counts = {"signal": kind, "runs": options.runs, "seconds": seconds, **dict(sorted(campaign.counts.items()))}
        print(json.dumps({**counts, "problems": campaign.problems}), flush=True)
        lost += options.runs - campaign.counts["identical"] + campaign.counts["damaged"] + len(campaign.problems)
    if options.keep or lost:
        print(f"logs are in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
