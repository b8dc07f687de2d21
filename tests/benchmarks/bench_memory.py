"""Compare the memory plan with what training reserves on this GPU, over a grid of shapes; models with random 4-bit weights.

    python tests/benchmarks/bench_memory.py [--only 3b-1x512] [--jobs 6]
    python tests/benchmarks/bench_memory.py --cards      the largest model that trains on each of six cards, by the plan

The plan is that of memory_plan.plan_memory without the CUDA context, the measurement torch.cuda.max_memory_reserved after two
optimizer steps of two micro-batches and an evaluation. Each case has a process of its own, some at a time, as many as the
GPU has room for: what a process reserves does not depend on its neighbours, and its tokens/s are timed while no other case
computes. A JSON line per case as it ends, the table and the errors last.
"""

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Config, load_config
from tests.benchmarks.bench_training import shared_file, turn
from toolkit.startup import after_heavy_imports, before_heavy_imports

before_heavy_imports()

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

import train_qlora
from fast_path import host_rows, micro_step, optimizers
from toolkit import memory, memory_plan
from toolkit.cards import find_card
from toolkit.model_shape import ModelShape, shape_of

after_heavy_imports()

GIB = 2**30
ATTENTION = "[q_proj, k_proj, v_proj, o_proj]"
MODELS = {
    "3b": Qwen2Config(
        hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768,
    ),
    "1b": LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
        vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=131072, head_dim=64,
    ),
    "7b": LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008,
        vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=8192,
    ),
    "qwen7b": Qwen2Config(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
        vocab_size=152064, tie_word_embeddings=False, max_position_embeddings=131072,
    ),
    "llama8b": LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=131072, head_dim=128,
    ),
    "qwen14b": Qwen2Config(
        hidden_size=5120, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, intermediate_size=13824,
        vocab_size=152064, tie_word_embeddings=False, max_position_embeddings=131072,
    ),
    "qwen32b": Qwen2Config(
        hidden_size=5120, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, intermediate_size=27648,
        vocab_size=152064, tie_word_embeddings=False, max_position_embeddings=131072,
    ),
    "llama70b": LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
        vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=131072, head_dim=128,
    ),
}  # fmt: skip
# What `--cards` looks for on each card, the largest first.
BY_SIZE = {
    "llama70b": "Llama-3.1-70B", "qwen32b": "Qwen2.5-32B", "qwen14b": "Qwen2.5-14B", "llama8b": "Llama-3.1-8B",
    "qwen7b": "Qwen2.5-7B", "3b": "Qwen2.5-3B",
}  # fmt: skip
CARDS = ("RTX 3060 Laptop", "RTX 4060", "RTX 3060", "RTX 4060 Ti 16GB", "RTX 4090", "L40S")
SMALL_CARD = {"performance.memory_limit_gib": "7.8"}  # with the context: 7.3 GiB for the allocator
LONG = {
    "lora.rank": "32",
    "training.gradient_checkpointing": "offload",
    "embedding": "cpu",
}  # memory_plan.longest_length's
MINUTES = 2**16  # from this length on a micro-batch takes about a minute: one is computed, without an evaluation
# (model, micro-batch, length, checkpointed layers, settings); embedding: cpu and pieces are no settings but what the plan may
# choose
GRID = [
    ("3b", 1, 512, 0, {}),
    ("3b", 1, 512, 18, {}),
    ("3b", 1, 512, 36, {}),
    ("3b", 4, 512, 0, {}),
    ("3b", 4, 512, 36, {}),
    ("3b", 16, 512, 0, {}),
    ("3b", 16, 512, 18, {}),
    ("3b", 16, 512, 36, {}),
    ("3b", 4, 2048, 36, {}),
    ("3b", 1, 2048, 0, {}),
    ("3b", 1, 8192, 36, {}),
    ("3b", 4, 8192, 36, {}),
    ("3b", 4, 512, 36, {"lora.rank": "8"}),
    ("3b", 4, 512, 18, {"lora.rank": "64"}),
    ("3b", 4, 512, 18, {"lora.target_modules": ATTENTION}),
    ("3b", 4, 512, 36, {"quantization.use_double_quant": "false"}),
    ("3b", 4, 512, 36, {"training.optim": "adamw_8bit"}),
    ("3b", 4, 512, 36, {"training.optim": "adamw_torch"}),
    ("3b", 4, 512, 0, {"lora.dropout": "0.05"}),
    ("3b", 1, 512, 0, {"performance.compile": "off"}),
    ("3b", 4, 512, 36, {"performance.compile": "off"}),
    ("3b", 4, 512, 0, {"performance.fused_lora": "off"}),
    ("3b", 4, 512, 36, {"performance.fused_lora": "off"}),
    ("1b", 1, 512, 0, {}),
    ("1b", 16, 512, 16, {}),
    ("1b", 4, 2048, 8, {}),
    ("7b", 1, 512, 0, {}),
    ("7b", 4, 512, 32, {}),
    ("7b", 1, 8192, 32, {}),
    ("7b", 16, 512, 16, {}),
    ("qwen7b", 1, 512, 28, SMALL_CARD),
    ("qwen7b", 1, 512, 28, SMALL_CARD | {"embedding": "cpu"}),
    ("qwen7b", 1, 512, 28, SMALL_CARD | {"embedding": "cpu", "pieces": "4"}),
    ("llama8b", 1, 512, 32, SMALL_CARD),
    ("llama8b", 1, 512, 32, SMALL_CARD | {"embedding": "cpu"}),
    ("llama8b", 1, 512, 32, SMALL_CARD | {"embedding": "cpu", "pieces": "4"}),
    ("llama8b", 1, 512, 32, SMALL_CARD | {"embedding": "cpu", "pieces": "8"}),
    ("llama8b", 4, 512, 32, SMALL_CARD | {"embedding": "cpu"}),
    ("llama8b", 4, 512, 32, SMALL_CARD | {"embedding": "cpu", "pieces": "4"}),
    ("llama8b", 1, 8192, 32, LONG | {"performance.memory_limit_gib": "7.3"}),
    ("llama8b", 1, 117760, 32, LONG | {"performance.memory_limit_gib": "24.0"}),
]  # fmt: skip


