"""Train a mixture of experts of Qwen3-30B-A3B's shape with random weights: experts on the GPU, in main memory, and plain code.

    python tests/benchmarks/bench_moe.py                          48 layers, 1 x 2048 tokens; plain code with fewer layers
    python tests/benchmarks/bench_moe.py --layers 8 --cases gpu cpu hf --set lora.rank=8
    python tests/benchmarks/bench_moe.py --cases gpu cpu hf unsloth --hf-layers 48 --at-once --unsloth-path /tmp/site
    python tests/benchmarks/bench_moe.py --tiny                   a tiny shape, on a CPU too, to try this file

Weights are made and packed one tensor at a time on the device, so nothing is downloaded and no disk is needed. Cases: gpu, cpu and
16bit are this toolkit with quantization.experts, hf is transformers + peft + bitsandbytes, whose experts stay in 16 bit; it and gpu@hf, this toolkit
beside it, have --hf-layers layers. unsloth is moe_unsloth.py; it and gpu@u have --unsloth-layers. All train LoRA of rank 16 on attention, all layers checkpointed, and each step is
one micro-batch and one update. A case has a process of its own and prints a JSON line; the table comes last. --at-once: all build their
models and compile at the same time, and each is timed while the others wait. Memory is what the allocator reserved while training, planned
memory is the plan without the CUDA context.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Config, load_config
from toolkit.startup import after_heavy_imports, before_heavy_imports

before_heavy_imports()

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import train_qlora
from fast_path import experts, optimizers
from fast_path.expert_store import keep_in_main_memory
from fast_path.families import expert_tensors
from fast_path.micro_step import let_go
from quantization_utils import create_bnb_config, quiet_libraries
from toolkit import memory_plan
from toolkit.model_shape import shape_of

after_heavy_imports()

GIB = 2**30
OURS = ("gpu", "cpu", "16bit")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
REAL = {
    "vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
    "norm_topk_prob": True, "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
TINY = REAL | {
    "vocab_size": 4096, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "intermediate_size": 256,
}  # fmt: skip


def shape_config(tiny: bool, layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**(TINY if tiny else REAL), num_hidden_layers=layers, pad_token_id=0)


def random(shape: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02


def random_mixture(config: Qwen3MoeConfig, device: torch.device, where: str) -> PreTrainedModel:
    """Return a model with random weights in NF4, made one tensor at a time. where: gpu, cpu, or 16bit: experts in bfloat16."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    quantized = create_bnb_config()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            model.set_submodule(path, random_linear(module, device))
    for module in experts.expect_packed(model) if where != "16bit" else ():
        for name in expert_tensors(module):
            tensor = experts.packed(random(module._parameters[name].shape, device), quantized)
            module._parameters[name] = tensor.to("cpu") if where == "cpu" else tensor
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = path.rpartition(".")
            ones = "norm" in path
            real = (
                torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
                if ones
                else random(parameter.shape, device)
            )
            setattr(model.get_submodule(parent), leaf, nn.Parameter(real, requires_grad=False))
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(key, buffer.to(device), persistent=False)
    if where == "cpu":
        keep_in_main_memory(model, device)
    model.is_loaded_in_4bit = True
    return model.eval()


def random_linear(module: nn.Linear, device: torch.device) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, device="meta", quant_type="nf4")
    layer.compute_dtype, layer.support_avx512bf16_for_cpu = torch.bfloat16, False
    weight = random(module.weight.shape, device)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(device)
    return layer


def settings(case: dict) -> Config:
    """Return the configuration of a case of this toolkit."""
    given = dict(pair.split("=", 1) for pair in case["set"])
    own = {
        "lora.dropout": "0",
        "data.max_length": str(case["length"]),
        "lora.target_modules": f"[{', '.join(ATTENTION)}]",
    }
    return load_config((), own | {"quantization.experts": case["experts"]} | given)


