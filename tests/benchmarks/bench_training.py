"""Time a micro-batch's forward and backward: this toolkit, transformers + peft as tutorials write it, and Unsloth if installed.

    python tests/benchmarks/bench_training.py MODEL --cases 1x512 16x512 4x512@24 1x8192%7.3 --peers ours hf unsloth
    python tests/benchmarks/bench_training.py MODEL --profile 16x512 --checkpointing on        GPU time by kind of work
    python tests/benchmarks/bench_training.py MODEL --cases 16x512:on --peers ours --parts     what the memory holds at its peak
    python tests/benchmarks/bench_training.py MODEL --packed 64 --attention varlen mask        blocks of samples of 64 tokens
    python tests/benchmarks/bench_training.py families --cases 16x512:on 4x512 --peers ours plain hf unsloth

MODEL is a folder, the name of a shape (tests/benchmarks/shapes.py), which is made with random weights and removed afterwards, or
`families`, all of these; more than one may be named, and with peers of its own as in gemma-2-2b=ours,hf. The peer `plain` is this
toolkit without its fast path. --unsloth-path: the PYTHONPATH of Unsloth's processes, where it needs another transformers than the rest.
A case is BATCHxLENGTH, with :on or :off in the place of --checkpointing, sN after it for N swapped layers, @N confined to N multiprocessors (a stand-in for a smaller card;
`tflops` of the line shows whether it held: about 6.5 for each) and %G capped at G GiB. LoRA r = 16 on all
seven projections, NF4 + double quantisation, bf16, full blocks of random tokens. Each case runs in a process of its own and
prints a JSON line; the table comes last. Compare only figures of one call on one machine. Memory is what the allocator reserved.
`first s`, from the process's start to the end of the first optimizer step (after two micro-batches), is worth something with
--together 1 only; --cold gives every case empty caches of compiled kernels.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.shapes import SHAPES, folder_of

PEERS = ("ours", "plain", "hf", "unsloth")
PLAIN = [f"performance.{name}=off" for name in ("fused_lora", "compile", "cuda_graphs")]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 2**30
WARM_UP = 4  # micro-batches before the timed ones
QUIET = (
    "model",
    "profile",
    "parts",
    "set",
    "steps",
    "turn",
    "started",
    "packed",
    "attention",
    "cold",
)  # not in a case's line
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "UNSLOTH_COMPILE_LOCATION")


def checkpointing(text: str) -> str:
    """Return a value of --checkpointing."""
    if text not in ("on", "off", "offload") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected on, off, offload or a number of layers, got {text}")
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help=f"folder of a model, or families, or of these: {', '.join(SHAPES)}")
    parser.add_argument("--cases", nargs="+", default=["1x512", "16x512"], metavar="BxL[:CKPT[sN]][@SMS][%%GIB]")
    parser.add_argument("--peers", nargs="+", default=["ours", "hf", "unsloth"], choices=PEERS)
    parser.add_argument("--checkpointing", nargs="+", default=["on", "off"], type=checkpointing, help="N layers: ours")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0])
    parser.add_argument("--products", nargs="+", default=["bf16"], choices=("bf16", "fp8"), help="this toolkit's alone")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="settings of this toolkit's cases"
    )
    parser.add_argument(
        "--packed", type=int, metavar="N", help="blocks are samples of N tokens each; this toolkit only"
    )
    ways = ("varlen", "mask")
    parser.add_argument("--attention", nargs="+", default=["varlen"], choices=ways, help="of packed samples")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--timeout", type=int, default=240, help="seconds a case may take")
    parser.add_argument(
        "--together", type=int, default=1, help="processes that load and compile at once; timed in turn"
    )
    parser.add_argument("--unsloth-path", default="", metavar="PATH", help="PYTHONPATH of Unsloth's processes")
    parser.add_argument("--cold", action="store_true", help="no compiled kernels from earlier runs")
    parser.add_argument(
        "--profile", metavar="CASE", help="print the GPU time of one micro-step of this toolkit by kernel"
    )
    parser.add_argument("--parts", action="store_true", help="print what the memory holds at its peak; slows down")
    parser.add_argument("--single", help=argparse.SUPPRESS)
    return parser.parse_args()


@contextlib.contextmanager
def turn(case: dict) -> Iterator[Callable[[], None]]:
    """Load and compile beside other cases; what is returned waits until this one is alone, for its timing."""
    with open(case["turn"]) as file:
        fcntl.flock(file, fcntl.LOCK_SH)

        def alone() -> None:
            fcntl.flock(file, fcntl.LOCK_UN)
            fcntl.flock(file, fcntl.LOCK_EX)

        yield alone


def shared_file():
    """Return the file whose lock gives the turns; the file that BENCH_TURN names is shared with other benchmarks of one GPU."""
    named = os.environ.get("BENCH_TURN")
    return open(named, "a") if named else tempfile.NamedTemporaryFile()


def run_cases(cases: list[dict], run: Callable[[dict], dict], together: int) -> list[dict]:
    """Run cases in processes of their own, some of them at a time, each timed alone.

    The models that they name as shapes are made meanwhile, and each is removed after its last case.
    """
    names = list(dict.fromkeys(case["model"] for case in cases))
    left, counting = Counter(case["model"] for case in cases), threading.Lock()
    kept = {name: contextlib.ExitStack() for name in names}
    with (
        shared_file() as file,
        ThreadPoolExecutor(together) as pool,
        ThreadPoolExecutor(together) as makers,
    ):

        def made(name: str) -> str:
            with turn({"turn": file.name}):
                return str(kept[name].enter_context(folder_of(name)))

        folders = {name: makers.submit(made, name) for name in names}

        def one(case: dict) -> dict:
            name = case["model"]
            try:
                return run(case | {"turn": file.name, "name": Path(name).name, "model": folders[name].result()})
            finally:
                with counting:
                    left[name] -= 1
                    last = not left[name]
                if last:
                    kept[name].close()

        return list(pool.map(one, cases))


def confine(case: dict) -> object:
    """Hold the process to the case's multiprocessors and memory, as long as what this returns is kept."""
    import torch

    context = None

    torch.zeros(1, device="cuda")
    if case["sms"]:
        from torch.cuda.green_contexts import GreenContext

        context = GreenContext.create(case["sms"], 0)
        context.set_context()
        # The context belongs to this thread; autograd's own thread would run every backward on the whole chip.
        torch.autograd.set_multithreading_enabled(False)
        # Inductor's code calls it. Unsloth was back on the whole chip after loading and compiling, and no longer since
        # this and the second set_context of run_single; which of the two does it was not tried.
        torch.cuda.set_device = lambda device: None
        report(case["sms"])
    if case["cap"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case["cap"] * GIB / total)
    return context


