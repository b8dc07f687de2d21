"""What makes training fast without changing what is learned: dropout masks without state, cross entropy that never holds the
logits whole, 4-bit linears with their adapters as one operator, layers compiled once, a micro-batch captured as a graph.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import torch._dynamo.utils
import torch._functorch.config
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.activations import SiLUActivation

import training_kernels
from attention_ops import ATTENTIONS, CAUSAL, attend
from config import ConfigError, PerformanceConfig
from nf4_lookup import SHUFFLE, triton

# ------------------------------------------------------------------------------------------------ stateless dropout


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit integers, in place (lowbias32 of C. Wellons, "Prospecting for Hash Functions", 2018).

    x: int32, any shape; products wrap. The logical shifts are arithmetic ones with the sign bits masked away.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975  # 0x846CA68B as a signed number
    x ^= (x >> 16) & 0xFFFF
    return x


def int32(number: int) -> int:
    """Return the signed number with the same low 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


class DropoutClock:
    """Which sequences of which optimizer step the model is seeing, as device tensors that a captured graph reads anew.

    step: int32 scalar. sequences: int32 [batch], each row's number within the step's window over all micro-batches and
    processes, so that another micro-batch shape, a recompute or a resumed run meets the same masks with no RNG state.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed = seed
        self.step = torch.zeros((), dtype=torch.int32, device=device)
        self.sequences = torch.zeros(1, dtype=torch.int32, device=device)
        self._last: tuple | None = None

    def set(self, step: int, sequences: torch.Tensor) -> None:
        """Name the optimizer step and the rows of the micro-batch about to run."""
        self.step.fill_(step)
        sequences = sequences.to(torch.int32)
        if self.step.is_cuda and not sequences.is_cuda:  # a copy from pageable memory would wait for the GPU
            sequences = sequences.pin_memory()
        if self.sequences.shape == sequences.shape:
            self.sequences.copy_(sequences, non_blocking=True)
        else:
            self.sequences = sequences.to(self.step.device, non_blocking=True)
        self._last = None

    def salted(self, salt: int) -> int:
        """Return the run's seed and a module's salt as one signed 32-bit number."""
        return int32(self.seed * 0x9E3779B1 ^ salt)

    def keep(self, salt: int, length: int, features: int, p: float) -> torch.Tensor:
        """Return which inputs survive, bool [batch, length, features]; modules that read one x ask for one mask."""
        asked = (salt, length, features, p)
        if self._last is None or self._last[0] != asked:
            self._last = (asked, dropout_mask(self.step, self.sequences, self.salted(salt), length, features, p))
        return self._last[1]


def dropout_mask(
    step: torch.Tensor, sequences: torch.Tensor, salt: int | torch.Tensor, length: int, features: int, p: float
) -> torch.Tensor:
    """Return which inputs survive, bool [batch, length, features]: a hash of step, sequence, position and feature.

    Its two halves of 16 bits serve two neighbouring features: even so it is half of a kernel's instructions.
    """
    key = mix(mix(step ^ salt) ^ sequences)
    position = torch.arange(length, dtype=torch.int32, device=step.device)
    key = mix(key[:, None] ^ mix(position)[None])
    pair = torch.arange((features + 1) // 2, dtype=torch.int32, device=step.device)
    bits = mix(key[..., None] ^ (pair * int32(0x9E3779B1)))
    halves = torch.stack([bits & 0xFFFF, (bits >> 16) & 0xFFFF], -1).flatten(-2)
    return halves[..., :features] >= drop_threshold(p)


def drop_threshold(p: float) -> int:
    """Return how many of the 2**16 values of half a hash drop."""
    return round(p * 2**16)


class StatelessDropout(nn.Module):
    """Stands in for peft's nn.Dropout on an adapter's input, x: [batch, length, features]; identity in eval mode."""

    def __init__(self, p: float, clock: DropoutClock, salt: int):
        super().__init__()
        self.p, self.clock, self.salt = p, clock, salt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = self.clock.keep(self.salt, x.shape[-2], x.shape[-1], self.p)
        return torch.where(keep, x, 0) * (1 / (1 - self.p))


# Modules that read the same x share a mask, so that one pass over x can serve all of them.
READERS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def salt_of(name: str) -> int:
    """Return the number that tells a module's masks, or those of its group of readers, from all others'."""
    parent, _, leaf = name.rpartition(".")
    return zlib.crc32(f"{parent}.{READERS.get(leaf, leaf)}".encode())


def use_stateless_dropout(model: nn.Module, p: float, clock: DropoutClock) -> int:
    """Replace the dropout of every adapter of a peft model and return how many were replaced."""
    count = 0
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict) and p > 0:
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = StatelessDropout(p, clock, salt_of(name))
                count += 1
    return count


# ------------------------------------------------------------------------------------------------ cross entropy


def chunk_rows(vocabulary: int, free_bytes: int | None = None) -> int:
    """Return how many positions' logits to hold at once: a tenth of free_bytes, at most 512 rows; None: 256 MiB."""
    if free_bytes is None:
        return max(16, 2**26 // vocabulary)
    return max(128, min(512, free_bytes // 10 // (8 * vocabulary)) // 128 * 128)


def _chunk_loss(rows, weight, bias, targets, with_gradient: bool):
    """Return one chunk's summed loss and the gradient of its rows. rows: [chunk, width]; targets: [chunk]."""
    logits = F.linear(rows.to(weight.dtype), weight, bias).float()  # [chunk, vocabulary]
    kept = (targets != -100).float()[:, None]
    index = targets.clamp_min(0)[:, None]
    log_sum = torch.logsumexp(logits, -1, keepdim=True)
    loss = ((log_sum - logits.gather(1, index)) * kept).sum()
    if not with_gradient:
        return loss, None
    one_hot = torch.arange(len(weight), device=weight.device)[None] == index
    logits.sub_(log_sum).exp_().sub_(one_hot.float()).mul_(kept)  # softmax - one-hot, in the logits' own memory
    return loss, (logits.to(weight.dtype) @ weight).to(rows.dtype)


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk, chunk_loss):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            piece = slice(start, start + chunk)
            part, rows = chunk_loss(hidden[piece], weight, bias, labels[piece], gradient is not None)
            loss += part
            if gradient is not None:
                gradient[piece] = rows
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    chunk: int | None = None,
    chunk_loss: Callable = _chunk_loss,
) -> torch.Tensor:
    """Return the summed cross entropy, fp32, of `hidden @ weight.T + bias` against `labels` without holding all logits.

    hidden: [positions, width]; weight: [vocabulary, width], frozen; labels: [positions], -100 where nothing is
    supervised. The gradient of `hidden` is finished in the forward, chunk by chunk (the idea of Liger-Kernel's fused
    linear cross entropy); `weight` and `bias` get none, so an adapter on the head needs another loss. chunk_loss:
    `_chunk_loss`, perhaps compiled.
    """
    return _FrozenHeadCrossEntropy.apply(hidden, weight, bias, labels, chunk or chunk_rows(len(weight)), chunk_loss)


compiled_chunk_loss = torch.compile(_chunk_loss, dynamic=False)  # compiles when first called, not here


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label of each position's next token, [batch, length]; the last position has none (-100)."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


# ------------------------------------------------------------------------------------------------ layouts of the kernels


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is laid on a GPU; chosen by measurement, see tests/benchmarks/tune_kernels.py."""

    block_m: int  # rows of a tile; quantisation blocks, for the dequantisation
    block_k: int
    warps: int


WIDEN = Launch(block_m=16, block_k=128, warps=4)  # block_k: of up to 16 adapter columns, half of 32
WIDEN_SHARE = 1024  # columns that a program sums u up over: 512 rows then make enough programs for a large GPU
# Adapter columns that ride in the pass over x: of 16, SwiGLU's at 16 x 512 tokens takes 212 us in place of 275 (355 to
# 214 with dropout; H100), of 48 q, k and v's on 24 multiprocessors took 40 in place of 32.
MOST_WIDEN_COLUMNS = 32
DEQUANTIZE = Launch(block_m=128, block_k=64, warps=2)
ROTATE = Launch(block_m=16, block_k=64, warps=4)  # of heads 128 wide: of others as many numbers


WIDEN_BACKWARD = Launch(block_m=64, block_k=64, warps=4)
MASKED_BACKWARD = Launch(block_m=16, block_k=64, warps=2)
# Adapter columns up to which SwiGLU's backward has a kernel: it holds three sums [columns, block_k] in registers, and on
# sm_89 so many take 250 of 255 at the smallest block_k, none spilled. Beyond, torch does it, with fp32 copies.
MOST_COLUMNS = 256
SHARE_ROWS = 256  # at least: a share's sums, 192 bytes a column at rank 16, are then 8 % of what it reads and writes
SHARE_PROGRAMS = 4  # a multiprocessor, as many as its registers hold at rank 16


def swiglu_launch(columns: int) -> Launch:
    """Return the layout of the kernel behind `swiglu_backward`, whose sums have up to so many adapter columns."""
    if columns <= 32:
        return Launch(block_m=16, block_k=64, warps=4)
    return Launch(block_m=16, block_k=32, warps=8)


def share_rows(rows: int, blocks: int, device: torch.device) -> int:
    """Return over how many rows a program of that kernel sums up, where they stand in `blocks` blocks of columns."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    shares = max(1, min(rows // SHARE_ROWS, SHARE_PROGRAMS * processors // blocks))
    return -(-rows // shares)


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())  # tl.dot takes powers of two from 16 on


# ------------------------------------------------------------------------------------------------ operators
#
# Linears that read one x, with their rank-r adapters, are one operator with the gradient of its own arithmetic:
#   y = [x | u] [W | scale B]^T + bias,  u = dropout(x) A^T       (SwiGLU first, where x is [gate | up])
# W is dequantised, used and dropped. The adapter rides in the base product's own reduction, so no pass reads and
# writes whole activations for y += u B^T, and the backward's product yields dx and du at once. An opaque operator
# keeps a compiler from saving W.


def adapter_columns(rank: int, members: int) -> int:
    """Return the adapters' columns in the wide operands: a multiple of 16, for aligned rows."""
    return -(-rank * members // 16) * 16


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


def no_masks(x: torch.Tensor) -> Masks:
    """Return the masks of an operator without an adapter, which nothing reads."""
    return Masks(x, x, x, len(x), 0.0)


def stack_adapters(A: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return A of all members, one below the other and zeros up to the adapter columns, [adapter columns, columns]."""
    stacked = (torch.cat(A) if len(A) > 1 else A[0]).to(dtype)
    missing = adapter_columns(len(A[0]), len(A)) - len(stacked)
    return F.pad(stacked, (0, 0, 0, missing)) if missing else stacked


def widen(
    x: torch.Tensor, A: torch.Tensor, masks: Masks, scale: float, swiglu: bool, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ([x | u], [rows, columns + adapter columns], and scale u), u = dropout(x) A^T. x: [rows, columns]; swiglu:
    [rows, 2 columns].
    """
    extra, columns = A.shape
    wide = x.new_empty(len(x), columns + extra)
    if kernels and 0 < extra <= MOST_WIDEN_COLUMNS:
        u, shares, block_r = x.new_empty(len(x), extra), triton.cdiv(columns, WIDEN_SHARE), _power(extra)
        sums = x.new_empty(shares, len(x), extra, dtype=torch.float32)
        _widen_kernel(x, wide, wide, A, sums, masks, swiglu, block_r)
        training_kernels.settle_kernel[(triton.cdiv(len(x), 64),)](
            sums, wide, u, len(x), columns, columns + extra, extra, scale, SHARES=shares, BLOCK_M=64, BLOCK_R=block_r,
            num_warps=4,
        )  # fmt: skip
        return wide, u
    if kernels:
        dropped = x.new_empty(len(x), columns) if masks.p > 0 else wide[:, :columns]
        _widen_kernel(x, wide, dropped, A, wide, masks, swiglu, 0)
    else:
        wide[:, :columns] = _swiglu(x) if swiglu else x
        dropped = _drop(wide[:, :columns], masks) if masks.p > 0 else wide[:, :columns]
    if extra:
        torch.mm(dropped, A.t(), out=wide[:, columns:])
    return wide, wide[:, columns:] * scale


def _widen_kernel(x, wide, dropped, A, sums, masks: Masks, swiglu: bool, block_r: int) -> None:
    extra, columns = A.shape
    block_k = min(WIDEN.block_k, 16 * WIDEN.block_k // block_r) if block_r else WIDEN.block_k
    share = WIDEN_SHARE if block_r else block_k
    grid = (triton.cdiv(len(x), WIDEN.block_m), triton.cdiv(columns, share))
    training_kernels.widen_kernel[grid](
        x, wide, dropped, A, sums, masks.step, masks.sequences, masks.salt, len(x), share, masks.length, columns,
        columns + extra, extra, drop_threshold(masks.p), 1 / (1 - masks.p), SWIGLU=swiglu, DROPOUT=masks.p > 0,
        BLOCK_M=WIDEN.block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=WIDEN.warps, num_stages=1,
    )  # fmt: skip


def widen_backward(
    wide: torch.Tensor, x: torch.Tensor, A: torch.Tensor, masks: Masks, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dx, dropout(x)) from wide = [dx | du], which may be used up: its dx lacks what comes through the adapters."""
    extra, columns = A.shape
    dx, du = wide[:, :columns], wide[:, columns:]
    if not _leaves_no_gaps(extra, masks.p, kernels):
        if masks.p == 0:
            return dx.addmm_(du, A), x
        dx += _drop(du @ A, masks)
        return dx, _drop(x, masks)
    out, launch = x.new_empty(x.shape), MASKED_BACKWARD if masks.p > 0 else WIDEN_BACKWARD
    dropped = torch.empty_like(x) if masks.p > 0 else x
    grid = (triton.cdiv(len(x), launch.block_m), triton.cdiv(columns, launch.block_k))
    training_kernels.widen_backward_kernel[grid](
        wide, x, out, dropped, A, masks.step, masks.sequences, masks.salt, len(x), masks.length, columns,
        columns + extra, extra, drop_threshold(masks.p), 1 / (1 - masks.p), DROPOUT=masks.p > 0,
        BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BLOCK_R=_power(extra), num_warps=launch.warps,
    )  # fmt: skip
    return out, dropped


def _leaves_no_gaps(extra: int, p: float, kernels: bool) -> bool:
    """Return whether `widen_backward` writes dx anew: attention would have to copy one that is a part of [dx | du].

    Without a mask and with many adapter columns cuBLAS completes it in place.
    """
    return kernels and (p > 0 or extra <= 64)


def swiglu_backward(
    wide: torch.Tensor, x: torch.Tensor, A: torch.Tensor, masks: Masks, u: torch.Tensor | None, rank: int, kernels: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (d[gate | up], dA, dB of gate and up [2, columns, rank]) from wide = [dx | du] and x = [gate | up].

    u: [rows, adapter columns], that of gate and up with their scale; None and rank 0 where their dB is not wanted.
    """
    extra, columns = A.shape
    if kernels and max(extra, rank) <= MOST_COLUMNS:
        return _swiglu_backward_kernel(wide, x, A, masks, u, rank)
    du = wide[:, columns:]
    tile, back = _swiglu(x), du @ A
    if masks.p > 0:
        tile, back = _drop(tile, masks), _drop(back, masks)
    grads = _swiglu_backward(x, wide[:, :columns] + back)
    parts = [grads[:, i * columns : (i + 1) * columns].t() for i in range(2 if rank else 0)]
    dB = [_product_fp32(part, u[:, i * rank : (i + 1) * rank]) for i, part in enumerate(parts)]
    return grads, _product_fp32(du.t(), tile), torch.stack(dB) if dB else _no_dB(x, columns)


def _no_dB(x: torch.Tensor, columns: int) -> torch.Tensor:
    return x.new_empty(2, columns, 0, dtype=torch.float32)


def _swiglu_backward_kernel(wide, x, A, masks, u, rank):
    """`swiglu_backward` in one pass: shares of the rows write sums of their own, which are added up in fixed order."""
    (extra, columns), rows = A.shape, len(x)
    launch = swiglu_launch(max(extra, rank))
    blocks = triton.cdiv(columns, launch.block_k)
    share = triton.cdiv(share_rows(rows, blocks, x.device), launch.block_m) * launch.block_m
    shares, grads = triton.cdiv(rows, share), torch.empty_like(x)
    dA = x.new_empty(shares, extra, columns, dtype=torch.float32)
    dB = x.new_empty(shares, 2, columns, rank, dtype=torch.float32)
    training_kernels.swiglu_backward_kernel[(blocks, shares)](
        wide, x, grads, A, u if rank else x, dA, dB, masks.step, masks.sequences, masks.salt, rows, share, masks.length,
        columns, columns + extra, extra, u.stride(0) if rank else 0, rank, drop_threshold(masks.p), 1 / (1 - masks.p),
        DROPOUT=masks.p > 0, BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BLOCK_R=_power(extra) if extra else 0,
        BLOCK_U=_power(rank) if rank else 0, num_warps=launch.warps, num_stages=1,
    )  # fmt: skip
    return grads, dA.sum(0), dB.sum(0)


class Packed(NamedTuple):
    """The 4-bit weights of one or more linears, stacked on their outputs. codes: uint8, two weights a byte; lut: fp32
    [16].

    constants: absmax (fp32), or absmax (uint8), second-level absmax and offset (a value each for `blocksizes[1]`
    first ones), and code.
    """

    codes: torch.Tensor
    constants: list[torch.Tensor]
    lut: torch.Tensor
    columns: int
    blocksizes: list[int]
    quant_type: str


def extended_weight(W: Packed, B: list[torch.Tensor], scale: float, dtype: torch.dtype, kernels: bool) -> torch.Tensor:
    """Return [W | scale B], [out features, columns + adapter columns]; the members' B stand on its diagonal."""
    rows, rank = W.codes.numel() * 2 // W.columns, B[0].shape[1] if B else 0
    extra = adapter_columns(rank, len(B))
    out = torch.empty(rows, W.columns + extra, dtype=dtype, device=W.codes.device)
    absmax, nested = W.constants[0], len(W.constants) > 1
    if kernels:
        absmax2, offset, code2 = W.constants[1:] if nested else (absmax,) * 3
        row_blocks = W.columns // W.blocksizes[0]
        programs, b = triton.cdiv(rows * row_blocks, DEQUANTIZE.block_m), [*B, W.lut, W.lut, W.lut]
        block_r = _power(extra or 1)
        b_rows = max(1, 1024 // block_r)  # of B for a program: more would take more registers than W does
        training_kernels.dequantize_kernel[(programs + (triton.cdiv(rows, b_rows) if B else 0),)](
            W.codes.view(torch.int32), absmax, absmax2, offset, code2, W.lut, *b[:3], out, rows * row_blocks, rows,
            len(B[0]) if B else 0, len(B[1]) if len(B) > 1 else rows, out.stride(0), rank, extra, scale, programs,
            NESTED=nested, BLOCKSIZE=W.blocksizes[0], BLOCKSIZE2=W.blocksizes[1], ROW_BLOCKS=row_blocks,
            BLOCKS=DEQUANTIZE.block_m, ROWS=b_rows, BLOCK_R=block_r, SHUFFLE=SHUFFLE,
            num_warps=DEQUANTIZE.warps,
        )  # fmt: skip
        return out
    if nested:
        codes, absmax2, offset, code2 = W.constants
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax2, code2, W.blocksizes[1], torch.float32)
        absmax += offset.repeat_interleave(W.blocksizes[1])[: len(absmax)]
    out[:, : W.columns] = torch.ops.bitsandbytes.dequantize_4bit(
        W.codes, absmax, W.blocksizes[0], W.quant_type, [rows, W.columns], dtype
    )
    out[:, W.columns :] = F.pad(torch.block_diag(*B) * scale, (0, extra - rank * len(B))) if B else 0
    return out


def _product_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b in fp32: a gradient summed over thousands of rows is not rounded to 8 bits on its way out."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


@torch.library.custom_op("qlora::linear", mutates_args=())
def linear(
    x: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor], bias: torch.Tensor | None, scale: float,
    hands_B: bool, swiglu: bool, before_u: torch.Tensor | None, before_B: list[torch.Tensor],
    codes: torch.Tensor, constants: list[torch.Tensor], lut: torch.Tensor, columns: int, blocksizes: list[int],
    quant_type: str, step: torch.Tensor, sequences: torch.Tensor, salt: torch.Tensor, length: int, p: float,
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (y, scale u), y: [rows, out features of all members]. x: [rows, columns], or [gate | up] of SwiGLU.

    hands_B: the operator that reads y makes the gradient of B. before_u, before_B: where SwiGLU's does so, the u and B
    that came with [gate | up]; they take no part in y.
    """
    W = extended_weight(Packed(codes, constants, lut, columns, blocksizes, quant_type), B, scale, x.dtype, kernels)
    if not A:
        wide = widen(x, x.new_empty(0, columns), no_masks(x), 0.0, swiglu, kernels)[0] if swiglu else x
        return F.linear(wide, W, bias), x.new_empty(0)
    wide, u = widen(x, stack_adapters(A, x.dtype), Masks(step, sequences, salt, length, p), scale, swiglu, kernels)
    return F.linear(wide, W, bias), u


LINEAR_ARGUMENTS = tuple(inspect.signature(linear._init_fn).parameters)


@linear.register_fake
def _(x, A, B, bias, scale, hands_B, swiglu, before_u, before_B, codes, constants, lut, columns, *rest):
    u = x.new_empty(len(x), adapter_columns(len(A[0]), len(A))) if A else x.new_empty(0)
    return x.new_empty(len(x), codes.numel() * 2 // columns), u


@torch.library.custom_op("qlora::linear_backward", mutates_args=())
def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, u: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor], scale: float,
    hands_B: bool, swiglu: bool, before_u: torch.Tensor | None, before_rank: int,
    codes: torch.Tensor, constants: list[torch.Tensor], lut: torch.Tensor, columns: int, blocksizes: list[int],
    quant_type: str, step: torch.Tensor, sequences: torch.Tensor, salt: torch.Tensor, length: int, p: float,
    kernels: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (dx, dA of all members [adapter columns, columns], dB [out features, adapter columns], dB of gate and up
    [2, columns, before_rank]), all but dx in fp32. hands_B: without dB.
    """
    W = extended_weight(Packed(codes, constants, lut, columns, blocksizes, quant_type), B, scale, grad.dtype, kernels)
    dB = grad.new_empty(grad.shape[1], 0, dtype=torch.float32) if hands_B else _product_fp32(grad.t(), u)
    wide = grad @ W
    del W
    stacked, masks = stack_adapters(A, grad.dtype), Masks(step, sequences, salt, length, p)
    if swiglu:
        dx, dA, before_dB = swiglu_backward(wide, x, stacked, masks, before_u, before_rank, kernels)
        return dx, dA, dB, before_dB
    dx, tile = widen_backward(wide, x, stacked, masks, kernels)
    return dx, _product_fp32(wide[:, columns:].t(), tile), dB, _no_dB(x, columns)


@linear_backward.register_fake
def _(grad, x, u, A, B, scale, hands_B, swiglu, before_u, before_rank, codes, constants, lut, columns, *rest):
    extra, (p, kernels) = adapter_columns(len(A[0]), len(A)), rest[-2:]
    alone = swiglu or _leaves_no_gaps(extra, p, kernels)
    dx = x.new_empty(x.shape) if alone else x.new_empty(len(x), columns + extra)[:, :columns]
    sizes = (extra, columns), (grad.shape[1], 0 if hands_B else extra), (2, columns, before_rank)
    return dx, *(x.new_empty(size, dtype=torch.float32) for size in sizes)


def _linear_setup(ctx, inputs, output):
    (
        x,
        A,
        B,
        _,
        ctx.scale,
        ctx.hands_B,
        ctx.swiglu,
        before_u,
        before_B,
        codes,
        constants,
        lut,
        *ctx.quantisation,
        step,
        sequences,
        salt,
        ctx.length,
        ctx.p,
        ctx.kernels,
    ) = inputs
    ctx.members, ctx.levels = len(A), len(constants)
    ctx.before = [(b.shape[1], b.dtype) for b in before_B]
    ctx.save_for_backward(x, output[1], before_u, codes, lut, step, sequences, salt, *constants, *A, *B)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, grad, _):
    x, u, before_u, codes, lut, step, sequences, salt, *rest = ctx.saved_tensors
    constants, A, B = rest[: ctx.levels], rest[ctx.levels : ctx.levels + ctx.members], rest[ctx.levels + ctx.members :]
    quantised = codes, constants, lut, *ctx.quantisation
    grads = dict.fromkeys(LINEAR_ARGUMENTS) | {"A": [], "B": [], "before_B": [], "constants": [None] * ctx.levels}
    if not A:
        grads["x"] = product_backward(grad.contiguous(), x, ctx.swiglu, *quantised, ctx.kernels)
        return tuple(grads.values())
    grads["x"], dA, dB, before_dB = linear_backward(
        grad.contiguous(), x, u, A, B, ctx.scale, ctx.hands_B, ctx.swiglu, before_u,
        ctx.before[0][0] if ctx.before else 0, *quantised, step, sequences, salt, ctx.length, ctx.p, ctx.kernels,
    )  # fmt: skip
    rank = len(A[0])
    grads["A"] = [dA[i * rank : (i + 1) * rank].to(a.dtype) for i, a in enumerate(A)]
    if ctx.hands_B:
        grads["B"] = [None] * len(B)
    else:
        parts = enumerate(dB.split([len(b) for b in B]))  # member i's rows; of their columns its own
        grads["B"] = [part[:, i * rank : (i + 1) * rank].to(b.dtype) for (i, part), b in zip(parts, B, strict=True)]
    grads["before_B"] = [before_dB[i].to(dtype) for i, (_, dtype) in enumerate(ctx.before)]
    return tuple(grads.values())


linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("qlora::product_backward", mutates_args=())
def product_backward(
    grad: torch.Tensor, x: torch.Tensor, swiglu: bool, codes: torch.Tensor, constants: list[torch.Tensor],
    lut: torch.Tensor, columns: int, blocksizes: list[int], quant_type: str, kernels: bool,
) -> torch.Tensor:  # fmt: skip
    """Return dx where there is no adapter."""
    packed = Packed(codes, constants, lut, columns, blocksizes, quant_type)
    dx = grad @ extended_weight(packed, [], 0.0, grad.dtype, kernels)
    return swiglu_backward(dx, x, x.new_empty(0, columns), no_masks(x), None, 0, kernels)[0] if swiglu else dx


@product_backward.register_fake
def _(grad, x, *rest):
    return torch.empty_like(x)


@torch.library.custom_op("qlora::rotate", mutates_args=())
def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q and k rotated as transformers' apply_rotary_pos_emb does, and v, each [batch, length, its heads, width].

    qkv: [batch, length, (heads + 2 kv_heads) width]; cos, sin: [batch or 1, length, width]. Computed in fp32, rounded
    once. The compiler's kernel for the way back took 3 to 4 times what its bytes take (H100).
    """
    parts = _apart(qkv, heads, kv_heads)
    _rotate(qkv, *parts, cos, sin, back=False)
    return parts


def _apart(qkv: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tensors for q, k and v."""
    *shape, width = *qkv.shape[:-1], qkv.shape[-1] // (heads + 2 * kv_heads)
    return tuple(qkv.new_empty(*shape, number, width) for number in (heads, kv_heads, kv_heads))


def _rotate(qkv, q, k, v, cos, sin, back: bool) -> None:
    """Fill q, k and v from qkv, or back the gradient of qkv from theirs."""
    (*_, heads, width), kv_heads = q.shape, k.shape[-2]
    rows, block = qkv.numel() // width, triton.next_power_of_2(width // 2)
    block_m = max(1, ROTATE.block_m * ROTATE.block_k // block)
    training_kernels.rotate_kernel[(triton.cdiv(rows, block_m),)](
        qkv, q, k, v, cos.contiguous(), sin.contiguous(), rows, cos.numel() // width, HEADS=heads, KV_HEADS=kv_heads,
        HALF=width // 2, BLOCK_M=block_m, BLOCK_K=block, BACK=back, num_warps=ROTATE.warps,
    )  # fmt: skip


@rotate.register_fake
def _(qkv, cos, sin, heads, kv_heads):
    return _apart(qkv, heads, kv_heads)


@torch.library.custom_op("qlora::rotate_backward", mutates_args=())
def rotate_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of qkv."""
    grad = dq.new_empty(*dq.shape[:2], sum(part.shape[2] for part in (dq, dk, dv)) * dq.shape[3])
    _rotate(grad, dq.contiguous(), dk.contiguous(), dv.contiguous(), cos, sin, back=True)
    return grad


@rotate_backward.register_fake
def _(dq, dk, dv, cos, sin):
    return dq.new_empty(*dq.shape[:2], sum(part.shape[2] for part in (dq, dk, dv)) * dq.shape[3])


rotate.register_autograd(
    lambda ctx, *grads: (rotate_backward(*grads, *ctx.saved_tensors), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:3]),
)


# ------------------------------------------------------------------------------------------------ fused layers


def fusable(module: nn.Module) -> bool:
    """Return whether a module is a 4-bit linear, bare or with one plain LoRA adapter; DoRA and the rest stay peft's."""
    base = getattr(module, "base_layer", module)
    if not isinstance(base, bnb.nn.Linear4bit) or getattr(base.weight, "quant_state", None) is None:
        return False
    if module is base:
        return True
    plain = isinstance(module, LoraLinear4bit) and not module.lora_variant and not any(module.lora_bias.values())
    return plain and module.active_adapters == list(module.lora_A) and len(module.lora_A) == 1


def stack_weights(bases: list[bnb.nn.Linear4bit]) -> Packed:
    """Move the packed weights of linears that read one x behind one another, so that one launch dequantises them all.

    The modules keep views of their parts and nothing is held twice.
    """
    states = [base.weight.quant_state for base in bases]
    codes = torch.cat([base.weight.data.view(torch.uint8).flatten() for base in bases])
    absmax, nested, start = torch.cat([state.absmax for state in states]), states[0].nested, 0
    blocksizes = [states[0].blocksize, states[0].state2.blocksize if nested else 1]
    whole = nested and all(len(state.absmax) % blocksizes[1] == 0 for state in states[:-1])
    if whole:
        absmax2 = torch.cat([state.state2.absmax for state in states])
        offset = torch.cat([state.offset.expand_as(state.state2.absmax) for state in states])
        constants = [absmax, absmax2, offset, states[0].state2.code]
    elif nested:  # of tiny layers: second-level blocks would not start where a member starts
        constants = [torch.cat([_first_level(state) for state in states])]
    else:
        constants = [absmax]
    for base, state, part in zip(bases, states, absmax.split([len(s.absmax) for s in states]), strict=True):
        size = base.weight.data.nbytes
        base.weight.data = codes[start : start + size].view(base.weight.dtype).view_as(base.weight)
        start += size
        state.absmax = part
    return Packed(codes, constants, states[0].code, bases[0].in_features, blocksizes, states[0].quant_type)


def _first_level(state: bnb.functional.QuantState) -> torch.Tensor:
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


class Group:
    """Linears that read one x, as one operator: x [..., columns] (or [..., 2 columns], swiglu) -> [..., outputs]."""

    def __init__(self, modules: list[nn.Module], salt: int, clock: DropoutClock, p: float, kernels: bool):
        bases = [getattr(module, "base_layer", module) for module in modules]
        adapted = [module for module in modules if hasattr(module, "lora_A")]
        self.leader, self.clock, self.p = modules[0], clock, p
        self.weight = stack_weights(bases)
        self.kernels = kernels and self.weight.columns % self.weight.blocksizes[0] == 0
        self.outputs = [base.out_features for base in bases]
        self.salt = torch.tensor(clock.salted(salt), dtype=torch.int32, device=bases[0].weight.device)
        biases = [base.bias for base in bases]
        self.bias = torch.cat([bias.detach() for bias in biases]) if all(bias is not None for bias in biases) else None
        self.A = [next(iter(module.lora_A.values())).weight for module in adapted]
        self.B = [next(iter(module.lora_B.values())).weight for module in adapted]
        self.scale = float(next(iter(adapted[0].scaling.values()))) if adapted else 0.0

    def adapters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return A and B of the members, empty where they have none or are to run without."""
        return ([], []) if self.A and self.leader.disable_adapters else (self.A, self.B)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)[0]

    def run(
        self, x: torch.Tensor, hands_B: bool = False, swiglu: bool = False, before_u: torch.Tensor | None = None,
        before_B: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return `linear`'s y and u."""
        *shape, width = x.shape
        A, B = self.adapters()
        p = self.p if self.leader.training else 0.0
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        masks = self.clock.step, self.clock.sequences, self.salt, shape[-1], p
        before = hands_B, swiglu, before_u, before_B
        y, u = linear(x.reshape(-1, width), A, B, bias, self.scale, *before, *self.weight, *masks, self.kernels)
        return y.view(*shape, -1), u


def _groupable(modules: list[nn.Module]) -> bool:
    """Return whether the modules can share a Group: all 4-bit, of one kind, all or none with adapter and bias."""
    if not all(fusable(module) for module in modules):
        return False
    bases = [getattr(module, "base_layer", module) for module in modules]
    kinds = {
        (
            hasattr(module, "lora_A"), base.bias is None, base.weight.quant_state.nested,
            base.weight.quant_state.quant_type, base.in_features, base.weight.quant_state.blocksize,
        )
        for module, base in zip(modules, bases, strict=True)
    }  # fmt: skip
    return len(kinds) == 1


MLPS = {"Qwen2MLP", "Qwen3MLP", "LlamaMLP", "MistralMLP"}


def _fused_attention(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
    """The attention of Qwen2, Qwen3, Llama and Mistral with q, k and v in one operator. [batch, length, width]."""
    shape, qkv = hidden_states.shape[:-1], self.fused_qkv
    if qkv.kernels and not hasattr(self, "q_norm"):
        heads, kv_heads = (size // self.head_dim for size in qkv.outputs[:2])
        parts = rotate(qkv(hidden_states), *position_embeddings, heads, kv_heads)
        q, k, v = (part.transpose(1, 2) for part in parts)
    else:
        parts = qkv(hidden_states).split(qkv.outputs, -1)
        q, k, v = (part.view(*shape, -1, self.head_dim) for part in parts)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        apply_rotary = sys.modules[type(self).__module__].apply_rotary_pos_emb
        q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        v = v.contiguous().transpose(1, 2)  # else the backward would keep all of q, k and v for the sake of v
    mixed, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling)
    return self.fused_out(mixed.reshape(*shape, -1)), weights


def _fused_mlp(self, x):
    """down(silu(gate) * up) with gate and up in one operator and SwiGLU at the head of the other.

    With adapters on both, the backward of the other makes gate's and up's dB while it has their gradients at hand: a
    product of its own read them all once more, and made twice what was wanted.
    """
    first, second = self.fused_gate_up, self.fused_down
    handed = first.adapters()[1] if second.adapters()[1] else []
    handing = len(handed) > 0  # of bool() of a list Dynamo of torch 2.11 knows nothing: it would compile no layer whole
    gate_up, u = first.run(x, hands_B=handing)
    return second.run(gate_up, swiglu=True, before_u=u if handing else None, before_B=handed)[0]


def _fused_linear(self, x, *args, **kwargs):
    return self.fused_alone(x)


@functools.cache
def _with_forward(kind: type, forward: Callable) -> type:
    """Return a subclass with another forward: one class for all layers, so that one compilation serves them."""
    return type("Fused" + kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _switch(module: nn.Module, forward: Callable, **groups: Group) -> None:
    module.__class__ = _with_forward(type(module), forward)
    for name, group in groups.items():
        setattr(module, "fused_" + name, group)  # no nn.Module: the parameters stay where peft put and saves them


def fuse(model: PeftModel, clock: DropoutClock, p: float, kernels: bool) -> int:
    """Give every 4-bit linear of the decoder layers its operator and return how many; peft keeps the parameters."""
    names = {module: name for name, module in model.named_modules()}
    fused: set[nn.Module] = set()

    def group(*modules: nn.Module) -> Group:
        fused.update(modules)
        return Group(list(modules), salt_of(names[modules[0]]), clock, p, kernels)

    for layer in model.get_base_model().get_decoder().layers:
        for module in list(layer.modules()):
            kind = type(module).__name__
            if kind in ATTENTIONS and module.config._attn_implementation == CAUSAL:
                qkv = [module.q_proj, module.k_proj, module.v_proj]
                if _groupable(qkv) and fusable(module.o_proj):
                    _switch(module, _fused_attention, qkv=group(*qkv), out=group(module.o_proj))
            elif kind in MLPS and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
                gate_up = [module.gate_proj, module.up_proj]
                if _groupable(gate_up) and fusable(module.down_proj):
                    _switch(module, _fused_mlp, gate_up=group(*gate_up), down=group(module.down_proj))
        for module in list(layer.modules()):
            if module not in fused and hasattr(module, "lora_A") and fusable(module):
                _switch(module, _fused_linear, alone=group(module))
    return len(fused)


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Keep what the operator behind SwiGLU makes: the backward reads only its u, 32 bytes a token, and recomputing the
    whole pass and product for it took 3 % of a step.
    """
    keep = op is torch.ops.qlora.linear.default and args[LINEAR_ARGUMENTS.index("swiglu")]
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_small_products():
    return create_selective_checkpoint_contexts(_policy)


def _run_layer(layer: nn.Module, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
    """A decoder layer, its checkpoint inside, so that a compiler drops from the recompute what the backward does not
    read.
    """
    forward = type(layer).forward
    if layer.recompute and layer.training and torch.is_grad_enabled():
        return checkpoint(
            forward, layer, hidden, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_small_products,
            **kwargs,
        )  # fmt: skip
    return forward(layer, hidden, **kwargs)


def compile_layers(model: PeftModel) -> None:
    """Compile the decoder layer once for all layers, for training; evaluation, little work, runs as it is."""
    # A norm's output is a product of what is saved anyway; the partitioner would save it too, since an opaque operator
    # reads it: 8 kB a token and layer of Qwen2.5-3B.
    torch._functorch.config.ban_recompute_materialized_backward = False
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())
    compiled = torch.compile(_run_layer, dynamic=False)

    def run(layer: nn.Module, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        # The embedding's output needs no gradient: the first layer would be compiled anew for it.
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        return (compiled if layer.training else _run_layer)(layer, hidden, **kwargs)

    for layer in model.get_base_model().get_decoder().layers:
        layer.recompute = layer.gradient_checkpointing
        layer.gradient_checkpointing = False  # transformers would put its own checkpoint around the compiled layer
        layer.forward = functools.partial(run, layer)


def compiled_in_pieces() -> str | None:
    """Return why torch.compile could not take a layer whole, None if it did or has compiled nothing.

    Pieces compute the same; around a checkpoint they recompute and keep more: 28 % more memory at 16 x 512 tokens.
    """
    reasons = torch._dynamo.utils.counters["graph_break"]
    return next(iter(reasons)).splitlines()[0] if reasons else None


@contextlib.contextmanager
def inputs_in_main_memory(shape: tuple[int, ...]) -> Iterator[None]:
    """Have what is saved for a backward in this shape, the inputs of checkpointed layers, wait for it in main memory.

    torch's save_on_cpu would move whatever is saved, packed weights too.
    The copies ride on the stream of the computation: 33 MB a layer of a 3B at 8,192 tokens, about 2 ms where the layer
    takes 12, and nothing has to be waited for. No graph can hold them.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.device]:
        if tensor.shape != shape:
            return tensor.detach()  # not itself: an output saved by its own node would keep both alive
        kept = torch.empty(shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor.detach(), non_blocking=True), tensor.device

    def unpack(packed: torch.Tensor | tuple[torch.Tensor, torch.device]) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed[0].to(packed[1], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


# ------------------------------------------------------------------------------------------------ captured micro-step


def padding(name: str, length: int, device: torch.device) -> torch.Tensor:
    """Return what an argument of a captured step holds where no block is, int64 [length]: unlabelled, of two samples.

    Of two, since transformers makes no mask for a row of one while it can look: the warm-up would run other layers.
    """
    if name == "position_ids":
        return (torch.arange(length, device=device) - 1).clamp_min(0)
    return torch.full((length,), -100 if name == "labels" else 0, device=device)


class Captured:
    """A function of a batch as one CUDA graph: what is launched thousands of times a micro-step is launched once.

    step(input_ids=, labels=, ...) -> a scalar, free of host synchronisation; names: its arguments, each int64
    [batch, length]. Gradients accumulate in place in the parameters' .grad, which must exist and hold rubbish after
    warm-up and capture. What else the step reads (the dropout clock, the weights) is read anew at every replay.
    """

    def __init__(
        self, step: Callable[..., torch.Tensor], device: torch.device, batch: int, length: int, names: Iterable[str]
    ):
        self.step = step
        self.padding = {name: padding(name, length, device) for name in names}
        self.batch = {name: row.repeat(batch, 1) for name, row in self.padding.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets every library allocate its workspace outside of the graph
                step(**self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # blocks belong to a stream: the next warm-up could not use what this one reserved

    def capture(self, pool: Any) -> None:
        """Capture the step; graphs that never run at the same time may share a pool of memory."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = self.step(**self.batch)

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        """Replay on a batch of up to the captured shape; the rest is padding. The next replay overwrites the result."""
        for name, tensor in batch.items():
            rows, length = tensor.shape
            if tensor.shape != self.batch[name].shape:
                self.batch[name].copy_(self.padding[name])
            self.batch[name][:rows, :length].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.result


# ------------------------------------------------------------------------------------------------ optimizer


@functools.cache
def without_waits(kind: type) -> type:
    """Return a bitsandbytes optimizer that waits for the GPU once a step, not after each of 504 tensors."""

    class Optimizer(kind):
        @torch.no_grad()
        def step(self, closure: Callable | None = None) -> None:
            if not self.initialized:
                self.check_overrides()
                self.initialized = True
            for number, group in enumerate(self.param_groups):
                for i, parameter in enumerate(group["params"]):
                    if len(self.state[parameter]) == 0:
                        self.init_state(group, parameter, number, i)
                    self.prefetch_state(parameter)
                    self.update_step(group, parameter, number, i)
            if self.is_paged and torch.cuda.is_available():
                torch.cuda.synchronize()  # paged states are managed memory, which the CPU must not touch before

    Optimizer.__name__ = kind.__name__
    return Optimizer


# ------------------------------------------------------------------------------------------------ what runs here


@dataclasses.dataclass(frozen=True)
class FastPath:
    """Which parts of the fast path run, and the line that says so and why the others do not."""

    fused_lora: bool
    compile: bool
    cuda_graphs: bool
    kernels: bool  # the operators' Triton kernels
    line: str


def choose_fast_path(
    performance: PerformanceConfig, model: PeftModel, dtype: torch.dtype, device: torch.device, offload: bool = False
) -> FastPath:
    """Return what of fused_lora, compile and cuda_graphs runs here; ConfigError where `on` asks what cannot.

    offload: the inputs of checkpointed layers are to wait in main memory.
    """
    gpu, runs, reasons = device.type == "cuda", {}, {}
    layers = model.get_base_model().get_decoder().layers
    fusables = any(fusable(module) and hasattr(module, "lora_A") for layer in layers for module in layer.modules())

    def decide(name: str, obstacle: str | None) -> bool:
        wanted = getattr(performance, name)
        if wanted == "on" and obstacle:
            raise ConfigError(f"performance.{name}: cannot be on here: {obstacle}")
        runs[name] = wanted == "on" or (wanted == "auto" and not obstacle and gpu)
        if not runs[name]:
            reasons[name] = "off" if wanted == "off" else obstacle or "gains nothing on a CPU"
        return runs[name]

    fused = decide("fused_lora", None if fusables else "no plain LoRA adapter on a 4-bit linear")
    no_triton = gpu and triton is None and "Triton is not installed (Windows: pip install triton-windows)"
    compiled = decide("compile", no_triton or (None if fused else "it needs fused_lora"))
    copies = "no graph can hold the copies to main memory" if offload else None
    graphs = decide("cuda_graphs", copies if gpu else "there is no CUDA GPU")
    kernels = gpu and triton is not None and dtype is not torch.float32  # tl.dot would round fp32 to tf32
    line = "fast path: " + (", ".join(name for name, on in runs.items() if on) or "none")
    line += "".join(f" | without {name}: {reason}" for name, reason in reasons.items())
    return FastPath(fused, compiled, graphs, kernels, line)
