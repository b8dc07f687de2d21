"""What the machine can do: its GPU and processes, its packages, and the installation check."""

import dataclasses
import importlib
import math
import os
import platform
import shutil
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import LoggerType
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from safetensors import SafetensorError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from config import LEAVES, Config, ConfigError, DataConfig, ModelConfig, PerformanceConfig, TrainingConfig
from fast_path.micro_step import let_go
from quantization_utils import bf16_missing, load_base, quiet_libraries, usable_dtype
from toolkit.memory_plan import unplanned
from toolkit.processes import RankFailed, sum_in_place
from toolkit.startup import CANNOT_RUN, announced, import_failures, out_of_memory, reader_gone, report

# ------------------------------------------------------------------------------------------------ the machine


def no_gpu_reason() -> str:
    """Return why torch finds no GPU: it is built without CUDA, or there is no usable GPU or driver."""
    if torch.version.cuda is None and torch.version.hip is None:
        install = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
        return f"this torch ({torch.__version__}) is CPU-only; for an NVIDIA card: {install}"
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    return f"{built} but finds no usable GPU; check nvidia-smi and the driver"


def create_accelerator(training: TrainingConfig, shard_base: bool = False) -> Accelerator:
    """Return accelerate's view of devices, processes and trackers; ConfigError where they cannot work.

    shard_base: the base will be divided among processes.
    """
    tracker = None if training.report_to == "none" else training.report_to
    known = [kind.value for kind in LoggerType if kind.value != "all"]
    if tracker is not None and tracker not in known:
        raise ConfigError(f"training.report_to: expected none or one of {', '.join(known)}, got {tracker!r}")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Plugins of accelerate launch; what they divide is not what is saved here.
    for plugin in ("fsdp", "deepspeed", "megatron_lm"):
        if os.environ.get(f"ACCELERATE_USE_{plugin.upper()}", "false").lower() in ("true", "1"):
            way = "to divide the base among processes, use --shard_base true"
            raise ConfigError(f"accelerate launch --use_{plugin}: expected a launch without it; {way}")
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        way = "add --multi_gpu (on a CPU too), or use torchrun --nproc_per_node N"
        raise ConfigError(
            f"accelerate launch: it announces several processes, but starts one without --multi_gpu: {way}"
        )
    if shard_base and launched == 1:
        way = "start them with torchrun --nproc_per_node 2 train_qlora.py, or use --shard_base false"
        raise ConfigError(f"performance.shard_base: expected two or more processes, got one: {way}")
    hint = f"use torchrun --nproc_per_node {launched}"
    alone = ConfigError(f"the launcher announces {launched} processes, but this one runs alone: {hint}")
    if launched > 1 and not announced():
        raise alone  # torch would wait for the others
    cpu = not torch.cuda.is_available()  # without it accelerate starts no gloo group on a machine without a GPU
    runs = os.path.join(training.output_dir, "runs")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`log_with")  # about a tracker that is not installed: an error below
            accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=1, log_with=tracker, project_dir=runs)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if tracker is None:  # such as a launch by mpirun, whose variables accelerate reads too
            raise ConfigError(f"accelerate cannot start here, use torchrun --nproc_per_node N: {reason}") from None
        raise ConfigError(f"training.report_to: {tracker}: {reason}") from None
    if tracker is not None and not accelerator.log_with:
        raise ConfigError(f"training.report_to: the package of {tracker} is not installed")
    if launched != accelerator.num_processes:
        raise alone
    sum_in_place(
        torch.zeros(1, device=accelerator.device)
    )  # NCCL takes its memory now, before a plan counts what is free
    return accelerator


def refuse_without_gpu(config: Config, device: torch.device) -> None:
    """Refuse to train the default 3B model without a GPU; say why none is found and how long a step would take."""
    if device.type == "cuda" or config.model.name != LEAVES["model.name"].field.default:
        return
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(8):
        a @ a
    rate = 8 * 2 * 1024**3 / (time.perf_counter() - start)
    tokens = config.training.batch_size * config.training.gradient_accumulation_steps * config.data.max_length
    # 6 FLOP per weight and token: forward, recomputation, backward without dW; 2.77e9 weights in linears.
    hours = 6 * 2.77e9 * tokens / rate / 3600
    raise ConfigError(
        f"model.name: {config.model.name} needs a GPU: {no_gpu_reason()}. On this CPU one optimizer step would take "
        f"about {hours:.1f} hours; try --config tiny/config.yaml"
    )


def device_block(device: torch.device, dtype: torch.dtype, processes: int) -> str:
    """Return the lines about the device, the versions and the number format of a run."""
    gpu = f"GPU: none | CPU threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = f"GPU: {found.name} | {found.total_memory / 2**30:.1f} GiB | {found.multi_processor_count} SMs"
    versions = installed("torch", "transformers", "peft", "bitsandbytes")
    compute = f"Compute type: {dtype} | processes: {processes}"
    rows = [f"Device: {device}", gpu, " | ".join(versions[:3]), " | ".join(versions[3:]), compute]
    if (asked := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        rows.append(f"accelerate launch --mixed_precision {asked} is not used: quantization.compute_dtype decides")
    if (asked := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO")) != "NO":
        rows.append(f"accelerate launch --dynamo_backend {asked.lower()} is not used: performance.compile decides")
    return "\n".join(["=" * 60, *rows, "=" * 60])


def installed(*packages: str) -> list[str]:
    """Return one text per version, of Python and of these packages."""
    return [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]


def failed(error: Exception, advice: str) -> int:
    """Report an error of the machine in one line and return the exit code; raise any other error."""
    first = (str(error).splitlines() or [""])[0]
    if out_of_memory(error):
        report(ConfigError(f"out of main memory: {first or type(error).__name__}{advice}"))
        return 3
    if "does not have a deterministic implementation" in first:
        problem = f"{first.split()[0]} has no form that gives the same bits each time; use false"
        return report(ConfigError(f"performance.deterministic: {problem}"))
    if type(error).__name__ == "InductorError":  # no C++ compiler, or one that fails; importing the class takes seconds
        return report(ConfigError(f"performance.compile: torch.compile failed here, use off: {first}"))
    if isinstance(error, BrokenPipeError) and reader_gone("\n"):
        return 1
    if not isinstance(error, (OSError, SafetensorError, torch.AcceleratorError, RankFailed)):
        raise error
    report(ConfigError(f"{type(error).__name__}: {first}{advice}"))  # a full disk, a driver that was reset
    return 1


# ------------------------------------------------------------------------------------------------ installation check


def check_nf4(device: torch.device) -> float:
    """Return the relative error of an NF4 product in bfloat16 (or float16), compared with fp32 on the same weights."""
    generator = torch.Generator().manual_seed(0)
    dtype = usable_dtype("bfloat16") if device.type == "cuda" else torch.bfloat16
    weight, x = (torch.randn(256, 256, generator=generator) for _ in range(2))
    packed, state = bnb.functional.quantize_4bit(weight.to(device, dtype), quant_type="nf4", compress_statistics=True)
    reference = x @ bnb.functional.dequantize_4bit(packed, state).float().cpu().t()
    product = bnb.matmul_4bit(x.to(device, dtype), packed.t(), quant_state=state).float().cpu()
    return ((product - reference).norm() / reference.norm()).item()


def write_random_model(folder: Path) -> None:
    """Write a random Qwen2 with two layers, and a tokenizer with 512 words, into a folder."""
    words = {f"w{i}": i for i in range(512)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w2").save_pretrained(folder)
    # An adapter matrix of 256 x rank 16 is just large enough for bitsandbytes to keep its states in 8 bit.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen2Config(vocab_size=len(words), num_key_value_heads=2, **sizes)
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def check_step(device: torch.device, performance: PerformanceConfig) -> tuple[float, float, str]:
    """Train two 4-bit layers for one optimizer step with the functions of a real run.

    Return the loss before and after the step, and the log line about the fast path.
    """
    train = importlib.import_module("train_qlora")  # not above: the check imports what a run imports, as a run does
    training = TrainingConfig(batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2)
    lines: list[str] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps mapped weights open
        write_random_model(Path(folder))
        config = Config(
            ModelConfig(name=folder), data=DataConfig(max_length=64), training=training, performance=performance
        )
        model, tokenizer = load_base(config, device)
        learner = train.build_learner(config, model, unplanned(config, 2, layers=2), lines.append)
        optimizer = train.create_optimizer(learner.parameters, training, device, lines.append, learner.memory)
        blocks: Any = list(torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0)).numpy())
        # Not imported above, since it imports datasets, which inference does not need.
        batches = importlib.import_module("toolkit.data_blocks").batches
        batch, counts, places = next(batches(blocks, np.arange(2), 2, tokenizer.pad_token_id, device))
        tokens = int(counts.sum())
        losses = []
        for step in range(2):
            learner.train()
            learner.zero_gradients()
            losses.append(learner.micro_step(step, torch.from_numpy(places), batch).item() / tokens)
            learner.scaler.unscale_(optimizer)
            torch._foreach_mul_(learner.memory.all_gradients(), 1 / tokens)
            learner.scaler.step(optimizer)
            learner.scaler.update()
        del model, learner, optimizer
    let_go()
    return *losses, next(line for line in lines if line.startswith("fast path: "))


def step_lines(device: torch.device) -> tuple[list[str], bool]:
    """Return lines about training two layers, without and with the fast path, and whether both losses fell."""
    off = PerformanceConfig(fused_lora="off", compile="off", cuda_graphs="off")
    # A GPU uses the same fast path as a run. On a CPU nothing is compiled, as in a run on a CPU, so the check is quick.
    fast = PerformanceConfig() if device.type == "cuda" else dataclasses.replace(off, fused_lora="on")
    lines, good = [], True
    for performance in (off, fast):
        name = "plain" if performance is off else "fast path"
        start = time.perf_counter()
        try:
            before, after, path = check_step(device, performance)
            fine = math.isfinite(before) and after < before
            said = path.split(" | ")[0] if performance is fast else "plain"
            verdict = f"{said}, loss {before:.3f} -> {after:.3f} in {time.perf_counter() - start:.1f} s"
            verdict = verdict if fine else f"WRONG: {verdict}, but the loss should fall"
        except Exception as problem:  # a driver, a compiler or a package may raise anything: the line names it
            fine, reason = False, " ".join(str(problem).split())[:300]
            verdict = f"{name} fails: {type(problem).__name__}: {reason}"
        lines.append(f"training step on {device.type}: {verdict}")
        good &= fine
    return lines, good


def _hub_line() -> str:
    if constants.HF_HUB_OFFLINE:
        return "hub: not checked (HF_HUB_OFFLINE is set): models and data must come from folders or the cache"
    try:
        get_hf_file_metadata(hf_hub_url("Qwen/Qwen2.5-3B-Instruct", "config.json"), timeout=5)
    except Exception as error:  # every failure means the same here, and the line names it
        return f"hub: not reachable ({type(error).__name__}): models and data must come from folders or the cache"
    return "hub: reachable"


def check_installation() -> int:
    """Print one line for each thing that training needs; return 0 if training can run here, otherwise 1."""
    if failures := import_failures():
        print(*failures, CANNOT_RUN, sep="\n")
        return 1
    quiet_libraries()
    packages = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
    print("versions: " + ", ".join(installed(*packages)))
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        free, total = torch.cuda.mem_get_info()
        print(f"GPU: {torch.cuda.get_device_name()}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free")
        print("bfloat16: " + ("no, so float16 with a loss scaler is used" if bf16_missing() else "yes"))
    else:
        print(f"GPU: none: {no_gpu_reason()}")
    try:
        print(f"Triton: {version('triton')}")
    except ModuleNotFoundError:
        print("Triton: not installed, so layers are not compiled (on Windows: pip install triton-windows)")
    good = True
    for device in devices:
        try:
            error = check_nf4(device)
            fine = error < 0.02  # several times the usual error of bfloat16
            print(f"NF4 on {device.type}: {'right' if fine else 'WRONG'}, relative error {error:.4f} against fp32")
        except (RuntimeError, OSError, NotImplementedError) as problem:
            fine = False
            print(f"NF4 on {device.type}: fails: {' '.join(str(problem).split())[:200]}")
        lines, learns = step_lines(device)
        print(*lines, sep="\n")
        good &= fine and learns
    print(f"disk: {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free in {os.getcwd()}")
    print(_hub_line())
    print("training can run here" if good else CANNOT_RUN)
    return 0 if good else 1
