"""Linears of 4-bit weights that read one x, with their adapters, as operators with the gradient of their own arithmetic."""

import inspect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import bitsandbytes  # noqa: F401  (registers the operators that dequantise without Triton)
import torch
import torch.nn.functional as F

from fast_path import training_kernels
from fast_path.dropout import drop_threshold, dropout_mask
from fast_path.nf4 import Launch, multiprocessors, triton
from fast_path.packed_weights import Packed, adapter_columns, dot_size, operand_columns, operands

# ------------------------------------------------------------------------------------------------ layouts of the kernels


# Figures behind these layouts: docs/measurements.md, "Constants in the code".
# A smaller block_k is slower.
WIDEN = Launch(block_m=16, block_k=128, warps=4)
# Up to so many adapter columns u = x A^T is computed in the same pass that reads x, which saves reading x again. With more
# columns (the 48 of q, k and v at rank 16) a product of its own is faster.
MOST_WIDEN_COLUMNS = 32
WIDEN_BACKWARD = Launch(block_m=64, block_k=64, warps=4)
MASKED_BACKWARD = Launch(block_m=16, block_k=64, warps=2)
# Adapter columns up to which SwiGLU's backward has a kernel: it holds three sums [columns, block_k] in registers, and on
# sm_89 so many take 250 of 255 (Triton 3.6; 3.9 spills 24 bytes). Beyond, torch does it, with fp32 copies.
MOST_COLUMNS = 256
SETTLE_BLOCK = 1024
SHARE_ROWS = 256  # at least: a share's sums, 192 bytes a column at rank 16, are then 8 % of what it reads and writes
SHARE_PROGRAMS = 4  # a multiprocessor, as many as its registers hold of the kernel behind `swiglu_backward` at rank 16


