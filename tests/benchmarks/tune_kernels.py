"""Time the Triton kernels of fused_ops.py under several layouts, on the shapes of Qwen2.5-3B; its best go into *_launch there.

    python tests/benchmarks/tune_kernels.py [--rows 512 8192] [--dropout 0.05]      needs a GPU; about a minute

Prints microseconds, and the share of the time that moving the bytes once would take at the card's copy bandwidth.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bitsandbytes as bnb
import torch
from triton.testing import do_bench

import fused_ops

HIDDEN, MLP, RANK = 2048, 11008, 16


def bandwidth() -> float:
    """Return the card's copy bandwidth in bytes a second, read and write counted."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / (do_bench(lambda: b.copy_(a), return_mode="median") / 1e3)


def layouts(name: str):
    """Yield the layouts to try of a kernel."""
    if name == "widen":
        yield from itertools.product((16, 32, 64), (64, 128), (4,), (264, 1056))
    else:
        yield from itertools.product((32, 64), (64, 128), (4, 8), (528, 1056, 2112))


def tune(name: str, rows: int, swiglu: bool, members: int, p: float, peak: float) -> None:
    """Print the layouts of one kernel on one shape, the fastest first."""
    columns = MLP if swiglu else HIDDEN
    x = torch.randn(rows, columns * (2 if swiglu else 1), device="cuda", dtype=torch.bfloat16)
    A = [torch.randn(RANK, columns, device="cuda") for _ in range(members)]
    step = torch.zeros((), dtype=torch.int32, device="cuda")
    sequences = torch.arange(max(1, rows // 512), dtype=torch.int32, device="cuda")
    wide, _ = fused_ops.widen(x, A, step, sequences, step, 512, p, swiglu, True)
    moved = x.numel() * 2 + wide.numel() * 2 + (x.numel() * 2 if name == "backward" else 0)
    times = []
    for layout in layouts(name):
        setattr(fused_ops, f"{name}_launch", lambda *_, layout=layout: fused_ops.Launch(*layout))
        try:
            static = (A, step, sequences, step, 512, p, swiglu, True)
            if name == "widen":
                call = functools.partial(fused_ops.widen, x, *static)
            else:
                call = functools.partial(fused_ops.widen_backward, wide, x, *static)
            graph = torch.cuda.CUDAGraph()
            call()
            with torch.cuda.graph(graph):
                call()
            times.append((do_bench(graph.replay, warmup=5, rep=20, return_mode="median") * 1e3, layout))
        except Exception as error:  # too much shared memory for this card, say
            print(f"  {layout}: {type(error).__name__}")
    floor = moved / peak * 1e6
    print(f"{name} rows={rows} swiglu={swiglu} members={members} p={p}: floor {floor:.0f} us")
    for microseconds, layout in sorted(times)[:4]:
        print(f"  {microseconds:7.1f} us {floor / microseconds:5.0%}  block_m, block_k, warps, programs = {layout}")


def dequantise(peak: float) -> None:
    """Print the time of dequantising gate and up, ours and bitsandbytes' own."""
    packed, constants = [], []
    for _ in range(2):
        codes, state = bnb.functional.quantize_4bit(
            torch.randn(MLP, HIDDEN, device="cuda", dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True
        )
        packed.append(codes.view(torch.uint8).flatten())
        constants += fused_ops._constants(state)
    B = [torch.randn(MLP, RANK, device="cuda") for _ in range(2)]
    floor = 2 * MLP * HIDDEN * 2.516 / peak * 1e6
    static = (packed, constants, state.code, B, HIDDEN, 2.0, [64, 256], "nf4", torch.bfloat16)
    for kernels in (True, False):
        call = functools.partial(fused_ops.extended_weight, *static, kernels)
        microseconds = do_bench(call, return_mode="median") * 1e3
        print(
            f"dequantise gate and up, kernels={kernels}: {microseconds:.0f} us, {floor / microseconds:.0%} of the floor"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 8192])
    parser.add_argument("--dropout", type=float, default=0.05)
    args = parser.parse_args()
    peak = bandwidth()
    print(f"copy bandwidth {peak / 1e12:.2f} TB/s")
    dequantise(peak)
    for name, (swiglu, members), rows in itertools.product(("widen", "backward"), ((True, 1), (False, 2)), args.rows):
        tune(name, rows, swiglu, members, args.dropout, peak)


if __name__ == "__main__":
    main()
