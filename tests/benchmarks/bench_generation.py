"""Time generation with an adapter on a 4-bit base: this toolkit, transformers + peft, Unsloth if installed, and the merged
bfloat16 model in transformers.

    python tests/benchmarks/bench_generation.py MODEL --batch 1 32 --prompt 64 --new 256 --peers ours hf merged unsloth
    python tests/benchmarks/bench_generation.py MODEL --batch 1 --sms 24 --peers ours hf       a stand-in for a small card
    python tests/benchmarks/bench_generation.py MODEL --batch 1 --peers ours --check           greedy beside generate's
    python tests/benchmarks/bench_generation.py families --batch 1 --peers ours hf --together 6
    python tests/benchmarks/bench_generation.py qwen3-4b llama-3.2-3b --batch 1 --peers ours unsloth unsloth-graphs --together 6

MODEL is a folder, the name of a shape (tests/benchmarks/shapes.py) or `families`; more than one may be named, and with peers of
its own as in granite-3.3-2b=ours,unsloth.

unsloth-graphs is Unsloth with its decode graphs on; `replays` says how many steps they ran (none for a model type without them).
LoRA r = 16 on all seven projections, NF4 + double quantisation, bf16, random prompts, sampling at temperature 0.7 and
top_p 0.9. Each case runs in a process of its own and prints a JSON line; the table comes last. tokens/s are of whole
answers, the first token included, the median of --repeat calls after two that warm up; GB/s are of the steps after the
first token (weights once and the cache's filled positions). `start s`: from the process's start to the first token of
its first answer, worth something with --together 1 only. Compare only figures of one call on one machine. Memory is what the allocator reserved.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_training import attention_of, confine, environment_of, peers_of, run_cases, targets_of, turn
from shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("ours", "hf", "merged", "unsloth", "unsloth-graphs")
# Unsloth's decode graphs are off for a plain generate() and exist for the model types llama and qwen3 (its 2026.10.9); on, and
# with the cache allocated for the whole answer, it captures once instead of each time the cache grows.
DECODE_GRAPHS = {
    "unsloth": {"UNSLOTH_DECODE_CUDA_GRAPHS": "0"},
    "unsloth-graphs": {"UNSLOTH_DECODE_CUDA_GRAPHS": "1", "UNSLOTH_DECODE_GRAPH_PREALLOC": "1"},
}
GIB = 2**30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help=f"folder of a model, or families, or of these: {', '.join(SHAPES)}")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32], help="prompts together")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--sms", type=int, default=0, help="confine the process to this many multiprocessors")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=300, help="seconds a case may take")
    parser.add_argument("--together", type=int, default=1, help="processes that load at once; timed in turn")
    parser.add_argument("--unsloth-path", default="", metavar="PATH", help="PYTHONPATH of Unsloth's processes")
    parser.add_argument("--check", action="store_true", help="compare 32 greedy tokens of ours with generate's")
    parser.add_argument("--single", help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ models


def load_ours(model: str):
    """Return the model as inference_example.py loads it, with a fresh adapter."""
    from peft import get_peft_model

    from config import load_config
    from inference_example import load
    from quantization_utils import create_lora_config, keep_packing

    base, _ = load(load_config((), {"model.name": model}))
    keep_packing(base, keep=False)
    return get_peft_model(base, create_lora_config(rank=16, target_modules=targets_of(model))).eval()


def load_unsloth(model: str):
    """Return the model as Unsloth documents it for inference."""
    import torch
    from unsloth import FastLanguageModel

    base, _ = FastLanguageModel.from_pretrained(
        model, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": targets_of(model)}
    peft_model = FastLanguageModel.get_peft_model(base, **lora)
    FastLanguageModel.for_inference(peft_model)
    return peft_model


def load_transformers(model: str, merged: bool):
    """Return the model as tutorials have it: 4-bit with a peft adapter, or a merged one, which is a plain one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    AutoTokenizer.from_pretrained(model)  # as everybody does, before the first token
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model,
        quantization_config=None if merged else quantization,
        dtype=torch.bfloat16,
        device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
        attn_implementation=attention_of(model),
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets_of(model), task_type="CAUSAL_LM")
    return (base if merged else get_peft_model(base, lora)).eval()


# ------------------------------------------------------------------------------------------------ one case


def create_clock():
    """Return a stopping criterion that stops nothing and notes when each token came."""
    import torch
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def count(self) -> None:
            self.times.append(time.time())

        def __call__(self, input_ids, scores, **kwargs):
            self.count()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        stop = False

    return Clock()


def answer_with(case: dict, model):
    """Return a function that answers prompts, ids [batch, prompt], noting in a clock when the tokens come."""
    import torch
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "pad_token_id": 0}
    if case["peer"] == "ours":
        from toolkit.generation import Generator

        model.get_base_model().generation_config = GenerationConfig()
        generator = Generator(model, lambda line: print(line, file=sys.stderr))
        how = GenerationConfig(max_new_tokens=case["new"], **sampling)
        return lambda ids, clock: generator.generate(ids.tolist(), how, clock, None, case["batch"]), generator
    lengths = {"max_new_tokens": case["new"], "min_new_tokens": case["new"]}

    def answer(ids, clock):
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=[clock], **lengths, **sampling
            )

    return answer, None


