"""How good an adapter is: losses on blocks, the adapter beside the base, finished runs side by side, and both plots."""

import contextlib
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
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from config import Config, ConfigError, counted, load_config
from fast_path.choice import choose_fast_path
from fast_path.dropout import DropoutClock
from fast_path.layers import fuse
from fast_path.loss import CausalLMLoss, Objective, default_logit_chunk, kernel_chunk_loss, perplexity
from fast_path.micro_step import Learner, let_go
from quantization_utils import compute_dtype_of
from toolkit.checkpoints import refusing, write_atomically, write_picture
from toolkit.data_blocks import Blocks, batches
from toolkit.earlier_run import settings
from toolkit.locks import exclusive, lock_of
from toolkit.memory import free_bytes
from toolkit.startup import visible

# ------------------------------------------------------------------------------------------------ losses on blocks


@torch.no_grad()
def block_losses(
    sums_of: Callable, blocks: Blocks, accelerator: Accelerator, micro_batch: int, pad: int
) -> torch.Tensor:
    """Return the summed loss and the supervised tokens of every block, fp64 [blocks, 2].

    sums_of: an Objective's `sequence_sums` or a captured graph of it, whose model is in eval mode. pad: the token that
    fills short rows.
    """
    sums = torch.zeros(len(blocks), 2, dtype=torch.float64, device=accelerator.device)
    mine = np.arange(accelerator.process_index, len(blocks), accelerator.num_processes)
    hidden = not (accelerator.is_main_process and sys.stderr.isatty())
    count = math.ceil(len(mine) / micro_batch)
    todo = batches(blocks, mine, micro_batch, pad, accelerator.device)
    losses, tokens = [], []  # kept apart until the end: the GPU never waits for the next batch
    for batch, weights, _ in tqdm(todo, "evaluating", count, leave=False, disable=hidden):
        losses.append(sums_of(**batch)[: len(weights)].double())
        tokens.append(weights)
    if losses:  # there may be fewer blocks than processes
        sums[mine] = torch.stack([torch.cat(losses), torch.cat(tokens).to(sums)], 1)
    return accelerator.reduce(sums, "sum") if accelerator.num_processes > 1 else sums


