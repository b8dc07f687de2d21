"""How good an adapter is: losses on blocks, and the adapter beside the base."""

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
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config import Config, LoraSettings, counted
from fast_path import attention
from fast_path.choice import choose_fast_path
from fast_path.dropout import DropoutClock
from fast_path.layers import fuse
from fast_path.loss import CausalLMLoss, Objective, default_logit_chunk, kernel_chunk_loss, perplexity
from fast_path.micro_step import Learner, let_go
from fast_path.sharding import divide_base, is_divided
from quantization_utils import compute_dtype_of
from toolkit import processes
from toolkit.adapters import load_adapter
from toolkit.answers import answer_held_out, answerable
from toolkit.checkpoints import write_atomically
from toolkit.data_blocks import Blocks, sample_counts
from toolkit.data_sources import by_source, windows_of
from toolkit.file_lines import some
from toolkit.locks import exclusive, lock_of
from toolkit.memory import free_bytes
from toolkit.sharding import cannot_repeat, own_batches

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
    todo = own_batches(blocks, np.arange(len(blocks)), micro_batch, pad, accelerator)
    losses, tokens = [], []  # kept apart until the end: the GPU never waits for the next batch
    with processes.together():  # one that runs out of memory has all of them repeat it
        for batch, weights, _ in tqdm(todo, "evaluating", count, leave=False, disable=hidden):
            losses.append(sums_of(**batch)[: len(weights)].double())
            tokens.append(weights)
        if losses:  # there may be fewer blocks than processes
            sums[mine] = torch.stack([torch.cat(losses), torch.cat(tokens).to(sums)], 1)
        processes.wait_for_gpu()
    return processes.sum_in_place(sums)


