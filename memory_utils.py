"""What a run needs of the GPU's memory: a plan from the model's config.json alone, and what was measured."""

import dataclasses
import sys

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from config import Config, ConfigError
from quantization_utils import LOADING_ERRORS, cannot_load

GIB = 2**30
BLOCK, NESTED_BLOCK = 64, 256  # weights a quantisation constant, constants a second-level constant (QLoRA, section 3)
CONTEXT_BYTES = int(0.5 * GIB)  # CUDA context with cuBLAS; 0.45-0.55 GiB measured on an H100, CUDA 13


# ------------------------------------------------------------------------------------------------ the model's shape


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the plan reads of a model: sizes only, so it comes from config.json."""

    linears: tuple[tuple[str, int, int], ...]  # (name, out_features, in_features) of every layer that is quantised
    other_parameters: int  # embedding, head, norms, biases: they keep the compute dtype
    layers: int
    hidden: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        return sum(out * into for _, out, into in self.linears) + self.other_parameters


def model_shape(model_name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelShape:
    """Return the shape of the model that a hub id or folder names, reading config.json (a few kB) and no weights."""
    try:
        model_config = AutoConfig.from_pretrained(model_name, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise cannot_load(model_name, error) from None
    model.tie_weights()
    head = model.get_output_embeddings()
    linears = tuple(
        (name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    total = sum(p.numel() for p in model.parameters())
    text = model_config.get_text_config()
    return ModelShape(
        linears=linears,
        other_parameters=total - sum(out * into for _, out, into in linears),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
    )


def adapted(shape: ModelShape, targets: tuple[str, ...] | str) -> list[tuple[str, int, int]]:
    """Return the linear layers that get an adapter."""
    if isinstance(targets, str):
        return list(shape.linears)
    return [linear for linear in shape.linears if any(linear[0] == t or linear[0].endswith("." + t) for t in targets)]


# ------------------------------------------------------------------------------------------------ the plan


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def table(self) -> str:
        """Return the plan in GiB, a line a purpose."""
        rows = [f"  {name:<34}{size / GIB:8.3f}" for name, size in self.parts.items()]
        return "\n".join(["memory plan, GiB", *rows, f"  {'total':<34}{self.total / GIB:8.3f}"])


def plan_memory(shape: ModelShape, config: Config, micro_batch: int, checkpointed: int) -> MemoryPlan:
    """Return what training takes of GPU memory with `checkpointed` layers recomputing their activations.

    Weights, adapters, gradients and optimizer states are exact; activations are counted from the shapes of a decoder layer.
    """
    quantization, lora = config.quantization, config.lora
    width = 4 if quantization.compute_dtype == "float32" else 2
    weights = sum(out * into for _, out, into in shape.linears)
    if quantization.load_in_4bit:
        constants = weights / BLOCK * (1 + 4 / NESTED_BLOCK if quantization.use_double_quant else 4)
        base, largest = weights // 2, max(out * into for _, out, into in shape.linears) * width
    else:
        constants, base, largest = 0, weights * width, 0
    chosen = adapted(shape, lora.target_modules)
    adapters = sum(lora.rank * (out + into) for _, out, into in chosen)
    state_bytes = {"paged_adamw_8bit": 2, "adamw_8bit": 2, "paged_adamw_32bit": 8, "adamw_torch": 8}[
        config.training.optim
    ]
    tokens = micro_batch * config.data.max_length
    # What a layer keeps for its backward: the input and output of each linear, plus norms, attention and dropout's copies.
    per_token = sum(out + into for _, out, into in shape.linears) / shape.layers * width
    live = per_token * tokens
    chunk = min(tokens, max(16, 2**26 // shape.vocabulary)) * shape.vocabulary
    parts = {
        "packed weights": base,
        "quantisation constants": int(constants),
        "embedding, head, norms": shape.other_parameters * width,
        "adapters (fp32)": adapters * 4,
        "gradients (fp32)": adapters * 4,
        "optimizer states": adapters * state_bytes,
        "checkpointed hidden states": checkpointed * tokens * shape.hidden * width,
        "one live layer": int(2 * live),
        "layers not checkpointed": int((shape.layers - checkpointed) * 2 * live),
        "dequantised operand": largest,
        "loss chunk": chunk * (4 + width),
        "CUDA context": CONTEXT_BYTES,
    }
    return MemoryPlan(parts)


def plan_for(config: Config) -> tuple[ModelShape, MemoryPlan]:
    """Return the shape of the configured model and the plan of the configured run."""
    shape = model_shape(config.model.name, config.model.revision, config.model.trust_remote_code)
    if not adapted(shape, config.lora.target_modules):
        raise ConfigError(f"lora.target_modules: the model has none of {', '.join(config.lora.target_modules)}")
    wanted = config.training.gradient_checkpointing
    checkpointed = shape.layers if wanted is True or wanted == "auto" else min(int(wanted), shape.layers)  # 1 == True
    return shape, plan_memory(shape, config, config.training.batch_size, checkpointed)


# ------------------------------------------------------------------------------------------------ what was measured


def memory_line(device: torch.device) -> str:
    """Return the tutorial's line about GPU memory, or the process's memory where there is no GPU."""
    if device.type != "cuda":
        return f"Memory: {psutil.Process().memory_info().rss / GIB:.2f} GiB in this process (no GPU)"
    free, _ = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return f"GPU Memory: Allocated={allocated / GIB:.2f}GB | Reserved={reserved / GIB:.2f}GB | Free={free / GIB:.2f}GB"


def peak_gib(device: torch.device) -> float:
    """Return the most memory taken so far, GiB: reserved by the allocator on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (GIB if sys.platform == "darwin" else 2**20)


def cap_memory(device: torch.device, limit_gib: float | None) -> None:
    """Let this process take what is free now, or `limit_gib` with the context: a Windows driver would spill into system memory."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    budget = free if limit_gib is None else min(free, limit_gib * GIB - CONTEXT_BYTES)
    if budget <= 0:
        raise ConfigError(
            f"performance.memory_limit_gib: expected more than the context's {CONTEXT_BYTES / GIB} GiB, got {limit_gib}"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device.index or 0)
