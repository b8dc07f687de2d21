"""The list of runs below a folder, from what each of them has left. Imports no torch, so the list appears at once."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import Config, ConfigError, load_config, sources_of
from toolkit.adapter_config import refuse_large
from toolkit.earlier_run import CHECKPOINT, checkpoints, read_file, settings, step_of
from toolkit.locks import is_held
from toolkit.startup import visible
from toolkit.text_width import padded, width, wrapped

CONFIG, METRICS, LOG, WEIGHTS = "config.yaml", "metrics.jsonl", "training_log.txt", "adapter_model.safetensors"
MOST = 2**28  # bytes of metrics.jsonl or the log; a million logged steps take 200 MB
NARROWEST, WIDEST = 10, 60  # columns of an entry that may take several lines

# ------------------------------------------------------------------------------------------------ what a run leaves


def planned_steps(folder: Path, own: dict[str, Any]) -> int:
    """Return how many steps a run was to have: its training.max_steps, or what its log says; 0 if that is unknown."""
    if own["training.max_steps"] is not None:
        return int(own["training.max_steps"])
    found: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        text = read_file(folder / LOG, MOST).decode()
        found = re.findall(r"^step \d+/(\d{1,15}) \| loss ", text, re.MULTILINE)
    return int(found[-1]) if found else 0


def out_of_patience(rows: list[dict], patience: int | None) -> bool:
    """Return whether early stopping has ended a run with these rows."""
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def check_rows(rows: list[Any]) -> None:
    """Raise ValueError unless these are rows of metrics.jsonl: numbers by name, and what a row of its kind always has."""
    for number, row in enumerate(rows, 1):
        numbers = isinstance(row, dict) and all(
            v is None or (type(v) in (int, float) and abs(v) < 1e18) for v in row.values()
        )
        needed = {"step"}
        if numbers and "loss" in row:
            needed |= {"tokens", "tokens_per_second", "peak_gib"}
        if numbers and "eval_loss" in row:
            needed |= {"eval_loss", "perplexity"}
        if not numbers or not needed <= {name for name, value in row.items() if value is not None}:
            raise ValueError(f"metrics.jsonl: row {number}: expected numbers named {', '.join(sorted(needed))}")
        if row.get("tokens_per_second") == 0:
            raise ValueError(f"metrics.jsonl: row {number}: expected tokens_per_second above 0")


@dataclasses.dataclass(frozen=True)
class Run:
    """What the list shows of a run; `problem` says why nothing of it can be read."""

    folder: str
    bytes: int
    date: float  # when it was last written to, in seconds of time.time
    problem: str = ""
    model: str = ""
    data: str = ""
    rank: int = 0
    step: int = 0
    total: int = 0  # steps that it was to have; 0: unknown
    before: float | None = None  # validation loss of the base, and of the adapter that the run keeps
    after: float | None = None
    state: str = ""

    def entries(self) -> dict[str, str]:
        """Return the run's entries in the table, by column."""
        size = f"{self.bytes / 1e6:,.1f} MB"
        day = time.strftime("%Y-%m-%d", time.localtime(self.date))
        if self.problem:
            return dict.fromkeys(COLUMNS, "-") | {"run": self.folder, "date": day, "state": self.problem, "size": size}
        losses = ["-" if loss is None else f"{loss:.4f}" for loss in (self.before, self.after)]
        steps = f"{self.step:,}" + (f" of {self.total:,}" if self.total > self.step else "")
        found = (self.folder, self.model, self.data, str(self.rank), steps, *losses, day, self.state, size)
        return dict(zip(COLUMNS, found, strict=True))


COLUMNS = ("run", "model", "data", "rank", "steps", "loss before", "after", "date", "state", "size")
NUMBERS = {"rank", "steps", "loss before", "after", "size"}  # these stand at the right of their column
FLEXIBLE = {"run", "model", "data", "state"}  # these may take several lines


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl; raise ValueError or OSError.

    A last row that has no end yet, of a run that is just writing it, does not count.
    """
    try:
        rows = [json.loads(line) for line in read_file(path, MOST).split(b"\n")[:-1] if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    check_rows(rows)
    return rows


def state_of(folder: Path, done: bool, step: int) -> str:
    """Return whether a run is at work, has finished, or can be resumed. done: whether it made all its steps."""
    resumable = checkpoints(folder)[:1]
    if is_held(folder / ".lock"):
        return f"running, at step {step:,}"
    if done and (folder / WEIGHTS).is_file():
        return "finished"
    if resumable:
        return f"resumable at step {step_of(resumable[0]):,}"
    # Its checkpoints may have been deleted to save space.
    return "ended early" if (folder / WEIGHTS).is_file() else "stopped before its first checkpoint"


def read_run(folder: Path) -> Run:
    """Return what the list shows of the run in a folder, which may be damaged, or come from anybody."""
    size, date = measure(folder)
    try:
        refuse_large(folder / CONFIG)
        config, rows = load_config(folder / CONFIG), read_rows(folder / METRICS)
    except ConfigError as error:
        problem = error.problems[0].removeprefix("--adapter: ").removeprefix("--config: ")
        return Run(str(folder), size, date, f"cannot be read: {problem}")
    except (OSError, ValueError, RecursionError) as error:
        return Run(str(folder), size, date, f"cannot be read: {' '.join(str(error).split())[:200]}")
    evaluations = [row for row in rows if "eval_loss" in row]
    first = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else {}
    newest = [step_of(path) for path in checkpoints(folder)[:1]]
    step = int(max([row["step"] for row in rows] + newest, default=0))
    total = planned_steps(folder, settings(config))
    done = step >= total or out_of_patience(rows, config.training.early_stopping_patience)
    return Run(
        str(folder), size, date, model=short_model(config.model.name), data=short_data(config), rank=config.lora.rank,
        step=step, total=0 if done else total, before=first.get("base_loss", first.get("eval_loss")),
        after=min((row["eval_loss"] for row in evaluations if row is not first), default=None),
        state=state_of(folder, bool(rows) and done, step),
    )  # fmt: skip


def shortest_endings(paths: list[str]) -> list[str]:
    """Return paths without the folders before what tells them apart."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        endings = [str(Path(*part[-count:])) for part in parts]
        if len(set(endings)) == len(set(paths)):
            return endings
    return paths