def random_model(name: str, double: bool) -> PreTrainedModel:
    """Return a model of the shape with random weights in NF4 on the GPU, made one layer at a time."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.bfloat16, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        weight = torch.randn(module.out_features, module.in_features, device="cuda", dtype=torch.bfloat16) * 0.02
        bias = module.bias is not None
        layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=bias, device="meta", quant_type="nf4")
        layer.compute_dtype = torch.bfloat16
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer
        ).cuda()
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = path.rpartition(".")
            real = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16) * 0.02
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(real, requires_grad=False))
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module.register_buffer(key, buffer.cuda(), persistent=False)
    model.is_loaded_in_4bit = True
    return model


def held() -> dict[str, float]:
    """Return the GiB that are allocated and reserved now, and the largest of both so far."""
    stats = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    return {name: round(getattr(torch.cuda, name)() / GIB, 3) for name in stats}


def pools() -> list[dict[str, object]]:
    """Return the GiB of each of the allocator's pools and streams: reserved and in use."""
    found: dict[tuple, list[int]] = {}
    for segment in torch.cuda.memory_snapshot():
        sizes = found.setdefault((str(segment["segment_pool_id"]), segment["stream"] % 10**6), [0, 0])
        sizes[0] += segment["total_size"]
        sizes[1] += segment["allocated_size"]
    return [
        {"pool": pool, "stream": stream, "reserved": round(reserved / GIB, 3), "in use": round(used / GIB, 3)}
        for (pool, stream), (reserved, used) in found.items()
    ]


