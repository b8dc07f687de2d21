"""Operators for 4-bit linears that read the same x, together with their adapters; each has its own backward pass."""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import bitsandbytes  # noqa: F401  (registers the operators that dequantise without Triton)
import torch
import torch.nn.functional as F

from fast_path import fp8, fp8_kernels, training_kernels
from fast_path.dropout import drop_threshold, dropout_mask
from fast_path.nf4 import INTERPRETED, Launch, multiprocessors, triton
from fast_path.packed_weights import Packed, Piece, adapter_columns, dot_size, operand_columns, operands

# ------------------------------------------------------------------------------------------------ layouts of the kernels


# The measurements behind these layouts are in docs/measurements.md, "Constants in the code".
# A smaller block_k is slower.
WIDEN = Launch(block_m=16, block_k=128, warps=4)
# With at most this number of adapter columns, u = x A^T is computed in the pass that copies x, so that x is not read a
# second time. With more columns (q, k and v have 48 at rank 16) a separate product is faster.
MOST_WIDEN_COLUMNS = 32
# The pass that quantises takes a row per program, a chunk of it at a time: 8 columns, 16 bytes, per thread. It holds this
# many chunks in registers, enough for 28,672 columns; longer rows are read twice.
MOST_HELD = 14
WIDEST_NARROW = 16384  # columns up to which SwiGLU's rows take 16 warps, whose threads have 128 registers
# With at most this number of adapter columns an own kernel computes u from what that pass read; else cuBLAS does.
MOST_THIN_COLUMNS = 64
# Of that kernel: from THIN_FULL programs per multiprocessor on, one has all columns of its rows; with fewer, the columns are
# shared so that there are about THIN_PROGRAMS. Each share writes sums of its own, which are added up afterwards.
THIN_FULL, THIN_PROGRAMS, MOST_THIN_SHARES = 0.9, 2.5, 16
WIDEN_BACKWARD = Launch(block_m=64, block_k=64, warps=4)
MASKED_BACKWARD = Launch(block_m=16, block_k=64, warps=2)
# The most adapter columns for which SwiGLU's backward runs as a kernel. It holds three sums [columns, block_k] in
# registers; with 256 columns it uses 220 of the 255 registers of a thread on sm_89 (Triton 3.6), and on sm_90 all and 184
# to 264 bytes of memory per thread. With more columns torch calls compute it, with copies in fp32.
MOST_COLUMNS = 256
SETTLE_BLOCK = 1024
# The fewest rows per share of the kernel behind `swiglu_backward`. Each share writes sums of its own, 192 bytes per
# column at rank 16; with this number of rows they are 8 % of the bytes that the share reads and writes.
SHARE_ROWS = 256
# Programs of four warps per multiprocessor: as many of that kernel as fit its registers at rank 16.
SHARE_PROGRAMS = 4
START_ROWS = 40  # a program's start and its sums cost about what so many rows do
MOST_SHARES = 6  # whose sums are added up afterwards