def load_ours(case: dict, device: torch.device) -> tuple[Callable[[int, torch.Tensor], torch.Tensor], float]:
    """Return a function that runs a step and gives its loss per token, and the planned GiB."""
    config, shape = settings(case), shape_config(case["tiny"], case["layers"])
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(shape)
    sizes = shape_of(skeleton)
    if case["experts"] == "16bit":
        sizes = dataclasses.replace(sizes, experts=sizes.experts.in_16_bit())
    plan = memory_plan.plan_memory(sizes, config, 1, case["layers"])
    model = random_mixture(shape, device, case["experts"])
    learner = train_qlora.build_learner(config, model, plan, lambda line: print(line, file=sys.stderr, flush=True))
    optimizer = optimizers.create_optimizer(learner.parameters, config.training, device, print, learner.memory)
    learner.train()

    def step(number: int, ids: torch.Tensor) -> torch.Tensor:
        learner.zero_gradients()
        loss = learner.micro_step(number, torch.arange(1), {"input_ids": ids, "labels": ids})
        torch._foreach_mul_(learner.memory.all_gradients(), 1 / (ids.numel() - 1))
        optimizer.step()
        return loss / (ids.numel() - 1)

    return step, plan.reserved / GIB


def load_hf(case: dict, device: torch.device) -> tuple[Callable[[int, torch.Tensor], torch.Tensor], float]:
    """Return the same for transformers + peft + bitsandbytes, as their documentation trains a 4-bit model."""
    model = random_mixture(shape_config(case["tiny"], case["layers"]), device, "16bit")
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=ATTENTION, task_type="CAUSAL_LM"))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizers.create_optimizer(parameters, settings(case | {"experts": "gpu"}).training, device, print)

    def step(number: int, ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, 0.0


def wait_for_turn(case: dict) -> None:
    """Tell the process that started this one that it is ready, and wait until it may be timed."""
    if case.get("waits"):
        print("READY", flush=True)
        sys.stdin.readline()


def run_case(case: dict) -> dict:
    """Return the figures of one case, trained in this process."""
    quiet_libraries()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    began = time.perf_counter()
    step, planned = (load_hf if case["kind"] == "hf" else load_ours)(case, device)
    row = {"case": case["name"], "layers": case["layers"], "load_s": round(time.perf_counter() - began, 1)}
    if planned:
        row["planned_gib"] = round(planned, 2)
    ids = torch.randint(0, TINY["vocab_size"], (1, case["length"]), device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    let_go()
    if device.type == "cuda":
        row["loaded_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
        torch.cuda.reset_peak_memory_stats()  # making random weights takes more than training
    losses = [step(number, ids) for number in range(2)]  # compile, capture
    wait()
    wait_for_turn(case)
    began = time.perf_counter()
    losses += [step(2 + number, ids) for number in range(case["steps"])]
    wait()
    row["tokens_s"] = round(case["steps"] * case["length"] / (time.perf_counter() - began), 1)
    if case["profile"] and device.type == "cuda":
        with torch.profiler.profile() as profile:
            step(99, ids)
            wait()
        table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=70)
        print(table, file=sys.stderr)
    row["first_loss"], row["last_loss"] = (round(float(loss), 3) for loss in (losses[0], losses[-1]))
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        row["allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    if "peak_gib" in row and planned:
        row["plan_error"] = f"{planned / row['peak_gib'] - 1:+.1%}"
    return row


def cases_of(options: argparse.Namespace) -> list[dict]:
    """Return the cases that were asked for, gpu@hf beside hf."""
    layers = min(options.layers, 2) if options.tiny else options.layers
    few = min(options.hf_layers, layers)
    rest = {"length": options.length, "steps": options.steps, "tiny": options.tiny, "set": options.set}
    rest["profile"] = options.profile
    found = [
        {"name": name, "kind": "ours", "experts": name, "layers": layers} for name in options.cases if name in OURS
    ]
    if "unsloth" in options.cases:
        shape, fewer = TINY if options.tiny else REAL, min(options.unsloth_layers, layers)
        found += [{"name": "gpu@u", "kind": "ours", "experts": "gpu", "layers": fewer}] if fewer != layers else []
        found += [{"name": "unsloth", "kind": "unsloth", "experts": "gpu", "layers": fewer, "shape": shape}]
    if "hf" in options.cases:
        found += [{"name": "gpu@hf", "kind": "ours", "experts": "gpu", "layers": few}] if few != layers else []
        found += [{"name": "hf", "kind": "hf", "experts": "gpu", "layers": few}]
    return [case | rest for case in found]


def start(case: dict, unsloth_path: str, complaints: TextIO) -> subprocess.Popen:
    """Start the process of a case, which builds its model and then waits."""
    script, environment = Path(__file__), dict(os.environ)
    if case["kind"] == "unsloth":
        script = script.with_name("moe_unsloth.py")
        environment |= {"PYTHONPATH": unsloth_path} if unsloth_path else {}
    command = [sys.executable, str(script), "--single", json.dumps(case | {"waits": True})]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": complaints}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def line_of(process: subprocess.Popen, word: str, seconds: float) -> str:
    """Return the rest of a process's next line that begins with the word, "" if none came; after seconds it is killed."""
    timer = threading.Timer(max(seconds, 1.0), process.kill)  # 1: its line may be there already
    timer.start()
    found = next((line for line in process.stdout if line.startswith(word)), word)
    timer.cancel()
    return found.removeprefix(word)


def run_processes(cases: list[dict], options: argparse.Namespace) -> list[dict]:
    """Run cases in processes that build their models at the same time; time one after the other; print and return rows."""
    until = time.monotonic() + options.timeout
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in cases]
        processes = [start(case, options.unsloth_path, file) for case, file in zip(cases, files, strict=True)]
        for process in processes:
            line_of(process, "READY", until - time.monotonic())
        return [row_of(*of_case, until, options) for of_case in zip(cases, processes, files, strict=True)]


def row_of(case: dict, process: subprocess.Popen, file: TextIO, until: float, options: argparse.Namespace) -> dict:
    """Let a process that is ready be timed; print and return its row, or why there is none."""
    late = f"not ready within {options.timeout} s; " if process.poll() is not None and time.monotonic() > until else ""
    if process.poll() is None:
        process.stdin.write("\n")
        process.stdin.flush()
    result = line_of(process, "RESULT ", options.timeout)
    process.wait()
    file.seek(0)
    said = file.read()
    failed = late + (said[-1500:].strip() or "it said nothing")
    row = json.loads(result) if result else {"case": case["name"], "layers": case["layers"], "failed": failed}
    shown = [line for line in said.splitlines() if line.startswith(("fast path", "adapters"))]
    print(said if case["profile"] else "\n".join(shown), json.dumps(row), sep="\n", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["gpu", "cpu", "hf"], choices=(*OURS, "hf", "unsloth"))
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hf-layers", type=int, default=12)
    parser.add_argument("--unsloth-layers", type=int, default=48)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--timeout", type=int, default=280, help="seconds a case may take until it is timed")
    parser.add_argument("--unsloth-path", default="", metavar="PATH", help="PYTHONPATH of Unsloth's process")
    parser.add_argument("--at-once", action="store_true", help="build all models at the same time")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="settings of this toolkit's cases"
    )
    parser.add_argument("--profile", action="store_true", help="print what takes most of a step's time on the GPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape with two layers")
    parser.add_argument("--together", action="store_true", help="all cases in this process, which saves the imports")
    parser.add_argument("--single", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.single:
        print("RESULT " + json.dumps(run_case(json.loads(options.single))), flush=True)
        return
    if options.together:
        rows = []
        for case in cases_of(options):
            rows.append(run_case(case))
            print(json.dumps(rows[-1]), flush=True)
            let_go()
    elif options.at_once:
        rows = run_processes(cases_of(options), options)
    else:
        rows = [row for case in cases_of(options) for row in run_processes([case], options)]
    print(f"{'case':<8}{'layers':>7}{'tokens/s':>10}{'peak GiB':>10}{'planned':>9}{'loaded':>8}{'loss':>16}")
    for row in rows:
        if "failed" in row:
            print(f"{row['case']:<8}{row['layers']:>7}  failed: {row['failed'].strip().splitlines()[-1]}")
            continue
        numbers = [row.get(key, float("nan")) for key in ("peak_gib", "planned_gib", "loaded_gib")]
        sizes = f"{numbers[0]:>10.2f}{numbers[1]:>9.2f}{numbers[2]:>8.2f}"
        losses = f"{row['first_loss']:.3f} → {row['last_loss']:.3f}"
        print(f"{row['case']:<8}{row['layers']:>7}{row['tokens_s']:>10,.0f}{sizes}{losses:>16}")


if __name__ == "__main__":
    main()