def widen_share(rows: int, columns: int, device: torch.device) -> int:
    """Return over how many columns a program of the kernel behind `widen` sums u up: fewer where rows make few programs.

    With few rows there are few programs, and most multiprocessors would wait; so each program takes fewer columns.
    """
    shares = max(1, SHARE_PROGRAMS * multiprocessors(device) // triton.cdiv(rows, WIDEN.block_m))
    return min(2048, triton.cdiv(columns, 512 * shares) * 512)


def swiglu_launch(columns: int) -> Launch:
    """Return the layout of the kernel behind `swiglu_backward`, whose sums have up to so many adapter columns."""
    if columns <= 32:
        return Launch(block_m=16, block_k=64, warps=4)
    return Launch(block_m=16, block_k=32, warps=8)


def share_rows(rows: int, blocks: int, device: torch.device) -> int:
    """Return over how many rows a program of that kernel sums up, where they stand in `blocks` blocks of columns."""
    shares = max(1, min(rows // SHARE_ROWS, SHARE_PROGRAMS * multiprocessors(device) // blocks))
    return -(-rows // shares)


# ------------------------------------------------------------------------------------------------ operators
#
# Linears that read one x, with their rank-r adapters, are one operator with the gradient of its own arithmetic:
#   y = [x | u | 0] [W | scale B | 0]^T + bias,  u = dropout(x) A^T       (SwiGLU or the norm of x first)
# W is dequantised, used and dropped. The adapter rides in the base product's own reduction, so no pass reads and
# writes whole activations for y += u B^T, and the backward's product yields dx and du at once. An opaque operator
# keeps a compiler from saving W.


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _swiglu_backward(gate_up: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient of [gate | up]; by hand, since autograd records nothing inside a custom operator."""
    (gate, up), grad = gate_up.float().chunk(2, -1), grad.float()
    sigmoid = torch.sigmoid(gate)
    both = [grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid]
    return torch.cat(both, 1).to(gate_up.dtype)


def _drop(x: torch.Tensor, masks: "Masks") -> torch.Tensor:
    keep = dropout_mask(masks.step, masks.sequences, masks.salt, masks.length, x.shape[1], masks.p).flatten(0, 1)
    return torch.where(keep, x, 0) * (1 / (1 - masks.p))


class Masks(NamedTuple):
    """What a mask is a function of. step, salt: int32 scalars; sequences: int32 [batch]; length: of a sequence."""

    step: torch.Tensor
    sequences: torch.Tensor
    salt: torch.Tensor
    length: int
    p: float


class Norm(NamedTuple):
    """The RMS norm that x is to go through first. weight: [columns]; inverse: 1 / rms of x's rows, fp32 [rows]."""

    weight: torch.Tensor
    inverse: torch.Tensor


def inverse_rms(x: torch.Tensor, epsilon: float, kernels: bool) -> torch.Tensor:
    """Return 1 / rms of the rows of x, fp32 (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019)."""
    if not kernels or torch.compiler.is_compiling():  # a compiler puts it into the pass that makes x
        return torch.rsqrt(x.float().square().mean(-1) + epsilon)
    out = x.new_empty(len(x), dtype=torch.float32)
    training_kernels.inverse_rms_kernel[(len(x),)](x, out, x.shape[1], epsilon, BLOCK=1024, num_warps=4)
    return out


def normed(x: torch.Tensor, norm: Norm | None, kernels: bool) -> torch.Tensor:
    """Return x behind its norm, rounded as transformers does: before the weight and after it."""
    if norm is None:
        return x
    if not kernels:
        return (norm.weight * (x.float() * norm.inverse[:, None]).to(x.dtype)).to(x.dtype)
    out = torch.empty_like(x)
    _widen_kernel(x, out, out, x.new_empty(0, x.shape[1]), out, None, no_masks(x), 0.0, False, norm)
    return out


def norm_backward(grad: torch.Tensor, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return the gradient of x from that of `normed`; in a compiled layer one pass with the residual's."""
    grad, inverse = grad.float() * norm.weight.float(), norm.inverse[:, None]
    unit = x.float() * inverse
    return (inverse * (grad - unit * (grad * unit).mean(-1, keepdim=True))).to(x.dtype)


def no_masks(x: torch.Tensor) -> Masks:
    """Return the masks of an operator without an adapter, which nothing reads."""
    return Masks(x, x, x, len(x), 0.0)


def widen(
    x: torch.Tensor, A: torch.Tensor, masks: Masks, scale: float, swiglu: bool, kernels: bool, norm: Norm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ([x | u | 0], [rows, operand columns], and scale u), u = dropout(x) A^T. x: [rows, columns], perhaps to be
    normed; swiglu: [rows, 2 columns].
    """
    extra, columns = A.shape
    stride = operand_columns(columns, extra)
    wide = x.new_empty(len(x), stride)
    if not kernels:
        wide[:, :columns] = _swiglu(x) if swiglu else normed(x, norm, kernels)
        dropped = _drop(wide[:, :columns], masks) if masks.p > 0 else wide[:, :columns]
        wide[:, columns : columns + extra] = dropped @ A.t()
        wide[:, columns + extra :] = 0
        return wide, wide[:, columns : columns + extra] * scale
    u = x.new_empty(len(x), extra)
    if not extra:
        _widen_kernel(x, wide, wide, A, wide, None, masks, scale, swiglu, norm)
        return wide, u
    if extra <= MOST_WIDEN_COLUMNS:
        share = widen_share(len(x), columns, x.device)
        shares = triton.cdiv(columns, share)
        sums = x.new_empty(shares, len(x), extra, dtype=torch.float32) if shares > 1 else u
        _widen_kernel(x, wide, wide, A, sums, u, masks, scale, swiglu, norm, share)
        if shares == 1:
            return wide, u
    else:
        dropped = x.new_empty(len(x), columns) if masks.p > 0 else wide[:, :columns]
        _widen_kernel(x, wide, dropped, A, wide, None, masks, scale, swiglu, norm)
        sums, shares = _product_fp32(dropped, A.t()), 1
    training_kernels.settle_kernel[(triton.cdiv(len(x), 64),)](
        sums, wide, u, len(x), columns, stride, extra, scale, SHARES=shares, BLOCK_M=64, BLOCK_R=dot_size(extra),
        BLOCK_Z=dot_size(stride - columns), num_warps=4,
    )  # fmt: skip
    return wide, u


def _widen_kernel(
    x, wide, dropped, A, sums, u, masks: Masks, scale: float, swiglu: bool, norm: Norm | None, share: int | None = None
) -> None:
    """Launch `widen_kernel`; u None: without the product. share: columns of a program, None a tile's."""
    (extra, columns), share = A.shape, share or WIDEN.block_k
    block_r = 0 if u is None else dot_size(extra)
    grid = (triton.cdiv(len(x), WIDEN.block_m), triton.cdiv(columns, share))
    training_kernels.widen_kernel[grid](
        x, wide, dropped, A, sums, wide if u is None else u, *(norm or (x, x)), masks.step, masks.sequences, masks.salt,
        len(x), share, masks.length, columns, wide.shape[1], extra, drop_threshold(masks.p), 1 / (1 - masks.p), scale,
        SWIGLU=swiglu, NORM=norm is not None, DROPOUT=masks.p > 0, BLOCK_M=WIDEN.block_m, BLOCK_K=WIDEN.block_k,
        BLOCK_R=block_r, BLOCK_Z=dot_size(wide.shape[1] - columns) if block_r and columns <= share else 0,
        num_warps=WIDEN.warps, num_stages=1,
    )  # fmt: skip


DIVIDED = (torch.bfloat16,)  # types that hold du / rms as well as du; in float16 it would underflow


def widen_backward(
    wide: torch.Tensor, x: torch.Tensor, A: torch.Tensor, masks: Masks, kernels: bool, norm: Norm | None = None
) -> tuple[torch.Tensor, torch.Tensor, Norm | None]:
    """Return (dx, dA in fp32, norm) from wide = [dx | du], which may be used up: its dx lacks what comes through the
    adapters. dx is that of normed(x) where there is a norm.

    dA = du^T dropout(normed(x)). Where it can be, x is not normed once more for it: du is divided by the rms, and dA's
    columns lack the weight of the norm that is returned.
    """
    extra, columns = A.shape
    dx, du = wide[:, :columns], wide[:, columns : columns + extra]
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
        wide, x, out, dropped, A, norm.inverse if norm else x, divided, masks.step, masks.sequences, masks.salt, len(x),
        masks.length, columns, wide.shape[1], extra, drop_threshold(masks.p), 1 / (1 - masks.p), NORM=norm is not None,
        DROPOUT=masks.p > 0, BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BLOCK_R=dot_size(extra),
        num_warps=launch.warps,
    )  # fmt: skip
    return out, _product_fp32(divided.t(), dropped), norm


def _leaves_no_gaps(extra: int, p: float, kernels: bool) -> bool:
    """Return whether `widen_backward` writes dx anew: attention would have to copy one that is a part of [dx | du].

    Without a mask and with many adapter columns cuBLAS completes it in place.
    """
    return kernels and (p > 0 or extra <= 64)


def swiglu_backward(
    wide: torch.Tensor, x: torch.Tensor, A: torch.Tensor, masks: Masks, u: torch.Tensor | None, rank: int, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (d[gate | up], dA and the dB of gate and up as `apart` parts them) from wide = [dx | du] and x = [gate | up].

    u: [rows, adapter columns], that of gate and up with their scale; None and rank 0 where their dB is not wanted.
    """
    extra, columns = A.shape
    if kernels and max(extra, rank) <= MOST_COLUMNS:
        return _swiglu_backward_kernel(wide, x, A, masks, u, rank)
    du = wide[:, columns : columns + extra]
    tile, back = _swiglu(x), du @ A
    if masks.p > 0:
        tile, back = _drop(tile, masks), _drop(back, masks)
    grads = _swiglu_backward(x, wide[:, :columns] + back)
    parts = [grads[:, i * columns : (i + 1) * columns].t() for i in range(2 if rank else 0)]
    dB = [_product_fp32(part, u[:, i * rank : (i + 1) * rank]) for i, part in enumerate(parts)]
    return grads, torch.cat([part.flatten() for part in (_product_fp32(du.t(), tile), *dB)])


def apart(sums: torch.Tensor, extra: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dA [adapter columns, columns], and the dB of gate and up [2, columns, their rank] that come behind it."""
    size = extra * columns
    return sums[:size].view(extra, columns), sums[size:].view(2, columns, (len(sums) - size) // (2 * columns))


def _swiglu_backward_kernel(wide, x, A, masks, u, rank):
    """`swiglu_backward` in one pass: shares of the rows write sums of their own, which are added up in fixed order."""
    (extra, columns), rows = A.shape, len(x)
    launch = swiglu_launch(max(extra, rank))
    blocks = triton.cdiv(columns, launch.block_k)
    share = triton.cdiv(share_rows(rows, blocks, x.device), launch.block_m) * launch.block_m
    shares, grads = triton.cdiv(rows, share), torch.empty_like(x)
    sums = x.new_empty(shares, (extra + 2 * rank) * columns, dtype=torch.float32)
    training_kernels.swiglu_backward_kernel[(blocks, shares)](
        wide, x, grads, A, u if rank else x, sums, masks.step, masks.sequences, masks.salt, rows, share, masks.length,
        columns, wide.shape[1], extra, u.stride(0) if rank else 0, rank, drop_threshold(masks.p), 1 / (1 - masks.p),
        DROPOUT=masks.p > 0, BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BLOCK_R=dot_size(extra) if extra else 0,
        BLOCK_U=dot_size(rank) if rank else 0, num_warps=launch.warps, num_stages=1,
    )  # fmt: skip
    return grads, sums.sum(0)


def settle_gradients(
    dA: torch.Tensor, dB: torch.Tensor, outputs: list[int], rank: int, norm: Norm | None, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dA with its columns times the norm's weight and, of dB [rows, adapter columns], each member's own columns.

    outputs: the rows of the members; dB may have none. norm: with kernels only. In one launch: autograd copied each
    member's columns by itself.
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
    """Return a @ b in fp32: a gradient summed over thousands of rows is not rounded to 8 bits on its way out."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


@torch.library.custom_op("qlora::linear", mutates_args=())
def linear(
    x: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor], bias: torch.Tensor | None, scale: float,
    norm: list[torch.Tensor], hands_B: bool, swiglu: bool, before_u: torch.Tensor | None, before_B: list[torch.Tensor],
    codes: torch.Tensor, constants: list[torch.Tensor], lut: torch.Tensor, columns: int, blocksizes: list[int],
    quant_type: str, step: torch.Tensor, sequences: torch.Tensor, salt: torch.Tensor, length: int, p: float,
    kernels: bool, pieces: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (y, scale u), y: [rows, out features of all members]. x: [rows, columns], or [gate | up] of SwiGLU.

    norm: empty, or a `Norm`, whose 1 / rms is of x: nothing of the gradient flows through it. hands_B: the operator that
    reads y makes the gradient of B. before_u, before_B: where SwiGLU's does so, the u and B that came with [gate | up]; they
    take no part in y. pieces: 1, or the number of members, all of a size, whose weights are then unpacked one after the other.
    """
    packed, first = Packed(codes, constants, lut, columns, blocksizes, quant_type), Norm(*norm) if norm else None

    def unpack(i: int, A: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if pieces == 1:
            return operands(packed, A, B, scale, x.dtype, kernels)
        own = [b if i == j else b[:0] for j, b in enumerate(B)]
        return operands(packed.piece(i, pieces), A, own, scale, x.dtype, kernels)

    W, stacked = unpack(0, A)
    if A:
        wide, u = widen(x, stacked, Masks(step, sequences, salt, length, p), scale, swiglu, kernels, first)
    else:
        wide = widen(x, stacked, no_masks(x), 0.0, True, kernels)[0] if swiglu else normed(x, first, kernels)
        u = x.new_empty(0)
    if pieces == 1:
        return F.linear(wide, W, bias), u
    y = x.new_empty(len(x), codes.numel() * 2 // columns)
    for i, part in enumerate(y.chunk(pieces, 1)):
        if i:
            del W  # its memory is the next one's
            W, _ = unpack(i, [])
        if bias is None:
            torch.mm(wide, W.t(), out=part)
        else:
            torch.addmm(bias.chunk(pieces)[i], wide, W.t(), out=part)
    return y, u


class Adapters(NamedTuple):
    """The adapters of the members of an operator, empty lists where they have none. scale: of them all."""

    A: list[torch.Tensor]
    B: list[torch.Tensor]
    scale: float


class Handed(NamedTuple):
    """What an MLP's two operators hand each other, so that the second one's backward makes the first one's dB too."""

    hands_B: bool = False  # this is the first: the operator that reads y makes the gradient of B
    u: torch.Tensor | None = None  # this is the second: what the first one made, and its B
    B: Sequence[torch.Tensor] = ()


NOTHING_HANDED = Handed()


def run_linear(
    x: torch.Tensor, weight: Packed, adapters: Adapters, masks: Masks, *, bias: torch.Tensor | None = None,
    norm: Norm | None = None, swiglu: bool = False, handed: Handed = NOTHING_HANDED, kernels: bool, pieces: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return `linear`'s y and u: its arguments by name and in groups, where an operator's schema has to be flat."""
    return linear(
        x, *adapters[:2], bias, adapters.scale, [] if norm is None else list(norm), handed.hands_B, swiglu, handed.u, handed.B,
        *weight, *masks, kernels, pieces,
    )  # fmt: skip


LINEAR_ARGUMENTS = tuple(inspect.signature(linear._init_fn).parameters)


@linear.register_fake
def _(x, A, B, bias, scale, norm, hands_B, swiglu, before_u, before_B, codes, constants, lut, columns, *rest):
    u = x.new_empty(len(x), adapter_columns(len(A[0]), len(A))) if A else x.new_empty(0)
    return x.new_empty(len(x), codes.numel() * 2 // columns), u


@torch.library.custom_op("qlora::linear_backward", mutates_args=())
def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, u: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor], scale: float,
    norm: list[torch.Tensor], hands_B: bool, swiglu: bool, before_u: torch.Tensor | None, before_rank: int,
    codes: torch.Tensor, constants: list[torch.Tensor], lut: torch.Tensor, columns: int, blocksizes: list[int],
    quant_type: str, step: torch.Tensor, sequences: torch.Tensor, salt: torch.Tensor, length: int, p: float,
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (dx, sums, dB [out features, rank]), all but dx in fp32; sums: dA and, for SwiGLU's, the dB of gate and up, as
    `apart` parts them. hands_B: without dB. dx is that of what the norm gives, for `norm_backward`.
    """
    packed, first = Packed(codes, constants, lut, columns, blocksizes, quant_type), Norm(*norm) if norm else None
    W, stacked = operands(packed, A, B, scale, grad.dtype, kernels)
    dB = grad.new_empty(0, len(stacked), dtype=torch.float32) if hands_B else _product_fp32(grad.t(), u)
    both, outputs = columns + len(stacked), [len(b) for b in B]
    wide = grad.new_empty(len(grad), W.shape[1])
    torch.mm(grad, W[:, :both], out=wide[:, :both])
    del W
    masks = Masks(step, sequences, salt, length, p)
    if swiglu:
        dx, sums = swiglu_backward(wide, x, stacked, masks, before_u, before_rank, kernels)
        return dx, sums, settle_gradients(sums, dB, outputs, len(A[0]), None, kernels)[1]
    dx, dA, first = widen_backward(wide, x, stacked, masks, kernels, first)
    dA, dB = settle_gradients(dA, dB, outputs, len(A[0]), first, kernels)
    return dx, dA.flatten(), dB


@linear_backward.register_fake
def _(grad, x, u, A, B, scale, norm, hands_B, swiglu, before_u, before_rank, codes, constants, lut, columns, *rest):
    extra, (p, kernels) = adapter_columns(len(A[0]), len(A)), rest[-2:]
    alone = swiglu or _leaves_no_gaps(extra, p, kernels)
    dx = x.new_empty(x.shape) if alone else x.new_empty(len(x), operand_columns(columns, extra))[:, :columns]
    sizes = ((extra + 2 * before_rank) * columns,), (0 if hands_B else grad.shape[1], len(A[0]))
    return dx, *(x.new_empty(size, dtype=torch.float32) for size in sizes)


def _linear_setup(ctx, inputs, output):
    given = dict(zip(LINEAR_ARGUMENTS, inputs, strict=True))
    x, A, B, norm, constants, before_B = (given[name] for name in ("x", "A", "B", "norm", "constants", "before_B"))
    for name in ("scale", "hands_B", "swiglu", "length", "p", "kernels"):
        setattr(ctx, name, given[name])
    ctx.quantisation = [given[name] for name in ("columns", "blocksizes", "quant_type")]
    tensors = [given[name] for name in ("before_u", "codes", "lut", "step", "sequences", "salt")]
    ctx.sizes = len(norm), len(constants), len(A), len(B)
    ctx.before = [(b.shape[1], b.dtype) for b in before_B]
    ctx.save_for_backward(x, output[1], *tensors, *norm, *constants, *A, *B)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, grad, _):
    x, u, before_u, codes, lut, step, sequences, salt, *rest = ctx.saved_tensors
    rest = iter(rest)
    norm, constants, A, B = (list(itertools.islice(rest, size)) for size in ctx.sizes)
    quantised = codes, constants, lut, *ctx.quantisation
    empty = {"norm": [None] * len(norm), "constants": [None] * len(constants)}
    grads = dict.fromkeys(LINEAR_ARGUMENTS) | {"A": [], "B": [], "before_B": [], **empty}
    if A:
        dx, sums, dB = linear_backward(
            grad.contiguous(), x, u, A, B, ctx.scale, norm, ctx.hands_B, ctx.swiglu, before_u,
            ctx.before[0][0] if ctx.before else 0, *quantised, step, sequences, salt, ctx.length, ctx.p, ctx.kernels,
        )  # fmt: skip
        rank, columns = A[0].shape
        dA, before_dB = apart(sums, adapter_columns(rank, len(A)), columns)
        grads["A"] = [dA[i * rank : (i + 1) * rank].to(a.dtype) for i, a in enumerate(A)]
        parts = [None] * len(B) if ctx.hands_B else dB.split([len(b) for b in B])
        grads["B"] = [part if part is None else part.to(b.dtype) for part, b in zip(parts, B, strict=True)]
        grads["before_B"] = [before_dB[i].to(dtype) for i, (_, dtype) in enumerate(ctx.before)]
    else:
        dx = product_backward(grad.contiguous(), x, ctx.swiglu, *quantised, ctx.kernels)
    grads["x"] = norm_backward(dx, x, Norm(*norm)) if norm else dx
    return tuple(grads.values())


linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("qlora::product_backward", mutates_args=())
def product_backward(
    grad: torch.Tensor, x: torch.Tensor, swiglu: bool, codes: torch.Tensor, constants: list[torch.Tensor],
    lut: torch.Tensor, columns: int, blocksizes: list[int], quant_type: str, kernels: bool,
) -> torch.Tensor:  # fmt: skip
    """Return dx, of what a norm gives where there is one, where there is no adapter."""
    packed = Packed(codes, constants, lut, columns, blocksizes, quant_type)
    W, stacked = operands(packed, [], [], 0.0, grad.dtype, kernels)
    dx = grad @ W
    return swiglu_backward(dx, x, stacked, no_masks(x), None, 0, kernels)[0] if swiglu else dx


@product_backward.register_fake
def _(grad, x, *rest):
    return torch.empty_like(x)