def halved(micro_batch: int, say: Callable[[str], None]) -> int:
    """Return half of a micro-batch that ran out of GPU memory, say so, and let go of what nothing needs any more."""
    smaller = max(1, micro_batch // 2)
    say(f"an evaluation ran out of memory; repeating it with {counted(smaller, 'sequence')} at a time")
    let_go()
    return smaller


def losses_that_fit(
    sums_of: Callable, blocks: Blocks, accelerator: Accelerator, micro_batch: int, pad: int, say: Callable[[str], None]
) -> torch.Tensor:
    """Return block_losses on the CPU, computed with half the micro-batch as often as GPU memory runs out."""
    while True:
        try:
            return block_losses(sums_of, blocks, accelerator, micro_batch, pad).cpu()
        except torch.OutOfMemoryError as problem:
            if is_divided():
                raise cannot_repeat(problem) from None
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
    learner.eval()
    if learner.fast.cuda_graphs:
        with contextlib.suppress(torch.OutOfMemoryError):
            return block_losses(learner.evaluation_sums, blocks, accelerator, micro_batch, pad).cpu()
        learner.captured_evaluation = None
        micro_batch = halved(micro_batch, say)
    return losses_that_fit(learner.objective.sequence_sums, blocks, accelerator, micro_batch, pad, say)


def first_sums(
    learner: Learner,
    blocks: Blocks,
    accelerator: Accelerator,
    sums: torch.Tensor,
    lora: LoraSettings,
    pad: int,
    say: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Return block_losses from before the first step by name, and say that of the base.

    sums: of the model as it is, which is the base, or, with lora.init_adapter, the start.
    """
    if lora.init_adapter is None:
        return {"base": sums}
    with learner.model.disable_adapter():
        micro_batch = learner.batch_shape[0]
        base = losses_that_fit(learner.objective.sequence_sums, blocks, accelerator, micro_batch, pad, say)
    mean = mean_loss(base)
    say(f"base: validation loss {mean:.4f}{of_each(blocks, base)} | perplexity {perplexity(mean):.2f}")
    return {"base": base, "start": sums}


def mean_loss(sums: torch.Tensor) -> float:
    """Return the mean loss of all supervised tokens. sums: block_losses."""
    return Objective.mean(*sums.sum(0).tolist())


MOST_NAMED = 8  # sources whose losses a line names; evaluation.json has all


def of_each(blocks: Blocks, sums: torch.Tensor) -> str:
    """Return the loss of each source of a mixture, in brackets; an empty text for one source. sums: block_losses."""
    found = [f"{name} {mean_loss(sums[own]):.4f}" for name, _, own in by_source(blocks)]
    more = [f"and {len(found) - MOST_NAMED} more"] if len(found) > MOST_NAMED else []
    return f" ({', '.join(found[:MOST_NAMED] + more)})" if found else ""


# ------------------------------------------------------------------------------------------------ base and adapter

TOGETHER = 8192  # tokens of a micro-batch: the default shape of training on a large GPU; fewer where memory runs out


def objective_of(model: PreTrainedModel | PeftModel, config: Config) -> CausalLMLoss:
    """Return the loss of a model in eval mode, computed as training's own evaluation computes it on this device."""
    dtype, on_gpu, kernels = compute_dtype_of(config), model.device.type == "cuda", False
    if on_gpu and isinstance(model, PeftModel):
        fast = choose_fast_path(config.performance, model, dtype, model.device)
        if fast.fused_lora:
            fuse(model, DropoutClock(0, model.device), 0.0, fast.kernels)
        kernels = fast.fused_lora and fast.kernels
    objective = CausalLMLoss(divide_base(model).eval(), dtype)
    if on_gpu:
        free = free_bytes(model.device, config.performance.memory_limit_gib)
        objective.logit_chunk = default_logit_chunk(len(objective.head.weight), free)
    if kernels:
        objective.chunk_loss = kernel_chunk_loss
    return objective


@dataclasses.dataclass(frozen=True)
class Task:
    """What --evaluate was asked for.

    adapter: its folder, which gets evaluation.json; None evaluates the base alone. stride: of windows over the whole text;
    None evaluates on the validation blocks. prompts: how many of the held-out ones are answered too.
    """

    adapter: Path | None
    stride: int | None
    prompts: int | None


def evaluate(
    task: Task,
    config: Config,
    base: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    held: Blocks,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> None:
    """Say and write down what the task asks for.

    base: the base alone in a list, which is empty afterwards: answers load a model of their own, and memory never holds
    both. held: the validation blocks.
    """
    parts = answerable(held, say) if task.prompts is not None else None
    blocks: Any = held if task.stride is None else windows_of(held, task.stride)
    model = base.pop()
    live = load_adapter(model, task.adapter) if task.adapter else model
    attention.prepare_attention(model, config.data, sample_counts(blocks), config.model.attn_implementation)
    sums = evaluate_base_and_adapter(live, config, blocks, accelerator, tokenizer.pad_token_id, say)
    del model, live
    result = comparison(held.dataset, blocks, task.stride, sums)
    if task.adapter:
        say(difference_line(result))
    if not accelerator.is_main_process:
        return
    if parts is not None and task.prompts is not None:
        let_go()
        result["answers"] = answer_held_out(config, task.adapter, parts, task.prompts, accelerator.device, say)
    if task.adapter:
        save_evaluation(result, task.adapter)


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
        each = []
        for source, part, own in by_source(blocks):
            mean, size = mean_loss(sums[name][own]), counted(part.supervised, "token")
            each.append(f"{name:<8} loss {mean:.4f} | perplexity {perplexity(mean):.3f} | {size} of {source}")
        for line in some(each, f"more sources{'; evaluation.json has all' if len(names) > 1 else ''}"):
            say(line)
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
    result: dict[str, Any] = {"dataset": dataset, "tokens": blocks.supervised, "blocks": len(blocks), "stride": stride}
    for name, found in sums.items():
        mean = mean_loss(found)
        result[name] = {"loss": mean, "perplexity": perplexity(mean)}
    if len(sums) == 2:
        change, error = loss_difference(sums["base"], sums["adapter"])
        result["difference"] = {"loss": change, "standard_error": error}
    for source, part, own in by_source(blocks):
        means = {name: mean_loss(found[own]) for name, found in sums.items()}
        losses = {name: {"loss": mean, "perplexity": perplexity(mean)} for name, mean in means.items()}
        about = {"tokens": part.supervised, "blocks": len(part)}
        result.setdefault("sources", {})[source] = about | losses
    return result


def difference_line(result: dict, other: str = "base") -> str:
    """Return a comparison's difference as text. other: what the adapter was compared with."""
    change, error = result["difference"].values()
    sure = "" if error is None else f" ± {error:.4f} (standard error over {counted(result['blocks'], 'block')})"
    return f"adapter - {other}: loss {change:+.4f}{sure}"


def save_evaluation(result: dict, folder: Path) -> None:
    """Write evaluation.json into an adapter's folder."""
    path = folder / "evaluation.json"
    with exclusive(lock_of(path), f"--adapter: another command is writing {path}"):
        write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
