"""The form of a hostile input, and what it must not achieve. The inputs themselves: hostile_*.py, run by test_adversary.py.

Whoever fine-tunes downloads models, adapters, data and settings from strangers. Each input here is one that a stranger could
send. Nothing of it may run, it may neither hang nor fill the memory nor end the process by a signal, it is answered in one line
that names the file or the setting, and nothing is written outside the output folder.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.forked import Ended, Forker

ROOT = Path(__file__).resolve().parents[2]
SECONDS, WAIT, GIB = 20, 60, 2.0  # of computing; of waiting, on cores that others use too; of memory
CANARY = "canary"  # hostile code writes a file of this name, into the folder that the variable CANARY names
LONG = "--max_eval_samples 40 --max_length 32 --batch_size 2 --gradient_accumulation_steps 2 --compile off --rank 4 --logging_steps 1"
TRAIN = (*LONG.split(), "--fused_lora", "off", "--optim", "adamw_8bit")

# Python that shows that it ran, for whatever a hostile file can hold.
CODE = "import os; open(os.path.join(os.environ['CANARY'], 'canary'), 'w').close()"


@dataclasses.dataclass
class Attack:
    """A command line on a hostile input.

    script, flags, input, env: what the user types, in the folder that was handed to the function that built the input. codes:
    the exit codes that are right; 0 where the input is in fact harmless or an earlier checkpoint takes its place. says: a
    regular expression for the line. check: returns what else is wrong, from the folder and what the process left.
    output_dir: the one folder below that may be written.
    """

    script: str
    flags: list[object]
    says: str = ""
    codes: tuple[int, ...] = (1, 2)
    input: str | None = None
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    check: Callable[[Path, Ended], list[str]] = lambda folder, ended: []
    output_dir: str = "output"


def train(*flags: object, **keywords: object) -> Attack:
    """Return an attack on a short training run of the tiny model into output; a flag replaces the one before it."""
    data = ROOT / "tiny" / "text"
    first = ["--config", ROOT / "tiny" / "config.yaml", "--dataset", data, "--output_dir", "output", "--max_steps", 2]
    return Attack("train_qlora", [*first, *TRAIN, *flags], **keywords)


def ask(*flags: object, **keywords: object) -> Attack:
    """Return an attack on one short answer in text mode."""
    first = ["--mode", "text", "--prompt", "To be", "--max_new_tokens", 4]
    return Attack("inference_example", [*first, *flags], **keywords)


def listing(folder: Path, leave_out: Path) -> dict[str, object]:
    """Return every path below a folder with its content or its link's target, but for those below `leave_out`."""
    found: dict[str, object] = {}
    for parent, folders, files in os.walk(folder):
        if Path(parent) == leave_out:
            folders.clear()
            continue
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                size = path.stat().st_size  # of a sparse file more than there is memory
                found[str(path)] = path.read_bytes() if size < 2**30 else size
            elif path != leave_out:
                found[str(path)] = None
    return found


def execute(attack: Attack, folder: Path, forker: Forker) -> list[str]:
    """Run an attack in a child and return what it achieved that it must not; an empty list is right."""
    for name in ("tmp", "canaries", "matplotlib"):
        (folder.parent / f"{folder.name}-{name}").mkdir()
    canaries = folder.parent / f"{folder.name}-canaries"
    own = {"CANARY": str(canaries), "TMPDIR": str(folder.parent / f"{folder.name}-tmp")}
    own["MPLCONFIGDIR"] = str(folder.parent / f"{folder.name}-matplotlib")
    before = listing(folder, folder / attack.output_dir)
    flags = [str(flag) for flag in attack.flags]
    env = {**os.environ, **own, **attack.env}
    ended = forker.run(attack.script, flags, folder, env, attack.input, WAIT, watch=folder.parent)
    problems = [f"seen: {line}" for line in ended.seen]
    problems += ["the canary was written"] if list(canaries.iterdir()) else []
    problems += [f"exit code {ended.returncode}, not {attack.codes}"] if ended.returncode not in attack.codes else []
    problems += [f"{ended.cpu:.0f} s"] if ended.cpu > SECONDS else []
    problems += [f"{ended.peak / 2**30:.1f} GiB"] if ended.peak > GIB * 2**30 else []
    lines = ended.stderr.splitlines()
    if "Traceback" in ended.stdout + ended.stderr:
        problems.append("a traceback")
    elif ended.returncode in (1, 2) and (len(lines) != 1 or len(lines[0]) > 700):
        problems.append(f"{len(lines)} lines on stderr")
    if re.search(attack.says, ended.stdout + ended.stderr) is None:
        problems.append(f"does not say /{attack.says}/")
    if re.search(
        "[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f\x9b]|\x1b[^[]|\x1b\\[[^mKGJA]*[^0-9;mKGJAB]",
        ended.stdout + ended.stderr,
    ):
        problems.append("control characters in what is shown")
    after = listing(folder, folder / attack.output_dir)
    changed = [path for path in before.keys() | after.keys() if before.get(path, "") != after.get(path, "")]
    problems += [f"changed: {path}" for path in changed]
    problems += attack.check(folder, ended)
    if problems:
        problems.append(f"stdout: {ended.stdout[-600:]!r} stderr: {ended.stderr[-1500:]!r}")
    for name in ("tmp", "canaries", "matplotlib"):
        shutil.rmtree(folder.parent / f"{folder.name}-{name}", ignore_errors=True)
    return problems


@dataclasses.dataclass
class Ground:
    """Sound things to be made hostile: copies of them may be changed.

    model: the tiny model's folder. finished: the output folder of a run of 2 steps with its adapter. unfinished: that of the
    same run of 3 steps as if it had been killed after step 2, with checkpoint-1 and checkpoint-2; going on from there with
    `train(*LAST)` ends in the adapter whose bytes are `expected`.
    """

    model: Path
    finished: Path
    unfinished: Path
    expected: bytes

    def copy(self, what: str, to: Path) -> Path:
        """Copy one of the folders and return where it went."""
        shutil.copytree(getattr(self, what), to, symlinks=True)
        return to


LAST = ("--max_steps", 3, "--save_steps", 1, "--save_total_limit", 3)


def make_ground(folder: Path, forker: Forker) -> Ground:
    """Make the sound things, with two runs of the tiny model."""

    def run(output_dir: Path, *flags: object) -> Path:
        attack = train(*flags, "--output_dir", output_dir)
        ended = forker.run(attack.script, [str(flag) for flag in attack.flags], folder, dict(os.environ), None, 200)
        assert ended.returncode == 0, ended.stderr
        return output_dir

    finished = run(folder / "finished")
    unfinished = run(folder / "unfinished", *LAST)
    expected = (unfinished / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(unfinished / "checkpoint-3")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (unfinished / name).unlink()
    return Ground(ROOT / "tiny" / "model", finished, unfinished, expected)
