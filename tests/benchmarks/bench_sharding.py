"""A base divided among GPUs: a small model on two GPUs against one, then Llama-70B's shape with as many layers as fit.

torchrun is started by this script; each rank's peak memory is printed beside the plan's figure.

python tests/benchmarks/bench_sharding.py --skip-large          the small model alone
python tests/benchmarks/bench_sharding.py --skip-check          the large one, at most 240 s
python tests/benchmarks/bench_sharding.py --layers 8 --skip-check --set compile=off

--folder in main memory (a tmpfs of 48 GB) writes and reads all 80 layers in a minute; on a disk fewer may be ready in time.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
GIB = 2**30
START = time.perf_counter()
# Of meta-llama/Llama-3.1-70B's config.json.
LLAMA_70B = {
    "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SMALL = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "head_dim": 64}
SMALL |= {"num_attention_heads": 16, "num_key_value_heads": 4}


def seconds_so_far() -> float:
    return time.perf_counter() - START


DIVIDED = {"shard_base": "true"}


def say(*words: object) -> None:
    print(f"[{seconds_so_far():6.1f} s]", *words, flush=True)


# ------------------------------------------------------------------------------------------------ models


def configuration(sizes: dict):
    import transformers

    return transformers.LlamaConfig(**{**LLAMA_70B, **sizes}, tie_word_embeddings=False, dtype="bfloat16")


def with_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / "model" / name, folder / name)


def write_small(folder: Path) -> None:
    """Write a small model in 16 bit, so that loading packs and cuts its weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(configuration(SMALL)).to(torch.bfloat16).save_pretrained(folder)
    with_tokenizer(folder)


def layer_linears(sizes: dict) -> dict[str, tuple[int, int]]:
    h, i, kv = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_key_value_heads"] * sizes["head_dim"]
    q = sizes["num_attention_heads"] * sizes["head_dim"]
    return {
        "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
        "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
    }  # fmt: skip


def packed_layer(number: int, sizes: dict, device: str) -> dict:
    """Return a random decoder layer in bitsandbytes' 4 bit, made and packed on the device."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    generator, tensors = torch.Generator(device).manual_seed(number), {}
    for name, (out, into) in layer_linears(sizes).items():
        weight = torch.empty(out, into, device=device, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        key = f"model.layers.{number}.{name}.weight"
        tensors[key] = codes
        tensors |= {f"{key}.{part}": value for part, value in state.as_dict(packed=True).items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.{number}.{name}.weight"] = torch.ones(sizes["hidden_size"], dtype=torch.bfloat16)
    return tensors


def write_packed(folder: Path, sizes: dict, layers: int, seconds: float, device: str) -> int:
    """Write the model in 4 bit, a file per layer, until there are `layers` or the seconds are over; return how many."""
    import torch
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig

    until, where, futures = time.perf_counter() + seconds, {}, []
    width, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
    ends = {name: torch.empty(vocabulary, width, device=device, dtype=torch.bfloat16).normal_(0, 0.02).cpu()
            for name in ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip
    ends["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)

    def save(tensors: dict, name: str) -> None:  # copies wait for each other less in the threads
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})

    with ThreadPoolExecutor(6) as pool:
        done = 0
        for number in range(layers):
            free = shutil.disk_usage(folder).free
            if time.perf_counter() > until or free < 12 * GIB:
                break
            tensors = packed_layer(number, sizes, device)
            name = f"layer-{number}.safetensors"
            futures.append(pool.submit(save, tensors, name))
            where |= dict.fromkeys(tensors, name)
            done += 1
            if len(futures) > 8:  # main memory holds some layers at a time
                futures[-8].result()
        save_file(ends, folder / "ends.safetensors", {"format": "pt"})
        where |= dict.fromkeys(ends, "ends.safetensors")
        for future in futures:
            future.result()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = configuration({**sizes, "num_hidden_layers": done}).to_dict()
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    config |= {"architectures": ["LlamaForCausalLM"], "quantization_config": quantised.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    with_tokenizer(folder)
    return done


# ------------------------------------------------------------------------------------------------ one rank


def rank_main(argv: list[str]) -> int:
    """Run train_qlora.py in this process of torchrun, or alone, and print what memory it took."""
    import resource

    from toolkit.startup import after_heavy_imports, before_heavy_imports

    before_heavy_imports()  # as the script does: it decides how torch's allocator takes memory
    import torch

    import train_qlora
    from toolkit import memory

    after_heavy_imports()

    rank, loading = os.environ.get("RANK", "0"), train_qlora.load_base
    planned = []

    def load(*arguments, **named):
        start = time.perf_counter()
        model = loading(*arguments, **named)
        peak, left = torch.cuda.max_memory_allocated() / GIB, torch.cuda.memory_allocated() / GIB
        print(f"rank {rank}: loaded in {time.perf_counter() - start:.1f} s, peak {peak:.2f} GiB allocated, then {left:.2f}",
              flush=True)  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return model

    def plan_run(*arguments, **named):
        planned.append(run_plan(*arguments, **named))
        return planned[-1]

    def tell() -> None:  # of a run that is out of time, too
        while torch.cuda.is_available():
            time.sleep(10)
            reserved, allocated = torch.cuda.max_memory_reserved() / GIB, torch.cuda.max_memory_allocated() / GIB
            print(f"rank {rank}: peak so far {reserved:.2f} GiB reserved, {allocated:.2f} allocated", flush=True)

    threading.Thread(target=tell, daemon=True).start()
    train_qlora.load_base, run_plan, memory.plan_run = load, memory.plan_run, plan_run
    code = train_qlora.main(argv)
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    reserved, allocated = torch.cuda.max_memory_reserved() / GIB, torch.cuda.max_memory_allocated() / GIB
    outside = (total - free) / GIB - torch.cuda.memory_reserved() / GIB
    plan = planned[-1].reserved / GIB if planned else math.nan
    main_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"rank {rank}: exit code {code}; peak reserved {reserved:.2f} GiB (plan {plan:.2f}), allocated {allocated:.2f}; "
        f"outside torch {outside:.2f} GiB; main memory at most {main_memory:.1f} GiB",
        flush=True,
    )
    return code


def start(name: str, argv: list[object], processes: int, gpus: str, log: Path) -> tuple[subprocess.Popen, str, Path]:
    """Start train_qlora.py on these GPUs and return the process, its name and its log."""
    launch = (
        ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"] if processes > 1 else []
    )
    command = [sys.executable, *launch, str(Path(__file__).resolve()), "--rank", *map(str, argv)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "HF_HUB_OFFLINE": "1", "NCCL_NVLS_ENABLE": "0"}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env), name, log


def finished(job: tuple[subprocess.Popen, str, Path], seconds: float) -> bool:
    """Wait for a job, print what it said, and return whether it ended well."""
    process, name, log = job
    try:
        code: int | str = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes; a run first writes a checkpoint
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        code = "out of time"
    say(f"---- {name}: {code}")
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(line[:400] for line in lines[-75:]), flush=True)
    return code == 0


def compared(one: Path, two: Path) -> None:
    """Print how far apart two runs are: losses of each step, and the adapters."""
    from safetensors.torch import load_file

    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")] for folder in (one, two)]
    for a, b in zip(*rows, strict=True):
        name = "loss" if "loss" in a else "eval_loss"
        say(f"step {a['step']} {name}: {one.name} {a[name]:.6f}, {two.name} {b[name]:.6f}")
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    apart = sum((a[k] - b[k]).double().square().sum() for k in a) / sum(a[k].double().square().sum() for k in a)
    say(
        f"adapters of {one.name} and {two.name}: {apart.sqrt().item():.2e} of their size apart; names equal: {a.keys() == b.keys()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--seconds", type=float, default=235, help="for everything")
    parser.add_argument("--write-seconds", type=float, default=70, help="for writing layers, of which as many are used")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--limit-gib", type=float, default=79.5, help="of each card")
    parser.add_argument("--skip-check", action="store_true", help="leave out the small model")
    parser.add_argument("--skip-large", action="store_true", help="leave out Llama-70B's shape")
    parser.add_argument("--compile-check", action="store_true", help="compile the layers of the small model too")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the large run")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="sharding-", dir=options.folder))
    try:
        return measure(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def flags(**named: object) -> list[object]:
    """Return a command line's flags."""
    return [word for name, value in named.items() for word in (f"--{name}", value)]


