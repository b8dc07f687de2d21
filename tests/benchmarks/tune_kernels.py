"""Time the Triton kernels of training under several layouts, on the shapes of Qwen2.5-3B; the best stand where Launch is used.

    python tests/benchmarks/tune_kernels.py [--rows 2048 8192] [--dropout 0.05] [--sms 24]      needs a GPU; minutes

Prints microseconds, and the share of the time that moving the bytes once would take at the card's copy bandwidth.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import torch
from bench_training import confine
from triton.testing import do_bench

from fast_path import attention, fused_linear, loss, nf4
from fast_path import packed_weights as packed_weights_module
from fast_path.packed_weights import operands, stack_adapters
from tests.fast_path.test_layers import packed_weights

HIDDEN, MLP, RANK, VOCABULARY = 2048, 11008, 16, 151936
HEADS, KV_HEADS, WIDTH = 16, 2, 128


def microseconds(call: Callable) -> float:
    """Return the median time of a call, replayed as a graph: launches cost nothing."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, warmup=5, rep=20, return_mode="median") * 1e3


def bandwidth() -> float:
    """Return the card's copy bandwidth in bytes a second, read and write counted."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / microseconds(lambda: b.copy_(a)) * 1e6


def tune(label: str, layouts, use: Callable, call: Callable, moved: float, peak: float) -> None:
    """Print the layouts of one kernel on one shape, the fastest first; use(launch) makes the toolkit take a layout."""
    times = []
    for layout in layouts:
        use(nf4.Launch(*layout))
        try:
            times.append((microseconds(call), layout))
        except Exception as error:  # too much shared memory for this card, say
            print(f"  {layout}: {type(error).__name__}")
    floor = moved / peak * 1e6
    print(f"{label}: floor {floor:.0f} us")
    for time, layout in sorted(times)[:3]:
        print(f"  {time:7.1f} us {floor / time:5.0%}  block_m, block_k, warps = {layout}")


def tune_rows(rows: int, swiglu: bool, members: int, p: float, peak: float) -> None:
    """Tune the kernels that pass over activations."""
    columns = MLP if swiglu else HIDDEN
    x = torch.randn(rows, columns * (2 if swiglu else 1), device="cuda", dtype=torch.bfloat16)
    A = stack_adapters([torch.randn(RANK, columns, device="cuda") for _ in range(members)], torch.bfloat16)
    zero = torch.zeros((), dtype=torch.int32, device="cuda")
    sequences = torch.arange(max(1, rows // 512), dtype=torch.int32, device="cuda")
    masks = fused_linear.Masks(zero, sequences, zero, 512, p)
    label = f"rows={rows} swiglu={swiglu} members={members} p={p}"
    tile = rows * columns * 2
    norm = None if swiglu else fused_linear.Norm(torch.rand_like(x[0]), fused_linear.inverse_rms(x, 1e-6, False))
    tune(
        f"widen with u {label}",
        itertools.product((16, 32, 64), (64, 128, 256), (4, 8)),
        lambda launch: setattr(fused_linear, "WIDEN", launch),
        functools.partial(fused_linear.widen, x, A, masks, 2.0, swiglu, True, norm),
        tile * (3 if swiglu else 2),
        peak,
    )
    wide = fused_linear.widen(x, A, masks, 2.0, swiglu, True)[0]
    if swiglu:
        return tune_swiglu_backward(label, wide, x, A, masks, peak)
    tune(
        f"backward with dA {label}",
        itertools.product((16, 32, 64), (64, 128), (1, 2, 4)),
        lambda launch: setattr(fused_linear, "MASKED_BACKWARD" if p > 0 else "WIDEN_BACKWARD", launch),
        functools.partial(fused_linear.widen_backward, wide, x, A, masks, True, norm),
        tile * (3 + 2 * (p > 0)),
        peak,
    )


def tune_swiglu_backward(label: str, wide, x, A, masks, peak: float) -> None:
    """Tune the kernel behind `swiglu_backward` and over how many rows its programs sum up; the sums' sum is counted."""
    rows, columns = len(x), A.shape[1]
    u, default = torch.randn(rows, 2 * RANK, device="cuda", dtype=x.dtype), fused_linear.share_rows
    before = fused_linear.Before(u, RANK)
    call = functools.partial(fused_linear.swiglu_backward, wide, x, A, masks, before, True)
    for shares in (None, 1, 2, 3, 4, 6, 8):
        if shares:
            fused_linear.share_rows = lambda *_, shares=shares: -(-rows // shares)
        tune(
            f"backward {label} shares={shares or 'as chosen'}",
            [*itertools.product((16,), (32, 64, 128), (2, 4, 8)), *itertools.product((32,), (64,), (4, 8))],
            lambda launch: setattr(fused_linear, "swiglu_launch", lambda *_: launch),
            call,
            rows * columns * 2 * 5,
            peak,
        )
    fused_linear.share_rows = default


def tune_rotate(rows: int, peak: float) -> None:
    """Tune the kernel behind `rotate`, there and back; the cosines stay in the L2 cache and are not counted."""
    batch, length = max(1, rows // 512), min(rows, 512)
    qkv = torch.randn(batch, length, (HEADS + 2 * KV_HEADS) * WIDTH, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(1, length, WIDTH, device="cuda", dtype=torch.bfloat16)
    parts = attention.rotate(qkv, angles, angles, HEADS, KV_HEADS, [], 0.0)
    for label, call in (
        ("rotate", functools.partial(attention.rotate, qkv, angles, angles, HEADS, KV_HEADS, [], 0.0)),
        ("rotate back", functools.partial(attention.rotate_backward, *parts, angles, angles, [], 0.0)),
    ):
        tune(
            f"{label} rows={rows}",
            itertools.product((8, 16, 32, 64), (64,), (2, 4, 8)),
            lambda launch: setattr(attention, "ROTATE", launch),
            call,
            2 * qkv.nbytes,
            peak,
        )


def tune_cross_entropy(rows: int, peak: float) -> None:
    """Tune the kernel of the loss on a chunk of logits, read twice and written once."""
    logits = torch.randn(rows, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    targets, losses = torch.randint(0, VOCABULARY, (rows,), device="cuda"), torch.empty(rows, device="cuda")
    tune(
        f"cross entropy rows={rows}",
        itertools.product((1,), (2048, 4096, 8192, 16384), (4, 8, 16, 32)),
        lambda launch: setattr(loss, "CROSS_ENTROPY", launch),
        functools.partial(loss.cross_entropy, logits, targets, losses, True),
        3 * logits.nbytes,
        peak,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--sms", type=int, default=0)
    args = parser.parse_args()
    context = confine({"sms": args.sms, "cap": 0})
    peak = bandwidth()
    print(f"copy bandwidth {peak / 1e12:.2f} TB/s")
    weights = packed_weights((MLP, MLP), HIDDEN, "nf4", True, "cuda", torch.bfloat16)
    A, B = ([torch.randn(shape, device="cuda")] * 2 for shape in ((RANK, HIDDEN), (MLP, RANK)))
    tune(
        "dequantise gate and up",
        itertools.product((64, 128, 256), (64,), (1, 2, 4, 8)),
        lambda launch: setattr(packed_weights_module, "DEQUANTIZE", launch),
        functools.partial(operands, weights, A, B, 2.0, torch.bfloat16, True),
        2 * MLP * HIDDEN * 2.516,
        peak,
    )
    for (swiglu, members), rows, p in itertools.product(((True, 1), (False, 2)), args.rows, args.dropout):
        tune_rows(rows, swiglu, members, p, peak)
    for rows in args.rows:
        tune_rotate(rows, peak)
    for rows in (512, 1024):
        tune_cross_entropy(rows, peak)
    del context


if __name__ == "__main__":
    main()
