"""What an adapter is worth: losses on blocks, the base's beside the adapter's, and finished runs beside each other."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm

from config import ConfigError, load_config
from toolkit import checkpoints
from toolkit.checkpoints import refusing, write_picture
from toolkit.data_blocks import Blocks, batches
from toolkit.earlier_run import settings

# ------------------------------------------------------------------------------------------------ losses on blocks


@torch.no_grad()
def block_losses(loss: Callable, blocks: Blocks, accelerator: Accelerator, micro_batch: int, pad: int) -> torch.Tensor:
    """Return the summed loss and the supervised tokens of every micro-batch, fp64 [blocks, 2], in the row of its first
    block.

    loss: a SummedLoss or a captured graph of it, of a model in eval mode.
    """
    sums = torch.zeros(len(blocks), 2, dtype=torch.float64, device=accelerator.device)
    mine = np.arange(accelerator.process_index, len(blocks), accelerator.num_processes)
    hidden = not (accelerator.is_main_process and sys.stderr.isatty())
    count = math.ceil(len(mine) / micro_batch)
    todo = batches(blocks, mine, micro_batch, pad, accelerator.device)
    for batch, tokens, positions in tqdm(todo, "evaluating", count, leave=False, disable=hidden):
        sums[mine[positions[0]], 0] = loss(**batch)
        sums[mine[positions[0]], 1] = tokens
    return accelerator.reduce(sums, "sum") if accelerator.num_processes > 1 else sums


def mean_loss(sums: torch.Tensor) -> float:
    """Return the mean loss of all supervised tokens. sums: block_losses."""
    loss, tokens = sums.sum(0).tolist()
    return loss / tokens


def loss_difference(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float | None]:
    """Return how much the mean loss changed and the standard error of that, None of a single micro-batch.

    before, after: block_losses of the same blocks; where memory ran out between them, in other micro-batches, which
    leaves no standard error either. It is a ratio estimator's (Cochran, Sampling Techniques, 1977, section 2.11): what
    blocks have in common, such as a hard text, cancels within each.
    """
    mean = mean_loss(after) - mean_loss(before)
    tokens, change = before[:, 1], after[:, 0] - before[:, 0]
    count = int((tokens > 0).sum())
    if count < 2 or not torch.equal(tokens, after[:, 1]):
        return mean, None
    spread = (change - mean * tokens).square().sum() * count / (count - 1)
    return mean, (spread.sqrt() / tokens.sum()).item()


def comparison(dataset: str, blocks: Blocks, stride: int | None, sums: dict[str, torch.Tensor]) -> dict:
    """Return what evaluation.json says: loss and perplexity of the base and, if it is there, of the adapter, and their
    difference. sums: block_losses by name.
    """
    result = {"dataset": dataset, "tokens": blocks.supervised, "blocks": len(blocks), "stride": stride}
    for name, found in sums.items():
        result[name] = {"loss": mean_loss(found), "perplexity": perplexity(mean_loss(found))}
    if len(sums) == 2:
        change, error = loss_difference(sums["base"], sums["adapter"])
        parts = int((sums["base"][:, 1] > 0).sum())  # micro-batches
        result["difference"] = {"loss": change, "standard_error": error, "parts": parts}
    return result


def difference_line(result: dict) -> str:
    """Return a comparison's difference as text."""
    change, error, parts = result["difference"].values()
    kind = "blocks" if parts == result["blocks"] else "micro-batches"
    sure = "" if error is None else f" ± {error:.4f} (standard error over {parts:,} {kind})"
    return f"adapter - base: {change:+.4f}{sure}"


def perplexity(loss: float) -> float:
    """Return exp(loss), held below infinity, which JSON cannot say."""
    return math.exp(min(loss, 700.0))