def measure(
    name: str, config: Config, plan: memory_plan.MemoryPlan, row: dict, alone: Callable[[], None]
) -> float:  # fmt: skip
    """Return the GiB that an evaluation and two optimizer steps of two micro-batches reserve at most.

    row: gets what was held after each stage, and tokens/s. alone: waits until no other case computes.
    """
    device, stages = torch.device("cuda", 0), row.setdefault("stages", {})
    model = random_model(name, config.quantization.use_double_quant)
    if plan.rows_apart:
        host_rows.keep_rows_in_main_memory(model, device)
    micro_step.let_go()
    torch.cuda.reset_peak_memory_stats()  # making random weights takes more than loading them
    if config.performance.memory_limit_gib:
        memory.cap_memory(device, config.performance.memory_limit_gib)
    stages["weights"] = held()
    learner = train_qlora.build_learner(config, model, plan, lambda line: None)
    stages["adapter, fused"] = held()
    optimizer = optimizers.create_optimizer(learner.parameters, config.training, device, print, learner.memory)
    ids = torch.randint(0, 30000, (plan.micro_batch, config.data.max_length), device=device)
    long = config.data.max_length >= MINUTES
    if not long:
        learner.objective.base.eval()
        learner.evaluation_sums(input_ids=ids, labels=ids)
        stages["graphs"] = held()
    learner.train()
    start = time.perf_counter()
    for step in range(1 if long else 2):
        learner.zero_gradients()
        for _ in range(1 if long else 2):
            learner.micro_step(step, torch.arange(plan.micro_batch), {"input_ids": ids, "labels": ids})
        optimizer.step()
    torch.cuda.synchronize()
    row["first_steps_s"] = round(time.perf_counter() - start, 1)
    stages["two steps"], row["pools"] = held(), pools()
    peak, seconds = torch.cuda.max_memory_reserved() / GIB, []
    if long:  # with the time that compiling took
        row["tokens_per_s"] = round(ids.numel() / row["first_steps_s"])
        return peak
    alone()
    for _ in range(8):
        start = time.perf_counter()
        learner.micro_step(2, torch.arange(plan.micro_batch), {"input_ids": ids, "labels": ids})
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    row["tokens_per_s"] = round(ids.numel() / statistics.median(seconds))
    return peak


def label_of(case: tuple) -> str:
    """Return a case's name."""
    name, micro_batch, length, checkpointed, settings = case
    return f"{name}-{micro_batch}x{length}-ck{checkpointed}" + "".join(
        f"-{k.rpartition('.')[2]}={v}" for k, v in settings.items()
    )


def plan_of(case: tuple) -> tuple[Config, memory_plan.MemoryPlan]:
    """Return a case's settings and plan."""
    name, micro_batch, length, checkpointed, settings = case
    own = {key: value for key, value in settings.items() if key not in ("embedding", "pieces")}
    config = load_config((), {"lora.dropout": "0", "data.max_length": str(length), **own})
    shape = shape_named(name)
    limit = memory.memory_limit(None, config.performance.memory_limit_gib)
    where = memory_plan.wants_offload(config), None, "embedding" in settings, int(settings.get("pieces", 1))
    return config, memory_plan.plan_memory(shape, config, micro_batch, checkpointed, None, limit, *where)


def shape_named(name: str) -> ModelShape:
    """Return the sizes of a model of MODELS."""
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(MODELS[name]))


def terms_table() -> str:
    """Return, in Markdown, the terms of the plan of each model at 1 x 512: `least_plan`."""
    config, plans = load_config((), {"lora.dropout": "0"}), {}
    for name in BY_SIZE:
        shape = shape_named(name)
        limit = memory_plan.plan_memory(shape, config, 1, shape.layers, rows_apart=True).total + GIB
        plans[name] = least_plan(shape, config, limit)
    names = dict.fromkeys(part for plan in plans.values() for part in plan.parts)
    rows = {part: [plan.parts.get(part, 0) for plan in plans.values()] for part in names}
    rows = {part: sizes for part, sizes in rows.items() if any(sizes)}
    rows["total, GiB"] = [plan.total for plan in plans.values()]
    rows["in main memory: embedding"] = [plan.rows_apart for plan in plans.values()]
    lines = [f"| {part} | {' | '.join(f'{size / GIB:.3f}' for size in sizes)} |" for part, sizes in rows.items()]
    return "\n".join([f"| | {' | '.join(BY_SIZE.values())} |", "|---" * (len(plans) + 1) + "|", *lines])


def least_plan(shape: ModelShape, config: Config, limit: float) -> memory_plan.MemoryPlan:
    """Return the plan of one sequence, all layers checkpointed, embedding in main memory, weights unpacked in pieces."""
    pieces = memory_plan.pieces_of(shape, config, memory_plan.expected_path(config))[-1]
    return memory_plan.plan_memory(shape, config, 1, shape.layers, None, limit, False, None, True, pieces)


