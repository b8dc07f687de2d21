"""The rows of an untied input embedding in main memory, from where a GPU reads those of its tokens.

A step reads one row per token (8 kB of Llama-3.1-8B, whose embedding takes 0.98 GiB), so the bus to main memory is fast
enough. The embedding keeps its class and its place in the model, and its weight stays a tensor of the GPU whose memory
is pinned main memory: CUDA lets kernels read such memory at the same address. So a lookup works as before, within a CUDA
graph too, where the tokens of generation are known to the GPU alone, and gives the same numbers.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.accelerate
import transformers.modeling_utils
from torch import nn
from transformers import PretrainedConfig

from config import ConfigError
from fast_path.expert_store import pinned as registered


def rows_name(model: nn.Module) -> str:
    """Return the name of the weight whose rows can wait in main memory; "" if the head shares it and reads all of it."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is table.weight or not isinstance(table, nn.Embedding):
        return ""
    return next(f"{name}.weight" for name, module in model.named_modules() if module is table)


def rows_name_of(kind: Any, config: PretrainedConfig, trust_remote_code: bool) -> str:
    """Return `rows_name` of a model that is not loaded yet. kind: its auto class."""
    with torch.device("meta"):
        return rows_name(kind.from_config(config, trust_remote_code=trust_remote_code))


@contextlib.contextmanager
def loading_to_main_memory(name: str) -> Iterator[None]:
    """Let transformers' `from_pretrained` leave the weight of this name in main memory while the context is open.

    A device_map that says so would wrap the model in accelerate's hooks, and bitsandbytes refuses it. name: "" for none.
    """
    users = transformers.integrations.accelerate, transformers.modeling_utils
    before = users[0].expand_device_map

    def expand_device_map(device_map, names):
        return before(device_map, names) | {each: "cpu" for each in names if each == name}

    try:
        for user in users:
            user.expand_device_map = expand_device_map
        yield
    finally:
        for user in users:
            user.expand_device_map = before


def keep_rows_in_main_memory(model: nn.Module, device: torch.device) -> None:
    """Let the device read the rows of the embedding from main memory, where they are copied to."""
    table = model.get_input_embeddings()
    weight = table.weight.detach()
    content = weight.contiguous().flatten().view(torch.uint8)
    rows = as_tensor_of(pinned_copy(content, device), device).view(weight.dtype).view(weight.shape)
    ends = torch.tensor([0, len(weight) - 1])
    if not torch.equal(F.embedding(ends.to(device), rows).cpu(), weight[ends.to(weight.device)].cpu()):
        raise ConfigError(
            "performance.auto_fit: this GPU does not read the input embedding from main memory, which the plan needs; "
            "`--auto_fit false` keeps it on the GPU"
        )
    table.weight = nn.Parameter(rows, requires_grad=False)


def pinned_copy(content: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of bytes in main memory that the device can read; raise ConfigError if there is no room for it."""
    try:
        if device.type != "cuda":
            return content.cpu().clone()
        # On Windows a kernel may not read what was registered by the address that the CPU has for it. torch's own pinned
        # memory it may; it takes up to twice as much, since torch rounds sizes up to a power of two.
        windows = sys.platform == "win32"
        buffer = torch.empty_like(content, device="cpu", pin_memory=True) if windows else registered(content.numel())
        return buffer.copy_(content)
    except RuntimeError as error:
        size = f"{content.numel() / 2**30:.2f} GiB"
        raise ConfigError(
            f"performance.auto_fit: the input embedding ({size}) does not fit into pinned main memory "
            f"({' '.join(str(error).split())[:120]}); `--auto_fit false` keeps it on the GPU"
        ) from None


class _Memory:
    """Bytes at an address, as torch takes them from other libraries: version 3 of numba's CUDA array interface."""

    def __init__(self, buffer: torch.Tensor):
        self.buffer = buffer  # torch keeps this object, and so the memory, as long as the tensor lives
        self.__cuda_array_interface__ = {
            "shape": (buffer.numel(),), "typestr": "|u1", "data": (buffer.data_ptr(), False), "version": 3,
        }  # fmt: skip


def as_tensor_of(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return pinned bytes as a tensor of the device, without a copy. buffer: uint8, of one dimension."""
    return torch.as_tensor(_Memory(buffer), device=device) if device.type == "cuda" else buffer