def short_model(name: str) -> str:
    """Return a model's name without its owner or the folders above it."""
    return os.path.basename(os.path.normpath(name)) or name


def short_data(config: Config) -> str:
    """Return the names of a run's data sets without their owners or the folders above them."""
    return ", ".join(short_model(source.dataset) for source in sources_of(config.data))


def measure(folder: Path) -> tuple[int, float]:
    """Return the bytes of all files in a run's folder, checkpoints included, and when its metrics were last written."""
    size = 0
    for top, folders, files in os.walk(folder):
        # a run below this one is listed, and counted, by itself
        folders[:] = [name for name in folders if not is_run(os.path.join(top, name))]
        for name in files:
            with contextlib.suppress(OSError):  # a run may just have replaced it
                size += os.lstat(os.path.join(top, name)).st_size
    return size, os.stat(folder / METRICS).st_mtime


# ------------------------------------------------------------------------------------------------ the list


def is_run(folder: str) -> bool:
    """Return whether a folder holds what every run writes when it starts."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in (CONFIG, METRICS))


def find_runs(top: Path, say: Callable[[str], None]) -> list[Path]:
    """Return the folders of runs in and below a folder; `say` gets a line about each folder that cannot be read.

    Links are not followed, and hidden folders and checkpoints are left out.
    """
    found = []
    for folder, folders, _ in os.walk(top, onerror=lambda error: say(f"not searched: {error}")):
        folders[:] = sorted(n for n in folders if not (n.startswith(".") or CHECKPOINT.fullmatch(n)))
        if is_run(folder):
            found.append(Path(folder))
    return found


def runs_table(runs: list[Run], columns: int) -> str:
    """Return a table with one row per run, within the columns of the terminal.

    Columns for which there is no room stand in a second table below, which names the runs again. Long entries take
    several lines, as many as that needs and no more.
    """
    entries = [{name: in_one_line(text) for name, text in run.entries().items()} for run in runs]
    tables = min((parts(entries, columns, most) for most in range(WIDEST, NARROWEST - 1, -1)), key=len)
    return "\n\n".join("\n".join(line for row in table for line in row) for table in tables)


def parts(entries: list[dict[str, str]], columns: int, most: int) -> list[list[list[str]]]:
    """Return the tables, as rows of lines, if a flexible entry has at most `most` columns of the terminal."""
    cells = {name: [[name], *(cut(name, entry[name], most) for entry in entries)] for name in COLUMNS}
    sizes = {name: max(width(line) for cell in cells[name] for line in cell) for name in COLUMNS}
    groups: list[list[str]] = [["run"]]
    for name in COLUMNS[1:]:
        if len(groups[-1]) > 1 and sum(sizes[other] + 2 for other in groups[-1]) + sizes[name] > columns:
            groups.append(["run"])
        groups[-1].append(name)
    return [[joined([cells[n][i] for n in group], group, sizes) for i in range(len(entries) + 1)] for group in groups]


def in_one_line(text: str) -> str:
    """Return a text from a run's files, or a folder's name, without what would move the cursor."""
    return visible(text).replace("\n", "\\n").replace("\t", " ")


def cut(name: str, text: str, most: int) -> list[str]:
    """Return the lines of an entry."""
    return wrapped(text, most, indent="") if name in FLEXIBLE else [text]


def joined(cells: list[list[str]], names: list[str], sizes: dict[str, int]) -> list[str]:
    """Return the lines of a row. cells: the lines of each entry; sizes: the columns of each of `names`."""
    lines = []
    for i in range(max(map(len, cells))):
        pairs = zip(cells, names, strict=True)
        texts = [padded(cell[i] if i < len(cell) else "", sizes[n], right=n in NUMBERS) for cell, n in pairs]
        lines.append("  ".join(texts).rstrip())
    return lines


def print_runs(top: Path, say: Callable[[str], None]) -> int:
    """Print the list of the runs in and below a folder; return 0. Raise ConfigError if there is none."""
    if not os.path.isdir(top):  # Path.is_dir raises for long names
        raise ConfigError(
            f"--runs: expected a folder, got {top}, which {'is a file' if os.path.exists(top) else 'is not there'}"
        )
    runs = [read_run(folder) for folder in find_runs(top, say)]
    if not runs:
        raise ConfigError(f"--runs: no run in {top} or below it: expected a folder with {CONFIG} and {METRICS}")
    print(runs_table(runs, shutil.get_terminal_size().columns))
    return 0