def cards_table() -> str:
    """Return, in Markdown, the largest model that trains on each of some cards: what `--plan --card` says of it."""
    config, shapes = load_config((), {"lora.dropout": "0"}), {name: shape_named(name) for name in BY_SIZE}
    sequences = config.training.batch_size * config.training.gradient_accumulation_steps
    rows = [
        "| card | for a run, GiB | model | 1 x 512 | `auto_fit` takes | GiB | tokens/s | longest |",
        "|---" * 8 + "|",
    ]
    for card in map(find_card, CARDS):
        limit = card.free_gib * GIB
        least = {name: least_plan(shape, config, limit).total for name, shape in shapes.items()}
        name = next(name for name, total in least.items() if total <= limit)
        shape = shapes[name]
        plan = memory_plan.fit(shape, config, sequences, limit, card.rates)
        seconds = memory_plan.step_seconds(
            shape, config, card.rates, plan.micro_batch, plan.checkpointed, plan.rows_apart > 0
        )
        taken = f"{plan.micro_batch} x 512, {plan.checkpointed} of {plan.layers} layers checkpointed"
        taken += ", embedding in main memory" if plan.rows_apart else ""
        taken += ", weights in pieces" if plan.pieces > 1 else ""
        longest = memory_plan.longest_length(shape, config, limit)
        rows.append(
            f"| {card.name} | {card.free_gib:.2f} | {BY_SIZE[name]} | {least[name] / GIB:.2f} | {taken} | "
            f"{plan.total / GIB:.2f} | {plan.micro_batch * 512 / seconds:,.0f} | {longest:,} |"
        )
    wider = load_config((), {"lora.dropout": "0", "lora.rank": "32"})
    for gib in (7.3, 24.0):
        rows.append(
            f"Llama-3.1-8B, r = 32, in {gib} GiB: {memory_plan.longest_length(shapes['llama8b'], wider, gib * GIB):,}"
        )
    return "\n".join(rows)


def run_case(case: tuple, alone: Callable[[], None]) -> dict:
    """Return plan and measurement of one case, GiB, in this process."""
    config, plan = plan_of(case)
    row = {"case": label_of(case), "planned": round(plan.reserved / GIB, 3)}
    row["parts"] = {part: round(size / GIB, 3) for part, size in plan.parts.items()}
    try:
        row["measured"] = round(measure(case[0], config, plan, row, alone), 3)
        row["allocated"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        row["error"] = round(row["planned"] / row["measured"] - 1, 4)
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    return row


class Room:
    """Bytes of the GPU that cases share: one starts when what it is planned to take is free."""

    def __init__(self, size: int):
        self.size = self.free = size
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        size = min(size, self.size)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= size)
            self.free -= size
        try:
            yield
        finally:
            with self.changed:
                self.free += size
                self.changed.notify_all()


def run_process(number: int, room: Room, lock: str) -> dict:
    """Run one case of the grid in a fresh process and return its row."""
    command = [sys.executable, __file__, "--single", str(number), "--lock", lock]
    with room.taken(plan_of(GRID[number])[1].total):
        done = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    row = rows[0] if rows else {"case": label_of(GRID[number]), "failed": " ".join(done.stderr[-300:].split())}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name begins so (regular expressions)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--cards", action="store_true", help="plans for graphics cards, by their data sheets; needs no GPU"
    )
    parser.add_argument("--single", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.single is not None:
        with turn({"turn": args.lock}) as alone:
            print("RESULT " + json.dumps(run_case(GRID[args.single], alone)))
        return
    if args.cards:
        print(terms_table(), cards_table(), sep="\n\n")
        return
    numbers = [number for number, case in enumerate(GRID) if re.match("|".join(args.only), label_of(case))]
    room = Room(int(torch.cuda.mem_get_info()[0] * 0.9))
    with shared_file() as lock, ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda number: run_process(number, room, lock.name), numbers))
    errors = [row["error"] for row in rows if "error" in row]
    print(f"{'case':<64}{'planned':>9}{'measured':>9}{'error':>8}{'tokens/s':>10}")
    for row in rows:
        error = f"{row['error']:8.1%}" if "error" in row else row["failed"]
        print(
            f"{row['case']:<64}{row.get('planned', 0):>9.2f}{row.get('measured', 0):>9.2f}{error:>8}{row.get('tokens_per_s', 0):>10,}"
        )
    median = statistics.median(map(abs, errors))
    print(f"{len(errors)} cases: error {min(errors):.1%} to {max(errors):.1%}, median {median:.1%}")


if __name__ == "__main__":
    main()
