"""The product of rows, sorted by expert, with packed experts as one Triton kernel, which unpacks tiles of them in registers.

Nothing unpacked is stored and nothing waits for the host: where each expert's rows end is read on the GPU.
"""

import functools
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import torch

from fast_path.nf4 import SHUFFLE, Launch, lane_level, levels, runs_on, tl, triton

if TYPE_CHECKING:
    from fast_path.experts import Experts

COLUMNS = 128  # outputs per tile


def layout(rows: int, experts: int) -> Launch:
    """Return the layout for so many rows. block_m: rows per tile, as an expert has on average; block_k: inputs.

    Tiles of 128 rows with 8 warps took 1.4 times as long for an expert's 128 rows (docs/measurements.md).
    """
    return Launch(block_m=min(64, max(16, 1 << (rows // experts).bit_length())), block_k=64, warps=4)


# ------------------------------------------------------------------------------------------------ the kernel


@triton.jit
def _tile(
    codes, absmax, absmax2, offset, code2, lut, level, row, block, first, rows, row_blocks, NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """Return the weights of these rows and quantisation blocks of an expert, fp32 [rows, columns]; 0 outside of it.

    first: the number of the expert's first block; row_blocks: blocks per row.
    """
    inside = (row < rows)[:, None] & (block < row_blocks)[None]
    place = first + row[:, None] * row_blocks + block[None]
    if NESTED:
        constant = tl.load(code2 + tl.load(absmax + place, mask=inside, other=0).to(tl.int32))
        constant = constant * tl.load(absmax2 + place // BLOCKSIZE2, mask=inside, other=0.0) + tl.load(offset)
    else:
        constant = tl.load(absmax + place, mask=inside, other=0.0)
    constant = tl.where(inside, constant, 0.0)
    word = place[:, :, None] * (BLOCKSIZE // 8) + tl.arange(0, BLOCKSIZE // 8)[None, None]
    words = tl.load(codes + word, mask=inside[:, :, None], other=0)
    w0, w1, w2, w3, w4, w5, w6, w7 = levels(words, lut, level, SHUFFLE)
    even = tl.interleave(tl.interleave(w0, w4), tl.interleave(w2, w6))
    odd = tl.interleave(tl.interleave(w1, w5), tl.interleave(w3, w7))
    values = tl.interleave(even, odd) * constant[:, :, None]
    return tl.reshape(values, (row.shape[0], block.shape[0] * BLOCKSIZE))


@triton.jit(do_not_specialize_on_alignment=["codes"])  # as in dequantize_kernel: a thread loads one word of eight codes
def expert_kernel(
    x, offsets, codes, absmax, absmax2, offset, code2, lut, y, experts, inputs, outputs, ACROSS: tl.constexpr,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """Write y [rows, outputs]: rows of x [rows, inputs] times the matrix of their expert, or its transpose (ACROSS).

    offsets: where the rows of each expert end. Grid: tiles of BLOCK_N outputs, tiles of BLOCK_M rows; an expert's last
    tile of rows may be partly filled, and there are more programs than tiles. EXPERTS: a power of two from `experts` on.
    """
    number, e = tl.program_id(1), tl.arange(0, EXPERTS)
    start = tl.load(offsets + e - 1, mask=(e > 0) & (e < experts), other=0)
    end = tl.load(offsets + e, mask=e < experts, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(tiles, 0)
    if number >= tl.sum(tiles, 0):
        return
    expert = tl.sum((upto <= number).to(tl.int32), 0)
    own = e == expert
    m = tl.sum(tl.where(own, start + (number - upto + tiles) * BLOCK_M, 0), 0) + tl.arange(0, BLOCK_M)
    inside = m < tl.sum(tl.where(own, end, 0), 0)
    columns, rows = (inputs, outputs) if ACROSS else (outputs, inputs)
    row_blocks = columns // BLOCKSIZE
    first = expert * rows * row_blocks
    level = lane_level(lut, SHUFFLE)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, inputs, BLOCK_K):
        i = k + tl.arange(0, BLOCK_K)
        left = tl.load(
            x + m.to(tl.int64)[:, None] * inputs + i[None], mask=inside[:, None] & (i < inputs)[None], other=0.0
        )
        if ACROSS:
            block = k // BLOCKSIZE + tl.arange(0, BLOCK_K // BLOCKSIZE)
            right = _tile(
                codes, absmax, absmax2, offset, code2, lut, level, n, block, first, rows, row_blocks, NESTED, BLOCKSIZE,
                BLOCKSIZE2, SHUFFLE,
            ).to(left.dtype)  # fmt: skip
            total = tl.dot(left, tl.trans(right), total)
        else:
            block = tl.program_id(0) * (BLOCK_N // BLOCKSIZE) + tl.arange(0, BLOCK_N // BLOCKSIZE)
            right = _tile(
                codes, absmax, absmax2, offset, code2, lut, level, i, block, first, rows, row_blocks, NESTED, BLOCKSIZE,
                BLOCKSIZE2, SHUFFLE,
            ).to(left.dtype)  # fmt: skip
            total = tl.dot(left, right, total)
    place = y + m.to(tl.int64)[:, None] * outputs + n[None]
    tl.store(place, total.to(y.dtype.element_ty), mask=inside[:, None] & (n < outputs)[None])


# ------------------------------------------------------------------------------------------------ its launch


def has_kernel(dtype: torch.dtype, device: torch.device, shape: list[int], blocksize: int) -> bool:
    """Return whether the kernel multiplies by experts of this shape, [experts, rows, columns], here."""
    return dtype in (torch.bfloat16, torch.float16) and runs_on(device) and shape[2] % blocksize == 0


@functools.cache
def levels_of(quant_type: str, device: torch.device) -> torch.Tensor:
    """Return the 16 levels of a 4-bit type, fp32."""
    return bnb.functional.get_4bit_type(quant_type, device=device)


def routed_product(
    x: torch.Tensor, offsets: torch.Tensor, W: "Experts", across: bool, launch: Launch | None = None
) -> torch.Tensor:
    """Return x [rows, inputs], sorted by expert, times the matrix of each row's expert; across: times its transpose.

    offsets: int32 [experts], where the rows of each expert end. The sums of an output are added in the same order each
    time.
    """
    experts, rows, columns = W.shape
    outputs = rows if across else columns
    launch, y = launch or layout(len(x), experts), x.new_empty(len(x), outputs)
    absmax, nested = W.constants[0], len(W.constants) > 1
    absmax2, offset, code2 = W.constants[1:] if nested else (absmax,) * 3
    # Each expert has at most one tile that is partly filled, and a tile has at least one row.
    grid = triton.cdiv(outputs, COLUMNS), min(len(x), len(x) // launch.block_m + experts)
    expert_kernel[grid](
        x, offsets, W.codes.flatten().view(torch.int32), absmax, absmax2, offset, code2, levels_of(W.quant_type, x.device), y,
        experts, columns if across else rows, outputs, ACROSS=across, NESTED=nested, BLOCKSIZE=W.blocksizes[0],
        BLOCKSIZE2=W.blocksizes[1], EXPERTS=triton.next_power_of_2(experts), BLOCK_M=launch.block_m, BLOCK_N=COLUMNS,
        BLOCK_K=launch.block_k, SHUFFLE=SHUFFLE, num_warps=launch.warps,
    )  # fmt: skip
    return y
