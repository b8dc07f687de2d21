"""Time and check products in FP8 beside bfloat16, on the operators of a layer of Qwen2.5-3B (quantization.products).

    python tests/benchmarks/bench_fp8.py [--rows 2048 8192] [--sms 24] [--tiles]      needs a GPU with FP8; a minute

Microseconds of graph replays: each operator as a whole, forward and backward, then the pieces of the FP8 one; before that the
distance of y, dx and the adapters' gradients from fp32, in both number formats. --tiles: layouts of `product_kernel` too.
"""

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import torch
from bench_training import confine
from triton.testing import do_bench

from fast_path import fp8, fused_linear, nf4
from fast_path.fused_linear import Masks, Norm
from fast_path.packed_weights import Packed, dequantize, operands
from tests.fast_path.test_layers import apart, packed_weights

RANK = 16
# name: (outputs of the members, columns, whether SwiGLU is before it, whether a norm is)
OPERATORS = {
    "q, k, v": ((2048, 256, 256), 2048, False, True),
    "o": ((2048,), 2048, False, False),
    "gate, up": ((11008, 11008), 2048, False, True),
    "down": ((2048,), 11008, True, False),
}


def microseconds(call: Callable) -> float:
    """Return the median time of a call, replayed as a graph: launches cost nothing."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, warmup=5, rep=25, return_mode="median") * 1e3


def inputs(rows: int, name: str):
    """Return x, weights, A, B, masks and norm of an operator; a few channels of x are 100 times the rest."""
    outputs, columns, swiglu, has_norm = OPERATORS[name]
    torch.manual_seed(0)
    weight = packed_weights(outputs, columns, "nf4", True, "cuda", torch.bfloat16)
    weight = weight._replace(row_scales=fp8.row_scales(weight))
    x = torch.randn(rows, columns * (2 if swiglu else 1), device="cuda").bfloat16()
    x[:, [3, 700, 1500]] *= 100
    A = [torch.randn(RANK, columns, device="cuda") * columns**-0.5 for _ in outputs]
    B = [torch.randn(n, RANK, device="cuda") * 0.02 for n in outputs]
    zero = torch.zeros((), dtype=torch.int32, device="cuda")
    masks = Masks(zero, torch.arange(max(1, rows // 512), dtype=torch.int32, device="cuda"), zero, 512, 0.0)
    norm = Norm(torch.rand_like(x[0]) + 0.5, fused_linear.inverse_rms(x, 1e-6, True)) if has_norm else None
    return x, weight, A, B, masks, norm


def operands_of(weight: Packed, A, B) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B and A of the members as operands in bfloat16."""
    return operands(weight, A, B, 1.0, torch.bfloat16, True, only_adapters=True)


