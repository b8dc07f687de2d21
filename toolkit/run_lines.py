"""The lines in which a training run says what it does. Each fits 80 columns in a usual run."""

import math
import shlex
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from config import Config, counted, flatten
from fast_path.loss import perplexity
from toolkit.checkpoints import Progress
from toolkit.data_blocks import Blocks, show_block
from toolkit.data_sources import by_source
from toolkit.evaluation import comparison, difference_line, mean_loss
from toolkit.file_lines import some
from toolkit.memory_plan import GIB, MemoryPlan

FEW_STEPS = 20  # of a run whose epochs have at most FEW_PER_EPOCH: a warm-up and a few updates teach a model little
FEW_PER_EPOCH = 3


def data_lines(
    blocks: dict[str, Blocks | None],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    sequences_per_step: int,
) -> list[str]:
    """Return lines about the blocks and the optimizer steps that they make, with and without packing.

    blocks: the parts train and validation. steps: of the whole run.
    """
    part, held = blocks["train"], blocks["validation"]
    per_epoch, rest = math.ceil(len(part) / sequences_per_step), len(part) % sequences_per_step
    last = f", the last of {rest}" if rest else ""
    unpacked = f" ({math.ceil(part.rows / sequences_per_step):,} without packing)" if config.data.packing else ""
    remedy = "more epochs, or fewer sequences per step, help"
    if config.training.max_steps is not None:  # which counts, whatever the epochs
        remedy = "training.max_steps ends the run there"
    few = f"steps: {steps} in all learn little: {remedy}"
    held_out = f"{counted(held.tokens, 'token')} in {counted(len(held), 'block')}" if held else "nothing"
    return [
        f"data: {counted(part.rows, 'row')}, {counted(part.documents, 'document')}, {counted(part.tokens, 'token')} in "
        f"{counted(len(part), 'block')} of {part.length}",
        f"data: held out: {held_out}",
        f"steps: {steps:,} of {counted(sequences_per_step, 'sequence')}; {per_epoch:,} per epoch{last}{unpacked}",
        *([few] if steps < FEW_STEPS and per_epoch <= FEW_PER_EPOCH else []),
        *(f"data: {line}" for line in (f"read as {part.source}", *part.notes, *(held.notes if held else ()))),
        *some(
            [f"first block{of}: {show_block(own[0], tokenizer, 64)}" for of, own in named_parts(part)], "more sources"
        ),
    ]


def resume_lines(folder: Path, step: int, total_steps: int, before: dict, config: Config) -> list[str]:
    """Return lines about a run that continues. folder: the checkpoint, at this step. before: its settings."""
    names = ("training.num_epochs", "training.max_steps")
    start = f"resuming from {folder} at step {step}"
    if step >= total_steps:
        asked = names[config.training.max_steps is not None]
        return [start, f"nothing left to train: {asked} asks for {counted(total_steps, 'step')}"]
    now = flatten(config)
    changed = any(before.get(name) != now[name] for name in names)
    rate = f"from here on the learning rate follows the schedule of {counted(total_steps, 'step')}"
    return [f"{start} of {total_steps}", *([rate] if changed else [])]


def named_parts(blocks: Blocks) -> list[tuple[str, Any]]:
    """Return the blocks of each source, with ` of NAME` if there are several."""
    return [(f" of {name}", part) for name, part, _ in by_source(blocks)] or [("", blocks)]


def step_line(row: dict, total_steps: int) -> str:
    """Return a logged row of metrics as text; its key names and more numbers are in metrics.jsonl.

    Where more than one token in ten is only read, the speed of the learned ones stands there instead of the
    learning rate, so that the line fits.
    """
    speed, learned = row["tokens_per_second"], row["learned_tokens_per_second"]
    all_learned = learned > 0.9 * speed
    rate = [f"lr {row['learning_rate']:.2e}"] if all_learned else []
    norm = math.inf if row["grad_norm"] is None else row["grad_norm"]
    speeds = f"{speed:,.0f} tokens/s" + ("" if all_learned else f" ({learned:,.0f} learned)")
    parts = [f"step {row['step']}/{total_steps}", f"loss {row['loss']:.4f}", *rate, f"grad norm {norm:.3f}", speeds]
    return " | ".join(parts)


def end_lines(
    progress: Progress, held: Blocks | None, sums: dict[str, torch.Tensor], peak: float, plan: MemoryPlan
) -> list[str]:
    """Return lines about what a finished run has reached and used.

    held: the validation blocks. sums: block_losses of the base, of the adapter that the run started from, if any, and of
    the best one. peak: in GiB.
    """
    lines = []
    if progress.evaluations:
        before, after = progress.evaluations[0]["perplexity"], perplexity(progress.best_loss)
        best, first = f"step {progress.best_step}, the best by validation loss", f"{before:.2f} before"
        if "start" in sums:
            first = f"{perplexity(mean_loss(sums['base'])):.2f} of the base, {before:.2f} at the start"
        lines.append(f"perplexity {first}, {after:.2f} after ({best})")
    for other in ("base", "start"):
        if held is not None and sums.keys() >= {other, "adapter"}:
            pair = {"base": sums[other], "adapter": sums["adapter"]}
            lines.append(difference_line(comparison(held.dataset, held, None, pair), other))
    each = []
    for source, _, own in by_source(held) if {"base", "adapter"} <= sums.keys() else ():
        before, after = (mean_loss(sums[name][own]) for name in ("base", "adapter"))
        each.append(f"{source}: loss {before:.4f} of the base, {after:.4f} after")
    lines += some(each, "more sources; --evaluate writes the loss of each")
    planned = f" | planned {plan.reserved / GIB:.2f} for {plan.shape}" if plan.parts else ""
    return [*lines, f"peak memory {peak:.2f} GiB{planned}"]


def next_command(output_dir: Path, source: str) -> str:
    """Return a line with the command that talks to the adapter. source: how the rows of training were read."""
    raw = " --raw" if source.startswith("text") else ""  # running text has no turns, so a prompt is continued as it is
    return f"try it: python inference_example.py --adapter {shlex.quote(str(output_dir))}{raw}"
