"""Runs side by side: a table of what differs and what came out, and a picture of their curves."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import LEAVES, ConfigError, LoraSettings, load_config, shown
from toolkit.checkpoints import refusing
from toolkit.curves import plot_comparison
from toolkit.earlier_run import checkpoints, settings, step_of
from toolkit.locks import exclusive, lock_of
from toolkit.runs import check_rows, out_of_patience, planned_steps, shortest_endings
from toolkit.startup import visible
from toolkit.text_width import for_stdout, padded, start_of, width, wrapped

# Lists of target modules that have a name.
TARGETS = {
    "all seven": set(LoraSettings().target_modules),
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "MLP": {"gate_proj", "up_proj", "down_proj"},
}
SCORES = ("exact match", "ROUGE-L", "BLEU")  # rows of the table where a run has them
PICTURES = (".png", ".svg", ".pdf", ".jpg")
NARROWEST = 12  # columns of a run in the table; the runs that do not fit stand below
LABEL = 100  # columns of a run in the picture's legend
# Settings that change neither what is learned nor which adapter is kept: the table has them, the picture's legend not.
UNSEEN: tuple[str, ...] = ("performance.", "generation.", "training.logging_steps", "training.save_")
UNSEEN += ("training.resume", "training.report_to", "training.gradient_checkpointing")
SAME_LOSS = 2e-3  # relative: the same base on the same data, computed in another number format or on another device

# ------------------------------------------------------------------------------------------------ one run


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a run left in its folder; rows are those of metrics.jsonl."""

    name: str
    settings: dict[str, Any]
    rows: list[dict]
    parameters: int
    adapter_bytes: int
    answers: dict[str, float] = dataclasses.field(default_factory=dict)  # the adapter's scores of --evaluate --generate
    step: int = 0  # the last one that was made
    total: int | None = None  # the steps that the run was to have, if it has not finished; 0: unknown

    @property
    def unfinished(self) -> str:
        """How far an unfinished run is, as text; empty for a finished one."""
        return "" if self.total is None else f"step {self.step}" + (f" of {self.total}" if self.total else "")

    @property
    def evaluated(self) -> bool:
        """Whether there was an evaluation after the first step; without held-out rows there never is one."""
        steps = [row["step"] for row in self.rows if "eval_loss" in row]
        return not steps or max(steps) > 0

    @property
    def base_loss(self) -> float | None:
        """The validation loss before the first step, which is the base's; a run from an adapter notes that of the base."""
        first = next((row for row in self.rows if row["step"] == 0 and "eval_loss" in row), {})
        return first.get("base_loss", first.get("eval_loss"))

    def quantities(self) -> dict[str, str]:
        """Return the table's entries for this run besides its settings."""
        steps, evaluations = ([row for row in self.rows if key in row] for key in ("tokens", "eval_loss"))
        done = np.diff([row["tokens"] for row in steps], prepend=0)
        # Runs from before 2026-11-29 have one speed, that of the learned tokens.
        learned = [row.get("learned_tokens_per_second", row["tokens_per_second"]) for row in steps]
        times = [tokens / speed for tokens, speed in zip(done, learned, strict=True)]
        computed = sum(row["tokens_per_second"] * time for row, time in zip(steps, times, strict=True))
        best = min(evaluations, key=lambda row: row["eval_loss"], default=None)
        return {
            "trainable parameters": f"{self.parameters:,}",
            "adapter": f"{self.adapter_bytes / 1e6:,.1f} MB",
            "steps": f"{self.step:,}" + (f" of {self.total:,}" if self.total else ""),
            "base loss": "-" if self.base_loss is None else f"{self.base_loss:.4f}",
            "validation loss": f"{best['eval_loss']:.4f}" if best else "-",
            "best step": f"{best['step']:,}" if best else "-",
            "perplexity": f"{best['perplexity']:.3f}" if best else "-",
            "tokens/s": f"{computed / sum(times):,.0f}" if times else "-",
            "peak GiB": f"{max((row['peak_gib'] for row in steps), default=0):.2f}",
            "time": f"{sum(times) / 60:,.1f} min",
        } | {name: f"{value:.2f}" for name, value in self.answers.items()}


