"""A base divided among processes, as the commands see it: loading, and equally many passes in each."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import quantization_utils
from config import Config
from fast_path.loss import IGNORED
from fast_path.sharding import is_divided, loading_divided
from toolkit import processes
from toolkit.data_blocks import Blocks, batches


def load_base(
    config: Config, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None, rows_apart: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Do what quantization_utils.load_base does; with performance.shard_base this process keeps its part of the base."""
    with loading_divided(config.performance.shard_base):
        model, tokenizer = quantization_utils.load_base(config, device, tokenizer=tokenizer, rows_apart=rows_apart)
    if config.performance.shard_base:
        processes.tie()
    return model, tokenizer


def cannot_repeat(problem: torch.OutOfMemoryError) -> processes.RankFailed:
    """Return the error of a process that ran out of memory: the others are inside a layer, so nothing can be repeated."""
    said = processes.full_with_others(str(problem).splitlines()[0])
    return processes.RankFailed(f"{processes.name_of(dist.get_rank())} {said}")


def own_batches(
    blocks: Blocks, numbers: np.ndarray, size: int, pad: int, accelerator: Accelerator
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, np.ndarray]]:
    """Yield `batches` of this process's blocks, which are every N-th of `numbers`, with N processes; places in `numbers`.

    The passes of a divided base need all processes. One that has fewer batches than the first one computes a block whose
    labels are all ignored, so that it adds nothing: it has no supervised tokens and no sequences.
    """
    rank, count, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    mine = numbers[rank::count]
    for batch, tokens, places in batches(blocks, mine, size, pad, device):
        yield batch, tokens, rank + count * places
    most, own = (-(-len(part) // size) for part in (numbers[::count], mine))
    for _ in range(most - own if is_divided() else 0):
        for batch, tokens, places in batches(blocks, numbers[:1], 1, pad, device):
            yield batch | {"labels": torch.full_like(batch["labels"], IGNORED)}, tokens[:0], places