def report(multiprocessors: int) -> None:
    """Have torch report so many multiprocessors, as a card that has no more does: what divides its work by them does so here."""
    import torch

    properties = torch.cuda.get_device_properties

    class Confined:
        multi_processor_count = multiprocessors

        def __init__(self, whole):
            self.whole = whole

        def __getattr__(self, name: str):
            return getattr(self.whole, name)

    torch.cuda.get_device_properties = lambda *device: Confined(properties(*device))


def backward_tflops() -> float:
    """Return the TFLOP/s of matrix products in a backward pass: whether the confinement holds there too."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)  # a case that fits its cap may have no room for these
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    times = []
    for _ in range(4):
        y = a @ b
        torch.cuda.synchronize()
        start = time.perf_counter()
        y.backward(a)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e12


def text_config(model: str) -> dict:
    """Return the configuration of a model's decoder."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config)


def targets_of(model: str) -> list[str]:
    """Return the names of the linears that get an adapter: all of a layer's."""
    fused = text_config(model)["model_type"].startswith("phi3")
    return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if fused else TARGETS


def attention_of(model: str) -> str:
    """Return the attention that transformers + peft use: SDPA, but for Gemma 2, which transformers refuses to run with it."""
    return "eager" if text_config(model)["model_type"] == "gemma2" else "sdpa"