def both_passes(x, weight: Packed, A, B, masks, norm, swiglu: bool, kernels: bool = True):
    """Return functions that run the operator's forward and its backward pass."""
    norm = [] if norm is None else list(norm)
    grad = torch.randn(len(x), weight.codes.numel() * 2 // weight.columns, device="cuda").bfloat16().to(x.dtype)

    def forward():
        return fused_linear.linear(
            x, A, B, None, 2.0, norm, False, swiglu, None, [], *weight, *masks, kernels, 1, "silu", False
        )

    u = forward()[1]

    def backward():
        return fused_linear.linear_backward(
            grad, x, u, A, B, 2.0, norm, False, swiglu, None, [], *weight, *masks, kernels, 1, "silu"
        )

    return forward, backward


def errors(rows: int, name: str) -> None:
    """Print how far y, dx and the gradients of the adapters are from fp32."""
    x, weight, A, B, masks, norm = inputs(rows, name)
    swiglu, exact = OPERATORS[name][2], norm and Norm(norm.weight.float(), norm.inverse)
    plain = weight._replace(row_scales=None)
    torch.manual_seed(1)
    forward, backward = both_passes(x.float(), plain, A, B, masks, exact, swiglu, kernels=False)
    want = forward()[0], *backward()
    for label, own, mode in (("bf16", plain, True), ("fp8", weight, True), ("fp8, fast sums", weight, False)):
        fp8.EXACT = mode
        torch.manual_seed(1)
        forward, backward = both_passes(x, own, A, B, masks, norm, swiglu)
        found = forward()[0], *backward()
        distances = " ".join(
            f"{what} {apart(a, b):.5f}" for what, a, b in zip(("y", "dx", "dA", "dB"), found, want, strict=True)
        )
        print(f"  {name:<9} {label:<15} {distances}", flush=True)
    fp8.EXACT = False


def times(rows: int, name: str, total: dict[str, float]) -> None:
    """Print microseconds of the operator in both formats, then of the FP8 one's pieces."""
    x, weight, A, B, masks, norm = inputs(rows, name)
    swiglu, plain = OPERATORS[name][2], weight._replace(row_scales=None)
    line = []
    for label, own in (("bf16", plain), ("fp8", weight)):
        for which, call in zip(("fw", "bw"), both_passes(x, own, A, B, masks, norm, swiglu), strict=True):
            spent = microseconds(call)
            total[label] = total.get(label, 0.0) + spent
            line.append(f"{label} {which} {spent:.0f}")
    print(f"  {name:<9} whole: {', '.join(line)}", flush=True)
    pieces(x, weight, A, B, masks, norm, swiglu)


def pieces(x, weight, A, B, masks, norm, swiglu) -> None:
    """Print the microseconds of the steps of an operator."""
    own, stacked = operands_of(weight, A, B)
    x8, scales, u = fused_linear.narrow(x, stacked, masks, 2.0, swiglu, True, norm)
    W, Wt = (fp8.unpack(weight, transposed, True) for transposed in (False, True))
    grad = torch.randn(len(x), len(W), device="cuda").to(x.dtype)
    none, read = fused_linear.no_masks(grad), torch.randn(len(x), W.shape[1], device="cuda").to(x.dtype)
    grad8, grad_scales, _ = fused_linear.narrow(grad, own.t(), none, 1.0, False, True, folded=weight.row_scales)
    wide = operands(weight, A, B, 1.0, x.dtype, True)[0]
    dense = dequantize(weight, torch.bfloat16)
    steps = {
        "operands bf16": lambda: operands(weight, A, B, 1.0, x.dtype, True),
        "widen bf16": lambda: fused_linear.widen(x, stacked, masks, 2.0, swiglu, True, norm),
        "mm bf16 fw": lambda: torch.mm(torch.empty(len(x), wide.shape[1], device="cuda", dtype=x.dtype), wide.t()),
        "mm bf16 bw": lambda: grad @ dense,
        "adapters": lambda: operands_of(weight, A, B),
        "u": lambda: fused_linear.adapters_product(read, stacked, 2.0),
        "du": lambda: fused_linear.adapters_product(grad, own.t(), 1.0),
        "unpack": lambda: fp8.unpack(weight, False, True),
        "unpack T": lambda: fp8.unpack(weight, True, True),
        "narrow x": lambda: fused_linear.narrow(x, stacked, masks, 2.0, swiglu, True, norm),
        "narrow dy": lambda: fused_linear.narrow(grad, own.t(), none, 1.0, False, True, folded=weight.row_scales),
        "addmm": lambda: torch.empty(len(x), len(W), device="cuda", dtype=x.dtype).addmm_(u, own.t()),
        "kernel+u fw": lambda: fp8._product_kernel(x8, scales, W, weight.row_scales, x.dtype, u, own, None, False),
        "kernel fw": lambda: fp8._product_kernel(x8, scales, W, weight.row_scales, x.dtype, None, None, None, False),
        "kernel bw": lambda: fp8._product_kernel(grad8, grad_scales, Wt, None, x.dtype, None, None, None, False),
    }
    if torch.cuda.get_device_capability()[0] == 9 and sys.platform != "win32":
        ones = torch.ones(len(Wt), device="cuda")
        for fast in (False, True):
            options = {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
            steps[f"scaled_mm fw{' fast' * fast}"] = lambda options=options: torch._scaled_mm(
                x8, W.t(), scales[:, None], weight.row_scales[None], **options
            )
            steps[f"scaled_mm bw{' fast' * fast}"] = lambda options=options: torch._scaled_mm(
                grad8, Wt.t(), grad_scales[:, None], ones[None], **options
            )
    print("     " + ", ".join(f"{step} {microseconds(call):.0f}" for step, call in steps.items()), flush=True)


def tiles(rows: int) -> None:
    """Print the microseconds of `product_kernel` and of the pass that quantises in several layouts, and the best of each."""
    layouts = [(128, 128, 128, 4, 3, False, 8), (128, 128, 128, 4, 3, True, 8), (128, 128, 128, 4, 3, True, 32)]
    layouts += [(128, 256, 128, 8, 3, True, 8), (128, 256, 128, 8, 4, True, 8), (256, 128, 128, 8, 3, True, 8)]
    spent = dict.fromkeys(layouts, 0.0)
    for (outputs, inner), layout in itertools.product(((22016, 2048), (2048, 11008)), layouts):
        a, a_scales = fp8.quantise_rows(torch.randn(rows, inner, device="cuda"))
        b, b_scales = fp8.quantise_rows(torch.randn(outputs, inner, device="cuda"))
        u, B = (torch.randn(n, 32, device="cuda").bfloat16() for n in (rows, outputs))
        operands = a, a_scales, b, b_scales, torch.bfloat16, u, B, None, False
        spent[layout] += timed(f"product {outputs}x{inner} {layout}", fp8._product_kernel, *operands, tile_of(layout))
    print("BEST product", *min(spent, key=spent.get), flush=True)
    layouts = ((1, 1024, 4), (1, 2048, 8), (1, 4096, 16), (1, 2048, 16))
    spent = dict.fromkeys(layouts, 0.0)
    for name, layout in itertools.product(("gate, up", "down"), layouts):
        x, weight, A, B, masks, _ = inputs(rows, name)
        own, stacked = operands_of(weight, A, B)
        if name == "down":
            arguments, how = (x, stacked, masks, 2.0, True, True), {}
        else:
            grad = torch.randn(rows, len(own), device="cuda").bfloat16()
            arguments = grad, own.t(), fused_linear.no_masks(grad), 1.0, False, True
            how = {"folded": weight.row_scales}
        launch = nf4.Launch(*layout)
        with mock.patch.object(fused_linear, "narrow_launch", lambda *_, own=launch: own):
            spent[layout] += timed(
                f"narrow of {name} {layout}", functools.partial(fused_linear.narrow, **how), *arguments
            )
    print("BEST narrow", *min(spent, key=spent.get), flush=True)


def tile_of(layout: tuple[int, ...]) -> dict[str, int]:
    """Return a layout as the arguments of a launch."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "DESCRIBED", "GROUP")
    return dict(zip(names, layout, strict=True))


def timed(label: str, call: Callable, *arguments) -> float:
    """Print and return the microseconds of a call; infinity if the card has too little shared memory for it."""
    try:
        spent = microseconds(functools.partial(call, *arguments))
    except Exception as error:
        print(f"  {label}: {type(error).__name__}", flush=True)
        return math.inf
    print(f"  {label}: {spent:.0f} us", flush=True)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[8192])
    parser.add_argument("--sms", type=int, default=0)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    args = parser.parse_args()
    context = confine({"sms": args.sms, "cap": 0})
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, sms {args.sms or 'all'}", flush=True)
    if not args.no_errors:
        for name in OPERATORS:
            errors(1024, name)
    for rows in args.rows:
        total: dict[str, float] = {}
        print(f"{rows} rows, microseconds", flush=True)
        if args.tiles:
            tiles(rows)
        for name in OPERATORS:
            times(rows, name, total)
        print(
            f"  a layer's operators: {', '.join(f'{label} {spent:.0f}' for label, spent in total.items())}", flush=True
        )
    del context


if __name__ == "__main__":
    main()