def greedy_agreement(model, generator, ids) -> int:
    """Return how many of the first 32 greedy tokens are generate's, before the first that is not."""
    import torch
    from transformers import GenerationConfig

    how = GenerationConfig(max_new_tokens=32, do_sample=False, pad_token_id=0)
    ours = generator.generate(ids[:1].tolist(), how, create_clock())[0]
    with torch.no_grad():
        output = model.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), generation_config=how)
    theirs = output[0, ids.shape[1] :].tolist()
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), 32)


def run_single(case: dict, alone: Callable[[], None]) -> dict:
    """Return the case with its speeds, times and memory."""
    if case["peer"].startswith("unsloth"):
        import unsloth  # noqa: F401  (must be imported before transformers)
    sys.path.insert(0, str(ROOT))
    if case["peer"] == "ours":
        from toolkit.startup import after_heavy_imports, before_heavy_imports

        before_heavy_imports()
        import inference_example  # noqa: F401

        after_heavy_imports()
    import torch

    gpu = torch.cuda.is_available()
    context = confine(case) if gpu else None
    try:
        loaders = {"ours": load_ours, "unsloth": load_unsloth, "unsloth-graphs": load_unsloth}
        loader = loaders.get(case["peer"], lambda folder: load_transformers(folder, case["peer"] == "merged"))
        model = loader(case["model"])
        if context:
            context.set_context()  # again: loading may have left it
        answer, generator = answer_with(case, model)
        vocabulary, device = model.config.vocab_size, model.device
        wholes, firsts, steps = [], [], []
        for call in range(case["repeat"] + 2):
            if call == 1:
                alone()
            torch.manual_seed(call)
            ids = torch.randint(3, vocabulary - 2, (case["batch"], case["prompt"]), device=device)
            clock, start = create_clock(), time.time()
            answer(ids, clock)
            if call == 0:
                case["start_s"] = round(clock.times[0] - case["started"], 2)
            if call >= 2:
                wholes.append(clock.times[-1] - start)
                firsts.append(clock.times[0] - start)
                steps.append((clock.times[-1] - clock.times[0]) / max(1, len(clock.times) - 1))
        if gpu:
            torch.cuda.synchronize()
            case["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        case["tokens_per_s"] = round(case["batch"] * case["new"] / statistics.median(wholes), 1)
        case["first_ms"] = round(statistics.median(firsts) * 1e3, 1)
        case["step_ms"] = round(statistics.median(steps) * 1e3, 3)
        if case["peer"].startswith("unsloth"):
            states = [vars(module).get("_unsloth_decode_graphs") for module in model.modules()]
            case["replays"] = sum(state.replays for state in states if state)
        if generator and case["check"]:
            case["greedy_agree"] = greedy_agreement(model, generator, ids)
        from toolkit.generation import position_bytes, weight_bytes

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        read = weight_bytes(base) + case["batch"] * position_bytes(base) * (case["prompt"] + case["new"] / 2)
        case["gb_per_s"] = round(read / statistics.median(steps) / 1e9)
    except torch.OutOfMemoryError:
        case["error"] = "out of memory"
    return case


# ------------------------------------------------------------------------------------------------ all cases

COLUMNS = ("tokens_per_s", "first_ms", "step_ms", "gb_per_s", "reserved_gib", "start_s")


def run_process(case: dict, timeout: int, unsloth_path: str) -> dict:
    """Run one case in a fresh process and return its result."""
    case["started"] = time.time()
    command = [sys.executable, __file__, case["model"], "--single", json.dumps(case)]
    with tempfile.TemporaryDirectory() as empty:
        environment = environment_of(case | {"peer": case["peer"].removesuffix("-graphs")}, empty, unsloth_path)
        environment |= DECODE_GRAPHS.get(case["peer"], {})
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        except subprocess.TimeoutExpired:
            print(f"{case['name']} {case['peer']}: over {timeout} s", file=sys.stderr, flush=True)
            return case | {"error": f"over {timeout} s"}
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = found[0] if found else case | {"error": "failed"}
    print("\n".join(done.stderr.splitlines()[-12 if not found else -3 :]), file=sys.stderr)
    print(
        json.dumps({k: v for k, v in result.items() if k not in ("model", "started", "check", "turn", "cap")}),
        flush=True,
    )
    return result


def table(results: list[dict]) -> str:
    """Return the results a row a case."""
    rows = [f"{'model':<15}{'prompts':>8}{'sms':>5}  {'peer':<15}" + "".join(f"{name:>14}" for name in COLUMNS)]
    for r in results:
        cells = "".join(f"{r.get(name, '-'):>14}" for name in COLUMNS)
        agree = f"  {r['greedy_agree']} of 32 greedy tokens are generate's" if "greedy_agree" in r else ""
        replays = f"  {r['replays']} steps by graphs" if "replays" in r else ""
        rows.append(
            f"{r['name'][:14]:<15}{r['batch']:>8}{r['sms']:>5}  {r['peer']:<15}{cells}{agree}{replays} {r.get('error', '')}".rstrip()
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
    settings = {name: getattr(args, name) for name in ("prompt", "new", "sms", "repeat", "check")} | {"cap": 0}
    names = [*SHAPES] if args.model == ["families"] else args.model
    cases = [
        {"peer": peer, "batch": batch, "model": name, **settings}
        for name, own in (peers_of(text, PEERS) for text in names)
        for batch, peer in itertools.product(args.batch, own or args.peers)
    ]
    print(table(run_cases(cases, lambda case: run_process(case, args.timeout, args.unsloth_path), args.together)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
