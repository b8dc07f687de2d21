"""Time the kernels of a decode step one by one, and the whole step, each as a captured CUDA graph.

    python tests/benchmarks/bench_decode.py MODEL --batch 1 --sms 24 --layers 6

MODEL is a folder or the name of a shape (tests/benchmarks/shapes.py), of which --layers makes so many layers; copies of them stand for the others. A kernel's graph launches it once for each layer,
so that the weights of every launch come from memory: us is the time of one launch, and MB what it must read (4-bit
weights, their constants and the adapter). Shares are of 4.8 TB/s. The last line is the whole step. Processes with the same --turn
FILE load together and are timed one after the other.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bench_training import confine, turn
from shapes import SHAPES, folder_of, make

ROOT = Path(__file__).resolve().parents[2]
PEAK = 4.8e12


def timed(call: Callable[[], object], repeat: int = 7, inner: int = 5) -> float:
    """Return the median time of a call in us, as a replayed graph."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        start.record()
        for _ in range(inner):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / inner)
    return statistics.median(times)


def bytes_of(linears) -> float:
    """Return the bytes that a launch of some linears must read."""
    whole = 0
    for member in linears.members:
        nested, size, size2, _ = member.kind
        weights = member.rows * member.columns
        whole += weights / 2 + weights / size * (1 + 4 / size2 if nested else 4)
        whole += 2 * member.rank * (member.rows + member.columns)
    return whole


def parts_of(step, ids, position) -> dict[str, tuple[Callable[[], object], float, int]]:
    """Return for each kind of kernel: a call that launches it for every layer, a launch's bytes, and launches."""
    layers, scratch, embedding = step.layers, step.scratch, step.embedding
    hidden = embedding(ids)[:, 0].clone()
    starts, n = step.starts, len(step.layers)
    first = layers[0]

    def each(launch):
        return lambda: [launch(layer) for layer in layers]

    if step.single_layers:
        products = {
            "qkv": lambda a: a.qkv(hidden[0], scratch.qkv, a.down),
            "o": lambda a: a.out(hidden[0], a.gate_up.x, a.qkv, a.gate_up),
            "gate_up": lambda a: a.gate_up(hidden[0], a.down.x, a.out),
            "down": lambda a: a.down(hidden[0], a.qkv.x, a.gate_up, a.qkv),
        }
    else:
        products = {
            "qkv": lambda a: a.qkv(scratch.qkv),
            "o": lambda a: a.out(scratch.parts),
            "gate_up": lambda a: a.gate_up(a.down.x),
            "down": lambda a: a.down(scratch.parts),
        }
    linears = {"qkv": first.qkv, "o": first.out, "gate_up": first.gate_up, "down": first.down}
    found = {name: (each(call), bytes_of(linears[name]), n) for name, call in products.items()}
    angles = step.angles[0]
    found["attention"] = (each(lambda a: a.attend(position, starts, angles, scratch)), 0.0, n)
    head = step.head.weight
    found["head"] = (lambda: step.head(step.last), float(head.numel() * head.element_size()), 1)
    return found


@contextlib.contextmanager
def smaller(name: str, layers: int | None) -> Iterator[Path]:
    """Yield the folder of a model; a shape is made with so many layers."""
    if name in SHAPES and layers:
        SHAPES[name][1]["num_hidden_layers"] = layers
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            make(name, Path(folder))
            yield Path(folder)
    else:
        with folder_of(name) as folder:
            yield folder


def complete(layers, whole: int):
    """Return as many layers as the whole model has: those that there are and copies of them, each in memory of its own."""
    from torch import nn

    copies = [layers[i] if i < len(layers) else copy.deepcopy(layers[i % len(layers)]) for i in range(whole)]
    for i, layer in enumerate(copies):
        layer.self_attn.layer_idx = i
    return nn.ModuleList(copies)


def time_batch(model, batch: int, position: int, name: str) -> None:
    """Print the lines of one batch size."""
    import torch
    from transformers import StaticCache

    from fast_path.decode_step import DecodeStep

    config = model.config
    cache = StaticCache(config, max_cache_len=512)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, config.num_key_value_heads, size, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    step = DecodeStep(model, cache)
    ids = torch.randint(5, 1000, (batch, 1), device="cuda")
    at = torch.tensor([position], device="cuda")
    for kind, (call, size, launches) in parts_of(step, ids, at).items():
        us = timed(call) / launches
        rate = f"{size / us / 1e3:7.0f} GB/s {100 * size / us * 1e6 / PEAK:5.1f} %"
        print(f"{name} {kind:<10}{us:8.2f} us {size / 1e6:8.2f} MB {rate}", flush=True)
    whole, head = timed(lambda: step(ids, at)), timed(lambda: step.head(step.last))
    linears = [each for layer in step.layers for each in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    total = sum(map(bytes_of, linears)) + step.head.weight.nbytes
    print(
        f"{name} step of {len(step.layers)} layers {whole:.1f} us, {head:.1f} of them the head: {batch * 1e6 / whole:.1f} tokens/s, "
        f"{total / 1e6:.0f} MB at {total / whole / 1e3:.0f} GB/s {100 * total / whole * 1e6 / PEAK:.1f} %", flush=True,
    )  # fmt: skip


def main() -> int:
    """Load the model and time each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--sms", type=int, default=0)
    parser.add_argument("--layers", type=int, help="of a shape: how many get weights of their own")
    parser.add_argument("--position", type=int, default=192, help="positions in the cache")
    parser.add_argument("--turn", default="/dev/null")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with turn({"turn": args.turn}) as alone:
        layers = SHAPES[args.model][1]["num_hidden_layers"] if args.model in SHAPES else 0
        with smaller(args.model, args.layers) as folder:
            import torch
            from bench_generation import load_ours

            context = confine({"sms": args.sms, "cap": 0})
            model = load_ours(str(folder)).get_base_model()
        if context:
            context.set_context()
        from fast_path import families

        decoder = families.decoder_of(model)
        with torch.no_grad():
            decoder.layers = complete(decoder.layers, layers or len(decoder.layers))
        model.config.num_hidden_layers = whole = len(decoder.layers)
        if kinds := getattr(model.config, "layer_types", None):
            model.config.layer_types = [kinds[i % len(kinds)] for i in range(whole)]
        alone()
        with torch.no_grad():
            for batch in args.batch:
                name = f"{Path(args.model).name} batch {batch} @{args.sms or 'all'}"
                time_batch(model, batch, args.position, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