def measure(options: argparse.Namespace, work: Path) -> int:
    """Run both parts. The small runs share the GPUs with the packing of the large model."""
    common = {
        "config": ROOT / "tiny" / "config.yaml",
        "compute_dtype": "bfloat16",
        "logging_steps": 1,
        "resume": "never",
    }
    base = flags(**common, max_eval_samples=60, gradient_checkpointing="true")
    jobs = [] if options.skip_check else start_small(options, work, base)
    layers = 0 if options.skip_large else write_large(options, work / "large")
    kept = 0 if options.skip_large else 60
    good = [finished(job, options.seconds - seconds_so_far() - kept) for job in jobs]
    for other in ("one", "whole") if jobs and all(good) else ():
        compared(work / other, work / "divided")
    if options.skip_large:
        return 0 if all(good) else 1
    run = base + flags(
        model_name=work / "large", max_length=options.length, batch_size=1, max_steps=3, shard_base="true"
    )
    run += flags(gradient_accumulation_steps=options.processes, memory_limit_gib=options.limit_gib)
    run += flags(**dict(pair.split("=", 1) for pair in options.set), output_dir=work / "out")
    name = f"{layers} layers of Llama-70B"
    job = start(name, run, options.processes, devices(options.processes), work / "large.log")
    return 0 if finished(job, options.seconds - seconds_so_far()) and all(good) else 1


def devices(processes: int) -> str:
    return ",".join(map(str, range(processes)))


def start_small(options: argparse.Namespace, work: Path, base: list[object]) -> list:
    """Start a small model's runs: one process, several with whole bases, and several that divide the base."""
    write_small(work / "small")
    check = base + flags(model_name=work / "small", batch_size=2 * options.processes, gradient_accumulation_steps=1)
    check += flags(max_length=512, max_steps=4, optim="adamw_torch", auto_fit="false", cuda_graphs="off")
    if not options.compile_check:  # three cold caches at a time would take most of the seconds
        check += flags(compile="off")
    jobs = []
    for name, count, more in (
        ("one", 1, {}),
        ("whole", options.processes, {}),
        ("divided", options.processes, DIVIDED),
    ):
        argv = check + flags(**more, output_dir=work / name)
        jobs.append(start(name, argv, count, devices(count), work / f"{name}.log"))
    return jobs


def write_large(options: argparse.Namespace, folder: Path) -> int:
    """Write as many layers of Llama-70B's shape as there is time for, and return how many."""
    import torch

    folder.mkdir()
    layers = write_packed(folder, LLAMA_70B, options.layers, options.write_seconds, f"cuda:{options.processes - 1}")
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    say(f"wrote Llama-70B's shape with {layers} of 80 layers in 4 bit: {size:.1f} GB")
    torch.cuda.empty_cache()
    return layers


if __name__ == "__main__":
    sys.exit(rank_main(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main())
