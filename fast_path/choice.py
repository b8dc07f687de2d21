"""Decide which parts of the fast path run on this machine, and say why the others do not."""

import dataclasses

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper

from config import ConfigError, PerformanceConfig
from fast_path import families
from fast_path.experts import one_by_one, products_line
from fast_path.fp8 import refuse
from fast_path.layers import plain_parts
from fast_path.nf4 import HAS_TRITON
from fast_path.packed_weights import fusable
from fast_path.sharding import divided_line, is_divided


@dataclasses.dataclass(frozen=True)
class FastPath:
    """The parts of the fast path that run, and the log line that names them and says why the others do not run."""

    fused_lora: bool
    compile: bool
    cuda_graphs: bool
    kernels: bool  # the operators run Triton kernels instead of torch calls
    line: str
    fp8: bool = False  # the operators multiply in FP8 while they train


def trains_tokens(model: torch.nn.Module) -> bool:
    """Return whether an adapter has rows of the embedding of its own."""
    return any(isinstance(module, TrainableTokensWrapper) for module in model.modules())


def choose_fast_path(
    performance: PerformanceConfig, model: PeftModel, dtype: torch.dtype, device: torch.device, offload: bool = False,
    products: str = "bf16",
) -> FastPath:  # fmt: skip
    """Return which of fused_lora, compile and cuda_graphs run here.

    Raises ConfigError if a setting is `on` and its part cannot run. offload: the inputs of checkpointed layers wait in
    main memory for the backward pass. products: as in quantization.products; fp8 needs the fused operators.
    """
    refuse(products, device, dtype)
    gpu, runs, reasons = device.type == "cuda", {}, {}
    layers = families.decoder_layers(model.get_base_model())
    fusables = any(fusable(module) and hasattr(module, "lora_A") for layer in layers for module in layer.modules())

    def decide(name: str, obstacle: str | None) -> bool:
        wanted = getattr(performance, name)
        if wanted == "on" and obstacle:
            raise ConfigError(f"performance.{name}: cannot be on here: {obstacle}")
        gains = gpu or (products == "fp8" and name == "fused_lora")
        runs[name] = wanted == "on" or (wanted == "auto" and not obstacle and gains)
        if not runs[name]:
            reasons[name] = "off" if wanted == "off" else "no gain on a CPU" if not gpu else obstacle or ""
        return runs[name]

    unfusable = None if fusables else "no plain LoRA adapter on a 4-bit linear"
    fused = decide("fused_lora", unfusable)
    if products == "fp8" and not fused:
        why = unfusable or "performance.fused_lora is off"
        raise ConfigError(f"quantization.products: fp8 needs the fused operators, use bf16: {why}")
    no_triton = gpu and not HAS_TRITON and "Triton is not installed (Windows: pip install triton-windows)"
    compiled = decide("compile", no_triton or (None if fused else "it needs fused_lora (--fused_lora on)"))
    copies = "no graph can hold the copies to main memory" if offload else None
    if trains_tokens(model):
        copies = "the rows of lora.train_tokens are looked up by numbers from the host"
    copies = "no graph can hold the gathering of a divided base" if is_divided(model) else copies
    copies = one_by_one(model.get_base_model(), dtype, device) or copies
    graphs = decide("cuda_graphs", copies if gpu else "there is no CUDA GPU")
    kernels = gpu and HAS_TRITON and dtype is not torch.float32  # not in fp32: tl.dot would round it to tf32
    line = "fast path: " + (", ".join(name for name, on in runs.items() if on) or "none")
    if fused:
        line += "".join(f" | {', '.join(parts)}: {reason}" for reason, parts in plain_parts(model).items())
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, other in reasons.items() if other == reason]
        line += f" ({reason})" if len(names) == len(runs) else f" | without {', '.join(names)}: {reason}"
    if experts := products_line(model.get_base_model(), dtype, device):
        line += f" | {experts}"
    return FastPath(fused, compiled, graphs, kernels, line + divided_line(model), products == "fp8")