def halved(micro_batch: int, say: Callable[[str], None]) -> int:
    """Return half of a micro-batch that ran out of GPU memory, say so, and let go of what nothing needs any more."""
    smaller = max(1, micro_batch // 2)
    say(f"an evaluation ran out of GPU memory; repeating it with {counted(smaller, 'sequence')} at a time")
    let_go()
    return smaller


def losses_that_fit(
    sums_of: Callable, blocks: Blocks, accelerator: Accelerator, micro_batch: int, pad: int, say: Callable[[str], None]
) -> torch.Tensor:
    """Return block_losses on the CPU, computed with half the micro-batch as often as GPU memory runs out."""
    while True:
        try:
            return block_losses(sums_of, blocks, accelerator, micro_batch, pad).cpu()
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
        micro_batch = halved(micro_batch, say)


def evaluate_in_memory(
    learner: Learner, blocks: Blocks, accelerator: Accelerator, micro_batch: int, pad: int, say: Callable[[str], None]
) -> torch.Tensor:
    """Return block_losses of the model that is being trained, on the CPU, and leave the model in eval mode.

    Where GPU memory runs out, the evaluation is repeated without its CUDA graph, which is freed. The micro-batch of
    training stays as it is.
    """
    learner.model.eval()
    if learner.fast.cuda_graphs:
        with contextlib.suppress(torch.OutOfMemoryError):
            return block_losses(learner.evaluation_sums, blocks, accelerator, micro_batch, pad).cpu()
        learner.captured_evaluation = None
        micro_batch = halved(micro_batch, say)
    return losses_that_fit(learner.objective.sequence_sums, blocks, accelerator, micro_batch, pad, say)


def mean_loss(sums: torch.Tensor) -> float:
    """Return the mean loss of all supervised tokens. sums: block_losses."""
    return Objective.mean(*sums.sum(0).tolist())


# ------------------------------------------------------------------------------------------------ base and adapter

TOGETHER = 8192  # tokens of a micro-batch: the default shape of training on a large GPU; fewer where memory runs out


def objective_of(model: PreTrainedModel | PeftModel, config: Config) -> CausalLMLoss:
    """Return the loss of a model in eval mode, computed as training's own evaluation computes it on this device."""
    objective = CausalLMLoss(model.eval(), compute_dtype_of(config))
    if model.device.type != "cuda":
        return objective
    free = free_bytes(model.device, config.performance.memory_limit_gib)
    objective.logit_chunk = default_logit_chunk(len(objective.head.weight), free)
    if isinstance(model, PeftModel):
        fast = choose_fast_path(config.performance, model, objective.dtype, model.device)
        if fast.fused_lora:
            fuse(model, DropoutClock(0, model.device), 0.0, fast.kernels)
        if fast.fused_lora and fast.kernels:
            objective.chunk_loss = kernel_chunk_loss
    return objective


def evaluate_base_and_adapter(
    model: PreTrainedModel | PeftModel,
    config: Config,
    blocks: Blocks,
    accelerator: Accelerator,
    pad: int,
    say: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Return block_losses of the base and, of a model with an adapter, of both, and say each loss and perplexity."""
    sums_of, micro_batch = objective_of(model, config).sequence_sums, max(1, TOGETHER // config.data.max_length)
    names = ["base", "adapter"] if isinstance(model, PeftModel) else ["base"]
    sums = {}
    for name in names:
        with contextlib.nullcontext() if name == names[-1] else model.disable_adapter():
            sums[name] = losses_that_fit(sums_of, blocks, accelerator, micro_batch, pad, say)
        mean = mean_loss(sums[name])
        say(f"{name:<8} loss {mean:.4f} | perplexity {perplexity(mean):.3f} | {counted(blocks.supervised, 'token')}")
    return sums


def loss_difference(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float | None]:
    """Return how much the mean loss changed, and the standard error of that change.

    before, after: block_losses of the same blocks. The standard error is that of a ratio estimator (Cochran, Sampling
    Techniques, 1977, section 2.11) over the blocks: whatever makes the text of one hard counts before and after and
    cancels. It is None for a single block, and where the two were not summed by the same parts: checkpoints from before
    2026-11-29 hold sums of micro-batches.
    """
    mean = mean_loss(after) - mean_loss(before)
    tokens, change = before[:, 1], after[:, 0] - before[:, 0]
    count = int((tokens > 0).sum())
    if count < 2 or not torch.equal(tokens, after[:, 1]):
        return mean, None
    spread = (change - mean * tokens).square().sum() * count / (count - 1)
    return mean, (spread.sqrt() / tokens.sum()).item()


def comparison(dataset: str, blocks: Blocks, stride: int | None, sums: dict[str, torch.Tensor]) -> dict:
    """Return the content of evaluation.json: loss and perplexity of the base and, if there is one, of the adapter, with
    the difference.

    sums: block_losses by name.
    """
    result = {"dataset": dataset, "tokens": blocks.supervised, "blocks": len(blocks), "stride": stride}
    for name, found in sums.items():
        mean = mean_loss(found)
        result[name] = {"loss": mean, "perplexity": perplexity(mean)}
    if len(sums) == 2:
        change, error = loss_difference(sums["base"], sums["adapter"])
        result["difference"] = {"loss": change, "standard_error": error}
    return result


def difference_line(result: dict) -> str:
    """Return a comparison's difference as text."""
    change, error = result["difference"].values()
    sure = "" if error is None else f" ± {error:.4f} (standard error over {counted(result['blocks'], 'block')})"
    return f"adapter - base: loss {change:+.4f}{sure}"


def save_evaluation(result: dict, folder: Path) -> None:
    """Write evaluation.json into an adapter's folder."""
    path = folder / "evaluation.json"
    with exclusive(lock_of(path), f"--adapter: another command is writing {path}"):
        write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())


# ------------------------------------------------------------------------------------------------ comparing runs


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a finished run left in its folder; rows are those of metrics.jsonl."""

    name: str
    settings: dict[str, Any]
    rows: list[dict]
    parameters: int
    adapter_bytes: int

    def quantities(self) -> dict[str, str]:
        """Return the table's entries for this run besides its settings."""
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
    """Return the summary of a run's folder; raises ConfigError where it holds no finished run."""
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
    """Return a table with one column per run: the settings in which the runs differ, then their results."""
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
    """Draw the curves of several runs into one picture: training loss on the left, validation loss on the right."""
    from matplotlib.figure import Figure  # opens no window, keeps no global state; takes a second to import

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
    print(visible(compare_table(runs)))
    busy = f"--output: another command is writing {output}"
    with refusing(f"--output: cannot write {output}", OSError), exclusive(lock_of(Path(output)), busy):
        plot_comparison(runs, Path(output))
    print(visible(f"curves are in {output}"))
    return 0


# ------------------------------------------------------------------------------------------------ the curves of a run


def plot_training_curves(history: list[dict], path: str | Path) -> None:
    """Draw one run: training and validation loss on the left, the learning rate on the right.

    history: rows of metrics.jsonl. path: of the PNG file.
    """
    from matplotlib.figure import Figure  # opens no window, keeps no global state; takes a second to import

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
    write_picture(figure, Path(path))