def read_run(folder: Path) -> RunSummary:
    """Return the summary of a run's folder; raises ConfigError where it holds no run.

    Of a run that has not finished, the adapter is that of its last checkpoint.
    """
    # Path.is_file raises for long names
    unfinished = [] if os.path.isfile(folder / "adapter_model.safetensors") else checkpoints(folder)[:1]
    file = (unfinished or [folder])[0] / "adapter_model.safetensors"
    for path in (folder / "config.yaml", folder / "metrics.jsonl", file):
        if not os.path.isfile(path):
            raise ConfigError(f"--compare: expected folders of runs, got {folder}, which has no {path.name}")
    with refusing(f"--compare: cannot read {folder}", ValueError, OSError, SafetensorError, RecursionError):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        check_rows(rows)
        adapter = load_file(file)
    if not rows:
        raise ConfigError(f"--compare: expected logged steps, got none in {folder / 'metrics.jsonl'}")
    parameters = sum(tensor.numel() for tensor in adapter.values())
    own = settings(load_config(folder / "config.yaml"))
    step = max([rows[-1]["step"], *(step_of(path) for path in checkpoints(folder)[:1])])
    total = planned_steps(folder, own)
    done = not unfinished and (step >= total or out_of_patience(rows, own["training.early_stopping_patience"]))
    scores = answer_scores(folder / "evaluation.json")
    return RunSummary(str(folder), own, rows, parameters, file.stat().st_size, scores, step, None if done else total)


def answer_scores(path: Path) -> dict[str, float]:
    """Return the scores of the adapter's answers in an evaluation.json; {} where there are none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))["answers"]["adapter"]
        return {name: float(found[name]) for name in SCORES if name in found}
    return {}


# ------------------------------------------------------------------------------------------------ what differs


def differing(runs: list[RunSummary]) -> list[str]:
    """Return the names of the settings in which the runs differ."""
    keys = [key for key in runs[0].settings if len({json.dumps(run.settings[key]) for run in runs}) > 1]
    return [key for key in keys if key != "training.output_dir"]


def short_name(key: str, run: RunSummary) -> str:
    """Return a setting's name as its shortest flag has it: without the section where no other section has this name."""
    name = key.rpartition(".")[2]
    return name if sum(other.endswith(f".{name}") for other in run.settings) == 1 else key


def without_common_folders(paths: list[str]) -> list[str]:
    """Return paths without the folders that all of them begin with."""
    parents = [os.path.dirname(path) for path in paths]
    if not all(parents) or len({os.path.isabs(path) for path in paths}) > 1:
        return paths
    try:
        common = os.path.commonpath(parents)
    except ValueError:  # on two drives of Windows
        return paths
    return [os.path.relpath(path, common) for path in paths] if common else paths


def shown_values(key: str, runs: list[RunSummary]) -> list[str]:
    """Return a setting of each run as text, no longer than what differs needs."""
    values = [run.settings[key] for run in runs]
    if key == "lora.target_modules":
        return [shown_targets(value) for value in values]
    if LEAVES[key].field.metadata["path"] and all(isinstance(value, str) for value in values):
        return shortest_endings(values)
    return [shown(value) for value in values]


def shown_targets(targets: list[str] | str) -> str:
    """Return a list of target modules by its name, or without the ending that all of them have."""
    if isinstance(targets, str):
        return targets
    named = next((name for name, members in TARGETS.items() if members == set(targets)), None)
    return named or ", ".join(target.removesuffix("_proj") for target in targets)


def warnings(runs: list[RunSummary], keys: list[str]) -> list[str]:
    """Return lines that say why the losses of these runs cannot be compared, if there is a reason. keys: what differs."""
    data = [short_name(key, runs[0]) for key in keys if key.startswith("data.") and key != "data.max_train_samples"]
    found = [
        f"warning: {run.name} is not finished ({run.unfinished}){'' if run.evaluated else ', and its loss is that of step 0'}"
        for run in runs
        if run.unfinished
    ]
    bases = [run.base_loss for run in runs if run.base_loss is not None]
    if data:
        found.append(f"warning: the data differ ({', '.join(data)}), so the losses are not those of the same text")
    same_base = not any(key.startswith(("model.", "quantization.")) for key in keys)
    if bases and same_base and not data and not math.isclose(min(bases), max(bases), rel_tol=SAME_LOSS):
        found.append("warning: the base's loss differs, so the validation data are not the same")
    if "model.name" in keys:
        found.append("warning: the bases differ: losses per token compare only models with the same tokenizer")
    return found


# ------------------------------------------------------------------------------------------------ table and picture