# ------------------------------------------------------------------------------------------------ comparing runs


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a finished run left in its folder: its settings, the rows of metrics.jsonl, its adapter's parameters and
    bytes.
    """

    name: str
    settings: dict[str, Any]
    rows: list[dict]
    parameters: int
    adapter_bytes: int

    def quantities(self) -> dict[str, str]:
        """Return what the table says of the run besides its settings."""
        steps, evaluations = ([row for row in self.rows if key in row] for key in ("tokens", "eval_loss"))
        done = np.diff([row["tokens"] for row in steps], prepend=0)
        seconds = sum(tokens / row["tokens_per_second"] for tokens, row in zip(done, steps, strict=True))
        best = min(evaluations, key=lambda row: row["eval_loss"], default=None)
        return {
            "trainable parameters": f"{self.parameters:,}",
            "adapter": f"{self.adapter_bytes / 1e6:,.1f} MB",
            "steps": f"{self.rows[-1]['step']:,}",
            "validation loss": f"{best['eval_loss']:.4f} (step {best['step']})" if best else "-",
            "perplexity": f"{best['perplexity']:.3f}" if best else "-",
            "tokens/s": f"{done.sum() / seconds:,.0f}" if seconds else "-",
            "peak GiB": f"{max((row['peak_gib'] for row in steps), default=0):.2f}",
            "time": f"{seconds / 60:,.1f} min",
        }


def read_run(folder: Path) -> RunSummary:
    """Return the summary of a run's folder; ConfigError where it holds no finished run."""
    for name in ("config.yaml", "metrics.jsonl", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"--compare: expected folders of finished runs, got {folder}, which has no {name}")
    with refusing(f"--compare: cannot read {folder}", ValueError, OSError, SafetensorError):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        adapter = load_file(folder / "adapter_model.safetensors")
    if not rows:
        raise ConfigError(f"--compare: expected logged steps, got none in {folder / 'metrics.jsonl'}")
    parameters = sum(tensor.numel() for tensor in adapter.values())
    size = (folder / "adapter_model.safetensors").stat().st_size
    return RunSummary(str(folder), settings(load_config(folder / "config.yaml")), rows, parameters, size)


def compare_table(runs: list[RunSummary]) -> str:
    """Return a table, a column a run: the settings in which they differ, then what came of them."""
    keys = [key for key in runs[0].settings if len({json.dumps(run.settings[key]) for run in runs}) > 1]
    keys = [key for key in keys if key != "training.output_dir"]
    results = [run.quantities() for run in runs]
    columns = [["", *keys, *results[0]]]
    for run, result in zip(runs, results, strict=True):
        columns.append([run.name, *(str(run.settings[key]) for key in keys), *result.values()])
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *cells in zip(*columns, strict=True):
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def plot_comparison(runs: list[RunSummary], path: Path) -> None:
    """Write a picture of the runs' curves over each other: training loss on the left, validation loss on the right."""
    from matplotlib.figure import Figure  # no window, no global state; 1 s to import

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, key, title in zip(figure.subplots(1, 2), ("loss", "eval_loss"), ("Training", "Validation"), strict=True):
        for run in runs:
            rows = [row for row in run.rows if key in row]
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            axes.plot(steps, values, marker="o", markersize=3, label=run.name)
        axes.set(xlabel="optimizer step", ylabel="loss per token (nats)", title=title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    write_picture(figure, path)


def compare_runs(folders: list[str], output: str) -> int:
    """Print the table of the runs in these folders and draw their curves; return 0."""
    if len(folders) < 2:
        raise ConfigError(f"--compare: expected two folders or more, got {folders[0]}")
    runs = [read_run(Path(folder)) for folder in folders]
    print(compare_table(runs))
    with refusing(f"--output: cannot write {output}", OSError):
        plot_comparison(runs, Path(output))
    print(f"curves are in {output}")
    return 0


# ------------------------------------------------------------------------------------------------ the curves of a run


def plot_training_curves(history: list[dict], path: str | Path) -> None:
    """Write a picture of the run: training and validation loss on the left, the learning rate on the right.

    history: rows of metrics.jsonl.
    """
    from matplotlib.figure import Figure  # no window, no global state; 1 s to import

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, style in (
        (left, "loss", {"label": "training", "linewidth": 1.2}),
        (left, "eval_loss", {"label": "validation", "marker": "o", "markersize": 4}),
        (right, "learning_rate", {"color": "tab:green", "linewidth": 1.2}),
    ):
        rows = [row for row in history if key in row]
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], **style)
        axes.grid(visible=True, alpha=0.3)
    left.set(xlabel="optimizer step", ylabel="loss per token (nats)", title="Loss")
    left.legend()
    right.set(xlabel="optimizer step", ylabel="learning rate", title="Learning rate")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    checkpoints.write_picture(figure, Path(path))