def widen_share(rows: int, columns: int, device: torch.device) -> int:
    """Return over how many columns each program of the kernel behind `widen` sums up u.

    With few rows there would be few programs, and most multiprocessors would have no work. So with few rows each
    program takes fewer columns, and several programs share a row.
    """
    shares = max(1, SHARE_PROGRAMS * multiprocessors(device) // triton.cdiv(rows, WIDEN.block_m))
    return min(2048, triton.cdiv(columns, 512 * shares) * 512)


def swiglu_launch(columns: int, dropout: bool, activation: str, hopper: bool) -> Launch:
    """Return the layout of the kernel behind `swiglu_backward`. columns: the adapter columns of its largest sum."""
    if columns <= 16 and dropout:
        return Launch(block_m=16, block_k=32, warps=2)
    if columns <= 16 and activation == "silu":
        return Launch(block_m=32, block_k=64, warps=4)
    if columns <= 32:
        return Launch(block_m=16, block_k=128, warps=8)
    if columns <= 64:
        return Launch(block_m=16, block_k=64, warps=4)
    if hopper:
        return Launch(block_m=16, block_k=64, warps=8)
    return Launch(block_m=32, block_k=32, warps=8) if columns <= 128 else Launch(block_m=16, block_k=16, warps=8)


def narrow_launch(columns: int, swiglu: bool = False) -> Launch:
    """Return the layout of the pass that quantises: one row per program, and a chunk of it at a time."""
    if swiglu and 8192 < columns <= WIDEST_NARROW:
        return Launch(block_m=1, block_k=4096, warps=16)
    warps = 4 if columns <= 4096 else 8
    return Launch(block_m=1, block_k=256 * warps, warps=warps)


def thin_launch(rows: int, columns: int, normed: bool, device: torch.device) -> tuple[Launch, int]:
    """Return the layout of the adapters' product after that pass, and over how many columns each program sums up.

    With few rows several programs share a row: a multiprocessor must wait for several loads at once to be fast.
    """
    launch, programs = Launch(block_m=64, block_k=128, warps=8 if normed else 4), multiprocessors(device)
    blocks = max(1, -(-rows // launch.block_m))
    shares = 1 if blocks >= THIN_FULL * programs else round(THIN_PROGRAMS * programs / blocks)
    shares = max(1, min(shares, MOST_THIN_SHARES, columns // (4 * launch.block_k)))
    return launch, -(-columns // (shares * launch.block_k)) * launch.block_k


def share_rows(rows: int, blocks: int, warps: int, device: torch.device) -> int:
    """Return over how many rows each program of SwiGLU's backward sums up. blocks: the blocks of columns in the grid.

    As many programs as fit on the GPU at once are a wave, and the last wave takes as long as any: the shares with the
    fewest rows in all waves are taken.
    """
    at_once = SHARE_PROGRAMS * 4 // warps * multiprocessors(device)

    def rows_in_turn(shares: int) -> float:
        return -(-blocks * shares // at_once) * (rows / shares + START_ROWS)

    return -(-rows // min(range(1, max(1, min(MOST_SHARES, rows // SHARE_ROWS)) + 1), key=rows_in_turn))


# ------------------------------------------------------------------------------------------------ operators
#
# Linears that read the same x (the members) are one operator together with their rank-r adapters:
#   y = [x | u | 0] [W | scale B | 0]^T + bias,  u = dropout(x) A^T       (SwiGLU or the norm is applied to x first)
# The operands are made wider by the adapters' columns, so one matrix product computes the base and the adapters. No
# extra pass reads and writes whole activations for y += u B^T, and one product of the backward pass gives both dx and
# du. W is dequantised, used and freed. A compiler cannot look into a custom operator, so it cannot decide to save W.


def _gate(gate: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sigmoid(z) and dz / dgate; an activation is gate sigmoid(z), with z = gate for SiLU.

    GELU's approximation by a tanh, gate / 2 (1 + tanh(z / 2)), is gate sigmoid(z) with z = sqrt(8 / pi) (gate + 0.044715
    gate^3) (Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016).
    """
    if activation == "silu":
        return torch.sigmoid(gate), torch.ones_like(gate)
    k, square = math.sqrt(8 / math.pi), gate.square()
    return torch.sigmoid(k * gate * (1 + 0.044715 * square)), k * (1 + 3 * 0.044715 * square)


def _swiglu(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * _gate(gate, activation)[0] * up).to(gate_up.dtype)


def _swiglu_backward(gate_up: torch.Tensor, grad: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """Return the gradient of [gate | up]. It is written out, because autograd records nothing in a custom operator."""
    (gate, up), grad = gate_up.float().chunk(2, -1), grad.float()
    sigmoid, slope = _gate(gate, activation)
    both = [grad * up * sigmoid * (1 + gate * (1 - sigmoid) * slope), grad * gate * sigmoid]
    return torch.cat(both, 1).to(gate_up.dtype)


def _drop(x: torch.Tensor, masks: "Masks") -> torch.Tensor:
    keep = dropout_mask(masks.step, masks.sequences, masks.salt, masks.length, x.shape[1], masks.p).flatten(0, 1)[
        : len(x)
    ]
    return torch.where(keep, x, 0) * (1 / (1 - masks.p))


class Masks(NamedTuple):
    """The inputs from which a dropout mask is computed, see dropout.py.

    step, salt: int32 scalars; sequences: int32 [batch]; length: the tokens of a sequence; p: the dropout probability.
    """

    step: torch.Tensor
    sequences: torch.Tensor
    salt: torch.Tensor
    length: int
    p: float


class Norm(NamedTuple):
    """The RMS norm to apply to x first. weight: [columns]; inverse: 1 / rms of each row of x, fp32 [rows].

    x / rms is rounded before it is multiplied by the weight, as in Llama, or, if the weight is in fp32, after it alone.
    """

    weight: torch.Tensor
    inverse: torch.Tensor


def inverse_rms(x: torch.Tensor, epsilon: float, kernels: bool) -> torch.Tensor:
    """Return 1 / rms of the rows of x, fp32 (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019)."""
    if not kernels or torch.compiler.is_compiling():  # a compiler fuses it into the pass that makes x
        return torch.rsqrt(x.float().square().mean(-1) + epsilon)
    out = x.new_empty(len(x), dtype=torch.float32)
    training_kernels.inverse_rms_kernel[(len(x),)](x, out, x.shape[1], epsilon, BLOCK=1024, num_warps=4)
    return out


def normed(x: torch.Tensor, norm: Norm | None, kernels: bool) -> torch.Tensor:
    """Return x after the norm, rounded where transformers rounds."""
    if norm is None:
        return x
    if not kernels:
        unit = x.float() * norm.inverse[:, None]
        return (norm.weight * (unit if norm.weight.dtype is torch.float32 else unit.to(x.dtype))).to(x.dtype)
    out = torch.empty_like(x)
    _widen_kernel(x, out, out, x.new_empty(0, x.shape[1]), out, None, no_masks(x), 0.0, False, norm)
    return out


def norm_backward(grad: torch.Tensor, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return the gradient of x from the gradient of `normed`.

    In a compiled layer this becomes one pass together with the gradient of the residual connection.
    """
    grad, inverse = grad.float() * norm.weight.float(), norm.inverse[:, None]
    unit = x.float() * inverse
    return (inverse * (grad - unit * (grad * unit).mean(-1, keepdim=True))).to(x.dtype)


def no_masks(x: torch.Tensor) -> Masks:
    """Return the masks of an operator without an adapter. They only fill the arguments; nothing reads them."""
    return Masks(x, x, x, len(x), 0.0)


def widen(
    x: torch.Tensor, A: torch.Tensor, masks: Masks, scale: float, swiglu: bool, kernels: bool, norm: Norm | None = None,
    activation: str = "silu",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return ([x | u | 0], scale u) with u = dropout(x) A^T: [rows, operand columns] and [rows, adapter columns].

    x: [rows, columns]; the norm is applied to it first if there is one. With swiglu, x is [gate | up], [rows, 2
    columns], and activation(gate) * up is used instead of x.
    """
    extra, columns = A.shape
    stride = operand_columns(columns, extra)
    wide = x.new_empty(len(x), stride)
    if not kernels:
        wide[:, :columns] = _swiglu(x, activation) if swiglu else normed(x, norm, kernels)
        dropped = _drop(wide[:, :columns], masks) if masks.p > 0 else wide[:, :columns]
        wide[:, columns : columns + extra] = dropped @ A.t()
        wide[:, columns + extra :] = 0
        return wide, wide[:, columns : columns + extra] * scale
    u = x.new_empty(len(x), extra)
    if not extra:
        _widen_kernel(x, wide, wide, A, wide, None, masks, scale, swiglu, norm, activation=activation)
        return wide, u
    if extra <= MOST_WIDEN_COLUMNS:
        share = widen_share(len(x), columns, x.device)
        shares = triton.cdiv(columns, share)
        sums = x.new_empty(shares, len(x), extra, dtype=torch.float32) if shares > 1 else u
        _widen_kernel(x, wide, wide, A, sums, u, masks, scale, swiglu, norm, share, activation)
        if shares == 1:
            return wide, u
    else:
        dropped = x.new_empty(len(x), columns) if masks.p > 0 else wide[:, :columns]
        _widen_kernel(x, wide, dropped, A, wide, None, masks, scale, swiglu, norm, activation=activation)
        sums, shares = _product_fp32(dropped, A.t()), 1
    training_kernels.settle_kernel[(triton.cdiv(len(x), 64),)](
        sums, wide, u, len(x), columns, stride, extra, scale, SHARES=shares, BLOCK_M=64, BLOCK_R=dot_size(extra),
        BLOCK_Z=dot_size(stride - columns), num_warps=4,
    )  # fmt: skip
    return wide, u


def _widen_kernel(
    x, wide, dropped, A, sums, u, masks: Masks, scale: float, swiglu: bool, norm: Norm | None,
    share: int | None = None, activation: str = "silu",
) -> None:  # fmt: skip
    """Launch `widen_kernel`. u: None skips the product. share: columns per program; None means those of one tile."""
    (extra, columns), share = A.shape, share or WIDEN.block_k
    block_r = 0 if u is None else dot_size(extra)
    grid = (triton.cdiv(len(x), WIDEN.block_m), triton.cdiv(columns, share))
    training_kernels.widen_kernel[grid](
        x, wide, dropped, A, sums, wide if u is None else u, *(norm or (x, x)), masks.step, masks.sequences, masks.salt,
        len(x), share, masks.length, columns, wide.shape[1], extra, drop_threshold(masks.p), 1 / (1 - masks.p), scale,
        SWIGLU=swiglu, NORM=norm is not None, DROPOUT=masks.p > 0, BLOCK_M=WIDEN.block_m, BLOCK_K=WIDEN.block_k,
        BLOCK_R=block_r, BLOCK_Z=dot_size(wide.shape[1] - columns) if block_r and columns <= share else 0,
        ACTIVATION=activation, num_warps=WIDEN.warps, num_stages=1,
    )  # fmt: skip


def narrow(
    x: torch.Tensor, A: torch.Tensor, masks: Masks, scale: float, swiglu: bool, kernels: bool, norm: Norm | None = None,
    activation: str = "silu", folded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return x in e4m3, its scales (`quantise_rows`), and scale dropout(x) A^T, [rows, adapter columns].

    x: as in `widen`; it is rounded as there before it is quantised. folded: fp32 [columns], by which each column is
    multiplied before it is quantised, and only for that.
    """
    extra, columns = A.shape
    if not kernels:
        read = _swiglu(x, activation) if swiglu else normed(x, norm, False)
        dropped = _drop(read, masks) if masks.p > 0 else read
        x8, scales = fp8.quantise_rows(read if folded is None else read.float() * folded)
        return x8, scales, (dropped @ A.t()) * scale
    rows, p = len(x), masks.p if extra else 0.0
    scales, x8 = x.new_empty(rows, dtype=torch.float32), torch.empty(rows, columns, dtype=fp8.E4M3, device=x.device)
    joined = norm is not None and extra <= MOST_THIN_COLUMNS and p == 0  # the adapters' product applies the norm itself
    keep = extra > 0 and (swiglu or p > 0 or (norm is not None and not joined))
    read, launch = x.new_empty(rows, columns) if keep else x, narrow_launch(columns, swiglu)
    chunks = triton.cdiv(columns, launch.block_k)
    fp8_kernels.narrow_kernel[(rows,)](
        x, x8, scales, read, *(norm or (x, x)), scales if folded is None else folded, masks.step, masks.sequences,
        masks.salt, masks.length, columns, fp8.SMALLEST, drop_threshold(p), 1 / (1 - p), SWIGLU=swiglu,
        NORM=norm is not None, FOLDED=folded is not None, DROPOUT=p > 0, KEEP=keep, CHUNKS=chunks, BLOCK=launch.block_k,
        HELD=chunks <= MOST_HELD, ACTIVATION=activation, ROUND=INTERPRETED, num_warps=launch.warps,
    )  # fmt: skip
    return x8, scales, adapters_product(read, A, scale, norm if joined else None)


def adapters_product(x: torch.Tensor, A: torch.Tensor, scale: float, norm: Norm | None = None) -> torch.Tensor:
    """Return scale x A^T, [rows, adapter columns], in x's dtype, summed in fp32. A may lie transposed.

    norm: applied to x first; only with at most MOST_THIN_COLUMNS adapter columns.
    """
    (extra, columns), rows = A.shape, len(x)
    if not extra or extra > MOST_THIN_COLUMNS:
        return (_product_fp32(x, A.t()) * scale).to(x.dtype) if extra else x.new_empty(rows, 0)
    launch, share = thin_launch(rows, columns, norm is not None, x.device)
    u, shares = x.new_empty(rows, extra), triton.cdiv(columns, share)
    sums = x.new_empty(shares, rows, extra, dtype=torch.float32) if shares > 1 else u
    fp8_kernels.thin_kernel[(triton.cdiv(rows, launch.block_m), shares)](
        x, A, sums, *(norm or (x, x)), rows, columns, share, extra, *A.stride(), scale, NORM=norm is not None,
        BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BLOCK_R=dot_size(extra), num_warps=launch.warps,
        num_stages=4 if extra <= 32 and shares == 1 else 3,
    )  # fmt: skip
    if shares > 1:
        grid = (triton.cdiv(u.numel(), SETTLE_BLOCK),)
        fp8_kernels.settle_thin_kernel[grid](sums, u, u.numel(), shares, BLOCK=SETTLE_BLOCK)
    return u


DIVIDED = (torch.bfloat16,)  # dtypes in which du / rms can be stored; in float16 it would underflow


def widen_backward(
    wide: torch.Tensor, x: torch.Tensor, A: torch.Tensor, masks: Masks, kernels: bool, norm: Norm | None = None,
    du: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Norm | None]:  # fmt: skip
    """Return (dx, dA in fp32, norm) from wide = [dx | du], whose dx lacks the gradient through the adapters.

    wide may be overwritten; with du, it holds dx alone. With a norm, dx is the gradient of normed(x).

    dA = du^T dropout(normed(x)). Where possible normed(x) is not computed again: dA = (du / rms)^T dropout(x), and its
    columns must still be multiplied by the norm's weight. The returned norm says so; None means that dA is complete.
    """
    extra, columns = A.shape
    dx, du = wide[:, :columns], wide[:, columns : columns + extra] if du is None else du
    alone = _leaves_no_gaps(extra, masks.p, kernels)
    if norm and not (alone and x.dtype in DIVIDED):
        x, norm = normed(x, norm, kernels), None
    if not alone:
        if masks.p == 0:
            return dx.addmm_(du, A), _product_fp32(du.t(), x), None
        dx += _drop(du @ A, masks)
        return dx, _product_fp32(du.t(), _drop(x, masks)), None
    out, launch = x.new_empty(x.shape), MASKED_BACKWARD if masks.p > 0 else WIDEN_BACKWARD
    dropped = torch.empty_like(x) if masks.p > 0 else x
    divided = x.new_empty(len(x), extra) if norm else du
    grid = (triton.cdiv(len(x), launch.block_m), triton.cdiv(columns, launch.block_k))
    training_kernels.widen_backward_kernel[grid](
        wide, du, x, out, dropped, A, norm.inverse if norm else x, divided, masks.step, masks.sequences, masks.salt,
        len(x), masks.length, columns, wide.shape[1], du.stride(0), extra, drop_threshold(masks.p), 1 / (1 - masks.p), NORM=norm is not None,
        DROPOUT=masks.p > 0, BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BLOCK_R=dot_size(extra),
        num_warps=launch.warps,
    )  # fmt: skip
    return out, _product_fp32(divided.t(), dropped), norm


def _leaves_no_gaps(extra: int, p: float, kernels: bool) -> bool:
    """Return whether `widen_backward` writes dx to a tensor of its own instead of completing it inside [dx | du].

    Attention would have to copy a dx that is a part of [dx | du], because its rows have gaps between them. But without
    dropout and with many adapter columns cuBLAS is used, which completes dx in place.
    """
    return kernels and (p > 0 or extra <= 64)


class Before(NamedTuple):
    """The adapters of gate and up, whose dB `swiglu_backward` computes. u: their scaled u, [rows, adapter columns].

    members: 2, or 1 if gate and up are one linear, whose one adapter has one u for both. rank: 0 without adapters.
    """

    u: torch.Tensor | None = None
    rank: int = 0
    members: int = 2

    def part(self, i: int) -> slice:
        """Return the columns of u that belong to gate (0) or up (1)."""
        start = i * self.rank if self.members > 1 else 0
        return slice(start, start + self.rank)


def swiglu_backward(
    wide: torch.Tensor, x: torch.Tensor, A: torch.Tensor, masks: Masks, before: Before, kernels: bool,
    activation: str = "silu", du: torch.Tensor | None = None, over_x: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (d[gate | up], sums) from wide = [dx | du] and x = [gate | up]. With du, wide holds dx alone.

    sums holds dA and the dB of gate and up; `apart` separates them. over_x: the first result overwrites x.
    """
    extra, columns = A.shape
    du = wide[:, columns : columns + extra] if du is None else du
    if kernels and max(extra, before.rank) <= MOST_COLUMNS:
        return _swiglu_backward_kernel(wide, du, x, A, masks, before, activation, x if over_x else torch.empty_like(x))
    tile, back = _swiglu(x, activation), du @ A
    if masks.p > 0:
        tile, back = _drop(tile, masks), _drop(back, masks)
    grads = _swiglu_backward(x, wide[:, :columns] + back, activation)
    parts = [grads[:, i * columns : (i + 1) * columns].t() for i in range(2 if before.rank else 0)]
    dB = [_product_fp32(part, before.u[:, before.part(i)]) for i, part in enumerate(parts)]
    grads = x.copy_(grads) if over_x else grads
    return grads, torch.cat([part.flatten() for part in (_product_fp32(du.t(), tile), *dB)])


def apart(sums: torch.Tensor, extra: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Separate sums into dA [adapter columns, columns] and the dB of gate and up [2, columns, their rank]."""
    size = extra * columns
    return sums[:size].view(extra, columns), sums[size:].view(2, columns, (len(sums) - size) // (2 * columns))


def _swiglu_backward_kernel(wide, du, x, A, masks, before: Before, activation, grads):
    """Do `swiglu_backward` in one pass. Each share of the rows writes its own sums, which are added in fixed order.

    grads may be x: each number of x is read once, by the program that overwrites it.
    """
    (extra, columns), rows, (u, rank, _) = A.shape, len(x), before
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
    launch = swiglu_launch(max(extra, rank), masks.p > 0, activation, hopper)
    blocks = triton.cdiv(columns, launch.block_k)
    share = triton.cdiv(share_rows(rows, blocks, launch.warps, x.device), launch.block_m) * launch.block_m
    shares = triton.cdiv(rows, share)
    sums = x.new_empty(shares, (extra + 2 * rank) * columns, dtype=torch.float32)
    training_kernels.swiglu_backward_kernel[(blocks, shares)](
        wide, du, x, grads, A, u if rank else x, sums, masks.step, masks.sequences, masks.salt, rows, share, masks.length,
        columns, wide.shape[1], du.stride(0), extra, u.stride(0) if rank else 0, before.part(1).start, rank, drop_threshold(masks.p), 1 / (1 - masks.p),
        DROPOUT=masks.p > 0, WHOLE=masks.length % launch.block_m == 0, BLOCK_M=launch.block_m, BLOCK_K=launch.block_k,
        BLOCK_R=dot_size(extra) if extra else 0, BLOCK_U=dot_size(rank) if rank else 0, ACTIVATION=activation, num_warps=launch.warps, num_stages=1,
    )  # fmt: skip
    return grads, sums.sum(0)


def settle_gradients(
    dA: torch.Tensor, dB: torch.Tensor, outputs: list[int], rank: int, norm: Norm | None, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dA with its columns multiplied by the norm's weight, and of dB only each member's own columns.

    dB: [rows, adapter columns], or no rows. Result: [rows, rank]. outputs: the number of rows of each member. norm:
    only with kernels. One launch does all of this; autograd would copy the columns of each member separately.
    """
    rows, extra = dB.shape
    if not kernels:
        own = [part[:, i * rank : (i + 1) * rank] for i, part in enumerate(dB.split(outputs))] if rows else []
        return dA, torch.cat(own) if own else dB.new_empty(0, rank)
    if not norm and rows and len(outputs) == 1 and rank == extra:
        return dA, dB
    own, scaled = dB.new_empty(rows, rank), dA.numel() if norm else 0
    if not own.numel() and not norm:
        return dA, own
    programs = triton.cdiv(scaled, SETTLE_BLOCK)
    training_kernels.settle_gradients_kernel[(programs + triton.cdiv(own.numel(), SETTLE_BLOCK),)](
        dA, norm.weight if norm else dA, dB, own, scaled, dA.shape[-1], own.numel(), outputs[0],
        sum(outputs[:2]), extra, rank, programs, BLOCK=SETTLE_BLOCK,
    )  # fmt: skip
    return dA, own


def _product_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b in fp32, so that a gradient summed over thousands of rows is not rounded to bfloat16's 8 bits."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


@torch.library.custom_op("qlora::linear", mutates_args=())
def linear(
    x: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor], bias: torch.Tensor | None, scale: float,
    norm: list[torch.Tensor], hands_B: bool, swiglu: bool, before_u: torch.Tensor | None, before_B: list[torch.Tensor],
    codes: torch.Tensor, constants: list[torch.Tensor], lut: torch.Tensor, columns: int, blocksizes: list[int],
    quant_type: str, row_scales: torch.Tensor | None, step: torch.Tensor, sequences: torch.Tensor, salt: torch.Tensor,
    length: int, p: float, kernels: bool, pieces: int, activation: str, over_x: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (y, scale u), y: [rows, out features of all members]. x: [rows, columns], or with swiglu [gate | up].

    norm: empty, or the fields of a `Norm`; its 1 / rms is computed from x, but no gradient flows through it here.
    hands_B: skip dB here, because the backward pass of the down projection computes it. before_u, before_B: u and B of
    gate and up, passed in only so that their dB can be returned; y does not depend on them. pieces: into how many equal
    pieces W is cut, which are unpacked one after the other, here and in the backward pass. row_scales: if
    there are some, the products with W are in FP8 (fp8.py), in one piece. over_x: with swiglu, the gradient of x overwrites
    x, which must be a recomputed tensor that nothing else reads.
    """
    packed = Packed(codes, constants, lut, columns, blocksizes, quant_type, row_scales)
    first, masks = Norm(*norm) if norm else None, Masks(step, sequences, salt, length, p)
    if row_scales is not None:
        own, stacked = operands(packed, A, B if A else [], 1.0, x.dtype, kernels, only_adapters=True)
        masks = masks if A else no_masks(x)
        x8, scales, u = narrow(x, stacked, masks, scale, swiglu, kernels, first, activation)
        W, adapted = fp8.unpack(packed, False, kernels), (u, own) if A else (None, None)
        return fp8.product(x8, scales, W, row_scales, x.dtype, kernels, *adapted, bias), u

    W, stacked = operands(packed, A, B, scale, x.dtype, kernels, piece=Piece(0, pieces))
    if A:
        wide, u = widen(x, stacked, masks, scale, swiglu, kernels, first, activation)
    elif swiglu:
        wide, u = widen(x, stacked, no_masks(x), 0.0, True, kernels, activation=activation)[0], x.new_empty(0)
    else:
        wide, u = normed(x, first, kernels), x.new_empty(0)
    if pieces == 1:
        return F.linear(wide, W, bias), u
    y = x.new_empty(len(x), codes.numel() * 2 // columns)
    for i, part in enumerate(y.chunk(pieces, 1)):
        if i:
            del W  # so that the next piece can use its memory
            W, _ = operands(packed, [], B, scale, x.dtype, kernels, piece=Piece(i, pieces))
        if bias is None:
            torch.mm(wide, W.t(), out=part)
        else:
            torch.addmm(bias.chunk(pieces)[i], wide, W.t(), out=part)
    return y, u


class Adapters(NamedTuple):
    """The adapters of an operator's members; empty lists if they have none. scale: the same for all of them."""

    A: list[torch.Tensor]
    B: list[torch.Tensor]
    scale: float


class Handed(NamedTuple):
    """How an MLP's two operators cooperate: the second one's backward pass also computes dB of the first one."""

    hands_B: bool = False  # for the first: the operator that reads y computes dB
    u: torch.Tensor | None = None  # for the second: u and B of the first
    B: Sequence[torch.Tensor] = ()


NOTHING_HANDED = Handed()


def run_linear(
    x: torch.Tensor, weight: Packed, adapters: Adapters, masks: Masks, *, bias: torch.Tensor | None = None,
    norm: Norm | None = None, swiglu: bool = False, handed: Handed = NOTHING_HANDED, kernels: bool, pieces: int = 1,
    activation: str = "silu", over_x: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return y and u of `linear`. It takes named groups of arguments; the schema of an operator has to be flat."""
    return linear(
        x, *adapters[:2], bias, adapters.scale, [] if norm is None else list(norm), handed.hands_B, swiglu, handed.u, handed.B,
        *weight, *masks, kernels, pieces, activation, over_x,
    )  # fmt: skip


LINEAR_ARGUMENTS = tuple(inspect.signature(linear._init_fn).parameters)


@linear.register_fake
def _(x, A, B, bias, scale, norm, hands_B, swiglu, before_u, before_B, codes, constants, lut, columns, *rest):
    u = x.new_empty(len(x), adapter_columns(len(A[0]), len(A))) if A else x.new_empty(0)
    return x.new_empty(len(x), codes.numel() * 2 // columns), u


def over_x_of(operator: Any, gradients: Callable) -> Any:
    """Return a twin of a backward operator that writes dx over x and returns an empty tensor in its place.

    No result of an operator may share memory with an argument. gradients(over_x, **arguments): what the operator computes.
    """
    function, name = operator._init_fn, f"{operator._qualname}_over_x"
    parameters = tuple(inspect.signature(function).parameters)

    def without_dx(x: torch.Tensor, results: Any) -> Any:
        empty = x.new_empty(0)
        return empty if isinstance(results, torch.Tensor) else (empty, *results[1:])

    def run(*arguments):
        given = dict(zip(parameters, arguments, strict=True))
        return without_dx(given["x"], gradients(True, **given))

    schema = torch.library.infer_schema(function, mutates_args=("x",))
    twin = torch.library.custom_op(name, run, mutates_args=("x",), schema=schema)
    twin.register_fake(lambda grad, x, *rest: without_dx(x, operator(grad, x, *rest)))
    return twin


@torch.library.custom_op("qlora::linear_backward", mutates_args=())
def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, u: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor], scale: float,
    norm: list[torch.Tensor], hands_B: bool, swiglu: bool, before_u: torch.Tensor | None, before_ranks: list[int],
    codes: torch.Tensor, constants: list[torch.Tensor], lut: torch.Tensor, columns: int, blocksizes: list[int],
    quant_type: str, row_scales: torch.Tensor | None, step: torch.Tensor, sequences: torch.Tensor, salt: torch.Tensor,
    length: int, p: float, kernels: bool, pieces: int, activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (dx, sums, dB [out features, rank]); sums and dB are in fp32.

    sums holds dA and, with swiglu, the dB of gate and up; `apart` separates them. With hands_B, dB is empty. With a
    norm, dx is the gradient of the norm's output, for `norm_backward`. before_ranks: of gate and up's adapters, one
    where these are one linear.
    """
    return _gradients(False, **locals())


def _gradients(
    over_x, grad, x, u, A, B, scale, norm, hands_B, swiglu, before_u, before_ranks, codes, constants, lut, columns,
    blocksizes, quant_type, row_scales, step, sequences, salt, length, p, kernels, pieces, activation,
):  # fmt: skip
    packed = Packed(codes, constants, lut, columns, blocksizes, quant_type, row_scales)
    first, masks, du = Norm(*norm) if norm else None, Masks(step, sequences, salt, length, p), None
    if row_scales is None:
        wide, stacked = _product_backward(grad, packed, Adapters(A, B, scale), kernels, pieces)
    else:
        own, stacked = operands(packed, A, B, scale, grad.dtype, kernels, only_adapters=True)
        wide, du = _product_backward_fp8(grad, packed, own.t(), kernels)
    dB = grad.new_empty(0, len(stacked), dtype=torch.float32) if hands_B else _product_fp32(grad.t(), u)
    outputs = [len(b) for b in B]
    if swiglu:
        before = Before(before_u, before_ranks[0], len(before_ranks)) if before_ranks else Before()
        dx, sums = swiglu_backward(wide, x, stacked, masks, before, kernels, activation, du, over_x)
        return dx, sums, settle_gradients(sums, dB, outputs, len(A[0]), None, kernels)[1]
    dx, dA, first = widen_backward(wide, x, stacked, masks, kernels, first, du)
    dA, dB = settle_gradients(dA, dB, outputs, len(A[0]), first, kernels)
    return dx, dA.flatten(), dB


def _product_backward(
    grad: torch.Tensor, packed: Packed, adapters: Adapters, kernels: bool, pieces: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [dx | du] = grad [W | scale B], whose dx lacks the gradient through the adapters, and the stacked A.

    Pieces of a W with more outputs than columns are pieces of its outputs, whose products are summed in fp32 and rounded
    once. Those of another W are pieces of its columns, each with columns of dx of its own. So no sum is wider than the
    narrower side, and few products are narrow.
    """
    summed = pieces > 1 and packed.is_tall

    def unpack(i: int, A: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        piece = Piece(i, pieces, across=not summed)
        return operands(packed, A, adapters.B, adapters.scale, grad.dtype, kernels, piece=piece)

    W, stacked = unpack(0, adapters.A)
    size, both = packed.columns // pieces, packed.columns + len(stacked)
    wide = grad.new_empty(len(grad), operand_columns(packed.columns, len(stacked)))
    if summed:
        first, *parts = grad.chunk(pieces, 1)
        total = _sum_fp32(None, first, W[:, :both])
        for i, part in enumerate(parts, 1):
            del W  # so that the next piece can use its memory
            W, _ = unpack(i, [])
            total = _sum_fp32(total, part, W[:, :both])
        wide[:, :both] = total
        return wide, stacked
    for i, part in enumerate(wide[:, :both].split([size] * (pieces - 1) + [both - (pieces - 1) * size], 1)):
        if i:
            del W
            W, _ = unpack(i, [])
        torch.mm(grad, W[:, : part.shape[1]], out=part)
    return wide, stacked


def _sum_fp32(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return total + a @ b, or a @ b, in fp32; total may be overwritten."""
    if not a.is_cuda:  # a CPU would round the product first
        a, b = a.float(), b.float()
        return a @ b if total is None else total.addmm_(a, b)
    return _product_fp32(a, b) if total is None else torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _product_backward_fp8(
    grad: torch.Tensor, packed: Packed, B: torch.Tensor, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dx, which lacks the gradient through the adapters, and du. B: scale B transposed."""
    grad8, scales, du = narrow(grad, B, no_masks(grad), 1.0, False, kernels, folded=packed.row_scales)
    return fp8.product(grad8, scales, fp8.unpack(packed, True, kernels), None, grad.dtype, kernels), du


@linear_backward.register_fake
def _(grad, x, u, A, B, scale, norm, hands_B, swiglu, before_u, before_ranks, codes, constants, lut, columns, *rest):
    extra, fp8_scales, (p, kernels, _, _) = adapter_columns(len(A[0]), len(A)), rest[2], rest[-4:]
    alone = swiglu or fp8_scales is not None or _leaves_no_gaps(extra, p, kernels)
    dx = x.new_empty(x.shape) if alone else x.new_empty(len(x), operand_columns(columns, extra))[:, :columns]
    before_rank = before_ranks[0] if before_ranks else 0
    sizes = ((extra + 2 * before_rank) * columns,), (0 if hands_B else grad.shape[1], len(A[0]))
    return dx, *(x.new_empty(size, dtype=torch.float32) for size in sizes)


linear_backward_over_x = over_x_of(linear_backward, _gradients)


def _linear_setup(ctx, inputs, output):
    given = dict(zip(LINEAR_ARGUMENTS, inputs, strict=True))
    x, A, B, norm, constants, before_B = (given[name] for name in ("x", "A", "B", "norm", "constants", "before_B"))
    for name in ("scale", "hands_B", "swiglu", "length", "p", "kernels", "pieces", "activation", "over_x"):
        setattr(ctx, name, given[name])
    ctx.quantisation = [given[name] for name in ("columns", "blocksizes", "quant_type")]
    tensors = [given[name] for name in ("before_u", "codes", "lut", "row_scales", "step", "sequences", "salt")]
    ctx.sizes = len(norm), len(constants), len(A), len(B)
    ctx.before = [(b.shape[1], b.dtype) for b in before_B]
    ctx.save_for_backward(x, output[1], *tensors, *norm, *constants, *A, *B)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, grad, _):
    x, u, before_u, codes, lut, row_scales, step, sequences, salt, *rest = ctx.saved_tensors
    rest = iter(rest)
    norm, constants, A, B = (list(itertools.islice(rest, size)) for size in ctx.sizes)
    quantised = codes, constants, lut, *ctx.quantisation, row_scales
    empty = {"norm": [None] * len(norm), "constants": [None] * len(constants)}
    grads = dict.fromkeys(LINEAR_ARGUMENTS) | {"A": [], "B": [], "before_B": [], **empty}
    if A:
        backward = linear_backward_over_x if ctx.over_x else linear_backward
        dx, sums, dB = backward(
            grad.contiguous(), x, u, A, B, ctx.scale, norm, ctx.hands_B, ctx.swiglu, before_u,
            [rank for rank, _ in ctx.before], *quantised, step, sequences, salt, ctx.length, ctx.p, ctx.kernels,
            ctx.pieces, ctx.activation,
        )  # fmt: skip
        dx = x if ctx.over_x else dx
        rank, columns = A[0].shape
        dA, before_dB = apart(sums, adapter_columns(rank, len(A)), columns)
        grads["A"] = [dA[i * rank : (i + 1) * rank].to(a.dtype) for i, a in enumerate(A)]
        parts = [None] * len(B) if ctx.hands_B else dB.split([len(b) for b in B])
        grads["B"] = [part if part is None else part.to(b.dtype) for part, b in zip(parts, B, strict=True)]
        parts = before_dB.flatten(0, 1).chunk(max(1, len(ctx.before)))
        grads["before_B"] = [part.to(dtype) for part, (_, dtype) in zip(parts, ctx.before, strict=False)]
    else:
        backward = product_backward_over_x if ctx.over_x else product_backward
        dx = backward(grad.contiguous(), x, ctx.swiglu, *quantised, ctx.kernels, ctx.pieces, ctx.activation)
        dx = x if ctx.over_x else dx
    grads["x"] = norm_backward(dx, x, Norm(*norm)) if norm else dx
    return tuple(grads.values())


linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("qlora::product_backward", mutates_args=())
def product_backward(
    grad: torch.Tensor, x: torch.Tensor, swiglu: bool, codes: torch.Tensor, constants: list[torch.Tensor],
    lut: torch.Tensor, columns: int, blocksizes: list[int], quant_type: str, row_scales: torch.Tensor | None,
    kernels: bool, pieces: int, activation: str,
) -> torch.Tensor:  # fmt: skip
    """Return dx of an operator without an adapter. With a norm, dx is the gradient of the norm's output."""
    return _product_gradient(False, **locals())


def _product_gradient(
    over_x, grad, x, swiglu, codes, constants, lut, columns, blocksizes, quant_type, row_scales, kernels, pieces, activation
):  # fmt: skip
    packed = Packed(codes, constants, lut, columns, blocksizes, quant_type, row_scales)
    if row_scales is None:
        dx, stacked = _product_backward(grad, packed, Adapters([], [], 0.0), kernels, pieces)
    else:
        none, stacked = operands(packed, [], [], 0.0, grad.dtype, kernels, only_adapters=True)
        dx = _product_backward_fp8(grad, packed, none.t(), kernels)[0]
    if not swiglu:
        return dx
    return swiglu_backward(dx, x, stacked, no_masks(x), Before(), kernels, activation, over_x=over_x)[0]


@product_backward.register_fake
def _(grad, x, *rest):
    return torch.empty_like(x)


product_backward_over_x = over_x_of(product_backward, _product_gradient)
