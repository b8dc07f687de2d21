"""Time the products of a layer's experts in 4 bit, and the parts they consist of, on this GPU.

    python tests/benchmarks/bench_experts.py                       Qwen3-30B-A3B's layer, 2,048 tokens
    python tests/benchmarks/bench_experts.py --tokens 8192 --experts 128 --each 8 --hidden 2048 --inner 768

A line per part and tensor: milliseconds, and the share of the bytes or FLOP that a data sheet promises is left to the reader.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from toolkit.startup import after_heavy_imports, before_heavy_imports

before_heavy_imports()

import torch
import torch.nn.functional as F

from fast_path import expert_kernel, experts
from fast_path.expert_store import pinned
from fast_path.nf4 import Launch
from quantization_utils import create_bnb_config

after_heavy_imports()


def milliseconds(call: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def show(name: str, call: Callable[[], object]) -> None:
    try:
        print(f"{name:<58}{milliseconds(call):9.3f} ms", flush=True)
    except Exception as error:  # a part that this GPU lacks
        print(f"{name:<58} {type(error).__name__}: {str(error).splitlines()[0][:90]}", flush=True)


def one_by_one(x: torch.Tensor, offsets: torch.Tensor, W: experts.Experts, across: bool) -> torch.Tensor:
    """Return the products of experts that are unpacked one after the other, as on a GPU with neither kernel nor grouped product."""
    ends = [0, *offsets.tolist()]
    wanted = [number for number in range(W.shape[0]) if ends[number] < ends[number + 1]]
    parts = zip(wanted, W.each(wanted, x.dtype), strict=True)
    return torch.cat([x[ends[n] : ends[n + 1]] @ (w.T if across else w) for n, w in parts])


def measure(options: argparse.Namespace, name: str, shape: list[int]) -> None:
    device = torch.device("cuda", 0)
    rows = options.tokens * options.each
    with torch.device(device):
        parameter = experts.packed(torch.randn(shape, dtype=torch.bfloat16) * 0.02, create_bnb_config())
    parameter = parameter.to(device)
    W = experts.operand(parameter)
    numbers = torch.randint(0, shape[0], (rows,), device=device).sort().values
    offsets = torch.searchsorted(numbers, torch.arange(shape[0], device=device), right=True).int()
    x = torch.randn(rows, shape[2], device=device, dtype=torch.bfloat16)
    g = torch.randn(rows, shape[1], device=device, dtype=torch.bfloat16)
    dense = W.dense(torch.bfloat16)
    print(f"-- {name} {shape}, {rows} rows, {2 * rows * shape[1] * shape[2] / 1e9:.0f} GFLOP", flush=True)
    show("constants, by bitsandbytes", lambda: W.absmax())
    absmax = W.absmax()
    theirs = experts._unpacked(W.codes, absmax, W, torch.bfloat16)
    apart = (theirs.float() - dense.float()).abs()
    most = float((apart / theirs.float().abs().clamp(min=1e-9)).max())
    print(
        f"   ours differs in {int((apart > 0).sum())} of {apart.numel()} values, at most by {most:.1e} of one",
        flush=True,
    )
    del theirs, apart
    show("unpack all, by bitsandbytes", lambda: experts._unpacked(W.codes, absmax, W, torch.bfloat16))
    show("unpack all, our kernel", lambda: W.dense(torch.bfloat16))
    show("grouped product, forward", lambda: F.grouped_mm(x, dense.transpose(1, 2), offs=offsets))
    show("grouped product, backward", lambda: F.grouped_mm(g, dense, offs=offsets))
    show("one matrix of the same FLOP, forward", lambda: x @ dense[0].T)
    show("unpack + loop, forward", lambda: one_by_one(x, offsets, W, True))
    show("unpack + loop, backward", lambda: one_by_one(g, offsets, W, False))
    reference = F.grouped_mm(x, dense.transpose(1, 2), offs=offsets), F.grouped_mm(g, dense, offs=offsets)
    for launch in itertools.starmap(Launch, ((128, 64, 8), (64, 64, 4), (64, 64, 8))):
        for a, across, expected in ((x, True, reference[0]), (g, False, reference[1])):
            try:
                y = expert_kernel.routed_product(a, offsets, W, across, launch)
            except Exception as error:
                print(f"   {launch}: {type(error).__name__}", flush=True)
                continue
            off = float((y - expected).float().norm() / expected.float().norm())
            way = "forward" if across else "backward"
            name = f"our kernel {launch.block_m, launch.block_k, launch.warps}, {way}, off by {off:.1e}"
            show(name, lambda a=a, b=across, c=launch: expert_kernel.routed_product(a, offsets, W, b, c))
    few, ends = x[: options.each], torch.arange(1, shape[0] + 1, device=device).clamp(max=options.each).int()
    wanted = torch.arange(options.each, device=device)
    plain = torch.bmm(few[:, None], dense[wanted].transpose(1, 2))[:, 0]
    off = float((expert_kernel.routed_product(few, ends, W, True) - plain).float().norm() / plain.float().norm())
    show(f"a token, our kernel, off by {off:.1e}", lambda: expert_kernel.routed_product(few, ends, W, True))
    show("a token, its experts unpacked", lambda: torch.bmm(few[:, None], W.some(wanted, few.dtype).transpose(1, 2)))
    show("expert_product, forward", lambda: experts.expert_product(x, offsets, *W, True))
    show("expert_product, backward", lambda: experts.expert_product(g, offsets, *W, False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 2048, "experts": 128, "each": 8, "hidden": 2048, "inner": 768}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(0), torch.__version__, flush=True)
    measure(options, "gate_up_proj", [options.experts, 2 * options.inner, options.hidden])
    measure(options, "down_proj", [options.experts, options.hidden, options.inner])
    size = 3 * options.experts * options.hidden * options.inner // 2
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    for name, buffer in (
        ("cudaHostRegister", pinned(size)),
        ("torch's pin_memory", torch.empty(size, dtype=torch.uint8, pin_memory=True)),
    ):
        time = milliseconds(lambda buffer=buffer: there.copy_(buffer, non_blocking=True))
        print(f"copy of a layer's codes to the GPU, {name}: {time:.3f} ms, {size / time / 1e6:.1f} GB/s", flush=True)
    x = torch.randn(options.tokens * options.each, options.hidden, device="cuda", dtype=torch.bfloat16)
    order = torch.randperm(len(x), device="cuda")
    show("rows by expert: gather", lambda: x[order // options.each])
    show("rows of a token: gather and sum", lambda: x[order].view(-1, options.each, x.shape[1]).sum(1))
    show(
        "sort of the experts' numbers", lambda: torch.sort(torch.randint(0, 128, (len(x),), device="cuda"), stable=True)
    )


if __name__ == "__main__":
    main()