def load_ours(case: dict):
    """Return a function that runs one micro-batch of this toolkit and the learner behind it."""
    import torch

    import quantization_utils
    import train_qlora
    from config import load_config
    from fast_path import optimizers
    from toolkit import memory_plan

    overrides = {
        "model.name": case["model"],
        "lora.target_modules": f"[{', '.join(targets_of(case['model']))}]",
        "lora.dropout": str(case["dropout"]),
        "quantization.products": case["products"],
        "data.max_length": str(case["length"]),
        "training.batch_size": str(case["batch"]),
        "training.gradient_checkpointing": {"on": "true", "off": "false"}.get(
            case["checkpointing"], case["checkpointing"]
        ),
        **dict(pair.split("=", 1) for pair in [*case["set"], *(PLAIN if case["peer"] == "plain" else [])]),
    }
    config = load_config((), overrides)
    model, _ = quantization_utils.load_base(config, torch.device("cuda:0"))
    case["loaded_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
    case["load_peak_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    length, packed = case["length"], case["packed"]
    samples = [-(-length // packed)] * case["batch"] if packed else []

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    plan = memory_plan.unplanned(config, case["batch"], len(model.get_decoder().layers))
    shape = memory_plan.configured_shape(config)
    limit = case["cap"] * GIB + memory_plan.CONTEXT_BYTES if case["cap"] else None
    planned = memory_plan.plan_memory(
        shape, config, case["batch"], plan.checkpointed, limit=limit, offload=plan.offload, swapped=case["swapped"]
    )
    plan = dataclasses.replace(plan, kept=planned.kept, logit_chunk=planned.logit_chunk, swapped=planned.swapped)
    case["planned_gib"] = round(planned.reserved / GIB, 2)
    learner = train_qlora.build_learner(config, model, plan, say, samples)
    if case["attention"] == "mask":
        model.config.attention_choice = model.config.attention_choice._replace(varlen_samples=None)
    positions = (torch.arange(length, device="cuda") % (packed or length)).repeat(case["batch"], 1)
    learner.train()
    learner.zero_gradients()
    optimizer = optimizers.create_optimizer(
        learner.parameters, config.training, torch.device("cuda:0"), print, learner.memory
    )
    sequences = torch.arange(case["batch"])

    def micro_batch(step: int, ids: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": ids, "labels": ids}
        if packed:
            batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}
        return learner.micro_step(step, sequences, batch)

    return micro_batch, optimizer, learner.zero_gradients


def load_unsloth(case: dict):
    """Return the model as Unsloth documents it."""
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        case["model"],
        max_seq_length=max(2048, case["length"]),
        dtype=torch.bfloat16,
        load_in_4bit=True,
        local_files_only=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=case["dropout"],
        target_modules=targets_of(case["model"]),
        bias="none",
        use_gradient_checkpointing={"on": True, "off": False, "offload": "unsloth"}[case["checkpointing"]],
    )


def load_hf(case: dict):
    """Return the model as tutorials of transformers + peft have it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    AutoTokenizer.from_pretrained(case["model"])  # as everybody does, before the first step
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"dtype": torch.bfloat16, "device_map": {"": 0}, "attn_implementation": attention_of(case["model"])}
    model = AutoModelForCausalLM.from_pretrained(case["model"], quantization_config=quantization, **options)
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=case["checkpointing"] == "on",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": case["dropout"]}
    lora["target_modules"] = targets_of(case["model"])
    return get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))


def load_peer(case: dict):
    """The same for a peer, prepared the way it documents."""
    import bitsandbytes as bnb
    import torch

    model = (load_unsloth if case["peer"] == "unsloth" else load_hf)(case)
    model.train()
    optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def micro_batch(step: int, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach() * (ids.numel() - len(ids))

    return micro_batch, optimizer, optimizer.zero_grad


def run_single(case: dict, alone: Callable[[], None]) -> dict:
    """Return the case with the median milliseconds of a micro-batch, tokens a second and peak GiB."""
    if case["peer"] == "unsloth":
        import unsloth  # noqa: F401  (must be imported before transformers)
    ours = case["peer"] in ("ours", "plain")
    if ours:
        from toolkit.startup import after_heavy_imports, before_heavy_imports

        before_heavy_imports()
        import train_qlora  # noqa: F401

        after_heavy_imports()
    import torch

    context = confine(case)
    if case.get("parts"):
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=2_000_000)
    try:
        micro_batch, optimizer, zero = (load_ours if ours else load_peer)(case)
        if context:
            context.set_context()  # again: loading may have left it
        torch.manual_seed(0)
        times, vocabulary = [], text_config(case["model"])["vocab_size"]
        for step in range(case["steps"] + WARM_UP):
            if step == WARM_UP - 1:
                alone()
            ids = torch.randint(0, min(150_000, vocabulary), (case["batch"], case["length"]), device="cuda")
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = micro_batch(step, ids)
            torch.cuda.synchronize()
            if step >= WARM_UP:
                times.append(time.perf_counter() - start)
            if step % 4 == 1:
                optimizer.step()
                zero()
            if step == 1:
                torch.cuda.synchronize()
                case["first_s"] = round(time.time() - case["started"], 1)
        if case.get("profile"):
            profile(case, micro_batch, ids)
        if case.get("parts"):
            print_parts(torch.cuda.memory._snapshot())
        if ours:
            from fast_path.compiled import compiled_in_pieces

            case["pieces"] = compiled_in_pieces()  # a graph break costs speed and memory, and nothing else tells
        median = statistics.median(times)
        tokens = case["batch"] * case["length"]
        case |= {
            "ms": round(median * 1e3, 1),
            "tokens_per_s": round(tokens / median),
            "loss": round(loss.item() / tokens, 3),
        }
    except torch.OutOfMemoryError:
        case["error"] = "out of memory"
    case["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    case["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    if context and "error" not in case:
        case["tflops"] = round(backward_tflops())  # whether the confinement held to the end
    return case


PHASES = {  # by a piece of the kernel's name, the first that fits
    "dequantisation": "dequantize",
    "passes of adapters and norms": "widen|swiglu|settle|inverse_rms",
    "attention": "sdpa|flash|fmha|cudnn",
    "matrix products": "nvjet|cutlass|gemm|cublas|splitk",
    "gradients of norms, rotary, loss": "rotate|triton_|cross_entropy",
    "rest": "",
}


def floor_ms(case: dict, tflops: float) -> float:
    """Return the milliseconds that the base's matrix products take at the rate of one large product.

    Forward, recompute if checkpointed, and backward through frozen weights of 2.77e9 weights in linear layers; logits and their
    gradient through the head, 151,936 x 2,048 (Qwen2.5-3B).
    """
    passes = 3 if case["checkpointing"] == "on" else 2
    return case["batch"] * case["length"] * 2 * (passes * 2.774e9 + 2 * 0.311e9) / (tflops * 1e9)


def profile(case: dict, micro_batch, ids) -> None:
    """Print the GPU time of one micro-step by phase, beside the arithmetic floor, and by kernel, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as result:
        micro_batch(0, ids)
        torch.cuda.synchronize()
    kernels = sorted(result.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels) / 1e3
    print(f"GPU time of one micro-step: {total:.1f} ms in {sum(e.count for e in kernels)} kernels")
    phases = dict.fromkeys(PHASES, 0.0)
    for event in kernels:
        name = next(name for name, piece in PHASES.items() if re.search(piece, event.key, re.IGNORECASE))
        phases[name] += event.self_device_time_total / 1e3
    for name, milliseconds in phases.items():
        print(f"{milliseconds:9.2f} ms {milliseconds / total:6.1%}  {name}")
    tflops = backward_tflops()
    floor = floor_ms(case, tflops)
    print(f"{floor:9.2f} ms {floor / total:6.1%}  arithmetic floor at {tflops:.0f} TFLOP/s, measured")
    for event in kernels[:28]:
        print(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} x  {event.key[:110]}")


def maker(frames: list[dict]) -> str:
    """Return the innermost line of this repository, or of compiled code, that asked for memory: file, line, function."""
    for frame in frames:
        path, ours = Path(frame["filename"]), str(ROOT) in frame["filename"]
        if ours or frame["name"] == "call":
            return f"{path.name if ours else 'compiled'}:{frame['line']} {frame['name']}"
    return frames[0]["name"] if frames else "unknown"


def print_parts(snapshot: dict, most: int = 24) -> None:
    """Print what was allocated when most of it was: MiB by the line that asked for it, and MiB reserved by pool at the end."""
    living: dict[int, dict] = {}
    now = peak = 0
    held: list[dict] = []
    for event in snapshot["device_traces"][0]:
        if event["action"] == "alloc":
            living[event["addr"]] = event
            now += event["size"]
            if now > peak + 2**21:  # every 2 MiB is exact enough, and the list need not be copied each time
                peak, held = now, list(living.values())
        elif event["action"] == "free_requested" and event["addr"] in living:
            now -= living.pop(event["addr"])["size"]
    sizes, counts = Counter(), Counter()
    for event in held:
        place = maker(event.get("frames", []))
        sizes[place] += event["size"]
        counts[place] += 1
    print(f"allocated at the peak: {peak / 2**20:.0f} MiB")
    for place, size in sizes.most_common(most):
        print(f"{size / 2**20:9.1f} MiB {counts[place]:6d} x  {place[:80]}")
    pools, used = Counter(), Counter()
    for segment in snapshot["segments"]:
        pools[tuple(segment["segment_pool_id"])] += segment["total_size"]
        used[tuple(segment["segment_pool_id"])] += segment["allocated_size"]
    for pool, size in pools.items():
        print(f"pool {pool}: {size / 2**20:.0f} MiB reserved at the end, {used[pool] / 2**20:.0f} in use")


def table(results: list[dict]) -> str:
    """Return the results a row a case."""
    rows = [
        f"{'case':<34}{'peer':<9}{'ckpt':<9}{'dropout':<9}{'tok/s':>8}{'ms':>9}{'GiB':>8}{'planned':>9}{'first s':>9}"
    ]
    for r in results:
        name = (
            f"{r['batch']}x{r['length']}" + (f"@{r['sms']}" if r["sms"] else "") + (f"%{r['cap']}" if r["cap"] else "")
        )
        name = f"{r['name'][:14]} {name}"
        name += f" / {r['packed']} {r['attention']}" if r["packed"] else ""
        speed = f"{r['tokens_per_s']:>8}{r['ms']:>9}" if "ms" in r else f"{r.get('error', 'failed'):>17}"
        rows.append(
            f"{name:<34}{r['peer'] + ' fp8' * (r.get('products') == 'fp8'):<9}{r['checkpointing']:<9}{r['dropout']:<9}{speed}"
            f"{r.get('peak_reserved_gib', 0):>8}{r.get('planned_gib', 0):>9}{r.get('first_s', 0):>9}{'  in pieces' if r.get('pieces') else ''}"
            + (f"  {r['swapped']} swapped" if r.get("swapped") else "")
        )
    return "\n".join(rows)


def main() -> int:
    """Run every case in a process of its own and print the table."""
    args = parse()
    if args.single:
        case = json.loads(args.single)
        with turn(case) as alone:
            print("RESULT " + json.dumps(run_single(case, alone)))
        return 0
    names = [*SHAPES] if args.model == ["families"] else args.model
    cases = [case for text in names for case in cases_of(args, *peers_of(text, PEERS))]
    print(table(run_cases(cases, lambda case: run_process(case, args.timeout, args.unsloth_path), args.together)))
    return 0


def peers_of(text: str, known: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the model and its own peers, [] if it has none, of MODEL or MODEL=PEER,PEER; end the program for unknown ones."""
    name, _, own = text.partition("=")
    peers = [peer for peer in own.split(",") if peer]
    if wrong := {*peers} - {*known}:
        sys.exit(f"MODEL: expected peers of {', '.join(known)}, got {min(wrong)}")
    return name, peers


def cases_of(args: argparse.Namespace, model: str, own_peers: list[str]) -> list[dict]:
    """Return the cases of one model; end the program if one is written wrongly. own_peers: in the place of --peers."""
    cases = []
    for text in [args.profile] if args.profile else args.cases:
        match = re.fullmatch(r"(\d+)x(\d+)(?::(on|off|offload|\d+)(?:s(\d+))?)?(?:@(\d+))?(?:%([\d.]+))?", text)
        if not match:
            sys.exit(f"--cases: expected BATCHxLENGTH[:CKPT[sN]][@SMS][%GIB], got {text}")
        shape = {
            "batch": int(match[1]),
            "length": int(match[2]),
            "swapped": int(match[4] or 0),
            "sms": int(match[5] or 0),
            "cap": float(match[6] or 0),
        }
        peers = ["ours"] if args.packed or args.profile else own_peers or args.peers
        ways = args.attention if args.packed else [None]
        checkpointings = [match[3]] if match[3] else args.checkpointing
        each = itertools.product(peers, checkpointings, args.dropout, ways, args.products)
        for peer, checkpointing, dropout, way, products in each:
            if peer not in ("ours", "plain") and products != args.products[0]:
                continue
            if (checkpointing == "offload" and peer == "hf") or (checkpointing.isdigit() and peer in ("hf", "unsloth")):
                continue
            case = {"peer": peer, **shape, "checkpointing": checkpointing, "dropout": dropout, "model": model}
            case |= {"products": products} if peer in ("ours", "plain") else {}
            case |= {"packed": args.packed, "attention": way, "steps": args.steps, "set": args.set, "cold": args.cold}
            cases.append(case | {"profile": bool(args.profile), "parts": args.parts})
    return cases


def environment_of(case: dict, empty: str, unsloth_path: str = "") -> dict[str, str]:
    """Return the environment of a case's process. empty: a folder for what it compiles, if nothing older may serve.

    Unsloth always compiles into that folder: two of its processes would write the same files.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    new = CACHES if case.get("cold") else ["UNSLOTH_COMPILE_LOCATION"]
    if case["peer"] == "unsloth" and unsloth_path:
        environment["PYTHONPATH"] = unsloth_path
    return environment | {name: f"{empty}/{name}" for name in new}


def run_process(case: dict, timeout: int, unsloth_path: str = "") -> dict:
    """Run one case in a fresh process and return its result."""
    with tempfile.TemporaryDirectory() as empty:
        environment = environment_of(case, empty, unsloth_path)
        command = [sys.executable, __file__, case["model"], "--single", json.dumps(case | {"started": time.time()})]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
            output, complaint, reason = done.stdout, done.stderr, "failed"
        except subprocess.TimeoutExpired as error:
            output, complaint, reason = "", (error.stderr or b"").decode(errors="replace"), f"over {timeout} s"
    lines = output.splitlines()
    for line in lines:
        if not line.startswith("RESULT ") and (case.get("profile") or case.get("parts")):
            print(line)
    found = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
    result = found[0] if found else case | {"error": reason}
    if not found:
        print("\n".join(complaint.splitlines()[-12:]), file=sys.stderr)
    print(
        json.dumps({k: v for k, v in result.items() if k not in QUIET}),
        flush=True,
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