def compare_table(runs: list[RunSummary], columns: int) -> str:
    """Return a table with one column per run: the settings in which the runs differ, then their results.

    columns: of the terminal. Long entries take several lines, and runs for which there is no room stand below.
    """
    keys, results = differing(runs), [run.quantities() for run in runs]
    named = [name for name in results[0] if name not in SCORES]
    named += [name for name in SCORES if any(name in result for result in results)]
    head = ["", *(short_name(key, runs[0]) for key in keys), *named]
    rows = [without_common_folders([run.name for run in runs]), *(shown_values(key, runs) for key in keys)]
    rows += [[result.get(name, "-") for result in results] for name in named]
    first = max(map(width, head)) + 2
    most = max(NARROWEST, (columns - first + 2) // len(runs) - 2)
    cells = [[wrapped(text, most, indent="") for text in row] for row in rows]
    widths = [max(width(line) for row in cells for line in row[i]) for i in range(len(runs))]
    tables, start = [], 0
    while start < len(runs):
        end = start + 1
        while end < len(runs) and first + sum(widths[start : end + 1]) + 2 * (end - start) <= columns:
            end += 1
        parts = zip(head, (row[start:end] for row in cells), strict=True)
        tables.append("\n".join(line for name, row in parts for line in table_row(name, first, row, widths[start:end])))
        start = end
    return "\n\n".join(tables)


def table_row(name: str, first: int, cells: list[list[str]], widths: list[int]) -> list[str]:
    """Return the lines of a table's row. first: the columns of its name. cells: the lines of each entry."""
    lines = []
    for i in range(max(map(len, cells))):
        parts = [
            padded(cell[i] if i < len(cell) else "", size, right=True) for cell, size in zip(cells, widths, strict=True)
        ]
        lines.append((padded("" if i else name, first) + "  ".join(parts)).rstrip())
    return lines


def legend_texts(key: str, runs: list[RunSummary]) -> list[str]:
    """Return a setting of each run as the legend has it; an empty text where it is not set."""
    values = zip(runs, shown_values(key, runs), strict=True)
    texts = [f"{short_name(key, run)} {value}" * (run.settings[key] is not None) for run, value in values]
    if key == "training.max_steps":  # which replaces the epochs
        texts = [text or f"num_epochs {shown(runs[i].settings['training.num_epochs'])}" for i, text in enumerate(texts)]
    return texts


def legend_labels(runs: list[RunSummary]) -> tuple[list[str], str]:
    """Return what the picture calls each run, its name and in what it differs, and what most of the runs share."""
    names, common = without_common_folders([run.name for run in runs]), []
    parts: list[list[str]] = [[] for _ in runs]
    keys = [key.replace("num_epochs", "max_steps") for key in differing(runs) if not key.startswith(UNSEEN)]
    for key in dict.fromkeys(keys):
        texts = legend_texts(key, runs)
        usual, count = Counter(texts).most_common(1)[0]
        if count == len(runs):
            continue
        usual = usual if 2 * count > len(runs) else ""
        common += [usual] if usual else []
        for own, text in zip(parts, texts, strict=True):
            if text != usual:
                own.append(text or f"no {short_name(key, runs[0])}" * bool(usual))
    labels = [
        legend_label(run, name, list(filter(None, own))) for run, name, own in zip(runs, names, parts, strict=True)
    ]
    return labels, f"if nothing else is given: {', '.join(common)}" if common else ""


def legend_label(run: RunSummary, name: str, parts: list[str]) -> str:
    """Return the legend's line of a run. parts: its settings."""
    label, separator = name if width(name) <= LABEL - 30 else f"{start_of(name, LABEL - 32)} …", ": "
    label += f" (not finished: {run.unfinished})" if run.unfinished else ""
    for part in parts:
        if width(label + separator + part) > LABEL - 3:
            return f"{label}, …"
        label, separator = label + separator + part, ", "
    return label


def compare_runs(folders: list[str], output: str) -> int:
    """Print the table of the runs in these folders and draw their curves; return 0."""
    if Path(output).suffix.lower() not in PICTURES:
        raise ConfigError(f"--output: expected a picture ({', '.join(PICTURES)}), got {output}")
    if len(folders) < 2:
        raise ConfigError(f"--compare: expected two folders or more, got {folders[0]}")
    runs = [read_run(Path(folder)) for folder in folders]
    print(visible(compare_table(runs, shutil.get_terminal_size().columns)))
    for line in warnings(runs, differing(runs)):
        print(for_stdout(visible(line)))
    busy = f"--output: another command is writing {output}"
    with refusing(f"--output: cannot write {output}", OSError), exclusive(lock_of(Path(output)), busy):
        labels, title = legend_labels(runs)
        plot_comparison(labels, [run.rows for run in runs], Path(output), title)
    print(visible(f"curves are in {output}"))
    return 0
